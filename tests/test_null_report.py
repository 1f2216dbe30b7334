"""Sweeps over factors: their cells and plan, what survives a kill, and the report of them."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from lightning_modules.cost import Cost
from lightning_modules.results import Results, claimed, is_finished
from PIL import Image

from errors import InputError
from experiments import dashboard, null_report
from hydra_plugins.one_factor_sweeper import add_to_plan, cells
from lightning_modules.callbacks import SeedEveryStep
from lightning_modules.networks import AEUNet
from tests.conftest import ROOT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
COST = Cost(parameters=1000, widths=[8, 16], gflops=1.5, memory_mib=20.0)


def write_run(folder: Path, scores: np.ndarray, shift: float = 0.0) -> None:
    """A finished run whose Dice of every region is `scores` (cases,) plus a shift."""
    folder.mkdir(parents=True)
    rows = [
        {"case": f"case_{number}", **{f"dice_{r}": value + shift for r in ("WT", "TC", "ET")}}
        for number, value in enumerate(scores)
    ]
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for version, epochs in enumerate(((0, 1), (1, 2))):  # stopped and resumed after epoch 0
        path = folder / f"csv/version_{version}/metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(
            "epoch,step,val/dice\n" + "".join(f"{e},{e},{(e + version) / 10}\n" for e in epochs)
        )
    Results(
        run=folder.name,
        choices={},
        metrics={},
        cost=COST,
        epochs=3,
        checkpoint="best.ckpt",
        fit_s=60.0,
        test_s=6.0,
        peak_memory_mib=500.0,
        device="cpu",
    ).write(folder)


LEVELS = {("baseline", "baseline"): 0.0, ("norm", "batch"): 0.0, ("depth", "2"): -0.2}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of a baseline, of a level that changes nothing and of one that cripples."""
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.6, 0.8, 12)
    planned = []
    for (factor, level), shift in LEVELS.items():
        for seed in range(3):
            run = f"{factor}-{level}-s{seed}"
            planned.append({"run": run, "seed": seed, "factor": factor, "level": level})
            noise = rng.normal(0, 0.004, 12) + rng.normal(0, 0.002)
            write_run(tmp_path / run, difficulty + noise, shift)
    plan = {
        "stated": "2020-01-01T00:00:00+00:00",
        "report": {"margin": {"WT": 0.02, "TC": 0.02, "ET": 0.02}, "alpha": 0.05},
        "commands": ["python train.py experiment=norm", "python train.py experiment=depth"],
        "cells": planned,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_cells_differ_from_the_baseline_in_one_factor():
    levels = {"experiment": ["norm"], "norm": ["group", "batch"], "model.depth": ["4", "3", "5"]}
    common = {"experiment": "norm"}
    baseline = {**common, "norm": "group", "model.depth": "4"}
    assert list(cells(levels)) == [
        {**baseline, "cell.factor": "baseline", "cell.level": "baseline"},
        {**baseline, "norm": "batch", "cell.factor": "norm", "cell.level": "'batch'"},
        {**baseline, "model.depth": "3", "cell.factor": "model.depth", "cell.level": "'3'"},
        {**baseline, "model.depth": "5", "cell.factor": "model.depth", "cell.level": "'5'"},
    ]


def plan_of(*runs: tuple[str, str], margin: float = 0.02, command: str = "a") -> dict:
    return {
        "stated": command,
        "report": {"margin": {"WT": margin}},
        "commands": [command],
        "cells": [{"run": run, "seed": 0, "factor": f, "level": f} for run, f in runs],
    }


def test_sweeps_with_one_baseline_share_a_plan(tmp_path: Path):
    path = tmp_path / "sweep/plan.json"
    add_to_plan(path, plan_of(("base", "baseline"), ("b", "norm")))
    add_to_plan(path, plan_of(("base", "baseline"), ("c", "depth"), command="second"))
    plan = json.loads(path.read_text())
    assert [cell["run"] for cell in plan["cells"]] == ["base", "b", "c"]
    assert plan["stated"] == "a"
    assert plan["commands"] == ["a", "second"]
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


def test_a_run_is_claimed_by_one_process_until_that_dies(tmp_path: Path):
    folder = tmp_path / "run"
    with claimed(folder) as mine:
        assert mine
        with claimed(folder) as again:
            assert not again
    (lock,) = folder.iterdir()
    hold = f"import filelock as f; l = f.FileLock({str(lock)!r}); l.acquire(); print(1); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        with claimed(folder) as mine:
            assert not mine
        other.kill()
    with claimed(folder) as mine:
        assert mine


def test_verdicts_of_a_planted_effect_and_of_none(sweep: Path):
    found = null_report.compare_all(null_report.read_sweep(sweep))
    assert len(found) == 6
    for region in ("WT", "TC", "ET"):
        crippled = found["depth", "2", region]
        assert crippled.verdict == "different"
        assert crippled.difference == pytest.approx(-0.2, abs=0.01)
        assert crippled.low < -0.2 < crippled.high
        assert found["norm", "batch", region].verdict == "equivalent"


def test_report_of_a_whole_sweep(sweep: Path):
    page = null_report.write_report(sweep)
    output = sweep / "report"
    assert page == output / "null_report.html"
    text = (output / "null_report.md").read_text()
    assert "6 comparisons with the baseline: 3 different, 3 equivalent, 0 undecided." in text
    assert "9 of 9 runs are finished; 12 test cases" in text
    with (output / "null_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["factor"], row["region"]) for row in rows[:3]] == [
        ("norm", "WT"),
        ("norm", "TC"),
        ("norm", "ET"),
    ]
    html = page.read_text()
    assert html.count('class="verdict different"') == 3
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(", html.replace("url(#", ""))
    targets = re.findall(r'href="([^"]*)"', html)
    assert sum(target.startswith("..") for target in targets) == 9
    for target in targets:  # its own symbols, and the folders of the runs
        assert target.startswith("#") or (output / target / "results.json").is_file()


def test_report_of_a_half_done_sweep(sweep: Path):
    for run in ("depth-2-s0", "depth-2-s1", "depth-2-s2", "norm-batch-s2"):
        (sweep / run / "results.json").unlink()
    null_report.write_report(sweep)
    text = (sweep / "report/null_report.md").read_text()
    assert "5 of 9 runs are finished" in text
    for line in (
        "- depth=2 seed=0 (depth-2-s0)",
        "- norm=batch seed=2 (",
        "python train.py experiment=depth",
    ):
        assert line in text
    found = null_report.compare_all(null_report.read_sweep(sweep))
    assert found["norm", "batch", "WT"].level_seeds == 2
    # Planned, so of the family, although there is no run of it yet.
    assert found["depth", "2", "WT"].level_seeds == 0
    assert found["depth", "2", "WT"].verdict == "undecided"


def test_one_seed_decides_nothing(sweep: Path):
    for run in sweep.glob("*-s[12]/results.json"):
        run.unlink()
    null_report.write_report(sweep)
    found = null_report.compare_all(null_report.read_sweep(sweep))
    assert {comparison.verdict for comparison in found.values()} == {"undecided"}
    assert all(math.isnan(comparison.low) for comparison in found.values())


def test_a_baseline_alone_is_a_report(sweep: Path):
    for run in sweep.glob("[nd]*-s*/results.json"):
        run.unlink()
    null_report.write_report(sweep)
    assert (
        "6 comparisons with the baseline: 0 different, 0 equivalent, 6 undecided"
        in (sweep / "report/null_report.md").read_text()
    )


def test_learning_curve_of_a_resumed_run(sweep: Path):
    assert null_report.read_curve(sweep / "norm-batch-s0").tolist() == [
        [0, 0.0],
        [1, 0.2],
        [2, 0.3],
    ]


def test_other_test_cases_are_refused(sweep: Path):
    path = sweep / "norm-batch-s1/cases.csv"
    path.write_text(path.read_text().replace("case_3", "case_99"))
    with pytest.raises(InputError, match=r"norm-batch-s1: tested on other cases than"):
        null_report.read_sweep(sweep)


def test_what_is_no_sweep_is_one_line(tmp_path: Path, sweep: Path, capsys: pytest.CaptureFixture):
    assert null_report.main([str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "plan.json: not found" in error
    for run in sweep.glob("baseline*/results.json"):
        run.unlink()
    assert null_report.main([str(sweep)]) == 1
    assert "the baseline has no finished run yet" in capsys.readouterr().err


def test_cells_show_unequal_budgets(sweep: Path):
    run = sweep / "depth-2-s0"
    results = Results.read(run)
    assert results.cost == COST
    replace(results, cost=replace(COST, parameters=7)).write(run)
    rows = null_report.cell_rows(null_report.read_sweep(sweep))
    assert [row["parameters"] for row in rows] == ["1,000", "1,000", "7"]


@pytest.fixture
def run_sweep(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[Callable[[], None]]]]:
    """`python train.py ...` in this process; returns its exit code and what it does at its end."""

    def run(folder: Path, *arguments: str) -> tuple[int, list[Callable[[], None]]]:
        ours = [o for o in tiny if not o.startswith(("run_dir", "trainer.max_epochs"))]
        words = ["train.py", *arguments, *ours, "logger=csv", f"hydra.sweep.dir={folder}"]
        at_exit: list[Callable[[], None]] = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            register = SimpleNamespace(register=lambda f, *a: at_exit.append(partial(f, *a)))
            patch.setattr(null_report, "atexit", register)
            patch.chdir(ROOT)
            try:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            except SystemExit as stop:
                return int(stop.code or 0), at_exit
        return 0, at_exit

    return run


class PowerCutError(Exception):
    """A machine that dies."""


def test_a_killed_sweep_ends_with_the_same_table(
    run_sweep: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["experiment=norm", "seed=0,1", "trainer.max_epochs=2"]
    code, at_exit = run_sweep(tmp_path / "whole", *arguments)
    assert code == 0
    (write,) = at_exit
    write()

    start_step = SeedEveryStep.on_train_batch_start
    trained = []

    def die(self, trainer, module, batch, batch_idx):
        trained.append(trainer.default_root_dir)
        if trainer.current_epoch == 1 and "batch-s0" in trainer.default_root_dir:
            raise PowerCutError("power is out")
        start_step(self, trainer, module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SeedEveryStep, "on_train_batch_start", die)
        code, at_exit = run_sweep(tmp_path / "killed", *arguments)
    assert code == 1
    at_exit[0]()  # the report comes in spite of it
    text = (tmp_path / "killed/report/null_report.md").read_text()
    assert "3 of 4 runs are finished" in text
    (missing,) = [run for run in (tmp_path / "killed").glob("aeunet-*") if not is_finished(run)]
    assert f"- norm=batch seed=0 ({missing.name})" in text
    assert "PowerCutError: power is out" in (missing / "train.log").read_text()

    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            SeedEveryStep,
            "on_train_batch_start",
            lambda self, trainer, *rest: (
                trained.append((trainer.default_root_dir, trainer.current_epoch)),
                start_step(self, trainer, *rest),
            )[1],
        )
        code, at_exit = run_sweep(tmp_path / "killed", *arguments)
    assert code == 0
    assert set(trained) == {(str(missing), 1)}  # nothing else, and not its first epoch
    at_exit[0]()
    for name in ("null_report.csv", "forest.png"):
        whole, killed = (tmp_path / s / "report" / name for s in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name


def test_single_factors_and_the_null_report_share_their_runs(composed: Callable):
    """The same cell has the same name, so that the baseline is trained once."""

    def run_of(*overrides: str) -> str:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        return f"{config.hydra.sweep.dir}/{config.hydra.sweep.subdir}"

    tags = ["cell.factor=norm", "cell.level=batch"]
    runs = {run_of(f"experiment={e}", "norm=batch") for e in ("norm", "null_report", "depth")}
    assert runs == {run_of("experiment=norm", "norm=batch", *tags)}


def test_the_null_report_has_the_axes_of_the_paper(composed: Callable):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["experiment=null_report"], return_hydra_config=True)
    assert dict(config.hydra.sweeper.params) == {
        "seed": "0,1,2",
        "downsampling": "stride,avg,max",
        "filters.ratio": "2,1.5,2.5,3",
        "model.bottleneck": "128,32,64,256,512",
        "model.depth": "4,3,5",
        "norm": "group,batch",
        "activation": "leaky_relu,relu",
        "region_weights": "equal,whole,enhancing",
        "inputs": "modalities,similarity,mirrored,both",
    }


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome found")
def test_the_page_opens_in_a_browser(sweep: Path):
    page = null_report.write_report(sweep)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    picture = sweep / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
    # The verdicts' colours: the style was applied, the figure drawn.
    assert {(0xD1, 0x49, 0x5B), (0x2A, 0x9D, 0x8F)} <= colours


def test_cost_is_that_of_a_real_step():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4, norm=torch.nn.BatchNorm3d)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    cost = Cost.of(network, batch_size=2, channels=4, patch_size=16)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    assert cost.widths == [8, 16, 32, 64]
    weights = {w.data_ptr() for w in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(2, 4, 16, 16, 16))
    kept_bytes = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)
    assert cost.memory_mib == pytest.approx((kept_bytes + 16 * cost.parameters) / 2**20, rel=0.01)


def test_flops_by_hand():
    network = torch.nn.Sequential(torch.nn.Conv3d(4, 8, 3, padding=1, bias=False))
    network.widths = [8]
    cost = Cost.of(network, batch_size=2, channels=4, patch_size=(8, 8, 4))
    assert cost.gflops == pytest.approx(2 * 27 * 4 * 8 * 8 * 8 * 4 / 1e9)
    assert cost.parameters == 27 * 4 * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces under Pydantic 2
def test_the_dashboard_groups_runs_by_factor_and_level(capsys: pytest.CaptureFixture):
    pytest.importorskip("wandb_workspaces", reason="its extra is missing")
    assert dashboard.main(["me", "null_report", "--dry-run"]) == 0
    section = json.loads(capsys.readouterr().out)["spec"]["section"]
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["cell.value.factor", "cell.value.level"]
    assert runs["filters"]["filters"][0]["value"] == "null_report"
    names = [part["name"] for part in section["panelBankConfig"]["sections"]]
    assert names[:2] == ["Scores", "Learning curves"]
