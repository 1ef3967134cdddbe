"""A push: only what a checkpoint needs, checked first, resumed where it broke, whole or unseen."""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from hub_uploads import User, upload_hub
from huggingface_hub import constants
from judge import stored
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import EPMQConfig, EPMQError, EPMQInputError, EPMQNumericalError, cli
from epmq_gptq.errors import EPMQWarning
from epmq_gptq.publish.push import push

ROOT = Path(__file__).parents[2]
TOKEN, OTHER, READER = "hf_" + "w" * 30, "hf_" + "o" * 30, "hf_" + "r" * 30
WANTED = {
    "README.md",
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00004.safetensors",
    "model-00002-of-00004.safetensors",
    "model-00003-of-00004.safetensors",
    "model-00004-of-00004.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
SHARDS = {name for name in WANTED if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A quantized Llama, not saved yet."""
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, experts=2)
    config = EPMQConfig(group_size=32, experts=experts, alpha=0.1)
    model = tiny.load(merged, config)
    model.quantize({name: tiny.rows(4, 40, seed=1) for name in experts})
    return model


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    """Its checkpoint, in four shards; nobody writes there."""
    folder = tmp_path_factory.mktemp("saved") / "llama-4bit"
    model.save(str(folder), max_shard_size="64KB")
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "private-place" / "llama-4bit"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an owner, a stranger and a reader; this machine has the owner's token."""
    users = {
        TOKEN: User("me", ("org",)),
        OTHER: User("stranger"),
        READER: User("me", ("org",), may_write=False),
    }
    with upload_hub(monkeypatch, tmp_path, **users) as double:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


def refused(code, *parts, kind=EPMQInputError, **options):
    """A push that does not happen; returns the error."""
    with pytest.raises(kind) as caught:
        push(**({"repo_id": "org/llama-4bit"} | options))
    error = caught.value
    assert type(error) is kind and error.code == code, str(error)
    for part in parts:
        assert part in str(error), str(error)
    for secret in (TOKEN, OTHER, READER, "private-place"):
        assert secret not in str(error)
    return error


def same(folder: Path, published: Path, names: set[str]) -> bool:
    return all((folder / n).read_bytes() == (published / n).read_bytes() for n in names)


# ---- what is uploaded --------------------------------------------------------------------------


def plant(folder: Path) -> None:
    """What a folder collects, and no hub should get."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.log").write_text("x")
    (folder / "epmq_statistics").mkdir()
    (folder / "epmq_statistics" / "index.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "config.json").write_text("{}")
    for name in ("calibration.jsonl", "rows.parquet", ".env", "model.safetensors.tmp", "run.py"):
        (folder / name).write_text("x")
    for name in ("config.json~", ".README.md.partial", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("x")
    save_file({"gram": torch.zeros(2)}, folder / "statistics.safetensors")
    (folder / "data").symlink_to(outside)
    (folder / "notes.txt").symlink_to(outside / "secret.txt")
    for name in ("epmq_report.json", "epmq_evaluation.json"):
        (folder / name).write_text('{"schema": 1}')


def test_exactly_what_a_checkpoint_needs_is_uploaded(hub, checkpoint):
    before = sorted(path.name for path in checkpoint.iterdir())
    plant(checkpoint)
    done = push(checkpoint, "org/llama-4bit")
    assert hub.files("org/llama-4bit") == WANTED | {".gitattributes"}
    assert same(checkpoint, hub.folder("org/llama-4bit"), WANTED)
    assert set(done.files) == WANTED and done.bytes == sum(done.files.values())
    assert "calibration.jsonl" in done.left and "epmq_report.json" in done.left
    assert done.url == f"{hub.url}/org/llama-4bit/commit/{done.commit}"
    assert done.created == ["repository"] and not done.unchanged
    assert hub.commits("org/llama-4bit") == 2  # the empty repository, and all of the checkpoint
    assert set(before) <= {path.name for path in checkpoint.iterdir()}
    # The report goes along where it is asked for.
    push(checkpoint, "org/llama-4bit", with_report=True)
    extra = {".gitattributes", "epmq_report.json", "epmq_evaluation.json"}
    assert hub.files("org/llama-4bit") == WANTED | extra


def test_a_folder_that_cannot_be_written_is_pushed(hub, checkpoint):
    (checkpoint / "LICENSE").write_text("Apache License")
    (checkpoint / "NOTICE.txt").write_text("notice")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    checkpoint.chmod(stat.S_IRUSR | stat.S_IXUSR)

    def state():  # of the folder, too: root may write wherever it likes
        return {p: p.stat().st_mtime_ns for p in (checkpoint, *checkpoint.rglob("*"))}

    before = state()
    try:
        push(checkpoint, "org/llama-4bit")
        assert state() == before
    finally:
        checkpoint.chmod(stat.S_IRWXU)
    legal = {"LICENSE", "NOTICE.txt", "additional_chat_templates/tool.jinja"}
    assert hub.files("org/llama-4bit") == WANTED | legal | {".gitattributes"}


def test_what_was_pushed_loads_and_gives_the_same_tokens(hub, original, tmp_path, reader):
    """Pulled back by a process without this package into an empty cache, into plain GPTQModel."""
    push(original, "org/llama-4bit")
    ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
    here = tiny.reload(original)
    expected = here.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist()
    script = f"""
import torch
from gptqmodel import GPTQModel
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session
was_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
close_session()
try:
    folder = snapshot_download(
        "org/llama-4bit", endpoint={hub.url!r}, cache_dir="fresh", token=False
    )
finally:
    constants.HF_HUB_OFFLINE = was_offline
    close_session()
model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend="gptq_torch")
ids = torch.tensor({ids.tolist()})
tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist()
print("FOLDER", folder)
print("TOKENS", tokens)
"""
    printed = reader.run(script, tmp_path)
    said = dict(line.split(" ", 1) for line in printed.splitlines() if line[:6].isupper())
    pulled = tmp_path / said["FOLDER"]
    assert tmp_path / "fresh" in pulled.parents
    assert same(original, pulled, WANTED)
    assert json.loads(said["TOKENS"]) == expected and len(expected) == 14
    tensors, ours = stored(pulled), stored(original)
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name], ours[name]) for name in ours)


# ---- resuming ----------------------------------------------------------------------------------


def test_a_push_that_broke_off_goes_on_where_it_was(hub, checkpoint):
    hub.fails_after = 2
    refused("EPMQ-P02", "`org/llama-4bit`", "Request has expired", folder=checkpoint)
    assert len(hub.put) == 2
    assert hub.files("org/llama-4bit") == {".gitattributes"}  # nothing half shows
    hub.fails_after = None
    first = list(hub.put)
    hub.put.clear()
    done = push(checkpoint, "org/llama-4bit")
    assert len(hub.put) == 2 and not set(first) & set(hub.put)
    assert hub.files("org/llama-4bit") == WANTED | {".gitattributes"}
    assert done.created == [] and hub.commits("org/llama-4bit") == 2
    # Once more: nothing is sent, and there is no empty commit.
    hub.put.clear()
    again = push(checkpoint, "org/llama-4bit")
    assert again.unchanged and again.commit == done.commit and hub.put == []
    assert hub.commits("org/llama-4bit") == 2


def test_a_hub_that_goes_down_is_no_traceback(hub, checkpoint, monkeypatch):
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between attempts
    push(checkpoint, "org/llama-4bit")
    hub.is_down = True
    refused(
        "EPMQ-P04",
        "the upload to `org/llama-4bit` did not come to its end",
        "Push again",
        kind=EPMQError,
        folder=checkpoint,
    )


def test_a_smaller_checkpoint_replaces_the_shards_of_the_first(hub, original, tmp_path):
    push(original, "org/llama-4bit")
    tensors = stored(original)
    second = Path(shutil.copytree(original, tmp_path / "second"))
    for name in (*SHARDS, "model.safetensors.index.json"):
        (second / name).unlink()
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    done = push(second, "org/llama-4bit")
    assert set(done.removed) == SHARDS | {"model.safetensors.index.json"}
    kept = {name for name in hub.files("org/llama-4bit") if "safetensors" in name}
    assert kept == {"model.safetensors"}


def test_a_gitignore_of_the_repository_leaves_nothing_out(hub, checkpoint, tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / ".gitignore").write_text("*.safetensors\n*.json\n")
    hub.add("org/llama-4bit", tmp_path / "repo")
    push(checkpoint, "org/llama-4bit")
    assert hub.files("org/llama-4bit") == WANTED | {".gitignore"}


# ---- repositories, branches, pull requests -----------------------------------------------------


def test_a_branch_is_made_and_main_stays(hub, checkpoint):
    done = push(checkpoint, "org/llama-4bit", revision="gptq/4bit", private=True)
    assert done.created == ["repository", "branch"] and done.revision == "gptq/4bit"
    assert hub.files("org/llama-4bit") == {".gitattributes"}
    assert hub.files("org/llama-4bit", "gptq/4bit") == WANTED | {".gitattributes"}
    assert hub.repositories["org/llama-4bit"].private
    assert push(checkpoint, "org/llama-4bit", revision="gptq/4bit").created == []


def test_a_pull_request_takes_no_right_to_write(hub, checkpoint, monkeypatch):
    push(checkpoint, "org/llama-4bit", commit_message="first")
    card = (checkpoint / "README.md").read_text() + "\nmore\n"
    (checkpoint / "README.md").write_text(card)
    monkeypatch.setenv("HF_TOKEN", OTHER)
    refused("EPMQ-P02", "may not write to `org/llama-4bit`", "`create_pr`", folder=checkpoint)
    done = push(checkpoint, "org/llama-4bit", create_pr=True)
    assert done.url == f"{hub.url}/org/llama-4bit/discussions/1"
    assert hub.pull_requests == {"org/llama-4bit": {"refs/pr/1": "main"}}
    assert (hub.folder("org/llama-4bit", "refs/pr/1") / "README.md").read_text() == card
    assert (hub.folder("org/llama-4bit") / "README.md").read_text() != card
    refused("EPMQ-P03", "is not there", folder=checkpoint, repo_id="org/none", create_pr=True)
    wrong = dict(folder=checkpoint, create_pr=True, revision="nowhere")
    refused("EPMQ-P03", "has no branch `nowhere`", **wrong)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (checkpoint / "README.md").write_text(card + "still more\n")
    done = push(checkpoint, "org/llama-4bit", revision="refs/pr/1")
    assert done.created == [] and hub.commits("org/llama-4bit") == 4
    refused("EPMQ-P03", "is not there", folder=checkpoint, revision="refs/pr/9")


def test_a_name_without_an_owner_is_ones_own(hub, checkpoint):
    assert push(checkpoint, "llama-4bit").repo_id == "me/llama-4bit"
    assert hub.files("me/llama-4bit") == WANTED | {".gitattributes"}


def test_a_repository_that_would_lose_its_model_is_left_alone(hub, checkpoint, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, dense / "model.safetensors")
    hub.add("org/merged", dense)
    refused("EPMQ-P03", "not quantized", "`revision`", folder=checkpoint, repo_id="org/merged")
    assert hub.put == [] and hub.commits("org/merged") == 1
    done = push(checkpoint, "org/merged", revision="4bit")
    assert done.removed == ["model.safetensors"]
    assert hub.files("org/merged", "4bit") == WANTED
    assert hub.files("org/merged") == {"config.json", "model.safetensors"}


def test_private_is_not_quietly_public(hub, checkpoint):
    push(checkpoint, "org/llama-4bit")
    refused("EPMQ-P03", "is public, and `private` was asked for", folder=checkpoint, private=True)


def test_somebody_who_commits_meanwhile_is_not_overwritten(hub, checkpoint, monkeypatch, tmp_path):
    push(checkpoint, "org/llama-4bit")
    (checkpoint / "README.md").write_text("---\ntags: [x]\n---\n")
    preupload = hub._preupload

    def meanwhile(request, folder, asked):
        monkeypatch.setattr(hub, "_preupload", preupload)
        hub.add("org/llama-4bit", Path(shutil.copytree(folder, tmp_path / "theirs")))
        preupload(request, folder, asked)

    monkeypatch.setattr(hub, "_preupload", meanwhile)
    refused("EPMQ-P03", "was changed by somebody else meanwhile", folder=checkpoint)
    assert push(checkpoint, "org/llama-4bit").commit


# ---- tokens ------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_asked(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused("EPMQ-P02", "no access token", "hf auth login", "`HF_TOKEN`", folder=checkpoint)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "code", "part"),
    [
        ("hf_" + "x" * 30, "EPMQ-P02", "does not accept the access token"),
        (READER, "EPMQ-P02", "may not write to `org/llama-4bit`"),
    ],
)
def test_a_token_that_is_not_the_right_one(hub, checkpoint, token, code, part):
    error = refused(code, part, folder=checkpoint, token=token)
    assert token not in repr(error.__dict__) and error.__cause__ is None
    assert hub.tokens_seen <= {token, None} and hub.put == []


def test_an_explicit_token_goes_before_the_stored_one(hub, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OTHER)
    push(checkpoint, "org/llama-4bit", token=TOKEN)
    assert hub.tokens_seen <= {TOKEN, None}


def test_a_private_repository_of_others_is_not_told_of(hub, checkpoint, tmp_path):
    (tmp_path / "repo").mkdir()
    hub.add("stranger/theirs", tmp_path / "repo")
    hub.repositories["stranger/theirs"].private = True
    refused("EPMQ-P02", "may not write", folder=checkpoint, repo_id="stranger/theirs")
    assert hub.put == []


def test_offline_is_said(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    refused("EPMQ-P03", "`HF_HUB_OFFLINE` is set", folder=checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    assert hub.requests == []


# ---- checks before anything is sent ------------------------------------------------------------


def edit(folder: Path, name: str, **changes) -> None:
    data = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(data))


def spoil(folder: Path, suffix: str, change) -> None:
    """Change one tensor of the checkpoint."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        name = next((name for name in tensors if name.endswith(suffix)), None)
        if name is not None:
            tensors[name] = change(tensors[name].clone())
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(suffix)


def with_nan(tensor):
    tensor.view(-1)[3] = float("nan")
    return tensor


def of_config(folder):
    inner = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, "config.json", quantization_config=inner | {"bits": 8})


