"""Files may be made to harm: nothing in them runs, nothing of the size that they claim is made, and
the complaint is one line that names the file.

Oracles: a file that the planted code would make, the process's own peak memory, headers by hand.
"""

import gc
import gzip
import json
import os
import pickle
import queue
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    RAW_CONFIG,
    ROOT,
    Planted,
    edit_json,
    edit_tensors,
    entry,
    main,
    read_json,
    refusal,
    save_tiny,
    tiny_config,
    tiny_model,
    write_pairs,
    write_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import train
from data import ChatFormat, read_preferences
from model import LlamaConfig, check_weights, load_model
from support import files
from support.export import save_model
from support.files import shown

GOOD = '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}'
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def memory(name: str) -> int:
    """A figure of this process in bytes: VmRSS is what it holds, VmHWM its peak. 0 off Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@contextmanager
def cheaply():
    """The block takes under a second of the processor and 50 MB more than the process had."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    gc.freeze()  # else the collector's walk over all that pytest and transformers hold is timed
    before, started = memory("VmRSS"), time.process_time()
    yield
    gc.unfreeze()
    seconds, used = time.process_time() - started, memory("VmHWM") - before
    assert seconds < 1 and used < 50e6, f"{seconds:.2f} s, {used / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny model with the example's tokenizer beside it."""
    return save_tiny(tmp_path_factory.mktemp("original") / "model", ROOT / "examples/model")


