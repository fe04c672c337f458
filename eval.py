"""Evaluates: answers, likelihoods, BLEU and ROUGE, MT-Bench and Arena-Hard; the paper's tables and figures.

    python eval.py generate --model DIR --prompts FILE --out FILE        a model's answers; started again, it goes on
    python eval.py likelihood --model DIR --data FILE --out DIR          how likely a model finds both sides of pairs
    python eval.py score --predictions FILE --json OUT                   BLEU-4 and ROUGE against references
    python eval.py mt-bench answer --model DIR --questions FILE --out ANSWERS ...
    python eval.py mt-bench judge --answers ANSWERS --endpoint URL --judge-model NAME --out JUDGMENTS ...
    python eval.py mt-bench report --judgments JUDGMENTS ... --json OUT  scores and intervals
    python eval.py arena-hard answer|judge|report ...                    the same three steps
    python eval.py tables --runs NAME=DIR ...                            the paper's tables, from what --json wrote
    python eval.py figures --out DIR --runs RUN NAME=RUN ...             Figure 1 and, of what train.py wrote, Figure 2
    python eval.py COMMAND --help                                        its flags

In reading order
    share, locked, append_row       one process and many: torchrun starts them, a locked file joins what they write
    json_rows, write_json           rows in, results out
    Request, generate               continuations of token ids, in ragged batches over a cache of keys and values
    load_generator, claim_rows      what answers, and whether a file's answers are its own
    answer_prompts                  the command generate: prompts -> answers, a row each
    pair_logps ... likelihood       log-probs of preference pairs; means with intervals, of one model or of two
    tokens_13a ... score            BLEU-4 and ROUGE, conventional and as LLaMA-Factory computes them
    answer                          a benchmark's questions to a model's answers
    Judge, open_judge, ask          one request to a judge, tried until it is answered, every reply kept
    judge_all                       many, several at once; judge_mt_bench and judge_arena_hard say which
    report_*, tables                judgments to scores with intervals; models side by side
    bt_surface ... log_gradient     equations 15 to 18 as pure functions
    read_run ... figures            what train.py left in a directory, checked; pictures and their captions
    parse, main                     flags, and the exit code

Under torchrun each process holds the whole model and takes its share of the rows.

The benchmarks' questions, prompts and baseline answers are their own files; answers and judgments are written in the
forms of FastChat and Arena-Hard v0.1, whose tools read them.

matplotlib draws, and is not needed for anything else: it is imported where it is used.

Differs from the paper: Figure 1 shows surfaces from above, as colour, with the descent directions in the same panels,
and has two panels more, in log-probabilities.
"""

import argparse
import contextlib
import email.utils
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

# OpenMP threads that wait spin by default, which makes a busy CPU many times slower; as in train.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import asft
from data import (
    ChatFormat,
    Pair,
    Prompt,
    encode_preferences,
    pack,
    read_preferences,
    read_prompts,
    read_records,
    resolve_max_tokens,
    split_pairs,
)
from model import (
    Cache,
    InputError,
    Llama,
    LlamaConfig,
    check_weights,
    choose_device,
    complain,
    files_checksum,
    generation_eos,
    load_model,
    naming,
    out_of_memory,
    read_json,
    shown,
)

# ----------------------------------------------------------------------------------- files that several processes write


def share(items: list) -> list:
    """The items of this process: every n-th under torchrun with n processes, all of them without."""
    return items[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


FIRST_KEYS = (b'{"index": ', b'{"question_id": ')  # what each row that is written here begins with


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[IO[bytes]]:
    """A file of JSON lines, made with its directory if it is not there, that no other process holds meanwhile. What is
    written goes to its end. A last row without its end is completed if it is whole, and else cut off, since whoever
    wrote it was killed; what no command here writes stays, and is an InputError."""
    with naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if size and file.read() != b"\n":
                file.seek(0)
                last = file.read().split(b"\n")[-1]
                if not any(last.startswith(start[: len(last)]) for start in FIRST_KEYS):
                    raise InputError(
                        f"{path}: its last line is no row of this command; name another file"
                    )
                try:
                    json.loads(last)
                    file.write(b"\n")
                except ValueError:
                    file.truncate(size - len(last))
            file.seek(0)
            yield file


def named(text: str) -> tuple[str, Path]:
    """NAME=DIR, or a directory without a name of its own ("")."""
    name, _, rest = text.partition("=")
    return (name, Path(rest)) if rest and not Path(text).is_dir() else ("", Path(text))


def append_row(path: str | Path, row: dict) -> None:
    """Adds a row to a file of JSON lines, whole and at once, whatever other processes add to it."""
    with locked(path) as file:
        file.write(json_line(row))


def json_line(row: dict) -> bytes:
    """A row as it is written. Half a surrogate pair, as a reply cut short may end in, stays JSON's escape of it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: str | Path, value: dict, *read: str | Path) -> None:
    """Writes --json, making its directory. InputError where that fails, or would replace a file that was read."""
    path = Path(path)
    with naming(f"--json {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and any(path.samefile(other) for other in read):
            raise InputError(f"--json {path} is a file that was read; name another")
        path.write_text(json.dumps(value, indent=2) + "\n")


def json_rows(
    path: str | Path, *keys: str, questions: dict | None = None
) -> list[tuple[str, dict]]:
    """("file:line", row) of a JSONL file. InputError, naming the line, where it is no JSON object with these keys, or
    its question_id is none of the questions."""
    rows = []
    for line, row in read_records(Path(path)):
        place = f"{path}:{line}"
        if isinstance(row, ValueError):
            raise InputError(f"{place}: {row}")
        if lacks := [key for key in keys if not isinstance(row, dict) or key not in row]:
            raise InputError(
                f"{place}: {', '.join(lacks)} is missing; wanted a JSON object with {', '.join(keys)}; "
                f"found {shown(row)}"
            )
        if "question_id" in keys:
            number = row["question_id"]
            if not isinstance(number, int | str) or (questions and number not in questions):
                raise InputError(f"{place}: question_id {shown(number)} is none of the questions'")
        rows.append((place, row))
    return rows


# --------------------------------------------------------------------------------------------------------- generation

CACHE_TOKENS = 65_536  # 8 GiB for Llama-3-8B in bf16, at 128 KiB a token
MAX_ROWS = 256  # of a batch: above, a step's logits take more memory than they save time
PREFILL_TOKENS = 8192  # of prompts in one pass, which bounds its activations


class Request(NamedTuple):
    """A prompt to go on with."""

    number: int  # of its row in its file: what is drawn depends on (seed, number, position in the answer) alone
    prompt: list[int]  # token ids, BOS included
    temperature: float = 0.0  # 0: the likeliest token, always
    max_new_tokens: int = 512


@dataclass
class _Row:
    """A request in the cache, and what it got so far."""

    index: int
    request: Request
    new: list[int]
    uniforms: np.ndarray  # one number in [0, 1) for each new token


@torch.inference_mode()
def generate(
    model: Llama,
    requests: list[Request],
    stop_ids: frozenset[int],
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    cache_tokens: int = CACHE_TOKENS,
) -> Iterator[tuple[int, list[int], str]]:
    """Continues each request until it draws one of stop_ids or has max_new_tokens or as many as the model's context
    takes. Yields (index into requests, new token ids without the stop token, and "stop", "length", or "overlong" for a
    prompt that fills the context) as they finish.

    A batch is as many rows as fit in a cache of cache_tokens tokens when each may grow to its full length (one at
    least): longest first, so that rows of a batch are alike, and those that wait always fit in the place of one that
    finished. A row's numbers depend on its neighbours by nothing but the rounding of matrix products, whose order of
    summation differs with the number of rows.

    top_p and top_k (0: off) as in `probabilities`. Two requests of equal number draw with the same random numbers."""
    context = model.config.max_position_embeddings

    def full_length(i: int) -> int:
        return min(len(requests[i].prompt) + requests[i].max_new_tokens, context)

    overlong = [i for i, request in enumerate(requests) if len(request.prompt) >= context]
    yield from ((i, [], "overlong") for i in overlong)
    waiting = sorted(
        set(range(len(requests))) - set(overlong), key=full_length
    )  # taken from the end
    rows: list[_Row] = []  # row b of the cache is rows[b]'s
    while waiting or rows:
        if not rows:
            cache, width = (
                None,
                full_length(waiting[-1]),
            )  # the old one is freed before there is a new one
            slots = max(1, min(len(waiting), cache_tokens // width, MAX_ROWS))
            cache, filling = Cache(model, slots, width), True
            least = 0 if slots == len(waiting) else width / 2
        # Refilled some rows at a time, since each time is a pass over the weights; and, unless there is room for all,
        # not with rows much shorter than the cache is wide, which wait for a narrower one with more rows.
        filling, fresh = filling or 8 * len(rows) <= 7 * slots, []
        while (
            filling
            and waiting
            and len(rows) + len(fresh) < slots
            and full_length(waiting[-1]) >= least
            and sum(len(row.request.prompt) for row in fresh) < PREFILL_TOKENS
        ):
            index = waiting.pop()
            rng = np.random.default_rng([seed, requests[index].number])
            fresh.append(
                _Row(
                    index,
                    requests[index],
                    [],
                    rng.random(full_length(index) - len(requests[index].prompt)),
                )
            )
        filling = bool(fresh)

        if fresh:
            logits_BV = model.prefill([row.request.prompt for row in fresh], cache, len(rows))
            rows += fresh
        else:
            lengths = [len(row.request.prompt) + len(row.new) - 1 for row in rows]
            logits_BV = model.step([row.new[-1] for row in rows], lengths, cache)
        first = len(rows) - len(logits_BV)  # the rows that were computed: the last ones
        tokens = choose(
            logits_BV,
            [row.request.temperature for row in rows[first:]],
            [row.uniforms[len(row.new)] for row in rows[first:]],
            top_p,
            top_k,
        )
        for b in reversed(
            range(first, len(rows))
        ):  # from the end: the last row takes the place of a finished one
            row, stop = rows[b], tokens[b - first] in stop_ids
            if not stop:
                row.new.append(tokens[b - first])
            if stop or len(row.request.prompt) + len(row.new) == full_length(row.index):
                last = rows.pop()
                if b < len(rows):
                    rows[b] = last
                    cache.move(len(rows), b)
                yield row.index, row.new, "stop" if stop else "length"


def choose(
    logits_BV: Tensor, temperatures: list[float], uniforms: list[float], top_p: float, top_k: int
) -> list[int]:
    """A token id for each row: the likeliest where its temperature is 0, else the one at the row's uniform number in
    [0, 1) of the cumulated `probabilities`, which are summed in the vocabulary's order: a sum in order of probability
    would jump where rounding swaps two tokens."""
    best_B = logits_BV.argmax(-1)
    if not any(temperatures):
        return best_B.tolist()
    temperature_B = torch.tensor(temperatures, device=best_B.device)
    greedy_B = temperature_B == 0
    total_BV = probabilities(logits_BV, temperature_B + greedy_B, top_p, top_k).double().cumsum(-1)
    at_B1 = (
        torch.tensor(uniforms, dtype=torch.float64, device=best_B.device)[:, None]
        * total_BV[:, -1:]
    )
    drawn_B = torch.searchsorted(total_BV, at_B1, right=True)[:, 0].clamp(
        max=total_BV.shape[-1] - 1
    )
    return torch.where(greedy_B, best_B, drawn_B).tolist()


def probabilities(
    logits_BV: Tensor, temperature_B: Tensor, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """What sampling draws from, at least fp32: the softmax at a temperature above 0, then its top_k likeliest tokens
    (ties with the last one too; 0: all), then of these the fewest likeliest ones that together have top_p, each time
    made to sum to 1 again. The order and the meaning are transformers' (TemperatureLogitsWarper, TopKLogitsWarper,
    TopPLogitsWarper)."""
    logits_BV = asft.at_least_fp32(logits_BV)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B[
        :, None
    ]  # at most 0: never infinite
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(
            logits_BV < logits_BV.topk(top_k).values[:, -1:], -math.inf
        )
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        sorted_BV = sorted_BV.softmax(-1)
        beyond_BV = (
            sorted_BV.cumsum(-1) - sorted_BV >= top_p
        )  # those before a token have top_p already
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -math.inf)
    return logits_BV.softmax(-1)


def load_generator(
    directory: str | Path, device: str = "auto", precision: str = "auto"
) -> tuple[Llama, ChatFormat, frozenset[int]]:
    """A whole model on this process's device, its chat format, and the ids at which an answer ends: <|end_of_text|>,
    <|eot_id|>, <|eom_id|> where it exists, and what generation_config.json names. Raises InputError
    for a directory that is no Hugging Face model with its tokenizer."""
    here, dtype = choose_device(device, precision)
    chat = ChatFormat(directory)
    stop_ids = chat.stop_ids.union(generation_eos(directory))
    model = load_model(directory, dtype, here).requires_grad_(False)
    model.pack_linears()
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


def encode_prompts(prompts: list[Prompt], chat: ChatFormat, vocab_size: int) -> list[list[int]]:
    """Token ids: of turns in the chat format, up to the header of the assistant's; of a plain text after BOS. Raises
    InputError for ids that are not below vocab_size."""
    encoded = []
    for p in prompts:
        if isinstance(p.prompt, str):
            ids = [chat.begin, *chat.encode([p.prompt])[0]]
        else:
            ids = chat.prompt(p.prompt) if isinstance(p.prompt[0], tuple) else p.prompt
        if max(ids) >= vocab_size:
            raise InputError(
                f"{p.place}: token id {max(ids)} is not below the model's vocab_size {vocab_size}"
            )
        encoded.append(ids)
    return encoded


def answer_prompts(flags: argparse.Namespace) -> None:
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


# --------------------------------------------------------------------------------------------------------- likelihood

RESAMPLES = 2000  # of a bootstrap


def encode_pairs(
    flags: argparse.Namespace, directory: str, max_tokens: int
) -> tuple[list[Pair], Counter]:
    """The pairs of --data under a model's tokenizer, as train.py reads them, and what was dropped."""
    counts = Counter()
    preferences = read_preferences(flags.data, counts, flags.skip_bad_lines)
    chat = ChatFormat(directory) if any(isinstance(p.chosen, str) for p in preferences) else None
    vocab_size = LlamaConfig.load(directory).vocab_size
    pairs = encode_preferences(preferences, chat, max_tokens, flags.overlong, counts, vocab_size)
    if not pairs:
        raise InputError(f"{flags.data}: no pair left to use ({dict(counts)})")
    return pairs, counts


