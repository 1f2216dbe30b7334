"""The folder of a run: what it is called, who may train it, and which files it holds.

Nothing heavy is imported here: the name of a run is part of its configuration, which `--cfg job`
must print at once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from errors import InputError
from experiments.ranks import is_first

# What a run is: its name is a hash of these nodes of the configuration, less the keys below.
IDENTITY = ("module", "data", "seed", "trainer", "callbacks", "resume", "finetune", "compile")

# Keys that change where and how fast a run computes, and what it reports, but no weight and no
# score. All other keys count, so that two different questions never share a folder.
NO_EFFECT = (
    "data.num_workers",
    "data.cache.root",
    "data.cache.workers",
    "inference.voxels_at_once",
    "model.checkpointing",
    "trainer.accelerator",
    "trainer.callbacks",  # the node `callbacks`
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_sanity_val_steps",
    "trainer.plugins",
    "trainer.strategy",
    "callbacks.learning_rate",
    "callbacks.memory",
    "callbacks.pictures",
    "callbacks.slices",
    "callbacks.table",
)


def identity(root: DictConfig) -> dict[str, Any]:
    """What determines the weights and scores of a run, as plain values.

    Args:
        root: The whole configuration; its node `hydra` is not needed.
    """
    plain: Any = OmegaConf.to_container(root)
    for dotted in NO_EFFECT:
        *parents, key = dotted.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(key, None)
    for start in ("resume", "finetune"):
        if plain.get(start):
            plain[start] = _digest(start, Path(plain[start]))
    plain["compile"] = plain.get("compile") or None  # rounds differently
    plain["run_dir"] = "."  # the folder is what is being named, and callbacks refer to it
    resolved: Any = OmegaConf.create({key: plain[key] for key in plain if key != "hydra"})
    return {
        key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        for key in IDENTITY
        if (node := resolved[key]) is not None
    }


def _digest(key: str, checkpoint: Path) -> str:
    """Hash the checkpoint that a run starts from; its path would say little about it."""
    try:
        with checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{key}: {checkpoint}: {error.strerror}") from None


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: The folder, which need not exist.
    """

    path: Path

    @staticmethod
    def name(root: DictConfig, choices: Mapping[str, str]) -> str:
        """Name a run by its model, its norm, its seed and a hash of what it is.

        The same question has the same name, however it was typed.

        Args:
            root: The whole configuration.
            choices: Hydra's chosen option of each group.
        """
        text = json.dumps(identity(root), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        chosen = [choices[group] for group in ("model", "norm") if group in choices]
        return "-".join([*chosen, f"s{root.seed}", digest])

    @property
    def best(self) -> Path:
        """The checkpoint that was tested."""
        return self.path / "best.ckpt"

    @property
    def last(self) -> Path:
        """The checkpoint that an interrupted run goes on from."""
        return self.path / "last.ckpt"

    @property
    def results_file(self) -> Path:
        """The last file that a run writes: where it is, the run is finished."""
        return self.path / "results.json"

    @property
    def split_file(self) -> Path:
        """Names of the cases of training, validation and test."""
        return self.path / "split.json"

    @property
    def cases_file(self) -> Path:
        """Scores of every test case."""
        return self.path / "cases.csv"

    @property
    def pictures(self) -> Path:
        """Folder of pictures of test cases."""
        return self.path / "pictures"

    @property
    def metrics_files(self) -> list[Path]:
        """What was logged, a file for each time that the run was started or resumed, in order."""
        versions = self.path.glob("csv/version_*")
        ordered = sorted(versions, key=lambda version: int(version.name.split("_")[1]))
        return [version / "metrics.csv" for version in ordered]

    @property
    def is_finished(self) -> bool:
        """Whether the run has its results."""
        return self.results_file.is_file()

    def clear(self) -> None:
        """Remove what says how far the run has come, so that it begins anew.

        The first to go is the file that says that the run is finished, and the last those that a
        later process would go on from: killed in between, the run is merely unfinished.
        """
        for file in (self.results_file, self.best, self.last):
            file.unlink(missing_ok=True)

    def split(self) -> dict[str, list[str]]:
        """Names of the cases of each part.

        Raises:
            InputError: No such file, or another content.
        """
        from datamodules.splits import read_names

        return read_names(self.split_file)

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Claim the run for this process; yields whether no other process is training it.

        The claim ends with the process, however that ends. Of the processes of one distributed run,
        the first claims for all.
        """
        from filelock import FileLock, Timeout

        if not is_first():
            yield True
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".claim")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def finished_runs(folder: Path) -> list[RunFolder]:
    """The folder itself if it is a finished run, and the finished runs in it, by name.

    Raises:
        InputError: There is none.
    """
    candidates = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    runs = [run for run in map(RunFolder, candidates) if run.is_finished]
    if not runs:
        raise InputError(f"{folder}: expected a finished run, or a folder of such, found none")
    return runs
