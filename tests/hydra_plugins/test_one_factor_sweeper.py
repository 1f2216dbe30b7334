"""The cells and the plan of a sweep over factors."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from experiments.benchmarks import error_rates
from experiments.jobs import composed_jobs
from hydra_plugins.one_factor_sweeper import add_to_plan, cells, looks_of, only
from tests.conftest import ROOT


def composed_with_hydra(*overrides: str) -> DictConfig:
    """Compose the configuration with its node `hydra`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.fixture
def null_report() -> DictConfig:
    return composed_with_hydra("experiment=null_report")


def test_cells_differ_from_the_baseline_in_one_factor():
    levels = {"logger": ["csv"], "norm": ["group", "batch"], "model.depth": ["4", "3", "5"]}
    baseline = {"logger": "csv", "norm": "group", "model.depth": "4"}
    assert list(cells(levels)) == [
        {**baseline, "cell.factor": "baseline", "cell.level": "baseline"},
        {**baseline, "norm": "batch", "cell.factor": "norm", "cell.level": "'batch'"},
        {**baseline, "model.depth": "3", "cell.factor": "model.depth", "cell.level": "'3'"},
        {**baseline, "model.depth": "5", "cell.factor": "model.depth", "cell.level": "'5'"},
    ]


def test_named_factors_leave_the_others_at_the_baseline():
    """The cells are those that the whole sweep has for these factors, and no others."""
    levels = {
        "norm": ["group", "batch"],
        "model.depth": ["4", "3", "5"],
        "activation": ["leaky_relu", "relu"],
    }
    named = list(cells(only(["norm", "model.depth"], levels)))
    factors = ("baseline", "norm", "model.depth")
    assert named == [cell for cell in cells(levels) if cell["cell.factor"] in factors]
    assert {cell["activation"] for cell in named} == {"leaky_relu"}
    assert only(None, levels) == levels
    with pytest.raises(CompactHydraException, match=r"factors: expected some of norm, .* depth$"):
        list(only(["norm", "depth"], levels))


def test_factors_are_named_by_their_keys(null_report: DictConfig):
    """What the plan, the report and `factors=` call a factor is its key on the command line."""
    params = null_report.hydra.sweeper.params
    levels = {key: values.split(",") for key, values in params.items() if key != "seed"}
    assert {cell["cell.factor"] for cell in cells(levels)} == {"baseline", *levels}


