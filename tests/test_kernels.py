"""The kernels against their references, and that they are found from a checkout and a wheel."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from epmq_gptq.errors import EPMQWarning
from epmq_gptq.kernels import gram
from epmq_gptq.kernels.exact import first_exact
from epmq_gptq.kernels.factor import inverse_factor, torch_inverse_factor
from epmq_gptq.kernels.gram import (
    ROWS,
    gram_agrees,
    gram_update,
    mirror_,
    mixed_gram_update,
    torch_gram_update,
)
from epmq_gptq.kernels.product import (
    cross_update,
    product_agrees,
    split_product_update,
    torch_product_update,
)
from epmq_gptq.kernels.rounding import blocks_agree, torch_block_update

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 as the integers that it keeps them in.
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1), (3, 17), (129, 64), (1000, 33), (70, 200), (2 * ROWS + 5, 900)]
)
def test_gram_update_adds_the_float64_gram_and_mirrors_it(tokens, width, dtype):
    X = random(tokens, width, seed=tokens).to(dtype)
    before = random(width, width)
    before = before + before.T
    expected = before.double() + X.double().T @ X.double()
    norm = X.double().norm(dim=0)
    allowed = 4e-6 * torch.outer(norm, norm) + 1e-6
    reference, H = before.clone(), before.clone()
    torch_gram_update(reference, X)
    gram_update(H, X)
    mirror_(H)
    for got in (reference, H):
        assert bool(((got.double() - expected).abs() <= allowed).all())
    assert torch.equal(H, H.T)


def test_the_lower_triangle_is_neither_read_nor_needed():
    X = random(300, 500)
    H = torch.zeros(500, 500)
    gram_update(H, X)
    other = torch.full((500, 500), 1e9).tril(-1)
    gram_update(other, X)
    assert torch.equal(mirror_(H), mirror_(other))


def test_cross_update_adds_the_float64_product():
    X, Y = random(2 * ROWS + 7, 40), random(2 * ROWS + 7, 30, seed=1)
    C = random(30, 40)
    expected = C.double() + Y.double().T @ X.double()
    cross_update(C, Y, X)
    torch.testing.assert_close(C.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("right", [torch.float32, torch.bfloat16])
def test_split_products_are_as_exact_as_fp32(left, right):
    A, B = random(60, 500).to(left), random(500, 70, seed=1).to(right)
    D = random(60, 70, seed=2)
    # On a CPU the half-precision products are made in fp32, which holds them exactly.
    multiply = None if DEVICE == "cuda" else torch_product_update
    split = functools.partial(split_product_update, multiply=multiply)
    assert product_agrees(split, *(t.to(DEVICE) for t in (D, A, B)))
    expected = D.double() + 0.5 * A.double() @ B.double()
    scaled, reference = D.to(DEVICE), D.clone()
    split(scaled, A.to(DEVICE), B.to(DEVICE), 0.5)
    torch_product_update(reference, A, B, 0.5)
    errors = [(one.cpu().double() - expected).norm() for one in (scaled, reference)]
    assert errors[0] <= 2 * errors[1] + 1e-5


def test_split_products_hand_over_to_an_fp32_sum_in_time():
    """Also in a fold, whose depth is the width of the layer and not a number of rows."""
    depths = []

    def multiply(D, A, B, alpha):
        depths.append(A.shape[1])
        torch_product_update(D, A, B, alpha)

    A, B = random(3, 2 * ROWS + 9), random(2 * ROWS + 9, 5, seed=1)
    split = functools.partial(split_product_update, multiply=multiply)
    assert product_agrees(split, random(3, 5, seed=2), A, B)
    assert depths == 6 * [ROWS] + 6 * [ROWS] + 6 * [9]


def test_a_product_of_single_halves_is_not_exact_enough():
    """What the check is for: bfloat16 alone fails it."""

    def rounded(D, A, B):
        torch_product_update(D, A.bfloat16(), B.bfloat16())

    assert not product_agrees(rounded, random(60, 70), random(60, 500), random(500, 70))
    X = random(500, 64)
    assert not gram_agrees(lambda H, X: torch_gram_update(H, X.half()), torch.zeros(64, 64), X)


@pytest.mark.parametrize("damping", [1.0, 1e-3])
@pytest.mark.parametrize("width", [1, 5, 128, 129, 700])
def test_the_factor_is_that_of_the_inverse(width, damping):
    X = random(2 * width, width).double()
    H = X.T @ X / len(X) + damping * torch.eye(width)
    exact = torch_inverse_factor(H)
    got, reference = inverse_factor(H.float()).double(), torch_inverse_factor(H.float()).double()
    assert torch.equal(got, got.triu())
    assert (got - exact).norm() <= 2 * (reference - exact).norm() + 1e-7 * exact.norm()


def test_an_indefinite_matrix_has_no_factor():
    H = torch.eye(200)
    H[150, 150] = -1.0
    assert inverse_factor(H) is None


# ---- Triton ------------------------------------------------------------------------------------


# On a GPU it is given rows of half precision only: it would round others to 10 bits.
@pytest.mark.parametrize("dtype", HALVES + ([torch.float32] if DEVICE == "cpu" else []))
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (64, 128), (333, 200), (130, 300)])
def test_triton_gram_is_exact(tokens, width, dtype):
    from epmq_gptq.kernels.gram_triton import triton_gram_update

    X, H = random(tokens, width).to(DEVICE, dtype), random(width, width, seed=1).to(DEVICE)
    below = H.tril(-129).clone()
    assert gram_agrees(triton_gram_update, H, X)
    assert torch.equal(H.tril(-129), below)  # tiles below the diagonal are left alone


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_triton_rounds_bit_for_bit_as_the_reference(rows):
    from epmq_gptq.kernels.rounding_triton import triton_block_update

    assert blocks_agree(triton_block_update, DEVICE, rows)


def test_the_check_of_rounding_sees_one_bit():
    def off_by_one_bit(work, *others):
        torch_block_update(work, *others)
        work[3, 127] = torch.nextafter(work[3, 127], torch.tensor(9.0))

    assert blocks_agree(torch_block_update, "cpu")
    assert not blocks_agree(off_by_one_bit, "cpu")


def test_the_reference_rounds_as_the_host_does():
    """Its loop, by way of a layer of 128 columns."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 24, bias=False)
    config = QuantizeConfig(bits=4, group_size=32, desc_act=False, act_group_aware=False)
    host = GPTQ(layer, config)
    host.quantizer.configure(perchannel=True)
    X = random(400, 128)
    H = X.T @ X / 400
    host.H, host.nsamples, host._hessian_dirty = H.clone(), 400, False
    seen = {}
    inverse = GPTQ.hessian_inverse

    def keep(self, given):
        seen["U"], damp = inverse(self, given)
        return seen["U"], damp

    host.hessian_inverse = keep.__get__(host)
    W = layer.weight.detach().clone()
    Q, scale, zero, *_ = host.quantize()
    got = torch.zeros_like(W)
    torch_block_update(
        W.clone(),
        seen["U"],
        scale.T.contiguous().float(),
        zero.T.contiguous().float(),
        torch.arange(128, dtype=torch.int32) // 32,
        got,
        torch.zeros_like(W),
        torch.zeros_like(W),
        15,
    )
    assert torch.equal(got, Q.float())


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_mixed_gram_is_exact_on_this_gpu(dtype):
    X = random(ROWS, 768).to(DEVICE, dtype)
    assert gram_agrees(mixed_gram_update, torch.zeros(768, 768, device=DEVICE), X)


