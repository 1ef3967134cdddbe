"""What a merge left in its folder is read, published without paths, and made into a recipe."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq_gptq.calibration.arguments import parse_calibration
from epmq_gptq.commands.draft import Given, draft_of_merge
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.merging.lineage import read_lineage
from epmq_gptq.recipe import Recipe

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "merged").mkdir()
    return tmp_path / "merged"


def mergekit(folder, configuration) -> Path:
    text = configuration if isinstance(configuration, str) else yaml.safe_dump(configuration)
    (folder / "mergekit_config.yml").write_text(text)
    return folder


def refused(folder, *parts, code="EPMQ-F35"):
    with pytest.raises(EPMQInputError) as caught:
        read_lineage(folder)
    assert caught.value.code == code
    assert caught.value.remedy
    for part in parts:
        assert part in str(caught.value)


TIES = """
models:
  - model: org/base          # the base itself: no parameters
  - model: org/math@v2
    parameters: {density: 0.5, weight: 0.3}
  - model: org/code
    parameters: {density: 0.4, weight: 7e-1}
merge_method: ties
base_model: org/base
parameters: {normalize: true}
dtype: float16
tokenizer_source: base
"""


# ---- mergekit ----------------------------------------------------------------------------------


def test_ties_of_mergekit(folder):
    lineage = read_lineage(mergekit(folder, TIES))
    assert (lineage.tool, lineage.method, lineage.trim) == ("mergekit", "ties", "per tensor")
    assert lineage.base == "org/base"
    assert lineage.experts == {"math": "org/math@v2", "code": "org/code"}
    assert lineage.weights == {"math": 0.3, "code": 0.7}
    assert lineage.parameters == {"normalize": True, "density": {"math": 0.5, "code": 0.4}}
    assert (lineage.dtype, lineage.tokenizer_source) == ("float16", "base")
    assert lineage.notes == []


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        ("org/x@rev", "org/x@rev"),
        ("org/x@rev+org/lora@v1", "org/x@rev+org/lora@v1"),
        ({"path": "org/x", "revision": "rev"}, "org/x@rev"),
        ({"model": {"path": "org/x", "revision": None}, "lora": None}, "org/x"),
        ({"model": "org/x", "lora": {"path": "org/l", "revision": "r"}}, "org/x+org/l@r"),
        ({"model": {"path": "org/x"}, "lora": "org/l"}, "org/x+org/l"),
    ],
)
def test_forms_of_a_model(folder, model, spec):
    models = [{"model": model, "parameters": {"weight": 1}}, "org/other"]
    lineage = read_lineage(mergekit(folder, {"merge_method": "linear", "models": models}))
    assert list(lineage.experts.values()) == [spec, "org/other"]


@pytest.mark.parametrize(
    ("weight", "expected", "note"),
    [
        (0.5, 0.5, None),
        (2, 2.0, None),
        ([0.1, 0.9], None, "the weight of `org/a` differs between layers"),
        ([{"filter": "mlp", "value": 0.1}, {"value": 0.5}], None, "differs between layers"),
        ([{"value": 0.5}], 0.5, None),
        (float("nan"), None, "differs between layers or tensors"),
        ("much", None, "differs between layers or tensors"),
        (None, None, None),
    ],
)
def test_a_weight_is_one_number_or_a_note(folder, weight, expected, note):
    models = [
        {"model": "org/a", "parameters": {"weight": weight}},
        {"model": "org/b", "parameters": {"weight": 1}},
    ]
    lineage = read_lineage(mergekit(folder, {"merge_method": "linear", "models": models}))
    assert lineage.weights == {"a": expected, "b": 1.0}
    assert bool(lineage.notes) == bool(note) and (note or "") in "".join(lineage.notes)


def test_weights_for_all_and_by_model(folder):
    configuration = {
        "merge_method": "linear",
        "models": ["org/a", "org/b", {"model": "org/c", "parameters": {"weight": 3}}],
        "parameters": {"weight": 1},
        "input_model_parameters": {"org/b": {"weight": 2}},
    }
    lineage = read_lineage(mergekit(folder, configuration))
    assert lineage.weights == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert lineage.parameters == {}


def test_what_did_not_help_to_make_the_merge_is_left_out(folder):
    models = [
        {"model": f"org/{name}", "parameters": {"weight": weight}}
        for name, weight in [("a", 1), ("b", 0), ("c", -0.5)]
    ]
    lineage = read_lineage(
        mergekit(
            folder,
            {"merge_method": "task_arithmetic", "base_model": "org/base", "models": models},
        )
    )
    assert lineage.experts == {"a": "org/a"}
    assert lineage.notes == [
        "`org/b` has weight 0 in the merge and is left out",
        "`org/c` was subtracted and is left out",
    ]


AS_MERGEKIT_WRITES_THEM = {
    # examples/gradient-slerp.yml of mergekit, and what its to_yaml() makes of others.
    "slerp": """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "dare_ties": """
models:
- model: org/base
- model:
    model:
      path: org/math
      revision: v2
    override_architecture: LlamaForCausalLM
  parameters: {density: 0.53, weight: [0.4, 0.4]}
- model: org/base+org/lora
  parameters:
    density: 0.6
    weight:
    - {filter: mlp, value: 0.1}
    - {value: 0.6}
merge_method: dare_ties
base_model: {model: {path: org/base}}
parameters: {int8_mask: true, normalize: true}
dtype: float32
out_dtype: bfloat16
chat_template: "{% for m in messages %}---\\n{{ m['content'] }}{% endfor %}"
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: org/math, force: true}
    <|im_end|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
""",
    "task_arithmetic": """---
merge_method: task_arithmetic
slices:
- base_model: org/base
  sources:
  - {model: org/base, layer_range: [0, 4]}
  - {model: org/a, layer_range: [0, 4], parameters: {weight: 0.3}}
  - {model: org/b, layer_range: [0, 4], parameters: {weight: 0.3}}
- base_model: org/base
  sources:
  - {model: org/base, layer_range: [4, 8]}
  - {model: org/b, layer_range: [4, 8], parameters: {weight: 0.3}}
  - {model: org/a, layer_range: [4, 8], parameters: {weight: 0.3}}
parameters: {lambda: 0.9}
tokenizer_source: org/a
---
""",
    "passthrough": "models: [{model: org/base+org/lora}]\nmerge_method: passthrough\n"
    "base_model: org/base\ndtype: bfloat16\n",
}


