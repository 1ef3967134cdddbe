"""Calibration in every form that people bring: what is a row, whose it is, how many are taken."""

import json
from pathlib import Path

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from row_files import write

from epmq_gptq.calibration.draws import read_calibration
from epmq_gptq.calibration.sources import RowSource, TaggedSource
from epmq_gptq.errors import EPMQInputError


def read(tmp_path, *sources, seed=0):
    made = [RowSource.from_option(source, "`calibration.a`") for source in sources]
    return read_calibration({"a": made}, ["a"], seed=seed, folder=tmp_path)["a"]


def plain(found):
    """The rows without where they were found."""
    rows = []
    for row in found.rows:
        mask = {} if row.mask is None else {"attention_mask": row.mask}
        rows.append({row.kind: row.value} | mask)
    return rows


def texts(found):
    assert {row.kind for row in found.rows} == {"text"}
    return [row.value for row in found.rows]


def json_file(tmp_path, *rows):
    return write(tmp_path / "rows.jsonl", *(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("unit", "rows"),
    [
        ("line", ["one", " two\u2028half", "three"]),
        ("paragraph", ["one\n two\u2028half", "three"]),
        ("file", ["one\n two\u2028half\n\n   \nthree"]),
    ],
)
def test_rows_of_a_text_file(tmp_path, unit, rows):
    file = write(tmp_path / "a.txt", "one", " two\u2028half", "", "   ", "three")
    (found,) = read(tmp_path, {"file": file, "unit": unit})
    assert texts(found) == rows
    assert found.available == len(rows)


def test_rows_of_a_json_lines_file(tmp_path):
    rows = [
        {"text": "one", "label": 3},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]},
        {"text": None, "input_ids": [5], "messages": None},
    ]
    (found,) = read(tmp_path, json_file(tmp_path, *rows))
    assert plain(found) == [{"text": "one"}, *rows[1:3], {"input_ids": [5]}]
    assert found.rows[3].where.place == "`calibration.a`: `rows.jsonl`, line 4"


def test_column_names_the_rows_of_a_json_lines_file(tmp_path):
    file = json_file(tmp_path, {"text": "no", "question": "yes"})
    (found,) = read(tmp_path, {"file": file, "column": "question"})
    assert texts(found) == ["yes"]


def test_the_draw_depends_on_the_seed_and_keeps_the_order(tmp_path):
    file = write(tmp_path / "a.txt", *map(str, range(100)))

    def draw(seed):
        (found,) = read(tmp_path, {"file": file, "samples": 10}, seed=seed)
        return list(map(int, texts(found)))

    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(set(draw(0))) == 10
    assert draw(0) != draw(1)
    assert len(read(tmp_path, file)[0].rows) == 100
    (own,) = read(tmp_path, {"file": file, "samples": 10, "seed": 1}, seed=0)
    assert list(map(int, texts(own))) == draw(1)


def test_several_sources_are_read_in_their_order(tmp_path):
    first, second = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    assert [texts(each) for each in read(tmp_path, first, second)] == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a row should be a mapping, got list"),
        ('{"text": "  "}', "line 2: the row is empty"),
        ('{"input_ids": []}', "line 2: the row is empty"),
        ('{"question": "a"}', "exactly one of text, messages, input_ids, it has question"),
        ('{"text": "a", "input_ids": [1]}', "Name the right one with `column`"),
        ('{"text": 3}', "`text` should be a string"),
        ('{"input_ids": [1, 2.5]}', "`input_ids` should be"),
        ('{"messages": [{"content": "a"}]}', "`role` and `content`"),
        ('{"role": "user", "content": "a"}', 'Put the chat into a row: `{"messages"'),
        ('{"input_ids": [3, -100]}', "token id -100 is negative"),
        ('{"input_ids": [1, 2], "attention_mask": [0, 0]}', "hides every token"),
        ('{"input_ids": [1, 2], "attention_mask": [0, 2]}', "a list of 0 and 1"),
        ('{"input_ids": [1, 2], "attention_mask": "11"}', "a list of 0 and 1"),
        ('{"input_ids": [1], "attention_mask": [1, 1]}', "`attention_mask` has 2 entries"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "rows.jsonl", '{"text": "good"}', line)
    with pytest.raises(EPMQInputError) as refused:
        read(tmp_path, file)
    assert message in str(refused.value)
    assert "`calibration.a`: `rows.jsonl`" in str(refused.value)
    assert (refused.value.code, refused.value.subject) == ("EPMQ-F32", "expert `a`")


