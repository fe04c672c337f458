"""`eval.py likelihood`: log-probs of both responses of preference pairs, under one model or two.
Rows with one answer count in the means of that answer only.

In reading order
    pair_logps, pair_rows     one row per pair
    MEASURES, summarise       their means, with 95% intervals; of two models, the differences too
    same_pairs                refuses two models whose tokenizers differ
    run, add_flags            the command
"""

import argparse
import itertools
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import (
    ChatFormat,
    Pair,
    check_longest,
    encode_preferences,
    pack,
    read_preferences,
    split_pairs,
)
from evaluation.answers import model_checksum
from evaluation.intervals import RESAMPLES, bootstrap
from evaluation.rows import add_model_flags, between, share, torchrun_group
from model import Llama, LlamaConfig, load_model
from support.files import InputError, naming, write_json, write_whole
from support.flags import resolve_max_tokens
from support.processes import StoppedError, agree, choose_device, every_two_seconds, is_first
from support.reading import describe
from support.run_directory import fingerprint

# Each line of the table, in the order of the rows' columns.
MEASURES = {
    "logp_w": "mean token log-prob of the chosen response, nats; mean over pairs",
    "logp_l": "of the rejected one",
    "sum_logp_w": "summed log-prob of the chosen response, nats; mean over pairs",
    "sum_logp_l": "of the rejected one",
    "margin": "logp_w - logp_l, mean over pairs",
    "accuracy": "share of pairs with a margin above 0",
    "perplexity_w": "exp(-nats of all chosen responses / their tokens): weighs tokens alike",
}
COLUMNS = [*list(MEASURES)[:-1], "tokens_w"]  # of a row; C in shapes


def encode_pairs(flags, directory: str, max_tokens: int) -> tuple[list[Pair], Counter]:
    """The pairs of --data under a model's tokenizer, as train.py reads them, and counts of what was
    read and dropped."""
    counts = Counter()
    progress = every_two_seconds()
    preferences = read_preferences(flags.data, counts, flags.skip_bad_lines, progress)
    chat = ChatFormat(directory) if any(p.is_text for p in preferences) else None
    vocab_size = LlamaConfig.load(directory).vocab_size
    pairs = encode_preferences(
        preferences, chat, max_tokens, flags.overlong, counts, vocab_size, progress
    )
    if not pairs:
        raise InputError(f"{flags.data}: no pair left to use ({describe(counts)})")
    return pairs, counts


@torch.no_grad()
def pair_logps(
    model: Llama, pairs: list[Pair], max_tokens_per_gpu: int, device: torch.device
) -> np.ndarray:
    """Log-probs (pairs, 2, 2) in nats, float64: [pair, chosen or rejected, mean or sum]. Every
    process returns all of them.

    Micro-batches are made as for one process and then shared out, so the numbers do not depend on
    the number of processes. Raises InputError if one pair exceeds max_tokens_per_gpu.
    """
    sizes = np.array([pair.packed_tokens() for pair in pairs])
    check_longest(sizes, max_tokens_per_gpu, pairs)
    logps = torch.zeros(len(pairs), 2, 2, dtype=torch.float64)
    for indexes in share(split_pairs(np.arange(len(pairs)), sizes, 1, max_tokens_per_gpu)[0]):
        mean_R, sum_R = model(pack([pairs[i] for i in indexes]).to(device))
        logps[indexes] = torch.stack([mean_R, sum_R], -1).unflatten(0, (-1, 2)).double().cpu()
    if dist.is_initialized():
        dist.all_reduce(logps)
    return logps.numpy()


def pair_rows(pairs: list[Pair], logps: np.ndarray) -> list[dict]:
    """The rows of pairs.jsonl. margin is logp_w - logp_l, in nats per token; accuracy is 1 if the
    margin is above 0, otherwise 0. A row lacks the keys of an answer that its pair lacks."""
    rows = []
    for pair, ((mean_w, sum_w), (mean_l, sum_l)) in zip(pairs, logps.tolist(), strict=True):
        row = {"place": pair.place, "tokens_w": len(pair.chosen), "tokens_l": len(pair.rejected)}
        row |= {"logp_w": mean_w, "logp_l": mean_l, "sum_logp_w": sum_w, "sum_logp_l": sum_l}
        row |= {"margin": mean_w - mean_l, "accuracy": float(mean_w > mean_l)}
        missing = {side for side in "wl" if not row[f"tokens_{side}"]}
        compares = ("margin", "accuracy") if missing else ()
        rows.append({k: v for k, v in row.items() if k[-1] not in missing and k not in compares})
    return rows


