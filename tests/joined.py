"""Runs train.py or eval.py in several processes that join each other, as torchrun would let them.

They are forked from a process that has imported both and done nothing else: if each imported torch
by itself, that would be a third of all tests' time.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from conftest import ON_CPU, ROOT

import eval
import train

CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 300  # seconds


def run_all(
    command_lines: list[list[str]],
    processes: int,
    program: str = "train",
    before: Callable[[], None] | None = None,
    homes: list[Path] | None = None,
    first_fails: bool = False,
) -> tuple[list[int], list[list[str]]]:
    """Runs these command lines of the program, one after the other. Returns the exit codes, and
    what each process printed on stdout and on stderr.

    A process has its own number in the place of @RANK. before: a function of a test file that each
    process calls first; homes: its directory, if each has its own. With first_fails the others are
    killed when the first has ended, as torchrun would.
    """
    with mock.patch.dict(os.environ, ON_CPU | {"PYTHONPATH": os.pathsep.join(sys.path)}):
        if sys.platform == "linux":  # elsewhere a fork after the import is not safe
            CONTEXT.set_forkserver_preload(["joined"])
        forkserver.ensure_running()
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("", 0))) for _ in command_lines]
        ports = [str(free.getsockname()[1]) for free in sockets]
    lines = list(zip(ports, command_lines, strict=True))
    shared = os.environ | ON_CPU | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
    with TemporaryDirectory() as scratch:
        printed, started = [], []
        for rank, home in enumerate(homes or [ROOT] * processes):
            printed.append([Path(scratch, f"{name}-{rank}") for name in ("stdout", "stderr")])
            given = (program, lines, shared | {"RANK": str(rank)}, home, printed[rank], before)
            started.append(CONTEXT.Process(target=run, args=given, daemon=True))
            started[rank].start()
        for process in started:
            process.join(LIMIT)
            if first_fails or process.is_alive():
                for other in started:
                    other.kill()
        for process in started:  # those that were killed just now too
            process.join()
        codes = [process.exitcode for process in started]
        return codes, [[path.read_text() for path in paths] for paths in printed]


def run(
    program: str,
    lines: list[tuple[str, list[str]]],
    environment: dict[str, str],
    home: Path,
    printed: list[Path],
    before: Callable[[], None] | None,
) -> None:
    """One of the processes: runs each (port, command line), until one fails."""
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(home)
    os.environ.clear()
    os.environ.update(environment)
    if before:
        before()

    def all_lines() -> int:
        main = {"train": train.main, "eval": eval.main}[program]
        for os.environ["MASTER_PORT"], words in lines:
            if code := main([word.replace("@RANK", environment["RANK"]) for word in words]):
                return code
        return 0

    train.processes.leave(all_lines)
