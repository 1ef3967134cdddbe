"""A recipe checks itself, names what is wrong, and survives being written and read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.options import parse_yaml
from epmq_gptq.recipe import MergeStep, Recipe, recipe_help
from epmq_gptq.rows import RowSource

MINIMAL = {"merged": "merged", "experts": {"a": "ea"}, "calibration": {"a": "a.txt"}}

FULL = """
merge:
  method: ties
  base: org/base@main
  parameters: {threshold: 20, lam: 1e-1}
  keep: kept
experts: {math: models/math, code: org/code@abc}
calibration:
  math:
    - math.jsonl
    - {dataset: org/maths, config: main, split: test, column: question, samples: 128}
  code: {file: code.txt, unit: paragraph, samples: 64, max_tokens: 512}
quantize: {bits: 3, group_size: 64, alpha: 1e-3, alpha_pattern: {down_proj: 10}}
seed: 7
batch_size: 4
dtype: bfloat16
"""


@pytest.fixture
def full(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FULL)
    return Recipe.from_file(tmp_path / "recipe.yaml")


def test_every_key_arrives(full):
    assert full.merge == MergeStep("ties", "org/base@main", {"threshold": 20, "lam": 0.1}, "kept")
    assert full.calibration["math"][0] == RowSource(file="math.jsonl")
    assert full.calibration["math"][1].column == "question"
    assert full.calibration["code"] == [
        RowSource(file="code.txt", unit="paragraph", samples=64, max_tokens=512)
    ]
    assert full.quantize["alpha"] == 1e-3
    assert (full.seed, full.batch_size, full.dtype) == (7, 4, "bfloat16")


def test_yaml_and_json_round_trips(full, tmp_path):
    assert Recipe.from_options(parse_yaml(full.to_yaml())) == full
    assert Recipe.from_options(json.loads(full.to_json())) == full
    (tmp_path / "recipe.json").write_text(full.to_json())
    assert Recipe.from_file(tmp_path / "recipe.json") == full
    assert Recipe.from_options(MINIMAL).to_options() == {
        "version": 1,
        "merged": "merged",
        "experts": {"a": "ea"},
        "calibration": {"a": [{"file": "a.txt"}]},
    }


def test_paths_are_those_of_the_recipes_folder(full, tmp_path):
    (tmp_path / "models").mkdir()
    assert full.place("kept") == tmp_path / "kept"
    assert full.place("/elsewhere/x") == Path("/elsewhere/x")
    assert full.source("models") == str(tmp_path / "models")
    # A typo beside models that are there is no hub id.
    assert full.source("models/typo") == str(tmp_path / "models/typo")
    assert full.source("./org/name") == str(tmp_path / "org/name")
    assert full.source("org/name@main") == "org/name@main"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantise": {}}, "`quantise` is not an option. Did you mean `quantize`?"),
        ({"version": 2}, "`version` should be 1, got 2"),
        ({"merged": None}, "exactly one of `merged` (a model) and `merge`"),
        ({"merge": {"method": "average"}}, "got both"),
        ({"merged": 3}, "`merged` should be a folder or a hub id, got 3"),
        ({"experts": {}}, "`experts` should map at least one name"),
        ({"experts": ["ea"]}, "`experts` should map at least one name"),
        ({"experts": {"a": None}}, "`experts.a` should be a folder or a hub id"),
        ({"calibration": "a.txt"}, "`calibration` should map every expert"),
        ({"calibration": {}}, "without rows: a"),
        ({"calibration": {"a": "a.txt", "b": "b.txt"}}, "not an expert: b"),
        ({"calibration": {"a": []}}, "`calibration.a` is empty"),
        ({"calibration": {"a": [{}, "b"]}}, "`calibration.a[0]`: exactly one of"),
        ({"calibration": {"a": 3}}, "`calibration.a` should be a mapping"),
        ({"quantize": ["bits"]}, "`quantize` should be a mapping of EPMQConfig's options"),
        ({"quantize": {"experts": {}}}, "`quantize.experts`: the experts belong at the top"),
        ({"seed": 1.5}, "`seed` should be an integer, got 1.5"),
        ({"batch_size": 0}, "`batch_size` should be a positive integer, got 0"),
        ({"dtype": "fp32"}, "`dtype` should be one of auto, float32, bfloat16, float16"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(EPMQInputError) as refused:
        Recipe.from_options(MINIMAL | change)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({}, "`merge`: `method` is missing"),
        ({"method": ""}, "`merge`: `method` should be a non-empty string"),
        ({"method": "ties", "base": 3}, "`merge`: `base` should be a non-empty string, got 3"),
        ({"method": "ties", "parameters": [1]}, "`parameters` should be a mapping of options"),
        ({"metod": "ties"}, "`merge`: `metod` is not an option. Did you mean `method`?"),
    ],
)
def test_mistakes_of_the_merge_block_are_named(merge, message):
    options = {key: value for key, value in MINIMAL.items() if key != "merged"}
    with pytest.raises(EPMQInputError) as refused:
        Recipe.from_options(options | {"merge": merge})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merged: a\nmerged: b\n", "line 2: `merged` is given twice"),
        ("experts: {a: x, a: y}\n", "line 1: `a` is given twice"),
        ("experts: [\n", "not readable as YAML"),
        ("- 1\n", "recipe should be a mapping"),
        ("merged: a\n", "`experts` is missing"),
    ],
)
def test_mistakes_of_the_file_are_named(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(EPMQInputError) as refused:
        Recipe.from_file(file)
    assert message in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(EPMQInputError, match="none.yaml` is not readable: No such file"):
        Recipe.from_file(tmp_path / "none.yaml")


def test_quantize_options_become_a_config(full, tmp_path):
    config = full.config()
    assert (config.bits, config.group_size, config.alpha) == (3, 64, 1e-3)
    assert config.alpha_for("model.layers.0.mlp.down_proj") == 10
    assert config.experts == {"math": "models/math", "code": "org/code@abc"}
    full.quantize = {"group_sise": 64}
    with pytest.raises(EPMQInputError, match="`quantize`: `group_sise` .* `group_size`?"):
        full.config()


def test_reading_a_recipe_imports_neither_torch_nor_the_host():
    code = (
        "import sys; import epmq_gptq.cli, epmq_gptq.recipe; "
        "sys.exit(str([m for m in ('torch', 'gptqmodel', 'datasets') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""


ROOT = Path(__file__).parent.parent


def test_every_key_is_documented():
    keys = dict(recipe_help())
    assert {"merged", "  method", "experts", "  samples", "quantize", "seed"} <= set(keys)
    assert all(len(text) > 3 for text in keys.values())
