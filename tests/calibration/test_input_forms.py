"""Every form of calibration ends in the batches of its plain form, which are GPTQModel's own."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from gptqmodel.utils.calibration import prepare_calibration_dataset
from judge import stored

from epmq_gptq import EPMQConfig, EPMQInputError
from epmq_gptq.calibration.batches import input_rules
from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.sources import RowSource
from epmq_gptq.calibration.text import TokenRules
from epmq_gptq.host import preparing

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHATS = {
    name: [
        [
            {"role": "user", "content": f"{name} asks {'x' * (3 * i)}"},
            {"role": "bot", "content": "so"},
        ]
        for i in range(5)
    ]
    for name in ("expert0", "expert1")
}
TEXTS = {
    name: ["".join(f"<{m['role']}>{m['content']}" for m in chat) for chat in chats]
    for name, chats in CHATS.items()
}
MIXED = [{"task": name, "text": TEXTS[name][i]} for i in range(5) for name in TEXTS]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    merged, experts = tiny.family(folder, experts=2, model=tiny.llama(layers=1))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(merged)
    return merged, experts


@pytest.fixture(scope="module")
def model(family):
    merged, experts = family
    return tiny.load(merged, EPMQConfig(group_size=32, experts=experts))


@pytest.fixture(scope="module")
def ids(model):
    return {name: [model.tokenizer(t)["input_ids"] for t in texts] for name, texts in TEXTS.items()}


def planned(model, calibration, batch_size=2, **options):
    experts = SimpleNamespace(names=list(TEXTS))
    return preparing.planned(
        model, experts, calibration, options.pop("sort", None), batch_size, **options
    )


def assert_same(plan, other):
    assert plan.experts == other.experts and plan.tokens == other.tokens
    for batch, its in zip(plan.batches, other.batches, strict=True):
        assert batch.keys() == its.keys()
        assert all(torch.equal(batch[key], its[key]) for key in batch)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_file(path, texts):
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def padded(model, texts):
    return [
        {key: value[0] for key, value in row.items() if key in ("input_ids", "attention_mask")}
        for text in texts
        for row in [model.tokenizer(text, padding="max_length", max_length=90, return_tensors="pt")]
    ]


FORMS = {
    "token ids": lambda model, ids, folder: ids,
    "tensors": lambda model, ids, folder: {
        name: [torch.tensor(row) for row in rows] for name, rows in ids.items()
    },
    "mappings": lambda model, ids, folder: {
        name: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        for name, rows in ids.items()
    },
    "padded by somebody else": lambda model, ids, folder: {
        name: padded(model, texts) for name, texts in TEXTS.items()
    },
    "strings": lambda model, ids, folder: TEXTS,
    "text mappings": lambda model, ids, folder: {
        name: [{"text": text} for text in texts] for name, texts in TEXTS.items()
    },
    "chats": lambda model, ids, folder: {
        name: [{"messages": chat} for chat in chats] for name, chats in CHATS.items()
    },
    "a generator": lambda model, ids, folder: {
        name: (text for text in texts) for name, texts in TEXTS.items()
    },
    "a dataset": lambda model, ids, folder: {
        name: datasets.Dataset.from_dict({"text": texts}) for name, texts in TEXTS.items()
    },
    ".jsonl": lambda model, ids, folder: {
        name: lines(folder / f"{name}.jsonl", [{"messages": chat} for chat in chats])
        for name, chats in CHATS.items()
    },
    ".txt": lambda model, ids, folder: {
        name: str(text_file(folder / f"{name}.txt", texts)) for name, texts in TEXTS.items()
    },
    "a dataset's name": lambda model, ids, folder: {
        name: {
            "dataset": "json",
            "data_files": str(lines(folder / f"{name}.json", [{"text": t} for t in texts])),
            "samples": len(texts),
        }
        for name, texts in TEXTS.items()
    },
    "several sources": lambda model, ids, folder: {
        name: [RowSource(rows=texts[:2]), RowSource(rows=texts[2:])]
        for name, texts in TEXTS.items()
    },
    "one tagged list": lambda model, ids, folder: {"rows": MIXED, "expert_column": "task"},
    "one tagged dataset": lambda model, ids, folder: {
        "rows": datasets.Dataset.from_list(MIXED),
        "expert_column": "task",
    },
    "tokens already": lambda model, ids, folder: input_rules(model).encode(
        read_calibration(TEXTS, list(TEXTS))
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_ends_in_the_batches_of_the_plain_one(model, ids, form, tmp_path):
    given = FORMS[form](model, copy.deepcopy(ids), tmp_path)
    for name, rows in ids.items():
        assert len(rows) == 5, name
    assert_same(planned(model, given), planned(model, ids))


def test_a_parquet_file_of_everybodys_rows(model, ids, tmp_path):
    columns = {key: [row[key] for row in MIXED] for key in ("task", "text")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "mixed.parquet")
    given = {"file": str(tmp_path / "mixed.parquet"), "expert_column": "task"}
    assert_same(planned(model, given), planned(model, ids))


@pytest.mark.parametrize("sort", [None, "asc", "desc"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", ["strings", "chats", "mappings"])
def test_the_batches_are_those_that_gptqmodel_makes(model, ids, form, side, sort, monkeypatch):
    given = FORMS[form](model, ids, None)
    monkeypatch.setattr(model.tokenizer.tokenizer, "padding_side", side)
    plan = planned(model, given, batch_size=2, sort=sort)
    theirs = []
    for rows in given.values():
        theirs += prepare_calibration_dataset(
            SimpleNamespace(tokenizer=model.tokenizer, support_batch_quantize=True),
            calibration_dataset=rows,
            calibration_dataset_sort=sort,
            batch_size=2,
            calibration_data_min_length=0,
        )
    for batch, its in zip(plan.batches, theirs, strict=True):
        assert torch.equal(batch["input_ids"], its["input_ids"])
        assert torch.equal(batch["attention_mask"], its["attention_mask"])
        assert batch["attention_mask"].dtype == its["attention_mask"].dtype


def test_a_concat_size_joins_within_each_expert(model, ids):
    plan = planned(model, TEXTS, concat_size=40)
    expected = {
        name: [token for row in rows for token in [*row, 2]][:-1] for name, rows in ids.items()
    }
    found = {name: [] for name in ids}
    for name, batch in zip(plan.experts, plan.batches, strict=True):
        assert bool(batch["attention_mask"].all()) and batch["input_ids"].shape[1] == 40
        found[name] += batch["input_ids"].flatten().tolist()
    for name, stream in expected.items():
        assert found[name] == stream[: len(stream) // 40 * 40]
        assert plan.counts[name].dropped == len(stream) % 40
    encoded = FORMS["tokens already"](model, ids, None)
    with pytest.raises(EPMQInputError, match="tokens and blocks already"):
        planned(model, encoded, concat_size=40)


def test_rows_that_the_model_cannot_embed_or_that_are_of_others_are_refused(model, ids):
    with pytest.raises(EPMQInputError, match="token id 260 has no embedding .* which has 260"):
        planned(model, ids | {"expert1": [[5, 260]]})
    encoded = TokenRules().encode(read_calibration({"x": [[5]]}, ["x"]))
    with pytest.raises(EPMQInputError, match="without rows: expert0, expert1; not an expert: x"):
        planned(model, encoded)


def test_two_forms_end_in_the_same_checkpoint(family, ids, tmp_path):
    merged, experts = family

    def quantized(calibration, out):
        model = tiny.load(merged, EPMQConfig(group_size=32, experts=experts))
        report = model.quantize(calibration, batch_size=2)["epmq"]
        model.save(str(out))
        return report, stored(out)

    plain, tensors = quantized(ids, tmp_path / "plain")
    mixed = lines(tmp_path / "mixed.jsonl", MIXED)
    options = {"file": str(mixed), "expert_column": "task"}
    tagged, others = quantized(options, tmp_path / "tagged")
    assert plain.tokens == tagged.tokens and plain.rows == tagged.rows == dict.fromkeys(ids, 5)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
