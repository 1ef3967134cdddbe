"""Targets from the experts' own passes, judged from the saved file in float64 and from scratch."""

from __future__ import annotations

import pytest
import torch
from judge import codes, dequantized, gptq64, stored
from own_judge import Judge, anchored, excess, streams_of
from own_runs import BITS, GROUP, STREAMS, Case, llama
from runs import gar_order, run

from epmq_gptq import EPMQConfig

ALPHA = 0.1


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize(
    ("eta", "rho", "anchor"),
    [(1.0, 0.0, "identity"), (0.0, 1.0, "identity"), (1.0, 1.0, "channel"), (0.5, 0.25, "channel")],
)
def test_every_layer_reaches_the_float64_optimum(case, tmp_path, eta, rho, anchor):
    weights, report = case.quantize(tmp_path / "out", alpha=ALPHA, eta=eta, rho=rho, anchor=anchor)
    streams = streams_of(weights, STREAMS)
    judge = Judge(
        llama, case.merged, case.experts, streams, case.batches, weights, eta=eta, rho=rho
    )
    for module in report.modules:
        X, gap, W_m = judge.moments(module.module)
        H_E = anchored(X.T @ X, ALPHA, anchor)
        best = W_m + gap.T @ X @ torch.linalg.inv(H_E)
        reference = gptq64(best, H_E, bits=BITS, group_size=GROUP, order=gar_order(H_E))
        ours = excess(weights[module.module], best, H_E)
        assert ours == pytest.approx(excess(reference, best, H_E), rel=0.01), module.module
        assert module.excess == pytest.approx(ours, rel=0.01)
        assert module.merge_excess == pytest.approx(excess(W_m, best, H_E), rel=1e-2)
        assert module.eta == eta
        assert module.rho == (rho if module.module in streams else 0.0)


def test_the_terms_are_told_apart(case, tmp_path):
    """A wrong stream, a stream where there is none, or z for x would pass no test above."""
    streams = streams_of(case.quantize(tmp_path / "out", alpha=ALPHA)[0], STREAMS)
    weights = dequantized(tmp_path / "out")
    judge = Judge(llama, case.merged, case.experts, streams, case.batches, weights, eta=1, rho=1)
    paper = Judge(llama, case.merged, case.experts, {}, case.batches, weights, eta=0, rho=0)
    for name in weights:
        X, gap, _ = judge.moments(name)
        difference = float((gap - paper.moments(name)[1]).norm() / gap.norm())
        assert difference > 0.1, name


def test_without_eta_and_rho_it_is_the_papers_path_bit_for_bit(case, tmp_path):
    options = dict(alpha=ALPHA, eta=0, rho=0)
    case.quantize(tmp_path / "best", **options)
    case.quantize(tmp_path / "paper", alpha=ALPHA, profile="paper")
    first, second = stored(tmp_path / "best"), stored(tmp_path / "paper")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_that_is_left_out_is_still_run(case, tmp_path):
    """The experts walk on through what `dynamic` leaves as it is."""
    rule = {r"-:.*layers\.0\..*": {}}
    weights, report = case.quantize(tmp_path / "out", alpha=ALPHA, dynamic=rule)
    assert {m.module.split(".")[2] for m in report.modules} == {"1"}
    streams = streams_of(weights, STREAMS)
    judge = Judge(llama, case.merged, case.experts, streams, case.batches, weights, eta=1, rho=1)
    for module in report.modules:
        X, gap, W_m = judge.moments(module.module)
        H_E = anchored(X.T @ X, ALPHA)
        best = W_m + gap.T @ X @ torch.linalg.inv(H_E)
        assert module.merge_excess == pytest.approx(excess(W_m, best, H_E), rel=1e-2)


def test_batches_and_padding_change_nothing(case, tmp_path):
    reports = []
    for size in (1, 4):
        config = EPMQConfig(bits=BITS, group_size=GROUP, experts=case.experts, alpha=ALPHA)
        rows = {
            n: [{"input_ids": r["input_ids"][: 20 + i]} for i, r in enumerate(found)]
            for n, found in case.rows.items()
        }
        out = tmp_path / str(size)
        reports.append(run(case.merged, config, rows, out, batch_size=size)["epmq"])
    first, second = (codes(tmp_path / name) for name in ("1", "4"))
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{leaf}"
        assert (first[name] != second[name]).float().mean() < 0.002, name
    for one, other in zip(reports[0].modules, reports[1].modules, strict=True):
        assert one.tokens == other.tokens and one.lam == pytest.approx(other.lam, rel=0.02)
