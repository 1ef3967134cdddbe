"""CLIP and T5 go on after a kill, in either of their stacks, to the same tensors."""

from __future__ import annotations

import clip_models
import pytest
import t5_models
import transformers
from clip_models import TEXT_TOO, images_with_texts
from resume_runs import Run, goes_on

from epmq_gptq.host.resume.session import PROVEN


@pytest.mark.parametrize("gated", [True, False])
def test_t5_with_both_stacks(tmp_path, gated):
    merged, experts = t5_models.family(tmp_path, gated=gated)
    rows = {
        name: t5_models.pairs(6, 20, 12, seed=index, spread=6) for index, name in enumerate(experts)
    }
    run = Run(tmp_path, merged, experts, rows)
    # Within the encoder, where the decoder begins, and behind that.
    goes_on(run, "encoder.block.1", "decoder.block.0", "decoder.block.1")


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_clips_vision_tower(tmp_path, kind):
    merged, experts = clip_models.family(tmp_path, kind=getattr(transformers, kind))
    rows = {name: clip_models.images(6, seed=index) for index, name in enumerate(experts)}
    whole, _ = goes_on(Run(tmp_path, merged, experts, rows, bias_refit=True), "layers.1")
    assert whole.model.config.model_type in PROVEN


def test_clip_with_both_towers(tmp_path):
    merged, experts = clip_models.family(tmp_path, kind=transformers.CLIPModel)
    rows = {name: images_with_texts(6, seed) for seed, name in enumerate(experts)}
    run = Run(tmp_path, merged, experts, rows, dynamic=TEXT_TOO)
    whole, _ = goes_on(
        run,
        "vision_model.encoder.layers.1",
        "text_model.encoder.layers.0",
        "text_model.encoder.layers.1",
    )
    assert whole.model.config.model_type in PROVEN
