"""Scores against cases worked out by hand, and the table they are shown in."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from epmq_gptq.evaluation.demo.rows import Row, score
from epmq_gptq.evaluation.demo.table import DemoResult, Score, result_table


class Successor(torch.nn.Module):
    """Always says that token + 1 comes next, with logit ``sure`` against 0 for nine others."""

    sure = 2.0

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 10)
        logits.scatter_(2, ((input_ids + 1) % 10)[..., None], self.sure)
        return SimpleNamespace(logits=logits)


RIGHT = -math.log(math.exp(2) / (math.exp(2) + 9))
WRONG = -math.log(1 / (math.exp(2) + 9))


def test_an_answer_counts_only_if_every_token_of_it_is_right():
    # (2, 4): 5→6 and 6→7 hold. (5, 7): 1→2 holds, 2→9 does not.
    row = Row((3, 5, 6, 7, 1, 2, 9), ((2, 4), (5, 7)))
    found = score(Successor(), [row], pad_id=0)
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx((3 * RIGHT + WRONG) / 4)


def test_what_is_outside_the_spans_does_not_count():
    row = Row((3, 9, 9, 9, 4, 5), ((5, 6),))
    assert score(Successor(), [row], pad_id=0) == Score(pytest.approx(RIGHT), 1.0)


def test_batches_and_padding_change_nothing():
    rows = [Row(tuple(range(n)), ((1, n),)) for n in (3, 6, 4, 9)]
    together = score(Successor(), rows, pad_id=0)
    assert score(Successor(), rows, pad_id=0, batch_size=1) == Score(
        pytest.approx(together.loss), together.accuracy
    )


@pytest.fixture
def result():
    scores = {"code": Score(1.0, 0.1), "prose": Score(2.0, 0.2)}
    scores |= {"arithmetic": Score(3.0, 0.3), "sorting": Score(4.0, 0.4)}
    names = ("base", "experts", "merged", "RTN", "GPTQ", "E-PMQ")
    return DemoResult(scores=dict.fromkeys(names, scores), settings={"bits": 3, "group_size": 32})


def test_average(result):
    assert result.average("RTN") == Score(2.5, pytest.approx(0.25))


def test_the_table_shows_every_row_and_number(result):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result_table(result))
    text = console.export_text()
    for piece in (
        "base",
        "each expert, own domain",
        "RTN",
        "GPTQ",
        "E-PMQ",
        "3 bits",
        "2.500 · 25.0",
    ):
        assert piece in text
    assert len(max(text.splitlines(), key=len)) <= 110


def test_the_result_is_plain_data(result):
    result.checkpoint = None
    assert json.loads(json.dumps(result.to_dict()))["averages"]["RTN"]["loss"] == 2.5
