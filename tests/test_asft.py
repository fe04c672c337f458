"""The losses: equations 13 and 14, the baselines, numbers near p = 1, and padded logits.

Oracles: the 40-digit values of the paper's worked table, `decimal`, finite differences in float64,
the form that the paper prints, and fractions small enough to multiply by hand.
"""

import math
from decimal import Decimal, localcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import asft
from asft import LOSSES, asft_loss, log1mexp, log_odds, orpo_loss, response_logps, sft_loss

LOG2 = math.log(2)
# Every branch of the code; a loss that takes a reference gets one from `call`.
OPTIONS = {
    "sft": [{}],
    "asft": [{}, dict(beta=0.5), dict(sft_weight=0.0, beta=1.0), dict(temperature=0.5)]
    + [dict(temperature=2.0), dict(temperature=2.0, sft_weight=0.0, beta=1.0)],
    "orpo": [{}, dict(beta=1.0)],
    "simpo": [{}, dict(beta=10.0, gamma=3.0)],
    "dpo": [{}, dict(beta=0.5)],
    "dpo-norm": [{}, dict(beta=0.5)],
    "ipo": [{}, dict(beta=0.5)],
}
assert OPTIONS.keys() == LOSSES.keys()
each_variant = pytest.mark.parametrize(
    "name, options", [(name, options) for name, many in OPTIONS.items() for options in many]
)
# What a mean log-prob can be: hopeless, both sides of -ln 2, and each step towards certainty.
EXTREMES = [-400.0, -104.0, -88.0, -40.0, -17.0, -3.0, -LOG2 - 1e-6, -LOG2, -LOG2 + 1e-6, -0.1]
EXTREMES += [-2e-3, -1e-3, -1e-5, -1.1e-6, -1e-6, -9e-7, -1e-7, -3e-8, -1e-9, -1e-45, -0.0, 0.0]


def call(name, logp_w, logp_l, **options):
    """Any row of LOSSES, with a reference that nowhere equals the model if the loss takes one."""
    reference = (-0.8 - 0.1 * logp_w.detach(), -1.3 + 0.2 * logp_l.detach())
    return LOSSES[name].function(logp_w, logp_l, *reference * LOSSES[name].reference, **options)


def leaves(*values, dtype=torch.float64):
    return [torch.tensor(v, dtype=dtype).requires_grad_() for v in values]


def gradients(loss, *inputs):
    """The gradients of the summed loss; zeros for an input that it does not depend on."""
    options = dict(allow_unused=True, materialize_grads=True, retain_graph=True)
    return torch.autograd.grad(loss.sum(), inputs, **options)


