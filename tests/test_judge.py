"""eval.py mt-bench and arena-hard: answers, and a judge on the loopback that misbehaves."""

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
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import judging
import pytest
from conftest import REAL, ROOT, needs_real, tiny_model
from judging import ANSWERS, CONFIG, KEY, NAMES, answers, complaint, edit, rows_of, run, write

import eval as evaluation
from data import ChatFormat
from evaluation import benchmarks, endpoint, judge
from support.export import save_model

BOTH = "Rating: [[7]], and [[A>B]]"  # either benchmark takes something from it
SOON = {"retry-after-ms": "1"}  # the client then waits a millisecond before the next try


def completion(content, finish="stop", **more):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content} | more
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]})


def refusal(message, **more):
    """An error's body, as OpenAI writes it."""
    return json.dumps({"error": {"message": message} | more}, indent=2)


class Endpoint(ThreadingHTTPServer):
    """A chat service. `says` is its reply: a text, (status, body, headers), None to drop the
    connection, or a function of the request that returns one of these. Keeps what it was asked:
    roles, texts, the user's first text, the other parameters, the key, and its number from 1."""

    def __init__(self):
        self.says, self.asked, self.lock = BOTH, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):  # a client that gave up
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        parameters = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        talk = [(message["role"], message["content"]) for message in parameters.pop("messages")]
        asked = SimpleNamespace(talk=talk, user=dict(talk[:2])["user"], parameters=parameters)
        asked.key, asked.time = self.headers["Authorization"], time.monotonic()
        with self.server.lock:
            self.server.asked.append(asked)
            asked.count = len(self.server.asked)
        says = self.server.says
        reply = says(asked) if callable(says) else says
        if reply is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, body, *headers = (200, completion(reply)) if isinstance(reply, str) else reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode())))
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


class Files(judging.Files):
    """A benchmark's files, and an endpoint that judges them."""

    def __init__(self, where, bench, service, capsys):
        where.mkdir(exist_ok=True)
        super().__init__(where, bench)
        self.service, self.asked, self.capsys = service, service.asked, capsys
        self.new_answers = where / "new/answers.jsonl"

    def says(self, says):
        self.service.says = says
        return self

    def only_first(self):
        write(self.answers, rows_of(self.answers)[:1])
        return self

    def command(self, *parts, code=0):
        """Runs eval.py; returns what it printed, or the one line on stderr of a failure."""
        self.capsys.readouterr()
        found = run(*parts)
        if code not in (0, 130):
            return complaint(self.capsys, found, code)
        printed = self.capsys.readouterr()
        assert found == code and KEY not in printed.out + printed.err, printed
        return printed.out

    def judge(self, *more, code=0, url=None):
        return self.command(*self.flags(url or self.service.url, *more), code=code)

    def refused(self, *more, **options):
        return self.judge(*more, **{"code": 2, **options})

    def answer(self, *more, code=0):
        """`answer` with the example model, to new_answers."""
        files = ("--model", MODEL, "--questions", self.questions, "--out", self.new_answers)
        return self.command(self.bench, "answer", *files, "--device", "cpu", *more, code=code)


