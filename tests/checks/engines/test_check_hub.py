"""A hub's checkpoint is judged by its headers, its configuration and a few zero points."""

from __future__ import annotations

import made
import pytest
from made import damaged

from epmq_gptq.checks.engines import check_checkpoint
from epmq_gptq.checks.engines.check import REMOTE_LAYERS
from epmq_gptq.errors import EPMQInputError


def test_headers_are_enough(hub, checkpoint, tmp_path):
    local = check_checkpoint(checkpoint("bfloat16"))
    commit = hub.add("org/model", checkpoint("bfloat16"))
    report = check_checkpoint("org/model")
    assert (report.name, report.revision) == ("org/model", commit)
    assert report.engines == local.engines and report.found == local.found
    # No tensor but zero points and orders was asked for, and nothing is left in the cache.
    size = (checkpoint("bfloat16") / "model.safetensors").stat().st_size
    assert 0 < hub.sent < size / 2 + 100_001
    assert not (tmp_path / "cache").exists()


def test_it_is_read_at_the_revision(hub, checkpoint, tmp_path):
    hub.add("org/model", checkpoint("bfloat16"), "main")
    wrong = damaged(
        checkpoint("bfloat16"),
        tmp_path,
        config=lambda c: c["quantization_config"].update(bits=8),
    )
    commit = hub.add("org/model", wrong, "wrong")
    assert made.checked("org/model@main") == "yes yes yes yes"
    report = check_checkpoint("org/model@wrong")
    assert report.revision == commit and made.verdicts(report) == "no no no yes"
    assert made.checked(f"org/model@{commit}") == "no no no yes"


def test_shards_are_read_by_their_index(hub, checkpoint, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    folder = damaged(checkpoint("bfloat16"), tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    hub.add("org/shards", folder)
    assert check_checkpoint("org/shards").found == check_checkpoint(folder).found
    assert check_checkpoint(folder).found["files"] == 2


def test_only_some_layers_are_read(hub, checkpoint):
    hub.add("org/moe", checkpoint("moe"))
    found = check_checkpoint("org/moe").found
    assert found["layers"] == 16 > REMOTE_LAYERS
    assert found["zero_points"] == {"read": REMOTE_LAYERS, "v1": REMOTE_LAYERS}


def test_what_cannot_be_had_is_one_line(hub, checkpoint):
    hub.add("org/secret", checkpoint("bfloat16"), gated=True)
    hub.add("org/dense", checkpoint("bfloat16").parent / "sources" / "merged")
    for name, code, told in (
        ("org/none", "EPMQ-F16", "no `org/none` on the hub"),
        ("org/dense@old", "EPMQ-F16", "no revision `old`"),
        ("org/secret", "EPMQ-F16", "gated"),
        ("org/dense", "EPMQ-F56", "no packed layer"),
    ):
        with pytest.raises(EPMQInputError) as caught:
            check_checkpoint(name)
        assert caught.value.code == code and told in str(caught.value), str(caught.value)
    hub.is_down = True
    with pytest.raises(EPMQInputError):
        check_checkpoint("org/dense")
