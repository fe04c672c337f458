"""Preference data: JSONL -> preferences -> ids -> packed batches; and which pairs make which step.

In reading order
    Preference, read_preferences    a whole file; every fault is named with file and line
    ChatFormat                      Llama 3's chat format, assembled in token space
    Pair, encode_preferences        the ids to train on; dropped pairs are counted by reason
    pack                            several pairs as one row of tokens, each prompt once
    plan_step, split_pairs          a step's pairs over ranks and micro-batches

Rules. Only the last assistant turn is scored; all turns before it are prompt. Both responses share
one prompt, or the pair is dropped. Text never becomes a control token. What is scored is built
together with the ids, never inferred later.

In support/: records.py unpacks and parses a file, forms.py recognises the forms of a record
(docs/data-formats.md shows them).

Left out: tools, images, and attention across pairs (each pair sees only itself).
"""

import functools
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import Batch, LlamaConfig, Segments
from support.files import InputError, read_json, read_start, shown, unique
from support.forms import Turns, parse_pair, repeats_prompt
from support.llama_config import token_ids
from support.records import read_records

# ------------------------------------------------------------------------------------------ reading

BAD_LINES_SHOWN = 20
CHUNK = 1000  # preferences encoded at once: an Encoding takes many times the memory of its ids


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a chosen and a rejected response: turns and texts, or token ids (int32). In a
    row with one answer, good or bad, the other is None."""

    prompt: Turns | np.ndarray
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
    progress: Callable[[str], None] | None = None,
) -> list[Preference]:
    """Reads a whole file before anything is trained on; each record may have a form of its own.

    `counts` gains "read", "bad lines", "unequal prompts" (dropped: the two sides have different
    prompts) and, if there are any, "repeat their prompt" (kept, since an answer may quote its
    question, but all answers begin with their prompt). Unless skip_bad_lines, raises InputError
    with the place and fault of the first 20 records that are not pairs. `read_records` says what is
    never skipped.
    """
    counts = Counter() if counts is None else counts
    preferences, bad = [], []
    for place, record in read_records(path):
        counts["read"] += 1
        if progress is not None and counts["read"] % CHUNK == 0:
            progress(f"read {counts['read']:,} records of {path}")
        try:
            if isinstance(record, ValueError):
                raise record
            pair = parse_pair(record)
        except (ValueError, RecursionError) as error:
            bad.append(f"{place}: {error}")
            continue
        if pair is None:
            counts["unequal prompts"] += 1
        else:
            if repeats_prompt(*pair):
                counts["repeat their prompt"] += 1
            preferences.append(Preference(*pair, place))
    counts["bad lines"] += len(bad)
    if bad and not skip_bad_lines:
        lines = bad[:BAD_LINES_SHOWN]
        if len(bad) > BAD_LINES_SHOWN:
            lines.append(f"... and {len(bad) - BAD_LINES_SHOWN} more")
        total = f"{len(bad)} bad of {counts['read']} records"
        raise InputError("\n".join([*lines, f"{total}; fix them, or pass --skip-bad-lines"]))
    return preferences


# -------------------------------------------------------------------------------------- chat format

TOKENIZER_BYTES = 2**25  # Llama 3's is 9 MB


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json for plain text: no padding, no truncation, control tokens stay text."""
    raw = read_start(path, TOKENIZER_BYTES + 1, "the model's tokenizer")
    if len(raw) > TOKENIZER_BYTES:
        raise InputError(f"{path}: more than {TOKENIZER_BYTES:,} bytes, which is not a tokenizer")
    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
        model = parsed.get("model") if isinstance(parsed, dict) else None
        # Llama 3's is null. With another value the tokenizers library may abort the process.
        if isinstance(model, dict) and (prefix := model.get("continuing_subword_prefix")):
            raise ValueError(f"continuing_subword_prefix is {shown(prefix)}, wanted null")
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path}: not a tokenizer ({shown(str(error), 150)})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # True means that "<|eot_id|>" in a text is encoded as text. tokenizer.json cannot say so.
    tokenizer.encode_special_tokens = True
    return tokenizer


