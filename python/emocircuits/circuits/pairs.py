"""Contrastive pairs with their pictures in memory, ready to be asked about."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Literal

from PIL import Image
from torch import Tensor

from emocircuits.circuits.subject import Subject
from emocircuits.data.pairs import Record
from emocircuits.data.pictures import open_image

Side = Literal["emotional", "neutral"]
SIDES: tuple[Side, Side] = ("emotional", "neutral")


@dc.dataclass(frozen=True, eq=False)
class Pairs:
    """Records, and the two pictures of each: X+ is (emotional, event), X- is (neutral, event)."""

    records: tuple[Record, ...]
    emotional: tuple[Image.Image, ...]
    neutral: tuple[Image.Image, ...]

    @classmethod
    def load(cls, records: Sequence[Record], subject: Subject | None = None) -> Pairs:
        """Open the pictures of some records.

        Args:
            records: at least one.
            subject: if given, its lexicon must know the records' emotions.

        Raises:
            ValueError: no records, a picture that cannot be opened, two sides of different size, or an emotion that
                the subject has no words for.
        """
        if not records:
            raise ValueError("there are no pairs; give a manifest that has some in this split")
        pictures: dict[Side, list[Image.Image]] = {"emotional": [], "neutral": []}
        for record in records:
            if subject is not None:
                subject.lexicon.require(record.emotion)
            plus, minus = open_image(record.image_emotional), open_image(record.image_neutral)
            if plus.size != minus.size:
                raise ValueError(
                    f"{record.where}: the emotional picture is {plus.size[0]} x {plus.size[1]} pixels, the neutral one "
                    f"{minus.size[0]} x {minus.size[1]}: a pair needs the same picture twice"
                )
            pictures["emotional"].append(plus)
            pictures["neutral"].append(minus)
        return cls(tuple(records), tuple(pictures["emotional"]), tuple(pictures["neutral"]))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def events(self) -> list[str]:
        """The event of each pair."""
        return [r.event for r in self.records]

    @property
    def emotions(self) -> list[str]:
        """The emotion that each pair's emotional picture shows."""
        return [r.emotion for r in self.records]

    def images(self, side: Side) -> tuple[Image.Image, ...]:
        """The pictures of one side."""
        return self.emotional if side == "emotional" else self.neutral

    def take(self, which: Sequence[int]) -> Pairs:
        """Some of the pairs, in the order given."""
        return Pairs(
            tuple(self.records[i] for i in which),
            tuple(self.emotional[i] for i in which),
            tuple(self.neutral[i] for i in which),
        )

    def inputs(self, subject: Subject, side: Side, *, answer: bool = False) -> dict[str, Tensor]:
        """Model inputs of one side, one row a pair, padded on the left; both sides are padded alike."""
        return subject.inputs(self.images(side), self.events, answer=answer)

    def batches(self, size: int) -> Iterator[tuple[list[int], Pairs]]:
        """Pairs with prompts of like length together: their numbers, and they."""
        order = sorted(range(len(self)), key=lambda i: len(self.records[i].event))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield chosen, self.take(chosen)
