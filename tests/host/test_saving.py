"""A save is whole or absent, standard, and says where it came from without saying too much."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from judge import stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epmq_gptq import EPMQConfig, EPMQError, EPMQInputError
from epmq_gptq.host.saving import tensors_of, verify_checkpoint


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private-models")
    merged, experts = tiny.family(folder, experts=2, model=tiny.llama(layers=1))
    return merged, experts


@pytest.fixture(scope="module")
def model(family):
    merged, experts = family
    config = EPMQConfig(group_size=32, experts=experts, alpha=0.1)
    model = tiny.load(merged, config)
    model.quantize({name: tiny.rows(4, 40, seed=1) for name in experts})
    return model


def test_provenance_is_complete_and_holds_nothing_private(model, family, tmp_path):
    merged, experts = family
    merge = {"format": 1, "method": "average", "parameters": {}, "base": None}
    merge["experts"] = {name: {"name": name, "revision": None} for name in experts}
    (merged / "epmq_merge.json").write_text(json.dumps(merge))
    config = EPMQConfig(group_size=32, experts=experts, alpha=0.1, alpha_pattern={"o_proj": 1})
    other = tiny.load(merged, config)
    other.quantize({name: tiny.rows(4, 40, seed=1) for name in experts})
    other.save(str(tmp_path / "out"))
    (merged / "epmq_merge.json").unlink()
    for name in ("quantize_config.json", "config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "private-models" not in text and str(tmp_path) not in text
    record = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]["epmq"]
    assert record["method"] == "E-PMQ" and record["alpha"] == 0.1
    assert record["alpha_pattern"] == {"o_proj": 1.0}
    assert record["merge"] == merge | {"tool": "epmq_gptq"}
    assert set(record["versions"]) == {"epmq_gptq", "gptqmodel", "torch", "transformers"}
    assert [e["name"] for e in record["experts"]] == list(experts)
    for expert in record["experts"]:
        assert (expert["rows"], expert["tokens"], expert["revision"]) == (4, 160, None)
        assert len(expert["sha256"]) == 64 and expert["source"] == expert["name"]
    assert len({e["sha256"] for e in record["experts"]} | {record["merged"]["sha256"]}) == 3


def test_the_checkpoint_loads_where_epmq_gptq_is_not_imported(model, tmp_path, reader):
    """In GPTQModel and in transformers + optimum, with the same logits."""
    out = tmp_path / "out"
    model.save(str(out))
    script = f"""
import torch
ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
from gptqmodel import GPTQModel, BACKEND
ours = GPTQModel.load({str(out)!r}, device="cpu", dtype=torch.bfloat16, backend=BACKEND.GPTQ_TORCH)
from transformers import AutoModelForCausalLM
theirs = AutoModelForCausalLM.from_pretrained({str(out)!r}, device_map="cpu", dtype=torch.bfloat16)
with torch.no_grad():
    a, b = ours.model(ids).logits.float(), theirs(ids).logits.float()