class ChatFormat:
    """Llama 3's chat format over a model directory's tokenizer.json, in token space.

    <|begin_of_text|>, then for each message <|start_header_id|> role <|end_header_id|> "\\n\\n"
    content <|eot_id|>. Control ids are inserted by number. Content is stripped, as Meta's template
    does, and encoded by itself: nothing merges across a boundary, and a user's literal "<|eot_id|>"
    stays text. Raises InputError for a tokenizer that lacks a control token or makes one from text,
    and for a malformed generation_config.json.

    stop_ids: where an answer ends, the eos ids of generation_config.json included.
    """

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        self.tokenizer = load_tokenizer(path)
        ids = {}
        for name in "begin_of_text start_header_id end_header_id eot_id end_of_text eom_id".split():
            token = f"<|{name}|>"
            ids[name] = self.tokenizer.token_to_id(token)
            if ids[name] is None and name != "eom_id":  # only Llama 3.1 and later have it
                raise InputError(f"{path}: has no token {token}, wanted Llama 3's control tokens")
            if ids[name] in self.encode([token])[0]:
                raise InputError(
                    f"{path}: makes the control token {token} from text (it is not marked special)"
                )
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

    def prompt(self, turns: Turns, encoded: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of a conversation up to and including the header of the assistant's next turn.
        `encoded`: the ids of every content, if the caller has encoded them already."""
        ids = [self.begin]
        for role, content in turns:
            ids += [*self.headers[role], *self.content(content, encoded), self.end_of_turn]
        return ids + self.headers["assistant"]

    def response(self, content: str, encoded: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of an assistant's reply and its closing <|eot_id|>, all of them scored; [] if the
        reply is empty."""
        ids = self.content(content, encoded)
        return [*ids, self.end_of_turn] if ids else []

    def content(self, content: str, encoded: dict[str, list[int]] | None) -> list[int]:
        content = content.strip()
        return self.encode([content])[0] if encoded is None else encoded[content]

    def last_turn(self, prompt: np.ndarray) -> str:
        """The content of the last message in a prompt's ids, for display."""
        ids = prompt.tolist()
        ends = [i for i, token in enumerate(ids) if token in (self.end_header, self.end_of_turn)]
        # The last three end the message's header, the message, and the assistant's header.
        return self.decode(ids[ends[-3] + 1 : ends[-2]]).strip() if len(ends) > 2 else ""


def generation_eos(directory: str | Path) -> set[int]:
    """The eos ids in a directory's generation_config.json, or without that file in its config.json.
    InputError if it is malformed."""
    paths = [Path(directory) / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if path.exists()), paths[0])
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: {shown(raw)}, wanted an object with eos_token_id")
    return set(token_ids(raw, "eos_token_id", path))


