"""The experts' weights: checked from their headers before any compute, read tensor by tensor.

"Expert" always means one of the K models that were merged; the experts of a mixture-of-experts
layer are called *routed modules*.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EPMQInputError
from ..io.checkpoints import Checkpoint, Source, resolve_source
from ..io.folders import ADAPTER_CONFIG
from ..method.deltas import WeightDelta
from .adapters import Adapter, Update, is_adapter
from .in_memory import InMemoryExpert
from .linears import Linear, StoredWeight
from .weights import (
    check_finite,
    find_weight,
    oriented,
    read_rows,
    read_weight,
    refuse_quantized,
    row_norms,
)

__all__ = [
    "Expert",
    "Experts",
    "check_finite",
    "find_weight",
    "split_adapter",
]

# How many offending tensors an error spells out.
_LISTED = 20


@dataclass
class Expert:
    """One of the K models.

    Attributes:
        source: where it came from, in words that may be published.
        store: its weights; of an adapter, those of the base it was trained on.
        base: where the base of an adapter came from, else None.
        adapter: what it changes, or None for a whole model.
    """

    source: Source
    store: Any
    base: Source | None = None
    adapter: Adapter | None = None

    def replacement(self, linear: Linear) -> StoredWeight | None:
        """Where the adapter keeps the whole weight of this layer, if it does."""
        return None if self.adapter is None else self.adapter.replacement(linear)


class Experts:
    """The K experts of one run.

    Args:
        sources: name → folder, hub id, ``base+adapter``, or a model in memory.
        base: the model they were fine-tuned from: folder or hub id. Only data-free Grams and
            adapters that name no base of their own need it.
        require_pinned: refuse hub ids without a commit.

    Raises:
        EPMQInputError: a source cannot be resolved or read as safetensors, or is quantized.
    """

    def __init__(
        self, sources: Mapping[str, Any], *, base: str | None = None, require_pinned: bool = False
    ):
        self._require_pinned = require_pinned
        self._experts: dict[str, Expert] = {}
        self._bound: dict[str, Linear] = {}
        self._stored: dict[tuple[str, str], StoredWeight] = {}  # (expert, module) -> where
        # Expert -> module -> what its adapter calls it.
        self._adapted: dict[str, dict[str, StoredWeight]] = {}
        self._stores: dict[Path, Checkpoint] = {}  # adapters share their base
        # Several devices may fold at once; a memory-mapped shard is read by one thread at a time.
        self._lock = threading.RLock()
        self.base: tuple[Checkpoint, Source] | None = None
        if base is not None:
            self.base = self._open(base, "`base`")
        for name, spec in sources.items():
            self._experts[name] = self._expert(spec, f"expert `{name}`")

    # ---- what there is -----------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The experts in the order in which they are folded."""
        return list(self._experts)

    @property
    def sources(self) -> dict[str, Source]:
        """Where each expert came from."""
        return {name: expert.source for name, expert in self._experts.items()}

    @property
    def folders(self) -> dict[str, Path]:
        """Every folder that is read, by what errors call it."""
        paths = {"`base`": self.base[1].path} if self.base else {}
        for name, expert in self._experts.items():
            if expert.source.path is not None:
                paths[f"expert `{name}`"] = expert.source.path
            if expert.base is not None and expert.base.path is not None:
                paths[f"base of expert `{name}`"] = expert.base.path
        return paths

    def expert(self, name: str) -> Expert:
        """One expert."""
        return self._experts[name]

    def store(self, name: str) -> Any:
        """The weights of one expert; of an adapter, those of its base."""
        return self._experts[name].store

    def adapted(self, name: str) -> dict[str, StoredWeight]:
        """Linear layer → what an adapter calls it; empty for a whole model."""
        return self._adapted.get(name, {})

    def adapter(self, name: str) -> Adapter | None:
        """What an adapter changes; None for a whole model."""
        return self._experts[name].adapter

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Every folder of weights that was opened, each once."""
        adapters = (e.adapter.tensors for e in self._experts.values() if e.adapter is not None)
        return [*self._stores.values(), *(a for a in adapters if isinstance(a, Checkpoint))]

    # ---- opening -----------------------------------------------------------------------------

    def _expert(self, spec: Any, what: str) -> Expert:
        if isinstance(spec, InMemoryExpert):
            spec.store.what = what
            source = Source("", "in memory", None, None)
            refuse_quantized(spec.store, what)
            return Expert(source, spec.store, source if spec.adapter else None, spec.adapter)
        base_spec, adapter_spec = split_adapter(str(spec))
        source = self._resolve(adapter_spec or base_spec, what)
        if adapter_spec is None:
            if not is_adapter(source.path, what=what):
                return Expert(source, self._checkpoint(source, what))
            base_spec = None
        elif not is_adapter(source.path, what=what):
            raise EPMQInputError(
                f"{what}: `{source.name}` holds no `{ADAPTER_CONFIG}`, so it is no LoRA adapter.",
                code="EPMQ-F34",
                subject=what,
                remedy="Write `base+adapter` with the adapter after the plus.",
            )
        adapter = Adapter.open(source.path, what=what)
        store, base = self._base_of(adapter, base_spec, what)
        return Expert(source, store, base, adapter)

    def _base_of(self, adapter: Adapter, spec: str | None, what: str) -> tuple[Checkpoint, Source]:
        """What the user says, else the run's base, else what the adapter itself says."""
        if spec is None and self.base is not None:
            return self.base
        named = spec or adapter.base
        remedy = "Write the expert as `base+adapter`, or set `base`."
        if not named:
            raise EPMQInputError(
                f"{what}: `{ADAPTER_CONFIG}` names no base model.",
                code="EPMQ-F34",
                subject=what,
                remedy=remedy,
            )
        try:
            return self._open(named, f"{what}, its base")
        except EPMQInputError as error:
            if spec is not None:
                raise
            raise EPMQInputError(
                error.cause, code=error.code, subject=error.subject, remedy=remedy
            ) from error

    def _open(self, spec: str, what: str) -> tuple[Checkpoint, Source]:
        source = self._resolve(spec, what)
        return self._checkpoint(source, what), source

    def _resolve(self, spec: str, what: str) -> Source:
        return resolve_source(spec, what=what, require_pinned=self._require_pinned)

    def _checkpoint(self, source: Source, what: str) -> Checkpoint:
        store = self._stores.get(source.path)
        if store is None:
            store = self._stores[source.path] = Checkpoint(source.path, what=what)
            refuse_quantized(store, what)
        return store

    # ---- which tensor is which layer ---------------------------------------------------------

    def bind(self, linears: Iterable[Linear]) -> None:
        """Find every linear layer's weight in every expert, by name and shape, from the headers.

        Raises:
            EPMQInputError: per expert, every weight that is missing, of another shape, or not a
                floating tensor; an adapter that does not fit.
        """
        self._bound = {linear.name: linear for linear in linears}
        for name, expert in self._experts.items():
            problems: list[EPMQInputError] = []
            for linear in self._bound.values():
                try:
                    self._stored[name, linear.name] = self._find(expert, linear)
                except EPMQInputError as error:
                    problems.append(error)
            if problems:
                raise self._misfit(name, problems)
            if expert.adapter is not None:
                self._adapted[name] = expert.adapter.bind(self._bound.values(), expert.store)

    def _find(self, expert: Expert, linear: Linear) -> StoredWeight:
        return find_weight(self._store_of(expert, linear), linear, expert.replacement(linear))

    def _misfit(self, name: str, problems: list[EPMQInputError]) -> EPMQInputError:
        listed = [problem.cause.rstrip(".") for problem in problems[:_LISTED]]
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        return EPMQInputError(
            f"expert `{name}` ({self.sources[name].name}) does not fit the merged model: "
            f"{'; '.join(listed)}{more}.",
            code=problems[0].code,
            subject=f"expert `{name}`",
            remedy="An expert must hold every linear layer of the merged model, fine-tuned from "
            "the same base.",
        )

    # ---- weights -----------------------------------------------------------------------------

    def delta(self, name: str, module: str, W_m: torch.Tensor) -> WeightDelta:
        """``W_i − W_m`` of one layer, on the device of ``W_m: (out, in)`` fp32."""
        return self._against(name, module, W_m)

    def task_vector(
        self, name: str, module: str, device: torch.device | str = "cpu"
    ) -> WeightDelta:
        """``W_i − W_0`` of one layer, W_0 being the weight of ``base``."""
        assert self.base is not None
        expert = self._experts[name]
        if expert.store is self.base[0] and expert.replacement(self._bound[module]) is None:
            update = self._update(name, module, device)
            if update is None or update.magnitude is None:
                low_rank = None if update is None else (update.B, update.A)
                return WeightDelta(None, low_rank)
        return self._against(name, module, self.base_weight(module, device))

    def base_weight(self, module: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """``W_0: (out, in)`` fp32 of ``base``."""
        assert self.base is not None
        linear = self._bound[module]
        store = self.base[0]
        with self._lock:
            return oriented(read_weight(store, find_weight(store, linear)), linear, device)

    def rows(self, name: str, module: str, start: int, stop: int) -> torch.Tensor:
        """Rows of ``W_i: (out, in)``, ``(stop − start, in)`` fp32 on the CPU, read alone."""
        linear = self._bound[module]
        expert = self._experts[name]
        stored = self._stored[name, module]
        with self._lock:
            W = read_rows(self._store_of(expert, linear), stored, linear, start, stop)
            update = self._update(name, module, "cpu")
        if update is None:
            return W
        # Not in place: the rows of an fp32 checkpoint are the mapped file itself, and the base of
        # other experts.
        W = W + update.B[start:stop] @ update.A
        if update.magnitude is not None:
            W = W * (update.magnitude[start:stop] / W.norm(dim=1))[:, None]
        return W

    def prefetch(self, name: str, modules: Iterable[str]) -> None:
        """Have the weights of these layers read ahead, where they lie on a disk."""
        expert = self._experts[name]
        for module in modules:
            store = self._store_of(expert, self._bound[module])
            if isinstance(store, Checkpoint):
                store.prefetch(self._stored[name, module].tensor)

    def bias(self, name: str, module: str) -> torch.Tensor:
        """``b_i: (out,)`` of one layer, as its checkpoint has it.

        Raises:
            EPMQInputError: it has none there.
        """
        linear, expert = self._bound[module], self._experts[name]
        stored = self._stored[name, module]
        tensor = f"{stored.tensor.removesuffix('.weight')}.bias"
        store = self._store_of(expert, linear)
        whole = stored.index is None and stored.part is None
        if not whole or tensor not in store or store.info(tensor).shape != (linear.outputs,):
            raise EPMQInputError(
                f"expert `{name}`: it has no tensor `{tensor}` of {linear.outputs} numbers, and "
                f"the merged model's `{module}` has a bias.",
                code="EPMQ-F04",
                subject=f"expert `{name}`, tensor `{tensor}`",
                remedy="Give an expert of the same architecture, or set `bias_refit=False`.",
            )
        with self._lock:
            return store.read(tensor)

    def check(self, name: str, module: str) -> None:
        """Raise :class:`EPMQNumericalError` if that weight holds a NaN or an infinity."""
        linear, expert = self._bound[module], self._experts[name]
        stored = self._stored[name, module]
        with self._lock:
            weight = read_weight(self._store_of(expert, linear), stored)
            update = self._update(name, module, "cpu")
        place = dict(module=module, expert=name, code="EPMQ-F08")
        check_finite(weight, f"expert `{name}`: tensor `{stored.tensor}`", **place)
        for part, tensor in (update._asdict() if update is not None else {}).items():
            if tensor is not None:
                check_finite(tensor, f"expert `{name}`: LoRA `{part}` of `{module}`", **place)

    def release(self, name: str) -> None:
        """Unmap what one expert's weights were read from; a later read maps it again.

        Pages of a mapped file count as memory of the process for as long as the mapping stands, so
        that of all experts would grow to their size.
        """
        expert = self._experts[name]
        for store in (expert.store, expert.adapter.tensors if expert.adapter else None):
            if isinstance(store, Checkpoint):
                with self._lock:
                    store.close()

    def close(self) -> None:
        """Release the memory-mapped shards."""
        for store in self._stores.values():
            store.close()
        for expert in self._experts.values():
            if expert.adapter is not None:
                expert.adapter.close()

    def _store_of(self, expert: Expert, linear: Linear) -> Any:
        replaced = expert.replacement(linear) is not None
        return expert.adapter.tensors if replaced else expert.store

    def _update(self, name: str, module: str, device: torch.device | str) -> Update | None:
        adapted = self._adapted.get(name, {}).get(module)
        if adapted is None:
            return None
        update = self._experts[name].adapter.update(adapted)
        return Update(*(None if t is None else t.to(device) for t in update))

    def _against(self, name: str, module: str, reference: torch.Tensor) -> WeightDelta:
        linear, expert = self._bound[module], self._experts[name]
        device = reference.device
        with self._lock:
            weight = read_weight(self._store_of(expert, linear), self._stored[name, module])
            update = self._update(name, module, device)
        W = oriented(weight, linear, device)
        if update is None:
            return WeightDelta(W - reference, None)
        B = update.B
        if update.magnitude is not None:
            scale = (update.magnitude / row_norms(W, update))[:, None]
            W, B = W * scale, B * scale
        return WeightDelta(W - reference, (B, update.A))


def split_adapter(spec: str) -> tuple[str, str | None]:
    """``base+adapter`` → (base, adapter); (spec, None) where there is no adapter.

    Paths that exist win, so the folder of either may have a plus in its name.
    """
    if "+" not in spec or _exists(spec):
        return spec, None
    parts = spec.split("+")
    splits = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(1, len(parts))]
    base, adapter = next((split for split in splits if _exists(split[0].strip())), splits[0])
    return base.strip(), adapter.strip()


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null byte
        return False
