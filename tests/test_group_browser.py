"""The group's page in a real browser: headless Chromium, opened from a file, network off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.studies import Effects, simulate, write_derivatives, write_raw
from tests.test_report_browser import browser, complaints, until  # noqa: F401
from tlseg_bids.cli.run import main

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=document.title='broken'>"
EFFECTS = Effects({"A": 0.0, "B": 0.2, HOSTILE: -0.1}, {"A": 1, "B": 1, HOSTILE: 1})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three sites, one with a hostile name; the first participant has a report."""
    folder = tmp_path_factory.mktemp("it's a study")
    people, rows = simulate(60, EFFECTS)
    people[5].volumes[10] *= 2
    write_raw(folder / "raw", {"participants.tsv": "\n".join(rows) + "\n"})
    out = write_derivatives(folder / "out", people)
    for person in people:
        (out / f"sub-{person.label}.html").write_text("<!DOCTYPE html><title>a report</title>")
    options = ["--combat", "site", "--combat-covariates", "age_years", "sex"]
    options += ["--icv-correction", "ratio"]
    assert main([str(folder / "raw"), str(out), "group", *options]) == 0
    return out / "group.html"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 18 sites with long names; of some participants the site is not known."""
    folder = tmp_path_factory.mktemp("many")
    sites = {f"university hospital number {n:02d}": 0.05 * n for n in range(18)}
    people, rows = simulate(72, Effects(sites, dict.fromkeys(sites, 1)))
    for n in (20, 40, 60):
        label, age, sex, _, group = rows[n].split("|")
        rows[n] = f"{label}|{age}|{sex}|n/a|{group}"
    write_raw(folder / "raw", {"participants.tsv": "\n".join(rows) + "\n"})
    out = write_derivatives(folder / "out", people)
    assert main([str(folder / "raw"), str(out), "group"]) == 0
    return out / "group.html"


@pytest.fixture
def chrome(browser: Callable, page: Path):  # noqa: F811
    """The page, drawn."""
    return drawn(browser, page)


def drawn(browser: Callable, page: Path):  # noqa: F811
    it = browser(())
    it.get(page.as_uri())
    until(lambda: it.execute_script("return document.body.dataset.ready") == "yes")
    return it


def choose(chrome, control: str, value: str) -> None:
    chrome.execute_script(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1];"
        "it.dispatchEvent(new Event('change'))",
        control, value,
    )  # fmt: skip


def text_of(chrome, control: str) -> str:
    return chrome.execute_script(
        "return document.getElementById(arguments[0]).textContent", control
    )


def inked(chrome) -> int:
    """Pixels of the canvas that are not empty."""
    return chrome.execute_script(
        "const c = document.getElementById('canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n"
    )


def test_the_page_draws_offline_without_a_complaint(chrome) -> None:
    assert complaints(chrome) == []
    fetched = chrome.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert not [name for name in fetched if not name.startswith("data:")]
    assert inked(chrome) > 2000


def test_names_from_the_data_are_text(chrome) -> None:
    assert chrome.title == "Group – tlseg"
    assert HOSTILE in text_of(chrome, "legend")
    assert HOSTILE in text_of(chrome, "summary")
    assert chrome.execute_script("return document.images.length") == 0


def test_the_summary_follows_what_is_chosen(chrome) -> None:
    choose(chrome, "against", "sex")
    assert text_of(chrome, "summary-caption").endswith("by sex")
    groups = chrome.execute_script(
        "return Array.from(document.getElementById('summary').rows, r => r.cells[0].textContent)"
    )
    assert groups == ["F", "M", "all"]
    choose(chrome, "against", "site")
    medians = (
        "return Array.from(document.getElementById('summary').rows, r => r.cells[2].innerText)"
    )
    before = [float(m.replace("\u202f", "")) for m in chrome.execute_script(medians)[:3]]
    choose(chrome, "kind", "combat")
    after = [float(m.replace("\u202f", "")) for m in chrome.execute_script(medians)[:3]]
    assert max(before) / min(before) > 1.2
    assert max(after) / min(after) < 1.1


def summary(chrome) -> dict[str, list[str]]:
    """Group → cells of the table below the plot."""
    rows = chrome.execute_script(
        "return Array.from(document.getElementById('summary').rows,"
        "  r => Array.from(r.cells, c => c.textContent))"
    )
    return {name: [cell.replace("\u202f", "") for cell in cells] for name, *cells in rows}


def test_small_numbers_keep_their_digits(chrome, page: Path) -> None:
    """A share of the head size is about a thousandth."""
    choose(chrome, "kind", "adjusted")
    choose(chrome, "structure", "left_accumbens_area")
    table = pd.read_csv(page.with_name("group_volumes.tsv"), sep="\t")
    for site, values in table.groupby("site")["left_accumbens_area_adjusted"]:
        cells = summary(chrome)[site]
        low, high = cells[2].split(" to ")
        found = [float(cell) for cell in (cells[1], low, high, *cells[3:])]
        truth = [*values.quantile([0.5, 0.25, 0.75]), values.mean(), values.std()]
        assert found == pytest.approx(truth, abs=2e-3 * values.max())


def test_no_number_is_minus_nought(chrome) -> None:
    told = chrome.execute_script(
        "return [[-0, -0], [-0.00002, 3.1], [-0.4, 2000], [0, 0]].map(v => shown(...v))"
    )
    assert told == ["0"] * 4
    spread = "return shown(0.00021, 0.0015) + ' ' + shown(-1234567, 2e6) + ' ' + shown(NaN)"
    assert chrome.execute_script(spread) == "0.00021 -1\u202f234\u202f567 –"


LEGEND = """
return Array.from(document.querySelectorAll("#legend span"), (entry) => {
  const style = getComputedStyle(entry.querySelector("i"));
  return [entry.textContent, style.backgroundColor, style.clipPath];
});
"""


def test_many_groups_differ_in_colour_or_shape_and_the_unknown_are_named(browser, many) -> None:  # noqa: F811
    it = drawn(browser, many)
    legend = it.execute_script(LEGEND)
    assert len(legend) == 19
    assert legend[-1][0] == "n/a"
    assert len({(colour, shape) for _, colour, shape in legend}) == 19
    cells = summary(it)
    assert cells["n/a"][0] == "3"
    assert sum(int(row[0]) for name, row in cells.items() if name != "all") == 72


def test_without_unknown_ones_no_group_is_called_so(chrome) -> None:
    assert "n/a" not in summary(chrome)
    assert "n/a" not in [name for name, *_ in chrome.execute_script(LEGEND)]


def test_the_keyboard_walks_through_the_scans_and_opens_a_report(chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    canvas = chrome.find_element("id", "canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)
    first = text_of(chrome, "told")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert first.startswith("sub-")
    assert text_of(chrome, "told") != first
    assert "proposal: " in text_of(chrome, "told")
    canvas.send_keys(Keys.ENTER)
    until(lambda: chrome.title == "a report")


def test_the_pointer_tells_which_scan_it_is_over(chrome) -> None:
    chrome.execute_script(
        "const c = document.getElementById('canvas'), b = c.getBoundingClientRect();"
        "const p = state.view.points[30];"
        "c.dispatchEvent(new PointerEvent('pointermove',"
        "  {clientX: b.left + p.px, clientY: b.top + p.py}))"
    )
    assert text_of(chrome, "tip").startswith("sub-")
    assert chrome.execute_script("return !document.getElementById('tip').hidden")


def test_the_list_shows_what_is_proposed_and_links_to_reports(chrome) -> None:
    cells = "return Array.from(document.getElementById('scans').rows, r => r.innerText)"
    assert any("sub-00005" in line and "look" in line for line in chrome.execute_script(cells))
    choose(chrome, "which", "all")
    assert text_of(chrome, "place") == "1 to 50 of 60"
    chrome.find_element("id", "after").click()
    assert text_of(chrome, "place") == "51 to 60 of 60"
    link = chrome.find_element("css selector", "#scans a")
    assert link.get_attribute("href").endswith("/out/sub-00050.html")


@pytest.fixture
def phone(chrome):
    """The page on a narrow screen."""
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
    yield chrome
    chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_phone_needs_no_scrolling_sideways(phone) -> None:
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 375


def test_a_phone_shows_names_and_axes_in_full(phone) -> None:
    choose(phone, "structure", "left_cerebral_white_matter")
    choose(phone, "kind", "z")
    heading, name = phone.execute_script(
        "const row = document.getElementById('summary').rows[1];"
        "const head = row.closest('table').rows[0].cells[0];"
        "return [head.getBoundingClientRect().height, row.cells[0].getBoundingClientRect().width]"
    )
    assert heading < 40, "the heading stands on one line"
    assert name > 100
    written = phone.execute_script(
        "const texts = [], own = pen.fillText.bind(pen), at = pen.getTransform.bind(pen);"
        "pen.fillText = (text, x, y, most) => { texts.push([text, Math.min("
        "  pen.measureText(text).width, most ?? Infinity), at().b]); own(text, x, y, most); };"
        "draw(); pen.fillText = own; return texts"
    )
    (turned,) = [width for text, width, turn in written if turn]
    assert turned <= 340, "the name of the axis is as long as the plot is high, or shorter"
    assert len([text for text, *_ in written if text in ("20", "40", "60", "80")]) >= 3


def test_paper_shows_the_plot_in_its_shape(chrome) -> None:
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        drawn_in, shown_in = chrome.execute_script(
            "const c = document.getElementById('canvas');"
            "return [c.width / c.height, c.clientWidth / c.clientHeight]"
        )
    finally:
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown_in == pytest.approx(drawn_in, rel=0.02)
