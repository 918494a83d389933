"""The families that are supported today."""

from emocircuits.families.base import Family

TEXT_TYPES = ("llama", "qwen2", "mistral")

LLAVA = Family(
    name="llava",
    model_types=("llava", "llava_next", "llava_onevision"),
    backbone="model",
    text="model.language_model",
    text_types=TEXT_TYPES,
    placeholders=("image_token_id", "video_token_id"),
)

TEXT = Family(name="text", model_types=TEXT_TYPES, backbone="model", text="model", text_types=TEXT_TYPES)

FAMILIES = (LLAVA, TEXT)
