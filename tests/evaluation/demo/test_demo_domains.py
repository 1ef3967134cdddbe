"""The demo's text: deterministic, in disjoint splits, and back from tokens unharmed."""

import ast
from itertools import islice

import pytest

from epmq_gptq.evaluation.demo.domains import (
    DOMAINS,
    GENERATED,
    SPLITS,
    documents,
    problems,
    split_of,
)
from epmq_gptq.evaluation.demo.rows import IGNORED, Row, collate, domain_rows, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(400, max_chars=1000)


def rows(tokenizer, domain, split, seed=0):
    return domain_rows(tokenizer, domain, split, count=20, length=64, seed=seed)


@pytest.mark.parametrize("domain", GENERATED)
def test_no_question_is_in_two_splits(domain):
    seen = {s: {p.prompt for p in islice(problems(domain, s, 0), 500)} for s in SPLITS}
    assert all(split_of(prompt) == split for split, found in seen.items() for prompt in found)
    assert not seen["train"] & seen["evaluation"]
    assert not seen["calibration"] & (seen["train"] | seen["evaluation"])


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_no_document_is_in_two_splits(domain):
    found = {split: set(documents(domain, split)) for split in SPLITS}
    assert all(found.values())
    assert not found["train"] & found["evaluation"]
    assert not found["calibration"] & (found["train"] | found["evaluation"])


def test_answers_are_right():
    for problem in islice(problems("arithmetic", "train", 3), 200):
        left, right = problem.prompt.removesuffix("=").split("+")
        assert problem.answer == str(int(left) + int(right))
    for problem in islice(problems("sorting", "train", 3), 200):
        assert problem.answer == "".join(sorted(problem.prompt[len("sort:") : -1]))


def test_code_is_python_without_docstrings():
    for text in documents("code", "evaluation")[:5]:
        assert ast.get_docstring(ast.parse(text)) is None


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_depend_on_the_seed_alone(tokenizer, domain):
    first = rows(tokenizer, domain, "train")
    assert first == rows(tokenizer, domain, "train")
    assert first != rows(tokenizer, domain, "train", seed=1)
    # The host drops rows of ten tokens and fewer.
    assert all(10 < len(row.ids) <= 64 and row.spans for row in first)


def test_tokenizer_round_trip(tokenizer, tmp_path):
    text = 'def f(x):\n    return x + 10  # caf\u00e9 "quoted"\nsort:71352=12357\n'
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert None not in (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id)


def test_digits_stay_single(tokenizer):
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5


def test_a_prompt_has_the_same_tokens_in_a_row_and_when_served(tokenizer):
    row = rows(tokenizer, "arithmetic", "train")[0]
    start, stop = row.spans[0]
    prompt = tokenizer.decode(row.ids[1:start])
    assert prompt.endswith("=")
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == list(row.ids[1:start])
    assert tokenizer.decode(row.ids[start:stop]).endswith("\n")


def test_collate_scores_the_spans_only():
    ids, labels = collate([Row((1, 5, 6, 7), ((2, 4),)), Row((1, 8), ((1, 2),))], pad_id=0)
    assert ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert labels.tolist() == [
        [IGNORED, IGNORED, 6, 7],
        [IGNORED, 8, IGNORED, IGNORED],
    ]
