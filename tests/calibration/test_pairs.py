"""Pairs of texts as calibration: their tokens, what is refused, and the batches."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from epmq_gptq.calibration.batches import plan_inputs
from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.pairs import PairRules
from epmq_gptq.calibration.rows import IMAGES, PAIRS, TEXT, form_of
from epmq_gptq.calibration.text import TokenRules
from epmq_gptq.errors import EPMQInputError, EPMQWarning

END = 29


class Letters:
    """A tokenizer of single letters that ends every text."""

    def __call__(self, text=None, add_special_tokens=True, text_target=None):
        text = text if text_target is None else text_target.upper().lower()
        return {"input_ids": [ord(each) - 96 for each in text] + [END]}


RULES = PairRules(TokenRules(Letters(), None, 30), start=0, pad_id=0)


def encode(rows, rules=RULES, **options):
    return rules.encode(read_calibration({"a": rows}, ["a"], form=PAIRS, **options))


def test_every_form_of_a_pair_gives_the_same_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abc", "target": "b"}) + "\n")
    ids = {"input_ids": [1, 2, 3, END], "labels": [2, END]}
    forms = {
        "pair": [("abc", "b")],
        "mapping": [{"text": "abc", "target": "b", "label": 3}],
        "ids": [ids],
        "tensors": [{name: torch.tensor(value) for name, value in ids.items()}],
        "padded": [{"input_ids": [1, 2, 3, END, 0], "attention_mask": [1, 1, 1, 1, 0],
                    "labels": [2, END, -100, -100]}],
        "pair of ids": [([1, 2, 3, END], [2, END])],
        "file": {"file": str(tmp_path / "a.jsonl")},
        "columns": {"rows": [{"q": "abc", "a": "b"}], "column": "q", "target_column": "a"},
    }  # fmt: skip
    for name, form in forms.items():
        encoded = encode(form)
        assert encoded.rows["a"] == [([1, 2, 3, END], [0, 2])], name
        assert encoded.counts["a"].tokens == 6, name


def test_the_decoder_reads_what_transformers_would_give_it():
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=30,
                      decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config)
    rows = [("abc", "bd"), ("a", "c")]
    rules = PairRules.of(config, Letters())
    batch = plan_inputs(encode(rows, rules), rules, batch_size=2).batches[0]
    labels = torch.tensor([[2, 4, END], [3, END, -100]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    mask = batch["decoder_attention_mask"]
    assert torch.equal(batch["decoder_input_ids"][mask], shifted[mask])
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch["input_ids"].tolist() == [[1, 2, 3, END], [1, END, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]


def test_batches_are_of_one_expert_and_sorted_within_it():
    rows = {"a": [("a", "b"), ("abcd", "b"), ("abc", "b")], "b": [("ab", "cd")]}
    encoded = RULES.encode(read_calibration(rows, list(rows), form=PAIRS))
    plan = plan_inputs(encoded, RULES, batch_size=2, sort="desc")
    assert plan.experts == ["a", "a", "b"]
    assert [batch["input_ids"].shape[1] for batch in plan.batches] == [5, 2, 3]
    assert plan.tokens == {"a": 2 + 5 + 4 + 3 * 2, "b": 3 + 3}
    assert sum(int(b["attention_mask"].sum() + b["decoder_attention_mask"].sum())
               for b in plan.batches) == sum(plan.tokens.values())  # fmt: skip


def test_long_pairs_are_cut_on_both_sides():
    encoded = encode({"rows": [("abcdef", "abcdef"), ("ab", "c")], "seqlen": 4})
    assert encoded.rows["a"][0] == ([1, 2, 3, 4], [0, 1, 2, 3]) and encoded.counts["a"].cut == 1
    short = PairRules(TokenRules(Letters(), 4, 30), start=0, pad_id=0)
    with pytest.warns(EPMQWarning, match="1 of 2 pairs were cut to the model's 4 tokens"):
        encode([("abcdef", "a"), ("ab", "c")], short)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("a text", "should hold a text and its target"),
        ({"text": "abc"}, "there is no `target`"),
        ({"input_ids": [1, 2]}, "there is no `labels`"),
        ({"text": "abc", "target": [1]}, "`target` should be a string"),
        ({"input_ids": [1], "labels": "b"}, "`labels` should be a list of token ids"),
        ({"input_ids": [1], "labels": [-100]}, "`labels` should be a list of token ids"),
        ({"input_ids": [40], "labels": [1]}, "token id 40 has no embedding"),
        ({"input_ids": [1], "labels": [40]}, "token id 40 has no embedding"),
        ({"text": [{"role": "user", "content": "x"}], "target": "b"}, "should be a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, "exactly one of text, input_ids"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1], "labels": [1]}, "hides tokens"),
        ({"text": " ", "target": "b"}, "the row is empty"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(row, cause):
    with pytest.raises(EPMQInputError, match=cause) as caught:
        encode([("a", "b"), row])
    assert "row 1" in str(caught.value) and caught.value.code == "EPMQ-F32"


def test_a_model_must_say_what_its_decoder_starts_with():
    config = T5Config()
    config.decoder_start_token_id = None
    with pytest.raises(EPMQInputError, match="`decoder_start_token_id` should be a token id"):
        PairRules.of(config, None)


def test_options_of_other_rows_are_refused():
    with pytest.raises(EPMQInputError, match="`concat` joins texts"):
        encode({"rows": [("a", "b")], "concat": True, "seqlen": 4})
    with pytest.raises(EPMQInputError, match="`target_column` is for pairs"):
        read_calibration({"a": {"rows": ["x"], "target_column": "y"}}, ["a"], form=TEXT)
    with pytest.raises(EPMQInputError, match="rows of text, the model reads pairs"):
        text = TokenRules(Letters(), None, 30).encode(read_calibration({"a": ["ab"]}, ["a"]))
        plan_inputs(text, RULES, batch_size=1)


def test_the_form_is_that_of_the_model_type():
    assert form_of({"model_type": "t5"}) is PAIRS and form_of(T5Config()) is PAIRS
    assert form_of({"model_type": "clip"}) is form_of({"model_type": "clip_vision_model"}) is IMAGES
    assert form_of({"model_type": "llama"}) is form_of({}) is form_of({"model_type": 3}) is TEXT
