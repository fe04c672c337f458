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

import argparse
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# OpenMP threads that wait spin for milliseconds by default. Beside another busy process that makes a step on a CPU five
# times slower; with this it costs a few per cent alone. It is read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import safetensors
import tokenizers
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
    pack,
    plan_step,
    read_preferences,
    resolve_max_tokens,
    split_pairs,
)
from model import (
    InputError,
    Llama,
    LlamaConfig,
    check_weights,
    choose_device,
    complain,
    expected_shapes,
    file_checksum,
    files_checksum,
    finite,
    flush,
    generation_eos,
    load_weights,
    local_rows,
    naming,
    open_safetensors,
    out_of_memory,
    read_json,
    rows_of_rank,
    save_model,
    shown,
)

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
# Recipes. What one fixes of the loss cannot be given otherwise beside it; its rate can.
PRESETS = {
    "paper": {"loss": "asft", "sft_weight": 1.0, "beta": 0.1, "temperature": 1.0, "lr": 1e-5},
    "align-only": {"loss": "asft", "sft_weight": 0.0, "beta": 1.0, "temperature": 1.0, "lr": 1e-6},
    "tempered": {"loss": "asft", "sft_weight": 0.0, "beta": 1.0, "lr": 1e-6},
}
LOSS_OPTIONS = {option for row in asft.LOSSES.values() for option in row.options}
# What --resume may change. Weights and pairs may move, but their content is compared (fingerprint).
MAY_CHANGE = {
    "model",
    "data",
    "eval_data",
    "reference_cache",
    "out",
    "resume",
    "save_every",
    "keep",
    "eval_every",
    "max_tokens_per_gpu",
    "share_prompt",
    "device",
    "checkpoint_blocks",
    "compile",
    "replicas",
    "save_dtype",
    "plan",
}


def flag(default, text: str, choices: tuple | None = None):
    """A field of Config with its line of --help."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


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


def spell(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def parse(arguments: list[str] | None = None) -> Config:
    """Flags -> Config. A loss's own defaults (asft.py) stand where a flag is not given; a flag that it does not take is
    refused."""
    parser = _Parser(
        usage="python train.py [FLAGS]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Config):
        kind = kinds_of(field)[0]
        text = field.metadata["help"] + (
            "" if field.default in (None, "", False, True) else f" [{field.default}]"
        )
        how: dict = {"type": kind, "choices": field.metadata["choices"]}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        how |= {"nargs": "?", "const": ""} if field.name == "resume" else {}
        parser.add_argument(spell(field.name), help=text.replace("%", "%%"), **how)
    given = vars(parser.parse_args(arguments))
    if "resume" in given and (recorded := recorded_flags(given)):
        for name in sorted(given.keys() - MAY_CHANGE):
            if given[name] != recorded[name]:
                raise InputError(
                    f"{spell(name)} is {given[name]}, but the run in {given['out']} has {recorded[name]}; "
                    f"it cannot change on the way"
                )
        return Config(**(recorded | given))
    if "model" not in given and "data" not in given:
        given = EXAMPLE | given
    preset = PRESETS.get(given.get("preset"), {})
    for option in sorted(given.keys() & preset.keys() - {"lr"}):
        if given[option] != preset[option]:
            raise InputError(
                f"{spell(option)} {given[option]} contradicts --preset {given['preset']}, which has "
                f"{preset[option]}; leave one of the two out"
            )
    given = preset | given
    if given.get("preset") == "tempered" and "temperature" not in given:
        raise InputError(
            "--preset tempered wants --temperature: arXiv 2502.01237 tunes it for each model and data set"
        )
    name = given.get("loss", Config.loss)
    options = asft.LOSSES[name].options
    if strange := sorted(given.keys() & LOSS_OPTIONS - options.keys()):
        takes = ", ".join(map(spell, options)) or "none"
        raise InputError(
            f"{spell(strange[0])} is not an option of --loss {name}, which takes {takes}"
        )
    if not asft.LOSSES[name].reference and (
        strange := sorted(given.keys() & {"reference", "reference_cache"})
    ):
        raise InputError(
            f"{spell(strange[0])} is not an option of --loss {name}, which uses no reference model"
        )
    if given.get("reference") == "live" and "reference_cache" in given:
        raise InputError(
            "--reference-cache goes with --reference precompute, found --reference live"
        )
    return Config(**(options | given))


def recorded_flags(given: dict) -> dict | None:
    """The flags of the run that --resume names, or None where it is yet to begin; sets given["out"]."""
    if given["resume"] and Path(given.setdefault("out", given["resume"])) != Path(given["resume"]):
        raise InputError(
            f"--resume {given['resume']} and --out {given['out']} are two directories; leave one out"
        )
    if "out" not in given:
        raise InputError("--resume wants the directory of a run, its own or --out's")
    path = Path(given["out"]) / "config.json"
    if not path.exists() and given["resume"]:
        raise InputError(f"{path}: No such file; --resume DIR wants the directory of a run")
    if not path.exists():
        return None
    facts = read_json(path, "a run's config.json")
    flags = facts.get("flags") if isinstance(facts, dict) else None
    if not isinstance(flags, dict) or flags.keys() != Config.__dataclass_fields__.keys():
        raise InputError(f"{path}: wanted the config.json of a run of this version of train.py")
    for field in dataclasses.fields(Config):
        value, choices = flags[field.name], field.metadata["choices"]
        if type(value) not in kinds_of(field) or (
            choices and value is not None and value not in choices
        ):
            raise InputError(
                f"{path}: {field.name} is {shown(value)}, which no run of train.py writes"
            )
    return flags


def kinds_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types of a field's values: str, or str and None, and so on."""
    return typing.get_args(field.type) or (field.type,)


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


