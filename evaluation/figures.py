""" """

import argparse
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import asft
from evaluation.rows import between, json_rows, named
from support.files import InputError, naming, read_json, shown


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


COLUMNS = ("step", "margin", "seconds", "peak_memory_gib")  # of metrics.jsonl, and of Run


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
    name, path = named(text)
    if not (path / "config.json").is_file():
        raise InputError(
            f"--runs {text}: {path} has no config.json; wanted a directory that train.py wrote"
        )
    facts = read_json(path / "config.json")
    try:
        loss, reference, device = (
            facts["flags"]["loss"],
            facts["flags"]["reference"],
            facts["device"],
        )
        label = f"{loss}, {reference}" if asft.LOSSES[loss].reference else loss
    except (KeyError, TypeError):
        raise InputError(
            f"{path / 'config.json'}: no flags of train.py; wanted its config.json"
        ) from None
    rows = json_rows(path / "metrics.jsonl", *COLUMNS)
    for place, row in rows:
        if not all(
            type(row[name]) in (int, float) and math.isfinite(row[name]) for name in COLUMNS
        ):
            raise InputError(
                f"{place}: wanted an object with the numbers {', '.join(COLUMNS)}; found {shown(row)}"
            )
    if not rows:
        raise InputError(f"{path / 'metrics.jsonl'}: no step in it")
    return Run(
        name or label, str(device), *([float(row[name]) for _, row in rows] for name in COLUMNS)
    )


# Okabe and Ito's colours, told apart by the colour-blind; a line's dashes tell it apart as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


DASHES = ("-", "--", ":", "-.")


def draw_surfaces(figure, beta: float) -> str:
    """Figure 1: one row per loss; probabilities on the left, log-probabilities on the right."""
    figure.set_size_inches(11, 10.4)
    figure.suptitle(
        "Figure 1. Loss of one pair (colour) and where it pushes the two answers (arrows)"
    )
    losses = (
        (
            f"Bradley-Terry (DPO), eq. 15, beta = {beta:g}",
            lambda *x: bt_surface(*x, beta),
            lambda *x: bt_gradient(*x, beta),
        ),
        ("ASFT's align term, eq. 17", asft_surface, asft_gradient),
    )
    for row, (name, surface, gradient) in zip(figure.subplots(2, 2), losses, strict=True):
        for logs, ax in enumerate(row):
            low, high, unit = (
                (-4.0, -0.05, "nats per token") if logs else (0.02, 0.98, "probability per token")
            )
            at_2, at_1 = torch.meshgrid(
                *[torch.linspace(low, high, 200, dtype=torch.float64)] * 2, indexing="ij"
            )
            x1, x2 = (at_1.exp(), at_2.exp()) if logs else (at_1, at_2)
            colour = ax.contourf(at_1, at_2, surface(x1, x2), levels=24, cmap="cividis")
            figure.colorbar(colour, ax=ax, label="loss (nats)", shrink=0.85)

            few = slice(7, None, 15)  # points with an arrow
            d1, d2 = log_gradient(x1, x2, gradient(x1, x2)) if logs else gradient(x1, x2)
            d1, d2, at_1, at_2 = d1[few, few], d2[few, few], at_1[few, few], at_2[few, few]
            size = torch.hypot(d1, d2)
            length = 0.07 * (high - low) * (size.log1p() / size.log1p().max()).clamp(min=0.4) / size
            ax.quiver(
                at_1,
                at_2,
                -d1 * length,
                -d2 * length,
                angles="xy",
                scale_units="xy",
                scale=1,
                pivot="mid",
                color="white",
                edgecolor="black",
                linewidth=0.4,
                width=0.007,
            )

            equal = "both pushed equally: everywhere"
            if surface is asft_surface or not logs:
                equal = "both pushed equally: dashed line"
                bt = surface is not asft_surface
                ends = [math.log(0.5)] * 2 if logs else [low, high] if bt else [1 - low, 1 - high]
                ax.plot([low, high], ends, "--", color="#E69F00", linewidth=2.5)
            ax.set(
                aspect="equal",
                xlim=(low, high),
                ylim=(low, high),
                title=f"{name}\n{equal}",
                xlabel=f"{'log ' * logs}p_w of the chosen answer ({unit})",
                ylabel=f"{'log ' * logs}p_l of the rejected answer ({unit})",
            )
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
        "chosen one wherever x2 is below 1/2."
    )


