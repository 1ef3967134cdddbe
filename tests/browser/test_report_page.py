"""The regret report as its reader meets it: from a disk, in a real browser."""

import math
import re
import time

import pytest
from regret_samples import HOSTILE

ALL = ("llama", "t5", "clip", "moe", "one", "unmeasured", "hostile")

# A heat map is a picture: the brightness of the middle of each of its cells.
BRIGHTNESS = """
const done = arguments[arguments.length - 1];
const chart = document.getElementById("map"), z = chart.data[0].z;
const picture = new Image();
picture.onload = () => {
  const canvas = document.createElement("canvas");
  canvas.width = picture.width; canvas.height = picture.height;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  done(z.map((row, r) => row.map((_, c) => {
    const x = Math.floor((c + 0.5) / row.length * picture.width);
    const y = Math.floor((r + 0.5) / z.length * picture.height);
    const [red, green, blue] = context.getImageData(x, y, 1, 1).data;
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  })));
};
picture.src = chart.querySelector(".heatmaplayer image").getAttribute("href");
"""


def number(text):
    """A cell's number: 12.3 %, −0.41, 1,024."""
    return float(re.sub(r"[ \u00a0%,+]", "", text).replace("−", "-").replace("<", ""))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_every_report_opens_without_a_complaint_and_without_the_network(
    page, sample, name, width, dark
):
    file = sample(name).file
    page.open(file, width=width, dark=dark)
    assert page.find("h1").text == name
    assert page.complaints() == []
    # The page itself, and pictures that are written into it.
    asked = [url for url in page.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [file.as_uri()]


@pytest.mark.parametrize("name", ALL)
def test_a_phone_scrolls_tables_within_their_box_and_never_the_page(page, sample, name):
    page.open(sample(name).file, width=390, height=844)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    boxes = page.run(
        "return [...document.querySelectorAll('.scroll')].map((box) => "
        "[box.scrollWidth, box.clientWidth, box.getBoundingClientRect().right])"
    )
    assert boxes and all(right <= 390 for _, _, right in boxes)
    assert any(inner > outer for inner, outer, _ in boxes)
    for control in page.driver.find_elements("css selector", "select, input, button"):
        if control.is_displayed() and not page.run(
            "return !!arguments[0].closest('.scroll, .modebar')", control
        ):
            assert control.rect["x"] + control.rect["width"] <= 390


def test_a_phone_that_is_turned_keeps_every_chart_whole(page, sample):
    """A window that changes its width must leave each chart as high as it was drawn."""
    heights = """return [...document.querySelectorAll('.js-plotly-plot')].filter(
        (chart) => chart.offsetParent).map((chart) => {
        const box = chart.getBoundingClientRect(), svg = chart.querySelector('.main-svg');
        return [Math.round(box.height), Math.round(svg.getBoundingClientRect().height)]; })"""
    page.open(sample("llama").file, width=844, height=390)
    assert page.run(heights)
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(2)  # plotly waits a little before it draws anew
    assert page.run("return innerWidth") == 390
    for box, drawn in page.run(heights):
        assert box == pytest.approx(drawn, abs=2) and drawn > 100
    assert page.run("return document.documentElement.scrollWidth") <= 390
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- charts --------------------------------------------------------------------------------------


def test_charts_show_what_is_in_the_report(page, sample):
    one = sample("llama")
    page.open(one.file)
    layers, experts, modules = 8, 3, len(one.modules)

    z = page.run("return document.getElementById('map').data[0].z")
    assert len(z) == experts and all(len(row) == layers for row in z)
    seen = page.driver.execute_async_script(BRIGHTNESS)
    pairs = sorted((z[e][layer], seen[e][layer]) for e in range(experts) for layer in range(layers))
    # Brighter the further from the expert: the order of the figures is that of the picture.
    assert all(low[1] <= high[1] + 1 for low, high in zip(pairs, pairs[1:], strict=False))
    assert pairs[-1][1] > pairs[0][1] + 30

    # Before, plain GPTQ and after, one point a layer.
    assert page.count("#curve .scatterlayer .trace") == 3
    assert page.count("#curve .scatterlayer .point") == 3 * layers
    assert page.count("#worst .bars .point") == 15
    assert page.count("#worst .scatterlayer .point") == 15  # before, against the aim
    page.choose("worst-by", "rounded")
    assert page.count("#worst .bars .point") == 15
    assert page.count("#worst .scatterlayer .point") == 2 * 15
    assert page.count("#parts .bars .point") == 5 * experts
    assert page.count("#retention .bars .point") == 3 * experts
    assert page.count("#phases .bars .point") == len(one.content["report"]["phases"])
    strengths = [module["alpha"] for module in one.modules if module["alpha"] is not None]
    assert page.count("#alpha .scatterlayer .point") == len(strengths) == modules - 2

    widths = page.run(
        "return [...document.querySelectorAll('#worst .bars .point path')]"
        ".map((bar) => bar.getBBox().width)"
    )
    after = sorted(
        (figures["rounded"] for module in one.modules for figures in module["experts"].values()),
        reverse=True,
    )[:15]
    assert widths == sorted(widths, reverse=True)
    for width, value in zip(widths, after, strict=True):
        assert width / widths[0] == pytest.approx(value / after[0], rel=0.02)


def test_controls_of_the_charts(page, sample):
    one = sample("llama")
    page.open(one.file)
    page.choose("map-figure", "change")
    change = page.run("return document.getElementById('map').data[0].z")
    law = [module["experts"]["law"] for module in one.modules if ".layers.7." in module["module"]]
    energies = [figures["energy"] for figures in law]
    over = sum(
        energy * (figures["rounded"] - figures["merged"])
        for energy, figures in zip(energies, law, strict=True)
    )
    assert change[2][7] == pytest.approx(100 * over / sum(energies), rel=1e-3)
    rows = page.run("return document.getElementById('map').layout.yaxis.ticktext")
    assert [row.strip() for row in rows] == one.experts
    page.choose("map-view", "modules")
    z = page.run("return document.getElementById('map').data[0].z")
    assert [len(row) for row in z] == [len(one.modules)] * 3
    page.choose("map-view", "kinds")
    z = page.run("return document.getElementById('map').data[0].z")
    assert [len(row) for row in z] == [3] * 7

    page.choose("map-view", "inside-2")
    z = page.run("return document.getElementById('map').data[0].z")
    assert [len(row) for row in z] == [8] * 7
    page.choose("curve-expert", "all")
    assert page.count("#curve .scatterlayer .trace") == 3
    page.choose("curve-expert", 0)
    page.choose("curve-against", "aim")
    assert page.count("#curve .scatterlayer .trace") == 2
    first = page.run("return document.getElementById('worst').data[0].customdata[0]")
    page.choose("worst-by", "share")
    assert page.run("return document.getElementById('worst').data[0].customdata[0]") != first
    assert page.complaints() == []


@pytest.mark.parametrize("name, kind", [("moe", "mlp.experts.*.up_proj"), ("llama", "mlp.up_proj")])
def test_kinds_by_layer_are_means_by_energy(page, sample, name, kind):
    one = sample(name)
    page.open(one.file)
    page.choose("map-figure", "quantization")
    page.choose("map-view", "inside-1")
    expert = one.experts[1]
    z = page.run("return document.getElementById('map').data[0].z")
    rows = page.run("return document.getElementById('map').layout.yaxis.ticktext")
    shown = z[[row.strip() for row in rows].index(kind)]
    is_log = page.run("return !!document.getElementById('map').data[0].colorbar.tickvals")
    for layer, value in enumerate(shown):
        over = under = 0.0
        for module in one.modules:
            parts = module["module"].split(".")
            inside = ".".join("*" if part.isdigit() else part for part in parts[3:])
            if int(parts[2]) == layer and inside == kind and expert in module["experts"]:
                figures = module["experts"][expert]
                mass = figures["energy"] * module["tokens"][expert]
                over += mass * figures["quantization"]
                under += mass
        wanted = math.log10(100 * over / under) if is_log else 100 * over / under
        assert value == pytest.approx(wanted, rel=1e-3)


# ---- table ---------------------------------------------------------------------------------------


def figures_of(one, key):
    return [figures[key] * 100 for module in one.modules for figures in module["experts"].values()]


def test_sorting_by_click_and_by_keyboard(page, sample):
    from selenium.webdriver.common.keys import Keys

    one = sample("llama")
    page.open(one.file)

    def sorted_by():
        return page.run(
            "return [...document.querySelectorAll('#modules th')]"
            ".filter((head) => head.getAttribute('aria-sort') !== 'none' && head.scope === 'col')"
            ".map((head) => [head.dataset.key, head.getAttribute('aria-sort')])"
        )

    def head(key):
        return page.find(f"#modules th[data-key={key}] button")

    after = sorted(figures_of(one, "rounded"))
    before = sorted(figures_of(one, "merged"))
    assert sorted_by() == [["rounded", "descending"]]
    top = [number(text) for text in page.column("rounded")]
    assert top == pytest.approx(after[::-1][:25], rel=6e-3)

    head("rounded").click()
    assert sorted_by() == [["rounded", "ascending"]]
    assert [number(text) for text in page.column("rounded")] == pytest.approx(after[:25], rel=6e-3)

    # From that heading back by the keyboard alone to the one before it.
    page.driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)
    focused = page.driver.switch_to.active_element
    assert focused.text.startswith("Before")
    focused.send_keys(Keys.ENTER)
    assert sorted_by() == [["merged", "descending"]]
    top = [number(text) for text in page.column("merged")]
    assert top == pytest.approx(before[::-1][:25], rel=6e-3)
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    assert sorted_by() == [["merged", "ascending"]]
    assert [number(t) for t in page.column("merged")] == pytest.approx(before[:25], rel=6e-3)

    head("module").click()
    names = [module["module"] for module in one.modules for _ in module["experts"]]
    assert page.column("module") == names[:25]
    page.find("#next").click()
    assert page.column("module") == names[25:50]
    page.choose("size", 500)
    assert page.column("module") == names
    assert "in order of module" in page.find("#count").text


