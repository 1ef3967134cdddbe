"""The driver of the paper's tables, end to end against a hub on localhost."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import judge
import paper_hub
import pytest
import torch
from fusion_hub import CLIP, T5, FusionHub, clip_tokenizer, greedy, pixel_values
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModel, T5ForConditionalGeneration

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "benchmarks" / "paper_tables.py"
ROWS = [
    ("base", "FP"),
    ("experts", "FP"),
    ("task_arithmetic", "FP"),
    ("task_arithmetic", "RTN"),
    ("task_arithmetic", "GPTQ"),
    ("task_arithmetic", "E-PMQ"),
    ("task_arithmetic", "E-PMQ-best"),
    ("regmean_plusplus", "FP"),
    ("regmean_plusplus", "GPTQ"),
]


@dataclass
class Run:
    """A finished run of the driver."""

    world: paper_hub.World
    folder: Path
    done: subprocess.CompletedProcess

    def scores(self, table: int, merger: str, method: str) -> dict[str, float]:
        """Column → score of a row of the CSV."""
        with (self.folder / "out" / f"table{table}.csv").open(encoding="utf-8") as file:
            return {
                row["column"]: float(row["score"])
                for row in csv.DictReader(file)
                if (row["merger"], row["method"]) == (merger, method)
            }

    def text(self, table: int) -> str:
        """The Markdown of a table."""
        return (self.folder / "out" / f"table{table}.md").read_text(encoding="utf-8")

    def checkpoint(self, family: str, method: str) -> Path:
        """The kept checkpoint of a quantized merge by task arithmetic."""
        digest = "[0-9a-f]" * 16
        pattern = f"{family}-*-task_arithmetic-{method}-{digest}"
        (found,) = (self.folder / "cache" / "quantized").glob(pattern)
        return found


def drive(hub: FusionHub, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the driver against the double."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    places = ["--out", str(folder / "out"), "--cache", str(folder / "cache")]
    return subprocess.run(
        [sys.executable, str(DRIVER), *arguments, "--device", "cpu", "--workers", "0", *places],
        env=os.environ | own | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )


ARGUMENTS = [
    *("--table", "1", "--table", "3", "--tasks", "mnist", "svhn", "cola", "stsb"),
    *("--mergers", "base", "experts", "task_arithmetic", "regmean_plusplus"),
    *("--methods", "FP", "RTN", "GPTQ", "E-PMQ", "E-PMQ-best"),
    *("--samples", "8", "--keep"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tables 1 and 3 with two tasks each."""
    folder = tmp_path_factory.mktemp("paper")
    with FusionHub() as hub:
        world = paper_hub.build(hub, folder / "hub")
        done = drive(hub, folder, *ARGUMENTS)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        yield Run(world, folder, done)


# ---- judges ------------------------------------------------------------------------------------


def merged_by_task_arithmetic(base: dict, experts: list[dict]) -> dict[str, torch.Tensor]:
    """theta_0 + 0.3 sum (theta_i - theta_0)."""
    return {name: W + 0.3 * sum(expert[name] - W for expert in experts) for name, W in base.items()}


def vision_state(folder: Path) -> dict[str, torch.Tensor]:
    """A vision tower's tensors without any prefix."""
    state = load_file(folder / "model.safetensors")
    if any(name.startswith("text_model.") for name in state):
        state = {name: W for name, W in state.items() if name.startswith("vision_model.")}
    return {name.removeprefix("vision_model."): W for name, W in state.items()}


def dequantized_state(folder: Path) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint's weights as full-precision ones; half precision as the host's kernel."""
    packed = ("qweight", "qzeros", "scales", "g_idx")
    kept = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in judge.stored(folder).items()
        if name.rpartition(".")[2] not in packed
    }
    dense = {
        f"{name.removeprefix('vision_model.')}.weight": W.half().float()
        for name, W in judge.dequantized(folder).items()
    }
    return kept | dense


def vision_scores(run: Run, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Accuracy of a vision tower on both tasks, from scratch."""
    clip = CLIPModel.from_pretrained(run.world.folders[CLIP])
    head = paper_hub.digit_head(clip, clip_tokenizer())
    model = CLIPVisionModel(clip.config.vision_config).eval()
    model.load_state_dict({name: W.float() for name, W in state.items()})
    scores = {}
    for task, (images, labels) in run.world.images.items():
        pixels = pixel_values(images, run.world.folders[CLIP])
        said = paper_hub.answers(clip, head, paper_hub.pooled_outputs(model, pixels)).tolist()
        scores[task] = 100 * sum(map(int.__eq__, said, labels)) / len(labels)
    return scores


