"""Evaluates: answers, likelihoods, the paper's figures.

    python eval.py generate --model DIR --prompts FILE --out FILE        a model's answers; started again, it goes on
    python eval.py likelihood --model DIR --data FILE --out DIR          how likely a model finds both sides of pairs
    python eval.py figures --out DIR                             Figure 1, which wants no run
    python eval.py figures --out DIR --runs RUN NAME=RUN ...     Figure 2 as well; each RUN is an --out of train.py
    python eval.py figures --help                                its flags; `python eval.py --help` lists the commands

In reading order
    place, share, append_row        one process and many: torchrun starts them, a locked file joins what they write
    Request, generate               continuations of token ids, in ragged batches over a cache of keys and values
    load_generator, answer_prompts  the command: prompts -> answers, a row each
    pair_logps, pair_rows           log-probs of both sides of preference pairs
    summarise, likelihood           the command: means with intervals, of one model or of two on the same pairs
    bt_surface ... log_gradient     equations 15 to 18 as pure functions
    Run, read_run                   what train.py left in a directory, checked
    draw_surfaces ... draw_costs    one picture each, and its caption
    figures                         the command: DIR/figure*.png and DIR/captions.md
    parse, main                     flags, and the exit code

Under torchrun each process holds the whole model and takes its share of the rows.

matplotlib draws, and is not needed for anything else: it is imported where it is used.

Differs from the paper: Figure 1 shows surfaces from above, as colour, with the descent directions in the same panels,
and has two panels more, in log-probabilities.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
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
from data import (ChatFormat, Pair, Prompt, encode_preferences, pack, read_preferences, read_prompts,
                  resolve_max_tokens, split_pairs)
from model import Cache, InputError, Llama, LlamaConfig, check_weights, load_model, read_json

# ---------------------------------------------------------------------------------------------- one process and many


def place(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Where this process computes and in which dtype: --device auto is this process's GPU where each process of this
    machine has one, --precision auto is bf16 there and fp32 on a CPU. Raises InputError where there is no such GPU."""
    devices, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = devices >= wanted if device == "auto" else device == "cuda"
    if cuda and devices < wanted:
        raise InputError(f"--device cuda for {wanted} processes, but torch finds {devices} CUDA devices")
    half = cuda if precision == "auto" else precision == "bf16"
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(here)
    return here, torch.bfloat16 if half else torch.float32


