"""What a merged model reads, and its calibration in that form: text, images or pairs of texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .image_rows import ImageRules
from .pair_rows import PairRules
from .row_forms import IMAGES, PAIRS, RowForm, form_of
from .tokens import TokenRules

Rules = TokenRules | ImageRules | PairRules


def input_form(model: Any) -> RowForm:
    """The form of the rows of a model that GPTQModel loaded."""
    return form_of(model.model.config)


def input_rules(model: Any) -> Rules:
    """What a model that GPTQModel loaded asks of its inputs; its weights may still be on disk.

    Raises:
        EPMQInputError: its image processor cannot be loaded, or its configuration lacks something.
    """
    form, config = input_form(model), model.model.config
    if form is IMAGES:
        rules = ImageRules.of(config, Path(str(model.model_local_path)), model.tokenizer)
        # A text tower that is not quantized needs no texts, whatever the rows hold.
        reads_text = getattr(model, "reads_text", False)
        return replace(rules, needs_text=True) if reads_text else replace(rules, text=None)
    return PairRules.of(config, model.tokenizer) if form is PAIRS else TokenRules.of(model)


def folder_rules(folder: Path) -> Rules:
    """The same of a model's folder, without the model.

    Raises:
        EPMQInputError: as :func:`input_rules`, or the configuration cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    tokenizer = None
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    form = form_of(config)
    if form is IMAGES:
        return ImageRules.of(config, folder, tokenizer)
    if form is PAIRS:
        return PairRules.of(config, tokenizer)
    return TokenRules.of_config(config, tokenizer)
