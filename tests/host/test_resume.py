"""A run that was broken off goes on at the last layer that it committed, to the same tensors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES
from gptqmodel import CheckpointConfig, CheckpointStopped
from judge import stored
from lora import peft_model
from resume_runs import Broken, Run, assert_same, broken_at, goes_on
from safetensors.torch import load_file, save_file

from epmq_gptq import EPMQError, EPMQInputError, EPMQStopped
from epmq_gptq.host.processor import EPMQProcessor
from epmq_gptq.host.resume import session
from epmq_gptq.host.resume.attempts import Attempt, clear_dead
from epmq_gptq.host.resume.digests import remembered
from epmq_gptq.host.resume.session import PROVEN

LANGUAGE = [name for name in FAMILIES if "tied" not in name]


def language(folder, build=None, **options) -> Run:
    torch.manual_seed(0)
    model = tiny.llama(layers=3) if build is None else build(layers=3).eval()
    merged, experts = tiny.family(folder, experts=2, model=model)
    rows = {name: tiny.rows(5 + index, 50, seed=index) for index, name in enumerate(experts)}
    return Run(folder, merged, experts, rows, **options)


# ---- every architecture --------------------------------------------------------------------------


@pytest.mark.parametrize("family", LANGUAGE)
def test_every_language_model(family, tmp_path):
    run = language(tmp_path, FAMILIES[family])
    layers = "h" if family == "gpt2" else "layers"
    whole, resumed = goes_on(run, f"{layers}.1", f"{layers}.2")
    assert whole.model.config.model_type in PROVEN
    before, after = (
        [(m.module, m.excess, m.tokens, m.alpha, m.experts) for m in model.epmq_report.modules]
        for model in (whole, resumed)
    )
    assert before == after and len(before) > 3


# ---- every option that keeps something from layer to layer ---------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(profile="paper", alpha=0.1),
        dict(profile="gptq"),
        dict(save_statistics=True),
        dict(weighting="minmax", alpha=0.1),
        dict(bits=8, desc_act=True, act_group_aware=False),
        dict(dynamic={r"-:layers\.0\.mlp": {}, r"layers\.1\.": {"bits": 8}}),
        dict(lm_head=True),
    ],
    ids=lambda options: ",".join(options),
)
def test_every_kind_of_run(tmp_path, options):
    run = language(tmp_path, **options)
    whole, resumed = goes_on(run, "layers.1", "layers.2")
    if options.get("save_statistics"):
        one, other = (tmp_path / name / "epmq_statistics" for name in ("whole", "resumed"))
        assert_same(stored(one), stored(other))
        groups = [json.loads((f / "index.json").read_text())["groups"] for f in (one, other)]
        assert [len(group["layers"]) for group in groups[0]] == [3, 1, 2, 1] * 3
        for group, again in zip(*groups, strict=True):
            assert group | {"sha256": ""} == again | {"sha256": ""}
        for model in (whole, resumed):
            model.epmq_statistics.close()


def test_a_head_that_is_quantized_last(tmp_path):
    goes_on(language(tmp_path, lm_head=True), "lm_head")


def test_lora_experts_and_models_in_memory(tmp_path):
    run = language(tmp_path)
    adapter = peft_model(tiny.llama(layers=3), seed=3)
    adapter.save_pretrained(tmp_path / "lora")
    tiny.save(tiny.llama(layers=3), tmp_path / "base")
    run.experts = {
        "expert0": f"{tmp_path / 'base'}+{tmp_path / 'lora'}",
        "expert1": load_file(run.experts["expert1"] / "model.safetensors"),
    }
    goes_on(run, "layers.1")


def test_an_expert_that_was_left_stays_left(tmp_path):
    run = language(tmp_path, on_bad_module="rtn")
    file = run.experts["expert1"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    whole, resumed = goes_on(run, "layers.1")
    assert resumed.epmq_report.left == whole.epmq_report.left != {}


# ---- what it goes on with ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Run:
    """A run with one committed layer; tests take copies of its checkpoint."""
    run = language(tmp_path_factory.mktemp("begun"))
    with broken_at("layers.1"), pytest.raises(Broken):
        run.attempt()
    return run


@pytest.fixture
def copied(begun, tmp_path) -> Run:
    shutil.copytree(begun.root, tmp_path / "checkpoint")
    run = Run(tmp_path, begun.merged, dict(begun.experts), dict(begun.rows), **begun.options)
    return run


@pytest.fixture
def untouched(monkeypatch):
    from gptqmodel.looper.module_looper import ModuleLooper

    def run(*arguments, **options):
        raise AssertionError("the loop was entered")

    monkeypatch.setattr(ModuleLooper, "loop", run)


def other_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(bits=8), "`bits` was 4, is 8"),
        (dict(alpha=0.5), '`alpha` was "auto", is 0.5'),
        (dict(rho=0.5, held_out=0.2), "`held_out` was 0.125, is 0.2; `rho` was 1.0, is 0.5"),
    ],
)
def test_another_option_is_refused_by_name(copied, untouched, changes, said):
    with pytest.raises(EPMQInputError, match="is of another run") as caught:
        copied.attempt(**changes)
    assert said in caught.value.cause and caught.value.code == "EPMQ-F41"
    assert {p.name for p in copied.root.iterdir()} <= set(session._OURS)


@pytest.mark.parametrize("profile", ["own passes", "paper"])
def test_a_smaller_batch_size_goes_on(tmp_path, profile):
    """After a lack of memory; whoever asks for more again goes on with the smaller one."""
    run = language(tmp_path, **({} if profile == "own passes" else dict(profile="paper")))
    whole = run.attempt(resume=None)
    for place, size in (("layers.1", 3), ("layers.2", 2)):
        with broken_at(place), pytest.raises(Broken):
            run.attempt(batch_size=size)
    resumed = run.attempt(resume="required", batch_size=4)
    assert resumed.epmq_report.attempts == 3
    one, other = (
        [(m.module, m.tokens, m.alpha) for m in model.epmq_report.modules]
        for model in (whole, resumed)
    )
    assert one == other
    # The order of floating sums changes, which may turn single roundings.
    saved, expected = run.saved(resumed, "resumed"), run.saved(whole, "whole")
    for name in expected:
        if name.endswith("qweight"):
            assert (saved[name] != expected[name]).float().mean() < 0.02, name
        else:
            torch.testing.assert_close(saved[name], expected[name], rtol=1e-3, atol=1e-5)


def test_another_expert_or_merge_or_rows_are_refused_by_name(copied, untouched, tmp_path):
    def refused(said, **changes):
        before = {name: getattr(copied, name) for name in changes}
        for name, value in changes.items():
            setattr(copied, name, value)
        with pytest.raises(EPMQInputError, match=said) as caught:
            copied.attempt()
        assert caught.value.code == "EPMQ-F41"
        for name, value in before.items():
            setattr(copied, name, value)

    experts = copied.experts
    trained = other_weights(experts["expert1"], tmp_path / "trained")
    refused("run: expert `expert1` changed", experts=experts | {"expert1": trained})
    merged = other_weights(copied.merged, tmp_path / "merged")
    refused("run: merged model changed", merged=merged)
    turned = {"expert1": experts["expert1"], "expert0": experts["expert0"]}
    refused("order of the experts changed", experts=turned)
    rows = dict(copied.rows)
    rows["expert1"] = [*rows["expert1"][:-1], {"input_ids": [7] * 50}]
    refused("run: calibration rows changed", rows=rows)


def test_other_versions_are_refused_by_name(copied, untouched, monkeypatch):
    monkeypatch.setattr("epmq_gptq.__version__", "0.0.9")
    with pytest.raises(EPMQInputError, match=r"version of epmq_gptq was \S+, is 0.0.9"):
        copied.attempt()


def test_models_may_have_moved(copied, tmp_path):
    copied.experts = {
        name: Path(shutil.copytree(folder, tmp_path / f"moved-{name}"))
        for name, folder in copied.experts.items()
    }
    assert copied.attempt(resume="required").epmq_report.attempts == 2


def test_models_of_the_hubs_cache(tmp_path):
    """There, files are links to blobs, which the host's own checkpoints refuse."""
    run = language(tmp_path)
    cache = tmp_path / "models--org--merged"
    snapshot = cache / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for index, file in enumerate(sorted(run.merged.iterdir())):
        shutil.copy(file, cache / "blobs" / str(index))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(index)))
    run.merged = snapshot
    goes_on(run, "layers.1")


