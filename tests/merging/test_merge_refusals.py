"""What is refused, before anything is computed or written, and in which words."""

import json

import pytest
import torch
from merging_models import make_models, save_model, save_models

from epmq_gptq.errors import EPMQError, EPMQInputError
from epmq_gptq.merging import merge, merge_methods, merge_state_dicts


def _checked(error, code):
    assert error.code == f"EPMQ-{code}"
    assert error.subject and error.remedy.endswith(".") and "\n" not in str(error)
    return str(error)


def _refused(code, match, method="task_arithmetic", base=None, experts=None, **options):
    with pytest.raises(EPMQInputError, match=match) as caught:
        merge_state_dicts(method, base, experts, options or None)
    return _checked(caught.value, code)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("slerp", {}, "`method` should be one of average, .*got 'slerp'"),
        ("average", {"lam": 0.3}, "`lam` is not an option of `average`; its options are none"),
        ("ties", {"lambda": 1}, "`lambda` is not an option of `ties`; its options are `threshold`"),
        ("task_arithmetic", {"lam": float("nan")}, "`lam` should be a finite number, got nan"),
        ("task_arithmetic", {"lam": "0.3"}, "`lam` should be a finite number, got '0.3'"),
        ("task_arithmetic", {"lam": True}, "`lam` should be a finite number, got True"),
        ("ties", {"threshold": 0.2}, "`threshold` should be a percentage above 1 .*got 0.2"),
        ("ties", {"threshold": 101}, "`threshold` should be a percentage"),
        ("ties", {"merge_func": "median"}, "`merge_func` should be one of sum, mean, max"),
        ("ties_per_tensor", {"density": 0}, "`density` should be a fraction above 0"),
        ("ties_per_tensor", {"normalize": 1}, "`normalize` should be true or false, got 1"),
        ("ties_per_tensor", {"weights": [1, 2]}, "`weights` should be a mapping"),
        (
            "ties_per_tensor",
            {"weights": {"a": 1}},
            r"exactly the experts \['a', 'b'\], got \['a'\]",
        ),
        ("wudi", {"iterations": -1}, "`iterations` should be a whole number"),
        ("wudi", {"iterations": 1.5}, "`iterations` should be a whole number"),
        ("wudi", {"lr": 0}, "`lr` should be a positive number, got 0"),
    ],
)
def test_options(method, options, match):
    base, experts = make_models(2)
    unknown = method in ("average", "ties") and options.keys() & {"lam", "lambda"}
    _refused("O02" if unknown else "O01", match, method, base, experts, **options)


@pytest.mark.parametrize("method", [m for m, a in merge_methods().items() if a["needs_base"]])
def test_a_missing_base(method):
    _, experts = make_models(2)
    _refused("O03", f"`base` should be .*`{method}` adds task vectors", method, None, experts)


def test_no_experts():
    base, _ = make_models(1)
    _refused("F20", "at least one expert, got none", "average", base, {})


def test_missing_and_extra_tensors_are_listed_for_each_expert():
    base, experts = make_models(3)
    for i in range(25):
        base[f"lost.{i:02d}"] = torch.zeros(1)
        for name in "ac":
            experts[name][f"lost.{i:02d}"] = torch.zeros(1)
    experts["c"]["found"] = torch.zeros(1)
    text = _refused("F01", "nothing was computed", base=base, experts=experts)
    assert "expert `b`: lacks 25 tensor(s): `lost.00`" in text
    assert "`lost.19` and 5 more" in text and "lost.20" not in text
    assert "expert `c`: has 1 tensor(s): `found` that the base lacks" in text
    assert "expert `a`" not in text


def test_shapes_and_dtypes():
    base, experts = make_models(1)
    experts["a"]["model.conv.weight"] = torch.zeros(3, 2, 2, 3)
    experts["a"]["model.scale"] = torch.tensor(1)
    text = _refused("F03", "has other shapes", base=base, experts=experts)
    assert "`model.conv.weight` is [3, 2, 2, 3], the base [3, 2, 2, 2]" in text
    assert "has other dtypes: 1 tensor(s): `model.scale`" in text


def test_token_tables_of_another_size():
    base, experts = make_models(1)
    experts["a"]["model.embed_tokens.weight"] = torch.zeros(13, 6)
    text = _refused("F05", "token tables", base=base, experts=experts)
    assert "`model.embed_tokens.weight` has 13 rows, the base 11" in text
    assert "resize_token_embeddings" in text


def test_integer_tensors_that_differ():
    base, experts = make_models(2)
    experts["b"]["model.position_ids"] = torch.arange(5) + 1
    match = "expert `b`: tensor `model.position_ids`.*differs from that of the base"
    _refused("F06", match, "average", base, experts)


def test_fp64_is_copied_if_equal_and_else_refused():
    base, experts = make_models(1)
    base["wide"] = torch.randn(2, dtype=torch.float64)
    experts["a"]["wide"] = base["wide"].clone()
    merged = merge_state_dicts("task_arithmetic", base, experts)
    assert torch.equal(merged["wide"], base["wide"])
    experts["a"]["wide"][0] += 1
    _refused("F06", "only fp32, fp16 and bf16", base=base, experts=experts)


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    base, experts = make_models(2)
    return save_models(tmp_path / "models", base, experts)


