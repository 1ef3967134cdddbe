"""One linear layer: GPTQModel's GPTQ, given W* as its weight and H_E as its Hessian.

``EPMQ.quantize`` is the host's own rounding; what is added is that nothing goes wrong quietly.
"""

from __future__ import annotations

import time
import types

import torch
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.config import FallbackStrategy
from gptqmodel.quantization.gptq import GPTQ
from gptqmodel.quantization.quantizer import Quantizer

from ..errors import EPMQNumericalError
from ..experts.experts import check_finite
from ..experts.linears import is_transposed
from ..kernels.factor import inverse_factor
from ..method.expert_error import Watch
from ..method.solve import BiasAim, Guard, Solution
from ..method.target import gain
from ..run_report import ModuleReport


class EPMQ(GPTQ):
    """One linear layer: the host's GPTQ, rounding W* with curvature H_E.

    It counts nothing itself; :class:`EPMQProcessor` hands it the statistics of its input.
    """

    def __init__(self, module: NamedModule, qcfg, region_timer=None):
        super().__init__(module=module, qcfg=qcfg, region_timer=region_timer)
        self.full_name: str = module.full_name
        # On the instance, for of a subclass the host would not use its CUDA kernel.
        self.quantizer.find_params = types.MethodType(_find_params, self.quantizer)
        self.alpha: float | str = qcfg.alpha_for(module.full_name)
        self.refits_bias: bool = qcfg.bias_refit and getattr(self.module, "bias", None) is not None
        # The host's fallback rounds W_m to nearest and says so in a log line at most. What cannot
        # be done as asked is decided here, by `on_bad_module`.
        self.routed_threshold = qcfg.fallback
        self.fallback = None
        self.bad: EPMQNumericalError | None = None  # why this layer cannot be rounded as asked
        self.failure: EPMQNumericalError | None = None  # why the run must stop
        self.report: ModuleReport | None = None
        self._bias: BiasAim | None = None
        self._guard: Guard | None = None
        self._watch: Watch | None = None
        self._device = torch.device(self.module.weight.device)  # of the sums over its inputs

    def merged_weight(self, device: torch.device) -> torch.Tensor:
        """``W_m: (out, in)`` fp32 on ``device``, a copy."""
        return self.clone_module(device=device)

    def expect(self, tokens: dict[str, int]) -> None:
        """Start the report of this layer, which so many calibration tokens per expert reached."""
        self.report = ModuleReport(
            module=self.full_name,
            bits=int(self.qcfg.bits),
            group_size=int(self.qcfg.group_size),
            alpha=None if isinstance(self.alpha, str) else self.alpha,
            target="experts",
            lam=0.0,
            tokens=dict(tokens),
            loss=None,
            excess=None,
            merge_excess=0.0,
            seconds=0.0,
        )

    def aim(self, solution: Solution, tokens: int) -> None:
        """Round towards a solution, which so many calibration tokens led to."""
        self.say(solution)
        self.report.merge_excess = solution.merge_excess
        self._bias, self._guard = solution.bias, solution.guard
        self._round_next(solution.W, solution.H_E, tokens)

    def say(self, solution: Solution) -> None:
        """What the report has of a solution, solvable or not."""
        report = self.report
        report.weights = solution.weights or report.weights
        report.held_out = solution.held_out or report.held_out
        if solution.H_E is not None:
            report.lam, report.alpha = solution.lam, solution.alpha
        if solution.merged:
            report.target, report.reason = "merged", solution.reason

    def _round_next(self, W: torch.Tensor, H_E: torch.Tensor, tokens: int) -> None:
        # The host normalises its Hessian by 2/n and reports a loss per token.
        self.H, self.module_copy = H_E * (2.0 / tokens), W
        self._device = W.device
        self.nsamples = tokens
        self._hessian_dirty = False

    def watch(self, watch: Watch, W_target: torch.Tensor) -> None:
        """Report how far the outputs lie from every expert's, now and once this is rounded."""
        self.report.experts = watch.start(W_target)
        self._watch = watch if self.report.experts else None

    def _bias_shift(self, Q: torch.Tensor) -> torch.Tensor | None:
        """b − b_m for the rounded weight, or None where the bias stays."""
        if self._bias is None:
            return None
        aim = self._bias
        return (aim.outputs - self._matrix(Q) @ aim.inputs) / aim.count

    def _matrix(self, Q: torch.Tensor) -> torch.Tensor:
        """A weight as the host returns it, as ``(out, d)`` fp32 where the sums of its inputs are;
        the host may have moved the layer to another device since."""
        Q = Q.T if is_transposed(self.module) else Q
        return Q.to(self._device, torch.float32)

    def _refit_bias(self, shift: torch.Tensor | None) -> None:
        if shift is None:
            return
        bias = self.module.bias
        before = bias.detach().to(shift)
        moved = before + shift
        # Stored in half precision, as scales are.
        check_finite(moved.to(torch.float16), f"`{self.full_name}`: bias", module=self.full_name)
        bias.data = moved.to(bias)
        self.report.bias_shift = float(shift.norm())

    def hessian_inverse(self, H: torch.Tensor):
        """The factor that the host rounds with, and the damping that was added to H: none.

        Half the work of the host's, and without its silent repairs of the diagonal.

        Raises:
            EPMQNumericalError: ``H`` is not positive definite as it stands.
        """
        factor = inverse_factor(H)
        if factor is None:
            raise self.not_positive_definite()
        return factor, self.qcfg.damp_percent

    def not_positive_definite(self) -> EPMQNumericalError:
        """The error for a curvature that cannot be factorised as it stands."""
        return EPMQNumericalError(
            f"`{self.full_name}`: the curvature H + λI is not positive definite in fp32 at alpha="
            f"{self.alpha if self.report.alpha is None else self.report.alpha}.",
            module=self.full_name,
            code="EPMQ-F30",
            subject=f"module `{self.full_name}`",
            remedy="Raise `alpha` (for this layer: `alpha_pattern`) or give more calibration rows.",
        )

    def fault(self, solution: Solution, tokens: int) -> EPMQNumericalError:
        """The error for a solution with a ``fault``, from so many calibration tokens."""
        if solution.fault == "indefinite":
            return self.not_positive_definite()
        if solution.fault == "not finite":
            try:
                check_finite(solution.W, f"`{self.full_name}`: target W*", module=self.full_name)
            except EPMQNumericalError as error:
                return error
        cause, code, remedy = {
            "no input": (
                f"every input is zero over {tokens} calibration tokens.",
                "EPMQ-F31",
                "Check the merged weights before it (a norm of zeros?), or leave the layer out "
                "with `dynamic`.",
            ),
            "rank": (
                f"alpha = 0 leaves the objective singular: the Gram has rank {solution.rank} of "
                f"{self.columns} (from {tokens} tokens).",
                "EPMQ-F29",
                "Set `alpha` above 0 or give more varied calibration rows.",
            ),
        }[solution.fault]
        return EPMQNumericalError(
            f"`{self.full_name}`: {cause}",
            module=self.full_name,
            code=code,
            subject=f"module `{self.full_name}`",
            remedy=remedy,
        )

    @torch.inference_mode()
    def quantize(self, blocksize=128):
        """Round as the host does; returns the host's eight values.

        Never raises for bad numbers: it runs on one of the host's worker threads, where an
        exception ends the whole process. What went wrong is left in ``failure``, or under
        ``on_bad_module="rtn"`` in ``report``.
        """
        start = time.perf_counter()
        result = self._quantized(blocksize)
        self.report.rounded = self._matrix(result[0])[[0, -1]].half().cpu()
        self.report.seconds += time.perf_counter() - start
        return result

    def _quantized(self, blocksize: int):
        if self.bad is None:
            try:
                return self._round(blocksize)
            except EPMQNumericalError as error:
                self.bad = error
        # Under "raise" too: it lets the host finish the layer until its main thread stops.
        result = self._round_to_nearest(blocksize)
        self.report.target, self.report.reason = "rtn", str(self.bad)
        if self.qcfg.on_bad_module == "raise":
            self.failure = self.bad
        self._finish_watch(result[0], None)
        return result

    def _round(self, blocksize: int):
        result = self._guarded(self._rounded(blocksize), blocksize)
        shift = self._bias_shift(result[0])
        self._finish_watch(result[0], shift)
        self._refit_bias(shift)
        self._bias = self._guard = None
        return result

    def _finish_watch(self, Q: torch.Tensor, shift: torch.Tensor | None) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.finish(self._matrix(Q), shift, self.report.experts)

    def _rounded(self, blocksize: int):
        """Round what is aimed at, and say in the report how well it went."""
        tokens = self.nsamples
        try:
            result = super().quantize(blocksize=blocksize)
        except ValueError as error:
            # With no fallback the host raises at a loss that is not a number.
            raise EPMQNumericalError(
                f"`{self.full_name}`: rounding gave a loss that is not a number "
                f"({str(error).rstrip('.')}).",
                module=self.full_name,
                code="EPMQ-N01",
                subject=f"module `{self.full_name}`",
                remedy="Raise `alpha`, or leave the layer out with `dynamic`.",
            ) from error
        Q, scale, _, _, _, loss, _, _ = result
        self._check_scales(scale)
        check_finite(Q, f"`{self.full_name}`: rounded weight", module=self.full_name)
        # Σ Losses is ½ tr[(Q − W*) (2/n) H_E (Q − W*)ᵀ], and the host divides it by n once more.
        self.report.loss = float(loss)
        self.report.excess = float(loss) * tokens * tokens
        return result

    def _guarded(self, result: tuple, blocksize: int) -> tuple:
        """``result``, or the rounded merge where that is better on the held-out rows."""
        if self._guard is None:
            return result
        guard = self._guard
        ours = self._gain(result[0], self._bias_shift(result[0]), guard)
        self.report.held_out_gain = ours
        if ours >= 0:  # better than even the merge that is not rounded
            return result
        numbers = self.report.loss, self.report.excess
        # Of a copy, for the host works on what it is given.
        self._round_next(guard.W_m.clone(), guard.H_E, self.nsamples)
        plain = self._rounded(blocksize)
        theirs = self._gain(plain[0], None, guard)
        if theirs <= ours:
            self.report.loss, self.report.excess = numbers
            return result
        self.report.held_out_gain, self._bias = theirs, None
        self.report.target = "merged"
        self.report.reason = "rounded, its target was worse on the held-out rows"
        return plain

    def _gain(self, Q: torch.Tensor, shift: torch.Tensor | None, guard: Guard) -> float:
        """Of a rounded weight over the merge, on the held-out rows."""
        return gain(self._matrix(Q) - guard.W_m, shift, guard.held_out)

    def _round_to_nearest(self, blocksize: int):
        self.H = None
        self.module_copy = None
        device = torch.device(self.module.weight.device)
        result = self._fallback_quantize(FallbackStrategy.RTN, blocksize, target_device=device)
        try:
            self._check_scales(result[1])
        except EPMQNumericalError as error:
            self.failure = error
        return result

    def _check_scales(self, scale: torch.Tensor) -> None:
        # Scales are stored in half precision: what overflows there is lost on disk.
        half = scale.to(torch.float16)
        check_finite(half, f"`{self.full_name}`: scales", module=self.full_name)
        zeros = int((half == 0).sum())
        if zeros:
            raise EPMQNumericalError(
                f"`{self.full_name}`: {zeros} scales are 0 in half precision.",
                module=self.full_name,
                code="EPMQ-N01",
                subject=f"module `{self.full_name}`",
                remedy="Its weights are next to nothing: leave the layer out with `dynamic`.",
            )


def _find_params(quantizer: Quantizer, x: torch.Tensor, weight: bool = False) -> None:
    """The host's choice of a scale and a zero, where both survive half precision.

    It gives a group of zeros the range −1 to 1. One of weights so small that their scale is 0 on
    disk, or at once (0 / 0 then makes NaN of them), gets the same: they are rounded to 0.
    """
    Quantizer.find_params(quantizer, x, weight=weight)
    lost = quantizer.scale.to(torch.float16) == 0
    quantizer.scale = quantizer.scale.masked_fill(lost, 1.0)
    if not quantizer.qcfg.sym:
        quantizer.zero = quantizer.zero.masked_fill(lost, 0.0)
