"""Weights per expert and data-free experts, end to end: the report against float64 from scratch."""

import pytest
import tiny
import torch
from judge import dequantized, linear_inputs
from safetensors.torch import load_file

from epmq_gptq import EPMQConfig
from epmq_gptq.method.target import objective

ALPHA = 0.1
LAYER_0 = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, experts=3)
    base = tiny.save(tiny.llama(), folder / "base")
    rows = {name: tiny.rows(4, 20 + 30 * i, seed=i) for i, name in enumerate(experts)}
    return merged, experts, base, rows


def run(family, out, **options):
    merged, experts, _, rows = family
    rows = {name: rows[name] for name in rows if name not in options.get("data_free", [])}
    options = {"group_size": 32, "experts": experts, "alpha": ALPHA} | options
    model = tiny.load(merged, EPMQConfig(profile="paper", **options))
    report = model.quantize(rows, batch_size=2)["epmq"]
    model.save(str(out))
    return {m.module: m for m in report.modules}, report


def weights(folder, module):
    return load_file(folder / "model.safetensors")[f"{module}.weight"].double()


def judged(family, out, reports, grams):
    """Compare merge_excess and excess of every q, k, v with those of the given Grams, in float64.

    ``grams``: (module, {expert: H_i of its rows}) -> {expert: weighted H_i}.
    """
    merged, experts, _, rows = family
    saved = dequantized(out)
    inputs = linear_inputs(merged, saved, rows)
    for layer in range(2):
        for name in LAYER_0:
            module = f"model.layers.{layer}.{name}"
            H = {e: X.T @ X for e, X in inputs[module].items()}
            weighted = grams(module, H)
            W_m = weights(merged, module)
            pairs = [(weights(experts[e], module), H_i) for e, H_i in weighted.items()]
            total = sum(H_i for _, H_i in pairs)
            lam = ALPHA * float(total.trace()) / total.shape[0]
            H_E = total + lam * torch.eye(total.shape[0], dtype=torch.float64)
            R = sum(W_i @ H_i for W_i, H_i in pairs) + lam * W_m
            best = objective(R @ torch.linalg.inv(H_E), W_m, pairs, lam)
            report = reports[module]
            expected = objective(W_m, W_m, pairs, lam) - best
            assert report.merge_excess == pytest.approx(expected, rel=1e-3), module
            expected = objective(saved[module], W_m, pairs, lam) - best
            assert report.excess == pytest.approx(expected, rel=0.01), module


def tokens(rows):
    return {name: sum(len(row["input_ids"]) for row in rows[name]) for name in rows}


def test_token_weighting_with_a_factor(family, tmp_path):
    reports, report = run(
        family, tmp_path / "out", weighting="token", expert_weights={"expert2": 3.0}
    )
    n = tokens(family[3])
    mean = sum(n.values()) / 3
    factor = {"expert0": 1.0, "expert1": 1.0, "expert2": 3.0}
    judged(
        family,
        tmp_path / "out",
        reports,
        lambda module, H: {e: factor[e] * mean / n[e] * H_i for e, H_i in H.items()},
    )
    record = report.provenance
    assert record["weighting"] == "token"
    assert [expert["weight"] for expert in record["experts"]] == [1.0, 1.0, 3.0]


def test_trace_weighting(family, tmp_path):
    reports, _ = run(family, tmp_path / "out", weighting="trace")
    mean = sum(tokens(family[3]).values()) / 3
    judged(
        family,
        tmp_path / "out",
        reports,
        lambda module, H: {e: mean * len(H_i) / H_i.trace() * H_i for e, H_i in H.items()},
    )


def test_a_data_free_expert_counts_by_its_task_vector(family, tmp_path):
    _, experts, base, _ = family
    reports, report = run(
        family, tmp_path / "out", data_free=["expert1"], base=str(base), expert_weights={}
    )

    def grams(module, H):
        tau = weights(experts["expert1"], module) - weights(base, module)
        others = {e: H_i for e, H_i in H.items() if e != "expert1"}
        energy = sum(H_i.trace() for H_i in others.values()) / 2
        return others | {"expert1": tau.T @ tau * energy / tau.square().sum()}

    judged(family, tmp_path / "out", reports, grams)
    record = report.provenance
    assert record["data_free"] == ["expert1"] and record["base"]["source"] == "base"
    assert record["experts"][1]["tokens"] == 0 and record["experts"][1]["rows"] == 0


def test_data_free_results_do_not_hang_on_shared_inputs(family, tmp_path):
    options = dict(data_free=["expert1"], base=str(family[2]))
    shared, _ = run(family, tmp_path / "shared", **options)
    apart, report = run(
        family, tmp_path / "apart", hessian={"dedup_shared_inputs": False}, **options
    )
    assert report.shared_layers == 0
    one, other = dequantized(tmp_path / "shared"), dequantized(tmp_path / "apart")
    assert all(torch.equal(one[name], other[name]) for name in one)
