"""How a command of this repository ends when its user has to change something: in one line."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from errors import InputError

USER_ERRORS = (InputError, FloatingPointError, HydraException, OmegaConfBaseException)
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: the traceback instead of a line


@contextmanager
def command() -> Iterator[None]:
    """Around all of a command: what is wrong with its overrides ends it in one line."""
    wants_traceback = FULL_ERROR in os.environ
    os.environ[FULL_ERROR] = "1"  # else Hydra prints several lines of its own, and advice
    try:
        yield
    except USER_ERRORS as error:
        if wants_traceback:
            raise
        logging.basicConfig(format="%(message)s")  # without effect once Hydra has set up logging
        end(error)
    finally:
        if not wants_traceback:
            del os.environ[FULL_ERROR]


@contextmanager
def job() -> Iterator[None]:
    """Around a job of Hydra's: an error that the user can mend ends a single run in one line.

    In a sweep, Hydra writes the traceback into the log of the job, goes on with the other jobs and
    raises the error again at the end.
    """
    try:
        yield
    except USER_ERRORS as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        end(error)


def end(error: Exception) -> None:
    logging.error(one_line(error))
    raise SystemExit(1) from None


def one_line(error: Exception) -> str:
    """The message of an error that the user can mend.

    Raises:
        InstantiationException: A constructor failed with anything but a ValueError, which is a
            fault of this program and needs its traceback.
    """
    text = " ".join(str(error).split())
    if isinstance(error, InstantiationException):
        if not isinstance(error.__cause__, ValueError):
            raise error
        return str(error.__cause__)
    if group := re.match(r"Could not override '(.+?)'\. No match in the defaults list", text):
        return (
            f"{group[1]}: not a group of this model, so it would change nothing; its file in "
            "conf/model lists the groups that it has"
        )
    text = text.removeprefix("InputError raised while resolving interpolation: ")
    return text.partition(" Config search path:")[0].partition(" full_key:")[0]