@torch.no_grad()
def pair_logps(
    model: Llama, pairs: list[Pair], max_tokens_per_gpu: int, device: torch.device
) -> np.ndarray:
    """Log-probs of shape (pairs, 2, 2), float64, in nats: [pair, chosen or rejected, mean or sum]; all of them in every
    process. Micro-batches are made as if there were one process, and shared, so that the numbers do not depend on how
    many there are. Raises InputError where a pair alone is over max_tokens_per_gpu."""
    sizes = np.array([pair.packed_tokens() for pair in pairs])
    logps = torch.zeros(len(pairs), 2, 2, dtype=torch.float64)
    for indexes in share(split_pairs(np.arange(len(pairs)), sizes, 1, max_tokens_per_gpu)[0]):
        batch = pack([pairs[i] for i in indexes]).to(device)
        logps[indexes] = torch.stack(model(batch), -1).unflatten(0, (-1, 2)).double().cpu()
    if dist.is_initialized():
        dist.all_reduce(logps)
    return logps.numpy()


def pair_rows(pairs: list[Pair], logps: np.ndarray) -> list[dict]:
    """What is written of each pair. margin is l_w - l_l, in nats per token; accuracy is 1 where that is above 0."""
    rows = []
    for pair, ((mean_w, sum_w), (mean_l, sum_l)) in zip(pairs, logps.tolist(), strict=True):
        rows.append(
            {
                "place": pair.place,
                "tokens_w": len(pair.chosen),
                "tokens_l": len(pair.rejected),
                "logp_w": mean_w,
                "logp_l": mean_l,
                "sum_logp_w": sum_w,
                "sum_logp_l": sum_l,
                "margin": mean_w - mean_l,
                "accuracy": float(mean_w > mean_l),
            }
        )
    return rows


# What each line of the table is, in the order of the rows' columns.
MEASURES = {
    "logp_w": "mean token log-prob of the chosen response, nats; mean over pairs",
    "logp_l": "of the rejected one",
    "sum_logp_w": "summed log-prob of the chosen response, nats; mean over pairs",
    "sum_logp_l": "of the rejected one",
    "margin": "logp_w - logp_l, mean over pairs",
    "accuracy": "share of pairs with a margin above 0",
    "perplexity_w": "exp(-nats of all chosen responses / their tokens): a long response weighs more",
}


