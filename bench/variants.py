"""train.py with one thing changed, to measure on a GPU what that thing is worth.

    python bench/variants.py NAME FLAGS OF train.py

    reduce-always    reduces gradients in every micro-batch, on one process too
    two-pools        lets FSDP take the memory of reduced gradients as it does by itself, and not
                     as support/sharding.py's OnePool does
    resharded        gathers weights in every micro-batch, a block's twice, even if there is room to
                     keep them gathered
    pageable         copies batches from memory that is not pinned: the CPU may wait for the copy
    keep-more        compiled blocks keep for backward what they could make again without a matrix
                     product
    varying-heads    compiled blocks take head_dim for a variable
    more-kernels     small batches have other kernels of the norms
    eager-head       does not compile the head's element-wise work

The updates are those of train.py. bench/gpu.py has parts for these.
"""

import sys
from types import SimpleNamespace

from common import ROOT

sys.path.insert(0, str(ROOT))

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import torch
from torch.distributed.fsdp import FSDPModule

import train
from support import compiler, sharding


def reduce_always(prepare_backward=sharding.prepare_backward) -> None:
    def prepare(model, last):
        prepare_backward(model, last)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)

    sharding.prepare_backward = prepare


def two_pools() -> None:
    FSDPModule.set_custom_reduce_scatter = lambda module, comm: None


def resharded() -> None:
    sharding.keep_gathered = lambda model: False


def pageable() -> None:
    torch.Tensor.pin_memory = lambda tensor: tensor


# support/compiler.py then sets its options on an object that nothing reads.
def keep_more() -> None:
    compiler.functorch_config = SimpleNamespace()


def varying_heads() -> None:
    compiler.dynamo_config = SimpleNamespace()


def more_kernels() -> None:
    compiler.inductor_config = SimpleNamespace(triton=SimpleNamespace())


def eager_head(compile_model=train.compile_model) -> None:
    def compile_blocks(model):
        eager = model.exponentiate
        compile_model(model)
        model.exponentiate = eager

    train.compile_model = compile_blocks


VARIANTS = {
    "reduce-always": reduce_always,
    "two-pools": two_pools,
    "resharded": resharded,
    "pageable": pageable,
    "keep-more": keep_more,
    "varying-heads": varying_heads,
    "more-kernels": more_kernels,
    "eager-head": eager_head,
}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in VARIANTS:
        sys.exit(f"variants.py: wanted one of {', '.join(VARIANTS)} before train.py's flags")
    VARIANTS[sys.argv[1]]()
    train.processes.leave(lambda: train.main(sys.argv[2:]))