def measures(columns_MPC: np.ndarray, weight_P: np.ndarray) -> np.ndarray:
    """MEASURES of each of M models over P pairs, pair p counted weight_P[p] times; then those of
    the first model less those of the second, if there are two. A NaN in a column is not there: each
    mean is over the pairs that have the number, and NaN if none does."""
    there_MPC = ~np.isnan(columns_MPC)
    with np.errstate(invalid="ignore"):
        mean_MC = weight_P @ np.where(there_MPC, columns_MPC, 0) / (weight_P @ there_MPC)
    nats_M, tokens_M = mean_MC[:, COLUMNS.index("sum_logp_w")], mean_MC[:, -1]
    found = np.column_stack([mean_MC[:, :-1], np.exp(-nats_M / tokens_M)])
    return np.vstack([found, found[:1] - found[1:]])


def summarise(rows: list[dict], other: list[dict] | None = None, seed: int = 0) -> list[dict]:
    """The measures of one model, or of two on the same pairs and their differences (the first's
    less the other's), each {"value", "low", "high"}. A measure that no row has is left out.

    Both models get the same resamples, so the interval of a difference is that of paired data.
    """
    models = [rows] if other is None else [rows, other]
    columns_MPC = np.array([[[row.get(c, math.nan) for c in COLUMNS] for row in m] for m in models])
    shown_F = ~np.isnan(measures(columns_MPC, np.ones(len(rows)))[0])  # of all MEASURES
    names = [name for name, shown in zip(MEASURES, shown_F, strict=True) if shown]
    found = bootstrap(lambda weight_P: measures(columns_MPC, weight_P)[:, shown_F], len(rows), seed)
    summaries = []
    for of_model in np.stack(found, -1).tolist():
        values = [{"value": value, "low": low, "high": high} for value, low, high in of_model]
        summaries.append(dict(zip(names, values, strict=True)))
    return summaries


def same_pairs(flags: argparse.Namespace, pairs: list[Pair], others: list[Pair]) -> None:
    """Raises InputError, naming the first pair, if --compare's tokenizer gives other ids."""
    # The lengths differ if one tokenizer makes an answer empty, or two equal: that pair is dropped.
    for pair, other in itertools.zip_longest(pairs, others):
        if not pair or not other or ids_of(pair) != ids_of(other):
            raise InputError(
                f"--compare {flags.compare}: its tokenizer gives other ids than {flags.model}'s, "
                f"first for {(pair or other).place}; log-probs of other tokens do not compare"
            )


def ids_of(pair: Pair) -> list[bytes]:
    """The token ids of the prompt and both responses, as something that compares."""
    return [ids.tobytes() for ids in (pair.prompt, pair.chosen, pair.rejected)]


def claim_out(flags: argparse.Namespace) -> list[Path]:
    """The file of the summary, and one of rows for each model. Raises InputError if one exists or
    cannot be written, before the work."""
    out = Path(flags.out)
    paths = [out / "summary.json", out / "pairs.jsonl"]
    if out.suffix == ".jsonl":
        paths = [out.with_suffix(".json"), out]
    if flags.compare is not None:
        paths.append(paths[1].with_name(f"{paths[1].stem}-compare.jsonl"))
    if is_first():
        if there := [path for path in paths if path.exists()]:
            raise InputError(f"--out: {there[0]} exists; name another")
        home = next(home for home in paths[0].absolute().parents if home.exists())
        with naming(f"--out {out}"):
            tempfile.TemporaryFile(dir=home).close()
    return paths


