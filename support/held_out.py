"""Answers to held-out prompts (--samples), and groups of held-out pairs (--eval-by).

answer         a greedy answer to a held-out prompt
last_turn      what a prompt asks, to be shown beside it
read_groups    held-out pairs by the value of a key in their rows
GroupSums      the metrics of each such group
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.files import InputError
from support.forms import present
from support.metrics import Sums
from support.records import read_records

MOST_GROUPS = 20


@torch.no_grad()
def answer(
    model: nn.Module, chat, prompt: np.ndarray, device: str, max_new_tokens: int = 64
) -> str:
    """A greedy answer to a prompt; every process calls this. Each token is a fresh pass over all
    before it, which is simple and enough for a few samples. eval.py generates with a cache.

    model: model.Llama, whose weights are left gathered: the caller reshards; chat: data.ChatFormat;
    prompt: token ids.
    """
    ids = prompt.tolist()
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(ids))):
        best = model.logits(torch.tensor(ids, device=device))[-1].argmax()
        dist.broadcast(best, 0)  # so that every process stops at the same token
        if int(best) in chat.stop_ids:
            break
        ids.append(int(best))
    return chat.decode(ids[len(prompt) :])


def last_turn(chat, prompt: np.ndarray) -> str:
    """The content of the last message in a prompt's ids, for display. chat: data.ChatFormat."""
    ids = prompt.tolist()
    ends = [i for i, token in enumerate(ids) if token in (chat.end_header, chat.end_of_turn)]
    # The last three end the message's header, the message, and the assistant's header.
    return chat.decode(ids[ends[-3] + 1 : ends[-2]]).strip() if len(ends) > 2 else ""


def read_groups(path: str | Path, key: str, pairs: Sequence) -> dict[str, set[int]]:
    """Value of `key` -> indexes of the pairs whose row has it, in the order of the file.

    `pairs` are of data.Pair. A value that is not a text is named by its JSON, and so is a text that
    another value's name would equal. A row without the key, or with null, is in the group "no KEY".
    Raises InputError if no row has the key, and for more than 20 values: such a key tells rows
    apart, not kinds of rows.
    """
    index = {pair.place: i for i, pair in enumerate(pairs)}
    absent, found = f"no {key}", {}  # found: a value as JSON -> the indexes
    for place, record in read_records(path):
        if place in index:
            value = present(record).get(key)
            found.setdefault(json.dumps(value, sort_keys=True), set()).add(index[place])

    def name_of(as_json: str) -> str:
        value = json.loads(as_json)
        if value is None:
            return absent
        plain = isinstance(value, str) and value not in (*found, absent)
        return value if plain else as_json

    groups = {name_of(as_json): indexes for as_json, indexes in found.items()}
    values = groups.keys() - {absent}
    if not values:
        raise InputError(f"--eval-by {key}: no row of {path} that is used has this key")
    if len(values) > MOST_GROUPS:
        raise InputError(
            f"--eval-by {key}: {len(values):,} different values in {path}, wanted at most "
            f"{MOST_GROUPS}"
        )
    return groups


class GroupSums:
    """The metrics of each group of pairs, summed over micro-batches. groups: as `read_groups` gives
    them."""

    def __init__(self, groups: dict[str, set[int]]):
        self.groups = groups
        self.sums = {name: Sums() for name in groups}

    def add(self, metrics: dict[str, Tensor], indexes: list[int]) -> None:
        """Adds a micro-batch's metrics; indexes: of its pairs."""
        device = metrics["rows"].device
        for name, group in self.groups.items():
            within = [float(i in group) for i in indexes]
            self.sums[name].add(metrics, torch.tensor(within, device=device))

    def means_over_processes(self) -> dict[str, dict[str, float]]:
        """For each group its number of pairs and its means, equal on all processes."""
        return {
            name: {"pairs": len(group)} | self.sums[name].mean_over_processes("eval_")
            for name, group in self.groups.items()
        }
