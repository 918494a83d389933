"""How often the hash of pictures errs: prints the table of docs/data.md.

``python tests/emocircuits/data_hash_rates.py [identities]``
"""

import io
import sys

import numpy as np
from PIL import Image, ImageEnhance

from emocircuits.data.hashes import BITS, NEAR, image_hash
from emocircuits.embedded import faces


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def resized(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cut(image, share=1 / 64):
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y)).resize(image.size, Image.Resampling.BICUBIC)


CHANGES = {
    "JPEG, quality 90": lambda image: jpeg(image, 90),
    "JPEG, quality 60": lambda image: jpeg(image, 60),
    "JPEG, quality 30": lambda image: jpeg(image, 30),
    "twice as large": lambda image: resized(image, 2),
    "half as large": lambda image: resized(image, 0.5),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "10 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "15 % more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "larger by 1.75, brighter by 8 %, JPEG 60": lambda image: jpeg(
        ImageEnhance.Brightness(resized(image, 1.75)).enhance(1.08), 60
    ),
    "in grey": lambda image: image.convert("L").convert("RGB"),
    "1/64 cut off on each side": cut,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def bits(images):
    """``[n, 256]`` bool."""
    return np.array([np.unpackbits(np.frombuffer(bytes.fromhex(image_hash(i)), np.uint8)) for i in images]) > 0


def distances_between(hashes, owners):
    """Distances of all pairs of pictures that belong to different owners, in blocks."""
    signs = hashes.astype(np.float32) * 2 - 1
    for start in range(0, len(signs), 500):
        block = (BITS - signs[start : start + 500] @ signs.T) / 2
        yield block[owners[start : start + 500, None] < owners[None]]


def table(images):
    own = bits(images)
    yield "| the same picture, but | median | 99 % | most | caught |"
    yield "|---|---|---|---|---|"
    for name, change in CHANGES.items():
        d = (own != bits([change(i) for i in images])).sum(1)
        yield f"| {name} | {np.median(d):.0f} | {np.quantile(d, 0.99):.0f} | {d.max()} | {(d <= NEAR).mean():.1%} |"


def main(identities):
    who = range(102_000, 102_000 + identities)
    neutral = [faces.face(i, "neutral", 0.0) for i in who]
    print(*table(neutral[:1000]), sep="\n")
    shown = [faces.face(i, faces.EMOTIONS[i % len(faces.EMOTIONS)], 1.0) for i in who]
    found = np.concatenate(list(distances_between(bits(neutral + shown), np.array([*who, *who]))))
    counts = {k: int((found <= k).sum()) for k in (24, NEAR, 36, 40, 48, 64)}
    print(f"\n{len(found)} pairs of different identities: nearest {found.min():.0f}, within k bits {counts}")
    print(f"median {np.median(found):.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
