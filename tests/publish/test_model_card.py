"""The model card: true, complete, valid on a hub, and unmoved by what others call things."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import regret_samples as samples
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from typer.testing import CliRunner

from epmq_gptq import EPMQInputError, cli
from epmq_gptq.publish.card import is_ours, model_card, write_card
from epmq_gptq.publish.markdown import code, plain
from epmq_gptq.publish.upload_plan import check_private

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA = "ab" * 32
HOSTILE = (
    "a|b\n# Owned <script>alert(1)</script> [x](https://evil.example) ![i](//evil.example/i.png) "
    "`code` $$x$$ **b** \u202e --- {{ 7*7 }}"
)


def expert(name="math", source=None, revision=None, **more):
    return {
        "name": name,
        "source": source or f"private-{name}",
        "revision": revision,
        "sha256": SHA,
        "rows": 128,
        "tokens": 65536,
        "weight": 1.0,
    } | more


def record(**changes):
    """A provenance as `quantize` writes it."""
    return {
        "schema": 1,
        "method": "E-PMQ",
        "versions": {"epmq_gptq": "0.1.0", "gptqmodel": "7.6.0"},
        "profile": "best",
        "alpha": "auto",
        "eta": 1.0,
        "rho": 1.0,
        "anchor": "channel",
        "bias_refit": False,
        "on_bad_module": "raise",
        "weighting": "raw",
        "merged": {"source": "private-merge", "revision": None, "sha256": SHA},
        "experts": [expert("math"), expert("code")],
        "objective": {"excess": 12.5, "merge_excess": 99.0},
    } | changes


def checkpoint(folder: Path, made=None, config=None, **settings) -> Path:
    """A small packed layer, with a configuration that says what the test wants."""
    folder.mkdir(parents=True)
    quantization = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False} | settings
    bits, size = quantization["bits"], quantization["group_size"]
    groups = 1 if size == -1 else 128 // size
    name = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{name}.qweight": torch.zeros(128 * bits // 32, 128, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(groups, 128 * bits // 32, dtype=torch.int32),
        f"{name}.scales": torch.ones(groups, 128, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(128, dtype=torch.int32),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    described = (config or llama) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(described))
    meta = {"epmq": record() if made is None else made}
    (folder / "quantize_config.json").write_text(json.dumps(quantization | {"meta": meta}))
    return folder


def source(folder: Path, front: str | None) -> Path:
    """The folder of a model with a card."""
    folder.mkdir(parents=True)
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    return folder


def sources(tmp_path, **fronts):
    """What ``model.epmq_sources`` is: expert → folder."""
    return {
        f"expert `{name}`": source(tmp_path / f"source-{name}", front)
        for name, front in fronts.items()
    }


def data_of(text: str) -> dict:
    """The metadata, as the hub's library reads it; and valid by the rules that it documents."""
    data = ModelCard(text).data.to_dict()
    for key in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        assert isinstance(data.get(key, ""), str)
    assert all(isinstance(tag, str) for tag in data["tags"])
    return data


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def decoded(text: str) -> str:
    """As a reader sees it."""
    return re.sub(r"&#(\d+);", lambda ref: chr(int(ref[1])), text)


# ---- what it says ------------------------------------------------------------------------------


