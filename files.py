"""Files and folders that are there whole or not at all."""

import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEAST_FREE = 2**16  # bytes; with less, an error of a library means that the disk is full
PREFIX = f".partial-{platform.node()}-"  # then the number of the process and the final name


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file or a folder under a hidden name, and rename it when all of it is written.

    Nobody ever sees half of it: not another process, and not the next one after this was killed.
    The hidden name lies in the same folder, because a rename is only atomic within a file system,
    and ends like the final one, because libraries choose a format by a file's ending. What an
    exception leaves behind is removed at once, and what a killed process of this machine has left
    when the same file is written again. A folder takes the place of one that is there.

    Yields:
        The hidden path, which the block makes: a file, or a folder.

    Raises:
        InputError: The disk is full.
    """
    partial = path.with_name(f"{PREFIX}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield partial
        if partial.is_dir():
            _remove(path)
        partial.replace(path)
    except (OSError, RuntimeError, ValueError) as error:
        if _is_full(error, path.parent):
            raise InputError(
                f"{path}: no room on the disk to write it; make some, and run the same again"
            ) from error
        raise
    finally:
        _remove(partial)


def _is_full(error: Exception, folder: Path) -> bool:
    """Say whether an error in writing means that there is no room, which libraries word freely."""
    if isinstance(error, OSError):
        return error.errno in FULL or "requested and" in str(
            error
        )  # NumPy: "8 requested and 2 written"
    return folder.is_dir() and shutil.disk_usage(folder).free < LEAST_FREE


def _remove_leftovers(path: Path) -> None:
    """Remove what this process, or one of this machine that has ended, has left of a file."""
    for left in path.parent.glob(f"{escape(PREFIX)}*-{escape(path.name)}"):
        number = left.name.removeprefix(PREFIX).removesuffix(f"-{path.name}")
        if number.isdigit() and (int(number) == os.getpid() or not _runs(int(number))):
            _remove(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as partial:
        partial.write_text(text)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (whatever JSON can hold)
    """Write a JSON file whole, for people to read too."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object that an earlier command has left.

    Args:
        path: The file.
        advice: What to do if it cannot be used.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no text
        raise InputError(f"{path}: expected JSON, found none ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {str(content)[:40]!r}; {advice}")
    return content


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
