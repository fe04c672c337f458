"""`eval.py score`: BLEU-4 and ROUGE of predictions against references, as two families.

The conventional family is what most papers report. The family `_lf` repeats LLaMA-Factory's, which
is very probably what the ASFT paper reports. Do not compare numbers across the two.

    conventional      sacrebleu and Google's rouge_score
    llama_factory     nltk, jieba and rouge_chinese, called as LLaMA-Factory calls them
    score_rows, run   all scores of some rows; the command

The packages that compute them (evaluation/requirements.txt) are imported where they are used.
"""

import argparse
import functools
import re
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.rows import json_rows, write_json
from support.files import InputError, shown

NAMES = ("bleu4", "rouge1", "rouge2", "rougeL")
Row = tuple[str, str]  # prediction, reference


def conventional(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Four scores in the order of NAMES, 0 to 100, and both sides' mean numbers of tokens.

    BLEU-4 is of the corpus: counts are summed over the rows first (sacrebleu, tokens of 13a, case
    kept). ROUGE is the mean over rows of the F1 of rouge_score, without its stemmer."""
    import rouge_score.rouge_scorer as google
    from sacrebleu import corpus_bleu

    google._lcs_table = lambda a, b: [[lcs_length(a, b)]]  # only its last cell is read
    predictions, references = map(list, zip(*rows, strict=True))
    bleu = corpus_bleu(predictions, [references], force=True)  # force: no warning on final dots
    scorer = google.RougeScorer(NAMES[1:], use_stemmer=False)
    rouge = [scorer.score(reference, prediction) for prediction, reference in rows]
    means = [100 * statistics.fmean(of[name].fmeasure for of in rouge) for name in NAMES[1:]]
    return [bleu.score, *means], [bleu.sys_len / len(rows), bleu.ref_len / len(rows)]


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Tokens of the longest common subsequence of a and b.

    Both ROUGE packages fill a table in Python for it, which takes nearly all of their time: this
    takes that function's place. Here a row of the table is one integer: bit i is 0 if the row
    grows from a[:i] to a[:i+1]. The sum carries each match to the next place at which the row grew
    (Crochemore et al. 2001; Hyyrö 2004)."""
    places = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    row = everywhere = (1 << len(a)) - 1
    for token in b:
        matches = row & places[token]
        row = (row + matches | row - matches) & everywhere
    return len(a) - row.bit_count()


@functools.cache
def load_jieba() -> Callable[[str], list[str]]:
    """jieba's function that divides a text into words.

    jieba keeps its dictionary under a fixed name in the system's temporary directory, and trusts
    what it finds there, so that another user could replace it. Here it gets a directory of its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports a deprecated package
        import jieba

    jieba.setLogLevel("ERROR")  # it tells stderr that it builds its dictionary
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as tokenizer.tmp_dir:
        tokenizer.initialize()
    return tokenizer.lcut


def llama_factory(rows: list[Row]) -> list[float]:
    """LLaMA-Factory 0.9.5's scores in the order of NAMES, 0 to 100, as its train/sft/metric.py.

    Each is the mean over rows of values rounded to 4 decimals: BLEU-4 of *characters* (nltk), and
    the ROUGE F1 of jieba's words, each n-gram counted once (rouge_chinese)."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge, rouge_score

    rouge_score._len_lcs = lcs_length
    words, smoothing = load_jieba(), SmoothingFunction().method3
    values = []
    for prediction, reference in rows:
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
        a, b = " ".join(words(prediction)), " ".join(words(reference))
        rouge = [0.0, 0.0, 0.0]
        if a.split() and b.split():  # LLaMA-Factory does not ask rouge_chinese, which would fail
            found = Rouge().get_scores(a, b)[0]
            rouge = [found[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")]
        values.append([round(100 * value, 4) for value in (bleu, *rouge)])
    return [statistics.fmean(column) for column in zip(*values, strict=True)]


def score_rows(rows: list[Row]) -> dict[str, float]:
    """All scores of at least one row, 0 to 100, and the lengths beside them.

    bleu4, rouge1, rouge2, rougeL    the conventional family; with _lf, LLaMA-Factory's
    mean_*_characters, _tokens       per row: code points, and the tokens that `bleu4` counts

    Raises InputError if a package is missing."""
    try:
        values, tokens = conventional(rows)
        values += llama_factory(rows)
    except ImportError as error:
        install = "pip install -r evaluation/requirements.txt"
        raise InputError(f"a package for scores is missing ({error}): {install}") from None
    names = [*NAMES, *(f"{name}_lf" for name in NAMES)]
    scores = dict(zip(names, values, strict=True)) | {"count": len(rows)}
    for i, side in enumerate(("prediction", "reference")):
        scores[f"mean_{side}_characters"] = statistics.fmean(len(row[i]) for row in rows)
        scores[f"mean_{side}_tokens"] = tokens[i]
    return scores


def read_predictions(path: Path) -> tuple[list[Row], int, int]:
    """The rows of a JSONL file, how many of them `generate` left unanswered, and how many have an
    `index` that an earlier one has.

    Raises InputError with file and line."""
    rows, overlong, indexes = [], 0, []
    for place, row in json_rows(path, "prediction", "reference"):
        for key in ("prediction", "reference"):
            if not isinstance(row[key], str):
                raise InputError(f"{place}: {key} is {shown(row[key])}, wanted a string")
        rows.append((row["prediction"], row["reference"]))
        overlong += row.get("finish") == "overlong"
        indexes += [str(row["index"])] if "index" in row else []
    if not rows:
        raise InputError(f"{path}: no row in it; wanted rows with prediction and reference")
    return rows, overlong, len(indexes) - len(set(indexes))


def unseen_by_rouge(text: str) -> bool:
    """True if a text has characters, but none that conventional ROUGE reads: a-z and 0-9."""
    return bool(text.strip()) and not re.search("[a-z0-9]", text.lower())


def run(flags: argparse.Namespace) -> None:
    """Prints both families, with the mean lengths, since scores move with length."""
    path = Path(flags.predictions)
    rows, overlong, doubled = read_predictions(path)
    scores = score_rows(rows)
    print(f"{path}: {len(rows):,} rows")
    print(" " * 14 + "BLEU-4  ROUGE-1  ROUGE-2  ROUGE-L    mean length: prediction  reference")
    # Each family stands beside the lengths in the unit that its BLEU counts.
    for family, suffix, unit in (("conventional", "", "tokens"), ("_lf", "_lf", "characters")):
        bleu, *rouge = (scores[name + suffix] for name in NAMES)
        lengths = (scores[f"mean_{side}_{unit}"] for side in ("prediction", "reference"))
        cells = "{:8.2f}{:9.2f}{:9.2f}{:9.2f}{:27,.1f}{:11,.1f}".format(bleu, *rouge, *lengths)
        print(f"{family:12}{cells}  {unit}")
    if overlong:
        print(f"{overlong:,} of the rows count as empty: their prompts were too long for generate")
    if empty := sum(not reference.strip() for _, reference in rows):
        print(f"{empty:,} of the rows score 0, because their references are empty")
    if doubled:
        print(f"{doubled:,} of the rows have the index of an earlier row, and count too")
    if unseen := sum(any(map(unseen_by_rouge, row)) for row in rows):
        print(
            f"{unseen:,} of the rows have a text without any a-z or 0-9. Conventional ROUGE reads "
            "nothing else, so it is 0 there, even for equal texts"
        )
    if flags.json is not None:
        write_json(flags.json, scores, path)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    rows = "JSONL rows with the strings prediction and reference; other keys are ignored"
    add("--predictions", required=True, metavar="FILE", help=rows)
    add("--json", metavar="OUT", help="also writes the scores to OUT, as JSON")
