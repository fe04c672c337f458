"""Llama 3 in plain PyTorch, over packed preference pairs.

In reading order
    RopeScaling, LlamaConfig        config.json, read strictly
    Segments, Batch, attention      the packed sequence, and which of its tokens attend to which
    rope_tables, rotate             rotary positions, with Llama 3.1's frequency scaling
    RMSNorm, Attention, MLP, Block  a layer
    target_logps, Head              log-probs of the scored tokens; their logits are kept once
    Llama                           the model; its module names are the checkpoint's keys
    load_model ... load_weights     Hugging Face directories, whole or this process's share
                                    (support/export.py writes them)

There is no padding, no padding mask and no batch axis: a batch is one sequence of T packed
tokens, and Segments says which of them attend to which. Norms, rotary tables and log-probs are
computed in fp32 whatever the weights are (float64 stays float64, except for the tables). Shape
letters are those of asft.py: T tokens, S scored ones, D width, H heads of size K, and so on.

Left out: dropout (Llama 3 has none), attention and MLP biases, rope types other than Llama 3's,
quantised weights, Meta's own consolidated.*.pth layout (its q and k rows are in another order).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from asft import at_least_fp32
from support.files import InputError
from support.llama_config import checked_config, config_json, read_config
from support.operations import gated_product, rms_norm
from support.processes import announced
from support.tensors import (
    check_headers,
    finite,
    flash_reads,
    local_rows,
    moved,
    on_cuda,
    open_safetensors,
    tensor_headers,
)

# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of long wavelengths (rope type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that matter, under its own names. Optional ones have transformers'
    defaults, except that token ids default to none."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # K
    max_position_embeddings: int  # tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: str | Path) -> "LlamaConfig":
        """Reads directory/config.json. Raises InputError naming the file and the key."""
        raw, path = read_config(directory)
        return cls.from_dict(raw, path)

    @classmethod
    def from_dict(cls, raw: dict, where: str | Path = "config") -> "LlamaConfig":
        """Checks a parsed config.json. Raises InputError for all that is not implemented here."""
        fields = checked_config(raw, where)
        scaling = fields.pop("rope_scaling")
        return cls(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)

    def to_dict(self, dtype: torch.dtype) -> dict:
        """The content of config.json for weights of `dtype`."""
        return config_json(asdict(self), str(dtype).removeprefix("torch."))


# ----------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Segments:
    """Which packed tokens attend to which.

    Segment i's queries are the tokens query_starts[i] : query_starts[i+1]. Its keys are the tokens
    at the indexes key_index_N[key_starts[i] : key_starts[i+1]]. Attention is causal and aligned at
    the bottom right: the last query sees all keys, the one before it all but the last, and so on.

    A pair [prompt, chosen, rejected] is two segments. With prompt a b, chosen c d, rejected e f:

        index          0 1 2 3 4 5
        token          a b c d e f
        position       0 1 2 3 2 3
        queries        0 1 2 3   | 4 5
        keys           0 1 2 3   | 0 1 4 5

    In the Batch of this pair, below:

        scored_index   1 2       | 1 4        the token whose output predicts ...
        target         c d       | e f        ... this one
    """

    query_starts: Tensor  # int32, (segments + 1,)
    key_starts: Tensor  # int32, (segments + 1,)
    key_index_N: Tensor | None  # int64; None if the keys are the queries' own tokens
    # No segment has more keys than this. Blocks are compiled anew for each value, so all batches
    # of a run have the same: --max-tokens.
    longest: int

    def to(self, device: torch.device | str) -> "Segments":
        """A copy on `device`."""
        return Segments(*(moved(value, device) for value in vars(self).values()))


@dataclass(frozen=True)
class Batch:
    """Pairs as one sequence of T tokens, without padding (made by data.pack). Responses 2i and 2i+1
    are the chosen and the rejected one of pair i; one that is absent has length 0."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64; chosen and rejected both continue where their prompt ends
    segments: Segments
    # int64: the token whose output predicts each scored token. A shared prompt's last token is
    # there once for each answer.
    scored_index_S: Tensor
    target_S: Tensor  # int64: the token it should predict
    response_S: Tensor  # int64: the response that the token belongs to
    length_R: Tensor  # int64: scored tokens of each response

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on `device`."""
        return Batch(*(moved(value, device) for value in vars(self).values()))


# torch 2.13 needs this argument if head counts differ; 2.11, used for the GPU figures, lacks it.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments) -> Tensor:
    """Softmax attention within each segment; returns (T, H, K). Query head h reads key head
    h // (H / G).

    The loop over `scaled_dot_product_attention` defines the result. CUDA's variable-length flash
    kernel, for what it can read (`flash_reads`), must equal it up to rounding (tests/test_cuda.py).
    SDPA's own `is_causal` is aligned at the top left: with unequal lengths it would show a rejected
    token only the first tokens of its prompt, so a mask says bottom right.
    """
    k_NGK, v_NGK = k_TGK, v_TGK
    if segments.key_index_N is not None:
        # The backward of index_select is one index-add; indexing with [] would sort.
        k_NGK = k_TGK.index_select(0, segments.key_index_N)
        v_NGK = v_TGK.index_select(0, segments.key_index_N)
    if on_cuda(q_THK) and flash_reads(q_THK):
        bounds = (segments.query_starts, segments.key_starts, segments.longest, segments.longest)
        # A window of (-1, 0): all keys before, none after, counted from the bottom right.
        return varlen_attn(q_THK, k_NGK, v_NGK, *bounds, window_size=(-1, 0), **GROUPED)
    query_lengths = segments.query_starts.diff().tolist()
    key_lengths = segments.key_starts.diff().tolist()
    outputs = []
    for q, k, v in zip(
        q_THK.split(query_lengths), k_NGK.split(key_lengths), v_NGK.split(key_lengths), strict=True
    ):
        n_q, n_k = len(q), len(k)
        mask = None
        if n_q != n_k:
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def rope_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angle per position of each of the K/2 pairs of components, fp32; with Llama 3.1's scaling if
    the configuration has it."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return frequency
    # A component that turns seldom in the original context (a long wavelength) is slowed down by
    # `factor`, one that turns often is kept, and in between the two are blended.
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rope_tables(config: LlamaConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, K/2), fp32. Cheap enough to compute in each forward pass."""
    angles = positions_T[:, None, None].float() * rope_frequencies(config, positions_T.device)
    return angles.cos(), angles.sin()


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates component i with component i + K/2, the order of the Hugging Face layout. Computed
    in at least fp32, returned in x's dtype."""
    first, second = x_THK.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_THK.dtype)


