"""A small study: the losses side by side, and which of the paper's claims hold at this scale.

    python tests/study.py run --work DIR        186 trainings, about 40 minutes on two cores; goes on after a stop
    python tests/study.py table --work DIR      prints the tables and the claims, of what has been run so far

In reading order
    METHODS, DATASETS       what is compared; from which start, on which pairs, for how many steps
    parts, random_start     the three parts of a data set, by a fixed rule; untrained models of the example's size
    measure                 one training, by train.py as a user runs it
    choose                  the learning rate of a method
    run, measure_all        the grid of rates with seed 0 on the validation part, then every seed on the held-out part
    table, claims           Markdown; the paper's claims (a) to (d), each as a rule

Every method gets the same start, pairs, number of updates, schedule and grid of rates; otherwise it has train.py's
defaults. asft-two-stage spends half of its updates on each stage, both at one rate. A seed is an order of the pairs,
and for the untrained start another initialisation too. Log-probs are means over an answer's tokens in nats, for every
loss; margin is chosen minus rejected, accuracy the share of pairs where it is above 0.

The rate is chosen by one criterion for all methods: accuracy on the validation part, then margin where accuracies tie.
Accuracy is on one scale and is what all of them, SFT aside, are for; margin first would always choose to push harder,
and each loss's own value would ask another question of each. With so few pairs the choice is coarse: the tables name
the methods whose rate lies at an edge of the grid, and claim (c) is also shown at equal rates.

A claim holds where its rule is true for every seed; otherwise it fails. ± is the standard deviation over seeds. The
held-out pairs are the same for all seeds, so it says nothing of other pairs.

The real data sets run where ../shared/real is beside the checkout. DIR/runs keeps each training's config.json and
metrics.jsonl, for `eval.py figures`.
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

import torch
from conftest import REAL, ROOT

from model import Llama, LlamaConfig, save_model

ALIGN = "--loss asft --sft-weight 0"
METHODS = {  # name -> the flags of its stages; {T} is --temperature of this command
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


MODEL, EXAMPLE = (
    ROOT / "examples/model",
    (ROOT / "examples/train.jsonl", ROOT / "examples/heldout.jsonl"),
)
STORIES, PREFERENCES = REAL / "stories260K", REAL / "preferences"
DATASETS = {
    "example": Dataset(MODEL, *EXAMPLE, 40, "--pairs-per-step 32"),
    "untrained": Dataset(None, *EXAMPLE, 40, "--pairs-per-step 32", ("dpo", "ipo", "orpo", "asft")),
    "instructions": Dataset(
        STORIES, PREFERENCES / "instructions_short.jsonl", None, 50, "--pairs-per-step 16"
    ),
    "ultrafeedback": Dataset(
        STORIES,
        PREFERENCES / "ultrafeedback.jsonl",
        None,
        24,
        "--pairs-per-step 16 --max-tokens 256",
    ),
}
KEY = ("dataset", "method", "rate", "seed", "part")
FIGURES = ("logp_w", "logp_l", "margin", "accuracy")


def parts(work: Path, name: str) -> dict[str, Path]:
    """The files train, validation and held-out. A line's hash modulo 10 decides: 0, 1 validation; 2, 3 held-out, unless
    the data set has a file of its own for that; else train."""
    dataset = DATASETS[name]
    lines: dict[str, list[bytes]] = {"train": [], "validation": [], "held-out": []}
    for line in dataset.data.read_bytes().splitlines():
        digit = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") % 10
        part = (
            "validation"
            if digit < 2
            else "held-out"
            if digit < 4 and not dataset.held_out
            else "train"
        )
        lines[part].append(line)
    if dataset.held_out:
        lines["held-out"] = dataset.held_out.read_bytes().splitlines()
    files = {part: work / "data" / name / f"{part}.jsonl" for part in lines}
    for part, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(lines[part]) + b"\n")
    return files


def random_start(where: Path, seed: int) -> Path:
    """The example's model as it is before examples/make.py trains it, but with this seed."""
    if not where.exists():
        torch.manual_seed(seed)
        model = Llama(LlamaConfig.load(MODEL))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        save_model(model, where, dtype=torch.float32, source=MODEL)
    return where


