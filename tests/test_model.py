"""The model: config.json, rotary positions, attention over packed pairs, the head, loading and saving.

Oracles: transformers, complex rotation, dense masked softmax in float64, padded sequences through the portable
`asft.response_logps`, the golden frequencies of Llama 3.1 and the greedy text of a model that others trained.
"""

import json
import math
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import LLAMA31, REAL, needs_real, random_pairs, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import model
from asft import response_logps
from data import pack
from model import (
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    Segments,
    load_model,
    save_model,
    target_logps,
)
from support.files import InputError

# Prompt, chosen and rejected tokens: ragged, with one-token prompts and one-token responses.
LENGTHS = [(5, 3, 7), (1, 4, 2), (9, 1, 1), (6, 8, 1), (1, 1, 5)]
VARIANTS = {
    "grouped, untied": {},
    "one key head for each query head, tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "one key head for all, scaled rope": dict(num_key_value_heads=1, rope_scaling=LLAMA31),
    "head_dim is not D/H, tied, scaled rope": dict(
        head_dim=16, tie_word_embeddings=True, rope_scaling=LLAMA31
    ),
    "other theta and eps, three layers": dict(
        rope_theta=10_000.0, rms_norm_eps=1e-2, num_hidden_layers=3
    ),
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
TOKENS = torch.randint(
    97, (100,), generator=torch.Generator().manual_seed(5)
)  # beyond the 64 of LLAMA31's original


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost products this small more than they bring: several times the whole file's time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refusal(function, *args, **options) -> str:
    """The message of the InputError that the call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- config.json

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
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA2 = dict(
    vocab_size=32000, num_key_value_heads=32, rope_theta=10_000.0, bos_token_id=1, eos_token_id=(2,)
)
LLAMA3 = dict(vocab_size=128256, bos_token_id=128000)
EVERY_RELEASE = {
    "llama2-7b": dict(
        **LLAMA2, hidden_size=4096, num_hidden_layers=32, head_dim=128, max_position_embeddings=2048
    ),
    "llama3-8b-finetune": dict(
        **LLAMA3, hidden_size=4096, num_key_value_heads=8, head_dim=128, eos_token_id=(128001,)
    ),
    "llama3-8b-instruct": dict(
        **LLAMA3,
        num_hidden_layers=32,
        intermediate_size=14336,
        rope_theta=500_000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        eos_token_id=(128009,),
    ),
    "llama3.1-8b-merge": dict(
        **LLAMA3,
        eos_token_id=(128001, 128008, 128009),
        max_position_embeddings=131072,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
    "llama3.2-1b": dict(
        **LLAMA3,
        num_hidden_layers=16,
        head_dim=64,
        tie_word_embeddings=True,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama3.2-3b-shard": dict(
        **LLAMA3,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    ),
}


def test_the_config_of_transformers_4_and_of_5_is_the_same_config():
    common = RAW | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "pretraining_tp": 1,
    }
    old = common | {
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "rope_scaling": SCALED | {"rope_type": "llama3"},
    }
    new = common | {
        "dtype": "bfloat16",
        "rope_parameters": SCALED | {"rope_type": "llama3", "rope_theta": 500000.0},
    }
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    expected = LlamaConfig(97, 32, 48, 2, 4, 2, 16, 256, 1e-5, 500000.0, scaling, True, 0, (1, 2))
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new) == expected
    old["rope_scaling"] = SCALED | {"type": "llama3"}  # the key's name before transformers 4.43
    assert LlamaConfig.from_dict(old) == expected


def test_plain_rope_of_transformers_4_and_of_5_is_the_same_config():
    old = RAW | {"rope_theta": 250000.0, "rope_scaling": None}
    new = RAW | {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new)
    assert (LlamaConfig.from_dict(new).rope_theta, LlamaConfig.from_dict(new).rope_scaling) == (
        250000.0,
        None,
    )
    for other in (
        None,
        500000.0,
    ):  # where both are there, transformers 5 takes rope_parameters' too
        assert LlamaConfig.from_dict(new | {"rope_theta": other}) == LlamaConfig.from_dict(new)
    assert (
        LlamaConfig.from_dict(old | {"rope_parameters": {"rope_theta": None}}).rope_theta
        == 250000.0
    )


def test_missing_keys_mean_what_they_mean_to_transformers():
    ours, theirs = LlamaConfig.from_dict(RAW), transformers.LlamaConfig(**RAW)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10_000.0
    assert (ours.num_key_value_heads, ours.head_dim) == (4, 8)
    assert LlamaConfig.from_dict(RAW | {"head_dim": None, "num_key_value_heads": None}) == ours


@pytest.mark.parametrize(
    "value, ids", [(7, (7,)), (0, (0,)), ([1, 2], (1, 2)), ([], ()), (None, ())]
)
def test_eos_is_a_number_a_list_or_null(value, ids):
    assert LlamaConfig.from_dict(RAW | {"eos_token_id": value}).eos_token_id == ids
    assert LlamaConfig.from_dict(RAW).eos_token_id == ()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(eos_token_id=(0,)),
        dict(eos_token_id=()),
        dict(eos_token_id=(5, 0, 7)),
        dict(bos_token_id=None),
        dict(rope_scaling=LLAMA31, tie_word_embeddings=True),
        dict(head_dim=16, rope_theta=1e4, rms_norm_eps=1e-6),
    ],
    ids=str,
)
def test_a_config_written_and_read_again_is_the_same(changes):
    config = tiny_config(**changes)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict(torch.bfloat16)))) == config
    assert config.to_dict(torch.bfloat16)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        ({"rope_scaling": {"rope_type": None}}, "rope type"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"rope_scaling": "llama3"}, "rope"),
        ({"rope_scaling": "default"}, "rope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": SCALED | {"rope_type": "llama3", "factor": "8"}}, "factor is '8'"),
        (
            {
                "rope_scaling": SCALED
                | {"rope_type": "llama3", "original_max_position_embeddings": 0}
            },
            "original_max_position_embeddings is 0",
        ),
        ({"vocab_size": "97"}, "vocab_size is '97'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"intermediate_size": -48}, "intermediate_size is -48"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"num_key_value_heads": [2]}, "num_key_value_heads"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": "<|eot_id|>"}, "eos_token_id is '<|eot_id|>'"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
        ({"head_dim": 7}, "head_dim (7)"),
    ],
    ids=str,
)
def test_a_config_that_is_not_implemented_is_refused_by_the_name_of_its_key(
    tmp_path, changes, named
):
    (tmp_path / "config.json").write_text(json.dumps(RAW | changes))
    message = refusal(LlamaConfig.load, tmp_path)
    assert named in message
    assert str(tmp_path / "config.json") in message


@pytest.mark.parametrize("key", RAW)
def test_a_config_without_a_size_is_refused_by_the_name_of_the_key(key):
    assert key in refusal(LlamaConfig.from_dict, {k: v for k, v in RAW.items() if k != key})


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "No such file"),
        (b"{not json", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "model_type is [1, 2]"),
        (b"null", "model_type is None"),
        (b"", "not JSON"),
    ],
)
def test_a_config_json_that_is_not_an_object_is_refused_by_its_path(tmp_path, content, named):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    message = refusal(LlamaConfig.load, tmp_path)
    assert str(tmp_path / "config.json") in message and named in message


@needs_real
@pytest.mark.parametrize("name, expected", EVERY_RELEASE.items(), ids=EVERY_RELEASE.keys())
def test_the_configs_of_released_llamas_are_read(name, expected):
    config = LlamaConfig.load(REAL / "configs" / name)
    assert {key: getattr(config, key) for key in expected} == expected


@needs_real
@pytest.mark.parametrize("name", ["llama3.1-8b-instruct-finetune", "llama3.2-1b-finetune"])
def test_a_quantised_release_is_refused_for_its_quantization_config(name):
    for read in (LlamaConfig.load, load_model):
        message = refusal(read, REAL / "configs" / name)
        assert "config.json: quantization_config" in message and name in message


@needs_real
@pytest.mark.parametrize("name", EVERY_RELEASE)
def test_a_release_without_its_weights_is_refused_by_the_name_of_the_missing_file(name):
    directory = REAL / "configs" / name
    index = directory / "model.safetensors.index.json"
    files = (
        set(json.loads(index.read_text())["weight_map"].values())
        if index.exists()
        else {"model.safetensors"}
    )
    path, _, reason = refusal(load_model, directory).partition(": ")
    missing = [str(directory / file) for file in files if not (directory / file).exists()]
    assert path in missing and "No such file" in reason


@needs_real
def test_a_git_lfs_pointer_in_place_of_a_released_shard_is_called_one():
    pointer = (
        REAL / "configs" / "llama3.1-8b-instruct-finetune" / "model-00001-of-00002.safetensors"
    )
    message = refusal(model.open_safetensors, pointer)
    assert str(pointer) in message and "Git LFS pointer" in message


# ------------------------------------------------------------------------------------------------------------- rotation


def test_the_frequencies_of_llama_3_1_equal_the_golden_values():
    config = tiny_config(
        head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    golden = {
        28: 0.00321144599,
        29: 0.00216657076,
        31: 0.000856751413,
        34: 0.000178507813,
        35: 9.55621235e-05,
        63: 3.06892599e-07,
    }
    found = model.rope_frequencies(config)
    assert {i: found[i].item() for i in golden} == pytest.approx(golden, rel=2e-6)
    assert found[0].item() == 1.0 and len(found) == 64


def test_without_scaling_every_frequency_is_a_power_of_theta():
    found = model.rope_frequencies(tiny_config(head_dim=8, rope_theta=10_000.0))
    assert found.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)


def test_component_i_and_i_plus_half_rotate_as_one_complex_number():
    x = torch.randn(7, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 50, 3, 4, 99])
    z = torch.complex(x[..., :4], x[..., 4:])
    angles = [positions[:, None] * 10_000.0 ** (-i / 4) for i in range(4)]
    turned = torch.stack([z[..., i] * torch.exp(1j * angles[i]) for i in range(4)], dim=-1)
    found = model.rotate(x, *model.rope_tables(tiny_config(rope_theta=10_000.0), positions))
    torch.testing.assert_close(
        found, torch.cat([turned.real, turned.imag], dim=-1), rtol=0, atol=2e-5
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[0], x[0], rtol=0, atol=0)  # position 0 does not turn


def test_rotation_of_bf16_is_computed_in_fp32_and_rounded_once():
    x = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = model.rope_tables(tiny_config(), torch.arange(50))
    assert (cos.dtype, sin.dtype, cos.shape) == (torch.float32, torch.float32, (50, 1, 4))
    once = model.rotate(x.double(), cos, sin).bfloat16()
    torch.testing.assert_close(model.rotate(x, cos, sin), once, rtol=0, atol=0)


def test_rms_norm_is_cast_back_before_it_is_scaled():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).bfloat16() for s in ((64, 32), (32,)))
    norm = RMSNorm(32, 1e-5)
    norm.weight.data = weight
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    cast_then_scaled = (normed.bfloat16().double() * weight.double()).bfloat16()
    scaled_then_cast = (normed * weight.double()).bfloat16()
    torch.testing.assert_close(norm(x), cast_then_scaled, rtol=0, atol=0)
    assert not torch.equal(norm(x), scaled_then_cast)


def test_rms_norm_keeps_float64_and_adds_eps_to_the_mean_square():
    norm = RMSNorm(2, 0.5).double()
    norm.weight.data = torch.tensor([1.0, 10.0], dtype=torch.float64)
    # Mean square 12.5, with eps 13.
    found = norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert found.tolist()[0] == pytest.approx([3 / math.sqrt(13), 40 / math.sqrt(13)], abs=1e-14)


def kept_bytes(function, *inputs):
    """What backward needs, of tensors that are not themselves inputs."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(
    ("function", "shapes", "kept"),
    [
        (
            lambda x, weight: model._RMSNorm.apply(x, weight, 0.1),
            [(5, 6), (6,)],
            5,
        ),  # a number a row
        (model._SwiGLU.apply, [(5, 7), (5, 7), (6, 7)], 0),
    ],
    ids=["rms norm", "swiglu"],
)
def test_hand_written_gradients_are_those_of_finite_differences_and_keep_little(
    function, shapes, kept
):
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    assert torch.autograd.gradcheck(function, inputs)
    assert (
        kept_bytes(function, *(x.detach().bfloat16().requires_grad_() for x in inputs)) == 4 * kept
    )
    assert kept_bytes(function, *inputs) == 8 * kept


