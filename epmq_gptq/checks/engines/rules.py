"""The engines' conditions as data, each with where it stands in the engine's own source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...calibration.rows import IMAGES, form_of
from ...io.families import FAMILIES, family_of
from ..findings import listed
from .facts import Facts, Layer, plain
from .fused import CUT_INPUTS, FUSED, LINEAR_LEAVES, ROUTED
from .parallel import max_tensor_parallel, obstacle
from .table import ARCHITECTURES, CONFIG_FILE, ENGINES, MODEL_TYPES, VERSIONS

MARLIN_GROUPS = (-1, 32, 64, 128)
HOST_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
# Formats whose zero points are stored as they are, not less one.
VERSION_TWO = ("gptq_v2", "gptq_p")
# Marlin multiplies tiles of these outputs and inputs; vLLM knows the second form too, and fills up
# what fits neither.
TILES = ((64, 128), (128, 64))
# Engines fill the vocabulary up to a multiple of this (`vocab_parallel_embedding.py`).
VOCABULARY_STEP = 64
# Blocks in which optimum looks for layers.
_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
_BLOCKS += ("model.language_model.layers", "h", "decoder.layers", "layers")
_HALF = ("float16", "bfloat16")

Broken = Callable[[Facts], str | None]


class Rule(NamedTuple):
    """One condition of one engine.

    Attributes:
        engine: a key of :data:`~epmq_gptq.checks.engines.table.VERSIONS`.
        verdict: ``"no"``, or ``"limited"`` where it loads but not everywhere or not fast.
        source: where it stands.
        broken: facts → why it does not hold, or None.
    """

    engine: str
    verdict: str
    source: str
    broken: Broken


def judge(facts: Facts, engines: Iterable[str] = ENGINES) -> dict[str, dict[str, Any]]:
    """Engine → its version, its verdict (``yes``, ``limited`` or ``no``) and the reasons.

    An engine that splits layers over GPUs also gets ``max_tensor_parallel``.
    """
    table = {}
    for engine in engines:
        reasons = []
        for rule in RULES:
            if rule.engine != engine:
                continue
            reason = rule.broken(facts)
            if reason is not None:
                told = {"verdict": rule.verdict, "reason": reason, "source": rule.source}
                reasons.append(told)
        verdicts = {reason["verdict"] for reason in reasons}
        verdict = "no" if "no" in verdicts else "limited" if verdicts else "yes"
        table[engine] = {"version": VERSIONS[engine], "verdict": verdict, "reasons": reasons}
        if engine in _PARALLEL:
            fits = _PARALLEL[engine]
            table[engine]["max_tensor_parallel"] = max_tensor_parallel(facts, fits)
    return table


def _when(holds: Callable[[Facts], Any], reason: str) -> Broken:
    """A condition that is broken where ``holds`` finds something, which ``{}`` stands for."""

    def broken(facts: Facts) -> str | None:
        found = holds(facts)
        return reason.format(found) if found else None

    return broken


# ---- bits, groups, order ---------------------------------------------------------------


def _bits_in(allowed: tuple[int, ...], sym: bool | None = None) -> Broken:
    def broken(facts: Facts) -> str | None:
        for each, name in facts.settings.items():
            if each.bits not in allowed:
                return f"`{name}` has {each.bits} bits; it takes {_or(allowed)}"
            if sym is not None and each.sym is not sym:
                return f"`{name}` has sym={each.sym}; it takes sym={sym}"
        return None

    return broken


def _groups_in(allowed: tuple[int, ...], whole: bool = False) -> Broken:
    """``whole``: one group over all inputs counts as -1, and the last may be shorter."""

    def broken(facts: Facts) -> str | None:
        for layer in facts.layers:
            size = layer.settings.group_size
            if whole:
                size = plain(layer.settings, layer.inputs).group_size
            if size not in allowed:
                return f"`{layer.name}` has group_size {size}; it takes {_or(allowed)}"
            if not whole and size > 0 and layer.inputs % size:
                return f"`{layer.name}` has {layer.inputs} inputs, no multiple of {size}"
        return None

    return broken


def _no_desc_act(facts: Facts) -> str | None:
    for each, name in facts.settings.items():
        if each.desc_act and each.group_size != -1:
            return (
                f"`{name}` has desc_act=True, which it no longer reads; desc_act=False with "
                "act_group_aware=True has most of the gain"
            )
    return None


_gpu_only = _when(
    lambda facts: any(each.bits == 8 for each in facts.settings), "8 bits run on GPUs only"
)


_torch_kernel = _when(
    lambda facts: next((s.bits for s in facts.settings if s.bits not in (2, 4, 8)), None),
    "{} bits: the torch kernel only, which is slow",
)


def _float16_kernel(facts: Facts) -> str | None:
    slow = [
        name
        for each, name in facts.settings.items()
        if each.bits not in (4, 8) or not each.sym or each.group_size not in MARLIN_GROUPS
    ]
    return f"`{slow[0]}` runs in its older kernels, in float16 only" if slow else None


# ---- shapes ---------------------------------------------------------------


def _matrices(facts: Facts) -> list[Layer]:
    """The layers as Marlin gets them: parts of a fused layer beside one another."""
    wholes: dict[str, Layer] = {}
    for layer in facts.layers:
        parent, dot, last = layer.name.rpartition(".")
        whole = next((whole for whole, parts in FUSED.items() if last in parts), last)
        name = layer.name if ROUTED.match(layer.name) else f"{parent}{dot}{whole}"
        before = wholes.get(name)
        outputs = layer.outputs + (before.outputs if before else 0)
        wholes[name] = layer._replace(name=name, outputs=outputs)
    return list(wholes.values())


def _misfit(facts: Facts, size: int, tiles: tuple[tuple[int, int], ...]) -> Layer | None:
    """The first matrix of which a part on one of ``size`` GPUs fits no tile, as that part."""
    for layer in _matrices(facts):
        outputs, inputs = layer.outputs, layer.inputs
        last = layer.name.rpartition(".")[2]
        if last == layer.name:  # the head
            outputs += -outputs % VOCABULARY_STEP
        if last in CUT_INPUTS:
            inputs //= size
        else:
            outputs //= size
        if not any(outputs % n == 0 and inputs % k == 0 for n, k in tiles):
            return layer._replace(outputs=outputs, inputs=inputs)
    return None


def _padded(facts: Facts) -> str | None:
    layer = _misfit(facts, facts.tensor_parallel, TILES)
    if layer is None:
        return None
    return (
        f"the Marlin kernel takes outputs in steps of {TILES[0][0]} and inputs in steps of "
        f"{TILES[0][1]} (or the reverse); `{layer.name}` has {layer.outputs} and {layer.inputs}, "
        "and is filled up in every pass, which costs time"
    )


def _unpadded(facts: Facts) -> str | None:
    layer = _misfit(facts, facts.tensor_parallel, TILES[:1])
    if layer is None:
        return None
    return (
        f"the Marlin kernel, the only one, is for outputs in steps of {TILES[0][0]} and inputs in "
        f"steps of {TILES[0][1]}; `{layer.name}` has {layer.outputs} and {layer.inputs}, which may "
        "fail"
    )


def _tensor_parallel(facts: Facts) -> str | None:
    why = obstacle(facts, facts.tensor_parallel)
    if not why:
        return None
    return f"tensor parallel on {facts.tensor_parallel} GPUs: {why}"


_no_tensor_parallel = _when(
    lambda facts: facts.tensor_parallel > 1,
    "it puts whole layers on several GPUs (`device_map`), and shares none between them",
)


# Engines that share one layer between GPUs → what they ask of the parts besides.
_PARALLEL: dict[str, Callable[[Facts, int], bool]] = {
    "vLLM": lambda facts, size: True,
    "SGLang": lambda facts, size: _misfit(facts, size, TILES[:1]) is None,
}


# ---- layers that belong together ---------------------------------------------------------------


_even = _when(
    lambda facts: facts.uneven and _some(facts.uneven),
    "parts of one fused layer are quantized differently: {}",
)


_seen = _when(
    lambda facts: facts.unseen and _some(facts.unseen),
    "`dynamic` does not match the fused name of {} as it matches the parts",
)


def _base_only(facts: Facts) -> str | None:
    """Of engines that do not read `dynamic`: one setting, and every linear layer has it."""
    if not facts.is_finished:
        return "it ignores `dynamic`, which is set" if facts.export.dynamic else None
    base = facts.export.base
    for layer in facts.layers:
        if plain(layer.settings, layer.inputs) != plain(base, layer.inputs):
            return f"it ignores `dynamic`, which gives `{layer.name}` settings of its own"
    left = [name for name in facts.stored.dense_linears if _is_expected(name, facts)]
    if left:
        return f"it takes every linear layer of a block for quantized, and `{left[0]}` is not"
    return None


def _is_expected(name: str, facts: Facts) -> bool:
    restricted = facts.stored.restricted
    if restricted:
        return name.endswith(restricted)
    quantized = {layer.name.rpartition(".")[2] for layer in facts.layers}
    return name.rpartition(".")[2] in quantized | LINEAR_LEAVES


def _routed_as_base(facts: Facts) -> str | None:
    base = facts.export.base
    for layer in facts.layers:
        if ROUTED.match(layer.name) and plain(layer.settings, layer.inputs) != plain(
            base, layer.inputs
        ):
            return f"it does not apply `dynamic` to routed modules, as `{layer.name}` needs"
    return None


_no_routed = _when(
    lambda facts: any(ROUTED.match(layer.name) for layer in facts.layers),
    "it stacks routed modules in one tensor, for which there is no GPTQ layer",
)


# ---- heads ---------------------------------------------------------------


_no_head = _when(
    lambda facts: facts.export.lm_head, "it quantizes layers inside blocks only, not the head"
)


_dense_head = _when(
    lambda facts: facts.export.lm_head, "it reads the head as a plain weight, never quantized"
)


_tied_head = _when(
    lambda facts: facts.export.lm_head and facts.has_tied_head,
    "the configuration ties the head to the embedding, which it serves; the quantized head is not "
    "read",
)


_head_not_tied = _when(
    lambda facts: facts.export.lm_head and facts.has_tied_head,
    "the configuration ties the head to the embedding, and a quantized head cannot be tied",
)


# ---- the model ---------------------------------------------------------------


def _of_type(model_type: str, reason: str) -> Broken:
    return lambda facts: reason if facts.model_type == model_type else None


_no_images = _when(
    lambda facts: form_of({"model_type": facts.model_type}) is IMAGES,
    "it takes GPTQ models of pure text only",
)


def _architecture(engine: str) -> Broken:
    known = ARCHITECTURES[engine]

    def broken(facts: Facts) -> str | None:
        name = facts.architecture
        if not name or name in known or family_of(facts.model_type):
            return None
        return (
            f"it has no {name} of its own; where transformers' own model allows it, that one is "
            "run, which is slower"
        )

    return broken


_named = _when(
    lambda facts: facts.is_finished and not facts.architecture,
    "`config.json` names no `architectures`, by which it chooses the model",
)


def _model_type(engine: str, remedy: str) -> Broken:
    known = MODEL_TYPES[engine]

    def broken(facts: Facts) -> str | None:
        if not facts.model_type or facts.model_type in known:
            return None
        return f"it has no model of type `{facts.model_type}`{remedy}"

    return broken


def _remote_code(engine: str) -> Broken:
    known = ARCHITECTURES.get(engine, frozenset())

    def broken(facts: Facts) -> str | None:
        if not facts.stored.remote_code or facts.architecture in known:
            return None
        return (
            "`config.json` names code of its own (`auto_map`): where the installed transformers "
            "has no such model, it needs `trust_remote_code`"
        )

    return broken


def _blocks(facts: Facts) -> str | None:
    if not facts.is_finished or facts.stored.restricted:
        return None
    out = [
        layer.name
        for layer in facts.layers
        if "lm_head" not in layer.name and not layer.name.startswith(_BLOCK_STARTS)
    ]
    return f"optimum does not look for layers at `{out[0]}`" if out else None


_BLOCK_STARTS = tuple(f"{block}." for block in _BLOCKS)


# ---- what only a finished checkpoint can say -----------------------------------------------------


def _faults(facts: Facts) -> str | None:
    if not facts.stored.faults:
        return None
    more = len(facts.stored.faults) - 1
    return facts.stored.faults[0] + (f", and {more} more of this kind" if more else "")


def _as_claimed(engine: str) -> Broken:
    file = CONFIG_FILE[engine]

    def broken(facts: Facts) -> str | None:
        unlike = facts.stored.unlike
        # Where there is one file only, everybody reads that.
        lines = unlike[file] if file in unlike else next(iter(unlike.values()), ())
        return "; ".join(lines) or None

    return broken


_silent = _when(
    lambda facts: facts.stored.silent and facts.stored.silent[0],
    "`config.json` does not say `{}`, which it asks for",
)


# Of engines that take a layer for packed unless `dynamic` leaves it out.
_packed_as_claimed = _when(
    lambda facts: next(
        (name for name in facts.stored.dense_linears if facts.export.of(name) is not None), None
    ),
    "`{}` is not packed, and no `dynamic` leaves it out",
)


_no_config = _when(
    lambda facts: not facts.stored.config_file,
    "`config.json` has no `quantization_config`, from which it learns that it is quantized",
)


_by_option = _when(
    lambda facts: not facts.stored.config_file,
    "`config.json` has no `quantization_config`: it needs `--quantization gptq` to look for "
    "`quantize_config.json`",
)


_symmetric_zeros = _when(
    lambda facts: facts.stored.zeros.get("free"),
    "`{}.qzeros` holds other zero points than 2^(bits-1), which it takes for granted: the output "
    "would be wrong, often `!!!!`",
)


def _labelled_zeros(facts: Facts) -> str | None:
    other, version = ("v1", 2) if facts.export.format in VERSION_TWO else ("v2", 1)
    name = facts.stored.zeros.get(other)
    if name is None:
        return None
    return (
        f"the configuration says zero points of version {version} (`{facts.export.format}`), "
        f"`{name}.qzeros` holds version {3 - version}: every weight would be read one step off, "
        "and the output is often `!!!!`"
    )


_version_one = _when(
    lambda facts: facts.export.format in VERSION_TWO or "v2" in facts.stored.zeros,
    "it adds 1 to every zero point (`gptq`), and these are stored as they are (`gptq_v2`); only "
    "Marlin, which reads none, is right",
)


_plain_order = _when(
    lambda facts: facts.stored.reordered,
    "`{}.g_idx` is not the plain order, which it takes for granted: weights would meet the scales "
    "of other groups",
)


def _trusted_order(facts: Facts) -> str | None:
    """Of engines that read ``g_idx`` where ``desc_act`` is on, and only there."""
    return None if facts.export.desc_act else _plain_order(facts)


_order_of_torch = _when(
    lambda facts: not facts.export.desc_act and facts.stored.reordered,
    "`{}.g_idx` is not the plain order although desc_act is off: only kernels that always read it "
    "are right (torch, Triton)",
)


_has_order = _when(lambda facts: facts.stored.no_order, "`{}.g_idx` is missing, which it reads")


_int32 = _when(lambda facts: facts.stored.words, "`{}` is not packed in int32")


# Of float32 every engine makes one of the two by itself.
_dtype = _when(
    lambda facts: facts.stored.dtype not in (None, *_HALF, "float32") and facts.stored.dtype,
    f"`config.json` says dtype {{}}; its GPTQ layers compute in {', '.join(_HALF)}",
)


def _some(names: Iterable[str]) -> str:
    return listed(names, 3)


def _or(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


_VLLM = "vllm/model_executor/layers/quantization/"
_VLLM_MODELS = "vllm/model_executor/models/registry.py"
_SGLANG = "sglang/srt/layers/quantization/"
_SGLANG_MODELS = "sglang/srt/models/registry.py"
_HOST = "gptqmodel/nn_modules/qlinear/"
_TGI = "server/text_generation_server/"
_OPTIMUM = "optimum/gptq/quantizer.py "
_ADD = ": `epmq_gptq.install()` or its own models may add it"
_STORED = "the GPTQ format: qweight, qzeros, scales, g_idx"

RULES = (
    *(Rule(engine, "no", _STORED, _faults) for engine in VERSIONS),
    *(Rule(engine, "no", CONFIG_FILE[engine], _as_claimed(engine)) for engine in VERSIONS),
    *(
        Rule(each.engine, each.verdict, each.source, _of_type(each.model_type, each.reason))
        for family in FAMILIES
        for each in family.serving
    ),
    Rule("vLLM", "limited", _VLLM_MODELS + " _try_resolve_transformers", _architecture("vLLM")),
    Rule("vLLM", "no", _VLLM_MODELS, _named),
    Rule("vLLM", "limited", "vllm/config/model.py trust_remote_code", _remote_code("vLLM")),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py TYPE_MAP", _bits_in((4, 8), sym=True)),
    Rule("vLLM", "no", _VLLM + "utils/marlin_utils.py group sizes", _groups_in(MARLIN_GROUPS)),
    Rule(
        "vLLM",
        "no",
        _VLLM + "utils/gptq_utils.py normalize_and_validate_gptq_desc_act",
        _no_desc_act,
    ),
    Rule("vLLM", "no", _VLLM + "base_config.py: g_idx is dropped", _plain_order),
    Rule("vLLM", "no", _VLLM + "utils/gptq_utils.py is_layer_gptq_quantized", _even),
    Rule("vLLM", "no", _VLLM + "utils/gptq_utils.py get_dynamic_override", _seen),
    Rule("vLLM", "limited", _VLLM + "utils/marlin_utils.py marlin_padded_nk", _padded),
    Rule("vLLM", "limited", _VLLM + "utils/marlin_utils.py CPU types", _gpu_only),
    Rule("vLLM", "no", "vllm/config/model.py, kernels/linear", _tensor_parallel),
    Rule("vLLM", "limited", "vllm/model_executor/models/llama.py lm_head", _tied_head),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py zero_points=False", _symmetric_zeros),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py create_weights", _int32),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py from_config", _silent),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py get_supported_act_dtypes", _dtype),
    Rule("vLLM", "limited", "vllm/model_executor/model_loader/weight_utils.py", _by_option),
    Rule("SGLang", "limited", _SGLANG_MODELS + " _normalize_archs", _architecture("SGLang")),
    Rule("SGLang", "no", _SGLANG_MODELS, _named),
    Rule(
        "SGLang", "limited", "sglang/srt/server_args.py trust_remote_code", _remote_code("SGLang")
    ),
    # Without Marlin there is no kernel: the older one was taken out (gptq/schemes/gptq_linear.py).
    Rule(
        "SGLang", "no", _SGLANG + "gptq/gptq.py GPTQMarlinConfig.TYPE_MAP", _bits_in((4, 8), True)
    ),
    Rule("SGLang", "no", _SGLANG + "marlin_utils.py group sizes", _groups_in(MARLIN_GROUPS)),
    Rule("SGLang", "limited", _SGLANG + "marlin_utils.py verify_marlin_supports_shape", _unpadded),
    Rule("SGLang", "no", _SGLANG + "utils.py get_linear_quant_method", _even),
    Rule("SGLang", "no", _SGLANG + "utils.py get_linear_quant_method", _seen),
    Rule("SGLang", "no", _SGLANG + "gptq/gptq.py GPTQMarlinMoEMethod", _routed_as_base),
    Rule("SGLang", "no", _SGLANG + "gptq/schemes/gptq_marlin.py has_g_idx", _trusted_order),
    Rule("SGLang", "no", _SGLANG + "gptq/schemes/gptq_marlin.py", _tensor_parallel),
    Rule("SGLang", "limited", "sglang/srt/models/llama.py lm_head", _tied_head),
    Rule("SGLang", "no", _SGLANG + "gptq/schemes/gptq_marlin.py zero_points", _symmetric_zeros),
    Rule("SGLang", "no", _SGLANG + "gptq/schemes/gptq_marlin.py", _int32),
    Rule("SGLang", "no", _SGLANG + "gptq/gptq.py is_gptq_marlin_compatible", _silent),
    Rule("SGLang", "no", _SGLANG + "utils.py get_dynamic_override", _packed_as_claimed),
    Rule("SGLang", "no", _SGLANG + "gptq/gptq.py get_supported_act_dtypes", _dtype),
    Rule("SGLang", "limited", _SGLANG + "gptq/gptq.py get_config_filenames", _by_option),
    Rule("transformers", "no", "transformers/quantizers/quantizer_gptq.py", _no_images),
    Rule("transformers", "no", _OPTIMUM + "GPTQQuantizer", _bits_in((2, 3, 4, 8))),
    Rule(
        "transformers",
        "no",
        _HOST + "torch.py SUPPORTS_GROUP_SIZE",
        _groups_in(HOST_GROUPS, whole=True),
    ),
    Rule("transformers", "no", _OPTIMUM + "convert_model", _base_only),
    Rule("transformers", "no", _OPTIMUM + "convert_model", _no_head),
    Rule("transformers", "no", "transformers/models/mixtral: MixtralExperts", _no_routed),
    Rule("transformers", "no", "optimum/gptq/constants.py BLOCK_PATTERNS", _blocks),
    Rule("transformers", "no", "transformers/quantizers/quantizer_gptq.py", _no_tensor_parallel),
    Rule("transformers", "no", _OPTIMUM + "post_init_model", _labelled_zeros),
    Rule("transformers", "limited", _HOST + "marlin.py", _order_of_torch),
    Rule("transformers", "no", "transformers/quantizers/auto.py", _no_config),
    Rule(
        "transformers",
        "limited",
        "transformers/dynamic_module_utils.py",
        _remote_code("transformers"),
    ),
    Rule("transformers", "no", _HOST + "torch.py SUPPORTS_DTYPES", _dtype),
    Rule("GPTQModel", "no", _HOST + "torch.py", _bits_in((2, 3, 4, 5, 6, 7, 8))),
    Rule("GPTQModel", "no", _HOST + "torch.py SUPPORTS_GROUP_SIZE", _groups_in(HOST_GROUPS, True)),
    Rule("GPTQModel", "limited", _HOST + "tritonv2.py", _torch_kernel),
    Rule("GPTQModel", "no", "gptqmodel/models/auto.py MODEL_MAP", _model_type("GPTQModel", _ADD)),
    Rule("GPTQModel", "no", "gptqmodel/utils/model.py", _labelled_zeros),
    Rule("GPTQModel", "no", "gptqmodel/models/loader.py make_quant", _packed_as_claimed),
    Rule("GPTQModel", "limited", _HOST + "marlin.py", _order_of_torch),
    Rule("GPTQModel", "no", "gptqmodel/models/loader.py device_map", _no_tensor_parallel),
    Rule("GPTQModel", "no", "transformers/modeling_utils.py tie_weights", _head_not_tied),
    Rule("GPTQModel", "limited", "transformers/dynamic_module_utils.py", _remote_code("GPTQModel")),
    Rule("GPTQModel", "no", _HOST + "torch.py SUPPORTS_DTYPES", _dtype),
    Rule("TGI", "no", _TGI + "models/__init__.py", _model_type("TGI", "")),
    # Fields must not lie across words: 3 bits do.
    Rule("TGI", "no", _TGI + "layers/gptq/triton.py", _bits_in((2, 4, 8))),
    Rule("TGI", "limited", _TGI + "layers/marlin/gptq.py can_use_gptq_marlin", _float16_kernel),
    Rule("TGI", "no", _TGI + "utils/quantization.py", _base_only),
    Rule("TGI", "no", _TGI + "layers/gptq/__init__.py get_multi_weights_col", _even),
    Rule("TGI", "no", _TGI + "layers/tensor_parallel.py TensorParallelHead", _dense_head),
    Rule("TGI", "no", _TGI + "layers/gptq/triton.py zeros + 1", _version_one),
    Rule("TGI", "no", _TGI + "layers/gptq/__init__.py get_weights", _has_order),
    Rule("TGI", "no", _TGI + "layers/marlin/gptq.py repack_gptq_for_marlin", _trusted_order),
    Rule("TGI", "no", _TGI + "utils/weights.py get_sharded", _tensor_parallel),
    Rule("TGI", "no", _TGI + "layers/gptq/triton.py", _int32),
)
