"""A run that is killed, stopped or starved goes on from its last checkpoint, and ends with the same bits."""

# ruff: noqa: F811

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_pairs, run_train, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_hostile import NORM, Planted, entry, written
from test_train import LENGTHS, flags, rows, start, write_pairs  # noqa: F401

import train
from model import save_model
from support.files import file_checksum

CLOCKS = {"seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib"}
STEPS = ["--max-steps", 7, "--epochs", 9, "--save-every", 2]  # checkpoints after 2, 4 and 6


def facts(out, name="metrics.jsonl"):
    """What is logged, but for times and memory."""
    return [
        {key: value for key, value in row.items() if key not in CLOCKS} for row in rows(out, name)
    ]


def weights(out):
    return (out / "model/model.safetensors").read_bytes()


def run(start, out, *more):
    return train.main(
        [
            str(flag)
            for flag in flags(
                start, out, *STEPS, "--eval-data", start / "heldout.jsonl", "--eval-every", 3, *more
            )
        ]
    )


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The same run, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(start, out) == 0
    return out


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """train.main ends as if killed, in the middle of update `step` (from 1)."""
    inner = train.learning_rate

    def learning_rate(at, *rest):
        if at + 1 == step:
            raise Killed
        return inner(at, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_a_run_killed_in_any_step_ends_with_the_bits_of_one_that_was_not(
    start, whole, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step)
        run(start, tmp_path / "out")
    assert (
        len(rows(tmp_path / "out")) == step - 1
        if step > 1
        else not (tmp_path / "out/metrics.jsonl").exists()
    )
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert facts(tmp_path / "out", name) == facts(whole, name)
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6, 7]
    assert weights(tmp_path / "out") == weights(whole)


