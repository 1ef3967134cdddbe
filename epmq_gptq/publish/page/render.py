"""The regret report as one HTML file that needs nothing else: no network, no other file.

Every text of the report may be a stranger's: the template escapes it, the data block cannot be left
by a ``</script>``, the script writes it as text, and the page's own policy lets no other script run
and no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...io.console import human_size
from ...report import QuantizationReport
from .figures import report_figures
from .retention import Retention

_ASSETS = Path(__file__).parent / "assets"
PLOTLY = "plotly-cartesian.min.js"
PLOTLY_VERSION = "4.1.1"
# Digits that are told; the JSON document has them all.
_DIGITS = 5
# Figures of the document → those of the page's data, per module and expert.
_EXTRAS = ("weight", "share", "energy", "rows")


def report_page(
    report: QuantizationReport,
    *,
    baseline: QuantizationReport | None = None,
    retention: Retention | None = None,
) -> str:
    """One self-contained HTML document.

    Args:
        report: see :func:`~epmq_gptq.publish.page.read_report`.
        baseline: of a run with plain GPTQ on the same merge.
        retention: see :func:`~epmq_gptq.publish.page.read_retention`.

    Raises:
        EPMQInputError: the baseline is that of another model.
    """
    return page_of(report_figures(report, baseline, retention))


def page_of(document: dict[str, Any]) -> str:
    """The page of what :func:`~epmq_gptq.publish.page.report_figures` returned."""
    scripts = {"plotly": _asset(PLOTLY), "page": _asset("page.js")}
    html = _template().render(
        document=document,
        run=document["run"],
        baseline=document["baseline"],
        facts=list(_facts(document)),
        lead=_lead(document),
        has=_present(document),
        evaluated=any(one["retention"] for one in document["experts"]),
        guards=[one for one in document["modules"] if one["target"] != "experts" and one["reason"]],
        data=json_for_html(page_data(document)),
        style=_asset("page.css"),
        scripts=scripts,
        policy=_policy(scripts.values()),
        plotly_version=PLOTLY_VERSION,
    )
    # JSON may hold halves of characters, which no file can.
    return html.encode("utf-8", "replace").decode("utf-8")


@lru_cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@lru_cache
def _template():
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_ASSETS),
    )
    environment.filters |= {"percent": percent, "points": points, "number": number}
    environment.filters["short"] = lambda value: "–" if value is None else f"{value:.3g}"
    environment.filters |= {"seconds": duration, "size": human_size}
    return environment.get_template("page.html.j2")


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy under which these scripts run, and nothing else does."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def json_for_html(data: Any) -> str:
    """JSON that can stand inside a ``<script>`` element, whatever its texts hold."""
    from markupsafe import Markup

    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # All three occur within strings only, where JSON knows these escapes.
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


# ---- the data of the page ------------------------------------------------------------------------


def page_data(document: dict[str, Any]) -> dict[str, Any]:
    """What the page's script reads: the document's figures as flat lists, group by expert."""
    experts = [one["name"] for one in document["experts"]]
    modules = document["modules"]
    labels = {label: place for place, label in enumerate(_column(document["layers"], "label"))}
    kinds = {kind: place for place, kind in enumerate(_column(document["kinds"], "kind"))}
    columns = ("module", "target", "reason", "bits", "alpha", "held_out_gain")
    data = {
        "experts": experts,
        "judged_by": document["judged_by"],
        "layers": _column(document["layers"], "label"),
        "stacks": _column(document["layers"], "stack"),
        "kinds": list(kinds),
        "modules": {key: [_rounded(one[key]) for one in modules] for key in columns}
        | {
            "layer": [labels[one["layer"]] for one in modules],
            "kind": [kinds[one["kind"]] for one in modules],
        },
        "cells": _flat(modules, experts, (*_present(document), *_EXTRAS)),
        "by_layer": _flat(document["layers"], experts, _present(document)),
        "by_kind": _flat(document["kinds"], experts, _present(document)),
        "by_expert": {
            key: [_rounded(one["figures"][key]) for one in document["experts"]]
            for key in _present(document)
        },
        "retention": [
            one["retention"] and one["retention"]["percent"] for one in document["experts"]
        ],
        "phases": document["phases"],
        "phase_memory": {n: human_size(size) for n, size in document["phase_memory"].items()},
    }
    # Tokens are known of experts without a figure, too.
    data["cells"]["tokens"] = [one["tokens"].get(name) for one in modules for name in experts]
    return data


def _column(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _flat(
    rows: Sequence[dict[str, Any]], experts: Sequence[str], keys: Iterable[str]
) -> dict[str, list[Any]]:
    """Figure → one value per row and expert, None where it is not known."""
    return {
        key: [_rounded(row["experts"].get(name, {}).get(key)) for row in rows for name in experts]
        for key in keys
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _present(document: dict[str, Any]) -> list[str]:
    """The figures that are known of at least one expert."""
    return [
        key
        for key in document["figures"]
        if any(one["figures"][key] is not None for one in document["experts"])
    ]


# ---- texts ---------------------------------------------------------------------------------------


def percent(share: float | None) -> str:
    """A share as per cent with three significant digits."""
    return "–" if share is None else f"{_digits(100 * share)}\u00a0%"


def points(change: float | None) -> str:
    """A difference of shares, in percentage points with its sign."""
    if change is None:
        return "–"
    return f"{'+' if change > 0 else '−' if change < 0 else ''}{_digits(abs(100 * change))}"


def number(value: float | None) -> str:
    """Three significant digits; whole numbers in full."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else _digits(value)


