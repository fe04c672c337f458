"""The records of a data file, each with its place: JSONL or a JSON array, plain or gzipped.

Anything may be in such a file. What is not a JSON record becomes a complaint with file and line;
what has no readable lines at all is refused.
"""

import codecs
import gzip
import io
import json
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
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise InputError(f"{path}: UTF-16, wanted UTF-8")
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


def unpacked(path: str | Path, raw: bytes) -> bytes:
    """The bytes of a file, unzipped if they are gzip's. InputError if they do not unpack."""
    if raw[:2] != b"\x1f\x8b":
        return raw
    limit = max(2**24, 100 * len(raw))  # text shrinks to a tenth, a bomb to a thousandth
    try:
        text = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {error}; wanted a JSONL or JSONL.gz file") from None
    if len(text) > limit:
        raise InputError(
            f"{path}: unpacks to over {limit:,} bytes, a hundred times its own size; "
            "unpack it first"
        )
    return text


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
