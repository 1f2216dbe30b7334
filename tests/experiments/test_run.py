"""A run's folder: its name, its claim, its files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import InputError
from experiments.run import IDENTITY, NO_EFFECT, RunFolder, finished_runs, identity
from tests.conftest import ROOT


def name(*overrides: str) -> str:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
    return Path(config.hydra.run.dir).name


def test_a_name_is_what_a_run_asks_however_it_is_typed():
    first = name("norm=batch", "seed=3")
    assert first.startswith("aeunet-batch-s3-")
    for same in (
        ["seed=3", "norm=batch"],
        ["norm=batch", "seed=3", "logger=csv"],
        ["norm=batch", "seed=3", "model=aeunet", "patches=aeunet_proxy", "trainer.max_epochs=9"],
        ["norm=batch", "seed=3", "filters.base=8", "objective=test/dice_WT", "again=true"],
    ):
        assert name(*same) == first, same


@pytest.mark.parametrize(
    "override",
    [
        "+trainer.enable_progress_bar=false",
        "callbacks.pictures.cases=1",
        "callbacks.slices.cases=0",
        "+data.cache.workers=1",
        "model.checkpointing=levels",
        "data.cache.root=elsewhere",
        "data.num_workers=2",
        "trainer.accelerator=cpu",
        "logger=csv",
        "~callbacks.learning_rate",
    ],
)
def test_what_changes_no_score_changes_no_name(override: str):
    assert name(override) == name()


def test_a_window_is_nothing_to_a_network_without_one():
    assert name("model=dnet", "+patches.window=48") == name("model=dnet")
    assert name("patches.window=32") != name()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "optimizer.lr=1e-5",
        "trainer.max_epochs=3",
        "trainer.precision=bf16-mixed",
        "trainer=debug",
        "+trainer.gradient_clip_val=1",
        "callbacks.best.monitor=val/dice_WT",
        "callbacks.early_stopping.patience=9",
        "data.data_set.count=65",
        "split.test=0.2",
        "loss=dice",
        "metrics.scores.threshold=0.4",
        "+callbacks.average._target_=pytorch_lightning.callbacks.StochasticWeightAveraging",
    ],
)
def test_what_changes_a_score_changes_the_name(override: str):
    assert name(override) != name()


def test_what_has_no_effect_is_part_of_the_configuration():
    """A key that was renamed would silently count again."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["model=dnet"], return_hydra_config=True)
    absent_by_default = {
        "data.cache.workers",
        "trainer.enable_checkpointing",
        "trainer.enable_progress_bar",
    }
    plain: Any = OmegaConf.to_container(config)
    for dotted in set(NO_EFFECT) - absent_by_default:
        node = plain
        for key in dotted.split("."):
            assert key in node, dotted
            node = node[key]
    # Those of the few runs that continue others or compile.
    assert set(identity(config)) == set(IDENTITY) - {"resume", "finetune", "compile"}


def test_compiling_rounds_differently_and_has_a_name_of_its_own():
    assert name("compile=true") != name()
    assert name("compile=false") == name()


HOLD = """
import sys
from pathlib import Path
from experiments.run import RunFolder

with RunFolder(Path(sys.argv[1])).claimed() as mine:
    print(mine, flush=True)
    input()
"""


@pytest.mark.process
def test_the_claim_of_a_killed_process_ends(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with folder.claimed() as mine:
            assert not mine
        other.kill()
    with folder.claimed() as mine:
        assert mine


def test_finished_runs_of_a_folder(tmp_path: Path):
    for run in ("b", "a", "unfinished"):
        (tmp_path / run).mkdir()
    for run in ("b", "a"):
        (tmp_path / run / "results.json").write_text("{}")
    assert [run.path.name for run in finished_runs(tmp_path)] == ["a", "b"]
    assert [run.path.name for run in finished_runs(tmp_path / "a")] == ["a"]
    with pytest.raises(InputError, match="unfinished: expected a finished run"):
        finished_runs(tmp_path / "unfinished")
    with pytest.raises(InputError, match="nowhere: expected a finished run"):
        finished_runs(tmp_path / "nowhere")


def test_a_run_that_starts_from_a_checkpoint_has_a_name_of_its_own(tmp_path: Path):
    for file, content in (("a.ckpt", b"a"), ("same.ckpt", b"a"), ("b.ckpt", b"b")):
        (tmp_path / file).write_bytes(content)
    names = [name(f"resume={tmp_path}/{file}.ckpt") for file in ("a", "same", "b")]
    assert names[0] == names[1]  # its content counts
    assert len({name(), *names}) == 3


def test_a_checkpoint_that_is_not_there_is_refused_whatever_the_run_has(tmp_path: Path):
    with pytest.raises(OmegaConfBaseException, match=r"resume: .*nowhere.ckpt: No such file"):
        name(f"resume={tmp_path}/nowhere.ckpt")
