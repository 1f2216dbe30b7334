"""Which constructors a configuration may name: those that the files of conf/ name, and no others.

What a checkpoint describes is rebuilt from the configuration in it, and a checkpoint may come from
anyone. Hydra would call whatever `_target_` names, even a function that unpickles a file by its
address and so runs any code. Names are therefore compared with those in conf/ before anything is
built.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from errors import InputError

CONF = Path(__file__).parents[1] / "conf"
REBUILT = ("module", "data")  # the parts of a configuration that are built from a checkpoint
NOT_REBUILT = ("callbacks", "experiment", "hydra", "logger", "trainer")  # folders for other parts
TARGET = re.compile(r"""_target_['"]?\s*:\s*['"]?([\w.]+)""")
PLAIN = (dict, list, str, int, float, bool, type(None))


@cache
def allowed() -> frozenset[str]:
    """Collect the constructors that conf/ names for modules and data."""
    return frozenset(
        name
        for file in CONF.rglob("*.yaml")
        if file.relative_to(CONF).parts[0] not in NOT_REBUILT
        for name in TARGET.findall(file.read_text())
        if not name.startswith("hydra.")  # config.yaml sets up Hydra, too
    )


def check_constructors(config: Any, source: str | Path) -> None:  # noqa: ANN401  (read from a file)
    """Refuse a configuration that would call anything but the constructors of conf/.

    Args:
        config: A whole configuration, resolved, as plain dictionaries, lists and values.
        source: What the configuration is of, for messages.

    Raises:
        InputError: A part is missing; a constructor that conf/ does not name; an interpolation,
            which would be resolved with what this process knows; or an object of another type.
    """
    if type(config) is not dict or any(type(config.get(part)) is not dict for part in REBUILT):
        raise InputError(f"{source}: expected a configuration with {' and '.join(REBUILT)}")
    waiting: list[tuple[str, Any]] = [(part, config[part]) for part in REBUILT]
    while waiting:  # no recursion: nobody limits how deep a file is nested
        key, node = waiting.pop()
        if type(node) not in PLAIN:
            raise InputError(f"{source}: {key}: expected a plain value, found {type(node)}")
        if type(node) is str and "${" in node:
            raise InputError(f"{source}: {key}: expected a resolved value, found {node[:80]!r}")
        if isinstance(node, Mapping):
            for name in node:
                if type(name) is not str:
                    raise InputError(f"{source}: {key}: expected names as keys, found {name!r}")
            target = node.get("_target_")
            if "_target_" in node and (type(target) is not str or target not in allowed()):
                raise InputError(
                    f"{source}: {key}._target_: expected a constructor that a file of conf/ names, "
                    f"found {str(target)[:80]!r}"
                )
            waiting += [(f"{key}.{name}", child) for name, child in node.items()]
        elif isinstance(node, list):
            waiting += [(f"{key}[{place}]", child) for place, child in enumerate(node)]
