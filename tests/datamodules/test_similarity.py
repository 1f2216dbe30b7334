"""The searchlight, and the channels that are made with the template."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

import train
from datamodules.brats import BraTS
from datamodules.cache import Cache
from datamodules.nifti import read_volume
from datamodules.similarity import (
    LEAST_INSIDE,
    LocalSimilarity,
    MirroredByTemplate,
    ball,
    local_correlation,
)
from datamodules.template import Registration
from errors import InputError
from experiments.figure_2 import compare_with_template, write_figure
from experiments.prediction import Predictor
from lightning_modules import checkpoint
from tests.conftest import MODALITIES, ROOT, write_brats, write_case, write_image
from tests.datamodules.conftest import SCAN_AFFINE, SCAN_SHAPE, SCAN_SPACING_MM, TRUTH

Compose = Callable[..., DictConfig]


def naive(
    x: np.ndarray, y: np.ndarray, inside: np.ndarray, neighbourhood: np.ndarray
) -> np.ndarray:
    """One loop over all voxels, `np.corrcoef` of what lies in the ball and in the mask."""
    offsets = np.argwhere(neighbourhood) - np.array(neighbourhood.shape) // 2
    r = np.full(x.shape, np.nan)
    for voxel in np.argwhere(inside):
        near = voxel + offsets
        near = near[((near >= 0) & (near < x.shape)).all(1)]
        near = near[inside[tuple(near.T)]]
        a, b = x[tuple(near.T)].astype(np.float64), y[tuple(near.T)].astype(np.float64)
        if len(near) >= LEAST_INSIDE * len(offsets) and a.std() > 0 and b.std() > 0:
            r[tuple(voxel)] = np.corrcoef(a, b)[0, 1]
    return r


@pytest.mark.parametrize(
    ("radius_mm", "spacing_mm"), [(7, (2, 2, 2)), (3.5, (1, 1, 1)), (7, (1.5, 2, 3))]
)
def test_searchlight_equals_the_naive_loop(radius_mm: float, spacing_mm: tuple[float, ...]):
    """At borders, at holes, where an image is constant, with a large offset."""
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, 17, 14, 15))
    y = (0.6 * x + y).astype(np.float32)
    y[:8, :8] = 0.25
    inside = np.zeros(x.shape, bool)
    inside[1:, 2:-1, :-2] = draw.uniform(size=(16, 11, 13)) > 0.2
    inside[12:, :, 6:] = False
    inside[15, 4, 12] = True  # alone in its ball, or nearly
    near = ball(radius_mm, spacing_mm)
    expected = naive(x, y, inside, near)
    assert 0 < np.isnan(expected[inside]).sum() < inside.sum() / 2
    for first in (x, 300 + 20 * x):
        r = local_correlation(first, y, inside, near)
        np.testing.assert_array_equal(np.isnan(r), np.isnan(expected))
        np.testing.assert_allclose(r, expected, atol=1e-6)


def test_balls():
    assert ball(7, (1, 1, 1)).sum() == 1419  # as counted in the notes on real scans
    assert ball(3.5, (1, 1, 1)).sum() == 179
    assert ball(7, (2, 2, 2)).sum() == 179
    assert ball(7, (1, 1, 4)).shape == (15, 15, 3)
    with pytest.raises(InputError, match="radius_mm: expected more than 0, found 0"):
        LocalSimilarity(radius_mm=0)


@pytest.fixture(scope="module")
def healthy(scan: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases in BraTS layout that are the template, with a tumour on one side."""
    root = tmp_path_factory.mktemp("healthy")
    for index in range(3):
        draw = np.random.default_rng(index)
        name = f"BraTS2021_{index:05d}"
        tumour = np.zeros(SCAN_SHAPE, np.uint8)
        tumour[30:37, 20 + 3 * index : 27 + 3 * index, 22:29] = 4
        tumour[scan == 0] = 0
        noise = draw.normal(0, 20, SCAN_SHAPE)
        images = {}
        for modality in MODALITIES:
            voxels = np.where(tumour > 0, draw.uniform(200, 900, SCAN_SHAPE), scan + noise)
            images[modality] = np.where(scan > 0, np.maximum(voxels, 1), 0).astype(np.int16)
        write_case(root / name, images, tumour, SCAN_AFFINE, prefix=f"{name}_")
    return root


