""" """

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
    read_questions,
)
from evaluation.intervals import bootstrap
from evaluation.rows import json_rows, write_json
from support.files import InputError, shown

VERDICTS = {
    "A>>B": (0.0, 3),
    "A>B": (0.0, 1),
    "A=B": (0.5, 1),
    "B>A": (1.0, 1),
    "B>>A": (1.0, 3),
}  # B's points, weight


def mean_score(sums: list[float], counts: list[int]) -> dict[str, float] | None:
    """sum(sums)/sum(counts) and its 95% interval over the units, which are questions (MT-Bench) or battles
    (Arena-Hard). None where nothing counts."""
    if not sum(counts):
        return None
    sum_Q, count_Q = np.array([sums, counts], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0/0, where nothing that was drawn counts
        found = bootstrap(lambda weight_Q: (weight_Q @ sum_Q) / (weight_Q @ count_Q), len(sums))
    return dict(zip(("score", "low", "high"), map(float, found), strict=True))


def read_judgments(
    flags: argparse.Namespace, questions: dict | None, report: dict, counts: Counter, *keys: str
) -> Iterator[tuple[str, str, dict]]:
    """(place, model, row) of a report's files, of several judgments of the same the first; the others are counted. The
    report gains their judge. InputError where there are two."""
    seen = set()
    for path in flags.judgments:
        for place, row in json_rows(path, "question_id", "model", *keys, questions=questions):
            judge = row.get("judge")
            judge = judge[0] if isinstance(judge, list) and judge else judge
            if judge != report.setdefault("judge", judge) or not isinstance(row["model"], str):
                raise InputError(
                    f"{place}: {row['model']!r} judged by {judge!r}, above by {report['judge']!r}; wanted "
                    "the judgments of one judge"
                )
            turn = row["turn"] if "turn" in keys else 1
            if turn not in (1, 2):
                raise InputError(f"{place}: turn {turn!r}, wanted 1 or 2")
            if (of := (row["model"], row["question_id"], turn)) in seen:
                counts[row["model"], "duplicate"] += 1
                continue
            seen.add(of)
            yield place, row["model"], row


def report_mt_bench(flags: argparse.Namespace) -> None:
    """Means over the judged turns: of all, of each turn, of each category. -1 and what is no number do not count."""
    if flags.questions:
        questions = read_questions(flags.questions, MT_BENCH)
    else:  # they are public and fixed: 81 to 160, ten a category
        questions = {
            81 + i: Question(81 + i, list(MT_TEMPERATURES)[i // 10], []) for i in range(80)
        }
    found, counts, report = {}, Counter(), {"benchmark": MT_BENCH.name}
    for _, name, row in read_judgments(flags, questions, report, counts, "judge", "score", "turn"):
        score = row["score"]
        parsed = type(score) in (int, float) and math.isfinite(score) and score != -1
        found.setdefault(name, {})[row["question_id"], row["turn"]] = score if parsed else None
        counts[name, "judged" if parsed else "unparsed"] += 1
        counts[name, "outside 1-10"] += parsed and not 1 <= score <= 10

    def mean(scores: dict, turns: tuple[int, ...], category: str | None = None) -> dict | None:
        per_question = [
            [scores[q.id, turn] for turn in turns if scores.get((q.id, turn)) is not None]
            for q in questions.values()
            if category in (None, q.category)
        ]
        return mean_score(list(map(sum, per_question)), list(map(len, per_question)))

    categories, scores = dict.fromkeys(question.category for question in questions.values()), {}
    for name, of_model in found.items():
        scores[name] = {"overall": mean(of_model, (1, 2))} | {
            f"turn {i}": mean(of_model, (i,)) for i in (1, 2)
        }
        scores[name] |= {category: mean(of_model, (1, 2), category) for category in categories}
        counts[name, "missing"] = 2 * len(questions) - len(of_model)
    write_report(
        flags,
        report,
        scores,
        counts,
        "{:.7g}",
        "judged",
        "missing",
        "duplicate",
        "unparsed",
        "outside 1-10",
    )


def report_arena_hard(flags: argparse.Namespace) -> None:
    """Win rates against the baseline, in percent: with one opponent, the mean of the battles' points is the
    Bradley-Terry maximum-likelihood win rate.

    A strong verdict is three battles, a tie half a win in one; what is no verdict (None, "A>>A") is unparsed and none.
    Arena-Hard's bootstrap draws battles as if the three of a verdict were independent, and so does this one: over
    questions, intervals would be wider."""
    questions = read_questions(flags.questions, ARENA_HARD) if flags.questions else None
    asked, report = (
        len(questions) if questions else 500,
        {"benchmark": ARENA_HARD.name},
    )  # 500 in v0.1
    points, counts, kinds = {}, Counter(), ("judged", "missing", "duplicate", "unparsed")
    for place, name, row in read_judgments(flags, questions, report, counts, "games"):
        if not isinstance(row["games"], list) or len(row["games"]) > 2:
            raise InputError(f"{place}: wanted a list of two games; found {shown(row['games'])}")
        of_model = points.setdefault(name, [])
        for swapped, game in enumerate(row["games"]):  # in the second game the model is A
            label = game.get("score") if isinstance(game, dict) else None
            won, weight = VERDICTS.get(str(label), (0.0, 0))
            of_model += [1 - won if swapped else won] * weight
            counts[name, "judged" if weight else "unparsed"] += 1
    for name in points:
        counts[name, "missing"] = 2 * asked - counts[name, "judged"] - counts[name, "unparsed"]
    if flags.battles:
        (points, counts), kinds = read_battles(flags, questions), ("battles", "unparsed")
    scores = {
        name: {"win rate": mean_score([100 * won for won in of_model], [1] * len(of_model))}
        for name, of_model in points.items()
    }
    write_report(flags, report, scores, counts, "{:.2f}", *kinds)


def read_battles(
    flags: argparse.Namespace, questions: dict | None
) -> tuple[dict[str, list[float]], Counter]:
    """Model -> points of its battles in Arena-Hard's weighted form, a row for each time that a verdict counts. So games
    cannot be counted, nor duplicates told from weights."""
    points, counts = {}, Counter()
    for place, row in json_rows(
        flags.battles, "question_id", "model_a", "model_b", "winner", questions=questions
    ):
        sides = [row["model_a"], row["model_b"]]
        if flags.baseline_model not in sides or not all(isinstance(side, str) for side in sides):
            raise InputError(
                f"{place}: a battle of {sides[0]!r} and {sides[1]!r}; wanted one of them to be "
                f"{flags.baseline_model!r} (--baseline-model)"
            )
        mine = "model_a" if sides[1] == flags.baseline_model else "model_b"
        won = {"model_a": [0.0], "model_b": [0.0], "tie": [0.5], "tie (bothbad)": [0.5]} | {
            mine: [1.0]
        }
        point = won.get(str(row["winner"]), [])
        points.setdefault(row[mine], []).extend(point)
        counts[row[mine], "battles" if point else "unparsed"] += 1
    return points, counts


def write_report(
    flags: argparse.Namespace, report: dict, scores: dict, counts: Counter, form: str, *kinds: str
) -> None:
    """Prints the models of a report side by side, with these kinds of `counts`; writes it with --json."""
    if not scores:
        raise InputError(
            "no judgment in " + ", ".join(map(str, flags.judgments or [flags.battles]))
        )
    report.setdefault("judge", None)
    report["models"] = {
        name: {"scores": of_model} | {kind: counts[name, kind] for kind in kinds}
        for name, of_model in scores.items()
    }
    rows = [
        [of_what, *(cell(of_model[of_what], form) for of_model in scores.values())]
        for of_what in next(iter(scores.values()))
    ]
    rows += [[kind, *(str(counts[name, kind]) for name in scores)] for kind in kinds]
    print(table([f"{report['benchmark']}, {report['judge'] or 'battles'}", *scores], rows))
    if flags.json:
        write_json(flags.json, report, *(flags.judgments or [flags.battles]))


def cell(score: dict | None, form: str = "{:.2f}") -> str:
    """A score and its interval as a table shows them; a dash for none."""
    return (
        "-"
        if score is None
        else f"{form.format(score['score'])} [{score['low']:.2f}, {score['high']:.2f}]"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """In markdown, aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def add_flags(command: argparse.ArgumentParser, bench: Bench) -> None:
    """Flags of the command."""
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--judgments", nargs="+", default=[], metavar="FILE", help="of one judge, any models"
    )
    if bench is ARENA_HARD:
        given.add_argument(
            "--battles",
            metavar="FILE",
            help="instead: weighted battles, as Arena-Hard counts them",
        )
        command.add_argument(
            "--baseline-model", default="gpt-4-0314", metavar="NAME", help="[gpt-4-0314]"
        )
    command.add_argument("--questions", metavar="FILE", help="question.jsonl [the published ones]")
    command.add_argument("--json", metavar="OUT", help="file of the report, as JSON")


def run(flags: argparse.Namespace) -> None:
    """The report of the benchmark in flags.bench."""
    (report_mt_bench if flags.bench is MT_BENCH else report_arena_hard)(flags)
