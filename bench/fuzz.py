"""Reads files that hold anything; each must have one of the allowed outcomes.

    python bench/fuzz.py --cases 20000 [--seed N] [--only records]

hypothesis makes the files. Prints how many cases of each kind it tried and their outcomes. If a
case had another outcome, prints the smallest such case that it found and the seed that repeats it,
and the exit code is 1. tests/test_fuzz.py runs a few cases of each kind.

In reading order
    edited, mutated                     real bytes and real JSON with something wrong in them
    records, bytes, texts               data files -> pairs, counted drops, or an InputError
    config, index, header, tokenizer    model directories -> their content, or an InputError
    KINDS, fuzz, main                   for each kind a strategy and a check; many cases
"""

import argparse
import copy
import functools
import gzip
import json
import math
import operator
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import REAL, tiny_model  # noqa: E402

import support.export as export_py  # noqa: E402
from data import ChatFormat, encode_preferences, read_preferences  # noqa: E402
from model import LlamaConfig, check_weights, load_model  # noqa: E402
from support.export import save_model  # noqa: E402
from support.files import InputError  # noqa: E402

MODEL = ROOT / "examples" / "model"
CHAT = ChatFormat(MODEL)
NAMES = "begin_of_text end_of_text start_header_id end_header_id eom_id eot_id"
CONTROL = [f"<|{name}|>" for name in NAMES.split()]
CONTROL_IDS = [i for i in map(CHAT.tokenizer.token_to_id, CONTROL) if i is not None]
REASONS = ["bad lines", "unequal prompts", "empty", "overlong", "identical", "kept"]

# ----------------------------------------------------------------------------------- what is wrong