def test_the_content_of_models_is_hashed_once(copied, monkeypatch):
    from epmq_gptq.io import checkpoints

    known = json.loads((copied.root / "digests.json").read_text())
    assert len(known) == 3
    checkpoints.known_digests.clear()
    monkeypatch.setattr(checkpoints.hashlib, "sha256", None)
    with remembered(copied.root, []):
        for path, *_, digest in known:
            assert checkpoints.file_digest(Path(path)) == digest


def test_what_resume_says_is_kept(copied, untouched, tmp_path):
    with pytest.raises(EPMQInputError, match="resume='never' requires a new directory") as caught:
        copied.attempt(resume="never")
    assert caught.value.code == "EPMQ-F42"
    copied.root = tmp_path / "new"
    with pytest.raises(EPMQInputError, match="no checkpoint is published"):
        copied.attempt(resume="required")


def test_a_damaged_layer_falls_back_to_the_one_before(begun, tmp_path):
    run = language(tmp_path)
    with broken_at("layers.2"), pytest.raises(Broken):
        run.attempt()
    newest, before = json.loads((run.root / "CURRENT").read_text())["generations"]
    manifest = json.loads((run.root / "objects" / newest).read_text())
    (run.root / "objects" / manifest["continuation"]).write_bytes(b"damaged")
    resumed = run.attempt(resume="required")
    assert_same(run.saved(resumed, "resumed"), run.saved(run.attempt(resume=None), "whole"))
    for file in (run.root / "objects").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(EPMQInputError, match="no complete published checkpoint") as caught:
        run.attempt()
    assert caught.value.code == "EPMQ-F42"


