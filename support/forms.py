"""Every form that a record of preferences or prompts may have: the formats of TRL, HH-RLHF,
UltraFeedback and LLaMA-Factory, and token ids. docs/data-formats.md shows each.

In reading order
    present, messages, transcript       a conversation as JSON and as HH's text
    prompt_key ... PROMPT_FORMS         where the prompt is: recognition, in one place
    parse_pair, parse_side              a record -> prompt, chosen, rejected
    read_label, answer_key              a record with one answer, good or bad
    with_system                         a system text beside a system turn
    likely_mistakes, unread_keys        what is kept or left out, but said in the header
    stored_messages, text, token_ids    checked values

A function here raises ValueError that says what it found; its caller adds file and line.
"""

import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from support.files import shown, unique

Turns = list[tuple[str, str]]  # (role, content), the content without outer white space
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
SPELLINGS = (("role", "content"), ("from", "value"))


def present(record: dict) -> dict:
    """The keys that have a value. datasets, pandas and polars write null, and pandas NaN, under the
    keys that a row does not have."""
    return {key: value for key, value in record.items() if value is not None and value == value}


def messages(value: object, key: str) -> Turns:
    """[{"role", "content"}, ...], or [{"from", "value"}, ...]. An empty system turn is none."""
    if not isinstance(value, list) or not value:
        text_too = "" if key in ("conversations", "messages") else "a string or "
        raise ValueError(f"{key} is {shown(value)}, wanted {text_too}a list of messages")
    turns = [parse_message(message, key) for message in value]
    return [turn for turn in turns if turn != ("system", "")] or turns


# Keys of a record or a message that change what the model should see, and are not implemented.
LEFT_OUT = ("tools", "tool_calls", "functions", "function_calls", "function_call")
LEFT_OUT += ("image", "images", "video", "videos", "audio", "audios")


def refuse_left_out(found: dict) -> None:
    for key in LEFT_OUT:
        if key in found and not blank(found[key]):
            raise ValueError(f"{key} is {shown(found[key])}: tools and media are not implemented")


