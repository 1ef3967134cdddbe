"""Which engines can serve the export that was asked for: rules as data, each with its source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..linears import Linear
from ..row_forms import IMAGES, TEXT, RowForm, form_of
from .findings import Finding, listed
from .structure import normalised

ENGINES = {
    "vLLM": "0.32",
    "SGLang": "0.5",
    "transformers": "5.19 with optimum 2.3",
    "GPTQModel": "7.6",
}

# Projections that engines load as one matrix: name of the whole → names in a checkpoint.
# Source: `packed_modules_mapping` of vLLM's and SGLang's model classes.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Layers that tensor parallelism cuts along their inputs; all others along their outputs.
_CUT_INPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "w2")
_KEY_VALUES = ("k_proj", "v_proj")
_ROUTED = re.compile(r"(.+\.experts)\.(\d+)\.")
# The projections of a routed module, by the names that checkpoints give them.
_ROUTED_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))
MARLIN_GROUPS = (-1, 32, 64, 128)
MARLIN_N, MARLIN_K = 64, 128


class Settings(NamedTuple):
    """How one layer is quantized."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True)
class Export:
    """What was asked for, as GPTQModel's options of these names."""

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    dynamic: Mapping[str, Any] | None = None
    lm_head: bool = False

    def of(self, module: str) -> Settings | None:
        """The settings of one layer by GPTQModel's rule; None where `dynamic` leaves it out."""
        settings = Settings(self.bits, self.group_size, self.sym, self.desc_act)
        for pattern, override in (self.dynamic or {}).items():
            # The first pattern that matches the beginning of the name decides.
            if pattern.startswith("-:"):
                if re.match(pattern[2:], module):
                    return None
            elif re.match(pattern.removeprefix("+:"), module):
                known = {k: v for k, v in dict(override).items() if k in Settings._fields}
                return settings._replace(**known)
        return settings


class Facts(NamedTuple):
    """What the rules look at.

    Attributes:
        export: what was asked for.
        settings: every distinct way in which a layer is quantized → the first such layer.
        linears: the layers that are quantized.
        uneven: fused or routed layers whose parts are quantized differently.
        unseen: fused layers for whose own name `dynamic` gives other settings than for the parts.
        model_type: of the model's configuration.
    """

    export: Export
    settings: dict[Settings, str]
    linears: list[Linear]
    uneven: list[str]
    unseen: list[str]
    model_type: str = ""


class Rule(NamedTuple):
    """One condition of one engine.

    Attributes:
        engine: a key of :data:`ENGINES`.
        verdict: ``"no"``, or ``"limited"`` where it loads but not everywhere or not fast.
        source: where it stands.
        broken: facts → why it does not hold, or None.
    """

    engine: str
    verdict: str
    source: str
    broken: Callable[[Facts], str | None]


def _bits_in(allowed: tuple[int, ...], sym: bool | None = None) -> Callable[[Facts], str | None]:
    def broken(facts: Facts) -> str | None:
        for each, name in facts.settings.items():
            if each.bits not in allowed:
                return f"`{name}` has {each.bits} bits; it takes {_or(allowed)}"
            if sym is not None and each.sym is not sym:
                return f"`{name}` has sym={each.sym}; it takes sym={sym}"
        return None

    return broken


def _groups_in(allowed: tuple[int, ...]) -> Callable[[Facts], str | None]:
    def broken(facts: Facts) -> str | None:
        bad = [(s.group_size, n) for s, n in facts.settings.items() if s.group_size not in allowed]
        if not bad:
            return None
        return f"`{bad[0][1]}` has group_size {bad[0][0]}; it takes {_or(allowed)}"

    return broken


def _even(facts: Facts) -> str | None:
    if not facts.uneven:
        return None
    return f"parts of one fused layer are quantized differently: {listed(facts.uneven, 3)}"


def _seen(facts: Facts) -> str | None:
    if not facts.unseen:
        return None
    return (
        f"`dynamic` does not match the fused name of {listed(facts.unseen, 3)} as it matches the "
        "parts"
    )


def _marlin_shapes(facts: Facts) -> str | None:
    bad = [li for li in facts.linears if li.outputs % MARLIN_N or li.inputs % MARLIN_K]
    if not bad:
        return None
    return (
        f"the Marlin kernel needs outputs in steps of {MARLIN_N} and inputs in steps of {MARLIN_K}"
        f"; `{bad[0].name}` has {bad[0].outputs} and {bad[0].inputs}, so a slower kernel runs it, "
        "in float16 only"
    )


def _gpu_only(facts: Facts) -> str | None:
    return "8 bits run on GPUs only" if any(s.bits == 8 for s in facts.settings) else None


def _slow_bits(facts: Facts) -> str | None:
    slow = [s for s in facts.settings if s.bits not in (4, 8) or not s.sym]
    return "without Marlin: the older GPTQ kernel, in float16 only" if slow else None


def _no_dynamic(facts: Facts) -> str | None:
    # Exclusions are fine where the checkpoint says them: but the block names are all it reads.
    return "it ignores `dynamic`, which is set" if facts.export.dynamic else None


