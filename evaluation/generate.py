""" """

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import asft
from model import Llama, Segments, attention

# Rows of a step whose attention is one call, as long as their longest: on a CPU reading what is masked costs more than
# calls do. On a GPU all rows are one.
ROWS_AT_ONCE = 8


class Past(NamedTuple):
    """One layer of a Cache, and where in it the tokens of the pass in progress belong."""

    k_BGNK: Tensor
    v_BGNK: Tensor
    row_T: Tensor  # int64: the cache row of each token
    position_T: Tensor  # int64: its position in that row's sequence
    masks: list[
        tuple[slice, Tensor]
    ]  # for a step: rows, and what is added to their scores, (rows, 1, 1, keys)

    def attend(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments | None
    ) -> Tensor:
        """`attention`, the keys and values kept. Without segments T is B, one new token for each row, which attends to
        all that its row holds."""
        self.k_BGNK[self.row_T, :, self.position_T] = k_TGK
        self.v_BGNK[self.row_T, :, self.position_T] = v_TGK
        if segments is not None:
            return attention(q_THK, k_TGK, v_TGK, segments)
        # The query heads that share a key head stand where SDPA expects tokens: no key is copied for them.
        q_BGHK = q_THK.unflatten(1, (self.k_BGNK.shape[1], -1))
        outputs = []
        for rows, mask in self.masks:
            k, v = (x_BGNK[rows, :, : mask.shape[-1]] for x_BGNK in (self.k_BGNK, self.v_BGNK))
            outputs.append(F.scaled_dot_product_attention(q_BGHK[rows], k, v, attn_mask=mask))
        return torch.cat(outputs).flatten(1, 2)


class Cache:
    """Keys and values of B sequences of at most N tokens, for every layer, allocated once. Row b holds one sequence
    from its first token on; rows are of any length, and what lies beyond a row's end is masked."""

    def __init__(self, model: Llama, rows: int, tokens: int):
        c, weight = model.config, model.model["embed_tokens"].weight
        shape = (c.num_hidden_layers, 2, rows, c.num_key_value_heads, tokens, c.head_dim)
        # Zeros, since a masked value counts 0 times what it is, and memory as it comes may hold NaN.
        self.layers = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.k_and_v = [tuple(layer) for layer in self.layers]  # views, made once

    def attends(
        self, row_T: Tensor, position_T: Tensor, masks: list[tuple[slice, Tensor]]
    ) -> list[Callable]:
        """What each block takes in one pass."""
        return [
            Past(k_BGNK, v_BGNK, row_T, position_T, masks).attend for k_BGNK, v_BGNK in self.k_and_v
        ]

    def move(self, source: int, target: int) -> None:
        """Puts a row in the place of another."""
        self.layers[:, :, target] = self.layers[:, :, source]


def prefill(model: Llama, prompts: list[list[int]], cache: Cache, row: int) -> Tensor:
    """Logits (B, V) of the token after each of B prompts, of at least one token id each. One packed pass, without
    padding; the prompts' keys and values go to the cache's rows row, row + 1, ..."""
    device, lengths = cache.layers.device, torch.tensor([len(prompt) for prompt in prompts])
    ends = F.pad(lengths.cumsum(0), (1, 0))
    starts = ends.int().to(device)
    position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
    row_T = (row + torch.repeat_interleave(lengths)).to(device)
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    segments = Segments(starts, starts, None, int(lengths.max()))
    hidden_TD = model.hidden(tokens_T, position_T, segments, cache.attends(row_T, position_T, []))
    return model.head(hidden_TD.index_select(0, ends[1:].to(device) - 1))


def step(model: Llama, tokens: list[int], lengths: list[int], cache: Cache) -> Tensor:
    """Logits (B, V) of the next token of the cache's first B rows, once row b, which holds lengths[b] tokens, has
    got tokens[b] as well."""
    device, rows = cache.layers.device, len(tokens)
    tokens_B, position_B = torch.tensor([tokens, lengths], device=device)
    beyond_BN = torch.arange(max(lengths) + 1, device=device) > position_B[:, None]
    mask_BN = cache.layers.new_zeros(beyond_BN.shape).masked_fill(beyond_BN, -math.inf)
    at_once = rows if device.type == "cuda" else ROWS_AT_ONCE
    parts = [slice(i, min(i + at_once, rows)) for i in range(0, rows, at_once)]
    masks = [(part, mask_BN[part, None, None, : max(lengths[part]) + 1]) for part in parts]
    past = cache.attends(torch.arange(rows, device=device), position_B, masks)
    return model.head(model.hidden(tokens_B, position_B, None, past))


CACHE_TOKENS = 65_536  # 8 GiB for Llama-3-8B in bf16, at 128 KiB a token


MAX_ROWS = 256  # of a batch: above, a step's logits take more memory than they save time


PREFILL_TOKENS = 8192  # of prompts in one pass, which bounds its activations


class Request(NamedTuple):
    """A prompt to go on with."""

    number: int  # of its row in its file: what is drawn depends on (seed, number, position in the answer) alone
    prompt: list[int]  # token ids, BOS included
    temperature: float = 0.0  # 0: the likeliest token, always
    max_new_tokens: int = 512


@dataclass
class _Row:
    """A request in the cache, and what it got so far."""

    index: int
    request: Request
    new: list[int]
    uniforms: np.ndarray  # one number in [0, 1) for each new token


