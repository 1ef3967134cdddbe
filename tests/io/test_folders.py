"""What a host may be pointed at: a folder that holds every file of the model, in safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.io.checkpoints import Checkpoint, check_folder
from epmq_gptq.io.folders import MAX_CONFIG_BYTES


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder with a configuration and a tokenizer."""
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\xff\x00")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("")
    return folder


def refused(folder: Path, code: str, cause: str) -> EPMQInputError:
    with pytest.raises(EPMQInputError, match=cause) as caught:
        check_folder(folder, what="the merged model")
    error = caught.value
    assert error.code == f"EPMQ-{code}" and error.cause.startswith("the merged model: ")
    assert error.subject and error.remedy.endswith(".") and str(folder.parent) not in str(error)
    return error


def test_a_whole_model_passes_and_is_left_as_it_was(folder):
    before = sorted(folder.rglob("*"))
    assert check_folder(folder, what="the merged model") is None
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "model.safetensors",
    ],
)
def test_a_link_out_of_the_folder_is_refused_whatever_it_is(folder, name):
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    os.symlink(secret, folder / name)
    assert name in refused(folder, "F10", "is a link that escapes the checkpoint").subject
    secret.unlink()
    refused(folder, "F15", "is a link that leads nowhere")


def test_a_folder_of_templates_that_is_elsewhere_is_refused(folder):
    place = folder / "additional_chat_templates"
    os.replace(place, folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", place)
    refused(folder, "F10", "`additional_chat_templates/tools.jinja` is a link that escapes")


def test_a_link_that_no_host_reads_does_not_matter(folder):
    os.symlink("/etc/hostname", folder / "training.log")
    check_folder(folder, what="the merged model")


def test_the_hub_cache_is_links_into_its_own_blobs(folder):
    repository = folder.parent / "models--org--merged"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    os.replace(folder, repository / "blobs")
    for name in ("model.safetensors", "config.json"):
        os.symlink(f"../../blobs/{name}", snapshot / name)
    check_folder(snapshot, what="the merged model")
    os.symlink("../../../secret", snapshot / "tokenizer.json")
    (folder.parent / "secret").write_text("{}")
    refused(snapshot, "F10", "`tokenizer.json` is a link that escapes")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"{", "is not readable as JSON"),
        (b"", "is not readable as JSON"),
        (b'{"a": ' * 50_000, "is not readable as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not readable as JSON"),
        (b"\xef\xbb\xbf{}", "is not readable as JSON"),
        (b'{"\xe9": 1}', "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b"[]", "should be a JSON object, got list"),
        (b"null", "should be a JSON object, got NoneType"),
        (b" " * (MAX_CONFIG_BYTES + 1), "has 10,000,001 bytes, more than 10,000,000"),
    ],
    ids=["cut", "empty", "deep", "long number", "mark", "latin-1", "utf-16", "list", "null", "big"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_not_one_is_refused(folder, name, content, cause):
    (folder / name).write_bytes(content)
    assert refused(folder, "F13", f"`{name}` {cause}").subject == f"`{name}`"
    if name == "config.json":
        with pytest.raises(EPMQInputError, match=cause):
            Checkpoint(folder, what="x").config()


def test_a_configuration_that_is_no_file_is_refused(folder):
    (folder / "config.json").unlink()
    assert Checkpoint(folder, what="x").config() == {}
    os.mkfifo(folder / "config.json")  # reading it would wait for ever
    refused(folder, "F15", "`config.json` is not a regular file")


@pytest.mark.parametrize(
    ("files", "code", "cause"),
    [
        (["pytorch_model.bin", "training_args.bin"], "F14", "`pytorch_model.bin`, and pickle"),
        (["consolidated.00.pth"], "F14", "`consolidated.00.pth`, and pickle files are never"),
        (["model-q4.gguf"], "F14", "`model-q4.gguf`, a format that is not read"),
        (["adapter_config.json", "adapter_model.safetensors"], "F34", "holds an adapter"),
        ([], "F15", "no safetensors weights"),
    ],
)
def test_weights_that_a_host_would_convert_or_ask_others_for(folder, files, code, cause):
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    refused(folder, code, cause)


def test_an_adapter_beside_the_model_would_replace_it(folder):
    """transformers reads `adapter_config.json` first, and loads the base that it names."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    refused(folder, "F34", "beside a model, so that one of them would be ignored")


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "gone", "F15", "`gone` is not a folder")