def measures(columns_MPC: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """MEASURES of each model over pairs that count weight_P times each, and the first's less the second's. Columns:
    MEASURES without its last, tokens_w."""
    mean_MC = weight_P @ columns_MPC / weight_P.sum()
    of_each = np.column_stack([mean_MC[:, :-1], np.exp(-mean_MC[:, 2] / mean_MC[:, -1])])
    return np.vstack([of_each, of_each[:1] - of_each[1:]])


def bootstrap(
    statistic: Callable[[np.ndarray], object], n: int, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """statistic(weight_N) of n units that count once each, and its 95% limits: the 2.5% and 97.5% quantiles over
    RESAMPLES resamplings of the units, with replacement; a NaN, where nothing counts, is left out."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(rng.integers(n, size=n), minlength=n)) for _ in range(RESAMPLES)]
    return np.asarray(statistic(np.ones(n))), *np.nanquantile(drawn, [0.025, 0.975], axis=0)


def summarise(rows: list[dict], other: list[dict] | None = None, seed: int = 0) -> list[dict]:
    """The measures of one model; of two on the same pairs, both and the differences (the first's less the other's).
    Each is {"value", "low", "high"}; both models have the same resamples, so a difference's interval is paired."""
    names = [*list(MEASURES)[:-1], "tokens_w"]
    columns_MPC = np.array(
        [[[row[name] for name in names] for row in part] for part in (rows, other) if part]
    )
    found = np.stack(
        bootstrap(lambda weight_P: measures(columns_MPC, weight_P), len(rows), seed), -1
    )
    return [
        {
            name: dict(zip(("value", "low", "high"), limits, strict=True))
            for name, limits in zip(MEASURES, of_one, strict=True)
        }
        for of_one in found.tolist()
    ]


def likelihood(flags: argparse.Namespace) -> None:
    """Writes OUT/pairs.jsonl (and pairs-compare.jsonl) and OUT/summary.json, and prints the summary."""
    directories = [flags.model] + [flags.compare] * (flags.compare is not None)
    out, single = Path(flags.out), flags.out.endswith(".jsonl")
    first = out if single else out / "pairs.jsonl"
    paths = [first, first.with_name(f"{first.stem}-compare.jsonl")][: len(directories)]
    summary_path = out.with_suffix(".json") if single else out / "summary.json"
    talks = os.environ.get("RANK", "0") == "0"
    for path in [*paths, summary_path] if talks else []:
        if path.exists():
            raise InputError(f"--out: {path} exists; name another")
        with naming(
            f"--out {out}"
        ):  # before the work: is there room, and a right, to write in what will hold it?
            tempfile.TemporaryFile(
                dir=next(home for home in path.absolute().parents if home.exists())
            ).close()
    configs = [LlamaConfig.load(directory) for directory in directories]
    max_tokens = min(resolve_max_tokens(flags.max_tokens, config) for config in configs)
    (pairs, counts), *others = [
        encode_pairs(flags, directory, max_tokens) for directory in directories
    ]
    for directory, (of_other, _) in zip(directories[1:], others, strict=True):
        # One is longer where the other's tokenizer makes an answer empty, or two equal: that pair was dropped.
        for pair, same in itertools.zip_longest(pairs, of_other):
            if not (
                pair
                and same
                and np.array_equal(pair.prompt, same.prompt)
                and np.array_equal(pair.chosen, same.chosen)
                and np.array_equal(pair.rejected, same.rejected)
            ):
                raise InputError(
                    f"--compare {directory}: its tokenizer gives other ids than {flags.model}'s, first "
                    f"for {(pair or same).place}; log-probs of other tokens do not compare"
                )

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    device, dtype = choose_device(flags.device, flags.precision)
    of_models = []
    for directory in directories:  # one after the other, each freed before the next
        model = load_model(directory, dtype, device).requires_grad_(False)
        of_models.append(
            pair_rows(pairs, pair_logps(model, pairs, flags.max_tokens_per_gpu, device))
        )
        del model
    if dist.is_initialized():
        dist.destroy_process_group()
    if not talks:
        return
    found = summarise(*of_models, seed=flags.seed)
    facts = {
        "model": flags.model,
        "compare": flags.compare,
        "data": flags.data,
        "counts": counts,
        "pairs": len(pairs),
        "tokens_w": sum(len(pair.chosen) for pair in pairs),
        "tokens_l": sum(len(pair.rejected) for pair in pairs),
        "max_tokens": max_tokens,
        "dtype": str(dtype),
        "seed": flags.seed,
        "resamples": RESAMPLES,
        **dict(
            zip(("measures", "compare_measures", "difference")[: len(found)], found, strict=True)
        ),
    }
    with naming(f"--out {out}"):
        summary_path.parent.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, of_models, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary_path.write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{flags.data}: {len(pairs):,} pairs of {counts['read']:,} read; {facts['tokens_w']:,} chosen and "
        f"{facts['tokens_l']:,} rejected tokens\n"
    )
    heads = [flags.model, flags.compare, "difference"][: len(found)]
    width = max(30, *map(len, heads))
    print(" " * 14 + "".join(f"{head:<{width + 2}}" for head in heads) + "[95% of resampled pairs]")
    for name, text in MEASURES.items():
        cells = ("{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**of[name]) for of in found)
        print(f"{name:<14}" + "".join(f"{cell:<{width + 2}}" for cell in cells) + text)


# -------------------------------------------------------------------------------------------------------------- score

# Two families under two names, never mixed: they differ in what is a token and in what a repeated one counts, and so by
# many points on the same texts. `*_lf` is LLaMA-Factory's, which is very probably what the paper reports.

# mteval-v13a's rules, in their order. Each match is consumed, so of two marks in a row a rule may see the first alone.
RULES_13A = [
    (re.compile(pattern), spaced)
    for pattern, spaced in (
        (r"([!-&(-+/:-@[-`{-~])", r" \1 "),  # ASCII punctuation but for ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),  # stay in numbers: 1,000.5
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
]
ENTITIES = {
    "&quot;": '"',
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}  # in this order: &amp;lt; becomes <

HAN = "\u4e00-\u9fd5"  # what jieba takes for Chinese
BLOCK_LF = re.compile(rf"([{HAN}a-zA-Z0-9+#&._%-]+)")
WORD_LF = re.compile(
    rf"([{HAN}]+|AT&T|[Cc]\+\+|[Cc]#)"
)  # jieba's dictionary has these five words with ASCII in them
NUMBER_LF = re.compile(r"([a-zA-Z0-9]+(?:\.[0-9]+)?%?)")
SENTENCE_LF = re.compile(r"([。！？?]|\.{6})(.)")


def tokens_13a(text: str) -> list[str]:
    """The tokens of sacrebleu's default tokenizer, 13a: case is kept, punctuation stands alone."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in RULES_13A:
        text = pattern.sub(spaced, text)
    return text.split()


def tokens_rouge(text: str) -> list[str]:
    """The tokens of google's rouge_score without its stemmer: runs of a-z and 0-9, in lower case; nothing else counts,
    so Chinese has none."""
    return re.findall("[a-z0-9]+", text.lower())


def words_lf(text: str) -> list[str]:
    """The tokens of jieba.cut, white space among them. Differs from it where two Chinese characters meet: jieba divides
    them into words by a dictionary and a Markov model, and here a run of them is one token."""
    words = []
    for i, block in enumerate(BLOCK_LF.split(text)):
        if i % 2 == 0:  # re.split alternates: between the blocks each character stands alone
            words += block
            continue
        for j, part in enumerate(WORD_LF.split(block)):
            words += [part] if j % 2 else filter(None, NUMBER_LF.split(part))
    return words


def tokens_lf(text: str) -> list[str]:
    """The tokens that rouge_chinese 1.0.3 compares when LLaMA-Factory hands it " ".join(jieba.cut(text)).

    It cuts that into sentences, at newlines, at the marks and after six dots, which has two effects: a blank sentence
    that is not empty gives one empty token, and a longer run of dots is divided. (Its further rules, on quotes and
    ellipses after a mark, never act, since a space stands between the words.)"""
    cut = SENTENCE_LF.sub(r"\1\n\2", " ".join(words_lf(text))).rstrip()
    return [token for sentence in cut.split("\n") if sentence for token in sentence.split() or [""]]


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Tokens of the longest common subsequence of a and b.

    Row by row of the usual table, a row being one integer: bit i is 0 where the row grows from a[:i] to a[:i+1]. The
    sum carries each match to the next place where the row grew (Crochemore et al. 2001; Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = everywhere = (1 << len(a)) - 1
    for token in b:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & everywhere
    return len(a) - row.bit_count()


def bleu_counts(prediction: Sequence[str], reference: Sequence[str]) -> list[int]:
    """What BLEU-4 is made of, and what a corpus sums: the n-grams of the prediction that the reference has, each at
    most as often as the reference has it, for n = 1 to 4; all n-grams of the prediction, likewise; and both lengths."""
    found = [ngrams(prediction, n) for n in range(1, 5)]
    matches = [(counts & ngrams(reference, n)).total() for n, counts in enumerate(found, 1)]
    return [*matches, *(counts.total() for counts in found), len(prediction), len(reference)]


def bleu4(
    matches: Sequence[int], totals: Sequence[int], prediction_tokens: int, reference_tokens: int
) -> float:
    """BLEU-4 from `bleu_counts`, 0 to 100: geometric mean of four precisions, times exp(1 - r/c) where c <= r.

    The k-th order without a match has precision 1/(2^k total): sacrebleu's smoothing "exp", nltk's method 3. 0 where no
    token matches, and where an order has no n-gram at all."""
    if not matches[0] or not all(totals):
        return 0.0
    log_precision, zeros = 0.0, 0
    for matched, total in zip(matches, totals, strict=True):
        zeros += not matched
        log_precision += math.log((matched or 0.5**zeros) / total)
    return 100 * math.exp(log_precision / 4 + min(0, 1 - reference_tokens / prediction_tokens))


def f1(matches: int, prediction_count: int, reference_count: int, epsilon: float = 0.0) -> float:
    """2PR / (P + R + epsilon), 0 to 100; 0 where nothing matches, be it that one side is empty."""
    if not matches:
        return 0.0
    precision, recall = matches / prediction_count, matches / reference_count
    return 100 * (2 * (precision * recall / (precision + recall + epsilon)))


def rouge(prediction: str, reference: str) -> list[float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one row, 0 to 100: the F1 of google's rouge_score 0.1.2, without stemmer.
    n-grams count as often as both sides have them."""
    a, b = tokens_rouge(prediction), tokens_rouge(reference)
    both = [(ngrams(a, n), ngrams(b, n)) for n in (1, 2)]
    return [
        *(f1((x & y).total(), x.total(), y.total()) for x, y in both),
        f1(lcs_length(a, b), len(a), len(b)),
    ]


def rouge_lf(prediction: str, reference: str) -> list[float]:
    """The same as rouge_chinese 1.0.3 computes them, and so LLaMA-Factory: other tokens, each n-gram counted once
    however often it occurs (ROUGE-L, the longest common subsequence, counts all), and 1e-8 in the denominator. 0 where
    a side has nothing but white space: there LLaMA-Factory does not ask rouge_chinese, which would fail."""
    a, b = tokens_lf(prediction), tokens_lf(reference)
    both = [(ngrams(a, n).keys(), ngrams(b, n).keys()) for n in (1, 2)]
    lcs = f1(lcs_length(a, b), len(a), len(b), 1e-8)
    return [*(f1(len(x & y), len(x), len(y), 1e-8) for x, y in both), lcs]


def bleu4_lf(prediction: str, reference: str) -> float:
    """nltk's sentence_bleu with smoothing method 3, over *characters*, as LLaMA-Factory calls it; 0 to 100. An order
    that the prediction is too short for counts as one n-gram without a match; white space counts as any character."""
    *counts, characters, reference_characters = bleu_counts(prediction, reference)
    return bleu4(
        counts[:4], [max(1, total) for total in counts[4:]], characters, reference_characters
    )


def score_rows(rows: list[tuple[str, str]]) -> dict[str, float]:
    """All scores of (prediction, reference) rows, at least one; 0 to 100.

    bleu4                     of the corpus: counts are summed before BLEU is taken (sacrebleu 2.6 corpus_bleu)
    rouge1, rouge2, rougeL    mean over rows of rouge_score's F1
    bleu4_lf ... rougeL_lf    mean over rows, each rounded to 4 decimals: LLaMA-Factory 0.9.5, train/sft/metric.py
    count, mean_*_characters, mean_*_tokens     rows; code points; tokens of 13a, which `bleu4` counts"""
    counts, means, means_lf = [], [], []
    for prediction, reference in rows:
        counts.append(bleu_counts(tokens_13a(prediction), tokens_13a(reference)))
        means.append(rouge(prediction, reference))
        row_lf = [bleu4_lf(prediction, reference), *rouge_lf(prediction, reference)]
        means_lf.append([round(value, 4) for value in row_lf])
    sums = [sum(column) for column in zip(*counts, strict=True)]
    scores = [
        bleu4(sums[:4], sums[4:8], *sums[8:]),
        *(
            statistics.fmean(column)
            for values in (means, means_lf)
            for column in zip(*values, strict=True)
        ),
    ]
    names = (
        "bleu4",
        "rouge1",
        "rouge2",
        "rougeL",
        "bleu4_lf",
        "rouge1_lf",
        "rouge2_lf",
        "rougeL_lf",
    )
    lengths = {}
    for i, side in enumerate(("prediction", "reference")):
        lengths[f"mean_{side}_characters"] = statistics.fmean(len(row[i]) for row in rows)
        lengths[f"mean_{side}_tokens"] = sums[8 + i] / len(rows)
    return dict(zip(names, scores, strict=True)) | {"count": len(rows)} | lengths


def read_predictions(path: Path) -> tuple[list[tuple[str, str]], int]:
    """(prediction, reference) of each row of a JSONL file, and how many of them `generate` left unanswered. Raises
    InputError, naming file and line."""
    rows, overlong = [], 0
    for place, row in json_rows(path, "prediction", "reference"):
        for key in ("prediction", "reference"):
            if not isinstance(row[key], str):
                raise InputError(f"{place}: {key} is {shown(row[key])}, wanted a string")
        rows.append((row["prediction"], row["reference"]))
        overlong += row.get("finish") == "overlong"
    if not rows:
        raise InputError(f"{path}: no row in it; wanted rows with prediction and reference")
    return rows, overlong


def score(flags: argparse.Namespace) -> None:
    """Prints both families with the lengths beside them, since both move with length; writes them with --json."""
    path = Path(flags.predictions)
    rows, overlong = read_predictions(path)
    scores = score_rows(rows)
    print(
        f"{path}: {len(rows):,} rows\n{'':12}  BLEU-4  ROUGE-1  ROUGE-2  ROUGE-L    "
        "mean length: prediction  reference"
    )
    # Each family with the lengths in the unit that its BLEU counts.
    for family, suffix, unit in (("conventional", "", "tokens"), ("_lf", "_lf", "characters")):
        values = [scores[name + suffix] for name in ("bleu4", "rouge1", "rouge2", "rougeL")]
        values += [scores[f"mean_{side}_{unit}"] for side in ("prediction", "reference")]
        print(
            "{:12}{:8.2f}{:9.2f}{:9.2f}{:9.2f}{:27,.1f}{:11,.1f}  {}".format(family, *values, unit)
        )
    if overlong:
        print(
            f"{overlong:,} of the rows were left unanswered, their prompts being too long: they count as empty"
        )
    if chinese := sum(
        bool(re.search(f"[{HAN}]{{2}}", f"{prediction} {reference}"))
        for prediction, reference in rows
    ):
        print(
            f"{chinese:,} of the rows hold Chinese, which jieba divides into words: ROUGE _lf is not LLaMA-Factory's"
        )
    if flags.json is not None:
        write_json(flags.json, scores, path)


# ------------------------------------------------------------------------------------------- mt-bench and arena-hard

MT_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}  # in the order of the questions' ids
MT_WITH_REFERENCE = ("math", "reasoning", "coding")
MT_MAX_TOKENS = 2048  # of a judgment, at temperature 0; Arena-Hard's configuration says both itself
RATINGS = [
    r"\[\[(\d{1,9}(?:\.\d*)?)\]\]",
    r"\[(\d{1,9}(?:\.\d*)?)\]",
]  # the second where the first finds none
LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
VERDICTS = {
    "A>>B": (0.0, 3),
    "A>B": (0.0, 1),
    "A=B": (0.5, 1),
    "B>A": (1.0, 1),
    "B>>A": (1.0, 3),
}  # B's points, weight
SECOND_TRY = "continue your judgment and finish by outputting a final verdict label"
LONGEST_WAIT = 60.0  # seconds between two tries, unless the endpoint asks for more
HOPELESS = (
    401,
    402,
    403,
    404,
)  # HTTP statuses that all requests would get: key, money, right, address or model


class Bench(NamedTuple):
    """What differs between the benchmarks' answers."""

    name: str
    turns: int
    max_new_tokens: int
    at_once: int  # questions of a process that are asked, turn after turn, before its next ones are


# An answer is written when its last turn is done: killed, MT-Bench loses what 32 questions took at most.
MT_BENCH, ARENA_HARD = Bench("MT-Bench", 2, 1024, 32), Bench("Arena-Hard", 1, 4096, 500)


class Question(NamedTuple):
    """Of a benchmark: what is asked, turn after turn."""

    id: int | str
    category: str
    turns: list[str]
    place: str = ""  # "file:line"


def turn_texts(holder: object, turns: int, place: str) -> list[str]:
    """The texts of an object's "turns": strings (MT-Bench) or objects with a content (Arena-Hard)."""
    found = holder.get("turns") if isinstance(holder, dict) else None
    found = found if isinstance(found, list) else []
    texts = [turn.get("content") if isinstance(turn, dict) else turn for turn in found]
    if len(texts) != turns or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{place}: wanted turns with {turns} text{'s' * (turns > 1)}; found {shown(found)}"
        )
    return texts


def read_questions(path: str | Path, bench: Bench) -> dict[int | str, Question]:
    """By id, in file order."""
    questions = {}
    for place, row in json_rows(path, "question_id", "category", "turns"):
        question = Question(
            row["question_id"], row["category"], turn_texts(row, bench.turns, place), place
        )
        if question.id in questions:
            raise InputError(f"{place}: question {question.id} is there twice")
        if bench is MT_BENCH and question.category not in list(MT_TEMPERATURES):
            raise InputError(
                f"{place}: category {question.category!r}, wanted one of {', '.join(MT_TEMPERATURES)}"
            )
        if re.search("[\ud800-\udfff]", "".join(question.turns)):
            raise InputError(
                f"{place}: turns hold half a surrogate pair, which is not Unicode text"
            )
        questions[question.id] = question
    if not questions:
        raise InputError(f"{path}: no question in it")
    return questions


def read_answers(
    path: str | Path, bench: Bench, questions: dict
) -> tuple[str | None, dict[int | str, list[str]]]:
    """The one model of a file of answers (None if it is empty), and question id -> the texts of its turns."""
    model, answers = None, {}
    for place, row in json_rows(path, "question_id", "model_id", "choices", questions=questions):
        number, choices = row["question_id"], row["choices"]
        model = row["model_id"] if model is None else model
        if row["model_id"] != model or not isinstance(model, str):
            raise InputError(
                f"{place}: answered by {row['model_id']!r}, above by {model!r}; wanted one model"
            )
        if number in answers:
            raise InputError(f"{place}: question {number} is answered twice")
        answers[number] = turn_texts(
            choices[0] if isinstance(choices, list) and choices else None, bench.turns, place
        )
    return model, answers


def answer(flags: argparse.Namespace) -> None:
    """Answers a benchmark's questions, as FastChat or Arena-Hard write them, each when its last turn is done; goes on
    where the same call stopped, as `claim_rows` has it.

    MT-Bench: two turns, the second seeing the first answer, at its category's temperature; Arena-Hard: one, greedy.
    No system prompt. token_len counts the model's own tokens, not tiktoken's as in Arena-Hard's files. Questions whose
    prompt fills the context are counted and not answered."""
    bench, questions, out = (
        flags.bench,
        read_questions(flags.questions, flags.bench),
        Path(flags.out),
    )
    home = Path(flags.model).resolve()
    flags.model_id = flags.model_id or (
        home.parent.name if home.name == "model" else home.name
    )  # train.py's OUT/model
    done = claim_rows(
        flags, "questions", lambda: read_answers(out, bench, questions)[1], "model_id", "seed"
    )
    # Shared out before the answered ones are left out: else what one process has just written moves another's share.
    mine = [
        (i, question)
        for i, question in share(list(enumerate(questions.values())))
        if question.id not in done
    ]
    counts = Counter()
    model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
    for start in range(0, len(mine), bench.at_once):
        asked = mine[start : start + bench.at_once]
        what, talks = (
            f"questions {start + 1} to {start + len(asked)} of {len(mine)}",
            {i: [] for i, _ in asked},
        )
        for turn in range(bench.turns):
            asked = [(i, question) for i, question in asked if i in talks]
            for i, question in asked:
                talks[i].append(("user", question.turns[turn].strip()))
            prompts = [Prompt(talks[i], None, question.place) for i, question in asked]
            encoded = encode_prompts(prompts, chat, model.config.vocab_size)
            requests = [
                Request(
                    i + turn * len(questions),
                    ids,  # each turn has random numbers of its own
                    MT_TEMPERATURES[question.category] if bench is MT_BENCH else 0.0,
                    bench.max_new_tokens,
                )
                for (i, question), ids in zip(asked, encoded, strict=True)
            ]
            answers = generate(
                model, requests, stop_ids, seed=flags.seed, cache_tokens=flags.cache_tokens
            )
            for k, new, finish in told(answers, len(requests), f"{what}, turn {turn + 1}: "):
                i, question = asked[k]
                talks[i].append(("assistant", chat.decode(new).strip()))
                counts[finish] += 1
                if finish == "overlong":
                    del talks[i]
                elif turn + 1 == bench.turns:
                    texts = [content for role, content in talks[i] if role == "assistant"]
                    turns = (
                        texts
                        if bench is MT_BENCH
                        else [{"content": texts[0], "token_len": len(new)}]
                    )
                    append_row(
                        out,
                        {
                            "question_id": question.id,
                            "answer_id": uuid.uuid4().hex,
                            "model_id": flags.model_id,
                            "choices": [{"index": 0, "turns": turns}],
                            "tstamp": time.time(),
                        },
                    )
                    counts["answered"] += 1
    print(
        f"{out}: {counts['answered']} of {len(questions)} questions answered by {flags.model_id}, {len(done)} there "
        f"before; {counts['overlong']} skipped (no room in the context); {counts['length']} turns cut at their limit"
    )


class Judge(NamedTuple):
    """An OpenAI-compatible endpoint, and how patiently it is asked."""

    url: str
    model: str
    key: str
    temperature: float
    max_tokens: int
    timeout: float  # seconds
    tries: int
    wait: float  # seconds after the first failed try, twice as many after each further one
    raw: Path  # every reply, as it came
    kept: dict[str, str]  # digest of a request -> reply, from `raw`
    opener: urllib.request.OpenerDirector
    stop: threading.Event


class UnjudgedError(Exception):
    """A question that the endpoint did not judge, and why. The next run asks again."""


def open_judge(flags: argparse.Namespace, temperature: float, max_tokens: int) -> Judge:
    """Checks key and endpoint before anything is asked: InputError where one is missing."""
    key = os.environ.get(flags.key_variable, "").strip()
    if not re.fullmatch(
        r"https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[^\s@?#]*)?", flags.endpoint, re.ASCII | re.I
    ):
        raise InputError(
            "--endpoint: wanted a plain http:// or https:// address, such as https://api.openai.com/v1"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"environment variable {flags.key_variable} (--key-variable) is "
            f"{'not a key' if key else 'not set'}; wanted the endpoint's key in it, or any word for an "
            "endpoint that needs none"
        )
    address = flags.endpoint.rstrip("/")
    address += "" if address.endswith("/chat/completions") else "/chat/completions"
    opener = (
        urllib.request.OpenerDirector()
    )  # without urllib's redirects, which would carry the key to another host
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
    ):
        opener.add_handler(handler())
    try:
        opener.open(
            address, timeout=min(flags.timeout, 10)
        ).close()  # GET, without the key: any status will do
    except (
        urllib.error.URLError,
        ValueError,
        OverflowError,
    ) as error:  # the latter two of odd hosts and ports
        raise InputError(
            f"--endpoint {flags.endpoint}: not reachable ({getattr(error, 'reason', error)})"
        ) from None
    except (OSError, http.client.HTTPException):
        pass  # it was reached; the requests themselves are tried again
    raw = Path(f"{flags.out}.raw")
    with locked(raw):  # mended, made
        pass
    kept = {
        row["request"]: reply
        for _, row in json_rows(raw, "request", "body")
        if (reply := reply_of(row["body"]))
    }
    return Judge(
        address,
        flags.judge_model,
        key,
        temperature,
        max_tokens,
        flags.timeout,
        flags.tries,
        flags.wait,
        raw,
        kept,
        opener,
        threading.Event(),
    )


