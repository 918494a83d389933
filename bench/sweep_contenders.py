"""The ways to patch that bench/sweep.py compares, each as its own documentation has it.

A contender takes a job and patches, and gives the metric under each. What it keeps of the clean prompt is made in
``ready`` and not timed; the engine has nothing to make ready: its runs of both prompts are timed. ``whole`` says that
its cost a patch only means something over a whole sweep.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

JOBS = {"heads": "heads", "heads-each": "heads", "residual-each": "residual", "neurons": "neurons"}


class Unavailable(Exception):
    """A contender that cannot take part, and why."""


def words_only(work: Workload) -> None:
    """Of a contender that is given prompts of words."""
    if work.images is not None:
        raise Unavailable("compared on prompts without images only")


class Patch(NamedTuple):
    layer: int
    column: int | None
    unit: int | None


@dc.dataclass
class Workload:
    """One model, one pair of prompts, one metric, for everybody."""

    folder: Path
    args: Any
    clean: Tensor
    corrupt: Tensor
    images: tuple[Tensor, Tensor] | None = None
    first: int = 4
    answers: tuple[int, int] = (17, 42)

    @classmethod
    def build(cls, folder: Path, args: Any) -> Workload:
        if args.model == "llava":
            return cls.build_llava(folder, args)
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads, intermediate_size=args.neurons, vocab_size=args.vocabulary,
            max_position_embeddings=2048, initializer_range=0.05, tie_word_embeddings=False, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for layer in model.model.layers:  # sharper attention, so that a patch shows
            layer.self_attn.q_proj.weight.mul_(2.0)
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(args.vocabulary)}, unk_token="t3"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
        tokenizer.save_pretrained(folder)
        clean = torch.randint(
            10, args.vocabulary, (1, args.columns), generator=torch.Generator().manual_seed(args.columns)
        )
        corrupt = clean.clone()
        for column in {4, 5, args.columns // 2, 3 * args.columns // 4}:
            corrupt[0, column] = 10 + (corrupt[0, column] * 7 + 13) % (args.vocabulary - 10)
        return cls(folder, args, clean, corrupt, first=int((clean != corrupt)[0].nonzero()[0]))

    @classmethod
    def build_llava(cls, folder: Path, args: Any) -> Workload:
        """Two images of 256 tokens each, after 4 of `columns` words that are the same on both sides."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(0)
        text = LlamaConfig(
            hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads, intermediate_size=args.neurons, vocab_size=args.vocabulary,
            max_position_embeddings=2048, initializer_range=0.05, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=128,
            patch_size=8,
        )  # fmt: skip
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=256)
        model = LlavaForConditionalGeneration(config).eval()
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(2.0)
        model.save_pretrained(folder)
        g = torch.Generator().manual_seed(args.columns)
        words = torch.randint(10, args.vocabulary, (1, args.columns), generator=g)
        tokens = torch.cat([words[:, :4], torch.full((1, 256), 3), words[:, 4:]], 1)
        images = (torch.randn(1, 3, 128, 128, generator=g), torch.randn(1, 3, 128, 128, generator=g))
        return cls(folder, args, tokens, tokens.clone(), images)

    @property
    def columns(self) -> int:
        return self.clean.shape[1]

    def inputs(self, side: str) -> dict[str, Tensor]:
        """What the model takes."""
        found = {"input_ids": self.clean if side == "clean" else self.corrupt}
        if self.images is not None:
            found["pixel_values"] = self.images[side != "clean"]
        return found

    def model(self, attention: str = "sdpa") -> Any:
        from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

        kind = LlamaForCausalLM if self.images is None else LlavaForConditionalGeneration
        model = kind.from_pretrained(self.folder, dtype=torch.float32, attn_implementation=attention)
        return model.eval().requires_grad_(False)

    def layers(self, model: Any) -> Any:
        return model.model.layers if self.images is None else model.model.language_model.layers

    def positions(self) -> list[int]:
        """Columns that are patched one at a time: every `stride`-th, the last one too."""
        return list(range(self.columns - 1, -1, -self.args.stride))[::-1]

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def patches(self, job: str) -> list[Patch]:
        a = self.args
        layers = range(a.layers)
        if job == "heads":
            return [Patch(l, None, h) for l in layers for h in range(a.heads)]
        if job == "neurons":
            return [Patch(l, None, g) for l in layers for g in range(a.groups)]
        columns = self.positions()
        if job == "heads-each":
            return [Patch(l, c, h) for l in layers for c in columns for h in range(a.heads)]
        return [Patch(l, c, None) for l in layers for c in columns]

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, self.answers[0]] - logits[0, -1, self.answers[1]]

    def write(self, x: Tensor, clean: Tensor, job: str, patch: Patch, row: int) -> None:
        """Put the clean values of a patch into one row of its site, ``[B, T, width]``."""
        columns = slice(None) if patch.column is None else patch.column
        part = slice(None)
        if job in ("heads", "heads-each"):
            size = x.shape[-1] // self.args.heads
            part = slice(patch.unit * size, (patch.unit + 1) * size)
        elif job == "neurons":
            size = x.shape[-1] // self.args.groups
            part = slice(patch.unit * size, (patch.unit + 1) * size)
        x[row, columns, part] = clean[0, columns, part]


