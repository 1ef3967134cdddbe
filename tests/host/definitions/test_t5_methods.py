"""The host's own methods on T5 (GPTQ, RTN, AWQ), its rows, and transformers without us."""

from __future__ import annotations

import json

import pytest
import t5_models
import tiny
import torch
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel, RTNConfig
from judge import codes, dequantized, stored
from safetensors.torch import load_file

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.evaluation import load_model
from epmq_gptq.host.definitions.t5_rows import batches_of_pairs

GRID = {"bits": 4, "group_size": 32, "offload_to_disk": False}
ROWS = t5_models.pairs(8, 20, 7, seed=5, spread=4)


@pytest.fixture(scope="module", params=["gated", "plain"])
def merged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return t5_models.family(folder, gated=request.param == "gated")[0]


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    return t5_models.family(tmp_path_factory.mktemp("flan"))


def run(merged, config, rows, out, *, dtype=torch.float32, batch_size=4, **options):
    model = GPTQModel.load(str(merged), config, dtype=dtype, device="cpu")
    model.quantize(rows, batch_size=batch_size, **options)
    model.save(str(out))
    return model


def logits(model, row=ROWS[0]):
    with torch.no_grad():
        return model(**t5_models.arguments(row)).logits.float()


def relative(one, other) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_gptq_and_rtn(merged, tmp_path, method):
    config, rows = (GPTQConfig(**GRID), ROWS) if method == "gptq" else (RTNConfig(**GRID), None)
    run(merged, config, rows, tmp_path / "out")
    weights = dequantized(tmp_path / "out")
    before, after = load_file(merged / "model.safetensors"), stored(tmp_path / "out")
    kept = {name for name in after if name.endswith(".weight")}
    assert kept == {name for name in before if name.removesuffix(".weight") not in weights}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    for name, W in weights.items():
        assert relative(W, before[f"{name}.weight"].double()) < 0.3, name
    model = load_model(tmp_path / "out", device="cpu").module
    expected = t5_models.dense(merged, weights, torch.float32)
    assert relative(logits(model), logits(expected)) < 3e-3
    ids = torch.tensor([ROWS[0]["input_ids"]])
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), expected.generate(ids, **greedy))


def test_gptq_leaves_padding_out(flan, tmp_path):
    merged, _ = flan
    for batch_size in (1, 8):
        run(merged, GPTQConfig(**GRID), ROWS, tmp_path / str(batch_size), batch_size=batch_size)
    one, other = codes(tmp_path / "1"), codes(tmp_path / "8")
    first = [f"encoder.block.0.layer.0.SelfAttention.{leaf}" for leaf in "qkv"]
    assert all(torch.equal(one[name], other[name]) for name in first)
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    assert differing < 0.05 * sum(code.numel() for code in one.values())


def test_awq(merged, tmp_path):
    """On a CPU the host knows AWQ in bfloat16 and with its torch kernel only."""
    kernel = {"backend": BACKEND.AWQ_TORCH}
    half = torch.bfloat16
    quantized = run(merged, AWQConfig(**GRID), ROWS, tmp_path / "out", dtype=half, **kernel)
    loaded = GPTQModel.load(str(tmp_path / "out"), device="cpu", dtype=half, **kernel)
    assert torch.equal(logits(loaded.model), logits(quantized.model))
    dense = t5_models.dense(merged, {}, torch.float32)
    assert relative(logits(loaded.model), logits(dense)) < 0.5
    before, after = load_file(merged / "model.safetensors"), stored(tmp_path / "out")
    assert sum(name.endswith(".qweight") for name in after) == 36 - 4 * (
        "lm_head.weight" not in before
    )
    scaled = [name for name in before if "block" in name and "layer_norm" in name]
    assert any(relative(after[name].float(), before[name]) > 0.05 for name in scaled)
    for name in ("shared.weight", "encoder.final_layer_norm.weight"):
        assert torch.equal(after[name], before[name].to(after[name].dtype))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    assert loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[1] > 1


