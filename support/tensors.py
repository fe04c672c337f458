"""Safetensors files, and which rows of a sharded tensor a process holds."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.files import (
    JSON_BYTES,
    InputError,
    flush,
    naming,
    read_start,
    shown,
    unique,
)


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
    pointer, a key that stands twice (taken silently) and a huge header (read for minutes).
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
    with naming(path), open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *(tensor for _, tensor in tensors)):
            if isinstance(block, Tensor):
                block = block.detach().cpu().flatten().numpy()
            file.write(block)
            digest.update(block)
    flush(path)
    return digest.hexdigest()
