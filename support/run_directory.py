"""OUT, the directory of a run: its lock, its fingerprint, config.json.

fingerprint              hashes of all that a run's numbers depend on, besides its flags
identity                 a hash of that and of the flags that a resumed run must share
open_run, claim_out      create OUT, or check that it holds the run to resume; lock it
check_shared, record     whether every process reaches OUT; OUT/config.json
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import (
    InputError,
    checksum,
    files_checksum,
    hold,
    naming,
    read_json,
    write_whole,
)
from support.flags import MAY_CHANGE
from support.processes import (
    agree,
    announced,
    choose_device,
    describe_tasks,
    environment,
    on_first_process,
    together,
)
from support.reference import cache_key, read_cache


def fingerprint(weights: str, parts: Sequence[Sequence], dtype: torch.dtype) -> dict[str, str]:
    """What a run's numbers depend on, besides its flags: the checksum of the files of the starting
    weights, hashes of the token ids of each list of pairs (training, held-out), and the dtype of
    matrix products."""
    found = {"weights": weights}
    for name, pairs in zip(("pairs", "held-out pairs"), parts, strict=False):
        digest = hashlib.blake2b(digest_size=16)
        for pair in pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        found[name] = digest.hexdigest()
    return found | {"precision": str(dtype).removeprefix("torch.")}


def identity(config, marks: dict[str, str]) -> str:
    """Names the run in its checkpoints. config: train.Config; marks: of `fingerprint`."""
    fixed = {name: value for name, value in vars(config).items() if name not in MAY_CHANGE}
    return checksum(marks | fixed)


def open_run(config, weights: dict[str, Path], datasets: list) -> tuple[Path, dict[str, str]]:
    """Returns the run's directory, locked, and its fingerprint. To be called on every process.

    Raises InputError as `claim_out` does, if a process does not see OUT, and before OUT is made if
    a machine has other weights or pairs, or if --reference-cache is a cache of something else.
    config: train.Config; weights: key -> its file; datasets: train.Dataset."""
    pairs = [dataset.pairs for dataset in datasets]
    files = [Path(config.model) / "config.json", *sorted(set(weights.values()))]
    dtype = choose_device(config.device, config.precision)[1]
    reads = dist.get_rank() == 0 or environment("LOCAL_RANK", 0) == 0  # one of each machine
    with announced("computing checksums of weights and pairs"):
        checksums = together(lambda: files_checksum(files) if reads else None)
        own = checksums[dist.get_rank()] or checksums[0]
        found = agree(lambda: fingerprint(own, pairs, dtype))
    precompute = config.loss_row.reference and config.reference == "precompute"
    if precompute and config.reference_cache:
        cache, count = Path(config.reference_cache), sum(map(len, pairs))
        on_first_process(lambda: read_cache(cache, cache_key(found), count))
    resume = config.resume is not None
    out = on_first_process(lambda: claim_out(config.out, resume, found))
    check_shared(out)
    return out, found


def claim_out(out: str | None, resume: bool, wanted: dict[str, str]) -> Path:
    """Creates the run directory, or checks that it holds the run to resume, whose fingerprint must
    be the one wanted. Locks it until this process ends. On process 0 only. Raises InputError."""
    path = Path(out or f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3])
    if resume and (path / "config.json").exists():
        there = read_json(path / "config.json", "a run").get("fingerprint")
        for name in sorted(wanted):
            if not isinstance(there, dict) or wanted[name] != there.get(name):
                raise InputError(f"--resume {path}: the {name} differ from those it began with")
    elif path.exists() and (not path.is_dir() or any(p.name[0] != "." for p in path.iterdir())):
        raise InputError(
            f"--out {path} is not empty: a new run needs a fresh directory; --resume continues "
            f"the run that is in it{describe_tasks()}"
        )
    with naming(f"--out {path}"):
        path.mkdir(parents=True, exist_ok=True)
    hold(path / ".lock", f"--out {path}")
    return path


def check_shared(out: Path) -> None:
    """Raises InputError on all processes if one of them does not see OUT or cannot write there."""
    # A new name: .lock may be there from an earlier run, also on a machine's own disk. Only the
    # name is passed on: since Python 3.12 mkdtemp returns an absolute path.
    mark = out / on_first_process(lambda: Path(tempfile.mkdtemp(prefix=".shared-", dir=out)).name)

    def reach() -> bool:
        if seen := mark.exists():
            with naming(f"--out {out}: process {dist.get_rank()} cannot write there"):
                (mark / str(dist.get_rank())).touch()
        return seen

    try:
        seen = together(reach)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(mark, ignore_errors=True)
    if not all(seen):
        raise InputError(
            f"--out {out}: process {seen.index(False)} does not see it; all processes need one "
            "directory on a shared disk"
        )


def record(out: Path, facts: dict, replace: bool = True) -> None:
    """Writes OUT/config.json on process 0; without `replace`, only if it is not there. To be called
    on every process."""
    path, text = out / "config.json", json.dumps(facts, indent=2) + "\n"
    on_first_process(lambda: (path.exists() and not replace) or write_whole(path, text))
