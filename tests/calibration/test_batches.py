"""Every batch belongs to one expert, and every token of every expert is in one place of one."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq_gptq.calibration.batches import plan_inputs
from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.sources import RowSource
from epmq_gptq.calibration.text import TokenRules
from epmq_gptq.errors import EPMQInputError

END = 2


class Tokenizer:
    padding_side, pad_token_id, eos_token_id = "right", 0, END


class FromTheLeft(Tokenizer):
    padding_side = "left"


RULES, LEFT = TokenRules(Tokenizer()), TokenRules(FromTheLeft())
ROWS = {"a": [[1] * 5, [2] * 9, [3] * 5], "b": [[4] * 7, [5] * 7, [6] * 2, [7] * 7, [8] * 7]}


def encoded(calibration, **options):
    return RULES.encode(read_calibration(calibration, list(calibration), **options))


def planned(calibration, *, pads_left=False, **options):
    return plan_inputs(calibration, LEFT if pads_left else RULES, **options)


def visible(batch):
    """The rows of a batch without what its mask hides."""
    return [i[m].tolist() for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_rows_of_other_lengths_are_padded_and_hidden():
    plan = planned(encoded({"a": [[5, 6], [7, 8, 9]]}), batch_size=2)
    (batch,) = plan.batches
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["input_ids"].dtype == torch.long and batch["attention_mask"].dtype == torch.bool
    (left,) = planned(encoded({"a": [[5, 6], [7, 8, 9]]}), batch_size=2, pads_left=True).batches
    assert left["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert visible(left) == visible(batch)


@pytest.mark.parametrize(
    ("sort", "lengths"),
    [(None, [7, 7, 2, 7, 7]), ("asc", [2, 7, 7, 7, 7]), ("desc", [7] * 4 + [2])],
)
def test_rows_are_sorted_within_their_expert_only(sort, lengths):
    plan = planned(encoded(ROWS), batch_size=1, sort=sort)
    assert plan.experts == ["a"] * 3 + ["b"] * 5
    assert [batch["input_ids"].shape[1] for batch in plan.batches[3:]] == lengths
    sevens = [row[0] for batch in plan.batches[3:] for row in visible(batch) if len(row) == 7]
    assert sevens == [4, 5, 7, 8]  # in their own order


def test_without_padding_only_rows_of_one_length_share_a_batch():
    plan = planned(encoded(ROWS), batch_size=3, pad=False)
    assert [tuple(batch["input_ids"].shape) for batch in plan.batches] == [
        (1, 9), (2, 5), (3, 7), (1, 7), (1, 2),
    ]  # fmt: skip
    assert all(bool(batch["attention_mask"].all()) for batch in plan.batches)


def test_a_model_that_takes_no_mask_gets_rows_one_by_one():
    plan = planned(encoded(ROWS), batch_size=8, masked=False)
    assert [list(batch) for batch in plan.batches] == [["input_ids"]] * 8
    assert [batch["input_ids"][0].tolist() for batch in plan.batches[:3]] == ROWS["a"]
    assert plan.tokens == {"a": 19, "b": 30}


@pytest.mark.parametrize("options", [{"pad": False}, {"masked": False}])
def test_hidden_tokens_are_refused_where_some_layers_see_no_mask(options):
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}
    calibration = encoded({"a": [row]})
    assert visible(planned(calibration, batch_size=1).batches[0]) == [[5, 7]]
    with pytest.raises(EPMQInputError, match="hides tokens inside of 1 rows") as refused:
        planned(calibration, batch_size=1, **options)
    assert refused.value.code == "EPMQ-F32"


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_batch_size_is_checked(batch_size):
    with pytest.raises(EPMQInputError, match=r"`batch_size` should be a positive integer"):
        planned(encoded(ROWS), batch_size=batch_size)
    with pytest.raises(EPMQInputError, match=r'`calibration_sort` should be None, "asc" or'):
        planned(encoded(ROWS), batch_size=1, sort="shuffle")


def test_the_plan_keeps_the_counts():
    plan = planned(encoded({"a": {"rows": ROWS["a"], "seqlen": 6}, "b": ROWS["b"]}), batch_size=2)
    assert plan.rows == {"a": 3, "b": 5} and plan.tokens == {"a": 16, "b": 30} and len(plan) == 8
    assert plan.calibration["a"] == {
        "asked": None, "available": 3, "used": 3, "sequences": 3, "blocks": 0, "tokens": 16,
        "cut": 1, "dropped": 0, "blank": 0,
    }  # fmt: skip


# ---- for any rows ------------------------------------------------------------------------------

# Every token tells whose it is: expert i has 1000 i + 10 ... 1000 i + 999.
experts_rows = st.lists(
    st.lists(st.lists(st.integers(10, 999), min_size=1, max_size=12), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
).map(
    lambda experts: {
        f"expert{i}": [[1000 * i + token for token in row] for row in rows]
        for i, rows in enumerate(experts)
    }
)
batching = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "sort": st.sampled_from([None, "asc", "desc"]),
        "pad": st.booleans(),
        "pads_left": st.booleans(),
    }
)


def seen(plan):
    """Expert → how often each token came, under the mask."""
    tokens = {name: Counter() for name in plan.rows}
    for expert, batch in zip(plan.experts, plan.batches, strict=True):
        for row in visible(batch):
            tokens[expert].update(row)
            assert all(token == END or f"expert{token // 1000}" == expert for token in row)
    return tokens


def counted(rows):
    return Counter(token for row in rows for token in row)


@settings(max_examples=100, deadline=None)
@given(experts_rows, batching, st.none() | st.integers(1, 12))
def test_every_token_lands_at_its_expert_exactly_once(rows, batching, seqlen):
    given = {name: {"rows": each, "seqlen": seqlen} for name, each in rows.items()}
    plan = planned(encoded(given), **batching)
    tokens = seen(plan)
    for name, each in rows.items():
        assert tokens[name] == counted(row[:seqlen] for row in each)
        counts = plan.counts[name]
        assert counts.cut == sum(seqlen is not None and len(row) > seqlen for row in each)
        assert (counts.used, counts.sequences) == (len(each), len(each))
        assert plan.rows[name] == len(each) and plan.tokens[name] == tokens[name].total()
    for batch in plan.batches:
        assert batch["input_ids"].shape[0] <= batching["batch_size"]
        assert batching["pad"] or bool(batch["attention_mask"].all())


@settings(max_examples=100, deadline=None)
@given(experts_rows, batching, st.integers(1, 12), st.none() | st.integers(1, 6), st.integers(0, 3))
def test_every_token_is_in_one_block_or_counted_as_left_over(rows, batching, length, samples, seed):
    given = {
        name: RowSource(rows=each, concat=True, seqlen=length, samples=samples, seed=seed)
        for name, each in rows.items()
    }
    streams = {name: sum(map(len, each)) + len(each) - 1 for name, each in rows.items()}
    if any(stream // length < (samples or 1) for stream in streams.values()):
        with pytest.raises(EPMQInputError) as refused:
            encoded(given)
        assert refused.value.code == "EPMQ-F24"
        return
    plan = planned(encoded(given), **batching)
    for name, tokens in seen(plan).items():
        counts = plan.counts[name]
        assert counts.tokens == tokens.total() == counts.blocks * length
        assert counts.blocks == samples if samples else counts.blocks == streams[name] // length
        inputs = counted(rows[name])
        assert all(token == END or tokens[token] <= inputs[token] for token in tokens)
        assert counts.used <= len(rows[name]) and tokens[END] < max(counts.used, 1) + 1
        if samples is None:
            # What was read is in the blocks or left over, and nothing else is.
            assert counts.tokens + counts.dropped == streams[name]
    assert all(batch["input_ids"].shape[1] == length for batch in plan.batches)


@settings(max_examples=50, deadline=None)
@given(experts_rows, st.integers(0, 2**40), st.integers(1, 8))
def test_a_draw_takes_as_many_as_asked_for_or_says_that_there_are_fewer(rows, seed, samples):
    given = {name: {"rows": each, "samples": samples} for name, each in rows.items()}
    if min(map(len, rows.values())) < samples:
        with pytest.raises(EPMQInputError) as refused:
            encoded(given, seed=seed)
        assert refused.value.code == "EPMQ-F24"
        return
    drawn = encoded(given, seed=seed)
    for name, each in rows.items():
        assert len(drawn.rows[name]) == samples == drawn.counts[name].asked
        assert not Counter(tuple(row.ids) for row in drawn.rows[name]) - Counter(map(tuple, each))
    assert encoded(given, seed=seed) == drawn
