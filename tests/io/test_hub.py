"""Models of a hub: what is asked for, what is fetched, and which commit is recorded."""

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hub import Hub, commit_of, small_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import cli
from epmq_gptq.commands.draft import Given, draft_of_merge
from epmq_gptq.errors import EPMQInputError, EPMQWarning
from epmq_gptq.experts.experts import Experts
from epmq_gptq.io.checkpoints import resolve_source
from epmq_gptq.io.hub import parse_hub_id

ROOT = Path(__file__).parents[2]
WHAT = "expert `math`"


def resolve(spec, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = resolve_source(spec, what=WHAT, **options)
    return source, [w.message for w in caught if isinstance(w.message, EPMQWarning)]


def refused(spec, *parts, code="EPMQ-F16", **options):
    with pytest.raises(EPMQInputError) as caught:
        resolve_source(spec, what=WHAT, **options)
    error = caught.value
    assert (error.code, error.subject) == (code, WHAT)
    assert error.remedy and "\n" not in str(error)
    for part in parts:
        assert part in str(error), str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("./a", None),
        ("org/name@", None),
        ("org/name@../../x", None),
        ("órg/name", None),
        ("org/na me", None),
    ],
)
def test_what_is_a_hub_id(text, expected):
    assert parse_hub_id(text) == expected


def test_branch_tag_and_commit_mean_one_commit_each(hub, tmp_path):
    old = hub.add("org/math", small_model(tmp_path / "old", 1.0), "main", "v1")
    new = hub.add("org/math", small_model(tmp_path / "new", 2.0), "main", "feature/x")
    values = {"": 2.0, "@main": 2.0, "@feature/x": 2.0, "@v1": 1.0, f"@{old}": 1.0}
    for revision, value in values.items():
        source, said = resolve(f"org/math{revision}")
        commit = new if value == 2.0 else old
        assert (source.name, source.revision) == ("org/math", commit)
        weights = load_file(source.path / "model.safetensors")
        assert weights["a.weight"][0, 0] == value
        if revision == f"@{old}":
            assert said == []
        else:
            (warning,) = said
            assert warning.code == "EPMQ-F16"
            assert str(warning) == (
                f"{WHAT}: `org/math{revision}` is not pinned; today it is `org/math@{commit}`."
            )


def test_only_what_a_model_needs_is_fetched(hub, tmp_path):
    folder = small_model(tmp_path / "m")
    unneeded = ["pytorch_model.bin", "modeling_x.py", "model.gguf", "train.log"]
    nested = [
        "original/consolidated.00.safetensors",
        "checkpoint-9/model.safetensors",
        "onnx/a.json",
    ]
    for name in [*unneeded, *nested, "consolidated.safetensors"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name in ["tokenizer.json", "merges.txt", "chat_template.jinja", "mergekit_config.yml"]:
        (folder / name).write_text(json.dumps([name]))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("org/math", folder)
    source, _ = resolve("org/math")
    fetched = {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    fetched |= {"chat_template.jinja", "mergekit_config.yml", "README.md"}
    assert {file.name for file in source.path.iterdir()} == fetched
    assert hub.downloaded() == {f"org/math/{name}" for name in fetched}
    # The second time everything is there.
    hub.requests.clear()
    assert resolve("org/math")[0] == source
    assert hub.downloaded() == set()


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("pytorch_model.bin", "pickle files are never opened"),
        ("model.gguf", "a format that is not"),
    ],
)
def test_other_formats_are_refused_unfetched(hub, tmp_path, file, part):
    folder = small_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / file)
    hub.add("org/math", folder)
    refused(
        "org/math", f"no safetensors weights in `math`; it holds `{file}`", part, code="EPMQ-F14"
    )
    assert hub.downloaded() == {"org/math/config.json"}