@pytest.fixture
def directory(original, tmp_path):
    """A copy of it, to be edited."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", [([1, 2], [3], [4])])


# ------------------------------------------------------------------------------- code in files


def run_of(directory: Path, *more) -> list:
    """The flags of a run on this model and pairs.jsonl, which lies beside it."""
    home = directory.parent
    files = ["--model", directory, "--data", home / "pairs.jsonl", "--out", home / "out"]
    return [*files, "--device cpu", *more]


PICKLES = "pytorch_model.bin training_args.bin optimizer.pt rng_state.pth consolidated.00.pth"
PICKLES += " model.pkl pytorch_model.bin.index.json"
MODULES = "modeling_llama.py configuration_llama.py tokenization_llama.py __init__.py setup.py"


def plant(directory: Path, sentinel: Path) -> None:
    """Everything that some loader somewhere would run, beside a model that is whole."""
    for name in PICKLES.split():
        (directory / name).write_bytes(pickle.dumps(Planted(sentinel)))
    for name in MODULES.split():
        (directory / name).write_text(f"open({str(sentinel)!r}, 'w')\n")
    template = f"cycler.__init__.__globals__.os.system('touch {sentinel}')"
    (directory / "chat_template.jinja").write_text("{{ " + template + " }}")
    classes = {"AutoModelForCausalLM": "modeling_llama.Llama"}
    classes |= {"AutoConfig": "configuration_llama.Config"}
    pipelines = {"text": {"impl": "modeling_llama.Llama"}}
    code = dict(auto_map=classes, trust_remote_code=True, custom_pipelines=pipelines)
    edit_json(directory / "config.json", **code)


def test_the_planted_pickle_and_code_do_run_if_they_are_loaded(directory, tmp_path):
    """So that the tests below can fail."""
    sentinel = tmp_path / "sentinel"
    plant(directory, sentinel)
    torch.save(Planted(sentinel), tmp_path / "saved.pt")
    for load in (
        lambda: pickle.loads((directory / "pytorch_model.bin").read_bytes()),
        lambda: torch.load(tmp_path / "saved.pt", weights_only=False),
        lambda: exec((directory / "modeling_llama.py").read_text()),
    ):
        load()
        sentinel.unlink()  # it must be there


def test_code_beside_a_model_neither_runs_nor_is_copied(directory, tmp_path, pairs):
    plant(directory, tmp_path / "sentinel")
    modules = set(sys.modules)
    assert main(*run_of(directory, "--max-steps 1")) == 0
    assert not (tmp_path / "sentinel").exists()
    assert not [name for name in set(sys.modules) - modules if "llama" in name.lower()]
    copied = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert not copied & {*PICKLES.split(), *MODULES.split()}
    assert "auto_map" not in read_json(tmp_path / "out/model/config.json")


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("by", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name, function, said",
    [
        ("model.safetensors", load_model, "not a safetensors file"),
        ("tokenizer.json", ChatFormat, "not a tokenizer"),
        ("config.json", LlamaConfig.load, "not JSON"),
        ("model.safetensors.index.json", load_model, "not JSON"),
    ],
)
def test_a_pickle_does_not_run(directory, tmp_path, name, function, said, by, protocol):
    """In the place of a file that is needed; the file is refused by name."""
    bomb, path = Planted(tmp_path / "sentinel"), directory / name
    if by == "pickle":
        path.write_bytes(pickle.dumps(bomb, protocol))
    else:
        torch.save(bomb, path, pickle_protocol=protocol or 2)
    message = refusal(function, directory)
    assert message.startswith(f"{path}: ") and said in message
    assert not (tmp_path / "sentinel").exists()


def test_a_model_of_pickles_is_refused_and_says_what_is_wanted(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    message = refusal(load_model, directory)
    assert message.startswith(f"{directory / 'model.safetensors'}: No such file")
    plant(directory, tmp_path / "sentinel")
    message = refusal(load_model, directory)
    assert message.startswith(f"{directory}: has pytorch_model.bin, a pickle, and no model.safeten")
    assert "save the model as safetensors" in message
    assert not (tmp_path / "sentinel").exists()


def test_an_adapter_beside_the_weights_is_refused(directory):
    (directory / "adapter_config.json").write_text("{}")
    for name in ("model.safetensors", "config.json"):  # also if there is nothing else
        assert "adapter_config.json: an adapter" in refusal(load_model, directory)
        (directory / name).unlink()


def test_a_pickle_as_data_or_as_a_cache_is_refused(directory, tmp_path, pairs, complaint, capsys):
    bomb, cache = pickle.dumps(Planted(tmp_path / "sentinel")), tmp_path / "cache"
    cache.write_bytes(bomb)
    said = complaint(*run_of(directory, "--loss dpo --reference-cache", cache))
    assert f"{cache}: truncated or not a safetensors file" in said
    pairs.write_bytes(bomb)
    assert main(*run_of(directory)) == 2
    assert f"{pairs}:1: not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "sentinel").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- lying headers


def norm(*args, **more):
    """The header of a file with one tensor."""
    return {NORM: entry(*args, **more)}


TWICE = b'{"%s": %s, "%s": %s}' % ((NORM.encode(), json.dumps(entry()).encode()) * 2)
FIELD_TWICE = json.dumps(norm()).replace('"dtype"', '"dtype": "I32", "dtype"').encode()
MANY = {f"{i:x}": entry((0,), (0, 0)) for i in range(7_500)}
# name: (what the message says, the header, the data behind it, the header's length if it lies);
# without a header the data is all of the file
HEADERS = {
    "a Git LFS pointer": ("a Git LFS pointer", None, b"version https://git-lfs.github.com/spec/v1"),
    "an empty file": ("not a safetensors file", None, b""),
    "a file of two bytes": ("not a safetensors file", None, b"\x10\x00"),
    "a web page": ("not a safetensors file", None, b"<html>Sign in</html>"),
    "longer than the file": ("header", norm(), bytes(128), 10**6),
    "2**63 bytes long": ("9,223,372,036,854,775,808 bytes", norm(), bytes(128), 2**63),
    "2**64 - 1 bytes long": ("18,446,744,073,709,551,615 bytes", norm(), bytes(128), 2**64 - 1),
    "of no bytes": ("", b"", bytes(128), 0),
    "overlapping": ("offset", norm() | {"b": entry(offsets=(64, 192))}, bytes(192)),
    "the same bytes twice": ("offset", norm() | {"b": entry()}),
    "beyond the file": ("not fully covered", norm(offsets=(0, 128)), bytes(64)),
    "far beyond the file": ("not fully covered", norm((2**40,), (0, 2**42))),
    "before the file": ("-128", norm(offsets=(-128, 0))),
    "backwards": ("offset", norm(offsets=(128, 0))),
    "a hole first": ("offset", norm(offsets=(128, 256)), bytes(256)),
    "a hole within": ("offset", norm() | {"b": entry(offsets=(192, 320))}, bytes(320)),
    "bytes to spare": ("not fully covered", norm(), bytes(129)),
    "an unknown dtype": ("F33", norm(dtype="F33")),
    "no dtype": ("dtype", {NORM: {"shape": [32], "data_offsets": [0, 128]}}),
    "a shape of other size": ("shape", norm((33,))),
    "a shape that overflows": ("overflow", norm((2**32, 2**32))),
    "a shape that overflows to the right size": ("overflow", norm((2**63 + 32, 2))),
    "a shape that overflows before it is 0": ("overflow", norm((2**40, 2**40, 0), (0, 0)), b""),
    "a negative shape": ("-32", norm((-32,))),
    "a fractional shape": ("32.0", norm((32.0,))),
    "a shape in words": ("32", norm(("32",))),
    "a shape of NaN": ("JSON", norm((float("nan"),))),
    "a key twice": (f"key '{NORM}' stands twice", TWICE),
    "a field twice": ("key 'dtype' stands twice", FIELD_TWICE),
    "not JSON": ("", b"hello, I am a header"),
    "not UTF-8": ("", b'{"\xff": 1}'),
    "not an object": ("", b"[]", b""),
    "deep lists": ("recursion", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": ("recursion", b'{"a": ' * 70_000 + b"1" + b"}" * 70_000),
    "100 MB of spaces": ("100,000,000 bytes", b"{" + b" " * 99_999_998 + b"}", b""),
    "100 MB of text": ("bytes", b'{"__metadata__": {"a": "' + b"x" * 99_999_900 + b'"}}', b""),
    "half a megabyte of lists": ("", b'{"a": [' + b"[]," * 174_000 + b"[]]}"),
    "half a megabyte of objects": ("", b'{"a": [' + b"{}," * 174_000 + b"{}]}"),
    "half a megabyte of tensors": ("missing", MANY, b""),
    "a key that is a terminal's command": ("", {"\x1b]0;a\n" + "x" * 9999: entry()}),
    "a shape of 170,000 axes": ("", norm((32,) + (1,) * 170_000)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_by_file_in_under_a_second_and_50_mb(directory, name):
    said, header, *rest = HEADERS[name]
    path = directory / "model.safetensors"
    if header is None:
        path.write_bytes(*rest)
    else:
        write_safetensors(path, header, *rest)
    config = LlamaConfig.load(directory)
    with cheaply():
        message = refusal(check_weights, directory, config)
    assert message.startswith((f"{path}: ", f"{directory}: key {EMBEDDING} is missing from"))
    assert said in message


def test_a_header_may_name_its_tensors_in_any_order(directory):
    """The format asks for no order, only that the bytes are all covered once."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = dict(reversed(json.loads(raw[8 : 8 + n]).items()))
    # Cloned, since load_file maps the file.
    expected = {key: tensor.clone() for key, tensor in load_file(path).items()}
    write_safetensors(path, header, raw[8 + n :])
    assert all(torch.equal(p, expected[key]) for key, p in load_model(directory).named_parameters())


