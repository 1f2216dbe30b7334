"""Networks are not scored on patients that they have seen, whatever their files are called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import DictConfig

import train
from datamodules.brats import BraTS
from datamodules.nifti import identify
from datamodules.phantom import write_phantoms
from errors import InputError
from experiments.evaluation import evaluate
from experiments.prediction import predict_folder
from experiments.run import RunFolder
from lightning_modules import checkpoint
from tests.conftest import options_of

Compose = Callable[..., DictConfig]

pytestmark = pytest.mark.process


@pytest.fixture
def run(composed: Compose, tiny: list[str], bright_networks: None) -> RunFolder:
    config = composed(*tiny, "logger=csv", "trainer=debug")
    train.train(config)
    return RunFolder(Path(config.run_dir))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the cases of every report, which is not written."""
    reported: list[list[str]] = []

    def take(predictions, data_set, cases, output, *_) -> Path:
        reported.append([case.name for case in cases])
        (output / "table1.md").write_text("")
        return output / "table1.md"

    monkeypatch.setattr("experiments.evaluation.write_report", take)
    monkeypatch.setattr("experiments.evaluation.log_to_wandb", lambda *_: None)
    return reported


def renamed(brats: Path, folder: Path, names: list[str]) -> Path:
    """Copy cases under other names, in another orientation and off the origin."""
    for name in names:
        for path in (brats / name).iterdir():
            image = nib.load(path)
            other = folder / f"new_{name}" / path.name.replace(name, f"new_{name}")
            other.parent.mkdir(parents=True, exist_ok=True)
            affine = image.affine @ np.diag([-1, -1, 1, 1])
            flipped = np.asanyarray(image.dataobj)[::-1, ::-1]
            affine[:3, 3] = (3, 4, 5)
            nib.save(nib.Nifti1Image(flipped, affine), other)
    return folder


def test_evaluation_refuses_what_its_networks_have_seen(
    run: RunFolder, brats: Path, tmp_path: Path, report: list[list[str]]
):
    split = run.split()
    asked = options_of(
        "evaluate", checkpoint=run.best, input=brats, output=tmp_path / "out", thresholds=0.5
    )
    evaluate(asked)
    assert report == [split["test"]]

    evaluate({**asked, "cases": "train", "output": str(tmp_path / "train")})  # asked for by name
    assert report[1:] == [split["train"]]
    seen = [*split["train"], *split["validation"]]
    with pytest.raises(
        InputError, match=rf"best\.ckpt: expected .* found {len(seen)} of 6"
    ) as error:
        evaluate({**asked, "cases": "all"})
    assert "\n" not in str(error.value)

    nothing = tmp_path / "nothing"
    with pytest.raises(InputError, match="that it has not seen"):  # before thresholds are chosen
        evaluate({**asked, "cases": "all", "thresholds": "chosen", "output": str(nothing)})
    assert not nothing.exists()

    for part in ("train", "validation"):
        (name, *_) = split[part]
        folder = renamed(brats, tmp_path / part, [name, split["test"][0]])
        message = f"found 1 of 2 .*, the first is new_{name}, its {part} case {name}"
        with pytest.raises(InputError, match=message):
            evaluate({**asked, "cases": "all", "input": str(folder)})
    unseen = renamed(brats, tmp_path / "unseen", split["test"])
    evaluate({**asked, "cases": "all", "input": str(unseen), "output": str(tmp_path / "new")})
    assert report[2:] == [[f"new_{name}" for name in split["test"]]]


def test_prediction_warns(
    run: RunFolder, brats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    asked = options_of("predict", checkpoint=run.best, output=tmp_path / "out")
    split = run.split()
    predict_folder({**asked, "input": str(renamed(brats, tmp_path / "new", split["test"]))})
    assert not caplog.records
    renamed(brats, tmp_path / "new", split["train"][:1])
    predict_folder({**asked, "input": str(tmp_path / "new")})
    (warning,) = caplog.messages
    assert (
        f"found 1 of 3 that it was trained or validated on, the first is new_{split['train'][0]}"
        in warning
    )
    assert (tmp_path / f"out/new_{split['train'][0]}.nii.gz").is_file()


def test_a_checkpoint_without_its_cases_is_refused(
    run: RunFolder, brats: Path, tmp_path: Path, report: list[list[str]]
):
    content = checkpoint.read(run.best)
    del content[checkpoint.SEEN_KEY]
    torch.save(content, run.best)
    with pytest.raises(InputError, match=r"best\.ckpt: expected a list of the cases"):
        evaluate(
            options_of(
                "evaluate", checkpoint=run.best, input=brats, output=tmp_path, thresholds=0.5
            )
        )


def test_a_phantom_is_one_patient_at_every_spacing(tmp_path: Path, composed: Compose):
    """Also where its file has another name; a phantom of another seed is another patient."""
    identities = {}
    for name, seed, spacing_mm in (("a", 0, 6), ("b", 0, 8), ("c", 1, 6)):
        write_phantoms(tmp_path / name, 2, spacing_mm=spacing_mm, seed=seed, workers=1)
        for case in BraTS(tmp_path / name).cases():
            moved = shutil.copy(case.images["t1"], tmp_path / f"{name}_{case.name[-1]}.nii.gz")
            identities[f"{name}{case.name[-1]}"] = identify(Path(moved))
    same = {
        (one, other)
        for one, ours in identities.items()
        for other, theirs in identities.items()
        if one < other and set(ours) & set(theirs)
    }
    assert same == {("a0", "b0"), ("a1", "b1")}

    path = tmp_path / "network.ckpt"
    seen = {"train": dict.fromkeys(identities["a0"], "phantom_0000"), "validation": {}}
    torch.save({"config": {"module": {}, "data": {}}, checkpoint.SEEN_KEY: seen}, path)
    checkpoint.check_unseen(path, {"c0": identities["c0"], "b1": identities["b1"]})
    with pytest.raises(InputError, match=r"found 1 of 1 .* is b0, its train case phantom_0000"):
        checkpoint.check_unseen(path, {"b0": identities["b0"]})


def test_what_a_checkpoint_has_seen_is_its_training_and_validation_cases(run: RunFolder):
    seen = checkpoint.read(run.best)[checkpoint.SEEN_KEY]
    split = run.split()
    assert {part: sorted(set(names.values())) for part, names in seen.items()} == {
        "train": split["train"],
        "validation": split["validation"],
    }
    assert json.loads(json.dumps(seen)) == seen