def test_what_the_hub_refuses(hub, tmp_path):
    commit = hub.add("org/math", small_model(tmp_path / "m"))
    hub.add("org/gated", tmp_path / "m", gated=True)
    refused("org/nobody", "no such folder, and no `org/nobody` on the hub", "private", "HF_TOKEN")
    refused("org/math@v9", "`org/math` has no revision `v9`")
    refused(f"org/math@{commit_of('none')}", "has no revision")
    refused("org/gated", "`org/gated` is gated", "Ask for access")
    refused("org/math", "is not pinned to a commit", "40 digits", require_pinned=True)
    assert resolve(f"org/math@{commit}", require_pinned=True)[1] == []


def test_what_was_fetched_is_there_without_the_hub(hub, tmp_path, monkeypatch):
    commit = hub.add("org/math", small_model(tmp_path / "m"))
    first, _ = resolve("org/math")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between attempts
    for state in ("down", "offline"):
        hub.is_down = state == "down"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
        assert resolve("org/math")[0] == first
        assert resolve(f"org/math@{commit}")[0].path == first.path
        lacks = "could not be fetched, and the hub's cache lacks it"
        refused("org/other@v1", f"`org/other@v1` {lacks}")
        refused("org/other", f"`org/other@main` {lacks}")


def test_half_a_snapshot_is_not_a_model(hub, tmp_path, monkeypatch):
    hub.add("org/math", small_model(tmp_path / "m"))
    source, _ = resolve("org/math")
    (source.path / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/math", "lacks it or a part of it", "model.safetensors")


def test_nobody_listens(hub):
    hub.__exit__()
    refused("org/math", "`org/math@main` could not be fetched", "Try again")


def test_an_adapter_repository_and_its_base(hub, tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 4), f"{name}B.weight": torch.ones(3, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(options))
    (adapter / "optimizer.pt").write_bytes(b"x")
    lora = hub.add("org/lora", adapter)
    base = hub.add("org/base", small_model(tmp_path / "base"), "main")
    other = hub.add("org/base", small_model(tmp_path / "other"), "v2")
    specs = {"named": "org/lora", "pinned": f"org/base@v2+org/lora@{lora}"}
    with pytest.warns(EPMQWarning) as caught:
        experts = Experts(specs)
    assert experts.sources["named"].revision == experts.sources["pinned"].revision == lora
    assert experts.expert("named").base.revision == base
    assert experts.expert("pinned").base.revision == other
    ours = [w.message for w in caught if isinstance(w.message, EPMQWarning)]
    named = {str(message).split("`")[3] for message in ours}
    assert named == {"org/base", "org/base@v2", "org/lora"}
    experts.close()
    assert "org/lora/optimizer.pt" not in hub.downloaded()


MERGED = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [
        {"model": "org/base"},
        {"model": "org/expert0@v1", "parameters": {"weight": 0.5, "density": 1}},
        {"model": "org/expert1", "parameters": {"weight": 0.5, "density": 1}},
    ],
}


def test_the_lineage_of_a_hub_model_costs_no_weights(hub, tmp_path):
    folder = small_model(tmp_path / "merged")
    (folder / "mergekit_config.yml").write_text(yaml.safe_dump(MERGED))
    commit = hub.add("org/merged", folder)
    with pytest.warns(EPMQWarning, match=f"today it is `org/merged@{commit}`"):
        draft = draft_of_merge("org/merged", Given())
    assert draft.merged == f"org/merged@{commit}"
    assert draft.experts == {"expert0": "org/expert0@v1", "expert1": "org/expert1"}
    assert hub.downloaded() == {"org/merged/config.json", "org/merged/mergekit_config.yml"}
    hub.add("org/silent", small_model(tmp_path / "silent"))
    with pytest.warns(EPMQWarning), pytest.raises(EPMQInputError) as caught:
        draft_of_merge("org/silent", Given())
    assert caught.value.code == "EPMQ-F35"
    assert "`org/silent` does not say what it was merged from" in str(caught.value)
    with pytest.raises(EPMQInputError) as caught:
        draft_of_merge("org/merged", Given(quantize={"require_pinned": True}))
    assert caught.value.code == "EPMQ-F16"


