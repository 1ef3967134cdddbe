"""Every family's record against the places that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

import epmq_gptq
from epmq_gptq.calibration.rows import TEXT, form_of
from epmq_gptq.checks.engines.table import MODEL_TYPES, VERSIONS
from epmq_gptq.io.families import FAMILIES, family_of


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_record_is_complete(family):
    definitions = Path(epmq_gptq.__file__).parent / "host" / "definitions"
    assert (definitions / f"{family.name}.py").is_file()
    for model_type in family.model_types:
        assert family_of(model_type) is family
        assert form_of({"model_type": model_type}).name == family.row_form
        assert model_type in MODEL_TYPES["GPTQModel"]
    for each in family.serving:
        assert each.engine in VERSIONS and each.model_type in family.model_types
        assert each.verdict in ("no", "limited")


def test_language_models_have_no_record():
    assert family_of("llama") is None and family_of(None) is None
    assert form_of({"model_type": "llama"}) is TEXT
