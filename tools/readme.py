"""README.md as an index of packages shows it: links into the repository lead there, or are plain words.

A metadata hook of hatchling (pyproject.toml). Its setting `links` says where the repository's files are read, with
{version} in it; as long as that is empty nobody knows, and a link that leads nowhere is worse than none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # for the tests, which need only `for_an_index`
    MetadataHookInterface = object

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`)*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_an_index(text: str, links: str) -> str:
    """Make links absolute: `links` is what stands before a path; without it only their words are left."""

    def replaced(link: re.Match[str]) -> str:
        return f"[{link[1]}]({links}{link[2]})" if links else link[1]

    return _LINK.sub(replaced, text)


class CustomMetadataHook(MetadataHookInterface):
    """Gives the wheel its long description."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill the project table in, as hatchling asks."""
        root = Path(self.root)
        links = str(self.config.get("links", "")).format(version=metadata["version"])
        text = (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text, links)}
