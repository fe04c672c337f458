"""eval.py figures: equations 15 to 18 and their ratios, the pictures, and what it says of faults."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import asft
import eval as evaluation

AXIS = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
X2, X1 = (x.flatten() for x in torch.meshgrid(AXIS, AXIS, indexing="ij"))
BETAS = (0.1, 0.5, 1.0, 3.0)


def autograd(surface, *points):
    """The sum's gradient for each of the points: an oracle that knows no equation."""
    leaves = [point.clone().requires_grad_() for point in points]
    return torch.autograd.grad(surface(*leaves).sum(), leaves)


def central_differences(surface, x1, x2, h=1e-6):
    by_x1, by_x2 = (
        surface(x1 + h, x2) - surface(x1 - h, x2),
        surface(x1, x2 + h) - surface(x1, x2 - h),
    )
    return by_x1 / (2 * h), by_x2 / (2 * h)


def losses():
    yield evaluation.asft_surface, evaluation.asft_gradient
    for beta in BETAS:
        yield (
            lambda x1, x2, beta=beta: evaluation.bt_surface(x1, x2, beta),
            lambda x1, x2, beta=beta: evaluation.bt_gradient(x1, x2, beta),
        )


def close(found, wanted, rtol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-12)


def test_equation_17_is_the_align_term_that_is_trained_on():
    close(
        evaluation.asft_surface(X1, X2), asft.asft_loss(X1.log(), X2.log(), beta=1, sft_weight=0)[0]
    )


@pytest.mark.parametrize("beta", BETAS)
def test_equation_15_is_dpos_loss_at_these_log_probs_under_a_reference_of_probability_1(beta):
    zero = torch.zeros_like(X1)
    close(
        evaluation.bt_surface(X1, X2, beta),
        asft.dpo_loss(X1.log(), X2.log(), zero, zero, beta=beta)[0],
    )


def test_surfaces_at_points_worked_by_hand():
    x1, x2 = (
        torch.tensor([0.5, 0.8], dtype=torch.float64),
        torch.tensor([0.5, 0.2], dtype=torch.float64),
    )
    by_hand = torch.tensor(
        [0.6931471805599453, 0.22314355131420976], dtype=torch.float64
    )  # log 2, log(5/4)
    close(evaluation.bt_surface(x1, x2, 1.0), by_hand)
    close(evaluation.asft_surface(x1, x2), 2 * by_hand)


def test_equations_16_and_18_are_the_gradients_by_autograd_and_by_finite_differences():
    for surface, gradient in losses():
        for found, exact, near in zip(
            gradient(X1, X2),
            autograd(surface, X1, X2),
            central_differences(surface, X1, X2),
            strict=True,
        ):
            close(found, exact)
            close(found, near, rtol=1e-5)


def test_equation_18_is_the_gradient_of_the_align_term_that_is_trained_on():
    trained = autograd(
        lambda x1, x2: asft.asft_loss(x1.log(), x2.log(), beta=1, sft_weight=0)[0], X1, X2
    )
    for found, exact in zip(evaluation.asft_gradient(X1, X2), trained, strict=True):
        close(found, exact)


@pytest.mark.parametrize("beta", BETAS)
def test_in_probabilities_bradley_terry_pushes_the_rejected_answer_x1_over_x2_times_as_hard(beta):
    d1, d2 = evaluation.bt_gradient(X1, X2, beta)  # equation 21
    assert bool((d1 < 0).all() and (d2 > 0).all())
    close(d2.abs() / d1.abs(), X1 / X2)


def test_in_probabilities_asft_pushes_the_chosen_answer_1_minus_x2_over_x1_times_as_hard():
    d1, d2 = evaluation.asft_gradient(X1, X2)  # equation 25
    assert bool((d1 < 0).all() and (d2 > 0).all())
    close(d1.abs() / d2.abs(), (1 - X2) / X1)


def test_in_log_probabilities_bradley_terry_pushes_both_answers_equally_and_asft_by_1_and_the_odds():
    for surface, gradient in losses():
        exact = autograd(
            lambda *logs, surface=surface: surface(*[x.exp() for x in logs]), X1.log(), X2.log()
        )
        found = evaluation.log_gradient(X1, X2, gradient(X1, X2))
        for one, other in zip(found, exact, strict=True):
            close(one, other)
        if surface is evaluation.asft_surface:
            close(found[0], -torch.ones_like(X1))
            close(found[1], X2 / (1 - X2))
        else:
            close(found[0], -found[1])


# ------------------------------------------------------------------------------------------------------- the command


