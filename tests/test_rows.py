"""Calibration sources: what is a row, how many are taken, and where they are cut."""

import json

import pytest

from epmq_gptq.errors import EPMQInputError
from epmq_gptq.rows import RowSource, fit_rows, read_rows


class Bytes:
    """A tokenizer of one token per character, with a token before each text."""

    chat_template = None

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens
        return {"input_ids": [1, *map(ord, text)]}


class Chat(Bytes):
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and not add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def read(tmp_path, *sources, seed=0):
    made = [RowSource.from_option(source, "`calibration.a`") for source in sources]
    return read_rows(made, expert="a", seed=seed, folder=tmp_path)


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
    assert [row["text"] for row in found.rows] == rows
    assert found.available == len(rows)


def test_rows_of_a_json_lines_file(tmp_path):
    rows = [
        {"text": "one", "label": 3},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"input_ids": [5, 6], "attention_mask": [0, 1]},
    ]
    (found,) = read(tmp_path, json_file(tmp_path, *rows))
    assert found.rows == [{"text": "one"}, *rows[1:]]


def test_column_names_the_rows_of_a_json_lines_file(tmp_path):
    file = json_file(tmp_path, {"text": "no", "question": "yes"})
    (found,) = read(tmp_path, {"file": file, "column": "question"})
    assert found.rows == [{"text": "yes"}]


def test_the_draw_depends_on_the_seed_and_keeps_the_order(tmp_path):
    file = write(tmp_path / "a.txt", *map(str, range(100)))

    def draw(seed):
        (found,) = read(tmp_path, {"file": file, "samples": 10}, seed=seed)
        return [int(row["text"]) for row in found.rows]

    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(set(draw(0))) == 10
    assert draw(0) != draw(1)
    assert len(read(tmp_path, file)[0].rows) == 100


def test_several_sources_are_read_in_their_order(tmp_path):
    first, second = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    assert [each.rows for each in read(tmp_path, first, second)] == [
        [{"text": "a"}],
        [{"text": "b"}],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a row should be a mapping, got list"),
        ('{"text": "  "}', "line 2: the row is empty"),
        ('{"input_ids": []}', "line 2: the row is empty"),
        ('{"question": "a"}', "exactly one of text, messages, input_ids, it has question"),
        ('{"text": "a", "input_ids": [1]}', "name the right one with `column`"),
        ('{"text": 3}', "`text` should be a string"),
        ('{"input_ids": [1, 2.5]}', "`input_ids` should be"),
        ('{"messages": [{"content": "a"}]}', "`role` and `content`"),
        ('{"input_ids": [1], "attention_mask": [1, 1]}', "`attention_mask` has 2 entries"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    file = write(tmp_path / "rows.jsonl", '{"text": "good"}', line)
    with pytest.raises(EPMQInputError) as refused:
        read(tmp_path, file)
    assert message in str(refused.value)
    assert "`calibration.a`: `rows.jsonl`" in str(refused.value)


def test_too_few_rows_are_refused_with_the_numbers(tmp_path):
    file = write(tmp_path / "a.txt", *"abcd")
    with pytest.raises(EPMQInputError, match="`samples` asks for 128 rows, there are 4;"):
        read(tmp_path, {"file": file, "samples": 128})


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "table.json").write_text("[]")
    (tmp_path / "blank.txt").write_text(" \n\n")
    for source, message in [
        ("none.jsonl", "there is no file `none.jsonl`"),
        ("c4", r"for a dataset write `\{dataset: c4, samples: 128\}`"),
        ("latin.txt", "not readable as UTF-8"),
        ("table.json", r"\{dataset: json, data_files: table.json"),
        ("blank.txt", "holds no rows"),
    ]:
        with pytest.raises(EPMQInputError, match=message):
            read(tmp_path, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `file` and `dataset` should be given, got neither"),
        ({"file": "a", "dataset": "b"}, "got both"),
        ({"file": "a.txt", "samples": 0}, "`samples` should be a positive integer, got 0"),
        ({"file": "a.txt", "samples": True}, "`samples` should be a positive integer, got True"),
        ({"file": "a.txt", "max_tokens": -1}, "`max_tokens` should be a positive integer"),
        ({"file": "a.txt", "unit": "word"}, "`unit` should be one of line, paragraph, file"),
        ({"file": "a.txt", "column": "x"}, "`column` is for .jsonl files and datasets"),
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
    source = {"dataset": "json", "data_files": json_file(tmp_path, *rows), "samples": 10}
    (found,) = read(tmp_path, source)
    assert [row["text"] for row in found.rows] == [f"row {i}" for i in range(1, 20, 2)]
    assert found.available == 20
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
    assert found.rows == [{"text": "q"}]
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


# ---- lengths -----------------------------------------------------------------------------------


def test_long_rows_are_cut_and_counted(tmp_path):
    rows = [
        {"text": "abc"},
        {"text": "abcdef"},
        {"input_ids": [1, 2, 3, 4, 5], "attention_mask": [0, 1, 1, 1, 1]},
    ]
    sets = read(tmp_path, {"file": json_file(tmp_path, *rows), "max_tokens": 4})
    fitted = fit_rows(sets, Bytes(), expert="a")
    assert fitted.rows == [
        {"text": "abc"},
        {"input_ids": [1, *map(ord, "abc")]},
        {"input_ids": [1, 2, 3, 4], "attention_mask": [0, 1, 1, 1]},
    ]
    assert (fitted.cut, fitted.tokens) == (2, 12)


def test_the_models_context_cuts_as_well(tmp_path):
    sets = read(tmp_path, write(tmp_path / "a.txt", "abcdef"))
    assert fit_rows(sets, Bytes(), expert="a", limit=100).cut == 0
    assert fit_rows(sets, Bytes(), expert="a", limit=3).rows == [{"input_ids": [1, 97, 98]}]


def test_chat_rows_need_a_template(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}]}
    sets = read(tmp_path, {"file": json_file(tmp_path, row), "max_tokens": 7})
    with pytest.raises(EPMQInputError, match="no chat template"):
        fit_rows(sets, Bytes(), expert="a")
    assert fit_rows(sets, Chat(), expert="a").rows == [{"input_ids": [1, *map(ord, "<user>")]}]