def test_a_strangers_path_is_not_looked_up_here(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = small_model(tmp_path / "merged")
    small_model(tmp_path / "private")
    models = ["org/a", "private", str(tmp_path / "private"), "./private"]
    configuration = {"merge_method": "linear", "models": models}
    (folder / "mergekit_config.yml").write_text(yaml.safe_dump(configuration))
    commit = hub.add("org/merged", folder)
    draft = draft_of_merge(f"org/merged@{commit}", Given())
    assert draft.experts == {"a": "org/a"}
    assert list(draft.absent) == ["private", "private-2", "private-3"]


# ---- from a hub id to a checkpoint, in one command ---------------------------------------------


def command(*arguments, hub, home, folder):
    # GPTQModel's tokenizer package puts caches of its own into the environment on import.
    clean = {k: v for k, v in os.environ.items() if not k.endswith(("_CACHE", "HF_HOME"))}
    environment = clean | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", "epmq_gptq", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )


def test_one_command_from_a_hub_id_to_a_checkpoint(tmp_path):
    merged, experts = tiny.family(tmp_path / "models", 2)
    base = tiny.save(tiny.llama(), tmp_path / "models" / "base")
    (merged / "mergekit_config.yml").write_text(yaml.safe_dump(MERGED))
    for folder in (merged, base, *experts.values()):
        (folder / "pytorch_model.bin").write_bytes(b"never")
        (folder / "modeling_evil.py").write_text("raise SystemExit")
    for name, text in {"a": "1 + 1 = 2\n", "b": "def f(x): return x\n"}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} {text}" for i in range(12)))
    options = ["--calibration", "expert0=a.txt", "--calibration", "expert1=b.txt"]
    options += ["--set", "group_size=32", "--batch-size", 4, "--device", "cpu"]
    with Hub() as hub:
        commits = {
            "org/merged": hub.add("org/merged", merged),
            "org/base": hub.add("org/base", base),
        }
        commits["org/expert0"] = hub.add("org/expert0", experts["expert0"], "v1")
        commits["org/expert1"] = hub.add("org/expert1", experts["expert1"])
        where = dict(hub=hub, home=tmp_path / "home", folder=tmp_path)
        done = command("quantize", "org/merged", *options, "--out", "out", **where)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"merged      org/merged@{commits['org/merged']}\n" in done.stdout
        assert "lineage     ties, trimmed per tensor (says mergekit)\n" in done.stdout
        assert "expert      expert0: org/expert0@v1, weight 0.5\n" in done.stdout
        asked = {"org/base", "org/merged", "org/expert0@v1", "org/expert1"}
        warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert {line.split("`")[-4] for line in warned} == asked
        assert all(line.endswith("[EPMQ-F16]") for line in warned)
        downloaded = hub.downloaded()
        assert {path.rpartition(".")[2] for path in downloaded} == {"json", "safetensors", "yml"}
        assert {path.rpartition("/")[0] for path in downloaded} == set(commits)
    assert not list((tmp_path / "home").rglob("*.bin"))

    record = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]["epmq"]
    known = {each["source"]: each["revision"] for each in [record["merged"], *record["experts"]]}
    known[record["base"]["source"]] = record["base"]["revision"]
    assert known == commits
    assert record["merge"] == {
        "tool": "mergekit",
        "method": "ties",
        "parameters": {"density": {"expert0": 1, "expert1": 1}},
        "base": "org/base",
        "experts": {"expert0": "org/expert0@v1", "expert1": "org/expert1"},
        "weights": {"expert0": 0.5, "expert1": 0.5},
        "trim": "per tensor",
    }
    assert str(tmp_path) not in json.dumps(record)

    # The same models as local folders, with the hub gone, give the same tensors.
    local = [part for name in experts for part in ("--expert", f"{name}={experts[name]}")]
    for folder in (merged, base, *experts.values()):
        (folder / "pytorch_model.bin").unlink()
    shutil.rmtree(tmp_path / "home")
    options += [*local, "--base", base, "--out", "local"]
    done = CliRunner().invoke(cli.app, ["quantize", *map(str, [merged, *options])])
    assert done.exit_code == 0, done.output
    assert "warning: " not in done.stderr
    ours, theirs = (load_file(tmp_path / o / "model.safetensors") for o in ("out", "local"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
