"""Rows become the merged model's tokens: cut, joined and counted, never across experts."""

import json

import pytest
from row_files import write

from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.encoded import RowCounts
from epmq_gptq.calibration.sources import RowSource
from epmq_gptq.calibration.text import TokenRow, TokenRules
from epmq_gptq.errors import EPMQInputError, EPMQWarning


class Bytes:
    """A tokenizer of one token per character, with a token before each text."""

    chat_template = None
    padding_side = "right"
    eos_token_id = 2
    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens
        return {"input_ids": [1, *map(ord, text)]}


class Chat(Bytes):
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and not add_generation_prompt
        if messages[0]["role"] != "user":
            raise RuntimeError("a user should begin\nand not another.")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class FromTheLeft(Bytes):
    padding_side = "left"


def encode(calibration, tokenizer=None, *, experts=("a",), context=None, vocabulary=None, **read):
    rules = TokenRules(tokenizer or Bytes(), context, vocabulary)
    return rules.encode(read_calibration(calibration, list(experts), **read))


def ids(encoded, name="a"):
    assert all(row.mask is None for row in encoded.rows[name])
    return [row.ids for row in encoded.rows[name]]


def test_texts_chats_and_ids_become_the_same_rows():
    plain = encode({"a": [[1, *map(ord, "<user>hi")]]})
    for row in (
        "<user>hi",
        {"text": "<user>hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ):
        assert encode({"a": [row]}, Chat()) == plain


def test_long_rows_are_cut_and_counted(tmp_path):
    rows = [
        {"text": "abc"},
        {"text": "abcdef"},
        {"input_ids": [1, 2, 3, 4, 5, 6], "attention_mask": [1, 0, 1, 1, 1, 1]},
        {"input_ids": [1, 2, 3, 4, 5, 6], "attention_mask": [1, 1, 1, 1, 0, 1]},
    ]
    file = write(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    encoded = encode({"a": {"file": file, "seqlen": 4}}, folder=tmp_path)
    assert encoded.rows["a"] == [
        TokenRow([1, *b"abc"]),
        TokenRow([1, *b"abc"]),
        TokenRow([1, 2, 3, 4], [1, 0, 1, 1]),
        TokenRow([1, 2, 3, 4]),
    ]
    assert encoded.counts["a"] == RowCounts(None, 4, 4, 4, tokens=15, cut=3)
    assert encoded.tokens == {"a": 15}


def test_the_models_context_cuts_aloud():
    rows = {"a": ["abcdef", "ab", "abcd"]}
    assert encode(rows, context=7).counts["a"].cut == 0
    with pytest.warns(EPMQWarning, match=r"expert `a`: 2 of 3 rows .* model's 3 tokens") as heard:
        encoded = encode(rows, context=3)
    assert ids(encoded) == [[1, 97, 98]] * 3 and encoded.counts["a"].cut == 2
    assert [warning.message.code for warning in heard] == ["EPMQ-F25"]
    with pytest.warns(EPMQWarning):
        assert ids(encode(rows, FromTheLeft(), context=3))[0] == [*b"def"]


def test_a_cut_that_was_asked_for_is_quiet(recwarn):
    assert encode({"a": {"rows": ["abcdef"], "seqlen": 3}}, context=3).counts["a"].cut == 1
    assert not recwarn


def test_a_file_is_cut_at_a_default_and_given_rows_are_not(tmp_path):
    file = write(tmp_path / "long.txt", "a" * 3000)
    assert encode({"a": file}, folder=tmp_path).tokens == {"a": 2048}
    assert encode({"a": ["a" * 3000]}).tokens == {"a": 3001}


@pytest.mark.parametrize(
    ("rows", "tokenizer", "code", "message"),
    [
        ([[5, 256]], Bytes(), "EPMQ-F32", "row 0: token id 256 has no embedding"),
        (["ok", "\u2028"], Bytes(), "EPMQ-F32", "row 1: the row is empty"),
        (
            ["ok", "ł"],
            Bytes(),
            "EPMQ-F05",
            "row 1: the merged model's tokenizer makes token id 322",
        ),
        ([[{"role": "user", "content": "x"}]], Bytes(), "EPMQ-F32", "row 0: .* no chat template"),
        ([[{"role": "tool", "content": "x"}]], Chat(), "EPMQ-F32", "row 0: .* a user should begin"),
        (
            [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]],
            Chat(),
            "EPMQ-F32",
            "row 0: .* takes no `content` in parts",
        ),
        (["a", "cut \ud83d"], Bytes(), "EPMQ-F32", "row 1: the text has half of a character"),
        (["x"], lambda text, add_special_tokens: {"input_ids": []}, "EPMQ-F32", "makes no token"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused(rows, tokenizer, code, message):
    with pytest.raises(EPMQInputError, match=message) as refused:
        encode({"a": rows}, tokenizer, vocabulary=256)
    assert refused.value.code == code
    assert "calibration of expert `a`" in str(refused.value)


def test_text_needs_a_tokenizer_and_ids_do_not():
    sets = read_calibration({"a": [[1, 2]]}, ["a"])
    assert TokenRules().encode(sets).tokens == {"a": 2}
    with pytest.raises(EPMQInputError, match="no tokenizer to read text with"):
        TokenRules().encode(read_calibration({"a": ["x"]}, ["a"]))


# ---- blocks ------------------------------------------------------------------------------------


def blocks(rows, length, tokenizer=None, context=None, vocabulary=None, **options):
    source = RowSource(rows=rows, concat=True, seqlen=length, **options)
    return encode({"a": source}, tokenizer, context=context, vocabulary=vocabulary)


def test_rows_are_joined_with_the_end_of_text_and_cut_into_equal_blocks():
    encoded = blocks([[5, 6, 7], [8, 9], [4], [3] * 4], 5)
    assert ids(encoded) == [[5, 6, 7, 2, 8], [9, 2, 4, 2, 3]]
    assert encoded.counts["a"] == RowCounts(None, 4, 4, 2, blocks=2, tokens=10, dropped=3)


def test_a_row_that_ends_with_the_end_of_text_gets_no_second_one():
    assert ids(blocks([[5, 2], [6, 7]], 4)) == [[5, 2, 6, 7]]
    ending = Bytes()
    ending.eos_token_id = None
    assert ids(blocks([[5, 2], [6, 7], [8, 9]], 3, ending)) == [[5, 2, 6], [7, 8, 9]]
    # An end of text that the model has no embedding of separates nothing.
    assert ids(blocks([[1, 0], [1, 0]], 4, vocabulary=2)) == [[1, 0, 1, 0]]


def test_hidden_tokens_are_no_part_of_a_block():
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}
    assert ids(blocks([row, [8]], 4)) == [[5, 7, 2, 8]]


def test_samples_count_blocks_and_the_draw_has_a_seed():
    rows = [[i] * 4 for i in range(3, 43)]
    one, again, other = (blocks(rows, 10, samples=3, seed=s) for s in (0, 0, 1))
    assert one == again != other
    assert len(ids(one)) == 3 and all(len(block) == 10 for block in ids(one))
    counts = one.counts["a"]
    assert (counts.asked, counts.available, counts.blocks, counts.sequences) == (3, 40, 3, 3)
    # 6 rows of 4 and the 5 ends between them are 29; one more end was added for a seventh row.
    assert counts.used == 6 and counts.dropped == 4
    assert len({token for block in ids(one) for token in block} - {2}) == 6


def test_blocks_end_at_their_expert_and_their_source():
    calibration = {
        "a": [RowSource(rows=[[5] * 7], concat=True, seqlen=5), RowSource(rows=[[6] * 2])],
        "b": RowSource(rows=[[7] * 9], concat=True, seqlen=4),
    }
    encoded = encode(calibration, experts="ab")
    assert ids(encoded) == [[5] * 5, [6] * 2] and ids(encoded, "b") == [[7] * 4] * 2
    assert encoded.counts["a"] == RowCounts(None, 2, 2, 2, blocks=1, tokens=7, dropped=2)


def test_a_size_for_all_of_them_joins_every_experts_rows_apart():
    read = dict(experts="ab", concat_size=4)
    encoded = encode({"a": [[5] * 3, [6] * 3], "b": [[7] * 9]}, **read)
    assert ids(encoded) == [[5, 5, 5, 2]] and ids(encoded, "b") == [[7] * 4] * 2
    with pytest.raises(EPMQInputError, match="`calibration_concat_size` should be a positive"):
        encode({"a": [[5] * 3]}, concat_size=0)
    with pytest.raises(EPMQInputError, match="is 4, and `seqlen` of rows is 5"):
        encode({"a": RowSource(rows=[[5] * 9], seqlen=5)}, concat_size=4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"length": 13}, "EPMQ-F24", "one block of 13 tokens, the 2 rows have 11 tokens"),
        ({"length": 4, "samples": 3}, "EPMQ-F24", "asks for 3 blocks .* 11 tokens, which make 2"),
        ({"length": 65, "context": 64}, "EPMQ-F25", "blocks of 65 tokens, the model takes 64"),
    ],
)
def test_blocks_that_cannot_be_made_are_refused(options, code, message):
    with pytest.raises(EPMQInputError, match=message) as refused:
        blocks([[5] * 5, [6] * 5], **options)
    assert refused.value.code == code


def test_a_tables_rows_are_read_only_until_the_blocks_are_full(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["x" * 9 if i % 3 else "" for i in range(90)]})
    read = []
    get = datasets.Dataset.__getitem__

    def counted(self, index):
        read.append(index)
        return get(self, index)

    monkeypatch.setattr(datasets.Dataset, "__getitem__", counted)
    source = RowSource(rows=table, concat=True, seqlen=11, samples=4)
    encoded = encode({"a": source})
    assert ids(encoded) == [[1, *b"x" * 9, 2]] * 4 and len(read) < 20
    assert encoded.counts["a"].used == 4


# ---- what the model says -----------------------------------------------------------------------


def test_a_padding_token_without_an_embedding_is_not_used():
    tokenizer = Bytes()
    for pad, used in ((7, 7), (None, 0), (40, 0), (-1, 0)):
        tokenizer.pad_token_id = pad
        assert TokenRules(tokenizer, None, 40).pad_id == used
