"""Which language a text is in, as far as its letters and its commonest words tell.

That is coarse, and says so: a text without a few such words, or with those of several languages, is undetermined. It serves to show
what a data set is made of, and needs neither a model nor a library of megabytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

UNDETERMINED = "undetermined"
SCRIPTS: Mapping[str, str] = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script",
    "DEVANAGARI": "Devanagari script",
    "BENGALI": "Bengali script",
    "TAMIL": "Tamil script",
}
"""How the names of letters begin, and the language or the script that they are of; Japanese before Chinese, whose letters it uses too."""
WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {  # without letters and words that other languages use as often
        "en": "the is are was what which how many does there this that of and in on it its to with who where why has have be an for a yes no not can you any at from they he she",
        "de": "der die das ist sind war was welche wie viele gibt es dies und im auf den dem ein eine nicht mit von zu wer wo hat auch",
        "fr": "le la les est sont était quelle quel combien il ce cette et dans sur un une des du ne pas avec qui où pour au",
        "es": "el la los las es son era qué cuál cuántos hay este esta en un una del con quién dónde para por se al",
        "it": "il lo la gli è sono era che quale quanti c'è questo questa nel su un una del non con chi dove per di si al",
        "pt": "os é são era que qual quantos há este esta na em um uma da não com quem onde para por se ao",
        "nl": "de het is zijn was wat welke hoe veel er dit dat en in op een niet met van te wie waar heeft voor ook",
    }.items()
}
LEAST_WORDS = 2
CLEAR = 1.5
"""How many times as many words of the language than of the next one there must be."""


@lru_cache(maxsize=1 << 14)
def language_of(text: str) -> str:
    """The language of a text as its two letters, a script that several languages use, or `undetermined`."""
    letters = Counter(_script(letter) for letter in text[:1000] if letter.isalpha())
    if not letters:
        return UNDETERMINED
    total = letters.total()
    for script in SCRIPTS.values():
        if letters[script] >= (0.1 if script == "ja" else 0.4) * total:
            return script
    return _latin(text)


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return next((script for begins, script in SCRIPTS.items() if name.startswith(begins)), "")


def _latin(text: str) -> str:
    words = re.findall(r"[\w']+", text.casefold())[:200]
    found = Counter({language: sum(word in known for word in words) for language, known in WORDS.items()})
    (best, count), (_, second) = found.most_common(2)
    return best if count >= LEAST_WORDS and count >= CLEAR * second else UNDETERMINED
