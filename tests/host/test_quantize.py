"""The main job, judged from the saved file: eq. 12 in float64 against a float64 GPTQ on W*."""

from __future__ import annotations

import pytest
import tiny
import torch
from gptqmodel.quantization.config import GPTQConfig
from judge import codes, dequantized, gptq64, linear_inputs, stored
from runs import differing, gar_order, run
from safetensors.torch import load_file

from epmq_gptq import EPMQConfig
from epmq_gptq.host import task
from epmq_gptq.host.task import EPMQ
from epmq_gptq.kernels.factor import torch_inverse_factor
from epmq_gptq.kernels.gram import torch_gram_update
from epmq_gptq.method import statistics
from epmq_gptq.method.target import objective

BITS, GROUP, ALPHA = 4, 32, 0.1


class Case:
    """Three experts with unequal calibration, quantized once by E-PMQ and once by plain GPTQ."""

    def __init__(self, folder):
        self.folder = folder
        self.merged, self.experts = tiny.family(folder, experts=3)
        self.rows = {
            name: tiny.rows(4 + 3 * index, 30 + 12 * index, seed=index)
            for index, name in enumerate(self.experts)
        }
        self.out = folder / "epmq"
        config = EPMQConfig(
            profile="paper", bits=BITS, group_size=GROUP, experts=self.experts, alpha=ALPHA
        )
        self.result = run(self.merged, config, self.rows, self.out)
        self.report = self.result["epmq"]
        self.weights = dequantized(self.out)
        self.inputs = linear_inputs(self.merged, self.weights, self.rows)

    def quadratics(self, module):
        """W_m, [(W_i, H_i)], λ and the optimum W* of eq. 12, all float64 and from scratch."""
        stored = f"{module}.weight"
        W_m = load_file(self.merged / "model.safetensors")[stored].double()
        pairs = []
        for name, folder in self.experts.items():
            X = self.inputs[module][name]
            pairs.append((load_file(folder / "model.safetensors")[stored].double(), X.T @ X))
        H = sum(H_i for _, H_i in pairs)
        lam = ALPHA * float(H.trace()) / H.shape[0]
        H_E = H + lam * torch.eye(H.shape[0], dtype=torch.float64)
        R = sum(W_i @ H_i for W_i, H_i in pairs) + lam * W_m
        return W_m, pairs, lam, H_E, R @ torch.linalg.inv(H_E)

    def excess(self, module, Q):
        W_m, pairs, lam, _, best = self.quadratics(module)
        return objective(Q, W_m, pairs, lam) - objective(best, W_m, pairs, lam)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def plain(case):
    """What GPTQModel's own GPTQ makes of the same merge, rows, grid and damping."""
    out = case.folder / "gptq"
    config = GPTQConfig(bits=BITS, group_size=GROUP, damp_percent=ALPHA)
    run(case.merged, config, [row for rows in case.rows.values() for row in rows], out)
    return dequantized(out)


def test_every_layer_reaches_the_float64_optimum(case):
    for module in case.weights:
        _, _, _, H_E, best = case.quadratics(module)
        reference = gptq64(best, H_E, bits=BITS, group_size=GROUP, order=gar_order(H_E))
        ours, exact = case.excess(module, case.weights[module]), case.excess(module, reference)
        assert ours == pytest.approx(exact, rel=0.01), module


def test_layer_0_is_far_below_plain_gptq(case, plain):
    for module in case.weights:
        if ".layers.0." in module:
            ours = case.excess(module, case.weights[module])
            assert ours < 0.6 * case.excess(module, plain[module]), module


