"""Report sections of flow, lens and maps: from the files of a run folder alone, and with numbers that stand there."""

import importlib
import json
import re

import planted
import pytest
from circuit_pairs import planted_pairs

from emocircuits.circuits.flow import information_flow
from emocircuits.circuits.lens import visual_lens
from emocircuits.circuits.maps import attention_maps

NAMES = ("flow", "lens", "maps")


def section(name, folder):
    return importlib.import_module(f"emocircuits.report.sections.{name}").section(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pairs, subject = planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze"), planted.subject()
    out = tmp_path_factory.mktemp("run")
    information_flow(subject, pairs, progress=False).save(out)
    visual_lens(subject, pairs, progress=False).save(out)
    attention_maps(subject, pairs, [planted.READER, planted.TELLER], progress=False).save(out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_result_has_no_section(name, tmp_path):
    assert section(name, tmp_path) is None
    (tmp_path / f"{name}.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="expected format"):
        section(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_of_how_many_it_is(name, folder):
    made = section(name, folder)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", made.html)
    assert made.html.count("Plotly.newPlot(") == len(captions) > 2
    assert all("average over" in c or c.startswith("Example ") for c in captions)
    assert "16" in made.text
    # Nothing is fetched, and plotly.js is on the page once, put there by it.
    assert not re.search(r'(src|href)="?https?:', made.html)
    assert len(made.html) < 400_000


def test_numbers_are_those_of_the_files(folder):
    flow = json.loads((folder / "flow.json").read_text())
    text = section("flow", folder).text
    route = next(r for r in flow["routes"] if (r["to"], r["source"]) == ("query", "visual"))
    layer = max(range(4), key=route["saliency"]["emotional"]["mean"].__getitem__)
    assert layer == planted.READER[0]
    assert f"visual → query in layer {layer}" in text
    assert f"query → last in layer {planted.TELLER[0]}" in text
    mass = json.loads((folder / "maps.json").read_text())["mass"]
    assert f"give the image {mass['emotional']['heads']['mean']:.3f} of their weight" in section("maps", folder).text
    lens = json.loads((folder / "lens.json").read_text())["groups"]["visual"]["emotional"]
    assert f"in layer 3 it has {lens['gold']['mean'][3]:.3g}" in section("lens", folder).text


def test_what_people_wrote_is_text(folder, tmp_path):
    record = json.loads((folder / "maps.json").read_text())
    record["examples"][0]["id"] = "<script>alert(1)</script>"
    record["examples"][0]["emotional"]["said"] = "glad <b>& merry"
    (tmp_path / "maps.json").write_text(json.dumps(record))
    html = section("maps", tmp_path).html
    assert "alert(1)</script>" not in html
    assert "glad &lt;b&gt;&amp; merry" in html


@pytest.mark.parametrize("name", ["flow", "maps"])
def test_pairs_that_were_left_out_are_counted(name, folder, tmp_path):
    record = json.loads((folder / f"{name}.json").read_text())
    record["left_out"] = [{"id": i, "side": "neutral", "text": "the bus"} for i in ("a", "b", "b")]
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert "Left out: 2 pairs" in section(name, tmp_path).text
    assert "Left out" not in section(name, folder).text
