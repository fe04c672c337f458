"""Training at the edge of fp32: whatever the pairs, the weights and the rates, a run trains on with
finite weights or stops with a message that names the step, and writes no NaN.

The oracle reads the files that a run leaves. A certain model's next token is known by construction.
"""

import math
import re

import pytest
import torch
from conftest import main, random_pairs, rows, save_tiny, tiny_model, write_pairs
from safetensors.torch import load_file

import asft
from support.export import save_model

CONSTANT = "--warmup-ratio 0 --min-lr-ratio 1"
# The shorter answer is how the longer one begins: a certain model is certain of both.
BEGINNINGS = [([i, i + 1], [i + 2, i + 3], [i + 2]) for i in range(6)]
ONE_TOKEN = [([i], [i + 1], [i + 2]) for i in range(6)]
RANDOM = random_pairs([(5, 3, 4), (2, 6, 1), (7, 2, 2), (1, 1, 5)])
each_loss = pytest.mark.parametrize("loss", asft.LOSSES)


def certain_model(gap: float):
    """A model that gives token t + 1 after t, in sequences of any length: its log-prob is
    -log(1 + 31 exp(-gap)). Blocks add nothing."""
    model = tiny_model(vocab_size=32, hidden_size=32)
    with torch.no_grad():
        for block in model.model["layers"]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model["norm"].weight.fill_(1)
        model.model["embed_tokens"].weight.copy_(torch.eye(32))
        model.lm_head.weight.copy_(gap / math.sqrt(32) * torch.eye(32).roll(1, 0))
    return model


@pytest.fixture
def survives(tmp_path, capsys):
    """survives(pairs, *flags) trains the model of this test (a random one unless it is saved) and
    returns whether the run came to its end. All that is written is finite. A run that stops leaves
    no model and names the step, or, after the last one, the weight."""

    def run(pairs, *more) -> bool:
        model, out = tmp_path / "model", tmp_path / "out"
        if not model.exists():
            save_tiny(model, std=0.3)
        data = write_pairs(tmp_path / "pairs.jsonl", pairs)
        files = ["--model", model, "--data", data, "--out", out]
        code = main(*files, "--device cpu --pairs-per-step 2 --save-dtype fp32", *more)
        error = capsys.readouterr().err
        logged = rows(out) if (out / "metrics.jsonl").exists() else []
        assert all(math.isfinite(row["loss"] + row["grad_norm"]) for row in logged)
        if code == 0:
            weights = load_file(out / "model/model.safetensors")
            assert len(weights) == 21 and all(x.isfinite().all() for x in weights.values())
            return True
        assert code == 1 and error.count("\n") == 1 and "Traceback" not in error
        step = re.search(r": step (\d+): .*stopped before the update", error)
        if step:
            assert int(step[1]) == len(logged) + 1
        else:
            assert re.search("is not finite.*; not saved", error)
        assert not (out / "model").exists()
        return False

    return run


# Log-probs of -1e-7, where fp32 can just tell 1 - p from 0, and of 0; what fp32 rounds at 1.
@each_loss
@pytest.mark.parametrize("gap, logp, rounding", [(math.log(31 / 1e-7), -1e-7, 6e-8), (100, 0, 0)])
def test_a_model_that_is_certain_of_both_answers_trains_with_every_loss(
    tmp_path, survives, loss, gap, logp, rounding
):
    save_model(certain_model(gap), tmp_path / "model", dtype=torch.float32)
    assert survives(BEGINNINGS, "--lr 1 --max-steps 4", CONSTANT, "--loss", loss)
    first = rows(tmp_path / "out")[0]
    assert [first["logp_w"], first["logp_l"]] == pytest.approx([logp, logp], abs=rounding)
    assert first.get("clamped", 1) == 1


@each_loss
@pytest.mark.parametrize("certain", [False, True])
def test_a_rate_of_1_and_a_beta_of_1e4_end_well(tmp_path, survives, loss, certain):
    """Finite weights, or a stop at a named step."""
    if certain:
        save_model(certain_model(100), tmp_path / "model", dtype=torch.float32)
    beta = "--beta 1e4" if "beta" in asft.LOSSES[loss].options else ""
    extreme = f"--lr 1 {CONSTANT} --max-grad-norm inf --max-steps 8 --loss"
    survives(BEGINNINGS if certain else RANDOM, extreme, loss, beta)


@pytest.mark.parametrize("decay, steps", [(0, 1), (3e38, 1), (3e38, 2)])
def test_an_update_that_overflows_is_not_saved(survives, decay, steps):
    """No loss is computed after the last update, so the export checks the weights."""
    rate = "--lr 1" if decay else "--lr 3e38"
    assert not survives(ONE_TOKEN, CONSTANT, rate, "--weight-decay", decay, "--max-steps", steps)
