"""A run that is killed, stopped or starved resumes from its last checkpoint and ends with the same
bits."""

import errno
import fcntl
import json
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import (
    LENGTHS,
    ON_CPU,
    Planted,
    before_export,
    complaint_of_two,
    edit_json,
    entry,
    flags,
    flip_a_bit,
    main,
    program,
    random_pairs,
    read_json,
    rows,
    run_joined,
    run_train,
    save_tiny,
    tiny_model,
    trained,
    words,
    write_pairs,
    write_safetensors,
)
from safetensors.torch import load_file

import train
from support import checkpoints, export, run_directory, sharding
from support.files import InputError, checksum, file_checksum
from support.processes import StopRequest, join_group

CLOCKS = {"seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib"}
STEPS = "--max-steps 7 --epochs 9 --save-every 2"  # checkpoints after 2, 4 and 6
SHARD, FACTS = "00000-of-00001.safetensors", "checkpoint.json"
NORM = "model.norm.weight"


def seven(start, out, *more):
    """The flags of the run of seven steps that all tests here interrupt and resume."""
    held_out = ["--eval-data", start / "heldout.jsonl", "--eval-every 3"]
    return flags(start, out, STEPS, *held_out, *more)


def resume(out, *more) -> int:
    return main("--resume", out, *more)


