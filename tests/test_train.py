"""From the command line to weights, scores, pictures and Weights & Biases, on tiny real files."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from PIL import Image

import train
from errors import InputError
from experiments.command import USER_ERRORS, one_line
from experiments.results import Results
from experiments.run import RunFolder
from lightning_modules import checkpoint
from tests.conftest import ROOT

Compose = Callable[..., DictConfig]

pytestmark = pytest.mark.process


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def records(folder: Path) -> list[dict[str, Any]]:
    """What the W&B run in a run's folder holds, by W&B's own reader."""
    (run,) = folder.glob("wandb/offline-run-*")
    command = ["wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_sweep_is_two_runs_with_results_and_dashboards(tiny: list[str], tmp_path: Path):
    overrides = [o for o in tiny if not o.startswith("run_dir")]
    done = cli("-m", "model=aeunet", "norm=group,batch", f"hydra.sweep.dir={tmp_path}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("*/results.json"))
    assert [folder.name.split("-")[:3] for folder in folders] == [
        ["aeunet", "batch", "s0"],
        ["aeunet", "group", "s0"],
    ]
    for folder, norm in zip(folders, ("batch", "group"), strict=True):
        results = Results.read(RunFolder(folder))
        assert results.choices["norm"] == norm
        assert 0 <= results.metrics["test/dice_WT"] <= 1
        assert f"test/dice {results.metrics['test/dice']:.3f}".split("/")[1] in done.stdout
        for name in (
            "best.ckpt",
            "last.ckpt",
            "split.json",
            "cases.csv",
            "csv/version_0/metrics.csv",
        ):
            assert (folder / name).is_file(), name
        rows = (folder / "cases.csv").read_text().splitlines()
        assert rows[0].startswith("case,dice_WT,dice_TC,dice_ET,false_alarm_mm3_WT")
        assert len(rows) == 3
        for row in rows[1:]:
            with Image.open(folder / "pictures" / f"{row.split(',')[0]}.png") as picture:
                assert picture.width > 500
        check_dashboard(folder, norm)


def check_dashboard(folder: Path, norm: str) -> None:
    found = records(folder)
    run = next(record["run"] for record in found if "run" in record)
    assert run["run_id"] == run["display_name"] == folder.name
    assert run["run_group"] == "proxy"
    assert {"brats", "aeunet", norm} <= set(run["tags"])
    history = [record["history"]["item"] for record in found if "history" in record]
    logged = {key for item in history for key in item}
    terms = {f"train/{term}_step" for term in ("dice_WT", "dice_TC", "dice_ET", "l2", "kl", "loss")}
    scores = {f"{stage}/dice_{r}" for stage in ("val", "test") for r in ("WT", "TC", "ET")}
    assert terms | scores | {"lr-Adam", "val/loss"} <= logged
    for name in ("val/slice/", "test/cases", "test/pictures"):
        assert any(key.startswith(name) for key in logged), name
    tested = next(item["test/dice_WT"] for item in history if "test/dice_WT" in item)
    assert tested == pytest.approx(Results.read(RunFolder(folder)).metrics["test/dice_WT"])
    summaries = [record["metric"] for record in found if "metric" in record]
    best = next(metric for metric in summaries if metric.get("name") == "val/dice_WT")
    assert best["summary"] == {"max": True}
    update = next(r["summary"]["update"] for r in found if "val/dice_WT" in str(r.get("summary")))
    assert set(update["val/dice_WT"]) == {"max"}
    config = json.dumps([record["config"] for record in found if "config" in record])
    assert '"bottleneck": 4' in config  # nested, as in the files
    masks = list(folder.glob("wandb/offline-run-*/files/media/images/mask/**/*.png"))
    assert len(masks) >= 2
    last = next(record["exit"] for record in found if "exit" in record)
    assert last.get("exit_code", 0) == 0


def test_a_finished_run_is_not_trained_again(composed: Compose, tiny: list[str], capsys):
    config = composed(*tiny, "logger=csv")
    score = train.train(config)
    weights = Path(config.run_dir) / "last.ckpt"
    written = weights.stat().st_mtime_ns
    assert train.train(config) == score
    assert weights.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count("test") >= 2  # the summary is printed again
    config.again = True
    assert train.train(config) == score  # seeded: the very same
    assert weights.stat().st_mtime_ns > written


class StopAtEpoch(pl.Callback):
    """A machine that dies in the middle of an epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1:
            raise ConnectionAbortedError("power is out")


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(path)["state_dict"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(
    composed: Compose, tiny: list[str], tmp_path: Path, workers: int
):
    common = [*tiny, "logger=csv", "trainer.max_epochs=3", f"data.num_workers={workers}"]
    whole = composed(*common, f"run_dir={tmp_path}/whole")
    train.train(whole)
    broken = composed(
        *common,
        f"run_dir={tmp_path}/broken",
        "+callbacks.stop._target_=tests.test_train.StopAtEpoch",
    )
    with pytest.raises(ConnectionAbortedError):
        train.train(broken)
    assert not (tmp_path / "broken/results.json").exists()
    train.train(composed(*common, f"run_dir={tmp_path}/broken"))
    expected = weights_of(tmp_path / "whole/last.ckpt")
    for name, tensor in weights_of(tmp_path / "broken/last.ckpt").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("scheduler", ["poly", "cosine", "constant"])
def test_a_finished_run_goes_on_along_a_longer_schedule(
    composed: Compose, tiny: list[str], tmp_path: Path, scheduler: str
):
    common = [*tiny, "logger=csv", f"scheduler={scheduler}"]
    train.train(composed(*common, "trainer.max_epochs=1", f"run_dir={tmp_path}/short"))
    more = [*common, "trainer.max_epochs=3"]
    train.train(composed(*more, f"run_dir={tmp_path}/more", f"resume={tmp_path}/short/last.ckpt"))
    train.train(composed(*more, f"run_dir={tmp_path}/whole"))
    rates = {
        name: [
            float(row["lr-Adam"])
            for path in sorted((tmp_path / name).glob("csv/*/metrics.csv"))
            for row in csv.DictReader(path.read_text().splitlines())
            if row.get("lr-Adam")
        ]
        for name in ("more", "whole")
    }
    assert len(rates["whole"]) == 3
    assert rates["more"] == rates["whole"][1:]


def test_a_checkpoint_of_weights_alone_can_be_tested(composed: Compose, tiny: list[str]):
    config = composed(*tiny, "logger=csv", "+callbacks.best.save_weights_only=true")
    train.train(config)
    assert "lr_schedulers" not in torch.load(Path(config.run_dir) / "best.ckpt")
    assert (Path(config.run_dir) / "results.json").is_file()


def test_a_checkpoint_is_enough_to_rebuild_the_module(composed: Compose, tiny: list[str]):
    config = composed(*tiny, "logger=csv", "norm=batch")
    train.train(config)
    module, stored = checkpoint.load(Path(config.run_dir) / "best.ckpt")
    assert stored["model"]["depth"] == 4
    assert not module.training
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in module.modules())
    with pytest.raises(InputError, match=r"architecture: model.depth is 4 there and 3 here"):
        train.train(
            composed(*tiny, "model.depth=3", f"resume={config.run_dir}/best.ckpt", "again=true")
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("patches.size=20", "patch_size: 20x20x20 is not divisible by 8"),
        ("data.data_set.root=nowhere", "nowhere"),
        ("data.data_set.modalities=[t1,t9]", "t9"),
        ("split.test=0.99", "split"),
        ("resume=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("optimizer.lr=1e30", "not finite at step"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    composed: Compose, tiny: list[str], override: str, message: str
):
    with pytest.raises(USER_ERRORS) as error:
        train.train(composed(*tiny, "logger=csv", "trainer.max_epochs=3", override))
    line = one_line(error.value)
    assert message in line
    assert "\n" not in line


def test_the_line_is_all_that_the_command_prints_of_an_error(tiny: list[str]):
    done = cli(*tiny, "logger=csv", "patches.size=20")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("not divisible by 8") == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("trainer", "epochs"), [("debug", 1), ("overfit", 50)])
def test_trainers_for_finding_bugs(composed: Compose, tiny: list[str], trainer: str, epochs: int):
    short = [override for override in tiny if not override.startswith("trainer.max_epochs")]
    config = composed(*short, "logger=csv", f"trainer={trainer}")
    assert 0 <= train.train(config) <= 1
    assert Results.read(RunFolder(Path(config.run_dir))).epochs == epochs


def test_a_runs_folder_holds_the_files_that_its_class_names(composed: Compose, tiny: list[str]):
    config = composed(*tiny, "logger=csv")
    train.train(config)
    run = RunFolder(Path(config.run_dir))
    named = (run.best, run.last, run.results_file, run.split_file, run.cases_file)
    assert all(path.is_file() for path in (*named, *run.metrics_files))
    assert len(run.metrics_files) == 1
    assert run.split()["test"] == sorted(path.stem for path in run.pictures.glob("*.png"))
    written = {path.name for path in run.path.iterdir()}
    assert written - {path.name for path in (*named, run.pictures)} == {"csv", ".claim"}
