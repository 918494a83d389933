"""Logit lens on visual tokens: what they would say, layer by layer (method.md "Analyses"; nostalgebraist 2020).

Of every row and layer: the entropy of ``softmax(W_U norm_f(h))`` in nats, and the probability of the first sub-tokens
of the pair's emotion (gold), of the other emotions, and of random tokens. Rows of text are read in the same way, for
comparison. The ``[N, vocabulary]`` matrix is never formed.
"""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.circuits.averages import average, corrected, differs, plain
from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.stored import read_record, read_tables, write_tables
from emocircuits.circuits.subject import Subject
from emocircuits.families import Handle, open_model
from emocircuits.files import write_json
from emocircuits.measure import capture
from emocircuits.sweep.readout import scaled
from emokernels import Role, logit_lens
from emokernels.lens import token_matrix

FORMAT = "emocircuits.lens/1"
FILE, TENSORS = "lens.json", "lens.safetensors"
GROUPS = ("visual", "query", "last")
LEAST_DRAWS = 10
TABLES = ("entropy", "gold", "others", "random")


class Rows(NamedTuple):
    """The lens of single rows: entropy ``[L, T]``, probabilities ``[L, T, S]``; prompt and role of each row ``[T]``."""

    entropy: Tensor
    probability: Tensor
    prompt: Tensor
    role: Tensor