def share(items: list) -> list:
    """The items of this process: every n-th under torchrun with n processes, all of them without."""
    return items[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[IO[bytes]]:
    """A file of JSON lines, made if it is not there, that no other process holds meanwhile. What is written goes to its
    end. A last line without its end is cut off: whoever wrote it was killed."""
    try:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0)
            yield file
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def append_row(path: str | Path, row: dict) -> None:
    """Adds a row to a file of JSON lines, whole and at once, whatever other processes add to it."""
    with locked(path) as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


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
def generate(model: Llama, requests: list[Request], stop_ids: frozenset[int], *, top_p: float = 1.0, top_k: int = 0,
             seed: int = 0, cache_tokens: int = CACHE_TOKENS) -> Iterator[tuple[int, list[int], str]]:
    """Continues each request until it draws one of stop_ids or has max_new_tokens or as many as the model's context
    takes. Yields (index into requests, new token ids without the stop token, "stop" or "length") as they finish.

    A batch is as many rows as fit in a cache of cache_tokens tokens when each may grow to its full length (one at
    least): longest first, so that rows of a batch are alike, and those that wait always fit in the place of one that
    finished. A row's numbers depend on its neighbours by nothing but the rounding of matrix products, whose order of
    summation differs with the number of rows.

    top_p and top_k (0: off) as in `probabilities`. Two requests of equal number draw with the same random numbers.
    """
    context = model.config.max_position_embeddings

    def full_length(i: int) -> int:
        return min(len(requests[i].prompt) + requests[i].max_new_tokens, context)

    roomy = [i for i in range(len(requests)) if full_length(i) > len(requests[i].prompt)]
    for i in set(range(len(requests))) - set(roomy):
        yield i, [], "length"
    waiting = sorted(roomy, key=full_length)  # taken from the end
    rows: list[_Row] = []  # row b of the cache is rows[b]'s
    while waiting or rows:
        if not rows:
            cache, width = None, full_length(waiting[-1])  # the old one is freed before there is a new one
            slots = max(1, min(len(waiting), cache_tokens // width, MAX_ROWS))
            cache, filling = Cache(model, slots, width), True
            least = 0 if slots == len(waiting) else width / 2
        # Refilled some rows at a time, since each time is a pass over the weights; and, unless there is room for all,
        # not with rows much shorter than the cache is wide, which wait for a narrower one with more rows.
        filling, fresh = filling or 8 * len(rows) <= 7 * slots, []
        while (filling and waiting and len(rows) + len(fresh) < slots and full_length(waiting[-1]) >= least
               and sum(len(row.request.prompt) for row in fresh) < PREFILL_TOKENS):
            index = waiting.pop()
            rng = np.random.default_rng([seed, requests[index].number])
            fresh.append(_Row(index, requests[index], [], rng.random(requests[index].max_new_tokens)))
        filling = bool(fresh)

        if fresh:
            logits_BV = model.prefill([row.request.prompt for row in fresh], cache, len(rows))
            rows += fresh
        else:
            lengths = [len(row.request.prompt) + len(row.new) - 1 for row in rows]
            logits_BV = model.step([row.new[-1] for row in rows], lengths, cache)
        first = len(rows) - len(logits_BV)  # the rows that were computed: the last ones
        tokens = choose(logits_BV, [row.request.temperature for row in rows[first:]],
                        [row.uniforms[len(row.new)] for row in rows[first:]], top_p, top_k)
        for b in reversed(range(first, len(rows))):  # from the end: the last row takes the place of a finished one
            row, stop = rows[b], tokens[b - first] in stop_ids
            if not stop:
                row.new.append(tokens[b - first])
            if stop or len(row.request.prompt) + len(row.new) == full_length(row.index):
                last = rows.pop()
                if b < len(rows):
                    rows[b] = last
                    cache.move(len(rows), b)
                yield row.index, row.new, "stop" if stop else "length"


def choose(logits_BV: Tensor, temperatures: list[float], uniforms: list[float], top_p: float, top_k: int) -> list[int]:
    """A token id for each row: the likeliest where its temperature is 0, else the one at the row's uniform number in
    [0, 1) of the cumulated `probabilities`, which are summed in the vocabulary's order: a sum in order of probability
    would jump where rounding swaps two tokens."""
    best_B = logits_BV.argmax(-1)
    if not any(temperatures):
        return best_B.tolist()
    temperature_B = torch.tensor(temperatures, device=best_B.device)
    greedy_B = temperature_B == 0
    total_BV = probabilities(logits_BV, temperature_B + greedy_B, top_p, top_k).double().cumsum(-1)
    at_B1 = torch.tensor(uniforms, dtype=torch.float64, device=best_B.device)[:, None] * total_BV[:, -1:]
    drawn_B = torch.searchsorted(total_BV, at_B1, right=True)[:, 0].clamp(max=total_BV.shape[-1] - 1)
    return torch.where(greedy_B, best_B, drawn_B).tolist()


def probabilities(logits_BV: Tensor, temperature_B: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """What sampling draws from, at least fp32: the softmax at a temperature above 0, then its top_k likeliest tokens
    (ties with the last one too; 0: all), then of these the fewest likeliest ones that together have top_p, each time
    made to sum to 1 again. The order and the meaning are transformers' (TemperatureLogitsWarper, TopKLogitsWarper,
    TopPLogitsWarper)."""
    logits_BV = asft.at_least_fp32(logits_BV) / temperature_B[:, None]
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        sorted_BV = sorted_BV.softmax(-1)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # those before a token have top_p already
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -math.inf)
    return logits_BV.softmax(-1)


def load_generator(directory: str | Path, device: str = "auto",
                   precision: str = "auto") -> tuple[Llama, ChatFormat, frozenset[int]]:
    """A whole model on this process's device (see `place`), its chat format, and the ids at which an answer ends:
    <|end_of_text|>, <|eot_id|>, <|eom_id|> where it exists, and what generation_config.json names. Raises InputError
    for a directory that is no Hugging Face model with its tokenizer."""
    here, dtype = place(device, precision)
    chat = ChatFormat(directory)
    path, more = Path(directory) / "generation_config.json", None
    if path.exists():
        config = read_json(path)
        more = config.get("eos_token_id") if isinstance(config, dict) else config
    more = [] if more is None else more if isinstance(more, list) else [more]
    if not all(type(i) is int and i >= 0 for i in more):  # type(), since JSON's true is an int to isinstance
        raise InputError(f"{path}: eos_token_id is {more!r}, wanted a token id or a list of them")
    model = load_model(directory, dtype, here).requires_grad_(False)
    model.pack_linears()
    return model, chat, chat.stop_ids | set(more)


def fingerprint(*paths: str | Path) -> str:
    """A hash of what files hold, or of their absence, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        digest.update((path.stat().st_size if path.exists() else -1).to_bytes(8, "little", signed=True))
        if path.exists():
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def read_rows(path: Path, file: IO[bytes]) -> list[dict]:
    """The answers in a file that `locked` opened. Raises InputError, naming the line, for anything else."""
    rows = []
    for number, line in enumerate(file.read().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["index"] + 0
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: not an answer of this command: {line[:60]!r}") from None
    return rows


def claim_rows(out: Path, settings: dict) -> set[int]:
    """The indexes of the answers in `out`, made under the same settings: OUT.json beside it holds them. Raises
    InputError for answers made otherwise, naming the first setting that differs, and for a file of another origin."""
    beside = Path(f"{out}.json")
    with locked(out) as file:
        rows = read_rows(out, file)
        if not rows:
            beside.write_text(json.dumps(settings, indent=2) + "\n")
        elif not beside.exists():
            raise InputError(f"--out {out}: {beside} is missing, which says how its rows were made; name another file")
        found = read_json(beside)
        found = found if isinstance(found, dict) else {}
        for key, value in settings.items():
            if found.get(key) != value:
                raise InputError(f"--out {out} was made with {key} {found.get(key)}, not {value}; name another file")
    return {row["index"] for row in rows}


def order_rows(out: Path, count: int) -> list[dict] | None:
    """Puts the answers in the order of their prompts, once all are there: for the process that wrote the last one."""
    with locked(out) as file:
        rows = read_rows(out, file)
        if len(rows) < count:
            return None
        rows.sort(key=lambda row: row["index"])
        aside = out.with_name(f".{out.name}.partial")
        aside.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        aside.rename(out)
    return rows


def encode_prompts(prompts: list[Prompt], chat: ChatFormat, vocab_size: int) -> list[list[int]]:
    """Token ids: of turns in the chat format, up to the header of the assistant's; of a plain text after BOS. Raises
    InputError for ids that are not below vocab_size."""
    texts = dict.fromkeys(text for p in prompts
                          for text in ([p.prompt] if isinstance(p.prompt, str) else
                                       [turn[1] for turn in p.prompt if isinstance(turn, tuple)]))
    contents = dict(zip(texts, chat.encode(list(texts)), strict=True))
    encoded = []
    for p in prompts:
        if isinstance(p.prompt, str):
            ids = [chat.begin, *contents[p.prompt]]
        else:
            ids = chat.prompt(p.prompt, contents) if isinstance(p.prompt[0], tuple) else p.prompt
        if max(ids) >= vocab_size:
            raise InputError(f"{p.place}: token id {max(ids)} is not below the model's vocab_size {vocab_size}")
        encoded.append(ids)
    return encoded


def answer_prompts(flags: argparse.Namespace) -> None:
    """Writes the answers to --prompts as they come, and in the end in order; goes on where the same call stopped."""
    for name, low, high in (("temperature", 0, math.inf), ("top_p", 1e-9, 1), ("top_k", 0, math.inf),
                            ("seed", 0, math.inf), ("max_new_tokens", 1, math.inf), ("cache_tokens", 1, math.inf)):
        if not low <= getattr(flags, name) <= high or getattr(flags, name) == math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, wanted {low} or more"
                             + f" and at most {high}" * (high < math.inf))
    prompts, config, out = read_prompts(flags.prompts, flags.raw), LlamaConfig.load(flags.model), Path(flags.out)
    files = [Path(flags.model) / name for name in ("config.json", "generation_config.json", "tokenizer.json")]
    files += sorted(set(check_weights(flags.model, config).values()))
    same = ("raw", "temperature", "top_p", "top_k", "seed", "max_new_tokens")
    settings = {"model": fingerprint(*files), "prompts": fingerprint(flags.prompts),
                "dtype": str(place(flags.device, flags.precision)[1]), **{name: getattr(flags, name) for name in same}}
    done = claim_rows(out, settings)
    model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
    encoded = encode_prompts(prompts, chat, config.vocab_size)

    def write(i: int, new: list[int], finish: str) -> None:
        turns, reference = prompts[i].prompt, prompts[i].reference
        if isinstance(turns[0], tuple):  # as it was asked, where that is one question
            turns = turns[0][1] if len(turns) == 1 else [{"role": role, "content": text} for role, text in turns]
        append_row(out, {"index": i, "prompt": turns, "prediction": chat.decode(new), "tokens": len(new),
                         "finish": finish} | ({} if reference is None else {"reference": reference}))

    mine, talks = [i for i in share(range(len(prompts))) if i not in done], os.environ.get("RANK", "0") == "0"
    overlong = [i for i in mine if len(encoded[i]) >= config.max_position_embeddings]
    for i in overlong:
        write(i, [], "overlong")
    mine = sorted(set(mine) - set(overlong))
    if talks:
        print(f"{flags.model}: {len(prompts):,} prompts, {len(done):,} of them answered before", flush=True)
    requests = [Request(i, encoded[i], flags.temperature, flags.max_new_tokens) for i in mine]
    started = said = time.monotonic()
    tokens = 0
    answers = generate(model, requests, stop_ids, top_p=flags.top_p, top_k=flags.top_k, seed=flags.seed,
                       cache_tokens=flags.cache_tokens)
    for count, (k, new, finish) in enumerate(answers, 1):
        write(mine[k], new, finish)
        tokens += len(new) + (finish == "stop")
        now = time.monotonic()
        if talks and (count == len(mine) or now - said > 5):
            said = now
            print(f"{count:,} of this process's {len(mine):,} answers, {tokens:,} tokens, "
                  f"{tokens / (now - started):,.0f} tokens/s", flush=True)
    if rows := order_rows(out, len(prompts)):
        count = Counter(row["finish"] for row in rows)
        mean = sum(row["tokens"] for row in rows) / len(rows)
        print(f"{out}: {len(rows):,} rows, {mean:,.1f} tokens on average; {count['stop']:,} ended by a stop token, "
              f"{count['length']:,} by --max-new-tokens or the context; {count['overlong']:,} left unanswered, whose "
              f"prompt takes all {config.max_position_embeddings:,} tokens of the context", flush=True)


# --------------------------------------------------------------------------------------------------------- likelihood

RESAMPLES = 1000  # of the bootstrap: its 95% limits are then good to about a tenth of their distance


def encode_pairs(flags: argparse.Namespace, directory: str, max_tokens: int) -> tuple[list[Pair], Counter]:
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
def pair_logps(model: Llama, pairs: list[Pair], max_tokens_per_gpu: int, device: torch.device) -> np.ndarray:
    """Log-probs of shape (pairs, 2, 2), float64, in nats: [pair, chosen or rejected, mean or sum]; all of them in
    every process. Pairs are put into micro-batches as if there were one process, and these are shared, so that the
    numbers do not depend on how many there are. Raises InputError where a pair alone is over max_tokens_per_gpu."""
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
        rows.append({"place": pair.place, "tokens_w": len(pair.chosen), "tokens_l": len(pair.rejected),
                     "logp_w": mean_w, "logp_l": mean_l, "sum_logp_w": sum_w, "sum_logp_l": sum_l,
                     "margin": mean_w - mean_l, "accuracy": float(mean_w > mean_l)})
    return rows


# What each line of the table is, in the order of the rows' columns.
MEASURES = {
    "logp_w": "mean token log-prob of the chosen response, nats; mean over pairs",
    "logp_l": "of the rejected one",
    "sum_logp_w": "summed log-prob of the chosen response, nats; mean over pairs",
    "sum_logp_l": "of the rejected one",
    "margin": "logp_w - logp_l, mean over pairs",
    "accuracy": "share of pairs with a margin above 0",
    "perplexity_w": "exp(-nats of all chosen responses / their tokens): a long response weighs more"}


def measures(columns_PC: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """MEASURES over pairs that count weight_P times each. Columns: MEASURES without its last, tokens_w."""
    mean_C = weight_P @ columns_PC / weight_P.sum()
    return np.append(mean_C[:-1], np.exp(-mean_C[2] / mean_C[-1]))


def summarise(rows: list[dict], other: list[dict] | None = None, seed: int = 0) -> list[dict]:
    """The measures of one model; of two on the same pairs, both and the differences (the first's less the other's).

    Each measure is {"value", "low", "high"}: the limits are the 2.5% and 97.5% quantiles over RESAMPLES resamples of
    the pairs, drawn with replacement, the same for both models, so that a difference's interval is that of paired data.
    """
    names = [*list(MEASURES)[:-1], "tokens_w"]
    of_models = [np.array([[row[name] for name in names] for row in part]) for part in (rows, other) if part]
    rng, n, found = np.random.Generator(np.random.PCG64(seed)), len(rows), []
    for i in range(RESAMPLES + 1):
        weight_P = np.bincount(rng.integers(n, size=n), minlength=n) if i else np.ones(n)
        of_each = [measures(columns_PC, weight_P) for columns_PC in of_models]
        found.append(of_each + [of_each[0] - of_each[-1]] * (len(of_each) - 1))
    value, resampled = np.array(found[0]), np.array(found[1:])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return [{name: {"value": value[k, j], "low": low[k, j], "high": high[k, j]} for j, name in enumerate(MEASURES)}
            for k in range(len(value))]


def likelihood(flags: argparse.Namespace) -> None:
    """Writes OUT/pairs.jsonl (and pairs-compare.jsonl) and OUT/summary.json, and prints the summary."""
    if flags.max_tokens_per_gpu < 1 or flags.seed < 0 or (flags.max_tokens is not None and flags.max_tokens < 2):
        raise InputError("wanted --max-tokens-per-gpu of at least 1, --max-tokens of at least 2, --seed of at least 0; "
                         f"found {flags.max_tokens_per_gpu}, {flags.max_tokens} and {flags.seed}")
    directories = [flags.model] + [flags.compare] * (flags.compare is not None)
    out, single = Path(flags.out), flags.out.endswith(".jsonl")
    first = out if single else out / "pairs.jsonl"
    paths = [first, first.with_name(f"{first.stem}-compare.jsonl")]
    summary_path = out.with_suffix(".json") if single else out / "summary.json"
    talks = os.environ.get("RANK", "0") == "0"
    for path in [*paths, summary_path]:
        if talks and path.exists():
            raise InputError(f"--out: {path} exists; name another")
    configs = [LlamaConfig.load(directory) for directory in directories]
    max_tokens = min(resolve_max_tokens(flags.max_tokens, config) for config in configs)
    (pairs, counts), *others = [encode_pairs(flags, directory, max_tokens) for directory in directories]
    for directory, (of_other, _) in zip(directories[1:], others, strict=True):
        for pair, same in zip(pairs, of_other, strict=False):
            sides = ((pair.prompt, same.prompt), (pair.chosen, same.chosen), (pair.rejected, same.rejected))
            if not all(np.array_equal(*side) for side in sides):
                raise InputError(f"--compare {directory}: its tokenizer gives other ids than {flags.model}'s, first "
                                 f"for {pair.place}; log-probs of other tokens do not compare")

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    device, dtype = place(flags.device, flags.precision)
    of_models = []
    for directory in directories:  # one after the other, each freed before the next
        model = load_model(directory, dtype, device).requires_grad_(False)
        of_models.append(pair_rows(pairs, pair_logps(model, pairs, flags.max_tokens_per_gpu, device)))
        del model
    if dist.is_initialized():
        dist.destroy_process_group()
    if not talks:
        return
    found = summarise(*of_models, seed=flags.seed)
    facts = {"model": flags.model, "compare": flags.compare, "data": flags.data, "counts": counts, "pairs": len(pairs),
             "tokens_w": sum(len(pair.chosen) for pair in pairs), "tokens_l": sum(len(pair.rejected) for pair in pairs),
             "max_tokens": max_tokens, "dtype": str(dtype), "seed": flags.seed, "resamples": RESAMPLES,
             **dict(zip(("measures", "compare_measures", "difference"), found, strict=False))}
    try:
        summary_path.parent.mkdir(parents=True, exist_ok=True)
        for path, rows in zip(paths, of_models, strict=False):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary_path.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    print(f"{flags.data}: {len(pairs):,} pairs of {counts['read']:,} read; {facts['tokens_w']:,} chosen and "
          f"{facts['tokens_l']:,} rejected tokens\n")
    heads = [flags.model, flags.compare, "difference"][:len(found)]
    width = max(30, *map(len, heads))
    print(" " * 14 + "".join(f"{head:<{width + 2}}" for head in heads) + "[95% of resampled pairs]")
    for name, text in MEASURES.items():
        cells = ("{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**of[name]) for of in found)
        print(f"{name:<14}" + "".join(f"{cell:<{width + 2}}" for cell in cells) + text)


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

COLUMNS = ("step", "margin", "seconds", "peak_memory_gib")  # of metrics.jsonl


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
    name, _, rest = text.partition("=")
    named = bool(rest) and not Path(text).is_dir()
    path = Path(rest if named else text)
    if not (path / "config.json").is_file():
        raise InputError(f"--runs {text}: {path} has no config.json; wanted a directory that train.py wrote")
    facts = read_json(path / "config.json")
    try:
        loss, reference, device = facts["flags"]["loss"], facts["flags"]["reference"], facts["device"]
        label = f"{loss}, {reference}" if asft.LOSSES[loss].reference else loss
    except (KeyError, TypeError):
        raise InputError(f"{path / 'config.json'}: no flags of train.py; wanted its config.json") from None
    return Run(name if named else label, str(device), **read_metrics(path / "metrics.jsonl"))


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.jsonl."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}; wanted train.py's") from None
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            values = [float(row[name]) for name in COLUMNS]
        except (ValueError, KeyError, TypeError, RecursionError):
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise InputError(f"{path}:{number}: wanted an object with the numbers {', '.join(COLUMNS)}; found "
                             f"{line[:60]!r}")
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
    if not lines:
        raise InputError(f"{path}: no step in it")
    return columns


# ------------------------------------------------------------------------------------------------------------ figures

# Okabe and Ito's colours, told apart by the colour-blind; a line's dashes tell it apart as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
DPI = 150


def draw_surfaces(figure, beta: float) -> str:
    """Figure 1: one row per loss; probabilities on the left, log-probabilities on the right."""
    figure.set_size_inches(11, 10.4)
    figure.suptitle("Figure 1. Loss of one pair (colour) and where it pushes the two answers (arrows)")
    losses = ((f"Bradley-Terry (DPO), eq. 15, beta = {beta:g}", lambda *x: bt_surface(*x, beta),
               lambda *x: bt_gradient(*x, beta)), ("ASFT's align term, eq. 17", asft_surface, asft_gradient))
    for row, (name, surface, gradient) in zip(figure.subplots(2, 2), losses, strict=True):
        for logs, ax in enumerate(row):
            low, high, unit = (-4.0, -0.05, "nats per token") if logs else (0.02, 0.98, "probability per token")
            at_2, at_1 = torch.meshgrid(*[torch.linspace(low, high, 200, dtype=torch.float64)] * 2, indexing="ij")
            x1, x2 = (at_1.exp(), at_2.exp()) if logs else (at_1, at_2)
            colour = ax.contourf(at_1, at_2, surface(x1, x2), levels=24, cmap="cividis")
            figure.colorbar(colour, ax=ax, label="loss (nats)", shrink=0.85)

            few = slice(7, None, 15)  # points with an arrow
            d1, d2 = (log_gradient(x1, x2, gradient(x1, x2)) if logs else gradient(x1, x2))
            d1, d2, at_1, at_2 = d1[few, few], d2[few, few], at_1[few, few], at_2[few, few]
            size = torch.hypot(d1, d2)
            length = 0.07 * (high - low) * (size.log1p() / size.log1p().max()).clamp(min=0.4) / size
            ax.quiver(at_1, at_2, -d1 * length, -d2 * length, angles="xy", scale_units="xy", scale=1, pivot="mid",
                      color="white", edgecolor="black", linewidth=0.4, width=0.007)

            equal = "both pushed equally: everywhere"
            if surface is asft_surface or not logs:
                equal = "both pushed equally: dashed line"
                bt = surface is not asft_surface
                ends = [math.log(0.5)] * 2 if logs else [low, high] if bt else [1 - low, 1 - high]
                ax.plot([low, high], ends, "--", color="#E69F00", linewidth=2.5)
            ax.set(aspect="equal", xlim=(low, high), ylim=(low, high), title=f"{name}\n{equal}",
                   xlabel=f"{'log ' * logs}p_w of the chosen answer ({unit})",
                   ylabel=f"{'log ' * logs}p_l of the rejected answer ({unit})")
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
        "chosen one wherever x2 is below 1/2.")


def draw_margins(figure, runs: list[Run]) -> str:
    """Figure 2(a): thin, each step's margin; thick, its mean over the last steps, as many for every run."""
    window = max(1, max(len(run.step) for run in runs) // 10)
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, run in enumerate(runs):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        smooth = [statistics.fmean(run.margin[max(0, j + 1 - window):j + 1]) for j in range(len(run.margin))]
        ax.plot(run.step, run.margin, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(run.step, smooth, dashes, color=colour, linewidth=2, label=run.label, marker="o" * (len(smooth) == 1))
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(title="Figure 2(a). Likelihood margin over training", xlabel="step (updates)",
           ylabel="margin, log p_w - log p_l (nats per token)")
    figure.legend(loc="outside right upper")
    return ("The margin, the mean over a step's pairs of log p_w - log p_l (mean token log-probabilities, whatever the "
            f"loss takes), of: {'; '.join(run.label for run in runs)}. Thin: each step's own pairs. Thick: the mean of "
            f"{'that step' if window == 1 else f'the last {window} steps'}. The pairs are those being trained on.")


def draw_costs(figure, runs: list[Run]) -> str:
    """Figure 2(b): bars, with their numbers."""
    seconds = [statistics.median(run.seconds) for run in runs]
    memory = [max(run.peak_memory_gib) for run in runs]
    figure.set_size_inches(9, 1.6 + 0.45 * len(runs))
    figure.suptitle("Figure 2(b). Time and peak memory")
    labels = ("time per step (s, median)", "peak memory (GiB)")
    for ax, values, label in zip(figure.subplots(1, 2, sharey=True), (seconds, memory), labels, strict=True):
        bars = ax.barh(range(len(runs)), values, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))])
        ax.bar_label(bars, [f"{value:#.3g}" for value in values], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.15 * max(values) or 1))
        ax.set_yticks(range(len(runs)), [run.label for run in runs])
    ax.invert_yaxis()  # shared: the first run on top
    numbers = [f"{run.label} {s:#.3g} s, {m:#.3g} GiB" for run, s, m in zip(runs, seconds, memory, strict=True)]
    against = [f"{run.label} takes {s / seconds[0] - 1:+.1%} time, {m / memory[0] - 1:+.1%} memory"
               for run, s, m in list(zip(runs, seconds, memory, strict=True))[1:] if seconds[0] and memory[0]]
    return (f"Median time of a step and highest memory of the run: {'; '.join(numbers)}. "
            + (f"Against {runs[0].label}: {'; '.join(against)}. " if against else "")
            + f"Measured on: {'; '.join(sorted({run.device for run in runs}))}. On a CPU memory is the process's "
            "resident memory, libraries included. Time leaves out what happens before the first step, so the one pass "
            "that precomputes reference log-probabilities is not in it. The paper reports 13% less time and 16.7% "
            "lower peak memory for ASFT than for training with a reference model.")


