"""The parts of the driver of the paper's tables that need no hub."""

import json
from importlib import resources
from types import SimpleNamespace

import datasets
import fusion_hub
import paper_tables
import pytest
import torch
import yaml
from paper import clip, data, glue, llm, models, report, specs, tables
from paper.cells import Cell, Runner, Settings
from paper.data import Score
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from epmq_gptq.errors import EPMQInputError

# ---- what was published, what FusionBench says --------------------------------------------------


def test_published_averages_are_the_means_of_their_columns():
    # The paper rounds; two averages of Table 1 are cut in place of rounded.
    for name, table in specs.published().items():
        for key, row in table["rows"].items():
            assert len(row) == len(table["columns"]), (name, key)
            assert sum(row[:-1]) / (len(row) - 1) == pytest.approx(row[-1], abs=0.09), (name, key)


@pytest.mark.parametrize(
    ("family", "suite", "key", "average"),
    [
        ("clip-b32", "TA8", "base", 48.2),
        ("clip-b32", "TA8", "experts", 90.3),
        ("clip-b32", "TA8", "wudi/FP", 84.5),
        ("clip-b32", "TA8", "regmean_plusplus/FP", 84.4),
        ("clip-b32", "TA8", "task_arithmetic/E-PMQ@0", 5.37),
        ("clip-b32", "TA8", "task_arithmetic/GPTQ#64", 64.86),
        ("clip-l14", "TA8", "ties/FP", 84.0),
        ("clip-l14", "TALL20", "task_arithmetic/E-PMQ", 76.71),
        ("flan-t5-base", "GLUE8", "ties/E-PMQ", 83.48),
        ("llama-3.1-8b", "MergeBench4", "task_arithmetic/E-PMQ", 62.91),
    ],
)
def test_published_rows(family, suite, key, average):
    assert specs.published_row(family, suite, key)["average"] == average


def test_models_and_tasks_are_those_of_fusion_bench():
    root = resources.files("fusion_bench_config")
    for family, size in (("clip-b32", "base-patch32"), ("clip-l14", "large-patch14")):
        file = root / f"modelpool/CLIPVisionModelPool/clip-vit-{size}_TALL20_model_only.yaml"
        pool = yaml.safe_load(file.read_text())["models"]
        expert = specs.FAMILIES[family].expert
        assert pool.pop("_pretrained_") == specs.FAMILIES[family].base
        assert pool == {task: expert.format(task=task) for task in specs.TALL20}
    llama = root / "modelpool/CausalLMPool/mergebench/Llama-3.2-3B-Instruct.yaml"
    pool = yaml.safe_load(llama.read_text())["models"]
    family = specs.FAMILIES["llama-3.2-3b"]
    assert pool["_pretrained_"] == family.base
    assert {task: family.expert.format(task=task) for task in specs.MERGEBENCH4}.items() <= (
        pool.items()
    )


def test_datasets_are_those_of_fusion_bench():
    root = resources.files("fusion_bench_config") / "dataset/image_classification"
    short = {"mnist": "ylecun/mnist", "svhn": "ufldl-stanford/svhn"}  # names that the hub redirects
    for task, spec in specs.IMAGES.items():
        for split, ours in (("test", spec.test), ("train", spec.train)):
            told = yaml.safe_load((root / split / f"{task}.yaml").read_text())[task]
            assert told["split"] == ours, task
            path = told.get("path") or told.get("_args_", ["clip-benchmark/wds_fer2013"])[0]
            assert short.get(path, path) == spec.path, task
            assert told.get("_args_", [None, None])[1] in (None, spec.config)
    pool = yaml.safe_load(
        (root.parent.parent / "taskpool/flan-t5_glue_text_generation.yaml").read_text()
    )
    told = {task["name"]: task["dataset"]["split"] for task in pool["tasks"]}
    assert told.pop("mnli") == specs.GLUE["mnli"].test
    assert told == {task: s.test for task, s in specs.GLUE.items() if task != "mnli"}


# ---- data --------------------------------------------------------------------------------------


@pytest.fixture
def local(monkeypatch):
    """Datasets by path, in place of the hub's."""
    known = {}
    monkeypatch.setattr(data, "commit_of", lambda spec: None)
    monkeypatch.setattr(data, "_loaded", lambda path, config, split, revision: known[path][split])
    return known


