"""The three suites in their quick versions: what they are made of, and their scores."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from suites import SPLITS, SUITES, build, build_suite, pairs, pictures, vision
from transformers import AutoImageProcessor, AutoTokenizer

from epmq_gptq.calibration.batches import plan_for_folder
from epmq_gptq.calibration.rows import form_of
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.evaluation import load_model

TASKS = {"vision8": 8, "text4": 4, "seq2seq4": 4}
CLASS = {
    "vision8": transformers.CLIPVisionModelWithProjection,
    "text4": transformers.LlamaForCausalLM,
    "seq2seq4": transformers.T5ForConditionalGeneration,
}


def load(folder):
    return load_model(folder, device="cpu").module


@pytest.fixture(scope="module")
def scores(suites):
    """Suite → (scores of the base, of each expert on its own task)."""
    found = {}
    for name, suite in suites.items():
        own = {}
        for task, folder in suite.experts.items():
            own |= suite.evaluate(load(folder), [task])
        found[name] = suite.evaluate(load(suite.base)), own
    return found


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


# ---- training ----------------------------------------------------------------------------------


def test_what_is_trained_is_not_trained_again(suites, suite_cache, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("trained again")

    for name, (kind, plan, _) in build._KNOWN.items():
        monkeypatch.setitem(build._KNOWN, name, (kind, plan, refuse))
        assert build_suite(name, quick=True, cache=suite_cache, device="cpu") == suites[name]
        for other in ({"seed": 1, "quick": True}, {"quick": False}):
            with pytest.raises(AssertionError, match="trained again"):
                build_suite(name, cache=suite_cache, device="cpu", **other)


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


def test_a_missing_scikit_learn_is_named(monkeypatch, tmp_path):
    pictures._digit_images.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EPMQInputError, match="scikit-learn") as caught:
        build_suite("vision8", quick=True, cache=tmp_path, device="cpu")
    assert "epmq-gptq[suites]" in caught.value.remedy


# ---- scores, against plain loops ----------------------------------------------------------------


def test_every_expert_is_better_at_its_task_than_the_base(suite, scores):
    base, own = scores[suite.name]
    assert list(base) == list(own) == list(suite.tasks)
    for task in suite.tasks:
        assert own[task].loss < base[task].loss, task
        assert 0 <= own[task].accuracy <= 100 and 0 < own[task].loss < 20
        assert own[task].items == base[task].items >= 20
    if suite.name != "seq2seq4":  # whose quick version answers next to nothing exactly

        def total(scores) -> float:
            return sum(score.accuracy for score in scores.values())

        assert total(own) > total(base)


def test_scores_of_images_are_those_of_a_plain_loop(suites, scores):
    suite = suites["vision8"]
    task = "colours"
    model = load(suite.experts[task])
    pixels, labels = suite._items(task, "evaluation", scores["vision8"][1][task].items)
    head = load_file(suite.folder / vision.HEADS)[task]
    assert torch.allclose(head.norm(dim=-1), torch.ones(len(head)))
    right, losses = 0, []
    with torch.inference_mode():
        for image, label in zip(pixels, labels, strict=True):
            embedding = model(pixel_values=image[None]).image_embeds
            logits = vision.LOGIT_SCALE * F.cosine_similarity(embedding, head)
            right += int(logits.argmax() == label)
            losses.append(float(logits.logsumexp(0) - logits[label]))
    found = scores["vision8"][1][task]
    assert found.accuracy == pytest.approx(100 * right / len(labels))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_scores_of_texts_are_those_of_a_plain_loop(suites, scores):
    suite, found = suites["text4"], scores["text4"][1]["prose"]
    model = load(suite.experts["prose"])
    right, losses = 0, []
    for row in suite._rows("prose", "evaluation", 8):
        with torch.inference_mode():
            logits = model(torch.tensor([row.ids])).logits[0]
        for place, token in enumerate(row.ids[1:]):
            losses.append(float(F.cross_entropy(logits[place], torch.tensor(token))))
            right += int(logits[place].argmax() == token)
    assert found.items == len(losses)
    assert found.accuracy == pytest.approx(100 * right / len(losses))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_scores_of_pairs_are_those_of_generated_answers(suites, monkeypatch):
    """One pass over an answer finds exactly whether greedy generation gives it."""
    suite = suites["seq2seq4"]
    tokenizer = AutoTokenizer.from_pretrained(suite.base)
    model = load(suite.experts["count"])
    # The quick model is wrong nearly always, so that for some of the questions its own answer is
    # the wanted one, and for others that without its last letter: then only the end is wrong.
    items, right, losses = [], 0, []
    for number, (question, answer) in enumerate(suite.items("count", "evaluation")):
        asked = tokenizer(question, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**asked, max_new_tokens=32, do_sample=False)[0]
            own = tokenizer.decode(ids, skip_special_tokens=True)
            wanted = (answer, own, own[:-1])[number % 3]
            labels = tokenizer(wanted, return_tensors="pt")["input_ids"]
            losses.append((float(model(**asked, labels=labels).loss), labels.numel()))
        items.append((question, wanted))
        right += own == wanted and int(ids[-1]) == tokenizer.eos_token_id
    assert 5 <= right <= len(items) - 5
    monkeypatch.setattr(pairs.Seq2Seq4, "items", lambda *arguments: items)
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    for size in (1, 7, 64):
        found = suite.evaluate(model, ["count"], batch_size=size)["count"]
        assert found.accuracy == pytest.approx(100 * right / len(items))
        assert found.loss == pytest.approx(expected, rel=1e-4)


def test_batches_devices_and_modes_change_nothing(suite):
    model = load(suite.base).train()
    task = suite.tasks[0]
    one, many = (suite.evaluate(model, [task], batch_size=size)[task] for size in (3, 64))
    assert model.training
    assert one.accuracy == many.accuracy and one.loss == pytest.approx(many.loss, rel=1e-5)
    held_out = suite.evaluate(model, [task], split="held_out")[task]
    assert held_out.items > 0 and held_out.loss != many.loss


def test_half_precision_is_scored(suite, scores):
    task = suite.tasks[-1]
    found = suite.evaluate(load(suite.base).to(torch.bfloat16), [task])[task]
    assert found.loss == pytest.approx(scores[suite.name][0][task].loss, rel=0.05)
