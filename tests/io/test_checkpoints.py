"""Checkpoints are read lazily and only from where they say they are."""

import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from epmq_gptq.errors import CODES, EPMQInputError
from epmq_gptq.io import checkpoints
from epmq_gptq.io.checkpoints import Checkpoint, describe_source, resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4).bfloat16()}


def single(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    return folder


def sharded(folder: Path, weight_map=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, (key, tensor) in zip(names, tensors().items(), strict=True):
        save_file({key: tensor}, folder / name)
    index = {"weight_map": weight_map or dict(zip(tensors(), names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("build", [single, sharded])
def test_reads_tensor_by_tensor(build, tmp_path):
    checkpoint = Checkpoint(build(tmp_path / "m"), what="expert `x`")
    assert sorted(checkpoint) == ["a.weight", "b.weight"] and len(checkpoint) == 2
    info = checkpoint.info("b.weight")
    assert (info.shape, info.dtype, info.torch_dtype, info.numel) == (
        (4,),
        "BF16",
        torch.bfloat16,
        4,
    )
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.read(name), tensor)
    checkpoint.close()
    assert torch.equal(checkpoint.read("a.weight"), tensors()["a.weight"])
    with pytest.raises(EPMQInputError, match=r"expert `x`: tensor `c` is missing"):
        checkpoint.read("c")


def test_the_digest_is_that_of_the_weights(tmp_path):
    one = Checkpoint(single(tmp_path / "one"), what="x")
    same = Checkpoint(single(tmp_path / "same"), what="x")
    assert one.digest() == same.digest() and len(one.digest()) == 64
    changed = tensors()
    changed["b.weight"][0] = 2
    save_file(changed, tmp_path / "same" / "model.safetensors")
    assert Checkpoint(tmp_path / "same", what="x").digest() != one.digest()


def test_reads_rows_alone(tmp_path):
    checkpoint = Checkpoint(single(tmp_path), what="x")
    weight = tensors()["a.weight"]
    for start, stop in ((0, 2), (1, 2), (0, 0), (2, 2)):
        assert torch.equal(checkpoint.read_rows("a.weight", start, stop), weight[start:stop])
    with pytest.raises(EPMQInputError, match="tensor `c` is missing"):
        checkpoint.read_rows("c", 0, 1)


def test_rows_are_read_where_the_rest_of_the_tensor_is_not(tmp_path):
    """Of 64 MB, mapped and not loaded, sixteen rows make the process grow by no megabyte."""
    (tmp_path / "model.safetensors").write_bytes(
        raw_shard(header("big", "F32", [1 << 14, 1 << 10], 1 << 26))
    )
    os.truncate(
        tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size + (1 << 26)
    )
    checkpoint = Checkpoint(tmp_path, what="x")
    before = resident()
    rows = checkpoint.read_rows("big", 100, 116)
    assert rows.shape == (16, 1 << 10) and float(rows.sum()) == 0
    assert resident() - before < 1 << 20
    assert float(checkpoint.read("big").sum()) == 0
    assert resident() - before > 1 << 25


def resident() -> int:
    """Bytes of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def hashing_threads():
    return [thread for thread in threading.enumerate() if thread.name == "epmq-digests"]


def test_digests_are_made_meanwhile(tmp_path, monkeypatch):
    one, other = (Checkpoint(single(tmp_path / name), what=name) for name in ("one", "other"))
    with checkpoints.hashing_meanwhile([one, other]):
        pass
    assert not hashing_threads()
    opened = []
    monkeypatch.setattr("builtins.open", lambda *call, **how: opened.append(call))
    assert one.digest() and other.digest() and not opened


def test_hashing_ends_with_what_it_ran_beside_and_finds_no_fault(tmp_path, monkeypatch):
    checkpoint = Checkpoint(single(tmp_path / "one"), what="one")
    gone = Checkpoint(single(tmp_path / "gone"), what="gone")
    (tmp_path / "gone" / "model.safetensors").unlink()
    with checkpoints.hashing_meanwhile([gone, checkpoint]):  # reading fails, nothing is said
        pass
    begun = threading.Event()

    class Endless:
        """A shard that never ends."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size):
            begun.set()
            return b"x"

    other = Checkpoint(single(tmp_path / "other"), what="other")
    monkeypatch.setattr(checkpoints, "open", Endless, raising=False)
    with pytest.raises(ZeroDivisionError), checkpoints.hashing_meanwhile([other]):
        begun.wait(10)
        raise ZeroDivisionError
    assert not hashing_threads()
    monkeypatch.undo()
    assert other.digest() == Checkpoint(tmp_path / "one", what="x").digest()


def test_reading_ahead_names_the_bytes_of_the_tensor(tmp_path, monkeypatch):
    single(tmp_path)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append(call))
    checkpoint = Checkpoint(tmp_path, what="expert `math`")
    for name, tensor in tensors().items():
        checkpoint.prefetch(name)
        _, start, length, advice = asked.pop()
        written = (tmp_path / "model.safetensors").read_bytes()[start : start + length]
        assert written == tensor.view(torch.uint8).numpy().tobytes()
        assert advice == os.POSIX_FADV_WILLNEED
    monkeypatch.delattr(os, "posix_fadvise")  # elsewhere than on Linux
    checkpoint.prefetch("a.weight")


def test_a_dtype_that_torch_does_not_know_is_named(tmp_path):
    shard = raw_shard(header("odd", "F6_E2M3", [4], 3), b"abc")
    (tmp_path / "model.safetensors").write_bytes(shard)
    checkpoint = Checkpoint(tmp_path, what="x")
    assert checkpoint.info("odd").torch_dtype is None
    for read in (checkpoint.read, lambda name: checkpoint.read_rows(name, 0, 4)):
        with pytest.raises(EPMQInputError, match=r"tensor `odd` \(F6_E2M3\) cannot be read") as e:
            read("odd")
        assert e.value.code == "EPMQ-F06"


# ---- folders that cannot be used -----------------------------------------------------------------

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def header(name: str, dtype: str, shape: list[int], size: int) -> dict:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def raw_shard(header: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def write(file: Path, content: bytes | str | dict) -> None:
    if isinstance(content, dict):
        content = json.dumps(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def mapped(**shards: str):
    """Two shards and an index with this weight map."""
    return lambda folder: sharded(folder, {name.replace("_", "."): f for name, f in shards.items()})


def indexed(content: bytes | str | dict):
    """Two shards and an index with this content."""
    return lambda folder: write(sharded(folder) / "model.safetensors.index.json", content)


def linked(name: str, to: str | Path):
    """A checkpoint of which one file is a link."""

    def build(folder: Path) -> None:
        single(folder.parent / "elsewhere")
        write(folder.parent / "elsewhere" / "config.json", {})
        if name != "model.safetensors":
            single(folder)
        folder.mkdir(exist_ok=True)
        os.symlink(to, folder / name)

    return build


def cut(size: int):
    """One shard, cut after so many bytes."""

    def build(folder: Path) -> None:
        single(folder)
        os.truncate(folder / "model.safetensors", size)

    return build


def holding(**files: bytes | str | dict):
    """Nothing but these files; `__` stands for a dot."""
    return lambda folder: [write(folder / n.replace("__", "."), f) for n, f in files.items()]


def beside(**files: bytes | str | dict):
    """A whole checkpoint, and these files."""
    return lambda folder: (single(folder), holding(**files)(folder))


def both_shards_hold_it(folder: Path) -> None:
    sharded(folder)
    save_file(tensors(), folder / TWO)


def a_shard_is_gone(folder: Path) -> None:
    (sharded(folder) / TWO).unlink()


def a_file_in_place_of_the_folder(folder: Path) -> None:
    folder.write_text("")


# (what was done to the folder, the code, what the error names, words of the cause)
UNUSABLE = {
    "parent": (mapped(a_weight="../m/model.safetensors"), "F10", "index", "`../m/.*` escapes"),
    "absolute": (mapped(a_weight="/etc/x.safetensors"), "F10", "index", "`/etc/.*` escapes"),
    "nested": (mapped(a_weight="sub/x.safetensors"), "F10", "index", "`sub/.*` escapes"),
    "backslash": (mapped(a_weight="..\\x.safetensors"), "F10", "index", "escapes"),
    "bin shard": (mapped(a_weight="pytorch_model.bin"), "F10", "index", "escapes"),
    "dots": (mapped(a_weight=".."), "F10", "index", "`..` escapes"),
    "control": (mapped(a_weight="a\nb\x1b.safetensors"), "F10", "index", "escapes"),
    "surrogate": (mapped(a_weight="\ud800.safetensors"), "F10", "index", "escapes"),
    "long name": (mapped(a_weight="x" * 300 + ".safetensors"), "F15", "x.safetensors", "too long"),
    "linked": (
        linked("model.safetensors", "../elsewhere/model.safetensors"),
        *("F10", "`model.safetensors`", "is a link that escapes the checkpoint"),
    ),
    "dangling": (
        linked("model.safetensors", "../../blobs/gone"),
        *("F15", "`model.safetensors`", "is a link that leads nowhere"),
    ),
    "circle": (
        linked("model.safetensors", "model.safetensors"),
        *("F15", "`model.safetensors`", "is a link that leads nowhere"),
    ),
    "linked index": (
        linked("model.safetensors.index.json", "../elsewhere/config.json"),
        *("F10", "index", "is a link that escapes the checkpoint"),
    ),
    "not json": (indexed("{"), "F13", "index", "is not readable as JSON"),
    "deep json": (indexed("[" * 100_000), "F13", "index", "is not readable as JSON"),
    "latin-1": (indexed(b'{"\xe9": 1}'), "F13", "index", "is not UTF-8"),
    "list": (indexed("[]"), "F13", "index", "should be a JSON object, got list"),
    "no map": (indexed({}), "F11", "index", "`weight_map` of .* should map"),
    "empty map": (indexed({"weight_map": {}}), "F11", "index", "`weight_map` of .* should map"),
    "a list": (indexed({"weight_map": ["a"]}), "F11", "index", "`weight_map` of .* should map"),
    "numbers": (indexed({"weight_map": {"a": 1}}), "F11", "index", "`weight_map` of .* should map"),
    "wrong shard": (mapped(a_weight=ONE, b_weight=ONE), "F11", "index", "b.weight.*lacks it"),
    "unknown name": (mapped(a_weight=ONE, b_weight=TWO, c=TWO), "F11", "index", "`c`.*lacks it"),
    "unmapped": (
        lambda folder: save_file(tensors(), sharded(folder, {"a.weight": ONE}) / ONE),
        *("F11", "index", "`b.weight` is in a shard but not in"),
    ),
    "twice": (both_shards_hold_it, "F11", "index", "`a.weight` is in both `.*1-of.*` and `.*2-of"),
    "gone": (a_shard_is_gone, "F11", TWO, f"`{TWO}` is missing"),
    "two models": (
        lambda folder: (single(folder), sharded(folder)),
        *("F11", "index", "holds `model.safetensors` and an index of other shards"),
    ),
    "empty file": (cut(0), "F12", "model.safetensors", r"\(0 bytes\) is damaged"),
    "cut length": (cut(4), "F12", "model.safetensors", r"\(4 bytes\) is damaged"),
    "cut header": (cut(60), "F12", "model.safetensors", r"\(60 bytes\) is damaged"),
    "cut data": (cut(160), "F12", "model.safetensors", r"\(160 bytes, 168 expected\) is damaged"),
    "no header": (holding(model__safetensors=b"\xff" * 50), "F12", "safetensors", "too large"),
    "trailing": (
        holding(model__safetensors=raw_shard(header("a", "F32", [1], 4), b"12345")),
        *("F12", "model.safetensors", "is damaged"),
    ),
    "overflow": (
        holding(model__safetensors=raw_shard(header("a", "F32", [1 << 62, 9], 4), b"1234")),
        *("F12", "model.safetensors", "is damaged"),
    ),
    "pickle": (
        holding(pytorch_model__bin=b"not even a pickle"),
        *("F14", "expert `x`", "it holds `pytorch_model.bin`, and pickle files are never opened"),
    ),
    "gguf": (holding(model_q4__gguf=b"GGUF"), "F14", "expert `x`", "`model_q4.gguf`, a format"),
    "adapter": (
        holding(adapter_model__safetensors=b"", adapter_config__json={}),
        *("F34", "expert `x`", "holds an adapter .* only together with its base"),
    ),
    "pickled adapter": (
        holding(adapter_model__bin=b"", adapter_config__json={}),
        *("F34", "expert `x`", "holds an adapter .* only together with its base"),
    ),
    "bare adapter": (holding(adapter_model__safetensors=b""), "F34", "expert `x`", "an adapter"),
    "adapter beside a model": (
        beside(adapter_model__safetensors=b"", adapter_config__json={}),
        *("F34", "expert `x`", "beside a model"),
    ),
    "empty": (lambda folder: folder.mkdir(), "F15", "expert `x`", "no safetensors weights in `m`"),
    "nothing": (lambda folder: None, "F15", "expert `x`", "`m` is not a folder"),
    "file": (a_file_in_place_of_the_folder, "F15", "expert `x`", "`m` is not a folder"),
    "shard is a folder": (
        lambda folder: (folder / "model.safetensors").mkdir(parents=True),
        *("F15", "model.safetensors", "is not a regular file"),
    ),
}


@pytest.mark.parametrize(("build", "code", "subject", "cause"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_read_is_named(tmp_path, build, code, subject, cause):
    build(tmp_path / "m")
    with pytest.raises(EPMQInputError, match=cause) as caught:
        Checkpoint(tmp_path / "m", what="expert `x`")
    error = caught.value
    assert error.code == f"EPMQ-{code}" and subject in error.subject
    assert error.cause.startswith("expert `x`: ") and error.remedy.endswith(".")
    assert str(tmp_path) not in str(error)


def test_what_is_unreadable_for_this_user_is_named(tmp_path, monkeypatch):
    """Rights mean nothing to root, so the system's answers are put in its mouth."""
    single(tmp_path / "m")

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    for place, answer in (
        ("epmq_gptq.io.folders.os.listdir", denied),
        ("epmq_gptq.io.folders.os.access", lambda *arguments: False),
        ("epmq_gptq.io.folders.Path.is_file", denied),
        ("epmq_gptq.io.checkpoints.safe_open", denied),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, answer)
            with pytest.raises(EPMQInputError, match="cannot be read") as caught:
                Checkpoint(tmp_path / "m", what="expert `x`")
        assert caught.value.code == "EPMQ-F15" and str(tmp_path) not in str(caught.value)


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("epmq_gptq.io.checkpoints.MAX_TENSORS", 1)
    for build in (single, sharded):
        with pytest.raises(EPMQInputError, match="hold more than 1 tensors") as caught:
            Checkpoint(build(tmp_path / build.__name__), what="x")
        assert caught.value.code == "EPMQ-F12"


@pytest.mark.parametrize(
    "build",
    [
        beside(pytorch_model__bin=b"pickle", training_args__bin=b"pickle", model__gguf=b""),
        beside(
            **{
                "model__safetensors__index__json": {
                    "weight_map": dict.fromkeys(tensors(), "model.safetensors")
                }
            }
        ),
        lambda folder: single(folder.parent / "m" / "sub") and linked_inside(folder),
    ],
    ids=["pickles beside it", "an index of one file", "a link inside"],
)
def test_what_is_fine_is_read(tmp_path, build):
    build(tmp_path / "m")
    checkpoint = Checkpoint(tmp_path / "m", what="x")
    assert torch.equal(checkpoint.read("a.weight"), tensors()["a.weight"])


def linked_inside(folder: Path) -> None:
    os.symlink("sub/model.safetensors", folder / "model.safetensors")


# ---- whatever a stranger writes ------------------------------------------------------------------

OPENED: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


sys.addaudithook(_audit)


def only_our_errors(folder: Path) -> None:
    """Open a checkpoint and read it whole: that succeeds, or fails as an EPMQInputError."""
    global OPENED
    OPENED = []
    real = checkpoints.safe_open

    def watched(file, **options):
        OPENED.append(str(file))
        return real(file, **options)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "safe_open", watched)
            checkpoint = Checkpoint(folder, what="expert `x`")
            checkpoint.config()
            for name in checkpoint:
                checkpoint.read(name)
                if checkpoint.info(name).shape:
                    checkpoint.read_rows(name, 0, checkpoint.info(name).shape[0])
            checkpoint.close()
    except EPMQInputError as error:
        assert error.code in CODES and len(str(error).splitlines()) == 1
        str(error).encode()
    finally:
        opened, OPENED = OPENED, None
    # Besides the folder's own files only what Python imports on the way.
    outside = [f for f in opened if not os.path.realpath(f).startswith(f"{folder}{os.sep}")]
    assert not [f for f in outside if "/etc/" in f or str(folder.parent) in f], outside


texts = st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F6_E2M3", "F4", "I64", "BOOL"])
        | texts,
        "shape": st.lists(st.integers(-1, 3) | st.sampled_from([1 << 31, 1 << 63]), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3),
    },
)
headers = st.dictionaries(texts | st.just("__metadata__"), entries | values, max_size=4) | values
shard_names = st.sampled_from(
    [ONE, TWO, "../s.safetensors", "/etc/passwd", "s/../../s.safetensors", "l.safetensors", "."]
)
weight_maps = st.dictionaries(st.sampled_from(["c", *tensors()]), shard_names, max_size=3)
strange_maps = st.dictionaries(texts, shard_names | texts, max_size=3) | values
indices = (weight_maps | strange_maps).map(lambda weight_map: {"weight_map": weight_map})


@settings(max_examples=200, deadline=None)
@given(
    shard=st.binary(max_size=64)
    | st.builds(
        lambda header, data, length: raw_shard(header, data, length),
        headers,
        st.binary(max_size=40),
        st.none() | st.integers(0, 2**64 - 1),
    ),
    config=st.binary(max_size=16) | values.map(lambda value: json.dumps(value).encode()),
)
def test_any_header_is_read_or_refused(shard, config):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "m"
        write(folder / "model.safetensors", shard)
        write(folder / "config.json", config)
        only_our_errors(folder)


@settings(max_examples=200, deadline=None)
@given(
    index=indices.map(lambda value: json.dumps(value).encode())
    | values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=32)
)
def test_any_index_is_read_or_refused(index):
    with tempfile.TemporaryDirectory() as place:
        folder = sharded(Path(place).resolve() / "m")
        shutil.copyfile(folder / ONE, folder.parent / "s.safetensors")
        os.symlink("../s.safetensors", folder / "l.safetensors")
        write(folder / "model.safetensors.index.json", index)
        only_our_errors(folder)


# ---- sources -------------------------------------------------------------------------------------


def test_a_local_folder_is_named_by_its_last_part_only(tmp_path):
    source = resolve_source(single(tmp_path / "private" / "math"), what="expert `m`")
    assert (source.name, source.revision) == ("math", None)
    assert source.path == (tmp_path / "private" / "math").resolve()


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "just-a-name", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(spec):
    with pytest.raises(EPMQInputError, match=r"expert `m`: `.*` is neither an existing folder nor"):
        resolve_source(spec, what="expert `m`")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache that holds one revision of one repository."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "models--org--math"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    save_file(tensors(), repository / "blobs" / "blob")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/blob", snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return snapshot


@pytest.mark.parametrize("spec", ["org/math", "org/math@main", f"org/math@{COMMIT}"])
def test_a_hub_id_resolves_to_the_commit_it_stands_for(hub_cache, spec):
    source = resolve_source(spec, what="expert `m`")
    assert (source.name, source.revision, source.path) == ("org/math", COMMIT, hub_cache)
    # Shards of the cache are links into the blobs of the same repository.
    assert torch.equal(Checkpoint(source.path, what="x").read("a.weight"), tensors()["a.weight"])
    assert describe_source(hub_cache).name == "org/math"
    assert describe_source(hub_cache).revision == COMMIT


def test_a_hub_id_that_cannot_be_had_is_one_line(hub_cache):
    with pytest.raises(
        EPMQInputError, match=r"expert `m`: `org/other@v1` could not be fetched"
    ) as e:
        resolve_source("org/other@v1", what="expert `m`")
    assert "\n" not in str(e.value)
