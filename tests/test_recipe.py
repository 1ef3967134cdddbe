"""A recipe checks itself, names what is wrong, and survives being written and read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from epmq_gptq.calibration.sources import RowSource, TaggedSource
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.io.yaml_files import parse_yaml
from epmq_gptq.recipe import MergeStep, Recipe, recipe_help

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
  code: {file: code.txt, unit: paragraph, samples: 64, seqlen: 512}
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
    assert full.merge == MergeStep(
        method="ties", base="org/base@main", parameters={"threshold": 20, "lam": 0.1}, keep="kept"
    )
    assert full.calibration["math"][0] == RowSource(file="math.jsonl")
    assert full.calibration["math"][1].column == "question"
    assert full.calibration["code"] == [
        RowSource(file="code.txt", unit="paragraph", samples=64, seqlen=512)
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
    # Beside other models of theirs `org/name` is an id all the same.
    assert full.source("models/name") == "models/name"
    assert full.source("models/too/deep") == str(tmp_path / "models/too/deep")
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
        ({"version": True}, "`version` should be an integer, got True"),
        ({"experts": {"": "ea"}}, "`experts.` should be a non-empty string, got ''"),
        ({"calibration": "a.txt"}, "`calibration` should map every expert"),
        ({"calibration": {}}, "without rows: a"),
        ({"calibration": {"a": "a.txt", "b": "b.txt"}}, "not an expert: b"),
        ({"calibration": {"a": []}}, "`calibration.a`: it is empty"),
        ({"calibration": {"a": [{}, "b"]}}, "`calibration.a[0]`: exactly one of"),
        (
            {"calibration": {"a": ["a.txt", "data_free"]}},
            "`calibration.a`: it has `data_free` in a",
        ),
        ({"calibration": {"a": 3}}, "`calibration.a` should be a mapping"),
        ({"calibration": {"a": "data_free"}}, "`calibration` is `data_free` for every expert"),
        ({"calibration": {"expert_column": "t"}}, "`calibration`: exactly one of `file`"),
        (
            {"calibration": {"file": "a.jsonl", "expert_column": "t", "data_free": ["b"]}},
            "`data_free` names `b`",
        ),
        ({"quantize": {"data_free": ["a"]}}, "`calibration: {name: data_free}`"),
        ({"quantize": ["bits"]}, "`quantize` should be a mapping, got ['bits']"),
        ({"quantize": {"experts": {}}}, "The experts belong at the top of the recipe"),
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
        ({"method": ""}, "`merge.method` should be a non-empty string"),
        ({"method": "ties", "base": 3}, "`merge.base` should be a non-empty string, got 3"),
        ({"method": "ties", "parameters": [1]}, "`merge.parameters` should be a mapping, got [1]"),
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


def test_a_json_file_is_read_as_carefully(tmp_path):
    file = tmp_path / "recipe.json"
    text = json.dumps(MINIMAL)
    file.write_text(text, encoding="utf-8-sig")  # as Windows writes it
    assert Recipe.from_file(file) == Recipe.from_options(MINIMAL)
    for broken, message in (
        (text[:-1] + ', "merged": "other"}', "`recipe.json`: `merged` is given twice"),
        (text[:-1], "`recipe.json`: not readable as JSON: Expecting"),
        ("[" * 100_000, "not readable as JSON"),
    ):
        file.write_text(broken)
        with pytest.raises(EPMQInputError, match=message) as refused:
            Recipe.from_file(file)
        assert refused.value.code == "EPMQ-O04"


@pytest.mark.parametrize(
    "text", ["1e3", "12e4567", "2024-01-01", "a\x85b", "a\u2028\u2029", "\ufeff", "\r\n x ", "yes"]
)
def test_text_stays_text_in_yaml(text):
    recipe = Recipe.from_options(MINIMAL | {"lineage": {text: text, "list": [text, 1e-5, 1e30]}})
    assert Recipe.from_options(parse_yaml(recipe.to_yaml())) == recipe


def test_a_lineage_can_be_written_into_a_checkpoint():
    lineage = parse_yaml("{date: 2024-01-01, time: 2024-01-01 10:00:00, lam: 1e-1, 1: one}")
    recipe = Recipe.from_options(MINIMAL | {"lineage": lineage})
    assert json.loads(recipe.to_json())["lineage"] == {
        "date": "2024-01-01", "time": "2024-01-01 10:00:00", "lam": 0.1, "1": "one",
    }  # fmt: skip
    for value in (object(), {1, 2}, float("nan"), b"x"):
        with pytest.raises(EPMQInputError, match="`lineage` should be data that JSON can hold"):
            Recipe.from_options(MINIMAL | {"lineage": {"x": value}})


def test_a_name_that_no_file_can_have_is_no_path(tmp_path):
    assert Recipe.from_options(MINIMAL, tmp_path / "none").source("x/" + "y" * 5000)[:2] == "x/"


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(EPMQInputError, match="none.yaml` is not readable: No such file"):
        Recipe.from_file(tmp_path / "none.yaml")


def test_quantize_options_become_a_config(full, tmp_path):
    config = full.config()
    assert (config.bits, config.group_size, config.alpha) == (3, 64, 1e-3)
    assert config.alpha_for("model.layers.0.mlp.down_proj") == 10
    assert config.experts == {"math": "models/math", "code": "org/code@abc"}
    assert config.base is None and config.data_free == []
    full.quantize = {"group_sise": 64}
    with pytest.raises(EPMQInputError, match="`quantize`: `group_sise` .* `group_size`?"):
        full.config()


def test_experts_without_rows_reach_the_config(tmp_path):
    (tmp_path / "base").mkdir()
    options = {
        "merged": "merged",
        "experts": {"a": "ea", "b": "eb"},
        "quantize": {"base": "base"},
    }
    for calibration in (
        {"a": "a.txt", "b": "data_free"},
        {"file": "x.jsonl", "expert_column": "task", "data_free": ["b"]},
    ):
        recipe = Recipe.from_options(options | {"calibration": calibration}, tmp_path)
        assert recipe.data_free == ["b"]
        config = recipe.config()
        assert config.data_free == ["b"] and config.base == str(tmp_path / "base")
        assert Recipe.from_options(recipe.to_options()) == recipe


def test_a_tagged_source_stands_for_all_experts():
    block = {
        "dataset": "org/mix", "expert_column": "task", "samples": 64, "concat": True, "seqlen": 512,
        "experts_by_value": {"gsm8k": "a", 3: "a"}, "other_values": "ignore",
    }  # fmt: skip
    recipe = Recipe.from_options(MINIMAL | {"calibration": block})
    assert recipe.calibration == TaggedSource(**block)
    assert recipe.row_sources == [recipe.calibration] and recipe.data_free == []
    assert recipe.to_options()["calibration"] == block
    assert Recipe.from_options(parse_yaml(recipe.to_yaml())) == recipe


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
    some = {"merged", "  method", "experts", "  samples", "  expert_column", "quantize", "seed"}
    assert some <= set(keys)
    assert all(len(text) > 3 for text in keys.values())


# ---- any recipe --------------------------------------------------------------------------------

words = st.sampled_from(["a", "b", "x.jsonl", "x.parquet", "x.txt", "org/name", "~nobody/x", "\0"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.text()
KEYS = [key.strip() for key, _ in recipe_help()]
keys = st.sampled_from(KEYS) | st.sampled_from(["a", "b"]) | st.integers() | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=12,
)
parts = st.dictionaries(st.sampled_from(KEYS), anything, max_size=6)


@settings(max_examples=150, deadline=None)
@given(anything | parts, parts)
def test_whatever_is_written_is_a_recipe_or_refused(data, changes):
    for options in (data, MINIMAL | changes):
        try:
            recipe = Recipe.from_options(options)
        except EPMQInputError as error:
            assert error.code and error.subject and error.remedy
            assert "\n" not in str(error) and len(str(error)) < 20_000
            continue
        assert Recipe.from_options(recipe.to_options()) == recipe


@settings(max_examples=150, deadline=None)
@given(
    st.text() | st.text(alphabet="!{}[]:-,&*<>|%@`'\"#?\n\t a1~=.") | anything.map(yaml.safe_dump)
)
def test_any_text_is_yaml_or_refused(text):
    try:
        parse_yaml(text)
    except EPMQInputError as error:
        assert error.code == "EPMQ-O04"


@pytest.mark.parametrize(
    "text",
    [
        "!!bool x", "!!int ''", "!!float x", "!!timestamp x", "!!binary aGk=", "!!set {a}", "=",
        "&a {x: *a}", "&a [1, [*a]]", "[" * 5000, "{? [a]: b}",
        "!!python/object/apply:os.system [ls]", "x: " + "9" * 5000, "\0",
    ],
)  # fmt: skip
def test_yaml_that_breaks_its_own_reader_is_refused(text):
    with pytest.raises(EPMQInputError, match="not readable as YAML"):
        parse_yaml(text)


def test_aliases_may_repeat_something_but_not_fill_the_memory():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(EPMQInputError, match="aliases make it far larger than it is"):
        parse_yaml("\n".join(lines))
    # Without aliases any size is fine.
    assert len(parse_yaml("[" + "ab, " * 200_000 + "]")) == 200_000


def test_an_error_shows_little_of_what_is_large():
    bomb = ["lol"] * 9
    for _ in range(11):
        bomb = [bomb] * 9
    for key in ("merged", "experts", "calibration", "quantize", "seed", "dtype", "lineage"):
        with pytest.raises(EPMQInputError) as refused:
            Recipe.from_options(MINIMAL | {key: bomb})
        assert len(str(refused.value)) < 2000


sources = st.fixed_dictionaries(
    {},
    optional={
        "samples": st.integers(1, 10**6),
        "seqlen": st.integers(1, 10**6),
        "concat": st.booleans(),
        "column": st.sampled_from(["text", "Frage"]),
        "seed": st.integers(),
    },
).map(lambda options: {"file": "x.jsonl"} | options)
blocks = st.one_of(
    st.fixed_dictionaries(
        {"a": st.lists(sources, min_size=1, max_size=3), "b": st.just("data_free") | sources}
    ),
    st.builds(
        lambda source, tag: source | tag,
        sources,
        st.fixed_dictionaries(
            {"expert_column": st.text(min_size=1).filter(str.strip)},
            optional={
                "experts_by_value": st.dictionaries(
                    st.text() | st.integers(), st.sampled_from("ab"), max_size=3
                ),
                "other_values": st.sampled_from(["refuse", "ignore"]),
                "data_free": st.sampled_from([["a"], ["b"]]),
            },
        ),
    ),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example({"file": "x.jsonl", "expert_column": "0\x85"}, 0, 1)
@given(blocks, st.integers(), st.integers(1, 64))
def test_a_recipe_survives_being_written_and_read(block, seed, batch_size):
    recipe = Recipe.from_options(
        {
            "merged": "merged",
            "experts": {"a": "ea", "b": "eb"},
            "calibration": block,
            "seed": seed,
            "batch_size": batch_size,
        }
    )
    again = Recipe.from_options(recipe.to_options())
    assert again == recipe and again.to_options() == recipe.to_options()
    assert Recipe.from_options(parse_yaml(recipe.to_yaml())) == recipe
