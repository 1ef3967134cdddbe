"""What a merge records of itself, and what can be read back from it."""

import json

import pytest
from merging_models import make_models, save_models

from epmq_gptq.commands.draft import Given, draft_of_merge
from epmq_gptq.merging import RECORD_NAME, merge, merge_methods
from epmq_gptq.merging.lineage import read_lineage

# Two computations bear the name TIES, and the record tells them apart.
TRIMS = {"ties": "whole model", "ties_per_tensor": "per tensor"}
PARAMETERS = {"wudi": {"iterations": 1}, "ties_per_tensor": {"weights": {"a": 0.5, "b": 2}}}


@pytest.mark.parametrize(
    "method", sorted(n for n, about in merge_methods().items() if not about["needs_calibration"])
)
def test_the_record_says_which_merge_it_was(tmp_path, method):
    base, experts = make_models(2)
    base_path, paths = save_models(tmp_path, base, experts)
    place = tmp_path / "merged"
    merge(method, base=base_path, experts=paths, out=place, parameters=PARAMETERS.get(method))
    record = json.loads((place / RECORD_NAME).read_text())
    assert record.get("trim") == TRIMS.get(method)

    lineage = read_lineage(place)
    assert (lineage.tool, lineage.method) == ("epmq_gptq", method)
    assert lineage.trim == TRIMS.get(method)
    assert lineage.experts == {name: path.name for name, path in paths.items()}
    weighted = method == "ties_per_tensor"
    assert lineage.weights == ({"a": 0.5, "b": 2.0} if weighted else {"a": None, "b": None})
    # The record has no paths; beside the merge the models are found by their names.
    draft = draft_of_merge(str(place), Given())
    assert draft.experts == {name: str(path) for name, path in paths.items()}
    assert draft.base == str(base_path)
    assert draft.uncalibrated == ["a", "b"]
