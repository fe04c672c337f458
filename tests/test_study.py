"""bench/study.py: its parts, its choice of rates, its claims, and a study of one step.

Last, what it and other scripts say to flags and files that they cannot use.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT
from joined import run_all
from tokenizers import Tokenizer, models, pre_tokenizers

from bench import study

LM = "smollm-instructions"


def record(method, rate, accuracy, margin=0.0, part="validation", seed=0, name=LM, change=(0, 0)):
    """A training's row of results.jsonl. change: of the chosen and the rejected log-prob."""
    start = {"logp_w": -2.0, "logp_l": -3.0, "margin": 1.0, "accuracy": 0.5}
    after = {"logp_w": -2.0 + change[0], "logp_l": -3.0 + change[1]}
    after |= {"margin": margin, "accuracy": accuracy}
    row = dict(zip(study.KEY, (name, method, rate, seed, part), strict=True))
    return row | {"before": start, "after": after, "steps": 20, "pairs": 100, "seconds": 60.0}


def test_each_pair_is_in_one_part_and_each_training_pair_gives_one_unpaired_answer(tmp_path):
    pairs = [{"prompt_ids": [i], "chosen_ids": [1], "rejected_ids": [2]} for i in range(500)]
    (tmp_path / study.SHORT).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = study.parts(tmp_path, LM, tmp_path)
    rows = {part: study.read_rows(path) for part, path in files.items()}
    kept = [row["prompt_ids"][0] for part in list(rows)[:3] for row in rows[part]]
    assert sorted(kept) == list(range(500))
    sizes = {part: len(of_part) for part, of_part in rows.items()}
    assert 60 < sizes["validation"] < 140 and 60 < sizes["held-out"] < 140
    assert [row["prompt_ids"] for row in rows["unpaired"]] == [
        row["prompt_ids"] for row in rows["train"]
    ]
    assert all(row["response_ids"] == [1 if row["label"] else 2] for row in rows["unpaired"])
    assert 0.4 < sum(row["label"] for row in rows["unpaired"]) / sizes["train"] < 0.6


def test_texts_have_no_unpaired_part(tmp_path):
    files = study.parts(tmp_path, "example", tmp_path)
    assert set(files) == {"train", "validation", "held-out"}
    assert files["held-out"].read_bytes() == (ROOT / "examples/heldout.jsonl").read_bytes()