def text_scores(run: Run, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scores of a T5 on both tasks: greedy answers one by one, without padding."""
    from transformers import AutoTokenizer

    folder = run.world.folders[T5]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    model.load_state_dict(model.state_dict() | {name: W.float() for name, W in state.items()})
    prompts, targets = run.world.texts["cola"]
    said = [greedy(model, tokenizer, prompt) for prompt in prompts]
    exact = 100 * sum(map(str.__eq__, said, targets)) / len(targets)
    prompts, targets = run.world.texts["stsb"]
    said = [paper_hub.number(greedy(model, tokenizer, prompt)) for prompt in prompts]
    return {"cola": exact, "stsb": 100 * paper_hub.spearman(said, [float(t) for t in targets])}


def assert_equal(scores: dict[str, float], expected: dict[str, float]) -> None:
    average = sum(expected.values()) / len(expected)
    assert scores == pytest.approx(expected | {"average": average}, abs=1e-3)


# ---- the tables --------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "columns"), [(1, ("svhn", "mnist")), (3, ("cola", "stsb"))])
def test_a_table_has_all_rows_and_columns(run, table, columns):
    with (run.folder / "out" / f"table{table}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [(*row, column) for row in ROWS for column in (*columns, "average")]
    assert [(row["merger"], row["method"], row["column"]) for row in rows] == expected
    assert not any(row["failed"] for row in rows)
    quantized = [row for row in rows if row["method"] != "FP"]
    assert {(row["bits"]) for row in quantized} == {"4"}
    assert all(float(row["seconds"]) > 0 for row in quantized)
    alphas = {row["alpha"] for row in rows if row["method"] == "E-PMQ"}
    assert alphas == {"0.01"}
    grid = [line for line in run.text(table).splitlines() if line.startswith("|")]
    assert grid[0] == f"| Method | {columns[0]} | {columns[1]} | Avg. | paper | Δ |"
    assert [line.split(" | ")[0] for line in grid[2:]] == [
        "| Pre-trained",
        "| Fine-tuned (each on its own task)",
        "| Task Arithmetic (λ = 0.3)",
        "| Task Arithmetic → RTN",
        "| Task Arithmetic → GPTQ",
        "| Task Arithmetic → E-PMQ",
        "| Task Arithmetic → E-PMQ-best",
        "| RegMean++",
        "| RegMean++ → GPTQ",
    ]


def test_clip_full_precision_rows_equal_a_computation_from_scratch(run):
    folders = run.world.folders
    base = vision_state(folders[CLIP])
    experts = [
        vision_state(folders[f"tanganke/clip-vit-base-patch32_{task}"])
        for task in paper_hub.IMAGE_TASKS
    ]
    assert_equal(run.scores(1, "base", "FP"), vision_scores(run, base))
    merged = merged_by_task_arithmetic(base, experts)
    assert_equal(run.scores(1, "task_arithmetic", "FP"), vision_scores(run, merged))
    # The labels are the experts' own answers.
    assert_equal(run.scores(1, "experts", "FP"), {"mnist": 100.0, "svhn": 100.0})


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "E-PMQ", "E-PMQ-best"])
def test_clip_quantized_rows_are_those_of_the_saved_checkpoints(run, method):
    state = dequantized_state(run.checkpoint("clip-b32", method))
    assert_equal(run.scores(1, "task_arithmetic", method), vision_scores(run, state))


def test_glue_full_precision_rows_equal_a_computation_from_scratch(run):
    folders = run.world.folders
    base = load_file(folders[T5] / "model.safetensors")
    experts = [
        load_file(folders[f"tanganke/flan-t5-base_glue-{task}"] / "model.safetensors")
        for task in paper_hub.TEXT_TASKS
    ]
    assert_equal(run.scores(3, "base", "FP"), text_scores(run, base))
    merged = merged_by_task_arithmetic(base, experts)
    assert_equal(run.scores(3, "task_arithmetic", "FP"), text_scores(run, merged))
    assert_equal(run.scores(3, "experts", "FP"), {"cola": 100.0, "stsb": 100.0})


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "E-PMQ", "E-PMQ-best"])
def test_glue_quantized_rows_are_those_of_the_saved_checkpoints(run, method):
    state = dequantized_state(run.checkpoint("flan-t5-base", method))
    assert_equal(run.scores(3, "task_arithmetic", method), text_scores(run, state))


def test_the_double_tells_rows_apart(run):
    # The comparisons above would say nothing if every model had the same score.
    for table in (1, 3):
        rows = [run.scores(table, *row)["average"] for row in ROWS]
        assert len(set(rows)) >= 5, rows


def test_a_table_whose_anchors_are_missed_says_so(run):
    for table, missed in ((1, 3), (3, 2)):
        text = run.text(table)
        assert text.count("**Anchor missed:**") == missed
        assert "must not be compared with the paper's" in text
    # Of the published row of Task Arithmetic, the two columns that were run.
    assert f"published {(77.9 + 96.1) / 2:.1f}" in run.text(1)


def test_versions_hardware_commits_and_command_are_written_down(run):
    for table, ids in ((1, [CLIP, "datasets/ylecun/mnist"]), (3, [T5, "datasets/nyu-mll/glue"])):
        text = run.text(table)
        for name in ids:
            public = name.removeprefix("datasets/")
            known = run.world.hub.datasets if public != name else run.world.hub.repositories
            assert f"`{name}` at `{known[public].branches['main']}`" in text
        assert "fusion-bench" in text and "gptqmodel" in text and "Hardware: cpu" in text
        assert "`python benchmarks/paper_tables.py --table 1 --table 3" in text
        assert str(run.folder) not in text
    data = json.loads((run.folder / "out" / "table1.json").read_text(encoding="utf-8"))
    facts = [result["facts"] for result in data["results"] if result["cell"]["method"] == "E-PMQ"]
    assert facts[0]["samples"] == 8 and facts[0]["group_size"] == 128
    assert facts[0]["parameters"] == {"lam": 0.3}
    assert str(run.folder) not in json.dumps(data)


def test_a_finished_cell_is_not_run_again(run):
    asked = len(run.world.hub.requests)
    again = drive(run.world.hub, run.folder, *ARGUMENTS[:2], *ARGUMENTS[4:])
    assert again.returncode == 0, again.stderr[-2000:]
    assert "clip-b32 TA8:" in run.done.stderr
    assert "clip-b32 TA8:" not in again.stderr and "draw" not in again.stderr
    table = [line for line in again.stdout.splitlines() if line.startswith("|")]
    assert table == [line for line in run.text(1).splitlines() if line.startswith("|")]
    # Nor is anything fetched a second time: only what the names stand for now is asked.
    new = [path for method, path in run.world.hub.requests[asked:] if method == "GET"]
    assert not [path for path in new if "/resolve/" in path]
