"""CLIP's text tower: as it is unless `dynamic` asks for it, then under a causal mask."""

from __future__ import annotations

import clip_models
import pytest
import tiny
import torch
from clip_models import TEXT_TOO, images, images_with_texts
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel
from judge import dequantized, gptq64, stored
from transformers import CLIPModel

from epmq_gptq import EPMQConfig
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.host.definitions.loading import load_clip
from epmq_gptq.method.target import objective

ALPHA = 0.1
BITS = dict(bits=4, group_size=32)


def load(folder, config, dtype=torch.float32):
    return GPTQModel.load(str(folder), config, dtype=dtype, device="cpu")


def tensors(row):
    """One row as the model takes it, unpadded, in float64."""
    ids = tiny.tokenizer()(row["text"])["input_ids"]
    return {
        "pixel_values": row["pixel_values"][None].double(),
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return clip_models.family(tmp_path_factory.mktemp("clip"), kind=CLIPModel)


class Case:
    """Two experts, both towers quantized, texts of many lengths in one batch."""

    def __init__(self, family, folder):
        self.merged, self.experts = family
        self.rows = {name: images_with_texts(6, seed) for seed, name in enumerate(self.experts)}
        config = EPMQConfig(
            profile="paper",
            **BITS,
            experts=self.experts,
            alpha=ALPHA,
            dynamic=TEXT_TOO,
            act_group_aware=False,
            desc_act=False,
        )
        model = load(self.merged, config)
        self.report = model.quantize(self.rows, batch_size=4)["epmq"]
        model.save(str(folder))
        self.out, self.weights = folder, dequantized(folder)
        dense, written = CLIPModel.from_pretrained(self.merged), stored(folder)
        for name in self.weights:
            dense.get_submodule(name).bias.data = written[f"{name}.bias"].float()
        batches = {name: [tensors(row) for row in each] for name, each in self.rows.items()}
        self.inputs = clip_models.linear_inputs(dense, self.weights, batches)


@pytest.fixture(scope="module")
def case(family, tmp_path_factory):
    return Case(family, tmp_path_factory.mktemp("both") / "out")


def test_both_towers_reach_the_float64_optimum(case):
    """One padded token counted, or one seen that lies ahead, and λ would differ."""
    reports = {module.module: module for module in case.report.modules}
    towers = [name.partition(".")[0] for name in case.weights]
    assert towers.count("vision_model") == towers.count("text_model") == 2 * 6
    for module, weight in case.weights.items():
        W_m, pairs, lam, H_E = clip_models.quadratics(
            module, case.merged, case.experts, case.inputs[module], ALPHA
        )
        assert reports[module].lam == pytest.approx(lam, rel=1e-3), module
        R = sum(W_i @ H_i for W_i, H_i in pairs) + lam * W_m
        best = R @ torch.linalg.inv(H_E)
        least = objective(best, W_m, pairs, lam)
        reference = gptq64(best, H_E, bits=4, group_size=32)
        exact = objective(reference, W_m, pairs, lam) - least
        # A weight on a rounding edge that tips over moves the rest of its row, either way.
        assert objective(weight, W_m, pairs, lam) - least == pytest.approx(exact, rel=0.03), module


def test_every_layer_counts_its_own_towers_tokens(case):
    images_of = {name: 17 * len(each) for name, each in case.rows.items()}
    words = {
        name: sum(tensors(row)["input_ids"].numel() for row in each)
        for name, each in case.rows.items()
    }
    towers = {"vision_model": images_of, "text_model": words}
    for module in case.report.modules:
        assert module.tokens == towers[module.module.partition(".")[0]], module.module


def test_it_comes_back_with_both_towers(case):
    model = load_clip(case.out, device="cpu", backend="gptq_torch")
    packed = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
    assert sorted(packed) == sorted(case.weights)
    dense = CLIPModel.from_pretrained(case.merged)
    for name, weight in case.weights.items():
        dense.get_submodule(name).weight.data = weight.float()
    batch = tensors(case.rows["expert0"][0])
    with torch.no_grad():
        expected = dense(**batch | {"pixel_values": batch["pixel_values"].float()})
        got = model(**batch | {"pixel_values": batch["pixel_values"].half()})
    # The kernel computes in half precision.
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(got[name].float(), expected[name], rtol=0.02, atol=5e-3)


def test_plain_gptq_counts_no_padding(family, tmp_path, case):
    model = load(family[0], GPTQConfig(**BITS, dynamic=TEXT_TOO))
    batches = model.prepare_dataset(
        [*images_with_texts(6, 0), *images_with_texts(6, 1)], batch_size=4
    )
    assert sum(len(batch["pixel_values"]) for batch in batches) == 12
    assert all(batch["attention_mask"].all() for batch in batches)
    model.quantize([*images_with_texts(6, 0), *images_with_texts(6, 1)], batch_size=4)
    model.save(str(tmp_path / "out"))
    assert set(dequantized(tmp_path / "out")) == set(case.weights)


def test_it_stays_as_it_is_unless_asked_for(family, tmp_path):
    merged, experts = family
    for dynamic in (None, {r"-:text_model\..*": {}}, {r".*\.fc1": {"bits": 8}}):
        model = load(merged, EPMQConfig(profile="paper", **BITS, experts=experts, dynamic=dynamic))
        assert not model.reads_text
        assert model.extract_layers_node() == ["vision_model.encoder.layers"]
    model = load(merged, EPMQConfig(profile="paper", **BITS, experts=experts, alpha=ALPHA))
    report = model.quantize({name: images_with_texts(3, 0) for name in experts})["epmq"]
    assert len(report.modules) == 2 * 6
    assert all(module.module.startswith("vision_model.") for module in report.modules)


def test_it_needs_a_text_for_every_image(family):
    merged, experts = family
    model = load(merged, EPMQConfig(profile="paper", **BITS, experts=experts, dynamic=TEXT_TOO))
    with pytest.raises(EPMQInputError, match="no `text`") as caught:
        model.quantize({name: images(3, 0) for name in experts})
    assert caught.value.code == "EPMQ-F32" and "`text_model`" in caught.value.remedy


def test_awq_refuses_it(family):
    model = load(family[0], AWQConfig(**BITS, dynamic=TEXT_TOO), dtype=torch.bfloat16)
    with pytest.raises(EPMQInputError, match="AWQ cannot quantize") as caught:
        model.quantize(images_with_texts(3, 0), backend=BACKEND.AWQ_TORCH)
    assert caught.value.code == "EPMQ-F38"
