"""Anything may be read: hypothesis makes the files, and whatever they hold has one of the outcomes that are allowed.

    python tests/fuzz.py --cases 100000 [--seed N] [--only records]        prints what it tried and what came of it

Exit code 1 where an outcome is another one, with the smallest input that it found and how to have it again.
tests/test_fuzz.py runs a few hundred cases of the same.

In reading order
    edited, mutated     real bytes and real JSON, with something wrong in them
    records, packed_bytes, texts            preference files -> pairs, counted drops, or an InputError with file:line
    config, index, header, tokenizer        model directories -> what they say, or an InputError naming the file
    KINDS, fuzz, main   a strategy and a check of each kind; many cases
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
from conftest import REAL, ROOT, tiny_model
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import model as model_py
from data import ChatFormat, encode_preferences, read_preferences
from model import LlamaConfig, check_weights, load_model, save_model
from support.files import InputError

MODEL = ROOT / "examples" / "model"
CHAT = ChatFormat(MODEL)
CONTROL = [
    f"<|{name}|>"
    for name in (
        "begin_of_text",
        "end_of_text",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
    )
]
CONTROL_IDS = [i for i in map(CHAT.tokenizer.token_to_id, CONTROL) if i is not None]
REASONS = ["bad lines", "unequal prompts", "empty", "overlong", "identical", "kept"]

# ------------------------------------------------------------------------------------------------------- what is wrong

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
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        3,
        7,
        0.5,
        1e-9,
        1e9,
        10**9,
        10**12,
        2**24,
        2**31,
        2**63,
        2**64,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        -0.0,
        "4",
        "",
        True,
        False,
        None,
    ]
)
SPLICES = st.sampled_from(
    [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\0",
        b"\n",
        b"\r\n",
        b"\xff",
        b"\xed\xa0\x80",
        b"\\ud83d",
        b"\\u0000",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-",
        b"9" * 5000,
        b"null",
        b"true",
        b"[" * 1500,
        b'{"a":' * 1500,
        b"\xef\xbb\xbf",
        b"<|eot_id|>",
        b"x" * 10_000,
    ]
)


class Twice(str):
    """A key beside its equal: json writes a dict that has both."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def edited(raw: bytes, most: int = 3):
    """Bytes with up to `most` places cut, spliced, or both."""
    edit = st.tuples(
        st.floats(0, 1), st.sampled_from([0, 0, 1, 2, 9, len(raw)]), SPLICES | st.binary(max_size=3)
    )

    def apply(edits: list) -> bytes:
        result = raw
        for place, cut, splice in edits:
            at = int(place * len(result))
            result = result[:at] + splice + result[at + cut :]
        return result

    return st.lists(edit, max_size=most).map(apply)


