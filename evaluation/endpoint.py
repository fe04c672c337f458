"""One request to a judge: any endpoint that speaks OpenAI's chat protocol.

Reading order: `open_judge` connects, `reply_of` reads a reply, `ask` asks. Every reply is appended
to a file and is not paid for twice. Tries, waits (and Retry-After), time-outs and proxies are the
`openai` client's. What a reply means is left to judge.py.
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

# Every request would get these: a wrong key, no money, a wrong address or model, a redirect.
STOPPING_STATUSES = (401, 402, 404, *range(300, 400))
NO_MONEY = r"insufficient_\w*(quota|balance|credit|fund)|exceeded_current_quota|billing|payment"
# Some endpoints say it, or that the key is wrong, only in words, under a status such as 400.
NO_MONEY_WORDS = r"credit balance is too low|key limit exceeded|api key not valid"
NOT_SUPPORTED = r"(?i)not support|unsupported|unknown|unrecognized|not (allowed|permitted)"
NOT_ASKED = "not asked, since the first ones failed alike"


class Reply(typing.NamedTuple):
    """A judge's text, without its thoughts; and if the limit of tokens cut it."""

    text: str
    cut: bool


class UnjudgedError(Exception):
    """The endpoint gave no judgment; the message is the reason. The next run asks again."""


@dataclass
class Judge:
    """An endpoint, and what is known of it."""

    client: "openai.OpenAI"
    model: str
    settings: dict  # temperature and max_tokens, as the benchmark has them
    parameters: dict  # the same, as the endpoint accepts them
    raw: Path  # every reply, as it came
    kept: dict[str, Reply] = field(default_factory=dict)  # request's hash -> reply, from `raw`
    stop: threading.Event = field(default_factory=threading.Event)  # ask nothing more
    writing: threading.Lock = field(default_factory=threading.Lock)
    here: threading.local = field(default_factory=threading.local)  # this thread's request: `about`


def open_judge(flags: argparse.Namespace, settings: dict) -> Judge:
    """Raises InputError for a missing package or key, and for an endpoint that is not reachable."""
    try:
        import openai
    except ImportError:
        raise InputError("judging needs the openai package: pip install openai") from None
    if not re.fullmatch(r"(?i)https?://[^\s@?#]+", flags.endpoint):  # not shown: may hold a key
        raise InputError("--endpoint: wanted a plain address, such as https://api.openai.com/v1")
    key = os.environ.get(flags.key_variable, "").strip()
    if not re.fullmatch("[!-~]+", key):
        found = f"environment variable {flags.key_variable} (--key-variable) holds no key"
        raise InputError(f"{found}; any word will do if the endpoint needs none")

    def before_request(_request) -> None:
        if judge.stop.is_set():
            raise UnjudgedError(NOT_ASKED)

    def after_response(response) -> None:
        body = hide(response.read().decode(errors="replace"), key)
        if response.request.method == "POST":
            judge.here.reply = response.status_code, body
            row = {"status": response.status_code, "body": body, "tstamp": time.time()}
            append(judge, judge.raw, judge.here.about | row)
        if judge.stop.is_set() or no_money(body):
            response.headers["x-should-retry"] = "false"  # the client obeys this header

    address = flags.endpoint.rstrip("/").removesuffix("/chat/completions")
    raw = Path(f"{flags.out}.raw")
    try:
        http_client = openai.DefaultHttpxClient(
            follow_redirects=False,  # a redirect would take the key to another host
            event_hooks={"request": [before_request], "response": [after_response]},
        )
        patience = {"timeout": flags.timeout, "max_retries": flags.tries - 1}
        client = openai.OpenAI(api_key=key, base_url=address, http_client=http_client, **patience)
        judge = Judge(client, flags.judge_model, settings, settings, raw)
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
    if len(key) >= 8:
        for form in (key, key.replace("/", r"\/"), json.dumps(key)[1:-1]):
            text = text.replace(form, "[key]")
    return text


