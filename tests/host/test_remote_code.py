"""A model's own code runs where the caller said so, and nowhere else."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import transformers
from gptqmodel import GPTQModel
from transformers import dynamic_module_utils

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.evaluation.loading import load_model
from epmq_gptq.host.remote_code import distrusted


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return tiny.family(folder, experts=1, model=tiny.llama(layers=1, hidden=32))


@pytest.fixture
def merged(family, tmp_path, monkeypatch):
    """A merged model with a module of its own, which leaves a mark when it is imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    folder = tmp_path / "with-code"
    folder.mkdir()
    for file in family[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_code(folder, tmp_path / "mark")
    return folder


def write_code(folder, mark):
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaForCausalLM as Own\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_host_alone_runs_it_unasked(merged, tmp_path):
    """What the guard is for; if this fails, the host was mended."""
    from gptqmodel.quantization import QuantizeConfig

    GPTQModel.load(str(merged), QuantizeConfig(), device="cpu")
    assert (tmp_path / "mark").exists()


def test_with_experts_it_is_neither_run_nor_saved(merged, family, tmp_path):
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=family[1]))
    model.quantize({"expert0": tiny.rows(3, 40, seed=1)})
    out = tmp_path / "out"
    model.save(str(out))
    assert not list(out.glob("*.py")) and "auto_map" not in (out / "config.json").read_text()
    # Nor of a quantized checkpoint that is evaluated.
    write_code(out, tmp_path / "mark")
    load_model(out, device="cpu")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "modules").exists()


def test_an_architecture_of_its_own_is_refused(merged, family, tmp_path):
    config = json.loads((merged / "config.json").read_text())
    config |= {"model_type": "own"}
    config["auto_map"]["AutoConfig"] = "modeling_own.Own"
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises((EPMQInputError, ValueError)):
        tiny.load(merged, EPMQConfig(group_size=32, experts=family[1]))
    assert not (tmp_path / "mark").exists()


def test_the_guard_is_of_one_thread_and_ends(merged, tmp_path):
    reference = "modeling_own.Own", str(merged)
    with distrusted():
        with pytest.raises(
            EPMQInputError, match=r"code of its own \(`modeling_own.py`\)"
        ) as caught:
            dynamic_module_utils.get_class_from_dynamic_module(*reference)
        with distrusted(False):
            pass
        with pytest.raises(EPMQInputError):
            dynamic_module_utils.get_class_from_dynamic_module(*reference)
    assert caught.value.code == "EPMQ-F57" and not (tmp_path / "mark").exists()
    assert (
        dynamic_module_utils.get_class_from_dynamic_module(*reference)
        is transformers.LlamaForCausalLM
    )
    assert (tmp_path / "mark").exists()


def test_who_trusts_it_gets_it(merged, family, tmp_path):
    config = EPMQConfig(group_size=32, experts=family[1])
    GPTQModel.from_pretrained(str(merged), config, device="cpu", trust_remote_code=True)
    assert (tmp_path / "mark").exists()
