"""Batched greedy decoding from filled caches against ``model.generate``, one prompt at a time."""

from __future__ import annotations

import contextlib

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import torch

from emocircuits.families import open_model
from emocircuits.sweep.decoding import Prompt, decode, prepare

LIMIT, ROWS = 6, 3


@contextlib.contextmanager
def shifted(model, columns, row):
    """The model, some of whose residual stream is another one in every row: in the prompt's pass alone."""
    layer = open_model(model).layers[1]
    g = torch.Generator().manual_seed(row)

    def change(_, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] != columns:
            return None
        noise = torch.randn(x.shape[1:], generator=g).to(x)
        x = x + 2.0 * x.std() * noise
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handle = layer.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def expected(model, inputs, row, **options):
    """The tokens that a model gives after a prompt whose pass was changed, by its own generate."""
    columns = inputs["input_ids"].shape[1]
    with shifted(model, columns, row):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT, **options)
    return out[0, columns:].tolist()


def prefilled(model, prompt, rows=ROWS):
    """One cache of all rows, each read by the changed model."""
    keys, values, logits = [], [], []
    for row in range(rows):
        with shifted(model, prompt.ids.shape[1], row):
            cache, last = prompt.prefill()
        keys.append([layer.keys for layer in cache.layers])
        values.append([layer.values for layer in cache.layers])
        logits.append(last)
    whole, _ = prompt.prefill()
    for i, layer in enumerate(whole.layers):  # its lengths stay: a sliding layer counts what it has dropped
        layer.keys, layer.values = (torch.cat([r[i] for r in x]) for x in (keys, values))
    return whole, torch.cat(logits)


@pytest.mark.parametrize("name", harness.BUILDERS)
def test_every_family(name):
    """Rows continue one prompt, each with keys and values of its own, and end when they end."""
    model, _, make_inputs, _ = harness.built(name)
    inputs = make_inputs(1, "none")
    free = [expected(model, inputs, row) for row in range(ROWS)]
    assert len({tuple(f) for f in free}) == ROWS
    stop = [free[0][1], free[1][3]]
    found = decode(prompt := prepare(model, inputs, limit=LIMIT, stop=stop), *prefilled(model, prompt))
    ends = [next((i for i, t in enumerate(f) if t in stop), LIMIT - 1) + 1 for f in free]
    assert [f.tolist() for f in found] == [f[:end] for f, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 1

    padded = make_inputs(2, "left")
    out = model.generate(**padded, do_sample=False, max_new_tokens=3)
    found = decode(prompt := prepare(model, padded, limit=3), *prompt.prefill())
    assert [f.tolist() for f in found] == out[:, padded["input_ids"].shape[1] :].tolist()


def text(name="Llama", **config):
    model, make_inputs = harness.BUILDERS[name](torch.float64)
    for key, value in config.items():
        setattr(model.generation_config, key, value)
    return model, make_inputs(1, "none")


def test_the_caller_hears_who_is_left():
    model, inputs = text()
    free = [expected(model, inputs, row) for row in range(ROWS)]
    prompt = prepare(model, inputs, limit=LIMIT, stop=[free[0][1], free[2][3]])
    heard = []
    found = decode(prompt, *prefilled(model, prompt), keep=lambda rows: heard.append(rows.tolist()))
    lengths = [len(f) for f in found]
    alive = [[r for r in range(ROWS) if lengths[r] > n] for n in sorted(set(lengths))]
    assert heard == [a for a in alive if a]
    assert len(heard) >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 4, "eos_token_id": list(range(8, 40))},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [11, 12, 13, 14, 15]},
        {"bad_words_ids": [[n] for n in range(20, 40)]},
        {"num_beams": 3, "do_sample": True, "temperature": 0.5},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_generation_config_asks_for(options):
    model, inputs = text()
    plain = [expected(model, inputs, row) for row in range(ROWS)]
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    found = decode(prompt := prepare(model, inputs, limit=LIMIT), *prefilled(model, prompt))
    theirs = [expected(model, inputs, row, num_beams=1) for row in range(ROWS)]
    assert [f.tolist() for f in found] == theirs
    greedy = "num_beams" in options or "cache_implementation" in options
    assert (theirs == plain) == greedy


class Letters:
    """A tokenizer of one letter a token, as far as stop strings ask."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def get_vocab(self):
        return {chr(0x30 + i): i for i in range(self.size)}

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) - 0x30 for c in text]}

    def _convert_id_to_token(self, i):
        return chr(0x30 + i)


def test_stop_strings():
    model, inputs = text()
    free = expected(model, inputs, 0)
    word = "".join(chr(0x30 + t) for t in free[1:3])
    letters = Letters(harness.VOCAB)
    found = decode(
        prompt := prepare(model, inputs, limit=LIMIT, stop=word, tokenizer=letters), *prefilled(model, prompt)
    )
    theirs = [expected(model, inputs, row, stop_strings=[word], tokenizer=letters) for row in range(ROWS)]
    assert [f.tolist() for f in found] == theirs
    assert len(theirs[0]) == 3


def test_the_prompt_is_not_used_up():
    model, inputs = text("Mistral")
    prompt = prepare(model, inputs, limit=LIMIT)
    first = decode(prompt, *prompt.prefill())
    assert isinstance(prompt, Prompt)
    assert prompt.cache().get_seq_length() == 0
    assert torch.equal(decode(prompt, *prompt.prefill())[0], first[0])


@pytest.mark.parametrize(
    ("config", "options", "error", "says"),
    [
        ({}, {"limit": 0}, ValueError, "limit is 0"),
        ({}, {"limit": 600}, ValueError, "beyond the model's 512 positions"),
        ({}, {"stop": "end"}, ValueError, "tokenizer="),
        ({}, {"stop": []}, ValueError, "expected token ids, or strings"),
        ({}, {"stop": [3, "end"]}, ValueError, "expected token ids, or strings"),
        ({"max_time": 5.0}, {}, NotImplementedError, "MaxTimeCriteria"),
        ({"guidance_scale": 2.0}, {}, NotImplementedError, "UnbatchedClassifierFreeGuidance"),
        ({"prompt_lookup_num_tokens": 3}, {}, NotImplementedError, "only greedy decoding"),
    ],
)
def test_refusals(config, options, error, says):
    model, inputs = text(**config)
    with pytest.raises(error, match=says):
        prepare(model, inputs, **{"limit": LIMIT, **options})


def test_no_generate_and_other_caches():
    model, inputs = text()
    with pytest.raises(NotImplementedError, match="no generate"):
        prepare(model.model, inputs, limit=2)
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="Linear"):
        prepare(transformers.Qwen3NextForCausalLM(config).eval(), inputs, limit=2)