def error_of(body: str) -> dict:
    """The error object in a body, or in a list of one (Gemini's); empty if there is none."""
    try:
        found = json.loads(body)
        error = (found[0] if isinstance(found, list) else found)["error"] or {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {"message": error}


def words(body: str) -> str:
    """An endpoint's words about an error, on one line and without control characters."""
    found = str(error_of(body).get("message") or body)
    printable = "".join(c if c.isprintable() else " " for c in found)
    return " ".join(printable.split())[:300]


def no_money(body: str) -> bool:
    """True if a body says that the account has run out of money, or that the key is wrong, which
    waiting does not mend."""
    error = error_of(body)
    facts = f"{error.get('code')} {error.get('type')}"
    said = re.search(NO_MONEY_WORDS, str(error.get("message")).lower())
    return error.get("code") == 402 or bool(said or re.search(NO_MONEY, facts))


def without_thoughts(content: str) -> str:
    """What follows the thoughts of a model whose server leaves them in the text: they may name a
    verdict that it then does not give. A template may have begun them, so that only their end is
    there."""
    begun = content.lstrip().startswith("<think>")
    if begun or ("</think>" in content and "<think>" not in content):
        return content.rpartition("</think>")[2] if "</think>" in content else ""
    return content


def reply_of(body: str) -> Reply:
    """The text of a chat completion. Raises UnjudgedError with the reason if it has none, or if it
    broke off for another reason than its limit of tokens."""
    if error_of(body):
        raise UnjudgedError(f"the reply is an error: {words(body)}")
    try:
        choice = json.loads(body)["choices"][0]
        finish, content = choice.get("finish_reason"), choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UnjudgedError(f"the reply is no chat completion: {words(body)[:80]}") from None
    if isinstance(content, list):  # parts: texts, and thoughts that do not count
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text", "")) for part in parts)
    if choice.get("error") or finish in ("error", "content_filter"):
        raise UnjudgedError(f"a reply that broke off, finish_reason {finish}")
    text = without_thoughts(content) if isinstance(content, str) else ""
    if text.strip():
        return Reply(text, cut=finish == "length")
    advice = " (raise --max-tokens)" if finish == "length" else ""
    raise UnjudgedError(f"a reply without text, finish_reason {finish}{advice}")


def ask(judge: Judge, talk: list[tuple[str, str]], about: dict) -> Reply:
    """The judge's reply to a talk of (role, text). A request that judge.raw has a text for is not
    sent again, and one that was answered without a text is not tried again in this run.

    Raises UnjudgedError if this request fails, InputError if every other one would fail as well."""
    messages = [{"role": role, "content": text} for role, text in talk]
    whole = {"model": judge.model, "messages": messages} | judge.settings
    digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    if digest in judge.kept:
        return judge.kept[digest]
    judge.here.about = about | {"request": digest}
    parameters, others = None, judge.parameters
    while others != parameters:
        parameters = others
        status, body = send(judge, messages, parameters)
        if status in (400, 422):
            others = other_parameters(parameters, words(body))
    if status in STOPPING_STATUSES or no_money(body):
        raise InputError(f"{judge.client.base_url}: HTTP {status}: {words(body)}")
    if status != 200:
        raise UnjudgedError(f"HTTP {status}: {words(body)}".rstrip(": "))
    if parameters != judge.parameters:
        judge.parameters = parameters
        print(f"the judge refused parameters; now sent: {json.dumps(parameters)}", flush=True)
    return reply_of(body)


def send(judge: Judge, messages: list[dict], parameters: dict) -> tuple[int, str]:
    """Status and body of the reply to the last of the client's tries; after_response has appended
    the replies to all of them to judge.raw. Raises UnjudgedError if the last try got none."""
    import openai

    create = judge.client.chat.completions.with_raw_response.create
    try:
        create(model=judge.model, messages=messages, **parameters)
    except openai.APIStatusError:
        pass
    except (openai.APIConnectionError, UnicodeError) as error:
        cause = error.__cause__ or error
        reason = hide(str(cause), judge.client.api_key) or type(cause).__name__
        raise UnjudgedError(reason) from None
    return judge.here.reply


def other_parameters(parameters: dict, refusal: str) -> dict:
    """What to send instead if a refusal names a parameter that was sent: newer models accept
    max_completion_tokens only, and no temperature. The same if it names neither, or says only that
    max_tokens is too large."""
    others = dict(parameters)
    unknown = "max_tokens" in refusal and re.search(NOT_SUPPORTED, refusal)
    if "max_tokens" in others and (unknown or "max_completion_tokens" in refusal):
        others["max_completion_tokens"] = others.pop("max_tokens")
    elif "temperature" in refusal:
        others.pop("temperature", None)
    return others


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
            last = file.read().rpartition(b"\n")[2]
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
