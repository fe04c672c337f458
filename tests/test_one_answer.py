"""Rows with one answer, good or bad: read from every form, packed, trained on, counted, measured.

Oracles: turns written out by hand, 40-digit numbers, plain sequences (test_train.oracle_logps),
finite differences, and pairs themselves, whose gradient is the sum of their answers'.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import LENGTHS, ROOT, flags, main, random_pairs, rows, run_joined, tiny_model, trained
from test_data import shown_in_docs
from test_forms import ASK, FRUIT, TALK, messages, prompt_of, read_one, refused_prompt, stored
from test_train import oracle_logps, parsed
from torch.utils.flop_counter import FlopCounterMode

import asft
import eval as program
import train
from data import ChatFormat, Pair, encode_preferences, pack, read_preferences
from model import load_model
from support.flops import pair_flops
from support.reading import describe

EXAMPLE = ROOT / "examples" / "model"
PAIRS = random_pairs(LENGTHS)
NOTHING = np.zeros(0, np.int32)
GOOD = [Pair(p.prompt, p.chosen, NOTHING, p.place) for p in PAIRS]
BAD = [Pair(p.prompt, NOTHING, p.rejected, p.place) for p in PAIRS]
MIXED = [PAIRS[0], GOOD[1], BAD[2], BAD[3], GOOD[4], PAIRS[5], BAD[6]]


def id_rows(pairs) -> list[dict]:
    """Records of token ids: pairs, or one labelled answer."""
    records = []
    for p in pairs:
        prompt, chosen, rejected = (x.tolist() for x in (p.prompt, p.chosen, p.rejected))
        if chosen and rejected:
            records.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            answer = {"response_ids": chosen or rejected, "label": bool(chosen)}
            records.append({"prompt_ids": prompt} | answer)
    return records


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ----------------------------------------------------------------------------------------- forms

APPLE = "An apple."
WHOLE = [f"user: {FRUIT}", f"assistant: {APPLE}"]
SHAREGPT = [{"from": "human", "value": FRUIT}, {"from": "gpt", "value": APPLE}]
HH = f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {FRUIT}\n\nAssistant:"
READ = {
    "TRL's": ({"prompt": FRUIT, "completion": f" {APPLE}"}, ASK),
    "TRL's, of messages": (
        {"prompt": messages(WHOLE[0]), "completion": messages(WHOLE[1])},
        ASK,
    ),
    "the same as JSON": (
        stored({"prompt": messages(WHOLE[0]), "completion": messages(WHOLE[1])}),
        ASK,
    ),
    "one message": ({"prompt": FRUIT, "completion": messages(WHOLE[1])[0]}, ASK),
    "a completion that holds its prompt": ({"prompt": FRUIT, "completion": messages(*WHOLE)}, ASK),
    "a transcript": ({"prompt": HH, "completion": f"{HH} {APPLE}"}, TALK),
    "messages": ({"messages": messages(*WHOLE)}, ASK),
    "messages as JSON": (stored({"messages": messages(*WHOLE)}), ASK),
    "conversations": ({"conversations": SHAREGPT}, ASK),
    "earlier turns": (
        {"messages": messages("user: Hi.", "assistant: Hello.", *WHOLE)},
        TALK,
    ),
    "messages and their prompt": ({"prompt": FRUIT, "messages": messages(*WHOLE)}, ASK),
    "conversations and their prompt": ({"prompt": FRUIT, "conversations": SHAREGPT}, ASK),
    "messages that repeat the completion": (
        {"prompt": FRUIT, "completion": APPLE, "messages": messages(*WHOLE)},
        ASK,
    ),
    "alpaca's": (
        {"instruction": "Name", "input": "a fruit.", "output": APPLE},
        [("user", "Name\na fruit.")],
    ),
    "alpaca's with history": (
        {"instruction": FRUIT, "history": [["Hi.", "Hello."]], "output": APPLE},
        TALK,
    ),
    "a system column": (
        {"system": "Be kind.", "messages": messages("system: Be \n kind.", *WHOLE)},
        [("system", "Be kind."), *ASK],
    ),
    "null columns": (
        {"prompt": FRUIT, "completion": APPLE, "messages": None, "output": float("nan")}
        | {"chosen": None, "rejected": None, "prompt_ids": None},
        ASK,
    ),
}


@pytest.mark.parametrize("label", [{"label": True}, {"kto_tag": False}, {"label": None}], ids=str)
@pytest.mark.parametrize("name", READ)
def test_a_row_with_one_answer_is_read_as_its_question_and_answer(name, label, tmp_path):
    record, turns = READ[name]
    if label == {"label": None}:  # both names of the label
        label = {"label": True, "kto_tag": True}
    answers = (APPLE, None) if True in label.values() else (None, APPLE)
    found, counts = read_one(record | label, tmp_path)
    assert found == (turns, *answers) and counts == {"read": 1, "bad lines": 0}


ONE = {"prompt": FRUIT, "completion": APPLE}
PAIR = {"prompt": FRUIT, "chosen": APPLE, "rejected": "No."}
REFUSED = {
    "no label": (ONE, "key label is missing: wanted true or false beside completion"),
    "ids without a label": (
        {"prompt_ids": [1], "response_ids": [2]},
        "key label is missing: wanted true or false beside response_ids",
    ),
    "a null label": (ONE | {"label": None}, "key label is missing"),
    "1 as label": (ONE | {"label": 1}, "label is 1, wanted true (a good answer) or false (bad)"),
    "0.0 as label": (ONE | {"kto_tag": 0.0}, "kto_tag is 0.0, wanted true"),
    "a text as label": (ONE | {"label": "true"}, "label is 'true', wanted true"),
    "two labels": (ONE | {"label": True, "kto_tag": False}, "label and kto_tag differ"),
    "no answer": ({"prompt": FRUIT, "label": True}, "key completion is missing"),
    "a null answer": (ONE | {"completion": None, "label": True}, "key completion is missing"),
    "ids without an answer": ({"prompt_ids": [1], "label": True}, "response_ids is missing"),
    "two answers": (ONE | {"output": "No.", "label": True}, "found completion and output"),
    "a pair and an answer": (
        PAIR | {"completion": "Maybe.", "label": True},
        "found chosen, and completion with label; wanted a pair or one labelled answer",
    ),
    "a pair of ids and an answer": (
        id_rows(PAIRS)[0] | {"response_ids": [1], "kto_tag": False},
        "found chosen_ids, and response_ids with kto_tag",
    ),
    "half a pair with a label": (
        {"prompt": FRUIT, "chosen": APPLE, "label": True},
        "key rejected is missing",
    ),
    "no prompt": ({"completion": APPLE, "label": True}, "key prompt is missing"),
    "two prompts": (
        ONE | {"instruction": "Name a colour.", "label": True},
        "instruction and prompt give different prompts",
    ),
    "another conversation": (
        ONE | {"messages": messages(WHOLE[0], "assistant: A pear."), "label": True},
        "messages hold another conversation than completion",
    ),
    "messages about something else": (
        {"prompt": "Name a colour.", "messages": messages(*WHOLE), "label": True},
        "prompt is not among the turns of messages",
    ),
    "Python's repr": (
        stored({"prompt": FRUIT, "completion": messages(WHOLE[1])}, str) | {"label": True},
        "completion holds messages as text that is not JSON",
    ),
    "a number as answer": (
        {"prompt": FRUIT, "completion": [], "label": True},
        "completion is [], wanted a string or a list of messages",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_without_one_clear_answer_and_label_is_a_bad_line(name, tmp_path):
    record, found = REFUSED[name]
    complaint, counts = read_one(record, tmp_path)
    assert found in complaint and counts == {"read": 1, "bad lines": 1}


@pytest.mark.parametrize(
    "more", [{"label": True}, {"label": "fruit"}, {"completion": "x"}, {"label": 1, "output": "x"}]
)
def test_a_pair_stays_a_pair_beside_a_label_or_an_answer(more, tmp_path):
    assert read_one(PAIR | more, tmp_path)[0] == (ASK, APPLE, "No.")


def test_kept_and_dropped_rows_are_counted_and_the_header_says_so(tmp_path):
    """An answer that is there and empty is not an absent one."""
    records = [ONE | {"label": True}, ONE | {"label": False}, ONE | {"label": True}, PAIR]
    records += [ONE | {"completion": " ", "label": True}, ONE | {"prompt": "", "label": False}]
    records += [ONE | {"completion": APPLE * 50, "label": False}]
    records += [{"messages": messages(WHOLE[0]), "label": True}]  # ends with the user's turn
    records += [ONE | {"completion": f"{FRUIT} {APPLE}", "label": False}]
    path, counts = write(tmp_path / "a.jsonl", records), Counter()
    chat = ChatFormat(EXAMPLE)
    pairs = encode_preferences(read_preferences(path, counts), chat, 60, "drop", counts)
    asked = chat.prompt([("user", FRUIT)])
    assert [p.prompt.tolist() for p in pairs] == [asked] * 5
    said = [(chat.decode(p.chosen.tolist()), chat.decode(p.rejected.tolist())) for p in pairs]
    end = "<|eot_id|>"
    one = APPLE + end
    assert said == [(one, ""), ("", one), (one, ""), (one, f"No.{end}"), ("", f"{FRUIT} {one}")]
    assert describe(counts) == (
        "9 read, 5 kept (1 pairs, 2 good and 2 bad answers), 0 of them truncated; "
        "dropped: 0 bad lines, 0 unequal prompts, 3 empty, 1 overlong, 0 identical. "
        "In 1 the answers begin with the prompt: left in by mistake?"
    )
    counts = Counter()
    kept = encode_preferences(read_preferences(path), chat, 60, "truncate", counts)
    assert len(kept) == 6 and counts["truncated"] == 1 and counts["bad answers"] == 3
    assert len(kept[4].prompt) + len(kept[4].rejected) == 60 and not len(kept[4].chosen)


@pytest.mark.parametrize("name", [name for name in READ if name != "null columns"])
def test_generate_answers_the_prompts_of_such_rows_with_good_answers_as_references(name, tmp_path):
    record, turns = READ[name]
    assert prompt_of(record | {"label": True}, tmp_path) == (turns, APPLE)
    assert prompt_of(record | {"kto_tag": False}, tmp_path) == (turns, None)


def test_a_label_alone_does_not_change_what_a_prompt_is(tmp_path):
    asks = {"messages": messages(WHOLE[0]), "label": True}
    assert prompt_of(asks, tmp_path) == (ASK, None)
    assert prompt_of({"prompt": FRUIT, "label": False}, tmp_path) == (ASK, None)
    assert prompt_of({"prompt": FRUIT, "output": APPLE, "label": 3}, tmp_path) == (ASK, APPLE)
    gold = ONE | {"label": False, "reference": "A pear."}
    assert prompt_of(gold, tmp_path) == (ASK, "A pear.")
    ids = {"prompt_ids": [1, 2], "response_ids": [3], "label": True}
    for row in (ids, ids | {"completion": APPLE}):  # the text that the ids were made of
        assert prompt_of(row, tmp_path) == ([1, 2], None)
    assert "no --raw" in refused_prompt(ONE | {"label": True}, tmp_path, raw=True)


def test_what_trl_makes_of_pairs_is_read_as_their_answers(tmp_path):
    from datasets import Dataset
    from trl import unpair_preference_dataset

    lines = (ROOT / "examples/heldout.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records = [r for r in records if r.keys() == {"prompt", "chosen", "rejected"}]
    for name, kind in (("texts", str), ("messages", list)):
        some = [r for r in records if all(isinstance(value, kind) for value in r.values())][:5]
        pairs = read_preferences(write(tmp_path / "pairs.jsonl", some))
        path = tmp_path / f"{name}.jsonl"
        unpair_preference_dataset(Dataset.from_list(some)).to_json(path)
        found = {(str(p.prompt), p.chosen, p.rejected) for p in read_preferences(path)}
        good = {(str(p.prompt), p.chosen, None) for p in pairs}
        assert len(some) == 5 and found == good | {(str(p.prompt), None, p.rejected) for p in pairs}


# -------------------------------------------------------------------------------- packing, losses


@pytest.mark.parametrize("share_prompt", [True, False])
def test_nothing_is_packed_for_an_absent_answer(share_prompt):
    a, b, c = (np.array(x, np.int32) for x in ([5, 6], [7, 8, 9], [3]))
    batch = pack(
        [Pair(a, b, NOTHING, ""), Pair(a, NOTHING, b, ""), Pair(c, a, b, "")], share_prompt
    )
    whole, start = [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]
    again = [] if share_prompt else [3]
    assert batch.tokens_T.tolist() == [*whole, *whole, 3, 5, 6, *again, 7, 8, 9]
    again = [] if share_prompt else [0]
    assert batch.positions_T.tolist() == [*start, *start, 0, 1, 2, *again, 1, 2, 3]
    assert batch.length_R.tolist() == [3, 0, 0, 3, 2, 3]
    assert batch.target_S.tolist() == [7, 8, 9, 7, 8, 9, 5, 6, 7, 8, 9]
    assert batch.response_S.tolist() == [0, 0, 0, 3, 3, 3, 4, 4, 5, 5, 5]
    last = [10, 13, 14] if share_prompt else [13, 14, 15]
    assert batch.scored_index_S.tolist() == [1, 2, 3, 6, 7, 8, 10, 11, *last]
    assert batch.segments.query_starts.diff().tolist() == [5, 5, 3, 4 - share_prompt]
    assert batch.segments.key_starts.diff().tolist() == [5, 5, 3, 4]
    sizes = [p.packed_tokens(share_prompt) for p in (GOOD[0], BAD[0], PAIRS[0])]
    assert sizes == [12, 9, 16 if share_prompt else 21]
    # Queries with keys, and weights with values: 4 heads of size 8, 2 layers, 5 causal tokens.
    attention, model = 2 * 2 * 4 * 8 * 2 * (1 + 2 + 3 + 4 + 5), tiny_model()
    for one in (Pair(a, b, NOTHING, ""), Pair(a, NOTHING, b, "")):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pack([one], share_prompt))
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        assert pair_flops(model.config, [one], share_prompt)[0, :2].sum() == products + attention


TERMS = [  # logp_w, logp_l (None: absent), beta, loss, its slopes: with 40 digits
    (-0.7, None, 0.1, 0.77, -1.1, 0.0),
    (None, -1.0, 0.1, 0.0458675145387, 0.0, 0.0581976706869),
    (None, -0.001, 0.5, 3.4541276186577, 0.0, 499.750041667),
    (-2.0, None, 1.0, 4.0, -2.0, 0.0),
]


@pytest.mark.parametrize("logp_w, logp_l, beta, loss, slope_w, slope_l", TERMS)
def test_the_term_of_an_absent_answer_and_its_slope_are_exactly_0(
    logp_w, logp_l, beta, loss, slope_w, slope_l
):
    inputs = [0.0 if logp_w is None else logp_w, -math.inf if logp_l is None else logp_l]
    inputs = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in inputs]
    value, metrics = asft.asft_loss(*inputs, beta=beta)
    slopes = [x.item() for x in torch.autograd.grad(value.sum(), inputs)]
    here = [value.item(), metrics["rejected_weight"].item()]
    assert here == pytest.approx([loss, slope_l], rel=1e-10, abs=0)
    if logp_w is None:
        assert metrics["sft"].item() == metrics["align_w"].item() == 0
        assert slopes[1] == pytest.approx(slope_l)
    else:
        assert metrics["align_l"].item() == metrics["clamped"].item() == 0 == slopes[1]
        assert slopes[0] == pytest.approx(slope_w)


OPTIONS = [{}, dict(temperature=0.1), dict(temperature=0.5, eps=1e-3), dict(temperature=3.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_of_a_pair_is_that_of_its_good_answer_plus_that_of_its_bad_one(options):
    w = torch.tensor([-3.0, -0.5, -1e-4, -1e-7], dtype=torch.float64)
    l = torch.tensor([-1e-7, -0.2, -2.0, -60.0], dtype=torch.float64)
    pair, _ = asft.asft_loss(w, l, **options)
    good, of_good = asft.asft_loss(w, torch.full_like(l, -math.inf), **options)
    bad, of_bad = asft.asft_loss(torch.zeros_like(w), l, **options)
    torch.testing.assert_close(good + bad, pair, rtol=1e-12, atol=1e-15)
    assert not of_good["align_l"].any() and not of_bad["align_w"].any()
    assert of_bad["clamped"].tolist() == [1, 0, 0, 0]
    for metrics in (of_good, of_bad):
        kept = [v for name, v in metrics.items() if name not in ("margin", "accuracy")]
        assert all(torch.isfinite(v).all() for v in kept)


# ----------------------------------------------------------------------------------------- steps


def step(pairs, *options, model=None):
    """step_loss of one micro-batch of these pairs; its model in float64."""
    config = parsed("--model x --data x --max-tokens 256", *options)
    model = model or tiny_model(dtype=torch.float64)
    found = train.step_loss(model, train.Dataset(pairs, config, "cpu"), list(range(len(pairs))))
    return model, *found


def slopes(pairs, *options) -> torch.Tensor:
    """The gradient of the summed losses."""
    model, loss_B, _ = step(pairs, *options)
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss_B.sum(), model.parameters())])


@pytest.mark.parametrize(
    "options",
    ["", "--beta 1 --sft-weight 0", "--temperature 0.5", "--no-share-prompt", "--loss sft"],
)
def test_pairs_split_into_good_and_bad_rows_have_the_gradient_of_the_pairs(options):
    # Of the mean over rows it is half, since there are twice as many.
    of_pairs = slopes(PAIRS, options)
    torch.testing.assert_close(slopes([*GOOD, *BAD], options), of_pairs, rtol=1e-9, atol=1e-12)
    assert of_pairs.abs().max() > 1 and torch.isfinite(of_pairs).all()


def test_the_gradient_of_mixed_rows_is_the_slope_of_their_loss():
    model, loss_B, _ = step(MIXED, "--temperature 0.7")
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss_B.sum(), parameters.values())
    for (name, weight), slope in zip(parameters.items(), found, strict=True):
        torch.manual_seed(1)
        way, size = torch.randn_like(weight), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * size * way
                values.append(step(MIXED, "--temperature 0.7", model=model)[1].sum().item())
                weight -= sign * size * way
        expected = (values[0] - values[1]) / (2 * size)
        assert (slope * way).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def oracle(model, pairs) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, 2) means and sums by plain sequences, NaN for an absent answer."""
    means, sums = [], []
    for p in pairs:
        (w, l), (sum_w, sum_l) = oracle_logps(model, p)
        means.append([float(w), float(l)])
        sums.append([float(sum_w) if len(p.chosen) else math.nan])
        sums[-1].append(float(sum_l) if len(p.rejected) else math.nan)
    return np.array(means), np.array(sums)