@pytest.mark.process
@pytest.mark.parametrize("factors", ["depth", "norm,depth"])
def test_an_unknown_factor_is_one_line(tmp_path: Path, factors: str):
    command = ["train.py", "experiment=null_report", f"factors={factors}"]
    command += ["logger=csv", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "factors: expected some of downsampling, filters.ratio, model.bottleneck" in line
    assert line.endswith("found depth")
    assert not (tmp_path / "sweep").exists()


def test_error_rates_are_simulated_for_the_null_report(null_report: DictConfig):
    assert null_report.hydra.sweeper.params.seed == f"range(0,{error_rates.LOOKS[-1]})"
    assert tuple(null_report.report.looks) == error_rates.LOOKS[:-1]
    assert tuple(null_report.report.margin.values()) == error_rates.MARGINS
    assert null_report.report.alpha == error_rates.ALPHA


def test_the_null_report_has_the_axes_of_the_paper(null_report: DictConfig):
    assert dict(null_report.hydra.sweeper.params) == {
        "seed": "range(0,8)",
        "downsampling": "stride,avg,max",
        "filters.ratio": "2,1.5,2.5,3",
        "model.bottleneck": "128,32,64,256,512",
        "model.depth": "4,3,5",
        "norm": "group,batch",
        "activation": "leaky_relu,relu",
        "region_weights": "equal,whole,enhancing",
        "inputs": "modalities,similarity,mirrored,both",
        "equal_compute": "none,ratio_1.5,ratio_2.5,ratio_3,depth_3,depth_5",
    }
    first_view = null_report.factors.split(",")
    assert [*first_view, "equal_compute"] == list(null_report.hydra.sweeper.params)[1:]


@pytest.mark.parametrize(
    ("named", "cells_of_a_seed"), [([], 19), (["factors=equal_compute"], 6), (["factors=norm"], 2)]
)
def test_the_factors_are_those_of_the_experiment_or_of_the_command_line(
    named: list[str], cells_of_a_seed: int
):
    jobs = composed_jobs(["experiment=null_report", "seed=0", *named], ROOT / "conf")
    assert len(jobs) == cells_of_a_seed


def test_the_place_of_a_cell_in_a_sweep_does_not_change_the_name_of_its_run(
    monkeypatch: pytest.MonkeyPatch,
):
    """So sweeps over other factors share their runs, and the baseline is trained once."""
    names = set()
    for cell in ([], ["cell.factor=norm", "cell.level=batch"], ["factors=norm"]):
        config = composed_with_hydra("experiment=null_report", "norm=batch", *cell)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", config)  # for `${hydra:...}`
        names.add(config.hydra.sweep.subdir)
    assert len(names) == 1


def plan_of(
    *runs: tuple[str, str],
    margin: float = 0.02,
    command: str = "first",
    seeds: tuple[int, ...] = (0,),
) -> dict:
    """Make a plan of runs, each with the factor that it varies."""
    return {
        "stated": command,
        "report": {"margin": {"WT": margin}, "reason": "raters", "alpha": 0.05},
        "seeds": list(seeds),
        "looks": looks_of(len(seeds), [], 0.05),
        "commands": [command],
        "cells": [{"run": run, "seed": 0, "factor": f, "level": f, "family": 0} for run, f in runs],
    }


def test_the_last_look_is_after_the_last_seed():
    """It spends what is left of the error rate; looks that are not reached are left out."""
    looks = looks_of(10, [12, 5], 0.04)
    assert [look["seeds"] for look in looks] == [5, 10]
    assert [look["alpha"] for look in looks] == pytest.approx([0.01, 0.03])
    assert looks_of(3, [5, 8], 0.05) == [{"seeds": 3, "alpha": 0.05}]


def test_a_plan_takes_no_seed_that_was_not_planned(tmp_path: Path):
    path = tmp_path / "plan.json"
    base, level = ("base", "baseline"), ("b", "norm")
    add_to_plan(path, plan_of(base, seeds=(0, 1, 2)))
    before = json.loads(path.read_text())
    with pytest.raises(CompactHydraException, match=r"seed expected some of \[0, 1, 2\].*\[3\]"):
        add_to_plan(path, plan_of(base, seeds=(2, 3)))
    assert json.loads(path.read_text()) == before
    add_to_plan(path, plan_of(base, level, seeds=(1, 0)))  # a part of them, as to share the work
    plan = json.loads(path.read_text())
    assert (plan["seeds"], plan["looks"]) == (before["seeds"], before["looks"])


def test_sweeps_with_one_baseline_share_a_plan(tmp_path: Path):
    path = tmp_path / "sweep/plan.json"
    add_to_plan(path, plan_of(("base", "baseline"), ("b", "norm")))
    add_to_plan(path, plan_of(("base", "baseline"), ("c", "model.depth"), command="second"))
    plan = json.loads(path.read_text())
    assert [cell["run"] for cell in plan["cells"]] == ["base", "b", "c"]
    assert [cell["family"] for cell in plan["cells"]] == [0, 0, 1]
    assert plan["stated"] == "first"
    assert plan["commands"] == ["first", "second"]
    assert {file.name for file in path.parent.iterdir()} == {"plan.json", ".plan.json.lock"}


def test_sweeps_that_start_together_lose_no_cell(tmp_path: Path):
    path = tmp_path / "plan.json"
    plans = [plan_of(("base", "baseline"), (f"run{n}", f"factor{n}")) for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(partial(add_to_plan, path), plans))
    runs = {cell["run"] for cell in json.loads(path.read_text())["cells"]}
    assert runs == {"base", *(f"run{n}" for n in range(40))}


def test_a_plan_takes_no_other_baseline_and_no_later_margin(tmp_path: Path):
    path = tmp_path / "plan.json"
    add_to_plan(path, plan_of(("base", "baseline")))
    before = path.read_text()
    with pytest.raises(CompactHydraException, match=r"baseline of seed 0 is base .* other here"):
        add_to_plan(path, plan_of(("other", "baseline")))
    with pytest.raises(CompactHydraException, match="what was stated before the runs stands"):
        add_to_plan(path, plan_of(("base", "baseline"), margin=0.5))
    assert path.read_text() == before
