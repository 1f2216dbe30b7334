"""The geometry of a network: where its output lies on its input."""

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """Halo and stride of a network; they are 0 and 1 for a U-Net with padded convolutions.

    Along each axis, output voxel j covers the input voxels from halo + stride * j to
    halo + stride * (j + 1) - 1.

    Attributes:
        halo: Input voxels on each side that the network sees, but does not predict.
        stride: Input voxels along each side of an output voxel.
    """

    halo: int
    stride: int

    def output_side(self, input_side: int) -> int:
        """Return the number of output voxels along an axis.

        Raises:
            ValueError: The input does not fill whole output voxels.
        """
        output, rest = divmod(input_side - 2 * self.halo, self.stride)
        if output < 1 or rest:
            raise ValueError(
                f"patch_size: expected {2 * self.halo} + a multiple of {self.stride}, found "
                f"{input_side}"
            )
        return output


def valid_geometry(blocks_per_level: Sequence[int], lost_per_block: int) -> Geometry:
    """Derive the geometry of a path of valid convolutions with pooling by 2 between its levels.

    Args:
        blocks_per_level: Number of blocks of each level, fine to coarse.
        lost_per_block: Voxels that a block loses on each side, on its own level.
    """
    halo = sum(lost_per_block * blocks * 2**level for level, blocks in enumerate(blocks_per_level))
    return Geometry(halo, stride=2 ** (len(blocks_per_level) - 1))
