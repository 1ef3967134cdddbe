"""Prove that two states of the code write the same tensors, bit for bit.

    PYTHONPATH=/path/to/one python benchmarks/same_tensors.py make DIR1    # two minutes, two cores
    PYTHONPATH=/path/to/another python benchmarks/same_tensors.py make DIR2
    python benchmarks/same_tensors.py compare DIR1 DIR2

``make`` builds tiny models of every family from seeds, quantizes merges of them in every way that
could go wrong, merges them by every method, and keeps what is written: one folder of DIR a case,
``inputs`` (the models themselves) among them, and all that the host printed in ``log.txt``.
``compare`` reads every safetensors file of both, prints one line a case, and exits with 1 if a
tensor differs, in value, dtype or shape, or is in one of them only.

PYTHONPATH says whose code runs; ``make`` prints where it is, refuses code of several places, and
``compare`` prints both. Make both on one machine with one environment: other kernels of torch, or
more threads, may add up in another order. ``--only 'llama-*'`` takes some of the cases.

Nothing but the public door of the package is used, and nothing of the tests. Should a keyword of
``epmq_gptq.merge`` or ``epmq_gptq.requantize`` change, ``call_merge`` or ``call_requantize`` is the
one place to adapt.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import inspect
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Set, not defaulted: with more threads sums may be added up in another order.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# Neither gptqmodel nor epmq_gptq is imported up here: `compare` needs none of them, and models are
# built by transformers as it is, before anything else had a chance to change it.

EXPERTS = ("expert0", "expert1")
PROFILES: dict[str, dict[str, Any]] = {"default": {}, "paper": {"profile": "paper"}}
VOCABULARY = 260
PIXELS = 32  # of an image, each way
BATCH = 3
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PROSE = "A merge bends every model away from what it was trained for, and rounding bends it again."

Rows = dict[str, list[Any]]


# ---- models --------------------------------------------------------------------------------------

TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = dict(
    **TOKENS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
MIXTURE = dict(num_experts_per_tok=2, tie_word_embeddings=False)
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(image_size=PIXELS, patch_size=8, projection_dim=32, **TOWER)


def build(kind: str, **options: Any) -> PreTrainedModel:
    """A language model of a class of transformers, such as ``Llama``, in one shape for all."""
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def build_half() -> PreTrainedModel:
    """A Llama as it is published: in half precision."""
    return build("Llama", tie_word_embeddings=False).to(torch.bfloat16)


def build_gpt2() -> PreTrainedModel:
    """Its linear layers are stored transposed, and have biases."""
    shape = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TOKENS, **shape))


def build_opt() -> PreTrainedModel:
    """Its linear layers have biases."""
    shape = dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_attention_heads=4)
    shape |= dict(num_hidden_layers=2, max_position_embeddings=128)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**TOKENS, **shape))


def build_t5(gated: bool) -> PreTrainedModel:
    """FLAN-T5's kind (gated, with a head of its own), or T5's (the head is the embedding)."""
    shape = dict(d_model=64, d_kv=16, d_ff=96, num_heads=4, num_layers=2, num_decoder_layers=2)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        **shape,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if gated:  # transformers 5 makes every new T5 with a shared head; it reads the other kind too
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, 64))
    return model


def build_vision(kind: str) -> PreTrainedModel:
    """A vision tower of CLIP, with its projection or without."""
    return getattr(transformers, kind)(transformers.CLIPVisionConfig(**VISION))


def build_clip() -> PreTrainedModel:
    """Both towers."""
    text = dict(max_position_embeddings=32, projection_dim=32, **TOKENS, **TOWER)
    config = transformers.CLIPConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.CLIPTextConfig(**text),
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Weights so large that every part of the model matters, biases and norms included."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            weight.normal_(0, weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.1)
        elif weight.ndim == 1:
            weight.uniform_(0.5, 1.5)


def tuned(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """A fine-tune: all but the tables of tokens and positions moved by some of their spread."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        is_table = any(part in name for part in ("embed", "lm_head", "wte", "wpe", "shared"))
        if tensor.is_floating_point() and tensor.ndim and not is_table:
            size = 0.3 * float(tensor.std()) if tensor.ndim > 1 else 0.05
            tensor += size * torch.randn(tensor.shape, generator=generator)
    return state


