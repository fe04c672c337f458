""" """

import argparse
import email.utils
import functools
import hashlib
import http.client
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from evaluation.benchmarks import ARENA_HARD, MT_BENCH, Bench, read_answers, read_questions
from evaluation.rows import append_row, between, json_rows, locked
from support.files import InputError

MT_WITH_REFERENCE = ("math", "reasoning", "coding")


MT_MAX_TOKENS = 2048  # of a judgment, at temperature 0; Arena-Hard's configuration says both itself


RATINGS = [
    r"\[\[(\d{1,9}(?:\.\d*)?)\]\]",
    r"\[(\d{1,9}(?:\.\d*)?)\]",
]  # the second where the first finds none


LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")


SECOND_TRY = "continue your judgment and finish by outputting a final verdict label"


LONGEST_WAIT = 60.0  # seconds between two tries, unless the endpoint asks for more


HOPELESS = (
    401,
    402,
    403,
    404,
)  # HTTP statuses that all requests would get: key, money, right, address or model


class Judge(NamedTuple):
    """An OpenAI-compatible endpoint, and how patiently it is asked."""

    url: str
    model: str
    key: str
    temperature: float
    max_tokens: int
    timeout: float  # seconds
    tries: int
    wait: float  # seconds after the first failed try, twice as many after each further one
    raw: Path  # every reply, as it came
    kept: dict[str, str]  # digest of a request -> reply, from `raw`
    opener: urllib.request.OpenerDirector
    stop: threading.Event


class UnjudgedError(Exception):
    """A question that the endpoint did not judge, and why. The next run asks again."""


def open_judge(flags: argparse.Namespace, temperature: float, max_tokens: int) -> Judge:
    """Checks key and endpoint before anything is asked: InputError where one is missing."""
    key = os.environ.get(flags.key_variable, "").strip()
    if not re.fullmatch(
        r"https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[^\s@?#]*)?", flags.endpoint, re.ASCII | re.I
    ):
        raise InputError(
            "--endpoint: wanted a plain http:// or https:// address, such as https://api.openai.com/v1"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"environment variable {flags.key_variable} (--key-variable) is "
            f"{'not a key' if key else 'not set'}; wanted the endpoint's key in it, or any word for an "
            "endpoint that needs none"
        )
    address = flags.endpoint.rstrip("/")
    address += "" if address.endswith("/chat/completions") else "/chat/completions"
    opener = (
        urllib.request.OpenerDirector()
    )  # without urllib's redirects, which would carry the key to another host
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
    ):
        opener.add_handler(handler())
    try:
        opener.open(
            address, timeout=min(flags.timeout, 10)
        ).close()  # GET, without the key: any status will do
    except (
        urllib.error.URLError,
        ValueError,
        OverflowError,
    ) as error:  # the latter two of odd hosts and ports
        raise InputError(
            f"--endpoint {flags.endpoint}: not reachable ({getattr(error, 'reason', error)})"
        ) from None
    except (OSError, http.client.HTTPException):
        pass  # it was reached; the requests themselves are tried again
    raw = Path(f"{flags.out}.raw")
    with locked(raw):  # mended, made
        pass
    kept = {
        row["request"]: reply
        for _, row in json_rows(raw, "request", "body")
        if (reply := reply_of(row["body"]))
    }
    return Judge(
        address,
        flags.judge_model,
        key,
        temperature,
        max_tokens,
        flags.timeout,
        flags.tries,
        flags.wait,
        raw,
        kept,
        opener,
        threading.Event(),
    )


def hide(text: str, key: str) -> str:
    """Without the key, which some endpoints quote; one shorter than 8 is no secret, but may be a word of a reply."""
    for form in (key, key.replace("/", r"\/"), json.dumps(key)[1:-1]) if len(key) >= 8 else ():
        text = text.replace(form, "[key]")
    return text


