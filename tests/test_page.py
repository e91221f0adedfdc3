"""The report's page in a real browser, opened from disk: it shows, moves and sorts, and asks nobody for anything."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_runs import held_out, make_run, untrained

from mde_dist.reporting.history import read_runs
from mde_dist.reporting.pages import collect, render

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

QUIET = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars"

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=2">',
    "<svg onload=window.hacked=3>",
    "{{ 7*7 }}<!--",
    "javascript:window.hacked=4",
    "a'b\"c&amp;d",
    "\u202eright to left, ümlaut, 深度",
    "x" * 300,
]
"""Keys and scenes that a data set might come with."""


@pytest.fixture(scope="module")
def pages(room_shards, scratch) -> dict[str, Path]:
    """One run, one that went on three times, both, and one whose names mean harm; each name is a page's."""
    folder, images = scratch("pages"), held_out(room_shards)
    weights = untrained(folder / "weights.safetensors", images)
    calm = make_run(folder / "calm", images, weights=weights)
    restarted = make_run(folder / "restarted", images, starts=(0, 336, 600, 960), seed=1)
    strange = replace(images, keys=HOSTILE, scenes=[*HOSTILE[1:4], *HOSTILE[1:4], *HOSTILE[:2]])
    bad = make_run(folder / "<b>bad\"'&", strange, changes={"optim.lr": "</pre><script>window.hacked=5</script>"})
    shown = {"calm": [calm], "restarted": [restarted], "both": [calm, restarted], "bad": [bad, calm]}
    for name, runs in shown.items():
        (folder / f"{name}.html").write_text(render(collect(read_runs(runs)), "python -m mde_dist.report"))
    return {name: folder / f"{name}.html" for name in shown}


@pytest.fixture(scope="module")
def browser(scratch) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET.split(), f"--user-data-dir={scratch('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def visit(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Open a page as a phone or a desktop would."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def one(browser: Any, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


# what is drawn of an image: its colours as numbers
PIXELS = """
const picture = arguments[0], canvas = document.createElement("canvas");
await picture.decode();
[canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
const context = canvas.getContext("2d");
context.drawImage(picture, 0, 0);
const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
return [...new Uint32Array(bytes.buffer)];
"""


def pixels(browser: Any, picture: Any) -> list[int]:
    return browser.execute_script(f"return (async (...arguments) => {{{PIXELS}}})(...arguments)", picture)


def charts(browser: Any) -> dict[tuple[str, str], Any]:
    """The data behind the charts of the page that is open, by title and axis."""
    found = [json.loads(script.get_attribute("textContent")) for script in all_of(browser, ".plot > script")]
    return {(data["title"], data["over"]): data for data in found}


def test_it_is_silent_and_asks_nobody(browser, pages):
    browser.get_log("browser"), browser.get_log("performance")
    for name, page in pages.items():
        assert page.stat().st_size < 1_000_000, name
        visit(browser, page)
        one(browser, ".film input[type=range]").send_keys(Keys.HOME, Keys.ARROW_RIGHT)
        one(browser, ".sortable th button").click()
        one(browser, ".plot svg").send_keys(Keys.ARROW_LEFT)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in asked} == {"file", "data"}
    assert {url for url in asked if url.startswith("file:")} == {page.as_uri() for page in pages.values()}
    assert browser.get_log("browser") == []


def test_it_forbids_what_is_not_its_own(browser, pages):
    visit(browser, pages["calm"])
    browser.execute_script(
        "const script = document.createElement('script');"
        "script.textContent = 'window.hacked = 6'; document.body.append(script);"
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}));"
    )
    assert browser.execute_script("return window.hacked") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) == 2 and all("Content Security Policy" in message for message in refused)


def test_panels_have_pixels(browser, pages):
    visit(browser, pages["both"])
    pictures = all_of(browser, ".film img")
    assert len(pictures) == 3 * (2 + 2 * 2)  # images; image and truth, and of two runs prediction and error
    for picture in pictures:
        assert len(set(pixels(browser, picture))) > 20, picture.get_attribute("alt")
    for picture in all_of(browser, "img"):
        assert picture.get_property("naturalWidth") > 0 and picture.is_displayed()
        assert len(picture.get_attribute("alt")) > 5


