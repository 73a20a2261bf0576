"""The documentation holds together: links, anchors, navigation, the site, and what generated pages say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from pages import DOCS, ROOT, page, pages, slug


@pytest.mark.parametrize("one", pages(), ids=lambda p: p.name)
def test_every_relative_link_and_anchor_leads_somewhere(one):
    wrong = []
    for line, target in one.links():
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (one.path.parent / file).resolve() if file else one.path
        if not to.exists():
            wrong.append(f"{one.name}:{line}: {target}: no such file")
        elif anchor and (to.suffix != ".md" or anchor not in page(to).anchors):
            wrong.append(f"{one.name}:{line}: {target}: no such heading")
        elif one.path.is_relative_to(DOCS) and not to.is_relative_to(DOCS):
            wrong.append(f"{one.name}:{line}: {target}: outside docs/, so the site cannot hold it: name the file in plain text")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_reached_from_the_navigation_once():
    listed = _entries(DOCS / "index.md")
    decisions = [path for path in sorted((DOCS / "decisions").glob("*.md")) if path.name != "index.md"]
    assert sorted(listed) == sorted(path for path in DOCS.rglob("*.md") if path not in decisions and path != DOCS / "index.md")
    assert _entries(DOCS / "decisions" / "index.md") == decisions


def _entries(index):
    """Pages named in the toctrees of an index page."""
    found = []
    for block in page(index).blocks:
        if block.info != "{toctree}":
            continue
        for line in filter(None, block.text.splitlines()):
            if not line.startswith(":"):
                found += sorted(index.parent.glob(f"{line}.md")) if ":glob:" in block.text else [index.parent / f"{line}.md"]
    return found


def test_the_front_page_and_the_readme_link_every_page_that_is_no_decision():
    names = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    assert {target for _, target in page(DOCS / "index.md").links()} >= names
    assert {target.removeprefix("docs/") for _, target in page(ROOT / "README.md").links()} >= names


def test_the_site_builds_without_a_warning(tmp_path):
    words = ["-b", "html", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for one in DOCS.rglob("*.md"):
        assert (tmp_path / "site" / one.relative_to(DOCS)).with_suffix(".html").is_file()
    assert 'id="a-real-checkpoint"' in (tmp_path / "site" / "quickstart.html").read_text(encoding="utf-8")


def test_the_site_refuses_a_broken_link(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((DOCS / "conf.py").read_text(encoding="utf-8"), encoding="utf-8")
    (source / "index.md").write_text("# A\n\n[no page](gone.md), [no heading](#gone)\n", encoding="utf-8")
    (source / "lost.md").write_text("# In no navigation\n", encoding="utf-8")
    words = ["-b", "html", "-W", "--keep-going", "-q", str(source), str(tmp_path / "site")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    for complaint in ("gone.md", "'gone'", "toctree"):
        assert complaint in done.stderr, complaint


def test_the_readme_is_short_and_shows_the_report():
    readme = page(ROOT / "README.md")
    assert len(readme.path.read_text(encoding="utf-8").splitlines()) < 200
    assert "docs/images/report.png" in {target for _, target in readme.links()}


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("The demo", "the-demo"), ("Scores, ranked: `AP`", "scores-ranked-ap"), ("Full, LoRA & DoRA", "full-lora--dora"), ("CX001", "cx001")],
)
def test_anchors_are_those_of_github(heading, anchor):
    assert slug(heading) == anchor


def test_files_and_modules_named_in_the_text_exist():
    """Inline code that looks like a file of the repository: a path under a known folder, or a top-level file."""
    wrong = []
    for one in pages():
        if one.path.name == "CHANGELOG.md":
            continue
        for line, span in one.spans():
            if re.fullmatch(r"(src|tests|docs|benchmarks|experiments)/[\w./-]+", span) and not (ROOT / span).exists():
                wrong.append(f"{one.name}:{line}: {span}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("form", ["bug", "question"])
def test_issue_forms_are_whole_and_ask_for_versions_and_configuration(form):
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text(encoding="utf-8"))
    assert content["name"]
    assert content["description"]
    fields = [item for item in content["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] and item["type"] in ("textarea", "dropdown", "checkboxes", "input") for item in fields)
    names = [item["id"] for item in fields]
    assert len(set(names)) == len(names)
    assert {"doctor", "config"} <= set(names)
    assert "coordexp doctor" in next(item["attributes"]["label"] for item in fields if item["id"] == "doctor")


def test_pre_commit_hooks_are_local_and_are_the_linters_of_the_makefile():
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in content["repos"] for hook in repo["hooks"]]
    assert [repo["repo"] for repo in content["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks} == {"system"}
    linters = set(
        re.findall(r"\$\(BIN\)/(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8").partition("lint:")[2].partition("\n\n")[0])
    )
    assert {hook["entry"].split()[0] for hook in hooks} == linters
    assert all(re.compile(hook["files"]) for hook in hooks if "files" in hook)
