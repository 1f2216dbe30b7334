"""Two processes train as one does with batches of twice the size, and leave one run behind."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig

import train
from errors import InputError
from experiments.ranks import VARIABLES, describe_this_run, end_with_parent
from experiments.results import Results
from experiments.run import RunFolder
from lightning_modules import checkpoint
from tests.conftest import ROOT

Compose = Callable[..., DictConfig]

pytestmark = [
    pytest.mark.process,
    # Python 3.12 and later; the tests have one thread that computes.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def common(tiny: list[str]) -> list[str]:
    """Overrides of a run of three epochs, with three cases to validate on and one to test.

    Neither goes into two processes. Without the reconstruction, the noise in the bottleneck, which
    each process draws for itself, has no effect.
    """
    options = [option for option in tiny if not option.startswith(("run_dir", "split."))]
    split = ["split.validation=0.5", "split.test=0.17", "split.seed=3"]
    return [
        *options, *split, "logger=csv", "loss.l2_weight=0", "patches.per_epoch=8",
        "trainer.max_epochs=3", "patches.epochs_per_validation=1", "filters.base=8",
        "model.depth=2",
    ]  # fmt: skip


def in_two_processes(work: Callable[[], object]) -> list[int]:
    """Do the same in two processes, as ranks 0 and 1; return their exit codes.

    They are forked, so that nothing is imported again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        process = os.fork()
        if process == 0:
            values = (str(rank), "0", "2", "127.0.0.1", str(port))
            os.environ.update(zip(VARIABLES, values, strict=True))
            rank_zero_only.rank = rank  # pyright: ignore[reportFunctionMemberAccess]
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(rank, repr(error), file=sys.stderr)
            finally:
                os._exit(1)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def logged(folder: RunFolder, name: str) -> list[float]:
    """All values of a metric in the CSV files of a run."""
    rows = [
        row
        for file in folder.metrics_files
        for row in csv.DictReader(file.read_text().splitlines())
    ]
    return [float(row[name]) for row in rows if row.get(name)]


class CheckBalance(pl.Callback):
    """Refuses a batch of two patches of which the second one has no lesion."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        _, drawn_around_a_lesion = batch["mask"]
        assert drawn_around_a_lesion.any()


def test_two_processes_are_one_with_batches_of_twice_the_size(
    composed: Compose, common: list[str], tmp_path: Path
):
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    train.train(composed(*common, "patches.batch_size=4", f"run_dir={one.path}"))

    both = [*common, "patches.batch_size=2", "trainer.devices=2", f"run_dir={two.path}"]
    both += ["+callbacks.balance._target_=tests.test_several_devices.CheckBalance"]
    killed = composed(
        *both,
        "+callbacks.kill._target_=tests.test_kills.KillAt",
        "+callbacks.kill.moment=on_train_batch_end",
        "+callbacks.kill.epoch=1",
    )
    assert in_two_processes(lambda: train.train(killed)) == [-signal.SIGKILL] * 2
    assert not two.is_finished
    resumed = composed(*both)
    assert in_two_processes(lambda: train.train(resumed)) == [0, 0]

    expected, found = Results.read(one), Results.read(two)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)
    assert found.epochs == 3
    for name in ("train/loss_epoch", "val/loss"):
        values = logged(one, name)
        assert logged(two, name)[-len(values) + 1 :] == pytest.approx(values[1:], abs=1e-5)
    for name, tensor in checkpoint.read(one.last)["state_dict"].items():
        other = checkpoint.read(two.last)["state_dict"][name]
        torch.testing.assert_close(other, tensor, atol=1e-4, rtol=1e-3)

    for folder in (one, two):
        assert len(folder.split()["validation"]) == 3
        with folder.cases_file.open() as file:
            assert [row["case"] for row in csv.DictReader(file)] == folder.split()["test"]
        assert sorted(path.stem for path in folder.pictures.iterdir()) == folder.split()["test"]
    assert len(two.metrics_files) == 2  # one for each start
    written = {path.name for path in two.path.iterdir()} - {"csv"}
    assert written == {path.name for path in one.path.iterdir()} - {"csv"}


def test_a_process_ends_with_the_one_that_started_it():
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            os.environ["LOCAL_RANK"] = "1"
            end_with_parent()
            os.write(write, b"ready")
            time.sleep(60)
        os.read(read, 5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(write)
    assert os.read(read, 5) == b""  # nobody can write any more: the other process has ended


def test_a_launcher_whose_processes_cannot_start_others_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
):
    composed()
    monkeypatch.setattr(sys, "argv", ["site-packages/submitit/core/_submit.py", "folder"])
    with pytest.raises(InputError, match=r"expected 1 with hydra/launcher=basic, whose"):
        describe_this_run()


def test_each_run_of_a_sweep_starts_its_own_processes(common: list[str], tmp_path: Path):
    """The first run fails in all its processes; the second is none the worse for it."""
    done = subprocess.run(
        [
            sys.executable, "train.py", "-m", "optimizer.lr=1e30,1e-3", *common,
            "patches.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp",
            f"hydra.sweep.dir={tmp_path}/sweep", "trainer.max_epochs=2", "logger=wandb",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "not finite at step" in done.stdout
    assert "Starting with 2 processes" in done.stdout
    (finished,) = (tmp_path / "sweep").glob("*/results.json")
    assert json.loads(finished.read_text())["epochs"] == 2
    assert done.stdout.count(f"Run {finished.parent.name}") == 1  # one summary
    for run in finished.parents[1].glob("aeunet-*"):
        assert [path.name for path in run.glob("*.log")] == ["train.log"]
        assert len([*run.glob("wandb/offline-run-*")]) == 1
    commands = [
        path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if os.access(path, os.R_OK)
    ]
    assert not any(str(tmp_path).encode() in command for command in commands)
