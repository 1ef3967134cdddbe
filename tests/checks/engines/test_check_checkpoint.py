"""Finished checkpoints before the engines' rules: real ones, and the same ones damaged."""

from __future__ import annotations

import json

import made
import pytest
import torch
from made import DOWN, Q, checked, damaged, reasons

from epmq_gptq.checks.engines import ENGINES, ServingReport, check_checkpoint
from epmq_gptq.checks.engines.check import engine_named
from epmq_gptq.checks.engines.table import VERSIONS
from epmq_gptq.errors import EPMQInputError

GROUP = "group_size"


def said(**changes):
    """Change what both configuration files say."""

    def block(content):
        content.get("quantization_config", content).update(changes)

    return {"config": block, "quantize_config": block}


# ---- kinds of checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # vLLM, SGLang, transformers, GPTQModel, TGI
        ("bfloat16", "yes yes yes yes yes"),
        ("plain", "yes yes yes yes yes"),
        ("host", "yes yes yes yes yes"),
        ("bits2", "no no yes yes limited"),
        ("bits3", "no no yes limited no"),
        ("bits5", "no no no limited no"),
        ("bits8", "limited yes yes yes yes"),
        ("desc_act", "no yes yes yes yes"),
        ("asym", "no no yes yes limited"),
        ("v2", "no no yes yes no"),
        ("sym_v2", "yes yes yes yes no"),
        ("channel", "yes yes yes yes yes"),
        ("group16", "no no yes yes limited"),
        ("uneven", "no no no yes no"),
        ("without_v", "no no no yes no"),
        ("without_mlp", "yes yes no yes no"),
        ("down8", "limited yes no yes no"),
        ("unseen", "no no no yes no"),
        ("head", "limited yes no yes no"),
        ("tied", "yes yes yes yes yes"),
        ("narrow", "limited limited yes yes yes"),
        ("moe", "yes yes no yes no"),
        ("moe_mixed", "limited no no yes no"),
    ],
)
def test_verdicts_on_real_checkpoints(checkpoint, kind, expected):
    report = check_checkpoint(checkpoint(kind), engines=VERSIONS)
    told = {name: entry["reasons"] for name, entry in report.engines.items()}
    assert made.verdicts(report) == expected, told
    assert report.found["disagreements"] == report.found["faults"] == []
    for entry in report.engines.values():
        assert all(r["source"] and r["reason"] for r in entry["reasons"])


def test_what_is_found_is_what_the_tensors_hold(checkpoint):
    found = check_checkpoint(checkpoint("down8")).found
    assert found["architecture"] == "LlamaForCausalLM" and found["layers"] == 7
    by_bits = {each["bits"]: each["layers"] for each in found["settings"]}
    assert by_bits == {4: 6, 8: 1}
    assert found["zero_points"] == {"read": 7, "v1": 7} and found["order"] == "plain"
    assert check_checkpoint(checkpoint("sym_v2")).found["zero_points"] == {"read": 7, "v2": 7}
    free = check_checkpoint(checkpoint("asym")).found["zero_points"]
    assert free.get("free", 0) >= 6 and "v2" not in free
    assert check_checkpoint(checkpoint("desc_act")).found["order"] == "reordered"
    assert check_checkpoint(checkpoint("head")).found["head"] == "quantized"
    assert check_checkpoint(checkpoint("tied")).found["head"] == "tied to the embedding"
    assert check_checkpoint(checkpoint("channel")).found["settings"][0][GROUP] == -1
    assert check_checkpoint(checkpoint("without_mlp")).found["dense_linears"] == [
        f"{made.LAYER}.mlp.{part}_proj" for part in ("down", "gate", "up")
    ]


def test_reasons_name_layer_and_rule(checkpoint):
    assert "`model.layers.0.self_attn.qkv_proj`" in reasons(checkpoint("uneven"), "vLLM")
    assert "fused name" in reasons(checkpoint("unseen"), "vLLM")
    assert "no longer reads" in reasons(checkpoint("desc_act"), "vLLM")
    assert "`dynamic`" in reasons(checkpoint("moe_mixed"), "SGLang")
    assert "stacks routed modules" in reasons(checkpoint("moe"), "transformers")
    assert "filled up" in reasons(checkpoint("narrow"), "vLLM")
    assert "the only one" in reasons(checkpoint("narrow"), "SGLang")
    assert "as they are" in reasons(checkpoint("v2"), "TGI")
    assert "never quantized" in reasons(checkpoint("head"), "TGI")


# ---- words against tensors -----------------------------------------------------------------------


