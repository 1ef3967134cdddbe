"""WUDI against autograd and torch.optim.Adam on the loss as the paper writes it."""

import pytest
import torch
from merging_models import assert_flat, flatten, make_models

from epmq_gptq.merging import merge_state_dicts, method


def loss(tau, taus):
    return sum(((tau - t) @ t.T).square().sum() / t.square().sum() for t in taus if t.any())


def reference_wudi(taus, iterations=400, lr=1e-5):
    tau = torch.nn.Parameter(sum(taus))
    adam = torch.optim.Adam([tau], lr=lr)
    for _ in range(iterations):
        adam.zero_grad()
        loss(tau, taus).backward()
        adam.step()
    return tau.detach()


def _experts(count, out=24, width=16, scale=0.02, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.zeros(out, width)}
    return base, {
        "abcd"[i]: {"w": scale * torch.randn(out, width, generator=g)} for i in range(count)
    }


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("block", [7, 64, 1 << 22])
def test_follows_the_reference(count, block, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    base, experts = _experts(count)
    taus = [state["w"] for state in experts.values()]
    got, want = merge_state_dicts("wudi", base, experts)["w"], reference_wudi(taus)
    moved = (want - sum(taus)).abs().max()
    assert moved > 2e-3
    # The gradients agree to fp32 rounding; Adam turns that into a small part of one step of 1e-5
    # where the gradient passes zero. Everything moved is 200 times larger.
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - want).abs().mean() < 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_decreases(seed):
    base, experts = _experts(3, seed=seed)
    taus = [state["w"] for state in experts.values()]
    losses = [
        loss(merge_state_dicts("wudi", base, experts, {"iterations": steps})["w"], taus)
        for steps in (0, 100, 200, 400)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_no_steps_is_the_sum_of_task_vectors():
    base, experts = _experts(3)
    merged = merge_state_dicts("wudi", base, experts, {"iterations": 0})
    total = experts["a"]["w"] + experts["b"]["w"] + experts["c"]["w"]
    assert torch.equal(merged["w"], total)


def test_one_expert_stays_itself():
    # Its loss is zero from the start, and so is the gradient: exactly.
    base, experts = make_models(1)
    want = flatten(base) + (flatten(experts["a"]) - flatten(base))
    assert_flat(merge_state_dicts("wudi", base, experts), want)


def test_an_expert_equal_to_the_base_counts_only_in_means():
    base, experts = make_models(2)
    without = merge_state_dicts("wudi", base, experts)
    merged = merge_state_dicts("wudi", base, {**experts, "c": dict(base)})
    assert torch.equal(merged["model.layers.0.up.weight"], without["model.layers.0.up.weight"])
    name = "model.conv.weight"
    tau = (experts["a"][name] - base[name]) + (experts["b"][name] - base[name])
    assert torch.equal(merged[name], base[name] + tau / 3)


def test_tensors_that_are_not_matrices_take_the_mean():
    base, experts = make_models(3)
    merged = merge_state_dicts("wudi", base, experts)
    for name in ("model.layers.0.norm.weight", "model.conv.weight", "model.scale"):
        tau = sum(state[name] - base[name] for state in experts.values()) / 3
        assert torch.equal(merged[name], base[name] + tau)


def test_lr_scales_the_way():
    base, experts = _experts(2)
    start = experts["a"]["w"] + experts["b"]["w"]
    step = merge_state_dicts("wudi", base, experts, {"iterations": 1, "lr": 1e-3})["w"] - start
    # Adam's first step is lr in every coordinate whose gradient is well above its epsilon.
    assert (step.abs() - 1e-3).abs().median() < 1e-6
