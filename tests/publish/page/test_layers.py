"""Layers from names: every architecture's, and names that nobody foresaw."""

import pytest
import regret_samples as samples

from epmq_gptq.publish.page.layers import kind_of, layer_labels, layer_of, layers_in_order


def labels(modules):
    return layer_labels(layers_in_order(modules))


def test_one_stack_is_its_numbers():
    assert labels(samples.llama(3)) == ["0", "1", "2"]
    assert labels(["transformer.h.10.attn.c_attn", "lm_head"]) == ["10", "lm_head"]


def test_two_stacks_are_told_apart_by_what_differs():
    assert labels(samples.t5(2)) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert labels(samples.clip(1)) == ["vision_model 0", "text_model 0", "visual_projection"]
    mixed = ["model.visual.blocks.0.qkv", "model.language_model.layers.0.q"]
    assert labels(mixed) == ["visual.blocks 0", "language_model.layers 0"]
    # Of one the whole name is shared.
    assert labels(["model.layers.0.q", "model.mtp.layers.0.q"]) == ["model.layers 0", "mtp 0"]


def test_routed_experts_are_in_the_layer_of_their_router():
    name = "model.layers.3.mlp.experts.17.down_proj"
    assert layer_of(name).index == 3
    assert kind_of(name) == "mlp.experts.*.down_proj"
    assert labels(samples.moe(2, 4)) == ["0", "1"]
    assert kind_of("encoder.block.0.layer.1.DenseReluDense.wi") == "layer.*.DenseReluDense.wi"


@pytest.mark.parametrize(
    "name, label, kind",
    [
        ("lm_head", "lm_head", "lm_head"),
        ("heads.3", "3", "heads"),
        ("0", "0", "*"),
        ("0.weight", "0", "weight"),
        ("", "", "*"),
        ("a..1.b", "1", "b"),
        ("layers.٣.q", "layers.٣.q", "layers.٣.q"),  # a digit, but not one of a layer's
        (f"layers.{'9' * 5000}.q", f"layers.{'9' * 5000}.q", f"layers.{'9' * 5000}.q"),
    ],
)
def test_odd_names(name, label, kind):
    assert labels([name]) == [label]
    assert kind_of(name) == kind


def test_layers_come_in_forward_order_and_once():
    modules = ["m.1.a", "m.0.a", "m.1.b", "head"]
    assert [layer.index for layer in layers_in_order(modules)] == [1, 0, None]
