""" """

import errno
import fcntl
import hashlib
import os
from datetime import datetime
from pathlib import Path

from torch import Tensor

from model import LlamaConfig, check_weights
from support.files import InputError, checksum, files_checksum, read_json, shown
from support.processes import choose_device
from support.tensors import open_safetensors
from train import Config, Data


def claim_out(config: Config, marks: dict[str, str]) -> Path:
    """For process 0: takes the run's directory, new, or of the run to go on with, whose fingerprint must be this one's.
    Raises InputError."""
    out = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3])
    if config.resume is not None and (out / "config.json").exists():
        there = read_json(out / "config.json").get("fingerprint")
        for name in sorted(marks):
            if not isinstance(there, dict) or marks[name] != there.get(name):
                raise InputError(f"--resume {out}: other {name} than the run began with")
    elif out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
        raise InputError(
            f"--out {out} is not empty: a new run wants a fresh directory; --resume goes on with the "
            "run that is in it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        fcntl.lockf(
            os.open(out / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # until it ends
    except BlockingIOError:
        raise InputError(f"--out {out}: another process is training there") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise InputError(f"--out {out}: {error.strerror}") from None
        print(
            f"--out {out}: its disk has no locks, so a second run there would go unnoticed",
            flush=True,
        )
    return out


def fingerprint(config: Config, parts: list[Data]) -> dict[str, str]:
    """What a run's numbers depend on, its flags aside: hashes of the weights that it starts from and of the very
    tokens, and the precision."""
    files = sorted(set(check_weights(config.model, LlamaConfig.load(config.model)).values()))
    found = {"weights": files_checksum([Path(config.model) / "config.json", *files])}
    for name, part in zip(("pairs", "held-out pairs"), parts, strict=False):
        digest = hashlib.blake2b(digest_size=16)
        for ids in (
            ids for pair in part.pairs for ids in (pair.prompt, pair.chosen, pair.rejected)
        ):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        found[name] = digest.hexdigest()
    dtype = choose_device(config.device, config.precision)[1]
    return found | {"precision": str(dtype).removeprefix("torch.")}


def read_cache(cache: Path, key: str, parts: list[Data]) -> Tensor | None:
    """The reference log-probs in a --reference-cache; None where there is none yet. Raises InputError for a cache of
    another key, a file that is none, and a directory that cannot be written."""
    if not cache.exists():
        if not os.access(cache.parent, os.W_OK):
            raise InputError(
                f"--reference-cache {cache}: {cache.parent} is not a directory that can be written"
            )
        return None
    pairs = sum(len(part.pairs) for part in parts)
    with open_safetensors(cache) as file:
        metadata = file.metadata() or {}
        found = metadata.get("key")
        if found != key:
            raise InputError(
                f"{cache}: of other weights, pairs or precision (key {shown(found)}, wanted {key}); "
                "name another --reference-cache"
            )
        if set(file.keys()) != {"logps"} or file.get_slice("logps").get_shape() != [pairs, 2, 2]:
            raise InputError(
                f"{cache}: not a cache of reference log-probs (wanted logps of shape {pairs}, 2, 2)"
            )
        logps = file.get_tensor("logps")
    if metadata.get("checksum") != checksum({"logps": logps.tolist()}):
        raise InputError(
            f"{cache}: damaged (its checksum differs); delete it, and it is computed again"
        )
    return logps
