"""What the benchmarks and campaigns share: train.py as a process, rows of JSON, the machine.

Only the standard library: other trainers' environments run this file too, and the peak memory of a
process that is measured begins with that of the process that started it.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_command(*flags) -> list[str]:
    """The words of `python train.py FLAGS`."""
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def read_rows(path: Path) -> list[dict]:
    """The complete rows of a JSONL file; none if the file does not exist."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` on."""

    def whole_number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"found {text}, wanted {low} or more")
        return int(text)

    return whole_number


def append_row(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def cpu_seconds_of_machine() -> float:
    """CPU seconds that all processes of this machine have used, stolen ones included (Linux)."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _io, *rest = map(int, ticks)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Its processor, cores and memory (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{[*names, platform.machine()][0]}, {cores} cores, {memory:.0f} GiB"
