"""MT-Bench and Arena-Hard v0.1: their files, and `answer`, a model's answers to their questions.

Reading order: Bench, Question; the readers of questions and answers; `run`, `answer_together`.
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

from data import ChatFormat
from evaluation.answers import add_generation_flags, claim_rows, load_generator, with_progress
from evaluation.generate import Request, generate
from evaluation.prompts import Prompt, encode_prompts
from evaluation.rows import (
    append_row,
    is_first,
    join_parts,
    json_rows,
    share,
    torchrun_group,
    wait_for_all,
)
from model import Llama
from support.files import InputError, shown

MT_TEMPERATURES = {  # FastChat's; in the order of the questions' ids
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


class Bench(NamedTuple):
    """How the benchmarks' answers differ."""

    name: str
    turns: int
    max_new_tokens: int
    at_once: int  # questions whose turns a process completes before it asks the next ones


# An answer is written after its last turn: a killed MT-Bench loses 32 questions at most.
MT_BENCH = Bench("MT-Bench", 2, 1024, 32)
ARENA_HARD = Bench("Arena-Hard", 1, 4096, 500)


class Question(NamedTuple):
    id: int | str
    category: str
    turns: list[str]  # the user's texts
    place: str = ""  # "file:line"


# ------------------------------------------------------------------------------------------- files


def bench_rows(
    path: str | Path, *keys: str, questions: dict | None = None
) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of a benchmark's file. Raises InputError, naming the line, if a row lacks
    a key or its question_id is not one of `questions`.

    Rows of Arena-Hard's present repository (uid, prompt, messages) get the keys of its first
    release as well."""
    for place, row in json_rows(path):
        if isinstance(row, dict) and "question_id" not in row and "uid" in row:
            row = first_release(row)
        if lacks := [key for key in keys if not isinstance(row, dict) or key not in row]:
            raise InputError(
                f"{place}: {', '.join(lacks)} is missing; wanted a JSON object with "
                f"{', '.join(keys)}; found {shown(row)}"
            )
        number = row["question_id"]
        if not isinstance(number, int | str) or (questions and number not in questions):
            raise InputError(f"{place}: question_id {shown(number)} is not one of the questions")
        yield place, row


def first_release(row: dict) -> dict:
    """A question, answer or judgment of Arena-Hard's present repository, in the first release's
    keys."""
    row = row | {"question_id": row["uid"]}
    if "prompt" in row:
        row["turns"] = [row["prompt"]]
    if isinstance(row.get("messages"), list):
        messages = [message for message in row["messages"] if isinstance(message, dict)]
        turns = [one.get("content") for one in messages if one.get("role") == "assistant"]
        row["model_id"], row["choices"] = row.get("model"), [{"turns": turns}]
    return row


def turn_texts(holder: object, turns: int, place: str) -> list[str]:
    """The texts of an object's "turns": strings, or objects that hold one as content (Arena-Hard)
    or answer (its present form)."""
    found = holder.get("turns") if isinstance(holder, dict) else None
    texts = []
    for turn in found if isinstance(found, list) else []:
        texts.append(turn.get("content", turn.get("answer")) if isinstance(turn, dict) else turn)
    if len(texts) != turns or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{place}: wanted turns with {turns} text{'s' * (turns > 1)}; found {shown(found)}"
        )
    return texts


def read_questions(path: str | Path, bench: Bench) -> dict[int | str, Question]:
    """By id, in the file's order. Raises InputError for a question that cannot be asked."""
    questions = {}
    for place, row in bench_rows(path, "question_id", "category", "turns"):
        number, category = row["question_id"], row["category"]
        turns = turn_texts(row, bench.turns, place)
        if number in questions:
            raise InputError(f"{place}: question {number} is there twice")
        if bench is MT_BENCH and category not in list(MT_TEMPERATURES):
            raise InputError(
                f"{place}: category {category!r}, wanted one of {', '.join(MT_TEMPERATURES)}"
            )
        if re.search("[\ud800-\udfff]", "".join(turns)):
            raise InputError(
                f"{place}: turns hold half a surrogate pair, which is not Unicode text"
            )
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
    keys = ("question_id", "model_id", "choices")
    for place, row in bench_rows(path, *keys, questions=questions):
        number, choices = row["question_id"], row["choices"]
        model = row["model_id"] if model is None else model
        if row["model_id"] != model or not isinstance(model, str):
            raise InputError(
                f"{place}: answered by {row['model_id']!r}, above by {model!r}; wanted one model"
            )
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
    questions = read_questions(flags.questions, bench)
    if flags.model_id is None:
        home = Path(flags.model).resolve()
        flags.model_id = home.parent.name if home.name == "model" else home.name  # OUT/model: OUT
    ids, everything = list(questions), list(questions.values())
    counts = Counter()
    with torchrun_group():
        done = claim_rows(flags, "questions", "question_id", ids, "model_id", "seed")
        mine = [i for i in share(range(len(ids))) if ids[i] not in done]
        generator = load_generator(flags.model, flags.device, flags.precision)
        for start in range(0, len(mine), bench.at_once):
            asked = mine[start : start + bench.at_once]
            progress = f"questions {start + 1} to {start + len(asked)} of {len(mine)}, "
            answers = answer_together(generator, flags, everything, asked, counts, progress)
            for i, turns in answers:
                row = {
                    "question_id": ids[i],
                    "answer_id": uuid.uuid4().hex,
                    "model_id": flags.model_id,
                    "choices": [{"index": 0, "turns": turns}],
                    "tstamp": time.time(),
                }
                append_row(out, row)
                counts["answered"] += 1
        wait_for_all()
        if is_first():
            join_parts(out, "question_id", ids)
    print(
        f"{out}: {counts['answered']} of {len(ids)} questions answered by {flags.model_id}, "
        f"{len(done)} there before; {counts['overlong']} skipped (no room in the context); "
        f"{counts['length']} turns cut at their limit"
    )


