"""The sums of the report against brute force, and the document they are in."""

import json
import math
import statistics

import pytest
import regret_samples as samples

from epmq_gptq.publish.page import read_report, report_figures
from epmq_gptq.publish.page.figures import FIGURES, figures_of, mean_figures
from epmq_gptq.publish.page.layers import kind_of
from epmq_gptq.publish.page.retention import read_retention
from epmq_gptq.run_report import AimError, ExpertError


@pytest.fixture(params=["llama", "t5", "clip", "moe"])
def made(request, tmp_path):
    """(content, content of the baseline, document) of one architecture."""
    modules = {
        "llama": samples.llama(3),
        "t5": samples.t5(2),
        "clip": samples.clip(2),
        "moe": samples.moe(2, 6),
    }[request.param]
    experts = ["math", "code", "law"]
    content = samples.report(modules, experts)
    # Nothing came before the first layer, so its inputs are the expert's own.
    for one in content["report"]["modules"][0]["experts"].values():
        one["aim"] = None
    plain = samples.report(modules, experts, rounding=2.0, profile="gptq")
    report = read_report(samples.write(tmp_path / "run", content, samples.retention(experts)))
    baseline = read_report(samples.write(tmp_path / "plain", plain))
    document = report_figures(report, baseline, read_retention(tmp_path / "run"))
    return content["report"]["modules"], plain["report"]["modules"], document


def brute(modules, plain, expert, chosen, key):
    """A figure over modules: error energies and output energies of all tokens, one by one."""
    over = under = 0.0
    for module, other in zip(modules, plain, strict=True):
        if not chosen(module["module"]) or expert not in module["experts"]:
            continue
        one = module["experts"][expert]
        output = one["energy"] * module["tokens"][expert]
        value = {
            "change": lambda one=one: one["rounded"] - one["merged"],
            "gptq": lambda other=other: other["experts"][expert]["rounded"],
            "over_gptq": lambda one=one, other=other: (
                one["rounded"] - other["experts"][expert]["rounded"]
            ),
            "cross": lambda one=one: one["rounded"] - one["merged"] - one["quantization"],
            # Where a layer aims at W_i x itself there is nothing else to tell.
            "aim_rounded": lambda one=one: (one["aim"] or one)["rounded"],
            "aim_merged": lambda one=one: (one["aim"] or one)["merged"],
            "aim_change": lambda one=one: (
                (one["aim"] or one)["rounded"] - (one["aim"] or one)["merged"]
            ),
        }.get(key, lambda one=one: one[key])()
        over += value * output
        under += output
    return over / under if under else None


@pytest.mark.parametrize("key", FIGURES)
def test_means_by_layer_kind_and_expert(made, key):
    modules, plain, document = made
    checked = 0
    for expert in ("math", "code", "law"):
        (whole,) = [one for one in document["experts"] if one["name"] == expert]
        wanted = brute(modules, plain, expert, lambda name: True, key)
        assert whole["figures"][key] == pytest.approx(wanted, rel=1e-9)
        for kind in document["kinds"]:
            wanted = brute(modules, plain, expert, lambda n, k=kind: kind_of(n) == k["kind"], key)
            assert kind["experts"][expert][key] == pytest.approx(wanted, rel=1e-9)
        for layer in document["layers"]:
            start = layer["stack"] if layer["index"] is None else f"{layer['stack']}."
            start += "" if layer["index"] is None else f"{layer['index']}."
            wanted = brute(modules, plain, expert, lambda n, s=start: n.startswith(s), key)
            assert layer["experts"][expert][key] == pytest.approx(wanted, rel=1e-9)
            checked += 1
    assert checked == 3 * len(document["layers"]) > 0


def test_figures_of_one_module_add_up(made):
    modules, plain, document = made
    for module, shown in zip(modules, document["modules"], strict=True):
        assert shown["module"] == module["module"]
        assert set(shown["experts"]) == set(module["experts"])
        for name, one in shown["experts"].items():
            parts = one["merged"] + one["quantization"] + one["cross"]
            assert parts == pytest.approx(one["rounded"])
            assert one["tokens"] == module["tokens"][name] and one["weight"] == 1.0
    shares = {name: 0.0 for name in ("math", "code", "law")}
    for shown in document["modules"]:
        for name, one in shown["experts"].items():
            shares[name] += one["share"]
    assert list(shares.values()) == pytest.approx([1.0] * 3)


