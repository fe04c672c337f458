""" """

import argparse
import itertools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import (
    ChatFormat,
    Pair,
    encode_preferences,
    pack,
    read_preferences,
    resolve_max_tokens,
    split_pairs,
)
from evaluation.intervals import RESAMPLES, bootstrap
from evaluation.rows import add_model_flags, between, share
from model import Llama, LlamaConfig, load_model
from support.files import InputError, naming
from support.processes import choose_device


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


def run(flags: argparse.Namespace) -> None:
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


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_model_flags(command, "the bootstrap")
    add("--compare", metavar="DIR", help="a second model, on the same pairs")
    add("--data", required=True, metavar="FILE", help="preference pairs (formats: README)")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="a directory, for pairs.jsonl and summary.json, or NAME.jsonl, "
        "with NAME.json beside it",
    )
    add(
        "--max-tokens",
        type=between(int, 2),
        help="as in train.py [2048, or what the model takes if less]",
    )
    add("--overlong", default="truncate", choices=("truncate", "drop"), help="as in train.py")
    add("--skip-bad-lines", action="store_true", help="as in train.py")
    add("--max-tokens-per-gpu", type=between(int, 1), default=8192, help="as in train.py [8192]")
