"""A LLaVA built by hand, whose emotional circuit is known because it was put there.

An image is one colour. Per emotion, and all in subspaces of a rotated residual stream:

- layer 0, neurons ``TRIGGERS``: read the colour on visual tokens, write what was *seen*;
- layer 1, head ``READER``: query and last rows attend to visual tokens, and move what was seen to what is *meant*;
- layer 2, head ``TELLER``: the last row attends to query tokens, and moves what is meant to what is *to be said*;
- layer 3, neurons ``SPEAKERS``: read that, write the logits of the emotion's words.

The answer is one word and the end. Without a coloured image it is "calm". All other heads and neurons have small random
weights. ``kind``: "circuit"; "diffuse" (the two heads' work is shared equally by all heads of their layers, so that no
head stands out); "blind" (visual tokens have no colour: both images of a pair look the same to the language model).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.subject import Subject

EMOTIONS = ("happy", "sad", "angry", "fear")
WORDS = {
    "happy": ("glad", "merry"), "sad": ("gloomy", "tearful"), "angry": ("furious", "mad"), "fear": ("scared", "afraid"),
    "neutral": ("calm",),
}  # fmt: skip
COLOURS = {
    "happy": (230, 200, 40), "sad": (40, 60, 210), "angry": (220, 30, 30), "fear": (130, 40, 170),
    "neutral": (128, 128, 128),
}  # fmt: skip
READER, TELLER = (1, 2), (2, 1)
TRIGGERS = tuple((0, 5 + i) for i in range(4))
SPEAKERS = tuple((3, 11 + i) for i in range(4))
TEXT = (
    "user", "assistant", ":", "the", "a", "report", "is", "ready", "shop", "opens", "at", "ten", "bus", "goes", "only",
    "once", "road", "closed", "today", "my", "mom", "said", "that",
)  # fmt: skip
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WIDTH, HEADS, SIZE, NEURONS, LAYERS = 64, 4, 16, 32, 4
SIDE, PATCH = 16, 8
BACKGROUND = 0.01

# Coordinates of the residual stream, before it is rotated.
CONST, START, VISUAL, QUERY, LAST, END, NEUTRAL = range(7)
RAW, SEEN, MEANT, SAY, OUT = (range(8 + 4 * i, 12 + 4 * i) for i in range(5))


def picture(emotion: str, seed: int = 0) -> Image.Image:
    """An image of an emotion's colour, a little lighter or darker by ``seed``."""
    shade = np.random.default_rng(seed).uniform(0.92, 1.06)
    pixels = np.clip(np.array(COLOURS[emotion]) * shade, 0, 255).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (SIDE, SIDE, 3)).copy())


def prompt(event: str) -> str:
    return f"user : <image> {event} assistant :"


