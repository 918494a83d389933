"""Loaded words: what a neutral sentence must not say. A list of our own, of words in their base form.

It is wide on purpose: a sentence that loses a doubtful word costs nothing, a loaded one tells the model what to feel.
"""

from __future__ import annotations

import re
from types import MappingProxyType

_LISTS = {
    "names a feeling": """
        adore afraid aggressive alarm amaze amazement amuse amusement anger angry annoy annoyance anxiety anxious
        apprehension apprehensive ashamed astonish astonishment averse aversion awe awed bewilder bewildered bitter
        bitterness bliss blissful bored boredom calm calmness cheer cheerful cheery composed composure contempt content
        contented curious dejected delight delightful depress depressed depression desire despair despise detest
        dislike displease displeased disappoint disappointment disbelief disgust distaste distress distressed downcast
        dread eager ecstatic elated elation embarrass embarrassment emotion emotional enjoy enjoyment enrage enraged
        enthusiasm enthusiastic envious envy excite excited excitement expressionless fear fearful feel feeling felt
        fright frighten frightened frustrate frustration furious fury glad gladness gloom gloomy grateful gratitude
        grief grieve gross guilt guilty happiness happy hate hatred heartbreak heartbroken homesick hope hopeful
        hopeless horrified horrify horror hostile hostility hurt impassive indifference indifferent indignant
        indignation infuriate infuriated irritable irritate irritation jealous jealousy jolly joy joyful joyous
        loathe loathing lonely loneliness love loved mad madden melancholic melancholy merry miserable misery moody
        mourn mournful nausea nauseated nauseous nervous nervousness neutral neutrality nostalgia nostalgic offend
        outrage outraged overjoyed panic panicked passion peaceful pity pleased pleasure pride proud rage regret
        relax relaxed relief relieved repel repelled repulsed repulsion resent resentful resentment revolt revolted
        revulsion sad sadden sadness satisfied satisfaction scare scared scary serene shame shock shocked sicken
        sickened sorrow sorrowful speechless startle startled steady stress stressed stun stunned surprise sympathy
        tense tension terrified terrify terror thrill thrilled uneasy unease unemotional unhappiness unhappy upbeat
        upset weary wonder worried worry yearn
    """,
    "shows a feeling": """
        blush chuckle cry frown gasp giggle glare grimace grin groan growl howl hug kiss laugh laughter moan pout
        scowl scream shiver shout shriek sigh smile smirk sneer sob swear tearful tears tremble wail weep wept yell
    """,
    "is a judgement": """
        absurd admirable adorable amazing annoying appalling astonishing atrocious attractive awesome awful awkward
        bad badly beautiful beauty beloved best better boring brave brilliant brutal charming cheerless comfort
        comfortable coward cowardly crazy creepy crude cruel cruelty cute dangerous delicious desperate dire dirty
        disgraceful disgusting dishonest dreadful dreary dull dumb evil excellent exciting fabulous fantastic favorite
        favourite filthy fine foolish foul fortunate friendly frightening fun funny generous ghastly glorious good
        gorgeous great greedy grim gruesome harmful harmless harsh hellish helpless heroic hideous hilarious horrible
        hopelessly idiot idiotic ignorant impressive incredible inspiring interesting kindness lame lazy lousy lovely
        lucky magnificent marvellous marvelous mediocre messy mistaken nasty naughty nice outstanding
        pathetic perfect pleasant poor precious rude ridiculous rotten selfish shameful shocking sick sickening silly
        sinister splendid spoiled stupid stunning sublime superb surprising suspicious sweet tasty terrible terrific
        terrifying tiresome tragic treacherous ugly unbearable unfair unfortunate unfriendly unkind unlucky unpleasant
        useless vicious vile vulgar wicked wonderful worse worst worthless wretched wrong
    """,
    "is good or bad in itself": """
        abandon abuse accident accuse ache adventure affair agony ambulance apologise apologize apology argue argument
        arrest assault attack award bankrupt bankruptcy beg betray betrayal birthday blame bleed blessing
        blood bloody bomb bonus broke broken bully bury burial cancer captive casualty catastrophe celebrate
        celebration champion cheat cheated cockroach coffin complain complaint conflict congratulate congratulation
        corpse crash crime criminal crisis cripple curse damage danger dead death debt deceive defeat defend demon
        destroy destruction devil die disaster disease divorce drown drunk emergency enemy error evict eviction
        execution explode explosion fail failure famine fatal feast fight filth fired flood foe fought fraud funeral
        ghost gift grave gun harass harm heal heaven hell hero honeymoon hostage hunger ill illness injure injury
        insult jail jackpot kill lawsuit lose loser loss lost luck maggot massacre medal mess
        miracle misfortune missing mistake monster murder murderer nightmare orphan pain painful paradise
        party perish pest plague poison praise prison prize problem promotion puke punish punishment quarrel rape rat
        rescue revenge reward rob robbery rot ruin sacked sacrifice scam scandal scar scold shoot shot sin slaughter
        slave smuggle starve steal stench stink stole stolen strangle success successful suffer suicide surgery
        survive survivor terrorist theft thief threat threaten tomb torture toxic tragedy trap traitor treasure triumph
        trouble tumor tumour vacation victim victory violence violent virus vomit war warn warning weapon wedding win
        winner won wound wreck
    """,
    "presses": """
        absolutely alas amazingly awfully badly completely extremely finally fortunately hopefully horribly
        incredibly luckily regrettably sadly shockingly strangely suddenly surprisingly terribly thankfully totally
        unexpectedly unfortunately utterly very
    """,
}

LOADED: MappingProxyType[str, str] = MappingProxyType(
    {word: why for why, words in reversed(_LISTS.items()) for word in words.split()}
)
"""Loaded word -> why it is."""

# Words that only look like forms of loaded ones.
_OTHERS = frozenset({"goods", "wares", "warden", "warship", "losing", "finery", "sinned", "partly", "rating", "rated"})


def _bases(word: str) -> list[str]:
    """What ``word`` may be a form of, in English: plurals, tenses, comparatives, adverbs, ``un-``."""
    found = [word]
    for end, replacements in (
        ("'s", ("",)), ("ies", ("y",)), ("ied", ("y",)), ("ier", ("y",)), ("iest", ("y",)), ("ily", ("y",)),
        ("iness", ("y",)), ("es", ("", "e")), ("s", ("",)), ("ed", ("", "e")), ("ing", ("", "e")), ("er", ("", "e")),
        ("est", ("", "e")), ("ly", ("", "le")), ("ness", ("",)), ("fully", ("ful",)),
    ):  # fmt: skip
        if word.endswith(end):
            stems = [word[: -len(end)] + r for r in replacements]
            # "robbed", "winning": the last consonant is written twice.
            stems += [s[:-1] for s in stems if re.search(r"([b-df-hj-np-tv-z])\1$", s)]
            found += [s for s in stems if len(s) > 2]
    return found


def loaded(word: str) -> str | None:
    """Why a lower-case word is loaded, in words; None when it is not."""
    if word in _OTHERS:
        return None
    for base in _bases(word):
        for form in (base, base.removeprefix("un")):
            if form in LOADED:
                return LOADED[form]
    return None
