"""Which engine can serve what: the rules, and the packages that they can be checked against."""

import pytest

from epmq_gptq.checks.engines import ENGINES, rules
from epmq_gptq.checks.serving import Export, check_serving
from epmq_gptq.experts.linears import Linear

CONFIG = {"num_attention_heads": 32, "num_key_value_heads": 8}


def llama(layers=2, hidden=4096, inner=14336):
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return [
        Linear(f"model.layers.{i}.{part}", shape, (f"{i}.{part}",))
        for i in range(layers)
        for part, shape in shapes.items()
    ]


def verdicts(linears=None, **options):
    _, table = check_serving(Export(**options), linears or llama(), CONFIG)
    return {engine: entry["verdict"] for engine, entry in table.items()}


def reasons(engine, linears=None, **options):
    _, table = check_serving(Export(**options), linears or llama(), CONFIG)
    return " ".join(reason["reason"] for reason in table[engine]["reasons"])


def test_the_default_is_served_by_all():
    assert set(verdicts().values()) == {"yes"}
    found, table = check_serving(Export(), llama(), CONFIG)
    assert not found and set(table) == set(ENGINES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 8}, "limited yes yes yes"),
        ({"bits": 3}, "no no yes limited"),
        ({"bits": 2}, "no no yes yes"),
        ({"bits": 5}, "no no no limited"),
        ({"sym": False}, "no no yes yes"),
        ({"group_size": 16}, "no no yes yes"),
        ({"group_size": 256}, "no no yes yes"),
        ({"group_size": 48}, "no no no no"),
        ({"group_size": -1}, "yes yes yes yes"),
        ({"desc_act": True}, "no yes yes yes"),
        ({"desc_act": True, "group_size": -1}, "yes yes yes yes"),
        ({"lm_head": True}, "yes yes no yes"),
        ({"dynamic": {r".*\.0\.": {"bits": 8}}}, "limited yes no yes"),
        ({"dynamic": {r".*q_proj": {"bits": 8}}}, "no no no yes"),
        ({"dynamic": {r"-:.*v_proj": {}}}, "no no no yes"),
        ({"dynamic": {r"-:.*\.1\.": {}}}, "yes yes no yes"),
        ({"dynamic": {r".*\.(q|k|v)_proj": {"bits": 8}}}, "no no no yes"),
        ({"dynamic": {r".*self_attn": {"group_size": 32}}}, "yes yes no yes"),
        ({"dynamic": {r".*down_proj": {"bits": 3}}}, "no no no limited"),
    ],
)
def test_rules(options, expected):
    assert " ".join(verdicts(**options).values()) == expected


def test_reasons_name_the_layer_and_the_rule():
    assert "`model.layers.0.self_attn.q_proj` has 3 bits; it takes 4, 8" in reasons("vLLM", bits=3)
    fused = reasons("vLLM", dynamic={r".*q_proj": {"bits": 8}})
    assert "model.layers.0.self_attn.qkv_proj" in fused and "differently" in fused
    hidden = reasons("vLLM", dynamic={r".*\.(q|k|v)_proj": {"bits": 8}})
    assert "fused name" in hidden
    small = reasons("vLLM", llama(hidden=96, inner=96), group_size=32)
    assert "steps of 64" in small and "filled up" in small
    small = reasons("SGLang", llama(hidden=96, inner=96), group_size=32)
    assert "the only one" in small and "qkv_proj` has 144 and 96" in small
    assert "no longer reads" in reasons("vLLM", desc_act=True)


def test_only_a_no_of_an_engine_is_a_finding():
    found, _ = check_serving(Export(bits=3), llama(), CONFIG)
    assert [(f.level, f.subject) for f in found] == [("warning", "vLLM, SGLang")]
    found, _ = check_serving(Export(lm_head=True), llama(), CONFIG)
    assert [(f.level, f.subject) for f in found] == [("note", "transformers")]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "yes yes yes yes"),
        ("clip_vision_model", "no no no yes"),
        ("clip", "limited limited no yes"),
        ("t5", "no no no yes"),
    ],
)
def test_what_the_model_is_decides_before_its_bits(model_type, expected):
    found, table = check_serving(Export(), llama(), CONFIG | {"model_type": model_type})
    assert " ".join(entry["verdict"] for entry in table.values()) == expected
    # No setting would change it, so nobody is warned.
    assert [f.level for f in found] == (["note"] if "no" in expected else [])


