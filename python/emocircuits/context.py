"""What every edited place of a patched model shares during a forward pass: the roles of rows and keys, and the phase.

Roles are found when a prompt comes in and stay frozen while its generation lasts: decode steps carry no image ids, and
every key column after the prompt is GENERATED. The buffer is longer than the prompt so that decode steps only slice it.

Roles belong to the columns of a cache, so they are kept with it (:class:`Columns`): a chat that goes on with a kept
cache keeps the roles of its first turns, chats may take turns, and a copied cache carries a copy of its roles.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from typing import Any, cast

import torch
from torch import Tensor

from emocircuits.roles import prompt_roles, real_tokens
from emokernels import Role
from emokernels.attention import step_mask

GROWTH = 1024
COLUMNS = "_emocircuits_columns"
PHASES = {
    (True, False): frozenset({"prefill"}),
    (False, True): frozenset({"decode"}),
    (True, True): frozenset({"prefill", "decode"}),
}


@dc.dataclass(eq=False)
class Columns:
    """What is known of the columns of one cache.

    Attributes:
        roles: ``[B, >= seen]`` uint8; GENERATED after the prompt.
        seen: columns that have been run.
        expand: rows of the batch per prompt: beams, or sequences returned for each.
        answer: token ids ``[B, T]`` of the generation that was last; the first of them stands in column
            ``answer_from``. Its last token has not been run: the next turn of a chat begins with it.
        compiled: compiled steps have run more columns, which Python does not count.
    """

    roles: Tensor
    seen: int = 0
    expand: int = 1
    answer: Tensor | None = None
    answer_from: int = 0
    compiled: bool = False

    def grow(self, columns: int) -> None:
        """Make room for this many columns."""
        if columns > self.roles.shape[1]:
            more = self.roles.new_full((self.roles.shape[0], max(columns, GROWTH)), int(Role.GENERATED))
            self.roles = torch.cat([self.roles, more], 1)


class Context:
    """Roles and phase of the forward pass in progress.

    Attributes:
        prefill: the rows in progress include prompt rows.
        prompt: a tensor that is another object after every prompt and every part of one that continues.
        phases: ``{"prefill"}``, ``{"decode"}`` or both: a forward pass over a prompt and its answer has rows of both.
        first, seen: column of the first row in progress, and the one after the last.
        spread: layers may be on other devices than the roles; they then look through `at`.
    """

    def __init__(self, placeholders: tuple[int, ...], given: Tensor | None = None) -> None:
        self.placeholders = placeholders
        self.given = given
        self.columns: Columns | None = None
        self.prompt = torch.empty(0)
        self.query_roles: Tensor | None = None
        self._selected: Tensor | None = None
        self._kinds: Tensor | None = None
        self._selected_keys: Tensor | None = None
        self.first = self.seen = 0
        self._count: Tensor | None = None
        self._generated: Tensor | None = None
        self._keys: dict[int, Tensor] = {}
        self._mask: tuple[Tensor | None, torch.dtype, Any] | None = None
        # The cache of the last forward pass, if it had one.
        self._cache: Any = None
        self._counted = False
        self.spread = False
        self._elsewhere: dict[torch.device, Elsewhere] = {}
        self._snapshot: Context | None = None
        self.prefill = True
        self.phases = PHASES[True, False]
        self._generating = self._expects_prompt = False
        self._in_generation: Any = None
        self._expand = 1
        self._prompt_end = 0

    @property
    def batch(self) -> int:
        """Rows of the batch whose roles are held."""
        return 0 if self.columns is None else self.columns.roles.shape[0]

    @property
    def expand(self) -> int:
        """Rows of the batch for each row of the plan."""
        return 1 if self.columns is None else self.columns.expand

    def without(self, role: Role) -> list[int]:
        """Batch rows that have no column of this role."""
        if self.columns is None:
            return []
        present = (self.columns.roles[:, : self.seen] == int(role)).any(-1)
        return [row for row, there in enumerate(present.tolist()) if not there]

    @property
    def rows(self) -> Tensor:
        """Roles ``[B, N]`` of the rows of the forward pass in progress."""
        if self.columns is None:
            raise ValueError(
                "a layer ran before the roles of the prompt were known; call the whole model, not a part of it"
            )
        if self.query_roles is None:
            self.query_roles = self.columns.roles[:, self.first : self.seen]
        return self.query_roles

    @property
    def kinds(self) -> Tensor:
        """Kinds ``[B, N]`` of the rows in progress: their roles, or what `select` says of tokens of the prompt."""
        if not self.prefill or self._selected is None:  # in this order: compiled steps do not look at the prompt
            return self.rows
        if self._kinds is None:
            kinds, rows = self._selected[:, self.first : self.seen], self.rows
            # Without a cache the prompt is run again with what was generated after it.
            self._kinds = torch.cat([kinds, rows[:, kinds.shape[1] :].to(kinds.dtype)], 1)
        return self._kinds

    def select(self, kinds: Tensor | None, keys: Tensor | None = None) -> None:
        """Take the kinds ``[B, seen]`` of all tokens up to the end of the prompt in progress; None: their roles.

        ``keys`` are those that they have as keys.
        """
        self._selected, self._selected_keys, self._kinds = kinds, keys, None

    def key_kinds(self, keys: int) -> Tensor:
        """Kinds ``[B, keys]`` of the key columns of a prompt, as `key_roles`."""
        roles = self.key_roles(keys)
        if self._selected_keys is None:
            return roles
        kinds = self._selected_keys[:, max(0, self.seen - keys) :][:, :keys]
        return torch.cat([kinds, roles[:, kinds.shape[1] :].to(kinds.dtype)], 1)

    def reset(self) -> None:
        """Forget the last prompt."""
        self.columns = self.query_roles = self._cache = self._selected = self._selected_keys = None
        self.first = self.seen = 0
        self._counted = False
        self._elsewhere, self._snapshot = {}, None
        self._phases(prompt=True, answer=False)

    # -- generate() --------------------------------------------------------------------------------------------------
    def announce(self, expand: int) -> None:
        """The next forward pass brings a prompt whose rows stand for ``expand`` sequences each; all others generate."""
        self._generating = self._expects_prompt = True
        self._expand = expand

    def finish(self, sequences: Tensor | None, prompt: int) -> None:
        """A generation has ended.

        Args:
            sequences: ``[B, prompt + T]`` token ids in the order of the cache's rows; None when they are not known.
            prompt: columns of ``sequences`` before the answer.
        """
        columns = self.columns
        if columns is not None and sequences is not None and sequences.shape[0] == self.batch:
            columns.answer, columns.answer_from = sequences, self._prompt_end - prompt
        self._generating = self._expects_prompt = False
        self._in_generation, self._expand = None, 1
        # generate() may have run steps that it took back.
        self._counted = False

    # -- a forward pass ----------------------------------------------------------------------------------------------
    def begin(self, kwargs: dict[str, Any]) -> bool:
        """Look at the inputs of a backbone forward. True when a prompt came in (tables may need refilling)."""
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        if given is None:
            raise ValueError("the model was called with neither input_ids nor inputs_embeds; pass one of them by name")
        batch, length = given.shape[:2]
        cache = kwargs.get("past_key_values")
        past = self._past(cache, length, given.device)
        # generate() announces its prompt; everything it runs after that is generated. Outside generate() one row on a
        # filled cache is a decode step, several are a continued prompt.
        prompt = self._expects_prompt if self._generating else past == 0 or length > 1
        answer = not prompt
        if prompt:
            self._expects_prompt, self._in_generation = False, cache
            self._prompt_end = past + length
        elif self._generating and cache is not self._in_generation:
            raise NotImplementedError(
                "another forward pass ran on the model inside generate() (classifier-free guidance, or a logits "
                "processor that calls the model); a plan follows one sequence: run it as extra rows of the batch"
            )
        if prompt and past == 0:
            self.columns = self._start(kwargs, batch, length)
            answer = self.given is not None and bool((self.given == int(Role.GENERATED)).any())
            if cache is not None:
                setattr(cache, COLUMNS, self.columns)
        elif prompt:
            answer = self._continue(kwargs, batch, past, length)
        self._rows(past, length, batch)
        if prompt and cache is None:
            self._cache = None
        # Without a cache every step runs the whole sequence: its prompt rows are prefill again.
        self._phases(prompt=prompt or past == 0, answer=answer)
        return prompt

    def may_step_compiled(self, kwargs: dict[str, Any]) -> bool:
        """Whether this forward pass is a decode step of a prompt that is known, which a compiled graph can contain."""
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        return self.columns is not None and given is not None and given.shape[1] == 1

    def step_compiled(self) -> None:
        """One decode step inside a compiled graph. Nothing depends on how many there were: it is traced once."""
        assert self._count is not None
        assert self.columns is not None
        self._count.add_(1)
        self.query_roles = self._generated
        self.columns.compiled, self._counted = True, False
        self._phases(prompt=False, answer=True)

    def _phases(self, prompt: bool, answer: bool) -> None:
        self.prefill = prompt
        self.phases = PHASES[prompt, answer]

    def _past(self, cache: Any, length: int, device: torch.device) -> int:
        """Columns already in the cache, whose roles then become the current ones.

        A static cache keeps its length on the device: where asking would wait for it, the steps are counted instead.
        """
        if cache is None:
            return 0
        if self._counted and cache is self._cache and length == 1 and not self._expects_prompt:
            return self.seen
        held = cache.get_seq_length()
        past = int(held)
        if past:
            self._take_up(cache, past)
        self._cache = cache
        self._counted = device.type != "cpu" and (isinstance(held, Tensor) or getattr(cache, "is_compileable", False))
        return past

    def met(self, cache: Any) -> None:
        """The model has made this cache itself, in the forward pass that just ended."""
        if self.columns is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, COLUMNS, self.columns)

    def _take_up(self, cache: Any, past: int) -> None:
        """Make the columns of ``cache`` the current ones."""
        columns: Columns | None = getattr(cache, COLUMNS, None)
        if columns is None or (columns.seen < past and not columns.compiled):
            raise ValueError(
                f"this filled cache has {past} columns, of which {columns.seen if columns else 0} were run under "
                "patch(): the roles of its tokens are unknown; run the prompt under patch() too"
            )
        if columns is not self.columns:
            self.columns, self.prompt = columns, columns.roles[:, :0]

    def _start(self, kwargs: dict[str, Any], batch: int, length: int) -> Columns:
        """Roles of a prompt that begins a cache."""
        given = self.given
        if given is None:
            roles = self._find(kwargs, 0, length)
        else:
            if self._expand > 1:
                given = given.repeat_interleave(self._expand, 0)
            if tuple(given.shape) != (batch, length):
                raise ValueError(
                    f"roles has shape {tuple(given.shape)}, the prompt is [{batch}, {length}]; they must agree"
                )
            ids = kwargs.get("input_ids")
            roles = given.to(ids.device if ids is not None else kwargs["inputs_embeds"].device)
        # In whole steps of GROWTH, so that a graph compiled on one prompt fits the next.
        wide = roles.new_full((batch, (length // GROWTH + 2) * GROWTH), int(Role.GENERATED), dtype=torch.uint8)
        wide[:, :length] = roles
        self.prompt = wide
        return Columns(wide, length, self._expand)

    def _continue(self, kwargs: dict[str, Any], batch: int, past: int, length: int) -> bool:
        """Roles of a prompt on a filled cache; True when it has rows that were generated.

        The text of a further turn is QUERY, wherever its images are; the answer before it stays GENERATED, also its
        last token, which no step has run.
        """
        columns = self.columns
        assert columns is not None
        if batch == columns.roles.shape[0] * self._expand and self._expand > 1:
            # The cache was expanded by hand for what generate() is about to expand.
            columns.roles = columns.roles.repeat_interleave(self._expand, 0)
            columns.expand *= self._expand
        self._fits(batch)
        columns.grow(past + length)
        roles = self._find(kwargs, past, length)
        roles = roles.masked_fill(roles == int(Role.SYSTEM), int(Role.QUERY))
        said, at = 0, past - columns.answer_from
        if columns.answer is not None and kwargs.get("input_ids") is not None and at >= 0:
            said = min(columns.answer.shape[1] - at, length)
        if columns.answer is not None and said > 0:
            answer = columns.answer[:, at : at + said].to(roles.device)
            kept = (roles[:, :said] == int(Role.PAD)) | (roles[:, :said] == int(Role.LAST))
            own = (kwargs["input_ids"][:, :said] == answer) & ~kept
            roles = torch.cat([roles[:, :said].masked_fill(own, int(Role.GENERATED)), roles[:, said:]], 1)
        columns.answer = None
        # A fresh tensor: the old one may come from inference mode. What was cropped leaves no roles behind.
        rest = columns.roles.shape[1] - past - length
        after = torch.full_like(roles[:, :1], int(Role.GENERATED)).expand(-1, rest)
        columns.roles = torch.cat([columns.roles[:, :past], roles, after], 1)
        self.prompt = roles
        return said > 0

    def _find(self, kwargs: dict[str, Any], start: int, length: int) -> Tensor:
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "the prompt came as inputs_embeds, so visual tokens cannot be found; pass patch(..., roles=[B, N])"
            )
        return prompt_roles(ids, real_tokens(kwargs.get("attention_mask"), start, length), self.placeholders)

    def _fits(self, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(
                f"the prompt had {self.batch} batch rows, this step has {batch}; "
                "keep the rows of a batch together until its generation ends"
            )

    def _rows(self, past: int, length: int, batch: int) -> None:
        columns = self.columns
        assert columns is not None
        self._fits(batch)
        self.first, self.seen = past, past + length
        columns.grow(self.seen)
        columns.seen = self.seen
        self._ready_to_compile(batch, self.seen)
        self.query_roles = self._snapshot = self._kinds = None  # made when a layer asks
        self._keys = {}
        self._mask = None

    def _ready_to_compile(self, batch: int, columns: int) -> None:
        """What a compiled decode step reads: the number of columns so far, on the device, and the roles of its rows."""
        assert self.columns is not None
        device = self.columns.roles.device
        if self._count is None or self._count.device != device:
            with torch.inference_mode(False):  # outlives this call
                self._count = torch.zeros((), dtype=torch.int64, device=device)
            # Compiled graphs add to it in place.
            torch._dynamo.mark_static_address(self._count, guard=False)
        self._count.fill_(columns)
        if self._generated is None or self._generated.shape[0] != batch or self._generated.device != device:
            with torch.inference_mode(False):
                self._generated = torch.full((batch, 1), int(Role.GENERATED), dtype=torch.uint8, device=device)

    def step_mask(self, mask: Tensor | None, dtype: torch.dtype) -> Any:
        """The mask of a decode step as prepared steps take it, made once for the layers that share it."""
        if self._mask is None or self._mask[0] is not mask or self._mask[1] != dtype:
            self._mask = (mask, dtype, step_mask(mask, dtype))
        return self._mask[2]

    def key_roles(self, keys: int) -> Tensor:
        """Roles ``[B, keys]`` of the key columns a layer holds; a sliding cache has dropped the oldest ones."""
        columns = self.columns
        assert columns is not None
        columns.grow(keys)
        if torch.compiler.is_compiling() and not self.prefill:
            assert self._count is not None
            dropped_now = (self._count - keys).clamp(min=0)
            return columns.roles.index_select(1, torch.arange(keys, device=columns.roles.device) + dropped_now)
        if keys not in self._keys:
            dropped = max(0, self.seen - keys)
            self._keys[keys] = columns.roles[:, dropped : dropped + keys]
        return self._keys[keys]

    # -- other views of it -------------------------------------------------------------------------------------------
    def look_from(self, devices: set[torch.device]) -> None:
        """The layers of the model are on these devices."""
        self.spread = self.columns is not None and devices != {self.columns.roles.device}

    def at(self, device: torch.device) -> Context:
        """The context as a layer on ``device`` sees it."""
        if not self.spread or self.columns is None or device == self.columns.roles.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Elsewhere(self, device)
        return cast(Context, self._elsewhere[device])

    def snapshot(self) -> Context:
        """A copy that stays as it is when other forward passes follow, for layers that backward() runs again."""
        if self._snapshot is None:
            held = copy.copy(self)
            held.columns = None if self.columns is None else dc.replace(self.columns)
            held._keys, held._elsewhere = {}, {}
            self._snapshot = held
        return self._snapshot


class Elsewhere:
    """A context on another device: every tensor is moved when it is asked for, once."""

    def __init__(self, context: Context, device: torch.device) -> None:
        self._context, self._device = context, device
        self._held: dict[Any, tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return self._here(name, getattr(self._context, name))

    def key_roles(self, keys: int) -> Tensor:
        """As `Context.key_roles`."""
        moved: Tensor = self._here(("keys", keys), self._context.key_roles(keys))
        return moved

    def key_kinds(self, keys: int) -> Tensor:
        """As `Context.key_kinds`."""
        return self._context.key_kinds(keys).to(self._device)

    def _here(self, name: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device == self._device:
            return value
        if name not in self._held or self._held[name][0] is not value:
            self._held[name] = (value, value.to(self._device))
        return self._held[name][1]
