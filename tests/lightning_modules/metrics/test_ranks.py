"""Metrics over two processes: both know what one would, also where one of them has no case.

In one file, for two processes that start once: each takes half a minute to import what it needs.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.metrics import LesionMetrics, RegionMetrics
from lightning_modules.networks.dnet import Geometry

RANKS = 2
CASES = {"some for each": 5, "none for one": 1}


def case(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and truth; 0, all that there is for one of the tests, has no lesion."""
    rng = np.random.default_rng(index)
    truth = (rng.random((1, 1, 8, 8, 8)) < 0.02) & (index not in (0, 2))
    return torch.from_numpy(rng.random((1, 1, 8, 8, 8), np.float32)), torch.from_numpy(truth)


def scored(indices: range) -> dict[str, np.ndarray]:
    """All that the metrics give of these cases, and of those of all other ranks."""
    lesions, regions = LesionMetrics(Geometry(0, 1)), RegionMetrics(["WT"])
    for index in indices:
        probability, truth = case(index)
        number, outside = torch.tensor([index]), torch.zeros(1, 1, dtype=torch.int64)
        lesions.update(probability, truth, number)
        regions.update(probability > 0.5, truth, outside, number)
    return {**lesions.compute()._asdict(), "dice": regions.compute()["dice"].numpy()}


def rank(number: int, folder: str) -> None:
    """One of the processes: scores its share of the cases, saves what all know then."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=RANKS
    )
    for name, cases in CASES.items():
        np.savez(f"{folder}/{name} {number}.npz", **scored(range(number, cases, RANKS)))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank, (str(folder),), nprocs=RANKS)  # pyright: ignore
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_know_what_one_does(folder: Path, name: str):
    expected = scored(range(CASES[name]))
    assert (len(expected["lesions"]) > 10) == (CASES[name] == 5)
    for number in range(RANKS):
        found = np.load(folder / f"{name} {number}.npz")
        assert set(found) == set(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)
