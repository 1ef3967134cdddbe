"""EPMQConfig checks itself, says which option is wrong, and survives JSON and YAML."""

import json
import re

import pytest
from gptqmodel.quantization.config import GPTQConfig

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.config import paper_alpha

EXPERTS = {"math": "org/math@main", "code": "some/folder"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "group_size": -1, "sym": False, "alpha": 0.01},
        {"alpha_pattern": {"mlp.down_proj": 10, "layers.0..*": 0.5}, "on_bad_module": "rtn"},
        {"dynamic": {"-:.*lm_head": {}, "+:.*q_proj": {"bits": 8}}, "desc_act": True},
        {
            "fallback": {"strategy": "rtn", "threshold": 7},
            "hessian": {"dedup_shared_inputs": False},
        },
        {"mse": 2.4, "static_groups": True, "act_group_aware": False, "true_sequential": False},
    ],
)
def test_json_and_yaml_round_trip(options):
    config = EPMQConfig(experts=EXPERTS, **options)
    for back in (
        EPMQConfig.from_json(config.to_json()),
        EPMQConfig.from_yaml(config.to_yaml()),
    ):
        assert back.to_options() == config.to_options()
        for name in ("bits", "group_size", "sym", "desc_act", "act_group_aware", "dynamic"):
            assert getattr(back, name) == getattr(config, name)
        assert back.alpha_pattern == config.alpha_pattern and back.fallback == config.fallback
    assert json.loads(config.to_json())["epmq_config_version"] == 1


