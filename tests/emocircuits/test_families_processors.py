"""Visual roles are the placeholders that the processors of transformers put into a prompt, and nothing around them.

Processors are built offline: their own classes, image processors that need no torchvision, and a tokenizer of single
characters whose special tokens have the ids of the tiny models, which then run what the processor made. Video
processors need torchvision: a stand-in gives pixels and metadata, and the processor's own code writes the prompt.
Mistral 3's processor cannot be imported without torchvision: `families_vision_models.lines` writes what its
``replace_image_token`` does, and test_families_vision.py checks it. PaliGemma 2 has PaliGemma's processor, and
Qwen3-VL-MoE has Qwen3-VL's.
"""

import importlib

import numpy as np
import oracle
import oracle_layouts
import pytest
import torch
import transformers
from families_vision_models import END, IMAGE, START, VIDEO, VISION
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, ProcessorMixin

from emocircuits import Plan, patch
from emokernels import Role

WORDS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.<>F:"


def tokenizer(image, video="<video>", start="<start>", end="<end>", more=(), **named):
    """One token a character, and special tokens with the ids that the tiny models know them by."""
    ids = {0: "<pad>", 1: "<s>", 2: "</s>", END: end, 4: "<unk>", IMAGE: image, VIDEO: video, START: start}
    ids |= dict(enumerate([*WORDS, *more], 8))
    assert max(ids) < 64
    vocabulary = Tokenizer(models.WordLevel({token: i for i, token in ids.items()}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    vocabulary.add_special_tokens([token for token in ids.values() if len(token) > 1])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    for name, token in named.items():
        setattr(fast, name, token)
        setattr(fast, f"{name}_id", vocabulary.token_to_id(token))
    return fast


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


class Frames:
    """Stands in for a video processor: the pixels of a video of so many frames, as the family's own would give them."""

    merge_size, temporal_patch_size = 2, 2

    def __init__(self, grid=None, key="pixel_values_videos"):
        self.grid, self.key = grid, key

    def __call__(self, videos, **kwargs):
        g = torch.Generator().manual_seed(0)
        if self.grid is None:
            return BatchFeature({self.key: torch.randn(len(videos), len(videos[0]), 3, 8, 8, generator=g)})
        grid = torch.tensor([self.grid] * len(videos))
        n = int(grid.prod(-1).sum())
        facts = transformers.video_utils.VideoMetadata(
            total_num_frames=2 * self.grid[0], fps=2.0, frames_indices=list(range(2 * self.grid[0]))
        )
        return BatchFeature({
            self.key: torch.randn(n, 3 * 2 * 4 * 4, generator=g), "video_grid_thw": grid,
            "video_metadata": [facts] * len(videos),
        })  # fmt: skip


def sized(name, side, **options):
    return getattr(transformers, name)(size={"height": side, "width": side}, **options)


def clip(name="CLIPImageProcessorPil", **options):
    return getattr(transformers, name)(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, **options
    )  # fmt: skip


PINPOINTS = [[8, 8], [8, 16], [16, 8]]
TWO = [picture(9, 12), picture(16, 8)]
CLIP_TEXT = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def llava():
    return transformers.LlavaProcessor(clip(), tokenizer("<image>"), **CLIP_TEXT), "ab <image> c <image>.", TWO, None


def llava_next():
    image = clip("LlavaNextImageProcessorPil", image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaNextProcessor(image, tokenizer("<image>"), **CLIP_TEXT)
    return processor, "ab <image> c <image>.", TWO, None


def llava_next_video():
    image = clip("LlavaNextImageProcessorPil", image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaNextVideoProcessor(Frames(), image, tokenizer("<image>"), **CLIP_TEXT)
    return processor, "ab <image> c <video> d <image>.", TWO, 3


def llava_onevision():
    image = sized("LlavaOnevisionImageProcessorPil", 8, image_grid_pinpoints=PINPOINTS)
    processor = transformers.LlavaOnevisionProcessor(
        image, tokenizer("<image>"), Frames(), num_image_tokens=4, vision_feature_select_strategy="full"
    )
    return processor, "ab <video> c <image>.", TWO[:1], 3


def qwen(version):
    def build():
        image = transformers.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 400}
        )
        words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        processor = getattr(transformers, f"{version}Processor")(image, words, Frames([3, 2, 4]))
        seen = "<|vision_start|><|image_pad|><|vision_end|>"
        film = "<|video_pad|>" if version == "Qwen3VL" else "<|vision_start|><|video_pad|><|vision_end|>"
        return processor, f"ab {seen} c {film} d {seen}.", TWO, 6

    return build


def internvl():
    words = tokenizer(
        "<IMG_CONTEXT>", start="<img>", end="</img>", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    image = sized("GotOcr2ImageProcessorPil", 8, min_patches=1, max_patches=4)
    processor = transformers.InternVLProcessor(image, words, Frames(), image_seq_length=4)
    return processor, "ab <IMG_CONTEXT> c <video> d <IMG_CONTEXT>.", [picture(8, 24), picture(8, 8)], 2


def gemma3():
    names = dict(boi_token="<start_of_image>", image_token="<soft>", eoi_token="<end_of_image>")
    words = tokenizer("<soft>", start="<start_of_image>", end="<end_of_image>", **names)
    processor = transformers.Gemma3Processor(sized("Gemma3ImageProcessorPil", 8), words, image_seq_length=4)
    return processor, "ab <start_of_image> c <start_of_image>.", [TWO], None


def paligemma():
    image = sized("SiglipImageProcessorPil", 8)
    image.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(image, tokenizer("<image>"))
    return processor, "<image><image>ab c.", [TWO], None


IDEFICS = [
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "<row_1_col_2>",
    "<row_2_col_1>",
    "<row_2_col_2>",
]
IDEFICS += ["<end_of_utterance>"]


def idefics2():
    image = transformers.Idefics2ImageProcessorPil(
        size={"longest_edge": 8, "shortest_edge": 8}, do_image_splitting=True
    )
    processor = transformers.Idefics2Processor(image, tokenizer("<image>", more=IDEFICS), image_seq_len=3)
    return processor, "ab <image> c <image>.", [[picture(8, 8), picture(8, 8)]], None


def idefics3():
    image = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    processor = transformers.Idefics3Processor(image, tokenizer("<image>", more=IDEFICS), image_seq_len=4)
    return processor, "ab <image> c <image>.", [TWO], None


def smolvlm():
    image = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    processor = transformers.SmolVLMProcessor(image, tokenizer("<image>", more=IDEFICS), Frames(), image_seq_len=4)
    return processor, "ab <image> c <image>.", [TWO], None


def aya_vision():
    more = ["<image>", "TILE_GLOBAL", "TILE_1", "TILE_2", "TILE", "<|IMG_LINE_BREAK|>"]
    words = tokenizer("<|IMG_PATCH|>", start="<|START_OF_IMG|>", end="<|END_OF_IMG|>", more=more)
    image = sized("GotOcr2ImageProcessorPil", 8, min_patches=1, max_patches=4)
    processor = transformers.AyaVisionProcessor(image, words, patch_size=2, img_size=8, downsample_factor=2)
    return processor, "ab <image> c <image>.", [picture(8, 16), picture(8, 8)], None


CASES = {
    "LLaVA 1.5": llava, "VipLLaVA": llava, "LLaVA-NeXT": llava_next, "LLaVA-NeXT-Video": llava_next_video,
    "LLaVA-OneVision": llava_onevision, "Qwen2-VL": qwen("Qwen2VL"), "Qwen2.5-VL": qwen("Qwen2_5_VL"),
    "Qwen3-VL": qwen("Qwen3VL"), "InternVL": internvl, "Gemma 3 (vision)": gemma3, "PaliGemma": paligemma,
    "Idefics2": idefics2, "Idefics3": idefics3, "SmolVLM": smolvlm, "Aya Vision": aya_vision,
}  # fmt: skip


FAKE = {"<fake_token_around_image>"}
TILES = {"<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"}
AROUND = {
    "Qwen2-VL": {"<|vision_start|>", "<|vision_end|>"}, "Qwen2.5-VL": {"<|vision_start|>", "<|vision_end|>"},
    "Qwen3-VL": {"<|vision_start|>", "<|vision_end|>"}, "InternVL": {"<img>", "</img>"},
    "Gemma 3 (vision)": {"<start_of_image>", "<end_of_image>"}, "Idefics2": FAKE, "Idefics3": FAKE | TILES,
    "SmolVLM": FAKE | TILES, "Aya Vision": {"<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_1", "TILE_2", "TILE_GLOBAL"},
}  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """Let processors be built without torchvision and num2words, whose parts these tests do not run."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    smolvlm = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    monkeypatch.setattr(smolvlm, "is_num2words_available", lambda: True)
    monkeypatch.setattr(smolvlm, "num2words", str, raising=False)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_visual_roles_are_the_processors_placeholders(name, stand_ins):
    """Two padded rows with images and videos between words: visual rows are those that the model fills."""
    try:
        processor, text, images, frames = CASES[name]()
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} has no image processor of {name} without torchvision")
    options = {} if frames is None else {"videos": [np.zeros((frames, 8, 8, 3), dtype=np.uint8)] * 2}
    made = processor(images=images * 2, text=[text, f"{text} abc"], return_tensors="pt", padding=True, **options)
    unused = {"labels", "num_crops", *(() if name in ("PaliGemma", "Gemma 3 (vision)") else ("token_type_ids",))}
    inputs = {k: v for k, v in made.items() if k not in unused}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model, _ = VISION[name](torch.float32)
    entering = []
    first = oracle_layouts.decoder(model).layers[0]
    hook = first.register_forward_pre_hook(
        lambda m, a, k: entering.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with patch(model, Plan([])) as patched:
        model(**inputs)
        roles = patched.context.rows.clone()
    hook.remove()
    placeholders = processor.tokenizer.convert_ids_to_tokens([IMAGE, VIDEO])
    tokens = [processor.tokenizer.convert_ids_to_tokens(row) for row in ids]
    visual = roles == Role.VISUAL
    assert visual.tolist() == [[token in placeholders for token in row] for row in tokens]
    assert visual.sum(-1).tolist() == [int(visual[0].sum())] * 2
    assert torch.equal((entering[0] != model.get_input_embeddings()(ids)).any(-1), visual)
    assert torch.equal(roles == Role.PAD, mask == 0)
    assert (mask == 0).any()
    assert [[Role(r).name.lower() for r in row] for row in roles.tolist()] == oracle.roles_of(ids, mask, {IMAGE, VIDEO})
    around = {token for row in tokens for token in row if len(token) > 1} - {*placeholders, "<pad>", "<s>"}
    assert around == AROUND.get(name, set()), "tokens that processors put around images are text"
