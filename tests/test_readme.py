"""What README.md and docs/*.md show is true: the code, the commands, the flags, the files.

The data formats of docs/data-formats.md are read in test_data.py, the trainer that is shown for TRL
runs in test_trl.py.
"""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import eval
import train
from support.files import InputError
from support.flags import parse, spell

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
SOURCES = [ROOT / "eval.py", *ROOT.glob("evaluation/*.py"), *ROOT.glob("bench/*.py")]
# Of torchrun, ruff and pytest.
OTHER_FLAGS = set("--nproc_per_node --max-restarts --nnodes --node_rank --rdzv_endpoint".split())
OTHER_FLAGS |= {"--check", "--help", "--durations", "--shutdown-timeout"}


def commands() -> list[str]:
    """Every line of a page that calls train.py or eval.py, its continuations joined to it."""
    text = "\n".join(PAGES.values()).replace("\\\n", " ")
    calls = re.findall(r"^ *(?:python|torchrun) .*?((?:train|eval)\.py.*)$", text, re.M)
    return list(dict.fromkeys(re.sub(r" +", " ", call.split(" #")[0]) for call in calls))


def test_the_first_line_names_the_paper_and_which_asft_this_is():
    first = README.splitlines()[0]
    assert "Aligned Supervised Fine-Tuning through Absolute Likelihood" in first
    assert "2409.10571" in first


def test_ci_runs_the_two_commands_of_the_readme_to_the_letter():
    shown = re.findall(r"^ {4}(pip install -r .*)$", README, re.M)
    assert len(shown) == 2
    script = (ROOT / ".ci/run").read_text().splitlines()
    # `|| exit 1`, since bash's -e does not stop at a failure on the left of &&.
    assert all(f"{command} || exit 1" in script for command in shown)


def test_there_are_commands_of_both_programs():
    assert {call.split(".py")[0] for call in commands()} == {"train", "eval"}


@pytest.mark.parametrize("call", commands())
def test_every_command_shown_is_one_that_the_program_takes(call):
    # Single capitals stand for numbers, and "..." for more flags; hinge is an example's own loss.
    text = re.sub(r"\b[A-Z]\b", "1", call.replace("hinge", "asft"))
    name, *given = [word for word in shlex.split(text) if word not in ("...", "…")]
    try:
        if name == "train.py":
            parse(train.Config, given, train.EXAMPLE, "")
        else:
            eval.parse(given)
    except InputError as error:
        # The directory to resume is not there; what "..." stands for is missing.
        partial = "..." in call and "are required" in str(error)
        assert partial or "config.json: No such file; --resume" in str(error), error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_file_and_link_that_a_page_names_exists(page):
    known = {spell(field) for field in train.Config.__dataclass_fields__} | OTHER_FLAGS
    known |= {flag.replace("--", "--no-") for flag in known}
    for source in SOURCES:
        known |= set(re.findall(r'"(--[a-z-]+)"', source.read_text()))
    for flag in re.findall(r"`[^`\n]*?(--[a-z_-]+[a-z])", PAGES[page]):
        assert flag in known, flag
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", PAGES[page]):
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), name
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_the_port_shown_gives_the_papers_loss():
    code = re.search(r"<!-- port -->\n```python\n(.*?)```", "\n".join(PAGES.values()), re.S)[1]
    assert len(code.strip().splitlines()) <= 12
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([-1.0, -0.7], [-1.0, -0.9]))
    given = {"chosen_logps": chosen, "rejected_logps": rejected}
    exec(code, given)
    loss = (1.145867514539 + 0.822183544291) / 2
    assert given["loss"].item() == pytest.approx(loss, rel=1e-6)
    given["loss"].backward()
    slopes = [0.0581976706869 / 2, 0.0685117750405 / 2]
    assert rejected.grad.tolist() == pytest.approx(slopes, rel=1e-5)
    assert given["logged"]["accuracy"] == 0.5