def test_the_cache_has_the_channel_only_when_asked(healthy: Path, tmp_path: Path):
    data_set = BraTS(healthy)
    plain = Cache(tmp_path, SCAN_SPACING_MM, "brain")
    asked = Cache(tmp_path, SCAN_SPACING_MM, "brain", extras={"similarity": LocalSimilarity(9)})
    other = Cache(tmp_path, SCAN_SPACING_MM, "brain", extras={"similarity": LocalSimilarity(7)})
    # Written down before there were extras: caches of that time stay valid.
    assert Cache(tmp_path, 2, "brain").key(data_set) == "a70e17424ff0"
    assert len({cache.key(data_set) for cache in (plain, asked, other)}) == 3

    (bare,) = plain.build(data_set.cases()[:1], data_set)
    (case,) = asked.build(data_set.cases()[:1], data_set)
    assert bare.image.shape[0] == 4
    assert case.image.shape[0] == 5
    assert case.image.dtype == np.float16
    np.testing.assert_array_equal(case.image[:4], bare.image)

    channel, brain = case.image[4].astype(np.float64), case.image[0] != 0
    assert not channel[~brain].any()
    assert abs(channel[channel != 0].mean()) < 1e-2
    assert channel[channel != 0].std() == pytest.approx(1, abs=1e-2)
    tumour = case.labels > 0
    assert channel[tumour].mean() < -1.5 < channel[brain & ~tumour].mean()

    facts = json.loads((case.folder / "case.json").read_text())["extras"]["similarity"]
    assert not facts["failed"]
    assert facts["overlap"] > 0.9
    assert np.abs(np.array(facts["to_template"]) - TRUTH).max() < 6
    assert -1 < facts["mean"] < 1


def test_the_channel_does_not_depend_on_the_crop(healthy: Path, tmp_path: Path):
    data_set = BraTS(healthy)
    extras = {"similarity": LocalSimilarity(9)}
    (whole,) = Cache(tmp_path, SCAN_SPACING_MM, "brain", extras=extras).build(
        data_set.cases()[:1], data_set
    )
    (part,) = Cache(tmp_path, SCAN_SPACING_MM, (80, 80, 80), extras=extras).build(
        data_set.cases()[:1], data_set
    )
    start = np.round((np.linalg.inv(whole.affine) @ part.affine)[:3, 3]).astype(int)
    box = tuple(slice(first, first + 20) for first in start)
    np.testing.assert_allclose(part.image[4], whole.image[4][box], atol=5e-3)


def test_across_the_template_lies_what_the_template_has_there(healthy: Path, tmp_path: Path):
    """The head is turned by six degrees: the box's own plane would miss by up to a centimetre."""
    data_set = BraTS(healthy)
    extras = {"mirrored": MirroredByTemplate()}
    cache = Cache(tmp_path, SCAN_SPACING_MM, "brain", extras=extras)
    (case,) = cache.build(data_set.cases()[:1], data_set)
    assert case.image.shape[0] == 8
    own, opposite = case.image[:4].astype(np.float64), case.image[4:].astype(np.float64)
    tumour = case.labels > 0
    shared = (own[0] != 0) & (opposite[0] != 0) & ~tumour
    across = np.corrcoef(own[0][shared], opposite[0][shared])[0, 1]
    flipped = case.image[0, ::-1].astype(np.float64)
    shared &= flipped != 0
    by_box = np.corrcoef(own[0][shared], flipped[shared])[0, 1]
    assert across > max(0.8, by_box + 0.1)
    # A voxel of the tumour stands in the channels at its mirror image, and in all of them.
    mirrored = Registration(TRUTH, overlap=1).mirrored_voxels(case.affine)
    voxel = np.argwhere(tumour).mean(0)
    x, y, z = np.round(mirrored @ [*voxel, 1])[:3].astype(int)
    around = (slice(x - 1, x + 2), slice(y - 1, y + 2), slice(z - 1, z + 2))
    inside = tuple(slice(int(at) - 1, int(at) + 2) for at in voxel)
    for channel in range(4):
        here = own[channel][inside].mean()
        assert opposite[channel][around].mean() == pytest.approx(here, abs=0.3)


def test_a_scan_that_does_not_fit_is_named_and_gets_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data_set = BraTS(write_brats(tmp_path / "data", cases=1))
    cache = Cache(tmp_path / "cache", 1, "brain", extras={"similarity": LocalSimilarity()})
    with caplog.at_level(logging.WARNING):
        (case,) = cache.build(data_set.cases(), data_set)
    assert re.search(r"BraTS2021_00000: does not fit the template \(Dice", caplog.text)
    assert case.image.shape[0] == 5
    assert not case.image[4].any()