def subject(kind: str = "circuit", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Subject:
    """The model, as localisation takes it."""
    model, processor = build(kind, seed=seed, dtype=dtype)
    return Subject(model, processor, prompt, Lexicon(WORDS, name="planted"), limit=4)


def build(kind: str = "circuit", *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Model in eval mode and its processor."""
    torch.manual_seed(seed)
    processor = _processor()
    model = LlavaForConditionalGeneration(_config(len(processor.tokenizer))).eval()
    with torch.no_grad():
        _Builder(model, processor, kind).build()
    return model.to(dtype), processor


def _config(vocabulary: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=24,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=SIZE, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )  # fmt: skip


def _processor() -> LlavaProcessor:
    words = [*SPECIAL, *dict.fromkeys([*TEXT, *(w for ws in WORDS.values() for w in ws), "."])]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


class _Builder:
    def __init__(self, model, processor, kind):
        assert kind in ("circuit", "diffuse", "blind")
        self.model, self.processor, self.kind = model, processor, kind
        self.turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]  # columns: where each coordinate points
        self.layers = model.model.language_model.layers

    def to(self, *coordinates):
        """Directions ``[WIDTH, n]`` of coordinates."""
        return self.turn[:, list(coordinates)]

    def build(self):
        for name, weight in self.model.model.language_model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, BACKGROUND)
        self._words()
        self._eyes()
        self._triggers()
        every = range(HEADS) if self.kind == "diffuse" else None
        self._move(READER, (QUERY, LAST), VISUAL, SEEN, MEANT, every)
        self._move(TELLER, (LAST,), QUERY, MEANT, SAY, every)
        self._speakers()

    def _words(self):
        table = self.model.model.language_model.embed_tokens.weight
        ids = self.processor.tokenizer.get_vocab()
        table[:] += 6.0 * self.to(CONST)[:, 0]
        for word in (*TEXT, "."):
            table[ids[word]] += 2.0 * self.to(QUERY)[:, 0]
        for word in ("user", ":"):
            table[ids[word]] -= 2.0 * self.to(QUERY)[:, 0]
        table[ids["<s>"]] += 3.0 * self.to(START)[:, 0]
        table[ids[":"]] += 2.0 * self.to(LAST)[:, 0] + 2.5 * self.to(NEUTRAL)[:, 0]
        out = self.model.lm_head.weight
        out.normal_(0, BACKGROUND)
        for i, emotion in enumerate(EMOTIONS):
            for rank, word in enumerate(WORDS[emotion]):
                table[ids[word]] += 6.0 * self.to(END)[:, 0]
                out[ids[word]] += (3.0 - rank) * self.to(OUT[i])[:, 0]
        table[ids["calm"]] += 6.0 * self.to(END)[:, 0]
        out[ids["calm"]] += 3.0 * self.to(NEUTRAL)[:, 0]
        out[ids["</s>"]] += 3.0 * self.to(END)[:, 0]

    def _eyes(self):
        """The projector is solved for: features of a coloured patch become the coordinates of that colour."""
        projector, tower = self.model.model.multi_modal_projector, self.model.model.vision_tower
        projector.linear_1.weight.normal_(0, 1.0)
        projector.linear_1.bias.normal_(0, 1.0)
        features, wanted = [], []
        for emotion in (*EMOTIONS, "neutral"):
            for seed in range(12):
                pixels = self.processor.image_processor(picture(emotion, seed), return_tensors="pt")["pixel_values"]
                seen = tower(pixels, output_hidden_states=True).hidden_states[-1][0, 1:]
                goal = 6.0 * self.to(CONST)[:, 0] + 2.0 * self.to(VISUAL)[:, 0]
                if emotion != "neutral" and self.kind != "blind":
                    goal = goal + 2.0 * self.to(RAW[EMOTIONS.index(emotion)])[:, 0]
                features.append(projector.act(projector.linear_1(seen)))
                wanted.append(goal.expand(len(seen), -1))
        x = torch.cat(features).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        solved = torch.linalg.lstsq(x, torch.cat(wanted).double(), driver="gelsd").solution.float()
        projector.linear_2.weight[:] = solved[:-1].T
        projector.linear_2.bias[:] = solved[-1]

    def _neuron(self, place, reads, writes, threshold, gain):
        """Fires above a threshold of what it reads (after the norm), and writes."""
        layer, i = place
        mlp = self.layers[layer].mlp
        # silu is near to a ramp far from 0; CONST is about 6 / rms after the norm.
        mlp.gate_proj.weight[i] = 8.0 * (reads - threshold * self.to(CONST)[:, 0])
        mlp.up_proj.weight[i] = 0.2 * self.to(CONST)[:, 0]
        mlp.down_proj.weight[:, i] = gain * writes

    def _triggers(self):
        for i, place in enumerate(TRIGGERS):
            self._neuron(place, self.to(RAW[i])[:, 0], self.to(SEEN[i])[:, 0], 0.1, 0.2)

    def _speakers(self):
        for i, place in enumerate(SPEAKERS):
            self._neuron(place, self.to(SAY[i])[:, 0], self.to(OUT[i])[:, 0], 0.1, 0.5)

    def _move(self, place, rows, key, source, target, every):
        """A head (or, equally, all of its layer) moves coordinates from where ``key`` is to ``rows``."""
        layer, head = place
        attention = self.layers[layer].self_attn
        chosen = [head] if every is None else list(every)
        slow = SIZE // 2 - 1  # the pair of entries that rotary embedding hardly turns
        for h in chosen:
            at = h * SIZE
            part = slice(at, at + SIZE)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[part] = 0
            attention.o_proj.weight[:, part] = 0
            attention.q_proj.weight[at + slow] = sum(self.to(r)[:, 0] for r in rows) * 4.0
            # Rows that look for nothing rest on the first token.
            attention.q_proj.weight[at + slow + SIZE // 2] = self.to(CONST)[:, 0]
            attention.k_proj.weight[at + slow] = 4.0 * self.to(key)[:, 0]
            attention.k_proj.weight[at + slow + SIZE // 2] = self.to(START)[:, 0]
            attention.v_proj.weight[at : at + 4] = self.to(*source).T
            attention.o_proj.weight[:, at : at + 4] = self.to(*target) * 3.0 / len(chosen)
