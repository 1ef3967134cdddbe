"""How to load a checkpoint, in code that is right for this very model."""

from __future__ import annotations

from collections.abc import Iterator

from ..calibration.rows import IMAGES, PAIRS, TEXT, form_of
from .card_facts import Facts, mapping
from .markdown import plain

# What stands in the examples for a name that is not known yet.
PLACEHOLDER = "path/or/hub-id"
# docs/t5.md says why: transformers writes into `weight`, which packed layers do not have.
_T5_LINE = (
    "T5PreTrainedModel._init_weights = lambda self, module: None  # all weights are in the file"
)
_HEADS = ("ForCausalLM", "LMHeadModel")


def loading(facts: Facts, model: str) -> Iterator[str]:
    """Lines of the section: engines that take this checkpoint, then those that do not, and why.

    Args:
        facts: of the checkpoint.
        model: the hub id that examples name.
    """
    form = form_of(facts.config)
    yield from ["## How to load it", ""]
    if form is IMAGES:
        yield from _clip(model)
    elif form is PAIRS:
        yield from _t5(model)
    else:
        yield from _text(facts, model)
    yield from _refusals(facts)


def _serves(facts: Facts, engine: str) -> bool:
    """Whether an engine is worth a recommendation."""
    verdict = mapping(facts.engines.get(engine)).get("verdict")
    # "limited" of a text model is slower or needs a dtype; of another kind nobody has tried it.
    return verdict == "yes" or (verdict == "limited" and form_of(facts.config) is TEXT)


def _reasons(facts: Facts, engine: str, verdict: str) -> list[str]:
    reasons = mapping(facts.engines.get(engine)).get("reasons", [])
    return [reason["reason"] for reason in reasons if reason["verdict"] == verdict]


def _text(facts: Facts, model: str) -> Iterator[str]:
    if _serves(facts, "transformers"):
        head = _auto_class(facts)
        yield from _named("transformers", "`pip install transformers optimum gptqmodel`")
        yield from _block(
            "python",
            f"from transformers import {head}, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{model}")',
            f'model = {head}.from_pretrained("{model}", device_map="auto")',
        )
    if _serves(facts, "GPTQModel"):
        yield from _named("GPTQModel", "`pip install gptqmodel`", _reasons_of(facts, "GPTQModel"))
        yield from _block(
            "python",
            "from gptqmodel import GPTQModel",
            "",
            f'model = GPTQModel.load("{model}")',
        )
    for engine, command in (
        ("vLLM", f"vllm serve {model}"),
        ("SGLang", f"python -m sglang.launch_server --model-path {model}"),
    ):
        if _serves(facts, engine):
            reasons = _reasons(facts, engine, "limited")
            half = any("float16 only" in reason for reason in reasons)
            yield from _named(engine, "an OpenAI-compatible server", _reasons_of(facts, engine))
            yield from _block("shell", command + (" --dtype half" if half else ""))


def _auto_class(facts: Facts) -> str:
    architectures = facts.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return "AutoModelForCausalLM" if name.endswith(_HEADS) else "AutoModel"


def _clip(model: str) -> Iterator[str]:
    yield from _named("GPTQModel with epmq_gptq", "which makes CLIP known to it")
    yield from _block(
        "python",
        "import epmq_gptq",
        "from huggingface_hub import snapshot_download",
        "",
        f'folder = snapshot_download("{model}")  # or a local folder',
        "model = epmq_gptq.load_clip(folder)  # the transformers model, for float16 activations",
    )


def _t5(model: str) -> Iterator[str]:
    yield from _named("GPTQModel with epmq_gptq", "which makes T5 known to it")
    yield from _block(
        "python",
        "import epmq_gptq  # makes T5 known to GPTQModel",
        "from gptqmodel import GPTQModel",
        "",
        f'model = GPTQModel.load("{model}")',
        'model.generate(**model.tokenizer("…", return_tensors="pt"))',
    )
    yield from _named(
        "transformers", "with one line more, without which its T5 stops at packed layers"
    )
    yield from _block(
        "python",
        "from transformers import AutoModelForSeq2SeqLM",
        "from transformers.models.t5.modeling_t5 import T5PreTrainedModel",
        "",
        _T5_LINE,
        f'model = AutoModelForSeq2SeqLM.from_pretrained("{model}", dtype="float16")',
    )


def _refusals(facts: Facts) -> Iterator[str]:
    form = form_of(facts.config)
    lines = []
    for engine, entry in facts.engines.items():
        shown = engine == "GPTQModel" or (engine == "transformers" and form is PAIRS)
        if _serves(facts, engine) or (form is not TEXT and shown):
            continue
        verdict = mapping(entry).get("verdict", "no")
        reasons = "; ".join(_reasons(facts, engine, verdict))
        if form is IMAGES and engine == "transformers":
            reasons += "; `load_clip` gives the transformers model"
        lines.append(f"- {engine} {plain(entry.get('version', ''))}: {_safe(reasons)}.")
    if lines:
        yield from ["Not recommended, by the rules that these engines document:", "", *lines, ""]


def _reasons_of(facts: Facts, engine: str) -> str:
    return _safe("; ".join(_reasons(facts, engine, "limited")))


def _safe(reasons: str) -> str:
    """Our own sentences, with a stranger's layer names between backticks."""
    return "".join(
        part if index % 2 == 0 else plain(part) for index, part in enumerate(reasons.split("`"))
    )


def _named(name: str, how: str, but: str = "") -> Iterator[str]:
    yield from [f"**{name}** ({how})" + (f". {but[0].upper()}{but[1:]}." if but else ":"), ""]


def _block(language: str, *lines: str) -> Iterator[str]:
    yield from [f"```{language}", *lines, "```", ""]
