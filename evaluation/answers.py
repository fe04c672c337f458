"""`eval.py generate`: a model's answers to a file of prompts.

In reading order
    load_generator    a model, its chat format, and the ids at which an answer ends
    IdFormat          in place of a chat format, for a model that is asked in token ids
    claim_rows        which answers are there already; refuses those that were made otherwise
    with_progress     prints how far it is
    run, add_flags    the command
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import ChatFormat
from evaluation.generate import CACHE_TOKENS, Request, generate
from evaluation.prompts import Prompt, encode_prompts, is_ids, read_prompts
from evaluation.rows import (
    add_model_flags,
    append_row,
    between,
    hold_out,
    join_parts,
    read_rows,
    share,
    torchrun_group,
    wait_for_all,
)
from model import Llama, LlamaConfig, check_weights, load_model
from support.files import InputError, files_checksum, read_json, write_json
from support.llama_config import generation_eos
from support.processes import agree, choose_device, is_first, on_first_process
from support.tokenizer import load_tokenizer

Answers = Iterator[tuple[int, list[int], str]]  # as `generate` yields them
SAMPLING = ("raw", "temperature", "top_p", "top_k", "seed", "max_new_tokens")


class IdFormat:
    """In place of data.ChatFormat, for a model that gets and gives token ids and whose tokenizer,
    if it has one, lacks Llama 3's control tokens.

    stop_ids: the eos ids of generation_config.json, or without that file of config.json.
    """

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        self.tokenizer = load_tokenizer(path) if path.exists() else None
        self.stop_ids = frozenset(generation_eos(directory))

    def is_llama3(self) -> bool:
        """True if this is the tokenizer of a Llama 3."""
        return self.tokenizer is not None and self.tokenizer.token_to_id("<|eot_id|>") is not None

    def decode(self, ids: list[int]) -> str | None:
        """Text of ids, control tokens shown; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def load_generator(
    directory: str | Path, device: str = "auto", precision: str = "auto", only_ids: bool = False
) -> tuple[Llama, ChatFormat | IdFormat, frozenset[int]]:
    """A whole model on this process's device, its chat format, and the ids at which an answer ends:
    <|end_of_text|>, <|eot_id|>, <|eom_id|> if it exists, and those in generation_config.json.

    only_ids: all prompts are token ids. The model may then have another tokenizer than Llama 3's,
    or none. Raises InputError if `directory` is not a Hugging Face model with its tokenizer.
    """
    here, dtype = choose_device(device, precision)
    chat = IdFormat(directory) if only_ids else None
    if chat is None or chat.is_llama3():
        chat = ChatFormat(directory)
    model = load_model(directory, dtype, here).requires_grad_(False)
    return model, chat, chat.stop_ids


def claim_rows(
    flags: argparse.Namespace, asked: str, key: str, order: Sequence, *names: str
) -> set:
    """The keys of the rows that --out holds already. First joins the parts of a killed call.

    FILE.json beside --out says how its rows were made: a checksum of the model, one of the file of
    the flag `asked`, the dtype, and the values of the flags `names`. Raises InputError, naming the
    first difference, if that is not how this call makes them or how all its processes do, for a
    file of another origin, and if another call is writing --out.
    """
    out, beside = Path(flags.out), Path(f"{flags.out}.json")
    settings = agree(
        lambda: {
            "model": model_checksum(Path(flags.model)),
            asked: files_checksum([getattr(flags, asked)]),
            "dtype": str(choose_device(flags.device, flags.precision)[1]),
            **{name: getattr(flags, name) for name in names},
        }
    )

    def claim() -> set:
        hold_out(out)
        rows = read_rows(out, key, order)
        if beside.exists():
            found = read_json(beside)
            if not isinstance(found, dict) or found.keys() != settings.keys():
                raise InputError(f"{beside} does not say how answers were made; name another --out")
        elif rows:
            raise InputError(f"{beside} is missing, which says how {out} was made; name another")
        if not rows:
            write_json(beside, settings)
        for name, value in settings.items():
            if rows and found[name] != value:
                raise InputError(
                    f"--out {out} was made with {name} {found[name]}, not {value}; name another "
                    "file"
                )
        return {row[key] for row in join_parts(out, key, order)}

    return on_first_process(claim)


def model_checksum(directory: Path) -> str:
    """Hash of all files that a model's answers depend on."""
    names = ("config.json", "generation_config.json", "tokenizer.json")
    weights = set(check_weights(directory, LlamaConfig.load(directory)).values())
    return files_checksum([*(directory / name for name in names), *sorted(weights)])


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
            printed, speed = now, tokens / (now - started)
            progress = f"{what}{done:,} of this process's {count:,} answers, {tokens:,} tokens"
            print(f"{progress}, {speed:,.0f} tokens/s", flush=True)


def run(flags: argparse.Namespace) -> None:
    """Answers --prompts. A call that was interrupted continues when it is made again."""
    if not flags.temperature and (flags.top_p < 1 or flags.top_k):
        raise InputError("--top-p and --top-k go with a --temperature above 0")
    prompts, out = read_prompts(flags.prompts, flags.raw), Path(flags.out)
    numbers = range(len(prompts))
    with torchrun_group():
        done = claim_rows(flags, "prompts", "index", numbers, *SAMPLING)
        only_ids = all(map(is_ids, prompts))
        model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision, only_ids)
        encoded = encode_prompts(prompts, chat, model.config.vocab_size)
        if is_first():
            print(
                f"{flags.model}: {len(prompts):,} prompts, {len(done):,} of them answered before; "
                f"answers go to {out}.part-*, and to {out} when all are there",
                flush=True,
            )
            if not stop_ids:
                print(f"{flags.model}: no file in it names an eos_token_id, so no answer stops")
        mine = [i for i in share(numbers) if i not in done]
        requests = [Request(i, encoded[i], flags.temperature, flags.max_new_tokens) for i in mine]
        options = {key: getattr(flags, key) for key in ("top_p", "top_k", "seed", "cache_tokens")}
        answers = generate(model, requests, stop_ids, **options)
        for k, new, finish in with_progress(answers, len(mine)):
            append_row(out, answer_row(mine[k], prompts[mine[k]], chat, new, finish))
        wait_for_all()
        if is_first():
            rows = join_parts(out, "index", numbers)
            count = Counter(row["finish"] for row in rows)
            mean = sum(row["tokens"] for row in rows) / len(rows)
            limit = f"{model.config.max_position_embeddings:,} tokens of the context"
            print(
                f"{out}: {len(rows):,} rows, {mean:,.1f} tokens on average; {count['stop']:,} "
                f"ended by a stop token, {count['length']:,} by --max-new-tokens or the context; "
                f"{count['overlong']:,} left unanswered, whose prompt takes all {limit}",
                flush=True,
            )


def answer_row(
    index: int, prompt: Prompt, chat: ChatFormat | IdFormat, new: list[int], finish: str
) -> dict:
    """A row of --out. The prompt is as it was asked: a text, token ids, or messages. Token ids are
    answered with `response_ids` too; texts of ids are left out if the model has no tokenizer."""
    asked, reference = prompt.prompt, prompt.reference
    if isinstance(asked[0], tuple):  # turns; a single one is shown as its text
        asked = [{"role": role, "content": content} for role, content in asked]
        asked = asked[0]["content"] if len(asked) == 1 else asked
    if isinstance(reference, list):
        reference = chat.decode([token for token in reference if token not in chat.stop_ids])
    row = {"index": index, "prompt": asked, "prediction": chat.decode(new), "tokens": len(new)}
    row |= {"finish": finish, "reference": reference}
    if is_ids(prompt):
        row["response_ids"] = new
    return {key: value for key, value in row.items() if value is not None}


def add_generation_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a command that generates."""
    add_model_flags(command, "the samples")
    text = "tokens of all rows of a batch; bounds memory, does not change answers [%(default)s]"
    command.add_argument("--cache-tokens", type=between(int, 1), default=CACHE_TOKENS, help=text)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_generation_flags(command)
    out = "JSONL of answers; FILE.json says how they were made; the same call continues"
    top_p = "draw from the likeliest that sum to this [1: all]"
    top_k, tokens = "draw from the k likeliest tokens [0: all]", "most tokens of an answer [512]"
    add("--prompts", required=True, metavar="FILE", help="JSONL of prompts (docs/data-formats.md)")
    add("--out", required=True, metavar="FILE", help=out)
    add("--raw", action="store_true", help="continue plain texts, without the chat format")
    add("--temperature", type=between(float, 0), default=0.0, help="0: the likeliest token [0]")
    add("--top-p", type=between(float, 1e-9, 1), default=1.0, help=top_p)
    add("--top-k", type=between(int, 0), default=0, help=top_k)
    add("--max-new-tokens", type=between(int, 1), default=512, help=tokens)