# ---- which kernel ------------------------------------------------------------------------------


def test_the_first_kernel_that_is_exact_is_taken():
    def wrong(x):
        x += 2

    def missing(x):
        raise RuntimeError("no such operator")

    def right(x):
        x += 1

    def also(x):
        x += 1

    def agrees(way):
        x = torch.zeros(1)
        way(x)
        return float(x) == 1

    assert first_exact([wrong, missing, right, also], wrong, agrees, what="tests") is right
    with pytest.warns(EPMQWarning, match="no fast kernel for tests is exact"):
        assert first_exact([wrong, missing], also, agrees, what="tests") is also


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_is_checked_and_leaves_the_users_generator_alone(dtype, monkeypatch):
    """As on a GPU, where torch has the product of halves; here it is missing."""
    gram._on_gpu.cache_clear()
    monkeypatch.setattr(gram, "has_triton", lambda: False)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert gram._on_gpu(dtype, torch.device("cpu")) is gram.triangle_update
    assert len(caught) == (dtype != torch.float32)
    monkeypatch.setattr(gram, "mixed_gram_update", torch_gram_update)
    gram._on_gpu.cache_clear()
    chosen = gram._on_gpu(dtype, torch.device("cpu"))
    assert chosen is (torch_gram_update if dtype != torch.float32 else gram.triangle_update)
    gram._on_gpu.cache_clear()
    assert torch.equal(state, torch.get_rng_state())


def test_the_folder_never_shadows_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_wheel_holds_the_kernels(tmp_path):
    source = tmp_path / "source"  # setuptools builds inside the folder it is given
    for folder in ("epmq_gptq", "kernels"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "troubleshooting.md", source / "docs")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {f"epmq_gptq/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")} <= names
    ours = {str(file.relative_to(ROOT)) for file in (ROOT / "epmq_gptq").rglob("*.py")}
    assert ours <= names
    assets = [*(ROOT / "epmq_gptq").rglob("*.j2"), *(ROOT / "epmq_gptq").rglob("*.json")]
    assert {str(file.relative_to(ROOT)) for file in assets} <= names
    assert not any(name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)
