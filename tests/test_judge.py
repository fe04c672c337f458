"""eval.py mt-bench, arena-hard and tables: answers, a judge on the loopback that misbehaves, reports."""

import email.utils
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import REAL, ROOT, needs_real, tiny_model

import eval as evaluation
from model import save_model

KEY = "sk-not-to-be-seen-1234567890"
QUESTIONS = {
    81: ("writing", ["Write a line.", "Shorten it."]),
    111: ("math", ["1+1?", "And plus 1?"]),
    141: ("stem", ["What is {mass}?", "And weight?"]),
}
ANSWERS = {81: ["A line of text.", "A line."], 111: ["2", "3"], 141: ["Mass is {m}.", "A force."]}
CONFIG = """# a comment
judge_model: somebody
temperature: 0
max_tokens: 77 # of a judgment

system_prompt: "Judge \\"well\\".\\nOr not."
prompt_template: ["Q: {question_1}\\nA: {answer_1}\\nB: {answer_2}"]
model_list:
  - x
"""


# ------------------------------------------------------------------------------------------------------ the loopback


class Endpoint:
    """A chat service. `act(payload, count)` gives the reply to the count-th POST (from 1): a text, or (status, headers,
    body), or None to drop the connection. Keeps what it was asked."""

    def __init__(self, act):
        self.act, self.asked, self.keys, self.now, self.most = act, [], [], 0, 0
        self.times, self.lock = [], threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.asked.append(payload)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.times.append(time.monotonic())
                    endpoint.now += 1
                    endpoint.most = max(endpoint.most, endpoint.now)
                    count = len(endpoint.asked)
                try:
                    reply = endpoint.act(payload, count)
                finally:
                    with endpoint.lock:
                        endpoint.now -= 1
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(reply, str):
                    reply = (
                        200,
                        {},
                        json.dumps(
                            {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                        ),
                    )
                status, headers, body = reply
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body.encode()))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # a client that gave up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def serve(monkeypatch):
    """serve(act) starts an endpoint; the key is set, and no proxy is."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(act):
        started.append(Endpoint(act))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(turns_of, model="mine"):
    return [
        {
            "question_id": number,
            "answer_id": "x",
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": 1.0,
        }
        for number, turns in turns_of.items()
    ]


class Files:
    """A benchmark's files in a directory, and the flags that name them."""

    def __init__(self, where, bench):
        self.bench, self.where, self.out = bench, where, where / "judged" / "out.jsonl"
        if bench == "mt-bench":
            write(
                where / "question.jsonl",
                [
                    {"question_id": number, "category": category, "turns": turns}
                    for number, (category, turns) in QUESTIONS.items()
                ],
            )
            self.answers = write(where / "answers.jsonl", answers(ANSWERS))
            write(where / "references.jsonl", answers({111: ["two", "three"]}, "gpt-4"))
            prompts = {
                "single-v1": "Q {question} A {answer}",
                "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
                "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
                "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} Q {question_1} {question_2} "
                "A {answer_1} {answer_2}",
            }
            write(
                where / "prompts.jsonl",
                [
                    {"name": name, "system_prompt": f"You are {name}.", "prompt_template": text}
                    for name, text in prompts.items()
                ],
            )
            self.own = [
                "--references",
                where / "references.jsonl",
                "--prompts",
                where / "prompts.jsonl",
            ]
        else:
            write(
                where / "question.jsonl",
                [
                    {
                        "question_id": name,
                        "category": "arena-hard-v0.1",
                        "cluster": "c",
                        "turns": [{"content": f"What is {name}?"}],
                    }
                    for name in ("q1", "q2", "q3")
                ],
            )
            of = {
                side: {
                    name: [{"content": f"{side} of {name}", "token_len": 3}]
                    for name in ("q1", "q2", "q3")
                }
                for side in ("mine", "theirs")
            }
            self.answers = write(where / "answers.jsonl", answers(of["mine"]))
            write(where / "baseline.jsonl", answers(of["theirs"], "gpt-4-0314"))
            (where / "config.yaml").write_text(CONFIG)
            self.own = ["--baseline", where / "baseline.jsonl", "--config", where / "config.yaml"]

    def flags(self, url, *more):
        return [
            str(flag)
            for flag in (
                self.bench,
                "judge",
                "--questions",
                self.where / "question.jsonl",
                "--answers",
                self.answers,
                *self.own,
                "--out",
                self.out,
                "--endpoint",
                url,
                "--judge-model",
                "gpt-4",
                "--wait",
                "0.01",
                "--tries",
                "3",
                *more,
            )
        ]

    def judge(self, endpoint, *more):
        return evaluation.main(self.flags(endpoint.url, *more))


@pytest.fixture(params=["mt-bench", "arena-hard"])
def either(request, tmp_path):
    return Files(tmp_path, request.param)


@pytest.fixture
def mt(tmp_path):
    return Files(tmp_path, "mt-bench")


@pytest.fixture
def arena(tmp_path):
    return Files(tmp_path, "arena-hard")


BOTH = "Rating: [[7]], and [[A>B]]"  # either benchmark takes something from it


def complaint(capsys, code, wanted=2):
    """The one line on stderr of a command that must have failed."""
    assert code == wanted
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("eval.py: ") and KEY not in said, said
    return said


# -------------------------------------------------------------------------------------------------- what is asked


def test_mt_bench_asks_for_each_turn_with_the_prompt_of_its_category_and_writes_fastchats_rows(
    mt, serve
):
    endpoint = serve(lambda payload, count: "Good. Rating: [[8]]")
    assert mt.judge(endpoint) == 0
    sent = {(p["messages"][0]["content"], p["messages"][1]["content"]) for p in endpoint.asked}
    assert sent == {
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
    for payload in endpoint.asked:
        assert [message["role"] for message in payload["messages"]] == ["system", "user"]
        assert (payload["model"], payload["temperature"], payload["max_tokens"]) == (
            "gpt-4",
            0,
            2048,
        )
    assert endpoint.keys == [f"Bearer {KEY}"] * 6
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(mt.out)}
    assert set(rows) == {(number, turn) for number in QUESTIONS for turn in (1, 2)}
    row = rows[111, 2]
    assert list(row) == [
        "question_id",
        "model",
        "judge",
        "user_prompt",
        "judgment",
        "score",
        "turn",
        "tstamp",
    ]
    assert (row["model"], row["judge"], row["score"]) == (
        "mine",
        ["gpt-4", "single-math-v1-multi-turn"],
        8,
    )
    assert row["judgment"] == "Good. Rating: [[8]]" and row["user_prompt"].startswith("R two three")


@pytest.mark.parametrize(
    ("said", "score"),
    [
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
    ],
)
def test_a_rating_is_the_first_in_double_brackets_else_in_single_ones_else_minus_1(
    mt, serve, said, score
):
    mt.answers = write(mt.answers, answers({81: ANSWERS[81]}))
    assert mt.judge(serve(lambda payload, count: said)) == 0
    assert [row["score"] for row in rows_of(mt.out)] == [score, score]


