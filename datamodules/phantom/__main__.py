"""Command line: `python -m datamodules.phantom --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.phantom.data_sets import write_phantoms
from datamodules.phantom.families import FAMILIES, KINDS
from datamodules.phantom.ranges import MODALITIES
from errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write phantoms as the arguments say; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.phantom",
        description="Write synthetic tumours: gliomas as a BraTS data set, or metastases.",
    )
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--cases", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--spacing-mm", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--kind", choices=KINDS, default="glioma", help="default: %(default)s")
    parser.add_argument(
        "--modalities", nargs="+", default=MODALITIES, choices=MODALITIES, help="default: all"
    )
    parser.add_argument(
        "--families", nargs="+", default=["classic"], choices=FAMILIES, help="default: classic"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    options = parser.parse_args(arguments)
    try:
        write_phantoms(
            options.root,
            options.cases,
            spacing_mm=options.spacing_mm,
            seed=options.seed,
            kind=options.kind,
            modalities=options.modalities,
            families=options.families,
            workers=options.workers,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
