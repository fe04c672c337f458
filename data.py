"""Preference data: JSONL -> preferences -> ids -> packed batches; and which pairs make which step.

In reading order
    Preference, read_preferences    a whole file; faults are named with file and line
    ChatFormat                      Llama 3's chat format, assembled in token space
    Pair, encode_preferences        the ids to train on; dropped pairs are counted by reason
    pack                            several pairs as one sequence of tokens, each prompt once
    plan_step, split_pairs          a step's pairs over processes and micro-batches

In several functions `counts` is a tally of records and pairs by reason, to which each adds its own.

Rules. Only the last assistant turn is scored; all turns before it are prompt. Both responses share
one prompt, or the pair is dropped. Text never becomes a control token. What is scored is built
together with the ids, never inferred later. A row of a file is a pair or one labelled answer, good
or bad; "pair" means either from here on. An absent answer is None in a Preference, no ids in a
Pair, length 0 in a Batch; to a loss it is logp_w = 0 or logp_l = -inf.

In support/: records.py unpacks and parses a file, forms.py recognises the forms of a record
(docs/data-formats.md shows them), tokenizer.py reads the tokenizer, bins.py fills micro-batches.

Left out: tools, images, and attention across pairs (each pair sees only itself).
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import Batch, Segments
from support.bins import fewest_bins
from support.files import InputError
from support.forms import Turns, likely_mistakes, parse_pair, unread_keys
from support.llama_config import generation_eos
from support.records import bad_lines_error, read_records
from support.tokenizer import check_keeps_text, check_vocabulary, control_ids, load_tokenizer

# ------------------------------------------------------------------------------------------ reading

UNREAD = "unread key "  # counts["unread key NAME"]: rows with a key that nothing here uses
# Preferences encoded at once: the tokenizer's Encoding takes many times the memory of its ids. Also
# records between two reports.
CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a chosen and a rejected response, as texts or as token ids (int32). One of the
    responses may be absent: None."""

    prompt: Turns | np.ndarray  # Turns: [(role, content), ...]
    chosen: str | np.ndarray | None
    rejected: str | np.ndarray | None
    place: str  # "file:line", or "file: record 3"

    @property
    def is_text(self) -> bool:
        """False if it holds token ids."""
        return isinstance(self.prompt, list)

    @property
    def answers(self) -> list[str] | list[np.ndarray]:
        """Both answers, or the only one."""
        return [answer for answer in (self.chosen, self.rejected) if answer is not None]


def read_preferences(
    path: str | Path,
    counts: Counter | None = None,
    skip_bad_lines: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Preference]:
    """Reads a whole file before anything is trained on; each record may have a form of its own.

    `counts` gains "read", "bad lines", "unequal prompts" (dropped: the two sides have different
    prompts), and what `likely_mistakes` and `unread_keys` find in the rows returned. Unless
    skip_bad_lines, raises InputError with the place and fault of the first 20 bad records.
    `read_records` says what is never skipped.
    """
    counts = Counter() if counts is None else counts
    preferences, bad = [], []
    for place, record in read_records(path):
        counts["read"] += 1
        if counts["read"] % CHUNK == 0:
            progress(f"read {counts['read']:,} records of {path}")
        try:
            if isinstance(record, ValueError):  # read_records gives it for a line that is not JSON
                raise record
            parts = parse_pair(record)
        except (ValueError, RecursionError) as error:  # the second if lists are nested too deep
            bad.append(f"{place}: {error}")
            continue
        if parts is None:
            counts["unequal prompts"] += 1
            continue
        counts.update(likely_mistakes(record, *parts))
        counts.update(UNREAD + key for key in unread_keys(record))
        prompt, chosen, rejected = parts
        preferences.append(Preference(prompt, chosen, rejected, place))
    counts["bad lines"] += len(bad)
    if bad and not skip_bad_lines:
        raise bad_lines_error(bad, counts["read"])
    return preferences


# -------------------------------------------------------------------------------------- chat format


