"""What the documents say of files is true."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WALKS = {"x through": 4, "A mask through": 8, "A function through": 8}


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_opens_few_files(walk):
    text = (ROOT / "docs" / "architecture.md").read_text()
    (section,) = [part for part in text.split("\n## ") if part.startswith(walk)]
    files = re.findall(r"^\d+\. `(\S+\.py)`", section, re.MULTILINE)
    assert 0 < len(files) <= WALKS[walk]
    assert [f for f in files if not (ROOT / "dagjax" / f).is_file()] == []


def test_rooms_of_the_house_exist():
    text = (ROOT / "README.md").read_text()
    house = text[text.index("## The house") :].split("\n## ")[0]
    rooms = re.findall(r"^      (?:  )?(\w+)/", house, re.MULTILINE)
    there = {p.name for p in (ROOT / "dagjax").rglob("*") if p.is_dir()}
    assert {"jaxprs", "graph", "compaction"} <= {*rooms} <= there