def _no_head(facts: Facts) -> str | None:
    return "it quantizes layers inside blocks only, not the head" if facts.export.lm_head else None


def _no_routed(facts: Facts) -> str | None:
    if any(_ROUTED.match(linear.name) for linear in facts.linears):
        return "it stacks routed modules in one tensor, for which there is no GPTQ layer"
    return None


def _of_type(model_type: str, reason: str) -> Callable[[Facts], str | None]:
    return lambda facts: reason if facts.model_type == model_type else None


def _no_images(facts: Facts) -> str | None:
    if form_of({"model_type": facts.model_type}) is not IMAGES:
        return None
    return "it takes GPTQ models of pure text only"


def _torch_kernel(facts: Facts) -> str | None:
    slow = [f"{s.bits} bits" for s in facts.settings if s.bits not in (2, 4, 8)]
    return f"{slow[0]}: the torch kernel only, which is slow" if slow else None


_VLLM = "vllm/model_executor/layers/quantization/"
_VLLM_MODELS = "vllm/model_executor/models/registry.py"
_NO_T5 = "it has no T5"
_T5_INIT = "its T5 initialises weights that packed layers do not have (docs/t5.md has a way)"
_NO_TOWER = "it has no vision tower by itself"
_UNTRIED = "it has CLIP, but nobody has tried it with quantized layers"
_SGLANG = "sglang/srt/layers/quantization/gptq/gptq.py "
RULES = (
    Rule("vLLM", "no", _VLLM_MODELS, _of_type("t5", _NO_T5)),
    Rule("vLLM", "no", _VLLM_MODELS, _of_type("clip_vision_model", _NO_TOWER)),
    Rule("vLLM", "limited", _VLLM_MODELS, _of_type("clip", _UNTRIED)),
    Rule("SGLang", "no", "sglang/srt/models/registry.py", _of_type("t5", _NO_T5)),
    Rule("SGLang", "no", "sglang/srt/models/", _of_type("clip_vision_model", _NO_TOWER)),
    Rule("SGLang", "limited", "sglang/srt/models/clip.py", _of_type("clip", _UNTRIED)),
    Rule("transformers", "no", "transformers/quantizers/quantizer_gptq.py", _no_images),
    Rule("transformers", "no", "transformers/models/t5/modeling_t5.py", _of_type("t5", _T5_INIT)),
    Rule("vLLM", "no", _VLLM + "auto_gptq.py TYPE_MAP", _bits_in((4, 8), sym=True)),
    Rule("vLLM", "no", _VLLM + "utils/marlin_utils.py group sizes", _groups_in(MARLIN_GROUPS)),
    Rule("vLLM", "no", _VLLM + "utils/gptq_utils.py is_layer_gptq_quantized", _even),
    Rule("vLLM", "no", _VLLM + "utils/gptq_utils.py get_dynamic_override", _seen),
    Rule("vLLM", "limited", _VLLM + "utils/marlin_utils.py min_thread", _marlin_shapes),
    Rule("vLLM", "limited", _VLLM + "utils/marlin_utils.py CPU types", _gpu_only),
    Rule("SGLang", "no", _SGLANG + "GPTQConfig", _bits_in((2, 3, 4, 8))),
    Rule("SGLang", "no", _SGLANG + "get_linear_quant_method", _even),
    Rule("SGLang", "no", _SGLANG + "get_linear_quant_method", _seen),
    Rule("SGLang", "limited", _SGLANG + "GPTQMarlinConfig.TYPE_MAP", _slow_bits),
    Rule("transformers", "no", "optimum/gptq/quantizer.py", _bits_in((2, 3, 4, 8))),
    Rule("transformers", "no", "GPTQModel README", _no_dynamic),
    Rule("transformers", "no", "optimum/gptq/quantizer.py convert_model", _no_head),
    Rule("transformers", "no", "transformers/models/mixtral: MixtralExperts", _no_routed),
    Rule("GPTQModel", "no", "nn_modules/qlinear/torch.py", _bits_in((2, 3, 4, 5, 6, 7, 8))),
    Rule("GPTQModel", "limited", "nn_modules/qlinear/tritonv2.py", _torch_kernel),
)