class ChatFormat:
    """Llama 3's chat format over a model directory's tokenizer.json, in token space.

    <|begin_of_text|>, then for each message <|start_header_id|> role <|end_header_id|> "\\n\\n"
    content <|eot_id|>. Control ids are inserted by number. Content is stripped, as Meta's template
    does, and encoded by itself: nothing merges across a boundary, and a user's literal "<|eot_id|>"
    stays text. Raises InputError for a tokenizer that lacks a control token, makes one from text,
    or loses text, and for a malformed generation_config.json or config.json.

    stop_ids: where an answer ends, the model's own eos ids (`generation_eos`) included.
    """

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        self.tokenizer = load_tokenizer(path)
        ids = control_ids(self.tokenizer, path)
        check_keeps_text(self.tokenizer, path)
        self.begin, self.end_of_turn = ids["begin_of_text"], ids["eot_id"]
        self.start_header, self.end_header = ids["start_header_id"], ids["end_header_id"]
        ends = {ids["end_of_text"], ids["eot_id"], ids["eom_id"]} - {None}
        self.stop_ids = frozenset(ends | generation_eos(directory))
        roles = ["system", "user", "assistant"]
        *names, newlines = self.encode([*roles, "\n\n"])
        self.headers = {
            role: [self.start_header, *name, self.end_header, *newlines]
            for role, name in zip(roles, names, strict=True)
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, without BOS."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens shown."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def encode_stripped(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Stripped text -> its ids. Equal texts are encoded once, all in one call."""
        stripped = list(dict.fromkeys(text.strip() for text in texts))  # in their order
        return dict(zip(stripped, self.encode(stripped), strict=True))

    def prompt(self, turns: Turns, encoded: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of a conversation up to and including the header of the assistant's next turn.
        `encoded`: the ids of every content, if the caller has encoded them already."""
        encoded = encoded or self.encode_stripped(content for _, content in turns)
        ids = [self.begin]
        for role, content in turns:
            ids += [*self.headers[role], *encoded[content.strip()], self.end_of_turn]
        return ids + self.headers["assistant"]

    def response(self, content: str, encoded: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of an assistant's response and its closing <|eot_id|>, all of them scored; [] if the
        response is empty. `encoded`: as in `prompt`."""
        encoded = encoded or self.encode_stripped([content])
        ids = encoded[content.strip()]
        return [*ids, self.end_of_turn] if ids else []


# ----------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids (int32) of a pair or of one labelled answer; an absent answer has none. Its
    sequences are prompt + chosen and prompt + rejected; all response tokens are scored."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    place: str  # "file:line", or "file: record 3"

    def packed_tokens(self, share_prompt: bool = True) -> int:
        """Tokens that the pair takes in a batch."""
        prompts = 1 if share_prompt else len(self.answers)
        return prompts * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def answers(self) -> list[np.ndarray]:
        """Both answers, or the only one."""
        return [ids for ids in (self.chosen, self.rejected) if len(ids)]


def encode_preferences(
    preferences: list[Preference],
    chat: ChatFormat | None,
    max_tokens: int,
    overlong: str = "truncate",
    counts: Counter | None = None,
    vocab_size: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Pair]:
    """Preferences -> pairs to train on, in file order.

    A sequence, prompt plus one response, has at most `max_tokens` tokens. The prompt is never cut:
    a pair whose prompt leaves no room is dropped. overlong="truncate": a response keeps what fits
    after its prompt. Its <|eot_id|> is cut too, so a model never learns to stop where we cut.
    overlong="drop": a pair with a sequence that is too long is dropped.

    `counts` gains "truncated", "kept", and the reasons for a drop, the first that applies: "empty"
    (the prompt or an answer), "overlong", "identical" (compared after truncation). Of the kept rows
    with one answer, "good answers" and "bad answers" are counted too. `chat` may be None if every
    preference holds ids. Raises InputError for ids that are not below vocab_size.
    """
    counts = Counter() if counts is None else counts
    pairs = []
    for start in range(0, len(preferences), CHUNK):
        chunk = preferences[start : start + CHUNK]
        encoded = encode_chunk(chunk, chat)
        for preference, (prompt, chosen, rejected) in zip(chunk, encoded, strict=True):
            check_vocabulary((prompt, chosen, rejected), vocab_size, preference.place)
            room = max_tokens - len(prompt)  # 0 or less: no room at all
            too_long = max(len(chosen), len(rejected)) > room
            present = sum(len(ids) > 0 for ids in (chosen, rejected))
            emptied = present < len(preference.answers)  # a text without ids
            if not len(prompt) or emptied:
                counts["empty"] += 1
            elif room <= 0 or (too_long and overlong == "drop"):
                counts["overlong"] += 1
            elif np.array_equal(chosen[:room], rejected[:room]):
                counts["identical"] += 1
            else:
                counts["truncated"] += too_long
                if present == 1:
                    counts["good answers" if len(chosen) else "bad answers"] += 1
                # Copies: a slice would keep the whole response in memory.
                cut = chosen[:room].copy(), rejected[:room].copy()
                pairs.append(Pair(prompt, *cut, preference.place))
        progress(f"encoded {start + len(chunk):,} of {len(preferences):,} pairs")
    counts["kept"] += len(pairs)
    return pairs


def encode_chunk(chunk: list[Preference], chat: ChatFormat | None) -> Iterator[list[np.ndarray]]:
    """Ids (int32) of prompt, chosen and rejected; an absent answer has none. A prompt whose last
    turn is empty, or that has no user text, gets none either: its pair is dropped as "empty"."""
    in_text = [p for p in chunk if p.is_text]
    contents = [content for p in in_text for _, content in p.prompt]
    answers = [answer for p in in_text for answer in p.answers]
    encoded = chat.encode_stripped([*contents, *answers]) if in_text else {}
    for p in chunk:
        prompt, *sides = p.prompt, p.chosen, p.rejected
        if p.is_text:
            user_text = any(role == "user" and content for role, content in prompt)
            usable = user_text and prompt[-1][1]
            prompt = chat.prompt(prompt, encoded) if usable else []
            sides = [chat.response(side, encoded) if side else None for side in sides]
        parts = (prompt, *sides)
        yield [np.asarray([] if ids is None else ids, dtype=np.int32) for ids in parts]


# ------------------------------------------------------------------------------------------ packing


def pack(pairs: list[Pair], share_prompt: bool = True, longest: int | None = None) -> Batch:
    """Packs pairs one after the other as [prompt, chosen, rejected]: the prompt is computed once
    and both responses attend to it (model.Segments shows an example). A row with one answer is
    [prompt, answer].

    With share_prompt=False a pair is [prompt, chosen, prompt, rejected], two independent sequences:
    more work for the same numbers, up to rounding. `longest` bounds the tokens of a sequence
    (default: the longest here); pass a constant, so that compiled kernels see one value.
    """
    tokens, positions, keys, scored, targets = [], [], [], [], []
    end = 0  # tokens packed so far
    for pair in pairs:
        n_p = len(pair.prompt)
        for i, response in enumerate(pair.answers):
            with_prompt = i == 0 or not share_prompt
            if with_prompt:
                tokens.append(pair.prompt)
                prompt_at = np.arange(end, end + n_p)
                end += n_p
            tokens.append(response)
            response_at = np.arange(end, end + len(response))
            end += len(response)
            # Where prompt + response lie in the batch: the keys of this segment.
            sequence_at = np.concatenate([prompt_at, response_at])
            keys.append(sequence_at)
            # Positions of the tokens just added: both responses' begin at n_p.
            positions.append(np.arange(0 if with_prompt else n_p, len(sequence_at)))
            scored.append(sequence_at[n_p - 1 : -1])  # each token is predicted at the one before it
        targets += [pair.chosen, pair.rejected]

    def int64(parts: list) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def starts(parts: list) -> Tensor:
        return torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int32)

    length_R = torch.tensor([len(ids) for ids in targets])
    return Batch(
        tokens_T=int64(tokens),
        positions_T=int64(positions),
        segments=Segments(
            query_starts=starts(positions),  # a segment has as many queries as positions
            key_starts=starts(keys),
            key_index_N=int64(keys) if share_prompt else None,
            longest=max(map(len, keys)) if longest is None else longest,
        ),
        scored_index_S=int64(scored),
        target_S=int64(targets),
        response_S=torch.repeat_interleave(length_R),  # 0, 0, ..., 1, 1, ...
        length_R=length_R,
    )


# -------------------------------------------------------------------------------------------- steps


def plan_step(
    sizes: np.ndarray,
    pairs_per_step: int,
    seed: int | None,
    update: int,
    processes: int,
    max_tokens_per_gpu: int,
) -> list[list[list[int]]]:
    """Which pairs each process computes in which micro-batch of update `update` (from 0).

    A pure function. The update's pairs depend only on (number of pairs, pairs_per_step, seed,
    update), not on the machine: each epoch is a fresh permutation (file order if seed is None), cut
    into steps; the last step of an epoch may be short. `split_pairs` deals them out.

    sizes: packed tokens of every pair. Raises InputError if a pair of the step exceeds
    max_tokens_per_gpu.
    """
    steps_per_epoch = -(-len(sizes) // pairs_per_step)
    epoch, within = divmod(update, steps_per_epoch)
    order = epoch_order(len(sizes), seed, epoch)
    drawn = order[within * pairs_per_step : (within + 1) * pairs_per_step]
    return split_pairs(drawn, sizes, processes, max_tokens_per_gpu)


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for it
def epoch_order(pairs: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of an epoch's pairs; file order if seed is None."""
    order = np.arange(pairs)
    if seed is not None:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(order)
    order.setflags(write=False)
    return order


def split_pairs(
    indexes: np.ndarray, sizes: np.ndarray, processes: int, max_tokens_per_gpu: int
) -> list[list[list[int]]]:
    """[process][micro-batch] -> indexes of pairs. A micro-batch has at most max_tokens_per_gpu
    packed tokens; InputError if one pair has more.

    Pairs go, longest first, into the emptiest of processes x m micro-batches; m is the smallest for
    which all fit. Every process gets m of them, since the collectives of a sharded model need
    equal numbers; some are empty if pairs are few. `fewest_bins` puts the fullest first, so that
    the n-th ones of all processes are alike in size.
    """
    indexes = indexes[np.lexsort((indexes, -sizes[indexes]))]  # longest first, then by index
    drawn_sizes = sizes[indexes]
    check_longest(drawn_sizes, max_tokens_per_gpu)
    filled = fewest_bins(indexes.tolist(), drawn_sizes, processes, max_tokens_per_gpu)
    return [filled[rank::processes] for rank in range(processes)]


def check_longest(
    sizes: np.ndarray, max_tokens_per_gpu: int, pairs: list[Pair] | None = None
) -> None:
    """Raises InputError if a pair has more packed tokens than a micro-batch may have; it names the
    longest of `pairs`, if they are given."""
    if len(sizes) and sizes.max() > max_tokens_per_gpu:
        place = f"{pairs[sizes.argmax()].place}: " if pairs else ""
        raise InputError(
            f"{place}a pair of {sizes.max()} packed tokens exceeds --max-tokens-per-gpu "
            f"{max_tokens_per_gpu}; raise that or lower --max-tokens"
        )