def test_a_key_of_the_file_or_the_index_cannot_write_to_the_terminal(directory):
    path, key = directory / "model.safetensors", "\x1b]0;title\a\n" + "x" * 9999
    names = list(load_file(path))
    edit_tensors(path, {key: torch.zeros(1)})
    assert "\\x1b]0;title\\x07\\nxxx" in refusal(load_model, directory)
    weight_map = dict.fromkeys([*names, key + "y"], path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "\\x1b]0;title\\x07\\nxxx" in refusal(load_model, directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", NORM]
)
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(directory, tmp_path, key, value):
    path, model = directory / "model.safetensors", load_model(directory)

    def spoil(tensor):
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        return tensor

    edit_tensors(path, {key: spoil})
    assert refusal(load_model, directory) == f"{path}: key {key} holds a NaN or an infinity"
    spoil(dict(model.named_parameters())[key])
    for dtype in (torch.float32, torch.bfloat16):
        assert key in refusal(save_model, model, tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


def test_a_weight_that_only_bf16_cannot_hold_is_not_saved_as_infinity(tmp_path):
    model, largest = tiny_model(), torch.finfo(torch.float32).max
    with torch.no_grad():
        model.model["norm"].weight[3] = largest
    assert NORM in refusal(save_model, model, tmp_path / "saved")
    save_model(model, tmp_path / "saved", dtype=torch.float32)
    assert load_model(tmp_path / "saved").model["norm"].weight[3] == largest


# ------------------------------------------------------------------------------- config.json

# Each value alone is refused, as "key is value".
WRONG_VALUES = {
    "model_type": ["mistral", None, "y" * 10**5],
    "quantization_config": [{"load_in_8bit": True}],
    "hidden_act": ["gelu", ["silu"] * 40_000],
    **dict.fromkeys(["attention_bias", "mlp_bias"], [True]),
    "attention_dropout": [0.1],
    "partial_rotary_factor": [0.5],
    "sliding_window": [4096],
    "vocab_size": ["97", 97.0, -97, 10**12, "x\n" * 10**5],
    "hidden_size": [0, 2**24],
    "intermediate_size": [-48],
    "num_hidden_layers": [True, 10**9],
    "num_attention_heads": [4.0, 10**9],
    "num_key_value_heads": [[2]],
    "head_dim": [2**40, 2**23],
    "max_position_embeddings": [None, 10**4000],
    "rms_norm_eps": ["1e-5", float("nan")],
    "rope_theta": [float("inf"), -1.0],
    "tie_word_embeddings": ["yes", 1],
    "eos_token_id": ["<|eot_id|>", [1, True], [1.5], 10**30],
    "bos_token_id": [-1],
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
WRONG_ROPES = [
    ({"type": "linear", "factor": 2.0}, "rope type 'linear'"),
    ({"rope_type": "yarn", "factor": 2.0}, "rope type 'yarn'"),
    ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope type 'dynamic'"),
    ({"rope_type": None}, "rope type"),
    *[(text, "wanted an object") for text in ("linear", "llama3", "default", "\x1b[2J" * 10**4)],
    ({"factor": 8.0}, "rope type None"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    (LLAMA3 | {"factor": "8"}, "factor is '8'"),
    (LLAMA3 | {"factor": float("nan")}, "factor is nan"),
    (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor is 4.0, wanted less than"),
]
WRONG_SUMS = [
    ({"num_attention_heads": 5}, "hidden_size (32) is not a multiple of num_attention_heads (5)"),
    ({"hidden_size": 33}, "hidden_size (33) is not a multiple of num_attention_heads (4)"),
    ({"hidden_size": 2, "head_dim": None}, "hidden_size (2) is not a multiple"),
    ({"num_attention_heads": 32}, "head_dim (1)"),
    ({"head_dim": 7}, "head_dim (7)"),
    ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
    ({"num_key_value_heads": 8}, "num_key_value_heads (8)"),
    ({"num_hidden_layers": 10**9}, "wanted a positive whole number below 4,096"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_scaling differ"),
    ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 9.0}}, "rope_scaling differ"),
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}}, "type 'yarn'"),
    (
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": LLAMA3},
        "rope_scaling differ",
    ),
    (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default"}}
        | {"rope_theta": 5e5},
        "rope_scaling differ",
    ),
]

