"""Time of the local similarity of a scan of 240x240x155 voxels in a ball of 7 mm.

Three ways take turns in one process: our function; the same six sums over cubes instead of balls,
by scipy's `uniform_filter`; a loop over the voxels of the brain, which is timed on 500 of them and
extrapolated to all.
"""

import argparse
import time

import numpy as np

SHAPE = (240, 240, 155)
# The ellipsoid has the volume of a real brain, 1.5 l, and lies in a box of the same size.
SEMI_AXES = (66, 82, 66)  # voxels


def scan(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make two smooth images (X, Y, Z) that correlate, and the mask of an ellipsoid as a brain."""
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
    """Compute Pearson's r voxel by voxel.

    Args:
        x, y: Images (X, Y, Z).
        voxels: (N, 3), voxels whose ball lies in the brain.
        offsets: (M, 3), voxels of the ball relative to its centre.
    """
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
    parser.add_argument(
        "--workers", type=int, default=1, help="threads of the FFT; default: %(default)s"
    )
    options = parser.parse_args()

    from scipy.fft import set_workers
    from scipy.ndimage import binary_erosion, uniform_filter

    from datamodules.similarity import ball, local_correlation

    x, y, inside = scan(seed=0)
    neighbourhood = ball(options.radius_mm, (1, 1, 1))
    side = neighbourhood.shape[0]
    offsets = np.argwhere(neighbourhood) - side // 2
    deep = np.argwhere(binary_erosion(inside, iterations=side))
    voxels = deep[np.random.default_rng(0).choice(len(deep), 500, replace=False)]

    with set_workers(options.workers):
        functions = {
            "ours": lambda: local_correlation(x, y, inside, neighbourhood),
            "six sums over cubes": lambda: [
                uniform_filter(image, side) for image in (inside * 1.0, x, y, x * x, y * y, x * y)
            ],
            "loop": lambda: naive(x, y, voxels, offsets),
        }
        wall, cpu = (dict.fromkeys(functions, float("inf")) for _ in range(2))
        values = {}
        for _ in range(options.repeats):
            for name, function in functions.items():
                start = time.perf_counter(), time.process_time()
                values[name] = function()
                wall[name] = min(wall[name], time.perf_counter() - start[0])
                cpu[name] = min(cpu[name], time.process_time() - start[1])
    for times in (wall, cpu):
        times["loop"] *= inside.sum() / len(voxels)
    difference = np.abs(values["ours"][tuple(voxels.T)] - values["loop"]).max()
    print(
        "; ".join(f"{name} {wall[name]:.1f} s ({cpu[name]:.1f} s of CPU)" for name in functions)
        + f"; loop / ours {cpu['loop'] / cpu['ours']:.0f}, ours / cubes "
        f"{cpu['ours'] / cpu['six sums over cubes']:.1f}; ours and loop differ by {difference:.0e}"
    )


if __name__ == "__main__":
    main()
