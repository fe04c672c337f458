"""A judge's verdicts on a model's answers, in FastChat's and Arena-Hard's own forms.

Reading order: `run` and `judge_all` (many requests at once, resumed where they stopped), then the
benchmarks: `mt_bench_jobs` with `rate`, `arena_hard_jobs` with `play`. How one request is made is
in endpoint.py, the reports are in reports.py.
"""

import argparse
import functools
import re
import string
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

from evaluation.benchmarks import MT_BENCH, Bench, judge_of, read_answers, read_questions
from evaluation.endpoint import Judge, UnjudgedError, append, ask, end_in_whole_line, open_judge
from evaluation.rows import between, hold_out, json_rows
from support.files import JSON_BYTES, InputError, read_start, shown
from support.processes import StoppedError

MT_WITH_REFERENCE = ("math", "reasoning", "coding")
MT_MAX_TOKENS = 2048  # of a judgment, at temperature 0; Arena-Hard's configuration has its own
RATING = r"(\d{1,9}(?:\.\d*)?)"
LABEL = r"\[\[([AB<>=]+)\]\]"
NO_VERDICT = "no verdict"
GIVE_UP = 8  # see `judge_all`; failures are alike if they differ only in numbers
SECOND_TRY = "continue your judgment and finish by outputting a final verdict label"

# Question's id and turn (None in Arena-Hard) -> the user prompts that the judge sees, and the
# function that asks it and returns the rest of a row, given the judge and the row's beginning.
Jobs = dict[tuple, tuple[list[str], Callable[[Judge, dict], dict]]]


def run(flags: argparse.Namespace) -> None:
    """Judges the answers in --answers that --out has no judgments of."""
    bench = flags.bench
    questions = read_questions(flags.questions, bench)
    model, answers = read_answers(flags.answers, bench, questions)
    if not answers:
        raise InputError(f"{flags.answers}: no answer in it")
    print(f"{model}: {len(answers)} of {len(questions)} questions have an answer")
    jobs_of = mt_bench_jobs if bench is MT_BENCH else arena_hard_jobs
    judge_all(flags, model, *jobs_of(flags, questions, answers))


def done_jobs(flags: argparse.Namespace, model: str, jobs: Jobs) -> set:
    """The keys of the jobs that --out has rows of. Raises InputError if another judge wrote it, or
    if it judges other answers of the same model."""
    done = set()
    end_in_whole_line(Path(flags.out))
    for place, row in json_rows(flags.out, "question_id", "model", *flags.bench.judgment_keys):
        if (judge := judge_of(row)) != flags.judge_model:
            raise InputError(f"{place}: judged by {judge!r}, wanted {flags.judge_model!r}")
        key = row["question_id"], row.get("turn")
        if row["model"] != model or key not in list(jobs):  # a list: a key may not be hashable
            continue
        games = row["games"] if isinstance(row.get("games"), list) else [row]
        if [game.get("user_prompt") for game in games if isinstance(game, dict)] != jobs[key][0]:
            found = f"judges another answer of {model} to question {key[0]} than --answers has"
            raise InputError(f"{place}: {found}; wanted the same answers, or a fresh file")
        done.add(key)
    return done


