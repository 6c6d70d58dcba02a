"""The form in which SQuAD's script (v1.1) compares answers.

Lower case, without punctuation (ASCII's), without the articles a, an and the, and with single spaces.
"""

from __future__ import annotations

import re
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Return an answer as it is compared."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())