def test_experts_in_bfloat16(flan, tmp_path):
    """transformers keeps `wo` in float32 whatever is asked for."""
    merged, _ = flan
    config = EPMQConfig(profile="paper", bits=4, group_size=32, experts={"only": merged}, alpha=0.1)
    run(merged, config, {"only": ROWS}, tmp_path / "out", dtype=torch.bfloat16)
    before = load_file(merged / "model.safetensors")
    weights = dequantized(tmp_path / "out")
    assert sum(name.endswith(".wo") for name in weights) == 4
    for name, W in weights.items():
        assert relative(W, before[f"{name}.weight"].double()) < 0.3, name
    expected = t5_models.dense(merged, weights, torch.float32)
    assert (
        relative(logits(load_model(tmp_path / "out", device="cpu").module), logits(expected)) < 0.01
    )


# ---- rows --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(merged):
    return tiny.load(merged, GPTQConfig(**GRID))


def test_batches_hide_padding_behind_one_mask(loaded):
    rows = [
        {"input_ids": [5] * source, "labels": [6] * target}
        for source, target in ((9, 4), (3, 4), (4, 4), (8, 2), (2, 4), (1, 4))
    ]
    batches = loaded.prepare_dataset(rows, batch_size=2)
    shapes = [(tuple(b["input_ids"].shape), tuple(b["decoder_input_ids"].shape)) for b in batches]
    # The second batch would have sources as wide as its targets, and a mask of them.
    assert shapes == [((2, 9), (2, 4)), ((2, 4 - 1), (2, 4)), ((1, 1), (1, 4)), ((1, 8), (1, 2))]
    assert all(batch["decoder_attention_mask"].all() for batch in batches)
    wide = batches_of_pairs(loaded, [rows[2], rows[5]], 2)
    assert wide[0]["input_ids"].shape == (2, 5) and wide[0]["decoder_input_ids"].shape == (2, 4)
    assert wide[0]["attention_mask"].sum() == 5 and (wide[0]["input_ids"][:, 4] == 0).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"calibration_dataset_concat_size": 128}, "calibration_concat_size"),
        ({"calibration_concat_separator": " "}, "calibration_concat_separator"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_mean_nothing_for_pairs_are_refused(loaded, options, named):
    with pytest.raises(EPMQInputError, match=f"`{named}`"):
        loaded.prepare_dataset(ROWS, **options)


def test_rows_of_text_alone_are_refused(loaded):
    with pytest.raises(EPMQInputError, match="target"):
        loaded.prepare_dataset(["a sentence"], batch_size=1)


# ---- transformers ------------------------------------------------------------------------------

_READER = """
import json, torch
from unittest import mock
from transformers import AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5PreTrainedModel
with mock.patch.object(T5PreTrainedModel, "_init_weights", lambda self, module: None):
    model = AutoModelForSeq2SeqLM.from_pretrained(".", dtype=torch.float16)
with torch.no_grad():
    ids = {{name: torch.tensor(ids) for name, ids in {ids}.items()}}
    print("logits", json.dumps(model(**ids).logits[0].tolist()))
"""


def read_by_transformers(reader, folder, row):
    ids = {name: tensor.tolist() for name, tensor in t5_models.arguments(row).items()}
    printed = reader.run(_READER.format(ids=ids), folder)
    found = [line for line in printed.splitlines() if line.startswith("logits ")]
    return torch.tensor(json.loads(found[0][7:]))[None]


def test_transformers_and_optimum_read_it_once_t5_stops_initialising(flan, tmp_path, reader):
    merged, experts = flan
    config = EPMQConfig(profile="paper", **GRID, experts=experts, alpha=0.1)
    run(merged, config, dict.fromkeys(experts, ROWS), tmp_path / "out")
    read = read_by_transformers(reader, tmp_path / "out", ROWS[0])
    host = tiny.reload(tmp_path / "out")
    assert host.model.lm_head.weight is not host.model.shared.weight
    assert torch.equal(read, logits(host.model))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    assert host.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (1, 5)