def test_configurations_as_mergekit_writes_them(folder):
    found = {
        name: read_lineage(mergekit(folder, text)) for name, text in AS_MERGEKIT_WRITES_THEM.items()
    }
    assert found["slerp"].experts == {
        "orca_mini_v3_13b": "psmathur/orca_mini_v3_13b",
        "Platypus2-13B": "garage-bAInd/Platypus2-13B",
    }
    assert set(found["slerp"].weights.values()) == {None} and found["slerp"].base is None
    assert found["slerp"].parameters["t"][1] == {"value": 0.5}
    dare = found["dare_ties"]
    assert dare.base == "org/base"
    assert dare.experts == {"math": "org/math@v2", "lora": "org/base+org/lora"}
    assert dare.weights == {"math": 0.4, "lora": None}
    assert dare.parameters["density"] == {"math": 0.53, "lora": 0.6}
    # DARE drops entries by chance and ranks none.
    assert (dare.trim, dare.dtype, dare.tokenizer_source) == (None, "float32", "union")
    assert dare.described() == "dare_ties (says mergekit)"
    sliced = found["task_arithmetic"]
    assert (sliced.base, sliced.tokenizer_source) == ("org/base", "org/a")
    assert sliced.weights == {"a": 0.3, "b": 0.3} and sliced.parameters == {"lambda": 0.9}
    assert found["passthrough"].experts == {"lora": "org/base+org/lora"}
    assert found["passthrough"].base == "org/base"


def test_slices_have_one_base(folder):
    configuration = slices((0, 8), (8, 16)) | {"merge_method": "ties", "base_model": "org/base"}
    assert read_lineage(mergekit(folder, configuration)).base == "org/base"
    configuration["slices"][1]["base_model"] = "org/other"
    refused(mergekit(folder, configuration), "different models as `base_model`")


