"""Presets that decode from several prompts at once: VCD, ICD, and the guidance of PAI."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emocircuits.presets.contrast import Contrast, Inputs
from emocircuits.presets.registry import preset

STEPS = 1000
PIXELS = ("pixel_values", "pixel_values_videos")


@preset(
    kind="contrast",
    formula="log p = (1 + α) log p(y|image) - α log p(y|noised image), where p(y|image) ≥ β max p",
    paper="Leng et al. 2024, Visual Contrastive Decoding (VCD), arXiv 2311.16922",
    needs="a prompt with an image",
)
def vcd(
    model: nn.Module,
    inputs: Inputs,
    alpha: float = 1.0,
    beta: float = 0.1,
    *,
    step: int = 500,
    generator: torch.Generator | None = None,
) -> Contrast:
    """Visual contrastive decoding: against the same prompt with a noised image (see :func:`vcd_noise`).

    Official code: github.com/DAMO-NLP-SG/VCD, vcd_utils/vcd_sample.py. It combines logits,
    ``(1 + alpha) l - alpha l'``, and masks tokens with ``l < max l + log(beta)``: the same distribution, since logits
    and log-probabilities of a row differ by a constant.

    Args:
        model: a vision-language model, patched or not.
        inputs: what its processor returned, B prompts, left-padded.
        alpha: strength of the contrast; 0 is regular decoding. The script for LLaVA-1.5 on POPE uses 1.
        beta: plausibility; the code's default is 0.1, that script uses 0.2.
        step: diffusion step of the noise, 0 to 999; that script uses 500.
        generator: of the noise, on the device of the pixels.
    """
    names = [name for name in PIXELS if inputs.get(name) is not None]
    if not names:
        raise ValueError("vcd needs inputs with pixel_values: the contrast is to a noised image")
    noised = {name: vcd_noise(inputs[name], step, generator=generator) for name in names}
    return Contrast(model, [inputs, {**inputs, **noised}], (1.0 + alpha, -alpha), beta)


@preset(
    kind="contrast",
    formula="log p = (1 + α) log p(y|prompt) - α log p(y|disturbed prompt), where p(y|prompt) ≥ β max p",
    paper="Wang et al. 2024, Instruction Contrastive Decoding (ICD), arXiv 2403.18715",
    needs="the same questions under a disturbing instruction",
)
def icd(model: nn.Module, inputs: Inputs, disturbed: Inputs, alpha: float = 1.0, beta: float = 0.1) -> Contrast:
    """Instruction contrastive decoding: against the same image under an instruction that invites hallucination.

    Official code: github.com/p1k0pan/ICD, icd_utils/icd_sample.py, the combination and mask of VCD; for LLaVA it puts
    the disturbance in place of the system prompt, such as "You are a confused objects detector to provide a fuzzy
    overview or impression of the image." For InstructBLIP it goes to the Q-Former, which is not expressed here.

    Args:
        model: a vision-language model, patched or not.
        inputs: what its processor returned, B prompts, left-padded.
        disturbed: the same for the prompts with the disturbing instruction, in the same order.
        alpha: strength of the contrast (official script for LLaVA: 1); 0 is regular decoding.
        beta: plausibility (official script: 0.1).
    """
    return Contrast(model, [inputs, disturbed], (1.0 + alpha, -alpha), beta)


@preset(
    kind="contrast",
    formula="log p = γ log p(y|image, text) + (1 - γ) log p(y|text), where p(y|image, text) ≥ 0.1 max p",
    paper="Liu et al. 2024, Paying More Attention to Image (PAI), arXiv 2407.21771",
    needs="the same prompts without their image",
)
def pai_guidance(
    model: nn.Module, inputs: Inputs, text: Inputs, gamma: float = 1.1, plausibility: float = 0.1
) -> Contrast:
    """PAI's refinement of the logits: away from what the text alone suggests.

    Official code: github.com/LALBJ/PAI, CFG.py: ``gamma * (log p - log p_text) + log p_text``, masked where
    ``log p < max log p + log(0.1)``; the text branch runs without :func:`pai`. Both halves together::

        guided = pai_guidance(model, inputs, text)
        with patch(model, guided.plan(pai(model))):
            tokens = guided.generate(max_new_tokens=64)

    Args:
        model: a vision-language model, patched or not.
        inputs: what its processor returned, B prompts, left-padded.
        text: the same prompts without their images, in the same order.
        gamma: guidance; 1 is regular decoding, 1.1 the example of the official README.
        plausibility: 0.1 in the official code.
    """
    return Contrast(model, [inputs, text], (gamma, 1.0 - gamma), plausibility)


def vcd_noise(pixels: Tensor, step: int = 500, *, generator: torch.Generator | None = None) -> Tensor:
    """VCD's distorted image: ``sqrt(a) * pixels + sqrt(1 - a) * noise``, normal noise.

    ``a`` is the product of ``1 - b_t`` up to ``step``, with ``b_t = sigmoid(x_t) * (0.005 - 0.00001) + 0.00001`` for
    1000 values ``x_t`` from -6 to 6 (vcd_utils/vcd_add_noise.py of the official code).

    Args:
        pixels: what the image processor returned, any shape and float dtype.
        step: 0 (almost no noise) to 999.
        generator: on the device of ``pixels``; None is torch's default generator.
    """
    if not 0 <= step < STEPS:
        raise ValueError(f"step={step}: expected a diffusion step from 0 to {STEPS - 1}")
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step])
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=torch.float32).to(pixels.dtype)
    noised = kept**0.5 * pixels + (1 - kept) ** 0.5 * noise
    if pixels.ndim < 5:
        return noised
    # [rows, images or tiles, ...]: what is zero all over pads rows that hold fewer, and models tell it by that.
    return noised.masked_fill((pixels == 0).flatten(2).all(-1)[(..., *[None] * (pixels.ndim - 2))], 0.0)