def test_too_few_rows_are_refused_with_the_numbers(tmp_path):
    file = write(tmp_path / "a.txt", *"abcd")
    with pytest.raises(EPMQInputError, match="`samples` asks for 128 rows, there are 4\\."):
        read(tmp_path, {"file": file, "samples": 128})


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "table.json").write_text("[]")
    for name in ("rows.jsonl.gz", "table.csv"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    (tmp_path / "shards").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    for source, message in [
        ("none.jsonl", "there is no file `none.jsonl`"),
        ("c4", r"A dataset is `\{dataset: c4, samples: 128\}`"),
        ("latin.txt", "not readable as UTF-8"),
        ("table.json", r"\{dataset: json, data_files: table.json"),
        ("rows.jsonl.gz", r"\{dataset: json, data_files: rows.jsonl.gz"),
        ({"file": "table.csv", "column": "x"}, r"\{dataset: csv, data_files: table.csv"),
        ("shards", "no file `shards`. It is a folder: list its files"),
        ("a text of many words " * 300, r"are `\{rows: \[...\]\}`"),
        ("blank.txt", "holds no rows"),
        ("cut.parquet", "not readable as a Parquet file"),
    ]:
        with pytest.raises(EPMQInputError, match=message) as refused:
            read(tmp_path, source)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `file`, `dataset` and `rows` should be given, got none"),
        ({"file": "a", "dataset": "b"}, "got file and dataset"),
        ({"file": "a.txt", "samples": 0}, "`samples` should be a positive integer, got 0"),
        ({"file": "a.txt", "samples": True}, "`samples` should be a positive integer, got True"),
        ({"file": "a.txt", "seqlen": -1}, "`seqlen` should be a positive integer"),
        ({"file": "a.txt", "max_tokens": 5}, "`max_tokens` is not an option"),
        ({"file": "a.txt", "concat": "yes"}, "`concat` should be true or false, got 'yes'"),
        ({"rows": ["a"], "concat": True}, "`concat` needs `seqlen`"),
        ({"file": "a.txt", "seed": 1.0}, "`seed` should be an integer"),
        (
            {"dataset": "json", "samples": 1, "data_files": [3]},
            "`data_files[0]` should be a non-empty str",
        ),
        ({"dataset": "pandas", "samples": 1}, "reads pickle files"),
        ({"file": "a.txt", "unit": "word"}, "`unit` should be one of line, paragraph, file"),
        (
            {"file": "a.txt", "column": "x"},
            "`column` is for .jsonl and .parquet files and datasets",
        ),
        ({"file": "a.jsonl", "unit": "file"}, "`unit` is for text files"),
        ({"file": "a.txt", "split": "train"}, "`split` is for datasets"),
        ({"dataset": "c4"}, "`samples` is missing"),
        ({"dataset": ""}, "`dataset` should be a non-empty string"),
        ({"file": "a.txt", "sample": 3}, "`sample` is not an option. Did you mean `samples`?"),
    ],
)
def test_options_of_a_source_are_checked(options, message):
    with pytest.raises(EPMQInputError) as refused:
        RowSource.from_option(options, "`calibration.math`")
    assert message in str(refused.value)
    assert str(refused.value).startswith("`calibration.math`: ")


# ---- datasets ----------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_rows_of_a_dataset_and_its_blanks(tmp_path, datasets):
    rows = [{"text": f"row {i}" if i % 2 else ""} for i in range(20)]
    (tmp_path / "json").mkdir()  # is not what is meant
    source = {"dataset": "json", "data_files": json_file(tmp_path, *rows), "samples": 10}
    (found,) = read(tmp_path, source)
    assert texts(found) == [f"row {i}" for i in range(1, 20, 2)]
    assert (found.available, found.blank) == (20, 10)
    with pytest.raises(EPMQInputError, match="asks for 11 rows, there are 10 .* 10 blank"):
        read(tmp_path, source | {"samples": 11})


