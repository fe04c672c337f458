"""eval.py figures: equations 15 to 18 and their ratios, the pictures, and messages on faults."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import NOTHING_SAID, ROOT

import asft
from eval import main
from evaluation import figures

AXIS = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
X2, X1 = (x.flatten() for x in torch.meshgrid(AXIS, AXIS, indexing="ij"))
BETAS = (0.1, 0.5, 1.0, 3.0)


def close(found, wanted, rtol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-12)


def central_differences(surface, x1, x2, h=1e-6):
    by_x1 = surface(x1 + h, x2) - surface(x1 - h, x2)
    by_x2 = surface(x1, x2 + h) - surface(x1, x2 - h)
    return by_x1 / (2 * h), by_x2 / (2 * h)


def test_equation_17_is_the_align_term_that_is_trained_on():
    trained = asft.asft_loss(X1.log(), X2.log(), beta=1, sft_weight=0)[0]
    close(figures.asft_surface(X1, X2), trained)


@pytest.mark.parametrize("beta", BETAS)
def test_equation_15_is_dpos_loss_at_these_log_probs_under_a_reference_of_probability_1(beta):
    zero = torch.zeros_like(X1)
    dpo = asft.dpo_loss(X1.log(), X2.log(), zero, zero, beta=beta)[0]
    close(figures.bt_surface(X1, X2, beta), dpo)


def test_surfaces_at_points_worked_by_hand():
    x1 = torch.tensor([0.5, 0.8], dtype=torch.float64)
    by_hand = torch.tensor([0.6931471805599453, 0.22314355131420976], dtype=torch.float64)
    close(figures.bt_surface(x1, 1 - x1, 1.0), by_hand)  # log 2, log(5/4)
    close(figures.asft_surface(x1, 1 - x1), 2 * by_hand)


@pytest.mark.parametrize("beta", BETAS)
def test_the_slopes_of_bradley_terry_are_equation_16_and_push_the_rejected_answer_x1_over_x2(beta):
    """In probabilities x1/x2 times as hard as the chosen one (equation 21), in logs equally."""
    surface = partial(figures.bt_surface, beta=beta)
    d1, d2 = figures.gradient(surface, X1, X2)
    total = X1**beta + X2**beta
    close((d1, d2), (-beta * X2**beta / (X1 * total), beta * X2 ** (beta - 1) / total))
    close((d1, d2), central_differences(surface, X1, X2), rtol=1e-5)
    close(-d2 / d1, X1 / X2)
    w, l = figures.gradient(lambda w, l: surface(w.exp(), l.exp()), X1.log(), X2.log())
    close(w, -l)


def test_the_slopes_of_asft_are_equation_18_and_push_the_chosen_answer_1_minus_x2_over_x1():
    """In probabilities (equation 25); in logs the chosen one by 1, the rejected by its odds."""
    surface = figures.asft_surface
    d1, d2 = figures.gradient(surface, X1, X2)
    close((d1, d2), (-1 / X1, 1 / (1 - X2)))
    close((d1, d2), central_differences(surface, X1, X2), rtol=1e-5)
    close(-d1 / d2, (1 - X2) / X1)
    found = figures.gradient(lambda w, l: surface(w.exp(), l.exp()), X1.log(), X2.log())
    close(found, (-torch.ones_like(X1), X2 / (1 - X2)))


# ---------------------------------------------------------------------------------- the command

MEANS = ("loss", "logp_w", "logp_l", "margin", "accuracy")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_run(where, loss="asft", steps=12, reference="precompute", scale=1.0, held_out=True):
    """What train.py leaves, as far as figures read it."""
    where.mkdir()
    facts = {"flags": {"loss": loss, "reference": reference}, "device": "CPU (1 threads)"}
    (where / "config.json").write_text(json.dumps(facts))
    rows = []
    for i in range(1, steps + 1):
        row = dict.fromkeys(MEANS, scale * i / 10) | {"step": i, "grad_norm": 1 / i, "lr": 0.1}
        row |= {"seconds": 0.5 * scale + (i == 1), "peak_memory_gib": scale + i / 100}
        rows.append(row | ({"rejected_weight": 0.5} if loss == "asft" else {}))
    jsonl(where / "metrics.jsonl", rows)
    if held_out:
        means = {f"eval_{name}": 0.3 for name in MEANS}
        jsonl(where / "eval.jsonl", [{"step": i} | means for i in (0, steps)])
    return where


def draw(capsys, out, *flags, code=0):
    """Runs the command; returns what it prints on both outputs."""
    assert main(["figures", "--out", str(out), *map(str, flags)]) == code
    return capsys.readouterr()


def complaint(capsys, out, *flags):
    """The one line on stderr of a command that must fail with code 2, before it writes."""
    said = draw(capsys, out, *flags, code=2)
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("eval.py: ")
    assert not out.is_dir()
    return said.err


def check_picture(path):
    from PIL import Image

    image = Image.open(path)
    assert 200 <= image.height <= 1600 and 600 <= image.width <= 1600
    assert torch.tensor(list(image.convert("L").tobytes())).float().std() > 12  # not blank
    assert path.stat().st_size < 150_000


def test_two_runs_give_pictures_and_captions_of_what_they_show(tmp_path, capsys):
    runs = fake_run(tmp_path / "a"), f"DPO, live={tmp_path / 'b'}"
    fake_run(tmp_path / "b", "dpo", reference="live", scale=2.0)
    out = tmp_path / "new/out"
    printed = draw(capsys, out, "--runs", *runs).out
    names = ["figure1", "figure2a", "figure2b", "run-asft", "run-dpo-live"]
    pictures = [f"{name}.png" for name in names]
    assert sorted(path.name for path in out.iterdir()) == ["captions.md", *pictures]
    captions = (out / "captions.md").read_text()
    assert re.findall(r"\(([\w-]+)\.png\)", captions) == names
    for picture in pictures:
        check_picture(out / picture)
    assert all(line in printed for line in captions.splitlines())
    for caption in re.findall(r"^\*\*.*?\*\* (.*)$", captions, re.M):
        assert len(re.findall(r"\.(?= |$)", caption)) == 2, caption  # sentences
    # medians 0.5 and 1.0, although the first step took a second longer; maxima 1.12 and 2.12
    costs = "asft 0.500 s, 1.12 GiB; DPO, live 1.00 s, 2.12 GiB (+100.0%, +89.3%); on CPU"
    assert costs in captions
    assert captions.count("rejected weight") == 1  # ASFT's
    assert "at beta" not in captions and "beta = 0.1" in captions


def test_one_run_of_one_step_is_drawn_without_a_second_run_or_held_out_pairs(tmp_path, capsys):
    draw(capsys, tmp_path / "out", "--runs", fake_run(tmp_path / "run", "orpo", 1, held_out=False))
    check_picture(tmp_path / "out/run-orpo.png")


def test_figure_1_marks_equal_pushes_and_its_arrows_raise_chosen_and_lower_rejected_answers():
    import matplotlib.figure

    figure = matplotlib.figure.Figure()
    figures.draw_surfaces(figure, 0.5)
    half = [math.log(0.5)] * 2
    # Left edge, right edge -> p_l on the dashed line: p_w, everywhere, 1 - p_w, 1/2.
    lines = (lambda w: w, None, lambda w: [1 - x for x in w], lambda _: half)
    for ax, line in zip(figure.axes, lines, strict=False):  # the colour bars follow
        arrows = next(shape for shape in ax.collections if hasattr(shape, "U"))
        assert len(arrows.U) == 13**2 and (arrows.U > 0).all() and (arrows.V < 0).all()
        assert ax.get_title().endswith("dashed line" if line else "everywhere")
        assert len(ax.lines) == (line is not None)
        if line:
            w, l = ax.lines[0].get_data()
            assert list(l) == pytest.approx(list(line(w)))


def test_a_runs_curves_are_its_columns_and_their_running_means():
    import matplotlib.figure

    step, loss = [float(i) for i in range(1, 41)], [1.0, 3.0] * 20
    steps = dict.fromkeys(("loss", "logp_w", "margin", "accuracy", "grad_norm"), loss)
    steps |= {"step": step, "logp_l": [-5.0] * 40}
    held_out = {"step": [0.0, 40.0], "eval_logp_l": [-7.0, -6.0]}
    figure = matplotlib.figure.Figure()
    figures.draw_curves(figure, figures.Run("x", "CPU", steps, held_out))
    lines = [[list(line.get_ydata()) for line in ax.lines] for ax in figure.axes]
    assert lines[0] == [loss, [1.0] + [2.0] * 39]  # a window of 40 / 20 steps
    assert lines[1][2:] == [[-5.0] * 40, [-5.0] * 40, [-7.0, -6.0]]
    assert list(figure.axes[1].lines[-1].get_xdata()) == [0.0, 40.0]
    assert [ax.get_visible() for ax in figure.axes] == [True] * 5 + [False]  # no rejected weight
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == ["chosen", "rejected"]


def test_a_run_on_rows_with_one_answer_is_drawn_with_what_each_step_has(tmp_path, capsys):
    """One step had no good answer, none had both; another run had pairs."""
    import matplotlib.figure

    run, pairs = fake_run(tmp_path / "run"), fake_run(tmp_path / "pairs", "dpo")
    for name, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval_")):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        rows[1].pop(f"{prefix}logp_w")
        for row in rows:
            del row[f"{prefix}margin"], row[f"{prefix}accuracy"]
        jsonl(run / name, rows)
    found = figures.read_run(str(run))
    assert "margin" not in found.steps and "eval_accuracy" not in found.held_out
    for column in (found.steps["logp_w"], found.held_out["eval_logp_w"]):
        assert [math.isnan(value) for value in column] == [i == 1 for i in range(len(column))]
    figure = matplotlib.figure.Figure()
    figures.draw_curves(figure, found)
    assert [ax.get_visible() for ax in figure.axes] == [True, True, False, False, True, True]
    chosen, rejected = (figure.axes[1].lines[i].get_xdata() for i in (0, 3))
    assert list(chosen) == [1, *range(3, 13)] and list(rejected) == list(range(1, 13))
    draw(capsys, tmp_path / "alone", "--runs", run)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == ["captions.md", "figure1.png", "figure2b.png", "run-asft.png"]
    draw(capsys, tmp_path / "both", "--runs", run, f"pairs={pairs}")
    captions = (tmp_path / "both/captions.md").read_text()
    assert re.search(r"trained on: pairs\. Thin", captions)


def test_without_runs_only_figure_1_is_drawn_and_it_says_so(tmp_path, capsys):
    printed = draw(capsys, tmp_path / "out", "--beta", "0.5").out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["captions.md", "figure1.png"]
    check_picture(tmp_path / "out/figure1.png")
    assert "only Figure 1 is drawn" in printed and "beta = 0.5" in printed


def test_without_matplotlib_one_line_gives_the_pip_command(tmp_path):
    """As a subprocess, to show that eval.py itself starts without it."""
    missing = "raise ModuleNotFoundError(\"No module named 'matplotlib'\")\n"
    (tmp_path / "matplotlib.py").write_text(missing)
    command = [sys.executable, ROOT / "eval.py", "figures", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout in NOTHING_SAID and done.stderr.count("\n") == 1
    assert "matplotlib" in done.stderr and "pip install -r evaluation/req" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_is_labelled_by_its_loss_and_reference_and_no_two_alike(tmp_path, capsys):
    a, b = fake_run(tmp_path / "a", "orpo"), fake_run(tmp_path / "b=c", "dpo")
    labels = [figures.read_run(str(text)).label for text in (a, b, f"mine={a}")]
    assert labels == ["orpo", "dpo, precompute", "mine"]
    for runs, label in (((a, a), "'orpo'"), ((f"a 1={a}", f"A/1={b}"), "'A/1'")):
        # The pictures of the second two would have one name.
        assert label in complaint(capsys, tmp_path / "out", "--runs", *runs)


def test_a_name_is_drawn_as_it_stands_and_one_that_is_not_utf_8_is_refused(tmp_path, capsys):
    run = fake_run(tmp_path / "run", steps=1)
    assert r"$\foo$" in draw(capsys, tmp_path / "out", "--runs", rf"$\foo$={run}").out
    error = complaint(capsys, tmp_path / "other", "--runs", f"\udcff={run}")
    assert r"--runs: the name '\udcff' is not UTF-8" in error


BAD_ROWS = """[1]: step, loss
{"step": 1: not JSON
{"step": "x"}: loss
GOOD, "margin": NaN}: margin is nan
GOOD, "margin": "0.1"}: margin is '0.1'
GOOD, "margin": true}: margin is True
GOOD, "margin": -1e308}: margin is -1e+308
GOOD, "margin": HUGE}: margin is 1000
GOOD}: after step"""


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("bad", BAD_ROWS.splitlines())
def test_malformed_rows_are_named_by_file_and_line(tmp_path, capsys, bad, prefix):
    run = fake_run(tmp_path / "run", steps=1)
    file = run / ("eval.jsonl" if prefix else "metrics.jsonl")
    good, (line, said) = file.read_text().splitlines()[0], bad.rsplit(": ", 1)
    fields = {key: value for key, value in json.loads(good).items() if key != prefix + "margin"}
    if "margin" in line:
        fields["step"] += 1
    line = line.replace("HUGE", "1" + "0" * 400).replace("margin", prefix + "margin")
    line = line.replace("GOOD", json.dumps(fields)[:-1])
    file.write_text(f"{good}\n{line}\n")
    error = complaint(capsys, tmp_path / "out", "--runs", run)
    assert f"{file}:2: " in error and said in error.replace("eval_", "")


NOT_A_RUN = """
nowhere/config.json: No such file: MISSING
metrics.jsonl: no step: metrics.jsonl=
metrics.jsonl: no step: metrics.jsonl=[]
metrics.jsonl: No such file: metrics.jsonl
config.json: no flags: config.json={}
config.json: no flags: config.json=[1]
config.json: not JSON: config.json={
config.json: no flags: config.json={"flags": {"loss": "unheard of"}, "device": "CPU"}"""


@pytest.mark.parametrize("row", NOT_A_RUN.split("\n")[1:])
def test_a_directory_that_is_not_a_run_is_named(tmp_path, capsys, row):
    """Each row: the complaint, and a file that is missing or has another content."""
    run = fake_run(tmp_path / "run")
    file, message, change = row.split(": ", 2)
    name, changed, content = change.partition("=")
    if changed:
        (run / name).write_text(content)
    elif name == "MISSING":
        run = f"name={tmp_path}/nowhere"
    else:
        (run / name).unlink()
    assert f"{file}: {message}" in complaint(capsys, tmp_path / "out", "--runs", run)


def test_wrong_flags_are_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--beta: found 0, wanted float" in complaint(capsys, tmp_path / "out", "--beta", "0")
    assert "--beta: found much" in complaint(capsys, tmp_path / "out", "--beta", "much")
    assert "--out" in complaint(capsys, tmp_path / "file")
    for arguments, said in ((["figures"], "--out"), ([], "COMMAND")):
        assert main(arguments) == 2 and said in capsys.readouterr().err