def reply_of(body: str) -> str | None:
    """The text in a body of the chat protocol, or None."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) and content.strip() else None


def seconds_asked(header: str | None) -> float:
    """Of a Retry-After header, seconds or a date; at most an hour. 0 for none and for nonsense."""
    try:
        date = email.utils.parsedate_tz(header or "")
        return min(
            max(0.0, email.utils.mktime_tz(date) - time.time() if date else float(header or 0)),
            3600.0,
        )
    except (ValueError, OverflowError):
        return 0.0


def ask(judge: Judge, messages: list[dict], about: dict) -> str:
    """The judge's reply. A request that `raw` has the reply to is not sent again.

    Tried again, after a wait that doubles and is spread by chance: no connection, time-outs, HTTP 408, 429 and 5xx,
    bodies without a reply. Raises UnjudgedError when that was of no use or judge.stop is set; InputError for a status
    that every request would get."""
    data = json.dumps(
        {
            "model": judge.model,
            "messages": messages,
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
        }
    ).encode()
    digest = hashlib.sha256(data).hexdigest()
    if digest in judge.kept:
        return judge.kept[digest]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {judge.key}"}
    for attempt in range(judge.tries):
        if judge.stop.is_set():
            raise UnjudgedError("stopped")
        wait = 0.0
        try:
            request = urllib.request.Request(judge.url, data, headers)
            with judge.opener.open(request, timeout=judge.timeout) as response:
                body = hide(response.read().decode(errors="replace"), judge.key)
            status, wait = response.status, seconds_asked(response.headers["Retry-After"])
        except (OSError, http.client.HTTPException) as error:
            reason = hide(str(getattr(error, "reason", error)), judge.key) or type(error).__name__
        else:
            append_row(
                judge.raw,
                about | {"request": digest, "status": status, "body": body, "tstamp": time.time()},
            )
            if status == 200 and (reply := reply_of(body)):
                return reply
            if status in HOPELESS or 300 <= status < 400:
                raise InputError(f"{judge.url}: HTTP {status}: {' '.join(body.split())[:200]}")
            if status not in (200, 408, 429) and status < 500:
                raise UnjudgedError(f"HTTP {status}: {' '.join(body.split())[:100]}")
            reason = "no reply in a body of HTTP 200" if status == 200 else f"HTTP {status}"
        if attempt + 1 < judge.tries:
            spread = min(judge.wait * 2 ** min(attempt, 20), LONGEST_WAIT) * random.uniform(
                0.5, 1.5
            )
            judge.stop.wait(max(wait, spread))
    raise UnjudgedError(reason)


Job = tuple[
    list[str], Callable[[Judge], dict]
]  # the prompts that the judge sees, and what makes the row


def judge_all(
    flags: argparse.Namespace,
    model: str,
    jobs: dict[tuple, Job],
    keys: tuple[str, ...],
    temperature: float,
    max_tokens: int,
) -> None:
    """Does the jobs that --out lacks, several at once, and writes each row when it is there.

    A job's key is its row's values of `keys`. Interrupted, it waits for the replies under way, so that all that was
    paid for is kept. Raises InputError where --out is another judge's or judges other answers."""
    out, done = Path(flags.out), set()
    with locked(out):
        pass
    for place, row in json_rows(out, "model", "judge", *keys):
        found = row["judge"][0] if isinstance(row["judge"], list) and row["judge"] else row["judge"]
        if found != flags.judge_model:
            raise InputError(
                f"{place}: judged by {found!r}, wanted {flags.judge_model!r} (--judge-model)"
            )
        key = tuple(row[name] for name in keys)
        if row["model"] == model and key in list(
            jobs
        ):  # a list: what cannot be hashed is not in it either
            games = row["games"] if isinstance(row.get("games"), list) else [row]
            if [isinstance(game, dict) and game.get("user_prompt") for game in games] != jobs[key][
                0
            ]:
                raise InputError(
                    f"{place}: what was judged is not {model}'s answer to question {key[0]} in --answers; "
                    "wanted the same answers, or a fresh file"
                )
            done.add(key)
    waiting, failed, made = (
        [work for key, (_, work) in jobs.items() if key not in done],
        Counter(),
        0,
    )
    if not waiting:
        print(
            f"{out}: {len(done)} judgments of {model} by {flags.judge_model} there before, none left to make"
        )
        return
    judge = open_judge(flags, temperature, max_tokens)

    def do(work: Callable[[Judge], dict]) -> None:
        try:
            append_row(out, work(judge))
        except InputError:
            judge.stop.set()  # here: this thread's next job begins before any other thread hears of it
            raise

    with ThreadPoolExecutor(flags.concurrency) as pool:
        futures = [pool.submit(do, work) for work in waiting]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                    made += 1
                except UnjudgedError as error:
                    failed[str(error)] += 1
                if count % max(1, len(waiting) // 10) == 0:
                    print(f"{count} of {len(waiting)}", flush=True)
        except BaseException as error:
            judge.stop.set()  # nothing more is asked; leaving the pool waits for the replies under way
            if isinstance(error, KeyboardInterrupt):
                print(
                    f"stopping: waiting for what is under way; {out} keeps what is judged, the same command goes on",
                    file=sys.stderr,
                    flush=True,
                )
            raise
    reasons = "; ".join(f"{count} x {reason}" for reason, count in failed.most_common(5))
    print(
        f"{out}: {made} judgments of {model} by {judge.model}, {len(done)} there before, {failed.total()} failed"
        + (f" ({reasons}); the same command tries them again" if failed else "")
        + f"; raw replies in {judge.raw}"
    )


def fill(template: object, fields: dict[str, str], where: str) -> str:
    """A judge prompt with its fields put in."""
    try:
        return template.format(**fields)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{where}: wanted a text with fields among {', '.join(fields)} ({error})"
        ) from None


