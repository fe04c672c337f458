""" """

import argparse
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evaluation.rows import json_rows, write_json
from support.files import InputError, shown

# mteval-v13a's rules, in their order. Each match is consumed, so of two marks in a row a rule may see the first alone.
RULES_13A = [
    (re.compile(pattern), spaced)
    for pattern, spaced in (
        (r"([!-&(-+/:-@[-`{-~])", r" \1 "),  # ASCII punctuation but for ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),  # stay in numbers: 1,000.5
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
]


ENTITIES = {
    "&quot;": '"',
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}  # in this order: &amp;lt; becomes <


HAN = "\u4e00-\u9fd5"  # what jieba takes for Chinese


BLOCK_LF = re.compile(rf"([{HAN}a-zA-Z0-9+#&._%-]+)")


WORD_LF = re.compile(
    rf"([{HAN}]+|AT&T|[Cc]\+\+|[Cc]#)"
)  # jieba's dictionary has these five words with ASCII in them


NUMBER_LF = re.compile(r"([a-zA-Z0-9]+(?:\.[0-9]+)?%?)")


SENTENCE_LF = re.compile(r"([。！？?]|\.{6})(.)")


def tokens_13a(text: str) -> list[str]:
    """The tokens of sacrebleu's default tokenizer, 13a: case is kept, punctuation stands alone."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in RULES_13A:
        text = pattern.sub(spaced, text)
    return text.split()


def tokens_rouge(text: str) -> list[str]:
    """The tokens of google's rouge_score without its stemmer: runs of a-z and 0-9, in lower case; nothing else counts,
    so Chinese has none."""
    return re.findall("[a-z0-9]+", text.lower())


def words_lf(text: str) -> list[str]:
    """The tokens of jieba.cut, white space among them. Differs from it where two Chinese characters meet: jieba divides
    them into words by a dictionary and a Markov model, and here a run of them is one token."""
    words = []
    for i, block in enumerate(BLOCK_LF.split(text)):
        if i % 2 == 0:  # re.split alternates: between the blocks each character stands alone
            words += block
            continue
        for j, part in enumerate(WORD_LF.split(block)):
            words += [part] if j % 2 else filter(None, NUMBER_LF.split(part))
    return words


def tokens_lf(text: str) -> list[str]:
    """The tokens that rouge_chinese 1.0.3 compares when LLaMA-Factory hands it " ".join(jieba.cut(text)).

    It cuts that into sentences, at newlines, at the marks and after six dots, which has two effects: a blank sentence
    that is not empty gives one empty token, and a longer run of dots is divided. (Its further rules, on quotes and
    ellipses after a mark, never act, since a space stands between the words.)"""
    cut = SENTENCE_LF.sub(r"\1\n\2", " ".join(words_lf(text))).rstrip()
    return [token for sentence in cut.split("\n") if sentence for token in sentence.split() or [""]]


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Tokens of the longest common subsequence of a and b.

    Row by row of the usual table, a row being one integer: bit i is 0 where the row grows from a[:i] to a[:i+1]. The
    sum carries each match to the next place where the row grew (Crochemore et al. 2001; Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = everywhere = (1 << len(a)) - 1
    for token in b:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & everywhere
    return len(a) - row.bit_count()


def bleu_counts(prediction: Sequence[str], reference: Sequence[str]) -> list[int]:
    """What BLEU-4 is made of, and what a corpus sums: the n-grams of the prediction that the reference has, each at
    most as often as the reference has it, for n = 1 to 4; all n-grams of the prediction, likewise; and both lengths."""
    found = [ngrams(prediction, n) for n in range(1, 5)]
    matches = [(counts & ngrams(reference, n)).total() for n, counts in enumerate(found, 1)]
    return [*matches, *(counts.total() for counts in found), len(prediction), len(reference)]


def bleu4(
    matches: Sequence[int], totals: Sequence[int], prediction_tokens: int, reference_tokens: int
) -> float:
    """BLEU-4 from `bleu_counts`, 0 to 100: geometric mean of four precisions, times exp(1 - r/c) where c <= r.

    The k-th order without a match has precision 1/(2^k total): sacrebleu's smoothing "exp", nltk's method 3. 0 where no
    token matches, and where an order has no n-gram at all."""
    if not matches[0] or not all(totals):
        return 0.0
    log_precision, zeros = 0.0, 0
    for matched, total in zip(matches, totals, strict=True):
        zeros += not matched
        log_precision += math.log((matched or 0.5**zeros) / total)
    return 100 * math.exp(log_precision / 4 + min(0, 1 - reference_tokens / prediction_tokens))


def f1(matches: int, prediction_count: int, reference_count: int, epsilon: float = 0.0) -> float:
    """2PR / (P + R + epsilon), 0 to 100; 0 where nothing matches, be it that one side is empty."""
    if not matches:
        return 0.0
    precision, recall = matches / prediction_count, matches / reference_count
    return 100 * (2 * (precision * recall / (precision + recall + epsilon)))


def rouge(prediction: str, reference: str) -> list[float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one row, 0 to 100: the F1 of google's rouge_score 0.1.2, without stemmer.
    n-grams count as often as both sides have them."""
    a, b = tokens_rouge(prediction), tokens_rouge(reference)
    both = [(ngrams(a, n), ngrams(b, n)) for n in (1, 2)]
    return [
        *(f1((x & y).total(), x.total(), y.total()) for x, y in both),
        f1(lcs_length(a, b), len(a), len(b)),
    ]


def rouge_lf(prediction: str, reference: str) -> list[float]:
    """The same as rouge_chinese 1.0.3 computes them, and so LLaMA-Factory: other tokens, each n-gram counted once
    however often it occurs (ROUGE-L, the longest common subsequence, counts all), and 1e-8 in the denominator. 0 where
    a side has nothing but white space: there LLaMA-Factory does not ask rouge_chinese, which would fail."""
    a, b = tokens_lf(prediction), tokens_lf(reference)
    both = [(ngrams(a, n).keys(), ngrams(b, n).keys()) for n in (1, 2)]
    lcs = f1(lcs_length(a, b), len(a), len(b), 1e-8)
    return [*(f1(len(x & y), len(x), len(y), 1e-8) for x, y in both), lcs]


def bleu4_lf(prediction: str, reference: str) -> float:
    """nltk's sentence_bleu with smoothing method 3, over *characters*, as LLaMA-Factory calls it; 0 to 100. An order
    that the prediction is too short for counts as one n-gram without a match; white space counts as any character."""
    *counts, characters, reference_characters = bleu_counts(prediction, reference)
    return bleu4(
        counts[:4], [max(1, total) for total in counts[4:]], characters, reference_characters
    )


def score_rows(rows: list[tuple[str, str]]) -> dict[str, float]:
    """All scores of (prediction, reference) rows, at least one; 0 to 100.

    bleu4                     of the corpus: counts are summed before BLEU is taken (sacrebleu 2.6 corpus_bleu)
    rouge1, rouge2, rougeL    mean over rows of rouge_score's F1
    bleu4_lf ... rougeL_lf    mean over rows, each rounded to 4 decimals: LLaMA-Factory 0.9.5, train/sft/metric.py
    count, mean_*_characters, mean_*_tokens     rows; code points; tokens of 13a, which `bleu4` counts"""
    counts, means, means_lf = [], [], []
    for prediction, reference in rows:
        counts.append(bleu_counts(tokens_13a(prediction), tokens_13a(reference)))
        means.append(rouge(prediction, reference))
        row_lf = [bleu4_lf(prediction, reference), *rouge_lf(prediction, reference)]
        means_lf.append([round(value, 4) for value in row_lf])
    sums = [sum(column) for column in zip(*counts, strict=True)]
    scores = [
        bleu4(sums[:4], sums[4:8], *sums[8:]),
        *(
            statistics.fmean(column)
            for values in (means, means_lf)
            for column in zip(*values, strict=True)
        ),
    ]
    names = (
        "bleu4",
        "rouge1",
        "rouge2",
        "rougeL",
        "bleu4_lf",
        "rouge1_lf",
        "rouge2_lf",
        "rougeL_lf",
    )
    lengths = {}
    for i, side in enumerate(("prediction", "reference")):
        lengths[f"mean_{side}_characters"] = statistics.fmean(len(row[i]) for row in rows)
        lengths[f"mean_{side}_tokens"] = sums[8 + i] / len(rows)
    return dict(zip(names, scores, strict=True)) | {"count": len(rows)} | lengths


def read_predictions(path: Path) -> tuple[list[tuple[str, str]], int]:
    """(prediction, reference) of each row of a JSONL file, and how many of them `generate` left unanswered. Raises
    InputError, naming file and line."""
    rows, overlong = [], 0
    for place, row in json_rows(path, "prediction", "reference"):
        for key in ("prediction", "reference"):
            if not isinstance(row[key], str):
                raise InputError(f"{place}: {key} is {shown(row[key])}, wanted a string")
        rows.append((row["prediction"], row["reference"]))
        overlong += row.get("finish") == "overlong"
    if not rows:
        raise InputError(f"{path}: no row in it; wanted rows with prediction and reference")
    return rows, overlong


def run(flags: argparse.Namespace) -> None:
    """Prints both families with the lengths beside them, since both move with length; writes them with --json."""
    path = Path(flags.predictions)
    rows, overlong = read_predictions(path)
    scores = score_rows(rows)
    print(
        f"{path}: {len(rows):,} rows\n{'':12}  BLEU-4  ROUGE-1  ROUGE-2  ROUGE-L    "
        "mean length: prediction  reference"
    )
    # Each family with the lengths in the unit that its BLEU counts.
    for family, suffix, unit in (("conventional", "", "tokens"), ("_lf", "_lf", "characters")):
        values = [scores[name + suffix] for name in ("bleu4", "rouge1", "rouge2", "rougeL")]
        values += [scores[f"mean_{side}_{unit}"] for side in ("prediction", "reference")]
        print(
            "{:12}{:8.2f}{:9.2f}{:9.2f}{:9.2f}{:27,.1f}{:11,.1f}  {}".format(family, *values, unit)
        )
    if overlong:
        print(
            f"{overlong:,} of the rows were left unanswered, their prompts being too long: they count as empty"
        )
    if chinese := sum(
        bool(re.search(f"[{HAN}]{{2}}", f"{prediction} {reference}"))
        for prediction, reference in rows
    ):
        print(
            f"{chinese:,} of the rows hold Chinese, which jieba divides into words: ROUGE _lf is not LLaMA-Factory's"
        )
    if flags.json is not None:
        write_json(flags.json, scores, path)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add(
        "--predictions",
        required=True,
        metavar="FILE",
        help="JSONL rows with the strings prediction and reference; other keys are ignored",
    )
    add(
        "--json",
        metavar="OUT",
        help="file of the scores, as JSON; without it they are only printed",
    )