def random_logps(n, seed):
    """Log-uniform over (-20, -1e-3): as many nearly certain responses as unlikely ones."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(1e-3), math.log(20)
    uniform = torch.rand(2, n, generator=generator, dtype=torch.float64)
    return [-torch.exp(low + (high - low) * row).requires_grad_() for row in uniform]


def assert_same(found, expected, inputs, value=1e-9, slope=1e-9, near_0=0.0):
    """Equal values and gradients, within relative (and, near 0, absolute) tolerances."""
    torch.testing.assert_close(found, expected, rtol=value, atol=near_0)
    pairs = zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True)
    for of_found, of_expected in pairs:
        torch.testing.assert_close(of_found, of_expected, rtol=slope, atol=near_0)


# -------------------------------------------------------------------------- equations 13 and 14


@pytest.mark.parametrize(
    "logp_w, logp_l, beta, loss, grad_w, grad_l",
    [
        (-1, -1, 0.1, 1.145867514539, -1.1, 0.0581976706869),
        (-0.7, -0.9, 0.1, 0.822183544291, -1.1, 0.0685117750405),
        (-0.7, -0.9, 0.5, 1.310917721454, -1.5, 0.342558875203),
        (-0.25, -2.5, 0.1, 0.283565048374, -1.1, 0.00894254898339),
        (-2, -0.001, 0.1, 2.890825523732, -1.1, 99.9500083333),
        (-0.5, -40, 1, 1.000000000000, -2, 4.24835425529e-18),
    ],
)
def test_asft_and_its_gradients_equal_40_digit_values(logp_w, logp_l, beta, loss, grad_w, grad_l):
    inputs = leaves([logp_w], [logp_l])
    value, metrics = asft_loss(*inputs, beta=beta)
    found = [value, *gradients(value, *inputs), metrics["rejected_weight"]]
    expected = [loss, grad_w, grad_l, grad_l]
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-11)


@each_variant
def test_the_gradient_of_every_loss_is_the_slope_of_its_value(name, options):
    values = leaves([-5.0, -1.0, -0.7, -0.2, -0.01, -2.0], [-0.3, -1.0, -0.9, -7.0, -2.0, -0.005])
    reference = [values[0].detach() * 0.9 - 0.1, values[1].detach() * 1.1 + 0.2]

    def value(logps):
        return LOSSES[name].function(*logps, *reference * LOSSES[name].reference, **options)[0]

    for side, found in enumerate(gradients(value(values), *values)):
        step = 1e-5 * values[side].detach().abs()
        above, below = list(values), list(values)
        above[side], below[side] = values[side] + step, values[side] - step
        slope = (value(above) - value(below)) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=1e-7, atol=1e-8)


def printed_form(logp_w, logp_l, beta):
    """Appendix B, line by line, with the parentheses that it lacks."""
    log_odds_w = logp_w - torch.log1p(-torch.exp(logp_w))
    log_odds_l = logp_l - torch.log1p(-torch.exp(logp_l))
    align = -F.logsigmoid(log_odds_w) - F.logsigmoid(-log_odds_l)
    return -logp_w + beta * align


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_asft_is_the_form_of_appendix_b_in_value_and_gradient(beta):
    inputs = random_logps(2000, seed=0)
    found = asft_loss(*inputs, beta=beta)[0]
    assert_same(found, printed_form(*inputs, beta), inputs, value=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_the_tempered_form_puts_the_temperature_inside_both_sigmoids(temperature):
    inputs = random_logps(1000, seed=2)
    odds_w, odds_l = (torch.log(torch.exp(x) / (1 - torch.exp(x))) for x in inputs)
    align_w = torch.log1p(torch.exp(-temperature * odds_w))
    align_l = torch.log1p(torch.exp(temperature * odds_l))
    found, metrics = asft_loss(*inputs, beta=1.0, sft_weight=0.0, temperature=temperature)
    torch.testing.assert_close(found, align_w + align_l, rtol=1e-9, atol=1e-15)
    assert_same(found, align_w + align_l, inputs, slope=1e-8, near_0=1e-12)
    push = gradients(align_l, *inputs)[1]
    torch.testing.assert_close(metrics["rejected_weight"], push, rtol=1e-8, atol=1e-12)


@given(st.floats(-30, -1e-4), st.floats(-30, -1e-4))
def test_the_align_term_of_orpo_is_that_of_asft_plus_a_log_that_is_never_positive(logp_w, logp_l):
    inputs = leaves([logp_w], [logp_l])
    of_asft, of_orpo = (loss(*inputs)[1]["align"].item() for loss in (asft_loss, orpo_loss))
    p_w, p_l = math.exp(logp_w), math.exp(logp_l)
    exactly_one = p_w * -math.expm1(logp_l) + p_l * -math.expm1(logp_w)
    assert of_orpo == pytest.approx(of_asft + math.log(exactly_one), rel=1e-10, abs=1e-10)
    assert of_orpo <= of_asft + 1e-12


@pytest.mark.parametrize(
    "beta, sft_weight, temperature",
    [(0.1, 1.0, 1.0), (0.5, 0.0, 1.0), (0.0, 2.0, 1.0), (0.3, 0.5, 2.0)],
)
def test_the_loss_is_sft_weight_times_sft_plus_beta_times_align(beta, sft_weight, temperature):
    inputs = random_logps(50, seed=4)
    loss, metrics = asft_loss(*inputs, beta=beta, sft_weight=sft_weight, temperature=temperature)
    plain = asft_loss(*inputs, temperature=temperature)[1]
    torch.testing.assert_close(metrics["sft"], -inputs[0].detach(), rtol=0, atol=0)
    torch.testing.assert_close(metrics["align"], plain["align"], rtol=0, atol=0)  # unweighted
    torch.testing.assert_close(metrics["align_w"] + metrics["align_l"], metrics["align"])
    torch.testing.assert_close(loss.detach(), sft_weight * metrics["sft"] + beta * metrics["align"])
    push = gradients(loss, *inputs)[1]
    torch.testing.assert_close(push, metrics["rejected_weight"], rtol=1e-12, atol=0)


def test_at_minus_1_and_minus_1_the_rejected_push_is_5_percent_of_the_chosen_one():
    inputs = leaves([-1.0], [-1.0])
    loss, metrics = asft_loss(*inputs, beta=0.1)
    grad_w, grad_l = gradients(loss, *inputs)
    assert -grad_l.item() / grad_w.item() == pytest.approx(0.0529, abs=5e-5)
    by_hand = dict(sft=1.0, align=1.458675145387, align_w=1.0, align_l=0.458675145387, margin=0.0)
    by_hand |= dict(rejected_weight=0.1 * 0.581976706869, clamped=0.0, accuracy=0.0)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(by_hand, abs=1e-12)


def test_margin_is_chosen_minus_rejected_and_a_tie_is_not_accurate():
    logp_w, logp_l = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-1.5, -1.0, -1.5])
    for name in ("sft", "asft", "orpo", "simpo"):
        metrics = LOSSES[name].function(logp_w, logp_l)[1]
        assert metrics["margin"].tolist() == [0.5, -1.0, 0.0], name
        assert metrics["accuracy"].tolist() == [1.0, 0.0, 0.0], name


# ------------------------------------------------------------------------------- near certainty


def exact_log1mexp(x: float) -> float:
    with localcontext() as context:
        context.prec = 400  # exp(-800) needs 350 digits beside the 1
        return float((1 - Decimal(x).exp()).ln())


@pytest.mark.parametrize("x", [x for x in [*EXTREMES, -0.5, -1.0, -37.5, -700.0] if x < -1e-40])
@pytest.mark.parametrize(
    "dtype, digits, smallest",
    [(torch.float64, 4e-16, 0), (torch.float32, 3e-7, 1e-44)],  # fp32 cannot hold exp(-104)
    ids=["float64", "float32"],
)
def test_log1mexp_keeps_its_digits_over_the_whole_range(x, dtype, digits, smallest):
    held = torch.tensor(x, dtype=dtype)
    expected = pytest.approx(exact_log1mexp(held.item()), rel=digits, abs=smallest)
    assert log1mexp(held).item() == expected


def test_the_slope_of_log1mexp_is_minus_the_odds_on_both_of_its_branches():
    (x,) = leaves([-50.0, -3.0, -LOG2 - 1e-9, -LOG2 + 1e-9, -0.1, -1e-9])
    (slope,) = gradients(log1mexp(x), x)
    odds = [-float(Decimal(v).exp() / (1 - Decimal(v).exp())) for v in x.tolist()]
    torch.testing.assert_close(slope, torch.tensor(odds, dtype=torch.float64), rtol=1e-14, atol=0)


def test_the_slope_of_log1mexp_is_not_nan_if_exp_rounds_to_1_or_to_0():
    (x,) = leaves([-1e-7, -1e-8, -1e-20, -200.0], dtype=torch.float32)
    (slope,) = gradients(log1mexp(x), x)
    torch.testing.assert_close(slope, torch.tensor([-1e7, -1e8, -1e20, 0.0]), rtol=1e-6, atol=0)


def test_log_odds_is_0_at_one_half_and_the_log_of_3_at_three_quarters():
    found = log_odds(torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx([0.0, math.log(3), -math.log(3)], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_variant
def test_every_loss_and_gradient_is_finite_from_minus_400_to_exactly_0(name, options, dtype):
    inputs = leaves(*zip(*product(EXTREMES, EXTREMES), strict=True), dtype=dtype)
    loss, metrics = call(name, *inputs, **options)
    for value in [loss, *metrics.values(), *gradients(loss, *inputs)]:
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("eps", [1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_rejected_response_of_p_1_is_pushed_by_beta_over_eps(dtype, rounding, eps, temperature):
    inputs = leaves([-1.0] * 4, [0.0, -eps / 1e3, -eps / 3, -eps / 2], dtype=dtype)
    loss, metrics = asft_loss(*inputs, beta=0.1, eps=eps, temperature=temperature)
    expected = torch.full((4,), 0.1 * temperature / eps)
    push = gradients(loss, *inputs)[1].float()  # in bf16: 8 bits
    torch.testing.assert_close(push, expected, rtol=rounding, atol=0)
    torch.testing.assert_close(metrics["rejected_weight"], expected, rtol=1e-3, atol=0)
    # -log(1 - p) at the cap is log(1 / eps), times T if T is inside the sigmoid.
    at_cap = [temperature * -math.log(eps)] * 4
    assert metrics["align_l"].tolist() == pytest.approx(at_cap, rel=1e-3)
    push_of_orpo = gradients(orpo_loss(*inputs, beta=0.1, eps=eps)[0], *inputs)[1].float()
    torch.testing.assert_close(push_of_orpo, expected / temperature, rtol=rounding, atol=0)


def test_clamped_counts_the_responses_on_which_eps_acted():
    logp_w = torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0])
    logp_l = torch.tensor([-2e-6, -1e-7, 0.0, -1.0, -1e-9])
    # At temperature 1 log(1 - p_w) is not in the loss, so a chosen response cannot be clamped.
    assert asft_loss(logp_w, logp_l)[1]["clamped"].tolist() == [0, 1, 1, 0, 1]
    assert asft_loss(logp_w, logp_l, temperature=2.0)[1]["clamped"].tolist() == [0, 1, 1, 0, 1]
    sure = torch.tensor([-1e-7, 0.0])  # at exactly 0 the tempered term is 0, and needs no bound
    assert asft_loss(sure, sure - 1, temperature=2.0)[1]["clamped"].tolist() == [1, 0]
    assert orpo_loss(logp_w, logp_l)[1]["clamped"].tolist() == [0, 1, 1, 1, 1]
    assert asft_loss(logp_w, logp_l, eps=1e-5)[1]["clamped"].tolist() == [1, 1, 1, 0, 1]


def test_a_chosen_response_known_by_heart_costs_nothing_and_is_still_pulled():
    inputs = leaves([0.0], [-2.0], dtype=torch.float32)
    loss, metrics = asft_loss(*inputs, beta=0.1)
    assert (metrics["sft"].item(), metrics["align_w"].item()) == (0, 0)
    assert loss.item() == pytest.approx(-0.1 * math.log1p(-math.exp(-2)), rel=1e-6)
    assert gradients(loss, *inputs)[0].item() == pytest.approx(-1.1)


@each_variant
def test_half_types_are_computed_in_fp32_and_float64_stays(name, options):
    w, l = torch.tensor([-0.75, -3.0, -0.125]), torch.tensor([-0.25, -1.5, -2.0])  # exact in half
    inputs = [w, l, *[l, w] * LOSSES[name].reference]
    in_fp32, _ = LOSSES[name].function(*inputs, **options)
    wanted = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found, metrics = LOSSES[name].function(*(x.to(dtype) for x in inputs), **options)
        assert {x.dtype for x in (found, *metrics.values())} == {wanted.get(dtype, dtype)}
        rounding = 1e-6 if dtype is torch.float64 else 0
        torch.testing.assert_close(found.float(), in_fp32, rtol=rounding, atol=0)


# --------------------------------------------------------------------------- the rows of LOSSES


def test_the_table_says_which_log_probs_reference_and_options_each_loss_takes():
    """The options are the function's keyword arguments; the paper's beta is the default. dpo-norm
    is dpo of means with Tülu 3's beta."""
    # function, mean or sum, takes a reference, takes rows with one answer, options
    all_of_asft = {"beta": 0.1, "sft_weight": 1.0, "temperature": 1.0, "eps": 1e-6}
    rows = {name: (*loss, loss.options) for name, loss in LOSSES.items()}
    function, *norm = rows.pop("dpo-norm")
    assert (function.func, norm) == (asft.dpo_loss, ["mean", True, False, {"beta": 5.0}])
    assert rows == {
        "sft": (sft_loss, "mean", False, True, {}),
        "asft": (asft_loss, "mean", False, True, all_of_asft),
        "orpo": (orpo_loss, "mean", False, False, {"beta": 0.1, "eps": 1e-6}),
        "simpo": (asft.simpo_loss, "mean", False, False, {"beta": 2.0, "gamma": 1.0}),
        "dpo": (asft.dpo_loss, "sum", True, False, {"beta": 0.1}),
        "ipo": (asft.ipo_loss, "mean", True, False, {"beta": 0.1}),
    }


