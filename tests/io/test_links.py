"""What the README and the pages of docs point at is there: files, pictures, headings."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: pathlib.Path) -> set[str]:
  """Its headings as GitHub names them."""
  heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
  return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
  found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
  assert found
  for link in found:
    target, _, anchor = link.partition("#")
    if "://" in target:
      continue
    other = page if not target else (page.parent / target)
    assert other.is_file(), link
    assert not anchor or anchor in anchors(other), link


@pytest.mark.parametrize("page", [*PAGES, ROOT / "NOTES.md"], ids=lambda page: page.name)
def test_records_that_are_named(page):
  """`docs/NAME.json` from the root, and `NAME_h100.json`, `NAME_h200.json` among the benchmarks' results."""
  text = page.read_text()
  for name in re.findall(r"`(docs/\w+\.(?:json|png))`", text):
    assert (ROOT / name).is_file(), name
  for name in re.findall(r"\b(\w+_h[12]00\.json)`", text):
    assert (ROOT / "benchmarks/results" / name).is_file(), name
