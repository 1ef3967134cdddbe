"""Workers, threads and re-entry: trouble surfaces on the main thread and leaves nothing behind."""

from __future__ import annotations

import threading
import traceback
import warnings

import pytest
import tiny
import torch
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization import gptq_cuda
from gptqmodel.quantization.gptq import GPTQ
from judge import stored
from leftovers import nothing_left

from epmq_gptq import EPMQConfig, EPMQDeviceError, EPMQHostError, EPMQInputError
from epmq_gptq.errors import EPMQWarning
from epmq_gptq.host import door as host
from epmq_gptq.host import loop as layer_loop
from epmq_gptq.host import solver
from epmq_gptq.host.processor import EPMQProcessor
from epmq_gptq.host.task import EPMQ
from epmq_gptq.kernels import exact
from epmq_gptq.method.statistics import GroupStatistics

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    merged, experts = tiny.family(tmp_path_factory.mktemp("family"), experts=2)
    return merged, experts, {n: tiny.rows(3, 40, seed=i) for i, n in enumerate(experts)}


def load(family, **options):
    config = EPMQConfig(group_size=32, experts=family[1], **({"alpha": 0.1} | options))
    return tiny.load(family[0], config)


def raising(error):
    def step(*arguments, **options):
        raise error

    return step


PHASES = {
    "counting": (EPMQProcessor, "_count"),
    "folding": (GroupStatistics, "_fold_sums"),
    "solving": (solver, "solve"),
    "rounding": (GPTQ, "quantize"),
    "packing": (GPTQProcessor, "submodule_finalize"),
}


@pytest.mark.fault(
    "any",
    injected="a `ZeroDivisionError` in each phase in turn: counting, folding, solving, rounding "
    "and packing (the last two on workers of GPTQModel, which end the process at an exception)",
    outcome="it is raised by `quantize`, with a note of the layer and the phase; no hook, patch, "
    "thread, temporary file or changed global is left, and the next run succeeds",
)
@pytest.mark.parametrize("phase", PHASES)
def test_any_exception_surfaces_and_leaves_nothing(family, tmp_path, monkeypatch, phase):
    owner, name = PHASES[phase]
    model = load(family)
    with nothing_left(model, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising(ZeroDivisionError("planted")))
            with pytest.raises(ZeroDivisionError, match="planted") as caught:
                model.quantize(family[2])
        if hasattr(caught.value, "add_note"):
            assert Q_PROJ.rpartition(".")[0] in "".join(traceback.format_exception(caught.value))
    assert not model.quantized


@pytest.mark.fault(
    "F47",
    injected="`RuntimeError: CUDA error: uncorrectable ECC error encountered` raised in the "
    "rounding on a worker (no GPU was lost in this test: the error is a planted one)",
    outcome="error EPMQ-F47 with the layer and the device; the process lives and leaves nothing",
)
def test_a_lost_device_is_said_by_name(family, tmp_path, monkeypatch):
    model = load(family)
    lost = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors …")
    with nothing_left(model, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(GPTQ, "quantize", raising(lost))
            with pytest.raises(EPMQDeviceError, match=r"_proj`: rounding it: .*ECC") as caught:
                model.quantize(family[2])
    assert caught.value.code == "EPMQ-F47"


@pytest.mark.fault(
    "F52",
    injected="two models quantized one after the other in a process, then two at once, each by a "
    "thread of its own",
    outcome="the same bits; runs take turns, for they share GPTQModel's workers",
)
def test_two_models_at_once_give_what_they_give_alone(family, tmp_path, monkeypatch):
    options = {"one": {"alpha": 0.1}, "other": {"alpha": 1.0, "bits": 8}}
    for name, own in options.items():
        model = load(family, **own)
        with nothing_left(model, _empty(tmp_path / f"tmp-{name}"), monkeypatch):
            model.quantize(family[2])
        model.save(str(tmp_path / f"{name}-alone"))
    models = {name: load(family, **own) for name, own in options.items()}
    threads = [threading.Thread(target=m.quantize, args=(family[2],)) for m in models.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, model in models.items():
        model.save(str(tmp_path / f"{name}-at-once"))
        alone, at_once = (stored(tmp_path / f"{name}-{how}") for how in ("alone", "at-once"))
        assert alone.keys() == at_once.keys()
        assert all(torch.equal(alone[key], at_once[key]) for key in alone)


def _empty(folder):
    folder.mkdir()
    return folder


@pytest.mark.fault(
    "F52",
    injected="`quantize` twice on one object",
    outcome="error EPMQ-F52; the result of the first call can still be saved",
)
def test_quantize_twice_is_refused(family, tmp_path):
    model = load(family)
    model.quantize(family[2])
    with pytest.raises(EPMQInputError, match="quantized already"):
        model.quantize(family[2])
    model.save(str(tmp_path / "out"))


@pytest.mark.fault(
    "F48",
    injected="no `nvcc` and no Triton (both said to be missing, for a device named `cuda:0`); a "
    "fast kernel whose sums are wrong",
    outcome="one warning EPMQ-H01 for each, and the reference is used: the same result, later",
)
def test_missing_kernels_are_one_warning(monkeypatch):
    monkeypatch.setattr(gptq_cuda, "block_update_available", lambda: False)
    monkeypatch.setattr(layer_loop, "triton_rounds", lambda device: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with layer_loop._fast_rounding("cuda:0"):
            pass
        way = exact.first_exact([raising(ImportError("no triton"))], print, len, what="Grams")
    assert way is print
    assert [w.message.code for w in caught if w.category is EPMQWarning] == ["EPMQ-H01"] * 2


@pytest.mark.fault(
    "F49",
    injected="GPTQModel 8.0.1 by its version; a private method that lost a parameter or is gone",
    outcome="error EPMQ-F49 before anything else, with the supported versions and what moved",
)
def test_another_host_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(host, "version", lambda package: "8.0.1")
        with pytest.raises(EPMQHostError, match=r"7\.6–7\.7, got 8\.0\.1"):
            host.probe()
    with monkeypatch.context() as patch:
        patch.delattr(GPTQ, "_fallback_quantize")
        with pytest.raises(EPMQHostError, match="no `GPTQ._fallback_quantize`"):
            host.probe()
    patched = EPMQ.hessian_inverse
    monkeypatch.setattr(GPTQ, "hessian_inverse", lambda self: patched)
    with pytest.raises(EPMQHostError, match=r"`GPTQ.hessian_inverse` without \['H'\]"):
        host.probe()