@pytest.mark.parametrize(
    "name, inputs, options, expected",
    [
        ("sft", (-0.5, -1.5), {}, 0.5),
        # With 40 digits.
        ("orpo", (-1.0, -1.0), dict(beta=0.1), 1.069314718056),
        ("orpo", (-0.7, -0.9), dict(beta=0.1), 0.752741130247),
        ("orpo", (-0.25, -2.5), dict(beta=0.1), 0.252508191438),
        # log(1 + exp(-z)) to 12 digits.
        ("simpo", (-0.5, -1.5), dict(beta=2.0, gamma=1.0), 0.313261687518),  # z = 2 * 1 - 1
        ("simpo", (-1.5, -0.5), dict(beta=2.0, gamma=1.0), 3.048587351574),  # z = -2 - 1
        ("simpo", (-0.5, -1.5), dict(beta=4.0, gamma=1.0), 0.048587351574),  # z = 4 - 1, not 4 - 4
        # Chosen rose by 1 over the reference and rejected fell by 0.5: h = 1.5.
        ("dpo", (-10.0, -12.0, -11.0, -11.5), dict(beta=2.0), 0.048587351574),  # z = 2 * 1.5
        ("dpo", (-12.0, -10.0, -11.5, -11.0), dict(beta=2.0), 3.048587351574),  # z = 2 * -1.5
        ("dpo", (-11.0, -11.5, -11.0, -11.5), dict(beta=0.1), 0.693147180560),  # z = 0
        ("dpo-norm", (-1.0, -2.5, -1.5, -2.4), {}, 0.048587351574),  # z = 5 * (0.5 + 0.1)
        ("dpo-norm", (-1.0, -2.5, -1.5, -2.4), dict(beta=10.0), 0.002475685137),  # z = 10 * 0.6
        ("ipo", (-10.0, -12.0, -11.0, -11.5), dict(beta=0.1), 12.25),  # (1.5 - 5)^2
        ("ipo", (-10.0, -12.0, -11.0, -11.5), dict(beta=0.5), 0.25),  # (1.5 - 1)^2
        ("ipo", (-11.0, -11.5, -11.0, -11.5), dict(beta=0.1), 25.0),  # (0 - 5)^2
    ],
)
def test_each_baseline_agrees_with_its_definition_worked_by_hand(name, inputs, options, expected):
    found, _ = LOSSES[name].function(*leaves(*([x] for x in inputs)), **options)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_implicit_rewards_are_beta_times_the_log_ratio():
    def rewards(metrics):
        return [metrics[name].item() for name in ("reward_w", "reward_l", "reward_margin")]

    inputs = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5)]
    for loss in (asft.dpo_loss, asft.ipo_loss):
        assert rewards(loss(*inputs, beta=0.5)[1]) == [0.5, -0.25, 0.75]
    metrics = asft.simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.5]), beta=2.0)[1]
    assert rewards(metrics) == [-1.0, -3.0, 2.0]


