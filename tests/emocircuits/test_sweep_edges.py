"""Edge attribution against finite differences of hooks that change one edge alone, and against exact edge patching."""

from __future__ import annotations

import functools

import pytest
import torch
from families_harness import built
from models import VOCAB
from test_sweep_attribution import _norms  # noqa: F401  norms in float64
from test_sweep_engine import A, B, difference, pair
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.llama import modeling_llama

from emocircuits.sweep import Sweep, logit_diff
from emocircuits.sweep.attribution.graph import EdgeResult

HEADS, DIM = 4, 8
LAYOUTS = {  # layers, norm before attention, attention, its output projection, norm before the MLP, MLP, final norm
    "llama": (
        "model.layers", "input_layernorm", "self_attn", "o_proj", "post_attention_layernorm", "mlp", "model.norm",
    ),
    "gpt2": ("transformer.h", "ln_1", "attn", "c_proj", "ln_2", "mlp", "transformer.ln_f"),
    "neox": (
        "gpt_neox.layers", "input_layernorm", "attention", "dense", "post_attention_layernorm", "mlp",
        "gpt_neox.final_layer_norm",
    ),
}  # fmt: skip


@functools.cache
def neox(parallel):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, use_parallel_residual=parallel, hidden_dropout=0.0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).double().eval()


def case(kind):
    if kind.startswith("neox"):
        _, clean, corrupt = pair("llama")
        return neox(kind == "neox-parallel"), clean, corrupt, LAYOUTS["neox"]
    return *pair(kind), LAYOUTS["gpt2" if kind == "gpt2" else "llama"]


