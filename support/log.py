"""The log of a run: the header, a line per step, metrics.jsonl and eval.jsonl.

header, run_facts    what will run, as printed and as kept in OUT/config.json
Log                  the step line, the held-out line, the files; `rewind` when a run resumes
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist

from support.export import exported_template, source_template
from support.files import InputError, flush, naming, read_json, write_whole
from support.flags import command_line
from support.flops import pair_flops, peak_tflops, utilisation
from support.memory import Gpu
from support.processes import (
    StoppedError,
    choose_device,
    describe_tasks,
    erase_line,
    is_first,
    on_first_process,
    peak_memory_gib,
)
from support.reading import describe, describe_repeats
from support.tokenizer import ids_of_rendered

# Metrics of a step in the order of its line, with their formats. A loss may lack some of them.
STEP = "loss:.4f sft:.4f align:.4f | margin:+.4f accuracy:.1% logp_w:.4f logp_l:.4f"


def header(config, out: Path, model, datasets: list, counts: list[Counter], chat) -> str:
    """The text that a run prints first. datasets: train.Dataset, of training and held-out pairs;
    chat: data.ChatFormat, None if all pairs are token ids."""
    llama, training = model.config, datasets[0]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    responses = sum(len(pair.chosen) + len(pair.rejected) for pair in training.pairs)
    options = " ".join(f"{name} {value:g}" for name, value in config.loss_options.items())
    held_out = "none (--eval-data)"
    if config.eval_data:
        held_out = (
            f"{config.eval_data}: {describe(counts[-1])}{describe_repeats(datasets[1].pairs)}"
        )
        seen = {hash(pair.prompt.tobytes()) for pair in training.pairs}
        if again := sum(hash(pair.prompt.tobytes()) in seen for pair in datasets[1].pairs):
            held_out += f". The prompts of {again:,} are in the training data too"
    cosine = f", then cosine to {config.min_lr_ratio * config.lr:g}"
    if config.warmup_ratio == 1:
        cosine = ""
    per_step, short = config.pairs_per_step, ""
    if left := len(training.pairs) % per_step:
        short = f" (the last of each epoch has {left}, each still weighing 1/{per_step})"
    if config.max_steps and training.steps < config.max_steps:
        short += f" (--epochs {config.epochs} end before --max-steps {config.max_steps})"
    dtype = choose_device(config.device, config.precision)[1]
    products = "bf16" if dtype == torch.bfloat16 else "fp32"
    lines = {
        "model": f"{config.model}: {parameters:,} parameters, {llama.num_hidden_layers} layers, "
        f"width {llama.hidden_size}, vocabulary {llama.vocab_size:,}",
        "loss": f"{config.loss} {options}".rstrip(),
        "data": f"{config.data}: {describe(counts[0])}{describe_repeats(training.pairs)}",
        "held out": held_out,
        "chat": describe_chat(config.model, llama.bos_token_id, chat),
        "tokens": f"{training.sizes.sum():,} an epoch, {responses:,} of them in responses; "
        f"{training.sizes.mean():,.0f} a pair, at most {training.sizes.max():,}",
        "steps": f"{training.steps:,} of {per_step} pairs{short}; warm-up to {config.lr:g}{cosine}",
        "precision": f"fp32 weights and moments, {products} products, fp32 losses",
        "devices": f"{dist.get_world_size()} x {device_name(config)}{describe_tasks()}",
        "out": str(out),
        "flags": command_line(config),
    }
    wrap = textwrap.TextWrapper(
        118, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )
    text = [wrap.fill(f"  {name:<11}{line}") for name, line in lines.items()]
    return "\n".join(["ASFT, Aligned Supervised Fine-Tuning (arXiv 2409.10571)", *text])


HEADER = "<|start_header_id|>"  # begins each message in Llama 3's format
OTHER_FORMAT = "has other turn markers: was the model trained in them? Pairs of token ids keep them"


def describe_chat(model: str, bos: int | None, chat) -> str:
    """Which chat format is trained and exported; if that is not the source's, whose template may
    have other markers of turns; if the template, as transformers and vLLM encode its text, gives
    other ids; and if config.json's bos_token_id is not the id of <|begin_of_text|>: then tokenizer
    and weights may not belong together. chat: data.ChatFormat, or None."""
    if chat is None:
        return "none: the pairs are token ids"
    template = source_template(model)
    text = "Llama 3's format; the export has its template"
    if template is not None and template != exported_template(model):
        text += f" instead of {model}'s own, which "
        text += "is another text" if HEADER in template else OTHER_FORMAT
    rendered = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    rendered += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    if ids_of_rendered(chat.tokenizer, rendered) != chat.prompt([("user", "Hi")]):
        text += ". Served, that template gives other ids than those trained: this tokenizer does "
        text += "not part the header's newlines from a word as Llama 3's does"
    if bos not in (None, chat.begin):
        text += f". <|begin_of_text|> is token {chat.begin}, but config.json has bos_token_id {bos}"
    return text


def run_facts(config, model, counts: list[Counter], steps: int, fingerprint: dict) -> dict:
    """The content of OUT/config.json: flags, versions, and what was read and dropped."""
    modules = (torch, tokenizers, safetensors, np)
    versions = {module.__name__: module.__version__ for module in modules}
    return {
        "flags": vars(config),
        "data": counts[0],
        "eval_data": counts[1] if config.eval_data else None,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "processes": dist.get_world_size(),
        "device": device_name(config),
        "versions": {"python": platform.python_version()} | versions,
        "fingerprint": fingerprint,
    }


def device_name(config) -> str:
    """The GPU's name, or the CPU with its number of threads."""
    if choose_device(config.device, config.precision)[0].type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"