SHORT = json.dumps(RAW_CONFIG)[:-1]  # without its closing brace
ROPE_TWICE = '{"type": "default", "type": "linear"}'
HUGE = "more than 524,288 bytes"
# A file's content, or None without a file.
NO_CONFIGS = [
    (None, "No such file"),
    *[(raw, "not JSON") for raw in (b"", b"{not json", b"\xff\xfe\xff", b"[" * 100_000)],
    (b"[1, 2]", "model_type is [1, 2]"),
    (b"null", "model_type is None"),
    *[(f'{SHORT}, "vocab_size": {n}}}'.encode(), "stands twice") for n in (97, 98)],
    (f'{SHORT}, "\\u0076ocab_size": 98}}'.encode(), "stands twice"),
    (f'{SHORT}, "rope_scaling": {ROPE_TWICE}}}'.encode(), "stands twice"),
    *[(raw * 10**6, HUGE) for raw in (b"[", b"9", b"\xff")],
    (b'{"a": "' + b"x" * 10**8 + b'"}', HUGE),
    (b'{"vocab_size": ' + b"9" * 10**6, HUGE),
    # Just small enough to be parsed.
    *[(b"[" + item * 174_000 + b"1]", "model_type is [") for item in (b"[],", b"{},")],
    (b'{"model_type": [' + b"{}," * 174_000 + b"{}]}", "model_type is [{}, {}"),
    (b'{"model_type":"llama","hidden_act":"' + b"\\u0000" * 80_000 + b'"}', "hidden_act is"),
]


