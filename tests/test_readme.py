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
PORTS = re.findall(r"```python\n(.*?beta=0\.1\).*?)```", "\n".join(PAGES.values()), re.S)
SOURCES = [ROOT / "eval.py", *ROOT.glob("evaluation/*.py"), *ROOT.glob("bench/*.py")]
# Of torchrun, ruff and pytest.
OTHER_FLAGS = set("--nproc_per_node --max-restarts --nnodes --node_rank --rdzv_endpoint".split())
OTHER_FLAGS |= {"--check", "--help", "--durations", "--shutdown-timeout", "--signals-to-handle"}


def commands() -> list[str]:
    """Every call of train.py or eval.py, on lines of its own or inline."""
    text = "\n".join(PAGES.values()).replace("\\\n", " ")
    calls = re.findall(r"^ *(?:python|torchrun) .*?((?:train|eval)\.py.*)$", text, re.M)
    calls += re.findall(r"`(?:python|torchrun) [^`\n]*?((?:train|eval)\.py[^`\n]*)`", text)
    return list(dict.fromkeys(re.sub(r" +", " ", call.split(" #")[0]) for call in calls))


def test_the_first_lines_name_the_paper_and_which_asft_this_is():
    title, paragraph = README.split("\n\n")[:2]
    assert "Aligned Supervised Fine-Tuning through Absolute Likelihood" in title
    assert "2409.10571" in paragraph and "2509.23753" in paragraph  # the other ASFT


def test_ci_runs_the_two_commands_of_the_readme_to_the_letter():
    shown = re.findall(r"^ {4}(pip install -r .*)$", README, re.M)
    assert len(shown) == 2
    script = (ROOT / ".ci/run").read_text().splitlines()
    # `|| exit 1`, since bash's -e does not stop at a failure on the left of &&.
    assert all(f"{command} || exit 1" in script for command in shown)


def test_both_programs_and_the_port_are_shown():
    assert PORTS and {call.split(".py")[0] for call in commands()} == {"train", "eval"}


@pytest.mark.parametrize("call", commands())
def test_every_command_shown_is_one_that_the_program_takes(call):
    # Single capitals stand for numbers, and "..." for more flags; hinge is an example's own loss.
    text = call.replace("hinge", "asft").replace("COMMAND", "generate")
    text = re.sub(r"\b[A-Z]\b", "1", text)
    name, *given = [word for word in shlex.split(text) if word not in ("...", "…")]
    try:
        if name == "train.py":
            parse(train.Config, given, train.EXAMPLE, "")
        else:
            eval.parse(given)
    except SystemExit as end:
        assert "--help" in given and end.code == 0
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
    quoted = " ".join(re.findall(r"`([^`\n]+)`", PAGES[page]))
    assert set(re.findall(r"--[a-z_-]+[a-z]", quoted)) <= known
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", PAGES[page]):
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), name
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", PAGES[page]):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("code", PORTS, ids=range(len(PORTS)))
def test_the_port_shown_gives_the_papers_loss(code):
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in ([-1.0, -0.7], [-1.0, -0.9]))
    given = {"chosen_logps": chosen, "rejected_logps": rejected}
    exec(code, given)
    loss = (1.145867514539 + 0.822183544291) / 2
    assert given["loss"].item() == pytest.approx(loss, rel=1e-6)
    given["loss"].backward()
    slopes = [0.0581976706869 / 2, 0.0685117750405 / 2]
    assert rejected.grad.tolist() == pytest.approx(slopes, rel=1e-5)
    assert given.get("logged", {"accuracy": 0.5})["accuracy"] == 0.5
    assert len(code.strip().splitlines()) <= 12
