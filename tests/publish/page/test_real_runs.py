"""From two real runs to the page: the figures are those of the runs, and the card has them."""

from __future__ import annotations

import pytest
import tiny
from runs import run

import epmq_gptq
from epmq_gptq import EPMQConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    merged, experts = tiny.family(folder, experts=2)
    rows = {name: tiny.rows(6, 40, seed=index) for index, name in enumerate(experts)}
    reports = {}
    for profile in ("best", "gptq"):
        config = EPMQConfig(bits=3, group_size=32, experts=experts, profile=profile)
        reports[profile] = run(merged, config, rows, folder / profile)["epmq"]
    return folder, reports


def mean(report, expert, figure):
    """Weighted by the energy of each module's output, as all modules saw the same rows."""
    errors = [module.experts[expert] for module in report.modules]
    total = sum(error.energy for error in errors)
    return sum(getattr(error, figure) * error.energy for error in errors) / total


def test_the_page_of_a_real_run_beside_plain_gptq(runs, tmp_path):
    folder, reports = runs
    page = tmp_path / "page.html"
    result = epmq_gptq.report(folder / "best", baseline=folder / "gptq", out=page)
    figures = {one["name"]: one["figures"] for one in result.to_dict()["experts"]}
    for expert in ("expert0", "expert1"):
        for key, profile, figure in (
            ("merged", "best", "merged"),
            ("rounded", "best", "rounded"),
            ("gptq", "gptq", "rounded"),
        ):
            expected = mean(reports[profile], expert, figure)
            # The baseline's are weighted by the energies of the run, whose inputs are near its own.
            near = 1e-2 if key == "gptq" else 1e-6
            assert figures[expert][key] == pytest.approx(expected, rel=near)
        assert figures[expert]["rounded"] < figures[expert]["gptq"]  # what it is for
    assert "model.layers.1.mlp.down_proj" in page.read_text(encoding="utf-8")


def test_a_checkpoint_of_the_default_is_no_baseline(runs):
    folder, _ = runs
    with pytest.raises(epmq_gptq.EPMQInputError, match="gptq"):
        epmq_gptq.report(folder / "gptq", baseline=folder / "best")


def test_the_card_has_the_error_of_every_expert(runs):
    folder, _ = runs
    card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    part = card[card.index("## Error per expert") :]
    assert "| expert0 | 14 |" in part and "| expert1 | 14 |" in part
    assert str(folder) not in card