# -------------------------------------------------------------------------------------- blocks


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, *then* scaled: the order matters in bf16, and it is
    Llama's."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        # The docstring's formula. For backward it keeps only x and one number per token.
        return rms_norm(x_TD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads.

    `attend` is `attention` or, in generation (evaluation/generate.py), a function that also keeps
    keys and values; after the prompt, generation passes no segments.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Segments | None,
        attend: Callable,
    ) -> Tensor:
        q_THK = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        out_THK = attend(rotate(q_THK, *rope), rotate(k_TGK, *rope), v_TGK, segments)
        return self.o_proj(out_THK.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        # The docstring's formula. For backward it keeps only gate and up.
        return gated_product(self.gate_proj(x_TD), self.up_proj(x_TD), self.down_proj.weight)


class Block(nn.Module):
    """A layer: pre-norm attention and pre-norm MLP, each added to the residual.

    A block with `recompute` keeps only its input for backward, which computes the rest again
    (activation checkpointing).
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.recompute = False
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
        inputs = (x_TD, rope, segments, attend)
        if torch.is_grad_enabled() and self.recompute:
            # checkpoint() is inside the compiled block, so the compiler sees that backward does not
            # need down_proj's output, and does not recompute it. preserve_rng_state=False: nothing
            # here is random, and saving a GPU's random state makes the CPU wait.
            return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*inputs)

    def compute(self, x_TD: Tensor, rope, segments, attend) -> Tensor:
        """The block's output (T, D), which `forward` returns."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, segments, attend)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


# ---------------------------------------------------------------------------------------- head


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target]. Forward overwrites the logits with their gradient,
    except for one factor per scored token, which is known only in backward.

    With m a token's largest logit and Z = sum exp(logits - m),
        d logp / d logits = onehot - exp(logits - m) / Z = (exp(logits - m) - Z onehot) * (-1 / Z).
    So forward overwrites the logits, in their own dtype, by exp(logits - m) - Z onehot. The factor
    -grad / Z, one number per scored token, follows in backward: it is multiplied into the (S, D)
    operand or result of the two matrix products, not into the (S, V) one.

    `exponentiate` is `exp_in_place`, below, or its compiled form: it overwrites the logits with
    exp(logits - m) and returns m and Z.
    """

    @staticmethod
    def forward(
        ctx, hidden_SD: Tensor, weight_VD: Tensor, target_S: Tensor, exponentiate: Callable
    ) -> Tensor:
        logits_SV, target_S1 = hidden_SD @ weight_VD.T, target_S[:, None]
        logit_S = logits_SV.gather(-1, target_S1)[:, 0]
        m_S, Z_S = exponentiate(logits_SV)
        unscaled_SV = logits_SV  # the same memory, which now holds exp(logits - m)
        # exp(logits - m) - Z at the target: in fp32, and only then rounded.
        at_target_S = (logit_S - m_S).exp() - Z_S
        unscaled_SV.scatter_(-1, target_S1, at_target_S[:, None].to(unscaled_SV.dtype))
        ctx.save_for_backward(hidden_SD, weight_VD, unscaled_SV, Z_S)
        return logit_S - m_S - Z_S.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S: Tensor):
        hidden_SD, weight_VD, unscaled_SV, Z_S = ctx.saved_tensors
        factor_S1 = (grad_S * (-1 / Z_S))[:, None]
        grad_hidden_SD = ((unscaled_SV @ weight_VD) * factor_S1).to(hidden_SD.dtype)
        grad_weight_VD = unscaled_SV.T @ (hidden_SD * factor_S1).to(hidden_SD.dtype)
        return grad_hidden_SD, grad_weight_VD, None, None


# Half-type logits are copied to fp32 in chunks of so many numbers: on a CPU as many as fit in its
# cache, on a GPU enough to keep it busy (1 GiB).
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA = 2**20, 2**28


def _chunk_tokens(like: Tensor, vocab_size: int) -> int:
    elements = CHUNK_ELEMENTS_CUDA if on_cuda(like) else CHUNK_ELEMENTS
    return max(1, elements // vocab_size)


def exp_in_place(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites logits with exp(logits - m), m being the largest of each token. Returns m_S and
    Z_S, the sum of each token's exponentials, at least fp32.

    Passed on as `exponentiate`, because support/compiler.py may put a compiled form in its place.
    """
    chunk = _chunk_tokens(logits_SV, logits_SV.shape[-1])
    if torch.compiler.is_compiling():  # into one kernel, which needs no copy in fp32
        chunk = len(logits_SV)
    largest, sums = [], []
    for logits_CV in logits_SV.split(chunk):
        wide_CV = at_least_fp32(logits_CV)  # a copy of half types; else the logits themselves
        # With keepdim torch.compile recognises a softmax, and reads the logits twice, not thrice.
        m_C1 = wide_CV.amax(-1, keepdim=True)
        Z_C1 = wide_CV.sub_(m_C1).exp_().sum(-1, keepdim=True)
        if wide_CV.dtype != logits_CV.dtype:
            logits_CV.copy_(wide_CV)
        del wide_CV  # before the next one is made
        largest.append(m_C1[:, 0])
        sums.append(Z_C1[:, 0])
    return torch.cat(largest), torch.cat(sums)


