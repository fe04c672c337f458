"""What test_judge.py and test_reports.py share: a benchmark's files, and an endpoint to judge."""

import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import eval as evaluation

KEY = "sk-not-to-be-seen-1234567890"
BOTH = "Rating: [[7]], and [[A>B]]"  # either benchmark takes something from it
QUESTIONS = {
    81: ("writing", ["Write a line.", "Shorten it."]),
    111: ("math", ["1+1?", "And plus 1?"]),
    141: ("stem", ["What is {mass}?", "And weight?"]),
}
ANSWERS = {81: ["A line of text.", "A line."], 111: ["2", "3"], 141: ["Mass is {m}.", "A force."]}
PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "R {ref_answer_1} {ref_answer_2} Q {question_1} {question_2} "
    "A {answer_1} {answer_2}",
}
CONFIG = """# a comment
judge_model: somebody
temperature: 0
max_tokens: 77 # of a judgment

system_prompt: "Judge \\"well\\".\\nOr not."
prompt_template: ["Q: {question_1}\\nA: {answer_1}\\nB: {answer_2}"]
model_list:
  - x
"""


def run(*parts) -> int:
    """eval.py with these flags; returns the exit code."""
    return evaluation.main([str(part) for part in parts])


def complaint(capsys, code, wanted=2):
    """The one line on stderr of a command that must have failed."""
    assert code == wanted
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("eval.py: ") and KEY not in said, said
    return said


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(turns_of, model="mine"):
    row = {"answer_id": "x", "model_id": model, "tstamp": 1.0}
    return [
        {"question_id": number, "choices": [{"index": 0, "turns": turns}]} | row
        for number, turns in turns_of.items()
    ]


def arena_answers(side, model="mine"):
    names = ("q1", "q2", "q3")
    return answers({q: [{"content": f"{side} of {q}", "token_len": 3}] for q in names}, model)


class Files:
    """A benchmark's files in a directory, and the flags that name them."""

    def __init__(self, where, bench):
        self.bench, self.where, self.out = bench, where, where / "judged" / "out.jsonl"
        self.raw = where / "judged" / "out.jsonl.raw"
        self.answers, self.questions = where / "answers.jsonl", where / "question.jsonl"
        if bench == "mt-bench":
            questions = [(number, *of) for number, of in QUESTIONS.items()]
            write(self.answers, answers(ANSWERS))
            write(where / "references.jsonl", answers({111: ["two", "three"]}, "gpt-4"))
            prompts = [
                {"name": name, "system_prompt": f"You are {name}.", "prompt_template": text}
                for name, text in PROMPTS.items()
            ]
            write(where / "prompts.jsonl", prompts)
            own = {"--references": "references.jsonl", "--prompts": "prompts.jsonl"}
        else:
            names = ("q1", "q2", "q3")
            questions = [(q, "arena-hard-v0.1", [{"content": f"What is {q}?"}]) for q in names]
            write(self.answers, arena_answers("mine"))
            write(where / "baseline.jsonl", arena_answers("theirs", "gpt-4-0314"))
            (where / "config.yaml").write_text(CONFIG)
            own = {"--baseline": "baseline.jsonl", "--config": "config.yaml"}
        self.own = [part for flag, name in own.items() for part in (flag, where / name)]
        keys = ("question_id", "category", "turns")
        write(self.questions, [dict(zip(keys, of, strict=True)) for of in questions])

    def only(self, number):
        """Keeps one question's answer."""
        rows = [row for row in rows_of(self.answers) if row["question_id"] == number]
        write(self.answers, rows)

    def flags(self, url, *more):
        files = ("--questions", self.questions, "--answers", self.answers, *self.own)
        end = ("--out", self.out, "--judge-model", "gpt-4", "--tries", 3, *more)
        return [self.bench, "judge", *files, *(("--endpoint", url) if url else ()), *end]

    def judge(self, endpoint, *more):
        return run(*self.flags(endpoint.url, *more))


def completion(content, finish="stop", **more):
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content} | more
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]})


def refusal(message, **more):
    """An error's body, as OpenAI writes it."""
    return json.dumps({"error": {"message": message} | more}, indent=2)


SOON = {"retry-after-ms": "1"}  # the client then waits a millisecond before the next try


class Endpoint:
    """A chat service. `act(payload, count)` gives the reply to the count-th POST (from 1): a text,
    or (status, body, headers), or None to drop the connection. Keeps what it was asked."""

    def __init__(self, act):
        self.act, self.asked, self.keys, self.times = act, [], [], []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
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
                    reply = 200, completion(reply)
                status, body, *headers = reply
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                for name, value in (headers[0] if headers else {}).items():
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
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()


def serving(monkeypatch):
    """Yields serve(act), which starts an endpoint; the key is set, and no proxy is."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(act=lambda payload, count: BOTH):
        started.append(Endpoint(act))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()
