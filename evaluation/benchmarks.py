""" """

import argparse
import re
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from evaluation.answers import claim_rows, load_generator, told
from evaluation.generate import CACHE_TOKENS, Request, generate
from evaluation.prompts import Prompt, encode_prompts
from evaluation.rows import add_model_flags, append_row, between, json_rows, share
from support.files import InputError, shown

MT_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}  # in the order of the questions' ids


class Bench(NamedTuple):
    """What differs between the benchmarks' answers."""

    name: str
    turns: int
    max_new_tokens: int
    at_once: int  # questions of a process that are asked, turn after turn, before its next ones are


# An answer is written when its last turn is done: killed, MT-Bench loses what 32 questions took at most.
MT_BENCH, ARENA_HARD = Bench("MT-Bench", 2, 1024, 32), Bench("Arena-Hard", 1, 4096, 500)


class Question(NamedTuple):
    """Of a benchmark: what is asked, turn after turn."""

    id: int | str
    category: str
    turns: list[str]
    place: str = ""  # "file:line"


def turn_texts(holder: object, turns: int, place: str) -> list[str]:
    """The texts of an object's "turns": strings (MT-Bench) or objects with a content (Arena-Hard)."""
    found = holder.get("turns") if isinstance(holder, dict) else None
    found = found if isinstance(found, list) else []
    texts = [turn.get("content") if isinstance(turn, dict) else turn for turn in found]
    if len(texts) != turns or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{place}: wanted turns with {turns} text{'s' * (turns > 1)}; found {shown(found)}"
        )
    return texts


def read_questions(path: str | Path, bench: Bench) -> dict[int | str, Question]:
    """By id, in file order."""
    questions = {}
    for place, row in json_rows(path, "question_id", "category", "turns"):
        question = Question(
            row["question_id"], row["category"], turn_texts(row, bench.turns, place), place
        )
        if question.id in questions:
            raise InputError(f"{place}: question {question.id} is there twice")
        if bench is MT_BENCH and question.category not in list(MT_TEMPERATURES):
            raise InputError(
                f"{place}: category {question.category!r}, wanted one of {', '.join(MT_TEMPERATURES)}"
            )
        if re.search("[\ud800-\udfff]", "".join(question.turns)):
            raise InputError(
                f"{place}: turns hold half a surrogate pair, which is not Unicode text"
            )
        questions[question.id] = question
    if not questions:
        raise InputError(f"{path}: no question in it")
    return questions


def read_answers(
    path: str | Path, bench: Bench, questions: dict
) -> tuple[str | None, dict[int | str, list[str]]]:
    """The one model of a file of answers (None if it is empty), and question id -> the texts of its turns."""
    model, answers = None, {}
    for place, row in json_rows(path, "question_id", "model_id", "choices", questions=questions):
        number, choices = row["question_id"], row["choices"]
        model = row["model_id"] if model is None else model
        if row["model_id"] != model or not isinstance(model, str):
            raise InputError(
                f"{place}: answered by {row['model_id']!r}, above by {model!r}; wanted one model"
            )
        if number in answers:
            raise InputError(f"{place}: question {number} is answered twice")
        answers[number] = turn_texts(
            choices[0] if isinstance(choices, list) and choices else None, bench.turns, place
        )
    return model, answers


def run(flags: argparse.Namespace) -> None:
    """Answers a benchmark's questions, as FastChat or Arena-Hard write them, each when its last turn is done; goes on
    where the same call stopped, as `claim_rows` has it.

    MT-Bench: two turns, the second seeing the first answer, at its category's temperature; Arena-Hard: one, greedy.
    No system prompt. token_len counts the model's own tokens, not tiktoken's as in Arena-Hard's files. Questions whose
    prompt fills the context are counted and not answered."""
    bench, questions, out = (
        flags.bench,
        read_questions(flags.questions, flags.bench),
        Path(flags.out),
    )
    home = Path(flags.model).resolve()
    flags.model_id = flags.model_id or (
        home.parent.name if home.name == "model" else home.name
    )  # train.py's OUT/model
    done = claim_rows(
        flags, "questions", lambda: read_answers(out, bench, questions)[1], "model_id", "seed"
    )
    # Shared out before the answered ones are left out: else what one process has just written moves another's share.
    mine = [
        (i, question)
        for i, question in share(list(enumerate(questions.values())))
        if question.id not in done
    ]
    counts = Counter()
    model, chat, stop_ids = load_generator(flags.model, flags.device, flags.precision)
    for start in range(0, len(mine), bench.at_once):
        asked = mine[start : start + bench.at_once]
        what, talks = (
            f"questions {start + 1} to {start + len(asked)} of {len(mine)}",
            {i: [] for i, _ in asked},
        )
        for turn in range(bench.turns):
            asked = [(i, question) for i, question in asked if i in talks]
            for i, question in asked:
                talks[i].append(("user", question.turns[turn].strip()))
            prompts = [Prompt(talks[i], None, question.place) for i, question in asked]
            encoded = encode_prompts(prompts, chat, model.config.vocab_size)
            requests = [
                Request(
                    i + turn * len(questions),
                    ids,  # each turn has random numbers of its own
                    MT_TEMPERATURES[question.category] if bench is MT_BENCH else 0.0,
                    bench.max_new_tokens,
                )
                for (i, question), ids in zip(asked, encoded, strict=True)
            ]
            answers = generate(
                model, requests, stop_ids, seed=flags.seed, cache_tokens=flags.cache_tokens
            )
            for k, new, finish in told(answers, len(requests), f"{what}, turn {turn + 1}: "):
                i, question = asked[k]
                talks[i].append(("assistant", chat.decode(new).strip()))
                counts[finish] += 1
                if finish == "overlong":
                    del talks[i]
                elif turn + 1 == bench.turns:
                    texts = [content for role, content in talks[i] if role == "assistant"]
                    turns = (
                        texts
                        if bench is MT_BENCH
                        else [{"content": texts[0], "token_len": len(new)}]
                    )
                    append_row(
                        out,
                        {
                            "question_id": question.id,
                            "answer_id": uuid.uuid4().hex,
                            "model_id": flags.model_id,
                            "choices": [{"index": 0, "turns": turns}],
                            "tstamp": time.time(),
                        },
                    )
                    counts["answered"] += 1
    print(
        f"{out}: {counts['answered']} of {len(questions)} questions answered by {flags.model_id}, {len(done)} there "
        f"before; {counts['overlong']} skipped (no room in the context); {counts['length']} turns cut at their limit"
    )


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Flags of the command."""
    add = command.add_argument
    add_model_flags(command, "the samples")
    add(
        "--cache-tokens",
        type=between(int, 1),
        default=CACHE_TOKENS,
        help="tokens of all rows of a batch together: bounds memory, the answers stay the same [%(default)s]",
    )
    add("--questions", required=True, metavar="FILE", help="the benchmark's question.jsonl")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="answers; those it has already are left. FILE.json beside it says how they were made",
    )
    add(
        "--model-id",
        metavar="NAME",
        help="whom the rows stand for [the directory's name; of OUT/model, OUT's]",
    )
