"""Examine all cases of a data set before days of training are spent on them."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np

import grids
from datamodules.cache import available_cores, one_itk_thread
from datamodules.cases import Case, DataSet
from datamodules.checks import CHECKS, Finding
from datamodules.preprocessing import read_scan
from errors import InputError

NOT_CHECKED = (
    "Left and right look alike: whether a scan is mirrored cannot be told from it. T1ce is told "
    "from T1 only where enhancing tumour is labelled, FLAIR from T1 only where oedema is."
)


class Examination(NamedTuple):
    """What was found in the files of one case.

    Attributes:
        case: The case.
        findings: What is wrong with it by itself.
        hashes: Modality -> hash of its voxels, to find the same scan elsewhere.
        spacing_mm: Edges of a voxel (3,), rounded; empty if no file can be used.
    """

    case: Case
    findings: list[Finding]
    hashes: dict[str, str]
    spacing_mm: tuple[float, ...]


def examine(case: Case, data_set: DataSet) -> Examination:
    """Read one case and run all checks on it."""
    errors: list[InputError] = []
    scan = read_scan(case, data_set, errors)
    findings = [Finding("error", case.name, str(error)) for error in errors]
    if not scan.images:
        return Examination(case, findings, {}, ())
    coarse = scan.coarse(case)
    findings += [finding for check in CHECKS for finding in check(coarse)]
    if scan.labels is not None and not scan.labels.any():
        findings.append(Finding("note", case.name, f"{case.mask}: no voxel has a label"))
    hashes = {
        modality: hashlib.sha256(voxels.tobytes()).hexdigest()
        for modality, voxels in coarse.images.items()
    }
    spacing_mm = tuple(np.round(grids.spacing_mm(scan.affine), 3).tolist())
    return Examination(case, findings, hashes, spacing_mm)


def diagnose(data_set: DataSet, workers: int | None = None) -> tuple[int, list[Finding]]:
    """Examine all cases of a data set in parallel, then compare them.

    Args:
        data_set: Its files are only read.
        workers: Cases to examine at a time; by default one per core, at most 8.

    Returns:
        Number of cases; findings, errors first, then by case.

    Raises:
        InputError: The folder is missing or has no case.
    """
    from rich.progress import Progress

    cases, errors = data_set.survey()
    findings = [Finding("error", "", str(error)) for error in errors]
    examined = []
    pool = ThreadPoolExecutor(workers or min(8, available_cores()))
    with one_itk_thread(), pool, Progress() as progress:
        task = progress.add_task("examining", total=len(cases))
        futures = [pool.submit(examine, case, data_set) for case in cases]
        try:
            for future in as_completed(futures):
                examined.append(future.result())
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    examined.sort(key=lambda examination: examination.case.name)
    findings += [finding for examination in examined for finding in examination.findings]
    findings += [*_twins(examined), *_without_mask(examined), *_other_spacing(examined)]
    severities = ("error", "warning", "note")
    findings.sort(key=lambda finding: (severities.index(finding.severity), finding.case))
    return len(cases) + len(errors), findings


def _twins(examined: Sequence[Examination]) -> list[Finding]:
    """Find scans that are there under the names of two cases, which a split may tear apart."""
    first: dict[str, Case] = {}
    twins: dict[tuple[str, str], list[str]] = defaultdict(list)
    for examination in examined:
        for modality, digest in examination.hashes.items():
            other = first.setdefault(digest, examination.case)
            if other is not examination.case:
                twins[examination.case.name, other.name].append(modality)
    return [
        Finding("error", name, f"expected another scan than case {other}, found the same "
                f"{', '.join(modalities)}")
        for (name, other), modalities in twins.items()
    ]  # fmt: skip


def _without_mask(examined: Sequence[Examination]) -> list[Finding]:
    """Find the cases without a mask in a data set that has masks."""
    lacking = [examination.case for examination in examined if examination.case.mask is None]
    if len(lacking) == len(examined):
        return []
    return [
        Finding("warning", case.name, "expected a mask as the others have, found none")
        for case in lacking
    ]


def _other_spacing(examined: Sequence[Examination]) -> list[Finding]:
    """Find the cases whose voxels have another size than those of most."""
    sizes = Counter(examination.spacing_mm for examination in examined if examination.spacing_mm)
    if len(sizes) < 2:
        return []
    usual, count = sizes.most_common(1)[0]
    return [
        Finding("note", examination.case.name, f"voxels of {_mm(examination.spacing_mm)}, where "
                f"{count} of {len(examined)} cases have {_mm(usual)}")
        for examination in examined
        if examination.spacing_mm and examination.spacing_mm != usual
    ]  # fmt: skip


def _mm(spacing_mm: Sequence[float]) -> str:
    return " x ".join(f"{mm:g}" for mm in spacing_mm) + " mm"
