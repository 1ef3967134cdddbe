"""Models of strangers that would run code, lead out of their folder or tell secrets."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub import small_model
from typer.testing import CliRunner

from epmq_gptq import EPMQConfig, EPMQInputError, cli
from epmq_gptq.io.checkpoints import check_folder, resolve_source

HERE = Path(__file__).parent
TOKEN = "hf_CanaryThatNobodyMaySee0123456789"
PRIVATE = "canary-of-a-private-place"
MODELS = ("merged", "expert0", "expert1")
RECIPE = {
    "merged": "merged",
    "experts": {"math": "expert0", "code": "expert1"},
    "calibration": {"math": "math.jsonl", "code": "code.jsonl"},
    "quantize": {"group_size": 32, "alpha": 0.1, "save_statistics": True},
}


class Marks:
    """What leaves a file if it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    small = tiny.llama(layers=1, hidden=32, num_attention_heads=2, num_key_value_heads=1)
    tiny.family(folder, experts=2, model=small)
    return folder


@pytest.fixture
def bench(family, tmp_path) -> Path:
    """A copy of the family with rows and a recipe."""
    folder = tmp_path / PRIVATE
    shutil.copytree(family, folder)
    for name in ("math", "code"):
        rows = [json.dumps({"text": f"{name} {i} is {i * i} and so on"}) for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


def changed(file: Path, **values) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def trap(folder: Path, mark: Path) -> None:
    """Put everything into a model's folder that some loader would run."""
    leaves = f"import os\nos.makedirs({str(mark / 'code')!r}, exist_ok=True)\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(leaves + "class Evil: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(leaves + "def generate(**k): pass\n")
    names = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    changed(folder / "config.json", auto_map=names)
    tokenizer = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    changed(folder / "tokenizer_config.json", auto_map=tokenizer)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth"):
        (folder / name).write_bytes(pickle.dumps(Marks(mark / "pickle")))


def watched(bench: Path, *commands: list[str]) -> tuple[dict, str]:
    """Run commands of the CLI in a process of their own; what was seen, and what was printed."""
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}",
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN,
    }
    report = bench.parent / "seen.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "security_child.py"), str(report)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=bench,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text()), done.stdout + done.stderr


RUNS = [
    ["quantize", "recipe.json", "--out", "out", "--json", "run.json", "--profile", "profile.json"],
    ["check", "out"],
    ["report", "out"],
    ["inspect", "recipe.json", "--verify", "full"],
    ["merge", "--method", "average", "--expert", "a=expert0", "--expert", "b=expert1"]
    + ["--out", "average"],
    ["card", "out", "--overwrite"],
    # And what fails: errors are printed, too.
    ["quantize", "recipe.json", "--out", "out"],
    ["quantize", "recipe.json", "--out", "merged/in"],
    ["check", "expert0"],
]


