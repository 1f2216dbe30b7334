"""Serve patches for training, and whole volumes for validation and testing.

Order, place, scale and augmentation of a patch are a function of (seed, epoch, index) alone, so
that any number of worker processes, and a resumed run, see the same stream of patches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchio as tio
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

import grids
from datamodules.appearance import change_appearance, collate_appearances
from datamodules.augmentation import UNCHANGED, can_be_drawn, change_intensities, draw_changes
from datamodules.cache import Cache, CachedCase
from datamodules.cases import Case, DataSet
from datamodules.preprocessing import on_scan_grid
from datamodules.resampling import resample_image
from datamodules.sampling import (
    BalancedSampler,
    Box,
    Cut,
    as_subject,
    cut_flipped,
    cut_with_mirrored,
    flipped,
    whole,
)
from datamodules.splits import SPLIT_NAME, Split, check_distinct, with_masks
from errors import InputError

PatchKey = tuple[int, int]  # epoch, index


class Volumes(Dataset[dict[str, Any]]):
    """Serves whole preprocessed volumes, for validation and testing.

    An item is a dict with
        `image`: (C, X, Y, Z), float32: the channels that the network sees;
        `mask`: (R, X, Y, Z), bool: the regions of the data set;
        `outside`: (R,), int64: true voxels of each region that the crop cut away;
        `case`: str: name of the case;
        `index`: int: its place in this data set;
        `on_scan_grid`, if asked for: a function that brings probabilities (R, X, Y, Z) to the grid
            of the case's own files and returns a `preprocessing.OnScanGrid`.

    Args:
        cases: Cases of the cache.
        data_set: Turns labels into regions.
        mirrored: Add the opposite hemisphere, as the sampler of the training patches does.
        scan_grids: Serve `on_scan_grid`; a loader then needs `collate_volumes`.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        data_set: DataSet,
        mirrored: bool = False,
        scan_grids: bool = False,
    ) -> None:
        self.cases = cases
        self.data_set = data_set
        self.scan_grids = scan_grids
        self.cut: Cut = cut_with_mirrored if mirrored else grids.cut

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        item = {
            "image": torch.from_numpy(whole(case.image, self.cut).astype(np.float32)),
            "mask": torch.from_numpy(self.data_set.to_regions(case.labels)),
            "outside": torch.from_numpy(self._voxels_outside(case)),
            "case": case.name,
            "index": index,
        }
        if self.scan_grids:
            item["on_scan_grid"] = partial(on_scan_grid, case.case, self.data_set, case.affine)
        return item

    def _voxels_outside(self, case: CachedCase) -> np.ndarray:
        """Count the true voxels of each region (R,), int64, that the crop cut away."""
        voxels = np.zeros(len(self.data_set.regions), np.int64)
        for label, count in case.outside.items():
            voxels += count * self.data_set.to_regions(np.full((1, 1, 1), label, np.uint8)).ravel()
        return voxels

    def dry_iter(self) -> list[tio.Subject]:
        """List the subjects without their voxels, as TorchIO's queue demands."""
        return [tio.Subject(name=case.name) for case in self.cases]


