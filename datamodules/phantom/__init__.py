"""Phantoms: synthetic examinations of brain tumours, written as ordinary data sets.

A phantom is anatomy (nilearn's MNI152 tissue maps, for each case deformed by a diffeomorphism, aged
and refolded), pathology (a glioma with core, enhancing rim, oedema that creeps along white matter,
and mass effect; or metastases, many and mostly small, between grey and white matter) and image
formation (contrast, texture, bias field, thick slices, misregistration, noise, skull stripping).
Each is drawn from ranges wide enough to contain real scans. Everything random except the noise of
the voxels is drawn in millimetres, independently of the voxel size: a case is the same patient at
1 mm and at 2 mm.

Inside the package, volumes are (X, Y, Z) in RAS order and positions are mm from the lower corner of
the field of view. Only `patient` knows how a file is oriented.
"""

from datamodules.phantom.data_sets import MetastasisPhantoms, Phantoms, write_phantoms
from datamodules.phantom.families import FAMILIES
from datamodules.phantom.patient import Phantom, make_phantom
from datamodules.phantom.ranges import LARGEST_METASTASIS_MM, MODALITIES, MOST_METASTASES

__all__ = [
    "FAMILIES",
    "LARGEST_METASTASIS_MM",
    "MODALITIES",
    "MOST_METASTASES",
    "MetastasisPhantoms",
    "Phantom",
    "Phantoms",
    "make_phantom",
    "write_phantoms",
]
