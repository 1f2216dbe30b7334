"""Patches are a function of (seed, epoch, index), balanced, and the same for any workers."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchio as tio
from torch.utils.data import DataLoader

from datamodules.augmentation import RandomAppearance, RandomIntensity, can_be_drawn
from datamodules.brats import BraTS
from datamodules.cache import Cache
from datamodules.metastases import Metastases
from datamodules.patches import (
    EpochSampler,
    PatchDataModule,
    PatchQueue,
    Volumes,
    collate_patches,
    finish_patches,
    indices_of_rank,
)
from datamodules.sampling import BalancedSampler
from datamodules.splits import FractionSplit, read_names
from errors import InputError
from tests.conftest import write_brats, write_metastases
from tests.datamodules.conftest import lesions_at, wide_parts

FLIP = tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5)
FLIP_AND_INTENSITY = tio.Compose([FLIP, RandomIntensity((0.9, 1.1), (-0.1, 0.1), modalities=4)])


def wide(probability: float, *, mirrored: bool = False) -> tio.Transform:
    """Return what `augmentation=wide` does, at other probabilities."""
    parts = wide_parts(probability)
    return tio.Compose([FLIP, RandomAppearance(parts, modalities=4, mirrored=mirrored)])


def queue(
    brats: Path,
    cache_root: Path,
    *,
    share: float = 0.5,
    seed: int = 0,
    augmentation: tio.Transform = FLIP_AND_INTENSITY,
) -> PatchQueue:
    """Make a queue of 24 patches an epoch, from the cases of a BraTS folder."""
    data_set = BraTS(brats)
    cases = Cache(cache_root, spacing_mm=1, crop="brain").build(data_set.cases(), data_set)
    sampler = BalancedSampler(8, lesion_share=share, scale=(0.9, 1.1))
    return PatchQueue(cases, data_set, sampler, augmentation, patches_per_epoch=24, seed=seed)


def stream(patches: PatchQueue, *, workers: int = 0, epoch: int = 0, batch_size: int = 4) -> list:
    keys = EpochSampler(len(patches), batch_size)
    keys.set_epoch(epoch)
    loader = DataLoader(
        patches, batch_size, sampler=keys, num_workers=workers, collate_fn=collate_patches
    )
    return [finish_patches(batch) for batch in loader]


def finished(patches: PatchQueue, epoch: int, index: int) -> dict[str, Any]:
    """Return one patch as a network sees it."""
    batch = finish_patches(collate_patches([patches[epoch, index]]))
    return {name: values[0] for name, values in batch.items()}


def same(first: list, second: list) -> bool:
    return all(
        torch.equal(a["image"], b["image"])
        and torch.equal(a["mask"], b["mask"])
        and a["case"] == b["case"]
        for a, b in zip(first, second, strict=True)
    )


def test_it_is_a_torchio_queue(brats: Path, cache_root: Path):
    patches = queue(brats, cache_root)
    assert isinstance(patches, tio.Queue)
    assert len(patches) == patches.iterations_per_epoch == 24
    assert patches.num_subjects == 6


def test_batches_hold_what_the_network_needs(brats: Path, cache_root: Path):
    (batch, *others) = stream(queue(brats, cache_root))
    assert len(others) == 5
    assert batch["image"].shape == (4, 4, 8, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (4, 3, 8, 8, 8)
    assert batch["mask"].dtype == torch.bool
    wt, tc, et = batch["mask"].unbind(1)
    assert (tc <= wt).all()
    assert (et <= tc).all()


def test_share_of_lesion_patches_reaches_the_batches(brats: Path, cache_root: Path):
    for batch in stream(queue(brats, cache_root, share=0.5)):
        assert batch["mask"][1::2, 0].flatten(1).any(1).all()
    for batch in stream(queue(brats, cache_root, share=1)):
        assert batch["mask"][:, 0].flatten(1).any(1).all()


@pytest.mark.parametrize("augmentation", [FLIP_AND_INTENSITY, wide(0.3)])
def test_worker_processes_change_nothing(
    brats: Path, cache_root: Path, augmentation: tio.Transform
):
    patches = queue(brats, cache_root, augmentation=augmentation)
    assert same(stream(patches), stream(patches, workers=2))


def test_global_random_state_changes_nothing_and_is_left_alone(brats: Path, cache_root: Path):
    patches = queue(brats, cache_root)
    torch.manual_seed(1)
    first, after = finished(patches, 0, 3), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert same([first], [finished(patches, 0, 3)])


def test_seed_and_epoch_change_everything(brats: Path, cache_root: Path):
    patches = queue(brats, cache_root)
    first = stream(patches)
    for other in (stream(patches, epoch=1), stream(queue(brats, cache_root, seed=1))):
        assert not any(
            torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True)
        )


def test_augmentation_moves_image_and_mask_together(tmp_path: Path):
    """The tumour is bright in FLAIR, before and after flips, and the mask covers it."""
    data_set = BraTS(write_brats(tmp_path / "data", cases=2))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    sampler = BalancedSampler(12, lesion_share=1)
    patches = PatchQueue(cases, data_set, sampler, FLIP, patches_per_epoch=20, seed=0)
    for index in range(20):
        patch = finished(patches, 0, index)
        # The z-scores are about -0.4 in healthy tissue and 0.6 or more in the tumour.
        bright = patch["image"][3] > 0.1
        assert torch.equal(bright, patch["mask"][0])


def test_every_axis_is_flipped_in_about_half_of_the_patches(tmp_path: Path):
    data_set = BraTS(write_brats(tmp_path / "data", cases=1, shape=(12, 12, 12)))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    shape = cases[0].labels.shape
    sampler = BalancedSampler(shape)
    plain = sampler.draw(cases[0].image, cases[0].labels, cases[0].lesion).image
    patches = PatchQueue(cases, data_set, sampler, FLIP, patches_per_epoch=80, seed=0)
    seen = Counter()
    for index in range(80):
        image = finished(patches, 0, index)["image"]
        flips = [
            axes
            for axes in product((False, True), repeat=3)
            if torch.equal(image, plain.flip([1 + axis for axis in range(3) if axes[axis]]))
        ]
        assert len(flips) == 1
        seen[flips[0]] += 1
    assert len(seen) == 8
    assert all(abs(sum(n for axes, n in seen.items() if axes[axis]) - 40) < 18 for axis in range(3))


def test_intensities_change_in_the_brain_and_masks_do_not(brats: Path, cache_root: Path):
    changed = queue(brats, cache_root)
    plain = queue(brats, cache_root, augmentation=tio.Compose([FLIP]))
    for index in range(24):
        before, after = finished(plain, 0, index), finished(changed, 0, index)
        assert torch.equal(before["mask"], after["mask"])
        assert torch.equal(before["image"] == 0, after["image"] == 0)
        assert not torch.equal(before["image"], after["image"])


@pytest.mark.parametrize(
    "sampler",
    [
        BalancedSampler(8, scale=(0.7, 1.3)),
        BalancedSampler((8, 10, 9), scale=(0.9, 1.1), mirrored=True),
        BalancedSampler(10, scale=(0.8, 1.2), others="lesion_free", halo=3),
        BalancedSampler(8),
    ],
)
@pytest.mark.parametrize("probability", [1, 0.5])
@pytest.mark.parametrize("is_wide", [False, True])
def test_a_patch_is_what_torchio_makes_of_it(
    brats: Path, cache_root: Path, sampler: BalancedSampler, probability: float, is_wide: bool
):
    """A function is no TorchIO transform, so that the queue resamples, and calls it, first."""
    data_set = BraTS(brats)
    cases = Cache(cache_root, spacing_mm=1, crop="brain").build(data_set.cases(), data_set)
    intensity = RandomIntensity((0.9, 1.1), (-0.1, 0.1), 4, mirrored=sampler.mirrored)
    spatial = tio.Compose([FLIP, tio.RandomFlip(axes=(0, 2))], p=probability)
    augmentation = tio.Compose([spatial, intensity, FLIP])
    if is_wide:
        augmentation = tio.Compose([spatial, wide(0.3, mirrored=sampler.mirrored)])
    drawn = PatchQueue(cases, data_set, sampler, augmentation, 24, seed=0)
    called = PatchQueue(cases, data_set, sampler, lambda subject: augmentation(subject), 24, seed=0)
    assert drawn[0, 0]["box"].dtype == torch.float16
    for index in range(24):
        found, expected = finished(drawn, 0, index), finished(called, 0, index)
        assert torch.equal(called[0, index]["box"], expected["image"])
        assert torch.equal(found["mask"], expected["mask"])
        assert found["case"] == expected["case"]
        # Positions are float32: a flip rounds them otherwise, and neighbours differ by up to 10.
        atol = 1e-3 if is_wide else 1e-4  # stronger contrast makes more of it
        torch.testing.assert_close(found["image"], expected["image"], atol=atol, rtol=0)


@pytest.mark.parametrize("augmentation", [FLIP_AND_INTENSITY, wide(0.3)])
def test_patches_of_a_batch_are_those_alone(
    brats: Path, cache_root: Path, augmentation: tio.Transform
):
    patches = queue(brats, cache_root, augmentation=augmentation)
    boxes = [tuple(patches[0, index]["box"].shape) for index in range(24)]
    assert len(set(boxes)) > 1
    for number, batch in enumerate(stream(patches, batch_size=8)):
        for item in range(8):
            alone = finished(patches, 0, 8 * number + item)
            assert torch.equal(batch["image"][item], alone["image"])
            assert torch.equal(batch["mask"][item], alone["mask"])


@pytest.mark.parametrize(
    ("augmentation", "drawn"),
    [
        (FLIP_AND_INTENSITY, True),
        (wide(1), True),
        (tio.Compose([wide(1), FLIP]), False),
        (tio.Compose([wide(1), RandomIntensity((1, 1), (0, 0), 4)]), False),
        (tio.Compose([]), True),
        (tio.RandomFlip(axes=("LR",)), False),
        (tio.Compose([FLIP_AND_INTENSITY, RandomIntensity((1, 1), (0, 0), 4)]), False),
        (tio.Compose([FLIP, tio.RandomNoise()]), False),
        (tio.RandomFlip(include=["image"]), False),
    ],
)
def test_only_flips_and_intensities_are_left_to_the_device(augmentation: Any, drawn: bool):
    assert can_be_drawn(augmentation) == drawn


def test_a_wide_augmentation_of_probability_0_is_that_of_the_papers_flips(
    brats: Path, cache_root: Path
):
    nothing = wide(0)
    flips = queue(brats, cache_root, augmentation=tio.Compose([FLIP]))
    assert same(stream(queue(brats, cache_root, augmentation=nothing)), stream(flips))


def test_a_wide_augmentation_changes_images_in_the_brain_and_masks_not(
    brats: Path, cache_root: Path
):
    plain = stream(queue(brats, cache_root, augmentation=tio.Compose([FLIP])), batch_size=24)[0]
    changed = stream(queue(brats, cache_root, augmentation=wide(0.3)), batch_size=24)[0]
    assert torch.equal(plain["mask"], changed["mask"])
    before, after = plain["image"], changed["image"]
    brain = before.any(1, keepdim=True)  # a copied modality brings a background of its own
    assert not after[~brain.expand_as(after)].any()
    assert sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)) > 20
    channels = after.flatten(2).any(2)
    assert not channels.all()  # a modality is missing
    assert channels.any(1).all()


def test_any_other_transform_runs_in_the_loader(brats: Path, cache_root: Path):
    noise = tio.RandomNoise(mean=(100, 100), std=(0, 0))
    plain = queue(brats, cache_root, augmentation=tio.Compose([]))
    noisy = queue(brats, cache_root, augmentation=noise)
    assert noisy[0, 3]["box"].dtype == torch.float32
    before, after = finished(plain, 0, 3)["image"], finished(noisy, 0, 3)["image"]
    torch.testing.assert_close(after, before + 100)


def test_the_queue_tells_the_sampler_how_regions_are_nested(
    brats: Path, cache_root: Path, metastases: Path, tmp_path: Path
):
    nesting = queue(brats, cache_root).nesting
    assert nesting[[0, 2, 1, 4]].tolist() == [0, 1, 2, 3]
    assert queue_of(metastases, tmp_path, BalancedSampler(8), 8).nesting[:2].tolist() == [0, 1]


def test_every_case_is_visited_equally_often(brats: Path, cache_root: Path):
    patches = queue(brats, cache_root)
    visits = Counter(
        (patches.case_of(0, index).name, patches.balanced_sampler.wants_lesion(index))
        for index in range(24)
    )
    assert set(visits.values()) == {2}  # 12 patches of either kind from 6 cases
    assert len(visits) == 12


def test_cases_without_lesions_give_patches_without(tmp_path: Path):
    data_set = BraTS(write_brats(tmp_path / "data", cases=3))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    cases[0].__dict__["lesion"] = np.empty(0, np.int32)  # as if it had none
    patches = PatchQueue(cases, data_set, BalancedSampler(8), FLIP, 12, seed=0)
    lesion_visits = {patches.case_of(0, index).name for index in range(1, 12, 2)}
    assert cases[0].name not in lesion_visits
    assert len(lesion_visits) == 2


def test_a_share_of_lesions_without_any_lesion_is_refused(tmp_path: Path):
    data_set = BraTS(write_brats(tmp_path / "data", cases=2, with_masks=False))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    with pytest.raises(InputError, match=r"lesion_share: 0.5 .* none of the 2 training cases"):
        PatchQueue(cases, data_set, BalancedSampler(8), FLIP, 12, seed=0)


@pytest.mark.parametrize(
    ("patches", "batch_size", "ranks"),
    [(24, 4, 1), (26, 4, 1), (24, 4, 2), (26, 4, 2), (26, 4, 3), (40, 4, 3)],
)
def test_ranks_share_the_batches_of_an_epoch(patches: int, batch_size: int, ranks: int):
    samplers = [EpochSampler(patches, batch_size, rank, ranks) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(3)
    keys = [list(sampler) for sampler in samplers]
    together = [key for rank in keys for key in rank]
    assert len(set(together)) == len(together)
    assert {epoch for epoch, _ in together} == {3}
    steps = {-(-len(rank) // batch_size) for rank in keys}
    assert len(steps) == 1  # ranks wait for each other at every step
    if ranks == 1:
        assert [index for _, index in together] == list(range(patches))
    for step in range(steps.pop()):  # as in one process with batches as large as theirs together
        taken = [index for rank in keys for _, index in rank[step * batch_size :][:batch_size]]
        first = step * batch_size * ranks
        assert taken == list(range(patches))[first : first + batch_size * ranks]
    for rank in keys:  # batches are whole: the balance of a run of patches holds
        for start in range(0, len(rank) - batch_size, batch_size):
            batch = [index for _, index in rank[start : start + batch_size]]
            assert batch == list(range(batch[0], batch[0] + batch_size))


@pytest.mark.parametrize(("cases", "ranks"), [(6, 1), (6, 2), (7, 2), (2, 3), (1, 4), (0, 2)])
def test_ranks_share_the_cases_and_take_as_many_steps(cases: int, ranks: int):
    shares = [indices_of_rank(cases, rank, ranks) for rank in range(ranks)]
    assert {index for share in shares for index in share} == set(range(cases))
    assert {len(share) for share in shares} == {-(-cases // ranks)}


def data_module(brats: Path, cache_root: Path) -> PatchDataModule:
    return PatchDataModule(
        BraTS(brats),
        Cache(cache_root, 1, "brain"),
        FractionSplit(validation=0.17, test=0.34, seed=3),
        BalancedSampler(8),
        FLIP,
        patches_per_epoch=6,
        batch_size=2,
    )


def test_whole_volumes_are_never_augmented(brats: Path, cache_root: Path, tmp_path: Path):
    module = data_module(brats, cache_root)
    module.augmentation = wide(1)
    module.trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module.setup("fit")
    for loader, cases in (
        (module.val_dataloader(), module.parts.validation),
        (module.test_dataloader(), module.parts.test),
    ):
        cached = module.cache.build(cases, module.data_set)
        for case, batch in zip(cached, loader, strict=True):
            image = module.on_after_batch_transfer(batch, 0)["image"][0]
            assert torch.equal(image, torch.from_numpy(case.image.astype(np.float32)))


def test_whole_volumes_for_validation_and_test(brats: Path, cache_root: Path, tmp_path: Path):
    module = data_module(brats, cache_root)
    assert module.modalities == ("t1", "t1ce", "t2", "flair")
    assert module.regions == ("WT", "TC", "ET")
    module.trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module.prepare_data()
    module.setup("fit")
    sizes = [len(loader) for loader in (module.val_dataloader(), module.test_dataloader())]
    assert sizes == [1, 2]
    written = read_names(tmp_path / "split.json")
    assert [len(written[part]) for part in ("train", "validation", "test")] == [3, 1, 2]
    batch = next(iter(module.test_dataloader()))
    assert batch["case"] == [written["test"][0]]
    assert batch["image"].shape[2:] == batch["mask"].shape[2:]
    assert batch["outside"].tolist() == [[0, 0, 0]]


def test_test_cases_alone_are_served_with_the_grid_of_their_scan(
    brats: Path, cache_root: Path, tmp_path: Path
):
    """The scan's truth is the mask on disk, and a prediction of the truth comes to lie on it."""
    module = data_module(brats, cache_root)
    module.trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module.prepare_data()
    module.setup("test")
    assert "on_scan_grid" not in next(iter(module.val_dataloader()))
    batch = next(iter(module.test_dataloader()))
    seen = batch["mask"][0].float().numpy()
    probabilities, truth, spacing_mm = batch["on_scan_grid"][0](seen)
    name = batch["case"][0]
    labels = np.asanyarray(nib.load(brats / name / f"{name}_seg.nii.gz").dataobj)
    assert seen.shape[1:] != labels.shape  # the crop is smaller than the scan
    np.testing.assert_array_equal(truth[0], labels > 0)
    np.testing.assert_array_equal(probabilities, truth)
    assert spacing_mm == (1, 1, 1)


