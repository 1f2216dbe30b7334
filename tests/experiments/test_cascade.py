"""A network runs where a detector fires: equal there to itself alone, and not called elsewhere."""

from collections.abc import Callable
from itertools import combinations, count
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from datamodules.nifti import identify
from errors import InputError
from experiments.benchmarks import cascade as curve
from experiments.cascade import WhereItFires
from experiments.prediction import Estimate, Predictor, predict_folder
from tests.conftest import options_of, untrained, write_brats, write_case

Compose = Callable[..., DictConfig]
MakeCheckpoint = Callable[..., Path]

SMALL = ("data=brats", "logger=csv")
AEUNET = (*SMALL, "model.depth=2", "model.bottleneck=2", "patches.size=8", "patches.overlap=0.5")
AEUNET = (*AEUNET, "patches.window=8")
UNET = ("model=unet", *SMALL, "model.depth=2", "filters.base=8", "data.data_set.regions=[WT]")
DNET = ("model=dnet", *SMALL, "filters.base=8", "data.data_set.regions=[WT]")


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("brains"), cases=2, shape=(28, 24, 26))


@pytest.fixture
def checkpoint(composed: Compose, tmp_path: Path) -> MakeCheckpoint:
    """Write checkpoints of networks that have not been trained, but are no two alike."""
    seeds = count()

    def write(*overrides: str) -> Path:
        seed = next(seeds)
        torch.manual_seed(seed)
        content = untrained(composed, *overrides)
        content["config"] = {key: content["config"][key] for key in ("module", "model", "data")}
        path = tmp_path / f"run{seed}" / "best.ckpt"
        path.parent.mkdir()
        torch.save(content, path)
        return path

    return write


def predictor_of(folder: Path, **options: object) -> Predictor:
    return Predictor.from_options(options_of("predict", **options)).in_folder(folder)


def estimate(folder: Path, **options: object) -> Estimate:
    predictor = predictor_of(folder, **options)
    return predictor.estimate(predictor.cases()[0])


NETWORKS = {"aeunet": AEUNET, "unet": UNET, "dnet": DNET}


@pytest.mark.parametrize(
    ("detecting", "segmenting"),
    [
        ("dnet", "aeunet"),
        ("dnet", "unet"),
        ("dnet", "dnet"),
        ("unet", "aeunet"),
        ("aeunet", "aeunet"),
    ],
)
def test_a_detector_that_fires_everywhere_changes_no_bit(
    checkpoint: MakeCheckpoint, brains: Path, detecting: str, segmenting: str
):
    network, detector = checkpoint(*NETWORKS[segmenting]), checkpoint(*NETWORKS[detecting])
    alone = estimate(brains, checkpoint=network)
    found = estimate(brains, checkpoint=network, detector=detector, detector_threshold=1e-9)
    assert alone.share == found.share == 1
    assert np.array_equal(found.probabilities, alone.probabilities)
    assert found.probabilities.min() > 0


def test_a_detector_that_never_fires_leaves_nothing_to_compute(
    checkpoint: MakeCheckpoint, brains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In the checkpoint of a detector lies a threshold, here one that is never exceeded."""
    network, detector = checkpoint(*AEUNET), checkpoint(*DNET)
    content = torch.load(detector, weights_only=True)
    for stage in ("val", "test"):
        content["state_dict"][f"metrics.{stage}.threshold"].fill_(1.0)
    torch.save(content, detector)
    predictor = predictor_of(brains, checkpoint=network, detector=detector)

    def refuse(*_: object) -> None:
        raise AssertionError("the network was called")

    predictor.trained.ensemble.members[0].network.segment = refuse  # pyright: ignore
    assert predictor(predictor.cases(), tmp_path / "out") == []
    assert "networks ran on 0 % of the volume" in " ".join(capsys.readouterr().out.split())
    for case in predictor.cases():
        labels = nib.load(tmp_path / "out" / f"{case.name}.nii.gz")
        assert not np.asanyarray(labels.dataobj).any()


class Fires:
    """Fires in given voxels; the rest is that of a detector of 1 mm that sees the same volume."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.preprocessing = SimpleNamespace(spacing_mm=1.0)

    def probabilities(self, volume: object, candidates: np.ndarray) -> np.ndarray:
        return self.mask[None].astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"flips": True}, {"members": 2, "flips": True}])