def test_filters(page, sample):
    one = sample("llama")
    page.open(one.file)
    page.choose("size", 500)
    everything = len(page.column("module"))
    assert everything == 8 * 7 * 3

    page.find("#filter").send_keys("layers.3 DOWN")
    assert page.column("module") == ["model.layers.3.mlp.down_proj"] * 3
    assert page.find("#count").text.startswith("3 of 168 rows")
    page.find("#filter").send_keys(" nothing such")
    assert page.column("module") == [] and page.find("#count").text.startswith("0 of 168")
    page.find("#filter").clear()
    page.find("#filter").send_keys("code")
    assert set(page.column("expert")) == {"code"}
    page.find("#filter").clear()
    page.find("#filter").send_keys(" ")

    page.choose("filter-expert", 2)
    assert set(page.column("expert")) == {"law"} and len(page.column("expert")) == 56
    page.choose("filter-target", 1)
    assert len(page.column("expert")) == 2
    page.choose("filter-expert", "")
    page.choose("filter-target", "")
    page.find("#filter-worse").click()
    worse = sum(
        figures["rounded"] > figures["merged"]
        for module in one.modules
        for figures in module["experts"].values()
    )
    shown = page.column("change")
    assert len(shown) == worse and all(text.startswith("+") for text in shown)