def judge_all(flags: argparse.Namespace, model: str, jobs: Jobs, settings: dict) -> None:
    """Does the jobs that --out lacks, several at once, and writes each row when it is complete.

    When interrupted, it waits for the replies under way, so that all that was paid for is kept. If
    --out was empty and the first GIVE_UP jobs fail alike, or all give no verdict, it asks nothing
    more.

    Raises StoppedError (exit code 1) if --out was empty and no row got a verdict."""
    out = Path(flags.out)
    hold_out(out)
    done = done_jobs(flags, model, jobs)
    waiting = [key for key in jobs if key not in done]
    before = f"of {model} by {flags.judge_model}, {len(done)} there before"
    if not waiting:
        print(f"{out}: judgments {before}, none left to make")
        return
    judge = open_judge(flags, settings)
    outcomes = Outcomes()

    def do(key: tuple) -> None:
        """Counts in the job's own thread, which begins its next job before as_completed yields
        this one."""
        failure = write_judgment(judge, out, {"question_id": key[0], "model": model}, jobs[key][1])
        if outcomes.add(failure) and not done:
            judge.stop.set()

    finished = 0
    with ThreadPoolExecutor(flags.concurrency) as pool:
        try:
            # The first job teaches the parameters, and a wrong key costs one request.
            for batch in (waiting[:1], waiting[1:]):
                for future in as_completed([pool.submit(do, key) for key in batch]):
                    future.result()
                    finished += 1
                    if finished % max(1, len(waiting) // 10) == 0:
                        print(f"{finished} of {len(waiting)}", flush=True)
        except KeyboardInterrupt:
            said = "stopping after the replies under way; the same command resumes"
            print(f"{said}. A second Ctrl-C stops at once", file=sys.stderr, flush=True)
            raise
        finally:
            judge.stop.set()  # leaving the pool waits for the replies under way
    good, unclear = outcomes.counts.pop(None, 0), outcomes.counts.pop(NO_VERDICT, 0)
    said = f"{out}: {good + unclear} judgments {before}, {outcomes.counts.total()} failed"
    if outcomes.counts:
        most = outcomes.counts.most_common(5)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in most)
        said += f" ({reasons}); the same command tries them again"
    if unclear:
        said += (
            f"; {unclear} rows have no verdict (was --max-tokens {settings['max_tokens']} too "
            f"low?): to ask again with a higher one, delete them from {out}"
        )
    said += f"; raw replies in {judge.raw}"
    if not good and not done:
        raise StoppedError(said)
    print(said)


def write_judgment(judge: Judge, out: Path, about: dict, work: Callable) -> str | None:
    """Writes a row. Returns the reason if the endpoint gave no judgment, and NO_VERDICT if it gave
    one without a score or a label."""
    try:
        row = work(judge, about)
        append(judge, out, about | row)
    except UnjudgedError as error:
        return str(error)
    except InputError:
        judge.stop.set()
        raise
    verdicts = [game["score"] for game in row.get("games", [row])]
    return NO_VERDICT if set(verdicts) <= {-1, None} else None


class Outcomes:
    """How many jobs ended how, counted by several threads. Failures that differ only in numbers are
    one; None: a verdict."""

    def __init__(self):
        self.counts, self.first_alike, self.lock = Counter(), {}, Lock()

    def add(self, failure: str | None) -> bool:
        """Counts a job. True if it is the GIVE_UP-th, and all of them failed alike."""
        with self.lock:
            first = self.first_alike.setdefault(failure and re.sub(r"\d+", "0", failure), failure)
            self.counts[first] += 1
            return bool(first) and self.counts == {first: GIVE_UP}


