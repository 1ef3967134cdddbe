"""The charts of the report page, as plotly figures with the choices that a reader has.

A chart is ``{"figures": […], "variants": {choice: {"figure": place, …}}}``: each variant is one of
the figures, where needed with other values for its first trace. The page draws the chosen one.
Names of strangers go through :func:`safe`, as plotly reads a little HTML.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from .figures import Figures, mean_figures
from .texts import NAMES, cut, number, percent, points, shown_size

SIGNED = ("change", "over_gptq", "cross", "aim_change")
# Figures of one kind share their colours, so that two of them can be compared.
_LEVELS = ("rounded", "merged", "gptq", "solved", "aim_merged", "aim_rounded")
# All stand out from a white page and from a dark one.
_COLOURS = {
    "merged": "#c4700f",
    "aim_merged": "#c4700f",
    "rounded": "#3a86d6",
    "aim_rounded": "#3a86d6",
    "gptq": "#9a77cc",
    "quantization": "#1c917d",
    "cross": "#808b99",
}
_LINES = ("#3a86d6", "#c4700f", "#239a50", "#d0503f", "#9a77cc", "#97793a", "#d1559f", "#808b99")
_GRID = "rgba(128, 128, 128, 0.25)"
_MOST_BARS = 15


def page_charts(document: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Name → chart, from what :func:`~epmq_gptq.publish.page.report_figures` returned.

    Args:
        document: that.
        known: the figures that at least one expert has.
    """
    charts: dict[str, Any] = {}
    if known:
        charts["map"] = _map(document, known)
        charts["curve"] = _curve(document, known)
        charts["worst"] = _worst(document, known)
        charts["parts"] = _parts(document, known)
    if any(one["retention"] for one in document["experts"]):
        charts["retention"] = _retention(document)
    if document["phases"]:
        charts["phases"] = _phases(document)
    if len({one["alpha"] for one in document["modules"]} - {None}) > 1:
        charts["alpha"] = _alpha(document)
    return charts


def safe(text: object) -> str:
    """Text that plotly shows as it is."""
    return html.escape(" ".join(str(text).split()), quote=False)


def _per_cent(share: float | None, digits: int = 4) -> float | None:
    return None if share is None else float(f"{100 * share:.{digits}g}")


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{points(value)} points" if key in SIGNED else percent(value)


def _plain(figure: go.Figure) -> dict[str, Any]:
    return json.loads(figure.to_json())


def _layout(height: float, **more: Any) -> go.Layout:
    """What all charts have alike; the page adds the colour of texts, which depends on its theme."""
    layout = go.Layout(
        template="none",
        height=round(height),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 10, "r": 20, "t": 36, "b": 44},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        hovermode="closest",
        hoverlabel={"align": "left"},
    )
    for axis in (layout.xaxis, layout.yaxis):
        axis.update(gridcolor=_GRID, zerolinecolor=_GRID, automargin=True)
    layout.update(more)
    return layout