def together(action: typing.Callable[[], typing.Any]) -> list:
    """What action() returns on each process, told to all; so is the first InputError (or failure to write)."""
    everywhere: list = [None] * dist.get_world_size()
    try:
        found = action()
    except InputError as error:
        found = error
    except OSError as error:
        found = InputError(f"{error.filename}: {error.strerror}")
    dist.all_gather_object(everywhere, found)
    for found in everywhere:
        if isinstance(found, InputError):
            raise found
    return everywhere


def on_first_process(action: typing.Callable[[], typing.Any]) -> typing.Any:
    """What action() returns, run by process 0 alone."""
    return together(lambda: action() if dist.get_rank() == 0 else None)[0]


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


def fingerprint(config: Config, parts: list[Data]) -> dict[str, str]:
    """What a run's numbers depend on, its flags aside: hashes of the weights that it starts from and of the very
    tokens, and the precision."""
    files = sorted(set(check_weights(config.model, LlamaConfig.load(config.model)).values()))
    found = {"weights": files_checksum([Path(config.model) / "config.json", *files])}
    for name, part in zip(("pairs", "held-out pairs"), parts, strict=False):
        digest = hashlib.blake2b(digest_size=16)
        for ids in (
            ids for pair in part.pairs for ids in (pair.prompt, pair.chosen, pair.rejected)
        ):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        found[name] = digest.hexdigest()
    dtype = choose_device(config.device, config.precision)[1]
    return found | {"precision": str(dtype).removeprefix("torch.")}


def read_cache(cache: Path, key: str, parts: list[Data]) -> Tensor | None:
    """The reference log-probs in a --reference-cache; None where there is none yet. Raises InputError for a cache of
    another key, a file that is none, and a directory that cannot be written."""
    if not cache.exists():
        if not os.access(cache.parent, os.W_OK):
            raise InputError(
                f"--reference-cache {cache}: {cache.parent} is not a directory that can be written"
            )
        return None
    pairs = sum(len(part.pairs) for part in parts)
    with open_safetensors(cache) as file:
        metadata = file.metadata() or {}
        found = metadata.get("key")
        if found != key:
            raise InputError(
                f"{cache}: of other weights, pairs or precision (key {shown(found)}, wanted {key}); "
                "name another --reference-cache"
            )
        if set(file.keys()) != {"logps"} or file.get_slice("logps").get_shape() != [pairs, 2, 2]:
            raise InputError(
                f"{cache}: not a cache of reference log-probs (wanted logps of shape {pairs}, 2, 2)"
            )
        logps = file.get_tensor("logps")
    if metadata.get("checksum") != checksum({"logps": logps.tolist()}):
        raise InputError(
            f"{cache}: damaged (its checksum differs); delete it, and it is computed again"
        )
    return logps


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