def judge_mt_bench(flags: argparse.Namespace) -> None:
    """Single-answer grading, one request a turn; with reference answers where the category needs them."""
    questions = read_questions(flags.questions, MT_BENCH)
    model, answers = read_answers(flags.answers, MT_BENCH, questions)
    references = read_answers(flags.references, MT_BENCH, questions)[1]
    prompts = {
        str(row["name"]): row
        for _, row in json_rows(flags.prompts, "name", "system_prompt", "prompt_template")
    }
    jobs = {}
    for number, (one, two) in answers.items():
        question = questions[number]
        fields = {
            "question": question.turns[0],
            "question_1": question.turns[0],
            "question_2": question.turns[1],
            "answer": one,
            "answer_1": one,
            "answer_2": two,
        }
        with_reference = question.category in MT_WITH_REFERENCE
        if with_reference:
            if number not in references:
                raise InputError(
                    f"{flags.references}: no answer to question {number}, {question.category} wants one"
                )
            fields["ref_answer_1"], fields["ref_answer_2"] = references[number]
        for turn in (1, 2):
            name = "single-math-v1" if with_reference else "single-v1"
            name += "-multi-turn" * (turn == 2)
            if name not in prompts:
                raise InputError(
                    f"{flags.prompts}: no prompt {name}; wanted FastChat's judge_prompts.jsonl"
                )
            user = fill(prompts[name]["prompt_template"], fields, f"{flags.prompts}: {name}")
            jobs[number, turn] = (
                [user],
                functools.partial(rate, model, number, turn, name, prompts[name], user),
            )
    print(f"{model}: {len(answers)} of {len(questions)} questions have an answer", flush=True)
    judge_all(flags, model, jobs, ("question_id", "turn"), 0.0, MT_MAX_TOKENS)


def rate(
    model: str, number: int | str, turn: int, name: str, prompt: dict, user: str, judge: Judge
) -> dict:
    """A row of FastChat's judgments: the score is -1 where the judge gave none."""
    messages = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": user},
    ]
    reply = ask(judge, messages, {"question_id": number, "model": model, "turn": turn})
    found = [match[1] for match in (re.search(pattern, reply) for pattern in RATINGS) if match]
    score = (float(found[0]) if "." in found[0] else int(found[0])) if found else -1
    return {
        "question_id": number,
        "model": model,
        "judge": [judge.model, name],
        "user_prompt": user,
        "judgment": reply,
        "score": score,
        "turn": turn,
        "tstamp": time.time(),
    }


def read_setting(path: str | Path, key: str, *kinds: type):
    """The value of `key: VALUE` in a YAML file, where it is one line and JSON too: a double-quoted text, a list of
    them, a number. InputError for all else that YAML allows."""
    try:
        (text,) = re.findall(rf"^{key}:[ ]+(.*)$", Path(path).read_text(encoding="utf-8"), re.M)
        value, end = json.JSONDecoder().raw_decode(text)
        if type(value) in kinds and re.fullmatch(r"\s*(\s#.*)?", text[end:]):
            return value
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; wanted Arena-Hard's judge_config.yaml"
        ) from None
    except ValueError:
        pass
    raise InputError(
        f"{path}: wanted one line `{key}: VALUE`, VALUE of type "
        f"{' or '.join(kind.__name__ for kind in kinds)}, in JSON's form"
    )


