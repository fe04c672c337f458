"""OUT/checkpoints: all that training changes, written whole, checked byte for byte, resumed.

OUT/checkpoints/step-000200/ holds a safetensors file for each process of the first replica, with
its rows of every weight and moment in fp32, and checkpoint.json with their checksums. It is written
under a hidden name and renamed when all of it is on the disk, so a directory with this name is
whole unless the disk damaged it. Nothing in it can execute.

OUT/checkpoints/best-000120/ is the same, with weights only (support/best.py).

All functions here but `checkpoints` must be called on every process.

    save_checkpoint       written by all processes; then the oldest is removed
    newest_checkpoint     the newest one that is whole; damaged ones are reported and renamed
    load_checkpoint       each process fills its own rows, from any number of files

torch's HuggingFaceStorageWriter reshards as well, but it holds a rank's whole shard in host memory
(96 GB for 8B on one GPU) and has no checksums. That is why this file exists.
"""

import contextlib
import functools
import json
import math
import shutil
import tempfile
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from support import notice
from support.files import InputError, checksum, file_checksum, flush, naming, write_whole
from support.processes import StoppedError, announced, on_first_process, together
from support.tensors import finite, local_rows, open_safetensors, rows_of_rank, write_tensors

FACTS = "checkpoint.json"


class DamagedError(InputError):
    """A checkpoint that is not what was written."""


Tensors = list[tuple[str, Tensor]]  # each with its key in a checkpoint's files


def trained_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> Tensors:
    """All that training changes except the step number: fp32, sharded."""
    tensors = []
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        tensors += [
            (f"weight.{name}", parameter),
            (f"exp_avg.{name}", moments["exp_avg"]),
            (f"exp_avg_sq.{name}", moments["exp_avg_sq"]),
        ]
    return tensors


def stop_unless_finite(tensors: Tensors, step: int) -> None:
    """Raises StoppedError on all processes if a tensor holds a NaN or an infinity, naming it."""
    bad = together(lambda: [key for key, tensor in tensors if not finite(local_rows(tensor)[0])])
    if named := sorted({key for of_process in bad for key in of_process}):
        raise StoppedError(
            f"after step {step} {named[0]} is not finite ({len(named)} such tensors); not saved"
        )


def save_checkpoint(
    out: Path,
    step: int,
    identity: str,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    mesh: DeviceMesh,
    keep: int,
) -> None:
    """Writes OUT/checkpoints/step-..., then removes all but the newest `keep`.

    `identity` names the run: only that run resumes from it. Raises StoppedError for a value that
    is not finite, and InputError if it cannot be written; earlier checkpoints stay whole.
    """
    facts = {"step": step, "run": identity}
    write_checkpoint(out, "step", facts, trained_tensors(model, optimizer), mesh)
    on_first_process(lambda: retire(checkpoints(out)[:-keep]))


@announced("writing a checkpoint")
def write_checkpoint(out: Path, kind: str, facts: dict, tensors: Tensors, mesh: DeviceMesh) -> None:
    """Writes OUT/checkpoints/KIND-..., with these facts in its checkpoint.json. Raises as
    `save_checkpoint`."""
    stop_unless_finite(tensors, facts["step"])
    home, name = out / "checkpoints", f"{kind}-{facts['step']:06d}"
    *replica, index = mesh.get_coordinate()

    def begin() -> Path:
        for path in home.glob(f".{kind}-*"):  # left behind by a run that was killed
            remove(path)
        home.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=home))
        with contextlib.suppress(OSError):  # some network disks have no modes
            aside.chmod(0o755)  # mkdtemp lets only the owner in
        return aside

    def write() -> dict[str, str]:
        if any(replica):  # all replicas hold the same rows; the first one writes them
            return {}
        file = f"{index:05d}-of-{mesh.shape[-1]:05d}.safetensors"
        rows = [(key, local_rows(tensor)[0]) for key, tensor in tensors]
        return {file: write_tensors(aside / file, rows)}

    def finish() -> None:
        for log in out.glob("*.jsonl"):  # a checkpoint's steps must never be missing from the log
            flush(log)
        files = {file: digest for of_process in digests for file, digest in of_process.items()}
        written = facts | {"files": files}
        written |= {"checksum": checksum(written)}
        write_whole(aside / FACTS, json.dumps(written, indent=2) + "\n")
        aside.rename(home / name)
        flush(home)
        flush(out)

    aside = on_first_process(begin)
    try:
        digests = together(write)
        on_first_process(finish)
    except InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def retire(old: list[Path]) -> None:
    """Removes checkpoints. If that fails for one, it is printed."""
    for path in old:
        # Renamed first: a directory that is half removed must not count as a checkpoint.
        try:
            remove(path.rename(path.with_name(f".{path.name}.old")))
        except OSError as error:
            notice(f"\n{path}: not removed ({error.strerror}); the run goes on")