@torch.inference_mode()
def generate(
    model: Llama,
    requests: list[Request],
    stop_ids: frozenset[int],
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    cache_tokens: int = CACHE_TOKENS,
) -> Iterator[tuple[int, list[int], str]]:
    """Continues each request until it draws one of stop_ids or has max_new_tokens or as many as the model's context
    takes. Yields (index into requests, new token ids without the stop token, and "stop", "length", or "overlong" for a
    prompt that fills the context) as they finish.

    A batch is as many rows as fit in a cache of cache_tokens tokens when each may grow to its full length (one at
    least): longest first, so that rows of a batch are alike, and those that wait always fit in the place of one that
    finished. A row's numbers depend on its neighbours by nothing but the rounding of matrix products, whose order of
    summation differs with the number of rows.

    top_p and top_k (0: off) as in `probabilities`. Two requests of equal number draw with the same random numbers."""
    context = model.config.max_position_embeddings

    def full_length(i: int) -> int:
        return min(len(requests[i].prompt) + requests[i].max_new_tokens, context)

    overlong = [i for i, request in enumerate(requests) if len(request.prompt) >= context]
    yield from ((i, [], "overlong") for i in overlong)
    waiting = sorted(
        set(range(len(requests))) - set(overlong), key=full_length
    )  # taken from the end
    rows: list[_Row] = []  # row b of the cache is rows[b]'s
    while waiting or rows:
        if not rows:
            cache, width = (
                None,
                full_length(waiting[-1]),
            )  # the old one is freed before there is a new one
            slots = max(1, min(len(waiting), cache_tokens // width, MAX_ROWS))
            cache, filling = Cache(model, slots, width), True
            least = 0 if slots == len(waiting) else width / 2
        # Refilled some rows at a time, since each time is a pass over the weights; and, unless there is room for all,
        # not with rows much shorter than the cache is wide, which wait for a narrower one with more rows.
        filling, fresh = filling or 8 * len(rows) <= 7 * slots, []
        while (
            filling
            and waiting
            and len(rows) + len(fresh) < slots
            and full_length(waiting[-1]) >= least
            and sum(len(row.request.prompt) for row in fresh) < PREFILL_TOKENS
        ):
            index = waiting.pop()
            rng = np.random.default_rng([seed, requests[index].number])
            fresh.append(
                _Row(
                    index,
                    requests[index],
                    [],
                    rng.random(full_length(index) - len(requests[index].prompt)),
                )
            )
        filling = bool(fresh)

        if fresh:
            logits_BV = prefill(model, [row.request.prompt for row in fresh], cache, len(rows))
            rows += fresh
        else:
            lengths = [len(row.request.prompt) + len(row.new) - 1 for row in rows]
            logits_BV = step(model, [row.new[-1] for row in rows], lengths, cache)
        first = len(rows) - len(logits_BV)  # the rows that were computed: the last ones
        tokens = choose(
            logits_BV,
            [row.request.temperature for row in rows[first:]],
            [row.uniforms[len(row.new)] for row in rows[first:]],
            top_p,
            top_k,
        )
        for b in reversed(
            range(first, len(rows))
        ):  # from the end: the last row takes the place of a finished one
            row, stop = rows[b], tokens[b - first] in stop_ids
            if not stop:
                row.new.append(tokens[b - first])
            if stop or len(row.request.prompt) + len(row.new) == full_length(row.index):
                last = rows.pop()
                if b < len(rows):
                    rows[b] = last
                    cache.move(len(rows), b)
                yield row.index, row.new, "stop" if stop else "length"


def choose(
    logits_BV: Tensor, temperatures: list[float], uniforms: list[float], top_p: float, top_k: int
) -> list[int]:
    """A token id for each row: the likeliest where its temperature is 0, else the one at the row's uniform number in
    [0, 1) of the cumulated `probabilities`, which are summed in the vocabulary's order: a sum in order of probability
    would jump where rounding swaps two tokens."""
    best_B = logits_BV.argmax(-1)
    if not any(temperatures):
        return best_B.tolist()
    temperature_B = torch.tensor(temperatures, device=best_B.device)
    greedy_B = temperature_B == 0
    total_BV = probabilities(logits_BV, temperature_B + greedy_B, top_p, top_k).double().cumsum(-1)
    at_B1 = (
        torch.tensor(uniforms, dtype=torch.float64, device=best_B.device)[:, None]
        * total_BV[:, -1:]
    )
    drawn_B = torch.searchsorted(total_BV, at_B1, right=True)[:, 0].clamp(
        max=total_BV.shape[-1] - 1
    )
    return torch.where(greedy_B, best_B, drawn_B).tolist()


def probabilities(
    logits_BV: Tensor, temperature_B: Tensor, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """What sampling draws from, at least fp32: the softmax at a temperature above 0, then its top_k likeliest tokens
    (ties with the last one too; 0: all), then of these the fewest likeliest ones that together have top_p, each time
    made to sum to 1 again. The order and the meaning are transformers' (TemperatureLogitsWarper, TopKLogitsWarper,
    TopPLogitsWarper)."""
    logits_BV = asft.at_least_fp32(logits_BV)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B[
        :, None
    ]  # at most 0: never infinite
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(
            logits_BV < logits_BV.topk(top_k).values[:, -1:], -math.inf
        )
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        sorted_BV = sorted_BV.softmax(-1)
        beyond_BV = (
            sorted_BV.cumsum(-1) - sorted_BV >= top_p
        )  # those before a token have top_p already
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -math.inf)
    return logits_BV.softmax(-1)
