"""Statistics that a run kept: the same codes again, or those of other options."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import pytest
import tiny
import torch
from judge import codes, dequantized, gptq64, stored
from runs import differing, gar_order, run
from safetensors.torch import load_file, save_file

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.checks.estimates import recorded as estimated
from epmq_gptq.cli import app
from epmq_gptq.errors import EPMQWarning
from epmq_gptq.host.recorded.bundle import FOLDER_NAME, Bundle
from epmq_gptq.host.recorded.requantize import requantize
from epmq_gptq.method.half import unpack_delta, unpack_gram

BITS, GROUP = 4, 32


class Case:
    """Three experts with unequal calibration, recorded with the paper's targets and the default."""

    def __init__(self, folder):
        self.folder = folder
        self.merged, self.experts = tiny.family(folder, experts=3)
        self.rows = {
            name: tiny.rows(5 + 3 * index, 30 + 12 * index, seed=index)
            for index, name in enumerate(self.experts)
        }
        self.reports = {}
        for profile in ("paper", "best"):
            alpha = {"alpha": 0.05} if profile == "paper" else {}
            self.record(profile, profile=profile, **alpha)

    def record(self, name, *, experts=None, **options):
        names = experts or list(self.experts)
        config = EPMQConfig(
            bits=BITS,
            group_size=GROUP,
            experts={n: self.experts[n] for n in names},
            save_statistics=True,
            **options,
        )
        rows = {n: self.rows[n] for n in names}
        self.reports[name] = run(self.merged, config, rows, self.folder / name)["epmq"]
        return self.folder / name

    def again(self, name, out, **options):
        model = requantize(self.folder / name, self.merged, device="cpu", **options)
        model.save(str(out))
        return model.epmq_report


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("name", ["paper", "best"])
def test_the_same_settings_give_the_same_bits(case, tmp_path, name):
    report = case.again(name, tmp_path / "again")
    first, second = stored(case.folder / name), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
    before = case.reports[name]
    for old, new in zip(before.modules, report.modules, strict=True):
        assert (old.module, old.alpha, old.target) == (new.module, new.alpha, new.target)
        assert (old.tokens, old.eta, old.rho, old.excess) == (
            *(new.tokens, new.eta, new.rho, new.excess),
        )
    assert report.tokens == before.tokens and report.rows == before.rows
    assert not (tmp_path / "again" / FOLDER_NAME).exists()


def test_recording_changes_next_to_nothing(case, tmp_path):
    config = EPMQConfig(
        bits=BITS, group_size=GROUP, experts=case.experts, profile="paper", alpha=0.05
    )
    plain = run(case.merged, config, case.rows, tmp_path / "plain")["epmq"]
    report = case.reports["paper"]
    # A code that tips moves those after it in its row: some of them differ, the loss does not.
    assert 0 < differing(tmp_path / "plain", case.folder / "paper") < 0.15
    assert report.excess == pytest.approx(plain.excess, rel=0.01)
    assert report.merge_excess == pytest.approx(plain.merge_excess, rel=0.01)


def test_another_form_is_the_run_of_that_form_where_the_inputs_are_the_same(case, tmp_path):
    """Nothing lies before the first layer's q, k and v: there the codes are those of a real run."""
    changes = {
        "alpha": dict(alpha=1.0),
        "bits": dict(bits=8, group_size=64),
        "weights": dict(expert_weights={"expert2": 5.0}),
        "token": dict(weighting="token"),
        "trace": dict(weighting="trace"),
        "minmax": dict(weighting="minmax"),
        "pattern": dict(alpha_pattern={"q_proj": 3.0}),
        "order": dict(desc_act=True, act_group_aware=False),
    }
    base = codes(case.folder / "paper")
    for name, change in changes.items():
        options = dict(profile="paper", alpha=0.05) | change
        options = dict(bits=BITS, group_size=GROUP) | options
        config = EPMQConfig(experts=case.experts, save_statistics=True, **options)
        run(case.merged, config, case.rows, tmp_path / name)
        case.again("paper", tmp_path / f"{name}-again", **change)
        real, made = codes(tmp_path / name), codes(tmp_path / f"{name}-again")
        for layer in ("q_proj", "k_proj", "v_proj"):
            module = f"model.layers.0.self_attn.{layer}"
            assert torch.equal(real[module], made[module]), (name, layer)
        changed = [m for m in made if made[m].shape != base[m].shape or (made[m] != base[m]).any()]
        assert changed, name