# ---- folders -------------------------------------------------------------------------------------


def test_folders_of_attempts_are_removed(tmp_path):
    run = language(tmp_path)
    with broken_at("layers.1"), pytest.raises(Broken):
        run.attempt()
    assert list(run.root.glob("attempt-*")) == []
    dead = run.root / "attempt-dead"
    dead.mkdir()
    (dead / "layer").write_text("of a process that was killed")
    model = run.attempt()
    held = list(run.root.glob("attempt-*"))
    assert len(held) == 1 and not dead.exists()
    # Nothing of a run that is not saved yet is taken away by the next one.
    again = run.attempt()
    assert len(list(run.root.glob("attempt-*"))) == 2
    assert_same(run.saved(model, "first"), run.saved(again, "second"))
    for one in (model, again):
        one.quantize_config.close()
    assert list(run.root.glob("attempt-*")) == []


def test_an_attempt_is_dead_when_nobody_holds_it(tmp_path):
    attempt = Attempt(tmp_path)
    assert clear_dead(tmp_path) == 0 and attempt.path.is_dir()
    attempt.cleanup()
    attempt.cleanup()
    (tmp_path / "attempt-old").mkdir()
    assert clear_dead(tmp_path) == 1 and list(tmp_path.iterdir()) == []


def test_folders_that_are_somebodys_are_refused(begun, untouched, tmp_path):
    run = Run(tmp_path, begun.merged, begun.experts, begun.rows)

    def refused(root, said):
        run.root = root
        with pytest.raises(EPMQInputError, match=said) as caught:
            run.attempt()
        assert caught.value.code == "EPMQ-F45"

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    refused(tmp_path / "thesis", r"got `thesis`, which holds `chapter1.tex`")
    refused(begun.merged / "inside", "inside the folder of the merged model")
    refused(begun.experts["expert1"], "inside the folder of the expert `expert1`")
    refused(Path("/proc/nowhere"), "takes no new folder")


@pytest.mark.parametrize(
    ("options", "checkpoint", "said"),
    [
        ({}, "folder", "should be a `gptqmodel.CheckpointConfig`"),
        ({}, CheckpointConfig(), "temporary folder, which is gone with the process"),
        (dict(offload_to_disk=False), CheckpointConfig("x"), "needs `offload_to_disk=True`"),
        (dict(true_sequential=False), CheckpointConfig("x"), "needs `true_sequential=True`"),
    ],
)
def test_checkpoints_that_cannot_be(begun, untouched, options, checkpoint, said):
    from epmq_gptq import EPMQConfig

    model = tiny.load(begun.merged, EPMQConfig(group_size=32, experts=begun.experts, **options))
    wrong = TypeError if isinstance(checkpoint, str) else EPMQInputError
    with pytest.raises(wrong, match=said if wrong is EPMQInputError else "CheckpointConfig"):
        model.quantize(begun.rows, checkpoint=checkpoint)


def test_an_architecture_that_was_not_tried_is_refused(begun, untouched, monkeypatch):
    monkeypatch.setattr(session, "PROVEN", PROVEN - {"llama"})
    with pytest.raises(EPMQInputError, match="has not been tried with `llama` models"):
        begun.attempt()


