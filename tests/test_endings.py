"""How a run ends that does not end well: signals, busy disks, processes that die, odd terminals."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, flags, main, words
from joined import run_all
from test_resume import seven, weights, whole  # noqa: F401

import train
from support.files import InputError
from support.processes import (
    StoppedError,
    StopRequest,
    another_ended,
    choose_device,
    exit_code,
)


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
            signal.raise_signal(signal.SIGUSR1)
            assert stop.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("busy", ["rename", "rmtree"])
def test_a_checkpoint_that_cannot_be_removed_is_said_and_left_and_the_run_goes_on(
    start, whole, tmp_path, monkeypatch, capsys, busy
):
    rename, rmtree = Path.rename, shutil.rmtree

    def busy_rename(path, target):
        if busy == "rename" and str(target).endswith(".old"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    def busy_rmtree(path, *more, **options):
        if busy == "rmtree" and ".step-" in str(path) and not options.get("ignore_errors"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rmtree(path, *more, **options)

    monkeypatch.setattr(Path, "rename", busy_rename)
    monkeypatch.setattr(shutil, "rmtree", busy_rmtree)
    out = tmp_path / "out"
    run = seven(start, out, "--save-every 1 --keep 1")
    assert main(*run) == 0
    assert "not removed (Device or resource busy)" in capsys.readouterr().out
    assert weights(out) == weights(whole)
    shutil.rmtree(out / "model", ignore_errors=True)
    assert main("--resume", out) == 0
    assert weights(out) == weights(whole)


def test_when_one_process_dies_the_others_say_so_in_one_line(capsys, monkeypatch):
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1234")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)

    def action():
        raise gloo

    assert exit_code("train.py", action, lambda: None) == 1
    said = capsys.readouterr().err
    assert said == (
        "train.py: another process of the run ended; its message says why (no message: it was "
        "killed, perhaps because memory ran out)\n"
    )
    assert another_ended(dist.DistNetworkError("x")) and not another_ended(RuntimeError("a bug"))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert not another_ended(gloo)  # the network of a single process is its own fault


NCCL = "NCCL error in: NCCLUtils.cpp:77, unhandled system error\nncclSystemError: "


@pytest.mark.parametrize(
    "reason, said",
    [
        ("Last error:\nError while creating shared memory segment", "creating shared memory"),
        ("Last error:\nDuplicate GPU detected", "Duplicate GPU detected"),
        ("Failed to CUDA malloc 4 bytes: out of memory", "out of memory; use less"),
    ],
)
def test_what_nccl_says_is_in_the_line(capsys, reason, said):
    """It has one class of errors for its own faults and for the end of another process."""
    error = dist.DistBackendError(NCCL + reason)
    assert exit_code("train.py", mock.Mock(side_effect=error), lambda: "use less") == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and said in printed
    assert ("NCCL_DEBUG=INFO" in printed) == ("malloc" not in reason)


def test_gpus_are_not_shared_in_silence_by_processes_that_do_not_know_their_number(monkeypatch):
    """As under srun with RANK and WORLD_SIZE only: all would take the first GPU, unless each sees
    only one."""
    taken, visible = [], 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert choose_device("auto", "auto") == (torch.device("cuda:0"), torch.bfloat16)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match="LOCAL_RANK is missing in the environment"):
        choose_device("auto", "auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto", "auto")[0] == torch.device("cuda:1") == taken[-1]
    assert len(taken) == 2
    visible = 1
    monkeypatch.delenv("LOCAL_RANK")
    assert choose_device("auto", "auto")[0] == torch.device("cuda:0")


def test_gpus_older_than_the_a100_compute_in_fp32(monkeypatch):
    """They have no bf16, and the flash kernel does not run on them. A T4 has 7.5."""
    name_of = {"device_count": lambda: 1, "set_device": lambda _: None}
    name_of |= {"get_device_capability": lambda _: (7, 5), "get_device_name": lambda _: "Tesla T4"}
    for name, value in name_of.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for precision in ("auto", "fp32"):
        assert choose_device("auto", precision) == (torch.device("cuda:0"), torch.float32)
    with pytest.raises(InputError, match=r"bf16 needs .* 8\.0 or more .*; Tesla T4 has 7\.5: pass"):
        choose_device("auto", "bf16")
    assert choose_device("cpu", "bf16")[1] == torch.bfloat16


@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_group_of_nccl_is_destroyed_only_if_no_process_failed(monkeypatch, capsys, on_cuda):
    """ncclCommDestroy waits for all processes of a machine; the others wait for a failed one."""
    destroyed = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_cuda)
    assert exit_code("train.py", lambda: None, lambda: None) == 0 and destroyed == [True]
    for error in (StoppedError("out of memory"), InputError("x"), ValueError("a bug")):
        destroyed.clear()
        with contextlib.suppress(ValueError):
            exit_code("train.py", mock.Mock(side_effect=error), lambda: None)
        assert destroyed == [True] * (not on_cuda)


def test_an_unforeseen_error_shows_its_traceback_and_ends_the_process_at_once():
    code = (
        "import atexit, support.processes as p\n"
        "atexit.register(lambda: print('at the end of Python'))\n"
        "p.leave(lambda: 1 / 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr


def no_memory_for_weights() -> None:
    def load_weights(*more):
        raise MemoryError("out of memory")

    if os.environ["RANK"] == "1":
        train.load_weights = load_weights
    time.sleep = lambda seconds: None  # torchrun would end the others before they print


def test_a_read_error_of_one_process_is_the_only_line_of_two(start, tmp_path):
    """Rank 1 cannot read the weights; rank 0 waits for it in a collective."""
    run = words(*flags(start, tmp_path / "out", "--max-steps 3"))
    codes, printed = run_all([run], 2, before=no_memory_for_weights)
    said = [errors for _, errors in printed]
    assert codes == [1, 1] and [errors.count("\n") for errors in said] == [1, 1], said
    assert "another process of the run ended" in said[0] and "out of memory" in said[1]


def test_a_terminal_that_knows_only_latin_1_gets_every_line(start, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_code("train.py", lambda: print("é \u2603"), lambda: None) == 0
    assert terminal.buffer.getvalue() == b"\xe9 \\u2603\n"


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "support" in line or "torch._" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in said


@pytest.mark.parametrize("program", ["train", "eval"])
def test_on_windows_one_line_says_where_the_programs_run(program):
    code = f"import os, pathlib; os.name = 'nt'; import {program}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "ASFT runs on Linux and macOS; on Windows, use WSL\n"
    assert "on Windows: WSL" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("ratio, steps", [(0.07, 100), (0.29, 100), (0.1, 30), (0.55, 100)])
def test_a_share_of_the_steps_is_not_rounded_up_by_a_floats_last_digit(ratio, steps):
    rates = [train.learning_rate(step, steps, 1.0, ratio, 0.0) for step in range(steps)]
    assert rates.index(1.0) + 1 == round(ratio * steps)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_job_of_a_script_that_was_started_with_ctrl_c_ignored_ignores_it(ignored):
    """A shell without job control starts jobs in the background so. Its Ctrl-C is not theirs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        found = []
        exit_code("x", lambda: found.append(signal.getsignal(signal.SIGINT)), list)
        assert found == [signal.SIG_IGN if ignored else signal.default_int_handler]
        code = "import signal, support; print(signal.getsignal(signal.SIGINT).name)"
        command = f"import sys; sys.modules['__main__'].__file__ = 'train.py'; {code}"
        done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
        assert done.stdout.split()[-1].decode() == ("SIG_IGN" if ignored else "SIG_DFL")
    finally:
        signal.signal(signal.SIGINT, before)
