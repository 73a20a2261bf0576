"""Sphinx configuration: the site is built from these Markdown pages by ``make docs``; every warning is an error there."""

from __future__ import annotations

import coordexp

project = "coordexp"
author = "the coordexp authors"
release = version = coordexp.__version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
# Headings get the anchors that they have on GitHub, so one link works in both places.
myst_heading_anchors = 4
nitpicky = True
# Angle brackets of coordinate tokens and JSON with comments are not for a lexer.
highlight_language = "none"

html_theme = "furo"
html_title = f"coordexp {version}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
