"""Whatever does not fit a declaration is named: the key, the rule, what was got, the remedy."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.io.declared import Count, Declared, Word, validated


class Step(Declared):
    method: Word = Field(description="merge method")
    weights: dict[str, float] = Field({}, description="how much each model counts")
    pad: Literal["left", "right"] = "left"
    files: str | list[str] | None = None
    rows: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Step:
        if self.rows and not self.files:
            raise EPMQInputError(
                "`rows` needs `files`.", code="EPMQ-O03", subject="`rows`", remedy="Give them."
            )
        return self


class Plan(Declared):
    steps: list[Step]
    by_name: dict[str, Step] = {}


class Foreign(BaseModel):
    count: int = Field(alias="n-rows")


@pytest.mark.parametrize(
    ("step", "code", "message"),
    [
        ({"metod": "ties"}, "O02", "`metod` is not an option. Did you mean `method`?"),
        ({"x": "ties"}, "O02", "`x` is not an option. Known: method, weights, pad, files, rows."),
        ({3: "ties"}, "O02", "`3` is not an option. Known: method"),
        ({}, "O03", "`method` is missing. Give it: merge method."),
        ({"method": " "}, "O01", "`method` should be a non-empty string, got ' '."),
        ({"method": "a", "pad": "top"}, "O01", "`pad` should be one of left, right, got 'top'."),
        ({"method": "a", "rows": True}, "O01", "`rows` should be a positive integer, got True."),
        ({"method": "a", "files": 3}, "O01", "`files` should be a text or a list, got 3."),
        ({"method": "a", "weights": {"m": "1"}}, "O01", "`weights.m` should be a number, got '1'."),
        ({"method": "a", "weights": {"m": float("inf")}}, "O01", "should be a finite number"),
        ({"method": "a", "weights": {"m": 10**400}}, "O01", "`weights.m` should be a number"),
        ({"method": "a", "rows": 3}, "O03", "`rows` needs `files`. Give them."),
        ([1], "O01", "should be a mapping, got [1]."),
    ],
)
def test_a_mistake_is_named(step, code, message):
    with pytest.raises(EPMQInputError) as refused:
        validated(Step, step, "the step")
    assert message in str(refused.value) and str(refused.value).startswith("the step")
    assert refused.value.code == f"EPMQ-{code}" and refused.value.remedy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"steps": [{"metod": "ties"}]}, "`steps[0]`: `metod` is not an option. Did you mean `me"),
        ({"steps": [], "by_name": {"a": {}}}, "`by_name.a`: `method` is missing. Give it: merge"),
        ({"steps": [{"method": "a"}, {"method": 3}]}, "`steps[1].method` should be a non-empty"),
        ({"steps": [{"method": "a", "rows": 3}]}, "`steps[0]`: `rows` needs `files`. Give them."),
        ({"steps": {}}, "`steps` should be a list, got {}"),
        ({"steps": [3]}, "`steps[0]` should be a mapping, got 3"),
    ],
)
def test_a_mistake_inside_is_named_with_its_place(data, message):
    with pytest.raises(EPMQInputError) as refused:
        validated(Plan, data, "`plan.yaml`")
    assert str(refused.value).startswith(f"`plan.yaml`: {message}")


def test_a_call_is_checked_as_a_mapping_is():
    with pytest.raises(EPMQInputError, match="Step: `pad` should be one of left, right"):
        Step(method="ties", pad="top")
    with pytest.raises(EPMQInputError, match="Step: `rows` needs `files`"):
        Step(method="ties", rows=3)
    step = Step(method="ties")
    assert validated(Plan, {"steps": [step, {"method": "ties"}]}, "x").steps == [step, step]


def test_a_file_of_another_program_has_its_own_keys_code_and_remedy():
    assert validated(Foreign, {"n-rows": 3, "more": 4}, "`x.json`").count == 3
    for data, message in (({}, "`n-rows` is missing"), ({"n-rows": "x"}, "`n-rows` should be")):
        with pytest.raises(EPMQInputError, match=message) as refused:
            validated(Foreign, data, "`x.json`", code="EPMQ-F53", remedy="Write it again.")
        assert (refused.value.code, refused.value.remedy) == ("EPMQ-F53", "Write it again.")


def test_what_is_not_a_model_is_checked_as_well():
    assert validated(dict[str, list[int]], {"a": [1]}, "x") == {"a": [1]}
    with pytest.raises(EPMQInputError, match=r"x: `a\[0\]` should be"):
        validated(dict[str, list[int]], {"a": ["b"]}, "x")
