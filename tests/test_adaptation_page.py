"""The page of an adaptation, from content made up by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.test_report_browser import browser  # noqa: F401
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.report.adaptation import write_adaptation_page

SCORES = {
    "better": (0.8, 0.85, "up", "0.050"),
    "worse": (0.8, 0.75, "down", "\u22120.050"),
    "the same": (0.8, 0.8, None, "0.000"),
    "nearly the same": (0.8, 0.7999, None, "0.000"),
    "nowhere": (math.nan, math.nan, None, "–"),
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page without pictures, with wide curves."""
    scores = [{"name": name, "before": b, "after": a} for name, (b, a, *_) in SCORES.items()]
    return write_adaptation_page(tmp_path / "adaptation.html", load_protocol("aseg"), {
        "site": "here", "kept": True, "earlier": False, "reason": "better", "reasons": [],
        "parts": scores[:1], "rows": [{**one, "n": 3} for one in scores], "facts": {},
        "scans": [], "refused": [], "unlabelled": [], "pictures": [],
        "curves": Image.new("L", (900, 300)),
    })  # fmt: skip


def test_only_what_got_worse_is_marked_as_worse(page: Path) -> None:
    cells = re.compile(
        r'<th scope="row">([^<]*)</th><td>[^<]*</td><td>[^<]*</td>\s*'
        r'<td(?: class="(\w+)")?>([^<]*)</td><td>3</td>'
    )
    found = {name: (kind or None, text) for name, kind, text in cells.findall(page.read_text())}
    assert found == {name: (kind, text) for name, (_, _, kind, text) in SCORES.items()}


@pytest.mark.browser
def test_a_phone_needs_no_scrolling_sideways(browser, page: Path) -> None:  # noqa: F811
    chrome = browser(())
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
    chrome.get(page.as_uri())
    try:
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= 375
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
