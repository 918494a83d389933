"""Which third-party faces are shown, what each is taken to express, and which group it is in.

Emoji are labelled by their Unicode names, the same for every set. Avatars are put together from the options of their
collections; the combinations were written down from the option names, before any held-out picture was drawn.
``dev`` sets were looked at while the drawing code was written; ``held-out`` sets were drawn and evaluated once, at
the end.
"""

from __future__ import annotations

import dataclasses as dc

# label -> (code point, name in icon sets, older name in some of them)
EMOJI: dict[str, list[tuple[str, str, str]]] = {
    "happy": [
        ("1f600", "grinning-face", ""), ("1f603", "grinning-face-with-big-eyes", "smiling-face-with-open-mouth"),
        ("1f604", "grinning-face-with-smiling-eyes", "smiling-face-with-open-mouth-and-smiling-eyes"),
        ("1f601", "beaming-face-with-smiling-eyes", "grinning-face-with-smiling-eyes"),
        ("1f606", "grinning-squinting-face", "smiling-face-with-open-mouth-and-closed-eyes"),
        ("1f60a", "smiling-face-with-smiling-eyes", ""), ("1f642", "slightly-smiling-face", ""),
        ("263a-fe0f", "smiling-face", ""), ("1f602", "face-with-tears-of-joy", ""),
    ],
    "sad": [
        ("1f622", "crying-face", ""), ("1f62d", "loudly-crying-face", ""), ("1f61e", "disappointed-face", ""),
        ("1f614", "pensive-face", ""), ("1f641", "slightly-frowning-face", ""), ("2639-fe0f", "frowning-face", ""),
    ],
    "angry": [
        ("1f620", "angry-face", ""), ("1f621", "pouting-face", "enraged-face"),
        ("1f624", "face-with-steam-from-nose", ""),
        ("1f92c", "face-with-symbols-on-mouth", ""),
    ],
    "fear": [
        ("1f628", "fearful-face", ""), ("1f630", "anxious-face-with-sweat", "face-with-open-mouth-and-cold-sweat"),
        ("1f631", "face-screaming-in-fear", ""), ("1f627", "anguished-face", ""),
    ],
    "surprise": [("1f62e", "face-with-open-mouth", ""), ("1f62f", "hushed-face", ""), ("1f632", "astonished-face", "")],
    "disgust": [("1f922", "nauseated-face", ""), ("1f92e", "face-vomiting", "face-with-open-mouth-vomiting")],
    "neutral": [
        ("1f610", "neutral-face", ""), ("1f611", "expressionless-face", ""), ("1f636", "face-without-mouth", ""),
    ],
}  # fmt: skip

Options = dict[str, str]


def _mix(**parts: str) -> list[Options]:
    """All combinations of comma-separated options."""
    out: list[Options] = [{}]
    for key, values in parts.items():
        out = [{**o, key: v} for o in out for v in values.split(",")]
    return out


