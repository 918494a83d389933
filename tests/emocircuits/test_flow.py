"""Information flow: against autograd through Hugging Face's eager attention in float64, and on the planted circuit."""

import types

import families_harness as harness
import families_vision_models as tiny
import numpy as np
import planted
import pytest
import torch
from circuit_pairs import face_pairs, planted_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from emocircuits.circuits.answers import forced, own_answers, read
from emocircuits.circuits.flow import FILE, TENSORS, Flow, information_flow, route_flow
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.pairs import SIDES
from emocircuits.circuits.subject import Subject
from emocircuits.families import open_model
from emocircuits.roles import prompt_roles
from emokernels import Role

R = len(Role)
BUILDERS = {
    "llama": harness.BUILDERS["LLaVA 1.5"],
    "qwen2": tiny.vision("Llava", tiny.CLIP_TOWER, tiny.square(), "Qwen2Config", vision_feature_layer=-1, **tiny.INDEX),
    "qwen2-vl": harness.BUILDERS["Qwen2-VL"],
    "gemma3": harness.BUILDERS["Gemma 3 (vision)"],
}


@pytest.fixture
def exact_eager(monkeypatch):
    """Eager attention takes its softmax in float32, whatever the model's dtype."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))


def blocks(model, inputs, roles, targets):
    """Saliency and weights ``[B, L, R, R]`` and the loss ``[B]``, from whole matrices of weights."""
    model.set_attn_implementation("eager")
    out = model(**inputs, use_cache=False, output_attentions=True)
    counts = targets >= 0
    each = torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), targets.clamp_min(0), reduction="none")
    loss = (each * counts).sum(1) / counts.sum(1)
    gradients = torch.autograd.grad(loss.sum(), out.attentions)
    found = []
    for tables in ([(a * g).abs() for a, g in zip(out.attentions, gradients, strict=True)], out.attentions):
        kinds = torch.stack([roles == r for r in range(R)], 1).double()
        found.append(torch.stack([torch.einsum("bin,bhnk,bjk->bij", kinds, t, kinds) / t.shape[1] for t in tables], 1))
    model.set_attn_implementation("sdpa")
    return found[0].detach(), found[1].detach(), loss.detach()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", BUILDERS)
def test_saliency_is_that_of_autograd(name, padding, exact_eager):
    model, make_inputs = BUILDERS[name](torch.float64)
    inputs = make_inputs(3, padding)
    roles = prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), open_model(model).placeholder_ids())
    roles[:, -2:] = int(Role.GENERATED)
    roles[:, -3] = int(Role.LAST)
    targets = torch.full_like(inputs["input_ids"], -1)
    targets[:, -3:] = torch.tensor([[9, 10, 11], [12, -1, 13], [-1, 14, -1]])
    found = route_flow(model, inputs, roles, targets)
    assert all(p.requires_grad for p in model.parameters())
    saliency, weights, loss = blocks(model, inputs, roles, targets)
    assert (found.loss - loss).abs().max() < 1e-12
    assert found.agree.max() < 1  # the targets are no answers
    text = slice(int(Role.SYSTEM), None)  # what padding attends to means nothing
    for ours, theirs in ((found.saliency, saliency), (found.weights, weights)):
        assert (ours - theirs)[:, :, text].abs().max() < 1e-10 * theirs.abs().max()
    assert saliency[:, :, text, text].max() > 1e-4
    kinds, (b, n) = roles.tolist(), roles.shape
    if name != "gemma3":  # whose images see both ways
        for row in range(b):
            for to in range(1, R):
                for source in range(1, R):
                    pairs = sum(kinds[row][i] == to and kinds[row][j] == source for i in range(n) for j in range(i + 1))
                    assert (found.pairs[row, :, to, source] == pairs).all()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze")


@pytest.fixture(scope="module")
def found(pairs):
    return information_flow(planted.subject(), pairs, batch=5, progress=False)


def test_flow_follows_the_planted_heads(found, pairs):
    assert set(found.said[0]) == {"glad", "gloomy", "furious", "scared"}
    assert set(found.said[1]) == {"calm"}
    assert found.settings["forced_tokens_likeliest"] == 1.0
    for to, source, (layer, _) in (("query", "visual", planted.READER), ("last", "query", planted.TELLER)):
        here, other = found.of(to, source), found.of(to, source, "neutral")
        assert (here.argmax(1) == layer).all()
        rest = np.delete(here, layer, axis=1)
        assert (here[:, layer] > 50 * rest.max(1)).all()
        assert (here[:, layer] > 50 * other[:, layer]).all()
        record = next(r for r in found.summary() if (r["to"], r["source"]) == (to, source))
        told = record["saliency"]
        assert told["difference"]["q"][layer] < 0.01
        assert told["emotional"]["mean"][layer] == pytest.approx(here[:, layer].mean())
        assert told["emotional"]["low"][layer] <= here[:, layer].mean() <= told["emotional"]["high"][layer]
        assert record["n"] == len(pairs)
    # A row's weights on all its sources are one.
    total = found.mass[..., [i for i, r in enumerate(found.routes) if r[0] == "last"]].sum(-1)
    assert np.abs(total - 1).max() < 1e-5


def test_nothing_flows_differently_in_a_model_without_a_circuit(pairs):
    blind = information_flow(planted.subject("blind"), pairs, progress=False)
    assert np.abs(blind.saliency[0] - blind.saliency[1]).max() < 1e-3 * blind.saliency.max()
    assert all(q == 1.0 for r in blind.summary() for q in r["saliency"]["difference"]["q"])


def test_batches_and_padding_do_not_matter(found, pairs):
    single = information_flow(planted.subject(), pairs.take([2, 7]), batch=1, progress=False)
    for name in ("saliency", "mass", "loss"):
        ours = getattr(single, name)
        assert np.allclose(ours, getattr(found, name)[:, [2, 7]], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(found, pairs, dtype):
    half = information_flow(planted.subject(dtype=dtype), pairs.take([0, 9]), progress=False)
    for route, (layer, _) in ((("query", "visual"), planted.READER), (("last", "query"), planted.TELLER)):
        ours, theirs = half.of(*route), found.of(*route)[[0, 9]]
        assert np.allclose(ours[:, layer], theirs[:, layer], rtol=0.15)


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    again = Flow.load(tmp_path)
    for name in ("saliency", "mass", "loss"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    for name in ("routes", "said", "ids", "emotions", "left_out", "settings"):
        assert getattr(again, name) == getattr(found, name)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        Flow.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not information flow"):
        Flow.load(tmp_path)


def test_answers_without_an_emotion_word(pairs):
    subject = planted.subject()
    lexicon = Lexicon({e: w for e, w in planted.WORDS.items() if e != "sad"})
    few = type(subject)(subject.model, subject.processor, subject.prompt, lexicon, limit=4)
    with pytest.raises(
        ValueError, match=r"4 of 32 answers name no emotion .*: sad-0, emotional side: 'gloomy'; .*\.\.\."
    ):
        information_flow(few, pairs, progress=False)
    rest = information_flow(few, pairs, wordless="leave out", progress=False)
    assert {x.id for x in rest.left_out} == {f"sad-{i}" for i in range(4)}
    assert len(rest.ids) == 12
    with pytest.raises(ValueError, match="4 of 8 answers"):
        information_flow(few, pairs.take([4, 5, 6, 7]), wordless="leave out", progress=False)
    for wrong in ({"loss": "words"}, {"wordless": "skip"}):
        with pytest.raises(ValueError, match="expected '"):
            information_flow(subject, pairs, progress=False, **wrong)


def test_where_the_words_of_an_answer_are():
    subject = planted.subject()
    ids = subject.tokenizer("the bus is glad and gloomy", add_special_tokens=False)["input_ids"]
    answer = read(subject, ids)
    assert [(w.text, w.emotion, w.start, w.stop) for w in answer.words] == [
        ("glad", "happy", 3, 4),
        ("gloomy", "sad", 5, 6),
    ]
    assert answer.text.startswith("the bus is glad")


def test_a_forced_answer_is_what_the_model_says(pairs):
    subject = planted.subject()
    part = pairs.take([0, 1, 2, 5])  # events of different length
    answers = own_answers(subject, part, "emotional")
    assert [a.text for a in answers] == subject.generate(part.emotional, part.events)
    tails = [[*a.ids, 7, 8][: 1 + i % 3] for i, a in enumerate(answers)]
    inputs, roles = forced(subject, part.inputs(subject, "emotional"), tails)
    for b, tail in enumerate(tails):
        assert inputs["input_ids"][b, -len(tail) :].tolist() == tail
        assert (roles[b, -len(tail) :] == int(Role.GENERATED)).all()
        assert roles[b, -len(tail) - 1] == int(Role.LAST)
        with torch.no_grad():
            logits = subject.model(**inputs).logits
            alone = subject.model(**part.take([b]).inputs(subject, "emotional")).logits
        assert torch.allclose(logits[b, -len(tail) - 1], alone[0, -1], atol=1e-4)
    assert (inputs["attention_mask"].bool() == (roles != int(Role.PAD))).all()


class Stub:
    """What `forced` needs of a subject, for models that have no processor here."""

    def __init__(self, model):
        self.handle = open_model(model)
        self.tokenizer = types.SimpleNamespace(pad_token_id=harness.PAD)

    def roles(self, inputs):
        return prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), self.handle.placeholder_ids())


@pytest.mark.parametrize("name", ["LLaVA 1.5", "Qwen2-VL", "Qwen3-VL", "Gemma 3 (vision)", "InternVL", "Idefics3"])
def test_forcing_is_generating_in_every_family(name):
    """Token types, three-dimensional positions, features between layers; rows of different length, padded anew."""
    model, make_inputs = harness.BUILDERS[name](torch.float64)
    inputs = make_inputs(3, "left")
    tokens, logits = harness.generate(model, inputs)
    longer, roles = forced(Stub(model), inputs, [row[:2].tolist() for row in tokens])
    assert (roles[:, -2:] == int(Role.GENERATED)).all()
    with torch.no_grad():
        again = model(**longer).logits[:, -3:]
    assert (again - logits).abs().max() < 1e-5 * logits.abs().max()
    shorter, _ = forced(Stub(model), inputs, [[], tokens[1, :1].tolist(), tokens[2, :2].tolist()])
    with torch.no_grad():
        again = model(**shorter).logits[:, -1]
    assert (again - logits[[0, 1, 2], [0, 1, 2]]).abs().max() < 1e-5 * logits.abs().max()


def test_words_of_several_tokens_are_found_whole():
    text = "i feel heartbroken , not happy . she is Delighted! we are sad about it"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["she is heart", "we feel broken", "i feel sad"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    subject = types.SimpleNamespace(tokenizer=fast, lexicon=Lexicon.english())
    ids = fast(text)["input_ids"]
    words = read(subject, ids).words
    assert [(w.text, w.emotion) for w in words] == [("heartbroken", "sad"), ("Delighted", "happy"), ("sad", "sad")]
    assert [fast.decode(ids[w.start : w.stop]).strip() for w in words] == ["heartbroken", "Delighted", "sad"]
    assert words[0].stop - words[0].start > 2


@pytest.mark.parametrize("loss", ["emotion words", "answer"])
def test_flow_of_whole_sentences_is_that_of_autograd(tmp_path, loss, exact_eager):
    """The embedded model, whose emotion word is not its first, one prompt at a time and without padding."""
    subject = Subject.embedded()
    subject.model.double()
    pairs = face_pairs(tmp_path, [101_000], emotions=("sad", "happy"))
    found = information_flow(subject, pairs, loss=loss, batch=1, progress=False)
    causal = [(a, b) for a in range(1, R) for b in range(1, R)]
    for s, side in enumerate(SIDES):
        for i in range(2):
            one = pairs.take([i])
            inputs = one.inputs(subject, side)
            text = subject.generate(one.images(side), one.events)[0]
            assert found.said[s][i] == text
            ids = subject.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            assert subject.tokenizer.decode(ids).strip() == text
            word = [n for n, t in enumerate(ids) if subject.lexicon.found(subject.tokenizer.decode([t]))]
            counted = word if loss == "emotion words" else list(range(len(ids)))
            tail = torch.tensor([ids[: counted[-1]]])
            roles = torch.cat([subject.roles(inputs), torch.full_like(tail, int(Role.GENERATED))], 1)
            last = inputs["input_ids"].shape[1] - 1
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            targets = torch.full_like(inputs["input_ids"], -1)
            for k in counted:
                targets[0, last + k] = ids[k]
            saliency, weights, nats = blocks(subject.model, inputs, roles, targets)
            assert found.loss[s, i] == pytest.approx(float(nats))
            kinds = roles[0].tolist()
            for to, source in causal:
                pairs_of = sum(kinds[a] == to and kinds[b] == source for a in range(len(kinds)) for b in range(a + 1))
                if pairs_of:
                    at = found.routes.index((Role(to).name.lower(), Role(source).name.lower()))
                    expected = saliency[0, :, to, source].numpy() / pairs_of
                    assert np.allclose(found.saliency[s, i, :, at], expected, rtol=1e-8, atol=1e-15)
                    expected = weights[0, :, to, source].numpy() / kinds.count(to)
                    assert np.allclose(found.mass[s, i, :, at], expected, rtol=1e-8)
