"""Every fault of the inputs, by real means: its code, the object it names, and nothing left behind.

Each case damages a copy of a small family (a base, two experts, their merge, rows for both) and
runs `epmq-gptq quantize` on it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
import yaml
from lora import peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from epmq_gptq import cli

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


class Bench:
    """One copy of the family, with a recipe that works until something is damaged."""

    def __init__(self, folder: Path, family: Path):
        self.folder = folder
        shutil.copytree(family, folder, dirs_exist_ok=True)
        for name, word in (("math", "sum"), ("code", "def")):
            rows = [json.dumps({"text": f"{word} {i} is {i * i} and so on"}) for i in range(8)]
            (folder / f"{name}.jsonl").write_text("\n".join(rows))
        self.recipe = {
            "merged": "merged",
            "experts": {"math": "math", "code": "code"},
            "calibration": {"math": "math.jsonl", "code": "code.jsonl"},
            "quantize": {"group_size": 32, "alpha": 0.1},
            "batch_size": 4,
        }

    def path(self, model: str, file: str = WEIGHTS) -> Path:
        return self.folder / model / file

    def tensors(self, model: str, change: Callable[[dict], object]) -> None:
        tensors = load_file(self.path(model))
        change(tensors)
        save_file(tensors, self.path(model), metadata={"format": "pt"})

    def json(self, model: str, file: str, **changes) -> None:
        path = self.path(model, file)
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    def set(self, **options) -> None:
        self.recipe["quantize"] |= options

    def calibrate(self, **sources) -> None:
        self.recipe["calibration"] |= sources

    def index(self, model: str, weight_map: dict) -> None:
        self.path(model, INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def shard(self, model: str) -> dict[str, str]:
        """Split a model into two shards with an index; returns its weight map."""
        tensors = load_file(self.path(model))
        self.path(model).unlink()
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        parts = ({n: t for n, t in tensors.items() if (UP == n) == i} for i in (0, 1))
        for name, part in zip(names, parts, strict=True):
            save_file(part, self.path(model, name), metadata={"format": "pt"})
        weight_map = {n: names[n == UP] for n in tensors}
        self.index(model, weight_map)
        return weight_map

    def pickled(self, model: str) -> None:
        self.path(model).unlink()
        self.path(model, "pytorch_model.bin").write_bytes(b"\x80\x04would run on loading.")

    def run(self) -> Outcome:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        before = listing(self.folder)
        result = CliRunner().invoke(
            cli.app, ["quantize", str(self.folder / "recipe.yaml"), "--out", str(self.out)]
        )
        made = listing(self.folder) - before
        return Outcome(result.exit_code, result.output, result.stderr, made)

    @property
    def out(self) -> Path:
        return self.folder / "out"


class Outcome(NamedTuple):
    code: int
    output: str
    errors: str
    made: set[str]


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    base = tiny.llama(layers=2, hidden=32, num_attention_heads=2, num_key_value_heads=1)
    tiny.save(base, folder / "base")
    tiny.family(folder, experts=2, model=base)
    (folder / "expert0").rename(folder / "math")
    (folder / "expert1").rename(folder / "code")
    return folder


@pytest.fixture
def bench(family, tmp_path, monkeypatch) -> Bench:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return Bench(tmp_path / "bench", family)


def scratch_of(bench: Bench) -> set[str]:
    return listing(bench.folder.parent / "scratch")


# ---- the damages ---------------------------------------------------------------------------------


def lacks(tensors):
    del tensors[Q], tensors[UP]


def first(model, value):
    def damage(bench):
        bench.tensors(model, lambda t: t[Q].__setitem__((3, 5), value))

    return damage


def tensor(model, name, value):
    return lambda bench: bench.tensors(model, lambda t: t.__setitem__(name, value(t[name])))


def config(model, **changes):
    return lambda bench: bench.json(model, "config.json", **changes)


def index(model, change):
    """Shard a model, then damage its index: ``change(weight map) -> weight map``."""
    return lambda bench: bench.index(model, change(bench.shard(model)))


def size(model, keep: Callable[[bytes], bytes]):
    def damage(bench):
        file = bench.path(model)
        file.write_bytes(keep(file.read_bytes()))

    return damage


def options(**changes):
    return lambda bench: bench.set(**changes)


def recipe(**changes):
    return lambda bench: bench.recipe.update(changes)


def rows(expert, text, **source):
    def damage(bench):
        (bench.folder / f"{expert}.jsonl").write_text(text)
        bench.calibrate(**{expert: {"file": f"{expert}.jsonl"} | source})

    return damage


def text(file, content):
    return lambda bench: (bench.folder / file).write_text(content)


def emptied(bench):
    shutil.rmtree(bench.folder / "math")
    (bench.folder / "math").mkdir()


def linked_out(bench):
    elsewhere = bench.folder / "elsewhere.safetensors"
    bench.path("math").rename(elsewhere)
    os.symlink(elsewhere, bench.path("math"))


def merged_config_linked_out(bench):
    elsewhere = bench.folder / "elsewhere.json"
    bench.path("merged", "config.json").rename(elsewhere)
    os.symlink(elsewhere, bench.path("merged", "config.json"))


def dangling(bench):
    bench.path("math").unlink()
    os.symlink("../nowhere", bench.path("math"))


def file_instead(bench):
    bench.recipe["experts"]["math"] = "math.jsonl"


def twice(bench):
    shutil.rmtree(bench.folder / "code")
    shutil.copytree(bench.folder / "math", bench.folder / "code")


def same_file_other_spelling(bench):
    bench.recipe["experts"]["code"] = "./math/../math"


def one_more_layer(bench):
    model = tiny.llama(layers=3, hidden=32, num_attention_heads=2, num_key_value_heads=1)
    tiny.save(model, bench.folder / "math")


def wider(bench):
    shutil.rmtree(bench.folder / "math")
    model = tiny.llama(layers=2, hidden=64, num_attention_heads=2, num_key_value_heads=1)
    tiny.save(model, bench.folder / "math")


def adapter(**changes):
    """Replace an expert by an adapter, with these options changed."""

    def damage(bench):
        model = tiny.llama(layers=2, hidden=32, num_attention_heads=2, num_key_value_heads=1)
        peft_model(model).save_pretrained(bench.folder / "adapter")
        bench.recipe["experts"]["math"] = "adapter"
        bench.set(base="base")
        bench.json("adapter", "adapter_config.json", **changes)

    return damage


def other_base(bench):
    adapter()(bench)
    model = tiny.llama(layers=2, hidden=64, num_attention_heads=2, num_key_value_heads=1)
    tiny.save(model, bench.folder / "base")


def tied(bench):
    bench.json("merged", "config.json", tie_word_embeddings=True)
    bench.tensors("merged", lambda t: t.pop("lm_head.weight"))
    bench.set(lm_head=True)


def another_place(target):
    def damage(bench):
        bench.recipe["out"] = target

    return damage


def ids(expert, values):
    return rows(expert, json.dumps({"input_ids": values}))


ONE = "model-00001-of-00002.safetensors"
NAN, INF = float("nan"), float("inf")
BAD_NAMES = ["../math/x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin"]

# code, what is done, what the error names
ERRORS: list[tuple[str, Callable[[Bench], object], tuple[str, ...]]] = [
    ("F01", lambda b: b.tensors("math", lacks), ("expert `math`", Q, UP)),
    ("F01", lambda b: b.tensors("merged", lacks), ("merged", Q)),
    ("F03", tensor("math", Q, lambda t: t[:16].clone()), ("expert `math`", Q, "(16, 32)")),
    ("F04", one_more_layer, ("expert `math`", "`num_hidden_layers`", "3", "2")),
    ("F04", config("math", num_attention_heads=4), ("`num_attention_heads`", "expert `math`")),
    ("F04", config("math", hidden_act="gelu"), ("`hidden_act`", "gelu", "silu")),
    ("F04", wider, ("expert `math`", "`hidden_size`", "64", "32")),
    ("F06", tensor("math", Q, lambda t: t.to(torch.int8)), (Q, "I8", "expert `math`")),
    ("F06", tensor("math", Q, lambda t: t.double()), (Q, "F64")),
    ("F07", config("math", quantization_config={"bits": 4}), ("expert `math`", "quantized")),
    ("F07", config("merged", quantization_config={"bits": 4}), ("merged", "quantized")),
    (
        "F07",
        lambda b: b.tensors("code", lambda t: t.update({"a.qweight": torch.ones(2)})),
        ("expert `code`", "a.qweight"),
    ),
    *(
        ("F10", index("math", lambda m, bad=bad: m | {UP: bad}), ("expert `math`", bad))
        for bad in BAD_NAMES
    ),
    ("F10", index("merged", lambda m: m | {UP: "../code/model.safetensors"}), ("merged",)),
    ("F10", linked_out, ("expert `math`", WEIGHTS)),
    ("F10", merged_config_linked_out, ("merged", "config.json")),
    ("F11", index("math", lambda m: m | {UP: ONE}), (UP, ONE, "expert `math`")),
    ("F11", index("math", lambda m: m | {"ghost.weight": ONE}), ("ghost.weight",)),
    ("F11", index("math", lambda m: m | {UP: "absent.safetensors"}), ("absent.safetensors",)),
    ("F11", index("math", lambda m: {n: f for n, f in m.items() if n != Q}), (Q,)),
    ("F11", index("math", lambda m: {}), (INDEX, "expert `math`")),
    ("F11", index("merged", lambda m: m | {UP: ONE}), (UP, "merged")),
    ("F12", size("math", lambda b: b[: len(b) // 2]), (WEIGHTS, "expert `math`", "bytes")),
    ("F12", size("math", lambda b: b[:40]), (WEIGHTS, "40 bytes")),
    ("F12", size("math", lambda b: b""), (WEIGHTS, "0 bytes")),
    ("F12", size("math", lambda b: b + b"more"), (WEIGHTS,)),
    ("F12", size("merged", lambda b: b[:-8]), (WEIGHTS, "merged")),
    ("F13", text("math/config.json", "{"), ("expert `math`", "config.json")),
    ("F13", text("math/config.json", "[1]"), ("expert `math`", "config.json")),
    ("F13", text("merged/config.json", "{"), ("merged", "config.json")),
    ("F14", lambda b: b.pickled("math"), ("expert `math`", "pytorch_model.bin")),
    ("F14", lambda b: b.pickled("merged"), ("merged", "pytorch_model.bin")),
    ("F15", emptied, ("expert `math`",)),
    ("F15", dangling, ("expert `math`", WEIGHTS)),
    ("F15", file_instead, ("expert `math`", "math.jsonl")),
    ("F15", recipe(experts={"math": "maht", "code": "code"}), ("expert `math`", "maht")),
    ("F15", recipe(merged="megred"), ("merged", "megred")),
    (
        "F16",
        recipe(experts={"math": "org/not-here@v1", "code": "code"}),
        ("expert `math`", "org/not-here@v1"),
    ),
    (
        "F16",
        lambda b: (
            b.recipe.update(experts={"math": "org/not-here", "code": "code"}),
            b.set(require_pinned=True),
        ),
        ("expert `math`", "org/not-here", "require_pinned"),
    ),
    ("F17", twice, ("`math`", "`code`")),
    ("F17", same_file_other_spelling, ("`math`", "`code`")),
    ("F20", recipe(experts={}), ("`experts`",)),
    ("F21", lambda b: b.recipe["calibration"].pop("code"), ("code",)),
    ("F21", lambda b: b.calibrate(cdoe="code.jsonl"), ("cdoe",)),
    ("F21", options(expert_weights={"maths": 1}), ("maths",)),
    ("F22", rows("math", "\n\n"), ("math",)),
    ("F22", lambda b: b.calibrate(math=[]), ("math",)),
    ("F24", rows("math", '{"text": "one"}', samples=2), ("math", "`samples`", "2", "1")),
    ("F28", options(alpha=-1), ("`alpha`", "-1")),
    ("F28", options(alpha=float("nan")), ("`alpha`", "nan")),
    ("F28", options(alpha="big"), ("`alpha`", "'big'")),
    ("F28", options(alpha=True), ("`alpha`", "True")),
    ("F28", options(alpha_pattern={"q_proj": -1}), ("alpha_pattern", "q_proj")),
    ("F32", rows("math", '{"text": "a"}\n{"text": ""}'), ("math", "2")),
    ("F32", rows("math", '{"text": 3}'), ("math",)),
    ("F32", rows("math", "{not json"), ("math", "line 1")),
    ("F32", ids("math", [5, 999_999]), ("math", "999999")),
    ("F32", ids("math", [5, -1]), ("math", "-1")),
    ("F32", ids("math", []), ("math",)),
    ("F32", rows("math", '{"messages": [{"role": "user", "content": "x"}]}'), ("math", "template")),
    (
        "F32",
        rows("math", '{"input_ids": [5, 6], "attention_mask": [1]}'),
        ("math", "attention_mask"),
    ),
    ("F33", options(group_size=128), ("`group_size`", "128", "32")),
    ("F33", options(group_size=48), ("`group_size`", "48")),
    ("F33", options(bits=9), ("`bits`", "9")),
    ("F34", adapter(peft_type="LOHA"), ("expert `math`", "LOHA")),
    ("F34", adapter(r=16), ("expert `math`", "rank")),
    ("F34", adapter(use_dora=True), ("expert `math`", "magnitude")),
    ("F34", adapter(init_lora_weights="pissa"), ("expert `math`", "pissa")),
    ("F04", other_base, ("expert `math`", "`hidden_size`", "64")),
    ("F37", tied, ("lm_head",)),
    ("F38", config("merged", model_type="perceiver"), ("merged", "perceiver")),
    ("O01", options(weighting="norm"), ("`weighting`", "norm")),
    ("O02", options(alhpa=1), ("alhpa", "`alpha`")),
    ("O03", lambda b: b.calibrate(math="data_free"), ("`data_free`", "`base`")),
    ("O03", options(damp_percent=0.05), ("`damp_percent`",)),
]

# What only shows when the numbers are read: exit code 3. The others are in test_bad_numbers.py.
NUMERICAL = [
    ("F08", first("math", NAN), ("expert `math`", Q, "(3, 5)")),
    ("F09", first("merged", NAN), ("q_proj", "merged", "(3, 5)")),
    (
        "F27",
        tensor("merged", EMBEDDING, lambda t: t.index_fill(0, torch.arange(4, 260), INF)),
        ("expert `math`", "q_proj"),
    ),
]

# What is fine, but worth a word: a checkpoint is written, the words are said. A list is one run.
WARNINGS = {
    "models": [
        (
            "F02",
            lambda b: b.tensors("math", lambda t: t.update({"vision.weight": torch.ones(3)})),
            ("expert `math`", "1"),
        ),
        (
            "F05",
            tensor("math", EMBEDDING, lambda t: torch.cat([t, t[:4]])),
            ("expert `math`", "264", "260"),
        ),
        ("F04", config("code", rms_norm_eps=1e-3), ("expert `code`", "`norm eps`", "0.001")),
        ("F36", text("math/tokenizer.json", '{"model": {"vocab": {"a": 1}}}'), ("expert `math`",)),
    ],
    "rows": [
        ("F23", rows("math", '{"text": "abc"}'), ("math", "3")),
        ("F25", rows("code", json.dumps({"text": "long " * 60})), ("code", "128")),
    ],
    "balance": [
        (
            "F26",
            rows(
                "math", "\n".join(json.dumps({"text": f"a longer row {i} " * 5}) for i in range(60))
            ),
            ("math", "code"),
        ),
    ],
}


def half(model, dtype):
    def damage(bench):
        bench.tensors(model, lambda t: t.update({n: x.to(dtype) for n, x in t.items()}))

    return damage


def as_merged(bench):
    shutil.copyfile(bench.path("merged"), bench.path("code"))


def merge_first(bench):
    del bench.recipe["merged"]
    bench.recipe["merge"] = {"method": "task_arithmetic", "base": "base"}


def only_one(bench):
    for block in ("experts", "calibration"):
        del bench.recipe[block]["code"]


def base_of(bench):
    bench.set(base="base")


# What is simply fine; a list is one run.
FINE = {
    "as it is": [],
    "F06 F11 F14 stored otherwise": [
        half("math", torch.bfloat16),
        half("merged", torch.float16),
        lambda b: b.path("code", "pytorch_model.bin").write_bytes(b""),
        lambda b: b.shard("math"),
        lambda b: b.shard("merged"),
    ],
    "F28 F34 an adapter, weights, alpha 0 by a pattern that matches nothing": [
        adapter(),
        options(weighting="trace", expert_weights={"math": 2}),
        options(alpha_pattern={"nothing": 0}),
    ],
    "F18 expert equals merge, the other data free": [
        as_merged,
        base_of,
        lambda b: b.calibrate(math="data_free"),
    ],
    "F17 allowed": [twice, options(allow_duplicates=True)],
    "F19 one expert": [only_one],
    "merge on the fly": [merge_first],
}


def named(case) -> str:
    return case[0]


@pytest.mark.parametrize(("code", "damage", "says"), ERRORS, ids=map(named, ERRORS))
def test_a_fault_is_refused_before_any_compute(bench, code, damage, says):
    damage(bench)
    result = bench.run()
    assert result.code == 2, result.output
    assert result.errors.startswith("error: ") and f"[EPMQ-{code}]" in result.errors
    assert result.errors.count("\n") == 1
    for part in says:
        assert part in result.errors, result.errors
    assert str(bench.folder) not in result.errors.replace(str(bench.folder / "recipe.yaml"), "")
    assert result.made == set() and scratch_of(bench) == set()


@pytest.mark.parametrize(("code", "damage", "says"), NUMERICAL, ids=map(named, NUMERICAL))
def test_numbers_that_cannot_be_trusted_stop_the_run(bench, code, damage, says):
    damage(bench)
    result = bench.run()
    assert result.code == 3, result.output
    assert f"[EPMQ-{code}]" in result.errors
    for part in says:
        assert part in result.errors, result.errors
    assert result.made == set() and scratch_of(bench) == set()


def assert_written(bench, result):
    assert result.code == 0, result.output
    assert "out/model.safetensors" in result.made
    assert all(path == "out" or path.startswith("out/") for path in result.made), result.made
    assert scratch_of(bench) == set()


@pytest.mark.parametrize("about", WARNINGS)
def test_what_is_odd_is_said_once_and_the_run_goes_on(bench, about):
    for _, damage, _ in WARNINGS[about]:
        damage(bench)
    result = bench.run()
    assert_written(bench, result)
    for code, _, says in WARNINGS[about]:
        lines = [line for line in result.errors.splitlines() if f"[EPMQ-{code}]" in line]
        assert len(lines) == 1, result.errors
        for part in says:
            assert part in lines[0], lines


@pytest.mark.parametrize("case", FINE)
def test_what_is_fine_is_not_complained_about(bench, case):
    for change in FINE[case]:
        change(bench)
    result = bench.run()
    assert_written(bench, result)
    said = [line for line in result.errors.splitlines() if not line.startswith("GPTQModel gave")]
    # 164 tokens for layers of 64 inputs are few, but not fewer than a quarter.
    assert [line for line in said if "[EPMQ-" in line] == []