def test_an_untrained_start_is_random_and_is_its_seeds(tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        study.random_start(tmp_path / str(i), study.MODEL, seed)
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert study.start_of(tmp_path, "untrained", 1, tmp_path) == tmp_path / "starts/untrained/1"
    assert study.start_of(tmp_path, "example", 1, tmp_path) == study.MODEL


@pytest.mark.parametrize(
    "grid, chosen, edge, wider",  # rate -> (accuracy, margin)
    [
        ({1e-5: (0.6, 1), 3e-5: (0.7, 1), 1e-4: (0.6, 9)}, 3e-5, False, []),
        ({1e-5: (0.7, 1), 3e-5: (0.7, 2), 1e-4: (0.6, 9)}, 3e-5, False, []),
        ({1e-5: (0.6, 1), 3e-5: (0.7, 1)}, 3e-5, True, [1e-4]),
        ({1e-5: (0.8, 1), 3e-5: (0.7, 1)}, 1e-5, True, [3e-6]),
        ({1e-5: (0.8, 1)}, 1e-5, True, [3e-5, 3e-6]),
        ({3e-2: (0.8, 1), 1e-2: (0.7, 1)}, 3e-2, True, []),
        ({}, None, None, []),
    ],
)
def test_the_most_accurate_rate_is_chosen_and_one_at_an_edge_gets_a_neighbour(
    grid, chosen, edge, wider
):
    records = [record("dpo", rate, *figures) for rate, figures in grid.items()]
    others = [record("dpo", 7.0, 1.0, part="held-out"), record("ipo", 7.0, 1.0)]
    others.append({**record("dpo", 7.0, 1.0), "failed": "step 2"})
    del others[-1]["after"]
    records += others
    assert study.choose(records, LM, "dpo") == chosen
    assert study.wider(records, LM, "dpo") == wider
    if grid:
        assert study.at_edge(records, LM, "dpo") is edge


def test_each_claim_is_true_or_false_for_each_seed(tmp_path):
    both = {  # method -> for each of two seeds: accuracy, margin, changes
        "asft": [(0.60, 1.1, (1, -1)), (0.60, 1.1, (1, 1))],
        "orpo": [(0.60, 1.0, (1, -1)), (0.60, 1.2, (1, 1))],
        "dpo": [(0.70, 2.0, (-1, -2)), (0.70, 2.0, (1, -0.5))],
        "asft-beta-1": [(0.61, 1.1, (1, -1)), (0.60, 1.1, (1, -1))],
        "asft-unpaired": [(0.59, 1.1, (1, -1)), (0.57, 1.1, (1, -1))],
        "asft-unpaired-beta-1": [(0.60, 1.1, (1, -1)), (0.50, 1.1, (1, -1))],
    }
    records = []
    for method, seeds in both.items():
        records.append(record(method, 1e-4, 0.6))
        for seed, (accuracy, margin, change) in enumerate(seeds):
            at = {"part": "held-out", "seed": seed, "change": change}
            records.append(record(method, 1e-4, accuracy, margin, **at))
            key = (LM, method, 1e-4, seed, "held-out")
            write_right(tmp_path, study.label_after(key), round(100 * accuracy))
    write_right(tmp_path, study.label_before(LM, "held-out", 0), 50)
    found = {name: {} for name in study.DATASETS}
    found[LM] = {m: study.held_out(tmp_path, records, LM, m, 2) for m in both}
    claims = study.claims(found, records)
    assert [(claim[:3], true) for claim, _, true, _ in claims] == [
        (f"({letter})", [True, False]) for letter in "abceff"
    ]
    # In one of two seeds, one pair of 100 more is ordered rightly.
    assert "; difference +0.005 [0.000, 0.015]" in claims[3][-1]
    right, before = found[LM]["dpo"]["right"], found[LM]["dpo"]["right before"]
    value, low, high = map(float, re.findall(r"[+-]?[\d.]+", study.difference(right, before)))
    assert value == 0.2 and 0.1 < low < value < high < 0.3


def write_right(work, label: str, right: int) -> None:
    """The figures of 100 pairs, of which the first `right` ones are ordered rightly."""
    (work / "likelihood").mkdir(exist_ok=True)
    rows = [json.dumps({"accuracy": float(i < right)}) + "\n" for i in range(100)]
    (work / "likelihood" / f"{label}.jsonl").write_text("".join(rows))


@pytest.mark.parametrize(
    "texts, share",
    [(["a b a b"], 2 / 3), (["A b", "a B"], 1 / 2), (["a b", "b c"], 1.0), (["a", ""], 0.0)],
)
def test_distinct_bigrams_are_counted_over_all_answers(texts, share):
    assert study.distinct_bigrams(texts) == share


def test_answers_before_and_after_are_scored_and_shown_side_by_side(tmp_path, monkeypatch, capsys):
    words = "system user assistant \n Why ? Because so . No".split(" ")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "data" / LM).mkdir(parents=True)
    pair = {"prompt_ids": [4, 5], "chosen_ids": [6, 7], "rejected_ids": [9]}
    (tmp_path / "data" / LM / "held-out.jsonl").write_text(f"{json.dumps(pair)}\n" * 2)
    (tmp_path / "results.jsonl").write_text(json.dumps(record("sft", 3e-5, 0.6)) + "\n")
    asked = []

    def call(words, settings):
        command, flags = words[2], dict(zip(words[3::2], words[4::2], strict=True))
        if command == "generate":
            asked.append((flags["--model"], flags["--prompts"].read_text()))
            rows = [("so so so", 3, "length"), ("No", 1, "stop")]
            rows = [{"prediction": p, "tokens": t, "finish": f} for p, t, f in rows]
            flags["--out"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            scores = {"bleu4": 12.34, "rouge1": 5.0, "rougeL": 4.0}
            flags["--json"].write_text(json.dumps(scores))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(study, "call", call)
    before = {"measures": {"accuracy": {"value": 0.5}}}
    (tmp_path / "likelihood").mkdir()
    (tmp_path / f"likelihood/before-{LM}-validation.json").write_text(json.dumps(before))
    settings = {"work": tmp_path, "smollm": tmp_path, "prompts": 40, "answer_tokens": 9}
    study.answers(Namespace(**settings, datasets=[LM], show=1, jobs=1))
    after = tmp_path / f"runs/{LM}-sft-3e-05-0/model"
    assert [model for model, _ in asked] == [tmp_path / "model", after]
    assert asked[0][1] == '{"prompt_ids": [4, 5], "chosen_ids": [6, 7]}\n' * 2
    printed = capsys.readouterr().out
    for m in ("before", "sft 3e-05"):
        assert f"| {m} | 2.0 | 50% | 12.3 | 5.0 | 4.0 | 0.50 |" in printed
        assert f"- *{m}*: so so so\n" in printed
    assert (tmp_path / f"{LM}.png").read_bytes().startswith(b"\x89PNG")
    assert "**1. Why ?**" in printed and "- *chosen*: Because so" in printed


def test_a_command_gets_its_share_of_the_cores_and_what_it_prints_is_kept():
    print_threads = "import os; print(os.environ['OMP_NUM_THREADS'])"
    done = study.call([sys.executable, "-c", print_threads], Namespace(jobs=1))
    assert done.returncode == 0 and int(done.stdout) == os.cpu_count()


def test_a_study_goes_on_where_it_stopped_and_keeps_the_chosen_weights(
    tmp_path, monkeypatch, capsys
):
    def call(words, settings):
        """study.call, but its process is forked and need not import torch."""
        [code], [printed] = run_all([list(map(str, words[2:]))], 1, Path(words[1]).stem)
        return subprocess.CompletedProcess(words, code, *printed)

    monkeypatch.setattr(study, "call", call)
    flags = ["--work", str(tmp_path), "--datasets", "example", "--methods", "sft"]
    flags += ["--max-steps", "1", "--seeds", "2", "--rates", "1e-3", "1e-5"]
    flags += ["--jobs", "1"]
    again = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["study.py", "run", *flags])
        study.main()
        again.append((tmp_path / "results.jsonl").read_text())
    assert again[0] == again[1]
    rows = [json.loads(line) for line in again[0].splitlines()]
    assert [row["part"] for row in rows] == ["validation"] * 2 + ["held-out"] * 2
    before, after = rows[-1]["before"], rows[-1]["after"]
    assert before["accuracy"] == 0.475 and before != after  # as docs/study.md says
    best = max(rows[:2], key=lambda row: (row["after"]["accuracy"], row["after"]["margin"]))
    weights = [path.parts[-3] for path in (tmp_path / "runs").rglob("*.safetensors")]
    assert weights == [f"example-sft-{best['rate']:g}-0"]
    monkeypatch.setattr(sys, "argv", ["study.py", "table", *flags])
    study.main()
    assert f"| sft | {best['rate']:g} | " in capsys.readouterr().out


