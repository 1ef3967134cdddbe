"""Merging layer by layer with calibration rows: what RegMean and RegMean++ share.

One layer at a time: the experts' rows run through it, its linear layers are solved and handed out,
and only the rows' hidden states go on to the next. Beside these there are one layer of one model,
the parameters outside of the stacks, and the sums of one layer, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import EPMQInputError
from ..experts.passes.layer_walk import InputGram, InputGrams, LayerWalk
from ..experts.passes.skeleton import LayerStack, Skeleton, weight_of
from .inputs import Inputs
from .method import MergeMethod, Stack
from .regmean import RegMean, Regression

if TYPE_CHECKING:
    from ..calibration.batches import CalibrationPlan


def check_calibration(method: MergeMethod, calibration: Any) -> None:
    """Refuse a method without the calibration it needs, or calibration that it would not use.

    Raises:
        EPMQInputError: that.
    """
    if method.needs_calibration == (calibration is not None):
        return
    rule = "be given" if method.needs_calibration else "be left out"
    why = "runs every expert's rows" if method.needs_calibration else "looks at weights only"
    remedy = (
        "Give every expert rows of its own task: `calibration={'math': rows, ...}`, or "
        "`--calibration math=math.jsonl` on a shell."
        if method.needs_calibration
        else "Leave it out, or choose a method that takes it, such as `regmean`."
    )
    raise EPMQInputError(
        f"`calibration` should {rule}: `{method.name}` {why}.",
        code="EPMQ-O03",
        subject="`calibration`",
        remedy=remedy,
    )


def read_plan(
    inputs: Inputs, calibration: Any, *, batch_size: int, seed: int, base_folder: Path
) -> CalibrationPlan:
    """The rows of every expert as batches for the models of ``inputs``.

    Raises:
        EPMQInputError: the experts' names differ, or as of ``plan_for_folder``.
    """
    from ..calibration.batches import CalibrationPlan, plan_for_folder

    experts = list(inputs.experts)
    if not isinstance(calibration, CalibrationPlan):
        _check_rows(calibration)
        return plan_for_folder(
            inputs.reference.path,
            calibration,
            experts,
            batch_size=batch_size,
            seed=seed,
            base_folder=base_folder,
        )
    if set(calibration.experts) != set(experts):
        raise EPMQInputError(
            f"`calibration` should have batches of exactly the experts {sorted(experts)}, got "
            f"those of {sorted(set(calibration.experts))}.",
            code="EPMQ-F21",
            subject="`calibration`",
            remedy="Name the experts alike in both.",
        )
    return calibration


def _check_rows(calibration: Any) -> None:
    """Quantization can do without the rows of an expert; a regression on its inputs cannot."""
    from ..calibration.sources import TaggedSource, is_data_free

    if isinstance(calibration, TaggedSource):
        free = list(calibration.data_free)
    elif isinstance(calibration, Mapping):
        free = [str(name) for name, value in calibration.items() if is_data_free(value)]
    else:
        free = []
    if free:
        raise EPMQInputError(
            f"`calibration` of expert `{free[0]}` is `data_free`, and a merge method that takes "
            "calibration needs rows of every expert.",
            code="EPMQ-F22",
            subject=f"expert `{free[0]}`",
            remedy="Give it rows of its own task, or merge with a method that takes none.",
        )


class RegressionMerge:
    """The linear layers of one merge; everything else is left to :meth:`RegMean.merge`.

    Args:
        method: RegMean or RegMean++.
        inputs: the models.
        plan: the batches.
        names: of the tensors that are merged, not copied.
        device: where the models and the arithmetic run.

    Attributes:
        steps: how often ``tick`` of :meth:`tensors` will be called.
        linears: how many weights were handed out so far.

    Raises:
        EPMQInputError: the layers of these models cannot be found or run, see :class:`Skeleton`;
            some rows reach a part of the model that others do not.
    """

    def __init__(
        self,
        method: RegMean,
        inputs: Inputs,
        plan: CalibrationPlan,
        names: Sequence[str],
        device: torch.device,
    ):
        self._method = method
        self._inputs = inputs
        self._plan = plan
        self._names = set(names)
        self._device = device
        self._skeleton = Skeleton(inputs.reference, device)
        self._stacks = [s for s in self._skeleton.stacks if self._is_reached(s)]
        if not self._stacks:
            raise EPMQInputError(
                "`calibration`: no row is an input of the layers of "
                f"{type(self._skeleton.model).__name__}.",
                code="EPMQ-F32",
                subject="`calibration`",
                remedy="Give rows in the form that the models read.",
            )
        self.steps = len(inputs.experts) * sum(len(s.layers) for s in self._stacks)
        self.linears = 0

    def _is_reached(self, stack: LayerStack) -> bool:
        wanted = [key for key in stack.inputs if not key.endswith("mask")]
        without = [
            expert
            for expert, batch in zip(self._plan.experts, self._plan.batches, strict=True)
            if any(key not in batch for key in wanted)
        ]
        if without and len(without) < len(self._plan.batches):
            raise EPMQInputError(
                f"`calibration`: rows of {', '.join(f'`{e}`' for e in dict.fromkeys(without))} "
                f"lack {', '.join(f'`{key}`' for key in wanted)}, which others have: "
                f"`{stack.path}` would be merged from some of the rows only.",
                code="EPMQ-F22",
                subject="`calibration`",
                remedy="Give all rows the same parts.",
            )
        return not without

    def about(self) -> dict[str, Any]:
        """What the record says of the calibration and of what came of it."""
        rows = {name: self._plan.rows.get(name) for name in self._inputs.experts}
        return {
            "inputs": "merged prefix" if self._method.merged_prefix else "expert",
            "rows": rows,
            "tokens": {name: self._plan.tokens.get(name) for name in rows},
            "layers": [stack.path for stack in self._stacks],
            "linears": self.linears,
        }

    # ---- layer by layer ------------------------------------------------------------------------

    def tensors(self, tick: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
        """Name and merged tensor of every linear layer's weight, in its stored dtype and shape.

        Raises:
            EPMQNumericalError: weights or activations that are not finite, or Grams that do not
                determine the weights.
        """
        walk = LayerWalk(self._plan.batches, self._device)
        for position, stack in enumerate(self._stacks):
            for index in range(len(stack.layers)):
                is_last = index + 1 == len(stack.layers)
                goes_on = not is_last or (stack.is_read and position + 1 < len(self._stacks))
                merged = self._layer(walk, stack, index, goes_on, tick)
                self.linears += len(merged)
                yield from merged.items()
            walk.leave(stack)

    @torch.no_grad()
    def _layer(
        self,
        walk: LayerWalk,
        stack: LayerStack,
        index: int,
        goes_on: bool,
        tick: Callable[[str], None],
    ) -> dict[str, Tensor]:
        own = self._skeleton.within(stack.name(index))
        merged = self._solved(self._regressions(walk, stack, index, goes_on, tick), stack, index)
        if self._method.merged_prefix and goes_on:
            self._skeleton.fill(own, lambda n: merged[n] if n in merged else self._averaged(n))
            with walk.at(self._stacks, stack, index) as run:
                for batch in range(len(self._plan.batches)):
                    walk.keep(stack, batch, run(batch))
        self._skeleton.empty(own)
        return merged

    def _regressions(
        self,
        walk: LayerWalk,
        stack: LayerStack,
        index: int,
        goes_on: bool,
        tick: Callable[[str], None],
    ) -> list[Regression]:
        """The sums over all experts of one layer."""
        linears = self._linears(stack, index)
        means = {name: self._mean(name, stack, index) for name in linears}
        found: dict[tuple[str, ...], Regression] = {}
        for expert in self._inputs.experts:
            self._fill(expert, stack, index)
            for one in self._grams(walk, stack, index, goes_on, expert):
                layers = tuple(name for name in one.layers if name in linears)
                if not layers or not one.tokens:
                    continue
                if layers not in found:
                    shared = {name: means.pop(name) for name in layers if name in means}
                    if len(shared) < len(layers):
                        raise _unlike(layers[0], expert)
                    gamma = self._method.reduce_non_diagonal_ratio
                    found[layers] = Regression(shared, gamma)
                found[layers].add(
                    one.gram, one.tokens, {name: weight_of(linears[name]) for name in layers}
                )
            tick(f"{stack.name(index)} of expert `{expert}`")
        return list(found.values())

    def _grams(
        self, walk: LayerWalk, stack: LayerStack, index: int, goes_on: bool, expert: str
    ) -> list[InputGram]:
        """Run an expert's rows through the layer as it is filled in."""
        with walk.at(self._stacks, stack, index) as run, InputGrams(stack, index) as grams:
            for number, owner in enumerate(self._plan.experts):
                if owner != expert:
                    continue
                grams.begin(self._plan.batches[number])
                output = run(number)
                grams.end()
                if goes_on and not self._method.merged_prefix:
                    walk.keep(stack, number, output)
        return grams.result(expert)

    def _solved(
        self, regressions: Sequence[Regression], stack: LayerStack, index: int
    ) -> dict[str, Tensor]:
        linears = stack.linears(index)
        merged: dict[str, Tensor] = {}
        for regression in regressions:
            for name, W in regression.solve().items():
                tensor = self._skeleton.tensor_name(f"{name}.weight")
                stored = W if isinstance(linears[name], torch.nn.Linear) else W.T
                dtype = self._inputs.stack_dtype(tensor)
                one = Stack(tensor, None, {"merged": stored.contiguous()}, dtype)
                merged[tensor] = one.map(lambda block: block.experts[0])
        return merged

    # ---- weights -------------------------------------------------------------------------------

    def _linears(self, stack: LayerStack, index: int) -> dict[str, torch.nn.Module]:
        """Those whose weights are merged; one that all models must share bit for bit is copied."""
        return {
            name: module
            for name, module in stack.linears(index).items()
            if self._skeleton.tensor_name(f"{name}.weight") in self._names
        }

    def _mean(self, name: str, stack: LayerStack, index: int) -> Tensor:
        """The mean of the experts' weights, (out, in), fp32."""
        models = self._inputs.stack(
            self._skeleton.tensor_name(f"{name}.weight"), False, self._device
        )
        models.check_finite()
        total = torch.zeros(models.shape, dtype=torch.float64, device=self._device)
        for weight in models.experts.values():
            total += weight.to(self._device)
        mean = (total / len(models.experts)).to(torch.float32)
        return mean if isinstance(stack.linears(index)[name], torch.nn.Linear) else mean.T

    def _averaged(self, tensor: str) -> Tensor:
        """A tensor as the merged model will have it."""
        if tensor not in self._names:
            return self._inputs.reference.read(tensor)
        models = self._inputs.stack(tensor, False, self._device)
        models.check_finite()
        return self._method.merge(models)

    def _fill(self, expert: str, stack: LayerStack, index: int) -> None:
        """Everything that the expert's rows meet in this layer, and outside of the stacks."""
        read = self._inputs.experts[expert][0].read
        if not self._method.merged_prefix:
            self._skeleton.fill(self._skeleton.outer(embeddings=index == 0), read)
        elif index == 0 and expert == next(iter(self._inputs.experts)):
            # The same for all experts and layers.
            self._skeleton.fill(self._skeleton.outer(embeddings=True), self._averaged)
        self._skeleton.fill(self._skeleton.within(stack.name(index)), read)


def _unlike(layer: str, expert: str) -> EPMQInputError:
    return EPMQInputError(
        f"layer `{layer}` does not share its input with the same layers in expert `{expert}` as in "
        "the others.",
        code="EPMQ-F38",
        subject=f"layer `{layer}`",
        remedy="Use a method that takes no calibration.",
    )