@pytest.mark.parametrize(
    "loss, more",
    [("asft", ""), ("asft", "--max-tokens-per-gpu 30"), ("asft", "--eps 5")]
    + [("sft", ""), ("sft", "--no-share-prompt")],
)
def test_each_metric_is_a_mean_over_the_rows_that_have_what_it_measures(
    start, tmp_path, loss, more
):
    data = write(tmp_path / "mixed.jsonl", id_rows(MIXED))
    common = ["--data", data, "--eval-data", data, "--pairs-per-step 9 --max-steps 1 --no-shuffle"]
    (row,) = trained(start, tmp_path / "out", *common, "--loss", loss, more)
    with torch.no_grad():
        means, sums = oracle(load_model(start / "model"), MIXED)
    (w, l), (sum_w, sum_l) = means.T, sums.T
    good, bad = ~np.isnan(w), ~np.isnan(l)
    bounded = np.minimum(l, -5 if "eps" in more else 0)
    assert 0 < (l[bad] > -5).mean() < 1
    terms_w, terms_l = np.where(good, -w, 0), np.where(bad, -np.log(1 - np.exp(bounded)), 0)
    align = (terms_w + terms_l) * (loss == "asft")
    expected = {"loss": np.mean(terms_w + 0.1 * align), "align": align.mean()}
    expected |= {"sft": -np.nanmean(w), "logp_w": np.nanmean(w), "sum_logp_w": np.nanmean(sum_w)}
    expected |= {"logp_l": np.nanmean(l), "sum_logp_l": np.nanmean(sum_l)}
    expected |= {"margin": np.nanmean(w - l), "accuracy": (w > l)[good & bad].mean()}
    expected |= {"rows_chosen": 4, "rows_rejected": 5, "rows_both": 2, "pairs": 7}
    if loss == "asft":
        odds = np.exp(bounded) / (1 - np.exp(bounded))
        expected |= {"align_w": -np.nanmean(w), "align_l": terms_l[bad].mean()}
        expected |= {"rejected_weight": 0.1 * np.nanmean(odds)}
        expected |= {"clamped": (l > -5).mean() if "eps" in more else 0}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    before = rows(tmp_path / "out", "eval.jsonl")[0]
    for name in expected.keys() - {"pairs"}:
        assert before[f"eval_{name}"] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("some, side, other", [(GOOD, "w", "l"), (BAD, "l", "w")])
