"""The planted circuit is what it says it is: one patch at a time, with plain hooks on the unmodified model."""

import planted
import pytest
import sweep_oracle as oracle
import torch

EVENTS = ["the report is ready .", "the road is closed today ."]


def gap(kind, emotion, target, units):
    """Effects ``[layer, unit]`` of a hook loop, of the logit of the emotion's word less that of "calm"."""
    subject = planted.subject(kind, dtype=torch.float64)
    ids = subject.tokenizer.get_vocab()
    a, b = ids[planted.WORDS[emotion][0]], ids["calm"]
    clean, corrupt = (subject.inputs([planted.picture(e, 50)], EVENTS[:1]) for e in (emotion, "neutral"))
    metric = lambda logits: float(logits[0, -1, a] - logits[0, -1, b])  # noqa: E731
    with torch.no_grad():
        top, base = (metric(subject.model(**x).logits) for x in (clean, corrupt))
    values = oracle.sweep(subject.model, corrupt, clean, target, metric, "all", units)
    return (values - base) / (top - base)


@pytest.mark.parametrize("emotion", planted.EMOTIONS)
def test_it_sees_and_says(emotion):
    for kind, expected in (("circuit", planted.WORDS[emotion][0]), ("blind", "calm")):
        subject = planted.subject(kind)
        assert subject.generate([planted.picture(emotion, s) for s in (50, 51)], EVENTS) == [expected] * 2
    assert planted.subject().generate([planted.picture("neutral")], EVENTS[:1]) == ["calm"]


def test_only_the_planted_heads_and_neurons_carry_the_emotion():
    size = planted.SIZE
    heads = gap("circuit", "sad", "heads", [range(h * size, (h + 1) * size) for h in range(planted.HEADS)])
    strong = {(int(l), int(h)) for l, h in (heads > 0.5).nonzero()}
    assert strong == {planted.READER, planted.TELLER}
    assert heads[~(heads > 0.5)].abs().max() < 0.01
    neurons = gap("circuit", "sad", "neurons", [[i] for i in range(planted.NEURONS)])
    i = planted.EMOTIONS.index("sad")
    strong = {(int(l), int(n)) for l, n in (neurons > 0.5).nonzero()}
    assert strong == {planted.TRIGGERS[i], planted.SPEAKERS[i]}
    assert neurons[~(neurons > 0.5)].abs().max() < 0.01


def test_no_head_stands_out_in_the_diffuse_model():
    size = planted.SIZE
    heads = gap("diffuse", "sad", "heads", [range(h * size, (h + 1) * size) for h in range(planted.HEADS)])
    for layer in (planted.READER[0], planted.TELLER[0]):
        assert heads[layer].max() - heads[layer].min() < 0.01
        assert heads[layer].min() > 0.5
