"""Events, prompts, answers, tokenizer."""

import re

import numpy as np
import pytest

from emocircuits.embedded import LABELS, data, faces, language
from emocircuits.embedded.model import IMAGE_TOKENS, build_processor, build_tokenizer

PRONOUNS = {
    *("you", "your", "yours", "yourself", "he", "him", "his", "himself", "she", "her", "hers", "herself"),
    *("it", "its", "itself", "they", "them", "their", "theirs", "themselves"),
}
RNG = np.random.default_rng(0)
EVENTS = [language.make_event(c, RNG) for label in LABELS for c in language.CLAUSES[label] for _ in range(3)]


def test_events_obey_the_rules():
    emotional = set.union(*language.LEXICON.values())
    for event in EVENTS:
        words = re.findall(r"[a-z]+", event)
        assert len(words) > 5, event
        assert not PRONOUNS & set(words), event
        assert not emotional & set(words), event
        assert language.emotions_in(event) == []


def test_groups_are_disjoint_and_equally_large():
    clauses = [c for label in LABELS for c in language.CLAUSES[label]]
    assert len(set(clauses)) == len(clauses)
    assert len({len(language.CLAUSES[label]) for label in LABELS}) == 1


def test_lexicon_words_belong_to_one_label_and_to_no_cue():
    words = [w for label in LABELS for w in language.LEXICON[label]]
    assert len(set(words)) == len(words)
    assert not any(language.emotions_in(c) for label in LABELS for c in language.CUES[label])


def test_tokenizer_knows_every_word_and_round_trips():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(1)
    for seed in range(60):
        who = faces.identity_of(seed)
        for label in LABELS:
            clause = language.CLAUSES[label][seed % 6]
            answer = language.answer(label, 0.5, clause, language.describe(who, rng), rng)
            for text in (answer, language.make_event(clause, rng)):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids, text
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert language.first_emotion(answer) == label
            assert set(language.emotions_in(answer)) == {label}


def test_processor_expands_the_image():
    processor = build_processor()
    text = language.prompt(EVENTS[0])
    inputs = processor(images=faces.face(0, "sad", 1.0), text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == IMAGE_TOKENS == 64
    assert inputs["pixel_values"].shape == (1, 3, faces.SIZE, faces.SIZE)
    content = [{"type": "image"}, {"type": "text", "text": EVENTS[0]}]
    assert processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) == text


def test_reading_answers():
    assert language.emotions_in("I feel Joyful because it rains. sorrow.") == ["happy", "sad"]
    assert language.first_emotion("the report is ready.") is None
    assert language.hit("i feel mad", "angry")
    assert not language.hit("i feel mad", "happy")
    with pytest.raises(ValueError, match="unknown label 'joy'"):
        language.hit("i feel mad", "joy")
    with pytest.raises(ValueError, match="event is empty"):
        language.prompt(" ")


def test_training_text_ties_weak_faces_to_their_event():
    rng = np.random.default_rng(0)

    def share(label, t):
        return np.mean([data.draw_event_group(label, t, rng) == label for _ in range(2000)])

    assert share("happy", 0.2) > share("happy", 1.0) + 0.3
    assert share("neutral", 0.0) < 0.2


def test_training_never_reaches_held_out_identities():
    with pytest.raises(ValueError, match="held-out"):
        data.draw_faces(2, 1, first=data.HELD_OUT - 1)


def test_conversations_of_one_image_do_not_see_each_other():
    drawn = data.draw_faces(2, 1)
    tokenizer = build_tokenizer()
    batch = data.Conversations(drawn, tokenizer, 3).batch([0, 8], np.random.default_rng(0))
    see = batch.attention_mask[:, 0] == 0
    starts = batch.position_ids == batch.position_ids[:, :1] + len(tokenizer("USER:")["input_ids"]) + IMAGE_TOKENS
    row = int(starts[0].nonzero()[1])  # first token of the second conversation
    assert see[0, row, : IMAGE_TOKENS + 3].all()
    assert not see[0, row, IMAGE_TOKENS + 3 : row].any()
    assert see[0, row, row]
    assert not see[0, row, row + 1 :].any()
    assert batch.emotional.any(1).all()
