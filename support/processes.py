"""Devices, agreement between processes, signals and exit codes.

choose_device, out_of_memory, peak_memory_gib    the device and its memory
environment, join_group, start, refuse_restart   torchrun's process group, or one of one
together, on_first_process, agree                actions whose failure all processes learn of
announced, every_two_seconds                     lines for what takes longer than 2 s
StopRequest, StoppedError, stop_non_finite       a run that ends before its last step
complain, exit_code, leave                       one line and an exit code for every end
"""

import contextlib
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from support import notice
from support.files import InputError, shown
from support.flags import PATHS, spell

# -------------------------------------------------------------------------------------- devices


def choose_device(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """This process's device, and the dtype of matrix products.

    --device auto is CUDA if every process of this machine has a GPU, else the CPU. --precision
    auto is bf16 on GPUs that compute in it, else fp32. Makes the GPU the current one. Raises
    InputError if --device cuda is asked for and there are too few GPUs, or if bf16 is asked for and
    this process's GPU does not compute in it.
    """
    found, needed = torch.cuda.device_count(), environment("LOCAL_WORLD_SIZE", 1)
    cuda = device == "cuda" or (device == "auto" and found >= needed)
    if cuda and found < needed:
        raise InputError(f"--device cuda for {needed} processes, but torch finds {found} GPUs")
    half = precision == "bf16" or (precision == "auto" and cuda)
    here = torch.device("cpu")
    if cuda:
        # Without LOCAL_RANK, all processes of a machine would take the first of its GPUs. Launchers
        # that do not set it show each process one GPU.
        several = in_a_group() and found > 1
        here = torch.device("cuda", environment("LOCAL_RANK", None if several else 0))
        torch.cuda.set_device(here)
        # Before 8.0 a GPU has no bf16, and the flash kernel does not run on it.
        major, minor = torch.cuda.get_device_capability(here)
        if precision == "bf16" and major < 8:
            raise InputError(
                f"--precision bf16 needs a GPU of compute capability 8.0 or more (A100 and newer); "
                f"{torch.cuda.get_device_name(here)} has {major}.{minor}: pass --precision fp32"
            )
        half = half and major >= 8
    return here, torch.bfloat16 if half else torch.float32


def out_of_memory(error: Exception) -> bool:
    """True if this error means exhausted memory. A GPU's allocator raises OutOfMemoryError; the
    CPU's allocator, CUDA itself and its libraries raise RuntimeErrors, known by their texts."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("can't allocate memory", "out of memory", "alloc_failed")
    return any(text in str(error).lower() for text in texts)


def peak_memory_gib() -> float:
    """Peak memory of this process so far: of the GPU, or on a CPU the resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------ agreement


def environment(name: str, default: int | None = None) -> int:
    """A whole number that torchrun sets. InputError if it is another text, or missing and without a
    default."""
    value = os.environ.get(name) or None
    if value is None and default is not None:
        return default
    if value is None or not (value.isascii() and value.isdigit()):
        found = "missing" if value is None else repr(value)
        raise InputError(
            f"{name} is {found} in the environment, wanted a whole number: torchrun sets RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without it, unset them"
        )
    return int(value)


def is_first() -> bool:
    """True on process 0, which prints; also before it has joined its group."""
    return (dist.get_rank() if dist.is_initialized() else environment("RANK", 0)) == 0


def in_a_group() -> bool:
    """True if the environment says that this is one process of a group."""
    return bool(os.environ.get("RANK")) or environment("WORLD_SIZE", 1) > 1


# Who started a process, and where it says how many it started.
LAUNCHERS = (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE"))
LAUNCHERS += (("mpirun", "PMI_SIZE"),)


def describe_tasks() -> str:
    """Says if srun or mpirun started several processes, which do not know of each other."""
    for launcher, name in LAUNCHERS:
        tasks = os.environ.get(name, "1")
        if dist.get_world_size() == 1 and tasks != "1":
            return f". {launcher} started {tasks} processes: only torchrun would join them"
    return ""


def join_group(backend: str, **options) -> None:
    """Joins the process group that torchrun made, or makes a group of one. Options as of
    torch.distributed.init_process_group. Raises InputError if the environment names only a part of
    a group, or an address that is taken."""
    rank, world = 0, 1
    if in_a_group():
        rank, world = environment("RANK"), environment("WORLD_SIZE")
        if rank >= world:
            raise InputError(f"RANK is {rank} in the environment, but WORLD_SIZE is {world}")
    # One process of each machine, whose user may not see the others' output.
    speaks = world > 1 and environment("LOCAL_RANK", rank) == 0
    with announced(f"waiting for all {world} processes", speaks):
        store = common_store() if in_a_group() else dist.HashStore()
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, **options)
        except RuntimeError as error:
            if another_ended(error):
                raise
            # Such as a network interface that does not exist.
            raise InputError(f"no process group: {shown(str(error).strip(), 250)}") from None


def common_store() -> dist.Store:
    """The store through which the processes of a group find each other."""
    address, port = os.environ.get("MASTER_ADDR") or "missing", environment("MASTER_PORT")
    try:
        store, _, _ = next(rendezvous("env://"))
    except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:
        first = shown(str(error).splitlines()[0], 250)
        raise InputError(f"MASTER_ADDR {address}, MASTER_PORT {port}: {first}") from None
    # torchrun keeps its store when it restarts processes, with the dead ones' addresses in it.
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)