@pytest.mark.parametrize("loss", [["dpo"], ["dpo", "--reference", "live"]])
def test_a_reference_is_the_starting_model_after_a_resume_too(start, tmp_path, monkeypatch, loss):
    assert run(start, tmp_path / "whole", "--loss", *loss) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 6)
        run(start, tmp_path / "out", "--loss", *loss)
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_a_flipped_bit_in_the_reference_log_probs_is_noticed(start, tmp_path, monkeypatch, capsys):
    assert run(start, tmp_path / "whole", "--loss", "dpo") == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 6)
        run(start, tmp_path / "out", "--loss", "dpo")
    cache = tmp_path / "out/reference.safetensors"
    raw = bytearray(cache.read_bytes())
    raw[-7] ^= 1
    cache.write_bytes(raw)
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert (
        f"{cache}: damaged" in complaint and "delete it" in complaint and complaint.count("\n") == 1
    )
    cache.unlink()
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("chain", [[(2, 1), (1, 1)], [(3, 1), (4, 2), (1, 1)]], ids=str)
def test_a_run_goes_on_with_other_numbers_of_processes_and_replicas(start, whole, tmp_path, chain):
    """Each from the checkpoint that the one before made, after step 4, 5 and 6; the first from one process's."""
    out, home = tmp_path / "out", tmp_path / "out/checkpoints"
    shutil.copytree(whole, out)
    shutil.rmtree(home / "step-000006")
    for step, (processes, replicas) in enumerate(chain, 4):
        shutil.rmtree(out / "model")
        done = run_train(
            "--resume",
            out,
            "--replicas",
            replicas,
            "--save-every",
            1,
            processes=processes,
            OMP_NUM_THREADS="1",
        )
        assert done.returncode == 0, done.stderr
        assert f"going on from {home / f'step-{step:06d}'}" in done.stdout
        if step < 6:
            assert (
                len(list((home / f"step-{step + 1:06d}").glob("*.safetensors")))
                == processes // replicas
            )
        for later in range(step + 2, 7):
            shutil.rmtree(home / f"step-{later:06d}")
    for ours, theirs in zip(facts(out), facts(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    ours, theirs = (
        load_file(out / "model/model.safetensors"),
        load_file(whole / "model/model.safetensors"),
    )
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


def test_a_checkpoint_holds_every_weight_and_moment_and_only_the_newest_are_kept(start, tmp_path):
    assert run(start, tmp_path / "out", "--keep", 2) == 0
    home = tmp_path / "out/checkpoints"
    assert sorted(path.name for path in home.iterdir()) == ["step-000004", "step-000006"]
    assert sorted(path.name for path in (home / "step-000006").iterdir()) == [
        "00000-of-00001.safetensors",
        "checkpoint.json",
    ]
    stored = load_file(
        home / "step-000006/00000-of-00001.safetensors"
    )  # by the library's own reader
    names = [name for name, _ in tiny_model().named_parameters()]
    assert stored.keys() == {
        f"{kind}.{name}" for name in names for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert all(stored[f"exp_avg_sq.{name}"].max() > 0 for name in names)
    final = load_file(tmp_path / "out/model/model.safetensors")
    assert all(
        torch.equal(stored[f"weight.{name}"], final[name]) for name in names
    )  # update 7 has rate 0


# -------------------------------------------------------------------------------------------------- damaged checkpoints


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def plant_a_pickle(path):
    path.write_bytes(pickle.dumps(Planted(path.parents[2] / "sentinel")))


def lie_in_the_header(path):
    written(path, {NORM: entry((2**40,), (0, 2**42))})


@pytest.mark.parametrize("file", ["00000-of-00001.safetensors", "checkpoint.json"])
@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, os.remove, plant_a_pickle, lie_in_the_header]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    start, whole, tmp_path, capsys, file, damage
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    damaged = tmp_path / "out/checkpoints/step-000006" / file
    if damage is truncate and file == "checkpoint.json":
        damaged.write_text(damaged.read_text()[:60])
    else:
        damage(damaged)
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert str(damaged) in said and "trying the checkpoint before" in said
    assert f"going on from {tmp_path / 'out/checkpoints/step-000004'}" in said
    assert weights(tmp_path / "out") == weights(whole) and facts(tmp_path / "out") == facts(whole)
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == [
        "damaged-step-000006",
        "step-000004",
        "step-000006",
    ]
    assert not (tmp_path / "out/sentinel").exists()


def sign(home):
    """Makes the checksums of a checkpoint those of what it holds."""
    facts = json.loads((home / "checkpoint.json").read_text())
    facts.pop("checksum")
    facts["files"] = {name: file_checksum(home / name) for name in facts["files"]}
    (home / "checkpoint.json").write_text(json.dumps(facts | {"checksum": train.checksum(facts)}))


def stretch(path):
    """Gives one weight another shape of the same size."""
    raw = path.read_bytes()
    assert raw.count(b'"shape": [32, 48]') > 0
    path.write_bytes(raw.replace(b'"shape": [32, 48]', b'"shape": [48, 32]'))


def rename_a_weight(path):
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"weight.model.norm.weight", b"weight.model.morn.weight"))


@pytest.mark.parametrize(
    "make, said",
    [
        (plant_a_pickle, "not a safetensors file"),
        (stretch, "has shape [48, 32]"),
        (lie_in_the_header, "not a safetensors file"),
        (rename_a_weight, "norm"),
    ],
)
def test_a_checkpoint_made_to_deceive_with_checksums_that_fit_is_refused_by_file(
    start, whole, tmp_path, capsys, make, said
):
    """Or by mistake: another version's, with other names."""
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    path = tmp_path / "out/checkpoints/step-000006/00000-of-00001.safetensors"
    make(path)
    sign(path.parent)
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert (
        complaint.startswith(f"train.py: {path}: ")
        and said in complaint
        and complaint.count("\n") == 1
    )
    assert not (tmp_path / "out/sentinel").exists()


