"""Refusal of models whose tensors do not match, before anything is computed.

Tensors whose dtype is one of ``WEIGHTS`` are merged. Anything else (indices, masks, fp8 codes, and
fp64, which the fp32 arithmetic could not keep) must be the same in all models and is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EPMQInputError
from ..io.dtypes import WEIGHTS

# How many offending tensors an error spells out for each expert.
_LISTED = 20
# Names of tables with one row per token.
_TOKEN_TABLES = ("embed", "wte", "shared", "lm_head", "output_projection")


class Header(NamedTuple):
    """Shape and dtype of one tensor; the dtype by safetensors' name."""

    shape: tuple[int, ...]
    dtype: str


def check_headers(
    reference: Mapping[str, Header], what: str, experts: Mapping[str, Mapping[str, Header]]
) -> None:
    """Every expert has the tensors of ``reference``, in the same shapes and kinds of dtype.

    Args:
        reference: headers of the base, or of the first expert.
        what: how errors call the reference.
        experts: expert name → its headers.

    Raises:
        EPMQInputError: says for each expert which tensors differ and how.
    """
    found = {name: _differences(reference, what, header) for name, header in experts.items()}
    all_found = [difference for differences in found.values() for difference in differences]
    if not all_found:
        return
    complaints = [
        f"expert `{name}`: " + ", and ".join(difference.text for difference in differences)
        for name, differences in found.items()
        if differences
    ]
    raise EPMQInputError(
        f"the experts cannot be merged, and nothing was computed; {'; '.join(complaints)}.",
        code=min(difference.code for difference in all_found),
        subject=", ".join(f"expert `{name}`" for name in found if found[name]),
        remedy=" ".join(dict.fromkeys(difference.remedy for difference in all_found)),
    )


class _Difference(NamedTuple):
    """What sets one expert apart from the reference."""

    code: str
    text: str
    remedy: str


def _differences(
    reference: Mapping[str, Header], what: str, header: Mapping[str, Header]
) -> list[_Difference]:
    missing = [name for name in reference if name not in header]
    extra = [name for name in header if name not in reference]
    tables, shapes, dtypes = [], [], []
    for name, mine in header.items():
        other = reference.get(name)
        if other is None:
            continue
        if mine.shape != other.shape:
            if _is_token_table(name, mine.shape, other.shape):
                tables.append(f"`{name}` has {mine.shape[0]} rows, {what} {other.shape[0]}")
            else:
                shapes.append(f"`{name}` is {list(mine.shape)}, {what} {list(other.shape)}")
        elif mine.dtype != other.dtype and not (mine.dtype in WEIGHTS and other.dtype in WEIGHTS):
            dtypes.append(f"`{name}` is {mine.dtype}, {what} {other.dtype}")
    alike = "Export every model in the same way."
    found = (
        ("EPMQ-F01", f"lacks {{}} that {what} has", _quote(missing), alike),
        ("EPMQ-F02", f"has {{}} that {what} lacks", _quote(extra), alike),
        (
            "EPMQ-F05",
            "has token tables of another size: {}",
            tables,
            "Resize with `model.resize_token_embeddings(rows)` to one tokenizer and save again.",
        ),
        (
            "EPMQ-F03",
            "has other shapes: {}",
            shapes,
            "Give models of one architecture; others cannot be merged.",
        ),
        ("EPMQ-F06", "has other dtypes: {}", dtypes, "Convert it to the dtypes of the others."),
    )
    return [
        _Difference(code, text.format(_list(items)), remedy)
        for code, text, items, remedy in found
        if items
    ]


def _is_token_table(name: str, mine: Sequence[int], other: Sequence[int]) -> bool:
    return (
        len(mine) == len(other) == 2
        and mine[1] == other[1]
        and any(part in name for part in _TOKEN_TABLES)
    )


def _quote(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{len(items)} tensor(s): " + ", ".join(items[:_LISTED]) + more


def check_copied(name: str, reference: Tensor, what: str, tensor: Tensor, expert: str) -> None:
    """A tensor that is copied, not merged, must be the same bytes; else EPMQInputError."""
    if not torch.equal(_bytes(reference), _bytes(tensor)):
        raise EPMQInputError(
            f"expert `{expert}`: tensor `{name}` ({tensor.dtype}) differs from that of {what}; "
            "only fp32, fp16 and bf16 tensors are merged, any other must be the same in all "
            "models.",
            code="EPMQ-F06",
            subject=f"tensor `{name}`",
            remedy="Convert it, or make it equal.",
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
