"""TIES against the formulas on one flat vector, with torch.kthvalue and argsort."""

import pytest
import torch
from merging_models import assert_flat, flatten, floating, make_models

from epmq_gptq.merging import merge_state_dicts
from epmq_gptq.merging.core import run_method
from epmq_gptq.merging.method import Stack
from epmq_gptq.merging.ties import Ties

pytestmark = pytest.mark.usefixtures("small_blocks")


def add(rows):
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def reference_ties(theta_0, thetas, threshold=20, merge_func="sum", lam=0.3):
    """field.md section 1, (1)-(4), on whole vectors (K, d)."""
    taus = torch.stack([theta - theta_0 for theta in thetas])
    d = taus.shape[1]
    kth = taus.abs().kthvalue(d - int(d * (threshold / 100)), dim=1, keepdim=True).values
    taus = taus * (taus.abs() >= kth)
    sign = torch.sign(add(taus))
    sign[sign == 0] = torch.sign(sign.sum())
    selected = taus * torch.where(sign > 0, taus > 0, taus < 0)
    if merge_func == "sum":
        merged = add(selected)
    elif merge_func == "mean":
        merged = add(selected) / (selected != 0).sum(dim=0).clamp(min=1)
    else:
        merged = selected.abs().max(dim=0).values * sign
    return theta_0 + lam * merged


@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("threshold", [20, 50, 99.5])
def test_equals_the_flat_reference(merge_func, grid, threshold):
    base, experts = make_models(3, grid=grid, seed=3)
    want = reference_ties(
        flatten(base), [flatten(s) for s in experts.values()], threshold, merge_func
    )
    options = {"threshold": threshold, "merge_func": merge_func}
    assert_flat(merge_state_dicts("ties", base, experts, options), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    base, experts = make_models(4, dtype=dtype, seed=4)
    want = reference_ties(flatten(base), [flatten(s) for s in experts.values()])
    assert_flat(merge_state_dicts("ties", base, experts), want.to(dtype).float())


def test_one_expert_is_its_trimmed_task_vector():
    base, experts = make_models(1)
    theta_0, tau = flatten(base), flatten(experts["a"]) - flatten(base)
    keep = torch.zeros_like(tau)
    # One more than 20 %: the trim keeps what is at least the (d - floor(0.2 d))-th smallest.
    keep[tau.abs().argsort(descending=True)[: int(0.2 * len(tau)) + 1]] = 1
    assert_flat(merge_state_dicts("ties", base, experts), theta_0 + 0.3 * (tau * keep))


def test_at_100_percent_nothing_is_trimmed():
    base, experts = make_models(1)
    want = flatten(base) + (flatten(experts["a"]) - flatten(base))
    assert_flat(merge_state_dicts("ties", base, experts, {"threshold": 100, "lam": 1}), want)


def _one_tensor(*taus):
    return {"w": torch.zeros(len(taus[0]))}, {
        "abc"[i]: {"w": torch.tensor(tau)} for i, tau in enumerate(taus)
    }


@pytest.mark.parametrize(
    ("taus", "merge_func", "want"),
    [
        # Entry 0 cancels; entries 1 and 2 vote +, so + wins entry 0.
        (([1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]), "sum", [1.0, 4.0, 6.0]),
        # ... and here -.
        (([1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]), "sum", [-1.0, -4.0, -6.0]),
        (([1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]), "mean", [-1.0, -2.0, -3.0]),
        (([1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]), "max", [-1.0, -2.0, -3.0]),
        # The votes are even: the sign stays 0, which the source suite reads as negative for sum
        # and mean and which makes max zero.
        (([1.0, 2.0, -3.0], [-1.0, 2.0, -3.0]), "sum", [-1.0, 4.0, -6.0]),
        (([1.0, 2.0, -3.0], [-1.0, 2.0, -3.0]), "mean", [-1.0, 2.0, -3.0]),
        (([1.0, 2.0, -3.0], [-1.0, 2.0, -3.0]), "max", [0.0, 2.0, -3.0]),
    ],
)
def test_a_zero_sum_takes_the_sign_of_the_majority(taus, merge_func, want):
    base, experts = _one_tensor(*taus)
    options = {"threshold": 100, "lam": 1, "merge_func": merge_func}
    merged = merge_state_dicts("ties", base, experts, options)
    assert merged["w"].tolist() == want
    flat = [state["w"] for state in experts.values()]
    assert torch.equal(merged["w"], reference_ties(base["w"], flat, 99.99, merge_func, 1.0))


def test_the_majority_is_that_of_the_whole_model():
    # In tensor `w` alone + would win; `v` has more entries, all -.
    base = {"w": torch.zeros(2), "v": torch.zeros(4)}
    minus = -torch.ones(4)
    experts = {
        "a": {"w": torch.tensor([1.0, 1.0]), "v": minus},
        "b": {"w": torch.tensor([-1.0, 1.0]), "v": minus},
    }
    merged = merge_state_dicts("ties", base, experts, {"threshold": 100, "lam": 1})
    assert merged["w"].tolist() == [-1.0, 2.0]


def test_reads_each_tensor_as_often_as_it_says():
    base, experts = make_models(2)
    names, reads = floating(base), []

    def load(name):
        reads.append(name)
        return Stack(name, base[name], {e: s[name] for e, s in experts.items()}, torch.float32)

    run_method(Ties(), names, load, lambda name, tensor: None)
    assert reads == names * Ties.passes


# ---- the per-tensor variant ----------------------------------------------------------------------


def reference_per_tensor(theta_0, thetas, density, weights, normalize, lam):
    """mergekit's steps on one tensor: keep k largest, weight, elect, sum, normalize."""
    size = theta_0.numel()
    taus = []
    for theta, weight in zip(thetas, weights, strict=True):
        tau = (theta - theta_0).reshape(-1)
        order = tau.abs().argsort(descending=True, stable=True)
        mask = torch.zeros(size)
        mask[order[: max(1, int(density * size))]] = 1
        taus.append(weight * (tau * mask))
    sign = (add(taus) >= 0).float() * 2 - 1
    masks = [(tau.sign() == sign).float() for tau in taus]
    merged = add([tau * mask for tau, mask in zip(taus, masks, strict=True)])
    if normalize:
        divisor = add([weight * mask for weight, mask in zip(weights, masks, strict=True)])
        divisor[divisor == 0] = 1
        merged = merged / divisor
    return theta_0 + (lam * merged).reshape(theta_0.shape)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_per_tensor_equals_the_reference(grid, density, normalize):
    base, experts = make_models(3, grid=grid, seed=5)
    weights = {"a": 1.0, "b": 0.5, "c": -0.25}
    options = {"density": density, "weights": weights, "normalize": normalize, "lam": 0.8}
    merged = merge_state_dicts("ties_per_tensor", base, experts, options)
    for name in floating(base):
        if base[name].numel():
            thetas = [state[name] for state in experts.values()]
            want = reference_per_tensor(
                base[name], thetas, density, list(weights.values()), normalize, 0.8
            )
            assert torch.equal(merged[name], want), name


def test_per_tensor_ties_go_to_plus():
    base, experts = _one_tensor([1.0, -2.0], [-1.0, -2.0])
    merged = merge_state_dicts("ties_per_tensor", base, experts, {"normalize": False})
    assert merged["w"].tolist() == [1.0, -4.0]


def test_per_tensor_default_weights_are_one():
    base, experts = make_models(2)
    ones = merge_state_dicts("ties_per_tensor", base, experts, {"weights": {"a": 1, "b": 1}})
    assert_flat(merge_state_dicts("ties_per_tensor", base, experts), flatten(ones))