def average(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of each tensor."""
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens that GPTQModel asks for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {byte: index + 4 for index, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = TEMPLATE
    return made


def save(model: PreTrainedModel, folder: Path) -> None:
    """A model with all that its rows are read by; one in half precision in several files."""
    size = "100KB" if model.dtype == torch.bfloat16 else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    tokenizer().save_pretrained(folder)
    if "clip" in model.config.model_type:
        size = {"size": {"shortest_edge": PIXELS}, "crop_size": PIXELS}
        CLIPImageProcessorPil(**size).save_pretrained(folder)


# ---- rows ----------------------------------------------------------------------------------------


def token_rows(seed: int) -> list[dict[str, list[int]]]:
    """Random tokens in rows of several lengths; every seed favours other tokens."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(VOCABULARY, generator=generator) ** 6
    weights[:4] = 0
    rows = []
    for index in range(7 + seed):
        length = 48 - 5 * (index % 3)
        drawn = torch.multinomial(weights, length, replacement=True, generator=generator)
        rows.append({"input_ids": drawn.tolist()})
    return rows


def images(seed: int) -> list[torch.Tensor]:
    """Pixel values ``(3, PIXELS, PIXELS)``; every seed has a ground of its own."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.randn(3, PIXELS, PIXELS, generator=generator)
    noise = torch.randn(7 + seed, 3, PIXELS, PIXELS, generator=generator)
    return list(ground + 0.7 * noise)


def texts(seed: int) -> list[str]:
    """Different pieces of one sentence."""
    return [PROSE[5 * seed + 3 * index :][: 24 + 2 * (index % 3)] for index in range(7 + seed)]


def rows_of_tokens() -> Rows:
    """Of a language model."""
    return {name: token_rows(seed) for seed, name in enumerate(EXPERTS)}


def rows_of_pairs() -> Rows:
    """Of a T5: token ids for one expert, texts for the other."""
    ids = [row["input_ids"] for row in token_rows(0)]
    pairs = [{"input_ids": row[:-9], "labels": row[-9 + index :]} for index, row in enumerate(ids)]
    words = [{"text": text, "target": text[:9]} for text in texts(1)]
    return dict(zip(EXPERTS, (pairs, words), strict=True))


def rows_of_images() -> Rows:
    """Of a vision tower: pixel values for one expert, images to be prepared for the other."""
    values = [{"pixel_values": pixels} for pixels in images(0)]
    arrays = [(pixels.sigmoid() * 255).byte().permute(1, 2, 0).numpy() for pixels in images(1)]
    return dict(zip(EXPERTS, (values, [{"image": array} for array in arrays]), strict=True))


def rows_of_images_and_texts() -> Rows:
    """Of both towers of a CLIP."""
    return {
        name: [
            {"pixel_values": pixels, "text": text}
            for pixels, text in zip(images(seed), texts(seed), strict=True)
        ]
        for seed, name in enumerate(EXPERTS)
    }


def rows_of_texts() -> Rows:
    """Strings for one expert, messages for the other, through the chat template."""
    messages = [{"messages": [{"role": "user", "content": text}]} for text in texts(1)]
    return dict(zip(EXPERTS, (texts(0), messages), strict=True))


def rows_of_one_source() -> dict[str, Any]:
    """Rows of all experts in one list, which says whose each is."""
    named = [
        {"task": name, "text": text} for seed, name in enumerate(EXPERTS) for text in texts(seed)
    ]
    return {"rows": named[::2] + named[1::2], "expert_column": "task"}


def rows_of_files(folder: Path) -> dict[str, Any]:
    """Lines of a file, some of which are drawn, and a text that is cut into blocks."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(3))
    (folder / "lines.jsonl").write_text(lines, encoding="utf-8")
    (folder / "prose.txt").write_text("\n".join(texts(5)), encoding="utf-8")
    drawn = {"file": str(folder / "lines.jsonl"), "samples": 7, "seed": 5}
    blocks = {"file": str(folder / "prose.txt"), "concat": True, "seqlen": 32, "samples": 8}
    return dict(zip(EXPERTS, (drawn, blocks), strict=True))


# ---- families ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        build: a model with any weights.
        rows: calibration rows of every expert.
        options: of ``EPMQConfig`` that it needs.
        is_clip: whether ``load_clip`` reads what is made of it.
    """

    build: Callable[[], PreTrainedModel]
    rows: Callable[[], Rows] = rows_of_tokens
    options: Mapping[str, Any] = field(default_factory=dict)
    is_clip: bool = False


def text_model(kind: str, tied: bool = False, **options: Any) -> Family:
    """A language model whose head is the embedding (``tied``) or its own."""
    return Family(partial(build, kind, tie_word_embeddings=tied, **options))


BOTH_TOWERS = {"dynamic": {r"+:text_model\..*": {}}}
FAMILIES = {
    "llama": text_model("Llama"),
    "llama-half": Family(build_half),
    "mistral": text_model("Mistral", sliding_window=16),
    "qwen2": text_model("Qwen2"),
    "qwen2-tied": text_model("Qwen2", tied=True),
    "qwen3": text_model("Qwen3", tied=True, head_dim=16),
    "gemma": text_model("Gemma", tied=True, head_dim=16),
    "phi3": text_model("Phi3"),
    "gpt2": Family(build_gpt2),
    "opt": Family(build_opt),
    "mixtral": Family(partial(build, "Mixtral", **MIXTURE, num_local_experts=4)),
    "qwen3-moe": Family(
        partial(build, "Qwen3Moe", **MIXTURE, head_dim=16, num_experts=4, moe_intermediate_size=32)
    ),
    "t5": Family(partial(build_t5, gated=False), rows_of_pairs),
    "flan-t5": Family(partial(build_t5, gated=True), rows_of_pairs),
    "clip-vision": Family(partial(build_vision, "CLIPVisionModel"), rows_of_images, is_clip=True),
    "clip-projection": Family(
        partial(build_vision, "CLIPVisionModelWithProjection"), rows_of_images, is_clip=True
    ),
    "clip-towers": Family(build_clip, rows_of_images_and_texts, BOTH_TOWERS, is_clip=True),
}


@dataclass(frozen=True)
class Inputs:
    """The models of one family, on disk.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    @property
    def base(self) -> Path:
        """What the experts were tuned from."""
        return self.folder / "base"

    @property
    def merged(self) -> Path:
        """The average of the experts."""
        return self.folder / "merged"

    @property
    def experts(self) -> dict[str, str]:
        """Name → folder."""
        return {name: str(self.folder / name) for name in EXPERTS}


def make_inputs(family: Family, inputs: Inputs) -> None:
    """Save a base, fine-tunes of it and their average."""
    torch.manual_seed(0)
    model = family.build().eval()
    enliven(model)
    save(model, inputs.base)
    states = [tuned(model, seed=100 + index) for index in range(len(EXPERTS))]
    for name, state in zip(EXPERTS, states, strict=True):
        model.load_state_dict(state)
        save(model, inputs.folder / name)
    model.load_state_dict(average(states))
    save(model, inputs.merged)


def make_adapter(llama: Inputs, folder: Path) -> None:
    """Save a LoRA adapter of a Llama's base, and the average of an expert and of what it makes."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    read = transformers.LlamaForCausalLM.from_pretrained
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(read(llama.base), LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder / "adapter")
    states = [read(llama.experts["expert0"]).state_dict(), adapted.merge_and_unload().state_dict()]
    model = read(llama.base)
    model.load_state_dict(average(states))
    save(model, folder / "merged")


def make_all_inputs(root: Path) -> dict[str, Inputs]:
    """All models. They are saved before a run, for GPTQModel changes how a Mixtral is saved."""
    found = {name: Inputs(root / name) for name in FAMILIES}
    for name, inputs in found.items():
        make_inputs(FAMILIES[name], inputs)
    make_adapter(found["llama"], root / "llama-adapter")
    return found


# ---- the package ---------------------------------------------------------------------------------


def quantize(
    merged: Path,
    experts: Mapping[str, Any],
    rows: Any,
    out: Path,
    *,
    state: Path | None = None,
    **options: Any,
) -> None:
    """Quantize a merge to 4 bits, unless ``options`` say otherwise, and save it.

    Args:
        merged, experts, rows, out: the merge, its experts, their rows, where the result goes.
        state: folder where the run keeps what it needs to go on, and goes on from.
        options: of ``EPMQConfig``.
    """
    from gptqmodel import CheckpointConfig, GPTQModel

    from epmq_gptq import EPMQConfig

    config = EPMQConfig(**({"bits": 4, "group_size": 32, "experts": dict(experts)} | options))
    model = GPTQModel.load(str(merged), config, dtype=torch.float32, device="cpu")
    resumed = {} if state is None else {"checkpoint": CheckpointConfig(state)}
    model.quantize(rows, batch_size=BATCH, **resumed)
    model.save(str(out))


def call_merge(method: str, inputs: Inputs, rows: Rows | None, out: Path) -> None:
    """Merge the experts of a family; ``rows`` where the method asks for them."""
    import epmq_gptq

    calibration = {} if rows is None else {"calibration": rows, "batch_size": BATCH}
    call(epmq_gptq.merge, method, experts=inputs.experts, base=inputs.base, out=out, **calibration)


def call_requantize(statistics: Path, merged: Path, out: Path, settings: dict, **more: Any) -> None:
    """Quantize a merge anew from what a run kept."""
    import epmq_gptq

    options = dict(merged=merged, out=out, settings=settings, device="cpu", **more)
    call(epmq_gptq.requantize, statistics, **options)


def call(function: Callable, *values: Any, **keywords: Any) -> Any:
    """Call a function of the package, and say what it takes where that is something else.

    Raises:
        TypeError: it takes other arguments than it is given here.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*values, **keywords)
    except TypeError as error:
        here = f"`call_{function.__name__}` in {Path(__file__).name}"
        taken = f"`{function.__name__}{signature}`"
        raise TypeError(f"{error}: the package has {taken}; adapt {here} to it.") from error
    return function(*values, **keywords)


