"""Scores of judgments, with 95% intervals: MT-Bench's means, Arena-Hard's win rates.

Reading order: `mean_score`, `read_judgments`; MT-Bench's report; Arena-Hard's, from games or from
battles; `write_report` and its table. Of several judgments of one thing the first valid one counts.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from evaluation.benchmarks import (
    ARENA_HARD,
    MT_BENCH,
    MT_TEMPERATURES,
    Bench,
    Question,
    bench_rows,
    read_questions,
)
from evaluation.intervals import bootstrap
from evaluation.rows import write_json
from support.files import InputError, shown

VERDICTS = {  # label -> points of B, number of battles
    "A>>B": (0.0, 3),
    "A>B": (0.0, 1),
    "A=B": (0.5, 1),
    "B>A": (1.0, 1),
    "B>>A": (1.0, 3),
}
ARENA_QUESTIONS = 500  # of v0.1

Scores = dict[str, dict[str, dict[str, float] | None]]  # model -> line of the table -> score


def mean_score(sums: list[float], counts: list[int]) -> dict[str, float] | None:
    """sum(sums) / sum(counts) and its 95% interval over the units, which are questions (MT-Bench)
    or battles (Arena-Hard). None if nothing counts."""
    if not sum(counts):
        return None
    sum_Q, count_Q = np.array([sums, counts], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0/0: a resample in which nothing counts
        found = bootstrap(lambda weight_Q: (weight_Q @ sum_Q) / (weight_Q @ count_Q), len(sums))
    return dict(zip(("score", "low", "high"), map(float, found), strict=True))


def read_judgments(
    flags: argparse.Namespace, questions: dict | None, report: dict, *keys: str
) -> Iterator[tuple[str, str, dict]]:
    """(place, model, row) of --judgments. Puts their judge into the report; raises InputError if
    there are two judges."""
    for path in flags.judgments:
        for place, row in bench_rows(path, "question_id", "model", *keys, questions=questions):
            judge = row.get("judge")
            judge = judge[0] if isinstance(judge, list) and judge else judge
            if judge != report.setdefault("judge", judge) or not isinstance(row["model"], str):
                raise InputError(
                    f"{place}: {row['model']!r} judged by {judge!r}, above by {report['judge']!r}; "
                    "wanted the judgments of one judge"
                )
            yield place, row["model"], row


def valid(score: object) -> bool:
    """True for a rating that counts. FastChat writes -1 if it found none."""
    return type(score) in (int, float) and math.isfinite(score) and score != -1


def report_mt_bench(flags: argparse.Namespace) -> None:
    """Means over the judged turns: all, each turn, each category.

    Of several judgments of a question and turn the first valid one counts; with --every-judgment
    all valid ones do, as in FastChat. A turn without a valid one is unparsed."""
    if flags.questions:
        questions = read_questions(flags.questions, MT_BENCH)
    else:  # the published ones: 81 to 160, ten a category
        categories = list(MT_TEMPERATURES)
        published = [Question(81 + i, categories[i // 10], []) for i in range(80)]
        questions = {question.id: question for question in published}
    ratings, counts, report = {}, Counter(), {"benchmark": MT_BENCH.name}
    for place, model, row in read_judgments(flags, questions, report, "judge", "score", "turn"):
        if row["turn"] not in (1, 2):
            raise InputError(f"{place}: turn {row['turn']!r}, wanted 1 or 2")
        of_model, key = ratings.setdefault(model, {}), (row["question_id"], row["turn"])
        counts[model, "duplicate"] += key in of_model
        counted = of_model.setdefault(key, [])
        if valid(row["score"]) and (flags.every_judgment or not counted):
            counted.append(row["score"])
            counts[model, "outside 1-10"] += not 1 <= row["score"] <= 10

    def mean(of_model: dict, turns: tuple[int, ...], category: str | None = None) -> dict | None:
        per_question = []
        for question in questions.values():
            if category in (None, question.category):
                per_question.append([s for t in turns for s in of_model.get((question.id, t), [])])
        return mean_score(list(map(sum, per_question)), list(map(len, per_question)))

    categories = dict.fromkeys(question.category for question in questions.values())
    scores: Scores = {}
    for model, of_model in ratings.items():
        counts[model, "judged"] = sum(1 for counted in of_model.values() if counted)
        counts[model, "unparsed"] = len(of_model) - counts[model, "judged"]
        counts[model, "missing"] = 2 * len(questions) - len(of_model)
        scores[model] = {
            "overall": mean(of_model, (1, 2)),
            "turn 1": mean(of_model, (1,)),
            "turn 2": mean(of_model, (2,)),
            **{category: mean(of_model, (1, 2), category) for category in categories},
        }
    kinds = ("judged", "missing", "duplicate", "unparsed", "outside 1-10")
    write_report(flags, report, scores, counts, "{:.7g}", kinds)


def report_arena_hard(flags: argparse.Namespace) -> None:
    """Win rates against the baseline, in percent. With one opponent, the mean of the battles'
    points is the Bradley-Terry maximum-likelihood win rate.

    A strong verdict is three battles, a tie is half a win in one; anything else (None, "A>>A") is
    unparsed. Arena-Hard's bootstrap draws battles as if the three of a verdict were independent,
    and so does this one: over questions, intervals would be wider."""
    questions = read_questions(flags.questions, ARENA_HARD) if flags.questions else None
    report = {"benchmark": ARENA_HARD.name}
    kinds = ("judged", "missing", "duplicate", "unparsed")
    if flags.battles:
        (points, counts), kinds = read_battles(flags, questions), ("battles", "unparsed")
    else:
        points, counts = read_games(flags, questions, report)
    scores: Scores = {}
    for model, of_model in points.items():
        won = [100 * point for point in of_model]
        scores[model] = {"win rate": mean_score(won, [1] * len(won))}
    write_report(flags, report, scores, counts, "{:.2f}", kinds)


def read_games(
    flags: argparse.Namespace, questions: dict | None, report: dict
) -> tuple[dict[str, list[float]], Counter]:
    """Model -> points of its battles, and the counts of its games. Of several judgments of a
    question the first valid verdict of each game counts."""
    verdicts, counts = {}, Counter()
    for place, model, row in read_judgments(flags, questions, report, "games"):
        games, number = row["games"], row["question_id"]
        if not isinstance(games, list) or len(games) > 2:
            raise InputError(f"{place}: wanted a list of two games; found {shown(games)}")
        of_model = verdicts.setdefault(model, {})
        counts[model, "duplicate"] += any((number, i) in of_model for i in (0, 1))
        for i, game in enumerate(games):
            label = game.get("score") if isinstance(game, dict) else None
            if of_model.get((number, i)) is None:
                of_model[number, i] = VERDICTS.get(str(label))
    points = {}
    for model, of_model in verdicts.items():
        points[model] = []
        for (_, i), verdict in of_model.items():
            counts[model, "judged" if verdict else "unparsed"] += 1
            won, battles = verdict or (0.0, 0)
            points[model] += [1 - won if i else won] * battles  # in the second game the model is A
        asked = len(questions) if questions else ARENA_QUESTIONS
        counts[model, "missing"] = 2 * asked - len(of_model)
    return points, counts


def read_battles(
    flags: argparse.Namespace, questions: dict | None
) -> tuple[dict[str, list[float]], Counter]:
    """Model -> points of its battles, and their counts, from Arena-Hard's weighted form: a row for
    each time that a verdict counts, so that duplicates cannot be told from weights."""
    points, counts = {}, Counter()
    keys = ("question_id", "model_a", "model_b", "winner")
    for place, row in bench_rows(flags.battles, *keys, questions=questions):
        sides = [row["model_a"], row["model_b"]]
        if flags.baseline_model not in sides or not all(isinstance(side, str) for side in sides):
            raise InputError(
                f"{place}: a battle of {sides[0]!r} and {sides[1]!r}; wanted one of them to be "
                f"{flags.baseline_model!r} (--baseline-model)"
            )
        mine = "model_a" if sides[1] == flags.baseline_model else "model_b"
        won = {"model_a": 0.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5} | {mine: 1.0}
        winner = str(row["winner"])
        points.setdefault(row[mine], []).extend([won[winner]] if winner in won else [])
        counts[row[mine], "battles" if winner in won else "unparsed"] += 1
    return points, counts


def write_report(
    flags: argparse.Namespace,
    report: dict,
    scores: Scores,
    counts: Counter,
    form: str,
    kinds: tuple[str, ...],
) -> None:
    """Prints the models of a report side by side, with these kinds of `counts`; writes it to
    --json."""
    read = flags.judgments or [flags.battles]
    if not scores:
        raise InputError("no judgment in " + ", ".join(map(str, read)))
    report.setdefault("judge", None)
    report["models"] = {
        model: {"scores": of_model} | {kind: counts[model, kind] for kind in kinds}
        for model, of_model in scores.items()
    }
    rows = []
    for line in next(iter(scores.values())):
        rows.append([line, *(cell(of_model[line], form) for of_model in scores.values())])
    for kind in kinds:
        rows.append([kind, *(str(counts[model, kind]) for model in scores)])
    print(table([f"{report['benchmark']}, {report['judge'] or 'battles'}", *scores], rows))
    if flags.json:
        write_json(flags.json, report, *read)


def cell(score: dict | None, form: str = "{:.2f}") -> str:
    """A score and its interval as a table shows them; a dash for None."""
    if score is None:
        return "-"
    return f"{form.format(score['score'])} [{score['low']:.2f}, {score['high']:.2f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in markdown, aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Adds the flags of the command."""
    add = command.add_argument
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--judgments", nargs="+", default=[], metavar="FILE", help="by one judge, of any models"
    )
    if bench is ARENA_HARD:
        given.add_argument("--battles", metavar="FILE", help="or Arena-Hard's weighted battles")
        add("--baseline-model", default="gpt-4-0314", metavar="NAME", help="[gpt-4-0314]")
    else:
        add(
            "--every-judgment",
            action="store_true",
            help="count all valid judgments of a question and turn, as FastChat does [the first]",
        )
    add("--questions", metavar="FILE", help="question.jsonl [the published ones]")
    add("--json", metavar="OUT", help="file of the report, as JSON")


def run(flags: argparse.Namespace) -> None:
    """Makes the report of the benchmark in flags.bench."""
    if flags.bench is MT_BENCH:
        report_mt_bench(flags)
    else:
        report_arena_hard(flags)
