"""Whether a model is still the one whose activations a sweep holds."""

from __future__ import annotations

import torch
from torch import Tensor

from emocircuits.families import Handle
from emocircuits.patching import MARK


class Weights:
    """The text decoder and the unembedding, as they are when this is made.

    Of weights that patches run through, a sum over their bits: some hundredths of what a forward pass takes, and,
    unlike version counters, it also sees what is written through ``.data``. It does not see rows that change places. Of
    others (embeddings) the version counter.

    Args:
        handle: the model.
        kept: rows of the unembedding's weight that the sweep holds, and their numbers; None where it runs as a whole.
    """

    def __init__(self, handle: Handle, kept: tuple[Tensor, Tensor] | None) -> None:
        self.handle, self.kept, self.autocast = handle, kept, _autocast(handle)
        self.facts = self._read()

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
        facts = self._read()
        changed = [k for k in self.facts.keys() | facts.keys() if self.facts.get(k) != facts.get(k)]
        if changed:
            raise ValueError(
                f"{min(changed)} is not what it was when this sweep ran the two prompts (weights, dtype or device); "
                "make a new Sweep"
            )

    @torch.no_grad()
    def _read(self) -> dict[str, tuple[object, ...]]:
        run = [*self.handle.layers, self.handle.norm, *([] if self.kept else [self.handle.unembed])]
        summed = {id(t) for module in run for t in (*module.parameters(), *module.buffers())}
        facts: dict[str, tuple[object, ...]] = {}
        sums: dict[str, Tensor] = {}
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for where, module in (("the text decoder's ", self.handle.text), ("the unembedding's ", self.handle.unembed)):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                key = (tensor.data_ptr(), tuple(tensor.shape))
                if key in seen or tensor.device.type == "meta" or not tensor.numel():
                    continue
                seen.add(key)
                facts[where + name] = (tensor.device, tensor.dtype, tuple(tensor.shape))
                if id(tensor) in summed:
                    sums[where + name] = bits(tensor.detach())
                elif not tensor.is_inference():
                    facts[where + name] += (tensor._version,)
        if self.kept is not None:
            weight, whole = self.kept[0], self.handle.unembed.weight
            assert isinstance(whole, Tensor)
            facts["the unembedding's rows"] = (
                weight.device == whole.device and torch.equal(weight, whole[self.kept[1]]),
            )
        # One wait for the device, not one for every weight.
        for device in {s.device for s in sums.values()}:
            names = [k for k, s in sums.items() if s.device == device]
            for name, total in zip(names, torch.stack([sums[k] for k in names]).tolist(), strict=True):
                facts[name] += (total,)
        return facts


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


def bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bytes, eight at a time where that is possible, as int64."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0:
        flat = flat.view(torch.int64)
    return flat.sum(dtype=torch.int64)