def by_layer(patches: Sequence[Patch], size: int) -> Iterator[list[tuple[int, Patch]]]:
    """Batches of one layer, with the place of each patch in the list."""
    groups: dict[int, list[tuple[int, Patch]]] = {}
    for i, patch in enumerate(patches):
        groups.setdefault(patch.layer, []).append((i, patch))
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


class Contender:
    whole = False

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.prepare()

    def prepare(self) -> None:
        """Load the model."""

    def ready(self, job: str) -> None:
        """Run the clean prompt and keep what the job needs."""

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        raise NotImplementedError


class Engine(Contender):
    """``emocircuits.Sweep``; a few patches are run as what they are a part of, and picked out of its table."""

    whole = True

    def prepare(self) -> None:
        self.model = self.work.model()

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        from emocircuits.sweep import Sweep, logit_diff

        sweep = Sweep(
            self.model, clean=self.work.inputs("clean"), corrupt=self.work.inputs("corrupt"),
            metric=logit_diff(*self.work.answers), progress=False,
        )  # fmt: skip
        columns = self.work.positions()
        if job == "heads":
            table = sweep.heads().values
        elif job == "heads-each":
            table = sweep.heads(positions=columns).values
        elif job == "residual-each":
            table = sweep.residual(positions=columns).values
        else:
            table = sweep.neurons(groups=self.work.args.groups).values
        places = [(p.layer, None if p.column is None else columns.index(p.column), p.unit) for p in patches]
        return [float(table[tuple(i for i in place if i is not None)]) for place in places]


class Hooks(Contender):
    """A forward-pre-hook on the module whose input is the site: what everybody writes first."""

    batch, last = 1, False

    def prepare(self) -> None:
        self.model = self.work.model()

    def site(self, layer: Any, job: str) -> Any:
        if job == "residual-each":
            return layer
        return layer.mlp.down_proj if job == "neurons" else layer.self_attn.o_proj

    def ready(self, job: str) -> None:
        found, hooks = [], []
        for layer in self.work.layers(self.model):
            keep = lambda module, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"]).clone())  # noqa: E731
            hooks.append(self.site(layer, job).register_forward_pre_hook(keep, with_kwargs=True))
        self.model(**self.work.inputs("clean"), use_cache=False)
        for hook in hooks:
            hook.remove()
        self.clean = found

    def given(self, rows: int) -> dict[str, Tensor]:
        """The corrupt prompt, once for each patch of a batch."""
        return {k: v.expand(rows, *v.shape[1:]) for k, v in self.work.inputs("corrupt").items()}

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        clean, values = self.clean, [0.0] * len(patches)
        more = {"logits_to_keep": 1} if self.last else {}
        for group in by_layer(patches, self.batch):
            layer = group[0][1].layer

            def hook(module: Any, args: Any, kwargs: Any, layer: int = layer, group: Any = group) -> Any:
                x = (args[0] if args else kwargs["hidden_states"]).clone()
                for row, (_, patch) in enumerate(group):
                    self.work.write(x, clean[layer], job, patch, row)
                return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

            handle = self.site(self.work.layers(self.model)[layer], job).register_forward_pre_hook(
                hook, with_kwargs=True
            )
            try:
                logits = self.model(**self.given(len(group)), use_cache=False, **more).logits
            finally:
                handle.remove()
            for row, (i, _) in enumerate(group):
                values[i] = float(self.work.metric(logits[row : row + 1]))
        return values