# --------------------------------------------------------------------- flags of it and of others


@pytest.mark.parametrize(
    "module, flags, said",
    [
        ("reliability", "soak --steps 0", "argument --steps: found 0, wanted 4 or more"),
        ("reliability", "kill --kills 0", "argument --kills: found 0, wanted 1 or more"),
        ("study", "run --work WORK --seeds 0", "argument --seeds: found 0, wanted 1 or more"),
        ("study", "run --work WORK --jobs 0", "argument --jobs: found 0, wanted 1 or more"),
        ("study", "table --work WORK", "results.jsonl: no training in it"),
        ("benchmark", "table WORK", "work: none of these runs in it"),
        ("benchmark", "table WRONG", "wrong.jsonl: KeyError('job'); wanted what run wrote"),
        ("smollm", "WORK", "gguf is missing: pip install gguf"),
        ("make", "--help", "heldout.jsonl beside this file"),
    ],
)
def test_flags_and_files_that_cannot_be_used_are_one_line_and_nothing_is_begun(
    tmp_path, monkeypatch, capsys, module, flags, said
):
    (tmp_path / "wrong.jsonl").write_text('{"a": 1}\n')
    flags = flags.replace("WORK", f"{tmp_path}/work").replace("WRONG", f"{tmp_path}/wrong.jsonl")
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *flags.split()])
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module(module)
    for place, name in ((subprocess, "run"), (subprocess, "Popen"), (script, "draw_all")):
        monkeypatch.setattr(place, name, None, raising=False)  # whatever begins fails
    with pytest.raises(SystemExit) as stopped:
        sys.exit(script.main())
    printed = capsys.readouterr()
    words = printed.out + printed.err + str(stopped.value.code)
    assert said in words and (stopped.value.code == 0) == (module == "make")
    assert not (tmp_path / "work").exists()