def test_columns_are_renamed(local):
    picture = Image.new("RGB", (2, 2))
    fer = {"__key__": ["a"], "jpg": [picture], "cls": [3]}
    local["clip-benchmark/wds_fer2013"] = {"test": datasets.Dataset.from_dict(fer)}
    row = data.load_split(specs.IMAGES["fer2013"], "test")[0]
    assert row["label"] == 3 and row["image"].size == (2, 2)
    # The fine label counts, also where a column of the new name is there already.
    cifar = {"image": [1], "label": [7], "coarse_label": [8], "fine_label": [42]}
    local["tanganke/cifar100"] = {"test": datasets.Dataset.from_dict(cifar)}
    assert data.load_split(specs.IMAGES["cifar100"], "test")[0]["label"] == 42
    local["tanganke/cifar100"]["test"] = datasets.Dataset.from_dict({"image": [1], "label": [5]})
    assert data.load_split(specs.IMAGES["cifar100"], "test")[0]["label"] == 5


def test_labels_are_class_numbers():
    assert [clip.class_number(label, 2, "pcam") for label in (True, False, 1)] == [1, 0, 1]
    assert type(clip.class_number(True, 2, "pcam")) is int
    for label in (2, -1, "1", None, 0.5):
        with pytest.raises(EPMQInputError, match="below 2") as caught:
            clip.class_number(label, 2, "pcam")
        assert caught.value.code == "EPMQ-F32"


def test_a_smaller_draw_begins_a_larger_one():
    small, large = (data.draw(1000, count, 0, "mnist") for count in (64, 256))
    assert large[:64] == small and len(set(large)) == 256 and max(large) < 1000
    assert data.draw(1000, 64, 0, "svhn") != small != data.draw(1000, 64, 1, "mnist")
    assert sorted(data.draw(10, 64, 0, "mnist")) == list(range(10))


# ---- CLIP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "base"
    fusion_hub.clip_folder(folder)
    return folder


def test_a_head_is_the_mean_over_the_templates(clip_base):
    heads = clip.build_heads(clip_base, ["eurosat"], "cpu")
    names, templates = clip.class_names("eurosat")
    assert len(templates) == 3 and names[0] == "annual crop land"
    model = CLIPModel.from_pretrained(clip_base).double()
    tokenizer = AutoTokenizer.from_pretrained(clip_base)
    for index in (0, 9):
        rows = []
        for template in templates:  # one by one, so that nothing is padded
            ids = torch.tensor([tokenizer(template(names[index]))["input_ids"]])
            with torch.no_grad():
                row = model.text_model(input_ids=ids)[1] @ model.text_projection.weight.T
            rows.append(row[0] / row.norm())
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(
            heads.text["eurosat"][index].double(), mean / mean.norm(), atol=1e-5, rtol=0
        )
    pooled = torch.randn(2, 128)
    image = pooled.double() @ model.visual_projection.weight.T
    image = image / image.norm(dim=1, keepdim=True)
    expected = model.logit_scale.exp() * image @ heads.text["eurosat"].double().T
    torch.testing.assert_close(
        heads.logits(pooled, "eurosat").double(), expected, atol=1e-4, rtol=0
    )


# ---- GLUE --------------------------------------------------------------------------------------


def test_exact_match_and_rank_correlation():
    assert glue.exact_match(["yes", "no", "Yes"], ["yes", "yes", "yes"]) == pytest.approx(100 / 3)
    assert glue.spearman(["1.0", "3", "5.0"], ["0.5", "2.0", "4.0"]) == pytest.approx(100)
    assert glue.spearman(["5", "3", "1"], ["1", "2", "3"]) == pytest.approx(-100)
    # What is no number counts as 0, which here is the lowest rank.
    assert glue.spearman(["yes", "3", "5"], ["0", "1", "2"]) == pytest.approx(100)
    assert glue.spearman(["nan", "inf", "5"], ["0", "0", "2"]) == pytest.approx(100)
    assert glue.spearman(["4", "4", "4"], ["0", "1", "2"]) == 0


# ---- language models ---------------------------------------------------------------------------