def merge_methods() -> dict[str, bool]:
    """Method → whether it needs calibration."""
    import epmq_gptq

    return {name: bool(one["needs_calibration"]) for name, one in epmq_gptq.methods().items()}


@torch.no_grad()
def clip_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """What a quantized CLIP says of some images, read by ``load_clip``."""
    from epmq_gptq import load_clip

    model = load_clip(folder, device="cpu", backend="gptq_torch")
    pixels = torch.stack(images(1)[:2]).to(model.dtype)
    with torch.compiler.set_stance("force_eager"):  # to compile the kernels would take minutes
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
        else:
            output = model(pixel_values=pixels)
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


# ---- cases ---------------------------------------------------------------------------------------

Case = Callable[[Path], None]  # given the folder that it may fill

# Ways through the package that no family takes by itself: name → family and options.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-profile": ("llama", dict(profile="gptq")),
    "3-bits-act-order": ("llama", dict(bits=3, desc_act=True, act_group_aware=False)),
    "8-bits-whole-columns": ("llama", dict(bits=8, group_size=-1, alpha=0.1)),
    "asymmetric-head": ("llama", dict(sym=False, lm_head=True)),
    "biases-channels": ("qwen2", dict(bias_refit=True, anchor="channel")),
    "half-corrections": ("gpt2", dict(eta=0.5, rho=0.5, held_out=0.25)),
    "minmax": ("llama", dict(weighting="minmax")),
    "weights": ("llama", dict(weighting="trace", expert_weights={"expert1": 2.0})),
    "patterns": (
        "phi3",
        dict(alpha_pattern={"mlp.down_proj": 10.0}, dynamic={r".*o_proj": {"bits": 8}}),
    ),
    "few-tokens": ("qwen3-moe", dict(fallback={"threshold": 310})),
}