@pytest.mark.parametrize(
    "changes, said",
    [({key: x}, f"{key} is {ascii(x)[:50]}") for key, many in WRONG_VALUES.items() for x in many]
    + [({key: x}, said) for key in ("rope_scaling", "rope_parameters") for x, said in WRONG_ROPES]
    + WRONG_SUMS
    + NO_CONFIGS,
    ids=lambda value: str(value)[:50],
)
def test_a_config_that_is_no_llamas_is_refused_cheaply_in_a_short_line(tmp_path, changes, said):
    path, content = tmp_path / "config.json", changes
    if isinstance(changes, dict):
        content = json.dumps(RAW_CONFIG | changes).encode()
    if content is not None:
        path.write_bytes(content)
    with cheaply():
        message = refusal(LlamaConfig.load, tmp_path)
    assert message.startswith(f"{path}: ") and said in message


@pytest.mark.parametrize("key", RAW_CONFIG)
def test_a_config_without_a_size_is_refused_by_the_name_of_the_key(key):
    assert key in refusal(LlamaConfig.from_dict, {k: v for k, v in RAW_CONFIG.items() if k != key})


@pytest.mark.parametrize(
    "changes, size",
    [({}, 8), ({"num_attention_heads": 5, "head_dim": 6}, 6), ({"num_attention_heads": 16}, 2)],
)
def test_heads_need_not_divide_the_width_if_head_dim_says_their_size(changes, size):
    assert LlamaConfig.from_dict(RAW_CONFIG | changes).head_dim == size


def test_values_nested_as_deep_as_can_be_parsed_are_refused_in_one_line(tmp_path):
    for depth in range(850, 1000):
        text = f'{SHORT}, "head_dim": {"[" * depth}{"]" * depth}}}'
        (tmp_path / "config.json").write_text(text)
        message = refusal(LlamaConfig.load, tmp_path)
        assert "head_dim is " in message or "not JSON" in message


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.text() | st.integers() | st.floats() | st.none(), st.lists, max_leaves=9))
def test_a_value_is_shown_in_at_most_60_printable_characters(value):
    assert shown(value).isprintable() and len(shown(value)) <= 60


# ---------------------------------------------------------------------- the index, and links

ELSEWHERE = ["../model.safetensors", "/etc/passwd", "a/../model.safetensors", "a/x.safetensors"]
ELSEWHERE += ["..\\model.safetensors", "~", ".", "..", ""]
NO_NAMES = ["pytorch_model.bin", "config.json", "model.safetensors\0", "a\nb.safetensors"]
NO_NAMES += ["\x1b[2J.safetensors", "x" * 10**5 + ".safetensors", ".safetensors"]
NO_NAMES += ["\ud83d.safetensors", "CON:.safetensors"]
NO_MAPS = [f'{{"weight_map": {x}}}' for x in ("{}", '{"a": 1}', '["model.safetensors"]')]
KEY_TWICE = '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}'


@pytest.mark.parametrize(
    "content, said",
    [
        (json.dumps({"weight_map": {NORM: name}}), f"key '{NORM}' lies in {shown(name)}, wanted")
        for name in ELSEWHERE + NO_NAMES
    ]
    + [(text, "wanted a weight_map") for text in ("{}", "[]", *NO_MAPS)]
    + [("{", "not JSON"), (KEY_TWICE, "not JSON (key 'a' stands twice in one object)")],
    ids=lambda value: ascii(value)[:60],
)
def test_an_index_names_only_safetensors_files_of_its_own_directory(directory, content, said):
    index = directory / "model.safetensors.index.json"
    index.write_text(content)
    (directory / "model.safetensors").unlink()
    assert refusal(load_model, directory).startswith(f"{index}: {said}")


