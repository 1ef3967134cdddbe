"""RegMean and RegMean++ against whole models in float64: every weight of every architecture."""

import pytest
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

KINDS = ["llama", "gpt2", "clip_vision", "clip_projection", "clip", "t5", "flan_t5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "merged_prefix"), [("regmean", False), ("regmean_plusplus", True)]
)
def test_every_weight_equals_whole_models_in_float64(tmp_path, kind, method, merged_prefix):
    model = model_of(kind)
    base, experts = experts_of(model, tmp_path)
    plan = plan_of(kind, list(experts))
    result = merged(method, base, experts, tmp_path / "merged", plan)
    written, mean = stored(result.out), average(experts)
    want = reference(model, experts, plan, 0.9, merged_prefix=merged_prefix)
    assert result.record["calibration"]["linears"] == len(want)
    for name, W in want.items():
        assert distance(written[name], W) < 1e-5, name
        # Far from the average, or the comparison would say little.
        assert distance(mean[name], W) > 1e-2, name
    for name in set(written) - set(want):
        assert distance(written[name], mean[name]) < 1e-6, name


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_two_methods_differ_behind_the_first_block(tmp_path, kind):
    base, experts = experts_of(model_of(kind), tmp_path)
    plan = plan_of(kind, list(experts))
    plain, plusplus = (
        stored(merged(method, base, experts, tmp_path / method, plan).out)
        for method in ("regmean", "regmean_plusplus")
    )
    name = {
        "llama": "model.layers.1.mlp.down_proj",
        "t5": "decoder.block.0.layer.1.EncDecAttention.k",
    }
    assert distance(plain[f"{name[kind]}.weight"], plusplus[f"{name[kind]}.weight"]) > 1e-3
