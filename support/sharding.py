"""What FSDP is told besides how a model is split, which is train.shard: when gradients are reduced,
how long weights stay gathered, and which memory gradients take if nothing is split. And the update
of the rows that a process holds.

A model that is not sharded (one process, in the weights' own dtype) needs none of this: all
functions here but `optimizer_step` then do nothing.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.adamw import adamw

from support.tensors import local_rows


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP gathers separately, the root among them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def prepare_backward(model: nn.Module, last: bool) -> None:
    """Tells FSDP whether to reduce gradients over processes, and to give up gathered weights, in
    the next backward. last: the step ends there.

    If the model is split over processes, gradients are reduced in every micro-batch: otherwise each
    process would hold those of the whole model. If not (one process, or each a replica), waiting
    costs no memory, so they are reduced once per step. Replicas exchange theirs once per step too.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not getattr(model, "held_whole", False))
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not weights_kept_gathered(model))


def keep_gathered(model: nn.Module) -> bool:
    """From now on each weight is gathered once per step and kept until the step's last backward.
    Before, every micro-batch gathered it, a block's twice. Returns False, and does nothing, if the
    model is not sharded."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)
        model.kept_gathered = True
    return isinstance(model, FSDPModule)


def weights_kept_gathered(model: nn.Module) -> bool:
    """True after `keep_gathered`."""
    return getattr(model, "kept_gathered", False)


def reshard(model: nn.Module) -> None:
    """Frees the weights that a forward pass without backward left gathered. Until then,
    parameters() are not the ones that are trained."""
    for module in fsdp_modules(model):
        module.reshard()


@torch.no_grad()
def optimizer_step(optimizer: torch.optim.AdamW) -> None:
    """optimizer.step(), bit for bit, but on the rows that this process holds. GPUs wait while
    Python starts the update, and with DTensors that takes three times as long: 12 to 17 ms instead
    of 3 to 5 for the 291 parameters of Llama-3-8B, measured on a CPU. Each must have a gradient."""
    for group in optimizer.param_groups:
        parameters = group["params"]
        states = [optimizer.state[parameter] for parameter in parameters]
        adamw(
            [local_rows(parameter)[0] for parameter in parameters],
            [local_rows(parameter.grad)[0] for parameter in parameters],
            [local_rows(state["exp_avg"])[0] for state in states],
            [local_rows(state["exp_avg_sq"])[0] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


class OnePool:
    """Gives FSDP the memory for the gradients that it reduces, if each process holds all of them.

    FSDP reduces on a stream of its own, and CUDA's allocator keeps the free memory of each stream
    in a pool of its own. So what a step's summed gradients leave free could not hold their reduced
    copies, and a step would need 4 bytes a parameter more. Here both come from the pool of the
    stream that computes. (The gaps fit only in segments that can grow: support/__init__.py.)
    """

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.empty(size, dtype=dtype, device=device)
        user = torch.cuda.current_stream()
        with torch.cuda.stream(torch.cuda.default_stream()):
            tensor = torch.empty(size, dtype=dtype, device=device)
        tensor.record_stream(user)  # not reused before that stream is done with it
        return tensor

    def __call__(self, *_args, **_options):
        raise NotImplementedError("a model that is not split has nothing to scatter")


def hold_whole(model: nn.Module) -> None:
    """For a model whose shard axis has one process: each process holds all of it. From now on its
    gradients are reduced once per step, in memory that `OnePool` gives."""
    model.held_whole = True
    for module in fsdp_modules(model):
        module.set_custom_reduce_scatter(OnePool())
