"""A saved CLIP in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_clip(
    folder: str | Path, *, device: Any = None, dtype: Any = None, **options: Any
) -> torch.nn.Module:
    """The transformers model of a CLIP folder: quantized by any method of GPTQModel, or not.

    ``AutoModel.from_pretrained`` cannot do it: transformers' loader of GPTQ checkpoints accepts
    text models only ("We can only quantize pure text model").

    Args:
        folder: of a ``CLIPVisionModel``, ``CLIPVisionModelWithProjection`` or ``CLIPModel``.
        device: where it runs; without, an accelerator if there is one.
        dtype: of its activations; float16 without. GPTQModel's kernels know no float32.
        options: of ``GPTQModel.load``, such as ``backend``.

    Returns:
        The model of the class that its config.json names, in evaluation mode.

    Raises:
        EPMQInputError: the folder holds another kind of model.
    """
    import torch
    from gptqmodel import GPTQModel

    from ...errors import EPMQInputError
    from ...io.families import family_of
    from ...io.folders import read_json
    from ..door import install
    from ..remote_code import distrusted

    install()
    model_type = read_json(Path(folder), "config.json", "the model").get("model_type")
    family = family_of(model_type)
    if family is None or family.name != "clip":
        raise EPMQInputError(
            f"`load_clip` loads `model_type` clip and clip_vision_model, got {model_type!r}.",
            code="EPMQ-F38",
            subject=f"`{Path(folder).name}`",
            remedy="Load it with `GPTQModel.load`.",
        )
    with distrusted(options.get("trust_remote_code") is not True):
        model = GPTQModel.load(
            str(folder), device=device, dtype=torch.float16 if dtype is None else dtype, **options
        )
    return model.model.eval()