def test_files_and_unknown_options(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(EPMQConfig(experts=EXPERTS, bits=3).to_yaml())
    assert EPMQConfig.from_yaml(file).bits == 3
    with pytest.raises(EPMQInputError, match=r"`alhpa` is not an option. Did you mean `alpha`"):
        EPMQConfig.from_options({"experts": EXPERTS, "alhpa": 1})
    with pytest.raises(EPMQInputError, match=r"`epmq_config_version` should be 1, got 99"):
        EPMQConfig.from_options({"experts": EXPERTS, "epmq_config_version": 99})
    assert EPMQConfig.from_yaml("alpha: 1e-3\nexperts: {a: b}").alpha == 0.001
    with pytest.raises(EPMQInputError, match="`alpha` is given twice"):
        EPMQConfig.from_yaml("alpha: 1\nalpha: 2\nexperts: {a: b}")
    with pytest.raises(EPMQInputError, match="`options` should be a mapping"):
        EPMQConfig.from_yaml("- 1")
    with pytest.raises(EPMQInputError, match="not readable as JSON"):
        EPMQConfig.from_json("{")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"alpha": -1},
            r"`alpha` should be a number from 0 to 1e\+09, .* got -1\.",
        ),
        ({"alpha": float("nan")}, r"`alpha` should be a number from 0 to"),
        ({"alpha": float("inf")}, r"`alpha` should be a number from 0 to"),
        ({"alpha": "1"}, r"`alpha` should be a number from .*, got '1'"),
        ({"alpha": True}, r"`alpha` should be a number from .*, got True"),
        ({"alpha_pattern": {"q": -2}}, r"`alpha_pattern.q` should be a number from"),
        ({"alpha_pattern": {"(": 1}}, r"`alpha_pattern.\(` should be a regular expression"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` should be a mapping"),
        ({"on_bad_module": "skip"}, r"`on_bad_module` should be one of raise, rtn, got 'skip'"),
        ({"damp_percent": 0.05}, r"`damp_percent` is not an option.*Set `alpha`"),
        ({"damp_auto_increment": 0.01}, r"`damp_auto_increment` is not an option"),
        ({"rotation": "hadamard"}, r"`rotation` cannot be used"),
        ({"gptaq": {"alpha": 0.25}}, r"`gptaq` cannot be used"),
        ({"mock_quantization": True}, r"`mock_quantization` cannot be used"),
        ({"dynamic": {"+:q": {"damp_percent": 0.1}}}, r"`dynamic` sets `damp_percent`"),
        ({"bits": 9}, r"`bits` should be one of .*, got 9"),
        ({"group_size": 48}, r"`group_size` should be one of .*, got 48"),
        ({"experts": {}}, r"`experts` should map at least one expert"),
        ({"experts": ["a"]}, r"`experts` should map at least one expert"),
        ({"experts": {"a b": "x"}}, r"`experts`: a name should be letters.*'a b'"),
        ({"experts": {"a": ""}}, r"`experts.a` should be a folder, a hub id"),
        ({"base": 3}, r"`base` should be a folder or a hub id, got 3"),
        ({"weighting": "norm"}, r"`weighting` should be one of raw, .*, minmax, got 'norm'"),
        ({"expert_weights": {"x": 1}}, r"`expert_weights` names 'x', which is not one of"),
        (
            {"expert_weights": {"math": 0}},
            r"`expert_weights.math` should be .*, got 0. Leave out",
        ),
        ({"expert_weights": {"math": "1"}}, r"should be a number between .*, got '1'"),
        ({"expert_weights": [1]}, r"`expert_weights` should be a mapping"),
        ({"data_free": "math"}, r"`data_free` should be a list, got 'math'"),
        ({"data_free": ["x"], "base": "b"}, r"`data_free` names 'x'"),
        ({"data_free": ["math"]}, r"`data_free` needs `base`"),
        ({"data_free": ["math", "code"], "base": "b"}, r"should be some of the experts"),
        ({"allow_duplicates": 1}, r"`allow_duplicates` should be true or false, got 1"),
        ({"experts": {"a": 3}}, r"`experts.a` should be a folder, .*, got 3"),
        ({"alpha": 10**400}, r"`alpha` should be a number from 0 to"),
        ({"alpha": 1e40}, r"`alpha` should be a number from 0 to 1e\+09, .* got 1e\+40"),
        ({"alpha_pattern": {"(?i)q_proj": 1}}, r"should be a regular expression .*global flags"),
        ({"alpha_pattern": {b"q": 1}}, r"should be a text, got b'q'"),
        ({"expert_weights": {"math": 1e300}}, r"a number between 1e-06 and 1e\+06, got 1e\+300"),
        (
            {"data_free": [["math"]], "base": "b"},
            r"`data_free\[0\]` should be a text, got",
        ),
        ({"bits": 4.0}, r"`bits` should be one of .*, got 4.0"),
        ({"group_size": 128.0}, r"`group_size` should be one of .*, got 128.0"),
        ({"sym": "no"}, r"`sym` should be true or false, got 'no'"),
        ({"lm_head": 1}, r"`lm_head` should be true or false, got 1"),
        ({"format": "marlin"}, r"`format` should be one of gptq, gptq_v2, gptq_p"),
        ({"dynamic": ["q_proj"]}, r"`dynamic` should be a mapping"),
        (
            {"dynamic": {"q_proj": None}},
            r"`q_proj` should be a mapping of options \(\"-:",
        ),
        ({"dynamic": {"-:(": {}}}, r"invalid dynamic pattern `-:\(`"),
        ({"dynamic": {"q": {"group_size": 32.0}}}, r"`dynamic`: `q.group_size` should be one of"),
        ({"dynamic": {"q": {"sym": "no"}}}, r"`dynamic`: `q.sym` should be true or false"),
        (
            {"dynamic": {"q": {"bitz": 3}}},
            r"`dynamic`: `q`: `bitz` is not .* Did you mean `bits`",
        ),
        ({"dynamic": {"q": {"alpha": 3}}}, r"sets `alpha`, .* Use `alpha_pattern`"),
    ],
)
def test_a_wrong_option_is_named_with_the_rule_and_the_value(options, message):
    with pytest.raises(EPMQInputError, match=message):
        EPMQConfig(**({"experts": EXPERTS} | options))


def test_numpy_scalars_become_plain_numbers():
    import numpy

    config = EPMQConfig(experts=EXPERTS, alpha=numpy.float64(0.5), group_size=numpy.int64(32))
    assert type(config.alpha) is float and type(config.group_size) is int


def test_a_file_that_cannot_be_read_is_named_without_its_folder(tmp_path):
    for load in (EPMQConfig.from_json, EPMQConfig.from_yaml):
        with pytest.raises(EPMQInputError, match=r"`gone.txt` is not readable:") as caught:
            load(tmp_path / "gone.txt")
        assert caught.value.code == "EPMQ-O04" and str(tmp_path) not in str(caught.value)
    with pytest.raises(EPMQInputError, match="`experts` is given twice"):
        EPMQConfig.from_json('{"experts": {"a": "b"}, "experts": {"c": "d"}}')
    with pytest.raises(EPMQInputError, match="not readable as JSON"):
        EPMQConfig.from_json("[" * 100_000)
    for options in (["a"], None):
        with pytest.raises(EPMQInputError, match="`options` should be a mapping"):
            EPMQConfig.from_options(options)


def test_patterns_match_whole_path_parts_at_the_end_and_the_first_one_wins():
    config = EPMQConfig(
        experts=EXPERTS,
        alpha=1,
        alpha_pattern={r"layers.0.mlp.down_proj": 3, "down_proj": 2, r"layers\.1\..*": 5},
    )
    assert config.alpha_for("model.layers.0.mlp.down_proj") == 3
    assert config.alpha_for("model.layers.7.mlp.down_proj") == 2
    assert config.alpha_for("model.layers.7.mlp.not_down_proj") == 1
    assert config.alpha_for("model.layers.1.self_attn.q_proj") == 5
    assert config.alpha_for("model.layers.11.self_attn.q_proj") == 1


def test_it_is_a_standard_gptq_config_to_every_reader():
    config = EPMQConfig(experts=EXPERTS, alpha=0.5)
    assert isinstance(config, GPTQConfig)
    written = config.to_dict()
    assert written["quant_method"] == "gptq" and written["checkpoint_format"] == "gptq"
    assert (written["bits"], written["group_size"], written["sym"], written["desc_act"]) == (
        4,
        128,
        True,
        False,
    )
    assert "experts" not in json.dumps(written) and config.offload_to_disk_path not in str(written)
    plain = GPTQConfig.from_quant_config(json.loads(json.dumps(written)))
    assert type(plain) is GPTQConfig and plain.bits == 4


# ---- profiles ------------------------------------------------------------------------------------


def test_the_paper_profile_is_the_papers_algorithm():
    config = EPMQConfig(experts=EXPERTS, profile="paper")
    assert (config.eta, config.rho, config.anchor, config.bias_refit) == (0, 0, "identity", False)
    assert config.alpha is None  # until the model is known
    assert not config.runs_experts and not config.chooses_alpha


def test_what_is_given_wins_over_the_profile():
    config = EPMQConfig(experts=EXPERTS, alpha=0.5, rho=0)
    assert (config.alpha, config.eta, config.rho) == (0.5, 1.0, 0.0)
    assert config.runs_experts and config.targets_asked_for
    assert not EPMQConfig(experts=EXPERTS).targets_asked_for
    assert EPMQConfig(experts=EXPERTS, alpha=1, alpha_pattern={"q": "auto"}).chooses_alpha


def test_what_a_profile_fills_in_is_not_written_out():
    config = EPMQConfig(experts=EXPERTS, rho=0.5)
    options = config.to_options()
    assert options["rho"] == 0.5 and not {"eta", "alpha", "anchor", "bias_refit"} & set(options)
    again = EPMQConfig.from_yaml(config.to_yaml())
    assert again.left_open == config.left_open and again.eta == config.eta
    assert EPMQConfig(experts=EXPERTS, profile="paper").to_options()["profile"] == "paper"


@pytest.mark.parametrize(
    ("model_type", "method", "alpha"),
    [
        ("clip", "task_arithmetic", 0.01),
        ("clip_vision_model", None, 0.01),
        ("t5", "ties", 0.01),
        ("llama", "average", 1.0),
        ("llama", "wudi", 10.0),
        ("clip", "WUDI", 10.0),
    ],
)
def test_the_papers_alpha_is_that_of_the_family_and_the_merge(model_type, method, alpha):
    assert paper_alpha(model_type, method) == alpha


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "fast"}, "`profile` should be one of best, paper, gptq, got 'fast'"),
        ({"eta": 1.5}, "`eta` should be a number between 0 and 1, got 1.5"),
        ({"rho": "1"}, "`rho` should be a number between 0 and 1, got '1'"),
        ({"anchor": "diag"}, "`anchor` should be one of identity, channel, got 'diag'"),
        ({"bias_refit": 1}, "`bias_refit` should be true or false, got 1"),
        ({"held_out": 0}, "`held_out` should be a number above 0 and at most 0.5, got 0"),
        (
            {"alpha": "best"},
            '`alpha` should be a number from 0 to 1e+09, "auto" or "gptq", got',
        ),
        ({"weighting": "max"}, "`weighting` should be one of raw, token, trace, minmax"),
    ],
)
def test_wrong_targets_are_named(options, message):
    with pytest.raises(EPMQInputError, match=re.escape(message)):
        EPMQConfig(experts=EXPERTS, **options)
