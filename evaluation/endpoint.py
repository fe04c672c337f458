"""One request to a judge: any endpoint that speaks OpenAI's chat protocol.

`open_judge` checks and connects, `ask` asks. Every reply is appended to a file and is not paid for
twice. Tries, waits (and Retry-After), time-outs and proxies are the `openai` client's. What a reply
means is left to judge.py.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import threading
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.rows import json_line, json_rows
from support.files import InputError, naming

if typing.TYPE_CHECKING:
    import openai

# Every request would get these: a wrong key, no money, a wrong address or model.
STOPPING_STATUSES = (401, 402, 404)
NO_MONEY = r"insufficient_\w*(quota|balance|credit|fund)|exceeded_current_quota|billing|payment"


class UnjudgedError(Exception):
    """The endpoint gave no judgment; the message is the reason. The next run asks again."""


@dataclass
class Judge:
    """An endpoint, and what is known of it."""

    client: "openai.OpenAI"
    address: str
    key: str
    model: str
    settings: dict  # temperature and max_tokens, as the benchmark has them
    parameters: dict  # the same, as the endpoint accepts them
    raw: Path  # every reply, as it came
    kept: dict[str, str] = field(default_factory=dict)  # request's hash -> text, from `raw`
    stop: threading.Event = field(default_factory=threading.Event)  # ask nothing more
    writing: threading.Lock = field(default_factory=threading.Lock)
    here: threading.local = field(default_factory=threading.local)  # replies to this thread


def open_judge(flags: argparse.Namespace, settings: dict) -> Judge:
    """Raises InputError for a missing package or key, and for an endpoint that is not reachable."""
    try:
        import openai
    except ImportError:
        raise InputError("judging needs the openai package: pip install openai") from None
    key = os.environ.get(flags.key_variable, "").strip()
    address = r"https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[^\s@?#]*)?"
    if not re.fullmatch(address, flags.endpoint, re.ASCII | re.IGNORECASE):
        raise InputError(
            "--endpoint: wanted a plain http:// or https:// address, such as "
            "https://api.openai.com/v1"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"environment variable {flags.key_variable} (--key-variable) is "
            f"{'not a key' if key else 'not set'}; wanted the endpoint's key in it, or any word "
            "for an endpoint that needs none"
        )
    address = flags.endpoint.rstrip("/").removesuffix("/chat/completions")

    def before_request(_request) -> None:
        if judge.stop.is_set():
            raise UnjudgedError("stopped")

    def after_response(response) -> None:
        body = hide(response.read().decode(errors="replace"), key)
        if response.request.method == "POST":
            judge.here.replies.append((response.status_code, body))
        if judge.stop.is_set() or no_money(body):
            response.headers["x-should-retry"] = "false"  # the client obeys this header

    raw = Path(f"{flags.out}.raw")
    try:
        http_client = openai.DefaultHttpxClient(
            follow_redirects=False,  # a redirect would take the key to another host
            event_hooks={"request": [before_request], "response": [after_response]},
        )
        patience = {"timeout": flags.timeout, "max_retries": flags.tries - 1}
        client = openai.OpenAI(api_key=key, base_url=address, http_client=http_client, **patience)
        judge = Judge(client, address, key, flags.judge_model, settings, dict(settings), raw)
        client.with_options(max_retries=0, timeout=10).models.with_raw_response.list()
    except (openai.APIStatusError, openai.APITimeoutError):
        pass  # any answer will do, a slow one too
    except Exception as error:  # odd hosts, ports and proxies: their classes are the client's
        reason = error.__cause__ or error
        raise InputError(f"--endpoint {flags.endpoint}: not reachable ({reason})") from None
    end_in_whole_line(raw)
    for _, row in json_rows(raw, "request", "body"):
        with contextlib.suppress(UnjudgedError):  # an error, or a reply without text
            judge.kept[str(row["request"])] = reply_of(str(row["body"]))
    return judge


def hide(text: str, key: str) -> str:
    """Removes the key, which some endpoints quote. One shorter than 8 is no secret, but may be a
    word of a reply."""
    forms = (key, key.replace("/", r"\/"), json.dumps(key)[1:-1])
    for form in forms if len(key) >= 8 else ():
        text = text.replace(form, "[key]")
    return text


def error_of(body: str) -> dict:
    """The error object in a body, empty if there is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    if isinstance(error, dict):
        return error
    return {"message": error} if error else {}


def words(body: str) -> str:
    """An endpoint's words about an error, on one line."""
    return " ".join(str(error_of(body).get("message") or body).split())[:300]


