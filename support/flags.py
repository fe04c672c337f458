"""The flags of a program: a frozen dataclass gives the flags, --help, the command and config.json.

train.py's Config names each setting once, with its default and one line of help; those that are not
the method's come from support/settings.py. Here are the steps between it and what a user types or
resumes:

    flag, spell             a field with its line of help; a field's name as a flag
    RANGES, check_flags     what a field may hold, and what goes with what
    resolved                --max-tokens set, and --checkpoint-blocks checked, for a model
    check_answers           rows with one answer, and a loss that compares two
    FlagParser, parse       the command line -> a Config, with the options of its loss checked
    recorded_flags          the flags of the run that --resume names
    command_line            a Config -> the flags that give it
"""

import argparse
import dataclasses
import inspect
import math
import shlex
import typing
from pathlib import Path

import torch

import asft
from support.files import InputError, read_json, shown

LOSS_OPTIONS = {option for loss in asft.LOSSES.values() for option in loss.options}
REFERENCE_OPTIONS = {"reference", "reference_cache"}
# Flags that --resume may change. Any other flag, also a new one, is taken to change the run. Paths
# may change, but not the content behind them: support/run_directory.py compares it.
PATHS = ("model", "data", "eval_data", "reference_cache", "out", "resume")
MAY_CHANGE = {
    *PATHS,
    *("save_every", "keep", "eval_every", "eval_by", "save_dtype"),
    *("plan", "gpu_memory", "peak_tflops"),
    *("max_tokens_per_gpu", "share_prompt", "checkpoint_blocks", "compile", "device", "replicas"),
}


def flag(default, text: str, choices: tuple | None = None):
    """A field of a configuration: its default, its line of --help, and its choices if any."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def spell(name: str) -> str:
    """A field's name as a flag: max_steps -> --max-steps."""
    return "--" + name.replace("_", "-")


SMALLEST = torch.finfo(torch.float32).smallest_normal  # below it, numbers are flushed to 0
RANGES = (
    ("lr temperature peak_tflops gpu_memory", "a number above 0", lambda x: 0 < x < math.inf),
    ("eps adam_eps", "1.2e-38 or more, fp32's smallest", lambda x: SMALLEST <= x < math.inf),
    ("max_grad_norm", "a number above 0", lambda x: x > 0),  # inf: no clipping
    ("epochs max_steps pairs_per_step max_tokens max_tokens_per_gpu", "1 or more", lambda x: x > 0),
    ("replicas keep plan", "1 or more", lambda x: x > 0),
    ("beta sft_weight gamma weight_decay", "0 or more", lambda x: 0 <= x < math.inf),
    ("seed eval_every samples save_every", "0 or more", lambda x: x >= 0),
    ("warmup_ratio min_lr_ratio", "0 to 1", lambda x: 0 <= x <= 1),
    ("adam_beta1 adam_beta2", "0 to below 1", lambda x: 0 <= x < 1),
)


def check_flags(config) -> None:
    """Raises InputError if a field of train.Config is out of its range, or if fields do not go
    together. A field that is None was not given and is not checked."""
    for names, wanted, allowed in RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not allowed(value):
                raise InputError(f"{spell(name)} is {value}, wanted {wanted}")
    only_align = config.loss == "asft" and config.sft_weight == 0
    if config.beta == 0 and (only_align or config.loss in ("dpo", "dpo-norm", "ipo", "simpo")):
        flags = f"--loss {config.loss}" + " --sft-weight 0" * only_align
        raise InputError(f"--beta is 0.0, wanted more for {flags}: it would be constant")
    for name in ("out", "eval_data", "eval_by", "reference_cache"):
        if getattr(config, name) == "":
            raise InputError(f"{spell(name)} is empty: a shell variable that is not set?")
    for name in ("model", "out", "reference_cache"):
        try:
            (getattr(config, name) or "").encode()
        except UnicodeEncodeError:
            value = shown(getattr(config, name))
            raise InputError(
                f"{spell(name)} is {value}, which is not UTF-8: safetensors cannot open files there"
            ) from None
    if config.ipo_sum and config.loss != "ipo":
        raise InputError(f"--ipo-sum goes with --loss ipo, found --loss {config.loss}")
    if config.gpu_memory and not config.plan:
        raise InputError("--gpu-memory goes with --plan")
    if not config.model or not config.data:
        raise InputError("--model and --data go together (with neither, the example runs)")
    if (config.eval_every or config.eval_by or config.samples) and not config.eval_data:
        raise InputError("--eval-every, --eval-by and --samples need --eval-data")
    if config.keep_best and not config.eval_every:
        raise InputError("--keep-best needs --eval-data and --eval-every")
    live = config.loss_row.reference and config.reference == "live"
    if config.plan and (config.precision == "fp32" or config.replicas > 1 or live):
        raise InputError(
            "--plan simulates neither --precision fp32, --replicas nor a live reference"
        )