def paths(value, above: tuple = ()):
    """The place of every value within a JSON value, as keys and indexes; of a long list or object the first ones."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    for key, inner in list(parts)[:30]:
        yield above + (key,)
        yield from paths(inner, above + (key,))


def mutated(document: dict, values=NUMBERS | JSON_VALUES):
    """(JSON bytes, whether a key stands twice) of a document in which up to three values are replaced or deleted, and
    one key may stand twice."""
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
                pass  # an edit before took the place away
        return json.dumps(changed).encode(), stands_twice

    return st.builds(apply, edits, st.none() | st.none() | st.sampled_from(twice))


def refused(error: InputError, *files: Path) -> str:
    """Checks that a complaint is printable lines, each short and naming one of the files; then it is an outcome."""
    lines = str(error).split("\n")
    if re.match(r"\d+ bad of \d+ records; ", lines[-1]):
        lines.pop()
    assert lines and all(
        line.isprintable() and line.isascii() and len(line) < 600 for line in lines
    ), lines
    assert all(line.startswith((*map(str, files), "... and ")) for line in lines), lines
    return "refused"


# ----------------------------------------------------------------------------------------------------- preference data

KEYS = [
    "prompt",
    "chosen",
    "rejected",
    "conversations",
    "instruction",
    "input",
    "history",
    "system",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
]
CONTENT = LOOK_ALIKES | SCALARS
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | SCALARS, "content": CONTENT}
    )
    | st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt"]) | SCALARS, "value": CONTENT}
    ),
    max_size=3,
)
VALUES = LOOK_ALIKES | MESSAGES | st.lists(st.integers(-2, 600), max_size=4) | JSON_VALUES | LONG
RECORDS = (
    st.fixed_dictionaries(
        {"chosen": VALUES, "rejected": VALUES},
        optional={key: VALUES for key in KEYS if key not in ("chosen", "rejected")},
    )
    | st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUES, max_size=5)
    | JSON_VALUES
)
FORMATS = re.search(
    r"<!-- formats -->\n```jsonl\n(.*?)```", (ROOT / "README.md").read_text(), re.S
)[1].splitlines()
REAL_LINES = [*FORMATS, *(ROOT / "examples" / "train.jsonl").read_text().splitlines()[:30]]
for file in sorted((REAL / "preferences").glob("*.jsonl")):
    REAL_LINES += [line for line in file.read_text().split("\n")[:40] if 0 < len(line) < 3000][:6]
NO_LINES = (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b")  # UTF-16 and gzip: of the whole file
MUTATED = st.sampled_from(REAL_LINES).flatmap(
    lambda line: mutated(json.loads(line), VALUES | NUMBERS)
)
EDITED = st.sampled_from(REAL_LINES).flatmap(lambda line: edited(line.encode()))
NESTED = st.builds(
    lambda deep, key: b'{"%s": %s%s}' % (key.encode(), b"[" * deep, b"]" * deep),
    st.sampled_from([3, 400, 900, 960, 1000, 5000]),
    st.sampled_from(KEYS),
)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    MUTATED.map(lambda case: case[0]),
    EDITED,
    NESTED,
    st.sampled_from(REAL_LINES).map(str.encode),
)


def check_records(where: Path, case: tuple[list[bytes], bool, int]) -> str:
    """Lines, or an array of them: pairs, counted drops, or complaints with file and line; the counts add up."""
    lines, array, limit = case
    path, counts = where / "records.jsonl", Counter()
    raw = b"[" + b",\n".join(lines) + b"]" if array else b"\n".join(lines)
    path.write_bytes(raw)
    bad = 0
    try:
        read_preferences(path)
    except InputError as error:
        refused(
            error,
            *(where / f"records.jsonl:{i}: " for i in range(1, raw.count(b"\n") + 2)),
            f"{path}: ",
        )
        bad = int(
            re.search(r"\n(\d+) bad of \d+ records", "\n" + str(error) + "\n0 bad of 0 records")[1]
        )
    try:
        preferences = read_preferences(path, counts, skip_bad_lines=True)
    except InputError as error:  # a broken array, and what is no text at all, cannot be skipped
        assert array or raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" or raw[:2] in NO_LINES, error
        return refused(error, path)
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] != b"[":
        assert counts["read"] == sum(1 for line in raw.split(b"\n") if line.strip())
    assert counts["bad lines"] == bad
    try:
        pairs = encode_preferences(preferences, CHAT, limit, counts=counts, vocab_size=512)
    except InputError as error:
        assert "vocab_size" in str(error)
        return refused(error, f"{path}:")
    assert counts["read"] == sum(counts[reason] for reason in REASONS) and counts["kept"] == len(
        pairs
    )
    for pair in pairs:
        assert min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) > 0
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= limit
        assert pair.chosen.tolist() != pair.rejected.tolist()
    return "pairs" if pairs else "bad lines" if bad == counts["read"] else "dropped"


WHOLE = "\n".join(REAL_LINES[:8]).encode()
PACKED = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda tail: b"\x1f\x8b\x08\0\0\0\0\0\0\0" + tail),
    edited(gzip.compress(WHOLE, mtime=0)),
    edited(WHOLE).map(gzip.compress),
    st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1"]).map(WHOLE.decode().encode),
)


def check_bytes(where: Path, raw: bytes) -> str:
    """Bytes, gzipped ones among them: preferences, or complaints naming the file."""
    path, counts = where / "bytes.jsonl.gz", Counter()
    path.write_bytes(raw)
    try:
        preferences = read_preferences(path, counts)
    except InputError as error:
        return refused(error, path)
    assert len(preferences) + counts["unequal prompts"] == counts["read"]
    return "preferences" if preferences else "nothing"


def check_texts(where: Path, texts: tuple[str, str, str]) -> str:
    """Any text decodes back to itself and makes no control token; as a pair it is trained on exactly, or dropped with
    the reason."""
    for text, ids in zip(texts, CHAT.encode(list(texts)), strict=True):
        assert CHAT.decode(ids) == text and not np.isin(ids, CONTROL_IDS).any()
    path, counts = where / "texts.jsonl", Counter()
    path.write_text(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))))
    pairs = encode_preferences(read_preferences(path, counts), CHAT, 10**6, counts=counts)
    prompt, chosen, rejected = (text.strip() for text in texts)
    if not chosen or not rejected or chosen == rejected:
        reason = "identical" if chosen and rejected else "empty"
        assert not pairs and counts[reason] == 1
        return reason
    [pair] = pairs
    if not (
        texts[0].startswith("\n\nHuman:") and texts[0].rstrip().endswith("\n\nAssistant:")
    ):  # an HH prompt
        header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
        said = "<|begin_of_text|>" + header("user") + prompt + "<|eot_id|>" + header("assistant")
        assert (
            CHAT.decode(pair.prompt.tolist()) == said
            and np.isin(pair.prompt, CONTROL_IDS).sum() == 6
        )
    for ids, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert (
            CHAT.decode(ids.tolist()) == text + "<|eot_id|>"
            and np.isin(ids, CONTROL_IDS).sum() == 1
        )
    return "pair"


# --------------------------------------------------------------------------------------------------- model directories

CONFIGS = [
    json.loads(path.read_bytes())
    for path in [
        MODEL / "config.json",
        *sorted((REAL / "configs").glob("*/config.json")),
        REAL / "stories260K/config.json",
    ]
    if path.exists()
]


def tiny_directory(where: Path, shard_bytes: int) -> Path:
    """A saved model: of several files and an index, or of one file. Made once in each place."""
    directory = where / f"model-{shard_bytes}"
    if not directory.exists():
        whole, model_py.SHARD_BYTES = model_py.SHARD_BYTES, shard_bytes
        save_model(tiny_model(), directory)
        model_py.SHARD_BYTES = whole
    return directory


with tempfile.TemporaryDirectory() as place:
    INDEX = json.loads(
        (tiny_directory(Path(place), 20_000) / "model.safetensors.index.json").read_bytes()
    )
    whole = (tiny_directory(Path(place), 10**9) / "model.safetensors").read_bytes()
DATA_AT = 8 + int.from_bytes(whole[:8], "little")
RAW_HEADER, RAW_DATA = whole[8:DATA_AT], whole[DATA_AT:]
HEADER = json.loads(RAW_HEADER)
NAMES = st.sampled_from(
    [
        "../x.safetensors",
        "/etc/passwd",
        "model.safetensors",
        "config.json",
        "a\0.safetensors",
        ".",
        "a\n.safetensors",
        "x" * 5000 + ".safetensors",
        "~/.ssh/id",
        "model.safetensors.index.json",
    ]
)


def plain(strategy):
    """The bytes as (bytes, no key stands twice)."""
    return strategy.map(lambda raw: (raw, False))


CONFIG = st.sampled_from(CONFIGS).flatmap(
    lambda config: mutated(config) | mutated(config) | plain(edited(json.dumps(config).encode()))
)


def check_config(where: Path, case: tuple[bytes, bool]) -> str:
    """A config of sizes that can be, or a complaint naming config.json; with weights beside it of another model, one
    naming the directory."""
    raw, twice = case
    directory = tiny_directory(where, 10**9)
    path = directory / "config.json"
    path.write_bytes(raw)
    try:
        config = LlamaConfig.load(directory)
    except InputError as error:
        return refused(error, path)
    assert not twice
    sizes = (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.max_position_embeddings,
    )
    assert (
        all(type(size) is int and 0 < size < 2**24 for size in sizes)
        and 0 < config.num_hidden_layers < 2**12
    )
    assert config.num_attention_heads % config.num_key_value_heads == 0 == config.head_dim % 2
    assert 0 < config.rms_norm_eps < 2**40 and 0 < config.rope_theta < 2**40
    try:
        check_weights(directory, config)
    except InputError as error:
        refused(error, directory)
    return "config"


def check_index(where: Path, case: tuple[bytes, bool]) -> str:
    """The place of every tensor, within the directory, or a complaint naming the index or a file."""
    raw, twice = case
    directory = tiny_directory(where, 20_000)
    (directory / "model.safetensors.index.json").write_bytes(raw)
    try:
        places = check_weights(directory, tiny_model().config)
    except InputError as error:
        return refused(error, directory)
    assert not twice and {path.parent for path in places.values()} == {directory}
    return "places"


def check_header(where: Path, case: tuple[tuple[bytes, bool], int | None, bytes]) -> str:
    """A loaded model, or a complaint naming the file."""
    (raw, twice), length, data = case
    directory = tiny_directory(where, 10**9)
    (directory / "config.json").write_text(
        json.dumps(tiny_model().config.to_dict(model_py.torch.bfloat16))
    )
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
    """A tokenizer that encodes and decodes, or a complaint naming the file."""
    raw, twice = case
    (where / "tokenizer.json").write_bytes(raw)
    try:
        chat = ChatFormat(where)
    except InputError as error:
        return refused(error, where / "tokenizer.json")
    assert not twice
    chat.decode(chat.encode(["Hello <|eot_id|> w\xf6rld\n\n 123\0 \U0001f600"])[0])
    return "tokenizer"


# ---------------------------------------------------------------------------------------------------------- many cases

TEXTS = st.one_of(LOOK_ALIKES, LOOK_ALIKES, st.text(max_size=30), st.text(max_size=30), LONG)
LENGTHS = st.sampled_from(
    [None, None, None, 0, 1, len(RAW_HEADER) - 1, 10**6, 10**8, 2**63, 2**64 - 1]
)
HEADERS = st.tuples(
    mutated(HEADER) | plain(edited(RAW_HEADER)),
    LENGTHS,
    st.sampled_from([RAW_DATA, RAW_DATA, RAW_DATA, b"", RAW_DATA[:-1], RAW_DATA + b"\0"]),
)
KINDS: dict[str, tuple[st.SearchStrategy, Callable[[Path, object], str]]] = {
    "records": (
        st.tuples(st.lists(LINES, min_size=1, max_size=4), st.booleans(), st.integers(1, 300)),
        check_records,
    ),
    "bytes": (PACKED, check_bytes),
    "texts": (st.tuples(TEXTS, TEXTS, TEXTS), check_texts),
    "config": (CONFIG, check_config),
    "index": (
        mutated(INDEX, NUMBERS | JSON_VALUES | NAMES) | plain(edited(json.dumps(INDEX).encode())),
        check_index,
    ),
    "header": (HEADERS, check_header),
    "tokenizer": (mutated(TOKENIZER), check_tokenizer),
}
SHARES = {
    "records": 0.4,
    "bytes": 0.1,
    "texts": 0.15,
    "config": 0.15,
    "index": 0.1,
    "header": 0.06,
    "tokenizer": 0.04,
}


def fuzz(kind: str, cases: int, number: int | None, where: Path) -> Counter:
    """Runs `cases` cases of a kind from a seed (None: a fresh one) and counts their outcomes. Raises what a failing
    case raised, for the smallest such case, which the exception notes."""
    strategy, check = KINDS[kind]
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=KINDS)
    flags = parser.parse_args(arguments)
    failed = False
    for kind, share in SHARES.items():
        wanted, outcomes, started = (
            math.ceil((1 if flags.only else share) * flags.cases),
            Counter(),
            time.monotonic(),
        )
        batch = 0
        while flags.only in (None, kind) and outcomes.total() < wanted:
            number = 1000 * flags.seed + batch  # batches: hypothesis remembers all that it tried
            try:
                with tempfile.TemporaryDirectory() as where:
                    outcomes += fuzz(
                        kind, min(1000, wanted - outcomes.total()), number, Path(where)
                    )
            except BaseException as error:  # a panic of a library in Rust is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                traceback.print_exc()
                print(f"{kind}: a failure in batch {batch} of --seed {flags.seed}, as above")
                failed = True
                break
            batch += 1
        if outcomes:
            print(
                f"{kind:10} {outcomes.total():7,} cases in {time.monotonic() - started:5.0f} s: "
                + ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common()),
                flush=True,
            )
    print(f"seed {flags.seed}: {'FAILED' if failed else 'no failure'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