def test_resumed_epoch_starts_where_it_should(brats: Path, cache_root: Path, tmp_path: Path):
    """Lightning tells the sampler the epoch after the first workers have started (#21938)."""
    module = data_module(brats, cache_root)
    module.trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module.setup("fit")
    module.trainer.fit_loop.epoch_progress.current.processed = 4
    loader = module.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    assert next(iter(loader.sampler)) == (4, 0)


def test_a_rank_reads_its_own_share_of_the_cases(brats: Path, cache_root: Path, tmp_path: Path):
    module = data_module(brats, cache_root)
    module.setup("fit")
    shares = {}
    for devices in (1, 2):
        module.trainer = pl.Trainer(
            default_root_dir=tmp_path, logger=False, accelerator="cpu", devices=devices
        )
        volumes = [*module._whole_volumes(module.parts.train)]
        shares[devices] = [index for volume in volumes for index in volume["index"].tolist()]
    assert shares[1] == list(range(len(module.parts.train)))
    assert shares[2] == shares[1][::2]  # rank 0 of two


def test_an_epoch_without_a_step_is_refused(brats: Path, cache_root: Path, tmp_path: Path):
    module = data_module(brats, cache_root)
    module.patches_per_epoch = 0
    module.trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module.setup("fit")
    with pytest.raises(InputError, match=r"per_epoch: expected at least 2, .* 1 devices, found 0"):
        module.train_dataloader()


