"""Local similarity of a scan of 240x240x155 voxels in a ball of 7 mm, and what else it could cost.

In turn, in one process: ours; the same sums over a cube by `uniform_filter`, which is another
support; one loop over the voxels of the brain, timed on some and extrapolated.
"""

import argparse
import time

import numpy as np

SHAPE = (240, 240, 155)
SEMI_AXES = (66, 82, 66)  # of the brain: 1.5 l, in a box as large as a real one


def scan(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two smooth images that are alike in parts, and an ellipsoid that stands for the brain."""
    from scipy.ndimage import gaussian_filter

    draw = np.random.default_rng(seed)
    first, other = (gaussian_filter(draw.standard_normal(SHAPE), 2) for _ in range(2))
    axes = np.ogrid[tuple(slice(side) for side in SHAPE)]
    x, y, z = (
        (axis - side / 2) / extent
        for axis, side, extent in zip(axes, SHAPE, SEMI_AXES, strict=True)
    )
    inside = x**2 + y**2 + z**2 <= 1
    return 500 + 2000 * first * inside, (first + other) * inside, inside


def naive(x: np.ndarray, y: np.ndarray, voxels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """r at some voxels, all of whose ball lies inside."""
    r = np.empty(len(voxels))
    for index, voxel in enumerate(voxels):
        near = tuple((voxel + offsets).T)
        a, b = x[near], y[near]
        a, b = a - a.mean(), b - b.mean()
        r[index] = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    return r


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.similarity", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--radius-mm", type=float, default=7.0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="threads of the FFT; default: 1")
    given = parser.parse_args()

    from scipy.fft import set_workers
    from scipy.ndimage import binary_erosion, uniform_filter

    from datamodules.similarity import ball, local_correlation

    x, y, inside = scan(seed=0)
    neighbourhood = ball(given.radius_mm, (1, 1, 1))
    side = neighbourhood.shape[0]
    offsets = np.argwhere(neighbourhood) - side // 2
    deep = np.argwhere(binary_erosion(inside, iterations=side))
    voxels = deep[np.random.default_rng(0).choice(len(deep), 500, replace=False)]

    with set_workers(given.workers):
        ways = {
            "ours": lambda: local_correlation(x, y, inside, neighbourhood),
            "six sums over cubes": lambda: [
                uniform_filter(image, side) for image in (inside * 1.0, x, y, x * x, y * y, x * y)
            ],
            "loop": lambda: naive(x, y, voxels, offsets),
        }
        wall, cpu = (dict.fromkeys(ways, float("inf")) for _ in range(2))
        values = {}
        for _ in range(given.repeats):
            for name, way in ways.items():
                start = time.perf_counter(), time.process_time()
                values[name] = way()
                wall[name] = min(wall[name], time.perf_counter() - start[0])
                cpu[name] = min(cpu[name], time.process_time() - start[1])
    for times in (wall, cpu):
        times["loop"] *= inside.sum() / len(voxels)
    difference = np.abs(values["ours"][tuple(voxels.T)] - values["loop"]).max()
    print(
        "; ".join(f"{name} {wall[name]:.1f} s ({cpu[name]:.1f} s of CPU)" for name in ways)
        + f"; loop / ours {cpu['loop'] / cpu['ours']:.0f}, ours / cubes "
        f"{cpu['ours'] / cpu['six sums over cubes']:.1f}; ours and loop differ by {difference:.0e}"
    )


if __name__ == "__main__":
    main()
