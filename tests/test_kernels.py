"""The reference kernels, and that they are found from a checkout and from a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from epmq_gptq.kernels.gram import torch_gram_update

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 17), (129, 64), (1000, 33)])
def test_gram_update_adds_the_float64_gram(tokens, width, dtype):
    generator = torch.Generator().manual_seed(tokens)
    X = torch.randn(tokens, width, generator=generator).to(dtype)
    H = torch.randn(width, width, generator=generator)
    expected = H.double() + X.double().T @ X.double()
    torch_gram_update(H, X)
    scale = (X.double() ** 2).sum(0).sqrt()
    error = (H.double() - expected).abs() / (scale[:, None] * scale[None, :]).clamp_min(1e-3)
    assert float(error.max()) < 4e-6


def test_the_folder_never_shadows_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_wheel_holds_the_kernels(tmp_path):
    source = tmp_path / "source"  # setuptools builds inside the folder it is given
    for folder in ("epmq_gptq", "kernels"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert "epmq_gptq/kernels/gram.py" in names
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "epmq_gptq").rglob("*.py")}
    assert ours <= names
    assert not any(name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)