def run(flags: argparse.Namespace) -> None:
    """Writes OUT/pairs.jsonl (and pairs-compare.jsonl) and OUT/summary.json; prints the summary."""
    summary_path, *row_paths = claim_out(flags)
    models = [flags.model] if flags.compare is None else [flags.model, flags.compare]
    limits = [LlamaConfig.load(name).max_position_embeddings for name in models]
    max_tokens = min(resolve_max_tokens(flags.max_tokens, limit) for limit in limits)
    (pairs, counts), *others = [encode_pairs(flags, name, max_tokens) for name in models]
    for compared, _ in others:
        same_pairs(flags, pairs, compared)

    with torchrun_group():
        device, dtype = choose_device(flags.device, flags.precision)
        rows = []
        for directory in models:  # one after the other: two may not fit into memory
            model = load_model(directory, dtype, device).requires_grad_(False)
            if dist.is_initialized():
                weights = model_checksum(Path(directory))
                agree(lambda found=weights: fingerprint(found, [pairs], dtype))
            logps = pair_logps(model, pairs, flags.max_tokens_per_gpu, device)
            if bad := np.flatnonzero(~np.isfinite(logps).all((1, 2))).tolist():
                raise StoppedError(
                    f"{directory}: the log-probs of {len(bad):,} of {len(pairs):,} pairs are not "
                    f"finite, first {pairs[bad[0]].place}"
                )
            rows.append(pair_rows(pairs, logps))
            del model
    if not is_first():
        return
    summaries = summarise(*rows, seed=flags.seed)
    tokens_w, tokens_l = (sum(row.get(f"tokens_{side}", 0) for row in rows[0]) for side in "wl")
    facts = {"model": flags.model, "compare": flags.compare, "data": flags.data}
    facts |= {"counts": counts, "pairs": len(pairs), "tokens_w": tokens_w, "tokens_l": tokens_l}
    facts |= {"max_tokens": max_tokens, "dtype": str(dtype)}
    facts |= {"seed": flags.seed, "resamples": RESAMPLES}
    facts |= dict(zip(("measures", "compare_measures", "difference"), summaries, strict=False))
    with naming(f"--out {flags.out}"):
        summary_path.parent.mkdir(parents=True, exist_ok=True)
        for path, of_model in zip(row_paths, rows, strict=True):
            write_whole(path, "".join(json.dumps(row) + "\n" for row in of_model))
        write_json(summary_path, facts)
    good, bad = counts["good answers"], counts["bad answers"]
    kept = f"{len(pairs) - good - bad:,} pairs"
    if good or bad:
        kept += f", {good:,} good and {bad:,} bad answers"
    read = f"{kept} of {counts['read']:,} read"
    print(f"{flags.data}: {read}; {tokens_w:,} chosen and {tokens_l:,} rejected tokens\n")
    print(table(models, summaries))


def table(models: list[str], summaries: list[dict]) -> str:
    """The measures as text: a line each, a column per model and one of their differences."""
    heads = [*models, "difference"][: len(summaries)]
    rows = [("", heads, "[95% of resampled pairs]")]
    for name, text in MEASURES.items():
        if name not in summaries[0]:
            continue
        form = "{value:+.4f} [{low:+.4f}, {high:+.4f}]"
        rows.append((name, [form.format(**summary[name]) for summary in summaries], text))
    width = 2 + max(len(cell) for _, cells, _ in rows for cell in cells)
    lines = []
    for name, cells, text in rows:
        lines.append(f"{name:14}{''.join(cell.ljust(width) for cell in cells)}{text}")
    return "\n".join(lines)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_model_flags(command, "the bootstrap")
    kinds, out = ("truncate", "drop"), "a directory, or NAME.jsonl, with NAME.json beside it"
    add("--compare", metavar="DIR", help="a second model, on the same pairs")
    add("--data", required=True, metavar="FILE", help="preference pairs (docs/data-formats.md)")
    add("--out", required=True, metavar="OUT", help=out)
    add("--max-tokens", type=between(int, 2), help="of a pair [2048, or the model's limit if less]")
    add("--overlong", default="truncate", choices=kinds, help="as in train.py")
    add("--skip-bad-lines", action="store_true", help="as in train.py")
    add("--max-tokens-per-gpu", type=between(int, 1), default=8192, help="as in train.py [8192]")
