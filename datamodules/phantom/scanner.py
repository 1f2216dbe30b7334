"""Image formation: from tissue and lesions to the skull-stripped integers of a file."""

from collections.abc import Sequence

import numpy as np

from datamodules.phantom.anatomy import Tissue
from datamodules.phantom.fields import Grid, RandomStreams, draw_triangular, sigmoid
from datamodules.phantom.pathology import PathologyMaps
from datamodules.phantom.ranges import FLOWING_MM, GLOW, GLOWING_MM, MODALITIES, MORE_WATER


def class_maps(
    random: RandomStreams,
    tissue: Tissue,
    pathology: PathologyMaps,
    ventricles: np.ndarray,
    grid: Grid,
) -> dict[str, np.ndarray]:
    """Return the fraction of every class and its textures (X, Y, Z), which images are sums of.

    Args:
        random: Random numbers of the case.
        tissue: Healthy tissue.
        pathology: Fractions of the pathological classes.
        ventricles: Soft map of the fluid deep in the brain (X, Y, Z).
        grid: The grid of all of these.
    """
    vessel, plexus, bright = _unlabelled_structures(random, tissue, ventricles, grid)
    outside = 1 - pathology.core
    healthy = (outside - pathology.oedema) * (1 - vessel) * (1 - plexus)
    solid = pathology.core - pathology.enhancing - pathology.fluid - pathology.blood
    coarse = random.smooth_field("coarse texture", 14.0, grid)
    fine = random.smooth_field("fine texture", 4.0, grid)
    return {
        "white": healthy * tissue.white,
        "gm": healthy * tissue.grey,
        "csf": healthy * tissue.csf,
        "bright": healthy * bright,
        "glow": healthy * (1 - tissue.csf) * _places(random, tissue, "glow", GLOWING_MM),
        "flow": healthy * tissue.csf * _places(random, tissue, "flow", FLOWING_MM),
        "oedema": pathology.oedema,
        "core": solid,
        "enhancing": pathology.enhancing,
        "cyst": pathology.fluid,
        "blood": pathology.blood,
        "vessel": (outside - pathology.oedema) * vessel,
        "plexus": (outside - pathology.oedema) * (1 - vessel) * plexus,
        "healthy, coarse": healthy * coarse,
        "healthy, fine": healthy * fine,
        "oedema, coarse": pathology.oedema * coarse,
        "oedema, fine": pathology.oedema * fine,
        "core, coarse": pathology.core * coarse,
        "core, fine": pathology.core * fine,
    }


