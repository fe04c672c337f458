"""Llama 3 in plain PyTorch, over packed preference pairs: configuration, blocks, head, loading and saving.

In reading order
    InputError          what every file raises for a user's mistake
    read_start ... shown    reading files that may hold anything
    LlamaConfig         config.json, read strictly: what is not implemented here is refused by name
    Segments, attention which packed rows attend to which; one function for every device
    rope_tables, rotate rotary positions, with Llama 3.1's frequency scaling
    Cache, Past         keys and values of sequences in the making, for generation alone
    RMSNorm, Attention, MLP, Block
    target_logps        the head: log-probs of the scored tokens without fp32 logits
    PackedLinear        a linear layer for generation on a CPU
    Llama               module names are the checkpoint's keys, so there is no name map
    load_model, load_weights, save_model    Hugging Face directories, whole or one rank's rows of them

The model has no padding, no attention mask and no batch axis: everything is a row of T packed tokens, and `Segments`
says where the sequences are. (A step of generation alone has rows, and a mask over their cache.) Norms, rotary tables
and log-probs are computed in fp32 whatever the weights are (float64 stays).

Left out: dropout (Llama 3 has none), attention and MLP biases, rope types other than Llama 3's, quantised weights,
Meta's own consolidated.*.pth layout (its q and k rows are in another order).
"""

import inspect
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from asft import at_least_fp32
from support.files import InputError, flush, naming, read_json, shown
from support.tensors import finite, local_rows, open_safetensors

# ----------------------------------------------------------------------------------------------------------- reading


# ---------------------------------------------------------------------------------------------------- configuration