def test_an_expert_left_out_never_was(case, tmp_path):
    without = ["expert0", "expert2"]
    case.again("paper", tmp_path / "made", leave_out=["expert1"])
    case.record("without", experts=without, profile="paper", alpha=0.05)
    real, made = codes(case.folder / "without"), codes(tmp_path / "made")
    for layer in ("q_proj", "k_proj", "v_proj"):
        module = f"model.layers.0.self_attn.{layer}"
        assert torch.equal(real[module], made[module])
    # Everywhere else: GPTQ in float64 on the recorded sums of the two, as the file gives them.
    bundle = Bundle(case.folder / "paper")
    weights, merged = dequantized(tmp_path / "made"), stored(case.merged)
    for group in bundle.groups:
        sums = bundle.sums(group, without)["fitted"]
        H = sum(unpack_gram(one.gram).double() for one in sums.values())
        H_E = H + 0.05 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
        for module in group.layers:
            D = sum(
                unpack_delta(one.layers[module].delta, one.gram.norms).double()
                for one in sums.values()
            )
            best = merged[f"{module}.weight"].double() + D @ torch.linalg.inv(H_E)
            order = gar_order(H_E)
            reference = gptq64(best, H_E, bits=BITS, group_size=GROUP, order=order)

            def excess(Q, best=best, H_E=H_E):
                return float((((Q - best) @ H_E) * (Q - best)).sum())

            assert excess(weights[module]) == pytest.approx(excess(reference), rel=0.01), module
    made = json.loads((tmp_path / "made" / "quantize_config.json").read_text())["meta"]["epmq"]
    assert [expert["name"] for expert in made["experts"]] == without
    assert made["statistics"]["left_out"] == ["expert1"]
    assert made["profile"] == "paper" and made["alpha"] == 0.05


def test_the_figures_per_expert_are_those_of_the_run(case, tmp_path):
    whole = case.record("whole", profile="paper", alpha=0.05, regret_rows=10**6)
    report = case.again("whole", tmp_path / "out")
    for old, new in zip(case.reports["whole"].modules, report.modules, strict=True):
        assert list(old.experts) == list(new.experts) == list(case.experts)
        for name, error in old.experts.items():
            for figure in ("rows", "energy", "merged", "solved", "rounded", "quantization"):
                expected = getattr(error, figure)
                assert getattr(new.experts[name], figure) == pytest.approx(expected, rel=2e-3)
    assert whole.is_dir()
    # Of other targets the sums do not tell.
    assert all(m.experts == {} for m in case.again("best", tmp_path / "best").modules)


def test_the_estimate_is_the_size(case):
    from epmq_gptq.host.model_linears import quantizable_linears

    config = EPMQConfig(bits=BITS, group_size=GROUP, experts=case.experts)
    linears = list(quantizable_linears(tiny.load(case.merged, config)))
    for name, parts in (("paper", 3), ("best", 6)):
        files = list((case.folder / name / FOLDER_NAME).glob("*.safetensors"))
        tensors = sum(t.nbytes for file in files for t in load_file(file).values())
        assert tensors == estimated(linears, parts)
        # Beside the numbers: headers of small files.
        assert sum(file.stat().st_size for file in files) < 1.3 * tensors + 4096 * len(files)
    estimates = case.reports["best"].preflight["estimates"]["disk"]
    assert estimates["statistics"] == estimated(linears, 6)


