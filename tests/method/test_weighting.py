"""How much each expert counts, and what stands in for calibration where there is none."""

import pytest
import torch
from readers import Reads

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.method.deltas import WeightDelta, data_free_gram
from epmq_gptq.method.statistics import GroupStatistics
from epmq_gptq.method.weighting import Weighting

TOKENS = {"long": 300, "short": 20}


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = {"long": 1.0, "short": 5.0}
    return {
        name: scale[name] * torch.randn(count, 6, generator=generator)
        for name, count in TOKENS.items()
    }


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums against float64 ones."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


def gram(weighting: Weighting) -> torch.Tensor:
    statistics = GroupStatistics(
        6,
        {"m": 4},
        Reads(),
        weight=weighting.of,
        fold_once=weighting.needs_whole_gram,
    )
    for name, X in inputs().items():
        statistics.add(name, X)
    return statistics.gram().double()


def raw() -> dict[str, torch.Tensor]:
    return {name: X.double().T @ X.double() for name, X in inputs().items()}


def test_raw_is_the_plain_sum_and_given_weights_are_factors():
    H = raw()
    assert_close(gram(Weighting("raw", TOKENS)), H["long"] + H["short"])
    weighted = gram(Weighting("raw", TOKENS, {"short": 4.0}))
    assert_close(weighted, H["long"] + 4 * H["short"])


def test_token_weighting_counts_every_expert_as_if_it_had_the_mean_number_of_tokens():
    H = raw()
    expected = 160 / 300 * H["long"] + 160 / 20 * H["short"]
    assert_close(gram(Weighting("token", TOKENS)), expected)
    # Equal counts: token weighting is raw.
    assert Weighting("token", {"a": 7, "b": 7}).of("a", torch.ones(2)) == 1.0


def test_trace_weighting_gives_every_gram_the_same_trace():
    weighting = Weighting("trace", TOKENS, {"short": 3.0})
    shares = {name: weighting.of(name, H.diagonal()) * H.trace() for name, H in raw().items()}
    assert shares["short"] == pytest.approx(3 * shares["long"])
    assert shares["long"] == pytest.approx(160 * 6)
    assert weighting.of("long", torch.zeros(6)) == 0.0


def test_the_deltas_are_weighted_as_the_gram_is():
    generator = torch.Generator().manual_seed(1)
    difference = {name: torch.randn(4, 6, generator=generator) for name in TOKENS}
    weighting = Weighting("token", TOKENS, {"long": 2.0})
    statistics = GroupStatistics(
        6, {"m": 4}, Reads(lambda m, e: WeightDelta(difference[e], None)), weight=weighting.of
    )
    for name, X in inputs().items():
        statistics.add(name, X[: len(X) // 2])
    for name, X in inputs().items():  # token weights do not mind a second visit
        statistics.add(name, X[len(X) // 2 :])
    expected = sum(
        weighting.of(name, H.diagonal()) * difference[name].double() @ H
        for name, H in raw().items()
    )
    assert_close(statistics.take_delta("m").double(), expected)


def test_a_trace_in_parts_is_refused_not_guessed():
    weighting = Weighting("trace", TOKENS)
    parts = [GroupStatistics(6, {}, Reads(), weight=weighting.of, fold_once=True) for _ in range(2)]
    for part in parts:
        part.add("long", inputs()["long"][:100])
        part.fold()
    with pytest.raises(EPMQInputError, match=r"`weighting=\"trace\"`.*expert `long`.*one device"):
        parts[0].merge_(parts[1])


# ---- data-free ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "low rank", "both"])
def test_the_data_free_gram_is_that_of_the_task_vector_with_the_given_trace(kind):
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(2500, 5, generator=generator) if kind != "low rank" else None
    low_rank = None
    if kind != "dense":
        low_rank = tuple(torch.randn(s, generator=generator) for s in ((2500, 3), (3, 5)))
    tau = sum(
        part.double()
        for part in (dense, low_rank and low_rank[0] @ low_rank[1])
        if part is not None
    )
    C = data_free_gram(WeightDelta(dense, low_rank), energy=7.0)
    expected = tau.T @ tau * 7 / tau.square().sum()
    torch.testing.assert_close(C.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_data_free_expert_weighs_like_the_mean_of_the_others():
    weighting = Weighting("raw", TOKENS, {"short": 3.0, "free": 2.0}, data_free=["free"])
    # All others together: 1 + 3 shares; its own: 2.
    assert weighting.data_free == {"free": 0.5}
    assert not data_free_gram(WeightDelta(torch.zeros(3, 2), None), 1.0).any()
