"""The numbers that phantoms are drawn from: contrasts, textures, sizes and probabilities.

Ranges are (lowest, highest). They are wide enough to contain real scans. The constants are the laws
of the family `classic`; the laws of the others (`families`) say what differs from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

Range = tuple[float, float]

FIELD_OF_VIEW_MM = (240.0, 240.0, 155.0)
MODALITIES = ("t1", "t1ce", "t2", "flair")

# Intensity of each class relative to white matter, one range per modality in the order of
# MODALITIES. Measured on real cases; the medians of the classes in a phantom come out a little
# nearer to 1, because of partial volume.
CONTRAST = {
    "gm": ((0.63, 0.86), (0.64, 0.92), (1.05, 1.42), (0.96, 1.15)),
    "csf": ((0.28, 0.60), (0.22, 0.70), (1.90, 2.90), (0.20, 0.62)),
    "oedema": ((0.61, 0.96), (0.58, 1.00), (1.30, 1.80), (1.30, 1.70)),
    "core": ((0.36, 0.98), (0.36, 1.10), (1.38, 2.29), (1.25, 1.60)),
    "cyst": ((0.32, 0.50), (0.30, 0.55), (2.30, 3.90), (0.60, 1.15)),
    "enhancing": ((0.65, 1.00), (1.15, 2.10), (1.40, 1.70), (1.25, 1.55)),
    "vessel": ((0.45, 1.10), (1.30, 2.30), (0.40, 1.10), (0.40, 1.00)),
    "bright": ((-0.15, 0.0), (-0.15, 0.0), (0.0, 0.35), (0.0, 0.45)),  # added to white matter
    "plexus": ((0.60, 0.90), (1.10, 1.70), (1.50, 2.20), (0.70, 1.20)),
}

# What more water does to a tissue in each of MODALITIES. Free water is dark on T1 and bright on T2,
# and FLAIR leaves out what has the long T1 of fluid: the wettest cores are less bright than oedema
# there, the "T2-FLAIR mismatch" of low grades (Patel et al. 2017).
MORE_WATER = {"oedema": (-1, -1, 1, 1), "core": (-1, -1, 1, -1)}

# Standard deviation of each class's texture relative to the intensity of white matter.
TEXTURE = {
    "healthy, coarse": (0.01, 0.05),
    "healthy, fine": (0.005, 0.03),
    "oedema, coarse": (0.02, 0.10),
    "oedema, fine": (0.01, 0.06),
    "core, coarse": (0.03, 0.15),
    "core, fine": (0.01, 0.08),
}

# What every case draws one value or more from.
RANGES = {
    # anatomy; changes of a size and distances are those of tissue from the atlas to the case
    "age_years": (20.0, 85.0),  # most gliomas are found between 35 and 70
    # With `axis_scale` and the deformation, this gives brains of 1.4 l with a standard deviation of
    # 10 %, as in adults. It is relative to the MNI152 brain, which is larger than most.
    "brain_scale": (0.86, 0.98),
    "axis_scale": (0.95, 1.05),
    "rotation_deg": (-7.0, 7.0),
    "shift_mm": (-4.0, 4.0),
    "asymmetry": (0.15, 0.45),  # amplitude of the part of the deformation that is not symmetric
    "lobe_growth": (-0.15, 0.15),  # logarithm of the length at the centre of a lobe
    "lobe_asymmetry": (-0.06, 0.06),  # right minus left
    # How much further forward the right hemisphere lies. The right frontal and the left occipital
    # lobe usually protrude, by a few mm (Toga & Thompson 2003, "Mapping brain asymmetry").
    "petalia_mm": (-2.0, 4.0),
    "cerebellum_growth": (-0.12, 0.12),  # logarithm of the length, brainstem included
    "cerebellum_mm": (-3.0, 3.0),  # per axis, relative to the cerebrum
    "ventricle_asymmetry_mm": (-0.8, 0.8),  # movement of the border, more on the right
    "ventricle_horns_mm": (-1.0, 1.0),  # movement of the border, more in front
    "brainstem_end_mm": (-74.0, -58.0),  # MNI height at which skull stripping cuts the brainstem
    "cortex_mm": (1.8, 3.0),
    "sulcus_mm": (0.8, 1.8),  # half width in middle age
    "sulcus_depth_mm": (11.0, 19.0),
    "gyrus_mm": (3.9, 5.6),  # spacing of the control values; sulci are about 2.5 times that apart
    "atrophy": (-0.17, 0.12),  # added to the probability of CSF in middle age
    # pathology
    "radius_mm": (12.0, 27.0),  # of a glioma's core: 7 to 80 ml, as in BraTS
    "elongation": (0.75, 1.3),
    "lobes_mm": (0.5, 3.0),
    "rim_mm": (1.5, 8.0),
    "oedema_ratio_hgg": (1.0, 3.5),  # volume relative to that of the core
    "oedema_ratio_lgg": (0.3, 2.2),
    "push_mm": (0.0, 7.0),  # mass effect at the border of the core
    "push_reach_mm": (15.0, 35.0),
    "grey_through": (0.12, 0.12),  # share of white matter's oedema that gets into grey matter
    "grey_ease": (0.15, 0.15),  # and how early it does, relative to white matter
    "lopsided": (0.0, 0.0),  # how much further oedema reaches on one side: score a radius
    "oedema_edge": (0.25, 0.25),  # softness of its border, in units of its score
    "water": (0.0, 1.0),  # of a tissue: its place in the ranges of all modalities, see MORE_WATER
    "by_water": (0.0, 0.0),  # how far that place is the same in all modalities; 0: each has its own
    "core_over_oedema": (0.92, 1.1),  # intensity of an isointense core, relative to oedema
    "blood": (0.4, 1.6),  # intensity, in each modality its own: it changes with its age
    "metastasis_rim_mm": (1.2, 3.0),
    "metastasis_oedema": (0.5, 2.0),  # how far it reaches beyond the border, in radii
    # image formation
    "noise": (0.007, 0.04),  # relative to white matter
    "bias": (0.01, 0.16),  # standard deviation of the logarithm of the bias field
    "regional": (0.0, 0.0),  # the same, of what differs from region to region, whatever the coil
    "glow": (0.0, 0.3),  # of what glows on FLAIR, in units of white matter
    "flow": (0.0, 1.0),  # of moving fluid on FLAIR, in units of white matter, added to that of CSF
    "misregistration_mm": (0.0, 0.6),  # per axis
    "slice_mm": (3.0, 6.0),
    "blur_mm": (0.0, 0.7),
    "ringing": (0.2, 0.6),
    "white_matter_log10": (2.2, 3.1),  # of the raw intensity
    "brain_margin_mm": (-1.5, 1.5),  # what skull stripping leaves (+) or takes away (-)
}

# The random deformation of a head is a sum of smooth fields. For each distance between control
# values in mm: standard deviation in mm along each axis, at the surface of the brain and inside.
# The surface varies less, because skulls are smooth.
SHAPE_SD_MM = {60.0: (3.5, 5.5), 35.0: (1.2, 3.0), 20.0: (0.4, 1.2)}

# MNI position of the centre of each right lobe, and the standard deviation of its weight.
LOBES_MM = {
    "frontal": (30.0, 38.0, 20.0),
    "parietal": (32.0, -45.0, 45.0),
    "temporal": (48.0, -15.0, -22.0),
    "occipital": (22.0, -80.0, 5.0),
}
LOBE_SIZE_MM = 26.0

# The volume of the lateral and the third ventricles is log-normal and grows about threefold between
# the ages of 20 and 80. Adults have 7 to 60 ml, with a median of about 20. The volumes measured in
# phantoms come out a fifth smaller than drawn, because of partial volume. With the same age, the
# sulci widen.
MIDDLE_AGE_YEARS = 52.5
VENTRICLES_ML, VENTRICLES_LOG_SD, VENTRICLES_LOG_PER_YEAR = 24.0, 0.4, 0.02
LEAST_VENTRICLES_ML, MOST_VENTRICLES_ML = 8.0, 72.0
SULCUS_MM_PER_YEAR, CSF_PER_YEAR = 0.012, 0.003  # of `sulcus_mm` and of `atrophy`

# Share of the cases that have a property. The training cases of BraTS 2019 are 259 HGG and 76 LGG.
# One in twelve has no enhancing tumour, and nearly all of these are LGG.
CHANCES = {
    "hgg": 259 / 335,
    "enhancing_lgg": 0.65,
    "enhancing_hgg": 0.995,
    "cyst": 0.2,
    "isointense_core": 0.0,  # a core that looks like oedema, but for what enhances
    "cortical": 0.0,  # the tumour starts between grey and white matter, not deep in the white
    "multifocal": 0.2,
    "hyperintensities": 0.3,  # small, in healthy white matter; not labelled
    "glow": 0.0,  # of healthy brainstem, thalamus and limbic cortex on FLAIR; not labelled
    "flow": 0.0,  # fluid that moves is bright on FLAIR, in ventricles and cisterns; not labelled
    "cut_field_of_view": 0.1,
    "ringing": 0.35,  # spline resampling: overshoot, negative voxels
    "tenfold_modality": 0.15,  # one modality has ten times the intensities of the others
    "ras": 0.5,  # orientation of the files; the others are LPS
}

# Share of the cases whose modality is acquired in thick slices.
THICK_SLICES = {"t1": 0.25, "t1ce": 0.15, "t2": 0.45, "flair": 0.45}

# Healthy tissue that is often brighter than the rest on FLAIR (Hirai et al. 2000, "Limbic lobe of
# the human brain: evaluation with turbo FLAIR MR imaging"): MNI position on the right, and extent
# along each axis, in mm. `GLOW` is its brightness in a modality, relative to that on FLAIR.
GLOWING_MM = (
    ((0.0, -28.0, -25.0), (11.0, 11.0, 18.0)),  # brainstem
    ((12.0, -18.0, 8.0), (8.0, 11.0, 8.0)),  # thalamus
    ((38.0, 2.0, 2.0), (7.0, 18.0, 12.0)),  # insula
    ((26.0, -20.0, -15.0), (8.0, 16.0, 8.0)),  # hippocampus and amygdala
    ((4.0, 12.0, 28.0), (7.0, 26.0, 12.0)),  # cingulate cortex
    ((3.0, -2.0, -10.0), (6.0, 9.0, 7.0)),  # hypothalamus and subcallosal cortex
)
GLOW = {"t1": 0.0, "t1ce": 0.0, "t2": 0.7, "flair": 1.0}

# Where moving fluid is often bright on FLAIR, because it was not inverted where it is excited
# (Bakshi et al. 2000, "Intraventricular CSF pulsation artifact on fast fluid-attenuated inversion-
# recovery MR images"): position and extent as above.
FLOWING_MM = (
    ((0.0, -8.0, -4.0), (5.0, 12.0, 9.0)),  # third ventricle
    ((0.0, -44.0, -32.0), (9.0, 8.0, 12.0)),  # fourth ventricle
    ((8.0, 2.0, 10.0), (6.0, 8.0, 6.0)),  # foramina of Monro
    ((0.0, 2.0, -20.0), (14.0, 12.0, 8.0)),  # suprasellar cistern
    ((0.0, -14.0, -40.0), (14.0, 8.0, 16.0)),  # in front of the pons
    ((12.0, -30.0, -12.0), (10.0, 10.0, 8.0)),  # around the midbrain
)

# The number of metastases follows a gamma distribution, rounded down: about one case in twelve has
# none, and the median is 4. Their radius is log-normal.
METASTASES_SHAPE, METASTASES_SCALE, MOST_METASTASES = 1.6, 3.4, 12
METASTASIS_RADIUS_MM, METASTASIS_LOG_SD = 2.8, 0.5
LEAST_METASTASIS_MM, LARGEST_METASTASIS_MM = 1.5, 12.0
RING_FROM_MM = 4.5  # radius above which a metastasis may have a necrotic centre and oedema


@dataclass(frozen=True)
class Laws:
    """What the phantoms of one family are drawn from.

    Attributes:
        contrast, texture, ranges, chances, thick_slices: See the constants of this module.
        folding: Weight of random sulci, 0 to 1; without them, the cortex is the average of 152.
    """

    contrast: Mapping[str, tuple[Range, ...]]
    texture: Mapping[str, Range]
    ranges: Mapping[str, Range]
    chances: Mapping[str, float]
    thick_slices: Mapping[str, float]
    folding: float = 1.0

    def but(
        self,
        *,
        contrast: Mapping[str, tuple[Range, ...]] | None = None,
        ranges: Mapping[str, Range] | None = None,
        chances: Mapping[str, float] | None = None,
        folding: float | None = None,
    ) -> "Laws":
        """Return laws of which some numbers differ."""
        return replace(
            self,
            contrast={**self.contrast, **(contrast or {})},
            ranges={**self.ranges, **(ranges or {})},
            chances={**self.chances, **(chances or {})},
            folding=self.folding if folding is None else folding,
        )

    def widened(self, share: float) -> "Laws":
        """Return laws whose contrasts reach further, at both ends by a share of what they span."""

        def wider(limits: Range) -> Range:
            low, high = limits
            return low - share * (high - low), high + share * (high - low)

        return replace(
            self,
            contrast={
                name: tuple(map(wider, by_modality)) for name, by_modality in self.contrast.items()
            },
        )


CLASSIC = Laws(CONTRAST, TEXTURE, RANGES, CHANCES, THICK_SLICES)
