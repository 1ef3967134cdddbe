"""What a preflight reads: the same rows from every model, few of them, and equal models found."""

import pytest
import torch
from stores import CONFIG, average, codes, folder, linears, store, tensors

from epmq_gptq.checks.duplicates import check_duplicates, equal_models
from epmq_gptq.checks.similarity import TaskVectors, judge
from epmq_gptq.checks.weights import BASE, MERGED, Models, Rows
from epmq_gptq.experts.experts import Experts
from epmq_gptq.experts.linears import Linear, StoredWeight
from epmq_gptq.io.checkpoints import Checkpoint


class Fake:
    """Experts as state dicts."""

    def __init__(self, **states):
        self.names, self.states, self.stores = list(states), states, {}

    def store(self, name):
        return self.stores.setdefault(name, store(self.states[name]))

    def adapter(self, name):
        return None

    def rows(self, name, module, start, stop):
        return self.states[name][f"{module}.weight"][start:stop].float()


def models(base=None, merged=None, **states):
    merged = average(list(states.values())) if merged is None else merged
    return Models(store(merged), Fake(**states), None if base is None else store(base))


BASE_STATE = tensors()
A, B = (tensors(seed, like=BASE_STATE) for seed in (1, 2))


# ---- reading -----------------------------------------------------------------------------------


def test_rows_are_those_of_the_layer_however_it_is_stored():
    W = torch.arange(24.0).reshape(6, 4)
    stack = torch.arange(2 * 12 * 4.0).reshape(2, 12, 4)
    state = store({"a.weight": W.half(), "b.weight": W.t().contiguous(), "c": stack})
    merged = Models(state, Fake())
    plain = Linear("a", (6, 4), ("a.weight",))
    assert torch.equal(merged.rows(MERGED, Rows(plain, 1, 3)), W[1:3])
    conv = Linear("b", (4, 6), ("b.weight",), transposed=True)
    assert torch.equal(merged.rows(MERGED, Rows(conv, 2, 5)), W[2:5])
    part = Linear("e.1.up", (6, 4), ("none",), joined=(StoredWeight("c", 1, 1),))
    assert torch.equal(merged.rows(MERGED, Rows(part, 0, 2)), stack[1, 6:8])


def test_a_sample_keeps_its_budget_and_covers_all_depths():
    many = [Linear(f"m{i}", (512, 64), (f"m{i}.weight",)) for i in range(400)]
    merged = {f"m{i}.weight": torch.zeros(1, 64).expand(512, 64) for i in range(400)}
    all_models = Models(store(merged), Fake())
    taken = list(all_models.sample(many, budget=2_000_000))
    assert taken == list(all_models.sample(many, budget=2_000_000))
    price = sum(all_models.price(rows) for rows in taken)
    assert 1_000_000 < price <= 2_000_000
    depths = [int(rows.linear.name[1:]) for rows in taken]
    assert depths == sorted(depths) and depths[0] < 5 and depths[-1] > 395 and len(depths) == 256
    whole = sum(rows.stop - rows.start for rows in all_models.sample(many, budget=10**9))
    assert whole == 400 * 512
    blocks = list(all_models.everything(many[:2]))
    assert [rows.stop - rows.start for rows in blocks] == [512, 512]


def test_what_can_only_be_read_whole_counts_whole():
    convs = [Linear(f"m{i}", (64, 512), (f"m{i}",), transposed=True) for i in range(8)]
    merged = {f"m{i}": torch.zeros(64, 512) for i in range(8)}
    all_models = Models(store(merged), Fake())
    assert all_models.price(Rows(convs[0], 0, 1)) == 64 * 512 * 4
    taken = list(all_models.sample(convs, budget=3 * 64 * 512 * 4))
    assert [(rows.start, rows.stop) for rows in taken] == [(0, 512)] * 3


# ---- equal models ------------------------------------------------------------------------------


def test_models_that_differ_cost_one_block():
    both = models(a=A, b=B, base=BASE_STATE)
    assert equal_models(both, linears()) == []
    assert both.bytes_read == 4 * both.price(Rows(linears()[3], 0, 8))


def test_equal_models_are_found_whatever_their_dtype():
    bf16 = {name: tensor.bfloat16() for name, tensor in A.items()}
    rounded = {name: tensor.float() for name, tensor in bf16.items()}
    rounded["model.layers.0.self_attn.q_proj.weight"][0, 0] = -0.0
    bf16["model.layers.0.self_attn.q_proj.weight"][0, 0] = 0.0
    found = equal_models(models(a=bf16, b=B, c=rounded, merged=B, base=BASE_STATE), linears())
    assert found == [["a", "c"], ["b", MERGED]]
    findings = list(check_duplicates(found))
    assert codes(findings, "error") == ["F17"] and codes(findings, "note") == ["F18"]
    assert "`a`, `c`" in findings[0].subject and "`b` equals the merged model" in findings[1].cause
    allowed = list(check_duplicates(found, allow_duplicates=True))
    assert not codes(allowed, "error") and codes(allowed) == ["F17", "F18"]


