"""What is done to a valid file, by choice of hypothesis: bytes, JSON trees, safetensors headers."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import yaml
from hypothesis import strategies as st

# What readers trip over: of other types, too large, without an end, out of the folder.
ODD = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 1e308, -0.0, 0.5),
    *(float("nan"), float("inf"), "", " ", "\0", "x\ny", "\x1b[2J", "ä\u202e", "\ud800", "a" * 999),
    *("../canary.safetensors", "canary.safetensors", "/etc/passwd", "~", ".", "..", "con\\x"),
    *("org/name", "org/name@../..", "a+b", "!!python/object:os.system", "*", "(", "(a+)+$"),
    *([], {}, [[]], [None], [[1, 2], {"a": []}], {"": None}, {"a": {"a": {}}}, "F32", "I64", "F4"),
]
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)


@st.composite
def mangled(draw, content: bytes) -> bytes:
    """Bytes cut, changed, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        kind = draw(st.sampled_from("cut change repeat insert truncate".split()))
        if kind == "cut":
            del data[at : at + length]
        elif kind == "change":
            fresh = draw(st.binary(min_size=length, max_size=length))
            data[at : at + length] = fresh
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 2, 500]))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"[" * 2000, b"\xff\xfe"]))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def rebuilt(draw, tree: Any) -> Any:
    """A tree of plain data with some values, keys and entries replaced, taken out or doubled."""
    tree = json.loads(json.dumps(tree))
    fresh = odd.map(deepcopy)  # those of the pool are mutated in their new places
    for _ in range(draw(st.integers(1, 3))):
        parent, node = None, tree
        while isinstance(node, (dict, list)) and node and (parent is None or draw(st.booleans())):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            return draw(fresh)
        kind = draw(st.sampled_from("replace replace replace remove add wrap".split()))
        if kind == "remove":
            del parent[key]
        elif kind == "wrap":
            parent[key] = draw(st.sampled_from([[node], {"a": node}, [node] * 3, str(node)]))
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(sorted(map(str, parent))) | st.text(max_size=8))] = draw(
                odd
            )
            parent[str(draw(fresh))] = node
        elif kind == "add":
            parent.insert(draw(st.integers(0, len(parent))), draw(fresh))
        else:
            parent[key] = draw(fresh)
    return tree


@st.composite
def json_files(draw, content: bytes) -> bytes:
    """A JSON file with a mutated tree, or mutated bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mangled(content))
    tree = draw(rebuilt(json.loads(content)))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@st.composite
def yaml_files(draw, content: bytes) -> bytes:
    """The same of YAML."""
    if draw(st.booleans()):
        return draw(mangled(content))
    try:
        tree = draw(rebuilt(yaml.safe_load(content)))
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeEncodeError):  # a card, or what YAML cannot write
        return draw(mangled(content))


@st.composite
def safetensors_files(draw, content: bytes) -> bytes:
    """A safetensors file with a mutated header, data or length."""
    if draw(st.integers(0, 2)) == 0:
        return draw(mangled(content))
    length = int.from_bytes(content[:8], "little")
    tree = draw(rebuilt(json.loads(content[8 : 8 + length])))
    header = json.dumps(tree).encode("utf-8", "surrogatepass")
    lengths = st.sampled_from([len(header)] * 4 + [0, len(header) + 1, 2**40, 2**64 - 1])
    data = content[8 + length :]
    data = draw(st.sampled_from([data] * 3 + [data[:-1], data + b"\0", b"", data * 2]))
    return draw(lengths).to_bytes(8, "little") + header + data
