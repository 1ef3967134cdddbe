"""Every expert's own full-precision pass over its own rows, one layer at a time.

Before a layer of the merge is quantized, each expert runs its rows through its own version of that
layer, and what its linear layers are given is kept until the merge has run the same rows. An
expert's layer is read, run and dropped before the next one is read, so memory does not know K.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.batches import CalibrationPlan
from ...errors import EPMQInputError, EPMQNumericalError
from ...io.checkpoints import Checkpoint
from ...io.phases import Phases
from ...method.chunks import given_up
from ...method.nonfinite import first_bad
from ..experts import Experts
from ..linears import Linear, is_routed
from .layer_walk import LayerWalk
from .residual import first_states, residual_taps
from .skeleton import LayerStack, Skeleton


class ExpertTrajectories:
    """What the linear layers of the running layer are given in every expert.

    Args:
        merged: whose configuration says how all experts are built.
        experts: their weights, bound to ``linears``.
        plan: the batches and the expert of each.
        linears: the layers that will be quantized.
        device: where experts run.
        dtype: of their weights and activations.
        keep_going: leave an expert whose activations are not finite from there on, instead of
            raising.
        phases: where the time is counted.

    Attributes:
        left: such experts, and why.
        taps: linear layer that writes to the residual stream → the module, relative to the running
            layer, whose input is the stream before the addition.

    Raises:
        EPMQInputError: the layers cannot be found or run, or an expert lacks one of their tensors.
    """

    def __init__(
        self,
        merged: Checkpoint,
        experts: Experts,
        plan: CalibrationPlan,
        linears: Iterable[Linear],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_going: bool = False,
        phases: Phases | None = None,
    ):
        self._phases = phases or Phases()
        self._keep_going = keep_going
        self.left: dict[str, EPMQNumericalError] = {}
        self._experts = experts
        self._plan = plan
        self._linears = {linear.name: linear for linear in linears}
        self._skeleton = Skeleton(merged, torch.device(device), dtype)
        # Module of the network → the layers that the host makes of it (it takes joined ones apart).
        self._parts: dict[str, list[str]] = {}
        for linear in self._linears.values():
            # What a routed module is given cannot be paired with what the merge gives it, not even
            # where both routers chose as many tokens.
            if not is_routed(linear.name):
                self._parts.setdefault(self._module_of(linear), []).append(linear.name)
        self._names = {name: self._tensors_of(name) for name in dict.fromkeys(plan.experts)}
        self._walk = LayerWalk(plan.batches, torch.device(device))
        self._next = {stack.path: 0 for stack in self._skeleton.stacks}
        self._layer: str | None = None
        self._embeds = False  # whether some expert's embeddings were put into the network
        self._inputs: list[dict[str, Tensor]] = []  # batch → linear layer → z: (B, S, d)
        self._streams: list[dict[str, Tensor]] = []  # batch → tap → r_i: (B, S, d)
        self.taps: dict[str, str] = {}
        self._taps_of: str | None = None

    # ---- what the merge asks for ---------------------------------------------------------------

    @torch.no_grad()
    def enter(self, layer: str) -> bool:
        """Make ``layer`` the running one; False where no expert's pass reaches it (the head).

        Raises:
            EPMQNumericalError: an expert's activations are not finite.
            EPMQInputError: the model's forward does not run this layer.
        """
        if layer == self._layer:
            return True
        found = self._find(layer)
        if found is None:
            return False
        stack, index = found
        with self._phases.measure("expert_forward"):
            for earlier in self._skeleton.stacks:
                if earlier is stack:
                    break
                if earlier.is_read:
                    self._advance(earlier, len(earlier.layers))
            self._advance(stack, index)
            self._clear()
            self._run(stack, index, capture=True)
        self._layer = layer
        return True

    def inputs(self, linear: str, batch: int) -> Tensor | None:
        """``z: (B, S, d)`` of a layer's input in the pass of the batch's own expert.

        None where it has none: the head, and routed modules.
        """
        return self._inputs[batch].get(linear) if self._inputs else None

    def stream(self, linear: str, batch: int) -> Tensor | None:
        """``r_i: (B, S, d)``, the residual stream before ``linear`` writes to it, if it does."""
        tap = self.taps.get(linear)
        return None if tap is None else self._streams[batch].get(tap)

    def continuation_state(self) -> dict[str, Any]:
        """Where the experts' passes are, between two layers of the merge."""
        left = {
            name: [error.cause, error.code, error.subject, error.remedy, error.module]
            for name, error in self.left.items()
        }
        return {"next": dict(self._next), "left": left, "walk": self._walk.state()}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`continuation_state`."""
        self._clear()
        self._layer = self._taps_of = None
        self._next = dict(state["next"])
        self.left = {
            name: EPMQNumericalError(
                cause, code=code, subject=subject, remedy=remedy, module=module, expert=name
            )
            for name, (cause, code, subject, remedy, module) in state["left"].items()
        }
        self._walk.resume(state["walk"])

    def close(self) -> None:
        """Forget everything that was kept; no layer can be entered after it."""
        self._clear()
        self._layer = None
        self._skeleton.empty(self._skeleton.outer(embeddings=True))
        self._walk = LayerWalk([], self._skeleton.device)

    def _module_of(self, linear: Linear) -> str:
        places = (place.tensor.removesuffix(".weight") for place in linear.joined)
        known = (name for name in (linear.name, *places) if name in self._skeleton)
        return next(known, linear.name)

    # ---- layer by layer ------------------------------------------------------------------------

    def _find(self, layer: str) -> tuple[LayerStack, int] | None:
        for stack in self._skeleton.stacks:
            path, _, number = layer.rpartition(".")
            if path == stack.path and number.isdigit() and int(number) < len(stack.layers):
                return stack, int(number)
        return None

    def _clear(self) -> None:
        self._inputs, self._streams, self.taps = [], [], {}

    def _advance(self, stack: LayerStack, index: int) -> None:
        """Run the layers before ``index`` that were not run yet (left out by ``dynamic``)."""
        while self._next[stack.path] < index:
            self._run(stack, self._next[stack.path], capture=False)

    def _run(self, stack: LayerStack, index: int, *, capture: bool) -> None:
        assert self._next[stack.path] == index, "layers are entered in forward order"
        own = self._skeleton.within(stack.name(index))
        if capture:
            self._inputs = [{} for _ in self._plan.batches]
            self._streams = [{} for _ in self._plan.batches]
        with given_up(f"`{stack.name(index)}`: an expert's own pass", self._skeleton.device):
            for expert in self._names:
                if expert not in self.left:
                    self._run_expert(expert, stack, index, own, capture)
        self._skeleton.empty(own)
        self._next[stack.path] = index + 1
        if index + 1 == len(stack.layers):
            self._walk.leave(stack)

    def _run_expert(
        self, expert: str, stack: LayerStack, index: int, own: Collection[str], capture: bool
    ) -> None:
        with self._phases.measure("expert_reading"):
            self._fill(expert, stack, index, own)
        self._read_ahead(expert, stack, index)
        goes_on = index + 1 < len(stack.layers) or stack.is_read
        batches = [b for b, owner in enumerate(self._plan.experts) if owner == expert]
        with self._walk.at(self._skeleton.stacks, stack, index) as run:
            for batch in batches:
                output = self._run_batch(stack, index, batch, run, capture)
                if not _is_finite(output):
                    self._leave(expert, stack.name(index), batches, (batch, output))
                    break
                if goes_on:
                    self._walk.keep(stack, batch, output)

    def _read_ahead(self, expert: str, stack: LayerStack, index: int) -> None:
        """While an expert runs a layer, have what comes after it read from disk."""
        names = [name for name in self._names if name not in self.left]
        place = names.index(expert) + 1
        if place == len(names):
            place, index = 0, index + 1
        if index < len(stack.layers):
            prefix = f"{stack.name(index)}."
            self._experts.prefetch(
                names[place], [name for name in self._linears if name.startswith(prefix)]
            )

    def _run_batch(
        self,
        stack: LayerStack,
        index: int,
        batch: int,
        run: Callable[[int], Any],
        capture: bool,
    ) -> Any:
        if not capture:
            return run(batch)
        layer = stack.layers[index]
        linears = {
            name: module for name, module in stack.linears(index).items() if name in self._parts
        }
        if self._taps_of != stack.name(index):  # the first batch of this layer
            relative = {name.removeprefix(f"{stack.name(index)}."): name for name in linears}
            taps = residual_taps(layer, list(relative), lambda: run(batch))
            self._taps_of = stack.name(index)
            self.taps = {
                part: tap for name, tap in taps.items() for part in self._parts[relative[name]]
            }
        hooks = [
            module.register_forward_pre_hook(_keep(self._inputs[batch], part), with_kwargs=True)
            for name, module in linears.items()
            for part in self._parts[name]
        ]
        hooks += [
            layer.get_submodule(tap).register_forward_pre_hook(
                _keep(self._streams[batch], tap, copy=True), with_kwargs=True
            )
            for tap in dict.fromkeys(self.taps.values())
        ]
        try:
            return run(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(
        self, expert: str, layer: str, batches: Collection[int], bad: tuple[int, Any]
    ) -> None:
        """An expert's activations are not finite: say who is to blame, and stop it or the run.

        Args:
            bad: number and output of the batch where that was met.

        Raises:
            EPMQNumericalError: unless the run shall go on.
        """
        try:
            for name in self._linears:
                if name.startswith(f"{layer}."):
                    self._experts.check(expert, name)
            raise EPMQNumericalError(
                f"expert `{expert}`: the activations behind `{layer}` of its own pass are not "
                f"finite{self._since(expert, *bad)}.",
                module=layer,
                expert=expert,
                code="EPMQ-F27",
                subject=f"expert `{expert}`, layer `{layer}`",
                remedy="Check that expert's weights and calibration rows, or load in bfloat16 or "
                "float32 if float16 overflowed; with `eta=0, rho=0` experts are not run.",
            )
        except EPMQNumericalError as error:
            if not self._keep_going:
                raise
            self.left[expert] = error
        self._taps_of = None  # may have been looked for in these batches: the next expert's serve
        for batch in batches if self._inputs else ():
            self._inputs[batch], self._streams[batch] = {}, {}

    def _since(self, expert: str, batch: int, output: Any) -> str:
        """Where they begin, in words."""
        inputs = self._plan.batches[batch]
        mask = inputs.get("attention_mask")
        # In the order of the forward pass: behind an attention, earlier tokens are bad as well.
        given = self._inputs[batch].values() if self._inputs else ()
        origins = (first_bad(batch, states, mask) for states in (*given, _states(output)))
        origin = next(filter(None, origins), None)
        if origin is None:
            return ""
        return f"; the first is {origin.told(expert, self._plan.experts, inputs.get('input_ids'))}"

    # ---- weights -------------------------------------------------------------------------------

    def _tensors_of(self, expert: str) -> dict[str, str]:
        """Parameter → tensor of an expert's store, all that its pass needs."""
        what = f"expert `{expert}`"
        adapter = self._experts.adapter(expert)
        if adapter is not None:
            adapted = self._experts.adapted(expert)
            strangers = [*adapter.unused, *self._not_quantized(adapter.modules)]
            strangers += [name for name in adapted if name not in self._skeleton]
            if strangers:
                raise EPMQInputError(
                    f"{what}: its adapter changes `{strangers[0]}`, which is not quantized or part "
                    "of a joined layer, so its own pass cannot be run exactly.",
                    code="EPMQ-F34",
                    subject=what,
                    remedy="Merge the adapter into its base, or set `eta=0, rho=0` (the paper's "
                    "targets).",
                )
        skip = {f"{name}.weight" for name in self._linears}
        return self._skeleton.names_in(self._experts.store(expert), what=what, apart_from=skip)

    def _not_quantized(self, modules: Collection[str]) -> list[str]:
        known = {
            place.tensor.removesuffix(".weight")
            for linear in self._linears.values()
            for place in linear.stored
        }
        return [module for module in modules if module not in known]

    def _fill(self, expert: str, stack: LayerStack, index: int, own: Collection[str]) -> None:
        # A later layer does not depend on them, but the forward before it runs over them.
        outer = self._skeleton.outer(embeddings=index == 0 or not self._embeds)
        for parameter in [*outer, *own]:
            self._skeleton.put(parameter, self._read(expert, parameter))
        self._embeds = True
        self._experts.release(expert)

    def _read(self, expert: str, parameter: str) -> Tensor:
        linear = self._linears.get(parameter.removesuffix(".weight"))
        if linear is not None and parameter.endswith(".weight"):
            W = self._experts.rows(expert, linear.name, 0, linear.outputs)
            return W.T if linear.transposed else W
        name = self._names[expert][parameter]
        adapter = self._experts.adapter(expert)
        if adapter is not None and name in adapter.replaced:
            return adapter.tensors.read(adapter.replaced[name])
        return self._experts.store(expert).read(name)


def _is_finite(output: Any) -> bool:
    return bool(torch.isfinite(_states(output).sum(dtype=torch.float32)))


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _keep(kept: dict[str, Tensor], name: str, copy: bool = False) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple, options: dict) -> None:
        states = first_states(arguments, options)
        if states is not None:
            # A stream may be added to in place; the input of a linear layer never is.
            kept[name] = states.detach().clone() if copy else states.detach()

    return hook
