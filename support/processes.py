""" """

import os
import resource
import signal
import sys
import time
import typing

import torch
import torch.distributed as dist

from support.files import InputError


def complain(program: str, said: object) -> None:
    """One line on stderr, for a user. Most mistakes are found by all processes: when process 0 has said so, torchrun
    ends the others, so these wait."""
    if (rank := int(os.environ.get("RANK", 0))) > 0:
        time.sleep(10)
    print(f"{program}{f', process {rank}' * (rank > 0)}: {said}", file=sys.stderr, flush=True)


def choose_device(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Where this process computes, and the dtype of matrix products: --device auto is this process's GPU where each
    process of this machine has one, --precision auto is bf16 there and fp32 on a CPU. Makes that GPU the current one.
    Raises InputError where there is none."""
    devices, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = devices >= wanted if device == "auto" else device == "cuda"
    if cuda and devices < wanted:
        raise InputError(
            f"--device cuda for {wanted} processes, but torch finds {devices} CUDA devices"
        )
    here = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(here)
    return here, torch.bfloat16 if precision == "bf16" or (
        cuda and precision == "auto"
    ) else torch.float32


def out_of_memory(error: Exception) -> bool:
    """Whether that is what it says. A GPU's allocator raises OutOfMemoryError; a CPU's, CUDA itself and its libraries
    raise RuntimeErrors, told by their texts."""
    texts = ("can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error).lower() for text in texts
    )


class StoppedError(RuntimeError):
    """The run ends before its last step; the message says why. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def together(action: typing.Callable[[], typing.Any]) -> list:
    """What action() returns on each process, told to all; so is the first InputError (or failure to write)."""
    everywhere: list = [None] * dist.get_world_size()
    try:
        found = action()
    except InputError as error:
        found = error
    except OSError as error:
        found = InputError(f"{error.filename}: {error.strerror}")
    dist.all_gather_object(everywhere, found)
    for found in everywhere:
        if isinstance(found, InputError):
            raise found
    return everywhere


def on_first_process(action: typing.Callable[[], typing.Any]) -> typing.Any:
    """What action() returns, run by process 0 alone."""
    return together(lambda: action() if dist.get_rank() == 0 else None)[0]


class StopRequest:
    """SIGTERM and Ctrl-C, while it lasts, ask to stop after the step; a second one stops at once. But within a second
    it is the same request: a scheduler tells torchrun and its processes, and torchrun tells them again."""

    def __enter__(self) -> "StopRequest":
        self.number, self.since = 0, 0.0
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def ask(self, number: int, _frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            os._exit(128 + number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def peak_memory_gib() -> float:
    """Of this process so far (the log has the largest of all): the GPU's memory, or what is resident without one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
