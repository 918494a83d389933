"""How often the hash of pictures errs: prints the table of docs/data.md.

``python tests/emocircuits/data_hash_rates.py [identities | folder of pictures | choices]``
"""

import io
import sys
from pathlib import Path

import imagehash
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
LOST = ("mirrored", "1/64 cut off on each side", "JPEG, quality 30")
"""Changes that no one should count on being seen."""
HASHES = {
    "`phash`, 8": imagehash.phash,
    "`phash`, 16": lambda image: imagehash.phash(image, 16),
    "`dhash`, 16": lambda image: imagehash.dhash(image, 16),
    "`average_hash`, 16": lambda image: imagehash.average_hash(image, 16),
    "`whash`, 16": lambda image: imagehash.whash(image, 16),
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


def of_identities(count):
    who = range(102_000, 102_000 + count)
    neutral = [faces.face(i, "neutral", 0.0) for i in who]
    print(*table(neutral[:1000]), sep="\n")
    shown = [faces.face(i, faces.EMOTIONS[i % len(faces.EMOTIONS)], 1.0) for i in who]
    tell(bits(neutral + shown), np.array([*who, *who]))


def of_pictures(folder):
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".png", ".jpg"))
    images = [Image.open(f).convert("RGB") for f in files]
    print(f"{len(images)} pictures", *table(images), sep="\n")
    tell(bits(images), np.arange(len(images)))


def tell(hashes, owners):
    found = np.concatenate(list(distances_between(hashes, owners)))
    counts = {k: int((found <= k).sum()) for k in (24, NEAR, 36, 40, 48, 64)}
    print(f"\n{len(found)} pairs of different ones: nearest {found.min():.0f}, median {np.median(found):.0f}")
    print("pairs within so many bits:", counts)


def choices(count=500):
    """Other hashes of ImageHash: each with the threshold at which it would catch 99.5 % of the copies."""
    neutral = [faces.face(i, "neutral", 0.0) for i in range(102_000, 102_000 + count)]
    copies = [[change(i) for i in neutral] for name, change in CHANGES.items() if name not in LOST]
    print(
        "| hash | bits | threshold for 99.5 % of the copies | different identities within it |",
        "|---|---|---|---|",
        sep="\n",
    )
    for name, make in HASHES.items():
        own, *others = (np.array([make(i).hash.ravel() for i in images]) for images in (neutral, *copies))
        threshold = np.quantile([(own != other).sum(1) for other in others], 0.995)
        signs = own.astype(np.float32) * 2 - 1
        apart = ((own.shape[1] - signs @ signs.T) / 2)[np.triu_indices(count, 1)]
        print(f"| {name} | {own.shape[1]} | {threshold:.0f} | {(apart <= threshold).sum()} of {apart.size} |")


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else "3000"
    if given == "choices":
        choices()
    else:
        of_identities(int(given)) if given.isdigit() else of_pictures(given)