def draw_margins(figure, runs: list[Run]) -> str:
    """Figure 2(a): thin, each step's margin; thick, its mean over the last steps, as many for every run."""
    window = max(1, max(len(run.step) for run in runs) // 10)
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, run in enumerate(runs):
        colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        smooth = [
            statistics.fmean(run.margin[max(0, j + 1 - window) : j + 1])
            for j in range(len(run.margin))
        ]
        ax.plot(run.step, run.margin, color=colour, alpha=0.3, linewidth=0.8)
        width = 3.5 - 2 * (
            i % 2
        )  # a line that another covers, as DPO's two references do, shows on both sides of it
        ax.plot(
            run.step,
            smooth,
            dashes,
            color=colour,
            linewidth=width,
            label=run.label,
            marker="o" * (len(smooth) == 1),
        )
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        title="Figure 2(a). Likelihood margin over training",
        xlabel="step (updates)",
        ylabel="margin, log p_w - log p_l (nats per token)",
    )
    figure.legend(loc="outside right upper")
    return (
        "The margin, the mean over a step's pairs of log p_w - log p_l (mean token log-probabilities, whatever the "
        f"loss takes), of: {'; '.join(run.label for run in runs)}. Thin: each step's own pairs. Thick: the mean of "
        f"{'that step' if window == 1 else f'the last {window} steps'}. The pairs are those being trained on."
    )


def draw_costs(figure, runs: list[Run]) -> str:
    """Figure 2(b): bars, with their numbers."""
    seconds = [statistics.median(run.seconds) for run in runs]
    memory = [max(run.peak_memory_gib) for run in runs]
    figure.set_size_inches(9, 1.6 + 0.45 * len(runs))
    figure.suptitle("Figure 2(b). Time and peak memory")
    labels = ("time per step (s, median)", "peak memory (GiB)")
    for ax, values, label in zip(
        figure.subplots(1, 2, sharey=True), (seconds, memory), labels, strict=True
    ):
        bars = ax.barh(
            range(len(runs)), values, color=[COLOURS[i % len(COLOURS)] for i in range(len(runs))]
        )
        ax.bar_label(bars, [f"{value:#.3g}" for value in values], padding=3)
        ax.set(xlabel=label, xlim=(0, 1.15 * max(values) or 1))
        ax.set_yticks(range(len(runs)), [run.label for run in runs])
    ax.invert_yaxis()  # shared: the first run on top
    numbers = [
        f"{run.label} {s:#.3g} s, {m:#.3g} GiB"
        for run, s, m in zip(runs, seconds, memory, strict=True)
    ]
    against = [
        f"{run.label} takes {s / seconds[0] - 1:+.1%} time, {m / memory[0] - 1:+.1%} memory"
        for run, s, m in list(zip(runs, seconds, memory, strict=True))[1:]
        if seconds[0] and memory[0]
    ]
    return (
        f"Median time of a step and highest memory of the run: {'; '.join(numbers)}. "
        + (f"Against {runs[0].label}: {'; '.join(against)}. " if against else "")
        + f"Measured on: {'; '.join(sorted({run.device for run in runs}))}. On a CPU memory is the process's "
        "resident memory, libraries included. Time leaves out what happens before the first step, so the one pass "
        "that precomputes reference log-probabilities is not in it. The paper reports 13% less time and 16.7% "
        "lower peak memory for ASFT than for training with a reference model."
    )


def run(flags: argparse.Namespace) -> None:
    """Draws what can be drawn; replaces pictures of an earlier call."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise InputError(
            f"figures are drawn by matplotlib: pip install matplotlib ({error})"
        ) from None
    runs = [read_run(text) for text in flags.runs]
    if twice := [label for label, count in Counter(run.label for run in runs).items() if count > 1]:
        raise InputError(f"--runs: two are labelled {twice[0]!r}; name them as NAME=DIR")
    drawn = {"figure1": (draw_surfaces, flags.beta)}
    if runs:
        drawn |= {"figure2a": (draw_margins, runs), "figure2b": (draw_costs, runs)}
    captions, out = [], Path(flags.out)
    with naming(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for name, (draw, of) in drawn.items():
            figure = matplotlib.figure.Figure(layout="constrained")
            caption = f"**{name.replace('figure', 'Figure ')}.** {draw(figure, of)}"
            figure.savefig(out / f"{name}.png", dpi=150)
            captions.append(f"![{name}]({name}.png)\n\n{caption}\n")
        (out / "captions.md").write_text("\n".join(captions))
    print("\n".join(captions))
    print(
        f"captions in {out / 'captions.md'}"
        + ("" if runs else "; Figure 2 wants --runs, so only Figure 1 is drawn")
    )


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    add("--out", required=True, metavar="DIR", help="directory of the pictures and captions.md")
    add(
        "--beta",
        type=between(float, 1e-9),
        default=0.1,
        help="of Figure 1's Bradley-Terry surface, equation 15. OPEN: "
        "the paper does not say; 0.1 is DPO's usual one [0.1]",
    )
    add(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="for Figure 2: directories that train.py wrote, each as DIR or NAME=DIR",
    )