def recomputed_blocks(choice: str, layers: int, on_gpu: bool = False) -> int | None:
    """How many blocks --checkpoint-blocks recomputes; None: as few as a measurement allows. Raises
    InputError for anything but auto, on, off and a number of blocks that the model has."""
    if choice == "auto":
        return None if on_gpu else 0
    if choice in ("on", "off"):
        return layers if choice == "on" else 0
    if not (choice.isascii() and choice.isdigit()):
        raise InputError(
            f"--checkpoint-blocks is {choice}, wanted auto, on, off or a number of blocks"
        )
    if int(choice) > layers:
        raise InputError(f"--checkpoint-blocks is {choice}, but the model has {layers} blocks")
    return int(choice)


def resolved(config, llama):
    """The configuration with --max-tokens set for this model (model.LlamaConfig), after checking
    --checkpoint-blocks. Raises InputError as `resolve_max_tokens` and `recomputed_blocks` do."""
    recomputed_blocks(config.checkpoint_blocks, llama.num_hidden_layers)
    limit = llama.max_position_embeddings
    return dataclasses.replace(config, max_tokens=resolve_max_tokens(config.max_tokens, limit))


def resolve_max_tokens(asked: int | None, limit: int) -> int:
    """Most tokens of prompt plus response: as asked, or the smaller of 2,048 (the paper's) and the
    model's limit. InputError if more are asked for than the model takes."""
    if asked is None:
        return min(2048, limit)
    if asked > limit:
        raise InputError(
            f"--max-tokens {asked} is above the model's max_position_embeddings {limit}"
        )
    return asked


def check_answers(config, path: str, rows: list) -> None:
    """Raises InputError if the loss cannot train on these rows (data.Preference) of a file: some
    have one answer and the loss compares two, or all are bad and it has no term for bad ones. Also
    if --keep-best asks for the accuracy of rows that all have one answer."""
    ones = sum(len(row.answers) == 1 for row in rows)
    if ones and not config.loss_row.one_answer:
        others = " or ".join(name for name, row in asft.LOSSES.items() if row.one_answer)
        raise InputError(
            f"--loss {config.loss} compares two answers, but {ones:,} of {len(rows):,} rows of "
            f"{path} have one; --loss {others} takes them"
        )
    only_good = config.loss == "sft" or config.beta == 0
    if ones and only_good and all(row.chosen is None for row in rows):
        flags = "--loss sft" if config.loss == "sft" else "--beta 0"
        raise InputError(f"{path}: no good answer, and {flags} has no term for bad ones")
    if ones and ones == len(rows) and config.keep_best == "accuracy" and path == config.eval_data:
        raise InputError(f"{path}: no pair, and --keep-best accuracy compares two answers")


