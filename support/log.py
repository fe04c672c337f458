""" """

import json
import platform
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from model import Llama
from support.files import InputError, naming, read_json, write_whole
from support.processes import choose_device
from train import Config, Data


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


def describe(counts: Counter) -> str:
    """Counts of a data file in one line."""
    reasons = ("bad lines", "unequal prompts", "empty", "overlong", "identical")
    return (
        f"{counts['read']:,} read, {counts['kept']:,} kept, {counts['truncated']:,} of them truncated; dropped: "
        + ", ".join(f"{counts[reason]:,} {reason}" for reason in reasons)
    )


def show(text: str) -> str:
    """Text on one line."""
    return text.strip().replace("\n", "\\n")[:200]
