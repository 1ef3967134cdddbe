"""Tokens against widths; disk, memory and time from shapes."""

import pytest
import torch
from stores import codes, linears, store, tensors

from epmq_gptq.checks import estimates
from epmq_gptq.checks.coverage import check_coverage, widths
from epmq_gptq.checks.serving import Export
from epmq_gptq.experts.linears import Linear

WIDTHS = {1024: 1.0, 4096: 1.0}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"a": 5000, "b": 5000}, []),
        ({"a": 4096, "b": 4096}, []),
        ({"a": 1024, "b": 4000}, []),
        ({"a": 1023, "b": 4000}, ["F23"]),
        ({"a": 1030, "b": 1030}, ["F23"]),
        ({"a": 1100, "b": 11001}, ["F26"]),
        ({"a": 1100, "b": 11000}, []),
        ({"a": 0, "b": 9000}, ["F22"]),
        ({}, []),
    ],
)
def test_few_and_unbalanced_tokens(tokens, expected):
    found, table = check_coverage(tokens, WIDTHS)
    assert codes(found) == expected
    assert table["tokens"] == tokens


def test_the_numbers_are_named():
    found, _ = check_coverage({"a": 100, "b": 2000}, WIDTHS)
    assert [f.level for f in found] == ["warning", "note", "warning"]
    assert "100 calibration tokens" in found[0].cause and "1,024, 4,096 inputs" in found[0].cause
    assert "2,100 calibration tokens" in found[1].cause and "20 to 1" in found[2].cause


def test_routed_modules_see_their_share():
    dense = Linear("l.0.self_attn.q_proj", (64, 64), ("q",))
    routed = Linear("l.0.mlp.experts.3.down_proj", (64, 32), ("d",))
    config = {"num_experts": 16, "num_experts_per_tok": 2}
    shares = widths([dense, routed], config)
    assert shares == {32: 0.125, 64: 1.0}
    found, _ = check_coverage({"a": 63, "b": 630}, shares)
    assert codes(found) == ["F23"] and "about 12%" in found[0].cause
    assert widths([dense, routed], {}) == {32: 1.0, 64: 1.0}


def test_disk_counts_every_tensor_once():
    merged = store(tensors())
    found = estimates.disk(merged, linears(), Export(bits=4, group_size=8))
    numel = sum(linear.inputs * linear.outputs for linear in linears())
    assert found["codes"] == numel // 2
    assert found["unquantized"] == 4 * (2 * 20 * 8 + 8)
    groups = sum(linear.outputs * linear.inputs // 8 for linear in linears())
    assert found["scales"] == groups * 2 + groups // 2 + 4 * sum(li.inputs for li in linears())
    half = estimates.disk(merged, linears(), Export(bits=4, group_size=8), dtype_bytes=2)
    assert half["unquantized"] == found["unquantized"] // 2
    out = estimates.disk(merged, linears(), Export(group_size=8, dynamic={"-:.*mlp": {}}))
    assert out["codes"] == 2 * 64 // 2 and out["unquantized"] > found["unquantized"]


def test_memory_is_that_of_the_widest_group():
    merged = store(tensors())
    found = estimates.memory(merged, linears(), tokens=100, hidden=8, dtype_bytes=2)
    assert found["model"] == 2 * sum(merged.info(name).numel for name in merged)
    # down_proj: d = 16, 8 outputs.
    rows = 100 * 16
    assert found["statistics"] == 4 * (3 * 16 * 16 + rows + 8 * 16 + 3 * 8 * 16)
    assert found["activations"] == 2 * 100 * 8 * 2
    assert found["peak"] == sum(found[k] for k in ("model", "statistics", "activations"))
    # Four experts held apart: four times the sums, and what is not a sum once.
    apart = estimates.memory(merged, linears(), tokens=100, hidden=8, dtype_bytes=2, apart=4)
    sums = 2 * 16 * 16 + rows + 8 * 16
    assert apart["statistics"] == found["statistics"] + 4 * 3 * sums


def test_routed_modules_of_a_layer_are_held_together():
    routed = [
        Linear(f"l.0.mlp.experts.{i}.{part}", (32, 64), (f"{i}.{part}",))
        for i in range(4)
        for part in ("gate_proj", "up_proj")
    ]
    assert [len(members) for members in estimates.groups(routed).values()] == [8]
    work = estimates.flops(routed, tokens=1000, experts=2, shares={64: 0.5})
    assert work["gram"] == 9 / 8 * 500 * 64 * 64 * 4  # of the triangle
    assert work["fold"] == 2 * 2 * (8 * 32) * 64 * 64


def test_time_grows_with_tokens_and_falls_with_the_rate():
    def seconds(**changed):
        options = dict(tokens=1000, experts=2, shares={}, rate=1e9) | changed
        return estimates.duration(linears(), **options)["seconds"]

    low, high = seconds()
    assert 0 < low < high
    assert seconds(tokens=10**6)[0] > low and seconds(rate=1e6)[0] > low
    assert seconds(experts=20)[0] > low


def test_a_rate_is_measured_quickly():
    assert 1e8 < estimates.measure_rate("cpu", torch.float32) < 1e15


def test_a_rate_is_measured_of_less_where_memory_is_short(monkeypatch):
    sizes, rate = [], estimates._rate

    def short(size, device, dtype):
        sizes.append(size)
        if size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rate(size, device, dtype)

    monkeypatch.setattr(estimates, "_rate", short)
    assert estimates.measure_rate("cpu") > 0
    assert 50 < sizes[-1] <= 100 < sizes[-2]


def test_experts_own_passes_and_held_out_rows_cost_memory_and_time():
    merged = store(tensors())
    options = dict(tokens=100, hidden=8, dtype_bytes=2)
    plain = estimates.memory(merged, linears(), **options)
    own = estimates.memory(merged, linears(), **options, runs_experts=True)
    chosen = estimates.memory(merged, linears(), **options, chooses_alpha=True)
    assert "experts" not in plain and own["experts"] > 100 * 8 * 2
    assert own["peak"] - plain["peak"] == own["experts"] + own["statistics"] - plain["statistics"]
    assert plain["statistics"] < chosen["statistics"] < 2 * plain["statistics"]
    work = dict(tokens=1000, experts=2, shares={})
    plain, own, chosen = (
        estimates.flops(linears(), **work, **more)
        for more in ({}, {"runs_experts": True}, {"chooses_alpha": True})
    )
    # The cross moments are no triangle: 2 n d² more than its 9/8 n d².
    assert own["gram"] == pytest.approx(plain["gram"] * (1 + 16 / 9))
    assert own["fold"] == plain["fold"]
    assert own["forward"] == pytest.approx(plain["forward"] * (1 + 1 / estimates.PASSES))
    assert chosen["solve"] > 2 * plain["solve"] and chosen["forward"] == plain["forward"]


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "encoder.block.0"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_layer_is_found_in_the_name_of_a_module(module, layer):
    assert estimates.layer_of(module) == layer
