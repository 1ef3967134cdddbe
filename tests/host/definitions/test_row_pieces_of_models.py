"""CLIP and T5 run in pieces of their batches, in either of their stacks."""

from __future__ import annotations

import clip_models
import pytest
import t5_models
import transformers
from little_room import in_pieces_as_whole
from resume_runs import Run
from test_clip_text_tower import TEXT_TOO
from test_clip_text_tower import rows as images_with_texts


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("T5LayerFF", 30 * 64), ("T5LayerCrossAttention", 20 * 64), ("T5LayerSelfAttention", 30 * 64)],
)
def test_t5_in_pieces(tmp_path, kind, numbers):
    merged, experts = t5_models.family(tmp_path)
    rows = {
        name: t5_models.pairs(6, 20, 12, seed=index, spread=6) for index, name in enumerate(experts)
    }
    in_pieces_as_whole(Run(tmp_path, merged, experts, rows), numbers, kind)


def test_clip_in_pieces(tmp_path):
    merged, experts = clip_models.family(tmp_path, kind=transformers.CLIPModel)
    rows = {name: images_with_texts(6, seed) for seed, name in enumerate(experts)}
    run = Run(tmp_path, merged, experts, rows, dynamic=TEXT_TOO)
    in_pieces_as_whole(run, 30 * 64, "CLIPMLP", batch_size=4)
