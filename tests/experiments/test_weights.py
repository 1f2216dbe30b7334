"""Weights without a run predict as its checkpoint does; a case may lack modalities."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors import safe_open

import train
from errors import InputError
from experiments.evaluation import best_point, cases_of_part
from experiments.operating_point import OperatingPoint
from experiments.prediction import Predictor, predict_folder
from experiments.trained import find_checkpoints, networks_of
from experiments.weights import write_thresholds, write_weights
from lightning_modules import checkpoint
from tests.conftest import options_of, untrained, write_brats

Compose = Callable[..., DictConfig]


@pytest.fixture
def runs(composed: Compose, tiny: list[str], tmp_path: Path) -> Path:
    """Two finished runs of networks that have learned nothing."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"run-{seed}"
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        torch.save(untrained(composed, *tiny, f"seed={seed}"), folder / "best.ckpt")
        (folder / "results.json").touch()
    return tmp_path / "runs"


def probabilities(checkpoints: Path, source: Path) -> np.ndarray:
    options = options_of("predict", checkpoint=checkpoints, input=source, output="unused")
    predictor = Predictor.from_options(options).in_folder(source)
    (case,) = predictor.cases()
    return predictor.estimate(case).probabilities


def test_weights_predict_as_the_runs_do_to_the_bit(runs: Path, tmp_path: Path):
    source = write_brats(tmp_path / "new", cases=1)
    written = write_weights(runs, tmp_path / "weights")
    assert [path.name for path in written] == ["run-0.safetensors", "run-1.safetensors"]
    assert find_checkpoints(tmp_path / "weights") == written
    expected = probabilities(runs, source)
    np.testing.assert_array_equal(probabilities(tmp_path / "weights", source), expected)
    assert (probabilities(written[0], source) != expected).any()


def test_weights_have_no_folder_of_the_machine_that_made_them(runs: Path, tmp_path: Path):
    path, _ = write_weights(runs, tmp_path / "weights")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert str(tmp_path) not in json.dumps(header)
    assert set(header) == {checkpoint.CONFIG_KEY, checkpoint.SEEN_KEY}
    assert checkpoint.read(path)["config"]["seed"] == 0


def test_weights_of_other_runs_are_not_averaged_with(runs: Path, tmp_path: Path):
    write_weights(runs / "run-1", tmp_path / "weights")
    with pytest.raises(InputError, match=r"weights: expected no weights, .* found run-1"):
        write_weights(runs / "run-0", tmp_path / "weights")
    write_weights(runs, tmp_path / "weights")  # those of the same runs are written again


def test_half_of_the_size_holds_the_weights_rounded_to_float16(runs: Path, tmp_path: Path):
    whole, half = (
        write_weights(runs / "run-0", tmp_path / str(half), half=half)[0] for half in (False, True)
    )
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    exact, rounded = (checkpoint.load(path).module.state_dict() for path in (whole, half))
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert rounded[name].dtype == weight.dtype
        torch.testing.assert_close(rounded[name], weight.half().float(), rtol=0, atol=0)

    content = torch.load(runs / "run-1" / "best.ckpt", weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.full_like(content["state_dict"][name], 1e5)
    torch.save(content, runs / "run-1" / "best.ckpt")
    with pytest.raises(InputError, match=f"expected weights below 65504, found more in {name}"):
        write_weights(runs / "run-1", tmp_path / "large", half=True)


def test_the_weights_of_this_repository_have_names(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.trained.WEIGHTS_FOLDER", runs.parent / "weights")
    write_weights(runs, runs.parent / "weights" / "glioma")
    options = options_of("predict", weights="glioma", input="unused", output="unused")
    assert len(find_checkpoints(networks_of(options))) == 2
    assert networks_of({**options, "weights": None, "checkpoint": "RUN"}) == "RUN"


@pytest.mark.process
def test_thresholds_of_weights_are_those_that_evaluate_would_choose(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    config = composed(*tiny, "logger=csv", f"run_dir={tmp_path}/runs/a")
    train.train(config)
    weights = tmp_path / "weights"
    write_weights(tmp_path / "runs", weights)
    write_thresholds(tmp_path / "runs", weights)
    options = options_of("predict", checkpoint=weights, input="unused", output="unused")
    predictor = Predictor.from_options({**options, "flips": True})
    assert predictor.point.thresholds.keys() == {"WT", "TC", "ET"}
    assert predictor.point.least_mm3.keys() == {"ET"}
    assert predictor.point == OperatingPoint.read(weights / "thresholds.json", predictor.networks)
    trained = Predictor.from_options({**options, "checkpoint": tmp_path / "runs", "flips": True})
    assert trained.point.thresholds == dict.fromkeys(("WT", "TC", "ET"), 0.5)
    cases = cases_of_part(trained.cases(), "validation", tmp_path / "runs")
    assert predictor.point == best_point(trained, cases, ["ET"], ["WT"])

    source = write_brats(tmp_path / "unseen", cases=2, shape=(24, 26, 20))
    write_thresholds(tmp_path / "runs", weights, source)
    moved = trained.in_folder(source)
    expected = best_point(moved, moved.cases(), ["ET"], ["WT"])
    assert OperatingPoint.read(weights / "thresholds.json", predictor.networks) == expected
    (tmp_path / "seen").mkdir()
    shutil.copytree(cases[0].reference.parent, tmp_path / "seen" / cases[0].name)
    with pytest.raises(InputError, match="expected test cases that it has not seen, found 1 of 1"):
        write_thresholds(tmp_path / "runs", weights, tmp_path / "seen")


def test_the_mean_of_runs_is_one_network_that_has_seen_what_they_have(
    runs: Path, composed: Compose, tiny: list[str], tmp_path: Path
):
    paths = [runs / f"run-{seed}" / "best.ckpt" for seed in (0, 1)]
    contents = [torch.load(path) for path in paths]
    for content, seen in zip(
        contents, ({"train": {"1": "a"}}, {"train": {"2": "b"}, "test": {"1": "a"}}), strict=True
    ):
        content["seen"] = seen
    for path, content in zip(paths, contents, strict=True):
        torch.save(content, path)
    (written,) = write_weights(runs, tmp_path / "weights", mean=True)
    assert written.name == "runs.safetensors"
    state, *states = (checkpoint.load(path).module.state_dict() for path in (written, *paths))
    for name, weight in state.items():
        torch.testing.assert_close(weight, (states[0][name] + states[1][name]) / 2)
    assert checkpoint.read(written)["seen"] == {
        "train": {"1": "a", "2": "b"},
        "test": {"1": "a"},
    }
    torch.save(untrained(composed, *tiny, "norm=batch"), paths[1])
    with pytest.raises(InputError, match=r"run-1/best.ckpt: .* another architecture: model\."):
        write_weights(runs, tmp_path / "others", mean=True)
    torch.save(untrained(composed, *tiny, "data.cache.spacing_mm=3"), paths[1])
    with pytest.raises(InputError, match=r"run-1/best.ckpt: spacing_mm is 3 there and 1 in "):
        write_weights(runs, tmp_path / "others", mean=True)
    assert not (tmp_path / "others").exists()


def test_a_damaged_file_is_named(runs: Path, tmp_path: Path):
    path, _ = write_weights(runs, tmp_path / "weights")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"run-0.safetensors: not a readable checkpoint"):
        checkpoint.read(path)


def test_a_missing_modality_is_said_and_is_zero_for_the_network(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole, without = (write_brats(tmp_path / name, cases=1) for name in ("whole", "without"))
    (without / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz").unlink()
    found = probabilities(runs, without)
    assert "BraTS2021_00000: expected t1, found none; the network sees 0 in its place" in (
        caplog.text
    )
    options = options_of("predict", checkpoint=runs, input=whole, output="unused")
    predictor = Predictor.from_options(options).in_folder(whole)
    volume = predictor.trained.volume(predictor.cases()[0])
    volume.image[predictor.data_set.modalities.index("t1")] = 0
    everywhere = np.ones(volume.image.shape[1:], bool)
    np.testing.assert_array_equal(found, predictor.trained.probabilities(volume, everywhere))


def test_a_case_with_one_modality_gets_a_label_map_and_a_picture(runs: Path, tmp_path: Path):
    source = write_brats(tmp_path / "new", cases=2)
    for name in ("t1", "t1ce", "flair"):
        (source / "BraTS2021_00001" / f"BraTS2021_00001_{name}.nii.gz").unlink()
    output = tmp_path / "out"
    predict_folder(
        options_of("predict", checkpoint=runs, input=source, output=output, pictures=True)
    )
    for name in ("BraTS2021_00000", "BraTS2021_00001"):
        shape = nib.load(source / name / f"{name}_t2.nii.gz").shape
        assert nib.load(output / f"{name}.nii.gz").shape == shape
        assert (output / f"{name}.png").is_file()
    shutil.rmtree(source / "BraTS2021_00000")
    (source / "BraTS2021_00001" / "BraTS2021_00001_t2.nii.gz").unlink()
    with pytest.raises(InputError, match="case BraTS2021_00001 has no t1"):
        predict_folder(options_of("predict", checkpoint=runs, input=source, output=output))
