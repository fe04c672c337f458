"""What is read may be made to harm: nothing of it runs, nothing of the size that it claims is made, and the complaint
is one line that names the file.

Oracles: a file that the planted code would make, the process's own peak memory, and headers written by hand.
"""

import gc
import gzip
import json
import os
import pickle
import queue
import shutil
import struct
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train
from data import ChatFormat, read_preferences
from model import LlamaConfig, check_weights, load_model, save_model
from support.files import InputError, read_json, shown

GOOD = '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}'


def refusal(function, *args) -> str:
    """The message of the InputError that the call raises: one short printable line."""
    with pytest.raises(InputError) as caught:
        function(*args)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


def memory(name: str) -> int:
    return next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name)
    )


@contextmanager
def cheaply():
    """The block takes under a second of the processor and 50 MB more than the process had."""
    linux = Path("/proc/self/clear_refs").exists()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    gc.freeze()  # else what is timed is the collector's walk over all that pytest and transformers hold
    before, started = memory("VmRSS") if linux else 0, time.process_time()
    yield
    gc.unfreeze()
    seconds, used = time.process_time() - started, memory("VmHWM") - before if linux else 0
    assert seconds < 1 and used < 50e6, f"{seconds:.2f} s, {used / 1e6:.0f} MB"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A tiny model with the example's tokenizer beside it."""
    save_model(
        tiny_model(), tmp_path / "model", dtype=torch.float32, source=ROOT / "examples" / "model"
    )
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------------ code in files


class Planted:
    """Unpickled, it runs a command."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def start(directory: Path, out: Path, *more) -> int:
    return train.main(
        [
            str(word)
            for word in (
                "--model",
                directory,
                "--data",
                directory.parent / "pairs.jsonl",
                "--out",
                out,
                "--device",
                "cpu",
                *more,
            )
        ]
    )


def plant(directory: Path, sentinel: Path) -> None:
    """Everything that some loader somewhere would run, beside a model that is whole."""
    bomb = pickle.dumps(Planted(sentinel))
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "consolidated.00.pth",
        "model.pkl",
        "pytorch_model.bin.index.json",
    ):
        (directory / name).write_bytes(bomb)
    for name in (
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
        "__init__.py",
        "setup.py",
    ):
        (directory / name).write_text(f"open({str(sentinel)!r}, 'w')\n")
    template = f"cycler.__init__.__globals__.os.system('touch {sentinel}')"
    (directory / "chat_template.jinja").write_text("{{ " + template + " }}")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {
        "auto_map": {
            "AutoModelForCausalLM": "modeling_llama.Llama",
            "AutoConfig": "configuration_llama.Config",
        },
        "trust_remote_code": True,
        "custom_pipelines": {"text": {"impl": "modeling_llama.Llama"}},
    }
    (directory / "config.json").write_text(json.dumps(raw))


def test_the_planted_pickle_and_code_do_run_where_they_are_loaded(directory, tmp_path):
    """So that the tests below can fail."""
    plant(directory, tmp_path / "sentinel")
    torch.save(Planted(tmp_path / "sentinel"), tmp_path / "saved.pt")
    for load in (
        lambda: pickle.loads((directory / "pytorch_model.bin").read_bytes()),
        lambda: torch.load(tmp_path / "saved.pt", weights_only=False),
        lambda: exec((directory / "modeling_llama.py").read_text()),
    ):
        load()
        assert (tmp_path / "sentinel").exists()
        (tmp_path / "sentinel").unlink()


def test_code_beside_a_model_never_runs_and_is_not_copied_into_the_trained_one(directory, tmp_path):
    plant(directory, tmp_path / "sentinel")
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}\n'
    )
    modules = set(sys.modules)
    assert start(directory, tmp_path / "out", "--max-steps", 1) == 0
    assert not (tmp_path / "sentinel").exists()
    assert not [name for name in set(sys.modules) - modules if "llama" in name.lower()]
    copied = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert not {name for name in copied if name.endswith((".py", ".bin", ".pt", ".pth", ".pkl"))}
    assert "auto_map" not in json.loads((tmp_path / "out" / "model" / "config.json").read_text())


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("stored", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name, function, said",
    [
        ("model.safetensors", load_model, "not a safetensors file"),
        ("tokenizer.json", ChatFormat, "not a tokenizer"),
        ("config.json", LlamaConfig.load, "not JSON"),
        ("model.safetensors.index.json", load_model, "not JSON"),
    ],
)
def test_a_pickle_in_the_place_of_a_needed_file_does_not_run_and_is_refused(
    directory, tmp_path, name, function, said, stored, protocol
):
    if stored == "pickle":
        (directory / name).write_bytes(pickle.dumps(Planted(tmp_path / "sentinel"), protocol))
    else:
        torch.save(Planted(tmp_path / "sentinel"), directory / name, pickle_protocol=protocol or 2)
    message = refusal(function, directory)
    assert message.startswith(f"{directory / name}: ") and said in message
    assert not (tmp_path / "sentinel").exists()


def test_pickles_alone_are_no_model_and_the_complaint_names_the_file_that_is_wanted(
    directory, tmp_path
):
    (directory / "model.safetensors").unlink()
    plant(directory, tmp_path / "sentinel")
    message = refusal(load_model, directory)
    assert (
        message.startswith(f"{directory / 'model.safetensors'}: No such file")
        and "safetensors" in message
    )
    assert not (tmp_path / "sentinel").exists()


def test_a_pickle_as_data_or_as_a_cache_of_reference_log_probs_does_not_run_and_is_refused(
    directory, tmp_path, capsys
):
    bomb = pickle.dumps(Planted(tmp_path / "sentinel"))
    (tmp_path / "pairs.jsonl").write_bytes(bomb)
    assert start(directory, tmp_path / "out") == 2
    assert f"{tmp_path / 'pairs.jsonl'}:1: not UTF-8" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}\n'
    )
    (tmp_path / "cache").write_bytes(bomb)
    assert (
        start(directory, tmp_path / "out", "--loss", "dpo", "--reference-cache", tmp_path / "cache")
        == 2
    )
    error = capsys.readouterr().err
    assert (
        f"{tmp_path / 'cache'}: truncated or not a safetensors file" in error
        and error.count("\n") == 1
    )
    assert not (tmp_path / "sentinel").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- lying headers

NORM = "model.norm.weight"


def entry(shape=(32,), offsets=(0, 128), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def written(
    path: Path, header: dict | bytes, data: bytes = bytes(128), length: int | None = None
) -> Path:
    """A safetensors file by hand."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


