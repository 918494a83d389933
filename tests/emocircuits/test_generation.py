"""Every way of generating with a patched model, against the same algorithm on a model patched by the oracle's hooks."""

import contextlib
import copy

import models
import oracle
import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from emocircuits import AddVector, BoostRoute, Plan, ReplaceHead, ScaleHead, ScaleNeurons, patch

STEPS = 4
SUPPRESS = [models.IMAGE, 6, models.PAD]
OPTIONS = dict(max_new_tokens=STEPS, suppress_tokens=SUPPRESS)


@pytest.fixture(scope="module")
def model():
    return models.build("llava", dtype=torch.float64)


def rows(model):
    return [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)]


def plan(columns, times=1):
    """Edits of both phases: for all rows, for one row, and with a value for each row and prompt column.

    ``times``: written out by hand for a batch in which so many rows stand for each prompt.
    """
    value = torch.randn(2, columns, 1, 8, generator=torch.Generator().manual_seed(3))
    first, second = ([r * times + i for i in range(times)] for r in (0, 1))
    return Plan(
        [
            BoostRoute([(0, 1), (1, 2)], to=["query", "generated"], source="visual", by=2.0),
            BoostRoute([(1, 0)], to="generated", source=["visual", "query"], by=0.4, reading="logit-add", rows=first),
            ScaleNeurons({0: [3, 7], 2: [11]}, by=2.5, rows=second),
            ScaleHead([(2, 1)], by=-1.5, to="generated", rows=first),
            ReplaceHead([(2, 3)], value.repeat_interleave(times, 0), to=["query", "last"]),
            AddVector([1], torch.linspace(-1, 1, 32), by=0.4, to=["last", "generated"], rows=second),
        ]
    )


def by_hooks(model, inputs, edits, times=1, **options):
    """generate() on the unpatched model, without a cache, under the oracle's hooks."""
    roles = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {models.IMAGE})
    roles = [list(row) for row in roles for _ in range(times)]
    prompt = len(roles[0])

    def lengthen(module, args, kwargs):
        for row in roles:
            row[prompt:] = ["generated"] * (kwargs["input_ids"].shape[1] - prompt)

    hook = model.model.register_forward_pre_hook(lengthen, with_kwargs=True)
    try:
        with oracle.installed(model, edits, roles):
            return model.generate(**inputs, **{**OPTIONS, **options}, use_cache=False)
    finally:
        hook.remove()


