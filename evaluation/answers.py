"""`eval.py generate`: a model's answers to a file of prompts.

In reading order
    load_generator    a model, its chat format, and the ids at which an answer ends
    claim_rows        which answers are there already; refuses those that were made otherwise
    with_progress     prints how far it is
    run, add_flags    the command
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import ChatFormat
from evaluation.generate import CACHE_TOKENS, Request, generate
from evaluation.prompts import Prompt, encode_prompts, read_prompts
from evaluation.rows import (
    add_model_flags,
    append_row,
    between,
    is_first,
    join_parts,
    read_rows,
    share,
    torchrun_group,
    wait_for_all,
)
from model import Llama, LlamaConfig, check_weights, load_model
from support.files import InputError, files_checksum, naming, read_json
from support.processes import choose_device, on_first_process

Answers = Iterator[tuple[int, list[int], str]]  # as `generate` yields them
SAMPLING = ("raw", "temperature", "top_p", "top_k", "seed", "max_new_tokens")


def load_generator(
    directory: str | Path, device: str = "auto", precision: str = "auto"
) -> tuple[Llama, ChatFormat, frozenset[int]]:
    """A whole model on this process's device, its chat format, and the ids at which an answer ends:
    <|end_of_text|>, <|eot_id|>, <|eom_id|> if it exists, and those in generation_config.json.

    Raises InputError if `directory` is not a Hugging Face model with its tokenizer.
    """
    here, dtype = choose_device(device, precision)
    chat = ChatFormat(directory)
    model = load_model(directory, dtype, here).requires_grad_(False)
    return model, chat, chat.stop_ids


def claim_rows(
    flags: argparse.Namespace, asked: str, key: str, order: Sequence, *names: str
) -> set:
    """The keys of the rows that --out holds already. First joins the parts of a killed call.

    FILE.json beside --out says how its rows were made: a checksum of the model, one of the file of
    the flag `asked`, the dtype, and the values of the flags `names`. Raises InputError, naming the
    first difference, if that is not how this call makes them, and for a file of another origin.
    """
    out, beside = Path(flags.out), Path(f"{flags.out}.json")

    def claim() -> set:
        with naming(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        rows, settings = read_rows(out, key, order), describe(flags, asked, names)
        if not rows:
            with naming(beside):
                beside.write_text(json.dumps(settings, indent=2) + "\n")
        elif not beside.exists():
            raise InputError(
                f"--out {out}: {beside} is missing, which says how its rows were made; "
                "name another file"
            )
        found = read_json(beside)
        found = found if isinstance(found, dict) else {}
        for name, value in settings.items():
            if found.get(name) != value:
                raise InputError(
                    f"--out {out} was made with {name} {found.get(name)}, not {value}; "
                    "name another file"
                )
        join_parts(out, key, order)
        return set(rows)

    return on_first_process(claim)


def describe(flags: argparse.Namespace, asked: str, names: Sequence[str]) -> dict:
    """All that answers depend on."""
    directory = Path(flags.model)
    files = ("config.json", "generation_config.json", "tokenizer.json")
    weights = sorted(set(check_weights(directory, LlamaConfig.load(directory)).values()))
    return {
        "model": files_checksum([*(directory / name for name in files), *weights]),
        asked: files_checksum([getattr(flags, asked)]),
        "dtype": str(choose_device(flags.device, flags.precision)[1]),
        **{name: getattr(flags, name) for name in names},
    }


def with_progress(answers: Answers, count: int, what: str = "") -> Answers:
    """The answers of `generate`, as they come. Process 0 prints every 5 seconds, and after the last
    one, how many of `count` it has and how fast they come."""
    started = printed = time.monotonic()
    tokens = 0
    for done, (k, new, finish) in enumerate(answers, 1):
        yield k, new, finish
        tokens += len(new) + (finish == "stop")
        now = time.monotonic()
        if is_first() and (done == count or now - printed > 5):
            printed = now
            print(
                f"{what}{done:,} of this process's {count:,} answers, {tokens:,} tokens, "
                f"{tokens / (now - started):,.0f} tokens/s",
                flush=True,
            )


def run(flags: argparse.Namespace) -> None:
    """Answers --prompts. A call that was interrupted continues when it is made again."""
    prompts, out = read_prompts(flags.prompts, flags.raw), Path(flags.out)
    numbers = range(len(prompts))
    with torchrun_group():
        done = claim_rows(flags, "prompts", "index", numbers, *SAMPLING)
        model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
        encoded = encode_prompts(prompts, chat, model.config.vocab_size)
        if is_first():
            print(
                f"{flags.model}: {len(prompts):,} prompts, {len(done):,} of them answered before; "
                f"answers go to {out}.part-*, and to {out} when all are there",
                flush=True,
            )
        mine = [i for i in share(numbers) if i not in done]
        requests = [Request(i, encoded[i], flags.temperature, flags.max_new_tokens) for i in mine]
        answers = generate(
            model,
            requests,
            stop_ids,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=flags.seed,
            cache_tokens=flags.cache_tokens,
        )
        for k, new, finish in with_progress(answers, len(mine)):
            append_row(out, answer_row(mine[k], prompts[mine[k]], chat.decode(new), new, finish))
        wait_for_all()
        if is_first():
            rows = join_parts(out, "index", numbers)
            print(summary(out, rows, model.config.max_position_embeddings), flush=True)


def answer_row(index: int, prompt: Prompt, text: str, new: list[int], finish: str) -> dict:
    """A row of --out. The prompt is as it was asked: a text, token ids, or messages."""
    asked = prompt.prompt
    if isinstance(asked[0], tuple):  # turns; a single one is shown as its text
        asked = [{"role": role, "content": content} for role, content in asked]
        asked = asked[0]["content"] if len(asked) == 1 else asked
    row = {
        "index": index,
        "prompt": asked,
        "prediction": text,
        "tokens": len(new),
        "finish": finish,
    }
    return row if prompt.reference is None else row | {"reference": prompt.reference}


def summary(out: Path, rows: list[dict], context: int) -> str:
    """The last line that the command prints."""
    count = Counter(row["finish"] for row in rows)
    mean = sum(row["tokens"] for row in rows) / len(rows)
    return (
        f"{out}: {len(rows):,} rows, {mean:,.1f} tokens on average; {count['stop']:,} ended by a "
        f"stop token, {count['length']:,} by --max-new-tokens or the context; "
        f"{count['overlong']:,} left unanswered, whose prompt takes all {context:,} tokens of the "
        "context"
    )


def add_generation_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a command that generates."""
    add_model_flags(command, "the samples")
    command.add_argument(
        "--cache-tokens",
        type=between(int, 1),
        default=CACHE_TOKENS,
        help="tokens of all rows of a batch; bounds memory, does not change answers [%(default)s]",
    )


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_generation_flags(command)
    chance, whole, positive = between(float, 1e-9, 1), between(int, 0), between(int, 1)
    add("--prompts", required=True, metavar="FILE", help="JSONL of prompts (formats: README)")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="JSONL of answers; FILE.json says how they were made; the same call continues",
    )
    add("--raw", action="store_true", help="continue plain texts, without the chat format")
    add("--temperature", type=between(float, 0), default=0.0, help="0: the likeliest token [0]")
    add(
        "--top-p",
        type=chance,
        default=1.0,
        help="draw from the likeliest that sum to this [1: all]",
    )
    add("--top-k", type=whole, default=0, help="draw from the k likeliest tokens [0: all]")
    add("--max-new-tokens", type=positive, default=512, help="most tokens of an answer [512]")
