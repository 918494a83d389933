"""The families that are supported today."""

from emocircuits.families.base import Family
from emocircuits.families.text import TEXT_FAMILIES

LLAVA = Family(
    name="llava",
    model_types=("llava", "llava_next", "llava_onevision"),
    backbone="model",
    text="model.language_model",
    text_types=("llama", "qwen2", "mistral"),
    placeholders=("image_token_id", "video_token_id"),
)

FAMILIES = (LLAVA, *TEXT_FAMILIES)
