"""The subject's page in a real browser: headless Chromium, opened from a file, network off."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_report import INDEX, write_scan
from tlseg_bids.report.derivatives import FailedScan
from tlseg_bids.report.subject import write_subject_report

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
    "--window-size=1280,1000",
)  # fmt: skip
SOFTWARE_GL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
NO_GL = ("--disable-3d-apis",)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Starts a Chromium with a fresh profile for the given flags, once each."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with chromedriver on this machine")
    started: dict[tuple[str, ...], object] = {}

    def start(flags: tuple[str, ...]):
        if flags not in started:
            folder = tmp_path_factory.mktemp("profile")
            options = webdriver.ChromeOptions()
            options.binary_location = chromium
            for flag in (*FLAGS, *flags, f"--user-data-dir={folder}"):
                options.add_argument(flag)
            options.add_experimental_option(
                "prefs", {"download.default_directory": str(folder / "downloads")}
            )
            options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
            service = webdriver.ChromeService(driver)
            started[flags] = webdriver.Chrome(options=options, service=service)
            started[flags].downloads = folder / "downloads"
        return started[flags]

    yield start
    for chrome in started.values():
        chrome.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two scans and a failed one, in a folder with a blank and a quote in its name."""
    out = tmp_path_factory.mktemp("it's an output")
    write_scan(out, "sub-01_ses-a_space-T1w", {"ContentKey": "k1"})
    write_scan(out, "sub-01_ses-b_space-T2w", {"ContentKey": "k2"})
    failed = {"sub-01/x.nii": FailedScan("<b>x.nii</b>", "cut short")}
    return write_subject_report(out, "01", "tlseg", failed)


def opened(browser: Callable, page: Path, flags: tuple[str, ...] = SOFTWARE_GL):
    chrome = browser(flags)
    chrome.get(page.as_uri())
    return chrome


def until(told: Callable[[], object], seconds: float = 30) -> object:
    """What `told` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := told()):
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.1)
    return value


def viewer(chrome, number: int = 0):
    """The viewer's element once it runs or has given up."""
    element = chrome.find_elements("css selector", "[data-viewer]")[number]
    chrome.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", element)
    until(lambda: element.get_attribute("data-state") in ("running", "broken"))
    return element


def picture(element) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"), np.int16)


def choose(chrome, element, control: str, value: str) -> None:
    chrome.execute_script(
        "arguments[0].value = arguments[1];"
        "for (const type of ['input', 'change'])"
        "  arguments[0].dispatchEvent(new Event(type, {bubbles: true}));",
        element.find_element("css selector", f"[data-view={control}]"),
        value,
    )


def complaints(chrome) -> list[str]:
    """Console messages, without the software renderer's remarks on its own speed."""
    return [
        entry["message"]
        for entry in chrome.get_log("browser")
        if "GL Driver Message (OpenGL, Performance" not in entry["message"]
    ]


def test_page_opens_offline_with_every_picture_and_no_complaint(browser, page: Path) -> None:
    chrome = opened(browser, page)
    viewer(chrome, 0)
    viewer(chrome, 1)
    widths = chrome.execute_script("return Array.from(document.images, i => i.naturalWidth)")
    assert len(widths) == 12
    assert min(widths) > 0
    fetched = chrome.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert not [name for name in fetched if not name.startswith(("data:", "blob:"))]
    assert complaints(chrome) == []


def test_network_is_really_off(browser, page: Path) -> None:
    """The check above could not fail if the page could reach out unnoticed."""
    chrome = opened(browser, page)
    chrome.execute_script("new Image().src = 'https://example.org/x.png'")
    until(lambda: any("Content Security Policy" in text for text in complaints(chrome)))


def colourful(shown: np.ndarray) -> float:
    """Fraction of pixels with a colour; grey, black and white are none."""
    return float((np.ptp(shown, axis=-1) > 60).mean())


def lit(shown: np.ndarray) -> float:
    """Fraction of pixels that are not black."""
    return float((shown.max(axis=-1) > 20).mean())


