"""The report in a real browser: no script of a row's, an id's or a name's runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hyperinf_kernels.report.page import render_html
from tests.report_document import make_document
from tests.test_report_safety import poison

RUN = "document.documentElement.setAttribute('data-ran','yes')"
ATTACKS = (
    f"</script><script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"--></title></style></textarea><svg onload={RUN}>",
    f"<details open ontoggle={RUN}><input autofocus onfocus={RUN}>",
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
)


@pytest.fixture(scope="module")
def browser() -> str:
    """A chromium; skipped where there is none, unless HYPERINF_BROWSER=required."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        remedy = "no chromium here: apt-get install chromium"
        if os.environ.get("HYPERINF_BROWSER") == "required":
            pytest.fail(remedy)
        pytest.skip(remedy)
    return found


def opened(browser: str, folder: Path, html: str) -> str:
    """The page as the browser has it after its scripts have run."""
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    ran = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return ran.stdout


def test_a_script_that_is_let_in_is_seen(browser: str, tmp_path: Path) -> None:
    """Each attack works where nothing is escaped: the test below can fail."""
    for number, attack in enumerate(ATTACKS):
        folder = tmp_path / str(number)
        folder.mkdir()
        page = f"<!doctype html><title>x</title><p>{attack}</p>"
        assert 'data-ran="yes"' in opened(browser, folder, page), attack


def test_no_script_of_the_data_runs_in_a_report(browser: str, tmp_path: Path) -> None:
    document = make_document(blocks=2, queries=1)
    hostile = poison(document, "".join(ATTACKS) + "\x1b[31m\x07")
    seen = opened(browser, tmp_path, render_html(hostile))
    assert 'data-ran="yes"' not in seen
    assert "How to read this" in seen
    assert "\x1b" not in seen