class StoppedError(RuntimeError):
    """The run ends before its last step; the message says why. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


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


def plan_of(data: Data, step: int, processes: int) -> list[list[list[int]]]:
    """[process][micro-batch] -> indexes of pairs."""
    config = data.config
    seed = config.seed if config.shuffle else None
    return plan_step(
        data.sizes, config.pairs_per_step, seed, step, processes, config.max_tokens_per_gpu
    )


def largest_micro_batches(data: Data, steps: int, processes: int) -> list[list[int]]:
    """The largest of the whole run, with which its step begins; then, where steps have several, the largest that meets
    the gradients of one before it: run in this order, they take what the run takes at most."""
    every = [of_process for step in range(steps) for of_process in plan_of(data, step, processes)]
    kinds = (
        [of_process[0] for of_process in every],
        [indexes for of_process in every for indexes in of_process[1:]],
    )
    return [max(kind, key=lambda indexes: data.sizes[indexes].sum()) for kind in kinds if kind]


class StopRequest:
    """SIGTERM and Ctrl-C, while it lasts, ask to stop after the step; a second one stops at once. But within a second
    it is the same request: a scheduler tells torchrun and its processes, and torchrun tells them again."""

    def __enter__(self) -> "StopRequest":
        self.number, self.since = 0, 0.0
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def ask(self, number: int, _frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            os._exit(128 + number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


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


def trained_tensors(model: Llama, optimizer: torch.optim.AdamW) -> list[tuple[str, Tensor]]:
    """All that training changes, the step aside: fp32, sharded."""
    return [
        (f"{kind}.{name}", parameter if kind == "weight" else optimizer.state[parameter][kind])
        for name, parameter in model.named_parameters()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]


def stop_unless_finite(tensors: list[tuple[str, Tensor]], step: int) -> None:
    """Raises StoppedError everywhere, naming the tensors that hold a value that is not a finite number."""
    bad = together(lambda: [key for key, tensor in tensors if not finite(local_rows(tensor)[0])])
    if named := sorted({key for of_process in bad for key in of_process}):
        raise StoppedError(
            f"after step {step} {named[0]} is not finite ({len(named)} such tensors); not saved"
        )


def save_checkpoint(
    out: Path,
    step: int,
    identity: str,
    model: Llama,
    optimizer: torch.optim.AdamW,
    mesh: DeviceMesh,
    keep: int,
) -> None:
    """OUT/checkpoints/step-..., by all processes; then removes all but the newest `keep`. Raises StoppedError for a
    value that is not finite, and InputError where it cannot be written: the earlier ones stay whole."""
    tensors = trained_tensors(model, optimizer)
    stop_unless_finite(tensors, step)
    home, name = out / "checkpoints", f"step-{step:06d}"
    aside = home / f".{name}.partial"
    *replica, index = mesh.get_coordinate()

    def begin() -> None:
        for path in home.glob(".step-*"):  # what a run that was killed left behind
            shutil.rmtree(path)
        aside.mkdir(parents=True)

    def write() -> dict[str, str]:
        if any(replica):  # the first replica's rows are all rows
            return {}
        file = f"{index:05d}-of-{mesh.shape[-1]:05d}.safetensors"
        return {
            file: write_tensors(
                aside / file, [(key, local_rows(tensor)[0]) for key, tensor in tensors]
            )
        }

    def finish() -> None:
        for log in out.glob("*.jsonl"):
            flush(log)  # the rows of its steps must not be lost where the checkpoint is not
        files = {name: digest for of_process in digests for name, digest in of_process.items()}
        facts = {"step": step, "run": identity, "files": files}
        write_whole(
            aside / "checkpoint.json",
            json.dumps(facts | {"checksum": checksum(facts)}, indent=2) + "\n",
        )
        aside.rename(home / name)
        flush(home)
        flush(out)
        for old in checkpoints(out)[:-keep]:
            hidden = old.rename(old.with_name(f".{old.name}.old"))
            shutil.rmtree(hidden)

    try:
        on_first_process(begin)
        digests = together(write)
        on_first_process(finish)
    except InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> str:
    """Writes fp32 tensors as a safetensors file, to the disk, and returns its checksum. One tensor at a time: the
    library's own writer wants all of them in memory at once, and a GPU's in the CPU's."""
    header, end = {}, 0
    for key, tensor in tensors:
        header[key] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=16)
    with naming(path), open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *(tensor for _, tensor in tensors)):
            block = block.detach().cpu().flatten().numpy() if isinstance(block, Tensor) else block
            file.write(block)
            digest.update(block)
    flush(path)
    return digest.hexdigest()