WALKED = ("gpt2", "flan-t5", "clip-projection")  # by merge methods that run the layers


def quantize_family(
    family: Family, inputs: Inputs, out: Path, experts: Mapping[str, Any] | None = None, **more: Any
) -> None:
    """A family's merge towards its experts."""
    experts = inputs.experts if experts is None else experts
    quantize(inputs.merged, experts, family.rows(), out, **(dict(family.options) | more))
    if family.is_clip:
        save_file(clip_outputs(out), out / "outputs-of-load-clip.safetensors")


def quantize_adapter(llama: Inputs, folder: Path, out: Path, **options: Any) -> None:
    """One expert is a LoRA adapter."""
    experts = {
        "expert0": llama.experts["expert0"],
        "expert1": f"{llama.base}+{folder / 'adapter'}",
    }
    quantize(folder / "merged", experts, rows_of_tokens(), out, **options)


def quantize_in_memory(llama: Inputs, out: Path) -> None:
    """One expert is a module, the other a state dict."""
    read = transformers.LlamaForCausalLM.from_pretrained
    first, second = (read(folder).eval() for folder in llama.experts.values())
    experts = {"expert0": first, "expert1": second.state_dict()}
    # Of a state dict alone no pass can be run.
    quantize(llama.merged, experts, rows_of_tokens(), out, profile="paper")


