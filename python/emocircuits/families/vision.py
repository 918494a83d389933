"""Vision-language families: where the text decoder is, and which tokens stand for what the model sees.

How a decoder layer is laid out belongs to the text family of ``text_config.model_type`` and is not repeated here: a
vision-language family is put around every text family (:meth:`Vision.around`). The vision tower is left alone.
"""

from __future__ import annotations

import dataclasses as dc

from emocircuits.families.base import Family


@dc.dataclass(frozen=True)
class Vision:
    """A vision-language model, apart from its text decoder.

    Visual tokens are those whose ids the config names, one for every feature that the model puts in their place, so
    that images and frames may be anywhere in the text. What a processor writes around them is text: start and end
    tokens, timestamps of frames, row and column tags, breaks between rows that the model does not fill.
    """

    name: str
    model_types: tuple[str, ...]
    text: str = "model.language_model"
    backbone: str = "model"
    placeholders: tuple[str, ...] = ("image_token_id",)
    between_layers: bool = False
    """See :attr:`Family.between_layers`."""

    def around(self, decoder: Family) -> Family:
        """The family whose text decoders are laid out as in ``decoder``."""
        return dc.replace(
            decoder, name=self.name, model_types=self.model_types, text_types=decoder.decoders, backbone=self.backbone,
            text=self.text, placeholders=self.placeholders, unembed="lm_head", between_layers=self.between_layers,
        )  # fmt: skip


IMAGES_AND_VIDEOS = ("image_token_id", "video_token_id")

LLAVA = Vision("llava", ("llava", "vipllava", "llava_next"))
"""LLaVA-NeXT's features include a newline after every row of patches, and so do its placeholders."""

LLAVA_VIDEO = Vision("llava_video", ("llava_onevision", "llava_next_video"), placeholders=IMAGES_AND_VIDEOS)

QWEN2_VL = Vision("qwen2_vl", ("qwen2_vl", "qwen2_5_vl"), placeholders=IMAGES_AND_VIDEOS)
"""Rotary positions are three-dimensional (M-RoPE): a token's column, not its position, says what it is."""

QWEN3_VL = Vision("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe"), placeholders=IMAGES_AND_VIDEOS, between_layers=True)
"""DeepStack adds features of earlier vision layers to the visual rows that leave the first text layers."""

INTERNVL = Vision("internvl", ("internvl",))
"""Frames of a video are images between lines of text."""

GEMMA3 = Vision("gemma3", ("gemma3",))
"""Tokens of one image attend to each other in both directions; the mask says so, also in sliding layers."""

PALIGEMMA = Vision("paligemma", ("paligemma",))
"""The whole prompt attends in both directions, so that a route may lead to an earlier row."""

IDEFICS = Vision("idefics", ("idefics2", "idefics3", "smolvlm"), text="model.text_model")

MISTRAL3 = Vision("mistral3", ("mistral3",))
"""Breaks between rows of patches and the end of an image are text."""

AYA_VISION = Vision("aya_vision", ("aya_vision",))

VISIONS = (
    LLAVA, LLAVA_VIDEO, QWEN2_VL, QWEN3_VL, INTERNVL, GEMMA3, PALIGEMMA, IDEFICS, MISTRAL3, AYA_VISION,
)  # fmt: skip


def around(decoders: tuple[Family, ...]) -> tuple[Family, ...]:
    """Every vision-language family around every one of these text families."""
    return tuple(vision.around(decoder) for vision in VISIONS for decoder in decoders)
