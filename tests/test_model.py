"""The model: config.json, rotary positions, packed attention, the head, loading and saving.

Oracles: transformers, complex rotation, dense masked softmax in float64, padded sequences through
the portable `asft.response_logps`, the golden frequencies of Llama 3.1 and the greedy text of a
model that others trained.
"""

import json
import math
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    LLAMA31,
    RAW_CONFIG,
    REAL,
    edit_json,
    edit_tensors,
    needs_real,
    random_pairs,
    read_json,
    refusal,
    save_tiny,
    tiny_config,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
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
    target_logps,
)
from support import export
from support.export import save_model
from support.files import InputError

# Prompt, chosen and rejected tokens: ragged, with one-token prompts and one-token responses.
LENGTHS = [(5, 3, 7), (1, 4, 2), (9, 1, 1), (6, 8, 1), (1, 1, 5)]
VARIANTS = {
    "grouped, untied": {},
    "a key head per query head, tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
    "one key head, scaled rope": dict(num_key_value_heads=1, rope_scaling=LLAMA31),
    "head_dim is not D/H, tied, scaled rope": dict(head_dim=16, tie_word_embeddings=True)
    | dict(rope_scaling=LLAMA31),
    "other theta and eps, three layers": dict(rope_theta=1e4, rms_norm_eps=1e-2)
    | dict(num_hidden_layers=3),
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
# Longer than the 64 tokens of LLAMA31's original context.
TOKENS = torch.randint(97, (100,), generator=torch.Generator().manual_seed(5))


def randoms(*shapes, dtype=torch.float64, seed=0):
    """Normal random tensors that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def assert_equal(found, expected, tolerance=0.0, **options):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, **options)


# --------------------------------------------------------------------------------- config.json

RAW = RAW_CONFIG
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}
# The fields of LlamaConfig in their order.
OF_8B = (128256, 4096, 14336, 32, 32, 8, 128)
STRETCHED_8, STRETCHED_32 = (RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
FROM_1B_ON = (131072, 1e-5, 5e5, STRETCHED_32, True, 128000, (128001,))
RELEASED = {
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32, 128, 2048, 1e-5, 1e4, None, False, 1, (2,)),
    "llama3-8b-finetune": (*OF_8B, 8192, 1e-5, 5e5, None, False, 128000, (128001,)),
    "llama3-8b-instruct": (*OF_8B, 8192, 1e-5, 5e5, None, False, 128000, (128009,)),
    "llama3.1-8b-merge": (*OF_8B, 131072, 1e-5, 5e5, STRETCHED_8, False, 128000)
    + ((128001, 128008, 128009),),
    "llama3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, *FROM_1B_ON),
    "llama3.2-3b-shard": (128256, 3072, 8192, 28, 24, 8, 128, *FROM_1B_ON),
}


def test_the_config_of_transformers_4_and_of_5_is_the_same_config():
    common = RAW | dict(num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, bos_token_id=0)
    common |= dict(eos_token_id=[1, 2], tie_word_embeddings=True, hidden_act="silu")
    common |= dict(attention_bias=False, attention_dropout=0.0, mlp_bias=False, use_cache=True)
    llama3 = SCALED | {"rope_type": "llama3"}
    old = common | dict(torch_dtype="bfloat16", rope_theta=5e5, rope_scaling=llama3)
    new = common | dict(dtype="bfloat16", rope_parameters=llama3 | {"rope_theta": 5e5})
    expected = LlamaConfig(97, 32, 48, 2, 4, 2, 16, 256, 1e-5, 5e5, STRETCHED_8, True, 0, (1, 2))
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new) == expected
    old["rope_scaling"] = SCALED | {"type": "llama3"}  # the key's name before transformers 4.43
    assert LlamaConfig.from_dict(old) == expected


def test_plain_rope_of_transformers_4_and_of_5_is_the_same_config():
    old = RAW | {"rope_theta": 250000.0, "rope_scaling": None}
    new = RAW | {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}
    config = LlamaConfig.from_dict(new)
    assert (config.rope_theta, config.rope_scaling) == (250000.0, None)
    # The rope_theta of rope_parameters counts, as in transformers 5.
    for same in (old, new | {"rope_theta": None}, new | {"rope_theta": 500000.0}):
        assert LlamaConfig.from_dict(same) == config
    llama3 = SCALED | {"rope_type": "llama3"}  # said twice
    both = LlamaConfig.from_dict(RAW | {"rope_scaling": llama3, "rope_parameters": llama3})
    assert both.rope_scaling == RopeScaling(**SCALED)
    half = LlamaConfig.from_dict(old | {"rope_parameters": {"rope_theta": None}})
    assert half.rope_theta == 250000.0


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


ROUND_TRIPS = [dict(eos_token_id=ids) for ids in ((0,), (), (5, 0, 7))]
ROUND_TRIPS += [dict(bos_token_id=None), dict(rope_scaling=LLAMA31, tie_word_embeddings=True)]
ROUND_TRIPS += [{}, dict(head_dim=16, rope_theta=1e4, rms_norm_eps=1e-6)]


@pytest.mark.parametrize("changes", ROUND_TRIPS, ids=str)
def test_a_config_written_and_read_again_is_the_same(changes):
    config = tiny_config(**changes)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict(torch.bfloat16)))) == config
    assert config.to_dict(torch.bfloat16)["torch_dtype"] == "bfloat16"


@needs_real
@pytest.mark.parametrize("name", RELEASED)
def test_the_configs_of_released_llamas_are_read(name):
    assert LlamaConfig.load(REAL / "configs" / name) == LlamaConfig(*RELEASED[name])


@needs_real
@pytest.mark.parametrize("name", ["llama3.1-8b-instruct-finetune", "llama3.2-1b-finetune"])
def test_a_quantised_release_is_refused_for_its_quantization_config(name):
    for read in (LlamaConfig.load, load_model):
        message = refusal(read, REAL / "configs" / name)
        assert "config.json: quantization_config" in message and name in message


# ------------------------------------------------------------------------------------- rotation


def test_the_frequencies_of_llama_3_1_equal_the_golden_values():
    config = tiny_config(head_dim=128, rope_theta=5e5, rope_scaling=STRETCHED_8)
    golden = {28: 0.00321144599, 29: 0.00216657076, 31: 0.000856751413}
    golden |= {34: 0.000178507813, 35: 9.55621235e-05, 63: 3.06892599e-07}
    found = model.rope_frequencies(config)
    assert {i: found[i].item() for i in golden} == pytest.approx(golden, rel=2e-6)
    assert found[0].item() == 1.0 and len(found) == 64


def test_component_i_and_i_plus_half_rotate_as_one_complex_number():
    x = randoms((7, 3, 8))[0].detach()
    positions = torch.tensor([0, 1, 2, 50, 3, 4, 99])
    z = torch.complex(x[..., :4], x[..., 4:])
    angles = [positions[:, None] * 10_000.0 ** (-i / 4) for i in range(4)]
    turned = torch.stack([z[..., i] * torch.exp(1j * angles[i]) for i in range(4)], dim=-1)
    found = model.rotate(x, *model.rope_tables(tiny_config(rope_theta=10_000.0), positions))
    assert_equal(found, torch.cat([turned.real, turned.imag], dim=-1), 2e-5)
    assert found.dtype == torch.float64
    assert_equal(found[0], x[0])  # position 0 does not turn


def test_rotation_of_bf16_is_computed_in_fp32_and_rounded_once():
    (x,) = randoms((50, 2, 8), dtype=torch.bfloat16)
    cos, sin = model.rope_tables(tiny_config(), torch.arange(50))
    assert (cos.dtype, sin.dtype, cos.shape) == (torch.float32, torch.float32, (50, 1, 4))
    assert_equal(model.rotate(x, cos, sin), model.rotate(x.double(), cos, sin).bfloat16())


def test_rms_norm_is_cast_back_before_it_is_scaled():
    x, weight = randoms((64, 32), (32,), dtype=torch.bfloat16)
    norm = RMSNorm(32, 1e-5)
    norm.weight.data = weight.data
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    cast_then_scaled = (normed.bfloat16().double() * weight.double()).bfloat16()
    scaled_then_cast = (normed * weight.double()).bfloat16()
    assert_equal(norm(x), cast_then_scaled)
    assert not torch.equal(norm(x), scaled_then_cast)


def test_rms_norm_keeps_float64_and_adds_eps_to_the_mean_square():
    norm = RMSNorm(2, 0.5).double()
    norm.weight.data = torch.tensor([1.0, 10.0], dtype=torch.float64)
    # Mean square 12.5, with eps 13.
    found = norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert found.tolist()[0] == pytest.approx([3 / math.sqrt(13), 40 / math.sqrt(13)], abs=1e-14)


def test_the_gradients_of_norm_and_mlp_are_those_of_finite_differences():
    """Whether autograd makes them or a formula of ours does."""
    torch.manual_seed(0)
    small = tiny_config(hidden_size=6, intermediate_size=5)
    (x,) = randoms((5, 6), seed=3)
    norm = RMSNorm(6, 0.1).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 2)  # a new one is 1: formulas without it would pass
    for module in (norm, model.MLP(small).double()):
        names = list(dict(module.named_parameters()))

        def call(x, *weights, module=module, names=names):
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x)

        assert torch.autograd.gradcheck(call, (x, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_gives_the_bits_of_a_plain_one(dtype):
    mlp, (x, grad) = model.MLP(tiny_config()).to(dtype), randoms((5, 32), (5, 32), dtype=dtype)
    found = torch.autograd.grad(out := mlp(x), (x, *mlp.parameters()), grad)
    plain = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert_equal((out, *found), (plain, *torch.autograd.grad(plain, (x, *mlp.parameters()), grad)))


class Storages(TorchDispatchMode):
    """Every storage that appears: a weak reference to it -> (bytes, dtype)."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[StorageWeakRef(storage)] = storage.nbytes(), tensor.dtype
        return out

    def kept(self):
        """The bytes of those that are still alive."""
        return sum(size for storage, (size, _) in self.seen.items() if not storage.expired())

    def of_at_least(self, elements):
        """The dtypes of those that have so many elements."""
        return [dtype for size, dtype in self.seen.values() if size >= elements * dtype.itemsize]


@pytest.mark.parametrize("dtype, scale_bytes", [(torch.bfloat16, 4), (torch.float64, 8)])
def test_norm_keeps_a_number_per_token_and_mlp_two_wide_tensors_for_backward(dtype, scale_bytes):
    """The norm keeps a number per token beside its input; the MLP keeps gate and up."""
    (x,) = randoms((5, 32), dtype=dtype)
    mlp, norm = model.MLP(tiny_config()).to(dtype), RMSNorm(32, 0.1).to(dtype)
    for module, kept in ((norm, 5 * scale_bytes), (mlp, 2 * 5 * 48 * dtype.itemsize)):
        with Storages() as made:
            out = module(x)
        for given in (out, x, *module.parameters()):  # the weights' transposes are views of them
            made.seen.pop(StorageWeakRef(given.untyped_storage()), None)
        assert made.kept() == kept


# ------------------------------------------------------------------------------------ attention


def dense_attention(q, k, v, query_lengths, key_lengths, key_rows):
    """Softmax over each query's visible keys, head by head; the last query sees every key."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    first_query = first_key = 0
    for n_q, n_k in zip(query_lengths, key_lengths, strict=True):
        rows = key_rows[first_key : first_key + n_k]
        for head in range(q.shape[1]):
            for i in range(n_q):
                visible = rows[: n_k - n_q + i + 1]
                scores = k[visible, head // group] @ q[first_query + i, head]
                weights = torch.softmax(scores / math.sqrt(q.shape[2]), 0)
                out[first_query + i, head] = weights @ v[visible, head // group]
        first_query, first_key = first_query + n_q, first_key + n_k
    return out


def starts(lengths):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


@pytest.mark.parametrize("heads, key_heads", [(4, 2), (4, 4), (6, 1), (6, 3)])
@pytest.mark.parametrize(
    "query_lengths, key_lengths",
    [([5], [5]), ([3, 1, 4], [3, 1, 4]), ([3, 1, 4], [7, 1, 4]), ([1, 1], [1, 6])]
    + [([2, 0, 3], [6, 0, 3]), ([2, 0, 3], [2, 3, 9])],
)
def test_attention_is_softmax_over_the_visible_keys(heads, key_heads, query_lengths, key_lengths):
    rows = sum(query_lengths)
    qkv = randoms((rows, heads, 8), (rows, key_heads, 8), (rows, key_heads, 8))
    (upstream,) = randoms((rows, heads, 8), seed=1)
    key_rows = torch.randint(rows, (sum(key_lengths),), generator=torch.Generator().manual_seed(0))
    segments = Segments(starts(query_lengths), starts(key_lengths), key_rows, 9)
    found = model.attention(*qkv, segments)
    expected = dense_attention(*qkv, query_lengths, key_lengths, key_rows)
    assert_equal(found, expected, 1e-13)
    grads, wanted = (torch.autograd.grad((x * upstream).sum(), qkv) for x in (found, expected))
    assert_equal(grads, wanted, 1e-12)
    if query_lengths == key_lengths:  # without key rows the keys are the rows themselves
        found = model.attention(*qkv, Segments(segments.query_starts, segments.key_starts, None, 9))
        expected = dense_attention(*qkv, query_lengths, key_lengths, torch.arange(rows))
        assert_equal(found, expected, 1e-13)


def test_on_cuda_heads_that_the_kernel_cannot_read_go_to_the_loop(monkeypatch):
    """It reads 8 components at once, and at most 256. AMD's may be aligned otherwise."""
    calls = []
    monkeypatch.setattr(model, "varlen_attn", lambda *args, **_: calls.append(args))
    segments = Segments(starts([4, 5]), starts([4, 5]), None, 9)
    for size, hip, reads in [(12, None, 0), (264, None, 0), (8, "6.4", 0), (8, None, 1)]:
        q, k = (torch.randn(9, heads, size).bfloat16() for heads in (4, 2))
        monkeypatch.setattr(model, "on_cuda", lambda x: False)
        expected = model.attention(q, k, k, segments)
        monkeypatch.setattr(model, "on_cuda", lambda x: True)
        monkeypatch.setattr(torch.version, "hip", hip)
        found = model.attention(q, k, k, segments)
        assert len(calls) == reads and (reads or torch.equal(found, expected))


def test_on_cuda_half_types_go_to_the_variable_length_kernel_in_one_call(monkeypatch):
    """A call that this torch's own checks accept, on tensors without storage."""
    calls, kernel = [], model.varlen_attn

    def recorded(*args, **options):
        calls.append((args, options))
        return kernel(*args, **options)

    def on_cuda(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    monkeypatch.setattr(model, "varlen_attn", recorded)
    batch = pack(random_pairs([(4, 2, 3), (1, 1, 1)]), longest=32)
    n = len(batch.tokens_T)
    with FakeTensorMode():
        q, k = (on_cuda(torch.empty(n, heads, 8, dtype=torch.bfloat16)) for heads in (4, 2))
        *indexes, longest = vars(batch.segments).values()
        out = model.attention(q, k, k, Segments(*map(on_cuda, indexes), longest))
        assert (out.shape, out.dtype, out.is_cuda) == (q.shape, torch.bfloat16, True)
    (((q_arg, k_arg, v_arg, query_starts, key_starts, *longest), options),) = calls
    assert q_arg is q and k_arg.shape == v_arg.shape == (len(batch.segments.key_index_N), 2, 8)
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert len(query_starts) == len(key_starts) == 5 and longest == [32, 32]
    before_enable_gqa = torch.__version__.startswith(("2.10", "2.11"))
    grouped = {} if before_enable_gqa else {"enable_gqa": True}
    assert options == {"window_size": (-1, 0)} | grouped


# ---------------------------------------------------------------- against transformers, on disk


@torch.no_grad()
def logits_of(loaded):
    """The logits of TOKENS, of our model or of transformers'."""
    return loaded.logits(TOKENS) if isinstance(loaded, Llama) else loaded(TOKENS[None]).logits[0]


def in_transformers(directory, dtype=torch.float32):
    options = dict(dtype=dtype, attn_implementation="eager")
    return transformers.LlamaForCausalLM.from_pretrained(directory, **options)


@each_variant
def test_a_saved_model_gives_the_same_logits_in_transformers(tmp_path, changes):
    saved = save_tiny(tmp_path / "saved", **changes)
    expected = logits_of(tiny_model(**changes))
    assert expected.std() > 0.3  # far from uniform, so that an error shows
    assert_equal(logits_of(in_transformers(saved)), expected, 1e-5)
    assert_equal(logits_of(load_model(saved)), expected)


@each_variant
def test_a_model_that_transformers_saved_gives_the_same_logits_here(tmp_path, changes):
    config = tiny_config(**changes)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(config.rope_scaling)}
    fields = vars(config) | dict(eos_token_id=1, rope_parameters=rope, initializer_range=0.15)
    del fields["rope_scaling"], fields["rope_theta"]
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, attn_implementation="eager")
    )
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config
    assert_equal(logits_of(loaded), logits_of(theirs), 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_saved_in_bf16_is_its_weights_rounded_here_and_in_transformers(tmp_path, tied):
    ours = tiny_model(tie_word_embeddings=tied)
    save_model(ours, tmp_path / "saved")
    reloaded = load_model(tmp_path / "saved")
    found = dict(reloaded.named_parameters())
    for name, original in ours.named_parameters():
        assert_equal(found[name], original.bfloat16().float(), msg=name)
    theirs = in_transformers(tmp_path / "saved", "auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    half, exact = logits_of(load_model(tmp_path / "saved", torch.bfloat16)), logits_of(reloaded)
    assert half.dtype == torch.bfloat16
    error, their_error = (
        (x.float() - exact).norm() / exact.norm() for x in (half, logits_of(theirs))
    )
    # No further from fp32 than transformers' bf16 is.
    assert error < 0.03 and their_error < 0.03 and error < 1.5 * their_error


@needs_real
@torch.no_grad()
def test_a_trained_model_tells_the_story_that_its_authors_documented_for_temperature_0():
    story = (REAL / "stories260K" / "greedy.txt").read_text()
    tokenizer = Tokenizer.from_file(str(REAL / "stories260K" / "tokenizer.json"))
    trained = load_model(REAL / "stories260K")
    ids = tokenizer.encode(story, add_special_tokens=False).ids
    # If the likeliest token after every prefix is the story's next one, greedy decoding writes it.
    likeliest = trained.logits(torch.tensor([512, *ids[:-1]])).argmax(-1).tolist()
    assert len(story) == 565 and len(ids) > 200
    assert tokenizer.decode(likeliest) == story


# --------------------------------------------------------------------------------- packed pairs


def padded_logps(of_model, pairs):
    """Each response after its own copy of the prompt, padded for the portable `response_logps`."""
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
    """One number to differentiate, in which every response has a weight of its own."""
    means, sums = means_and_sums
    weight = torch.linspace(-1.0, 2.0, len(means), dtype=means.dtype)
    return (weight * means).sum() + (weight.flip(0) * sums).sum() / 10


def gradients(of_model, value):
    parameters = dict(of_model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


@pytest.mark.parametrize(
    "dtype, tolerance, relative", [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)]
)
@pytest.mark.parametrize("share_prompt", [True, False])
@each_variant
def test_packed_pairs_equal_separate_sequences(changes, share_prompt, dtype, tolerance, relative):
    """In log-probs and gradients, with prompts shared and repeated. So no pair sees its neighbours,
    and no rejected response the chosen one."""
    ours, pairs = tiny_model(dtype=dtype, **changes), random_pairs(LENGTHS)
    packed, separate = ours(pack(pairs, share_prompt)), padded_logps(ours, pairs)
    torch.testing.assert_close(packed, separate, rtol=tolerance, atol=tolerance)
    found = gradients(ours, weighted(packed))
    for name, expected in gradients(ours, weighted(separate)).items():
        error = (found[name] - expected).abs().max() / expected.abs().max()
        assert error < relative, f"{name}: {error}"


@pytest.mark.parametrize("tied", [False, True])
def test_a_bf16_forward_is_close_to_fp32_and_its_log_probs_are_fp32(tied):
    batch = pack(random_pairs(LENGTHS))
    ours, half = (
        tiny_model(dtype=dtype, tie_word_embeddings=tied)
        for dtype in (torch.float32, torch.bfloat16)
    )
    exact, found = ours(batch), half(batch)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], exact[0], rtol=0.01, atol=0.03)
    exact_gradients = gradients(ours, weighted(exact))
    for name, gradient in gradients(half, weighted(found)).items():
        expected = exact_gradients[name]
        assert (gradient.float() - expected).norm() < 0.1 * expected.norm(), name