def test_all_engines_that_say_no_are_one_line():
    (finding,), _ = check_serving(Export(bits=5), llama(), CONFIG)
    assert (finding.level, finding.subject) == ("warning", "vLLM, SGLang, transformers")
    # The same reason once.
    assert finding.cause.count("it takes 2, 3, 4, 8") == 1
    assert "vLLM 0.32.0 and SGLang 0.5.23: `model.layers.0" in finding.cause


def test_groups_that_do_not_divide_the_inputs_are_errors():
    found, _ = check_serving(Export(group_size=128), llama(hidden=192, inner=256), CONFIG)
    errors = [f for f in found if f.level == "error"]
    assert [f.code for f in errors] == ["EPMQ-F33"] and "192 inputs" in errors[0].cause
    layout = {r".*down": {"group_size": 96}}
    found, _ = check_serving(Export(group_size=64, dynamic=layout), llama(), CONFIG)
    assert "`group_size` 96 does not divide the 14336" in found[0].cause


def test_routed_modules_of_a_layer_are_one_layer_to_engines():
    routed = [
        Linear(f"model.layers.0.mlp.experts.{i}.up_proj", (256, 256), (f"{i}",)) for i in range(4)
    ]
    assert verdicts(routed)["vLLM"] == "yes" and verdicts(routed)["transformers"] == "no"
    assert "experts" in reasons("vLLM", routed, dynamic={r".*experts\.2\.": {"bits": 8}})


@pytest.mark.parametrize("left_out", [r"-:.*experts\.2\.", r"-:.*experts\.\d\.down_proj"])
def test_routed_modules_that_are_left_out_are_missed_by_engines(left_out):
    dynamic = {left_out: {}}
    routed = [
        Linear(f"model.layers.0.mlp.experts.{i}.{part}_proj", (256, 256), (f"{part}{i}",))
        for i in range(4)
        for part in ("gate", "up", "down")
    ]
    assert verdicts(routed)["vLLM"] == "yes"
    # The layers that are left out are not among those that are quantized.
    config = {**CONFIG, "num_local_experts": 5}
    _, table = check_serving(Export(dynamic={r"-:.*experts\.4\.": {}}), routed, config)
    assert table["vLLM"]["verdict"] == "no"
    left = [li for li in routed if Export(dynamic=dynamic).of(li.name) is not None]
    assert "experts" in reasons("vLLM", left, dynamic=dynamic)
    assert verdicts(left, dynamic=dynamic)["SGLang"] == "no"


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 16), ({"group_size": 32}, 32), ({"group_size": 1024}, 2), ({"bits": 8}, 16)],
)
def test_tensor_parallel_cuts_no_group(options, most):
    # 14336 = 2^11 · 7 inputs of down_proj; 32 heads.
    _, table = check_serving(Export(**options), llama(), CONFIG)
    assert table["vLLM"]["max_tensor_parallel"] == most


def test_dynamic_means_what_it_means_to_gptqmodel():
    from gptqmodel.quantization.config import dynamic_get

    dynamic = {
        r"-:.*\.1\.mlp": {},
        r"+:.*\.0\.mlp\.up": {"bits": 8, "group_size": 32},
        r".*mlp": {"bits": 3},
        r"model\.layers\.1": {"sym": False},
    }
    export = Export(dynamic=dynamic)
    for linear in llama():
        theirs = dynamic_get(dynamic, linear.name)
        mine = export.of(linear.name)
        if theirs is False:
            assert mine is None
        else:
            expected = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
            assert mine._asdict() == expected | (theirs or {})


def test_rules_hold_for_the_installed_packages():
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
    from transformers.utils.quantization_config import GPTQConfig

    assert TorchLinear.SUPPORTS_BITS == [2, 3, 4, 5, 6, 7, 8]
    assert TritonV2Linear.SUPPORTS_BITS == [2, 4, 8]
    # vLLM's Marlin is the same kernel.
    assert tuple(MarlinLinear.SUPPORTS_GROUP_SIZE) == rules.MARLIN_GROUPS
    assert tuple(TorchLinear.SUPPORTS_GROUP_SIZE) == rules.HOST_GROUPS
    assert (MarlinLinear.SUPPORTS_BITS, MarlinLinear.SUPPORTS_SYM) == ([4, 8], [True])
    for bits in range(2, 9):
        try:
            GPTQConfig(bits=bits)
        except ValueError:
            assert bits not in (2, 3, 4, 8)
        else:
            assert bits in (2, 3, 4, 8)


def test_a_pattern_may_match_the_fused_name_by_luck():
    # `.*v_proj` matches "qkv_proj" too, so vLLM gives all three what all three have.
    assert verdicts(dynamic={r".*(q|k|v)_proj": {"bits": 8}})["vLLM"] == "limited"
