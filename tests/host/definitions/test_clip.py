"""CLIP's three classes under four methods: what is saved, and that it comes back as it was."""

from __future__ import annotations

import copy
import json

import clip_models
import pytest
import tiny
import torch
from clip_models import CLASSES, embeddings, images
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel, RTNConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format
from judge import codes, stored
from safetensors.torch import load_file
from transformers import AutoModel, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from epmq_gptq import EPMQConfig
from epmq_gptq.errors import EPMQInputError
from epmq_gptq.host.definitions.loading import load_clip
from epmq_gptq.merging import merge

BITS = dict(bits=4, group_size=32)
QUANTIZED = 2 * 6  # layers of the vision tower, linear layers of each


def quantized(method, merged, experts, *, rows=5, **options):
    """A model in memory, quantized on the CPU."""
    options = BITS | dict(offload_to_disk=False) | options
    dtype = torch.bfloat16 if method == "awq" else torch.float32
    if method == "epmq":
        config = EPMQConfig(profile="paper", **options, experts=experts, alpha=0.1)
        calibration = {name: images(rows, seed) for seed, name in enumerate(experts)}
    else:
        config = {"gptq": GPTQConfig, "rtn": RTNConfig, "awq": AWQConfig}[method](**options)
        calibration = None if method == "rtn" else images(rows, 0) + images(rows, 1)
    model = GPTQModel.load(str(merged), config, dtype=dtype, device="cpu")
    backend = dict(backend=BACKEND.AWQ_TORCH) if method == "awq" else {}
    model.quantize(calibration, batch_size=4, **backend)
    return model


def kernel(method):
    """The host's torch kernel of a method, and a dtype that it computes in."""
    if method == "awq":
        return dict(backend="awq_torch", dtype=torch.bfloat16)
    return dict(backend="gptq_torch", dtype=torch.float16)


