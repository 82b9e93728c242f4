"""The docs site: `make docs` builds it from the pages here and from the docstrings. Nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gntalloc

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "gntalloc"
author = "the gntalloc authors"
project_copyright = author
version = release = gntalloc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["data"]
suppress_warnings = ["ref.python"]  # two classes are called Channel; a type hint does not say which is meant
default_role = "code"  # docstrings are read in an editor first: `name` is how they mark code

myst_heading_anchors = 4  # the anchors that a code host makes, so that `page.md#section` holds on both

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
add_module_names = False

html_theme = "furo"
html_title = f"gntalloc {version}"
html_copy_source = False
html_show_sphinx = False

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")


def setup(app: Sphinx) -> None:
    """Set the site up, as Sphinx asks."""
    app.connect("source-read", _links_out_of_the_site)
    app.connect("autodoc-process-docstring", _module_as_it_is_set)
    app.connect("autodoc-process-docstring", _property_without_a_type, priority=400)  # before napoleon


def _links_out_of_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead README to the site's first page, offer other files of the repository for download, and only name folders."""
    folder = (Path(app.srcdir) / page).parent

    def inside(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.name == "README.md" and target.parent == Path(app.srcdir).parent:
            return f"[{link[1]}](index.md)"
        return link[1] if target.is_dir() else link[0]

    source[0] = _OUTSIDE.sub(inside, source[0])


def _module_as_it_is_set(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Keep a module's docstring as it is after its first paragraph: its tables and programs are set by hand."""
    first = lines.index("") if "" in lines else len(lines)
    if what == "module" and any(lines[first:]):
        lines[first:] = ["", "::", "", *(f"    {line}" for line in lines[first + 1 :]), ""]


def _property_without_a_type(app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's first line for its type. Ours is in the annotation."""
    if what in {"property", "attribute"}:
        lines[:0] = ["..", ""]  # an empty comment
