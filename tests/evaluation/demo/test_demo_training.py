"""Training learns, and its folder is reused when it is complete."""

import json
from dataclasses import replace

import pytest

from epmq_gptq.evaluation.demo.domains import DOMAINS
from epmq_gptq.evaluation.demo.rows import domain_rows, train_tokenizer
from epmq_gptq.evaluation.demo.train import (
    FULL,
    QUICK,
    cache_folder,
    folder_name,
    made_once,
    new_model,
    one_thread,
    train,
    trained_models,
)

TINY = replace(QUICK, base_steps=2, expert_steps=1, train_rows=16)


def test_the_loss_decreases():
    tokenizer = train_tokenizer(QUICK.vocab_size, max_chars=QUICK.tokenizer_chars)
    rows = domain_rows(tokenizer, "sorting", "train", count=50, length=64, seed=0)
    model = new_model(QUICK, tokenizer)
    with one_thread():
        losses = train(model, [rows], steps=30, lr=3e-3, batch_size=8, seed="0")
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert not model.training


def test_full_models_are_servable():
    # vLLM's attention takes heads of 32, 64, 128; quantization groups must divide every width.
    for plan in (FULL, QUICK):
        assert plan.hidden_size // plan.heads in (32, 64, 128)
        assert plan.hidden_size % 32 == plan.intermediate_size % 32 == 0


def test_models_are_trained_once(tmp_path):
    first = trained_models(TINY, tmp_path)
    again = trained_models(TINY, tmp_path)
    assert first.trained and not again.trained
    assert list(again.experts) == list(DOMAINS)
    for folder in (again.base, *again.experts.values()):
        assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    config = json.loads((again.base / "config.json").read_text())
    assert config["vocab_size"] <= TINY.vocab_size
    assert again.parameters == first.parameters > 0


def test_a_folder_that_is_not_complete_is_made_again(tmp_path):
    folder = tmp_path / "models"

    def dies(out):
        (out / "half").write_text("x")
        raise KeyboardInterrupt

    def made(out):
        (out / "whole").write_text("x")
        return {"parameters": 7}

    with pytest.raises(KeyboardInterrupt):
        made_once(folder, dies)
    facts, now = made_once(folder, made)
    assert now and facts["parameters"] == 7 and not (folder / "half").exists()
    assert made_once(folder, dies) == (facts, False)
    assert made_once(folder, lambda out: {"parameters": 8}, again=True)[0]["parameters"] == 8
    assert not (folder / "whole").exists()


def test_the_name_depends_on_what_decides_the_models():
    assert folder_name("demo", FULL) == folder_name("demo", replace(FULL))
    assert len({folder_name("demo", r) for r in (FULL, QUICK, replace(FULL, seed=1))}) == 3


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EPMQ_GPTQ_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "epmq_gptq"
    monkeypatch.setenv("EPMQ_GPTQ_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
