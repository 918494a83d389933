"""Tiny random models of every family, and the checks that all of them must pass.

A family registers a builder in `BUILDERS`: a function of a dtype that returns the model in eval mode and a function
``make_inputs(rows, padding)`` that gives inputs of so many batch rows, all of one length (padding ``"none"``) or of
different lengths (``"left"``). Sizes are those of `SIZES`, so that one plan fits every family.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import oracle
import torch
import transformers
from random_plans import random_plan

from emocircuits import (
    AddHead,
    AddNeurons,
    AddVector,
    BoostRoute,
    Plan,
    ProjectOut,
    ReplaceHead,
    ReplaceNeurons,
    ReplaceVector,
    ScaleHead,
    ScaleNeurons,
    patch,
)
from emocircuits.families import Handle, open_model
from emocircuits.fingerprint import fingerprint

PAD, BOS, EOS, VOCAB = 0, 1, 2, 64
HEADS, DIM, WIDTH, NEURONS, LAYERS = 4, 8, 32, 48, 3
SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS,
    pad_token_id=PAD, initializer_range=0.3, attention_dropout=0.0,
)  # fmt: skip
STEPS = 3
SUPPRESS = [PAD, 5, 6]  # nor image or video: the oracle would see one
PADDINGS = ("none", "left")

Inputs = dict[str, Any]
MakeInputs = Callable[[int, str], Inputs]
Builder = Callable[[torch.dtype], tuple[Any, MakeInputs]]


# -- text families ---------------------------------------------------------------------------------------------------
def text_inputs(rows: int, padding: str) -> Inputs:
    """Random tokens with padding on the left of every row but the first."""
    g = torch.Generator().manual_seed(rows)
    columns = 9
    ids = torch.randint(8, VOCAB, (rows, columns), generator=g)
    mask = torch.ones_like(ids)
    if padding == "left":
        for row in range(1, rows):
            mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def finish(model: Any, dtype: torch.dtype) -> Any:
    """In eval mode, with norms that are not the identity and no token that ends a generation."""
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = 0.3 * torch.randn(parameter.shape, generator=g)
            parameter.data += noise.to(parameter.dtype)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def text(config: str, model: str, **over: Any) -> Builder:
    """A builder of a causal language model, by the names of its classes in transformers."""

    def build(dtype: torch.dtype = torch.float64) -> tuple[Any, MakeInputs]:
        torch.manual_seed(0)
        sizes = {k: v for k, v in {**SIZES, **over}.items() if v is not ...}
        return finish(getattr(transformers, model)(getattr(transformers, config)(**sizes)), dtype), text_inputs

    return build


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
TEXT: dict[str, Builder] = {
    "Llama": text("LlamaConfig", "LlamaForCausalLM"),
    "Qwen2": text("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": text("Qwen3Config", "Qwen3ForCausalLM", head_dim=DIM),
    "Mistral": text("MistralConfig", "MistralForCausalLM", sliding_window=6),
    "Gemma": text("GemmaConfig", "GemmaForCausalLM", head_dim=DIM),
    "Gemma 2": text(
        "Gemma2Config", "Gemma2ForCausalLM", head_dim=DIM, sliding_window=6, query_pre_attn_scalar=DIM,
        attn_logit_softcapping=2.0,
    ),
    "Gemma 3": text(
        "Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=DIM, sliding_window=6, query_pre_attn_scalar=DIM,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "Phi-3": text("Phi3Config", "Phi3ForCausalLM"),
    "GPT-2": text("GPT2Config", "GPT2LMHeadModel", n_inner=NEURONS, intermediate_size=..., num_key_value_heads=...),
    "GPT-NeoX": text("GPTNeoXConfig", "GPTNeoXForCausalLM", num_key_value_heads=...),
    "OLMo": text("OlmoConfig", "OlmoForCausalLM"),
    "OLMo2": text("Olmo2Config", "Olmo2ForCausalLM"),
    "Mixtral": text("MixtralConfig", "MixtralForCausalLM", num_local_experts=4),
    "Qwen2-MoE": text(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[1]
    ),
    "Qwen3-MoE": text("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **EXPERTS, head_dim=DIM),
}  # fmt: skip
BUILDERS: dict[str, Builder] = {**TEXT}


# -- plans -----------------------------------------------------------------------------------------------------------
def vector(size: int | tuple[int, ...], seed: int) -> torch.Tensor:
    """A random direction."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def edits(handle: Handle) -> dict[str, list[Any]]:
    """Edits by the column of the table in docs/families.md."""
    source = "visual" if handle.sees else "query"

    def at(site: str, seed: int) -> list[Any]:
        return [
            AddVector([0, 2], vector(WIDTH, seed), site=site, by=0.4),
            AddVector([1], vector(WIDTH, seed + 1), site=site, norm="keep", phase="decode"),
            ProjectOut([1], vector(WIDTH, seed + 2), site=site, to=source),
            ReplaceVector([1], vector(WIDTH, seed + 3), site=site, to="last"),
        ]

    def cached(site: str, seed: int) -> list[Any]:
        of_heads = (handle.geometry.kv_heads, DIM)
        return [
            AddVector([0, 2], vector(of_heads, seed), site=site, by=0.4, to=source),
            AddVector([1], vector(of_heads, seed + 1), site=site, norm="keep"),
            ReplaceVector([0], vector(of_heads, seed + 2), site=site, to="last"),
        ]

    return {
        "weight routes": [
            BoostRoute([(0, 1), (1, 0), (2, 3)], to=["query", "last"], source=source, by=1.7),
            BoostRoute([(0, 1), (2, 2)], to="generated", source=[source, "last"], by=2.5),
        ],
        "logit routes": [
            BoostRoute([(0, 0), (1, 0)], to="query", source=source, by=1.6, reading="logit-add"),
            BoostRoute([(2, 0)], to="generated", source=source, by=0.0, reading="logit-add", phase="decode"),
            BoostRoute([(1, 2)], source=source, by=0.7, reading="logit-scale"),
            BoostRoute([(1, 3), (0, 3)], to=["last", "generated"], source=source, by=0.4, reading="logit-abs"),
        ],
        "heads": [
            ScaleHead([(0, 2), (2, 1)], by=0.3, to=["query", "generated"]),
            AddHead([(0, 1)], vector(DIM, 1)),
            ReplaceHead([(1, 1), (2, 1)], value=torch.stack([vector(DIM, 2), vector(DIM, 3)]), to="last"),
        ],
        "neurons": [
            ScaleNeurons({0: [3, 7], 2: [11, 40, 2]}, by=1.8),
            AddNeurons({1: [5]}, 0.7, phase="decode"),
            ReplaceNeurons({2: [9, 30]}, vector(2, 4), to=["last", "generated"]),
        ],
        **{site: at(site, 10 * n) for n, site in enumerate(("resid_pre", "resid_post", "attn_out", "mlp_out"), 1)},
        **{f"cached {site}": cached(site, 10 * n) for n, site in enumerate("kv", 5)},
    }


