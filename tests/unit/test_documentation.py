"""Every relative link of the documentation leads to a file, and to a heading where it names one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "slurm/*.md", "examples/*/*.md") for path in ROOT.glob(pattern)
)


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Names that headings can be linked by: small letters, hyphens for spaces, other punctuation left out."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_the_readme_names_every_page() -> None:
    assert ROOT / "docs" / "architecture.md" in PAGES
    named = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    folders = {path for path in named if path.is_dir()}
    pages = [page for page in PAGES if page.parent != ROOT]
    assert [page for page in pages if page not in named and not folders & set(page.parents)] == []