def judge_arena_hard(flags: argparse.Namespace) -> None:
    """Two games a question: the baseline's answer first, then the model's."""
    questions = read_questions(flags.questions, ARENA_HARD)
    model, answers = read_answers(flags.answers, ARENA_HARD, questions)
    baseline, theirs = read_answers(flags.baseline, ARENA_HARD, questions)
    system, templates, temperature, max_tokens = (
        read_setting(flags.config, *of)
        for of in (
            ("system_prompt", str),
            ("prompt_template", list),
            ("temperature", int, float),
            ("max_tokens", int),
        )
    )
    jobs = {}
    for number, (mine,) in answers.items():
        if number not in theirs:
            raise InputError(
                f"{flags.baseline}: no answer to question {number}, wanted all those of --answers"
            )
        users = []
        for one, two in ((theirs[number][0], mine), (mine, theirs[number][0])):
            fields = {"question_1": questions[number].turns[0], "answer_1": one, "answer_2": two}
            users += [
                fill(template, fields, f"{flags.config}: prompt_template") for template in templates
            ]
        if len(users) != 2:
            raise InputError(
                f"{flags.config}: prompt_template has {len(templates)} texts, wanted one"
            )
        jobs[number,] = users, functools.partial(play, model, number, system, users)
    print(
        f"{model} against {baseline}: {len(answers)} of {len(questions)} questions have an answer",
        flush=True,
    )
    judge_all(flags, model, jobs, ("question_id",), temperature, max_tokens)


def play(model: str, number: int | str, system: str, users: list[str], judge: Judge) -> dict:
    """A row of Arena-Hard's judgments: each game's label, None where there are several or, after a second try, none."""
    games = []
    for game, user in enumerate(users, 1):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        judgment, labels = "", set()
        while not labels and len(messages) <= 4:
            reply = ask(judge, messages, {"question_id": number, "model": model, "game": game})
            judgment += f"\n{reply}"
            labels = set(LABEL.findall(judgment))
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": SECOND_TRY},
            ]
        label = labels.pop() if len(labels) == 1 else None
        games.append({"user_prompt": user, "judgment": judgment, "score": label})
    return {"question_id": number, "model": model, "judge": judge.model, "games": games}


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Flags of the command."""
    add = command.add_argument
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add("--answers", required=True, metavar="FILE", help="one model's answers")
    if bench is MT_BENCH:
        add("--references", required=True, metavar="FILE", help="reference_answer/gpt-4.jsonl")
        add("--prompts", required=True, metavar="FILE", help="judge_prompts.jsonl")
    else:
        add("--baseline", required=True, metavar="FILE", help="model_answer/gpt-4-0314.jsonl")
        add("--config", required=True, metavar="FILE", help="judge_config.yaml")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="judgments; those it has already are left. The replies as they came go to FILE.raw",
    )
    add(
        "--endpoint",
        default="",
        metavar="URL",
        help="of an OpenAI-compatible chat service, such as "
        "https://api.openai.com/v1; not needed where all is judged",
    )
    add(
        "--judge-model",
        required=True,
        metavar="NAME",
        help="the judge, as the endpoint calls it",
    )
    add(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the endpoint's key [OPENAI_API_KEY]",
    )
    add("--concurrency", type=between(int, 1), default=8, help="requests under way at once [8]")
    add(
        "--timeout",
        type=between(float, 1e-3, 1e6),
        default=300.0,
        help="seconds without a byte of the reply [300]",
    )
    add(
        "--tries",
        type=between(int, 1),
        default=8,
        help="of a request, before it counts as failed [8]",
    )
    add(
        "--wait",
        type=between(float, 0, 1e6),
        default=1.0,
        help="seconds before the second try, doubled before "
        "each further one up to 60, times 0.5 to 1.5 by chance; Retry-After is heeded [1]",
    )


def run(flags: argparse.Namespace) -> None:
    """The judge of the benchmark in flags.bench."""
    (judge_mt_bench if flags.bench is MT_BENCH else judge_arena_hard)(flags)
