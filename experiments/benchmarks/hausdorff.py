"""Time of HD95 on masks of 160x190x140 voxels: our function and MONAI's, in turn."""

import argparse
import time
import warnings

import numpy as np

SHAPE = (160, 190, 140)


def masks(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a prediction and a truth (X, Y, Z) with ragged outlines.

    Args:
        kind: "whole tumour" or "eight lesions".
        seed: Seed of places and outlines.
    """
    from scipy.ndimage import gaussian_filter

    draw = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
    centres, radius = (
        ([np.divide(SHAPE, 2) + draw.uniform(-15, 15, 3)], 30.0)
        if kind == "whole tumour"
        else (draw.uniform(30, np.subtract(SHAPE, 30), (8, 3)), 5.0)
    )
    depth = np.max([radius - np.linalg.norm(grid - c, axis=-1) for c in centres], axis=0)

    def outline() -> np.ndarray:
        rough = gaussian_filter(draw.standard_normal(SHAPE), 4)
        return depth + 0.1 * radius * rough / rough.std() > 0

    return outline(), outline()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.hausdorff", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()

    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    from lightning_modules.metrics.hausdorff import hausdorff95

    warnings.filterwarnings("ignore", message="monai.metrics.utils get_mask_edges")
    for kind in ("whole tumour", "eight lesions"):
        prediction, truth = masks(kind, seed=0)
        y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (prediction, truth))
        functions = {
            "MONAI": lambda y_pred=y_pred, y=y: compute_hausdorff_distance(
                y_pred, y, include_background=True, percentile=95
            ).item(),
            "ours": lambda p=prediction, t=truth: hausdorff95(p, t).maximum_mm,
        }
        fastest = dict.fromkeys(functions, float("inf"))
        values = {}
        for _ in range(options.repeats):
            for name, function in functions.items():
                start = time.perf_counter()
                values[name] = function()
                fastest[name] = min(fastest[name], time.perf_counter() - start)
        ratio = fastest["MONAI"] / fastest["ours"]
        timed = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in fastest.items())
        print(
            f"{kind}: {timed}, ratio {ratio:.1f}; HD95 {values['ours']:.6f} mm, "
            f"difference {abs(values['ours'] - values['MONAI']):.1e}"
        )


if __name__ == "__main__":
    main()
