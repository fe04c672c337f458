"""The paper's three tables, models side by side, from what other commands wrote with --json."""

import argparse
from pathlib import Path

from evaluation.reports import cell, table
from evaluation.rows import named
from support.files import InputError, read_json

# Of score.json: the paper's family, the conventional one, the length.
OVERLAP = "bleu4_lf rouge1_lf rouge2_lf rougeL_lf bleu4 rouge1 rouge2 rougeL".split()
OVERLAP += ["mean_prediction_tokens"]
BENCHMARKS = "Table 1. Arena-Hard (win rate, %) and MT-Bench, 95% intervals"
HH = "Table 2. BLEU and ROUGE after training on HH-RLHF"
ULTRAFEEDBACK = "Table 3. BLEU and ROUGE after training on UltraFeedback"
LIKELIHOODS = "Likelihoods (not in the paper)"
FILES = ("arena_hard*.json", "mt_bench*.json", "score.json", "likelihood.json")


def run(flags: argparse.Namespace) -> None:
    """Reads the FILES in a directory for each model; a benchmark has a column for each judge. A
    missing file is a dash."""
    if not flags.runs and not flags.hh_runs:
        raise InputError("wanted --runs or --hh-runs")
    tables = {BENCHMARKS: {}, HH: {}, ULTRAFEEDBACK: {}, LIKELIHOODS: {}}
    given = [(text, ULTRAFEEDBACK, "") for text in flags.runs]
    given += [(text, HH, " (HH-RLHF)") for text in flags.hh_runs]
    for text, title, suffix in given:
        name, directory = named(text)
        name = name or str(directory)
        if not directory.is_dir():
            raise InputError(f"{text}: no directory; wanted NAME=DIR with files of --json")
        # A .jsonl.json says how answers were made.
        paths = [path for pattern in FILES for path in sorted(directory.glob(pattern))]
        paths = [path for path in paths if not path.name.endswith(".jsonl.json")]
        if not paths:
            raise InputError(f"{text}: holds none of {', '.join(FILES)}")
        if name in tables[title]:
            raise InputError(f"{text}: a second directory of that name; wanted another NAME=DIR")
        tables[title][name] = dict.fromkeys(OVERLAP, "-")
        tables[title][name] |= cells_of(directory / "score.json", "score", name)
        if title == ULTRAFEEDBACK:  # the paper judged only these models
            tables[BENCHMARKS][name], reports = {}, {}
            for path in paths:
                if path.name.startswith(("arena_hard", "mt_bench")):
                    cells = cells_of(path, "report", name)
                    for column in cells:
                        if (other := reports.setdefault(column, path)) != path:
                            raise InputError(
                                f"{path}: a report of {column}, as is {other}; wanted one"
                            )
                    tables[BENCHMARKS][name] |= cells
        if likely := cells_of(directory / "likelihood.json", "likelihood", name):
            tables[LIKELIHOODS][name + suffix] = likely
    for title, models in tables.items():
        if models:
            columns = list(dict.fromkeys(column for cells in models.values() for column in cells))
            columns = columns or ["Arena-Hard", "MT-Bench"]
            rows = [[name, *(cells.get(c, "-") for c in columns)] for name, cells in models.items()]
            print(f"{title}\n\n{table(['model', *columns], rows)}\n")


def cells_of(path: Path, command: str, name: str) -> dict[str, str]:
    """Column -> text, of a file that this command of eval.py wrote; empty if it is missing."""
    if not path.is_file():
        return {}
    found = read_json(path, "what eval.py wrote with --json")
    try:
        return READERS[command](found, name)
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration, OverflowError):
        of_one = f" (of one model, or {name} among several)" * (command == "report")
        raise InputError(f"{path}: wanted what {command}{of_one} wrote") from None


def scores(found: dict, _name: str) -> dict[str, str]:
    columns = dict.fromkeys(["bleu4_lf", *(column for column in OVERLAP if column in found)])
    return {column: f"{found[column]:.2f}" for column in columns}


def likelihoods(found: dict, _name: str) -> dict[str, str]:
    form = "{value:.4f} [{low:.4f}, {high:.4f}]"
    return {measure: form.format(**of) for measure, of in found["measures"].items()}


def verdicts(found: dict, name: str) -> dict[str, str]:
    """The column of a benchmark and judge. A single model may have another name: it is shown."""
    models = found["models"]
    model = next(iter(models)) if len(models) == 1 else name
    text = cell(next(iter(models[model]["scores"].values())))
    column = f"{found['benchmark']}, {found['judge'] or 'battles'}"
    return {column: text if model == name else f"{text} ({model})"}


READERS = {"score": scores, "likelihood": likelihoods, "report": verdicts}


def add_flags(command: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = command.add_argument
    text = f"models trained on UltraFeedback: directories with {', '.join(FILES)}"
    add("--runs", nargs="+", default=[], metavar="NAME=DIR", help=text)
    add("--hh-runs", nargs="+", default=[], metavar="NAME=DIR", help="models trained on HH-RLHF")
