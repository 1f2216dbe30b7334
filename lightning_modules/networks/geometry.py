"""Where the output of a network lies on its input: what losses, inference and metrics must know."""

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """Halo and stride of a network of valid convolutions; 0 and 1 for a network that pads.

    Output voxel j covers the input voxels halo + stride * j, ..., halo + stride * (j + 1) - 1 along
    each axis.

    Attributes:
        halo: Input voxels on each side that the network sees and does not predict.
        stride: Input voxels along each side of an output voxel.
    """

    halo: int
    stride: int

    def output_side(self, input_side: int) -> int:
        """Output voxels along an axis of so many input voxels.

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
        lost_per_block: Voxels of its own level that a block loses on each side.
    """
    halo = sum(lost_per_block * blocks * 2**level for level, blocks in enumerate(blocks_per_level))
    return Geometry(halo, stride=2 ** (len(blocks_per_level) - 1))
