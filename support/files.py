"""Reading files that may hold anything, and writing files that are complete or absent.

Nothing that is read can execute code: JSON, safetensors and tokenizer.json hold only data, and
pickles are never opened. Each reader checks the size that a file claims before it allocates it.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from support import notice

# The most that a config.json, an index or a safetensors header may have. Llama 405B's have a
# quarter of it.
JSON_BYTES = 2**19


class InputError(ValueError):
    """A user's mistake. One line: what was found, what was wanted, and where (file and line, or
    file and key)."""


def shown(value: object, most: int = 60) -> str:
    """A value from a file as a message shows it: short, printable, on one line."""
    text = ascii(value)
    return text if len(text) <= most else text[: most - 3] + "..."


# ------------------------------------------------------------------------------------- reading


def read_start(path: Path, limit: int, wanted: str) -> bytes:
    """The first `limit` bytes of a file, or all of it if limit is -1.

    Raises InputError if the path is not a regular file. A pipe is not enough: every process reads
    the file for itself.
    """
    if "\0" in str(path):
        raise InputError(f"{shown(str(path))}: a null byte in a file's name; wanted {wanted}")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: a directory, a pipe or a device; wanted {wanted}")
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; wanted {wanted}") from None


def read_json(path: Path, wanted: str = "a Hugging Face model directory"):
    """A parsed JSON file of at most half a megabyte. Raises InputError if it is missing, larger
    or not JSON; `wanted` ends the message."""
    raw = read_start(path, JSON_BYTES + 1, wanted)
    if len(raw) > JSON_BYTES:
        raise InputError(f"{path}: more than {JSON_BYTES:,} bytes; wanted {wanted}")
    try:
        return json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, as json's object_pairs_hook. Raises ValueError if a key occurs twice: Python
    silently takes the last one, other readers the first."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} stands twice in one object")
        found[key] = value
    return found


# ------------------------------------------------------------------------------------- writing


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns a failure to write (no space, no permission) into an InputError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def flush(path: Path) -> None:
    """Makes a written file, or a directory's entries, survive a power cut.

    Raises InputError if that fails: some disks only say here that they are full.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file. At every moment it holds the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with naming(path):
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(aside)
        aside.rename(path)
        flush(path.parent)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file that people can read, whole."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def hold(path: Path, what: str) -> None:
    """Locks a file, which it makes, until this process ends. `what` begins the messages. Raises
    InputError if another process holds it. Prints a line if its disk has no locks."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{what}: another process is writing there") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise InputError(f"{what}: {error.strerror}") from None
        notice(f"{what}: its disk has no locks, so a second process there would go unnoticed")


# ----------------------------------------------------------------------------------- checksums


def checksum(facts: dict) -> str:
    """Hash of a JSON object, independent of key order."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_checksum(path: str | Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def files_checksum(paths: Iterable[str | Path]) -> str:
    """Hash of the contents of several files, in this order, read in parallel. A missing file has a
    hash of its own kind."""
    with ThreadPoolExecutor() as threads:
        found = threads.map(
            lambda path: file_checksum(path) if Path(path).exists() else "none", paths
        )
    return hashlib.blake2b(" ".join(found).encode(), digest_size=16).hexdigest()
