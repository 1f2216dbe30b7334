"""What training a network costs, without running it: unequal budgets show beside unequal scores.

A training step is run on fake tensors, which have a shape and a storage of so many bytes, but no
memory. So every tensor is counted that PyTorch would allocate, for as long as it would be there,
whatever the network, its loss and its optimizer are: kept activations, their recomputation under
checkpointing, the casts of autocast, in-place operations, the optimizer's state.

What an operation allocates and frees again inside itself is not seen. On a GPU that is the
workspace of cuDNN; on a CPU that has no instructions for bfloat16, it is the columns of its
convolutions, which can be most of the memory.
"""

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_modules.segmentation import SegmentationModule

MIB = 2**20

Kind = Literal["weights", "gradients", "moments", "activations", "temporaries"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Precision(NamedTuple):
    """How a precision of Lightning computes.

    Attributes:
        weights: Type of the weights, and of the images.
        autocast: Type that autocast brings convolutions to; that of the weights if it is off.
    """

    weights: torch.dtype
    autocast: torch.dtype


PRECISIONS = {
    "32-true": Precision(torch.float32, torch.float32),
    "16-true": Precision(torch.float16, torch.float16),
    "bf16-true": Precision(torch.bfloat16, torch.bfloat16),
    "64-true": Precision(torch.float64, torch.float64),
    "16-mixed": Precision(torch.float32, torch.float16),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
}


def autocast(precision: str, device: str) -> torch.autocast:
    """Return the context in which a precision of Lightning computes on a kind of device."""
    weights, computed = PRECISIONS[precision]
    mixed = computed is not weights
    return torch.autocast(device, computed if mixed else None, enabled=mixed)


@dataclass(frozen=True)
class Memory:
    """What the tensors of a training step take at the moment when they take most, in MiB by kind.

    Attributes:
        weights: Weights and buffers of the network.
        gradients: Gradients of the weights. Those of the last step are there until the forward pass
            is over, as Lightning leaves them.
        moments: State of the optimizer, which for Adam is two moments of each gradient.
        activations: The batch, and what the forward pass leaves for the backward pass.
        temporaries: Everything else: what the backward pass passes on, the casts of autocast, and,
            with checkpointing, what the backward pass computes again.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    temporaries: float

    @property
    def peak(self) -> float:
        return sum(getattr(self, kind) for kind in KINDS)


@dataclass(frozen=True)
class Cost:
    """Predicted cost of training a network, as it stands in the results of a run.

    Attributes:
        parameters: Number of trainable weights.
        widths: Filters of each level, fine to coarse.
        gflops: Floating-point operations of convolutions and matrix products in the forward pass of
            one patch, / 10^9.
        memory_mib: The most memory that the tensors of a training step take at once, see `Memory`.
    """

    parameters: int
    widths: list[int]
    gflops: float
    memory_mib: float


@dataclass(frozen=True)
class Step:
    """Predicted cost of one training step.

    Attributes:
        cost: The cost as it stands in the results.
        gflops: Floating-point operations of convolutions and matrix products, / 10^9, forward and
            backward, of the whole batch. With checkpointing, what is computed twice counts twice.
        memory: The peak memory by kind.
    """

    cost: Cost
    gflops: float
    memory: Memory


def predict_step(
    module: SegmentationModule,
    image_shape: Sequence[int],
    regions: int,
    precision: str = "32-true",
    device: str = "cpu",
) -> Step:
    """Predict the cost of a training step: forward pass, loss, backward pass and optimizer.

    Nothing of the size of the batch is allocated, and `module` is left as it is.

    Args:
        module: Module whose network, loss and optimizer take the step.
        image_shape: Shape (B, C, X, Y, Z) of the batch's images.
        regions: Channels of the batch's masks.
        precision: A key of `PRECISIONS`.
        device: Kind of device. What is not `cuda` is predicted as on a CPU, and so is `cuda` where
            there is none, because autograd does not run on it; tensors are of the same sizes.
    """
    device = "cuda" if device == "cuda" and torch.cuda.is_available() else "cpu"
    weights_type = PRECISIONS[precision].weights
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = _copy_without_memory(module, weights_type, device)
        network, weights = module.network, list(module.network.parameters())
        optimizer: Any = module.make_optimizer(network)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # makes the moments, which later steps find
        batch: Any = {
            "image": torch.empty(*image_shape, dtype=weights_type, device=device),
            "mask": torch.empty(
                image_shape[0], regions, *image_shape[2:], dtype=torch.bool, device=device
            ),
        }
        with _Storages() as storages:
            storages.add([*weights, *network.buffers()], "weights")
            storages.add([weight.grad for weight in weights], "gradients")
            storages.add(tree_leaves(list(optimizer.state.values())), "moments")
            storages.add(batch.values(), "activations")
            with autocast(precision, device):
                loss = module.terms(batch)["loss"]
            forward_gflops = storages.flops / 1e9
            storages.keep()
            optimizer.zero_grad()
            loss.backward()
            storages.add([weight.grad for weight in weights], "gradients")
            optimizer.step()
            memory = storages.memory()
    cost = Cost(
        parameters=sum(weight.numel() for weight in weights if weight.requires_grad),
        widths=list(network.widths),
        gflops=forward_gflops / image_shape[0],
        memory_mib=memory.peak,
    )
    return Step(cost, storages.flops / 1e9, memory)


def _copy_without_memory(
    module: SegmentationModule, dtype: torch.dtype, device: str
) -> SegmentationModule:
    """Copy a module, in training mode, with fake weights and buffers."""
    copies: dict[int, Any] = {}  # what deepcopy takes for copied already
    for tensor in (*module.parameters(), *module.buffers()):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        copies[id(tensor)] = empty
    return copy.deepcopy(module, copies).train()


class _Storage:
    """A block of memory that tensors share.

    Attributes:
        size: Bytes.
        kind: What it is for, as far as that is known yet.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.kind: Kind = "temporaries"


class _Storages(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, and counts the operations.

    A storage is alive as long as a tensor refers to it, in Python or in what autograd keeps.

    Attributes:
        flops: Floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._alive: dict[int, _Storage] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._bytes = self._peak_bytes = 0
        self._at_peak: list[_Storage] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  (PyTorch's)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation; PyTorch calls this."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._find(leaf)
        return result

    def add(self, tensors: Iterable[Any], kind: Kind) -> None:
        """Say of what kind the storages of tensors are; what is no tensor is passed over."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._find(tensor).kind = kind

    def keep(self) -> None:
        """Call all that is alive now, and of no kind yet, activations."""
        for storage in self._alive.values():
            if storage.kind == "temporaries":
                storage.kind = "activations"

    def memory(self) -> Memory:
        """Return the peak so far."""
        return Memory(
            **{
                kind: sum(storage.size for storage in self._at_peak if storage.kind == kind) / MIB
                for kind in KINDS
            }
        )

    def _find(self, tensor: Tensor) -> _Storage:
        block = tensor.untyped_storage()
        address = block._cdata
        if address not in self._alive:
            self._alive[address] = _Storage(block.nbytes())
            self._watched[address] = weakref.ref(block, partial(self._forget, address))
            self._bytes += block.nbytes()
            if self._bytes > self._peak_bytes:
                self._peak_bytes = self._bytes
                self._at_peak = list(self._alive.values())
        return self._alive[address]

    def _forget(self, address: int, _: object) -> None:
        del self._watched[address]
        self._bytes -= self._alive.pop(address).size