def test_a_card_of_local_models_names_none_of_them(tmp_path):
    folder = checkpoint(tmp_path / "secret-project" / "out")
    text = model_card(folder)
    data = data_of(text)
    assert "base_model" not in data and "base_model_relation" not in data
    assert data["tags"] == ["gptq", "gptqmodel", "epmq", "quantized", "merge", "4-bit"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["quantization"]["bits"] == 4 and data["quantization"]["group_size"] == 64
    assert "# math + code, 4-bit\n" in text
    assert "private-" not in text and "secret-project" not in text and str(tmp_path) not in text
    assert "| expert math | local | – | `abababababab` |" in text
    asked = model_card(folder, include_names=True)
    assert "| expert math | private-math (local) | – |" in asked
    assert "secret-project" not in asked and str(tmp_path) not in asked


def test_a_card_of_hub_models_links_them_at_their_commits(tmp_path):
    experts = [expert("math", "org/math", COMMIT), expert("code", "local-code")]
    base = {"source": "org/base", "revision": COMMIT, "sha256": SHA}
    merge = {
        "tool": "mergekit",
        "method": "ties",
        "parameters": {"density": 0.5, "normalize": True},
    }
    made = record(experts=experts, base=base, merge=merge | {"weights": {"math": 0.7, "code": 0.3}})
    text = model_card(checkpoint(tmp_path / "out", made))
    data = data_of(text)
    assert data["base_model"] == ["org/base", "org/math"]
    assert data["base_model_relation"] == "merge"
    row = f"[org/math](https://huggingface.co/org/math) | `{COMMIT[:12]}` | `{SHA[:12]}` |"
    assert f"| expert math | {row}" in text and "local-code" not in text
    lineage = section(text, "Lineage")
    assert "Merged with `ties`, as recorded by mergekit." in lineage
    for cells in ("| `density` | 0.5 |", "| `normalize` | yes |", "| math 0.7, code 0.3 |"):
        assert cells in lineage


def test_a_quantization_of_a_published_merge_is_one_of_that(tmp_path):
    merged = {"source": "org/merged", "revision": COMMIT, "sha256": SHA}
    made = record(merged=merged, experts=[expert("math", "org/math", COMMIT)])
    data = data_of(model_card(checkpoint(tmp_path / "out", made)))
    assert (data["base_model"], data["base_model_relation"]) == (["org/merged"], "quantized")


def test_parameters_that_name_other_models_are_left_out(tmp_path):
    parameters = {
        "weight": {"private-model": 1},
        "layers": [1, 2.5],
        "note": "~/models/secret",
        "k": None,
    }
    merge = {"tool": "mergekit", "method": "linear", "parameters": parameters}
    text = model_card(checkpoint(tmp_path / "out", record(merge=merge)))
    assert "private-model" not in text and "secret" not in text
    assert "| `layers` | 1, 2.5 |" in text and "| `k` | none |" in text
    assert text.count("see `meta.epmq` in `quantize_config.json`") == 2


def test_how_it_was_quantized_is_told_with_its_exceptions(tmp_path):
    exceptions = [
        {"module": f"model.layers.{i}.mlp.up_proj", "target": "merged", "reason": "few tokens"}
        for i in range(12)
    ]
    experts = [expert("math"), expert("code", rows=0, tokens=0, weight=2.5)]
    more = {"exceptions": exceptions, "left": {"code": "ran full"}, "data_free": ["code"]}
    text = model_card(checkpoint(tmp_path / "out", record(experts=experts, **more), bits=8))
    told = section(text, "How it was quantized")
    for line in (
        "| bits | 8 |",
        "| group size | 64 |",
        "| `alpha` | auto |",
        "| `anchor` | channel |",
        "| objective above its optimum (eq. 12), merged | 99 |",
        "| the same, quantized | 12.5 |",
        "| made with | epmq_gptq 0.1.0, gptqmodel 7.6.0 |",
        "| math | 128 | 65,536 | 1 |",
        "| code | none (data-free) | – | 2.5 |",
        "Layers without the experts' target (12):",
        "- `model.layers.9.mlp.up_proj`: rounded towards the merged weight; few tokens",
        "Expert code was not run to the end: ran full.",
    ):
        assert line in told, line
    assert "model.layers.10." not in told and "8-bit" in data_of(text)["tags"]


def test_the_retention_table(tmp_path):
    folder = checkpoint(tmp_path / "out")
    assert "Nothing was evaluated" in model_card(folder)
    scores = {
        "math": dict(task="gsm8k", metric="acc", higher_is_better=True, base=0.1, expert=0.5,
                     merged=0.4, gptq=None, quantized=0.45),
        "code": dict(task="perplexity", metric="ppl", higher_is_better=False, base=None, expert=4.0,
                     merged=6.0, gptq=6.5, quantized=5.0),
    }  # fmt: skip
    evaluation = {"schema": 1, "experts": scores}
    (folder / "epmq_evaluation.json").write_text(json.dumps(evaluation))
    text = model_card(folder)
    told = section(text, "What was kept of every expert")
    assert "| math | gsm8k | acc ↑ | 0.1 | 0.5 | 0.4 | – | 0.45 | 90.0 % |" in told
    assert "| code | perplexity | ppl ↓ | – | 4 | 6 | 6.5 | 5 | 80.0 % |" in told
    assert "Nothing was evaluated" not in text


def with_report(folder: Path, errors: dict[str, dict[str, float]]) -> None:
    """A report of layers and their experts' errors after rounding."""
    content = samples.report(list(errors), [])
    for module in content["report"]["modules"]:
        module["experts"] = {
            name: {"rows": 8, "energy": 1.0, "merged": 0.02, "quantization": 0.01, "solved": 0.0}
            | {"rounded": rounded}
            for name, rounded in errors[module["module"]].items()
        }
    samples.write(folder, content)


def test_the_errors_per_expert(tmp_path):
    folder = checkpoint(tmp_path / "out")
    with_report(folder, {"a": {"math": 0.01, "code": 0.1}, "b": {"math": 0.03}, "c": {}})
    told = section(model_card(folder), "Error per expert")
    assert "| math | 2 | 2.00 % | 1.00 % | 2.00 % | 3.00 % |" in told
    assert "| code | 1 | 2.00 % | 1.00 % | 10.00 % | 10.00 % |" in told
    (folder / "epmq_report.json").write_text("{}")
    assert "Error per expert" not in model_card(folder)


# ---- licence and language ----------------------------------------------------------------------


def test_a_licence_that_all_share_is_inherited(tmp_path):
    folder = checkpoint(tmp_path / "out")
    front = "license: apache-2.0\nlanguage: [en, 'no']\npipeline_tag: question-answering"
    text = model_card(folder, sources=sources(tmp_path, math=front, code=front))
    data = data_of(text)
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "no"]
    assert data["pipeline_tag"] == "question-answering"
    assert "`apache-2.0`" in section(text, "Licence")
    data = data_of(model_card(folder, license="mit"))
    assert data["license"] == "mit"