def test_slerp_merges_its_base_model_too(folder):
    source = {"layer_range": [0, 32]}
    configuration = {
        "merge_method": "slerp",
        "base_model": "A/left",
        "slices": [{"sources": [{"model": m, **source} for m in ("A/left", "B/right")]}],
        "parameters": {"t": 0.25},
    }
    lineage = read_lineage(mergekit(folder, configuration))
    assert lineage.base is None
    assert lineage.experts == {"left": "A/left", "right": "B/right"}
    assert lineage.weights == {"left": 0.75, "right": 0.25}
    assert "which model they were fine-tuned from is not said" in lineage.notes[0]
    configuration["parameters"]["t"] = [0, 1]
    assert set(read_lineage(mergekit(folder, configuration)).weights.values()) == {None}
    # Without slices only the other end is listed.
    short = {"merge_method": "slerp", "base_model": "A/left", "models": ["B/right"]}
    assert set(read_lineage(mergekit(folder, short)).experts) == {"left", "right"}


def test_a_linear_merge_of_a_base_counts_it(folder):
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in ("org/base", "org/a")]
    configuration = {"merge_method": "linear", "models": models, "base_model": "org/base"}
    lineage = read_lineage(mergekit(folder, configuration))
    assert lineage.base is None and set(lineage.experts) == {"base", "a"}
    configuration["models"] = models[1:]
    lineage = read_lineage(mergekit(folder, configuration))
    assert lineage.base == "org/base" and set(lineage.experts) == {"a"}


def slices(*ranges, models=("org/a", "org/b")):
    return {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": m, "layer_range": list(r), "parameters": {"weight": w}}
                    for m, w in zip(models, (0.5, index + 1), strict=True)
                ]
            }
            for index, r in enumerate(ranges)
        ],
    }


def test_slices_in_place_are_a_merge(folder):
    lineage = read_lineage(mergekit(folder, slices((0, 8), (8, 16))))
    assert lineage.experts == {"a": "org/a", "b": "org/b"}
    assert lineage.weights == {"a": 0.5, "b": None}
    assert lineage.notes == ["the weight of `org/b` differs between slices"]


def stacked(models):
    sources = [[{"model": m, "layer_range": [0, 8]}] for m in models]
    return {"merge_method": "passthrough", "slices": [{"sources": s} for s in sources]}


@pytest.mark.parametrize(
    ("configuration", "parts"),
    [
        (slices((0, 8), (4, 12)), ["`slices[1]` puts layers at other places"]),
        (slices((4, 8)), ["`slices[0]` puts layers at other places"]),
        (stacked(["org/a", "org/a"]), ["`slices[1]` puts layers at other places"]),
        (
            {"merge_method": "passthrough", "models": ["org/a", "org/b"]},
            ["`merge_method: passthrough` takes layers of several models"],
        ),
        (
            {
                "merge_method": "linear",
                "slices": [
                    {"sources": [{"model": "org/a", "layer_range": [0, 4]}]},
                    {"sources": [{"model": "org/b", "layer_range": [4, 8]}]},
                ],
            },
            ["its slices merge different models"],
        ),
        (
            {"base_model": "org/a", "gate_mode": "hidden", "experts": [{"source_model": "org/b"}]},
            ["mergekit-moe", "recipe"],
        ),
        ("name: one\nmerge_method: linear\nmodels: [a/a]\n---\nmerge_method: slerp", ["2 merges"]),
        ({"merge_method": "linear", "modules": {"text": {}}}, ["`modules`"]),
        ({"merge_method": "linear"}, ["either `models` or `slices`"]),
        ({"models": ["org/a"]}, ["`merge_method` is missing"]),
        ({"merge_method": "linear", "models": []}, ["`models` should be a list"]),
        ({"merge_method": "linear", "models": [{"model": None}]}, ["a model has no name"]),
        ({"merge_method": "linear", "models": [{"model": [1]}]}, ["`model` should be a name"]),
        (
            {"merge_method": "ties", "models": ["org/a"], "base_model": "org/a"},
            ["it names no model that was merged"],
        ),
        ("[", ["not readable as YAML"]),
        ("- a", ["it should be a mapping"]),
        ("a: 1\na: 2", ["`a` is given twice"]),
        ("x" * 1_000_001, ["more than 1,000,000 bytes"]),
    ],
)
def test_a_merge_without_experts_is_refused_by_name(folder, configuration, parts):
    refused(mergekit(folder, configuration), "`mergekit_config.yml`", *parts)


