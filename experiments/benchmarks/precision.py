"""Dice of training in bfloat16 against float32, over seeds, on a processor without bfloat16.

Such a processor takes dozens of times as long for a convolution in bfloat16. `RoundConvolutions`
gives the numbers of a GPU's matrix units in another way: the same operands, rounded to bfloat16,
are multiplied in float32, and the result is rounded. All else is Lightning's `bf16-mixed`:

    python train.py -m name=precision seed=0,1,2,3,4 trainer.precision=32-true,bf16-mixed \\
      +callbacks.rounding._target_=experiments.benchmarks.precision.RoundConvolutions
    python -m experiments.benchmarks.precision runs/precision
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from errors import InputError
from experiments.results import Results
from experiments.run import RunFolder
from experiments.tables import markdown
from lightning_modules import checkpoint

MULTIPLICATIONS = {functional.conv3d, functional.conv_transpose3d, functional.linear}
FLOAT32, BFLOAT16 = "32-true", "bf16-mixed"


class _InFloat32(TorchFunctionMode):
    """Within autocast, multiplies in float32 what has been rounded, and rounds the result."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func not in MULTIPLICATIONS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        rounded = [_rounded(value) for value in args]
        named = {name: _rounded(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*rounded, **named).bfloat16()


def _rounded(value: Any) -> Any:  # noqa: ANN401
    """Round a tensor to bfloat16, and its gradient; leave all else as it is."""
    return value.bfloat16().float() if isinstance(value, Tensor) else value


class RoundConvolutions(Callback):
    """Lets a run on a CPU compute the convolutions of `bf16-mixed` at the speed of float32."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.mode = _InFloat32()
        self.mode.__enter__()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.mode.__exit__(None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.precision",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("runs", type=Path, help="folder of the runs in both precisions")
    folder = parser.parse_args().runs
    try:
        print(table(scores(folder)))
    except InputError as error:
        raise SystemExit(str(error)) from None


Scores = dict[int, dict[str, float]]  # by seed and metric


def scores(folder: Path) -> dict[str, Scores]:
    """Read the test scores of the finished runs of a folder, by precision.

    Raises:
        InputError: Fewer than two seeds have been trained in both precisions.
    """
    found: dict[str, Scores] = {FLOAT32: {}, BFLOAT16: {}}
    for run in map(RunFolder, sorted(folder.glob("*/"))):
        if run.is_finished:
            config = checkpoint.read(run.best)[checkpoint.CONFIG_KEY]
            metrics = Results.read(run).metrics
            found[config["trainer"]["precision"]][config["seed"]] = {
                name: value for name, value in metrics.items() if name.startswith("test/")
            }
    if len(found[FLOAT32].keys() & found[BFLOAT16].keys()) < 2:
        raise InputError(f"{folder}: expected two seeds or more in both precisions, found fewer")
    return found


def table(found: Mapping[str, Scores]) -> str:
    """Compare the precisions seed by seed: in both, a seed fixes weights, patches and noise.

    The interval is Student's, of the mean difference over seeds; the cases stay the same.
    """
    seeds = sorted(found[FLOAT32].keys() & found[BFLOAT16].keys())
    rows = []
    for metric in found[FLOAT32][seeds[0]]:
        arms = [np.array([found[arm][seed][metric] for seed in seeds]) for arm in found]
        if np.ptp(arms) == 0:
            continue  # says nothing, such as the share of cases without a region
        difference = arms[1] - arms[0]
        half = student.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / len(seeds) ** 0.5
        rows.append(
            {
                "metric": metric,
                **{
                    name: f"{arm.mean():.3f} ± {arm.std(ddof=1):.3f}"
                    for name, arm in zip(found, arms, strict=True)
                },
                "difference": f"{difference.mean():+.3f}",
                "95 %": f"{difference.mean() - half:+.3f} to {difference.mean() + half:+.3f}",
                "seeds": str(len(seeds)),
            }
        )
    return markdown(rows)


if __name__ == "__main__":
    main()
