"""The page in a real browser: every figure is drawn, nothing is fetched, a phone can read it."""

from pathlib import Path

import pytest

from .chromium import CHROMIUM, Chromium

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"
)
_BROKEN = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_nothing_fetched(page: Path, tmp_path: Path, width: int):
    with Chromium(tmp_path / "profile") as browser:
        browser.open(page.as_uri(), width)
        assert browser.value("document.images.length") >= 30
        assert browser.value(_BROKEN) == 0
        assert browser.value("document.documentElement.scrollWidth") <= width
        requests = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert requests[0] == page.as_uri()
        assert all(url.startswith("data:") for url in requests[1:])
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        assert [event for event in browser.events if event["method"] in said] == []


def test_the_checks_see_what_they_should(page: Path, tmp_path: Path):
    """A broken picture, a fetch and an error are noticed; else the test above proves nothing."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(
        "<img src='data:image/png;base64,AAAA'><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 3000px'>wide</div><script>console.error('no')</script>"
    )
    with Chromium(tmp_path / "profile") as browser:
        browser.open(spoilt.as_uri(), 390)
        assert browser.value(_BROKEN) == 2
        assert browser.value("document.documentElement.scrollWidth") > 390
        methods = [event["method"] for event in browser.events]
        assert "Runtime.consoleAPICalled" in methods
        urls = [e["params"]["request"]["url"] for e in browser.events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert "http://127.0.0.1:9/x.png" in urls