def runnable(model, method):
    """A copy that computes as a loaded one does: the host packs, and prepares only at loading."""
    module = copy.deepcopy(model.model)
    if method != "awq":
        module = convert_gptq_v1_to_v2_format(
            module, cfg=model.quantize_config, qlinear_kernel=model.qlinear_kernel
        )
    for layer in module.modules():
        if hasattr(layer, "qweight"):
            layer.post_init()
    return module.to(kernel(method)["dtype"]).eval()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Merge and experts of each class; vision towers without a tokenizer, as on the hub."""
    return {
        kind: clip_models.family(
            tmp_path_factory.mktemp(kind.__name__), kind=kind, tokenizer=kind is CLIPModel
        )
        for kind in CLASSES
    }


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "epmq"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_saved_model_comes_back_as_it_was(families, tmp_path, kind, method):
    merged, experts = families[kind]
    model = quantized(method, merged, experts)
    pixels = torch.stack(images(3, seed=9))
    before = embeddings(runnable(model, method), pixels)
    model.save(str(tmp_path / "out"))

    loaded = GPTQModel.load(str(tmp_path / "out"), device="cpu", **kernel(method)).model
    assert type(loaded) is kind
    assert torch.equal(embeddings(loaded, pixels), before)
    # Four bits of a model with random weights.
    dense = embeddings(kind.from_pretrained(merged), pixels)
    assert 0.01 < (before.float() - dense).norm() / dense.norm() < 0.3
    check_stored(tmp_path / "out", merged, method)


def check_stored(out, merged, method):
    """Vision layers are packed; everything else is the merge's, bit for bit."""
    source, written = load_file(merged / "model.safetensors"), stored(out)
    packed = {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")}
    assert len(packed) == QUANTIZED and all(".layers." in name for name in packed)
    assert not any("text_model" in name for name in packed)
    untouched = {n: t for n, t in source.items() if n.rpartition(".")[0] not in packed}
    if method == "awq":  # computes in bfloat16, and scales what comes before a layer
        untouched = {
            name: tensor.bfloat16()
            for name, tensor in untouched.items()
            if "text_model" in name or ".layer_norm" not in name
        }
    assert len(untouched) > 5
    for name, tensor in untouched.items():
        assert torch.equal(written[name], tensor), name
    processor = "preprocessor_config.json"
    assert (out / processor).read_bytes() == (merged / processor).read_bytes()
    config, was = (json.loads((f / "config.json").read_text()) for f in (out, merged))
    for key in ("architectures", "model_type", "projection_dim"):
        assert config[key] == was[key], key
    for tower in ("vision_config", "text_config"):
        # The host adds a dtype.
        assert was.get(tower, {}).items() <= config.get(tower, {}).items(), tower


def test_awq_leaves_the_model_the_same_but_for_rounding(families):
    """Scaling goes into LayerNorm and v only; fc1 cannot take fc2's through the activation."""
    merged, experts = families[CLIPVisionModel]
    model = quantized("awq", merged, experts)
    source, result = load_file(merged / "model.safetensors"), model.model.state_dict()
    for layer in range(2):
        prefix = f"encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            weight, bias = (source[f"{prefix}.{norm}.{part}"] for part in ("weight", "bias"))
            scale = weight / result[f"{prefix}.{norm}.weight"].float()
            assert (scale - 1).abs().max() > 0.05  # it did scale
            # bfloat16 keeps 8 bits.
            scaled = bias / scale
            torch.testing.assert_close(
                result[f"{prefix}.{norm}.bias"].float(), scaled, rtol=0.02, atol=1e-3
            )
        fc1 = source[f"{prefix}.mlp.fc1.bias"]
        torch.testing.assert_close(
            result[f"{prefix}.mlp.fc1.bias"].float(), fc1, rtol=0.01, atol=1e-3
        )


# ---- names of tensors ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(families, tmp_path_factory):
    """What becomes of the tower where no name has the prefix: every stored tensor."""
    out = tmp_path_factory.mktemp("bare") / "out"
    quantized("epmq", *families[CLIPVisionModel]).save(str(out))
    return stored(out)


@pytest.mark.parametrize(
    ("merged_prefixed", "experts_prefixed"), [(True, True), (True, False), (False, True)]
)
def test_names_with_and_without_the_tower_are_the_same_model(
    families, bare, tmp_path, merged_prefixed, experts_prefixed
):
    merged, experts = families[CLIPVisionModel]
    merged, *others = (
        clip_models.renamed(folder, tmp_path / folder.name, prefixed=prefixed)
        for folder, prefixed in (
            (merged, merged_prefixed),
            *((folder, experts_prefixed) for folder in experts.values()),
        )
    )
    # The way of a large model: layers come from the disk and go there.
    model = quantized("epmq", merged, dict(zip(experts, others, strict=True)), offload_to_disk=True)
    model.save(str(tmp_path / "out"))
    got = stored(tmp_path / "out")
    assert bare.keys() == got.keys()
    assert all(torch.equal(bare[name], got[name]) for name in bare)


def test_the_towers_of_whole_models_are_experts_of_a_tower(families, tmp_path):
    """``openai/clip-…`` is a whole model, its fine-tunes are vision towers."""
    _, whole = families[CLIPModel]
    towers = {}
    for name, folder in whole.items():
        tower = CLIPVisionModel.from_pretrained(folder)
        towers[name] = clip_models.save(tower, tmp_path / name, tokenizer=False)
    merge("average", base=None, experts=towers, out=tmp_path / "merged")
    outs = {}
    for label, experts in (("towers", towers), ("whole", whole)):
        model = quantized("epmq", tmp_path / "merged", experts)
        model.save(str(outs.setdefault(label, tmp_path / label)))
    first, second = codes(outs["towers"]), codes(outs["whole"])
    assert len(first) == QUANTIZED and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- merging -------------------------------------------------------------------------------------


def test_an_average_of_hub_like_checkpoints_is_quantized(families, tmp_path):
    experts = {
        name: clip_models.renamed(folder, tmp_path / name, prefixed=True)
        for name, folder in families[CLIPVisionModel][1].items()
    }
    merge("average", base=None, experts=experts, out=tmp_path / "average")
    names = load_file(tmp_path / "average" / "model.safetensors")
    assert all(name.startswith(clip_models.TOWER) for name in names)
    assert (tmp_path / "average" / "preprocessor_config.json").is_file()

    model = quantized("epmq", tmp_path / "average", experts)
    report = model.epmq_report
    assert len(report.modules) == QUANTIZED
    assert {module.target for module in report.modules} == {"experts"}
    # 5 images of 16 patches and a class token each.
    assert report.tokens == dict.fromkeys(experts, 5 * 17)
    for module in report.modules:
        assert module.tokens == report.tokens and 0 <= module.excess < module.merge_excess


# ---- loading -------------------------------------------------------------------------------------


def test_load_clip_gives_the_transformers_model(families, tmp_path):
    merged, experts = families[CLIPVisionModelWithProjection]
    quantized("gptq", merged, experts).save(str(tmp_path / "out"))
    pixels = torch.stack(images(2, seed=9))
    loaded = GPTQModel.load(str(tmp_path / "out"), device="cpu", **kernel("gptq")).model
    one_line = load_clip(tmp_path / "out", device="cpu", backend="gptq_torch")
    assert type(one_line) is CLIPVisionModelWithProjection and not one_line.training
    assert torch.equal(embeddings(one_line, pixels), embeddings(loaded, pixels))
    with pytest.raises(RuntimeError, match="pure text model"):
        AutoModel.from_pretrained(tmp_path / "out")  # why there is `load_clip`
    # Also one that is not quantized.
    for kind, (folder, _) in families.items():
        dense = load_clip(folder, device="cpu", dtype=torch.float32)
        assert type(dense) is kind
        expected = embeddings(kind.from_pretrained(folder), pixels)
        assert torch.equal(embeddings(dense, pixels), expected)


def test_load_clip_refuses_another_model(tmp_path):
    tiny.llama(layers=1).config.save_pretrained(tmp_path)
    with pytest.raises(EPMQInputError, match="clip and clip_vision_model, got 'llama'") as caught:
        load_clip(tmp_path)
    assert caught.value.code == "EPMQ-F38" and "GPTQModel.load" in caught.value.remedy


def test_a_class_without_a_definition_is_refused(families, tmp_path):
    merged, _ = families[CLIPModel]
    folder = clip_models.save(CLIPModel.from_pretrained(merged), tmp_path / "classifier")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["CLIPForImageClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EPMQInputError, match="got CLIPForImageClassification") as caught:
        GPTQModel.load(str(folder), GPTQConfig(**BITS), dtype=torch.float32, device="cpu")
    assert caught.value.code == "EPMQ-F38"


def test_images_cannot_be_joined(families):
    merged, _ = families[CLIPVisionModel]
    model = GPTQModel.load(str(merged), GPTQConfig(**BITS), dtype=torch.float32, device="cpu")
    with pytest.raises(EPMQInputError, match="`calibration_concat_size`.*got 64"):
        model.quantize(images(2, 0), calibration_concat_size=64)
    with pytest.raises(EPMQInputError, match=r"should be of \(3, 32, 32\)"):
        model.quantize([torch.zeros(3, 16, 16)])
