"""Memory before it is needed: the costliest micro-batches, tried first or simulated.

In reading order
    pair_bytes ... enlarge      the micro-batches that take most memory over the whole run
    leaves_room_to_gather       whether weights may be kept gathered over a step
    measure, Trial, rehearse    runs them before the first step, so that too little memory shows
                                there; chooses how many blocks are recomputed
    fewest_recomputed           the same choice by simulation
    simulated_peak, print_plan  the peak on N GPUs, without a GPU (--plan N)

The policy of --checkpoint-blocks auto on GPUs: first keep blocks, then enlarge micro-batches, then
keep weights gathered. On the GPU where the first two were measured (docs/gpu.md), a 3B model gained
27% by keeping all of its blocks, and 6% by micro-batches twice as large. The third is not measured:
for that model on one GPU, with four micro-batches a step, the copies that it saves should be 2% of
a step.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from support import sharding
from support.files import InputError, shown
from support.flags import recomputed_blocks
from support.flops import pair_flops
from support.processes import (
    StoppedError,
    announced,
    choose_device,
    every_two_seconds,
    in_a_group,
    out_of_memory,
)

MARGIN = 0.04  # of a GPU's memory is left free: for gaps between tensors and what grows later
MARGIN_GATHERED = 0.08  # more of it if weights are kept gathered: that gains little
LARGER = 2  # how many times the default micro-batch a GPU with room gets: more was not measured
ADVICE = (  # if memory ran out where nothing says more exactly what to change
    "weights, gradients and moments take 16 bytes a parameter, split over the processes of a "
    "replica, and a micro-batch takes more, the higher --max-tokens-per-gpu; --plan N says how "
    "much on N GPUs"
)


def pair_bytes(llama, dataset, recomputed: int) -> np.ndarray:
    """About how many bytes each pair takes between forward and backward: enough to tell which
    micro-batch is the costliest.

    The head keeps the logits of the scored tokens; a block keeps what its products need, or only
    its input. llama: model.LlamaConfig; dataset: train.Dataset.
    """
    heads = 2 * llama.num_attention_heads + 4 * llama.num_key_value_heads
    kept = 2 * llama.intermediate_size + 4 * llama.hidden_size + heads * llama.head_dim
    numbers = (llama.num_hidden_layers - recomputed) * kept + recomputed * llama.hidden_size
    if recomputed:
        numbers += kept  # of the block that backward has just computed again
    scored = np.array([len(pair.chosen) + len(pair.rejected) for pair in dataset.pairs])
    numbers = dataset.sizes * numbers + scored * llama.vocab_size
    return compute_dtype(dataset).itemsize * numbers


def compute_dtype(dataset) -> torch.dtype:
    """That of matrix products. dataset: train.Dataset."""
    if dataset.config.plan:  # of GPUs that need not be like this machine's
        return torch.bfloat16
    return choose_device(dataset.config.device, dataset.config.precision)[1]


class Costliest(NamedTuple):
    """The micro-batches of a run that take most memory, and what its micro-batches look like."""

    steps: list[list[list[int]]]  # each with one or two micro-batches, to be run like a step's
    bytes: float  # of the costliest one by the last of the costs
    count: float  # micro-batches of a step, on each process
    mean: float  # tokens of a micro-batch
    most: int  # tokens of the largest one


def costliest(
    plans: Iterable[list[list[list[int]]]], sizes: np.ndarray, costs: list[np.ndarray]
) -> Costliest:
    """For each of `costs` (bytes of each pair), the costliest micro-batch of the run, and after it
    the costliest that is not the first of its step and so runs beside gradients (if there is one).

    plans: of every step, [process][micro-batch] -> indexes of pairs; sizes: tokens of each pair.
    """
    best: dict[tuple[int, bool], tuple[float, list[int]]] = {}  # (cost, not the first) -> the best
    planned = count = tokens = largest = 0
    for plan in plans:
        planned += 1
        for micro_batches in plan:
            for i, indexes in enumerate(micro_batches):
                size = int(sizes[indexes].sum())
                count, tokens, largest = count + 1, tokens + size, max(largest, size)
                for number, cost in enumerate(costs):
                    of_cost, place = float(cost[indexes].sum()), (number, i > 0)
                    if place not in best or of_cost > best[place][0]:
                        best[place] = of_cost, indexes
    steps = []
    for number in range(len(costs)):
        places = ((number, False), (number, True))
        step = [best[place][1] for place in places if place in best]
        if step not in steps:
            steps.append(step)
    last = len(costs) - 1
    highest = max(best[place][0] for place in ((last, False), (last, True)) if place in best)
    return Costliest(steps, highest, count / planned / len(plan), tokens / count, largest)


def costliest_of(llama, dataset, processes: int, recomputed: list[int]) -> Costliest:
    """The costliest micro-batches of the run, for each of these numbers of recomputed blocks.
    llama: model.LlamaConfig; dataset: train.Dataset."""

    progress = every_two_seconds()

    def plans() -> Iterator[list[list[list[int]]]]:
        for update in range(dataset.steps):
            progress(f"planned {update:,} of {dataset.steps:,} steps")
            yield dataset.micro_batches(update, processes)

    costs = [pair_bytes(llama, dataset, number) for number in recomputed]
    return costliest(plans(), dataset.sizes, costs)


def enlarge(
    dataset,
    found: Costliest,
    find: Callable[[list[int]], Costliest],
    peak: float,
    resting: float,
    limit: float,
) -> Costliest:
    """Makes micro-batches LARGER times as large as by default if they will fit on every process.
    Returns the run's costliest ones then, else `found`.

    peak: bytes with the ones `found`, no block recomputed; resting: what weights and moments take
    of it. The rest grows as `pair_bytes` says.
    """
    before = dataset.max_tokens_per_gpu
    dataset.max_tokens_per_gpu = LARGER * before
    larger = find([0])
    needed = resting + larger.bytes / found.bytes * (peak - resting)
    if smallest(needed <= limit, dataset.device):
        return larger
    dataset.max_tokens_per_gpu = before
    return found


def leaves_room_to_gather(weights: float, peak: float, available: float) -> bool:
    """True if weights that are kept gathered fit beside the peak, and MARGIN_GATHERED is left free.
    All in one unit."""
    return peak + weights <= available * (1 - MARGIN_GATHERED)


# ----------------------------------------------------------------------------------- rehearsal


class Gpu:
    """Memory of this process's GPU, in bytes."""

    def available(self) -> int:
        """All but what other programs and CUDA itself have."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def emptied(self) -> int:
        """How often the allocator, out of memory, emptied its cache. Each time costs seconds."""
        return torch.cuda.memory_stats()["num_alloc_retries"]


# (model, dataset, indexes of pairs) -> the loss of each pair, and metrics: train.step_loss.
StepLoss = Callable[[nn.Module, object, list[int]], tuple[Tensor, dict[str, Tensor]]]


class Measured(NamedTuple):
    """What a rehearsal took on this process."""

    held: list[int]  # bytes after the forward pass of each micro-batch
    peak: int  # bytes
    emptied: int  # how often the allocator emptied its cache


def measure(
    model: nn.Module,
    dataset,
    steps: list[list[list[int]]],
    recomputed: int,
    step_loss: StepLoss,
    gpu: Gpu | None,
) -> Measured:
    """Forward and backward of these micro-batches with so many blocks recomputed, without an
    update. Raises StoppedError with advice if memory does not suffice."""
    model.recompute_first(recomputed)
    held, peak, emptied = [], 0, gpu.emptied() if gpu else 0
    for step in steps:
        if gpu:
            gpu.reset_peak()
        for i, indexes in enumerate(step):
            tokens = int(dataset.sizes[indexes].sum())
            where = f"in the run's costliest micro-batch, {tokens} tokens"
            with advising(where, model, dataset, tokens):
                sharding.prepare_backward(model, last=i + 1 == len(step))
                loss = step_loss(model, dataset, indexes)[0].sum() * 0
                held.append(gpu.allocated() if gpu else 0)
                loss.backward()
                loss.item()  # waits, as the loop does for the norm, before gradients are freed
                del loss
        peak = max(peak, gpu.peak() if gpu else 0)
        model.zero_grad()
    return Measured(held, peak, gpu.emptied() - emptied if gpu else 0)


class Trial:
    """The run's costliest micro-batches, tried with a number of blocks recomputed."""

    def __init__(self, model: nn.Module, dataset, step_loss: StepLoss, gpu: Gpu | None):
        self.model, self.dataset, self.step_loss, self.gpu = model, dataset, step_loss, gpu
        self.layers, self.llama = len(model.model["layers"]), model.config
        self.recomputed, self.measured = self.layers, None  # the choice so far and its measurement

    def find(self, numbers: list[int]) -> Costliest:
        return costliest_of(self.llama, self.dataset, dist.get_world_size(), numbers)

    def run(self, found: Costliest, recomputed: int) -> None:
        self.recomputed, steps = recomputed, found.steps
        self.measured = measure(
            self.model, self.dataset, steps, recomputed, self.step_loss, self.gpu
        )

    def everywhere(self, number: float) -> int:
        return smallest(number, self.dataset.device)

    def in_pieces(self, found: Costliest) -> bool:
        """True if the allocator empties its cache, also when it is tried again: earlier tries may
        have left the pieces."""
        if self.everywhere(not self.measured.emptied):
            return False
        self.run(found, self.recomputed)
        return not self.everywhere(not self.measured.emptied)


