"""What a run shows of its held-out pairs: figures by group.

Oracles: log-probs of plain sequences, one process against two.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LENGTHS,
    ROOT,
    flags,
    main,
    random_pairs,
    read_json,
    rows,
    run_joined,
    trained,
    write_pairs,
)
from safetensors.torch import load_file
from test_train import oracle_logps

from data import ChatFormat
from model import load_model
from support.held_out import read_groups
from support.log import one_line

HELD_OUT = random_pairs(LENGTHS, seed=2)
EXAMPLES = ROOT / "examples/heldout.jsonl"
# The values of `source` in the rows of these pairs, and the groups' names.
SOURCES = ["wiki", "chat", None, "wiki", 3, ["a", {"b": 1}], "chat", 3, "", None]
NAMES = ["wiki", "chat", "no source", "wiki", "3", '["a", {"b": 1}]', "chat", "3", "", "no source"]


@pytest.fixture(scope="module")
def sourced(tmp_path_factory):
    """Held-out pairs with a `source`, between rows that are dropped; one row lacks the key."""
    path = write_pairs(tmp_path_factory.mktemp("sourced") / "held.jsonl", HELD_OUT)
    lines = []
    for line, source in zip(path.read_text().splitlines(), SOURCES, strict=True):
        row = json.loads(line) | {"source": source}
        lines.append(json.dumps(row | {"rejected_ids": row["chosen_ids"], "source": "dropped"}))
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines).replace(', "source": null', "", 1))
    return path


def test_held_out_figures_by_a_key_are_means_over_the_pairs_of_each_value(
    start, sourced, tmp_path, capsys
):
    """Several micro-batches, each with pairs of several groups."""
    out = tmp_path / "out"
    common = ["--max-steps 1 --max-tokens-per-gpu 60 --eval-data", sourced]
    trained(start, out, *common, "--eval-by source")
    said = capsys.readouterr().out
    assert read_json(out / "config.json")["eval_data"]["identical"] == 10
    first = rows(out, "eval.jsonl")[0]
    assert list(first["by"]) == ["wiki", "chat", "no source", "3", '["a", {"b": 1}]', ""]
    model = load_model(start / "model")
    with torch.no_grad():
        logps = np.array([oracle_logps(model, pair)[0] for pair in HELD_OUT])
    for name, found in [(None, first), *first["by"].items()]:
        within = [name in (None, other) for other in NAMES]
        w, l = logps[within].T
        expected = {"logp_w": w, "logp_l": l, "margin": w - l, "accuracy": w > l}
        expected |= {"loss": -1.1 * w - 0.1 * np.log(1 - np.exp(l))}
        for metric, values in expected.items():
            assert found[f"eval_{metric}"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6)
        assert name is None or found["pairs"] == sum(within)
    line = next(line for line in said.splitlines() if line.startswith("  wiki: pairs 2 | loss "))
    assert f"accuracy {first['by']['wiki']['eval_accuracy']:.1%}" in line
    # The figures of all pairs stay the same.
    trained(start, tmp_path / "plain", *common)
    plain = rows(tmp_path / "plain", "eval.jsonl")
    assert [{k: v for k, v in row.items() if k != "by"} for row in rows(out, "eval.jsonl")] == plain


def test_two_processes_give_the_figures_by_group_that_one_gives(start, sourced, tmp_path):
    """A group may be on one of them only."""
    more = ["--max-steps 1 --eval-by source --eval-data", sourced]
    run_joined(flags(start, tmp_path / "two", *more))
    trained(start, tmp_path / "one", *more)
    one, two = (rows(tmp_path / name, "eval.jsonl")[0]["by"] for name in ("one", "two"))
    assert list(one) == list(two)
    for name, figures in one.items():
        assert two[name] == pytest.approx(figures, rel=1e-5, abs=1e-6)


def test_a_process_without_a_held_out_pair_does_not_count(start, sourced, tmp_path):
    """It computes a stand-in, since the other one needs it for the sharded model."""
    path = tmp_path / "one.jsonl"
    path.write_text(sourced.read_text().splitlines()[1])
    more = ["--max-steps 1 --eval-by source --eval-data", path]
    run_joined(flags(start, tmp_path / "two", *more))
    trained(start, tmp_path / "one", *more)
    one, two = (rows(tmp_path / name, "eval.jsonl")[0] for name in ("one", "two"))
    assert two.pop("by")["wiki"] == pytest.approx(one.pop("by")["wiki"], rel=1e-5, abs=1e-6)
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_values_that_look_alike_are_groups_of_their_own(tmp_path):
    path, values = tmp_path / "p.jsonl", [1, "1", True, "true", "no id", None, "wiki"]
    path.write_text("\n".join(json.dumps({"id": value}) for value in values))
    pairs = [SimpleNamespace(place=f"{path}:{i}") for i in range(1, 8)]
    names = ["1", '"1"', "true", '"true"', '"no id"', "no id", "wiki"]
    assert read_groups(path, "id", pairs) == {name: {i} for i, name in enumerate(names)}


def test_a_key_of_more_than_twenty_values_is_refused(start, tmp_path, complaint):
    path = tmp_path / "many.jsonl"
    pairs = [random_pairs([(3, 4, 5)], seed=i)[0] for i in range(22)]
    given = [json.loads(line) for line in write_pairs(path, pairs).read_text().splitlines()]

    def written(values: int):
        """Each row its own value, up to so many; the last row has none."""
        of_rows = [{"id": min(i, values - 1)} for i in range(21)] + [{}]
        lines = [json.dumps(row | more) for row, more in zip(given, of_rows, strict=True)]
        path.write_text("\n".join(lines))
        return path

    pairs = [SimpleNamespace(place=f"{path}:{i}") for i in range(1, 23)]
    assert len(read_groups(written(20), "id", pairs)) == 21
    more = ["--max-steps 1 --eval-by id --eval-data", written(21)]
    for plan in ([], ["--plan 2"]):  # a plan says what the run would say
        said = complaint(*flags(start, tmp_path / "out", *more, *plan))
        assert f"--eval-by id: 21 different values in {path}, wanted at most 20" in said
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_may_have_another_key(start, sourced, tmp_path):
    out = tmp_path / "out"
    trained(start, out, "--max-steps 2 --save-every 1 --eval-data", sourced)
    weights = (out / "model/model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    assert main("--resume", out, "--eval-by source") == 0
    assert ["by" in row for row in rows(out, "eval.jsonl")] == [False, True]
    assert (out / "model/model.safetensors").read_bytes() == weights


# ------------------------------------------------------------------------------------ samples


@torch.no_grad()
def greedy(model, chat: ChatFormat, question: str) -> str:
    """At most 64 tokens, each from a pass over all before it."""
    ids, new = chat.prompt([("user", question)]), []
    while len(new) < 64:
        best = int(model.logits(torch.tensor(ids + new))[-1].argmax())
        if best in chat.stop_ids:
            break
        new.append(best)
    return chat.decode(new)


def test_samples_are_answered_at_each_evaluation_by_the_weights_of_its_step(tmp_path, capsys):
    """The file has all of them; the end of the run shows the first and the last."""
    out = tmp_path / "out"
    common = "--device cpu --max-steps 4 --pairs-per-step 4 --lr 3e-2 --save-dtype fp32"
    assert main(common, "--samples 2 --eval-every 2 --save-every 2 --out", out) == 0
    said, evaluations = capsys.readouterr().out, rows(out, "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    questions = [json.loads(line)["prompt"] for line in EXAMPLES.read_text().splitlines()[:2]]
    chat, model = ChatFormat(out / "model"), load_model(ROOT / "examples/model")
    stored = load_file(out / "checkpoints/step-000002/00000-of-00001.safetensors")
    after_2 = {key.removeprefix("weight."): stored[key] for key in stored if "weight." in key}
    for row, weights in zip(evaluations, [{}, after_2, None], strict=True):
        if weights is None:
            model = load_model(out / "model")
        else:
            model.load_state_dict(weights, strict=False)
        assert row["answers"] == [greedy(model, chat, question) for question in questions]
    first, _, last = (row["answers"] for row in evaluations)
    assert first != evaluations[1]["answers"] != last
    for question, old, new in zip(questions, first, last, strict=True):
        shown = [one_line(text) for text in (question, old, new)]
        assert "  prompt  {}\n  before  {}\n  after   {}\n".format(*shown) in said
