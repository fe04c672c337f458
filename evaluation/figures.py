"""`eval.py figures`: the paper's Figure 1, its Figure 2 for runs of train.py, each run's curves.

    bt_surface, asft_surface    the losses of Figure 1 (equations 15 and 17), and their `gradient`
    Run, read_run               what train.py logged in a run's directory
    draw_surfaces               figure1.png
    draw_margins, draw_costs    figure2a.png and figure2b.png: runs side by side
    draw_curves                 run-NAME.png: one run
    run                         the command: the pictures, and captions.md

Each draw_* function fills a matplotlib figure and returns its caption. The equations need only
torch; matplotlib is imported by the command.
"""

import argparse
import io
import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import asft
from evaluation.rows import between, json_rows, named
from support.files import InputError, naming, read_json, shown


def bt_surface(x1: Tensor, x2: Tensor, beta: float) -> Tensor:
    """L = -log(x1^b / (x1^b + x2^b)), in nats (equation 15, exact).

    Bradley-Terry, the form of DPO's loss, at x1 = p_w and x2 = p_l, both in (0, 1). The ratio of
    its slopes is |dL/dx2| / |dL/dx1| = x1/x2 (equations 19 to 21)."""
    return -torch.log(x1**beta / (x1**beta + x2**beta))


def asft_surface(x1: Tensor, x2: Tensor) -> Tensor:
    """L = -log(x1) - log(1 - x2), in nats (equation 17, exact): ASFT's align term at x1 = p_w and
    x2 = p_l. The ratio of its slopes is |dL/dx1| / |dL/dx2| = (1-x2)/x1 (equations 22 to 25)."""
    return -torch.log(x1) - torch.log1p(-x2)


def gradient(surface: Callable, *points: Tensor) -> tuple[Tensor, ...]:
    """The surface's slopes at each point, by autograd (equations 16 and 18)."""
    leaves = [point.clone().requires_grad_() for point in points]
    return torch.autograd.grad(surface(*leaves).sum(), leaves)


COLUMNS = ("step", "loss", "grad_norm", "seconds", "peak_memory_gib")  # of metrics.jsonl
# Means over the pairs of a step: rows with one answer have some of them, and ASFT has the last.
MEANS = ("logp_w", "logp_l", "margin", "accuracy", "rejected_weight")


class Run(NamedTuple):
    """What a run logged. Columns hold one number per row; log-probs are nats per token."""

    label: str
    device: str
    steps: dict[str, list[float]]  # COLUMNS, and those of MEANS that it has
    held_out: dict[str, list[float]]  # the same of eval_..., or nothing without held-out pairs


def read_columns(
    path: Path, names: tuple[str, ...], perhaps: tuple[str, ...]
) -> dict[str, list[float]]:
    """Columns of a JSONL file: `names`, and those of `perhaps` that a row has, NaN in the others.
    Raises InputError, with the line, for a row without one of `names`, unless all values are
    numbers that can be drawn, and unless steps grow."""
    rows, step = json_rows(path, *names), -math.inf
    for place, row in rows:
        for name in row.keys() & {*names, *perhaps}:
            if type(row[name]) not in (int, float) or not abs(row[name]) < 1e100:
                wanted = "wanted a number between -1e100 and 1e100"
                raise InputError(f"{place}: {name} is {shown(row[name])}, {wanted}")
        if row["step"] <= step:
            raise InputError(f"{place}: step {row['step']} after step {step}; wanted a later one")
        step = row["step"]
    found = [*names, *(name for name in perhaps if any(name in row for _, row in rows))]
    return {name: [float(row.get(name, math.nan)) for _, row in rows] for name in found}