@pytest.mark.parametrize("layer", [0, 1])
def test_one_differing_weight_anywhere_tells_two_models_apart(layer):
    other = {name: tensor.clone() for name, tensor in A.items()}
    other[f"model.layers.{layer}.mlp.down_proj.weight"][-1, -1] += 1e-3
    assert equal_models(models(a=A, b=other, merged=B), linears()) == []


def test_one_folder_under_two_names_is_equal_unread(tmp_path):
    """A whole model would be read twice over to see what its path says."""
    same, other = (str(folder(tmp_path / name, state)) for name, state in (("a", A), ("b", B)))
    merged = Checkpoint(same, what=MERGED)
    experts = Experts({"a": same, "b": other, "c": same})
    experts.bind(linears())
    read = Models(merged, experts)
    assert equal_models(read, linears()) == [["a", "c", MERGED]]
    assert read.bytes_read == 2 * read.price(Rows(linears()[3], 0, 8))
    twice = Experts({"a": other, "c": other})
    twice.bind(linears())
    read = Models(merged, twice)
    assert equal_models(read, linears()) == [["a", "c"]]


def test_an_expert_that_is_the_base_is_a_note():
    found = equal_models(models(a=A, b=BASE_STATE, base=BASE_STATE), linears())
    assert found == [["b", BASE]]
    (finding,) = check_duplicates(found)
    assert (finding.level, finding.code) == ("note", "EPMQ-F18")


def test_large_layers_are_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr("epmq_gptq.checks.duplicates._FIRST_BYTES", 64)
    both = models(a=A, b=B, merged=average([A, B]))
    assert equal_models(both, linears()) == []
    assert both.bytes_read == 3 * 64
    same = models(a=A, b=dict(A), merged=B)
    assert equal_models(same, linears()) == [["a", "b"]]


# ---- norms and cosines -------------------------------------------------------------------------


def vectors(all_models, layers=None):
    layers = layers or linears()
    has_base = BASE in all_models.names
    total = sum(linear.inputs * linear.outputs for linear in layers)
    sums = TaskVectors(all_models.experts.names, has_base=has_base, total=total)
    for rows in all_models.everything(layers):
        sums.add({name: all_models.rows(name, rows) for name in all_models.names})
    return sums.to_dict()


def flat(state):
    return torch.cat([state[linear.tensors[0]].reshape(-1) for linear in linears()]).double()


def test_norms_and_cosines_are_those_of_the_whole_vectors():
    table = vectors(models(a=A, b=B, base=BASE_STATE))
    a, b, base, merged = (flat(s) for s in (A, B, BASE_STATE, average([A, B])))
    assert table["share"] == 1 and table["reference"] == "base"
    for name, w in (("a", a), ("b", b)):
        assert table["to_base"][name] == pytest.approx(
            float((w - base).norm() / base.norm()), rel=1e-5
        )
        assert table["to_merged"][name] == pytest.approx(
            float((w - merged).norm() / merged.norm()), rel=1e-5
        )
    expected = torch.nn.functional.cosine_similarity(a - base, b - base, dim=0)
    assert (
        table["cosine"][0][1] == table["cosine"][1][0] == pytest.approx(float(expected), rel=1e-4)
    )
    alone = vectors(models(a=A, b=B))
    assert alone["to_base"] is None and alone["cosine"][0][1] == pytest.approx(-1, abs=1e-4)
    assert not list(judge(table, ["a", "b"])) and not list(judge(alone, ["a", "b"]))


def test_strangers_and_opposites_are_told():
    opposite = {name: 2 * BASE_STATE[name] - A[name] for name in A}
    stranger = tensors(9)
    table = vectors(models(a=A, b=opposite, c=stranger, merged=BASE_STATE, base=BASE_STATE))
    found = list(judge(table, ["a", "b", "c"]))
    assert codes(found, "warning") == ["F19"] and found[0].subject == "expert `c`"
    assert codes(found, "note") == ["F19"] and "-1.00" in found[1].cause
    assert table["cosine"][0][1] == pytest.approx(-1, abs=1e-4)


def test_no_direction_and_no_number_are_none():
    table = vectors(models(a=BASE_STATE, b=A, merged=BASE_STATE))
    assert table["to_merged"]["a"] == 0 and table["cosine"][0] == [None, None]
    broken = {name: tensor * float("nan") for name, tensor in A.items()}
    table = vectors(models(a=broken, b=A, merged=BASE_STATE))
    assert table["to_merged"]["a"] is None and table["to_merged"]["b"] is not None
    assert list(judge(table, ["a", "b"])) == []


def test_experts_of_the_package_are_read_the_same_way(tmp_path):
    merged = Checkpoint(folder(tmp_path / "m", average([A, B]), CONFIG), what=MERGED)
    experts = Experts({n: str(folder(tmp_path / n, s)) for n, s in (("a", A), ("b", B))})
    experts.bind(linears())
    real = Models(merged, experts)
    fake = models(a=A, b=B)
    for rows in real.everything(linears()):
        for name in real.names:
            assert torch.equal(real.rows(name, rows), fake.rows(name, rows))
