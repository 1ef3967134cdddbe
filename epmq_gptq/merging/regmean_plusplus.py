"""RegMean++: RegMean on the inputs that the merged model will see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .regmean import RegMean


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean with inputs of the merged layers before (Nguyen et al. 2025), as in FusionBench.

    As RegMean, but the rows of expert i reach a block through the blocks *as they are merged*:
    embeddings averaged, earlier blocks merged. Within the block they run through the expert's own
    weights, so that q, k and v see the merged model's activations, and the output projection and
    the feed-forward layers those of the expert's block upon them. Then the block is merged and the
    rows of all experts pass through it. A decoder reads the merged encoder.

    FusionBench leaves what follows the last block as it is in the base; here it is averaged like
    every other parameter outside of the linear layers.
    """

    name: ClassVar[str] = "regmean_plusplus"
    title: ClassVar[str] = (
        "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging"
    )
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2508.03121"
    merged_prefix: ClassVar[bool] = True
