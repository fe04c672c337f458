"""A small study: the losses side by side, and which of the paper's claims hold at this scale.

    python bench/study.py run --work DIR        186 trainings; continues if interrupted
    python bench/study.py table --work DIR      the tables and claims, of what has been run so far

In reading order
    METHODS, DATASETS       what is compared: losses; starts, pairs and numbers of steps
    parts, random_start     the three parts of a data set; untrained models of the example's size
    measure                 one training, by train.py as a user runs it
    choose                  the learning rate of a method
    run, measure_all        the grid of rates with seed 0 on the validation part, then every seed
                            on the held-out part
    table, claims           Markdown; the paper's claims (a) to (d), each as a rule

Every method has the same start, pairs, number of updates, schedule and grid of rates. Everything
else is train.py's default. asft-two-stage spends half of its updates on each stage, with one rate.
A seed is an order of the pairs, and for the untrained start also an initialization. Log-probs are
means over an answer's tokens in nats, for every loss. The margin is chosen minus rejected; accuracy
is the share of pairs with a margin above 0.

One criterion chooses the rate of all methods: accuracy on the validation part, and of equal ones
the larger margin. Accuracy is on one scale, and it is the goal of every method except SFT. Margin
first would always choose to push harder, and each loss's own value would choose by another
criterion for each. The choice is coarse with so few pairs: the tables name the methods whose rate
lies at an edge of the grid, and claim (c) is also shown at equal rates.

A claim holds if its rule is true for every seed. ± is the standard deviation over seeds. The
held-out pairs are the same for all seeds, so it says nothing about other pairs.

The data sets of real text run if their files are beside the checkout. DIR/runs has config.json and
metrics.jsonl of each training, for `eval.py figures`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from common import ROOT, append_row, read_rows, train_command

sys.path.insert(0, str(ROOT))

import torch

from model import Llama, LlamaConfig, save_model

ALIGN = "--loss asft --sft-weight 0"
METHODS = {  # name -> the flags of its stages; {T} is this command's --temperature
    "sft": ["--loss sft"],
    "dpo": ["--loss dpo"],
    "ipo": ["--loss ipo"],
    "orpo": ["--loss orpo"],
    "simpo": ["--loss simpo"],
    "asft": ["--loss asft"],
    "asft-align-only": [ALIGN],
    "asft-tempered": [ALIGN + " --temperature {T}"],
    "asft-two-stage": ["--loss sft", ALIGN],
}


class Dataset(NamedTuple):
    model: Path | None  # None: random_start
    data: Path
    held_out: Path | None  # None: a part of the data
    steps: int
    flags: str
    methods: tuple[str, ...] = tuple(METHODS)


MODEL = ROOT / "examples/model"
EXAMPLE = (ROOT / "examples/train.jsonl", ROOT / "examples/heldout.jsonl")
REAL = ROOT.parent / "shared/real"  # if the checkout has it beside it
STORIES, PAIRS = REAL / "stories260K", REAL / "preferences"
FOUR = ("dpo", "ipo", "orpo", "asft")
SHORT, LONG = "--pairs-per-step 16", "--pairs-per-step 16 --max-tokens 256"
DATASETS = {
    "example": Dataset(MODEL, *EXAMPLE, 40, "--pairs-per-step 32"),
    "untrained": Dataset(None, *EXAMPLE, 40, "--pairs-per-step 32", FOUR),
    "instructions": Dataset(STORIES, PAIRS / "instructions_short.jsonl", None, 50, SHORT),
    "ultrafeedback": Dataset(STORIES, PAIRS / "ultrafeedback.jsonl", None, 24, LONG),
}
KEY = ("dataset", "method", "rate", "seed", "part")  # what identifies a training
FIGURES = ("logp_w", "logp_l", "margin", "accuracy")


def parts(work: Path, name: str) -> dict[str, Path]:
    """The files train, validation and held-out. A line's hash modulo 10 decides: 0 and 1 are
    validation, 2 and 3 held-out (unless the data set has its own file for that), else train."""
    dataset = DATASETS[name]
    lines: dict[str, list[bytes]] = {"train": [], "validation": [], "held-out": []}
    for line in dataset.data.read_bytes().splitlines():
        digit = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") % 10
        if digit < 2:
            lines["validation"].append(line)
        elif digit < 4 and not dataset.held_out:
            lines["held-out"].append(line)
        else:
            lines["train"].append(line)
    if dataset.held_out:
        lines["held-out"] = dataset.held_out.read_bytes().splitlines()
    files = {part: work / "data" / name / f"{part}.jsonl" for part in lines}
    for part, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(lines[part]) + b"\n")
    return files


def random_start(directory: Path, seed: int) -> Path:
    """The example's model as it is before examples/make.py trains it, but with this seed."""
    if not directory.exists():
        torch.manual_seed(seed)
        model = Llama(LlamaConfig.load(MODEL))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        save_model(model, directory, dtype=torch.float32, source=MODEL)
    return directory


