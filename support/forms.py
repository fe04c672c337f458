"""Every form that a record of preferences or prompts may have: the formats of TRL, HH-RLHF,
UltraFeedback and LLaMA-Factory, and token ids. docs/data-formats.md shows each.

In reading order
    messages, transcript, question              a conversation as JSON, as HH's text, as one text
    prompt_key ... PROMPT_FORMS                 where the prompt is: recognition, in one place
    parse_pair, parse_side                      a record -> prompt, chosen, rejected
    text, token_ids                             checked values

A function here raises ValueError that says what it found; its caller adds file and line.
"""

from collections.abc import Callable

import numpy as np

from support.files import shown

Turns = list[tuple[str, str]]  # (role, content); content has no outer white space, nor does the
# chat format keep any
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def messages(value: object, key: str) -> Turns:
    """[{"role", "content"}, ...], or [{"from", "value"}, ...]."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {shown(value)}, wanted a string or a list of messages")
    turns = []
    for message in value:
        keys = message.keys() if isinstance(message, dict) else set()
        role_key, content_key = ("role", "content") if "role" in keys else ("from", "value")
        if not {role_key, content_key} <= keys:
            wanted = "wanted a message with role and content (or from, value)"
            raise ValueError(f"{key} holds {shown(message)}, {wanted}")
        role, content = message[role_key], message[content_key]
        if not isinstance(role, str) or role not in ROLES:
            wanted = f"wanted one of {', '.join(ROLES)}"
            raise ValueError(f"{key} holds the role {shown(role)}, {wanted}")
        turns.append((ROLES[role], text(content, key).strip()))
    return turns


def transcript(value: str) -> Turns:
    """HH-RLHF's text: a turn starts at "\\n\\nHuman:" or "\\n\\nAssistant:", and nowhere else."""
    turns = []
    for i, part in enumerate(("\n\n" + value.lstrip()).split("\n\nHuman:")):
        first, *replies = part.split("\n\nAssistant:")
        if i > 0:
            turns.append(("user", first.strip()))
        turns += [("assistant", reply.strip()) for reply in replies]
    return turns


def question(value: str) -> Turns:
    """A user's turn, or the turns of an HH transcript that ends where the reply belongs."""
    if value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
        return transcript(value)[:-1]
    return [("user", value.strip())]


def prompt_key(record: dict) -> Turns:
    """TRL, HH-RLHF, UltraFeedback: {"prompt": a text or messages}."""
    value = record["prompt"]
    if isinstance(value, str):
        return question(text(value, "prompt"))
    return messages(value, "prompt")


def conversations_key(record: dict) -> Turns:
    """LLaMA-Factory's sharegpt: {"conversations": messages}."""
    return messages(record["conversations"], "conversations")


def instruction_key(record: dict) -> Turns:
    """LLaMA-Factory's alpaca: {"instruction", "input", "history": [[question, answer], ...]}."""
    turns, history = [], record.get("history")
    if history is None:
        history = []
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise ValueError(f"history holds {shown(exchange)}, wanted [question, answer]")
        asked, answered = (text(part, "history").strip() for part in exchange)
        turns += [("user", asked), ("assistant", answered)]
    parts = [text(record["instruction"], "instruction")]
    if record.get("input") is not None:
        parts.append(text(record["input"], "input"))
    return [*turns, ("user", "\n".join(part for part in parts if part).strip())]


# Where the prompt of a record is. The first of these keys that it has decides; without any of them
# its answers hold the prompt: they are whole conversations.
PROMPT_FORMS: dict[str, Callable[[dict], Turns]] = {
    "conversations": conversations_key,
    "instruction": instruction_key,
    "prompt": prompt_key,
}
ID_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")  # token ids, used as they are


def parse_pair(record: object) -> tuple | None:
    """(prompt, chosen, rejected): turns and two texts, or three int32 arrays of token ids.

    None if the two sides have different prompts; ValueError if the record is not a pair.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, found {shown(record)}")
    if any(key in record for key in ID_KEYS):
        return tuple(np.array(token_ids(record, key), dtype=np.int32) for key in ID_KEYS)
    for key in ("chosen", "rejected"):
        if key not in record:
            raise ValueError(f"key {key} is missing, found {shown(', '.join(sorted(record)))}")
    found = [key for key in PROMPT_FORMS if key in record]
    prompt = PROMPT_FORMS[found[0]](record) if found else []
    prompt_w, chosen = parse_side(prompt, record, "chosen")
    prompt_l, rejected = parse_side(prompt, record, "rejected")
    return (prompt_w, chosen, rejected) if prompt_w == prompt_l else None


def parse_side(prompt: Turns, record: dict, key: str) -> tuple[Turns, str]:
    """The prompt and the reply of one side, whose value is the reply, what follows the prompt
    (messages that start with the assistant's), or the whole conversation."""
    value = record[key]
    if isinstance(value, str) and prompt:
        turns = [*prompt, ("assistant", text(value, key).strip())]
    elif isinstance(value, str):
        if not value.lstrip().startswith(("Human:", "Assistant:")):
            raise ValueError(
                f"key prompt is missing, and {key} is not a transcript that starts with 'Human:'"
            )
        turns = transcript(text(value, key))
    else:
        turns = messages(value if isinstance(value, list) else [value], key)
        # A system turn may stand before the prompt's own turns, so these may start anywhere.
        holds_prompt = any(turns[i : i + len(prompt)] == prompt for i in range(len(turns)))
        if not holds_prompt and turns[0][0] != "assistant":
            raise ValueError(
                f"prompt is not among the turns of {key}, nor do they start with the assistant's"
            )
        if not holds_prompt:
            turns = [*prompt, *turns]
    turns = with_system(turns, record)
    if turns[-1][0] != "assistant":
        turns = [*turns, ("assistant", "")]  # encode_preferences drops the pair as empty
    return turns[:-1], turns[-1][1]


def with_system(turns: Turns, record: dict) -> Turns:
    """The turns after the record's own `system` text, if it has one."""
    system = record.get("system")
    if system in (None, "") or turns[0] == ("system", text(system, "system")):
        return turns
    return [("system", text(system, "system").strip()), *turns]


def text(value: object, key: str) -> str:
    """The value itself, if it is a string of whole Unicode characters."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, wanted a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair, which is not Unicode text") from None
    return value


def token_ids(record: dict, key: str) -> list[int]:
    """The value of a key, if it is a list of token ids."""
    value = record.get(key)
    if not isinstance(value, list) or not all(map(is_token_id, value)):
        found = "missing" if value is None else shown(value)
        raise ValueError(f"{key} is {found}, wanted a list of token ids")
    return value


def is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31  # JSON's true is an int to isinstance