def test_bits_are_counted_not_believed(checkpoint, tmp_path):
    folder = damaged(checkpoint("bits8"), tmp_path, **said(bits=4))
    report = check_checkpoint(folder)
    assert not any(map(report.can, ENGINES))
    assert report.found["settings"][0]["bits"] == 8
    assert "has 4 bits, and its tensors hold 8 (and 6 layers more)" in reasons(folder, "vLLM")
    assert not report.is_served


def test_group_sizes_are_counted(checkpoint, tmp_path):
    folder = damaged(checkpoint("plain"), tmp_path, **said(group_size=64))
    assert "has group_size 64, and its tensors have 32" in reasons(folder, "GPTQModel")
    assert checked(folder) == "no no no no"


def test_each_engine_is_judged_by_the_file_that_it_reads(checkpoint, tmp_path):
    folder = damaged(checkpoint("bits8"), tmp_path, config=said(bits=4)["config"])
    assert checked(folder) == "no no no yes"
    folder = damaged(checkpoint("bits8"), tmp_path, quantize_config=said(bits=4)["config"])
    assert checked(folder) == "limited yes yes no"
    (folder / "quantize_config.json").unlink()
    assert checked(folder) == "limited yes yes yes"


def test_zero_points_of_the_other_version_are_seen(checkpoint, tmp_path):
    def one_more(state):
        state[f"{Q}.qzeros"] += 0x11111111

    folder = damaged(checkpoint("plain"), tmp_path, tensors=one_more)
    # vLLM and SGLang read none.
    assert checked(folder, engines=VERSIONS) == "yes yes no no no"
    assert "says zero points of version 1 (`gptq`)" in reasons(folder, "GPTQModel")
    assert "`!!!!`" in reasons(folder, "transformers")
    folder = damaged(checkpoint("plain"), tmp_path, **said(checkpoint_format="gptq_v2"))
    assert checked(folder, engines=VERSIONS) == "yes yes no no no"
    assert "holds version 1" in reasons(folder, "GPTQModel")


def test_zero_points_that_are_not_symmetric_are_seen(checkpoint, tmp_path):
    def other(state):
        state[f"{DOWN}.qzeros"][0, 0] -= 2

    folder = damaged(checkpoint("plain"), tmp_path, tensors=other)
    assert checked(folder) == "no no no no"
    for engine in ("vLLM", "SGLang"):
        assert "`model.layers.0.mlp.down_proj.qzeros` holds other" in reasons(folder, engine)
    assert "is symmetric, and its zero points are not" in reasons(folder, "GPTQModel")
    # The same tensors, honestly announced, are GPTQModel's business.
    folder = damaged(checkpoint("plain"), tmp_path, tensors=other, **said(sym=False))
    assert checked(folder) == "no no yes yes"


def test_order_is_read_from_the_tensors(checkpoint, tmp_path):
    folder = damaged(checkpoint("desc_act"), tmp_path, **said(desc_act=False))
    assert checked(folder, engines=VERSIONS) == "no no limited limited no"
    assert "not the plain order" in reasons(folder, "vLLM")
    assert "torch, Triton" in reasons(folder, "GPTQModel")
    # Announced and not there: only vLLM, which refuses the word, minds.
    folder = damaged(checkpoint("plain"), tmp_path, **said(desc_act=True))
    assert checked(folder) == "no yes yes yes"


def test_layers_that_are_packed_or_not_against_dynamic(checkpoint, tmp_path):
    folder = damaged(checkpoint("plain"), tmp_path, **said(dynamic={r"-:.*down_proj": {}}))
    assert "is not quantized, and it is packed" in reasons(folder, "vLLM")
    folder = damaged(checkpoint("without_mlp"), tmp_path, **said(dynamic=None))
    # vLLM finds out from the headers.
    assert checked(folder) == "yes no no no"
    assert "no `dynamic` leaves it out" in reasons(folder, "SGLang")


def test_the_head_is_looked_at(checkpoint, tmp_path):
    folder = damaged(checkpoint("head"), tmp_path, **said(lm_head=False))
    assert "says the head is not quantized (`lm_head`), and it is quantized" in reasons(
        folder, "vLLM"
    )
    folder = damaged(
        checkpoint("head"), tmp_path, config=lambda c: c.update(tie_word_embeddings=True)
    )
    assert checked(folder) == "limited limited no no"
    assert "ties the head to the embedding" in reasons(folder, "SGLang")
    folder = damaged(checkpoint("plain"), tmp_path, tensors=lambda s: s.pop("lm_head.weight"))
    assert checked(folder) == "no no no no" and "there is no head" in reasons(folder, "vLLM")