# Without gradients a matrix product takes at least so many scored tokens: with fewer, the weights
# would be read too often.
MATMUL_ROWS = 256


def target_logps(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    target_S: Tensor,
    exponentiate: Callable = exp_in_place,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target]: (S,), fp32 for fp32 and bf16 weights, float64 for
    float64.

    Three matrix products, nothing recomputed. Keeps the S x V logits once, in the dtype of the
    weights; half types add at most one chunk in fp32. Without gradients, only the logits of one
    matrix product exist at a time (MATMUL_ROWS). Not for training in fp16, whose range ends at
    65,504: Z may be as large as V.
    """
    if torch.is_grad_enabled() and (hidden_SD.requires_grad or weight_VD.requires_grad):
        return _TargetLogps.apply(hidden_SD, weight_VD, target_S, exponentiate)
    logps, rows = [], max(MATMUL_ROWS, _chunk_tokens(hidden_SD, len(weight_VD)))
    for hidden, target in zip(hidden_SD.split(rows), target_S.split(rows), strict=True):
        logits = hidden @ weight_VD.T
        logit = logits.gather(-1, target[:, None])[:, 0]
        m, Z = exponentiate(logits)
        logps.append(logit - m - Z.log())
    return torch.cat(logps)


class Head(nn.Linear):
    """An untied head. FSDP gathers its weight when its forward is called, so the log-probs are
    computed there."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        hidden_SD: Tensor,
        target_S: Tensor | None = None,
        exponentiate: Callable = exp_in_place,
    ) -> Tensor:
        """Log-probs of the targets; without targets, the logits."""
        if target_S is None:
            return super().forward(hidden_SD)
        return target_logps(hidden_SD, self.weight, target_S, exponentiate)


# --------------------------------------------------------------------------------------- model


