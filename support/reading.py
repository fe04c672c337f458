"""Reads the pairs of a run: the files of --data and --eval-data.

read_pairs                    files -> checked pairs, counts of what was dropped, the chat format
describe, describe_repeats    these counts, and pairs that repeat or contradict others, in words
"""

from collections import Counter

import numpy as np

from data import UNREAD, ChatFormat, Pair, encode_preferences, read_preferences
from support.files import InputError
from support.flags import check_answers
from support.processes import announced, every_two_seconds

UNREAD_SHOWN = 8


def read_pairs(
    config, vocab_size: int
) -> tuple[list[list[Pair]], list[Counter], ChatFormat | None]:
    """The training pairs and, if asked for, the held-out ones; what was counted in each file; and
    the chat format, unless all pairs are token ids. config: train.Config. Raises InputError for
    what the loss cannot use, and for a file of which nothing is left."""
    progress = every_two_seconds()
    files = [config.data, config.eval_data] if config.eval_data else [config.data]
    counts = [Counter() for _ in files]
    preferences = [
        read_preferences(path, count, config.skip_bad_lines, progress)
        for path, count in zip(files, counts, strict=True)
    ]
    text = any(row.is_text for rows in preferences for row in rows)
    chat = ChatFormat(config.model) if text else None
    if config.samples and chat is None:
        raise InputError("--samples needs text: these pairs are token ids")

    pairs = []
    for path, rows, count in zip(files, preferences, counts, strict=True):
        check_answers(config, path, rows)
        pairs.append(
            encode_preferences(
                rows, chat, config.max_tokens, config.overlong, count, vocab_size, progress
            )
        )
        if not pairs[-1]:
            raise InputError(f"{path}: no pair left to use ({describe(count)})")
    return pairs, counts, chat


# What is kept but may be wrong, and how the header says so.
DOUBTS = {
    "repeat their prompt": "{answers} begin with the prompt: left in by mistake?",
    "hold chat markers": "a text holds markers of a chat format: left in by mistake?",
    "scored the other way": "the chosen answer has a lower score than the rejected one",
    "hold a word for nothing": "a text is nan, None or null: missing values?",
    "end in one id": "an answer ends in a run of one token id: padding?",
}


def describe(counts: Counter) -> str:
    """Counts of a data file in one line."""
    reasons = ("bad lines", "unequal prompts", "empty", "overlong", "identical")
    dropped = ", ".join(f"{counts[reason]:,} {reason}" for reason in reasons)
    good, bad = counts["good answers"], counts["bad answers"]
    kept = f"{counts['kept']:,} kept"
    if good or bad:
        kept += f" ({counts['kept'] - good - bad:,} pairs, {good:,} good and {bad:,} bad answers)"
    text = f"{counts['read']:,} read, {kept}, {counts['truncated']:,} of them truncated"
    text += f"; dropped: {dropped}"
    answers = "the answers" if good or bad else "both answers"
    for reason, said in DOUBTS.items():
        if counts[reason]:
            text += f". In {counts[reason]:,} {said.format(answers=answers)}"
    unread = [name for name, _ in counts.most_common() if name.startswith(UNREAD)]
    if unread:
        keys = ", ".join(name.removeprefix(UNREAD) for name in unread[:UNREAD_SHOWN])
        more = len(unread) - UNREAD_SHOWN
        text += f". Keys not trained on: {keys}" + f" and {more:,} more" * (more > 0)
    return text


@announced("comparing the pairs with each other")
def describe_repeats(pairs: list) -> str:
    """How many of these pairs (data.Pair) are there more than once, and how many with chosen and
    rejected swapped (of single answers: labelled both good and bad), if any."""

    def key(*parts: np.ndarray) -> int:
        return hash(tuple(ids.tobytes() for ids in parts))

    seen = {key(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
    swapped = sum(key(pair.prompt, pair.rejected, pair.chosen) in seen for pair in pairs)
    text = ""
    if repeats := len(pairs) - len(seen):
        text += (
            f". Of those kept, {repeats:,} repeat an earlier one (compared as they are trained on)"
        )
    if swapped:
        text += f". {swapped:,} contradict each other: good in one is bad in the other"
    return text