def figures(flags: argparse.Namespace) -> None:
    """Draws what can be drawn; replaces pictures of an earlier call."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError(f"figures are drawn by matplotlib: pip install matplotlib ({error})") from None
    if not 0 < flags.beta < math.inf:
        raise InputError(f"--beta is {flags.beta}, wanted a number above 0")
    runs = [read_run(text) for text in flags.runs]
    if twice := [run.label for i, run in enumerate(runs) if run.label in [other.label for other in runs[:i]]]:
        raise InputError(f"--runs: two are labelled {twice[0]!r}; name them as NAME=DIR")
    drawn = {"figure1": (draw_surfaces, flags.beta)}
    if runs:
        drawn |= {"figure2a": (draw_margins, runs), "figure2b": (draw_costs, runs)}
    captions, out = [], Path(flags.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (draw, of) in drawn.items():
            figure = matplotlib.figure.Figure(layout="constrained")
            caption = f"**{name.replace('figure', 'Figure ')}.** {draw(figure, of)}"
            figure.savefig(out / f"{name}.png", dpi=DPI)
            print(f"{out / f'{name}.png'}\n{caption}\n")
            captions.append(f"![{name}]({name}.png)\n\n{caption}\n")
        (out / "captions.md").write_text("\n".join(captions))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    print(f"captions in {out / 'captions.md'}" + ("" if runs else "; Figure 2 wants --runs, so only Figure 1 is drawn"))


# -------------------------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} ({self.prog} --help)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's flags, and the command itself as `command`."""
    parser = _Parser(prog="python eval.py", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="a model's answers to prompts", allow_abbrev=False)
    command.set_defaults(command=answer_prompts)
    command.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    command.add_argument("--prompts", required=True, metavar="FILE", help="JSONL of prompts (formats: README)")
    command.add_argument("--out", required=True, metavar="FILE", help="JSONL of answers; FILE.json beside it says how "
                         "they were made. The same call goes on where it was interrupted")
    command.add_argument("--raw", action="store_true", help="go on with each prompt as plain text, after BOS, without "
                         "the chat format")
    command.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token, always [0]")
    command.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest likeliest tokens that together "
                         "have this probability [1: all]")
    command.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens [0: all]")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn [0]")
    command.add_argument("--max-new-tokens", type=int, default=512, help="of an answer [512]")
    command.add_argument("--cache-tokens", type=int, default=CACHE_TOKENS, help="tokens of all rows of a batch "
                         f"together: bounds memory, the answers stay the same [{CACHE_TOKENS}]")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cuda where there is one "
                         "for each process")
    command.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of weights and cache: "
                         "bf16 on CUDA, fp32 on a CPU")

    command = commands.add_parser("likelihood", help="log-probs of preference pairs", allow_abbrev=False)
    command.set_defaults(command=likelihood)
    command.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    command.add_argument("--compare", metavar="DIR", help="a second model, on the same pairs")
    command.add_argument("--data", required=True, metavar="FILE", help="preference pairs (formats: README)")
    command.add_argument("--out", required=True, metavar="OUT", help="a directory, for pairs.jsonl and summary.json, "
                         "or NAME.jsonl, with NAME.json beside it")
    command.add_argument("--max-tokens", type=int, help="as in train.py [2048, or what the model takes if less]")
    command.add_argument("--overlong", default="truncate", choices=("truncate", "drop"), help="as in train.py")
    command.add_argument("--skip-bad-lines", action="store_true", help="as in train.py")
    command.add_argument("--max-tokens-per-gpu", type=int, default=8192, help="as in train.py [8192]")
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap [0]")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cuda where there is one "
                         "for each process")
    command.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of all weights: "
                         "bf16 on CUDA, fp32 on a CPU")

    command = commands.add_parser("figures", help="the paper's figures, as PNG", allow_abbrev=False)
    command.set_defaults(command=figures)
    command.add_argument("--out", required=True, metavar="DIR", help="directory of the pictures and captions.md")
    command.add_argument("--beta", type=float, default=0.1, help="of Figure 1's Bradley-Terry surface, equation 15. "
                         "OPEN: the paper does not say; 0.1 is DPO's usual one [0.1]")
    command.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="for Figure 2: directories that train.py "
                         "wrote, each as DIR or NAME=DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a user's mistake, with one clear line."""
    try:
        flags = parse(arguments)
        flags.command(flags)
        return 0
    except InputError as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(10)  # most mistakes are found by all: when process 0 has said so, torchrun ends the others
        print(f"eval.py: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
