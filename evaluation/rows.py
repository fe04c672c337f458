"""Files of JSON lines, and what the evaluation commands have in common.

In reading order
    rank ... wait_for_all                the processes of torchrun
    hold_out ... join_parts              a file that several processes write
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
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from support import files
from support.files import InputError, hold, naming, shown, write_whole
from support.processes import environment, in_a_group, join_group
from support.records import read_records

# ---------------------------------------------------------------------------------------- processes


def rank() -> int:
    """This process's number under torchrun, otherwise 0."""
    return environment("RANK", 0)


def share(items: Sequence) -> Sequence:
    """This process's items: every n-th one under torchrun with n processes, otherwise all."""
    return items[rank() :: environment("WORLD_SIZE", 1)]


@contextlib.contextmanager
def torchrun_group() -> Iterator[None]:
    """The process group of torchrun's processes; nothing without torchrun.

    One process may have to wait for another that still has hours of answers to make.
    """
    if in_a_group():
        join_group("gloo", timeout=timedelta(days=30))
    yield
    # After a failure exit_code does this, once this process has said why: without the group the
    # others end at once, and torchrun then ends this one.
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


def hold_out(out: Path) -> None:
    """Makes sure, until this process ends, that no other call writes `out`. Raises InputError if
    one does."""
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    hold(out.with_name(f".{out.name}.lock"), f"--out {out}")


def append_row(out: str | Path, row: dict) -> None:
    """Appends a row to this process's part of `out`."""
    part = f"{out}.part-{rank():05d}"
    with naming(part), open(part, "ab") as file:
        file.write(json_line(row))


def parts_of(out: Path) -> list[Path]:
    """The parts of `out`, of this call or of one that was killed."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.part-{'[0-9]' * 5}"))


def read_rows(out: Path, key: str, order: Sequence) -> list[dict]:
    """All rows of `out` and its parts, in the order of their keys; of equal ones the last.

    Raises InputError, naming the line, for a row whose `key` is not one of `order`.
    """
    rows = {}
    for path in [out] * out.exists() + parts_of(out):
        for place, row in json_rows(path, key, torn=path != out):
            if row[key] not in order:
                raise InputError(f"{place}: {key} {shown(row[key])} is unknown; name another file")
            rows[row[key]] = row
    return [rows[value] for value in order if value in rows]


def join_parts(out: Path, key: str, order: Sequence) -> list[dict]:
    """Moves all rows into `out`, as `read_rows` orders them, and returns them.

    For process 0 while no process appends. A row is never lost: `out` is replaced whole before the
    parts are removed.
    """
    parts, rows = parts_of(out), read_rows(out, key, order)
    if parts or not out.exists():
        write_whole(out, b"".join(map(json_line, rows)))
    for part in parts:
        part.unlink()
    return rows


def json_rows(path: str | Path, *keys: str, torn: bool = False) -> list[tuple[str, dict]]:
    """("file:line", row) of a JSONL file. Raises InputError, naming the line, if it is not a JSON
    object with these keys. With `torn` a last line that is not JSON is left out: whoever wrote it
    was killed."""
    rows = list(read_records(path))
    if torn and rows and isinstance(rows[-1][1], ValueError):
        rows.pop()
    for place, row in rows:
        if isinstance(row, ValueError):
            raise InputError(f"{place}: {row}")
        if lacks := [key for key in keys if not isinstance(row, dict) or key not in row]:
            found = f"{', '.join(lacks)} is missing; wanted a JSON object with {', '.join(keys)}"
            raise InputError(f"{place}: {found}; found {shown(row)}")
    return rows


def write_json(path: str | Path, value: dict, *read: str | Path) -> None:
    """Writes the file of --json, and makes its directory. Raises InputError if that fails or would
    replace one of the files that were read."""
    path = Path(path)
    with naming(f"--json {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and any(path.samefile(other) for other in read):
            raise InputError(f"--json {path} is a file that was read; name another")
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            path.write_text(json.dumps(value, indent=2) + "\n")
        else:
            files.write_json(path, value)


# -------------------------------------------------------------------------------------------- flags


def named(text: str) -> tuple[str, Path]:
    """(NAME, DIR) of NAME=DIR, or ("", DIR) of a plain directory."""
    name, _, rest = text.partition("=")
    return (name, Path(rest)) if rest and not Path(text).is_dir() else ("", Path(text))


def between(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""
    most = f" and at most {high:g}" if high < math.inf else ""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high and value < math.inf:
                return value
        wanted = f"{kind.__name__}, {low:g} or more{most}"
        raise argparse.ArgumentTypeError(f"found {text}, wanted {wanted}")

    return read


def add_model_flags(command: argparse.ArgumentParser, seed_of: str) -> None:
    """--model, --device, --precision and --seed, the same for every command that loads a model."""
    add = command.add_argument
    devices, precisions = ("auto", "cpu", "cuda"), ("auto", "fp32", "bf16")
    add("--model", required=True, metavar="DIR", help="Hugging Face directory of a Llama")
    add("--device", default="auto", choices=devices, help="auto: cuda if each process has a GPU")
    add(
        "--precision",
        default="auto",
        choices=precisions,
        help="auto: bf16 on GPUs since A100, else fp32",
    )
    add("--seed", type=between(int, 0), default=0, help=f"of {seed_of} [0]")
