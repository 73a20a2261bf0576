"""The pages of the documentation as tests see them: headings, links, fenced blocks with their marks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)$")
_MARK = re.compile(r"^\s*<!-- (?P<kind>run|stand-in|parse|file|output|in|form)(?:: (?P<value>.+?))? -->\s*$")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"(?<!\\)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``info`` is what follows its ticks; ``mark`` and ``value`` come from the comment on the line before."""

    page: str
    line: int
    info: str
    text: str
    mark: str | None
    value: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A Markdown page in parts. ``prose`` is the text without fenced blocks and comments, with line numbers."""

    path: Path
    blocks: tuple[Block, ...]
    prose: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def anchors(self) -> set[str]:
        """Anchors of the headings as GitHub and MyST make them."""
        found: set[str] = set()
        for _, line in self.prose:
            if match := re.match(r"#{1,6} (.+)", line):
                base = anchor = slug(match[1])
                count = 0
                while anchor in found:
                    count += 1
                    anchor = f"{base}-{count}"
                found.add(anchor)
        return found

    def spans(self) -> list[tuple[int, str]]:
        """Inline code with its line."""
        return [(number, span) for number, line in self.prose for span in _SPAN.findall(line)]

    def links(self) -> list[tuple[int, str]]:
        """Targets of links and pictures with their line."""
        plain = [(number, _SPAN.sub(lambda m: "x" * len(m[0]), line)) for number, line in self.prose]
        return [(number, match["target"]) for number, line in plain for match in _LINK.finditer(line)]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, punctuation dropped, spaces to hyphens."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@lru_cache
def page(path: Path) -> Page:
    """Read a page.

    Raises:
        AssertionError: a fence that is not closed.
    """
    name = path.relative_to(ROOT).as_posix()
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    mark: re.Match[str] | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if not (fence := _FENCE.match(line)):
            if found := _MARK.match(line):
                mark = found
            else:
                mark = None
                prose.append((number, re.sub(r"<!--.*?-->", "", line)))
            continue
        end = next((i for i in range(number, len(lines)) if lines[i].strip() == fence["ticks"]), None)
        assert end is not None, f"{name}:{number}: this fence is never closed"
        body = "\n".join(text.removeprefix(fence["indent"]) for text in lines[number:end]) + "\n"
        kind, value = (mark["kind"], mark["value"]) if mark else (None, None)
        blocks.append(Block(name, number, fence["info"].strip(), body, kind, value))
        number, mark = end + 1, None
    return Page(path, tuple(blocks), tuple(prose))


def pages() -> list[Page]:
    """README, CONTRIBUTING, CHANGELOG and every page under docs/."""
    top = [path for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (path := ROOT / name).is_file()]
    return [page(path) for path in (*top, *sorted(DOCS.rglob("*.md")))]
