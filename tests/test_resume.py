"""A run that was broken off goes on at the last layer that it committed, to the same tensors."""

from __future__ import annotations

import pytest
import tiny
import torch
from gptqmodel import CheckpointConfig
from resume_runs import Broken, Run, assert_same, broken_at
from test_architectures import FAMILIES

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.resume.session import PROVEN

LANGUAGE = [name for name in FAMILIES if "tied" not in name]


def language(folder, build, **options) -> Run:
    torch.manual_seed(0)
    merged, experts = tiny.family(folder, experts=2, model=build(layers=3).eval())
    rows = {name: tiny.rows(5 + index, 50, seed=index) for index, name in enumerate(experts)}
    return Run(folder, merged, experts, rows, **options)


def goes_on(run: Run, *places: str) -> list:
    """Break it off at each place, go on, and compare. Returns the two models."""
    whole = run.attempt(resume=None)
    for place in places:
        with broken_at(place), pytest.raises(Broken):
            run.attempt()
    resumed = run.attempt(resume="required")
    assert resumed.epmq_report.attempts == len(places) + 1
    assert_same(run.saved(resumed, "resumed"), run.saved(whole, "whole"))
    return [whole, resumed]


@pytest.mark.parametrize("family", LANGUAGE)
def test_every_language_model(family, tmp_path):
    run = language(tmp_path, FAMILIES[family])
    layers = "h" if family == "gpt2" else "layers"
    whole, resumed = goes_on(run, f"{layers}.1", f"{layers}.2")
    assert whole.model.config.model_type in PROVEN
    before, after = (
        [(m.module, m.excess, m.tokens, m.alpha, m.experts) for m in model.epmq_report.modules]
        for model in (whole, resumed)
    )
    assert before == after and len(before) > 3