def measure(work: Path, key: tuple, files: dict[str, Path], settings: argparse.Namespace) -> dict:
    """Trains once; returns `key` (its fields: KEY) with the part's figures before and after."""
    name, method, rate, seed, part = key
    dataset, stages, rows, started = DATASETS[name], METHODS[method], [], time.monotonic()
    record = dict(zip(KEY, key, strict=True))
    where = work / "runs" / f"{name}-{method}-{rate:g}-{seed}-{part}"
    shutil.rmtree(where, ignore_errors=True)  # of a study that was stopped
    start = dataset.model or work / "starts" / str(seed)
    steps = settings.max_steps or dataset.steps
    share = [steps] if len(stages) == 1 else [steps - steps // 2, steps // 2]
    threads = max(1, (os.cpu_count() or 1) // settings.jobs)
    for i, stage in enumerate(stages):
        out = where / str(i) if len(stages) > 1 else where
        # The second stage's seed differs: with the first one's it would draw the very pairs of the first stage again.
        flags = (
            f"{stage.format(T=settings.temperature)} {dataset.flags} --lr {rate} --seed {seed + 1000 * i} "
            f"--epochs 1000 --max-steps {share[i]} --save-dtype fp32 --device cpu"
        ).split()
        paths = (
            "--model",
            start,
            "--data",
            files["train"],
            "--eval-data",
            files[part],
            "--out",
            out,
        )
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *map(str, paths), *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        record["seconds"] = time.monotonic() - started
        if done.returncode == 1 and done.stderr.startswith(
            "train.py: step"
        ):  # a loss that is not finite: a result
            return record | {"failed": done.stderr.split(";")[0]}
        if done.returncode:
            raise RuntimeError(f"train.py {' '.join(flags)} in {where}:\n{done.stderr}")
        rows += [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
        pairs, start = (
            json.loads((out / "config.json").read_text())["eval_data"]["kept"],
            out / "model",
        )
    for weights in where.rglob("*.safetensors"):
        weights.unlink()
    before, after = (
        {figure: row[f"eval_{figure}"] for figure in FIGURES} for row in (rows[0], rows[-1])
    )
    return record | {"before": before, "after": after, "steps": steps, "pairs": pairs}


def choose(records: list[dict], name: str, method: str) -> float | None:
    """The rate of highest validation accuracy, of those the one of largest margin; None where no run was finite."""
    grid = [
        (r["after"]["accuracy"], r["after"]["margin"], r["rate"])
        for r in records
        if (r["dataset"], r["method"], r["part"]) == (name, method, "validation") and "after" in r
    ]
    return max(grid)[-1] if grid else None


def load(work: Path) -> list[dict]:
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(settings: argparse.Namespace) -> None:
    """Measures what DIR/results.jsonl lacks, `jobs` at a time."""
    work = settings.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = work / "settings.json"
    wanted = {name: getattr(settings, name) for name in ("rates", "temperature", "max_steps")}
    if not path.exists():
        path.write_text(json.dumps(wanted))
    if (found := json.loads(path.read_text())) != wanted:
        sys.exit(
            f"study.py: {work} was begun with {found}, and now {wanted} are asked for; name another --work"
        )
    names = [name for name in settings.datasets if DATASETS[name].data.exists()]
    if names != settings.datasets:
        print(
            f"not beside this checkout: {', '.join(name for name in settings.datasets if name not in names)}"
        )
    for seed in range(settings.seeds if "untrained" in names else 0):
        random_start(work / "starts" / str(seed), seed)
    files = {name: parts(work, name) for name in names}
    tasks = [
        (name, method)
        for name in names
        for method in DATASETS[name].methods
        if method in settings.methods
    ]
    measure_all(
        work,
        [(*task, rate, 0, "validation") for task in tasks for rate in settings.rates],
        files,
        settings,
    )
    rates = {task: choose(load(work), *task) for task in tasks}
    measure_all(
        work,
        [
            (*task, rates[task], seed, "held-out")
            for task in tasks
            if rates[task]
            for seed in range(settings.seeds)
        ],
        files,
        settings,
    )


def measure_all(work: Path, keys: list[tuple], files: dict, settings: argparse.Namespace) -> None:
    done = {tuple(r[field] for field in KEY) for r in load(work)}
    keys = [key for key in keys if key not in done]
    pool = ThreadPoolExecutor(settings.jobs)
    try:
        for i, future in enumerate(
            as_completed(pool.submit(measure, work, key, files[key[0]], settings) for key in keys),
            1,
        ):
            record = future.result()
            with open(work / "results.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            figures = "  ".join(
                f"{name} {value:.4f}" for name, value in record.get("after", {}).items()
            )
            print(
                "{}/{}  {dataset}  {method}  rate {rate:g}  seed {seed}  {part}  {}  ({seconds:.0f} s)".format(
                    i, len(keys), figures or record["failed"], **record
                ),
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)


def over_seeds(values: list[float], sign: str = "+") -> str:
    return f"{fmean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def held_out(
    records: list[dict], name: str, method: str, seeds: int
) -> dict[str, list[float]] | None:
    """Held-out figures at the chosen rate, a number per seed; None where not every seed has them."""
    key = (name, method, choose(records, name, method))
    rows = {
        r["seed"]: r
        for r in records
        if tuple(r[field] for field in KEY) == (*key, r["seed"], "held-out")
    }
    if not all("after" in rows.get(seed, {}) for seed in range(seeds)):
        return None
    rows = [rows[seed] for seed in range(seeds)]
    return (
        {figure: [r["after"][figure] for r in rows] for figure in FIGURES}
        | {f"{figure} before": [r["before"][figure] for r in rows] for figure in FIGURES}
        | {
            f"{figure} change": [r["after"][figure] - r["before"][figure] for r in rows]
            for figure in FIGURES
        }
    )


def table(settings: argparse.Namespace) -> None:
    records, methods = load(settings.work), {}
    for name, dataset in DATASETS.items():
        found = {
            m: row for m in dataset.methods if (row := held_out(records, name, m, settings.seeds))
        }
        methods[name] = found
        if not found:
            continue
        first, chosen = next(iter(found.values())), {m: choose(records, name, m) for m in found}
        one = next(
            r for r in records if (r["dataset"], r["part"]) == (name, "held-out") and "after" in r
        )
        start = ", ".join(f"{figure} {fmean(first[figure + ' before']):.3f}" for figure in FIGURES)
        print(
            f"\n**{name}**: {one['steps']} steps, `{dataset.flags}`; {settings.seeds} seeds; {one['pairs']} held-out "
            f"pairs, before training: {start}\n\n| method | rate | chosen log-prob, change | rejected log-prob, "
            "change | margin | accuracy |\n|---|---|---|---|---|---|"
        )
        for m, row in found.items():
            print(
                f"| {m} | {chosen[m]:g} | {over_seeds(row['logp_w change'])} | {over_seeds(row['logp_l change'])} | "
                f"{over_seeds(row['margin'])} | {over_seeds(row['accuracy'], '')} |"
            )
        rates = sorted({r["rate"] for r in records if r["dataset"] == name})
        edge = [m for m in found if chosen[m] in (rates[0], rates[-1])]
        print(
            f"\nRates tried: {', '.join(f'{r:g}' for r in rates)}; chosen at an edge: {', '.join(edge) or 'none'}."
        )
        if missing := [m for m in dataset.methods if m not in found]:
            print(f"Without all seeds: {', '.join(missing)}.")
    print("\n| claim | data | verdict | numbers |\n|---|---|---|---|")
    for claim, name, true, numbers in claims(methods, records):
        verdict = "holds" if all(true) else f"**fails** (true for {sum(true)} of {len(true)} seeds)"
        print(f"| {claim} | {name} | {verdict} | {numbers} |")
    for record in (r for r in records if "failed" in r):
        print(
            "\nNot finite: {dataset}, {method}, rate {rate:g}, seed {seed}, {part}.".format(
                **record
            )
        )
    print(
        f"\n{len(records)} trainings, {sum(r['seconds'] for r in records) / 60:.0f} minutes, added up."
    )


def claims(methods: dict[str, dict], records: list[dict]) -> list[tuple[str, str, list[bool], str]]:
    """(claim, data set, whether its rule is true for each seed, the numbers), where its methods have run."""
    a, b, c, d = [], [], [], []
    for name, found in methods.items():
        for m, claim, of in (
            ("asft", "(a) ASFT raises the chosen log-prob and lowers the rejected one", a),
            ("dpo", "(b) DPO lowers the rejected log-prob faster than it raises the chosen one", b),
        ):
            if m in found:
                up, down = found[m]["logp_w change"], found[m]["logp_l change"]
                true = [
                    w > 0 > low if m == "asft" else -low > max(w, 0)
                    for w, low in zip(up, down, strict=True)
                ]
                of.append(
                    (claim, name, true, f"chosen {over_seeds(up)}, rejected {over_seeds(down)}")
                )
        if "asft" in found and "orpo" in found:
            pair = found["asft"]["margin"], found["orpo"]["margin"]
            grid = {
                (r["method"], r["rate"]): r["after"]["margin"]
                for r in records
                if (r["dataset"], r["part"]) == (name, "validation") and "after" in r
            }
            equal = [
                f"{grid['asft', rate]:+.3f}, {grid['orpo', rate]:+.3f} at {rate:g}"
                for m, rate in sorted(grid)
                if m == "asft" and ("orpo", rate) in grid
            ]
            c.append(
                (
                    "(c) ASFT's margin exceeds ORPO's",
                    name,
                    [x > y for x, y in zip(*pair, strict=True)],
                    f"ASFT {over_seeds(pair[0])}, ORPO {over_seeds(pair[1])}; validation part: {'; '.join(equal)}",
                )
            )
    starts = methods["example"], methods["untrained"]
    if all(m in start for m in ("asft", "dpo") for start in starts):
        for figure in ("accuracy", "logp_w"):
            asft, dpo = (
                [x - y for x, y in zip(*(start[m][figure] for start in starts), strict=True)]
                for m in ("asft", "dpo")
            )
            d.append(
                (
                    f"(d) ASFT depends less on its start than DPO: {figure}, trained start minus untrained",
                    "example, untrained",
                    [abs(x) < abs(y) for x, y in zip(asft, dpo, strict=True)],
                    f"ASFT {over_seeds(asft)}, DPO {over_seeds(dpo)}",
                )
            )
    return a + b + c + d


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="directory of the data parts, runs and results.jsonl",
    )
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 3e-3, 1e-2],
        help="the grid, for every method",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.5, help="of asft-tempered; not tuned [0.5]"
    )
    parser.add_argument(
        "--max-steps", type=int, help="instead of each data set's own number, to try the study out"
    )
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time [2]")
    settings = parser.parse_args()
    {"run": run, "table": table}[settings.command](settings)


if __name__ == "__main__":
    main()