@dc.dataclass(frozen=True, eq=False)
class Lens:
    """The logit lens of pairs, on both sides of the unmodified model; means over the rows of a group.

    Attributes:
        entropy: ``[2, pairs, L, groups]`` float64 nats; emotional side first; groups are `GROUPS`, NaN where a prompt
            has no such row.
        gold: the same, probability of the first sub-tokens of the pair's emotion.
        others: the same, mean over the other emotions.
        random: ``[2, pairs, L, groups, draws]`` probability of random sets of as many tokens as gold has.
        ids, emotions: of the pairs.
        sizes: tokens of each emotion.
        settings: readings and numbers.
    """

    entropy: np.ndarray
    gold: np.ndarray
    others: np.ndarray
    random: np.ndarray
    ids: tuple[str, ...]
    emotions: tuple[str, ...]
    sizes: dict[str, int]
    settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """By group: means and intervals of both sides and of their difference, by layer, with its corrected test."""
        seed, margin = self.settings["seed"], self.settings["margin"]
        tests = {}
        for name in ("entropy", "gold"):
            table = getattr(self, name)
            sides = [self._there(table, g) for g in range(len(GROUPS))]
            tests[name] = np.stack([differs(plus, minus, margin=margin) for plus, minus in sides], axis=-1)
        # One correction over all that is tested.
        q = dict(zip(tests, corrected(np.stack(list(tests.values()))), strict=True))
        found: dict[str, Any] = {}
        for g, group in enumerate(GROUPS):
            record: dict[str, Any] = {"n": int(self._whole(g).sum())}
            for s, side in enumerate(SIDES):
                tables = {t: self._there(getattr(self, t), g)[s] for t in TABLES}
                draws = tables.pop("random")
                record[side] = {t: average(values, seed=seed).json() for t, values in tables.items()}
                record[side]["random"] = average(draws.mean(-1), seed=seed).json()
                of_draws = average(draws).mean  # [L, draws]
                above = (tables["gold"].mean(0)[:, None] > of_draws).sum(-1) if len(draws) else np.zeros(len(of_draws))
                record[side]["random"] |= {"draws": plain(of_draws), "gold_above": [int(a) for a in above]}
            record["difference"] = {}
            for name in tests:
                plus, minus = self._there(getattr(self, name), g)
                told = average(plus - minus, seed=seed).json()
                record["difference"][name] = told | {"p": plain(tests[name][:, g]), "q": plain(q[name][:, g])}
            found[group] = record
        return found

    def _whole(self, group: int) -> np.ndarray:
        return np.asarray(np.isfinite(self.entropy[:, :, :, group]).all((0, 2)))

    def _there(self, table: np.ndarray, group: int) -> np.ndarray:
        """``[2, n, L, ...]`` of the pairs that have such rows."""
        return np.asarray(table[:, :, :, group][:, self._whole(group)])

    def save(self, folder: str | Path) -> Path:
        """Write ``lens.safetensors`` (single pairs) and, after it, ``lens.json``."""
        folder = Path(folder)
        digest = write_tables(folder / TENSORS, {n: getattr(self, n) for n in TABLES})
        record = {
            "format": FORMAT, "tensors": TENSORS, "sha256": digest, "average_over": "rows of a prompt, then pairs",
            "n": len(self.ids), "layers": self.entropy.shape[2], "settings": self.settings, "tokens": self.sizes,
            "groups": self.summary(), "ids": list(self.ids), "emotions": list(self.emotions),
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Lens:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        record = read_record(path, FORMAT, "a logit lens")
        tables = read_tables(path.parent / TENSORS, record["sha256"])
        return cls(
            tables["entropy"], tables["gold"], tables["others"], tables["random"], tuple(record["ids"]),
            tuple(record["emotions"]), record["tokens"], record["settings"],
        )  # fmt: skip


def visual_lens(
    subject: Subject, pairs: Pairs, *, draws: int = 10, batch: int = 8, margin: float = 0.01, seed: int = 0,
    progress: bool = True,
) -> Lens:  # fmt: skip
    """Read the visual tokens of both sides of every pair through the unembedding, and the text after them.

    Args:
        subject: the model.
        pairs: of the analyze split.
        draws: random sets for each emotion, out of tokens that begin no word of the lexicon.
        batch: pairs at a time; the residual stream of their rows is in memory.
        margin: differences between the sides below this share of a cell's mean count as none in the test.
        seed: of the draws and the bootstrap.
        progress: show progress bars.

    Raises:
        ValueError: fewer than ten draws, an emotion without tokens of its own, or too few tokens to draw from.
    """
    if draws < LEAST_DRAWS:
        raise ValueError(f"draws={draws}: expected at least {LEAST_DRAWS} random sets")
    lexicon, handle = subject.lexicon, subject.handle
    for emotion in pairs.emotions:
        lexicon.require(emotion)
    # The neutral emotion can be gold, where a record says so, but is none of the others.
    emotions = list(dict.fromkeys([*lexicon.emotions, *pairs.emotions]))
    tokens = {e: lexicon.first_tokens(subject.tokenizer, e) for e in emotions}
    shown = list(dict.fromkeys(pairs.emotions))
    sets = [*tokens.values(), *_random(subject, tokens, shown, draws, seed)]
    matrix = token_matrix(sets, _weight(handle).shape[0], _weight(handle).device)

    shape = (2, len(pairs), handle.geometry.layers, len(GROUPS))
    entropy, gold, others = (np.full(shape, np.nan) for _ in range(3))
    random = np.full((*shape, draws), np.nan)
    with tqdm(total=2 * len(pairs), desc="logit lens", disable=not progress) as bar:
        for s, side in enumerate(SIDES):
            for which, part in pairs.batches(batch):
                rows = lens_rows(subject.model, part.inputs(subject, side), matrix)
                for b, i in enumerate(which):
                    emotion = pairs.emotions[i]
                    rest = [n for n, e in enumerate(emotions) if e != emotion and e in lexicon.emotions]
                    first = len(emotions) + shown.index(emotion) * draws
                    for g, group in enumerate(GROUPS):
                        chosen = (rows.prompt == b) & (rows.role == int(Role[group.upper()]))
                        if not bool(chosen.any()):
                            continue
                        mean = rows.probability[:, chosen].mean(1).cpu().numpy()
                        entropy[s, i, :, g] = rows.entropy[:, chosen].mean(1).cpu().numpy()
                        gold[s, i, :, g] = mean[:, emotions.index(emotion)]
                        others[s, i, :, g] = mean[:, rest].mean(1) if rest else 0.0
                        random[s, i, :, g] = mean[:, first : first + draws]
                bar.update(len(which))
    settings = {
        "norm": "the model's final norm", "tokens": "first sub-tokens of the lexicon's words", "lexicon": lexicon.name,
        "others": "mean over the other emotions",
        "random": "as many tokens as gold, none of which begins a word of the lexicon",
        "draws": draws, "vocabulary": _weight(handle).shape[0], "model": "unmodified",
        "margin": margin, "interval": "95 % bootstrap over pairs",
        "test": "Wilcoxon, two-sided, Benjamini-Hochberg", "seed": seed,
    }  # fmt: skip
    sizes = {e: len(t) for e, t in tokens.items()}
    ids = tuple(r.id for r in pairs.records)
    return Lens(entropy, gold, others, random, ids, tuple(pairs.emotions), sizes, settings)


def _random(subject: Subject, tokens: dict[str, Tensor], shown: list[str], draws: int, seed: int) -> list[Tensor]:
    """Random sets ``[draws]`` of each emotion shown, as large as its own."""
    tokenizer, lexicon = subject.tokenizer, subject.lexicon
    taken = {*tokenizer.all_special_ids, *subject.handle.placeholder_ids(), *lexicon.beginnings(tokenizer)}
    size = _weight(subject.handle).shape[0]
    pool = np.array(sorted(i for i in set(tokenizer.get_vocab().values()) - taken if i < size))
    rng = np.random.default_rng(seed)
    found = []
    for emotion in shown:
        n = len(tokens[emotion])
        if n > len(pool):
            raise ValueError(
                f"{emotion!r} has {n} tokens, but only {len(pool)} of the vocabulary begin no word of the lexicon; "
                "random sets of that size cannot be drawn: give a lexicon with fewer words"
            )
        found += [torch.from_numpy(rng.choice(pool, n, replace=False)) for _ in range(draws)]
    return found


@torch.no_grad()
def lens_rows(
    model: nn.Module, inputs: dict[str, Tensor], token_sets: Any, *, token_roles: Tensor | None = None
) -> Rows:
    """The lens of the visual tokens of prompts and of the text after them, of every layer.

    Args:
        model: a supported model.
        inputs: of prompts.
        token_sets: as in :func:`emokernels.logit_lens`.
        token_roles: ``[B, N]`` roles, if not found from the inputs.

    Raises:
        NotImplementedError: the model's logits are not made from the last residual stream in a known way.
    """
    handle = open_model(model)
    with capture(model, "resid_post", roles=GROUPS, token_roles=token_roles) as seen:
        forward: Any = model
        logits = forward(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    index = seen.index
    assert index is not None
    states = seen["resid_post"]
    norm, cap = _finish(handle, states[-1, index.role == int(Role.LAST)], logits)
    entropies, probabilities = [], []
    for hidden in states:
        found = logit_lens(
            hidden, _weight(handle), token_sets=token_sets, norm=norm, softcap=cap,
            bias=getattr(handle.unembed, "bias", None),
        )  # fmt: skip
        assert found.set_prob is not None
        entropies.append(found.entropy.double())
        probabilities.append(found.set_prob.double())
    device = states.device
    return Rows(torch.stack(entropies), torch.stack(probabilities), index.row.to(device), index.role.to(device))


def _weight(handle: Handle) -> Tensor:
    weight = handle.unembed.weight
    assert isinstance(weight, Tensor)
    return weight


def _finish(handle: Handle, last: Tensor, logits: Tensor) -> tuple[Any, float | None]:
    """What is read of a state before the unembedding, and the cap of logits after it, as the model has them.

    Some models have a config with a scale of logits and do not use it, so both are tried on the last rows.
    """
    config: Any = handle.text_config
    plainly = handle.unembed(handle.norm(last)).float()
    error = {name: _apart(x, logits.float()) for name, x in (("as is", plainly), ("scaled", scaled(handle, plainly)))}
    best = min(error, key=lambda name: error[name])
    if error[best] > 0.05:
        raise NotImplementedError(
            f"the logits of {type(handle.model).__name__} are not the unembedding of its last residual stream; "
            "the logit lens cannot read it"
        )
    if best == "as is" or error["as is"] <= error[best]:
        return handle.norm, None
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return (lambda x: handle.norm(x) * factor), getattr(config, "final_logit_softcapping", None)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
