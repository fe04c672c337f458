"""MT-Bench and Arena-Hard v0.1: their files, and `answer`, a model's answers to their questions.

Reading order: Bench, Question; the readers of questions and answers; `run`, `answer_all`.
Judging is in judge.py, scores are in reports.py.
"""

import argparse
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from evaluation import rows
from evaluation.answers import add_generation_flags, claim_rows, load_generator, with_progress
from evaluation.generate import Request, generate
from evaluation.prompts import Prompt, encode_prompts
from support.files import InputError, shown
from support.processes import is_first, together

# A category's temperature, as FastChat has it; in the order of the questions' ids.
MT_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0}
MT_TEMPERATURES |= {"coding": 0.0, "extraction": 0.0, "stem": 0.1, "humanities": 0.1}


class Bench(NamedTuple):
    """How the benchmarks differ."""

    name: str
    turns: int
    max_new_tokens: int
    at_once: int  # questions whose turns a process completes before it asks the next ones
    temperatures: dict[str, float]  # by category; empty: any category, greedy
    judgment_keys: tuple[str, ...]  # of a row of judgments, beside its question_id and model


# An answer is written after its last turn: a killed MT-Bench loses 32 questions at most.
MT_BENCH = Bench("MT-Bench", 2, 1024, 32, MT_TEMPERATURES, ("judge", "score", "turn"))
ARENA_HARD = Bench("Arena-Hard", 1, 4096, 500, {}, ("games",))


class Question(NamedTuple):
    id: int | str
    category: str
    turns: list[str]  # the user's texts
    place: str  # "file:line"


# ------------------------------------------------------------------------------------------- files


def bench_rows(
    path: str | Path, *keys: str, questions: dict | None = None
) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of a benchmark's file. Raises InputError, naming the line, if a row lacks
    a key or its question_id is not one of `questions`."""
    keys = ("question_id", *keys)
    for place, row in rows.json_rows(path):
        row = first_release(row) if isinstance(row, dict) else {}
        if lacks := [key for key in keys if key not in row]:
            wanted = f"wanted a JSON object with {', '.join(keys)}"
            raise InputError(f"{place}: {', '.join(lacks)} is missing; {wanted}")
        number = row["question_id"]
        if not isinstance(number, int | str) or (questions and number not in questions):
            raise InputError(f"{place}: question_id {shown(number)} is not one of the questions")
        yield place, row


def first_release(row: dict) -> dict:
    """A row of Arena-Hard's present repository (uid, prompt, messages) gets the keys of its first
    release as well; other rows stay as they are."""
    if "uid" not in row or "question_id" in row:
        return row
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    messages = [message for message in messages if isinstance(message, dict)]
    said = [one.get("content") for one in messages if one.get("role") == "assistant"]
    first = {"question_id": row["uid"], "turns": [row.get("prompt")]}
    return row | first | {"model_id": row.get("model"), "choices": [{"turns": said}]}


def judge_of(row: dict) -> object:
    """The judge's name in a row of judgments. MT-Bench's have a list of judge and prompt."""
    judge = row.get("judge")
    return judge[0] if isinstance(judge, list) and judge else judge


def turn_texts(holder: object, turns: int, place: str) -> list[str]:
    """The texts of an object's "turns": strings, or objects that hold one as content (Arena-Hard)
    or answer (its present form)."""
    found = holder.get("turns") if isinstance(holder, dict) else None
    texts = []
    for turn in found if isinstance(found, list) else []:
        texts.append(turn.get("content", turn.get("answer")) if isinstance(turn, dict) else turn)
    if len(texts) != turns or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place}: wanted turns with {turns} text(s); found {shown(found)}")
    if re.search("[\ud800-\udfff]", "".join(texts)):
        raise InputError(f"{place}: turns hold half a surrogate pair; wanted Unicode text")
    return texts


def read_questions(path: str | Path, bench: Bench) -> dict[int | str, Question]:
    """By id, in the file's order. Raises InputError for a question that cannot be asked."""
    questions = {}
    for place, row in bench_rows(path, "category", "turns"):
        number, category = row["question_id"], row["category"]
        turns = turn_texts(row, bench.turns, place)
        if number in questions:
            raise InputError(f"{place}: question {number} is there twice")
        if bench.temperatures and category not in list(bench.temperatures):
            wanted = ", ".join(bench.temperatures)
            raise InputError(f"{place}: category {shown(category)}, wanted one of {wanted}")
        if not all(map(str.strip, turns)):
            raise InputError(f"{place}: a turn is empty; wanted a question")
        questions[number] = Question(number, category, turns, place)
    if not questions:
        raise InputError(f"{path}: no question in it")
    return questions