def _digits(value: float) -> str:
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.0005:
        return "< 0.001"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _facts(document: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """The run in a few words, a pair each."""
    run = document["run"]
    baseline = document["baseline"]
    # What was read as JSON may be of any type; what is shown is text.
    alpha, eta, rho = (_option(run[key]) for key in ("alpha", "eta", "rho"))
    method = " ".join(filter(None, (run["method"], run["profile"] and f"({run['profile']})")))
    facts = {
        "Merged model": run["merged"],
        "Base": run["base"],
        "Merged by": run["merge_method"],
        "Method": method,
        "Bits": _some(run["bits"]),
        "Group size": _some(run["group_size"]),
        "Experts": str(len(document["experts"])),
        "Modules": f"{run['modules']:,} in {_layers(document)}",
        "Calibration": f"{run['tokens']:,} tokens, {run['rows']:,} rows",
        "α": alpha,
        "η, ρ": f"{eta}, {rho}" if eta and rho else "",
        "Expert weighting": run["weighting"],
        "Time": duration(run["seconds"]),
        "Peak memory": ", ".join(
            f"{human_size(size)} ({name})" for name, size in document["peak_memory"].items()
        ),
        "Baseline": baseline
        and f"{baseline['checkpoint']}: {baseline['profile'] or 'GPTQ'}, "
        f"{_some(baseline['bits'])} bits, groups of {_some(baseline['group_size'])}",
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return ((key, text) for key, text in facts.items() if text)


def _layers(document: dict[str, Any]) -> str:
    count = len(document["layers"])
    return f"{count:,} layer{'' if count == 1 else 's'}"


def _some(values: Sequence[int]) -> str:
    return " and ".join("whole rows" if value == -1 else str(value) for value in values)


def _option(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int)) else ""


def _lead(document: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the first sentence: plain means over the experts, and the worst one."""
    experts = [one for one in document["experts"] if one["figures"]["rounded"] is not None]
    if not experts:
        return None

    def mean(key: str) -> float | None:
        values = [one["figures"][key] for one in experts]
        return None if None in values else sum(values) / len(values)

    judge = document["judged_by"]
    worst = max(experts, key=lambda one: one["figures"][judge] or 0.0)
    keys = ("merged", "rounded", "gptq", "aim_merged", "aim_rounded")
    return {key: mean(key) for key in keys} | {
        "worst": worst["name"],
        "worst_figure": worst["figures"][judge],
        "count": len(experts),
    }
