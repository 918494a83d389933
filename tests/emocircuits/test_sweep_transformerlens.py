"""The one-liners against TransformerLens itself, on a bridge around the same model, and against hooks without it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io

import pytest
import sweep_oracle as oracle
import torch
from families_harness import TEXT
from models import VOCAB
from test_sweep_engine import HEADS, A, B, agree, difference, model_of, pair

from emocircuits.sweep import compat, logit_diff

NAMES = sorted(n.removeprefix("get_act_patch_") for n in dir(compat) if n.startswith("get_act_patch_"))
WITHOUT = "transformer_lens is not installed (pip install 'emokernels[peers]')"
lens = pytest.mark.skipif(importlib.util.find_spec("transformer_lens") is None, reason=WITHOUT)


def ours(name, *arguments):
    with contextlib.redirect_stderr(io.StringIO()):
        return getattr(compat, f"get_act_patch_{name}")(*arguments)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bridge(request, tmp_path_factory):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    model = copy.deepcopy(model_of(request.param, torch.float32))
    model.set_attn_implementation("eager")
    folder = tmp_path_factory.mktemp("bridge")
    model.save_pretrained(folder)
    # It wants a tokenizer and, given ids, does not use it.
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="w3", bos_token="w1", eos_token="w2", pad_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        made = TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")
    return model_of(request.param, torch.float32), made


@lens
@pytest.mark.parametrize("name", NAMES)
def test_as_transformer_lens(bridge, name):
    from transformer_lens import patching

    patching.tqdm = lambda x, **_: x
    model, theirs = bridge
    clean, corrupt = torch.tensor([[1, 8, 9, 10, 11]]), torch.tensor([[1, 8, 19, 10, 12]])
    with torch.no_grad():
        _, cache = theirs.run_with_cache(clean)
        expected = getattr(patching, f"get_act_patch_{name}")(theirs, corrupt, cache, difference).double()
    found = ours(name, model, corrupt, clean, difference)
    if name.endswith("_every") and found.isnan().any():
        assert bool((expected[found.isnan()] == 0).all()), "key-value heads that are not there"
        found = found.nan_to_num(0.0)
    agree(found, expected, 2e-5)


def prompts(kind):
    model, clean, corrupt = pair(kind)
    return model, clean, corrupt, clean["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama-padded"])
def test_patterns(kind):
    """The weights that transformers itself gives out, on the values of the other run, into the output projection."""
    model, clean, corrupt, total = prompts(kind)
    # Its softmax rounds to float32, and in a float64 model gives NaN for padding.
    if kind.endswith("padded"):
        model = copy.deepcopy(model).float()
    near = 2e-5 if kind.endswith("padded") else 1e-6
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        other, own = (eager(**x, output_attentions=True, use_cache=False).attentions for x in (clean, corrupt))
    values = oracle.record(model, corrupt, "v")
    z = oracle.record(model, corrupt, "heads")
    layer, real = 1, clean["attention_mask"][0].nonzero().flatten().tolist()
    v = values[layer].view(total, 2, 8).repeat_interleave(2, 1)  # [T, H, D]
    gathered = torch.einsum("hds,shk->dhk", other[layer][0], v).flatten(1)

    def patched(columns, head, new):
        entries = slice(8 * head, 8 * head + 8)
        return float(difference(oracle.patched_logits(model, corrupt, "heads", layer, columns, entries, new)))

    whole = ours("attn_head_pattern_all_pos", model, corrupt, clean, difference)
    agree(whole[layer], torch.tensor([patched(real, h, gathered) for h in range(4)], dtype=torch.float64), near)
    by_pos = ours("attn_head_pattern_by_pos", model, corrupt, clean, difference)
    assert by_pos.shape == (3, 4, total)
    expected = torch.tensor([[patched([c], h, gathered) for c in real] for h in range(4)], dtype=torch.float64)
    agree(by_pos[layer][:, real], expected, near)
    if kind == "llama":
        return
    entries = ours("attn_head_pattern_dest_src_pos", model, corrupt, clean, difference)
    assert entries.shape == (3, 4, total, total)
    some = [(h, d, s) for h in range(4) for d in real[3:] for s in real[::2]]
    expected = []
    for head, dest, source in some:
        moved = z[layer].clone()
        change = other[layer][0, head, dest, source] - own[layer][0, head, dest, source]
        moved[dest, 8 * head : 8 * head + 8] += change * v[source, head]
        expected.append(patched([dest], head, moved))
    agree(torch.stack([entries[layer, h, d, s] for h, d, s in some]), torch.tensor(expected, dtype=torch.float64), near)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-padded"])
@pytest.mark.parametrize("pos", [-1, -3])
def test_residual_stream_between_attention_and_mlp(kind, pos):
    model, clean, corrupt, total = prompts(kind)
    metric = logit_diff(A, B, pos=pos)
    pre, out = (oracle.record(model, clean, k) for k in ("residual", "attn_out"))
    base = oracle.record(model, corrupt, "residual")
    expected = [
        [
            oracle.patched_logits(model, corrupt, "attn_out", l, [c], slice(None), pre[l] + out[l] - base[l])
            for c in range(total)
        ]
        for l in range(3)
    ]
    numbers = torch.tensor([[float(x[0, pos, A] - x[0, pos, B]) for x in row] for row in expected], dtype=torch.float64)
    agree(ours("resid_mid", model, corrupt, clean, metric), numbers, 1e-10)


def test_queries_keys_values_and_every():
    model, clean, corrupt, total = prompts("qwen2")
    every = ours("attn_head_by_pos_every", model, corrupt, clean, difference)
    assert every.shape == (5, 3, total, 4)
    for i, (name, units) in enumerate((("q", HEADS), ("k", HEADS[:2]), ("v", HEADS[:2])), 1):
        expected = oracle.sweep(model, corrupt, clean, name, difference, "each", units)
        agree(ours(f"attn_head_{name}_by_pos", model, corrupt, clean, difference), expected, 1e-10)
        agree(every[i, ..., : len(units)], expected, 1e-10)
        assert every[i, ..., len(units) :].isnan().all()
        whole = oracle.sweep(model, corrupt, clean, name, difference, "all", units)
        agree(ours(f"attn_head_{name}_all_pos", model, corrupt, clean, difference), whole, 1e-10)


def test_rows_of_a_batch_are_pairs():
    model, clean, corrupt, _ = prompts("llama")
    other = corrupt["input_ids"].clone()
    other[0, 4] = 33
    for name in ("attn_head_pattern_all_pos", "resid_mid", "attn_head_q_by_pos"):
        alone = [ours(name, model, x, clean["input_ids"], difference) for x in (corrupt["input_ids"], other)]
        rows = torch.cat([corrupt["input_ids"], other]), clean["input_ids"].repeat(2, 1)
        torch.testing.assert_close(ours(name, model, *rows, difference), torch.stack(alone).mean(0), rtol=0, atol=1e-10)


def test_what_is_not_there_is_named():
    model, make = TEXT["GPT-NeoX"](torch.float64)  # attention and MLP side by side
    clean = make(1, "none")
    corrupt = {**clean, "input_ids": clean["input_ids"].flip(1)}
    with pytest.raises(NotImplementedError, match="layer 0 has no residual stream between attention and MLP"):
        ours("resid_mid", model, corrupt, clean, difference)
    with pytest.raises(NotImplementedError, match="direct_path is not on this engine; get_act_patch_ is there with"):
        _ = compat.get_act_patch_direct_path
    with pytest.raises(AttributeError, match="nothing"):
        _ = compat.nothing
