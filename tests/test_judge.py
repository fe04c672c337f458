"""eval.py mt-bench and arena-hard: answers, and a judge on the loopback that misbehaves."""

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext

import pytest
from conftest import REAL, ROOT, needs_real, tiny_model
from judging import (
    ANSWERS,
    BOTH,
    CONFIG,
    KEY,
    QUESTIONS,
    SOON,
    Files,
    answers,
    complaint,
    completion,
    refusal,
    rows_of,
    run,
    serving,
    write,
)

import eval as evaluation
from data import ChatFormat
from evaluation import benchmarks, endpoint
from model import save_model


@pytest.fixture
def serve(monkeypatch):
    yield from serving(monkeypatch)


@pytest.fixture(params=["mt-bench", "arena-hard"])
def either(request, tmp_path):
    return Files(tmp_path, request.param)


@pytest.fixture
def mt(tmp_path):
    return Files(tmp_path, "mt-bench")


@pytest.fixture
def arena(tmp_path):
    return Files(tmp_path, "arena-hard")


@pytest.fixture
def one(mt):
    """MT-Bench with one answered question, which is two judgments."""
    mt.only(81)
    return mt


def user_of(payload):
    return payload["messages"][-1 if len(payload["messages"]) == 1 else 1]["content"]


# ------------------------------------------------------------------------------- what is asked


def test_mt_bench_asks_for_each_turn_with_its_categorys_prompt_and_writes_fastchats_rows(mt, serve):
    service = serve(lambda payload, count: "Good. Rating: [[8]]")
    assert mt.judge(service) == 0
    assert {(p["messages"][0]["content"], user_of(p)) for p in service.asked} == {
        ("You are single-v1.", "Q Write a line. A A line of text."),
        (
            "You are single-v1-multi-turn.",
            "Q Write a line. A A line of text. Q Shorten it. A A line.",
        ),
        ("You are single-math-v1.", "Q 1+1? R two A 2"),
        ("You are single-math-v1-multi-turn.", "R two three Q 1+1? And plus 1? A 2 3"),
        ("You are single-v1.", "Q What is {mass}? A Mass is {m}."),
        (
            "You are single-v1-multi-turn.",
            "Q What is {mass}? A Mass is {m}. Q And weight? A A force.",
        ),
    }
    for payload in service.asked:
        assert [message["role"] for message in payload["messages"]] == ["system", "user"]
        parameters = [payload[key] for key in ("model", "temperature", "max_tokens")]
        assert parameters == ["gpt-4", 0, 2048]
    assert service.keys == [f"Bearer {KEY}"] * 6
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(mt.out)}
    assert set(rows) == {(number, turn) for number in QUESTIONS for turn in (1, 2)}
    row = rows[111, 2]
    assert list(row) == "question_id model judge user_prompt judgment score turn tstamp".split()
    assert (row["model"], row["judge"]) == ("mine", ["gpt-4", "single-math-v1-multi-turn"])
    assert row["judgment"] == "Good. Rating: [[8]]" and row["user_prompt"].startswith("R two three")


RATINGS = [
    ("Rating: [[7]]", 7),
    ("[[8.5]]", 8.5),
    ("I say [6].", 6),
    ("[3] at first, [[9]] in the end", 9),
    ("[[4]] or [[5]]", 4),
    ("[[05]]", 5),
    (f"[[{'9' * 5000}]]", -1),
    ("none", -1),
    ("[[ten]] [[-3]]", -1),
    ("[[7/10]]", -1),
    ("[[6.]]", 6),
]


@pytest.mark.parametrize(("said", "score"), RATINGS)
def test_a_rating_is_the_first_in_double_brackets_else_in_single_ones_else_minus_1(
    one, serve, said, score
):
    assert one.judge(serve(lambda payload, count: said)) == 0
    assert [row["score"] for row in rows_of(one.out)] == [score, score]


def test_arena_hard_plays_two_games_with_the_sides_swapped_as_its_configuration_says(arena, serve):
    def act(payload, count):
        mine_first = "A: mine" in user_of(payload)
        return "[[A>>B]] or so" if mine_first else "[[B>A]], yes [[B>A]]"

    service = serve(act)
    assert arena.judge(service) == 0
    assert {user_of(p) for p in service.asked} == {
        f"Q: What is {name}?\nA: {a} of {name}\nB: {b} of {name}"
        for name in ("q1", "q2", "q3")
        for a, b in (("theirs", "mine"), ("mine", "theirs"))
    }
    for payload in service.asked:
        assert payload["messages"][0]["content"] == 'Judge "well".\nOr not.'
        assert (payload["temperature"], payload["max_tokens"]) == (0, 77)
    for row in rows_of(arena.out):
        assert list(row) == ["question_id", "model", "judge", "games"] and row["judge"] == "gpt-4"
        assert [game["score"] for game in row["games"]] == ["B>A", "A>>B"]
        assert [list(game) for game in row["games"]] == [["user_prompt", "judgment", "score"]] * 2
        assert row["games"][0]["judgment"] == "\n[[B>A]], yes [[B>A]]"
        assert row["games"][0]["user_prompt"].endswith(f"\nB: mine of {row['question_id']}")


def test_a_flag_sets_the_limit_of_a_judgment(either, serve):
    service = serve()
    assert either.judge(service, "--max-tokens", 55) == 0
    assert {payload["max_tokens"] for payload in service.asked} == {55}


