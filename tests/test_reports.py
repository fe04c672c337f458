"""eval.py mt-bench report, arena-hard report and tables: scores of judgments that are at hand."""

import json
import re
from math import exp

import pytest
from conftest import REAL, needs_real, tiny_model
from judging import Files, complaint, run, write

from support.export import save_model


@pytest.fixture
def report(tmp_path, capsys):
    """report(bench, *rows): (what --json has, what is printed), of rows of judgments if any."""

    def make(bench, *rows, flag="--judgments", more=()):
        read = [flag, write(tmp_path / "j.jsonl", rows)] if rows else []
        assert run(bench, "report", *read, *more, "--json", tmp_path / "report.json") == 0
        return json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return make


def only(report):
    """The scores, without their intervals, and the counts of the one model of a report."""
    of_model = report[0]["models"]["m"]
    return {line: of and of["score"] for line, of in of_model["scores"].items()}, counts(of_model)


def rating(number, turn, score, model="m", judge="gpt-4"):
    row = {"question_id": number, "model": model, "judge": [judge, "single-v1"]}
    return row | {"user_prompt": "", "judgment": "", "score": score, "turn": turn, "tstamp": 0.0}


def games(number, *labels, model="m"):
    played = [{"score": label} for label in labels]
    return {"question_id": number, "model": model, "judge": "gpt-4", "games": played}


def counts(of_model, *more):
    return [of_model[kind] for kind in ("judged", "missing", "duplicate", "unparsed", *more)]


def test_mt_bench_scores_are_means_of_judged_turns_and_what_does_not_count_is_counted(report):
    rows = [rating(81, 1, 8), rating(81, 2, 6), rating(82, 1, 9.5), rating(82, 2, -1)]
    rows += [rating(111, 1, 3), rating(111, 1, 10), rating(111, 2, float("nan"))]
    rows += [rating(112, 1, None), rating(112, 2, "7"), rating(113, 1, True)]
    rows += [rating(81, 1, 1, "n"), rating(82, 1, 100, "n"), rating(83, 1, 0, "n")]
    found, printed = report("mt-bench", *rows)
    m, n = found["models"]["m"], found["models"]["n"]
    assert (found["benchmark"], found["judge"]) == ("MT-Bench", "gpt-4")
    score, _ = only((found, printed))
    assert score["overall"] == pytest.approx((8 + 6 + 9.5 + 3) / 4)
    assert score["turn 1"] == pytest.approx((8 + 9.5 + 3) / 3) and score["turn 2"] == 6
    assert score["writing"] == pytest.approx(23.5 / 3) and score["math"] == 3
    assert score["coding"] is None
    assert n["scores"]["overall"]["score"] == pytest.approx(101 / 3)
    assert counts(m, "outside 1-10") == [4, 160 - 9, 1, 5, 0]
    # 100 and 0 count in the score, as in FastChat, and the report says so.
    assert counts(n, "outside 1-10") == [3, 157, 0, 0, 2]
    assert re.search(r"\| overall +\| 6\.625 \[", printed)
    assert re.search(r"\| coding +\| - +\| - +\|", printed)


def test_of_several_judgments_of_a_turn_the_first_valid_one_counts_or_all_as_in_fastchat(report):
    rows = [rating(81, 1, -1), rating(81, 1, 10), rating(81, 1, 4), rating(82, 1, 1)]
    score, found = only(report("mt-bench", *rows))
    assert score["overall"] == (10 + 1) / 2 and found == [2, 158, 2, 0]
    score, found = only(report("mt-bench", *rows, more=["--every-judgment"]))
    assert score["overall"] == (10 + 4 + 1) / 3 and found == [2, 158, 2, 0]
    _, found = only(report("mt-bench", rating(81, 1, -1), rating(81, 1, -1), rows[3]))
    assert found == [1, 158, 1, 1]


