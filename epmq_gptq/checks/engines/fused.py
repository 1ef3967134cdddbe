"""Layers that a checkpoint holds apart and an engine multiplies as one matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Name of the whole → names in a checkpoint.
# Source: `packed_modules_mapping` of vLLM's and SGLang's model classes.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Layers that tensor parallelism cuts along their inputs; all others along their outputs.
CUT_INPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2")
KEY_VALUES = ("k_proj", "v_proj")
ROUTED = re.compile(r"(.+\.experts)\.(\d+)\.")
# The projections of a routed module, by the names that checkpoints give them.
_ROUTED_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))
# Leaves that are linear layers wherever they stand: what a checkpoint holds of them unquantized
# was left out of the quantization, and is no norm, router or embedding.
LINEAR_LEAVES = frozenset(part for parts in FUSED.values() for part in parts) | set(CUT_INPUTS)


def fused(names: Iterable[str], routed_modules: int = 0) -> dict[str, list[str]]:
    """Fused layer → all its parts, those that are not quantized too.

    Args:
        names: the layers that are quantized.
        routed_modules: how many the configuration says there are in a layer.
    """
    names = list(names)
    groups: dict[str, list[str]] = {}
    routed_stacks: dict[str, dict[str, int]] = {}
    known = set(names)
    for name in names:
        parent, _, last = name.rpartition(".")
        routed = ROUTED.match(name)
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
