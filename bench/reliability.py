"""Long campaigns against train.py. Run by hand; pytest does not collect it.

    python tests/reliability.py kill --kills 36         runs killed at random moments, which go on
    python tests/reliability.py soak --steps 2000       memory and open files over a long run

kill: each trial trains the example for 24 steps with a checkpoint every third, is killed (SIGKILL) once or twice, while
it trains, saves or exports, and goes on with --resume. What it leaves must be what an undisturbed run leaves: the model
byte for byte, and every field of metrics.jsonl and eval.jsonl that is no time or memory figure. Prints a line per trial
and a table at the end; exit code 1 where anything differs.

soak: the example's pairs over and over. Resident memory, its mean over the last quarter of the steps, must be within 2%
of the second quarter's, and as many files open; exit code 1 otherwise. (Linux: read from /proc.)
"""

import argparse
import collections
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib"}
FLAGS = [
    "--max-steps",
    "24",
    "--epochs",
    "2",
    "--save-every",
    "3",
    "--eval-every",
    "6",
    "--lr",
    "1e-3",
    "--model",
    ROOT / "examples/model",
    "--data",
    ROOT / "examples/train.jsonl",
    "--eval-data",
    ROOT / "examples/heldout.jsonl",
    "--samples",
    "1",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(out: Path) -> subprocess.Popen:
    """What it prints goes to OUT.log."""
    command = [sys.executable, ROOT / "train.py", *FLAGS, "--out", out, "--resume"]
    with open(f"{out}.log", "wb") as log:
        return subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=subprocess.PIPE, env=ENVIRONMENT
        )


def left_by(out: Path) -> dict:
    """All that a run leaves and that two runs must have in common."""
    logs = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in CLOCKS}
            for line in (out / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "eval.jsonl")
    }
    return logs | {path.name: path.read_bytes() for path in (out / "model").iterdir()}


def kill(out: Path, when: str, rng: random.Random) -> str:
    """Starts or goes on with a run and kills it: at a random time (of a run that goes on, after it has printed a step),
    or when it begins to write a checkpoint or the model. Says where it was, or that it ended first."""
    begun = (out / "metrics.jsonl").exists()
    process, deadline = start(out), None
    saves, wanted, seen = set(), rng.randint(1, 4), False
    while process.poll() is None:
        names = (
            {path.name for path in (out / "checkpoints").glob(".step-*")}
            if when == "saving"
            else set()
        )
        saves |= names
        trains = (
            b"\nstep " in Path(f"{out}.log").read_bytes()
            if begun
            else (out / "config.json").exists()
        )
        seen = {
            "training": trains,
            "saving": len(saves) >= wanted,
            "exporting": (out / ".model.partial").exists(),
        }[when]
        if seen and deadline is None:
            deadline = time.monotonic() + rng.uniform(
                0, {"training": 8.0, "saving": 0.03, "exporting": 0.02}[when]
            )
        if deadline is not None and time.monotonic() >= deadline:
            process.kill()
        time.sleep(0.0005)
    process.communicate()
    rows = (
        len((out / "metrics.jsonl").read_text().splitlines())
        if (out / "metrics.jsonl").exists()
        else 0
    )
    return (
        f"{when}, {rows} steps logged" if process.returncode == -9 else "not killed: it had ended"
    )


def campaign(a: argparse.Namespace) -> int:
    rng, found, kills = random.Random(a.seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        if start(Path(scratch) / "whole").wait():
            raise SystemExit("the undisturbed run failed")
        whole = left_by(Path(scratch) / "whole")
        for trial, when in enumerate(itertools.cycle(["training", "saving", "exporting"])):
            if kills >= a.kills:
                break
            out, moments = Path(scratch) / f"trial{trial}", []
            for _ in range(rng.randint(1, 2)):
                moments.append(kill(out, when, rng))
                kills += "not killed" not in moments[-1]
                found[when, "kills"] += "not killed" not in moments[-1]
            process = start(out)
            complaint = process.communicate()[1].decode()
            same = process.returncode == 0 and left_by(out) == whole
            found[when, "identical" if same else "lost"] += 1
            print(
                f"{trial + 1}: killed {'; '.join(moments)}: {'identical' if same else 'DIFFERS ' + complaint[-500:]}",
                flush=True,
            )
    print("| killed while | kills | trials identical | lost |\n|---|---|---|---|")
    for when in ("training", "saving", "exporting"):
        print(
            f"| {when} | {found[when, 'kills']} | {found[when, 'identical']} | {found[when, 'lost']} |"
        )
    return int(any(kind == "lost" and count for (_, kind), count in found.items()))


def soak(a: argparse.Namespace) -> int:
    memory, files = [], []  # after each step: MiB, and how many
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            ROOT / "train.py",
            *FLAGS,
            "--out",
            Path(scratch) / "out",
            "--save-every",
            "100",
            "--epochs",
            a.steps,
            "--max-steps",
            a.steps,
            "--eval-every",
            "500",
        ]
        with subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        ) as process:
            home = Path(f"/proc/{process.pid}")
            for line in process.stdout:
                if line.startswith("step "):
                    memory.append(
                        int((home / "statm").read_text().split()[1])
                        * os.sysconf("SC_PAGE_SIZE")
                        / 2**20
                    )
                    files.append(len(list((home / "fd").iterdir())))
    quarter = len(memory) // 4
    (second, last), (files_then, files_now) = (
        [statistics.fmean(of[quarter : 2 * quarter]), statistics.fmean(of[3 * quarter :])]
        for of in (memory, files)
    )
    print(
        f"{len(memory)} steps, exit code {process.returncode}; resident {second:.1f} MiB in the second quarter, "
        f"{last:.1f} in the last ({last / second - 1:+.2%}); open files {files_then:.1f} and {files_now:.1f}"
    )
    return int(
        bool(process.returncode) or abs(last / second - 1) > 0.02 or files_now > files_then + 0.5
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("kill")
    command.add_argument("--kills", type=int, default=36)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(function=campaign)
    command = commands.add_parser("soak")
    command.add_argument("--steps", type=int, default=2000)
    command.set_defaults(function=soak)
    a = parser.parse_args()
    return a.function(a)


if __name__ == "__main__":
    sys.exit(main())