@pytest.mark.parametrize(
    ("fronts", "said"),
    [
        (
            {"math": "license: mit", "code": "license: apache-2.0"},
            "the sources differ: math mit, code apache-2.0",
        ),
        ({"math": "license: mit", "code": None}, "no licence is known for code"),
        ({"math": "license: mit", "code": "tags: []"}, "no licence is known for code"),
        ({"math": "license: mit"}, "no licence is known for code"),
        ({"math": "license: [mit, x]", "code": "license: mit"}, "no licence is known for math"),
        ({"math": "license: mit", "code": "license: 'a\n b'"}, "no licence is known for code"),
        ({"math": "license: mit", "code": "license: [\n"}, "no licence is known for code"),
        ({}, "no licence is known for math, code"),
    ],
)
def test_a_licence_that_not_all_share_is_left_out_and_that_is_said(tmp_path, fronts, said):
    text = model_card(checkpoint(tmp_path / "out"), sources=sources(tmp_path, **fronts))
    assert "license" not in data_of(text)
    assert f"Not stated: {said}." in decoded(section(text, "Licence"))


def test_a_base_and_a_merge_with_cards_count_too(tmp_path):
    base = {"source": "b", "revision": None, "sha256": SHA}
    folder = checkpoint(tmp_path / "out", record(base=base))
    folders = sources(tmp_path, math="license: mit", code="license: mit")
    assert "license" not in data_of(model_card(folder, sources=folders))
    folders["`base`"] = source(tmp_path / "b", "license: mit")
    assert data_of(model_card(folder, sources=folders))["license"] == "mit"
    folders["merged model"] = source(tmp_path / "m", "license: cc-by-nc-4.0")
    text = model_card(folder, sources=folders)
    assert "license" not in data_of(text)
    assert "the merged model cc-by-nc-4.0" in decoded(section(text, "Licence"))