def test_arena_hard_asks_once_more_if_there_is_no_label_and_two_labels_are_none(arena, serve):
    def act(payload, count):
        if "q1" in user_of(payload):
            return "cannot say" if len(payload["messages"]) == 2 else "well, [[A=B]]"
        return "cannot say" if "q2" in user_of(payload) else "[[A>B]] no, [[B>A]]"

    service = serve(act)
    assert arena.judge(service) == 0
    games = {row["question_id"]: row["games"] for row in rows_of(arena.out)}
    scores = [game["score"] for name in ("q1", "q2", "q3") for game in games[name]]
    assert scores == ["A=B"] * 2 + [None] * 4
    assert games["q1"][0]["judgment"] == "\ncannot say\nwell, [[A=B]]"
    second = [p["messages"] for p in service.asked if len(p["messages"]) > 2]
    assert len(service.asked) == 4 + 4 + 2 and len(second) == 4
    assert [(m["role"], m["content"]) for m in second[0][2:]] == [
        ("assistant", "cannot say"),
        ("user", "continue your judgment and finish by outputting a final verdict label"),
    ]


def test_the_configuration_is_read_in_any_form_that_yaml_has(arena, serve):
    (arena.where / "config.yaml").write_text(
        "{temperature: 0.5, 'max_tokens': 0x10,\n system_prompt: 'it''s',\n"
        " prompt_template: ['{question_1} {answer_1} {answer_2}']}"
    )
    service = serve()
    assert arena.judge(service) == 0
    for payload in service.asked:
        assert (payload["temperature"], payload["max_tokens"]) == (0.5, 16)
        assert payload["messages"][0]["content"] == "it's"


LIMIT, PATTERNS = "max_tokens: 77 # of a judgment", "\nregex_patterns: "
CONFIG_FAULTS = [
    (LIMIT, "", "max_tokens is a NoneType, wanted int"),
    (LIMIT, "max_tokens: many", "max_tokens is a str"),
    (LIMIT, "max_tokens: true", "max_tokens is a bool"),
    ("temperature: 0", "temperature: [0]", "temperature is a list, wanted int or float"),
    ("system_prompt: ", "system_prompt: 5 # ", "system_prompt is a int"),
    ("prompt_template: [", 'prompt_template: ["a", ', "prompt_template: wanted one text"),
    ("prompt_template: [", "prompt_template: ['", "config.yaml"),  # a quote that stays open
    ("prompt_template: [", "prompt_template: [[", "config.yaml"),
    (CONFIG, "- a list", "config.yaml"),
    (CONFIG, "[" * 1500, "config.yaml"),
    (CONFIG, "a: \x00", "config.yaml"),
    ("{answer_2}", "{answer_9}", "prompt_template: wanted a text with fields among question_1"),
    ("{answer_2}", "{answer_2", "prompt_template: wanted a text with fields"),
    (LIMIT, LIMIT + PATTERNS + "[a]", "regex_patterns: wanted one group"),
    (LIMIT, LIMIT + PATTERNS + "['(']", "config.yaml"),
    (LIMIT, LIMIT + PATTERNS + "7", "config.yaml"),
]


@pytest.mark.parametrize(("found", "changed", "said"), CONFIG_FAULTS)
def test_a_configuration_that_cannot_be_used_is_one_line(
    arena, serve, capsys, found, changed, said
):
    assert found in CONFIG
    (arena.where / "config.yaml").write_text(CONFIG.replace(found, changed))
    service = serve()
    error = complaint(capsys, arena.judge(service))
    assert "config.yaml" in error and said in error and not service.asked


@pytest.mark.parametrize(("package", "pip"), [("openai", "openai"), ("yaml", "pyyaml")])
def test_a_missing_package_is_one_line_with_the_pip_command(
    arena, serve, capsys, monkeypatch, package, pip
):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {pip}" in complaint(capsys, arena.judge(serve()))


# -------------------------------------------------- Arena-Hard as its repository has it now


def present_form(arena):
    """Rewrites the files of `arena`; questions, answers and configuration say the same."""
    names = ("q1", "q2", "q3")
    asked = [{"uid": q, "category": "arena-hard-v0.1", "prompt": f"What is {q}?"} for q in names]
    write(arena.questions, asked)
    for path, side, model in (
        (arena.answers, "mine", "mine"),
        (arena.where / "baseline.jsonl", "theirs", "gpt-4-0314"),
    ):
        rows = []
        for q in names:
            messages = [{"role": "user", "content": f"What is {q}?"}]
            messages += [{"role": "assistant", "content": {"answer": f"{side} of {q}"}}]
            rows.append({"uid": q, "ans_id": "a", "model": model, "messages": messages})
        write(path, rows)
    (arena.where / "config.yaml").write_text(
        "temperature: 0.0\nmax_tokens: 4096\nreference: null\n"
        "regex_patterns:\n  - \\[\\[([AB<>=]+)\\]\\]\n  - \\[([AB<>=]+)\\]\n"
        'prompt_template: "Q: {QUESTION}\\nA: {ANSWER_A}\\nB: {ANSWER_B}"\n'
    )


def test_arena_hard_is_judged_from_the_files_that_its_repository_has_now(arena, serve, capsys):
    before, after = serve(), serve()
    assert arena.judge(before) == 0
    arena.out.unlink(), arena.raw.unlink()
    present_form(arena)
    assert arena.judge(after) == 0
    assert {user_of(p) for p in after.asked} == {user_of(p) for p in before.asked}
    assert {p["messages"][0]["role"] for p in after.asked} == {"user"}
    assert "config.yaml has no system_prompt, so the judge gets none" in capsys.readouterr().out
    assert {row["question_id"] for row in rows_of(arena.out)} == {"q1", "q2", "q3"}
    assert run(*arena.flags("")) == 0  # nothing is left to judge
    arena.out.unlink(), arena.raw.unlink()
    (arena.where / "system.txt").write_text("Be fair.\n")
    given = serve()
    assert arena.judge(given, "--system-prompt", arena.where / "system.txt") == 0
    assert {p["messages"][0]["content"] for p in given.asked} == {"Be fair."}