@pytest.mark.fault(
    "F14",
    injected="Pickles that would make a folder, beside the safetensors of the merged model and of "
    "every expert, during quantize, check, report, inspect, merge and card",
    outcome="None is opened: no audit event `open` for them, none `pickle.find_class`, no call of "
    "`torch.load`.",
)
@pytest.mark.fault(
    "F57",
    injected="`auto_map` in config.json and tokenizer_config.json with modules that would leave a "
    "mark, and `custom_generate/generate.py`, in the merged model and every expert",
    outcome="Nothing of it is opened or run; the checkpoint names no code.",
)
@pytest.mark.fault(
    "P01",
    injected="An access token in the environment and models in a private place, during the same "
    "commands and some that fail",
    outcome="Neither is in any file that was written, nor printed.",
)
def test_nothing_of_a_stranger_runs_and_nothing_private_is_told(bench):
    mark = bench.parent / "marks"
    mark.mkdir()
    for name in MODELS:
        trap(bench / name, mark)
    before = {path for path in bench.rglob("*")}
    seen, printed = watched(bench, *RUNS)
    assert seen["exits"] == [0, 0, 0, 0, 0, 0, 2, 2, 2], printed
    assert list(mark.iterdir()) == []
    assert seen["opened"] == [] and seen["pickle"] == []

    assert PRIVATE not in printed and TOKEN not in printed
    written = [path for path in bench.rglob("*") if path not in before and path.is_file()]
    assert len(written) > 15
    for path in written:
        content = path.read_bytes()
        assert PRIVATE.encode() not in content and TOKEN.encode() not in content, path
    assert not list((bench / "out").rglob("*.py")) and not list((bench / "out").rglob("*.bin"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (bench / "out" / name).read_text()
    # The traps are real.
    pickle.loads((bench / "merged" / "pytorch_model.bin").read_bytes())
    assert [path.name for path in mark.iterdir()] == ["pickle"]


@pytest.mark.fault(
    "F57",
    injected="`attn_implementation`, `_attn_implementation_internal` or `experts_implementation` "
    "of config.json, also of a nested configuration, naming a kernel of the hub",
    outcome="Refused (`EPMQ-F57`) before the host opens the folder, in the CLI and in Python.",
)
@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@v1:f"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
        {"text_config": {"_attn_implementation": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_kernel_of_the_hub(bench, change):
    changed(bench / "merged" / "config.json", **change)
    done = CliRunner().invoke(
        cli.app, ["quantize", str(bench / "recipe.json"), "--out", str(bench / "out")]
    )
    assert done.exit_code == 2 and "[EPMQ-F57]" in done.stderr and "evil/kernel" in done.stderr
    with pytest.raises(EPMQInputError) as caught:
        tiny.load(bench / "merged", EPMQConfig(experts={"math": bench / "expert0"}))
    assert caught.value.code == "EPMQ-F57"
    assert not (bench / "out").exists()


def test_kernels_of_transformers_itself_are_left_to_it(bench):
    changed(bench / "merged" / "config.json", attn_implementation="sdpa")
    check_folder(bench / "merged", what="the merged model")


test_kernels_of_transformers_itself_are_left_to_it = pytest.mark.fault(
    "F57",
    injected="`attn_implementation: sdpa`",
    outcome="Accepted: it names nothing outside of transformers.",
)(test_kernels_of_transformers_itself_are_left_to_it)


@pytest.mark.fault(
    "F10",
    injected="In the merged model and in an expert: an index with `../`, an absolute path or a "
    "subfolder, and a symbolic link out of the folder in the place of a shard, of config.json or "
    "of the tokenizer, each leading to a valid file",
    outcome="Refused; the file outside is not opened.",
)
@pytest.mark.parametrize("where", ["merged", "expert0"])
@pytest.mark.parametrize("way", ["..", "absolute", "subfolder", "link", "config", "tokenizer"])
def test_ways_out_of_a_folder(bench, where, way):
    folder = bench / where
    outside = bench / "outside"
    outside.mkdir()
    file = {"config": "config.json", "tokenizer": "tokenizer.json"}.get(way, "model.safetensors")
    if where != "merged" and way == "tokenizer":
        pytest.skip("an expert's tokenizer is only compared")
    (folder / file).rename(outside / file)
    if way in ("link", "config", "tokenizer"):
        os.symlink(outside / file, folder / file)
    else:
        names = {"..": "../outside/", "absolute": f"{outside}/", "subfolder": "in/"}[way]
        if way == "subfolder":
            outside.rename(folder / "in")
        tensors = tiny.llama(layers=1, hidden=32, num_attention_heads=2, num_key_value_heads=1)
        index = {"weight_map": dict.fromkeys(tensors.state_dict(), names + file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = []
    monitor = opened.append
    _monitors.append(monitor)
    try:
        done = CliRunner().invoke(
            cli.app, ["quantize", str(bench / "recipe.json"), "--out", str(bench / "out")]
        )
    finally:
        _monitors.remove(monitor)
    assert done.exit_code == 2 and "[EPMQ-F10]" in done.stderr, done.output
    assert not any("outside" in os.fspath(path) or "/in/" in os.fspath(path) for path in opened)


_monitors: list = []


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str):
        for monitor in _monitors:
            monitor(arguments[0])


sys.addaudithook(_watch)


@pytest.mark.fault(
    "F16",
    injected="A repository of a hub (on localhost) with code, pickles, archives and other "
    "formats beside the weights",
    outcome="Only configuration, tokenizer and safetensors files are fetched.",
)
def test_what_is_fetched_of_a_hub(hub, tmp_path):
    folder = small_model(tmp_path / "model")
    for name in (
        *("modeling_evil.py", "pytorch_model.bin", "rng_state.pth", "weights.zip", "a.npz", "x.sh"),
        *("custom_generate/generate.py", "code/x.json", "consolidated.safetensors"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    hub.add("org/model", folder)
    source = resolve_source("org/model", what="an expert")
    fetched = {path.name for path in source.path.rglob("*") if not path.is_dir()}
    assert fetched == {"config.json", "model.safetensors"}
    assert {name.rpartition("/")[2] for name in hub.downloaded()} <= fetched | {"README.md"}