# -- checks ----------------------------------------------------------------------------------------------------------
SINGLE = {"Gemma 2"}
"""Families that run in float32: eager attention, their only stock one, makes NaN of padding rows in float64."""


def built(name: str) -> tuple[Any, Any, MakeInputs, float]:
    """A model, the same one for the oracle in float64, its inputs, and how far apart their logits may be."""
    model, make_inputs = BUILDERS[name](torch.float32 if name in SINGLE else torch.float64)
    exact = copy.deepcopy(model).double()
    return model, exact, make_inputs, 1e-4 if name in SINGLE else 1e-6  # generate() gives its logits in float32


@dc.dataclass(frozen=True)
class Run:
    """One way to generate."""

    cache: str
    compiled: bool

    def options(self) -> dict[str, Any]:
        """Arguments of generate()."""
        options: dict[str, Any] = {"cache_implementation": "static"} if self.cache == "static" else {}
        if self.compiled:
            options["compile_config"] = transformers.CompileConfig(
                fullgraph=True, backend="aot_eager", mode=None, dynamic=False
            )
        return options


RUNS = (Run("dynamic", False), Run("static", False), Run("static", True), Run("dynamic", True))


@contextlib.contextmanager
def compiling(model: Any, wanted: bool) -> Iterator[None]:
    """Let generate() compile its decode step on a CPU and for every cache, which it does by itself on a GPU."""
    own = model.__dict__
    if wanted:
        own["_valid_auto_compile_criteria"] = lambda *args, **kwargs: True
    try:
        yield
    finally:
        # The other two are what generate() leaves on a model that it compiled.
        for name in ("_valid_auto_compile_criteria", "_compiled_call", "_last_compile_config"):
            own.pop(name, None)


