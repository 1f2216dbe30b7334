"""What a scan shows, against what its file names, its labels and its header say that it shows.

Every check is a function that takes a coarse copy of a case and yields its findings. They are
heuristics, measured on brains with gliomas: none refuses a case. What cannot be used at all is an
`InputError` of `preprocessing.read_scan`. Left and right look alike, so that no check tells them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

import grids
from datamodules.cases import Case
from datamodules.foreground import IN_PLANE, check_bone, filled
from datamodules.nifti import has_orientation
from datamodules.template import template
from errors import InputError

COARSE_MM = 4  # between the voxels that are looked at
LEAST_VOXELS = 1000  # of a brain, 0.06 litres; with fewer, correlations say nothing
LEAST_LABELLED = 5  # voxels of a label whose mean intensity is compared

# Each bound lies between what 90 phantoms and a real case have and what planted faults make of it.
SAME_BRAIN = 0.92  # Dice of the brains of two modalities; 0.90 at most if one lies the wrong way
T2_MARGIN = 0.1  # of the mean correlation with the others; 0.4 and more, if T2 is T2
FIT_MARGIN = 0.02  # of the correlation with the template; 0.03 and more, if the header is right
BRAIN_LITRES = 0.5  # the smallest; children of a year have 0.8
MAX_OUTSIDE = 0.05  # share of a mask beside the brain
MAX_LESION = 0.5  # share of the brain; no tumour covers more

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4  # canonical labels of `brats.BraTS`


@dataclass(frozen=True)
class Finding:
    """Something about a case that is wrong, suspicious or worth knowing.

    Attributes:
        severity: An error makes the case unusable or scores wrong, a warning asks to look at it.
        case: Name of the case.
        message: One line: the file, what was expected and what was found.
    """

    severity: Literal["error", "warning", "note"]
    case: str
    message: str


class Coarse(NamedTuple):
    """A case at a spacing of about `COARSE_MM`; see `preprocessing.Scan`.

    Attributes:
        case: The case.
        images: Modality -> (X, Y, Z) float32, RAS.
        brains: Modality -> (X, Y, Z) bool.
        labels: Canonical labels (X, Y, Z) uint8; None without a mask.
        affine: (4, 4), voxel to mm, RAS.
    """

    case: Case
    images: Mapping[str, np.ndarray]
    brains: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    affine: np.ndarray

    def finding(
        self, severity: Literal["error", "warning", "note"], file: str | Path | None, message: str
    ) -> Finding:
        """Make a finding about a modality or a file."""
        path = self.case.images[file] if isinstance(file, str) else file
        return Finding(severity, self.case.name, f"{path}: {message}")

    @property
    def brain(self) -> np.ndarray:
        """Voxels (X, Y, Z) that belong to the brain in at least half of the modalities."""
        votes = np.sum(list(self.brains.values()), axis=0)
        return 2 * votes >= len(self.brains)

    @property
    def healthy(self) -> np.ndarray:
        """Voxels (X, Y, Z) of the brain without a label."""
        return self.brain if self.labels is None else self.brain & (self.labels == 0)

    def means(self, modality: str) -> dict[int, float]:
        """Mean z-score of an image in each label with enough voxels, by the unlabelled brain."""
        if self.labels is None or modality not in self.images:
            return {}
        image, healthy = self.images[modality], self.images[modality][self.healthy]
        deviation = float(healthy.std(dtype=np.float64)) if healthy.size >= LEAST_VOXELS else 0
        if not deviation:
            return {}
        inside = {label: image[self.labels == label] for label in (NECROSIS, OEDEMA, ENHANCING)}
        return {
            label: float(voxels.mean(dtype=np.float64) - healthy.mean(dtype=np.float64)) / deviation
            for label, voxels in inside.items()
            if voxels.size >= LEAST_LABELLED
        }


Check = Callable[[Coarse], Iterator[Finding]]


def header_without_axes(scan: Coarse) -> Iterator[Finding]:
    """Files whose header leaves open where left and right are."""
    files = [scan.case.images[modality] for modality in scan.images]
    if scan.case.mask is not None and scan.labels is not None:
        files.append(scan.case.mask)
    without = [path for path in files if not has_orientation(path)]
    if without:
        yield scan.finding(
            "warning",
            without[0],
            f"expected a sform or a qform in the header, found neither in {len(without)} of "
            f"{len(files)} files: left and right are unknown",
        )


def copies_of_a_modality(scan: Coarse) -> Iterator[Finding]:
    """Files that hold one image under the names of two modalities."""
    for one, other in combinations(scan.images, 2):
        if np.array_equal(scan.images[one], scan.images[other]):
            yield scan.finding("error", other, f"expected another image than {one}, found the same")


def brains_apart(scan: Coarse) -> Iterator[Finding]:
    """Modalities whose brain does not lie where that of the others lies."""
    for modality, brain in scan.brains.items():
        dice = 2 * (brain & scan.brain).sum() / max(1, brain.sum() + scan.brain.sum())
        if dice < SAME_BRAIN:
            yield scan.finding(
                "warning",
                modality,
                f"expected the brain where the other modalities show it, found a Dice of {dice:.2f}"
                ": is it turned, or with its skull?",
            )


def swapped_modalities(scan: Coarse) -> Iterator[Finding]:
    """Modalities that have each other's contrast.

    CSF is bright in T2 alone, so that T2 is the least correlated with the others. Oedema is bright
    in FLAIR and dark in T1. Enhancing tumour is brighter in T1ce than in T1; without a label of it
    the two cannot be told apart.
    """
    healthy = scan.healthy
    if {"t2"} < set(scan.images) and len(scan.images) > 2 and healthy.sum() >= LEAST_VOXELS:
        ranks = [image[healthy].argsort().argsort() for image in scan.images.values()]
        alike = dict(zip(scan.images, np.corrcoef(ranks).mean(0).tolist(), strict=True))
        least = min(alike, key=alike.__getitem__)
        if alike[least] < alike["t2"] - T2_MARGIN:
            yield scan.finding(
                "warning", "t2", f"expected bright CSF, found it in {least}: are they swapped?"
            )
            return
    means = {modality: scan.means(modality) for modality in scan.images}
    for modality in ("t1", "t1ce"):
        if means.get("flair", {}).get(OEDEMA, np.inf) < means.get(modality, {}).get(
            OEDEMA, -np.inf
        ):
            yield scan.finding(
                "warning",
                "flair",
                f"expected brighter oedema than in {modality}, found it darker: are they, or the "
                "labels, swapped?",
            )
            return
    gains = _gains(scan)
    strongest = max(gains, key=lambda label: abs(gains[label]), default=0)
    if strongest == ENHANCING and gains[ENHANCING] < 0:
        yield scan.finding(
            "warning",
            "t1ce",
            "expected enhancing tumour to be brighter than in t1, found it darker: are they, or "
            "the labels, swapped?",
        )


def swapped_labels(scan: Coarse) -> Iterator[Finding]:
    """Labels that have each other's place: oedema lies outside, only enhancing tumour enhances."""
    if scan.labels is None or any(swapped_modalities(scan)):
        return
    spacing_mm = grids.spacing_mm(scan.affine)
    depths_mm = np.asarray(ndimage.distance_transform_edt(scan.labels > 0, sampling=spacing_mm))
    core, oedema = np.isin(scan.labels, (NECROSIS, ENHANCING)), scan.labels == OEDEMA
    if min(core.sum(), oedema.sum()) >= LEAST_LABELLED:
        inside_mm, outside_mm = (float(np.mean(depths_mm[part])) for part in (core, oedema))
        if outside_mm > inside_mm:
            yield scan.finding(
                "warning",
                scan.case.mask,
                f"expected oedema around the core, found it {outside_mm - inside_mm:.1f} mm "
                "further inside: are labels swapped?",
            )
            return
    gains = _gains(scan)
    others = {label: gain for label, gain in gains.items() if label != ENHANCING}
    if ENHANCING in gains and others:
        most = max(others, key=others.__getitem__)
        if others[most] > gains[ENHANCING] + 0.5:
            yield scan.finding(
                "warning",
                scan.case.mask,
                f"expected label 4 to enhance most, found label {most} to: are they swapped?",
            )