def measure(work: Path, key: tuple, files: dict[str, Path], settings: argparse.Namespace) -> dict:
    """Trains once. Returns `key` (its fields: KEY) with the part's figures before and after."""
    name, method, rate, seed, part = key
    dataset, stages, rows, started = DATASETS[name], METHODS[method], [], time.monotonic()
    record = dict(zip(KEY, key, strict=True))
    home = work / "runs" / f"{name}-{method}-{rate:g}-{seed}-{part}"
    shutil.rmtree(home, ignore_errors=True)  # of a study that was stopped
    start = dataset.model or work / "starts" / str(seed)
    steps = settings.max_steps or dataset.steps
    share = [steps] if len(stages) == 1 else [steps - steps // 2, steps // 2]
    threads = max(1, (os.cpu_count() or 1) // settings.jobs)
    for i, stage in enumerate(stages):
        out = home / str(i) if len(stages) > 1 else home
        # The second stage has another seed: with the first one's it would draw the same pairs.
        flags = (
            f"{stage.format(T=settings.temperature)} {dataset.flags} --lr {rate} "
            f"--seed {seed + 1000 * i} --epochs 1000 --max-steps {share[i]} --save-dtype fp32 "
            "--device cpu"
        ).split()
        paths = ["--model", start, "--data", files["train"], "--eval-data", files[part]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        words = train_command(*paths, "--out", out, *flags)
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        record["seconds"] = time.monotonic() - started
        # A loss that is not finite is a result.
        if done.returncode == 1 and done.stderr.startswith("train.py: step"):
            return record | {"failed": done.stderr.split(";")[0]}
        if done.returncode:
            raise RuntimeError(f"train.py {' '.join(flags)} in {home}:\n{done.stderr}")
        rows += read_rows(out / "eval.jsonl")
        pairs = json.loads((out / "config.json").read_text())["eval_data"]["kept"]
        start = out / "model"
    for weights in home.rglob("*.safetensors"):
        weights.unlink()
    before, after = ({name: row[f"eval_{name}"] for name in FIGURES} for row in (rows[0], rows[-1]))
    return record | {"before": before, "after": after, "steps": steps, "pairs": pairs}


def choose(records: list[dict], name: str, method: str) -> float | None:
    """The rate with the highest validation accuracy, and of these with the largest margin. None if
    no run was finite."""
    runs = [r for r in records if (r["dataset"], r["method"]) == (name, method) and "after" in r]
    runs = [r for r in runs if r["part"] == "validation"]
    grid = [(r["after"]["accuracy"], r["after"]["margin"], r["rate"]) for r in runs]
    return max(grid)[-1] if grid else None


def run(settings: argparse.Namespace) -> None:
    """Measures what DIR/results.jsonl lacks, `jobs` trainings at a time."""
    work = settings.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    wanted = {name: getattr(settings, name) for name in ("rates", "temperature", "max_steps")}
    if not path.exists():
        path.write_text(json.dumps(wanted))
    if (found := json.loads(path.read_text())) != wanted:
        sys.exit(f"study.py: {work} was begun with {found}, not {wanted}; name another --work")
    names = [name for name in settings.datasets if DATASETS[name].data.exists()]
    if missing := [name for name in settings.datasets if name not in names]:
        print(f"not beside this checkout: {', '.join(missing)}")
    if "untrained" in names:
        for seed in range(settings.seeds):
            random_start(work / "starts" / str(seed), seed)
    files = {name: parts(work, name) for name in names}
    tasks = [(name, m) for name in names for m in DATASETS[name].methods if m in settings.methods]
    grid = [(*task, rate, 0, "validation") for task in tasks for rate in settings.rates]
    measure_all(work, grid, files, settings)
    records = read_rows(work / "results.jsonl")
    chosen = [(*task, rate) for task in tasks if (rate := choose(records, *task))]
    seeds = [(*one, seed, "held-out") for one in chosen for seed in range(settings.seeds)]
    measure_all(work, seeds, files, settings)


def measure_all(work: Path, keys: list[tuple], files: dict, settings: argparse.Namespace) -> None:
    results = work / "results.jsonl"
    done = {tuple(r[field] for field in KEY) for r in read_rows(results)}
    keys = [key for key in keys if key not in done]
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


def held_out(records: list[dict], name: str, method: str, seeds: int) -> Seeds | None:
    """Held-out figures at the chosen rate; None if a seed has none."""
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
    return found


def table(settings: argparse.Namespace) -> None:
    records = read_rows(settings.work / "results.jsonl")
    methods: dict[str, dict[str, Seeds]] = {}
    for name, dataset in DATASETS.items():
        rows = {m: held_out(records, name, m, settings.seeds) for m in dataset.methods}
        methods[name] = {m: row for m, row in rows.items() if row}
        if methods[name]:
            print_dataset(name, methods[name], records, settings.seeds)
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
    minutes = sum(r["seconds"] for r in records) / 60
    print(f"\n{len(records)} trainings, {minutes:.0f} minutes, added up.")


def print_dataset(name: str, found: dict[str, Seeds], records: list[dict], seeds: int) -> None:
    """A data set's table. found: the figures of each method."""
    dataset, first = DATASETS[name], next(iter(found.values()))
    chosen = {m: choose(records, name, m) for m in found}
    of_dataset = [r for r in records if r["dataset"] == name]
    one = next(r for r in of_dataset if r["part"] == "held-out" and "after" in r)
    start = ", ".join(f"{figure} {fmean(first[figure + ' before']):.3f}" for figure in FIGURES)
    print(
        f"\n**{name}**: {one['steps']} steps, `{dataset.flags}`; {seeds} seeds; {one['pairs']} "
        f"held-out pairs, before training: {start}\n\n"
        "| method | rate | chosen log-prob, change | rejected log-prob, change | margin | "
        "accuracy |\n|---|---|---|---|---|---|"
    )
    for m, row in found.items():
        figures = [over_seeds(row[f]) for f in ("logp_w change", "logp_l change", "margin")]
        figures.append(over_seeds(row["accuracy"], ""))
        print(f"| {m} | {chosen[m]:g} | {' | '.join(figures)} |")
    rates = sorted({r["rate"] for r in of_dataset})
    edge = [m for m in found if chosen[m] in (rates[0], rates[-1])]
    tried = ", ".join(f"{rate:g}" for rate in rates)
    print(f"\nRates tried: {tried}; chosen at an edge: {', '.join(edge) or 'none'}.")
    if missing := [m for m in dataset.methods if m not in found]:
        print(f"Without all seeds: {', '.join(missing)}.")


def claims(
    methods: dict[str, dict[str, Seeds]], records: list[dict]
) -> list[tuple[str, str, list[bool], str]]:
    """(claim, data set, whether its rule is true for each seed, the numbers), for each claim whose
    methods have run."""
    a, b, c, d = [], [], [], []
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
    trained, untrained = methods["example"], methods["untrained"]
    if all(m in start for m in ("asft", "dpo") for start in (trained, untrained)):
        for figure in ("accuracy", "logp_w"):

            def gains(m: str, figure: str = figure) -> list[float]:
                pairs = zip(trained[m][figure], untrained[m][figure], strict=True)
                return [x - y for x, y in pairs]

            asft, dpo = gains("asft"), gains("dpo")
            true = [abs(x) < abs(y) for x, y in zip(asft, dpo, strict=True)]
            claim = (
                f"(d) ASFT depends less on its start than DPO: {figure}, trained start minus "
                "untrained"
            )
            numbers = f"ASFT {over_seeds(asft)}, DPO {over_seeds(dpo)}"
            d.append((claim, "example, untrained", true, numbers))
    return a + b + c + d


def margins_at_equal_rates(records: list[dict], name: str) -> list[str]:
    """ASFT's and ORPO's margin on the validation part, at each rate that both have."""
    grid = {}
    for r in records:
        if (r["dataset"], r["part"]) == (name, "validation") and "after" in r:
            grid[r["method"], r["rate"]] = r["after"]["margin"]
    rates = sorted(rate for m, rate in grid if m == "asft" and ("orpo", rate) in grid)
    return [f"{grid['asft', rate]:+.3f}, {grid['orpo', rate]:+.3f} at {rate:g}" for rate in rates]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=("run", "table"))
    add("--work", type=Path, required=True, help="directory of data parts, runs, results.jsonl")
    add("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--seeds", type=int, default=3)
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of every method")
    add("--temperature", type=float, default=0.5, help="of asft-tempered; not tuned [0.5]")
    add("--max-steps", type=int, help="instead of each data set's own number, to try the study")
    add("--jobs", type=int, default=2, help="trainings at a time [2]")
    settings = parser.parse_args()
    {"run": run, "table": table}[settings.command](settings)


if __name__ == "__main__":
    main()