def test_viewer_draws_scan_and_labels(browser, page: Path) -> None:
    chrome = opened(browser, page)
    element = viewer(chrome)
    assert element.get_attribute("data-state") == "running"
    stage = element.find_element("css selector", ".stage")
    choose(chrome, element, "opacity", "100")
    until(lambda: colourful(picture(stage)) > 0.01)
    choose(chrome, element, "opacity", "0")
    until(lambda: colourful(picture(stage)) < 0.002)
    with_scan = lit(picture(stage))
    assert with_scan > 0.1
    choose(chrome, element, "scan", "0")
    until(lambda: lit(picture(stage)) < 0.3 * with_scan)


@pytest.mark.parametrize(("side", "name"), [(-1, "Left thalamus"), (1, "Right thalamus")])
def test_a_click_tells_the_structure_and_left_is_left(
    browser, page: Path, side: int, name: str
) -> None:
    """In the axial view, left of the middle stands the patient's left."""
    actions = pytest.importorskip("selenium.webdriver").ActionChains
    chrome = opened(browser, page)
    element = viewer(chrome)
    choose(chrome, element, "slices", "axial")
    choose(chrome, element, "place", str(place_of(name)))
    where = element.find_element("css selector", "[data-view=where]")
    until(lambda: where.text.startswith(f"{name} ("))
    choose(chrome, element, "place", str(place_of("Brain stem")))
    until(lambda: where.text.startswith("Brain stem ("))
    choose(chrome, element, "place", str(place_of(name)))
    time.sleep(0.5)
    canvas = element.find_element("css selector", "canvas")
    px_per_mm = canvas.size["height"] / 60
    actions(chrome).move_to_element_with_offset(
        canvas, int(side * 8 * px_per_mm), 0
    ).click().perform()
    until(lambda: where.text.startswith(f"{name} (") and f"label {INDEX[name]})" in where.text)


def test_the_keyboard_moves_the_crosshair_in_all_directions(browser, page: Path) -> None:
    keys = pytest.importorskip("selenium.webdriver").Keys
    chrome = opened(browser, page)
    element = viewer(chrome)
    choose(chrome, element, "place", str(place_of("Brain stem")))
    where = element.find_element("css selector", "[data-view=where]")
    until(lambda: where.text.startswith("Brain stem ("))
    canvas = element.find_element("css selector", "canvas")
    before = place_in(where.text)
    size = np.array(json.loads(chrome.execute_script(
        "return JSON.stringify(Array.from(viewers[0].nv.volumes[0].pixDimsRAS).slice(1))"
    )))  # fmt: skip
    moves = {
        keys.ARROW_LEFT: (-1, 0, 0), keys.ARROW_RIGHT: (1, 0, 0), keys.ARROW_UP: (0, 1, 0),
        keys.ARROW_DOWN: (0, -1, 0), keys.PAGE_UP: (0, 0, 1), keys.PAGE_DOWN: (0, 0, -1),
    }  # fmt: skip
    top = chrome.execute_script("return window.scrollY")
    for key, step in moves.items():
        canvas.send_keys(key * 3)
        after = place_in(where.text)
        assert after - before == pytest.approx(3 * size * step, abs=1.01), step
        before = after
    assert chrome.execute_script("return window.scrollY") == top
    canvas.send_keys("vcp")
    kinds = "return [viewers[0].nv.opts.sliceType, niivue.SLICE_TYPE.MULTIPLANAR]"
    assert len(set(chrome.execute_script(kinds))) == 1, "the view is the one that its list names"


def place_in(text: str) -> np.ndarray:
    """The coordinates that the line below a viewer tells, mm."""
    told = text.partition("x, y, z = ")[2].removesuffix(" mm")
    return np.array([float(number) for number in told.split(",")])


def place_of(name: str) -> int:
    return list(INDEX).index(name)


@pytest.mark.slow
def test_viewers_that_are_stopped_while_they_load_can_be_started_again(
    browser, tmp_path_factory
) -> None:
    """Scrolling fast past more scans than can have a viewer at once breaks none of them."""
    out = tmp_path_factory.mktemp("many")
    for session in "abcdef":
        write_scan(out, f"sub-02_ses-{session}_space-T1w", {"ContentKey": session})
    chrome = opened(browser, write_subject_report(out, "02", "tlseg"))
    chrome.execute_script("sight.disconnect(); viewers.forEach((one) => { one.start(); })")
    states = "return viewers.map((one) => one.state)"
    started = ["waiting"] * 2 + ["running"] * 4
    until(lambda: "starting" not in chrome.execute_script(states))
    assert chrome.execute_script(states) == started
    chrome.execute_script("viewers[0].start()")
    until(lambda: chrome.execute_script(states)[0] == "running")
    assert chrome.execute_script("return running.length") == 4


