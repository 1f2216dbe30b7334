"""SegmentationModule: terms, safety, learning, whole volumes, and the threshold."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from errors import InputError
from lightning_modules.inference import SlidingWindow
from lightning_modules.losses import AutoencoderLoss, Loss, RegionDice
from lightning_modules.metrics import RegionMetrics
from lightning_modules.networks.aeunet import AEUNet
from lightning_modules.segmentation import SegmentationModule

Compose = Callable[..., DictConfig]

REGIONS = ["WT", "TC", "ET"]
DICE = RegionDice(dict.fromkeys(REGIONS, 0.33), REGIONS)


class Threshold(nn.Module):
    """Has one weight for each region: its logit is the channel's intensity times the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 3, 1, 1, 1), 10.0))

    def segment(self, x: Tensor) -> Tensor:
        return x[:, :3] * self.weight


def module(network: nn.Module, loss: Loss = DICE, **more: Any) -> SegmentationModule:
    return SegmentationModule(
        network,
        loss,
        partial(torch.optim.Adam, lr=1e-2),
        partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=50, power=0.9),
        SlidingWindow(16),
        partial(RegionMetrics, REGIONS),
        **more,
    )


def autoencoder() -> SegmentationModule:
    return module(AEUNet(filters=8, patch_size=16, bottleneck=4), AutoencoderLoss(DICE))


def patches(size: int = 2, side: int = 16) -> dict[str, Any]:
    torch.manual_seed(0)
    mask = torch.zeros(size, 3, side, side, side, dtype=torch.bool)
    mask[:, :, 4:12, 4:12, 4:12] = True
    image = torch.randn(size, 4, side, side, side) + 3 * mask[:, :1]
    return {"image": image, "mask": mask, "case": [f"case {i}" for i in range(size)]}


def volume(intensity: float = 10) -> dict[str, Any]:
    """A whole volume whose channels are the regions: `intensity` inside, the negative outside."""
    batch = patches(1)
    image = intensity * (2 * batch["mask"].float() - 1)
    return {
        "image": torch.cat([image, image[:, :1]], 1),
        "mask": batch["mask"],
        "case": ["a"],
        "outside": torch.zeros(1, 3, dtype=torch.int64),
        "index": torch.tensor([0]),
    }


def scores_of(module: SegmentationModule, batch: dict[str, Any]) -> dict[str, float]:
    """Scores that reach the log."""
    loader = torch.utils.data.DataLoader([{key: value[0] for key, value in batch.items()}])  # pyright: ignore
    trainer = pl.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    (scores,) = trainer.test(module, loader, verbose=False)
    return dict(scores)


def test_a_term_that_is_not_finite_stops_and_says_where():
    broken = patches()
    broken["image"][1, 0, 0, 0, 0] = float("inf")
    trained = autoencoder()
    with pytest.raises(FloatingPointError, match=r"l2.* not finite at step 0 .* case 0, case 1"):
        trained.training_step(broken, 0)
    trained.stop_unless_finite(trained.terms(patches()), patches())


def steps(module: SegmentationModule, batch: dict[str, Any], count: int) -> list[dict[str, Tensor]]:
    """Terms before each of so many steps on one batch, and after the last."""
    optimizer = module.configure_optimizers()["optimizer"]
    history = [module.terms(batch)]
    for _ in range(count):
        optimizer.zero_grad()
        history[-1]["loss"].backward()
        optimizer.step()
        history.append(module.terms(batch))
    return history


@pytest.mark.process
def test_one_batch_is_learnt():
    data = patches()  # seeds too
    final = steps(autoencoder(), data, 70)[-1]
    assert max(final[f"dice_{region}"] for region in REGIONS) < 0.1


@pytest.mark.process
@pytest.mark.parametrize(
    "overrides",
    [["model=dnet", "patches.size=60"], ["model=unet", "model.depth=3", "patches.size=16"]],
    ids=["dnet", "unet"],
)
def test_a_detector_overfits_one_batch(composed: Compose, overrides: list[str]):
    config = composed(*overrides, "optimizer.lr=1e-2")
    torch.manual_seed(0)
    detector = instantiate(config.module, _convert_="all")
    image = torch.randn(4, 1, *[config.patches.size] * 3)
    mask = torch.zeros(image.shape, dtype=torch.bool)
    if config.geometry.halo:
        mask[:2, :, 26:29, 27:30, 28:31] = True
    else:
        mask[:2, :, 5:9, 5:9, 5:9] = True
    batch = {"image": image + 3 * mask, "mask": mask, "case": ["a"] * 4}
    losses = [terms["loss"].item() for terms in steps(detector, batch, 20)]
    assert losses[19] < 0.35 * losses[0]


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


