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
from ...run_report import QuantizationReport
from .figures import report_figures
from .retention import Retention
from .texts import NAMES, cut, duration, number, percent, points

_ASSETS = Path(__file__).parent / "assets"
# Digits that are told; the JSON document has them all.
_DIGITS = 5


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
    # Here, since plotly takes a second to import, and whoever quantizes comes by this file.
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    from .charts import page_charts

    known = _present(document)
    data = {"charts": page_charts(document, known), "table": module_table(document)}
    scripts = {"plotly": get_plotlyjs().replace("\r", ""), "page": _asset("page.js")}
    html = _template().render(
        document=document,
        run=document["run"],
        baseline=document["baseline"],
        facts=list(_facts(document)),
        lead=_lead(document),
        known={key: NAMES[key] for key in known},
        evaluated=any(one["retention"] for one in document["experts"]),
        guards=[one for one in document["modules"] if one["target"] != "experts" and one["reason"]],
        charts=data["charts"],
        data=json_for_html(data),
        style=_asset("page.css"),
        scripts=scripts,
        policy=_policy(scripts.values()),
        plotly_version=get_plotlyjs_version(),
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
    environment.filters["cut"] = lambda value: cut(value, 48)
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


# ---- the table of modules ------------------------------------------------------------------------

_TARGETS = {"experts": "experts", "merged": "kept merged", "rtn": "rounded to nearest"}


def module_table(document: dict[str, Any]) -> dict[str, Any]:
    """The table's columns and rows, one per module and expert; of a text its place in ``names``."""
    layers = {row["label"]: place for place, row in enumerate(document["layers"])}
    experts = {row["name"]: place for place, row in enumerate(document["experts"])}
    modules = document["modules"]
    targets = list(dict.fromkeys(_TARGETS.get(one["target"], one["target"]) for one in modules))
    reasons = list(dict.fromkeys(one["reason"] for one in modules if one["reason"]))
    columns = [
        {"key": "module", "title": "Module", "names": [one["module"] for one in modules]},
        {"key": "expert", "title": "Expert", "names": list(experts)},
        *({"key": key, "title": title, "kind": kind} for key, (title, kind) in _NUMBERS.items()),
        {"key": "layer", "title": "Layer", "names": list(layers)},
        {"key": "target", "title": "Target", "names": targets},
        {"key": "reason", "title": "Reason", "names": reasons},
    ]
    rows = []
    for place, module in enumerate(modules):
        names = [name for name in experts if name in module["tokens"] or name in module["experts"]]
        for name in names or [None]:
            one = module["experts"].get(name, {})
            known = module | {"tokens": module["tokens"].get(name)} | one
            rows.append(
                [
                    place,
                    experts.get(name),
                    *(_rounded(known.get(key)) for key in _NUMBERS),
                    layers[module["layer"]],
                    targets.index(_TARGETS.get(module["target"], module["target"])),
                    reasons.index(module["reason"]) if module["reason"] else None,
                ]
            )
    used = [n for n in range(len(columns)) if any(row[n] is not None for row in rows)]
    return {
        "columns": [columns[n] for n in used],
        "rows": [[row[n] for n in used] for row in rows],
    }


# Column → its heading, and how its values are shown.
_NUMBERS = {
    "merged": ("Before", "percent"),
    "rounded": ("After", "percent"),
    "change": ("Change, points", "points"),
    "gptq": ("Plain GPTQ", "percent"),
    "over_gptq": ("After − GPTQ, points", "points"),
    "quantization": ("Rounding part", "percent"),
    "cross": ("Cross term, points", "points"),
    "solved": ("Target, unrounded", "percent"),
    "aim_merged": ("Aim: before", "percent"),
    "aim_rounded": ("Aim: after", "percent"),
    "share": ("Share of expert", "percent"),
    "weight": ("Weight", "number"),
    "tokens": ("Tokens", "number"),
    "alpha": ("α", "number"),
    "bits": ("Bits", "number"),
    "held_out_gain": ("Held-out gain", "number"),
}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _present(document: dict[str, Any]) -> list[str]:
    """The figures that are known of at least one expert."""
    return [
        key for key in NAMES if any(one["figures"][key] is not None for one in document["experts"])
    ]


# ---- texts ---------------------------------------------------------------------------------------


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
