"""Families of phantoms: other laws, the same format; what each law says is seen in the voxels."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from datamodules.phantom import FAMILIES, MODALITIES, make_phantom, write_phantoms
from datamodules.phantom.anatomy import build_geometry, healthy_tissue, ventricles
from datamodules.phantom.brain_metastases import BrainMetastases, UnevenMetastases
from datamodules.phantom.families import BORDERS, CREEPING, KINDS, Family
from datamodules.phantom.fields import Grid, RandomStreams, interpolate
from datamodules.phantom.gliomas import DrawnGlioma, draw_enhancement
from datamodules.phantom.pathology import Pathology, PathologyMaps
from datamodules.phantom.ranges import CLASSIC, Laws
from datamodules.phantom.scanner import class_maps, draw_intensities
from datamodules.phantom.shape import draw_warp
from errors import InputError

SPACING_MM = 5.0


def maps_of(
    laws: Laws, pathology: type[Pathology], index: int = 0
) -> tuple[PathologyMaps, dict[str, np.ndarray], np.ndarray]:
    """The pathology and all classes of a case on a coarse grid, and MNI positions (3, X, Y, Z)."""
    random = RandomStreams(0, index, laws)
    warp = draw_warp(random)
    suffered = pathology(random, warp)
    geometry = build_geometry(random, warp, suffered.foci)
    coarse = healthy_tissue(random, geometry, geometry.coarse)
    suffered.spread(geometry, coarse)
    grid = geometry.coarse.resized(SPACING_MM)
    tissue = healthy_tissue(random, geometry, grid)
    maps = suffered.maps(geometry, tissue, grid)
    deep = interpolate(ventricles(coarse), geometry.coarse, grid)
    return maps, class_maps(random, tissue, maps, deep, grid), np.stack(tissue.mni_mm)


def as_drawn(maps: PathologyMaps, laws: Laws) -> np.ndarray:
    random = RandomStreams(0, 0, laws)
    grid = Grid(2.0, (0, 0, 0), maps.core.shape)
    return DrawnGlioma(random, draw_warp(random)).labels(maps, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_the_format_of_the_others_and_voxels_of_its_own(kind: str):
    seen = {}
    for family in FAMILIES:
        cases = [make_phantom(0, index, 8.0, kind, ("t1ce", "t2"), family) for index in range(4)]
        for index, case in enumerate(cases):
            assert set(np.unique(case.labels)) <= ({0, 1, 2, 4} if kind == "glioma" else {0, 1})
            brain = np.any([image != 0 for image in case.images.values()], axis=0)
            assert not case.labels[~brain].any()
            if kind == "glioma":
                random = RandomStreams(0, index, FAMILIES[family].laws)
                assert (case.labels == 4).any() <= draw_enhancement(random)
        assert any(case.labels.any() for case in cases)
        seen[family] = b"".join(case.images["t2"].tobytes() for case in cases)
    if kind == "metastases":  # these differ from the one before in gliomas alone
        del seen["cores"], seen["lopsided"], seen["low_grade"]
    assert len(set(seen.values())) == len(seen)


def test_the_family_that_is_not_named_is_classic():
    case, classic = (make_phantom(0, 1, 8.0, **how) for how in ({}, {"family": "classic"}))
    for modality in MODALITIES:
        np.testing.assert_array_equal(case.images[modality], classic.images[modality])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_fractions_of_a_voxel_sum_to_one_at_most(family: str, kind: str):
    laws, kinds = FAMILIES[family]
    for index in range(3):
        maps, classes, _ = maps_of(laws, kinds[kind], index)
        for part in maps:
            assert part.min() >= 0
            assert part.max() <= 1 + 1e-5
        assert (maps.core + maps.oedema).max() <= 1 + 1e-5
        assert (maps.enhancing + maps.fluid + maps.blood - maps.core).max() <= 1e-5
        assert classes["core"].min() >= -1e-5


def test_the_line_of_a_rater_runs_where_oedema_can_still_be_seen():
    """A ramp of oedema from 0 to 1 along x is drawn from 0.3 on, one up to the core."""
    ramp = np.broadcast_to(np.linspace(0, 1, 41, dtype=np.float32)[:, None, None], (41, 8, 8))
    nothing = np.zeros_like(ramp)
    exact = BORDERS.but(ranges={"rater_from": (0.3, 0.3), "rater_smoothing_mm": (0.0, 0.0)})
    labels = as_drawn(PathologyMaps(nothing, nothing, ramp, nothing, nothing), exact)
    np.testing.assert_array_equal(labels == 2, ramp > 0.3)
    core = np.where(ramp > 0.8, 1, 0).astype(np.float32)
    labels = as_drawn(PathologyMaps(core, nothing, ramp * (1 - core), nothing, nothing), exact)
    np.testing.assert_array_equal(labels == 1, core > 0)
    np.testing.assert_array_equal(labels == 2, (ramp > 0.3) & (core == 0))


def test_a_rater_follows_no_single_voxel():
    oedema = np.zeros((20, 20, 20), np.float32)
    oedema[5:15, 5:15, 5:15] = 1
    oedema[10, 10, 15] = oedema[2, 2, 2] = 1  # a spike on it, and a voxel far from it
    nothing = np.zeros_like(oedema)
    smooth = BORDERS.but(ranges={"rater_from": (0.5, 0.5), "rater_smoothing_mm": (2.0, 2.0)})
    labels = as_drawn(PathologyMaps(nothing, nothing, oedema, nothing, nothing), smooth)
    assert labels[10, 10, 10] == 2
    assert labels[2, 2, 2] == labels[10, 10, 15] == labels[5, 5, 5] == 0


@pytest.mark.parametrize(("chance", "alike"), [(1.0, True), (0.0, False)])
def test_isointense_cores_look_like_oedema(
    monkeypatch: pytest.MonkeyPatch, chance: float, alike: bool
):
    laws = CLASSIC.but(
        chances={"isointense_core": chance, "cyst": 0.0, "enhancing_hgg": 0, "enhancing_lgg": 0},
        ranges={"core_over_oedema": (1.0, 1.0), "noise": (0, 0.001), "bias": (0, 0.001)},
        contrast={"core": ((0.3, 0.35),) * 2 + ((2.2, 2.3), (1.2, 1.25))},
    )
    monkeypatch.setitem(FAMILIES, "tried", Family(laws, FAMILIES["classic"].kinds))
    case = make_phantom(0, 0, 3.0, modalities=("t1",), family="tried")
    core, oedema = (np.median(case.images["t1"][case.labels == label]) for label in (1, 2))
    assert (abs(core / oedema - 1) < 0.05) == alike


def test_healthy_tissue_glows_where_the_atlas_says_and_not_by_default():
    assert not maps_of(CLASSIC, FAMILIES["classic"].kinds["metastases"])[1]["glow"].any()
    laws = CREEPING.but(chances={"glow": 1.0})
    _, classes, mni_mm = maps_of(laws, FAMILIES["classic"].kinds["metastases"])
    glow = classes["glow"]

    def at(x_mm: float, y_mm: float, z_mm: float) -> float:
        distance = np.linalg.norm(mni_mm.T - [x_mm, y_mm, z_mm], axis=-1).T
        return float(glow.flat[distance.argmin()])

    assert at(0, -28, -25) > 0.05  # brainstem
    assert at(38, 2, 2) == pytest.approx(at(-38, 2, 2), abs=0.3)  # both insulae
    assert at(25, 45, 30) < 0.01  # frontal white matter


def test_lopsided_oedema_reaches_further_on_one_side_of_the_core():
    def share(lopsided: float) -> float:
        """How far the centre of the oedema lies from that of the core, over the radius."""
        laws = CREEPING.but(
            ranges={"lopsided": (lopsided, lopsided), "radius_mm": (16.0, 16.0)},
            chances={"multifocal": 0.0, "cortical": 0.0},
        )
        maps = maps_of(laws, DrawnGlioma, index=4)[0]
        centres = [np.argwhere(mask > 0.5).mean(0) for mask in (maps.core, maps.oedema)]
        return float(np.linalg.norm(centres[1] - centres[0])) * SPACING_MM / 16

    assert share(1.6) > 1.5 * share(0.0)


def test_fluid_that_moves_is_bright_on_flair_alone(monkeypatch: pytest.MonkeyPatch):
    laws = CREEPING.but(
        chances={"flow": 1.0, "glow": 0.0},
        ranges={"flow": (2.0, 2.0), "noise": (0, 0.001), "misregistration_mm": (0, 0)},
    )
    kind = FAMILIES["classic"].kinds["metastases"]
    _, classes, mni_mm = maps_of(laws, kind)
    flow = classes["flow"]
    distance_mm = np.linalg.norm(mni_mm.T - [0, -8, -4], axis=-1).T
    assert flow[distance_mm < 10].max() > 0.05  # third ventricle
    assert flow[distance_mm > 110].max() < 1e-3
    assert np.all(flow <= classes["csf"])

    images = {}
    for chance in (0.0, 1.0):
        tried = Family(laws.but(chances={"flow": chance}), {"metastases": kind})
        monkeypatch.setitem(FAMILIES, "tried", tried)
        images[chance] = make_phantom(0, 0, 5.0, "metastases", family="tried").images
    brighter = {name: images[1.0][name] - images[0.0][name] for name in images[0.0]}
    assert brighter["flair"].max() > 50
    assert not any(brighter[name].any() for name in ("t1", "t1ce", "t2"))


def test_uneven_metastases_without_unevenness_are_balls():
    laws = BORDERS.but(
        ranges={"metastasis_rugged": (0.0, 0.0), "metastasis_elongation": (1.0, 1.0)}
    )
    uneven, balls = (maps_of(laws, kind)[0] for kind in (UnevenMetastases, BrainMetastases))
    assert balls.core.max() > 0.5
    np.testing.assert_allclose(uneven.core, balls.core, atol=1e-4)
    rugged = maps_of(BORDERS, UnevenMetastases)[0]
    assert np.abs(rugged.core - balls.core).max() > 0.1


def test_fractal_fields_are_standardised_and_the_same_on_every_grid():
    random, grid = RandomStreams(0, 0), Grid.whole(6.0)
    field = random.fractal_field("a field", 18.0, grid)
    assert abs(field.mean()) < 0.15
    assert field.std() == pytest.approx(1, abs=0.1)
    part = Grid(6.0, (10, 10, 5), (20, 22, 9))
    np.testing.assert_allclose(
        random.fractal_field("a field", 18.0, part), field[part.slices], atol=1e-5
    )


def test_laws_differ_in_what_is_said():
    laws = CLASSIC.but(ranges={"noise": (0.1, 0.2)}, chances={"cyst": 1.0}, folding=0.5)
    assert laws.ranges == {**CLASSIC.ranges, "noise": (0.1, 0.2)}
    assert laws.chances["cyst"] == 1
    assert laws.contrast == CLASSIC.contrast
    assert (laws.folding, CLASSIC.folding) == (0.5, 1)
    wider = CLASSIC.but(contrast={"gm": ((1.0, 2.0), (0.0, 0.5))}).widened(0.1)
    assert wider.contrast["gm"] == (pytest.approx((0.9, 2.1)), pytest.approx((-0.05, 0.55)))


def test_families_take_turns(tmp_path: Path):
    families = ["creeping", "swelling"]
    write_phantoms(tmp_path, 3, spacing_mm=8, seed=0, families=families, workers=1)
    for index, family in enumerate(["creeping", "swelling", "creeping"]):
        (path,) = tmp_path.glob(f"*/phantom_{index:04d}/*_flair.nii.gz")
        expected = make_phantom(0, index, 8, family=family)
        np.testing.assert_array_equal(nib.load(path).dataobj, expected.images["flair"])
    assert json.loads((tmp_path / "phantoms.json").read_text())["families"] == families
    with pytest.raises(InputError, match=r"phantoms\.json"):
        write_phantoms(tmp_path, 3, spacing_mm=8, seed=0, families=families[:1], workers=1)
    with pytest.raises(InputError, match=r"families: expected a choice of classic, .* found round"):
        write_phantoms(tmp_path / "new", 1, spacing_mm=8, seed=0, families=["round"])


def test_half_of_the_tumours_of_low_grade_do_not_enhance():
    """Expected: .15 * .005 + .85 * .6 = .51 of them, and .085 in the family `classic`."""
    shares = {}
    for name in ("low_grade", "classic"):
        laws = FAMILIES[name].laws
        enhance = [draw_enhancement(RandomStreams(0, index, laws)) for index in range(1000)]
        shares[name] = 1 - np.mean(enhance)
    assert shares["low_grade"] == pytest.approx(0.51, abs=0.05)
    assert shares["classic"] == pytest.approx(0.085, abs=0.03)


def test_wet_tissue_is_dark_on_t1_and_bright_on_t2_and_wet_cores_less_bright_on_flair():
    """In the family `watery` alone; intensities of a class hang on its water as the law says."""
    drawn = {}
    for name in ("low_grade", "watery"):
        laws = FAMILIES[name].laws.but(chances={"cyst": 0.0, "isointense_core": 0.0})
        cases = [RandomStreams(0, index, laws) for index in range(400)]
        weights = [[draw_intensities(case, m) for m in MODALITIES] for case in cases]
        for tissue in ("core", "oedema"):
            values = np.array([[w[tissue] for w in case] for case in weights])
            assert np.all(values.min(0) >= [low for low, _ in laws.contrast[tissue]])
            assert np.all(values.max(0) <= [high for _, high in laws.contrast[tissue]])
            drawn[name, tissue] = np.corrcoef(values.T)
    apart = ~np.eye(4, dtype=bool)
    for tissue, signs in (("core", (-1, -1, 1, -1)), ("oedema", (-1, -1, 1, 1))):
        assert np.all(np.abs(drawn["low_grade", tissue][apart]) < 0.2)
        together = drawn["watery", tissue] * np.outer(signs, signs)
        assert np.all(together[apart] > 0.5)
