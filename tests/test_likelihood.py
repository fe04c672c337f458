"""Likelihood: log-probs of both sides of pairs, their summary, and two models compared.

Oracles: train.py's held-out evaluation, transformers in float64 on unpacked sequences, the binomial
distribution, which is what a bootstrap of an accuracy samples from.
"""

import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    edit_json,
    random_pairs,
    read_json,
    rows,
    run_joined,
    tiny_model,
)
from test_generate import on_two_processes

import eval as program
import evaluation.likelihood
import train
from data import ChatFormat
from evaluation.likelihood import MEASURES, pair_logps, pair_rows, summarise, table
from model import load_model
from support.export import save_model

EXAMPLE = ROOT / "examples" / "model"
CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    """30 pairs of one format."""
    lines = (ROOT / "examples" / "heldout.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join([line for line in lines if line.startswith('{"prompt": "')][:30]))
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The example's model with other weights, and its tokenizer."""
    model, path = load_model(EXAMPLE), tmp_path_factory.mktemp("other") / "model"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    save_model(model, path, dtype=torch.float32, source=EXAMPLE)
    return path


def likelihood(data, out, *words, model=EXAMPLE):
    words = ["likelihood", "--model", model, "--data", data, "--out", out, *words]
    return program.main([str(word) for word in words])


def summary_of(data, out, *words, model=EXAMPLE):
    assert likelihood(data, out, *words, model=model) == 0
    return read_json(out / "summary.json")


def test_the_numbers_are_those_of_train_pys_held_out_evaluation_of_the_same_model(data, tmp_path):
    run = tmp_path / "run"
    flags = f"--model {EXAMPLE} --data {data} --eval-data {data} --out {run} --max-steps 1"
    assert train.main(f"{flags} --device cpu --pairs-per-step 2".split()) == 0
    expected = rows(run, "eval.jsonl")[0]
    measures = summary_of(data, tmp_path / "out")["measures"]
    assert expected["step"] == 0
    for name in ("logp_w", "logp_l", "sum_logp_w", "sum_logp_l", "margin", "accuracy"):
        close = pytest.approx(expected[f"eval_{name}"], rel=1e-5, abs=1e-6)
        assert measures[name]["value"] == close, name


def test_the_numbers_are_those_of_transformers_in_float64_on_unpacked_sequences(data, tmp_path):
    summary = summary_of(data, tmp_path / "out", "--max-tokens-per-gpu", "200")
    theirs = transformers.LlamaForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float64)
    chat, found = ChatFormat(EXAMPLE), rows(tmp_path / "out", "pairs.jsonl")
    assert [row["place"] for row in found] == [f"{data}:{i}" for i in range(1, 31)]
    nats, tokens = {"w": 0, "l": 0}, {"w": 0, "l": 0}
    for row, record in zip(found, rows(tmp_path, "pairs.jsonl"), strict=True):
        prompt = chat.prompt([("user", record["prompt"])])
        for side, letter in (("chosen", "w"), ("rejected", "l")):
            response = chat.response(record[side])
            with torch.no_grad():
                logps = theirs(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            each = [float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(response)]
            assert row[f"tokens_{letter}"] == len(each)
            assert row[f"sum_logp_{letter}"] == pytest.approx(sum(each), rel=1e-4)
            assert row[f"logp_{letter}"] == pytest.approx(sum(each) / len(each), rel=1e-4)
            nats[letter] += sum(each)
            tokens[letter] += len(each)
        assert row["margin"] == row["logp_w"] - row["logp_l"]
        assert row["accuracy"] == (row["margin"] > 0)
    (tie,) = pair_rows(random_pairs([(2, 3, 3)]), np.full((1, 2, 2), -1.0))
    assert (tie["margin"], tie["accuracy"]) == (0, 0)
    perplexity = pytest.approx(math.exp(-nats["w"] / tokens["w"]), rel=1e-5)
    assert summary["measures"]["perplexity_w"]["value"] == perplexity
    found = (summary["tokens_w"], summary["tokens_l"], summary["pairs"])
    assert found == (tokens["w"], tokens["l"], 30)


# ---------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_of_two_processes_add_up_to_the_same_bits_for_any_number_of_pairs(
    monkeypatch, count
):
    model = tiny_model().requires_grad_(False)
    pairs = random_pairs([(3 + i, 4, 2 + i) for i in range(count)])
    whole, shares = pair_logps(model, pairs, 30, CPU), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shares.append(pair_logps(model, pairs, 30, CPU))
    assert np.array_equal(shares[0] + shares[1], whole) and not (shares[0] * shares[1]).any()
    assert np.all(whole < 0)