WAYS = {
    "greedy": ({}, 1),
    "sampling": (dict(do_sample=True, temperature=1.5, top_k=0), 1),
    "several samples": (dict(do_sample=True, num_return_sequences=3, top_k=0), 3),
    "beams": (dict(num_beams=3), 3),
    "several beams": (dict(num_beams=3, num_return_sequences=2, length_penalty=0.3), 3),
    "sampled beams": (dict(num_beams=2, do_sample=True, temperature=1.3, top_k=0), 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_equals_the_same_algorithm_under_hooks(model, way, cache):
    """Rows of the plan, of its values and of its roles expand with the batch."""
    options, times = WAYS[way]
    options = {"do_sample": False, **options}
    inputs = models.batch(rows(model))
    columns = inputs["input_ids"].shape[1]
    torch.manual_seed(5)
    expected = by_hooks(model, inputs, plan(columns, times), times, **options)
    static = {"cache_implementation": "static"} if cache == "static" else {}
    with patch(model, plan(columns)):
        torch.manual_seed(5)
        got = model.generate(**inputs, **OPTIONS, **options, **static)
        # The next generation starts from rows of its own.
        alone = model.generate(**inputs, **OPTIONS, do_sample=False)
    assert torch.equal(got, expected)
    torch.manual_seed(5)
    assert not torch.equal(model.generate(**inputs, **OPTIONS, **options), expected), "the plan changed nothing"
    if way == "beams" and cache == "dynamic":
        assert torch.equal(alone, by_hooks(model, inputs, plan(columns), do_sample=False))


def test_beams_by_the_config_and_in_a_sliding_cache():
    model = models.build("llava", "mistral", torch.float64, sliding_window=12)
    inputs = models.batch(rows(model))
    columns = inputs["input_ids"].shape[1]
    config = GenerationConfig(num_beams=2, **OPTIONS, pad_token_id=models.PAD)
    with patch(model, plan(columns)):
        got = model.generate(**inputs, generation_config=config)
    assert torch.equal(got, by_hooks(model, inputs, plan(columns, 2), 2, num_beams=2))


def test_given_roles_expand_with_the_batch(model):
    inputs = models.batch(rows(model))
    names = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {models.IMAGE})
    roles = torch.tensor([[oracle.NAMES.index(n) for n in row] for row in names], dtype=torch.uint8)
    edits = plan(roles.shape[1])
    with patch(model, edits):
        expected = model.generate(**inputs, **OPTIONS, num_beams=2)
    with patch(model, edits, roles=roles):
        assert torch.equal(model.generate(**inputs, **OPTIONS, num_beams=2), expected)


# -- chats -----------------------------------------------------------------------------------------------------------
CHAT = Plan(
    [
        BoostRoute([(0, 1), (2, 3)], to="query", source="visual", by=2.0),
        BoostRoute([(1, 0)], to=["generated", "last"], source=["generated", "last"], by=3.0, reading="logit-add"),
        ScaleHead([(1, 2)], by=-1.0, to="generated"),
        ScaleNeurons({1: [4, 9]}, by=2.0, to="query"),
        AddVector([0], torch.linspace(-1, 1, 32), by=0.5, to="last"),
    ]
)


def logits_of(model):
    """Collects the logits that generate() picks tokens from."""

    @contextlib.contextmanager
    def collecting():
        steps = []
        hook = model.lm_head.register_forward_hook(lambda m, a, out: steps.append(out[:, -1]))
        yield steps
        hook.remove()

    return collecting()


def talk(model, turns, cache, edits=CHAT, full=True):
    """A chat turn by turn on one cache: the ids of the whole, their roles by name, and the logits of each turn.

    ``full``: every turn gives the ids of the chat so far, as a chat template does; else only those that are new.
    """
    ids, names, logits = torch.zeros(1, 0, dtype=torch.long), [], []
    for new in turns:
        row = new["input_ids"][0].tolist()
        turn = oracle.roles_of(new["input_ids"], new["attention_mask"], {models.IMAGE})[0]
        names += ["query" if name == "system" and names else name for name in turn]
        past = 0 if not ids.shape[1] else cache.get_seq_length()
        ids = torch.cat([ids, torch.tensor([row])], 1)
        given = ids if full else ids[:, past:]
        pictures = {k: v for k, v in new.items() if k == "pixel_values"}
        mask = torch.ones(1, ids.shape[1], dtype=torch.long)
        with logits_of(model) as steps:
            out = model.generate(
                input_ids=given, attention_mask=mask, past_key_values=cache, do_sample=False, **pictures, **OPTIONS
            )
        logits.append(torch.cat(steps))
        said = out[:, given.shape[1] :]
        ids = torch.cat([ids, said], 1)
        names += ["generated"] * said.shape[1]
    return ids, names, logits


def whole(model, ids, names, turns, edits=CHAT):
    """Logits of the chat as one sequence under the oracle's hooks."""
    pictures = [t["pixel_values"] for t in turns if "pixel_values" in t]
    with torch.no_grad(), oracle.installed(model, edits, [names]):
        return model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.cat(pictures), use_cache=False
        ).logits[0]


def caches(model):
    return {
        "dynamic": DynamicCache(config=model.config.get_text_config()),
        "static": StaticCache(config=model.config.get_text_config(), max_cache_len=96),
    }


def turns_of(model):
    return [models.prompt(model, 3, 5), models.prompt(model, 0, 6, [], seed=1), models.prompt(model, 2, 3, seed=2)]


def agree(model, turns, ids, names, logits, edits=CHAT):
    expected = whole(model, ids, names, turns, edits)
    at = 0
    for new, found in zip(turns, logits, strict=True):
        at += new["input_ids"].shape[1]
        torch.testing.assert_close(found, expected[at - 1 : at - 1 + STEPS], rtol=1e-9, atol=1e-9)
        at += STEPS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("full", [True, False])
