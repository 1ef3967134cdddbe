"""Every linear layer is mapped onto the experts' tensors, whatever their layout, or refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from judge import stored
from safetensors.torch import save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.checks.tensors import check_tensors
from epmq_gptq.checks.weights import MERGED
from epmq_gptq.experts.experts import Experts
from epmq_gptq.experts.linears import StoredWeight, piece
from epmq_gptq.host.model_linears import (
    check_architecture,
    check_head,
    quantizable_linears,
)
from epmq_gptq.io.checkpoints import Checkpoint

SHAPE = dict(
    **tiny.TOKENS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=1))


def qwen3_moe():
    options = dict(num_experts=3, num_experts_per_tok=1, head_dim=16, moe_intermediate_size=32)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **options))


def phi3():
    return Phi3ForCausalLM(Phi3Config(**SHAPE))


def gpt_oss():
    """Its routed modules are stacked transposed and interleaved; hidden and inner size agree."""
    shape = SHAPE | dict(intermediate_size=32)
    return GptOssForCausalLM(
        GptOssConfig(**shape, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    )


def load(model, folder, **options):
    torch.manual_seed(0)
    tiny.save(model.eval(), folder)
    config = EPMQConfig(bits=8, group_size=32, experts={"a": str(folder)}, **options)
    return tiny.load(folder, config)


def stacked(tensors):
    """A checkpoint's tensors as transformers 5 has them in memory: routed modules in stacks."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    routed: dict[str, dict] = {}
    result = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            result[name.replace("block_sparse_moe", "mlp")] = tensor
            continue
        stack, _, tail = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        index, leaf = tail.split(".")[:2]
        routed.setdefault(f"{stack}.experts", {})[int(index), names.get(leaf, leaf)] = tensor
    for stack, parts in routed.items():
        indices = sorted({index for index, _ in parts})
        gate_up = [torch.cat([parts[i, "gate_proj"], parts[i, "up_proj"]]) for i in indices]
        result[f"{stack}.gate_up_proj"] = torch.stack(gate_up)
        result[f"{stack}.down_proj"] = torch.stack([parts[i, "down_proj"] for i in indices])
    return result


def split(tensors):
    """Phi-3's joined gate and up as two tensors."""
    result = {}
    for name, tensor in tensors.items():
        halves = tensor.chunk(2) if ".gate_up_proj." in name else ()
        for leaf, half in zip(("gate_proj", "up_proj"), halves, strict=False):
            result[name.replace("gate_up_proj", leaf)] = half.clone()
        if not halves:
            result[name] = tensor
    return result


@pytest.mark.parametrize(
    ("build", "relayout"), [(mixtral, stacked), (qwen3_moe, stacked), (phi3, split)]
)
def test_another_layout_of_the_same_weights_gives_the_same_layers(build, relayout, tmp_path):
    model = load(build(), tmp_path / "m")
    linears = list(quantizable_linears(model))
    check_architecture(model)
    assert misfits(linears, tmp_path / "m") == []
    tensors = stored(tmp_path / "m")
    other = relayout(tensors)
    assert other.keys() != tensors.keys()
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    experts = Experts({"file": str(tmp_path / "m"), "other": str(tmp_path / "other")})
    experts.bind(linears)
    seen = set()
    for linear in linears:
        zero = torch.zeros(linear.outputs, linear.inputs)
        one = experts.delta("file", linear.name, zero).dense
        assert torch.equal(one, experts.delta("other", linear.name, zero).dense), linear.name
        assert torch.equal(experts.rows("other", linear.name, 1, 3), one[1:3])
        seen.add(one.sum().item())
    assert len(seen) == len(linears)  # no two layers were given the same weight


def test_transformers_stacks_gate_rows_before_up_rows():
    config = MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=1)
    config._experts_implementation = "eager"
    stack = MixtralExperts(config).double()
    for tensor in (stack.gate_up_proj, stack.down_proj):
        torch.nn.init.normal_(tensor)
    x = torch.randn(4, 32, dtype=torch.float64)
    index = torch.tensor([[0], [2], [1], [2]])
    with torch.no_grad():
        got = stack(x, index, torch.ones(4, 1, dtype=torch.float64))
        for row, (i,) in enumerate(index.tolist()):
            gate, up = (piece(stack.gate_up_proj, StoredWeight("t", i, part)) for part in (0, 1))
            down = piece(stack.down_proj, StoredWeight("t", i))
            expected = down @ (torch.nn.functional.silu(gate @ x[row]) * (up @ x[row]))
            torch.testing.assert_close(got[row], expected)