def test_arena_hard_plays_two_games_with_the_sides_swapped_as_its_configuration_says(arena, serve):
    def act(payload, count):
        mine_first = "A: mine" in payload["messages"][1]["content"]
        return "[[A>>B]] or so" if mine_first else "[[B>A]], yes [[B>A]]"

    endpoint = serve(act)
    assert arena.judge(endpoint) == 0
    assert {p["messages"][1]["content"] for p in endpoint.asked} == {
        f"Q: What is {name}?\nA: {a} of {name}\nB: {b} of {name}"
        for name in ("q1", "q2", "q3")
        for a, b in (("theirs", "mine"), ("mine", "theirs"))
    }
    assert {
        (p["messages"][0]["content"], p["temperature"], p["max_tokens"]) for p in endpoint.asked
    } == {('Judge "well".\nOr not.', 0, 77)}
    for row in rows_of(arena.out):
        assert list(row) == ["question_id", "model", "judge", "games"] and row["judge"] == "gpt-4"
        assert [game["score"] for game in row["games"]] == ["B>A", "A>>B"]
        assert [list(game) for game in row["games"]] == [["user_prompt", "judgment", "score"]] * 2
        assert row["games"][0]["judgment"] == "\n[[B>A]], yes [[B>A]]"
        assert row["games"][0]["user_prompt"].endswith(f"\nB: mine of {row['question_id']}")


def test_a_temperature_may_have_a_decimal_point(arena, serve):
    (arena.where / "config.yaml").write_text(CONFIG.replace("temperature: 0", "temperature: 0.5"))
    endpoint = serve(lambda payload, count: BOTH)
    assert arena.judge(endpoint) == 0 and {
        payload["temperature"] for payload in endpoint.asked
    } == {0.5}


def test_arena_hard_asks_once_more_where_no_label_is_found_and_two_labels_are_none(arena, serve):
    def act(payload, count):
        if "q1" in payload["messages"][1]["content"]:
            return "cannot say" if len(payload["messages"]) == 2 else "well, [[A=B]]"
        if "q2" in payload["messages"][1]["content"]:
            return "cannot say"
        return "[[A>B]] no, [[B>A]]"

    endpoint = serve(act)
    assert arena.judge(endpoint) == 0
    games = {row["question_id"]: row["games"] for row in rows_of(arena.out)}
    assert [game["score"] for name in ("q1", "q2", "q3") for game in games[name]] == ["A=B"] * 2 + [
        None
    ] * 4
    assert games["q1"][0]["judgment"] == "\ncannot say\nwell, [[A=B]]"
    second = [p["messages"] for p in endpoint.asked if len(p["messages"]) > 2]
    assert len(endpoint.asked) == 4 + 4 + 2 and len(second) == 4
    assert [(m["role"], m["content"]) for m in second[0][2:]] == [
        ("assistant", "cannot say"),
        ("user", "continue your judgment and finish by outputting a final verdict label"),
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("max_tokens: 77 # of a judgment", None),
        ("max_tokens: 77 # of a judgment", "max_tokens: many"),
        ("max_tokens: 77 # of a judgment", "max_tokens: 77 88"),
        ("temperature: 0", "temperature: 0\ntemperature: 0"),
        ("system_prompt: ", "system_prompt: |\n  text # "),
        ("system_prompt: ", "system_prompt: 'single' # "),
        ("prompt_template: [", 'prompt_template: ["a", '),
        ("prompt_template: [", "prompt_template: ['"),
        ("{answer_2}", "{answer_9}"),
        ("{answer_2}", "{answer_2"),
    ],
)
def test_of_the_yaml_only_plain_json_values_are_read_and_all_else_is_named(
    arena, serve, capsys, line, found
):
    text = CONFIG.replace(line, found or "")
    assert text != CONFIG
    (arena.where / "config.yaml").write_text(text)
    endpoint = serve(lambda payload, count: BOTH)
    error = complaint(capsys, arena.judge(endpoint))
    assert "config.yaml" in error and re.search(
        "max_tokens|temperature|system_prompt|prompt_template", error
    )
    assert not endpoint.asked


@needs_real
def test_mt_benchs_real_prompts_and_scores_are_reproduced_to_the_letter(tmp_path, serve, capsys):
    real = REAL / "mt_bench"
    stored = [
        row
        for row in rows_of(real / "model_judgment/gpt-4_single.jsonl")
        if row["model"] == "mamba_0_5_dpo_ep1"
    ]
    said = {row["user_prompt"]: row["judgment"] for row in stored}
    out = tmp_path / "out.jsonl"
    flags = [
        "--questions",
        real / "question.jsonl",
        "--answers",
        real / "model_answer/mamba_0_5_dpo_ep1.jsonl",
        "--references",
        real / "reference_answer/gpt-4.jsonl",
        "--prompts",
        real / "judge_prompts.jsonl",
        "--out",
        out,
        "--endpoint",
        serve(lambda p, count: said[p["messages"][1]["content"]]).url,
        "--judge-model",
        "gpt-4",
    ]
    assert evaluation.main(["mt-bench", "judge", *map(str, flags)]) == 0
    columns = ("question_id", "turn", "model", "judge", "user_prompt", "judgment", "score")
    ours, theirs = (
        {(row["question_id"], row["turn"]): [row[key] for key in columns] for row in rows}
        for rows in (rows_of(out), stored)
    )
    assert ours == theirs and len(ours) == 160
    assert evaluation.main(["mt-bench", "report", "--judgments", str(out)]) == 0
    assert "| 7.121875 [" in capsys.readouterr().out


@needs_real
def test_arena_hards_real_prompts_and_labels_are_reproduced_to_the_letter(tmp_path, serve):
    real = REAL / "arena_hard"
    (path,) = (real / "model_judgment/gpt-4-1106-preview").glob("*.jsonl")
    stored = {row["question_id"]: row for row in rows_of(path)[:60]}
    said = {
        game["user_prompt"]: game["judgment"][1:]
        for row in stored.values()
        for game in row["games"]
    }
    mine = {
        number: [
            {
                "content": row["games"][1]["user_prompt"]
                .split("<|The Start of Assistant A's Answer|>\n")[1]
                .split("\n<|The End of Assistant A's Answer|>")[0],
                "token_len": 1,
            }
        ]
        for number, row in stored.items()
    }
    baseline = [row for row in rows_of(real / "model_answer/gpt-4-0314.jsonl")]
    model = next(iter(stored.values()))["model"]
    flags = [
        "--questions",
        real / "question.jsonl",
        "--answers",
        write(tmp_path / "a.jsonl", answers(mine, model)),
        "--baseline",
        write(tmp_path / "b.jsonl", baseline),
        "--config",
        real / "judge_config.yaml",
        "--out",
        tmp_path / "out.jsonl",
        "--judge-model",
        "gpt-4-1106-preview",
        "--endpoint",
        serve(
            lambda p, count: said[p["messages"][1]["content"]] if len(p["messages"]) == 2 else "hm"
        ).url,
    ]
    assert evaluation.main(["arena-hard", "judge", *map(str, flags)]) == 0
    ours = {row["question_id"]: row for row in rows_of(tmp_path / "out.jsonl")}
    assert ours.keys() == stored.keys()
    for number, row in ours.items():
        for key in ("user_prompt", "score"):
            assert [game[key] for game in row["games"]] == [
                game[key] for game in stored[number]["games"]
            ]
        assert row["judge"] == stored[number]["judge"] and row["model"] == stored[number]["model"]


# ------------------------------------------------------------------------------------- an endpoint that misbehaves


