""" """

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data import ChatFormat
from evaluation.generate import CACHE_TOKENS, Request, generate
from evaluation.prompts import encode_prompts, read_prompts
from evaluation.rows import (
    add_model_flags,
    append_row,
    between,
    json_line,
    json_rows,
    locked,
    share,
)
from model import Llama, LlamaConfig, check_weights, load_model
from support.files import InputError, files_checksum, naming, read_json
from support.processes import choose_device


def load_generator(
    directory: str | Path, device: str = "auto", precision: str = "auto"
) -> tuple[Llama, ChatFormat, frozenset[int]]:
    """A whole model on this process's device, its chat format, and the ids at which an answer ends: <|end_of_text|>,
    <|eot_id|>, <|eom_id|> where it exists, and what generation_config.json names. Raises InputError
    for a directory that is no Hugging Face model with its tokenizer."""
    here, dtype = choose_device(device, precision)
    chat = ChatFormat(directory)
    stop_ids = chat.stop_ids
    model = load_model(directory, dtype, here).requires_grad_(False)
    return model, chat, stop_ids


def told(
    answers: Iterator[tuple[int, list[int], str]], count: int, what: str = ""
) -> Iterator[tuple[int, list[int], str]]:
    """The answers of `generate`, as they come. Process 0 says every 5 seconds and at the last one how many of count it
    has, and how fast they come."""
    started = said = time.monotonic()
    tokens = 0
    for done, (k, new, finish) in enumerate(answers, 1):
        yield k, new, finish
        tokens += len(new) + (finish == "stop")
        now = time.monotonic()
        if (done == count or now - said > 5) and os.environ.get("RANK", "0") == "0":
            said = now
            print(
                f"{what}{done:,} of this process's {count:,} answers, {tokens:,} tokens, "
                f"{tokens / (now - started):,.0f} tokens/s",
                flush=True,
            )


def claim_rows(
    flags: argparse.Namespace, asked: str, read: Callable[[], dict], *names: str
) -> dict:
    """read(), the answers in --out, made by the same weights from the same file of what is asked (the flag of that
    name) under the same values of the flags `names`: OUT.json beside it holds them. Raises InputError for answers made
    otherwise, naming the first setting that differs, and for a file of another origin."""
    out, beside = flags.out, Path(f"{flags.out}.json")
    files = [
        Path(flags.model) / name
        for name in ("config.json", "generation_config.json", "tokenizer.json")
    ]
    files += sorted(set(check_weights(flags.model, LlamaConfig.load(flags.model)).values()))
    settings = {
        "model": files_checksum(files),
        asked: files_checksum([getattr(flags, asked)]),
        "dtype": str(choose_device(flags.device, flags.precision)[1]),
        **{name: getattr(flags, name) for name in names},
    }
    with locked(out):
        rows = read()
        if not rows:
            with naming(beside):
                beside.write_text(json.dumps(settings, indent=2) + "\n")
        elif not beside.exists():
            raise InputError(
                f"--out {out}: {beside} is missing, which says how its rows were made; name another file"
            )
        found = read_json(beside)
        found = found if isinstance(found, dict) else {}
        for key, value in settings.items():
            if found.get(key) != value:
                raise InputError(
                    f"--out {out} was made with {key} {found.get(key)}, not {value}; name another file"
                )
    return rows


def answered(out: Path) -> dict[int, dict]:
    """The answers in a file, by index."""
    rows = {}
    for place, row in json_rows(out, "index", "prediction", "tokens", "finish"):
        if type(row["index"]) is not int:
            raise InputError(f"{place}: not an answer of this command")
        rows[row["index"]] = row
    return rows


def order_rows(out: Path, count: int) -> list[dict] | None:
    """Puts the answers in the order of their prompts, once all are there: for the process that wrote the last one."""
    with locked(out):
        found = answered(out)
        if len(found) < count:
            return None
        rows = [found[i] for i in sorted(found)]
        aside = out.with_name(f".{out.name}.partial")
        aside.write_bytes(b"".join(map(json_line, rows)))
        aside.rename(out)
    return rows


def run(flags: argparse.Namespace) -> None:
    """Writes the answers to --prompts as they come, and in the end in order; goes on where the same call stopped."""
    prompts, out = read_prompts(flags.prompts, flags.raw), Path(flags.out)
    done = claim_rows(
        flags,
        "prompts",
        lambda: answered(out),
        "raw",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "max_new_tokens",
    )
    model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
    encoded = encode_prompts(prompts, chat, model.config.vocab_size)
    mine = [i for i in share(range(len(prompts))) if i not in done]
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{flags.model}: {len(prompts):,} prompts, {len(done):,} of them answered before",
            flush=True,
        )
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
    for k, new, finish in told(answers, len(mine)):
        turns, reference = prompts[mine[k]].prompt, prompts[mine[k]].reference
        if isinstance(turns[0], tuple):  # as it was asked, where that is one question
            turns = (
                turns[0][1]
                if len(turns) == 1
                else [{"role": role, "content": text} for role, text in turns]
            )
        append_row(
            out,
            {
                "index": mine[k],
                "prompt": turns,
                "prediction": chat.decode(new),
                "tokens": len(new),
                "finish": finish,
            }
            | ({} if reference is None else {"reference": reference}),
        )
    if rows := order_rows(out, len(prompts)):
        count = Counter(row["finish"] for row in rows)
        mean = sum(row["tokens"] for row in rows) / len(rows)
        print(
            f"{out}: {len(rows):,} rows, {mean:,.1f} tokens on average; {count['stop']:,} ended by a stop token, "
            f"{count['length']:,} by --max-new-tokens or the context; {count['overlong']:,} left unanswered, whose "
            f"prompt takes all {model.config.max_position_embeddings:,} tokens of the context",
            flush=True,
        )


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_model_flags(command, "the samples")
    add(
        "--cache-tokens",
        type=between(int, 1),
        default=CACHE_TOKENS,
        help="tokens of all rows of a batch together: bounds memory, the answers stay the same [%(default)s]",
    )
    add("--prompts", required=True, metavar="FILE", help="JSONL of prompts (formats: README)")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="JSONL of answers; FILE.json beside it says how they were made. The same call goes on "
        "where it was interrupted",
    )
    add(
        "--raw",
        action="store_true",
        help="go on with each prompt as plain text, after BOS, without the chat format",
    )
    add(
        "--temperature",
        type=between(float, 0),
        default=0.0,
        help="0: the likeliest token, always [0]",
    )
    add(
        "--top-p",
        type=between(float, 1e-9, 1),
        default=1.0,
        help="draw from the fewest likeliest tokens that together have this probability [1: all]",
    )
    add(
        "--top-k",
        type=between(int, 0),
        default=0,
        help="draw from so many likeliest tokens [0: all]",
    )
    add("--max-new-tokens", type=between(int, 1), default=512, help="of an answer [512]")
