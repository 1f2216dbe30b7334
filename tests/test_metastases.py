"""Metastasis data: folders, labels, phantoms, and the balance of their patches."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from datamodules.cache import Cache
from datamodules.cases import Case
from datamodules.metastases import Metastases
from datamodules.patches import EpochSampler, PatchDataModule, PatchQueue
from datamodules.phantom import (
    LARGEST_METASTASIS_MM,
    MOST_METASTASES,
    MetastasisPhantoms,
    make_phantom,
    write_phantoms,
)
from datamodules.sampling import BalancedSampler
from errors import InputError
from lightning_modules.metrics.lesions import components

AFFINE = np.eye(4)


def write_case(folder: Path, labels: np.ndarray, prefix: str = "") -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = (100 + rng.standard_normal(labels.shape) * 5 + 80 * labels).astype(np.int16)
    nib.save(nib.Nifti1Image(image, AFFINE), folder / f"{prefix}t1ce.nii.gz")
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), AFFINE), folder / f"{prefix}seg.nii.gz")


def lesions_at(*voxels: tuple[int, int, int], side: int = 28) -> np.ndarray:
    labels = np.zeros((side,) * 3, np.uint8)
    for voxel in voxels:
        labels[voxel] = 1
    return labels


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lesions in the middle, at corners, many, none; and one that leaves no box without."""
    root = tmp_path_factory.mktemp("metastases")
    rng = np.random.default_rng(3)
    many = (rng.random((28, 28, 28)) < 0.002).astype(np.uint8)
    everywhere = np.zeros((28, 28, 28), np.uint8)
    everywhere[::3, ::3, ::3] = 1
    for name, labels in {
        "middle": lesions_at((14, 14, 14)),
        "corners": lesions_at((0, 0, 0), (27, 27, 27), (0, 27, 13)),
        "many": many,
        "none": lesions_at(),
        "everywhere": everywhere,
    }.items():
        write_case(root / name, labels)
    return root


def queue_of(
    root: Path, tmp_path: Path, sampler: BalancedSampler, patches: int, seed: int = 0
) -> PatchQueue:
    data_set = Metastases(root)
    cached = Cache(tmp_path / "cache", 1, "brain", workers=1).build(data_set.cases(), data_set)
    return PatchQueue(cached, data_set, sampler, lambda subject: subject, patches, seed)


def test_reads_both_ways_to_name_files(tmp_path: Path):
    write_case(tmp_path / "a", lesions_at())
    write_case(tmp_path / "b", lesions_at(), prefix="b_")
    cases = Metastases(tmp_path).cases()
    assert [case.name for case in cases] == ["a", "b"]
    assert cases[1].images["t1ce"].name == "b_t1ce.nii.gz"
    assert all(case.mask for case in cases)


def test_without_mask_is_a_case_to_predict(tmp_path: Path):
    write_case(tmp_path / "a", lesions_at())
    (tmp_path / "a" / "seg.nii.gz").unlink()
    assert Metastases(tmp_path).cases()[0].mask is None


def test_numbered_lesions_are_lesions_and_other_labels_are_refused():
    case = Case("a", {}, Path("a/seg.nii.gz"))
    data_set = Metastases("anywhere")
    labels = np.array([[[0, 1, 7]]], np.float32)
    assert data_set.canonical_labels(labels, case).tolist() == [[[0, 1, 1]]]
    for wrong in (-1, 0.5):
        with pytest.raises(InputError, match=r"a/seg.nii.gz: expected whole numbers"):
            data_set.canonical_labels(np.array([[[wrong]]], np.float32), case)


def test_user_errors_name_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        Metastases(tmp_path / "nowhere").cases()
    with pytest.raises(InputError, match="no case found"):
        Metastases(tmp_path).cases()
    with pytest.raises(InputError, match="modalities: expected a choice of t1ce"):
        Metastases(tmp_path, ["t1c"])
    write_case(tmp_path / "a", lesions_at())
    with pytest.raises(InputError, match=r"expected t1.nii.gz, found seg, t1ce"):
        Metastases(tmp_path, ["t1ce", "t1"]).cases()
    write_case(tmp_path / "b", lesions_at())
    (tmp_path / "b" / "b-t1ce.nii").write_bytes(b"")
    with pytest.raises(InputError, match="its t1ce is there twice"):
        Metastases(tmp_path).cases()


