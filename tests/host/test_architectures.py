"""Each family on a small real model: quantized, saved, judged in float64, loaded again.

The judge loads merge and experts with transformers itself, so it shares no mapping of names or
joined tensors with the package.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from families import FAMILIES
from judge import dequantized, stored
from transformers import AutoModelForCausalLM, Conv1D

from epmq_gptq import EPMQConfig

GROUP, ALPHA = 32, 0.1


class Dense:
    """A model as transformers loads it, in float64, under the host's names of linear layers."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ).requires_grad_(False)
        self.modules = dict(self.model.named_modules())

    def module(self, name) -> torch.nn.Module:
        """The module itself, or the joined projection that the host takes apart (Phi-3)."""
        return self.modules.get(name) or self.modules[f"{name.rpartition('.')[0]}.gate_up_proj"]

    def weight(self, name) -> torch.Tensor:
        """``W: (out, in)``, a view: what is written into it is in the model."""
        module = self.module(name)
        if name not in self.modules:
            return module.weight.chunk(2)[name.endswith("up_proj")]
        return module.weight.T if isinstance(module, Conv1D) else module.weight

    def inputs(self, names, rows) -> dict[str, torch.Tensor]:
        """Inputs ``(tokens, in)`` of the layers, over ``rows`` of one expert."""
        caught: dict[str, list] = {name: [] for name in names}

        def catch(name):
            return lambda module, inputs: caught[name].append(inputs[0].flatten(0, -2))

        hooks = [self.module(name).register_forward_pre_hook(catch(name)) for name in names]
        for row in rows:
            self.model(torch.tensor([row["input_ids"]]))
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(pieces) for name, pieces in caught.items()}


class Case:
    """One family, quantized, saved and loaded again."""

    def __init__(self, folder, build):
        torch.manual_seed(0)
        self.merged, self.experts = tiny.family(folder, experts=2, model=build().eval())
        self.rows = {
            name: tiny.rows(6 + index, 50, seed=index) for index, name in enumerate(self.experts)
        }
        config = EPMQConfig(
            profile="paper", bits=8, group_size=GROUP, experts=self.experts, alpha=ALPHA
        )
        model = tiny.load(self.merged, config)
        self.report = model.quantize(self.rows, batch_size=3)["epmq"]
        self.out = folder / "out"
        model.save(str(self.out))
        self.weights = dequantized(self.out)
        self.dense = Dense(self.merged)
        self.W_m = {name: self.dense.weight(name).clone() for name in self.weights}
        for name, Q in self.weights.items():
            self.dense.weight(name).copy_(Q)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("family"), FAMILIES[request.param])


def test_every_linear_layer_is_rounded_towards_the_experts(case):
    assert {m.module for m in case.report.modules} == case.weights.keys()
    assert all(m.target == "experts" for m in case.report.modules)
    experts = {name: Dense(folder) for name, folder in case.experts.items()}
    X = {name: case.dense.inputs(case.weights, rows) for name, rows in case.rows.items()}
    for module in case.report.modules:
        name, W_m = module.module, case.W_m[module.module]
        H = {expert: X[expert][name].T @ X[expert][name] for expert in experts}
        total = sum(H.values())
        lam = ALPHA * total.trace() / len(total)
        H_E = total + lam * torch.eye(len(total), dtype=torch.float64)
        R = sum(experts[expert].weight(name) @ H[expert] for expert in experts) + lam * W_m
        best = torch.linalg.solve(H_E, R, left=False)

        def excess(W, best=best, H_E=H_E):
            return float((((W - best) @ H_E) * (W - best)).sum())

        # Eq. 12 of the saved weight is close to its optimum, far below the merge's.
        assert excess(case.weights[name]) < 0.02 * excess(W_m), name
        assert module.excess == pytest.approx(excess(case.weights[name]), rel=0.02), name
        assert module.merge_excess == pytest.approx(excess(W_m), rel=0.02), name


def test_it_is_loaded_again_as_it_was_rounded(case):
    loaded = tiny.reload(case.out)
    for rows in case.rows.values():
        ids = torch.tensor([rows[0]["input_ids"]])
        # The kernel as it is: compiling it for every shape would take most of the test.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits, exact = loaded.model(ids).logits.double(), case.dense.model(ids).logits
        assert float((logits - exact).abs().max()) < 0.01 * float(exact.abs().max())


def test_heads_and_biases_stay_as_they_were(case):
    before, after = stored(case.merged), stored(case.out)
    assert ("lm_head.weight" in after) == ("lm_head.weight" in before)
    kept = [name for name in before if name.endswith(".bias") or "embed" in name or "head" in name]
    for name in kept:
        assert torch.equal(after[name].float(), before[name].float()), name
    families_with_biases = {"Qwen2ForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel"}
    has_biases = any(name.endswith(".bias") for name in kept)
    assert has_biases == (type(case.dense.model).__name__ in families_with_biases)
