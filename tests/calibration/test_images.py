"""Images as calibration: every form of a picture, what is refused, and the batches."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from epmq_gptq.calibration.batches import plan_for_folder, plan_inputs
from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.images import ImageRules
from epmq_gptq.calibration.rows import IMAGES
from epmq_gptq.calibration.text import TokenRules
from epmq_gptq.errors import EPMQInputError

SIZE = 16


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)


@pytest.fixture
def rules(processor):
    return ImageRules(size=SIZE, channels=3, patch=8, processor=processor)


def encode(rows, rules, **options):
    return rules.encode(read_calibration({"a": rows}, ["a"], form=IMAGES, **options))


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def test_every_form_of_a_picture_gives_the_processors_pixels(picture, processor, rules, tmp_path):
    picture.save(tmp_path / "p.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "p.png"}) + "\n")
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    forms = {
        "bare": [picture],
        "array": [np.asarray(picture)],
        "tensor": [torch.as_tensor(np.asarray(picture).copy())],
        "mapping": [{"image": picture}],
        "bytes": [{"image": {"bytes": png(picture), "path": None}}],
        "path": [{"image": tmp_path / "p.png"}],
        "name": [str(tmp_path / "p.png")],
        "pixel values": [{"pixel_values": expected}],
        "floats": [expected.numpy()],
        "beside a file": {"file": str(tmp_path / "rows.jsonl")},
        "column": {"rows": [{"jpg": picture, "cls": 3}], "column": "jpg"},
    }
    for name, form in forms.items():
        rows = encode(form, rules).rows["a"]
        assert len(rows) == 1 and torch.equal(rows[0].pixels, expected.float()), name


def test_a_dataset_of_images(picture, processor, rules):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(
        {"image": [picture] * 5, "label": list(range(5))}, features=features
    )
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"][0].float()
    encoded = encode({"rows": data, "samples": 3}, rules)
    assert [row.pixels.equal(expected) for row in encoded.rows["a"]] == [True] * 3
    assert encoded.counts["a"].available == 5 and encoded.counts["a"].used == 3
    assert encoded.counts["a"].tokens == 3 * ((SIZE // 8) ** 2 + 1)


def test_grey_and_transparent_pictures_become_rgb(picture, processor, rules):
    for mode in ("L", "RGBA", "P"):
        converted = picture.convert(mode)
        expected = processor(images=[converted.convert("RGB")], return_tensors="pt")
        got = encode([converted], rules).rows["a"][0].pixels
        assert torch.equal(got, expected["pixel_values"][0].float()), mode


def test_batches_keep_their_expert_and_the_host_gets_ids(rules):
    values = {
        name: [torch.full((3, SIZE, SIZE), float(i)) for i in range(n)]
        for name, n in (("a", 3), ("b", 2))
    }
    encoded = rules.encode(read_calibration(values, ["a", "b"], form=IMAGES))
    plan = plan_inputs(encoded, rules, batch_size=2)
    assert plan.experts == ["a", "a", "b"] and plan.rows == {"a": 3, "b": 2}
    assert [tuple(b["pixel_values"].shape) for b in plan.batches] == [
        (2, 3, SIZE, SIZE), (1, 3, SIZE, SIZE), (2, 3, SIZE, SIZE)
    ]  # fmt: skip
    assert plan.batches[1]["pixel_values"].unique().tolist() == [2.0]
    assert all(set(batch) == {"pixel_values"} for batch in plan.batches)
    assert [tuple(b["input_ids"].shape) for b in plan.host_batches] == [(2, 5), (1, 5), (2, 5)]
    assert plan.tokens == {"a": 15, "b": 10}


class Letters:
    """A tokenizer of single letters."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True, text_target=None):
        return {"input_ids": [ord(each) - 96 for each in text]}


def test_texts_go_to_the_text_tower_and_are_cut_to_its_positions(processor):
    rules = ImageRules(SIZE, 3, 8, processor, text=TokenRules(Letters(), 4, 30))
    pixels = torch.zeros(3, SIZE, SIZE)
    rows = [{"pixel_values": pixels, "text": text} for text in ("ab", "abcdef")]
    plan = plan_inputs(encode(rows, rules), rules, batch_size=2)
    assert plan.batches[0]["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert plan.batches[0]["attention_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert plan.tokens["a"] == 2 * 5 + 6
    with pytest.raises(EPMQInputError, match="1 of 2 images have no `text`"):
        encode([rows[0], pixels], rules)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"image": 3}, "`image` should be a picture"),
        ({"image": "no.png"}, "`no.png` cannot be read as a picture: there is no such file"),
        ({"image": {"bytes": b"no picture", "path": None}}, "cannot be read as a picture"),
        ({"text": "a cat"}, "exactly one of image, pixel_values"),
        ({"pixel_values": torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)}, "should be a picture"),
        ({"pixel_values": torch.zeros(3, 8, 8)}, r"should be of \(3, 16, 16\).*\(3, 8, 8\)"),
        ({"pixel_values": torch.full((3, SIZE, SIZE), torch.nan)}, r"nan at index \[0, 0, 0\]"),
        ({"pixel_values": torch.zeros(3, SIZE, SIZE), "text": 4}, "`text` should be a string"),
        ("", "row is empty|should be a picture"),
        ([1, 2], "should be a picture"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(rules, row, cause):
    good = torch.zeros(3, SIZE, SIZE)
    with pytest.raises(EPMQInputError, match=cause) as caught:
        encode([good, row], rules)
    assert "row 1" in str(caught.value) and caught.value.code == "EPMQ-F32"


def test_text_files_and_concat_are_refused(rules, tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(EPMQInputError, match="text file, and this model reads images"):
        encode({"file": str(tmp_path / "a.txt")}, rules)
    with pytest.raises(EPMQInputError, match="`concat` joins texts"):
        encode({"rows": [torch.zeros(3, SIZE, SIZE)], "concat": True, "seqlen": 4}, rules)


def test_a_picture_without_a_processor_is_refused(picture):
    with pytest.raises(EPMQInputError, match="no image processor") as caught:
        encode([picture], ImageRules(SIZE, 3, 8))
    assert "preprocessor_config.json" in caught.value.remedy


def test_a_folder_says_what_its_images_are(picture, processor, tmp_path):
    layers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPVisionConfig(image_size=SIZE, patch_size=8, num_hidden_layers=1, **layers)
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plan = plan_for_folder(tmp_path, {"a": [picture] * 3}, ["a"], batch_size=2)
    assert [len(batch["pixel_values"]) for batch in plan.batches] == [2, 1]
    rules = ImageRules.of(SimpleNamespace(image_size=SIZE, num_channels=3, patch_size=8),
                          tmp_path, None)  # fmt: skip
    assert plan.tokens["a"] == 3 * rules.positions == 15
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    with pytest.raises(EPMQInputError, match="image processor cannot be loaded"):
        plan_for_folder(tmp_path, {"a": [picture]}, ["a"])
