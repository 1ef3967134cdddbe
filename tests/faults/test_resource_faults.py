"""Memory that runs out, folders that cannot be written, paths with odd characters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from gptqmodel.quantization.gptq import GPTQ
from judge import stored

from epmq_gptq import EPMQConfig, EPMQDeviceError
from epmq_gptq.checks import check
from epmq_gptq.errors import EPMQWarning
from epmq_gptq.experts.passes.trajectories import ExpertTrajectories
from epmq_gptq.host import loop as layer_loop
from epmq_gptq.host import solver
from epmq_gptq.kernels.gram import gram_update, mirror_
from epmq_gptq.kernels.product import cross_update, product_update
from epmq_gptq.method.chunks import device_error, is_out_of_memory
from epmq_gptq.method.deltas import WeightDelta
from epmq_gptq.method.statistics import GroupStatistics

TESTS = Path(__file__).parents[1]


def full() -> torch.OutOfMemoryError:
    """What torch raises where a GPU has no room."""
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB "
        "of which 1.12 GiB is free."
    )


# ---- products of fewer rows ----------------------------------------------------------------------


@pytest.fixture
def room_for(monkeypatch):
    """``room_for(rows)``: in-place products of more rows find no memory from then on."""
    addmm_ = torch.Tensor.addmm_
    refused = []

    def limit(rows, *, after=0):
        def limited(self, A, B, **factors):
            if A.shape[1] > rows and len(refused) >= after:
                refused.append(A.shape[1])
                raise full()
            if after:
                refused.append(0)
            return addmm_(self, A, B, **factors)

        monkeypatch.setattr(torch.Tensor, "addmm_", limited)
        return refused

    return limit


@pytest.mark.fault(
    "F46",
    injected="in-place products of more than 1000, 100 and 16 rows raise "
    "`torch.OutOfMemoryError`, from the first and from the fourth product on (a stand-in for the "
    "allocator of a GPU: these tests run on CPUs)",
    outcome="halves of the rows: every row is counted once, within fp32's rounding",
)
@pytest.mark.parametrize("rows", [1000, 100, 16])
@pytest.mark.parametrize("after", [0, 3])
def test_products_in_parts_count_every_row_once(room_for, rows, after):
    """Also where a later block of the triangle is the first that finds no room."""
    X, Y, A = (torch.randn(3000, 300, dtype=torch.float64) for _ in range(3))
    refused = room_for(rows, after=after)
    H, C, D = (torch.ones(300, 300) for _ in range(3))
    gram_update(H, X.float())
    cross_update(C, Y.float(), X.float())
    product_update(D, A.t().float(), X.float(), 0.5)
    WeightDelta(None, (Y[:, :8].float()[:300], A[:8].float())).add_product_(D, X[:300].float())
    assert any(refused)
    low_rank = Y[:300, :8] @ A[:8] @ X[:300]
    for found, expected in ((mirror_(H), X.T @ X), (C, Y.T @ X), (D, A.T @ X / 2 + low_rank)):
        torch.testing.assert_close(found.double(), expected + 1, rtol=0, atol=2e-2)


# ---- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    merged, experts = tiny.family(folder, experts=2)
    rows = {name: tiny.rows(3, 60, seed=index) for index, name in enumerate(experts)}
    plain = run(merged, experts, rows)
    plain.save(str(folder / "plain"))
    return merged, experts, rows, stored(folder / "plain"), plain.epmq_report


def run(merged, experts, rows):
    model = tiny.load(
        merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1, eta=0.5, rho=0.5)
    )
    model.quantize(rows, batch_size=2)
    return model


@pytest.mark.fault(
    "F46",
    injected="products of more than 20 rows never find memory in a whole run (planted)",
    outcome="halves of the rows: the run succeeds, its figures for the first layers are those "
    "without the fault to four digits",
)
def test_a_run_with_little_room_for_products(family, room_for):
    merged, experts, rows, _, report = family
    refused = room_for(20)
    found = run(merged, experts, rows).epmq_report
    assert refused
    for index, (mine, theirs) in enumerate(zip(found.modules, report.modules, strict=True)):
        # A code that is rounded the other way moves the inputs of what comes after it.
        allowed = 1e-4 if index < 3 else 0.02
        assert mine.merge_excess == pytest.approx(theirs.merge_excess, rel=allowed)
        assert mine.tokens == theirs.tokens


FOR_GOOD = {
    "counting its inputs": (GroupStatistics, "_put_on_stage"),
    "its target": (solver, "solve"),
    "rounding it": (GPTQ, "quantize"),
    "an expert's own pass": (ExpertTrajectories, "_run_batch"),
}


@pytest.mark.fault(
    "F46",
    injected="one of counting, solving, rounding and an expert's pass never finds memory (planted)",
    outcome="error EPMQ-F46 with the layer, the bytes asked for, free, in all and at the peak, and "
    "the knobs `batch_size` and EPMQ_CHUNK_ROWS",
)
@pytest.mark.parametrize("doing", FOR_GOOD)
def test_memory_that_ran_out_for_good(family, monkeypatch, doing):
    def step(*arguments, **options):
        raise full()

    monkeypatch.setattr(*FOR_GOOD[doing], step)
    numbers = r"2.50 GiB were asked for, \d+.\d+ GiB of \d+.\d+ GiB can be had, .*at its peak"
    with pytest.raises(EPMQDeviceError, match=rf"layers\.0.*`: {doing}: .*{numbers}") as caught:
        run(*family[:3])
    assert caught.value.code == "EPMQ-F46"
    assert "`batch_size`" in caught.value.remedy and "EPMQ_CHUNK_ROWS" in caught.value.remedy


@pytest.mark.fault(
    "F46",
    injected="the words of CUDA, ROCm and torch's allocator for the CPU (the last a real one)",
    outcome="all are known as lack of memory, other errors are not",
)
def test_what_counts_as_lack_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(full())
    assert is_out_of_memory(RuntimeError("HIP out of memory"))
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(device_error(full(), "it", "cpu"))


@pytest.mark.fault(
    "F46",
    injected="a machine that is said to have 1 MiB left, before a run",
    outcome="warning EPMQ-F46 with the estimated peak and what can be had",
)
def test_a_run_that_will_not_fit_is_warned_of(family, monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda device: (1 << 20, 1 << 40))
    monkeypatch.setattr(check, "held_memory", lambda gpu: 0)
    with pytest.warns(EPMQWarning, match=r"estimated to hold .*B at its peak, and 1.0 MB can"):
        run(*family[:3])


# ---- child processes -----------------------------------------------------------------------------

CHILD = """
import json, os, resource, sys, warnings
sys.path.insert(0, {tests!r})
import tiny, torch
torch.set_num_threads(1)
from epmq_gptq import EPMQConfig, EPMQError
given = json.loads(sys.argv[1])
merged, experts = given["merged"], given["experts"]
rows = {{name: tiny.rows(given["rows"], given["length"], seed=0) for name in experts}}
def run(batch_size):
    model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts, alpha=0.1,
        dynamic=given["dynamic"]))
    if given["limit_at"] == "quantize":
        given["limit_at"] = ""
        limit()
    model.quantize(rows, batch_size=batch_size)
    model.save(given["out"])
