"""Callbacks: the operating point, the table of cases, seeds, and what pictures show."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_modules.callbacks import (
    AverageWeights,
    CaseTable,
    ChooseThreshold,
    SaveConfig,
    SeedEveryStep,
    display_range,
    innermost,
)
from lightning_modules.checkpoint import CONFIG_KEY
from lightning_modules.inference import WholeVolume
from lightning_modules.losses import CrossEntropy
from lightning_modules.metrics import LesionMetrics, LesionReport
from lightning_modules.metrics.lesions import THRESHOLDS
from lightning_modules.networks.blocks import Segmentation
from lightning_modules.networks.geometry import Geometry
from lightning_modules.segmentation import SegmentationModule

FULL = Geometry(halo=0, stride=1)


class Identity(nn.Module):
    """Its logits are the image."""

    divisor = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def segment(self, x: Tensor) -> Tensor:
        return x * self.weight


def detector(network: nn.Module | None = None, learning_rate: float = 1e-3) -> SegmentationModule:
    return SegmentationModule(
        network or Identity(),
        CrossEntropy(FULL),
        partial(torch.optim.Adam, lr=learning_rate),
        partial(torch.optim.lr_scheduler.ConstantLR, factor=1),
        WholeVolume(),
        partial(LesionMetrics, FULL),
    )


def volume(index: int, probability: Tensor, lesions: list[tuple[int, int, int]]) -> dict[str, Any]:
    mask = torch.zeros(1, *probability.shape, dtype=torch.bool)
    for voxel in lesions:
        mask[(0, *voxel)] = True
    return {
        "image": probability.logit()[None],
        "mask": mask,
        "case": f"case {index}",
        "outside": torch.zeros(1, dtype=torch.int64),
        "index": torch.tensor(index),
    }


def dots(values: dict[tuple[int, int, int], float]) -> Tensor:
    """A volume of single voxels with these probabilities."""
    probability = torch.full((12, 12, 12), 1e-3)
    for voxel, value in values.items():
        probability[voxel] = value
    return probability


LESIONS = [(1, 1, 1), (5, 5, 5)]
# Two lesions, at .9 and .3, and a false alarm at .6; a patient without lesions and an alarm at .4.
CASES = [
    volume(0, dots({(1, 1, 1): 0.9, (5, 5, 5): 0.3, (9, 9, 9): 0.6}), LESIONS),
    volume(1, dots({(9, 9, 9): 0.4}), []),
]


def noise(count: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        volume(index, torch.rand(12, 12, 12).pow(4).clamp(1e-4, 1 - 1e-4), LESIONS)
        for index in range(count)
    ]


def trainer(*callbacks: pl.Callback, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def validated(
    module: SegmentationModule, cases: list[dict[str, Any]], target_fp: float
) -> dict[str, float]:
    loader = torch.utils.data.DataLoader(cases)  # pyright: ignore[reportArgumentType]
    (scores,) = trainer(ChooseThreshold(target_fp)).validate(module, loader, verbose=False)
    return dict(scores)


def report_of(cases: list[dict[str, Any]]) -> LesionReport:
    metrics = LesionMetrics(FULL)
    for case in cases:
        batch = {"mask": case["mask"][None], "index": case["index"][None]}
        metrics.update(case["image"][None].sigmoid(), batch)
    return metrics.report()


@pytest.mark.parametrize(
    ("target_fp", "low", "high", "sensitivity"),
    [(0, 0.6, 0.9, 0.5), (0.5, 0.4, 0.9, 0.5), (1, 1e-3, 0.3, 1)],
)
def test_the_threshold_finds_most_lesions_within_the_limit(
    target_fp: float, low: float, high: float, sensitivity: float
):
    module = detector()
    scores = validated(module, CASES, target_fp)
    assert low <= module.threshold < high
    assert scores["val/sensitivity"] == sensitivity
    assert scores["val/false_positives"] <= target_fp


def by_definition(report: LesionReport, target_fp: float) -> float:
    """From the highest threshold down to the first with too many false positives.

    The most lesions, one to one, decide; among equals the highest threshold.
    """
    best, most = THRESHOLDS[-1], -1.0
    sensitivity, false_positives = report.froc("one_to_one")
    for position in reversed(range(len(THRESHOLDS))):
        if false_positives[position] > target_fp:
            break
        if sensitivity[position] > most:
            best, most = THRESHOLDS[position], float(sensitivity[position])
    return best


@pytest.mark.parametrize("target_fp", [0, 0.25, 1, 4, 100])
def test_scores_of_the_validation_are_those_at_the_chosen_threshold(target_fp: float):
    cases = noise(4)
    module = detector()
    scores = validated(module, cases, target_fp)
    report = report_of(cases)
    assert module.threshold == np.float32(by_definition(report, target_fp))
    expected = {**report.scores(module.threshold), "threshold": module.threshold}
    known = {f"val/{name}": value for name, value in expected.items() if not np.isnan(value)}
    loss = scores.pop("val/loss")
    assert loss > 0
    assert scores == pytest.approx(known)


def test_a_threshold_that_does_not_keep_to_the_limit_is_said(caplog: pytest.LogCaptureFixture):
    sure = [volume(0, dots({(1, 1, 1): 1 - 1e-7, (9, 9, 9): 1 - 1e-7}), LESIONS)]
    validated(detector(), sure, target_fp=1)
    assert "false positives" not in caplog.text
    validated(detector(), sure, target_fp=0.5)
    assert "expected at most 0.5 false positives a patient" in caplog.text
    assert "found 1 at the highest" in caplog.text


def test_test_scores_are_taken_at_the_threshold_of_the_validation():
    module = detector()
    validated(module, CASES, target_fp=0)
    loader = torch.utils.data.DataLoader(CASES)  # pyright: ignore[reportArgumentType]
    (scores,) = trainer(ChooseThreshold(0)).test(module, loader, verbose=False)
    assert scores["test/threshold"] == module.threshold != 0.5
    assert (scores["test/sensitivity"], scores["test/false_positives"]) == (0.5, 0)


def test_a_second_validation_chooses_anew():
    module = detector()
    validated(module, CASES, target_fp=0)
    strict = module.threshold
    validated(module, CASES, target_fp=1)
    assert module.threshold < strict
    validated(module, CASES, target_fp=0)
    assert module.threshold == strict


def test_the_table_has_a_row_of_every_test_case(tmp_path: Path):
    module = detector()
    module.threshold = 0.5
    loader = torch.utils.data.DataLoader(CASES[::-1])  # pyright: ignore[reportArgumentType]
    trainer(CaseTable(tmp_path / "cases.csv")).test(module, loader, verbose=False)
    assert (tmp_path / "cases.csv").read_text().splitlines() == [
        "case,lesions,detected,false_positives,one_to_one,merged,split,dice",
        "case 0,2,1.0,1.0,1.0,0.0,0.0,1.0",
        "case 1,0,0.0,0.0,0.0,0.0,0.0,0.0",
    ]


class AtStep(pl.Trainer):
    """A trainer of which only the step and the process are known."""

    def __init__(self, step: int, rank: int) -> None:
        self.step = step
        self.rank = rank

    @property
    def global_step(self) -> int:
        return self.step

    @property
    def global_rank(self) -> int:
        return self.rank


def test_noise_depends_on_seed_step_and_process_alone():
    module = detector()

    def noise(seed: int, step: int, rank: int) -> float:
        SeedEveryStep(seed).on_train_batch_start(AtStep(step, rank), module, {}, 0)
        return torch.randn(()).item()

    first = noise(0, 7, 0)
    torch.randn(100)
    assert noise(0, 7, 0) == first
    assert len({noise(*numbers) for numbers in product((0, 1), (7, 8), (0, 1))}) == 8


def test_the_configuration_goes_into_the_checkpoint():
    checkpoint: dict[str, Any] = {}
    SaveConfig({"seed": 3}).on_save_checkpoint(trainer(), detector(), checkpoint)
    assert checkpoint == {CONFIG_KEY: {"seed": 3}}


def test_pictures_show_the_innermost_region():
    masks = np.zeros((3, 1, 1, 4), bool)
    masks[0, ..., 1:] = masks[1, ..., 2:] = masks[2, ..., 3:] = True
    assert innermost(masks).tolist() == [[[0, 1, 2, 3]]]


def test_pictures_show_the_background_in_black():
    image = np.array([[0.0, -2.0], [1.0, 3.0]])  # z-scores: the background is not the darkest
    assert display_range(image)[0].tolist() == [0, 0]
    assert display_range(image)[1, 1] == 255


class Scaled(Identity):
    """As `Identity`, and it trains."""

    def forward(self, x: Tensor) -> Segmentation:
        return Segmentation(self.segment(x))


class WeightAtStart(pl.Callback):
    """Notes the weight that each training step and each validation starts from."""

    def __init__(self) -> None:
        self.trained: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained.append(pl_module.network.weight.item())

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(pl_module.network.weight.item())


class Fit:
    """A fit of `epochs` epochs of two steps on noise, with a validation after each."""

    def __init__(self, folder: Path, epochs: int, *callbacks: pl.Callback, resume: Any = None):
        torch.manual_seed(0)
        self.module = detector(Scaled(), learning_rate=0.1)
        self.seen = WeightAtStart()
        last = ModelCheckpoint(folder, "last", enable_version_counter=False)
        self.trainer = trainer(self.seen, ChooseThreshold(1), *callbacks, last, epochs=epochs)
        self.loader: Any = torch.utils.data.DataLoader(noise(2))  # pyright: ignore
        self.trainer.fit(self.module, self.loader, self.loader, ckpt_path=resume)
        self.checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        self.weight = float(self.checkpoint["state_dict"]["network.weight"])


def averages_of(weights: list[float], decay: float) -> list[float]:
    """The moving average after every step; it starts as the weight after the first."""
    averages = [weights[0]]
    for weight in weights[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * weight)
    return averages


def test_the_average_is_validated_and_kept_and_the_weights_train_on(tmp_path: Path):
    plain = Fit(tmp_path / "plain", 4)
    averaged = Fit(tmp_path / "averaged", 4, AverageWeights(0.6))
    assert averaged.seen.trained == plain.seen.trained
    after = [*plain.seen.trained[1:], plain.weight]
    averages = averages_of(after, 0.6)
    assert len(set(averages)) == len(averages) == 8
    two_cases = [average for average in averages[1::2] for _ in range(2)]
    assert averaged.seen.validated == pytest.approx(two_cases)
    assert averaged.weight == pytest.approx(averages[-1])
    assert plain.weight == plain.checkpoint["state_dict"]["network.weight"]


def test_the_scores_of_an_average_are_at_its_own_threshold(tmp_path: Path):
    fit = Fit(tmp_path, 1, AverageWeights(0.6))
    logged = {name: float(value) for name, value in fit.trainer.callback_metrics.items()}
    module = detector(Scaled())
    module.load_state_dict(fit.checkpoint["state_dict"])
    assert module.threshold == logged["val/threshold"] != 0.5
    scores = validated(module, noise(2), 1)
    assert scores == pytest.approx({name: logged[name] for name in scores}, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # that is meant
def test_after_training_a_checkpoint_is_scored_with_its_own_weights(tmp_path: Path):
    early = Fit(tmp_path / "early", 1, AverageWeights(0.6))
    fit = Fit(tmp_path / "fit", 2, AverageWeights(0.6))
    fit.seen.validated.clear()
    fit.trainer.validate(
        fit.module, fit.loader, ckpt_path=tmp_path / "early" / "last.ckpt", verbose=False
    )
    assert fit.seen.validated == [early.weight] * 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # it goes on in its own folder
def test_resumed_averages_equal_uninterrupted_ones(tmp_path: Path):
    whole = Fit(tmp_path / "whole", 4, AverageWeights(0.6))
    Fit(tmp_path / "half", 2, AverageWeights(0.6))
    half = Fit(tmp_path / "half", 4, AverageWeights(0.6), resume=tmp_path / "half" / "last.ckpt")
    assert half.weight == whole.weight
    assert half.checkpoint["current_model_state"]["network.weight"] == pytest.approx(
        whole.checkpoint["current_model_state"]["network.weight"]
    )
