"""Whether and how the model is compiled.

Each comment in compile_model says what torch.compile would do without the setting, as read in the
programs that it writes for an H200 (docs/gpu.md). The settings hold for the whole process. torch's
caches on disk keep the programs of different settings apart.
"""

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from support.tensors import flash_fits

MIN_PARAMETERS = 50_000_000  # a smaller model's run is over before compilation has paid


def worth_compiling(choice: str, model: nn.Module, device: str, dtype: torch.dtype) -> bool:
    """True if --compile is on; or if it is auto, a model of MIN_PARAMETERS runs on a GPU, and the
    flash kernel computes attention. Otherwise attention is a loop over segments, and Dynamo would
    compile the code on each side of it anew for other numbers of segments, until it gives up.

    model: model.Llama; dtype: that of matrix products.
    """
    if choice == "auto":
        large = sum(p.numel() for p in model.parameters()) >= MIN_PARAMETERS
        return device == "cuda" and large and flash_fits(dtype, model.config.head_dim)
    return choice == "on"


def compile_model(model: nn.Module) -> None:
    """Compiles each block, once for batches of all sizes, and the head's element-wise work, which
    becomes one kernel that holds no logits in fp32. model: model.Llama, not sharded yet."""
    # torch.compile would keep for backward whatever a matrix product will read there, also what
    # takes no product to make again: half as much again as is kept now.
    functorch_config.ban_recompute_materialized_backward = False
    # It would take the integers of modules that FSDP shards for variables, head_dim among them. For
    # each number, RoPE's kernels would then divide by it: ten times as many instructions.
    dynamo_config.specialize_int = True
    # It would write other kernels of the norms for small batches: with fewer than 4,096 tokens,
    # with fewer tokens than twice the width, or with fewer than 5 * 2**20 numbers. A run would stop
    # to compile them, and after eight programs it would compile no more.
    inductor_config.triton.mix_order_reduction_non_strict_mode = True
    for block in model.model["layers"]:
        block.compile(dynamic=True)
    # It would split each token's sums over several kernels if the batch for which it compiles has
    # few tokens, and use those for larger batches too.
    compiled = torch.compile(model.exponentiate, options={"split_reductions": False})

    def exponentiate(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        # It would compile for the first batch's number of tokens, and again for the second's.
        torch._dynamo.maybe_mark_dynamic(logits_SV, 0)
        return compiled(logits_SV)

    model.exponentiate = exponentiate
