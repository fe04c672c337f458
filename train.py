"""Fine-tunes a Llama 3 on preference pairs with ASFT, or with one of its baselines.

    python train.py                                 the example: a tiny model, two minutes
    python train.py --model DIR --data FILE         your model (Hugging Face), your pairs
    torchrun --nproc_per_node 8 train.py ...        the same updates on eight GPUs
    python train.py --resume OUT                    resumes a run that was stopped or killed
    python train.py --help                          every flag, its default, what the paper says

Files: OUT/config.json, metrics.jsonl, eval.jsonl, checkpoints/, a reference's log-probs, and at the
end model/, which transformers and vLLM load.

In reading order
    Config                           every setting, its flag and default; skip it at first
    Dataset, step_loss               what a step draws; the forward pass and loss of a micro-batch
    Run, train, learning_rate        the loop; warm-up and cosine
    evaluate                         held-out metrics
    attach_reference                 log-probs of the starting model, for dpo, dpo-norm and ipo
    shard ... make_optimizer         FSDP2 (not needed by one process in fp32); AdamW
    read_datasets, fine_tune, plan   what is trained on; a whole run; what it would need

Weights and AdamW's moments are kept in fp32, sharded over the processes (with --replicas, over
those of a replica). Matrix products run in bf16 on GPUs since the A100, in fp32 elsewhere
(--precision). A step's pairs do not depend on the number of processes, and each pair weighs
1/pairs_per_step wherever it is computed.

The state of a run is its step number, its weights and AdamW's moments (with --keep-best also the
best weights so far). Nothing is drawn at random except the order of the pairs, a function of seed
and epoch. So a run that resumes from a checkpoint ends with the same bits (on a CPU, with the same
flags and number of processes).

Left out: LoRA, other optimisers, configuration files. support/ holds what a reader of the method
may skip.
"""

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import asft
from data import ChatFormat, Pair, check_longest, pack, plan_step, split_pairs
from model import Batch, Llama, LlamaConfig, check_weights, expected_shapes, load_weights
from support import checkpoints, memory, processes, run_directory, sharding
from support.best import Best
from support.compiler import compile_model, worth_compiling
from support.export import export_run
from support.flags import check_flags, flag, parse, resolved
from support.held_out import GroupSums, answer, read_groups
from support.log import Log, header, run_facts, size_and_speed
from support.metrics import Sums, common_metrics
from support.reading import describe, read_pairs
from support.reference import cached_logps
from support.settings import RunSettings
from support.tensors import moved

# ------------------------------------------------------------------------------- configuration

HERE = Path(__file__).resolve().parent
# Without --model and --data, the example runs. A tiny model needs a larger rate than an 8B one.
EXAMPLE = {
    "model": str(HERE / "examples/model"),
    "data": str(HERE / "examples/train.jsonl"),
    "eval_data": str(HERE / "examples/heldout.jsonl"),
    "lr": 1e-3,
    "samples": 4,
    "eval_every": 20,
}