def test_similarity_needs_a_t1(healthy: Path, tmp_path: Path):
    data_set = BraTS(healthy, modalities=("t2", "flair"))
    cache = Cache(tmp_path, SCAN_SPACING_MM, "brain", extras={"similarity": LocalSimilarity()})
    with pytest.raises(InputError, match=r"needs t1 among .*modalities, found t2, flair"):
        cache.build(data_set.cases(), data_set)


def test_a_checkpoint_computes_all_that_its_network_sees(
    healthy: Path, composed: Compose, tiny: list[str], tmp_path: Path
):
    """Training and prediction with both inputs, from files to label maps."""
    tiny = [value for value in tiny if not value.startswith(("data.data_set", "data.cache.root"))]
    common = [
        *tiny,
        *("logger=csv", "trainer.max_epochs=1", "split.validation=0.34", "split.test=0.34"),
        *(f"data.data_set.root={healthy}", f"data.cache.root={tmp_path}/cache"),
        f"data.cache.spacing_mm={SCAN_SPACING_MM}",
        "patches.window=48",
    ]
    config = composed(*common, "inputs=both", f"run_dir={tmp_path}/run")
    train.train(config)
    values = OmegaConf.merge(
        OmegaConf.load(ROOT / "conf" / "predict.yaml"),
        {"checkpoint": [f"{tmp_path}/run/best.ckpt"], "device": "cpu"},
    )
    predictor = Predictor.from_options(dict(OmegaConf.to_container(values)))
    seen = []
    network = predictor.trained.ensemble.members[0].network
    network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert predictor(predictor.data_set.in_folder(healthy).cases()[:1], tmp_path / "out") == []
    assert {x.shape[1] for x in seen} == {10}  # four modalities, their similarity; on both sides
    assert all(x[:, [4, 9]].any() for x in seen)
    assert (tmp_path / "out" / "BraTS2021_00000.nii.gz").is_file()


class Untrained(nn.Identity):
    """Takes the part of a module that is loaded, but not called."""

    estimates = share = nn.Identity.forward


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ("modalities", "similarity", "extras"),
        ("modalities", "mirrored", "mirrored"),
        ("similarity", "both", "mirrored"),
        ("mirrored", "mirrored_by_template", "extras"),
    ],
)
def test_an_ensemble_has_one_input(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, first: str, second: str, key: str
):
    def of_choice(path: str) -> checkpoint.Loaded:
        config = OmegaConf.to_container(composed(f"inputs={path}").data, resolve=True)
        return checkpoint.Loaded(Untrained(), {"data": config})

    monkeypatch.setattr(checkpoint, "load", of_choice)
    checkpoint.load_ensemble([second, second])
    with pytest.raises(InputError, match=rf"^{second}: {key} is .* same input and output"):
        checkpoint.load_ensemble([first, second])


def test_figure_2_shows_that_the_tumour_is_unlike_a_healthy_brain(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_figure(healthy, tmp_path / "figure_2.png", cases=1, radius_mm=9)
    with Image.open(tmp_path / "figure_2.png") as figure:
        assert figure.width > 1000
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    values = dict(zip(header.split(" | ")[1:], row.split(" | ")[1:], strict=True))
    tumour = float(values["r in the tumour"])
    assert tumour < 0.4 < float(values["mirrored place"])
    assert tumour < 0.4 < float(values["by the template's plane"])
    assert 4 < float(values["tilt (degrees)"]) < 8  # six were asked for
    with pytest.raises(InputError, match="no case found"):
        write_figure(tmp_path, tmp_path / "figure_2.png", cases=1, radius_mm=9)


def test_figure_2_has_black_air_whatever_value_the_air_has(healthy: Path, tmp_path: Path):
    """Data sets that are z-scored before they are published have other air than 0."""
    data_set = BraTS(shutil.copytree(healthy, tmp_path / "copy"))
    case = data_set.cases()[0]
    t1, affine = read_volume(case.images["t1"])
    write_image(case.images["t1"], np.where(t1 == 0, -700, t1 - 500), affine)
    comparison = compare_with_template(case, data_set, radius_mm=9)
    np.testing.assert_array_equal(comparison.t1[t1 == 0], 0)
    assert comparison.t1.min() == 0
    assert np.isnan(comparison.similarity[t1 == 0]).all()
