"""From the command line to weights, scores, pictures and Weights & Biases, on tiny real files."""

import csv
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from PIL import Image

import train
from datamodules.splits import PARTS
from errors import InputError
from experiments.command import USER_ERRORS, one_line
from experiments.results import Results
from experiments.run import RunFolder
from files import PREFIX, write_json
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
    results = Results.read(RunFolder(folder))
    assert tested == pytest.approx(results.metrics["test/dice_WT"])
    # The summary, the last of what was logged, is that of the checkpoint that was tested.
    validated = [item["val/dice_WT"] for item in history if "val/dice_WT" in item]
    assert validated[-1] == pytest.approx(results.metrics["val/dice_WT"])
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
    printed = capsys.readouterr().out
    assert printed.count("test") >= 2  # the summary is printed again
    results = Results.read(RunFolder(Path(config.run_dir)))
    assert 0 < results.waiting < 1
    assert printed.count(f"{100 * results.waiting:.1f} % of the training, for data") == 2
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
    common = [*tiny, "logger=csv", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1"]
    common += [f"data.num_workers={workers}"]
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
    kept = checkpoint.read(tmp_path / "broken/last.ckpt")
    assert kept["epoch"] == 0
    kept["callbacks"]["Timer"]["time_elapsed"]["train"] += 1e5  # seconds
    torch.save(kept, tmp_path / "broken/last.ckpt")
    train.train(composed(*common, f"run_dir={tmp_path}/broken"))
    assert json.loads((tmp_path / "broken/results.json").read_text())["fit_s"] > 1e5
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


def test_runs_of_a_seed_start_from_the_same_weights(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    """Whatever is drawn before, or built in another order: a sweep compares such runs in pairs."""
    states = []
    for number, override in enumerate(
        ("model.bottleneck=8", "model.bottleneck=4", "norm=batch", "seed=1")
    ):
        config = composed(
            *tiny, "logger=csv", override, "optimizer.lr=0", "trainer.max_epochs=1",
            f"run_dir={tmp_path}/{number}",
        )  # fmt: skip
        train.train(config)
        states.append(checkpoint.read(tmp_path / f"{number}/last.ckpt")["state_dict"])
    first, *others, seeded = states
    kernels = [name for name, value in first.items() if value.dim() == 5]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in kernels)
    assert not any(torch.equal(first[name], seeded[name]) for name in kernels)


def test_fine_tuning_starts_from_the_weights_of_a_run_and_from_nothing_else(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    first = composed(*tiny, "logger=csv", f"run_dir={tmp_path}/first")
    train.train(first)
    best = tmp_path / "first/best.ckpt"
    checkpoint.export([best], tmp_path / "first.safetensors")
    for start in (best, tmp_path / "first.safetensors"):
        folder = tmp_path / start.suffix
        config = composed(
            *tiny, "logger=csv", f"run_dir={folder}", f"finetune={start}", "optimizer.lr=0",
            "seed=3", "trainer.max_epochs=1", "split.test=0",
        )  # fmt: skip
        train.train(config)
        tuned = checkpoint.read(folder / "last.ckpt")
        source = checkpoint.read(start)
        assert tuned["epoch"] == 0
        for name, value in checkpoint.load(start).module.network.named_parameters():
            assert torch.equal(tuned["state_dict"][f"network.{name}"], value), name
        assert source["seen"]["train"].items() <= tuned["seen"]["train"].items()
    with pytest.raises(InputError, match=r"architecture: model.depth is 4 there and 3 here"):
        train.train(composed(*tiny, "model.depth=3", f"finetune={best}", "again=true"))
    names = RunFolder(tmp_path / "first").split()
    swapped = {**names, "train": names["test"][:1], "test": names["train"][:1]}
    with pytest.raises(InputError, match=r"best.ckpt: expected .*, found 1 of 1 .*train"):
        train.train(resumed(composed, tiny, tmp_path / "swapped", swapped, f"finetune={best}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "patches.size=20",
            "patches.size: expected sides divisible by 8, as 4 levels need, found 20",
        ),
        ("data.data_set.root=nowhere", "nowhere"),
        ("data.data_set.modalities=[t1,t9]", "t9"),
        ("split.test=0.99", "split"),
        ("resume=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("finetune=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
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
    assert (done.stdout + done.stderr).count("sides divisible by 8") == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("trainer", "epochs"), [("debug", 1), ("overfit", 50)])
def test_trainers_for_finding_bugs(composed: Compose, tiny: list[str], trainer: str, epochs: int):
    short = [override for override in tiny if not override.startswith("trainer.max_epochs")]
    config = composed(*short, "logger=csv", f"trainer={trainer}")
    assert 0 <= train.train(config) <= 1
    assert Results.read(RunFolder(Path(config.run_dir))).epochs == epochs


class WorseEveryEpoch(pl.Callback):
    """Spoils the weights after the first epoch, so that the best checkpoint is not the last."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        if trainer.current_epoch > 0:
            for weight in pl_module.parameters():
                torch.nn.init.constant_(weight, -1)


def logged(folder: Path, score: str) -> list[float]:
    """All values of a score in the CSV of a run, in order."""
    rows = csv.DictReader((folder / "csv/version_0/metrics.csv").read_text().splitlines())
    return [float(row[score]) for row in rows if row.get(score)]


def test_validation_and_test_scores_are_of_the_same_weights(
    composed: Compose, tiny: list[str], bright_start: None
):
    config = composed(
        *tiny,
        "logger=csv",
        "trainer.max_epochs=3",
        "patches.epochs_per_validation=1",
        "+callbacks.worse._target_=tests.test_train.WorseEveryEpoch",
    )
    objective = train.train(config)
    metrics = Results.read(RunFolder(Path(config.run_dir))).metrics
    first, *others, last = logged(Path(config.run_dir), "val/dice")
    assert max(others) < first  # the last epoch's scores were those of spoilt weights
    assert metrics["val/dice"] == last == pytest.approx(first)
    assert objective == metrics["val/dice"]


def test_without_a_score_to_watch_the_last_weights_are_scored(
    composed: Compose, tiny: list[str], bright_start: None
):
    config = composed(
        *tiny,
        "logger=csv",
        "trainer.max_epochs=2",
        "patches.epochs_per_validation=1",
        "callbacks.best.monitor=null",
        "+callbacks.worse._target_=tests.test_train.WorseEveryEpoch",
    )
    train.train(config)
    metrics = Results.read(RunFolder(Path(config.run_dir))).metrics
    first, last, tested = logged(Path(config.run_dir), "val/dice")
    assert metrics["val/dice"] == tested == pytest.approx(last)
    assert last < first


@pytest.fixture
def bright_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks predict tumour everywhere at the start, so that the first epoch has a score."""
    from lightning_modules.segmentation import SegmentationModule

    def everything(self: SegmentationModule, image: torch.Tensor) -> torch.Tensor:
        spoilt = any(bool((weight == -1).all()) for weight in self.parameters())
        return (image[:, :3] != 0).float() * (-10 if spoilt else 10) - 5

    monkeypatch.setattr(SegmentationModule, "logits", everything)


@pytest.mark.parametrize(
    ("without", "parts"), [(["test"], {"val"}), (["validation"], {"test"}), (PARTS[1:], set())]
)
def test_a_part_without_cases_is_left_out(
    composed: Compose, tiny: list[str], without: list[str], parts: set[str], caplog: Any
):
    config = composed(*tiny, "logger=csv", *(f"split.{part}=0" for part in without))
    score = train.train(config)
    run = RunFolder(Path(config.run_dir))
    stages = {name.split("/")[0] for name in Results.read(run).metrics}
    assert stages & {"val", "test"} == parts
    assert all(run.split()[part] == [] for part in without)
    assert run.best.is_file()
    assert run.cases_file.is_file() == ("test" in parts)
    assert math.isnan(score) == ("val" not in parts)
    assert ("objective: there is no val/dice" in caplog.text) == ("val" not in parts)


def test_the_objective_is_a_score_of_validation(composed: Compose, tiny: list[str]):
    assert composed(*tiny).objective == "val/dice"
    assert composed("model=dnet").objective.startswith("val/")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_checkpoint_that_has_seen_test_cases_is_refused(
    composed: Compose, tiny: list[str], brats: Path, tmp_path: Path, part: str
):
    first = composed(*tiny, "logger=csv", f"run_dir={tmp_path}/first")
    train.train(first)
    names = RunFolder(tmp_path / "first").split()
    swapped = {**names, part: names["test"][:1], "test": names[part][:1]}
    go_on = f"resume={tmp_path}/first/last.ckpt"
    with pytest.raises(
        InputError, match=rf"last.ckpt: expected .*, found 1 of 1 .*{part}"
    ) as error:
        train.train(resumed(composed, tiny, tmp_path / "second", swapped, go_on))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "second/csv").exists()

    # Under another name it is still the same patient.
    renamed = tmp_path / "renamed"
    for path in brats.glob("*/*.nii.gz"):
        (renamed / f"new_{path.parent.name}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed / f"new_{path.parent.name}" / f"new_{path.name}")
    swapped = {key: [f"new_{name}" for name in cases] for key, cases in swapped.items()}
    with pytest.raises(InputError, match=rf"the first is new_{names[part][0]}, its {part} case "):
        train.train(
            resumed(
                composed, tiny, tmp_path / "third", swapped, go_on, f"data.data_set.root={renamed}"
            )
        )

    # The cases of the first run stay those of a run that continues from it with others.
    kept = {**names, "train": names["train"][:1]}
    train.train(resumed(composed, tiny, tmp_path / "fourth", kept, go_on, "trainer.max_epochs=2"))
    seen = checkpoint.read(tmp_path / "fourth/last.ckpt")["seen"]
    assert set(seen["train"].values()) == set(names["train"])
    assert set(seen["validation"].values()) == set(names["validation"])


def resumed(
    composed: Compose, tiny: list[str], folder: Path, split: dict[str, list[str]], *overrides: str
) -> DictConfig:
    """A run with a split of its own."""
    write_json(folder.with_suffix(".json"), split)
    options = [option for option in tiny if not option.startswith(("split.", "run_dir"))]
    split_options = ["split=file", f"split.path={folder}.json", f"run_dir={folder}"]
    return composed(*options, *split_options, "logger=csv", *overrides)


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


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(
    composed: Compose, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    common = [*tiny, "logger=csv", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1"]
    more = [*common, f"run_dir={tmp_path}/run"]
    with pytest.raises(ConnectionAbortedError):
        train.train(composed(*more, "+callbacks.stop._target_=tests.test_train.StopAtEpoch"))
    last = tmp_path / "run/last.ckpt"
    last.write_bytes(last.read_bytes()[:50_000])
    train.train(composed(*more))
    assert f"{last}: not a readable checkpoint" in caplog.text
    train.train(composed(*common, f"run_dir={tmp_path}/whole"))
    expected = weights_of(tmp_path / "whole/last.ckpt")
    for name, tensor in weights_of(last).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_new_start_that_is_killed_leaves_no_result_of_the_old(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    common = [*tiny, "logger=csv", "trainer.max_epochs=2"]
    train.train(composed(*common))
    results = (tmp_path / "run/results.json").read_text()
    with pytest.raises(InputError, match=r"model\.depth"):  # refused before anything is lost
        train.train(
            composed(*common, "again=true", "model.depth=3", f"resume={tmp_path}/run/last.ckpt")
        )
    assert (tmp_path / "run/results.json").read_text() == results
    with pytest.raises(ConnectionAbortedError):
        train.train(
            composed(*common, "again=true", "+callbacks.stop._target_=tests.test_train.StopAtEpoch")
        )
    assert not (tmp_path / "run/results.json").exists()
    train.train(composed(*common))
    before, after = json.loads(results), json.loads((tmp_path / "run/results.json").read_text())
    assert after["metrics"] == before["metrics"]


def test_half_a_checkpoint_never_takes_the_place_of_a_whole_one(
    composed: Compose, tiny: list[str], tmp_path: Path
):
    """Killed at any moment of saving, to a folder on another file system than the temporary one."""
    other = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=other if other.is_dir() else tmp_path))
    try:
        overrides = [o for o in tiny if not o.startswith("run_dir")]
        common = [*overrides, "logger=csv", f"hydra.run.dir={folder}", "trainer.max_epochs=40"]
        last = folder / "last.ckpt"
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "train.py", *common], cwd=ROOT, stdout=subprocess.DEVNULL
            )
            while process.poll() is None:
                if last.exists() and list(folder.glob(f"{PREFIX}*last.ckpt")):
                    process.kill()  # while it saves again
                time.sleep(0.001)
            assert process.wait() == -signal.SIGKILL
            checkpoint.read(last)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("limit", "file"), [(2**15, "data/cache/"), (2**20, ".ckpt")], ids=["cache", "checkpoint"]
)
def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(
    composed: Compose, tiny: list[str], tmp_path: Path, limit: int, file: str
):
    """The limit is on the size of a file instead: a disk of a few kB takes root to make."""
    overrides = [o for o in tiny if not o.startswith(("run_dir", "data.cache.root"))]
    overrides += ["logger=csv", f"data.cache.root={tmp_path}/data/cache"]
    done = subprocess.run(
        [sys.executable, "train.py", *overrides, f"hydra.run.dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "no room on the disk" in line)
    assert file in line
    train.train(composed(*overrides, f"run_dir={tmp_path}/run"))
    train.train(composed(*overrides, f"run_dir={tmp_path}/whole"))
    for name, tensor in weights_of(tmp_path / "run/last.ckpt").items():
        assert torch.equal(tensor, weights_of(tmp_path / "whole/last.ckpt")[name]), name
