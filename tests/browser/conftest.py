"""A real headless Chromium, and pages of reports in it."""

import json
import os
import shutil
import time

import pytest
import regret_samples as samples

from epmq_gptq.publish.page import read_report, report_page
from epmq_gptq.publish.page.retention import read_retention

CHROMIUM = os.environ.get("EPMQ_CHROMIUM") or shutil.which("chromium")
DRIVER = os.environ.get("EPMQ_CHROMEDRIVER") or shutil.which("chromedriver")
WANTED = os.environ.get("EPMQ_BROWSER") == "1"

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/browser" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)


class Page:
    """One page in the browser, and what the tests ask of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, file, *, width=1280, height=900, dark=False):
        """Load a file as a screen of this size would; logs of what was before are dropped."""
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        start = time.perf_counter()
        self.driver.get(file.as_uri())
        self.seconds = time.perf_counter() - start
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def count(self, selector):
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def choose(self, name, value):
        """Choose an option as a user does."""
        from selenium.webdriver.support.select import Select

        Select(self.find(f"#{name}")).select_by_value(str(value))

    def column(self, key):
        """The texts of one column of the table of modules, as shown."""
        return self.run(
            """const heads = [...document.querySelectorAll('#modules thead th')];
            const place = heads.findIndex((head) => head.dataset.key === arguments[0]);
            return [...document.querySelectorAll('#modules tbody tr')]
                .map((row) => row.cells[place].textContent);""",
            key,
        )

    def complaints(self):
        """What the console has at the level of an error."""
        return [one for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]

    def requests(self):
        """The addresses that were asked for since the page was opened, its own among them."""
        messages = [
            json.loads(one["message"])["message"] for one in self.driver.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    missing = None
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing = "selenium is not installed (extra `browser`)"
    if CHROMIUM is None or DRIVER is None:
        missing = "there is no Chromium (tests/browser/setup.sh installs it)"
    if missing:
        (pytest.fail if WANTED else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    return Page(driver)


class Sample:
    """A made-up report: its content, its figures, and the file of its page."""

    def __init__(self, folder, modules, experts, *, baseline=False, evaluated=False, **options):
        self.experts = list(experts)
        self.content = samples.report(modules, experts, **options)
        evaluation = samples.retention(experts) if evaluated else None
        report = read_report(samples.write(folder, self.content, evaluation))
        other = None
        if baseline:
            plain = samples.report(modules, experts, profile="gptq", rounding=2.2)
            other = read_report(samples.write(folder.with_name(f"{folder.name}-gptq"), plain))
        html = report_page(report, baseline=other, retention=read_retention(folder))
        self.file = folder.with_suffix(".html")
        self.file.write_text(html, encoding="utf-8")

    @property
    def modules(self):
        return self.content["report"]["modules"]


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Makes a sample once, by name."""
    folder = tmp_path_factory.mktemp("reports")
    made = {}
    kinds = {
        "llama": lambda: (samples.llama(8), ["math", "code", "law"], dict(exceptions=2)),
        "t5": lambda: (samples.t5(3), ["qa", "summary"], {}),
        "clip": lambda: (samples.clip(3), ["cars", "mnist"], dict(aim=False)),
        "moe": lambda: (samples.moe(3, 8), ["math", "code"], {}),
        "one": lambda: (["model.layers.0.mlp.down_proj"], ["math"], {}),
        "unmeasured": lambda: (samples.llama(2), ["math", "code"], dict(measured=False)),
        "large": lambda: (samples.llama(200), [f"expert {n}" for n in range(20)], {}),
        "hostile": lambda: samples.hostile(),
    }

    def make(name):
        if name not in made:
            modules, experts, options = kinds[name]()
            rich = name in ("llama", "large")
            options = {"baseline": rich, "evaluated": rich or name == "hostile"} | options
            made[name] = Sample(folder / name, modules, experts, **options)
        return made[name]

    return make
