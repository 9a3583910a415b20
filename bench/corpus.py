"""Real English sentences that every Python installation has: the language reference in `pydoc_data.topics`."""

from __future__ import annotations

import random
import re
from functools import cache

_SENTENCE_END = re.compile(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+")
_MARKUP = re.compile(r"[\"*`_=>|{}]|\.\.\.|::")


@cache
def sentences() -> tuple[str, ...]:
    """Every prose sentence of 5 to 60 words, each once, in the order of the text: no code, grammar, headings."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for text in topics.values():
        for paragraph in text.split("\n\n"):
            if paragraph.startswith((" ", "*", "-", "|", ">")) or "\n**" in paragraph or "\n==" in paragraph:
                continue
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if _is_prose(sentence):
                    found[sentence] = None
    return tuple(found)


def sample(count: int, seed: int) -> list[str]:
    """`count` different sentences, the same ones for the same seed."""
    return random.Random(seed).sample(sentences(), count)


def _is_prose(sentence: str) -> bool:
    words = _WORD.findall(sentence)
    ends = sentence[0].isupper() and sentence[-1] in ".!?"
    return ends and 5 <= len(words) <= 60 and len(_MARKUP.findall(sentence)) <= len(words) // 4
