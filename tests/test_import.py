"""``import epmq_gptq`` is light, and what makes GPTQModel know us."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KNOWN = """
from gptqmodel.models import auto
from gptqmodel.models.base import BaseQModel
print(
    "t5" in auto.MODEL_MAP and "clip_vision_model" in auto.SUPPORTED_MODELS,
    getattr(BaseQModel._quantize_with_calibration, "_epmq", False),
)
"""


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_package_alone_imports_neither_torch_nor_the_host():
    found = python("import epmq_gptq; print(sorted({'torch', 'gptqmodel'} & set(sys.modules)))")
    assert found == "[]"


@pytest.mark.parametrize(
    "way",
    [
        "from epmq_gptq import EPMQConfig; from gptqmodel import GPTQModel",
        "import epmq_gptq; epmq_gptq.install()",
        "import gptqmodel; import epmq_gptq",
        "import epmq_gptq.host.model_linears; from epmq_gptq import load_clip",
    ],
)
def test_what_makes_gptqmodel_know_us(way):
    assert python(way + "\n" + KNOWN) == "True True"