def _gains(scan: Coarse) -> dict[int, float]:
    """How much brighter each label is in T1ce than in T1, in z-scores."""
    before, after = scan.means("t1"), scan.means("t1ce")
    return {label: after[label] - before[label] for label in before if label in after}


def mask_beside_the_brain(scan: Coarse) -> Iterator[Finding]:
    """Masks that are empty, too large, or reach into the air."""
    if scan.labels is None or not scan.brains:
        return
    lesion = scan.labels > 0
    voxels, outside = int(lesion.sum()), int((lesion & ~scan.brain).sum())
    if outside > MAX_OUTSIDE * voxels:
        share = outside / voxels
        yield scan.finding(
            "warning", scan.case.mask, f"expected labels in the brain, found {share:.0%} beside it"
        )
    if voxels > MAX_LESION * scan.brain.sum():
        share = voxels / scan.brain.sum()
        yield scan.finding(
            "warning",
            scan.case.mask,
            f"expected a lesion, found labels in {share:.0%} of the brain",
        )


def skull(scan: Coarse) -> Iterator[Finding]:
    """Scans with bone around the brain, although the air around it is constant."""
    for modality, image in scan.images.items():
        brain, air = scan.brains[modality], image[~scan.brains[modality]]
        if brain.sum() < LEAST_VOXELS or not air.size:
            continue
        background = float(np.median(air))
        relative = (image - background) / (float(np.median(image[brain])) - background or 1)
        path = scan.case.images[modality]
        try:
            check_bone(filled(brain, IN_PLANE), relative, grids.spacing_mm(scan.affine), path)
        except InputError as error:
            yield Finding("warning", scan.case.name, str(error))
            return  # the others show the same head