def checksum(facts: dict) -> str:
    """Of what a JSON object says, in whatever order."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file: it holds the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with naming(path):
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(aside)
        aside.rename(path)
        flush(path.parent)


class DamagedError(InputError):
    """A checkpoint that is not what was written."""


def checkpoints(out: Path) -> list[Path]:
    """Those in OUT, newest last. A copy under another name (step-000200.bak) is none: it would count as the newest."""
    found = (path for path in (out / "checkpoints").glob("step-*") if path.name[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(out: Path, identity: str, log: "Log") -> tuple[Path | None, dict]:
    """The newest checkpoint that is whole, byte for byte, and its checkpoint.json; (None, {"step": 0}) where there is
    none at all. Newer ones are named and set aside. Raises InputError where none is whole, one cannot be read, or it is
    another run's."""
    found = on_first_process(lambda: checkpoints(out))[::-1]
    for i, path in enumerate(found):
        try:
            facts = together(functools.partial(checked_facts, path))[0]
        except DamagedError as error:
            log.say(f"{error}; trying the checkpoint before")
            continue
        if facts.get("run") != identity:
            raise InputError(
                f"{path}: of a run with other flags, pairs or weights than {out / 'config.json'} says"
            )
        for bad in found[:i] if dist.get_rank() == 0 else ():
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return path, facts
    if found:
        raise InputError(f"{out / 'checkpoints'}: none of {len(found)} checkpoints is whole")
    return None, {"step": 0}


