"""mdBook's preprocessor: links that leave this folder lead to the repository."""

import json
import re
import sys

REPOSITORY = "https://github.com/tqkv/tqkv/blob/main/"


def mend(part):
    """Every chapter's text within a part of the book."""
    if isinstance(part, dict):
        return {key: link(x) if key == "content" and isinstance(x, str) else mend(x) for key, x in part.items()}
    return [mend(x) for x in part] if isinstance(part, list) else part


def link(text):
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}", text)


if sys.argv[1:2] != ["supports"]:
    _, book = json.load(sys.stdin)
    json.dump(mend(book), sys.stdout)