def test_a_small_file_cannot_fill_the_memory(folder):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    text = "\n".join([*lines, "merge_method: linear", "models: [org/a]", "parameters: {t: *a11}"])
    refused(mergekit(folder, text), "larger")
    loop = "merge_method: linear\nmodels: [org/a]\nparameters: &p {self: *p}"
    refused(mergekit(folder, loop), "`mergekit_config.yml`")
    refused(mergekit(folder, "[" * 5000), "`mergekit_config.yml`")
    deep = "merge_method: linear\nmodels: [org/a]\nparameters: {t: " + "[" * 30 + "]" * 30 + "}"
    refused(mergekit(folder, deep), "larger or deeper")
    wide = "\n".join([*lines, "merge_method: linear", "models: *a11"])
    refused(mergekit(folder, wide), "`mergekit_config.yml`")


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 300_000 + "merge_method: linear\nmodels: [org/a]",
        yaml.safe_dump(
            {
                "merge_method": "linear",
                "models": [
                    {"model": f"org/m{i}", "parameters": {f"p{i}": 0, f"q{i}": 0}}
                    for i in range(900)
                ],
            }
        ),
    ],
    ids=["empty lines", "parameters"],
)
def test_a_small_file_cannot_take_hours(folder, text):
    start = time.perf_counter()
    try:
        read_lineage(mergekit(folder, text))
    except EPMQInputError as error:
        assert error.code == "EPMQ-F35"
    assert time.perf_counter() - start < 10


# ---- other sources -----------------------------------------------------------------------------


def test_our_own_record_comes_first(folder):
    record = {
        "format": 1,
        "method": "ties_per_tensor",
        "trim": "per tensor",
        "parameters": {"density": 0.2, "weights": {"math": 0.5, "code": 2}, "lam": 1.0},
        "base": {"name": "org/base", "revision": COMMIT, "digest": "d"},
        "experts": {
            "math": {"name": "org/math", "revision": COMMIT, "digest": "d"},
            "code": {"name": "code-expert", "revision": None, "digest": "d"},
        },
    }
    (folder / "epmq_merge.json").write_text(json.dumps(record))
    lineage = read_lineage(mergekit(folder, TIES))
    assert (lineage.tool, lineage.method, lineage.trim) == (
        "epmq_gptq",
        "ties_per_tensor",
        "per tensor",
    )
    assert lineage.base == f"org/base@{COMMIT}"
    assert lineage.experts == {"math": f"org/math@{COMMIT}", "code": "code-expert"}
    assert lineage.weights == {"math": 0.5, "code": 2.0}
    assert lineage.parameters == {"density": 0.2, "lam": 1.0}
    for broken in ("{", "[]", '{"experts": {"a": 1}}', '{"experts": {"a": {}}}', "[" * 9999):
        (folder / "epmq_merge.json").write_text(broken)
        refused(folder, "`epmq_merge.json`")


CARD = """---
base_model:
{models}
tags: [merge]
---
# A merge
```python
print("merge_method: none")
```
"""


def test_a_card_with_the_configuration_is_as_good_as_the_file(folder):
    card = CARD.format(models="- x/y") + f"```yaml\n{TIES}```\n```yaml\nother: 1\n```\n"
    (folder / "README.md").write_text(card)
    assert read_lineage(folder).to_record() == read_lineage(mergekit(folder, TIES)).to_record()
    (folder / "mergekit_config.yml").unlink()
    (folder / "README.md").write_text(card + f"```yaml\n{TIES}```\n")
    refused(folder, "`README.md`", "2 mergekit configurations")


