"""One layer at a time gives what the whole model gives, and leaves the model as it was."""

import pytest
import torch
from regmean_models import experts_of, model_of, plan_of, stored
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQInputError, EPMQNumericalError
from epmq_gptq.experts.passes.layer_walk import InputGrams, LayerWalk
from epmq_gptq.experts.passes.skeleton import Skeleton
from epmq_gptq.io.checkpoints import Checkpoint

CPU = torch.device("cpu")
# Gemma 2 asks its layers for their kind of attention; OPT has a dropped first position.
LANGUAGE = ["llama", "gpt2", "gemma2", "opt"]
KINDS = [*LANGUAGE, "clip_vision", "clip_projection", "clip", "t5", "flan_t5"]


def _skeleton(folder):
    checkpoint = Checkpoint(folder, what="base")
    return Skeleton(checkpoint, CPU), checkpoint


def _layer_outputs(model, stack, batch):
    """What each layer of a whole model returns, as tuples."""
    found = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: found.append(out))
        for layer in model.get_submodule(stack.path)
    ]
    options = {"use_cache": False} if stack.options else {}
    with torch.no_grad():
        model(**batch, **options)
    for handle in handles:
        handle.remove()
    return [out if isinstance(out, tuple) else (out,) for out in found]


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_equals_the_whole_model(tmp_path, kind):
    model = model_of(kind)
    base, _ = experts_of(model, tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    batches = plan_of(kind, ["a"]).batches
    walk = LayerWalk(batches, CPU)
    compared = 0
    for stack in skeleton.stacks:
        wanted = [_layer_outputs(model, stack, batch) for batch in batches]
        for index in range(len(stack.layers)):
            skeleton.fill(skeleton.outer(embeddings=index == 0), checkpoint.read)
            skeleton.fill(skeleton.within(stack.name(index)), checkpoint.read)
            with walk.at(skeleton.stacks, stack, index) as run, torch.no_grad():
                for number in range(len(batches)):
                    output = run(number)
                    walk.keep(stack, number, output)
                    got = output if isinstance(output, tuple) else (output,)
                    for mine, theirs in zip(got, wanted[number][index], strict=True):
                        if theirs is not None:
                            assert torch.allclose(mine, theirs, atol=1e-6), (stack.path, index)
                            compared += 1
            skeleton.empty(skeleton.within(stack.name(index)))
        walk.leave(stack)
    assert compared >= 2 * 3 * len(skeleton.stacks)
    assert all("forward" not in vars(module) for module in skeleton.model.modules())
    assert not any(module._forward_hooks for module in skeleton.model.modules())
    layered = [n for s in skeleton.stacks for i in (0, 1) for n in skeleton.within(s.name(i))]
    assert layered and all(skeleton.get(name).is_meta for name in layered)


def test_position_biases_are_kept_once(tmp_path):
    """T5 returns biases of (heads, S, S) with every layer, far larger than a batch's states."""
    base, _ = experts_of(model_of("t5"), tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    batches = [plan_of("t5", ["a"]).batches[0] for _ in range(5)]
    walk = LayerWalk(batches, CPU)
    encoder = skeleton.stacks[0]
    skeleton.fill(skeleton.outer(embeddings=True), checkpoint.read)
    skeleton.fill(skeleton.within("encoder.block.0"), checkpoint.read)
    with walk.at(skeleton.stacks, encoder, 0) as run, torch.no_grad():
        for number in range(len(batches)):
            walk.keep(encoder, number, run(number))
    kept = walk._outputs["encoder.block"]
    assert len({output[1].data_ptr() for output in kept}) == 1
    assert len({output[0].data_ptr() for output in kept}) == len(batches)


def _add_one(module, args):
    args[0].add_(1)


def test_a_layer_that_changes_its_input_changes_no_state(tmp_path):
    base, _ = experts_of(model_of("llama"), tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    stack = skeleton.stacks[0]
    walk = LayerWalk(plan_of("llama", ["a"]).batches, CPU)
    skeleton.fill(skeleton.outer(embeddings=True), checkpoint.read)
    for index in range(2):
        skeleton.fill(skeleton.within(stack.name(index)), checkpoint.read)
    with walk.at([stack], stack, 0) as run, torch.no_grad():
        for number in range(len(walk.batches)):
            walk.keep(stack, number, run(number))
    stack.layers[1].register_forward_pre_hook(_add_one)
    with walk.at([stack], stack, 1) as run, torch.no_grad():
        assert torch.equal(run(0), run(0))


def test_layers_that_share_an_input_share_a_gram(tmp_path):
    base, _ = experts_of(model_of("flan_t5"), tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    batches = plan_of("flan_t5", ["a"]).batches
    walk = LayerWalk(batches, CPU)
    encoder, decoder = skeleton.stacks
    assert (encoder.path, decoder.path) == ("encoder.block", "decoder.block")
    skeleton.fill(skeleton.outer(embeddings=True), checkpoint.read)
    for stack in (encoder, decoder):
        for index in range(2):
            skeleton.fill(skeleton.within(stack.name(index)), checkpoint.read)
            run_and_grams = walk.at(skeleton.stacks, stack, index), InputGrams(stack, index)
            with run_and_grams[0] as run, run_and_grams[1] as grams, torch.no_grad():
                for number, batch in enumerate(batches):
                    grams.begin(batch)
                    walk.keep(stack, number, run(number))
                    grams.end()
    found = {
        tuple(name.removeprefix("decoder.block.1.layer.") for name in one.layers): one
        for one in grams.result("a")
    }
    source = sum(int(batch["attention_mask"].sum()) for batch in batches)
    target = sum(int(batch["decoder_attention_mask"].sum()) for batch in batches)
    assert source != target
    attention = {
        tuple(f"0.SelfAttention.{x}" for x in "qkv"): target,
        ("0.SelfAttention.o",): target,
        ("1.EncDecAttention.q",): target,
        ("1.EncDecAttention.k", "1.EncDecAttention.v"): source,
        ("1.EncDecAttention.o",): target,
        ("2.DenseReluDense.wi_0", "2.DenseReluDense.wi_1"): target,
        ("2.DenseReluDense.wo",): target,
    }
    assert {layers: one.tokens for layers, one in found.items()} == attention
    assert all(one.gram.dtype == torch.float64 for one in found.values())


def test_inputs_that_are_not_finite_name_the_layer_and_the_expert(tmp_path):
    base, _ = experts_of(model_of("clip_vision"), tmp_path, count=1)
    state = stored(base)
    state["encoder.layers.0.layer_norm2.weight"][1] = float("inf")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    skeleton, checkpoint = _skeleton(base)
    batches = plan_of("clip_vision", ["a"]).batches
    walk = LayerWalk(batches, CPU)
    stack = skeleton.stacks[0]
    skeleton.fill(skeleton.outer(embeddings=True), checkpoint.read)
    skeleton.fill(skeleton.within(stack.name(0)), checkpoint.read)
    with walk.at([stack], stack, 0) as run, InputGrams(stack, 0) as grams, torch.no_grad():
        grams.begin(batches[0])
        run(0)
        grams.end()
    with pytest.raises(EPMQNumericalError, match="expert `a`: the inputs of layer") as caught:
        grams.result("a")
    assert caught.value.module == "encoder.layers.0.mlp.fc1"
    assert (caught.value.expert, caught.value.code) == ("a", "EPMQ-F27")


def test_a_layer_that_hides_its_tokens_is_refused(tmp_path):
    """A layer may regroup tokens; with padding among them nobody knows which are real."""
    base, _ = experts_of(model_of("llama"), tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    batches = plan_of("llama", ["a"]).batches
    stack = skeleton.stacks[0]
    skeleton.fill(skeleton.outer(embeddings=True), checkpoint.read)
    skeleton.fill(skeleton.within(stack.name(0)), checkpoint.read)
    mlp = stack.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :1]), x[:, 1:]], dim=1)
    walk = LayerWalk(batches, CPU)
    with walk.at([stack], stack, 0) as run, InputGrams(stack, 0) as grams, torch.no_grad():
        grams.begin(batches[0])
        with pytest.raises(EPMQInputError, match="gate_proj` is given 2 tokens of a batch") as got:
            run(0)
    assert got.value.code == "EPMQ-F38" and "batch_size" in got.value.remedy


def test_a_layer_that_the_forward_leaves_out_is_refused(tmp_path):
    base, _ = experts_of(model_of("llama"), tmp_path, count=1)
    skeleton, checkpoint = _skeleton(base)
    stack = skeleton.stacks[0]
    walk = LayerWalk(plan_of("llama", ["a"]).batches, CPU)
    for index in range(2):
        skeleton.fill(skeleton.within(stack.name(index)), checkpoint.read)
    skeleton.fill([n for n in skeleton._names if not n.startswith("model.layers")], checkpoint.read)
    with walk.at([stack], stack, 0) as run, torch.no_grad():
        for number in range(len(walk.batches)):
            walk.keep(stack, number, run(number))
    skeleton.model.config.num_hidden_layers = 1  # the forward stops before the second layer
    with (
        walk.at([stack], stack, 1) as run,
        torch.no_grad(),
        pytest.raises(EPMQInputError, match="`model.layers.1`: the model's forward does not run"),
    ):
        run(0)