def test_a_file_may_be_a_link_as_in_hugging_faces_cache(directory, tmp_path):
    """The index may name no place outside; whoever made the directory on this disk may."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, path in enumerate(sorted(directory.iterdir())):
        shutil.move(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../blobs/{i}")
    assert load_model(snapshot).config == tiny_config() and ChatFormat(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("config.json")
    assert "config.json: " in refusal(load_model, snapshot)  # a link to itself


# ------------------------------------------------------------------------------ tokenizer.json

TOKENIZER = (ROOT / "examples/model/tokenizer.json").read_bytes()
VERSION, PREFIX = b'"version": "1.0"', b'"continuing_subword_prefix": null'


@pytest.mark.parametrize(
    "content, said",
    [
        (b" " * (2**25 + 1), "more than 33,554,432 bytes"),
        (b"[" * 10**6, "recursion"),
        (b"9" * 10**6, "limit (4300 digits)" if sys.version_info >= (3, 11) else "limit (4300)"),
        (TOKENIZER.rstrip()[:-1] + b', "model": {}}', "key 'model' stands twice"),
        (TOKENIZER[: len(TOKENIZER) // 2], ""),
        # With these, tokenizers 0.23 panics, which `except Exception` does not catch, or aborts.
        *[(TOKENIZER.replace(PREFIX, PREFIX[:-4] + x), "wanted null") for x in (b'"x"', b'"##"')],
        (TOKENIZER.replace(VERSION, VERSION[:-4] + b'\\u001b[2J%s"' % (b"x" * 10**5)), ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tokenizer_that_is_not_one_or_would_crash_is_refused(tmp_path, content, said):
    assert content != TOKENIZER
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = refusal(ChatFormat, tmp_path)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: ") and said in message


# ---------------------------------------------------------------------------------- data files


def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**24)) * 10)
    with cheaply():
        message = refusal(read_preferences, path)
    assert message.startswith(f"{path}: unpacks to over ") and path.stat().st_size < 2e5
    # A hundred times too, but to 600 KB.
    path.write_bytes(gzip.compress(f"{GOOD}\n".encode() * 10_000))
    assert path.stat().st_size * 100 < 6e5 and len(read_preferences(path)) == 10_000


READERS = [(LlamaConfig.load, "config.json"), (ChatFormat, "tokenizer.json")]
READERS += [(load_model, name) for name in ("model.safetensors", "model.safetensors.index.json")]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("read, name", [*READERS, (read_preferences, "a.jsonl")])
def test_a_pipe_or_a_directory_is_refused_and_not_waited_for(directory, read, name, make):
    path, said = directory / name, queue.Queue()
    path.unlink(missing_ok=True)
    make(path)
    place = path if name == "a.jsonl" else directory
    reader = threading.Thread(target=lambda: said.put(refusal(read, place)), daemon=True)
    reader.start()
    wanted = f"{path}: a directory, a pipe or a device; wanted "
    assert said.get(timeout=10).startswith(wanted)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("read, name", [*READERS[:3], (read_preferences, "a.jsonl")])
def test_a_file_that_may_not_be_read_is_refused(directory, read, name):
    path = directory / name
    (directory / "a.jsonl").write_text(GOOD)
    path.chmod(0)
    message = refusal(read, path if name == "a.jsonl" else directory)
    assert message.startswith(f"{path}: Permission denied")


@pytest.mark.parametrize("read", [read_preferences, files.read_json])
def test_a_read_error_midway_is_refused_naming_the_file(directory, monkeypatch, read):
    """A disk that fails, or a file that vanishes on a network: told by the error's own words."""
    broken = mock.mock_open()
    broken.return_value.read.side_effect = OSError(5, "Input/output error")
    monkeypatch.setattr("builtins.open", broken)
    path = directory / "config.json"
    assert refusal(read, path).startswith(f"{path}: Input/output error; wanted ")


EQUAL_ANSWERS = b'{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}\n' * 5
FIVE_EQUAL = "5 read, 0 kept, 0 of them truncated; dropped: 0 bad lines, 0 unequal prompts, 0 empty"


@pytest.mark.parametrize(
    "content, said",
    [(raw, "0 read") for raw in (b"", b"\n\n", gzip.compress(b"", mtime=0), b"[]", b"\xef\xbb\xbf")]
    + [(EQUAL_ANSWERS, f"{FIVE_EQUAL}, 0 overlong, 5 identical")],
)
def test_a_file_without_a_pair_stops_the_run(directory, pairs, complaint, content, said):
    pairs.write_bytes(content)
    assert f"{pairs}: no pair left to use ({said}" in complaint(*run_of(directory))
    assert not (directory.parent / "out").exists()


def test_a_data_file_may_vanish_once_training_has_begun(directory, pairs, monkeypatch):
    """It is read whole before the first step."""

    def vanish(*args, inner=train.train):
        pairs.unlink()
        inner(*args)

    monkeypatch.setattr(train, "train", vanish)
    assert main(*run_of(directory, "--max-steps 2")) == 0
    assert load_model(directory.parent / "out/model")


def test_a_null_byte_in_a_files_name_is_refused():
    """It can only come from a config.json that was edited."""
    assert refusal(files.read_start, Path("no\0pe"), 1, "pairs").startswith(r"'no\x00pe': a null")