def fill(template: object, fields: dict[str, str], place: str, *needed: str) -> str:
    """A judge prompt with its fields put in. Of each of `needed`, such as "a|b", it must have one:
    else nothing would be judged."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template)]
        if any(form or conversion for _, form, conversion in parts):
            raise ValueError("found a field with a format of its own")
        for names in needed:
            if {name for name, *_ in parts}.isdisjoint(names.split("|")):
                raise ValueError(f"found none with {names}")
        return template.format(**fields)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        wanted = f"a text with fields among {', '.join(fields)}"
        raise InputError(f"{place}: wanted {wanted} ({error})") from None


def mt_bench_jobs(flags: argparse.Namespace, questions: dict, answers: dict) -> tuple[Jobs, dict]:
    """The jobs, and the parameters of a request. Single-answer grading, one request a turn. Math,
    reasoning and coding show the judge reference answers."""
    references = read_answers(flags.references, MT_BENCH, questions)[1]
    prompts, jobs = {}, {}
    for place, row in json_rows(flags.prompts, "name", "system_prompt", "prompt_template"):
        if not isinstance(row["system_prompt"], str):
            raise InputError(f"{place}: system_prompt {shown(row['system_prompt'])}, wanted a text")
        if prompts.setdefault(str(row["name"]), row) is not row:
            raise InputError(f"{place}: a second prompt {shown(row['name'])}; wanted one")
    for number, (one, two) in answers.items():
        category, (first, second) = questions[number].category, questions[number].turns
        fields = {"question": first, "question_1": first, "question_2": second}
        fields |= {"answer": one, "answer_1": one, "answer_2": two}
        name = "single-v1"
        if category in MT_WITH_REFERENCE:
            name = "single-math-v1"
            if number not in references:
                needed = f"wanted one, since it is {category}"
                raise InputError(f"{flags.references}: no answer to question {number}; {needed}")
            fields["ref_answer_1"], fields["ref_answer_2"] = references[number]
        turns = ((1, name, "answer|answer_1"), (2, f"{name}-multi-turn", "answer_2"))
        for turn, prompt, needed in turns:
            if prompt not in prompts:
                raise InputError(f"{flags.prompts}: no prompt {prompt}, as FastChat's file has")
            template = prompts[prompt]["prompt_template"]
            user = fill(template, fields, f"{flags.prompts}: {prompt}", needed)
            jobs[number, turn] = [user], functools.partial(rate, turn, prompts[prompt], user)
    return jobs, {"temperature": 0.0, "max_tokens": flags.max_tokens or MT_MAX_TOKENS}


def rate(turn: int, prompt: dict, user: str, judge: Judge, about: dict) -> dict:
    """The rest of a row of FastChat's judgments. The score is the first number in double brackets,
    else in single ones, else -1. Of a reply that was cut, single brackets do not count: they may be
    an index in code, and the verdict be missing."""
    talk = [("system", prompt["system_prompt"]), ("user", user)]
    reply = ask(judge, talk, about | {"turn": turn})
    found = re.search(rf"\[\[{RATING}\]\]", reply.text)
    if not found and not reply.cut:
        found = re.search(rf"\[{RATING}\]", reply.text)
    score = -1
    if found:
        score = float(found[1]) if "." in found[1] else int(found[1])
    row = {"judge": [judge.model, prompt["name"]], "user_prompt": user, "judgment": reply.text}
    return row | {"score": score, "turn": turn, "tstamp": time.time()}


# The types of what is used of Arena-Hard's configuration. Its repository's present form has no
# system_prompt, its first release no regex_patterns (of labels).
CONFIG = {"temperature": (int, float), "max_tokens": (int,), "prompt_template": (str,)}
CONFIG |= {"system_prompt": (str, type(None)), "regex_patterns": (list, type(None))}


def read_config(path: str | Path) -> dict:
    """Raises InputError if a key is missing, of another type or out of range."""
    try:
        import yaml
    except ImportError:
        raise InputError(f"{path}: reading YAML needs pyyaml: pip install pyyaml") from None
    text = read_start(Path(path), JSON_BYTES, "Arena-Hard's judge_config.yaml")
    try:
        config = yaml.safe_load(text)
        found = {key: config.get(key) for key in CONFIG}
        template = found["prompt_template"]
        if isinstance(template, list) and len(template) == 1:
            found["prompt_template"] = template[0]
        for key, kinds in CONFIG.items():
            if type(found[key]) not in kinds:
                raise ValueError(f"{key} is {shown(found[key])}")
        for key, low in (("temperature", 0), ("max_tokens", 1)):
            if not low <= found[key] < 1e9:  # NaN neither
                raise ValueError(f"{key} is {shown(found[key])}, wanted {low} or more")
        if any(re.compile(pattern).groups != 1 for pattern in found["regex_patterns"] or ()):
            raise ValueError("regex_patterns: wanted one group in each")
    except (yaml.YAMLError, re.error, ValueError, TypeError, AttributeError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: wanted Arena-Hard's judge_config.yaml ({reason})") from None
    return found


def arena_hard_jobs(flags: argparse.Namespace, questions: dict, answers: dict) -> tuple[Jobs, dict]:
    """The jobs, and the parameters of a request. Two games a question: the baseline's answer comes
    first, then the model's."""
    if Path(flags.baseline).samefile(flags.answers):
        raise InputError(f"{flags.baseline}: both --baseline and --answers")
    baseline, theirs = read_answers(flags.baseline, flags.bench, questions)
    print(f"the baseline is {baseline}")
    config = read_config(flags.config)
    if flags.system_prompt:
        text = read_start(Path(flags.system_prompt), JSON_BYTES, "the judge's system prompt")
        config["system_prompt"] = text.decode(errors="replace").strip()
    elif config["system_prompt"] is None:
        print(f"{flags.config} has no system_prompt, so the judge gets none (see --system-prompt)")
    jobs = {}
    for number, (mine,) in answers.items():
        if number not in theirs:
            raise InputError(f"{flags.baseline}: no answer to question {number} of --answers")
        question, users = questions[number].turns[0], []
        for one, two in ((theirs[number][0], mine), (mine, theirs[number][0])):
            fields = {"question_1": question, "answer_1": one, "answer_2": two}
            fields |= {"QUESTION": question, "ANSWER_A": one, "ANSWER_B": two}
            place = f"{flags.config}: prompt_template"
            needed = "answer_1|ANSWER_A", "answer_2|ANSWER_B"
            users.append(fill(config["prompt_template"], fields, place, *needed))
        jobs[number, None] = users, functools.partial(play, config, users)
    limit = flags.max_tokens or config["max_tokens"]
    return jobs, {"temperature": config["temperature"], "max_tokens": limit}


