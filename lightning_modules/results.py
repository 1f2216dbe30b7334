"""What came out of a run: `results.json`, the last file that a run writes, and one screen of it."""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightning_modules.cost import Cost

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Results:
    """Scores and cost of a finished run.

    Attributes:
        run: Name of the run, and of its folder.
        choices: The option of each group that was chosen.
        metrics: Last value of everything logged, test scores included.
        cost: Of the network, predicted.
        epochs: Epochs trained, over all resumptions.
        checkpoint: The best checkpoint, the one tested, relative to the run's folder.
        fit_s: Time of training in this process.
        test_s: Time of testing.
        peak_memory_mib: Most memory allocated on the GPU, or resident in this process without one;
            over all runs of a process.
        device: Name of the GPU, or of the processor.
        versions: Of Python and torch.
    """

    run: str
    choices: dict[str, str]
    metrics: dict[str, float]
    cost: Cost
    epochs: int
    checkpoint: str
    fit_s: float
    test_s: float
    peak_memory_mib: float
    device: str
    versions: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), "torch": torch.__version__}
    )

    def write(self, folder: Path) -> None:
        """Write `results.json` at once and whole: where it is, the run is finished."""
        partial = folder / f"{RESULTS_NAME}.{os.getpid()}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
        partial.replace(folder / RESULTS_NAME)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        content = json.loads((folder / RESULTS_NAME).read_text())
        return cls(**{**content, "cost": Cost(**content["cost"])})


def is_finished(folder: Path) -> bool:
    return (folder / RESULTS_NAME).is_file()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may train the run of a folder: no other is at it.

    The claim ends with the process, however that ends. Of the processes of one distributed run,
    the first claims for all.
    """
    from filelock import FileLock, Timeout

    if getattr(rank_zero_only, "rank", 0) != 0:
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".claim")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Stopwatch:
    """Seconds spent in each `with watch("name")`; 0 for what never ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - start


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


def show(results: Results, folder: Path) -> None:
    """Print one screen: where the run is, what it scored and cost, and what can be done next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Run {results.run}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("folder", str(folder))
    table.add_row("choices", "  ".join(f"{key}={value}" for key, value in results.choices.items()))
    for stage in ("val", "test"):
        table.add_row(stage, _scores(results.metrics, stage))
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
    table.add_row("pictures", str(folder / "pictures"))
    checkpoint = folder / results.checkpoint
    last = folder / "last.ckpt"
    table.add_row("go on", f"python train.py ... trainer.max_epochs=MORE resume={last}")
    table.add_row(
        "predict", f"python predict.py checkpoint={checkpoint} input=FOLDER output=FOLDER"
    )
    table.add_row("sync", f"wandb sync {folder}/wandb/offline-run-*")
    Console().print(table)


def _scores(metrics: Mapping[str, float], stage: str) -> str:
    return "  ".join(
        f"{key.removeprefix(f'{stage}/')} {value:.3f}"
        for key, value in sorted(metrics.items())
        if key.startswith(f"{stage}/")
    )