# --- exactly half --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.8, 1.2)])
@pytest.mark.parametrize(("region", "margin"), [("output", 4), ("patch", 0)])
@pytest.mark.parametrize("uniform_over", ["voxels", "lesions"])
def test_every_batch_is_exactly_half(
    root: Path, tmp_path: Path, seed: int, scale: tuple, region: str, margin: int, uniform_over: str
):
    sampler = BalancedSampler(
        12, scale=scale, others="lesion_free", halo=4, region=region, uniform_over=uniform_over  # pyright: ignore
    )  # fmt: skip
    queue = queue_of(root, tmp_path, sampler, 96, seed)
    inside = (..., *[slice(margin, 12 - margin)] * 3)
    for epoch in (0, 5):
        has_lesion = [bool(queue[epoch, i]["mask"][inside].any()) for i in range(96)]
        assert has_lesion == [sampler.wants_lesion(i) for i in range(96)]
        for batch_size in (2, 4, 6, 16):
            for start in range(0, 96, batch_size):
                assert sum(has_lesion[start : start + batch_size]) == batch_size // 2


def test_no_random_volume_gives_a_mislabelled_patch():
    """Volumes, lesions, patches, halos and scales at random: what is asked for is what comes."""
    rng = np.random.default_rng(0)
    kinds = {True: 0, False: 0}
    for seed in range(150):
        torch.manual_seed(seed)
        shape = tuple(rng.integers(5, 26, 3))
        labels = (rng.random(shape) < rng.choice([0.0, 0.001, 0.01, 0.1])).astype(np.uint8)
        image = rng.standard_normal((1, *shape)).astype(np.float16)
        halo = int(rng.integers(0, 4))
        side = int(rng.integers(1, 9)) + 2 * halo
        region = str(rng.choice(["output", "patch"]))
        scale = (1.0, 1.0) if rng.random() < 0.3 else (0.7, 1.4)
        sampler = BalancedSampler(
            side, scale=scale, others="lesion_free", halo=halo, region=region  # pyright: ignore
        )  # fmt: skip
        margin = halo if region == "output" else 0
        inside = (slice(margin, side - margin),) * 3
        if labels.any():
            kinds[True] += 1
            patch = sampler.draw(image, labels, np.flatnonzero(labels))
            assert patch.labels[inside].any()
        if sampler.can_avoid(labels):
            kinds[False] += 1
            assert not sampler.draw(image, labels, labels[:0]).labels[inside].any()
    assert min(kinds.values()) > 80


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_batch_of_every_rank_is_exactly_half(ranks: int):
    sampler = BalancedSampler(12, others="lesion_free")
    for rank in range(ranks):
        indices = [index for _, index in EpochSampler(96, 8, rank, ranks)]
        assert indices
        for start in range(0, len(indices), 8):
            assert sum(map(sampler.wants_lesion, indices[start : start + 8])) == 4


def test_cases_without_a_kind_give_the_other(root: Path, tmp_path: Path):
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    queue = queue_of(root, tmp_path, sampler, 200)
    names = {True: set(), False: set()}
    for index in range(200):
        names[sampler.wants_lesion(index)].add(queue[0, index]["case"])
    assert names[True] == {"corners", "everywhere", "many", "middle"}
    assert names[False] == {"corners", "many", "middle", "none"}


def test_what_cannot_be_balanced_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "free").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "free" / "none").symlink_to(root / "none")
    (tmp_path / "full" / "everywhere").symlink_to(root / "everywhere")
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    with pytest.raises(InputError, match="none of the 1 training cases has one"):
        queue_of(tmp_path / "free", tmp_path, sampler, 8)
    with pytest.raises(InputError, match="every patch of 12 voxels in each of the 1 training"):
        queue_of(tmp_path / "full", tmp_path, sampler, 8)
    with pytest.raises(ValueError, match=r"batch_size: .* exactly 0.5 with a lesion"):
        PatchDataModule(None, None, None, sampler, None, 96, batch_size=3)  # pyright: ignore


def test_free_starts_are_all_that_a_naive_search_finds(root: Path):
    sampler = BalancedSampler(12, others="lesion_free", halo=4)
    labels = (np.random.default_rng(0).random((9, 8, 10)) < 0.03).astype(np.uint8)
    padded = np.pad(labels, 4)
    naive = [
        (x - 4, y - 4, z - 4)
        for x in range(9 - 4 + 1)
        for y in range(8 - 4 + 1)
        for z in range(10 - 4 + 1)
        if not padded[x + 4 : x + 8, y + 4 : y + 8, z + 4 : z + 8].any()
    ]
    assert 0 < len(naive) < 6 * 5 * 7
    assert list(map(tuple, sampler._free_starts(labels).tolist())) == naive


