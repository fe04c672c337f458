"""The records of a data file, each with its place: JSONL or a JSON array, plain or gzipped.

A line that is not a JSON record becomes a complaint with file and line. A file without readable
lines is refused, and named if its format is known.
"""

import codecs
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path

from support.files import InputError, read_start, unique


def read_records(path: str | Path) -> Iterator[tuple[str, object]]:
    """The records of a JSONL file or of a JSON array, plain or gzipped, each with its place.

    A place is "file:line", or "file: record 3" (from 1) in an array. A line that cannot be parsed
    yields a ValueError as its record, so that the caller may skip it. Raises InputError for a file
    that has no readable lines, and for a broken array, which has no lines to skip.
    """
    raw = unpacked(path, read_start(Path(path), -1, "a JSONL or JSONL.gz file"))
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if raw.lstrip()[:1] == b"[":
        try:
            records = parse_json(raw)
        except ValueError as error:
            raise InputError(f"{path}: not a JSON array of records ({error})") from None
        yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
        return
    for number, line in enumerate(io.BytesIO(raw), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            record = error
        yield f"{path}:{number}", record


BAD_LINES_SHOWN = 20


def bad_lines_error(bad: list[str], read: int) -> InputError:
    """Places and faults of the first 20 bad records, of so many that were read."""
    lines = bad[:BAD_LINES_SHOWN]
    if len(bad) > BAD_LINES_SHOWN:
        lines.append(f"... and {len(bad) - BAD_LINES_SHOWN} more")
    advice = "fix them, or pass --skip-bad-lines"
    if len(bad) == read:
        advice = "docs/data-formats.md shows the forms that are read"
    return InputError("\n".join([*lines, f"{len(bad)} bad of {read} records; {advice}"]))


def parse_json(raw: bytes) -> object:
    """The value of a JSON text. ValueError if it is not one, or has a key twice in an object."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ValueError(f"not UTF-8 (byte {error.start} is 0x{byte:02x})") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def unpacked(path: str | Path, raw: bytes) -> bytes:
    """The bytes of a file, unpacked if they are gzip's. InputError if they do not unpack, or are
    those of another format."""
    zipped = raw[:2] == b"\x1f\x8b"
    if zipped:
        limit = max(2**24, 100 * len(raw))  # text shrinks to a tenth, a bomb to a thousandth
        try:
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: {error}; wanted a JSONL or JSONL.gz file") from None
        if len(raw) > limit:
            raise InputError(
                f"{path}: unpacks to over {limit:,} bytes, a hundred times its own size; "
                "unpack it first"
            )
    name, command = other_format(raw) or (None, None)
    if name is None:
        return raw
    if zipped:
        name, command = f"{name}, gzipped", "gzip -dc {old} > {new}"
    python = command.startswith("import ")
    quote = json.dumps if python else shlex.quote
    command = command.replace("{old}", quote(str(path))).replace("{new}", quote(f"{path}.jsonl"))
    if python:
        command = f"python -c {shlex.quote(command)}"
    raise InputError(f"{path}: {name}, wanted JSONL in UTF-8; convert it: {command}")


PANDAS = 'import pandas; pandas.{}({{old}}{}).to_json({{new}}, orient="records", lines=True)'
DATASETS = "import datasets; datasets.Dataset.from_file({old}).to_json({new})"
ICONV = "iconv -f {} -t UTF-8 {{old}} > {{new}}"
# How files of other formats begin, what they are, and the command that converts them.
FORMATS = [
    (b"PAR1", "Parquet", PANDAS.format("read_parquet", "")),
    (b"ARROW1", "Feather", PANDAS.format("read_feather", "")),
    (b"\xff\xff\xff\xff", "Arrow", DATASETS),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc {old} > {new}"),
    (b"\xfd7zXZ\0", "xz", "xz -dc {old} > {new}"),
    (b"PK\x03\x04", "zip", "unzip -p {old} > {new}"),
    (b"BZh", "bzip2", "bzip2 -dc {old} > {new}"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc {old} > {new}"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x -so {old} > {new}"),
    (b"version https://git-lfs", "a pointer of Git LFS", "git lfs pull --include {old}"),
    (codecs.BOM_UTF32_LE, "UTF-32", ICONV.format("UTF-32")),  # begins with UTF-16's
    (codecs.BOM_UTF32_BE, "UTF-32", ICONV.format("UTF-32")),
    (codecs.BOM_UTF16_LE, "UTF-16", ICONV.format("UTF-16")),
    (codecs.BOM_UTF16_BE, "UTF-16", ICONV.format("UTF-16")),
    *((start.encode("utf-16-le"), "UTF-16", ICONV.format("UTF-16LE")) for start in '{["'),
    *((start.encode("utf-16-be"), "UTF-16", ICONV.format("UTF-16BE")) for start in '{["'),
]
COLUMNS = {b"prompt", b"chosen", b"rejected", b"instruction", b"messages", b"conversations"}


def other_format(raw: bytes) -> tuple[str, str] | None:
    """(name, command that converts it) if the bytes are of a known format that is not JSON."""
    for start, name, command in FORMATS:
        if raw.startswith(start):
            return name, command
    if raw[257:262] == b"ustar":
        return "tar", "tar -xOf {old} > {new}"
    first = raw[:10_000].partition(b"\n")[0].removeprefix(codecs.BOM_UTF8)
    names = {name.strip(b'" \r') for name in re.split(rb"[,\t]", first)}
    if first[:1] not in (b"{", b"[") and len(names) > 1 and names & COLUMNS and not is_json(first):
        separator = r', sep="\t"' if b"\t" in first else ""
        return "CSV", PANDAS.format("read_csv", separator)
    return None


def is_json(raw: bytes) -> bool:
    try:
        parse_json(raw)
    except ValueError:
        return False
    return True