@each_variant
def test_a_loss_is_one_value_per_pair_and_its_metrics_are_detached_values_per_pair(name, options):
    inputs = leaves([-0.5, -1.0, -2.0], [-1.0, -0.4, -3.0], dtype=torch.float32)
    loss, metrics = call(name, *inputs, **options)
    assert loss.shape == (3,) and loss.requires_grad and metrics
    assert all(x.shape == (3,) and not x.requires_grad for x in metrics.values())
    swapped, _ = call(name, *(x.flip(0) for x in inputs), **options)
    torch.testing.assert_close(swapped.flip(0), loss)  # no pair enters another's


def test_sft_does_not_depend_on_the_rejected_response_and_can_go_without():
    logp_w, logp_l = leaves([-0.5, -1.0], [-1.0, -1.0])
    loss, metrics = sft_loss(logp_w, logp_l)
    assert loss.tolist() == [0.5, 1.0] == sft_loss(logp_w)[0].tolist()
    assert [g.tolist() for g in gradients(loss, logp_w, logp_l)] == [[-1, -1], [0, 0]]
    assert (metrics["sft"].tolist(), metrics["align"].tolist()) == ([0.5, 1.0], [0, 0])
    assert "margin" not in sft_loss(logp_w)[1]


@pytest.mark.parametrize("name", LOSSES)
def test_log_probs_of_unequal_shapes_are_refused_rather_than_broadcast(name):
    logps = [torch.full((3,), -1.0) for _ in range(4 if LOSSES[name].reference else 2)]
    for i in range(len(logps)):
        for wrong in (torch.full((3, 1), -1.0), torch.tensor(-1.0), torch.full((2,), -1.0)):
            with pytest.raises(ValueError, match="unequal shapes"):
                LOSSES[name].function(*logps[:i], wrong, *logps[i + 1 :])


