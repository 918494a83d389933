"""The demo's result as text for a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = {"baseline": "untouched model", "veena": "VEENA", "vee": "VEE alone", "ena": "ENA alone"}
SITUATIONS = {"agreeing": "event agrees with the face", "neutral": "neutral faces", "full": "full intensity"}


def verdict(result: dict[str, Any], variant: str) -> str:
    """Whether a variant beats its random controls, as a phrase that stands beside its numbers."""
    draws = result["n"]["draws"]
    controls = result["hit_rate"]["random_controls" if variant == "veena" else f"random_controls_{variant}"]
    own = result["hit_rate"][variant]
    better = sum(own > c for c in controls)
    if better == draws:
        return f"beats all {draws} random controls"
    return f"DOES NOT beat its controls: above {better} of {draws}"


def text(result: dict[str, Any]) -> str:
    """Everything a reader wants first, whatever came out."""
    hit, prior, n = result["hit_rate"], result["prior_rate"], result["n"]
    lines = [
        "",
        f"Weak faces with contradicting events (n = {n['weak']}), identities used for nothing else:",
        "",
        f"  {'':16} {'hit rate':>9} {'random controls':>18} {'says the event':>15} {'random controls':>18}",
        f"  {NAMES['baseline']:16} {hit['baseline']:9.3f} {'':18} {prior['baseline']:15.3f}",
    ]
    for variant in ("veena", "vee", "ena"):
        key = "random_controls" if variant == "veena" else f"random_controls_{variant}"
        a, b = np.array(hit[key]), np.array(prior[key])
        lines.append(
            f"  {NAMES[variant]:16} {hit[variant]:9.3f} {f'{a.mean():.3f} (max {a.max():.3f})':>18} "
            f"{prior[variant]:15.3f} "
            f"{f'{b.mean():.3f} (min {b.min():.3f})':>18}  {verdict(result, variant)}"
        )
    c = result["comparisons"]["veena"]["hit"]
    lines += [
        "",
        f"  VEENA - untouched: hit {c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}], "
        f"{c['gained']} gained, {c['lost']} lost, McNemar p = {c['p_value']:.2g}",
        "",
        "What it costs (hit rate without -> with VEENA):",
    ]
    for key, name in SITUATIONS.items():
        c = result["cost"][key]
        lines.append(
            f"  {name:28} {c['baseline']:.3f} -> {c['treated']:.3f}  "
            f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]"
            f"  n = {n[key]}"
        )
    o, v = result["overhead"], result["chosen"]["veena"]
    lines += [
        f"  time per token               {o['without'] / o['tokens'] * 1e3:.2f} -> "
        f"{o['with_plan'] / o['tokens'] * 1e3:.2f} ms"
        f"  ratio {o['ratio']:.3f} [{o['low']:.3f}, {o['high']:.3f}]  batch {o['batch']}, SDPA without",
        "",
        f"Chosen: {v['heads']} heads, beta {v['beta']:g} ({v['reading']}, {v['where']}"
        f"{', last row too' if v['last'] else ''}), "
        f"{v['neurons']} neurons, gamma {v['gamma']:g} ({v['ena_phase']})",
        f"Model restored bit for bit: {result['restored_bitwise']}",
        "",
    ]
    for row in result["sentences"]:
        case = row["case"]
        lines += [
            f"  {case['emotion']} face at {case['intensity']:g}, event suggests {case['suggests']}: "
            f"{case['event']}  [{row['outcome']}]",
            f"    without: {row['before']}",
            f"    with:    {row['after']}",
        ]
    return "\n".join(lines)
