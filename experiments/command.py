"""How a command of this repository ends when its user has to change something: in one line."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callbacks import LogJobReturnCallback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from errors import InputError

USER_ERRORS = (InputError, FloatingPointError, HydraException, OmegaConfBaseException)
# Lightning's error for a device that is not there, or a score that no validation has logged. Its
# name is compared, because importing it takes seconds.
LIGHTNING_ERROR = "MisconfigurationException"
# A folder that cannot be made or written to.
FOLDER_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EEXIST),
)
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch: the traceback instead of a line

# Exit codes, beside 0 and those of Python and of signals.
TO_CHANGE = 1  # a value, a file or a folder has to be changed
BUSY = 75  # another process is training the same run (EX_TEMPFAIL of sysexits.h)


# What a command does last, however it ends. Hydra turns an error of its callbacks into a warning,
# and when Python exits it is too late for new processes and for an exit code.
AT_END: list[Callable[[], None]] = []


class BusyError(Exception):
    """Another process is training the same run."""


@contextmanager
def command() -> Iterator[None]:
    """Wrap all of a command, so that what is wrong with its overrides ends it in one line."""
    wants_traceback = FULL_ERROR in os.environ
    os.environ[FULL_ERROR] = "1"  # else Hydra prints several lines of its own, and advice
    sys.argv[1:] = sweep_flag_first(sys.argv[1:])
    try:
        try:
            yield
        finally:
            while AT_END:
                AT_END.pop()()
    except Exception as error:
        if wants_traceback or not is_users(error):
            raise
        logging.basicConfig(format="%(message)s")  # without effect once Hydra has set up logging
        end(one_line(error), TO_CHANGE)
    finally:
        if not wants_traceback:
            del os.environ[FULL_ERROR]


@contextmanager
def job() -> Iterator[None]:
    """Wrap a job of Hydra, so that an error that the user can mend ends a single run in one line.

    In a sweep, `LogJobReturn` writes the line into the log of the job, Hydra goes on with the other
    jobs and raises the first error again at the end. There, a run that another process is training
    is left to it; a single one ends with the exit code `BUSY`.
    """
    try:
        yield
    except Exception as error:
        sweeps = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
        if isinstance(error, BusyError):
            if not sweeps:
                end(str(error), BUSY)
            logging.warning("%s; skipped", error)
        elif sweeps or not is_users(error):
            raise
        else:
            end(one_line(error), TO_CHANGE)


class LogJobReturn(LogJobReturnCallback):
    """Writes into the log of a job how it ended, with a traceback if the user cannot mend it."""

    def on_job_end(
        self,
        config: DictConfig,
        job_return: JobReturn,
        **kwargs: Any,  # noqa: ANN401  (Hydra's)
    ) -> None:
        """Log a result or an error; Hydra calls this."""
        error = job_return._return_value  # the property raises it
        if (
            job_return.status == JobStatus.FAILED
            and isinstance(error, Exception)
            and is_users(error)
        ):
            self.log.error(one_line(error))
        else:
            super().on_job_end(config, job_return, **kwargs)


def is_users(error: BaseException) -> bool:
    """Tell whether the user can mend what an error says."""
    if isinstance(error, InstantiationException):  # a constructor failed
        cause = error.__cause__
        return isinstance(cause, ValueError) or type(cause).__name__ == LIGHTNING_ERROR
    if isinstance(error, USER_ERRORS) or type(error).__name__ == LIGHTNING_ERROR:
        return True
    return isinstance(error, OSError) and error.errno in FOLDER_ERRORS and bool(error.filename)


def end(line: str, code: int) -> None:
    """Say why the command ends, and end it."""
    logging.error(line)
    raise SystemExit(code) from None


def one_line(error: Exception) -> str:
    """Return the message of an error that the user can mend.

    Raises:
        InstantiationException: A constructor failed, and the user cannot mend it: the fault is one
            of this program and needs its traceback.
    """
    if isinstance(error, InstantiationException):
        if not is_users(error):
            raise error
        return " ".join(str(error.__cause__).split())
    if isinstance(error, OSError) and not isinstance(error, USER_ERRORS):
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if group := re.match(r"Could not override '(.+?)'\. No match in the defaults list", text):
        return (
            f"{group[1]}: not a group of this model, so it would change nothing; its file in "
            "conf/model lists the groups that it has"
        )
    text = text.removeprefix("InputError raised while resolving interpolation: ")
    text = text.partition(" Config search path:")[0].partition(" full_key:")[0]
    if re.match(r"In 'model/\w+': Could not find 'patches/", text):
        text += "; an experiment takes the patches of its own model and data"
    return text


def sweep_flag_first(arguments: Sequence[str]) -> list[str]:
    """Put `-m` before the overrides: after them, Python's argparse takes no more overrides."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*flags[:1], *(argument for argument in arguments if argument not in flags)]