def test_where_the_configuration_stands(checkpoint, tmp_path):
    folder = damaged(
        checkpoint("bfloat16"), tmp_path, config=lambda c: c.pop("quantization_config")
    )
    assert checked(folder) == "limited limited no yes"
    assert "--quantization gptq" in reasons(folder, "vLLM")
    (folder / "quantize_config.json").unlink()
    with pytest.raises(EPMQInputError, match="no GPTQ checkpoint: neither `config.json`") as caught:
        check_checkpoint(folder)
    assert caught.value.code == "EPMQ-F56"


def test_what_the_configuration_leaves_out(checkpoint, tmp_path):
    folder = damaged(
        checkpoint("bfloat16"), tmp_path, config=lambda c: c["quantization_config"].pop("sym")
    )
    assert checked(folder) == "no no yes yes" and "does not say `sym`" in reasons(folder, "vLLM")
    folder = damaged(checkpoint("bfloat16"), tmp_path, config=lambda c: c.pop("architectures"))
    assert checked(folder) == "no no yes yes" and "`architectures`" in reasons(folder, "SGLang")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "yes yes yes yes"),
        ("bfloat16", "yes yes yes yes"),
        ("float32", "yes yes yes yes"),
        ("float64", "no no no no"),
    ],
)
def test_dtype(checkpoint, tmp_path, dtype, expected):
    def say(config):
        config["dtype"] = dtype

    folder = damaged(checkpoint("bfloat16"), tmp_path, config=say)
    assert checked(folder) == expected


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["NewForCausalLM"]}, "limited limited yes yes"),
        ({"model_type": "new"}, "yes yes yes no"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "yes yes limited limited"),
        (
            {"architectures": ["NewForCausalLM"], "auto_map": {"AutoModel": "code.Model"}},
            "limited limited limited limited",
        ),
        ({"model_type": "clip"}, "limited limited no yes"),
    ],
)
def test_what_the_model_is(checkpoint, tmp_path, changes, expected):
    folder = damaged(checkpoint("bfloat16"), tmp_path, config=lambda c: c.update(changes))
    assert checked(folder) == expected


def test_blocks_that_optimum_does_not_look_for(checkpoint, tmp_path):
    def move(state):
        for name in [name for name in state if name.startswith("model.layers.")]:
            state[name.replace("model.layers", "net.stack")] = state.pop(name)

    folder = damaged(checkpoint("bfloat16"), tmp_path, tensors=move)
    assert checked(folder) == "yes yes no yes"
    assert "`net.stack.0.mlp.down_proj`" in reasons(folder, "transformers")
    said_where = said(modules_in_block_to_quantize=[["mlp.down_proj", "self_attn.q_proj"]])
    folder = damaged(checkpoint("bfloat16"), tmp_path, tensors=move, **said_where)
    assert checked(folder) == "yes yes yes yes"


# ---- tensor parallel -----------------------------------------------------------------------------


def test_tensor_parallel(checkpoint):
    report = check_checkpoint(checkpoint("bfloat16"), tensor_parallel=2)
    # 4 heads, 2 key-value heads, groups of 32; of the 128 inputs of o_proj each GPU has 64, which
    # vLLM's Marlin takes with its 128 outputs, and SGLang's does not.
    assert made.verdicts(report) == "yes limited no no"
    assert report.engines["vLLM"]["max_tensor_parallel"] == 4
    assert report.engines["SGLang"]["max_tensor_parallel"] == 1
    assert "o_proj` has 128 and 64" in reasons(checkpoint("bfloat16"), "SGLang", tensor_parallel=2)
    why = reasons(checkpoint("bfloat16"), "vLLM", tensor_parallel=4)
    assert "o_proj` has 128 and 32" in why and "cannot" not in why
    why = reasons(checkpoint("bfloat16"), "vLLM", tensor_parallel=8)
    assert "4 attention heads cannot be dealt to 8 GPUs" in why
    why = reasons(checkpoint("channel"), "vLLM", tensor_parallel=3)
    assert "4 attention heads cannot be dealt to 3 GPUs" in why
    assert "`device_map`" in reasons(checkpoint("bfloat16"), "GPTQModel", tensor_parallel=2)