def fake_run(where, loss="asft", steps=12, reference="precompute", scale=1.0):
    """What train.py leaves, as far as figures read it."""
    where.mkdir()
    facts = {"flags": {"loss": loss, "reference": reference}, "device": "CPU (1 threads)"}
    (where / "config.json").write_text(json.dumps(facts))
    rows = [
        {
            "step": i,
            "margin": scale * i / 10,
            "seconds": 0.5 * scale + (i == 1),
            "peak_memory_gib": scale + i / 100,
        }
        for i in range(1, steps + 1)
    ]
    (where / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def complaint(capsys, *flags):
    """The one line on stderr of a command that must fail with code 2."""
    assert evaluation.main([str(flag) for flag in flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("eval.py: ")
    return said.err


def check_picture(path):
    from matplotlib.image import imread

    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert 250 <= height <= 2400 and 900 <= width <= 2400
    assert pixels[..., :3].std() > 0.05  # not blank


def test_two_runs_give_three_pictures_and_captions_that_say_what_they_show(tmp_path, capsys):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", "dpo", reference="live", scale=2.0)
    assert (
        evaluation.main(
            [
                "figures",
                "--out",
                str(tmp_path / "new/out"),
                "--runs",
                str(tmp_path / "a"),
                f"DPO with a live reference={tmp_path / 'b'}",
            ]
        )
        == 0
    )
    out, printed = tmp_path / "new/out", capsys.readouterr().out
    names = ["figure1.png", "figure2a.png", "figure2b.png"]
    assert sorted(path.name for path in out.iterdir()) == ["captions.md", *names]
    captions = (out / "captions.md").read_text()
    assert re.findall(r"\((figure\w+\.png)\)", captions) == names
    for name in names:
        check_picture(out / name)
    assert all(line in printed for line in captions.splitlines() if line.startswith("**"))
    assert "in log-probabilities: the asymmetry that the paper describes disappears" in captions
    # medians 0.5 and 1.0, although the first step took a second longer; maxima 1.12 and 2.12
    assert "asft 0.500 s, 1.12 GiB; DPO with a live reference 1.00 s, 2.12 GiB" in captions
    assert "Against asft: DPO with a live reference takes +100.0% time, +89.3% memory" in captions


def test_without_runs_figure_1_alone_is_drawn_and_it_says_so(tmp_path, capsys):
    assert evaluation.main(["figures", "--out", str(tmp_path / "out"), "--beta", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "captions.md",
        "figure1.png",
    ]
    check_picture(tmp_path / "out/figure1.png")
    assert "only Figure 1 is drawn" in printed and "beta = 0.5" in printed


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    """A module of that name that is not there, as a subprocess sees it: eval.py itself must start without it."""
    (tmp_path / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\")\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), "figures", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "pip install matplotlib" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_reference_is_labelled_by_its_loss_and_one_with_it_by_both(tmp_path):
    assert evaluation.read_run(str(fake_run(tmp_path / "a", "orpo"))).label == "orpo"
    assert evaluation.read_run(str(fake_run(tmp_path / "b=c", "dpo"))).label == "dpo, precompute"
    assert evaluation.read_run(f"mine={tmp_path / 'a'}").label == "mine"


def test_two_runs_of_one_label_are_refused(tmp_path, capsys):
    runs = fake_run(tmp_path / "a"), fake_run(tmp_path / "b")
    assert "'asft'" in complaint(capsys, "figures", "--out", tmp_path / "out", "--runs", *runs)


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        (["{}"], ":1: "),
        (['{"step": 1'], ":1: "),
        (["[]"], "no step"),
        ([None, '{"step": "x"}'], ":2: "),
        (["[1]"], ":1: "),
        ([None, '{"step": 2, "margin": NaN, "seconds": 1, "peak_memory_gib": 1}'], ":2: "),
        ([], "no step"),
    ],
)
def test_malformed_metrics_are_named_by_file_and_line(tmp_path, capsys, lines, place):
    metrics = fake_run(tmp_path / "run", steps=1) / "metrics.jsonl"
    good = metrics.read_text().strip()
    metrics.write_text("\n".join(good if line is None else line for line in lines))
    error = complaint(capsys, "figures", "--out", tmp_path / "out", "--runs", tmp_path / "run")
    assert str(metrics) in error and place in error
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_run_is_named(tmp_path, capsys):
    out = ["figures", "--out", tmp_path / "out", "--runs"]
    assert "nowhere" in complaint(capsys, *out, tmp_path / "nowhere")
    assert "nowhere" in complaint(capsys, *out, f"name={tmp_path / 'nowhere'}")
    run = fake_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in complaint(capsys, *out, run)
    for text in (
        "{}",
        "[1]",
        '{"flags": {"loss": "unheard of", "reference": "live"}, "device": "CPU"}',
        "{",
    ):
        (run / "config.json").write_text(text)
        assert "config.json" in complaint(capsys, *out, run)


def test_wrong_flags_are_one_line(tmp_path, capsys):
    assert "--beta: found 0, wanted float" in complaint(
        capsys, "figures", "--out", tmp_path / "out", "--beta", "0"
    )
    assert "--beta" in complaint(capsys, "figures", "--out", tmp_path / "out", "--beta", "much")
    assert "--out" in complaint(capsys, "figures")
    assert "COMMAND" in complaint(capsys)
    (tmp_path / "file").write_text("")
    assert "--out" in complaint(capsys, "figures", "--out", tmp_path / "file")