def blank(value: object) -> bool:
    """True if a value says nothing, as columns do under which a row has nothing."""
    if isinstance(value, (list, dict)):
        return all(map(blank, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False


def parse_message(message: object, key: str) -> tuple[str, str]:
    found = present(message) if isinstance(message, dict) else {}
    refuse_left_out(found)
    said = set()
    for role_key, content_key in SPELLINGS:
        if role_key in found and content_key in found:
            role, content = found[role_key], text(lone_part(found[content_key]), key).strip()
            if not isinstance(role, str) or role not in ROLES:
                wanted = f"wanted one of {', '.join(ROLES)}"
                raise ValueError(f"{key} holds the role {shown(role)}, {wanted}")
            said.add((ROLES[role], content))
    if len(said) != 1:
        wanted = "wanted a message with role and content (or from, value)"
        raise ValueError(f"{key} holds {shown(message)}, {wanted}")
    return said.pop()


def lone_part(content: object) -> object:
    """The text of a content's only part, as for multimodal models; any other content as it is."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        part = present(content[0])
        if part.keys() == {"type", "text"} and part["type"] == "text":
            return part["text"]
    return content


def transcript(value: str) -> Turns:
    """HH-RLHF's text: a turn starts at "\\n\\nHuman:" or "\\n\\nAssistant:", and nowhere else. The
    blank lines before the first turn may be missing. [] if the text does not start with a turn."""
    if not value.lstrip().startswith(("Human:", "Assistant:")):
        return []
    turns = []
    for i, part in enumerate(("\n\n" + value.lstrip()).split("\n\nHuman:")):
        first, *replies = part.split("\n\nAssistant:")
        if i > 0:
            turns.append(("user", first.strip()))
        turns += [("assistant", reply.strip()) for reply in replies]
    return turns


def question(value: str) -> Turns:
    """A user's turn; or the turns of an HH transcript that ends where the reply belongs, or that
    has its leading blank lines and ends with the user's turn."""
    turns = transcript(value)
    if len(turns) > 1 and turns[-1] == ("assistant", ""):
        return turns[:-1]
    if value.startswith("\n\n") and turns and turns[-1][0] == "user":
        return turns
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


def messages_key(record: dict) -> Turns:
    """LLaMA-Factory's openai form: {"messages": messages}."""
    return messages(record["messages"], "messages")


def instruction_key(record: dict) -> Turns:
    """LLaMA-Factory's alpaca: {"instruction", "input", "history": [[question, answer], ...]}."""
    turns, history = [], record.get("history", [])
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise ValueError(f"history holds {shown(exchange)}, wanted [question, answer]")
        asked, answered = (text(part, "history").strip() for part in exchange)
        turns += [("user", asked), ("assistant", answered)]
    return [*turns, *question(instruction_text(record))]


def refuse_lost_parts(record: dict, prompt: Turns) -> None:
    """`input` and `history` belong to `instruction`. Beside another prompt they would be lost,
    unless they are the text of one of its turns."""
    said = {content for _, content in prompt}
    for key in ("input", "history"):
        value = record.get(key)
        kept = "instruction" in record or (isinstance(value, str) and value.strip() in said)
        if not kept and not blank(value):
            raise ValueError(f"{key} is {shown(value)}, without the instruction that it belongs to")


def instruction_text(record: dict) -> str:
    parts = [text(record[key], key) for key in ("instruction", "input") if key in record]
    return "\n".join(part for part in parts if part)


# Where the prompt of a record is. Without any of these keys, its answers hold the prompt: they are
# whole conversations.
PROMPT_FORMS: dict[str, Callable[[dict], Turns]] = {
    "conversations": conversations_key,
    "instruction": instruction_key,
    "prompt": prompt_key,
    "messages": messages_key,
}
# A record without those keys, whose answers are plain texts, may have its prompt here
# (orca_dpo_pairs).
LONE_PROMPTS = ("question", "input")
PAIR_KEYS = ("chosen", "rejected")
ID_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")  # token ids, used as they are
# A record with one answer says under a label if it is good (true) or bad (false). The answer is
# under a key of its own, or ends a conversation.
LABELS = ("label", "kto_tag")
ANSWER_KEYS, CONVERSATION_KEYS = ("completion", "output"), ("messages", "conversations")


def parse_pair(record: object) -> tuple | None:
    """(prompt, chosen, rejected): turns and two texts, or three int32 arrays of token ids. A record
    with one answer has None in place of the other.

    None if the two sides have different prompts. ValueError if the record is neither a pair nor one
    labelled answer, if a prompt has no user's turn or, given as messages, does not end with one, if
    two keys give different prompts, or if a key has tools or media.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, found {shown(record)}")
    record = present(record)
    good = read_label(record)
    if any(key in record for key in (*ID_KEYS, "response_ids")):
        keys = ID_KEYS if good is None else ("prompt_ids", "response_ids")
        prompt, *answers = (np.array(token_ids(record, key), dtype=np.int32) for key in keys)
        return prompt, *as_pair(answers, good)
    keys = PAIR_KEYS if good is None else (answer_key(record) or "completion",)
    if missing := [key for key in keys if key not in record]:
        wanted = "chosen and rejected, or an answer and a label (docs/data-formats.md)"
        raise ValueError(f"key {missing[0]} is missing: found {names(record)}, wanted {wanted}")
    refuse_left_out(record)
    parse_stored(record, keys)
    prompts = read_prompt_keys(record)
    prompts.pop(keys[0], None)  # a conversation that ends with the one answer
    # UltraFeedback repeats the chosen conversation under `messages`: that is not a prompt.
    repeated = [key for key in CONVERSATION_KEYS if key in prompts and is_answered(prompts[key])]
    conversations = {key: prompts.pop(key) for key in repeated}
    given = one_prompt(prompts, record, keys)
    sides = [parse_side(given, record, key) for key in keys]
    (prompt, answer), (other_prompt, _) = sides[0], sides[-1]
    for key, conversation in conversations.items():
        if not same_conversation(conversation, [*prompt, ("assistant", answer)]):
            raise ValueError(f"{key} hold another conversation than {keys[0]}, wanted one")
    if prompt != other_prompt:
        return None
    refuse_lost_parts(record, prompt)
    last_role = prompt[-1][0]
    as_messages = any(isinstance(record.get(key), list) for key in (*list(prompts)[:1], *keys))
    if last_role != "user" and as_messages:  # TRL would continue that turn
        raise ValueError(f"the turn before the answer is the {last_role}'s, wanted the user's")
    return prompt, *as_pair([answer for _, answer in sides], good)


def parse_stored(record: dict, keys: Sequence[str]) -> None:
    """Puts the messages in the place of a text that holds them. keys: of the answers."""
    for key in (*keys, "prompt", "conversations", "messages"):
        if key == "prompt" and said_by_user(record.get(key), record, keys):
            record[key] = [{"role": "user", "content": record[key]}]  # text, whatever it looks like
        if isinstance(record.get(key), str):
            record[key] = stored_messages(record[key], key)


def is_answered(turns: Turns) -> bool:
    """True if a conversation ends with the assistant's turn."""
    return turns[-1][0] == "assistant"


def one_prompt(prompts: dict[str, Turns], record: dict, keys: Sequence[str]) -> Turns:
    """The prompt that all keys of `prompts` give; without any, that of `lone_prompt`."""
    first, *others = prompts or [None]
    for other in others:
        if prompts[other] != prompts[first]:
            raise ValueError(f"{first} and {other} give different prompts, wanted one")
    return prompts[first] if prompts else lone_prompt(record, keys)


def names(record: dict) -> str:
    """The keys of a record, for a message."""
    return shown(", ".join(sorted(record)), 200)


def said_by_user(prompt: object, record: dict, keys: Sequence[str]) -> bool:
    """True if a text that looks like a transcript, or like messages, is a user's turn of an answer
    that is a list of messages: then it is that text. keys: of the answers."""
    if not isinstance(prompt, str) or not (transcript(prompt) or BRACKET.match(prompt)):
        return False
    said = [messages(record[key], key) for key in keys if isinstance(record[key], list)]
    return any(("user", prompt.strip()) in turns for turns in said)


def lone_prompt(record: dict, keys: Sequence[str]) -> Turns:
    """The prompt under one of LONE_PROMPTS, if the answers are texts; [] otherwise: then they must
    hold their prompt."""
    plain = all(isinstance(record[key], str) and not transcript(record[key]) for key in keys)
    found = [key for key in LONE_PROMPTS if key in record]
    return [("user", text(record[found[0]], found[0]).strip())] if plain and found else []


def as_pair(answers: Sequence, good: bool | None) -> Sequence:
    """[chosen, rejected]; one of them is None if there is one answer, good or bad."""
    if good is None:
        return answers
    return (answers[0], None) if good else (None, answers[0])


def read_label(record: dict) -> bool | None:
    """True or False if the record has one answer, good or bad; None if it has two. ValueError if
    it has a pair and a labelled answer, since either may be meant."""
    labels = {key: record[key] for key in LABELS if key in record}
    own = [key for key in (*ANSWER_KEYS, "response_ids") if key in record]
    if pair := [key for key in (*PAIR_KEYS, *ID_KEYS[1:]) if key in record]:
        if own and any(isinstance(label, bool) for label in labels.values()):
            found = f"{pair[0]}, and {own[0]} with {' and '.join(labels)}"
            raise ValueError(f"found {found}; wanted a pair or one labelled answer")
        return None
    for key, label in labels.items():
        if not isinstance(label, bool):
            raise ValueError(f"{key} is {shown(label)}, wanted true (a good answer) or false (bad)")
    if len(set(labels.values())) > 1:
        raise ValueError("label and kto_tag differ, wanted one")
    if not labels and own and own[0] != "output":
        raise ValueError(f"key label is missing: wanted true or false beside {own[0]}")
    return next(iter(labels.values()), None)


def has_labelled_answer(record: dict) -> bool:
    """True if the record is text with one answer that a label calls good or bad."""
    labelled = any(isinstance(record.get(key), bool) for key in LABELS)
    return labelled and "prompt_ids" not in record and answer_key(record) is not None


def answer_key(record: dict) -> str | None:
    """Where a record with one answer has it. ValueError for two of its own."""
    own = [key for key in ANSWER_KEYS if key in record]
    if len(own) > 1:
        raise ValueError("found completion and output, wanted one answer")
    return next((key for key in (*own, *CONVERSATION_KEYS) if key in record), None)


def same_conversation(repeated: Turns, turns: Turns) -> bool:
    """True if `repeated` says what `turns` say. It may lack their system turn, not add one that
    says something."""
    systems = [[], *(content.split() for role, content in turns if role == "system")]
    added = [turn for turn in repeated if turn[0] == "system" and turn[1].split() not in systems]
    spoken, others = ([turn for turn in x if turn[0] != "system"] for x in (repeated, turns))
    return spoken == others and not added


def read_prompt_keys(record: dict) -> dict[str, Turns]:
    """The prompt that each of the record's keys gives. An empty one counts as absent beside
    another."""
    found = [key for key in PROMPT_FORMS if key in record]
    filled = [key for key in found if record[key] not in ("", [])]
    return {key: PROMPT_FORMS[key](record) for key in filled or found[:1]}


def parse_side(prompt: Turns, record: dict, key: str) -> tuple[Turns, str]:
    """The prompt and the reply of one side."""
    turns = side_turns(prompt, record, key)
    if not turns or not is_answered(turns):
        turns = [*turns, ("assistant", "")]  # encode_preferences drops the pair as empty
    if not any(role == "user" for role, _ in turns[:-1]):
        wanted = f"{', '.join(PROMPT_FORMS)}, or whole conversations as answers"
        raise ValueError(
            f"key prompt is missing or has no user's turn: found {names(record)}, wanted {wanted}"
        )
    turns = with_system(turns, record)
    return turns[:-1], turns[-1][1]


def side_turns(prompt: Turns, record: dict, key: str) -> Turns:
    """The conversation of one side: its value, if that holds the prompt, or the prompt and the
    value as the reply (a text, or messages that start with the assistant's)."""

    def whole(turns: Turns) -> bool:
        # A system turn or earlier turns may stand before the prompt's own: it may start anywhere.
        return any(turns[i : i + len(prompt)] == prompt for i in range(len(turns)))

    value = record[key]
    if isinstance(value, str):
        turns = transcript(text(value, key))
        if whole(turns):
            return turns
        if transcript(str(record.get("prompt", ""))) and turns and turns[0][0] == "user":
            raise ValueError(f"{key} is a transcript that does not contain the prompt's turns")
        return [*prompt, ("assistant", value.strip())]
    if not isinstance(value, (list, dict)):
        raise ValueError(f"{key} is {shown(value)}, wanted a string or messages")
    turns = messages(value if isinstance(value, list) else [value], key)
    if whole(turns):
        return turns
    if turns[0][0] != "assistant":
        raise ValueError(
            f"prompt is not among the turns of {key}, nor do they start with the assistant's"
        )
    return [*prompt, *turns]


def with_system(turns: Turns, record: dict) -> Turns:
    """The turns with the record's own `system` text, if it has one: it takes the place of a system
    turn that is equal but for white space. Any other system turn is a second source: ValueError."""
    system = text(record.get("system", ""), "system").strip()
    given = [turn for turn in turns if turn[0] == "system"]
    if not system:
        return turns
    if not given:
        return [("system", system), *turns]
    for turn in given:
        if turn[1].split() != system.split():
            raise ValueError(f"system is {shown(system)}, and a system turn is {shown(turn[1])}")
    return [("system", system) if turn in given else turn for turn in turns]


# Of the formats of Llama 2 and 3, ChatML, Zephyr, Gemma, Alpaca, Guanaco and HH.
MARKERS = ("<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<|end_of_text|>", "[/INST]")
MARKERS += ("<|im_start|>", "<|im_end|>", "<|assistant|>", "<|endoftext|>", "<start_of_turn>")
MARKERS += ("### Response:", "### Assistant:", "\n\nHuman:", "\n\nAssistant:")
SCORES = tuple(
    tuple(form.format(name, side) for side in PAIR_KEYS)
    for name in ("score", "scores", "rating", "reward")
    for form in ("{0}_{1}", "{1}_{0}", "{1}-{0}")
)
NOTHING = ("nan", "NaN", "None", "null", "<NA>")  # missing values, written as texts


def likely_mistakes(record: dict, prompt, *answers) -> list[str]:
    """What may be wrong with a pair that is not refused, by the names of its counts."""
    answers = [answer for answer in answers if answer is not None]
    found = {
        "repeat their prompt": repeats_prompt(prompt, answers),
        "scored the other way": scored_the_other_way(record),
    }
    if isinstance(prompt, list):
        texts = [*(content for _, content in prompt), *answers]
        found["hold chat markers"] = any(map(marked, texts)) or any(map(ends_as_llama_2, answers))
        found["hold a word for nothing"] = any(text.strip() in NOTHING for text in texts)
    else:
        ends = [ids[-3:].tolist() for ids in answers if len(ids) > 3]
        found["end in one id"] = any(len(set(end)) == 1 for end in ends)
    return [name for name, is_so in found.items() if is_so]


def marked(text: str) -> bool:
    """True if a text holds markers of a chat format, or messages that were turned into text."""
    if any(mark in text for mark in MARKERS):
        return True
    return bool(BRACKET.match(text) and NAMED_ROLE.search(text))


def ends_as_llama_2(answer: str) -> bool:
    return answer.endswith("</s>") and "<s>" not in answer[1:]  # else it is HTML


# Keys that a form has, of records of ids and of texts.
READ_IDS = {*ID_KEYS, "response_ids", *LABELS, *(key for pair in SCORES for key in pair)}
READ = {*READ_IDS, *PROMPT_FORMS, "history", "system", "input", *PAIR_KEYS, *LEFT_OUT}


def unread_keys(record: dict) -> list[str]:
    """The keys that hold something and that this record's form has not, as a header shows them."""
    found = {key: value for key, value in present(record).items() if value not in ("", [], {})}
    read = READ_IDS if "prompt_ids" in found else READ
    if "chosen" not in found:
        read = read | {*ANSWER_KEYS}
    answer = found.get("chosen", found.get("completion"))
    if isinstance(answer, str) and not (found.keys() & PROMPT_FORMS.keys() or transcript(answer)):
        read = read | {*LONE_PROMPTS}
    return [shown(key)[1:-1] for key in found if key not in read]


def scored_the_other_way(record: dict) -> bool:
    """True if a score of the rejected answer, under any usual name, is above the chosen one's."""
    for keys in SCORES:
        if keys[0] in record and keys[1] in record:
            scores = [record[key] for key in keys]
            if {type(score) for score in scores} <= {int, float} and scores[0] < scores[1]:
                return True
    return False


def repeats_prompt(prompt, answers: list) -> bool:
    """True if all answers begin with the prompt (texts: with its last turn). They would be scored
    on repeating it."""
    if not isinstance(answers[0], str):
        n = len(prompt)
        return n > 0 and all(np.array_equal(ids[:n], prompt) for ids in answers)
    asked = prompt[-1][1]

    def repeats(answer: str) -> bool:  # its last word as a whole: "High" does not repeat "Hi"
        return answer.startswith(asked) and not re.match(r"\w", answer[len(asked) :])

    return bool(asked) and all(map(repeats, answers))


# ----------------------------------------------------------------------------------- checked values

# Messages that were turned into text begin with a brace, perhaps after brackets, a quote
# (json.dumps twice) or a name (str() of numpy), or with a name in brackets (Spark), and name a
# role.
BRACKET = re.compile(r"""\s*["']?(?:\w+\()?(?:[\[(]\s*)*(?:\{|[\[(]\s*\w+\()""")
ANY_ROLE = rf"""\\?["'](?:{"|".join(ROLES)})\\?["']"""
NAMED_ROLE = re.compile(rf"""\b(?:role|from)\\?["']?\s*[:=]\s*{ANY_ROLE}|\{{{ANY_ROLE},""")


def stored_messages(value: str, key: str) -> object:
    """The messages that a text holds as JSON, or the text itself. ValueError for messages that
    cannot be read back: a repr of Python's, numpy's or polars', or JSON that was cut. JSON with
    other text after it is a text."""
    if not BRACKET.match(value):
        return value
    try:
        parsed = json.loads(value, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        if not NAMED_ROLE.search(value) or begins_with_json(value):
            return value
        found = f"{key} holds messages as text that is not JSON ({shown(value)})"
        raise ValueError(f"{found}; wanted a list") from None
    if isinstance(parsed, str):
        return stored_messages(parsed, key)
    if isinstance(parsed, list):
        return parsed if parsed and all(map(looks_like_message, parsed)) else value
    # A lone object may be an answer in JSON, such as {"from": "Rome", "value": "3"}.
    return parsed if looks_like_message(parsed) and NAMED_ROLE.search(value) else value


def begins_with_json(value: str) -> bool:
    """True if a text begins with a whole JSON value and goes on as text."""
    try:
        end = json.JSONDecoder().raw_decode(value.strip())[1]
    except (ValueError, RecursionError):
        return False
    return end < len(value.strip())


def looks_like_message(value: object) -> bool:
    found = present(value) if isinstance(value, dict) else {}
    return any(
        isinstance(found.get(a), str) and isinstance(lone_part(found.get(b)), str)
        for a, b in SPELLINGS
    )


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
    # JSON's true is an int to isinstance.
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        found = "missing" if value is None else shown(value)
        raise ValueError(f"{key} is {found}, wanted a list of token ids")
    return value