# ---- colours -------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """
const style = (selector, key) => getComputedStyle(document.querySelector(selector))[key];
return {
  page: style("body", "backgroundColor"), card: style("section", "backgroundColor"),
  text: style("body", "color"), quiet: style("dt", "color"),
  worse: style(".worse", "color"), better: style(".better", "color"),
  chart: style("#curve .xtick text", "fill"), label: style("#worst .ytick text", "fill"),
  bar: style("#worst .bars path", "fill"), link: style(".skip:not(x)", "color"),
};
"""


def test_dark_and_light_of_the_page_and_its_charts(page, sample):
    file = sample("llama").file
    light = page.open(file).run(COLOURS)
    assert luminance(light["page"]) > 0.8 and luminance(light["chart"]) < 0.1
    dark = page.open(file, dark=True).run(COLOURS)
    assert luminance(dark["page"]) < 0.05 and luminance(dark["chart"]) > 0.6
    for colours in (light, dark):
        for key in ("text", "quiet", "worse", "better", "chart", "label"):
            assert contrast(colours[key], colours["card"]) >= 4.5, key
        assert contrast(colours["bar"], colours["card"]) >= 3

    button = page.open(file).find("#theme")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.run(COLOURS) == dark and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.run(COLOURS) == light
    # Where nobody chose, the system's change is followed.
    page.open(file)
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    page.driver.implicitly_wait(0)
    assert (
        page.driver.execute_async_script(
            "const done = arguments[0]; setTimeout(() => done("
            "document.documentElement.dataset.theme), 300)"
        )
        == "dark"
    )


def test_everything_has_a_name(page, sample):
    page.open(sample("llama").file)
    unnamed = page.run(
        """return [...document.querySelectorAll('select, input')]
            .filter((one) => !one.labels.length || !one.labels[0].textContent.trim())
            .map((one) => one.id)"""
    )
    assert unnamed == []
    assert page.run("return document.documentElement.lang") == "en"
    charts = page.run("return [...document.querySelectorAll('.chart')].map((one) => one.ariaLabel)")
    assert len(charts) == 7 and all(charts)
    duplicates = page.run(
        "const ids = [...document.querySelectorAll('[id]')].map((one) => one.id)"
        ".filter((id) => !/^(clip|modebar|[a-f0-9]{6})/.test(id));"
        "return ids.filter((id, place) => ids.indexOf(id) !== place)"
    )
    assert duplicates == []


# ---- hostile and large ---------------------------------------------------------------------------


def test_hostile_names_do_nothing_and_are_shown_as_they_are(page, sample):
    one = sample("hostile")
    page.open(one.file)
    page.choose("size", 500)
    for view in ("modules", "kinds", "inside-0", "layers"):
        page.choose("map-view", view)
    page.choose("curve-expert", "all")
    page.choose("worst-by", "change")
    page.find("#filter").send_keys("<script>")
    page.find("#filter").clear()
    page.find("#filter").send_keys(" ")
    assert page.run("return window.hit") is None
    assert page.complaints() == []
    assert set(page.column("expert")) == set(HOSTILE)
    assert set(page.column("module")) == {module["module"] for module in one.modules}
    # Our three scripts, and nothing that a name would have made.
    assert page.count("script") == 3
    assert page.count("img, main b, main a, main svg a, iframe, [onerror], [onmouseover]") == 0
    lines = page.run(
        "return [...document.querySelectorAll('#parts .ytick text')].map((one) => one.textContent)"
    )
    assert any(line.startswith("{{ 7 * 7 }}") for line in lines)
    assert any(line.startswith("<script>window.hit = 1</script>") for line in lines)
    assert HOSTILE[1] in page.find(".facts").text
    # Names in what hovers, which plotly reads as a little HTML.
    place = page.run(
        "Plotly.Fx.hover('phases', [{curveNumber: 0, pointNumber: 0}]);"
        "Plotly.Fx.hover('parts', [{curveNumber: 0, pointNumber: 3}]);"
        "return document.querySelector('#parts .hoverlayer').textContent"
    )
    assert place.startswith(HOSTILE[3])
    assert page.count("#parts .hoverlayer a") == 0


def test_a_large_report_stays_usable(page, sample):
    one = sample("large")
    assert one.file.stat().st_size < 17_000_000
    page.open(one.file)
    # About two seconds here; the bound is for a machine that does other things meanwhile.
    assert page.seconds < 30
    z = page.run("return document.getElementById('map').data[0].z")
    assert len(z) == 20 and len(z[0]) == 200
    slow = page.run(
        "const start = performance.now();"
        "document.querySelector('#modules th[data-key=merged] button').click();"
        "document.getElementById('map-view').value = 'modules';"
        "document.getElementById('map-view').dispatchEvent(new Event('change'));"
        "return (performance.now() - start) / 1000"
    )
    assert slow < 15
    assert len(page.column("module")) == 25
    assert page.find("#count").text.startswith("28,000 of 28,000 rows")
    assert page.complaints() == []


def test_a_report_without_figures_shows_the_rest(page, sample):
    one = sample("unmeasured")
    page.open(one.file)
    assert page.count("#map, #curve, #worst, #parts, #retention") == 0
    assert "no figures per expert" in page.find(".lead").text
    assert len(page.column("module")) == 25 and "rounded" not in page.column("target")
    assert page.count("#phases .bars .point") == 5