# Keys of config.json with one acceptable meaning. A checkpoint that says otherwise would load and compute nonsense.
ONLY = {
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "attention_dropout": [0],
    "quantization_config": [None],
    "partial_rotary_factor": [1],
    "sliding_window": [None],
}
# Whole numbers are below 2**24, but for two: --plan builds every layer before any file could contradict it, and no
# tensor may have 2**63 bytes. The largest Llama has 126 layers, and heads of 128.
MOST = {"num_hidden_layers": 2**12, "head_dim": 2**12}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of long wavelengths (rope type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that matter, under its own names."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # K
    max_position_embeddings: int  # tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: str | Path) -> "LlamaConfig":
        """Reads directory/config.json. Raises InputError naming the file and the key."""
        return cls.from_dict(
            read_json(Path(directory) / "config.json"), Path(directory) / "config.json"
        )

    @classmethod
    def from_dict(cls, raw: dict, where: str | Path = "config") -> "LlamaConfig":
        """Checks a parsed config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        if not isinstance(raw, dict) or raw.get("model_type") != "llama":
            found = raw.get("model_type") if isinstance(raw, dict) else raw
            raise InputError(f"{where}: model_type is {shown(found)}, wanted 'llama'")
        for key, accepted in ONLY.items():
            if key in raw and raw[key] not in accepted:
                found = shown(raw[key])
                raise InputError(
                    f"{where}: {key} is {found}, which is not implemented; wanted {accepted[0]!r}"
                )

        def number(key: str, kind: type, default=None, source: dict = raw):
            value = source.get(key, default)
            value = default if value is None else value
            ok = isinstance(value, int if kind is int else (int, float)) and not isinstance(
                value, bool
            )
            limit = MOST.get(key, 2**24 if kind is int else 2**40)
            if not ok or not 0 < value < limit:
                raise InputError(
                    f"{where}: {key} is {shown(value)}, wanted a positive "
                    f"{'whole ' * (kind is int)}number below {limit:,}"
                )
            return kind(value)

        tie = raw.get("tie_word_embeddings", False)
        if not isinstance(tie, bool):
            raise InputError(f"{where}: tie_word_embeddings is {shown(tie)}, wanted true or false")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": f"{shown(rope)}, not an object"}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise InputError(
                f"{where}: rope type {shown(rope_type)} is not implemented; wanted 'default' or 'llama3'"
            )
        scaling = None
        if rope_type == "llama3":
            kinds = RopeScaling.__annotations__.items()
            scaling = RopeScaling(*(number(key, kind, source=rope) for key, kind in kinds))
            if (
                scaling.low_freq_factor >= scaling.high_freq_factor
            ):  # between them `rope_frequencies` blends
                raise InputError(
                    f"{where}: low_freq_factor is {scaling.low_freq_factor}, wanted less than "
                    f"high_freq_factor, {scaling.high_freq_factor}"
                )
        heads, width = number("num_attention_heads", int), number("hidden_size", int)
        if raw.get("head_dim") is None and width % heads:
            raise InputError(
                f"{where}: hidden_size ({width}) is not a multiple of num_attention_heads ({heads}), and "
                "there is no head_dim"
            )
        config = cls(
            vocab_size=number("vocab_size", int),
            hidden_size=width,
            intermediate_size=number("intermediate_size", int),
            num_hidden_layers=number("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", int, heads),
            head_dim=number("head_dim", int, width // heads),
            max_position_embeddings=number("max_position_embeddings", int),
            rms_norm_eps=number(
                "rms_norm_eps", float, 1e-6
            ),  # without the key, these two are transformers' defaults
            rope_theta=number(
                "rope_theta", float, 10_000.0, raw if rope.get("rope_theta") is None else rope
            ),
            rope_scaling=scaling,
            tie_word_embeddings=tie,
            bos_token_id=next(iter(token_ids(raw, "bos_token_id", where)), None),
            eos_token_id=token_ids(raw, "eos_token_id", where),
        )
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise InputError(
                f"{where}: wanted num_attention_heads ({heads}) to be a multiple of num_key_value_heads "
                f"({config.num_key_value_heads}), and head_dim ({config.head_dim}) to be even"
            )
        return config

    def to_dict(self, dtype: torch.dtype) -> dict:
        """What config.json holds for weights of `dtype`, in the form that transformers 4 and 5 and vLLM read."""
        scaling = (
            None
            if self.rope_scaling is None
            else {"rope_type": "llama3", **vars(self.rope_scaling)}
        )
        eos = (
            self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None
        )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **vars(self),
            "eos_token_id": eos,
            "rope_scaling": scaling,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


def token_ids(raw: dict, key: str, where: str | Path) -> tuple[int, ...]:
    """What a configuration has under a key: a token id, a list of them, or none."""
    value = raw.get(key)
    value = [] if value is None else value if isinstance(value, list) else [value]
    if not all(
        type(i) is int and 0 <= i < 2**31 for i in value
    ):  # type(), since JSON's true is an int to isinstance
        raise InputError(
            f"{where}: {key} is {shown(raw[key])}, wanted a token id or a list of them"
        )
    return tuple(value)


# -------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Segments:
    """Which packed rows attend to which. Segment i's queries are rows query_starts[i] : query_starts[i+1], its keys the
    rows named by key_row_N[key_starts[i] : key_starts[i+1]]; causal, aligned at the last query and the last key.

    A pair [prompt, chosen, rejected] is two segments: prompt+chosen attends to itself, rejected to prompt ++ rejected.
    """

    query_starts: Tensor  # int32, number of segments + 1
    key_starts: Tensor  # int32, the same length
    key_row_N: Tensor | None  # int64 packed rows; None where the keys are the rows themselves
    longest: int  # an upper bound of every segment's keys. Constant over a run: compiled kernels specialise on it

    def to(self, device: torch.device | str) -> "Segments":
        rows = None if self.key_row_N is None else self.key_row_N.to(device)
        return Segments(
            self.query_starts.to(device), self.key_starts.to(device), rows, self.longest
        )


# torch 2.11 groups query heads unasked; 2.13 refuses unequal head counts unless told.
VARLEN_GQA = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def on_cuda(x: Tensor) -> bool:
    """Whether x is on CUDA, or stands for what is: train.py --plan simulates it with fake tensors."""
    return x.is_cuda or isinstance(x, FakeTensor)


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments) -> Tensor:
    """Softmax attention within each segment; returns (T, H, K). Query head h reads key head h // (H / G).

    The loop over `scaled_dot_product_attention` defines the result; CUDA's variable-length flash kernel, which takes
    half types only, must equal it up to rounding (tests/test_cuda.py). Causal means bottom-right aligned: SDPA's own
    `is_causal` is aligned at the top left where the lengths differ, which would show a rejected token its first prompt
    tokens alone.
    """
    if segments.key_row_N is not None:
        # index_select, since its backward is one index-add; indexing with [] would sort.
        k_TGK, v_TGK = (
            k_TGK.index_select(0, segments.key_row_N),
            v_TGK.index_select(0, segments.key_row_N),
        )
    if on_cuda(q_THK) and q_THK.dtype in (torch.bfloat16, torch.float16):
        return varlen_attn(
            q_THK,
            k_TGK,
            v_TGK,
            segments.query_starts,
            segments.key_starts,
            segments.longest,
            segments.longest,
            window_size=(-1, 0),
            **VARLEN_GQA,
        )
    query_lengths, key_lengths = (
        segments.query_starts.diff().tolist(),
        segments.key_starts.diff().tolist(),
    )
    outputs = []
    for q, k, v in zip(
        q_THK.split(query_lengths), k_TGK.split(key_lengths), v_TGK.split(key_lengths), strict=True
    ):
        n_q, n_k = len(q), len(k)
        mask = (
            None
            if n_q == n_k
            else torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        )
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def rope_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angle per position, fp32, one for each of the K/2 rotated pairs; with Llama 3.1's scaling where the config has
    it."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**half
    if (scaling := config.rope_scaling) is None:
        return frequency
    # Wavelengths beyond the original context are stretched by `factor`, short ones kept, the range between blended.
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rope_tables(config: LlamaConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, 1, K/2), fp32. Computed anew each forward pass (it is cheap) rather than kept as a
    buffer, which a model built on the meta device would have to remember to fill."""
    angles = positions_T[:, None, None].float() * rope_frequencies(config, positions_T.device)
    return angles.cos(), angles.sin()


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates component i with component i + K/2: the order of the Hugging Face layout. fp32 inside, x's dtype
    outside."""
    first, second = x_THK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        x_THK.dtype
    )


# ------------------------------------------------------------------------------------------------------------- cache


# ------------------------------------------------------------------------------------------------------------ blocks


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) in fp32, cast back, then scaled, keeping x and one number a row for backward: autograd would keep the
    normed rows as well, and of a half type an fp32 copy of x.

    With n = x / rms(x) and g the gradient of n, that of x is (g - n mean(g n)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = at_least_fp32(x_TD)
        scale_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return weight_D * (x * scale_T1).to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        normed_TD = at_least_fp32(x_TD) * scale_T1
        product_TD = grad_TD * normed_TD
        mean_T1 = (product_TD * weight_D).mean(-1, keepdim=True)
        gradient_TD = (grad_TD * at_least_fp32(weight_D) - normed_TD * mean_T1) * scale_T1
        return gradient_TD.to(x_TD.dtype), product_TD.sum(0).to(weight_D.dtype), None


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, *then* scaled: the order matters in bf16, and it is Llama's."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return _RMSNorm.apply(x_TD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments | None,
        attend: Callable = attention,
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_THK, k_TGK, v_TGK = (
            project(x_TD).unflatten(-1, (-1, self.head_dim)) for project in projections
        )
        out_THK = attend(rotate(q_THK, *rope), rotate(k_TGK, *rope), v_TGK, segments)
        return self.o_proj(out_THK.flatten(-2))


class _SwiGLU(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, keeping gate and up alone of the wide rows for backward, which makes the other two
    again without a matrix product: autograd would keep silu(gate) and the weight's input as well."""

    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF, weight_DF)
        return (F.silu(gate_TF) * up_TF) @ weight_DF.T

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        gate_TF, up_TF, weight_DF = ctx.saved_tensors
        silu_TF, grad_TF = F.silu(gate_TF), grad_TD @ weight_DF
        gate_grad_TF = torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF)
        return gate_grad_TF, grad_TF * silu_TF, grad_TD.T @ (silu_TF * up_TF)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_proj(x_TD), self.up_proj(x_TD)
        if torch.is_grad_enabled():
            return _SwiGLU.apply(gate_TF, up_TF, self.down_proj.weight)
        return self.down_proj(F.silu(gate_TF) * up_TF)  # which may be a PackedLinear


