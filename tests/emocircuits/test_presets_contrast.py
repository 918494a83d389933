"""Contrastive decoding against branches that run one by one, one prompt at a time, in float64."""

import math

import models
import pytest
import torch

from emocircuits import Plan, ScaleHead, patch, presets
from emocircuits.presets import Contrast

STEPS = 4
SUPPRESS = [models.IMAGE, models.PAD]


@pytest.fixture(scope="module")
def model():
    return models.build("llava", "llama", torch.float64)


@pytest.fixture(scope="module")
def rows(model):
    """Two prompts of different lengths."""
    return [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)]


def instructed(model, rows):
    """The same images under another, longer instruction."""
    others = [models.prompt(model, 7, 5, seed=5), models.prompt(model, 6, 9, seed=6)]
    return [{**other, "pixel_values": row["pixel_values"]} for other, row in zip(others, rows, strict=True)]


def textual(rows):
    """The prompts without their images."""
    kept = [row["input_ids"][row["input_ids"] != models.IMAGE][None] for row in rows]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in kept]


def noised(rows, step, seed):
    """VCD's schedule, by a loop."""
    kept = 1.0
    for t in range(step + 1):
        x = -6 + 12 * t / 999
        kept *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(-x)) + 1e-5)
    pixels = torch.cat([row["pixel_values"] for row in rows])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).double()
    mixed = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise
    return [{**row, "pixel_values": mixed[i : i + 1]} for i, row in enumerate(rows)]


@torch.no_grad()
def separately(model, branches, weights, plausibility, choose):
    """Tokens ``[B, T]`` and combined scores ``[B, T, V]``: every branch of every sample runs alone, without a cache."""
    tokens = [[] for _ in branches[0]]
    scores = []
    for _ in range(STEPS):
        combined = []
        for i, sample in enumerate(zip(*branches, strict=True)):
            logits = []
            for inputs in sample:
                ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[i]], dtype=torch.long)], 1)
                all_inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                logits.append(model(**all_inputs, use_cache=False).logits[0, -1])
            first = logits[0]
            total = sum(w * logit for w, logit in zip(weights, logits, strict=True))  # logits, not log-probabilities
            total[first < math.log(plausibility) + first.max()] = -torch.inf
            combined.append(total)
        scores.append(torch.stack(combined))
        chosen = scores[-1].clone()
        chosen[:, SUPPRESS] = -torch.inf
        for i, token in enumerate(choose(chosen).tolist()):
            tokens[i].append(token)
    return torch.tensor(tokens), torch.stack(scores, 1)


def same_distribution(ours, theirs):
    """Scores agree up to the constant that log-probabilities and logits differ by (generate() keeps float32)."""
    theirs = theirs.clone()
    theirs[..., SUPPRESS] = -torch.inf
    ours, theirs = ours.double().softmax(-1), theirs.softmax(-1)
    assert (ours - theirs).abs().max() < 1e-5


def build(name, model, rows):
    """A contrast, its branches by hand, weights and plausibility."""
    inputs = models.batch(rows)
    if name == "vcd":
        built = presets.vcd(model, inputs, 0.8, 0.2, step=600, generator=torch.Generator().manual_seed(2))
        return built, [rows, noised(rows, 600, 2)], (1.8, -0.8), 0.2
    if name == "icd":
        others = instructed(model, rows)
        return presets.icd(model, inputs, models.batch(others), 1.0, 0.1), [rows, others], (2.0, -1.0), 0.1
    texts = textual(rows)
    return presets.pai_guidance(model, inputs, models.batch(texts), 1.5), [rows, texts], (1.5, -0.5), 0.1