def test_voxels_outside_the_crop_are_counted_by_region(tmp_path: Path):
    data_set = BraTS(write_brats(tmp_path / "data", cases=1))
    cases = Cache(tmp_path / "cache", 1, crop=[6, 6, 6]).build(data_set.cases(), data_set)
    volumes = Volumes(cases, data_set)
    uncropped = Cache(tmp_path / "cache", 1, crop="brain").build(data_set.cases(), data_set)
    whole = data_set.to_regions(uncropped[0].labels).sum((1, 2, 3))
    seen = volumes[0]
    assert (seen["mask"].sum((1, 2, 3)) + seen["outside"]).tolist() == whole.tolist()
    assert seen["outside"][0] > 0


def test_nothing_is_outside_of_a_case_without_lesions(tmp_path: Path):
    data_set = BraTS(write_brats(tmp_path / "data", cases=1, with_masks=False))
    cases = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases(), data_set)
    assert Volumes(cases, data_set)[0]["outside"].tolist() == [0, 0, 0]


# Lesion-free patches: batches that are exactly half


def queue_of(
    root: Path, tmp_path: Path, sampler: BalancedSampler, patches: int, seed: int = 0
) -> PatchQueue:
    data_set = Metastases(root)
    cached = Cache(tmp_path / "cache", 1, "brain", workers=1).build(data_set.cases(), data_set)
    return PatchQueue(cached, data_set, sampler, lambda subject: subject, patches, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.8, 1.2)])
