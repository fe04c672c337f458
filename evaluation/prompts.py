""" """

from dataclasses import dataclass
from pathlib import Path

from data import (
    ChatFormat,
    Turns,
    _ids,
    _instruction,
    _sides,
    _text,
    _transcript_or_user,
    _turns,
    read_records,
)
from support.files import InputError, shown


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer: turns, or a text to go on with, or token ids where the file holds ids."""

    prompt: Turns | str | list[int]
    reference: str | None  # a good answer, where the row has one
    place: str  # "file:line"


# What holds the prompt of a row, and what may stand beside it.
PROMPT_KEYS = {
    "prompt": ["system"],
    "messages": ["system"],
    "instruction": ["input", "system", "history"],
    "prompt_ids": [],
}


def read_prompts(path: str | Path, raw: bool = False) -> list[Prompt]:
    """Reads JSONL, JSONL.gz, or a JSON array, of strings or of objects with one of

        prompt                   a string or a list of messages; `system` may stand beside
        messages                 a list of messages; likewise
        instruction [, input]    `system` and `history` may stand beside
        prompt_ids               token ids, used as they are
        chosen                   a preference in any form of `read_preferences`: its prompt, and `chosen` as reference

    and perhaps `reference` or `output`, an answer to compare with. A string is a user's turn, or an HH transcript that
    ends with "Assistant:"; with `raw` it is a text to go on with, unchanged, and turns are refused. Raises InputError,
    naming file and line, at the first row that is none of these, has another key, or whose prompt is empty.
    """
    prompts = []
    for line, record in read_records(Path(path)):
        place = f"{path}:{line}"
        try:
            if isinstance(record, ValueError):
                raise record
            prompts.append(
                Prompt(
                    *_prompt({"prompt": record} if isinstance(record, str) else record, raw), place
                )
            )
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
    if not prompts:
        raise InputError(f"{path}: no prompt in it")
    return prompts


def _prompt(record: object, raw: bool) -> tuple[Turns | str | list[int], str | None]:
    """(prompt, reference) of a row; ValueError if it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"a row is a string or a JSON object, found {shown(record)}")
    if "chosen" in record:
        turns, reference, _ = _sides(record | {"rejected": record["chosen"]})
        if raw or not turns or turns[-1][0] != "user":
            raise ValueError(
                "found a preference whose prompt does not end with the user's turn, or --raw"
            )
        return turns, reference
    kinds = [key for key in PROMPT_KEYS if key in record]
    if len(kinds) != 1:
        raise ValueError(
            f"found {shown(', '.join(sorted(record)))}, wanted one of the keys {', '.join(PROMPT_KEYS)}"
        )
    known = [kinds[0], *PROMPT_KEYS[kinds[0]], "reference", "output"]
    if strange := sorted(record.keys() - set(known)):
        raise ValueError(f"key {shown(strange[0])} is unknown, wanted some of {', '.join(known)}")
    answers = [
        _text(record[key], key) for key in ("reference", "output") if record.get(key) is not None
    ]
    if len(answers) > 1:
        raise ValueError("found reference and output, wanted one of them")
    value, system, reference = (
        record[kinds[0]],
        record.get("system"),
        answers[0] if answers else None,
    )
    if kinds[0] == "prompt_ids":
        if not _ids(record, "prompt_ids"):
            raise ValueError("the prompt is empty")
        return value, reference
    if kinds[0] == "instruction":
        turns = _instruction(record)
    elif kinds[0] == "prompt" and isinstance(value, str):
        turns = (
            [("user", _text(value, "prompt"))]
            if raw
            else _transcript_or_user(_text(value, "prompt"))
        )
    else:
        turns = _turns(value, kinds[0])
    if system not in (None, ""):
        turns = [("system", _text(system, "system").strip()), *turns]
    if raw and (len(turns) > 1 or not isinstance(value, str)):
        raise ValueError("found turns, and --raw wants plain text")
    role, content = turns[-1]
    if role != "user":
        raise ValueError(f"the last turn is the {role}'s, wanted the user's")
    if not content:
        raise ValueError("the prompt is empty")
    return content if raw else turns, reference


def encode_prompts(prompts: list[Prompt], chat: ChatFormat, vocab_size: int) -> list[list[int]]:
    """Token ids: of turns in the chat format, up to the header of the assistant's; of a plain text after BOS. Raises
    InputError for ids that are not below vocab_size."""
    encoded = []
    for p in prompts:
        if isinstance(p.prompt, str):
            ids = [chat.begin, *chat.encode([p.prompt])[0]]
        else:
            ids = chat.prompt(p.prompt) if isinstance(p.prompt[0], tuple) else p.prompt
        if max(ids) >= vocab_size:
            raise InputError(
                f"{p.place}: token id {max(ids)} is not below the model's vocab_size {vocab_size}"
            )
        encoded.append(ids)
    return encoded
