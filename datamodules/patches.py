"""Patches for training, whole volumes for validation and testing.

Order, place, scale and augmentation of a patch are a function of (seed, epoch, index) alone: any
number of worker processes, and a resumed run, see the same stream.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchio as tio
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.cache import Cache, CachedCase, cut
from datamodules.cases import Case, DataSet, Split
from datamodules.sampling import BalancedSampler, Inputs, as_subject, whole
from errors import InputError

PatchKey = tuple[int, int]  # epoch, index


class Volumes(Dataset[dict[str, Any]]):
    """Whole preprocessed volumes: `image`, `mask`, `outside`, `case`, `index`."""

    def __init__(
        self, cases: Sequence[CachedCase], data_set: DataSet, inputs: Inputs = cut
    ) -> None:
        self.cases = cases
        self.data_set = data_set
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        return {
            "image": torch.from_numpy(whole(case.image, self.inputs).astype(np.float32)),
            "mask": torch.from_numpy(self.data_set.to_regions(case.labels)),
            "outside": torch.from_numpy(self.outside(case)),
            "case": case.name,
            "index": index,
        }

    def outside(self, case: CachedCase) -> np.ndarray:
        """True voxels of each region (R,) that the crop has cut off."""
        voxels = np.zeros(len(self.data_set.regions), np.int64)
        for label, count in case.outside.items():
            voxels += count * self.data_set.to_regions(np.full((1, 1, 1), label, np.uint8)).ravel()
        return voxels

    def dry_iter(self) -> list[tio.Subject]:
        """TorchIO's queue asks for its subjects without their voxels."""
        return [tio.Subject(name=case.name) for case in self.cases]