def quantize_data_free(llama: Inputs, out: Path) -> None:
    """One expert has no rows: its task vector stands in."""
    rows = {"expert0": rows_of_tokens()["expert0"]}
    options = dict(data_free=["expert1"], base=str(llama.base))
    quantize(llama.merged, llama.experts, rows, out, **options)


def quantize_texts(llama: Inputs, out: Path) -> None:
    """The tokenizer, the chat template, files and draws are in it."""
    quantize(llama.merged, llama.experts, rows_of_texts(), out / "memory")
    quantize(llama.merged, llama.experts, rows_of_one_source(), out / "one-source")
    quantize(llama.merged, llama.experts, rows_of_files(out), out / "files")


def quantize_twice(llama: Inputs, out: Path) -> None:
    """The second run goes on from what the first one has kept of its layers."""
    for name in ("first", "second"):
        rows = rows_of_tokens()
        quantize(llama.merged, llama.experts, rows, out / name, state=out / "state")
    shutil.rmtree(out / "state")  # not a result


def quantize_again(family: Family, inputs: Inputs, out: Path, **options: Any) -> None:
    """Keep the statistics, which are compared as well, and quantize from them: alike, and not."""
    recorded = out / "recorded"
    quantize_family(family, inputs, recorded, save_statistics=True, **options)
    call_requantize(recorded, inputs.merged, out / "alike", {})
    other = {"bits": 8, "alpha": 0.5, "expert_weights": {"expert0": 2.0}}
    call_requantize(recorded, inputs.merged, out / "other", other)
    call_requantize(recorded, inputs.merged, out / "alone", {}, leave_out=["expert1"])


def all_cases(found: Mapping[str, Inputs], adapter: Path) -> Iterator[tuple[str, Case]]:
    """Name and work of everything that is compared."""
    for name, family in FAMILIES.items():
        for profile, options in PROFILES.items():
            yield f"{name}-{profile}", partial(quantize_family, family, found[name], **options)
    llama = found["llama"]
    for profile, options in PROFILES.items():
        yield f"adapter-{profile}", partial(quantize_adapter, llama, adapter, **options)
    for case, (name, options) in OPTIONS.items():
        yield f"option-{case}", partial(quantize_family, FAMILIES[name], found[name], **options)
    yield "expert-in-memory", partial(quantize_in_memory, llama)
    yield "data-free", partial(quantize_data_free, llama)
    yield "texts", partial(quantize_texts, llama)
    yield "resumed", partial(quantize_twice, llama)
    for name, options in (("llama", {}), ("flan-t5", PROFILES["paper"])):
        work = partial(quantize_again, FAMILIES[name], found[name], **options)
        yield f"statistics-{name}", work
    for method, needs_rows in merge_methods().items():
        for name in ("llama", "llama-half") + (WALKED if needs_rows else ()):
            rows = FAMILIES[name].rows() if needs_rows else None
            yield f"merge-{method}-{name}", partial(call_merge, method, found[name], rows)


# ---- make ----------------------------------------------------------------------------------------


