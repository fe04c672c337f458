"""A study: the losses side by side, and which of the paper's claims hold at this scale.

    python bench/study.py run --work DIR        trains and measures; continues if interrupted
    python bench/study.py table --work DIR      the tables and claims, of what has been run so far
    python bench/study.py answers --work DIR    answers of the language model, before and after, as
                                                text; and their scores as a picture, DIR/NAME.png

In reading order
    METHODS, DATASETS       what is compared: losses; starts, pairs and numbers of steps
    parts, random_start     the parts of a data set; a start with random weights
    train, likelihood       one training and one evaluation, by the commands that a user runs
    choose, rates           the learning rate of a method
    run, measure_all        the grid of rates with seed 0 on the validation part, then every seed
                            on the held-out part
    table, claims           Markdown; the paper's claims (a) to (d) and two more, each as a rule
    answers, draw           greedy answers, their scores, and some of them side by side

Every method has the same start, pairs, number of updates, schedule and grid of rates. Everything
else is train.py's default. asft-two-stage spends half of its updates on each stage, with one rate.
A seed is an order of the pairs, and for the untrained start also an initialization. Log-probs are
means over an answer's tokens in nats, for every loss. The margin is chosen minus rejected; accuracy
is the share of pairs with a margin above 0.

One criterion chooses the rate of all methods: accuracy on the validation part, and of equal ones
the larger margin. Accuracy is on one scale, and it is the goal of every method except SFT. Margin
first would always choose to push harder, and each loss's own value would choose by another
criterion for each. The choice is coarse with so few pairs. With --widen, a method whose best rate
lies at an edge of its grid gets the next rate beyond it. The tables name the methods that still
lie at an edge, and claim (c) is also shown at equal rates. Temperatures are methods of their own:
which one is best is read from their rows, of the validation part.

A claim holds if its rule is true for every seed. ± is the standard deviation over seeds. The
held-out pairs are the same for all seeds, so it says nothing about other pairs. Intervals in
brackets do: 95% intervals from resampling the pairs, each with its mean over the seeds.

The data sets of real text run if their files are beside the checkout, those of the language model
with --smollm, the directory that bench/smollm.py makes. DIR/runs has config.json and metrics.jsonl
of each training, for `eval.py figures`, and the weights of each method's chosen rate with seed 0;
DIR/likelihood the figures of each pair, which the tables need too.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from common import ROOT, append_row, at_least, read_rows, train_command

sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from tokenizers import Tokenizer

from evaluation.intervals import bootstrap
from model import Llama, LlamaConfig
from support.export import save_model

ALIGN = "--loss asft --sft-weight 0"
METHODS = {  # name -> the flags of its stages
    "sft": ["--loss sft"],
    "dpo": ["--loss dpo"],
    "dpo-norm": ["--loss dpo-norm"],
    "ipo": ["--loss ipo"],
    "orpo": ["--loss orpo"],
    "simpo": ["--loss simpo"],
    "asft": ["--loss asft"],
    "asft-beta-0.5": ["--loss asft --beta 0.5"],
    "asft-beta-1": ["--loss asft --beta 1"],
    "asft-align-only": [ALIGN],
    "asft-tempered": [ALIGN + " --temperature 0.5"],
    "asft-tempered-0.25": [ALIGN + " --temperature 0.25"],
    "asft-tempered-0.1": [ALIGN + " --temperature 0.1"],
    "asft-tempered-0.05": [ALIGN + " --temperature 0.05"],
    "asft-two-stage": ["--loss sft", ALIGN],
    "asft-two-stage-tempered": ["--loss sft", ALIGN + " --temperature 0.5"],
    "asft-unpaired": ["--loss asft"],  # these two on the part "unpaired"
    "asft-unpaired-beta-1": ["--loss asft --beta 1"],
}
REFERENCE = ("dpo", "dpo-norm", "ipo")  # these need a reference's log-probs, computed once


class Dataset(NamedTuple):
    model: Path
    data: Path
    held_out: Path | None  # None: a part of the data
    steps: int
    pairs_per_step: int
    flags: str  # of train.py and of eval.py likelihood
    methods: tuple[str, ...]
    untrained: bool = False  # the start is random_start of the model


MODEL = ROOT / "examples/model"
EXAMPLE = (ROOT / "examples/train.jsonl", ROOT / "examples/heldout.jsonl")
REAL = ROOT.parent / "shared/real"  # if the checkout has it beside it
STORIES, PAIRS = REAL / "stories260K", REAL / "preferences"
# Relative paths are in --smollm.
SMOLLM, SHORT, LONG = Path("model"), Path("instructions_short.jsonl"), Path("ultrafeedback.jsonl")
FOUR = ("dpo", "ipo", "orpo", "asft")
NINE = ("sft", "dpo", "ipo", "orpo", "simpo", "asft")
NINE += ("asft-align-only", "asft-tempered", "asft-two-stage")
DATASETS = {
    "example": Dataset(MODEL, *EXAMPLE, 40, 32, "", NINE),
    "untrained": Dataset(MODEL, *EXAMPLE, 40, 32, "", FOUR, True),
    "instructions": Dataset(STORIES, PAIRS / SHORT, None, 50, 16, "", NINE),
    "ultrafeedback": Dataset(STORIES, PAIRS / LONG, None, 24, 16, "--max-tokens 256", NINE),
    "smollm-instructions": Dataset(SMOLLM, SHORT, None, 20, 16, "--precision bf16", tuple(METHODS)),
    "smollm-untrained": Dataset(SMOLLM, SHORT, None, 20, 16, "--precision bf16", FOUR, True),
    # 8 pairs of at most 256 tokens: what two cores do in minutes.
    "smollm-ultrafeedback": Dataset(
        SMOLLM, LONG, None, 20, 8, "--precision bf16 --max-tokens 256", tuple(METHODS)
    ),
}
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # for --widen
KEY = ("dataset", "method", "rate", "seed", "part")  # what identifies a training
FIGURES = ("logp_w", "logp_l", "margin", "accuracy")
EVAL = [sys.executable, ROOT / "eval.py"]
NEAR = 0.02  # of claim (f)
WEIGHTS = "model/model.safetensors"  # in a run's directory


def parts(work: Path, name: str, smollm: Path) -> dict[str, Path]:
    """The files train, validation, held-out, and of token ids also unpaired. A line's hash modulo
    10 decides: 0 and 1 are validation, 2 and 3 held-out (unless the data set has its own file for
    that), else train. unpaired has one answer of each pair of train, the good or the bad one as
    the next digit of the hash is even or odd."""
    dataset = DATASETS[name]
    lines: dict[str, list[bytes]] = {"train": [], "validation": [], "held-out": []}
    one_answer = []
    for line in (smollm / dataset.data).read_bytes().splitlines():
        number = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
        if number % 10 < 2:
            lines["validation"].append(line)
        elif number % 10 < 4 and not dataset.held_out:
            lines["held-out"].append(line)
        else:
            lines["train"].append(line)
            one_answer.append(half(line, good=number // 10 % 2 == 0))
    if dataset.held_out:
        lines["held-out"] = dataset.held_out.read_bytes().splitlines()
    if all(one_answer):
        lines["unpaired"] = one_answer
    files = {part: work / "data" / name / f"{part}.jsonl" for part in lines}
    for part, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(lines[part]) + b"\n")
    return files


def half(line: bytes, good: bool) -> bytes | None:
    """One answer of a pair as a row with a label; None if the pair is not token ids."""
    row = json.loads(line)
    if "prompt_ids" not in row:
        return None
    answer = row["chosen_ids" if good else "rejected_ids"]
    one = {"prompt_ids": row["prompt_ids"], "response_ids": answer, "label": good}
    return json.dumps(one).encode()


def random_start(directory: Path, source: Path, seed: int) -> None:
    """Writes a model like `source` with random weights: as the example's is before examples/make.py
    trains it, but with this seed."""
    if not directory.exists():
        torch.manual_seed(seed)
        model = Llama(LlamaConfig.load(source))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        save_model(model, directory, dtype=torch.float32, source=source)


def directories(work: Path, key: tuple) -> list[Path]:
    """The run's directory for each stage of a training, in order. key: its fields are KEY."""
    name, method, rate, seed, _ = key
    home = work / "runs" / f"{name}-{method}-{rate:g}-{seed}"
    stages = range(len(METHODS[method]))
    return [home / str(i) for i in stages] if len(stages) > 1 else [home]