AVATARS: dict[str, dict[str, list[Options]]] = {
    "avataaars": {
        "happy": _mix(eyes="happy,default", eyebrows="default,raisedExcited", mouth="smile"),
        "sad": _mix(eyes="cry,default", eyebrows="sadConcerned,sadConcernedNatural", mouth="sad"),
        "angry": _mix(eyes="default,squint", eyebrows="angry,angryNatural", mouth="grimace,sad"),
        "fear": _mix(eyes="surprised", eyebrows="sadConcerned,sadConcernedNatural", mouth="screamOpen"),
        "surprise": _mix(eyes="surprised", eyebrows="raisedExcited,raisedExcitedNatural", mouth="disbelief"),
        "disgust": _mix(eyes="squint,xDizzy", eyebrows="frownNatural,angry", mouth="vomit"),
        "neutral": _mix(eyes="default", eyebrows="default,flatNatural,defaultNatural", mouth="serious"),
    },
    "dylan": {
        "happy": _mix(mood="happy,superHappy"), "sad": _mix(mood="sad"), "angry": _mix(mood="angry"),
        "neutral": _mix(mood="neutral"),
    },
    "open-peeps": {
        "happy": _mix(face="smile,smileBig,smileLOL,smileTeethGap,lovingGrin1,lovingGrin2"),
        "angry": _mix(face="angryWithFang,rage,veryAngry"), "fear": _mix(face="fear,concernedFear"),
        "surprise": _mix(face="awe"), "neutral": _mix(face="blank,calm,serious"),
    },
    "toon-head": {
        "happy": _mix(eyes="happy", eyebrows="happy,neutral", mouth="smile,laugh"),
        "sad": _mix(eyes="humble,wide", eyebrows="sad", mouth="sad"),
        "angry": _mix(eyes="wide,humble", eyebrows="angry", mouth="angry"),
        "surprise": _mix(eyes="wide", eyebrows="raised", mouth="agape"),
    },
    "fun-emoji": {
        "happy": _mix(eyes="plain,cute,closed2", mouth="wideSmile,smileLol,lilSmile"),
        "sad": _mix(eyes="sad,crying,tearDrop", mouth="sad"), "angry": _mix(eyes="pissed", mouth="pissed"),
        "disgust": _mix(eyes="plain", mouth="sick"), "neutral": _mix(eyes="plain", mouth="plain"),
    },
    "micah": {
        "happy": _mix(eyes="eyes,smiling", eyebrows="up", mouth="smile,laughing"),
        "sad": _mix(eyes="eyes", eyebrows="up,down", mouth="sad,frown"), "surprise": _mix(eyes="round",
            eyebrows="up", mouth="surprised"),
    },
    "personas": {
        "happy": _mix(eyes="happy,open", mouth="smile,bigSmile"), "sad": _mix(eyes="open", mouth="frown"),
        "surprise": _mix(eyes="open", mouth="surprise"),
    },
    "big-smile": {
        "happy": _mix(eyes="cheery", mouth="openedSmile,teethSmile"), "sad": _mix(eyes="sad", mouth="openSad"),
        "neutral": _mix(eyes="normal", mouth="unimpressed"),
    },
}  # fmt: skip


@dc.dataclass(frozen=True)
class Set:
    """A third-party set: ``kind`` is "png" (emoji-datasource), "icons" (Iconify SVG) or "avatars" (DiceBear)."""

    name: str
    kind: str
    group: str  # "dev" or "held-out"
    package: str
    version: str


SETS = (
    Set("google", "png", "dev", "emoji-datasource-google", "16.0.0"),
    Set("twitter", "png", "dev", "emoji-datasource-twitter", "16.0.0"),
    Set("avataaars", "avatars", "dev", "@dicebear/avataaars", "9.4.3"),
    Set("dylan", "avatars", "dev", "@dicebear/dylan", "9.4.3"),
    Set("apple", "png", "held-out", "emoji-datasource-apple", "16.0.0"),
    Set("facebook", "png", "held-out", "emoji-datasource-facebook", "16.0.0"),
    Set("fluent-emoji-flat", "icons", "held-out", "@iconify-json/fluent-emoji-flat", "1.2.6"),
    Set("openmoji", "icons", "held-out", "@iconify-json/openmoji", "1.2.29"),
    Set("emojione", "icons", "held-out", "@iconify-json/emojione", "1.2.3"),
    Set("open-peeps", "avatars", "held-out", "@dicebear/open-peeps", "9.4.3"),
    Set("toon-head", "avatars", "held-out", "@dicebear/toon-head", "9.4.3"),
    Set("fun-emoji", "avatars", "held-out", "@dicebear/fun-emoji", "9.4.3"),
    Set("micah", "avatars", "held-out", "@dicebear/micah", "9.4.3"),
    Set("personas", "avatars", "held-out", "@dicebear/personas", "9.4.3"),
    Set("big-smile", "avatars", "held-out", "@dicebear/big-smile", "9.4.3"),
)
TOOLS = {"@resvg/resvg-js": "2.6.2", "@dicebear/core": "9.4.3"}