def keep_blocks(trial: Trial, found: Costliest, limit: float) -> None:
    """Recomputes as few blocks as fit. A kept block adds at any moment at most what it keeps, so
    two measurements say which numbers fit: with every block recomputed, and with one kept (if
    `pair_bytes` says that it fits). What a choice leaves free is measured again."""
    layers, all_recomputed = trial.layers, trial.measured

    def fitting(one: float) -> int:
        return trial.everywhere((limit - trial.measured.peak) // one)

    few, fewer = (pair_bytes(trial.llama, trial.dataset, n) for n in (layers, layers - 1))
    if not fitting(max((fewer - few)[indexes].sum() for step in found.steps for indexes in step)):
        return
    trial.run(found, layers - 1)
    held = zip(all_recomputed.held, trial.measured.held, strict=True)
    one = max(1, *(after - before for before, after in held))
    trial.recomputed, trial.measured = layers, all_recomputed
    while more := min(trial.recomputed, fitting(one)):
        trial.run(found, trial.recomputed - more)
    trial.model.recompute_first(trial.recomputed)  # the last try may have been that of `one`


def rehearse(
    model: nn.Module,
    dataset,
    step_loss: StepLoss,
    say: Callable[[str], None],
    gpu: Gpu | None = None,
) -> dict[str, int]:
    """Runs the run's costliest micro-batches beside weights and moments, and with --checkpoint-
    blocks auto chooses how many blocks are recomputed, the same on all processes.

    Too little memory then shows in the first minute, not hours later, when such a batch is drawn.
    No process may run out of memory while it tries, because the others would wait for it. If free
    memory is in pieces, or in another stream's pool, the allocator would empty its cache in each
    step: then more blocks are recomputed, or micro-batches stay as they are.

    model: model.Llama; dataset: train.Dataset, whose max_tokens_per_gpu may be raised.
    step_loss: train.step_loss. gpu: whose memory is measured (default: this process's, if it
    computes on one; on a CPU nothing can be measured). Returns and says what was chosen.
    """
    if gpu is None and dataset.device == "cuda":
        gpu = Gpu()
    trial = Trial(model, dataset, step_loss, gpu)
    layers, config = trial.layers, dataset.config
    fixed = recomputed_blocks(config.checkpoint_blocks, layers, gpu is not None)
    if gpu:
        trial.everywhere(0)  # so that NCCL has made what it keeps for this: see available
    found = trial.find([layers, layers // 2, 0] if fixed is None else [fixed])
    resting = gpu.allocated() if gpu else 0
    trial.run(found, layers if fixed is None else fixed)
    if gpu and not fixed:
        trial.run(found, trial.recomputed)  # again: the first time, compiling took memory too
    for_pieces = 0  # blocks that are recomputed only because free memory is in pieces
    if fixed is None:
        limit = gpu.available() * (1 - MARGIN)
        keep_blocks(trial, found, limit)
        fit = trial.recomputed
        while trial.recomputed < layers and trial.in_pieces(found):
            trial.run(found, min(layers, trial.recomputed + max(1, layers // 8)))
        for_pieces = trial.recomputed - fit
        if trial.recomputed == 0 and config.max_tokens_per_gpu is None:
            found = try_larger(trial, found, resting, limit)
    gathered = bool(gpu) and trial.recomputed == 0 and try_gathered(trial, found)
    text = f"recomputes {trial.recomputed} of {layers} blocks"
    if for_pieces:
        text += f", {for_pieces} of them because free memory is in pieces"
    if gathered:
        text += ", keeps weights gathered"
    if gpu:
        peak, most = trial.measured.peak / 2**30, gpu.available() / 2**30
        text += f"; {peak:.1f} of {most:.1f} GiB at the peak"
        gpu.reset_peak()  # from here on it is that of the steps
    say(f"  memory     {text}\n  batches    {describe(found, dataset)}")
    return {
        "recomputed_blocks": trial.recomputed,
        "max_tokens_per_gpu": dataset.max_tokens_per_gpu,
        "weights_kept_gathered": gathered,
    }


def try_larger(trial: Trial, found: Costliest, resting: float, limit: float) -> Costliest:
    """Larger micro-batches, if they fit and free memory is not in pieces. Returns the costliest."""
    larger = enlarge(trial.dataset, found, trial.find, trial.measured.peak, resting, limit)
    if larger is found:
        return found
    trial.run(larger, 0)
    if not trial.in_pieces(larger):
        return larger
    trial.dataset.max_tokens_per_gpu //= LARGER
    trial.run(found, 0)
    return found


def try_gathered(trial: Trial, found: Costliest) -> bool:
    """Keeps weights gathered if that leaves room on every process."""
    weights = sum(p.numel() for p in trial.model.parameters())
    weights *= compute_dtype(trial.dataset).itemsize
    fits = leaves_room_to_gather(weights, trial.measured.peak, trial.gpu.available())
    if not trial.everywhere(fits) or not sharding.keep_gathered(trial.model):
        return False
    trial.run(found, 0)
    return True


def smallest(number: float, device: str) -> int:
    """The smallest of all processes' numbers, at least 0."""
    found = torch.tensor(max(0, int(number)), device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def describe(found: Costliest, dataset) -> str:
    """What the micro-batches look like, in one line."""
    return (
        f"{found.count:.1f} micro-batches a step on each process, of {found.mean:,.0f} tokens on "
        f"average and {found.most:,} at most (--max-tokens-per-gpu {dataset.max_tokens_per_gpu})"
    )


@contextlib.contextmanager
def advising(where: str, model: nn.Module, dataset, tokens: float = math.inf) -> Iterator[None]:
    """Inside this `with`, running out of memory and a compiler that does not work are turned into
    a StoppedError that names the flag to change.
    tokens: of the micro-batch, if it is known."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from_compiler = type(error).__module__.startswith("torch._inductor")
        if from_compiler and not out_of_memory(error):
            reason = shown(str(error).strip(), 150)
            raise StoppedError(
                f"the model does not compile ({reason}); pass --compile off"
            ) from None
        if not out_of_memory(error):
            raise
        longest, most = int(dataset.sizes.max()), dataset.config.max_tokens
        now = dataset.max_tokens_per_gpu
        less = max(int(min(now, tokens)) // 2, longest)
        advice = f"lower --max-tokens-per-gpu from {now} to {less}"
        if longest == min(now, tokens):
            advice = (
                f"that is one pair: lower --max-tokens from {most} to {most // 2}, or use more "
                "processes"
            )
        blocks = [block.recompute for block in model.model["layers"]]
        if not all(blocks):
            more = min(len(blocks), sum(blocks) + max(1, len(blocks) // 8))
            kept = " and weights kept gathered" * sharding.weights_kept_gathered(model)
            advice += (
                f", or pass --checkpoint-blocks {more}: {sum(blocks)} of {len(blocks)} blocks were "
                f"recomputed{kept}"
            )
        raise StoppedError(f"out of memory {where}; {advice}") from None


# ---------------------------------------------------------------------------------- simulation

# A mesh -> the sharded model and its optimizer.
Build = Callable[[DeviceMesh], tuple[nn.Module, torch.optim.Optimizer]]


def simulated_peak(
    build: Build, steps: list[list], gpus: int, recomputed: int, gathered: bool
) -> dict[str, float]:
    """GiB by kind ("total" among them) at the peak of one of `gpus` CUDA devices.

    The batches of each step run forward and backward with fake tensors, under torch's memory
    tracker, on the first process of a fake group. Memory that the allocator wastes, and CUDA's own,
    come on top; a compiled block keeps somewhat less than this.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    mesh, highest = init_device_mesh("cpu", (gpus,)), {"Total": 0}
    for batches in steps:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, optimizer = build(mesh)
            model.recompute_first(recomputed)
            if gathered:
                sharding.keep_gathered(model)
            # The moments exist already; the update itself is fused and allocates nothing.
            tracker = FSDPMemTracker(model, optimizer)
            with tracker:
                for i, batch in enumerate(batches):
                    tracker.reset_mod_stats()  # or it takes a second forward pass for a mistake
                    sharding.prepare_backward(model, last=i + 1 == len(batches))
                    model(batch)[0].sum().backward()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
        highest = max(highest, peak, key=lambda kinds: kinds["Total"])
    names = {kind: str(kind).split(".")[-1].lower().replace("_", " ") for kind in highest}
    return {names[kind]: size / 2**30 for kind, size in highest.items() if size}


def fewest_recomputed(peak_of: Callable[[int], float], layers: int, limit: float) -> int:
    """The smallest number of recomputed blocks whose peak, peak_of(number), is within the limit;
    all of them if none is. Assumes that each block more lowers the peak, by about as much."""
    if peak_of(0) <= limit:
        return 0
    if peak_of(layers) > limit:
        return layers
    low, high = 0, layers  # low is too few, high is enough
    while high - low > 1:
        share = (peak_of(low) - limit) / (peak_of(low) - peak_of(high))
        middle = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        if peak_of(middle) <= limit:
            high = middle
        else:
            low = middle
    return high


def print_plan(dataset, llama, parameters: int, build: Build) -> None:
    """Prints the steps, FLOPs and memory of a run on --plan devices, with the choices that
    `rehearse` makes on devices of --gpu-memory.

    dataset: train.Dataset; llama: model.LlamaConfig; parameters: their number; build: see Build.
    """
    config, layers, gpus = dataset.config, llama.num_hidden_layers, dataset.config.plan
    limit = (config.gpu_memory or math.inf) * (1 - MARGIN)
    fixed = recomputed_blocks(config.checkpoint_blocks, layers, on_gpu=True)

    def find(numbers: list[int]) -> Costliest:
        return costliest_of(llama, dataset, gpus, numbers)

    def simulated(found: Costliest, gathered: bool = False) -> Callable[[int], dict[str, float]]:
        """A number of recomputed blocks -> the peak by kind."""
        batches = [[dataset.batch(indexes) for indexes in step] for step in found.steps]

        @functools.cache
        def peak_of(recomputed: int) -> dict[str, float]:
            with announced(f"simulating a step that recomputes {recomputed} of {layers} blocks"):
                return simulated_peak(build, batches, gpus, recomputed, gathered)

        return peak_of

    found = find([layers, layers // 2, 0] if fixed is None else [fixed])
    peak_of, gathered, numbers = simulated(found), False, [fixed]
    if fixed is None:
        numbers = [layers, 0]
    if fixed is None and config.gpu_memory:
        fewest = fewest_recomputed(lambda number: peak_of(number)["total"], layers, limit)
        numbers = [fewest]
        if fewest == 0 and config.max_tokens_per_gpu is None:
            resting = 12 * parameters / gpus / 2**30  # weights and moments
            found = enlarge(dataset, found, find, peak_of(0)["total"], resting, limit)
            peak_of = simulated(found)
    if numbers == [0] and config.gpu_memory:
        weights = 2 * parameters / 2**30  # in bf16
        gathered = leaves_room_to_gather(weights, peak_of(0)["total"], config.gpu_memory)
        peak_of = simulated(found, gathered) if gathered else peak_of
    share = config.pairs_per_step / len(dataset.pairs)  # of an epoch, in one step
    flops = 3 * share * pair_flops(llama, dataset.pairs, config.share_prompt)[:, :2].sum()
    print(
        f"{config.model} on {gpus} GPU{'s' * (gpus > 1)}, {config.data}\n"
        f"  parameters  {parameters:,}\n"
        f"  steps       {dataset.steps:,} of {config.pairs_per_step} pairs, "
        f"{dataset.sizes.sum() * share:,.0f} tokens a step\n"
        f"  batches     {describe(found, dataset)}\n"
        f"  FLOPs       {flops:.3g} a step (forward and backward; recomputation not counted)"
    )
    for number in numbers:
        peak = peak_of(number)
        kinds = ", ".join(f"{k} {size:.1f}" for k, size in peak.items() if size >= 0.05)
        print(
            f"  memory      {peak['total']:.1f} GiB at the peak on each GPU, if {number} of "
            f"{layers} blocks are recomputed{' and weights are kept gathered' * gathered}: "
            f"{kinds}"
        )
    if peak["total"] > limit:
        print(f"  That is more than {limit:.1f} GiB, {1 - MARGIN:.0%} of --gpu-memory.")


def init_fake_group(gpus: int) -> None:
    """Makes this process the first of `gpus` processes that do not exist. Raises InputError if it
    is one of torchrun's."""
    if in_a_group():
        raise InputError("--plan runs in one process: python train.py, without torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