class Llama(nn.Module):
    """Llama 3. Called on a packed batch, it gives what every loss takes: the log-probs of each
    response."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        # A tied model uses the embedding. Registered twice, to_empty() would make two parameters.
        self.lm_head = None if config.tie_word_embeddings else Head(config)
        self.exponentiate = exp_in_place  # or its compiled form

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns mean_R and sum_R, the mean and summed log-prob of each response in nats, at least
        fp32; 0 for a response without tokens. The packed form of asft.response_logps, equal up to
        rounding."""
        hidden_TD = self.hidden(batch.tokens_T, batch.positions_T, batch.segments)
        logp_S = self.output(hidden_TD.index_select(0, batch.scored_index_S), batch.target_S)
        sum_R = logp_S.new_zeros(len(batch.length_R)).index_add(0, batch.response_S, logp_S)
        return sum_R / batch.length_R.clamp(min=1), sum_R

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        segments: Segments | None,
        attends: Sequence[Callable] | None = None,
    ) -> Tensor:
        """The last block's output (T, D), before the final norm.

        attends: one function per block, called instead of `attention` (see Attention).
        """
        x_TD = self.model["embed_tokens"](tokens_T)
        rope = rope_tables(self.config, positions_T)
        layers = self.model["layers"]
        attends = attends or [attention] * len(layers)
        for block, attend in zip(layers, attends, strict=True):
            x_TD = block(x_TD, rope, segments, attend)
        return x_TD

    def output(self, hidden_SD: Tensor, target_S: Tensor | None = None) -> Tensor:
        """Final norm and head: log-probs of the targets (S,); without targets, logits (S, V)."""
        hidden_SD = self.model["norm"](hidden_SD)
        if self.lm_head is not None:
            return self.lm_head(hidden_SD, target_S, self.exponentiate)
        weight_VD = self.model["embed_tokens"].weight
        if target_S is None:
            return F.linear(hidden_SD, weight_VD)
        return target_logps(hidden_SD, weight_VD, target_S, self.exponentiate)

    def logits(self, tokens_T: Tensor) -> Tensor:
        """Logits (T, V) of one plain sequence, in the dtype of the weights: row t predicts token
        t+1."""
        ends = torch.tensor([0, len(tokens_T)], dtype=torch.int32, device=tokens_T.device)
        positions_T = torch.arange(len(tokens_T), device=tokens_T.device)
        # One value for nearly all lengths: a compiled block specialises on it.
        longest = max(len(tokens_T), self.config.max_position_embeddings)
        segments = Segments(ends, ends, None, longest)
        return self.output(self.hidden(tokens_T, positions_T, segments))

    def recompute_first(self, blocks: int) -> None:
        """Lets the first `blocks` blocks recompute in backward. Backward reaches them last, when it
        has freed what the others kept."""
        for i, block in enumerate(self.model["layers"]):
            block.recompute = i < blocks


# ------------------------------------------------------------------------------------ loading


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llama:
    """A whole model from a Hugging Face directory. Raises InputError like `load_weights`."""
    config = LlamaConfig.load(directory)
    check_weights(directory, config)  # before memory is allocated for what config.json says
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of a checkpoint."""
    with torch.device("meta"):  # all blocks have the same shapes; building each would be slow
        block = Block(config).state_dict()
    width = config.hidden_size
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{key}": tuple(x.shape) for key, x in block.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def check_weights(directory: str | Path, config: LlamaConfig) -> dict[str, Path]:
    """Key -> the file that holds it; reads only headers.

    Raises InputError unless every expected key is there exactly once, in the right shape and a
    floating dtype, and no other key is. Two extras are allowed: `rotary_emb.inv_freq` of old
    exports, which is computed here, and a tied model's spare `lm_head.weight`, in the embedding's
    shape and a floating dtype (`load_weights` compares it).
    """
    found = {
        key: header
        for key, header in tensor_headers(Path(directory)).items()
        if not key.endswith("rotary_emb.inv_freq")
    }
    expected = expected_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in found:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    check_headers(directory, found, expected, config.num_hidden_layers)
    return {key: header.path for key, header in found.items()}


@announced("reading the weights")
@torch.no_grad()
def load_weights(model: Llama, directory: str | Path) -> None:
    """Fills `model` from a Hugging Face directory: model.safetensors, or
    model.safetensors.index.json and its shards.

    A sharded parameter (DTensor) gets only this process's rows: no full copy anywhere, no
    broadcast. The stored dtype is converted to the parameter's. Raises InputError, naming file and
    key, for all that `check_weights` refuses, for a NaN or an infinity, and if a tied model's spare
    `lm_head.weight` differs from its embedding.
    """
    places = check_weights(directory, model.config)
    spare = places.pop("lm_head.weight", None) if model.lm_head is None else None
    for path in dict.fromkeys(places.values()):
        keys = [key for key, place in places.items() if place == path]
        with open_safetensors(path) as file:
            for key in keys:
                local, rows = local_rows(model.get_parameter(key))
                local.copy_(file.get_slice(key)[rows])
                if not finite(local):
                    raise InputError(f"{path}: key {key} holds a NaN or an infinity")
    if spare:
        local, rows = local_rows(model.get_parameter("model.embed_tokens.weight"))
        with open_safetensors(spare) as file:
            if not torch.equal(file.get_slice("lm_head.weight")[rows].to(local), local):
                raise InputError(
                    f"{spare}: lm_head.weight differs from model.embed_tokens.weight, but "
                    "config.json says tie_word_embeddings"
                )