@pytest.mark.parametrize("name", ["vcd", "icd", "pai_guidance"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_equals_separate_runs(model, rows, name, cache):
    contrast, branches, weights, plausibility = build(name, model, rows)
    tokens, scores = separately(model, branches, weights, plausibility, lambda s: s.argmax(-1))
    options = {"cache_implementation": "static"} if cache == "static" else {}
    out = contrast.generate(
        max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    prompt = models.batch(rows)["input_ids"]
    assert torch.equal(out.sequences, torch.cat([prompt, tokens], 1))
    same_distribution(torch.stack(out.scores, 1), scores)
    assert torch.equal(
        contrast.generate(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS), out.sequences
    )
    alone = model.generate(**models.batch(rows), max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS)
    assert not torch.equal(alone, out.sequences), "the contrast changed nothing: the test would not notice"


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_images_of_different_sizes(family):
    """Tiles of images are stacked across branches, and a branch may hold other images than the first."""
    model = models.build(family, "llama", torch.float64)
    rows = [models.prompt(model, 3, 5, [(16, 16)]), models.prompt(model, 1, 9, [(16, 32)], seed=1)]
    others = [
        models.prompt(model, 5, 5, [(16, 16), (32, 16)], between=2, seed=5),
        models.prompt(model, 2, 4, [], seed=6),
    ]
    weights = (1.4, -0.4)
    tokens, _ = separately(model, [rows, others], weights, 0.1, lambda s: s.argmax(-1))
    contrast = Contrast(model, [models.batch(rows), stacked(others)], weights)
    out = contrast.generate(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS)
    assert torch.equal(out[:, -STEPS:], tokens)


def stacked(rows):
    """A batch whose second prompt has no image."""
    text = {**rows[1], "pixel_values": rows[0]["pixel_values"][:0], "image_sizes": rows[0]["image_sizes"][:0]}
    return models.batch([rows[0], text])


def test_sampling_draws_one_token_a_sample(model, rows):
    contrast, branches, weights, plausibility = build("icd", model, rows)
    temperature, ours = 1.7, []
    for seed in range(5):
        theirs = torch.Generator().manual_seed(seed)
        tokens, _ = separately(
            model, branches, weights, plausibility,
            lambda s, g=theirs: torch.multinomial((s / temperature).float().softmax(-1), 1, generator=g)[:, 0],
        )  # fmt: skip
        out = contrast.generate(
            torch.Generator().manual_seed(seed), max_new_tokens=STEPS, do_sample=True, temperature=temperature, top_k=0,
            suppress_tokens=SUPPRESS,
        )  # fmt: skip
        assert torch.equal(out[:, -STEPS:], tokens)
        ours.append(out)
    assert any(not torch.equal(ours[0], other) for other in ours[1:])


def test_beams_and_several_answers(model, rows):
    """Branches stay on the same beams; with equal branches and weights that sum to one nothing is left but the mask."""
    inputs = models.batch(rows)
    options = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, num_beams=3, num_return_sequences=2)
    contrast = Contrast(model, [inputs, inputs], (3.0, -2.0), plausibility=0.0)
    assert torch.equal(contrast.generate(**options), model.generate(**inputs, **options))
    contrast = build("vcd", model, rows)[0]
    answers = contrast.generate(max_new_tokens=STEPS, do_sample=True, num_return_sequences=3, suppress_tokens=SUPPRESS)
    assert answers.shape == (6, inputs["input_ids"].shape[1] + STEPS)


def test_processors_see_the_first_branch(model, rows):
    """A repetition penalty reads the first branch's prompt, whatever the others hold."""
    inputs, others = models.batch(rows), models.batch(instructed(model, rows))
    options = dict(max_new_tokens=3 * STEPS, do_sample=False, suppress_tokens=SUPPRESS, repetition_penalty=5.0)
    contrast = Contrast(model, [inputs, others], (1.0, 0.0), plausibility=0.0)
    expected = Contrast(model, [inputs, inputs], (1.0, 0.0), plausibility=0.0).generate(**options)
    assert torch.equal(contrast.generate(**options), expected)


def test_with_a_plan(model, rows):
    """PAI whole: its attention in the first branch, guidance by a text branch that stays as it is."""
    contrast, branches, weights, plausibility = build("pai_guidance", model, rows)
    plan = presets.pai(model, 0.9, layers=(0, 1)) + Plan([ScaleHead([(2, 1)], by=3.0)])
    shifted = contrast.plan(plan)
    assert {edit.rows for edit in shifted} == {(0, 1)}
    assert {edit.rows for edit in contrast.plan(Plan(), Plan([ScaleHead([(2, 1)], by=3.0)]))} == {(2, 3)}
    with patch(model, shifted):
        ours = contrast.generate(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS)

    def alone(inputs, tokens):
        ids = inputs["input_ids"]
        steps = [model(**inputs, use_cache=True)]
        for token in tokens:
            step = model(input_ids=token[None, None], past_key_values=steps[-1].past_key_values, use_cache=True)
            steps.append(step)
        assert ids.shape[0] == 1
        return steps[-1].logits[0, -1]

    for i, sample in enumerate(zip(*branches, strict=True)):
        tokens = []
        for _ in range(STEPS):
            with torch.no_grad(), patch(model, plan):
                first = alone(sample[0], tokens)
            with torch.no_grad():
                second = alone(sample[1], tokens)
            total = weights[0] * first + weights[1] * second
            total[first < math.log(plausibility) + first.max()] = -torch.inf
            total[SUPPRESS] = -torch.inf
            tokens.append(total.argmax(-1))
        assert ours[i, -STEPS:].tolist() == [int(t) for t in tokens]


def test_beams_with_a_plan(model, rows):
    """Beams of a patched batch of branches are those of the same branches one batch at a time."""
    inputs = models.batch(rows)
    plan = presets.pai(model, 0.9, layers=(0, 1))
    options = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, num_beams=2)
    contrast = Contrast(model, [inputs, models.batch(instructed(model, rows))], (1.0, 0.0), plausibility=0.0)
    with patch(model, contrast.plan(plan)):
        ours = contrast.generate(**options)
    with patch(model, plan):
        assert torch.equal(ours, model.generate(**inputs, **options))
    assert not torch.equal(ours, model.generate(**inputs, **options))


def test_the_model_is_left_as_it_was(model, rows):
    before = set(model.__dict__)
    contrast = build("vcd", model, rows)[0]
    contrast.generate(max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        contrast.generate(max_length=50)
    with pytest.raises(ValueError, match="temperature"):
        contrast.generate(max_new_tokens=1, temperature=-1.0, do_sample=True)
    assert set(model.__dict__) == before


def test_branches_that_do_not_fit(model, rows):
    inputs = models.batch(rows)
    with pytest.raises(ValueError, match="2 branches and 1 weights"):
        Contrast(model, [inputs, inputs], [1.0])
    with pytest.raises(ValueError, match="branch 1 has 1 prompts"):
        Contrast(model, [inputs, rows[0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="padded on the right"):
        Contrast(model, [inputs, models.batch(rows, side="right")], [1.0, 1.0])
    with pytest.raises(TypeError, match="input_ids"):
        Contrast(model, [inputs, {"pixel_values": 3}], [1.0, 1.0])
    with pytest.raises(ValueError, match="plausibility"):
        Contrast(model, [inputs, inputs], [1.0, 1.0], plausibility=2.0)
    contrast = Contrast(model, [inputs, inputs], [1.0, 1.0])
    with pytest.raises(ValueError, match="already hold"):
        contrast.generate(**inputs)
    with pytest.raises(NotImplementedError, match="beams"):
        contrast.generate(num_beams=2, do_sample=True)
    with pytest.raises(ValueError, match="3 plans"):
        contrast.plan(Plan(), Plan(), Plan())
    with pytest.raises(ValueError, match="batch row 2"):
        contrast.plan(Plan([ScaleHead([(0, 0)], rows=[2])]))
    with pytest.raises(ValueError, match="pixel_values"):
        presets.vcd(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ValueError, match="0 to 999"):
        presets.vcd(model, inputs, step=1000)