def test_a_card_with_several_stages_is_no_list_of_models(folder):
    card = CARD.format(models="- x/y\n- x/z") + f"```yaml\nname: one\n{TIES}---\n{TIES}```\n"
    (folder / "README.md").write_text(card)
    refused(folder, "`README.md`", "2 merges that build on one another")


def test_a_card_with_a_list_of_models(folder):
    (folder / "README.md").write_text(CARD.format(models="- org/base\n- org/math\n- org/math"))
    lineage = read_lineage(folder)
    assert (lineage.tool, lineage.method) == ("model card", None)
    assert lineage.experts == {"base": "org/base", "math": "org/math"}
    assert "`--base`" in lineage.notes[0]
    draft = draft_of_merge(str(folder), Given(base="org/base"))
    assert (draft.base, draft.experts) == ("org/base", {"math": "org/math"})
    # Under its other name it is the base too.
    draft = draft_of_merge(str(folder), Given(quantize={"base": "org/base"}))
    assert (draft.base, draft.experts) == ("org/base", {"math": "org/math"})
    with pytest.raises(EPMQInputError, match="one base, got 'org/x' beside 'org/y'"):
        draft_of_merge(str(folder), Given(base="org/y", quantize={"base": "org/x"}))


@pytest.mark.parametrize(
    ("front", "parts"),
    [
        ("base_model: org/a", ["names one model"]),
        ("base_model: [org/a]\nbase_model_relation: quantized", ["'quantized', not `merge`"]),
        ("base_model: [1]", ["`base_model` should be a name"]),
        ("base_model: []", ["should be a list of models"]),
        ("license: mit", ["does not say what it was merged from", "--expert"]),
        ("[", ["not readable as YAML"]),
    ],
)
def test_a_card_that_names_no_merge(folder, front, parts):
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    with pytest.raises(EPMQInputError) as caught:
        read_lineage(folder)
    assert caught.value.code == "EPMQ-F35"
    assert all(part in str(caught.value) for part in parts)


def test_one_merged_model_may_stand_alone(folder):
    (folder / "README.md").write_text("---\nbase_model: org/a\nbase_model_relation: merge\n---\n")
    assert read_lineage(folder).experts == {"a": "org/a"}


# ---- arbitrary content -------------------------------------------------------------------------

words = st.sampled_from(
    ["merge_method", "models", "model", "slices", "sources", "layer_range", "parameters", "weight"]
    + ["base_model", "lora", "path", "revision", "experts", "name", "ties", "slerp", "linear"]
    + ["org/a", "org/b@c", "/x/y", "filter", "value", "t", "dtype", "tokenizer", "source", "trim"]
)
leaves = st.one_of(
    words, st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates()
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(words, leaves), inner, max_size=5)
    ),
    max_leaves=20,
)
ranges = st.lists(st.integers(-1, 3), min_size=2, max_size=2)
models = st.one_of(
    words, st.fixed_dictionaries({"model": trees, "layer_range": ranges, "parameters": trees})
)
configurations = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "linear", "slerp", "passthrough"])},
    optional={
        "models": st.lists(models, max_size=3),
        "slices": st.lists(st.fixed_dictionaries({"sources": st.lists(models)}), max_size=2),
        "base_model": st.one_of(words, trees),
        "parameters": st.one_of(st.dictionaries(words, trees, max_size=3), trees),
        "input_model_parameters": trees,
        "dtype": leaves,
        "tokenizer": trees,
    },
)
plain = st.recursive(
    st.one_of(words, st.none(), st.booleans(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner)),
    max_leaves=10,
)
recorded = st.one_of(plain, st.fixed_dictionaries({"name": words}, optional={"revision": plain}))
records = st.fixed_dictionaries(
    {"experts": st.one_of(plain, st.dictionaries(words, recorded, min_size=1))},
    optional={"method": plain, "base": recorded, "parameters": plain, "trim": plain},
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["mergekit_config.yml", "epmq_merge.json", "README.md"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet="-[]{}:#&*!<>|'\"`a1.\n ", max_size=60).map(str.encode),
        st.one_of(trees, configurations).map(lambda data: yaml.safe_dump(data).encode()),
        records.map(lambda data: json.dumps(data).encode()),
    ),
    wrapped=st.sampled_from([b"%s", b"---\n%s\n---\n", b"```yaml\n%s\n```\n"]),
)
def test_whatever_the_files_hold_is_read_or_refused(tmp_path_factory, name, content, wrapped):
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(wrapped.replace(b"%s", content))
    try:
        lineage = read_lineage(folder)
    except EPMQInputError as error:
        assert error.code == "EPMQ-F35" and "\n" not in str(error)
        return
    assert lineage.experts and set(lineage.weights) == set(lineage.experts)
    json.dumps(lineage.to_record(), allow_nan=False)


