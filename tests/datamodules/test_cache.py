"""The cache on disk: what is in it, when it is made anew, and that processes share the work."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from datamodules import cache as cache_module
from datamodules.brats import BraTS
from datamodules.cache import Cache
from datamodules.cases import Case
from datamodules.metastases import Metastases
from datamodules.nifti import identify
from datamodules.preprocessing import Preprocessing
from errors import InputError
from tests.conftest import MODALITIES, affine_of, make_arrays, write_case, write_image


def fails(message):
    return pytest.raises(InputError, match=f"^{message}$")


@pytest.fixture
def data_set(tmp_path):
    """Three cases: a tumour, a mask without one, no mask."""
    for seed, name in enumerate("ABC"):
        images, labels, _ = make_arrays(seed=seed)
        mask = {"A": labels, "B": np.zeros_like(labels), "C": None}[name]
        write_case(tmp_path / "data" / name, images, mask, affine_of("LPS"), f"{name}_")
    return BraTS(tmp_path / "data")


def written(folder):
    """Path -> time of last change, for every array in a cache."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.npy"))}


def age(path):
    """Make a file look changed."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_what_is_cached_is_what_preprocessing_makes(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, (14, 10, 12), workers=2)
    cases = data_set.cases()
    cached = cache.build(cases[::-1], data_set)

    assert [case.name for case in cached] == ["C", "B", "A"]
    assert [case.has_mask for case in cached] == [False, True, True]
    for case, done in zip(cases[::-1], cached, strict=True):
        volume = Preprocessing(1, (14, 10, 12))(case, data_set)
        assert done.case == case
        assert done.folder == tmp_path / "cache" / cache.key(data_set) / case.name
        for array, expected, dtype in (
            (done.image, volume.image, np.float16),
            (done.labels, volume.labels, np.uint8),
            (done.lesion, [i for i, label in enumerate(volume.labels.flat) if label], np.int32),
        ):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, expected)
        assert done.outside == volume.outside
        np.testing.assert_array_equal(done.affine, volume.affine)
    assert cached[2].lesion.size > 0
    assert cached[1].lesion.size == cached[0].lesion.size == 0
    assert sum(cached[2].outside.values()) > 0


def test_lesions_of_a_case_are_its_components(metastases, tmp_path):
    data_set = Metastases(metastases)
    for case in Cache(tmp_path / "c", 1, "brain", workers=1).build(data_set.cases(), data_set):
        numbered = np.empty(case.labels.shape, np.int32)
        count = ndimage.label(case.labels > 0, np.ones((3, 3, 3)), output=numbered)
        assert len(case.lesions) == count
        for lesion in case.lesions:
            numbers = set(numbered.ravel()[lesion])
            assert len(numbers) == 1
            assert len(lesion) == (numbered == numbers.pop()).sum()


def test_arrays_are_memory_mapped_read_only_and_opened_once(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    for name in ("image", "labels", "lesion"):
        array = getattr(case, name)
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        assert getattr(case, name) is array


def test_a_pickled_case_leaves_its_arrays_behind(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    before = len(pickle.dumps(case))
    image = np.array(case.image)
    assert len(pickle.dumps(case)) == before < 2000
    copy = pickle.loads(pickle.dumps(case))
    assert "image" not in vars(copy)
    np.testing.assert_array_equal(copy.image, image)
    assert (copy.case, copy.outside) == (case.case, case.outside)


def test_complete_cases_are_not_touched_and_changed_ones_are_rebuilt(tmp_path, data_set, capsys):
    cache = Cache(tmp_path / "cache", 1, "brain")
    cases = data_set.cases()
    cache.build(cases, data_set)
    assert "preprocessing" in capsys.readouterr().out
    first = written(tmp_path / "cache")
    assert len(first) == 9

    cache.build(cases, data_set)
    assert written(tmp_path / "cache") == first
    assert capsys.readouterr().out == ""  # nothing to do, nothing to say

    age(cases[1].images["t2"])
    cache.build(cases, data_set)
    second = written(tmp_path / "cache")
    assert {path.parent.name for path in first if second[path] != first[path]} == {"B"}

    images, _, _ = make_arrays(seed=1)
    write_image(cases[2].images["t1"], 2 * images["t1"] + images["flair"], affine_of("LPS"))
    before = np.array(cache.build(cases, data_set)[2].image)
    np.testing.assert_array_equal(before, Preprocessing(1, "brain")(cases[2], data_set).image)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sources": {}}', None])
def test_a_damaged_description_is_made_anew(tmp_path, data_set, content):
    cache = Cache(tmp_path / "cache", 1, "brain")
    (case,) = cache.build(data_set.cases()[:1], data_set)
    facts = (case.folder / "case.json").read_text()
    damaged = facts.replace('"affine": [', '"affine": [7, ') if content is None else content
    (case.folder / "case.json").write_text(damaged)
    cache.build(data_set.cases()[:1], data_set)
    assert (case.folder / "case.json").read_text() == facts


def test_a_mask_that_appears_or_goes_is_a_change(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, "brain")
    assert cache.build(data_set.cases(), data_set)[0].lesion.size > 0
    data_set.cases()[0].mask.unlink()
    (case, *_) = cache.build(data_set.cases(), data_set)
    assert not case.has_mask
    assert case.lesion.size == 0


def test_a_data_set_may_move(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, "brain")
    cache.build(data_set.cases(), data_set)
    first = written(tmp_path / "cache")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    moved = BraTS(tmp_path / "elsewhere")
    cases = cache.build(moved.cases(), moved)
    assert written(tmp_path / "cache") == first
    assert cases[0].case.images["t1"].is_file()


def test_the_key_stands_for_what_determines_the_arrays(tmp_path, monkeypatch):
    class Other(BraTS):
        pass

    brats = BraTS(tmp_path)
    keys = [
        Cache(tmp_path, 1, "brain").key(brats),
        Cache(tmp_path, 2, "brain").key(brats),
        Cache(tmp_path, 1, (10, 10, 10)).key(brats),
        Cache(tmp_path, 1, (10, 10, 11)).key(brats),
        Cache(tmp_path, 1, "brain").key(BraTS(tmp_path, modalities=("t1", "t2"))),
        Cache(tmp_path, 1, "brain").key(BraTS(tmp_path, modalities=("t2", "t1"))),
        Cache(tmp_path, 1, "brain").key(Other(tmp_path)),
    ]
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    keys.append(Cache(tmp_path, 1, "brain").key(brats))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    same = Cache(tmp_path / "x", 1.0, "brain", workers=3).key(
        BraTS(tmp_path / "y", regions=("ET",))
    )
    assert same == keys[0]
    assert re.fullmatch("[0-9a-f]{12}", same)
    assert Cache(tmp_path, 1, [10.0, 10, 10]).key(brats) == keys[2]


def test_a_failing_case_is_named_and_the_others_stay(tmp_path, data_set):
    cases = data_set.cases()
    broken = cases[1].images["t1ce"]
    broken.write_bytes(broken.read_bytes()[:500])
    cache = Cache(tmp_path / "cache", 1, "brain", workers=1)
    with fails(f"{broken}: expected a readable NIfTI file, found: .*"):
        cache.build(cases, data_set)
    folder = tmp_path / "cache" / cache.key(data_set)
    finished = {path.name for path in folder.iterdir() if path.is_dir()}
    assert finished in ({"A"}, {"A", "C"})  # C only if it had begun when B failed

    first = written(tmp_path / "cache")
    images, *_ = make_arrays(seed=1)
    write_image(broken, images["t1ce"], affine_of("LPS"))
    assert len(cache.build(cases, data_set)) == 3
    assert first.items() <= written(tmp_path / "cache").items()


def test_an_interruption_leaves_nothing_half_written(tmp_path, data_set, monkeypatch):
    cache = Cache(tmp_path / "cache", 1, "brain", workers=1)
    save = np.save

    def interrupted(path, array):
        if Path(path).name == "labels.npy":
            raise KeyboardInterrupt
        save(path, array)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.build(data_set.cases(), data_set)
    assert written(tmp_path / "cache") == {}
    monkeypatch.undo()
    folder = tmp_path / "cache" / cache.key(data_set)
    assert not [path for path in folder.iterdir() if path.is_dir()]
    # What a killed process has left behind is in nobody's way.
    partial = folder / ".partial-1-A"
    partial.mkdir()
    (partial / "image.npy").write_text("half")
    assert len(cache.build(data_set.cases(), data_set)) == 3


def test_sources_that_vanish_are_named(tmp_path, data_set):
    case = Case("A", {"t1": tmp_path / "gone.nii"}, None)
    with fails(f"{tmp_path}/gone.nii: expected a file, found: No such file or directory"):
        Cache(tmp_path / "cache", 1, "brain").build(
            [case], BraTS(tmp_path / "data", modalities=("t1",))
        )


def test_the_same_files_give_the_same_bytes(tmp_path, data_set):
    for root in ("one", "two"):
        workers = 1 if root == "one" else 3
        Cache(tmp_path / root, 1.5, "brain", workers).build(data_set.cases(), data_set)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 3 * (4 + 1)  # arrays, case.json; the lock
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_a_case_was_made_from_is_beside_it(tmp_path, data_set):
    (case,) = Cache(tmp_path / "cache", 1, "brain").build(data_set.cases()[:1], data_set)
    facts = json.loads((case.folder / "case.json").read_text())
    status = case.case.images["t1"].stat()
    assert facts["sources"]["t1"] == {
        "file": "A_t1.nii.gz",
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    assert set(facts["sources"]) == {*MODALITIES, "mask"}
    assert facts["identity"] == case.identity == identify(case.case.images["t1"])
    assert (facts["version"], facts["spacing_mm"], facts["crop"]) == (1, 1.0, "brain")


def test_a_case_that_has_no_identity_is_made_anew(tmp_path, data_set):
    cache = Cache(tmp_path / "cache", 1, "brain")
    (case, *_) = cache.build(data_set.cases(), data_set)
    facts = json.loads((case.folder / "case.json").read_text())
    del facts["identity"]
    (case.folder / "case.json").write_text(json.dumps(facts))
    (again, *_) = cache.build(data_set.cases(), data_set)
    assert again.identity == case.identity


class _Slow(Preprocessing):
    """Notes which cases it is asked for, and leaves time for a collision."""

    def __init__(self) -> None:
        super().__init__(1, "brain")
        self.asked_for: list[str] = []

    def __call__(self, case, data_set):
        self.asked_for.append(case.name)
        time.sleep(0.3)
        return super().__call__(case, data_set)


def build_in_another_process(root, name):
    """Cases that this process preprocessed itself, and all that it got."""
    cache = Cache(root / "cache", 1, "brain", workers=1)
    cache.preprocessing = slow = _Slow()
    data_set = BraTS(root / "data")
    (root / f"{name}.ready").touch()
    while len(list(root.glob("*.ready"))) < 2:
        time.sleep(0.01)
    cached = cache.build(data_set.cases(), data_set)
    return slow.asked_for, [(case.name, case.image.sum()) for case in cached]


def test_two_processes_share_the_work(tmp_path):
    for seed in range(6):
        images, labels, _ = make_arrays(seed=seed)
        write_case(tmp_path / "data" / f"case{seed}", images, labels, prefix=f"case{seed}_")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        futures = [pool.submit(build_in_another_process, tmp_path, name) for name in "ab"]
        (mine, my_cases), (yours, your_cases) = (future.result(timeout=60) for future in futures)
    assert sorted(mine + yours) == [f"case{seed}" for seed in range(6)]  # each of them once
    assert mine
    assert yours
    assert my_cases == your_cases