def test_a_licence_of_its_own_keeps_name_and_link(tmp_path):
    made = record(experts=[expert("math", "org/math", COMMIT)])
    front = "license: other\nlicense_name: my-license\nlicense_link: LICENSE.md"
    folder = checkpoint(tmp_path / "out", made)
    data = data_of(model_card(folder, sources=sources(tmp_path, math=front)))
    assert (data["license"], data["license_name"]) == ("other", "my-license")
    assert data["license_link"] == f"https://huggingface.co/org/math/blob/{COMMIT}/LICENSE.md"
    local = checkpoint(tmp_path / "other", record(experts=[expert("math")]))
    folders = {"expert `math`": tmp_path / "source-math"}
    assert "license_link" not in data_of(model_card(local, sources=folders))


def test_cards_in_the_hubs_cache_are_found(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    made = record(experts=[expert("math", "org/math", COMMIT)])
    folder = checkpoint(tmp_path / "out", made)
    assert "license" not in data_of(model_card(folder))
    source(tmp_path / "cache" / "models--org--math" / "snapshots" / COMMIT, "license: mit")
    assert data_of(model_card(folder))["license"] == "mit"


# ---- loading -----------------------------------------------------------------------------------


def test_a_text_model_is_loaded_by_every_engine(tmp_path):
    text = model_card(checkpoint(tmp_path / "out"), repo_id="org/llama-4bit")
    told = section(text, "How to load it")
    for line in (
        'AutoModelForCausalLM.from_pretrained("org/llama-4bit", device_map="auto")',
        'GPTQModel.load("org/llama-4bit")',
        "vllm serve org/llama-4bit\n",
        "python -m sglang.launch_server --model-path org/llama-4bit\n",
    ):
        assert line in told
    assert "Not recommended" not in told and "# llama-4bit\n" in text


def test_an_engine_that_cannot_is_named_with_the_reason(tmp_path):
    told = section(model_card(checkpoint(tmp_path / "out", bits=3)), "How to load it")
    assert "vllm serve" not in told and "GPTQModel.load(" in told
    assert "- vLLM 0.32.0: model.layers.0.mlp.up_proj has 3 bits; it takes 4, 8." in told
    told = section(model_card(checkpoint(tmp_path / "uneven", sym=False)), "How to load it")
    assert "vllm serve" not in told and "- vLLM 0.32.0:" in told
    assert "sglang.launch" not in told and "- SGLang 0.5.23:" in told


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel"])
def test_clip_is_loaded_with_this_package(tmp_path, kind):
    model_type = "clip" if kind == "CLIPModel" else "clip_vision_model"
    config = {"architectures": [kind], "model_type": model_type}
    text = model_card(checkpoint(tmp_path / "out", config=config), repo_id="org/clip")
    told, data = section(text, "How to load it"), data_of(text)
    assert 'snapshot_download("org/clip")' in told and "epmq_gptq.load_clip(folder)" in told
    assert "AutoModel" not in told and "vllm serve" not in told
    for engine in ("vLLM", "SGLang", "transformers"):
        assert f"- {engine} " in told
    assert data["library_name"] == "gptqmodel" and "image" in data["pipeline_tag"]
    assert "it loads without the package" not in text


def test_t5_is_loaded_with_its_line(tmp_path):
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    text = model_card(checkpoint(tmp_path / "out", config=config))
    told = section(text, "How to load it")
    assert "T5PreTrainedModel._init_weights = lambda self, module: None" in told
    assert "AutoModelForSeq2SeqLM" in told and "epmq_gptq.install()" in told
    assert "- vLLM 0.32.0: it has no T5." in told and "- transformers" not in told
    assert "pipeline_tag" not in data_of(text)


# ---- strangers ---------------------------------------------------------------------------------


def hostile(tmp_path):
    """A checkpoint in which every name is an attack."""
    experts = [expert(HOSTILE, HOSTILE), expert("code", "org/x](https://evil.example)", COMMIT)]
    merge = {"tool": HOSTILE, "method": HOSTILE, "parameters": {HOSTILE: HOSTILE}}
    made = record(
        experts=experts,
        merge=merge,
        profile=HOSTILE,
        versions={HOSTILE: HOSTILE},
        exceptions=[{"module": HOSTILE, "target": HOSTILE, "reason": HOSTILE}],
        left={HOSTILE: HOSTILE},
    )
    folder = checkpoint(tmp_path / "out", made)
    score = dict(task=HOSTILE, metric=HOSTILE, higher_is_better=True, expert=1, quantized=1)
    (folder / "epmq_evaluation.json").write_text(
        json.dumps({"schema": 1, "experts": {HOSTILE: score}})
    )
    with_report(folder, {HOSTILE: {HOSTILE: 0.5}})
    return folder


def test_hostile_names_stay_text(tmp_path):
    folder = hostile(tmp_path)
    text = model_card(folder, title=HOSTILE, include_names=True)
    assert "<script" not in text and "evil.example" not in text.replace("evil&#46;example", "")
    assert "\u202e" not in text and "$$" not in text and "{{" not in text and "![" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert not any("Owned" in line for line in headings[1:])
    for line in text.splitlines():  # no row of a table has other cells than its head
        if line.startswith("| ---"):
            width = line.count("|")
        if line.startswith("| ") and "Owned" in line:
            assert line.count("|") == width
    data = data_of(text)
    assert "base_model" not in data  # neither is a hub's id
    (folder / "README.md").write_text(text)
    check_private(folder, "README.md")


def test_a_renderer_makes_nothing_of_hostile_names(tmp_path):
    """By markdown-it, which rich brings along."""
    from markdown_it import MarkdownIt

    text = model_card(hostile(tmp_path), title=HOSTILE, include_names=True)
    body = text.partition("\n---\n")[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    tokens += [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in tokens}
    assert not kinds & {"image", "html_inline", "hr", "em_open"}
    (comment,) = [token.content for token in tokens if token.type == "html_block"]
    assert comment.startswith("<!-- epmq_gptq card ") and comment.count("<") == 1
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    assert links == {"https://arxiv.org/abs/2605.16882"}
    # Every table has as many cells in a row as its head has.
    widths, cells = set(), 0
    for token in tokens:
        if token.type in ("th_open", "td_open"):
            cells += 1
        elif token.type == "tr_close":
            widths.add(cells)
            cells = 0
        elif token.type == "table_close":
            assert len(widths) == 1, widths
            widths = set()
    seen = "".join(token.content for token in tokens if token.type == "text")
    assert "<script>alert(1)</script>" in seen  # as text


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "a_b_c",
        "_x_",
        "www.evil.example",
        "http://evil.example",
        "a|b",
        "<b>",
        "&#60;",
        "# x",
        "- x",
        "1. x",
        "$x$",
        "@somebody",
        "~~x~~",
        "\\|",
        "x" * 1000,
        "é 日本",
        "",
        "`a`",
    ],
)
def test_plain_text_renders_as_itself(text):
    for made in (plain(text), code(text)):
        assert "\n" not in made and "|" not in made and "<" not in made and "$" not in made
        assert made.startswith("`") or not re.search(r"www\.|//|\]\(|!\[", made)
    if text and "x" * 300 not in text:
        wanted = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        assert decoded(plain(text)) == wanted


