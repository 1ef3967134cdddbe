"""From a shell: CLIP from image files and T5 from pairs, merged by RegMean++ and by averaging."""

from __future__ import annotations

import json

import clip_models
import numpy as np
import pytest
import t5_models
import tiny
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from epmq_gptq.cli import app
from epmq_gptq.io.checkpoints import Checkpoint


def run(*arguments: object):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def pictures(tmp_path):
    """Files of random pictures and, per expert, a table that names them."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        lines = []
        for index in range(12):
            values = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
            lines.append(json.dumps({"image": f"{name}/{index}.png", "label": index % 3}))
        (tmp_path / "pictures" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "pictures"


def write(folder, **recipe):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_clip_from_image_files(pictures, tmp_path):
    merged, experts = clip_models.family(tmp_path / "models")
    names = dict(zip(("a", "b"), experts.values(), strict=True))
    recipe = write(
        tmp_path,
        merge={"method": "regmean_plusplus", "keep": "merged"},
        experts={name: str(path) for name, path in names.items()},
        calibration={
            name: {"file": f"pictures/{name}.jsonl", "samples": 8 + 4 * (name == "b")}
            for name in names
        },
        quantize={"bits": 4, "group_size": 32, "alpha": 0.1},
        batch_size=4,
    )
    run("inspect", recipe)
    run("quantize", recipe, "--out", tmp_path / "out", "--json", tmp_path / "report.json")

    report = json.loads((tmp_path / "report.json").read_text())["report"]
    positions = (clip_models.SIZE // 8) ** 2 + 1
    assert report["tokens"] == {"a": 8 * positions, "b": 12 * positions}
    assert {m["tokens"]["a"] for m in report["modules"]} == {8 * positions}
    record = json.loads((tmp_path / "merged" / "epmq_merge.json").read_text())
    assert record["calibration"]["rows"] == {"a": 8, "b": 12}
    plain = Checkpoint(merged, what="the average")
    ours = Checkpoint(tmp_path / "merged", what="RegMean++")
    linear = next(name for name in plain if name.endswith("layers.0.mlp.fc1.weight"))
    assert not torch.equal(plain.read(linear), ours.read(linear))
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    from epmq_gptq import load_clip

    model = load_clip(tmp_path / "out", device="cpu")
    pixels = torch.randn(2, 3, clip_models.SIZE, clip_models.SIZE, dtype=torch.float16)
    with torch.inference_mode():
        assert torch.isfinite(model(pixel_values=pixels).image_embeds).all()


def test_t5_from_pairs_of_texts(tmp_path):
    merged, experts = t5_models.family(tmp_path / "models")
    for folder in (merged, *experts.values()):
        tiny.tokenizer().save_pretrained(folder)
    for name in experts:
        rows = [{"text": f"{name} {i} of {i * i}", "target": str(i)} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = write(
        tmp_path,
        merged=str(merged),
        experts={name: str(path) for name, path in experts.items()},
        calibration={name: {"file": f"{name}.jsonl", "samples": 10} for name in experts},
        quantize={"bits": 4, "group_size": 32, "alpha": 0.1},
        batch_size=5,
    )
    run("inspect", recipe)
    run("quantize", recipe, "--out", tmp_path / "out", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert {m["module"].split(".")[0] for m in report["modules"]} == {"encoder", "decoder"}
    by_side = {
        side: {
            sum(m["tokens"].values())
            for m in report["modules"]
            if m["module"].startswith(side) and "EncDec" not in m["module"]
        }
        for side in ("encoder", "decoder")
    }
    # One count for all layers that read one side, and together they are what was calibrated.
    assert {len(counts) for counts in by_side.values()} == {1}
    assert sum(map(sum, by_side.values())) == sum(report["tokens"].values())
