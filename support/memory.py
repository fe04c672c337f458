""" """

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from data import Pair
from model import Llama, LlamaConfig, expected_shapes
from support.processes import StoppedError, out_of_memory
from train import Config, Data, count_steps, losses_of, make_optimizer, plan_of, read_data, shard


def rehearse(model: Llama, data: Data, steps: int) -> None:
    """Forward and backward of the run's largest micro-batches, for nothing but their memory. Raises StoppedError with
    advice where that is not there: in the first minute, and not in the hour in which such a batch is drawn."""
    config, longest = data.config, int(data.sizes.max())
    try:
        for indexes in largest_micro_batches(data, steps, dist.get_world_size()):
            tokens = int(data.sizes[indexes].sum())
            rows, batch, _ = data.batch(indexes)
            (losses_of(model, data, rows, batch)[0].sum() * 0).backward()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        less = (
            f"lower --max-tokens-per-gpu from {config.max_tokens_per_gpu} to {max(tokens // 2, longest)}"
            if tokens > longest
            else f"that is one pair: lower --max-tokens from {config.max_tokens} to "
            f"{config.max_tokens // 2}, or use more processes"
        )
        more = "" if model.checkpoint_blocks else ", or pass --checkpoint-blocks on"
        raise StoppedError(
            f"out of memory in the run's largest micro-batch, {tokens} tokens; {less}{more}"
        ) from None
    model.zero_grad()


def largest_micro_batches(data: Data, steps: int, processes: int) -> list[list[int]]:
    """The largest of the whole run, with which its step begins; then, where steps have several, the largest that meets
    the gradients of one before it: run in this order, they take what the run takes at most."""
    every = [of_process for step in range(steps) for of_process in plan_of(data, step, processes)]
    kinds = (
        [of_process[0] for of_process in every],
        [indexes for of_process in every for indexes in of_process[1:]],
    )
    return [max(kind, key=lambda indexes: data.sizes[indexes].sum()) for kind in kinds if kind]


def plan(config: Config, llama: LlamaConfig, gpus: int) -> None:
    """Prints what the run would take on `gpus` CUDA devices: its largest micro-batches are simulated, with fake
    tensors on one of a fake group of processes, under torch's own memory trackers. What the allocator wastes and CUDA
    itself takes come on top.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    data = read_data(config, llama, "cpu")[0][0]
    steps = count_steps(data)
    largest = largest_micro_batches(data, steps, gpus)
    batches = [data.batch(indexes)[1] for indexes in largest]

    mesh = init_device_mesh("cpu", (gpus,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("meta"):
            model = Llama(llama)
        model.checkpoint_blocks = config.checkpoint_blocks != "off"
        shard(model, mesh, torch.bfloat16)
        model.to_empty(device="cpu")
        # The moments are there; the update itself, which is fused, takes nothing.
        tracker = FSDPMemTracker(model, make_optimizer(config, model))
        with tracker:
            for batch in batches:
                tracker.reset_mod_stats()  # it counts by module too, and takes a second forward for a mistake
                model(batch)[0].sum().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()

    parameters = sum(math.prod(shape) for shape in expected_shapes(llama).values())
    flops = 3 * forward_flops(llama, data.pairs, config.share_prompt)
    a_step = config.pairs_per_step / len(data.pairs)
    kinds = {
        str(kind).split(".")[-1].lower().replace("_", " "): size / 2**30
        for kind, size in peak.items()
        if size
    }
    total = kinds.pop("total")
    print(
        f"{config.model} on {gpus} GPU{'s' * (gpus > 1)}, {config.data}\n"
        f"  parameters  {parameters:,}\n"
        f"  steps       {steps:,} of {config.pairs_per_step} pairs, {data.sizes.sum() * a_step:,.0f} tokens a step, "
        f"at most {data.sizes[largest[0]].sum():,} a micro-batch\n"
        f"  FLOPs       {flops * a_step:.3g} a step (forward and backward; recomputation not counted)\n"
        f"  memory      {total:.1f} GiB at the peak, on each GPU: "
        + ", ".join(f"{name} {size:.1f}" for name, size in kinds.items() if size >= 0.05)
    )


def forward_flops(llama: LlamaConfig, pairs: list[Pair], share_prompt: bool) -> int:
    """Of a forward pass: two a weight and token that meet (in the head scored tokens alone), and of attention what the
    mask lets through. Backward has twice as many."""
    in_blocks = sum(
        math.prod(shape) for key, shape in expected_shapes(llama).items() if "_proj" in key
    )
    tokens = sum(pair.packed_tokens(share_prompt) for pair in pairs)
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    seen, prompts = (
        0,
        1 if share_prompt else 2,
    )  # (query, key) pairs; how often a prompt is computed
    for pair in pairs:
        n_p, *responses = map(len, (pair.prompt, pair.chosen, pair.rejected))
        seen += prompts * n_p * (n_p + 1) // 2 + sum(n * n_p + n * (n + 1) // 2 for n in responses)
    attention = 4 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim * seen
    return 2 * in_blocks * tokens + 2 * llama.vocab_size * llama.hidden_size * scored + attention