class Batched(Hooks):
    """The same with 32 patches of one layer in a batch, the last column's logits only, the image seen once."""

    batch, last = 32, True

    def ready(self, job: str) -> None:
        super().ready(job)
        self.embedded: Tensor | None = None
        if self.work.images is None:
            return

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            self.embedded = kwargs["inputs_embeds"]

        hook = self.model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
        self.model(**self.work.inputs("corrupt"), use_cache=False)
        hook.remove()

    def given(self, rows: int) -> dict[str, Tensor]:
        if self.embedded is None:
            return super().given(rows)
        return {"inputs_embeds": self.embedded.expand(rows, -1, -1)}


class TransformerLens(Contender):
    """``transformer_lens.patching.generic_activation_patch`` on a TransformerBridge."""

    def prepare(self) -> None:
        words_only(self.work)
        try:
            import transformer_lens.patching as patching
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise Unavailable(f"transformer-lens: {error}") from error
        patching.tqdm = lambda x, **_: x  # no progress bar in timings
        self.patching = patching
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = TransformerBridge.boot_transformers(
                str(self.work.folder), hf_model=self.work.model("eager"), tokenizer=self.work.tokenizer(), device="cpu"
            )

    def ready(self, job: str) -> None:
        _, self.cache = self.model.run_with_cache(self.work.clean)

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        import pandas as pd

        p = self.patching
        setter, name, columns = {
            "heads": (p.layer_head_vector_patch_setter, "z", ["layer", "head"]),
            "heads-each": (p.layer_pos_head_vector_patch_setter, "z", ["layer", "pos", "head"]),
            "residual-each": (p.layer_pos_patch_setter, "resid_pre", ["layer", "pos"]),
            "neurons": (self.group, "post", ["layer", "group"]),
        }[job]
        index = pd.DataFrame([[i for i in patch if i is not None] for patch in patches], columns=columns)
        found = p.generic_activation_patch(
            self.model, self.work.corrupt, self.cache, self.work.metric, setter, name, index_df=index
        )
        return [float(v) for v in found]

    def group(self, x: Tensor, index: Any, clean: Tensor) -> Tensor:
        """Neuron groups are not among its setters; one is written as its documentation says."""
        self.work.write(x, clean, "neurons", Patch(int(index[0]), None, int(index[1])), 0)
        return x


class NNsight(Contender):
    """nnsight, sixteen invokes a trace, which become the rows of one pass."""

    batch = 16

    def prepare(self) -> None:
        words_only(self.work)
        try:
            import nnsight
        except ImportError as error:
            raise Unavailable(f"nnsight: {error}") from error
        wrap = getattr(nnsight, "TransformersModel", None) or nnsight.LanguageModel
        more = {"task": "text-generation"} if wrap.__name__ == "TransformersModel" else {}
        self.model = wrap(self.work.model(), tokenizer=self.work.tokenizer(), **more)

    def site(self, layer: int, job: str) -> Any:
        module = self.model.model.layers[layer]
        if job == "residual-each":
            return module
        return module.mlp.down_proj if job == "neurons" else module.self_attn.o_proj

    def ready(self, job: str) -> None:
        work, site = self.work, self.site
        with self.model.trace({"input_ids": work.clean}, use_cache=False):
            kept = list().save()
            for layer in range(work.args.layers):
                kept.append(site(layer, job).input.clone())
        self.clean = list(kept)

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        model, work, site, clean = self.model, self.work, self.site, self.clean
        values: list[float] = []
        for start in range(0, len(patches), self.batch):
            part = patches[start : start + self.batch]
            with model.trace(use_cache=False) as tracer:
                out = list().save()
                for patch in part:
                    with tracer.invoke({"input_ids": work.corrupt}):
                        place = site(patch.layer, job)
                        x = place.input.clone()
                        work.write(x, clean[patch.layer], job, patch, 0)
                        place.input = x
                        out.append(model.lm_head.output[:, -1:].clone())
            values += [float(work.metric(logits)) for logits in out]
        return values


