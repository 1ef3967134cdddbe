"""α by held-out rows and weights by the worst expert, on sums made in float64."""

from __future__ import annotations

import pytest
import torch

from epmq_gptq.method import choice
from epmq_gptq.method.choice import GRID, LEAST, choose_alpha, min_max_weights
from epmq_gptq.method.statistics import Moments
from epmq_gptq.method.target import add_anchor_, anchor_strength, bias_shift, centred, gain

D_IN, OUT = 24, 6


def rows(count, seed, noise=0.0, mean=0.0):
    """Inputs, and targets of a fixed linear map with noise on them."""
    truth = torch.Generator().manual_seed(0)
    W = torch.randn(OUT, D_IN, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, D_IN, generator=generator) * torch.logspace(0, -2, D_IN) + mean
    return X, X @ W.T + noise * torch.randn(count, OUT, generator=generator) + 0.7


def moments(X, T):
    """With W_m = 0 and b_m = 0."""
    X, T = X.float(), T.float()
    return Moments(X.T @ X, T.T @ X, X.sum(0), T.sum(0), float(len(X)))


def solved(known, alpha, anchor="identity"):
    H_E = add_anchor_(known.H.clone(), anchor_strength(known.H, alpha), anchor)
    return known.D @ torch.linalg.inv(H_E.double()).float()


def error(change, shift, X, T):
    return float((X.double() @ change.double().T + shift.double() - T.double()).square().sum())


@pytest.mark.parametrize("anchor", ["identity", "channel"])
@pytest.mark.parametrize("free", [False, True])
def test_the_gain_is_what_the_error_falls_by(anchor, free):
    X, T = rows(40, 1, noise=0.5, mean=0.3)
    known = moments(X, T)
    change = solved(centred([known])[0] if free else known, 0.1, anchor)
    shift = bias_shift(change, known) if free else torch.zeros(OUT)
    other = rows(30, 2, noise=0.5, mean=0.3)
    before = error(torch.zeros_like(change), torch.zeros(OUT), *other)
    fallen = before - error(change, shift, *other)
    got = gain(change, shift if free else None, moments(*other))
    assert got == pytest.approx(fallen, rel=1e-4)


@pytest.mark.parametrize("anchor", ["identity", "channel"])
@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_the_chosen_alpha_is_the_best_of_the_grid_by_brute_force(anchor, noise):
    fitted, held_out = rows(30, 1, noise), rows(200, 2, noise)
    errors = {
        alpha: error(solved(moments(*fitted), alpha, anchor), torch.zeros(OUT), *held_out)
        for alpha in GRID
    }
    chosen = choose_alpha([moments(*fitted)], [moments(*held_out)], anchor=anchor)
    assert chosen.alpha == min(errors, key=errors.get)
    assert set(chosen.gains) < set(GRID) and len(chosen.gains) <= 5


def test_noise_asks_for_a_stronger_anchor():
    few, many = (
        choose_alpha([moments(*rows(30, 1, noise))], [moments(*rows(200, 2, noise))]).alpha
        for noise in (0.01, 3.0)
    )
    assert few < many


def test_where_nothing_can_be_learnt_the_merge_stays():
    X, _ = rows(30, 1)
    noise = torch.randn(30, OUT, generator=torch.Generator().manual_seed(3))
    Y, _ = rows(200, 2)
    chosen = choose_alpha([moments(X, 5 * noise)], [moments(Y, torch.zeros(200, OUT))])
    assert chosen.alpha is None and max(chosen.gains.values()) <= 0


def test_layers_of_one_input_choose_together():
    easy, hard = rows(30, 1, 0.01), rows(30, 1, 3.0)
    apart = rows(200, 2, 0.01), rows(200, 2, 3.0)
    together = choose_alpha([moments(*easy), moments(*hard)], [moments(*one) for one in apart])
    gains = [
        choose_alpha([moments(*one)], [moments(*other)]).gains
        for one, other in zip((easy, hard), apart, strict=True)
    ]
    everywhere = [alpha for alpha in together.gains if all(alpha in g for g in gains)]
    assert len(everywhere) >= 3
    for alpha in everywhere:
        assert together.gains[alpha] == pytest.approx(sum(g[alpha] for g in gains), rel=1e-5)


def test_where_only_the_strongest_anchor_can_be_solved_it_is_found(monkeypatch):
    monkeypatch.setattr(choice, "LEAST", 5 / D_IN)  # λ = α tr(H) / d is below it up to α = 3
    fitted, held_out = moments(*rows(30, 1, 0.01)), moments(*rows(200, 2, 0.01))
    chosen = choose_alpha([fitted], [held_out])
    assert chosen.alpha == GRID[-1] and chosen.gains[3.0] == float("-inf")


