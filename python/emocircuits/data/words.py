"""Loaded words: what a neutral sentence must not say. A list of our own, of words in their base form.

It is wide on purpose: a sentence that loses a doubtful word costs nothing, a loaded one tells the model what to feel.
"""

from __future__ import annotations

import re
from types import MappingProxyType

_LISTS = {
    "names a feeling": """
        adore affection afraid aggressive alarm amaze amazement amuse amusement anger angry anguish annoy annoyance
        anxiety anxious apprehension apprehensive ashamed astonish astonishment averse aversion awe awed bewilder
        bewildered bitter bitterness bliss blissful bored boredom calm calmness cheer cheerful cheery composed
        composure contempt content contented curious dejected delight delightful depress depressed depression desire
        despair despise detest disappoint disappointment disbelief disgust disgusted dislike displease displeased
        dissatisfied distaste distraught distress distressed downcast dread eager ecstatic elated elation embarrass
        embarrassment emotion emotional enjoy enjoyment enrage enraged enthusiasm enthusiastic envious envy euphoria
        euphoric excite excited excitement exhilarate exhilarated expressionless fear fearful feel feeling felt fond
        fright frighten frightened frustrate frustration furious fury glad gladness glee gleeful gloom gloomy grateful
        gratitude grief grieve gross guilt guilty happiness happy hate hatred heartbreak heartbroken heartfelt homesick
        hope hopeful hopeless horrified horrify horror hostile hostility humiliate humiliation hurt impassive
        indifference indifferent indignant indignation infuriate infuriated irate irritable irritate irritation jealous
        jealousy jolly joy joyful joyous jubilant livid loathe loathing loneliness lonely love loved mad madden
        melancholic melancholy merry mirth mirthful miserable misery moody mourn mournful nausea nauseated nauseous
        nervous nervousness neutral neutrality nostalgia nostalgic offend optimism optimistic outrage outraged
        overjoyed panic panicked passion passionate peaceful pessimism pessimistic petrified petrify pity pleased
        pleasure pride proud rage regret rejoice relax relaxed relief relieved repel repelled repulsed repulsion resent
        resentful resentment revolt revolted revulsion sad sadden sadness satisfaction satisfied scare scared scary
        serene shame shock shocked sicken sickened sorrow sorrowful speechless spite startle startled steady stress
        stressed stun stunned surprise sympathy tense tension terrified terrify terror thankful thrill thrilled trauma
        traumatic traumatize unease uneasy unemotional unhappiness unhappy upbeat upset weary wonder worried worry
        wrath wrathful yearn
    """,
    "shows a feeling": """
        blush chuckle cry frown gasp giggle glare grimace grin groan growl howl hug hurrah hurray kiss laugh laughter
        lol moan phew pout scowl scream shiver shout shriek sigh smile smirk sneer sob sulk swear swore tearful tears
        tremble ugh wail weep wept whimper wink wow yay yell
    """,
    "is a judgement": """
        absurd admirable adorable amazing annoying appalling arrogant astonishing atrocious attractive awesome awful
        awkward bad badly beautiful beauty beloved best better boring brave brilliant brutal charming cheerless comfort
        comfortable courage courageous coward cowardly crap crazy creepy crude cruel cruelty cute damn dangerous decent
        delicious desperate despicable dire dirty disastrous disgraceful disgusting dishonest dismal divine dreadful
        dreary dull dumb elegant evil excel excellence excellent exciting exquisite fabulous fantastic fascinate
        fascinating favorite favourite filthy fine foolish fortunate foul friendly frightening fuck fun funny generous
        ghastly glorious good gorgeous gracious great greedy grim gruesome handsome harmful harmless harsh hellish
        helpless heroic hideous hilarious honest hopelessly horrendous horrible horrid ideal idiot idiotic ignorant
        impressive incredible ingenious insane inspiring interesting kindness lame lazy lousy lovable lovely loyal
        lucky magnificent marvellous marvelous mediocre messy mistaken nasty naughty negative nice noble obscene
        outstanding pathetic perfect perverse pleasant poor positive precious questionable racist remarkable repulsive
        respectable ridiculous romantic rotten rude savage selfish sexy shameful shit shocking sick sickening silly
        sinister splendid spoiled stunning stupid sublime super superb superior supreme surprising suspicious sweet
        tasty terrible terrific terrifying tiresome tragic treacherous trustworthy ugly unbearable unfair unfortunate
        unfriendly unkind unlucky unpleasant useless vibrant vicious vile vulgar wicked wonderful worse worst worthless
        wretched wrong yummy
    """,
    "is good or bad in itself": """
        abandon abduct abuse accident accuse ache adventure affair agony ambulance apologise apologize apology argue
        argument arrest assault attack award bankrupt bankruptcy bastard beg betray betrayal birthday bitch blame bleed
        blessing blood bloody bomb bonus broke broken bully burial bury cancer captive casualty catastrophe celebrate
        celebration champion chaos cheat cheated cockroach coffin complain complaint conflict congratulate
        congratulation conspiracy corpse crash crime criminal cripple crisis curse damage danger dead death debt
        deceive defeat defend demon destroy destruction devastate devil die disaster disease divorce doom drown drunk
        dying emergency enemy error evict eviction execution explode explosion fail failure famine fatal feast felony
        fight filth fired flood foe fought fraud freedom funeral ghost gift glory grave gun harass harm havoc heal
        heaven hell hero heroine honeymoon honor honour hostage hunger ill illness injure injury injustice insult
        jackpot jail justice kidnap kill lawsuit liberty lose loser loss lost loyalty luck maggot massacre masterpiece
        medal mess miracle misfortune missing mistake molest monster murder murderer nightmare orphan pain painful
        paradise party peace perish pest plague poison praise prison prize problem promotion puke punish punishment
        quarrel racism rape rat rejection rescue revenge reward riot rob robbery romance rot ruin sabotage sacked
        sacrifice scam scandal scar scold shoot shot sin slaughter slave slavery smuggle stab starve steal stench stink
        stole stolen strangle success successful suffer suicidal suicide surgery survive survivor terrorise terrorism
        terrorist terrorize theft thief threat threaten tomb torment torture toxic tragedy traitor trap treasure
        triumph trouble tumor tumour vacation victim victorious victory villain violence violent virus vomit war warn
        warning wealth weapon wedding win winner won wound wreck
    """,
    "presses": """
        absolutely alas amazingly awfully badly completely extremely finally fortunately hopefully horribly incredibly
        luckily regrettably sadly shockingly strangely suddenly surprisingly terribly thankfully totally unexpectedly
        unfortunately utterly very
    """,
}

