"""CLIP and T5 towards the experts' own passes: weights and biases judged in float64."""

from __future__ import annotations

import clip_models
import pytest
import t5_models
import tiny
import torch
from clip_models import images
from judge import dequantized, gptq64, stored
from own_judge import Judge, anchored, excess, streams_of
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from epmq_gptq import EPMQConfig

BITS, GROUP, ALPHA = 4, 32, 0.1
CLIP_STREAMS = {"self_attn.out_proj": "layer_norm1", "mlp.fc2": "layer_norm2"}


def clip(folder):
    return CLIPVisionModelWithProjection.from_pretrained(folder).double().eval()


class Clip:
    def __init__(self, folder, alpha):
        self.merged, self.experts = clip_models.family(folder, 3, tokenizer=False)
        self.rows = {
            name: images(6 + 2 * index, seed=index) for index, name in enumerate(self.experts)
        }
        config = EPMQConfig(
            bits=BITS,
            group_size=GROUP,
            experts=self.experts,
            alpha=alpha,
            act_group_aware=False,
            bias_refit=True,
        )
        model = tiny.load(self.merged, config)
        self.report = model.quantize(self.rows, batch_size=3)["epmq"]
        model.save(str(folder / "out"))
        self.weights = dequantized(folder / "out")
        written = stored(folder / "out")
        self.biases = {name: written[f"{name}.bias"] for name in self.weights}
        self.judge = Judge(
            clip,
            self.merged,
            self.experts,
            streams_of(self.weights, CLIP_STREAMS),
            {name: [{"pixel_values": torch.stack(r).double()}] for name, r in self.rows.items()},
            self.weights,
            eta=1.0,
            rho=1.0,
            biases=self.biases,
        )


@pytest.fixture(scope="module", params=[ALPHA, "auto"])
def case(tmp_path_factory, request):
    return Clip(tmp_path_factory.mktemp("clip"), request.param)


def test_weights_and_biases_of_clip_reach_the_float64_optimum(case):
    b_m = load_file(case.merged / "model.safetensors")
    for module in case.report.modules:
        name = module.module
        X, gap, W_m = case.judge.moments(name)
        Xc, gap_c = X - X.mean(0), gap - gap.mean(0)
        assert module.target == "experts"
        H_E = anchored(Xc.T @ Xc, module.alpha)
        best = W_m + gap_c.T @ Xc @ torch.linalg.inv(H_E)
        reference = gptq64(best, H_E, bits=BITS, group_size=GROUP)
        Q = case.weights[name]
        ours, exact = excess(Q, best, H_E), excess(reference, best, H_E)
        # A weight on a rounding edge that tips over moves the rest of its row, either way.
        assert ours == pytest.approx(exact, rel=0.03), name
        shift = (gap - X @ (Q - W_m).T).mean(0)
        expected = b_m[f"{name}.bias"].double() + shift
        moved = float(shift.norm())
        assert module.bias_shift == pytest.approx(moved, rel=0.02)
        # Biases are stored in half precision.
        assert float((case.biases[name].double() - expected).norm()) < 0.01 * moved + 1e-3, name


def test_a_refitted_bias_is_better_than_the_merges(case):
    b_m = load_file(case.merged / "model.safetensors")
    for name, Q in case.weights.items():
        X, gap, W_m = case.judge.moments(name)
        left = gap - X @ (Q - W_m).T
        shift = case.biases[name].double() - b_m[f"{name}.bias"].double()
        assert float((left - shift).square().sum()) < float(left.square().sum()), name


# ---- T5 ------------------------------------------------------------------------------------------

# Which layer is added to what, as T5's code says: by the number of the block's sublayer.
T5_STREAMS = {
    f"layer.{number}.{leaf}": f"layer.{number}.layer_norm"
    for number in (0, 1, 2)
    for leaf in ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
}


def test_t5_reaches_the_float64_optimum_in_both_stacks(tmp_path):
    from runs import gar_order

    merged, experts = t5_models.family(tmp_path)
    rows = {
        name: t5_models.pairs(7 + 2 * index, 24, 9, seed=index, spread=6)
        for index, name in enumerate(experts)
    }
    config = EPMQConfig(bits=BITS, group_size=GROUP, experts=experts, alpha=ALPHA)
    model = tiny.load(merged, config)
    report = model.quantize(rows, batch_size=4)["epmq"]
    model.save(str(tmp_path / "out"))
    weights = dequantized(tmp_path / "out")
    batches = {name: [t5_models.arguments(row) for row in found] for name, found in rows.items()}
    streams = streams_of(weights, T5_STREAMS)
    judge = Judge(
        lambda folder: t5_models.dense(folder, {}, torch.float64),
        merged,
        experts,
        streams,
        batches,
        weights,
        eta=1.0,
        rho=1.0,
    )
    assert {m.module for m in report.modules if m.rho} == set(streams)
    assert len(streams) == 2 * 2 + 2 * 3  # encoder blocks write twice, decoder blocks three times
    for module in report.modules:
        X, gap, W_m = judge.moments(module.module)
        H_E = anchored(X.T @ X, ALPHA)
        best = W_m + gap.T @ X @ torch.linalg.inv(H_E)
        reference = gptq64(best, H_E, bits=BITS, group_size=GROUP, order=gar_order(H_E))
        ours, exact = excess(weights[module.module], best, H_E), excess(reference, best, H_E)
        assert ours == pytest.approx(exact, rel=0.02), module.module
        assert module.merge_excess == pytest.approx(excess(W_m, best, H_E), rel=1e-2)
