"""An expert's own pass, layer by layer, is the plain forward pass of that expert."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from families import FAMILIES
from lora import peft_model
from safetensors.torch import load_file, save_file
from tiny import poison
from transformers import AutoModelForCausalLM

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.calibration.batches import CalibrationPlan
from epmq_gptq.errors import EPMQWarning
from epmq_gptq.experts.experts import Experts
from epmq_gptq.experts.passes.trajectories import ExpertTrajectories
from epmq_gptq.host.model_linears import quantizable_linears
from epmq_gptq.io.checkpoints import Checkpoint

WRITERS = {"gpt2": {"attn.c_proj", "mlp.c_proj"}, "opt": {"self_attn.out_proj", "fc2"}}


def plan_of(rows):
    """One row a batch; the rows of an expert follow each other."""
    plan = CalibrationPlan()
    for name, found in rows.items():
        batches = [
            {
                "input_ids": torch.tensor([row["input_ids"]]),
                "attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.bool),
            }
            for row in found
        ]
        plan.add(name, batches, held_out=False)
    return plan


def trajectories(merged, sources, rows):
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=sources))
    linears = list(quantizable_linears(model))
    experts = Experts(sources)
    experts.bind(linears)
    checkpoint = Checkpoint(str(merged), what="the merged model")
    return ExpertTrajectories(checkpoint, experts, plan_of(rows), linears), linears


def plain_inputs(folder, modules, rows):
    """What modules are given in plain forward passes, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {name: [] for name in modules}
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(
                next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row["input_ids"]]))
    return seen


DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen3_moe")]


@pytest.mark.parametrize("family", DENSE)
def test_every_family_runs_as_it_does_alone(family, tmp_path):
    torch.manual_seed(0)
    merged, paths = tiny.family(tmp_path, experts=2, model=FAMILIES[family]().eval())
    rows = {name: tiny.rows(2, 12 + i, seed=i) for i, name in enumerate(paths)}
    found, linears = trajectories(merged, paths, rows)
    layer = linears[0].name[: linears[0].name.index(".0.") + 2]
    assert found.enter(layer)
    modules = {found._module_of(linear): linear.name for linear in linears}
    for start, (name, folder) in zip((0, 2), paths.items(), strict=True):
        plain = plain_inputs(folder, modules, rows[name])
        for module, linear in modules.items():
            for row in range(2):
                z = found.inputs(linear, start + row)
                torch.testing.assert_close(z, plain[module][row], rtol=1e-4, atol=1e-5)
    writers = {name.removeprefix(f"{layer}.") for name in found.taps}
    assert writers == WRITERS.get(family, {"self_attn.o_proj", "mlp.down_proj"})
    for linear, tap in found.taps.items():
        streams = plain_inputs(paths["expert1"], [f"{layer}.{tap}"], rows["expert1"])
        torch.testing.assert_close(
            found.stream(linear, 2), streams[f"{layer}.{tap}"][0], rtol=1e-4, atol=1e-5
        )


def test_an_adapter_runs_as_the_model_that_it_makes(tmp_path):
    merged, _ = tiny.family(tmp_path, experts=1)
    tiny.save(tiny.llama(), tmp_path / "base")
    model = peft_model(tiny.llama())
    model.save_pretrained(tmp_path / "adapter")
    tiny.save(model.merge_and_unload(), tmp_path / "full")
    rows = {"x": tiny.rows(2, 20, seed=0)}
    found = {}
    for form, source in (
        ("adapter", f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"),
        ("full", str(tmp_path / "full")),
    ):
        found[form], linears = trajectories(merged, {"x": source}, rows)
        assert found[form].enter("model.layers.1")  # and the one before it, on the way
    for linear in linears:
        if ".1." in linear.name:
            one, other = (found[form].inputs(linear.name, 1) for form in ("adapter", "full"))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_what_is_not_quantized_is_refused_by_name(tmp_path):
    merged, _ = tiny.family(tmp_path, experts=1)
    tiny.save(tiny.llama(), tmp_path / "base")
    peft_model(tiny.llama(), target_modules=["q_proj", "lm_head"]).save_pretrained(
        tmp_path / "adapter"
    )
    source = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    with pytest.raises(EPMQInputError, match="`lm_head`.*cannot be run exactly") as caught:
        trajectories(merged, {"x": source}, {"x": tiny.rows(2, 20, seed=0)})
    assert caught.value.code == "EPMQ-F34" and "eta=0, rho=0" in caught.value.remedy


def storages(found):
    """Where the kept inputs lie: layers that read one tensor keep it once."""
    return {t.untyped_storage().data_ptr() for batch in found._inputs for t in batch.values()}


def test_memory_holds_one_layer_of_one_expert(tmp_path):
    merged, paths = tiny.family(tmp_path, experts=3)
    rows = {name: tiny.rows(1, 12, seed=i) for i, name in enumerate(paths)}
    found, _ = trajectories(merged, paths, rows)
    found.enter("model.layers.0")
    parameters = dict(found._skeleton.model.named_parameters())
    held = {name for name, tensor in parameters.items() if tensor.device.type != "meta"}
    assert held and not any(".layers." in name for name in held)
    kept = storages(found)
    # Of each row: the inputs of q, k, v; of o; of gate and up; of down.
    assert len(kept) == 3 * 4
    found.enter("model.layers.1")
    assert len(storages(found)) == len(kept)
    found.close()
    assert not found._inputs and not found._streams


def test_what_comes_next_is_read_ahead(tmp_path, monkeypatch):
    merged, paths = tiny.family(tmp_path, experts=2)
    rows = {name: tiny.rows(1, 12, seed=i) for i, name in enumerate(paths)}
    found, linears = trajectories(merged, paths, rows)
    done = []
    monkeypatch.setattr(
        Experts, "prefetch", lambda self, name, modules: done.append(("ahead", name, *modules))
    )
    fill = found._fill
    monkeypatch.setattr(found, "_fill", lambda name, *rest: done.append(name) or fill(name, *rest))
    found.enter("model.layers.0")
    found.enter("model.layers.1")
    layers = [[li.name for li in linears if f".{n}." in li.name] for n in (0, 1)]
    first, second = paths
    assert done == [
        first,
        ("ahead", second, *layers[0]),
        second,
        ("ahead", first, *layers[1]),
        first,
        ("ahead", second, *layers[1]),
        second,
    ]


def test_the_head_is_in_no_layer(tmp_path):
    merged, paths = tiny.family(tmp_path, experts=1)
    found, _ = trajectories(merged, paths, {"expert0": tiny.rows(1, 12, seed=0)})
    assert not found.enter("") and not found.enter("lm_head")


# ---- models whose experts cannot be run ----------------------------------------------------------


def quantize(merged, experts, rows, **options):
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1, **options))
    return model.quantize(rows, batch_size=2)["epmq"]


