"""Information flow: how much each route of attention matters for what the model says (method.md "Analyses").

Saliency is ``|A * dL/dA|`` (Wang et al., "Label words are anchors", 2023; arXiv 2605.21980), mean over heads, summed
over a block of (destination role, source role) and divided by the number of pairs of tokens in it that attention may
connect. L is the cross-entropy of the model's own greedy answer, which is forced: all of it, or its emotion words. The
sequence ends with the row that emits the last token that L counts, so every row can matter for it.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.circuits.answers import Answer, LeftOut, forced, speaking
from emocircuits.circuits.averages import average, corrected, differs, plain
from emocircuits.circuits.pairs import SIDES, Pairs, Side
from emocircuits.circuits.passes import leaf
from emocircuits.circuits.stored import read_record, read_tables, write_tables
from emocircuits.circuits.subject import Subject
from emocircuits.families import open_model
from emocircuits.files import write_json
from emocircuits.measure import capture
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.sites import Tapped
from emocircuits.sweep.attribution.gradients import frozen
from emokernels import Role, attention_flow

FORMAT = "emocircuits.flow/1"
FILE, TENSORS = "flow.json", "flow.safetensors"
Loss = Literal["emotion words", "answer"]
R = len(Role)


class Measured(NamedTuple):
    """Sums over the blocks of every prompt, float64, mean over heads.

    Attributes:
        saliency, weights: ``[B, L, R, R]``.
        pairs: ``[B, L, R, R]`` pairs of tokens in a block.
        rows: ``[B, L, R]`` its rows.
        loss: ``[B]``.
        agree: ``[B]``, share of the targets that are the likeliest token where they should be emitted.
    """

    saliency: Tensor
    weights: Tensor
    pairs: Tensor
    rows: Tensor
    loss: Tensor
    agree: Tensor


@dc.dataclass(frozen=True, eq=False)
class Flow:
    """Information flow of pairs, on both sides of the unmodified model.

    Attributes:
        routes: (destination role, source role) of the last axis; those that occur in some pair.
        saliency: ``[2, pairs, L, routes]`` float64, emotional side first; NaN where a pair has no such tokens.
        mass: the same of attention: the mean weight that a destination row gives to all of the source's keys.
        loss: ``[2, pairs]`` mean cross-entropy, in nats, of the tokens that are counted.
        said: answers of both sides.
        ids, emotions: of the pairs.
        left_out: pairs that were not measured.
        settings: readings and numbers.
    """

    routes: tuple[tuple[str, str], ...]
    saliency: np.ndarray
    mass: np.ndarray
    loss: np.ndarray
    said: tuple[tuple[str, ...], tuple[str, ...]]
    ids: tuple[str, ...]
    emotions: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    settings: dict[str, Any]

    def of(self, to: str, source: str, side: Side = "emotional") -> np.ndarray:
        """Saliency ``[pairs, L]`` of one route; ``ValueError`` where it does not occur."""
        if (to, source) not in self.routes:
            raise ValueError(f"no route {to} <- {source}; there are {', '.join(f'{a} <- {b}' for a, b in self.routes)}")
        return np.asarray(self.saliency[SIDES.index(side), :, :, self.routes.index((to, source))])

    def summary(self) -> list[dict[str, Any]]:
        """By route: mean and interval of both sides and of their difference, by layer, with its corrected test."""
        seed = self.settings["seed"]
        p = np.full(self.saliency.shape[2:], np.nan)
        there = np.isfinite(self.saliency).all((0, 2))
        for n in {tuple(t) for t in there.T}:
            # Routes that the same pairs have are tested at once; the correction follows over all of them.
            which = [i for i in range(len(self.routes)) if tuple(there[:, i]) == n]
            both = self.saliency[:, list(n)][..., which]
            p[:, which] = differs(both[0], both[1], margin=self.settings["margin"])
        q = corrected(p)
        found = []
        for i, (to, source) in enumerate(self.routes):
            record: dict[str, Any] = {"to": to, "source": source, "n": int(there[:, i].sum())}
            for name, table in (("saliency", self.saliency), ("mass", self.mass)):
                sides = table[..., i][:, there[:, i]]
                record[name] = {s: average(sides[j], seed=seed).json() for j, s in enumerate(SIDES)}
                record[name]["difference"] = average(sides[0] - sides[1], seed=seed).json()
            record["saliency"]["difference"] |= {"p": plain(p[:, i]), "q": plain(q[:, i])}
            found.append(record)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write ``flow.safetensors`` (single pairs) and, after it, ``flow.json``."""
        folder = Path(folder)
        digest = write_tables(folder / TENSORS, {n: getattr(self, n) for n in ("saliency", "mass", "loss")})
        record = {
            "format": FORMAT, "tensors": TENSORS, "sha256": digest, "average_over": "pairs",
            "n": len(self.ids), "layers": self.saliency.shape[2], "settings": self.settings, "routes": self.summary(),
            "pairs": [
                {"id": i, "emotion": e, "said": {"emotional": a, "neutral": b}, "loss": plain(self.loss[:, n])}
                for n, (i, e, a, b) in enumerate(zip(self.ids, self.emotions, *self.said, strict=True))
            ],
            "left_out": [dc.asdict(x) for x in self.left_out],
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Flow:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        record = read_record(path, FORMAT, "information flow")
        tensors = read_tables(path.parent / TENSORS, record["sha256"])
        pairs = record["pairs"]
        return cls(
            tuple((r["to"], r["source"]) for r in record["routes"]), tensors["saliency"], tensors["mass"],
            tensors["loss"], (tuple(p["said"]["emotional"] for p in pairs), tuple(p["said"]["neutral"] for p in pairs)),
            tuple(p["id"] for p in pairs), tuple(p["emotion"] for p in pairs),
            tuple(LeftOut(**x) for x in record["left_out"]), record["settings"],
        )  # fmt: skip


def information_flow(
    subject: Subject, pairs: Pairs, *, loss: Loss = "emotion words", wordless: str = "refuse", batch: int = 8,
    margin: float = 0.01, seed: int = 0, progress: bool = True,
) -> Flow:  # fmt: skip
    """Measure the flow of both sides of every pair, on the unmodified model.

    Args:
        subject: the model.
        pairs: of the analyze split.
        loss: "emotion words" of the answer (default; words of the neutral emotion are among them), or all of the
            "answer", without the token that ends it. The mean over these tokens, of every pair alike.
        wordless: "refuse" answers without an emotion word (default), or "leave out" their pairs.
        batch: pairs at a time; their activations and gradients are in memory.
        margin: differences between the sides below this share of a cell's mean count as none in the test.
        seed: of the bootstrap.
        progress: show progress bars.

    Raises:
        ValueError: an unknown reading, or answers that name no emotion.
    """
    if loss not in ("emotion words", "answer"):
        raise ValueError(f"loss={loss!r}: expected 'emotion words' or 'answer'")
    pairs, said, left_out = speaking(subject, pairs, wordless=wordless, batch=max(batch, 32), progress=progress)
    layers = subject.handle.geometry.layers
    sums = np.zeros((4, 2, len(pairs), layers, R, R))
    losses, agree = np.zeros((2, len(pairs))), np.zeros((2, len(pairs)))
    with tqdm(total=2 * len(pairs), desc="information flow", disable=not progress) as bar:
        for side, name in enumerate(SIDES):
            for which, part in pairs.batches(batch):
                answers = [said[name][i] for i in which]
                inputs, roles, targets = _sequences(subject, part, name, answers, loss)
                found = route_flow(subject.model, inputs, roles, targets)
                for i, table in enumerate((found.saliency, found.weights, found.pairs)):
                    sums[i, side, which] = table.cpu().numpy()
                sums[3, side, which] = found.rows.cpu().numpy()[..., None]
                losses[side, which] = found.loss.cpu().numpy()
                agree[side, which] = found.agree.cpu().numpy()
                bar.update(len(which))
    saliency, weights, count, rows = sums
    named = [(a, b) for a in Role for b in Role if Role.PAD not in (a, b) and count[..., a, b].any()]
    to, source = ([int(r[i]) for r in named] for i in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        blocks = (saliency / count)[..., to, source]
        mass = np.where(count > 0, weights / rows, np.nan)[..., to, source]
    settings = {
        "loss": loss, "answer": "the model's own, greedy, forced", "of_tokens": "mean", "heads": "mean",
        "divided_by": "pairs of tokens that attention may connect", "model": "unmodified", "wordless": wordless,
        "lexicon": subject.lexicon.name, "asked": len(pairs) + len({x.id for x in left_out}), "margin": margin,
        # Below 1 where generation is more than the likeliest token (penalties), or rounding decides.
        "forced_tokens_likeliest": float(agree.mean()),
        "interval": "95 % bootstrap over pairs", "test": "Wilcoxon, two-sided, Benjamini-Hochberg", "seed": seed,
    }  # fmt: skip
    texts = [tuple(a.text for a in said[s]) for s in SIDES]
    return Flow(
        tuple((a.name.lower(), b.name.lower()) for a, b in named), blocks, mass, losses, (texts[0], texts[1]),
        tuple(r.id for r in pairs.records), tuple(pairs.emotions), left_out, settings,
    )  # fmt: skip


def _sequences(
    subject: Subject, pairs: Pairs, side: Side, answers: list[Answer], loss: Loss
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs, roles and targets (see `route_flow`): prompts with as much of the answer as the loss needs."""
    counted = [
        [k for w in a.words for k in range(w.start, w.stop)] if loss == "emotion words" else list(range(len(a.ids)))
        for a in answers
    ]
    tails = [a.ids[: max(places)] for a, places in zip(answers, counted, strict=True)]
    inputs, roles = forced(subject, pairs.inputs(subject, side), tails)
    targets = torch.full_like(inputs["input_ids"], -1)
    for b, (answer, tail, places) in enumerate(zip(answers, tails, counted, strict=True)):
        last = targets.shape[1] - 1 - len(tail)  # the last column of the prompt emits the first token
        for k in places:
            targets[b, last + k] = answer.ids[k]
    return inputs, roles, targets


def route_flow(model: nn.Module, inputs: dict[str, Tensor], roles: Tensor, targets: Tensor) -> Measured:
    """Saliency and weights of every route, in one forward and one backward pass through the decoder.

    Args:
        model: a supported model, not patched.
        inputs: of prompts, padded on the left.
        roles: ``[B, N]`` uint8.
        targets: ``[B, N]`` int64: the token that a row should emit, -1 where it does not count.

    Raises:
        ValueError: a prompt without a target.
    """
    counts = targets >= 0
    if not bool(counts.any(1).all()):
        raise ValueError(
            f"prompts {(~counts.any(1)).nonzero().flatten().tolist()} have no target; name a token to emit"
        )
    handle, calls = open_model(model), dict[int, Tapped]()
    first = int(counts.any(0).nonzero().min())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(model))
        # Nothing below the decoder is in the graph.
        stack.callback(handle.layers[0].register_forward_pre_hook(leaf, with_kwargs=True).remove)
        stack.enter_context(patch(model, Plan(), roles=roles, tap=lambda call: calls.update({call.layer: call})))
        seen = stack.enter_context(capture(model, "z", detach=False))
        forward: Any = model
        logits = forward(**inputs, use_cache=False, logits_to_keep=targets.shape[1] - first).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        wanted = targets[:, first:]
        chosen = wide.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
        loss = -(chosen * (wanted >= 0)).sum(1) / counts.sum(1)
        agree = (logits.argmax(-1) == wanted).sum(1) / counts.sum(1)
        # Rows of a batch do not touch each other: gradients of the sum are those of each.
        # In float16 they would vanish where the answer is nearly certain.
        factor = 1024.0 if logits.dtype == torch.float16 else 1.0
        gradients = seen.gradients(factor * loss.sum(), [("z", layer) for layer in range(len(handle.layers))])
    tables: list[list[Tensor]] = [[], [], [], []]
    with torch.no_grad():
        for layer, gradient in enumerate(gradients):
            call = calls.pop(layer)
            same: dict[str, Any] = dict(
                roles=call.roles, query_roles=call.query_roles, mask=call.mask, causal=call.causal, scale=call.scale,
                softcap=call.softcap,
            )  # fmt: skip
            q, k, v = (x.detach() for x in (call.q, call.k, call.v))
            tables[0].append(attention_flow(q, k, v, grad_z=gradient.transpose(1, 2).to(q), **same).mean(1))
            tables[1].append(attention_flow(q, k, **same).mean(1))
            of_pairs, of_rows = _counts(call)
            tables[2].append(of_pairs)
            tables[3].append(of_rows)
    saliency, weights, of, rows = (torch.stack(t, 1).double() for t in tables)
    return Measured(saliency / factor, weights, of, rows, loss.detach().double(), agree.double())


def _counts(call: Tapped) -> tuple[Tensor, Tensor]:
    """Pairs of tokens that attention may connect, by route ``[B, R, R]``, and rows of each role ``[B, R]``."""
    batch, _, n, _ = call.q.shape
    keys = call.k.shape[2]
    if call.mask is None:
        visible = torch.ones(1, n, keys, dtype=torch.bool, device=call.q.device)
        visible = visible.tril(keys - n) if call.causal else visible
    else:
        visible = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
        visible = visible.any(1)
    to, source = (
        nn.functional.one_hot(r.long().to(call.q.device), R).double().expand(batch, -1, -1)
        for r in (call.query_roles, call.roles)
    )
    return torch.einsum("bnd,bnk,bks->bds", to, visible.double().expand(batch, -1, -1), source), to.sum(1)
