"""The table of what a sweep tried."""

from pathlib import Path

import pytest
import torch

from errors import InputError
from experiments.cost import Cost
from experiments.results import Results
from experiments.run import RunFolder, finished_runs
from experiments.trials import main, table

OBJECTIVE = "val/sensitivity"


def write_run(folder: Path, model: str, norm: str, rate: float, seed: int, score: float) -> None:
    run = RunFolder(folder / f"{model}-{norm}-{rate}-{seed}")
    run.path.mkdir(parents=True)
    choices = {"model": model, "norm": norm}
    config = {"choices": choices, "objective": OBJECTIVE, "optimizer": {"lr": rate}}
    config |= {"module": {}, "data": {}}
    torch.save({"config": config}, run.best)
    cost = Cost(parameters=1, widths=[8], gflops=2.0, memory_mib=3.0)
    metrics = {OBJECTIVE: score, "test/sensitivity": 1 - score}
    Results(run.path.name, choices, metrics, cost, 4, 5.0, 6.0, 7.0, "none").write(run)


@pytest.fixture
def trials(tmp_path: Path) -> Path:
    for seed, score in enumerate((0.5, 0.7)):
        write_run(tmp_path, "unet", "batch", 0.01, seed, score)
    write_run(tmp_path, "unet", "group", 0.01, 0, 0.65)
    write_run(tmp_path, "dnet", "batch", 0.001, 0, 0.3)
    write_run(tmp_path, "dnet", "batch", 0.01, 0, 0.4)
    return tmp_path


def test_the_best_of_each_model_stands_first_and_seeds_are_one_row(
    trials: Path, capsys: pytest.CaptureFixture[str]
):
    main([str(trials), "model", "norm", "optimizer.lr"])
    lines = (trials / "trials.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert (
        lines[0] == f"| model | norm | optimizer.lr | {OBJECTIVE} | runs | epochs | GFLOP a patch |"
    )
    assert lines[2:] == [
        "| dnet | batch | 0.01 | 0.400 | 1 | 4 | 2 |",
        "| dnet | batch | 0.001 | 0.300 | 1 | 4 | 2 |",
        "| unet | group | 0.01 | 0.650 | 1 | 4 | 2 |",
        "| unet | batch | 0.01 | 0.600 ± 0.141 | 2 | 4 | 2 |",
    ]


def test_what_a_run_does_not_have_is_one_line(trials: Path):
    with pytest.raises(InputError, match=r"dnet-batch-0.001-0: expected a group or a key .* lr$"):
        table(finished_runs(trials), ["model", "lr"])


def test_test_scores_choose_nothing(trials: Path):
    run = RunFolder(trials / "unet-group-0.01-0")
    content = torch.load(run.best, weights_only=True)
    torch.save({"config": content["config"] | {"objective": "test/sensitivity"}}, run.best)
    for runs, found in (([run], "test"), (finished_runs(trials), f"test/sensitivity, {OBJECTIVE}")):
        with pytest.raises(InputError, match=rf"a score of validation, found {found}"):
            table(runs, ["model"])
