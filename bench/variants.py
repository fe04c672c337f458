"""train.py with one thing changed, to measure on a GPU what that thing is worth.

    python bench/variants.py NAME FLAGS OF train.py

    reduce-always    reduces gradients in every micro-batch, on one process too
    one-pool         takes the memory of reduced gradients from the stream that computes. The
                     allocator keeps the free memory of each stream apart: what a step's summed
                     gradients leave free cannot hold their reduced copies, 4 bytes a parameter
    pinned           copies batches from pinned memory, so that the CPU need not wait for the copy

The updates are those of train.py. bench/gpu.py has parts for these.
"""

import dataclasses
import sys
from contextlib import nullcontext

from common import ROOT

sys.path.insert(0, str(ROOT))

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import torch
from torch.distributed.fsdp import FSDPModule

import train


def reduce_always() -> None:
    train.reduce_gradients = lambda model, mesh, last: None


class OnDefaultStream:
    """FSDP asks such an object for the memory of what it reduces. One process has nothing to send,
    so it is never called. (This stream waits for the one that reduces before it uses the memory
    again.)"""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        on_cuda = device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.default_stream()) if on_cuda else nullcontext()
        with stream:
            return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, *_args, **_options):
        raise NotImplementedError("one process only")


def one_pool(shard=train.shard) -> None:
    def shard_in_one_pool(model, mesh, compute_dtype) -> None:
        shard(model, mesh, compute_dtype)
        for module in model.modules():
            if isinstance(module, FSDPModule) and mesh.size() == 1:
                module.set_custom_reduce_scatter(OnDefaultStream())

    train.shard = shard_in_one_pool


def pinned_copy(value):
    """A Batch, its Segments or a tensor, in pinned memory."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if dataclasses.is_dataclass(value):
        return type(value)(*map(pinned_copy, vars(value).values()))
    return value


def pinned(pack=train.pack) -> None:
    if torch.cuda.is_available():
        train.pack = lambda *args: pinned_copy(pack(*args))


VARIANTS = {"reduce-always": reduce_always, "one-pool": one_pool, "pinned": pinned}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in VARIANTS:
        sys.exit(f"variants.py: wanted one of {', '.join(VARIANTS)} before train.py's flags")
    VARIANTS[sys.argv[1]]()
    train.leave(train.main(sys.argv[2:]))