def hide(text: str, key: str) -> str:
    """Without the key, which some endpoints quote; one shorter than 8 is no secret, but may be a word of a reply."""
    for form in (key, key.replace("/", r"\/"), json.dumps(key)[1:-1]) if len(key) >= 8 else ():
        text = text.replace(form, "[key]")
    return text


def reply_of(body: str) -> str | None:
    """The text in a body of the chat protocol, or None."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) and content.strip() else None


def seconds_asked(header: str | None) -> float:
    """Of a Retry-After header, seconds or a date; at most an hour. 0 for none and for nonsense."""
    try:
        date = email.utils.parsedate_tz(header or "")
        return min(
            max(0.0, email.utils.mktime_tz(date) - time.time() if date else float(header or 0)),
            3600.0,
        )
    except (ValueError, OverflowError):
        return 0.0


def ask(judge: Judge, messages: list[dict], about: dict) -> str:
    """The judge's reply. A request that `raw` has the reply to is not sent again.

    Tried again, after a wait that doubles and is spread by chance: no connection, time-outs, HTTP 408, 429 and 5xx,
    bodies without a reply. Raises UnjudgedError when that was of no use or judge.stop is set; InputError for a status
    that every request would get."""
    data = json.dumps(
        {
            "model": judge.model,
            "messages": messages,
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
        }
    ).encode()
    digest = hashlib.sha256(data).hexdigest()
    if digest in judge.kept:
        return judge.kept[digest]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {judge.key}"}
    for attempt in range(judge.tries):
        if judge.stop.is_set():
            raise UnjudgedError("stopped")
        wait = 0.0
        try:
            request = urllib.request.Request(judge.url, data, headers)
            with judge.opener.open(request, timeout=judge.timeout) as response:
                body = hide(response.read().decode(errors="replace"), judge.key)
            status, wait = response.status, seconds_asked(response.headers["Retry-After"])
        except (OSError, http.client.HTTPException) as error:
            reason = hide(str(getattr(error, "reason", error)), judge.key) or type(error).__name__
        else:
            append_row(
                judge.raw,
                about | {"request": digest, "status": status, "body": body, "tstamp": time.time()},
            )
            if status == 200 and (reply := reply_of(body)):
                return reply
            if status in HOPELESS or 300 <= status < 400:
                raise InputError(f"{judge.url}: HTTP {status}: {' '.join(body.split())[:200]}")
            if status not in (200, 408, 429) and status < 500:
                raise UnjudgedError(f"HTTP {status}: {' '.join(body.split())[:100]}")
            reason = "no reply in a body of HTTP 200" if status == 200 else f"HTTP {status}"
        if attempt + 1 < judge.tries:
            spread = min(judge.wait * 2 ** min(attempt, 20), LONGEST_WAIT) * random.uniform(
                0.5, 1.5
            )
            judge.stop.wait(max(wait, spread))
    raise UnjudgedError(reason)


Job = tuple[
    list[str], Callable[[Judge], dict]
]  # the prompts that the judge sees, and what makes the row


def judge_all(
    flags: argparse.Namespace,
    model: str,
    jobs: dict[tuple, Job],
    keys: tuple[str, ...],
    temperature: float,
    max_tokens: int,
) -> None:
    """Does the jobs that --out lacks, several at once, and writes each row when it is there.

    A job's key is its row's values of `keys`. Interrupted, it waits for the replies under way, so that all that was
    paid for is kept. Raises InputError where --out is another judge's or judges other answers."""
    out, done = Path(flags.out), set()
    with locked(out):
        pass
    for place, row in json_rows(out, "model", "judge", *keys):
        found = row["judge"][0] if isinstance(row["judge"], list) and row["judge"] else row["judge"]
        if found != flags.judge_model:
            raise InputError(
                f"{place}: judged by {found!r}, wanted {flags.judge_model!r} (--judge-model)"
            )
        key = tuple(row[name] for name in keys)
        if row["model"] == model and key in list(
            jobs
        ):  # a list: what cannot be hashed is not in it either
            games = row["games"] if isinstance(row.get("games"), list) else [row]
            if [isinstance(game, dict) and game.get("user_prompt") for game in games] != jobs[key][
                0
            ]:
                raise InputError(
                    f"{place}: what was judged is not {model}'s answer to question {key[0]} in --answers; "
                    "wanted the same answers, or a fresh file"
                )
            done.add(key)
    waiting, failed, made = (
        [work for key, (_, work) in jobs.items() if key not in done],
        Counter(),
        0,
    )
    if not waiting:
        print(
            f"{out}: {len(done)} judgments of {model} by {flags.judge_model} there before, none left to make"
        )
        return
    judge = open_judge(flags, temperature, max_tokens)

    def do(work: Callable[[Judge], dict]) -> None:
        try:
            append_row(out, work(judge))
        except InputError:
            judge.stop.set()  # here: this thread's next job begins before any other thread hears of it
            raise

    with ThreadPoolExecutor(flags.concurrency) as pool:
        futures = [pool.submit(do, work) for work in waiting]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                    made += 1
                except UnjudgedError as error:
                    failed[str(error)] += 1
                if count % max(1, len(waiting) // 10) == 0:
                    print(f"{count} of {len(waiting)}", flush=True)
        except BaseException as error:
            judge.stop.set()  # nothing more is asked; leaving the pool waits for the replies under way
            if isinstance(error, KeyboardInterrupt):
                print(
                    f"stopping: waiting for what is under way; {out} keeps what is judged, the same command goes on",
                    file=sys.stderr,
                    flush=True,
                )
            raise
    reasons = "; ".join(f"{count} x {reason}" for reason, count in failed.most_common(5))
    print(
        f"{out}: {made} judgments of {model} by {judge.model}, {len(done)} there before, {failed.total()} failed"
        + (f" ({reasons}); the same command tries them again" if failed else "")
        + f"; raw replies in {judge.raw}"
    )


def fill(template: object, fields: dict[str, str], where: str) -> str:
    """A judge prompt with its fields put in."""
    try:
        return template.format(**fields)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{where}: wanted a text with fields among {', '.join(fields)} ({error})"
        ) from None