def _ticks(labels: Sequence[str], most: int, length: int = 18) -> dict[str, Any]:
    """Ticks at the first place of each label, evenly chosen where there are more than ``most``."""
    firsts = [n for n, label in enumerate(labels) if not n or label != labels[n - 1]]
    chosen = firsts[:: -(-len(firsts) // most)]
    return {"tickvals": chosen, "ticktext": [safe(cut(labels[place], length)) for place in chosen]}


def _column(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


# ---- heat map ------------------------------------------------------------------------------------


def _map(document: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    names = _column(document["experts"], "name")
    layers, modules = document["layers"], document["modules"]
    labels = _column(layers, "label")
    kinds = _column(document["kinds"], "kind")
    by_kind = [[row["experts"].get(name) for name in names] for row in document["kinds"]]
    views = {
        "layers": ("layer", names, labels, labels, _turned(layers, names)),
        "modules": (
            "modules in forward order, by layer",
            names,
            _column(modules, "module"),
            _column(modules, "layer"),
            _turned(modules, names),
        ),
        "kinds": ("", kinds, names, names, by_kind),
    }
    inside = _inside(document)
    for place, name in enumerate(names):
        cells = [[inside.get((name, kind, label)) for label in labels] for kind in kinds]
        views[f"inside-{place}"] = ("layer", kinds, labels, labels, cells)
    chart: dict[str, Any] = {"figures": [], "variants": {}}
    for view, (title, rows, columns, ticks, cells) in views.items():
        chart["figures"].append(_plain(_heat_map(title, rows, columns, ticks)))
        levels = [key for key in known if key in _LEVELS]
        shared = [value for key in levels for value in _known(key, cells)]
        for key in known:
            values = shared if key in _LEVELS else _known(key, cells)
            variant = _values(key, cells, values, len(levels) if key in _LEVELS else 1)
            chart["variants"][f"{key} {view}"] = {"figure": len(chart["figures"]) - 1} | variant
    return chart


def _turned(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[Figures | None]]:
    """One line per expert of rows that have the figures of each."""
    return [[row["experts"].get(name) for row in rows] for name in names]


def _inside(document: dict[str, Any]) -> dict[tuple[str, str, str], Figures]:
    """(expert, kind, layer) → figures; of several modules their mean, as elsewhere."""
    found: dict[tuple[str, str, str], list[tuple[float, Figures]]] = {}
    for module in document["modules"]:
        for name, one in module["experts"].items():
            cell = (one["energy"] * (one["tokens"] or one["rows"]), one)
            found.setdefault((name, module["kind"], module["layer"]), []).append(cell)
    return {
        key: cells[0][1] if len(cells) == 1 else mean_figures(cells) for key, cells in found.items()
    }


def _heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], ticks: Sequence[str]
) -> go.Figure:
    height = max(6.0, min(30.0, 560 / len(rows)))
    layout = _layout(
        max(44, len(rows) * height) + 140,
        plot_bgcolor="rgba(128, 128, 128, 0.18)",
        margin={"l": 10, "r": 20, "t": 76, "b": 60},
    )
    layout.xaxis.update(title={"text": title}, showgrid=False, zeroline=False, **_ticks(ticks, 20))
    every = _ticks(rows, max(1, round(len(rows) * height / 14)), 30)
    layout.yaxis.update(autorange="reversed", showgrid=False, zeroline=False, **every)
    gap = 0 if len(columns) * len(rows) > 3000 or len(columns) > 100 else 1
    # Names by place, since two of them may look alike where they are cut.
    trace = go.Heatmap(
        xgap=gap, ygap=gap, hoverongaps=False, hovertemplate="%{text}<extra></extra>"
    )
    trace.meta = {"rows": [safe(row) for row in rows], "columns": [safe(one) for one in columns]}
    return go.Figure(trace, layout)


def _known(key: str, cells: Sequence[Sequence[Figures | None]]) -> list[float]:
    return [c[key] for row in cells for c in row if c is not None and c[key] is not None]


def _values(
    key: str, cells: Sequence[Sequence[Figures | None]], values: list[float], alike: int
) -> dict[str, Any]:
    """Values in per cent, their colours, and what is to be said of these.

    Args:
        key: the figure.
        cells: by row and column.
        values: that the colours are chosen by.
        alike: how many figures share these.
    """
    z = [[None if c is None else _per_cent(c[key]) for c in row] for row in cells]
    notes = ["Grey: not measured."] if any(value is None for row in z for value in row) else []
    bar = {
        "orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "len": 0.6,
        "thickness": 10, "outlinewidth": 0, "ticks": "outside",
    }  # fmt: skip
    if key in SIGNED:
        sizes = sorted(map(abs, values))
        most, usual = (sizes[-1] or 1e-6, sizes[int(0.98 * (len(sizes) - 1))]) if sizes else (1, 1)
        end = usual if most > 3 * usual > 0 else most
        if end < most:
            notes.append(f"Colours end at ±{points(end)} points; the largest is {points(most)}.")
        side = "percentage points" + ("" if key == "cross" else ", blue is better")
        scale = {"colorscale": "RdBu", "reversescale": True, "zmin": -100 * end, "zmax": 100 * end}
        trace = scale | {"colorbar": bar | {"title": {"text": side, "side": "top"}}}
        return {"trace": {"z": z} | trace, "unit": "points", "note": " ".join(notes)}
    positive = [100 * value for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.0, 1.0)
    title = "% of output energy"
    variant: dict[str, Any] = {"unit": "%"}
    if low > 0 and high / low > 30:
        title += ", logarithmic"
        variant["low"] = low
        bar |= _decades(low, high)
        low, high = math.log10(low), math.log10(high)
    else:
        low = 0.0
    notes.append("Bright is far from the expert.")
    if alike > 1:
        notes.append("One scale for all figures before and after, so that they can be compared.")
    trace = {"z": z, "colorscale": "Viridis", "reversescale": False, "zmin": low, "zmax": high}
    trace["colorbar"] = bar | {"title": {"text": title, "side": "top"}}
    return variant | {"trace": trace, "note": " ".join(notes)}


def _decades(low: float, high: float) -> dict[str, Any]:
    """Ticks of a colour bar whose values are logarithms."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 150 else (1,)
    values = [step * 10.0**power for power in powers for step in steps]
    values = [value for value in values if low <= value <= high]
    return {
        "tickvals": [math.log10(value) for value in values],
        "ticktext": [f"{value:g} %" for value in values],
    }


# ---- over depth ----------------------------------------------------------------------------------


def _curve(document: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    names = _column(document["experts"], "name")
    chart: dict[str, Any] = {"figures": [], "variants": {}}
    sides = {"expert": [key for key in ("merged", "gptq", "rounded") if key in known]}
    if "aim_rounded" in known:
        sides["aim"] = ["aim_merged", "aim_rounded"]
    for against, keys in sides.items():
        choices = {str(place): [(name, key) for key in keys] for place, name in enumerate(names)}
        if len(names) > 1:
            choices["all"] = [(name, keys[-1]) for name in names]
        for choice, lines in choices.items():
            chart["variants"][f"{choice} {against}"] = {"figure": len(chart["figures"])}
            chart["figures"].append(_plain(_lines(document, lines, choice == "all")))
    return chart


def _lines(document: dict[str, Any], lines: list[tuple[str, str]], by_name: bool) -> go.Figure:
    layers = document["layers"]
    figure = go.Figure(layout=_layout(380))
    seen = []
    for place, (name, key) in enumerate(lines):
        x: list[float] = []
        y: list[float | None] = []
        hover = []
        for step, layer in enumerate(layers):
            if step and layer["stack"] != layers[step - 1]["stack"]:
                x, y, hover = [*x, step - 0.5], [*y, None], [*hover, ""]
            value = layer["experts"].get(name, {}).get(key)
            x.append(step)
            y.append(_per_cent(value) if value else None)
            label = f"{safe(cut(name, 60))}, {NAMES[key]}<br>layer {safe(cut(layer['label'], 60))}"
            hover.append(f"{label}<br><b>{percent(value)}</b>")
        seen += [value for value in y if value]
        dash = {"merged": "dot", "aim_merged": "dot", "gptq": "dash"}.get(key, "solid")
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines" if len(layers) > 60 else "lines+markers",
            name=safe(cut(name, 28)) if by_name else NAMES[key],
            line={
                "color": _LINES[place % len(_LINES)] if by_name else _COLOURS[key],
                "dash": ("solid", "dash", "dot")[place // len(_LINES) % 3] if by_name else dash,
            },
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    for border in sorted({place for place in x if place % 1}):  # where another stack begins
        figure.add_vline(border, line={"color": _COLOURS["cross"], "width": 1, "dash": "dot"})
    is_log = bool(seen) and max(seen) / min(seen) > 30
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title={"text": "layer"}, **_ticks(_column(layers, "label"), 20))
    figure.update_yaxes(
        title={"text": "% of output energy"}, ticksuffix=" %", rangemode="tozero",
        type="log" if is_log else "linear",
    )  # fmt: skip
    return figure


# ---- bars ----------------------------------------------------------------------------------------


def _bars(rows: Sequence[str], series: Sequence[go.Bar], title: str) -> go.Figure:
    """Bars from left to right, the first row on top."""
    height = len(rows) * max(26, len(series) * 13 + 10)
    layout = _layout(max(30, height) + 90, barmode="group", bargap=0.25)
    layout.showlegend = len(series) > 1
    layout.xaxis.update(title={"text": title}, rangemode="tozero")
    labels = [safe(cut(row, 44)) + " " for row in rows]
    layout.yaxis.update(
        autorange="reversed", showgrid=False, tickvals=list(range(len(rows))), ticktext=labels
    )
    return go.Figure(series, layout)


def _bar(
    name: str, colour: str, values: list[Any], hover: list[str], texts: list[str] | None = None
) -> go.Bar:
    return go.Bar(
        orientation="h",
        name=name,
        x=values,
        y=list(range(len(values))),
        marker={"color": colour},
        text=texts,
        textposition="outside" if texts else "none",
        cliponaxis=False,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _one(figure: go.Figure) -> dict[str, Any]:
    return {"figures": [_plain(figure)], "variants": {"": {"figure": 0}}}


def _worst(document: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    cells = [
        (module["module"], name, one)
        for module in document["modules"]
        for name, one in module["experts"].items()
    ]
    chart: dict[str, Any] = {"figures": [], "variants": {}}
    for key in ("aim_rounded", "rounded", "change", "share"):
        if key == "share" or key in known:
            known_cells = [cell for cell in cells if cell[2][key] is not None]
            top = sorted(known_cells, key=lambda cell: -cell[2][key])[:_MOST_BARS]
            chart["variants"][key] = {"figure": len(chart["figures"])}
            chart["figures"].append(_plain(_worst_bars(key, top, known)))
    return chart


def _worst_bars(key: str, top: list[tuple[str, str, Any]], known: Sequence[str]) -> go.Figure:
    told = ("merged", "gptq", "rounded", "change", "aim_merged", "aim_rounded")
    hover = [
        f"{safe(cut(module, 90))}<br>{safe(cut(name, 60))}<br>"
        + "<br>".join(f"{NAMES[k]}: {_shown(k, one[k])}" for k in told if k in known)
        + f"<br>share of the expert's deviation: {percent(one['share'])}"
        for module, name, one in top
    ]
    main = "rounded" if key == "change" else key
    marked = {"share": [], "aim_rounded": ["aim_merged"]}.get(key, ["merged", "gptq"])
    marked = [mark for mark in marked if mark in known]
    values = [_per_cent(one[main]) for _, _, one in top]
    texts = None if marked else [percent(one[main]) for _, _, one in top]
    title = {
        "share": "% of the expert's whole deviation",
        "aim_rounded": "% of the energy of the aim",
    }.get(key, "% of the expert's output energy")
    bar = _bar(NAMES.get(main, main), _COLOURS["rounded"], values, hover, texts)
    figure = _bars([f"{cut(m, 30)} · {cut(name, 12)}" for m, name, _ in top], [bar], title)
    for mark in marked:
        figure.add_scatter(
            mode="markers",
            name=NAMES[mark],
            x=[_per_cent(one[mark]) for _, _, one in top],
            y=list(range(len(top))),
            marker={
                "color": _COLOURS[mark],
                "size": 9,
                "symbol": "x" if mark == "gptq" else "diamond",
            },
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        )
    return figure.update_layout(showlegend=bool(marked))


def _parts(document: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    names = _column(document["experts"], "name")
    titles = NAMES | {"merged": "before (merging part)", "rounded": "after (the sum)"}
    series = []
    for key in ("merged", "quantization", "cross", "rounded", "gptq"):
        if key in known:
            values = [one["figures"][key] for one in document["experts"]]
            hover = [
                f"{safe(cut(name, 60))}<br>{titles[key]}<br><b>{_shown(key, value)}</b>"
                for name, value in zip(names, values, strict=True)
            ]
            series.append(_bar(titles[key], _COLOURS[key], [_per_cent(v) for v in values], hover))
    return _one(_bars(names, series, "% of the expert's output energy"))


def _retention(document: dict[str, Any]) -> dict[str, Any]:
    experts = [one for one in document["experts"] if one["retention"]]
    stages = {"merged": "merged", "gptq": "gptq", "quantized": "rounded"}
    series = []
    for stage, colour in stages.items():
        values = [one["retention"]["percent"][stage] for one in experts]
        if any(value is not None for value in values):
            title = "plain GPTQ" if stage == "gptq" else stage
            texts = ["" if value is None else percent(value / 100) for value in values]
            hover = [
                f"{safe(cut(one['name'], 60))}, {title}<br><b>{text}</b> of the expert's own"
                for one, text in zip(experts, texts, strict=True)
            ]
            series.append(_bar(title, _COLOURS[colour], values, hover, texts))
    names = _column(experts, "name")
    figure = _bars(names, series, "% of the expert's own figure")
    figure.add_vline(100, line={"color": _COLOURS["cross"], "dash": "dot"}, layer="below")
    return _one(figure)


def _phases(document: dict[str, Any]) -> dict[str, Any]:
    rows = sorted(document["phases"].items(), key=lambda row: -row[1])
    total = sum(seconds for _, seconds in rows)
    texts = [f"{number(s)} s{shown_size(document['phase_memory'].get(n))}" for n, s in rows]
    hover = [
        f"{safe(cut(name, 60))}<br><b>{text}</b>, {percent(seconds / total if total else None)}"
        for (name, seconds), text in zip(rows, texts, strict=True)
    ]
    bar = _bar("seconds", _COLOURS["rounded"], [seconds for _, seconds in rows], hover, texts)
    return _one(_bars([name.replace("_", " ") for name, _ in rows], [bar], "seconds"))


def _alpha(document: dict[str, Any]) -> dict[str, Any]:
    labels = _column(document["layers"], "label")
    inside: dict[str, list[int]] = {}
    for place, module in enumerate(document["modules"]):
        inside.setdefault(module["layer"], []).append(place)
    x, y, hover = [], [], []
    for layer, label in enumerate(labels):
        # The modules of a layer stand beside one another.
        for step, place in enumerate(inside[label]):
            module = document["modules"][place]
            if module["alpha"] is not None:
                x.append(layer + 0.7 * ((step + 0.5) / len(inside[label]) - 0.5))
                y.append(module["alpha"])
                name = safe(cut(module["module"], 90))
                hover.append(f"{name}<br><b>α = {module['alpha']:.3g}</b>")
    figure = go.Figure(layout=_layout(280))
    figure.add_scatter(
        mode="markers",
        x=x,
        y=y,
        marker={"color": _COLOURS["rounded"], "size": 6 if len(x) < 300 else 4, "opacity": 0.75},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(title={"text": "layer"}, **_ticks(labels, 20))
    figure.update_yaxes(title={"text": "α"}, type="linear" if min(y) <= 0 else "log")
    return _one(figure)