@pytest.mark.parametrize(("lesion_in", "margin"), [("output", 4), ("patch", 0)])
@pytest.mark.parametrize("uniform_over", ["voxels", "lesions"])
def test_every_batch_is_exactly_half(
    metastases: Path,
    tmp_path: Path,
    seed: int,
    scale: tuple,
    lesion_in: str,
    margin: int,
    uniform_over: str,
):
    sampler = BalancedSampler(
        12,
        scale=scale,
        others="lesion_free",
        halo=4,
        lesion_in=lesion_in,
        uniform_over=uniform_over,
    )
    queue = queue_of(metastases, tmp_path, sampler, 96, seed)
    inside = (..., *[slice(margin, 12 - margin)] * 3)
    for epoch in (0, 5):
        has_lesion = [bool(finished(queue, epoch, i)["mask"][inside].any()) for i in range(96)]
        assert has_lesion == [sampler.wants_lesion(i) for i in range(96)]
        for batch_size in (2, 4, 6, 16):
            for start in range(0, 96, batch_size):
                assert sum(has_lesion[start : start + batch_size]) == batch_size // 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_batch_of_every_rank_is_exactly_half(ranks: int):
    sampler = BalancedSampler(12, others="lesion_free")
    for rank in range(ranks):
        indices = [index for _, index in EpochSampler(96, 8, rank, ranks)]
        assert indices
        for start in range(0, len(indices), 8):
            assert sum(map(sampler.wants_lesion, indices[start : start + 8])) == 4