def test_without_its_file_mt_benchs_questions_are_the_published_ones_ten_a_category(report):
    score, _ = only(report("mt-bench", *(rating(81 + i, 1, 1 + i // 10) for i in range(80))))
    order = "writing roleplay reasoning math coding extraction stem humanities".split()
    assert [score[category] for category in order] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_arena_hard_win_rate_is_the_bradley_terry_estimate_over_weighted_battles(report):
    labels = [("A>>B", "A>B"), ("A=B", "B>>A"), ("B>A", None), ("A>>A", "A<B"), ("B>>A", [])]
    rows = [games(f"q{i}", *of) for i, of in enumerate(labels)]
    score, found = only(
        report("arena-hard", *rows, games("q0", "B>>A", "B>>A"), games("q9", "A>B"))
    )
    # By hand: m is B in the first game and A in the second. Lost 3, won 1; half, lost 3; won 1;
    # won 3; lost 1.
    points, battles = 0 + 1 + 0.5 + 0 + 1 + 3 + 0, 3 + 1 + 1 + 3 + 1 + 3 + 1
    assert score["win rate"] == pytest.approx(100 * points / battles)
    assert found == [7, 1000 - 11, 1, 4]
    # Bradley-Terry: the strength whose sigmoid makes the battles likeliest, by Newton's method.
    strength = 0.0
    for _ in range(50):
        p = 1 / (1 + exp(-strength))
        strength += (points - battles * p) / (battles * p * (1 - p))
    assert score["win rate"] == pytest.approx(100 / (1 + exp(-strength)))


def test_of_several_judgments_of_a_question_the_first_valid_verdict_of_each_game_counts(report):
    rows = [games("q", None, "A>B"), games("q", "A>B", "B>>A"), games("q", "B>>A")]
    # Lost the first game once, won the second.
    assert only(report("arena-hard", *rows)) == ({"win rate": 50.0}, [2, 998, 2, 0])


def test_judgments_in_the_form_that_arena_hards_repository_has_now_are_read(report):
    row = {"uid": "0" * 32, "category": "arena-hard-v0.1", "judge": "any", "model": "m"}
    said = {"judgment": {"answer": "[[B>A]]"}, "prompt": []}
    row |= {"baseline": "gpt-4-0314", "games": [{"score": "B>A"} | said, {"score": "A>B"} | said]}
    found = report("arena-hard", row, row | {"uid": "1" * 32, "games": [None, None]})
    assert found[0]["judge"] == "any" and only(found) == ({"win rate": 100.0}, [2, 996, 0, 2])


def test_battles_count_whichever_side_the_baseline_is_on(report, tmp_path, capsys):
    base, rows = "gpt-4-0314", []
    for text in "B m model_b|B m tie|m B model_a|m B model_b|B n model_a|B n -".split("|"):
        a, b, winner = text.replace("B", base).split()
        rows.append({"question_id": "q", "model_a": a, "model_b": b, "winner": winner})
    models = report("arena-hard", *rows, flag="--battles")[0]["models"]
    assert models["m"]["scores"]["win rate"]["score"] == pytest.approx(100 * 2.5 / 4)
    assert models["n"]["scores"]["win rate"] == {"score": 0.0, "low": 0.0, "high": 0.0}
    assert (models["m"]["battles"], models["n"]["unparsed"]) == (4, 1)
    path = write(tmp_path / "b.jsonl", [rows[0] | {"model_a": "x"}])
    code = run("arena-hard", "report", "--battles", path)
    assert f"{path}:1: " in complaint(capsys, code)


def test_an_interval_is_that_of_a_mean_whose_units_are_drawn_anew(report):
    def overall(*rows):
        return report("mt-bench", *rows)[0]["models"]["m"]["scores"]["overall"]

    # 80 questions, each with two equal scores: the standard error is that of 80 numbers, not 160.
    scores = [1 + (i * 37) % 10 for i in range(80)]
    found = overall(*(rating(81 + i, turn, scores[i]) for i in range(80) for turn in (1, 2)))
    mean = sum(scores) / 80
    error = (sum((score - mean) ** 2 for score in scores) / 80 / 80) ** 0.5
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.1 * error + 0.02)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.1 * error + 0.02)
    found = overall(rating(81, 1, 5), rating(82, 1, 5))
    assert found == {"score": 5.0, "low": 5.0, "high": 5.0}


@needs_real
def test_the_real_reports_are_the_published_ones(report):
    mt_bench, arena_hard = REAL / "mt_bench", REAL / "arena_hard"
    judged = ["--judgments", mt_bench / "model_judgment/gpt-4_single.jsonl"]
    found, printed = report("mt-bench", more=judged)
    for model, score in (("mamba_0_5_dpo_ep1", 7.121875), ("mamba_0_875_dpo_ep3", 6.36875)):
        of_model = found["models"][model]
        assert of_model["scores"]["overall"]["score"] == score and f"| {score} [" in printed
        assert counts(of_model) == [160, 0, 0, 0]
    judged += ["--questions", mt_bench / "question.jsonl"]
    assert report("mt-bench", more=judged)[0] == found

    battles = ["--battles", arena_hard / "battles_gpt-4-0613.jsonl"]
    found, printed = report("arena-hard", more=battles)
    rate = found["models"]["gpt-4-0613"]["scores"]["win rate"]
    assert "| 37.90 [" in printed and found["models"]["gpt-4-0613"]["battles"] == 1244
    assert rate["low"] == pytest.approx(35.77, abs=0.5)
    assert rate["high"] == pytest.approx(40.10, abs=0.5)

    (path,) = (arena_hard / "model_judgment/gpt-4-1106-preview").glob("*.jsonl")
    judged = ["--judgments", path, "--questions", arena_hard / "question.jsonl"]
    (of_model,) = report("arena-hard", more=judged)[0]["models"].values()
    assert counts(of_model) == [367, 614, 0, 19]


REFUSED = [
    ([rating(81, 1, 5), rating(82, 1, 5, judge="other")], ":2: 'm' judged by 'other', above by"),
    ([rating(161, 1, 5)], ":1: question_id 161 is not one of"),
    ([rating([], 1, 5)], ":1: question_id [] is not one of"),
    ([rating(81, 3, 5)], ":1: turn 3, wanted 1 or 2"),
    ([rating(81, 1, 10**400)], ":1: score 1000"),
    ([rating(81, 1, 5), rating(81, 2, -1e308)], ":2: score -1e+308, wanted one of at most 9"),
    ([rating(81, 1, 5, model=None)], ":1: None judged by"),
    ([{"question_id": 81}], ":1: model, judge, score, turn is missing"),
    ([], "no judgment in "),
    ([games("q1") | {"games": None}], ":1: wanted a list of two games"),
    ([games("q1", None, None, None)], ":1: wanted a list of two games"),
    ([games("q")], ":1: question_id 'q' is not one of"),
]


@pytest.mark.parametrize(("rows", "said"), REFUSED)
def test_reports_refuse_two_judges_and_what_is_no_judgment(tmp_path, capsys, rows, said):
    path, flags = write(tmp_path / "j.jsonl", rows), ["mt-bench", "report"]
    if rows and "games" in rows[0]:
        questions = Files(tmp_path, "arena-hard").questions
        flags = ["arena-hard", "report", "--questions", questions]
    error = complaint(capsys, run(*flags, "--judgments", path))
    assert str(path) in error and said in error


def test_models_of_several_files_are_reported_side_by_side(report, tmp_path):
    rows = [
        games("q", "A=B", label, model=name) for name, label in (("one", "A=B"), ("two", "A>B"))
    ]
    paths = [write(tmp_path / f"{row['model']}.jsonl", [row]) for row in rows]
    _, printed = report("arena-hard", more=["--judgments", *paths])
    assert re.search(r"\| Arena-Hard, gpt-4 \| one +\| two +\|", printed)
    assert re.search(r"\| win rate +\| 50\.00 \[.*?\] \| 75\.00 \[", printed)


def test_a_report_does_not_replace_the_judgments_it_read(tmp_path, capsys):
    path = write(tmp_path / "j.jsonl", [rating(81, 1, 7, "a")])
    before = path.read_bytes()
    error = complaint(capsys, run("mt-bench", "report", "--judgments", path, "--json", path))
    assert "is a file that was read" in error and path.read_bytes() == before


# -------------------------------------------------------------------------------------- tables


def test_tables_put_models_side_by_side_with_a_dash_for_what_is_missing(tmp_path, capsys):
    for name in ("a", "b", "h"):
        (tmp_path / name).mkdir()
    for bench, name, rows in (
        ("mt-bench", "a/mt_bench.json", [rating(81, 1, 7, "a"), rating(81, 1, 4, "other")]),
        ("mt-bench", "a/mt_bench_turbo.json", [rating(81, 1, 6, "a", "turbo")]),
        ("arena-hard", "b/arena_hard.json", [games("q", "A=B", model="x")]),
    ):
        path = write(tmp_path / "j.jsonl", rows)
        assert run(bench, "report", "--judgments", path, "--json", tmp_path / name) == 0
    (tmp_path / "a/mt_bench_answers.jsonl.json").write_text("{}")  # how answers were made
    (tmp_path / "b/score.json").write_text('{"bleu4_lf": 37.7, "rouge1": 12.345, "count": 3}')
    (tmp_path / "h/score.json").write_text('{"bleu4_lf": 42.4}')
    save_model(tiny_model(), tmp_path / "model")
    pairs = [{"prompt_ids": [0, i], "chosen_ids": [i, 4], "rejected_ids": [5]} for i in (2, 3)]
    files = ["--data", write(tmp_path / "pairs.jsonl", pairs), "--model", tmp_path / "model"]
    assert run("likelihood", *files, "--out", tmp_path / "h/likelihood.jsonl") == 0
    measured = json.loads((tmp_path / "h/likelihood.json").read_text())["measures"]
    capsys.readouterr()
    runs = ["--runs", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--hh-runs"]
    assert run("tables", *runs, f"a={tmp_path / 'h'}") == 0
    tables = []
    for part in re.split(r"^(?=Table|Likelihoods)", capsys.readouterr().out, flags=re.M)[1:]:
        lines = [line.strip("|").split("|") for line in part.splitlines() if line[:1] == "|"]
        tables.append([[cell.strip() for cell in line] for line in lines])
    one, two, three, likelihoods = tables
    assert one[0] == ["model", "MT-Bench, gpt-4", "MT-Bench, turbo", "Arena-Hard, gpt-4"]
    assert one[2] == ["a", "7.00 [7.00, 7.00]", "6.00 [6.00, 6.00]", "-"]
    assert one[3] == ["b", "-", "-", "50.00 [50.00, 50.00] (x)"]  # x: whose scores they are
    assert two[0][:3] == ["model", "bleu4_lf", "rouge1_lf"] and two[2][:3] == ["a", "42.40", "-"]
    assert [row[:2] for row in three[2:]] == [["a", "-"], ["b", "37.70"]] and three[3][6] == "12.35"
    assert likelihoods[0] == ["model", *measured] and likelihoods[2][0] == "a (HH-RLHF)"
    values = [f"{of['value']:.4f}" for of in measured.values()]
    assert [cell.split()[0] for cell in likelihoods[2][1:]] == values


SCORE, LIKELY = '{"bleu4_lf": 1.0, "rouge1": 2.0}', '{"measures": {}}'
UNREADABLE = {
    "mt_bench.json": ["[]", "{}", '{"models": {}}', '{"models": {"a": {}, "b": {}}}', "{"]
    + ['{"models": {"x": {"scores": {}}}}', SCORE, LIKELY],
    "score.json": ["[]", "{}", '{"bleu4_lf": "x"}', LIKELY, '{"bleu4_lf": 1%s}' % ("0" * 400)],
    "likelihood.json": ["{}", SCORE],
}


def test_tables_name_what_they_cannot_read(tmp_path, capsys):
    assert "--runs or --hh-runs" in complaint(capsys, run("tables"))
    assert "nowhere" in complaint(capsys, run("tables", "--runs", f"x={tmp_path / 'nowhere'}"))
    (tmp_path / "mt_bench.jsonl.json").write_text("{}")  # how answers were made
    assert "holds none of arena_hard*.json, mt" in complaint(
        capsys, run("tables", "--runs", f"x={tmp_path}")
    )
    (tmp_path / "score.json").write_text(SCORE)
    twice = [f"x={tmp_path}"] * 2
    assert "second" in complaint(capsys, run("tables", "--runs", *twice))
    for name, texts in UNREADABLE.items():
        for text in texts:
            (tmp_path / name).write_text(text)
            assert name in complaint(capsys, run("tables", "--runs", f"x={tmp_path}"))
        (tmp_path / name).unlink()


def test_tables_name_two_reports_of_one_judge(report, tmp_path, capsys):
    report("mt-bench", rating(81, 1, 7))
    for name in ("mt_bench.json", "mt_bench_old.json"):
        (tmp_path / name).write_bytes((tmp_path / "report.json").read_bytes())
    error = complaint(capsys, run("tables", "--runs", f"x={tmp_path}"))
    assert (
        "mt_bench_old.json: a report of MT-Bench, gpt-4, as is " in error
        and "mt_bench.json;" in error
    )
