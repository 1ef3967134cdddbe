"""The target is the optimum of eq. 12, in float64 and in its limits."""

import pytest
import torch

from epmq_gptq.method.target import (
    add_anchor_,
    anchor_strength,
    expert_target,
    numerical_rank,
    objective,
)

WIDTH, OUT = 24, 10


def problem(tokens=(40, 15, 90), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    W_m = torch.randn(OUT, WIDTH, generator=generator)
    experts = []
    for count in tokens:
        X = torch.randn(count, WIDTH, generator=generator) @ torch.randn(
            WIDTH, WIDTH, generator=generator
        )
        W_i = W_m + 0.2 * torch.randn(OUT, WIDTH, generator=generator)
        experts.append((W_i, X.T @ X))
    return W_m, experts


def solve(W_m, experts, alpha):
    H = sum(H_i for _, H_i in experts)
    lam = anchor_strength(H, alpha)
    D = sum((W_i - W_m) @ H_i for W_i, H_i in experts)
    H_E = add_anchor_(H.clone(), lam)
    return expert_target(W_m, D, torch.linalg.cholesky(H_E)), H_E, lam


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 10.0])
def test_target_is_the_float64_optimum_of_eq_12(alpha):
    W_m, experts = problem()
    target, H_E, lam = solve(W_m, experts, alpha)
    H64 = sum(H_i.double() for _, H_i in experts)
    assert lam == pytest.approx(alpha * float(H64.trace()) / WIDTH, rel=1e-6)
    R = sum(W_i.double() @ H_i.double() for W_i, H_i in experts) + lam * W_m.double()
    exact = R @ torch.linalg.inv(H64 + lam * torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(target.W.double(), exact, rtol=1e-4, atol=1e-5)
    best = objective(exact, W_m, experts, lam)
    assert objective(target.W, W_m, experts, lam) <= best * (1 + 1e-9)
    for seed in range(3):
        step = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
        assert objective(exact + 1e-3 * step, W_m, experts, lam) > best


def test_excess_is_the_quadratic_form_around_the_target():
    W_m, experts = problem()
    target, H_E, lam = solve(W_m, experts, 0.3)
    best = objective(target.W, W_m, experts, lam)
    Q = (target.W * 8).round() / 8
    E = (Q - target.W).double()
    quadratic = float(((E @ H_E.double()) * E).sum())
    assert objective(Q, W_m, experts, lam) - best == pytest.approx(quadratic, rel=1e-4)
    merge = objective(W_m, W_m, experts, lam) - best
    assert target.merge_excess == pytest.approx(merge, rel=1e-4)


def test_a_large_anchor_gives_the_merge():
    W_m, experts = problem()
    target, _, _ = solve(W_m, experts, 1e6)
    torch.testing.assert_close(target.W, W_m, rtol=0, atol=1e-5)


def test_no_delta_gives_the_merge_bit_for_bit():
    W_m, experts = problem()
    H = sum(H_i for _, H_i in experts)
    target = expert_target(W_m, None, torch.linalg.cholesky(H))
    assert torch.equal(target.W, W_m) and target.merge_excess == 0.0
    assert target.W.data_ptr() != W_m.data_ptr()


def test_dead_input_columns_keep_the_merged_column():
    W_m, experts = problem()
    for _, H_i in experts:
        H_i[5, :] = 0
        H_i[:, 5] = 0
    target, _, _ = solve(W_m, experts, 0.1)
    assert torch.equal(target.W[:, 5], W_m[:, 5])
    assert not torch.equal(target.W[:, 4], W_m[:, 4])


def test_one_expert_and_no_anchor_gives_that_expert():
    W_m, experts = problem(tokens=(200,))
    target, _, _ = solve(W_m, experts, 0.0)
    torch.testing.assert_close(target.W, experts[0][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 7, WIDTH])
def test_numerical_rank_counts_independent_tokens(rank):
    X = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(1))
    assert numerical_rank(X.T @ X) == rank
    assert numerical_rank(torch.zeros(WIDTH, WIDTH)) == 0