def test_without_webgl_the_page_says_so(browser, page: Path) -> None:
    chrome = opened(browser, page, NO_GL)
    element = viewer(chrome)
    assert element.get_attribute("data-state") == "broken"
    message = element.find_element("css selector", "[data-view=message]").text
    assert "This browser offers no WebGL 2" in message
    assert "the pictures above show the same labels" in message


def test_without_javascript_pictures_and_colours_are_there_and_nothing_is_dead(
    browser, page: Path
) -> None:
    chrome = browser(("--blink-settings=scriptEnabled=false",))
    chrome.get(page.as_uri())
    shown = {
        name: [one.is_displayed() for one in chrome.find_elements("css selector", name)]
        for name in (".viewer", ".rating", "#export", "[data-blink]", ".overview .rated", "figure")
    }
    assert shown.pop("figure") == [True] * 6
    assert {state for states in shown.values() for state in states} == {False}
    assert "JavaScript is off" in chrome.find_element("id", "main").text
    swatches = chrome.find_elements("css selector", ".swatch")
    colours = [one.value_of_css_property("background-color") for one in swatches[: len(INDEX) - 1]]
    assert len(set(colours)) > 10
    assert "rgba(0, 0, 0, 0)" not in colours


def test_table_is_sorted_by_keyboard(browser, page: Path) -> None:
    chrome = opened(browser, page)
    table = chrome.find_element("css selector", "table[data-sortable]")
    button = table.find_elements("css selector", "thead button")[3]
    for order, sign in (("ascending", 1), ("descending", -1)):
        button.send_keys(" ")
        cells = table.find_elements("css selector", "tbody td:nth-child(4)")
        values = [sign * float(cell.get_attribute("data-value")) for cell in cells]
        assert values == sorted(values)
        assert len(set(values)) > 2
        assert table.find_elements("css selector", "th")[3].get_attribute("aria-sort") == order


def test_overlay_can_be_hidden(browser, page: Path) -> None:
    chrome = opened(browser, page)
    figures = chrome.find_element("css selector", ".figures")
    layers = figures.find_element("css selector", ".layers")
    chrome.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", layers)
    colour = np.ptp(picture(layers), axis=-1).max()
    figures.find_element("css selector", "[data-overlay-toggle]").send_keys(" ")
    assert colour > 60
    assert np.ptp(picture(layers), axis=-1).max() < 5


def test_ratings_are_kept_and_exported(browser, page: Path) -> None:
    chrome = opened(browser, page)
    form = chrome.find_elements("css selector", "[data-rating]")[1]
    form.find_element("css selector", "[value='needs edit']").send_keys(" ")
    chrome.execute_script(
        "arguments[0].value = 'cut at\\tthe <top>\\nline';"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
        form.find_element("css selector", "textarea"),
    )
    chrome.find_element("id", "rater").send_keys("R. Ater")
    chrome.refresh()
    assert chrome.find_elements("css selector", "[data-rated]")[1].text == "needs edit"
    for kind in ("json", "tsv"):
        chrome.find_element("css selector", f"[data-export={kind}]").send_keys(" ")
    folder = chrome.downloads
    until(lambda: all((folder / f"sub-01_ratings.{kind}").exists() for kind in ("json", "tsv")))
    rows = json.loads((folder / "sub-01_ratings.json").read_text())
    assert [row["rating"] for row in rows] == ["n/a", "needs edit"]
    assert rows[1]["session_id"] == "ses-b"
    assert rows[1]["content_key"] == "k2"
    lines = (folder / "sub-01_ratings.tsv").read_text().splitlines()
    assert [len(line.split("\t")) for line in lines] == [9, 9, 9]
    assert lines[2].split("\t")[4:6] == ["cut at the <top> line", "R. Ater"]
    assert rows[1]["note"] == "cut at\tthe <top>\nline"