def facts(out, name="metrics.jsonl"):
    """The rows of a log, without times and memory."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(out, name)]


def stable(name: str) -> str:
    """A name without the random part that it has until it is renamed."""
    return re.sub(r"\.\w{8}\.partial", ".partial", name)


def names_in(directory) -> list[str]:
    return sorted(stable(path.name) for path in directory.iterdir())


def weights(out) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


def assert_same(out, whole):
    """Both runs ended with the same bits and the same logs."""
    assert weights(out) == weights(whole)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert facts(out, name) == facts(whole, name)


def assert_close(out, whole):
    """The logs of both runs are equal up to rounding."""
    for ours, theirs in zip(facts(out), facts(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The directory of the run, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(*seven(start, out)) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    return before_export(whole, tmp_path / "out")


@pytest.fixture
def home(out):
    return out / "checkpoints"


@pytest.fixture
def fresh(tmp_path):
    """The directory of a run that is still to begin."""
    return tmp_path / "fresh"


@pytest.fixture
def within(monkeypatch):
    """within(step, action, *flags): runs train.py, with an action within update `step` (from 1)."""

    def run(step, action, *parts):
        def learning_rate(at, *rest, inner=train.learning_rate):
            if at + 1 == step:
                action()
            return inner(at, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(train, "learning_rate", learning_rate)
            return main(*parts)

    return run


class Killed(BaseException):
    pass


@pytest.fixture
def killed(within):
    """killed(step, *flags): runs train.py until it is killed within this update."""

    def kill():
        raise Killed

    def run(step, *parts):
        with pytest.raises(Killed):
            within(step, kill, *parts)

    return run


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_a_run_killed_in_any_step_ends_with_the_same_bits(start, whole, fresh, killed, step):
    killed(step, *seven(start, fresh))
    assert (fresh / "metrics.jsonl").exists() == (step > 1)
    assert step == 1 or len(rows(fresh)) == step - 1
    assert resume(fresh) == 0
    assert_same(fresh, whole)
    assert [row["step"] for row in rows(fresh)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("loss", ["--loss dpo", "--loss dpo --reference live"])
def test_a_reference_is_the_starting_model_after_a_resume_too(
    start, tmp_path, fresh, killed, complaint, loss
):
    """A flipped bit in its log-probs is noticed."""
    assert main(*seven(start, tmp_path / "whole", loss)) == 0
    killed(6, *seven(start, fresh, loss))
    cache = fresh / "reference.safetensors"
    assert cache.exists() == ("live" not in loss)
    if cache.exists():
        flip_a_bit(cache, at=-7)
        said = complaint("--resume", fresh)
        assert f"{cache}: damaged" in said and "delete it" in said
        cache.unlink()
    assert resume(fresh) == 0
    assert_same(fresh, tmp_path / "whole")


def test_a_run_resumes_with_other_numbers_of_processes_and_replicas(out, home, whole, capfd):
    """Each from the checkpoint that the one before made, after steps 4, 5 and 6."""
    shutil.rmtree(home / "step-000006")
    for step, processes, replicas in [(4, 3, 1), (5, 4, 2), (6, 1, 1)]:
        shutil.rmtree(out / "model", ignore_errors=True)
        run = ["--resume", out, "--replicas", replicas, "--save-every 1"]
        if processes > 1:
            said = run_joined(run, processes=processes)
        else:
            assert main(*run) == 0
            said = capfd.readouterr().out
        assert f"resuming from {home / f'step-{step:06d}'}" in said
        if step < 6:
            files = list((home / f"step-{step + 1:06d}").glob("*.safetensors"))
            assert len(files) == processes // replicas
        for later in range(step + 2, 7):
            shutil.rmtree(home / f"step-{later:06d}")
    assert_close(out, whole)
    ours, theirs = (load_file(x / "model/model.safetensors") for x in (out, whole))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


def test_a_checkpoint_holds_every_weight_and_moment_and_only_the_newest_are_kept(start, fresh):
    assert main(*seven(start, fresh, "--keep 2")) == 0
    home = fresh / "checkpoints"
    assert names_in(home) == ["step-000004", "step-000006"]
    assert names_in(home / "step-000006") == [SHARD, FACTS]
    assert (home / "step-000006").stat().st_mode & 0o777 == 0o755  # others may read it
    # Each file by a reader that executes nothing.
    assert read_json(home / "step-000006" / FACTS)["step"] == 6
    stored = load_file(home / "step-000006" / SHARD)
    names = [name for name, _ in tiny_model().named_parameters()]
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert stored.keys() == {f"{kind}.{name}" for name in names for kind in kinds}
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    final = load_file(fresh / "model/model.safetensors")
    for name in names:
        assert stored[f"exp_avg_sq.{name}"].max() > 0
        assert torch.equal(stored[f"weight.{name}"], final[name])  # update 7 has rate 0


@pytest.mark.parametrize("replica, files", [(0, [SHARD, FACTS]), (1, [FACTS])])
def test_only_the_first_replica_writes_its_rows(tmp_path, replica, files):
    model = tiny_model()
    optimizer = train.make_optimizer(train.Config(model="m", data="d"), model)
    mesh = SimpleNamespace(shape=(2, 1), get_coordinate=lambda: [replica, 0])
    join_group("gloo")
    try:
        checkpoints.save_checkpoint(tmp_path, 1, "run", model, optimizer, mesh, keep=1)
    finally:
        torch.distributed.destroy_process_group()
    assert names_in(tmp_path / "checkpoints/step-000001") == files


# ------------------------------------------------------------------------- damaged checkpoints


def truncate(path):
    os.truncate(path, path.stat().st_size - min(1000, path.stat().st_size - 60))


def plant_a_pickle(path):
    path.write_bytes(pickle.dumps(Planted(path.parents[2] / "sentinel")))


def lie_in_the_header(path):
    write_safetensors(path, {NORM: entry((2**40,), (0, 2**42))})


def replace_bytes(path, old: bytes, new: bytes):
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))


def give_a_weight_another_shape(path):
    replace_bytes(path, b'"shape": [32, 48]', b'"shape": [48, 32]')


def rename_a_weight(path):
    replace_bytes(path, b"weight.model.norm.weight", b"weight.model.morn.weight")


def sign(path, **changes):
    """Edits checkpoint.json and gives it a checksum that fits; None removes a key."""
    facts = read_json(path) | changes
    facts = {key: value for key, value in facts.items() if value is not None}
    del facts["checksum"]
    path.write_text(json.dumps(facts | {"checksum": checksum(facts)}))


def name_no_files(path):
    sign(path, files={})


def name_anothers_files(path):
    file = f"../step-000004/{SHARD}"
    sign(path, files={file: file_checksum(path.parent / file)})


def come_from_another_directory(path):
    shutil.rmtree(path.parent)
    shutil.copytree(path.parent.with_name("step-000004"), path.parent)


@pytest.mark.parametrize(
    "file, damage, said",
    [
        (file, damage, "")
        for file in (SHARD, FACTS)
        for damage in (truncate, flip_a_bit, os.remove, plant_a_pickle, lie_in_the_header)
    ]
    + [
        (FACTS, name_no_files, "it names no file"),
        (FACTS, name_anothers_files, "it belongs to another directory"),
        (FACTS, come_from_another_directory, "it belongs to another directory"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_last_one(
    out, home, whole, capsys, file, damage, said
):
    damaged = home / "step-000006" / file
    damage(damaged)
    assert resume(out) == 0
    printed = capsys.readouterr().out
    assert f"{damaged}: damaged ({said}" in printed and "trying the checkpoint before" in printed
    assert f"resuming from {home / 'step-000004'}" in printed
    assert_same(out, whole)
    assert names_in(home) == ["damaged-step-000006", "step-000004", "step-000006"]
    assert not (out / "sentinel").exists()


@pytest.mark.parametrize(
    "make, said",
    [
        (plant_a_pickle, "not a safetensors file"),
        (lie_in_the_header, "not a safetensors file"),
        (give_a_weight_another_shape, "has shape [48, 32]"),
        (rename_a_weight, "norm"),  # as another version's checkpoint might
    ],
)
def test_a_forged_checkpoint_whose_checksums_fit_is_refused(out, home, complaint, make, said):
    path = home / "step-000006" / SHARD
    make(path)
    sign(path.with_name(FACTS), files={SHARD: file_checksum(path)})
    found = complaint("--resume", out)
    assert found.startswith(f"train.py: {path}: ") and said in found
    assert not (out / "sentinel").exists()


def test_a_copy_beside_a_checkpoints_files_is_not_read(out, home, whole):
    shutil.copy(home / "step-000006" / SHARD, home / "step-000006/00000-of-00001 copy.safetensors")
    assert resume(out) == 0
    assert_same(out, whole)


def test_a_step_whose_checkpoint_is_damaged_twice_is_no_obstacle(out, home, whole):
    for _ in range(2):
        shutil.rmtree(out / "model", ignore_errors=True)
        flip_a_bit(home / "step-000006" / SHARD)
        assert resume(out) == 0
    assert_same(out, whole)


def test_the_newest_checkpoint_has_the_highest_step_and_copies_do_not_count(tmp_path):
    for step in ("999800", "1000000", "000200", "000200.bak", "000200 copy", "final"):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    found = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert found == ["step-000200", "step-999800", "step-1000000"]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(out, home, whole, tmp_path, complaint):
    """Their disk may only not be mounted, and a scheduler asks nobody."""
    home.rename(tmp_path / "elsewhere")
    wanted = "metrics.jsonl: has 7 steps, but there is no checkpoint in"
    assert wanted in complaint_of_two(["--resume", out])
    for _ in range(2):  # what the run had counts, not what it is resumed with
        assert wanted in complaint("--resume", out, "--save-every 0")
    (tmp_path / "elsewhere").rename(home)
    assert resume(out) == 0
    assert_same(out, whole)


def test_a_checkpoint_of_another_run_is_refused(start, out, home, tmp_path, complaint):
    newest = home / "step-000006"
    assert main(*seven(start, tmp_path / "other", "--lr 2e-2")) == 0
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "other/checkpoints/step-000006", newest)
    assert f"{newest}: belongs to a run with other flags" in complaint("--resume", out)
    sign(newest / FACTS, run=None)
    assert f"{newest}: belongs to a run with other flags" in complaint("--resume", out)


def test_lost_rows_of_the_log_are_refused_until_a_line_stands_for_them(out, home, whole, complaint):
    shutil.rmtree(home / "step-000006")
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[1:]))
    said = complaint("--resume", out)
    assert "metrics.jsonl: has 3 complete rows, but the checkpoint is of step 4" in said
    line = said.split("put a line ")[1].split(" for each")[0].replace("N", "1")
    log.write_text("".join([line, "\n", *lines[1:]]))
    assert resume(out) == 0
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("damage", [b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_log_is_named_and_a_row_without_its_end_gets_one(
    out, whole, capsys, complaint, damage
):
    log = out / "metrics.jsonl"
    six = b"".join(log.read_bytes().splitlines(keepends=True)[:6])
    log.write_bytes(six[:-1])  # as a disk that fills leaves it
    (out / "eval.jsonl").write_bytes(damage)
    assert resume(out) == 0
    said = capsys.readouterr().out
    assert "eval.jsonl: row 1 is not whole; it and what follows are dropped" in said
    assert re.search(r"eval.jsonl: the evaluations of steps [\d, ]+ are missing", said)
    assert facts(out) == facts(whole) and weights(out) == weights(whole)
    shutil.rmtree(out / "model")
    log.write_bytes(six[:5] + bytes([six[5] ^ 0x80]) + six[6:])
    assert "metrics.jsonl: has 0 complete rows" in complaint("--resume", out)


def test_a_lost_config_json_can_be_replaced(start, out, whole, tmp_path, killed, complaint):
    """By that of the same run, begun elsewhere."""
    os.truncate(out / "config.json", 200)
    assert "config.json: not JSON" in complaint("--resume", out)
    killed(1, *seven(start, tmp_path / "elsewhere"))
    shutil.copy(tmp_path / "elsewhere/config.json", out)
    assert resume(out) == 0
    assert_same(out, whole)
    assert not (tmp_path / "elsewhere/model").exists()


@pytest.mark.parametrize(
    "key, value", [("lr", "1e-5"), ("loss", "nope"), ("shuffle", 1), ("model", None)]
)
def test_a_recorded_flag_that_no_run_writes_is_refused(out, complaint, key, value):
    recorded = read_json(out / "config.json")["flags"]
    edit_json(out / "config.json", flags=recorded | {key: value})
    assert f"config.json: {key} is" in complaint("--resume", out)


def test_if_no_checkpoint_is_whole_the_run_says_so_and_changes_nothing(out, home, whole, complaint):
    for path in home.glob("*/*.safetensors"):
        truncate(path)
    assert "none of 2 checkpoints is whole" in complaint("--resume", out)
    assert rows(out) == rows(whole)


def test_a_half_written_checkpoint_does_not_count(start, whole, fresh, monkeypatch):
    home = fresh / "checkpoints"

    def write_half(path, tensors, inner=checkpoints.write_tensors):
        digest = inner(path, tensors)
        if "000004" in str(path):
            truncate(path)
            raise Killed
        return digest

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "write_tensors", write_half)
        main(*seven(start, fresh))
    assert names_in(home) == [".step-000004.partial", "step-000002"]
    assert resume(fresh) == 0
    assert_same(fresh, whole)
    assert names_in(home) == ["step-000004", "step-000006"]


# ------------------------------------------------------------------------------------- signals


def popen(*parts, processes=1, wait_for="step 3/"):
    """train.py in a process of its own, or under torchrun; once it has printed `wait_for`."""
    process = subprocess.Popen(
        [*program(processes, "--max-restarts 2"), *words(*parts)],
        **dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
        env=os.environ | ON_CPU,
    )
    for line in process.stdout:
        if line.startswith(wait_for):
            return process
    raise AssertionError(process.stderr.read())


def assert_stopped(out, said, name) -> int:
    """The run saved after its last step and says how to resume; returns that step."""
    step = rows(out)[-1]["step"]
    assert f"stopped by {name} after step {step} of" in said and f"--resume {out}" in said
    assert names_in(out / "checkpoints") == [f"step-{step:06d}"]
    return step


@pytest.mark.parametrize("name, code", [("TERM", 143), ("INT", 130), ("HUP", 129), ("USR1", 138)])
def test_a_signal_saves_and_ends_the_run(start, whole, fresh, within, capsys, request, name, code):
    """After the step that it meets; each signal has an exit code of its own."""
    number = signal.Signals[f"SIG{name}"]
    before = signal.signal(number, signal.SIG_DFL)  # as without nohup, which ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(number, before))
    flags = seven(start, fresh, "--save-every 0")
    assert within(3, lambda: signal.raise_signal(number), *flags) == code
    assert assert_stopped(fresh, capsys.readouterr().out, number.name) == 3
    assert resume(fresh) == 0
    assert_same(fresh, whole)


def own_terminal() -> None:
    """Makes standard input the terminal of a new process, which its closing then hangs up."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as without nohup
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_that_closes_saves_though_no_line_can_be_printed(start, fresh):
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [*program(1), *words(*flags(start, fresh, "--epochs 5000 --save-every 0"))],
        **dict(stdin=its, stdout=its, stderr=its, env=os.environ | ON_CPU),
        **dict(start_new_session=True, preexec_fn=own_terminal),
    )
    os.close(its)
    said = b""
    while b"step 3/" not in said:
        said += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=180) == 129
    assert names_in(fresh / "checkpoints") == [f"step-{rows(fresh)[-1]['step']:06d}"]


