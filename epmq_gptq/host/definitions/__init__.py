"""Model definitions that GPTQModel lacks: one small file each, as its own are."""

from .registry import register

__all__ = ["register"]
