""" """

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from support.files import JSON_BYTES, InputError, flush, naming, read_start, shown, unique


def open_safetensors(path: Path):
    """safe_open, with errors that a user can act on. It checks what a header says of shapes, dtypes and offsets; here,
    before it, what it would take silently (a key twice) or at length (a header of up to 100 MB)."""
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
        raise InputError(
            f"{path}: truncated or not a safetensors file ({shown(str(error), 150)})"
        ) from None


def finite(tensor: Tensor) -> bool:
    """Whether every number of it is. aminmax passes NaN on, and makes no copy of the tensor's size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """What this rank holds of a tensor, and which rows of the whole that is."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    mesh = tensor.device_mesh  # its last axis splits rows; one before it holds replicas
    return tensor.to_local(), rows_of_rank(len(tensor), mesh.shape[-1], mesh.get_coordinate()[-1])


def rows_of_rank(rows: int, ranks: int, rank: int) -> slice:
    """Which of a tensor's rows a rank holds: FSDP2 splits like torch.chunk."""
    chunk = -(-rows // ranks)
    return slice(min(chunk * rank, rows), min(chunk * (rank + 1), rows))


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> str:
    """Writes fp32 tensors as a safetensors file, to the disk, and returns its checksum. One tensor at a time: the
    library's own writer wants all of them in memory at once, and a GPU's in the CPU's."""
    header, end = {}, 0
    for key, tensor in tensors:
        header[key] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b(digest_size=16)
    with naming(path), open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text, *(tensor for _, tensor in tensors)):
            block = block.detach().cpu().flatten().numpy() if isinstance(block, Tensor) else block
            file.write(block)
            digest.update(block)
    flush(path)
    return digest.hexdigest()