def test_a_language_bench_asks_lm_eval_and_calibrates_on_mergebench(tmp_path, local, monkeypatch):
    import lm_eval
    import tiny

    folder = tiny.save(tiny.llama(1), tmp_path / "base")
    for task, (spec, question, answer) in specs.MERGEBENCH.items():
        rows = {question: [f"{task} {i}?" for i in range(3)], answer: ["x" * 90] * 3}
        local[spec.path] = {"train": datasets.Dataset.from_dict(rows)}
    bench = llm.LanguageBench(folder, specs.MERGEBENCH4, "cpu", limit=5, seqlen=40)
    rows = bench.calibration(2, 0)
    assert list(rows) == list(specs.MERGEBENCH4)
    assert all(len(row["input_ids"]) == 40 for each in rows.values() for row in each)
    assert "math" in bench.tokenizer.decode(rows["math"][0]["input_ids"])
    # Without permission no column that runs a model's code.
    assert bench.columns == ("gsm8k", "math500", "arc_challenge", "ifeval")
    asked = {}

    def answered(**options):
        asked.update(options)
        wanted = {task: metric for task, metric in specs.LM_TASKS.values()}
        return {
            "results": {task: {wanted[task]: 0.25} for task in options["tasks"]},
            "n-samples": {task: {"effective": 5} for task in options["tasks"]},
        }

    monkeypatch.setattr(lm_eval, "simple_evaluate", answered)
    scores = bench.evaluate(tiny.llama(1), bench.columns)
    assert scores == dict.fromkeys(bench.columns, Score(25.0, 5))
    assert asked["limit"] == 5 and asked["confirm_run_unsafe_code"] is False
    monkeypatch.setitem(specs.LM_TASKS, "ifeval", ("ifeval", "another,none"))
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda **_: {"results": {"ifeval": {"acc,none": 1.0}}}
    )
    with pytest.raises(EPMQInputError, match=r"`another,none`, got acc,none\."):
        bench.evaluate(tiny.llama(1), ["ifeval"])


# ---- models ------------------------------------------------------------------------------------


def test_experts_named_otherwise_are_saved_again(monkeypatch, tmp_path, clip_base):
    base = CLIPModel.from_pretrained(clip_base)
    fusion_hub.clip_expert(base, tmp_path / "hub-named", 1)
    second = fusion_hub.clip_expert(base, tmp_path / "second", 2)
    second.save_pretrained(tmp_path / "bare")  # transformers 5 writes no prefix
    places = {
        specs.FAMILIES["clip-b32"].base: clip_base,
        "tanganke/clip-vit-base-patch32_mnist": tmp_path / "hub-named",
        "tanganke/clip-vit-base-patch32_svhn": tmp_path / "bare",
    }
    fetcher = models.Fetcher(tmp_path / "cache", lambda text: None)

    def fetch(spec):
        fetcher.commits[spec] = None
        return places[spec]

    monkeypatch.setattr(fetcher, "fetch", fetch)
    found = models.prepare("clip-b32", ("mnist", "svhn"), fetcher)
    assert found.experts["mnist"] == tmp_path / "hub-named"
    names = [models._names(folder) for folder in (found.base, *found.experts.values())]
    assert names[0] == names[1] == names[2] and all(n.startswith("vision_model.") for n in names[0])
    saved = fusion_hub.CLIPVisionModel.from_pretrained(found.experts["svhn"]).state_dict()
    for name, tensor in second.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    # What a merge copies from the base must be enough to read images with.
    assert (found.base / "preprocessor_config.json").is_file()


# ---- cells and tables --------------------------------------------------------------------------


def lines(scores: dict[Cell, dict[str, float] | str]) -> list[report.Line]:
    """Finished rows without a run; text is the reason of a failure."""
    found = []
    for cell, values in scores.items():
        failed = values if isinstance(values, str) else None
        result = {
            "cell": {},
            "scores": {} if failed else values,
            "items": {},
            "failed": failed,
            "seconds": {"quantize": 2.0 if cell.method == "GPTQ" else 5.0},
            "facts": {"models": {"org/base": "c1"}, "datasets": {"org/data": None}},
        }
        if cell.method == "FP":
            result["seconds"] = {}
        columns = specs.SUITES[cell.suite]
        found.append(report.Line(cell, result, columns))
    return found


ABOUT = {
    "environment": {"versions": {"torch": "1"}, "hardware": {"cpu": "x", "gpus": []}},
    "command": "python benchmarks/paper_tables.py",
    "limit": None,
}


def test_anchors_within_a_point_are_told_as_such():
    row = specs.published_row("clip-b32", "TA8", "average/FP")
    near = {task: row[task] + 0.9 for task in specs.TA8}
    cell = Cell("clip-b32", "TA8", "average")
    (told,) = report.anchors_of(lines({cell: near}), None)
    assert told.startswith("Anchors: all 1 full-precision rows lie within 1 point")
    far = {task: row[task] - 1.3 for task in specs.TA8}
    told = report.anchors_of(lines({cell: far}), 10)
    assert "**Anchor missed:** Simple Averaging (clip-b32, TA8) is 65.2" in told[0]
    assert "At most 10 items" in told[-1]
    # A quantized row is a result, not an anchor.
    quantized = Cell("clip-b32", "TA8", "average", "GPTQ")
    assert "No full-precision row" in report.anchors_of(lines({quantized: far}), None)[0]