def no_money(body: str) -> bool:
    """True if a body says that the account has run out of money, which waiting does not mend."""
    error = error_of(body)
    facts = f"{error.get('code')} {error.get('type')}"
    return error.get("code") == 402 or re.search(NO_MONEY, facts) is not None


def reply_of(body: str) -> str:
    """The text of a chat completion. Raises UnjudgedError with the reason if it has none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        stream = body.lstrip().startswith(("data:", "event:", ":"))
        kind = "a stream of events" if stream else "not JSON"
        raise UnjudgedError(f"the reply is {kind}: {words(body)[:80]}") from None
    if error_of(body):
        raise UnjudgedError(f"the reply is an error: {words(body)}")
    try:
        choice = found["choices"][0]
        content = choice["message"]["content"]
    except (LookupError, TypeError):
        raise UnjudgedError(f"the reply has no choices: {words(body)[:80]}") from None
    if isinstance(content, list):  # parts: texts, and thoughts that do not count
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text", "")) for part in parts)
    if isinstance(content, str) and content.strip():
        return content
    finish = choice.get("finish_reason")
    advice = " (raise --max-tokens)" if finish == "length" else ""
    raise UnjudgedError(f"a reply without text, finish_reason {finish}{advice}")


def send(judge: Judge, messages: list[dict], parameters: dict, about: dict) -> tuple[int, str]:
    """Status and body of the last of the client's tries; the replies to all of them go to
    judge.raw. Raises UnjudgedError if no reply came."""
    import openai

    judge.here.replies = replies = []
    failed = ""
    try:
        judge.client.chat.completions.with_raw_response.create(
            model=judge.model, messages=messages, **parameters
        )
    except openai.APIStatusError:
        pass  # its body is the last reply
    except (openai.APIConnectionError, UnicodeError) as error:
        cause = error.__cause__ or error
        failed = hide(str(cause), judge.key) or type(cause).__name__
    finally:  # before_request may have ended the tries
        for status, body in replies:
            row = about | {"status": status, "body": body, "tstamp": time.time()}
            append(judge, judge.raw, row)
    if failed:
        raise UnjudgedError(failed)
    return replies[-1]


def ask(judge: Judge, talk: list[tuple[str, str]], about: dict) -> str:
    """The judge's reply to a talk of (role, text). A request that judge.raw has a text for is not
    sent again, and one that was answered without a text is not tried again in this run.

    Raises UnjudgedError if this request fails, InputError if every other one would fail as well."""
    messages = [{"role": role, "content": text} for role, text in talk]
    whole = {"model": judge.model, "messages": messages} | judge.settings
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    if digest in judge.kept:
        return judge.kept[digest]
    parameters = judge.parameters
    while True:
        status, body = send(judge, messages, parameters, about | {"request": digest})
        others = other_parameters(parameters, words(body)) if status in (400, 422) else None
        if others is None:
            break
        parameters = others
    if status in STOPPING_STATUSES or 300 <= status < 400 or no_money(body):
        raise InputError(f"{judge.address}: HTTP {status}: {words(body)}")
    if status != 200:
        raise UnjudgedError(f"HTTP {status}: {words(body)}".rstrip(": "))
    if parameters != judge.parameters:
        judge.parameters = parameters
        print(f"{judge.address} refused parameters; now sent: {json.dumps(parameters)}", flush=True)
    return reply_of(body)


def other_parameters(parameters: dict, refusal: str) -> dict | None:
    """What to send instead if a refusal names a parameter that was sent: newer models accept
    max_completion_tokens only, and no temperature. None if it names neither."""
    others = dict(parameters)
    if "max_tokens" in others and re.search("max_(completion_)?tokens", refusal):
        others["max_completion_tokens"] = others.pop("max_tokens")
        return others
    if "temperature" in others and "temperature" in refusal:
        del others["temperature"]
        return others
    return None


def append(judge: Judge, path: Path, row: dict) -> None:
    """Adds a row to a file of this process, whose threads take turns."""
    with judge.writing, naming(path), open(path, "ab", buffering=0) as file:
        file.write(json_line(row))


def end_in_whole_line(path: Path) -> None:
    """Makes the file if it is missing. A last row that a killed run left unfinished is dropped with
    a word; raises InputError if the last line is not a row of this command."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(0)
            whole, _, last = file.read().rpartition(b"\n")
            if not last:
                return
            begin = b'{"question_id": '
            if not last.startswith(begin[: len(last)]):
                raise InputError(f"{path}: its last line is not a row of this command")
            try:
                json.loads(last)
                file.write(b"\n")
            except ValueError:
                file.truncate(file.tell() - len(last))
                print(f"{path}: dropped its last row, which is cut short", flush=True)
