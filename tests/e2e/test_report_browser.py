"""The report in a real browser: Debian's Chromium, headless, driven through selenium."""

from __future__ import annotations

import base64
import itertools
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_report import write_run, write_unfinished

from bitstrata import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Debian's packages chromium and chromium-driver, which .ci/packages installs",
)
PHONE, DESK = (360, 740), (1280, 900)

#: Text that is not hidden, with its colour over the colours behind it, and large or not, by WCAG's definition.
TEXTS = """
const number = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const light = (c) => {
  const [r, g, b] = c.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName) || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  let back = [];
  for (let e = element; e; e = e.parentElement) back.push(number(getComputedStyle(e).backgroundColor));
  const behind = back.reverse().reduce((below, c) => over(c, below), [255, 255, 255, 1]);
  const svg = element instanceof SVGElement;
  const front = over(number(svg ? style.fill : style.color), behind);
  const [a, b] = [light(front), light(behind)].sort((x, y) => y - x);
  found.push([element.textContent.trim().slice(0, 40), (a + .05) / (b + .05), element.tagName]);
}
return found;
"""

#: Graphics that carry meaning: their contrast to the card they lie on.
GRAPHICS = """
const light = (c) => { const [r, g, b] = c.match(/\\d+/g).map((v) => v / 255).map(
  (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const probe = document.createElement("i"); document.body.append(probe);
const of = (name) => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
const card = of("card");
const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
const result = arguments[0].map((name) => contrast(of(name), card));
probe.remove();
return result;
"""

#: Elements that reach out of the page to the right, other than by scrolling inside a box of their own.
OVERFLOW = """
const width = document.documentElement.clientWidth;
const inside = ".scroll, .unseen";
const seen = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(inside));
const wide = seen.filter((e) => e.getBoundingClientRect().right > width + 1)
  .map((e) => `${e.tagName} ${e.className.baseVal ?? e.className}`);
return [document.documentElement.scrollWidth, width, wide];
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of one run, one of several (two seeds, one unfinished, one empty), and one of an unfinished run."""
    folder = tmp_path_factory.mktemp("pages")
    seeds = [write_run(folder / f"net-seed{seed}", seed) for seed in (0, 1)]
    (folder / "a-name-so-long-that-it-would-push-everything-to-the-right-if-it-could").mkdir()
    rest = [write_unfinished(folder / "stopped", 3, lr=0.1), *folder.glob("a-name*")]
    return {
        "one": report.write(seeds[0], folder / "one.html"),
        "many": report.write([*seeds, *rest], folder / "many.html"),
        "little": report.write(rest[0], folder / "little.html"),
    }


def show(driver: Any, page: Path, size: tuple[int, int] = DESK, scheme: str = "light", motion: str = "reduce") -> None:
    """Open a page in a window of this size, in a colour scheme; without motion, for which clicks would have to wait."""
    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.as_uri())


