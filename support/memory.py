"""Memory before it is needed: the largest micro-batches, tried first or simulated; FLOPs.

largest_micro_batches    the micro-batches that take most memory over the whole run
rehearse                 runs them before the first step, so that too little memory shows there
simulated_peak           their peak on N GPUs, without a GPU (--plan N)
forward_flops            FLOPs of a forward pass
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support.processes import StoppedError, out_of_memory


def largest_micro_batches(
    plans: Iterable[list[list[list[int]]]], sizes: np.ndarray
) -> list[list[int]]:
    """The largest micro-batch of the run, then the largest that is not the first of its step and so
    runs beside gradients (if steps have several). In this order they take the run's peak memory.

    plans: of every step, [process][micro-batch] -> indexes of pairs; sizes: tokens of each pair.
    """
    first, later = [], []
    for of_step in plans:
        for of_process in of_step:
            first.append(of_process[0])
            later += of_process[1:]
    return [
        max(micro_batches, key=lambda indexes: sizes[indexes].sum())
        for micro_batches in (first, later)
        if micro_batches
    ]


def rehearse(model: nn.Module, pairs, steps: int, losses_of: Callable[[list[int]], Tensor]) -> None:
    """Runs forward and backward of the largest micro-batches beside weights and moments, without
    an update. Running out of memory then shows in the first minute, not in the hour in which such
    a batch is drawn: raises StoppedError with advice.

    pairs: train.Pairs. losses_of(indexes) is the loss of each of these pairs.
    """
    config, longest = pairs.config, int(pairs.sizes.max())
    processes = dist.get_world_size()
    plans = (pairs.plan(step, processes) for step in range(steps))
    try:
        for indexes in largest_micro_batches(plans, pairs.sizes):
            tokens = int(pairs.sizes[indexes].sum())
            (losses_of(indexes).sum() * 0).backward()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if tokens > longest:
            now, less = config.max_tokens_per_gpu, max(tokens // 2, longest)
            advice = f"lower --max-tokens-per-gpu from {now} to {less}"
        else:
            now, less = config.max_tokens, config.max_tokens // 2
            advice = (
                f"that is one pair: lower --max-tokens from {now} to {less}, or use more processes"
            )
        if not model.checkpoint_blocks:
            advice += ", or pass --checkpoint-blocks on"
        raise StoppedError(
            f"out of memory in the run's largest micro-batch, {tokens} tokens; {advice}"
        ) from None
    model.zero_grad()


def simulated_peak(
    build: Callable[[DeviceMesh], tuple[nn.Module, torch.optim.Optimizer]], batches: list, gpus: int
) -> dict[str, float]:
    """GiB by kind ("total" among them) at the peak of one of `gpus` CUDA devices.

    The batches run forward and backward with fake tensors, under torch's memory tracker, on the
    first process of a fake group. build(mesh) makes the sharded model and its optimizer. Memory
    that the allocator wastes, and CUDA's own, come on top.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    mesh = init_device_mesh("cpu", (gpus,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer = build(mesh)
        # The moments exist already; the update itself is fused and allocates nothing.
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            for batch in batches:
                tracker.reset_mod_stats()  # or it takes a second forward pass for a mistake
                model(batch)[0].sum().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    names = {kind: str(kind).split(".")[-1].lower().replace("_", " ") for kind in peak}
    return {names[kind]: size / 2**30 for kind, size in peak.items() if size}


def print_plan(pairs, steps: int, gpus: int, llama, shapes: dict, build: Callable) -> None:
    """Prints the steps, FLOPs and memory of a run of `pairs` (train.Pairs) on `gpus` devices.

    llama: LlamaConfig; shapes: of its weights, by key; build: as in `simulated_peak`.
    """
    config, sizes = pairs.config, pairs.sizes
    largest = largest_micro_batches((pairs.plan(step, gpus) for step in range(steps)), sizes)
    batches = [pairs.batch(indexes)[1] for indexes in largest]
    peak = simulated_peak(build, batches, gpus)
    total = peak.pop("total")
    kinds = ", ".join(f"{name} {size:.1f}" for name, size in peak.items() if size >= 0.05)
    share = config.pairs_per_step / len(pairs.pairs)  # of an epoch, in one step
    flops = 3 * share * forward_flops(llama, shapes, pairs.pairs, config.share_prompt)
    print(
        f"{config.model} on {gpus} GPU{'s' * (gpus > 1)}, {config.data}\n"
        f"  parameters  {sum(map(math.prod, shapes.values())):,}\n"
        f"  steps       {steps:,} of {config.pairs_per_step} pairs, "
        f"{sizes.sum() * share:,.0f} tokens a step, "
        f"at most {sizes[largest[0]].sum():,} a micro-batch\n"
        f"  FLOPs       {flops:.3g} a step (forward and backward; recomputation not counted)\n"
        f"  memory      {total:.1f} GiB at the peak, on each GPU: {kinds}"
    )


def forward_flops(
    llama, shapes: dict[str, tuple[int, ...]], pairs: list, share_prompt: bool
) -> int:
    """FLOPs of a forward pass over these pairs; backward has twice as many.

    2 FLOPs per weight per token (in the head only scored tokens count), and of attention only what
    the causal mask lets through. llama: LlamaConfig; shapes: of its weights, by key.
    """
    in_blocks = sum(math.prod(shape) for key, shape in shapes.items() if "_proj" in key)
    tokens = sum(pair.packed_tokens(share_prompt) for pair in pairs)
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    seen = 0  # pairs of a query and a key
    for pair in pairs:
        n_p = len(pair.prompt)
        prompts = 1 if share_prompt else len(pair.answers)  # how often the prompt is computed
        seen += prompts * n_p * (n_p + 1) // 2
        for n in (len(pair.chosen), len(pair.rejected)):
            seen += n * n_p + n * (n + 1) // 2
    attention = 4 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim * seen
    return 2 * in_blocks * tokens + 2 * llama.vocab_size * llama.hidden_size * scored + attention


def init_fake_group(gpus: int) -> None:
    """Makes this process the first of `gpus` processes that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