@pytest.mark.parametrize("free", [False, True])
def test_some_outputs_tell_what_all_of_them_would(free):
    X, _ = rows(300, 1)
    generator = torch.Generator().manual_seed(5)
    T = X @ torch.randn(D_IN, 40, generator=generator) + torch.randn(300, 40, generator=generator)
    parts = [moments(X[:60], T[:60])], [moments(X[60:], T[60:])]
    whole, some = (choose_alpha(*parts, refit_bias=[free], outputs=n) for n in (40, 13))
    # Every fourth of the 40 outputs, each standing for four.
    few = [[one._replace(D=one.D[::4], outputs=one.outputs[::4]) for one in part] for part in parts]
    picked = choose_alpha(*few, refit_bias=[free])
    assert some.gains == pytest.approx({a: 4 * g for a, g in picked.gains.items()}, rel=1e-5)
    assert some.alpha == whole.alpha


def test_an_alpha_that_fp32_cannot_solve_is_not_chosen():
    """Inputs that are nearly their mean: what is left around it is rounding."""
    X, T = rows(400, 1)
    X = 1e-5 * X + 3
    fitted, held_out = moments(X[:300], T[:300]), moments(X[300:], T[300:])
    chosen = choose_alpha([fitted], [held_out], refit_bias=[True])
    least = LEAST * float(fitted.H.trace())
    allowed = {a for a in GRID if anchor_strength(centred([fitted])[0].H, a) >= least}
    assert allowed < set(GRID) and chosen.alpha in (None, *allowed)
    refused = set(chosen.gains) - allowed
    assert refused and all(chosen.gains[alpha] == float("-inf") for alpha in refused)


def test_a_free_bias_takes_what_the_inputs_mean_explains():
    X, T = rows(40, 1, noise=0.1, mean=0.3)
    known = moments(X, T)
    change = solved(centred([known])[0], 0.01)
    shift = bias_shift(change, known)
    left = T - X @ change.T - shift
    assert left.mean(0).abs().max() < 1e-4
    # Any other shift is worse.
    assert error(change, shift, X, T) < error(change, shift + 0.01, X, T)


def test_a_channel_without_energy_keeps_the_merge_under_both_anchors():
    X, T = rows(40, 1)
    X[:, 5] = 0
    for anchor in ("identity", "channel"):
        change = solved(moments(X, T), 0.1, anchor)
        assert torch.isfinite(change).all() and not change[:, 5].any()


def test_the_channel_anchor_does_not_see_how_inputs_are_scaled():
    X, T = rows(40, 1, noise=0.5)
    scale = torch.logspace(-1, 1, D_IN)
    for anchor, same in (("channel", True), ("identity", False)):
        plain = solved(moments(X, T), 0.3, anchor)
        scaled = solved(moments(X * scale, T), 0.3, anchor) * scale
        assert torch.allclose(plain, scaled, rtol=1e-2, atol=1e-3) == same


# ---- weights -------------------------------------------------------------------------------------


def conflicting():
    """Two experts that want opposite things, one with thirty times the energy."""
    X, T = rows(60, 1)
    Y, _ = rows(60, 2)
    return {"loud": [moments(5.5 * X, 5.5 * T)], "quiet": [moments(Y, -0.7 * T[:60])]}


def kept(parts, weights, name, alpha=0.01):
    total = Moments(
        sum(weights[n] * p[0].H for n, p in parts.items()),
        sum(weights[n] * p[0].D for n, p in parts.items()),
    )
    own = gain(solved(parts[name][0], alpha), None, parts[name][0])
    return gain(solved(total, alpha), None, parts[name][0]) / own


def test_the_worst_expert_keeps_more_than_under_equal_weights():
    parts = conflicting()
    weights = min_max_weights(parts, 0.01)
    assert weights["quiet"] > 1 > weights["loud"]
    assert sum(weights.values()) == pytest.approx(2)
    equal = dict.fromkeys(parts, 1.0)
    worst = [min(kept(parts, w, name) for name in parts) for w in (equal, weights)]
    assert worst[1] > worst[0]


def test_one_expert_or_equal_ones_weigh_one():
    parts = conflicting()
    assert min_max_weights({"only": parts["loud"]}, 0.01) == {"only": 1.0}
    same = {"a": parts["loud"], "b": parts["loud"], "none": [Moments(parts["loud"][0].H, None)]}
    weights = min_max_weights(same, 0.01)
    assert weights["a"] == pytest.approx(weights["b"])