@pytest.mark.parametrize("build", [mixtral, tiny.llama])
def test_no_two_layers_share_a_name(build, tmp_path):
    linears = list(quantizable_linears(load(build(), tmp_path / "m")))
    places = [place for linear in linears for place in linear.stored]
    assert len(places) == len(set(places)) > len(linears)
    assert all(linear.tensors[0] == f"{linear.name}.weight" for linear in linears)


def test_renamings_are_known_without_the_hosts_lazy_source(tmp_path):
    model = load(mixtral(), tmp_path / "m", offload_to_disk=False)
    assert model.turtle_model is None
    assert misfits(quantizable_linears(model), tmp_path / "m") == []


# ---- what is refused ---------------------------------------------------------------------------


def misfits(linears, folder):
    """What a preflight says of the layers that it cannot find in the merged model itself."""
    merged = Checkpoint(folder, what="m")
    findings = check_tensors(merged, merged, linears, MERGED).findings
    return [finding for finding in findings if finding.level == "error"]


def refusal(check, *arguments):
    with pytest.raises(EPMQInputError) as caught:
        check(*arguments)
    return caught.value


def test_an_architecture_the_host_would_guess_at(tmp_path):
    error = refusal(check_architecture, load(OlmoForCausalLM(OlmoConfig(**SHAPE)), tmp_path / "m"))
    assert error.code == "EPMQ-F38" and "`olmo` (OlmoForCausalLM)" in error.subject
    assert "MODEL_MAP" in error.remedy


def test_stacks_that_are_transposed_and_interleaved(tmp_path):
    model = load(gpt_oss(), tmp_path / "m")
    linears = list(quantizable_linears(model))
    routed = [linear for linear in linears if ".experts." in linear.name]
    assert len(routed) == 2 * 2 * 3 and not any(linear.joined for linear in routed)
    errors = misfits(linears, tmp_path / "m")
    assert len(errors) == len(routed) and {error.code for error in errors} == {"EPMQ-F01"}
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert errors[0].cause == f"the merged model: `{name}` is missing."


def test_a_piece_of_another_shape(tmp_path):
    model = load(phi3(), tmp_path / "m")
    linears = list(quantizable_linears(model))
    tensors = stored(tmp_path / "m")
    tensors["model.layers.1.mlp.gate_up_proj.weight"] = torch.ones(127, 32)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    errors = misfits(linears, tmp_path / "m")
    assert [error.code for error in errors] == ["EPMQ-F03", "EPMQ-F03"]
    assert all("gate_up_proj.weight` has shape" in error.cause for error in errors)


def test_routed_modules_that_the_host_does_not_find(tmp_path):
    """GPTQModel 7.6 knows them under the names they had before transformers 5, and says nothing."""
    options = dict(num_local_experts=2, num_experts_per_tok=1, head_dim=16, rotary_dim=8)
    model = load(MiniMaxM2ForCausalLM(MiniMaxM2Config(**SHAPE, **options)), tmp_path / "m")
    assert not any(".experts." in linear.name for linear in quantizable_linears(model))
    error = refusal(check_architecture, model)
    assert error.code == "EPMQ-F38" and "`minimax_m2` (MiniMaxM2ForCausalLM)" in error.subject
    assert "experts.0." in error.cause and "left unquantized" in error.cause


def test_more_than_text_and_layers_of_another_type(tmp_path, monkeypatch):
    model = load(tiny.llama(), tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(model.model.config, "vision_config", {"depth": 1}, raising=False)
        error = refusal(check_architecture, model)
        assert error.code == "EPMQ-F38" and "it reads more than text" in error.cause
    model.model.model.layers[1].self_attn.o_proj = torch.nn.Conv1d(64, 64, 1)
    error = refusal(check_architecture, model)
    assert "1 x Conv1d, such as `model.layers.1.self_attn.o_proj`" in error.cause
    model.quantize_config.dynamic = {r"-:.*layers\.1\.self_attn\.o_proj": {}}
    check_architecture(model)  # as the remedy said


def test_a_head_is_quantized_only_where_it_has_a_weight_of_its_own(tmp_path):
    own = load(tiny.llama(layers=1), tmp_path / "own", lm_head=True)
    check_head(own)
    linears = list(quantizable_linears(own))
    assert [linear.name for linear in linears][-1] == "lm_head"
    assert misfits(linears, tmp_path / "own") == []
    tied = load(tiny.llama(layers=1, tie_word_embeddings=True), tmp_path / "tied", lm_head=True)
    error = refusal(check_head, tied)
    assert error.code == "EPMQ-F37" and error.subject == "`lm_head`"
    tied.quantize_config.lm_head = False
    check_head(tied)
    own.lm_head = "score"
    assert refusal(check_head, own).code == "EPMQ-F38"