TEXT = st.text(st.characters(), max_size=20)  # lone surrogates and NUL too
LOOK_ALIKE_PARTS = st.sampled_from(
    [*CONTROL, "\n\nHuman:", "\n\nAssistant:", "\n\n", "user", "\0", "<|eot_", "\u2028"]
)
LOOK_ALIKES = st.lists(st.text(max_size=8) | LOOK_ALIKE_PARTS, max_size=5).map("".join)
LONG = st.builds(
    lambda text, times: text * times,
    st.text(min_size=1, max_size=4) | LOOK_ALIKE_PARTS,
    st.sampled_from([10, 100, 1000, 5000]),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
# fmt: off
NUMBERS = st.sampled_from([
    0, -1, 1, 2, 3, 7, 0.5, 1e-9, 1e9, 10**9, 10**12, 2**24, 2**31, 2**63, 2**64, 10**30, 1e308,
    float("nan"), float("inf"), -0.0, "4", "", True, False, None,
])
SPLICES = st.sampled_from([
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\n", b"\r\n", b"\xff",
    b"\xed\xa0\x80", b"\\ud83d", b"\\u0000", b"NaN", b"-Infinity", b"1e999", b"-", b"9" * 5000,
    b"null", b"true", b"[" * 1500, b'{"a":' * 1500, b"\xef\xbb\xbf", b"<|eot_id|>", b"x" * 10_000,
])
# fmt: on


class Twice(str):
    """A key that differs from its equal, so that json.dumps writes both."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def edited(raw: bytes, most: int = 3):
    """Bytes with up to `most` places cut, spliced, or both."""
    cuts = st.sampled_from([0, 0, 1, 2, 9, len(raw)])
    edit = st.tuples(st.floats(0, 1), cuts, SPLICES | st.binary(max_size=3))

    def apply(edits: list) -> bytes:
        result = raw
        for place, cut, splice in edits:
            at = int(place * len(result))
            result = result[:at] + splice + result[at + cut :]
        return result

    return st.lists(edit, max_size=most).map(apply)


def paths(value, above: tuple = ()):
    """The place of every value within a JSON value, as a tuple of keys and indexes; only the first
    30 parts of a long list or object."""
    parts = []
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for key, inner in list(parts)[:30]:
        yield above + (key,)
        yield from paths(inner, above + (key,))


def mutated(document: dict, values=NUMBERS | JSON_VALUES):
    """A document in which up to three values are replaced or deleted, and one key may stand twice:
    (JSON bytes, whether a key does stand twice)."""
    places = list(paths(document))
    twice = [place for place in places if isinstance(place[-1], str)]
    edits = st.lists(st.tuples(st.sampled_from(places), st.booleans(), values), max_size=3)

    def apply(edits: list, second: tuple | None) -> tuple[bytes, bool]:
        changed, stands_twice = copy.deepcopy(document), False
        for place, delete, value in [*edits, *([(second, False, Twice)] if second else [])]:
            try:
                *above, last = place
                inside = functools.reduce(operator.getitem, above, changed)
                if value is Twice:
                    inside[Twice(last)] = inside[last]
                    stands_twice = True
                elif delete:
                    del inside[last]
                else:
                    inside[last] = value
            except (KeyError, IndexError, TypeError):
                pass  # an earlier edit removed the place
        return json.dumps(changed).encode(), stands_twice

    return st.builds(apply, edits, st.none() | st.none() | st.sampled_from(twice))


def plain(strategy):
    """Bytes in the form of `mutated`: (bytes, no key stands twice)."""
    return strategy.map(lambda raw: (raw, False))


def refused(error: InputError, *files: Path | str) -> str:
    """The outcome of an InputError, after a check that its lines are printable and short and that
    each names one of the files."""
    lines = str(error).split("\n")
    if re.match(r"\d+ bad of \d+ records; ", lines[-1]):
        lines.pop()
    assert lines
    for line in lines:
        assert line.isprintable() and line.isascii() and len(line) < 600, line
        assert line.startswith((*map(str, files), "... and ")), line
    return "refused"


# --------------------------------------------------------------------------------- preference data

KEYS = ["prompt", "chosen", "rejected", "conversations", "messages", "instruction", "input"]
KEYS += ["history", "system", "prompt_ids", "chosen_ids", "rejected_ids"]
KEYS += ["completion", "output", "response_ids", "label", "kto_tag"]
CONTENT = LOOK_ALIKES | SCALARS
OPENAI_ROLES = st.sampled_from(["user", "assistant", "system"]) | SCALARS
SHARE_ROLES = st.sampled_from(["human", "gpt"]) | SCALARS
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": OPENAI_ROLES, "content": CONTENT})
    | st.fixed_dictionaries({"from": SHARE_ROLES, "value": CONTENT}),
    max_size=3,
)
STORED = st.builds(lambda dump, value: dump(value), st.sampled_from([json.dumps, str]), MESSAGES)
VALUES = (
    LOOK_ALIKES
    | MESSAGES
    | STORED
    | st.lists(st.integers(-2, 600), max_size=4)
    | JSON_VALUES
    | LONG
)
RECORDS = (
    st.fixed_dictionaries(
        {"chosen": VALUES, "rejected": VALUES},
        optional={key: VALUES for key in KEYS if key not in ("chosen", "rejected")},
    )
    | st.fixed_dictionaries(
        {"label": st.booleans()},
        optional={key: VALUES for key in KEYS if key not in ("chosen", "rejected", "label")},
    )
    | st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUES, max_size=5)
    | JSON_VALUES
)
DOCS = (ROOT / "docs" / "data-formats.md").read_text()
SHOWN = re.findall(r"<!-- (?:formats|single answers) -->\n```jsonl\n(.*?)```", DOCS, re.S)
FORMATS = "".join(SHOWN).splitlines()
REAL_LINES = [*FORMATS, *(ROOT / "examples" / "train.jsonl").read_text().splitlines()[:30]]
for file in sorted((REAL / "preferences").glob("*.jsonl")):
    REAL_LINES += [line for line in file.read_text().split("\n")[:40] if 0 < len(line) < 3000][:6]
REAL_LINE = st.sampled_from(REAL_LINES)
NESTED = st.builds(
    lambda deep, key: b'{"%s": %s%s}' % (key.encode(), b"[" * deep, b"]" * deep),
    st.sampled_from([3, 400, 900, 960, 1000, 5000]),
    st.sampled_from(KEYS),
)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    REAL_LINE.flatmap(lambda line: mutated(json.loads(line), VALUES | NUMBERS)).map(
        lambda case: case[0]
    ),
    REAL_LINE.flatmap(lambda line: edited(line.encode())),
    NESTED,
    REAL_LINE.map(str.encode),
)
FILES = st.tuples(st.lists(LINES, min_size=1, max_size=4), st.booleans(), st.integers(1, 300))


def check_records(where: Path, case: tuple[list[bytes], bool, int]) -> str:
    """Lines, or an array of them, become pairs, counted drops, or complaints with their places. The
    counts add up."""
    lines, array, limit = case
    path, counts = where / "records.jsonl", Counter()
    raw = b"[" + b",\n".join(lines) + b"]" if array else b"\n".join(lines)
    path.write_bytes(raw)
    text = raw.removeprefix(b"\xef\xbb\xbf")
    array, bad = text.lstrip()[:1] == b"[", 0
    try:
        read_preferences(path)
    except InputError as error:
        numbers = range(1, raw.count(b"\n") + 2)
        refused(error, *(f"{path}:{i}: " for i in numbers), f"{path}: ")
        total = re.search(r"\n(\d+) bad of \d+ records", f"\n{error}")
        bad = int(total[1]) if total else 0
    try:
        preferences = read_preferences(path, counts, skip_bad_lines=True)
    except InputError as error:  # a broken array, gzip and other formats cannot be skipped
        assert array or raw[:2] == b"\x1f\x8b" or "; convert it: " in str(error), error
        return refused(error, f"{path}: ")
    if not array:
        assert counts["read"] == sum(1 for line in text.split(b"\n") if line.strip())
    assert counts["bad lines"] == bad
    try:
        pairs = encode_preferences(preferences, CHAT, limit, counts=counts, vocab_size=512)
    except InputError as error:
        assert "vocab_size" in str(error)
        return refused(error, f"{path}:")
    assert counts["read"] == sum(counts[reason] for reason in REASONS)
    assert counts["kept"] == len(pairs)
    ones = [pair for pair in pairs if not len(pair.chosen) or not len(pair.rejected)]
    assert len(ones) == counts["good answers"] + counts["bad answers"]
    for pair in pairs:
        assert len(pair.prompt) > 0
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= limit
        assert pair.chosen.tolist() != pair.rejected.tolist()
    if pairs:
        return "pairs"
    return "bad lines" if bad == counts["read"] else "dropped"


WHOLE = "\n".join(REAL_LINES[:8]).encode()
PACKED = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda tail: b"\x1f\x8b\x08\0\0\0\0\0\0\0" + tail),
    edited(gzip.compress(WHOLE, mtime=0)),
    edited(WHOLE).map(gzip.compress),
    st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1"]).map(WHOLE.decode().encode),
)


def check_bytes(where: Path, raw: bytes) -> str:
    """Bytes, gzipped ones among them, become preferences or complaints that name the file."""
    path, counts = where / "bytes.jsonl.gz", Counter()
    path.write_bytes(raw)
    try:
        preferences = read_preferences(path, counts)
    except InputError as error:
        return refused(error, path)
    assert len(preferences) + counts["unequal prompts"] == counts["read"]
    return "preferences" if preferences else "nothing"


TEXTS = st.one_of(LOOK_ALIKES, LOOK_ALIKES, st.text(max_size=30), st.text(max_size=30), LONG)


def check_texts(where: Path, texts: tuple[str, str, str]) -> str:
    """Any text decodes back to itself and makes no control token. As a pair it is trained on
    exactly, or dropped for the right reason."""
    for text, ids in zip(texts, CHAT.encode(list(texts)), strict=True):
        assert CHAT.decode(ids) == text and not np.isin(ids, CONTROL_IDS).any()
    path, counts = where / "texts.jsonl", Counter()
    path.write_text(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))))
    preferences = read_preferences(path, counts, skip_bad_lines=True)
    pairs = encode_preferences(preferences, CHAT, 10**6, counts=counts)
    assert 1 == counts["read"] == sum(counts[reason] for reason in REASONS)
    if any(text.lstrip().startswith(("Human:", "Assistant:")) for text in texts):
        return "HH's, perhaps"
    prompt, chosen, rejected = (text.strip() for text in texts)
    if not prompt or not chosen or not rejected or chosen == rejected:
        reason = "identical" if prompt and chosen and rejected else "empty"
        assert not pairs and counts[reason] == 1
        return reason
    [pair] = pairs
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    said = f"<|begin_of_text|>{header('user')}{prompt}<|eot_id|>{header('assistant')}"
    assert CHAT.decode(pair.prompt.tolist()) == said
    assert np.isin(pair.prompt, CONTROL_IDS).sum() == 6
    for ids, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert CHAT.decode(ids.tolist()) == text + "<|eot_id|>"
        assert np.isin(ids, CONTROL_IDS).sum() == 1
    return "pair"


# ------------------------------------------------------------------------------- model directories

CONFIG_FILES = [MODEL / "config.json", REAL / "stories260K" / "config.json"]
CONFIG_FILES += sorted((REAL / "configs").glob("*/config.json"))
CONFIG = st.sampled_from(
    [json.loads(path.read_bytes()) for path in CONFIG_FILES if path.exists()]
).flatmap(
    lambda config: mutated(config) | mutated(config) | plain(edited(json.dumps(config).encode()))
)


def tiny_directory(where: Path, shard_bytes: int) -> Path:
    """A saved model, of one file or of several with an index. Made once in each place."""
    directory = where / f"model-{shard_bytes}"
    if not directory.exists():
        usual, export_py.SHARD_BYTES = export_py.SHARD_BYTES, shard_bytes
        save_model(tiny_model(), directory)
        export_py.SHARD_BYTES = usual
    return directory


def check_config(where: Path, case: tuple[bytes, bool]) -> str:
    """A config whose sizes are possible, or a complaint that names config.json. The weights beside
    it may be another model's: then a complaint that names the directory."""
    raw, twice = case
    directory = tiny_directory(where, 10**9)
    path = directory / "config.json"
    path.write_bytes(raw)
    try:
        config = LlamaConfig.load(directory)
    except InputError as error:
        return refused(error, path)
    assert not twice
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, heads, groups]
    sizes += [config.head_dim, config.max_position_embeddings]
    assert all(type(size) is int and 0 < size < 2**24 for size in sizes)
    assert 0 < config.num_hidden_layers < 2**12
    assert heads % groups == 0 == config.head_dim % 2
    assert 0 < config.rms_norm_eps < 2**40 and 0 < config.rope_theta < 2**40
    try:
        check_weights(directory, config)
    except InputError as error:
        refused(error, directory)
    return "config"