@pytest.mark.parametrize(
    "made",
    [
        {"experts": "math", "merged": [], "base": 3, "objective": "x", "versions": []},
        {"experts": [None, 3, {"name": 7}], "exceptions": [1], "left": [], "merge": []},
        {"experts": [{"name": "a", "revision": 3, "sha256": "x", "rows": "many", "weight": {}}]},
        {"merge": {"method": 3, "parameters": []}, "objective": {"excess": float("inf")}},
    ],
)
def test_a_provenance_of_wrong_types_makes_a_card_all_the_same(tmp_path, made):
    folder = checkpoint(tmp_path / "out", record(**made))
    data_of(model_card(folder))


def test_folders_that_are_no_such_checkpoint_are_refused(tmp_path):
    with pytest.raises(EPMQInputError, match="does not say that E-PMQ made it") as caught:
        model_card(checkpoint(tmp_path / "plain", {}))
    assert caught.value.code == "EPMQ-P01"
    folder = checkpoint(tmp_path / "a")
    before = (folder / "quantize_config.json").read_text()
    for key, value in {"bits": 99, "group_size": "x", "dynamic": {"(": {}}}.items():
        changed = json.loads(before) | {key: value}
        (folder / "quantize_config.json").write_text(json.dumps(changed))
        with pytest.raises(EPMQInputError, match=f"`{key}`"):
            model_card(folder)
    with pytest.raises(EPMQInputError, match="is not a folder"):
        model_card(tmp_path / "nothing")
    good = checkpoint(tmp_path / "good")
    with pytest.raises(EPMQInputError, match="`license` should be"):
        model_card(good, license="My License")
    with pytest.raises(EPMQInputError, match="`repo_id` should be"):
        model_card(good, repo_id='x"); import os')


