"""The README's snippets."""

import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "README.md"


def snippet(name):
    """The text of the block that is marked so."""
    (text,) = re.findall(rf"^```python {name}\n(.*?)^```", README.read_text(), re.M | re.S)
    return text
