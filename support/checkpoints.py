""" """

import functools
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from model import Llama
from support.files import InputError, checksum, file_checksum, flush, naming, write_whole
from support.processes import StoppedError, on_first_process, together
from support.tensors import finite, local_rows, open_safetensors, rows_of_rank, write_tensors


def trained_tensors(model: Llama, optimizer: torch.optim.AdamW) -> list[tuple[str, Tensor]]:
    """All that training changes, the step aside: fp32, sharded."""
    return [
        (f"{kind}.{name}", parameter if kind == "weight" else optimizer.state[parameter][kind])
        for name, parameter in model.named_parameters()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]


def stop_unless_finite(tensors: list[tuple[str, Tensor]], step: int) -> None:
    """Raises StoppedError everywhere, naming the tensors that hold a value that is not a finite number."""
    bad = together(lambda: [key for key, tensor in tensors if not finite(local_rows(tensor)[0])])
    if named := sorted({key for of_process in bad for key in of_process}):
        raise StoppedError(
            f"after step {step} {named[0]} is not finite ({len(named)} such tensors); not saved"
        )


def save_checkpoint(
    out: Path,
    step: int,
    identity: str,
    model: Llama,
    optimizer: torch.optim.AdamW,
    mesh: DeviceMesh,
    keep: int,
) -> None:
    """OUT/checkpoints/step-..., by all processes; then removes all but the newest `keep`. Raises StoppedError for a
    value that is not finite, and InputError where it cannot be written: the earlier ones stay whole."""
    tensors = trained_tensors(model, optimizer)
    stop_unless_finite(tensors, step)
    home, name = out / "checkpoints", f"step-{step:06d}"
    aside = home / f".{name}.partial"
    *replica, index = mesh.get_coordinate()

    def begin() -> None:
        for path in home.glob(".step-*"):  # what a run that was killed left behind
            shutil.rmtree(path)
        aside.mkdir(parents=True)

    def write() -> dict[str, str]:
        if any(replica):  # the first replica's rows are all rows
            return {}
        file = f"{index:05d}-of-{mesh.shape[-1]:05d}.safetensors"
        return {
            file: write_tensors(
                aside / file, [(key, local_rows(tensor)[0]) for key, tensor in tensors]
            )
        }

    def finish() -> None:
        for log in out.glob("*.jsonl"):
            flush(log)  # the rows of its steps must not be lost where the checkpoint is not
        files = {name: digest for of_process in digests for name, digest in of_process.items()}
        facts = {"step": step, "run": identity, "files": files}
        write_whole(
            aside / "checkpoint.json",
            json.dumps(facts | {"checksum": checksum(facts)}, indent=2) + "\n",
        )
        aside.rename(home / name)
        flush(home)
        flush(out)
        for old in checkpoints(out)[:-keep]:
            hidden = old.rename(old.with_name(f".{old.name}.old"))
            shutil.rmtree(hidden)

    try:
        on_first_process(begin)
        digests = together(write)
        on_first_process(finish)
    except InputError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


class DamagedError(InputError):
    """A checkpoint that is not what was written."""


def checkpoints(out: Path) -> list[Path]:
    """Those in OUT, newest last. A copy under another name (step-000200.bak) is none: it would count as the newest."""
    found = (path for path in (out / "checkpoints").glob("step-*") if path.name[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(out: Path, identity: str, log: "Log") -> tuple[Path | None, dict]:
    """The newest checkpoint that is whole, byte for byte, and its checkpoint.json; (None, {"step": 0}) where there is
    none at all. Newer ones are named and set aside. Raises InputError where none is whole, one cannot be read, or it is
    another run's."""
    found = on_first_process(lambda: checkpoints(out))[::-1]
    for i, path in enumerate(found):
        try:
            facts = together(functools.partial(checked_facts, path))[0]
        except DamagedError as error:
            log.say(f"{error}; trying the checkpoint before")
            continue
        if facts.get("run") != identity:
            raise InputError(
                f"{path}: of a run with other flags, pairs or weights than {out / 'config.json'} says"
            )
        for bad in found[:i] if dist.get_rank() == 0 else ():
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
        return path, facts
    if found:
        raise InputError(f"{out / 'checkpoints'}: none of {len(found)} checkpoints is whole")
    return None, {"step": 0}


def checked_facts(path: Path) -> dict:
    """A checkpoint's checkpoint.json; each process checks its share of the files. Raises DamagedError naming one."""
    name = "checkpoint.json"
    try:
        facts = json.loads((path / name).read_bytes())
        if facts.pop("checksum") != checksum(facts):
            raise ValueError("its checksum differs")
        if path.name != f"step-{facts['step']:06d}" or any("/" in file for file in facts["files"]):
            raise ValueError("it is another directory's")
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
        raise DamagedError(
            f"{path / name}: damaged ({getattr(error, 'strerror', None) or error})"
        ) from None
    return facts


def load_checkpoint(path: Path, facts: dict, model: Llama, optimizer: torch.optim.AdamW) -> None:
    """Fills weights and moments, each process its own rows, from a checkpoint of any number of processes. Raises
    InputError where a tensor is not there or has another shape."""
    paths = [path / name for name in sorted(facts["files"])]
    files = [open_safetensors(path) for path in paths]
    for key, tensor in trained_tensors(model, optimizer):
        local, rows = local_rows(tensor.detach())
        for i, file in enumerate(files):
            stored = rows_of_rank(len(tensor), len(files), i)
            first, last = max(rows.start, stored.start), min(rows.stop, stored.stop)
            if first < last:
                with naming(paths[i]):
                    part = file.get_slice(key)
                if part.get_shape() != [stored.stop - stored.start, *tensor.shape[1:]]:
                    raise InputError(
                        f"{paths[i]}: {key} has shape {part.get_shape()}, which is not this model's"
                    )
                local[first - rows.start : last - rows.start] = part[
                    first - stored.start : last - stored.start
                ]
    for state in optimizer.state.values():
        state["step"].fill_(facts["step"])
