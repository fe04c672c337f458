"""Evaluates: BLEU and ROUGE of answers; the paper's figures.

    python eval.py score --predictions FILE --json OUT           BLEU-4 and ROUGE of predictions against references
    python eval.py figures --out DIR                             Figure 1, which wants no run
    python eval.py figures --out DIR --runs RUN NAME=RUN ...     Figure 2 as well; each RUN is an --out of train.py
    python eval.py figures --help                                its flags; `python eval.py --help` lists the commands

In reading order
    tokens_13a ... bleu4_lf         BLEU-4 and ROUGE, conventional and as LLaMA-Factory computes them
    score_rows, read_rows, score    the command: a table, and OUT
    bt_surface ... log_gradient     equations 15 to 18 as pure functions
    Run, read_run                   what train.py left in a directory, checked
    draw_surfaces ... draw_costs    one picture each, and its caption
    figures                         the command: DIR/figure*.png and DIR/captions.md
    parse, main                     flags, and the exit code

matplotlib draws, and is not needed for anything else: it is imported where it is used.

Differs from the paper: Figure 1 shows surfaces from above, as colour, with the descent directions in the same panels,
and has two panels more, in log-probabilities.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import asft
from model import InputError, read_json

# -------------------------------------------------------------------------------------------------------------- score

# Two families under two names, never mixed: they differ in what is a token and in what a repeated one counts, and so by
# many points on the same texts. `*_lf` is LLaMA-Factory's, which is very probably what the paper reports.

# mteval-v13a's rules, in their order. Each match is consumed, so of two marks in a row a rule may see the first alone.
RULES_13A = [(re.compile(pattern), spaced) for pattern, spaced in (
    (r"([!-&(-+/:-@[-`{-~])", r" \1 "),  # ASCII punctuation but for ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),  # stay in numbers: 1,000.5
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "))]
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # in this order: &amp;lt; becomes <

HAN = "\u4E00-\u9FD5"  # what jieba takes for Chinese
BLOCK_LF = re.compile(rf"([{HAN}a-zA-Z0-9+#&._%-]+)")
WORD_LF = re.compile(rf"([{HAN}]+|AT&T|[Cc]\+\+|[Cc]#)")  # jieba's dictionary has these five words with ASCII in them
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
    """The tokens of jieba.cut, white space among them, for texts without two Chinese characters in a row.

    Differs from it for Chinese, which jieba divides into words by a dictionary and a Markov model: here a run of
    Chinese characters is one token.
    """
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

    It cuts that into sentences, at newlines, at the marks and after six dots, to no effect but two, which are kept
    here: a blank sentence that is not empty gives one empty token, and a longer run of dots is divided. (Its further
    rules, on quotes and ellipses after a mark, never act, since a space stands between the words.)
    """
    cut = SENTENCE_LF.sub(r"\1\n\2", " ".join(words_lf(text))).rstrip()
    return [token for sentence in cut.split("\n") if sentence for token in sentence.split() or [""]]


def ngrams(tokens: Sequence[str], n: int) -> Counter:
    """How often each run of n tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Tokens of the longest common subsequence of a and b.

    Row by row of the usual table, a row being one integer: bit i is 0 where the row grows from a[:i] to a[:i+1]. The
    sum carries each match to the next place where the row grew (Crochemore et al. 2001; Hyyrö 2004).
    """
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


def bleu4(matches: Sequence[int], totals: Sequence[int], prediction_tokens: int, reference_tokens: int) -> float:
    """BLEU-4 from `bleu_counts`, 0 to 100: geometric mean of four precisions, times exp(1 - r/c) where c <= r.

    The k-th order without a match has precision 1/(2^k total): sacrebleu's smoothing "exp", nltk's method 3. 0 where no
    token matches, and where an order has no n-gram at all.
    """
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
    return [*(f1((x & y).total(), x.total(), y.total()) for x, y in both), f1(lcs_length(a, b), len(a), len(b))]


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
    return bleu4(counts[:4], [max(1, total) for total in counts[4:]], characters, reference_characters)


