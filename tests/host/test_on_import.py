"""``import epmq_gptq`` is light, and GPTQModel knows us as soon as both are imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KNOWN = """
from gptqmodel.models import auto
from gptqmodel.models.base import BaseQModel
spec = sys.modules["gptqmodel"].__spec__
print(
    "t5" in auto.MODEL_MAP and "clip_vision_model" in auto.SUPPORTED_MODELS,
    getattr(BaseQModel._quantize_with_calibration, "_epmq", False),
    type(spec.loader).__name__,
    spec._initializing,
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
    "order",
    [
        "import epmq_gptq; from gptqmodel import GPTQModel",
        "import gptqmodel; import epmq_gptq",
        "import epmq_gptq.host.model_linears; from epmq_gptq import EPMQConfig",
    ],
)
def test_whatever_the_order_both_know_each_other(order):
    assert python(order + "\n" + KNOWN) == "True True SourceFileLoader False"
