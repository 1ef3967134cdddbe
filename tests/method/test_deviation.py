"""Figures per expert: against float64 from their definition, in a run and on their own."""

from __future__ import annotations

import pytest
import tiny
import torch
from gptqmodel.quantization.config import GPTQConfig
from judge import codes, dequantized, linear_inputs
from own_judge import Pass, streams_of
from own_runs import STREAMS, Case, llama
from readers import Reads
from runs import differing, run

from epmq_gptq import EPMQConfig
from epmq_gptq.method.deltas import WeightDelta
from epmq_gptq.method.expert_error import LayerWatch, RowSample, sampled_rows
from epmq_gptq.method.statistics import GroupStatistics, TargetForm

ALL = 10**6  # rows: more than there are


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


def share(change, gap, outputs):
    """Σ‖change − gap‖² / Σ‖outputs‖²."""
    return float((change - gap).square().sum() / outputs.square().sum())


def test_the_figures_of_a_run_are_those_of_equation_9(case, tmp_path):
    weights, report = case.quantize(tmp_path / "out", profile="paper", alpha=0.05, regret_rows=ALL)
    inputs = linear_inputs(case.merged, weights, case.rows)
    merged = llama(case.merged)
    experts = {name: llama(folder) for name, folder in case.experts.items()}
    for module in report.modules:
        W_m = merged.get_submodule(module.module).weight.detach()
        assert list(module.experts) == list(case.experts)
        Q = weights[module.module]
        for name, error in module.experts.items():
            W_i, X = (
                experts[name].get_submodule(module.module).weight.detach(),
                inputs[module.module][name].T,
            )
            H = X @ X.T
            energy = float((W_i @ H @ W_i.T).trace())

            def deviation(W, W_i=W_i, H=H, energy=energy):
                return float(((W - W_i) @ H @ (W - W_i).T).trace()) / energy

            assert error.rows == X.shape[1] == report.tokens[name]
            assert error.energy == pytest.approx(energy / X.shape[1], rel=1e-3)
            assert error.merged == pytest.approx(deviation(W_m), rel=1e-3)
            assert error.rounded == pytest.approx(deviation(Q), rel=1e-3)
            moved = float(((Q - W_m) @ H @ (Q - W_m).T).trace()) / energy
            assert error.quantization == pytest.approx(moved, rel=1e-3)
            assert error.aim is None
        # Eq. 12 but for the anchor: the target is nearer to all of them together.
        whole = [error.energy * error.rows for error in module.experts.values()]
        solved, before = (
            sum(
                e * getattr(error, kind)
                for e, error in zip(whole, module.experts.values(), strict=True)
            )
            for kind in ("solved", "merged")
        )
        assert solved < before


def test_what_is_aimed_at_has_figures_of_its_own(case, tmp_path):
    eta, rho = 0.7, 0.4
    weights, report = case.quantize(tmp_path / "out", alpha=0.05, eta=eta, rho=rho, regret_rows=ALL)
    streams = streams_of(weights, STREAMS)
    merged = llama(case.merged)
    for name, folder in case.experts.items():
        quantized, expert = llama(case.merged), llama(folder)
        for module, weight in weights.items():
            quantized.get_submodule(module).weight.data = weight.clone()
        here = Pass(quantized, list(weights), streams, case.batches[name])
        own = Pass(expert, list(weights), streams, case.batches[name])
        for module in report.modules:
            linear, x = module.module, here.x[module.module]
            T = expert.get_submodule(linear)(eta * own.x[linear] + (1 - eta) * x).detach()
            if linear in streams:
                T = T + rho * (own.r[linear] - here.r[linear])
            aim = module.experts[name].aim
            for W, key in (
                (merged.get_submodule(linear).weight.detach(), "merged"),
                (weights[linear], "rounded"),
            ):
                expected = share(x @ W.T, T, T)
                assert getattr(aim, key) == pytest.approx(expected, rel=2e-3), (linear, key)
            assert aim.solved < aim.merged


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_biases_moved_inputs_and_pieces_of_rows(eta):
    generator = torch.Generator().manual_seed(1)
    d, out, n = 24, 10, 30

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    W_m, b = rand(out, d), rand(out)
    W = {"a": rand(out, d), "b": W_m.clone()}
    biases = {"a": rand(out), "b": torch.zeros(out)}
    form = TargetForm(eta=eta, rho=0.5, biases=True)

    def delta(member, expert):
        difference = W[expert] - W_m
        return WeightDelta(difference, None) if bool(difference.any()) else None

    def bias(member, expert):
        return biases[expert] - b if bool((biases[expert] - b).any()) else None

    parts = []
    rows = {name: (rand(n, d), rand(n, d), rand(n, out)) for name in W}
    for half in (slice(0, 11), slice(11, n)):  # as if on two devices, each in two batches
        statistics = GroupStatistics(
            d,
            {"m": out},
            Reads(delta, bias),
            form=form,
            sample=RowSample({"m": out}, eta=eta, rho=0.5),
        )
        for name, (X, Z, gap) in rows.items():
            for piece in (slice(0, 5), slice(5, n)):
                x, z, g = X[half][piece], Z[half][piece], gap[half][piece]
                kept = torch.arange(len(x))
                statistics.add(name, x, z if eta else None, {"m": g}, kept)
        parts.append(statistics)
    parts[0].merge_(parts[1])
    watch = LayerWatch([parts[0].sample], "m", W_m)
    W_target, Q, shift = W_m + 0.1 * rand(out, d), W_m + 0.2 * rand(out, d), rand(out)
    errors = watch.start(W_target)
    watch.finish(Q, shift, errors)
    for name, (X, Z, gap) in rows.items():
        own = X @ W[name].T
        T = (eta * Z + (1 - eta) * X) @ W[name].T + biases[name] - b + 0.5 * gap
        error = errors[name]
        assert error.rows == n
        assert error.merged == pytest.approx(share(X @ W_m.T, own, own), rel=1e-4)
        assert error.solved == pytest.approx(share(X @ W_target.T, own, own), rel=1e-4)
        assert error.rounded == pytest.approx(share(X @ Q.T, own, own), rel=1e-4)
        assert error.quantization == pytest.approx(share(X @ Q.T, X @ W_m.T, own), rel=1e-4)
        assert error.aim.merged == pytest.approx(share(X @ W_m.T, T, T), rel=1e-4)
        assert error.aim.solved == pytest.approx(share(X @ W_target.T, T, T), rel=1e-4)
        assert error.aim.rounded == pytest.approx(share(X @ Q.T + shift, T, T), rel=1e-4)
    assert errors["b"].merged == 0.0  # that expert is the merge


