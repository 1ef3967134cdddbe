"""CLIP judged from the saved file: eq. 12 in float64 against a float64 GPTQ on W*."""

from __future__ import annotations

import clip_models
import pytest
import torch
from clip_models import images
from gptqmodel import GPTQModel
from judge import dequantized, gptq64, stored
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from epmq_gptq import EPMQConfig
from epmq_gptq.method.target import objective

BITS, GROUP, ALPHA = 4, 32, 0.1
NAMES = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mlp.fc1",
    "mlp.fc2",
)


class Case:
    """Three experts with unequal calibration, columns rounded in their own order."""

    def __init__(self, folder):
        self.merged, self.experts = clip_models.family(folder, 3, tokenizer=False)
        self.rows = {
            name: images(4 + 2 * index, seed=index) for index, name in enumerate(self.experts)
        }
        config = EPMQConfig(
            profile="paper",
            bits=BITS,
            group_size=GROUP,
            experts=self.experts,
            alpha=ALPHA,
            act_group_aware=False,
            desc_act=False,
        )
        model = GPTQModel.load(str(self.merged), config, dtype=torch.float32, device="cpu")
        self.report = model.quantize(self.rows, batch_size=3)["epmq"]
        model.save(str(folder / "out"))
        self.out, self.weights = folder / "out", dequantized(folder / "out")
        dense = CLIPVisionModelWithProjection.from_pretrained(self.merged)
        # A layer's bias is stored with it, in half precision, and is so for what comes after.
        written = stored(self.out)
        for name in self.weights:
            dense.get_submodule(name).bias.data = written[f"{name}.bias"].float()
        batches = {
            name: [{"pixel_values": torch.stack(rows).double()}] for name, rows in self.rows.items()
        }
        self.inputs = clip_models.linear_inputs(dense, self.weights, batches)

    def quadratics(self, module):
        """W_m, [(W_i, H_i)], λ, H_E and the optimum W* of eq. 12."""
        W_m, pairs, lam, H_E = clip_models.quadratics(
            module, self.merged, self.experts, self.inputs[module], ALPHA
        )
        R = sum(W_i @ H_i for W_i, H_i in pairs) + lam * W_m
        return W_m, pairs, lam, H_E, R @ torch.linalg.inv(H_E)

    def excess(self, module, Q):
        W_m, pairs, lam, _, best = self.quadratics(module)
        return objective(Q, W_m, pairs, lam) - objective(best, W_m, pairs, lam)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


def test_every_layer_reaches_the_float64_optimum(case):
    assert list(case.weights) and set(case.weights) == {
        f"vision_model.encoder.layers.{layer}.{name}" for layer in range(2) for name in NAMES
    }
    for module, weight in case.weights.items():
        _, _, _, H_E, best = case.quadratics(module)
        exact = case.excess(module, gptq64(best, H_E, bits=BITS, group_size=GROUP))
        # A weight on a rounding edge that tips over moves the rest of its row, either way.
        assert case.excess(module, weight) == pytest.approx(exact, rel=0.03), module


def test_the_report_tells_the_truth(case):
    tokens = {name: 17 * len(rows) for name, rows in case.rows.items()}
    assert case.report.tokens == tokens
    assert [m.module.partition("layers.")[2] for m in case.report.modules] == [
        f"{layer}.{name}" for layer in range(2) for name in NAMES
    ]
    for module in case.report.modules:
        W_m, pairs, lam, _, best = case.quadratics(module.module)
        assert module.tokens == tokens
        assert module.lam == pytest.approx(lam, rel=1e-3)
        merge_excess = objective(W_m, W_m, pairs, lam) - objective(best, W_m, pairs, lam)
        assert module.merge_excess == pytest.approx(merge_excess, rel=1e-2)
        excess = case.excess(module.module, case.weights[module.module])
        assert module.excess == pytest.approx(excess, rel=1e-2)


def test_queries_keys_and_values_are_counted_once(case):
    assert (case.report.shared_groups, case.report.shared_layers) == (2, 2 * 2)


def test_the_projection_is_the_merges(case):
    name = "visual_projection.weight"
    assert torch.equal(stored(case.out)[name], load_file(case.merged / "model.safetensors")[name])