def judge_mt_bench(flags: argparse.Namespace) -> None:
    """Single-answer grading, one request a turn; with reference answers where the category needs them."""
    questions = read_questions(flags.questions, MT_BENCH)
    model, answers = read_answers(flags.answers, MT_BENCH, questions)
    references = read_answers(flags.references, MT_BENCH, questions)[1]
    prompts = {
        str(row["name"]): row
        for _, row in json_rows(flags.prompts, "name", "system_prompt", "prompt_template")
    }
    jobs = {}
    for number, (one, two) in answers.items():
        question = questions[number]
        fields = {
            "question": question.turns[0],
            "question_1": question.turns[0],
            "question_2": question.turns[1],
            "answer": one,
            "answer_1": one,
            "answer_2": two,
        }
        with_reference = question.category in MT_WITH_REFERENCE
        if with_reference:
            if number not in references:
                raise InputError(
                    f"{flags.references}: no answer to question {number}, {question.category} wants one"
                )
            fields["ref_answer_1"], fields["ref_answer_2"] = references[number]
        for turn in (1, 2):
            name = "single-math-v1" if with_reference else "single-v1"
            name += "-multi-turn" * (turn == 2)
            if name not in prompts:
                raise InputError(
                    f"{flags.prompts}: no prompt {name}; wanted FastChat's judge_prompts.jsonl"
                )
            user = fill(prompts[name]["prompt_template"], fields, f"{flags.prompts}: {name}")
            jobs[number, turn] = (
                [user],
                functools.partial(rate, model, number, turn, name, prompts[name], user),
            )
    print(f"{model}: {len(answers)} of {len(questions)} questions have an answer", flush=True)
    judge_all(flags, model, jobs, ("question_id", "turn"), 0.0, MT_MAX_TOKENS)


def rate(
    model: str, number: int | str, turn: int, name: str, prompt: dict, user: str, judge: Judge
) -> dict:
    """A row of FastChat's judgments: the score is -1 where the judge gave none."""
    messages = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": user},
    ]
    reply = ask(judge, messages, {"question_id": number, "model": model, "turn": turn})
    found = [match[1] for match in (re.search(pattern, reply) for pattern in RATINGS) if match]
    score = (float(found[0]) if "." in found[0] else int(found[0])) if found else -1
    return {
        "question_id": number,
        "model": model,
        "judge": [judge.model, name],
        "user_prompt": user,
        "judgment": reply,
        "score": score,
        "turn": turn,
        "tstamp": time.time(),
    }


def read_setting(path: str | Path, key: str, *kinds: type):
    """The value of `key: VALUE` in a YAML file, where it is one line and JSON too: a double-quoted text, a list of
    them, a number. InputError for all else that YAML allows."""
    try:
        (text,) = re.findall(rf"^{key}:[ ]+(.*)$", Path(path).read_text(encoding="utf-8"), re.M)
        value, end = json.JSONDecoder().raw_decode(text)
        if type(value) in kinds and re.fullmatch(r"\s*(\s#.*)?", text[end:]):
            return value
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; wanted Arena-Hard's judge_config.yaml"
        ) from None
    except ValueError:
        pass
    raise InputError(
        f"{path}: wanted one line `{key}: VALUE`, VALUE of type "
        f"{' or '.join(kind.__name__ for kind in kinds)}, in JSON's form"
    )


def judge_arena_hard(flags: argparse.Namespace) -> None:
    """Two games a question: the baseline's answer first, then the model's."""
    questions = read_questions(flags.questions, ARENA_HARD)
    model, answers = read_answers(flags.answers, ARENA_HARD, questions)
    baseline, theirs = read_answers(flags.baseline, ARENA_HARD, questions)
    system, templates, temperature, max_tokens = (
        read_setting(flags.config, *of)
        for of in (
            ("system_prompt", str),
            ("prompt_template", list),
            ("temperature", int, float),
            ("max_tokens", int),
        )
    )
    jobs = {}
    for number, (mine,) in answers.items():
        if number not in theirs:
            raise InputError(
                f"{flags.baseline}: no answer to question {number}, wanted all those of --answers"
            )
        users = []
        for one, two in ((theirs[number][0], mine), (mine, theirs[number][0])):
            fields = {"question_1": questions[number].turns[0], "answer_1": one, "answer_2": two}
            users += [
                fill(template, fields, f"{flags.config}: prompt_template") for template in templates
            ]
        if len(users) != 2:
            raise InputError(
                f"{flags.config}: prompt_template has {len(templates)} texts, wanted one"
            )
        jobs[number,] = users, functools.partial(play, model, number, system, users)
    print(
        f"{model} against {baseline}: {len(answers)} of {len(questions)} questions have an answer",
        flush=True,
    )
    judge_all(flags, model, jobs, ("question_id",), temperature, max_tokens)


