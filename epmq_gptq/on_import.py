"""Whoever has imported this package and GPTQModel, in whatever order, has both acquainted.

GPTQModel takes seconds to import, so ``import epmq_gptq`` does not do it: it waits until somebody
else does. Then ``GPTQModel.load`` also knows ``EPMQConfig``, CLIP and T5.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

HOST = "gptqmodel"


def when_host_is_imported() -> None:
    """Install now if GPTQModel is there already, else as soon as it is imported."""
    if HOST in sys.modules:
        _install()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _install() -> None:
    if _importing():
        return  # it is one of our own modules that imports the host; whoever uses it installs
    from .host.door import install

    install()


def _importing() -> bool:
    package = __package__
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.startswith((f"{package}.", HOST)) and name != __name__
    )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the host as usual, and has its loader call us when it is complete."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != HOST:
            return None
        sys.meta_path.remove(self)  # once is enough, and the search below must not find us
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The host's own loader, and what comes after it."""

    def __init__(self, own: importlib.abc.Loader):
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Left in place, tools would take it for the loader of a finished module.
        module.__loader__ = module.__spec__.loader = self._own
        self._own.exec_module(module)
        _after(module)


def _after(module: ModuleType) -> None:
    # The import machinery calls it half done until we return.
    spec = module.__spec__
    spec._initializing = False
    try:
        _install()
    finally:
        spec._initializing = True
