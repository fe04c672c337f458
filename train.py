"""Fine-tunes a Llama 3 on preference pairs with ASFT, or with one of its baselines.

    python train.py                                        the example: a tiny model, two minutes on a laptop
    python train.py --model DIR --data FILE                your model (a Hugging Face directory), your pairs
    torchrun --nproc_per_node 8 train.py --model DIR --data FILE        the same on eight GPUs: same flags, same updates
    python train.py --resume OUT                           go on with a run that was stopped or killed
    python train.py --help                                 every flag, its default, and what the paper says of it

In reading order
    Config, parse       one frozen dataclass: the defaults, the flags, --help, the printed header, OUT/config.json
    learning_rate       warm-up and cosine
    start_processes, together, shard, build_model    one process and many, on CPU and on GPUs (FSDP2)
    Data, losses_of     the forward pass: a packed batch -> one loss per pair; and a reference, where a loss wants one
    train               the loop: draw, forward, loss, backward, clip, rate, update, log
    save_checkpoint, newest_checkpoint, load_checkpoint    what a run that is killed goes on from
    evaluate, answer    held-out loss, margin and accuracy; greedy answers to a few held-out prompts
    Log                 the header, the line per step, OUT/metrics.jsonl
    claim_out, run, plan, forward_flops, main    a run's directory; a whole run; what it would take; the exit code

Writes OUT/config.json, OUT/metrics.jsonl, OUT/eval.jsonl, OUT/checkpoints/, OUT/reference.safetensors where a loss has
a reference, and at the end OUT/model/, which transformers and vLLM load.

Weights and AdamW's moments are kept in fp32, sharded over the processes; matrix products run in bf16 on CUDA and in
fp32 on CPU (--precision). A step's pairs do not depend on the number of processes, and each weighs 1/pairs_per_step
wherever it is computed.

A run's state is its step, its weights and AdamW's moments: nothing in it is drawn at random but the order of the
pairs, which is a function of seed and epoch. So a run that goes on from a checkpoint ends with the same bits.

Left out: LoRA, other optimisers, configuration files.
"""

import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import sys
import time
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# OpenMP threads that wait spin for milliseconds by default. Beside another busy process that makes a step on a CPU five
# times slower; with this it costs a few per cent alone. It is read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

import asft
from data import (
    Batch,
    ChatFormat,
    Pair,
    encode_preferences,
    generation_eos,
    pack,
    plan_step,
    read_preferences,
    resolve_max_tokens,
    split_pairs,
)
from model import Llama, LlamaConfig, check_weights, load_weights, save_model
from support.checkpoints import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    stop_unless_finite,
)
from support.files import InputError, checksum, flush, write_whole
from support.flags import LOSS_OPTIONS, MAY_CHANGE, PRESETS, flag, parse, spell
from support.log import Log, describe, show
from support.memory import plan, rehearse
from support.processes import (
    StoppedError,
    StopRequest,
    choose_device,
    complain,
    on_first_process,
    out_of_memory,
    peak_memory_gib,
    together,
)
from support.run_directory import claim_out, fingerprint, read_cache
from support.tensors import finite

# ------------------------------------------------------------------------------------------------------ configuration

HERE = Path(__file__).resolve().parent
# What `python train.py` runs when it is told neither --model nor --data: a tiny model wants a larger rate than an 8B
# one.
EXAMPLE = {
    "model": str(HERE / "examples/model"),
    "data": str(HERE / "examples/train.jsonl"),
    "eval_data": str(HERE / "examples/heldout.jsonl"),
    "lr": 1e-3,
    "samples": 4,
    "eval_every": 20,
}


