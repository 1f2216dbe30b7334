"""The shape of a head: nothing folds or tears, and heads differ as those of patients do."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from datamodules.phantom.anatomy import Tissue, build_geometry, healthy_tissue
from datamodules.phantom.atlas import HEAD, load_atlas
from datamodules.phantom.fields import Grid, RandomStreams
from datamodules.phantom.gliomas import draw_foci
from datamodules.phantom.ranges import RANGES
from datamodules.phantom.scanner import draw_brain_mask
from datamodules.phantom.shape import Deformation, Warp, draw_warp

CASES = range(10)


def jacobians(mapped_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """The determinants of the derivative of a map that is tabulated on a grid (3, X, Y, Z)."""
    derivative = np.stack(np.gradient(mapped_mm, spacing_mm, axis=(1, 2, 3)))
    return np.linalg.det(np.moveaxis(derivative, (0, 1), (-1, -2)))


def draw_tissue(index: int, spacing_mm: float = 4.0) -> tuple[Tissue, Grid]:
    """The tissue of a case without tumours, and the grid that it is on."""
    random = RandomStreams(0, index)
    geometry = build_geometry(random, draw_warp(random), [])
    grid = geometry.coarse.resized(spacing_mm)
    return healthy_tissue(random, geometry, grid), grid


def ventricles_ml(tissue: Tissue, spacing_mm: float = 4.0) -> float:
    """The volume of fluid that comes from where the atlas has its ventricles."""
    atlas = load_atlas()
    near = atlas.sample(binary_dilation(atlas.ventricles > 0.5, iterations=2) * 1.0, tissue.mni_mm)
    return float(tissue.csf[near > 0.5].sum() * spacing_mm**3 / 1000)


def fix(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Let all cases draw about the same value from a range."""
    monkeypatch.setitem(RANGES, name, (value, value + 1e-6))


def test_integration_keeps_a_flow_invertible_that_would_fold_in_one_step() -> None:
    noise = RandomStreams(0, 0).generator("noise").standard_normal((3, *HEAD.shape))
    flow_mm = np.zeros((3, *HEAD.shape), np.float32)
    x, y, z = HEAD.points_mm()
    flow_mm[0], flow_mm[1] = 14 * np.sin(y / 9), 14 * np.sin(x / 11) + 8 * np.cos(z / 12)
    flow_mm += 0.1 * noise.astype(np.float32)
    assert jacobians(HEAD.points_mm() - flow_mm, HEAD.spacing_mm).min() < 0
    deformation = Deformation.from_flow(HEAD, flow_mm)
    assert jacobians(HEAD.points_mm() + deformation.back_mm, HEAD.spacing_mm).min() > 0


@pytest.mark.parametrize("index", CASES)
def test_no_head_folds_with_or_without_tumours(index: int) -> None:
    random = RandomStreams(0, index)
    warp = draw_warp(random)
    for foci in ([], draw_foci(random, warp)):
        geometry = build_geometry(random, warp, foci)
        assert jacobians(geometry.mni_mm, geometry.coarse.spacing_mm).min() > 0
    whole = Grid.whole(3.0)
    assert jacobians(warp.to_mni_mm(whole.points_mm()), whole.spacing_mm).min() > 0


@pytest.mark.parametrize("index", CASES[:4])
def test_positions_of_the_atlas_are_found_in_the_case(index: int) -> None:
    warp = draw_warp(RandomStreams(0, index))
    errors_mm = []
    for site_mm in load_atlas().glioma_sites_mm[::1500]:
        back_mm = warp.to_mni_mm(warp.from_mni_mm(site_mm)[:, None])[:, 0]
        errors_mm.append(np.linalg.norm(back_mm - site_mm))
    assert np.mean(errors_mm) < 0.5
    assert max(errors_mm) < 2


def test_deformation_reaches_a_centimetre_and_differs_between_cases() -> None:
    atlas = load_atlas()
    brain = HEAD.sample(atlas.inner[None], HEAD.points_mm())[0] > 0
    fields = []
    for index in CASES[:4]:
        points_mm = HEAD.points_mm()[:, brain].astype(float)
        moved_mm = draw_warp(RandomStreams(0, index)).head.back_mm[:, brain]
        affine = np.vstack([points_mm, np.ones(points_mm.shape[1])]).T
        rest_mm = moved_mm.T - affine @ np.linalg.lstsq(affine, moved_mm.T, rcond=None)[0]
        fields.append(rest_mm)
        length_mm = np.linalg.norm(rest_mm, axis=1)
        assert 3.5 < np.median(length_mm) < 8
        assert 7.5 < np.percentile(length_mm, 95) < 16
    assert abs(np.corrcoef(fields[0].ravel(), fields[1].ravel())[0, 1]) < 0.5


