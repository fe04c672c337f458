"""Scores of judgments, with 95% intervals: MT-Bench's means, Arena-Hard's win rates.

Reading order: `run`; the readers of judgments, `ratings` (MT-Bench), `points` (Arena-Hard) and
battles; scores and counts; tables. Of several judgments of one thing the first valid one counts.
"""

import argparse
import math
from collections import Counter

import numpy as np

from evaluation.benchmarks import MT_BENCH, Bench, bench_rows, judge_of, read_questions
from evaluation.intervals import bootstrap
from evaluation.rows import write_json
from support.files import InputError, shown

# Label -> the points of B in percent. A strong verdict is three battles, a tie half a win in one.
VERDICTS = {"A>>B": [0, 0, 0], "A>B": [0], "A=B": [50], "B>A": [100], "B>>A": [100, 100, 100]}
ARENA_QUESTIONS = 500  # of v0.1

Judged = dict[tuple, list[float]]  # (question's id, turn or game) -> its scores; [] if unparsed


def run(flags: argparse.Namespace) -> None:
    """Prints the models of a report side by side; writes it to --json."""
    bench, questions = flags.bench, {}
    if flags.questions:
        asked = read_questions(flags.questions, bench).values()
        questions = {question.id: question.category for question in asked}
    elif bench is MT_BENCH:  # the published ones: 81 to 160, ten a category
        questions = {81 + i: list(bench.temperatures)[i // 10] for i in range(80)}
    duplicates = Counter()
    if flags.battles:
        judge, found = None, read_battles(flags, questions)
    else:
        judge, found = read_judgments(flags, questions, duplicates)
    models = {}
    for model, judged in found.items():
        units = units_of(judged, questions if bench is MT_BENCH else None)
        scores = {line: mean_score(units[line]) for line in units}
        counts = counts_of(flags, judged, questions, duplicates[model])
        models[model] = {"scores": scores} | counts
    read = flags.judgments or [flags.battles]
    if not models:
        raise InputError("no judgment in " + ", ".join(map(str, read)))
    form = "{:.7g}" if bench is MT_BENCH else "{:.2f}"
    rows = [[line, *(cell(of["scores"][line], form) for of in models.values())] for line in scores]
    rows += [[kind, *(str(of[kind]) for of in models.values())] for kind in counts]
    print(table([f"{bench.name}, {judge or 'battles'}", *models], rows))
    if flags.json:
        report = {"benchmark": bench.name, "judge": judge, "models": models}
        write_json(flags.json, report, *read)


def read_judgments(
    flags: argparse.Namespace, questions: dict, duplicates: Counter
) -> tuple[object, dict[str, Judged]]:
    """The judge of --judgments, and model -> its scores. Counts each model's duplicates. Raises
    InputError if there are two judges.

    Of several judgments of a turn or game the first valid one counts; with --every-judgment all
    valid ones do, as in FastChat."""
    found, judges = {}, []
    scores_of = ratings if flags.bench is MT_BENCH else points
    for path in flags.judgments:
        keys = ("model", *flags.bench.judgment_keys)
        for place, row in bench_rows(path, *keys, questions=questions):
            model = row["model"]
            judges.append(judge_of(row))
            if judges[0] != judges[-1] or not isinstance(model, str):
                raise InputError(
                    f"{place}: {model!r} judged by {judges[-1]!r}, above by {judges[0]!r}; "
                    "wanted the judgments of one judge"
                )
            judged, scores = found.setdefault(model, {}), scores_of(place, row)
            duplicates[model] += any(key in judged for key in scores)
            for key, new in scores.items():
                if flags.every_judgment or not judged.get(key):
                    judged[key] = judged.get(key, []) + new
    return next(iter(judges), None), found


def ratings(place: str, row: dict) -> Judged:
    """The score of a row of MT-Bench. FastChat writes -1 if it found none."""
    score, turn = row["score"], row["turn"]
    if turn not in (1, 2):
        raise InputError(f"{place}: turn {turn!r}, wanted 1 or 2")
    if type(score) in (int, float) and abs(score) >= 1e9:  # judge.RATING has 9 digits at most
        raise InputError(f"{place}: score {shown(score)}, wanted one of at most 9 digits")
    valid = type(score) in (int, float) and math.isfinite(score) and score != -1
    return {(row["question_id"], turn): [score] if valid else []}


def points(place: str, row: dict) -> Judged:
    """The model's points in a row of Arena-Hard: it is B in the first game, A in the second. Any
    other label than a verdict's (None, "A>>A") is unparsed."""
    if not isinstance(row["games"], list) or len(row["games"]) > 2:
        raise InputError(f"{place}: wanted a list of two games; found {shown(row['games'])}")
    judged = {}
    for i, game in enumerate(row["games"]):
        label = game.get("score") if isinstance(game, dict) else None
        of_b = VERDICTS.get(str(label), [])
        judged[row["question_id"], i] = [100 - point for point in of_b] if i else of_b
    return judged


def read_battles(flags: argparse.Namespace, questions: dict) -> dict[str, Judged]:
    """Model -> its points, from Arena-Hard's weighted form: a row for each time that a verdict
    counts, so that duplicates cannot be told from weights."""
    found, baseline = {}, flags.baseline_model
    keys = ("model_a", "model_b", "winner")
    for place, row in bench_rows(flags.battles, *keys, questions=questions):
        a, b = row["model_a"], row["model_b"]
        if baseline not in (a, b) or not isinstance(a, str) or not isinstance(b, str):
            wanted = f"wanted one of them to be {baseline!r} (--baseline-model)"
            raise InputError(f"{place}: a battle of {a!r} and {b!r}; {wanted}")
        mine = "model_a" if b == baseline else "model_b"
        won = {"model_a": [0], "model_b": [0], "tie": [50], "tie (bothbad)": [50]} | {mine: [100]}
        found.setdefault(row[mine], {})[place,] = won.get(str(row["winner"]), [])
    return found


def units_of(judged: Judged, questions: dict | None) -> dict[str, list[list[float]]]:
    """Line of the table -> the scores of each unit that an interval draws.

    Arena-Hard (questions is None): the battles. Their mean is the Bradley-Terry maximum-likelihood
    win rate, since there is one opponent. Arena-Hard's bootstrap draws the three battles of a
    strong verdict as if they were independent, and so does this one: over questions, intervals
    would be wider. MT-Bench: the questions; all turns, each turn, each category."""
    if questions is None:
        return {"win rate": [[score] for scores in judged.values() for score in scores]}
    units = {line: [] for line in ("overall", "turn 1", "turn 2", *questions.values())}
    for number, category in questions.items():
        one, two = judged.get((number, 1), []), judged.get((number, 2), [])
        units["overall"].append(one + two)
        units["turn 1"].append(one)
        units["turn 2"].append(two)
        units[category].append(one + two)
    return units


def mean_score(units: list[list[float]]) -> dict[str, float] | None:
    """The mean of all scores, and its 95% interval over the units. None if there is no score."""
    if not any(units):
        return None
    sum_U, count_U = np.array([(sum(unit), len(unit)) for unit in units], dtype=np.float64).T
    with np.errstate(invalid="ignore"):  # 0/0: a resample in which nothing counts
        found = bootstrap(lambda weight_U: (weight_U @ sum_U) / (weight_U @ count_U), len(units))
    return dict(zip(("score", "low", "high"), map(float, found), strict=True))


def counts_of(
    flags: argparse.Namespace, judged: Judged, questions: dict, duplicates: int
) -> dict[str, int]:
    """How many turns or games counted, and why others did not."""
    parsed = sum(map(bool, judged.values()))
    counts = {"battles" if flags.battles else "judged": parsed}
    if not flags.battles:
        asked = 2 * (len(questions) or ARENA_QUESTIONS)
        counts |= {"missing": asked - len(judged), "duplicate": duplicates}
    counts["unparsed"] = len(judged) - parsed
    if flags.bench is MT_BENCH:
        scores = [score for scores in judged.values() for score in scores]
        counts["outside 1-10"] = sum(not 1 <= score <= 10 for score in scores)
    return counts


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
    add, given = command.add_argument, command.add_mutually_exclusive_group(required=True)
    text = "by one judge, of any models"
    given.add_argument("--judgments", nargs="+", default=[], metavar="FILE", help=text)
    if bench is MT_BENCH:
        text = "count all valid judgments of a question and turn, as FastChat does [the first]"
        add("--every-judgment", action="store_true", help=text)
    else:
        given.add_argument("--battles", metavar="FILE", help="or Arena-Hard's weighted battles")
        add("--baseline-model", default="gpt-4-0314", metavar="NAME", help="[gpt-4-0314]")
    command.set_defaults(every_judgment=False, battles=None)
    add("--questions", metavar="FILE", help="question.jsonl [the published ones]")
    add("--json", metavar="OUT", help="file of the report, as JSON")
