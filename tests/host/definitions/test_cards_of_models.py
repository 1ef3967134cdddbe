"""The code in a card is right: every block of it runs, and loads the model that the card is of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import clip_models
import pytest
import t5_models
import tiny
from huggingface_hub import ModelCard

from epmq_gptq import EPMQConfig

ROOT = Path(__file__).parents[3]
EXAMPLE = "path/or/hub-id"
LOADED = """
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
modules = getattr(model, "model", model).modules()
print("LAYERS", sum(isinstance(layer, BaseQuantLinear) for layer in modules))
"""


def llama(folder):
    merged, experts = tiny.family(folder, experts=2, model=tiny.llama(layers=1))
    return merged, experts, {name: tiny.rows(4, 40, seed=1) for name in experts}, 7


def t5(folder):
    merged, experts = t5_models.family(folder, layers=1)
    rows = {name: t5_models.pairs(4, 16, 8, seed=1) for name in experts}
    return merged, experts, rows, 18


def clip(folder):
    merged, experts = clip_models.family(folder)
    return merged, experts, {name: clip_models.images(4, seed=1) for name in experts}, 12


def run(code, folder, reader):
    """What code printed that a user runs in a new process."""
    if "epmq_gptq" not in code:
        return reader.run(code, folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, code + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("family", "blocks", "task"),
    [(llama, 2, "text-generation"), (t5, 2, None), (clip, 1, "image-feature-extraction")],
)
def test_the_code_of_a_card_runs(reader, tmp_path, family, blocks, task):
    merged, experts, rows, layers = family(tmp_path / "private")
    (merged / "README.md").write_text("---\nlicense: mit\n---\n# Of the merge\n")
    for folder in experts.values():
        (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1))
    model.quantize(rows)
    model.save(str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.pipeline_tag == task
    assert "Of the merge" not in text and "private" not in text and str(tmp_path) not in text
    assert f"| quantized layers | {layers} |" in text

    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == blocks
    for block in found:
        code = block.replace(f'snapshot_download("{EXAMPLE}")', repr(str(tmp_path / "out")))
        code = code.replace(f'"{EXAMPLE}"', repr(str(tmp_path / "out")))
        assert EXAMPLE not in code
        printed = run(code + LOADED, tmp_path, reader)
        assert f"LAYERS {layers}\n" in printed
