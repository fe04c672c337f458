"""Evaluates: answers, likelihoods, BLEU and ROUGE, MT-Bench and Arena-Hard; the paper's tables and figures.

    python eval.py generate --model DIR --prompts FILE --out FILE     a model's answers to prompts
    python eval.py likelihood --model DIR --data FILE --out DIR       log-probs of both sides of preference pairs
    python eval.py score --predictions FILE --json OUT                BLEU-4 and ROUGE against references
    python eval.py mt-bench answer --model DIR --questions FILE --out ANSWERS ...
    python eval.py mt-bench judge --answers ANSWERS --endpoint URL --judge-model NAME --out JUDGMENTS ...
    python eval.py mt-bench report --judgments JUDGMENTS ... --json OUT    scores and intervals
    python eval.py arena-hard answer|judge|report ...                 the same three steps
    python eval.py tables --runs NAME=DIR ...                         the paper's tables, from what --json wrote
    python eval.py figures --out DIR --runs RUN NAME=RUN ...          Figure 1, and Figure 2 of runs of train.py
    python eval.py COMMAND --help                                     its flags

A command that was interrupted continues when the same call is made again. Under torchrun each process holds the whole
model and takes its share of the rows.
"""

import argparse
import contextlib
import os
import sys

# OpenMP threads that wait spin by default, which makes a busy CPU many times slower; as in train.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from evaluation import answers, benchmarks, figures, judge, likelihood, reports, scores, tables
from evaluation.benchmarks import ARENA_HARD, MT_BENCH
from support.files import InputError
from support.flags import FlagParser
from support.processes import complain, out_of_memory

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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's flags, and the command itself as `command`. Each module adds its own flags."""
    parser = FlagParser(
        prog="python eval.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(command=module.run)
        module.add_flags(command)
    for name, bench in (("mt-bench", MT_BENCH), ("arena-hard", ARENA_HARD)):
        benchmark = commands.add_parser(name, help=f"{bench.name}: answer, judge, report")
        steps = benchmark.add_subparsers(required=True, metavar="STEP")
        for step, (module, text) in STEPS.items():
            command = steps.add_parser(step, help=text, allow_abbrev=False)
            command.set_defaults(command=module.run, bench=bench)
            module.add_flags(command, bench)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a user's mistake and for memory that is not there, with one clear line, or 130 when
    interrupted."""
    flags = argparse.Namespace()
    try:
        flags = parse(arguments)
        flags.command(flags)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        said = str(error)
    except OSError as error:
        said = f"{error.filename or 'standard output'}: {error.strerror}"
    except (RuntimeError, MemoryError) as error:
        lower = next(
            (name for name in ("cache_tokens", "max_tokens_per_gpu") if name in flags), None
        )
        if lower is None or not out_of_memory(error):
            raise
        said = (
            f"out of memory; lower --{lower.replace('_', '-')} from {getattr(flags, lower)} to "
            f"{getattr(flags, lower) // 2}, unless the model alone is too large"
        )
    complain("eval.py", said)
    return 2


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # as in train.py: sys.exit lets gloo's threads race the interpreter's end