def read_run(text: str) -> Run:
    """DIR, labelled by its loss, or NAME=DIR. Raises InputError with file and line."""
    name, path = named(text)
    if re.search("[\ud800-\udfff]", name):
        raise InputError(f"--runs: the name {shown(name)} is not UTF-8; wanted NAME=DIR in UTF-8")
    config, metrics, held_out = path / "config.json", path / "metrics.jsonl", path / "eval.jsonl"
    facts = read_json(config, "a directory that train.py wrote")
    try:
        loss, device = facts["flags"]["loss"], str(facts["device"])
        reference = f", {facts['flags']['reference']}" if asft.LOSSES[loss].reference else ""
    except (KeyError, TypeError):
        raise InputError(f"{config}: no flags of train.py; wanted its config.json") from None
    steps = read_columns(metrics, COLUMNS, MEANS)
    if not steps["step"]:
        raise InputError(f"{metrics}: no step in it")
    evaluations = {}
    if held_out.is_file():
        perhaps = tuple(f"eval_{name}" for name in MEANS)
        evaluations = read_columns(held_out, ("step", "eval_loss"), perhaps)
    return Run(name or loss + reference, device, steps, evaluations)


# Okabe and Ito's colours, which the colour-blind can tell apart; dashes tell lines apart as well.
COLOURS = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000".split()
DASHES = ("-", "--", ":", "-.")


