"""Snippets of the README and of the guide."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def snippet(name, page="README.md"):
    """The text of a page's block that is marked so."""
    (text,) = re.findall(rf"^```python {name}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    return text