def score_rows(rows: list[tuple[str, str]]) -> dict[str, float]:
    """All scores of (prediction, reference) rows, at least one; 0 to 100.

        bleu4                     of the corpus: counts are summed before BLEU is taken (sacrebleu 2.6 corpus_bleu)
        rouge1, rouge2, rougeL    mean over rows of rouge_score's F1
        bleu4_lf ... rougeL_lf    mean over rows, each rounded to 4 decimals: LLaMA-Factory 0.9.5, train/sft/metric.py
        count, mean_*_characters, mean_*_tokens     rows; code points; tokens of 13a, which `bleu4` counts
    """
    counts, means, means_lf = [], [], []
    for prediction, reference in rows:
        counts.append(bleu_counts(tokens_13a(prediction), tokens_13a(reference)))
        means.append(rouge(prediction, reference))
        row_lf = [bleu4_lf(prediction, reference), *rouge_lf(prediction, reference)]
        means_lf.append([round(value, 4) for value in row_lf])
    sums = [sum(column) for column in zip(*counts, strict=True)]
    scores = [bleu4(sums[:4], sums[4:8], *sums[8:]),
              *(statistics.fmean(column) for values in (means, means_lf) for column in zip(*values, strict=True))]
    names = ("bleu4", "rouge1", "rouge2", "rougeL", "bleu4_lf", "rouge1_lf", "rouge2_lf", "rougeL_lf")
    lengths = {}
    for i, side in enumerate(("prediction", "reference")):
        lengths[f"mean_{side}_characters"] = statistics.fmean(len(row[i]) for row in rows)
        lengths[f"mean_{side}_tokens"] = sums[8 + i] / len(rows)
    return dict(zip(names, scores, strict=True)) | {"count": len(rows)} | lengths


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(prediction, reference) of each row of a JSONL file; its other keys, and blank lines, are passed over. Raises
    InputError, naming file and line."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; wanted rows with prediction and reference") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        for key in ("prediction", "reference"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str):
                found = "missing" if value is None else ascii(value)[:60]
                raise InputError(f"{path}:{number}: {key} is {found}; wanted an object with the strings prediction and "
                                 "reference")
        rows.append((row["prediction"], row["reference"]))
    if not rows:
        raise InputError(f"{path}: no row in it; wanted rows with prediction and reference")
    return rows