def limit(*_):
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + given["limit"], resource.RLIM_INFINITY))
def limit_at_first(module, arguments):
    if type(module).__name__ == given["limit_at"]:
        hook.remove()
        limit()
if given["limit_at"] not in ("", "quantize"):
    hook = torch.nn.modules.module.register_module_forward_pre_hook(limit_at_first)
try:
    run(given["batch_size"])
except EPMQError as error:
    print("SAID", error.code, error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    run(1)
print("SAVED")
"""


def child(merged, experts, folder, *, env, cwd, **given):
    """Quantize in a process of its own and save as ``out`` in a folder; it must come to its end."""
    given = {
        "merged": str(merged),
        "experts": {name: str(path) for name, path in experts.items()},
        "out": str(folder / "out"),
        **{"rows": 2, "length": 40, "batch_size": 1, "dynamic": None, "limit": 0, "limit_at": ""},
    } | given
    command = [sys.executable, "-c", CHILD.format(tests=str(TESTS)), json.dumps(given)]
    env = {"PYTHONPATH": str(TESTS.parent), "PYTHONDONTWRITEBYTECODE": "1"} | env
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.rstrip().endswith("SAVED")
    return done


def environment(**changed):
    # With an arena for each thread, how much a limit of the address space leaves is chance.
    changed = {"MALLOC_ARENA_MAX": "1"} | changed
    kept = ("PATH", "HOME", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | changed


def with_limit(tmp_path, limit, batch_size):
    """A run of long rows through a wide MLP, with a limit from its first MLP on."""
    wide = {"intermediate_size": 20480, "max_position_embeddings": 2048}
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1, **wide))
    given = dict(rows=batch_size, length=768, batch_size=batch_size, limit=limit << 20)
    # What is written there is not counted: its Gram would be larger than all else.
    given |= dict(limit_at="LlamaMLP", dynamic={"-:.*down_proj": {}})
    return child(merged, experts, tmp_path, env=environment(), cwd=tmp_path, **given)


@pytest.mark.fault(
    "F46",
    injected="a child process with `RLIMIT_AS` 50 MiB above what it holds at its first MLP, which "
    "writes 60 MiB several times for each row, and batches of four: real failures of the allocator",
    outcome="error EPMQ-F46 with the numbers and the knobs; in the same process, with a smaller "
    "`batch_size`, the run succeeds",
)
def test_a_batch_that_does_not_fit(tmp_path):
    done = with_limit(tmp_path, 50, batch_size=4)
    assert "SAID EPMQ-F46" in done.stdout and "were asked for" in done.stdout
    assert "Lower `batch_size`" in done.stdout


@pytest.mark.fault(
    "F46",
    injected="a child process with `RLIMIT_AS` 500 MiB above what it holds, told to start 400 "
    "workers of 8 MiB: the system really refuses a thread",
    outcome="error EPMQ-F46 before anything is computed, with how many threads there are, the "
    "limits and GPTQMODEL_CPU_WORKERS; in the same process, without the limit, the run succeeds",
)
def test_no_further_thread(tmp_path):
    merged, experts = tiny.family(tmp_path, experts=1, model=tiny.llama(layers=1))
    env = environment(GPTQMODEL_CPU_WORKERS="400")
    limit = dict(limit=500 << 20, limit_at="quantize")
    done = child(merged, experts, tmp_path, env=env, cwd=tmp_path, **limit)
    assert "SAID EPMQ-F46 starting the workers: the system gives this process no" in done.stdout
    assert "GPTQMODEL_CPU_WORKERS" in done.stdout


@pytest.fixture
def read_only(tmp_path):
    """A folder that not even root may write to."""
    folder = tmp_path / "read only"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("neither may this user mount a file system, nor is it kept from writing")
    yield folder


@pytest.mark.fault(
    "F45",
    injected="a child process whose working directory is mounted read-only, and whose HOME is "
    "that too; models and output in a folder with spaces, quotes, `%`, `$`, an umlaut and "
    "a line break in its name",
    outcome="it quantizes and saves, and what it writes elsewhere goes into the system's temporary "
    "folder",
)
def test_odd_places(tmp_path, read_only):
    odd = tmp_path / 'Müller\'s "50 %s" $HOME {x}\nnext + line'
    odd.mkdir()
    merged, experts = tiny.family(odd, experts=1, model=tiny.llama(layers=1))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = environment(HOME=str(read_only), TMPDIR=str(temporary))
    child(merged, experts, odd, env=env, cwd=read_only)
    left = [one.name for one in temporary.iterdir()]
    assert all(name.startswith("torchinductor") for name in left), left  # a cache of torch's
    assert not list(read_only.iterdir())
    assert (odd / "out" / "model.safetensors").is_file()


@pytest.mark.fault(
    "F45",
    injected="a HOME mounted read-only, where GPTQModel would compile its kernels for a GPU",
    outcome="they are compiled in a private temporary folder, with one warning that names the "
    "environment variable; what that says already is left alone",
)
def test_kernels_are_compiled_elsewhere(read_only, monkeypatch, recwarn):
    monkeypatch.setenv("HOME", str(read_only))
    monkeypatch.delenv(layer_loop._BUILD_FOLDER, raising=False)
    for _ in range(2):
        layer_loop._find_build_folder()
    assert [w.message.code for w in recwarn if w.category is EPMQWarning] == ["EPMQ-F45"]
    folder = Path(os.environ[layer_loop._BUILD_FOLDER])
    assert folder.is_dir() and folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