def collate_volumes(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items of `Volumes` to a batch; functions, which torch cannot join, become a list."""
    functions = [key for key, value in items[0].items() if callable(value)]
    batch = default_collate(
        [{key: item[key] for key in item if key not in functions} for item in items]
    )
    return batch | {key: [item[key] for item in items] for key in functions}


class PatchQueue(tio.Queue):
    """A TorchIO queue whose n-th patch of an epoch is the same, whichever process asks for it.

    The stock queue moves whole volumes through worker processes into a buffer of patches and takes
    whatever lies there. Here the volumes are memory-mapped, and the page cache of the operating
    system is the buffer: a patch is cut when it is asked for, at the cost of reading it, nothing
    waits for a buffer to fill, and the loader around the queue may have workers.

    Every case is visited equally often: once in each round of patches with a lesion (if it has
    one) and once in each round of the other patches.

    A patch is drawn here and its labels are resampled, as the balance hangs on them. Its image is
    scaled and changed on the device, by `finish_patches`: that is most of the work, and the box
    that a patch shows, in float16, has fewer bytes. Flips cost nothing in the copy out of the
    volume.

    An item, by its key (epoch, index), is a dict with
        `box`: (C, x, y, z), float16: the voxels that the patch shows, flipped as it is;
        `appearance`: see `appearance.draw_appearance`;
        `scale_and_shift`: (C, 2) or (0, 2), float32: see `augmentation.change_intensities`;
        `mask`: (R, X, Y, Z), bool: the regions of the data set;
        `case`: str: name of the case.

    Args:
        cases: Cases of the cache to cut patches from.
        data_set: Turns labels into regions.
        sampler: Draws a patch from a case.
        augmentation: TorchIO transform of a subject with `image` and `labels`. Flips, and
            then one `RandomIntensity` or `RandomAppearance`, cost little. Any other transform runs
            here, on the patch in its final size and in float32, which then is the `box`.
        patches_per_epoch: Length of the queue.
        seed: Seed of the stream of patches.

    Raises:
        InputError: No case has a patch of a kind that the sampler asks for.
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
        # Indices of the cases that can give a patch with a lesion, and one of the other patches.
        self.with_lesion = [index for index, case in enumerate(cases) if len(case.lesion)]
        self.others = list(range(len(cases)))
        if sampler.lesion_free:
            self.others = [
                index
                for index, case in enumerate(cases)
                if sampler.has_lesion_free_patch(case.labels)
            ]
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
        self.balanced_sampler = sampler  # `sampler` is TorchIO's name, of a more general type
        self.augmentation = augmentation
        self.only_draws = can_be_drawn(augmentation)
        self.seed = seed
        every_label = np.arange(256, dtype=np.uint8).reshape(-1, 1, 1)
        self.regions_of_labels = data_set.to_regions(every_label).reshape(-1, 256)
        # Regions are nested, so the more of them have a label, the further inside it lies.
        self.nesting = self.regions_of_labels.sum(0)

    @property
    def iterations_per_epoch(self) -> int:
        return self.max_length

    def __getitem__(self, key: PatchKey | int) -> dict[str, Any]:  # pyright: ignore
        # Lightning's `overfit_batches` replaces our sampler by a plain one, whose keys are indices;
        # they stand for the first epoch.
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sampler = self.balanced_sampler
        case = self.case_of(epoch, index)
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would seed a GPU too or, as long as there is none, note for each
            # call to do so later.
            torch.default_generator.manual_seed(_hashed(self.seed, epoch, index))
            wants_lesion = sampler.wants_lesion(index)
            lesion = sampler.draw_lesion(case) if wants_lesion else case.lesion[:0]
            drawn = sampler.draw_box(case.image, case.labels, lesion, self.nesting)
            if not self.only_draws:
                return self._transformed(case, drawn)
            changes = draw_changes(self.augmentation)  # pyright: ignore[reportArgumentType]
        return {
            "box": torch.from_numpy(cut_flipped(case.image, drawn, sampler.cut, changes.flips)),
            "appearance": changes.appearance,
            "scale_and_shift": changes.scale_and_shift,
            "mask": self._mask(flipped(drawn.labels, changes.flips)),
            "case": case.name,
        }

    def _transformed(self, case: CachedCase, box: Box) -> dict[str, Any]:
        """Return the item of a patch that TorchIO changes."""
        patch: Any = self.augmentation(as_subject(self.balanced_sampler.patch(case.image, box)))
        return {
            "box": patch["image"].data,
            "appearance": UNCHANGED.appearance,
            "scale_and_shift": UNCHANGED.scale_and_shift,
            "mask": self._mask(patch["labels"].data[0].numpy().astype(np.uint8)),
            "case": case.name,
        }

    def _mask(self, labels: np.ndarray) -> Tensor:
        """Turn labels (X, Y, Z) into regions (R, X, Y, Z), bool; only where there are any."""
        mask = np.zeros((len(self.regions_of_labels), *labels.shape), bool)
        inside = grids.bounding_box(labels > 0)
        mask[(slice(None), *inside)] = self.regions_of_labels.take(labels[inside], axis=1)
        return torch.from_numpy(mask)

    def case_of(self, epoch: int, index: int) -> CachedCase:
        """Return the case that patch `index` of an epoch is cut from."""
        wants_lesion = self.balanced_sampler.wants_lesion(index)
        eligible = self.with_lesion if wants_lesion else self.others
        lesion_patches = self.balanced_sampler.lesion_patches_before(index)
        place = lesion_patches if wants_lesion else index - lesion_patches
        visits, position = divmod(place, len(eligible))
        order = _permutation(len(eligible), self.seed, epoch, visits, wants_lesion)
        return self.cases[eligible[order[position]]]


def collate_patches(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items of `PatchQueue` to a batch.

    The boxes differ in size: `boxes` are all their voxels, one after the other, and `sides` the
    shape of each, so that no byte of padding goes to the device. The appearance stays on the host.
    """
    boxes = [item["box"] for item in items]
    appearances = [item["appearance"] for item in items]
    own = ("box", "appearance")
    others = [{key: item[key] for key in item if key not in own} for item in items]
    voxels = [box.flatten() for box in boxes]
    return {
        "boxes": torch.cat(voxels) if len(voxels) > 1 else voxels[0],  # a batch of one: no copy
        "sides": [tuple(box.shape) for box in boxes],
        "appearance": collate_appearances(appearances, len(boxes[0])),
        **default_collate(others),
    }


def finish_patches(batch: dict[str, Any]) -> dict[str, Any]:
    """Scale the images of a batch, then change their intensities, on the device where they are.

    Args:
        batch: What `collate_patches` returns.

    Returns:
        `image`: (B, C, X, Y, Z), float32, with `mask` and `case` as they were.
    """
    size = batch["mask"].shape[2:]
    voxels = batch["boxes"].split([math.prod(shape) for shape in batch["sides"]])
    images = [
        resample_image(box.view(shape), size)
        for box, shape in zip(voxels, batch["sides"], strict=True)
    ]
    image = torch.stack(images) if len(images) > 1 else images[0][None]  # one: no copy
    image = change_appearance(image, batch["appearance"])
    image = change_intensities(image, batch["scale_and_shift"])
    return {"image": image, "mask": batch["mask"], "case": batch["case"]}


class EpochSampler(Sampler[PatchKey]):
    """Yields the keys (epoch, index) of the queue in order; each rank takes whole batches in turn.

    A step of all ranks then has the patches that a step of one process with a batch as large as
    theirs together has. A balance that holds in every run of consecutive patches holds on every
    rank too, which it would not if the ranks took single patches in turn.

    Args:
        patches: Patches that all ranks see together in an epoch. Several ranks leave out, at its
            end, what does not fill a step of all: gradients are averaged over the ranks, so that
            all must have as many patches.
        batch_size: Patches per step and rank.
        rank: Rank of this process.
        ranks: Number of ranks.
    """

    def __init__(self, patches: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.epoch = 0
        step = batch_size * ranks
        if ranks > 1:
            patches -= patches % step
        self.indices = [
            index
            for start in range(rank * batch_size, patches, step)
            for index in range(start, min(start + batch_size, patches))
        ]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the keys; Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[PatchKey]:
        return ((self.epoch, index) for index in self.indices)


def indices_of_rank(cases: int, rank: int, ranks: int) -> list[int]:
    """Return which cases a rank validates or tests, as many for each rank.

    All ranks must take as many steps, so the last ones may begin again with the first cases.
    Metrics tell cases apart by their index, and count each once.
    """
    if not cases:
        return []
    return [index % cases for index in range(rank, cases + -cases % ranks, ranks)]


class PatchDataModule(pl.LightningDataModule):
    """Prepares, splits, caches and serves a data set.

    A training batch is the collated items of `PatchQueue`, a validation or test batch one item of
    `Volumes`, with a leading batch axis B:
        `image`: (B, C, X, Y, Z), float32;
        `mask`: (B, R, X, Y, Z), bool;
        `case`: list of B names;
        and, of whole volumes, `outside`: (B, R), int64, and `index`: (B,), int64;
        and, of test volumes, `on_scan_grid`: list of B functions, see `Volumes`.

    Args:
        data_set: Where cases come from.
        cache: How they are preprocessed, and where the result is kept.
        split: Which cases are for training, validation and testing.
        sampler: How patches are drawn.
        augmentation: TorchIO transform of the patches.
        patches_per_epoch: Patches that all ranks see together in an epoch, see `EpochSampler`.
        batch_size: Patches per step and rank; whole volumes come one by one.
        num_workers: Processes that load patches; their number changes no patch.
        seed: Seed of the stream of patches.

    Raises:
        InputError: Exact batches are asked for that the numbers of patches do not allow.
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
            raise InputError(
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

    @property
    def modalities(self) -> Sequence[str]:
        """Return the modalities: the first channels of every image, in this order."""
        return self.data_set.modalities

    @property
    def regions(self) -> Sequence[str]:
        """Return the regions: the channels of every mask, in this order."""
        return self.data_set.regions

    def prepare_data(self) -> None:
        """Make the data set and the cache on disk; Lightning calls this in one process."""
        self.data_set.prepare()
        self.cache.build(self.data_set.cases(), self.data_set)

    def setup(self, stage: str) -> None:
        """Split the cases that have a mask, and write the split into the folder of the run.

        Raises:
            InputError: There is no mask, or one patient is in two parts.
        """
        self.parts = self.split(with_masks(self.data_set.cases()))
        chosen = [*self.parts.train, *self.parts.validation, *self.parts.test]
        cached = self.cache.build(chosen, self.data_set)
        check_distinct(self.parts, {case.name: case.identity for case in cached})
        if self.trainer is not None and self.trainer.is_global_zero:
            self.parts.write(Path(self.trainer.default_root_dir) / SPLIT_NAME)

    def train_dataloader(self) -> DataLoader[Any]:
        """Serve batches of patches of the training cases."""
        assert self.trainer is not None
        queue = PatchQueue(
            self.cache.build(self.parts.train, self.data_set),
            self.data_set,
            self.sampler,
            self.augmentation,
            self.patches_per_epoch,
            self.seed,
        )
        ranks = self.trainer.world_size
        keys = EpochSampler(len(queue), self.batch_size, self.trainer.global_rank, ranks)
        if not len(keys):
            raise InputError(
                f"patches.per_epoch: expected at least {self.batch_size * ranks}, a batch of "
                f"{self.batch_size} for each of {ranks} devices, found {len(queue)}"
            )
        # A resumed run starts its workers before Lightning tells the sampler the epoch, and before
        # `current_epoch` counts the epoch that the checkpoint ended (pytorch-lightning#21938).
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        keys.set_epoch(progress.processed)
        return DataLoader(
            queue,
            batch_size=self.batch_size,
            sampler=keys,
            collate_fn=collate_patches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Finish a batch of patches on the device of the network; Lightning calls this."""
        return finish_patches(batch) if "boxes" in batch else batch

    def val_dataloader(self) -> DataLoader[Any]:
        """Serve the validation cases as whole volumes, one by one."""
        return self._whole_volumes(self.parts.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Serve the test cases as whole volumes, one by one."""
        return self._whole_volumes(self.parts.test, scan_grids=True)

    def _whole_volumes(self, cases: Sequence[Case], scan_grids: bool = False) -> DataLoader[Any]:
        # No worker: reading a volume is a copy out of the page cache, not worth a process.
        cached = self.cache.build(cases, self.data_set)
        volumes = Volumes(cached, self.data_set, self.sampler.mirrored, scan_grids)
        assert self.trainer is not None
        mine = indices_of_rank(len(cases), self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(Subset(volumes, mine), collate_fn=collate_volumes)


def _hashed(*numbers: int) -> int:
    """Mix several numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@cache
def _permutation(length: int, seed: int, epoch: int, visits: int, lesion: bool) -> list[int]:
    """Return the order of the cases in one round of visits; a round of either kind has its own."""
    generator = np.random.default_rng([seed, epoch, visits, int(lesion)])
    return generator.permutation(length).tolist()