def test_candidates_have_the_probabilities_of_the_network_alone(
    checkpoint: MakeCheckpoint, brains: Path, options: dict
):
    """Whatever boxes the detector marks."""
    networks = [str(checkpoint(*AEUNET)) for _ in range(options.pop("members", 1))]
    predictor = predictor_of(brains, checkpoint=networks, **options)
    case = predictor.cases()[0]
    volume = predictor.trained.volume(case)
    alone = predictor.estimate(case).probabilities
    rng = np.random.default_rng(0)
    for margin_mm in (0, 1):
        mask = np.zeros(volume.labels.shape, bool)
        for _ in range(2):
            start = rng.integers(0, np.subtract(mask.shape, 2))
            mask[tuple(slice(first, first + 2) for first in start)] = True
        where = WhereItFires(Fires(mask), 0.5, margin_mm, shares_volume=True)  # pyright: ignore
        candidates = where.candidates(case, volume)
        found = predictor.trained.probabilities(volume, candidates)
        assert (candidates.sum() > mask.sum()) == (margin_mm > 0)
        assert np.array_equal(found, np.where(candidates, alone, 0))
        assert 0 < predictor.trained.share(candidates) < 1


def test_the_expected_dice_of_a_cascade_is_of_its_candidates(
    checkpoint: MakeCheckpoint, brains: Path
):
    """Two networks and their mirror images, of which every pair is compared here."""
    networks = [str(checkpoint(*AEUNET)) for _ in range(2)]
    trained = predictor_of(brains, checkpoint=networks, flips=True).trained
    volume = trained.volume(trained.data_set.cases()[0])
    image = torch.from_numpy(volume.image.astype(np.float32))[None]
    candidates = np.zeros(volume.labels.shape, bool)
    candidates[4:9, 5:11, 3:12] = True
    with torch.inference_mode():
        estimates = [
            estimate[0].double().numpy() * candidates
            for member in trained.ensemble.members
            for estimate in member.estimates(
                image, torch.ones(1, *candidates.shape, dtype=torch.bool), trained.ensemble.flips
            )
        ]
    pairs = list(combinations(estimates, 2))
    assert len(pairs) == 16 * 15 / 2
    shared = sum((p * q).sum((1, 2, 3)) for p, q in pairs)
    total = sum((p + q).sum((1, 2, 3)) for p, q in pairs)
    _, found = trained.predicted(volume, candidates)
    np.testing.assert_allclose(found, 2 * shared / total, rtol=1e-4)
    _, elsewhere = trained.predicted(volume, ~candidates)
    assert not np.allclose(found, elsewhere, rtol=1e-3)
    assert np.isnan(trained.predicted(volume, candidates & ~candidates)[1]).all()


def test_networks_run_within_the_margin_of_voxels_above_the_threshold(
    checkpoint: MakeCheckpoint, brains: Path
):
    network, detector = checkpoint(*AEUNET), checkpoint(*DNET)
    predictor = predictor_of(brains, checkpoint=detector)
    fired = predictor.estimate(predictor.cases()[0]).probabilities[0]
    threshold = float(np.quantile(fired, 0.98))
    options = {"checkpoint": network, "detector": detector, "detector_threshold": threshold}
    for margin_mm in (0, 2, 2.5):
        found = estimate(brains, **options, detector_margin_mm=margin_mm)
        reach = int(np.ceil(margin_mm))
        expected = np.zeros_like(fired, bool)
        for x, y, z in np.argwhere(fired > threshold):
            box = (slice(max(0, at - reach), at + reach + 1) for at in (x, y, z))
            expected[tuple(box)] = True
        assert 0 < expected.sum() < expected.size
        np.testing.assert_array_equal((found.probabilities > 0).all(0), expected)