def test_the_slider_goes_through_training_by_keyboard(browser, pages):
    visit(browser, pages["calm"])
    slider, words = one(browser, ".film input[type=range]"), one(browser, ".controls .now")
    shown = {part: one(browser, f'[data-part="{part}"] img') for part in ("prediction", "error")}
    truth = one(browser, ".strip .tile:nth-child(2) img")
    seen = []
    for keys, samples in ((Keys.END, "1,200"), (Keys.HOME, "240"), (Keys.ARROW_RIGHT, "480"), (Keys.END, "1,200")):
        slider.send_keys(keys)
        assert slider.get_attribute("aria-valuetext") == words.text
        assert words.text.startswith(f"after {samples} samples: abs_rel 0.")
        assert re.fullmatch(
            f"predicted depth of .+ after {samples} samples, abs_rel [0-9.]+", shown["prediction"].get_attribute("alt")
        )
        assert f"after {samples} samples" in shown["error"].get_attribute("alt")
        seen.append([pixels(browser, picture) for picture in (*shown.values(), truth)])
    last, first, second, again = seen
    assert last == again
    assert first[:2] != last[:2] and first[:2] != second[:2]
    assert first[2] == last[2], "the truth moved"


def test_training_can_be_played(browser, pages):
    visit(browser, pages["calm"])
    slider, play = one(browser, ".film input[type=range]"), one(browser, ".play")
    play.send_keys(Keys.ENTER)
    assert slider.get_attribute("value") in ("0", "1")
    assert play.get_attribute("aria-label") == "Pause"
    play.click()
    assert play.get_attribute("aria-label") == "Play"


def column(browser: Any, number: int) -> list[str]:
    cells = (
        "return [...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    )
    return browser.execute_script(cells, number)


@pytest.mark.parametrize("name", ["abs_rel", "pixels", "silog", "delta1"])
def test_a_heading_sorts_by_numbers(browser, pages, name):
    visit(browser, pages["calm"])
    heads = all_of(browser, ".sortable thead th")
    place = [head.text for head in heads].index(name)
    values = [float(text) for text in column(browser, place)]
    assert len(set(values)) > 3
    for order, act in (("ascending", "click"), ("descending", "key")):
        button = heads[place].find_element(By.TAG_NAME, "button")
        button.click() if act == "click" else button.send_keys(Keys.SPACE)
        assert heads[place].get_attribute("aria-sort") == order
        assert [float(text) for text in column(browser, place)] == sorted(values, reverse=order == "descending")
    assert sum(head.get_attribute("aria-sort") is not None for head in heads) == 1


def test_differences_sort_by_their_sign_and_text_by_its_numbers(browser, pages):
    visit(browser, pages["both"])
    heads = all_of(browser, ".sortable thead th")
    assert heads[-1].text == "restarted − calm"
    heads[-1].find_element(By.TAG_NAME, "button").click()
    values = [float(text.replace("−", "-")) for text in column(browser, len(heads) - 1)]
    assert values == sorted(values) and min(values) < 0 < max(values)
    heads[0].find_element(By.TAG_NAME, "button").click()
    keys = column(browser, 0)
    assert keys == sorted(keys, key=lambda key: [int(part) for part in re.findall("[0-9]+", key)])


def test_the_filter_leaves_the_rows_with_all_words(browser, pages):
    visit(browser, pages["calm"])
    keys, field = column(browser, 0), one(browser, ".filter input")
    field.send_keys(f"room {keys[3][-2:].upper()}")
    shown = [
        row.find_element(By.TAG_NAME, "th").text for row in all_of(browser, ".sortable tbody tr") if row.is_displayed()
    ]
    assert shown == [key for key in keys if keys[3][-2:] in key]
    assert one(browser, ".count").text == f"{len(shown)} of 8 images"
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.DELETE)
    assert all(row.is_displayed() for row in all_of(browser, ".sortable tbody tr"))


def test_three_restarts_leave_no_gap_and_no_point_twice(browser, pages):
    visit(browser, pages["calm"])
    undisturbed = charts(browser)
    visit(browser, pages["restarted"])
    restarted = charts(browser)
    assert undisturbed.keys() == restarted.keys() and len(restarted) == 9 + 3 + 3 + 3
    for (title, over), data in restarted.items():
        points, calm = (d["curves"][0]["points"] for d in (data, undisturbed[title, over]))
        if over == "samples":
            assert None not in points, f"{title} has a gap"
            assert [x for x, _, _ in points] == [x for x, _, _ in calm], f"{title} has other points"
            if title not in ("abs_rel", *METRICS):  # these were made up to differ
                assert points == calm
        else:
            assert points.count(None) == 3
            assert [y for _, y, _ in filter(None, points)] == [y for _, y, _ in calm]
    assert [len(plot.find_elements(By.CLASS_NAME, "restart")) for plot in all_of(browser, "#training .plot")] == [3] * 9


METRICS = ("delta1", "rmse", "sq_rel", "rmse_log", "log10", "silog", "delta2", "delta3")


