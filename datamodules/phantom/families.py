"""Families of phantoms: each has laws of its own for contrast, anatomy, pathology and drawing.

A network that has learnt one family by heart fails on another, as it would on real scans. So what
helps to carry over is chosen by training on some families and testing on others. What the laws owe
to looks at a real scan is in weights/README.md.
"""

from typing import NamedTuple

from datamodules.phantom.brain_metastases import BrainMetastases, UnevenMetastases
from datamodules.phantom.gliomas import DrawnGlioma, Glioma, InfiltratingGlioma, SwellingGlioma
from datamodules.phantom.pathology import Pathology
from datamodules.phantom.ranges import CLASSIC, Laws


class Family(NamedTuple):
    """How the phantoms of a family are made.

    Attributes:
        laws: What they are drawn from.
        kinds: What they suffer from, by name.
    """

    laws: Laws
    kinds: dict[str, type[Pathology]]


def _family(
    laws: Laws, glioma: type[Pathology], metastases: type[Pathology] = UnevenMetastases
) -> Family:
    return Family(laws, {"glioma": glioma, "metastases": metastases})


BORDERS = CLASSIC.but(
    ranges={
        "oedema_edge": (0.15, 0.8),
        "core_edge_mm": (0.4, 1.5),
        "rater_smoothing_mm": (0.3, 1.5),
        "rater_from": (0.2, 0.5),  # of the intensity between healthy tissue and oedema
        "fluid_from": (0.2, 1.2),  # standard deviations of a random field
        "blood_from": (0.6, 1.6),
        "nodules": (-0.6, 1.0),
        "metastasis_elongation": (0.7, 1.4),
        "metastasis_rugged": (0.0, 0.3),  # of its radius
    },
    chances={"fluid": 0.0, "blood": 0.0, "nodular": 0.0},
)
CORES = BORDERS.but(
    chances={"fluid": 0.35, "blood": 0.15, "nodular": 0.3, "isointense_core": 0.15},
)
CREEPING = CORES.but(
    contrast={"vessel": ((0.45, 1.10), (1.30, 3.0), (0.40, 1.10), (0.40, 1.00))},
    ranges={
        "radius_mm": (7.0, 27.0),
        "grey_through": (0.05, 0.6),
        "grey_ease": (0.05, 0.6),
        "lobes_mm": (0.5, 4.0),
        "oedema_ratio_hgg": (0.5, 4.0),
        "regional": (0.0, 0.12),
        "blur_mm": (0.0, 1.6),
    },
    chances={"cortical": 0.4, "hyperintensities": 0.6, "glow": 0.6, "flow": 0.5},
)
LOPSIDED = CREEPING.but(
    ranges={"lopsided": (0.0, 1.6), "core_edge_mm": (0.2, 1.2)},
    chances={"cortical": 0.6},
)
# Half of these tumours do not enhance, as one in twelve does elsewhere: their cores are the hardest
# to find, and a network that sees few of them leaves them out.
LOW_GRADE = LOPSIDED.but(chances={"hgg": 0.15, "enhancing_lgg": 0.4})
# A core is bright on T2 and less bright on FLAIR than the oedema around it for the same reason, its
# water, and so dark on T1: where contrasts are drawn one by one, a network cannot learn that. On T2
# oedema may be as bright as any core, and the wettest cores are darker on FLAIR than white matter.
WATERY = LOW_GRADE.but(
    contrast={
        "oedema": ((0.61, 0.96), (0.58, 1.00), (1.30, 2.20), (1.30, 1.90)),
        "core": ((0.36, 0.98), (0.36, 1.10), (1.38, 2.29), (0.80, 1.60)),
    },
    ranges={"by_water": (0.4, 1.0)},
)
SWELLING = CREEPING.but(
    ranges={
        "rugged_mm": (1.0, 5.0),
        "reach_mm": (2.0, 14.0),
        "uneven": (0.2, 0.8),
        "spared_grey_mm": (0.0, 6.0),
        "whole_edge_mm": (0.4, 2.5),
        "cortex_mm": (1.5, 3.5),
        "sulcus_mm": (0.6, 2.2),
        "gyrus_mm": (3.2, 6.5),
    },
    chances={"isointense_core": 0.3},
    folding=0.5,
).widened(0.1)
INFILTRATING = CREEPING.but(
    ranges={
        "rugged_mm": (1.5, 6.0),
        "infiltrated_mm": (1.0, 10.0),
        "along_white_mm": (0.0, 8.0),
        "patches_mm": (2.0, 8.0),
        "whole_edge_mm": (0.4, 2.5),
    },
    chances={"nodular": 0.7, "isointense_core": 0.5},
).widened(0.2)

FAMILIES = {
    "classic": _family(CLASSIC, Glioma, BrainMetastases),
    "borders": _family(BORDERS, DrawnGlioma),
    "cores": _family(CORES, DrawnGlioma),
    "creeping": _family(CREEPING, DrawnGlioma),
    "lopsided": _family(LOPSIDED, DrawnGlioma),
    "low_grade": _family(LOW_GRADE, DrawnGlioma),
    "watery": _family(WATERY, DrawnGlioma),
    "swelling": _family(SWELLING, SwellingGlioma),
    "infiltrating": _family(INFILTRATING, InfiltratingGlioma),
}
KINDS = tuple(FAMILIES["classic"].kinds)