FAULTS = {
    "a shard is missing": (
        "EPMQ-F11",
        lambda folder: (folder / "model-00003-of-00004.safetensors").unlink(),
    ),
    "a shard is cut": (
        "EPMQ-F12",
        lambda folder: os.truncate(folder / "model-00003-of-00004.safetensors", 30000),
    ),
    "no configuration": ("EPMQ-F11", lambda folder: (folder / "config.json").unlink()),
    "two configurations": ("EPMQ-P01", of_config),
    "no setting": ("EPMQ-P01", lambda folder: edit(folder, "quantize_config.json", bits="4")),
    "not the group size": (
        "EPMQ-P01",
        lambda folder: [
            edit(folder, "quantize_config.json", group_size=64),
            edit(folder, "config.json", quantization_config={}),
        ],
    ),
    "a path in a configuration": (
        "EPMQ-P01",
        lambda folder: edit(folder, "config.json", _name_or_path="/srv/models/secret"),
    ),
    "our own folder in a configuration": (
        "EPMQ-P01",
        lambda folder: edit(folder, "tokenizer_config.json", note=f"from {folder.resolve()}"),
    ),
    "a token in a configuration": (
        "EPMQ-P01",
        lambda folder: edit(folder, "generation_config.json", token=TOKEN),
    ),
    "a token in the vocabulary": (
        "EPMQ-P01",
        lambda folder: edit(folder, "tokenizer.json", note=TOKEN),
    ),
    "a path in the card": (
        "EPMQ-P01",
        lambda folder: (folder / "README.md").write_text("---\ntags: []\n---\nin /home/me/x\n"),
    ),
    "metadata that is none": (
        "EPMQ-P01",
        lambda folder: (folder / "README.md").write_text("---\ntags: [\n---\n"),
    ),
    "code": (
        "EPMQ-P01",
        lambda folder: edit(folder, "config.json", auto_map={"AutoModel": "modeling_x.X"}),
    ),
    "a licence from elsewhere": (
        "EPMQ-F10",
        lambda folder: [
            (folder.parent / "LICENSE").write_text("x"),
            (folder / "LICENSE").symlink_to(folder.parent / "LICENSE"),
        ],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_fit_is_refused_before_any_request(hub, checkpoint, fault):
    code, change = FAULTS[fault]
    change(checkpoint)
    refused(code, folder=checkpoint)
    assert hub.requests == []


def test_a_scale_that_is_no_number_is_refused(hub, checkpoint):
    spoil(checkpoint, ".scales", with_nan)
    refused("EPMQ-N01", ".scales`", "non-finite", kind=EPMQNumericalError, folder=checkpoint)
    assert hub.requests == []


def test_a_layer_that_lacks_a_part_is_refused(hub, checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if name.endswith(".qzeros"))
    file = checkpoint / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("EPMQ-P01", f"lacks `{name}`", folder=checkpoint)
    assert hub.requests == []


def test_code_goes_along_only_where_it_is_asked_for(hub, checkpoint):
    edit(checkpoint, "config.json", auto_map={"AutoModel": "modeling_x.X"})
    for name in ("modeling_x.py", "helper.py"):
        (checkpoint / name).write_text("x = 1\n")
    refused("EPMQ-P01", "modeling_x.py", "`--with-code`", folder=checkpoint)
    push(checkpoint, "org/llama-4bit", with_code=True)
    assert {"modeling_x.py", "helper.py"} <= hub.files("org/llama-4bit")
    # Code of another repository is not ours to upload, nor to refuse.
    edit(checkpoint, "config.json", auto_map={"AutoModel": "org/code--modeling_x.X"})
    assert "helper.py" in push(checkpoint, "org/other").left


@pytest.mark.parametrize(
    "option",
    [
        {"repo_id": "org/a/b"},
        {"repo_id": "org/na me"},
        {"repo_id": "-x"},
        {"repo_id": ""},
        {"revision": "a..b"},
        {"revision": "-b"},
        {"revision": "a" * 40},
        {"revision": "refs/heads/../x"},
    ],
)
def test_names_that_are_none(hub, checkpoint, option):
    refused("EPMQ-P03", f"`{next(iter(option))}` should be", folder=checkpoint, **option)
    assert hub.requests == []


def test_a_card_that_the_hub_refuses_stops_it_before_anything_is_made(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(
        hub, "_validate", lambda request, content: request.refuse(400, "", "license is unknown")
    )
    refused("EPMQ-P01", "license is unknown", folder=checkpoint)
    assert hub.put == [] and hub.repositories == {}


def test_a_checkpoint_without_a_card_is_pushed_with_a_hint(hub, checkpoint):
    (checkpoint / "README.md").unlink()
    with pytest.warns(EPMQWarning, match="no `README.md`: `epmq-gptq card llama-4bit`"):
        push(checkpoint, "org/llama-4bit")


def test_a_licence_of_its_own_wants_its_text(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    with pytest.warns(EPMQWarning, match="put a `LICENSE` into `llama-4bit`"):
        push(checkpoint, "org/llama-4bit", dry_run=True)
    (checkpoint / "LICENSE").write_text("Do as you like.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EPMQWarning)
        push(checkpoint, "org/llama-4bit", dry_run=True)


def test_a_vocabulary_may_hold_any_string(hub, checkpoint):
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {"/home/me/models": 300, str(checkpoint): 301}
    (checkpoint / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "tokenizer.json" in push(checkpoint, "org/llama-4bit", dry_run=True).files


# ---- the model in memory -----------------------------------------------------------------------


def test_a_model_pushes_what_it_saved(hub, model, original):
    done = model.push_to_hub("org/llama-4bit", revision="v1")
    assert hub.files("org/llama-4bit", "v1") == WANTED | {".gitattributes"}
    assert done.revision == "v1" and str(done) == done.url


def test_a_model_that_is_not_saved_is_saved_first(hub, model, original, monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(model, "epmq_saved", tmp_path / "gone")
    done = model.push_to_hub("org/llama-4bit")
    published = hub.folder("org/llama-4bit")
    assert "model.safetensors" in done.files
    ours, theirs = stored(original), stored(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("epmq-push")] == []


def test_other_models_keep_what_they_had(hub, tmp_path):
    from gptqmodel import BACKEND  # noqa: F401
    from gptqmodel.quantization.config import GPTQConfig

    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    plain = tiny.load(merged, GPTQConfig(group_size=32))
    # The host's objects hand on what they do not know to the transformers model they wrap.
    assert plain.push_to_hub == plain.model.push_to_hub
    ours = tiny.load(merged, EPMQConfig(group_size=32, experts=experts))
    with pytest.raises(EPMQInputError, match="`push_to_hub` came before `quantize`") as caught:
        ours.push_to_hub("org/llama-4bit")
    assert caught.value.code == "EPMQ-F52" and hub.requests == []


# ---- the command -------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_dry_run_lists_everything_and_asks_nobody(hub, checkpoint, monkeypatch, tmp_path):
    plant(checkpoint)
    monkeypatch.delenv("HF_TOKEN")
    result = run("push", checkpoint, "org/llama-4bit", "--dry-run")
    assert result.exit_code == 0, result.output
    for name in WANTED:
        assert name in result.stdout
    assert "11 files" in result.stdout and "kB" in result.stdout
    assert "would push  org/llama-4bit@main: " in result.stdout
    assert "stays here" in result.stdout and "calibration.jsonl" in result.stdout
    assert str(tmp_path) not in result.stdout
    result = run("push", checkpoint, "org/llama-4bit", "--dry-run", "--with-report", "--json", "-")
    data = json.loads(result.stdout)
    assert set(data["files"]) == WANTED | {"epmq_report.json", "epmq_evaluation.json"}
    assert data["url"] is None
    assert hub.requests == []


def test_the_command_says_what_it_did(hub, checkpoint, tmp_path):
    options = ("--revision", "4bit", "--private", "--message", "two\nlines")
    result = run("push", checkpoint, "org/llama-4bit", *options, "--json", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    done = json.loads((tmp_path / "x.json").read_text())
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "created repository org/llama-4bit" in lines and "created branch 4bit" in lines
    pushed = next(line for line in lines if line.startswith("pushed "))
    assert pushed.startswith(f"pushed {done['url']}: ") and lines[-1].startswith("report ")
    assert any(line.startswith("upload ") and "MB" in line for line in lines)
    again = run("push", checkpoint, "org/llama-4bit", "--revision", "4bit")
    assert again.stdout.splitlines()[-1].startswith("unchanged   ")
    refusal = run("push", checkpoint, "stranger/x")
    assert refusal.exit_code == 2 and "[EPMQ-P02]" in refusal.stderr
    assert TOKEN not in result.output + again.output + refusal.output