def test_rows_are_compared_with_the_papers_row_of_the_same_settings():
    scores = dict.fromkeys(specs.TA8, 70.0)
    cells = {
        Cell("clip-b32", "TA8", "ties", "E-PMQ"): 74.8,
        Cell("clip-b32", "TA8", "ties", "E-PMQ", alpha=0.1): 74.71,
        Cell("clip-b32", "TA8", "ties", "E-PMQ", bits=3): None,
        Cell("clip-b32", "TA8", "task_arithmetic", "GPTQ", samples=64): 64.86,
        Cell("clip-b32", "TA8", "task_arithmetic", "GPTQ", samples=256): 65.0,
        Cell("clip-b32", "TA8", "regmean"): 82.4,
    }
    for line, expected in zip(lines(dict.fromkeys(cells, scores)), cells.values(), strict=True):
        assert line.published == expected, line.label


def test_times_are_related_to_gptq_of_the_same_budget():
    scores = dict.fromkeys(specs.TA8, 50.0)
    cells = tables.TABLES["6"].cells("clip-b32", "TA8")
    text = report.markdown(tables.TABLES["6"], lines(dict.fromkeys(cells, scores)), ABOUT)
    row = next(line for line in text.splitlines() if "E-PMQ, 64 rows per task" in line)
    assert row.endswith("| 50.00 | 72.23 | -22.2 | 5.0 | 2.50× |")


def test_a_failed_cell_is_told():
    cells = tables.TABLES["12"].cells("clip-b32", "TA8")
    scores = {cell: dict.fromkeys(specs.TA8, 50.0) for cell in cells}
    bad = Cell("clip-b32", "TA8", "task_arithmetic", "E-PMQ", alpha=0.0)
    assert bad in scores
    done = lines(scores | {bad: "EPMQ-F29: singular"})
    text = report.markdown(tables.TABLES["12"], done, ABOUT)
    assert "- Failed: Task Arithmetic → E-PMQ, α = 0: EPMQ-F29: singular" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {2 + 8 + 3}
    assert "EPMQ-F29: singular" in report.rows_csv(tables.TABLES["12"], done)


def test_a_failure_costs_its_cell_only(tmp_path, monkeypatch):
    settings = Settings(out=tmp_path / "out", cache=tmp_path / "cache", tasks=("mnist",))
    runner = Runner(settings, models.Fetcher(tmp_path, lambda text: None), lambda text: None)
    runner.models = lambda family, suite: models.Models(tmp_path, {}, tmp_path)
    runner.bench = lambda family, suite: SimpleNamespace(
        columns=("mnist",), datasets=lambda: {}, tasks=("mnist",)
    )
    calls = []

    def computed(cell):
        calls.append(cell.key)
        if cell.method == "AWQ":
            raise NotImplementedError("3 bits\nmore")
        return {"scores": {"mnist": 50.0}, "items": {"mnist": 2}, "seconds": {}}

    monkeypatch.setattr(runner, "_computed", computed)
    awq, gptq = (Cell("clip-b32", "TA8", "average", m, bits=3) for m in ("AWQ", "GPTQ"))
    assert runner.run(awq)["failed"] == "NotImplementedError: 3 bits"
    assert runner.run(gptq)["scores"] == {"mnist": 50.0}
    # What succeeded is read, what failed is tried again; other settings are another cell.
    runner.run(gptq)
    runner.run(awq)
    runner.settings = Settings(out=settings.out, cache=settings.cache, tasks=("mnist",), limit=3)
    runner.run(gptq)
    assert calls == ["average/AWQ:3", "average/GPTQ:3", "average/AWQ:3", "average/GPTQ:3"]
    kept = [json.loads(file.read_text()) for file in (settings.out / "cells").glob("*.json")]
    assert sorted(each["facts"]["limit"] or 0 for each in kept) == [0, 3]


def test_the_command_line_chooses_cells(capsys):
    assert paper_tables.main(["--table", "2", "--model", "clip-l14", "--list"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {row[2] for row in rows} == {"TA8", "TALL14", "TALL20"}
    assert {row[1] for row in rows} == {"clip-l14"}
    for wrong, said in (
        (["--table", "3", "--model", "clip-b32"], "no cell of these tables"),
        (["--limit", "0"], "at least 1"),
        (["--revision", "org/name"], "ID=REVISION"),
    ):
        with pytest.raises(SystemExit) as caught:
            paper_tables.main(wrong)
        assert caught.value.code == 2 and said in capsys.readouterr().err