@pytest.mark.parametrize(
    "lacks, said", [("run", "of a run with other flags"), ("files", "checkpoint.json: damaged")]
)
def test_a_checkpoint_that_says_nothing_of_its_run_or_has_no_files_is_not_gone_on_from(
    start, whole, tmp_path, capsys, lacks, said
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    home = tmp_path / "out/checkpoints/step-000006"
    written = json.loads((home / "checkpoint.json").read_text())
    written = {key: value for key, value in written.items() if key not in ("checksum", lacks)}
    written |= {"files": {}} if lacks == "files" else {}
    (home / "checkpoint.json").write_text(
        json.dumps(written | {"checksum": train.checksum(written)})
    )
    code = train.main(["--resume", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert said in told.out + told.err and "step-000006" in told.out + told.err
    assert code == 2 if lacks == "run" else weights(tmp_path / "out") == weights(whole)


def test_a_copy_beside_a_checkpoints_files_is_not_read(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    home = tmp_path / "out/checkpoints/step-000006"
    shutil.copy(home / "00000-of-00001.safetensors", home / "00000-of-00001 copy.safetensors")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole)


def test_a_step_whose_checkpoint_is_damaged_twice_is_no_obstacle(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    for _ in range(2):
        shutil.rmtree(tmp_path / "out/model")
        flip_a_bit(tmp_path / "out/checkpoints/step-000006/00000-of-00001.safetensors")
        assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole)


def test_the_newest_checkpoint_is_the_one_of_the_highest_step_whatever_its_digits_and_copies_are_none(
    tmp_path,
):
    for step in ("999800", "1000000", "000200", "000200.bak", "000200 copy", "final"):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    assert [path.name for path in train.checkpoints(tmp_path)] == [
        "step-000200",
        "step-999800",
        "step-1000000",
    ]


def test_a_checkpoint_under_another_steps_name_or_with_another_ones_files_is_not_used(
    start, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    home = tmp_path / "out/checkpoints"
    shutil.copytree(home / "step-000004", home / "step-000007")
    text = (home / "step-000006/checkpoint.json").read_text()
    (home / "step-000006/checkpoint.json").write_text(
        text.replace('"00000', '"../step-000004/00000')
    )
    sign(home / "step-000006")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for name in ("step-000007", "step-000006"):
        assert f"{home / name / 'checkpoint.json'}: damaged (it is another directory's)" in said
    assert f"going on from {home / 'step-000004'}" in said and weights(tmp_path / "out") == weights(
        whole
    )


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again_unasked(
    start, whole, tmp_path, capsys
):
    """Their volume may only not be mounted, and a scheduler asks nobody."""
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    (tmp_path / "out/checkpoints").rename(tmp_path / "elsewhere")
    done = run_train(
        "--resume", tmp_path / "out", processes=2
    )  # each says so, or is ended; none waits for the other
    assert "metrics.jsonl: has 7 steps, but" in done.stderr and "RuntimeError" not in done.stderr
    for _ in range(2):
        assert train.main(["--resume", str(tmp_path / "out")]) == 2
        assert (
            "metrics.jsonl: has 7 steps, but there is no checkpoint in" in capsys.readouterr().err
        )
    (tmp_path / "elsewhere").rename(tmp_path / "out/checkpoints")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole) and facts(tmp_path / "out") == facts(whole)


def test_a_checkpoint_of_another_run_and_lost_log_rows_are_refused(start, whole, tmp_path, capsys):
    assert run(start, tmp_path / "other", "--lr", "2e-2") == 0
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    shutil.rmtree(tmp_path / "out/checkpoints/step-000006")
    shutil.copytree(
        tmp_path / "other/checkpoints/step-000006", tmp_path / "out/checkpoints/step-000006"
    )
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "step-000006: of a run with other flags" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out/checkpoints/step-000006")
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out/metrics.jsonl").write_text("".join(lines[1:]))
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "metrics.jsonl: 3 whole rows up to step 4" in (said := capsys.readouterr().err)
    (tmp_path / "out/metrics.jsonl").write_text(
        said.split("line ")[1].split(" may")[0].replace("N", "1") + "\n" + "".join(lines[1:])
    )
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole)


def test_a_damaged_log_is_named_and_a_row_without_its_end_gets_one(start, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    path = tmp_path / "out/metrics.jsonl"
    six = path.read_bytes().splitlines(keepends=True)[:6]
    path.write_bytes(b"".join(six)[:-1])  # as a disk that fills leaves it
    (tmp_path / "out/eval.jsonl").write_bytes(b"\xff\n")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert (
        "eval.jsonl: row 1 is not whole; it and what follows are dropped" in capsys.readouterr().out
    )
    assert facts(tmp_path / "out") == facts(whole) and weights(tmp_path / "out") == weights(whole)
    shutil.rmtree(tmp_path / "out/model")
    flipped = bytearray(b"".join(six))
    flipped[5] ^= 0x80
    path.write_bytes(flipped)
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert (
        "metrics.jsonl: 0 whole rows up to step 6" in (said := capsys.readouterr().err)
        and said.count("\n") == 1
    )


def test_a_lost_config_json_can_be_replaced_by_one_of_the_same_run_begun_elsewhere(
    start, whole, tmp_path, monkeypatch, capsys
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    os.truncate(tmp_path / "out/config.json", 200)
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "config.json: not JSON" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 1)
        run(start, tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere/config.json", tmp_path / "out")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert (
        weights(tmp_path / "out") == weights(whole) and not (tmp_path / "elsewhere/model").exists()
    )


@pytest.mark.parametrize(
    "key, value", [("lr", "1e-5"), ("loss", "nope"), ("shuffle", 1), ("model", None)]
)
def test_a_recorded_flag_that_no_run_writes_is_refused(start, whole, tmp_path, capsys, key, value):
    shutil.copytree(whole, tmp_path / "out")
    facts = json.loads((tmp_path / "out/config.json").read_text())
    facts["flags"][key] = value
    (tmp_path / "out/config.json").write_text(json.dumps(facts))
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert f"config.json: {key} is" in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_the_run_says_so_and_changes_nothing(
    start, whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    for path in (tmp_path / "out/checkpoints").glob("*/*.safetensors"):
        truncate(path)
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "none of 2 checkpoints is whole" in capsys.readouterr().err
    assert rows(tmp_path / "out") == rows(whole)


def test_what_a_kill_while_saving_leaves_is_never_taken_for_a_checkpoint(
    start, whole, tmp_path, monkeypatch
):
    inner = train.write_tensors

    def write_half(path, tensors):
        inner(path, tensors)
        if "000004" in str(path):
            truncate(path)
            raise Killed
        return inner(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "write_tensors", write_half)
        run(start, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == [
        ".step-000004.partial",
        "step-000002",
    ]
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole) and facts(tmp_path / "out") == facts(whole)
    assert sorted(p.name for p in (tmp_path / "out/checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
    ]


# -------------------------------------------------------------------------------------------------------------- signals


def popen(*arguments, processes=1, wait_for="step 3/", **how):
    """train.py, in a process of its own; returns once it has printed wait_for."""
    program = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            processes,
            "--max-restarts",
            2,
        ]
        if processes > 1
        else [sys.executable]
    )
    process = subprocess.Popen(
        [str(word) for word in (*program, ROOT / "train.py", *arguments)],
        text=True,
        **how,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith(wait_for):
            return process
    raise AssertionError(process.stderr.read())


LONG = ["--epochs", 20000, "--save-every", 0]  # would take minutes


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_ends_with_a_code_of_its_own(
    start, tmp_path, number, code
):
    process = popen(*flags(start, tmp_path / "out", *LONG))
    process.send_signal(number)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in complaint
    step = rows(tmp_path / "out")[-1]["step"]
    assert (
        f"stopped by {number.name} after step {step} of" in said
        and f"--resume {tmp_path / 'out'}" in said
    )
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == [f"step-{step:06d}"]


def test_a_second_signal_stops_at_once_but_within_a_second_it_is_the_same_request(monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    with train.StopRequest() as stop:
        for number in (
            signal.SIGTERM,
            signal.SIGTERM,
            signal.SIGINT,
        ):  # of a scheduler, torchrun, and torchrun again
            signal.raise_signal(number)
        assert stop.number == signal.SIGTERM
        now = 101.5
        with pytest.raises(Ended, match="130"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_model_is_exported_lets_it_finish(start, tmp_path, monkeypatch):
    inner = train.save_model

    def save_model(*arguments, **named):
        signal.raise_signal(signal.SIGTERM)
        inner(*arguments, **named)

    monkeypatch.setattr(train, "save_model", save_model)
    assert run(start, tmp_path / "out") == 0
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_torchrun_told_to_stop_lets_the_run_save_and_ends_with_1_and_no_restart(start, tmp_path):
    out, steps = tmp_path / "out", 100
    process = popen(
        *flags(start, out, "--max-steps", steps, "--epochs", steps, "--save-every", 0),
        "--resume",
        processes=2,
    )
    process.send_signal(signal.SIGTERM)
    said, complaint = process.communicate(timeout=60)
    step = rows(out)[-1]["step"]
    assert process.returncode == 1 and f"stopped by SIGTERM after step {step} of {steps}" in said, (
        complaint
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == [
        f"step-{step:06d}"
    ] and step < steps
    assert train.main(["--resume", str(out)]) == 0
    assert [row["step"] for row in rows(out)] == list(range(1, steps + 1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_recovers_by_itself_when_a_worker_is_killed_or_told_to_stop(
    start, whole, tmp_path, number
):
    out = tmp_path / "out"
    process = popen(
        *flags(start, out, *STEPS, "--eval-data", start / "heldout.jsonl", "--eval-every", 3),
        "--resume",
        processes=2,
        wait_for="held-out after 3",
    )
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), number)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert "going on from" in said and ("stopped by SIGTERM" in said) == (number == signal.SIGTERM)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6, 7]
    for ours, theirs in zip(facts(out), facts(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_run_whose_first_answers_are_lost_ends_with_the_others(tmp_path, capsys):
    out, texts = (
        tmp_path / "out",
        ["--samples", "1", "--max-steps", "2", "--save-every", "1", "--device", "cpu"],
    )
    assert train.main(["--out", str(out), *texts]) == 0
    model = (out / "model/model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    (out / "eval.jsonl").unlink()
    capsys.readouterr()
    assert train.main(["--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert "before  (not in eval.jsonl)" in said and "saved" in said
    assert (out / "model/model.safetensors").read_bytes() == model


def test_a_run_that_torchrun_starts_again_does_not_begin_anew_elsewhere(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.chdir(tmp_path)
    given = [str(word) for word in flags(start, tmp_path / "out", "--max-steps", 1)]
    del given[given.index("--out") :][:2]
    for more in ([], ["--out", "here"]):
        assert train.main(given + more) == 2
        assert (
            "torchrun has started this run again, which wants --out DIR --resume"
            in capsys.readouterr().err
        )
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_see_one_out_are_told_so_before_the_first_step(start, tmp_path):
    """As on machines that share no disk; here two working directories."""
    given = [str(word) for word in flags(start, "out", "--max-steps", 1)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, ROOT / "train.py", *given],
                cwd=tmp_path / rank,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ
                | {
                    "RANK": rank,
                    "WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        )
    complaint = processes[0].communicate(timeout=60)[1]
    processes[1].kill()  # as torchrun would
    processes[1].communicate()
    assert processes[0].returncode == 2 and "--out out: not there for process 1" in complaint
    assert not (tmp_path / "0/out/metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------- what cannot go on


@pytest.mark.parametrize(
    "changed, said",
    [
        (["--lr", "2e-2"], "--lr is 0.02, but the run in"),
        (["--loss", "orpo"], "--loss is orpo, but the run in"),
        (["--pairs-per-step", "5"], "--pairs-per-step is 5"),
        (["--seed", "1"], "--seed is 1"),
        (["--no-shuffle"], "--shuffle is False"),
        (["--max-steps", "8"], "--max-steps is 8"),
        (["--precision", "bf16"], "--precision is bf16"),
        (["--data", "OTHER"], "other pairs than the run began with"),
        (["--eval-data", "OTHER"], "other held-out pairs than the run began with"),
        (["--model", "OTHER"], "other weights than the run began with"),
        (["--out", "/absent"], "two directories"),
    ],
)
def test_what_would_change_the_run_is_refused_by_name(
    start, whole, tmp_path, capsys, changed, said
):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    write_pairs(tmp_path / "other.jsonl", random_pairs(LENGTHS, seed=9))
    save_model(tiny_model(seed=1), tmp_path / "other", dtype=torch.float32)
    other = tmp_path / ("other" if "--model" in changed else "other.jsonl")
    changed = [str(other) if word == "OTHER" else word for word in changed]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert train.main(["--resume", str(tmp_path / "out"), *changed]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after.items() - before.items() <= {(tmp_path / "out/.lock", b"")}


def test_a_file_changed_or_deleted_underneath_is_noticed(start, tmp_path, capsys):
    shutil.copytree(start, tmp_path / "start")
    assert run(tmp_path / "start", tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out/model")
    write_pairs(tmp_path / "start/pairs.jsonl", random_pairs(LENGTHS, seed=3))
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "other pairs than the run began with" in capsys.readouterr().err
    os.remove(tmp_path / "start/pairs.jsonl")
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "pairs.jsonl: No such file" in capsys.readouterr().err


def test_flags_that_do_not_change_the_run_may_change(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    shutil.copytree(start, tmp_path / "moved")
    moved = ["--data", tmp_path / "moved/pairs.jsonl", "--model", tmp_path / "moved/model"]
    more = [
        "--max-tokens-per-gpu",
        40,
        "--save-every",
        1,
        "--keep",
        1,
        "--checkpoint-blocks",
        "on",
        *moved,
    ]
    assert train.main([str(word) for word in ("--resume", tmp_path / "out", *more)]) == 0
    for ours, theirs in zip(facts(tmp_path / "out"), facts(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    # The next resume has them without being told.
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["flags"]["max_tokens_per_gpu"] == 40
    )


def test_resume_with_out_begins_a_run_that_is_not_there_yet(start, whole, tmp_path, capsys):
    assert run(start, tmp_path / "out", "--resume") == 0
    assert weights(tmp_path / "out") == weights(whole)
    assert train.main(["--resume", str(tmp_path / "absent")]) == 2
    assert "absent/config.json: No such file" in capsys.readouterr().err
    assert train.main(["--resume"]) == 2
    assert "--resume wants the directory of a run" in capsys.readouterr().err


def test_a_disk_without_locks_does_not_keep_a_run_from_beginning(
    start, tmp_path, monkeypatch, capsys
):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(train.fcntl, "lockf", lockf)
    number = errno.ENOLCK
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out", "--max-steps", 1)]) == 0
    assert "has no locks" in capsys.readouterr().out
    number = errno.EIO
    assert (
        train.main([str(flag) for flag in flags(start, tmp_path / "other", "--max-steps", 1)]) == 2
    )
    assert "Input/output error" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(start, whole, capsys):
    before = {
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert train.main(["--resume", str(whole)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_an_out_that_is_not_a_run_or_that_another_process_trains_in_is_refused(
    start, tmp_path, capsys
):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("keep")
    assert run(start, tmp_path / "notes", "--resume") == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "notes/config.json").write_text('{"model_type": "llama"}')
    assert run(start, tmp_path / "notes", "--resume") == 2
    assert "wanted the config.json of a run" in capsys.readouterr().err
    process = popen(*flags(start, tmp_path / "out", *LONG))
    try:
        assert train.main(["--resume", str(tmp_path / "out")]) == 2
        assert "another process is training there" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


# --------------------------------------------------------------------------------------------- disk, memory and numbers


def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay_whole(
    start, whole, tmp_path, monkeypatch, capsys
):
    inner = os.fsync

    def fsync(descriptor):
        if "step-000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        inner(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert run(start, tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert (
        "No space left on device" in complaint
        and "step-000004" in complaint
        and complaint.count("\n") == 1
    )
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(whole)


def test_a_checkpoint_has_its_name_only_when_all_of_it_is_on_the_disk_and_then_the_oldest_goes(
    start, tmp_path, monkeypatch
):
    events, fsync, rename, home = [], os.fsync, Path.rename, tmp_path / "out/checkpoints"

    def note_fsync(descriptor):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path / "out"))
        fsync(descriptor)

    def note_rename(path, target):
        events.append(f"-> {target.name}")
        if target.name == "step-000006":  # --keep 2: three at once
            assert {path.name for path in home.iterdir()} == {
                "step-000002",
                "step-000004",
                ".step-000006.partial",
            }
            parameters = sum(weight.numel() for weight in tiny_model().parameters())
            assert (
                12 * parameters
                < sum(file.stat().st_size for file in path.iterdir())
                < 12 * parameters + 12_000
            )
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    assert run(start, tmp_path / "out") == 0
    at, aside = events.index("-> step-000006"), "checkpoints/.step-000006.partial"
    assert {
        "metrics.jsonl",
        "eval.jsonl",
        f"{aside}/00000-of-00001.safetensors",
        f"{aside}/.checkpoint.json.partial",
        aside,
    } <= set(events[:at])
    assert events[at + 1 : at + 3] == [
        "checkpoints",
        ".",
    ]  # the name, and the directory that holds it


def test_a_file_limit_while_exporting_leaves_no_half_model_and_what_it_leaves_is_replaced(
    start, tmp_path
):
    limit = 40_000  # bytes: config and logs fit, weights do not
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *map(str, flags(start, tmp_path / "out", "--max-steps", 1)),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "model" in done.stderr and "Traceback" not in done.stderr
    left = tmp_path / "out/.model.partial"
    assert left.is_dir() and not (tmp_path / "out/model").exists()
    (left / "model-00009-of-00009.safetensors").write_bytes(b"of an export that was killed")
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    assert not left.exists() and sorted(
        path.name for path in (tmp_path / "out/model").iterdir()
    ) == ["config.json", "model.safetensors"]


def test_memory_that_is_not_there_is_missed_before_the_first_step_and_the_flag_to_lower_is_named(
    tmp_path,
):
    save_model(
        tiny_model(vocab_size=4096, max_position_embeddings=2048),
        tmp_path / "model",
        dtype=torch.float32,
    )
    write_pairs(tmp_path / "pairs.jsonl", random_pairs([(100, 700, 700)] * 64, vocab_size=4096))
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags(tmp_path, tmp_path / "out"))]
    command += ["--pairs-per-step", "64", "--max-tokens-per-gpu", "200000"]

    def limit():  # all that is mapped, libraries included; the logits alone want 1.4 GB
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stderr
    said = "out of memory in the run's largest micro-batch, 96000 tokens; lower --max-tokens-per-gpu from 200000 to"
    assert (
        f"{said} 48000" in done.stderr
        and "--checkpoint-blocks on" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "tokens, micro_batches, graded", [(10_000, 1, [False]), (40, 2, [False, True])]
)
def test_memory_is_tried_beside_gradients_where_a_step_has_several_micro_batches(
    start, tmp_path, monkeypatch, tokens, micro_batches, graded
):
    calls, inner = [], train.losses_of

    def losses_of(model, data, rows, batch):
        calls.append(
            (sorted(rows), any(parameter.grad is not None for parameter in model.parameters()))
        )
        return inner(model, data, rows, batch)

    monkeypatch.setattr(train, "losses_of", losses_of)
    more = [
        "--data",
        tmp_path / "pairs.jsonl",
        "--pairs-per-step",
        2,
        "--max-steps",
        1,
        "--max-tokens-per-gpu",
        tokens,
    ]
    sizes = [28, 26]
    write_pairs(tmp_path / "pairs.jsonl", random_pairs([(9, 9, 10), (8, 9, 9)]))
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out", *more)]) == 0
    rehearsed, step = calls[: len(graded)], calls[len(graded) :]
    assert [has for _, has in rehearsed] == graded
    assert [sum(sizes[row] for row in rows) for rows, _ in rehearsed] == (
        [54] if tokens > 54 else [28, 26]
    )
    assert [has for _, has in step] == [False, True][:micro_batches]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `f`"),
    ],
)
def test_memory_that_is_not_there_for_the_optimizer_ends_in_one_line(
    start, tmp_path, monkeypatch, capsys, error
):
    def make_optimizer(*_):
        raise error

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("train.py: out of memory. ") and "--plan" in said and said.count("\n") == 1
    )


def test_an_error_of_ours_is_not_taken_for_memory_that_is_not_there(start, tmp_path, monkeypatch):
    def make_optimizer(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train.main([str(flag) for flag in flags(start, tmp_path / "out")])


def test_no_value_that_is_not_finite_is_ever_saved(start, tmp_path, capsys):
    assert run(start, tmp_path / "out", "--lr", "1e39", "--save-every", 1) == 1
    assert "after step 1 weight." in (said := capsys.readouterr().err) and "is not finite" in said
    assert (
        not list((tmp_path / "out").glob("checkpoints/step-*"))
        and not (tmp_path / "out/model").exists()
    )
    assert (
        train.main(
            [str(x) for x in flags(start, tmp_path / "end", "--lr", "1e39", "--max-steps", 1)]
        )
        == 1
    )
    assert not (tmp_path / "end/model").exists()


def test_nothing_in_a_checkpoint_can_execute(start, whole):
    files = [path for path in (whole / "checkpoints").rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, "np") as file:
                assert all(isinstance(file.get_tensor(key), np.ndarray) for key in file.keys())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
