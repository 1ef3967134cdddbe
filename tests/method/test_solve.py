"""The targets of layers of one input, against eq. 13 to 20 in float64."""

import pytest
import torch

from epmq_gptq.method.deltas import WeightDelta
from epmq_gptq.method.solve import PLAIN_DAMPING, DataFree, LayerOptions, SolveOptions, Sums, solve
from epmq_gptq.method.statistics import Moments

OUT, IN = 5, 7


@pytest.fixture
def problem():
    """Two experts, two layers of one input: W_m, [W_i] of each layer and [X_i], all fp64."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    merged = [normal(OUT, IN) for _ in range(2)]
    experts = [[W_m + 0.1 * normal(OUT, IN) for _ in range(2)] for W_m in merged]
    return merged, experts, [normal(IN, 40), normal(IN, 25)]


def moments_of(merged, experts, inputs):
    """Moments of each layer over all experts, fp32."""
    H = sum(X @ X.T for X in inputs)
    found = []
    for W_m, each in zip(merged, experts, strict=True):
        D = sum((W - W_m) @ X @ X.T for W, X in zip(each, inputs, strict=True))
        s = sum(X.sum(1) for X in inputs)
        d = sum((W - W_m) @ X.sum(1) for W, X in zip(each, inputs, strict=True))
        count = float(sum(X.shape[1] for X in inputs))
        found.append(Moments(*(t.float() for t in (H, D, s, d)), count))
    return found


def ask(problem, *layers, held_out=None, **options):
    merged, experts, inputs = problem
    sums = Sums({"": moments_of(merged, experts, inputs)}, {} if held_out is None else held_out)
    return solve(sums, [W.float() for W in merged], SolveOptions(layers, **options))


@pytest.mark.parametrize("alphas", [(0.1, 0.1), (0.1, 2.0), ("gptq", 0.1)])
def test_it_is_the_papers_target(problem, alphas):
    merged, experts, inputs = problem
    H = sum(X @ X.T for X in inputs)
    solutions = ask(problem, *(LayerOptions(alpha) for alpha in alphas))
    for W_m, each, alpha, one in zip(merged, experts, alphas, solutions, strict=True):
        plain = alpha == "gptq"
        lam = (PLAIN_DAMPING if plain else alpha) * float(H.trace()) / IN
        H_E = H + lam * torch.eye(IN, dtype=torch.float64)
        R = sum(W @ X @ X.T for W, X in zip(each, inputs, strict=True)) + lam * W_m
        W = W_m if plain else R @ torch.linalg.inv(H_E)
        torch.testing.assert_close(one.W.double(), W, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.H_E.double(), H_E, rtol=1e-5, atol=1e-4)
        excess = float((((W_m - W) @ H_E) * (W_m - W)).sum())
        assert one.merge_excess == pytest.approx(excess, rel=1e-4, abs=1e-6)
        assert one.lam == pytest.approx(lam) and one.merged == plain and not one.fault
    assert (solutions[0].H_E is solutions[1].H_E) == (alphas[0] == alphas[1])


def test_equal_experts_give_the_merge_bit_for_bit(problem):
    merged, _, inputs = problem
    H = sum(X @ X.T for X in inputs).float()
    sums = Sums({"": [Moments(H, None), Moments(H, None)]}, {})
    W_m = [W.float() for W in merged]
    for one, W in zip(solve(sums, W_m, SolveOptions([LayerOptions(0.01)] * 2)), W_m, strict=True):
        assert torch.equal(one.W, W) and one.merge_excess == 0


def test_a_reason_to_keep_the_merge_is_kept(problem):
    one, other = ask(problem, LayerOptions(0.1, keep="few tokens"), LayerOptions(0.1))
    assert one.merged and one.reason == "few tokens"
    assert torch.equal(one.W, problem[0][0].float()) and not other.merged


def test_alpha_is_chosen_by_the_rows_that_are_held_out_and_these_count(problem):
    merged, experts, inputs = problem
    held_out = {"": moments_of(merged, experts, [X[:, :5] for X in inputs])}
    one, other = ask(problem, *[LayerOptions("auto")] * 2, held_out=held_out)
    assert one.alpha == other.alpha and str(f"{one.alpha:g}") in one.held_out
    assert one.guard.held_out is held_out[""][0]
    H = sum(X @ X.T + X[:, :5] @ X[:, :5].T for X in inputs)
    H_E = H + one.lam * torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(one.H_E.double(), H_E, rtol=1e-5, atol=1e-4)
    (none, _) = ask(problem, *[LayerOptions("auto")] * 2)
    assert none.merged and none.reason == "no held-out row was routed here"


def test_a_bias_is_fitted_to_what_its_weight_leaves(problem):
    merged, experts, inputs = problem
    one, _ = ask(problem, *[LayerOptions(1e-6, refit_bias=True)] * 2)
    Q = one.W.double()
    shift = (one.bias.outputs.double() - Q @ one.bias.inputs.double()) / one.bias.count
    left = [W @ X - Q @ X for W, X in zip(experts[0], inputs, strict=True)]
    torch.testing.assert_close(shift, torch.cat(left, 1).mean(1), rtol=0, atol=1e-5)


def test_an_expert_without_rows_counts_by_its_task_vector(problem):
    merged, experts, inputs = problem
    tau = experts[0][0].float()
    lone = [DataFree(0.5, WeightDelta(tau, None), WeightDelta(tau - merged[0].float(), None))]
    one, _ = ask(problem, LayerOptions(0.1, data_free=lone), LayerOptions(0.1))
    H = sum(X @ X.T for X in inputs)
    C = tau.double().T @ tau.double()
    C *= 0.5 * H.trace() / C.trace()
    lam = 0.1 * float((H + C).trace()) / IN
    H_E = H + C + lam * torch.eye(IN, dtype=torch.float64)
    D = sum((W - merged[0]) @ X @ X.T for W, X in zip(experts[0], inputs, strict=True))
    D += (tau.double() - merged[0]) @ C
    expected = merged[0] + D @ torch.linalg.inv(H_E)
    torch.testing.assert_close(one.W.double(), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_solved_says_why(problem):
    merged, experts, _ = problem
    none = torch.zeros(IN, 3, dtype=torch.float64)
    assert {one.fault for one in ask((merged, experts, [none] * 2), *[LayerOptions(0.1)] * 2)} == {
        "no input"
    }
    few = [torch.randn(IN, 2, dtype=torch.float64) for _ in range(2)]
    one, _ = ask((merged, experts, few), *[LayerOptions(0.0)] * 2)
    assert one.fault == "rank" and one.rank == 4 and one.W is None
    broken = [torch.full_like(X, 1e30) for X in few]
    assert ask((merged, experts, broken), *[LayerOptions(0.1)] * 2)[0].fault == "indefinite"
