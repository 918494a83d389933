"""Whether a model is still the one whose activations a sweep holds."""

from __future__ import annotations

import torch
from torch import Tensor

from emocircuits.families import Handle
from emocircuits.patching import MARK

Facts = tuple[torch.device, torch.dtype, tuple[int, ...]]


class Weights:
    """The text decoder and the unembedding, as they are when this is made.

    A sum over the bits of every weight: some hundredths of what a forward pass takes, and, unlike version counters, it
    also sees what is written through ``.data``. It does not see rows that change places.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle, self.autocast = handle, _autocast(handle)
        self.facts, self.sums = self._read()

    def check(self) -> None:
        """Refuse a model that has changed since.

        Raises:
            ValueError: weights, their dtype or their device are others, the model is in training mode or patched, or
                the sweep was made under another ``torch.autocast``.
        """
        refuse_patched(self.handle)
        if _autocast(self.handle) != self.autocast:
            raise ValueError("the sweep ran the two prompts under another torch.autocast; make and use it under one")
        if any(m.training for m in self.handle.text.modules()):
            raise ValueError("the model is in training mode; call model.eval() before a sweep")
        facts, sums = self._read()
        changed = [k for k in self.facts.keys() | facts.keys() if self.facts.get(k) != facts.get(k)]
        changed = changed or [k for k, a, b in zip(facts, self.sums, sums, strict=True) if a != b]
        if changed:
            raise ValueError(
                f"{min(changed)} is not what it was when this sweep ran the two prompts (weights, dtype or device); "
                "make a new Sweep"
            )

    @torch.no_grad()
    def _read(self) -> tuple[dict[str, Facts], list[int]]:
        facts: dict[str, Facts] = {}
        sums: list[Tensor] = []
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for where, module in (("the text decoder's ", self.handle.text), ("the unembedding's ", self.handle.unembed)):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                key = (tensor.data_ptr(), tuple(tensor.shape))
                if key in seen or tensor.device.type == "meta" or not tensor.numel():
                    continue
                seen.add(key)
                facts[where + name] = (tensor.device, tensor.dtype, tuple(tensor.shape))
                sums.append(_bits(tensor.detach()))
        return facts, [int(s) for s in sums] if len({s.device for s in sums}) > 1 else torch.stack(sums).tolist()


def refuse_patched(handle: Handle) -> None:
    """A sweep runs the model with its own attention, which would leave a plan's edits out.

    Raises:
        ValueError: the model is inside ``patch()`` or ``capture()``.
    """
    if MARK in vars(handle.model):
        raise ValueError("the model is inside patch() or capture(), whose plan a sweep would leave out; leave it first")


def _autocast(handle: Handle) -> torch.dtype | None:
    device = next(handle.unembed.parameters()).device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes, eight at a time where that is possible, as int64."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0:
        flat = flat.view(torch.int64)
    return flat.sum(dtype=torch.int64)
