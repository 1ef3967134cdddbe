"""The three suites in their quick versions: what they are made of, their cache, their scores."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from epmq_gptq.calibration.batches import plan_for_folder
from epmq_gptq.calibration.row_forms import form_of
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.suites import SPLITS, SUITES, build, build_suite, pairs, pictures, vision
from epmq_gptq.suites.__main__ import load

TASKS = {"vision8": 8, "text4": 4, "seq2seq4": 4}
CLASS = {
    "vision8": transformers.CLIPVisionModelWithProjection,
    "text4": transformers.LlamaForCausalLM,
    "seq2seq4": transformers.T5ForConditionalGeneration,
}


def rows_of(suite, task: str, split: str, count: int) -> list[bytes]:
    """What of each item no other split may have: the picture, the question, the tokens."""
    if suite.kind == "images":
        return [pixels.numpy().tobytes() for pixels in suite._items(task, split, count)[0]]
    if suite.kind == "pairs":
        return [question.encode() for question, _ in suite._items(task, split, count)]
    return [repr(row.ids).encode() for row in suite._rows(task, split, count)]


# ---- what is built -----------------------------------------------------------------------------


def test_they_are_what_their_names_say(suites):
    assert set(SUITES) == set(suites) == set(TASKS)
    for name, suite in suites.items():
        assert (suite.name, len(suite.tasks)) == (name, TASKS[name])
        assert tuple(suite.experts) == suite.tasks and suite.quick and suite.seed == 0


def test_every_model_is_a_checkpoint_of_its_own(suite):
    weights = {}
    for folder in (suite.base, *suite.experts.values()):
        config = json.loads((folder / "config.json").read_text())
        assert form_of(config).name == suite.kind
        assert config["architectures"] == [CLASS[suite.name].__name__]
        weights[folder.name] = load_file(folder / "model.safetensors")
        # GPTQModel's groups divide every width.
        linear = [t for n, t in weights[folder.name].items() if n.endswith("_proj.weight")]
        assert all(t.shape[1] % 32 == 0 for t in linear)
    base = weights.pop("base")
    names = [name for name, tensor in base.items() if tensor.ndim == 2]
    for task, expert in weights.items():
        assert expert.keys() == base.keys()
        # Fully fine-tuned: no matrix of the base is left as it was.
        frozen = [n for n in names if "lm_head" not in n and torch.equal(expert[n], base[n])]
        assert not [n for n in frozen if "position" not in n], task
    first, second, *_ = weights.values()
    assert any(not torch.equal(first[name], second[name]) for name in names)


def test_the_folders_hold_what_reads_their_rows(suite):
    if suite.kind == "images":
        processor = AutoImageProcessor.from_pretrained(suite.base)
        images, _ = zip(*_first(pictures.pictures("shapes", "calibration", 0), 4), strict=True)
        made = processor(images=list(images), return_tensors="pt")["pixel_values"]
        ours = torch.stack([row["pixel_values"] for row in suite.calibration(4)["shapes"]])
        assert torch.allclose(made, ours, atol=1e-6)
    else:
        tokenizer = AutoTokenizer.from_pretrained(suite.experts[suite.tasks[0]])
        ids = tokenizer("sort: cab")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "sort: cab"
        assert (ids[-1] == tokenizer.eos_token_id) == (suite.kind == "pairs")


def _first(source, count: int) -> list:
    return [next(source) for _ in range(count)]


# ---- the cache ---------------------------------------------------------------------------------


def test_what_is_cached_is_not_trained_again(suites, suite_cache, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("trained again")

    for name, (kind, plan, _) in build._KNOWN.items():
        monkeypatch.setitem(build._KNOWN, name, (kind, plan, refuse))
        assert build_suite(name, quick=True, cache=suite_cache, device="cpu") == suites[name]
        with pytest.raises(AssertionError, match="trained again"):
            build_suite(name, quick=True, cache=suite_cache, device="cpu", seed=1)
    # The training that failed has left nothing.
    entries = sorted(path.name for path in (suite_cache / "suites").iterdir())
    assert entries == sorted(suite.folder.name for suite in suites.values())


@pytest.fixture
def counted(monkeypatch, suites):
    """seq2seq4, whose training copies what was trained before; a list of its trainings."""
    calls = []
    kind, plan, _ = build._KNOWN["seq2seq4"]

    def train(plan, out, *others):
        calls.append(out)
        shutil.copytree(suites["seq2seq4"].folder, out, dirs_exist_ok=True)

    monkeypatch.setitem(build._KNOWN, "seq2seq4", (kind, plan, train))
    return calls


def test_a_broken_entry_is_made_again(counted, tmp_path):
    def built():
        return build_suite("seq2seq4", quick=True, cache=tmp_path, device="cpu")

    whole = built().folder
    assert len(counted) == 1 and built().folder == whole and len(counted) == 1
    (whole / build.FACTS).unlink()
    shutil.rmtree(whole / "sort")
    again = built()
    assert len(counted) == 2
    assert (again.experts["sort"] / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "suites").iterdir()] == [whole.name]


def test_every_seed_and_size_has_an_entry_of_its_own(counted, tmp_path):
    def folder(**options):
        return build_suite("seq2seq4", cache=tmp_path, device="cpu", **options).folder

    options = ({}, {"seed": 1}, {"quick": True}, {"quick": True, "seed": 1})
    assert len({folder(**each) for each in options}) == len(counted) == len(options)


def test_one_seed_gives_the_same_weights(suites, tmp_path):
    again = build_suite("seq2seq4", quick=True, cache=tmp_path, device="cpu")
    for task, folder in again.experts.items():
        expected = load_file(suites["seq2seq4"].experts[task] / "model.safetensors")
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), task


def test_the_seed_reaches_data_and_heads(suite):
    other = dataclasses.replace(suite, seed=1)
    for task in suite.tasks:
        assert rows_of(suite, task, "train", 5) != rows_of(other, task, "train", 5)
    if suite.kind == "images":
        mine, its = (vision.class_embeddings(vision.VisionPlan(seed=seed)) for seed in (0, 1))
        assert all(not torch.allclose(mine[task], its[task]) for task in suite.tasks)


# ---- rows --------------------------------------------------------------------------------------


def test_no_row_of_a_split_is_in_another(suite):
    for task in suite.tasks:
        found = {split: set(rows_of(suite, task, split, 150)) for split in SPLITS}
        assert all(len(rows) > 20 for rows in found.values()), task
        everything = set().union(*found.values())
        assert len(everything) == sum(map(len, found.values())), task


def test_no_document_or_question_of_a_split_is_in_another(suites):
    digits = pictures._digit_images()
    for digit in range(10):
        parts = [{image.tobytes() for image in digits[split, digit]} for split in SPLITS]
        assert all(parts) and len(set().union(*parts)) == sum(map(len, parts))
    seen = {}
    for split in SPLITS:
        for task in pairs.TASKS:
            for question, _ in _first(pairs.questions(task, split, 0), 200):
                assert seen.setdefault(question, split) == split
    assert len(seen) > 2000


@pytest.mark.parametrize("task", pairs.TASKS)
def test_answers_are_right(task):
    solve = {
        "sort": lambda word: "".join(sorted(word)),
        "reverse": lambda word: "".join(reversed(word)),
        "next": lambda word: word.translate(str.maketrans(pairs._LETTERS[:-1], pairs._LETTERS[1:])),
        "count": lambda word: "".join(str(word.count(letter)) for letter in "abcd"),
    }[task]
    for question, answer in _first(pairs.questions(task, "evaluation", 3), 50):
        prefix, word = question.split(": ")
        assert prefix == task and answer == solve(word)


def test_calibration_is_what_quantization_reads(suite):
    rows = suite.calibration(5)
    assert list(rows) == list(suite.tasks) and all(len(each) == 5 for each in rows.values())
    plan = plan_for_folder(suite.base, rows, suite.tasks, batch_size=2)
    assert plan.experts == [task for task in suite.tasks for _ in range(3)]
    assert {name: count for name, count in plan.rows.items()} == dict.fromkeys(rows, 5)
    model = load(suite.base)
    for batch in plan.batches[:2]:
        with torch.inference_mode():
            model(**batch)
    again, other = suite.calibration(5), suite.calibration(5, seed=1)
    assert all(_same(rows[task], again[task]) for task in rows)
    assert not any(_same(rows[task], other[task]) for task in rows)
    # More of the same seed are the same and more.
    assert all(_same(rows[task], suite.calibration(7)[task][:5]) for task in rows)


def _same(left, right) -> bool:
    return repr(left) == repr(right) and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))
        for a, b in zip(left, right, strict=True)
        for key in a
        if not isinstance(a[key], str)
    )


# ---- what is refused ---------------------------------------------------------------------------


def test_what_does_not_exist_is_refused(suite, tmp_path):
    model = load(suite.base)
    with pytest.raises(EPMQInputError, match="`tasks`.*got 'chess'"):
        suite.evaluate(model, ["chess"])
    with pytest.raises(EPMQInputError, match="`split`.*got 'test'"):
        suite.evaluate(model, split="test")
    with pytest.raises(EPMQInputError, match="`suite` should be one of vision8, text4, seq2seq4"):
        build_suite("vision9", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_scikit_learn_is_named(monkeypatch, tmp_path):
    pictures._digit_images.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EPMQInputError, match="scikit-learn") as caught:
        build_suite("vision8", quick=True, cache=tmp_path, device="cpu")
    assert "epmq-gptq[suites]" in caught.value.remedy
    assert list((tmp_path / "suites").iterdir()) == []
