"""Retrieval: a tool that finds passages of a text file by their words (BM25). No index on disk, no network.

BM25: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009, eq. 3.5, with k1 = 1.5 and b = 0.75.
"""

import functools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

from grpo.turns.tools import register_tool

CORPUS = "GRPO_RETRIEVAL_CORPUS"
"""Environment variable with the file: JSONL with a column `text`, or a text file with an empty line between
passages."""
K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


@register_tool("retrieval")
def retrieval(query: str, count: int = 3) -> str:
    """Find passages of the reference text that contain the words of a query.

    Args:
        query: Some words to look for.
        count: Largest number of passages, at most 10.
    """
    path = os.environ.get(CORPUS)
    if not path:
        raise ValueError(f"no reference text: set {CORPUS} to a file")
    found = search(query, path, max(1, min(10, count)))
    return "\n\n".join(f"[{place + 1}] {text}" for place, text in found) or "no passage contains these words"


def search(query: str, path: str, count: int) -> list[tuple[int, str]]:
    """Return the best passages of a file, with their index, best first. Equal scores keep the order of the file."""
    passages, words, frequency, mean = _load(path, os.stat(path).st_mtime_ns)
    scores: list[tuple[float, int]] = []
    for place, counts in enumerate(words):
        score, length = 0.0, counts.total()
        for word in set(_WORD.findall(query.casefold())):
            if counts[word]:
                rarity = math.log(1 + (len(words) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                score += rarity * counts[word] * (K1 + 1) / (counts[word] + K1 * (1 - B + B * length / mean))
        if score:
            scores.append((-score, place))
    return [(place, passages[place]) for _, place in sorted(scores)[:count]]


@functools.lru_cache(maxsize=2)
def _load(path: str, _changed: int) -> tuple[list[str], list[Counter[str]], Counter[str], float]:
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".jsonl"):
        passages = [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
    else:
        passages = [passage.strip() for passage in re.split(r"\n\s*\n", text) if passage.strip()]
    words = [Counter(_WORD.findall(passage.casefold())) for passage in passages]
    frequency = Counter(word for counts in words for word in counts)
    return passages, words, frequency, sum(counts.total() for counts in words) / max(1, len(words))
