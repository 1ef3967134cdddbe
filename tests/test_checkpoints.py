"""Checkpoints are read lazily and only from where they say they are."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_gptq.checkpoints import Checkpoint, describe_source, resolve_source
from epmq_gptq.errors import EPMQInputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4).bfloat16()}


def single(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    return folder


def sharded(folder: Path, weight_map=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, (key, tensor) in zip(names, tensors().items(), strict=True):
        save_file({key: tensor}, folder / name)
    index = {"weight_map": weight_map or dict(zip(tensors(), names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("build", [single, sharded])
def test_reads_tensor_by_tensor(build, tmp_path):
    checkpoint = Checkpoint(build(tmp_path / "m"), what="expert `x`")
    assert sorted(checkpoint) == ["a.weight", "b.weight"] and len(checkpoint) == 2
    info = checkpoint.info("b.weight")
    assert (info.shape, info.dtype, info.torch_dtype, info.numel) == (
        (4,),
        "BF16",
        torch.bfloat16,
        4,
    )
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.read(name), tensor)
    checkpoint.close()
    assert torch.equal(checkpoint.read("a.weight"), tensors()["a.weight"])
    with pytest.raises(EPMQInputError, match=r"expert `x`: tensor `c` is missing"):
        checkpoint.read("c")


def test_the_digest_is_that_of_the_weights(tmp_path):
    one = Checkpoint(single(tmp_path / "one"), what="x")
    same = Checkpoint(single(tmp_path / "same"), what="x")
    assert one.digest() == same.digest() and len(one.digest()) == 64
    changed = tensors()
    changed["b.weight"][0] = 2
    save_file(changed, tmp_path / "same" / "model.safetensors")
    assert Checkpoint(tmp_path / "same", what="x").digest() != one.digest()


@pytest.mark.parametrize(
    "shard", ["../m/model.safetensors", "/etc/x.safetensors", "sub/x.safetensors"]
)
def test_an_index_cannot_point_outside_the_folder(tmp_path, shard):
    folder = sharded(tmp_path / "m", {"a.weight": shard})
    with pytest.raises(EPMQInputError, match="escapes the checkpoint"):
        Checkpoint(folder, what="expert `x`")


def test_a_shard_cannot_be_a_link_to_another_place(tmp_path):
    elsewhere = single(tmp_path / "elsewhere")
    folder = tmp_path / "m"
    folder.mkdir()
    os.symlink(elsewhere / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(EPMQInputError, match="escapes the checkpoint"):
        Checkpoint(folder, what="expert `x`")


def test_an_index_must_agree_with_its_shards(tmp_path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with pytest.raises(EPMQInputError, match=r"`b.weight` is in `.*`, which lacks it"):
        Checkpoint(sharded(tmp_path / "a", {"a.weight": one, "b.weight": one}), what="x")
    with pytest.raises(EPMQInputError, match=r"which lacks it"):
        Checkpoint(sharded(tmp_path / "b", {"a.weight": one, "b.weight": two, "c": two}), what="x")
    folder = sharded(tmp_path / "c")
    save_file(tensors(), folder / two)
    with pytest.raises(EPMQInputError, match=r"`a.weight` is in both"):
        Checkpoint(folder, what="x")
    folder = sharded(tmp_path / "d")
    (folder / two).unlink()
    with pytest.raises(
        EPMQInputError, match=r"shard `model-00002-of-00002.safetensors` is missing"
    ):
        Checkpoint(folder, what="x")


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_a_damaged_shard_is_named_with_its_size(tmp_path, keep):
    folder = single(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        EPMQInputError, match=rf"shard `model.safetensors` \({keep} bytes\) is damaged"
    ):
        Checkpoint(folder, what="expert `x`")


def test_pickle_files_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(EPMQInputError, match=r"pickle files are never opened, convert it"):
        Checkpoint(tmp_path, what="expert `x`")


# ---- sources -------------------------------------------------------------------------------------


def test_a_local_folder_is_named_by_its_last_part_only(tmp_path):
    source = resolve_source(single(tmp_path / "private" / "math"), what="expert `m`")
    assert (source.name, source.revision) == ("math", None)
    assert source.path == (tmp_path / "private" / "math").resolve()


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "just-a-name", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(spec):
    with pytest.raises(EPMQInputError, match=r"expert `m`: `.*` is neither an existing folder nor"):
        resolve_source(spec, what="expert `m`")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache that holds one revision of one repository."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--org--math"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_file(tensors(), repository / "blobs" / "blob")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/blob", snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return snapshot


@pytest.mark.parametrize("spec", ["org/math", "org/math@main", f"org/math@{COMMIT}"])
def test_a_hub_id_resolves_to_the_commit_it_stands_for(hub_cache, spec):
    source = resolve_source(spec, what="expert `m`")
    assert (source.name, source.revision, source.path) == ("org/math", COMMIT, hub_cache)
    # Shards of the cache are links into the blobs of the same repository.
    assert torch.equal(Checkpoint(source.path, what="x").read("a.weight"), tensors()["a.weight"])
    assert describe_source(hub_cache).name == "org/math"
    assert describe_source(hub_cache).revision == COMMIT


def test_a_hub_id_that_cannot_be_had_is_one_line(hub_cache):
    with pytest.raises(
        EPMQInputError, match=r"expert `m`: `org/other@v1` could not be fetched"
    ) as e:
        resolve_source("org/other@v1", what="expert `m`")
    assert "\n" not in str(e.value)