# ---- from the lineage to a recipe --------------------------------------------------------------


def test_nothing_published_is_a_path(folder):
    models = [
        {"model": "/home/me/models/math", "parameters": {"weight": 1}},
        {"model": "C:\\models\\code", "parameters": {"weight": 0}},
        {"model": "org/x+../lora/chat", "parameters": {"weight": [1, 2]}},
    ]
    configuration = {
        "merge_method": "ties",
        "base_model": "~/base",
        "models": models,
        "parameters": {"path": "/secret/place"},
        "tokenizer_source": "model:/home/me/tok",
    }
    record = read_lineage(mergekit(folder, configuration)).to_record()
    assert record["base"] == "base"
    assert record["experts"] == {"math": "math", "chat": "org/x+chat"}
    assert record["parameters"] == {"path": "place"}
    assert not any(part in json.dumps(record) for part in ("/home", "secret", "models", "~", ".."))


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["org/math@v1", "other/math"], ["math", "math-2"]),
        (["a/math-2", "b/math", "c/math"], ["math-2", "math", "math-3"]),
        (["./exp 1 (α)/", "/x/ü"], ["exp-1", "expert"]),
        (["org/" + "x" * 100], ["x" * 60]),
        (["org/base+org/lora@v1"], ["lora"]),
    ],
)
def test_experts_have_short_unique_names(folder, specs, names):
    lineage = read_lineage(mergekit(folder, {"merge_method": "linear", "models": specs}))
    assert lineage.experts == dict(zip(names, specs, strict=True))