ONLY_ASFT = [("beta", -0.1), ("sft_weight", -1.0), ("temperature", 0.0), ("temperature", -1.0)]


@pytest.mark.parametrize(
    "loss, option, value",
    [(asft_loss, *row) for row in ONLY_ASFT]
    + [(loss, "eps", eps) for loss in (asft_loss, orpo_loss) for eps in (0.0, -1e-6)],
)
def test_an_option_out_of_range_is_refused_and_quoted(loss, option, value):
    with pytest.raises(ValueError, match=rf"{option}={value}"):
        loss(torch.tensor([-1.0]), torch.tensor([-1.0]), **{option: value})


# ------------------------------------------------------------------------------- response_logps

# Probabilities of a vocabulary of three; the scored ones are sixteenths.
PROBABILITIES = [
    [[0.10, 0.20, 0.70], [0.50, 0.25, 0.25], [0.50, 0.30, 0.20], [0.05, 0.05, 0.90]],
    [[0.30, 0.0625, 0.6375], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]],
    [[0.25, 0.25, 0.50], [0.125, 0.375, 0.5], [0.75, 0.125, 0.125], [0.9, 0.05, 0.05]],
]
TOKENS = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 0], [1, 2, 0, 1]])
SCORED = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1]]).bool()


def worked_logits():
    """The logs of PROBABILITIES, up to a constant per row."""
    constants = torch.tensor([7.0, -3.0, 0.0, 40.0], dtype=torch.float64)[None, :, None]
    return torch.tensor(PROBABILITIES, dtype=torch.float64).log() + constants