# ------------------------------------------------------------------------------------------------------------ attention


def dense_attention(q, k, v, query_lengths, key_lengths, key_rows):
    """Softmax over each query's visible keys, one head at a time: the last query of a segment sees all of its keys."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    first_query = first_key = 0
    for n_q, n_k in zip(query_lengths, key_lengths, strict=True):
        rows = key_rows[first_key : first_key + n_k]
        for head in range(q.shape[1]):
            for i in range(n_q):
                visible = rows[: n_k - n_q + i + 1]
                scores = (k[visible, head // group] @ q[first_query + i, head]) / math.sqrt(
                    q.shape[2]
                )
                out[first_query + i, head] = torch.softmax(scores, 0) @ v[visible, head // group]
        first_query, first_key = first_query + n_q, first_key + n_k
    return out


def starts(lengths):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (6, 1), (6, 3)])
@pytest.mark.parametrize(
    "query_lengths, key_lengths",
    [
        ([5], [5]),
        ([3, 1, 4], [7, 1, 4]),
        ([1, 1], [1, 6]),
        ([2, 0, 3], [6, 0, 3]),
        ([2, 0, 3], [2, 3, 9]),
    ],
)
def test_attention_is_dense_softmax_over_the_keys_up_to_ones_own_from_the_end(
    heads, key_heads, query_lengths, key_lengths
):
    generator = torch.Generator().manual_seed(0)
    rows = sum(query_lengths)
    q, k, v = (
        torch.randn(rows, n, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    key_rows = torch.randint(rows, (sum(key_lengths),), generator=generator)
    upstream = torch.randn(rows, heads, 8, dtype=torch.float64, generator=generator)
    found = model.attention(
        q, k, v, Segments(starts(query_lengths), starts(key_lengths), key_rows, 9)
    )
    expected = dense_attention(q, k, v, query_lengths, key_lengths, key_rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for of_found, of_expected in zip(
        torch.autograd.grad((found * upstream).sum(), (q, k, v)),
        torch.autograd.grad((expected * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(of_found, of_expected, rtol=0, atol=1e-12)


def test_without_key_rows_the_keys_are_the_rows_themselves():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, n, 8, dtype=torch.float64, generator=generator) for n in (4, 2, 2))
    found = model.attention(q, k, v, Segments(starts([3, 1, 4]), starts([3, 1, 4]), None, 4))
    expected = dense_attention(q, k, v, [3, 1, 4], [3, 1, 4], torch.arange(8))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_on_cuda_half_types_go_to_the_variable_length_kernel_in_one_call_that_this_torch_accepts(
    monkeypatch,
):
    calls, kernel = [], model.varlen_attn

    def recorded(*args, **options):
        calls.append((args, options))
        return kernel(
            *args, **options
        )  # torch's own checks of arguments and shapes, on tensors without storage

    monkeypatch.setattr(model, "varlen_attn", recorded)
    batch = pack(random_pairs([(4, 2, 3), (1, 1, 1)]), longest=32)
    with FakeTensorMode():
        q, k = (
            torch.empty(len(batch.tokens_T), n, 8, dtype=torch.bfloat16, device="cuda")
            for n in (4, 2)
        )
        *indexes, longest = vars(batch.segments).values()
        on_cuda = Segments(
            *(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in indexes), longest
        )
        out = model.attention(q, k, k, on_cuda)
        assert (out.shape, out.dtype, out.is_cuda) == (q.shape, torch.bfloat16, True)
    (((q_arg, k_arg, v_arg, query_starts, key_starts, longest_q, longest_k), options),) = calls
    assert q_arg is q and k_arg.shape == v_arg.shape == (len(batch.segments.key_row_N), 2, 8)
    assert (
        query_starts.dtype == key_starts.dtype == torch.int32
        and len(query_starts) == len(key_starts) == 5
    )
    assert (longest_q, longest_k, options["window_size"]) == (32, 32, (-1, 0))
    before_enable_gqa = torch.__version__.startswith(("2.10", "2.11"))
    assert options == {"window_size": (-1, 0)} | ({} if before_enable_gqa else {"enable_gqa": True})


# ---------------------------------------------------------------------------------------- against transformers, on disk


def transformers_logits(directory, tokens, dtype):
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        return loaded(tokens[None]).logits[0]


@each_variant
def test_a_saved_model_gives_the_same_logits_in_transformers(tmp_path, changes):
    ours = tiny_model(**changes)
    save_model(ours, tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        expected = ours.logits(TOKENS)
    assert expected.std() > 0.3  # far from uniform, so that an error shows
    theirs = transformers_logits(tmp_path / "saved", TOKENS, torch.float32)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "saved").logits(TOKENS), expected, rtol=0, atol=0
        )


@each_variant
def test_a_model_that_transformers_saved_gives_the_same_logits_here(tmp_path, changes):
    config = tiny_config(**changes)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(config.rope_scaling)}
    fields = {
        key: value
        for key, value in vars(config).items()
        if key not in ("rope_scaling", "rope_theta")
    }
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **fields | {"eos_token_id": 1},
            rope_parameters=rope,
            initializer_range=0.15,
            attn_implementation="eager",
        )
    )
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.logits(TOKENS), theirs(TOKENS[None]).logits[0], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_saved_in_bf16_is_its_weights_rounded_and_loads_as_bf16_in_transformers(
    tmp_path, tied
):
    ours = tiny_model(tie_word_embeddings=tied)
    save_model(ours, tmp_path / "saved")
    reloaded = load_model(tmp_path / "saved")
    for (name, original), (_, found) in zip(
        ours.named_parameters(), reloaded.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, original.bfloat16().float(), rtol=0, atol=0, msg=name)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = load_model(tmp_path / "saved", torch.bfloat16).logits(TOKENS)
        exact = reloaded.logits(TOKENS)
        errors = [
            (logits.float() - exact).norm() / exact.norm()
            for logits in (found, theirs(TOKENS[None]).logits[0])
        ]
    assert found.dtype == torch.bfloat16
    assert (
        max(errors) < 0.03 and errors[0] < 1.5 * errors[1]
    )  # no further from fp32 than transformers' bf16 is


@needs_real
def test_a_trained_model_tells_the_story_that_its_authors_documented_for_temperature_0():
    story = (REAL / "stories260K" / "greedy.txt").read_text()
    tokenizer = Tokenizer.from_file(str(REAL / "stories260K" / "tokenizer.json"))
    trained = load_model(REAL / "stories260K")
    ids = tokenizer.encode(story, add_special_tokens=False).ids
    # If the likeliest token after every prefix is the story's next one, then greedy decoding from BOS writes the story.
    with torch.no_grad():
        likeliest = trained.logits(torch.tensor([512, *ids[:-1]])).argmax(-1).tolist()
    assert len(story) == 565 and len(ids) > 200
    assert tokenizer.decode(likeliest) == story


# --------------------------------------------------------------------------------------------------------- packed pairs


def padded_logps(of_model, pairs):
    """Each response after its own copy of the prompt, one sequence at a time, padded for `response_logps`."""
    sequences = [
        (list(map(int, pair.prompt)), list(map(int, response)))
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    ]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    logits, tokens, scored = [], [], []
    for prompt, response in sequences:
        ids = torch.tensor(prompt + response)
        pad = longest - len(ids)
        logits.append(F.pad(of_model.logits(ids), (0, 0, 0, pad)))
        tokens.append(F.pad(ids, (0, pad), value=3))
        scored.append(torch.tensor([False] * len(prompt) + [True] * len(response) + [False] * pad))
    return response_logps(torch.stack(logits), torch.stack(tokens), torch.stack(scored))


def weighted(means_and_sums):
    """One number to differentiate in which every response has a weight of its own."""
    means, sums = means_and_sums
    weight = torch.linspace(-1.0, 2.0, len(means), dtype=means.dtype)
    return (weight * means).sum() + (weight.flip(0) * sums).sum() / 10


def gradients(of_model, value):
    parameters = dict(of_model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def assert_gradients_close(found, expected, relative):
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < relative, f"{name}: {error}"


@pytest.mark.parametrize(
    "dtype, absolute, relative", [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)]
)
@pytest.mark.parametrize("share_prompt", [True, False])
@each_variant
def test_a_packed_batch_gives_the_log_probs_and_gradients_of_separate_sequences(
    changes, share_prompt, dtype, absolute, relative
):
    ours, pairs = tiny_model(dtype=dtype, **changes), random_pairs(LENGTHS)
    packed, separate = ours(pack(pairs, share_prompt)), padded_logps(ours, pairs)
    torch.testing.assert_close(packed[0], separate[0], rtol=absolute, atol=absolute)
    torch.testing.assert_close(packed[1], separate[1], rtol=absolute, atol=absolute)
    assert_gradients_close(
        gradients(ours, weighted(packed)), gradients(ours, weighted(separate)), relative
    )


def test_the_mean_of_a_response_is_its_sum_over_its_own_number_of_tokens():
    means, sums = tiny_model()(pack(random_pairs(LENGTHS)))
    lengths = torch.tensor([n for _, n_w, n_l in LENGTHS for n in (n_w, n_l)])
    torch.testing.assert_close(sums, means * lengths)
    assert (sums < 0).all()


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_pairs_numbers_do_not_depend_on_its_neighbours(share_prompt):
    ours, pairs = tiny_model(dtype=torch.float64), random_pairs(LENGTHS)
    means, sums = ours(pack(pairs, share_prompt))
    for i, pair in enumerate(pairs):
        alone = ours(pack([pair], share_prompt))
        torch.testing.assert_close(
            alone, (means[2 * i : 2 * i + 2], sums[2 * i : 2 * i + 2]), rtol=0, atol=1e-12
        )
    turned = ours(pack(pairs[::-1], share_prompt))[0]
    torch.testing.assert_close(turned.view(-1, 2).flip(0).flatten(), means, rtol=0, atol=1e-12)


def test_a_rejected_response_does_not_see_the_chosen_one():
    ours, pairs = tiny_model(), random_pairs([(4, 5, 3)])
    others = random_pairs([(4, 2, 3)])
    others[0].prompt[:], others[0].rejected[:] = pairs[0].prompt, pairs[0].rejected
    assert not torch.equal(ours(pack(others))[0][0], ours(pack(pairs))[0][0])
    torch.testing.assert_close(ours(pack(others))[0][1], ours(pack(pairs))[0][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_forward_is_close_to_fp32_and_its_log_probs_are_fp32(tied):
    ours, batch = tiny_model(tie_word_embeddings=tied), pack(random_pairs(LENGTHS))
    exact = ours(batch)
    exact_gradients = gradients(ours, weighted(exact))
    half = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=tied)
    found = half(batch)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], exact[0], rtol=0.01, atol=0.03)
    for name, gradient in gradients(half, weighted(found)).items():
        assert (gradient.float() - exact_gradients[name]).norm() < 0.1 * exact_gradients[
            name
        ].norm(), name


def test_recomputing_blocks_in_backward_changes_no_number(monkeypatch):
    batch, runs = pack(random_pairs(LENGTHS)), 0

    class Counted(model.MLP):
        def forward(self, x_TD):
            nonlocal runs
            runs += 1
            return super().forward(x_TD)

    monkeypatch.setattr(model, "MLP", Counted)
    results = []
    for recompute in (False, True):
        ours, runs = tiny_model(), 0
        ours.checkpoint_blocks = recompute
        loss = weighted(ours(batch))
        results.append((loss, gradients(ours, loss)))
        assert runs == (4 if recompute else 2)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------- head


def head_inputs(dtype, scored=23, vocabulary=61, width=8):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (scored, vocabulary)
    )
    targets = torch.randint(vocabulary, (scored,), generator=generator)
    return hidden, weight, targets, torch.randn(scored, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk_elements", [1, 61, 5 * 61 + 3, 2**24])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_head_is_the_log_softmax_of_the_targets_in_value_and_gradient_whatever_its_chunk(
    monkeypatch, dtype, tolerance, chunk_elements
):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets, upstream = head_inputs(dtype)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    found = target_logps(hidden, weight, targets)
    expected = F.log_softmax(hidden64 @ weight64.T, -1)[torch.arange(len(targets)), targets]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    before = hidden.detach().clone(), weight.detach().clone()
    grads = torch.autograd.grad((found * upstream.to(dtype)).sum(), (hidden, weight))
    for grad, wanted in zip(
        grads, torch.autograd.grad((expected * upstream).sum(), (hidden64, weight64)), strict=True
    ):
        torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


def test_with_bf16_weights_the_log_probs_are_those_of_the_rounded_logits_in_fp32(monkeypatch):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", 200)
    hidden, weight, targets, upstream = head_inputs(torch.bfloat16)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    found = target_logps(hidden, weight, targets)
    rounded = (hidden.detach() @ weight.detach().T).double()
    assert found.dtype == torch.float32
    expected = F.log_softmax(rounded, -1)[torch.arange(len(targets)), targets]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    exact = F.log_softmax(hidden64 @ weight64.T, -1)[torch.arange(len(targets)), targets]
    grads = torch.autograd.grad((found * upstream.float()).sum(), (hidden, weight))
    for grad, wanted in zip(
        grads, torch.autograd.grad((exact * upstream).sum(), (hidden64, weight64)), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_through_the_head_gives_the_gradients_of_the_first(dtype):
    hidden, weight, targets, _ = head_inputs(dtype)
    logps = target_logps(hidden, weight, targets)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(logps.sum(), (hidden, weight)), first, rtol=0, atol=0
    )


def test_without_gradients_the_head_and_the_model_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", 200)
    hidden, weight, targets, _ = head_inputs(torch.float32)
    ours, batch = tiny_model(), pack(random_pairs(LENGTHS))
    with_gradients = target_logps(hidden, weight, targets).detach(), ours(batch)[0].detach()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = target_logps(hidden, weight, targets), ours(batch)[0]
        assert not found[0].requires_grad
        torch.testing.assert_close(found, with_gradients, rtol=1e-6, atol=1e-6)


class Allocations(TorchDispatchMode):
    """Every storage that appears, kept alive so that no address is reused: storage -> (its bytes, its dtype)."""

    def __init__(self):
        super().__init__()
        self.seen, self.alive = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive.append(storage)
                self.seen[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        return out

    def of_at_least(self, elements):
        return [dtype for size, dtype in self.seen.values() if size >= elements * dtype.itemsize]


SCORED, VOCABULARY = 64, 1000


@pytest.fixture
def wide_head(monkeypatch):
    """A head whose chunk is 4 of 64 rows: hidden, weight, targets. fp32 logits would be 16 times a chunk."""
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    return head_inputs(torch.bfloat16, SCORED, VOCABULARY, width=2)[:3]


def test_of_bf16_logits_no_fp32_copy_beyond_a_chunk_ever_exists_and_one_tensor_is_kept(wide_head):
    with Allocations() as allocations:
        target_logps(*wide_head).sum().backward()
    assert allocations.of_at_least(SCORED * VOCABULARY) == [
        torch.bfloat16
    ]  # also its own gradient, in place
    assert torch.float32 not in allocations.of_at_least(4 * VOCABULARY + 1)
    assert torch.float32 in allocations.of_at_least(
        4 * VOCABULARY
    )  # the chunk itself: it is fp32 that is computed in


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_is_wanted_the_head_holds_a_few_rows_alone(wide_head, off, monkeypatch):
    monkeypatch.setattr(model, "MATMUL_ROWS", 4)
    hidden, weight, targets = wide_head
    with off(), Allocations() as allocations:
        target_logps(hidden.detach(), torch.nn.Parameter(weight.detach()), targets)
    assert allocations.of_at_least(4 * VOCABULARY + 1) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_step_of_a_bf16_model_makes_the_logits_once_and_never_in_fp32(monkeypatch, tied):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    ours = tiny_model(
        dtype=torch.bfloat16,
        vocab_size=VOCABULARY,
        hidden_size=8,
        head_dim=2,
        tie_word_embeddings=tied,
    )
    batch = pack(random_pairs([(3, 30, 34)]))
    with Allocations() as allocations:
        ours(batch)[0].sum().backward()
    assert allocations.of_at_least(SCORED * VOCABULARY) == [torch.bfloat16]
    assert torch.float32 not in allocations.of_at_least(
        8 * VOCABULARY + 1
    )  # the weight's own gradient is V x 8


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Saved once: an untied model, a tied one, and the untied one in shards."""
    root = tmp_path_factory.mktemp("originals")
    save_model(tiny_model(), root / "whole", dtype=torch.float32)
    save_model(tiny_model(tie_word_embeddings=True), root / "tied", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "SHARD_BYTES", 30_000)
        save_model(tiny_model(), root / "sharded", dtype=torch.float32)
    return root


