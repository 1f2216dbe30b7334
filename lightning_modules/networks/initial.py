"""Initial weights that hang on a seed and on a layer's name alone.

Drawn in the order of construction, one more layer would change those of all after it, and two
variants of a network that are compared with the same seed would start from nothing in common.
"""

import hashlib

import torch
from torch import nn


def initialise(network: nn.Module, seed: int) -> None:
    """Draw the weights of every layer anew, each layer from a stream of its own.

    Layers of the same name and shape get the same weights in every network of a seed, on whatever
    levels, with whatever norm, activation or pooling the networks differ. The distribution is that
    of the layer's own `reset_parameters`; the global random state is left as it is.

    Args:
        network: All of its layers with weights have `reset_parameters`, as torch's have.
        seed: Seed of the run.
    """
    with torch.random.fork_rng(devices=[]):
        for name, layer in network.named_modules():
            if reset := getattr(layer, "reset_parameters", None):
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
                reset()
