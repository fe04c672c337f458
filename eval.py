"""Evaluates a model: answers, likelihoods, BLEU and ROUGE, MT-Bench and Arena-Hard, figures.

    python eval.py generate --model DIR --prompts FILE --out FILE     answers to prompts
    python eval.py likelihood --model DIR --data FILE --out DIR       log-probs of preference pairs
    python eval.py score --predictions FILE --json OUT                BLEU-4 and ROUGE
    python eval.py mt-bench answer --model DIR --questions FILE --out ANSWERS ...
    python eval.py mt-bench judge --answers ANSWERS --judge-model NAME --out JUDGMENTS ...
    python eval.py mt-bench report --judgments JUDGMENTS ... --json OUT
    python eval.py arena-hard answer|judge|report ...                 the same three steps
    python eval.py tables --runs NAME=DIR ...                         the paper's tables
    python eval.py figures --out DIR --runs RUN NAME=RUN ...          the paper's figures
    python eval.py COMMAND --help                                     the flags of a command

If generate, answer or judge is interrupted, the same command resumes it. Under torchrun, generate,
likelihood and answer hold the whole model in each process and split the rows between them. The code
of each command, and its flags, are in evaluation/; docs/evaluation.md shows all of them at work.
"""

import support  # noqa: F401  before torch, which reads what it sets

# isort: split
import argparse

from evaluation import answers, benchmarks, figures, judge, likelihood, reports, scores, tables
from evaluation.benchmarks import ARENA_HARD, MT_BENCH
from support.flags import FlagParser, spell
from support.processes import exit_code, leave

# Each module has `add_flags(parser)`, in STEPS `add_flags(parser, bench)`, and `run(flags)`.
COMMANDS = {
    "generate": (answers, "a model's answers to prompts"),
    "likelihood": (likelihood, "log-probs of preference pairs"),
    "score": (scores, "BLEU-4 and ROUGE of predictions against references"),
    "tables": (tables, "the paper's tables, models side by side"),
    "figures": (figures, "the paper's figures, as PNG"),
}
STEPS = {
    "answer": (benchmarks, "answers of a model"),
    "judge": (judge, "judgments of answers, by an endpoint"),
    "report": (reports, "scores of judgments, with intervals"),
}


def parse(
    arguments: list[str] | None = None, flags: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Parses a command's flags into `flags` (default: a new Namespace). `flags.run` is the function
    to run."""
    parser = FlagParser(
        prog="python eval.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(run=module.run)
        module.add_flags(command)
    for name, bench in (("mt-bench", MT_BENCH), ("arena-hard", ARENA_HARD)):
        benchmark = commands.add_parser(name, help=f"{bench.name}: answer, judge, report")
        steps = benchmark.add_subparsers(required=True, metavar="STEP")
        for step, (module, text) in STEPS.items():
            command = steps.add_parser(step, help=text, allow_abbrev=False)
            command.set_defaults(run=module.run, bench=bench)
            module.add_flags(command, bench)
    return parser.parse_args(arguments, flags)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (support.processes.exit_code)."""
    flags = argparse.Namespace()  # made here, since memory_advice reads it after a failure

    def run() -> None:
        parse(arguments, flags)
        flags.run(flags)

    def memory_advice() -> str | None:
        for name in ("cache_tokens", "max_tokens_per_gpu"):  # what bounds a command's memory
            if now := getattr(flags, name, None):
                return (
                    f"lower {spell(name)} from {now} to {now // 2}, unless the model alone is too "
                    "large"
                )
        return None

    return exit_code("eval.py", run, memory_advice)


if __name__ == "__main__":
    leave(main)