# ----------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a pair, int32. Its sequences are prompt + chosen and prompt + rejected; all
    response tokens are scored. In a row with one answer, the other is empty."""

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
    progress: Callable[[str], None] | None = None,
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
        for p, (prompt, chosen, rejected) in zip(chunk, encode_chunk(chunk, chat), strict=True):
            top = max(int(ids.max(initial=0)) for ids in (prompt, chosen, rejected))
            if vocab_size is not None and top >= vocab_size:
                raise InputError(
                    f"{p.place}: token id {top} is not below the model's vocab_size {vocab_size}"
                )
            room = max_tokens - len(prompt)
            too_long = max(len(chosen), len(rejected)) > room
            answers = [ids for ids in (chosen, rejected) if len(ids)]
            if not len(prompt) or len(answers) < len(p.answers):
                counts["empty"] += 1
            elif room <= 0 or (too_long and overlong == "drop"):
                counts["overlong"] += 1
            elif np.array_equal(chosen[:room], rejected[:room]):
                counts["identical"] += 1
            else:
                counts["truncated"] += too_long
                if len(answers) == 1:
                    counts["bad answers" if p.chosen is None else "good answers"] += 1
                # Copies: a slice would keep the whole response in memory.
                pairs.append(Pair(prompt, chosen[:room].copy(), rejected[:room].copy(), p.place))
        if progress is not None:
            progress(f"encoded {start + len(chunk):,} of {len(preferences):,} pairs")
    counts["kept"] += len(pairs)
    return pairs


def encode_chunk(chunk: list[Preference], chat: ChatFormat | None) -> Iterator[list[np.ndarray]]:
    """Ids of prompt, chosen and rejected (int32; none of an absent answer). Equal texts are encoded
    once, all in one call."""
    texts = {}  # a dict, for its order
    for p in chunk:
        if p.is_text:
            contents = [content for _, content in p.prompt]
            texts |= dict.fromkeys(part.strip() for part in (*contents, *p.answers))
    encoded = dict(zip(texts, chat.encode(list(texts)), strict=True)) if texts else {}
    for p in chunk:
        prompt, sides = p.prompt, (p.chosen, p.rejected)
        if p.is_text:
            asks = any(role == "user" and content for role, content in p.prompt)
            prompt = chat.prompt(p.prompt, encoded) if asks else []
            sides = [chat.response(side, encoded) if side else [] for side in sides]
        parts = [[] if ids is None else ids for ids in (prompt, *sides)]
        yield [np.asarray(ids, dtype=np.int32) for ids in parts]


def resolve_max_tokens(max_tokens: int | None, config: LlamaConfig) -> int:
    """Tokens of prompt plus response: as asked, or the smaller of 2,048 (the paper's) and the
    model's limit. InputError if more are asked for than the model takes."""
    limit = config.max_position_embeddings
    if max_tokens is None:
        return min(2048, limit)
    if max_tokens > limit:
        raise InputError(
            f"--max-tokens {max_tokens} is above the model's max_position_embeddings {limit}"
        )
    return max_tokens


# ------------------------------------------------------------------------------------------ packing


def pack(pairs: list[Pair], share_prompt: bool = True, longest: int | None = None) -> Batch:
    """Packs pairs one after the other as [prompt, chosen, rejected]: the prompt is computed once
    and both responses attend to it (model.Segments shows an example). A row with one answer is
    [prompt, answer].

    With share_prompt=False a pair is [prompt, chosen, prompt, rejected], two independent sequences:
    the same numbers for more work. `longest` bounds the tokens of a sequence (default: the longest
    here); pass a constant, so that compiled kernels see one value.
    """
    tokens, positions, keys, scored, targets, lengths = [], [], [], [], [], []
    query_lengths, key_lengths = [], []
    end = 0  # index after the last token so far
    for pair in pairs:
        n_p = len(pair.prompt)
        for i, response in enumerate(pair.answers):
            n = len(response)
            new = 0  # tokens of the prompt that stand before this response
            if i == 0 or not share_prompt:
                new = n_p
                start_p = end  # where the prompt starts
            start, end = end + new, end + new + n  # of the response

            tokens += [pair.prompt[:new], response]
            # Rejected continues where the prompt ends, as chosen does.
            positions.append(np.arange(n_p - new, n_p + n))
            query_lengths.append(new + n)
            key_lengths.append(n_p + n)
            keys += [np.arange(start_p, start_p + n_p), np.arange(start, end)]
            # A response token is predicted at the token before it, the first one at the prompt's
            # last.
            scored += [[start_p + n_p - 1], np.arange(start, end - 1)]
        targets += [pair.chosen, pair.rejected]
        lengths += [len(pair.chosen), len(pair.rejected)]

    def int64(parts: list) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def starts(segment_lengths: list[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(segment_lengths)], dtype=torch.int32)

    length_R = torch.tensor(lengths)
    return Batch(
        tokens_T=int64(tokens),
        positions_T=int64(positions),
        segments=Segments(
            query_starts=starts(query_lengths),
            key_starts=starts(key_lengths),
            key_index_N=int64(keys) if share_prompt else None,
            longest=max(key_lengths) if longest is None else longest,
        ),
        scored_index_S=int64(scored),
        target_S=int64(targets),
        response_S=torch.repeat_interleave(length_R),  # 0, 0, ..., 1, 1, ...
        length_R=length_R,
    )


# -------------------------------------------------------------------------------------------- steps

MicroBatch = list[int]  # indexes of pairs


def plan_step(
    sizes: np.ndarray,
    pairs_per_step: int,
    seed: int | None,
    step: int,
    ranks: int,
    max_tokens_per_gpu: int,
) -> list[list[MicroBatch]]:
    """Which pairs each rank computes in which micro-batch of step `step` (from 0).

    A pure function. The step's pairs depend only on (number of pairs, pairs_per_step, seed, step),
    not on the machine: each epoch is a fresh permutation (file order if seed is None), cut into
    steps; the last step of an epoch may be short. `split_pairs` deals them out.

    sizes: packed tokens of every pair. Raises InputError if one pair exceeds max_tokens_per_gpu.
    """
    steps_per_epoch = -(-len(sizes) // pairs_per_step)
    epoch, within = divmod(step, steps_per_epoch)
    order = epoch_order(len(sizes), seed, epoch)
    drawn = order[within * pairs_per_step : (within + 1) * pairs_per_step]
    return split_pairs(drawn, sizes, ranks, max_tokens_per_gpu)


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for it
def epoch_order(pairs: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of an epoch's pairs; file order if seed is None."""
    order = np.arange(pairs)
    if seed is not None:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(order)
    order.setflags(write=False)
    return order


def split_pairs(
    indexes: np.ndarray, sizes: np.ndarray, ranks: int, max_tokens_per_gpu: int
) -> list[list[MicroBatch]]:
    """[rank][micro-batch] -> indexes of pairs. A micro-batch has at most max_tokens_per_gpu packed
    tokens; InputError if one pair has more.

    Pairs go, longest first, into the emptiest of ranks x m micro-batches, with the smallest m with
    which all fit. Every rank gets m of them, since the collectives of a sharded model need equal
    numbers; some are empty if pairs are few. The fullest come first, so that what does not fit in
    memory fails at once.
    """
    indexes = indexes[np.lexsort((indexes, -sizes[indexes]))]
    lengths = sizes[indexes]
    check_longest(lengths, max_tokens_per_gpu)
    # Lower bounds of the number of bins: by all tokens; and, since at most k pairs longer than
    # max_tokens_per_gpu / (k + 1) fit in one bin, by the number of such pairs.
    bins = max(1, -(-int(lengths.sum()) // max_tokens_per_gpu))
    for k in range(1, 9):
        bins = max(bins, -(-int((lengths * (k + 1) > max_tokens_per_gpu).sum()) // k))

    def fill(m: int) -> list[MicroBatch] | None:
        return fill_bins(indexes.tolist(), lengths.tolist(), ranks * m, max_tokens_per_gpu)

    # More bins never make the fullest one fuller, so the smallest m that is enough lies between one
    # that is not and one that is: found by doubling, then by halving.
    fewest = m = -(-bins // ranks)
    step = 1
    while (filled := fill(m)) is None:
        fewest, m, step = m + 1, m + step, 2 * step
    while fewest < m:
        middle = (fewest + m) // 2
        if (found := fill(middle)) is None:
            fewest = middle + 1
        else:
            filled, m = found, middle
    return [filled[rank::ranks] for rank in range(ranks)]


def check_longest(sizes: np.ndarray, max_tokens_per_gpu: int) -> None:
    """Raises InputError if a pair has more packed tokens than a micro-batch may have."""
    if len(sizes) and (longest := sizes.max()) > max_tokens_per_gpu:
        raise InputError(
            f"a pair of {longest} packed tokens exceeds --max-tokens-per-gpu "
            f"{max_tokens_per_gpu}; raise that or lower --max-tokens"
        )


def fill_bins(
    indexes: list[int], lengths: list[int], bins: int, most: int
) -> list[MicroBatch] | None:
    """Each index into the emptiest bin (the first of equals); the bins, fullest first. None if one
    would hold more than `most` tokens."""
    loads = [(0, b) for b in range(bins)]  # a heap
    contents: list[MicroBatch] = [[] for _ in loads]
    for i, length in zip(indexes, lengths, strict=True):
        load, b = loads[0]
        if load + length > most:
            return None
        contents[b].append(i)
        heapq.heapreplace(loads, (load + length, b))
    return [contents[b] for _, b in sorted(loads, key=lambda load: (-load[0], load[1]))]
