"""Presets that change attention on its way from keys to rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from emocircuits.edits import ROLE_NAMES, BoostRoute, Edit, GateRoute
from emocircuits.plan import Plan
from emocircuits.presets.registry import preset
from emocircuits.presets.where import ANSWER, Pairs, chosen_heads, opened

Rows = Sequence[int] | None
TEXT = ("query", "last", "generated")


@preset(
    formula="s' = s + α|s| for visual keys, in the rows that emit a token, all heads of the layers",
    paper="Liu et al. 2024, Paying More Attention to Image (PAI), arXiv 2407.21771",
    needs="a vision-language model",
)
def pai(model: nn.Module, alpha: float = 0.2, *, layers: Iterable[int] | None = None, rows: Rows = None) -> Plan:
    """PAI's inference intervention: ``s' = s + alpha * |s|`` on visual keys, then softmax.

    The rows are the last prompt row and every generated one (the official code, github.com/LALBJ/PAI attention.py,
    edits ``attn_weights[:, :, -1, image]`` before the softmax at every step).

    Args:
        model: a vision-language model; only its sizes are read.
        alpha: strength; 0.2 is the example of the official README. 0 changes nothing.
        layers: by default all but the first two, the README's ``--start-layer 2``.
        rows: batch rows (None: all).

    The second half of PAI, guidance at the logits, is :func:`pai_guidance`.
    """
    geometry = opened(model, sees="pai").geometry
    heads = chosen_heads("pai", geometry, layers, None, range(2, geometry.layers))
    return Plan([BoostRoute(heads, "visual", alpha, "logit-abs", to=ANSWER, rows=rows)])


@preset(
    formula="s' = γ·s for visual keys, s' = δ·s for system keys, in all rows after the image, middle layers",
    paper="Yin et al. 2025, ClearSight: visual amplification fusion (VAF), arXiv 2503.13107",
    needs="a vision-language model; layers, unless it has 32",
)
def vaf(
    model: nn.Module,
    enhance: float = 1.15,
    suppress: float = 0.95,
    *,
    layers: Iterable[int] | None = None,
    heads: Pairs | None = None,
    rows: Rows = None,
) -> Plan:
    """Visual amplification fusion: attention logits times ``enhance`` on visual keys, ``suppress`` on system keys.

    The rows are the text after the image and every generated row. Official code: github.com/ustc-hyin/ClearSight,
    visaug/inference/AttnAdapter.py; both factors multiply before the mask and the softmax, in all heads (the paper also
    speaks of a restriction to visual perception heads: name them with ``heads``).

    Args:
        model: a vision-language model; only its sizes are read.
        enhance: factor on visual keys (README: 1.15); 1 changes nothing.
        suppress: factor on the text before the image (README: 0.95); 1 changes nothing.
        layers: the official code takes 9 to 14 of LLaVA-1.5-7B's 32, the default for models of that depth; name them
            for others.
        heads: (layer, head) pairs instead of all heads of ``layers``.
        rows: batch rows (None: all).
    """
    geometry = opened(model, sees="vaf").geometry
    if heads is None and layers is None and geometry.layers != 32:
        raise ValueError(
            f"vaf was published for layers 9 to 14 of 32; this model has {geometry.layers}: name the middle layers "
            "that fuse image and text (layers=[...])"
        )
    heads = chosen_heads("vaf", geometry, layers, heads, range(9, 15))
    return Plan(
        [
            BoostRoute(heads, "visual", enhance, "logit-scale", to=TEXT, rows=rows),
            BoostRoute(heads, "system", suppress, "logit-scale", to=TEXT, rows=rows),
        ]
    )


@preset(
    formula="p' = t·p for text keys after the image, where these sum to τ or more, p' = v·p for visual keys, not "
    "renormalised; hallucination heads",
    paper="Yang et al. 2025, Modular Attribution and Intervention (AD-HH), ICLR 2025",
    needs="the hallucination heads",
)
def adhh(
    model: nn.Module,
    heads: Pairs,
    text: float = 0.0,
    image: float = 1.0,
    *,
    threshold: float | None = None,
    rows: Rows = None,
) -> Plan:
    """Reweight what hallucination heads read: softmax weights times ``text`` or ``image``, not renormalised.

    The rows are the last prompt row and every generated one; "text" are the keys after the image. With a ``threshold``
    this is adaptive deactivation (AD-HH): at steps where a head's text weights sum to it or more they are set to 0.
    Without one it is the reweighting of the paper's figure 6. Code: github.com/TianyunYoung/Hallucination-Attribution;
    its modified attention was read in a fork of it, and that the factors of figure 6 are not renormalised either was
    not confirmed.

    Args:
        model: a vision-language model; only its sizes are read.
        heads: (layer, head) pairs. The official scripts take 20 for LLaVA-1.5-7B, 10 for MiniGPT-4.
        text: factor on text keys after the image; 0 deactivates them, 1 changes nothing.
        image: factor on visual keys, at every step; 1 changes nothing. Not together with a threshold.
        threshold: weight on text from which a head is deactivated; 0.5 in the official script for MiniGPT-4. None: at
            every step.
        rows: batch rows (None: all).
    """
    opened(model, sees="adhh")
    if threshold is not None:
        if image != 1.0:
            raise ValueError("adhh with a threshold changes text weights only; leave image at 1")
        return Plan([GateRoute(heads, TEXT, text, threshold, to=ANSWER, rows=rows)])
    edits: list[Edit] = []
    for source, by in ((TEXT, text), (("visual",), image)):
        if by != 1.0:
            edits.append(BoostRoute(heads, source, by, "weight", to=ANSWER, rows=rows))
    return Plan(edits)


@preset(
    formula="s' = -inf from keys of the sources in rows of the destinations: the rest is renormalised",
    paper="Geva et al. 2023, Dissecting Recall of Factual Associations, arXiv 2304.14767",
    needs="destination and source roles",
)
def knockout(
    model: nn.Module,
    to: str | Sequence[str],
    source: str | Sequence[str],
    *,
    layers: int | Iterable[int] | None = None,
    heads: Pairs | None = None,
    rows: Rows = None,
) -> Plan:
    """Attention knockout: rows of ``to`` no longer see keys of ``source`` (mask entries of -inf before the softmax).

    The paper blocks a window of k layers around one layer, all heads: ``layers=range(l - k // 2, l + k // 2 + 1)``
    (k = 9 for GPT-2 XL). A row left without any key attends to nothing and gets 0 from these heads.

    Args:
        model: only its sizes are read.
        to: role or roles of the rows.
        source: role or roles of the keys.
        layers: a layer or several; by default all of them.
        heads: (layer, head) pairs instead of all heads of ``layers``.
        rows: batch rows (None: all).
    """
    geometry = opened(model).geometry
    heads = chosen_heads("knockout", geometry, layers, heads, range(geometry.layers))
    to = [to] if isinstance(to, str) else to
    return Plan([BoostRoute(heads, source, 0.0, "logit-add", to=to, rows=rows)])


@preset(
    formula="p = softmax(s / τ) in the chosen heads",
    paper="the softmax temperature; no paper of its own",
    needs="nothing",
)
def temperature(
    model: nn.Module,
    tau: float,
    *,
    layers: int | Iterable[int] | None = None,
    heads: Pairs | None = None,
    to: str | Sequence[str] | None = None,
    rows: Rows = None,
) -> Plan:
    """Attention at temperature ``tau``: all logits of a row divided by it. Below 1 sharpens, above 1 flattens.

    Args:
        model: only its sizes are read.
        tau: temperature, > 0; 1 changes nothing.
        layers: a layer or several; by default all of them.
        heads: (layer, head) pairs instead of all heads of ``layers``.
        to: role or roles of the rows (None: every row).
        rows: batch rows (None: all).
    """
    handle = opened(model)
    if not tau > 0:
        raise ValueError(f"tau={tau!r}: expected a temperature above 0")
    heads = chosen_heads("temperature", handle.geometry, layers, heads, range(handle.geometry.layers))
    keys = [name for name in ROLE_NAMES if name != "visual" or handle.sees]
    to = [to] if isinstance(to, str) else to
    return Plan([BoostRoute(heads, keys, 1.0 / tau, "logit-scale", to=to, rows=rows)])
