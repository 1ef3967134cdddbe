"""Every batch belongs to one expert, and every row of every expert is used."""

import pytest
import torch

from epmq_gptq.calibration import plan_calibration
from epmq_gptq.errors import EPMQInputError


def prepare(rows, batch_size):
    """As the host: longest first, batches padded on the right with zeros."""
    ordered = sorted(rows, key=len, reverse=True)
    batches = []
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        width = max(len(row) for row in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(chunk):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


ROWS = {"a": [[1] * 5, [2] * 9, [3] * 5], "b": [[4] * 7, [5] * 7, [6] * 2, [7] * 7, [8] * 7]}


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_never_mix_experts_and_no_row_is_lost(batch_size, pad):
    plan = plan_calibration(ROWS, ["b", "a"], prepare, batch_size=batch_size, pad=pad)
    seen = {"a": [], "b": []}
    for expert, batch in zip(plan.experts, plan.batches, strict=True):
        assert batch["input_ids"].shape[0] <= batch_size
        if not pad:
            assert bool((batch["attention_mask"] == 1).all())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen[expert].append(ids[mask.bool()].tolist())
    assert {name: sorted(rows) for name, rows in seen.items()} == {
        name: sorted(rows) for name, rows in ROWS.items()
    }
    assert plan.experts == sorted(plan.experts, reverse=True)  # the given order: b, then a
    assert plan.rows == {"b": 5, "a": 3} and plan.tokens == {"b": 30, "a": 19}
    assert len(plan) == 8


@pytest.mark.parametrize("keep_end", [False, True])
def test_rows_longer_than_the_context_are_cut_and_counted_aloud(keep_end):
    rows = {"a": [list(range(1, 10)), [7] * 5, list(range(1, 8))]}

    def padded(given, batch_size):
        batches = prepare(given, batch_size)
        if not keep_end:
            return batches
        return [{key: tensor.flip(1) for key, tensor in batch.items()} for batch in batches]

    with pytest.warns(UserWarning, match=r"expert `a`: 2 of 3 rows were cut to the model's 6"):
        plan = plan_calibration(rows, ["a"], padded, batch_size=2, context=6, keep_end=keep_end)
    assert plan.cut == {"a": 2} and plan.tokens == {"a": 6 + 6 + 5}
    assert all(batch["input_ids"].shape[1] <= 6 for batch in plan.batches)
    longest = plan.batches[0]["input_ids"][0].tolist()
    assert longest == ([6, 5, 4, 3, 2, 1] if keep_end else [1, 2, 3, 4, 5, 6])


def test_generators_are_read_once():
    plan = plan_calibration({"a": (row for row in ROWS["a"])}, ["a"], prepare, batch_size=2)
    assert plan.rows == {"a": 3}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([["x"]], r"should map every expert's name to its rows"),
        ({"a": ROWS["a"]}, r"without rows: \['b'\]"),
        (ROWS | {"c": [[1]]}, r"unknown: \['c'\]"),
        (ROWS | {"a": []}, r"expert `a` is empty"),
        (ROWS | {"a": "text"}, r"expert `a` should be a list of rows, got str"),
        (ROWS | {"b": [[], []]}, r"expert `b`: 2 rows gave 2 usable ones with 0 tokens"),
    ],
)
def test_what_cannot_be_attributed_is_refused(calibration, message):
    with pytest.raises(EPMQInputError, match=message):
        plan_calibration(calibration, ["a", "b"], prepare, batch_size=2)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_batch_size_is_checked(batch_size):
    with pytest.raises(EPMQInputError, match=r"`batch_size` should be a positive integer"):
        plan_calibration(ROWS, ["a", "b"], prepare, batch_size=batch_size)


def test_trouble_of_the_tokenizer_names_the_expert():
    def broken(rows, batch_size):
        raise ValueError("unsupported calibration example")

    with pytest.raises(EPMQInputError, match=r"expert `a`: unsupported calibration example"):
        plan_calibration(ROWS, ["a", "b"], broken, batch_size=1)