@pytest.fixture
def whole(originals, tmp_path):
    return shutil.copytree(originals / "whole", tmp_path / "whole")


@pytest.fixture
def tied(originals, tmp_path):
    return shutil.copytree(originals / "tied", tmp_path / "tied")


@pytest.fixture
def sharded(originals, tmp_path):
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


def edit_tensors(file, **changes):
    """Rewrites a safetensors file: a tensor replaces, a function converts, None removes. Dots are written as __."""
    tensors = load_file(file)
    for key, change in changes.items():
        key = key.replace("__", ".")
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key]) if callable(change) else change
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({Q: None}, [Q, "missing"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "missing"]),
        ({"model.layers.1.mlp.bias": torch.zeros(32)}, ["model.layers.1.mlp.bias"]),
        ({"zero": torch.tensor(0.0)}, ["zero"]),
        ({Q: torch.zeros(32, 16)}, [Q, "(32, 16)", "(32, 32)"]),
        ({"lm_head.weight": torch.zeros(96, 32)}, ["lm_head.weight", "(96, 32)", "(97, 32)"]),
        ({"model.norm.weight": torch.tensor(1.0)}, ["model.norm.weight", "()", "(32,)"]),
        ({"model.norm.weight": torch.zeros(32, 1)}, ["model.norm.weight", "(32, 1)", "(32,)"]),
        ({Q: torch.zeros(32, 32, dtype=torch.int8)}, [Q, "I8"]),
        ({Q: torch.zeros(32, 32, dtype=torch.bool)}, [Q, "BOOL"]),
        ({Q: torch.zeros(32, 32, dtype=torch.int64)}, [Q, "I64"]),
        ({Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, [Q, "F8"]),
    ],
    ids=str,
)
def test_a_checkpoint_that_is_not_exactly_the_models_is_refused_by_key(whole, changes, named):
    edit_tensors(
        whole / "model.safetensors",
        **{key.replace(".", "__"): change for key, change in changes.items()},
    )
    message = refusal(load_model, whole)
    assert all(word in message for word in [*named, "model.safetensors"]), message


@pytest.mark.parametrize(
    "content, named",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"", "not a safetensors file"),
        (b"\x10\x00", "not a safetensors file"),
        (b"<html>Sign in</html>", "safetensors"),
        (b"\xff" * 8 + b"{}", "not a safetensors file"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused_by_its_path(whole, content, named):
    (whole / "model.safetensors").unlink()
    if content is not None:
        (whole / "model.safetensors").write_bytes(content)
    message = refusal(load_model, whole)
    assert str(whole / "model.safetensors") in message and named in message


@pytest.mark.parametrize("share_kept", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_its_path(sharded, share_kept):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share_kept)])
    message = refusal(load_model, sharded)
    assert str(shard) in message and "truncated" in message


def test_a_missing_shard_is_refused_by_its_path(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refusal(load_model, sharded)


def test_a_missing_directory_is_refused_by_its_path(tmp_path):
    assert str(tmp_path / "absent") in refusal(load_model, tmp_path / "absent")


def test_a_key_in_the_index_alone_or_in_the_file_alone_is_refused_by_name(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.spare.weight": weight_map[Q]})
    message = refusal(load_model, sharded)
    assert "'model.spare.weight' is in the index alone" in message and weight_map[Q] in message
    edit_json(index, weight_map={key: name for key, name in weight_map.items() if key != Q})
    message = refusal(load_model, sharded)
    assert f"{Q!r} is in the file alone" in message and weight_map[Q] in message


@pytest.mark.parametrize(
    "place", ["../whole.safetensors", "/etc/passwd", "deeper/x.safetensors", "..", ".", ""]
)
def test_an_index_that_points_out_of_its_directory_is_refused_by_key_and_place(sharded, place):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {Q: place})
    message = refusal(load_model, sharded)
    assert str(index) in message and Q in message and repr(place) in message


@pytest.mark.parametrize(
    "content, named",
    [
        ("{}", "weight_map"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ("{", "not JSON"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map"),
    ],
)
def test_an_index_without_a_weight_map_is_refused_by_its_path(whole, content, named):
    index = whole / "model.safetensors.index.json"
    index.write_text(content)
    message = refusal(load_model, whole)
    assert str(index) in message and named in message


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("num_hidden_layers", 1, ["num_hidden_layers 1", "2"]),
        ("num_hidden_layers", 3, ["num_hidden_layers 3", "2"]),
        ("num_hidden_layers", 4000, ["num_hidden_layers 4000", "2"]),
        ("vocab_size", 10**7, ["model.embed_tokens.weight", "10000000"]),
        ("intermediate_size", 10**7, ["model.layers.0.mlp.gate_proj.weight", "10000000"]),
    ],
)
def test_sizes_that_the_file_does_not_have_are_refused_before_anything_of_that_size_is_made(
    whole, monkeypatch, key, value, named
):
    monkeypatch.setattr(
        model, "Llama", None
    )  # so that building a model, even on the meta device, is a TypeError
    edit_json(whole / "config.json", **{key: value})
    started = time.monotonic()
    message = refusal(load_model, whole)
    assert time.monotonic() - started < 5
    assert all(word in message for word in [*named, str(whole)])


def test_layers_that_are_not_numbered_from_0_are_refused(whole):
    file = whole / "model.safetensors"
    save_file(
        {key.replace("layers.0.", "layers.7."): tensor for key, tensor in load_file(file).items()},
        file,
    )
    assert "model.layers.0.input_layernorm.weight is missing" in refusal(load_model, whole)


def test_the_inverse_frequencies_of_old_exports_are_ignored(whole):
    expected = load_model(whole)
    edit_tensors(
        whole / "model.safetensors",
        **{
            "model__layers__0__self_attn__rotary_emb__inv_freq": torch.full((4,), 9.0),
            "model__rotary_emb__inv_freq": torch.ones(4, dtype=torch.int64),
        },
    )
    for found, wanted in zip(load_model(whole).parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_tied_model_may_bring_its_embedding_again_as_its_head_but_not_another(tied):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    expected = load_model(tied).logits(TOKENS)
    edit_tensors(tied / "model.safetensors", lm_head__weight=embedding.clone())
    torch.testing.assert_close(load_model(tied).logits(TOKENS), expected, rtol=0, atol=0)
    edit_tensors(tied / "model.safetensors", lm_head__weight=embedding + 1e-3)
    message = refusal(load_model, tied)
    assert (
        "model.safetensors: lm_head.weight differs" in message and "tie_word_embeddings" in message
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_stored_in_another_floating_dtype_is_converted_to_the_one_asked_for(whole, stored):
    original = load_file(whole / "model.safetensors")
    save_file(
        {key: tensor.to(stored) for key, tensor in original.items()}, whole / "model.safetensors"
    )
    for asked in (torch.float32, torch.bfloat16, torch.float64):
        for key, parameter in load_model(whole, asked).named_parameters():
            torch.testing.assert_close(
                parameter.detach(), original[key].to(stored).to(asked), rtol=0, atol=0
            )


# --------------------------------------------------------------------------------------------------------------- saving


def test_a_large_model_is_saved_in_shards_with_an_index_that_transformers_and_we_read(originals):
    saved = originals / "sharded"
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    n = len(files)
    assert n > 2 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    held = {name: load_file(saved / name) for name in files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    sizes = {name: sum(4 * t.numel() for t in tensors.values()) for name, tensors in held.items()}
    # Embedding and head 97 x 32 each, two blocks of 2 norms, q and o, k and v, three of the MLP, and the last norm.
    by_hand = 4 * (2 * 97 * 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 32)
    assert index["metadata"]["total_size"] == sum(sizes.values()) == by_hand
    assert max(sizes.values()) <= 30_000
    with torch.no_grad():
        expected = tiny_model().logits(TOKENS)
        torch.testing.assert_close(load_model(saved).logits(TOKENS), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        transformers_logits(saved, TOKENS, torch.float32), expected, rtol=0, atol=1e-5
    )


def test_a_tensor_larger_than_a_file_should_be_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SHARD_BYTES", 1)
    save_model(tiny_model(), tmp_path / "saved")
    keys = sorted(
        key for path in (tmp_path / "saved").glob("*.safetensors") for key in load_file(path)
    )
    assert keys == sorted(dict(tiny_model().named_parameters()))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == len(keys)


def test_every_saved_file_says_that_it_is_pytorchs(originals):
    for path in [
        *(originals / "sharded").glob("*.safetensors"),
        originals / "whole" / "model.safetensors",
    ]:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_tied_head_is_saved_once_as_the_embedding(originals):
    keys = load_file(originals / "tied" / "model.safetensors").keys()
    assert "lm_head.weight" not in keys and "model.embed_tokens.weight" in keys
    assert (
        json.loads((originals / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    )
    assert "lm_head.weight" in load_file(originals / "whole" / "model.safetensors")


def test_a_save_that_fails_midway_leaves_no_model_and_can_be_tried_again(tmp_path, monkeypatch):
    written = []

    def full_disk(tensors, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(model, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(model, "save_file", full_disk)
    with pytest.raises(InputError, match="model-00003-of-000.*No space left"):
        save_model(tiny_model(), tmp_path / "saved", dtype=torch.float32)
    assert len(written) == 2 and not (tmp_path / "saved").exists()
    # The next try has fewer shards: none of those that the first left behind may be among them.
    monkeypatch.setattr(model, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(model, "save_file", save_file)
    save_model(tiny_model(), tmp_path / "saved", dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert (
        len({path.name[-17:] for path in (tmp_path / "saved").glob("*.safetensors")}) == 1
    )  # one "of-0000n"
    load_model(tmp_path / "saved")


def test_a_model_is_never_saved_over_a_directory_that_exists(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in refusal(save_model, tiny_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_tokenizer_and_generation_files_are_copied_byte_for_byte_and_nothing_else_is(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    companions = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ]
    for name in [
        *companions,
        "README.md",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "modeling.py",
    ]:
        (source / name).write_bytes(b"\xff\r\n" + name.encode())
    save_model(tiny_model(), tmp_path / "saved", source=source)
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    assert found == {*companions, "config.json", "model.safetensors"}
    assert all(
        (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()
        for name in companions
    )


@pytest.mark.parametrize(
    "config, generation, ids",
    [
        ((96,), '{"eos_token_id": 96, "temperature": 0.6}', [96, 95]),
        ((), "{}", [95]),
        ((96,), None, [96, 95]),
        ((96,), '{"eos_token_id": [95, 96]}', [95, 96]),
        ((95, 96), '{"eos_token_id": null}', [95]),
    ],
)
def test_an_export_ends_answers_where_they_were_trained_to_end(tmp_path, config, generation, ids):
    """A base model's files name the end of a text alone, and transformers and vLLM would go on after the turn's."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source/generation_config.json"
    if generation is not None:
        path.write_text(generation)
    save_model(
        tiny_model(eos_token_id=config),
        tmp_path / "saved",
        source=tmp_path / "source",
        stop_ids=[95],
    )
    assert set(LlamaConfig.load(tmp_path / "saved").eos_token_id) == {95, *config}
    if generation is None:
        assert not (tmp_path / "saved/generation_config.json").exists()
    else:
        text = (tmp_path / "saved/generation_config.json").read_text()
        assert json.loads(text) == json.loads(generation) | {"eos_token_id": ids}
        assert (text == generation) == (
            "[95, 96]" in generation
        )  # untouched where nothing is missing


def test_saving_leaves_the_model_as_it_was(tmp_path):
    ours = tiny_model()
    save_model(ours, tmp_path / "saved")
    for found, expected in zip(ours.parameters(), tiny_model().parameters(), strict=True):
        assert found.dtype == torch.float32 and found.requires_grad and torch.equal(found, expected)


def test_the_names_of_the_parameters_are_the_keys_of_transformers():
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RAW)).state_dict()
    ours = Llama(LlamaConfig.from_dict(RAW)).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in theirs.items()
    }
