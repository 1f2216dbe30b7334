"""The predicted cost of a network against a real training step, and against a sum by hand."""

import pytest
import torch

from experiments.cost import predict_cost
from lightning_modules.networks.aeunet import AEUNet


def test_cost_is_that_of_a_real_step():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4, norm=torch.nn.BatchNorm3d)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    cost = predict_cost(network, batch_size=2, channels=4, patch_size=16)
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
    cost = predict_cost(network, batch_size=2, channels=4, patch_size=(8, 8, 4))
    assert cost.gflops == pytest.approx(2 * 27 * 4 * 8 * 8 * 8 * 4 / 1e9)
    assert cost.parameters == 27 * 4 * 8
