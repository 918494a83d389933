"""The rules for events: a neutral sentence that leaves it open what one feels about it.

A concrete action in more than five words; the first person is allowed; no second or third person pronouns; no loaded
words; readable as good, bad or neutral. The rules are about English.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from emocircuits.data.words import loaded

EMOTIONS = ("happy", "sad", "angry", "fear", "surprise", "disgust")
"""Known without a lexicon of one's own."""
MORE_THAN = 5
SECOND = frozenset(("you", "your", "yours", "yourself", "yourselves", "thou", "thee", "thy", "thine", "ya", "y'all"))
THIRD = frozenset(
    (
        "he", "him", "his", "himself", "she", "her", "hers", "herself", "it", "its", "itself", "they", "them", "their",
        "theirs", "themselves", "themself", "one's", "oneself",
    )
)  # fmt: skip
UNCHECKED = (
    "that an event tells of a concrete action, and can be read as good, bad or neutral: ask two people what each event "
    "makes them feel, and drop those on which they agree",
    "that an event is loaded by what it means, without a word that is on the list",
    "that the neutral picture shows no emotion, the emotional one shows the emotion that is named, and nothing else "
    "differs inside the mask (or, without a mask, anywhere)",
    "that nobody is in two sets with different pictures, and that no picture comes again mirrored or cut",
)
"""What a person must look at."""

_ABBREVIATIONS = re.compile(r"\b(?:mr|mrs|ms|dr|st|prof|no|vs|approx|a\.m|p\.m|e\.g|i\.e)\.", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower-case words and numbers; an apostrophe or a hyphen inside belongs to the word."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'").replace("‘", "'")
    return re.findall(r"\w+(?:['\-]\w+)*", text)


def event_problems(event: str, lexicon: Collection[str] = ()) -> list[str]:
    """What is wrong with an event, each as a line that says what to do; empty when nothing is.

    Args:
        event: the sentence.
        lexicon: words that name an emotion in answers. An event with one would be a hit by being repeated.
    """
    if not event.strip():
        return ["the event is empty; expected a sentence such as 'my mom said that the shop opens at ten.'"]
    problems = []
    foreign = sorted({c for c in event if c.isalpha() and "LATIN" not in unicodedata.name(c, "")})
    if foreign:
        problems.append(f"{''.join(foreign[:5])!r} is not of the Latin alphabet; the rules are about English events")
    if re.search(r"[\n\r\t<>{}\x00-\x1f]", event):
        problems.append("the event has line breaks or markup; write plain text")
    if "!" in event or "?" in event:
        problems.append("the event asks or exclaims; write a statement")
    if len([part for part in re.split(r"[.;!?…]+(?=\s|$)", _ABBREVIATIONS.sub("x", event)) if words(part)]) > 1:
        problems.append("the event is more than one sentence; write one")
    found = words(event)
    if len(found) <= MORE_THAN:
        problems.append(f"the event has {len(found)} words; more than {MORE_THAN} are needed")
    return problems + _words(found, frozenset(word.lower() for word in lexicon))


def _words(found: list[str], lexicon: frozenset[str]) -> list[str]:
    """What is wrong with single words: each word once."""
    problems = []
    for word in dict.fromkeys(found):
        # "they'll", "you're": the pronoun is what stands before the apostrophe. "won't" is no form of "won".
        bare = word.removesuffix("n't").split("'")[0]
        parts = [word, bare, *word.split("-")]
        why = next((reason for part in parts if (reason := loaded(part))), None)
        if any(part in SECOND for part in parts):
            problems.append(f"{word!r} is a second person pronoun; tell it as I or we, or with nouns")
        elif any(part in THIRD for part in parts):
            problems.append(f"{word!r} is a third person pronoun; use a noun, such as 'my friend' or 'the shop'")
        elif any(part in lexicon for part in parts):
            problems.append(f"{word!r} is a word of the lexicon, and an answer that repeats it would count as a hit")
        elif why:
            problems.append(f"{word!r} {why}; say what happened in plain words")
    return problems