def check_serving(
    export: Export, linears: Iterable[Linear], config: Mapping[str, Any]
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, and per engine its version, its verdict and the reasons.

    Args:
        export: what was asked for.
        linears: the layers that will be quantized.
        config: of the merged model, for the heads that tensor parallelism deals out.
    """
    routed_modules = normalised(config)["experts"]
    facts = _facts(export, list(linears), routed_modules if isinstance(routed_modules, int) else 0)
    facts = facts._replace(model_type=str(config.get("model_type", "")))
    table = {}
    for engine, version in ENGINES.items():
        broken = [(r, r.broken(facts)) for r in RULES if r.engine == engine]
        reasons = [
            {"verdict": rule.verdict, "reason": reason, "source": rule.source}
            for rule, reason in broken
            if reason is not None
        ]
        verdicts = {reason["verdict"] for reason in reasons}
        verdict = "no" if "no" in verdicts else "limited" if verdicts else "yes"
        table[engine] = {"version": version, "verdict": verdict, "reasons": reasons}
    table["vLLM"]["max_tensor_parallel"] = max_tensor_parallel(facts, config)
    return [*_grid(facts), *_judge(table, form_of(config))], table


def _facts(export: Export, linears: list[Linear], routed_modules: int) -> Facts:
    settings: dict[Settings, str] = {}
    quantized = []
    for linear in linears:
        each = export.of(linear.name)
        if each is not None:
            quantized.append(linear)
            settings.setdefault(each, linear.name)
    uneven, unseen = [], []
    names = [linear.name for linear in quantized]
    for whole, parts in _fused(names, routed_modules).items():
        given = {export.of(part) for part in parts}
        if len(given) > 1:
            uneven.append(whole)
        elif export.of(whole) not in given:
            unseen.append(whole)
    return Facts(export, settings, quantized, uneven, unseen)


def _fused(names: list[str], routed_modules: int = 0) -> dict[str, list[str]]:
    """Fused layer → all its parts, those that are not quantized too."""
    groups: dict[str, list[str]] = {}
    routed_stacks: dict[str, dict[str, int]] = {}
    known = set(names)
    for name in names:
        parent, _, last = name.rpartition(".")
        routed = _ROUTED.match(name)
        if routed:
            routed_stacks.setdefault(routed[1], {})[name] = int(routed[2])
            continue
        whole = next((whole for whole, parts in FUSED.items() if last in parts), None)
        # OPT and its kind have q, k, v under other layouts; all parts must be of one module.
        if whole is not None and f"{parent}.{whole}" not in known:
            groups[f"{parent}.{whole}"] = [f"{parent}.{part}" for part in FUSED[whole]]
    for stack, members in routed_stacks.items():
        found = {name.rpartition(".")[2] for name in members}
        parts = next((each for each in _ROUTED_PARTS if found & set(each)), ())
        count = max(routed_modules, max(members.values()) + 1)
        groups[stack] = [*members]
        groups[stack] += [f"{stack}.{index}.{part}" for index in range(count) for part in parts]
    return groups


def _grid(facts: Facts) -> Iterator[Finding]:
    """F33: groups that do not divide the inputs, one finding per size and width."""
    seen = set()
    for linear in facts.linears:
        size = facts.export.of(linear.name).group_size
        if size > 0 and linear.inputs % size and (size, linear.inputs) not in seen:
            seen.add((size, linear.inputs))
            yield Finding(
                "error",
                "EPMQ-F33",
                "`group_size`",
                f"`group_size` {size} does not divide the {linear.inputs} inputs of "
                f"`{linear.name}`.",
                "Choose a divisor, or -1 for one group per row.",
            )


def _judge(table: Mapping[str, Any], form: RowForm) -> Iterator[Finding]:
    """One line for all engines, or none: who asks for 3 bits knows what they are for."""
    reasons = {
        engine: [r["reason"] for r in entry["reasons"] if r["verdict"] == "no"]
        for engine, entry in table.items()
    }
    refusing = [engine for engine in reasons if reasons[engine]]
    if not refusing:
        return
    # Engines that do not take it for one reason are named together.
    by_reason: dict[str, list[str]] = {}
    for engine in refusing:
        called = f"{engine} {table[engine]['version']}"
        by_reason.setdefault("; ".join(reasons[engine]), []).append(called)
    told = "; ".join(f"{' and '.join(names)}: {why}" for why, names in by_reason.items())
    # Nothing that the user could set would change it.
    by_itself = refusing == ["transformers"] or form is not TEXT
    yield Finding(
        "note" if by_itself else "warning",
        "EPMQ-F33",
        ", ".join(refusing),
        f"this export cannot be served by every engine: {told}.",
        "Load it with GPTQModel, which gives the same kind of model."
        if by_itself
        else "For all of them: 4 or 8 bits, sym=True, a group size of 32, 64 or 128, and one "
        "setting for all parts of a fused layer.",
    )


def max_tensor_parallel(facts: Facts, config: Mapping[str, Any]) -> int:
    """The most GPUs (a power of two, 64 at most) that can share every layer and its groups."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    heads = text.get("num_attention_heads") or text.get("n_head")
    key_values = text.get("num_key_value_heads") or heads
    size = 1
    while size < 64 and _divides(facts, 2 * size, heads, key_values):
        size *= 2
    return size


def _divides(facts: Facts, size: int, heads: Any, key_values: Any) -> bool:
    if not isinstance(heads, int) or not isinstance(key_values, int) or heads % size:
        return False
    # Where there are fewer key-value heads than GPUs, each is repeated.
    if key_values % size and size % key_values:
        return False
    for linear in facts.linears:
        settings = facts.export.of(linear.name)
        last = linear.name.rpartition(".")[2]
        if last in _CUT_INPUTS:
            # A group that lies in two parts would need its scale twice.
            if linear.inputs % (size * max(settings.group_size, 32)):
                return False
        elif last not in _KEY_VALUES and linear.outputs % (size * 32 // settings.bits):
            return False
    return True


def _or(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