def remove(path: Path) -> None:
    """Removes a directory as far as possible. A file in it that another process reads may have to
    stay, for example on NFS: that is printed, and it is tried again at the next checkpoint."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        notice(f"\n{path}: not removed ({error.strerror or error})")


def checkpoints(out: Path, kind: str = "step") -> list[Path]:
    """The checkpoints in OUT, newest last. A copy under another name (step-000200.bak) is not one
    of them: it would count as the newest."""
    paths = (out / "checkpoints").glob(f"{kind}-*")
    found = {path: path.name.removeprefix(f"{kind}-") for path in paths}
    steps = {path: int(step) for path, step in found.items() if step.isdecimal()}
    return sorted(steps, key=steps.get)


def newest_checkpoint(
    out: Path, identity: str, say: typing.Callable[[str], None]
) -> tuple[Path | None, dict]:
    """The newest checkpoint that is whole, and its checkpoint.json; (None, {"step": 0}) if OUT has
    no checkpoint.

    Newer ones are reported with `say` and renamed damaged-step-... Raises InputError if no
    checkpoint is whole, if one cannot be read, or if it belongs to another run.
    """
    found = on_first_process(lambda: checkpoints(out))[::-1]
    for i, path in enumerate(found):
        try:
            facts = together(functools.partial(checked_facts, path))[0]
        except DamagedError as error:
            say(f"{error}; trying the checkpoint before")
            continue
        check_run(path, facts, identity)
        on_first_process(lambda bad=found[:i]: [set_aside(path) for path in bad])
        return path, facts
    if found:
        raise InputError(
            f"{out / 'checkpoints'}: none of {len(found)} checkpoints is whole; to begin again, "
            "name a fresh --out"
        )
    return None, {"step": 0}


def set_aside(bad: Path) -> None:
    """Renames a damaged checkpoint, so that it no longer counts as one."""
    aside = bad.with_name(f"damaged-{bad.name}")
    shutil.rmtree(aside, ignore_errors=True)
    bad.rename(aside)


def check_run(path: Path, facts: dict, identity: str) -> None:
    """Raises InputError if another run wrote the checkpoint."""
    if facts.get("run") != identity:
        raise InputError(
            f"{path}: belongs to a run with other flags, pairs or weights than "
            f"{path.parents[1] / 'config.json'}"
        )


@announced("computing a checkpoint's checksums")
def checked_facts(path: Path) -> dict:
    """A checkpoint's checkpoint.json. Each process verifies the checksums of its share of the
    files. Raises DamagedError, naming the file."""
    name = FACTS
    try:
        facts = json.loads((path / name).read_bytes())
        if facts.pop("checksum") != checksum(facts):
            raise ValueError("its checksum differs")
        kind = "best" if math.isfinite(facts.get("value", math.nan)) else "step"
        name_of = f"{kind}-{facts['step']:06d}"
        if path.name != name_of or any("/" in file for file in facts["files"]):
            raise ValueError("it belongs to another directory")
        if not facts["files"]:
            raise ValueError("it names no file")
        for name in sorted(facts["files"])[dist.get_rank() :: dist.get_world_size()]:
            if file_checksum(path / name) != facts["files"][name]:
                raise ValueError("its checksum differs")
    except (
        FileNotFoundError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedError(f"{path / name}: damaged ({reason})") from None
    return facts


def load_checkpoint(
    path: Path, facts: dict, model: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    """Fills weights and moments from a checkpoint, as `fill`."""
    fill(trained_tensors(model, optimizer), path, facts)
    for state in optimizer.state.values():
        state["step"].fill_(facts["step"])


@announced("reading a checkpoint")
def fill(tensors: Tensors, path: Path, facts: dict) -> None:
    """Fills tensors from a checkpoint that any number of processes wrote; each process reads its
    own rows. Raises InputError if a tensor is missing or has another shape."""
    paths = [path / name for name in sorted(facts["files"])]
    files = [open_safetensors(path) for path in paths]
    for key, tensor in tensors:
        local, rows = local_rows(tensor.detach())
        for i, file in enumerate(files):
            stored = rows_of_rank(len(tensor), len(files), i)
            first, last = max(rows.start, stored.start), min(rows.stop, stored.stop)
            if first >= last:
                continue
            with naming(paths[i]):
                part = file.get_slice(key)
            if part.get_shape() != [stored.stop - stored.start, *tensor.shape[1:]]:
                raise InputError(
                    f"{paths[i]}: {key} has shape {part.get_shape()}, which is not this model's"
                )
            part = part[first - stored.start : last - stored.start]
            local[first - rows.start : last - rows.start] = part
