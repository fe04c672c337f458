"""What a record says, and what is said twice, nowhere, or in another format: nothing is trained on
by mistake. Expected turns and answers are written out by hand."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, words

from data import ChatFormat, encode_preferences, read_preferences
from evaluation.prompts import read_prompts
from support.files import InputError
from support.reading import describe

EXAMPLE = ROOT / "examples" / "model"
FRUIT, ASK = "Name a fruit.", [("user", "Name a fruit.")]
TEXTS = {"chosen": "An apple.", "rejected": "No."}
HH_TALK = "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Name a fruit.\n\nAssistant:"
TALK = [("user", "Hi."), ("assistant", "Hello."), *ASK]


def messages(*turns: str) -> list[dict]:
    """Messages with role and content, each of a text such as "user: Hi"."""
    split = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": content} for role, content in split]


def answers(*before: str, **both) -> dict:
    """Both answers as messages, after the turns `before`."""
    sides = {"chosen": "assistant: An apple.", "rejected": "assistant: No."}
    return {key: messages(*before, last) for key, last in sides.items()} | both


def transcripts(before: str) -> dict:
    """Both answers as HH transcripts, after the text `before`."""
    return {key: f"{before} {last}" for key, last in TEXTS.items()}


def stored(record: dict, dump=json.dumps) -> dict:
    """A record whose lists are text."""
    return {k: dump(v) if isinstance(v, list | dict) else v for k, v in record.items()}


TOLD = [f"user: {FRUIT}"]
REPLIES, WHOLE = answers(), answers(*TOLD)


def read_one(record, tmp_path: Path) -> tuple:
    """(prompt, chosen, rejected), or the complaint about the record, and the counts."""
    path, counts = tmp_path / "a.jsonl", Counter()
    path.write_text(json.dumps(record) + "\n")
    kept = read_preferences(path, counts, skip_bad_lines=True)
    if kept:
        return (kept[0].prompt, kept[0].chosen, kept[0].rejected), counts
    with pytest.raises(InputError) as caught:
        read_preferences(path)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}:1: ") and first.isprintable() and first.isascii()
    return first, counts


def prompt_of(row, tmp_path: Path, **options):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [prompt] = read_prompts(path, **options)
    return prompt.prompt, prompt.reference


def refused_prompt(row, tmp_path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        prompt_of(row, tmp_path, **options)
    assert str(caught.value).startswith(f"{tmp_path / 'p.jsonl'}:1: ")
    return str(caught.value)


TEXT_PART = {"type": "text", "text": FRUIT, "image": None}
KIND = [("system", "Be kind."), *ASK]
BESIDE = {"system": " Be kind.\n"}
SPACED = "system: Be \n kind."  # equal but for white space
NAN = float("nan")
READ = {
    # the prompt under `messages`
    "messages, then messages": ({"messages": messages(*TOLD)} | REPLIES, ASK),
    "messages, then texts": ({"messages": messages(*TOLD)} | TEXTS, ASK),
    "messages, then one message each": (
        {"messages": messages(*TOLD)} | {k: v[0] for k, v in REPLIES.items()},
        ASK,
    ),
    "messages in both spellings of LLaMA-Factory": (
        {"messages": [{"from": "human", "value": FRUIT}]} | TEXTS,
        ASK,
    ),
    # the prompt under a name of its own, the answers texts
    "question": ({"system": "", "question": FRUIT} | TEXTS, ASK),
    "question beside system": (BESIDE | {"question": f" {FRUIT}"} | TEXTS, KIND),
    "input": ({"input": FRUIT} | TEXTS, ASK),
    "question beside prompt": ({"prompt": FRUIT, "question": "Which?"} | TEXTS, ASK),
    "question beside transcripts": (
        {"question": "Which?"} | transcripts(f"\n\nHuman: {FRUIT}\n\nAssistant:"),
        ASK,
    ),
    "question beside whole conversations": ({"question": "Which?"} | WHOLE, ASK),
    # a text that a conversation holds, whose messages have columns of another form
    "a prompt beside messages with null columns": (
        {"prompt": FRUIT}
        | {
            key: [turn | {"from": None, "value": NAN} for turn in turns]
            for key, turns in answers(*TOLD).items()
        },
        ASK,
    ),
    "one part as JSON": (
        stored({"prompt": [{"role": "user", "content": [TEXT_PART]}]}) | TEXTS,
        ASK,
    ),
    # one part that is a text, as multimodal models have it
    "a content of one part": ({"prompt": [{"role": "user", "content": [TEXT_PART]}]} | TEXTS, ASK),
    # a prompt in two places
    "conversations that repeat the chosen one": (
        {"prompt": FRUIT, "conversations": WHOLE["chosen"]} | WHOLE,
        ASK,
    ),
    "messages that repeat the chosen conversation": (
        {"prompt": FRUIT, "messages": WHOLE["chosen"]} | WHOLE,
        ASK,
    ),
    "the same with a system turn": (
        {"prompt": FRUIT, "messages": WHOLE["chosen"], "system": "Be kind."} | WHOLE,
        KIND,
    ),
    "messages that repeat it, without a prompt": ({"messages": WHOLE["chosen"]} | WHOLE, ASK),
    "two keys with one prompt": (
        {"prompt": FRUIT, "instruction": f" {FRUIT}", "messages": messages(*TOLD)} | TEXTS,
        ASK,
    ),
    "an empty prompt beside another": ({"prompt": "", "instruction": FRUIT} | TEXTS, ASK),
    # a system text in two places, equal but for white space
    "an empty system turn": (answers("system: ", *TOLD), KIND[1:]),
    "an empty system turn on one side": (
        {"chosen": messages("system: ", *TOLD, "assistant: An apple.")}
        | {"rejected": messages(*TOLD, "assistant: No.")},
        KIND[1:],
    ),
    "system beside whole conversations": (BESIDE | answers(SPACED, *TOLD), KIND),
    "system beside a prompt's": (BESIDE | {"prompt": messages(SPACED, *TOLD)} | TEXTS, KIND),
    "system beside one side's": (
        BESIDE | WHOLE | {"chosen": messages(SPACED, *TOLD, "assistant: An apple.")},
        KIND,
    ),
    "an empty system text": ({"system": " \n", "prompt": FRUIT} | TEXTS, ASK),
    # answers that repeat their prompt as transcripts
    "HH twice": ({"prompt": f"\n\n{HH_TALK}"} | transcripts(f"\n\n{HH_TALK}"), TALK),
    "HH twice, without blank lines": ({"prompt": HH_TALK} | transcripts(HH_TALK), TALK),
    "a plain prompt and transcripts": (
        {"prompt": FRUIT} | transcripts(f"\n\nHuman: {FRUIT}\n\nAssistant:"),
        ASK,
    ),
    "an instruction and transcripts": (
        {"instruction": FRUIT} | transcripts(f"\n\nHuman: {FRUIT}\n\nAssistant:"),
        ASK,
    ),
    "messages and transcripts": (
        {"messages": messages(*TOLD)} | transcripts(f"Human: {FRUIT}\n\nAssistant:"),
        ASK,
    ),
    # HH prompts
    "an HH prompt without blank lines": ({"prompt": HH_TALK} | TEXTS, TALK),
    "an HH prompt with one blank line": ({"prompt": f"\n{HH_TALK}\n"} | TEXTS, TALK),
    "an HH prompt as instruction": ({"instruction": HH_TALK, "input": ""} | TEXTS, TALK),
    "an HH prompt that the assistant begins": (
        {"prompt": f"Assistant: Yes?\n\n{HH_TALK}"} | TEXTS,
        [("assistant", "Yes?"), *TALK],
    ),
    "an HH prompt without its last marker": (
        {"prompt": f"\n\n{HH_TALK}".removesuffix("\n\nAssistant:")} | TEXTS,
        TALK,
    ),
    "an HH prompt and message lists": ({"prompt": HH_TALK} | REPLIES, TALK),
    # message lists that went through text
    "answers in JSON": ({"prompt": FRUIT} | stored(WHOLE), ASK),
    "answers in JSON, dumped twice": (
        {"prompt": FRUIT} | stored(WHOLE, lambda v: json.dumps(json.dumps(v))),
        ASK,
    ),
    "one message in JSON": ({"prompt": FRUIT} | stored({k: v[0] for k, v in REPLIES.items()}), ASK),
    "a prompt in JSON": ({"prompt": json.dumps(messages(*TOLD), indent=1)} | TEXTS, ASK),
    "messages in JSON": (stored({"messages": messages(*TOLD)} | REPLIES), ASK),
    "conversations in JSON": (
        stored({"conversations": [{"id": 1, "from": "human", "value": FRUIT}]} | REPLIES),
        ASK,
    ),
    # null and NaN under keys that a row does not have
    "null columns": (
        {"prompt": FRUIT, "conversations": None, "instruction": None, "system": None, "tools": None}
        | {"prompt_ids": None, "chosen_ids": None, "rejected_ids": None, "messages": None}
        | TEXTS,
        ASK,
    ),
    "null as prompt": ({"prompt": None, "history": None} | WHOLE, ASK),
    "NaN columns": (
        {"prompt": FRUIT, "instruction": NAN, "system": NAN, "score": NAN} | TEXTS,
        ASK,
    ),
    "empty tools and media": (
        {
            "prompt": FRUIT,
            "tools": "[]",
            "images": [None, ""],
            "tool_calls": False,
            "videos": "null",
        }
        | {"image": {"bytes": None, "path": None}, "audios": {}, "function_call": "{}"}
        | TEXTS,
        ASK,
    ),
    "empty input and history": ({"prompt": FRUIT, "input": " ", "history": "[]"} | TEXTS, ASK),
    "input and history that are the prompt": (
        {"messages": messages(*TOLD), "input": f" {FRUIT}", "history": FRUIT} | REPLIES,
        ASK,
    ),
    "history beside its transcript": (
        {"prompt": f"\n\nHuman: {FRUIT}\n\nAssistant:", "history": FRUIT} | TEXTS,
        ASK,
    ),
    "a transcript in which the assistant speaks twice": (
        transcripts(f"\n\nHuman: {FRUIT}\n\nAssistant: Let me see.\n\nAssistant:"),
        [*ASK, ("assistant", "Let me see.")],
    ),
    "an empty system turn in messages": (
        {"prompt": FRUIT, "messages": messages("system: ", *TOLD, "assistant: An apple.")} | WHOLE,
        ASK,
    ),
    "a system turn in messages and in the prompt": (
        {"prompt": messages("system: Be kind.", *TOLD)}
        | {"messages": messages(SPACED, *TOLD, "assistant: An apple.")}
        | TEXTS,
        KIND,
    ),
    "null input and history": ({"instruction": FRUIT, "input": None, "history": None} | TEXTS, ASK),
    "null within messages": (
        {"prompt": [{"role": None, "content": None, "from": "human", "value": FRUIT}]}
        | {k: [v[0] | {"from": None, "value": NAN}] for k, v in REPLIES.items()},
        ASK,
    ),
    "both spellings of one message": (
        {"prompt": [{"role": "user", "content": FRUIT, "from": "human", "value": f"{FRUIT} "}]}
        | TEXTS,
        ASK,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_record_is_read_as_its_one_question_and_answers(name, tmp_path):
    record, turns = READ[name]
    pair, counts = read_one(record, tmp_path)
    assert pair == (turns, "An apple.", "No.")
    unread = {"unread key question": 1} if record.get("question") == "Which?" else {}
    assert counts == {"read": 1, "bad lines": 0} | unread


BAD = {
    # no user's turn, whatever the answers are
    "question, then messages": ({"question": FRUIT} | REPLIES, "no user's turn"),
    "question, then one message": (
        {"question": FRUIT, "chosen": REPLIES["chosen"][0], "rejected": REPLIES["rejected"][0]},
        "found 'chosen, question, rejected', wanted conversations, instruction, prompt, messages",
    ),
    "query, then texts": ({"query": FRUIT} | TEXTS, "no user's turn"),
    "input beside question": (
        {"question": FRUIT, "input": "It should be red."} | TEXTS,
        "input is 'It should be red.'",
    ),
    "a conversation of another answer beside a prompt": (
        {"prompt": FRUIT, "conversations": messages(*TOLD, "assistant: A pear.")} | WHOLE,
        "conversations hold another conversation than chosen",
    ),
    "two conversations beside answers, one of them another": (
        {"messages": messages("user: x", "assistant: y"), "conversations": WHOLE["chosen"]} | WHOLE,
        "messages hold another conversation than chosen",
    ),
    "messages as JSON with a key twice": (
        {"prompt": '[{"role": "system", "role": "user", "content": "Hi."}]'} | TEXTS,
        "messages as text that is not JSON",
    ),
    "a message of numbers beside a prompt": (
        {"prompt": "5"} | answers(chosen=[{"from": ["x"], "value": 5}]),
        "chosen is 5, wanted a string",
    ),
    "text and an image as one message": (
        {"prompt": [{"role": "user", "content": [TEXT_PART, {"type": "image"}]}]} | TEXTS,
        "wanted a string",
    ),
    "a text part that has more": (
        {"prompt": [{"role": "user", "content": [TEXT_PART | {"image": "a.png"}]}]} | TEXTS,
        "wanted a string",
    ),
    "a part that is not an object": (
        {"prompt": [{"role": "user", "content": [FRUIT]}]} | TEXTS,
        "wanted a string",
    ),
    "a part of another type": (
        {"prompt": [{"role": "user", "content": [TEXT_PART | {"type": "audio"}]}]} | TEXTS,
        "wanted a string",
    ),
    "functions in a message": (
        {"prompt": [{"role": "user", "content": FRUIT, "functions": "[{}, 1]"}]} | TEXTS,
        "functions is '[{}, 1]': tools and media",
    ),
    "an answer that is an empty system turn": (
        {"prompt": FRUIT} | answers(chosen=messages("system: ")),
        "prompt is not among the turns of chosen",
    ),
    "no answers": (
        {"prompt": FRUIT, "response_0": "An apple.", "is_safe": True},
        "key chosen is missing: found 'is_safe, prompt, response_0', wanted chosen and rejected, "
        "or an answer and a label (docs/data-formats.md)",
    ),
    "the prompt under `conversation`": (
        {"conversation": messages(*TOLD)} | REPLIES,
        "no user's turn",
    ),
    "a transcript that the assistant begins": (transcripts("\n\nAssistant:"), "no user's turn"),
    "the same without blank lines": (transcripts("Assistant:"), "no user's turn"),
    "a system turn only": ({"prompt": messages("system: Be kind.")} | TEXTS, "no user's turn"),
    "system beside nothing": ({"system": FRUIT} | REPLIES, "no user's turn"),
    "an assistant's turn only": ({"prompt": messages("assistant: Yes?")} | TEXTS, "no user's turn"),
    # a prompt of its own that does not end with the user's turn
    "a prompt that the assistant ends": (
        {"prompt": messages(*TOLD, "assistant: Well,")} | TEXTS,
        "the turn before the answer is the assistant's, wanted the user's",
    ),
    "a prompt that the system ends": (
        {"prompt": messages(*TOLD, "system: Be brief.")} | REPLIES,
        "the turn before the answer is the system's, wanted the user's",
    ),
    "conversations in which the assistant answers itself": (
        answers(*TOLD, "assistant: Let me see."),
        "the turn before the answer is the assistant's, wanted the user's",
    ),
    "answers in which the assistant answers itself, after a prompt": (
        {"prompt": FRUIT} | answers("assistant: Let me see."),
        "the turn before the answer is the assistant's, wanted the user's",
    ),
    "one side without": (WHOLE | {"rejected": REPLIES["rejected"]}, "no user's turn"),
    "messages that end with the assistant's": (
        {"messages": WHOLE["chosen"]} | REPLIES,
        "no user's turn",
    ),
    "null as prompt": ({"prompt": None} | TEXTS, "key prompt is missing"),
    "NaN as prompt": ({"prompt": NAN} | REPLIES, "key prompt is missing"),
    # two sources that differ
    "another system turn": (
        BESIDE | answers("system: Be brief.", *TOLD),
        "system is 'Be kind.', and a system turn is 'Be brief.'",
    ),
    "another system turn in the prompt": (
        BESIDE | {"prompt": messages("system: Be brief.", *TOLD)} | TEXTS,
        "a system turn is 'Be brief.'",
    ),
    "another system turn in conversations": (
        BESIDE | {"conversations": messages("system: Be brief.", *TOLD)} | TEXTS,
        "a system turn is",
    ),
    "another system turn beside an equal one": (
        BESIDE | {"prompt": messages(SPACED, "system: Be brief.", *TOLD)} | TEXTS,
        "a system turn is 'Be brief.'",
    ),
    "a system turn only in messages": (
        {"prompt": FRUIT, "messages": messages(SPACED, *TOLD, "assistant: An apple.")} | WHOLE,
        "messages hold another conversation than chosen",
    ),
    "prompt and instruction": (
        {"prompt": FRUIT, "instruction": "Name a colour."} | TEXTS,
        "instruction and prompt give different prompts",
    ),
    "prompt and conversations": (
        {"prompt": "Name a colour.", "conversations": messages(*TOLD)} | TEXTS,
        "conversations and prompt give different prompts",
    ),
    "prompt and messages": (
        {"prompt": "Name a colour.", "messages": messages(*TOLD)} | REPLIES,
        "prompt and messages give different prompts",
    ),
    "messages of another conversation": (
        {"prompt": FRUIT, "messages": messages(*TOLD, "assistant: A pear.")} | WHOLE,
        "messages hold another conversation than chosen",
    ),
    "two spellings of one message": (
        {"prompt": [{"role": "user", "content": FRUIT, "from": "human", "value": "Name a colour."}]}
        | TEXTS,
        "prompt holds",
    ),
    "two roles of one message": (
        {"prompt": [{"role": "user", "content": FRUIT, "from": "gpt", "value": FRUIT}]} | TEXTS,
        "prompt holds",
    ),
    "transcripts of another prompt": (
        {"prompt": HH_TALK} | transcripts("Human: Name a colour.\n\nAssistant:"),
        "chosen is a transcript that does not contain the prompt's turns",
    ),
    # message lists that went through text and cannot be read back
    "Python's repr": ({"prompt": FRUIT} | stored(WHOLE, str), "messages as text that is not JSON"),
    "Python's repr of one message": (
        {"prompt": FRUIT} | stored({k: v[0] for k, v in REPLIES.items()}, str),
        "not JSON",
    ),
    "Python's repr of the prompt": (
        {"prompt": str(messages(*TOLD))} | TEXTS,
        "prompt holds messages as text",
    ),
    "numpy's repr": (
        {"prompt": FRUIT} | stored(WHOLE, lambda v: str(np.array(v, dtype=object))),
        "not JSON",
    ),
    "numpy's other repr": (
        {"prompt": FRUIT} | stored(WHOLE, lambda v: repr(np.array(v, dtype=object))),
        "not JSON",
    ),
    "polars' repr": (
        {
            "prompt": FRUIT,
            "chosen": '[{"user","Name a fruit."}, {"assistant","An apple."}]',
            "rejected": "No.",
        },
        "not JSON",
    ),
    "rows of Spark": (
        {
            "prompt": FRUIT,
            "chosen": "[Row(content='An apple.', role='assistant')]",
            "rejected": "No.",
        },
        "not JSON",
    ),
    "JSON that was cut": (
        {"prompt": FRUIT} | stored(WHOLE, lambda v: json.dumps(v)[:-4]),
        "not JSON",
    ),
    "JSON of an unknown role": (
        {"prompt": FRUIT} | stored(answers(chosen=messages("model: An apple."))),
        "the role 'model'",
    ),
    # what would be lost
    "input beside prompt": (
        {"prompt": FRUIT, "input": "It should be red."} | TEXTS,
        "input is 'It should be red.', without the instruction that it belongs to",
    ),
    "history beside messages": (
        {"messages": messages(*TOLD), "history": [["Hi.", "Hello."]]} | REPLIES,
        "history is [['Hi.', 'Hello.']], without",
    ),
    "input that is another text": (
        {"messages": messages(*TOLD), "input": "Name a colour."} | REPLIES,
        "input is 'Name a colour.', without the instruction",
    ),
    **{
        key: (
            {"prompt": FRUIT, key: [{"name": "f"}]} | TEXTS,
            f"{key} is [{{'name': 'f'}}]: tools and media are not implemented",
        )
        for key in words("tools image images video videos audio audios function_call tool_calls")
    },
    "a call of a tool": (
        {"prompt": FRUIT, "chosen": [REPLIES["chosen"][0] | {"tool_calls": [{"name": "f"}]}]}
        | {"rejected": REPLIES["rejected"]},
        "tool_calls is [{'name': 'f'}]",
    ),
    # null where a value is needed
    "null as an answer": (
        {"prompt": FRUIT, "chosen": None, "rejected": "No."},
        "key chosen is missing",
    ),
    "NaN as an answer": (
        {"prompt": FRUIT, "chosen": "An apple.", "rejected": NAN},
        "key rejected is missing",
    ),
    "null as content": ({"prompt": [{"role": "user", "content": None}]} | TEXTS, "prompt holds"),
    "null as role": ({"prompt": [{"role": None, "content": FRUIT}]} | TEXTS, "prompt holds"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_without_one_clear_prompt_and_answers_is_a_bad_line(name, tmp_path):
    record, found = BAD[name]
    complaint, counts = read_one(record, tmp_path)
    assert found in complaint and counts == {"read": 1, "bad lines": 1}


DOUBTS = {
    "a template in the prompt": (
        {"prompt": "<|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"},
        "hold chat markers",
    ),
    "markers in another turn": (
        {"prompt": messages("user: <|im_start|>", "assistant: Yes?", *TOLD)},
        "hold chat markers",
    ),
    **{
        f"{marker!r} in an answer": ({"rejected": f"No.{marker} x"}, "hold chat markers")
        for marker in (
            *("<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "[/INST]"),
            *(
                "### Response:",
                "\n\nHuman:",
                "\n\nAssistant:",
                "<|end_of_text|>",
                "<|begin_of_text|>",
            ),
            *("<|endoftext|>", "<|assistant|>", "<start_of_turn>", "### Assistant:"),
        )
    },
    "a transcript that began otherwise": (
        {"prompt": "Be kind.\n\nHuman: Name a fruit.\n\nAssistant:"},
        "hold chat markers",
    ),
    **{
        f"{text!r} as a text": ({key: text}, "hold a word for nothing")
        for key, text in [("chosen", "nan"), ("rejected", "None"), ("prompt", "null ")]
    },
    "a word for nothing in a sentence": ({"chosen": "None of them.", "rejected": "nan nan"}, None),
    "scores": ({"score_chosen": 4.0, "score_rejected": 9}, "scored the other way"),
    "a boolean score": ({"chosen_score": False, "rejected_score": True}, None),
    "Llama 2's two ends": ({"chosen": "<s>An apple.</s>"}, "hold chat markers"),
    "a price in HTML": ({"chosen": "Not <s>5</s>"}, None),
    "Llama 2's end of text": ({"chosen": "An apple.</s>"}, "hold chat markers"),
    "ratings": ({"chosen-rating": 1, "rejected-rating": 5}, "scored the other way"),
    "equal scores": ({"score_chosen": 4.0, "score_rejected": 4.0}, None),
    "scores as text": ({"score_chosen": "4", "score_rejected": "9"}, None),
    "markup": ({"chosen": "<s>An</s> <|apple|> [INST]"}, None),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_what_may_be_wrong_is_kept_and_said(name, tmp_path):
    more, count = DOUBTS[name]
    pair, counts = read_one({"prompt": FRUIT} | TEXTS | more, tmp_path)
    assert isinstance(pair, tuple)
    assert counts == {"read": 1, "bad lines": 0} | ({count: 1} if count else {})
    sentences = {
        "hold chat markers": "In 1 a text holds markers of a chat format: left in by mistake?"
    }
    sentences |= {
        "scored the other way": "In 1 the chosen answer has a lower score than the rejected one"
    }
    sentences |= {"hold a word for nothing": "In 1 a text is nan, None or null: missing values?"}
    said = describe(counts)
    assert sentences[count] in said if count else "In 1" not in said


@pytest.mark.parametrize("ids, count", [([4, 5, 7, 7, 7], 1), ([7, 7, 7], 0), ([4, 5, 7, 7], 0)])
def test_token_ids_that_end_like_padding_are_kept_and_said(ids, count, tmp_path):
    record = {"prompt_ids": [1, 2], "chosen_ids": [5, 6], "rejected_ids": ids}
    pair, counts = read_one(record, tmp_path)
    assert isinstance(pair, tuple) and counts["end in one id"] == count
    said = "In 1 an answer ends in a run of one token id: padding?"
    assert (said in describe(counts)) == bool(count)


# Answers that look like stored messages, or like transcripts, and are not.
LITERAL = [
    "[1, 2, 3]",
    "[]",
    "{}",
    "(a) An apple.",
    "[An apple]",
    '{"role": 5, "content": "x"}',
    '{"a": "user"}',
    '{"from": "Rome", "value": "3"}',
    '[{"fruit": "apple"}]',
    '[{"role": 5, "content": "x"}]',
    '[{"role": "user", "content": 5}]',
    '[{"role": "user", "content": "x"}, 3]',
    "{'fruit': 'apple'}",
    "Human: what is it?\n\nAssistant: An apple.",
    "Assistant: An apple.",
    '"An apple," he said.',
]


ODD_TEXTS = [
    HH_TALK,
    "Human: Name a fruit.\n\nAssistant:",
    '[python] messages=[{"role": "user", "content": x}] how do I add a system prompt?',
    json.dumps(messages("user: x", "assistant: y")) + "\n\nContinue this list.",
    json.dumps(messages("user: x")),
    str(messages("user: x")),
]


@pytest.mark.parametrize("prompt", ODD_TEXTS)
def test_a_prompt_that_its_conversations_hold_as_a_turn_is_that_text_and_counted(prompt, tmp_path):
    """UltraFeedback's form: the text under `prompt` is also a turn of both answers."""
    record = {"prompt": f"{prompt}\n"} | answers(f"user: {prompt}")
    pair, counts = read_one(record, tmp_path)
    assert pair == ([("user", prompt)], *TEXTS.values())
    without, counts_without = read_one({k: record[k] for k in TEXTS}, tmp_path)
    assert without == pair and counts == counts_without