def test_a_mean_over_no_row_is_left_out_of_the_log(start, tmp_path, capsys, some, side, other):
    data = write(tmp_path / "some.jsonl", id_rows(some))
    found = trained(start, tmp_path / "out", "--data", data, "--eval-data", data, "--max-steps 2")
    for row in [*found, *rows(tmp_path / "out", "eval.jsonl")]:
        names = {name.removeprefix("eval_") for name in row}
        assert {"loss", "align", f"logp_{side}", f"align_{side}"} <= names
        assert not {"margin", "accuracy", f"logp_{other}", f"align_{other}"} & names
        assert all(math.isfinite(value) for value in row.values())
    kept = "10 kept (0 pairs, 10 good and 0 bad answers)"
    kept = kept if side == "w" else "10 kept (0 pairs, 0 good and 10 bad answers)"
    printed = capsys.readouterr().out
    assert printed.count(kept.split(" (")[0]) == 2 and f"logp_{side} " in printed
    assert f"logp_{other} " not in printed and "margin" not in printed
    assert " ".join(printed.split()).count(kept) == 2


def test_each_row_weighs_the_same_and_fills_a_place_of_pairs_per_step(start, tmp_path):
    """7 rows in steps of 4: the second has 3, each still weighing a quarter."""
    data = write(tmp_path / "mixed.jsonl", id_rows(MIXED))
    run = ["--data", data, "--epochs 1 --no-shuffle --max-grad-norm inf --lr 1e-20"]
    found = trained(start, tmp_path / "out", *run)
    model = load_model(start / "model")
    for row, some in zip(found, (MIXED[:4], MIXED[4:]), strict=True):
        _, loss_B, _ = step(some, model=model)
        slopes = torch.autograd.grad(loss_B.sum() / 4, model.parameters())
        norm = math.sqrt(sum(float(x.square().sum()) for x in slopes))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and row["pairs"] == len(some)


