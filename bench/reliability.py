"""Long campaigns against train.py.

    python bench/reliability.py kill --kills 36         kills runs at random moments, resumes them
    python bench/reliability.py soak --steps 2000       memory and open files over a long run

kill: each trial trains the example for 24 steps with a checkpoint every third step, is killed
(SIGKILL) once or twice while it trains, saves or exports, and then runs to its end with --resume.
It must leave what an undisturbed run leaves: the same model, byte for byte, and the same
metrics.jsonl and eval.jsonl except for times and memory. Prints a line for each trial and a table
at the end. Exit code 1 if anything differs.

soak: trains on the example's pairs over and over. The mean resident memory over the last quarter of
the steps must be within 2% of that over the second quarter, and no more files may be open. Exit
code 1 otherwise. (Linux, because it reads /proc.)
"""

import argparse
import collections
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, at_least, read_rows, train_command

CLOCKS = {"seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib"}
EXAMPLE = ROOT / "examples"
FLAGS = [
    *"--max-steps 24 --epochs 2 --save-every 3 --eval-every 4 --lr 1e-3 --samples 1".split(),
    *("--keep-best", "loss"),
    *("--model", EXAMPLE / "model", "--data", EXAMPLE / "train.jsonl"),
    *("--eval-data", EXAMPLE / "heldout.jsonl"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What a run is killed in; the kill comes up to this many seconds after it has begun.
MOMENTS = {"training": 8.0, "saving": 0.03, "exporting": 0.02}


def start(out: Path) -> subprocess.Popen:
    """Begins or resumes the run in OUT. It prints into OUT.log."""
    words = train_command(*FLAGS, "--out", out, "--resume")
    with open(f"{out}.log", "wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.PIPE, env=ENVIRONMENT)


def left_by(out: Path) -> dict:
    """Everything that two equal runs must have in common."""
    found = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = read_rows(out / name)
        found[name] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return found


def kill(out: Path, when: str, rng: random.Random) -> str | None:
    """Begins or resumes a run and kills it: at a random time while it trains (a resumed run: after
    it has printed a step), or soon after it begins to write a checkpoint or the model. Returns when
    it was killed; None if it ended before."""
    resumed = (out / "metrics.jsonl").exists()
    process, deadline = start(out), None
    saves, wanted = set(), rng.randint(1, 4)
    while process.poll() is None:
        if when == "training" and resumed:
            begun = b"\nstep " in Path(f"{out}.log").read_bytes()
        elif when == "training":
            begun = (out / "config.json").exists()
        elif when == "saving":
            saves |= {path.name for path in (out / "checkpoints").glob(".[sb]*.partial")}
            begun = len(saves) >= wanted
        else:
            begun = (out / ".model.partial").exists()
        if begun and deadline is None:
            deadline = time.monotonic() + rng.uniform(0, MOMENTS[when])
        if deadline is not None and time.monotonic() >= deadline:
            process.kill()
        time.sleep(0.0005)
    process.communicate()
    rows = len(read_rows(out / "metrics.jsonl"))
    return f"{when}, {rows} steps logged" if process.returncode == -9 else None


def campaign(a: argparse.Namespace) -> int:
    rng, found = random.Random(a.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Path(scratch) / "undisturbed"
        if start(undisturbed).wait():
            raise SystemExit("the undisturbed run failed")
        wanted = left_by(undisturbed)
        for trial, when in enumerate(itertools.cycle(MOMENTS)):
            if found["kills"] >= a.kills:
                break
            out = Path(scratch) / f"trial{trial}"
            moments = [kill(out, when, rng) for _ in range(rng.randint(1, 2))]
            kills = sum(moment is not None for moment in moments)
            process = start(out)
            error = process.communicate()[1].decode()
            same = process.returncode == 0 and left_by(out) == wanted
            found.update({"kills": kills, (when, "kills"): kills})
            found[when, "identical" if same else "lost"] += 1
            told = "; ".join(moment or "not, it had ended" for moment in moments)
            result = "identical" if same else f"DIFFERS {error[-500:]}"
            print(f"{trial + 1}: killed {told}: {result}", flush=True)
    print("| killed while | kills | trials identical | lost |\n|---|---|---|---|")
    for when in MOMENTS:
        kills, identical, lost = (found[when, kind] for kind in ("kills", "identical", "lost"))
        print(f"| {when} | {kills} | {identical} | {lost} |")
    return int(any(found[when, "lost"] for when in MOMENTS))


def soak(a: argparse.Namespace) -> int:
    memory, files = [], []  # after each step: MiB, and how many
    more = f"--save-every 100 --epochs {a.steps} --max-steps {a.steps} --eval-every 500"
    with tempfile.TemporaryDirectory() as scratch:
        words = train_command(*FLAGS, *more.split(), "--out", Path(scratch) / "out")
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            home = Path(f"/proc/{process.pid}")
            for line in process.stdout:
                if line.startswith("step "):
                    pages = int((home / "statm").read_text().split()[1])
                    memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                    files.append(len(list((home / "fd").iterdir())))
    if len(memory) < 4:
        sys.exit(f"soak: {len(memory)} steps, exit code {process.returncode}; wanted 4 or more")
    quarter = len(memory) // 4
    second, last = slice(quarter, 2 * quarter), slice(3 * quarter, None)
    memory_then, memory_now = statistics.fmean(memory[second]), statistics.fmean(memory[last])
    files_then, files_now = statistics.fmean(files[second]), statistics.fmean(files[last])
    growth = memory_now / memory_then - 1
    print(
        f"{len(memory)} steps, exit code {process.returncode}; resident {memory_then:.1f} MiB in "
        f"the second quarter, {memory_now:.1f} in the last ({growth:+.2%}); open files "
        f"{files_then:.1f} and {files_now:.1f}"
    )
    return int(process.returncode != 0 or abs(growth) > 0.02 or files_now > files_then + 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("kill")
    command.add_argument("--kills", type=at_least(1), default=36)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(function=campaign)
    command = commands.add_parser("soak")
    command.add_argument("--steps", type=at_least(4), default=2000)
    command.set_defaults(function=soak)
    a = parser.parse_args()
    return a.function(a)


if __name__ == "__main__":
    sys.exit(main())
