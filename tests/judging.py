"""What test_judge.py and test_reports.py share: a benchmark's files, and commands on them."""

import json

import eval as evaluation

KEY = "sk-not-to-be-seen-1234567890"
QUESTIONS = {
    81: ("writing", ["Write a line.", "Shorten it."]),
    111: ("math", ["1+1?", "And plus 1?"]),
    141: ("stem", ["What is {mass}?", "And weight?"]),
}
ANSWERS = {81: ["A line of text.", "A line."], 111: ["2", "3"], 141: ["Mass is {m}.", "A force."]}
PROMPTS = """\
single-v1|Q {question} A {answer}
single-math-v1|Q {question} R {ref_answer_1} A {answer}
single-v1-multi-turn|Q {question_1} A {answer_1} Q {question_2} A {answer_2}
single-math-v1-multi-turn|R {ref_answer_1} {ref_answer_2} Q {question_1} {question_2} A {answer_1} \
{answer_2}"""
NAMES = ("q1", "q2", "q3")  # Arena-Hard's questions
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


def edit(path, *changes):
    """Replaces texts in a file: pairs of found and new."""
    text = path.read_text()
    for found, new in changes:
        assert found in text
        text = text.replace(found, new)
    path.write_text(text)


def answers(turns_of, model="mine"):
    row = {"answer_id": "x", "model_id": model, "tstamp": 1.0}
    return [
        {"question_id": number, "choices": [{"index": 0, "turns": turns}]} | row
        for number, turns in turns_of.items()
    ]


def arena_answers(side, model="mine"):
    return answers({q: [{"content": f"{side} of {q}", "token_len": 3}] for q in NAMES}, model)


class Files:
    """A benchmark's files in a directory, and the flags that name them."""

    def __init__(self, where, bench):
        self.bench, self.where, self.mt = bench, where, bench == "mt-bench"
        self.out, self.raw = where / "judged/out.jsonl", where / "judged/out.jsonl.raw"
        self.answers, self.questions = where / "answers.jsonl", where / "question.jsonl"
        self.references, self.prompts = where / "references.jsonl", where / "prompts.jsonl"
        self.baseline, self.config = where / "baseline.jsonl", where / "config.yaml"
        if self.mt:
            questions = [(number, *of) for number, of in QUESTIONS.items()]
            write(self.answers, answers(ANSWERS))
            write(self.references, answers({111: ["two", "three"]}, "gpt-4"))
            prompts = [line.split("|") for line in PROMPTS.splitlines()]
            keys = ("name", "prompt_template", "system_prompt")
            rows = [dict(zip(keys, (*of, f"You are {of[0]}."), strict=True)) for of in prompts]
            write(self.prompts, rows)
            self.own = ["--references", self.references, "--prompts", self.prompts]
        else:
            questions = [(q, "arena-hard-v0.1", [{"content": f"What is {q}?"}]) for q in NAMES]
            write(self.answers, arena_answers("mine"))
            write(self.baseline, arena_answers("theirs", "gpt-4-0314"))
            self.config.write_text(CONFIG)
            self.own = ["--baseline", self.baseline, "--config", self.config]
        keys = ("question_id", "category", "turns")
        write(self.questions, [dict(zip(keys, of, strict=True)) for of in questions])

    def flags(self, url, *more):
        files = ("--questions", self.questions, "--answers", self.answers, *self.own)
        end = ("--out", self.out, "--judge-model", "gpt-4", "--tries", 3, *more)
        return [self.bench, "judge", *files, *(("--endpoint", url) if url else ()), *end]

    def judge(self, endpoint, *more):
        return run(*self.flags(endpoint.url, *more))
