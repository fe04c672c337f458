"""The log-probs of the frozen starting model, computed once and kept in a file: the reference of
dpo, dpo-norm and ipo.

cached_logps                  those of all datasets of a run, from the file or computed
compute                       those of one dataset
cache_key                     names what they were made from
read_cache, write_cache       the file
"""

import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

from support.files import InputError, checksum, naming, shown, write_whole
from support.processes import StoppedError, announced, on_first_process
from support.tensors import finite, open_safetensors


@announced("computing the log-probs of the starting model")
def cached_logps(
    cache: Path, fingerprint: dict[str, str], model: nn.Module, datasets: list
) -> tuple[Tensor, ...]:
    """The reference log-probs of each dataset (see `read_cache`), from `cache`; without that file
    they are computed, checked and written. To be called on every process. Raises StoppedError if
    they are not finite.

    fingerprint: of run_directory.fingerprint; datasets: train.Dataset; model: model.Llama with the
    starting weights, which are left gathered: the caller reshards.
    """
    key, counts = cache_key(fingerprint), [len(dataset.pairs) for dataset in datasets]
    logps = on_first_process(lambda: read_cache(cache, key, sum(counts)))
    if logps is None:
        logps = torch.cat([compute(model, dataset) for dataset in datasets])
        if not finite(logps):
            raise StoppedError(
                "the starting model's log-probs are not finite, and the loss needs them"
            )
        on_first_process(lambda: write_cache(cache, key, logps))
    return logps.to(datasets[0].device).split(counts)


@torch.no_grad()
def compute(model: nn.Module, dataset) -> Tensor:
    """The log-probs of a train.Dataset, (pairs, 2, 2): [pair, chosen or rejected, mean or
    sum], equal on all processes."""
    logps = torch.zeros(len(dataset.pairs), 2, 2, device=dataset.device)
    for indexes in dataset.own_micro_batches():
        logps_B22 = torch.stack(model(dataset.batch(indexes)), -1).unflatten(0, (-1, 2))
        logps[indexes] = logps_B22[: len(indexes)]  # none of a stand-in
    dist.all_reduce(logps)
    return logps


def cache_key(fingerprint: dict[str, str]) -> str:
    """Names what a cache of reference log-probs was made from. fingerprint: of
    run_directory.fingerprint."""
    return " ".join(fingerprint.values())


def read_cache(cache: Path, key: str, pairs: int) -> Tensor | None:
    """The reference log-probs of all pairs, (pairs, 2, 2): [pair, chosen or rejected, mean or sum].

    None if the file does not exist yet. Raises InputError for the cache of another key, a file
    that is not a cache, and a directory that cannot be written.
    """
    if not cache.exists():
        if not os.access(cache.parent, os.W_OK):
            raise InputError(
                f"--reference-cache {cache}: {cache.parent} is not a directory that can be written"
            )
        return None
    with open_safetensors(cache) as file:
        metadata = file.metadata() or {}
        found = metadata.get("key")
        if found != key:
            raise InputError(
                f"{cache}: was made from other weights, pairs or precision (key {shown(found)}, "
                f"wanted {shown(key)}); name another --reference-cache"
            )
        shape = [pairs, 2, 2]
        if set(file.keys()) != {"logps"} or file.get_slice("logps").get_shape() != shape:
            raise InputError(
                f"{cache}: not a cache of reference log-probs (wanted logps of shape {shape})"
            )
        logps = file.get_tensor("logps")
    if metadata.get("checksum") != checksum({"logps": logps.tolist()}):
        raise InputError(
            f"{cache}: damaged (its checksum differs); delete it, and it is computed again"
        )
    return logps


def write_cache(cache: Path, key: str, logps: Tensor) -> None:
    """Writes what `read_cache` reads. Runs that began together may do so at the same moment, so
    each writes a file of its own and then renames it: the last one stays."""
    metadata = {"key": key, "checksum": checksum({"logps": logps.tolist()})}
    own = cache.with_name(f".{cache.name}.{platform.node()}-{os.getpid()}")
    write_whole(own, save({"logps": logps.cpu()}, metadata))
    with naming(cache):
        own.rename(cache)