def test_a_chat_keeps_the_roles_of_its_first_turns(model, cache, full):
    """The new turn is QUERY, VISUAL and LAST; every answer stays GENERATED, also the token that no step has run."""
    turns = turns_of(model)
    with patch(model, CHAT):
        talked = talk(model, turns, caches(model)[cache], full=full)
    agree(model, turns, *talked)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chats_that_take_turns_and_a_chat_under_two_plans(model, cache):
    turns = turns_of(model)
    other = [models.prompt(model, 0, 2, seed=7)]
    with patch(model, CHAT):
        expected = talk(model, turns, caches(model)[cache])

    held = caches(model)[cache]
    original = model.generate
    with patch(model, CHAT):
        inner = model.generate

        def interrupted(**kwargs):
            if kwargs["past_key_values"] is held:
                talk_once(inner, other[0], caches(model)[cache])
            return inner(**kwargs)

        model.__dict__["generate"] = interrupted
        try:
            got = talk(model, turns, held)
        finally:
            model.__dict__["generate"] = inner
    assert model.generate == original
    assert torch.equal(got[0], expected[0])
    # The logits of the other chat are between its own.
    agree(model, turns, got[0], got[1], [steps[-STEPS:] for steps in got[2]])


def talk_once(generate, new, cache):
    return generate(**new, past_key_values=cache, do_sample=False, **OPTIONS)


def test_a_chat_is_left_and_taken_up_under_another_plan(model):
    turns = turns_of(model)
    cache = DynamicCache(config=model.config.get_text_config())
    with patch(model, CHAT):
        first = talk_once(model.generate, turns[0], cache)
    ids = torch.cat([first, turns[1]["input_ids"]], 1)
    second = Plan([BoostRoute([(0, 1)], to=["query", "generated"], source="visual", by=0.0)])
    kept = copy.deepcopy(cache)
    with patch(model, CHAT) as patched:
        patched.replace(second)
        one = model.generate(input_ids=ids, past_key_values=cache, do_sample=False, **OPTIONS)
    with patch(model, second):
        two = model.generate(input_ids=ids, past_key_values=kept, do_sample=False, **OPTIONS)
    assert torch.equal(one, two)
    with patch(model, Plan()):
        unpatched = model.generate(**turns[0], past_key_values=DynamicCache(), do_sample=False, **OPTIONS)
    assert not torch.equal(first, unpatched)


def test_a_copied_and_a_cropped_cache_carry_their_roles(model):
    """A prefix is run once and continued twice; columns that were cropped leave no role behind."""
    turns = turns_of(model)
    head, tail = turns[0]["input_ids"], [turns[1]["input_ids"][:, :2], turns[1]["input_ids"][:, 2:]]
    n = head.shape[1]
    with patch(model, CHAT), torch.no_grad():
        start = model(**turns[0], use_cache=True).past_key_values
        copies = [copy.deepcopy(start) for _ in tail]
        found = []
        for new, cache in zip(tail, copies, strict=True):
            mask = torch.ones(1, n + new.shape[1], dtype=torch.long)
            out = model(input_ids=new, attention_mask=mask, past_key_values=cache)
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append((new, step, out.logits, model(input_ids=step, past_key_values=cache).logits))
        start.crop(-4)
        out = model(input_ids=tail[0], past_key_values=start).logits
        after = model(input_ids=torch.tensor([[9]]), past_key_values=start).logits
    names = oracle.roles_of(head, torch.ones_like(head), {models.IMAGE})[0]
    for new, step, logits, more in found:
        roles = [*names, *["query"] * (new.shape[1] - 1), "last", "generated"]
        expected = whole(model, torch.cat([head, new, step], 1), roles, turns[:1])[n:]
        torch.testing.assert_close(torch.cat([logits, more], 1)[0], expected, rtol=1e-9, atol=1e-9)
    roles = [*names[:-4], "query", "last", "generated"]
    ids = torch.cat([head[:, :-4], tail[0], torch.tensor([[9]])], 1)
    expected = whole(model, ids, roles, turns[:1])[n - 4 :]
    torch.testing.assert_close(torch.cat([out, after], 1)[0], expected, rtol=1e-9, atol=1e-9)