def test_worst_and_median(made):
    """By what the layers aim at, where that is something else than W_i x."""
    modules, _, document = made
    assert document["judged_by"] == "aim_rounded"
    pairs = [
        ((one["aim"] or one)["rounded"], module["module"], name)
        for module in modules
        for name, one in module["experts"].items()
    ]
    pairs.sort(reverse=True)
    worst = [(one["aim_rounded"], one["module"], one["expert"]) for one in document["worst"]]
    assert worst == pairs[: len(worst)] and len(worst) == 20
    for one in document["experts"]:
        own = [pair for pair in pairs if pair[2] == one["name"]]
        assert one["worst"] == {"module": own[0][1], "figure": own[0][0]}
        assert one["median"] == statistics.median(pair[0] for pair in own)


def test_without_other_aims_a_module_is_judged_by_what_is_left(tmp_path):
    content = samples.report(samples.llama(2), ["math"], aim=False)
    document = report_figures(read_report(samples.write(tmp_path, content)))
    assert document["judged_by"] == "rounded"
    assert document["experts"][0]["figures"]["aim_rounded"] is None
    most = max(m["experts"]["math"]["rounded"] for m in content["report"]["modules"])
    assert document["worst"][0]["rounded"] == document["experts"][0]["worst"]["figure"] == most


def test_the_document_is_strict_json_and_complete(made):
    modules, _, document = made
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again == document and document["schema"] == 1
    assert document["run"]["modules"] == len(modules) and document["run"]["bits"] == [4]
    assert document["baseline"]["profile"] == "gptq"
    assert document["peak_memory"] == {"process": 2_345_678_901}
    assert set(document["phases"]) == {"forward", "gram", "solve", "round", "pack"}
    assert sum(layer["modules"] for layer in document["layers"]) == len(modules)
    math_ = document["experts"][0]
    assert math_["retention"]["percent"]["expert"] == 100
    assert math_["retention"]["percent"]["quantized"] == pytest.approx(
        100 * math_["retention"]["values"]["quantized"] / 80
    )
    assert math_["source"] == "org/0" and math_["tokens"] == 8192


def test_a_mean_counts_what_is_known_and_no_more():
    def figures(**values):
        return {key: values.get(key) for key in FIGURES}

    cells = [(3.0, figures(merged=0.1, gptq=0.5)), (1.0, figures(merged=0.5)), (0.0, figures())]
    mean = mean_figures(cells)
    assert mean["merged"] == pytest.approx((3 * 0.1 + 0.5) / 4)
    assert mean["gptq"] == 0.5 and mean["rounded"] is None
    # Nothing goes out of these modules, so no share of it can be told.
    assert mean_figures([(0.0, figures(merged=0.1))])["merged"] is None
    assert set(mean_figures([]).values()) == {None}


def test_figures_without_a_part():
    one = ExpertError(
        rows=8,
        energy=1.0,
        merged=0.1,
        solved=0.05,
        rounded=0.2,
        aim=AimError(merged=0.3, solved=0.2, rounded=0.1),
    )
    found = figures_of(one)
    assert found["change"] == pytest.approx(0.1) and found["cross"] is None
    assert found["aim_change"] == pytest.approx(-0.2)
    assert found["gptq"] is found["over_gptq"] is None
    other = ExpertError(rows=8, energy=1.0, merged=0.1, solved=0.05, rounded=0.25)
    assert figures_of(one, other)["over_gptq"] == pytest.approx(-0.05)
    assert figures_of(other)["aim_rounded"] is None


def test_reports_with_little_in_them(tmp_path):
    nothing = samples.report(samples.llama(1), ["math"], measured=False)
    document = report_figures(read_report(samples.write(tmp_path / "a", nothing)))
    assert document["worst"] == [] and document["experts"][0]["worst"] is None
    assert document["experts"][0]["median"] is None
    assert document["modules"][0]["tokens"] == {"math": 8192}

    # An expert that routing never reached, and weights of its own for one that it did.
    some = samples.report(["model.layers.0.mlp.experts.0.up_proj"], ["math", "code"])
    module = some["report"]["modules"][0]
    module["experts"] = {
        "math": {"rows": 4, "energy": 2.0, "merged": 0.1, "solved": 0.1, "rounded": 0.2}
    }
    module["tokens"] = {"math": 4, "code": 0}
    module["weights"] = {"math": 1.7}
    document = report_figures(read_report(samples.write(tmp_path / "b", some)))
    assert document["experts"][1]["figures"]["rounded"] is None
    assert document["modules"][0]["experts"]["math"]["weight"] == 1.7
    assert document["layers"][0]["experts"].keys() == {"math"}
    assert not math.isnan(document["experts"][0]["figures"]["rounded"])
    json.dumps(document, allow_nan=False)