def test_a_sample_is_near_the_whole(case, tmp_path):
    figures = {}
    for rows in (64, ALL):
        options = dict(profile="paper", alpha=0.05, regret_rows=rows)
        _, report = case.quantize(tmp_path / str(rows), **options)
        figures[rows] = [m.experts for m in report.modules]
    for some, every in zip(*figures.values(), strict=True):
        for name in some:
            assert 64 <= some[name].rows < every[name].rows
            assert some[name].rounded == pytest.approx(every[name].rounded, rel=0.25)
    # The rows that are kept are in no way of the rounding.
    assert differing(tmp_path / "64", tmp_path / str(ALL)) == 0


def test_no_rows_no_figures(case, tmp_path):
    _, report = case.quantize(tmp_path / "out", profile="paper", alpha=0.05, regret_rows=0)
    assert all(module.experts == {} for module in report.modules)


def _sampled(W_m, W_i, X):
    sample = RowSample({"m": len(W_m)}, outputs=30)  # every 4th of 100
    statistics = GroupStatistics(
        X.shape[1], {"m": len(W_m)}, Reads(lambda m, e: WeightDelta(W_i - W_m, None)), sample=sample
    )
    statistics.add("a", X, kept=torch.arange(len(X)))
    statistics.fold()
    return sample


def test_some_outputs_stand_for_all():
    generator = torch.Generator().manual_seed(0)
    W_m, W_i = (torch.randn(100, 16, generator=generator) for _ in range(2))
    X = torch.randn(50, 16, generator=generator)
    error = LayerWatch([_sampled(W_m, W_i, X)], "m", W_m).start(W_m)["a"]
    some = X @ W_i[::4].T
    assert error.merged == pytest.approx(share(X @ W_m[::4].T, some, some), rel=1e-4)
    assert error.energy == pytest.approx(float(some.square().sum()) / 50 * 100 / 25, rel=1e-4)
    change = torch.randn(100, 16, generator=generator)
    watch = LayerWatch([_sampled(W_m, W_i, X)], "m", W_m)
    errors = watch.start(W_m)
    watch.finish(W_m + change, None, errors)
    expected = share(X @ (W_m + change)[::4].T, some, some)
    assert errors["a"].rounded == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("batches", "wanted"), [(7, 100), (1, 5), (300, 64), (64, 64)])
def test_about_as_many_rows_as_wanted_are_kept(batches, wanted):
    kept = [
        sampled_rows(40, wanted, batch=10 + place, place=place, batches=batches)
        for place in range(batches)
    ]
    taken = sum(0 if one is None else len(one) for one in kept)
    assert min(wanted, 40 * batches) <= taken + (wanted // 4 if batches > wanted else 0)
    assert taken <= 1.2 * wanted + batches
    for place, one in enumerate(kept):
        again = sampled_rows(40, wanted, batch=10 + place, place=place, batches=batches)
        assert one is None if again is None else torch.equal(one, again)
        if one is not None:
            assert len(set(one.tolist())) == len(one) and int(one.max()) < 40
    assert sampled_rows(40, 0, batch=0, place=0, batches=1) is None


# ---- what is compared with ---------------------------------------------------------------------


def test_the_gptq_profile_is_gptq_of_the_merge_with_figures_per_expert(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=2)
    rows = {name: tiny.rows(6, 50, seed=index) for index, name in enumerate(experts)}
    config = EPMQConfig(profile="gptq", bits=4, group_size=32, experts=experts)
    report = run(merged, config, rows, tmp_path / "ours")["epmq"]
    host = GPTQConfig(bits=4, group_size=32, damp_percent=0.05)
    run(merged, host, [row for each in rows.values() for row in each], tmp_path / "host")
    expected, got = codes(tmp_path / "host"), codes(tmp_path / "ours")
    # See test_quantize: a weight on a rounding edge may tip.
    first = [m for m in expected if ".layers.0." in m]
    assert sum(torch.equal(expected[m], got[m]) for m in first) >= len(first) - 2
    assert differing(tmp_path / "host", tmp_path / "ours") <= 0.01
    assert {m.target for m in report.modules} == {"merged"}
    assert report.exceptions == []  # asked for, so nothing to warn of
    for module in report.modules:
        for error in module.experts.values():
            assert error.solved == pytest.approx(error.merged, rel=1e-5)
            assert error.rounded > 0
    assert report.provenance["alpha"] == "gptq"
    assert dequantized(tmp_path / "ours").keys() == dequantized(tmp_path / "host").keys()


def test_another_word_for_alpha_is_refused():
    with pytest.raises(ValueError, match='"auto" or "gptq", got'):
        EPMQConfig(experts={"a": "x"}, alpha="none")
