"""Tiny models of the published shapes: the same fields, small numbers."""

import copy

from emocircuits.overhead import SHAPES, Shape


def tiny(name: str) -> Shape:
    """The shape ``name`` with 4 layers of width 64."""
    shape = SHAPES[name]
    config = copy.deepcopy(shape.config)
    text, vision = config["text_config"], config["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    text.update(
        vocab_size=4096, hidden_size=64, intermediate_size=200, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2 if grouped else 4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if "head_dim" in text:
        text["head_dim"] = 16
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"]["mrope_section"] = [2, 3, 3]
    config.update(image_token_id=5, video_token_id=6)
    if "depth" in vision:
        vision.update(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
    else:
        vision.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    if shape.model_type == "qwen3_vl":
        vision["deepstack_visual_indexes"] = [0, 1]
    if "image_grid_pinpoints" in config:
        config["image_grid_pinpoints"] = [[56, 56], [56, 112]]
    return Shape(f"tiny {name}", shape.model_type, config, grid=(4, 4) if shape.grid[0] else (0, 0))
