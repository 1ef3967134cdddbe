"""Architecture families that GPTQModel has no definition of: what must be known, a record each.

A family is this record and a file of its name in ``host/definitions``, which holds the definition.
The record is plain data at the bottom of the package, because calibration, checks and cards need it
without GPTQModel. Causal language models of GPTQModel's own definitions need no record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ServingException(NamedTuple):
    """What an engine makes of a family, whatever its quantization.

    Attributes:
        engine, verdict, source: as of a rule in ``checks/engines/rules.py``.
        model_type: of those of the family, the one that it is true of.
        reason: why, as a clause.
    """

    engine: str
    verdict: str
    source: str
    model_type: str
    reason: str


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: also that of its file in ``host/definitions``.
        model_types: ``model_type`` of config.json.
        row_form: what a calibration row is: "images" or "pairs".
        paper_alpha: the paper's α (arXiv 2605.16882, §5.6).
        towers: whether its layers are in towers that do not read one another.
        inner: of a configuration that holds several models: the key of the one that is quantized,
            and its own ``model_type``.
        optional_prefix: what a checkpoint may put before the tensors' names, or leave out.
        is_proven_to_resume: whether a killed run was seen to go on to equal tensors.
        serving: what engines make of it.
    """

    name: str
    model_types: tuple[str, ...]
    row_form: str
    paper_alpha: float
    towers: bool = False
    inner: tuple[str, str] | None = None
    optional_prefix: str = ""
    is_proven_to_resume: bool = False
    serving: tuple[ServingException, ...] = ()


_NO_T5 = "it has no T5"
_NO_TOWER = "it has no vision tower by itself"
_UNTRIED = "it has CLIP, but nobody has tried it with quantized layers"
_VLLM = "vllm/model_executor/models/registry.py"

FAMILIES = (
    Family(
        "clip",
        ("clip", "clip_vision_model"),
        "images",
        0.01,
        towers=True,
        inner=("vision_config", "clip_vision_model"),
        optional_prefix="vision_model.",
        is_proven_to_resume=True,
        serving=(
            ServingException("vLLM", "no", _VLLM, "clip_vision_model", _NO_TOWER),
            ServingException("vLLM", "limited", _VLLM, "clip", _UNTRIED),
            ServingException("SGLang", "no", "sglang/srt/models/", "clip_vision_model", _NO_TOWER),
            ServingException("SGLang", "limited", "sglang/srt/models/clip.py", "clip", _UNTRIED),
        ),
    ),
    Family(
        "t5",
        ("t5",),
        "pairs",
        0.01,
        is_proven_to_resume=True,
        serving=(
            ServingException("vLLM", "no", _VLLM, "t5", _NO_T5),
            ServingException("SGLang", "no", "sglang/srt/models/registry.py", "t5", _NO_T5),
            ServingException(
                "transformers",
                "no",
                "transformers/models/t5/modeling_t5.py",
                "t5",
                "its T5 initialises weights that packed layers do not have (docs/t5.md has a way)",
            ),
        ),
    ),
)
_OF_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: object) -> Family | None:
    """The family of a ``model_type``; None for the language models that GPTQModel knows."""
    return _OF_TYPE.get(model_type) if isinstance(model_type, str) else None