@dataclass(frozen=True)
class Config:
    """The run. Defaults are the paper's settings (PAPER); where it is silent the help says so (OPEN) and why this was
    chosen."""

    model: str = flag(
        "", "Hugging Face directory of a Llama: config.json, safetensors, tokenizer.json"
    )
    data: str = flag("", "preference pairs, JSONL or JSONL.gz (formats: README)")
    eval_data: str | None = flag(None, "held-out pairs, in the same formats")
    out: str | None = flag(
        None, "directory of this run; new or empty (default: a fresh one under runs/)"
    )

    preset: str | None = flag(
        None,
        "paper: equation 14; align-only: its align term alone; tempered: that with "
        "--temperature (arXiv 2502.01237; both at 1e-6, after a run of sft)",
        tuple(PRESETS),
    )
    loss: str = flag("asft", "which loss (asft.py). PAPER: asft", tuple(asft.LOSSES))
    beta: float = flag(
        0.1, "asft, orpo: weight of the align term; others: reward scale (simpo: 2). PAPER: 0.1"
    )
    sft_weight: float = flag(
        1.0, "asft: weight of the SFT term; 0 trains on the align term alone. PAPER: 1"
    )
    temperature: float = flag(
        1.0, "asft: inside the align term's sigmoids (arXiv 2502.01237). PAPER: 1"
    )
    eps: float = flag(
        1e-6, "asft, orpo: log-probs above -eps count as -eps in log(1-p). OPEN: near fp32's limit"
    )
    gamma: float = flag(1.0, "simpo: target margin of the rewards")
    ipo_sum: bool = flag(
        False, "ipo: summed instead of mean log-probs. OPEN: public code has both; mean is TRL's"
    )
    reference: str = flag(
        "precompute",
        "dpo, ipo: reference log-probs, computed once before training, or by a live "
        "frozen copy of the model. PAPER: live; the losses are the same",
        ("precompute", "live"),
    )
    reference_cache: str | None = flag(
        None,
        "file of precomputed reference log-probs: read if it exists and was made "
        "by the same weights from the same tokens, else written (default: in OUT)",
    )

    lr: float = flag(1e-5, "peak learning rate. PAPER: 1e-5")
    warmup_ratio: float = flag(
        0.1, "share of the steps with linear warm-up. OPEN: the paper says linear; 0.1 is usual"
    )
    min_lr_ratio: float = flag(
        0.0, "the last step's rate over the peak's, cosine between. OPEN: 0 is usual"
    )
    epochs: int = flag(2, "passes over the pairs. PAPER: 2")
    max_steps: int | None = flag(None, "stop after so many steps; the schedule ends there too")
    pairs_per_step: int = flag(
        32,
        "pairs of one update, over all processes. OPEN: the paper's 'batch size 4' does not "
        "say of what; this is 4 on each of 8 GPUs",
    )
    weight_decay: float = flag(0.0, "AdamW's. OPEN: 0, as usual in preference tuning")
    adam_beta1: float = flag(0.9, "AdamW's. OPEN: torch's default")
    adam_beta2: float = flag(0.999, "AdamW's. OPEN: torch's default")
    adam_eps: float = flag(1e-8, "AdamW's. OPEN: torch's default")
    max_grad_norm: float = flag(
        1.0, "gradients are scaled down to this norm. OPEN: 1, the other trainers' default"
    )
    seed: int = flag(0, "of the order of the pairs. OPEN: any; report several")
    shuffle: bool = flag(
        True, "a new order of the pairs each epoch; without, the file's. OPEN: usual"
    )

    max_tokens: int | None = flag(
        None,
        "of a prompt with one response (default: 2048, or what the model takes if "
        "that is less). PAPER: 2048",
    )
    overlong: str = flag(
        "truncate",
        "responses that do not fit after their prompt: cut their end, or drop the pair. "
        "OPEN: truncated, but how the paper does not say",
        ("truncate", "drop"),
    )
    skip_bad_lines: bool = flag(False, "count malformed lines instead of stopping at them")
    max_tokens_per_gpu: int = flag(
        8192,
        "packed tokens of a micro-batch on one process: bounds memory, the update stays the same",
    )
    share_prompt: bool = flag(
        True, "compute each prompt once for both responses; the numbers are the same without"
    )

    device: str = flag(
        "auto", "cuda where there is a device for each process", ("auto", "cpu", "cuda")
    )
    precision: str = flag(
        "auto",
        "of matrix products: bf16 on CUDA, fp32 on CPU; weights, moments, norms, losses are "
        "fp32. OPEN: the paper's FlashAttention-2 implies half precision",
        ("auto", "fp32", "bf16"),
    )
    checkpoint_blocks: str = flag(
        "auto",
        "recompute each block in backward instead of keeping its activations: on for CUDA",
        ("auto", "on", "off"),
    )
    compile: str = flag(
        "auto", "compile each block, once for all lengths: on for CUDA", ("auto", "on", "off")
    )
    replicas: int = flag(
        1, "hybrid sharding: this many groups of processes, each with a whole sharded model"
    )

    eval_every: int = flag(
        0, "steps between evaluations on --eval-data, beside those at the start and the end"
    )
    samples: int = flag(
        0, "held-out prompts to answer (greedily, at most 64 tokens) before and after training"
    )
    save_dtype: str = flag("bf16", "of OUT/model", ("bf16", "fp32"))
    save_every: int = flag(
        200,
        "steps between checkpoints (12 bytes a parameter each), beside the one that a run "
        "makes when it is told to stop; 0: no others",
    )
    keep: int = flag(2, "checkpoints to keep, the newest")
    resume: str | None = flag(
        None,
        "go on with the run in this directory, with its flags, from its newest whole "
        "checkpoint. Without a directory: with the run in --out, or begin it there",
    )
    plan: int | None = flag(
        None,
        "print what the run would take on so many GPUs (steps, tokens, FLOPs, memory by "
        "kind), and stop; loads no weights",
    )

    def __post_init__(self):
        positive = (
            "lr epochs pairs_per_step max_tokens_per_gpu max_steps max_tokens max_grad_norm adam_eps eps "
            "temperature replicas keep plan"
        )
        for name in positive.split():
            value, limit = getattr(self, name), math.inf if name != "max_grad_norm" else math.nan
            if value is not None and (not value > 0 or value == limit):
                raise InputError(f"{spell(name)} is {value}, wanted a number above 0")
        for name in "beta sft_weight gamma weight_decay seed eval_every samples save_every".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{spell(name)} is {getattr(self, name)}, wanted 0 or more")
        for name in "warmup_ratio min_lr_ratio adam_beta1 adam_beta2".split():
            if not 0 <= getattr(self, name) <= 1 or (
                name.startswith("adam") and getattr(self, name) == 1
            ):
                raise InputError(f"{spell(name)} is {getattr(self, name)}, wanted 0 to 1")
        if self.beta == 0 and self.loss in ("dpo", "ipo", "simpo"):
            raise InputError(
                f"--beta is 0.0, wanted more for --loss {self.loss}: nothing would be left of it"
            )
        if self.plan and (
            self.precision == "fp32"
            or self.replicas > 1
            or (self.loss_row.reference and self.reference == "live")
        ):
            raise InputError(
                "--plan simulates neither --precision fp32 nor --replicas nor --reference live"
            )
        if self.ipo_sum and self.loss != "ipo":
            raise InputError(f"--ipo-sum goes with --loss ipo, found --loss {self.loss}")
        if not self.model or not self.data:
            raise InputError("--model and --data go together (with neither, the example runs)")
        if (self.eval_every or self.samples) and not self.eval_data:
            raise InputError("--eval-every and --samples want --eval-data")

    @property
    def loss_row(self) -> asft.Loss:
        row = asft.LOSSES[self.loss]
        return row._replace(logps="sum") if self.ipo_sum else row

    @property
    def loss_options(self) -> dict[str, float]:
        """The keyword arguments of the loss function."""
        return {name: getattr(self, name) for name in self.loss_row.options}

    def command_line(self) -> str:
        """The flags that give this configuration, without those that its loss does not take."""
        words, unused = [], LOSS_OPTIONS - self.loss_options.keys()
        unused |= set() if self.loss_row.reference else {"reference", "reference_cache"}
        unused |= {"resume"}  # the flags of the run itself
        for name, value in vars(self).items():
            if name in unused or (name == "ipo_sum" and self.loss != "ipo"):
                continue
            word = spell(name)
            if isinstance(value, bool):
                words.append(word if value else word.replace("--", "--no-"))
            elif value is not None:
                words.append(f"{word} {shlex.quote(str(value))}")
        return " ".join(words)


