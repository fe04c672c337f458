"""Safetensors files: their headers, checked; which rows of a sharded tensor a process holds; and
tensors that go to a GPU."""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from support.files import (
    JSON_BYTES,
    InputError,
    flush,
    naming,
    read_json,
    read_start,
    shown,
    unique,
)


def on_cuda(x: Tensor) -> bool:
    """True if x is on CUDA, or stands for such a tensor: --plan simulates it with fake tensors."""
    return x.is_cuda or isinstance(x, FakeTensor)


def flash_reads(q_THK: Tensor) -> bool:
    """True if CUDA's variable-length flash kernel can read these queries. --plan simulates the
    kernel for all heads: the loop takes about as much memory."""
    return flash_fits(q_THK.dtype, q_THK.shape[-1]) or isinstance(q_THK, FakeTensor)


def flash_fits(dtype: torch.dtype, head_dim: int) -> bool:
    """True for half types and heads of 8, 16, ... 256 components. False on AMD's GPUs: some
    versions of their kernel align attention at the top left."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_dim % 8 == 0 and head_dim <= 256 and torch.version.hip is None


def moved(value, device: torch.device | str):
    """A tensor, or what has `to`, on `device`; anything else as it is. A GPU copies from pinned
    memory: from other memory the copy may begin only when its earlier work is done, and the CPU
    would wait for that."""
    if not isinstance(value, Tensor):
        return value.to(device) if hasattr(value, "to") else value
    if value.is_cpu and torch.device(device).type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """The part of a tensor that this process holds, and which rows of the whole that is."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    mesh = tensor.device_mesh  # its last axis splits rows; an axis before it holds replicas
    return tensor.to_local(), rows_of_rank(len(tensor), mesh.shape[-1], mesh.get_coordinate()[-1])


def rows_of_rank(rows: int, ranks: int, rank: int) -> slice:
    """Which of a tensor's rows a rank holds. FSDP2 splits like torch.chunk."""
    chunk = -(-rows // ranks)
    return slice(min(chunk * rank, rows), min(chunk * (rank + 1), rows))


def finite(tensor: Tensor) -> bool:
    """True if all values are finite. aminmax passes NaN on, and makes no copy of the tensor."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def open_safetensors(path: Path):
    """safe_open with one-line errors (InputError).

    The library itself checks shapes, dtypes and offsets. Checked here, before it: a Git LFS
    pointer, a key that occurs twice (taken silently) and a huge header (read for minutes).
    """
    start = read_start(path, 8 + JSON_BYTES, "a safetensors file")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` or download the file"
        )
    length = int.from_bytes(start[:8], "little")
    try:
        if length > JSON_BYTES:
            raise ValueError(f"its header would have {length:,} bytes")
        json.loads(start[8 : 8 + length], object_pairs_hook=unique)
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = shown(str(error), 150)
        raise InputError(f"{path}: truncated or not a safetensors file ({reason})") from None


class Header(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as BF16


def tensor_headers(directory: Path) -> dict[str, Header]:
    """Key -> header of all tensors of a Hugging Face directory: of model.safetensors, or of the
    files that model.safetensors.index.json names. Raises InputError if index and files differ."""
    found = {}
    for path, keys in _weight_files(directory).items():
        with open_safetensors(path) as file:
            there = set(file.keys())
            if keys is not None and there != keys:
                odd = sorted(there ^ keys)[0]
                side = "index" if odd in keys else "file"
                raise InputError(f"{path}: key {shown(odd)} is only in the {side}")
            for key in there:
                tensor = file.get_slice(key)
                found[key] = Header(path, tuple(tensor.get_shape()), tensor.get_dtype())
    return found


FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that weights may have


def check_headers(
    directory: str | Path,
    found: dict[str, Header],
    expected: dict[str, tuple[int, ...]],
    layers: int,
) -> None:
    """Raises InputError unless the tensors found in a Llama's directory are those expected (key ->
    shape), in a floating dtype, and no others. layers: as config.json says."""
    there = len({key.split(".")[2] for key in found if key.startswith("model.layers.")})
    if there and there != layers:
        raise InputError(
            f"{directory}: config.json says num_hidden_layers {layers}, "
            f"the weights have model.layers of {there}"
        )
    for key, shape in expected.items():
        if key not in found:
            names = ", ".join(sorted({header.path.name for header in found.values()})[:4])
            names = names or "files that hold no tensor"
            raise InputError(f"{directory}: key {key} is missing from {names}{_alike(key, found)}")
        path, found_shape, dtype = found[key]
        if found_shape != shape:
            raise InputError(
                f"{path}: key {key} has shape {shown(found_shape)}, config.json says {shape}"
            )
        if dtype not in FLOATS:
            floats = ", ".join(sorted(FLOATS))
            raise InputError(f"{path}: key {key} is stored as {dtype}, wanted one of {floats}")
    if extra := sorted(found.keys() - expected.keys()):
        path, key = found[extra[0]].path, shown(extra[0])
        raise InputError(f"{path}: key {key} is not one of this model's ({len(extra)} such)")


def _alike(key: str, found: Iterable[str]) -> str:
    """For a message: a found key that differs from `key` only by a prefix, as wrappers of models
    write them."""
    for other in sorted(found):
        if other.endswith(key) or key.endswith(other):
            return f", which has {shown(other)} instead: give the keys their own names"
    return ""


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the keys that the index gives it (None: a single file, without index)."""
    index_path, single = (directory / f"model.safetensors{end}" for end in (".index.json", ""))
    if not index_path.exists():
        pickles = sorted(path.name for path in directory.glob("*model*.bin"))
        if pickles and not single.exists():
            raise InputError(
                f"{directory}: has {shown(pickles[0])[1:-1]}, a pickle, and no {single.name}; "
                "pickles are never opened: save the model as safetensors, as transformers does"
            )
        return {single: None}
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index_path}: wanted a weight_map of key to file name")
    files: dict[Path, set[str] | None] = {}
    if single.exists() and single.name not in names:
        raise InputError(
            f"{directory}: has both {single.name} and {index_path.name}, which names other files; "
            "remove the weights that are not meant"
        )
    for key, name in weight_map.items():
        # A plain name. The file itself may be a link to anywhere, as in Hugging Face's cache.
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise InputError(
                f"{index_path}: key {shown(key)} lies in {shown(name)}, wanted the name of a "
                ".safetensors file in the same directory"
            )
        files.setdefault(directory / name, set()).add(key)
    return files


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> str:
    """Writes fp32 tensors as a safetensors file, flushed, and returns its checksum.

    One tensor is in memory at a time. The library's own writer needs all of them at once, and
    those of a GPU in the CPU's memory.
    """
    header, end = {}, 0
    for key, tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=16)
    with naming(path), open(path, "wb") as file, ThreadPoolExecutor(1) as thread:
        for block in (len(text).to_bytes(8, "little"), text, *(tensor for _, tensor in tensors)):
            if isinstance(block, Tensor):
                block = block.detach().cpu().flatten().numpy()
            hashed = thread.submit(digest.update, block)  # as slow as a fast disk: at the same time
            file.write(block)
            hashed.result()
    flush(path)
    return digest.hexdigest()
