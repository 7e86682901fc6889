"""The benchmark charts name the right contestants: colours, legends and lines of the published SVG agree."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
CHARTS = sorted((ROOT / "docs" / "_static" / "benchmarks").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
NOT_HERE = " (not in this chart)"


def recorded():
    found = json.loads((ROOT / "benchmarks" / "recorded.json").read_text())
    return {(row["work"], row["size"], row["density"]): row["seconds"] for row in found["times"]}


CONTESTANTS = list(dict.fromkeys(name for seconds in recorded().values() for name in seconds))


def colour(group):
    (found,) = set(re.findall(r"stroke: (#[0-9a-f]{6})", group.find(f"{SVG}path").get("style")))
    return found


def legend_of(chart):
    """The legend as a reader sees it: each label, and the colour of the line on its left."""
    (legend,) = [group for group in chart.iter(f"{SVG}g") if group.get("id", "").startswith("legend_")]
    handles = [group for group in legend.iter(f"{SVG}g") if group.get("id", "").startswith("legend ")]
    labels = ["".join(text.itertext()) for text in legend.iter(f"{SVG}text")]
    assert len(handles) == len(labels)
    return {label: colour(handle) for label, handle in zip(labels, handles, strict=True)}


def lines_of(chart):
    """Each drawn line: its colour, and its height at every point (downwards, as SVG counts)."""
    lines = {}
    for group in chart.iter(f"{SVG}g"):
        if group.get("id", "").startswith("line ") and (path := group.find(f"{SVG}path")) is not None:
            heights = [float(point.split()[1]) for point in re.split("[ML]", path.get("d")) if point.strip()]
            lines[group.get("id").removeprefix("line ")] = colour(group), heights
    return lines


@pytest.mark.parametrize("path", CHARTS, ids=lambda path: path.stem)
def test_every_contestant_is_in_the_legend_once_with_the_colour_of_its_line(path):
    chart = ET.parse(path).getroot()
    legend, lines = legend_of(chart), lines_of(chart)
    assert sorted(label.removesuffix(NOT_HERE) for label in legend) == sorted(CONTESTANTS)
    assert {name: drawn for name, (drawn, _) in lines.items()} == {
        label: drawn for label, drawn in legend.items() if not label.endswith(NOT_HERE)
    }
    assert len(set(legend.values())) == len(legend)


def test_a_contestant_has_the_same_colour_in_every_chart():
    assert len(CHARTS) == 7
    colours = {
        tuple((label.removesuffix(NOT_HERE), drawn) for label, drawn in legend_of(ET.parse(path).getroot()).items())
        for path in CHARTS
    }
    assert len(colours) == 1


@pytest.mark.parametrize("path", CHARTS, ids=lambda path: path.stem)
def test_the_line_that_a_name_stands_for_is_the_one_that_was_measured(path):
    work, _, across = path.stem.partition("-by-")
    times = recorded()
    largest = max(size for _, size, _ in times)
    if across == "size":
        points = [(work, size, 1e-4) for size in sorted({size for _, size, _ in times})]
    else:
        points = sorted(key for key in times if key[:2] == (work, largest) and key[2] > 0)
    lines = lines_of(ET.parse(path).getroot())
    for name, (_, heights) in lines.items():
        here = [index for index, point in enumerate(points) if name in times[point]]
        assert len(heights) == len(here)
        for index, height in zip(here, heights, strict=True):
            ours, found = times[points[index]]["dirtylog"], times[points[index]][name]
            assert name == "dirtylog" or (found > ours) == (height < lines["dirtylog"][1][index])


def test_every_chart_has_its_question_and_answer_and_every_table_is_folded_away():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in CHARTS:
        above = page[: page.index(f"_static/benchmarks/{path.name}")].strip().splitlines()
        assert [line for line in above if line][-2].startswith("With 2^")
        assert [line for line in above if line][-3].endswith("?")
    unfolded = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert not re.search(r"^\|", unfolded, re.MULTILINE)