def label_before(name: str, part: str, seed: int) -> str:
    """Names the figures of a start."""
    return f"before-{name}-{part}" + (f"-{seed}" if DATASETS[name].untrained else "")


def label_after(key: tuple) -> str:
    """Names the figures of a training."""
    name, method, rate, seed, part = key
    return f"{name}-{method}-{rate:g}-{seed}-{part}"


def start_of(work: Path, name: str, seed: int, smollm: Path) -> Path:
    """The model that a training begins with."""
    dataset = DATASETS[name]
    return work / "starts" / name / str(seed) if dataset.untrained else smollm / dataset.model


def call(words: list, settings: argparse.Namespace) -> subprocess.CompletedProcess:
    threads = max(1, (os.cpu_count() or 1) // settings.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)


def train(work: Path, key: tuple, data: Path, settings: argparse.Namespace) -> str | None:
    """Trains the stages of `key` that an earlier call has not. Returns what train.py says if the
    loss is not finite, else None."""
    name, method, rate, seed, _ = key
    dataset, stages = DATASETS[name], METHODS[method]
    steps = settings.max_steps or dataset.steps
    share = [steps] if len(stages) == 1 else [steps - steps // 2, steps // 2]
    start = start_of(work, name, seed, settings.smollm)
    for i, out in enumerate(directories(work, key)):
        if not (out / WEIGHTS).exists():
            shutil.rmtree(out, ignore_errors=True)  # of a study that was stopped
            # The second stage has another seed: with the first one's it would draw the same pairs.
            flags = (
                f"{stages[i]} {dataset.flags} --lr {rate} "
                f"--pairs-per-step {dataset.pairs_per_step} --seed {seed + 1000 * i} "
                f"--epochs 1000 --max-steps {share[i]} --save-dtype fp32 --device cpu"
            ).split()
            if method in REFERENCE and not dataset.untrained:
                flags += ["--reference-cache", work / "references" / name]
                flags[-1].parent.mkdir(exist_ok=True)
            paths = ["--model", start, "--data", data, "--out", out]
            done = call(train_command(*paths, *flags), settings)
            if done.returncode == 1 and done.stderr.startswith("train.py: step"):
                return done.stderr.split(";")[0]
            if done.returncode:
                raise RuntimeError(f"{' '.join(done.args)}:\n{done.stderr}")
        start = out / "model"
    return None


def likelihood(
    work: Path, label: str, model: Path, data: Path, flags: str, settings: argparse.Namespace
) -> dict:
    """What `eval.py likelihood` says about a model, as its summary; kept under `label`."""
    out = work / "likelihood" / f"{label}.json"
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        part = out.with_suffix(".part.jsonl")
        words = [*EVAL, "likelihood", "--model", model, "--data", data, "--out", part]
        done = call([*words, "--device", "cpu", *flags.split()], settings)
        if done.returncode:
            raise RuntimeError(f"{' '.join(done.args)}:\n{done.stderr}")
        part.rename(out.with_suffix(".jsonl"))
        part.with_suffix(".json").rename(out)
    return json.loads(out.read_text())


def before(work: Path, key: tuple, files: dict[str, Path], settings: argparse.Namespace) -> dict:
    """The figures of a training's start on its part."""
    name, _, _, seed, part = key
    label, start = label_before(name, part, seed), start_of(work, name, seed, settings.smollm)
    return likelihood(work, label, start, files[part], DATASETS[name].flags, settings)


def measure(work: Path, key: tuple, files: dict[str, Path], settings: argparse.Namespace) -> dict:
    """Trains if it has to. Returns `key` with the part's figures before and after, and the seconds
    of the training's steps."""
    name, method, _, seed, part = key
    data = files["unpaired" if "unpaired" in method else "train"]
    record, outs = dict(zip(KEY, key, strict=True)), directories(work, key)
    failure = train(work, key, data, settings)
    rows = [row for out in outs for row in read_rows(out / "metrics.jsonl")]
    record["seconds"] = sum(row["seconds"] for row in rows)
    if failure:  # a result too
        return record | {"failed": failure}
    model, flags = outs[-1] / "model", DATASETS[name].flags
    after = likelihood(work, label_after(key), model, files[part], flags, settings)
    if seed != 0:
        drop_weights(work, key)
    at_start = before(work, key, files, settings)
    record |= {"steps": len(rows), "pairs": after["pairs"]}
    for when, summary in (("before", at_start), ("after", after)):
        record[when] = {figure: summary["measures"][figure]["value"] for figure in FIGURES}
    return record


def drop_weights(work: Path, key: tuple) -> None:
    for out in directories(work, key):
        (out / WEIGHTS).unlink(missing_ok=True)


def grid_of(records: list[dict], name: str, method: str) -> list[tuple[float, float, float]]:
    """(accuracy, margin, rate) on the validation part, of each rate whose run was finite."""
    runs = [r for r in records if (r["dataset"], r["method"]) == (name, method) and "after" in r]
    runs = [r for r in runs if r["part"] == "validation"]
    return [(r["after"]["accuracy"], r["after"]["margin"], r["rate"]) for r in runs]


def choose(records: list[dict], name: str, method: str) -> float | None:
    """The rate with the highest validation accuracy, and of these with the largest margin. None if
    no run was finite."""
    grid = grid_of(records, name, method)
    return max(grid)[-1] if grid else None


def at_edge(records: list[dict], name: str, method: str) -> bool:
    """True if the chosen rate is the lowest or the highest of those that were tried."""
    rates = [rate for _, _, rate in grid_of(records, name, method)]
    return choose(records, name, method) in (min(rates), max(rates))


def wider(records: list[dict], name: str, method: str) -> list[float]:
    """The next rate of LADDER beyond the chosen one, if that is at an edge."""
    best = choose(records, name, method)
    tried = [rate for _, _, rate in grid_of(records, name, method)]
    further = []
    if best is not None and best == max(tried):
        further += [rate for rate in LADDER if rate > 1.01 * best][:1]
    if best is not None and best == min(tried):
        further += [rate for rate in LADDER if rate < 0.99 * best][-1:]
    return further


def run(settings: argparse.Namespace) -> None:
    """Measures what DIR/results.jsonl lacks, `jobs` trainings at a time."""
    work = settings.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path, results = work / "settings.json", work / "results.jsonl"
    wanted = {name: getattr(settings, name) for name in ("rates", "max_steps")}
    if not path.exists():
        path.write_text(json.dumps(wanted))
    if (found := json.loads(path.read_text())) != wanted:
        sys.exit(f"study.py: {work} was begun with {found}, not {wanted}; name another --work")
    there = {name: (settings.smollm / DATASETS[name].data).exists() for name in settings.datasets}
    names = [name for name in there if there[name]]
    if missing := [name for name in there if not there[name]]:
        print(f"no data for {', '.join(missing)} (beside this checkout, or in --smollm)")
    for name in names:
        for seed in range(settings.seeds if DATASETS[name].untrained else 0):
            start = start_of(work, name, seed, settings.smollm)
            random_start(start, settings.smollm / DATASETS[name].model, seed)
    files = {name: parts(work, name, settings.smollm) for name in names}
    tasks = [(name, m) for name in names for m in DATASETS[name].methods if m in settings.methods]
    grid = [(*task, rate, 0, "validation") for task in tasks for rate in settings.rates]
    measure_all(work, grid, files, settings)
    for _ in range(settings.widen):
        records = read_rows(results)
        grid = [(*task, rate) for task in tasks for rate in wider(records, *task)]
        measure_all(work, [(*one, 0, "validation") for one in grid], files, settings)
    records = read_rows(results)
    chosen = [(*task, rate) for task in tasks if (rate := choose(records, *task))]
    for r in records:
        key = tuple(r[field] for field in KEY)
        if key[:2] in tasks and key[:3] not in chosen and not settings.keep_weights:
            drop_weights(work, key)
    seeds = [(*one, seed, "held-out") for one in chosen for seed in range(settings.seeds)]
    measure_all(work, seeds, files, settings)


def measure_all(work: Path, keys: list[tuple], files: dict, settings: argparse.Namespace) -> None:
    results = work / "results.jsonl"
    done = {tuple(r[field] for field in KEY) for r in read_rows(results)}
    keys = [key for key in keys if key not in done]
    for key in keys:  # one at a time: many trainings share a start
        before(work, key, files[key[0]], settings)
    pool = ThreadPoolExecutor(settings.jobs)
    try:
        futures = [pool.submit(measure, work, key, files[key[0]], settings) for key in keys]
        for i, future in enumerate(as_completed(futures), 1):
            record = future.result()
            append_row(results, record)
            after = record.get("after", {}).items()
            figures = "  ".join(f"{name} {value:.4f}" for name, value in after)
            print(
                f"{i}/{len(keys)}  {record['dataset']}  {record['method']}  "
                f"rate {record['rate']:g}  seed {record['seed']}  {record['part']}  "
                f"{figures or record['failed']}  ({record['seconds']:.0f} s)",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ tables

Seeds = dict[str, list[float]]  # name of a figure -> its value for each seed


def over_seeds(values: list[float], sign: str = "+") -> str:
    return f"{fmean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def right_per_pair(work: Path, labels: list[str]) -> list[float]:
    """For each pair, the share of these measurements in which its margin is above 0."""
    rows = [read_rows(work / "likelihood" / f"{label}.jsonl") for label in labels]
    return [fmean(row["accuracy"] for row in of_pair) for of_pair in zip(*rows, strict=True)]


def difference(new: list[float], old: list[float]) -> str:
    """The mean of new - old, two lists of right_per_pair, with its 95% interval, as text."""
    change_P = np.subtract(new, old)
    value, low, high = bootstrap(lambda times_P: times_P @ change_P / times_P.sum(), len(change_P))
    value, low, high = (round(float(x), 3) + 0.0 for x in (value, low, high))  # no -0.000
    return f"{value:+.3f} [{low:.3f}, {high:.3f}]"


def held_out(work: Path, records: list[dict], name: str, method: str, seeds: int) -> Seeds | None:
    """Held-out figures at the chosen rate; None if a seed has none. "right" and "right before" are
    those of right_per_pair."""
    rate, by_seed = choose(records, name, method), {}
    for r in records:
        same = (r["dataset"], r["method"], r["rate"], r["part"]) == (name, method, rate, "held-out")
        if same and "after" in r:
            by_seed[r["seed"]] = r
    if any(seed not in by_seed for seed in range(seeds)):
        return None
    found: Seeds = {}
    for figure in FIGURES:
        before = [by_seed[seed]["before"][figure] for seed in range(seeds)]
        after = [by_seed[seed]["after"][figure] for seed in range(seeds)]
        change = [new - old for new, old in zip(after, before, strict=True)]
        found |= {figure: after, f"{figure} before": before, f"{figure} change": change}
    keys = [(name, method, rate, seed, "held-out") for seed in range(seeds)]
    found["right"] = right_per_pair(work, [label_after(key) for key in keys])
    labels = [label_before(name, "held-out", seed) for seed in range(seeds)]
    return found | {"right before": right_per_pair(work, labels)}


def table(settings: argparse.Namespace) -> None:
    work, seeds = settings.work, settings.seeds
    records = read_rows(work / "results.jsonl")
    if not records:
        sys.exit(f"study.py: {work / 'results.jsonl'}: no training in it; wanted what run wrote")
    methods: dict[str, dict[str, Seeds]] = {}
    for name in settings.datasets:
        rows = {m: held_out(work, records, name, m, seeds) for m in DATASETS[name].methods}
        methods[name] = {m: row for m, row in rows.items() if row}
        if methods[name]:
            print_dataset(name, methods[name], records, seeds)
    print("\n| claim | data | verdict | numbers |\n|---|---|---|---|")
    for claim, name, true, numbers in claims(methods, records):
        verdict = "holds"
        if not all(true):
            verdict = f"**fails** (true for {sum(true)} of {len(true)} seeds)"
        print(f"| {claim} | {name} | {verdict} | {numbers} |")
    for r in records:
        if "failed" in r:
            place = f"{r['dataset']}, {r['method']}, rate {r['rate']:g}, seed {r['seed']}"
            print(f"\nNot finite: {place}, {r['part']}.")
    seconds = {tuple(r[field] for field in KEY[:-1]): r["seconds"] for r in records}
    minutes = sum(seconds.values()) / 60
    print(f"\n{len(seconds)} trainings, {minutes:.0f} minutes of training steps, added up.")


def print_dataset(name: str, found: dict[str, Seeds], records: list[dict], seeds: int) -> None:
    """A data set's table. found: the figures of each method."""
    dataset, first = DATASETS[name], next(iter(found.values()))
    chosen = {m: choose(records, name, m) for m in found}
    of_dataset = [r for r in records if r["dataset"] == name]
    one = next(r for r in of_dataset if r["part"] == "held-out" and "after" in r)
    flags = [f"--pairs-per-step {dataset.pairs_per_step}", *dataset.flags.split()]
    start = ", ".join(f"{figure} {fmean(first[figure + ' before']):.3f}" for figure in FIGURES)
    print(
        f"\n**{name}**: {one['steps']} steps, `{' '.join(flags)}`; {seeds} "
        f"seed{'s' * (seeds > 1)}; {one['pairs']} held-out pairs, before training: {start}\n\n"
        "| method | rate | chosen log-prob, change | rejected log-prob, change | margin | "
        "accuracy | accuracy over the start |\n|---|---|---|---|---|---|---|"
    )
    for m, row in found.items():
        figures = [over_seeds(row[f]) for f in ("logp_w change", "logp_l change", "margin")]
        figures += [over_seeds(row["accuracy"], ""), difference(row["right"], row["right before"])]
        print(f"| {m} | {chosen[m]:g} | {' | '.join(figures)} |")
    tried: dict[str, list[str]] = {}  # rates -> methods
    for m in found:
        rates = sorted(rate for _, _, rate in grid_of(records, name, m))
        tried.setdefault(", ".join(f"{rate:g}" for rate in rates), []).append(m)
    grids = [f"{rates} ({', '.join(methods)})" for rates, methods in tried.items()]
    rates = "; ".join(grids if len(grids) > 1 else tried)
    edge = [m for m in found if at_edge(records, name, m)]
    line = f"Rates tried: {rates}; chosen at an edge: {', '.join(edge) or 'none'}."
    print(f"\n{textwrap.fill(line, 105, break_on_hyphens=False)}")
    if missing := [m for m in dataset.methods if m not in found]:
        line = f"Without all seeds: {', '.join(missing)}."
        print(textwrap.fill(line, 105, break_on_hyphens=False))


def claims(
    methods: dict[str, dict[str, Seeds]], records: list[dict]
) -> list[tuple[str, str, list[bool], str]]:
    """(claim, data set, whether its rule is true for each seed, the numbers), for each claim whose
    methods have run."""
    a, b, c, d, e, f = [], [], [], [], [], []
    for name, found in methods.items():
        if "asft" in found:
            up, down = found["asft"]["logp_w change"], found["asft"]["logp_l change"]
            true = [w > 0 > low for w, low in zip(up, down, strict=True)]
            claim = "(a) ASFT raises the chosen log-prob and lowers the rejected one"
            a.append((claim, name, true, f"chosen {over_seeds(up)}, rejected {over_seeds(down)}"))
        if "dpo" in found:
            up, down = found["dpo"]["logp_w change"], found["dpo"]["logp_l change"]
            true = [-low > max(w, 0) for w, low in zip(up, down, strict=True)]
            claim = "(b) DPO lowers the rejected log-prob faster than it raises the chosen one"
            b.append((claim, name, true, f"chosen {over_seeds(up)}, rejected {over_seeds(down)}"))
        if "asft" in found and "orpo" in found:
            ours, theirs = found["asft"]["margin"], found["orpo"]["margin"]
            true = [x > y for x, y in zip(ours, theirs, strict=True)]
            numbers = f"ASFT {over_seeds(ours)}, ORPO {over_seeds(theirs)}; validation part: "
            numbers += "; ".join(margins_at_equal_rates(records, name))
            c.append(("(c) ASFT's margin exceeds ORPO's", name, true, numbers))
        if "asft" in found and "asft-beta-1" in found:
            one, tenth = found["asft-beta-1"]["accuracy"], found["asft"]["accuracy"]
            true = [x > y for x, y in zip(one, tenth, strict=True)]
            claim = "(e) ASFT is more accurate with beta 1 than with 0.1"
            numbers = f"beta 1 {over_seeds(one, '')}, 0.1 {over_seeds(tenth, '')}; difference "
            numbers += difference(found["asft-beta-1"]["right"], found["asft"]["right"])
            e.append((claim, name, true, numbers))
        for beta, suffix in (("0.1", ""), ("1", "-beta-1")):
            if f"asft{suffix}" in found and f"asft-unpaired{suffix}" in found:
                both, one = found[f"asft{suffix}"], found[f"asft-unpaired{suffix}"]
                pairs, single = both["accuracy"], one["accuracy"]
                true = [x > y - NEAR for x, y in zip(single, pairs, strict=True)]
                claim = (
                    f"(f) ASFT with beta {beta} on unpaired rows, half as many answers, loses less "
                    f"than {NEAR:g} of accuracy"
                )
                numbers = f"unpaired {over_seeds(single, '')}, pairs {over_seeds(pairs, '')}; "
                numbers += f"difference {difference(one['right'], both['right'])}"
                f.append((claim, name, true, numbers))
    for names in (("example", "untrained"), ("smollm-instructions", "smollm-untrained")):
        trained, untrained = (methods.get(name, {}) for name in names)
        if any(m not in start for m in ("asft", "dpo") for start in (trained, untrained)):
            continue
        for figure in ("accuracy", "logp_w"):
            asft, dpo = (
                [x - y for x, y in zip(trained[m][figure], untrained[m][figure], strict=True)]
                for m in ("asft", "dpo")
            )
            true = [abs(x) < abs(y) for x, y in zip(asft, dpo, strict=True)]
            claim = (
                f"(d) ASFT depends less on its start than DPO: {figure}, trained start minus "
                "untrained"
            )
            numbers = f"ASFT {over_seeds(asft)}, DPO {over_seeds(dpo)}"
            d.append((claim, ", ".join(names), true, numbers))
    return a + b + c + d + e + f


def margins_at_equal_rates(records: list[dict], name: str) -> list[str]:
    """ASFT's and ORPO's margin on the validation part, at each rate that both have."""
    grid = {}
    for r in records:
        if (r["dataset"], r["part"]) == (name, "validation") and "after" in r:
            grid[r["method"], r["rate"]] = r["after"]["margin"]
    rates = sorted(rate for m, rate in grid if m == "asft" and ("orpo", rate) in grid)
    return [f"{grid['asft', rate]:+.3f}, {grid['orpo', rate]:+.3f} at {rate:g}" for rate in rates]


# ----------------------------------------------------------------------------------------- answers


def answers(settings: argparse.Namespace) -> None:
    """Prints what the language model answers to held-out prompts, before training and after it with
    seed 0: scores, of each method at each rate whose weights were kept; then some answers side by
    side, of each method's chosen rate and of the one whose answers come nearest to the chosen ones.
    Draws the scores."""
    work = settings.work.resolve()
    records = read_rows(work / "results.jsonl")
    for name in settings.datasets:
        dataset = DATASETS[name]
        chosen = [(m, rate) for m in dataset.methods if (rate := choose(records, name, m))]
        if dataset.model != SMOLLM or dataset.untrained or not chosen:
            continue
        home, start = work / "answers" / name, settings.smollm / SMOLLM
        home.mkdir(parents=True, exist_ok=True)
        prompts = home / "prompts.jsonl"
        pairs = read_rows(work / "data" / name / "held-out.jsonl")[: settings.prompts]
        prompts.write_text(
            "".join(
                json.dumps({k: p[k] for k in ("prompt_ids", "chosen_ids")}) + "\n" for p in pairs
            )
        )
        models = {"before": start}
        for m, best in chosen:
            for rate in sorted(rate for _, _, rate in grid_of(records, name, m)):
                model = directories(work, (name, m, rate, 0, ""))[-1] / "model"
                out = answers_file(home, f"{m} {rate:g}")
                done = out.with_suffix(".score.json").exists()
                if rate == best or done or (model / "model.safetensors").exists():
                    models[f"{m} {rate:g}"] = model
        outs = [answers_file(home, label) for label in models]
        with ThreadPoolExecutor(settings.jobs) as pool:
            rows = pool.map(partial(answer, settings, prompts), models.values(), outs)
            found = dict(zip(models, rows, strict=True))
        print_scores(name, found, home, settings)
        draw(work / f"{name}.png", records, name, home, list(found))
        shown = ["before"]
        for m, best in chosen:
            of_method = [label for label in found if label.split()[0] == m]
            nearest = max(of_method, key=lambda label: scores_of(home, label)["rougeL"])
            shown += dict.fromkeys([f"{m} {best:g}", nearest])
        print_side_by_side(pairs, {m: found[m] for m in shown}, start, settings.show)


def answers_file(home: Path, label: str) -> Path:
    """Where the answers of "before" or of "METHOD RATE" are."""
    return home / f"{label.replace(' ', '-')}.jsonl"


def scores_of(home: Path, label: str) -> dict:
    """The scores of these answers, in percent."""
    return json.loads(answers_file(home, label).with_suffix(".score.json").read_text())


def answer(settings: argparse.Namespace, prompts: Path, model: Path, out: Path) -> list[dict]:
    """Greedy answers by `eval.py generate`, and beside them their scores by `eval.py score`."""
    if not out.with_suffix(".score.json").exists():
        generate = ["generate", "--model", model, "--prompts", prompts, "--out", out]
        generate += ["--max-new-tokens", settings.answer_tokens, "--device", "cpu"]
        score = ["score", "--predictions", out, "--json", out.with_suffix(".score.json")]
        for words in (generate, score):
            done = call([*EVAL, *words], settings)
            if done.returncode:
                raise RuntimeError(f"{' '.join(done.args)}:\n{done.stderr}")
    return read_rows(out)


def distinct_bigrams(texts: list[str]) -> float:
    """Of all pairs of adjacent words in the texts, the share that differ from one another."""
    bigrams = []
    for text in texts:
        words = text.lower().split()
        bigrams += zip(words, words[1:], strict=False)
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def print_scores(
    name: str, found: dict[str, list[dict]], home: Path, settings: argparse.Namespace
) -> None:
    """A row per model. found: its answers."""
    print(
        f"**{name}**: greedy answers to {len(found['before'])} held-out prompts, at most "
        f"{settings.answer_tokens} tokens, against the chosen answers\n\n"
        "| | mean tokens | that end | BLEU-4 | ROUGE-1 | ROUGE-L | distinct bigrams |\n"
        "|---|---|---|---|---|---|---|"
    )
    for m, rows in found.items():
        scores = scores_of(home, m)
        ended = fmean(row["finish"] == "stop" for row in rows)
        cells = [f"{fmean(row['tokens'] for row in rows):.1f}", f"{ended:.0%}"]
        cells += [f"{scores[score]:.1f}" for score in ("bleu4", "rouge1", "rougeL")]
        cells.append(f"{distinct_bigrams([row['prediction'] for row in rows]):.2f}")
        print(f"| {m} | {' | '.join(cells)} |")


def draw(out: Path, records: list[dict], name: str, home: Path, labels: list[str]) -> None:
    """Draws for each method, from its lowest rate to its highest, how well it orders pairs and how
    near its answers come to the chosen ones. Methods that compare two answers are squares."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=90)
    label = label_before(name, "validation", 0)
    before = json.loads((home.parents[1] / f"likelihood/{label}.json").read_text())
    accuracy = 100 * before["measures"]["accuracy"]["value"]
    axes.plot(accuracy, scores_of(home, "before")["rougeL"], "*k", ms=14, label="before")
    colors = iter(plt.get_cmap("tab20").colors)
    for m in DATASETS[name].methods:
        grid = sorted(grid_of(records, name, m), key=lambda of_rate: of_rate[-1])
        points = [
            (100 * accuracy, scores_of(home, f"{m} {rate:g}")["rougeL"])
            for accuracy, _, rate in grid
            if f"{m} {rate:g}" in labels
        ]
        if points:
            marker = "s" if m in (*REFERENCE, "orpo", "simpo") else "o"
            style = {"color": next(colors), "marker": marker, "lw": 1}
            axes.plot(*zip(*points, strict=True), label=m, **style)
    axes.set_xlabel("validation pairs ordered rightly, %")
    axes.set_ylabel("answers: ROUGE-L against the chosen ones")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(out)


def print_side_by_side(
    pairs: list[dict], found: dict[str, list[dict]], start: Path, count: int
) -> None:
    """The first answers of each model. pairs: of token ids, whose tokenizer is start's."""
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    for i, pair in enumerate(pairs[:count]):
        asked = tokenizer.decode(pair["prompt_ids"])
        question = re.sub(r".*\buser\n|\nassistant\n.*", "", asked, flags=re.DOTALL)
        lines = {"chosen": tokenizer.decode(pair["chosen_ids"])}
        lines |= {m: rows[i]["prediction"] for m, rows in found.items()}
        print(f"\n**{i + 1}. {' '.join(question.split())}**\n")
        for m, text in lines.items():
            print(f"- *{m}*: {' '.join(text.split())}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=("run", "table", "answers"))
    add("--work", type=Path, required=True, help="directory of data parts, runs, results.jsonl")
    add("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--seeds", type=at_least(1), default=3)
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of every method")
    add("--max-steps", type=int, help="instead of each data set's own number, to try the study")
    add("--widen", type=int, default=0, help="most further rates beyond an edge of the grid [0]")
    add("--keep-weights", action="store_true", help="also of rates not chosen, for answers")
    add("--smollm", type=Path, default=Path(), help="directory that bench/smollm.py made")
    add("--prompts", type=int, default=40, help="held-out prompts to answer [40]")
    add("--answer-tokens", type=int, default=64, help="most tokens of an answer [64]")
    add("--show", type=int, default=10, help="answers to show side by side [10]")
    add("--jobs", type=at_least(1), default=2, help="trainings at a time [2]")
    settings = parser.parse_args()
    settings.smollm = settings.smollm.resolve()
    {"run": run, "table": table, "answers": answers}[settings.command](settings)


if __name__ == "__main__":
    main()
