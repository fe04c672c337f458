"""Prompts to answer: read from a file in the forms of support/forms.py, and encoded.

In reading order
    Prompt, read_prompts         a whole file of them; every fault is named with file and line
    parse_prompt, find_prompt    one row; a preference's chosen answer is the reference
    encode_prompts               token ids, ready for an answer
"""

from dataclasses import dataclass
from pathlib import Path

from data import ChatFormat
from support.files import InputError, shown
from support.forms import (
    ID_KEYS,
    PROMPT_FORMS,
    Turns,
    has_labelled_answer,
    instruction_text,
    parse_pair,
    present,
    refuse_left_out,
    refuse_lost_parts,
    stored_messages,
    text,
    token_ids,
    with_system,
)
from support.records import read_records


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer: turns, a plain text to continue, or token ids."""

    prompt: Turns | str | list[int]
    reference: str | list[int] | None  # a good answer, if the row has one: a text or token ids
    place: str  # "file:line", or "file: record 3"


def read_prompts(path: str | Path, raw: bool = False) -> list[Prompt]:
    """Reads JSONL, JSONL.gz, or a JSON array of rows; each row may have a form of its own:

        "a text"                 the same as {"prompt": "a text"}
        prompt                   a text or messages; `system` may stand beside it
        messages                 likewise
        instruction [, input]    `system` and `history` may stand beside it
        prompt_ids               token ids, used as they are
        chosen, chosen_ids       a preference in any form: its prompt, and this as reference
        label or kto_tag         one answer, in any form but ids: if good, it is the reference

    and perhaps `reference` or `output`, an answer to compare with. A text is a user's turn, or an
    HH transcript that ends with "Assistant:"; with `raw` it is a text to continue, unchanged, and
    turns are refused. Other keys are ignored. Raises InputError with the place of the first row
    that has none of these forms or whose prompt is empty.
    """
    prompts = []
    for place, record in read_records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            row = {"prompt": record} if isinstance(record, str) else record
            prompts.append(Prompt(*parse_prompt(row, raw), place))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: {error}") from None
    if not prompts:
        raise InputError(f"{path}: no prompt in it")
    return prompts


PROMPT_KEYS = ("prompt", "messages", "instruction", "prompt_ids")
ANSWER_KEYS = ("reference", "output", "chosen_ids")


def parse_prompt(row: object, raw: bool) -> tuple[Turns | str | list[int], str | list[int] | None]:
    """(prompt, reference) of a row; ValueError if it is not a prompt."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is a string or a JSON object, found {shown(row)}")
    row = present(row)
    labelled = "reference" not in row and has_labelled_answer(row)
    if "chosen" not in row and not labelled:
        prompt, references = find_prompt(row, raw), [key for key in ANSWER_KEYS if key in row]
        if len(references) > 1:
            raise ValueError(f"found {' and '.join(references)}, wanted one of them")
        reference = None
        for key in references:
            reference = token_ids(row, key) if key in ID_KEYS else text(row[key], key)
    elif raw or any(key in row for key in ID_KEYS):
        raise ValueError("found a preference, wanted its prompt as turns: no --raw, no token ids")
    elif "chosen" not in row:  # one answer, which is a reference if it is good and not empty
        prompt, good, _ = parse_pair(row)
        reference = good or None
    else:  # what the row holds as rejected does not matter
        prompt, reference, _ = parse_pair(row | {"rejected": row["chosen"]})
    role, content = prompt[-1] if prompt and isinstance(prompt[-1], tuple) else ("user", prompt)
    if role != "user":
        raise ValueError(f"the last turn is the {role}'s, wanted the user's")
    if not content:
        raise ValueError("the prompt is empty")
    return prompt, reference


def find_prompt(row: dict, raw: bool) -> Turns | str | list[int]:
    """The turns, the text to continue or the token ids that a row without answers asks for."""
    found = [key for key in PROMPT_KEYS if key in row]
    if len(found) != 1:
        names = shown(", ".join(sorted(row)))
        raise ValueError(f"found {names}, wanted one of the keys {', '.join(PROMPT_KEYS)}")
    (key,) = found
    if key == "prompt_ids":
        return token_ids(row, key)
    refuse_left_out(row)
    if not raw:
        if isinstance(row[key], str):
            row[key] = stored_messages(row[key], key)
        turns = with_system(PROMPT_FORMS[key](row), row)
        refuse_lost_parts(row, turns)
        return turns
    turns = row.get("system") or row.get("history") or key == "messages"
    if turns or not isinstance(row[key], str):
        raise ValueError("found turns, and --raw wants plain text")
    return instruction_text(row).strip() if key == "instruction" else text(row[key], key)


def is_ids(prompt: Prompt) -> bool:
    """True if the prompt is token ids."""
    return isinstance(prompt.prompt[0], int)


def encode_prompts(prompts: list[Prompt], chat: ChatFormat, vocab_size: int) -> list[list[int]]:
    """Token ids: of turns, in the chat format up to the header of the assistant's next turn; of a
    plain text, after BOS. `chat` is not used if all prompts are token ids. Raises InputError for
    ids that are not below vocab_size."""
    encoded = []
    for p in prompts:
        ids = p.prompt
        if isinstance(p.prompt, str):
            ids = [chat.begin, *chat.encode([p.prompt])[0]]
        elif isinstance(p.prompt[0], tuple):
            ids = chat.prompt(p.prompt)
        if (most := max(ids)) >= vocab_size:
            found = f"{p.place}: token id {most} is not below"
            raise InputError(f"{found} the model's vocab_size {vocab_size}")
        encoded.append(ids)
    return encoded
