"""Merging from disk to disk: same numbers as in memory, one tensor at a time, whole or absent."""

import json
import weakref

import pytest
import torch
from merging_models import assert_same, floating, load_model, make_models, save_model, save_models
from safetensors.torch import save_file

from epmq_gptq.errors import EPMQNumericalError
from epmq_gptq.io.checkpoints import Checkpoint
from epmq_gptq.merging import RECORD_NAME, merge, merge_methods, merge_state_dicts
from epmq_gptq.merging.shards import Entry, ShardWriter

PARAMETERS = {"wudi": {"iterations": 3}, "ties_per_tensor": {"density": 0.4}}
METHODS = sorted(name for name, about in merge_methods().items() if not about["needs_calibration"])


def _listing(root):
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_merge_in_memory(tmp_path, method, dtype, small_blocks):
    base, experts = make_models(3, dtype=dtype)
    base_path, paths = save_models(tmp_path, base, experts)
    options = PARAMETERS.get(method)
    result = merge(
        method, base=base_path, experts=paths, out=tmp_path / "merged", parameters=options
    )
    written = load_model(result.out)
    assert_same(written, merge_state_dicts(method, base, experts, options))
    assert result.tensors == len(base)
    assert result.bytes == sum(t.nbytes for t in base.values())


@pytest.mark.parametrize("method", METHODS)
def test_shards_in_and_out_change_nothing(tmp_path, method):
    base, experts = make_models(2)
    one = merge(
        method,
        **dict(zip(("base", "experts"), save_models(tmp_path / "1", base, experts), strict=True)),
        out=tmp_path / "one",
        parameters=PARAMETERS.get(method),
    )
    many = merge(
        method,
        **dict(
            zip(
                ("base", "experts"),
                save_models(tmp_path / "3", base, experts, shards=3),
                strict=True,
            )
        ),
        out=tmp_path / "many",
        parameters=PARAMETERS.get(method),
        max_shard_bytes=300,
    )
    assert_same(load_model(many.out), load_model(one.out))
    assert not (one.out / "model.safetensors.index.json").exists()
    index = json.loads((many.out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)
    assert index["metadata"]["total_size"] == many.bytes
    assert len(set(index["weight_map"].values())) > 1
    # Our own reader checks the index against the shards.
    assert len(Checkpoint(many.out, what="merge")) == len(base)


def test_one_tensor_name_is_alive_at_a_time(tmp_path, monkeypatch):
    base, experts = make_models(3)
    base_path, paths = save_models(tmp_path, base, experts, shards=2)
    alive, most, reads = {}, 0, []
    real = Checkpoint.read

    def read(self, name):
        nonlocal most
        # A copy: the views that safetensors hands out share one mapped storage.
        tensor = real(self, name).clone()
        key = (self.what, name, len(reads))
        alive[key] = weakref.ref(tensor, lambda _: alive.pop(key))
        reads.append(name)
        assert {other for _, other, _ in alive} == {name}
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    for method in METHODS:
        del reads[:]
        merge(
            method,
            base=base_path,
            experts=paths,
            out=tmp_path / f"merged-{method}",
            parameters=PARAMETERS.get(method),
        )
        about = merge_methods()[method]
        models = len(experts) + about["needs_base"]
        weights = [name for name in reads if name in floating(base)]
        assert len(weights) == models * about["passes"] * len(floating(base))
    assert most == len(experts) + 1


def test_record_and_companions(tmp_path):
    base, experts = make_models(2, dtype=torch.bfloat16)
    base_path, paths = save_models(tmp_path, base, experts, torch_dtype="float32", eos=[1, 2])
    steps = []
    result = merge(
        "task_arithmetic",
        base=base_path,
        experts=paths,
        out=tmp_path / "merged",
        parameters={"lam": 1},
        progress=lambda done, total, what: steps.append((done, total)),
    )
    record = json.loads((result.out / RECORD_NAME).read_text())
    assert record == result.record
    assert str(tmp_path) not in json.dumps(record)
    assert record["method"] == result.method == "task_arithmetic"
    assert record["parameters"] == result.parameters == {"lam": 1.0}
    assert record["reference"].startswith("https://arxiv.org/")
    digest = Checkpoint(base_path, what="base").digest()
    assert record["base"] == {"name": "base", "revision": None, "digest": digest}
    assert list(record["experts"]) == ["a", "b"]
    assert record["experts"]["b"]["name"] == "expert-b"
    total = len(floating(base)) + 3
    assert steps == [(i + 1, total) for i in range(total)]

    # The dtype follows what was written; all else of the base's configuration stays.
    config = json.loads((result.out / "config.json").read_text())
    assert config == {"model_type": "toy", "torch_dtype": "bfloat16", "eos": [1, 2]}
    assert json.loads((result.out / "tokenizer.json").read_text()) == {"of": "base"}
    assert (result.out / "chat_template.jinja").exists()
    assert not (result.out / "modeling_toy.py").exists()


def test_average_without_a_base_takes_after_the_first_expert(tmp_path):
    _, experts = make_models(2)
    paths = {n: save_model(tmp_path / n, s) for n, s in experts.items()}
    result = merge("average", base=None, experts=paths, out=tmp_path / "merged")
    assert json.loads((result.out / "tokenizer.json").read_text()) == {"of": "a"}
    assert (result.out / "config.json").read_text() == (paths["a"] / "config.json").read_text()
    assert result.record["base"] is None
    assert_same(load_model(result.out), merge_state_dicts("average", None, experts))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_tensor_is_named_and_leaves_no_output(tmp_path, method, bad, small_blocks):
    base, experts = make_models(2)
    experts["b"]["model.layers.0.up.weight"][7, 2] = bad
    base_path, paths = save_models(tmp_path, base, experts)
    before = _listing(tmp_path)
    with pytest.raises(EPMQNumericalError, match=r"expert `b`.*up\.weight.*\[7, 2\]") as caught:
        merge(method, base=base_path, experts=paths, out=tmp_path / "merged")
    assert (caught.value.expert, caught.value.code) == ("b", "EPMQ-F08")
    assert caught.value.module == "model.layers.0.up.weight"
    assert _listing(tmp_path) == before


def test_a_non_finite_base_is_named():
    base, experts = make_models(1)
    base["model.scale"] = torch.tensor(float("nan"))
    with pytest.raises(EPMQNumericalError, match="base: tensor `model.scale`") as caught:
        merge_state_dicts("task_arithmetic", base, experts)
    assert caught.value.expert is None


def test_a_result_beyond_the_dtype_is_an_error():
    base = {"w": torch.zeros(4, dtype=torch.float16)}
    experts = {"a": {"w": torch.full((4,), 60000.0, dtype=torch.float16)}}
    with pytest.raises(EPMQNumericalError, match="merged tensor `w`.*float16") as caught:
        merge_state_dicts("task_arithmetic", base, experts, {"lam": 2.0})
    assert caught.value.code == "EPMQ-F09"


def test_an_interrupt_leaves_no_output_and_the_former_one_whole(tmp_path):
    base, experts = make_models(1)
    base_path, paths = save_models(tmp_path, base, experts)
    former = save_model(tmp_path / "merged", base)
    before = _listing(tmp_path), _listing(former)

    def interrupt(done, total, what):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(
            "average",
            base=base_path,
            experts=paths,
            out=former,
            overwrite=True,
            progress=interrupt,
        )
    assert (_listing(tmp_path), _listing(former)) == before
    assert_same(load_model(former), base)


def test_overwrite_replaces_the_whole_folder(tmp_path):
    base, experts = make_models(1)
    base_path, paths = save_models(tmp_path, base, experts)
    former = save_model(tmp_path / "merged", base, shards=2)
    result = merge("average", base=base_path, experts=paths, out=former, overwrite=True)
    assert "model-00001-of-00002.safetensors" not in _listing(result.out)
    assert_same(load_model(result.out), experts["a"])
    assert _listing(tmp_path) == ["base", "expert-a", "merged"]


def test_an_empty_folder_is_a_new_one(tmp_path):
    base, experts = make_models(1)
    base_path, paths = save_models(tmp_path, base, experts)
    (tmp_path / "merged").mkdir()
    result = merge("average", base=base_path, experts=paths, out=tmp_path / "merged")
    assert (result.out / "model.safetensors").is_file()


def test_shards_hold_any_dtype_aligned(tmp_path):
    state = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(3).bfloat16(),
        "c": torch.randn(3, dtype=torch.float64),
        "d": torch.randn(1),
        "e": torch.arange(3),
        "f": torch.randn(5).half(),
        "g": torch.randn(3).to(torch.float8_e4m3fn),
        "h": torch.zeros(0, 2),
        "i": torch.tensor(1.5),
    }
    save_file(state, tmp_path / "official.safetensors")
    infos = Checkpoint(tmp_path, what="official")
    entries = [Entry(name, infos.info(name).shape, infos.info(name).dtype) for name in state]
    ours = tmp_path / "ours"
    ours.mkdir()
    writer = ShardWriter(ours, entries, 10**9)
    for name in reversed(list(state)):
        writer.write(name, state[name])
    writer.finish()
    assert_same(load_model(ours), state)
    data = (ours / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, place in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert place["data_offsets"][0] % state[name].element_size() == 0


def test_a_shard_is_as_large_as_allowed_unless_one_tensor_is_larger(tmp_path):
    entries = [Entry(str(i), (size,), "U8") for i, size in enumerate([4, 4, 4, 20, 1, 9])]
    ShardWriter(tmp_path, entries, 10)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {}
    for name, file in index["weight_map"].items():
        shards.setdefault(file, []).append(name)
    assert list(shards.values()) == [["0", "1"], ["2"], ["3"], ["4", "5"]]