PRESENT_LABELS = [
    ("<think>[[A>B]]? Or rather [[B>A]].</think> It is [[A=B]]", "A=B"),
    ("My verdict: [[a>b]]", "A>B"),
    ("My verdict: [B>A]", "B>A"),
    ("[A>B] at first, [[B>>A]] in the end", "B>>A"),
    ("nothing", None),
]


@pytest.mark.parametrize(("said", "label"), PRESENT_LABELS)
def test_with_its_present_configuration_the_last_label_of_the_first_pattern_counts(
    arena, serve, said, label
):
    present_form(arena)
    arena.answers.write_text(arena.answers.read_text().splitlines()[0] + "\n")
    service = serve(lambda payload, count: said)
    assert arena.judge(service) == 0 and len(service.asked) == 2
    assert [game["score"] for game in rows_of(arena.out)[0]["games"]] == [label, label]


# ----------------------------------------------------------------------- real judgments again


@needs_real
def test_mt_benchs_real_prompts_and_scores_are_reproduced_to_the_letter(tmp_path, serve, capsys):
    real, out, name = REAL / "mt_bench", tmp_path / "out.jsonl", "mamba_0_5_dpo_ep1"
    rows = rows_of(real / "model_judgment/gpt-4_single.jsonl")
    stored = [row for row in rows if row["model"] == name]
    said = {row["user_prompt"]: row["judgment"] for row in stored}
    flags = ["--questions", real / "question.jsonl", "--out", out, "--judge-model", "gpt-4"]
    flags += ["--answers", real / f"model_answer/{name}.jsonl"]
    flags += ["--references", real / "reference_answer/gpt-4.jsonl"]
    flags += ["--prompts", real / "judge_prompts.jsonl"]
    flags += ["--endpoint", serve(lambda payload, count: said[user_of(payload)]).url]
    assert run("mt-bench", "judge", *flags) == 0
    columns = ("question_id", "turn", "model", "judge", "user_prompt", "judgment", "score")
    ours, theirs = (
        {(row["question_id"], row["turn"]): [row[key] for key in columns] for row in rows}
        for rows in (rows_of(out), stored)
    )
    assert ours == theirs and len(ours) == 160
    assert run("mt-bench", "report", "--judgments", out) == 0
    assert "| 7.121875 [" in capsys.readouterr().out


@needs_real
def test_arena_hards_real_prompts_and_labels_are_reproduced_to_the_letter(tmp_path, serve):
    real = REAL / "arena_hard"
    (path,) = (real / "model_judgment/gpt-4-1106-preview").glob("*.jsonl")
    stored = {row["question_id"]: row for row in rows_of(path)}
    assert len(stored) == 193
    said, mine = {}, {}
    start, end = (
        "<|The Start of Assistant A's Answer|>\n",
        "\n<|The End of Assistant A's Answer|>",
    )
    for number, row in stored.items():
        said |= {game["user_prompt"]: game["judgment"][1:] for game in row["games"]}
        text = row["games"][1]["user_prompt"].split(start)[1].split(end)[0]
        mine[number] = [{"content": text, "token_len": 1}]
    model = next(iter(stored.values()))["model"]

    def act(payload, count):
        return said[user_of(payload)] if len(payload["messages"]) == 2 else "hm"

    flags = ["--questions", real / "question.jsonl", "--config", real / "judge_config.yaml"]
    flags += ["--answers", write(tmp_path / "a.jsonl", answers(mine, model))]
    flags += ["--baseline", real / "model_answer/gpt-4-0314.jsonl", "--endpoint", serve(act).url]
    flags += ["--out", tmp_path / "out.jsonl", "--judge-model", "gpt-4-1106-preview"]
    assert run("arena-hard", "judge", *flags) == 0
    ours = {row["question_id"]: row for row in rows_of(tmp_path / "out.jsonl")}
    assert ours.keys() == stored.keys()
    for number, row in ours.items():
        theirs = stored[number]
        for key in ("user_prompt", "score"):
            assert [game[key] for game in row["games"]] == [game[key] for game in theirs["games"]]
        assert row["judge"] == theirs["judge"] and row["model"] == theirs["model"]


# ---------------------------------------------------------------- an endpoint that misbehaves


@pytest.mark.parametrize("reply", [(429, "slow down", SOON), (500, "oh", SOON), (503, ""), None])
def test_what_may_pass_is_tried_again_and_every_raw_reply_is_kept(one, serve, reply):
    service = serve(lambda payload, count: reply if count <= 2 else BOTH)
    assert one.judge(service) == 0
    assert len(service.asked) == 4 and len(rows_of(one.out)) == 2
    raw = [(row["status"], row["body"]) for row in rows_of(one.raw)]
    refused = [reply[:2]] * 2 if reply else []
    assert raw == refused + [(200, completion(BOTH))] * 2
    about = {key: rows_of(one.raw)[-1][key] for key in ("question_id", "model", "turn")}
    assert about == {"question_id": 81, "model": "mine", "turn": 2}


def test_a_request_without_an_answer_in_time_is_tried_again(one, serve):
    service = serve(lambda payload, count: time.sleep(0.6) or BOTH if count == 1 else BOTH)
    assert one.judge(service, "--timeout", "0.2") == 0
    assert len(service.asked) == 3 and len(rows_of(one.out)) == 2


def test_retry_after_is_waited_for(one, serve):
    reply = (429, "", {"Retry-After": "1.2"})  # the client's own first wait is 0.5 s at most
    service = serve(lambda payload, count: reply if count == 1 else BOTH)
    assert one.judge(service) == 0
    assert service.times[1] - service.times[0] >= 1.2


