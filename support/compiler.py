"""How the model is compiled for GPUs, and what torch.compile would do by itself.

What it would do was read in the code that it makes for an H200 (docs/gpu.md). The settings here
hold for the whole process, and its caches on disk tell them apart.
"""

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config


def compile_model(model: nn.Module) -> None:
    """Compiles each block, once for batches of all sizes, and the head's element-wise work, which
    becomes one kernel that holds no logits in fp32. model: model.Llama, not sharded yet."""
    # By itself, a block would keep for backward whatever a matrix product will read there, also
    # what takes no product to make again: half as much again as it keeps now.
    functorch_config.ban_recompute_materialized_backward = False
    # By itself, it takes the integers of modules under FSDP for variables, head_dim among them.
    # RoPE's kernels would then divide by it for each number: ten times as many instructions.
    dynamo_config.specialize_int = True
    # By itself, it makes other kernels of the norms for batches of fewer tokens than twice the
    # width, or than 4,096: a run would stop to compile them, and dynamo gives up after eight times.
    inductor_config.triton.mix_order_reduction_non_strict_mode = True
    for block in model.model["layers"]:
        block.compile(dynamic=True)
    model.exp_in_place = torch.compile(model.exp_in_place)