def play(model: str, number: int | str, system: str, users: list[str], judge: Judge) -> dict:
    """A row of Arena-Hard's judgments: each game's label, None where there are several or, after a second try, none."""
    games = []
    for game, user in enumerate(users, 1):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        judgment, labels = "", set()
        while not labels and len(messages) <= 4:
            reply = ask(judge, messages, {"question_id": number, "model": model, "game": game})
            judgment += f"\n{reply}"
            labels = set(LABEL.findall(judgment))
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": SECOND_TRY},
            ]
        label = labels.pop() if len(labels) == 1 else None
        games.append({"user_prompt": user, "judgment": judgment, "score": label})
    return {"question_id": number, "model": model, "judge": judge.model, "games": games}


# ---- what came out


def mean_score(sums: list[float], counts: list[int]) -> dict[str, float] | None:
    """sum(sums)/sum(counts) and its 95% interval over the units, which are questions (MT-Bench) or battles
    (Arena-Hard). None where nothing counts."""
    if not sum(counts):
        return None
    sum_Q, count_Q = np.array([sums, counts], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0/0, where nothing that was drawn counts
        found = bootstrap(lambda weight_Q: (weight_Q @ sum_Q) / (weight_Q @ count_Q), len(sums))
    return dict(zip(("score", "low", "high"), map(float, found), strict=True))


def read_judgments(
    flags: argparse.Namespace, questions: dict | None, report: dict, counts: Counter, *keys: str
) -> Iterator[tuple[str, str, dict]]:
    """(place, model, row) of a report's files, of several judgments of the same the first; the others are counted. The
    report gains their judge. InputError where there are two."""
    seen = set()
    for path in flags.judgments:
        for place, row in json_rows(path, "question_id", "model", *keys, questions=questions):
            judge = row.get("judge")
            judge = judge[0] if isinstance(judge, list) and judge else judge
            if judge != report.setdefault("judge", judge) or not isinstance(row["model"], str):
                raise InputError(
                    f"{place}: {row['model']!r} judged by {judge!r}, above by {report['judge']!r}; wanted "
                    "the judgments of one judge"
                )
            turn = row["turn"] if "turn" in keys else 1
            if turn not in (1, 2):
                raise InputError(f"{place}: turn {turn!r}, wanted 1 or 2")
            if (of := (row["model"], row["question_id"], turn)) in seen:
                counts[row["model"], "duplicate"] += 1
                continue
            seen.add(of)
            yield place, row["model"], row


def report_mt_bench(flags: argparse.Namespace) -> None:
    """Means over the judged turns: of all, of each turn, of each category. -1 and what is no number do not count."""
    if flags.questions:
        questions = read_questions(flags.questions, MT_BENCH)
    else:  # they are public and fixed: 81 to 160, ten a category
        questions = {
            81 + i: Question(81 + i, list(MT_TEMPERATURES)[i // 10], []) for i in range(80)
        }
    found, counts, report = {}, Counter(), {"benchmark": MT_BENCH.name}
    for _, name, row in read_judgments(flags, questions, report, counts, "judge", "score", "turn"):
        score = row["score"]
        parsed = type(score) in (int, float) and math.isfinite(score) and score != -1
        found.setdefault(name, {})[row["question_id"], row["turn"]] = score if parsed else None
        counts[name, "judged" if parsed else "unparsed"] += 1
        counts[name, "outside 1-10"] += parsed and not 1 <= score <= 10

    def mean(scores: dict, turns: tuple[int, ...], category: str | None = None) -> dict | None:
        per_question = [
            [scores[q.id, turn] for turn in turns if scores.get((q.id, turn)) is not None]
            for q in questions.values()
            if category in (None, q.category)
        ]
        return mean_score(list(map(sum, per_question)), list(map(len, per_question)))

    categories, scores = dict.fromkeys(question.category for question in questions.values()), {}
    for name, of_model in found.items():
        scores[name] = {"overall": mean(of_model, (1, 2))} | {
            f"turn {i}": mean(of_model, (i,)) for i in (1, 2)
        }
        scores[name] |= {category: mean(of_model, (1, 2), category) for category in categories}
        counts[name, "missing"] = 2 * len(questions) - len(of_model)
    write_report(
        flags,
        report,
        scores,
        counts,
        "{:.7g}",
        "judged",
        "missing",
        "duplicate",
        "unparsed",
        "outside 1-10",
    )


def report_arena_hard(flags: argparse.Namespace) -> None:
    """Win rates against the baseline, in percent: with one opponent, the mean of the battles' points is the
    Bradley-Terry maximum-likelihood win rate.

    A strong verdict is three battles, a tie half a win in one; what is no verdict (None, "A>>A") is unparsed and none.
    Arena-Hard's bootstrap draws battles as if the three of a verdict were independent, and so does this one: over
    questions, intervals would be wider."""
    questions = read_questions(flags.questions, ARENA_HARD) if flags.questions else None
    asked, report = (
        len(questions) if questions else 500,
        {"benchmark": ARENA_HARD.name},
    )  # 500 in v0.1
    points, counts, kinds = {}, Counter(), ("judged", "missing", "duplicate", "unparsed")
    for place, name, row in read_judgments(flags, questions, report, counts, "games"):
        if not isinstance(row["games"], list) or len(row["games"]) > 2:
            raise InputError(f"{place}: wanted a list of two games; found {shown(row['games'])}")
        of_model = points.setdefault(name, [])
        for swapped, game in enumerate(row["games"]):  # in the second game the model is A
            label = game.get("score") if isinstance(game, dict) else None
            won, weight = VERDICTS.get(str(label), (0.0, 0))
            of_model += [1 - won if swapped else won] * weight
            counts[name, "judged" if weight else "unparsed"] += 1
    for name in points:
        counts[name, "missing"] = 2 * asked - counts[name, "judged"] - counts[name, "unparsed"]
    if flags.battles:
        (points, counts), kinds = read_battles(flags, questions), ("battles", "unparsed")
    scores = {
        name: {"win rate": mean_score([100 * won for won in of_model], [1] * len(of_model))}
        for name, of_model in points.items()
    }
    write_report(flags, report, scores, counts, "{:.2f}", *kinds)


def read_battles(
    flags: argparse.Namespace, questions: dict | None
) -> tuple[dict[str, list[float]], Counter]:
    """Model -> points of its battles in Arena-Hard's weighted form, a row for each time that a verdict counts. So games
    cannot be counted, nor duplicates told from weights."""
    points, counts = {}, Counter()
    for place, row in json_rows(
        flags.battles, "question_id", "model_a", "model_b", "winner", questions=questions
    ):
        sides = [row["model_a"], row["model_b"]]
        if flags.baseline_model not in sides or not all(isinstance(side, str) for side in sides):
            raise InputError(
                f"{place}: a battle of {sides[0]!r} and {sides[1]!r}; wanted one of them to be "
                f"{flags.baseline_model!r} (--baseline-model)"
            )
        mine = "model_a" if sides[1] == flags.baseline_model else "model_b"
        won = {"model_a": [0.0], "model_b": [0.0], "tie": [0.5], "tie (bothbad)": [0.5]} | {
            mine: [1.0]
        }
        point = won.get(str(row["winner"]), [])
        points.setdefault(row[mine], []).extend(point)
        counts[row[mine], "battles" if point else "unparsed"] += 1
    return points, counts


def write_report(
    flags: argparse.Namespace, report: dict, scores: dict, counts: Counter, form: str, *kinds: str
) -> None:
    """Prints the models of a report side by side, with these kinds of `counts`; writes it with --json."""
    if not scores:
        raise InputError(
            "no judgment in " + ", ".join(map(str, flags.judgments or [flags.battles]))
        )
    report.setdefault("judge", None)
    report["models"] = {
        name: {"scores": of_model} | {kind: counts[name, kind] for kind in kinds}
        for name, of_model in scores.items()
    }
    rows = [
        [of_what, *(cell(of_model[of_what], form) for of_model in scores.values())]
        for of_what in next(iter(scores.values()))
    ]
    rows += [[kind, *(str(counts[name, kind]) for name in scores)] for kind in kinds]
    print(table([f"{report['benchmark']}, {report['judge'] or 'battles'}", *scores], rows))
    if flags.json:
        write_json(flags.json, report, *(flags.judgments or [flags.battles]))


def cell(score: dict | None, form: str = "{:.2f}") -> str:
    """A score and its interval as a table shows them; a dash for none."""
    return (
        "-"
        if score is None
        else f"{form.format(score['score'])} [{score['low']:.2f}, {score['high']:.2f}]"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """In markdown, aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


OVERLAP = (
    "bleu4_lf",
    "rouge1_lf",
    "rouge2_lf",
    "rougeL_lf",
    "bleu4",
    "rouge1",
    "rouge2",
    "rougeL",
    "mean_prediction_tokens",
)  # of score.json: the paper's family, the conventional one, the length


def tables(flags: argparse.Namespace) -> None:
    """The paper's three tables, models side by side, from what other commands wrote with --json into a directory for
    each model: arena_hard*.json and mt_bench*.json (a column for each judge), score.json. likelihood.json, where it is
    there, makes a table of its own. What is not there is a dash."""
    found = {
        "Table 1. Arena-Hard (win rate, %) and MT-Bench, 95% intervals": {},
        "Table 2. BLEU and ROUGE after training on HH-RLHF": {},
        "Table 3. BLEU and ROUGE after training on UltraFeedback": {},
        "Likelihoods (not in the paper)": {},
    }
    judged, after_hh, after_uf, likelihoods = found.values()
    if not flags.runs and not flags.hh_runs:
        raise InputError("wanted --runs or --hh-runs")
    for texts, overlap in ((flags.runs, after_uf), (flags.hh_runs, after_hh)):
        for text in texts:
            name, directory = named(text)
            name = name or str(directory)
            if not directory.is_dir() or name in overlap:
                raise InputError(
                    f"{text}: {'a second' if name in overlap else 'no'} directory of that name; wanted "
                    "NAME=DIR, with what the other commands wrote"
                )
            overlap[name] = dict.fromkeys(OVERLAP, "-") | cells_of(
                directory / "score.json", "bleu4_lf", name
            )
            if overlap is after_uf:  # what the paper had judged
                paths = sorted(
                    [*directory.glob("arena_hard*.json"), *directory.glob("mt_bench*.json")]
                )
                paths = [
                    path for path in paths if not path.name.endswith(".jsonl.json")
                ]  # how answers were made
                judged[name] = {
                    head: score
                    for path in paths
                    for head, score in cells_of(path, "models", name).items()
                }
            if likely := cells_of(directory / "likelihood.json", "measures", name):
                likelihoods[name + " (HH-RLHF)" * (overlap is after_hh)] = likely
    for title, models in found.items():
        if models:
            columns = list(dict.fromkeys(column for cells in models.values() for column in cells))
            columns = columns or ["Arena-Hard", "MT-Bench"]
            rows = [
                [name, *(cells.get(column, "-") for column in columns)]
                for name, cells in models.items()
            ]
            print(f"{title}\n\n{table(['model', *columns], rows)}\n")


def cells_of(path: Path, kind: str, name: str) -> dict[str, str]:
    """Column -> what a table shows of a file that `likelihood` ("measures"), `report` ("models"; its first score) or
    `score` ("bleu4_lf") wrote; none where it is not there."""
    if not path.is_file():
        return {}
    of = read_json(path, "what eval.py wrote with --json")
    try:
        if kind == "measures":
            return {
                key: "{value:.4f} [{low:.4f}, {high:.4f}]".format(**value)
                for key, value in of[kind].items()
            }
        if kind == "models":
            models = of[kind]
            model = (
                models[name] if name in models or len(models) > 1 else next(iter(models.values()))
            )
            return {
                f"{of['benchmark']}, {of['judge'] or 'battles'}": cell(
                    next(iter(model["scores"].values()))
                )
            }
        return {kind: f"{of[kind]:.2f}"} | {key: f"{of[key]:.2f}" for key in OVERLAP if key in of}
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        wrote = {
            "measures": "likelihood",
            "bleu4_lf": "score",
            "models": f"report (of one model, or {name} among several)",
        }
        raise InputError(f"{path}: wanted what {wrote[kind]} wrote") from None


# ----------------------------------------------------------------------------------------------- equations 15 to 18


def bt_surface(x1: Tensor, x2: Tensor, beta: float) -> Tensor:
    """L = -log(x1^b / (x1^b + x2^b)), nats (equation 15, exact): Bradley-Terry, the form of DPO's loss, at x1 = p_w and
    x2 = p_l, both in (0, 1)."""
    return -torch.log(x1**beta / (x1**beta + x2**beta))


def bt_gradient(x1: Tensor, x2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """dL/dx1 and dL/dx2 of `bt_surface` (equation 16, exact). Their sizes' ratio is |dL/dx2| / |dL/dx1| = x1/x2
    (equations 19 to 21)."""
    total = x1**beta + x2**beta
    return -beta * x2**beta / (x1 * total), beta * x2 ** (beta - 1) / total


def asft_surface(x1: Tensor, x2: Tensor) -> Tensor:
    """L = -log(x1) - log(1 - x2), nats (equation 17, exact): ASFT's align term at x1 = p_w and x2 = p_l."""
    return -torch.log(x1) - torch.log1p(-x2)


def asft_gradient(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx1 and dL/dx2 of `asft_surface` (equation 18, exact). Their sizes' ratio is |dL/dx1| / |dL/dx2| = (1-x2)/x1
    (equations 22 to 25)."""
    return -1 / x1, 1 / (1 - x2)


def log_gradient(x1: Tensor, x2: Tensor, gradient: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same gradient for the log-probabilities l_w = log x1 and l_l = log x2: dL/dlog(x) = x dL/dx. Not in the
    paper."""
    return x1 * gradient[0], x2 * gradient[1]


# --------------------------------------------------------------------------------------------------- runs of train.py

COLUMNS = ("step", "margin", "seconds", "peak_memory_gib")  # of metrics.jsonl, and of Run


class Run(NamedTuple):
    """What the figures need of a run: one number per step in each list."""

    label: str
    device: str
    step: list[float]
    margin: list[float]  # mean of l_w - l_l over the step's pairs, nats per token
    seconds: list[float]
    peak_memory_gib: list[float]  # the GPU's, or on a CPU the process's resident memory; so far


def read_run(text: str) -> Run:
    """DIR, labelled by its loss, or NAME=DIR. Raises InputError, naming file and line."""
    name, path = named(text)
    if not (path / "config.json").is_file():
        raise InputError(
            f"--runs {text}: {path} has no config.json; wanted a directory that train.py wrote"
        )
    facts = read_json(path / "config.json")
    try:
        loss, reference, device = (
            facts["flags"]["loss"],
            facts["flags"]["reference"],
            facts["device"],
        )
        label = f"{loss}, {reference}" if asft.LOSSES[loss].reference else loss
    except (KeyError, TypeError):
        raise InputError(
            f"{path / 'config.json'}: no flags of train.py; wanted its config.json"
        ) from None
    rows = json_rows(path / "metrics.jsonl", *COLUMNS)
    for place, row in rows:
        if not all(
            type(row[name]) in (int, float) and math.isfinite(row[name]) for name in COLUMNS
        ):
            raise InputError(
                f"{place}: wanted an object with the numbers {', '.join(COLUMNS)}; found {shown(row)}"
            )
    if not rows:
        raise InputError(f"{path / 'metrics.jsonl'}: no step in it")
    return Run(
        name or label, str(device), *([float(row[name]) for _, row in rows] for name in COLUMNS)
    )


# ------------------------------------------------------------------------------------------------------------ figures

# Okabe and Ito's colours, told apart by the colour-blind; a line's dashes tell it apart as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


def draw_surfaces(figure, beta: float) -> str:
    """Figure 1: one row per loss; probabilities on the left, log-probabilities on the right."""
    figure.set_size_inches(11, 10.4)
    figure.suptitle(
        "Figure 1. Loss of one pair (colour) and where it pushes the two answers (arrows)"
    )
    losses = (
        (
            f"Bradley-Terry (DPO), eq. 15, beta = {beta:g}",
            lambda *x: bt_surface(*x, beta),
            lambda *x: bt_gradient(*x, beta),
        ),
        ("ASFT's align term, eq. 17", asft_surface, asft_gradient),
    )
    for row, (name, surface, gradient) in zip(figure.subplots(2, 2), losses, strict=True):
        for logs, ax in enumerate(row):
            low, high, unit = (
                (-4.0, -0.05, "nats per token") if logs else (0.02, 0.98, "probability per token")
            )
            at_2, at_1 = torch.meshgrid(
                *[torch.linspace(low, high, 200, dtype=torch.float64)] * 2, indexing="ij"
            )
            x1, x2 = (at_1.exp(), at_2.exp()) if logs else (at_1, at_2)
            colour = ax.contourf(at_1, at_2, surface(x1, x2), levels=24, cmap="cividis")
            figure.colorbar(colour, ax=ax, label="loss (nats)", shrink=0.85)

            few = slice(7, None, 15)  # points with an arrow
            d1, d2 = log_gradient(x1, x2, gradient(x1, x2)) if logs else gradient(x1, x2)
            d1, d2, at_1, at_2 = d1[few, few], d2[few, few], at_1[few, few], at_2[few, few]
            size = torch.hypot(d1, d2)
            length = 0.07 * (high - low) * (size.log1p() / size.log1p().max()).clamp(min=0.4) / size
            ax.quiver(
                at_1,
                at_2,
                -d1 * length,
                -d2 * length,
                angles="xy",
                scale_units="xy",
                scale=1,
                pivot="mid",
                color="white",
                edgecolor="black",
                linewidth=0.4,
                width=0.007,
            )

            equal = "both pushed equally: everywhere"
            if surface is asft_surface or not logs:
                equal = "both pushed equally: dashed line"
                bt = surface is not asft_surface
                ends = [math.log(0.5)] * 2 if logs else [low, high] if bt else [1 - low, 1 - high]
                ax.plot([low, high], ends, "--", color="#E69F00", linewidth=2.5)
            ax.set(
                aspect="equal",
                xlim=(low, high),
                ylim=(low, high),
                title=f"{name}\n{equal}",
                xlabel=f"{'log ' * logs}p_w of the chosen answer ({unit})",
                ylabel=f"{'log ' * logs}p_l of the rejected answer ({unit})",
            )
    return (
        "The loss of one pair (colour) over x1 = p_w and x2 = p_l, geometric means over an answer's tokens, and the "
        "direction in which it falls fastest (arrows, longer where the gradient is larger, each panel to its own "
        f"scale). Top: Bradley-Terry as in DPO, equations 15 and 16, at beta = {beta:g}; the paper does not say at "
        "which it draws. Bottom: ASFT's align term, equations 17 and 18. Left, in probabilities, as in the paper: "
        "Bradley-Terry pushes the rejected answer x1/x2 times as hard as the chosen one (equation 21), so harder "
        "wherever the chosen one is likelier; ASFT pushes the chosen one (1-x2)/x1 times as hard as the rejected one "
        "(equation 25). Right, the same losses in log-probabilities: the asymmetry that the paper describes "
        "disappears, since Bradley-Terry pushes both answers equally hard everywhere; it belongs to the coordinates. "
        "ASFT pushes the chosen answer with weight 1 and the rejected one with its odds, x2/(1-x2), so less than the "
        "chosen one wherever x2 is below 1/2."
    )


def draw_margins(figure, runs: list[Run]) -> str:
    """Figure 2(a): thin, each step's margin; thick, its mean over the last steps, as many for every run."""
    window = max(1, max(len(run.step) for run in runs) // 10)
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, run in enumerate(runs):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        smooth = [
            statistics.fmean(run.margin[max(0, j + 1 - window) : j + 1])
            for j in range(len(run.margin))
        ]
        ax.plot(run.step, run.margin, color=colour, alpha=0.3, linewidth=0.8)
        width = 3.5 - 2 * (
            i % 2
        )  # a line that another covers, as DPO's two references do, shows on both sides of it
        ax.plot(
            run.step,
            smooth,
            dashes,
            color=colour,
            linewidth=width,
            label=run.label,
            marker="o" * (len(smooth) == 1),
        )
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        title="Figure 2(a). Likelihood margin over training",
        xlabel="step (updates)",
        ylabel="margin, log p_w - log p_l (nats per token)",
    )
    figure.legend(loc="outside right upper")
    return (
        "The margin, the mean over a step's pairs of log p_w - log p_l (mean token log-probabilities, whatever the "
        f"loss takes), of: {'; '.join(run.label for run in runs)}. Thin: each step's own pairs. Thick: the mean of "
        f"{'that step' if window == 1 else f'the last {window} steps'}. The pairs are those being trained on."
    )


def draw_costs(figure, runs: list[Run]) -> str:
    """Figure 2(b): bars, with their numbers."""
    seconds = [statistics.median(run.seconds) for run in runs]
    memory = [max(run.peak_memory_gib) for run in runs]
    figure.set_size_inches(9, 1.6 + 0.45 * len(runs))
    figure.suptitle("Figure 2(b). Time and peak memory")
    labels = ("time per step (s, median)", "peak memory (GiB)")
    for ax, values, label in zip(
        figure.subplots(1, 2, sharey=True), (seconds, memory), labels, strict=True
    ):
        bars = ax.barh(
            range(len(runs)), values, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))]
        )
        ax.bar_label(bars, [f"{value:#.3g}" for value in values], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.15 * max(values) or 1))
        ax.set_yticks(range(len(runs)), [run.label for run in runs])
    ax.invert_yaxis()  # shared: the first run on top
    numbers = [
        f"{run.label} {s:#.3g} s, {m:#.3g} GiB"
        for run, s, m in zip(runs, seconds, memory, strict=True)
    ]
    against = [
        f"{run.label} takes {s / seconds[0] - 1:+.1%} time, {m / memory[0] - 1:+.1%} memory"
        for run, s, m in list(zip(runs, seconds, memory, strict=True))[1:]
        if seconds[0] and memory[0]
    ]
    return (
        f"Median time of a step and highest memory of the run: {'; '.join(numbers)}. "
        + (f"Against {runs[0].label}: {'; '.join(against)}. " if against else "")
        + f"Measured on: {'; '.join(sorted({run.device for run in runs}))}. On a CPU memory is the process's "
        "resident memory, libraries included. Time leaves out what happens before the first step, so the one pass "
        "that precomputes reference log-probabilities is not in it. The paper reports 13% less time and 16.7% "
        "lower peak memory for ASFT than for training with a reference model."
    )


def figures(flags: argparse.Namespace) -> None:
    """Draws what can be drawn; replaces pictures of an earlier call."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError(
            f"figures are drawn by matplotlib: pip install matplotlib ({error})"
        ) from None
    runs = [read_run(text) for text in flags.runs]
    if twice := [label for label, count in Counter(run.label for run in runs).items() if count > 1]:
        raise InputError(f"--runs: two are labelled {twice[0]!r}; name them as NAME=DIR")
    drawn = {"figure1": (draw_surfaces, flags.beta)}
    if runs:
        drawn |= {"figure2a": (draw_margins, runs), "figure2b": (draw_costs, runs)}
    captions, out = [], Path(flags.out)
    with naming(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for name, (draw, of) in drawn.items():
            figure = matplotlib.figure.Figure(layout="constrained")
            caption = f"**{name.replace('figure', 'Figure ')}.** {draw(figure, of)}"
            figure.savefig(out / f"{name}.png", dpi=150)
            captions.append(f"![{name}]({name}.png)\n\n{caption}\n")
        (out / "captions.md").write_text("\n".join(captions))
    print("\n".join(captions))
    print(
        f"captions in {out / 'captions.md'}"
        + ("" if runs else "; Figure 2 wants --runs, so only Figure 1 is drawn")
    )


# -------------------------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} ({self.prog} --help)")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """What reads a flag's number: finite, from low to high."""

    def read(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= high and value < math.inf:
                return value
        except ValueError:
            pass
        most = f" and at most {high:g}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(
            f"found {text}, wanted {kind.__name__}, {low:g} or more{most}"
        )

    return read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's flags, and the command itself as `command`."""
    parser = _Parser(
        prog="python eval.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands, file = (
        parser.add_subparsers(required=True, metavar="COMMAND"),
        {"required": True, "metavar": "FILE"},
    )

    def new(
        name: str, run: Callable, text: str, steps=commands, **defaults
    ) -> argparse.ArgumentParser:
        command = steps.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(command=run, **defaults)
        return command

    def add_model(add: Callable, answers: bool) -> None:
        add("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
        add(
            "--device",
            default="auto",
            choices=("auto", "cpu", "cuda"),
            help="cuda where each process has one",
        )
        add(
            "--precision",
            default="auto",
            choices=("auto", "fp32", "bf16"),
            help="of all weights: bf16 on CUDA, fp32 on a CPU",
        )
        add(
            "--seed",
            type=number(int, 0),
            default=0,
            help=f"of {'what is drawn' if answers else 'the bootstrap'} [0]",
        )
        if answers:
            add(
                "--cache-tokens",
                type=number(int, 1),
                default=CACHE_TOKENS,
                help="tokens of all rows of a batch "
                "together: bounds memory, the answers stay the same [%(default)s]",
            )

    add = new("generate", answer_prompts, "a model's answers to prompts").add_argument
    add_model(add, answers=True)
    add("--prompts", **file, help="JSONL of prompts (formats: README)")
    add(
        "--out",
        **file,
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
        type=number(float, 0),
        default=0.0,
        help="0: the likeliest token, always [0]",
    )
    add(
        "--top-p",
        type=number(float, 1e-9, 1),
        default=1.0,
        help="draw from the fewest likeliest tokens that together have this probability [1: all]",
    )
    add(
        "--top-k",
        type=number(int, 0),
        default=0,
        help="draw from so many likeliest tokens [0: all]",
    )
    add("--max-new-tokens", type=number(int, 1), default=512, help="of an answer [512]")

    add = new("likelihood", likelihood, "log-probs of preference pairs").add_argument
    add_model(add, answers=False)
    add("--compare", metavar="DIR", help="a second model, on the same pairs")
    add("--data", **file, help="preference pairs (formats: README)")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="a directory, for pairs.jsonl and summary.json, or NAME.jsonl, "
        "with NAME.json beside it",
    )
    add(
        "--max-tokens",
        type=number(int, 2),
        help="as in train.py [2048, or what the model takes if less]",
    )
    add("--overlong", default="truncate", choices=("truncate", "drop"), help="as in train.py")
    add("--skip-bad-lines", action="store_true", help="as in train.py")
    add("--max-tokens-per-gpu", type=number(int, 1), default=8192, help="as in train.py [8192]")

    add = new("score", score, "BLEU-4 and ROUGE of predictions against references").add_argument
    add(
        "--predictions",
        **file,
        help="JSONL rows with the strings prediction and reference; other keys are ignored",
    )
    add(
        "--json",
        metavar="OUT",
        help="file of the scores, as JSON; without it they are only printed",
    )

    for bench, name, judge, report in (
        (MT_BENCH, "mt-bench", judge_mt_bench, report_mt_bench),
        (ARENA_HARD, "arena-hard", judge_arena_hard, report_arena_hard),
    ):
        steps = new(name, None, f"{bench.name}: answer, judge, report").add_subparsers(
            required=True, metavar="STEP"
        )

        add = new("answer", answer, "answers of a model", steps, bench=bench).add_argument
        add_model(add, answers=True)
        add("--questions", **file, help="the benchmark's question.jsonl")
        add(
            "--out",
            **file,
            help="answers; those it has already are left. FILE.json beside it says how they were made",
        )
        add(
            "--model-id",
            metavar="NAME",
            help="whom the rows stand for [the directory's name; of OUT/model, OUT's]",
        )

        add = new("judge", judge, "judgments of answers, by an endpoint", steps).add_argument
        add("--questions", **file, help="the benchmark's question.jsonl")
        add("--answers", **file, help="one model's answers")
        if bench is MT_BENCH:
            add("--references", **file, help="reference_answer/gpt-4.jsonl")
            add("--prompts", **file, help="judge_prompts.jsonl")
        else:
            add("--baseline", **file, help="model_answer/gpt-4-0314.jsonl")
            add("--config", **file, help="judge_config.yaml")
        add(
            "--out",
            **file,
            help="judgments; those it has already are left. The replies as they came go to FILE.raw",
        )
        add(
            "--endpoint",
            default="",
            metavar="URL",
            help="of an OpenAI-compatible chat service, such as "
            "https://api.openai.com/v1; not needed where all is judged",
        )
        add(
            "--judge-model",
            required=True,
            metavar="NAME",
            help="the judge, as the endpoint calls it",
        )
        add(
            "--key-variable",
            default="OPENAI_API_KEY",
            metavar="NAME",
            help="environment variable that holds the endpoint's key [OPENAI_API_KEY]",
        )
        add("--concurrency", type=number(int, 1), default=8, help="requests under way at once [8]")
        add(
            "--timeout",
            type=number(float, 1e-3, 1e6),
            default=300.0,
            help="seconds without a byte of the reply [300]",
        )
        add(
            "--tries",
            type=number(int, 1),
            default=8,
            help="of a request, before it counts as failed [8]",
        )
        add(
            "--wait",
            type=number(float, 0, 1e6),
            default=1.0,
            help="seconds before the second try, doubled before "
            "each further one up to 60, times 0.5 to 1.5 by chance; Retry-After is heeded [1]",
        )

        command = new("report", report, "scores of judgments, with intervals", steps)
        given = command.add_mutually_exclusive_group(required=True)
        given.add_argument(
            "--judgments", nargs="+", default=[], metavar="FILE", help="of one judge, any models"
        )
        if bench is ARENA_HARD:
            given.add_argument(
                "--battles",
                metavar="FILE",
                help="instead: weighted battles, as Arena-Hard counts them",
            )
            command.add_argument(
                "--baseline-model", default="gpt-4-0314", metavar="NAME", help="[gpt-4-0314]"
            )
        command.add_argument(
            "--questions", metavar="FILE", help="question.jsonl [the published ones]"
        )
        command.add_argument("--json", metavar="OUT", help="file of the report, as JSON")

    add = new("tables", tables, "the paper's tables, models side by side").add_argument
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="models trained on UltraFeedback: directories with "
        "arena_hard*.json, mt_bench*.json, score.json, likelihood.json",
    )
    add("--hh-runs", nargs="+", default=[], metavar="NAME=DIR", help="models trained on HH-RLHF")

    add = new("figures", figures, "the paper's figures, as PNG").add_argument
    add("--out", required=True, metavar="DIR", help="directory of the pictures and captions.md")
    add(
        "--beta",
        type=number(float, 1e-9),
        default=0.1,
        help="of Figure 1's Bradley-Terry surface, equation 15. OPEN: "
        "the paper does not say; 0.1 is DPO's usual one [0.1]",
    )
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="for Figure 2: directories that train.py wrote, each as DIR or NAME=DIR",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a user's mistake and for memory that is not there, with one clear line, or 130 when
    interrupted."""
    flags = argparse.Namespace()
    try:
        flags = parse(arguments)
        flags.command(flags)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename or 'standard output'}: {error.strerror}"
    except (RuntimeError, MemoryError) as error:
        lower = next(
            (name for name in ("cache_tokens", "max_tokens_per_gpu") if name in flags), None
        )
        if lower is None or not out_of_memory(error):
            raise
        said = (
            f"out of memory; lower --{lower.replace('_', '-')} from {getattr(flags, lower)} to "
            f"{getattr(flags, lower) // 2}, unless the model alone is too large"
        )
    complain("eval.py", said)
    return 2


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # as in train.py: sys.exit lets gloo's threads race the interpreter's end
