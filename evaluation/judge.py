"""A judge's verdicts on a model's answers, in FastChat's and Arena-Hard's own forms.

Reading order: `judge_all` (many requests at once, resumed where they stopped), then the benchmarks:
`judge_mt_bench` with `rate`, `judge_arena_hard` with `play`. How one request is made is in
endpoint.py, the reports are in reports.py.
"""

import argparse
import functools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

from evaluation.benchmarks import ARENA_HARD, MT_BENCH, Bench, read_answers, read_questions
from evaluation.endpoint import Judge, UnjudgedError, append, ask, end_in_whole_line, open_judge
from evaluation.rows import between, json_rows
from support.files import JSON_BYTES, InputError, read_start
from support.processes import StoppedError

MT_WITH_REFERENCE = ("math", "reasoning", "coding")
MT_MAX_TOKENS = 2048  # of a judgment, at temperature 0; Arena-Hard's configuration has its own
RATINGS = (r"\[\[(\d{1,9}(?:\.\d*)?)\]\]", r"\[(\d{1,9}(?:\.\d*)?)\]")  # the first that is found
LABEL = r"\[\[([AB<>=]+)\]\]"
SECOND_TRY = "continue your judgment and finish by outputting a final verdict label"

# The user prompts that the judge sees, and the function that makes the row.
Job = tuple[list[str], Callable[[Judge], dict]]


def done_jobs(flags: argparse.Namespace, model: str, jobs: dict[tuple, Job], names: tuple) -> set:
    """The keys of the jobs that --out has rows of. Raises InputError if another judge wrote it, or
    if it judges other answers of the same model."""
    done = set()
    end_in_whole_line(Path(flags.out))
    for place, row in json_rows(flags.out, "question_id", "model", "judge", *names):
        judge = row["judge"][0] if isinstance(row["judge"], list) and row["judge"] else row["judge"]
        if judge != flags.judge_model:
            raise InputError(
                f"{place}: judged by {judge!r}, wanted {flags.judge_model!r} (--judge-model)"
            )
        key = tuple(row[name] for name in names)
        if row["model"] != model or key not in list(jobs):  # a list: a key may not be hashable
            continue
        games = row["games"] if isinstance(row.get("games"), list) else [row]
        prompts = [game.get("user_prompt") for game in games if isinstance(game, dict)]
        if prompts != jobs[key][0]:
            raise InputError(
                f"{place}: what was judged is not {model}'s answer to question {key[0]} in "
                "--answers; wanted the same answers, or a fresh file"
            )
        done.add(key)
    return done


def judge_all(
    flags: argparse.Namespace, model: str, jobs: dict[tuple, Job], names: tuple, settings: dict
) -> None:
    """Does the jobs that --out lacks, several at once, and writes each row when it is complete.

    A job's key is its row's values of `names`. When interrupted, it waits for the replies under
    way, so that all that was paid for is kept. Raises StoppedError (exit code 1) if nothing was
    judged at all."""
    out = Path(flags.out)
    done = done_jobs(flags, model, jobs, names)
    waiting = [work for key, (_, work) in jobs.items() if key not in done]
    before = f"{len(done)} there before"
    if not waiting:
        print(f"{out}: judgments of {model} by {flags.judge_model}: {before}, none left to make")
        return
    judge = open_judge(flags, settings)

    def do(work: Callable[[Judge], dict]) -> None:
        try:
            append(judge, out, work(judge))
        except InputError:
            judge.stop.set()  # here, since this thread's next job begins before others hear of it
            raise

    made, failed = 0, Counter()
    with ThreadPoolExecutor(flags.concurrency) as pool:
        try:
            futures = [pool.submit(do, waiting[0])]
            wait(futures)  # the first job teaches the parameters, and a wrong key costs one request
            if not judge.stop.is_set():
                futures += [pool.submit(do, work) for work in waiting[1:]]
            for count, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                    made += 1
                except UnjudgedError as error:
                    failed[str(error)] += 1
                if count % max(1, len(waiting) // 10) == 0:
                    print(f"{count} of {len(waiting)}", flush=True)
        except BaseException as error:
            judge.stop.set()  # leaving the pool waits for the replies under way
            if isinstance(error, KeyboardInterrupt):
                print(
                    f"stopping after the replies under way; {out} keeps what is judged, and the "
                    "same command resumes. A second Ctrl-C stops at once",
                    file=sys.stderr,
                    flush=True,
                )
            raise
    said = f"{out}: {made} judgments of {model} by {judge.model}, {before}, {failed.total()} failed"
    if failed:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in failed.most_common(5))
        said += f" ({reasons}); the same command tries them again"
    said += f"; raw replies in {judge.raw}"
    if not made and not done:
        raise StoppedError(said)
    print(said)


def fill(template: object, fields: dict[str, str], place: str) -> str:
    """A judge prompt with its fields put in."""
    try:
        return template.format(**fields)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{place}: wanted a text with fields among {', '.join(fields)} ({error})"
        ) from None


def judge_mt_bench(flags: argparse.Namespace) -> None:
    """Single-answer grading, one request a turn. Math, reasoning and coding show the judge
    reference answers."""
    questions = read_questions(flags.questions, MT_BENCH)
    model, answers = read_answers(flags.answers, MT_BENCH, questions)
    references = read_answers(flags.references, MT_BENCH, questions)[1]
    rows = json_rows(flags.prompts, "name", "system_prompt", "prompt_template")
    prompts = {str(row["name"]): row for _, row in rows}
    jobs = {}
    for number, (one, two) in answers.items():
        question = questions[number]
        first, second = question.turns
        fields = {"question": first, "question_1": first, "question_2": second}
        fields |= {"answer": one, "answer_1": one, "answer_2": two}
        name = "single-v1"
        if question.category in MT_WITH_REFERENCE:
            name = "single-math-v1"
            if number not in references:
                raise InputError(
                    f"{flags.references}: no answer to question {number}, "
                    f"{question.category} needs one"
                )
            fields["ref_answer_1"], fields["ref_answer_2"] = references[number]
        for turn, prompt in ((1, name), (2, f"{name}-multi-turn")):
            if prompt not in prompts:
                raise InputError(
                    f"{flags.prompts}: no prompt {prompt}; wanted FastChat's judge_prompts.jsonl"
                )
            template = prompts[prompt]["prompt_template"]
            user = fill(template, fields, f"{flags.prompts}: {prompt}")
            work = functools.partial(rate, model, number, turn, prompts[prompt], user)
            jobs[number, turn] = [user], work
    print(f"{model}: {len(answers)} of {len(questions)} questions have an answer", flush=True)
    settings = {"temperature": 0.0, "max_tokens": flags.max_tokens or MT_MAX_TOKENS}
    judge_all(flags, model, jobs, ("question_id", "turn"), settings)


def rate(model: str, number: int | str, turn: int, prompt: dict, user: str, judge: Judge) -> dict:
    """A row of FastChat's judgments. The score is -1 if the judge gave none."""
    about = {"question_id": number, "model": model, "turn": turn}
    reply = ask(judge, [("system", prompt["system_prompt"]), ("user", user)], about)
    found = re.search(RATINGS[0], reply) or re.search(RATINGS[1], reply)
    score = -1
    if found:
        score = float(found[1]) if "." in found[1] else int(found[1])
    return {
        "question_id": number,
        "model": model,
        "judge": [judge.model, prompt["name"]],
        "user_prompt": user,
        "judgment": reply,
        "score": score,
        "turn": turn,
        "tstamp": time.time(),
    }


CONFIG = {  # Arena-Hard's configuration: the types of the keys that are used
    "temperature": (int, float),
    "max_tokens": (int,),
    "prompt_template": (str, list),
    "system_prompt": (str, type(None)),  # the repository's present form has none
    "regex_patterns": (list, type(None)),  # labels; the first release's form has none
}


