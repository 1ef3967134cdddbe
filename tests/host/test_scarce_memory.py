"""Memory that is short now and then, wherever a run asks for it: it ends as if all had fitted."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
import warnings

import pytest
import tiny
from little_room import full, unlike
from resume_runs import Run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epmq_gptq.experts.passes import row_pieces
from epmq_gptq.host import loop as layer_loop

# Operations between two failures, so that what is tried instead can succeed, as it would on a CPU.
APART = 1500
# Files whose tensors are on the CPU wherever the run is.
ON_CPU = {"checkpoints.py", "experts.py", "linears.py", "skeleton.py", "residual.py"}
# They write where there is something already.
IN_PLACE = {"add_", "mul_", "copy_", "sub_", "div_", "neg_", "clamp_", "square_"}


class Scarce(TorchDispatchMode):
    """Every hundredth operation within a layer, or of ours, finds no memory: a drawn one."""

    def __init__(self, seed: int):
        super().__init__()
        self.failures: list[str] = []
        self.enough = False
        self._chance = random.Random(seed)
        self._count, self._last = 0, -APART

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._count += 1
        if not self.enough and self._fails(func, args):
            self._last = self._count
            self.failures.append(str(func))
            raise full()
        return func(*args, **(kwargs or {}))

    def _fails(self, func, args) -> bool:
        if self._count - self._last <= APART or self._chance.random() > 0.01:
            return False
        if func.is_view or {"detach", "lift_fresh", *IN_PLACE} & {str(func).split(".")[1]}:
            return False
        if max((one.numel() for one in args if isinstance(one, Tensor)), default=0) < 400:
            return False
        frames = [frame.filename for frame in traceback.extract_stack()]
        ours = {os.path.basename(name) for name in frames if "epmq_gptq" in name}
        # What the host does by itself before the first layer (embeddings, masks) has no way out.
        within = any(name.endswith("row_pieces.py") for name in frames) or "processor.py" in ours
        return within and not ON_CPU & ours


@contextlib.contextmanager
def scarce_memory(seed: int):
    """Within: the layer loop of a run meets it, on its main thread."""
    loop, on_cpu = layer_loop._loop, row_pieces._tried_on_cpu
    mode = Scarce(seed)

    def scarcely(*arguments, **options):
        with mode:
            return loop(*arguments, **options)

    def enough(layer, call):
        mode.enough = True
        try:
            return call.tried()
        finally:
            mode.enough = False

    layer_loop._loop, row_pieces._tried_on_cpu = scarcely, enough
    try:
        yield mode
    finally:
        layer_loop._loop, row_pieces._tried_on_cpu = loop, on_cpu


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("scarce")
    merged, experts = tiny.family(folder, experts=2, model=tiny.llama(2))
    rows = {name: tiny.rows(10, 40, seed=index) for index, name in enumerate(experts)}
    return Run(folder, merged, experts, rows, alpha=0.1)


@pytest.mark.parametrize(
    "options", [{}, dict(save_statistics=True, weighting="minmax"), dict(profile="paper")], ids=str
)
def test_a_run_ends_as_if_there_were_enough(run, options):
    options = dict(resume=None, batch_size=10) | options
    whole = run.attempt(**options).epmq_report
    failures = 0
    for seed in range(4):
        with warnings.catch_warnings(), scarce_memory(seed) as scarce:
            warnings.simplefilter("ignore")
            report = run.attempt(**options).epmq_report
        failures += len(scarce.failures)
        assert unlike(report, whole) == [], (seed, scarce.failures)
        for mine, theirs in zip(report.modules, whole.modules, strict=True):
            for name, error in mine.experts.items():
                assert error.rows == theirs.experts[name].rows
    assert failures > 10