def answer_together(
    generator: tuple[Llama, ChatFormat, frozenset[int]],
    flags: argparse.Namespace,
    questions: list[Question],
    asked: list[int],
    counts: Counter,
    progress: str,
) -> Iterator[tuple[int, list]]:
    """Asks questions[i] for each i of `asked`, turn after turn, and yields i and the answers as the
    benchmark writes them, when the last one is there.

    `generator` is what load_generator returns; `counts` counts how turns ended. A question whose
    prompt fills the context is left out."""
    model, chat, stop_ids = generator
    talks = {i: [] for i in asked}
    for turn in range(flags.bench.turns):
        asked = list(talks)
        requests = []
        for i in asked:
            talks[i].append(("user", questions[i].turns[turn].strip()))
        prompts = [Prompt(talks[i], None, questions[i].place) for i in asked]
        encoded = encode_prompts(prompts, chat, model.config.vocab_size)
        for i, ids in zip(asked, encoded, strict=True):
            mt_bench = flags.bench is MT_BENCH
            temperature = MT_TEMPERATURES[questions[i].category] if mt_bench else 0.0
            number = i + turn * len(questions)  # each turn has random numbers of its own
            requests.append(Request(number, ids, temperature, flags.bench.max_new_tokens))
        answers = generate(
            model, requests, stop_ids, seed=flags.seed, cache_tokens=flags.cache_tokens
        )
        for k, new, finish in with_progress(answers, len(asked), f"{progress}turn {turn + 1}: "):
            i = asked[k]
            counts[finish] += 1
            if finish == "overlong":
                del talks[i]
                continue
            talks[i].append(("assistant", chat.decode(new).strip()))
            if turn + 1 == flags.bench.turns:
                texts = [text for role, text in talks[i] if role == "assistant"]
                if flags.bench is ARENA_HARD:
                    texts = [{"content": texts[0], "token_len": len(new)}]
                yield i, texts


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Adds the flags of the command."""
    add = command.add_argument
    add_generation_flags(command)
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="answers; those it has already are kept. FILE.json beside it says how they were made",
    )
    add("--model-id", metavar="NAME", help="the model's name in the rows [its directory's]")