NONSENSE = {
    "429": (429, {}, "slow down"),
    "500": (500, {}, "oh"),
    "503": (503, {}, ""),
    "dropped": None,
    "not JSON": (200, {}, "<html>"),
    "no choices": (200, {}, '{"error": "x"}'),
    "empty choices": (200, {}, '{"choices": []}'),
    "null": (200, {}, '{"choices": [{"message": {"content": null}}]}'),
    "a list": (200, {}, "[]"),
    "deep": (200, {}, "[" * 100_000),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_what_may_pass_is_tried_again_and_every_raw_reply_is_kept(mt, serve, kind):
    mt.answers = write(mt.answers, answers({81: ANSWERS[81]}))
    endpoint = serve(lambda payload, count: NONSENSE[kind] if count <= 2 else BOTH)
    assert mt.judge(endpoint, "--concurrency", "1") == 0
    assert len(endpoint.asked) == 4 and len(rows_of(mt.out)) == 2
    raw = rows_of(mt.out.with_name("out.jsonl.raw"))
    expected = [] if NONSENSE[kind] is None else [(NONSENSE[kind][0], NONSENSE[kind][2])] * 2
    assert [(row["status"], row["body"]) for row in raw][:-2] == expected
    assert all(
        json.loads(row["body"])["choices"][0]["message"]["content"] == BOTH for row in raw[-2:]
    )


def test_a_request_without_an_answer_in_time_is_tried_again(mt, serve):
    mt.answers = write(mt.answers, answers({81: ANSWERS[81]}))
    endpoint = serve(lambda payload, count: time.sleep(0.6) or BOTH if count == 1 else BOTH)
    assert mt.judge(endpoint, "--concurrency", "1", "--timeout", "0.2") == 0
    assert len(endpoint.asked) == 3 and len(rows_of(mt.out)) == 2


@pytest.mark.parametrize("form", ["seconds", "date", "nonsense", "negative"])
def test_retry_after_is_waited_for_where_it_says_something(mt, serve, form):
    after = {
        "seconds": "0.5",
        "date": email.utils.formatdate(time.time() + 2, usegmt=True),
        "nonsense": "soon",
        "negative": "-9",
    }[form]
    mt.answers = write(mt.answers, answers({81: ANSWERS[81]}))
    endpoint = serve(
        lambda payload, count: (429, {"Retry-After": after}, "") if count == 1 else BOTH
    )
    assert mt.judge(endpoint, "--concurrency", "1") == 0
    waited = endpoint.times[1] - endpoint.times[0]
    assert (waited >= 0.5) if form in ("seconds", "date") else waited < 0.4


def test_waits_double_and_are_spread_by_chance(mt, serve, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds))
    judge = evaluation.Judge(
        "http://127.0.0.1:9/",
        "m",
        KEY,
        0.0,
        9,
        1.0,
        9,
        1.0,
        mt.where / "raw",
        {},
        evaluation.urllib.request.build_opener(),
        threading.Event(),
    )
    with pytest.raises(evaluation.UnjudgedError):
        evaluation.ask(judge, [], {})
    assert len(waits) == 8 and len(set(waits)) == 8
    assert all(
        0.5 * bound <= wait <= 1.5 * bound
        for wait, bound in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60), strict=True)
    )


def test_after_its_tries_a_judgment_is_a_counted_failure_that_the_next_run_tries_again(
    either, serve, capsys
):
    bad = "1+1" if either.bench == "mt-bench" else "q2"
    down = [True]

    def act(payload, count):
        return (500, {}, "") if down[0] and bad in payload["messages"][1]["content"] else BOTH

    endpoint = serve(act)
    assert either.judge(endpoint) == 0
    failures = 2 if either.bench == "mt-bench" else 1
    made = len(rows_of(either.out))
    assert made == (4 if either.bench == "mt-bench" else 2)
    assert f"{failures} failed ({failures} x HTTP 500)" in capsys.readouterr().out
    down[0], before = False, len(endpoint.asked)
    assert either.judge(endpoint) == 0
    assert len(endpoint.asked) - before == 2 and len(rows_of(either.out)) == made + failures
    assert f"{made} there before, 0 failed" in capsys.readouterr().out
    flags = either.flags("")  # nothing is left: it needs no endpoint, nor a key
    del flags[flags.index("--endpoint") : flags.index("--endpoint") + 2]
    assert evaluation.main([*flags, "--key-variable", "NONE"]) == 0
    assert f"{made + failures} judgments of mine by gpt-4 there before" in capsys.readouterr().out
    either.out.write_text("")
    assert "--endpoint: wanted a plain" in complaint(capsys, evaluation.main(flags))


def test_a_request_that_cannot_succeed_is_not_tried_again(mt, serve, capsys):
    endpoint = serve(lambda payload, count: (400, {}, "too long\n a prompt"))
    assert mt.judge(endpoint) == 0
    assert len(endpoint.asked) == 6 and "6 x HTTP 400: too long a prompt" in capsys.readouterr().out


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_status_that_all_would_get_stops_the_run_with_one_line_and_keeps_what_there_is(
    either, serve, capsys, status
):
    endpoint = serve(
        lambda payload, count: BOTH if count <= 3 else (status, {}, f"no such key {KEY}")
    )
    error = complaint(capsys, either.judge(endpoint, "--concurrency", "1"))
    assert f"HTTP {status}: no such key [key]" in error and len(endpoint.asked) == 4
    assert len(rows_of(either.out)) == (3 if either.bench == "mt-bench" else 1)
    assert len(rows_of(either.out.with_name("out.jsonl.raw"))) == 4


def test_a_redirect_is_refused_and_the_key_is_not_sent_on(mt, serve, capsys):
    other = serve(lambda payload, count: BOTH)
    endpoint = serve(
        lambda payload, count: (307, {"Location": other.url + "/chat/completions"}, "")
    )
    assert "HTTP 307" in complaint(capsys, mt.judge(endpoint))
    assert other.asked == []


def test_no_more_requests_than_concurrency_are_under_way(mt, serve):
    endpoint = serve(lambda payload, count: time.sleep(0.1) or BOTH)
    assert mt.judge(endpoint, "--concurrency", "3") == 0
    assert endpoint.most == 3


def test_the_key_appears_nowhere_even_if_the_endpoint_quotes_it(either, serve, capfd):
    def act(payload, count):
        quoted = {"choices": [{"message": {"content": f"{BOTH} {KEY}"}}]}
        return (500, {}, f"bad key {KEY}") if count % 3 == 0 else (200, {}, json.dumps(quoted))

    assert either.judge(serve(act)) == 0
    assert either.judge(serve(lambda payload, count: BOTH)) == 0
    assert KEY not in "".join(capfd.readouterr())
    for path in either.where.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


