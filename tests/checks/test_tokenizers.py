"""Vocabularies are compared as data; nothing of a checkpoint is run."""

import json

import pytest

from epmq_gptq.checks.tokenizers import Tokenizers, read_vocabulary

VOCABULARY = {f"t{i}": i for i in range(10)}


def saved(folder, vocabulary, added=(), kind="BPE"):
    folder.mkdir(parents=True)
    content = {
        "model": {"type": kind, "vocab": vocabulary},
        "added_tokens": [{"id": index, "content": token} for token, index in added],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_the_same_vocabulary_is_no_finding_even_in_another_form(tmp_path):
    merged = saved(tmp_path / "m", VOCABULARY, [("<s>", 10)])
    same = saved(tmp_path / "a", VOCABULARY, [("<s>", 10)])
    list_form = [[token, -1.0] for token in VOCABULARY]
    unigram = saved(tmp_path / "b", list_form, [("<s>", 10)], "Unigram")
    for other in (same, unigram, None):
        assert not list(Tokenizers(merged).compare(other, "expert `x`"))
    assert read_vocabulary(unigram, "x") == VOCABULARY | {"<s>": 10}


def test_differing_ids_are_sampled(tmp_path):
    merged = saved(tmp_path / "m", VOCABULARY)
    moved = {**VOCABULARY, "t1": 2, "t2": 1}
    del moved["t9"]
    other = saved(tmp_path / "a", moved, [("<tool>", 9), ("<pad>", 10)])
    (finding,) = Tokenizers(merged).compare(other, "expert `x`")
    assert (finding.level, finding.code, finding.subject) == ("warning", "EPMQ-F36", "expert `x`")
    assert "2 tokens have other ids ('t1' 2 instead of 1, 't2' 1 instead of 2)" in finding.cause
    assert "lacks 1 tokens" in finding.cause and "'<tool>' 9" in finding.cause


def test_a_file_is_read_once_however_many_experts_have_it(tmp_path, monkeypatch):
    """Twenty vocabularies of 150,000 tokens took 25 seconds of every run."""
    import epmq_gptq.checks.tokenizers as tokenizers

    read = []
    original = tokenizers.read_json

    def counted(folder, *arguments, **options):
        read.append(folder.name)
        return original(folder, *arguments, **options)

    monkeypatch.setattr(tokenizers, "read_json", counted)
    merged = saved(tmp_path / "m", VOCABULARY)
    fewer = dict(list(VOCABULARY.items())[:-1])
    compared = Tokenizers(merged)
    found = [
        list(compared.compare(saved(tmp_path / name, fewer), f"expert `{name}`")) for name in "abc"
    ]
    assert read == ["m", "a"]
    assert [finding.subject for (finding,) in found] == [f"expert `{name}`" for name in "abc"]
    assert all("lacks 1 tokens" in finding.cause for (finding,) in found)


def test_vocab_json_and_binary_files(tmp_path):
    merged, other = tmp_path / "m", tmp_path / "a"
    for folder, index in ((merged, 1), (other, 2)):
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": index}), encoding="utf-8")
    (finding,) = Tokenizers(merged).compare(other, "x")
    assert "1 tokens have other ids" in finding.cause
    for folder in (merged, other):
        (folder / "vocab.json").unlink()
        (folder / "tokenizer.model").write_bytes(folder.name.encode())
    (finding,) = Tokenizers(merged).compare(other, "x")
    assert "other bytes" in finding.cause
    (other / "tokenizer.model").write_bytes(b"m")
    assert not list(Tokenizers(merged).compare(other, "x"))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model": 3}', '{"model": {"vocab": [1, [2]]}}', "\xff"]
)
def test_a_broken_file_stops_nothing(tmp_path, text):
    merged = saved(tmp_path / "m", VOCABULARY)
    other = tmp_path / "a"
    other.mkdir()
    (other / "tokenizer.json").write_bytes(text.encode("latin-1"))
    for finding in Tokenizers(merged).compare(other, "x"):
        assert finding.level == "warning"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    merged = saved(tmp_path / "m", VOCABULARY)
    other = tmp_path / "a"
    other.mkdir()
    (other / "tokenizer.json").symlink_to(merged / "tokenizer.json")
    (finding,) = Tokenizers(merged).compare(other, "x")
    assert finding.code == "EPMQ-F10"
    for folder in (merged, other):
        (folder / "tokenizer.json").unlink()
    (merged / "tokenizer.model").write_bytes(b"m")
    (other / "tokenizer.model").symlink_to(merged / "tokenizer.model")
    (finding,) = Tokenizers(merged).compare(other, "x")
    assert finding.code == "EPMQ-F10"