@pytest.mark.parametrize("text", ODD_TEXTS[2:4])
def test_code_that_names_a_role_and_goes_on_as_text_is_text_and_counted(text, tmp_path):
    assert read_one({"prompt": text} | TEXTS, tmp_path)[0][0] == [("user", text)]
    pair, counts = read_one({"prompt": FRUIT} | TEXTS | {"chosen": text}, tmp_path)
    assert pair == (ASK, text, "No.")
    assert counts["hold chat markers"] == text.startswith("[{")


def test_keys_that_no_form_has_are_named_in_the_header_the_most_frequent_first(tmp_path):
    """Step-DPO's rows: what the answers continue is under a key of its own."""
    steps = {"prompt": FRUIT, "initial_reason_steps": "First,", "id\n": 0, "empty": [], "no": None}
    path, counts = tmp_path / "a.jsonl", Counter()
    rows = [steps | TEXTS, steps | TEXTS | {"id\n": None, "score_chosen": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_preferences(path, counts)) == 2
    assert describe(counts).endswith(". Keys not trained on: initial_reason_steps, id\\n")
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "system": "Be kind."}
    pair = {"prompt": FRUIT, "question": "Which?", "output": "x", "input": ""} | TEXTS
    kto = {"question": FRUIT, "completion": "An apple.", "label": True}
    for record, unread in ((ids, ["system"]), (pair, ["question", "output"]), (kto, [])):
        counts = read_one(record, tmp_path)[1]
        assert [key for key in counts if key.startswith("unread")] == [
            f"unread key {x}" for x in unread
        ]
    many = Counter({f"unread key {i}": 20 - i for i in range(10)})
    assert describe(many).endswith(". Keys not trained on: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more")
    assert "not trained on" not in describe(read_one({"prompt": FRUIT} | TEXTS, tmp_path)[1])


def test_a_file_without_a_readable_record_points_to_the_forms(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": FRUIT, "response": "No."}) + "\n")
    with pytest.raises(
        InputError, match="1 bad of 1 records; docs/data-formats.md shows the forms"
    ):
        read_preferences(path)


@pytest.mark.parametrize("answer", LITERAL)
def test_an_answer_that_only_looks_like_messages_or_a_transcript_stays_text(answer, tmp_path):
    pair, _ = read_one({"prompt": FRUIT, "chosen": answer, "rejected": "No."}, tmp_path)
    assert pair == (ASK, answer, "No.")


@pytest.mark.parametrize(
    "prompt",
    ["Human: Hi.", "Human: Hi.\n\nAssistant: Hello.", "Assistant:", "[1] What is this?"]
    + ["\n\nHi.", "\n\nHuman: Hi.\n\nAssistant: Hello."],
)
def test_a_prompt_that_only_looks_like_a_transcript_stays_one_turn(prompt, tmp_path):
    turns = [("user", prompt.strip())]
    assert read_one({"prompt": prompt} | TEXTS, tmp_path)[0][0] == turns
    assert prompt_of({"prompt": prompt}, tmp_path)[0] == turns


@pytest.mark.parametrize(
    "record, repeats",
    [
        ({"prompt": FRUIT, "chosen": f"{FRUIT}\nAn apple.", "rejected": f" {FRUIT} No."}, 1),
        (
            {"prompt": FRUIT}
            | answers(
                chosen=messages(f"assistant: {FRUIT} An apple."),
                rejected=messages(f"assistant: {FRUIT}"),
            ),
            1,
        ),
        (
            {
                "instruction": "Sort.",
                "input": "b a",
                "chosen": "Sort.\nb a\na b",
                "rejected": "Sort.\nb a: no",
            },
            1,
        ),
        ({"prompt": HH_TALK, "chosen": f"{FRUIT} An apple.", "rejected": f"{FRUIT} No."}, 1),
        ({"prompt_ids": [1, 2], "chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4]}, 1),
        ({"prompt": FRUIT, "chosen": f"{FRUIT} An apple.", "rejected": "No."}, 0),
        ({"prompt": "Hi", "chosen": "High noon.", "rejected": "Hide."}, 0),
        ({"prompt": "", "chosen": "(An apple.)", "rejected": "- No."}, 0),
        ({"prompt_ids": [1, 2], "chosen_ids": [1, 2, 3], "rejected_ids": [1, 3]}, 0),
        ({"prompt_ids": [], "chosen_ids": [1, 2, 3], "rejected_ids": [1, 3]}, 0),
    ],
)
def test_pairs_whose_answers_both_begin_with_their_prompt_are_kept_and_counted(
    record, repeats, tmp_path
):
    pair, counts = read_one(record, tmp_path)
    assert isinstance(pair, tuple) and counts["repeat their prompt"] == repeats
    said = "In 1 both answers begin with the prompt: left in by mistake?"
    assert (said in describe(counts)) == bool(repeats)


@pytest.mark.parametrize(
    "record",
    [{"prompt": " \n"} | TEXTS, {"instruction": "", "input": ""} | TEXTS]
    + [{"prompt": messages("system: Be kind.", "user: ")} | TEXTS]
    + [transcripts("\n\nHuman:\n\nAssistant:")]
    + [transcripts("\n\nHuman:\n\nAssistant: Yes?\n\nAssistant:")],
)
def test_a_pair_whose_users_turns_are_empty_is_dropped_as_empty(record, tmp_path):
    path, counts = tmp_path / "a.jsonl", Counter()
    path.write_text(json.dumps(record))
    pairs = encode_preferences(
        read_preferences(path, counts), ChatFormat(EXAMPLE), 99, counts=counts
    )
    assert not pairs and counts["empty"] == 1


# ------------------------------------------------------------------------------------------ prompts

ROWS = {
    "AlpacaEval's": (
        {"dataset": "koala", "instruction": FRUIT, "output": "An apple.", "generator": "x"},
        ASK,
        "An apple.",
    ),
    "unknown keys": ({"prompt": FRUIT, "id": 3, "tags": ["a"], "question": "x"}, ASK, None),
    "null columns": (
        {
            "prompt": None,
            "messages": None,
            "instruction": FRUIT,
            "input": None,
            "system": NAN,
            "reference": None,
            "chosen": None,
        },
        ASK,
        None,
    ),
    "an HH prompt": ({"prompt": HH_TALK}, TALK, None),
    "an HH prompt as a row": (HH_TALK, TALK, None),
    "an HH prompt as instruction": ({"instruction": HH_TALK}, TALK, None),
    "a preference of HH": (transcripts(f"Human: {FRUIT}\n\nAssistant:"), ASK, "An apple."),
    "a preference with null columns": (
        {"prompt": FRUIT, "messages": None, "rejected": None, "chosen": "An apple."},
        ASK,
        "An apple.",
    ),
    "messages in JSON": (stored({"messages": messages(*TOLD)}), ASK, None),
    "a prompt in JSON": (stored({"prompt": messages(*TOLD)}), ASK, None),
    "the system text twice": (BESIDE | {"messages": messages(SPACED, *TOLD)}, KIND, None),
    "system beside": (BESIDE | {"messages": messages(*TOLD)}, [("system", "Be kind."), *ASK], None),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_to_answer_follows_the_rules_of_pairs(name, tmp_path):
    row, turns, reference = ROWS[name]
    assert prompt_of(row, tmp_path) == (turns, reference)


BAD_ROWS = {
    "history beside a prompt": (
        {"prompt": FRUIT, "history": [["a", "b"]]},
        "history is [['a', 'b']]",
    ),
    "images": ({"prompt": FRUIT, "images": ["a.png"]}, "images is ['a.png']"),
    "another system turn": (
        BESIDE | {"messages": messages("system: Be brief.", *TOLD)},
        "a system turn is",
    ),
    "another in a preference": (BESIDE | answers("system: Be brief.", *TOLD), "a system turn is"),
    "a preference without a prompt": ({"question": FRUIT} | REPLIES, "no user's turn"),
    "a preference with an empty prompt": ({"prompt": ""} | TEXTS, "the prompt is empty"),
    "a preference of ids": (
        {f"{k}_ids": [1] for k in ("prompt", "chosen", "rejected")} | TEXTS,
        "no token ids",
    ),
    "Python's repr": ({"messages": str(messages(*TOLD))}, "messages as text that is not JSON"),
    "null as prompt": ({"prompt": None}, "wanted one of the keys prompt, messages"),
    "null as content": ({"messages": [{"role": "user", "content": None}]}, "messages holds"),
    "no user's turn": ({"prompt": messages("system: Be kind.")}, "the system's, wanted the user's"),
    "two prompts": ({"prompt": FRUIT, "instruction": FRUIT}, "wanted one of the keys"),
    "an unknown key only": ({"question": FRUIT}, "wanted one of the keys prompt, messages"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_prompt_that_is_not_clear_is_refused(name, tmp_path):
    row, found = BAD_ROWS[name]
    assert found in refused_prompt(row, tmp_path)


def test_a_raw_prompt_stays_as_it_is(tmp_path):
    for text in (
        f"\n\n{HH_TALK}",
        f"  {HH_TALK} ",
        json.dumps(messages(*TOLD)),
        str(messages(*TOLD)),
    ):
        assert prompt_of({"prompt": text, "id": 1}, tmp_path, raw=True) == (text, None)
        assert prompt_of({"instruction": text}, tmp_path, raw=True) == (text.strip(), None)
    for row in (
        {"prompt": messages(*TOLD)},
        {"prompt": "x", "system": "y"},
        {"messages": "x"},
        WHOLE,
    ):
        assert "--raw" in refused_prompt(row, tmp_path, raw=True)


# ------------------------------------------------------------------------------------ other formats

LINES = [
    json.dumps({"prompt": FRUIT} | TEXTS),
    json.dumps({"prompt": "\xc4pfel?"} | stored(REPLIES), ensure_ascii=False),
]
GOOD = "".join(line + "\n" for line in LINES)


def zipped() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("a.jsonl", GOOD)
    return file.getvalue()


def tarred() -> bytes:
    file, member = io.BytesIO(), tarfile.TarInfo("a.jsonl")
    member.size = len(GOOD.encode())
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(member, io.BytesIO(GOOD.encode()))
    return file.getvalue()


# name in the message -> the file, and what its command begins with; its command is run.
CONVERTED = {
    "xz": (lzma.compress(GOOD.encode()), "xz "),
    "bzip2": (bz2.compress(GOOD.encode()), "bzip2 "),
    "zip": (zipped(), "unzip "),
    "tar": (tarred(), "tar "),
    "UTF-16": (GOOD.encode("utf-16"), "iconv "),
    "UTF-16 ": (GOOD.encode("utf-16-le"), "iconv "),
    "UTF-16  ": (GOOD.encode("utf-16-be"), "iconv "),
    "UTF-32": (GOOD.encode("utf-32"), "iconv "),
    "UTF-16, gzipped": (gzip.compress(GOOD.encode("utf-16"), mtime=0), "gzip "),
}
NAMED = {
    "zstd": (b"\x28\xb5\x2f\xfd....", "zstd -dc "),
    "lz4": (b"\x04\x22\x4d\x18....", "lz4 -dc "),
    "7z": (b"7z\xbc\xaf\x27\x1c....", "7z x -so "),
    "Parquet": (b"PAR1....PAR1", "python -c 'import pandas; pandas.read_parquet("),
    "Feather": (b"ARROW1\0\0", "python -c 'import pandas; pandas.read_feather("),
    "Arrow": (b"\xff\xff\xff\xff\x80", "python -c 'import datasets; "),
    "CSV": (b"prompt,chosen,rejected\na,b,c\n", "python -c 'import pandas; pandas.read_csv("),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull "),
}


def refusal_of(path: Path, content: bytes) -> tuple[str, str]:
    """The name and the command in the complaint about a file."""
    path.write_bytes(content)
    found = set()
    for read in (read_preferences, read_prompts):
        with pytest.raises(InputError) as caught:
            read(path)
        found.add(str(caught.value))
    [message] = found
    start, command = message.split(", wanted JSONL in UTF-8; convert it: ")
    assert "\n" not in message and start.startswith(f"{path}: ")
    return start.removeprefix(f"{path}: "), command


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_of_another_format_is_named_with_a_command_that_converts_it(name, tmp_path):
    content, command = CONVERTED[name]
    path = tmp_path / "it's a file"
    found, convert = refusal_of(path, content)
    assert found == name.strip() and convert.startswith(command)
    if subprocess.run(["which", command.strip()], capture_output=True).returncode:
        pytest.skip(f"{command.strip()} is not installed")
    subprocess.run(convert, shell=True, check=True)
    converted = tmp_path / "it's a file.jsonl"
    if name == "UTF-16, gzipped":  # the first of two steps
        assert converted.read_bytes() == GOOD.encode("utf-16")
    else:
        assert converted.read_text(encoding="utf-8-sig") == GOOD
        assert len(read_preferences(converted)) == 2


@pytest.mark.parametrize("name", NAMED)
def test_a_file_of_another_format_is_named_with_a_command(name, tmp_path):
    content, command = NAMED[name]
    found, convert = refusal_of(tmp_path / "a.jsonl", content)
    assert found == name and convert.startswith(command)


@pytest.mark.parametrize("kind", ["parquet", "feather", "csv"])
def test_the_command_for_a_table_gives_the_same_pairs(kind, tmp_path):
    pandas = pytest.importorskip("pandas")
    if kind != "csv":
        pytest.importorskip("pyarrow")
    more = {"prompt": "Name a fruit, please."} | TEXTS
    rows = [{"prompt": FRUIT, "system": "Be kind."} | TEXTS, more]
    table, path = pandas.DataFrame(rows), tmp_path / f"it's.{kind}"
    write = getattr(table, f"to_{kind}")
    write(path, index=False) if kind == "csv" else write(path)
    found, convert = refusal_of(path, path.read_bytes())
    assert found.lower() == kind
    subprocess.run(convert.replace("python", sys.executable, 1), shell=True, check=True)
    pairs = read_preferences(f"{path}.jsonl")
    assert [(p.prompt, p.chosen) for p in pairs] == [
        (KIND, "An apple."),
        ([("user", "Name a fruit, please.")], "An apple."),
    ]


def test_message_lists_in_parquet_come_through_its_command(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pandas.DataFrame([WHOLE, WHOLE]).to_parquet(path)
    _, convert = refusal_of(path, path.read_bytes())
    subprocess.run(convert.replace("python", sys.executable, 1), shell=True, check=True)
    assert [p.prompt for p in read_preferences(f"{path}.jsonl")] == [ASK, ASK]


def test_json_that_begins_like_a_table_is_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"prompt, chosen, rejected"\n"a\\tprompt"\n')
    assert [p.prompt[0][1] for p in read_prompts(path)] == ["prompt, chosen, rejected", "a\tprompt"]
