"""RegMean and RegMean++ in the cases whose answer is known, and what must not matter to them."""

import json

import pytest
import torch
from regmean_models import (
    average,
    distance,
    experts_of,
    merged,
    model_of,
    plan_of,
    reference,
    stored,
)
from safetensors.torch import save_file

from epmq_gptq.calibration.batches import CalibrationPlan
from epmq_gptq.errors import EPMQNumericalError
from epmq_gptq.merging import merge

METHODS = {"regmean": False, "regmean_plusplus": True}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batches_and_their_padding_change_nothing(tmp_path, method, kind):
    base, experts = experts_of(model_of(kind), tmp_path)
    written = {}
    for size in (1, 2, 6):
        plan = plan_of(kind, list(experts), batch_size=size)
        if size == 2:  # the last batch first, so that the experts' batches come in another order
            plan.batches.reverse()
            plan.experts.reverse()
        written[size] = stored(merged(method, base, experts, tmp_path / f"{size}", plan).out)
    for name, W in written[1].items():
        for size in (2, 6):
            assert distance(written[size][name], W) < 1e-5, (name, size)


def test_padding_on_the_left_does_not_count(tmp_path):
    base, experts = experts_of(model_of("llama"), tmp_path)
    plan = plan_of("llama", list(experts))
    layer = "model.layers.0.self_attn.q_proj.weight"
    right = stored(merged("regmean", base, experts, tmp_path / "right", plan).out)
    for batch in plan.batches:
        free = (~batch["attention_mask"]).sum(1).tolist()
        for key, rows in batch.items():
            batch[key] = torch.stack([r.roll(n) for r, n in zip(rows, free, strict=True)])
    assert any(not batch["attention_mask"][:, 0].all() for batch in plan.batches)
    left = stored(merged("regmean", base, experts, tmp_path / "left", plan).out)
    assert distance(left[layer], right[layer]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
def test_equal_experts_give_themselves_back(tmp_path, method, gamma):
    base, _ = experts_of(model_of("t5"), tmp_path, count=1)
    # At gamma = 1 so few tokens do not determine the weights, and nothing asks them to.
    plan = plan_of("t5", ["a", "b"], rows=1)
    out = merged(method, base, {"a": base, "b": base}, tmp_path / "merged", plan, gamma).out
    for name, tensor in stored(base).items():
        assert torch.equal(stored(out)[name], tensor), name


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_its_own_merge(tmp_path, method):
    base, experts = experts_of(model_of("clip"), tmp_path, count=1)
    out = merged(method, base, experts, tmp_path / "merged", plan_of("clip", ["a"])).out
    for name, tensor in stored(experts["a"]).items():
        assert torch.equal(stored(out)[name], tensor), name


def _inputs(model, folder, name, plan, expert):
    """What a linear layer of an expert's own model is given by its own images or unpadded rows."""
    own = type(model).from_pretrained(folder).eval()
    found = []
    own.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        for batch, owner in zip(plan.batches, plan.experts, strict=True):
            if owner == expert and "pixel_values" in batch:
                own(**batch)
            elif owner == expert:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    own(ids[mask][None])
    return torch.cat(found)


def test_diagonals_alone_weigh_every_channel(tmp_path):
    """gamma = 0: every column is the mean of the experts' columns, weighted by their energy."""
    model = model_of("clip_vision")
    base, experts = experts_of(model, tmp_path)
    plan = plan_of("clip_vision", list(experts))
    out = merged("regmean", base, experts, tmp_path / "merged", plan, gamma=0).out
    name = "encoder.layers.0.self_attn.q_proj"
    top, bottom = 0, 0
    for expert, folder in experts.items():
        energy = _inputs(model, folder, name, plan, expert).square().mean(0)
        top = top + stored(folder)[f"{name}.weight"].double() * energy
        bottom = bottom + energy
    assert distance(stored(out)[f"{name}.weight"], top / bottom) < 1e-5


def test_a_dead_channel_keeps_the_average(tmp_path):
    """Also at gamma = 1, where the inverse of the Grams does not exist."""
    base, experts = experts_of(model_of("llama"), tmp_path)
    for folder in experts.values():
        state = stored(folder)
        for layer in (0, 1):
            state[f"model.layers.{layer}.input_layernorm.weight"][3] = 0
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of("llama", list(experts), rows=30, batch_size=10, longest=12)
    name = "model.layers.1.self_attn.q_proj.weight"
    want = average(experts)[name]
    for gamma in (0.9, 1.0):
        written = stored(merged("regmean", base, experts, tmp_path / f"{gamma}", plan, gamma).out)
        assert distance(written[name][:, 3], want[:, 3]) < 1e-6
        assert distance(written[name], want) > 1e-2


def test_too_few_tokens_are_refused_at_gamma_one(tmp_path):
    base, experts = experts_of(model_of("llama"), tmp_path)
    plan = plan_of("llama", list(experts), rows=1)  # 5 tokens an expert for 16 channels
    with pytest.raises(EPMQNumericalError, match="do not determine its 16 input") as caught:
        merged("regmean", base, experts, tmp_path / "merged", plan, gamma=1)
    assert caught.value.code == "EPMQ-F29"
    assert caught.value.module == "model.layers.0.self_attn.q_proj"
    assert not (tmp_path / "merged").exists()
    merged("regmean", base, experts, tmp_path / "merged", plan, gamma=0.99)


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_has_the_dtype_of_the_base(tmp_path, method):
    model = model_of("t5")
    base, experts = experts_of(model, tmp_path, dtype=torch.bfloat16)
    plan = plan_of("t5", list(experts))
    written = stored(merged(method, base, experts, tmp_path / "merged", plan).out)
    # The reference passes rows through unrounded weights in float64.
    want = reference(model, experts, plan, 0.9, merged_prefix=METHODS[method])
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for name, W in want.items():
        assert distance(written[name], W) < 6e-3, name
        assert distance(average(experts)[name], W) > 1.5e-2, name


def test_names_of_another_class_and_shards(tmp_path):
    """Checkpoints of CLIP's vision tower have names with and without `vision_model.`."""
    model = model_of("clip_vision")
    base, experts = experts_of(model, tmp_path)
    plan = plan_of("clip_vision", list(experts))
    plain = stored(merged("regmean_plusplus", base, experts, tmp_path / "plain", plan).out)
    for folder in (base, *experts.values()):
        state = {f"vision_model.{name}": tensor for name, tensor in stored(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    place = tmp_path / "named"
    merged("regmean_plusplus", base, experts, place, plan, max_shard_bytes=8_000)
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = type(model).from_pretrained(place).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_text_tower_without_text_is_averaged(tmp_path):
    base, experts = experts_of(model_of("clip"), tmp_path)
    plan = plan_of("images", list(experts))
    result = merged("regmean_plusplus", base, experts, tmp_path / "merged", plan)
    assert result.record["calibration"]["layers"] == ["vision_model.encoder.layers"]
    written, mean = stored(result.out), average(experts)
    text, vision = (
        f"{tower}_model.encoder.layers.1.mlp.fc1.weight" for tower in ("text", "vision")
    )
    assert distance(written[text], mean[text]) < 1e-6
    assert distance(written[vision], mean[vision]) > 1e-2


def test_the_record_counts_rows_and_tokens(tmp_path):
    base, experts = experts_of(model_of("llama"), tmp_path)
    plan = plan_of("llama", list(experts))
    steps = []
    result = merged(
        "regmean_plusplus",
        base,
        experts,
        tmp_path / "merged",
        plan,
        progress=lambda done, total, what: steps.append((done, total)),
    )
    assert result.record == json.loads((result.out / "epmq_merge.json").read_text())
    assert result.record["parameters"] == {"reduce_non_diagonal_ratio": 0.9}
    assert result.record["calibration"] == {
        "inputs": "merged prefix",
        "rows": {"a": 6, "b": 6},
        "tokens": {"a": 45, "b": 45},
        "layers": ["model.layers"],
        "linears": 14,
    }
    assert str(tmp_path) not in json.dumps(result.record)
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]


def test_without_a_base_and_from_rows(tmp_path):
    _, experts = experts_of(model_of("llama"), tmp_path)
    rows = {"a": [list(range(4, 16)), list(range(9, 30))], "b": [list(range(5, 25))]}
    given = merge(
        "regmean", base=None, experts=experts, out=tmp_path / "rows", calibration=rows, batch_size=2
    )
    plan = CalibrationPlan(rows={"a": 2, "b": 1}, tokens={"a": 33, "b": 20})
    for name, ids in (("a", rows["a"][0]), ("a", rows["a"][1]), ("b", rows["b"][0])):
        plan.experts.append(name)
        plan.batches.append({"input_ids": torch.tensor([ids])})
    made = merge("regmean", base=None, experts=experts, out=tmp_path / "plan", calibration=plan)
    assert given.record["calibration"] == made.record["calibration"]
    assert given.record["base"] is None
    assert given.parameters == {"reduce_non_diagonal_ratio": 0.95}
    for name, tensor in stored(made.out).items():
        assert distance(stored(given.out)[name], tensor) < 1e-5, name


def test_from_rows_of_images_and_of_pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand((3, 16, 16), generator=generator) for _ in range(5)]
    pairs = [{"input_ids": [*range(4, 8 + i)], "labels": [5 + i, 6, 1]} for i in range(4)]
    for kind, rows, tokens in (("clip_vision", images, 5 * 5), ("t5", pairs, 22 + 4 * 3)):
        base, experts = experts_of(model_of(kind), tmp_path / kind)
        result = merge(
            "regmean_plusplus",
            base=base,
            experts=experts,
            out=tmp_path / kind / "merged",
            calibration=dict.fromkeys(experts, rows),
            batch_size=2,
        )
        found = result.record["calibration"]
        assert found["rows"] == {"a": len(rows), "b": len(rows)}
        assert found["tokens"] == {"a": tokens, "b": tokens}
        written, mean = stored(result.out), average(experts)
        moved = {name for name in mean if distance(written[name], mean[name]) > 1e-5}
        # The same rows reach the decoder through one merged encoder: there the experts weigh alike.
        read = ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
        alike = {name for name in mean if name.endswith(read)}
        assert len(moved) == found["linears"] - len(alike) and not moved & alike
        assert len(alike) == (4 if kind == "t5" else 0)


def test_the_merge_minimises_the_experts_output_errors(tmp_path):
    """At gamma = 1: sum_i ||(W - W_i) X_i||^2 / n_i, each expert on its own inputs."""
    model = model_of("llama")
    base, experts = experts_of(model, tmp_path)
    plan = plan_of("llama", list(experts), rows=24, batch_size=8, longest=12)
    out = merged("regmean", base, experts, tmp_path / "merged", plan, gamma=1).out
    name = "model.layers.1.self_attn.q_proj"
    inputs = {e: _inputs(model, folder, name, plan, e) for e, folder in experts.items()}

    def error(W):
        terms = []
        for expert, folder in experts.items():
            x = inputs[expert]
            difference = W.double() - stored(folder)[f"{name}.weight"].double()
            terms.append((x @ difference.T).square().sum() / len(x))
        return float(sum(terms))

    W = stored(out)[f"{name}.weight"].double()
    assert error(W) < 0.9 * error(average(experts)[f"{name}.weight"])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        step = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        assert error(W + 0.01 * W.std() * step) > error(W)