def test_a_word_in_the_place_of_a_key_changes_no_reply(mt, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    assert mt.judge(serve(lambda payload, count: "a fair answer [[7]]")) == 0
    assert {row["judgment"] for row in rows_of(mt.out)} == {"a fair answer [[7]]"}


def test_a_full_disk_stops_the_run_with_one_line_and_what_is_there_stays(mt, serve, capsys):
    endpoint, limits = serve(lambda payload, count: BOTH), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # bytes of a file
    try:
        code = mt.judge(endpoint, "--concurrency", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in complaint(capsys, code)
    kept = mt.out.read_bytes().count(b"\n")
    assert 0 < kept <= len(endpoint.asked) < 6
    assert mt.judge(endpoint) == 0 and len(rows_of(mt.out)) == 6
    assert len(endpoint.asked) <= 7  # one reply found no room


@pytest.mark.parametrize(
    "flags",
    [
        ["--tries", "0"],
        ["--concurrency", "0"],
        ["--timeout", "0"],
        ["--wait", "nan"],
        ["--wait", "inf"],
        ["--tries", "many"],
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_asked(mt, serve, capsys, flags):
    endpoint = serve(lambda payload, count: BOTH)
    assert f"{flags[0]}: found {flags[1]}, wanted" in complaint(capsys, mt.judge(endpoint, *flags))
    assert endpoint.asked == []


def test_a_key_that_no_header_can_hold_is_refused_unshown(mt, serve, capsys, monkeypatch):
    endpoint = serve(lambda payload, count: BOTH)
    for key in (f"{KEY}\n{KEY}", f"{KEY} {KEY}", f"{KEY}é"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert "OPENAI_API_KEY" in complaint(capsys, mt.judge(endpoint))
    assert endpoint.asked == []


def test_an_unset_key_variable_is_one_line_and_another_one_can_be_named(
    mt, serve, capsys, monkeypatch
):
    endpoint = serve(lambda payload, count: BOTH)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY (--key-variable) is not set" in complaint(capsys, mt.judge(endpoint))
    assert endpoint.asked == []
    monkeypatch.setenv("MY_KEY", "another")
    assert mt.judge(endpoint, "--key-variable", "MY_KEY") == 0 and set(endpoint.keys) == {
        "Bearer another"
    }


def test_an_unreachable_endpoint_is_one_line_and_nothing_is_lost(either, serve, capsys):
    endpoint = serve(lambda payload, count: (500, {}, "") if count > 3 else BOTH)
    assert either.judge(endpoint) == 0
    before = either.out.read_bytes(), either.out.with_name("out.jsonl.raw").read_bytes()
    capsys.readouterr()
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        code = evaluation.main(either.flags(f"http://127.0.0.1:{taken.getsockname()[1]}/v1"))
    assert "not reachable" in complaint(capsys, code)
    assert "not reachable" in complaint(
        capsys, evaluation.main(either.flags("http://no-such-host.invalid/v1"))
    )
    for url in (
        "ftp://127.0.0.1/v1",
        "127.0.0.1:80",
        f"http://me:{KEY}@127.0.0.1/v1",
        "http://[1/v1",
        "http://a:b/v1",
        "http://127.0.0.1:99999/v1",
        "http://a..b/v1",
        "https://",
    ):
        assert "--endpoint" in complaint(capsys, evaluation.main(either.flags(url)))
    assert before == (either.out.read_bytes(), either.out.with_name("out.jsonl.raw").read_bytes())


# ------------------------------------------------------------------------------------------------------- going on


def test_an_arena_hard_game_that_was_judged_is_not_paid_for_again_when_the_other_one_fails(
    arena, serve
):
    down = [True]
    endpoint = serve(
        lambda p, count: (
            (500, {}, "") if down[0] and "A: mine" in p["messages"][1]["content"] else BOTH
        )
    )
    assert arena.judge(endpoint) == 0
    assert arena.out.read_text() == "" and len(endpoint.asked) == 3 + 3 * 3
    down[0], before = False, len(endpoint.asked)
    assert arena.judge(endpoint) == 0
    assert len(rows_of(arena.out)) == 3
    assert all("A: mine" in p["messages"][1]["content"] for p in endpoint.asked[before:])
    assert len(endpoint.asked) - before == 3


def test_interrupted_it_keeps_every_reply_and_the_next_run_asks_only_for_what_is_missing(
    either, serve, capsys
):
    endpoint = serve(lambda payload, count: time.sleep(0.3 if count > 2 else 0) or BOTH)
    flags = either.flags(endpoint.url, "--concurrency", "2")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(endpoint.asked) < 3:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopping" in err and KEY not in out + err
    asked = len(endpoint.asked)
    total = 6
    assert asked < total
    assert len(rows_of(either.out.with_name("out.jsonl.raw"))) == asked
    if either.bench == "mt-bench":
        assert len(rows_of(either.out)) == asked
    assert either.judge(endpoint) == 0
    sent = Counter(json.dumps(payload) for payload in endpoint.asked)
    assert len(sent) == total and set(sent.values()) == {1}
    assert len(rows_of(either.out)) == (6 if either.bench == "mt-bench" else 3)


def test_a_row_that_was_cut_short_is_removed_and_made_again_and_a_missing_newline_is_mended(
    mt, serve
):
    endpoint = serve(lambda payload, count: BOTH)
    assert mt.judge(endpoint) == 0
    whole = mt.out.read_bytes()
    mt.out.write_bytes(whole[:-20])
    assert mt.judge(endpoint) == 0
    assert len(rows_of(mt.out)) == 6 and len(endpoint.asked) == 6  # from the raw replies
    mt.out.write_bytes(whole[:-1])
    assert mt.judge(endpoint) == 0
    assert mt.out.read_bytes() == whole


def test_a_file_that_is_not_ours_is_not_touched(mt, serve, capsys):
    mt.out.parent.mkdir()
    mt.out.write_text("my notes")
    assert f"{mt.out}: its last line" in complaint(
        capsys, mt.judge(serve(lambda payload, count: BOTH))
    )
    assert mt.out.read_text() == "my notes"


def test_judgments_of_another_judge_are_refused_before_anything_is_asked(either, serve, capsys):
    endpoint = serve(lambda payload, count: BOTH)
    assert either.judge(endpoint) == 0
    before, asked = either.out.read_bytes(), len(endpoint.asked)
    capsys.readouterr()
    error = complaint(capsys, either.judge(endpoint, "--judge-model", "gpt-5"))
    assert f"{either.out}:1: judged by 'gpt-4', wanted 'gpt-5'" in error
    assert either.out.read_bytes() == before and len(endpoint.asked) == asked


def test_judgments_of_other_answers_by_the_same_model_are_refused(either, serve, capsys):
    assert either.judge(serve(lambda payload, count: BOTH)) == 0
    either.answers.write_text(
        either.answers.read_text().replace("A line.", "Another.").replace("mine of q2", "new")
    )
    capsys.readouterr()
    number = 81 if either.bench == "mt-bench" else "q2"
    assert f"question {number} in --answers" in complaint(
        capsys, either.judge(serve(lambda payload, count: BOTH))
    )


def test_one_judgments_file_holds_several_models(either, serve):
    endpoint = serve(lambda payload, count: BOTH)
    assert either.judge(endpoint) == 0
    either.answers.write_text(
        either.answers.read_text()
        .replace('"mine"', '"other"')
        .replace("A line", "My line")
        .replace("mine of", "other of")
    )
    assert either.judge(endpoint) == 0
    assert Counter(row["model"] for row in rows_of(either.out)).keys() == {"mine", "other"}


@pytest.mark.parametrize(
    ("file", "line", "wanted"),
    [
        ("question.jsonl", "{", ":2: not JSON"),
        ("answers.jsonl", "[]", "is missing; wanted a JSON object"),
        (
            "answers.jsonl",
            "{}",
            "is missing; wanted a JSON object with question_id, model_id, choices",
        ),
        (
            "answers.jsonl",
            '{"question_id": 999, "model_id": "mine", "choices": []}',
            "question_id 999 is none of",
        ),
        (
            "answers.jsonl",
            '{"question_id": [], "model_id": "mine", "choices": []}',
            "question_id [] is none of",
        ),
        (
            "answers.jsonl",
            '{"question_id": FIRST, "model_id": "you", "choices": []}',
            "wanted one model",
        ),
        (
            "answers.jsonl",
            '{"question_id": FIRST, "model_id": "mine", "choices": []}',
            "is answered twice",
        ),
        (
            "answers.jsonl",
            '{"question_id": SECOND, "model_id": "mine", "choices": []}',
            ":2: wanted turns with",
        ),
        (
            "answers.jsonl",
            '{"question_id": SECOND, "model_id": "mine", "choices": [{"turns": [1, 2]}]}',
            "wanted turns",
        ),
        (
            "question.jsonl",
            '{"question_id": FIRST, "category": "math", "turns": TURNS}',
            "is there twice",
        ),
        ("out", '{"question_id": FIRST', "not JSON"),
        (
            "out",
            '{"question_id": FIRST, "model": "mine"}',
            "wanted a JSON object with model, judge",
        ),
    ],
)
def test_malformed_lines_are_named_by_file_and_line(either, serve, capsys, file, line, wanted):
    endpoint = serve(lambda payload, count: BOTH)
    path = either.where / file
    if file == "out":
        assert either.judge(endpoint) == 0
        path = either.out
        capsys.readouterr()
    first, second = ("81", "111") if either.bench == "mt-bench" else ('"q1"', '"q2"')
    turns = '["a", "b"]' if either.bench == "mt-bench" else '[{"content": "a"}]'
    lines = path.read_text().splitlines()
    lines[1] = line.replace("FIRST", first).replace("SECOND", second).replace("TURNS", turns)
    path.write_text("\n".join(lines) + "\n")
    asked = len(endpoint.asked)
    error = complaint(capsys, either.judge(endpoint))
    assert f"{path}:2: " in error and wanted in error
    assert len(endpoint.asked) == asked


def test_what_is_missing_from_the_benchmarks_files_is_named(mt, serve, capsys):
    endpoint = serve(lambda payload, count: BOTH)
    write(mt.where / "references.jsonl", [])
    assert "no answer to question 111, math wants one" in complaint(capsys, mt.judge(endpoint))
    write(mt.where / "references.jsonl", answers({111: ["two", "three"]}))
    write(
        mt.where / "prompts.jsonl",
        [{"name": "pair-v2", "system_prompt": "", "prompt_template": ""}],
    )
    assert "no prompt single-v1" in complaint(capsys, mt.judge(endpoint))
    (mt.where / "prompts.jsonl").unlink()
    assert "prompts.jsonl" in complaint(capsys, mt.judge(endpoint))
    assert not endpoint.asked


def test_a_baseline_without_an_answer_is_named(arena, serve, capsys):
    write(arena.where / "baseline.jsonl", [])
    assert "no answer to question q1" in complaint(
        capsys, arena.judge(serve(lambda payload, count: BOTH))
    )


def test_questions_without_an_answer_are_counted_and_not_asked_about(either, serve, capsys):
    either.answers.write_text(either.answers.read_text().splitlines()[0] + "\n")
    endpoint = serve(lambda payload, count: BOTH)
    assert either.judge(endpoint) == 0
    assert len(endpoint.asked) == 2 and "1 of 3 questions have an answer" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- reports


def report(capsys, tmp_path, *flags):
    assert (
        evaluation.main([str(flag) for flag in (*flags, "--json", tmp_path / "report.json")]) == 0
    )
    return json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out


def rating(number, turn, score, model="m", judge="gpt-4"):
    return {
        "question_id": number,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "",
        "judgment": "",
        "score": score,
        "turn": turn,
        "tstamp": 0.0,
    }


def test_mt_bench_scores_are_means_of_judged_turns_and_what_does_not_count_is_counted(
    tmp_path, capsys
):
    path = write(
        tmp_path / "j.jsonl",
        [
            rating(81, 1, 8),
            rating(81, 2, 6),
            rating(82, 1, 9.5),
            rating(82, 2, -1),
            rating(111, 1, 3),
            rating(111, 1, 10),
            rating(112, 1, None),
            rating(112, 2, "7"),
            rating(111, 2, float("nan")),
            rating(81, 1, 1, "n"),
            rating(82, 1, 100, "n"),
        ],
    )
    found, printed = report(capsys, tmp_path, "mt-bench", "report", "--judgments", path)
    m, n = found["models"]["m"], found["models"]["n"]
    assert (found["benchmark"], found["judge"]) == ("MT-Bench", "gpt-4")
    assert m["scores"]["overall"]["score"] == pytest.approx((8 + 6 + 9.5 + 3) / 4)
    assert m["scores"]["turn 1"]["score"] == pytest.approx((8 + 9.5 + 3) / 3)
    assert m["scores"]["turn 2"]["score"] == 6
    assert (
        m["scores"]["writing"]["score"] == pytest.approx(23.5 / 3)
        and m["scores"]["math"]["score"] == 3
    )
    assert m["scores"]["coding"] is None and n["scores"]["overall"]["score"] == 50.5
    assert [m[kind] for kind in ("judged", "missing", "duplicate", "unparsed")] == [
        4,
        160 - 8,
        1,
        4,
    ]
    assert [n[kind] for kind in ("judged", "missing", "duplicate", "unparsed")] == [2, 158, 0, 0]
    assert (m["outside 1-10"], n["outside 1-10"]) == (
        0,
        1,
    )  # counted in the score, as FastChat does, and told
    assert re.search(r"\| overall +\| 6\.625 \[", printed) and re.search(
        r"\| coding +\| - +\| - +\|", printed
    )


def test_without_its_file_mt_benchs_questions_are_the_published_ones_ten_a_category(
    tmp_path, capsys
):
    path = write(tmp_path / "j.jsonl", [rating(81 + i, 1, 1 + i // 10) for i in range(80)])
    scores = report(capsys, tmp_path, "mt-bench", "report", "--judgments", path)[0]["models"]["m"][
        "scores"
    ]
    order = "writing roleplay reasoning math coding extraction stem humanities".split()
    assert [scores[category]["score"] for category in order] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_arena_hard_win_rate_is_the_bradley_terry_estimate_over_weighted_battles(tmp_path, capsys):
    labels = [("A>>B", "A>B"), ("A=B", "B>>A"), ("B>A", None), ("A>>A", "A<B"), ("B>>A", [])]
    path = write(
        tmp_path / "j.jsonl",
        [
            {
                "question_id": f"q{i}",
                "model": "m",
                "judge": "gpt-4",
                "games": [{"score": one}, {"score": two}],
            }
            for i, (one, two) in enumerate(labels)
        ]
        + [
            {"question_id": "q0", "model": "m", "judge": "gpt-4", "games": [{"score": "B>>A"}] * 2},
            {"question_id": "q9", "model": "m", "judge": "gpt-4", "games": [{"score": "A>B"}]},
        ],
    )
    found, _ = report(capsys, tmp_path, "arena-hard", "report", "--judgments", path)
    m = found["models"]["m"]
    # By hand: m is B in the first game and A in the second. Lost 3, won 1; half, lost 3; won 1; won 3; lost 1.
    points, battles = 0 + 1 + 0.5 + 0 + 1 + 3 + 0, 3 + 1 + 1 + 3 + 1 + 3 + 1
    assert m["scores"]["win rate"]["score"] == pytest.approx(100 * points / battles)
    assert [m[kind] for kind in ("judged", "missing", "duplicate", "unparsed")] == [
        7,
        1000 - 11,
        1,
        4,
    ]
    # Bradley-Terry: the strength whose sigmoid makes the battles likeliest, by Newton's method.
    from math import exp

    strength = 0.0
    for _ in range(50):
        p = 1 / (1 + exp(-strength))
        strength += (points - battles * p) / (battles * p * (1 - p))
    assert m["scores"]["win rate"]["score"] == pytest.approx(100 / (1 + exp(-strength)))


def test_weighted_battles_count_as_they_are_whichever_side_the_baseline_is_on(tmp_path, capsys):
    def battle(a, b, winner):
        return {"question_id": "q", "model_a": a, "model_b": b, "winner": winner}

    path = write(
        tmp_path / "b.jsonl",
        [
            battle("gpt-4-0314", "m", "model_b"),
            battle("gpt-4-0314", "m", "tie"),
            battle("m", "gpt-4-0314", "model_a"),
            battle("m", "gpt-4-0314", "model_b"),
            battle("gpt-4-0314", "n", "model_a"),
            battle("gpt-4-0314", "n", None),
        ],
    )
    found, _ = report(capsys, tmp_path, "arena-hard", "report", "--battles", path)
    assert found["models"]["m"]["scores"]["win rate"]["score"] == pytest.approx(100 * 2.5 / 4)
    assert found["models"]["n"]["scores"]["win rate"] == {"score": 0.0, "low": 0.0, "high": 0.0}
    assert (found["models"]["m"]["battles"], found["models"]["n"]["unparsed"]) == (4, 1)
    path = write(tmp_path / "b.jsonl", [battle("x", "y", "tie")])
    assert f"{path}:1: " in complaint(
        capsys, evaluation.main(["arena-hard", "report", "--battles", str(path)])
    )


def test_an_interval_is_that_of_a_mean_whose_units_are_drawn_anew(tmp_path, capsys):
    # 80 questions, each with two equal scores: the standard error is that of 80 numbers, not of 160.
    scores = [1 + (i * 37) % 10 for i in range(80)]
    path = write(
        tmp_path / "j.jsonl",
        [rating(81 + i, turn, scores[i]) for i in range(80) for turn in (1, 2)],
    )
    overall = report(capsys, tmp_path, "mt-bench", "report", "--judgments", path)[0]["models"]["m"][
        "scores"
    ]["overall"]
    mean = sum(scores) / 80
    error = (sum((score - mean) ** 2 for score in scores) / 80 / 80) ** 0.5
    assert overall["low"] == pytest.approx(mean - 1.96 * error, abs=0.1 * error + 0.02)
    assert overall["high"] == pytest.approx(mean + 1.96 * error, abs=0.1 * error + 0.02)
    path = write(tmp_path / "j.jsonl", [rating(81, 1, 5), rating(82, 1, 5)])
    overall = report(capsys, tmp_path, "mt-bench", "report", "--judgments", path)[0]["models"]["m"][
        "scores"
    ]["overall"]
    assert overall == {"score": 5.0, "low": 5.0, "high": 5.0}


@needs_real
def test_the_real_reports_are_the_published_ones(tmp_path, capsys):
    judged = REAL / "mt_bench/model_judgment/gpt-4_single.jsonl"
    found, printed = report(capsys, tmp_path, "mt-bench", "report", "--judgments", judged)
    for model, score in (("mamba_0_5_dpo_ep1", 7.121875), ("mamba_0_875_dpo_ep3", 6.36875)):
        of_model = found["models"][model]
        assert of_model["scores"]["overall"]["score"] == score and f"| {score} [" in printed
        assert (of_model["judged"], of_model["missing"], of_model["unparsed"]) == (160, 0, 0)
    with_questions = report(
        capsys,
        tmp_path,
        "mt-bench",
        "report",
        "--judgments",
        judged,
        "--questions",
        REAL / "mt_bench/question.jsonl",
    )
    assert {name: of["scores"] for name, of in with_questions[0]["models"].items()} == {
        name: of["scores"] for name, of in found["models"].items()
    }

    found, printed = report(
        capsys,
        tmp_path,
        "arena-hard",
        "report",
        "--battles",
        REAL / "arena_hard/battles_gpt-4-0613.jsonl",
    )
    rate = found["models"]["gpt-4-0613"]["scores"]["win rate"]
    assert "| 37.90 [" in printed and found["models"]["gpt-4-0613"]["battles"] == 1244
    assert rate["low"] == pytest.approx(35.77, abs=0.5) and rate["high"] == pytest.approx(
        40.10, abs=0.5
    )

    (path,) = (REAL / "arena_hard/model_judgment/gpt-4-1106-preview").glob("*.jsonl")
    found, _ = report(
        capsys,
        tmp_path,
        "arena-hard",
        "report",
        "--judgments",
        path,
        "--questions",
        REAL / "arena_hard/question.jsonl",
    )
    (of_model,) = found["models"].values()
    assert (of_model["judged"], of_model["missing"], of_model["unparsed"]) == (367, 614, 19)


def test_reports_refuse_two_judges_other_questions_and_what_is_no_judgment(tmp_path, capsys):
    def refused(*rows, bench="mt-bench", more=()):
        path = write(tmp_path / "j.jsonl", rows)
        error = complaint(
            capsys, evaluation.main([bench, "report", "--judgments", str(path), *map(str, more)])
        )
        assert str(path) in error
        return error

    assert ":2: " in refused(rating(81, 1, 5), rating(82, 1, 5, judge="other"))
    assert ":1: " in refused(rating(161, 1, 5)) and ":1: " in refused(rating([], 1, 5))
    assert "turn 3" in refused(rating(81, 3, 5)) and ":1: " in refused(rating(81, 1, 5, model=None))
    assert ":1: " in refused({"question_id": 81}) and "no judgment" in refused()
    game = {"question_id": "q", "model": "m", "judge": "j", "games": None}
    for games in (None, [{}] * 3):
        assert ":1: " in refused(game | {"games": games}, bench="arena-hard")
    files = Files(tmp_path, "arena-hard")
    error = refused(
        game | {"games": []},
        bench="arena-hard",
        more=["--questions", files.where / "question.jsonl"],
    )
    assert "question_id 'q' is none of" in error


def test_models_of_several_files_are_reported_side_by_side(tmp_path, capsys):
    paths = [
        write(
            tmp_path / f"{name}.jsonl",
            [
                {
                    "question_id": "q",
                    "model": name,
                    "judge": "gpt-4",
                    "games": [{"score": "A=B"}, {"score": label}],
                }
            ],
        )
        for name, label in (("one", "A=B"), ("two", "A>B"))
    ]
    _, printed = report(capsys, tmp_path, "arena-hard", "report", "--judgments", *paths)
    assert re.search(r"\| Arena-Hard, gpt-4 \| one +\| two +\|", printed)
    assert re.search(r"\| win rate +\| 50\.00 \[.*?\] \| 75\.00 \[", printed)


def test_tables_put_models_side_by_side_with_a_dash_where_nothing_is(tmp_path, capsys):
    for name in ("a", "b", "h"):
        (tmp_path / name).mkdir()
    write(tmp_path / "j.jsonl", [rating(81, 1, 7, "a"), rating(81, 1, 4, "other")])
    assert (
        evaluation.main(
            [
                "mt-bench",
                "report",
                "--judgments",
                str(tmp_path / "j.jsonl"),
                "--json",
                str(tmp_path / "a/mt_bench.json"),
            ]
        )
        == 0
    )
    write(tmp_path / "j.jsonl", [rating(81, 1, 6, "a", "turbo")])
    assert (
        evaluation.main(
            [
                "mt-bench",
                "report",
                "--judgments",
                str(tmp_path / "j.jsonl"),
                "--json",
                str(tmp_path / "a/mt_bench_turbo.json"),
            ]
        )
        == 0
    )
    write(
        tmp_path / "j.jsonl",
        [{"question_id": "q", "model": "x", "judge": "gpt-4", "games": [{"score": "A=B"}]}],
    )
    assert (
        evaluation.main(
            [
                "arena-hard",
                "report",
                "--judgments",
                str(tmp_path / "j.jsonl"),
                "--json",
                str(tmp_path / "b/arena_hard.json"),
            ]
        )
        == 0
    )
    (tmp_path / "b/score.json").write_text('{"bleu4_lf": 37.7, "rouge1": 12.345, "count": 3}')
    (tmp_path / "h/score.json").write_text('{"bleu4_lf": 42.4}')
    save_model(tiny_model(), tmp_path / "model")
    write(
        tmp_path / "pairs.jsonl",
        [{"prompt_ids": [0, i], "chosen_ids": [i, 4], "rejected_ids": [5]} for i in (2, 3)],
    )
    assert (
        evaluation.main(
            [
                "likelihood",
                "--model",
                str(tmp_path / "model"),
                "--data",
                str(tmp_path / "pairs.jsonl"),
                "--out",
                str(tmp_path / "h/likelihood.jsonl"),
            ]
        )
        == 0
    )
    measured = json.loads((tmp_path / "h/likelihood.json").read_text())["measures"]
    capsys.readouterr()
    assert (
        evaluation.main(
            [
                "tables",
                "--runs",
                f"a={tmp_path / 'a'}",
                f"b={tmp_path / 'b'}",
                "--hh-runs",
                f"a={tmp_path / 'h'}",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    one, two, three, likelihoods = [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line.startswith("|")
        ]
        for part in re.split(r"^(?=Table|Likelihoods)", printed, flags=re.M)[1:]
    ]
    assert one[0] == ["model", "MT-Bench, gpt-4", "MT-Bench, turbo", "Arena-Hard, gpt-4"]
    assert one[2:] == [
        ["a", "7.00 [7.00, 7.00]", "6.00 [6.00, 6.00]", "-"],
        ["b", "-", "-", "50.00 [50.00, 50.00]"],
    ]
    assert two[0][:3] == ["model", "bleu4_lf", "rouge1_lf"] and two[2][:3] == ["a", "42.40", "-"]
    assert [row[:2] for row in three[2:]] == [["a", "-"], ["b", "37.70"]] and three[3][6] == "12.35"
    assert likelihoods[0] == ["model", *measured] and likelihoods[2][0] == "a (HH-RLHF)"
    assert [cell.split()[0] for cell in likelihoods[2][1:]] == [
        f"{of['value']:.4f}" for of in measured.values()
    ]


def test_a_report_does_not_replace_the_judgments_it_read(tmp_path, capsys):
    write(tmp_path / "j.jsonl", [rating(81, 1, 7, "a")])
    before = (tmp_path / "j.jsonl").read_bytes()
    error = complaint(
        capsys,
        evaluation.main(
            [
                "mt-bench",
                "report",
                "--judgments",
                str(tmp_path / "j.jsonl"),
                "--json",
                str(tmp_path / "j.jsonl"),
            ]
        ),
    )
    assert "is a file that was read" in error and (tmp_path / "j.jsonl").read_bytes() == before


def test_a_key_is_hidden_in_every_form_that_json_gives_it():
    for body in ("sk/abc/defghij", r"sk\/abc\/defghij"):
        assert evaluation.hide(f'"{body}"', "sk/abc/defghij") == '"[key]"'
    assert evaluation.hide("a key", "key") == "a key"  # too short to be a secret


def test_tables_name_what_they_cannot_read(tmp_path, capsys):
    assert "nowhere" in complaint(
        capsys, evaluation.main(["tables", "--runs", f"x={tmp_path / 'nowhere'}"])
    )
    assert "second" in complaint(
        capsys, evaluation.main(["tables", "--runs", f"x={tmp_path}", f"x={tmp_path}"])
    )
    score, likely = '{"bleu4_lf": 1.0, "rouge1": 2.0}', '{"measures": {}}'
    for name, texts in {
        "mt_bench.json": [
            "[]",
            "{}",
            '{"models": {}}',
            '{"models": {"a": {}, "b": {}}}',
            '{"models": {"x": {"scores": {}}}}',
            "{",
            score,
            likely,
        ],
        "score.json": ["[]", "{}", '{"bleu4_lf": "x"}', likely],
        "likelihood.json": ["{}", score],
    }.items():
        for text in texts:
            (tmp_path / name).write_text(text)
            assert name in complaint(capsys, evaluation.main(["tables", "--runs", f"x={tmp_path}"]))
        (tmp_path / name).unlink()


# --------------------------------------------------------------------------------------------------------- answers


MODEL = ROOT / "examples/model"


def answer_flags(files, *more):
    return [
        str(flag)
        for flag in (
            files.bench,
            "answer",
            "--model",
            MODEL,
            "--questions",
            files.where / "question.jsonl",
            "--out",
            files.where / "new/answers.jsonl",
            "--device",
            "cpu",
            *more,
        )
    ]


@pytest.fixture
def spoken(monkeypatch):
    """generate() replaced: every answer is "Yes N.", N counting up; out of order; requests are kept."""
    asked = []

    def generate(model, requests, stop_ids, **options):
        from data import ChatFormat

        asked.append(requests)
        for i in reversed(range(len(requests))):
            said = sum(map(len, asked[:-1])) + i
            yield (
                i,
                ChatFormat(MODEL).encode([f" Yes {said}.\n"])[0],
                "length" if said == 0 else "stop",
            )

    monkeypatch.setattr(evaluation, "generate", generate)
    return asked


def test_mt_bench_is_answered_in_two_turns_at_the_temperature_of_its_category(mt, spoken, capsys):
    from data import ChatFormat

    assert evaluation.main(answer_flags(mt, "--model-id", "mine")) == 0
    first, second = spoken
    assert [r.temperature for r in first] == [0.7, 0.0, 0.1] == [r.temperature for r in second]
    assert all(r.max_new_tokens == 1024 for r in first + second)
    assert len({r.number for r in first + second}) == 6 and [r.number for r in first] == [0, 1, 2]
    text = ChatFormat(MODEL).decode(second[1].prompt)
    assert "1+1?" in text and "Yes 1." in text and text.index("Yes 1.") < text.index("And plus 1?")
    rows = {row["question_id"]: row for row in rows_of(mt.where / "new/answers.jsonl")}
    assert list(rows[111]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert (
        rows[111]["choices"] == [{"index": 0, "turns": ["Yes 1.", "Yes 4."]}]
        and rows[111]["model_id"] == "mine"
    )
    assert len({row["answer_id"] for row in rows.values()}) == 3
    assert "3 of 3 questions answered by mine, 0 there before; 0 skipped" in (
        printed := capsys.readouterr().out
    )
    assert "1 turns cut at their limit" in printed
    assert re.search(
        "questions 1 to 3 of 3, turn 2: 3 of this process's 3 answers, .* tokens/s", printed
    )


def test_arena_hard_is_answered_greedily_with_the_number_of_tokens(arena, spoken):
    assert evaluation.main(answer_flags(arena)) == 0
    (requests,) = spoken
    assert all(r.temperature == 0 and r.max_new_tokens == 4096 for r in requests)
    rows = rows_of(arena.where / "new/answers.jsonl")
    (turn,) = rows[-1]["choices"][0]["turns"]
    from data import ChatFormat

    assert turn == {
        "content": "Yes 0.",
        "token_len": len(ChatFormat(MODEL).encode([" Yes 0.\n"])[0]),
    }
    assert {row["model_id"] for row in rows} == {"examples"}


def test_questions_that_are_answered_are_left_and_others_keep_their_random_stream(
    mt, spoken, capsys
):
    out = mt.where / "new/answers.jsonl"
    assert evaluation.main(answer_flags(mt)) == 0
    (kept,) = [row for row in rows_of(out) if row["question_id"] == 111]
    write(out, [kept])
    spoken.clear()
    assert evaluation.main(answer_flags(mt)) == 0
    assert [[r.number for r in requests] for requests in spoken] == [[0, 2], [3, 5]]
    assert rows_of(out)[0] == kept and len(rows_of(out)) == 3
    assert "2 of 3 questions answered by examples, 1 there before" in capsys.readouterr().out


def test_killed_in_a_first_turn_it_keeps_all_questions_but_those_at_once_and_goes_on(
    mt, spoken, monkeypatch
):
    monkeypatch.setattr(evaluation, "MT_BENCH", evaluation.MT_BENCH._replace(at_once=2))
    speak, tokens = evaluation.generate, []

    def generate(*arguments, cache_tokens, **options):
        if len(tokens) == 2:
            raise KeyboardInterrupt
        tokens.append(cache_tokens)
        return speak(*arguments, **options)

    monkeypatch.setattr(evaluation, "generate", generate)
    out = mt.where / "new/answers.jsonl"
    assert evaluation.main(answer_flags(mt, "--cache-tokens", "77")) == 130
    assert {row["question_id"] for row in rows_of(out)} == {81, 111} and tokens == [77, 77]
    monkeypatch.setattr(evaluation, "generate", speak)
    spoken.clear()
    assert evaluation.main(answer_flags(mt)) == 0
    assert [[r.number for r in requests] for requests in spoken] == [[2], [5]] and len(
        rows_of(out)
    ) == 3


def test_two_processes_answer_each_its_share_with_the_same_random_streams(mt, spoken, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert evaluation.main(answer_flags(mt)) == 0
    # The one that comes second finds an answer, and still takes the questions that are its own.
    assert [[r.number for r in requests] for requests in spoken] == [[1], [4], [0, 2], [3, 5]]
    assert {row["question_id"] for row in rows_of(mt.where / "new/answers.jsonl")} == {81, 111, 141}
    assert len(rows_of(mt.where / "new/answers.jsonl")) == 3


def test_a_prompt_without_room_is_skipped_and_counted(mt, capsys):
    lines = (mt.where / "question.jsonl").read_text().replace("And plus 1?", "more " * 3000)
    (mt.where / "question.jsonl").write_text(lines.replace("Write a line.", "much " * 3000))
    assert evaluation.main(answer_flags(mt)) == 0
    assert [row["question_id"] for row in rows_of(mt.where / "new/answers.jsonl")] == [141]
    assert (
        "1 of 3 questions answered by examples, 0 there before; 2 skipped"
        in capsys.readouterr().out
    )


def test_answers_of_other_weights_another_origin_or_to_other_questions_are_refused_and_kept(
    mt, spoken, capsys
):
    out, other = mt.where / "new/answers.jsonl", mt.where / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (other / name).symlink_to(MODEL / name)
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert evaluation.main(answer_flags(mt)) == 0
    before, asked = out.read_bytes(), len(spoken)
    for flags, said in (
        (["--model", other, "--model-id", "examples"], "made with model "),
        (["--model-id", "else"], "made with model_id examples, not else"),
        (["--seed", "1"], "made with seed 0, not 1"),
    ):
        assert said in complaint(capsys, evaluation.main(answer_flags(mt, *flags)))
    (mt.where / "question.jsonl").write_text(
        (mt.where / "question.jsonl").read_text().replace("line", "word")
    )
    assert "made with questions " in complaint(capsys, evaluation.main(answer_flags(mt)))
    out.with_name("answers.jsonl.json").unlink()
    assert "answers.jsonl.json is missing" in complaint(capsys, evaluation.main(answer_flags(mt)))
    assert out.read_bytes() == before and len(spoken) == asked
    write(out, answers({999: ["a", "b"]}, "examples"))
    assert f"{out}:1: question_id 999 is none" in complaint(
        capsys, evaluation.main(answer_flags(mt))
    )


def test_questions_that_cannot_be_asked_are_one_line(mt, spoken, tmp_path, capsys):
    save_model(tiny_model(), tmp_path / "small", dtype=torch.float32)
    (tmp_path / "small/tokenizer.json").symlink_to(MODEL / "tokenizer.json")
    error = complaint(capsys, evaluation.main(answer_flags(mt, "--model", tmp_path / "small")))
    assert (
        "question.jsonl:1: token id 5" in error
        and "is not below the model's vocab_size 97" in error
    )
    questions = (mt.where / "question.jsonl").read_text()
    for text, said in (
        (questions.replace('"stem"', '"cooking"'), ":3: category 'cooking'"),
        ("", "no question"),
        (questions.replace("And weight?", "\\ud800"), ":3: turns hold half a surrogate pair"),
    ):
        (mt.where / "question.jsonl").write_text(text)
        assert said in complaint(capsys, evaluation.main(answer_flags(mt)))
    assert spoken == []


def test_the_example_model_answers_and_is_judged_and_reported(either, serve, tmp_path, capsys):
    for file in ("question.jsonl",):
        text = (either.where / file).read_text()
        (either.where / file).write_text(
            text.replace('"category": "writing"', '"category": "coding"').replace(
                '"category": "stem"', '"category": "extraction"'
            )
        )
    if either.bench == "mt-bench":
        write(
            either.where / "references.jsonl",
            answers({81: ["x", "y"], 111: ["two", "three"]}, "gpt-4"),
        )
    assert evaluation.main(answer_flags(either, "--model-id", "tiny")) == 0
    either.answers = either.where / "new/answers.jsonl"
    assert len(rows_of(either.answers)) == 3
    before = either.answers.read_bytes()
    assert (
        evaluation.main(answer_flags(either, "--model-id", "tiny")) == 0
        and either.answers.read_bytes() == before
    )
    assert either.judge(serve(lambda payload, count: BOTH)) == 0
    capsys.readouterr()
    found, _ = report(
        capsys,
        tmp_path,
        either.bench,
        "report",
        "--judgments",
        either.out,
        "--questions",
        either.where / "question.jsonl",
    )
    score = next(iter(found["models"]["tiny"]["scores"].values()))["score"]
    assert (
        score == (7.0 if either.bench == "mt-bench" else 50.0)
        and found["models"]["tiny"]["missing"] == 0
    )