def test_a_dataset_of_that_name_is_asked_for(tmp_path, datasets, monkeypatch):
    asked = {}

    def load(name, config, **options):
        asked.update(name=name, config=config, **options)
        return datasets.Dataset.from_dict({"question": ["q"], "text": ["t"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"config": "main", "split": "test", "revision": "abc", "column": "question"}
    (found,) = read(tmp_path, {"dataset": "org/maths", "samples": 1, **options})
    assert texts(found) == ["q"]
    assert asked == {
        "name": "org/maths",
        "config": "main",
        "split": "test",
        "revision": "abc",
        "data_files": None,
    }


def test_a_dataset_that_cannot_be_had_is_one_line(tmp_path, datasets, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("could not reach the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(EPMQInputError) as refused:
        read(tmp_path, {"dataset": "org/maths", "samples": 1})
    assert "`org/maths`: the dataset could not be loaded: could not reach the hub" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


def test_a_dataset_on_this_machine_is_named_without_its_folders(tmp_path, datasets):
    (tmp_path / "broken.json").write_text('{"text": ')
    for options, message in [
        ({"dataset": str(tmp_path / "none")}, "`none`: the dataset could not be loaded: "),
        ({"dataset": "json", "data_files": str(tmp_path / "no.json")}, "Unable to find 'no.json'"),
        ({"dataset": "json", "data_files": "no.json"}, "Unable to find"),
        ({"dataset": "json", "data_files": "broken.json"}, "JSON parse error"),
    ]:
        with pytest.raises(EPMQInputError) as refused:
            read(tmp_path, options | {"samples": 1})
        assert message in str(refused.value) and str(tmp_path) not in str(refused.value)


def test_columns_without_rows_are_not_decoded(datasets):
    columns = {"text": ["x"], "image": [{"bytes": b"no image", "path": None}], "task": ["a"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    assert texts(given(table)[0]) == ["x"]
    options = {"rows": table, "expert_column": "task"}
    assert texts(read_calibration(options, ["a"])["a"][0]) == ["x"]
    with pytest.raises(EPMQInputError, match="no `tsk`, it has text, image, task"):
        read_calibration(options | {"expert_column": "tsk"}, ["a"])


# ---- Parquet -----------------------------------------------------------------------------------


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.name


def test_a_parquet_file_is_read_as_a_json_lines_file(tmp_path):
    rows = [{"text": f"row {i}", "label": i} for i in range(30)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    file = parquet(tmp_path / "rows.parquet", **columns)
    for options in ({}, {"samples": 7}, {"column": "text", "samples": 7}):
        (one,) = read(tmp_path, {"file": file, **options})
        (other,) = read(tmp_path, {"file": json_file(tmp_path, *rows), **options})
        assert plain(one) == plain(other) and one.available == other.available == 30
    ids = parquet(
        tmp_path / "ids.parquet", input_ids=[[5, 6], [7, 8]], attention_mask=[[1, 1], [0, 1]]
    )
    assert plain(read(tmp_path, ids)[0]) == [{"input_ids": [5, 6]}, {"input_ids": [8]}]
    with pytest.raises(EPMQInputError, match="row 0: should have `body`, it has text, label"):
        read(tmp_path, {"file": file, "column": "body"})
    blank = parquet(tmp_path / "blank.parquet", text=["a", None])
    with pytest.raises(EPMQInputError, match="`blank.parquet`, row 1: the row is empty"):
        read(tmp_path, blank)


# ---- what a Python caller gives ----------------------------------------------------------------


def given(value, **options):
    return read_calibration({"a": value}, ["a"], **options)["a"]


IDS = [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    "rows",
    [
        IDS,
        tuple(map(tuple, IDS)),
        [torch.tensor(ids) for ids in IDS],
        [torch.tensor([ids], dtype=torch.int32) for ids in IDS],
        [numpy.array(ids, dtype=numpy.uint16) for ids in IDS],
        [list(numpy.array(ids)) for ids in IDS],
        [{"input_ids": ids} for ids in IDS],
        [{"input_ids": torch.tensor([i]), "attention_mask": torch.tensor([[1] * len(i)])}
         for i in IDS],
        [{"input_ids": [0, *i, 0], "attention_mask": [0, *[True] * len(i), False]} for i in IDS],
        [{"input_ids": numpy.array([*i, -100]), "attention_mask": [1] * len(i) + [0]} for i in IDS],
        (ids for ids in IDS),
        {"rows": IDS},
        {"rows": [{"tokens": ids} for ids in IDS], "column": "tokens"},
        RowSource(rows=IDS),
        [RowSource(rows=IDS[:1]), RowSource(rows=IDS[1:])],
    ],
)  # fmt: skip
def test_every_form_of_token_ids_is_the_same_rows(rows):
    assert [row for each in given(rows) for row in plain(each)] == [{"input_ids": i} for i in IDS]


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("series", [pandas.Series, numpy.array, tuple])
def test_a_series_of_texts_is_rows(series):
    assert texts(given(series(["one", "two"]))[0]) == ["one", "two"]


def test_a_list_may_hold_files(tmp_path):
    first, second = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    sources = [Path(first), {"file": second}, RowSource(rows=["c"])]
    found = given(sources, folder=tmp_path)
    assert [texts(each) for each in found] == [["a"], ["b"], ["c"]]


def test_splits_and_streams_are_not_taken_for_rows(datasets):
    table = datasets.Dataset.from_dict({"text": ["x"]})
    with pytest.raises(EPMQInputError, match="is a mapping of train, .* Give one of its splits"):
        given(datasets.DatasetDict(train=table))
    with pytest.raises(EPMQInputError, match=r"`list\(rows.take\(128\)\)`"):
        given({"rows": table.to_iterable_dataset(), "samples": 1})


@pytest.mark.parametrize(
    "rows",
    [
        ["one", CHAT],
        [{"text": "one"}, {"messages": CHAT}],
        [{"text": "one", "messages": None, "label": 3}, {"text": None, "messages": tuple(CHAT)}],
    ],
)
def test_texts_and_chats_come_bare_or_in_mappings(rows):
    assert plain(given(rows)[0]) == [{"text": "one"}, {"messages": CHAT}]


def test_a_name_is_a_file_and_a_dataset_is_rows(tmp_path, datasets, monkeypatch):
    name = json_file(tmp_path, {"text": "one"}, {"text": "two"})
    for value in (tmp_path / name, str(tmp_path / name), {"file": name}, RowSource(file=name)):
        assert texts(given(value, folder=tmp_path)[0]) == ["one", "two"]
    monkeypatch.chdir(tmp_path)
    assert texts(given(Path(name))[0]) == ["one", "two"]
    table = datasets.Dataset.from_dict({"text": ["one", "", "two", None]})
    (found,) = given(table)
    assert texts(found) == ["one", "two"] and (found.available, found.blank) == (4, 2)
    (drawn,) = given({"rows": table, "samples": 1})
    assert texts(drawn) in (["one"], ["two"])
    with pytest.raises(EPMQInputError, match="asks for 3 rows, there are 2 besides 2 blank"):
        given({"rows": table, "samples": 3})


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        ([1, 2, 3], "EPMQ-F32", r"one list of token ids.* Write `\[\[1, 2, 3\]\]`"),
        (torch.arange(5), "EPMQ-F32", r"one list of token ids.* Write `\[\[0, 1, 2\]\]`"),
        ([], "EPMQ-F22", "expert `a`: it holds no rows"),
        (None, "EPMQ-F22", "expert `a`: should be rows, got None"),
        (7, "EPMQ-F32", "expert `a`: should be a list of rows, got int"),
        (b"text", "EPMQ-F32", "should be a list of rows, got bytes"),
        ("no-such.jsonl", "EPMQ-F22", "there is no file `no-such.jsonl`"),
        ({"fil": "x.jsonl"}, "EPMQ-O02", "expert `a`: `fil` is not an option. Did you mean `file`"),
        (["good", ""], "EPMQ-F32", "expert `a`, row 1: the row is empty"),
        (["good", []], "EPMQ-F32", "expert `a`, row 1: the row is empty"),
        (["good", None], "EPMQ-F32", "expert `a`, row 1: the row is empty"),
        ([[1.5]], "EPMQ-F32", "row 0: a row should be a string"),
        ([[True, False]], "EPMQ-F32", "row 0: a row should be a string"),
        ([torch.rand(3)], "EPMQ-F32", "row 0: a row should be a string"),
        ([torch.ones(2, 3).long()], "EPMQ-F32", "row 0: a row should be a string"),
        ([[[1, 2], [3]]], "EPMQ-F32", "row 0: a row should be a string"),
        ([{"input_ids": [1], "text": "a"}], "EPMQ-F32", "it has input_ids, text"),
        ([{"messages": "hi"}], "EPMQ-F32", "`messages` should be"),
        ([{"messages": [{"role": 3, "content": "x"}]}], "EPMQ-F32", "`messages` should be"),
        (CHAT, "EPMQ-F32", "Put the chat into a row"),
        ({"one", "two"}, "EPMQ-F32", "got set. .* a set has another order in every run"),
        (pyarrow.table({"text": ["x"]}), "EPMQ-F32", "got Table. Give a list of its rows"),
        (pandas.DataFrame({"text": ["x"]}), "EPMQ-F32", "got DataFrame. Give a list of its rows"),
        ({"text": "one row"}, "EPMQ-F32", "is a mapping of text, where rows should be"),
        ({"input_ids": IDS}, "EPMQ-F32", "is a mapping of input_ids, .* Put the rows"),
        (["a.jsonl", "b.txt"], "EPMQ-F32", "should be texts, got `a.jsonl`. In a list a file is a"),
        (["data_free"], "EPMQ-F32", "`data_free` stands in place of the list"),
        ([Path("a.jsonl"), Path("b.jsonl")], "EPMQ-F22", "there is no file `a.jsonl`"),
        ([[4, -1]], "EPMQ-F32", "row 0: token id -1 is negative"),
    ],
)
def test_what_is_no_row_is_refused_by_number(rows, code, message):
    with pytest.raises(EPMQInputError, match=message) as refused:
        given(rows)
    assert refused.value.code == code and refused.value.remedy.endswith((".", "?"))
    assert "expert `a`" in refused.value.subject + refused.value.cause


# ---- whose rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "data_free", "code", "message"),
    [
        ([["x"]], [], "EPMQ-F21", "should map every expert's name to its rows, got list"),
        ({"a": IDS}, [], "EPMQ-F21", "without rows: b"),
        ({"a": IDS, "b": IDS, "c": IDS, 3: IDS}, [], "EPMQ-F21", "not an expert: c, 3"),
        ({"a": IDS, "b": "data_free"}, [], "EPMQ-O03", "expert `b` is `data_free`, and the option"),
        ({"a": IDS, "b": IDS}, ["b"], "EPMQ-O03", "expert `b` has rows, and the option"),
        ({}, ["a", "b"], "EPMQ-F22", "`data_free` for every expert"),
    ],
)
def test_rows_that_cannot_be_attributed_are_refused(calibration, data_free, code, message):
    with pytest.raises(EPMQInputError, match=message) as refused:
        read_calibration(calibration, ["a", "b"], data_free=data_free)
    assert refused.value.code == code


def test_an_expert_without_rows_is_left_out_if_that_is_said():
    for calibration in ({"a": IDS}, {"a": IDS, "b": "data_free"}):
        assert list(read_calibration(calibration, ["a", "b"], data_free=["b"])) == ["a"]
    order = read_calibration({"b": IDS, "a": IDS}, ["a", "b"])
    assert list(order) == ["a", "b"]


# ---- one source for several experts ------------------------------------------------------------

MIXED = [{"task": "ab"[i % 2], "text": f"row {i}"} for i in range(20)]


def tagged(tmp_path, options, experts=("a", "b"), **more):
    return read_calibration(options, list(experts), folder=tmp_path, **more)


@pytest.mark.parametrize("samples", [None, 4])
def test_a_tagged_source_gives_the_rows_of_separate_ones(tmp_path, datasets, samples):
    own = {}
    for name in "ab":
        mine = [json.dumps(row) for row in MIXED if row["task"] == name]
        file = write(tmp_path / f"{name}.jsonl", *mine)
        own[name] = RowSource(file=file, samples=samples)
    apart = read_calibration(own, ["a", "b"], seed=3, folder=tmp_path)
    columns = {key: [row[key] for row in MIXED] for key in ("task", "text")}
    parquet(tmp_path / "mixed.parquet", **columns)
    for place in (
        {"file": json_file(tmp_path, *MIXED)},
        {"file": "mixed.parquet"},
        {"rows": MIXED},
    ):
        options = place | {"expert_column": "task"} | ({"samples": samples} if samples else {})
        found = tagged(tmp_path, options, seed=3)
        assert list(found) == ["a", "b"]
        for name in "ab":
            assert texts(found[name][0]) == texts(apart[name][0])
            assert found[name][0].available == 10
    table = {"rows": datasets.Dataset.from_list(MIXED), "expert_column": "task", "samples": 4}
    for name, (found,) in tagged(tmp_path, table).items():
        assert len(found.rows) == 4
        assert {MIXED[int(text[4:])]["task"] for text in texts(found)} == {name}


def test_values_are_mapped_ignored_or_refused(tmp_path):
    rows = [{"id": value, "text": f"of {value}"} for value in (0, 1, "0", "spam", 7, "spam")]
    options = {"rows": rows, "expert_column": "id", "experts_by_value": {0: "a", "1": "b"}}
    with pytest.raises(EPMQInputError, match=r"`spam` \(2 rows\), `7` \(1 rows\)") as refused:
        tagged(tmp_path, options)
    assert refused.value.code == "EPMQ-F21" and "experts a, b" in str(refused.value)
    found = tagged(tmp_path, options | {"other_values": "ignore"})
    assert texts(found["a"][0]) == ["of 0", "of 0"] and texts(found["b"][0]) == ["of 1"]
    free = {"other_values": "ignore", "data_free": ["c"]}
    assert list(tagged(tmp_path, options | free, experts="abc", data_free=["c"])) == ["a", "b"]
    with pytest.raises(EPMQInputError, match="expert `c` is `data_free`, and the option"):
        tagged(tmp_path, options | free, experts="abc")
    numbers = [{"id": numpy.int64(0), "text": "x"}]
    assert tagged(tmp_path, options | {"rows": numbers}, data_free=["b"])["a"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"expert_column": "tsk"}, "EPMQ-F32", "row 0: there is no `tsk`, it has task, text"),
        ({"rows": [{"task": None, "text": "x"}]}, "EPMQ-F32", "row 0: `task` should name"),
        ({"rows": MIXED[::2]}, "EPMQ-F22", "no row of column `task` is of b"),
        ({"samples": 11}, "EPMQ-F24", "expert `a`: `samples` asks for 11 rows, there are 10"),
        ({"experts_by_value": {"x": "z"}}, "EPMQ-F21", "names `z`"),
        ({"data_free": ["z"]}, "EPMQ-F21", "`data_free` names `z`"),
        ({"experts_by_value": {0: "a", "0": "b"}}, "EPMQ-O01", "every value once, got \\['0', '0'"),
        ({"other_values": "drop"}, "EPMQ-O01", "`other_values` should be one of refuse, ignore"),
        ({"experts_by_value": ["a"]}, "EPMQ-O01", "`experts_by_value` should be a mapping"),
        ({"expert_column": ""}, "EPMQ-O01", "`expert_column` should be a non-empty string"),
        ({"rows": None, "file": "a.txt"}, "EPMQ-O03", "`expert_column` is for .jsonl"),
        ({"rows": ["text"]}, "EPMQ-F32", "row 0: there is no `task`, it has str"),
    ],
)
def test_mistakes_of_a_tagged_source_are_named(tmp_path, change, code, message):
    with pytest.raises(EPMQInputError, match=message) as refused:
        tagged(tmp_path, {"rows": MIXED, "expert_column": "task"} | change)
    assert refused.value.code == code


def test_a_tagged_source_is_one_source_for_all(tmp_path):
    source = TaggedSource(rows=MIXED, expert_column="task")
    assert list(tagged(tmp_path, source)) == ["a", "b"]
    with pytest.raises(EPMQInputError, match="`calibration.a`: `expert_column` is not an option"):
        RowSource.from_option({"rows": MIXED, "expert_column": "task"}, "`calibration.a`")