def test_charts_tell_their_values(browser, pages):
    visit(browser, pages["both"])
    svg = one(browser, "#curves .plot svg")
    svg.send_keys(Keys.HOME)
    said = one(browser, "#curves .tip").text.splitlines()
    points = {c["name"]: c["points"][0][1] for c in charts(browser)["abs_rel", "samples"]["curves"]}
    assert said[0] == "after 240 samples"
    assert said[1:] == [f"{name}: {float(f'{value:.4g}'):g}" for name, value in points.items()]
    svg.send_keys(Keys.ARROW_RIGHT)
    assert one(browser, "#curves .tip").text.startswith("after 480 samples")
    assert re.search(r"calm: 0\.\d+ at 240, 0\.\d+ at 1,200; least .+", svg.get_attribute("aria-label"))
    webdriver.ActionChains(browser).move_to_element_with_offset(svg, 150, 0).perform()
    assert one(browser, "#curves .tip").text.startswith("after 1,200 samples")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, pages, width):
    for name in ("both", "bad"):
        visit(browser, pages[name], width)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width, name
        wide = all_of(browser, ".scroll, .strip, pre")
        assert all(part.rect["x"] + part.rect["width"] <= width for part in wide if part.is_displayed())


# contrast by WCAG 2, of the colours as they are drawn
CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[0-9.]+/g).map(Number).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (part) => {
  for (; part; part = part.parentElement) {
    const color = getComputedStyle(part).backgroundColor;
    if (!color.endsWith(", 0)")) return color;
  }
};
const found = {};
for (const [selector, property] of arguments[0])
  for (const part of document.querySelectorAll(selector)) {
    const around = part.closest("div, p, li, td, th, dd, dt, body, figure");
    const two = [getComputedStyle(part)[property], ground(around)].map(light);
    const ratio = (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
    found[selector] = Math.min(found[selector] ?? 99, ratio);
  }
return found;
"""
TEXTS = [
    "h1",
    "h2",
    ".lead",
    ".soft",
    ".note",
    "a",
    "td",
    "thead th",
    "dt",
    "dd",
    "figcaption",
    ".count",
    "code",
    "summary",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(browser, pages, scheme):
    visit(browser, pages["both"], scheme=scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall("[0-9]+", paper))) > 600) == (scheme == "light")
    wanted = [(text, "color") for text in TEXTS] + [(".plot text", "fill"), (".stroke", "stroke"), (".bar", "fill")]
    found = browser.execute_script(CONTRAST, wanted)
    assert found.keys() == {selector for selector, _ in wanted}
    shapes = {".stroke": 3.0, ".bar": 3.0}
    assert {name: ratio for name, ratio in found.items() if ratio < shapes.get(name, 4.5)} == {}


def test_names_that_mean_harm_are_text(browser, pages):
    visit(browser, pages["bad"])
    assert browser.execute_script("return window.hacked") is None
    text = one(browser, "body").get_property("textContent")
    for name in HOSTILE:
        assert name in text
    assert column(browser, 0)[:8] == HOSTILE  # of the first of two tables
    assert "</pre><script>window.hacked=5</script>" in text
    assert "<b>bad\"'&" in text and not all_of(browser, "header b b")
    assert all_of(browser, "img:not([src^='data:image/webp;base64,'])") == []
    assert not [script for script in all_of(browser, "script") if "hacked" in script.get_attribute("textContent")[:40]]


def test_without_script_all_but_moving_and_sorting_is_there(browser, pages):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit(browser, pages["calm"])
        assert not one(browser, ".controls").is_displayed() and not one(browser, ".filter").is_displayed()
        assert one(browser, ".no-script").text.startswith("after 1,200 samples")
        assert one(browser, '[data-part="prediction"] img').is_displayed()
        assert len(all_of(browser, ".sortable tbody tr")) == 8
        assert len(all_of(browser, ".plot svg path.stroke")) == 9 + 3 + 3 + 3
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_can_be_read_out(browser, pages):
    for name in ("calm", "both"):
        visit(browser, pages[name])
        assert one(browser, "html").get_attribute("lang") == "en"
        assert "depth training report" in browser.title
        levels = [int(heading.tag_name[1]) for heading in all_of(browser, "h1, h2, h3, h4")]
        assert levels.count(1) == 1 and levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert all(len(svg.get_attribute("aria-label")) > 20 for svg in all_of(browser, "svg[role=img]"))
        assert all(
            link.get_attribute("hash") == "" or one(browser, link.get_attribute("hash"))
            for link in all_of(browser, "nav a")
        )
        ids = [part.get_attribute("id") for part in all_of(browser, "[id]")]
        assert len(set(ids)) == len(ids)