@pytest.fixture
def service(monkeypatch):
    """An endpoint; the key is set, and no proxy is."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint() as service:
        yield service
        service.shutdown()


@pytest.fixture
def mt(tmp_path, service, capsys):
    return Files(tmp_path / "mt", "mt-bench", service, capsys)


@pytest.fixture
def arena(tmp_path, service, capsys):
    return Files(tmp_path / "arena", "arena-hard", service, capsys)


@pytest.fixture(params=["mt", "arena"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def one(mt):
    """MT-Bench with one answered question, which is two judgments."""
    return mt.only_first()


# ------------------------------------------------------------------------------- what is asked

MT_ASKED = """\
You are single-v1.|Q Write a line. A A line of text.
You are single-v1-multi-turn.|Q Write a line. A A line of text. Q Shorten it. A A line.
You are single-math-v1.|Q 1+1? R two A 2
You are single-math-v1-multi-turn.|R two three Q 1+1? And plus 1? A 2 3
You are single-v1.|Q What is {mass}? A Mass is {m}.
You are single-v1-multi-turn.|Q What is {mass}? A Mass is {m}. Q And weight? A A force."""


def test_mt_bench_asks_for_each_turn_with_its_categorys_prompt_and_writes_fastchats_rows(mt):
    mt.says("Good. Rating: [[8]]").judge()
    asked = sorted("|".join(text for _, text in asked.talk) for asked in mt.asked)
    assert asked == sorted(MT_ASKED.splitlines())
    for asked in mt.asked:
        assert [role for role, _ in asked.talk] == ["system", "user"]
        assert asked.parameters == {"model": "gpt-4", "temperature": 0, "max_tokens": 2048}
        assert asked.key == f"Bearer {KEY}"
    rows = {(row["question_id"], row["turn"]): row for row in rows_of(mt.out)}
    assert set(rows) == {(number, turn) for number in ANSWERS for turn in (1, 2)}
    row = rows[111, 2]
    assert list(row) == "question_id model judge user_prompt judgment score turn tstamp".split()
    assert (row["model"], row["judge"]) == ("mine", ["gpt-4", "single-math-v1-multi-turn"])
    assert row["judgment"] == "Good. Rating: [[8]]" and row["user_prompt"].startswith("R two three")


RATINGS = [("Rating: [[7]]", 7), ("[[8.5]]", 8.5), ("I say [6].", 6), ("[[4]] or [[5]]", 4)]
RATINGS += [("[3] at first, [[9]] in the end", 9), ("[[05]]", 5), (f"[[{'9' * 5000}]]", -1)]
RATINGS += [("none", -1), ("[[ten]] [[-3]]", -1), ("[[7/10]]", -1), ("[[6.]]", 6)]


@pytest.mark.parametrize(("said", "score"), RATINGS)
def test_a_rating_is_in_double_brackets_else_in_single_ones_else_minus_1(one, said, score):
    one.says(said).judge(code=1 if score == -1 else 0)  # 1: nothing was judged
    assert [row["score"] for row in rows_of(one.out)] == [score, score]


def test_arena_hard_plays_two_games_with_the_sides_swapped_as_its_configuration_says(arena):
    good = "[[B>A]], yes [[B>A]]"
    arena.says(lambda asked: "[[A>>B]] or so" if "A: mine" in asked.user else good)
    assert "baseline is gpt-4-0314" in arena.judge()
    sides = (("theirs", "mine"), ("mine", "theirs"))
    wanted = {f"Q: What is {q}?\nA: {a} of {q}\nB: {b} of {q}" for q in NAMES for a, b in sides}
    assert {asked.user for asked in arena.asked} == wanted
    for asked in arena.asked:
        assert asked.talk[0] == ("system", 'Judge "well".\nOr not.')
        assert asked.parameters == {"model": "gpt-4", "temperature": 0, "max_tokens": 77}
    for row in rows_of(arena.out):
        assert list(row) == ["question_id", "model", "judge", "games"] and row["judge"] == "gpt-4"
        assert [game["score"] for game in row["games"]] == ["B>A", "A>>B"]
        assert [list(game) for game in row["games"]] == [["user_prompt", "judgment", "score"]] * 2
        assert row["games"][0]["judgment"] == f"\n{good}"
        assert row["games"][0]["user_prompt"].endswith(f"\nB: mine of {row['question_id']}")


def test_a_flag_sets_the_limit_of_a_judgment(either):
    either.judge("--max-tokens", 55)
    assert {asked.parameters["max_tokens"] for asked in either.asked} == {55}


def test_arena_hard_asks_once_more_if_there_is_no_label_and_two_labels_are_none(arena):
    def says(asked):
        if "q1" in asked.user:
            return "cannot say" if len(asked.talk) == 2 else "well, [[A=B]]"
        return "cannot say" if "q2" in asked.user else "[[A>B]] no, [[B>A]]"

    arena.says(says).judge()
    games = {row["question_id"]: row["games"] for row in rows_of(arena.out)}
    assert [game["score"] for name in NAMES for game in games[name]] == ["A=B"] * 2 + [None] * 4
    assert games["q1"][0]["judgment"] == "\ncannot say\nwell, [[A=B]]"
    second = [asked.talk[2:] for asked in arena.asked if len(asked.talk) > 2]
    more = "continue your judgment and finish by outputting a final verdict label"
    assert second == [[("assistant", "cannot say"), ("user", more)]] * 4
    assert len(arena.asked) == 4 + 4 + 2


def test_the_configuration_is_read_in_any_form_that_yaml_has(arena):
    arena.config.write_text(
        "{temperature: 0.5, 'max_tokens': 0x10,\n system_prompt: 'it''s',\n"
        " prompt_template: ['{question_1} {answer_1} {answer_2}']}"
    )
    arena.judge()
    for asked in arena.asked:
        assert asked.parameters == {"model": "gpt-4", "temperature": 0.5, "max_tokens": 16}
        assert asked.talk[0] == ("system", "it's")


LIMIT, PATTERNS = "max_tokens: 77 # of a judgment", "\nregex_patterns: "
CONFIG_FAULTS = [
    (LIMIT, "", "max_tokens is None"),
    (LIMIT, "max_tokens: true", "max_tokens is True"),
    (LIMIT, "max_tokens: 0", "max_tokens is 0, wanted 1 or more"),
    ("temperature: 0", "temperature: [0]", "temperature is [0]"),
    ("temperature: 0", "temperature: .nan", "temperature is nan, wanted 0 or more"),
    ("temperature: 0", "temperature: -0.5", "temperature is -0.5, wanted 0 or more"),
    ("system_prompt: ", "system_prompt: 5 # ", "system_prompt is 5"),
    ("prompt_template: [", 'prompt_template: ["a", ', "prompt_template is ['a', "),
    ("prompt_template: [", "prompt_template: [5] # ", "prompt_template is 5"),
    ("prompt_template: [", "prompt_template: ['", "config.yaml"),  # a quote that stays open
    (CONFIG, "- a list", "config.yaml"),
    (CONFIG, "[" * 1500, "config.yaml"),
    (CONFIG, "a: \x00", "config.yaml"),
    ("{answer_2}", "{answer_9}", "prompt_template: wanted a text with fields among question_1"),
    ("{answer_2}", "{answer_2", "prompt_template: wanted a text with fields"),
    ("{answer_2}", "{answer_2:>99999999999}", "found a field with a format"),
    ("{answer_2}", "{answer_1}", "found none with answer_2|ANSWER_B"),
    (LIMIT, LIMIT + PATTERNS + "[a]", "regex_patterns: wanted one group"),
    (LIMIT, LIMIT + PATTERNS + "['(']", "config.yaml"),
    (LIMIT, LIMIT + PATTERNS + "7", "regex_patterns is 7"),
]


@pytest.mark.parametrize(("found", "changed", "said"), CONFIG_FAULTS)
def test_a_configuration_that_cannot_be_used_is_one_line(arena, found, changed, said):
    edit(arena.config, (found, changed))
    error = arena.refused()
    assert "config.yaml" in error and said in error and not arena.asked


@pytest.mark.parametrize(("package", "pip"), [("openai", "openai"), ("yaml", "pyyaml")])
def test_a_missing_package_is_one_line_with_the_pip_command(arena, monkeypatch, package, pip):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {pip}" in arena.refused()


# -------------------------------------------------- Arena-Hard as its repository has it now

PRESENT_CONFIG = r"""
temperature: 0.0
max_tokens: 4096
reference: null
regex_patterns: ['\[\[([AB<>=]+)\]\]', '\[([AB<>=]+)\]']
prompt_template: "Q: {QUESTION}\nA: {ANSWER_A}\nB: {ANSWER_B}"
"""


@pytest.fixture
def present(tmp_path, service, capsys):
    """Arena-Hard's files; questions, answers and configuration say the same as arena's."""
    present = Files(tmp_path / "present", "arena-hard", service, capsys)
    asked = [{"uid": q, "category": "arena-hard-v0.1", "prompt": f"What is {q}?"} for q in NAMES]
    write(present.questions, asked)
    for path, side in ((present.answers, "mine"), (present.baseline, "theirs")):
        rows = []
        for q in NAMES:
            messages = [{"role": "user", "content": f"What is {q}?"}]
            messages += [{"role": "assistant", "content": {"answer": f"{side} of {q}"}}]
            rows.append({"uid": q, "ans_id": "a", "model": side, "messages": messages})
        write(path, rows)
    present.config.write_text(PRESENT_CONFIG)
    return present


def test_arena_hard_is_judged_from_the_files_that_its_repository_has_now(arena, present):
    arena.judge()
    before = {asked.user for asked in arena.asked}
    present.asked.clear()
    assert "config.yaml has no system_prompt, so the judge gets none" in present.judge()
    assert {asked.user for asked in present.asked} == before
    assert {asked.talk[0][0] for asked in present.asked} == {"user"}
    rows = rows_of(present.out)
    assert {(row["question_id"], row["model"]) for row in rows} == {(q, "mine") for q in NAMES}
    present.command(*present.flags(""))  # nothing is left to judge
    present.out.unlink(), present.raw.unlink(), present.asked.clear()
    (present.where / "system.txt").write_text("Be fair.\n")
    present.judge("--system-prompt", present.where / "system.txt")
    assert {asked.talk[0] for asked in present.asked} == {("system", "Be fair.")}


PRESENT_LABELS = [("<think>[[A>B]]? Or rather [[B>A]].</think> It is [[A=B]]", "A=B")]
PRESENT_LABELS += [("My verdict: [[a>b]]", "A>B"), ("My verdict: [B>A]", "B>A")]
PRESENT_LABELS += [("[A>B] at first, [[B>>A]] in the end", "B>>A"), ("nothing", None)]


@pytest.mark.parametrize(("said", "label"), PRESENT_LABELS)
def test_in_its_present_form_the_last_label_of_the_first_pattern_counts(present, said, label):
    present.only_first().says(said).judge(code=0 if label else 1)
    assert len(present.asked) == 2
    assert [game["score"] for game in rows_of(present.out)[0]["games"]] == [label, label]


# ----------------------------------------------------------------------- real judgments again


@needs_real
def test_mt_benchs_real_prompts_and_scores_are_reproduced_to_the_letter(tmp_path, service, capsys):
    real, out, name = REAL / "mt_bench", tmp_path / "out.jsonl", "mamba_0_5_dpo_ep1"
    rows = rows_of(real / "model_judgment/gpt-4_single.jsonl")
    stored = [row for row in rows if row["model"] == name]
    said = {row["user_prompt"]: row["judgment"] for row in stored}
    service.says = lambda asked: said[asked.user]
    flags = ["--questions", real / "question.jsonl", "--out", out, "--judge-model", "gpt-4"]
    flags += ["--answers", real / f"model_answer/{name}.jsonl", "--endpoint", service.url]
    flags += ["--references", real / "reference_answer/gpt-4.jsonl"]
    assert run("mt-bench", "judge", *flags, "--prompts", real / "judge_prompts.jsonl") == 0
    ours, theirs = (
        {(row["question_id"], row["turn"]): row | {"tstamp": 0} for row in rows}
        for rows in (rows_of(out), stored)
    )
    assert ours == theirs and len(ours) == 160
    assert run("mt-bench", "report", "--judgments", out) == 0
    assert "| 7.121875 [" in capsys.readouterr().out


@needs_real
def test_arena_hards_real_prompts_and_labels_are_reproduced_to_the_letter(tmp_path, service):
    real, said, mine = REAL / "arena_hard", {}, {}
    (path,) = (real / "model_judgment/gpt-4-1106-preview").glob("*.jsonl")
    stored = {row["question_id"]: row for row in rows_of(path)}
    assert len(stored) == 193
    mark = "<|The {} of Assistant A's Answer|>"
    for number, row in stored.items():
        said |= {game["user_prompt"]: game["judgment"][1:] for game in row["games"]}
        text = row["games"][1]["user_prompt"].split(mark.format("Start") + "\n")[1]
        mine[number] = [{"content": text.split("\n" + mark.format("End"))[0], "token_len": 1}]
    model = next(iter(stored.values()))["model"]
    service.says = lambda asked: said[asked.user] if len(asked.talk) == 2 else "hm"
    flags = ["--questions", real / "question.jsonl", "--config", real / "judge_config.yaml"]
    flags += ["--answers", write(tmp_path / "a.jsonl", answers(mine, model))]
    flags += ["--baseline", real / "model_answer/gpt-4-0314.jsonl", "--endpoint", service.url]
    flags += ["--out", tmp_path / "out.jsonl", "--judge-model", "gpt-4-1106-preview"]
    assert run("arena-hard", "judge", *flags) == 0
    ours, theirs = (
        {
            row["question_id"]: [row["judge"], row["model"], *map(facts, row["games"])]
            for row in rows
        }
        for rows in (rows_of(tmp_path / "out.jsonl"), stored.values())
    )
    assert ours == theirs


def facts(game):
    return game["user_prompt"], game["score"]


# ---------------------------------------------------------------- an endpoint that misbehaves


@pytest.mark.parametrize("reply", [(429, "slow down", SOON), (500, "oh", SOON), (503, ""), None])
def test_what_may_pass_is_tried_again_and_every_raw_reply_is_kept(one, reply):
    one.says(lambda asked: reply if asked.count <= 2 else BOTH).judge()
    assert len(one.asked) == 4 and len(rows_of(one.out)) == 2
    refused, raw = [reply[:2]] * 2 if reply else [], rows_of(one.raw)
    assert [(row["status"], row["body"]) for row in raw] == refused + [(200, completion(BOTH))] * 2
    about = {key: raw[-1][key] for key in ("question_id", "model", "turn")}
    assert about == {"question_id": 81, "model": "mine", "turn": 2}


def test_a_request_without_an_answer_in_time_is_tried_again(one):
    one.says(lambda asked: (asked.count == 1 and time.sleep(0.6)) or BOTH)
    one.judge("--timeout", "0.2")
    assert len(one.asked) == 3 and len(rows_of(one.out)) == 2


def test_retry_after_is_waited_for(one):
    wait = (429, "", {"Retry-After": "1.2"})  # the client's own first wait is 0.5 s at most
    one.says(lambda asked: wait if asked.count == 1 else BOTH).judge()
    assert one.asked[1].time - one.asked[0].time >= 1.2


WITHOUT_TEXT = {
    "length": (completion(None, "length", reasoning_content="Hm"), "length (raise --max-tokens)"),
    "filter": (completion(None, "content_filter"), "finish_reason content_filter"),
    "blank": (completion(" \n"), "a reply without text, finish_reason stop"),
    "empty choices": ('{"choices": []}', 'no chat completion: {"choices": []}'),
    "a list": ("[]", "no chat completion"),
    "odd choices": ('{"choices": [5]}', "no chat completion"),
    "an error object": ('{"error": {"code": 502, "message": "Provider  fell"}}', "Provider fell"),
    "an error text": ('{"error": "x y"}', "the reply is an error: x y"),
    "not JSON": ("<html>", "the reply is no chat completion: <html>"),
    "deep": ("[" * 100_000, "no chat completion"),
    "stream": ('data: {"choices": []}\n\ndata: [DONE]\n\n', "no chat completion: data: {"),
    "only thoughts": (completion([{"type": "thinking", "thinking": "hm"}]), "without text"),
    "thoughts that were cut": (
        completion("<think>\nMaybe [[A>>B]], [[5]]? First", "length"),
        "a reply without text, finish_reason length (raise --max-tokens)",
    ),
    "broken off": (
        completion("nums[1] or [[3]], so", "error"),
        "that broke off, finish_reason err",
    ),
    "filtered half-way": (completion("[[3]]", "content_filter"), "that broke off"),
    "no content": (
        completion("").replace('"content": ""', '"x": 0'),
        "without text, finish_reason",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_a_reply_without_text_is_one_request_counted_under_its_reason(one, kind):
    body, reason = WITHOUT_TEXT[kind]
    error = one.says((200, body)).refused(code=1)  # 1: nothing was judged
    assert len(one.asked) == 2 and reason in error and "2 failed (2 x " in error
    assert [row["body"] for row in rows_of(one.raw)] == [body] * 2
    one.says(BOTH).judge()
    assert len(one.asked) == 4  # asked for again by the next run


def test_the_parts_of_a_reply_are_joined_without_its_thoughts(one):
    thought = {"type": "thinking", "text": "[[1]]", "thinking": [{"type": "text", "text": "[2]"}]}
    texts = [{"type": "text", "text": "Rating:"}, {"type": "text", "text": " [[8]]"}]
    one.says((200, completion([thought, *texts]))).judge()
    assert [row["judgment"] for row in rows_of(one.out)] == ["Rating: [[8]]"] * 2


THOUGHTS = [
    "<think>It wants [[rating]], as in [[5]] or [[A>>B]].</think>\n\n",
    "\n<think>Is it </think>? [[5]], [[A>>B]]</think>",
    "Okay, for example [[5]] or [[A>>B]].\n</think>",  # begun by the template
]


@pytest.mark.parametrize("thoughts", THOUGHTS)
def test_a_verdict_is_not_taken_from_thoughts_in_the_text(either, thoughts):
    either.says(f"{thoughts}{BOTH}").judge()
    for row in rows_of(either.out):
        games = row.get("games", [row])
        assert {game["score"] for game in games} == {7 if either.mt else "A>B"}
        assert {game["judgment"].strip() for game in games} == {BOTH}


def test_a_judge_may_speak_of_the_marks_of_thoughts(one):
    said = f"It shows its <think> and </think> marks. {BOTH}"
    one.says(said).judge()
    assert [row["judgment"] for row in rows_of(one.out)] == [said] * 2


@pytest.mark.parametrize("text, score", [("nums[1] is the smallest", -1), ("[1], so [[7]]. A", 7)])
def test_in_a_reply_that_was_cut_only_double_brackets_are_a_verdict(one, text, score):
    one.says((200, completion(text, "length"))).judge(code=1 if score == -1 else 0)
    assert [row["score"] for row in rows_of(one.out)] == [score] * 2
    one.out.unlink()
    one.says(None).judge(code=1 if score == -1 else 0)  # the same from what was kept
    assert [row["score"] for row in rows_of(one.out)] == [score] * 2


def test_the_first_jobs_that_fail_alike_end_the_run(mt, monkeypatch):
    monkeypatch.setattr(judge, "GIVE_UP", 3)
    mt.says(lambda asked: (400, refusal(f"request {asked.count}0 is not allowed")))
    said = mt.refused("--concurrency", 1, code=1)
    assert "6 failed (3 x HTTP 400: request 10 is not allowed; 3 x not asked, since" in said
    assert len(mt.asked) == 3
    mt.says(lambda asked: BOTH if asked.count == 4 else (400, refusal("no")))
    mt.judge("--concurrency", 1)
    assert len(mt.asked) == 9  # one was judged: the others are asked
    mt.judge("--concurrency", 1)
    assert len(mt.asked) == 14  # also by the next run, which it would never reach otherwise


NO_MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
NO_MAX_TOKENS += "'max_completion_tokens' instead."
NO_TEMPERATURE = "Unsupported value: 'temperature' does not support 0.0 with this model."


def newer(asked):
    """A model that accepts neither max_tokens nor a temperature."""
    if "max_tokens" in asked.parameters:
        return 400, refusal(NO_MAX_TOKENS, code="unsupported_parameter")
    return (400, refusal(NO_TEMPERATURE)) if "temperature" in asked.parameters else BOTH


def test_parameters_that_the_endpoint_refuses_are_replaced_once_and_for_all(mt):
    printed = mt.says(newer).judge()
    assert 'now sent: {"max_completion_tokens": 2048}' in printed and len(rows_of(mt.out)) == 6
    sent = [asked.parameters.keys() - {"model"} for asked in mt.asked]
    assert sent[:2] == [{"temperature", "max_tokens"}, {"temperature", "max_completion_tokens"}]
    assert sent[2:] == [{"max_completion_tokens"}] * 6
    assert {asked.parameters["max_completion_tokens"] for asked in mt.asked[1:]} == {2048}
    mt.out.unlink()
    mt.judge()
    assert len(mt.asked) == 8  # kept replies, asked in other words


REFUSED = [(400, f"flagged\n by {KEY}", 1), (403, f"flagged\n by {KEY}", 1)]
REFUSED += [(400, "flagged: 'what temperature'", 2)]  # asked again without a temperature, in vain
# As DeepSeek words it: the parameter is right, its value is not.
REFUSED += [(400, "flagged: the valid range of max_tokens is [1, 8192]", 1)]


@pytest.mark.parametrize(
    "words, other",
    [
        ("Unsupported parameter: 'max_tokens'", True),
        ("'max_tokens' is deprecated; use 'max_completion_tokens'", True),
        ("the valid range of max_tokens is [1, 8192]; lower it instead", False),
    ],
)
def test_max_tokens_is_renamed_only_if_the_name_is_refused(words, other):
    found = endpoint.other_parameters({"max_tokens": 5}, words)
    assert found == ({"max_completion_tokens": 5} if other else {"max_tokens": 5})


@pytest.mark.parametrize(("status", "words", "requests"), REFUSED)
def test_a_refusal_of_one_question_is_its_own_failure_only(mt, status, words, requests):
    mt.says(lambda asked: (status, refusal(words, code=status)) if "1+1" in asked.user else BOTH)
    printed = mt.judge("--concurrency", 1)
    said = f"4 judgments of mine by gpt-4, 0 there before, 2 failed (2 x HTTP {status}: flagged"
    assert said in printed and len(rows_of(mt.out)) == 4
    good = [asked.parameters for asked in mt.asked if "1+1" not in asked.user]
    assert len(good) == 4 and all(parameters["temperature"] == 0 for parameters in good)
    assert len(mt.asked) == 4 + 2 * requests


def test_after_its_tries_a_judgment_is_a_counted_failure_that_the_next_run_tries_again(either):
    bad, failures, made = ("1+1", 2, 4) if either.mt else ("q2", 1, 2)
    either.says(lambda asked: (500, "", SOON) if bad in asked.user else BOTH)
    assert f"{failures} failed ({failures} x HTTP 500)" in either.judge("--tries", 4)
    assert sum(bad in asked.user for asked in either.asked) == 4 * failures
    assert len(rows_of(either.out)) == made
    before = len(either.asked)
    assert f"{made} there before, 0 failed" in either.says(BOTH).judge()
    assert len(either.asked) - before == 2 and len(rows_of(either.out)) == made + failures
    flags = either.flags("")  # nothing is left: it needs no endpoint, and no key
    said = f"{made + failures} there before, none left"
    assert said in either.command(*flags, "--key-variable", "NONE")
    either.out.write_text("")
    assert "--endpoint: wanted a plain" in either.command(*flags, code=2)


STOPS = [
    (401, f"no such key {KEY}", "HTTP 401: no such key [key]"),
    (402, refusal("pay"), "HTTP 402: pay"),
    (404, refusal("no such model"), "HTTP 404: no such model"),
    (429, refusal("Your quota is used up.", code="insufficient_quota"), "Your quota is used up."),
    (403, refusal("broke", code="insufficient_user_quota"), "HTTP 403: broke"),
    (429, refusal("see billing", type="billing_not_active"), "HTTP 429: see billing"),
    (200, '{"error": {"code": 402, "message": "Insufficient credits"}}', "Insufficient credits"),
    (400, refusal("Your credit balance is too low", type="invalid_request_error"), "too low"),
    (403, refusal("Key limit exceeded (total limit).", code=403), "HTTP 403: Key limit exceeded"),
    (400, f"[{refusal('API key not valid.', code=400)}]", "HTTP 400: API key not valid."),
]


@pytest.mark.parametrize(("status", "body", "said"), STOPS)
def test_what_every_request_would_get_stops_the_run_and_what_is_there_stays(
    either, status, body, said
):
    assert said in either.says((status, body)).refused()
    assert len(either.asked) == 1  # whatever the concurrency: the first request goes first
    either.says(lambda asked: BOTH if asked.count <= 4 else (status, body))
    assert said in either.refused("--concurrency", 1)
    assert len(either.asked) == len(rows_of(either.raw)) == 5
    assert len(rows_of(either.out)) == (3 if either.mt else 1)


def test_when_a_run_stops_a_request_that_waits_for_its_next_try_is_not_sent(mt):
    def says(asked):
        if "1+1" in asked.user:
            return 500, ""  # tried again after 0.4 s or more
        return BOTH if asked.count == 1 else time.sleep(0.2) or (401, "no")

    assert "HTTP 401" in mt.says(says).refused("--concurrency", 3)
    assert set(Counter(asked.user for asked in mt.asked).values()) == {1}
    assert len(rows_of(mt.raw)) == len(mt.asked)


def test_an_endpoints_words_cannot_move_the_terminals_cursor():
    body = json.dumps({"error": {"message": "no\x1b[2J\nsuch  model"}})
    assert endpoint.words(body) == "no [2J such model" and endpoint.words("a\x07b") == "a b"


def test_a_redirect_is_refused_and_the_key_is_not_sent_on(mt):
    with Endpoint() as other:
        to = {"Location": other.url + "/chat/completions"}
        assert "HTTP 307" in mt.says((307, "", to)).refused()
        other.shutdown()
    assert other.asked == [] and len(mt.asked) == 1


def test_no_more_requests_than_concurrency_are_under_way(mt):
    now, most = [], []

    def says(asked):
        now.append(asked)
        most.append(len(now))
        time.sleep(0.1)
        now.remove(asked)
        return BOTH

    mt.says(says).judge("--concurrency", "3")
    assert max(most) == 3


def test_the_key_appears_nowhere_even_if_the_endpoint_quotes_it(either):
    quoted, bad = (200, completion(f"{BOTH} {KEY}")), (500, f"bad key {KEY}", SOON)
    either.says(lambda asked: quoted if asked.count % 3 else bad).judge()
    either.says(BOTH).judge()
    for path in either.where.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


def test_a_key_is_hidden_in_every_form_that_json_gives_it():
    for body in ("sk/abc/defghij", r"sk\/abc\/defghij"):
        assert endpoint.hide(f'"{body}"', "sk/abc/defghij") == '"[key]"'
    assert endpoint.hide("a key", "key") == "a key"  # too short to be a secret


def test_a_word_in_the_place_of_a_key_changes_no_reply(mt, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    mt.says("a fair answer [[7]]").judge()
    assert {row["judgment"] for row in rows_of(mt.out)} == {"a fair answer [[7]]"}


def test_a_full_disk_stops_the_run_with_one_line_and_what_is_there_stays(mt):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # bytes of a file
    try:
        assert "File too large" in mt.refused("--concurrency", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = mt.out.read_bytes().count(b"\n")
    assert 0 < kept <= len(mt.asked) < 6
    mt.judge()
    assert len(rows_of(mt.out)) == 6 and len(mt.asked) <= 7  # one reply found no room


IMPOSSIBLE = ["--tries 0", "--concurrency 0", "--timeout 0", "--timeout nan", "--tries many"]


@pytest.mark.parametrize("flags", [*IMPOSSIBLE, "--max-tokens 0"])
def test_impossible_numbers_are_refused_before_anything_is_asked(mt, flags):
    flag, value = flags.split()
    assert f"{flag}: found {value}, wanted" in mt.refused(flag, value) and mt.asked == []


def test_a_key_that_is_missing_or_that_no_header_can_hold_is_refused_unshown(mt, monkeypatch):
    said = "OPENAI_API_KEY (--key-variable) holds no key"
    for key in (f"{KEY}\n{KEY}", f"{KEY} {KEY}", f"{KEY}é", ""):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert said in mt.refused()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert said in mt.refused() and mt.asked == []
    monkeypatch.setenv("MY_KEY", "another")
    mt.judge("--key-variable", "MY_KEY")
    assert {asked.key for asked in mt.asked} == {"Bearer another"}


ODD_ADDRESSES = ["ftp://127.0.0.1/v1", "127.0.0.1:80", f"http://me:{KEY}@127.0.0.1/v1", "https://"]
ODD_ADDRESSES += ["http://[1/v1", "http://a:b/v1", "http://127.0.0.1:99999/v1", "http://a..b/v1"]
ODD_ADDRESSES += [f"http://127.0.0.1/v1?key={KEY}"]


def test_an_unreachable_endpoint_is_one_line_and_nothing_is_lost(either):
    either.says(lambda asked: (400, "") if asked.count > 3 else BOTH).judge()
    before = either.out.read_bytes(), either.raw.read_bytes()
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        for host in (f"127.0.0.1:{taken.getsockname()[1]}", "no-such-host.invalid"):
            assert "not reachable" in either.refused(url=f"http://{host}/v1")
    for url in ODD_ADDRESSES:
        assert "--endpoint" in either.refused(url=url)
    assert before == (either.out.read_bytes(), either.raw.read_bytes())


# ------------------------------------------------------------------------------------ resuming


def test_an_arena_hard_game_that_was_judged_is_not_paid_for_again_if_the_other_one_fails(arena):
    arena.says(lambda asked: (500, "", SOON) if "A: mine" in asked.user else BOTH)
    assert "3 failed" in arena.refused(code=1)
    assert arena.out.read_text() == "" and len(arena.asked) == 3 + 3 * 3
    arena.says(BOTH).judge()
    assert len(rows_of(arena.out)) == 3
    assert ["A: mine" in asked.user for asked in arena.asked[12:]] == [True] * 3


def test_interrupted_it_keeps_every_reply_and_the_next_run_asks_only_for_what_is_missing(either):
    either.says(lambda asked: time.sleep(0.3 if asked.count > 2 else 0) or BOTH)
    flags = map(str, either.flags(either.service.url, "--concurrency", "2"))
    command, pipe = [sys.executable, str(ROOT / "eval.py"), *flags], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    while len(either.asked) < 3:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopping" in err and KEY not in out + err
    asked = len(either.asked)
    assert asked < 6 and len(rows_of(either.raw)) == asked
    assert not either.mt or len(rows_of(either.out)) == asked
    either.judge()
    assert set(Counter(str(asked.talk) for asked in either.asked).values()) == {1}
    assert len(either.asked) == 6 and len(rows_of(either.out)) == (6 if either.mt else 3)


def test_a_model_is_not_judged_against_its_own_file_of_answers(arena):
    arena.baseline.unlink()
    arena.baseline.symlink_to(arena.answers)
    assert "both --baseline and --answers" in arena.refused() and not arena.asked


def test_judgments_without_a_verdict_are_counted_and_asked_again_if_rows_are_deleted(either):
    """As of a judge that always runs into its limit of tokens."""
    said = either.says("Both are good, so").refused(code=1)
    rows = len(rows_of(either.out))
    assert f"0 failed; {rows} rows have no verdict (was --max-tokens" in said and rows in (3, 6)
    asked = len(either.asked)
    assert "none left to make" in either.says(BOTH).judge() and len(either.asked) == asked
    kept = either.out.read_bytes().splitlines(keepends=True)[0]
    either.out.write_bytes(kept)
    assert "no verdict" not in either.judge("--max-tokens", 4000)
    assert len(rows_of(either.out)) == rows


def test_a_row_that_was_cut_short_is_dropped_with_a_word_and_a_missing_newline_is_mended(mt):
    mt.judge()
    whole, raw = mt.out.read_bytes(), mt.raw.read_bytes()
    mt.out.write_bytes(whole[:-20])
    assert f"{mt.out}: dropped its last row" in mt.judge()
    assert len(rows_of(mt.out)) == 6 and len(mt.asked) == 6  # from the raw replies
    mt.out.write_bytes(whole[:-1])
    mt.judge()
    assert mt.out.read_bytes() == whole
    mt.out.unlink()
    mt.raw.write_bytes(raw[:-20])
    mt.judge()
    assert len(rows_of(mt.out)) == 6 and len(mt.asked) == 7  # one reply was lost


def test_a_file_that_is_not_ours_is_not_touched(mt):
    mt.out.parent.mkdir()
    for text, said in (("my notes", "its last line is not a row"), ("my notes\n", ":1: not JSON")):
        mt.out.write_text(text)
        error = mt.refused()
        assert f"{mt.out}" in error and said in error and mt.out.read_text() == text


def test_judgments_of_another_judge_or_of_other_answers_are_refused_before_asking(either):
    either.judge()
    before, asked = either.out.read_bytes(), len(either.asked)
    error = either.refused("--judge-model", "gpt-5")
    assert f"{either.out}:1: judged by 'gpt-4', wanted 'gpt-5'" in error
    edit(either.answers, ("A line.", "Another.") if either.mt else ("mine of q2", "new"))
    said = f"judges another answer of mine to question {81 if either.mt else 'q2'} than --answers"
    assert said in either.refused()
    assert either.out.read_bytes() == before and len(either.asked) == asked


def test_one_judgments_file_holds_several_models(either):
    either.judge()
    changed = ("A line", "My line") if either.mt else ("mine of", "other of")
    edit(either.answers, ('"mine"', '"other"'), changed)
    either.judge()
    assert {row["model"] for row in rows_of(either.out)} == {"mine", "other"}


MALFORMED = [
    ("question.jsonl", "{", ":2: not JSON"),
    ("question.jsonl", '{"question_id": FIRST, "category": "math", "turns": TURNS}', "there twice"),
    ("answers.jsonl", "[]", "is missing; wanted a JSON object"),
    ("answers.jsonl", "{}", "wanted a JSON object with question_id, model_id, choices"),
    ("answers.jsonl", "ANSWER 999 mine []", "question_id 999 is not one of"),
    ("answers.jsonl", "ANSWER [] mine []", "question_id [] is not one of"),
    ("answers.jsonl", "ANSWER FIRST you []", "wanted one model"),
    ("answers.jsonl", 'ANSWER FIRST mine [{"turns":TURNS}]', "is answered twice"),
    ("answers.jsonl", "ANSWER SECOND mine []", ":2: wanted turns with"),
    ("answers.jsonl", 'ANSWER SECOND mine [{"turns":[1,2]}]', "wanted turns"),
    ("answers.jsonl", 'ANSWER SECOND mine [{"turns":HALVES}]', "half a surrogate pair"),
    ("answers.jsonl", '{"question_id": SECOND, "model_id": "", "choices": []}', ":2: model_id ''"),
    ("answers.jsonl", '{"question_id": SECOND, "model_id": null, "choices": 0}', "model_id None"),
    ("judged/out.jsonl", '{"question_id": FIRST', "not JSON"),
    ("judged/out.jsonl", '{"question_id": FIRST, "model": "mine"}', "wanted a JSON object with"),
]


@pytest.mark.parametrize(("file", "line", "wanted"), MALFORMED)
def test_malformed_lines_are_named_by_file_and_line(either, file, line, wanted):
    path = either.where / file
    if path == either.out:
        either.judge()
    if line.startswith("ANSWER"):
        _, number, model, choices = line.split()
        line = f'{{"question_id": {number}, "model_id": "{model}", "choices": {choices}}}'
    first, second = ("81", "111") if either.mt else ('"q1"', '"q2"')
    turns = '["a", "b"]' if either.mt else '[{"content": "a"}]'
    line = line.replace("HALVES", turns.replace('"a"', r'"\ud800"'))
    lines = path.read_text().splitlines()
    lines[1] = line.replace("FIRST", first).replace("SECOND", second).replace("TURNS", turns)
    path.write_text("\n".join(lines) + "\n")
    asked, error = len(either.asked), either.refused()
    assert f"{path}:2: " in error and wanted in error and len(either.asked) == asked


def test_what_is_missing_from_the_benchmarks_files_is_named(mt, arena):
    write(mt.references, [])
    assert "no answer to question 111; wanted one, since it is math" in mt.refused()
    write(mt.references, answers({111: ["two", "three"]}))
    write(mt.prompts, [{"name": "pair-v2", "system_prompt": "", "prompt_template": ""}])
    assert "no prompt single-v1" in mt.refused()
    mt.prompts.unlink()
    assert "prompts.jsonl" in mt.refused()
    write(mt.answers, [])
    assert "answers.jsonl: no answer in it" in mt.refused()
    write(arena.baseline, [])
    assert "no answer to question q1" in arena.refused() and not mt.asked


def test_prompts_that_cannot_be_used_are_named(mt):
    prompts = rows_of(mt.prompts)
    for row, said in (
        (prompts[0], ":5: a second prompt 'single-v1'"),
        (prompts[0] | {"system_prompt": 5}, ":5: system_prompt 5, wanted a text"),
    ):
        write(mt.prompts, [*prompts, row])
        assert said in mt.refused()
    for i, fault, said in (
        (0, "{question}", ": single-v1: wanted a text with fields"),
        (0, "{answer!r}", "found a field with a format"),
        (2, "{answer_1}", ": single-v1-multi-turn: wanted"),
    ):
        changed = prompts[i] | {"prompt_template": fault}
        write(mt.prompts, [*prompts[:i], changed, *prompts[i + 1 :]])
        assert said in mt.refused() and not mt.asked


def test_questions_without_an_answer_are_counted_and_not_asked_about(either):
    assert "1 of 3 questions have an answer" in either.only_first().judge()
    assert len(either.asked) == 2


# ------------------------------------------------------------------------------------- answers

MODEL = ROOT / "examples/model"


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


def numbers(spoken):
    return [[request.number for request in requests] for requests in spoken]


def ids_of(path):
    return [row["question_id"] for row in rows_of(path)]


def test_mt_bench_is_answered_in_two_turns_at_the_temperature_of_its_category(mt, spoken):
    printed = mt.answer("--model-id", "mine")
    first, second = spoken
    assert [r.temperature for r in first] == [0.7, 0.0, 0.1] == [r.temperature for r in second]
    assert all(r.max_new_tokens == 1024 for r in first + second)
    assert numbers(spoken) == [[0, 1, 2], [3, 4, 5]]
    text = ChatFormat(MODEL).decode(second[1].prompt)
    assert "1+1?" in text and "Yes 1." in text and text.index("Yes 1.") < text.index("And plus 1?")
    rows = {row["question_id"]: row for row in rows_of(mt.new_answers)}
    assert list(rows[111]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert rows[111]["choices"] == [{"index": 0, "turns": ["Yes 1.", "Yes 4."]}]
    assert {row["model_id"] for row in rows.values()} == {"mine"}
    assert len({row["answer_id"] for row in rows.values()}) == 3
    assert "3 of 3 questions answered by mine, 0 there before; 0 skipped" in printed
    assert "1 turns cut at their limit" in printed
    said = "questions 1 to 3 of 3, turn 2: 3 of this process's 3 answers, .* tokens/s"
    assert re.search(said, printed)


def test_the_temperatures_are_fastchats():
    wanted = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0)
    wanted |= dict(coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)
    assert benchmarks.MT_BENCH.temperatures == wanted


@pytest.mark.parametrize("form", ["arena", "present"])
def test_arena_hard_is_answered_greedily_with_the_number_of_tokens(form, spoken, request):
    arena = request.getfixturevalue(form)
    arena.answer()
    (requests,) = spoken
    assert all(r.temperature == 0 and r.max_new_tokens == 4096 for r in requests)
    assert "What is q2?" in ChatFormat(MODEL).decode(requests[1].prompt)
    rows = rows_of(arena.new_answers)
    count = len(ChatFormat(MODEL).encode([" Yes 0.\n"])[0])
    assert rows[0]["choices"][0]["turns"] == [{"content": "Yes 0.", "token_len": count}]
    assert [row["question_id"] for row in rows] == list(NAMES)
    assert {row["model_id"] for row in rows} == {"examples"}


def test_questions_that_are_answered_are_left_and_others_keep_their_random_stream(mt, spoken):
    out = mt.new_answers
    mt.answer()
    (kept,) = [row for row in rows_of(out) if row["question_id"] == 111]
    write(out, [kept])
    spoken.clear()
    assert "2 of 3 questions answered by examples, 1 there before" in mt.answer()
    assert numbers(spoken) == [[0, 2], [3, 5]]
    assert rows_of(out)[1] == kept and len(rows_of(out)) == 3


def test_killed_in_a_first_turn_it_keeps_all_but_those_at_once_and_resumes(mt, spoken, monkeypatch):
    for module in (evaluation, benchmarks):
        monkeypatch.setattr(module, "MT_BENCH", benchmarks.MT_BENCH._replace(at_once=2))
    speak, tokens = benchmarks.generate, []

    def generate(*arguments, cache_tokens, **options):
        if len(tokens) == 2:
            raise KeyboardInterrupt
        tokens.append(cache_tokens)
        return speak(*arguments, **options)

    monkeypatch.setattr(benchmarks, "generate", generate)
    mt.answer("--cache-tokens", "77", code=130)
    assert tokens == [77, 77]
    monkeypatch.setattr(benchmarks, "generate", speak)
    spoken.clear()
    mt.answer()
    assert numbers(spoken) == [[2], [5]]
    assert ids_of(mt.new_answers) == [81, 111, 141]


def test_two_processes_answer_each_its_share_with_the_same_random_streams(mt, spoken, monkeypatch):
    monkeypatch.setattr(benchmarks.rows, "torchrun_group", nullcontext)  # one after the other
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        mt.answer()
    # The one that comes second finds an answer, and still takes the questions that are its own.
    assert numbers(spoken) == [[1], [4], [0, 2], [3, 5]]
    assert ids_of(mt.new_answers) == [81, 111, 141]


def test_a_prompt_without_room_is_skipped_and_counted(mt):
    edit(mt.questions, ("And plus 1?", "more " * 3000), ("Write a line.", "much " * 3000))
    assert "1 of 3 questions answered by examples, 0 there before; 2 skipped" in mt.answer()
    assert ids_of(mt.new_answers) == [141]


def test_answers_of_other_weights_or_to_other_questions_are_refused_and_kept(mt, spoken):
    out, other = mt.new_answers, mt.where / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (other / name).symlink_to(MODEL / name)
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    mt.answer()
    before, asked = out.read_bytes(), len(spoken)
    for flags, said in (
        (["--model", other, "--model-id", "examples"], "made with model "),
        (["--model-id", "else"], "made with model_id examples, not else"),
        (["--seed", "1"], "made with seed 0, not 1"),
    ):
        assert said in mt.answer(*flags, code=2)
    edit(mt.questions, ("line", "word"))
    assert "made with questions " in mt.answer(code=2)
    out.with_name("answers.jsonl.json").unlink()
    assert "answers.jsonl.json is missing" in mt.answer(code=2)
    assert out.read_bytes() == before and len(spoken) == asked
    mt.answer("--model", other, "--out", mt.where / "b.jsonl")
    assert {row["model_id"] for row in rows_of(mt.where / "b.jsonl")} == {"other"}
    write(out, answers({999: ["a", "b"]}, "examples"))
    assert f"{out}:1: question_id 999 is" in mt.answer(code=2)


def test_questions_that_cannot_be_asked_are_one_line(mt, spoken, tmp_path):
    save_model(tiny_model(), tmp_path / "small")
    (tmp_path / "small/tokenizer.json").symlink_to(MODEL / "tokenizer.json")
    error = mt.answer("--model", tmp_path / "small", code=2)
    assert "question.jsonl:1: token id 5" in error
    assert "is not below the model's vocab_size 97" in error
    questions = mt.questions.read_text()
    for text, said in (
        (questions.replace('"stem"', '"cooking"'), ":3: category 'cooking'"),
        ("", "no question"),
        (questions.replace("And weight?", "\\ud800"), ":3: turns hold half a surrogate pair"),
        (questions.replace("And weight?", " "), ":3: a turn is empty"),
    ):
        mt.questions.write_text(text)
        assert said in mt.answer(code=2)
    assert spoken == []


def test_the_example_model_answers_and_is_judged_and_reported(either, tmp_path):
    if either.mt:  # all greedy
        edit(either.questions, ('"writing"', '"coding"'), ('"stem"', '"extraction"'))
        write(either.references, answers({81: ["x", "y"], 111: ["two", "three"]}, "gpt-4"))
    either.answer("--model-id", "tiny")
    either.answers = either.new_answers
    before = either.answers.read_bytes()
    assert len(rows_of(either.answers)) == 3
    either.answer("--model-id", "tiny")
    assert either.answers.read_bytes() == before
    either.judge()
    files = ["--judgments", either.out, "--questions", either.questions]
    run(either.bench, "report", *files, "--json", tmp_path / "report.json")
    (of_model,) = json.loads((tmp_path / "report.json").read_text())["models"].values()
    score = next(iter(of_model["scores"].values()))["score"]
    assert score == (7.0 if either.mt else 50.0) and of_model["missing"] == 0