def running_means(values: list[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values, or of as many as there are."""
    return [statistics.fmean(values[max(0, i - window) : i]) for i in range(1, len(values) + 1)]


def draw_steps(ax, run: Run, name: str, window: int, **style) -> None:
    """A column of a run: thin, each step's value; thick, the mean of the last `window` steps. Steps
    without a value are left out."""
    points = zip(run.steps["step"], run.steps[name], strict=True)
    step, values = zip(*((at, y) for at, y in points if not math.isnan(y)), strict=True)
    ax.plot(step, values, color=style["color"], alpha=0.3, linewidth=0.8)
    marker = "o" if len(step) == 1 else None
    ax.plot(step, running_means(values, window), marker=marker, **style)


def draw_surfaces(figure, beta: float) -> str:
    """Figure 1: Bradley-Terry above ASFT; probabilities on the left, log-probabilities right."""
    figure.set_size_inches(11, 10.4)
    figure.suptitle("Figure 1. Loss of one pair (colour), and how it moves both answers (arrows)")
    axes, half = figure.subplots(2, 2), math.log(0.5)
    losses = (
        (f"Bradley-Terry (DPO), eq. 15, beta = {beta:g}", partial(bt_surface, beta=beta)),
        ("ASFT's align term, eq. 17", asft_surface),
    )
    # Both answers are pushed equally on a line, given by p_l at its left and its right end.
    columns = (
        ("", "probability per token", 0.02, 0.98, [(0.02, 0.98), (0.98, 0.02)]),
        ("log ", "nats per token", -4.0, -0.05, [None, (half, half)]),  # None: everywhere
    )
    for j, (log, unit, low, high, equal) in enumerate(columns):
        axis = torch.linspace(low, high, 200, dtype=torch.float64)
        at_l, at_w = torch.meshgrid(axis, axis, indexing="ij")
        for i, (name, surface) in enumerate(losses):
            ax, line, places = axes[i, j], equal[i], "everywhere"

            def loss(w: Tensor, l: Tensor, surface=surface, log=log) -> Tensor:
                return surface(w.exp(), l.exp()) if log else surface(w, l)

            colour = ax.contourf(at_w, at_l, loss(at_w, at_l), levels=24, cmap="cividis")
            figure.colorbar(colour, ax=ax, label="loss (nats)", shrink=0.85)
            draw_arrows(ax, at_w, at_l, gradient(loss, at_w, at_l), 0.07 * (high - low))
            if line:
                ax.plot([low, high], line, "--", color=COLOURS[1], linewidth=2.5)
                places = "dashed line"
            ax.set(aspect="equal", xlim=(low, high), ylim=(low, high))
            ax.set_title(f"{name}\nboth pushed equally: {places}")
            ax.set_xlabel(f"{log}p_w of the chosen answer ({unit})")
            ax.set_ylabel(f"{log}p_l of the rejected answer ({unit})")
    return (
        "The loss of one pair (colour) and the direction in which it falls fastest (arrows, longer "
        f"for larger gradients): Bradley-Terry as in DPO (equation 15; beta = {beta:g}, which the "
        "paper leaves open) above ASFT's align term (equation 17). In probabilities (left, as in "
        "the paper) Bradley-Terry pushes the rejected answer p_w/p_l times as hard as the chosen "
        "one; in log-probabilities (right) it pushes both equally, and ASFT the rejected one with "
        "its odds, p_l/(1-p_l), against 1 for the chosen one."
    )


def draw_arrows(ax, at_w: Tensor, at_l: Tensor, slopes: tuple[Tensor, ...], longest: float) -> None:
    """Arrows against the slopes at some of the points, at most `longest` long."""
    few = slice(7, None, 15)
    at_w, at_l, d_w, d_l = (x[few, few] for x in (at_w, at_l, *slopes))
    size = torch.hypot(d_w, d_l)
    # Lengths grow with the logarithm of the gradient, and the shortest can still be seen.
    length = longest * (size.log1p() / size.log1p().max()).clamp(min=0.4) / size
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "pivot": "mid", "width": 0.007}
    style |= {"color": "white", "edgecolor": "black", "linewidth": 0.4}
    ax.quiver(at_w, at_l, -d_w * length, -d_l * length, **style)


def draw_margins(figure, runs: list[Run]) -> str:
    """Figure 2(a)."""
    window = max(1, max(len(run.steps["step"]) for run in runs) // 10)
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for i, run in enumerate(runs):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        width = 3.5 - 2 * (i % 2)  # if one line covers another, both can be seen
        draw_steps(ax, run, "margin", window, label=run.label, linewidth=width, **style)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set_title("Figure 2(a). Likelihood margin over training")
    ax.set(xlabel="step (updates)", ylabel="margin, log p_w - log p_l (nats per token)")
    figure.legend(loc="outside right upper")
    return (
        "The margin over training, the mean of log p_w - log p_l over the pairs of a step, which "
        f"are pairs being trained on: {'; '.join(run.label for run in runs)}. Thin lines are "
        f"single steps, thick lines the mean of the last {window} step{'s' * (window > 1)}."
    )


def draw_costs(figure, runs: list[Run]) -> str:
    """Figure 2(b): bars, with their numbers."""
    labels = [run.label for run in runs]
    seconds = [statistics.median(run.steps["seconds"]) for run in runs]
    memory = [max(run.steps["peak_memory_gib"]) for run in runs]
    figure.set_size_inches(9, 1.6 + 0.45 * len(runs))
    figure.suptitle("Figure 2(b). Time and peak memory")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, values in ((left, seconds), (right, memory)):
        style = {"color": COLOURS, "edgecolor": COLOURS, "tick_label": labels}
        bars = ax.barh(range(len(runs)), values, **style)
        ax.bar_label(bars, [f"{value:#.3g}" for value in values], padding=3)
        ax.set_xlim(0, 1.15 * max(values) or 1)
    left.set_xlabel("time per step (s, median)")
    right.set_xlabel("peak memory (GiB)")
    left.invert_yaxis()  # of both: the first run is on top
    costs = []
    for label, s, m in zip(labels, seconds, memory, strict=True):
        cost = f"{label} {s:#.3g} s, {m:#.3g} GiB"
        if costs and seconds[0] and memory[0]:
            cost += f" ({s / seconds[0] - 1:+.1%}, {m / memory[0] - 1:+.1%})"
        costs.append(cost)
    devices = "; ".join(sorted({run.device for run in runs}))
    return (
        f"Median time of a step and peak memory (against the first run): {'; '.join(costs)}; on "
        f"{devices}; memory on a CPU is the process's, libraries included, and the pass that "
        "precomputes a reference is not in the time. The paper reports 13% less time and 16.7% "
        "less memory for ASFT than for training with a reference model."
    )


def draw_curves(figure, run: Run) -> str:
    """One run: six panels over its steps, or those that it has: the last one is ASFT's."""
    window = max(1, len(run.steps["step"]) // 20)
    figure.set_size_inches(11, 6)
    dots = " and held-out pairs (dots)" if run.held_out else ""
    figure.suptitle(f"{run.label}: training pairs (lines){dots}")
    axes = figure.subplots(2, 3, sharex=True).ravel()
    blue, red, log_prob = COLOURS[0], COLOURS[3], "log-probability (nats per token)"
    for ax, name, title, colour, label in (
        (axes[0], "loss", "loss", blue, None),
        (axes[1], "logp_w", log_prob, blue, "chosen"),
        (axes[1], "logp_l", log_prob, red, "rejected"),
        (axes[2], "margin", "margin (nats per token)", blue, None),
        (axes[3], "accuracy", "pair accuracy", blue, None),
        (axes[4], "grad_norm", "gradient norm", blue, None),
        (axes[5], "rejected_weight", "rejected weight", blue, None),
    ):
        if name in run.steps:
            draw_steps(ax, run, name, window, color=colour, label=label)
        if held_out := run.held_out.get(f"eval_{name}"):
            ax.plot(run.held_out["step"], held_out, "o", color=colour, markeredgecolor="black")
        ax.set(title=title, xlabel="step")
    for ax in axes:
        ax.set_visible(ax.has_data())
        ax.tick_params(labelbottom=True)
    axes[1].legend(loc="best")
    has_weight = "rejected_weight" in run.steps
    return (
        f"The run {run.label}, on {run.device}: thin lines are the pairs of single steps, thick "
        f"lines the mean of the last {window} step{'s' * (window > 1)}"
        f"{', dots the held-out pairs' if run.held_out else ''}. "
        "Look for a margin that grows without a fall of the chosen answers' log-probability"
        + ("; near a rejected weight of 0, ASFT is plain SFT." if has_weight else ".")
    )


def run(flags: argparse.Namespace) -> None:
    """Draws what can be drawn; replaces pictures of an earlier call."""
    try:
        import matplotlib.figure
        from PIL import Image
    except ImportError as error:
        install = "pip install -r evaluation/requirements.txt"
        raise InputError(f"figures need matplotlib ({error}): {install}") from None
    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name is one
    drawings = {"figure1": (draw_surfaces, flags.beta)}
    if runs := [read_run(text) for text in flags.runs]:
        if with_pairs := [of_run for of_run in runs if "margin" in of_run.steps]:
            drawings["figure2a"] = (draw_margins, with_pairs)
        drawings["figure2b"] = (draw_costs, runs)
    for of_run in runs:
        name = "run-" + re.sub(r"[^\w.]+", "-", of_run.label.lower())  # on every file system
        if name in drawings:
            raise InputError(f"--runs: two are labelled {of_run.label!r}; name them as NAME=DIR")
        drawings[name] = (draw_curves, of_run)
    captions, out = [], Path(flags.out)
    with naming(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        for name, (draw, what) in drawings.items():
            figure, pixels = matplotlib.figure.Figure(layout="constrained"), io.BytesIO()
            title = name.replace("figure", "Figure ").replace("run-", "Run ")
            captions.append(f"![{name}]({name}.png)\n\n**{title}.** {draw(figure, what)}\n")
            figure.savefig(pixels, dpi=100)
            # 128 colours look the same and take a quarter of the bytes.
            Image.open(pixels).convert("RGB").quantize(128).save(out / f"{name}.png")
        (out / "captions.md").write_text("\n".join(captions))
    print("\n".join(captions))
    print(f"captions in {out / 'captions.md'}")
    if not runs:
        print("only Figure 1 is drawn; Figure 2 and a run's curves need --runs")


def add_flags(command: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add = command.add_argument
    beta = "of Figure 1's Bradley-Terry. OPEN: the paper does not say; 0.1 is usual for DPO [0.1]"
    runs = "for Figure 2 and each run's curves: what train.py wrote, each as DIR or NAME=DIR"
    add("--out", required=True, metavar="DIR", help="directory of the pictures and captions.md")
    add("--beta", type=between(float, 1e-9), default=0.1, help=beta)
    add("--runs", nargs="+", default=[], metavar="RUN", help=runs)
