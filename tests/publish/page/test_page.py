"""The page as a text: self-contained, and nothing of a report gets out of its place."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import regret_samples as samples

from epmq_gptq.publish.page import read_report, report_page
from epmq_gptq.publish.page.render import json_for_html
from epmq_gptq.publish.page.retention import read_retention
from epmq_gptq.publish.page.texts import duration, number, percent, points


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.texts = [], [], []
        self._inside = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name."""
    made = {}
    folder = tmp_path_factory.mktemp("pages")
    modules, experts, options = samples.hostile()
    cases = {
        "llama": (samples.llama(2), ["math", "code"], {}),
        "hostile": (modules, experts, options),
        "unmeasured": (samples.llama(2), ["math"], {"measured": False}),
        "one": (["lm_head"], ["math"], {"aim": False}),
    }
    for name, (modules, experts, options) in cases.items():
        content = samples.report(modules, experts, **options)
        evaluation = samples.retention(experts) if name != "one" else None
        place = samples.write(folder / name, content, evaluation)
        made[name] = report_page(read_report(place), retention=read_retention(place))
    return made


@pytest.mark.parametrize("name", ["llama", "hostile", "unmeasured", "one"])
def test_nothing_is_fetched_and_only_our_scripts_run(pages, name):
    html = pages[name]
    elements = Elements(html)
    assert [tag for tag, _ in elements.tags].count("script") == 3
    data, plotly, page = elements.scripts
    for _, attributes in elements.tags:
        for key in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:,", "#")), value
        assert not any(key.startswith("on") for key in attributes)
    (policy,) = [
        attributes["content"]
        for _, attributes in elements.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    # Neither ends the element that it stands in, nor is changed when it is read.
    assert not re.search(r"</script|<!--|\r", plotly + page)
    for script in (plotly, page):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    json.loads(data)
    outside = html.replace(plotly, "")
    assert not re.search(r"url\(|@import|https?://", outside)
    assert len(html) < 6_000_000


def test_texts_of_the_report_stay_texts(pages):
    elements = Elements(pages["hostile"])
    shown = "".join(elements.texts)
    for name in samples.HOSTILE:
        assert name.replace("\n", " ") in shown
    data = json.loads(elements.scripts[0])
    names = next(one["names"] for one in data["table"]["columns"] if one["key"] == "expert")
    assert names == list(samples.HOSTILE)
    # Plotly reads a little HTML, so what it shows was escaped.
    charts = json.dumps({name: chart["figures"] for name, chart in data["charts"].items()})
    assert "<script" not in charts and "<img" not in charts and "<a " not in charts
    assert not [tag for tag, _ in elements.tags if tag in ("img", "b")]
    # Of links there is the one that skips to the table.
    assert [attributes for tag, attributes in elements.tags if tag == "a"] == [
        {"class": "skip", "href": "#table"}
    ]
    assert "window.hit" not in "".join(elements.scripts[1:])


def test_json_inside_of_html():
    texts = ["</script>", "<!--", "<script", "&lt;", "\u2028\u2029", "é \U0001f600", '"\\']
    written = json_for_html({"texts": texts})
    assert not set("<>&\u2028\u2029") & set(str(written))
    assert json.loads(str(written)) == {"texts": texts}
    with pytest.raises(ValueError):
        json_for_html([float("nan")])


def test_names_that_no_file_can_hold(tmp_path):
    content = samples.report(["model.layers.0.q\ud800"], ["ma\udfffth"])
    page = report_page(read_report(samples.write(tmp_path, content)))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert "ma?th" in page


def test_provenance_of_any_shape(tmp_path):
    """It is published by others, and not checked."""
    for odd in (
        {"versions": 3, "experts": "x", "merged": [], "merge": {"method": {}}, "alpha": [1]},
        {"experts": [1, {"name": "math", "weight": "2", "source": 5}], "alpha": 0.25, "eta": True},
        {"alpha": float("inf"), "rho": None, "method": "E-PMQ", "profile": 7},
    ):
        content = samples.report(samples.llama(1), ["math"])
        content["report"]["provenance"] = odd
        page = report_page(read_report(samples.write(tmp_path, content)))
        assert "Regret report" in page


@pytest.mark.parametrize(
    "value, text",
    [
        (0.02134, "2.13 %"),
        (0.021, "2.10 %"),
        (0.1, "10.0 %"),
        (0.5, "50.0 %"),
        (1.0, "100 %"),
        (0.9996, "100 %"),
        (12.345, "1,234 %"),
        (9.996, "1,000 %"),
        (0.000123, "0.0123 %"),
        (0.000001, "< 0.001 %"),
        (0.0, "0 %"),
        (None, "–"),
    ],
)
def test_per_cent_has_three_digits(value, text):
    assert percent(value).replace("\u00a0", " ") == text


def test_other_numbers():
    assert points(0.0051) == "+0.510" and points(-0.12) == "−12.0" and points(0) == "0"
    assert number(8192) == "8,192" and number(0.5) == "0.500" and number(None) == "–"
    assert duration(12.34) == "12.3 s" and duration(214.2) == "3 min 34 s"
    assert duration(3 * 3600 + 61) == "3 h 1 min"