class PatchQueue(tio.Queue):
    """A TorchIO queue whose n-th patch of an epoch is the same, whoever asks for it.

    The stock queue moves whole volumes through worker processes into a buffer of patches and pops
    what happens to lie there. Here the volumes are memory mapped, so that the page cache is the
    buffer: a patch is cut when it is asked for, at no more than the cost of reading it, nothing
    stalls while a buffer fills, and the loader outside may have workers.

    Every case is visited equally often: once in each round of patches with a lesion (of those that
    have one) and once in each round of the others.

    Args:
        cases: What to cut patches from.
        data_set: Turns labels into regions.
        sampler: Draws a patch from a case.
        augmentation: A TorchIO transform of `image` and `labels`.
        patches_per_epoch: Length of the queue.
        seed: Of the stream.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        data_set: DataSet,
        sampler: BalancedSampler,
        augmentation: Callable[[tio.Subject], tio.Subject],
        patches_per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__(
            Volumes(cases, data_set),  # pyright: ignore[reportArgumentType]
            max_length=patches_per_epoch,
            samples_per_volume=1,
            sampler=sampler,
            start_background=False,
        )
        self.cases = cases
        self.with_lesion = [index for index, case in enumerate(cases) if len(case.lesion)]
        self.others = list(range(len(cases)))
        if sampler.lesion_free:
            self.others = [i for i, case in enumerate(cases) if sampler.can_avoid(case.labels)]
            if sampler.lesion_share < 1 and not self.others:
                raise InputError(
                    f"sampler.others: lesion-free patches are asked for, but every patch of "
                    f"{sampler.size[0]} voxels in each of the {len(cases)} training cases has one"
                )
        if sampler.lesion_share and not self.with_lesion:
            raise InputError(
                f"sampler.lesion_share: {float(sampler.lesion_share)} of the patches are to have "
                f"a lesion, but none of the {len(cases)} training cases has one"
            )
        self.data_set = data_set
        self.balance = sampler
        self.augmentation = augmentation
        self.seed = seed

    @property
    def iterations_per_epoch(self) -> int:
        return self.max_length

    def __getitem__(self, key: PatchKey | int) -> dict[str, Any]:  # pyright: ignore
        # Lightning's `overfit_batches` replaces our sampler by a plain one: always the first epoch.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        wants_lesion = self.balance.wants_lesion(index)
        case = self.case_of(epoch, index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.seed, epoch, index))
            lesion = self.balance.choose(case) if wants_lesion else case.lesion[:0]
            drawn = self.balance.draw(case.image, case.labels, lesion)
            patch: Any = self.augmentation(as_subject(drawn))
        labels = patch["labels"].data[0].numpy().astype(np.uint8)
        return {
            "image": patch["image"].data,
            "mask": torch.from_numpy(self.data_set.to_regions(labels)),
            "case": case.name,
        }

    def case_of(self, epoch: int, index: int) -> CachedCase:
        """The case that patch `index` of an epoch is cut from."""
        wants_lesion = self.balance.wants_lesion(index)
        eligible = self.with_lesion if wants_lesion else self.others
        lesions = self.balance.lesions_before(index)
        visits, position = divmod(lesions if wants_lesion else index - lesions, len(eligible))
        order = _permutation(len(eligible), self.seed, epoch, visits, wants_lesion)
        return self.cases[eligible[order[position]]]


class EpochSampler(Sampler[PatchKey]):
    """Keys (epoch, index) of the queue, in order; each rank takes every world-size-th batch.

    Whole batches, not single patches: a balance that holds in every run of patches then holds on
    every rank too.
    """

    def __init__(self, patches: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.epoch = 0
        batches = [range(i, min(i + batch_size, patches)) for i in range(0, patches, batch_size)]
        # All ranks must take equally many steps.
        even = len(batches) - len(batches) % ranks
        self.indices = [index for batch in batches[rank:even:ranks] for index in batch]

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[PatchKey]:
        return ((self.epoch, index) for index in self.indices)


class PatchDataModule(pl.LightningDataModule):
    """Prepares, splits, caches and serves a data set.

    Args:
        data_set: Where cases come from.
        cache: How they are preprocessed, and where that is kept.
        split: Which cases are for training, validation and testing.
        sampler: How patches are drawn.
        augmentation: A TorchIO transform of the patches.
        patches_per_epoch: Patches that all ranks see together in an epoch.
        batch_size: Patches a step and rank; whole volumes come one by one.
        num_workers: Loader processes; no number changes the patches.
        seed: Of the stream of patches.
    """

    def __init__(
        self,
        data_set: DataSet,
        cache: Cache,
        split: Callable[[Sequence[Case]], Split],
        sampler: BalancedSampler,
        augmentation: Callable[[tio.Subject], tio.Subject],
        patches_per_epoch: int,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        lesions = sampler.lesion_share * batch_size
        if sampler.lesion_free and (lesions.denominator > 1 or patches_per_epoch % batch_size):
            raise ValueError(
                f"batch_size: with others=lesion_free every batch has exactly "
                f"{float(sampler.lesion_share):g} with a lesion; expected a number that this "
                f"divides and that divides {patches_per_epoch} patches, found {batch_size}"
            )
        self.data_set = data_set
        self.cache = cache
        self.split = split
        self.sampler = sampler
        self.augmentation = augmentation
        self.patches_per_epoch = patches_per_epoch
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def prepare_data(self) -> None:
        self.data_set.prepare()
        self.cache.build(self.data_set.cases(), self.data_set)

    def setup(self, stage: str) -> None:
        cases = [case for case in self.data_set.cases() if case.mask is not None]
        self.parts = self.split(cases)
        if self.trainer is not None and self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parts.write(folder / "split.json")

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        queue = PatchQueue(
            self.cache.build(self.parts.train, self.data_set),
            self.data_set,
            self.sampler,
            self.augmentation,
            self.patches_per_epoch,
            self.seed,
        )
        keys = EpochSampler(
            len(queue), self.batch_size, self.trainer.global_rank, self.trainer.world_size
        )
        # A resumed run starts its workers before Lightning tells the sampler the epoch, and before
        # `current_epoch` counts the epoch that the checkpoint ended (pytorch-lightning#21938).
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        keys.set_epoch(progress.processed)
        return DataLoader(
            queue,
            batch_size=self.batch_size,
            sampler=keys,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._whole(self.parts.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._whole(self.parts.test)

    def _whole(self, cases: Sequence[Case]) -> DataLoader[Any]:
        # A volume is a copy from the page cache: not worth a process and its memory.
        cached = self.cache.build(cases, self.data_set)
        return DataLoader(Volumes(cached, self.data_set, self.sampler.inputs))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@cache
def _permutation(length: int, seed: int, epoch: int, visits: int, lesion: bool) -> list[int]:
    generator = np.random.default_rng([seed, epoch, visits, int(lesion)])
    return generator.permutation(length).tolist()
