"""A number is averaged over the cases, whichever ranks have seen them."""

import pytest
import torch

from lightning_modules.metrics import MeanOverCases


def test_a_case_counts_once():
    mean = MeanOverCases()
    mean.update(torch.tensor(1.0), torch.tensor([3]))
    mean.update(torch.tensor(4.0), torch.tensor([0, 7]))
    mean.update(torch.tensor(1.0), torch.tensor([3]))  # as on a rank that began again
    assert float(mean.compute()) == pytest.approx(3)
    mean.reset()
    mean.update(torch.tensor(2.0), torch.tensor([1]))
    assert float(mean.compute()) == 2