def make(root: Path, only: str) -> int:
    """Run the cases, each into its folder of ``root``; how many of them failed."""
    if root.exists() and any(root.iterdir()):
        raise SystemExit(f"{root} is not empty: what is in it would be taken for a result.")
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    with (root / "log.txt").open("w", encoding="utf-8") as log, heard(log):
        os.chdir(root)  # GPTQModel writes its logs into the working directory
        found = make_all_inputs(root / "inputs")
        say(f"inputs: {time.perf_counter() - start:.1f} s")
        code = place_of_code()
        say(f"code: {code}")
        names, failed = ["inputs"], []
        for name, work in all_cases(found, root / "inputs" / "llama-adapter"):
            if fnmatch.fnmatch(name, only):
                names.append(name)
                if not run(work, root / name):
                    failed.append(name)
        check_code(code)
    note = {"code": str(code), "torch": torch.__version__, "cases": names}
    (root / "made.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    say(f"{len(names) - 1} cases, {len(failed)} failed, {seconds:.0f} s; host's output: log.txt")
    return len(failed)


def run(work: Case, out: Path) -> bool:
    """Run one case; whether it came to its end. What a failed one left is taken away."""
    start = time.perf_counter()
    out.mkdir()
    print(f"==== {out.name}", flush=True)
    try:
        work(out)
    except Exception:
        shutil.rmtree(out)
        traceback.print_exc()
        say(f"{out.name}: FAILED\n{traceback.format_exc()}")
        return False
    say(f"{out.name}: {time.perf_counter() - start:.1f} s")
    return True


def say(text: str) -> None:
    """A line for who runs this, whatever is done with the host's."""
    print(text, file=sys.__stderr__, flush=True)


@contextlib.contextmanager
def heard(log: Any) -> Iterator[None]:
    """All that is printed goes to a file."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def place_of_code() -> Path:
    """The checkout, or the folder of packages, whose code runs."""
    import epmq_gptq

    return Path(epmq_gptq.__file__).resolve().parents[1]


def check_code(place: Path) -> None:
    """Raise SystemExit if a part of the package came from elsewhere: nothing would be proven."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == "epmq_gptq" and file is not None:
            if not Path(file).resolve().is_relative_to(place):
                raise SystemExit(f"{name} is of {file}, and epmq_gptq of {place}")


# ---- compare -------------------------------------------------------------------------------------


def compare(first: Path, second: Path, only: str) -> int:
    """Print one line a case; how many are not the same in both."""
    notes = [json.loads((root / "made.json").read_text("utf-8")) for root in (first, second)]
    for root, note in zip((first, second), notes, strict=True):
        print(f"{root}: {note['code']}, torch {note['torch']}")
    names = dict.fromkeys(name for note in notes for name in note["cases"])
    names = [name for name in names if fnmatch.fnmatch(name, only)]
    if not names:
        raise SystemExit("nothing to compare")
    results = {name: difference(first / name, second / name) for name in names}
    width = max(map(len, names))
    for name, (_, text) in results.items():
        print(f"{name:<{width}}  {text}")
    different = sum(not same for same, _ in results.values())
    total = f"all {len(names)} equal" if not different else f"{different} of {len(names)} NOT EQUAL"
    print(total)
    return different


def difference(first: Path, second: Path) -> tuple[bool, str]:
    """Whether two folders hold the same tensors, and one line about it."""
    one, other = read(first), read(second)
    absent = [str(folder) for folder, found in ((first, one), (second, other)) if not found]
    if absent:
        return False, f"MISSING: no tensors in {' and '.join(absent)}"
    alone = sorted(one.keys() ^ other.keys())
    common = sorted(one.keys() & other.keys())
    differing = [name for name in common if not are_equal(one[name], other[name])]
    if not alone and not differing:
        return True, f"equal ({len(common)} tensors)"
    parts = []
    if differing:
        by = {name: distance(one[name], other[name]) for name in differing}
        values = [value for value in by.values() if value is not None]
        greatest = f"greatest difference {max(values):.3g}" if values else "dtypes or shapes"
        parts.append(f"{len(by)} of {len(common)} tensors differ, {greatest} ({differing[0]})")
    if alone:
        parts.append(f"{len(alone)} tensors in one of them only ({alone[0]})")
    return False, "DIFFERENT: " + "; ".join(parts)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file, by its file and name."""
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():
                tensors[f"{file.relative_to(folder)}: {name}"] = reader.get_tensor(name)
    return tensors


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: -0.0 is not 0.0, and a NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def distance(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The greatest difference of two entries; None where dtypes or shapes are not the same.

    Of packed codes it is that of the words that hold them.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return None
    return float((one.double() - other.double()).abs().max())


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run all cases")
    making.add_argument("folder", type=Path, help="new or empty")
    comparing = commands.add_parser("compare", help="compare two runs")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    for one in (making, comparing):
        one.add_argument("--only", default="*", metavar="PATTERN", help="cases, such as 'llama-*'")
    options = parser.parse_args()
    if options.command == "make":
        bad = make(options.folder, options.only)
    else:
        bad = compare(options.first, options.second, options.only)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
