"""The lists of models against the packages that are installed; vLLM's in tests/serving."""

from __future__ import annotations

import re

from epmq_gptq.checks.engines.rules import _BLOCKS
from epmq_gptq.checks.engines.table import ARCHITECTURES, MODEL_TYPES


def test_gptqmodel_knows_what_the_list_says():
    from gptqmodel.models.auto import MODEL_MAP

    import epmq_gptq

    epmq_gptq.install()  # adds its models

    missing = set(MODEL_MAP) - MODEL_TYPES["GPTQModel"]
    gone = MODEL_TYPES["GPTQModel"] - set(MODEL_MAP)
    assert not missing and not gone, (missing, gone)


def test_names_are_names():
    for names in ARCHITECTURES.values():
        assert len(names) > 200 and "LlamaForCausalLM" in names and "Qwen3MoeForCausalLM" in names
        assert all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names)
        assert not any("T5" in name for name in names)


def test_blocks_are_those_of_the_installed_optimum():
    from optimum.gptq.constants import BLOCK_PATTERNS

    assert list(_BLOCKS) == BLOCK_PATTERNS