LOADED: MappingProxyType[str, str] = MappingProxyType(
    {word: why for why, words in reversed(_LISTS.items()) for word in words.split()}
)
"""Loaded word -> why it is."""

# Words that only look like forms of loaded ones.
_OTHERS = frozenset({"goods", "warden", "warship", "finery", "contents", "broker", "successor", "successors"})
_ENDS = (
    ("'s", ("",)), ("ies", ("y",)), ("ied", ("y",)), ("ier", ("y",)), ("iest", ("y",)), ("ily", ("y",)),
    ("iness", ("y",)), ("iful", ("y",)), ("es", ("", "e")), ("s", ("",)), ("ed", ("", "e")), ("ing", ("", "e")),
    ("er", ("", "e")), ("or", ("",)), ("est", ("", "e")), ("ly", ("", "le")), ("ness", ("",)), ("ful", ("",)),
    ("less", ("",)), ("ment", ("",)), ("ation", ("", "e")), ("ion", ("", "e")), ("ous", ("", "e", "y")),
)  # fmt: skip
_SHORT = re.compile(r"[^aeiou]*[aeiou][b-df-hj-np-tvz]")
_HISSING = ("s", "x", "z", "ch", "sh", "o", "i")


def _bases(word: str) -> set[str]:
    """What ``word`` may be a form of, in English: plurals, tenses, comparatives, adverbs, nouns of verbs."""
    found = set()
    for end, replacements in _ENDS:
        if not word.endswith(end):
            continue
        stem = word[: -len(end)]
        stems = {stem + r for r in replacements}
        # "robes" is no form of "rob", nor "rated" of "rat": short stems write their last consonant twice ("robbed").
        if (end[0] in "aeio" and _SHORT.fullmatch(stem)) or (end == "es" and not stem.endswith(_HISSING)):
            stems.discard(stem)
        if re.search(r"([b-df-hj-np-tv-z])\1$", stem):
            stems.add(stem[:-1])
        found |= {s for s in stems if len(s) > 2}
    return found


def loaded(word: str) -> str | None:
    """Why a lower-case word is loaded, in words; None when it is not. Knows forms of forms ("killers", "joylessly")."""
    if word in _OTHERS:
        return None
    once = {word, word.removeprefix("un")}
    forms = once.union(*map(_bases, once))
    forms = forms.union(*map(_bases, forms))
    # The form that is nearest to the word itself says why.
    return next((LOADED[f] for f in sorted(forms, key=lambda f: (-len(f), f)) if f in LOADED), None)
