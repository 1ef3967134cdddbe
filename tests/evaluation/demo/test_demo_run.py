"""The demo from end to end, in its tiny version."""

import io
import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.evaluation.demo import DemoOptions, run_demo


def test_quick_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = DemoOptions(
        out=tmp_path / "out" / "quantized",
        cache=tmp_path / "cache",
        quick=True,
        calibration_rows=4,
        evaluation_rows=4,
    )
    screen = io.StringIO()
    result = run_demo(options, Console(file=screen, width=120))
    text = screen.getvalue()
    assert list(result.scores) == [
        *("base", "experts", "merged", "RTN", "GPTQ", "E-PMQ, the paper's", "E-PMQ"),
    ]
    assert all(name in text for name in ("RTN", "GPTQ", "E-PMQ", "sorting"))
    assert "INFO" not in text and "Traceback" not in text
    # Two layers of seven linears, read as packed ones by a process with GPTQModel alone.
    assert result.served.packed == 14 and set(result.served.texts) == set(result.scores["base"])
    saved = json.loads((tmp_path / "out" / "demo_result.json").read_text())
    assert saved["scores"]["E-PMQ"]["code"]["loss"] == result.scores["E-PMQ"]["code"].loss
    assert str(tmp_path) not in json.dumps(saved)
    # The host's log folder went to the scratch folder, not here.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]

    # What became of each expert: a page, and how much is kept.
    page = (options.out / "epmq_report.html").read_text(encoding="utf-8")
    assert all(name in page for name in result.scores["base"]) and str(tmp_path) not in page
    assert "epmq_report.html" in text
    evaluated = json.loads((options.out / "epmq_evaluation.json").read_text())["experts"]
    for name, figures in evaluated.items():
        assert figures["quantized"] == result.scores["E-PMQ"][name].accuracy
        assert figures["expert"] == result.scores["experts"][name].accuracy

    # Its checkpoint describes itself.
    card = ModelCard.load(options.out / "README.md")
    assert all(f"| {name} |" in card.text for name in result.scores["base"])
    assert "Merged with `average`" in card.text
    assert str(tmp_path) not in card.content

    with pytest.raises(EPMQInputError, match="should be new or empty"):
        run_demo(options, Console(file=screen))
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    for wrong, message in (
        ({"bits": 9}, "`bits` should be one of"),
        ({"group_size": 48}, "`group_size` should be one of"),
        ({"alpha": -1.0}, "`alpha` should be"),
        ({"merge_method": "tise"}, "`method` should be one of"),
    ):
        other = replace(options, out=tmp_path / "other", seed=1, **wrong)
        with pytest.raises(EPMQInputError, match=message):
            run_demo(other, Console(file=screen))
    # Refused before any training.
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before
    with pytest.raises(EPMQInputError, match="`awq` cannot go with `quick`"):
        run_demo(replace(options, out=tmp_path / "other", awq=True), Console(file=screen))
