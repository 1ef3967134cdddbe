"""Average and task arithmetic against their formulas on flat vectors."""

import pytest
import torch
from merging_models import assert_flat, assert_same, flatten, make_models

from epmq_gptq.merging import merge_state_dicts

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_average_is_the_correctly_rounded_mean(count):
    _, experts = make_models(count)
    vectors = torch.stack([flatten(state) for state in experts.values()]).double()
    merged = merge_state_dicts("average", None, experts)
    assert_flat(merged, vectors.mean(dim=0).float())


def test_average_of_equal_experts_is_that_expert():
    # In fp32 this fails for K = 5: (x + x + x + x + x) / 5 is not always x.
    _, experts = make_models(1)
    state = experts["a"]
    state["model.scale"] = torch.tensor(-0.0)
    assert_same(merge_state_dicts("average", None, {c: state for c in "abcde"}), state)


def test_average_takes_dtypes_from_the_base():
    base, experts = make_models(2)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in base.items()}
    merged = merge_state_dicts("average", half, experts)
    want = merge_state_dicts("average", None, experts)
    assert_same(merged, {n: want[n].to(half[n].dtype) for n in want})


@pytest.mark.parametrize("parameters", [None, {"lam": 1}, {"lam": -0.5}])
def test_task_arithmetic_is_its_formula(parameters):
    base, experts = make_models(3)
    lam = 0.3 if parameters is None else parameters["lam"]
    theta_0 = flatten(base)
    total = torch.zeros_like(theta_0)
    for state in experts.values():
        total = total + (flatten(state) - theta_0)
    merged = merge_state_dicts("task_arithmetic", base, experts, parameters)
    assert_flat(merged, theta_0 + lam * total)


def test_task_arithmetic_computes_in_fp32_and_rounds_once():
    base, experts = make_models(3, dtype=torch.bfloat16)
    theta_0 = flatten(base)
    total = sum(flatten(state) - theta_0 for state in experts.values())
    merged = merge_state_dicts("task_arithmetic", base, experts)
    assert merged["model.scale"].dtype == torch.bfloat16
    assert_flat(merged, (theta_0 + 0.3 * total).bfloat16().float())


def test_task_arithmetic_of_one_expert_at_scale_one_is_that_expert():
    base, experts = make_models(1, grid=True)
    merged = merge_state_dicts("task_arithmetic", base, experts, {"lam": 1.0})
    assert torch.equal(flatten(merged), flatten(experts["a"]))


@pytest.mark.parametrize(
    "method", ["average", "task_arithmetic", "ties", "ties_per_tensor", "wudi"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_experts_equal_to_the_base_give_the_base_bit_for_bit(method, dtype, count):
    base, _ = make_models(1, dtype=dtype)
    base["model.scale"] = torch.tensor(-0.0, dtype=dtype)
    options = {"iterations": 5} if method == "wudi" else None
    merged = merge_state_dicts(method, base, {c: dict(base) for c in "abc"[:count]}, options)
    assert_same(merged, base)