def test_the_report_tells_the_truth(case):
    assert [m.module for m in case.report.modules] == [
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    tokens = {name: sum(len(row["input_ids"]) for row in rows) for name, rows in case.rows.items()}
    assert case.report.tokens == tokens
    assert case.report.rows == {name: len(rows) for name, rows in case.rows.items()}
    for module in case.report.modules:
        W_m, pairs, lam, _, best = case.quadratics(module.module)
        assert module.tokens == tokens and module.target == "experts"
        assert module.lam == pytest.approx(lam, rel=1e-3)
        merge_excess = objective(W_m, W_m, pairs, lam) - objective(best, W_m, pairs, lam)
        assert module.merge_excess == pytest.approx(merge_excess, rel=1e-2)
        saved = case.excess(module.module, case.weights[module.module])
        assert module.excess == pytest.approx(saved, rel=1e-2)


def test_shared_inputs_are_counted_and_factorised_once(case):
    # Per layer: k and v use q's Gram, up uses gate's.
    assert (case.report.shared_groups, case.report.shared_layers) == (2 * 2, 2 * 3)


def test_the_rounding_factorises_once_per_shared_input(case, tmp_path, monkeypatch):
    factorised = []
    factor = EPMQ.hessian_inverse

    def counted(self, H):
        factorised.append(self.name)
        return factor(self, H)

    monkeypatch.setattr(EPMQ, "hessian_inverse", counted)
    config = EPMQConfig(
        profile="paper", bits=BITS, group_size=GROUP, experts=case.experts, alpha=ALPHA
    )
    run(case.merged, config, case.rows, tmp_path / "out")
    assert len(factorised) == 2 * 4  # qkv, o, gate and up, down


@pytest.mark.parametrize("profile", ["paper", "best"])
def test_what_is_fast_gives_the_codes_and_the_objective_of_what_is_plain(
    profile, case, tmp_path, monkeypatch
):
    """One product per batch, whole Grams, every expert folded by its Gram, the host's factor."""
    options = dict(profile=profile, bits=BITS, group_size=GROUP, experts=case.experts, alpha=ALPHA)
    result = run(case.merged, EPMQConfig(**options), case.rows, tmp_path / "fast")
    assert any(module.target == "experts" for module in result["epmq"].modules)
    monkeypatch.setattr(statistics, "ROWS", 1)
    monkeypatch.setattr(statistics, "gram_update", torch_gram_update)
    monkeypatch.setattr(task, "inverse_factor", torch_inverse_factor)
    plain = run(case.merged, EPMQConfig(**options), case.rows, tmp_path / "plain")
    first, second = codes(tmp_path / "fast"), codes(tmp_path / "plain")
    tipped = False
    for one, other in zip(result["epmq"].modules, plain["epmq"].modules, strict=True):
        if tipped:  # the inputs are no longer the same
            assert one.excess == pytest.approx(other.excess, rel=0.1)
            continue
        assert one.merge_excess == pytest.approx(other.merge_excess, rel=1e-5)
        # Where a weight lies on a rounding edge (which ones do depends on the CPU), the last bit of
        # a sum decides, and the rest of its row follows.
        share = float((first[one.module] != second[one.module]).float().mean())
        tipped = share > 0
        assert share < 0.01
        assert one.excess == pytest.approx(other.excess, rel=0.01 if tipped else 1e-5)


def test_without_sharing_the_result_is_the_same_bit_for_bit(case, tmp_path):
    config = EPMQConfig(
        profile="paper",
        bits=BITS,
        group_size=GROUP,
        experts=case.experts,
        alpha=ALPHA,
        hessian={"dedup_shared_inputs": False},
    )
    result = run(case.merged, config, case.rows, tmp_path / "out")
    assert result["epmq"].shared_layers == 0
    expected, got = stored(case.out), stored(tmp_path / "out")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(case, tmp_path, batch_size):
    config = EPMQConfig(
        profile="paper", bits=BITS, group_size=GROUP, experts=case.experts, alpha=ALPHA
    )
    rows = {name: list(reversed(rows)) for name, rows in case.rows.items()}
    report = run(case.merged, config, rows, tmp_path / "out", batch_size=batch_size)["epmq"]
    expected, got = codes(case.out), codes(tmp_path / "out")
    for module, before in zip(report.modules, case.report.modules, strict=True):
        # Layer 0 sees the same inputs up to the order of fp32 sums. Later on one weight that tips
        # over a rounding edge moves the rest of its row, so there the objective is what must hold.
        if ".layers.0." in module.module:
            assert torch.equal(expected[module.module], got[module.module]), module.module
        assert module.lam == pytest.approx(before.lam, rel=0.01)
        assert module.excess == pytest.approx(before.excess, rel=0.02)


def test_rows_of_different_lengths_leave_no_trace_of_padding(case, tmp_path):
    """Padded batches give the sums of unpadded ones: λ is a sum over every input."""
    ragged = {
        name: [{"input_ids": row["input_ids"][: 12 + 5 * index]} for index, row in enumerate(rows)]
        for name, rows in case.rows.items()
    }
    lams = []
    for batch_size in (1, 8):
        config = EPMQConfig(
            profile="paper", bits=BITS, group_size=GROUP, experts=case.experts, alpha=ALPHA
        )
        model = tiny.load(case.merged, config)
        report = model.quantize(ragged, batch_size=batch_size)["epmq"]
        lams.append([m.lam for m in report.modules[:3]])
        assert report.tokens == {
            name: sum(len(row["input_ids"]) for row in rows) for name, rows in ragged.items()
        }
    assert lams[0] == pytest.approx(lams[1], rel=1e-5)


# ---- limits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One "expert" that is the merge itself."""
    folder = tmp_path_factory.mktemp("single")
    merged, _ = tiny.family(folder, experts=1)
    return merged, tiny.rows(12, 60, seed=3)


@pytest.mark.parametrize("order", [{"act_group_aware": True}, {"desc_act": True}])
def test_one_expert_equal_to_the_merge_is_the_hosts_gptq_on_h_plus_lambda(single, tmp_path, order):
    merged, rows = single
    ours = EPMQConfig(
        profile="paper", bits=4, group_size=32, experts={"only": merged}, alpha=0.05, **order
    )
    report = run(merged, ours, {"only": rows}, tmp_path / "ours")["epmq"]
    # The host damps with damp_percent · mean(diag H): the same λ.
    host = GPTQConfig(bits=4, group_size=32, damp_percent=0.05, **order)
    run(merged, host, rows, tmp_path / "host")
    expected, got = codes(tmp_path / "host"), codes(tmp_path / "ours")
    # The host adds its λ after its 2/n, so that the last fp32 bit differs: a weight on a rounding
    # edge may tip, and the rest of its row with it.
    first = [m for m in expected if ".layers.0." in m]
    assert all(float((expected[m] != got[m]).float().mean()) <= 2e-3 for m in first)
    assert sum(torch.equal(expected[m], got[m]) for m in first) >= len(first) - 2
    assert differing(tmp_path / "host", tmp_path / "ours") <= 0.01
    assert all(m.merge_excess == 0.0 for m in report.modules)


def test_experts_equal_to_the_merge_give_no_delta_and_the_result_of_one(single, tmp_path):
    merged, rows = single
    experts = {"a": merged, "b": merged}
    config = EPMQConfig(
        profile="paper", bits=4, group_size=32, experts=experts, alpha=0.05, allow_duplicates=True
    )
    report = run(merged, config, {"a": rows[:5], "b": rows[5:]}, tmp_path / "two")["epmq"]
    assert report.merge_excess == 0.0  # D = 0 exactly
    config = EPMQConfig(profile="paper", bits=4, group_size=32, experts={"a": merged}, alpha=0.05)
    run(merged, config, {"a": rows}, tmp_path / "one")
    # The Gram is the same sum, added up in another order.
    assert differing(tmp_path / "one", tmp_path / "two") <= 0.01


@pytest.mark.parametrize(("alpha", "share"), [(1e6, 3e-3), (1e8, 0.0)])
def test_a_huge_alpha_gives_the_hosts_gptq_of_the_merge(case, tmp_path, alpha, share):
    config = EPMQConfig(profile="paper", bits=4, group_size=32, experts=case.experts, alpha=alpha)
    run(case.merged, config, case.rows, tmp_path / "experts")
    # The host's GPTQ on H + λI: the same run with the merge in every expert's place. W* is still
    # (d / alpha) of the way to the experts along H's first direction, which tips a few codes.
    same = dict.fromkeys(case.experts, case.merged)
    config = EPMQConfig(
        profile="paper", bits=4, group_size=32, experts=same, alpha=alpha, allow_duplicates=True
    )
    run(case.merged, config, case.rows, tmp_path / "merge")
    assert differing(tmp_path / "merge", tmp_path / "experts") <= share


def test_alpha_pattern_sets_a_layers_own_anchor(case, tmp_path):
    config = EPMQConfig(
        profile="paper",
        bits=BITS,
        group_size=GROUP,
        experts=case.experts,
        alpha=ALPHA,
        alpha_pattern={"layers.0.self_attn.v_proj": 10.0, "down_proj": 0.01},
    )
    report = run(case.merged, config, case.rows, tmp_path / "out")["epmq"]
    lam = {m.module.removeprefix("model.layers."): m.lam for m in report.modules}
    before = {m.module.removeprefix("model.layers."): m.lam for m in case.report.modules}
    assert lam["0.self_attn.v_proj"] == pytest.approx(100 * lam["0.self_attn.q_proj"], rel=1e-6)
    assert lam["0.self_attn.q_proj"] == before["0.self_attn.q_proj"]
    assert lam["0.mlp.down_proj"] == pytest.approx(0.1 * before["0.mlp.down_proj"], rel=0.1)
    # q and k share Gram and alpha with the first run: the same codes.
    expected, got = codes(case.out), codes(tmp_path / "out")
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert torch.equal(expected[q], got[q]) and not torch.equal(expected[v], got[v])


# ---- every option of the host still works -------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 16},
        {"bits": 3, "group_size": 32},
        {"bits": 5, "group_size": 32},
        {"bits": 6, "group_size": 32},
        {"bits": 7, "group_size": 32},
        {"bits": 4, "group_size": -1},
        {"bits": 4, "group_size": 32, "sym": False},
        {"bits": 4, "group_size": 32, "static_groups": True, "act_group_aware": False},
        {"bits": 4, "group_size": 32, "desc_act": True, "static_groups": True},
        {"bits": 4, "group_size": 32, "mse": 2.4},
        {"bits": 4, "group_size": 32, "dynamic": {r"+:.*\.0\..*o_proj": {"bits": 8}}},
        {"bits": 4, "group_size": 32, "dynamic": {r"-:.*down_proj": {}}},
        {"bits": 4, "group_size": 32, "true_sequential": False},
        {"bits": 4, "group_size": 32, "offload_to_disk": False},
        {"bits": 8, "group_size": 64, "lm_head": True},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items())[:60],
)
def test_options_of_the_host_still_work(case, tmp_path, options):
    config = EPMQConfig(profile="paper", experts=case.experts, alpha=ALPHA, **options)
    report = run(case.merged, config, case.rows, tmp_path / "out")["epmq"]
    loaded = tiny.reload(tmp_path / "out")
    names = [m.module for m in report.modules]
    assert ("lm_head" in names) == options.get("lm_head", False)
    assert any("down_proj" in n for n in names) == ("-:.*down_proj" not in str(options))
    # Judged where the input is the same whatever the options: q, k and v of layer 0.
    for module in report.modules[:3]:
        weight = loaded.model.get_submodule(module.module).dequantize_weight().T.double()
        excess = case.excess(module.module, weight)
        assert excess == pytest.approx(module.excess, rel=0.02, abs=1e-3 * module.merge_excess)
        if module.bits >= 4:
            assert excess < module.merge_excess
