"""The page of a pool in headless Chromium, where there is one: what it asks for, and that its table works."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lora_cli.records import PoolReport, ReportedAdapter, Share
from lora_cli.reports.pool import pool_page
from lora_cli.reports.study import study_page
from tests.browser import Page, browser
from tests.reports.study_samples import sample
from tests.reports.test_page import HOSTILE

FIRST = "document.querySelector('#table tbody td').textContent"
TOLD = "document.getElementById('told').textContent"
LATER = "new Promise(done => setTimeout(() => done({}), 300))"
PLANTED = (
    "(() => { const s = document.createElement('script'); s.textContent = 'hit = 1'; document.body.append(s); })()"
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")]


def listed(number: int, text: str = "") -> ReportedAdapter:
    name = f"{text or 'ann'}/lora{number:03d}"
    return ReportedAdapter(
        name, text or "ann", "base", 8, 2, "F16", 1000 + number, text or "mit", 500 - number, "", "ok", text
    )


@pytest.fixture
def served(own_home: Path) -> Iterator[tuple[str, list[str]]]:
    """HOST:PORT of a server of a page of 200 adapters and the hostile ones, and the paths that it is asked for."""
    rows = [*map(listed, range(200)), *(listed(200 + i, text) for i, text in enumerate(HOSTILE))]
    total = Share("", len(rows), len(rows))
    report = PoolReport(
        adapters=rows, total=total, counts={"Author": [Share(one.author, 1, 1) for one in rows[-16:]]},
        authors=17, bytes=1, last_sync="", conditions=(),
    )  # fmt: skip
    (own_home / "pool.html").write_bytes(pool_page(report))
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(own_home)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_the_table_sorts_filters_and_turns_and_nothing_is_asked_for(
    served: tuple[str, list[str]], tmp_path: Path
) -> None:
    host, asked = served
    with Page(browser() or "", tmp_path) as page:
        page.open(f"http://{host}/pool.html")
        assert (page.run(FIRST), page.run(TOLD)) == ("ann/lora000", "1 to 50 of 216 adapters")
        page.run("document.getElementById('on').click()")
        assert (page.run(FIRST), page.run(TOLD)) == ("ann/lora050", "51 to 100 of 216 adapters")
        page.run("document.querySelectorAll('#table thead button')[5].click()")
        assert page.run("[...document.querySelectorAll('[aria-sort]')].map(one => one.textContent)") == ["Size"]
        assert page.run(FIRST).endswith("/lora215")
        page.run("document.querySelectorAll('#table thead button')[5].click()")
        assert page.run(FIRST) == "ann/lora000"
        page.run("(() => { words.value = 'LORA12 ann'; words.dispatchEvent(new Event('input')); })()")
        assert page.run(LATER.format(TOLD)) == "1 to 10 of 10 adapters"
        page.run("(() => { words.value = '<script>'; words.dispatchEvent(new Event('input')); })()")
        assert page.run(LATER.format("document.querySelector('#table tbody td').textContent")).startswith("</script><")
        assert page.run("document.querySelectorAll('script, img').length") == 2
        assert page.complaints == []
        assert page.requests == [f"http://{host}/pool.html"]
        page.run(PLANTED)
        assert page.run("window.hit === undefined")
        assert "Content Security Policy" in " ".join(page.complaints)
    assert asked == ["/pool.html"]


def test_without_scripts_the_first_rows_show(served: tuple[str, list[str]], tmp_path: Path) -> None:
    host, _ = served
    with Page(browser() or "", tmp_path, scripts=False) as page:
        page.open(f"http://{host}/pool.html")
        text = page.ask("DOM.getOuterHTML", nodeId=page.ask("DOM.getDocument", depth=-1)["root"]["nodeId"])["outerHTML"]
        assert text.count("<tr>") >= 50
        assert "The 50 most downloaded of 216 adapters." in text


@pytest.mark.parametrize("text", ["", " ".join(HOSTILE) + "w" * 10_000])
def test_a_study_s_page_fits_narrow_and_wide_windows_and_asks_for_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.html"
    file.write_bytes(study_page(sample(text, adapters=30, modules=56)))
    with Page(browser() or "", tmp_path / "home") as page:
        for width in (1280, 390):
            for theme in ("light", "dark"):
                page.ask(
                    "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
                )
                page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
                page.open(file.as_uri())
                assert page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert set(page.requests) <= {file.as_uri(), "data:,"}
        assert page.complaints == []
