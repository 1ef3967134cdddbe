"""Code that comes with a model is not run unless the caller says so.

GPTQModel (7.6, 7.7) imports the module that ``auto_map`` of a config.json names whatever
``trust_remote_code`` says: to prepare it, in case that it will be used. Within :func:`distrusted`
neither that nor any other way to such a module is open.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

from gptqmodel.models import loader as host_loader
from transformers import dynamic_module_utils

from ..errors import EPMQInputError

_distrusted: ContextVar[bool] = ContextVar("_distrusted", default=False)


@contextlib.contextmanager
def distrusted(yes: bool = True) -> Iterator[None]:
    """Within, in this thread: no module of a model's folder or repository is imported."""
    _install()
    token = _distrusted.set(yes)
    try:
        yield
    finally:
        _distrusted.reset(token)


def _install() -> None:
    """Put the guards before the two functions, once; elsewhere these stay as they are."""
    if getattr(dynamic_module_utils.get_cached_module_file, "_epmq", False):
        return
    fetch, prepare = (
        dynamic_module_utils.get_cached_module_file,
        host_loader.prepare_remote_model_init_compat,
    )

    # Through here goes everything that transformers imports of a model, the host's calls as well.
    @functools.wraps(fetch)
    def guarded(pretrained_model_name_or_path, module_file, *arguments, **options):
        if _distrusted.get():
            raise EPMQInputError(
                f"the model asks for code of its own (`{module_file}`), which is not run.",
                code="EPMQ-F57",
                subject=f"`{module_file}`",
                remedy="Use a model whose architecture transformers has, or in Python pass "
                "`trust_remote_code=True` to `GPTQModel.load` if you read that code.",
            )
        return fetch(pretrained_model_name_or_path, module_file, *arguments, **options)

    # It would also copy the folder's modules into transformers' cache.
    @functools.wraps(prepare)
    def skipped(model_id_or_path, config):
        if not _distrusted.get():
            prepare(model_id_or_path, config)

    guarded._epmq = True
    dynamic_module_utils.get_cached_module_file = guarded
    host_loader.prepare_remote_model_init_compat = skipped
