"""train.py: configuration, schedule, the update against an oracle, processes, metrics, faults; all on the CPU."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, random_pairs, run_train, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import asft
import train
from data import ChatFormat, plan_step
from model import Llama, LlamaConfig, load_model, load_weights, save_model
from support.tensors import local_rows

LENGTHS = [
    (5, 7, 4),
    (9, 3, 8),
    (2, 12, 6),
    (7, 5, 5),
    (14, 2, 3),
    (3, 9, 1),
    (6, 6, 10),
    (4, 1, 2),
    (8, 11, 7),
    (1, 4, 9),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A directory with a tiny model and the files of ten training and seven held-out pairs, all as token ids."""
    where = tmp_path_factory.mktemp("start")
    save_model(tiny_model(std=0.3), where / "model", dtype=torch.float32)
    write_pairs(where / "pairs.jsonl", random_pairs(LENGTHS))
    write_pairs(where / "heldout.jsonl", random_pairs(LENGTHS[3:], seed=2))
    return where


def write_pairs(path, pairs):
    rows = [
        {f"{name}_ids": getattr(p, name).tolist() for name in ("prompt", "chosen", "rejected")}
        for p in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(start, out, *more):
    return [
        "--model",
        start / "model",
        "--data",
        start / "pairs.jsonl",
        "--out",
        out,
        "--device",
        "cpu",
        "--lr",
        "1e-2",
        "--pairs-per-step",
        4,
        "--save-dtype",
        "fp32",
        *more,
    ]


def trained(start, out, *more):
    """Runs train.py in this process and returns the rows of metrics.jsonl."""
    assert train.main([str(flag) for flag in flags(start, out, *more)]) == 0
    return rows(out)


def rows(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def oracle_logps(model: Llama, pair):
    """Mean and sum of chosen and rejected by two plain sequences, without packing."""
    result = []
    for response in (pair.chosen, pair.rejected):
        tokens_T = torch.tensor(np.concatenate([pair.prompt, response]))
        logp_TV = torch.log_softmax(model.logits(tokens_T)[:-1], -1)
        result.append(logp_TV.gather(1, tokens_T[1:, None])[len(pair.prompt) - 1 :, 0])
    return [x.mean() for x in result], [x.sum() for x in result]


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_defaults_are_the_papers_settings():
    config = train.parse(["--model", "m", "--data", "d"])
    assert (config.loss, config.beta, config.sft_weight, config.temperature) == (
        "asft",
        0.1,
        1.0,
        1.0,
    )
    assert (config.lr, config.epochs, config.warmup_ratio, config.pairs_per_step) == (
        1e-5,
        2,
        0.1,
        32,
    )
    assert (config.weight_decay, config.adam_beta1, config.adam_beta2, config.max_grad_norm) == (
        0,
        0.9,
        0.999,
        1,
    )


def test_flags_help_header_and_config_json_show_every_field(start, tmp_path, capsys):
    trained(start, tmp_path / "out", "--max-steps", 1)
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    helped = capsys.readouterr().out
    saved = json.loads((tmp_path / "out/config.json").read_text())
    for field in dataclasses.fields(train.Config):
        assert train.spell(field.name) in helped and field.metadata["help"]
        assert field.name in saved["flags"]
    assert f"lr {saved['flags']['lr']}" in printed and str(tmp_path / "out") in printed
    assert saved["versions"]["torch"] == torch.__version__ and saved["data"]["kept"] == 10
    # The printed flags are a command line that gives the same run.
    text = re.sub(r"\n +", " ", printed.split("flags ")[1].split("step 1/")[0])
    again = dataclasses.asdict(train.parse(text.split()))
    assert again == saved["flags"]


def test_settings_that_the_paper_leaves_open_are_marked_so():
    marked = {f.name for f in dataclasses.fields(train.Config) if "OPEN:" in f.metadata["help"]}
    assert {
        "warmup_ratio",
        "pairs_per_step",
        "weight_decay",
        "max_grad_norm",
        "precision",
        "eps",
    } <= marked


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--modle", "x"], "--modle"),
        (["--lr", "fast"], "fast"),
        (["--lr", "0"], "--lr is 0.0"),
        (["--lr", "inf"], "--lr is inf"),
        (["--lr", "nan"], "--lr is nan"),
        (["--beta", "-1"], "--beta is -1.0"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio is 1.5"),
        (["--loss", "kto"], "kto"),
        (
            ["--loss", "dpo", "--temperature", "2"],
            "--temperature is not an option of --loss dpo, which takes --beta",
        ),
        (
            ["--loss", "sft", "--beta", "2"],
            "--beta is not an option of --loss sft, which takes none",
        ),
        (["--reference", "live"], "--reference is not an option of --loss asft"),
        (
            ["--loss", "dpo", "--reference", "live", "--reference-cache", "f"],
            "--reference-cache goes with",
        ),
        (["--ipo-sum"], "--ipo-sum goes with --loss ipo"),
        (["--loss", "ipo", "--beta", "0"], "--beta is 0.0"),
        (["--adam-beta2", "1"], "--adam-beta2 is 1.0"),
        (["--plan", "2", "--precision", "fp32"], "--plan simulates neither"),
        (
            ["--loss", "dpo", "--reference-cache", "/absent/cache"],
            "/absent is not a directory that can be written",
        ),
        (["--eval-data", "DATA", "--samples", "2"], "--samples wants text"),
        (["--eval-every", "5"], "--eval-every and --samples want --eval-data"),
        (
            ["--max-tokens", "300"],
            "--max-tokens 300 is above the model's max_position_embeddings 256",
        ),
        (
            ["--max-tokens-per-gpu", "20"],
            "a pair of 26 packed tokens exceeds --max-tokens-per-gpu 20",
        ),
        (["--replicas", "2"], "--replicas 2 does not divide 1 processes"),
        (["--data", "absent.jsonl"], "absent.jsonl: No such file"),
        (["--model", "absent"], "absent/config.json: No such file"),
        (["--max-tokens", "1"], "no pair left to use"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(start, tmp_path, capsys, arguments, said):
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    arguments = [
        start / "pairs.jsonl" if argument == "DATA" else argument for argument in arguments
    ]
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out", *arguments)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1 and "Traceback" not in complaint
    assert not (tmp_path / "out").exists()


def test_model_and_data_go_together(capsys):
    assert train.main(["--model", "m"]) == 2
    assert "--model and --data go together" in capsys.readouterr().err


def test_bad_lines_stop_the_run_before_training_and_name_file_and_line(start, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        (start / "pairs.jsonl").read_text() + "{oops\n" + '{"prompt_ids": [1], "chosen_ids": [2]}\n'
    )
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out", "--data", bad)]) == 2
    complaint = capsys.readouterr().err
    assert f"{bad}:11: not JSON" in complaint and f"{bad}:12: rejected_ids is missing" in complaint
    trained(start, tmp_path / "out", "--data", bad, "--skip-bad-lines", "--max-steps", 1)
    assert json.loads((tmp_path / "out/config.json").read_text())["data"]["bad lines"] == 2


def test_an_out_that_holds_anything_or_cannot_be_made_is_refused(start, tmp_path, capsys):
    trained(start, tmp_path / "out", "--max-steps", 1)
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert train.main([str(flag) for flag in flags(start, tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
    assert train.main([str(flag) for flag in flags(start, start / "pairs.jsonl" / "out")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_without_out_each_run_gets_a_fresh_directory_under_runs(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model",
        str(start / "model"),
        "--data",
        str(start / "pairs.jsonl"),
        "--max-steps",
        "1",
    ]
    assert train.main(arguments) == train.main(arguments) == 0
    assert (
        len(
            [
                path
                for path in (tmp_path / "runs").iterdir()
                if (path / "model/config.json").exists()
            ]
        )
        == 2
    )


# ----------------------------------------------------------------------------------------------------------- schedule


def test_warm_up_starts_above_zero_reaches_the_peak_and_the_last_rate_is_the_minimum():
    rates = [train.learning_rate(step, 20, 1.0, 0.1, 0.0) for step in range(20)]
    assert rates[0] == 0.5 and rates[1] == 1.0 and max(rates) == 1.0
    assert rates[-1] == pytest.approx(0, abs=1e-15) and rates[1:] == sorted(rates[1:], reverse=True)
    # Half-way between the peak (update 2) and the end (update 20): update 11, by hand cos(pi/2) = 0.
    assert rates[10] == pytest.approx(0.5)


@pytest.mark.parametrize("steps, expected", [(1, [1.0]), (2, [1.0, 0.1]), (3, [1.0, 0.55, 0.1])])
def test_short_schedules_still_start_at_the_peak_and_end_at_the_minimum(steps, expected):
    assert [train.learning_rate(s, steps, 1.0, 0.1, 0.1) for s in range(steps)] == pytest.approx(
        expected
    )


# --------------------------------------------------------------------------------------------------------- the update


def oracle_run(start, steps, pairs_per_step=4, lr=1e-2):
    """The same training in thirty lines: plain sequences, one pair at a time, torch's AdamW on an unsharded model."""
    model = load_model(start / "model")
    pairs = random_pairs(LENGTHS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    sizes = np.array([len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs])
    history = []
    for step in range(steps):
        drawn = sum(plan_step(sizes, pairs_per_step, 0, step, 1, 10**6)[0], [])
        total, margins = 0.0, []
        for i in drawn:
            (logp_w, logp_l), _ = oracle_logps(model, pairs[i])
            odds_w, odds_l = (x - torch.log(1 - torch.exp(x)) for x in (logp_w, logp_l))
            align = -torch.nn.functional.logsigmoid(odds_w) - torch.nn.functional.logsigmoid(
                -odds_l
            )
            total = total + (-logp_w + 0.1 * align)
            margins.append((logp_w - logp_l).item())
        (total / pairs_per_step).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        warmup = max(1, math.ceil(steps * 0.1))
        angle = math.pi * (step + 1 - warmup) / max(1, steps - warmup)
        optimizer.param_groups[0]["lr"] = (
            lr * (step + 1) / warmup if step < warmup else lr * (1 + math.cos(angle)) / 2
        )
        optimizer.step()
        optimizer.zero_grad()
        history.append(
            {
                "loss": total.item() / len(drawn),
                "grad_norm": norm,
                "margin": float(np.mean(margins)),
                "accuracy": float(np.mean([m > 0 for m in margins])),
                "pairs": len(drawn),
            }
        )
    return model, history


def test_the_updates_are_those_of_a_plain_unsharded_loop(start, tmp_path):
    found = trained(start, tmp_path / "out", "--epochs", 2)
    model, expected = oracle_run(start, steps=6)
    assert [row["pairs"] for row in found] == [
        4,
        4,
        2,
        4,
        4,
        2,
    ]  # ten pairs an epoch: the last step is short
    for row, oracle in zip(found, expected, strict=True):
        for name, value in oracle.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for (key, a), b in zip(
        load_model(tmp_path / "out/model").named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize(
    "more", [["--max-tokens-per-gpu", "30"], ["--no-share-prompt"], ["--checkpoint-blocks", "on"]]
)
def test_micro_batches_prompt_sharing_and_recomputation_do_not_change_the_update(
    start, tmp_path, more
):
    plain = trained(start, tmp_path / "plain", "--epochs", 1)
    other = trained(start, tmp_path / "other", "--epochs", 1, *more)
    for a, b in zip(plain, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["accuracy"] == b["accuracy"]


@pytest.mark.parametrize(
    "more", [[], ["--replicas", "2"], ["--loss", "dpo"]], ids=["asft", "hybrid", "dpo"]
)
def test_one_process_equals_two(start, tmp_path, more):
    more = [
        "--lr",
        "1e-3",
        "--epochs",
        4,
        "--max-steps",
        10,
        "--pairs-per-step",
        3,
        "--eval-every",
        4,
        "--eval-data",
        start / "heldout.jsonl",
        *more,
    ]
    one = trained(start, tmp_path / "one", *(more if "--replicas" not in more else more[:-2]))
    done = run_train(*flags(start, tmp_path / "two", *more), processes=2)
    assert done.returncode == 0, done.stderr
    two = rows(tmp_path / "two")
    assert len(one) == len(two) == 10
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "margin", "accuracy", "logp_w", "logp_l"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"] and a["pairs"] == b["pairs"]
    # Seven held-out pairs on two processes: each counts once.
    for a, b in zip(
        rows(tmp_path / "one", "eval.jsonl"), rows(tmp_path / "two", "eval.jsonl"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    a, b = load_model(tmp_path / "one/model"), load_model(tmp_path / "two/model")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_one_pair_on_two_processes_finishes_and_counts_once(start, tmp_path):
    write_pairs(tmp_path / "one.jsonl", random_pairs(LENGTHS[:1]))
    arguments = [
        "--data",
        tmp_path / "one.jsonl",
        "--eval-data",
        tmp_path / "one.jsonl",
        "--epochs",
        1,
    ]
    done = run_train(*flags(start, tmp_path / "two", *arguments), processes=2)
    assert done.returncode == 0, done.stderr
    one = trained(start, tmp_path / "one", *arguments)
    assert rows(tmp_path / "two")[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert rows(tmp_path / "two")[0]["pairs"] == 1


def test_a_rate_of_1e_6_moves_the_fp32_weights(start, tmp_path):
    trained(start, tmp_path / "out", "--lr", "1e-6", "--max-steps", 1)
    before, after = load_model(start / "model"), load_model(tmp_path / "out/model")
    moved = [(p - q).abs() for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    share = sum(int((x > 0).sum()) for x in moved) / sum(x.numel() for x in moved)
    # AdamW's first step is the rate itself wherever the gradient is not 0: half the embedding's rows get none here.
    assert share > 0.5 and max(float(x.max()) for x in moved) == pytest.approx(1e-6, rel=0.1)


def test_bf16_products_stay_close_to_fp32_and_weights_stay_fp32(start, tmp_path):
    exact = trained(start, tmp_path / "fp32", "--lr", "1e-4", "--max-steps", 3)
    half = trained(
        start, tmp_path / "bf16", "--lr", "1e-4", "--max-steps", 3, "--precision", "bf16"
    )
    for a, b in zip(exact, half, strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    weights = load_model(tmp_path / "bf16/model").state_dict()
    assert any((value != value.bfloat16().float()).any() for value in weights.values())


# ---------------------------------------------------------------------------------------------- losses and references


@pytest.mark.parametrize("loss", list(asft.LOSSES))
def test_every_loss_gives_its_definition_on_the_first_step_and_the_same_metrics(
    start, tmp_path, loss
):
    row = trained(start, tmp_path / "out", "--loss", loss, "--max-steps", 1)[0]
    model = load_model(start / "model")
    pairs = random_pairs(LENGTHS)
    sizes = np.array([len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs])
    drawn = sum(plan_step(sizes, 4, 0, 0, 1, 10**6)[0], [])
    with torch.no_grad():
        logps = [oracle_logps(model, pairs[i]) for i in drawn]
    w, l, sum_w, sum_l = (
        np.array([float(of_pair[kind][side]) for of_pair in logps])
        for kind in (0, 1)
        for side in (0, 1)
    )
    p_w, p_l = np.exp(w), np.exp(l)
    odds = np.log(p_w / (1 - p_w)) - np.log(p_l / (1 - p_l))
    expected = {
        "sft": -w,
        "asft": -1.1 * w - 0.1 * np.log(1 - p_l),
        "orpo": -w + 0.1 * np.log1p(np.exp(-odds)),
        "simpo": np.log1p(np.exp(-(2 * (w - l) - 1))),
        "dpo": np.full(4, math.log(2)),
        "ipo": np.full(4, 25.0),
    }
    assert row["loss"] == pytest.approx(expected[loss].mean(), rel=1e-5)
    found = {
        "logp_w": w,
        "logp_l": l,
        "sum_logp_w": sum_w,
        "sum_logp_l": sum_l,
        "margin": w - l,
        "accuracy": w > l,
        "sft": -w,
    }
    for name, values in found.items():
        assert row[name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), name
    assert {
        "step",
        "epoch",
        "align",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "pairs_per_s",
        "peak_memory_gib",
    } <= row.keys()
    assert {"reward_w", "reward_l"} <= row.keys() or loss in ("sft", "asft", "orpo")


@pytest.mark.parametrize("loss", [["dpo"], ["ipo"], ["ipo", "--ipo-sum"]], ids=" ".join)
def test_a_live_reference_and_a_precomputed_one_give_the_same_losses(start, tmp_path, loss):
    more = ["--loss", *loss, "--eval-data", start / "heldout.jsonl"]
    live = trained(start, tmp_path / "live", *more, "--reference", "live")
    kept = trained(start, tmp_path / "kept", *more)
    assert live[0]["loss"] == pytest.approx(math.log(2) if loss[0] == "dpo" else 25.0, rel=1e-5)
    assert live[-1]["loss"] != pytest.approx(live[0]["loss"], rel=1e-3)
    for a, b in zip(live, kept, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
    assert live[-1]["eval_loss"] == pytest.approx(kept[-1]["eval_loss"], rel=1e-4)


def test_sums_and_means_are_different_ipo_losses(start, tmp_path):
    mean = trained(start, tmp_path / "mean", "--loss", "ipo", "--max-steps", 2)
    total = trained(start, tmp_path / "sum", "--loss", "ipo", "--ipo-sum", "--max-steps", 2)
    assert total[0]["grad_norm"] > 3 * mean[0]["grad_norm"]


def test_a_reference_cache_is_used_again_and_refused_for_other_weights_or_pairs(
    start, tmp_path, capsys
):
    cache = ["--loss", "dpo", "--max-steps", 2, "--reference-cache", tmp_path / "cache.safetensors"]
    first = trained(start, tmp_path / "first", *cache)
    written = (tmp_path / "cache.safetensors").stat().st_mtime_ns
    again = trained(start, tmp_path / "again", *cache)
    assert (tmp_path / "cache.safetensors").stat().st_mtime_ns == written
    assert [row["loss"] for row in first] == [row["loss"] for row in again]
    save_model(tiny_model(seed=5), tmp_path / "other", dtype=torch.float32)
    for other in (
        ["--model", tmp_path / "other"],
        ["--data", start / "heldout.jsonl"],
        ["--precision", "bf16"],
    ):
        assert (
            train.main([str(flag) for flag in flags(start, tmp_path / "refused", *cache, *other)])
            == 2
        )
        assert "other weights, pairs or precision" in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({"logps": torch.zeros(3, 2, 2)}, tmp_path / "cache.safetensors", metadata=metadata)
    assert train.main([str(flag) for flag in flags(start, tmp_path / "refused", *cache)]) == 2
    assert "wanted logps of shape 10, 2, 2" in capsys.readouterr().err
    (tmp_path / "cache.safetensors").write_bytes(b"garbage")
    assert train.main([str(flag) for flag in flags(start, tmp_path / "refused", *cache)]) == 2
    assert "not a safetensors file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what comes out


def test_evaluation_runs_before_the_first_step_every_so_often_and_at_the_end(start, tmp_path):
    found = trained(
        start,
        tmp_path / "out",
        "--epochs",
        2,
        "--eval-data",
        start / "heldout.jsonl",
        "--eval-every",
        4,
    )
    assert [row["step"] for row in rows(tmp_path / "out", "eval.jsonl")] == [0, 4, 6]
    assert [row["step"] for row in found if "eval_loss" in row] == [4, 6]
    model, pairs = load_model(start / "model"), random_pairs(LENGTHS[3:], seed=2)
    with torch.no_grad():
        margins = [float(w - l) for (w, l), _ in (oracle_logps(model, pair) for pair in pairs)]
    first = rows(tmp_path / "out", "eval.jsonl")[0]
    assert first["eval_margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    assert first["eval_accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]))


def test_the_saved_model_loads_in_transformers_with_equal_logits(start, tmp_path):
    trained(start, tmp_path / "out", "--max-steps", 2)
    tokens_T = torch.arange(20)
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype=torch.float32)
        theirs = other(tokens_T[None]).logits[0]
        ours = load_model(tmp_path / "out/model").logits(tokens_T)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_tied_model_trains_and_saves_its_embedding_once(tmp_path):
    save_model(
        tiny_model(std=0.3, tie_word_embeddings=True), tmp_path / "model", dtype=torch.float32
    )
    write_pairs(tmp_path / "pairs.jsonl", random_pairs(LENGTHS))
    found = trained(tmp_path, tmp_path / "out", "--epochs", 3)
    assert found[-1]["loss"] < found[0]["loss"]
    assert load_model(tmp_path / "out/model").lm_head is None


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_pairs(
    start, tmp_path, capsys, monkeypatch
):
    poisoned = int(random_pairs(LENGTHS)[6].prompt[0])

    def load_poisoned(model, directory):  # a file with a NaN would be refused
        load_weights(model, directory)
        with torch.no_grad():
            local_rows(model.model["embed_tokens"].weight)[0][poisoned] = math.nan

    monkeypatch.setattr(train, "load_weights", load_poisoned)
    named = [
        i
        for i, p in enumerate(random_pairs(LENGTHS), 1)
        if poisoned in np.concatenate([p.prompt, p.chosen[:-1], p.rejected[:-1]])
    ]
    assert 1 <= len(named) < 10
    assert (
        train.main([str(flag) for flag in flags(start, tmp_path / "out", "--pairs-per-step", 10)])
        == 1
    )
    complaint = capsys.readouterr().err
    assert "step 1: loss nan" in complaint and complaint.count("\n") == 1
    assert {int(line) for line in re.findall(r"pairs.jsonl:(\d+)", complaint)} == set(named)
    assert not (tmp_path / "out/model").exists()


def test_on_a_terminal_the_step_line_moves_in_place(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    trained(start, tmp_path / "out", "--max-steps", 3)
    printed = capsys.readouterr().out
    assert printed.count("\r\x1b[K") == 3 and "\n\r\x1b[Kstep 2/3" not in printed
    assert all(len(line) < 200 for line in printed.split("\r\x1b[K")[1:3])


def test_other_seeds_draw_other_pairs(start, tmp_path):
    assert (
        trained(start, tmp_path / "a", "--max-steps", 1)[0]["loss"]
        != trained(start, tmp_path / "b", "--max-steps", 1, "--seed", 1)[0]["loss"]
    )


def test_the_export_of_a_base_model_ends_its_answers(tmp_path):
    for path in (ROOT / "examples/model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json"):  # <|end_of_text|>, as Llama-3-8B's say
        (tmp_path / name).write_text(
            json.dumps(json.loads((tmp_path / name).read_text()) | {"eos_token_id": 507})
        )
    assert (
        train.main(
            [
                "--model",
                str(tmp_path),
                "--data",
                str(ROOT / "examples/heldout.jsonl"),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
                "--max-steps",
                "1",
                "--pairs-per-step",
                "2",
            ]
        )
        == 0
    )
    end_of_turn = ChatFormat(tmp_path / "out/model").end_of_turn
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out/model" / name).read_text())["eos_token_id"] == [
            507,
            end_of_turn,
        ]


def test_configurations_of_models_are_kept_in_the_export(start, tmp_path):
    trained(start, tmp_path / "out", "--max-steps", 1)
    assert load_model(tmp_path / "out/model").config == tiny_config()


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--preset", "paper"], ("asft", 1.0, 0.1, 1.0, 1e-5)),
        (["--preset", "align-only"], ("asft", 0.0, 1.0, 1.0, 1e-6)),
        (
            ["--preset", "tempered", "--temperature", "0.5", "--lr", "3e-7"],
            ("asft", 0.0, 1.0, 0.5, 3e-7),
        ),
    ],
)
def test_presets_are_the_three_recipes(arguments, expected):
    config = train.parse(["--model", "m", "--data", "d", *arguments])
    assert (config.loss, config.sft_weight, config.beta, config.temperature, config.lr) == expected


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--preset", "align-only", "--sft-weight", "1"],
            "--sft-weight 1.0 contradicts --preset align-only",
        ),
        (["--preset", "paper", "--loss", "dpo"], "--loss dpo contradicts --preset paper"),
        (["--preset", "tempered"], "--preset tempered wants --temperature"),
    ],
)
def test_a_preset_with_a_flag_that_contradicts_it_is_refused(capsys, arguments, said):
    assert train.main(["--model", "m", "--data", "d", *arguments]) == 2
    assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- simulation


def test_a_tied_model_of_which_a_step_has_several_micro_batches_is_simulated():
    assert LlamaConfig.load(ROOT / "examples/model").tie_word_embeddings
    done = run_train("--plan", 1, "--max-tokens-per-gpu", 500)
    assert done.returncode == 0 and "a micro-batch" in done.stdout, done.stderr


@pytest.mark.parametrize("gpus, pairs, least, goal", [(8, 160, 21.5, 24), (1, 80, 124, 130)])
def test_the_simulated_peak_of_llama_3_8b_is_below_the_goal(tmp_path, gpus, pairs, least, goal):
    """Llama-3-8B's shapes, up to 8,192 tokens a micro-batch, UltraFeedback's mean lengths, fp32 masters, several
    micro-batches a step: without the gradients of earlier ones the peaks would be 18.7 and 122.6 GiB, with a CPU's
    chunks of logits 20.9 on eight."""
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_pairs(tmp_path / "pairs.jsonl", random_pairs([(177, 330, 278)] * pairs))
    done = run_train(
        "--model",
        tmp_path,
        "--data",
        tmp_path / "pairs.jsonl",
        "--plan",
        gpus,
        "--pairs-per-step",
        pairs,
    )
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248" in done.stdout and re.search(r"at most 7,850 a micro-batch", done.stdout)
    peak = float(re.search(r"memory +([\d.]+) GiB", done.stdout)[1])
    assert least < peak < goal
    # 6 FLOPs a parameter and token of the blocks, 6 D a logit of the head, and little for attention, by hand.
    flops = float(re.search(r"FLOPs +([\d.e+]+)", done.stdout)[1])
    tokens, scored = pairs * 785, pairs * 608
    assert flops == pytest.approx(
        6 * (32 * 218_103_808 * tokens + 128256 * 4096 * scored), rel=0.03
    )