@dataclass(frozen=True)
class Config(RunSettings):
    """Every setting of a run is a flag. PAPER: the paper's setting; OPEN: the paper does not say,
    and this is the choice made here. On the command line a loss's own defaults (asft.py) replace
    the defaults given here: simpo's beta is 2."""

    # RunSettings (support/settings.py) has the others: devices, evaluation, checkpoints, output.

    # model and data
    model: str = flag("", "Hugging Face directory of a Llama: config, safetensors, tokenizer")
    data: str = flag("", "pairs or labelled answers, JSONL or JSONL.gz (docs/data-formats.md)")
    eval_data: str | None = flag(None, "held-out pairs, in the same formats")
    out: str | None = flag(None, "directory of the run, new or empty (default: under runs/)")

    # loss
    loss: str = flag("asft", "which loss (asft.py). PAPER: asft", tuple(asft.LOSSES))
    beta: float = flag(0.1, "weight of the align term (asft, orpo) or reward scale. PAPER: 0.1")
    sft_weight: float = flag(1.0, "asft: weight of the SFT term; 0: only the align term. PAPER: 1")
    temperature: float = flag(1.0, "asft: inside the align term (arXiv 2502.01237). PAPER: 1")
    eps: float = flag(1e-6, "asft, orpo: in 1-p and in odds, log-probs above -eps are -eps. OPEN")
    gamma: float = flag(1.0, "simpo: target margin of the rewards")
    ipo_sum: bool = flag(False, "ipo: summed log-probs. OPEN: public code has both; TRL has means")
    reference: str = flag(
        "precompute",
        "reference's log-probs: computed once, or in each step by a frozen copy. PAPER: live",
        ("precompute", "live"),
    )

    # optimisation, order of the pairs
    lr: float = flag(1e-5, "peak learning rate. PAPER: 1e-5")
    warmup_ratio: float = flag(0.1, "share of the steps that warm up. PAPER: linear. OPEN: length")
    min_lr_ratio: float = flag(0.0, "last rate over the peak, cosine between. OPEN: 0 is usual")
    epochs: int = flag(2, "passes over the pairs. PAPER: 2")
    max_steps: int | None = flag(None, "stop after so many steps; the schedule ends there too")
    pairs_per_step: int = flag(
        32,
        "pairs (or labelled answers) of one update, over all GPUs. OPEN: PAPER says batch size 4; "
        "32 are 4 on each of 8 GPUs",
    )
    weight_decay: float = flag(0.0, "AdamW's. OPEN: 0, as usual in preference tuning")
    adam_beta1: float = flag(0.9, "AdamW's. OPEN: torch's default")
    adam_beta2: float = flag(0.999, "AdamW's. OPEN: torch's default")
    adam_eps: float = flag(1e-8, "AdamW's. OPEN: torch's default")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm. OPEN: usual")
    seed: int = flag(0, "seed of the pairs' order. OPEN: any; report several")
    shuffle: bool = flag(True, "a new order of the pairs each epoch; without, the file's. OPEN")

    # lengths, micro-batches, precision
    max_tokens: int | None = flag(
        None, "most tokens of a prompt and its answer (default: 2048 or the model's). PAPER: 2048"
    )
    overlong: str = flag(
        "truncate", "too long a response: cut its end, or drop its pair. OPEN", ("truncate", "drop")
    )
    max_tokens_per_gpu: int | None = flag(
        None,
        "packed tokens of a micro-batch on one process: bounds memory, same update (default: 8192; "
        "16384 where --checkpoint-blocks auto finds room for it)",
    )
    share_prompt: bool = flag(True, "compute a prompt once for both answers; same up to rounding")
    precision: str = flag(
        "auto",
        "matrix products: bf16 on GPUs since the A100, fp32 elsewhere. OPEN",
        ("auto", "fp32", "bf16"),
    )

    def __post_init__(self):
        check_flags(self)

    @property
    def loss_row(self) -> asft.Loss:
        """The row of asft.LOSSES; with --ipo-sum, of log-probs that are sums."""
        row = asft.LOSSES[self.loss]
        return row._replace(logps="sum") if self.ipo_sum else row

    @property
    def loss_options(self) -> dict[str, float]:
        """The keyword arguments of the loss function."""
        return {name: getattr(self, name) for name in self.loss_row.options}


# ----------------------------------------------------------------------- dataset, step and loop


