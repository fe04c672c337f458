""" """

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class InputError(ValueError):
    """A user's mistake. One line: what was found, what was wanted, and where (file and line, or file and key)."""


# Nothing that is read can execute code: JSON, safetensors and tokenizer.json hold no more than data, and pickles are
# never opened. Each reader checks what a file claims before it makes anything of that size.
JSON_BYTES = (
    2**19
)  # of config.json, an index or a safetensors header; those of Llama 405B take a quarter


def read_start(path: Path, limit: int, wanted: str) -> bytes:
    """The first `limit` bytes of a file, all if -1. InputError where there is none; a pipe is none, since every process
    reads for itself."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: a directory, a pipe or a device; wanted {wanted}")
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; wanted {wanted}") from None


def read_json(path: Path, wanted: str = "a Hugging Face model directory"):
    """A parsed JSON file of at most half a megabyte; InputError where it is missing, larger or not JSON."""
    raw = read_start(path, JSON_BYTES + 1, wanted)
    if len(raw) > JSON_BYTES:
        raise InputError(f"{path}: more than {JSON_BYTES:,} bytes; wanted {wanted}")
    try:
        return json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. ValueError where it has a key twice: Python takes the last one unsaid, other readers the first."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} stands twice in one object")
        found[key] = value
    return found


def shown(value: object, most: int = 60) -> str:
    """A value out of a file as a message shows it: short, printable, on one line."""
    text = ascii(value)
    return text if len(text) <= most else text[: most - 3] + "..."


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failure to write (no room, no rights) becomes an InputError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def flush(path: Path) -> None:
    """Makes a written file, or a directory's entries, survive a power cut. Raises InputError where it cannot: some say
    only here that they are full."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_checksum(path: str | Path) -> str:
    """A hash of what a file holds."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def files_checksum(paths: Iterable[str | Path]) -> str:
    """A hash of what several hold, in this order; of one that is not there, that it is not. They are read at once."""
    with ThreadPoolExecutor() as threads:
        found = threads.map(
            lambda path: file_checksum(path) if Path(path).exists() else "none", paths
        )
    return hashlib.blake2b(" ".join(found).encode(), digest_size=16).hexdigest()


def checksum(facts: dict) -> str:
    """Of what a JSON object says, in whatever order."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file: it holds the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with naming(path):
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(aside)
        aside.rename(path)
        flush(path.parent)
