"""Kinds of values: whole numbers, shares, flags, lists; what is accepted, and how it is said."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from errors import InputError

FLAGS = {"true": True, "yes": True, "on": True, "1": True}
FLAGS |= {"false": False, "no": False, "off": False, "0": False}


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        expected: The values that are accepted, in words: "a whole number from 1 on".
        accepts: Tells whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]


def shown(value: object) -> str:
    """Write a value as on the command line, in one line that is not too long."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, Mapping):
        line = "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        line = "[" + ", ".join(map(shown, value)) + "]"
    elif isinstance(value, str) and not value.strip():
        line = repr(value)
    else:
        line = " ".join(str(value).split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """Accept integers from `low` to `high`, both included."""
    words = {(True, True): "", (False, True): f" from {low} on"}
    return Rule(
        "a whole number" + words.get((low is None, high is None), f" from {low} to {high}"),
        lambda value: (
            is_whole(value) and (low is None or value >= low) and (high is None or value <= high)
        ),
    )


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Rule:
    """Accept finite numbers: `low` and `high` are included, `above` and `below` are not."""
    bounds = [
        words.format(bound)
        for words, bound in (
            ("from {:g}", low),
            ("above {:g}", above),
            ("to {:g}", high),
            ("below {:g}", below),
        )
        if math.isfinite(bound)
    ]
    words = " and ".join(bounds).replace(" and to", " to")
    words += " on" if bounds == [f"from {low:g}"] else ""
    return Rule(
        f"a number {words}" if words else "a number",
        lambda value: is_number(value) and low <= value <= high and above < value < below,
    )


def one_of(*known: object) -> Rule:
    """Accept the values of a list, of the same type."""
    return Rule(
        " or ".join(", ".join(map(shown, known)).rsplit(", ", 1)),
        lambda value: any(type(value) is type(item) and value == item for item in known),
    )


def either(*rules: Rule) -> Rule:
    """Accept what one of several rules accepts."""
    return Rule(
        " or ".join(rule.expected for rule in rules),
        lambda value: any(rule.accepts(value) for rule in rules),
    )


def several(rule: Rule, count: int) -> Rule:
    """Accept a list of so many values that a rule accepts."""
    return Rule(
        f"[{count} values, each {rule.expected}]",
        lambda value: (
            isinstance(value, list) and len(value) == count and all(map(rule.accepts, value))
        ),
    )


def each(rule: Rule) -> Rule:
    """Accept a list, of any length, of values that a rule accepts."""
    return Rule(
        f"a list of values, each {rule.expected}",
        lambda value: isinstance(value, list) and all(map(rule.accepts, value)),
    )


def choice(*known: object, least: int = 1) -> Rule:
    """Accept a list of the known values, at least so many of them, each at most once."""
    return Rule(
        f"a list of {'one' if least else 'none'} or more of {', '.join(map(shown, known))}, each "
        "at most once",
        lambda value: (
            isinstance(value, list)
            and len(value) >= least
            and all(any(item == other for other in known) for item in value)
            and len({repr(item) for item in value}) == len(value)
        ),
    )


def rising(rule: Rule) -> Rule:
    """Accept a list of two numbers, the lower one first."""
    pair = several(rule, 2)
    return Rule(
        f"[low, high], each {rule.expected}",
        lambda value: pair.accepts(value) and value[0] <= value[1],
    )


flag = Rule("true or false", lambda value: str(value).lower() in FLAGS)
text = Rule("a text", lambda value: isinstance(value, str) and bool(value.strip()))


def refuse(key: str, expected: str, found: Any) -> NoReturn:  # noqa: ANN401  (whatever YAML holds)
    """Raise the error for a value that cannot be used.

    Args:
        key: Key of the value, as on the command line.
        expected: What it may be, in words.
        found: The value, or what is wrong with it in words.
    """
    raise InputError(f"{key}: expected {expected}, found {shown(found)}")