@pytest.mark.parametrize("spacing_mm", [1, 2])
def test_the_detector_may_see_other_modalities_at_another_spacing(
    checkpoint: MakeCheckpoint, tmp_path: Path, spacing_mm: int
):
    """Its candidates lie where it fires, in mm, although its volume is cropped to its brain."""
    shape, images = (40, 36, 32), {}
    rng = np.random.default_rng(0)
    for modality, low in (("t1", 4), ("t1ce", 4), ("t2", 4), ("flair", 8)):
        brain = np.zeros(shape, bool)
        brain[low:-4, low:-4, low:-4] = True  # that of FLAIR begins elsewhere
        images[modality] = np.where(brain, 100 + rng.normal(0, 5, shape), 0).astype(np.float32)
    write_case(tmp_path / "data" / "a", images, np.zeros(shape, np.uint8), prefix="a_")
    one = ("data.data_set.modalities=[flair]", f"data.cache.spacing_mm={spacing_mm}")
    predictor = predictor_of(
        tmp_path / "data",
        checkpoint=checkpoint(*AEUNET),
        detector=checkpoint(*DNET, *one),
        detector_margin_mm=4,
    )
    where, case = predictor.where, predictor.cases()[0]
    assert isinstance(where, WhereItFires)
    assert not where.shares_volume
    assert [path.name for path in where.images(case)] == ["a_flair.nii.gz"]
    volume, seen = predictor.trained.volume(case), where.detector.volume(case)
    assert volume.labels.shape == (32, 28, 24)
    fires = np.zeros(seen.labels.shape, bool)
    fires[2, 1, 3] = True
    at_mm = (seen.affine @ (2, 1, 3, 1))[:3]
    found = where.around(fires, seen, volume)
    assert found.shape == volume.labels.shape
    voxels = np.argwhere(np.ones_like(found))
    voxels_mm = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    distance_mm = np.abs(voxels_mm - at_mm).max(axis=1)
    assert found[tuple(voxels[distance_mm <= 4].T)].all()
    assert not found[tuple(voxels[distance_mm > 4 + spacing_mm].T)].any()
    assert where.candidates(case, volume).shape == volume.labels.shape


def test_what_does_not_go_together_is_refused_in_one_line(
    checkpoint: MakeCheckpoint, brains: Path, tmp_path: Path
):
    network, detector = checkpoint(*AEUNET), checkpoint(*DNET)
    metastases = checkpoint("model=dnet", "data=metastases", "logger=csv", "filters.base=8")
    core = checkpoint(*DNET[:-1], "data.data_set.regions=[TC]")
    for wrong, line in (
        (
            metastases,
            "^detector: expected one for BraTS, as checkpoint is, found one for Metastases$",
        ),
        (core, "^detector: expected one that finds all of WT, TC, ET, as .*, found one of TC$"),
        (tmp_path, f"^{tmp_path}: expected a finished run"),
    ):
        with pytest.raises(InputError, match=line):
            predictor_of(brains, checkpoint=network, detector=wrong)
    flair = checkpoint(*AEUNET, "data.data_set.modalities=[flair]")
    alone = write_brats(tmp_path / "alone", cases=1)
    for path in alone.rglob("*.nii.gz"):
        if not path.name.endswith("_flair.nii.gz"):
            path.unlink()
    # Either network takes a case that lacks modalities, unless it has none that the network sees.
    assert len(predictor_of(alone, checkpoint=flair, detector=detector).cases()) == 1
    for path in alone.rglob("*_flair.nii.gz"):
        path.rename(path.with_name(path.name.replace("_flair", "_t1")))
    with pytest.raises(InputError, match="has no flair; looked for"):
        predictor_of(alone, checkpoint=flair, detector=detector).cases()


def test_predictions_of_another_detector_are_refused(
    checkpoint: MakeCheckpoint, brains: Path, tmp_path: Path
):
    network, detector, other = checkpoint(*AEUNET), checkpoint(*DNET), checkpoint(*DNET)
    asked = options_of(
        "predict", checkpoint=network, detector=detector, input=brains, output=tmp_path / "out"
    )
    predict_folder(asked)
    for key, value, line in (
        ("detector", str(other), "detector is "),
        ("detector", None, r"detector is .* there and None here"),
        ("detector_threshold", 0.25, "detector_threshold is 0.5 there and 0.25 here"),
        ("detector_margin_mm", 3, "detector_margin_mm is 5.0 there and 3.0 here"),
    ):
        with pytest.raises(InputError, match=line):
            predict_folder({**asked, key: value})


