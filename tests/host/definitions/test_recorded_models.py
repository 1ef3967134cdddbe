"""CLIP and T5 quantized again from recorded statistics: the same bits."""

from __future__ import annotations

import clip_models
import pytest
import t5_models
import torch
from gptqmodel import GPTQModel
from judge import stored

from epmq_gptq import EPMQConfig
from epmq_gptq.host.recorded.requantize import requantize


def of_clip(folder):
    merged, experts = clip_models.family(folder, 2)
    rows = {name: clip_models.images(6, seed=i) for i, name in enumerate(experts)}
    return merged, experts, rows, {"bias_refit": True}


def of_t5(folder):
    merged, experts = t5_models.family(folder, 2)
    rows = {name: t5_models.pairs(6, 12, 8, seed=i) for i, name in enumerate(experts)}
    return merged, experts, rows, {}


@pytest.mark.parametrize("case", [of_clip, of_t5])
def test_the_same_settings_give_the_same_bits(case, tmp_path):
    merged, experts, rows, options = case(tmp_path / "models")
    config = EPMQConfig(
        bits=4,
        group_size=32,
        experts={name: str(folder) for name, folder in experts.items()},
        save_statistics=True,
        **options,
    )
    model = GPTQModel.load(str(merged), config, dtype=torch.float32, device="cpu")
    report = model.quantize(rows, batch_size=3)["epmq"]
    model.save(str(tmp_path / "out"))
    again = requantize(tmp_path / "out", merged, device="cpu")
    again.save(str(tmp_path / "again"))
    first, second = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Figures per expert, of every layer of every stack.
    assert all(set(module.experts) == set(experts) for module in report.modules)