def small_brain(scan: Coarse) -> Iterator[Finding]:
    """Brains that are too small for the spacing in the header."""
    litres = float(scan.brain.sum() * grids.spacing_mm(scan.affine).prod() / 1e6)
    if scan.images and litres < BRAIN_LITRES:
        yield scan.finding(
            "warning",
            next(iter(scan.images)),
            f"expected a brain of {BRAIN_LITRES} litres at least, found {litres:.2g}: is the "
            "spacing in the header right, or the scan cut off?",
        )


def wrong_way_up(scan: Coarse) -> Iterator[Finding]:
    """Heads that fit the template better if their axes are exchanged or reversed.

    The brain is brought to the place and the volume of the template's, and compared with it in all
    orientations. Right and left are the same.
    """
    brain = scan.brain
    if brain.sum() < LEAST_VOXELS:
        return
    reference = template(COARSE_MM)
    points = np.stack(np.meshgrid(*[np.linspace(-0.85, 0.85, 12)] * 3, indexing="ij"), -1)
    points = points.reshape(-1, 3)
    expected = _sampled(reference.voxels > 0, reference.affine, points)
    fits: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for axes in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            turned = np.empty_like(points)
            turned[:, axes] = points * signs
            found = _sampled(brain, scan.affine, turned)
            fits[axes, signs] = float(np.corrcoef(found, expected)[0, 1])
    upright = max(fits[(0, 1, 2), (sign, 1, 1)] for sign in (1, -1))
    axes, signs = max(fits, key=fits.__getitem__)
    if fits[axes, signs] > upright + FIT_MARGIN:
        ends = (("right", "left"), ("anterior", "posterior"), ("superior", "inferior"))
        front, top = (ends[axes[axis]][signs[axis] < 0] for axis in (1, 2))
        yield scan.finding(
            "warning",
            next(iter(scan.images)),
            "expected a head that lies as the header says, found one that fits the template better "
            f"({fits[axes, signs]:.2f} against {upright:.2f}) with its front at what the header "
            f"calls {front} and its top at {top}",
        )


def _sampled(brain: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Sample a brain (X, Y, Z) at points (N, 3) around its centre, in units of its size."""
    centre = np.array(ndimage.center_of_mass(brain))
    size_mm = (brain.sum() * abs(np.linalg.det(affine[:3, :3]))) ** (1 / 3)
    voxels = centre[:, None] + np.linalg.inv(affine[:3, :3]) @ (size_mm * points.T)
    return ndimage.map_coordinates(brain.astype(np.float32), voxels, order=1)


# Milliseconds each: run on every case that is preprocessed.
QUICK: tuple[Check, ...] = (
    header_without_axes,
    copies_of_a_modality,
    brains_apart,
    swapped_modalities,
    swapped_labels,
    mask_beside_the_brain,
    skull,
)
CHECKS: tuple[Check, ...] = (*QUICK, small_brain, wrong_way_up)


def quick_findings(scan: Coarse) -> list[Finding]:
    """Run the checks that cost little on a case."""
    return [finding for check in QUICK for finding in check(scan)]