def size_and_speed(run, drawn: list[int], started: float) -> dict[str, float]:
    """Size, speed, utilisation and peak memory (the largest of all processes) of a step. To be
    called on every process. run: train.Run; drawn: indexes of the step's pairs; started: when it
    began, by time.perf_counter."""
    peak = torch.tensor(peak_memory_gib(), device=run.training.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    peak = float(peak)  # waits for all that a GPU has to do, the update included
    seconds = time.perf_counter() - started
    tokens = int(run.training.sizes[drawn].sum())
    peak_of_one = run.config.peak_tflops or peak_tflops()
    used = {}
    if peak_of_one:
        pairs = [run.training.pairs[i] for i in drawn]
        flops = pair_flops(run.model.config, pairs, run.config.share_prompt).sum(0)
        blocks = [block.recompute for block in run.model.model["layers"]]
        share, available = sum(blocks) / len(blocks), dist.get_world_size() * peak_of_one * 1e12
        used = utilisation(*flops, share, seconds, available)
    if run.training.device == "cuda":
        used["memory_retries"] = Gpu().emptied()
    return {
        "pairs": len(drawn),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "pairs_per_s": len(drawn) / seconds,
        **used,
        "peak_memory_gib": peak,
    }


def formatted(row: dict, formats: str, prefix: str = "") -> str:
    """Names and values of a row: "loss:.4f | lr:.2e" -> "loss 0.3566 | lr 8.33e-05"."""
    words = []
    for word in formats.split():
        name, _, form = word.partition(":")
        if word == "|" or prefix + name in row:
            words.append(word if word == "|" else f"{name} {row[prefix + name]:{form}}")
    return " ".join(words)


def one_line(text: str) -> str:
    """Text on one line, at most 200 characters."""
    return text.strip().replace("\n", "\\n")[:200]


class Log:
    """Prints and writes on process 0 only. On a terminal the step line moves in place; elsewhere
    every step is a line."""

    def __init__(self, out: Path):
        self.out, self.active = out, is_first()
        self.moving = sys.stdout.isatty()
        self.steps = 0  # logged by this process
        self.seconds = 0.0  # a step takes, averaged mostly over the last 20

    def say(self, text: str) -> None:
        """Prints a text."""
        if self.active:
            self.print(text)

    def print(self, text: str, end: str = "\n") -> None:
        """Prints. If that fails (its reader has ended, its terminal has closed, its disk is full),
        the run continues without: it must come to where it saves."""
        try:
            print(text, end=end, flush=True)
        except OSError as error:
            sys.stdout = open(os.devnull, "w")
            with contextlib.suppress(OSError):  # it may be the same pipe or terminal
                reason = f"standard output failed ({error.strerror})"
                print(f"{reason}; the run continues: {self.out}", file=sys.stderr)

    def step(self, row: dict, steps: int) -> None:
        """Prints the line of a step."""
        if not self.active:
            return
        self.steps += 1
        self.seconds += (row["seconds"] - self.seconds) / min(self.steps, 20)
        minutes, seconds = divmod(int(self.seconds * (steps - row["step"])), 60)
        text = (
            f"step {row['step']}/{steps} epoch {row['epoch']:.2f} | {formatted(row, STEP)} | "
            f"lr {row['lr']:.2e} norm {row['grad_norm']:.3f} | {row['tokens_per_s']:,.0f} tokens/s "
            f"{row['pairs_per_s']:.1f} pairs/s {minutes}:{seconds:02d} left "
            f"{row['peak_memory_gib']:.2f} GiB {formatted(row, 'mfu:.1% hfu:.1%')}"
        )
        text = text.rstrip()  # the utilisation is not always known
        if self.moving:
            text = erase_line() + text[: shutil.get_terminal_size().columns - 1]
        self.print(text, end="" if self.moving and row["step"] < steps else "\n")

    def evaluation(self, step: int, row: dict, by: dict[str, dict], answers: list[str]) -> None:
        """Prints the held-out metrics after a step, in all and of each group in `by`, and adds
        them, with answers, to eval.jsonl."""
        self.say(f"{erase_line()}held-out after {step} | {formatted(row, STEP, 'eval_')}")
        for name, of_group in by.items():
            figures = formatted(of_group, STEP, "eval_")
            self.say(f"  {one_line(name)}: pairs {of_group['pairs']:,} | {figures}")
        more = {"by": by, "answers": answers}
        more = {key: value for key, value in more.items() if value}
        self.append("eval.jsonl", {"step": step, **row, **more})

    def answers(self, prompts: list[str], step: int) -> None:
        """Prints sample prompts with their answers before training and after `step`, both from
        eval.jsonl."""
        if not self.active:
            return
        rows = map(json.loads, (self.out / "eval.jsonl").read_text().splitlines())
        found = {row["step"]: row["answers"] for row in rows if "answers" in row}
        lost = ["(not in eval.jsonl)"] * len(prompts)
        before, after = (found.get(at) or lost for at in (0, step))
        for prompt, old, new in zip(prompts, before, after, strict=False):
            self.say(f"\n  prompt  {one_line(prompt)}")
            self.say(f"  before  {one_line(str(old))}\n  after   {one_line(str(new))}")

    def stopped(self, number: int, step: int, steps: int) -> StoppedError:
        """Says that a signal of this number stops the run after `step`; returns what ends it."""
        name = signal.Signals(number).name
        self.say(
            f"\nstopped by {name} after step {step} of {steps}; resume with --resume {self.out}"
        )
        return StoppedError(name, 128 + number)

    def flush(self) -> None:
        """Brings metrics.jsonl and eval.jsonl to the disk. To be called on every process."""
        on_first_process(lambda: [flush(path) for path in self.out.glob("*.jsonl")])

    def append(self, name: str, row: dict) -> None:
        """Adds a row to a file in OUT."""
        if self.active:
            with naming(self.out / name), open(self.out / name, "a") as file:
                file.write(json.dumps(row) + "\n")

    def rewind(self, done: int) -> None:
        """On process 0: drops the rows of steps after `done`, which will run again.

        Raises InputError if earlier rows are missing, or if there is no checkpoint although the
        logged steps must have left one: its disk may just not be mounted.
        """
        path, home = self.out / "metrics.jsonl", self.out / "checkpoints"
        if not done and path.exists():
            logged = path.read_bytes().count(b"\n")
            every = read_json(self.out / "config.json", "a run")["flags"]["save_every"]
            if 0 < every < logged:
                raise InputError(
                    f"{path}: has {logged} steps, but there is no checkpoint in {home}; to begin "
                    "again, name a fresh --out"
                )
        kept = self._rows_until(path, done)
        if len(kept) != done:
            raise InputError(
                f"{path}: has {len(kept)} complete rows, but the checkpoint is of step {done}; "
                'put a line {"step": N} for each lost row'
            )
        write_whole(path, b"".join(kept))
        path = self.out / "eval.jsonl"
        evaluated = self._rows_until(path, done)
        there = {json.loads(line)["step"] for line in evaluated}
        rows = [row for row in map(json.loads, kept) if "eval_loss" in row]
        if lost := [row["step"] for row in rows if row["step"] not in there]:
            self.say(
                f"{path}: the evaluations of steps {', '.join(map(str, lost))} are missing; their "
                "means are also in metrics.jsonl"
            )
        write_whole(path, b"".join(evaluated))

    def _rows_until(self, path: Path, done: int) -> list[bytes]:
        """The rows of a log up to step `done`, each with its line's end."""
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() and done else []:
            try:
                if json.loads(line)["step"] > done:
                    break
            # Cut short by a kill, or damaged.
            except (ValueError, LookupError, TypeError, RecursionError):
                self.say(
                    f"{path}: row {len(kept) + 1} is not whole; it and what follows are dropped"
                )
                break
            kept.append(line + b"\n")
        return kept
