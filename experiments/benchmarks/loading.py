"""CPU time of a training patch: our queue against a plain TorchIO queue on .nii.gz files.

Both serve patches of 80³ voxels and four modalities, half of them with a lesion, scaled by 0.9 to
1.1 and flipped, from the same phantoms at 1 mm, in one process with one thread. The plain queue
reads the files each time and augments whole volumes (`ZNormalization`, `RandomAffine`,
`RandomFlip`), as TorchIO's documentation does. Our queue reads a cache; the time to build it, which
is spent once, is printed too. It leaves the scaling of images to the device, and here the device is
the same thread of the CPU: the loader stands alone, as beside a GPU, and with what it leaves.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.cases import DataSet

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

PATCH_SIZE = 80
LESION_SHARE = 0.5
SCALE = (0.9, 1.1)
PATCHES_PER_VOLUME = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.loading",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--cases", type=int, default=4, help="number of phantoms; default: %(default)s"
    )
    parser.add_argument(
        "--patches", type=int, default=2101, help="patches of our queue; default: %(default)s"
    )
    parser.add_argument(
        "--data", type=Path, help="folder for the phantoms; default: one that is deleted"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(
            options.data or Path(folder) / "phantoms", Path(folder), options.cases, options.patches
        )


def compare(data: Path, cache: Path, cases: int, patches: int) -> None:
    """Time both queues, and print what a patch costs in each.

    Args:
        data: Folder of the phantoms, made where missing.
        cache: Folder of the cache.
        cases: Number of phantoms.
        patches: Number of patches of our queue.
    """
    import torch

    from datamodules.cache import Cache
    from datamodules.patches import finish_patches
    from datamodules.phantom import Phantoms

    torch.set_num_threads(1)
    data_set = Phantoms(data, count=cases, spacing_mm=1)
    data_set.prepare()

    start = time.process_time()
    cached = Cache(cache, 1, [160, 190, 140], workers=1).build(data_set.cases(), data_set)
    build_s = (time.process_time() - start) / cases

    # All patches of every volume count: the first one waits until its volume is read.
    plain_count = cases * PATCHES_PER_VOLUME
    plain_s = seconds_per_patch(plain_patches(data_set.cases()), plain_count)
    loaded_s = seconds_per_patch(our_batches(cached, data_set, patches), patches)
    finished_s = seconds_per_patch(
        map(finish_patches, our_batches(cached, data_set, patches)), patches
    )

    costs = {
        "plain tio.Queue": plain_s,
        "PatchQueue, the loader": loaded_s,
        "and scaled on the CPU": finished_s,
    }
    print(f"{'':24}{'CPU ms a patch':>16}{'patches a CPU second':>24}{'times the plain':>20}")
    for name, cost_s in costs.items():
        print(f"{name:24}{1000 * cost_s:16.1f}{1 / cost_s:24.1f}{plain_s / cost_s:20.1f}")
    print(f"cache: {build_s:.1f} CPU s a case, once")
    print(f"an epoch of 2101 patches: {2101 * plain_s:.0f} against {2101 * finished_s:.0f} CPU s")


def seconds_per_patch(patches: Iterator[object], count: int) -> float:
    start = time.process_time()
    for _ in islice(patches, count):
        pass
    return (time.process_time() - start) / count


def our_batches(cached: list, data_set: "DataSet", count: int) -> Iterator[dict[str, Any]]:
    import torchio as tio
    from torch.utils.data import DataLoader

    from datamodules.patches import EpochSampler, PatchQueue, collate_patches
    from datamodules.sampling import BalancedSampler

    sampler = BalancedSampler(PATCH_SIZE, LESION_SHARE, SCALE)
    flip = tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5, copy=False)
    queue = PatchQueue(cached, data_set, sampler, flip, count, seed=0)
    yield from DataLoader(queue, sampler=EpochSampler(count, 1), collate_fn=collate_patches)


def plain_patches(cases: list) -> Iterator[object]:
    import torchio as tio

    transform = tio.Compose(
        [
            tio.ToCanonical(),
            tio.ZNormalization(masking_method=tio.ZNormalization.mean),
            tio.CropOrPad((160, 190, 140)),
            tio.RandomAffine(scales=SCALE, degrees=0, isotropic=True, default_pad_value=0),
            tio.RandomFlip(axes=(0, 1, 2), flip_probability=0.5),
        ]
    )
    subjects = [
        tio.Subject(
            **{modality: tio.ScalarImage(path) for modality, path in case.images.items()},
            seg=tio.LabelMap(case.mask),
        )
        for case in cases
    ]
    dataset = tio.SubjectsDataset(subjects, transform=transform)
    lesion = dict.fromkeys((1, 2, 4), LESION_SHARE / 3)
    sampler = tio.LabelSampler(PATCH_SIZE, "seg", {0: 1 - LESION_SHARE, **lesion})
    queue = tio.Queue(dataset, PATCHES_PER_VOLUME * 4, PATCHES_PER_VOLUME, sampler)
    yield from tio.SubjectsLoader(queue)


if __name__ == "__main__":
    main()
