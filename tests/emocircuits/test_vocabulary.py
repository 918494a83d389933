"""What neurons spell: against the dense matrix, in small pieces, and by sign."""

import planted
import pytest
import torch
from families_harness import BUILDERS
from scipy import stats

from emocircuits import embedded
from emocircuits.circuits import vocabulary
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.vocabulary import emotion_tokens, hits, least_hits, top_tokens, vocabulary_projection
from emocircuits.families import open_model

PARTS = {
    "GPT-2": ("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    None: ("model.layers", "mlp.down_proj", "model.norm"),
}


def dense(model, family, layer, fold):
    """Float64, from the weights of the unmodified model."""
    layers, down, norm = PARTS.get(family, PARTS[None])
    block = model.get_submodule(layers)[layer]
    weight = block.get_submodule(down).weight.detach()
    weight = weight.T if family == "GPT-2" else weight
    if family in ("Gemma 2", "OLMo2"):
        gain = block.post_feedforward_layernorm.weight.detach()
        weight = (gain + 1 if family == "Gemma 2" else gain)[:, None] * weight
    unembed = model.lm_head.weight.detach()
    gain = model.get_submodule(norm).weight.detach()
    if fold:
        unembed = unembed * (gain + 1 if family == "Gemma 2" else gain)
    return unembed @ weight


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "OLMo2", "Gemma 2"])
def test_projection_is_the_dense_matrix(family, monkeypatch):
    model, _ = BUILDERS[family](torch.float64)
    monkeypatch.setattr(vocabulary, "ELEMENTS", 7 * len(model.lm_head.weight))  # seven neurons at a time
    for fold in (True, False):
        for layer in (0, 2):
            expected = dense(model, family, layer, fold)
            found = vocabulary_projection(model, layer, fold_norm=fold)
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
            signs = torch.ones(expected.shape[1])
            signs[::3] = -1
            ids, logits = top_tokens(model, layer, signs, count=20, fold_norm=fold)
            best = (expected * signs).topk(20, dim=0)
            assert torch.equal(ids, best.indices.T)
            assert (logits - best.values.T).abs().max() < 1e-5 * expected.abs().max()
            some, _ = top_tokens(model, layer, signs[[4, 2]], neurons=[4, 2], count=20, fold_norm=fold)
            assert torch.equal(some, ids[[4, 2]])
    folded, plain = (dense(model, family, 1, fold) for fold in (True, False))
    assert (folded - plain).abs().max() > 0.01


def test_signs_are_one_for_each_neuron():
    model, _ = BUILDERS["Llama"](torch.float32)
    with pytest.raises(ValueError, match="one for each of 2 neurons"):
        top_tokens(model, 0, torch.ones(3), neurons=[1, 2])


def test_mixtures_of_experts_are_refused():
    model, _ = BUILDERS["Mixtral"](torch.float32)
    with pytest.raises(NotImplementedError, match="mixtures of experts"):
        vocabulary_projection(model, 0)
    assert open_model(model).norm_gain().shape == (32,)


def test_emotion_tokens_are_words_and_never_neutral():
    subject = planted.subject()
    ids = subject.tokenizer.get_vocab()
    expected = {ids[w] for e in planted.EMOTIONS for w in planted.WORDS[e]}
    assert set(emotion_tokens(subject.tokenizer, subject.lexicon).tolist()) == expected
    assert set(emotion_tokens(subject.tokenizer, subject.lexicon, "first").tolist()) == expected
    with pytest.raises(ValueError, match="no token of the tokenizer"):
        emotion_tokens(subject.tokenizer, Lexicon({"joy": ["blissful"]}, neutral=None))
    with pytest.raises(ValueError, match="expected 'words' or 'first'"):
        emotion_tokens(subject.tokenizer, subject.lexicon, "pieces")


def test_k_is_what_chance_does_not_reach():
    _, processor = embedded.load()
    emotional = len(emotion_tokens(processor.tokenizer, Lexicon.embedded()))
    k = least_hits(259, emotional, 20, 0.01)
    chance = stats.hypergeom(259, emotional, 20)
    assert chance.sf(k - 1) <= 0.01 < chance.sf(k - 2)
    assert hits(torch.tensor([[1, 2, 3], [4, 5, 6]]), [3, 4, 5]).tolist() == [1, 2]
