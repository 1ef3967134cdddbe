"""Every rule fires on something and holds for an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epmq_gptq.checks.engines.facts import Export, Facts, Layer, Settings, Stored, gathered, plain
from epmq_gptq.checks.engines.rules import RULES
from epmq_gptq.checks.engines.table import ENGINES, VERSIONS

BLOCK = "model.layers.0"
PLAIN = Settings(4, 128, True, False)
SHAPES = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (4096, 1024),
    "mlp.up_proj": (4096, 1024),
    "mlp.down_proj": (1024, 4096),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
STORED = Stored(unlike={"config.json": (), "quantize_config.json": ()}, dtype="bfloat16")


def facts(
    settings: dict[str, Settings] | None = None,
    *,
    export: Export | None = None,
    config: dict | None = None,
    stored: Stored | None = STORED,
    shapes: dict[str, tuple[int, int]] | None = None,
    **base,
) -> Facts:
    """Facts of a Llama; ``settings`` by name of a part, ``base`` for all others."""
    given = {
        f"{BLOCK}.{part}": (settings or {}).get(part, PLAIN._replace(**base))
        for part in (shapes or SHAPES)
    }
    layers = [
        Layer(f"{BLOCK}.{part}", *shape, given[f"{BLOCK}.{part}"])
        for part, shape in (shapes or SHAPES).items()
    ]
    export = export or Export(**PLAIN._replace(**base)._asdict())
    return gathered(export, layers, CONFIG | (config or {}), given.get, stored)


def stored(**changes) -> Facts:
    return facts(stored=replace(STORED, **changes))


def of_model(**changes) -> Facts:
    return facts(config=changes)


GOOD = facts()
EIGHT = PLAIN._replace(bits=8)
UNLIKE = {"config.json": ("x",), "quantize_config.json": ("x",)}
BAD = {
    "faults": stored(faults=("a", "b")),
    "unlike": stored(unlike=UNLIKE),
    "t5": of_model(model_type="t5"),
    "tower": of_model(model_type="clip_vision_model"),
    "clip": of_model(model_type="clip"),
    "new": of_model(architectures=["New"], model_type="new"),
    "nameless": of_model(architectures=None),
    "remote code": facts(
        config={"architectures": ["New"]}, stored=replace(STORED, remote_code=True)
    ),
    "3 bits": facts(bits=3),
    "9 bits": facts(bits=9),
    "8 bits": facts(bits=8),
    "asymmetric": facts(sym=False),
    "groups of 48": facts(group_size=48),
    "groups that do not divide": facts(group_size=128, shapes={"mlp.down_proj": (1024, 192)}),
    "desc_act": facts(desc_act=True),
    "order": stored(reordered="x"),
    "no order": stored(no_order="x"),
    "uneven": facts({"self_attn.q_proj": EIGHT}, export=Export(dynamic={".*q_proj": {"bits": 8}})),
    "unseen": facts(
        {f"self_attn.{part}_proj": EIGHT for part in "qkv"},
        export=Export(dynamic={r".*\.[qkv]_proj": {"bits": 8}}),
    ),
    "planned with dynamic": facts(stored=None, export=Export(dynamic={"x": {"bits": 8}})),
    "odd shapes": facts(group_size=32, shapes={"mlp.down_proj": (96, 96)}),
    "32 GPUs": replace(GOOD, tensor_parallel=32),
    "tied head": facts(export=Export(lm_head=True), config={"tie_word_embeddings": True}),
    "zeros": stored(zeros={"free": "x"}),
    "label": stored(zeros={"v2": "x"}),
    "words": stored(words="x"),
    "silent": stored(silent=("sym",)),
    "dtype": stored(dtype="float64"),
    "no config": stored(config_file=False),
    "dense": stored(dense_linears=(f"{BLOCK}.mlp.up_proj",)),
    "routed": facts(
        {"mlp.experts.0.up_proj": EIGHT},
        shapes={"mlp.experts.0.up_proj": (256, 256), "mlp.experts.0.down_proj": (256, 256)},
    ),
    "other blocks": replace(GOOD, layers=(GOOD.layers[0]._replace(name="net.0.x_proj"),)),
}


def fired(these: Facts) -> set[int]:
    return {number for number, rule in enumerate(RULES) if rule.broken(these) is not None}


def test_an_ordinary_checkpoint_breaks_no_rule():
    assert not fired(GOOD) and not fired(facts(stored=None))


def test_every_rule_fires():
    silent = set(range(len(RULES))) - set().union(*map(fired, BAD.values()))
    assert not silent, [RULES[number] for number in silent]


@pytest.mark.parametrize("what", BAD)
def test_each_of_these_is_bad_for_somebody(what):
    assert fired(BAD[what])
    for number in fired(BAD[what]):
        reason = RULES[number].broken(BAD[what])
        assert reason and not reason.endswith(".") and "\n" not in reason


def test_rules_have_an_engine_a_verdict_and_a_source():
    assert {rule.engine for rule in RULES} == set(VERSIONS) > set(ENGINES)
    assert all(rule.source and rule.verdict in ("no", "limited") for rule in RULES)


@pytest.mark.parametrize(
    ("size", "inputs", "expected"), [(-1, 64, -1), (64, 64, -1), (128, 64, -1), (32, 64, 32)]
)
def test_one_group_is_spelt_in_one_way(size, inputs, expected):
    assert plain(PLAIN._replace(group_size=size), inputs).group_size == expected