def test_one_process_equals_two_and_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    start, tmp_path
):
    data = write(tmp_path / "mixed.jsonl", id_rows([*MIXED, GOOD[7]]))
    run = ["--data", data, "--eval-data", data, "--lr 1e-3 --pairs-per-step 3 --eval-every 2"]
    run = [*run, "--epochs 2 --save-every 2"]
    here = trained(start, tmp_path / "one", *run)
    run_joined(flags(start, tmp_path / "two", *run))
    for name in ("metrics.jsonl", "eval.jsonl"):
        for a, b in zip(rows(tmp_path / "one", name), rows(tmp_path / "two", name), strict=True):
            same = a.keys() - {"seconds", "tokens_per_s", "pairs_per_s", "peak_memory_gib"}
            assert same <= b.keys() and len(a) == len(b)
            assert {k: b[k] for k in same} == pytest.approx({k: a[k] for k in same}, rel=1e-4)
    assert len(here) == 6
    assert trained(start, tmp_path / "stopped", *run)[-1]["loss"] == here[-1]["loss"]
    for path in (tmp_path / "stopped/model").iterdir():  # as if killed after its last checkpoint
        path.unlink()
    (tmp_path / "stopped/model").rmdir()
    whole = (tmp_path / "one/model/model.safetensors").read_bytes()
    assert main("--resume", tmp_path / "stopped") == 0
    assert (tmp_path / "stopped/model/model.safetensors").read_bytes() == whole


def test_the_same_answers_with_other_labels_are_other_data(start, tmp_path, complaint):
    data = write(tmp_path / "some.jsonl", id_rows(GOOD))
    trained(start, tmp_path / "out", "--data", data, "--max-steps 2 --save-every 1")
    write(data, [row | {"label": False} for row in id_rows(GOOD)])
    assert "the pairs differ" in complaint("--resume", tmp_path / "out")


# ------------------------------------------------------------------------------ refused, reported


@pytest.mark.parametrize("loss", [name for name in asft.LOSSES if name not in ("asft", "sft")])
def test_a_loss_that_compares_answers_refuses_rows_with_one_and_counts_them(
    start, tmp_path, complaint, loss
):
    data, out = write(tmp_path / "mixed.jsonl", id_rows(MIXED)), tmp_path / "out"
    for more in (["--data", data], ["--eval-data", data], ["--data", data, "--plan 2"]):
        assert complaint(*flags(start, out, "--loss", loss, *more)).strip() == (
            f"train.py: --loss {loss} compares two answers, but 5 of 7 rows of {data} have one; "
            "--loss sft or asft takes them"
        )
    assert not out.exists()


@pytest.mark.parametrize("blamed", ["--loss sft", "--beta 0"])
def test_a_loss_of_good_answers_refuses_a_file_without_one(start, tmp_path, complaint, blamed):
    data, out = write(tmp_path / "bad.jsonl", id_rows(BAD)), tmp_path / "out"
    said = complaint(*flags(start, out, blamed, "--data", data)).strip()
    assert said == f"train.py: {data}: no good answer, and {blamed} has no term for bad ones"
    assert not out.exists()


def test_the_plan_counts_rows_and_their_tokens(tmp_path, capsys):
    good = {"label": True, "messages": messages(*WHOLE)}
    data = write(tmp_path / "some.jsonl", [good, good | {"label": False}, PAIR])
    assert main("--plan 2 --model", EXAMPLE, "--data", data, "--pairs-per-step 3") == 0
    pairs = encode_preferences(read_preferences(data), ChatFormat(EXAMPLE), 512)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert f"2 of 3 pairs, {tokens} tokens a step" in capsys.readouterr().out


def test_likelihood_measures_each_answer_over_the_rows_that_have_it(tmp_path, capsys):
    lines = (ROOT / "examples/heldout.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith('{"prompt": "')][:6]
    halves = []
    for i, record in enumerate(records):
        side = ("chosen", "rejected")[i % 2]
        one = {"prompt": record["prompt"], "completion": record[side], "label": i % 2 == 0}
        halves.append(record if i < 2 else one)

    def likelihood(name, of):
        data = write(tmp_path / f"{name}.jsonl", of)
        words = ["likelihood", "--model", EXAMPLE, "--data", data, "--out", tmp_path / name]
        assert program.main([str(word) for word in words]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())["measures"]
        return rows(tmp_path / name, "pairs.jsonl"), summary

    (pairs, _), (found, summary) = likelihood("pairs", records), likelihood("halves", halves)
    compared = ("margin", "accuracy")
    for i, (pair, row) in enumerate(zip(pairs, found, strict=True)):
        gone = () if i < 2 else ("_l", "_w")[i % 2]
        kept = {k: v for k, v in pair.items() if i < 2 or not (k.endswith(gone) or k in compared)}
        assert row.pop("place").endswith(f":{i + 1}") and kept.pop("place")
        assert row == pytest.approx(kept, rel=1e-5)
    of = {"w": [0, 1, 2, 4], "l": [0, 1, 3, 5]}
    for name in ("logp_w", "logp_l", "sum_logp_w", "sum_logp_l", *compared):
        mean = np.mean([pairs[i][name] for i in of.get(name[-1], [0, 1])])
        assert summary[name]["value"] == pytest.approx(mean, rel=1e-5), name
        assert summary[name]["low"] <= summary[name]["value"] <= summary[name]["high"]
    nats, tokens = (sum(pairs[i][k] for i in of["w"]) for k in ("sum_logp_w", "tokens_w"))
    assert summary["perplexity_w"]["value"] == pytest.approx(math.exp(-nats / tokens), rel=1e-5)
    assert "2 pairs, 2 good and 2 bad answers of 6 read" in capsys.readouterr().out
    _, summary = likelihood("bad", [halves[3], halves[5]])
    assert list(summary) == ["logp_l", "sum_logp_l"]
    assert "margin" not in capsys.readouterr().out


def test_every_form_that_the_docs_show_is_read_as_the_same_question_and_one_answer(tmp_path):
    *texts, ids = read_preferences(shown_in_docs("single answers", tmp_path))
    assert len(texts) == 5
    for p in texts:
        assert p.prompt[-1][1].startswith("Name a fruit.")
        assert (p.chosen, p.rejected) in [("An apple.", None), (None, "No.")]
    assert [x.tolist() for x in (ids.prompt, ids.rejected)] == [[506, 65, 66], [68, 510]]
    assert ids.chosen is None
