"""Files of JSON lines, and what the evaluation commands have in common.

In reading order
    share, is_first, torchrun_group, wait_for_all   the processes of torchrun
    append_row, read_rows, join_parts    a file that several processes write
    json_rows, write_json                checked reading; writing of results
    named, between, add_model_flags      flags that several commands share

A file that several processes write: each process appends to a part of its own, FILE.part-00000 and
so on, and once all are done the parts are joined into FILE. A killed call leaves its parts, and
the next one begins by joining them, whatever the number of processes was.
"""

import argparse
import contextlib
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from support.files import InputError, naming, shown, write_whole
from support.processes import join_group
from support.records import read_records

# ---------------------------------------------------------------------------------------- processes


def share(items: Sequence) -> Sequence:
    """This process's items: every n-th one under torchrun with n processes, otherwise all."""
    return items[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def is_first() -> bool:
    """True on process 0, which prints and joins; always true without torchrun."""
    return int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def torchrun_group() -> Iterator[None]:
    """The process group of torchrun's processes; nothing without torchrun.

    One process may have to wait for another that still has hours of answers to make.
    """
    if "RANK" in os.environ:
        join_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when all processes have called it. Raises InputError if one of them ended before."""
    try:
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError:
        raise InputError("another process ended early; the same call continues") from None


# --------------------------------------------------------------------------------------------- rows


def json_line(row: dict) -> bytes:
    """A row as it is written. Half a surrogate pair, at the end of a reply that was cut, is written
    as JSON escapes it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def append_row(out: str | Path, row: dict) -> None:
    """Appends a row to this process's part of `out`."""
    part = f"{out}.part-{int(os.environ.get('RANK', 0)):05d}"
    with naming(part), open(part, "ab") as file:
        file.write(json_line(row))


def parts_of(out: Path) -> list[Path]:
    """The parts of `out`, of this call or of one that was killed."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-{'[0-9]' * 5}"))


def read_rows(out: Path, key: str, order: Sequence) -> dict:
    """row[key] -> row, of all rows in `out` and its parts.

    Raises InputError, naming the line, if it is not a JSON object whose `key` is one of `order`.
    """
    paths = [out] if out.exists() else []
    rows = {}
    for path in [*paths, *parts_of(out)]:
        for place, row in json_rows(path, key, torn=path != out):
            if row[key] not in order:
                raise InputError(f"{place}: {key} {shown(row[key])} is unknown; name another file")
            rows[row[key]] = row
    return rows


def join_parts(out: Path, key: str, order: Sequence) -> list[dict]:
    """Moves all rows into `out`, in the order of their keys, and returns them.

    For process 0 while no process appends. A row is never lost: `out` is replaced whole before the
    parts are removed.
    """
    parts, rows = parts_of(out), read_rows(out, key, order)
    ordered = [rows[value] for value in order if value in rows]
    if parts or not out.exists():
        write_whole(out, b"".join(map(json_line, ordered)))
    for part in parts:
        part.unlink()
    return ordered


def json_rows(path: str | Path, *keys: str, torn: bool = False) -> list[tuple[str, dict]]:
    """("file:line", row) of a JSONL file. Raises InputError, naming the line, if it is not a JSON
    object with these keys. With `torn` a last line that is not JSON is left out: whoever wrote it
    was killed."""
    records = list(read_records(path))
    if torn and records and isinstance(records[-1][1], ValueError):
        records.pop()
    rows = []
    for place, row in records:
        if isinstance(row, ValueError):
            raise InputError(f"{place}: {row}")
        if lacks := [key for key in keys if not isinstance(row, dict) or key not in row]:
            raise InputError(
                f"{place}: {', '.join(lacks)} is missing; wanted a JSON object with "
                f"{', '.join(keys)}; found {shown(row)}"
            )
        rows.append((place, row))
    return rows


def write_json(path: str | Path, value: dict, *read: str | Path) -> None:
    """Writes the file of --json, and makes its directory. Raises InputError if that fails or would
    replace one of the files that were read."""
    path = Path(path)
    with naming(f"--json {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and any(path.samefile(other) for other in read):
            raise InputError(f"--json {path} is a file that was read; name another")
        path.write_text(json.dumps(value, indent=2) + "\n")


# -------------------------------------------------------------------------------------------- flags


def named(text: str) -> tuple[str, Path]:
    """(NAME, DIR) of NAME=DIR, or ("", DIR) of a plain directory."""
    name, _, rest = text.partition("=")
    return (name, Path(rest)) if rest and not Path(text).is_dir() else ("", Path(text))


def between(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""

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
    devices, precisions = ("auto", "cpu", "cuda"), ("auto", "fp32", "bf16")
    add("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    add("--device", default="auto", choices=devices, help="auto: cuda if each process has a GPU")
    add("--precision", default="auto", choices=precisions, help="auto: bf16 on CUDA, fp32 on CPU")
    add("--seed", type=between(int, 0), default=0, help=f"of {seed_of} [0]")
