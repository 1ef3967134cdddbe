"""The preflight as a whole: what it finds, what it reads, and how it is raised."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from stores import CONFIG, average, codes, folder, linears, store, tensors

from epmq_gptq.checks import Finding, Preflight, Wanted, preflight
from epmq_gptq.checks.serving import Export
from epmq_gptq.checks.weights import MERGED
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.experts.experts import Experts
from epmq_gptq.experts.linears import Linear
from epmq_gptq.io.checkpoints import Checkpoint

BASE_STATE = tensors()
A, B = (tensors(seed, like=BASE_STATE) for seed in (1, 2))
WANTED = Wanted(Export(group_size=-1))


def experts(tmp_path, **states):
    return Experts(
        {name: str(folder(tmp_path / name, *_pair(state))) for name, state in states.items()}
    )


def _pair(state):
    return state if isinstance(state, tuple) else (state,)


def check(tmp_path, merged=None, config=None, base=None, **states):
    options = {k: states.pop(k) for k in list(states) if k in ("verify", "tokens")}
    merged = store(average([A, B]) if merged is None else merged, config=config)
    opened = experts(tmp_path, **states)
    if base is not None:
        opened.base = (base, None)
    return preflight(WANTED, merged, opened, linears(), **options)


def test_a_good_set_of_inputs_has_no_errors_and_all_tables(tmp_path):
    result = check(tmp_path, a=A, b=B, base=store(BASE_STATE), tokens={"a": 100, "b": 90})
    assert not result.errors and not result.warnings
    assert list(result.models) == [MERGED, "a", "b", "`base`"]
    assert result.similarity["share"] == 1 and result.similarity["reference"] == "base"
    assert result.coverage["tokens"] == {"a": 100, "b": 90}
    assert set(result.estimates) == {"disk", "memory", "time"}
    assert result.serving["GPTQModel"]["verdict"] == "yes"
    assert json.loads(json.dumps(result.to_dict()))["verify"] == "sample"
    result.raise_errors()


def test_headers_read_no_weight(tmp_path, monkeypatch):
    merged = Checkpoint(folder(tmp_path / "m", average([A, B])), what=MERGED)
    for method in ("read", "read_rows"):
        monkeypatch.setattr(Checkpoint, method, None)
    result = preflight(WANTED, merged, experts(tmp_path, a=A, b=B), linears(), verify="headers")
    assert not result.errors and result.bytes_read == 0 and result.similarity == {}


def test_a_sample_reads_what_it_says(tmp_path, monkeypatch):
    """Counted at the store, on layers that are larger than the sample."""
    import epmq_gptq.checks.weights as weights

    monkeypatch.setattr(weights, "SAMPLE_BYTES", 1000)
    read = []
    whole, part = Checkpoint.read, Checkpoint.read_rows

    def count(method):
        def counted(self, *arguments):
            tensor = method(self, *arguments)
            read.append(tensor.numel() * tensor.element_size())
            return tensor

        return counted

    monkeypatch.setattr(Checkpoint, "read", count(whole))
    monkeypatch.setattr(Checkpoint, "read_rows", count(part))
    merged = Checkpoint(folder(tmp_path / "m", average([A, B])), what=MERGED)
    default = weights.Models.sample
    monkeypatch.setattr(weights.Models, "sample", lambda self, layers: default(self, layers, 1000))
    result = preflight(WANTED, merged, experts(tmp_path, a=A, b=B), linears())
    assert sum(read) == result.bytes_read
    # Three models: one block each to see that they differ, and the sample of each.
    assert result.bytes_read <= 3 * (16 * 8 * 4 + 1000)
    assert 0 < result.similarity["share"] < 0.5


def test_everything_wrong_is_found_at_once(tmp_path):
    missing = {name: tensor for name, tensor in A.items() if ".1.mlp" not in name}
    result = check(
        tmp_path,
        a=(missing, {**CONFIG, "hidden_act": "gelu"}),
        b={**B, "model.layers.0.mlp.up_proj.weight": torch.ones(16, 9)},
        tokens={"a": 0, "b": 90},
    )
    assert sorted(codes(result.findings, "error")) == ["F01", "F01", "F03", "F04", "F22"]
    levels = [finding.level for finding in result.findings]
    assert levels == sorted(levels, key=("error", "warning", "note").index)
    assert result.similarity == {}
    with pytest.raises(EPMQInputError) as caught:
        result.raise_errors()
    # Where the network is another one, missing tensors are the consequence.
    assert (caught.value.code, caught.value.subject) == ("EPMQ-F04", "expert `a`")
    assert "`hidden_act` is 'gelu'" in caught.value.cause
    assert "4 other errors besides" in caught.value.cause


def test_an_error_lists_twenty_of_a_kind():
    result = Preflight()
    what = "expert `x`"
    result.add(Finding("error", "EPMQ-F01", what, f"{what}: `m{i}` is gone.") for i in range(23))
    result.add([result.findings[0]])
    with pytest.raises(EPMQInputError, match=r"`m19` is gone; and 3 more\.$") as caught:
        result.raise_errors()
    assert len(result.findings) == 23 and "m20" not in str(caught.value)
    assert str(caught.value).startswith("expert `x`: `m0` is gone; `m1` is gone; ")
    Preflight(findings=[Finding("warning", "EPMQ-F23", "x", "few.")]).raise_errors()


def test_a_strangers_name_cannot_move_the_cursor():
    finding = Finding("warning", "EPMQ-F02", "x", "tensor `a\x1b[2Jb\nc` is extra.")
    assert "\x1b" not in finding.cause and "\n" not in str(finding)


def test_duplicates_are_refused_unless_allowed(tmp_path):
    result = check(tmp_path, merged=B, a=A, b=dict(A))
    assert codes(result.errors) == ["F17"]
    twins = experts(tmp_path / "again", a=A, b=dict(A))
    allowed = preflight(replace(WANTED, allow_duplicates=True), store(B), twins, linears())
    assert not allowed.errors and "F17" in codes(allowed.findings, "note")


@pytest.mark.parametrize("verify", ["headers", "sample", "full"])
def test_values_that_are_not_finite_are_found_when_all_is_read(tmp_path, verify):
    bad = {name: tensor.clone() for name, tensor in A.items()}
    bad["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    bad["model.layers.1.mlp.up_proj.weight"][5, 1] = float("inf")
    merged = average([A, B])
    merged["model.norm.weight"][4] = -float("inf")
    result = check(tmp_path, merged=merged, a=bad, b=B, verify=verify)
    if verify != "full":
        # A sample is no verdict, but what it has met is said.
        assert not result.errors
        assert codes(result.warnings) == ([] if verify == "headers" else ["F08"])
        assert result.finite == {}
        return
    assert codes(result.errors) == ["F08", "F09"]
    assert "`model.layers.1.mlp.up_proj` holds 1 NaN and 1 infinite values" in str(result.errors[0])
    assert "the first at index (3, 2)" in result.errors[0].cause
    assert "`model.norm.weight`" in result.errors[1].cause and "(4,)" in result.errors[1].cause
    assert result.finite["a"]["where"]["model.layers.1.mlp.up_proj"]["first"] == (3, 2)
    assert result.finite["b"] == {"tensors": 6, "nan": 0, "inf": 0, "large": 0, "where": {}}


def test_values_that_the_run_may_meet_are_no_error(tmp_path):
    bad = {name: tensor.clone() for name, tensor in A.items()}
    bad["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    merged = store(average([A, B]))
    wanted = replace(WANTED, on_bad_module="rtn")
    result = preflight(wanted, merged, experts(tmp_path, a=bad, b=B), linears(), verify="full")
    assert not result.errors and codes(result.warnings) == ["F08"]


def test_a_configuration_that_is_not_readable_hides_nothing_else(tmp_path):
    found = experts(tmp_path, a=A, b={**B, "model.layers.0.mlp.up_proj.weight": torch.ones(16, 9)})
    (tmp_path / "a" / "config.json").write_text("{")
    result = preflight(WANTED, store(average([A, B])), found, linears())
    assert codes(result.errors) == ["F13", "F03"]
    assert [error.subject for error in result.errors] == ["expert `a`", "expert `b`"]


@pytest.mark.parametrize(
    ("named", "used", "warned"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("Meta-Llama/llama-3.1-8b@main", "meta-llama/Llama-3.1-8B", False),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Llama-3.1-8B", True),
        ("unsloth/llama-3-8b-bnb-4bit", "llama-local", False),
        ("/home/someone/llama", "meta-llama/Llama-3.1-8B", False),
        (None, "meta-llama/Llama-3.1-8B", False),
    ],
)
def test_an_adapter_of_another_hub_model_is_one_warning(tmp_path, named, used, warned):
    base = folder(tmp_path / "base", BASE_STATE)
    if "/" in used:
        # As the hub's cache has it.
        cached = tmp_path / f"models--{used.replace('/', '--')}" / "snapshots" / ("0" * 40)
        base = folder(cached, BASE_STATE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": named}
    (adapter / "adapter_config.json").write_text(json.dumps(options))
    for given in ({"base": str(base)}, {}):
        spec = str(adapter) if given else f"{base}+{adapter}"
        opened = Experts({"a": spec}, **given)
        result = preflight(WANTED, store(BASE_STATE), opened, linears())
        assert codes(result.findings) == (["F34"] if warned else [])
        if warned:
            (finding,) = result.warnings
            assert finding.subject == "expert `a`"
            assert f"`{named}`" in finding.cause and f"`{used}`" in finding.cause
            assert str(tmp_path) not in str(finding)


def test_routed_modules_do_not_make_the_activations_narrow(tmp_path):
    thin = [linear for linear in linears() if "down" not in linear.name]
    thin.append(Linear("narrow", (8, 4), ("narrow.weight",)))
    state = {**A, "narrow.weight": torch.ones(8, 4)}
    found = experts(tmp_path, a=(state,), b={**B, "narrow.weight": torch.zeros(8, 4)})
    result = preflight(WANTED, store(state), found, thin, tokens={"a": 100})
    # Both copies of 100 tokens of hidden_size 8 in fp32.
    assert result.estimates["memory"]["activations"] == 2 * 100 * 8 * 4


def test_large_half_precision_values_are_a_note(tmp_path):
    half = {name: tensor.half() for name, tensor in A.items()}
    half["model.layers.0.mlp.up_proj.weight"][0, 0] = 65000
    result = check(tmp_path, a=half, b=B, verify="full")
    assert not result.errors and "65,504" in str(result.findings)
    float32 = {name: tensor.float() for name, tensor in half.items()}
    quiet = check(tmp_path / "other", a=float32, b=B, verify="full")
    assert "65,504" not in str(quiet.findings)


def test_a_tied_head_cannot_be_quantized(tmp_path):
    merged = {name: tensor for name, tensor in A.items() if name != "lm_head.weight"}
    head = Linear("lm_head", (20, 8), ("lm_head.weight",))
    result = preflight(
        Wanted(Export(group_size=-1, lm_head=True)),
        store(merged, config={**CONFIG, "tie_word_embeddings": True}),
        experts(tmp_path, a=(merged, {**CONFIG, "tie_word_embeddings": True})),
        [*linears(), head],
    )
    assert codes(result.errors) == ["F37"]


def test_a_wrong_depth_is_refused(tmp_path):
    with pytest.raises(EPMQInputError, match="`verify` should be one of headers, sample, full"):
        check(tmp_path, a=A, verify="deep")