def label_of(judgment: str, patterns: list[str] | None) -> str | None:
    """The verdict's label. In the first release's rule all labels must be the same one; in the
    present one (with regex_patterns) the last match of the first pattern that matches counts."""
    if patterns is None:
        labels = set(re.findall(LABEL, judgment))
        return labels.pop() if len(labels) == 1 else None
    for pattern in patterns:
        if labels := [label for label in re.findall(pattern, judgment.upper()) if label]:
            return labels[-1].strip("\n")
    return None


def play(config: dict, users: list[str], judge: Judge, about: dict) -> dict:
    """The rest of a row of Arena-Hard's judgments. In the first release's rule a judge that gives
    no label is asked once more."""
    games = []
    for game, user in enumerate(users, 1):
        talk = [("user", user)]
        if config["system_prompt"]:
            talk.insert(0, ("system", config["system_prompt"]))
        reply = ask(judge, talk, about | {"game": game}).text
        judgment = f"\n{reply}"
        if config["regex_patterns"] is None and not re.search(LABEL, judgment):
            talk += [("assistant", reply), ("user", SECOND_TRY)]
            judgment += f"\n{ask(judge, talk, about | {'game': game}).text}"
        score = label_of(judgment, config["regex_patterns"])
        games.append({"user_prompt": user, "judgment": judgment, "score": score})
    return {"judge": judge.model, "games": games}


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Adds the flags of the command."""
    add, count = command.add_argument, between(int, 1)
    needed = functools.partial(add, required=True, metavar="FILE")
    needed("--questions", help="the benchmark's question.jsonl")
    needed("--answers", help="one model's answers")
    if bench is MT_BENCH:
        needed("--references", help="reference_answer/gpt-4.jsonl")
        needed("--prompts", help="judge_prompts.jsonl")
    else:
        needed("--baseline", help="model_answer/gpt-4-0314.jsonl")
        needed("--config", help="judge_config.yaml")
        text = "the judge's, which Arena-Hard keeps in its code now [the configuration's, or none]"
        add("--system-prompt", metavar="FILE", help=text)
    needed("--out", help="judgments; those it has are kept. FILE.raw gets the replies as they came")
    text = "OpenAI-compatible, such as https://api.openai.com/v1; not needed if all is judged"
    add("--endpoint", default="", metavar="URL", help=text)
    needed("--judge-model", metavar="NAME", help="the judge, as the endpoint calls it")
    text = "environment variable that holds the endpoint's key [%(default)s]"
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help=text)
    limit = MT_MAX_TOKENS if bench is MT_BENCH else "the configuration's"
    text = f"limit of a judgment, with the judge's reasoning if it has any [{limit}]"
    add("--max-tokens", type=count, help=text)
    add("--concurrency", type=count, default=8, help="requests under way at once [%(default)s]")
    text = "seconds without a byte of the reply [%(default)s]"
    add("--timeout", type=between(float, 1e-3, 1e6), default=300.0, help=text)
    # The 12 take more than a minute, in which rate limits pass.
    text = (
        "tries of a request; waits grow from 0.5 to 8 seconds, or are Retry-After's [%(default)s]"
    )
    add("--tries", type=count, default=12, help=text)