WITHOUT_TEXT = {
    "length": (completion(None, "length", reasoning_content="Hm"), "length (raise --max-tokens)"),
    "filter": (completion(None, "content_filter"), "finish_reason content_filter"),
    "blank": (completion(" \n"), "a reply without text, finish_reason stop"),
    "empty choices": ('{"choices": []}', "no choices"),
    "a list": ("[]", "no choices"),
    "odd choices": ('{"choices": [5]}', "no choices"),
    "an error object": ('{"error": {"code": 502, "message": "Provider  fell"}}', "Provider fell"),
    "an error text": ('{"error": "x y"}', "the reply is an error: x y"),
    "not JSON": ("<html>", "the reply is not JSON: <html>"),
    "deep": ("[" * 100_000, "the reply is not JSON"),
    "stream": ('data: {"choices": []}\n\ndata: [DONE]\n\n', "the reply is a stream of events"),
    "only thoughts": (completion([{"type": "thinking", "thinking": "hm"}]), "without text"),
}


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_a_reply_without_text_is_one_request_counted_under_its_reason(one, serve, capsys, kind):
    body, reason = WITHOUT_TEXT[kind]
    service = serve(lambda payload, count: (200, body))
    error = complaint(capsys, one.judge(service), wanted=1)  # 1: nothing was judged
    assert len(service.asked) == 2 and reason in error and "2 failed (2 x " in error
    assert [row["body"] for row in rows_of(one.raw)] == [body] * 2
    service.act = lambda payload, count: BOTH
    assert one.judge(service) == 0 and len(service.asked) == 4  # asked for again by the next run


def test_the_parts_of_a_reply_are_joined_without_its_thoughts(one, serve):
    thought = {"type": "thinking", "text": "[[1]]", "thinking": [{"type": "text", "text": "[2]"}]}
    texts = [{"type": "text", "text": "Rating:"}, {"type": "text", "text": " [[8]]"}]
    assert one.judge(serve(lambda payload, count: (200, completion([thought, *texts])))) == 0
    assert [row["judgment"] for row in rows_of(one.out)] == ["Rating: [[8]]"] * 2


NO_MAX_TOKENS = refusal(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    code="unsupported_parameter",
)
NO_TEMPERATURE = refusal("Unsupported value: 'temperature' does not support 0.0 with this model.")


def newer(payload, count):
    """A model that accepts neither max_tokens nor a temperature."""
    if "max_tokens" in payload:
        return 400, NO_MAX_TOKENS
    return (400, NO_TEMPERATURE) if "temperature" in payload else BOTH


def test_parameters_that_the_endpoint_refuses_are_replaced_once_and_for_all(mt, serve, capsys):
    service = serve(newer)
    assert mt.judge(service) == 0 and len(rows_of(mt.out)) == 6
    sent = [payload.keys() - {"messages", "model"} for payload in service.asked]
    assert sent[:2] == [{"temperature", "max_tokens"}, {"temperature", "max_completion_tokens"}]
    assert sent[2:] == [{"max_completion_tokens"}] * 6
    assert {payload.get("max_completion_tokens") for payload in service.asked[1:]} == {2048}
    assert 'now sent: {"max_completion_tokens": 2048}' in capsys.readouterr().out
    mt.out.unlink()
    assert mt.judge(service) == 0 and len(service.asked) == 8  # kept replies, asked in other words


def test_a_refusal_that_only_mentions_a_parameter_changes_nothing_for_other_questions(mt, serve):
    def act(payload, count):
        bad = "1+1" in user_of(payload)
        return (400, refusal("flagged: 'what temperature'")) if bad else BOTH

    service = serve(act)
    assert mt.judge(service, "--concurrency", 1) == 0
    good = [payload for payload in service.asked if "1+1" not in user_of(payload)]
    assert len(good) == 4 and all(payload["temperature"] == 0 for payload in good)
    assert len(service.asked) == 4 + 2 * 2 and len(rows_of(mt.out)) == 4


@pytest.mark.parametrize("status", [400, 403])
def test_a_refusal_of_one_question_is_that_questions_failure(mt, serve, capsys, status):
    def act(payload, count):
        bad = "1+1" in user_of(payload)
        return (status, refusal(f"flagged\n by {KEY}", code=status)) if bad else BOTH

    service = serve(act)
    assert mt.judge(service) == 0
    said = f"4 judgments of mine by gpt-4, 0 there before, 2 failed (2 x HTTP {status}: flagged by"
    assert said in capsys.readouterr().out and len(service.asked) == 6


def test_after_its_tries_a_judgment_is_a_counted_failure_that_the_next_run_tries_again(
    either, serve, capsys
):
    bad = "1+1" if either.bench == "mt-bench" else "q2"
    failures, made = (2, 4) if either.bench == "mt-bench" else (1, 2)
    down = [True]

    def act(payload, count):
        return (500, "", SOON) if down[0] and bad in user_of(payload) else BOTH

    service = serve(act)
    assert either.judge(service, "--tries", 4) == 0
    assert sum(bad in user_of(payload) for payload in service.asked) == 4 * failures
    assert len(rows_of(either.out)) == made
    assert f"{failures} failed ({failures} x HTTP 500)" in capsys.readouterr().out
    down[0], before = False, len(service.asked)
    assert either.judge(service) == 0
    assert len(service.asked) - before == 2 and len(rows_of(either.out)) == made + failures
    assert f"{made} there before, 0 failed" in capsys.readouterr().out
    flags = either.flags("")  # nothing is left: it needs no endpoint, and no key
    assert run(*flags, "--key-variable", "NONE") == 0
    assert f"{made + failures} there before, none left" in capsys.readouterr().out
    either.out.write_text("")
    assert "--endpoint: wanted a plain" in complaint(capsys, run(*flags))