def _refused_on_disk(code, match, folders, out, root, **options):
    before = sorted(root.rglob("*"))
    arguments = {"base": folders[0], "experts": folders[1], "out": out} | options
    with pytest.raises(EPMQInputError, match=match) as caught:
        merge("average", **arguments)
    assert str(root) not in _checked(caught.value, code)
    assert sorted(root.rglob("*")) == before


def test_the_same_checks_run_on_disk(tmp_path, folders):
    base, experts = make_models(1)
    del experts["a"]["model.scale"]
    bad = save_model(tmp_path / "bad", experts["a"])
    paths = {**folders[1], "bad": bad}
    _refused_on_disk("F01", "expert `bad`: lacks", folders, tmp_path / "o", tmp_path, experts=paths)
    base["model.position_ids"] = torch.zeros(5, dtype=torch.int64)
    odd = save_model(tmp_path / "odd", base)
    paths = {**folders[1], "odd": odd}
    _refused_on_disk(
        "F06", "expert `odd`: tensor", folders, tmp_path / "o", tmp_path, experts=paths
    )


@pytest.mark.parametrize(
    "where", ["base", "expert-b", "", "base/merged", "../models", "expert-a/."]
)
def test_an_output_that_overlaps_an_input(tmp_path, folders, where):
    out = tmp_path / "models" / where
    _refused_on_disk("F45", "`out` should lie outside", folders, out, tmp_path, overwrite=True)


def test_an_output_that_overlaps_through_a_link(tmp_path, folders):
    (tmp_path / "link").symlink_to(folders[0])
    _refused_on_disk("F45", "outside", folders, tmp_path / "link" / "x", tmp_path, overwrite=True)
    _refused_on_disk("F45", "outside", folders, tmp_path / "link", tmp_path, overwrite=True)


def test_an_output_that_exists(tmp_path, folders):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("1")
    _refused_on_disk("F45", "new or empty.*overwrite=True", folders, out, tmp_path)
    _refused_on_disk("F45", "got the file", folders, out / "mine", tmp_path, overwrite=True)


def test_other_arguments(tmp_path, folders):
    out = tmp_path / "out"
    _refused_on_disk("O01", "`max_shard_bytes`", folders, out, tmp_path, max_shard_bytes=0)
    _refused_on_disk("O01", "`device` should be", folders, out, tmp_path, device="abacus")
    _refused_on_disk("F20", "at least one expert", folders, out, tmp_path, experts={})
    _refused_on_disk("O01", "short names", folders, out, tmp_path, experts={"/home/me": folders[0]})


def test_too_little_disk(tmp_path, folders, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    _refused_on_disk("F44", "bytes free, got 10", folders, tmp_path / "out", tmp_path)


def test_a_quantized_expert(tmp_path, folders):
    config = {"model_type": "toy", "quantization_config": {"bits": 4}}
    (folders[1]["b"] / "config.json").write_text(json.dumps(config))
    _refused_on_disk(
        "F07", "expert `b`: .*quantization_config", folders, tmp_path / "out", tmp_path
    )


def test_a_link_out_of_the_base(tmp_path, folders, monkeypatch):
    monkeypatch.delattr("epmq_gptq.merging.streaming.run_method")  # refused before any compute
    secret = tmp_path / "secret"
    secret.write_text("key")
    (folders[0] / "tokenizer_config.json").symlink_to(secret)
    _refused_on_disk(
        "F10", "a link that escapes the checkpoint", folders, tmp_path / "out", tmp_path
    )


@pytest.mark.parametrize("role", ["base", "expert `b`"])
def test_an_adapter_is_refused_by_name(tmp_path, folders, role):
    folder = folders[0] if role == "base" else folders[1]["b"]
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    match = f"{role}: `{folder.name}` holds an adapter.*merge_and_unload"
    _refused_on_disk("F34", match, folders, tmp_path / "out", tmp_path)


def test_a_configuration_that_is_not_one(tmp_path, folders):
    (folders[1]["b"] / "config.json").write_text("[]")
    match = "expert `b`: `config.json` should be a JSON object"
    _refused_on_disk("F13", match, folders, tmp_path / "out", tmp_path)


def test_a_place_that_cannot_be_written(tmp_path, folders, monkeypatch):
    def read_only(self, *arguments, **options):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    _refused_on_disk("F45", "Read-only file system", folders, tmp_path / "out", tmp_path)


def test_a_disk_that_runs_full_on_the_way(tmp_path, folders, monkeypatch):
    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("epmq_gptq.merging.shards.ShardWriter.write", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EPMQError, match="the disk of `out` ran full") as caught:
        merge("average", base=folders[0], experts=folders[1], out=tmp_path / "new" / "out")
    _checked(caught.value, "F44")
    assert sorted(tmp_path.rglob("*")) == before


def test_methods_are_described():
    methods = merge_methods()
    by_weights = ["average", "task_arithmetic", "ties", "ties_per_tensor", "wudi"]
    assert list(methods) == [*by_weights, "regmean", "regmean_plusplus"]
    for about in methods.values():
        assert about["summary"].endswith(".") and about["title"]
        assert about["reference"].startswith("https://arxiv.org/abs/")
        for parameter in about["parameters"].values():
            assert set(parameter) == {"default", "rule", "doc"}
    json.dumps(methods)
    assert methods["task_arithmetic"]["parameters"]["lam"]["default"] == 0.3
    assert methods["ties"]["parameters"]["threshold"]["default"] == 20.0
    assert methods["wudi"]["parameters"]["iterations"]["default"] == 400