with tempfile.TemporaryDirectory() as place:
    sharded, single = (tiny_directory(Path(place), size) for size in (20_000, 10**9))
    INDEX = json.loads((sharded / "model.safetensors.index.json").read_bytes())
    whole = (single / "model.safetensors").read_bytes()
# fmt: off
FILE_NAMES = st.sampled_from([
    "../x.safetensors", "/etc/passwd", "model.safetensors", "config.json", "a\0.safetensors", ".",
    "a\n.safetensors", "x" * 5000 + ".safetensors", "~/.ssh/id", "model.safetensors.index.json",
])
# fmt: on
INDEXES = mutated(INDEX, NUMBERS | JSON_VALUES | FILE_NAMES)
INDEXES |= plain(edited(json.dumps(INDEX).encode()))


def check_index(where: Path, case: tuple[bytes, bool]) -> str:
    """The file of every tensor, inside the directory, or a complaint that names the index or a
    file."""
    raw, twice = case
    directory = tiny_directory(where, 20_000)
    (directory / "model.safetensors.index.json").write_bytes(raw)
    try:
        places = check_weights(directory, tiny_model().config)
    except InputError as error:
        return refused(error, directory)
    assert not twice and {path.parent for path in places.values()} == {directory}
    return "places"


DATA_AT = 8 + int.from_bytes(whole[:8], "little")
RAW_HEADER, RAW_DATA = whole[8:DATA_AT], whole[DATA_AT:]
HEADER = mutated(json.loads(RAW_HEADER)) | plain(edited(RAW_HEADER))
LENGTHS = [None, None, None, 0, 1, len(RAW_HEADER) - 1, 10**6, 10**8, 2**63, 2**64 - 1]
DATA = [RAW_DATA, RAW_DATA, RAW_DATA, b"", RAW_DATA[:-1], RAW_DATA + b"\0"]
HEADERS = st.tuples(HEADER, st.sampled_from(LENGTHS), st.sampled_from(DATA))