def test_recomputing_blocks_in_backward_changes_no_number(monkeypatch):
    batch, runs, results = pack(random_pairs(LENGTHS)), [], []

    class Counted(model.MLP):
        def forward(self, x_TD):
            runs.append(1)
            return super().forward(x_TD)

    monkeypatch.setattr(model, "MLP", Counted)
    for recompute in (0, 1, 2):
        runs.clear()
        ours = tiny_model()
        ours.recompute_first(recompute)
        loss = weighted(ours(batch))
        results.append((loss, gradients(ours, loss)))
        assert len(runs) == 2 + recompute
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


# ----------------------------------------------------------------------------------------- head


def head_inputs(dtype, scored=23, vocabulary=61, width=8):
    """hidden, weight, targets, and the gradient that arrives from above."""
    hidden, weight = randoms((scored, width), (vocabulary, width), dtype=dtype)
    targets = torch.randint(vocabulary, (scored,), generator=torch.Generator().manual_seed(2))
    return hidden, weight, targets, randoms((scored,), seed=1)[0].detach()


def by_log_softmax(logits, targets):
    return F.log_softmax(logits, -1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("chunk_elements", [1, 61, 5 * 61 + 3, 2**24])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_head_is_the_log_softmax_of_the_targets(monkeypatch, dtype, tolerance, chunk_elements):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", chunk_elements)
    hidden, weight, targets, upstream = head_inputs(dtype)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    before = hidden.detach().clone(), weight.detach().clone()
    found = target_logps(hidden, weight, targets)
    expected = by_log_softmax(hidden64 @ weight64.T, targets)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad((found * upstream.to(dtype)).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * upstream).sum(), (hidden64, weight64))
    grads = tuple(grad.double() for grad in grads)
    torch.testing.assert_close(grads, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


def test_with_bf16_weights_the_log_probs_are_those_of_the_rounded_logits_in_fp32(monkeypatch):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", 200)
    hidden, weight, targets, upstream = head_inputs(torch.bfloat16)
    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    found = target_logps(hidden, weight, targets)
    rounded = (hidden.detach() @ weight.detach().T).double()
    assert found.dtype == torch.float32
    expected = by_log_softmax(rounded, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    exact = by_log_softmax(hidden64 @ weight64.T, targets)
    grads = torch.autograd.grad((found * upstream.float()).sum(), (hidden, weight))
    wanted = torch.autograd.grad((exact * upstream).sum(), (hidden64, weight64))
    for grad, expected in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_through_the_head_gives_the_gradients_of_the_first(dtype):
    hidden, weight, targets, _ = head_inputs(dtype)
    logps = target_logps(hidden, weight, targets)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    assert_equal(torch.autograd.grad(logps.sum(), (hidden, weight)), first)


without_gradients = pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])


@without_gradients
@pytest.mark.parametrize("chunk_elements", [1, 200, 2**24])
def test_without_gradients_head_and_model_give_the_same_numbers(monkeypatch, off, chunk_elements):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(model, "MATMUL_ROWS", 10)  # a chunk of 3 rows does not divide it
    hidden, weight, targets, _ = head_inputs(torch.float32)
    ours, batch = tiny_model(), pack(random_pairs(LENGTHS))
    expected = target_logps(hidden, weight, targets).detach(), ours(batch)[0].detach()
    with off():
        found = target_logps(hidden, weight, targets), ours(batch)[0]
    assert not found[0].requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Logits of 64 scored tokens over a vocabulary of 1,000, in chunks of 4.
LOGITS, CHUNK = 64_000, 4000


@without_gradients
def test_without_gradients_the_head_holds_only_a_few_rows_of_logits(off, monkeypatch):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", CHUNK)
    monkeypatch.setattr(model, "MATMUL_ROWS", 10)
    hidden, weight, targets, _ = head_inputs(torch.bfloat16, 64, 1000, width=2)
    with off(), Storages() as made:
        target_logps(hidden.detach(), torch.nn.Parameter(weight.detach()), targets)
    # Ten rows, although a chunk has four: with fewer the weights would be read too often.
    assert made.of_at_least(10_000) != [] == made.of_at_least(10_001)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_a_bf16_model_keeps_the_logits_once_and_only_a_chunk_in_fp32(monkeypatch, tied):
    monkeypatch.setattr(model, "CHUNK_ELEMENTS", CHUNK)
    sizes = dict(vocab_size=1000, hidden_size=8, head_dim=2, tie_word_embeddings=tied)
    ours, batch = tiny_model(dtype=torch.bfloat16, **sizes), pack(random_pairs([(3, 30, 34)]))
    with Storages() as made:
        ours(batch)[0].sum().backward()
    # Also their own gradient, in place.
    assert made.of_at_least(LOGITS) == [torch.bfloat16]
    assert torch.float32 not in made.of_at_least(CHUNK + 1)
    # The chunk itself: log-probs are computed in fp32.
    assert torch.float32 in made.of_at_least(CHUNK)


# -------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Saved once: an untied model, a tied one, and the untied one in shards."""
    root = tmp_path_factory.mktemp("originals")
    save_tiny(root / "whole")
    save_tiny(root / "tied", tie_word_embeddings=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 30_000)
        save_tiny(root / "sharded")
    return root


def copied(name):
    """A fixture: a copy of one of the originals, to be edited."""

    @pytest.fixture(name=name)
    def copy(originals, tmp_path):
        return shutil.copytree(originals / name, tmp_path / name)

    return copy


whole, tied, sharded = copied("whole"), copied("tied"), copied("sharded")
Q, NORM, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"


LAYERS, GATE = "num_hidden_layers", "model.layers.0.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "key, change, named",  # a tensor of the file, or a size in config.json
    [
        (Q, None, "missing"),
        (HEAD, None, "missing"),
        ("model.layers.1.mlp.bias", torch.zeros(32), "not one of"),
        ("zero", torch.tensor(0.0), "not one of"),
        (Q, torch.zeros(32, 16), "(32, 16), config.json says (32, 32)"),
        (HEAD, torch.zeros(96, 32), "(96, 32), config.json says (97, 32)"),
        (NORM, torch.tensor(1.0), "(), config.json says (32,)"),
        (NORM, torch.zeros(32, 1), "(32, 1), config.json says (32,)"),
        (Q, torch.zeros(32, 32, dtype=torch.int8), "I8"),
        (Q, torch.zeros(32, 32, dtype=torch.bool), "BOOL"),
        (Q, torch.zeros(32, 32, dtype=torch.int64), "I64"),
        (Q, torch.zeros(32, 32).to(torch.float8_e4m3fn), "F8"),
        *[(LAYERS, n, f"{LAYERS} {n}, the weights have model.layers of 2") for n in (1, 3, 4000)],
        ("vocab_size", 10**7, f"{EMBEDDING} has shape (97, 32), config.json says (10000000, 32)"),
        ("intermediate_size", 10**7, f"{GATE} has shape (48, 32), config.json says (10000000, 32)"),
    ],
    ids=str,
)
def test_weights_that_are_not_exactly_the_models_are_refused_before_memory_is_taken(
    whole, monkeypatch, key, change, named
):
    monkeypatch.setattr(model, "Llama", None)  # building a model, even on meta, is a TypeError
    size = isinstance(change, int)
    if size:
        edit_json(whole / "config.json", **{key: change})
    else:
        edit_tensors(whole / "model.safetensors", {key: change})
    started = time.monotonic()
    message = refusal(load_model, whole)
    assert time.monotonic() - started < 5
    assert str(whole) in message and named in message
    assert size or (key in message and "model.safetensors" in message)


@pytest.mark.parametrize(
    "share_kept, said",
    [(None, "No such file")] + [(0.001, "truncated")] + [(0.5, "truncated"), (0.999, "truncated")],
)
def test_a_missing_or_truncated_shard_is_refused_by_its_path(sharded, share_kept, said):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if share_kept:
        shard.write_bytes(content[: int(len(content) * share_kept)])
    message = refusal(load_model, sharded)
    assert str(shard) in message and said in message


def test_a_key_only_in_the_index_or_only_in_the_file_is_refused_by_name(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.spare.weight": weight_map[Q]})
    message = refusal(load_model, sharded)
    assert "'model.spare.weight' is" in message and "in the index" in message
    assert weight_map[Q] in message
    edit_json(index, weight_map={key: name for key, name in weight_map.items() if key != Q})
    message = refusal(load_model, sharded)
    assert f"{Q!r} is" in message and "in the file" in message and weight_map[Q] in message


def test_layers_that_are_not_numbered_from_0_are_refused(whole):
    file = whole / "model.safetensors"
    tensors = load_file(file).items()
    save_file({key.replace("layers.0.", "layers.7."): tensor for key, tensor in tensors}, file)
    assert "model.layers.0.input_layernorm.weight is missing" in refusal(load_model, whole)


def test_the_inverse_frequencies_of_old_exports_are_ignored(whole):
    expected = list(load_model(whole).parameters())
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0)}
    spare |= {"model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64)}
    edit_tensors(whole / "model.safetensors", spare)
    assert_equal(list(load_model(whole).parameters()), expected)


def test_a_tied_model_may_bring_its_embedding_again_as_its_head_but_not_another(tied):
    file, expected = tied / "model.safetensors", logits_of(load_model(tied))
    embedding = load_file(file)["model.embed_tokens.weight"].clone()
    edit_tensors(file, {HEAD: embedding.clone()})
    assert_equal(logits_of(load_model(tied)), expected)
    edit_tensors(file, {HEAD: embedding + 1e-3})
    message = refusal(load_model, tied)
    assert "model.safetensors: lm_head.weight differs" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_tied_model_with_a_spare_head_of_another_shape_is_refused(tied, rows):
    """With more rows than the embedding it would be another head."""
    file = tied / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    edit_tensors(file, {HEAD: embedding.repeat(rows, 1)[:rows]})
    assert f"{HEAD} has shape ({rows}, " in refusal(load_model, tied)


@pytest.mark.parametrize("name", ["whole", "tied"])
def test_a_process_whose_share_of_the_rows_is_empty_loads_nothing(name, request, monkeypatch):
    """The last of many: 48 processes share Llama 3's 1,024 key rows as 46 times 22, 12 and none."""
    directory = request.getfixturevalue(name)
    file = directory / "model.safetensors"
    edit_tensors(file, {HEAD: load_file(file)["model.embed_tokens.weight"].clone()})
    end = lambda tensor: (tensor[len(tensor) :], slice(len(tensor), len(tensor)))  # noqa: E731
    monkeypatch.setattr(model, "local_rows", end)
    ours = tiny_model(tie_word_embeddings=name == "tied")
    before = [parameter.clone() for parameter in ours.parameters()]
    model.load_weights(ours, directory)
    assert_equal(list(ours.parameters()), before)


def test_a_file_without_a_tensor_is_named_as_such(whole):
    save_file({}, whole / "model.safetensors")
    assert "is missing from files that hold no tensor" in refusal(load_model, whole)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_float_type_are_converted(whole, stored, asked):
    original = {key: x.clone() for key, x in load_file(whole / "model.safetensors").items()}
    edit_tensors(whole / "model.safetensors", dict.fromkeys(original, lambda x: x.to(stored)))
    for key, parameter in load_model(whole, asked).named_parameters():
        assert_equal(parameter.detach(), original[key].to(stored).to(asked))


# --------------------------------------------------------------------------------------- saving


def test_a_large_model_is_saved_in_shards_with_an_index_that_transformers_and_we_read(originals):
    saved = originals / "sharded"
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    n = len(files)
    assert n > 2 and files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = read_json(saved / "model.safetensors.index.json")
    held = {name: load_file(saved / name) for name in files}
    assert index["weight_map"] == {key: name for name, tensors in held.items() for key in tensors}
    sizes = [sum(4 * t.numel() for t in tensors.values()) for tensors in held.values()]
    # Embedding and head; two blocks of 2 norms, q and o, k and v, three of the MLP; the last norm.
    by_hand = 4 * (2 * 97 * 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 32)
    assert index["metadata"]["total_size"] == sum(sizes) == by_hand
    assert max(sizes) <= 30_000
    expected = logits_of(tiny_model())
    assert_equal(logits_of(load_model(saved)), expected)
    assert_equal(logits_of(in_transformers(saved)), expected, 1e-5)


def test_a_tensor_larger_than_a_file_should_be_gets_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    saved = save_tiny(tmp_path / "saved")
    held = [list(load_file(path)) for path in saved.glob("*.safetensors")]
    assert sorted(held) == sorted([key] for key, _ in tiny_model().named_parameters())


def test_every_saved_file_says_that_it_is_pytorchs_and_all_may_read_it(originals):
    for path in originals.glob("*/*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_tied_head_is_saved_once_as_the_embedding(originals):
    keys = load_file(originals / "tied" / "model.safetensors").keys()
    assert HEAD not in keys and "model.embed_tokens.weight" in keys
    assert read_json(originals / "tied" / "config.json")["tie_word_embeddings"] is True
    assert HEAD in load_file(originals / "whole" / "model.safetensors")


def test_a_save_that_fails_midway_leaves_no_model_and_can_be_tried_again(tmp_path, monkeypatch):
    written, saved = [], tmp_path / "saved"

    def full_disk(tensors, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 10_000)
        patch.setattr(export, "save_file", full_disk)
        with pytest.raises(InputError, match="model-00003-of-000.*No space left"):
            save_tiny(saved)
    assert len(written) == 2 and not saved.exists()
    # The next try has fewer shards: none of those that the first left behind may be among them.
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    save_tiny(saved)
    assert list(tmp_path.iterdir()) == [saved]
    assert len({path.name[-17:] for path in saved.glob("*.safetensors")}) == 1  # one "of-0000n"
    load_model(saved)


def test_a_model_is_never_saved_over_a_directory_that_exists(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in refusal(save_model, tiny_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_processes_do_not_look_for_the_directory_that_process_0_may_have_made(
    tmp_path, monkeypatch
):
    process_1 = dict(is_initialized=lambda: True, get_rank=lambda: 1, barrier=lambda: None)
    for name, says in process_1.items():
        monkeypatch.setattr(export.dist, name, says)
    monkeypatch.setattr(export, "on_first_process", lambda action: False)  # it was not there
    save_model(tiny_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_and_generation_files_are_copied_byte_for_byte_and_nothing_else_is(tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    companions = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    companions += ["special_tokens_map.json", "generation_config.json"]
    companions += ["vocab.json", "merges.txt", "added_tokens.json"]
    companions += ["chat_template.jinja", "chat_template.json"]
    others = ["README.md", "pytorch_model.bin", "model-00001-of-00002.safetensors", "modeling.py"]
    for name in companions + others:
        (source / name).write_bytes(b"\xff\r\n" + name.encode())
    with pytest.raises(InputError, match="config.json: No such file"):  # it was moved meanwhile
        save_model(tiny_model(), tmp_path / "half", source=source)
    (source / "config.json").write_text("{}")
    save_model(tiny_model(), saved, source=source)
    found = {path.name for path in saved.iterdir()}
    assert found == {*companions, "config.json", "model.safetensors"}
    for name in companions:
        assert (saved / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("pad", [96, 97])
def test_a_pad_token_beyond_the_vocabulary_is_left_out_of_an_export(tmp_path, capsys, pad):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(f'{{"pad_token_id": {pad}}}')
    save_model(tiny_model(), tmp_path / "saved", source=source)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert ("pad_token_id" in read_json(tmp_path / "saved/config.json")) == (pad < 97)
    assert ("left out: pad_token_id 97" in capsys.readouterr().out) == (pad == 97)


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
    """A base model's files name only the end of a text: other programs would write on."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "config.json").write_text("{}")
    if generation is not None:
        (source / "generation_config.json").write_text(generation)
    save_model(tiny_model(eos_token_id=config), saved, source=source, stop_ids=[95])
    assert set(LlamaConfig.load(saved).eos_token_id) == {95, *config}
    if generation is None:
        assert not (saved / "generation_config.json").exists()
    else:
        text = (saved / "generation_config.json").read_text()
        assert json.loads(text) == json.loads(generation) | {"eos_token_id": ids}
        assert (text == generation) == ("[95, 96]" in generation)  # untouched if none is missing


def test_saving_leaves_the_model_as_it_was(tmp_path):
    ours = tiny_model()
    save_model(ours, tmp_path / "saved")
    assert_equal(list(ours.parameters()), list(tiny_model().parameters()))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())


def test_the_names_of_the_parameters_are_the_keys_of_transformers():
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RAW)).state_dict()
    ours = Llama(LlamaConfig.from_dict(RAW)).state_dict()
    shapes, their_shapes = ({key: x.shape for key, x in d.items()} for d in (ours, theirs))
    assert shapes == their_shapes
