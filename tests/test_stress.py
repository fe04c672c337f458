"""Training at the edge of fp32: whatever the pairs, the weights and the rates, a run trains on with finite weights or
stops with a message that names the step, and what is written holds no NaN.

The oracle reads the files that a run leaves. A certain model is one whose next token is known by construction.
"""

import json
import math
import re

import pytest
import torch
from conftest import random_pairs, tiny_model
from safetensors.torch import load_file

import asft
import train
from model import save_model

RATES = ["--lr", 1, "--warmup-ratio", 0, "--min-lr-ratio", 1]


def certain_model(directory, gap: float) -> None:
    """After token t comes t + 1, in sequences of any length: log-prob -log(1 + 31 exp(-gap)). Blocks add nothing."""
    model = tiny_model(vocab_size=32, hidden_size=32)
    with torch.no_grad():
        for block in model.model["layers"]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model["norm"].weight.fill_(1)
        model.model["embed_tokens"].weight.copy_(torch.eye(32))
        model.lm_head.weight.copy_(gap / math.sqrt(32) * torch.eye(32).roll(1, 0))
    save_model(model, directory, dtype=torch.float32)


def random_model(directory) -> None:
    save_model(tiny_model(std=0.3), directory, dtype=torch.float32)


def write_pairs(path, pairs: list[tuple[list[int], list[int], list[int]]]):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    path.write_text(
        "".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs)
    )
    return path


def start(tmp_path, *more) -> int:
    return train.main(
        [
            str(word)
            for word in (
                "--model",
                tmp_path / "model",
                "--data",
                tmp_path / "pairs.jsonl",
                "--out",
                tmp_path / "out",
                "--device",
                "cpu",
                "--pairs-per-step",
                2,
                "--save-dtype",
                "fp32",
                *more,
            )
        ]
    )


def survives(tmp_path, capsys, *flags) -> bool:
    """Runs; whether it came to its end. All that is written is finite; a stop leaves no model and names the step, or,
    after the last one, the weight."""
    code, error = start(tmp_path, *flags), capsys.readouterr().err
    metrics = tmp_path / "out" / "metrics.jsonl"
    rows = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    if code == 0:
        weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
        assert len(weights) == 21 and all(tensor.isfinite().all() for tensor in weights.values())
    else:
        assert code == 1 and error.count("\n") == 1 and "Traceback" not in error
        step = re.search(r": step (\d+): .*stopped before the update", error)
        assert (
            int(step[1]) == len(rows) + 1
            if step
            else re.search("is not finite.*; not saved", error)
        )
        assert not (tmp_path / "out" / "model").exists()
    return code == 0


@pytest.fixture(params=asft.LOSSES)
def loss(request) -> list:
    return ["--loss", request.param]


def beta(loss: list, value: float) -> list:
    return ["--beta", value] if "beta" in asft.LOSSES[loss[1]].options else []


def test_pairs_that_are_all_equal_are_dropped_and_when_none_is_left_the_run_says_so(
    tmp_path, capsys
):
    random_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", [([1, 2], [3, 4], [3, 4])] * 5)
    assert start(tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        "no pair left to use (5 read, 0 kept" in error
        and "5 identical" in error
        and error.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_responses_of_one_token_train_with_every_loss(tmp_path, capsys, loss):
    random_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", [([i], [i + 1], [i + 2]) for i in range(6)])
    assert survives(tmp_path, capsys, *loss, "--max-steps", 3)


# Log-probs of -1e-7, where 1 - p is what fp32 can just tell from 0, and of 0.
@pytest.mark.parametrize("gap, logp", [(math.log(31 / 1e-7), -1e-7), (100, 0)])
def test_a_model_that_is_certain_of_both_answers_trains_with_every_loss(
    tmp_path, capsys, loss, gap, logp
):
    certain_model(tmp_path / "model", gap)
    # The shorter answer is how the longer one begins: both are certain, and yet a pair.
    write_pairs(tmp_path / "pairs.jsonl", [([i, i + 1], [i + 2, i + 3], [i + 2]) for i in range(6)])
    assert survives(tmp_path, capsys, *loss, *RATES, "--max-steps", 4)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    rounding = 6e-8 if logp else 0  # of 1 in fp32
    assert first["logp_w"] == pytest.approx(logp, abs=rounding) and first[
        "logp_l"
    ] == pytest.approx(logp, abs=rounding)
    if loss[1] == "asft":
        assert first["clamped"] == 1 and first["rejected_weight"] == pytest.approx(
            0.1 / 1e-6, rel=1e-3
        )


def test_a_rate_of_1_and_a_beta_of_1e4_leave_finite_weights_or_stop_at_a_named_step(
    tmp_path, capsys, loss
):
    random_model(tmp_path / "model")
    write_pairs(
        tmp_path / "pairs.jsonl",
        [
            tuple(ids.tolist() for ids in (pair.prompt, pair.chosen, pair.rejected))
            for pair in random_pairs([(5, 3, 4), (2, 6, 1), (7, 2, 2), (1, 1, 5)])
        ],
    )
    survives(
        tmp_path,
        capsys,
        *loss,
        *RATES,
        *beta(loss, 1e4),
        "--max-grad-norm",
        "inf",
        "--max-steps",
        8,
    )


def test_a_beta_of_1e4_at_certainty_leaves_finite_weights_or_stops_at_a_named_step(
    tmp_path, capsys, loss
):
    certain_model(tmp_path / "model", 100)
    write_pairs(tmp_path / "pairs.jsonl", [([i, i + 1], [i + 2, i + 3], [i + 2]) for i in range(6)])
    survives(
        tmp_path,
        capsys,
        *loss,
        *RATES,
        *beta(loss, 1e4),
        "--max-grad-norm",
        "inf",
        "--max-steps",
        6,
    )


@pytest.mark.parametrize(
    "rates, steps",
    [
        (["--lr", 3e38], 1),
        (["--weight-decay", 3e38, "--lr", 1], 1),
        (["--weight-decay", 3e38, "--lr", 1], 2),
    ],
    ids=str,
)
def test_an_update_that_overflows_is_not_saved_even_if_it_is_the_last(
    tmp_path, capsys, rates, steps
):
    """No loss is computed after the last update, so it is the writing that looks."""
    random_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", [([i], [i + 1], [i + 2]) for i in range(8)])
    assert not survives(
        tmp_path, capsys, "--max-steps", steps, "--warmup-ratio", 0, "--min-lr-ratio", 1, *rates
    )
