"""What recognition by structure makes of every causal language model in the installed transformers.

python tests/emocircuits/families_survey.py    # some minutes; one line a model type, then counts

Every type that no family names is built tiny where its config allows it, and refused, or compared with the oracle
under a random plan. Anything but "equal" and "refused" is a bug; the exit code says so.
"""

from __future__ import annotations

import collections
import copy
import dataclasses as dc
import sys
import warnings
from typing import Any

import families_harness as harness
import oracle_layouts
import torch
import transformers
from random_plans import random_plan
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from emocircuits import patch
from emocircuits.families import FAMILIES, open_model

LARGE = 3_000_000
SIZES = harness.SIZES | dict(
    head_dim=harness.DIM, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, n_group=1, topk_group=1,
)  # fmt: skip
MIXTURES = (
    "aria_text", "cohere2_moe", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hunyuan_v1_moe", "hy_v3", "mellum",
    "minimax_m2", "minimax_m3_vl_text", "olmoe", "phimoe", "solar_open",
)  # fmt: skip
AFTER = oracle_layouts.NORMS_BEFORE_ADDING
LAYOUTS = dict.fromkeys(MIXTURES, oracle_layouts.EXPERTS) | {
    "exaone4": AFTER, "olmo3": AFTER, "flex_olmo": dc.replace(AFTER, down=None),
}  # fmt: skip
"""How those layers are built that are not laid out like Llama's, from their modeling files."""


def build(kind: str, name: str) -> Any:
    """A tiny model, or None where the common sizes do not make one."""
    try:
        make, config = getattr(transformers, name), CONFIG_MAPPING[kind](**SIZES)
        with torch.device("meta"):
            size = sum(p.numel() for p in make(config).parameters())
        return make(config) if size < LARGE else None
    except Exception:  # whatever a config or a model of any type raises
        return None


def outcome(kind: str, name: str) -> str:
    """What becomes of a plan on a model of this type."""
    model = build(kind, name)
    if model is None:
        return "not built"
    harness.finish(model, torch.float64)
    try:
        handle = open_model(model)
    except NotImplementedError as error:
        return f"refused: {str(error).split('. Known types')[0]}"
    exact, plan = copy.deepcopy(model), random_plan(handle.geometry, seed=3, visual=False)
    inputs = harness.text_inputs(2, "left")
    with patch(model, plan):
        tokens, logits = harness.generate(model, inputs)
    apart = harness.distance(logits.double(), harness.Expected(exact, inputs, plan).steps(tokens))
    return "equal" if apart < 1e-6 else f"WRONG by {apart:.1e}"


def main() -> int:
    """Print the outcomes; 1 when any is wrong."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    oracle_layouts.LAYOUTS.update(LAYOUTS)
    known = {kind for family in FAMILIES for kind in family.model_types}
    counts: collections.Counter[str] = collections.Counter()
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind not in known and name.endswith("ForCausalLM"):
            found = outcome(kind, name)
            counts[found.split(":")[0].split(" by")[0]] += 1
            print(f"{kind}: {found}", flush=True)
    print(f"transformers {transformers.__version__}: {dict(counts)}")
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
