"""eval.py figures: equations 15 to 18 and their ratios, the pictures, and messages on faults."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import asft
from eval import main
from evaluation import figures

AXIS = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
X2, X1 = (x.flatten() for x in torch.meshgrid(AXIS, AXIS, indexing="ij"))
BETAS = (0.1, 0.5, 1.0, 3.0)


def autograd(surface, *points):
    """The sum's gradient for each of the points: an oracle that knows no equation."""
    leaves = [point.clone().requires_grad_() for point in points]
    return torch.autograd.grad(surface(*leaves).sum(), leaves)


def central_differences(surface, x1, x2, h=1e-6):
    by_x1 = surface(x1 + h, x2) - surface(x1 - h, x2)
    by_x2 = surface(x1, x2 + h) - surface(x1, x2 - h)
    return by_x1 / (2 * h), by_x2 / (2 * h)


def losses():
    yield figures.asft_surface, figures.asft_gradient
    for beta in BETAS:
        yield (
            lambda x1, x2, beta=beta: figures.bt_surface(x1, x2, beta),
            lambda x1, x2, beta=beta: figures.bt_gradient(x1, x2, beta),
        )


def trained(x1, x2):
    """The align term that train.py trains on, at these probabilities."""
    return asft.asft_loss(x1.log(), x2.log(), beta=1, sft_weight=0)[0]


def close(found, wanted, rtol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-12)


def test_equation_17_is_the_align_term_that_is_trained_on():
    close(figures.asft_surface(X1, X2), trained(X1, X2))


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


def test_equations_16_and_18_are_the_gradients_by_autograd_and_by_finite_differences():
    for surface, gradient in losses():
        close(gradient(X1, X2), autograd(surface, X1, X2))
        close(gradient(X1, X2), central_differences(surface, X1, X2), rtol=1e-5)


def test_equation_18_is_the_gradient_of_the_align_term_that_is_trained_on():
    close(figures.asft_gradient(X1, X2), autograd(trained, X1, X2))


@pytest.mark.parametrize("beta", BETAS)
def test_in_probabilities_bradley_terry_pushes_the_rejected_answer_x1_over_x2_times_as_hard(beta):
    d1, d2 = figures.bt_gradient(X1, X2, beta)  # equation 21
    assert bool((d1 < 0).all() and (d2 > 0).all())
    close(d2.abs() / d1.abs(), X1 / X2)


def test_in_probabilities_asft_pushes_the_chosen_answer_1_minus_x2_over_x1_times_as_hard():
    d1, d2 = figures.asft_gradient(X1, X2)  # equation 25
    assert bool((d1 < 0).all() and (d2 > 0).all())
    close(d1.abs() / d2.abs(), (1 - X2) / X1)


def test_in_log_probabilities_bradley_terry_pushes_both_equally_and_asft_by_1_and_the_odds():
    for surface, gradient in losses():
        found = figures.log_gradient(X1, X2, gradient(X1, X2))
        exact = autograd(lambda w, l, s=surface: s(w.exp(), l.exp()), X1.log(), X2.log())
        close(found, exact)
        if surface is figures.asft_surface:
            close(found, (-torch.ones_like(X1), X2 / (1 - X2)))
        else:
            close(found[0], -found[1])


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
    run = fake_run(tmp_path / "run", "orpo", steps=1, held_out=False)
    draw(capsys, tmp_path / "out", "--runs", run)
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
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "matplotlib" in done.stderr and "pip install -r evaluation/req" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_reference_is_labelled_by_its_loss_and_one_with_it_by_both(tmp_path):
    assert figures.read_run(str(fake_run(tmp_path / "a", "orpo"))).label == "orpo"
    assert figures.read_run(str(fake_run(tmp_path / "b=c", "dpo"))).label == "dpo, precompute"
    assert figures.read_run(f"mine={tmp_path / 'a'}").label == "mine"


def test_two_runs_of_one_label_are_refused(tmp_path, capsys):
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b")
    assert "'asft'" in complaint(capsys, tmp_path / "out", "--runs", a, b)
    # their pictures would have one name
    assert "'A/1'" in complaint(capsys, tmp_path / "out", "--runs", f"a 1={a}", f"A/1={b}")


BAD_ROWS = """[1]: step, loss
{"step": 1: not JSON
{"step": "x"}: loss
GOOD, "margin": NaN}: margin is nan
GOOD, "margin": "0.1"}: margin is '0.1'
GOOD, "margin": true}: margin is True"""


@pytest.mark.parametrize("bad", BAD_ROWS.splitlines())
def test_malformed_rows_are_named_by_file_and_line(tmp_path, capsys, bad):
    run = fake_run(tmp_path / "run", steps=1)
    line, said = bad.rsplit(": ", 1)
    for file, prefix in ((run / "eval.jsonl", "eval_"), (run / "metrics.jsonl", "")):
        good = file.read_text().splitlines()[0]
        fields = {key: value for key, value in json.loads(good).items() if key != prefix + "margin"}
        bad_row = line.replace("GOOD", json.dumps(fields)[:-1]).replace("margin", prefix + "margin")
        file.write_text(f"{good}\n{bad_row}\n")
        error = complaint(capsys, tmp_path / "out", "--runs", run)
        assert f"{file}:2: " in error and said in error.replace("eval_", "")


@pytest.mark.parametrize("nothing", ["", "[]"])
def test_a_run_without_a_step_is_refused(tmp_path, capsys, nothing):
    metrics = fake_run(tmp_path / "run") / "metrics.jsonl"
    metrics.write_text(nothing)
    error = complaint(capsys, tmp_path / "out", "--runs", tmp_path / "run")
    assert f"{metrics}: no step" in error


def test_a_directory_that_is_not_a_run_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert "nowhere" in complaint(capsys, out, "--runs", tmp_path / "nowhere")
    assert "nowhere" in complaint(capsys, out, "--runs", f"name={tmp_path / 'nowhere'}")
    run = fake_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in complaint(capsys, out, "--runs", run)
    unheard = '{"flags": {"loss": "unheard of", "reference": "live"}, "device": "CPU"}'
    for text in ("{}", "[1]", "{", unheard):
        (run / "config.json").write_text(text)
        assert "config.json" in complaint(capsys, out, "--runs", run)


def test_wrong_flags_are_one_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert "--beta: found 0, wanted float" in complaint(capsys, out, "--beta", "0")
    assert "--beta" in complaint(capsys, out, "--beta", "much")
    (tmp_path / "file").write_text("")
    assert "--out" in complaint(capsys, tmp_path / "file")
    for arguments, said in ((["figures"], "--out"), ([], "COMMAND")):
        assert main(arguments) == 2 and said in capsys.readouterr().err
