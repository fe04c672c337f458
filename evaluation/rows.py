""" """

import argparse
import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from data import read_records
from support.files import InputError, naming, shown


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


def named(text: str) -> tuple[str, Path]:
    """NAME=DIR, or a directory without a name of its own ("")."""
    name, _, rest = text.partition("=")
    return (name, Path(rest)) if rest and not Path(text).is_dir() else ("", Path(text))


def between(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
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


def add_model_flags(command: argparse.ArgumentParser, seed_of: str) -> None:
    """--model, --device, --precision and --seed, the same for every command that loads a model."""
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="cuda if each process has one",
    )
    add(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16"),
        help="of all weights: bf16 on CUDA, fp32 on a CPU",
    )
    add("--seed", type=between(int, 0), default=0, help=f"of {seed_of} [0]")