def test_the_mark_of_a_case_hangs_on_what_the_detector_sees(
    checkpoint: MakeCheckpoint, tmp_path: Path
):
    folder = write_brats(tmp_path / "data", cases=1)
    predictor = predictor_of(
        folder,
        checkpoint=checkpoint(*AEUNET, "data.data_set.modalities=[t1]"),
        detector=checkpoint(*DNET, "data.data_set.modalities=[flair]"),
    )
    case = predictor.cases()[0]
    before = predictor._mark(case)
    flair = next(folder.rglob("*_flair.nii.gz"))
    flair.write_bytes(flair.read_bytes() + b"\0")
    assert predictor._mark(case) != before


def test_a_case_that_the_detector_has_seen_is_said(
    checkpoint: MakeCheckpoint, brains: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    network, detector = checkpoint(*AEUNET), checkpoint(*DNET)
    content = torch.load(detector, weights_only=True)
    case = predictor_of(brains, checkpoint=network).cases()[0]
    content["seen"] = {"train": dict.fromkeys(identify(case.images["t1"]), "x")}
    torch.save(content, detector)
    asked = {"input": brains, "output": tmp_path / "out", "detector": detector}
    predict_folder(options_of("predict", checkpoint=network, **asked))
    assert f"{detector}: expected test cases that it has not seen" in caplog.text


def test_a_case_of_the_curve_is_scored_by_hand():
    truth = np.zeros((2, 8, 8, 8), bool)
    truth[0, 1:3, 1:3, 1:3] = truth[0, 6, 6, 6] = True  # two lesions, of 8 voxels and of 1
    probabilities = np.zeros(truth.shape, np.float32)
    probabilities[0, 1:3, 1:3, 1] = 0.8  # half of the first
    probabilities[0, 4, 0, 7] = 0.8  # no lesion
    found = curve.scored(probabilities, truth, threshold=0.5)
    assert (found.lesions, found.detected, found.false_positives) == (2, 1, 1)
    assert found.dice == pytest.approx(2 * 4 / (5 + 9))  # the case has not the second region
    assert np.isnan(curve.scored(probabilities, ~truth & truth, threshold=0.5).dice)
    none = found._replace(dice=float("nan"), lesions=0, detected=0, false_positives=4)
    cases = [case._replace(seconds=s, share=0.5) for case, s in ((found, 1.0), (none, 3.0))]
    assert curve.Point.of_cases("0.5", cases) == ("0.5", 2, 0.5, found.dice, 0.5, 2.5)


def test_the_curve_begins_and_ends_at_the_network_alone_and_at_nothing(
    checkpoint: MakeCheckpoint, brains: Path, tmp_path: Path
):
    network, detector = checkpoint(*UNET), checkpoint(*DNET)
    options = options_of("predict", checkpoint=network, detector=detector)
    predictors, own = curve.predictors_of(options, brains, [1e-9, 1 - 1e-9])
    assert own == "0.5"  # in the checkpoint of a detector without training
    cases = predictors[own].cases()[:1]
    alone, everywhere, _, nowhere = curve.measured(predictors, cases, repeats=2)
    assert everywhere.name == "1e-09"
    assert everywhere[2:] == alone[2:]
    assert (nowhere.share, nowhere.dice, nowhere.sensitivity) == (0, 0, 0)
    rows = curve.rows_of([alone, everywhere], own="1e-09")
    assert rows[1]["detector's threshold"] == "1e-09 (its own)"
    assert float(rows[1]["times as fast"]) == pytest.approx(
        alone.seconds / everywhere.seconds, abs=0.05
    )
    curve.draw([alone, everywhere, nowhere], "1e-09", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert np.asarray(picture).std() > 10
