""" """

import argparse
from pathlib import Path

from evaluation.reports import cell, table
from evaluation.rows import named
from support.files import InputError, read_json

OVERLAP = (
    "bleu4_lf",
    "rouge1_lf",
    "rouge2_lf",
    "rougeL_lf",
    "bleu4",
    "rouge1",
    "rouge2",
    "rougeL",
    "mean_prediction_tokens",
)  # of score.json: the paper's family, the conventional one, the length


def run(flags: argparse.Namespace) -> None:
    """The paper's three tables, models side by side, from what other commands wrote with --json into a directory for
    each model: arena_hard*.json and mt_bench*.json (a column for each judge), score.json. likelihood.json, where it is
    there, makes a table of its own. What is not there is a dash."""
    found = {
        "Table 1. Arena-Hard (win rate, %) and MT-Bench, 95% intervals": {},
        "Table 2. BLEU and ROUGE after training on HH-RLHF": {},
        "Table 3. BLEU and ROUGE after training on UltraFeedback": {},
        "Likelihoods (not in the paper)": {},
    }
    judged, after_hh, after_uf, likelihoods = found.values()
    if not flags.runs and not flags.hh_runs:
        raise InputError("wanted --runs or --hh-runs")
    for texts, overlap in ((flags.runs, after_uf), (flags.hh_runs, after_hh)):
        for text in texts:
            name, directory = named(text)
            name = name or str(directory)
            if not directory.is_dir() or name in overlap:
                raise InputError(
                    f"{text}: {'a second' if name in overlap else 'no'} directory of that name; wanted "
                    "NAME=DIR, with what the other commands wrote"
                )
            overlap[name] = dict.fromkeys(OVERLAP, "-") | cells_of(
                directory / "score.json", "bleu4_lf", name
            )
            if overlap is after_uf:  # what the paper had judged
                paths = sorted(
                    [*directory.glob("arena_hard*.json"), *directory.glob("mt_bench*.json")]
                )
                paths = [
                    path for path in paths if not path.name.endswith(".jsonl.json")
                ]  # how answers were made
                judged[name] = {
                    head: score
                    for path in paths
                    for head, score in cells_of(path, "models", name).items()
                }
            if likely := cells_of(directory / "likelihood.json", "measures", name):
                likelihoods[name + " (HH-RLHF)" * (overlap is after_hh)] = likely
    for title, models in found.items():
        if models:
            columns = list(dict.fromkeys(column for cells in models.values() for column in cells))
            columns = columns or ["Arena-Hard", "MT-Bench"]
            rows = [
                [name, *(cells.get(column, "-") for column in columns)]
                for name, cells in models.items()
            ]
            print(f"{title}\n\n{table(['model', *columns], rows)}\n")


def cells_of(path: Path, kind: str, name: str) -> dict[str, str]:
    """Column -> what a table shows of a file that `likelihood` ("measures"), `report` ("models"; its first score) or
    `score` ("bleu4_lf") wrote; none where it is not there."""
    if not path.is_file():
        return {}
    of = read_json(path, "what eval.py wrote with --json")
    try:
        if kind == "measures":
            return {
                key: "{value:.4f} [{low:.4f}, {high:.4f}]".format(**value)
                for key, value in of[kind].items()
            }
        if kind == "models":
            models = of[kind]
            model = (
                models[name] if name in models or len(models) > 1 else next(iter(models.values()))
            )
            return {
                f"{of['benchmark']}, {of['judge'] or 'battles'}": cell(
                    next(iter(model["scores"].values()))
                )
            }
        return {kind: f"{of[kind]:.2f}"} | {key: f"{of[key]:.2f}" for key in OVERLAP if key in of}
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        wrote = {
            "measures": "likelihood",
            "bleu4_lf": "score",
            "models": f"report (of one model, or {name} among several)",
        }
        raise InputError(f"{path}: wanted what {wrote[kind]} wrote") from None


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="models trained on UltraFeedback: directories with "
        "arena_hard*.json, mt_bench*.json, score.json, likelihood.json",
    )
    add("--hh-runs", nargs="+", default=[], metavar="NAME=DIR", help="models trained on HH-RLHF")
