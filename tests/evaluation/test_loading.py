"""One loader for full precision, GPTQ and AWQ; what is dense holds exactly the packed weights."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from epmq_gptq import EPMQInputError
from epmq_gptq.evaluation import load_model
from epmq_gptq.evaluation.baselines import QuantizeSettings, quantize
from epmq_gptq.evaluation.loading import packed_layers

IDS = torch.arange(4, 36)[None]


@torch.no_grad()
def logits(module):
    return module(input_ids=IDS, use_cache=False).logits.float()


def test_full_precision_is_what_transformers_loads(merged):
    loaded = load_model(merged, device="cpu")
    reference = tiny.llama(2, 64, num_key_value_heads=4)
    assert loaded.quantization is None and loaded.form == "text" and loaded.dtype == "float32"
    assert loaded.name == "merged" and loaded.revision is None
    assert torch.equal(logits(loaded.module), logits(reference))
    assert loaded.tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("method", ["rtn", "awq", "epmq"])
def test_dense_agrees_with_the_kernel(method, checkpoints, merged):
    dense = load_model(checkpoints[method], device="cpu")
    kernel = load_model(checkpoints[method], device="cpu", dense=False)
    assert dense.quantization["kernel"] == "dense" and dense.dtype == "float32"
    assert dense.quantization["method"] == ("awq" if method == "awq" else "gptq")
    assert dense.quantization["bits"] == 4 and dense.quantization["group_size"] == 32
    assert dense.quantization["linears"] == kernel.quantization["linears"] == 14
    assert not packed_layers(dense.module) and len(packed_layers(kernel.module)) == 14
    exact, half = logits(dense.module), logits(kernel.module)
    unrounded = logits(load_model(merged, device="cpu").module)
    rounding = (exact - unrounded).abs().max()
    # Half precision moves the logits by far less than the rounding of the weights does.
    assert (exact - half).abs().max() < 0.2 * rounding, (exact - half).abs().max()


def test_dense_keeps_what_is_not_quantized_bit_for_bit(checkpoints, merged):
    loaded = load_model(checkpoints["epmq"], device="cpu")
    state, original = loaded.module.state_dict(), load_file(merged / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(state[name], original[name]), name


def test_rotary_frequencies_stay_exact_in_half_precision(checkpoints, merged):
    """As transformers loads them: rounded, they would turn late positions by whole degrees."""
    exact = load_model(merged, device="cpu").module.model.rotary_emb.inv_freq
    half = load_model(checkpoints["epmq"], device="cpu", dtype="bfloat16").module
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_emb.inv_freq, exact)


def test_biases_survive(tmp_path):
    """GPT-2's linears and CLIP's have biases, Llama's do not: one with them."""
    model = tiny.llama(1, 64, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folder = tiny.save(model, tmp_path / "biased")
    quantize("RTN", folder, {}, {}, QuantizeSettings(), tmp_path / "rtn")
    state = load_model(tmp_path / "rtn", device="cpu").module.state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith("bias"):
            assert torch.allclose(state[name], value, atol=2e-3), name


def test_refuses_other_quantizers_and_foreign_code(merged, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(merged, folder)
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(EPMQInputError, match="bitsandbytes.*`gptq` and `awq`"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnModel"]}))
    with pytest.raises(EPMQInputError, match="MyOwnModel"):
        load_model(folder)
    with pytest.raises(EPMQInputError, match="`dtype` should be one of"):
        load_model(merged, dtype="int8")
    with pytest.raises(EPMQInputError, match="neither an existing folder nor a hub id"):
        load_model("no/such/folder/here")


def test_a_quantize_config_beside_an_old_checkpoint_counts(checkpoints, tmp_path):
    """Checkpoints of AutoGPTQ's days have quantize_config.json alone."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoints["rtn"], folder)
    config = json.loads((folder / "config.json").read_text())
    declared = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    if not (folder / "quantize_config.json").is_file():
        (folder / "quantize_config.json").write_text(json.dumps(declared))
    assert load_model(folder, device="cpu").quantization["bits"] == 4


def test_no_tokenizer_is_an_error_that_says_so(merged, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(merged / "config.json", folder)
    save_file(
        load_file(merged / "model.safetensors"), folder / "model.safetensors", {"format": "pt"}
    )
    loaded = load_model(folder, device="cpu")
    with pytest.raises(EPMQInputError, match="no tokenizer"):
        _ = loaded.tokenizer