class Dataset:
    """The encoded pairs of a file, how steps draw and batch them, and the reference's log-probs of
    them if the loss needs those."""

    def __init__(self, pairs: list[Pair], config: Config, device: str):
        self.pairs, self.config, self.device = pairs, config, device
        self.sizes = np.array([pair.packed_tokens(config.share_prompt) for pair in pairs])
        self.max_tokens_per_gpu = config.max_tokens_per_gpu or 8192  # memory.rehearse may raise it
        # A live copy, or numbers of shape (pairs, 2, 2): [pair, chosen or rejected, mean or sum].
        self.reference: Llama | Tensor | None = None
        check_longest(self.sizes, self.max_tokens_per_gpu, pairs)
        self.stand_in = [int(self.sizes.argmin())]  # see `batch`
        self.groups: dict[str, set[int]] = {}  # a value of --eval-by -> indexes of its pairs

    @property
    def steps_per_epoch(self) -> int:
        """Updates of an epoch. The last one may have fewer pairs."""
        return -(-len(self.pairs) // self.config.pairs_per_step)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        steps = self.config.epochs * self.steps_per_epoch
        return min(steps, self.config.max_steps or steps)

    def micro_batches(self, update: int, world: int) -> list[list[list[int]]]:
        """[process][micro-batch] -> indexes of the pairs of update `update` (from 0)."""
        seed = self.config.seed if self.config.shuffle else None
        pairs_per_step = self.config.pairs_per_step
        return plan_step(self.sizes, pairs_per_step, seed, update, world, self.max_tokens_per_gpu)

    def own_micro_batches(self) -> list[list[int]]:
        """All pairs once: this process's micro-batches of them."""
        everything = np.arange(len(self.pairs))
        world = dist.get_world_size()
        return split_pairs(everything, self.sizes, world, self.max_tokens_per_gpu)[dist.get_rank()]

    def batch(self, indexes: list[int]) -> Batch:
        """The packed batch of these pairs.

        A process without a pair in this micro-batch must still take part in the collectives of the
        sharded model: it computes a stand-in, the shortest pair, which then counts 0.
        """
        drawn = [self.pairs[i] for i in indexes or self.stand_in]
        batch = pack(drawn, self.config.share_prompt, longest=self.config.max_tokens)
        return batch.to(self.device)

    @torch.no_grad()
    def reference_logps(self, indexes: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        """mean_R and sum_R of the batch's responses under the reference."""
        if isinstance(self.reference, Llama):
            return self.reference(batch)
        rows_B = moved(torch.tensor(indexes or self.stand_in), self.device)
        return self.reference[rows_B].flatten(0, 1).unbind(-1)  # (B, 2, 2) -> (R, 2) -> two (R,)


def step_loss(
    model: Llama, dataset: Dataset, indexes: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward pass of one micro-batch: packed pairs -> one loss per pair.

    Returns loss_B, and metrics per pair, detached: the loss's own, and those that every loss has
    (support/metrics.py). "rows" among them is 1; for a stand-in 0, so that it does not count.
    """
    loss = dataset.config.loss_row
    batch = dataset.batch(indexes)
    mean_R, sum_R = model(batch)  # responses 2i and 2i+1: chosen and rejected of pair i
    logp_R = mean_R if loss.logps == "mean" else sum_R
    logp_w_B, logp_l_B = logp_R[0::2], logp_R[1::2]
    # The model gives an absent answer log-prob 0. For a chosen one that is right: its term is 0. A
    # rejected one needs p_l = 0, so -inf.
    logp_l_B = logp_l_B.masked_fill(batch.length_R[1::2] == 0, -math.inf)
    inputs = [logp_w_B, logp_l_B]
    if loss.reference:
        mean_ref_R, sum_ref_R = dataset.reference_logps(indexes, batch)
        reference_R = mean_ref_R if loss.logps == "mean" else sum_ref_R
        inputs += [reference_R[0::2], reference_R[1::2]]
    loss_B, metrics = loss.function(*inputs, **dataset.config.loss_options)
    common = common_metrics(mean_R.detach(), sum_R.detach(), batch.length_R, drawn=bool(indexes))
    return loss_B, {"loss": loss_B.detach()} | metrics | common


@dataclass
class Run:
    """All that the loop needs."""

    config: Config
    mesh: DeviceMesh
    model: Llama
    optimizer: torch.optim.AdamW
    training: Dataset
    held_out: Dataset | None
    chat: ChatFormat | None  # None: all pairs are token ids
    log: Log
    best: Best
    stop: processes.StopRequest
    identity: str  # hash of all that a resumed run must share with this one


def train(run: Run, done: int) -> None:
    """Runs steps `done` + 1 to the last, as they are logged.

    One update: draw its pairs; for each micro-batch forward, loss, backward; then clip, set the
    rate, update, log; if due, evaluate and save a checkpoint. Raises StoppedError if the loss or
    the gradient is not finite, before the update; and after the step in which the run is told to
    stop, unless it was the last.
    """
    config, model, dataset, optimizer = run.config, run.model, run.training, run.optimizer
    rank, world = dist.get_rank(), dist.get_world_size()
    scale = world / config.pairs_per_step  # FSDP averages gradients over processes, hence `world`
    for update in range(done, dataset.steps):
        step = update + 1  # as it is logged
        started = time.perf_counter()
        micro_batches = dataset.micro_batches(update, world)  # [process][micro-batch] -> pairs
        # All pairs of this update.
        drawn = [i for by_rank in micro_batches for indexes in by_rank for i in indexes]

        sums = Sums()
        losses = []  # to name the pairs whose loss is not finite
        own = micro_batches[rank]
        for n, indexes in enumerate(own, 1):
            # Tells FSDP when to reduce gradients, and when to free gathered weights.
            sharding.prepare_backward(model, last=n == len(own))
            loss_B, metrics = step_loss(model, dataset, indexes)
            # A pair weighs 1/pairs_per_step, also in an epoch's short last step; a stand-in 0.
            loss = loss_B.sum() * (scale if indexes else 0.0)
            loss.backward()
            sums.add(metrics)
            losses.append((indexes, loss_B.detach()))

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        means = sums.mean_over_processes()
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            processes.stop_non_finite(step, means["loss"], norm, losses, drawn, dataset.pairs)

        rate = learning_rate(
            update, dataset.steps, config.lr, config.warmup_ratio, config.min_lr_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        sharding.optimizer_step(optimizer)  # optimizer.step(), without DTensor's overhead
        optimizer.zero_grad()

        # `means` are of the weights before this update, eval_* of those after it.
        row = {"step": step, "epoch": round(step / dataset.steps_per_epoch, 4), **means, "lr": rate}
        row |= {"grad_norm": norm} | size_and_speed(run, drawn, started)
        run.log.step(row, dataset.steps)
        last = step == dataset.steps
        if run.held_out and (last or (config.eval_every and step % config.eval_every == 0)):
            row |= evaluate(run, step)
            run.best.offer(step, row)
        run.log.append("metrics.jsonl", row)
        if last:
            return  # no checkpoint: the export follows
        stop = run.stop.signal_anywhere(dataset.device)
        if stop or (config.save_every and step % config.save_every == 0):
            checkpoints.save_checkpoint(
                run.log.out, step, run.identity, model, optimizer, run.mesh, config.keep
            )
        if stop:
            raise run.log.stopped(stop, step, dataset.steps)


def learning_rate(
    update: int, steps: int, peak: float, warmup_ratio: float, min_lr_ratio: float
) -> float:
    """Rate of update `update` (from 0) of `steps`: linear warm-up to the peak, then cosine.

    The first update's rate is peak / warmup, not 0; the warm-up's last update has the peak. The
    run's last one has min_lr_ratio * peak (unless all are warm-up): at 0 it changes nothing. The
    paper says linear warm-up and cosine, not how long and how far.
    """
    warmup = max(1, math.ceil(round(warmup_ratio * steps, 6)))  # 0.07 * 100 is above 7 in floats
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = (update + 1 - warmup) / (steps - warmup)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


# ----------------------------------------------------------------------- evaluation, reference


@torch.no_grad()
def evaluate(run: Run, step: int) -> dict[str, float]:
    """Logs and returns held-out metrics, eval_loss and so on. Each is the mean over the pairs that
    have it: a margin needs both answers. Each pair counts once on any number of processes. Also
    logs them for each value of --eval-by, and answers to the first --samples prompts. To be called
    on every process.
    """
    dataset = run.held_out
    prompts = [pair.prompt for pair in dataset.pairs[: run.config.samples]]
    answers = [answer(run.model, run.chat, prompt, dataset.device) for prompt in prompts]
    sums, sums_by_group = Sums(), GroupSums(dataset.groups)
    for indexes in dataset.own_micro_batches():
        _, metrics = step_loss(run.model, dataset, indexes)
        sums.add(metrics)
        sums_by_group.add(metrics, indexes or dataset.stand_in)
    sharding.reshard(run.model)  # without it, parameters() would still be the gathered weights
    row = sums.mean_over_processes("eval_")
    run.log.evaluation(step, row, sums_by_group.means_over_processes(), answers)
    return row


def attach_reference(
    config: Config,
    mesh: DeviceMesh,
    model: Llama,
    datasets: list[Dataset],
    out: Path,
    fingerprint: dict,
) -> None:
    """Gives each dataset the log-probs of the frozen starting model: of a live copy, or computed
    once and kept in OUT or --reference-cache.

    Must be called while `model` holds the starting weights, before a checkpoint is loaded.
    fingerprint: hashes of the weights, pairs and precision that the numbers belong to.
    """
    if config.reference == "live":
        references = [build_model(config, mesh).requires_grad_(False)] * len(datasets)
    else:
        cache = Path(config.reference_cache or out / "reference.safetensors")
        references = cached_logps(cache, fingerprint, model, datasets)
        sharding.reshard(model)
    for dataset, reference in zip(datasets, references, strict=True):
        dataset.reference = reference


# ---------------------------------------------------------------- sharding, model, optimizer


def shard(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """FSDP2: parameters stay split over the mesh in their own dtype, and are gathered in
    compute_dtype one block at a time.

    Gradients are averaged over the mesh in fp32. Inputs are not cast, so rotary tables stay fp32.
    One process in fp32 has nothing to split or to cast.
    """
    if mesh.size() == 1 and compute_dtype == torch.float32:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    split = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for block in model.model["layers"]:
        split(block)
    if model.lm_head is not None:  # a tied embedding is the head too: it stays with the root
        split(model.model["embed_tokens"])
        # The gradient of a look-up needs no weights.
        model.model["embed_tokens"].set_unshard_in_backward(False)
        # The head's backward comes right after its forward: it stays gathered in between.
        split([model.model["norm"], model.lm_head], reshard_after_forward=False)
    split(model)
    register_fsdp_forward_method(model, "logits")  # it gathers weights too, as forward does
    if mesh.shape[-1] == 1:  # each process holds all weights: gradients are reduced once per step
        sharding.hold_whole(model)


def build_model(config: Config, mesh: DeviceMesh) -> Llama:
    """The starting model in fp32, sharded. Each process reads only its own rows of the files."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.load(config.model))
    _, compute_dtype = processes.choose_device(config.device, config.precision)
    if worth_compiling(config.compile, model, mesh.device_type, compute_dtype):
        compile_model(model)
    shard(model, mesh, compute_dtype)
    model.to_empty(device=mesh.device_type)
    load_weights(model, config.model)
    return model


def make_optimizer(config: Config, model: Llama) -> torch.optim.AdamW:
    """AdamW. Its moments are allocated now, as the zeros that its first step would make: too little
    memory shows early, and a checkpoint has tensors to fill."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


# ------------------------------------------------------------------------------------ the run


def read_datasets(
    config: Config, llama: LlamaConfig, device: str
) -> tuple[list[Dataset], list[Counter], ChatFormat | None]:
    """The training pairs and, if asked for, the held-out ones; counts and chat format as
    `read_pairs` returns them."""
    pairs, counts, chat = read_pairs(config, llama.vocab_size)
    datasets = [Dataset(of_file, config, device) for of_file in pairs]
    if config.eval_by:
        held_out = datasets[1]
        held_out.groups = read_groups(config.eval_data, config.eval_by, held_out.pairs)
    return datasets, counts, chat


def fine_tune(config: Config) -> None:
    """A whole run: checks, training, export. Flags, data and the headers of the weights are checked
    before OUT is made, the values of the weights before the first step."""
    # Check flags and files, read the pairs.
    processes.refuse_restart(config.resume is not None)
    llama = LlamaConfig.load(config.model)
    config = resolved(config, llama)
    if config.plan:
        return plan(config, llama)
    weight_files = check_weights(config.model, llama)
    mesh = processes.start(config)
    datasets, counts, chat = read_datasets(config, llama, mesh.device_type)
    training = datasets[0]
    held_out = datasets[1] if config.eval_data else None

    # Make OUT, or open that of the run to resume. fingerprint: of weights, pairs and precision.
    out, fingerprint = run_directory.open_run(config, weight_files, datasets)
    log = Log(out)
    if processes.on_first_process((out / "model").exists):
        log.say(f"{out} is finished: its model is {out / 'model'}; the flags given change nothing")
        return

    # Build what is trained, from the starting weights.
    model = build_model(config, mesh)
    if log.active:
        log.say(header(config, out, model, datasets, counts, chat))
    facts = run_facts(config, model, counts, training.steps, fingerprint)
    run_directory.record(out, facts, replace=False)  # so that a run that is killed can be resumed
    if config.loss_row.reference:
        attach_reference(config, mesh, model, datasets, out, fingerprint)
    optimizer = make_optimizer(config, model)

    # Run the costliest micro-batches without an update, so that running out of memory shows now.
    # This sets how many blocks are recomputed; it may raise training.max_tokens_per_gpu and keep
    # weights gathered.
    with processes.announced("trying the run's costliest micro-batches"):
        facts["memory"] = memory.rehearse(model, training, step_loss, log.say)

    # Find the newest checkpoint, and cut the logs back to its step. identity: the fingerprint and
    # the flags that a resumed run may not change, as one hash.
    identity = run_directory.identity(config, fingerprint)
    checkpoint, written = checkpoints.newest_checkpoint(out, identity, log.say)
    done = written["step"]  # 0 without a checkpoint
    if config.resume is not None:
        processes.on_first_process(lambda: log.rewind(done))
        log.say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint: from step 1")
    run_directory.record(out, facts)

    # Load it, train, export.
    best = Best(config.keep_best, out, identity, model, mesh, log.say)
    stop = processes.StopRequest()
    run = Run(config, mesh, model, optimizer, training, held_out, chat, log, best, stop, identity)
    if checkpoint:
        checkpoints.load_checkpoint(checkpoint, written, model, optimizer)
    elif held_out:
        evaluate(run, 0)  # not offered to `best`: only trained weights count
    with stop:  # also during the export: the first signal lets it finish
        with memory.advising("in a step", model, training):
            train(run, done)
        export_run(run)


def plan(config: Config, llama: LlamaConfig) -> None:
    """Prints the steps, FLOPs and memory of the run on --plan CUDA devices."""
    memory.init_fake_group(config.plan)
    datasets, counts, _ = read_datasets(config, llama, "cpu")

    def build(mesh: DeviceMesh) -> tuple[Llama, torch.optim.AdamW]:
        with torch.device("meta"):
            model = Llama(llama)
        shard(model, mesh, torch.bfloat16)
        model.to_empty(device="cpu")
        return model, make_optimizer(config, model)

    parameters = sum(map(math.prod, expected_shapes(llama).values()))
    print(f"{config.data}: {describe(counts[0])}")
    memory.print_plan(datasets[0], llama, parameters, build)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (support.processes.exit_code)."""
    help_text = (__doc__ or "").partition("\n\nIn reading order")[0]
    return processes.exit_code(
        "train.py",
        lambda: fine_tune(parse(Config, arguments, EXAMPLE, help_text)),
        lambda: memory.ADVICE,
    )


if __name__ == "__main__":
    processes.leave(main)
