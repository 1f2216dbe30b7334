"""What came out of a run, and one screen of it."""

import math
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from errors import InputError
from experiments.cost import Cost
from experiments.run import RunFolder
from files import read_json, write_json


@dataclass(frozen=True)
class Results:
    """Scores and cost of a finished run.

    Attributes:
        run: Name of the run, and of its folder.
        choices: The option of each group that was chosen.
        metrics: Validation and test scores of the best checkpoint.
        cost: Predicted cost of the network.
        epochs: Epochs trained, over all resumptions.
        fit_s: Time of training, over all resumptions, but for epochs that were cut off.
        test_s: Time of validating and testing the best checkpoint.
        peak_memory_mib: The most memory allocated on the GPU, or, without one, resident in this
            process, whatever it ran before.
        device: Name of the GPU, or of the processor.
        waiting: Share of the time of training in this process, without validations, that it waited
            for data; NaN if it was not measured.
        versions: Versions of Python and torch.
    """

    run: str
    choices: dict[str, str]
    metrics: dict[str, float]
    cost: Cost
    epochs: int
    fit_s: float
    test_s: float
    peak_memory_mib: float
    device: str
    waiting: float = math.nan
    versions: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), "torch": torch.__version__}
    )

    @classmethod
    def read(cls, folder: RunFolder) -> "Results":
        """Read the results of a finished run.

        Raises:
            InputError: The file is missing, broken or of another version.
        """
        advice = "again=true trains the run again"
        content = read_json(folder.results_file, advice)
        try:
            return cls(**{**content, "cost": Cost(**content["cost"])})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder.results_file}: expected the results of a run, found others ({error}); "
                f"{advice}"
            ) from None

    def write(self, folder: RunFolder) -> None:
        """Write the file that says that the run is finished."""
        write_json(folder.results_file, asdict(self))


def peak_memory_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def show(results: Results, folder: RunFolder) -> None:
    """Print one screen: where the run is, its scores and cost, and the commands that can follow."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Run {results.run}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("folder", str(folder.path))
    table.add_row("choices", "  ".join(f"{key}={value}" for key, value in results.choices.items()))
    for stage in ("val", "test"):
        if scores := _scores(results.metrics, stage):  # none of a part without cases
            table.add_row(stage, scores)
    table.add_row(
        "network",
        f"{results.cost.parameters:,} parameters, {results.cost.gflops:.2f} GFLOP a patch, "
        f"{results.cost.memory_mib:.0f} MiB a training step",
    )
    table.add_row(
        "cost",
        f"{results.epochs} epochs in {results.fit_s:.0f} s, test in {results.test_s:.0f} s, "
        f"{results.peak_memory_mib:.0f} MiB, {results.device}",
    )
    if not math.isnan(results.waiting):
        table.add_row("waiting", f"{100 * results.waiting:.1f} % of the training, for data")
    table.add_row("pictures", str(folder.pictures))
    table.add_row("go on", f"python train.py ... trainer.max_epochs=MORE resume={folder.last}")
    table.add_row(
        "predict", f"python predict.py checkpoint={folder.best} input=FOLDER output=FOLDER"
    )
    if any(folder.path.glob("wandb/offline-run-*")):  # logger=csv has none
        table.add_row("sync", f"wandb sync {folder.path}/wandb/offline-run-*")
    Console().print(table)


def _scores(metrics: Mapping[str, float], stage: str) -> str:
    return "  ".join(
        f"{key.removeprefix(f'{stage}/')} {value:.3f}"
        for key, value in sorted(metrics.items())
        if key.startswith(f"{stage}/")
    )