def test_weight_decay_acts_on_kernels_of_convolutions_alone(composed: Compose):
    """L2 on "the convolutional kernel parameters" (Myronenko 2018): a step without any gradient."""
    config = composed("optimizer.weight_decay=0.5", "patches.size=16", "optimizer.lr=1e-2")
    decayed = instantiate(config.module, _convert_="all")
    before = {name: weight.detach().clone() for name, weight in decayed.network.named_parameters()}
    optimizer = decayed.configure_optimizers()["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0]
    for weight in decayed.network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    changed = {
        name
        for name, weight in decayed.network.named_parameters()
        if (weight != before[name]).any()
    }
    kernels = {
        f"{name}.weight"
        for name, part in decayed.network.named_modules()
        if isinstance(part, torch.nn.Conv3d)
    }
    assert changed == kernels < set(before)


def test_without_weight_decay_all_parameters_are_one_group(composed: Compose):
    trained = instantiate(composed("patches.size=16").module, _convert_="all")
    (group,) = trained.configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == 0
    assert len(group["params"]) == len(list(trained.network.parameters()))


def test_a_checkpoint_of_another_weight_decay_is_not_continued(composed: Compose):
    """The state of the optimizer would bring the checkpoint's value back, without a word."""
    plain, decayed = (
        instantiate(composed("patches.size=16", *more).module, _convert_="all")
        for more in ([], ["optimizer.weight_decay=1e-5"])
    )
    for saved, resumed, ends in (
        (decayed, plain, "expected 1e-05.*found 0"),
        (decayed, decayed, ""),
    ):
        checkpoint = {
            "lr_schedulers": [{"last_epoch": 1}],
            "optimizer_states": [saved.configure_optimizers()["optimizer"].state_dict()],
        }
        if ends:
            with pytest.raises(InputError, match=f"optimizer.weight_decay: {ends}"):
                resumed.on_load_checkpoint(checkpoint)
            continue
        resumed.on_load_checkpoint(checkpoint)
        resumed.configure_optimizers()["optimizer"].load_state_dict(
            checkpoint["optimizer_states"][0]
        )
        assert len(checkpoint["lr_schedulers"][0]["base_lrs"]) == 2


def test_memory_layout_changes_nothing():
    network = AEUNet(filters=8, patch_size=16, bottleneck=4).eval()
    image = patches()["image"]
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
    scores = scores_of(module(Threshold()), volume())
    assert scores["test/dice"] == scores["test/dice_WT"] == 1
    assert scores["test/loss"] < 0.01


def test_losses_of_volumes_are_logged_without_the_autoencoder():
    batch = volume()
    with torch.no_grad():
        trained = autoencoder()
        expected = DICE.on_volume(trained.eval().logits(batch["image"]), batch)["loss"]
    assert scores_of(trained, batch)["test/loss"] == pytest.approx(expected.item())


def test_a_threshold_reaches_both_stages_and_the_masks():
    trained = module(Threshold())
    assert trained.threshold == 0.5
    trained.threshold = 0.75
    assert trained.threshold == 0.75
    assert [float(trained.metrics[stage].threshold) for stage in ("val", "test")] == [0.75, 0.75]
    # Probabilities of sigmoid(10 * 0.05) = 0.62 inside the regions and 0.38 outside.
    assert scores_of(trained, volume(0.05))["test/dice"] == 0  # nothing is predicted
    trained.threshold = 0.6
    assert scores_of(trained, volume(0.05))["test/dice"] == 1
    trained.threshold = 0.25
    assert scores_of(trained, volume(0.05))["test/dice"] == pytest.approx(2 * 8**3 / (8**3 + 16**3))


def test_the_threshold_is_saved_with_the_weights(tmp_path: Path):
    trained = module(Threshold())
    trained.threshold = 0.3125  # exact in float32
    torch.save(trained.state_dict(), tmp_path / "weights")
    other = module(Threshold())
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert other.threshold == 0.3125
    assert all(float(metrics.threshold) == 0.3125 for metrics in other.metrics.values())


def test_a_new_epoch_keeps_the_threshold():
    """Metrics are reset after every validation, but the threshold is no count."""
    trained = module(Threshold())
    trained.threshold = 0.25
    for metrics in trained.metrics.values():
        metrics.reset()
    assert trained.threshold == 0.25


@pytest.mark.parametrize("amp", ["32-true", "bf16-mixed"])
def test_terms_are_finite_and_float32_in_every_precision(amp: str, composed: Compose):
    config = composed(f"trainer.precision={amp}", "patches.size=16", "model.bottleneck=4")
    trained = instantiate(config.module, _convert_="all")
    with torch.autocast("cpu", torch.bfloat16, enabled=amp != "32-true"):
        terms = trained.terms(patches())
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