def test_two_processes_write_the_same_files_for_a_single_pair(data, tmp_path):
    data.write_text(data.read_text().splitlines(keepends=True)[0])
    assert likelihood(data, tmp_path / "one.jsonl") == 0
    run = ["likelihood --model", EXAMPLE, "--data", data, "--out", tmp_path / "two.jsonl"]
    said = run_joined(run, program="eval")
    for end in ("jsonl", "json"):
        assert (tmp_path / f"two.{end}").read_text() == (tmp_path / f"one.{end}").read_text()
    assert said.count("accuracy") == 1


def test_processes_with_other_pairs_or_another_model_are_refused(
    data, other, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("support.processes.time.sleep", lambda _: None)
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "1").write_text("".join(lines[1:] + lines[:1]))

    def other_pairs():
        return likelihood(tmp_path / "1" if os.environ["RANK"] == "1" else data, tmp_path / "out")

    def other_model():
        model = other if os.environ["RANK"] == "1" else EXAMPLE
        return likelihood(data, tmp_path / "out", model=model)

    for name, action in (("pairs", other_pairs), ("weights", other_model)):
        assert on_two_processes(action) == [2, 2]
        assert f"processes differ: {name} is" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_if_a_process_dies_the_other_says_so(data, tmp_path, monkeypatch, capfd):
    whole = evaluation.likelihood.pair_logps

    def logps_or_die(*args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    monkeypatch.setattr(evaluation.likelihood, "pair_logps", logps_or_die)
    assert on_two_processes(lambda: likelihood(data, tmp_path / "out")) == [1, -signal.SIGKILL]
    error = capfd.readouterr().err
    assert "eval.py: another process of the run ended" in error and "Traceback" not in error


def test_log_probs_that_are_not_finite_are_not_averaged(data, tmp_path, capsys):
    model = load_model(EXAMPLE).requires_grad_(False)
    word = ChatFormat(EXAMPLE).tokenizer.encode("yes", add_special_tokens=False).ids[0]
    model.model["embed_tokens"].weight[word] = 3e38
    save_model(model, tmp_path / "model", dtype=torch.float32, source=EXAMPLE)
    assert likelihood(data, tmp_path / "out", model=tmp_path / "model") == 1
    complaint = (
        rf"{tmp_path}/model: the log-probs of \d+ of 30 pairs are not finite, first {data}:1"
    )
    assert re.search(complaint, capsys.readouterr().err) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- intervals


def made_rows(margins, tokens=10):
    made = []
    for margin in margins:
        row = {"logp_w": -1.0, "logp_l": -1.0 - margin, "margin": margin, "tokens_w": tokens}
        row |= {"sum_logp_w": -tokens, "sum_logp_l": -tokens * (1 + margin)}
        made.append(row | {"accuracy": float(margin > 0)})
    return made


def width_of(measure):
    return measure["high"] - measure["low"]


def test_the_limits_of_an_accuracy_are_the_quantiles_of_the_binomial_distribution():
    n, right = 60, 42
    p = right / n
    cumulated = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    (found,) = summarise(made_rows([0.5] * right + [-0.5] * (n - right)))
    assert found["accuracy"]["value"] == right / n
    for end, quantile in (("low", 0.025), ("high", 0.975)):
        expected = int(np.searchsorted(cumulated, quantile)) / n
        assert found["accuracy"][end] == pytest.approx(expected, abs=1.01 / n)
    # A mean of n numbers has a standard error; 95% of a normal distribution lies within 1.96 of it.
    margins = np.random.default_rng(1).normal(0.3, 2.0, 400)
    (found,) = summarise(made_rows(margins))
    assert width_of(found["margin"]) == pytest.approx(2 * 1.96 * margins.std() / 20, rel=0.1)


def test_the_interval_of_a_difference_is_that_of_paired_data_and_of_the_first_less_the_second():
    margins = np.random.default_rng(2).normal(0, 3.0, 50)
    first, second, difference = summarise(made_rows(margins + 0.25), made_rows(margins))
    assert width_of(first["margin"]) > 1 and width_of(second["margin"]) > 1
    assert list(difference["margin"].values()) == pytest.approx([0.25] * 3)
    again = [summarise(made_rows(margins), seed=seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_perplexity_weighs_tokens_alike_and_mean_log_probs_responses_alike():
    made = made_rows([0.0], tokens=1) + made_rows([0.0], tokens=3)
    made[0] |= {"logp_w": -4.0, "sum_logp_w": -4.0}
    (found,) = summarise(made)
    assert found["logp_w"]["value"] == -2.5 and found["sum_logp_w"]["value"] == -3.5
    assert found["perplexity_w"]["value"] == pytest.approx(math.exp(7 / 4))


# --------------------------------------------------------------------------------------- two models


def test_compare_gives_each_models_own_numbers_and_their_differences(data, other, tmp_path, capsys):
    both = summary_of(data, tmp_path / "both", "--compare", other)
    printed = capsys.readouterr().out
    a, b = summary_of(data, tmp_path / "a"), summary_of(data, tmp_path / "b", model=other)
    assert both["measures"] == a["measures"] != b["measures"] == both["compare_measures"]
    for name, part in both["difference"].items():
        difference = a["measures"][name]["value"] - b["measures"][name]["value"]
        assert part["value"] == pytest.approx(difference)
        assert part["low"] <= part["value"] <= part["high"]
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert f"{part['value']:+.4f} [{part['low']:+.4f}, {part['high']:+.4f}]" in line
    for name, single in (("pairs", "a"), ("pairs-compare", "b")):
        expected = (tmp_path / single / "pairs.jsonl").read_text()
        assert (tmp_path / "both" / f"{name}.jsonl").read_text() == expected


def test_models_whose_tokenizers_differ_are_not_compared(data, other, tmp_path, capsys):
    def refused(first, second, line):
        assert likelihood(data, tmp_path / "out", "--compare", second, model=first) == 2
        assert f"other ids than {first}'s, first for {data}:{line}" in capsys.readouterr().err

    second = shutil.copytree(other, tmp_path / "second")
    bpe = read_json(second / "tokenizer.json")["model"]
    edit_json(second / "tokenizer.json", model=bpe | {"merges": []})
    refused(EXAMPLE, second, 1)
    # The same ids, except for a last pair, which one of the two drops as empty, or reads otherwise.
    dropping = {"type": "Replace", "pattern": {"String": "☃"}, "content": ""}
    edit_json(second / "tokenizer.json", model=bpe, normalizer=dropping)
    same = data.read_text()
    for chosen in ("☃", "Yes☃"):
        data.write_text(f'{same}{{"prompt": "Well?", "chosen": "{chosen}", "rejected": "No."}}\n')
        refused(EXAMPLE, second, 31)
        refused(second, EXAMPLE, 31)
    assert not (tmp_path / "out").exists()


MISTAKES = """
DATA --out DIR/there.jsonl -> there.jsonl exists
DIR/none --out DIR/o -> No such file
DIR/bad.jsonl --out DIR/o -> bad.jsonl:1: key rejected is missing
DATA --out DIR/o --max-tokens-per-gpu 20 -> pairs.jsonl:7: a pair of 62 packed tokens exceeds
DATA --out DIR/o --max-tokens 9999 -> above the model's max_position_embeddings 512
DATA --out DIR/o --compare DIR -> config.json: No such file
DATA --out DIR/o --beta 1 -> unrecognized arguments: --beta"""
UNWRITABLE = """
DATA --out DATA/o -> Not a directory
DATA --out /proc/o.jsonl -> --out /proc/o.jsonl:
DATA --out /proc/o/p -> --out /proc/o/p:"""


@pytest.mark.parametrize("mistake", MISTAKES.split("\n")[1:] + UNWRITABLE.split("\n")[1:])
def test_mistakes_get_one_line_and_what_is_there_stays(
    data, tmp_path, capsys, monkeypatch, mistake
):
    if mistake in UNWRITABLE:  # found before the work
        monkeypatch.setattr(evaluation.likelihood, "read_preferences", None)
    (tmp_path / "there.jsonl").write_text("kept")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "chosen": "y"}\n')
    words, complaint = mistake.split(" -> ")
    words = words.replace("DATA", str(data)).replace("DIR", str(tmp_path)).split()
    assert program.main(["likelihood", "--model", str(EXAMPLE), "--data", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.py: ") and complaint in error
    assert error.count("\n") == 1 + ("bad.jsonl" in mistake)  # bad lines are counted on the second
    assert (tmp_path / "there.jsonl").read_text() == "kept" and not (tmp_path / "o").exists()


def test_the_columns_of_the_table_stay_apart_however_long_a_number_is():
    figures = {"value": -123456.0, "low": -234567.0, "high": -12345.0}
    summary = dict.fromkeys(MEASURES, figures)
    head, *lines = table(["one", "another"], [summary, summary]).splitlines()
    for line, text in zip(lines, MEASURES.values(), strict=True):
        assert line.endswith(f"-12345.0000]  {text}") and line.count("-12345.0000]  ") == 2
        assert line.index(text) == head.index("[95% of")
