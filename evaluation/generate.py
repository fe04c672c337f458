"""Generation: many prompts are answered at once, over one cache of keys and values.

In reading order
    Cache                       keys and values of the rows of a batch, kept between passes
    prefill, step               the two passes: over whole prompts, and over one new token per row
    Request, generate           prompts of any lengths; the next one takes a finished one's place
    choose, probabilities       greedy choice and sampling, with top-k and top-p as in transformers

Left out: beam search, repetition penalties, speculative decoding, prompts that share a prefix.

B rows (sequences) of a batch; N positions of a cache row; the other letters are those of asft.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asft import at_least_fp32
from model import Llama, Segments, attention
from support.processes import StoppedError

CACHE_TOKENS = 65_536  # 8 GiB for Llama-3-8B in bf16, which takes 128 KiB per token
MAX_ROWS = 256  # larger batches use more memory for their logits and are not faster
PREFILL_TOKENS = 8192  # of prompts in one pass: bounds the memory of its activations
# On a CPU a step attends to this many rows per call, cut to the longest of them: reading masked
# positions costs more than a call does. On a GPU the rows of a step are one call.
ROWS_PER_CALL = 8

Masks = list[tuple[slice, Tensor]]  # rows, and their additive mask of shape (rows, 1, 1, keys)


class Cache:
    """Keys and values of B sequences of at most N tokens, for every layer, allocated once.

    Row b holds one sequence from its first token on. Rows may differ in length; attention masks
    what lies beyond a row's end.
    """

    def __init__(self, model: Llama, rows: int, tokens: int):
        config, weight = model.config, model.model["embed_tokens"].weight
        shape = (rows, config.num_key_value_heads, tokens, config.head_dim)  # BGNK
        # Zeros: a masked value is multiplied by 0, and fresh memory may hold NaN.
        self.layers = weight.new_zeros((config.num_hidden_layers, 2, *shape))
        self.k_and_v = [tuple(layer) for layer in self.layers]  # views, made once

    def attends(self, row_T: Tensor, position_T: Tensor, masks: Masks | None) -> list[Callable]:
        """For each layer the `attend` of model.Block, over tokens at these rows and positions.

        It stores their keys and values. Without masks the tokens are packed prompts, which attend
        within themselves; with masks they are one token per row, which attends to all of its row.
        """

        def attend(k_and_v, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments) -> Tensor:
            k_BGNK, v_BGNK = k_and_v
            k_BGNK[row_T, :, position_T] = k_TGK
            v_BGNK[row_T, :, position_T] = v_TGK
            if masks is None:
                return attention(q_THK, k_TGK, v_TGK, segments)
            # SDPA sees the query heads that share a key head as its tokens: no key is copied.
            q_BGHK = q_THK.unflatten(1, (k_BGNK.shape[1], -1))
            outputs = []
            for rows, mask in masks:
                k, v = (x[rows, :, : mask.shape[-1]] for x in k_and_v)
                outputs.append(F.scaled_dot_product_attention(q_BGHK[rows], k, v, attn_mask=mask))
            return torch.cat(outputs).flatten(1, 2)

        return [partial(attend, k_and_v) for k_and_v in self.k_and_v]


def prefill(model: Llama, prompts: list[list[int]], cache: Cache, row: int) -> Tensor:
    """Logits (B, V) of the token that follows each of B prompts of at least one token id.

    One packed pass without padding. Keys and values go to the cache's rows row, row + 1, ...
    """
    device = cache.layers.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = F.pad(lengths.cumsum(0), (1, 0))
    starts = ends.int().to(device)
    segments = Segments(starts, starts, None, int(lengths.max()))
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
    row_T = (row + torch.repeat_interleave(lengths)).to(device)
    attends = cache.attends(row_T, position_T, masks=None)
    hidden_TD = model.hidden(tokens_T, position_T, segments, attends)
    return model.output(hidden_TD.index_select(0, ends[1:].to(device) - 1))


def step(model: Llama, tokens: list[int], lengths: list[int], cache: Cache) -> Tensor:
    """Logits (B, V) of the next token of the cache's first B rows, after appending tokens[b] to
    row b, which holds lengths[b] tokens so far."""
    device, rows = cache.layers.device, len(tokens)
    tokens_B, position_B = torch.tensor([tokens, lengths], device=device)
    beyond_BN = torch.arange(max(lengths) + 1, device=device) > position_B[:, None]
    mask_BN = cache.layers.new_zeros(beyond_BN.shape).masked_fill(beyond_BN, -math.inf)
    per_call = rows if device.type == "cuda" else ROWS_PER_CALL
    masks = []
    for first in range(0, rows, per_call):
        part = slice(first, min(first + per_call, rows))
        masks.append((part, mask_BN[part, None, None, : max(lengths[part]) + 1]))
    row_B = torch.arange(rows, device=device)
    attends = cache.attends(row_B, position_B, masks)
    return model.output(model.hidden(tokens_B, position_B, None, attends))


class Request(NamedTuple):
    """A prompt to continue."""

    number: int  # its row in its file; samples depend only on seed, number and position
    prompt: list[int]  # token ids, BOS included
    temperature: float = 0.0  # 0: always the likeliest token
    max_new_tokens: int = 512


@dataclass
class _Row:
    """A request and its answer so far."""

    index: int
    request: Request
    most: int  # tokens that prompt and answer may have together
    rng: np.random.Generator  # gives a number in [0, 1) for each new token
    new: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.request.prompt) + len(self.new)


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
    """Continues each request until it draws one of stop_ids, has max_new_tokens new tokens, or
    fills the model's context.

    Yields (index into requests, new token ids, finish) as answers finish. The stop token is not
    among the ids. finish is "stop", "length", or "overlong" for a prompt that leaves no room in
    the context, which is not answered.

    A cache holds as many rows as fit into cache_tokens if each grows to its full length, but at
    least one. Neighbours change a row's numbers only by rounding, since a matrix product's order
    of summation depends on its number of rows.

    top_p and top_k (0: off) as in `probabilities`. Requests of equal number draw with the same
    random numbers.
    """
    waiting, context = [], model.config.max_position_embeddings
    for i, request in enumerate(requests):
        if len(request.prompt) >= context:
            yield i, [], "overlong"
            continue
        most = min(len(request.prompt) + request.max_new_tokens, context)
        waiting.append(_Row(i, request, most, np.random.default_rng([seed, request.number])))
    # Longest first, taken from the end: rows of a batch are then alike, and those that wait always
    # fit into the place of one that finished.
    waiting.sort(key=lambda row: row.most)
    draw = partial(choose, top_p=top_p, top_k=top_k)
    while waiting:
        yield from _batch(model, waiting, stop_ids, draw, cache_tokens)


def _batch(
    model: Llama, waiting: list[_Row], stop_ids: frozenset[int], draw: Callable, cache_tokens: int
) -> Iterator[tuple[int, list[int], str]]:
    """Answers rows from the end of `waiting` over one cache, until it is empty, and yields as
    `generate` does."""
    width = waiting[-1].most
    slots = max(1, min(len(waiting), cache_tokens // width, MAX_ROWS))
    # Rows much shorter than the cache is wide wait for a narrower one with more rows.
    least = 0 if slots == len(waiting) else width / 2
    cache, rows = Cache(model, slots, width), []  # rows[b] is in row b of the cache
    fresh = _take(waiting, slots, least)
    while rows or fresh:
        if fresh:
            logits_BV = prefill(model, [row.request.prompt for row in fresh], cache, len(rows))
            rows += fresh
        else:
            lengths = [len(row) - 1 for row in rows]
            logits_BV = step(model, [row.new[-1] for row in rows], lengths, cache)
        first = len(rows) - len(logits_BV)  # the computed rows are the last ones
        temperatures = [row.request.temperature for row in rows[first:]]
        tokens = draw(logits_BV, temperatures, [row.rng.random() for row in rows[first:]])
        # From the end, so that the last row can take the place of a finished one.
        for b in reversed(range(first, len(rows))):
            row, token = rows[b], tokens[b - first]
            stop = token in stop_ids
            if not stop:
                row.new.append(token)
            if stop or len(row) == row.most:
                last = rows.pop()
                if last is not row:
                    rows[b] = last
                    cache.layers[:, :, b] = cache.layers[:, :, len(rows)]
                yield row.index, row.new, "stop" if stop else "length"
        # A prefill is a pass over all weights, so it waits until an eighth of the rows is free.
        filling = rows and (fresh or len(rows) <= 7 / 8 * slots)
        fresh = _take(waiting, slots - len(rows), least) if filling else []


def _take(waiting: list[_Row], room: int, least: float) -> list[_Row]:
    """Removes the next rows from `waiting` for one prefill: at most `room`, with `most` of `least`
    or more."""
    taken, tokens = [], 0
    while waiting and len(taken) < room and tokens < PREFILL_TOKENS and waiting[-1].most >= least:
        taken.append(waiting.pop())
        tokens += len(taken[-1])
    return taken


def choose(
    logits_BV: Tensor, temperatures: list[float], uniforms: list[float], top_p: float, top_k: int
) -> list[int]:
    """A token id for each row: the likeliest at temperature 0, otherwise the first token whose
    cumulated `probabilities` exceed the row's uniform number in [0, 1).

    They are cumulated in the vocabulary's order: in order of probability, the drawn token would
    change when rounding swaps two tokens. Raises StoppedError if a row's largest logit is a
    NaN or infinite.
    """
    top_B, best_B = logits_BV.max(-1)  # a NaN counts as the largest
    if not top_B.isfinite().all():
        raise StoppedError("the model's logits are not finite; nothing can be drawn from them")
    if not any(temperatures):
        return best_B.tolist()
    temperature_B = torch.tensor(temperatures, device=best_B.device)
    uniform_B = torch.tensor(uniforms, dtype=torch.float64, device=best_B.device)
    greedy_B = temperature_B == 0
    # A greedy row's draw is not used; 1 keeps it finite.
    p_BV = probabilities(logits_BV, temperature_B + greedy_B, top_p, top_k)
    total_BV = p_BV.double().cumsum(-1)
    at_B = uniform_B * total_BV[:, -1]
    drawn_B = torch.searchsorted(total_BV, at_B[:, None], right=True)[:, 0]
    drawn_B = drawn_B.clamp(max=total_BV.shape[-1] - 1)
    return torch.where(greedy_B, best_B, drawn_B).tolist()


def probabilities(
    logits_BV: Tensor, temperature_B: Tensor, top_p: float = 1.0, top_k: int = 0
) -> Tensor:
    """The distribution that sampling draws from, (B, V), at least fp32, for temperatures above 0.

    The softmax at the temperature; then its top_k likeliest tokens (0: all; tokens tied with the
    last one stay too); then the fewest likeliest of these that together have top_p. After each
    cut the rest is made to sum to 1. Same order and meaning as transformers'
    TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper.
    """
    logits_BV = at_least_fp32(logits_BV)
    # With the largest logit at 0, a tiny temperature cannot give infinity minus infinity.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B[:, None]
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
        sorted_BV = sorted_BV.softmax(-1)
        # A token goes if the likelier ones before it have top_p already.
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -math.inf)
    return logits_BV.softmax(-1)
