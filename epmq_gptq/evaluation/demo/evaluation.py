"""Loss and accuracy of a causal language model on one domain's held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .options import Score
from .rows import IGNORED, Row, collate


@torch.inference_mode()
def score(model: torch.nn.Module, rows: Sequence[Row], pad_id: int, batch_size: int = 16) -> Score:
    """Score ``model`` (anything called with ``input_ids`` that returns ``logits``) on ``rows``."""
    total, tokens, right, spans = 0.0, 0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, labels = collate(batch, pad_id)
        # Padding is on the right and attention is causal: no scored token sees it, no mask needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:]
        total += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        tokens += int((targets != IGNORED).sum())
        hits = logits.argmax(-1) == ids[:, 1:]  # hits[b, t] is about token t + 1
        for hit, row in zip(hits, batch, strict=True):
            right += sum(bool(hit[a - 1 : b - 1].all()) for a, b in row.spans)
            spans += len(row.spans)
    return Score(total / tokens, right / spans)