def read_config(path: str | Path) -> dict:
    """Raises InputError if a key is missing or of another type."""
    try:
        import yaml
    except ImportError:
        raise InputError(f"{path}: reading YAML needs pyyaml: pip install pyyaml") from None
    text = read_start(Path(path), JSON_BYTES, "Arena-Hard's judge_config.yaml")
    try:
        config = yaml.safe_load(text)
        found = {key: config.get(key) for key in CONFIG}
        patterns = [re.compile(pattern) for pattern in found["regex_patterns"] or ()]
    except (yaml.YAMLError, re.error, ValueError, TypeError, AttributeError, RecursionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: wanted Arena-Hard's judge_config.yaml ({reason})") from None
    for key, kinds in CONFIG.items():
        if type(found[key]) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{path}: {key} is a {type(found[key]).__name__}, wanted {names}")
    if isinstance(found["prompt_template"], list):
        if len(found["prompt_template"]) != 1:
            raise InputError(f"{path}: prompt_template: wanted one text")
        (found["prompt_template"],) = found["prompt_template"]
    if any(pattern.groups != 1 for pattern in patterns):
        raise InputError(f"{path}: regex_patterns: wanted one group in each")
    return found


def judge_arena_hard(flags: argparse.Namespace) -> None:
    """Two games a question: the baseline's answer comes first, then the model's."""
    questions = read_questions(flags.questions, ARENA_HARD)
    model, answers = read_answers(flags.answers, ARENA_HARD, questions)
    baseline, theirs = read_answers(flags.baseline, ARENA_HARD, questions)
    config = read_config(flags.config)
    if flags.system_prompt:
        text = read_start(Path(flags.system_prompt), JSON_BYTES, "the judge's system prompt")
        config["system_prompt"] = text.decode(errors="replace").strip()
    elif config["system_prompt"] is None:
        print(
            f"{flags.config} has no system_prompt, so the judge gets none. Arena-Hard's repository "
            "keeps it in its code now: --system-prompt FILE gives it",
            flush=True,
        )
    jobs = {}
    for number, (mine,) in answers.items():
        if number not in theirs:
            raise InputError(
                f"{flags.baseline}: no answer to question {number}, wanted all those of --answers"
            )
        users = []
        for one, two in ((theirs[number][0], mine), (mine, theirs[number][0])):
            question = questions[number].turns[0]
            fields = {"question_1": question, "answer_1": one, "answer_2": two}
            fields |= {"QUESTION": question, "ANSWER_A": one, "ANSWER_B": two}
            users.append(
                fill(config["prompt_template"], fields, f"{flags.config}: prompt_template")
            )
        jobs[number,] = users, functools.partial(play, model, number, config, users)
    print(
        f"{model} against {baseline}: {len(answers)} of {len(questions)} questions have an answer",
        flush=True,
    )
    limit = flags.max_tokens or config["max_tokens"]
    settings = {"temperature": config["temperature"], "max_tokens": limit}
    judge_all(flags, model, jobs, ("question_id",), settings)


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


def play(model: str, number: int | str, config: dict, users: list[str], judge: Judge) -> dict:
    """A row of Arena-Hard's judgments. In the first release's rule a judge that gives no label is
    asked once more."""
    games = []
    for game, user in enumerate(users, 1):
        about = {"question_id": number, "model": model, "game": game}
        talk = [("user", user)]
        if config["system_prompt"]:
            talk.insert(0, ("system", config["system_prompt"]))
        reply = ask(judge, talk, about)
        judgment = f"\n{reply}"
        if config["regex_patterns"] is None and not re.search(LABEL, judgment):
            talk += [("assistant", reply), ("user", SECOND_TRY)]
            judgment += f"\n{ask(judge, talk, about)}"
        score = label_of(judgment, config["regex_patterns"])
        games.append({"user_prompt": user, "judgment": judgment, "score": score})
    return {"question_id": number, "model": model, "judge": judge.model, "games": games}


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Adds the flags of the command."""
    add = command.add_argument
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add("--answers", required=True, metavar="FILE", help="one model's answers")
    if bench is MT_BENCH:
        add("--references", required=True, metavar="FILE", help="reference_answer/gpt-4.jsonl")
        add("--prompts", required=True, metavar="FILE", help="judge_prompts.jsonl")
    else:
        add("--baseline", required=True, metavar="FILE", help="model_answer/gpt-4-0314.jsonl")
        add("--config", required=True, metavar="FILE", help="judge_config.yaml")
        add("--system-prompt", metavar="FILE", help="the judge's, instead of the configuration's")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="judgments; those it has already are kept. The replies as they came go to FILE.raw",
    )
    add(
        "--endpoint",
        default="",
        metavar="URL",
        help="an OpenAI-compatible chat service, such as https://api.openai.com/v1; not needed if "
        "all is judged",
    )
    add("--judge-model", required=True, metavar="NAME", help="the judge, as the endpoint calls it")
    add(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the endpoint's key [OPENAI_API_KEY]",
    )
    limit = MT_MAX_TOKENS if bench is MT_BENCH else "the configuration's"
    add(
        "--max-tokens",
        type=between(int, 1),
        help=f"limit of a judgment, with the judge's reasoning if it has any [{limit}]",
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
        default=12,  # waits of 0.5 to 8 seconds: more than a minute, in which rate limits pass
        help="tries of a request before it counts as failed; the client waits between them, as "
        "long as Retry-After says (up to two minutes) or longer each time (up to 8 s) [12]",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the judge of the benchmark in flags.bench."""
    if flags.bench is MT_BENCH:
        judge_mt_bench(flags)
    else:
        judge_arena_hard(flags)
