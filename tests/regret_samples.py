"""Reports as `save` writes them, made up: of any size and for every naming of modules."""

import json
import math
import random

from epmq_gptq.run_report import ExpertError, ModuleReport, QuantizationReport

LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# How far from its experts a kind of module is, as a factor.
_KINDS = {"down_proj": 2.5, "o_proj": 1.8, "v_proj": 1.2, "q_proj": 0.5, "k_proj": 0.4}


def llama(layers):
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in LLAMA]


def t5(blocks):
    own = [f"layer.0.SelfAttention.{part}" for part in "qkvo"]
    cross = [f"layer.1.EncDecAttention.{part}" for part in "qkvo"]
    names = []
    for stack in ("encoder", "decoder"):
        last = 1 if stack == "encoder" else 2
        for block in range(blocks):
            inside = own + (cross if stack == "decoder" else [])
            inside = inside + [f"layer.{last}.DenseReluDense.{part}" for part in ("wi", "wo")]
            names += [f"{stack}.block.{block}.{one}" for one in inside]
    return names


def clip(layers):
    inside = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    names = [
        f"{tower}_model.encoder.layers.{layer}.{one}"
        for tower in ("vision", "text")
        for layer in range(layers)
        for one in inside
    ]
    return [*names, "visual_projection"]


def moe(layers, routed):
    names = []
    for layer in range(layers):
        names += [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkvo"]
        names += [
            f"model.layers.{layer}.mlp.experts.{one}.{part}_proj"
            for one in range(routed)
            for part in ("gate", "up", "down")
        ]
    return names


# What a stranger could call things so that a careless page would run it.
HOSTILE = (
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<a href='javascript:window.hit=1'>link</a><b>bold</b>",
    '"onmouseover="window.hit=1" x="',
    "{{ 7 * 7 }} ${7 * 7} %{x}",
    "<!-- \u2028 \u202e &amp; \\ ' \" end",
)


def hostile():
    """Modules, experts and options of a report all of whose texts are hostile."""
    modules = [f"model.layers.{n}.{name}" for n in range(2) for name in HOSTILE]
    return modules, list(HOSTILE), {"reason": HOSTILE[0], "source": HOSTILE[1], "exceptions": 3}


def report(
    modules,
    experts,
    *,
    seed=0,
    profile="best",
    aim=True,
    measured=True,
    rounding=1.0,
    exceptions=0,
    reason="nothing was better on the held-out rows",
    source="merged-7b",
):
    """A whole file's content.

    Args:
        modules: names in forward order.
        experts: names.
        rounding: factor of the rounding part; more for a plain run.
        exceptions: so many modules keep the merged weight.
        reason: why they do.
        source: what the merged model is called.
    """
    rng = random.Random(seed)
    tokens = {name: 8192 * (1 + place % 3) for place, name in enumerate(experts)}
    strength = {name: math.exp(rng.gauss(0, 0.5)) for name in experts}
    entries = []
    for number, module in enumerate(modules):
        depth = number / max(1, len(modules) - 1)
        factor = _KINDS.get(module.split(".")[-1], 1.0)
        # A merge is worst in the first layers and towards the end.
        base = 0.004 * factor * (1 + 6 * depth**2 + 4 * math.exp(-12 * depth))
        routed = ".experts." in module
        figures = {}
        seen = {}
        for name in experts:
            share = rng.random() if routed else 1.0
            seen[name] = int(tokens[name] * share)
            if routed and share < 0.15:
                continue
            merged = base * strength[name] * math.exp(rng.gauss(0, 0.3))
            quantization = 0.012 * factor**0.5 * rounding * math.exp(rng.gauss(0, 0.2))
            solved = merged * 0.7
            rounded = solved + 0.8 * quantization
            figures[name] = ExpertError(
                rows=min(512, seen[name]),
                energy=40 * factor * (1 + 30 * depth) * math.exp(rng.gauss(0, 0.2)),
                merged=merged,
                quantization=quantization,
                solved=solved,
                rounded=rounded,
                aim={
                    "merged": merged * 1.6 + 0.01,
                    "solved": merged * 0.9,
                    "rounded": merged * 0.9 + 0.7 * quantization,
                }
                if aim
                else None,
            )
        kept = number >= len(modules) - exceptions
        entries.append(
            ModuleReport(
                module=module,
                target="merged" if kept else "experts",
                bits=4,
                group_size=128,
                alpha=None if kept else rng.choice((0.01, 0.03, 0.1, 0.3)),
                lam=0.02,
                tokens=seen,
                loss=0.01,
                excess=1.0 + rng.random(),
                merge_excess=2.0,
                seconds=0.4 + rng.random(),
                reason=reason if kept else "",
                eta=1.0,
                rho=1.0,
                held_out_gain=None if kept else 3.0 + rng.random(),
                weights={name: 1.0 for name in experts},
                experts=figures if measured else {},
            )
        )
    whole = QuantizationReport(
        modules=entries,
        rows={name: 64 for name in experts},
        tokens=tokens,
        seconds=0.9 * len(modules) + 12.3,
        phase_memory={"forward": 900_000_000, "gram": 1_200_000_000, "solve": 1_300_000_000},
        phases={"forward": 41.5, "gram": 30.25, "solve": 12.5, "round": 25.0, "pack": 3.1},
        peak_memory={"process": 2_345_678_901},
        provenance={
            "schema": 1,
            "method": "E-PMQ",
            "profile": profile,
            "alpha": "auto",
            "eta": 1.0,
            "rho": 1.0,
            "anchor": "identity",
            "weighting": "raw",
            "versions": {"epmq_gptq": "0.1.0", "gptqmodel": "7.6.0", "torch": "2.13.0"},
            "merged": {"source": source, "revision": None, "sha256": "ab" * 32},
            "base": {"source": "org/base-7b", "revision": "0123456789abcdef", "sha256": "cd" * 32},
            "merge": {"method": "ties"},
            "experts": [
                {"name": name, "source": f"org/{place}", "revision": "f" * 40, "weight": 1.0}
                for place, name in enumerate(experts)
            ],
        },
    )
    return {"schema": 1, "epmq_gptq": "0.1.0", "report": whole.to_dict()}


def retention(experts, gptq=True):
    rng = random.Random(5)
    return {
        "schema": 1,
        "experts": {
            name: {
                "task": name,
                "metric": "accuracy",
                "higher_is_better": True,
                "base": 12.5,
                "expert": 80.0,
                "merged": 66.0 + rng.random() * 10,
                "gptq": 55.0 + rng.random() * 10 if gptq else None,
                "quantized": 64.0 + rng.random() * 12,
            }
            for name in experts
        },
    }


def write(folder, content, evaluation=None):
    """A checkpoint's folder as far as the report needs it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "epmq_report.json").write_text(json.dumps(content), encoding="utf-8")
    if evaluation is not None:
        (folder / "epmq_evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder
