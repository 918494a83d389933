"""The page of a localisation: every section, from the files alone, no network; and in a browser, on a phone too."""

import dataclasses as dc
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import test_localize
import torch
from browser import CHROMIUM, Browser

from emocircuits.circuits.localize import localize
from emocircuits.cli import main
from emocircuits.report.localization import SECTIONS, page, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, pairs = tmp_path_factory.mktemp("run"), test_localize.write(tmp_path_factory.mktemp("pairs"))
    settings = dc.replace(test_localize.SETTINGS, tune=True)
    localize(test_localize.planted.subject(), pairs, folder, settings, progress=False, say=lambda line: None)
    torch.set_num_threads(threads)
    return folder


class Reader(HTMLParser):
    """Addresses that a page would load, its headings, and its captions."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.headings, self.captions, self.inside, self.metas = [], [], [], None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [v for k, v in found.items() if k in ("src", "href", "action", "data") and v]
        if tag == "meta":
            self.metas.append(found)
        if tag in ("h2", "figcaption"):
            self.inside = tag
            (self.headings if tag == "h2" else self.captions).append("")

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            (self.headings if self.inside == "h2" else self.captions)[-1] += data


def without_ids(text):
    """Plotly numbers its figures at random."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "", text)


def test_every_section_is_on_a_page_that_loads_nothing(folder):
    text = page(folder)
    read = Reader(text)
    assert read.headings == [module.section(folder).title for module in SECTIONS]
    assert all(a.startswith(("data:", "#")) for a in read.addresses)
    # Plotly itself names addresses in its code; nothing else does.
    scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in scripts.replace("http://www.w3.org/", "")
    assert text.count("plotly.js v") == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.metas


def test_every_figure_says_what_it_is_an_average_of(folder):
    for caption in Reader(page(folder)).captions:
        assert re.search(r"average|example|Kept:", caption, re.IGNORECASE), caption


def test_a_page_is_made_of_files_only(folder, tmp_path):
    for file in folder.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    assert without_ids(page(tmp_path)) == without_ids(page(folder))
    (tmp_path / "heads.json").unlink()
    (tmp_path / "circuit.json").unlink()
    read = Reader(page(tmp_path))
    assert "Stage II.2: heads" not in read.headings
    assert "Stage II.1: layers" in read.headings
    record = json.loads((tmp_path / "layers.json").read_text())
    del record["alphas"]
    (tmp_path / "layers.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="files of layers are damaged"):
        page(tmp_path)


def test_the_command_writes_a_page(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_all(folder, tmp_path, width):
    file = save(folder, tmp_path / "report.html")
    with Browser() as browser:
        browser.open(file, width=width)
        figures = browser.ask("document.querySelectorAll('.plotly-graph-div').length")
        drawn = browser.ask("document.querySelectorAll('.plotly-graph-div .main-svg').length")
        assert figures >= 15
        assert drawn >= figures
        assert browser.ask("document.querySelectorAll('section').length") == len(SECTIONS)
        # No part is wider than the window: what is, scrolls in itself.
        assert browser.ask("document.documentElement.scrollWidth") <= width
        wide = browser.ask(
            "[...document.querySelectorAll('.plotly-graph-div')].filter(d => d.getBoundingClientRect().right > "
            f"{width} + 1).length"
        )
        assert wide == 0
        assert browser.messages == []
        assert [r for r in browser.requests if not r.startswith(("file:", "data:"))] == []