def test_a_disk_that_refuses_modes_gets_checkpoints_and_the_model(start, fresh, monkeypatch):
    """As network disks that give all files to one owner may."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    assert main(*seven(start, fresh, "--save-every 3")) == 0
    assert (fresh / "model/model.safetensors").exists()
    assert names_in(fresh / "checkpoints") == ["step-000003", "step-000006"]


def test_a_run_admits_no_other_and_ends_with_its_signals_code(start, fresh, complaint):
    process = popen(*flags(start, fresh, "--epochs 5000 --save-every 0"))  # takes a minute
    try:
        assert "another process is writing there" in complaint("--resume", fresh)
    finally:
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=180)
    assert process.returncode == 143 and "Traceback" not in errors
    assert_stopped(fresh, said, "SIGTERM")


def test_a_second_signal_stops_at_once_but_within_a_second_it_is_the_same_request(monkeypatch):
    now = 100.0
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=Killed))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        # Of a scheduler, of torchrun, and of torchrun again.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            now = 100.9
        assert stop.number == signal.SIGTERM
        now = 101.1
        with pytest.raises(Killed):
            signal.raise_signal(signal.SIGINT)
    os._exit.assert_called_once_with(130)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_model_is_exported_lets_it_finish(start, fresh, monkeypatch):
    def save_model(*arguments, inner=export.save_model, **named):
        signal.raise_signal(signal.SIGTERM)
        inner(*arguments, **named)

    monkeypatch.setattr(export, "save_model", save_model)
    assert main(*seven(start, fresh)) == 0
    assert (fresh / "model/model.safetensors").exists()


def test_torchrun_told_to_stop_lets_the_run_save_and_ends_with_1_and_no_restart(start, fresh):
    steps = "--max-steps 100 --epochs 100 --save-every 0"
    process = popen(*flags(start, fresh, steps, "--resume"), processes=2)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 1, errors
    assert assert_stopped(fresh, said, "SIGTERM") < 100
    assert resume(fresh) == 0
    assert [row["step"] for row in rows(fresh)] == list(range(1, 101))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_recovers_if_a_worker_is_killed_or_told_to_stop(start, whole, fresh, number):
    process = popen(*seven(start, fresh, "--resume"), processes=2, wait_for="held-out after 3")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), number)
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "resuming from" in said
    assert ("stopped by SIGTERM" in said) == (number == signal.SIGTERM)
    assert [row["step"] for row in rows(fresh)] == [1, 2, 3, 4, 5, 6, 7]
    assert_close(fresh, whole)


def test_a_run_whose_first_answers_are_lost_ends_with_the_others(fresh, capsys):
    example = "--samples 1 --max-steps 2 --save-every 1 --device cpu --out"
    assert main(example, fresh) == 0
    before = weights(fresh)
    for left in ("", '{"step": 0, "answers": null}\n', '{"step": 0, "answers": [5]}\n'):
        shutil.rmtree(fresh / "model")
        (fresh / "eval.jsonl").unlink()
        if left:
            (fresh / "eval.jsonl").write_text(left)
        capsys.readouterr()
        assert resume(fresh) == 0
        said = capsys.readouterr().out
        before_it = "5" if "5" in left else "(not in eval.jsonl)"
        assert f"before  {before_it}" in said and "saved" in said
        assert weights(fresh) == before


@pytest.mark.parametrize("more", ["", "--out here"])
def test_a_restarted_run_does_not_begin_elsewhere(start, tmp_path, monkeypatch, complaint, more):
    """torchrun starts it again with the same flags; without --out it would begin anew."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.chdir(tmp_path)
    files = ["--model", start / "model", "--data", start / "pairs.jsonl"]
    said = complaint(*files, "--device cpu --max-steps 1", more)
    assert "torchrun has started this run again, which needs --out DIR --resume" in said
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_see_one_out_are_told_so_before_the_first_step(start, tmp_path):
    """As on machines that share no disk; here two working directories."""
    homes = [tmp_path / "0", tmp_path / "1"]
    for home in homes:
        home.mkdir()
    (homes[1] / "out").mkdir()
    (homes[1] / "out/.lock").touch()  # of an earlier try, in which that machine had process 0
    said = complaint_of_two(flags(start, "out", "--max-steps 1"), homes=homes)
    assert "--out out: process 1 does not see it" in said
    assert not (homes[0] / "out/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "name, action, said",
    [
        # The mark lies elsewhere; mkdtemp gives its absolute path, as it does since Python 3.12.
        (
            "tempfile.mkdtemp",
            lambda prefix, dir: (dir.parent / ".shared-x").mkdir(),
            "does not see it",
        ),
        (
            "pathlib.Path.touch",
            lambda path: os.listdir("/absent"),
            "process 0 cannot write there: ",
        ),
    ],
)
def test_out_must_be_seen_and_written_by_every_process(tmp_path, monkeypatch, name, action, said):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(name, lambda *a, **k: action(*a, **k) or str(tmp_path / ".shared-x"))
    join_group("gloo")
    try:
        with pytest.raises(InputError, match=said):
            run_directory.check_shared(tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert not list((tmp_path / "out").iterdir())


# --------------------------------------------------------------------------- cannot be resumed


@pytest.mark.parametrize(
    "changed, said",
    [
        ("--lr 2e-2", "--lr is 0.02, but the run in"),
        ("--loss orpo", "--loss is orpo, but the run in"),
        ("--pairs-per-step 5", "--pairs-per-step is 5"),
        ("--seed 1", "--seed is 1"),
        ("--no-shuffle", "--shuffle is False"),
        ("--max-steps 8", "--max-steps is 8"),
        ("--precision bf16", "--precision is bf16"),
        ("--data OTHER.jsonl", "the pairs differ from those"),
        ("--eval-data OTHER.jsonl", "the held-out pairs differ from those"),
        ("--model OTHER", "the weights differ from those"),
        ("--out /absent", "two directories"),
    ],
)
def test_a_flag_or_file_that_changes_the_run_is_refused(out, tmp_path, complaint, changed, said):
    write_pairs(tmp_path / "other.jsonl", random_pairs(LENGTHS, seed=9))
    save_tiny(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert said in complaint("--resume", out, changed.replace("OTHER", str(tmp_path / "other")))
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after.items() - before.items() <= {(out / ".lock", b"")}


def test_flags_that_do_not_change_the_run_may_change(start, out, whole, tmp_path):
    moved = shutil.copytree(start, tmp_path / "moved")
    more = "--max-tokens-per-gpu 40 --save-every 1 --keep 1 --checkpoint-blocks on"
    assert resume(out, more, "--data", moved / "pairs.jsonl", "--model", moved / "model") == 0
    assert_close(out, whole)
    # The next resume has them without being told.
    assert read_json(out / "config.json")["flags"]["max_tokens_per_gpu"] == 40


def test_resume_with_out_begins_a_run_that_is_not_there_yet(start, whole, fresh, complaint):
    assert main(*seven(start, fresh, "--resume")) == 0
    assert weights(fresh) == weights(whole)
    assert "absent/config.json: No such file" in complaint("--resume absent")
    assert "--resume needs a directory" in complaint("--resume")


def test_a_run_begins_on_a_disk_without_locks(start, fresh, monkeypatch, capsys, complaint):
    lockf = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    trained(start, fresh, "--max-steps 1")
    assert "has no locks" in capsys.readouterr().out
    lockf.side_effect = OSError(errno.EIO, "Input/output error")
    assert "Input/output error" in complaint(*flags(start, fresh.with_name("other")))


def test_a_finished_run_is_left_as_it_is(whole, capsys):
    def times():
        files = [path for path in whole.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert resume(whole) == 0
    assert "is finished" in capsys.readouterr().out
    assert times() == before


# ---------------------------------------------------------------------- disk, memory, numbers


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def test_a_full_disk_spares_earlier_checkpoints(start, whole, fresh, monkeypatch, complaint):
    def fsync(descriptor, inner=os.fsync):
        if "step-000004" in path_of(descriptor):
            raise OSError(28, "No space left on device")
        inner(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        said = complaint(*seven(start, fresh))
    assert "No space left on device" in said and "step-000004" in said
    assert names_in(fresh / "checkpoints") == ["step-000002"]
    assert resume(fresh) == 0
    assert_same(fresh, whole)


def test_checkpoints_and_models_get_their_names_once_on_the_disk(start, fresh, monkeypatch):
    events = []

    def note_fsync(descriptor, inner=os.fsync):
        events.append(stable(os.path.relpath(path_of(descriptor), fresh)))
        inner(descriptor)

    def note_rename(path, target, inner=Path.rename):
        events.append(f"-> {target.name}")
        if target.name == "step-000006":  # --keep 2: three at once
            there = [".step-000006.partial", "step-000002", "step-000004"]
            assert names_in(target.parent) == there
            size = sum(file.stat().st_size for file in path.iterdir())
            least = 12 * sum(weight.numel() for weight in tiny_model().parameters())
            assert least < size < least + 12_000
        return inner(path, target)

    def note_removal(path, *options, inner=shutil.rmtree, **named):
        events.append(f"removed {path.name}")
        inner(path, *options, **named)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(shutil, "rmtree", note_removal)
    assert main(*seven(start, fresh)) == 0
    at, aside = events.index("-> step-000006"), "checkpoints/.step-000006.partial"
    written = {f"{aside}/{SHARD}", f"{aside}/.{FACTS}.partial", aside}
    assert {"metrics.jsonl", "eval.jsonl", *written} <= set(events[:at])
    # The name, and the directory that holds it. Then the oldest loses its name before its content.
    assert events[at + 1 : at + 3] == ["checkpoints", "."]
    assert events[at + 3 : at + 5] == ["-> .step-000002.old", "removed .step-000002.old"]
    del events[: at + 5]
    at, aside = events.index("-> model"), ".model.partial"
    written = {f"{aside}/model.safetensors", f"{aside}/config.json", aside}
    assert {"metrics.jsonl", "eval.jsonl", *written} <= set(events[:at])
    assert events[at + 1 :] == ["."]


def test_a_file_limit_while_exporting_leaves_no_half_model_and_no_obstacle(start, fresh):
    def limit():  # bytes: config and logs fit, weights do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run_train(*flags(start, fresh, "--max-steps 1"), preexec_fn=limit)
    assert done.returncode == 2 and "model" in done.stderr and "Traceback" not in done.stderr
    left = fresh / ".model.partial"
    assert left.is_dir() and not (fresh / "model").exists()
    (left / "model-00009-of-00009.safetensors").write_bytes(b"of an export that was killed")
    assert resume(fresh) == 0
    assert not left.exists()
    assert names_in(fresh / "model") == ["config.json", "model.safetensors"]


def test_too_little_memory_shows_before_the_first_step_and_the_flag_to_lower_is_named(tmp_path):
    save_tiny(tmp_path / "model", vocab_size=4096, max_position_embeddings=2048)
    write_pairs(tmp_path / "pairs.jsonl", random_pairs([(100, 700, 700)] * 64, vocab_size=4096))

    # The limit is of all that is mapped, torch's libraries included, which are larger for CUDA. The
    # logits take 1.4 GB.
    most = int(1.65 * 2**30)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/torch/" in line or "/nvidia/" in line:
            first, end = (int(address, 16) for address in line.split()[0].split("-"))
            most += end - first

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    more = "--pairs-per-step 64 --max-tokens-per-gpu 200000"
    done = run_train(*flags(tmp_path, tmp_path / "out", more), preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory in the run's costliest micro-batch, 96000 tokens" in done.stderr
    assert "lower --max-tokens-per-gpu from 200000 to 48000" in done.stderr
    assert "pass --checkpoint-blocks 1: 0 of 2 blocks were recomputed" in done.stderr
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "tokens, rehearsed, in_step",
    [
        (10_000, [(54, False)], [False]),  # one micro-batch a step
        (40, [(28, False), (26, True)], [False, True]),  # two
    ],
)
def test_memory_is_tried_as_steps_need_it(start, tmp_path, monkeypatch, tokens, rehearsed, in_step):
    """Beside the gradients of earlier micro-batches, if a step has several."""
    calls, sizes, reduced = [], [28, 26], []

    def step_loss(model, pairs, indexes, inner=train.step_loss):
        beside = any(parameter.grad is not None for parameter in model.parameters())
        calls.append((sum(sizes[i] for i in indexes), beside))
        return inner(model, pairs, indexes)

    monkeypatch.setattr(train, "step_loss", step_loss)
    monkeypatch.setattr(sharding, "prepare_backward", lambda _, last: reduced.append(last))
    data = write_pairs(tmp_path / "pairs.jsonl", random_pairs([(9, 9, 10), (8, 9, 9)]))
    more = "--pairs-per-step 2 --max-steps 1 --max-tokens-per-gpu"
    trained(start, tmp_path / "out", "--data", data, more, tokens)
    assert calls[: len(rehearsed)] == rehearsed
    assert [beside for _, beside in calls[len(rehearsed) :]] == in_step
    of_a_step = [i + 1 == len(in_step) for i in range(len(in_step))]  # the last one reduces
    assert reduced == 2 * of_a_step


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    MemoryError(),
]
OUT_OF_MEMORY += [RuntimeError("CUDA error: out of memory")]
OUT_OF_MEMORY += [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `f`")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_for_moments_is_one_line(start, fresh, monkeypatch, complaint, error):
    monkeypatch.setattr(train, "make_optimizer", mock.Mock(side_effect=error))
    said = complaint(*flags(start, fresh), code=1)
    assert said.startswith("train.py: out of memory") and "--plan" in said


def test_an_error_of_ours_is_not_taken_for_too_little_memory(start, fresh, monkeypatch):
    monkeypatch.setattr(
        train, "make_optimizer", mock.Mock(side_effect=RuntimeError("a fault of ours"))
    )
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(*flags(start, fresh))


def test_no_value_that_is_not_finite_is_saved_in_a_checkpoint(start, fresh, complaint):
    """Nor in a model: tests/test_stress.py."""
    said = complaint(*seven(start, fresh, "--lr 1e39 --save-every 1"), code=1)
    assert "after step 1 weight." in said and "is not finite" in said
    assert not list(fresh.glob("checkpoints/step-*"))