def checked_facts(path: Path) -> dict:
    """A checkpoint's checkpoint.json; each process checks its share of the files. Raises DamagedError naming one."""
    name = "checkpoint.json"
    try:
        facts = json.loads((path / name).read_bytes())
        if facts.pop("checksum") != checksum(facts):
            raise ValueError("its checksum differs")
        if path.name != f"step-{facts['step']:06d}" or any("/" in file for file in facts["files"]):
            raise ValueError("it is another directory's")
        if not facts["files"]:
            raise ValueError("it names no file")
        for name in sorted(facts["files"])[dist.get_rank() :: dist.get_world_size()]:
            if file_checksum(path / name) != facts["files"][name]:
                raise ValueError("its checksum differs")
    except (
        FileNotFoundError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DamagedError(
            f"{path / name}: damaged ({getattr(error, 'strerror', None) or error})"
        ) from None
    return facts


def load_checkpoint(path: Path, facts: dict, model: Llama, optimizer: torch.optim.AdamW) -> None:
    """Fills weights and moments, each process its own rows, from a checkpoint of any number of processes. Raises
    InputError where a tensor is not there or has another shape."""
    paths = [path / name for name in sorted(facts["files"])]
    files = [open_safetensors(path) for path in paths]
    for key, tensor in trained_tensors(model, optimizer):
        local, rows = local_rows(tensor.detach())
        for i, file in enumerate(files):
            stored = rows_of_rank(len(tensor), len(files), i)
            first, last = max(rows.start, stored.start), min(rows.stop, stored.stop)
            if first < last:
                with naming(paths[i]):
                    part = file.get_slice(key)
                if part.get_shape() != [stored.stop - stored.start, *tensor.shape[1:]]:
                    raise InputError(
                        f"{paths[i]}: {key} has shape {part.get_shape()}, which is not this model's"
                    )
                local[first - rows.start : last - rows.start] = part[
                    first - stored.start : last - stored.start
                ]
    for state in optimizer.state.values():
        state["step"].fill_(facts["step"])


# -------------------------------------------------------------------------------------------------------------- logging


def peak_memory_gib() -> float:
    """Of this process so far (the log has the largest of all): the GPU's memory, or what is resident without one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """What rank 0 prints and writes. On a terminal the step line moves in place; elsewhere every step is a line."""

    def __init__(self, out: Path, active: bool):
        self.out, self.active, self.moving = out, active, sys.stdout.isatty()

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def header(
        self,
        config: Config,
        mesh: DeviceMesh,
        model: Llama,
        parts: list[Data],
        counts: list[Counter],
        steps: int,
    ) -> dict:
        """Prints what will run, and returns what OUT/config.json says of it."""
        llama, data, processes = model.config, parts[0], dist.get_world_size()
        parameters = sum(p.numel() for p in model.parameters())
        here, dtype = choose_device(config.device, config.precision)
        products = "bf16" if dtype == torch.bfloat16 else "fp32"
        device = (
            torch.cuda.get_device_name()
            if here.type == "cuda"
            else f"CPU ({torch.get_num_threads()} threads)"
        )
        responses = sum(len(p.chosen) + len(p.rejected) for p in data.pairs)
        lines = {
            "model": f"{config.model}: {parameters:,} parameters, {llama.num_hidden_layers} layers, width "
            f"{llama.hidden_size}, vocabulary {llama.vocab_size:,}",
            "loss": " ".join(
                [config.loss, *(f"{name} {value:g}" for name, value in config.loss_options.items())]
            ),
            "data": f"{config.data}: {describe(counts[0])}",
            "held out": f"{config.eval_data}: {describe(counts[-1])}"
            if config.eval_data
            else "none (--eval-data)",
            "tokens": f"{data.sizes.sum():,} an epoch, {responses:,} of them in responses; {data.sizes.mean():,.0f} a "
            f"pair, at most {data.sizes.max():,}",
            "steps": f"{steps:,} of {config.pairs_per_step} pairs; warm-up to {config.lr:g}, then cosine to "
            f"{config.min_lr_ratio * config.lr:g}",
            "precision": f"fp32 weights and moments, {products} products, fp32 losses",
            "devices": f"{processes} x {device}",
            "out": str(self.out),
            "flags": config.command_line(),
        }
        self.say("ASFT, Aligned Supervised Fine-Tuning (arXiv 2409.10571)")
        for name, text in lines.items():
            self.say(
                textwrap.fill(
                    text,
                    118,
                    initial_indent=f"  {name:<11}",
                    subsequent_indent=" " * 13,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        modules = (torch, tokenizers, safetensors, np)
        return {
            "flags": vars(config),
            "data": counts[0],
            "eval_data": counts[1] if config.eval_data else None,
            "steps": steps,
            "parameters": parameters,
            "processes": processes,
            "device": device,
            "versions": {"python": platform.python_version()}
            | {m.__name__: m.__version__ for m in modules},
        }

    def step(self, row: dict, steps: int, seconds_left: float) -> None:
        if not self.active:
            return
        text = (
            "step {step}/"
            + str(steps)
            + " epoch {epoch:.2f} | loss {loss:.4f} sft {sft:.4f} align {align:.4f} | "
            "margin {margin:+.4f} accuracy {accuracy:.1%} logp_w {logp_w:.4f} logp_l {logp_l:.4f} | lr {lr:.2e} "
            "norm {grad_norm:.3f} | {tokens_per_s:,.0f} tokens/s {pairs_per_s:.1f} pairs/s "
        ).format(**row)
        text += f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left {row['peak_memory_gib']:.2f} GiB"
        if self.moving:
            text = "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="" if self.moving and row["step"] < steps else "\n", flush=True)

    def evaluation(self, step: int, row: dict, answers: list[str]) -> None:
        self.append("eval.jsonl", {"step": step, **row} | ({"answers": answers} if answers else {}))
        text = (
            "held-out after {step} | loss {eval_loss:.4f} sft {eval_sft:.4f} align {eval_align:.4f} | margin "
            "{eval_margin:+.4f} accuracy {eval_accuracy:.1%} logp_w {eval_logp_w:.4f} logp_l {eval_logp_l:.4f}"
        )
        self.say(("\r\x1b[K" if self.moving else "") + text.format(step=step, **row))

    def rewind(self, done: int) -> None:
        """For process 0: forgets what is logged of the steps after `done`, which will run again. Raises InputError
        where the others are not all there, or a checkpoint must have been: its disk may only not be mounted."""
        path, home = self.out / "metrics.jsonl", self.out / "checkpoints"
        if not done and path.exists():
            logged, every = (
                path.read_bytes().count(b"\n"),
                read_json(self.out / "config.json")["flags"]["save_every"],
            )
            if 0 < every < logged:
                raise InputError(
                    f"{path}: has {logged} steps, but there is no checkpoint in {home}; to begin again, "
                    "name a fresh --out"
                )
        for name in ("metrics.jsonl", "eval.jsonl"):
            path, kept = self.out / name, []
            for line in path.read_bytes().splitlines() if path.exists() and done else []:
                try:
                    if json.loads(line)["step"] > done:
                        break
                except (
                    ValueError,
                    LookupError,
                    TypeError,
                ):  # cut short by the end of the process, or damaged
                    self.say(
                        f"{path}: row {len(kept) + 1} is not whole; it and what follows are dropped"
                    )
                    break
                kept.append(line + b"\n")
            if name == "metrics.jsonl" and len(kept) != done:
                raise InputError(
                    f"{path}: {len(kept)} whole rows up to step {done}, of which there is a checkpoint; "
                    'for a lost one a line {"step": N} may stand'
                )
            write_whole(path, b"".join(kept))

    def append(self, name: str, row: dict) -> None:
        if self.active:
            with naming(self.out / name), open(self.out / name, "a") as file:
                file.write(json.dumps(row) + "\n")


# -------------------------------------------------------------------------------------------------------------- the run


def claim_out(config: Config, marks: dict[str, str]) -> Path:
    """For process 0: takes the run's directory, new, or of the run to go on with, whose fingerprint must be this one's.
    Raises InputError."""
    out = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3])
    if config.resume is not None and (out / "config.json").exists():
        there = read_json(out / "config.json").get("fingerprint")
        for name in sorted(marks):
            if not isinstance(there, dict) or marks[name] != there.get(name):
                raise InputError(f"--resume {out}: other {name} than the run began with")
    elif out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
        raise InputError(
            f"--out {out} is not empty: a new run wants a fresh directory; --resume goes on with the "
            "run that is in it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        fcntl.lockf(
            os.open(out / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # until it ends
    except BlockingIOError:
        raise InputError(f"--out {out}: another process is training there") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise InputError(f"--out {out}: {error.strerror}") from None
        print(
            f"--out {out}: its disk has no locks, so a second run there would go unnoticed",
            flush=True,
        )
    return out


def describe(counts: Counter) -> str:
    """Counts of a data file in one line."""
    reasons = ("bad lines", "unequal prompts", "empty", "overlong", "identical")
    return (
        f"{counts['read']:,} read, {counts['kept']:,} kept, {counts['truncated']:,} of them truncated; dropped: "
        + ", ".join(f"{counts[reason]:,} {reason}" for reason in reasons)
    )


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


def show(text: str) -> str:
    """Text on one line."""
    return text.strip().replace("\n", "\\n")[:200]


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
