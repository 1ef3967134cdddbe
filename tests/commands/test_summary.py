"""The tables at the end: every layer of a small model, every kind of layer of a large one."""

import io

from rich.console import Console

from epmq_gptq.calibration.encoded import RowCounts
from epmq_gptq.commands.summary import folder_size, print_summary
from epmq_gptq.io.console import human_size
from epmq_gptq.run_report import ModuleReport, QuantizationReport


def module(name, **changes):
    values = {
        "module": name,
        "target": "experts",
        "bits": 4,
        "group_size": 128,
        "alpha": 1.0,
        "lam": 0.5,
        "tokens": {"math": 1000, "code": 500},
        "loss": 0.25,
        "excess": 2.0,
        "merge_excess": 3.0,
        "seconds": 0.5,
    }
    return ModuleReport(**values | changes)


def report(layers):
    return QuantizationReport(
        modules=[
            module(f"model.layers.{layer}.{name}")
            for layer in range(layers)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        ],
        rows={"math": 10, "code": 5},
        tokens={"math": 1000, "code": 500},
        seconds=12.5,
    )


def shown(report, **options):
    console = Console(file=io.StringIO(), width=140)
    rows = {
        "math": RowCounts(None, 60, 10, 10, tokens=1000, cut=7),
        "code": RowCounts(5, 1234, 9, 5, blocks=5, tokens=500, dropped=3),
    }
    print_summary(console, report, rows, **options)
    return [line for line in console.file.getvalue().splitlines() if line.strip()]


def cells(lines, start):
    (line,) = [line for line in lines if line.startswith(f"│ {start}")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_small_model_shows_every_layer_and_the_totals():
    lines = shown(report(2))
    assert cells(lines, "model.layers.1.mlp.down_proj")[1:] == [
        "4", "experts", "1", "0.25", "2", "3", "1,500", "0.50",
    ]  # fmt: skip
    assert cells(lines, "all 4")[1:] == ["4", "", "1", "0.25", "8", "12", "1,500", "12.5"]
    assert cells(lines, "math") == ["math", "all", "10", "60", "0", "1,000", "7", "0"]
    assert cells(lines, "code") == ["code", "5", "9", "1,234", "5", "500", "0", "3"]


def test_a_large_model_shows_kinds_unless_full():
    lines = shown(report(30))
    assert cells(lines, "model.layers.*.mlp.down_proj (30)")[5:7] == ["60", "90"]
    assert not any("model.layers.1." in line for line in lines)
    assert any("--full shows every layer" in line for line in lines)
    assert cells(shown(report(30), full=True), "model.layers.29.mlp.down_proj")


def test_exceptions_are_spelled_out_also_in_a_large_model():
    made = report(30)
    made.modules[0] = module(
        made.modules[0].module, target="rtn", loss=None, excess=None, reason="[nan] in the weights"
    )
    made.modules[2] = module(made.modules[2].module, target="merged", reason="3 tokens")
    lines = shown(made)
    assert "! model.layers.0.self_attn.q_proj: rounded to nearest: [nan] in the weights" in lines
    assert any("kept the merged weight as its target: 3 tokens" in line for line in lines)
    assert cells(lines, "model.layers.*.self_attn.q_proj (30)")[2] == "experts, 2 not"


def test_mixed_bits_and_tokens_are_shown_as_ranges():
    made = report(1)
    made.modules.append(module("model.layers.0.mlp.up_proj", bits=8, tokens={"math": 2, "code": 1}))
    assert cells(shown(made), "all 3")[1] == "4/8"


def test_a_module_without_loss_has_no_number():
    made = QuantizationReport(
        modules=[module("lm_head", target="rtn", loss=None, excess=None, reason="x")],
        rows={}, tokens={},
    )  # fmt: skip
    assert cells(shown(made), "lm_head")[4:6] == ["-", "-"]


def test_chosen_alphas_are_a_range_and_a_layer_without_one_has_none():
    made = report(1)
    made.modules[0].alpha, made.modules[1].alpha = 0.001, 0.3
    assert cells(shown(made), "all 2")[3] == "0.001–0.3"
    made.modules[0].alpha = None
    assert cells(shown(made), "model.layers.0.self_attn.q_proj")[3] == "-"


def test_what_became_of_the_experts_own_passes():
    made = report(1)
    made.left = {"math": "not finite"}
    assert any(line.startswith("! expert `math` was not run") for line in shown(made))
    assert not any("was not run" in line for line in shown(report(1)))


def test_where_the_time_and_the_memory_went():
    made = report(1)
    made.phases = {"forward": 2.04, "expert_forward": 3.25}
    made.peak_memory = {"process": 1_500_000_000}
    assert (
        "spent 12.5 s: expert forward 3.2, forward 2.0; peak memory 1.5 GB (process)"
        in " ".join(shown(made))
    )
    assert not any("peak memory" in line for line in shown(report(1)))


def test_sizes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 1500)
    (tmp_path / "sub" / "b").write_bytes(b"x" * 500)
    assert folder_size(tmp_path) == (2000, 2)
    expected = {999: "999 B", 1000: "1.0 kB", 1_234_567: "1.2 MB", 14 * 10**9: "14.0 GB"}
    assert {size: human_size(size) for size in expected} == expected
    assert human_size(2 * 10**16) == "20000.0 TB"