def test_a_left_padded_batch_of_chats(model):
    """The second turns differ in length: their padding stands inside the sequence."""
    first = models.batch(rows(model))
    second = models.batch([models.prompt(model, 0, 6, [], seed=4), models.prompt(model, 0, 3, [], seed=5)])
    with patch(model, CHAT):
        cache = DynamicCache(config=model.config.get_text_config())
        said = model.generate(**first, past_key_values=cache, do_sample=False, **OPTIONS)
        mask = torch.cat([first["attention_mask"], torch.ones(2, STEPS, dtype=torch.long), second["attention_mask"]], 1)
        ids = torch.cat([said, second["input_ids"]], 1)
        together = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, do_sample=False, **OPTIONS)
        for i in range(2):
            cache = DynamicCache(config=model.config.get_text_config())
            own = rows(model)[i]
            alone = model.generate(**own, past_key_values=cache, do_sample=False, **OPTIONS)
            new = second["input_ids"][i : i + 1][:, second["attention_mask"][i].bool()]
            alone = model.generate(
                input_ids=torch.cat([alone, new], 1), past_key_values=cache, do_sample=False, **OPTIONS
            )
            assert torch.equal(alone[0, -STEPS:], together[i, -STEPS:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_of_one_token_on_a_fresh_cache_is_a_prompt(kind):
    model = models.build("text", dtype=torch.float64)
    edits = Plan([ScaleHead([(0, 1)], by=0.0, to="last"), ScaleNeurons({1: [3]}, by=4.0, to="generated")])

    def fresh():
        return caches(model)[kind]

    one = dict(input_ids=torch.tensor([[9]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    expected = oracle.logits(model, one, edits)
    with patch(model, edits), torch.no_grad():
        longer = models.prompt(model, 3, 5, [])
        used = fresh()
        model(**longer, past_key_values=used)
        cache = fresh()
        first = model(input_ids=one["input_ids"], past_key_values=cache).logits
        step = model(input_ids=torch.tensor([[11]]), past_key_values=cache).logits
        if kind == "static":  # older versions of transformers reset a dynamic cache to zeros of the same length
            used.reset()
        else:
            used = fresh()
        again = model(input_ids=one["input_ids"], past_key_values=used).logits
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)
    both = oracle.logits(model, one, edits, torch.tensor([[11]]))
    torch.testing.assert_close(step, both[:, 1:], rtol=1e-9, atol=1e-9)


# -- compiled --------------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend="aot_eager"):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # generate() compiles by itself on GPUs only
    return dict(cache_implementation="static", compile_config=config)


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_that_compiles_by_itself(model):
    """One graph for the steps; graphs that were made before patch(), or under another plan, do not serve."""
    inputs = models.batch(rows(model))
    options = dict(do_sample=False, **OPTIONS)
    plain = model.generate(**inputs, **options)
    vector = torch.linspace(-1, 1, 32)
    plans = [Plan([AddVector([0], vector, by=2.0)]), Plan([AddVector([1], vector, by=2.0, site="resid_pre")])]
    assert torch.equal(model.generate(**inputs, **options, **compiled()), plain)
    for edits in plans:
        with patch(model, edits):
            expected = model.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, **options, **compiled()), expected)
        assert not torch.equal(expected, plain)
        assert torch.equal(model.generate(**inputs, **options, **compiled()), plain)
    expected = by_hooks(model, inputs, plans[1] + plans[0], do_sample=False)
    with patch(model, plans[1]) as patched:
        model.generate(**inputs, **options, **compiled())
        patched.replace(plans[1] + plans[0])
        assert torch.equal(model.generate(**inputs, **options, **compiled()), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_chat_after_compiled_steps(model):
    turns = turns_of(model)[:2]
    with patch(model, CHAT):
        expected = talk(model, turns, caches(model)["static"])
        cache = caches(model)["static"]
        options = {k: v for k, v in compiled().items() if k == "compile_config"}
        first = model.generate(**turns[0], past_key_values=cache, do_sample=False, **OPTIONS, **options)
        ids = torch.cat([first, turns[1]["input_ids"]], 1)
        got = model.generate(input_ids=ids, past_key_values=cache, do_sample=False, **OPTIONS, **options)
    assert torch.equal(got, expected[0])