def start(config) -> DeviceMesh:
    """Joins the process group that torchrun made, or a group of one. Returns the mesh to shard
    over: one axis, or with --replicas (replicate, shard). config: train.Config. Raises InputError
    if --replicas does not divide the number of processes, or if a process was given other flags."""
    device = choose_device(config.device, config.precision)[0].type
    # Saturated losses give subnormal gradients, which make a CPU ten times slower.
    torch.set_flush_denormal(True)
    # Longer than torch's half hour: one process may write or read a whole model on a slow disk.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    join_group(backend, timeout=timedelta(hours=2))
    flags = {spell(name): value for name, value in vars(config).items()}
    # A machine may have its own paths.
    flags |= {spell(name): "given" for name in PATHS if getattr(config, name) is not None}
    agree(lambda: flags)
    world, replicas = dist.get_world_size(), config.replicas
    if world % replicas:
        raise InputError(f"--replicas {replicas} does not divide {world} processes")
    if replicas == 1:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    shape = (replicas, world // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def refuse_restart(resume: bool) -> None:
    """Raises InputError if torchrun has restarted this program, which was not told to resume."""
    if not resume and environment("TORCHELASTIC_RESTART_COUNT", 0):
        raise InputError(
            "torchrun has started this run again, which needs --out DIR --resume; the reason is "
            "printed above"
        )


def together(action: typing.Callable[[], typing.Any]) -> list:
    """Runs action() on every process and gathers the results.

    If it failed on any process, with an InputError or a failure to read or write, raises that
    InputError on all of them: otherwise the others would wait for the failed one for ever. Without
    a process group, just runs it.
    """
    if not dist.is_initialized():
        return [action()]
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


def agree(action: typing.Callable[[], dict]) -> dict:
    """Runs action() on every process and returns its result. Raises InputError on all of them if
    the results differ."""
    first, *others = together(action)
    for rank, found in enumerate(others, 1):
        for name, value in first.items():
            if found[name] != value:
                raise InputError(
                    f"processes differ: {name} is {value} on process 0, {found[name]} on {rank}"
                )
    return first


def on_first_process(action: typing.Callable[[], typing.Any]) -> typing.Any:
    """Runs action() on process 0 and returns its result on every process. If it failed, raises its
    InputError on all of them. Without a process group, just runs it."""
    if not dist.is_initialized():
        return action()
    return together(lambda: action() if dist.get_rank() == 0 else None)[0]


def erase_line() -> str:
    """What to print before a text, so that a terminal erases a step line that moves in place."""
    return "\r\x1b[K" if sys.stdout.isatty() else ""


@contextlib.contextmanager
def announced(text: str, here: bool | None = None) -> Iterator[None]:
    """Prints `text` on process 0 (or where `here` is true) if what is done inside this `with` takes
    longer than 2 s. Also a decorator."""
    timer = threading.Timer(2, notice, [erase_line() + text])
    timer.daemon = True
    if is_first() if here is None else here:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def every_two_seconds() -> typing.Callable[[str], None]:
    """A print, for process 0, that leaves out what comes less than 2 s after its last line, or
    after now: how far long work is."""
    printed = time.monotonic()

    def progress(line: str) -> None:
        nonlocal printed
        if is_first() and time.monotonic() - printed > 2:
            printed = time.monotonic()
            notice(erase_line() + line)

    return progress


# --------------------------------------------------------------------------------- early endings


class StoppedError(RuntimeError):
    """The run ends before its last step; the message says why. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def stop_non_finite(
    step: int,
    loss: float,
    norm: float,
    losses: list[tuple[list[int], Tensor]],
    drawn: list[int],
    pairs: list,
) -> typing.NoReturn:
    """Raises StoppedError on all processes. It names the pairs (of data.Pair) whose loss is not
    finite, or the step's pairs if only the gradient is not; of many the first 20.

    losses: of each micro-batch of this process, the indexes of its pairs (none of a stand-in) and
    their losses; drawn: the indexes of all processes."""
    bad = []
    for indexes, loss_B in losses:
        values = zip(indexes, loss_B.tolist(), strict=False)
        bad += [i for i, value in values if not math.isfinite(value)]
    bad = [i for of_process in together(lambda: bad) for i in of_process] or drawn
    places = ", ".join(pairs[i].place for i in bad[:20])
    more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise StoppedError(
        f"step {step}: loss {loss}, gradient norm {norm}; stopped before the update. "
        f"Pairs: {places}{more}"
    )


class StopRequest:
    """Inside its `with` block, SIGTERM, Ctrl-C, SIGHUP (a terminal that closes) and SIGUSR1 (a
    scheduler's warning) set `number` instead of ending the process.

    The loop then finishes its step and saves. A second signal ends the process at once, unless it
    comes within a second: a scheduler signals torchrun and its processes, and torchrun signals them
    again.
    """

    def __enter__(self) -> "StopRequest":
        self.number, self.since = 0, 0.0
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        self.before = {}
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: so does the run
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number: int, _frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 1:
            os._exit(128 + number)

    def signal_anywhere(self, device: str) -> int:
        """The number of a signal that any process got, 0 if none; the same on all of them."""
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------ exit codes


def complain(program: str, message: object) -> None:
    """Prints one line on stderr. Most mistakes are found by every process: other ranks wait, so
    that torchrun ends them once rank 0 has printed its line."""
    rank = os.environ.get("RANK", "")
    if rank.isdigit() and int(rank) > 0:
        time.sleep(10)
        program = f"{program}, process {rank}"
    with contextlib.suppress(OSError):
        print(f"{program}: {message}", file=sys.stderr, flush=True)


def another_ended(error: Exception) -> bool:
    """True if this error means that another process of the run ended: its connections are closed.
    gloo raises RuntimeErrors, known by their texts."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error).lower()
    ends = ("closed by peer", "reset by peer", "broken pipe", "connect", "timed out")
    return dist.is_initialized() and "gloo" in text and any(end in text for end in ends)


def exit_code(program: str, action: typing.Callable[[], None], memory_advice: typing.Callable):
    """Runs action() and returns the program's exit code, with one line for every known failure.

    0: done. 2: a user's mistake, or a file that cannot be read or written. 1: out of memory
    (memory_advice() says which flag to lower; None: the error is raised), numbers that are not
    finite, a model that does not compile, a failure of NCCL, or the end of another process. 128 + a
    signal's number: stopped by that signal.

    After a failure NCCL's group stays: to destroy it, all processes of a machine must take part,
    and the others wait for this one elsewhere. `leave` ends the process with it.
    """
    done = False
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # see support/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:  # closed by the shell: >&-
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know a character
    try:
        action()
        sys.stdout.flush()
        done = True
        return 0
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        return 130
    except InputError as error:
        complain(program, error)
        return 2
    except OSError as error:
        complain(program, f"{error.filename or 'standard output'}: {error.strerror}")
        return 2
    except StoppedError as error:
        if error.code < 128:  # else a signal, which process 0 has reported
            complain(program, error)
        return error.code
    except (RuntimeError, MemoryError) as error:
        advice = memory_advice()
        if out_of_memory(error) and advice is not None:
            complain(program, f"out of memory; {advice}")
        elif isinstance(error, dist.DistBackendError):  # NCCL's, whatever the cause
            reason = " ".join(str(error).splitlines()[1:]) or str(error)
            complain(
                program,
                f"NCCL failed: {shown(reason, 400)}. If another process of the run says why it "
                "ended, that is the cause; else NCCL_DEBUG=INFO in the environment tells more",
            )
        elif another_ended(error):
            complain(
                program,
                "another process of the run ended; its message says why (no message: it was "
                "killed, perhaps because memory ran out)",
            )
        else:
            raise
        return 1
    finally:
        if dist.is_initialized() and (done or not torch.cuda.is_initialized()):
            dist.destroy_process_group()


def leave(main: typing.Callable[[], int]) -> typing.NoReturn:
    """Runs main() and ends the process with its exit code, or with 1 and the traceback of an error
    that nobody foresaw. Python's own end would be worse: gloo's threads race it, which now and then
    aborts the process, and NCCL may wait there for processes that wait for this one."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