def test_paths_are_looked_up_here_and_beside_the_merge(folder, tmp_path, monkeypatch):
    (tmp_path / "math").mkdir()
    (tmp_path / "elsewhere" / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    models = ["./math", "code", "org/chat", "gone", "/no/such/place"]
    configuration = {"merge_method": "linear", "models": models, "base_model": "./nobase"}
    draft = draft_of_merge(str(mergekit(folder, configuration)), Given())
    assert draft.experts == {
        "math": str(tmp_path / "math"),
        "code": str(tmp_path / "elsewhere" / "code"),
        "chat": "org/chat",
    }
    assert draft.absent == {"gone": "gone", "place": "/no/such/place"}
    assert "the base, `nobase`, is not on this machine and is left out" in draft.notes[0]
    with pytest.raises(EPMQInputError) as caught:
        draft.recipe()
    assert caught.value.code == "EPMQ-F35"
    assert "`gone` (`gone`), `place` (`place`)" in str(caught.value)
    assert "`--expert gone=...` `--expert place=...`" in caught.value.remedy

    given = Given(experts={"gone": "org/gone", "place": "org/place", "more": "org/more"})
    draft = draft_of_merge(str(folder), given)
    assert draft.absent == {}
    with pytest.raises(EPMQInputError) as caught:
        draft.recipe()
    assert caught.value.code == "EPMQ-F21"
    assert "missing for 6 of the 6 experts: `math`, `code`, `chat`, `gone`, `place`, `more`" in str(
        caught.value
    )
    assert "`--calibration math=FILE`" in caught.value.remedy


def full(folder, **changes) -> Given:
    words = ["math={file: m.jsonl, samples: 8}", f"code={folder / 'c.txt'}"]
    options = {"calibration": parse_calibration(words), "quantize": {"bits": 8}, "seed": 3}
    return Given(**options | changes)


def test_the_recipe_holds_what_is_known_and_what_is_said(folder, tmp_path):
    draft = draft_of_merge(str(mergekit(folder, TIES)), full(folder, dtype="float32"))
    recipe = draft.recipe()
    assert recipe.experts == {"math": "org/math@v2", "code": "org/code"}
    assert recipe.source(recipe.merged) == str(folder)
    assert recipe.quantize == {"bits": 8, "base": "org/base"}
    assert (recipe.seed, recipe.dtype) == (3, "float32")
    assert recipe.lineage == read_lineage(folder).to_record()
    assert draft.described() == [
        ("merged", "merged"),
        ("lineage", "ties, trimmed per tensor (says mergekit)"),
        ("base", "org/base"),
        ("expert", "math: org/math@v2, weight 0.3"),
        ("expert", "code: org/code, weight 0.7"),
    ]
    # Written for another folder it is the same recipe.
    (tmp_path / "recipes").mkdir()
    for place in (tmp_path, tmp_path / "recipes"):
        (place / "recipe.yaml").write_text(draft.to_yaml(place))
        again = Recipe.from_file(place / "recipe.yaml")
        assert again.source(again.merged) == str(folder)
        assert again.lineage == recipe.lineage and again.experts == recipe.experts
        assert again.quantize == recipe.quantize
        files = {name: again.place(again.calibration[name][0].file) for name in again.experts}
        assert files == {"math": tmp_path / "m.jsonl", "code": folder / "c.txt"}
    assert f"merged: {folder.name}\n" in (tmp_path / "recipe.yaml").read_text()


def test_what_is_missing_is_a_comment_in_the_file(folder, tmp_path):
    configuration = {"merge_method": "linear", "models": ["org/math", "./gone"]}
    draft = draft_of_merge(str(mergekit(folder, configuration)), Given())
    text = draft.to_yaml(tmp_path)
    assert "# not on this machine: expert gone (./gone)" in text
    assert "  # math: {file: math.jsonl, samples: 128}" in text
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(EPMQInputError, match="`calibration`"):
        Recipe.from_file(tmp_path / "recipe.yaml")
    uncommented = text.replace("\n  # ", "\n  ")
    (tmp_path / "recipe.yaml").write_text(uncommented)
    assert list(Recipe.from_file(tmp_path / "recipe.yaml").calibration) == ["math", "gone"]


def test_a_folder_without_a_word_needs_every_expert_named(folder):
    with pytest.raises(EPMQInputError, match="`merged` does not say what it was merged from"):
        draft_of_merge(str(folder), Given())
    draft = draft_of_merge(
        str(folder), Given(experts={"a": "org/a"}, calibration=parse_calibration(["a=a.txt"]))
    )
    assert draft.lineage is None
    assert draft.recipe().experts == {"a": "org/a"}


def test_a_home_is_looked_up(folder, tmp_path, monkeypatch):
    """As in `--calibration=~/rows.yaml`, where the shell leaves the `~` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "math").mkdir(parents=True)
    (tmp_path / "home" / "rows.yaml").write_text("{math: m.jsonl, code: ~/c.txt}")
    given = Given(
        calibration=parse_calibration(["~/rows.yaml"]),
        experts={"math": "~/math", "code": "~no-such-user/x"},
    )
    draft = draft_of_merge(str(mergekit(folder, TIES)), given)
    home = tmp_path / "home"
    assert draft.calibration == {"math": str(home / "m.jsonl"), "code": str(home / "c.txt")}
    with pytest.raises(EPMQInputError, match="`~no-such-user/x` starts in a home folder"):
        draft.recipe().source("~no-such-user/x")
    assert yaml.safe_load(draft.to_yaml(home))["experts"] == {
        "math": "math",
        "code": "~no-such-user/x",
    }


def test_a_file_with_the_whole_block(folder, tmp_path):
    (tmp_path / "data").mkdir()
    block = {"math": {"file": "m.jsonl"}, "code": ["c.txt", {"dataset": "org/d", "samples": 3}]}
    for content in (block, {"calibration": block}):
        (tmp_path / "data" / "rows.yaml").write_text(yaml.safe_dump(content))
        given = full(folder, calibration=parse_calibration([str(tmp_path / "data" / "rows.yaml")]))
        recipe = draft_of_merge(str(mergekit(folder, TIES)), given).recipe()
        assert recipe.place(recipe.calibration["math"][0].file) == tmp_path / "data" / "m.jsonl"
        assert recipe.place(recipe.calibration["code"][0].file) == tmp_path / "data" / "c.txt"
        assert recipe.calibration["code"][1].dataset == "org/d"


def test_one_source_for_all_experts(folder):
    """In braces as in a file."""
    block = "{dataset: org/d, expert_column: task, column: text, samples: 8}"
    draft = draft_of_merge(
        str(mergekit(folder, TIES)), Given(calibration=parse_calibration([block]))
    )
    assert draft.uncalibrated == []
    assert draft.recipe().calibration.expert_column == "task"
    block = "{math: m.txt, code: {file: a=b.txt}}"
    draft = draft_of_merge(str(folder), Given(calibration=parse_calibration([block])))
    assert draft.calibration["code"] == {"file": str(Path.cwd() / "a=b.txt")}


@pytest.mark.parametrize(
    ("calibration", "code", "parts"),
    [
        (["mth=a.txt"], "EPMQ-F21", ["`mth` is not one of the experts `math`, `code`"]),
        (["math=a.txt", "math=b.txt"], "EPMQ-O01", ["`math` is given twice"]),
        (["math="], "EPMQ-O01", ["`math` has no source"]),
        (["math={file: "], "", ["`--calibration math`: line 1"]),
        (["nowhere.yaml"], "EPMQ-O01", ["`nowhere.yaml` cannot be read: No such file"]),
        (
            ["math=~no-such-user/a.txt"],
            "EPMQ-O01",
            ["`~no-such-user/a.txt` starts in a home folder"],
        ),
        (
            ["~no-such-user/rows.yaml"],
            "EPMQ-O01",
            ["`~no-such-user/rows.yaml` starts in a home folder"],
        ),
        (["rows.yaml", "math=a.txt"], "EPMQ-O01", ["goes alone"]),
        (
            [
                "{math: a.txt",
            ],
            "EPMQ-O04",
            ["`--calibration`: line 1"],
        ),
        (["{mth: a.txt}"], "EPMQ-F21", ["`mth` is not one of the experts"]),
    ],
)
def test_calibration_on_the_command_line_is_checked(folder, calibration, code, parts):
    with pytest.raises(EPMQInputError) as caught:
        draft_of_merge(
            str(mergekit(folder, TIES)), Given(calibration=parse_calibration(calibration))
        )
    assert not code or caught.value.code == code
    assert all(part in str(caught.value) for part in parts)


def test_a_person_is_asked_for_what_is_missing_only(folder, tmp_path):
    (tmp_path / "rows.txt").write_text("1 + 1 = 2")
    configuration = {"merge_method": "linear", "models": ["org/a", "./b"]}
    mergekit(folder, configuration)
    draft = draft_of_merge(str(folder), Given(calibration=parse_calibration(["a=rows.txt"])))
    answers = iter(["/no/such", "org/b", "nowhere.txt", "{samples: 3}", "rows.txt"])
    asked, refusals = [], []

    def question(text, read):
        asked.append(text)
        while True:
            try:
                return read(next(answers))
            except EPMQInputError as error:
                refusals.append(str(error))

    draft.ask(question)
    assert [text.split(" (")[0] for text in asked] == [
        "Folder or hub id of expert `b`",
        "Calibration of expert `b`",
    ]
    assert len(refusals) == 3
    recipe = draft.recipe()
    assert recipe.experts == {"a": "org/a", "b": "org/b"}
    assert recipe.place(recipe.calibration["b"][0].file) == tmp_path / "rows.txt"


def test_reading_a_lineage_is_light():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, epmq_gptq.merging.lineage as l; l.read_lineage;"
         "print([m for m in ('torch', 'gptqmodel', 'transformers') if m in sys.modules])"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