def read_answers(
    path: str | Path, bench: Bench, questions: dict
) -> tuple[str | None, dict[int | str, list[str]]]:
    """The one model of a file of answers (None if it is empty), and question id -> the texts of
    its turns."""
    model, answers = None, {}
    for place, row in bench_rows(path, "model_id", "choices", questions=questions):
        number, author, choices = row["question_id"], row["model_id"], row["choices"]
        model = author if model is None else model
        if not isinstance(author, str) or not author:
            raise InputError(f"{place}: model_id {shown(author)}, wanted the model's name")
        if author != model:
            raise InputError(f"{place}: by {author!r}, above by {model!r}; wanted one model")
        if number in answers:
            raise InputError(f"{place}: question {number} is answered twice")
        first = choices[0] if isinstance(choices, list) and choices else None
        answers[number] = turn_texts(first, bench.turns, place)
    return model, answers


# ----------------------------------------------------------------------------------------- answers


def run(flags: argparse.Namespace) -> None:
    """Answers a benchmark's questions, in FastChat's and Arena-Hard's form.

    MT-Bench: two turns, at its category's temperature; the second sees the first answer.
    Arena-Hard: one turn, greedy. No system prompt. A call that was interrupted continues when it is
    made again. token_len counts the model's own tokens (Arena-Hard's files have tiktoken's)."""
    bench, out = flags.bench, Path(flags.out)
    questions = list(read_questions(flags.questions, bench).values())
    ids = [question.id for question in questions]
    if flags.model_id is None:
        home = Path(flags.model).resolve()
        flags.model_id = home.parent.name if home.name == "model" else home.name  # OUT/model: OUT
    counts = Counter()
    with rows.torchrun_group():
        done = claim_rows(flags, "questions", "question_id", ids, "model_id", "seed")
        mine = [i for i in rows.share(range(len(ids))) if ids[i] not in done]
        for i, turns in answer_all(flags, questions, mine, counts):
            row = {"question_id": ids[i], "answer_id": uuid.uuid4().hex, "model_id": flags.model_id}
            row |= {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
            rows.append_row(out, row)
            counts["answered"] += 1
        rows.wait_for_all()
        if is_first():
            rows.join_parts(out, "question_id", ids)
        counts = sum(together(lambda: counts), Counter())
    if not is_first():
        return
    print(
        f"{out}: {counts['answered']} of {len(ids)} questions answered by {flags.model_id}, "
        f"{len(done)} there before; {counts['overlong']} skipped (no room in the context); "
        f"{counts['length']} turns cut at their limit"
    )


def answer_all(
    flags: argparse.Namespace, questions: list[Question], mine: list[int], counts: Counter
) -> Iterator[tuple[int, list]]:
    """Asks questions[i] for each i of `mine`, turn after turn, and yields i and its turns as the
    benchmark writes them. `counts` counts how turns ended. A question whose prompt fills the
    context is left out."""
    bench, options = flags.bench, {"seed": flags.seed, "cache_tokens": flags.cache_tokens}
    model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
    for start in range(0, len(mine), bench.at_once):
        talks = {i: [] for i in mine[start : start + bench.at_once]}
        progress = f"questions {start + 1} to {start + len(talks)} of {len(mine)}, turn"
        for turn in range(bench.turns):
            asked = list(talks)
            for i in asked:
                talks[i].append(("user", questions[i].turns[turn].strip()))
            prompts = [Prompt(talks[i], None, questions[i].place) for i in asked]
            encoded = encode_prompts(prompts, chat, model.config.vocab_size)
            requests = []
            for i, ids in zip(asked, encoded, strict=True):
                number = i + turn * len(questions)  # each turn has random numbers of its own
                temperature = bench.temperatures.get(questions[i].category, 0.0)
                requests.append(Request(number, ids, temperature, bench.max_new_tokens))
            answers = generate(model, requests, stop_ids, **options)
            for k, new, finish in with_progress(answers, len(asked), f"{progress} {turn + 1}: "):
                i = asked[k]
                counts[finish] += 1
                if finish == "overlong":
                    del talks[i]
                    continue
                talks[i].append(("assistant", chat.decode(new).strip()))
                if turn + 1 == bench.turns:
                    texts = [text for role, text in talks[i] if role == "assistant"]
                    if bench is ARENA_HARD:
                        texts = [{"content": texts[0], "token_len": len(new)}]
                    yield i, texts


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Adds the flags of the command."""
    add_generation_flags(command)
    text = "answers; those it has already are kept. FILE.json says how they were made"
    add = command.add_argument
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add("--out", required=True, metavar="FILE", help=text)
    add("--model-id", metavar="NAME", help="the model's name in the rows [its directory's]")