def score(flags: argparse.Namespace) -> None:
    """Prints both families with the lengths beside them, since both move with length; writes them with --json."""
    path = Path(flags.predictions)
    rows = read_rows(path)
    try:
        if flags.json is not None:
            if Path(flags.json).exists() and path.samefile(flags.json):
                raise InputError(f"--json {flags.json} is the file of the predictions")
            open(flags.json, "a").close()  # fails now rather than after the work; what is in it stays till then
        scores = score_rows(rows)
        if flags.json is not None:
            Path(flags.json).write_text(json.dumps(scores, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--json {flags.json}: {error.strerror}") from None
    print(f"{path}: {len(rows):,} rows\n{'':12}  BLEU-4  ROUGE-1  ROUGE-2  ROUGE-L    "
          "mean length: prediction  reference")
    # Each family with the lengths in the unit that its BLEU counts.
    for family, suffix, unit in (("conventional", "", "tokens"), ("_lf", "_lf", "characters")):
        values = [scores[name + suffix] for name in ("bleu4", "rouge1", "rouge2", "rougeL")]
        values += [scores[f"mean_{side}_{unit}"] for side in ("prediction", "reference")]
        print("{:12}{:8.2f}{:9.2f}{:9.2f}{:9.2f}{:27,.1f}{:11,.1f}  {}".format(family, *values, unit))
    if chinese := sum(bool(re.search(f"[{HAN}]{{2}}", f"{prediction} {reference}")) for prediction, reference in rows):
        print(f"{chinese:,} of the rows hold Chinese, which jieba divides into words: ROUGE _lf is not LLaMA-Factory's")


# ----------------------------------------------------------------------------------------------- equations 15 to 18


def bt_surface(x1: Tensor, x2: Tensor, beta: float) -> Tensor:
    """L = -log(x1^b / (x1^b + x2^b)), nats (equation 15, exact): Bradley-Terry, the form of DPO's loss, at x1 = p_w and
    x2 = p_l, both in (0, 1)."""
    return -torch.log(x1**beta / (x1**beta + x2**beta))


def bt_gradient(x1: Tensor, x2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """dL/dx1 and dL/dx2 of `bt_surface` (equation 16, exact). Their sizes' ratio is |dL/dx2| / |dL/dx1| = x1/x2
    (equations 19 to 21)."""
    total = x1**beta + x2**beta
    return -beta * x2**beta / (x1 * total), beta * x2 ** (beta - 1) / total


def asft_surface(x1: Tensor, x2: Tensor) -> Tensor:
    """L = -log(x1) - log(1 - x2), nats (equation 17, exact): ASFT's align term at x1 = p_w and x2 = p_l."""
    return -torch.log(x1) - torch.log1p(-x2)


def asft_gradient(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx1 and dL/dx2 of `asft_surface` (equation 18, exact). Their sizes' ratio is |dL/dx1| / |dL/dx2| = (1-x2)/x1
    (equations 22 to 25)."""
    return -1 / x1, 1 / (1 - x2)


def log_gradient(x1: Tensor, x2: Tensor, gradient: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same gradient for the log-probabilities l_w = log x1 and l_l = log x2: dL/dlog(x) = x dL/dx. Not in the
    paper."""
    return x1 * gradient[0], x2 * gradient[1]


# --------------------------------------------------------------------------------------------------- runs of train.py

COLUMNS = ("step", "margin", "seconds", "peak_memory_gib")  # of metrics.jsonl


class Run(NamedTuple):
    """What the figures need of a run: one number per step in each list."""

    label: str
    device: str
    step: list[float]
    margin: list[float]  # mean of l_w - l_l over the step's pairs, nats per token
    seconds: list[float]
    peak_memory_gib: list[float]  # the GPU's, or on a CPU the process's resident memory; so far


def read_run(text: str) -> Run:
    """DIR, labelled by its loss, or NAME=DIR. Raises InputError, naming file and line."""
    name, _, rest = text.partition("=")
    named = bool(rest) and not Path(text).is_dir()
    path = Path(rest if named else text)
    if not (path / "config.json").is_file():
        raise InputError(f"--runs {text}: {path} has no config.json; wanted a directory that train.py wrote")
    facts = read_json(path / "config.json")
    try:
        loss, reference, device = facts["flags"]["loss"], facts["flags"]["reference"], facts["device"]
        label = f"{loss}, {reference}" if asft.LOSSES[loss].reference else loss
    except (KeyError, TypeError):
        raise InputError(f"{path / 'config.json'}: no flags of train.py; wanted its config.json") from None
    return Run(name if named else label, str(device), **read_metrics(path / "metrics.jsonl"))


def read_metrics(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.jsonl."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}; wanted train.py's") from None
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            values = [float(row[name]) for name in COLUMNS]
        except (ValueError, KeyError, TypeError, RecursionError):
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise InputError(f"{path}:{number}: wanted an object with the numbers {', '.join(COLUMNS)}; found "
                             f"{line[:60]!r}")
        for name, value in zip(COLUMNS, values, strict=True):
            columns[name].append(value)
    if not lines:
        raise InputError(f"{path}: no step in it")
    return columns


# ------------------------------------------------------------------------------------------------------------ figures

# Okabe and Ito's colours, told apart by the colour-blind; a line's dashes tell it apart as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
DPI = 150


def draw_surfaces(figure, beta: float) -> str:
    """Figure 1: one row per loss; probabilities on the left, log-probabilities on the right."""
    figure.set_size_inches(11, 10.4)
    figure.suptitle("Figure 1. Loss of one pair (colour) and where it pushes the two answers (arrows)")
    losses = ((f"Bradley-Terry (DPO), eq. 15, beta = {beta:g}", lambda *x: bt_surface(*x, beta),
               lambda *x: bt_gradient(*x, beta)), ("ASFT's align term, eq. 17", asft_surface, asft_gradient))
    for row, (name, surface, gradient) in zip(figure.subplots(2, 2), losses, strict=True):
        for logs, ax in enumerate(row):
            low, high, unit = (-4.0, -0.05, "nats per token") if logs else (0.02, 0.98, "probability per token")
            at_2, at_1 = torch.meshgrid(*[torch.linspace(low, high, 200, dtype=torch.float64)] * 2, indexing="ij")
            x1, x2 = (at_1.exp(), at_2.exp()) if logs else (at_1, at_2)
            colour = ax.contourf(at_1, at_2, surface(x1, x2), levels=24, cmap="cividis")
            figure.colorbar(colour, ax=ax, label="loss (nats)", shrink=0.85)

            few = slice(7, None, 15)  # points with an arrow
            d1, d2 = (log_gradient(x1, x2, gradient(x1, x2)) if logs else gradient(x1, x2))
            d1, d2, at_1, at_2 = d1[few, few], d2[few, few], at_1[few, few], at_2[few, few]
            size = torch.hypot(d1, d2)
            length = 0.07 * (high - low) * (size.log1p() / size.log1p().max()).clamp(min=0.4) / size
            ax.quiver(at_1, at_2, -d1 * length, -d2 * length, angles="xy", scale_units="xy", scale=1, pivot="mid",
                      color="white", edgecolor="black", linewidth=0.4, width=0.007)

            equal = "both pushed equally: everywhere"
            if surface is asft_surface or not logs:
                equal = "both pushed equally: dashed line"
                bt = surface is not asft_surface
                ends = [math.log(0.5)] * 2 if logs else [low, high] if bt else [1 - low, 1 - high]
                ax.plot([low, high], ends, "--", color="#E69F00", linewidth=2.5)
            ax.set(aspect="equal", xlim=(low, high), ylim=(low, high), title=f"{name}\n{equal}",
                   xlabel=f"{'log ' * logs}p_w of the chosen answer ({unit})",
                   ylabel=f"{'log ' * logs}p_l of the rejected answer ({unit})")
    return (
        "The loss of one pair (colour) over x1 = p_w and x2 = p_l, geometric means over an answer's tokens, and the "
        "direction in which it falls fastest (arrows, longer where the gradient is larger, each panel to its own "
        f"scale). Top: Bradley-Terry as in DPO, equations 15 and 16, at beta = {beta:g}; the paper does not say at "
        "which it draws. Bottom: ASFT's align term, equations 17 and 18. Left, in probabilities, as in the paper: "
        "Bradley-Terry pushes the rejected answer x1/x2 times as hard as the chosen one (equation 21), so harder "
        "wherever the chosen one is likelier; ASFT pushes the chosen one (1-x2)/x1 times as hard as the rejected one "
        "(equation 25). Right, the same losses in log-probabilities: the asymmetry that the paper describes "
        "disappears, since Bradley-Terry pushes both answers equally hard everywhere; it belongs to the coordinates. "
        "ASFT pushes the chosen answer with weight 1 and the rejected one with its odds, x2/(1-x2), so less than the "
        "chosen one wherever x2 is below 1/2.")


def draw_margins(figure, runs: list[Run]) -> str:
    """Figure 2(a): thin, each step's margin; thick, its mean over the last steps, as many for every run."""
    window = max(1, max(len(run.step) for run in runs) // 10)
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, run in enumerate(runs):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        smooth = [statistics.fmean(run.margin[max(0, j + 1 - window):j + 1]) for j in range(len(run.margin))]
        ax.plot(run.step, run.margin, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(run.step, smooth, dashes, color=colour, linewidth=2, label=run.label, marker="o" * (len(smooth) == 1))
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(title="Figure 2(a). Likelihood margin over training", xlabel="step (updates)",
           ylabel="margin, log p_w - log p_l (nats per token)")
    figure.legend(loc="outside right upper")
    return ("The margin, the mean over a step's pairs of log p_w - log p_l (mean token log-probabilities, whatever the "
            f"loss takes), of: {'; '.join(run.label for run in runs)}. Thin: each step's own pairs. Thick: the mean of "
            f"{'that step' if window == 1 else f'the last {window} steps'}. The pairs are those being trained on.")


def draw_costs(figure, runs: list[Run]) -> str:
    """Figure 2(b): bars, with their numbers."""
    seconds = [statistics.median(run.seconds) for run in runs]
    memory = [max(run.peak_memory_gib) for run in runs]
    figure.set_size_inches(9, 1.6 + 0.45 * len(runs))
    figure.suptitle("Figure 2(b). Time and peak memory")
    labels = ("time per step (s, median)", "peak memory (GiB)")
    for ax, values, label in zip(figure.subplots(1, 2, sharey=True), (seconds, memory), labels, strict=True):
        bars = ax.barh(range(len(runs)), values, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))])
        ax.bar_label(bars, [f"{value:#.3g}" for value in values], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.15 * max(values) or 1))
        ax.set_yticks(range(len(runs)), [run.label for run in runs])
    ax.invert_yaxis()  # shared: the first run on top
    numbers = [f"{run.label} {s:#.3g} s, {m:#.3g} GiB" for run, s, m in zip(runs, seconds, memory, strict=True)]
    against = [f"{run.label} takes {s / seconds[0] - 1:+.1%} time, {m / memory[0] - 1:+.1%} memory"
               for run, s, m in list(zip(runs, seconds, memory, strict=True))[1:] if seconds[0] and memory[0]]
    return (f"Median time of a step and highest memory of the run: {'; '.join(numbers)}. "
            + (f"Against {runs[0].label}: {'; '.join(against)}. " if against else "")
            + f"Measured on: {'; '.join(sorted({run.device for run in runs}))}. On a CPU memory is the process's "
            "resident memory, libraries included. Time leaves out what happens before the first step, so the one pass "
            "that precomputes reference log-probabilities is not in it. The paper reports 13% less time and 16.7% "
            "lower peak memory for ASFT than for training with a reference model.")


def figures(flags: argparse.Namespace) -> None:
    """Draws what can be drawn; replaces pictures of an earlier call."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError(f"figures are drawn by matplotlib: pip install matplotlib ({error})") from None
    if not 0 < flags.beta < math.inf:
        raise InputError(f"--beta is {flags.beta}, wanted a number above 0")
    runs = [read_run(text) for text in flags.runs]
    if twice := [run.label for i, run in enumerate(runs) if run.label in [other.label for other in runs[:i]]]:
        raise InputError(f"--runs: two are labelled {twice[0]!r}; name them as NAME=DIR")
    drawn = {"figure1": (draw_surfaces, flags.beta)}
    if runs:
        drawn |= {"figure2a": (draw_margins, runs), "figure2b": (draw_costs, runs)}
    captions, out = [], Path(flags.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, (draw, of) in drawn.items():
            figure = matplotlib.figure.Figure(layout="constrained")
            caption = f"**{name.replace('figure', 'Figure ')}.** {draw(figure, of)}"
            figure.savefig(out / f"{name}.png", dpi=DPI)
            print(f"{out / f'{name}.png'}\n{caption}\n")
            captions.append(f"![{name}]({name}.png)\n\n{caption}\n")
        (out / "captions.md").write_text("\n".join(captions))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    print(f"captions in {out / 'captions.md'}" + ("" if runs else "; Figure 2 wants --runs, so only Figure 1 is drawn"))


# -------------------------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} ({self.prog} --help)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's flags, and the command itself as `command`."""
    parser = _Parser(prog="python eval.py", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("score", help="BLEU-4 and ROUGE of predictions against references",
                                  allow_abbrev=False)
    command.set_defaults(command=score)
    command.add_argument("--predictions", required=True, metavar="FILE", help="JSONL rows with the strings prediction "
                         "and reference; other keys are ignored")
    command.add_argument("--json", metavar="OUT", help="file of the scores, as JSON; without it they are only printed")

    command = commands.add_parser("figures", help="the paper's figures, as PNG", allow_abbrev=False)
    command.set_defaults(command=figures)
    command.add_argument("--out", required=True, metavar="DIR", help="directory of the pictures and captions.md")
    command.add_argument("--beta", type=float, default=0.1, help="of Figure 1's Bradley-Terry surface, equation 15. "
                         "OPEN: the paper does not say; 0.1 is DPO's usual one [0.1]")
    command.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="for Figure 2: directories that train.py "
                         "wrote, each as DIR or NAME=DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a user's mistake, with one clear line."""
    try:
        flags = parse(arguments)
        flags.command(flags)
        return 0
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