def test_mixtures_fall_back_to_the_papers_targets_aloud_or_refuse(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=2, model=FAMILIES["mixtral"]().eval())
    rows = {name: tiny.rows(4, 40, seed=i) for i, name in enumerate(experts)}
    with pytest.warns(EPMQWarning, match="targets are the paper's.*has no tensor of its own"):
        report = quantize(merged, experts, rows)
    assert {(m.eta, m.rho) for m in report.modules} == {(0.0, 0.0)}
    assert report.provenance["eta"] == report.provenance["rho"] == 0
    with pytest.raises(EPMQInputError, match="has no tensor of its own") as caught:
        quantize(merged, experts, rows, eta=1.0)
    assert "eta=0, rho=0" in caught.value.remedy


def test_an_expert_without_an_embedding_is_named(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=2)
    file = experts["expert1"] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    rows = {name: tiny.rows(4, 40, seed=i) for i, name in enumerate(experts)}
    with pytest.raises(EPMQInputError, match="expert `expert1`.*`model.embed_tokens.weight`"):
        quantize(merged, experts, rows, eta=1.0)


@pytest.mark.parametrize("broken", ["expert0", "expert1"])
def test_the_others_go_on_with_their_streams(tmp_path, broken):
    merged, experts = tiny.family(tmp_path, experts=2)
    poison(experts[broken], "model.layers.0.mlp.down_proj.weight", (2, 3))
    rows = {name: tiny.rows(4, 40, seed=i) for i, name in enumerate(experts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quantize(merged, experts, rows, on_bad_module="rtn")
    assert set(report.left) == {broken}
    found = {m.module.partition("layers.")[2]: (m.target, m.eta, m.rho) for m in report.modules}
    assert found["0.mlp.down_proj"][0] == "rtn"
    assert found["0.self_attn.o_proj"] == ("experts", 1, 1)
    assert found["1.mlp.down_proj"] == ("experts", 1, 1)


def test_a_broken_layer_of_an_expert_ends_its_pass_where_the_run_may_go_on(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=2)
    poison(experts["expert1"], "model.layers.1.mlp.up_proj.weight", (2, 3), float("inf"))
    rows = {name: tiny.rows(4, 40, seed=i) for i, name in enumerate(experts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = quantize(merged, experts, rows, on_bad_module="rtn")
    assert set(report.left) == {"expert1"} and "up_proj" in report.left["expert1"]
    assert report.provenance["left"] == report.left
    targets = {m.module.partition("layers.")[2]: m.target for m in report.modules}
    assert targets["1.mlp.up_proj"] == targets["1.mlp.gate_proj"] == "rtn"
    assert {target for name, target in targets.items() if "gate" not in name and "up" not in name
            } == {"experts"}  # fmt: skip


def test_padding_does_not_count_where_a_layer_takes_its_tokens_apart(tmp_path):
    """OPT's fc1 and fc2 are given (B · S, d)."""
    torch.manual_seed(0)
    merged, experts = tiny.family(tmp_path, experts=2, model=FAMILIES["opt"]().eval())
    rows = {
        name: [{"input_ids": r["input_ids"][: 20 + 7 * n]} for n, r in enumerate(found)]
        for name in experts
        for found in [tiny.rows(4, 45, seed=len(name))]
    }
    tokens = {name: sum(len(row["input_ids"]) for row in found) for name, found in rows.items()}
    reports = [quantize_in(merged, experts, rows, size) for size in (1, 4)]
    for one, other in zip(*(report.modules for report in reports), strict=True):
        assert one.tokens == other.tokens == tokens, one.module
        assert one.eta == other.eta == 1
        if one.module.endswith(("q_proj", "k_proj", "v_proj")):
            assert one.merge_excess == pytest.approx(other.merge_excess, rel=1e-3)


def quantize_in(merged, experts, rows, batch_size):
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1))
    return model.quantize(rows, batch_size=batch_size)["epmq"]