def test_nothing_private_is_kept(case):
    for name in ("paper", "best"):
        text = (case.folder / name / FOLDER_NAME / "index.json").read_text()
        assert str(case.folder) not in text and "/" not in json.loads(text)["merged"]["source"]
        assert "input_ids" not in text


def test_a_moe_and_biases_and_heads(tmp_path):
    """Routed modules that few or no tokens reach, a head, refitted biases: the same bits."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False)
    routed = MixtralConfig(
        **tiny.TOKENS, **shape, intermediate_size=64, num_local_experts=8, num_experts_per_tok=1
    )
    biased = Qwen2Config(**tiny.TOKENS, **shape, intermediate_size=128)
    cases = {
        "routed": (MixtralForCausalLM(routed).eval(), dict(profile="paper", alpha=0.1)),
        "biased": (Qwen2ForCausalLM(biased).eval(), dict(bias_refit=True, lm_head=True)),
    }
    for name, (model, options) in cases.items():
        merged, experts = tiny.family(tmp_path / name, experts=2, model=model)
        rows = {e: tiny.rows(4, 24, seed=index) for index, e in enumerate(experts)}
        if name == "routed":  # few different tokens, so that some modules see none
            rows = {e: [{"input_ids": [9 + index] * 24}] for index, e in enumerate(experts)}
        config = EPMQConfig(
            bits=BITS, group_size=GROUP, experts=experts, save_statistics=True, **options
        )
        report = run(merged, config, rows, tmp_path / name / "out")["epmq"]
        model = requantize(tmp_path / name / "out", merged, device="cpu")
        model.save(str(tmp_path / name / "again"))
        first, second = stored(tmp_path / name / "out"), stored(tmp_path / name / "again")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first), name
        targets = [(m.module, m.target, m.reason) for m in report.modules]
        assert targets == [(m.module, m.target, m.reason) for m in model.epmq_report.modules]
        if name == "routed":
            assert any(target == "merged" for _, target, _ in targets)
        else:
            assert any(m.bias_shift for m in model.epmq_report.modules)


def test_an_expert_left_out_of_the_default_targets_is_warned_of(case):
    """Measured on the demo: the experts that stay lose as well (docs/statistics.md)."""
    with pytest.warns(EPMQWarning, match="without some of them the others may lose") as caught:
        requantize(case.folder / "best", case.merged, device="cpu", leave_out=["expert1"])
    assert [str(w.message) for w in caught].count(str(caught[0].message)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", EPMQWarning)
        requantize(case.folder / "paper", case.merged, device="cpu", leave_out=["expert1"])


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (dict(eta=0.5), "EPMQ-O03", "`eta` cannot be changed"),
        (dict(profile="paper"), "EPMQ-O03", "`profile` cannot be changed"),
        (dict(experts={"a": "b"}), "EPMQ-O03", "`experts` cannot be changed"),
        (dict(leave_out=["nobody"]), "EPMQ-F21", "'nobody'"),
        (dict(leave_out=["expert0", "expert1", "expert2"]), "EPMQ-F20", "all experts"),
        (dict(alpha="auto"), "EPMQ-F55", "held out"),
        (dict(bias_refit=True), "EPMQ-F55", "bias is fitted to"),
        (dict(bits=5.5), "EPMQ-F33", "`bits`"),
        (dict(expert_weights={"nobody": 2}), "EPMQ-F21", "nobody"),
    ],
)
def test_what_cannot_be_asked_of_statistics_is_refused(case, options, code, text):
    with pytest.raises(EPMQInputError, match=text) as caught:
        requantize(case.folder / "paper", case.merged, device="cpu", **options)
    assert caught.value.code == code


def test_another_merge_is_refused(case):
    with pytest.raises(EPMQInputError, match="not the one that the statistics are of") as caught:
        requantize(case.folder / "paper", case.experts["expert0"], device="cpu")
    assert caught.value.code == "EPMQ-F55"
    with pytest.raises(EPMQInputError, match="`merged` is missing"):
        requantize(case.folder / "paper", device="cpu")


def test_layers_that_were_not_recorded_are_refused(case, tmp_path):
    rule = {r"-:.*layers\.1\..*": {}}
    folder = case.record("half", profile="paper", alpha=0.05, dynamic=rule)
    with pytest.raises(EPMQInputError, match="hold nothing of `model.layers.1"):
        requantize(folder, case.merged, device="cpu", dynamic=None)
    requantize(folder, case.merged, device="cpu").save(str(tmp_path / "out"))
    assert {m.split(".")[2] for m in codes(tmp_path / "out")} == {"0"}


@pytest.mark.parametrize("how", ["flipped", "missing", "shape", "nan", "schema", "link", "none"])
def test_damaged_statistics_are_refused_by_name(case, tmp_path, how):
    folder = tmp_path / "statistics"
    shutil.copytree(case.folder / "paper" / FOLDER_NAME, folder)
    file, index = folder / "00000.safetensors", folder / "index.json"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif how == "missing":
        file.unlink()
    elif how == "link":
        file.rename(tmp_path / "outside.safetensors")
        file.symlink_to(tmp_path / "outside.safetensors")
    elif how == "none":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "schema":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"schema": 99}))
    else:
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("values"))
        tensors[name] = tensors[name][:-1] if how == "shape" else tensors[name] * float("nan")
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)
        from epmq_gptq.io.checkpoints import file_digest

        known = json.loads(index.read_text())
        known["groups"][0]["sha256"] = file_digest(file)
        index.write_text(json.dumps(known))
    with pytest.raises(EPMQInputError) as caught:
        requantize(folder, case.merged, device="cpu")
    assert str(tmp_path) not in str(caught.value)
    assert {"none": "index.json", "schema": "99"}.get(how, "00000.safetensors") in str(caught.value)


def test_data_free_experts_have_no_statistics_to_keep():
    with pytest.raises(EPMQInputError, match="`save_statistics` cannot go with `data_free`"):
        EPMQConfig(experts={"a": "x", "b": "y"}, data_free=["a"], base="z", save_statistics=True)


def test_a_full_disk_is_found_before_the_run(case, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**6, 10**6 - 1000, 1000))
    config = EPMQConfig(experts=case.experts, group_size=GROUP, save_statistics=True)
    model = tiny.load(case.merged, config)
    with pytest.raises(EPMQInputError, match="`save_statistics`.*bytes free, got 1,000.*TMPDIR"):
        model.quantize(case.rows)


def test_a_run_that_fails_leaves_no_temporary_statistics(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = EPMQConfig(
        experts=case.experts, group_size=GROUP, save_statistics=True, offload_to_disk=False
    )
    model = tiny.load(case.merged, config)

    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr("epmq_gptq.host.loop._loop", fail)
    with pytest.raises(RuntimeError):
        model.quantize(case.rows)
    assert list(tmp_path.glob("epmq-statistics-*")) == []


# ---- the command -------------------------------------------------------------------------------


def test_the_command(case, tmp_path, capsys, monkeypatch):
    arguments = [
        *("requantize", "--from-statistics", str(case.folder / "paper")),
        *("--merged", str(case.merged), "--out", str(tmp_path / "out"), "--device", "cpu"),
        *("--leave-out", "expert1", "--set", "alpha=0.5", "--json", str(tmp_path / "r.json")),
    ]
    monkeypatch.setattr(sys, "argv", ["epmq-gptq", *arguments])
    app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "14 modules, experts expert0, expert2" in printed
    assert "model.layers.1.mlp.down_proj" in printed
    report = json.loads((tmp_path / "r.json").read_text())["report"]
    assert {module["alpha"] for module in report["modules"]} == {0.5}
    assert set(report["tokens"]) == {"expert0", "expert2"}
    assert codes(tmp_path / "out").keys() == codes(case.folder / "paper").keys()
    with pytest.raises(SystemExit) as caught:
        app([*arguments[:6], str(tmp_path / "out")], standalone_mode=False)
    assert caught.value.code == 2
    assert "should be new or empty" in " ".join(capsys.readouterr().err.split())