def test_cases_without_a_kind_give_the_other(metastases: Path, tmp_path: Path):
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    queue = queue_of(metastases, tmp_path, sampler, 200)
    names = {True: set(), False: set()}
    for index in range(200):
        names[sampler.wants_lesion(index)].add(queue[0, index]["case"])
    assert names[True] == {"corners", "everywhere", "many", "middle"}
    assert names[False] == {"corners", "many", "middle", "none"}


def test_what_cannot_be_balanced_is_refused(metastases: Path, tmp_path: Path):
    (tmp_path / "free").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "free" / "none").symlink_to(metastases / "none")
    (tmp_path / "full" / "everywhere").symlink_to(metastases / "everywhere")
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    with pytest.raises(InputError, match="none of the 1 training cases has one"):
        queue_of(tmp_path / "free", tmp_path, sampler, 8)
    with pytest.raises(InputError, match="every patch of 12 voxels in each of the 1 training"):
        queue_of(tmp_path / "full", tmp_path, sampler, 8)
    with pytest.raises(ValueError, match=r"batch_size: .* exactly 0.5 with a lesion"):
        PatchDataModule(None, None, None, sampler, None, 96, batch_size=3)  # pyright: ignore


def test_small_lesions_are_as_likely_as_large_ones(tmp_path: Path):
    labels = lesions_at((3, 3, 3))
    labels[12:20, 12:20, 12:20] = 1
    write_metastases(tmp_path / "a", labels)
    counts = {}
    for uniform_over in ("voxels", "lesions"):
        sampler = BalancedSampler(4, lesion_share=1, uniform_over=uniform_over)  # pyright: ignore
        queue = queue_of(tmp_path, tmp_path, sampler, 200)
        drawn = [finished(queue, 0, index)["mask"] for index in range(200)]
        counts[uniform_over] = sum(int(mask.sum()) == 1 and True for mask in drawn)
    assert counts["voxels"] < 30
    assert 70 < counts["lesions"] < 150