def check_header(where: Path, case: tuple[tuple[bytes, bool], int | None, bytes]) -> str:
    """A loaded model, or a complaint that names the file."""
    (raw, twice), length, data = case
    directory = tiny_directory(where, 10**9)
    config = tiny_model().config.to_dict(torch.bfloat16)
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    try:
        load_model(directory)
    except InputError as error:
        return refused(error, path, directory)
    assert not twice
    return "model"


TOKENIZER = json.loads((MODEL / "tokenizer.json").read_bytes())


def check_tokenizer(where: Path, case: tuple[bytes, bool]) -> str:
    """A tokenizer that encodes and decodes, or a complaint that names the file."""
    raw, twice = case
    (where / "tokenizer.json").write_bytes(raw)
    try:
        chat = ChatFormat(where)
    except InputError as error:
        return refused(error, where / "tokenizer.json")
    assert not twice
    chat.decode(chat.encode(["Hello <|eot_id|> w\xf6rld\n\n 123\0 \U0001f600"])[0])
    return "tokenizer"


# -------------------------------------------------------------------------------------- many cases

# kind -> its share of the cases, how a case is made, and the check that returns its outcome
KINDS: dict[str, tuple[float, st.SearchStrategy, Callable[[Path, object], str]]] = {
    "records": (0.4, FILES, check_records),
    "bytes": (0.1, PACKED, check_bytes),
    "texts": (0.15, st.tuples(TEXTS, TEXTS, TEXTS), check_texts),
    "config": (0.15, CONFIG, check_config),
    "index": (0.1, INDEXES, check_index),
    "header": (0.06, HEADERS, check_header),
    "tokenizer": (0.04, mutated(TOKENIZER), check_tokenizer),
}
BATCH = 1000  # cases in one call: hypothesis remembers all that it tried


