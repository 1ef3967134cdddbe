"""Named sets of the options that say what is rounded towards, and the paper's constants."""

from __future__ import annotations

from typing import NamedTuple

# The paper's α (its §5.6 and appendices E, G): of vision and encoder-decoder models, of language
# models, and of any merge made by WUDI.
_SMALL, _LANGUAGE, _WUDI = 0.01, 1.0, 10.0
_SMALL_FAMILIES = ("clip", "clip_vision_model", "t5")


class Profile(NamedTuple):
    """Values for what an ``EPMQConfig`` leaves open.

    Attributes:
        alpha: a number, ``"auto"``, ``"gptq"``, or None for the paper's of the model's family.
        eta, rho, anchor, bias_refit: options of ``EPMQConfig``.
    """

    alpha: float | str | None
    eta: float
    rho: float
    anchor: str
    bias_refit: bool


PROFILES = {
    # By benchmarks/results/ablation.md. Biases (vision8 alone has some) gained nothing there.
    "best": Profile(alpha="auto", eta=1.0, rho=1.0, anchor="identity", bias_refit=False),
    "paper": Profile(alpha=None, eta=0.0, rho=0.0, anchor="identity", bias_refit=False),
    # What is compared with: GPTQ of the merge, with figures per expert.
    "gptq": Profile(alpha="gptq", eta=0.0, rho=0.0, anchor="identity", bias_refit=False),
}


def paper_alpha(model_type: str, merge_method: str | None = None) -> float:
    """The paper's α for a model of transformers' ``model_type`` that ``merge_method`` made."""
    if merge_method is not None and "wudi" in merge_method.lower():
        return _WUDI
    return _SMALL if model_type in _SMALL_FAMILIES else _LANGUAGE