STOPS = [
    (401, f"no such key {KEY}", "HTTP 401: no such key [key]"),
    (402, refusal("pay"), "HTTP 402: pay"),
    (404, refusal("no such model"), "HTTP 404: no such model"),
    (429, refusal("Your quota is used up.", code="insufficient_quota"), "Your quota is used up."),
    (403, refusal("broke", code="insufficient_user_quota"), "HTTP 403: broke"),
    (429, refusal("see billing", type="billing_not_active"), "HTTP 429: see billing"),
    (200, '{"error": {"code": 402, "message": "Insufficient credits"}}', "Insufficient credits"),
]


@pytest.mark.parametrize(("status", "body", "said"), STOPS)
def test_what_every_request_would_get_stops_the_run_with_one_line_and_keeps_what_there_is(
    either, serve, capsys, status, body, said
):
    service = serve(lambda payload, count: BOTH if count <= 3 else (status, body))
    error = complaint(capsys, either.judge(service, "--concurrency", 1))
    assert said in error and len(service.asked) == 4
    assert len(rows_of(either.out)) == (3 if either.bench == "mt-bench" else 1)
    assert len(rows_of(either.raw)) == 4


@pytest.mark.parametrize(("status", "body", "said"), STOPS)
def test_a_wrong_key_or_an_empty_account_costs_one_request(mt, serve, capsys, status, body, said):
    service = serve(lambda payload, count: (status, body))
    assert mt.judge(service) == 2 and len(service.asked) == 1
    out, err = capsys.readouterr()
    assert said in err and "2 of 6" not in out  # no other question counts as tried


def test_when_a_run_stops_a_request_that_waits_for_its_next_try_is_not_sent(mt, serve, capsys):
    def act(payload, count):
        if "1+1" in user_of(payload):
            return 500, ""  # tried again after 0.4 s or more
        return BOTH if count == 1 else time.sleep(0.2) or (401, "no")

    service = serve(act)
    assert "HTTP 401" in complaint(capsys, mt.judge(service, "--concurrency", 3))
    asked = Counter(user_of(payload) for payload in service.asked)
    assert set(asked.values()) == {1} and len(rows_of(mt.raw)) == len(service.asked)


def test_a_redirect_is_refused_and_the_key_is_not_sent_on(mt, serve, capsys):
    other = serve()
    to = {"Location": other.url + "/chat/completions"}
    service = serve(lambda payload, count: (307, "", to))
    assert "HTTP 307" in complaint(capsys, mt.judge(service))
    assert other.asked == [] and len(service.asked) == 1


def test_no_more_requests_than_concurrency_are_under_way(mt, serve):
    service = serve(lambda payload, count: time.sleep(0.1) or BOTH)
    assert mt.judge(service, "--concurrency", "3") == 0
    assert service.most == 3


def test_the_key_appears_nowhere_even_if_the_endpoint_quotes_it(either, serve, capfd):
    def act(payload, count):
        quoted = (200, completion(f"{BOTH} {KEY}"))
        return (500, f"bad key {KEY}", SOON) if count % 3 == 0 else quoted

    assert either.judge(serve(act)) == 0
    assert either.judge(serve()) == 0
    assert KEY not in "".join(capfd.readouterr())
    for path in either.where.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


def test_a_key_is_hidden_in_every_form_that_json_gives_it():
    for body in ("sk/abc/defghij", r"sk\/abc\/defghij"):
        assert endpoint.hide(f'"{body}"', "sk/abc/defghij") == '"[key]"'
    assert endpoint.hide("a key", "key") == "a key"  # too short to be a secret


