"""Training learns, and its cache holds whole models or none."""

import json
from dataclasses import replace

import pytest
import torch

from epmq_gptq.evaluation.demo.cache import cache_folder, cache_key, trained_models
from epmq_gptq.evaluation.demo.domains import DOMAINS
from epmq_gptq.evaluation.demo.plan import FULL, QUICK
from epmq_gptq.evaluation.demo.rows import domain_rows, train_tokenizer
from epmq_gptq.evaluation.demo.training import new_model, train

TINY = replace(QUICK, base_steps=2, expert_steps=1, train_rows=16)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_loss_decreases(one_thread):
    tokenizer = train_tokenizer(QUICK.vocab_size, max_chars=QUICK.tokenizer_chars)
    rows = domain_rows(tokenizer, "sorting", "train", count=50, length=64, seed=0)
    model = new_model(QUICK, tokenizer)
    losses = train(model, [rows], steps=30, lr=3e-3, batch_size=8, seed="0")
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert not model.training


def test_full_models_are_servable():
    # vLLM's attention takes heads of 32, 64, 128; quantization groups must divide every width.
    for plan in (FULL, QUICK):
        assert plan.hidden_size // plan.heads in (32, 64, 128)
        assert plan.hidden_size % 32 == plan.intermediate_size % 32 == 0


def test_models_are_trained_once(tmp_path, one_thread):
    first = trained_models(TINY, tmp_path)
    again = trained_models(TINY, tmp_path)
    assert first.trained and not again.trained
    assert list(again.experts) == list(DOMAINS)
    for folder in (again.base, *again.experts.values()):
        assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    assert (
        len(again.tokenizer()) == json.loads((again.base / "config.json").read_text())["vocab_size"]
    )
    assert again.parameters == first.parameters > 0


def stub(plan, out, progress):
    for name in ("base", *DOMAINS):
        (out / name).mkdir()
    return 7


def test_a_training_that_dies_leaves_nothing(tmp_path):
    def dies(plan, out, progress):
        (out / "base").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_models(TINY, tmp_path, train=dies)
    assert list((tmp_path / "demo").iterdir()) == []
    assert trained_models(TINY, tmp_path, train=stub).trained


def test_of_two_at_once_the_first_wins(tmp_path):
    def overtaken(plan, out, progress):
        trained_models(TINY, tmp_path, train=stub)  # another process gets there first
        stub(plan, out, progress)
        return 8

    models = trained_models(TINY, tmp_path, train=overtaken)
    assert models.parameters == 7
    assert [p.name for p in (tmp_path / "demo").iterdir()] == [cache_key(TINY)]


def test_retrain_replaces(tmp_path):
    trained_models(TINY, tmp_path, train=stub)

    def other(plan, out, progress):
        stub(plan, out, progress)
        return 9

    assert trained_models(TINY, tmp_path, train=other).parameters == 7
    assert trained_models(TINY, tmp_path, retrain=True, train=other).parameters == 9
    assert [p.name for p in (tmp_path / "demo").iterdir()] == [cache_key(TINY)]


def test_the_key_depends_on_what_decides_the_models():
    assert cache_key(FULL) == cache_key(replace(FULL))
    assert len({cache_key(r) for r in (FULL, QUICK, replace(FULL, seed=1))}) == 3


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EPMQ_GPTQ_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "epmq_gptq"
    monkeypatch.setenv("EPMQ_GPTQ_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
