"""--keep-best: the export is the weights of the best evaluation, also after a kill at any moment.

Oracles: checkpoints of the same steps, an undisturbed run, figures set by hand.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    before_export,
    edit_json,
    flags,
    flip_a_bit,
    main,
    read_json,
    rows,
    run_joined,
)
from safetensors.torch import load_file

import train
from support import best, checkpoints, export
from support.files import checksum

# Evaluations after 2, 4, 6 and 8. At this rate the one after 4 has the best loss, and the one after
# 2 is better than none. Accuracy is equal after 4, 6 and 8.
STEPS = "--max-steps 8 --epochs 9 --save-every 3 --eval-every 2 --lr 2e-2"
SHARD = "00000-of-00001.safetensors"


def eight(start, out, *more):
    """The flags of the run that the tests here kill and resume."""
    return flags(
        start, out, STEPS, "--eval-data", start / "heldout.jsonl", "--keep-best loss", *more
    )


def resume(out, *more) -> int:
    shutil.rmtree(out / "model", ignore_errors=True)
    return main("--resume", out, *more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Those of an export or of a checkpoint of one process."""
    if not (path / SHARD).exists():
        return load_file(path / "model.safetensors")
    stored = load_file(path / SHARD)
    return {key[len("weight.") :]: stored[key] for key in stored if key.startswith("weight.")}


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def kept(out) -> list[str]:
    """All that the disk has of best evaluations, half-written ones too."""
    return sorted(path.name for path in (out / "checkpoints").iterdir() if "best" in path.name)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The directory of the run, uninterrupted."""
    out = tmp_path_factory.mktemp("best") / "whole"
    assert main(*eight(start, out)) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    return before_export(whole, tmp_path / "out")


def assert_same(out, whole):
    """Both runs ended with the same export, the same evaluations and one best checkpoint."""
    for file in (whole / "model").iterdir():
        assert (out / "model" / file.name).read_bytes() == file.read_bytes()
    assert rows(out, "eval.jsonl") == rows(whole, "eval.jsonl")
    assert kept(out) == kept(whole) == ["best-000004"]


class Killed(BaseException):
    pass


def kill(*_, **__):
    raise Killed


# ------------------------------------------------------------------------------- what is exported


@pytest.mark.parametrize(
    "metric, best_of, more, step",
    [
        ("loss", min, "", 4),
        ("accuracy", max, "", 4),  # the first of three equal ones
        ("loss", min, "--lr 1e-2", 8),
        ("loss", min, "--eval-every 100", 8),
    ],
)
def test_the_export_is_the_weights_of_the_best_evaluation(
    start, tmp_path, capsys, metric, best_of, more, step
):
    out, plain = tmp_path / "out", tmp_path / "plain"
    more = ["--save-every 2 --keep 9", more]
    assert main(*eight(start, out, *more, "--keep-best", metric)) == 0
    said = capsys.readouterr().out
    evaluations = rows(out, "eval.jsonl")[1:]
    figure = best_of(row[f"eval_{metric}"] for row in evaluations)
    assert step == next(row["step"] for row in evaluations if row[f"eval_{metric}"] == figure)
    assert f"best held-out {metric}: {figure:.4f}, after step {step}\n" in said
    assert kept(out) == [f"best-{step:06d}"]
    files = {path.name for path in (out / f"checkpoints/best-{step:06d}").iterdir()}
    assert files == {SHARD, "checkpoint.json"}
    # Without the flag the last weights are exported, and nothing else is different.
    held_out = ["--eval-data", start / "heldout.jsonl"]
    assert main(*flags(start, plain, STEPS, *more, *held_out)) == 0
    assert rows(plain, "eval.jsonl")[1:] == evaluations
    at_step = plain / (f"checkpoints/step-{step:06d}" if step < 8 else "model")
    assert equal(weights(out / "model"), weights(at_step))
    assert equal(weights(out / "model"), weights(plain / "model")) == (step == 8)


@pytest.mark.parametrize(
    "metric, figures, step",
    [
        ("loss", {2: 0.5, 4: 0.25, 6: 0.25, 8: 0.375}, 4),
        ("accuracy", {2: 0.5, 4: 0.25, 6: 0.75, 8: 0.75}, 6),
        ("loss", {2: math.nan, 4: 2.0, 6: -math.inf, 8: math.nan}, 4),
        ("loss", {2: math.nan, 4: math.nan, 6: math.inf, 8: math.nan}, None),
        ("accuracy", {2: None, 4: None, 6: None, 8: None}, None),  # no pair to compare
    ],
)
def test_the_first_of_the_best_figures_wins_and_what_is_no_number_never_does(
    start, tmp_path, monkeypatch, capsys, metric, figures, step
):
    """The start has the best of all, but it is not a trained model."""

    def evaluate(run, at):
        value = {0: 0.0 if metric == "loss" else 1.0, **figures}[at]
        return {} if value is None else {f"eval_{metric}": value}

    monkeypatch.setattr(train, "evaluate", evaluate)
    more = f"--save-every 2 --keep 9 --keep-best {metric}"
    assert main(*eight(start, tmp_path / "out", more)) == 0
    said = capsys.readouterr().out
    if step is None:
        assert f"no held-out {metric} was a number: the weights are the last ones" in said
        assert kept(tmp_path / "out") == []
    else:
        assert f"best held-out {metric}: {figures[step]:.4f}, after step {step}\n" in said
        at = tmp_path / f"out/checkpoints/step-{step:06d}"
        assert equal(weights(tmp_path / "out/model"), weights(at))


def test_the_end_shows_the_answers_of_the_weights_that_are_exported(tmp_path, monkeypatch, capsys):

    def evaluate(run, at, inner=train.evaluate):
        return inner(run, at) | {"eval_loss": {0: 1.0, 2: 2.0, 4: 3.0}[at]}

    monkeypatch.setattr(train, "evaluate", evaluate)
    more = "--device cpu --max-steps 4 --pairs-per-step 4 --lr 3e-2 --samples 1 --eval-every 2"
    assert main(more, "--keep-best loss --out", tmp_path / "out") == 0
    said, evaluations = capsys.readouterr().out, rows(tmp_path / "out", "eval.jsonl")
    before, after, last = (row["answers"][0] for row in evaluations)
    assert f"before  {before}\n  after   {after}\n" in said and last != after


# ------------------------------------------------------------------------------ kill and resume


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_the_start_still_does_not_count(
    start, tmp_path, monkeypatch, capsys
):
    """It finds the weights that it had kept, and those of the start are better."""
    out, more = tmp_path / "out", "--save-every 0"
    monkeypatch.setattr(train, "evaluate", lambda *given: {"eval_loss": float(given[1])})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", lambda at, *_: kill() if at == 4 else 1e-2)
        main(*eight(start, out, more))
    assert kept(out) == ["best-000002"]
    assert resume(out) == 0
    assert kept(out) == ["best-000002"]
    said = capsys.readouterr().out
    assert "best held-out loss: 2.0000, after step 2\n" in said and said.count("kept in") == 1


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_killed_in_any_step_exports_the_same_bits(start, whole, tmp_path, monkeypatch, step):
    """Before the best evaluation, after it, and between it and the next checkpoint."""

    def learning_rate(at, *rest, inner=train.learning_rate):
        return kill() if at + 1 == step else inner(at, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "learning_rate", learning_rate)
        main(*eight(start, tmp_path / "out"))
    assert resume(tmp_path / "out") == 0
    assert_same(tmp_path / "out", whole)


def in_half_a_file(path, tensors, inner=checkpoints.write_tensors):
    digest = inner(path, tensors)
    return kill() if "best-000004" in str(path) else digest


def before_its_name(path, target, inner=Path.rename):
    return kill() if target.name == "best-000004" else inner(path, target)


def after_its_name(path, target, inner=Path.rename):
    return kill() if target.name == ".best-000002.old" else inner(path, target)


def before_the_old_one_is_gone(path, inner=checkpoints.remove):
    return kill() if path.name == ".best-000002.old" else inner(path)


@pytest.mark.parametrize(
    "where, name, die, left",
    [
        (checkpoints, "write_tensors", in_half_a_file, [".best-000004.", "best-000002"]),
        (Path, "rename", before_its_name, [".best-000004.", "best-000002"]),
        (Path, "rename", after_its_name, ["best-000002", "best-000004"]),
        (checkpoints, "remove", before_the_old_one_is_gone, [".best-000002.old", "best-000004"]),
        (export, "save_model", kill, ["best-000004"]),
    ],
)
@pytest.mark.parametrize("again", ["", "--save-every 1"])
def test_a_run_killed_while_it_keeps_or_exports_weights_ends_with_the_same_bits(
    start, whole, tmp_path, monkeypatch, where, name, die, left, again
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, die)
        main(*eight(start, out))
    there = kept(out)
    assert len(there) == len(left) and all(map(str.startswith, there, left))
    assert resume(out, again) == 0
    assert_same(out, whole)


def test_only_two_best_checkpoints_are_ever_on_the_disk_each_of_4_bytes_a_parameter(
    start, tmp_path, monkeypatch
):
    seen = []

    def rename(path, target, inner=Path.rename):
        if target.name.startswith("best-"):
            seen.append([name.split(".")[1] if "." in name else name for name in kept(tmp_path)])
            bytes_of_it = (path / SHARD).stat().st_size
            parameters = sum(tensor.numel() for tensor in weights(path).values())
            assert 4 * parameters < bytes_of_it < 4 * parameters + 4000
        return inner(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(train, "evaluate", lambda *a: {"eval_loss": -float(a[1])})
    assert main(*eight(start, tmp_path, "--resume")) == 0
    assert [sorted(names) for names in seen] == [
        ["best-000002"],
        ["best-000002", "best-000004"],
        ["best-000004", "best-000006"],
        ["best-000006", "best-000008"],
    ]
    assert kept(tmp_path) == ["best-000008"]


def test_a_run_that_resumes_past_its_best_evaluation_exports_it(out, whole, capsys):
    assert resume(out) == 0
    said = capsys.readouterr().out
    assert f"resuming from {out / 'checkpoints/step-000006'}" in said
    assert "kept in" not in said
    assert_same(out, whole)


def test_two_processes_keep_what_one_keeps_and_each_can_resume_the_other(
    start, out, whole, tmp_path
):
    """Exports are equal if the checkpoint is: the weights of one process, read by two; and those of
    two, read by one."""
    run_joined(eight(start, tmp_path / "two"), ["--resume", out])
    assert equal(weights(out / "model"), weights(whole / "model"))
    assert kept(tmp_path / "two") == kept(out) == ["best-000004"]
    assert len(list((tmp_path / "two/checkpoints/best-000004").glob("*.safetensors"))) == 2
    of_two, of_one = weights(tmp_path / "two/model"), weights(whole / "model")
    assert all(torch.allclose(of_two[key], of_one[key], atol=1e-3) for key in of_one)
    assert resume(tmp_path / "two") == 0
    assert equal(weights(tmp_path / "two/model"), of_two)


def test_if_a_repeated_step_differs_by_rounding_the_weights_kept_first_stay(
    out, whole, monkeypatch
):
    """As on a GPU: the evaluation after 4, repeated, is a little better than the one kept."""
    shutil.rmtree(out / "checkpoints/step-000006")

    def evaluate(*arguments, inner=train.evaluate):
        row = inner(*arguments)
        return row | {"eval_loss": row["eval_loss"] - 1e-6}

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert resume(out) == 0
    assert equal(weights(out / "model"), weights(whole / "model"))
    assert kept(out) == ["best-000004"]


# ------------------------------------------------------------------------------ what can be wrong


def cut(path):
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-100])


def forge(path, **changes):
    """Changes checkpoint.json and gives it a checksum that fits."""
    facts = read_json(path / "checkpoint.json") | changes
    del facts["checksum"]
    edit_json(path / "checkpoint.json", **changes, checksum=checksum(facts))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        shutil.rmtree,
        lambda path: flip_a_bit(path / SHARD),
        lambda path: forge(path, value="0.5"),
        lambda path: forge(path, value=math.nan),
        lambda path: forge(path, step=2),
        lambda path: shutil.copy(path.with_name("step-000006") / "checkpoint.json", path),
    ],
)
def test_lost_or_damaged_best_weights_are_said_and_only_later_evaluations_count(
    out, whole, capsys, damage
):
    path = out / "checkpoints/best-000004"
    damage(path)
    damaged = path.exists()
    assert resume(out) == 0
    said = capsys.readouterr().out
    assert ("best-000004" in said and ": damaged (" in said) == damaged
    assert f"{out / 'checkpoints'}: the best weights are lost; only later" in said
    assert "best held-out loss: 6.2126, after step 8\n" in said
    assert kept(out) == ["best-000008"] + ["damaged-best-000004"] * damaged
    assert not equal(weights(out / "model"), weights(whole / "model"))


def test_best_weights_of_another_run_are_refused(start, out, tmp_path, complaint):
    assert main(*eight(start, tmp_path / "other", "--lr 3e-2")) == 0
    (name,) = kept(tmp_path / "other")
    shutil.rmtree(out / "checkpoints/best-000004")
    shutil.copytree(tmp_path / "other/checkpoints" / name, out / "checkpoints" / name)
    assert f"{name}: belongs to a run with other flags" in complaint("--resume", out)


def test_best_weights_that_are_damaged_before_the_export_end_the_run_with_one_line(
    start, whole, tmp_path, monkeypatch, complaint
):
    def load(self, last, inner=best.Best.load):
        flip_a_bit(self.path / SHARD)
        return inner(self, last)

    with monkeypatch.context() as patch:
        patch.setattr(best.Best, "load", load)
        said = complaint(*eight(start, tmp_path / "out"))
    assert f"best-000004/{SHARD}: damaged" in said
    assert not (tmp_path / "out/model").exists()
    assert resume(tmp_path / "out") == 0


@pytest.mark.parametrize("changed", ["--keep-best accuracy", "--eval-every 0"])
def test_a_resumed_run_cannot_keep_another_figure_or_none(out, complaint, changed):
    assert "--keep-best" in complaint("--resume", out, changed)