class FlagParser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors: one line, exit code 2."""

    def error(self, message: str):
        raise InputError(f"{message} ({self.prog} --help lists the flags)")


def parse(config_class: type, arguments: list[str] | None, example: dict, description: str):
    """The command line -> a configuration. Without --model and --data the example's settings hold.

    A flag that is not given has its loss's own default (asft.LOSSES), else the field's. Raises
    InputError for flags that the loss does not use and for changes that --resume does not allow.
    """
    given = vars(_parser(config_class, description).parse_args(arguments))
    if "resume" in given and (recorded := recorded_flags(config_class, given)):
        for name in sorted(given.keys() - MAY_CHANGE):
            if given[name] != recorded[name]:
                raise InputError(
                    f"{spell(name)} is {given[name]}, but the run in {given['out']} has "
                    f"{recorded[name]}; a resumed run cannot change it"
                )
        return config_class(**(recorded | given))
    if "model" not in given and "data" not in given:
        given = example | given
    loss = given.get("loss", config_class.loss)
    options = asft.LOSSES[loss].options
    if unused := sorted(given.keys() & LOSS_OPTIONS - options.keys()):
        takes = ", ".join(map(spell, options)) or "none"
        raise InputError(
            f"{spell(unused[0])} is not an option of --loss {loss}, which takes {takes}"
        )
    if not asft.LOSSES[loss].reference and (unused := sorted(given.keys() & REFERENCE_OPTIONS)):
        raise InputError(
            f"{spell(unused[0])} is not an option of --loss {loss}, which uses no reference model"
        )
    if given.get("reference") == "live" and "reference_cache" in given:
        raise InputError("--reference-cache needs --reference precompute, found --reference live")
    return config_class(**(options | given))


def _parser(config_class: type, description: str) -> FlagParser:
    """A parser with a flag for each field; --help begins with the description and the class's
    docstring. Flags that are not given leave no value behind."""
    parser = FlagParser(
        prog="train.py",
        usage="python train.py [FLAGS]",
        description=f"{description}\n\n{inspect.getdoc(config_class) or ''}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for field in method_first(config_class):
        text = field.metadata["help"]
        if field.default not in (None, "") and not isinstance(field.default, bool):
            text += f" [{field.default}]"
        kind = kinds_of(field)[0]
        how = {"type": kind, "choices": field.metadata["choices"]}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if field.name == "resume":  # without a directory it resumes the run in --out
            how |= {"nargs": "?", "const": ""}
        parser.add_argument(spell(field.name), help=text.replace("%", "%%"), **how)
    return parser


def method_first(config_class: type) -> list[dataclasses.Field]:
    """The fields of train.Config, its own before those of support/settings.py."""
    own = inspect.get_annotations(config_class)
    return sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own)


def recorded_flags(config_class: type, given: dict) -> dict | None:
    """The flags in config.json of the run that --resume names, or None if it has not begun.

    Sets given["out"]. Raises InputError if there is no such run, or if its config.json holds
    something that no run writes.
    """
    if given["resume"] and Path(given.setdefault("out", given["resume"])) != Path(given["resume"]):
        raise InputError(
            f"--resume {given['resume']} and --out {given['out']} are two directories; "
            "leave one out"
        )
    if "out" not in given:
        raise InputError("--resume needs a directory: --resume DIR, or --out DIR --resume")
    path = Path(given["out"]) / "config.json"
    if not path.exists() and given["resume"]:
        raise InputError(f"{path}: No such file; --resume DIR needs the directory of a run")
    if not path.exists():
        return None
    facts = read_json(path, "a run's config.json")
    flags = facts.get("flags") if isinstance(facts, dict) else None
    if not isinstance(flags, dict) or flags.keys() != config_class.__dataclass_fields__.keys():
        raise InputError(f"{path}: wanted the config.json of a run of this version of train.py")
    for field in dataclasses.fields(config_class):
        value, choices = flags[field.name], field.metadata["choices"]
        known = choices is None or value is None or value in choices
        if type(value) not in kinds_of(field) or not known:
            raise InputError(
                f"{path}: {field.name} is {shown(value)}, which no run of train.py writes"
            )
    return flags


def kinds_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types of a field's values: str, or str and None, and so on."""
    return typing.get_args(field.type) or (field.type,)


def command_line(config) -> str:
    """The flags that give this configuration, without those that its loss does not use."""
    unused = LOSS_OPTIONS - config.loss_options.keys() | {"resume"}
    if not config.loss_row.reference:
        unused |= REFERENCE_OPTIONS
    if config.loss != "ipo":
        unused |= {"ipo_sum"}
    words = []
    for field in method_first(type(config)):
        name, value = field.name, getattr(config, field.name)
        if name in unused or value is None:
            continue
        if isinstance(value, bool):
            words.append(spell(name) if value else spell("no_" + name))
        else:
            words.append(f"{spell(name)} {shlex.quote(str(value))}")
    return " ".join(words)