class Block(nn.Module):
    """A layer: pre-norm attention and pre-norm MLP, each added to the residual."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments | None,
        attend: Callable = attention,
    ) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, segments, attend)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


# -------------------------------------------------------------------------------------------------------------- head

# Logits that exist in fp32 at one time: on a CPU what stays in its cache, on a GPU what keeps it busy (1 GiB).
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA = 2**20, 2**28
MATMUL_ROWS = 256  # and of one matrix product at the least: fewer read the weights more often than they use them


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target]. What is kept for backward is the logits' gradient, up to a factor a row.

    With m the largest logit of a row and Z = sum exp(logits - m), d logp / d logits = onehot - exp(logits - m) / Z. So
    the logits are overwritten, in place and in their own dtype, by exp(logits - m), less Z at the target; -grad / Z,
    one number a row, is multiplied in on the small side of backward's two matrix products.
    """

    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, target_S: Tensor, keep: bool) -> Tensor:
        chunk = max(
            1, (CHUNK_ELEMENTS_CUDA if on_cuda(hidden_SD) else CHUNK_ELEMENTS) // len(weight_VD)
        )
        rows = len(target_S) if keep else max(chunk, MATMUL_ROWS // chunk * chunk)
        logp_S, scale_S = [], []
        for i in range(0, len(target_S), chunk):
            target_C1 = target_S[i : i + chunk, None]
            if i % rows == 0:
                logits_SV = hidden_SD[i : i + rows] @ weight_VD.T
            kept_CV = logits_SV[i % rows : i % rows + chunk]
            exp_CV = at_least_fp32(
                kept_CV
            )  # a copy where the weights are of a half type, else the logits themselves
            top_C1 = exp_CV.amax(-1, keepdim=True)
            logit_C1 = exp_CV.gather(-1, target_C1)
            total_C1 = exp_CV.sub_(top_C1).exp_().sum(-1, keepdim=True)
            logp_S.append((logit_C1 - top_C1 - total_C1.log())[:, 0])
            if keep:
                scale_S.append(-1 / total_C1[:, 0])
                exp_CV.scatter_add_(-1, target_C1, -total_C1)
                if exp_CV.dtype != kept_CV.dtype:
                    kept_CV.copy_(exp_CV)
        if keep:
            ctx.save_for_backward(hidden_SD, weight_VD, logits_SV, torch.cat(scale_S))
        return torch.cat(logp_S)

    @staticmethod
    def backward(ctx, grad_S: Tensor):
        hidden_SD, weight_VD, scaled_SV, scale_S = ctx.saved_tensors
        factor_S1 = (grad_S * scale_S)[:, None]
        grad_SD = ((scaled_SV @ weight_VD) * factor_S1).to(hidden_SD.dtype)
        return grad_SD, scaled_SV.T @ (hidden_SD * factor_S1).to(hidden_SD.dtype), None, None


def target_logps(hidden_SD: Tensor, weight_VD: Tensor, target_S: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target]: (S,), fp32 for fp32 and bf16 weights, float64 for float64.

    Holds S x V numbers once, in the dtype of the weights, and no fp32 copy of them beyond a chunk; three matrix
    products, nothing recomputed. Where no gradient is wanted it holds a few rows alone. Not for training in fp16, whose
    range ends at 65,504: Z may be as large as V.
    """
    keep = torch.is_grad_enabled() and (hidden_SD.requires_grad or weight_VD.requires_grad)
    return _TargetLogps.apply(hidden_SD, weight_VD, target_S, keep)


class Head(nn.Linear):
    """An untied head. A module with a weight of its own, so that it is sharded and gathered like any other."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden_SD: Tensor, target_S: Tensor | None = None) -> Tensor:
        """Log-probs of the targets; without targets, the logits."""
        return (
            super().forward(hidden_SD)
            if target_S is None
            else target_logps(hidden_SD, self.weight, target_S)
        )


# ------------------------------------------------------------------------------------------------------------- model


class Llama(nn.Module):
    """Llama 3. Calling it on a packed batch gives what every loss takes: the log-probs of each response."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = (
            False  # True: keep each block's input alone and recompute the block in backward
        )
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        # A tied model has no head of its own, rather than an alias of the embedding that conversions may break.
        self.lm_head = None if config.tie_word_embeddings else Head(config)

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """batch: a data.Batch. Returns mean_R and sum_R, the mean and summed log-prob of each response in nats, at
        least fp32.

        Responses 2i and 2i+1 are the chosen and the rejected one of pair i. The packed equal of asft.response_logps.
        """
        hidden_TD = self.hidden(batch.tokens_T, batch.positions_T, batch.segments)
        logp_S = self.head(hidden_TD.index_select(0, batch.scored_row_S), batch.target_S)
        sum_R = logp_S.new_zeros(len(batch.length_R)).index_add(0, batch.response_S, logp_S)
        return sum_R / batch.length_R, sum_R

    def logits(self, tokens_T: Tensor) -> Tensor:
        """Logits (T, V) of one plain sequence, in the dtype of the weights: row t predicts token t+1."""
        ends = torch.tensor([0, len(tokens_T)], dtype=torch.int32, device=tokens_T.device)
        positions_T = torch.arange(len(tokens_T), device=tokens_T.device)
        return self.head(
            self.hidden(tokens_T, positions_T, Segments(ends, ends, None, len(tokens_T)))
        )

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        segments: Segments | None,
        attends: Sequence[Callable] | None = None,
    ) -> Tensor:
        x_TD = self.model["embed_tokens"](tokens_T)
        rope = rope_tables(self.config, positions_T)
        layers = self.model["layers"]
        for block, attend in zip(layers, attends or [attention] * len(layers), strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, rope, segments, use_reentrant=False)
            else:
                x_TD = block(x_TD, rope, segments, attend)
        return x_TD

    def head(self, hidden_SD: Tensor, target_S: Tensor | None = None) -> Tensor:
        hidden_SD = self.model["norm"](hidden_SD)
        if self.lm_head is not None:
            return self.lm_head(hidden_SD, target_S)
        weight_VD = self.model["embed_tokens"].weight
        return (
            F.linear(hidden_SD, weight_VD)
            if target_S is None
            else target_logps(hidden_SD, weight_VD, target_S)
        )


# -------------------------------------------------------------------------------------------------- loading and saving

FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that can be weights
SHARD_BYTES = 5_000_000_000
COMPANIONS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
]  # copied beside saved weights


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llama:
    """A whole model from a Hugging Face directory, strictly: see `load_weights` for what is refused."""
    config = LlamaConfig.load(directory)
    check_weights(
        directory, config
    )  # before anything of the size that config.json asks for is allocated
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a checkpoint, without building the model."""
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    queries, ffn = config.num_attention_heads * config.head_dim, config.intermediate_size
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    return (
        shapes
        if config.tie_word_embeddings
        else shapes | {"lm_head.weight": (config.vocab_size, width)}
    )


def check_weights(directory: str | Path, config: LlamaConfig) -> dict[str, Path]:
    """Where each key lies: key -> file. Reads headers alone, and refuses (InputError) a directory in which not every
    expected key is there once, in the right shape and in a floating dtype, or in which anything else is, but for
    `rotary_emb.inv_freq` (old exports have it; it is derived) and the spare `lm_head.weight` of a tied model."""
    files, found = _weight_files(Path(directory)), {}
    for path, keys in files.items():
        with open_safetensors(path) as file:
            there = set(file.keys())
            if keys is not None and there != keys:
                odd = sorted(there ^ keys)[0]
                raise InputError(
                    f"{path}: key {shown(odd)} is in the {'index' if odd in keys else 'file'} alone"
                )
            for key in there:
                if not key.endswith("rotary_emb.inv_freq"):
                    found[key] = (
                        path,
                        tuple(file.get_slice(key).get_shape()),
                        file.get_slice(key).get_dtype(),
                    )
    layers = len({key.split(".")[2] for key in found if key.startswith("model.layers.")})
    if layers != config.num_hidden_layers:
        raise InputError(
            f"{directory}: config.json says num_hidden_layers {config.num_hidden_layers}, "
            f"the weights have model.layers of {layers}"
        )
    expected = expected_shapes(config)
    for key, shape in expected.items():
        if key not in found:
            raise InputError(
                f"{directory}: key {key} is missing from {', '.join(p.name for p in list(files)[:4])}"
            )
        path, found_shape, dtype = found[key]
        if found_shape != shape:
            raise InputError(
                f"{path}: key {key} has shape {shown(found_shape)}, config.json wants {shape}"
            )
        if dtype not in FLOATS:
            raise InputError(
                f"{path}: key {key} is stored as {dtype}, wanted one of {', '.join(sorted(FLOATS))}"
            )
    spare = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if extra := sorted(found.keys() - expected.keys() - spare):
        raise InputError(
            f"{found[extra[0]][0]}: key {shown(extra[0])} is not one of this model's ({len(extra)} such)"
        )
    return {key: path for key, (path, _, _) in found.items()}


@torch.no_grad()
def load_weights(model: Llama, directory: str | Path) -> None:
    """Fills `model` from a Hugging Face directory: model.safetensors, or model.safetensors.index.json and its shards.

    Whole tensors, or, where a parameter is sharded (DTensor), this rank's own rows alone: no full copy anywhere, no
    broadcast. The stored dtype is converted to the parameter's. Raises InputError, naming file and key, for all that
    `check_weights` refuses, for a NaN or an infinity, and where a tied model's spare `lm_head.weight` differs from its
    embedding.
    """
    places = check_weights(directory, model.config)
    parameters = dict(model.named_parameters())
    for path in dict.fromkeys(places.values()):
        with open_safetensors(path) as file:
            for key in (
                key for key, place in places.items() if place == path and key in parameters
            ):
                local, rows = local_rows(parameters[key])
                local.copy_(file.get_slice(key)[rows])
                if not finite(local):
                    raise InputError(f"{path}: key {key} holds a NaN or an infinity")
    if model.lm_head is None and "lm_head.weight" in places:
        local, rows = local_rows(parameters["model.embed_tokens.weight"])
        with open_safetensors(places["lm_head.weight"]) as file:
            if not torch.equal(file.get_slice("lm_head.weight")[rows].to(local), local):
                raise InputError(
                    f"{places['lm_head.weight']}: lm_head.weight differs from model.embed_tokens.weight, "
                    "but config.json says tie_word_embeddings"
                )


def save_model(
    model: Llama,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    source: str | Path | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a Hugging Face model directory that transformers and vLLM load; every rank of a sharded model must call
    it.

    Weights in `dtype`, in files of at most 5 GB with an index where there are several; tokenizer and generation files
    are copied from `source`. The eos_token_id of config.json and generation_config.json gains what it lacks of
    `stop_ids`: a base model's ends texts, and an answer trained to end with its turn would run on. Written to a
    directory aside, flushed, and renamed when whole: `directory` never holds half a model. Rank 0 writes, and holds one
    file's tensors at a time. Raises InputError where `directory` exists, cannot be written, or would hold a NaN or an
    infinity.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} exists; a model is saved to a fresh directory")
    writer = not dist.is_initialized() or dist.get_rank() == 0
    aside = directory.with_name(f".{directory.name}.partial")
    files, used = [[]], 0
    for key, parameter in model.named_parameters():
        size = parameter.numel() * dtype.itemsize
        if files[-1] and used + size > SHARD_BYTES:
            files.append([])
            used = 0
        files[-1].append((key, parameter))
        used += size
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = ["model.safetensors"] if len(files) == 1 else names
    if writer:
        shutil.rmtree(aside, ignore_errors=True)
        with naming(aside):
            aside.mkdir(parents=True)
    for name, parameters in zip(names, files, strict=True):
        tensors = {}
        for key, parameter in parameters:
            tensor = parameter.detach().to(dtype)
            tensor = (
                tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            )  # a collective: on every rank
            if not finite(tensor):  # found alike on every rank
                raise InputError(f"{directory}: {key} holds a NaN or an infinity; not saved")
            if writer:
                tensors[key] = tensor.cpu().contiguous()
        if writer:
            with naming(aside / name):
                save_file(tensors, aside / name, metadata={"format": "pt"})
                (aside / name).chmod(
                    0o644
                )  # like the files beside it; safetensors makes it the owner's alone
    if writer:
        with naming(aside):
            (aside / "config.json").write_text(
                json.dumps(model.config.to_dict(dtype), indent=2) + "\n"
            )
            if len(files) > 1:
                index = {
                    "metadata": {
                        "total_size": sum(p.numel() * dtype.itemsize for p in model.parameters())
                    },
                    "weight_map": {
                        key: name
                        for name, part in zip(names, files, strict=True)
                        for key, _ in part
                    },
                }
                (aside / "model.safetensors.index.json").write_text(
                    json.dumps(index, indent=2) + "\n"
                )
            for name in COMPANIONS:
                if source is not None and (Path(source) / name).is_file():
                    shutil.copyfile(Path(source) / name, aside / name)
            for path in (aside / "config.json", aside / "generation_config.json"):
                if stop_ids and path.exists():
                    add_stop_ids(path, stop_ids)
            for path in [*aside.iterdir(), aside]:
                flush(path)
            aside.rename(directory)
            flush(directory.parent)
    if dist.is_initialized():
        dist.barrier()


def add_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Gives the eos_token_id of a JSON file what it lacks of these ids; a file that lacks none stays as it is."""
    raw = read_json(path)
    eos = token_ids(raw, "eos_token_id", path)
    if more := [i for i in stop_ids if i not in eos]:
        path.write_text(json.dumps(raw | {"eos_token_id": [*eos, *more]}, indent=2) + "\n")


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Weight file -> the keys its index gives it (None: a single file, without index)."""
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        return {directory / "model.safetensors": None}
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(x, str) for x in weight_map.values())
    ):
        raise InputError(f"{index_path}: wanted a weight_map of key to file name")
    files: dict[Path, set[str] | None] = {}
    for key, name in weight_map.items():
        # The name alone: the file may be a link to anywhere, as in Hugging Face's cache, which the user's own disk has.
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise InputError(
                f"{index_path}: key {shown(key)} lies in {shown(name)}, wanted the name of a .safetensors "
                "file in the same directory"
            )
        files.setdefault(directory / name, set()).add(key)
    return files