class Edges:
    """A model in which one reader gets more of something than the residual stream has."""

    def __init__(self, model, layout):
        self.model = model
        layers, self.norm1, self.attention, self.output, self.norm2, self.mlp, final = layout
        self.layers, self.final = list(model.get_submodule(layers)), model.get_submodule(final)
        self.fused = (
            None if hasattr(self.layers[0].get_submodule(self.attention), "q_proj") else layout is LAYOUTS["neox"]
        )

    def part(self, layer, path):
        return self.layers[layer].get_submodule(path)

    @torch.no_grad()
    def writes(self, inputs):
        """What every writer writes, ``[T, d_model]``."""
        found, hooks = {}, []
        keep = lambda name: lambda m, a, o: found.__setitem__(name, (o[0] if isinstance(o, tuple) else o)[0])  # noqa: E731
        for l in range(len(self.layers)):
            projection = self.part(l, f"{self.attention}.{self.output}")

            def heads(m, a, l=l):
                weight = m.weight if type(m).__name__ == "Conv1D" else m.weight.T
                for h in range(HEADS):
                    at = slice(h * DIM, h * DIM + DIM)
                    found[f"a{l}.h{h}"] = a[0][0, :, at] @ weight[at]

            hooks.append(projection.register_forward_pre_hook(heads))
            hooks.append(self.part(l, self.mlp).register_forward_hook(keep(f"m{l}")))
        enter = lambda m, a, k: found.__setitem__("input", (a[0] if a else k["hidden_states"])[0])  # noqa: E731
        hooks.append(self.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        self.model(**inputs)
        for h in hooks:
            h.remove()
        return found

    @torch.no_grad()
    def run(self, inputs, reader, more, start=None):
        """The metric with ``more`` added to what one reader reads; ``start``: the first layer's input."""
        hooks, layer = [], None if reader == "logits" else int(reader[1:].partition(".")[0])
        if start is not None:

            def enter(m, a, k):
                return ((start[None], *a[1:]), k) if a else (a, {**k, "hidden_states": start[None]})

            hooks.append(self.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        if reader == "logits":
            hooks.append(self.final.register_forward_pre_hook(lambda m, a: (a[0] + more,)))
        elif reader.startswith("m"):
            hooks.append(self.part(layer, self.norm2).register_forward_pre_hook(lambda m, a: (a[0] + more,)))
        else:
            # The norm is shared by all: its input is kept, and one slice of one projection is made anew.
            norm, seen = self.part(layer, self.norm1), []
            hooks.append(norm.register_forward_pre_hook(lambda m, a: None if seen else seen.append(a[0])))
            head, which = int("".join(filter(str.isdigit, reader.partition(".")[2]))), reader[-2]
            name, at = self.slice(head, which)

            def project(m, a, o):
                if len(seen) > 1:
                    return o
                seen.append(None)
                new = o.clone()
                new[..., at] = m(norm(seen[0] + more))[..., at]
                return new

            hooks.append(self.part(layer, f"{self.attention}.{name}").register_forward_hook(project))
        value = float(difference(self.model(**inputs).logits))
        for h in hooks:
            h.remove()
        return value

    def slice(self, head, which):
        i = "qkv".index(which)
        if self.fused is None:
            return f"{which}_proj", slice(head * DIM, head * DIM + DIM)
        if self.fused:
            return "query_key_value", slice((3 * head + i) * DIM, (3 * head + i + 1) * DIM)
        return "c_attn", slice((i * HEADS + head) * DIM, (i * HEADS + head + 1) * DIM)


KINDS = ["llama", "qwen2", "gpt2", "neox-parallel", "neox-sequential"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_edge(kind):
    model, clean, corrupt, layout = case(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    edges = Edges(model, layout)
    new, old = edges.writes(clean), edges.writes(corrupt)
    found = sweep.edges("eap")
    integrated = sweep.edges("eap-ig", steps=2)
    table = found.to_dataframe()
    assert len(table) == found.edges == sum(_below(d, kind == "neox-parallel") for d in found.destinations)
    spread, h = float(table.score.abs().max()), 1e-5
    halfway = old["input"] + (new["input"] - old["input"]) / 2
    chosen = table.sample(70, random_state=0)
    for row in chosen.itertuples():
        delta = new[row.source] - old[row.source]

        def slope(start=None, row=row, delta=delta):
            up, down = (edges.run(corrupt, row.destination, by * h * delta, start) for by in (1, -1))
            return (up - down) / (2 * h)

        assert abs(row.score - slope()) < 1e-6 * spread, row
        i, j = found.sources.index(row.source), found.destinations.index(row.destination)
        mean = (slope(halfway) + slope(new["input"])) / 2
        assert abs(float(integrated.scores[i, j]) - mean) < 1e-6 * float(integrated.scores.nan_to_num(0).abs().max()), (
            row
        )


def _below(destination, parallel):
    """How many writers there are below a reader."""
    if destination == "logits":
        return 1 + 3 * (HEADS + 1)
    layer = int(destination[1:].partition(".")[0])
    own = HEADS if destination.startswith("m") and not parallel else 0
    return 1 + layer * (HEADS + 1) + own


def test_exact_where_the_model_is_linear(monkeypatch):
    """Without norms, MLPs and attention weights that depend on anything, every edge's score is its patch."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x)
    model, clean, corrupt = pair("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
        edges = Edges(model, LAYOUTS["llama"])
        new, old = edges.writes(clean), edges.writes(corrupt)
        for method in ("eap", "eap-ig"):
            found = sweep.edges(method)
            for e in found.top(40):
                patched = edges.run(corrupt, e["destination"], new[e["source"]] - old[e["source"]])
                assert abs(patched - sweep.corrupt - e["score"]) < 1e-10 * abs(sweep.clean - sweep.corrupt)
    finally:
        model.load_state_dict(before)


@pytest.mark.parametrize(("kind", "steps"), [("llama", 50), pytest.param("llava-padded", 100, marks=pytest.mark.slow)])
def test_integrated_edges_of_the_input_are_complete(kind, steps):
    """All that the input is read by is a complete cut: over it the scores add up to clean less corrupt."""
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    gap = sweep.clean - sweep.corrupt
    few, many = (float(sweep.edges(steps=n).scores[0].nansum()) for n in (steps, 2 * steps))
    # A sum over the right ends of steps is off by one over their number.
    assert abs(many - gap) < 0.7 * abs(few - gap)
    assert abs(2 * many - few - gap) < 0.02 * abs(gap)


def test_circuits():
    nan = float("nan")
    scores = torch.tensor(
        # a0.h0<q> a0.h1<q> a0.kv0<k> a0.kv0<v>  m0   logits
        [[0.1, 9.0, 0.2, 5.0, 0.3, 1.0], [nan, nan, nan, nan, 4.0, -6.0], [nan] * 4 + [0.5, 0.4], [nan] * 5 + [0.05]],
        dtype=torch.float64,
    )
    names = ["a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m0", "logits"]
    result = EdgeResult(scores, ["input", "a0.h0", "a0.h1", "m0"], names, 1.0, 0.0, shared=2)
    assert result.edges == 6 + 2 + 2 + 1
    assert [e["score"] for e in result.top(3)] == [9.0, -6.0, 5.0]

    def path(edges):
        return [(e["source"], e["destination"]) for e in edges]

    # The largest one ends in a head that nothing reads; a head that shares its keys and values is read.
    assert path(result.circuit(3, "top")) == [("a0.h0", "logits"), ("input", "a0.kv0<v>")]
    assert path(result.circuit(3)) == [("a0.h0", "logits"), ("input", "a0.kv0<v>"), ("input", "logits")]
    assert path(result.circuit(1)) == []
    for options, match in ((dict(n=0), "at least 1"), (dict(n=2, how="all"), "'top' or 'greedy'")):
        with pytest.raises(ValueError, match=match):
            result.circuit(**options)


def test_files_plot_and_pairs(tmp_path):
    model, clean, corrupt = pair("qwen2")
    both = Sweep(model, [clean, corrupt], [corrupt, clean], logit_diff(A, B), progress=False).edges("eap")
    single = [
        Sweep(model, a, b, logit_diff(A, B), progress=False).edges("eap").scores
        for a, b in ((clean, corrupt), (corrupt, clean))
    ]
    torch.testing.assert_close(both.pairs, torch.stack(single), equal_nan=True)
    both.save(tmp_path)
    again = EdgeResult.load(tmp_path)
    assert torch.equal(again.scores.nan_to_num(9.0), both.scores.nan_to_num(9.0))
    assert (again.top(5), again.meta, again.shared) == (both.top(5), both.meta, 2)
    assert len(both.plot(tmp_path / "edges.html").data) == 1
    (tmp_path / "edges.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the scores"):
        EdgeResult.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "match"), [("Gemma 2", "normalises"), ("OLMo2", "normalises"), ("Qwen3-VL", "between")]
)
def test_models_that_are_refused(name, match):
    import families_vision_models  # noqa: F401

    model, _, make_inputs, _ = built(name)
    clean = make_inputs(1, "none")
    corrupt = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in clean.items()}
    if "pixel_values" in corrupt:
        corrupt["pixel_values"] = 0.5 - corrupt["pixel_values"]
    else:
        corrupt["input_ids"][0, 3] = 50
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    with pytest.raises(NotImplementedError, match=match):
        sweep.edges()
    assert sweep.attribute(method="atp").values.isfinite().all()


def test_refusals():
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for options, match in ((dict(method="acdc"), "'eap' or 'eap-ig'"), (dict(steps=0), "at least 1")):
        with pytest.raises(ValueError, match=match):
            sweep.edges(**options)
    with pytest.raises(NotImplementedError, match="leave patch_with"):
        Sweep(model, clean, corrupt, logit_diff(A, B), patch_with="zero", progress=False).edges()
    with pytest.raises(ValueError, match="not differentiable"):
        Sweep(model, clean, corrupt, lambda x: (x[0, -1, A] - x[0, -1, B]).item(), progress=False).edges()
