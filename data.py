"""Preference data: JSONL -> preferences -> token ids -> packed batches, and the plan of which pairs make which step.

In reading order
    Preference, read_preferences    one file, any of the formats in the README, every complaint with file and line
    Prompt, read_prompts            the same for prompts alone, which eval.py answers
    ChatFormat                      Llama 3's chat format, assembled in token space
    Pair, encode_preferences        what is trained on: ids of prompt, chosen and rejected; what is dropped is counted
    Batch, pack                     several pairs as one row of tokens, without padding, each prompt once
    plan_step                       a step's pairs over ranks and micro-batches: a pure function

Rules. Only the last assistant turn is scored; all turns before it are prompt. The prompt is the same for both
responses, or the pair is dropped. Text never becomes a control token. What is scored is built together with the ids,
never inferred later.

Left out: tools and images; sequences packed across pairs for attention (each pair attends to itself alone).
"""

import codecs
import gzip
import io
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import Batch, LlamaConfig, Segments, token_ids
from support.files import InputError, read_json, read_start, shown, unique

# ---------------------------------------------------------------------------------------------------------- reading

Turns = list[
    tuple[str, str]
]  # (role, content), content without outer whitespace: the chat format has none
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
WHITE = re.compile(r"\s*")
BAD_LINES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a chosen and a rejected response: turns and texts, or token ids where the file holds ids."""

    prompt: Turns | list[int]
    chosen: str | list[int]
    rejected: str | list[int]
    place: str  # "file:line"


def read_preferences(
    path: str | Path, counts: Counter | None = None, skip_bad_lines: bool = False
) -> list[Preference]:
    """Reads JSONL, JSONL.gz, or a JSON array of the same records. A record is recognised by its keys, line by line:

        prompt_ids, chosen_ids, rejected_ids     token ids, used as they are
        conversations, chosen, rejected          LLaMA-Factory (sharegpt); `system` may stand beside
        instruction [, input], chosen, rejected  LLaMA-Factory (alpaca); `system` and `history` may stand beside
        prompt, chosen, rejected                 strings, or lists of messages (responses with or without the prompt's)
        chosen, rejected                         two whole conversations: lists of messages, or HH transcripts

    A message is {"role", "content"} or {"from", "value"}. `counts` gains "read", "bad lines" and "unequal prompts"
    (pairs whose two sides do not share a prompt, which are dropped). Unless skip_bad_lines, raises InputError naming
    file and line of the first 20 lines that are not such a record, or have a key twice; nothing is trained before a
    whole file has been read. What cannot be read as lines of UTF-8 at all is an InputError in any case.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    preferences, bad = [], []
    for line, record in read_records(path):
        place = f"{path}:{line}"
        counts["read"] += 1
        try:
            if isinstance(record, ValueError):
                raise record
            if (sides := _sides(record)) is None:
                counts["unequal prompts"] += 1
            else:
                preferences.append(Preference(*sides, place))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    counts["bad lines"] += len(bad)
    if bad and not skip_bad_lines:
        more = f"\n... and {len(bad) - BAD_LINES_SHOWN} more" if len(bad) > BAD_LINES_SHOWN else ""
        total = f"\n{len(bad)} bad of {counts['read']} records; mend them, or pass --skip-bad-lines"
        raise InputError("\n".join(bad[:BAD_LINES_SHOWN]) + more + total)
    return preferences


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, parsed record, or the ValueError that parsing it gave)."""
    raw = read_start(path, -1, "a JSONL or JSONL.gz file")
    if raw[:2] == b"\x1f\x8b":
        limit = max(2**24, 100 * len(raw))  # text shrinks to a tenth, a bomb to a thousandth
        try:
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: {error}; wanted a JSONL or JSONL.gz file") from None
        if len(raw) > limit:
            raise InputError(
                f"{path}: unpacks to over {limit:,} bytes, a hundred times its own size; unpack it first"
            )
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise InputError(f"{path}: UTF-16, wanted UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        yield from _array_records(path, raw)
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line.decode(), object_pairs_hook=unique)
            except RecursionError:
                yield number, ValueError("nested too deeply")
            except UnicodeDecodeError as error:
                yield (
                    number,
                    ValueError(f"not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})"),
                )
            except ValueError as error:
                yield number, ValueError(f"not JSON: {error}")


def _array_records(path: Path, raw: bytes) -> Iterator[tuple[int, object]]:
    """The elements of a JSON array, each with the line it starts on. There are no lines to skip: any fault ends it."""
    line, counted, at = 1, 0, 0

    def skip_space(start: int) -> int:
        nonlocal line, counted
        end = WHITE.match(text, start).end()
        line, counted = line + text.count("\n", counted, end), end
        return end

    try:
        text, decoder = raw.decode(), json.JSONDecoder(object_pairs_hook=unique)
        at = skip_space(text.index("[") + 1)
        while text[at : at + 1] != "]":
            record, end = decoder.raw_decode(text, at)
            yield line, record
            at = skip_space(end)
            if text[at : at + 1] == ",":
                at = skip_space(at + 1)
                if text[at : at + 1] == "]":
                    raise ValueError("no record after the last comma")
            elif text[at : at + 1] != "]":
                raise ValueError("wanted a comma or the closing bracket")
        if text[at + 1 :].strip():
            raise ValueError("text after the closing bracket")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{line}: not a JSON array of records ({error})") from None


def _sides(record: object) -> tuple[Turns | list[int], str | list[int], str | list[int]] | None:
    """(prompt, chosen, rejected) of a record, None where its sides have different prompts; ValueError if it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, found {shown(record)}")
    if record.keys() & {"prompt_ids", "chosen_ids", "rejected_ids"}:
        return tuple(_ids(record, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    for key in ("chosen", "rejected"):
        if key not in record:
            raise ValueError(f"key {key} is missing, found {shown(', '.join(sorted(record)))}")
    if "conversations" in record:
        prompt = _turns(record["conversations"], "conversations")
    elif "instruction" in record:
        prompt = _instruction(record)
    elif isinstance(record.get("prompt"), str):
        prompt = _transcript_or_user(_text(record["prompt"], "prompt"))
    elif "prompt" in record:
        prompt = _turns(record["prompt"], "prompt")
    else:
        prompt = []
    (prompt_w, chosen), (prompt_l, rejected) = (
        _side(prompt, record, key) for key in ("chosen", "rejected")
    )
    return (prompt_w, chosen, rejected) if prompt_w == prompt_l else None


def _side(prompt: Turns, record: dict, key: str) -> tuple[Turns, str]:
    """The prompt and the response of one side. Its value is the reply alone, what follows the prompt, or all of it."""
    value = record[key]
    if isinstance(value, str) and prompt:
        turns = [*prompt, ("assistant", _text(value, key).strip())]
    elif isinstance(value, str):
        if not value.lstrip().startswith(("Human:", "Assistant:")):
            raise ValueError(
                f"key prompt is missing, and {key} is not a transcript that starts with 'Human:'"
            )
        turns = _transcript(_text(value, key))
    else:
        turns = _turns(value if isinstance(value, list) else [value], key)
        if not any(turns[i : i + len(prompt)] == prompt for i in range(len(turns))):
            if turns[0][0] != "assistant":
                raise ValueError(
                    f"prompt is not among the turns of {key}, nor do they start with the assistant's"
                )
            turns = [*prompt, *turns]
    system = record.get("system")
    if system not in (None, "") and turns[0] != ("system", _text(system, "system")):
        turns = [("system", system.strip()), *turns]
    if turns[-1][0] != "assistant":
        turns.append(("assistant", ""))  # no reply: encode_preferences drops the pair as empty
    return turns[:-1], turns[-1][1]


def _turns(value: object, key: str) -> Turns:
    """Messages of either spelling as (role, content)."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {shown(value)}, wanted a string or a list of messages")
    turns = []
    for message in value:
        keys = message.keys() if isinstance(message, dict) else set()
        role_key, content_key = ("role", "content") if "role" in keys else ("from", "value")
        if not {role_key, content_key} <= keys:
            raise ValueError(
                f"{key} holds {shown(message)}, wanted a message with role and content (or from, value)"
            )
        role, content = message[role_key], message[content_key]
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{key} holds the role {shown(role)}, wanted one of {', '.join(ROLES)}"
            )
        turns.append((ROLES[role], _text(content, key).strip()))
    return turns


def _instruction(record: dict) -> Turns:
    turns, history = [], record.get("history")
    for exchange in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise ValueError(f"history holds {shown(exchange)}, wanted [question, answer]")
        turns += [
            ("user", _text(exchange[0], "history").strip()),
            ("assistant", _text(exchange[1], "history").strip()),
        ]
    more = record.get("input")
    parts = [
        _text(record["instruction"], "instruction"),
        "" if more is None else _text(more, "input"),
    ]
    return [*turns, ("user", "\n".join(part for part in parts if part).strip())]


def _transcript_or_user(prompt: str) -> Turns:
    if prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith("\n\nAssistant:"):
        return _transcript(prompt)[:-1]
    return [("user", prompt.strip())]


def _transcript(text: str) -> Turns:
    """An HH transcript: turns start at "\\n\\nHuman:" and "\\n\\nAssistant:", and nowhere else."""
    turns = []
    for i, part in enumerate(("\n\n" + text.lstrip()).split("\n\nHuman:")):
        first, *replies = part.split("\n\nAssistant:")
        turns += [("user", first.strip())] * (i > 0) + [
            ("assistant", reply.strip()) for reply in replies
        ]
    return turns


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, wanted a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds half a surrogate pair, which is not Unicode text") from None
    return value


def _ids(record: dict, key: str) -> list[int]:
    value = record.get(key)
    # type(), since JSON's true is an int to isinstance.
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise ValueError(
            f"{key} is {'missing' if value is None else shown(value)}, wanted a list of token ids"
        )
    return value


# ---------------------------------------------------------------------------------------------------------- encoding


def generation_eos(directory: str | Path) -> tuple[int, ...]:
    """The ids at which a directory's generation_config.json ends an answer; none where it has no such file."""
    path = Path(directory) / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    if not isinstance(raw, dict):
        raise InputError(
            f"{path}: {shown(raw)}, wanted an object, its eos_token_id a token id or a list of them"
        )
    return token_ids(raw, "eos_token_id", path)


TOKENIZER_BYTES = 2**25  # Llama 3's has 9 MB


class ChatFormat:
    """Llama 3's chat format over a tokenizer.json, in token space: control ids are inserted by number, never parsed
    from text.

    <|begin_of_text|>, then for each message <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|>.
    Content is stripped, as Meta's template does, and encoded by itself: nothing merges across a boundary, and a user's
    literal "<|eot_id|>" stays text. Raises InputError for a tokenizer that lacks a control token or that would make one
    from text.
    """

    def __init__(self, directory: str | Path):
        path = Path(directory) / "tokenizer.json"
        raw = read_start(path, TOKENIZER_BYTES + 1, "the model's tokenizer")
        if len(raw) > TOKENIZER_BYTES:
            raise InputError(
                f"{path}: more than {TOKENIZER_BYTES:,} bytes, which is not a tokenizer"
            )
        try:
            parsed = json.loads(raw, object_pairs_hook=unique)
            model = parsed.get("model") if isinstance(parsed, dict) else None
            # Llama 3's is null. The tokenizers library panics on others, at which the process may be aborted.
            if isinstance(model, dict) and (prefix := model.get("continuing_subword_prefix")):
                raise ValueError(f"continuing_subword_prefix is {shown(prefix)}, wanted null")
            self.tokenizer = Tokenizer.from_str(raw.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({shown(str(error), 150)})") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = (
            True  # control tokens in text are text. Not saved in tokenizer.json
        )
        names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        for name in [*names, "<|end_of_text|>", "<|eom_id|>"]:
            number = self.tokenizer.token_to_id(name)
            if number is None and name != "<|eom_id|>":  # only 3.1 and later have it
                raise InputError(f"{path}: has no token {name}, wanted Llama 3's control tokens")
            if number in self.encode([name])[0]:
                raise InputError(
                    f"{path}: makes the control token {name} from text (it is not marked special)"
                )
        self.begin, self.start_header, self.end_header, self.end_of_turn = map(
            self.tokenizer.token_to_id, names
        )
        ends = map(self.tokenizer.token_to_id, ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
        self.stop_ids = frozenset(i for i in ends if i is not None)
        roles = ["system", "user", "assistant"]
        *role_ids, newlines = self.encode([*roles, "\n\n"])
        self.headers = {
            role: [self.start_header, *ids, self.end_header, *newlines]
            for role, ids in zip(roles, role_ids, strict=True)
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, without BOS."""
        return [
            encoding.ids
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens shown."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def last_turn(self, prompt: np.ndarray) -> str:
        """The content of the last message in a prompt's ids, for showing."""
        ids = prompt.tolist()
        ends = [i for i, token in enumerate(ids) if token in (self.end_header, self.end_of_turn)]
        return self.decode(ids[ends[-3] + 1 : ends[-2]]).strip() if len(ends) > 2 else ""

    def prompt(self, turns: Turns, contents: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of a conversation up to and with the header of the assistant's next turn. `contents` may hold encoded
        contents."""
        ids = [self.begin]
        for role, content in turns:
            content = content.strip()
            encoded = contents[content] if contents is not None else self.encode([content])[0]
            ids += [*self.headers[role], *encoded, self.end_of_turn]
        return ids + self.headers["assistant"]

    def response(self, content: str, contents: dict[str, list[int]] | None = None) -> list[int]:
        """Ids of an assistant's reply with its closing <|eot_id|>: all of them are scored. Nothing for an empty
        reply."""
        content = content.strip()
        encoded = contents[content] if contents is not None else self.encode([content])[0]
        return [*encoded, self.end_of_turn] if encoded else []


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a pair, int32. The sequences trained on are prompt + chosen and prompt + rejected; responses are
    scored."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    place: str  # "file:line"

    def packed_tokens(self, share_prompt: bool = True) -> int:
        """Tokens the pair takes in a batch."""
        return len(self.prompt) * (1 if share_prompt else 2) + len(self.chosen) + len(self.rejected)


def encode_preferences(
    preferences: list[Preference],
    chat: ChatFormat | None,
    max_tokens: int,
    overlong: str = "truncate",
    counts: Counter | None = None,
    vocab_size: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Pair]:
    """Preferences -> pairs that can be trained on, in file order.

    A sequence, prompt plus one response, has at most `max_tokens` tokens. overlong="truncate": a response keeps what
    fits after its prompt (its end, <|eot_id|> included, is cut: a model never learns to stop where we cut), and a pair
    whose prompt leaves no room is dropped. overlong="drop": any pair with a sequence that is too long is dropped. The
    prompt is never cut.

    `counts` gains "empty", "overlong" and "identical" (dropped, in this order of precedence; identical is judged on the
    ids that would be trained on), "truncated" and "kept". `chat` may be None where every preference holds ids. Raises
    InputError for ids that are not below vocab_size.
    """
    counts = Counter() if counts is None else counts
    pairs, last = [], time.monotonic()
    for start in range(
        0, len(preferences), 1000
    ):  # chunks: an Encoding takes many times the memory of its ids
        chunk = preferences[start : start + 1000]
        texts = dict.fromkeys(
            content.strip()
            for p in chunk
            if isinstance(p.chosen, str)
            for content in (*(content for _, content in p.prompt), p.chosen, p.rejected)
        )
        contents = dict(zip(texts, chat.encode(list(texts)), strict=True)) if texts else {}
        for p in chunk:
            if isinstance(p.chosen, str):
                prompt = chat.prompt(p.prompt, contents)
                chosen, rejected = (
                    chat.response(p.chosen, contents),
                    chat.response(p.rejected, contents),
                )
            else:
                prompt, chosen, rejected = p.prompt, p.chosen, p.rejected
            if (
                vocab_size is not None
                and (top := max([*prompt, *chosen, *rejected], default=0)) >= vocab_size
            ):
                raise InputError(
                    f"{p.place}: token id {top} is not below the model's vocab_size {vocab_size}"
                )
            room = max_tokens - len(prompt)
            too_long = max(len(chosen), len(rejected)) > room
            if not prompt or not chosen or not rejected:
                counts["empty"] += 1
            elif room <= 0 or (too_long and overlong == "drop"):
                counts["overlong"] += 1
            elif chosen[:room] == rejected[:room]:
                counts["identical"] += 1
            else:
                counts["truncated"] += too_long
                kept = (prompt, chosen[:room], rejected[:room])
                pairs.append(Pair(*(np.array(ids, dtype=np.int32) for ids in kept), p.place))
        if progress is not None and time.monotonic() - last > 2:
            last = time.monotonic()
            progress(f"encoded {start + len(chunk):,} of {len(preferences):,} pairs")
    counts["kept"] += len(pairs)
    return pairs


def resolve_max_tokens(max_tokens: int | None, config: LlamaConfig) -> int:
    """Tokens of prompt plus response: as asked, or the smaller of 2,048 (the paper's) and what the model can take."""
    limit = config.max_position_embeddings
    if max_tokens is not None and max_tokens > limit:
        raise InputError(
            f"--max-tokens {max_tokens} is above the model's max_position_embeddings {limit}"
        )
    return min(2048, limit) if max_tokens is None else max_tokens


# ----------------------------------------------------------------------------------------------------------- packing


def pack(pairs: list[Pair], share_prompt: bool = True, longest: int | None = None) -> Batch:
    """Packs pairs one after the other as [prompt, chosen, rejected]; the prompt is computed once and seen by both.

    The last prompt row predicts the first token of both responses, so it is scored twice. With share_prompt=False a
    pair is [prompt, chosen, prompt, rejected], two independent sequences: the same numbers for more work. `longest`
    bounds the tokens of a sequence (default: the longest here); pass a constant so that compiled kernels see one value.
    """
    tokens, positions, key_rows, scored, targets, lengths = [], [], [], [], [], []
    query_lengths, key_lengths = [], []
    row = 0  # of the pair's first token
    for pair in pairs:
        n_p, n_w, n_l = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        again = 0 if share_prompt else n_p
        first_l = row + n_p + n_w + again  # row of the first rejected token
        prompt_l = (
            np.arange(row, row + n_p) if share_prompt else np.arange(row + n_p + n_w, first_l)
        )
        tokens += [pair.prompt, pair.chosen, pair.prompt[:again], pair.rejected]
        positions += [np.arange(n_p + n_w), np.arange(n_p - again, n_p + n_l)]
        query_lengths += [n_p + n_w, again + n_l]
        key_lengths += [n_p + n_w, n_p + n_l]
        key_rows += [np.arange(row, row + n_p + n_w), prompt_l, np.arange(first_l, first_l + n_l)]
        # The row before each response token predicts it; before the first one stands the last prompt row.
        scored += [
            np.arange(row + n_p - 1, row + n_p + n_w - 1),
            prompt_l[-1:],
            np.arange(first_l, first_l + n_l - 1),
        ]
        targets += [pair.chosen, pair.rejected]
        lengths += [n_w, n_l]
        row = first_l + n_l

    def int64(parts: list) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def starts(segment_lengths: list[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(segment_lengths)], dtype=torch.int32)

    segments = Segments(
        starts(query_lengths),
        starts(key_lengths),
        int64(key_rows) if share_prompt else None,
        max(key_lengths) if longest is None else longest,
    )
    length_R = torch.tensor(lengths)
    return Batch(
        int64(tokens),
        int64(positions),
        segments,
        int64(scored),
        int64(targets),
        torch.repeat_interleave(length_R),
        length_R,
    )


MicroBatch = list[int]  # indexes of pairs


def plan_step(
    sizes: np.ndarray, pairs_per_step: int, seed: int | None, step: int, ranks: int, max_tokens: int
) -> list[list[MicroBatch]]:
    """Which pairs each rank computes in which micro-batch of step `step` (from 0): a pure function of its arguments.

    The step's pairs depend on (number of pairs, pairs_per_step, seed, step) alone, not on the machine: each epoch is a
    fresh permutation (the given order where seed is None) cut into steps, the last one short where the division leaves
    a rest. They are put, longest first, into the emptiest of ranks x m micro-batches, m being the smallest number that
    keeps each at most `max_tokens` packed tokens. Every rank gets m of them, sharded models being collective; a
    micro-batch is empty where there are more of them than pairs. The fullest come first, so that what does not fit in
    memory fails at once.

    sizes: packed tokens of every pair. Raises InputError where one pair alone exceeds max_tokens.
    """
    steps_per_epoch = -(-len(sizes) // pairs_per_step)
    epoch, within = divmod(step, steps_per_epoch)
    order = np.arange(len(sizes))
    if seed is not None:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(order)
    chosen = order[within * pairs_per_step : (within + 1) * pairs_per_step]
    return split_pairs(chosen, sizes, ranks, max_tokens)


def split_pairs(
    indexes: np.ndarray, sizes: np.ndarray, ranks: int, max_tokens: int
) -> list[list[MicroBatch]]:
    """[rank][micro-batch] -> indexes of pairs: see `plan_step`."""
    indexes = sorted(map(int, indexes), key=lambda i: (-sizes[i], i))
    if indexes and sizes[indexes[0]] > max_tokens:
        raise InputError(
            f"a pair of {sizes[indexes[0]]} packed tokens exceeds --max-tokens-per-gpu {max_tokens}; "
            "raise that or lower --max-tokens"
        )
    m = max(1, -(-int(sizes[indexes].sum()) // (ranks * max_tokens)))
    while True:
        bins, loads = [[] for _ in range(ranks * m)], np.zeros(ranks * m, dtype=np.int64)
        for i in indexes:
            emptiest = int(loads.argmin())
            bins[emptiest].append(i)
            loads[emptiest] += sizes[i]
        if loads.max() <= max_tokens:
            break
        m += 1
    fullest_first = [bins[i] for i in np.argsort(-loads, kind="stable")]
    return [fullest_first[rank::ranks] for rank in range(ranks)]
