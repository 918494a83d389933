"""What every edited place of a patched model shares during a forward pass: the roles of rows and keys, and the phase.

Roles are found when a prompt comes in and stay frozen while its generation lasts: decode steps carry no image ids, and
every key column after the prompt is GENERATED. The buffer is longer than the prompt so that decode steps only slice it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emocircuits.roles import prompt_roles, real_tokens
from emokernels import Role
from emokernels.attention import step_mask

GROWTH = 1024
PHASES = {
    (True, False): frozenset({"prefill"}),
    (False, True): frozenset({"decode"}),
    (True, True): frozenset({"prefill", "decode"}),
}


class Context:
    """Roles and phase of the forward pass in progress.

    Attributes:
        prefill: the rows in progress include prompt rows.
        prompt: a tensor that is another object after every prompt and every part of one that continues.
        phases: ``{"prefill"}``, ``{"decode"}`` or both: a forward pass over a prompt and its answer has rows of both.
    """

    def __init__(self, placeholders: tuple[int, ...], given: Tensor | None = None) -> None:
        self.placeholders = placeholders
        self.given = given
        self.buffer: Tensor | None = None
        self.prompt = torch.empty(0)
        self.query_roles: Tensor | None = None
        self._first = self.seen = 0
        self._count: Tensor | None = None
        self._generated: Tensor | None = None
        self._keys: dict[int, Tensor] = {}
        self._mask: tuple[Tensor | None, torch.dtype, Any] | None = None
        self.prefill = True
        self.phases = PHASES[True, False]
        self.generating = False
        self.expects_prompt = False

    @property
    def batch(self) -> int:
        """Rows of the batch whose roles are held."""
        return 0 if self.buffer is None else self.buffer.shape[0]

    @property
    def rows(self) -> Tensor:
        """Roles ``[B, N]`` of the rows of the forward pass in progress."""
        if self.buffer is None:
            raise ValueError(
                "a layer ran before the roles of the prompt were known; call the whole model, not a part of it"
            )
        if self.query_roles is None:
            self.query_roles = self.buffer[:, self._first : self.seen]
        return self.query_roles

    def reset(self) -> None:
        """Forget the last prompt."""
        self.buffer = self.query_roles = None
        self.seen = 0
        self._phases(prompt=True, answer=False)

    def begin(self, kwargs: dict[str, Any]) -> bool:
        """Look at the inputs of a backbone forward. True when a new prompt came in (tables may need refilling)."""
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        if given is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds; pass one of them by name")
        batch, length = given.shape[:2]
        past = self._past(kwargs.get("past_key_values"), length)
        # generate() announces its prompt; everything it runs after that is generated. Outside generate() one row on a
        # filled cache is a decode step, several are a continued prompt.
        prompt = self.expects_prompt if self.generating else past == 0 or length > 1
        self.expects_prompt = False
        if prompt and past == 0:
            self.buffer = self.prompt = self._prompt(kwargs, batch, 0, length)
            self._rows(0, length, batch)
            self._phases(prompt=True, answer=self.given is not None and bool((self.given == int(Role.GENERATED)).any()))
            return True
        if self.buffer is None:
            raise ValueError(
                "the first forward under patch() came with a filled cache, so the roles of its tokens are unknown; "
                "run the prompt under patch() too"
            )
        if prompt:
            self._grow(past + length)
            self.prompt = self._prompt(kwargs, batch, past, length)
            self.buffer[:, past : past + length] = self.prompt[:, :length]
        self._rows(past, length, batch)
        # Without a cache every step runs the whole sequence: its prompt rows are prefill again.
        self._phases(prompt=prompt or past == 0, answer=not prompt)
        return False

    def may_step_compiled(self, kwargs: dict[str, Any]) -> bool:
        """Whether this forward pass is a decode step of a prompt that is known, which a compiled graph can contain."""
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        return self.buffer is not None and given is not None and given.shape[1] == 1

    def step_compiled(self) -> None:
        """One decode step inside a compiled graph. Nothing depends on how many there were: it is traced once."""
        assert self._count is not None
        self._count.add_(1)
        self.query_roles = self._generated
        self._phases(prompt=False, answer=True)

    def _phases(self, prompt: bool, answer: bool) -> None:
        self.prefill = prompt
        self.phases = PHASES[prompt, answer]

    def _past(self, cache: Any, length: int) -> int:
        """Columns already in the cache; a static cache keeps its length on the device, so there it is counted here."""
        if cache is None:
            return 0
        if getattr(cache, "is_compileable", False) and length == 1 and self.buffer is not None:
            return max(self.seen, 1)
        return int(cache.get_seq_length())

    def _prompt(self, kwargs: dict[str, Any], batch: int, start: int, length: int) -> Tensor:
        ids = kwargs.get("input_ids")
        if self.given is not None:
            if tuple(self.given.shape) != (batch, length):
                raise ValueError(
                    f"roles has shape {tuple(self.given.shape)}, the prompt is [{batch}, {length}]; they must agree"
                )
            roles = self.given
        elif ids is None:
            raise ValueError(
                "the prompt came as inputs_embeds, so visual tokens cannot be found; pass patch(..., roles=[B, N])"
            )
        else:
            roles = prompt_roles(ids, real_tokens(kwargs.get("attention_mask"), start, length), self.placeholders)
        device = ids.device if ids is not None else kwargs["inputs_embeds"].device
        # In whole steps of GROWTH, so that a graph compiled on one prompt fits the next.
        columns = (length // GROWTH + 2) * GROWTH
        buffer = torch.full((batch, columns), int(Role.GENERATED), dtype=torch.uint8, device=device)
        buffer[:, :length] = roles
        return buffer

    def _rows(self, past: int, length: int, batch: int) -> None:
        assert self.buffer is not None
        if batch != self.buffer.shape[0]:
            raise ValueError(
                f"the prompt had {self.buffer.shape[0]} batch rows, this step has {batch}; "
                "keep the rows of a batch together until its generation ends"
            )
        self._grow(past + length)
        self._ready_to_compile(batch, past + length)
        self.query_roles = None  # sliced when a layer asks
        self._first, self.seen = past, past + length
        self._keys = {}
        self._mask = None

    def _ready_to_compile(self, batch: int, columns: int) -> None:
        """What a compiled decode step reads: the number of columns so far, on the device, and the roles of its rows."""
        assert self.buffer is not None
        device = self.buffer.device
        if self._count is None or self._count.device != device:
            with torch.inference_mode(False):  # outlives this call
                self._count = torch.zeros((), dtype=torch.int64, device=device)
            # Compiled graphs add to it in place.
            torch._dynamo.mark_static_address(self._count, guard=False)
        self._count.fill_(columns)
        if self._generated is None or self._generated.shape[0] != batch or self._generated.device != device:
            with torch.inference_mode(False):
                self._generated = torch.full((batch, 1), int(Role.GENERATED), dtype=torch.uint8, device=device)

    def _grow(self, columns: int) -> None:
        assert self.buffer is not None
        if columns > self.buffer.shape[1]:
            more = self.buffer.new_full((self.buffer.shape[0], max(columns, GROWTH)), int(Role.GENERATED))
            self.buffer = torch.cat([self.buffer, more], 1)

    def step_mask(self, mask: Tensor | None, dtype: torch.dtype) -> Any:
        """The mask of a decode step as prepared steps take it, made once for the layers that share it."""
        if self._mask is None or self._mask[0] is not mask or self._mask[1] != dtype:
            self._mask = (mask, dtype, step_mask(mask, dtype))
        return self._mask[2]

    def key_roles(self, keys: int) -> Tensor:
        """Roles ``[B, keys]`` of the key columns a layer holds; a sliding cache has dropped the oldest ones."""
        assert self.buffer is not None
        self._grow(keys)
        if torch.compiler.is_compiling() and not self.prefill:
            assert self._count is not None
            dropped_now = (self._count - keys).clamp(min=0)
            return self.buffer.index_select(1, torch.arange(keys, device=self.buffer.device) + dropped_now)
        if keys not in self._keys:
            dropped = max(0, self.seen - keys)
            self._keys[keys] = self.buffer[:, dropped : dropped + keys]
        return self._keys[keys]
