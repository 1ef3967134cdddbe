"""What targets from the experts' own passes are judged by: float64, from their definition."""

from __future__ import annotations

import torch


class Pass:
    """One model in float64 over some rows: inputs of its linear layers, and its streams."""

    def __init__(self, model, modules, streams, batches):
        self.inputs: dict[str, list] = {}
        taps = {module: tap for module, tap in streams.items() if module in modules}
        for name in {*modules, *taps.values()}:
            model.get_submodule(name).register_forward_pre_hook(self._catch(name))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        self.x = {name: torch.cat(self.inputs[name]) for name in modules}
        self.r = {module: torch.cat(self.inputs[tap]) for module, tap in taps.items()}

    def _catch(self, name):
        return lambda module, args: self.inputs.setdefault(name, []).append(args[0].flatten(0, -2))


class Judge:
    """H, D and what follows from them, for every layer, from the definition of T_i.

    Args:
        build: folder → the model in float64.
        streams: full name of a layer that writes to the residual stream → the norm before it.
        batches: expert → arguments of forward passes without padding.
        weights, biases: what the quantized model has in place of the merge's.
    """

    def __init__(self, build, merged, experts, streams, batches, weights, *, eta, rho, biases=None):
        self.W_m = {name: build(merged).get_submodule(name) for name in weights}
        quantized = build(merged)
        for name, weight in weights.items():
            quantized.get_submodule(name).weight.data = weight.clone()
            if biases:
                quantized.get_submodule(name).bias.data = biases[name].double()
        self.X, self.gap = {name: [] for name in weights}, {name: [] for name in weights}
        for expert, folder in experts.items():
            model = build(folder)
            own = Pass(model, list(weights), streams, batches[expert])
            here = Pass(quantized, list(weights), streams, batches[expert])
            for hook in [h for m in quantized.modules() for h in [m._forward_pre_hooks]]:
                hook.clear()
            for name in weights:
                x, z, layer = here.x[name], own.x[name], model.get_submodule(name)
                T = layer(eta * z + (1 - eta) * x)
                if rho and name in own.r:
                    T = T + rho * (own.r[name] - here.r[name])
                self.X[name].append(x)
                self.gap[name].append((T - self.W_m[name](x)).detach())

    def moments(self, name):
        X, gap = torch.cat(self.X[name]), torch.cat(self.gap[name])
        return X, gap, self.W_m[name].weight.detach()


def excess(Q, best, H_E):
    E = Q - best
    return float(((E @ H_E) * E).sum())


def anchored(H, alpha, anchor="identity"):
    lam = alpha * float(H.trace()) / H.shape[0]
    if anchor == "channel":
        return H + alpha * torch.diag(H.diagonal())
    return H + lam * torch.eye(H.shape[0], dtype=torch.float64)


def streams_of(weights, streams):
    found = {}
    for name in weights:
        for leaf, norm in streams.items():
            if name.endswith(leaf):
                found[name] = f"{name.removesuffix(leaf)}{norm}"
    return found