HEADERS = {
    "longer than the file": (dict(header={NORM: entry()}, length=10**6), "header"),
    "2**63 bytes long": (
        dict(header={NORM: entry()}, length=2**63),
        "9,223,372,036,854,775,808 bytes",
    ),
    "2**64 - 1 bytes long": (
        dict(header={NORM: entry()}, length=2**64 - 1),
        "18,446,744,073,709,551,615 bytes",
    ),
    "of no bytes": (dict(header=b"", length=0), ""),
    "overlapping": (
        dict(header={NORM: entry(), "b": entry(offsets=(64, 192))}, data=bytes(192)),
        "offset",
    ),
    "the same bytes twice": (dict(header={NORM: entry(), "b": entry()}), "offset"),
    "beyond the file": (
        dict(header={NORM: entry(offsets=(0, 128))}, data=bytes(64)),
        "not fully covered",
    ),
    "far beyond the file": (dict(header={NORM: entry((2**40,), (0, 2**42))}), "not fully covered"),
    "before the file": (dict(header={NORM: entry(offsets=(-128, 0))}), "-128"),
    "backwards": (dict(header={NORM: entry(offsets=(128, 0))}), "offset"),
    "a hole first": (dict(header={NORM: entry(offsets=(128, 256))}, data=bytes(256)), "offset"),
    "a hole within": (
        dict(header={NORM: entry(), "b": entry(offsets=(192, 320))}, data=bytes(320)),
        "offset",
    ),
    "bytes to spare": (dict(header={NORM: entry()}, data=bytes(129)), "not fully covered"),
    "an unknown dtype": (dict(header={NORM: entry(dtype="F33")}), "F33"),
    "no dtype": (dict(header={NORM: {"shape": [32], "data_offsets": [0, 128]}}), "dtype"),
    "a shape of other size": (dict(header={NORM: entry((33,))}), "shape"),
    "a shape that overflows": (dict(header={NORM: entry((2**32, 2**32))}), "overflow"),
    "a shape that overflows to the right size": (
        dict(header={NORM: entry((2**63 + 32, 2))}),
        "overflow",
    ),
    "a shape that overflows before it is 0": (
        dict(header={NORM: entry((2**40, 2**40, 0), (0, 0))}, data=b""),
        "overflow",
    ),
    "a negative shape": (dict(header={NORM: entry((-32,))}), "-32"),
    "a fractional shape": (dict(header={NORM: entry((32.0,))}), "32.0"),
    "a shape in words": (dict(header={NORM: entry(("32",))}), "32"),
    "a shape of NaN": (dict(header={NORM: entry((float("nan"),))}), "JSON"),
    "a key twice": (
        dict(header=b'{"%s": %s, "%s": %s}' % ((NORM.encode(), json.dumps(entry()).encode()) * 2)),
        f"key '{NORM}' stands twice",
    ),
    "a field twice": (
        dict(
            header=b'{"%s": {"dtype": "F32", "dtype": "I32", "shape": [32], "data_offsets": [0, 128]}}'
            % NORM.encode()
        ),
        "key 'dtype' stands twice",
    ),
    "not JSON": (dict(header=b"hello, I am a header"), ""),
    "not UTF-8": (dict(header=b'{"\xff": 1}'), ""),
    "not an object": (dict(header=b"[]", data=b""), ""),
    "deep lists": (dict(header=b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "recursion"),
    "deep objects": (dict(header=b'{"a": ' * 70_000 + b"1" + b"}" * 70_000), "recursion"),
    "100 MB of spaces": (
        dict(header=b"{" + b" " * 99_999_998 + b"}", data=b""),
        "100,000,000 bytes",
    ),
    "100 MB of metadata": (
        dict(header=b'{"__metadata__": {"a": "' + b"x" * 99_999_900 + b'"}}', data=b""),
        "bytes",
    ),
    "half a megabyte of lists": (dict(header=b'{"a": [' + b"[]," * 174_000 + b"[]]}"), ""),
    "half a megabyte of objects": (dict(header=b'{"a": [' + b"{}," * 174_000 + b"{}]}"), ""),
    "half a megabyte of tensors": (
        dict(header={f"{i:x}": entry((0,), (0, 0)) for i in range(7_500)}, data=b""),
        "model.layers of 0",
    ),
    "a key that is a terminal's command": (dict(header={"\x1b]0;a\n" + "x" * 9999: entry()}), ""),
    "a shape of 170,000 axes": (dict(header={NORM: entry((32,) + (1,) * 170_000)}), ""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_by_file_in_under_a_second_and_50_mb(directory, name):
    how, said = HEADERS[name]
    path = written(directory / "model.safetensors", **how)
    del how
    config = LlamaConfig.load(directory)
    with cheaply():
        message = refusal(check_weights, directory, config)
    assert message.startswith(str(directory)) and said in message
    assert message.startswith(f"{path}: ") or message.endswith("model.layers of 0")


def test_a_header_may_name_its_tensors_in_any_order(directory):
    """The format asks for no order, only that the bytes are all covered once."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = dict(reversed(json.loads(raw[8 : 8 + n]).items()))
    expected = {
        key: tensor.clone() for key, tensor in load_file(path).items()
    }  # which maps the file
    written(path, header, raw[8 + n :])
    assert all(torch.equal(p, expected[key]) for key, p in load_model(directory).named_parameters())


def test_a_key_of_the_file_or_the_index_cannot_write_to_the_terminal(directory):
    path, key = directory / "model.safetensors", "\x1b]0;title\a\n" + "x" * 9999
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | {key: torch.zeros(1)}, path)
    assert "\\x1b]0;title\\x07\\nxxx" in refusal(load_model, directory)
    weight_map = {name: path.name for name in [*tensors, key + "y"]}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "\\x1b]0;title\\x07\\nxxx" in refusal(load_model, directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", NORM]
)
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(directory, tmp_path, key, value):
    path = directory / "model.safetensors"
    model = load_model(directory)
    tensors = load_file(path)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, path)
    assert refusal(load_model, directory) == f"{path}: key {key} holds a NaN or an infinity"
    with torch.no_grad():
        dict(model.named_parameters())[key].view(-1)[-1] = value
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(InputError, match=key):
            save_model(model, tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


def test_a_weight_that_only_bf16_cannot_hold_is_not_saved_as_infinity(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model["norm"].weight[3] = torch.finfo(torch.float32).max
    with pytest.raises(InputError, match=NORM):
        save_model(model, tmp_path / "saved")
    save_model(model, tmp_path / "saved", dtype=torch.float32)
    assert load_model(tmp_path / "saved").model["norm"].weight[3] == torch.finfo(torch.float32).max


# ---------------------------------------------------------------------------------------------- config.json and index

RAW = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers is 1000000000, wanted a positive whole number below 4,096",
        ),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_size": 2**24}, "hidden_size is 16777216"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
        ({"vocab_size": 97.0}, "vocab_size is 97.0"),
        ({"max_position_embeddings": 10**4000}, "max_position_embeddings is 1000"),
        (
            {"num_attention_heads": 5},
            "hidden_size (32) is not a multiple of num_attention_heads (5)",
        ),
        ({"hidden_size": 33}, "hidden_size (33) is not a multiple of num_attention_heads (4)"),
        ({"hidden_size": 2}, "hidden_size (2) is not a multiple of num_attention_heads (4)"),
        ({"hidden_size": 2, "head_dim": None}, "hidden_size (2) is not a multiple"),
        ({"num_attention_heads": 32}, "head_dim (1)"),
        ({"num_key_value_heads": 8}, "num_key_value_heads (8)"),
        ({"vocab_size": -97}, "vocab_size is -97"),
        ({"vocab_size": "x\n" * 10**5}, "vocab_size is 'x\\nx"),
        ({"hidden_act": ["silu"] * 40_000}, "hidden_act is ['silu', "),
        ({"model_type": "y" * 10**5}, "model_type is 'yyy"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (
            {"rope_scaling": SCALED | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4.0, wanted less than",
        ),
        ({"rope_scaling": SCALED | {"factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": "\x1b[2J" * 10**4}, "rope type"),
        ({"eos_token_id": 10**30}, "eos_token_id is 1000"),
        ({"eos_token_id": [1.5]}, "eos_token_id is [1.5]"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_sizes_that_no_llama_has_and_values_of_a_megabyte_are_refused_in_a_short_line(
    tmp_path, changes, said
):
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes))
    with cheaply():
        message = refusal(LlamaConfig.load, tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and said in message


@pytest.mark.parametrize(
    "changes, counted",
    [({}, 8), ({"num_attention_heads": 5, "head_dim": 6}, 6), ({"num_attention_heads": 16}, 2)],
)
def test_heads_that_do_not_divide_the_width_are_a_model_where_head_dim_says_their_size(
    changes, counted
):
    assert LlamaConfig.from_dict(RAW | changes).head_dim == counted


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (
            dict.fromkeys(
                ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), 2**23
            ),
            "head_dim is 8388608",
        ),
    ],
)
def test_simulating_absurd_sizes_is_refused_though_no_weights_contradict_them(
    tmp_path, capsys, changes, said
):
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes))
    with cheaply():
        assert train.main(["--plan", "8", "--model", str(tmp_path), "--data", "pairs.jsonl"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(RAW)[:-1] + ', "vocab_size": 98}',
        json.dumps(RAW)[:-1] + ', "vocab_size": 97}',
        json.dumps(RAW)[:-1] + ', "rope_scaling": {"type": "default", "type": "linear"}}',
        json.dumps(RAW)[:-1] + ', "\\u0076ocab_size": 98}',
    ],
)
def test_a_key_that_stands_twice_in_config_json_is_refused(tmp_path, raw):
    (tmp_path / "config.json").write_text(raw)
    message = refusal(LlamaConfig.load, tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "stands twice" in message


def test_a_key_that_stands_twice_in_the_index_is_refused(directory):
    index = directory / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "a": "two.safetensors"}}'
    )
    assert (
        refusal(load_model, directory) == f"{index}: not JSON (key 'a' stands twice in one object)"
    )


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": "' + b"x" * 10**8 + b'"}',
        b"[" + b"[]," * 174_000 + b"[]]",
        b"[" * 10**6,
        b"[" + b"{}," * 174_000 + b"{}]",
        b'{"model_type": [' + b"{}," * 174_000 + b"{}]}",
        b"9" * 10**6,
        b"\xff" * 10**6,
        b'{"vocab_size": ' + b"9" * 10**6,
        b'{"model_type":"llama","hidden_act":"' + b"\\u0000" * 80_000 + b'"}',
    ],
    ids=lambda raw: str(raw[:40]),
)
def test_a_json_file_that_is_huge_or_deep_is_refused_in_under_a_second_and_50_mb(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    size = len(content)
    del content
    with cheaply():
        message = refusal(LlamaConfig.load, tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert size < 2**19 or "more than 524,288 bytes" in message


def test_values_nested_as_deep_as_can_be_parsed_are_refused_in_one_line(tmp_path):
    for depth in range(850, 1000):
        (tmp_path / "config.json").write_text(
            json.dumps(RAW)[:-1] + f', "head_dim": {"[" * depth}{"]" * depth}}}'
        )
        message = refusal(LlamaConfig.load, tmp_path)
        assert "head_dim is " in message or "not JSON" in message


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../model.safetensors",
        "..\\model.safetensors",
        "pytorch_model.bin",
        "config.json",
        "model.safetensors\0",
        "a\nb.safetensors",
        "\x1b[2J.safetensors",
        "x" * 10**5 + ".safetensors",
        ".safetensors",
        "\ud83d.safetensors",
        "~",
        "CON:.safetensors",
    ],
)
def test_an_index_names_safetensors_files_of_its_own_directory_and_nothing_else(directory, name):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    message = refusal(load_model, directory)
    assert (
        message.startswith(f"{index}: key '{NORM}' lies in ") and "in the same directory" in message
    )


def test_a_file_may_be_a_link_as_in_hugging_faces_cache(directory, tmp_path):
    """The index may name no place outside; whoever made the directory on this disk may."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for i, path in enumerate(sorted(directory.iterdir())):
        shutil.move(path, tmp_path / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../blobs/{i}")
    assert load_model(snapshot).config == tiny_config() and ChatFormat(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("config.json")
    assert "config.json: " in refusal(load_model, snapshot)  # a link to itself


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.text() | st.integers() | st.floats() | st.none(), st.lists, max_leaves=9))
def test_a_value_is_shown_in_at_most_60_printable_characters(value):
    assert shown(value).isprintable() and len(shown(value)) <= 60


# ------------------------------------------------------------------------------------------------------ tokenizer.json

TOKENIZER = (ROOT / "examples" / "model" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "content, said",
    [
        (b" " * (2**25 + 1), "more than 33,554,432 bytes"),
        (b"[" * 10**6, "recursion"),
        (b"9" * 10**6, "4300 digits"),
        (TOKENIZER.rstrip()[:-1] + b', "model": {}}', "key 'model' stands twice"),
        (TOKENIZER[: len(TOKENIZER) // 2], ""),
        # Of these tokenizers 0.23 panics, which no `except Exception` catches, and at some the process is aborted.
        (
            TOKENIZER.replace(
                b'"continuing_subword_prefix": null', b'"continuing_subword_prefix": "x"'
            ),
            "wanted null",
        ),
        (
            TOKENIZER.replace(
                b'"continuing_subword_prefix": null', b'"continuing_subword_prefix": "##"'
            ),
            "wanted null",
        ),
        (TOKENIZER.replace(b'"version": "1.0"', b'"version": "\\u001b[2J%s"' % (b"x" * 10**5)), ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tokenizer_that_is_none_or_would_crash_is_refused_in_one_short_line(
    tmp_path, content, said
):
    assert content != TOKENIZER
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = refusal(ChatFormat, tmp_path)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: ") and said in message


# --------------------------------------------------------------------------------------------------------- data files


def test_a_key_that_stands_twice_in_a_record_is_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    twice = '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "chosen": "Go away"}'
    path.write_text(f"{GOOD}\n{twice}\n")
    with pytest.raises(
        InputError,
        match=f"^{path}:2: not JSON: key 'chosen' stands twice in one object\n1 bad of 2",
    ):
        read_preferences(path)
    path.write_text(f"[{GOOD},\n{twice}]")
    assert refusal(read_preferences, path).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-32"]
)  # what `>` writes in Windows PowerShell, and its cousin
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_in_utf_16_is_called_so_in_one_line(tmp_path, encoding, pack):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(f"{GOOD}\r\n{GOOD}\r\n".encode(encoding)))
    assert refusal(read_preferences, path) == f"{path}: UTF-16, wanted UTF-8"
    path.write_bytes(f"{GOOD}\n".encode("utf-16-be"))  # without a mark there are only bytes
    with pytest.raises(InputError, match=f"^{path}:1: "):
        read_preferences(path)


def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(2**24)) * 10)
    with cheaply():
        message = refusal(read_preferences, path)
    assert message.startswith(f"{path}: unpacks to over ") and path.stat().st_size < 2e5
    path.write_bytes(
        gzip.compress(f"{GOOD}\n".encode() * 10_000)
    )  # a hundred times too, but of 600 KB
    assert path.stat().st_size * 100 < 6e5 and len(read_preferences(path)) == 10_000


@pytest.mark.parametrize(
    "read, name",
    [
        (read_preferences, "a.jsonl"),
        (LlamaConfig.load, "config.json"),
        (ChatFormat, "tokenizer.json"),
        (load_model, "model.safetensors"),
        (load_model, "model.safetensors.index.json"),
    ],
)
def test_a_pipe_or_a_directory_in_the_place_of_a_file_is_refused_and_not_waited_for(
    directory, read, name
):
    path = directory / name
    for make in (os.mkfifo, os.mkdir):
        if path.exists():
            path.unlink()
        make(path)
        said = queue.Queue()
        place = path if name == "a.jsonl" else directory
        threading.Thread(
            target=lambda place, said: said.put(refusal(read, place)),
            args=(place, said),
            daemon=True,
        ).start()
        assert said.get(timeout=10).startswith(f"{path}: a directory, a pipe or a device; wanted ")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["a.jsonl", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_refused(directory, name):
    (directory / "a.jsonl").write_text(GOOD)
    (directory / name).chmod(0)
    read = {"a.jsonl": read_preferences, "tokenizer.json": ChatFormat}.get(name, load_model)
    assert refusal(read, directory / name if name == "a.jsonl" else directory).startswith(
        f"{directory / name}: Permission denied"
    )


def test_a_read_error_midway_is_refused_naming_the_file(directory, monkeypatch):
    """A disk that fails, or a file that vanishes on a network: told by the error's own words."""

    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def read(self, size):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Broken())
    for read, path in (
        (read_preferences, directory / "config.json"),
        (read_json, directory / "config.json"),
    ):
        assert refusal(read, path).startswith(f"{path}: Input/output error; wanted ")


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b""), b"[]", b"\xef\xbb\xbf"])
def test_a_file_without_a_record_stops_the_run_in_one_line(directory, tmp_path, capsys, content):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    assert start(directory, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        f"{tmp_path / 'pairs.jsonl'}: no pair left to use (0 read" in error
        and error.count("\n") == 1
    )


def test_a_data_file_may_vanish_once_training_has_begun(directory, tmp_path, monkeypatch):
    """It is read whole before the first step."""
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}\n'
    )
    train_for_real = train.train

    def vanish(*args):
        (tmp_path / "pairs.jsonl").unlink()
        train_for_real(*args)

    monkeypatch.setattr(train, "train", vanish)
    assert start(directory, tmp_path / "out", "--max-steps", 2) == 0 and load_model(
        tmp_path / "out" / "model"
    )