# ---- writing -----------------------------------------------------------------------------------


def test_our_card_is_rewritten_and_others_are_not(tmp_path):
    folder = checkpoint(tmp_path / "out")
    write_card(folder)
    assert is_ours(folder) and sorted(p.name for p in folder.iterdir())[0] == "README.md"
    text = write_card(folder, title="New")
    assert is_ours(folder) and "# New\n" in text
    assert (folder / "README.md").read_text() == text
    for edited in (text.replace("# New", "# Mine"), "# My own\n", text + "\nmore"):
        (folder / "README.md").write_text(edited)
        assert not is_ours(folder)
        with pytest.raises(EPMQInputError, match="edited since.*`--dry-run`") as caught:
            write_card(folder)
        assert caught.value.code == "EPMQ-F45"
        assert (folder / "README.md").read_text() == edited
    write_card(folder, overwrite=True)
    assert is_ours(folder)
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    folder = checkpoint(tmp_path / "out")
    (tmp_path / "mine.md").write_text("mine")
    (folder / "README.md").symlink_to(tmp_path / "mine.md")
    write_card(folder, overwrite=True)
    assert (tmp_path / "mine.md").read_text() == "mine" and not (folder / "README.md").is_symlink()


def test_a_later_card_keeps_what_the_sources_said(tmp_path):
    folder = checkpoint(tmp_path / "out")
    front = "license: mit\nlanguage: de"
    write_card(folder, sources=sources(tmp_path, math=front, code=front))
    data = data_of(write_card(folder, repo_id="org/x"))
    assert data["license"] == "mit" and data["language"] == ["de"]


def test_the_command(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "out")

    def run(*arguments):
        return CliRunner().invoke(cli.app, ["card", str(folder), *arguments])

    shown = run("--dry-run", "--title", "A title", "--license", "mit", "--repo-id", "org/x")
    assert shown.exit_code == 0, shown.output
    expected = model_card(folder, title="A title", license="mit", repo_id="org/x")
    assert shown.stdout == expected and not (folder / "README.md").exists()
    written = run()
    assert written.exit_code == 0 and written.stdout.startswith("card        out/README.md: ")
    assert (folder / "README.md").read_text() == model_card(folder)
    assert "private-math" in run("--dry-run", "--names").stdout
    (folder / "README.md").write_text("# Mine\n")
    refusal = run()
    assert refusal.exit_code == 2 and "[EPMQ-F45]" in refusal.stderr
    assert run("--overwrite").exit_code == 0