assert torch.isfinite(a).all() and torch.isfinite(b).all()
assert torch.allclose(a, b, atol=3e-2), (a - b).abs().max()
tokens = ours.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
assert tokens.shape == (1, 11)
assert torch.equal(tokens, theirs.generate(ids, max_new_tokens=5, do_sample=False))
print("LOADED")
"""
    assert "LOADED" in reader.run(script, tmp_path)


def test_dense_tensors_keep_the_dtype_the_merge_stores(tmp_path):
    half = tiny.llama(layers=1).to(torch.bfloat16)
    merged, experts = tiny.family(tmp_path, experts=2, model=half)
    config = EPMQConfig(group_size=32, experts=experts)
    model = tiny.load(merged, config)
    model.quantize({name: tiny.rows(3, 40, seed=1) for name in experts})
    model.save(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as saved,
        safe_open(merged / "model.safetensors", "pt") as source,
    ):
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            assert saved.get_tensor(name).dtype == torch.bfloat16
            assert torch.equal(saved.get_tensor(name), source.get_tensor(name))
    model.save(str(tmp_path / "shards"), max_shard_size="32KB")
    parts, whole = stored(tmp_path / "shards"), stored(tmp_path / "out")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())


def test_outputs_that_would_destroy_something_are_refused(model, family, tmp_path):
    merged, experts = family
    before = sorted(path.name for path in merged.iterdir())
    for place in (merged, merged / "inside", merged.parent, experts["expert1"]):
        with pytest.raises(EPMQInputError, match="`save_dir` should lie outside of every input"):
            model.save(str(place))
    assert sorted(path.name for path in merged.iterdir()) == before
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    with pytest.raises(EPMQInputError, match=r"`save_dir` should be new or empty.*overwrite=True"):
        model.save(str(taken))
    with pytest.raises(EPMQInputError, match=r"`save_dir` should be a folder"):
        model.save(str(taken / "note.txt"))
    model.save(str(taken), overwrite=True)
    assert not (taken / "note.txt").exists() and (taken / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_sharded_save_is_verified_and_loads(model, tmp_path):
    model.save(str(tmp_path / "out"), max_shard_size="64KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = tiny.reload(tmp_path / "out")
    assert loaded.model.model.layers[0].mlp.up_proj.qweight.shape == (64 * 4 // 32, 128)
    with pytest.raises(EPMQInputError, match="`split_by` makes a folder per layer"):
        model.save(str(tmp_path / "other"), split_by="layer")
    assert not (tmp_path / "other").exists()


def test_a_save_that_fails_leaves_nothing_and_can_be_repeated(model, tmp_path, monkeypatch):
    from gptqmodel.models import writer

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "streaming_state_dict_to_shards", full)
        with pytest.raises(EPMQError, match="the disk of `out` ran full") as caught:
            model.save(str(tmp_path / "out"))
    assert caught.value.code == "EPMQ-F44"
    assert list(tmp_path.iterdir()) == []
    model.save(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def written(model, tmp_path):
    """A saved checkpoint, and what it is compared with."""
    model.save(str(tmp_path / "out"))
    tensors = {
        name: torch.empty(t.shape, device="meta") for name, t in tensors_of(model.model).items()
    }
    return tmp_path / "out", model.epmq_report.modules, tensors


def not_as_written(written, says):
    with pytest.raises(EPMQError, match=says) as caught:
        verify_checkpoint(*written)
    # A failed save, not a bad input.
    assert type(caught.value) is EPMQError and caught.value.code == "EPMQ-S01"


def change(folder, **changes):
    """Write the tensors of a checkpoint again: part → what becomes of it; None leaves it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, value in changes.items():
        name = f"model.layers.0.mlp.up_proj.{part}"
        old = tensors.pop(name)
        if value is not None:
            tensors[name] = value(old).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGES = {
    "no g_idx": ({"g_idx": None}, "lacks `model.layers.0.mlp.up_proj.g_idx`"),
    "cut": ({"qweight": lambda t: t[:-4]}, r"in the shape \(4, 128\), not \(8, 128\)"),
    "infinite": ({"scales": lambda t: t.index_fill(0, torch.tensor([1]), float("inf"))}, "128 non"),
    "other codes": (
        {"qweight": lambda t: t.roll(1, 0)},
        "other weights for `model.layers.0.mlp.up",
    ),
    "other scales": ({"scales": lambda t: t * 1.05}, "holds other weights for"),
    "other order": ({"g_idx": lambda t: t.flip(0)}, "holds other weights for"),
    "no such group": ({"g_idx": lambda t: t + 1}, "beyond its 2 groups"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_written_is_read_back(written, damage):
    verify_checkpoint(*written)
    changes, says = DAMAGES[damage]
    change(written[0], **changes)
    not_as_written(written, says)


def test_files_that_were_cut_or_contradict_one_another_are_no_save(written):
    folder, modules, tensors = written
    not_as_written((folder, modules, tensors | {"x": torch.ones(1)}), "lacks `x`")
    fewer = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    not_as_written((folder, modules, fewer), "holds `model.norm.weight`, which the model lacks")
    not_as_written((folder, modules[1:], tensors), "has other packed layers")
    config = json.loads((folder / "quantize_config.json").read_text())
    for changes, says in (
        ({"bits": 8}, "has `bits` 4 in `config.json` and 8 in"),
        ({"sym": False}, "has `sym` True in"),
        ({"bits": None}, "lacks the quantization in `quantize_config.json`"),
    ):
        text = {key: value for key, value in (config | changes).items() if value is not None}
        (folder / "quantize_config.json").write_text(json.dumps(text))
        not_as_written(written, says)
    (folder / "quantize_config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    not_as_written(written, "is damaged.*`save` again")


def test_the_disk_must_have_room_for_all_that_is_written(model, tmp_path, monkeypatch):
    model.save(str(tmp_path / "out"))
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    needed = []
    monkeypatch.setattr(
        "epmq_gptq.host.saving.check_space", lambda target, needs, **options: needed.append(needs)
    )
    model.save(str(tmp_path / "other"))
    assert size < needed[0] < 1.1 * size + (1 << 20)