def test_two_at_once_are_refused(copied, untouched):
    from gptqmodel.looper.checkpoint_store import CheckpointStore

    with CheckpointStore(CheckpointConfig(copied.root)):
        with pytest.raises(EPMQInputError, match="another process is writing") as caught:
            copied.attempt()
    assert caught.value.code == "EPMQ-F43"


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_layer(copied, monkeypatch, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    process = EPMQProcessor.process

    def signalled(self, module, *arguments, **options):
        if module.full_name == "model.layers.1.self_attn.o_proj":
            os.kill(os.getpid(), number)
        return process(self, module, *arguments, **options)

    monkeypatch.setattr(EPMQProcessor, "process", signalled)
    monkeypatch.setattr(session, "SHARE", 0.0)  # no layer is due by its time
    with pytest.warns(UserWarning, match="stopping at the end of this layer"):
        with pytest.raises(EPMQStopped, match="stopped after 2 of 3 layers") as caught:
            copied.attempt()
    assert isinstance(caught.value, CheckpointStopped) and caught.value.code == "EPMQ-F40"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.undo()
    counted = []
    begin = EPMQProcessor.begin_shared_input_capture

    def count(self, model, names, **options):
        counted.extend(self.tasks[name].full_name for name in names if name in self.tasks)
        return begin(self, model, names, **options)

    monkeypatch.setattr(EPMQProcessor, "begin_shared_input_capture", count)
    resumed = copied.attempt(resume="required")
    assert {name.split(".")[2] for name in counted} == {"2"}
    assert_same(
        copied.saved(resumed, "resumed"), copied.saved(copied.attempt(resume=None), "whole")
    )


def test_off_the_main_thread_there_are_no_signals(copied):
    found = []
    thread = threading.Thread(target=lambda: found.append(copied.attempt(resume="required")))
    thread.start()
    thread.join()
    assert found[0].epmq_report.attempts == 2


# ---- when it commits -----------------------------------------------------------------------------


class Clock:
    """Stands in for a loop: layers of given seconds, commits of given seconds."""

    def __init__(self, monkeypatch, tmp_path, interval="layer:1"):
        self.now = 0.0
        monkeypatch.setattr(session.time, "perf_counter", lambda: self.now)
        self.run = session.Resumable(CheckpointConfig(tmp_path, interval=interval))
        self.committed = []

    def layers(self, seconds, commits):
        for done, (layer, commit) in enumerate(zip(seconds, commits, strict=True), 1):
            self.now += layer
            self.run.plan = type("Plan", (), {"steps": range(len(seconds))})
            if self.run._is_due(done):
                self.now += commit
                self.run.cost += commit
                self.run._last = commit
                self.run._committed_cursor = done
                self.committed.append(done)
        return self.committed


def test_commits_take_their_share_of_the_time_and_no_more(monkeypatch, tmp_path):
    cheap = Clock(monkeypatch, tmp_path)
    assert cheap.layers([10.0] * 8, [0.1] * 8) == list(range(1, 9))
    dear = Clock(monkeypatch, tmp_path)
    # The first to see what one costs, the last to keep the whole result.
    assert dear.layers([10.0] * 100, [2.5] * 100)[:3] == [1, 10, 15]
    assert dear.run.cost <= session.SHARE * dear.now + 2.5 and dear.committed[-1] == 100
    wanted = Clock(monkeypatch, tmp_path, interval="layer:4")
    assert wanted.layers([10.0] * 10, [0.01] * 10) == [4, 8, 10]


# ---- the host's own checkpoints ------------------------------------------------------------------


def test_the_hosts_own_runs_are_as_they_were(begun):
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(
        str(begun.merged),
        QuantizeConfig(bits=4, group_size=32, lm_head=True),
        dtype=torch.float32,
        device="cpu",
    )
    with pytest.raises(NotImplementedError, match="checkpoint requires sequential"):
        model.quantize(begun.rows["expert0"], checkpoint=CheckpointConfig("own"))


def test_a_checkpoint_of_the_host_is_not_ours(copied, tmp_path):
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(
        str(copied.merged), QuantizeConfig(bits=4, group_size=32), dtype=torch.float32, device="cpu"
    )
    model.quantize(copied.rows["expert0"], checkpoint=CheckpointConfig(tmp_path / "theirs"))
    copied.root = tmp_path / "theirs"
    with pytest.raises(EPMQError, match="it is not of E-PMQ"):
        copied.attempt()
