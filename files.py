"""Files and folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file or a folder under a hidden name, and rename it when all of it is written.

    Nobody ever sees half of it: not another process, and not the next one after this was killed.
    The hidden name lies in the same folder, because a rename is only atomic within a file system,
    and ends like the final one, because libraries choose a format by a file's ending. What an
    exception leaves behind is removed. A folder takes the place of one that is there.

    Yields:
        The hidden path, which the block makes: a file, or a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    _remove(partial)  # of a process with the same number that was killed
    try:
        yield partial
        if partial.is_dir():
            _remove(path)
        partial.replace(path)
    finally:
        _remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as partial:
        partial.write_text(text)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401  (whatever JSON can hold)
    """Write a JSON file whole, for people to read too."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
