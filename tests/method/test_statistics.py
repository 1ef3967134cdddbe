"""Statistics add up, in any order and any cut, to the float64 sums of eq. 14 and 15."""

import itertools

import pytest
import torch
from readers import Reads

from epmq_gptq.errors import EPMQNumericalError
from epmq_gptq.kernels.gram import ROWS
from epmq_gptq.method.deltas import WeightDelta
from epmq_gptq.method.statistics import GroupStatistics, TargetForm, combined

WIDTH, OUT = 12, {"q": 8, "k": 4}


def data(experts: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    merged = {m: torch.randn(rows, WIDTH, generator=generator) for m, rows in OUT.items()}
    weights = {
        (m, f"e{i}"): merged[m] + 0.3 * torch.randn(rows, WIDTH, generator=generator)
        for m, rows in OUT.items()
        for i in range(experts)
    }
    inputs = {f"e{i}": torch.randn(20 + 7 * i, WIDTH, generator=generator) for i in range(experts)}
    return merged, weights, inputs


def statistics(merged, weights) -> GroupStatistics:
    return GroupStatistics(
        WIDTH, OUT, Reads(lambda m, e: WeightDelta(weights[m, e] - merged[m], None))
    )


def exact(merged, weights, inputs):
    grams = {e: X.double().T @ X.double() for e, X in inputs.items()}
    H = sum(grams.values())
    D = {
        m: sum((weights[m, e].double() - merged[m].double()) @ grams[e] for e in inputs)
        for m in OUT
    }
    return H, D


def assert_sums(counted: GroupStatistics, H, D):
    torch.testing.assert_close(counted.gram().double(), H, rtol=1e-5, atol=1e-5)
    for member in OUT:
        torch.testing.assert_close(
            counted.take_delta(member).double(), D[member], rtol=1e-5, atol=2e-5
        )


@pytest.mark.parametrize("order", list(itertools.permutations(["e0", "e1", "e2"])))
def test_sums_equal_float64_whatever_the_order(order):
    merged, weights, inputs = data()
    counted = statistics(merged, weights)
    for expert in order:
        counted.add(expert, inputs[expert])
    assert counted.tokens == {e: len(X) for e, X in inputs.items()}
    assert_sums(counted, *exact(merged, weights, inputs))
    assert counted.folds == 3


def test_interleaved_batches_of_any_size_give_the_same_sums():
    merged, weights, inputs = data()
    counted = statistics(merged, weights)
    pieces = [(e, piece) for e, X in inputs.items() for piece in X.split(6)]
    for expert, piece in pieces[::2] + pieces[1::2]:
        counted.add(expert, piece)
    assert_sums(counted, *exact(merged, weights, inputs))


def test_statistics_of_two_parts_add_up_to_those_of_the_union():
    merged, weights, inputs = data()
    parts = [statistics(merged, weights) for _ in range(2)]
    for expert, X in inputs.items():
        parts[0].add(expert, X[:9])
        parts[1].add(expert, X[9:])
    parts[0].merge_(parts[1])
    assert parts[0].total_tokens == sum(len(X) for X in inputs.values())
    assert_sums(parts[0], *exact(merged, weights, inputs))


def test_half_precision_rows_are_summed_in_fp32():
    merged, weights, inputs = data()
    halves = {e: X.to(torch.bfloat16) for e, X in inputs.items()}
    counted = statistics(merged, weights)
    for expert, X in halves.items():
        counted.add(expert, X)
    assert_sums(counted, *exact(merged, weights, halves))


def test_experts_equal_to_the_merge_leave_no_delta_at_all():
    merged, weights, inputs = data()
    counted = GroupStatistics(WIDTH, OUT, Reads())
    for expert, X in inputs.items():
        counted.add(expert, X)
    assert counted.take_delta("q") is None
    assert float(counted.gram().diagonal().min()) > 0


@pytest.mark.parametrize("rows", [5, ROWS + 1])
def test_buffers_do_not_grow_with_the_number_of_experts(rows):
    def floats(experts: int) -> int:
        merged, weights, _ = data(experts)
        counted = statistics(merged, weights)
        for expert in range(experts):
            counted.add(f"e{expert}", torch.randn(rows - 1, WIDTH))
            counted.add(f"e{expert}", torch.randn(1, WIDTH))
        parts = [s for s in (counted._current, counted._total) if s is not None]
        sums = [getattr(s, name) for s in parts for name in s._TENSORS]
        held = [*sums, *counted._deltas.values(), *counted._gaps.values(), *counted._stage._room]
        return sum(t.numel() for t in held if t is not None)

    sums = 2 if rows > ROWS else 1  # few rows have no Gram of their own
    expected = sums * WIDTH**2 + sum(OUT.values()) * WIDTH + ROWS * WIDTH
    assert floats(2) == floats(9) == expected


def test_nothing_counted_gives_a_zero_gram_and_no_delta():
    counted = statistics(*data()[:2])
    counted.add("e0", torch.empty(0, WIDTH))
    assert counted.total_tokens == 0
    assert not counted.gram().any()
    assert counted.take_delta("q") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_names_expert_module_and_channel(value):
    merged, weights, inputs = data()
    counted = statistics(merged, weights)
    inputs["e1"][4, 7] = value
    counted.add("e0", inputs["e0"])
    counted.add("e1", inputs["e1"])
    with pytest.raises(EPMQNumericalError, match=r"expert `e1`.*input of `q`.*first is ") as caught:
        counted.fold()
    assert (caught.value.expert, caught.value.module) == ("e1", "q")


def test_combining_parts_leaves_what_layers_of_one_input_share():
    merged, weights, inputs = data(2)
    form = TargetForm(biases=True)
    parts = []
    for expert in inputs:
        delta = lambda m, e: WeightDelta(weights[m, e] - merged[m], None)  # noqa: E731
        part = GroupStatistics(WIDTH, OUT, Reads(delta), form=form)
        part.add(expert, inputs[expert])
        H = part.gram()
        parts.append({m: part.take(m, H, merged[m]) for m in OUT})
    H = 2 * parts[0]["q"].H + 3 * parts[1]["q"].H
    whole = {m: combined([p[m] for p in parts], [2, 3], H) for m in OUT}
    first, second = inputs.values()
    expected = 2 * first.sum(0) + 3 * second.sum(0)
    for member in OUT:
        torch.testing.assert_close(whole[member].inputs, expected)
        assert whole[member].count == 2 * len(first) + 3 * len(second)
        gaps = [(weights[member, e] - merged[member]) @ X.T for e, X in inputs.items()]
        torch.testing.assert_close(whole[member].outputs, 2 * gaps[0].sum(1) + 3 * gaps[1].sum(1))
        torch.testing.assert_close(whole[member].D, 2 * gaps[0] @ first + 3 * gaps[1] @ second)