@torch.no_grad()
def generate(model: Any, inputs: Inputs, run: Run = RUNS[0]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``[B, STEPS]`` and the logits ``[B, STEPS, V]`` they came from, in float32."""
    with compiling(model, run.compiled):
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, output_logits=True,
            return_dict_in_generate=True, **run.options(),
        )  # fmt: skip
    model.__dict__.pop("_previous_max_cache_length", None)  # left there by generate() itself
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


class Expected:
    """Logits of every step, by the oracle, for one float64 model, prompt and plan; the model must not be patched."""

    def __init__(self, model: Any, inputs: Inputs, plan: Plan) -> None:
        self.model, self.inputs, self.plan = model, inputs, plan
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, N + STEPS - 1, V]`` of the prompt and all but the last of ``tokens [B, STEPS]``."""
        key = tuple(tokens.flatten().tolist())
        if key not in self.known:
            self.known[key] = oracle.logits(self.model, self.inputs, self.plan, tokens[:, :-1])
        return self.known[key]

    def steps(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, STEPS, V]`` before each of ``tokens [B, STEPS]``."""
        return self.logits(tokens)[:, self.inputs["input_ids"].shape[1] - 1 :]


def check(name: str, runs: Sequence[Run], seed: int = 0, paddings: Sequence[str] = PADDINGS) -> None:
    """A random plan with every kind of edit equals the oracle in every way to generate, padded and not.

    Also checked: an empty plan changes no bit, leaving the patch restores the model, and the plan changes something.
    """
    model, exact, make_inputs, tolerance = built(name)
    handle = open_model(model)
    plan = random_plan(handle.geometry, seed=seed, visual=handle.sees)
    prompts = {padding: make_inputs(2, padding) for padding in paddings}
    plain = {padding: generate(model, inputs)[1] for padding, inputs in prompts.items()}
    before = fingerprint(model)
    with patch(model, Plan([])):
        for padding, inputs in prompts.items():
            apart = distance(generate(model, inputs)[1], plain[padding])
            assert apart == 0, f"{padding} padding: an empty plan changes logits by {apart:.1e}"
    with patch(model, plan):  # once, so that one compiled step serves all prompts
        got = {padding: [generate(model, inputs, run) for run in runs] for padding, inputs in prompts.items()}
    assert fingerprint(model) == before, "leaving the patch does not restore the model"
    for padding, inputs in prompts.items():
        assert torch.equal(generate(model, inputs)[1], plain[padding])
        expected = Expected(exact, inputs, plan)
        for run, (tokens, logits) in zip(runs, got[padding], strict=True):
            apart = distance(logits.double(), expected.steps(tokens))
            assert apart < tolerance, f"{padding} padding, {run}: {apart:.1e} from the oracle"
        assert distance(plain[padding].double(), expected.steps(tokens)) > 1e-2, "the plan changes too little to notice"


def outcomes(name: str) -> dict[str, str]:
    """One row of the table in docs/families.md: what happens to edits of each kind on this family.

    Raises:
        AssertionError: the edits run and are wrong.
    """
    model, exact, make_inputs, tolerance = built(name)
    inputs = make_inputs(2, "left")
    plain = generate(model, inputs)[1].double()
    found = {}
    for kind, those in edits(open_model(model)).items():
        plan = Plan(those)
        try:
            with patch(model, plan):
                tokens, logits = generate(model, inputs)
        except NotImplementedError:
            found[kind] = "refused"
            continue
        expected = Expected(exact, inputs, plan).steps(tokens)
        assert distance(logits.double(), expected) < tolerance, f"{kind} on {name} is wrong"
        assert distance(plain, expected) > 1e-4, f"{kind} on {name} does nothing"
        found[kind] = "yes"
    return found