def fuzz(kind: str, cases: int, number: int | None, where: Path) -> Counter:
    """Runs `cases` cases of a kind from a seed (None: a fresh one) and counts their outcomes. If a
    case fails, raises the error of the smallest case that fails, with that case as its note."""
    _, strategy, check = KINDS[kind]
    outcomes: Counter = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def run(case):
        outcomes[check(where, case)] += 1

    (run if number is None else seed(number)(run))()
    return outcomes


def fuzz_kind(kind: str, cases: int, first: int) -> bool:
    """Fuzzes one kind, batch by batch, and prints its outcomes. True if no case failed."""
    outcomes, started, batch, ok = Counter(), time.monotonic(), 0, True
    while ok and outcomes.total() < cases:
        size = min(BATCH, cases - outcomes.total())
        try:
            with tempfile.TemporaryDirectory() as where:
                outcomes += fuzz(kind, size, 1000 * first + batch, Path(where))
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic in a Rust library is not an Exception
            traceback.print_exc()
            print(f"{kind}: a failure in batch {batch} of --seed {first}, as above")
            ok = False
        batch += 1
    if outcomes:
        found = ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common())
        seconds = time.monotonic() - started
        print(f"{kind:10} {outcomes.total():7,} cases in {seconds:5.0f} s: {found}", flush=True)
    return ok


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together [2000]")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=KINDS, help="all cases of this kind")
    flags = parser.parse_args(arguments)
    ok = True
    for kind in [flags.only] if flags.only else KINDS:
        share = 1 if flags.only else KINDS[kind][0]
        ok &= fuzz_kind(kind, math.ceil(share * flags.cases), flags.seed)
    print(f"seed {flags.seed}: {'no failure' if ok else 'FAILED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