def press(driver: Any, *keys: str) -> Any:
    """Press keys; returns what then has the focus."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()
    return driver.switch_to.active_element


def shown(driver: Any) -> list[str]:
    """Headings of the layers that are to be seen."""
    panes = driver.find_elements("css selector", "#panes .pane h3")
    return [pane.text.replace("\n", " ") for pane in panes if pane.is_displayed()]


@pytest.mark.parametrize("name", ["one", "many"])
def test_the_page_asks_for_nothing_and_reports_no_error(driver, pages, name):
    driver.get_log("browser"), driver.get_log("performance")
    show(driver, pages[name])
    assert driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    sent = [
        entry["message"] for entry in driver.get_log("performance") if 'Network.requestWillBeSent"' in entry["message"]
    ]
    assert len([message for message in sent if '"url":"data:,"' not in message]) == 1  # the page itself
    assert driver.get_log("browser") == []
    blocked = (
        "const done = arguments[0]; fetch('https://example.org/').then(() => done('loaded'), () => done('refused'))"
    )
    assert driver.execute_async_script(blocked) == "refused"
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]


@pytest.mark.parametrize("size", [PHONE, DESK, (700, 900)], ids=["phone", "desk", "between"])
@pytest.mark.parametrize("name", ["one", "many"])
def test_nothing_reaches_out_of_the_page_and_every_panel_is_seen(driver, pages, name, size):
    show(driver, pages[name], size)
    width, window, wide = driver.execute_script(OVERFLOW)
    assert wide == []
    assert width <= window == size[0]
    panels = driver.find_elements("css selector", "main > section")
    assert len(panels) == 1 + len(report.all_panels())
    for panel in panels:
        assert panel.is_displayed()
        assert panel.size["height"] > 60
    charts = driver.find_elements("css selector", ".chart")
    assert sum(chart.is_displayed() for chart in charts) >= 4
    for chart in filter(lambda chart: chart.is_displayed(), charts):  # exactly one form of each, as wide as its place
        forms = [form for form in chart.find_elements("css selector", "svg") if form.is_displayed()]
        assert len(forms) == 1
        assert forms[0].get_attribute("aria-label")
        assert abs(forms[0].size["width"] - chart.size["width"]) < 2


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_what_a_run_lacks_is_one_list_at_the_end(driver, pages, size):
    show(driver, pages["little"], size)
    width, window, wide = driver.execute_script(OVERFLOW)
    assert (wide, width <= window) == ([], True)
    panels = driver.find_elements("css selector", "main > section")
    listed = panels[-1].find_elements("css selector", "dt")
    assert len(panels) - 2 + len(listed) == len(report.all_panels())
    assert len(listed) == len(panels[-1].find_elements("css selector", "dd")) > 3
    assert all(part.is_displayed() and part.text for part in listed)
    press(driver, "\ue004")
    driver.find_element("css selector", 'nav a[href="#not-shown"]').click()
    assert driver.execute_script("return location.hash") == "#not-shown"


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_labels_in_charts_are_neither_cut_nor_small(driver, pages, size):
    show(driver, pages["many"], size)
    script = """return [...document.querySelectorAll(".chart text")].filter((t) => t.checkVisibility()).map((t) => {
      const [box, all] = [t.getBoundingClientRect(), t.closest(".chart").getBoundingClientRect()];
      const turned = t.getScreenCTM(), scale = Math.hypot(turned.a, turned.b);
      const size = parseFloat(getComputedStyle(t).fontSize) * scale;
      return [t.textContent, box.left - all.left, all.right - box.right, size]; })"""
    labels = driver.execute_script(script)
    assert len(labels) > 20
    assert [label for label in labels if label[1] < -6 or label[2] < -6] == []
    assert [label for label in labels if label[3] < 9.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_graphics_stand_out(driver, pages, scheme):
    show(driver, pages["many"], DESK, scheme)
    for details in driver.find_elements("css selector", "details"):
        driver.execute_script("arguments[0].open = true", details)
    texts = driver.execute_script(TEXTS)
    assert len(texts) > 200
    assert any(tag == "text" for _, _, tag in texts)
    assert [row for row in texts if row[1] < 4.5] == []
    names = ["ink", "muted", "accent", "float", *(f"c{i}" for i in range(1, 9))]
    contrast = dict(zip(names, driver.execute_script(GRAPHICS, names), strict=True))
    assert {name: value for name, value in contrast.items() if value < 3} == {}
    body = driver.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(body) < 60) == (scheme == "dark")


def test_tab_goes_through_the_page_in_order_and_is_seen(driver, pages):
    show(driver, pages["one"])
    places, outlines = [], []
    first = press(driver, "\ue004")
    assert first.text == "Skip to the results"
    assert first.is_displayed()
    assert first.rect["y"] >= 0
    while True:
        active = driver.switch_to.active_element
        if active.tag_name == "body" or len(places) > 60:
            break
        where = "const r = arguments[0].getBoundingClientRect(); return [r.top + scrollY, r.left, r.height]"
        places.append((active.tag_name, driver.execute_script(where, active)))
        outlines.append(driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active))
        press(driver, "\ue004")
    tags = [tag for tag, _ in places]
    assert tags.count("a") == 1 + len(report.all_panels())
    assert {"select", "input", "summary"} <= set(tags)
    assert set(outlines) == {"solid"}
    tops = [top for _, (top, _, _) in places[1:]]
    assert all(after >= before - 30 for before, after in itertools.pairwise(tops))


def test_the_skip_link_leads_to_the_results(driver, pages):
    show(driver, pages["one"])
    press(driver, "\ue004")
    press(driver, "\ue007")
    assert driver.switch_to.active_element.get_attribute("id") == "main"


def test_arrow_keys_choose_layer_and_precision(driver, pages):
    show(driver, pages["one"])
    assert shown(driver) == ["block.conv 4 bits"]
    active = press(driver, "\ue004")
    while active.tag_name != "select":
        active = press(driver, "\ue004")
    press(driver, "\ue013")  # up
    assert shown(driver) == ["stem 4 bits"]
    radio = press(driver, "\ue004")
    assert radio.get_attribute("type") == "radio"
    press(driver, "\ue014")  # right
    assert shown(driver) == ["stem 2 bits"]
    press(driver, "\ue014")
    assert shown(driver) == ["stem 1 bit"]
    press(driver, "\ue012")  # left
    assert shown(driver) == ["stem 2 bits"]


def test_arrow_keys_choose_the_layer_that_is_shown_over_time(driver, pages):
    show(driver, pages["one"], PHONE)
    place = "#time-panes .pane.on"
    assert driver.find_element("css selector", f"{place} h3").text.startswith("block.conv")  # the stem tells less
    multiples = driver.find_elements("css selector", f"{place} .multiple")
    assert len(multiples) == 14
    for multiple in multiples:
        drawing = multiple.find_element("css selector", "svg")
        assert drawing.get_attribute("aria-label").count("Last values: ") == 1
        assert 200 < drawing.size["width"] <= PHONE[0]
    driver.execute_script("document.querySelector('form[data-panes=time-panes] select').focus()")
    press(driver, "\ue013")  # up
    assert driver.find_element("css selector", f"{place} h3").text.startswith("stem")
    assert len(driver.find_elements("css selector", place)) == 1
    assert shown(driver) == ["block.conv 4 bits"]  # the other selector has not moved


def test_the_selector_knows_runs_and_what_they_lack(driver, pages):
    from selenium.webdriver.support.ui import Select

    show(driver, pages["many"], PHONE)
    runs = Select(driver.find_element("id", "pick-run"))
    assert [option.text for option in runs.options] == ["net-seed0", "net-seed1"]
    runs.select_by_visible_text("net-seed1")
    assert shown(driver) == ["block.conv 4 bits"]
    assert len([p for p in driver.find_elements("css selector", "#panes .pane[data-run='1']") if p.is_displayed()]) == 1
    driver.execute_script(
        "for (const p of document.querySelectorAll(\"#panes .pane[data-precision='1']\")) p.dataset.precision = '9'"
    )
    driver.find_element("css selector", "input[value='1']").click()
    assert shown(driver) == []
    assert driver.find_element("id", "no-pane").is_displayed()


def test_without_scripts_all_layers_are_seen(driver, pages):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(driver, pages["one"])
        page = driver.execute_cdp_cmd(
            "DOMSnapshot.captureSnapshot", {"computedStyles": ["display"], "includeDOMRects": True}
        )
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    seen = [page["strings"][i].strip() for i in page["documents"][0]["layout"]["text"] if i >= 0]
    # At 4, 2 and 1 bits, and once over time; the selectors are hidden.
    assert (seen.count("stem"), seen.count("block.conv")) == (4, 4)


def test_motion_is_reduced_on_request(driver, pages):
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    show(driver, pages["one"], motion="no-preference")
    assert driver.execute_script(behaviour) == "smooth"
    show(driver, pages["one"], motion="reduce")
    assert driver.execute_script(behaviour) == "auto"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_of_the_page_are_not_blank(driver, pages, scheme, tmp_path):
    show(driver, pages["one"], PHONE, scheme)
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": PHONE[0], "height": height, "scale": 1}
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    data = base64.b64decode(picture["data"])
    assert struct.unpack(">II", data[16:24]) == (PHONE[0], height)

    from PIL import Image

    (tmp_path / "page.png").write_bytes(data)
    colors = Image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    assert len(colors) > 500
    background = max(colors)[1]
    assert (max(background) < 60) == (scheme == "dark")
