"""Configurations are compared by what they mean, not by how a version of transformers spells it."""

import pytest
from stores import CONFIG

from epmq_gptq.checks.structure import compare_configs, normalised


def compared(changes, merged=CONFIG):
    return list(compare_configs(merged, {**CONFIG, **changes}, "expert `x`"))


def test_equal_and_empty_configurations_say_nothing():
    assert not compared({}) and not list(compare_configs(CONFIG, {}, "x"))
    assert not compared(
        {"_name_or_path": "elsewhere", "torch_dtype": "float16", "use_cache": False}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"hidden_size": 16},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 8},
        {"intermediate_size": 32},
        {"hidden_act": "gelu"},
    ],
)
def test_what_changes_a_linear_layer_is_an_error_that_names_both_values(change):
    (finding, *others) = compared(change)
    ((name, value),) = change.items()
    assert (finding.level, finding.code, finding.subject) == ("error", "EPMQ-F04", "expert `x`")
    assert f"`{name}` is {value!r}, the merged model has" in finding.cause
    assert all(other.level != "error" for other in others)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rope_theta": 500000.0}, "rope_theta"),
        ({"rms_norm_eps": 1e-6}, "norm eps"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"num_experts_per_tok": 1}, "experts per token"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
    ],
)
def test_what_changes_activations_only_is_a_warning(change, word):
    (finding,) = compared(change, {**CONFIG, "num_experts_per_tok": 2})
    assert finding.level == "warning" and word in finding.cause and finding.remedy


def test_spellings_of_one_setting_are_no_difference():
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    new["head_dim"] = 4
    new["sliding_window"] = 4096
    new["use_sliding_window"] = False
    old = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "rope_theta")}
    old["rope_scaling"] = None
    assert not list(compare_configs(new, old, "x"))
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2}
    assert normalised(gpt2)["hidden_size"] == 8 and normalised(gpt2)["head_dim"] == 4
    assert not list(
        compare_configs(
            {"hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma"},
            {"hidden_act": "gelu_new", "model_type": "gemma"},
            "x",
        )
    )


def test_what_transformers_5_rewrites_is_no_difference():
    """A merge is saved anew, its experts are as their makers left them."""
    act = {"hidden_act": "gelu", "hidden_activation": None}
    new = {**CONFIG, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
    assert not list(compare_configs(new, {**CONFIG, "model_type": "gemma", **act}, "x"))
    assert list(compare_configs({**new, "model_type": "llama"}, {**CONFIG, **act}, "x"))
    old = {**CONFIG, "max_position_embeddings": 8192, "original_max_position_embeddings": 4096}
    factors = {"long_factor": [1.0, 2.0], "short_factor": [1.0, 1.0]}
    old["rope_scaling"] = {"type": "su", **factors}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    block = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **factors}
    new["rope_parameters"] = {"rope_theta": 10000.0, **block}
    assert not list(compare_configs(new, old, "x"))
    new["rope_parameters"] = {**new["rope_parameters"], "original_max_position_embeddings": 2048}
    assert [f.level for f in compare_configs(new, old, "x")] == ["warning"]


def test_the_text_part_of_a_multimodal_configuration_is_compared():
    nested = {"model_type": "gemma3", "text_config": {**CONFIG, "model_type": "llama_text"}}
    assert not list(compare_configs(CONFIG, nested, "x"))
    (finding,) = compare_configs(CONFIG, {"text_config": {**CONFIG, "hidden_size": 6}}, "x")
    assert finding.level == "error" and "`hidden_size` is 6" in finding.cause


def test_a_head_that_is_tied_in_one_of_the_two_is_a_note():
    (finding,) = compared({"tie_word_embeddings": True})
    assert (finding.level, finding.code) == ("note", "EPMQ-F37")


def test_rope_blocks_per_layer_kind_and_strange_values_do_not_break():
    blocks = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    assert not compared({"rope_parameters": blocks}, {**CONFIG, "rope_parameters": blocks})
    assert compared({"rope_parameters": {**blocks, "x": {}}}, {**CONFIG, "rope_parameters": blocks})
    for value in (None, [], "8", -1, {"a": 1}, True):
        for key in (*CONFIG, "rope_scaling", "rope_parameters", "text_config"):
            compared({key: value})


def test_clips_vision_tower_is_compared_wherever_it_is_saved():
    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "patch_size": 8}
    whole = {
        "model_type": "clip",
        "text_config": {"hidden_size": 32, "model_type": "clip_text_model"},
        "vision_config": tower,
    }
    assert not list(compare_configs(tower, whole, "expert `a`"))
    other = {**whole, "vision_config": {**tower, "patch_size": 16}}
    (found,) = compare_configs(tower, other, "expert `a`")
    assert found.level == "error" and "`patch_size` is 16, the merged model has 8" in found.cause


def test_t5s_own_names_are_compared():
    mine = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4}
    for name, value in (("d_kv", 8), ("d_ff", 64), ("d_model", 32), ("num_heads", 2)):
        (found,) = compare_configs(mine, mine | {name: value}, "expert `a`")
        assert found.level == "error" and str(value) in found.cause, name
    longer = mine | {"relative_attention_max_distance": 64}
    (found,) = compare_configs(mine | {"relative_attention_max_distance": 128}, longer, "base")
    assert found.level == "warning"