def test_a_volume_that_is_nearly_full_still_gives_its_free_box():
    labels = np.ones((12, 12, 12), np.uint8)
    labels[3:7, 5:9, 8:12] = 0
    sampler = BalancedSampler(4, others="lesion_free", scale=(0.9, 1.1))
    image = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij")).astype(np.float16)
    for seed in range(5):
        torch.manual_seed(seed)
        patch = sampler.draw(image, labels, labels[:0])
        assert not patch.labels.any()
        assert patch.image[:, 0, 0, 0].tolist() == [3, 5, 8]
    with pytest.raises(ValueError, match="every patch of this volume"):
        sampler.draw(image, np.ones_like(labels), labels[:0])


def test_small_lesions_are_as_likely_as_large_ones(tmp_path: Path):
    labels = lesions_at((3, 3, 3))
    labels[12:20, 12:20, 12:20] = 1
    write_case(tmp_path / "a", labels)
    counts = {}
    for uniform_over in ("voxels", "lesions"):
        sampler = BalancedSampler(4, lesion_share=1, uniform_over=uniform_over)  # pyright: ignore
        queue = queue_of(tmp_path, tmp_path, sampler, 200)
        drawn = [queue[0, index]["mask"] for index in range(200)]
        counts[uniform_over] = sum(int(mask.sum()) == 1 and True for mask in drawn)
    assert counts["voxels"] < 30
    assert 70 < counts["lesions"] < 150


def test_halo_may_reach_beyond_the_volume_but_the_output_not():
    labels = lesions_at((0, 0, 0), side=10)
    image = np.ones((1, 10, 10, 10), np.float16)
    sampler = BalancedSampler(12, halo=4)
    for seed in range(20):
        torch.manual_seed(seed)
        patch = sampler.draw(image, labels, np.flatnonzero(labels))
        assert patch.image[0, 4:8, 4:8, 4:8].all()
        assert patch.labels[4, 4, 4] == 1
        assert not patch.image[0, :4].any()


def test_lesions_of_a_case_are_its_components(root: Path, tmp_path: Path):
    data_set = Metastases(root)
    for case in Cache(tmp_path / "c", 1, "brain", workers=1).build(data_set.cases(), data_set):
        numbered, count = components(case.labels > 0)
        assert len(case.lesions) == count
        for lesion in case.lesions:
            numbers = set(numbered.ravel()[lesion])
            assert len(numbers) == 1
            assert len(lesion) == (numbered == numbers.pop()).sum()


# --- phantoms ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms() -> list:
    return [make_phantom(0, index, 3.0, "metastases", ["t1ce"]) for index in range(10)]


def test_phantoms_have_none_to_a_dozen_lesions(phantoms: list):
    counts = [components(case.labels > 0)[1] for case in phantoms]
    assert max(counts) <= MOST_METASTASES
    assert len(set(counts)) > 2
    for case in phantoms:
        assert set(np.unique(case.labels)) <= {0, 1}
        assert list(case.images) == ["t1ce"]
        assert case.grade == ""
        largest = 4 / 3 * np.pi * (LARGEST_METASTASIS_MM + 2) ** 3 / 3**3
        numbered, count = components(case.labels > 0)
        # Two that touch are one component.
        assert all((numbered == n).sum() < 2 * largest for n in range(1, count + 1))


def test_metastases_enhance(phantoms: list):
    for case in phantoms:
        if case.labels.sum() > 10:
            image = case.images["t1ce"].astype(float)
            brain = np.median(image[(image > 0) & (case.labels == 0)])
            assert np.percentile(image[case.labels > 0], 75) > 1.05 * brain


def test_modalities_do_not_change_each_other():
    one = make_phantom(0, 1, 6.0, "metastases", ["t1ce"])
    two = make_phantom(0, 1, 6.0, "metastases", ["flair", "t1ce"])
    np.testing.assert_array_equal(one.images["t1ce"], two.images["t1ce"])
    np.testing.assert_array_equal(one.labels, two.labels)


def test_phantoms_are_written_and_read_as_a_data_set(tmp_path: Path):
    data_set = MetastasisPhantoms(tmp_path / "mets", count=2, spacing_mm=6)
    data_set.prepare()
    cases = data_set.cases()
    assert [case.name for case in cases] == ["phantom_0000", "phantom_0001"]
    volume = Cache(tmp_path / "cache", 6, "brain", workers=1).build(cases, data_set)[0]
    assert volume.image.shape[0] == 1
    with pytest.raises(InputError, match="glioma"):
        write_phantoms(tmp_path / "mets", 2, spacing_mm=6, seed=0)