def _unlabelled_structures(
    random: RandomStreams, tissue: Tissue, ventricles: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the fractions (X, Y, Z) of vessels and dura, choroid plexus, and bright spots."""
    first, second = (random.smooth_field(f"vessels {n}", 9.0, grid) for n in (1, 2))
    width = 0.13 + 0.04 * grid.spacing_mm
    vessel = np.exp(-(first**2 + second**2) / width**2)  # lines where the zeros of two fields cross
    vessel *= np.clip(1 - tissue.depth_mm / 25, 0, 1) * (1 - tissue.white)
    x_mm, _, z_mm = tissue.mni_mm
    sinus = sigmoid(3 - abs(x_mm)) * sigmoid(2.5 - tissue.depth_mm) * (z_mm > 5)
    patches = sigmoid(3 * random.smooth_field("dura", 14.0, grid) - 1)
    dura = sigmoid((0.5 - tissue.depth_mm) / 0.5) * patches
    patches = sigmoid(6 * random.smooth_field("plexus", 5.0, grid) - 6)
    bright = np.clip(2.5 * ventricles, 0, 1)  # caps of the ventricles
    if random.has("hyperintensities"):
        bright += sigmoid(8 * (random.smooth_field("hyperintensities", 3.5, grid) - 2.6))
    return (
        np.clip(vessel + sinus + 0.7 * dura, 0, 1),
        tissue.csf * (tissue.depth_mm > 20) * patches,
        bright * tissue.white,
    )


def _places(
    random: RandomStreams,
    tissue: Tissue,
    name: str,
    places_mm: Sequence[tuple[tuple[float, float, float], tuple[float, float, float]]],
) -> np.ndarray:
    """Return how much is bright on both sides of some places (X, Y, Z), each as much as drawn.

    Args:
        random: Random numbers of the case.
        tissue: Healthy tissue.
        name: Chance of a case to have any.
        places_mm: MNI position on the right, and extent along each axis, of each.
    """
    found = np.zeros_like(tissue.white)
    if not random.has(name):
        return found
    generator = random.generator(f"{name}ing")
    for centre_mm, extent_mm in places_mm:
        strength = np.float32(generator.random())
        for side in (-1, 1) if centre_mm[0] else (1,):
            square = sum(
                np.square((axis_mm - np.float32(factor * middle_mm)) / np.float32(size_mm))
                for axis_mm, factor, middle_mm, size_mm in zip(
                    tissue.mni_mm, (side, 1, 1), centre_mm, extent_mm, strict=True
                )
            )
            found = np.maximum(found, strength * np.exp(-square / 2))
    return found


def ideal_image(
    random: RandomStreams, modality: str, maps: dict[str, np.ndarray], grid: Grid
) -> np.ndarray:
    """Mix the class maps to an image without noise and blur (X, Y, Z), times a bias field.

    White matter has the intensity 1 before the bias field.
    """
    weights = draw_intensities(random, modality)
    image = np.zeros(grid.shape, np.float32)
    for name, volume in maps.items():
        image += weights[name] * volume
    bias = random.draw("bias", modality) * random.smooth_field(f"bias {modality}", 70.0, grid)
    regional = random.draw("regional", modality)
    bias += regional * random.smooth_field(f"regional {modality}", 30.0, grid)
    return image * np.exp(bias)


def draw_intensities(random: RandomStreams, modality: str) -> dict[str, float]:
    """Draw the intensity of every class map in a modality; white matter is 1."""
    generator = random.generator(f"contrast {modality}")
    column = MODALITIES.index(modality)
    weights = {
        name: float(draw_triangular(generator, ranges[column]))
        for name, ranges in random.laws.contrast.items()
    }
    for name, signs in MORE_WATER.items():
        low, high = random.laws.contrast[name][column]
        place = 0.5 + signs[column] * (random.draw("water", name) - 0.5)
        wet, share = low + place * (high - low), random.draw("by_water")
        weights[name] = (1 - share) * weights[name] + share * wet
    if random.has("isointense_core"):
        weights["core"] = weights["oedema"] * random.draw("core_over_oedema", modality)
    if random.has("cyst"):
        weights["core"] = weights["cyst"]
    weights["glow"] = GLOW[modality] * random.draw("glow")
    weights["flow"] = random.draw("flow") if modality == "flair" else 0.0
    weights["blood"] = random.draw("blood", modality)
    weights["white"] = 1.0
    for name, limits in random.laws.texture.items():
        weights[name] = float(generator.choice([-1, 1]) * draw_triangular(generator, limits))
    return weights


def acquire(random: RandomStreams, modality: str, image: np.ndarray, grid: Grid) -> np.ndarray:
    """Degrade an ideal image (X, Y, Z) as a scanner and the usual resampling do.

    The image is misregistered and blurred, in some cases it has thick slices, and it gets noise.
    """
    from scipy.ndimage import correlate1d

    generator = random.generator(f"acquire {modality}")
    shift_mm = random.draw("misregistration_mm", modality) * generator.uniform(-1, 1, size=3)
    thick = generator.random() < random.laws.thick_slices[modality]
    slice_axis = int(generator.choice(3, p=[0.15, 0.15, 0.7]))
    slice_mm = random.draw("slice_mm", modality)
    for axis in range(3):
        sigma_mm = random.draw("blur_mm", modality)
        if thick and axis == slice_axis:
            sigma_mm = slice_mm / 2.355  # a Gaussian whose full width at half maximum is the slice
        kernel = _shifted_gaussian(sigma_mm / grid.spacing_mm, shift_mm[axis] / grid.spacing_mm)
        image = correlate1d(image, kernel, axis=axis, mode="nearest")
    if thick and slice_mm > 1.5 * grid.spacing_mm:
        image = _interpolate_slices(image, slice_axis, slice_mm / grid.spacing_mm)
    noise = random.generator(f"noise {modality}").standard_normal(image.shape, dtype=np.float32)
    noise *= random.draw("noise", modality)
    noise += image
    return noise


def _shifted_gaussian(sigma: float, shift: float) -> np.ndarray:
    """Return a 1-D kernel that blurs and shifts at once; `sigma` and `shift` are in voxels."""
    sigma = float(np.hypot(sigma, 0.35))  # a narrower kernel could not lie between two voxels
    reach = int(np.ceil(2.5 * sigma + abs(shift)))
    weights = np.exp(-np.square((np.arange(-reach, reach + 1) - shift) / sigma) / 2)
    return weights / weights.sum()


def _interpolate_slices(image: np.ndarray, axis: int, step: float) -> np.ndarray:
    """Keep only every `step`-th slice along an axis and interpolate those between linearly."""
    position = np.arange(image.shape[axis], dtype=np.float32) / step
    below = np.floor(position)
    share = np.reshape(position - below, [-1 if other == axis else 1 for other in range(3)])
    last = image.shape[axis] - 1

    def measured(numbers: np.ndarray) -> np.ndarray:
        return np.take(image, np.minimum(np.round(numbers * step), last).astype(int), axis=axis)

    return (1 - share) * measured(below) + share * measured(below + 1)


def draw_brain_mask(random: RandomStreams, tissue: Tissue, grid: Grid) -> np.ndarray:
    """Draw what skull stripping takes for brain (X, Y, Z): too much here, too little there."""
    margin_mm = random.draw("brain_margin_mm") + 0.7 * random.smooth_field("rind", 12.0, grid)
    bites_mm = 8 * np.maximum(random.smooth_field("bites", 8.0, grid) - 2.6, 0)
    mask = tissue.depth_mm > bites_mm - np.minimum(margin_mm, 3)
    mask &= tissue.mni_mm[2] > random.draw("brainstem_end_mm")
    if random.has("cut_field_of_view"):
        z_mm = grid.axes_mm()[2]
        cut_mm = random.generator("cut").uniform(5, 25)
        mask &= z_mm > z_mm[0] + cut_mm
    return mask


def quantise(
    random: RandomStreams, modality: str, image: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Scale an image (X, Y, Z) to the int16 values of a scanner, 0 outside the brain mask.

    Inside, values are negative only where ringing makes them so.
    """
    from scipy.ndimage import gaussian_filter

    image = np.maximum(image, 0.01)
    image *= mask
    if random.has("ringing"):
        blurred = gaussian_filter(image, 1.0, truncate=2.5)
        image += random.draw("ringing", modality) * (image - blurred)
    scale = 10 ** random.draw("white_matter_log10", modality)
    tenfold = random.has("tenfold_modality")
    if tenfold and modality == random.generator("tenfold").choice(MODALITIES):
        scale *= 10
    volume = np.zeros(mask.shape, np.int16)
    volume[mask] = np.clip(np.round(image[mask] * scale), -32768, 32767)
    return volume