def test_ventricles_differ_between_cases_as_between_adults() -> None:
    volumes_ml = [ventricles_ml(draw_tissue(index)[0]) for index in CASES]
    assert np.std(volumes_ml) / np.mean(volumes_ml) > 0.25
    assert 12 < np.median(volumes_ml) < 32
    assert 4 < min(volumes_ml) < max(volumes_ml) < 80


def test_age_widens_sulci_and_ventricles_together(monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = load_atlas()
    ventricles, sulci = [], []
    for years in (25, 80):
        fix(monkeypatch, "age_years", years)
        tissue, _ = draw_tissue(2, 3.0)
        ventricles.append(ventricles_ml(tissue, 3.0))
        depth_mm = atlas.sample(atlas.depth_mm, tissue.mni_mm)
        sulci.append(tissue.csf[(depth_mm > 2) & (depth_mm < 12)].mean())
    assert ventricles[1] > 1.6 * ventricles[0]
    assert sulci[1] > 1.2 * sulci[0]


def test_without_asymmetry_the_random_deformation_is_symmetric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mirrored_difference_mm(index: int) -> float:
        flow_mm = draw_warp(RandomStreams(0, index)).head.flow_mm
        signs = np.array([-1, 1, 1]).reshape(3, 1, 1, 1)
        return float(np.abs(flow_mm - signs * flow_mm[:, ::-1]).mean())

    usual_mm = [mirrored_difference_mm(index) for index in CASES[:4]]
    assert min(usual_mm) > 0.5
    for name in ("lobe_asymmetry", "petalia_mm", "cerebellum_mm"):
        fix(monkeypatch, name, 0)
    fix(monkeypatch, "asymmetry", 0)
    # The field is weighted by the depth in a brain that is nearly, not quite, symmetric.
    assert max(mirrored_difference_mm(index) for index in CASES[:4]) < 0.1


def test_cerebellum_moves_relative_to_the_cerebrum(monkeypatch: pytest.MonkeyPatch) -> None:
    def position_mm(warp: Warp, *point_mm: float) -> np.ndarray:
        return warp.from_mni_mm(np.array(point_mm))

    moved_mm = []
    for shift_mm in (-3, 3):
        fix(monkeypatch, "cerebellum_mm", shift_mm)
        warp = draw_warp(RandomStreams(0, 0))
        moved_mm.append(
            [position_mm(warp, 20.0, -60.0, -40.0), position_mm(warp, 20.0, 40.0, 20.0)]
        )
    cerebellum_mm, frontal_mm = np.subtract(moved_mm[1], moved_mm[0])
    assert cerebellum_mm[2] > 3
    assert np.linalg.norm(frontal_mm) < 0.1


def test_skull_stripping_ends_the_brainstem(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest_mm = []
    for end_mm in (-74, -58):
        fix(monkeypatch, "brainstem_end_mm", end_mm)
        tissue, grid = draw_tissue(0)
        mask = draw_brain_mask(RandomStreams(0, 0), tissue, grid)
        lowest_mm.append(tissue.mni_mm[2][mask].min())
    assert lowest_mm[0] < -62 < -58 < lowest_mm[1]


def test_tissue_is_the_same_at_two_voxel_sizes() -> None:
    fine, fine_grid = draw_tissue(3, 2.0)
    coarse, coarse_grid = draw_tissue(3, 4.0)
    assert coarse_grid.resized(2.0) == fine_grid
    halved_shape = [side for count in coarse_grid.shape for side in (count, 2)]
    for name in ("white", "depth_mm"):
        halved = getattr(fine, name).reshape(halved_shape).mean(axis=(1, 3, 5))
        whole = getattr(coarse, name)
        brain = coarse.depth_mm > 6
        assert np.corrcoef(halved[brain], whole[brain])[0, 1] > 0.9, name