def test_a_token_is_predicted_by_the_logits_one_place_before_it():
    means, sums = response_logps(worked_logits(), TOKENS, SCORED)
    expected = torch.tensor([1 / 8, 1 / 16, 1 / 2 / 8 / 8], dtype=torch.float64).log()
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(means, expected / torch.tensor([2, 1, 3]), rtol=0, atol=1e-12)


def test_the_padding_of_a_row_does_not_matter():
    logits, tokens = worked_logits(), TOKENS.clone()
    logits[1, 1:], logits[0, 0], logits[:, 3] = math.nan, math.inf, math.nan
    tokens[1, 2:], tokens[0, 0] = 1, 2
    logits.requires_grad_()
    clean = response_logps(worked_logits(), TOKENS, SCORED)
    torch.testing.assert_close(response_logps(logits, tokens, SCORED), clean, rtol=0, atol=0)
    (grad,) = gradients(response_logps(logits, tokens, SCORED)[1], logits)
    assert torch.isfinite(grad).all()


def test_the_gradient_of_a_summed_log_prob_is_one_hot_minus_softmax_at_the_scored_places_only():
    logits = worked_logits().requires_grad_()
    (grad,) = gradients(response_logps(logits, TOKENS, SCORED)[1], logits)
    by_hand = torch.zeros(3, 4, 3, dtype=torch.float64)
    by_hand[0, 1:3] = torch.tensor([[-0.5, -0.25, 0.75], [0.5, -0.3, -0.2]])
    by_hand[1, 0] = torch.tensor([-0.3, 0.9375, -0.6375])
    by_hand[2, 0] = torch.tensor([-0.25, -0.25, 0.5])
    by_hand[2, 1:3] = torch.tensor([[0.875, -0.375, -0.5], [-0.75, 0.875, -0.125]])
    torch.testing.assert_close(grad, by_hand, rtol=0, atol=1e-7)
    (mean_grad,) = gradients(response_logps(logits, TOKENS, SCORED)[0], logits)
    lengths = torch.tensor([2, 1, 3])[:, None, None]
    torch.testing.assert_close(mean_grad, by_hand / lengths, rtol=0, atol=1e-7)


