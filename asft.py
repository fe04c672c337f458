"""ASFT, Aligned Supervised Fine-Tuning through Absolute Likelihood (arXiv 2409.10571), and its
baselines.

Pure functions: per-response log-probabilities in, one loss per pair and a dict of detached per-pair
metrics out. The caller averages over pairs. This file imports only torch, so you can copy it into
any trainer.

The equations are reconstructed from the paper's Appendix B and its prose; their numbers are the
paper's.

In reading order
    log1mexp, log_odds      log(1 - p) and log(p / (1-p)); `_bounded` keeps them finite at p = 1
    comparison              margin and accuracy of a pair
    sft_loss, asft_loss     the SFT term alone; equation 14, which adds the align term
    orpo_loss, simpo_loss   baselines without a reference model
    dpo_loss, ipo_loss      baselines with one
    LOSSES                  the table through which train.py knows the losses
    response_logps          padded logits -> log-probs of each response, for other trainers

Notation, here and in the other files. x is a prompt, y_w the chosen and y_l the rejected response
(w: winner, l: loser), |y| a response's number of tokens, its closing <|eot_id|> included unless it
was cut. Answer is another word for response. Log is natural, log-probs are in nats.
    logp_w, logp_l    mean log-prob of y_w, y_l: 1/|y| sum_t log pi(y_t | x, y_<t). Only dpo_loss
                      and ipo_loss may be given the sum instead
    p_w, p_l          exp(logp_w), exp(logp_l): geometric-mean token probability, in (0, 1]

Shape letters. A name ends in the letters of its tensor's axes, unless it lives for few lines.
    B pairs   R responses (2B)   T tokens, packed (padded in response_logps)
    S scored tokens (those of responses)   C a chunk of S   N keys of packed attention
    D width   F width of the MLP   V vocabulary
    H query heads   G key/value heads   K head size   1 an axis of size 1

Not here: computing the reference's log-probs (support/reference.py), and the mean over a batch.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, Tensor]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32 if it is of a half type, unchanged otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate over the whole range. Half types are computed and
    returned in fp32.

    Two branches meet at -ln 2: log(-expm1(x)) is accurate near 0, log1p(-exp(x)) far from it. The
    branch that is not taken gets a harmless input, since 0 * inf in its backward pass would be NaN.
    At x = 0 the value is -inf: keep x below 0, as `_bounded` does.
    """
    x = at_least_fp32(x)
    near = x > -math.log(2)
    x_near = torch.where(near, x, -1.0)
    x_far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(x_near)), torch.log1p(-torch.exp(x_far)))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1-p)) of p = exp(logp), logp < 0: the argument of the sigmoids in equations 10 to
    13. asft_loss needs it only for its tempered form and a metric."""
    return logp - log1mexp(logp)


def _bounded(logp: Tensor, eps: float) -> Tensor:
    """min(logp, -eps), but with gradient 1 everywhere: `clamp` would have gradient 0 above
    -eps."""
    return torch.where(logp > -eps, logp - logp.detach() - eps, logp)


def _checked(*logps: Tensor) -> list[Tensor]:
    """The log-probs in at least fp32. Raises ValueError for unequal shapes: (B,) and (B, 1) would
    broadcast to (B, B) in silence."""
    if len({x.shape for x in logps}) > 1:
        raise ValueError(f"log-probs of unequal shapes: {[tuple(x.shape) for x in logps]}")
    return [at_least_fp32(x) for x in logps]


def comparison(logp_w_B: Tensor, logp_l_B: Tensor) -> Metrics:
    """margin = logp_w - logp_l, and accuracy: 1 if the chosen response is likelier per token; a
    tie counts 0. Takes mean log-probs, so losses that may take sums do not return it."""
    logp_w_B, logp_l_B = _checked(logp_w_B, logp_l_B)
    margin_B = (logp_w_B - logp_l_B).detach()
    return {"margin": margin_B, "accuracy": (margin_B > 0).to(margin_B.dtype)}


def sft_loss(logp_w_B: Tensor, logp_l_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """L_SFT = -logp_w, the first term of equation 14. Takes mean log-probs.

    The mean is over each response's own tokens, so every pair weighs the same; pooling the tokens
    of a batch, as language modelling does, would weigh long answers more. `logp_l_B` does not enter
    the loss, only the metrics margin and accuracy.
    """
    logp_w_B = at_least_fp32(logp_w_B)
    loss_B = -logp_w_B
    metrics = {"sft": loss_B.detach(), "align": torch.zeros_like(loss_B)}
    if logp_l_B is not None:
        metrics |= comparison(logp_w_B, logp_l_B)
    return loss_B, metrics


def asft_loss(
    logp_w_B: Tensor,
    logp_l_B: Tensor,
    *,
    beta: float = 0.1,
    sft_weight: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Metrics]:
    """L_ASFT = L_SFT + beta * L_align (equation 14). Takes mean log-probs; no reference model.

    Appendix B breaks align over two lines without parentheses, which loses its second half.
    Equations 13 and 14 as meant:

        log_odds_w = logp_w - log(1 - exp(logp_w))     (log_odds_l alike)
        align  = -logsigmoid(log_odds_w) - logsigmoid(-log_odds_l)
        loss   = -logp_w + beta * align

    Since sigmoid(log(p/(1-p))) = p, this is, rewritten and equal (tests/test_asft.py):

        loss   = -(1 + beta) * logp_w - beta * log(1 - exp(logp_l))
        dloss/dlogp_w = -(1 + beta)        dloss/dlogp_l = beta * p_l / (1 - p_l)

    which is what runs at temperature 1: no odds, no cancellation, and no trouble at logp_w = 0.
    (With sft_weight, 1 + beta is sft_weight + beta.)

    Each answer has its own terms, so either may be absent. For an absent chosen one pass
    logp_w = 0, as a constant; for an absent rejected one logp_l = -inf. Its terms are then exactly
    0; margin and accuracy mean nothing, so leave them out of an average.

    Args:
        logp_w_B, logp_l_B: mean log-probs in nats, at most 0, of equal shape. Half types are
            computed in fp32; float64 stays float64.
        beta: weight of the align term, the paper's beta (it finds 0.1 to 0.5 to work). Not a
            temperature, not DPO's beta.
        sft_weight: weight of L_SFT; 0 leaves beta * L_align ("align only").
        temperature: that of the tempered form of arXiv 2502.01237, in which the align term is
            -logsigmoid(temperature * log_odds_w) - logsigmoid(-temperature * log_odds_l). The
            paper has 1.
        eps: in nats. Inside the align term's log(1 - p), or its odds if tempered, log-probs above
            -eps are replaced by -eps, but keep gradient 1. (If tempered, logp_w = 0 counts
            as an absent answer: value and gradient of its align term are 0.) So value and gradient
            stay finite: a rejected response that the model knows by heart is pushed with weight
            about beta / eps (at temperature 1), too much for a gradient in fp16. The paper is
            silent here.

    Returns:
        loss_B, and per-pair metrics, detached: sft, align (both unweighted), align_w and align_l
        (its chosen and rejected half), rejected_weight (the loss's gradient with respect to
        logp_l), clamped (1 if eps acted), margin, accuracy.

    Raises ValueError for unequal shapes and for beta < 0, sft_weight < 0, temperature <= 0,
    eps <= 0.
    """
    if beta < 0 or sft_weight < 0 or temperature <= 0 or eps <= 0:
        raise ValueError(
            "asft_loss needs beta >= 0, sft_weight >= 0, temperature > 0, eps > 0; "
            f"found {beta=}, {sft_weight=}, {temperature=}, {eps=}"
        )
    logp_w_B, logp_l_B = _checked(logp_w_B, logp_l_B)
    bounded_l_B = _bounded(logp_l_B, eps)
    sft_B = -logp_w_B
    if temperature == 1:
        align_w_B = sft_B  # -logsigmoid(log_odds_w) = -logp_w
        align_l_B = -log1mexp(bounded_l_B)
    else:
        align_w_B = -F.logsigmoid(temperature * log_odds(_bounded(logp_w_B, eps)))
        align_w_B = align_w_B.masked_fill(logp_w_B == 0, 0.0)  # an absent answer, or p_w = 1
        align_l_B = -F.logsigmoid(-temperature * log_odds(bounded_l_B))
    align_B = align_w_B + align_l_B
    loss_B = sft_weight * sft_B + beta * align_B
    with torch.no_grad():
        clamped_B = logp_l_B > -eps
        if temperature != 1:  # logp_w is bounded too, except the 0 of an absent answer
            clamped_B |= (logp_w_B > -eps) & (logp_w_B < 0)
        # d align_l / d logp_l = temperature * sigmoid(temperature * log_odds_l) / (1 - p_l), since
        # d log_odds_l / d logp_l = 1 / (1 - p_l). At temperature 1 it is p_l / (1 - p_l).
        sigmoid_B = torch.sigmoid(temperature * log_odds(bounded_l_B))
        push_B = temperature * sigmoid_B / -torch.expm1(bounded_l_B)
    metrics = {
        "sft": sft_B.detach(),
        "align": align_B.detach(),
        "align_w": align_w_B.detach(),
        "align_l": align_l_B.detach(),
        "rejected_weight": beta * push_B,
        "clamped": clamped_B.to(loss_B.dtype),
    }
    return loss_B, metrics | comparison(logp_w_B, logp_l_B)


def orpo_loss(
    logp_w_B: Tensor, logp_l_B: Tensor, *, beta: float = 0.1, eps: float = 1e-6
) -> tuple[Tensor, Metrics]:
    """ORPO (arXiv 2403.07691): -logp_w - beta * logsigmoid(log_odds_w - log_odds_l). Takes mean
    log-probs; no reference model.

    Its align term is exactly ASFT's plus log(p_w(1-p_l) + p_l(1-p_w)), which is at most 0.
    Differs from TRL 1.16, whose odds term is the same but whose SFT term pools prompt and response
    tokens over the batch; the SFT term here is LLaMA-Factory's, the one that ASFT has. `beta` is
    ORPO's lambda. eps as in `asft_loss`, for both responses; ValueError unless it is above 0.
    """
    if eps <= 0:
        raise ValueError(f"orpo_loss needs eps > 0; found {eps=}")
    logp_w_B, logp_l_B = _checked(logp_w_B, logp_l_B)
    sft_B = -logp_w_B
    log_odds_w_B = log_odds(_bounded(logp_w_B, eps))
    log_odds_l_B = log_odds(_bounded(logp_l_B, eps))
    align_B = -F.logsigmoid(log_odds_w_B - log_odds_l_B)
    clamped_B = (torch.maximum(logp_w_B, logp_l_B) > -eps).to(sft_B.dtype)
    metrics = {"sft": sft_B.detach(), "align": align_B.detach(), "clamped": clamped_B}
    return sft_B + beta * align_B, metrics | comparison(logp_w_B, logp_l_B)


def _rewards(reward_w_B: Tensor, reward_l_B: Tensor) -> Metrics:
    """Implicit rewards, detached, for the losses that define them."""
    margin_B = reward_w_B - reward_l_B
    rewards = {"reward_w": reward_w_B, "reward_l": reward_l_B, "reward_margin": margin_B}
    return {name: value_B.detach() for name, value_B in rewards.items()}


def simpo_loss(
    logp_w_B: Tensor, logp_l_B: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> tuple[Tensor, Metrics]:
    """SimPO (arXiv 2405.14734): -logsigmoid(beta * (logp_w - logp_l) - gamma). Takes mean
    log-probs; no reference model.

    `gamma` is the target margin in units of the reward beta * logp, as TRL's `simpo_gamma`. TRL's
    CPO trainer adds an SFT term unless cpo_alpha is 0. There is no SFT term here.
    """
    logp_w_B, logp_l_B = _checked(logp_w_B, logp_l_B)
    loss_B = -F.logsigmoid(beta * (logp_w_B - logp_l_B) - gamma)
    rewards = _rewards(beta * logp_w_B, beta * logp_l_B)
    return loss_B, {"align": loss_B.detach()} | rewards | comparison(logp_w_B, logp_l_B)


def dpo_loss(
    logp_w_B: Tensor, logp_l_B: Tensor, ref_w_B: Tensor, ref_l_B: Tensor, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """DPO (arXiv 2305.18290; equations 1 to 3 of the ASFT paper):
    -logsigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l))).

    Takes *summed* log-probs of the model and of the reference ("dpo", TRL's loss_type "sigmoid"),
    or means of both: then it is length-normalised DPO ("dpo-norm", TRL's "sigmoid_norm"). `beta` is
    the reward scale; it shares only its name with ASFT's weight. With means it is larger: Tülu 3
    (arXiv 2411.15124) has 5, which is dpo-norm's default; TRL's is 0.1 for both.
    """
    logp_w_B, logp_l_B, ref_w_B, ref_l_B = _checked(logp_w_B, logp_l_B, ref_w_B, ref_l_B)
    ratio_w_B, ratio_l_B = logp_w_B - ref_w_B, logp_l_B - ref_l_B
    loss_B = -F.logsigmoid(beta * (ratio_w_B - ratio_l_B))
    return loss_B, {"align": loss_B.detach()} | _rewards(beta * ratio_w_B, beta * ratio_l_B)


def ipo_loss(
    logp_w_B: Tensor, logp_l_B: Tensor, ref_w_B: Tensor, ref_l_B: Tensor, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """IPO (arXiv 2310.12036): (h - 1/(2 beta))^2 in nats squared, with
    h = (logp_w - ref_w) - (logp_l - ref_l).

    Takes mean log-probs (TRL, LLaMA-Factory; train.py's default) or sums (OpenRLHF, the DPO
    reference code), the same kind for model and reference. They are different losses: with sums, h
    grows with the length.
    """
    logp_w_B, logp_l_B, ref_w_B, ref_l_B = _checked(logp_w_B, logp_l_B, ref_w_B, ref_l_B)
    ratio_w_B, ratio_l_B = logp_w_B - ref_w_B, logp_l_B - ref_l_B
    loss_B = (ratio_w_B - ratio_l_B - 1 / (2 * beta)) ** 2
    return loss_B, {"align": loss_B.detach()} | _rewards(beta * ratio_w_B, beta * ratio_l_B)


class Loss(NamedTuple):
    """A row of LOSSES. Its function takes the log-probs of chosen and rejected, then the
    reference's if it needs them. train.py logs whatever metrics it returns."""

    function: Callable[..., tuple[Tensor, Metrics]]
    logps: str  # "mean" or "sum": which log-probs the function takes
    reference: bool  # True if it also takes the log-probs of a reference model
    one_answer: bool = False  # True if either answer may be absent, as `asft_loss` says

    @property
    def options(self) -> dict[str, float]:
        """The function's keyword arguments and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


LOSSES = {
    "sft": Loss(sft_loss, "mean", reference=False, one_answer=True),
    "asft": Loss(asft_loss, "mean", reference=False, one_answer=True),
    "orpo": Loss(orpo_loss, "mean", reference=False),
    "simpo": Loss(simpo_loss, "mean", reference=False),
    "dpo": Loss(dpo_loss, "sum", reference=True),
    "dpo-norm": Loss(partial(dpo_loss, beta=5.0), "mean", reference=True),
    "ipo": Loss(ipo_loss, "mean", reference=True),
}


def response_logps(
    logits_RTV: Tensor, tokens_RT: Tensor, scored_RT: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and summed log-prob of each response, from padded logits.

    Args:
        logits_RTV: a model's output on tokens_RT, any floating dtype; computed in at least fp32,
            a row at a time.
        tokens_RT: token ids; the ids in padding do not matter.
        scored_RT: bool, True at the tokens of the response (its closing <|eot_id|> included).
            Position t is predicted by the logits at t-1: that shift happens here, once, so pass all
            three unshifted.

    Returns mean_R and sum_R in nats. Raises ValueError for unequal shapes, for a row without a
    scored token (its mean would be 0/0) and for a scored first token (nothing predicts it).
    """
    if logits_RTV.shape[:2] != tokens_RT.shape or tokens_RT.shape != scored_RT.shape:
        found = ", ".join(str(tuple(x.shape)) for x in (logits_RTV, tokens_RT, scored_RT))
        raise ValueError(
            f"response_logps needs logits (R, T, V), tokens (R, T) and scored (R, T); found {found}"
        )
    scored_RT = scored_RT.bool()
    bad_R = scored_RT[:, 0] | ~scored_RT.any(dim=1)
    if bad_R.any():
        rows = bad_R.nonzero()[:, 0].tolist()
        raise ValueError(f"rows {rows}: each needs at least one scored token, and not its first")
    sums, means = [], []
    for logits_TV, tokens_T, scored_T in zip(
        logits_RTV[:, :-1], tokens_RT[:, 1:], scored_RT[:, 1:], strict=True
    ):
        logits_SV = at_least_fp32(logits_TV[scored_T])
        target_S = tokens_T[scored_T]
        logp_S = logits_SV.gather(-1, target_S[:, None])[:, 0] - logits_SV.logsumexp(-1)
        sums.append(logp_S.sum())
        means.append(logp_S.mean())
    return torch.stack(means), torch.stack(sums)