def test_a_word_in_the_place_of_a_key_changes_no_reply(mt, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    assert mt.judge(serve(lambda payload, count: "a fair answer [[7]]")) == 0
    assert {row["judgment"] for row in rows_of(mt.out)} == {"a fair answer [[7]]"}


def test_half_a_surrogate_pair_in_an_answer_is_that_questions_failure(mt, serve, capsys):
    write(mt.answers, answers(ANSWERS | {111: ["\ud800", "x"]}))
    assert mt.judge(serve()) == 0
    assert "2 failed" in capsys.readouterr().out and len(rows_of(mt.out)) == 4


def test_a_full_disk_stops_the_run_with_one_line_and_what_is_there_stays(mt, serve, capsys):
    service, limits = serve(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # bytes of a file
    try:
        code = mt.judge(service, "--concurrency", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in complaint(capsys, code)
    kept = mt.out.read_bytes().count(b"\n")
    assert 0 < kept <= len(service.asked) < 6
    assert mt.judge(service) == 0 and len(rows_of(mt.out)) == 6
    assert len(service.asked) <= 7  # one reply found no room


IMPOSSIBLE = ["--tries 0", "--concurrency 0", "--timeout 0", "--timeout nan", "--tries many"]


@pytest.mark.parametrize("flags", [*IMPOSSIBLE, "--max-tokens 0"])
def test_impossible_numbers_are_refused_before_anything_is_asked(mt, serve, capsys, flags):
    service, (flag, value) = serve(), flags.split()
    assert f"{flag}: found {value}, wanted" in complaint(capsys, mt.judge(service, flag, value))
    assert service.asked == []


def test_a_key_that_is_missing_or_that_no_header_can_hold_is_refused_unshown(
    mt, serve, capsys, monkeypatch
):
    service = serve()
    for key in (f"{KEY}\n{KEY}", f"{KEY} {KEY}", f"{KEY}é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert "OPENAI_API_KEY" in complaint(capsys, mt.judge(service))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY (--key-variable) is not set" in complaint(capsys, mt.judge(service))
    assert service.asked == []
    monkeypatch.setenv("MY_KEY", "another")
    assert mt.judge(service, "--key-variable", "MY_KEY") == 0
    assert set(service.keys) == {"Bearer another"}


ODD_ADDRESSES = ["ftp://127.0.0.1/v1", "127.0.0.1:80", f"http://me:{KEY}@127.0.0.1/v1"]
ODD_ADDRESSES += ["http://[1/v1", "http://a:b/v1", "http://127.0.0.1:99999/v1", "http://a..b/v1"]


def test_an_unreachable_endpoint_is_one_line_and_nothing_is_lost(either, serve, capsys):
    service = serve(lambda payload, count: (400, "") if count > 3 else BOTH)
    assert either.judge(service) == 0
    before = either.out.read_bytes(), either.raw.read_bytes()
    capsys.readouterr()
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert "not reachable" in complaint(capsys, run(*either.flags(url)))
    url = "http://no-such-host.invalid/v1"
    assert "not reachable" in complaint(capsys, run(*either.flags(url)))
    for url in [*ODD_ADDRESSES, "https://"]:
        assert "--endpoint" in complaint(capsys, run(*either.flags(url)))
    assert before == (either.out.read_bytes(), either.raw.read_bytes())


# ------------------------------------------------------------------------------------ resuming


def test_an_arena_hard_game_that_was_judged_is_not_paid_for_again_if_the_other_one_fails(
    arena, serve, capsys
):
    down = [True]

    def act(payload, count):
        return (500, "", SOON) if down[0] and "A: mine" in user_of(payload) else BOTH

    service = serve(act)
    assert "3 failed" in complaint(capsys, arena.judge(service), wanted=1)
    assert arena.out.read_text() == "" and len(service.asked) == 3 + 3 * 3
    down[0], before = False, len(service.asked)
    assert arena.judge(service) == 0
    assert len(rows_of(arena.out)) == 3
    assert all("A: mine" in user_of(payload) for payload in service.asked[before:])
    assert len(service.asked) - before == 3


def test_interrupted_it_keeps_every_reply_and_the_next_run_asks_only_for_what_is_missing(
    either, serve
):
    service = serve(lambda payload, count: time.sleep(0.3 if count > 2 else 0) or BOTH)
    flags = map(str, either.flags(service.url, "--concurrency", "2"))
    command = [sys.executable, str(ROOT / "eval.py"), *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    while len(service.asked) < 3:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopping" in err and KEY not in out + err
    asked = len(service.asked)
    assert asked < 6 and len(rows_of(either.raw)) == asked
    if either.bench == "mt-bench":
        assert len(rows_of(either.out)) == asked
    assert either.judge(service) == 0
    sent = Counter(json.dumps(payload) for payload in service.asked)
    assert len(sent) == 6 and set(sent.values()) == {1}
    assert len(rows_of(either.out)) == (6 if either.bench == "mt-bench" else 3)


def test_a_row_that_was_cut_short_is_dropped_with_a_word_and_a_missing_newline_is_mended(
    mt, serve, capsys
):
    service = serve()
    assert mt.judge(service) == 0
    whole, raw = mt.out.read_bytes(), mt.raw.read_bytes()
    mt.out.write_bytes(whole[:-20])
    assert mt.judge(service) == 0
    assert f"{mt.out}: dropped its last row" in capsys.readouterr().out
    assert len(rows_of(mt.out)) == 6 and len(service.asked) == 6  # from the raw replies
    mt.out.write_bytes(whole[:-1])
    assert mt.judge(service) == 0
    assert mt.out.read_bytes() == whole
    mt.out.unlink()
    mt.raw.write_bytes(raw[:-20])
    assert mt.judge(service) == 0
    assert len(rows_of(mt.out)) == 6 and len(service.asked) == 7  # one reply was lost


def test_a_file_that_is_not_ours_is_not_touched(mt, serve, capsys):
    mt.out.parent.mkdir()
    for text, said in (("my notes", "its last line is not a row"), ("my notes\n", ":1: not JSON")):
        mt.out.write_text(text)
        assert f"{mt.out}" in (error := complaint(capsys, mt.judge(serve()))) and said in error
        assert mt.out.read_text() == text


def test_judgments_of_another_judge_or_of_other_answers_are_refused_before_anything_is_asked(
    either, serve, capsys
):
    service = serve()
    assert either.judge(service) == 0
    before, asked = either.out.read_bytes(), len(service.asked)
    error = complaint(capsys, either.judge(service, "--judge-model", "gpt-5"))
    assert f"{either.out}:1: judged by 'gpt-4', wanted 'gpt-5'" in error
    text = either.answers.read_text()
    either.answers.write_text(text.replace("A line.", "Another.").replace("mine of q2", "new"))
    number = 81 if either.bench == "mt-bench" else "q2"
    assert f"question {number} in --answers" in complaint(capsys, either.judge(service))
    assert either.out.read_bytes() == before and len(service.asked) == asked


def test_one_judgments_file_holds_several_models(either, serve):
    service = serve()
    assert either.judge(service) == 0
    text = either.answers.read_text().replace('"mine"', '"other"')
    either.answers.write_text(text.replace("A line", "My line").replace("mine of", "other of"))
    assert either.judge(service) == 0
    assert {row["model"] for row in rows_of(either.out)} == {"mine", "other"}


MALFORMED = [
    ("question.jsonl", "{", ":2: not JSON"),
    ("answers.jsonl", "[]", "is missing; wanted a JSON object"),
    ("answers.jsonl", "{}", "wanted a JSON object with question_id, model_id, choices"),
    ("answers.jsonl", "ANSWER 999 mine []", "question_id 999 is not one of"),
    ("answers.jsonl", "ANSWER [] mine []", "question_id [] is not one of"),
    ("answers.jsonl", "ANSWER FIRST you []", "wanted one model"),
    ("answers.jsonl", 'ANSWER FIRST mine [{"turns":TURNS}]', "is answered twice"),
    ("answers.jsonl", "ANSWER SECOND mine []", ":2: wanted turns with"),
    ("answers.jsonl", 'ANSWER SECOND mine [{"turns":[1,2]}]', "wanted turns"),
    (
        "question.jsonl",
        '{"question_id": FIRST, "category": "math", "turns": TURNS}',
        "is there twice",
    ),
    ("out", '{"question_id": FIRST', "not JSON"),
    ("out", '{"question_id": FIRST, "model": "mine"}', "wanted a JSON object with question_id"),
]


@pytest.mark.parametrize(("file", "line", "wanted"), MALFORMED)
def test_malformed_lines_are_named_by_file_and_line(either, serve, capsys, file, line, wanted):
    service, path = serve(), either.where / file
    if file == "out":
        assert either.judge(service) == 0
        path = either.out
    mt = either.bench == "mt-bench"
    if line.startswith("ANSWER"):
        _, number, model, choices = line.split()
        line = f'{{"question_id": {number}, "model_id": "{model}", "choices": {choices}}}'
    first, second = ("81", "111") if mt else ('"q1"', '"q2"')
    turns = '["a", "b"]' if mt else '[{"content": "a"}]'
    lines = path.read_text().splitlines()
    lines[1] = line.replace("FIRST", first).replace("SECOND", second).replace("TURNS", turns)
    path.write_text("\n".join(lines) + "\n")
    asked = len(service.asked)
    error = complaint(capsys, either.judge(service))
    assert f"{path}:2: " in error and wanted in error and len(service.asked) == asked


def test_what_is_missing_from_the_benchmarks_files_is_named(mt, serve, capsys):
    service = serve()
    write(mt.where / "references.jsonl", [])
    assert "no answer to question 111, math needs one" in complaint(capsys, mt.judge(service))
    write(mt.where / "references.jsonl", answers({111: ["two", "three"]}))
    prompt = {"name": "pair-v2", "system_prompt": "", "prompt_template": ""}
    write(mt.where / "prompts.jsonl", [prompt])
    assert "no prompt single-v1" in complaint(capsys, mt.judge(service))
    (mt.where / "prompts.jsonl").unlink()
    assert "prompts.jsonl" in complaint(capsys, mt.judge(service))
    assert not service.asked


def test_a_baseline_without_an_answer_is_named(arena, serve, capsys):
    write(arena.where / "baseline.jsonl", [])
    assert "no answer to question q1" in complaint(capsys, arena.judge(serve()))


def test_questions_without_an_answer_are_counted_and_not_asked_about(either, serve, capsys):
    either.answers.write_text(either.answers.read_text().splitlines()[0] + "\n")
    service = serve()
    assert either.judge(service) == 0
    assert len(service.asked) == 2 and "1 of 3 questions have an answer" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- answers


MODEL = ROOT / "examples/model"


def answer(files, *more):
    """`answer` with the example model; --out is files.where / "new/answers.jsonl"."""
    out = ["--out", files.where / "new/answers.jsonl", "--device", "cpu", *more]
    return run(files.bench, "answer", "--model", MODEL, "--questions", files.questions, *out)


@pytest.fixture
def spoken(monkeypatch):
    """generate() replaced: every answer is "Yes N.", N counting up; out of order; requests are
    kept."""
    asked = []

    def generate(model, requests, stop_ids, **options):
        asked.append(requests)
        for i in reversed(range(len(requests))):
            said = sum(map(len, asked[:-1])) + i
            ids = ChatFormat(MODEL).encode([f" Yes {said}.\n"])[0]
            yield i, ids, "length" if said == 0 else "stop"

    monkeypatch.setattr(benchmarks, "generate", generate)
    return asked


def test_mt_bench_is_answered_in_two_turns_at_the_temperature_of_its_category(mt, spoken, capsys):
    assert answer(mt, "--model-id", "mine") == 0
    first, second = spoken
    assert [r.temperature for r in first] == [0.7, 0.0, 0.1] == [r.temperature for r in second]
    assert all(r.max_new_tokens == 1024 for r in first + second)
    assert [r.number for r in first + second] == [0, 1, 2, 3, 4, 5]
    text = ChatFormat(MODEL).decode(second[1].prompt)
    assert "1+1?" in text and "Yes 1." in text and text.index("Yes 1.") < text.index("And plus 1?")
    rows = {row["question_id"]: row for row in rows_of(mt.where / "new/answers.jsonl")}
    assert list(rows[111]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert rows[111]["choices"] == [{"index": 0, "turns": ["Yes 1.", "Yes 4."]}]
    assert {row["model_id"] for row in rows.values()} == {"mine"}
    assert len({row["answer_id"] for row in rows.values()}) == 3
    printed = capsys.readouterr().out
    assert "3 of 3 questions answered by mine, 0 there before; 0 skipped" in printed
    assert "1 turns cut at their limit" in printed
    said = "questions 1 to 3 of 3, turn 2: 3 of this process's 3 answers, .* tokens/s"
    assert re.search(said, printed)


def test_the_temperatures_are_fastchats():
    wanted = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0)
    wanted |= dict(coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)
    assert benchmarks.MT_TEMPERATURES == wanted


@pytest.mark.parametrize("form", ["first", "present"])
def test_arena_hard_is_answered_greedily_with_the_number_of_tokens(arena, spoken, form):
    if form == "present":
        present_form(arena)
    assert answer(arena) == 0
    (requests,) = spoken
    assert all(r.temperature == 0 and r.max_new_tokens == 4096 for r in requests)
    assert "What is q2?" in ChatFormat(MODEL).decode(requests[1].prompt)
    rows = rows_of(arena.where / "new/answers.jsonl")
    count = len(ChatFormat(MODEL).encode([" Yes 0.\n"])[0])
    assert rows[0]["choices"][0]["turns"] == [{"content": "Yes 0.", "token_len": count}]
    assert [row["question_id"] for row in rows] == ["q1", "q2", "q3"]
    assert {row["model_id"] for row in rows} == {"examples"}


def test_questions_that_are_answered_are_left_and_others_keep_their_random_stream(
    mt, spoken, capsys
):
    out = mt.where / "new/answers.jsonl"
    assert answer(mt) == 0
    (kept,) = [row for row in rows_of(out) if row["question_id"] == 111]
    write(out, [kept])
    spoken.clear()
    assert answer(mt) == 0
    assert [[r.number for r in requests] for requests in spoken] == [[0, 2], [3, 5]]
    assert rows_of(out)[1] == kept and len(rows_of(out)) == 3
    assert "2 of 3 questions answered by examples, 1 there before" in capsys.readouterr().out


def test_killed_in_a_first_turn_it_keeps_all_questions_but_those_at_once_and_resumes(
    mt, spoken, monkeypatch
):
    for module in (evaluation, benchmarks):
        monkeypatch.setattr(module, "MT_BENCH", benchmarks.MT_BENCH._replace(at_once=2))
    speak, tokens = benchmarks.generate, []

    def generate(*arguments, cache_tokens, **options):
        if len(tokens) == 2:
            raise KeyboardInterrupt
        tokens.append(cache_tokens)
        return speak(*arguments, **options)

    monkeypatch.setattr(benchmarks, "generate", generate)
    assert answer(mt, "--cache-tokens", "77") == 130 and tokens == [77, 77]
    monkeypatch.setattr(benchmarks, "generate", speak)
    spoken.clear()
    assert answer(mt) == 0
    assert [[r.number for r in requests] for requests in spoken] == [[2], [5]]
    assert [row["question_id"] for row in rows_of(mt.where / "new/answers.jsonl")] == [81, 111, 141]


def test_two_processes_answer_each_its_share_with_the_same_random_streams(mt, spoken, monkeypatch):
    monkeypatch.setattr(benchmarks, "torchrun_group", nullcontext)  # one comes after the other
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert answer(mt) == 0
    # The one that comes second finds an answer, and still takes the questions that are its own.
    assert [[r.number for r in requests] for requests in spoken] == [[1], [4], [0, 2], [3, 5]]
    assert [row["question_id"] for row in rows_of(mt.where / "new/answers.jsonl")] == [81, 111, 141]


def test_a_prompt_without_room_is_skipped_and_counted(mt, capsys):
    text = mt.questions.read_text().replace("And plus 1?", "more " * 3000)
    mt.questions.write_text(text.replace("Write a line.", "much " * 3000))
    assert answer(mt) == 0
    assert [row["question_id"] for row in rows_of(mt.where / "new/answers.jsonl")] == [141]
    said = "1 of 3 questions answered by examples, 0 there before; 2 skipped"
    assert said in capsys.readouterr().out


def test_answers_of_other_weights_another_origin_or_to_other_questions_are_refused_and_kept(
    mt, spoken, capsys
):
    out, other = mt.where / "new/answers.jsonl", mt.where / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (other / name).symlink_to(MODEL / name)
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert answer(mt) == 0
    before, asked = out.read_bytes(), len(spoken)
    for flags, said in (
        (["--model", other, "--model-id", "examples"], "made with model "),
        (["--model-id", "else"], "made with model_id examples, not else"),
        (["--seed", "1"], "made with seed 0, not 1"),
    ):
        assert said in complaint(capsys, answer(mt, *flags))
    mt.questions.write_text(mt.questions.read_text().replace("line", "word"))
    assert "made with questions " in complaint(capsys, answer(mt))
    out.with_name("answers.jsonl.json").unlink()
    assert "answers.jsonl.json is missing" in complaint(capsys, answer(mt))
    assert out.read_bytes() == before and len(spoken) == asked
    write(out, answers({999: ["a", "b"]}, "examples"))
    assert f"{out}:1: question_id 999 is" in complaint(capsys, answer(mt))


def test_questions_that_cannot_be_asked_are_one_line(mt, spoken, tmp_path, capsys):
    save_model(tiny_model(), tmp_path / "small")
    (tmp_path / "small/tokenizer.json").symlink_to(MODEL / "tokenizer.json")
    error = complaint(capsys, answer(mt, "--model", tmp_path / "small"))
    assert "question.jsonl:1: token id 5" in error
    assert "is not below the model's vocab_size 97" in error
    questions = mt.questions.read_text()
    for text, said in (
        (questions.replace('"stem"', '"cooking"'), ":3: category 'cooking'"),
        ("", "no question"),
        (questions.replace("And weight?", "\\ud800"), ":3: turns hold half a surrogate pair"),
    ):
        mt.questions.write_text(text)
        assert said in complaint(capsys, answer(mt))
    assert spoken == []


def test_the_example_model_answers_and_is_judged_and_reported(either, serve, tmp_path, capsys):
    text = either.questions.read_text().replace('"writing"', '"coding"')
    either.questions.write_text(text.replace('"stem"', '"extraction"'))  # all greedy
    if either.bench == "mt-bench":
        references = {81: ["x", "y"], 111: ["two", "three"]}
        write(either.where / "references.jsonl", answers(references, "gpt-4"))
    assert answer(either, "--model-id", "tiny") == 0
    either.answers = either.where / "new/answers.jsonl"
    before = either.answers.read_bytes()
    assert len(rows_of(either.answers)) == 3
    assert answer(either, "--model-id", "tiny") == 0 and either.answers.read_bytes() == before
    assert either.judge(serve()) == 0
    files = ["--judgments", either.out, "--questions", either.questions]
    assert run(either.bench, "report", *files, "--json", tmp_path / "report.json") == 0
    (of_model,) = json.loads((tmp_path / "report.json").read_text())["models"].values()
    score = next(iter(of_model["scores"].values()))["score"]
    assert score == (7.0 if either.bench == "mt-bench" else 50.0) and of_model["missing"] == 0