def test_bf16_logits_are_summed_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, 1000, generator=generator).mul(3).bfloat16()
    tokens = torch.randint(1000, (2, 40), generator=generator)
    scored = torch.arange(40).expand(2, 40) >= torch.tensor([[3], [20]])
    means, sums = response_logps(logits, tokens, scored)
    assert means.dtype == sums.dtype == torch.float32
    of_tokens = F.log_softmax(logits.double(), -1)
    expected = [
        sum(of_tokens[r, t - 1, tokens[r, t]].item() for t in range(start, 40))
        for r, start in enumerate((3, 20))
    ]
    assert sums.tolist() == pytest.approx(expected, rel=1e-6)
    assert means.tolist() == pytest.approx([expected[0] / 37, expected[1] / 20], rel=1e-6)
    assert response_logps(logits.double(), tokens, scored)[0].dtype == torch.float64


@pytest.mark.parametrize(
    "logits, tokens, scored, said",
    [
        # Its mean would be 0/0; nothing predicts a first token; and shapes already shifted.
        (worked_logits(), TOKENS, SCORED & (TOKENS[:, :1] != 2), "at least one scored token"),
        (worked_logits(), TOKENS, SCORED | (torch.arange(4) == 0), "not its first"),
        (worked_logits()[:, 1:], TOKENS, SCORED, "found"),
        (worked_logits(), TOKENS[:, 1:], SCORED, "found"),
        (worked_logits(), TOKENS, SCORED[:2], "found"),
    ],
    ids=["no scored token", "scored first token", "logits", "tokens", "scored"],
)
def test_response_logps_refuses_unscored_rows_and_unequal_shapes(logits, tokens, scored, said):
    with pytest.raises(ValueError, match=said):
        response_logps(logits, tokens, scored)