class PyVene(Hooks):
    """pyvene, 16 patches of one layer in a batch, the clean activations given, so that the source is not run again."""

    batch = 16

    def prepare(self) -> None:
        words_only(self.work)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import pyvene
        except ImportError as error:
            raise Unavailable(f"pyvene: {error}") from error
        self.pv, self.model = pyvene, self.work.model()
        self.made: dict[tuple[Any, ...], Any] = {}

    def intervenable(self, job: str, patch: Patch) -> Any:
        pv = self.pv
        key = (job, patch.layer, patch.unit if job == "neurons" else None)
        if key not in self.made:
            if job == "neurons":

                def swap(base: Tensor, source: Tensor) -> Tensor:
                    for row in range(base.shape[0]):
                        self.work.write(base, source, job, patch, row)
                    return base

                config = {"component": f"model.layers[{patch.layer}].mlp.down_proj.input", "intervention": swap}
            else:
                component, unit = {
                    "heads": ("head_attention_value_output", "h"),
                    "heads-each": ("head_attention_value_output", "h.pos"),
                    "residual-each": ("block_input", "pos"),
                }[job]
                config = pv.IntervenableConfig(
                    model_type=type(self.model),
                    representations=[pv.RepresentationConfig(patch.layer, component, unit, 1)],
                    intervention_types=pv.VanillaIntervention,
                )
            self.made[key] = pv.IntervenableModel(config, model=self.model)
            self.made[key].set_device("cpu")
        return self.made[key]

    @staticmethod
    def where(job: str, group: list[tuple[int, Patch]]) -> Any:
        units, columns = [[p.unit] for _, p in group], [[p.column] for _, p in group]
        place = {"heads": [units], "residual-each": [columns], "heads-each": [[units, columns]]}.get(job)
        return None if place is None else {"sources->base": (None, place)}

    def source(self, job: str, group: list[tuple[int, Patch]]) -> Tensor:
        """What the patches of a group put in."""
        clean = self.clean[group[0][1].layer]
        heads = clean[0].unflatten(-1, (self.work.args.heads, -1))
        if job == "heads":
            return torch.stack([heads[:, p.unit][None] for _, p in group])
        if job == "heads-each":
            return torch.stack([heads[p.column, p.unit][None, None] for _, p in group])
        return torch.stack([clean[0, p.column][None] for _, p in group]) if job == "residual-each" else clean

    def run(self, job: str, patches: Sequence[Patch]) -> list[float]:
        values = [0.0] * len(patches)
        for group in by_layer(patches, 1 if job == "neurons" else self.batch):
            model, n = self.intervenable(job, group[0][1]), len(group)
            base, source = {"input_ids": self.work.corrupt.expand(n, -1).contiguous()}, self.source(job, group)
            _, out = model(base, None, self.where(job, group), source_representations=source, use_cache=False)
            for row, (i, _) in enumerate(group):
                values[i] = float(self.work.metric(out.logits[row : row + 1]))
        return values


CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "engine": Engine,
    "hook loop": Hooks,
    "batched hooks": Batched,
    "TransformerLens": TransformerLens,
    "nnsight": NNsight,
    "pyvene": PyVene,
}
