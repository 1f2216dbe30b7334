"""The module between network and trainer: terms, safety, learning, resuming."""

from collections.abc import Callable
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_modules.inference import SlidingWindow
from lightning_modules.losses import RegionLoss
from lightning_modules.metrics import RegionMetrics
from lightning_modules.networks import AEUNet
from lightning_modules.segmentation import AutoencoderModule, SegmentationModule

Compose = Callable[..., DictConfig]


class Threshold(nn.Module):
    """One weight a region: its logit is the channel's intensity times the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 3, 1, 1, 1), 10.0))

    def segment(self, x: Tensor) -> Tensor:
        return x[:, :3] * self.weight


def module(network: nn.Module, kind: type[SegmentationModule] = SegmentationModule, **more: float):
    return kind(
        network,
        RegionLoss({"WT": 0.33, "TC": 0.33, "ET": 0.33}),
        partial(torch.optim.Adam, lr=1e-2),
        partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=50, power=0.9),
        SlidingWindow(16),
        partial(RegionMetrics, ["WT", "TC", "ET"]),
        **more,
    )


def batch(size: int = 2, side: int = 16) -> dict:
    torch.manual_seed(0)
    mask = torch.zeros(size, 3, side, side, side, dtype=torch.bool)
    mask[:, :, 4:12, 4:12, 4:12] = True
    image = torch.randn(size, 4, side, side, side) + 3 * mask[:, :1]
    return {"image": image, "mask": mask, "case": [f"case {i}" for i in range(size)]}


def test_total_is_equation_4():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4)
    terms = module(network, AutoencoderModule, l2_weight=0.1, kl_weight=0.2).terms(batch())  # pyright: ignore
    assert set(terms) == {"dice_WT", "dice_TC", "dice_ET", "l2", "kl", "loss"}
    regions = terms["dice_WT"] + terms["dice_TC"] + terms["dice_ET"]
    total = 0.33 * regions + 0.1 * terms["l2"] + 0.2 * terms["kl"]
    torch.testing.assert_close(terms["loss"], total)


def test_a_term_that_is_not_finite_stops_and_says_where():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4)
    broken = batch()
    broken["image"][1, 0, 0, 0, 0] = float("inf")
    trained = module(network, AutoencoderModule)
    terms = trained.terms(broken)  # pyright: ignore
    with pytest.raises(FloatingPointError, match=r"l2.* not finite at step 0 .* case 0, case 1"):
        trained.stop_unless_finite(terms, broken)  # pyright: ignore
    trained.stop_unless_finite(trained.terms(batch()), batch())  # pyright: ignore


def test_one_batch_is_learnt():
    data = batch()  # seeds, too
    trained = module(AEUNet(filters=8, patch_size=16, bottleneck=4), AutoencoderModule)
    optimizer = trained.configure_optimizers()["optimizer"]
    for _ in range(70):
        terms = trained.terms(data)  # pyright: ignore
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    final = trained.terms(data)  # pyright: ignore
    assert max(final[f"dice_{region}"] for region in ("WT", "TC", "ET")) < 0.1


def test_learning_rate_follows_equation_5():
    trained = module(Threshold())
    configured = trained.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "epoch"
    for epoch in range(50):
        expected = 1e-2 * (1 - epoch / 50) ** 0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_memory_layout_changes_nothing():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4).eval()
    image = batch()["image"]
    with torch.no_grad():
        expected = network.segment(image)
        for channels_last in (True, False):
            logits = module(network, channels_last=channels_last).logits(image)
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_sliding_windows_of_a_local_network_are_the_whole():
    trained = module(Threshold())
    image = torch.randn(1, 4, 21, 16, 37)
    with torch.no_grad():
        whole = trained.network.segment(image).sigmoid()
        torch.testing.assert_close(trained(image), whole, atol=1e-5, rtol=1e-5)


def test_a_volume_smaller_than_the_window_is_padded():
    trained = module(Threshold())
    image = torch.randn(1, 4, 9, 16, 37)
    with torch.no_grad():
        assert trained(image).shape == (1, 3, 9, 16, 37)


def test_scores_of_whole_volumes_reach_the_log():
    data = {**batch(1), "outside": torch.zeros(1, 3, dtype=torch.int64), "index": torch.tensor([0])}
    data["case"] = ["a"]
    sharp = 20 * data["mask"].float() - 10
    data["image"] = torch.cat([sharp, sharp[:, :1]], 1)
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in data.items()}])  # pyright: ignore
    trainer = pl.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    (scores,) = trainer.test(module(Threshold()), loader, verbose=False)
    assert scores["test/dice"] == scores["test/dice_WT"] == 1
    assert scores["test/loss"] < 0.01


@pytest.mark.parametrize("amp", ["32-true", "bf16-mixed"])
def test_precision_is_a_choice(amp: str, composed: Compose):
    """Every term stays finite and float32 in mixed precision."""
    config = composed(
        f"trainer.precision={amp}", "data.sampler.patch_size=16", "model.bottleneck=4"
    )
    trained = instantiate(config.module, _convert_="all")
    enabled = amp != "32-true"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        terms = trained.terms(batch())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
