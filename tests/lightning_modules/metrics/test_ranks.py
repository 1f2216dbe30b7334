"""Metrics over two processes: each knows what one process would, even if it has seen no case.

All of it is in one test file, whose processes start once: each needs half a minute for its imports.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.metrics import LesionMetrics, RegionMetrics
from lightning_modules.networks.geometry import Geometry

RANKS = 2
CASES = {"some for each": 5, "none for one": 1}


def case(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Probabilities and batch of a case; cases 0 and 2 have no lesion."""
    rng = np.random.default_rng(index)
    truth = (rng.random((1, 1, 8, 8, 8)) < 0.02) & (index not in (0, 2))
    batch = {
        "mask": torch.from_numpy(truth),
        "outside": torch.zeros(1, 1, dtype=torch.int64),
        "index": torch.tensor([index]),
    }
    return torch.from_numpy(rng.random((1, 1, 8, 8, 8), np.float32)), batch


def scored(indices: range) -> dict[str, Any]:
    """All that the metrics tell about these cases and those of all other ranks."""
    metrics = {"lesions": LesionMetrics(Geometry(0, 1)), "regions": RegionMetrics(["WT"])}
    for index in indices:
        probability, batch = case(index)
        for metric in metrics.values():
            metric.update(probability, batch)
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        found[f"{name} rows"] = {str(index): row for index, row in metric.rows().items()}
        found[f"{name} scores"] = {key: float(value) for key, value in metric.compute().items()}
        found[f"{name} rows after scores"] = {
            str(index): row for index, row in metric.rows().items()
        }
        # Gathering must not leave the cases of other ranks behind, which would be counted again.
        assert len(metric.records) == len(indices)
    report = metrics["lesions"].report()
    found["report"] = {key: value.tolist() for key, value in report._asdict().items()}
    return found


def rank(number: int, folder: str) -> None:
    """In one of the processes: score its share of the cases, and save what it then knows of all."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS
    )
    for name, cases in CASES.items():
        found = scored(range(number, cases, RANKS))
        Path(folder, f"{name} {number}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank, (str(folder),), nprocs=RANKS)  # pyright: ignore
    return folder


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_two_processes_know_what_one_does(folder: Path, name: str):
    expected = scored(range(CASES[name]))
    assert (len(expected["report"]["lesions"]) > 10) == (CASES[name] == 5)
    assert len(expected["lesions rows"]) == len(expected["regions rows"]) == CASES[name]
    for number in range(RANKS):
        found = json.loads((folder / f"{name} {number}.json").read_text())
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert json.dumps(found[key]) == json.dumps(value), key  # NaN is NaN
