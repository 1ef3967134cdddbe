"""What the suites say of a model, against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer

from epmq_gptq.suites import pairs, vision
from epmq_gptq.suites.__main__ import load, result_table


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


def test_the_table_of_a_suite(suites):
    suite = suites["seq2seq4"]
    table = result_table(suite, "held_out")
    labels = list(table.columns[0].cells)
    assert labels[:2] == ["base", "experts"] and "TIES" in labels
    assert len(table.columns) == len(suite.tasks) + 2
    merged = list(table.columns[1].cells)
    # A merge is neither the base nor an expert.
    assert len(set(merged)) >= 3