def test_groups_are_not_cut(checkpoint, tmp_path):
    wide = {"num_attention_heads": 16, "num_key_value_heads": 16}
    folder = damaged(checkpoint("bfloat16"), tmp_path, config=lambda c: c.update(wide))
    why = reasons(folder, "vLLM", tensor_parallel=8)
    assert "the 128 inputs of `model.layers.0.self_attn.o_proj` cannot be cut into 8" in why


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop(f"{Q}.scales"), "`model.layers.0.self_attn.q_proj.scales` is missing"),
        (lambda s: s.update({f"{Q}.weight": torch.zeros(128, 128)}), "is there twice"),
        (
            lambda s: s.update({f"{Q}.scales": s[f"{Q}.scales"][:-1]}),
            "`scales` is 3 × 128, and 4 groups",
        ),
        (
            lambda s: s.update({f"{Q}.qzeros": s[f"{Q}.qzeros"][:, :-1]}),
            "`qzeros` is 4 × 15, and 128 outputs of 4 bits need 16 columns",
        ),
        (
            lambda s: s.update({f"{Q}.qweight": s[f"{Q}.qweight"][:-1]}),
            "`qweight` has 15 rows of words for the 128 inputs of `g_idx`",
        ),
        (
            lambda s: s.update({f"{Q}.scales": s[f"{Q}.scales"].to(torch.int32)}),
            "no floating numbers",
        ),
    ],
)
def test_tensors_that_do_not_fit_one_another(checkpoint, tmp_path, change, told):
    folder = damaged(checkpoint("bfloat16"), tmp_path, tensors=change)
    report = check_checkpoint(folder, engines=VERSIONS)
    assert made.verdicts(report) == "no no no no no"
    assert told in report.found["faults"][0]


def test_a_missing_order_is_only_missed_by_some(checkpoint, tmp_path):
    folder = damaged(checkpoint("bfloat16"), tmp_path, tensors=lambda s: s.pop(f"{Q}.g_idx"))
    assert checked(folder, engines=VERSIONS) == "yes yes yes yes no"


def test_other_words_than_int32(checkpoint, tmp_path):
    def halve(state):
        state[f"{Q}.qweight"] = state[f"{Q}.qweight"].to(torch.int64)

    folder = damaged(checkpoint("bfloat16"), tmp_path, tensors=halve)
    assert "is not packed in int32" in reasons(folder, "vLLM")


def test_damaged_and_incomplete_folders_are_errors(checkpoint, tmp_path):
    folder = damaged(checkpoint("bfloat16"), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(EPMQInputError, match="is damaged"):
        check_checkpoint(folder)
    file.unlink()
    with pytest.raises(EPMQInputError, match="no safetensors"):
        check_checkpoint(folder)
    index = {"weight_map": {f"{Q}.qweight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EPMQInputError, match="model-00001-of-00002.safetensors` is missing"):
        check_checkpoint(folder)


def test_what_is_no_gptq_checkpoint_is_an_error(checkpoint, tmp_path):
    merged = checkpoint("bfloat16").parent / "sources" / "merged"
    with pytest.raises(EPMQInputError, match=r"it holds no packed layer \(`….qweight`\)"):
        check_checkpoint(merged)
    folder = damaged(checkpoint("bfloat16"), tmp_path, **said(quant_method="awq"))
    with pytest.raises(EPMQInputError, match="quantized by 'awq'") as caught:
        check_checkpoint(folder)
    assert caught.value.code == "EPMQ-F56"


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": "four"},
        {"bits": 0},
        {"group_size": True},
        {"sym": 1},
        {"dynamic": ["x"]},
        {"dynamic": {"(": {}}},
        {"dynamic": {"x": {"bits": "4"}}},
    ],
)
def test_nonsense_in_the_configuration_is_an_error(checkpoint, tmp_path, changes):
    folder = damaged(checkpoint("bfloat16"), tmp_path, config=said(**changes)["config"])
    with pytest.raises(EPMQInputError) as caught:
        check_checkpoint(folder)
    assert caught.value.code == "EPMQ-F13" and caught.value.subject == "`config.json`"


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_is_plain_data_without_paths(checkpoint):
    folder = checkpoint("uneven")
    report = check_checkpoint(folder, engines=["gptqmodel", "VLLM"])
    data = json.loads(json.dumps(report.to_dict()))
    assert list(data["engines"]) == ["GPTQModel", "vLLM"] and data["schema"] == 1
    assert (data["name"], data["revision"], data["is_served"]) == ("uneven", None, False)
    assert str(folder.parent) not in json.dumps(data)
    assert isinstance(report, ServingReport) and report.can("GPTQModel") and not report.can("vLLM")


def test_engines_are_known_in_any_spelling():
    assert [engine_named(name) for name in ("vllm", " SGLANG", "tgi")] == ["vLLM", "SGLang", "TGI"]
    with pytest.raises(EPMQInputError, match="`engine` should be one of vLLM, SGLang") as caught:
        engine_named("ollama")
    assert caught.value.code == "EPMQ-O01"


@pytest.mark.parametrize("size", [0, 65, -1])
def test_tensor_parallel_has_bounds(checkpoint, size):
    with pytest.raises(EPMQInputError, match="`tensor_parallel` should be 1 to 64"):
        check_checkpoint(checkpoint("plain"), tensor_parallel=size)
