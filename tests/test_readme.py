"""The README's commands, examples and tables are true."""

import re

import pytest
import torch
from conftest import ROOT

from data import read_preferences
from evaluation.prompts import read_prompts

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.S)[1]


def test_the_first_line_names_the_paper_and_which_asft_this_is():
    first = README.splitlines()[0]
    assert (
        "Aligned Supervised Fine-Tuning through Absolute Likelihood" in first
        and "2409.10571" in first
    )


def test_ci_runs_the_two_commands_of_the_readme_to_the_letter():
    commands = re.findall(r"^ {4}(pip install -r .*)$", README, re.M)
    assert len(commands) == 2
    script = (ROOT / ".ci/run").read_text().splitlines()
    # `|| exit 1`, since bash's -e does not stop at a failure on the left of &&.
    assert all(f"{command} || exit 1" in script for command in commands)


def test_every_data_format_shown_is_read_as_the_same_question_and_answers(tmp_path):
    (tmp_path / "formats.jsonl").write_text(block("formats"))
    *texts, ids = read_preferences(tmp_path / "formats.jsonl")
    assert len(texts) == 7
    for preference in texts:
        assert preference.prompt[-1][0] == "user" and preference.prompt[-1][1].strip().startswith(
            "Name a fruit."
        )
        assert "pple." in preference.chosen and "pple" not in preference.rejected
    assert (ids.prompt, ids.chosen, ids.rejected) == ([512, 65, 66], [67, 516], [68, 516])


def test_the_port_shown_gives_the_papers_loss():
    given = {
        "chosen_logps": torch.tensor([-1.0, -0.7], requires_grad=True),
        "rejected_logps": torch.tensor([-1.0, -0.9], requires_grad=True),
    }
    code = block("port")
    assert len(code.strip().splitlines()) <= 12
    exec(code, given)
    assert given["loss"].item() == pytest.approx((1.145867514539 + 0.822183544291) / 2, rel=1e-6)
    given["loss"].backward()
    assert given["rejected_logps"].grad.tolist() == pytest.approx(
        [0.0581976706869 / 2, 0.0685117750405 / 2], rel=1e-5
    )
    assert given["logged"]["accuracy"] == 0.5


def test_every_file_and_flag_that_the_readme_names_exists():
    help_text = (ROOT / "train.py").read_text()
    for name in re.findall(r"`((?:tests/|examples/)?\w+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    for flag in set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}:
        assert re.search(rf"^    {flag[2:].replace('-', '_')}: ", help_text, re.M), flag


def test_every_prompt_format_shown_is_read_as_the_same_question(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(block("prompts"))
    *texts, ids = read_prompts(tmp_path / "prompts.jsonl")
    assert len(texts) == 4 and all(p.prompt[-1][1].startswith("Name a fruit.") for p in texts)
    assert [p.reference for p in texts] == [
        None,
        "An apple.",
        None,
        "An apple.",
    ] and ids.prompt == [506, 65, 66]