def learning_rate(
    step: int, steps: int, peak: float, warmup_ratio: float, min_lr_ratio: float
) -> float:
    """The rate of update `step` (from 0) of `steps`: linear warm-up to the peak, then cosine to min_lr_ratio * peak.

    The first update has a rate above 0 (peak / warm-up steps), update number ceil(warmup_ratio * steps) has the peak,
    and the last one has the minimum (if any is left after the warm-up).
    """
    warmup = max(1, math.ceil(warmup_ratio * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / (steps - warmup)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


# ----------------------------------------------------------------------------------------------- processes and sharding


def start_processes(config: Config) -> DeviceMesh:
    """Joins the process group that torchrun made, or a group of one, and returns the mesh to shard over."""
    cuda = choose_device(config.device, config.precision)[0].type == "cuda"
    # Saturated losses give subnormal gradients, on which a CPU is ten times slower.
    torch.set_flush_denormal(True)
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://"))
        # torchrun keeps its store when it restarts the processes, and in it the addresses of the dead ones.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world
    )
    if world % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide {world} processes")
    shape, names = (config.replicas, world // config.replicas), ("replicate", "shard")
    first = 1 if config.replicas == 1 else 0
    return init_device_mesh("cuda" if cuda else "cpu", shape[first:], mesh_dim_names=names[first:])


def shard(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """FSDP2: parameters stay split over the mesh in their own dtype and are gathered, in compute_dtype, a block at a
    time.

    Gradients are averaged over the mesh in fp32. Inputs are not cast: rotary tables stay fp32. One process that
    computes in the weights' own dtype has nothing to gather, and would only copy.
    """
    if mesh.size() == 1 and compute_dtype == torch.float32:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if (
        model.lm_head is not None
    ):  # else the embedding is the head too, and stays with the root from first to last
        fully_shard(model.model["embed_tokens"], mesh=mesh, mp_policy=policy)
        model.model["embed_tokens"].set_unshard_in_backward(
            False
        )  # the gradient of a look-up needs no weights
        # The head's backward comes first: to give it up after forward would be to gather it twice in a row.
        fully_shard(
            [model.model["norm"], model.lm_head],
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=False,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "logits")


def reshard(model: Llama) -> None:
    """Frees what a forward pass without backward left gathered; until then, parameters() are not the ones that are
    trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def build_model(config: Config, mesh: DeviceMesh) -> Llama:
    """The starting model in fp32, sharded; each process reads its own rows of the files and never holds more."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.load(config.model))
    on = {"auto": mesh.device_type == "cuda", "on": True, "off": False}
    model.checkpoint_blocks = on[config.checkpoint_blocks]
    if on[config.compile]:
        for block in model.model["layers"]:
            block.compile(dynamic=True)
    shard(model, mesh, choose_device(config.device, config.precision)[1])
    model.to_empty(device=mesh.device_type)
    load_weights(model, config.model)
    return model


# --------------------------------------------------------------------------------------------------------- forward pass


class Data:
    """Pairs on the device as a process needs them, and their log-probs under the reference where a loss wants them."""

    def __init__(self, pairs: list[Pair], config: Config, device: str):
        self.pairs, self.config, self.device = pairs, config, device
        self.sizes = np.array([pair.packed_tokens(config.share_prompt) for pair in pairs])
        # A live copy, or numbers of shape (pairs, 2, 2): [pair, chosen or rejected, mean or sum].
        self.reference: Llama | Tensor | None = None

    def batch(self, indexes: list[int]) -> tuple[list[int], Batch, Tensor]:
        """(indexes, their batch, a 1 for each). A process without a pair in this micro-batch must still take part in
        the collectives of the sharded model: it computes the shortest pair, which counts 0."""
        rows = indexes or [int(self.sizes.argmin())]
        batch = pack(
            [self.pairs[i] for i in rows], self.config.share_prompt, self.config.max_tokens
        ).to(self.device)
        return rows, batch, torch.full((len(rows),), float(bool(indexes)), device=self.device)

    def split(self) -> list[list[int]]:
        """All pairs once, as this process's micro-batches."""
        everything, limit = np.arange(len(self.pairs)), self.config.max_tokens_per_gpu
        return split_pairs(everything, self.sizes, dist.get_world_size(), limit)[dist.get_rank()]

    @torch.no_grad()
    def reference_logps(self, rows: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        """mean_R and sum_R of the pairs in the batch under the reference."""
        live = isinstance(self.reference, Llama)
        return self.reference(batch) if live else self.reference[rows].flatten(0, 1).unbind(-1)


def attach_reference(
    config: Config, mesh: DeviceMesh, model: Llama, parts: list[Data], key: str, cache: Path
) -> None:
    """Gives each part the log-probs of the frozen starting model: of a live copy, or numbers computed once and kept."""
    if config.reference == "live":
        live = build_model(config, mesh).requires_grad_(False)
        for part in parts:
            part.reference = live
        return
    logps = on_first_process(lambda: read_cache(cache, key, parts))
    if logps is None:
        everything = Data([pair for part in parts for pair in part.pairs], config, mesh.device_type)
        logps = torch.zeros(len(everything.pairs), 2, 2, device=mesh.device_type)
        with torch.no_grad():
            for indexes in everything.split():
                rows, batch, present_B = everything.batch(indexes)
                logps[rows] += (
                    torch.stack(model(batch), -1).unflatten(0, (-1, 2)) * present_B[:, None, None]
                )
        reshard(model)
        dist.all_reduce(logps)
        if not finite(logps):
            raise StoppedError(
                "the starting model's log-probs, which the loss wants, are not finite"
            )
        if dist.get_rank() == 0:
            metadata = {"key": key, "checksum": checksum({"logps": logps.tolist()})}
            write_whole(cache, save({"logps": logps.cpu()}, metadata))
    of_parts = logps.to(mesh.device_type).split([len(part.pairs) for part in parts])
    for part, of_part in zip(parts, of_parts, strict=True):
        part.reference = of_part


def losses_of(
    model: Llama, data: Data, rows: list[int], batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """One loss per pair, and per-pair metrics under the same names for every loss."""
    loss, options = data.config.loss_row, data.config.loss_options
    kind = ("mean", "sum").index(loss.logps)
    logps = model(batch)  # mean_R, sum_R
    inputs = [logps[kind][0::2], logps[kind][1::2]]
    if loss.reference:
        reference_R = data.reference_logps(rows, batch)[kind]
        inputs += [reference_R[0::2], reference_R[1::2]]
    loss_B, metrics = loss.function(*inputs, **options)
    mean_R, sum_R = (x.detach() for x in logps)
    always = {
        "loss": loss_B.detach(),
        "sft": -mean_R[0::2],
        "logp_w": mean_R[0::2],
        "logp_l": mean_R[1::2],
        "sum_logp_w": sum_R[0::2],
        "sum_logp_l": sum_R[1::2],
        **asft.comparison(mean_R[0::2], mean_R[1::2]),
    }
    return loss_B, always | metrics


class Sums(dict):
    """Per-pair metrics summed over micro-batches, then over processes: every pair counts once and alike."""

    def add(self, metrics: dict[str, Tensor], present_B: Tensor) -> None:
        for name, value_B in metrics.items():
            self[name] = self.get(name, 0) + (value_B * present_B).sum()

    def mean(self, pairs: int) -> dict[str, float]:
        total = torch.stack([value.double() for value in self.values()])
        dist.all_reduce(total)
        return dict(zip(self, (total / pairs).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ the loop


def make_optimizer(config: Config, model: Llama) -> torch.optim.AdamW:
    """AdamW with its moments, zero as its first step would make them: what does not fit fails before the first step,
    and a checkpoint has what to fill."""
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


def plan_of(data: Data, step: int, processes: int) -> list[list[list[int]]]:
    """[process][micro-batch] -> indexes of pairs."""
    config = data.config
    seed = config.seed if config.shuffle else None
    return plan_step(
        data.sizes, config.pairs_per_step, seed, step, processes, config.max_tokens_per_gpu
    )


def train(
    config: Config,
    model: Llama,
    optimizer: torch.optim.AdamW,
    data: Data,
    held_out: Data | None,
    log: "Log",
    mesh: DeviceMesh,
    steps: int,
    done: int,
    identity: str,
    stop: StopRequest,
) -> None:
    """Runs the steps after the first `done`. One step: draw, forward, loss, backward, clip, rate, update, log."""
    rank, world = dist.get_rank(), dist.get_world_size()
    steps_per_epoch = -(-len(data.pairs) // config.pairs_per_step)
    left = 0.0
    for step in range(done, steps):
        started = time.perf_counter()
        plan = plan_of(data, step, world)
        drawn = [i for of_rank in plan for indexes in of_rank for i in indexes]

        sums, suspects = Sums(), []
        for indexes in plan[rank]:
            rows, batch, present_B = data.batch(indexes)
            loss_B, metrics = losses_of(model, data, rows, batch)
            # FSDP averages gradients over processes, hence `world`; the weight of a pair is the same in every step and
            # place.
            ((loss_B * present_B).sum() * (world / config.pairs_per_step)).backward()
            sums.add(metrics, present_B)
            suspects += [
                data.pairs[rows[i]].place for i in (~loss_B.isfinite()).nonzero()[:, 0].tolist()
            ]

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        means = sums.mean(len(drawn))
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            stop_non_finite(
                step + 1, means["loss"], norm, suspects, [data.pairs[i].place for i in drawn]
            )

        rate = learning_rate(step, steps, config.lr, config.warmup_ratio, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - started
        tokens = int(data.sizes[drawn].sum())
        left += (seconds - left) / min(
            step + 1 - done, 20
        )  # of one step, averaged over the last ones
        peak = torch.tensor(peak_memory_gib(), device=data.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        row = {
            "step": step + 1,
            "epoch": round((step + 1) / steps_per_epoch, 4),
            **means,
            "lr": rate,
            "grad_norm": norm,
            "pairs": len(drawn),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "pairs_per_s": len(drawn) / seconds,
            "peak_memory_gib": float(peak),
        }
        log.step(row, steps, left * (steps - step - 1))
        wanted = step + 1 == steps or (config.eval_every and (step + 1) % config.eval_every == 0)
        if held_out is not None and wanted:
            row |= evaluate(model, held_out, log, step + 1)
        log.append("metrics.jsonl", row)
        asked = torch.tensor(stop.number, device=data.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if step + 1 < steps and (
            asked or (config.save_every and (step + 1) % config.save_every == 0)
        ):
            save_checkpoint(log.out, step + 1, identity, model, optimizer, mesh, config.keep)
            if asked:
                name = signal.Signals(int(asked)).name
                log.say(
                    f"\nstopped by {name} after step {step + 1} of {steps}; go on with --resume {log.out}"
                )
                raise StoppedError(name, 128 + int(asked))


def stop_non_finite(
    step: int, loss: float, norm: float, suspects: list[str], drawn: list[str]
) -> typing.NoReturn:
    """Raises StoppedError everywhere, naming the pairs whose loss is not finite, or all of the step if none is."""
    named = [place for places in together(lambda: suspects) for place in places] or drawn
    more = f" and {len(named) - 20} more" if len(named) > 20 else ""
    raise StoppedError(
        f"step {step}: loss {loss}, gradient norm {norm}; stopped before the update. Pairs: "
        f"{', '.join(named[:20])}{more}"
    )


@torch.no_grad()
def evaluate(
    model: Llama, data: Data, log: "Log", step: int, answers: list[str] | None = None
) -> dict[str, float]:
    """Held-out metrics, eval_loss and so on: means over all pairs, each counted once whatever the number of processes.
    Logged, with `answers` beside them."""
    sums = Sums()
    for indexes in data.split():
        rows, batch, present_B = data.batch(indexes)
        _, metrics = losses_of(model, data, rows, batch)
        sums.add(metrics, present_B)
    reshard(model)
    row = {f"eval_{name}": value for name, value in sums.mean(len(data.pairs)).items()}
    log.evaluation(step, row, answers or [])
    return row


@torch.no_grad()
def answer(
    model: Llama, chat: ChatFormat, prompt: np.ndarray, device: str, max_new_tokens: int = 64
) -> str:
    """A greedy answer, each token from a fresh pass over all before it: for a few samples; eval.py generates in
    earnest."""
    ids = prompt.tolist()
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(ids))):
        best = model.logits(torch.tensor(ids, device=device))[-1].argmax()
        dist.broadcast(best, 0)  # so that every process stops at the same token
        if int(best) in chat.stop_ids:
            break
        ids.append(int(best))
    reshard(model)
    return chat.decode(ids[len(prompt) :])


# --------------------------------------------------------------------------------------------------------- checkpoints

# OUT/checkpoints/step-000200/ has a file per process (of the first replica), with its rows of every weight and moment,
# and checkpoint.json, with their checksums. It is written under a hidden name and renamed when all of it is on the
# disk. safetensors and JSON: nothing in it can execute.


# -------------------------------------------------------------------------------------------------------------- logging


# -------------------------------------------------------------------------------------------------------------- the run


def run(config: Config) -> None:
    """A whole run: check everything, then train, then save."""
    if config.resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise InputError(
            "torchrun has started this run again, which wants --out DIR --resume; above stands why"
        )
    llama = LlamaConfig.load(config.model)
    config = dataclasses.replace(config, max_tokens=resolve_max_tokens(config.max_tokens, llama))
    if config.plan:
        plan(config, llama, config.plan)
        return
    check_weights(config.model, llama)
    generation_eos(config.model)  # now, not when it is exported
    mesh = start_processes(config)
    parts, counts, chat = read_data(config, llama, mesh.device_type)
    data, held_out = parts[0], parts[1] if config.eval_data else None
    marks = on_first_process(lambda: fingerprint(config, parts))
    key = " ".join(marks.values())
    if config.loss_row.reference and config.reference == "precompute" and config.reference_cache:
        # Before a directory is made: it may be the wrong one.
        on_first_process(lambda: read_cache(Path(config.reference_cache), key, parts))
    out = on_first_process(lambda: claim_out(config, marks))
    log, steps = Log(out, dist.get_rank() == 0), count_steps(data)
    if on_first_process((out / "model").exists):
        log.say(f"{out} is finished: its model is {out / 'model'}")
        return
    model = build_model(config, mesh)
    if missing := [rank for rank, seen in enumerate(together((out / ".lock").exists)) if not seen]:
        raise InputError(
            f"--out {out}: not there for process {missing[0]}; all processes of a run want one directory"
        )
    facts = log.header(config, mesh, model, parts, counts, steps) | {"fingerprint": marks}
    identity = checksum(
        marks | {name: value for name, value in vars(config).items() if name not in MAY_CHANGE}
    )
    record = functools.partial(write_whole, out / "config.json", json.dumps(facts, indent=2) + "\n")
    on_first_process(lambda: (out / "config.json").exists() or record())
    if config.loss_row.reference:
        cache = Path(config.reference_cache or out / "reference.safetensors")
        attach_reference(config, mesh, model, parts, key, cache)
    optimizer = make_optimizer(config, model)
    rehearse(model, data, steps)
    checkpoint, state = newest_checkpoint(out, identity, log)
    if config.resume is not None:
        on_first_process(lambda: log.rewind(state["step"]))
        on_first_process(record)
        log.say(
            f"going on from {checkpoint}"
            if checkpoint
            else "no checkpoint yet: beginning with the first step"
        )
    asked = parts[-1].pairs[: config.samples]  # of the held-out ones: --samples wants --eval-data
    if checkpoint:
        load_checkpoint(checkpoint, state, model, optimizer)
    elif held_out is not None:
        before = [answer(model, chat, pair.prompt, mesh.device_type) for pair in asked]
        evaluate(model, held_out, log, 0, before)
    with StopRequest() as stop:  # of the export too: the first signal lets it finish
        train(
            config,
            model,
            optimizer,
            data,
            held_out,
            log,
            mesh,
            steps,
            state["step"],
            identity,
            stop,
        )
        stop_unless_finite(list(model.named_parameters()), steps)
        after = [answer(model, chat, pair.prompt, mesh.device_type) for pair in asked]
        dtype = torch.bfloat16 if config.save_dtype == "bf16" else torch.float32
        on_first_process(lambda: [flush(path) for path in out.glob("*.jsonl")])
        save_model(
            model,
            out / "model",
            dtype=dtype,
            source=config.model,
            stop_ids=[chat.end_of_turn] if chat else [],
        )
    if asked and log.active:
        first = json.loads(
            (out / "eval.jsonl").read_text().split("\n")[0]
        )  # of step 0, unless that was lost
        before = first.get("answers", ["(not in eval.jsonl)"] * len(asked))
        for pair, old, new in zip(asked, before, after, strict=True):
            log.say(
                f"\n  prompt  {show(chat.last_turn(pair.prompt))}\n  before  {show(old)}\n  after   {show(new)}"
            )
    log.say(f"\nsaved {out / 'model'} ({config.save_dtype}); metrics in {out / 'metrics.jsonl'}")


def count_steps(data: Data) -> int:
    """Updates of the whole run; the last one of an epoch may have fewer pairs."""
    config = data.config
    return min(
        config.epochs * -(-len(data.pairs) // config.pairs_per_step),
        config.max_steps or sys.maxsize,
    )


def read_data(
    config: Config, llama: LlamaConfig, device: str
) -> tuple[list[Data], list[Counter], ChatFormat | None]:
    """The training and, where asked for, the held-out pairs, read and checked; the chat format, unless all are ids."""
    files = [config.data] + [config.eval_data] * (config.eval_data is not None)
    counts = [Counter() for _ in files]
    preferences = [
        read_preferences(path, count, config.skip_bad_lines)
        for path, count in zip(files, counts, strict=True)
    ]
    chat = (
        ChatFormat(config.model)
        if any(isinstance(p.chosen, str) for part in preferences for p in part)
        else None
    )
    if config.samples and chat is None:
        raise InputError("--samples wants text: these pairs are token ids")
    parts = []
    for path, part, count in zip(files, preferences, counts, strict=True):
        pairs = encode_preferences(
            part,
            chat,
            config.max_tokens,
            config.overlong,
            count,
            llama.vocab_size,
            lambda text: print(text, flush=True) if dist.get_rank() == 0 else None,
        )
        if not pairs:
            raise InputError(f"{path}: no pair left to use ({describe(count)})")
        parts.append(Data(pairs, config, device))
        parts[-1].split()  # raises where a pair alone is over --max-tokens-per-gpu
    return parts, counts, chat


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 2 for a user's mistake; 1 for numbers that are not finite and for memory that is not there; 128 and
    the signal's number for a run that was told to stop. Each with one clear message."""
    try:
        run(parse(arguments))
        return 0
    except KeyboardInterrupt:  # before training, where there is nothing to save
        return 130
    except OSError as error:
        complain("train.py", f"{error.filename or 'standard output'}: {error.strerror}")
        return 2
    except InputError as error:
        complain("train.py", error)
        return 2
    except StoppedError as error:
        if error.code < 128:  # else a signal: process 0 has said so
            complain("train.py", error)
        return error.code
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        complain(
            "train.py",
            "out of memory. Weights, gradients and moments take 16 bytes a parameter, split over the "
            "processes of a replica, and a micro-batch takes more, the higher --max-tokens-per-gpu; --plan N says "
            "how much on N GPUs",
        )
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(
        code
    )  # sys.exit lets gloo's threads race the interpreter's end, which now and then aborts the process
