"""Fused gradients of attention: of q, k, v and of the four route tables.

Flash style: scores are recomputed from q, k and the saved log-sum-exp (the formulas are in
`emokernels.composed.backward`). Three kernels, and of these only what is wanted:

* `backward_rows`: numbers per query row, once;
* `backward_queries`: a tile of rows against its keys: dq, and the sums of table gradients by route;
* `backward_keys`: a block of keys against its rows: dk and dv.

No program adds to memory that another one adds to, so equal inputs give equal bits: there is nothing to switch on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..problem import Problem
from .attention import needs_schedule
from .backward_configs import keys_config, queries_config
from .backward_keys import keys_launch
from .backward_queries import partials_of, queries_launch
from .backward_rows import Rows, rows_launch
from .backward_schedule import rows_of_keys_launches
from .launch import Launch, arch_of
from .schedule import schedule_launches, schedule_of

TABLES = ("bias", "factor", "magnitude", "gain")
"""The route tables, in the order of their gradients."""


def attend_backward(
    problem: Problem, grad_z: Tensor, grad_lse: Tensor, z: Tensor, lse: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v, bias, factor, magnitude, gain, contiguous; None where not wanted.

    Args:
        problem: as the forward took it.
        grad_z: ``[B, H, N, D]``, any strides.
        grad_lse: ``[B, H, N]``, any strides; what it holds for a row without keys does not count.
        z: the forward's output.
        lse: the forward's log-sum-exp, float32.
        wanted: which of the seven to compute.
    """
    problem = problem.fold_lengths()
    given = (problem.q, problem.k, problem.v, problem.bias, problem.factor, problem.magnitude, problem.gain)
    wanted = [want and target is not None for want, target in zip(wanted, given, strict=True)]
    prepare, rows = rows_launch(problem, grad_z, grad_lse, z, lse, by_role=wanted[1] or wanted[2])
    prepare.run()
    dq, dk, dv = (
        target.new_empty(target.shape) if want else None for target, want in zip(given[:3], wanted[:3], strict=True)
    )
    partials: list[Tensor | None] = [None] * len(TABLES)
    if wanted[0] or any(wanted[3:]):
        launches, partials = over_queries(problem, grad_z, rows, dq, wanted[3:])
        for launch in launches:
            launch.run()
    for launch in over_keys(problem, grad_z, rows, dk, dv):
        launch.run()
    tables = [
        None if partial is None or table is None else _total(partial, table)
        for partial, table in zip(partials, given[3:], strict=True)
    ]
    return [dq, dk, dv, *tables]


def over_queries(
    problem: Problem, grad_z: Tensor, rows: Rows, dq: Tensor | None, tables: Sequence[bool], arch: str | None = None
) -> tuple[list[Launch], list[Tensor | None]]:
    """The launches that fill dq, unless None, and partial sums of the `tables` that are wanted; and these sums.

    With `arch` nothing is run and the schedule's launches come first; else the schedule is the one that was remembered.
    """
    config = queries_config(problem, arch_of(problem.q, arch), any(tables))
    partials = partials_of(problem, config, dict(zip(TABLES, tables, strict=True)))
    before: list[Launch] = []
    schedule = None
    if needs_schedule(problem) and arch is not None:
        before, schedule = schedule_launches(problem, config.block_m, config.block_n)
    elif needs_schedule(problem):
        schedule = schedule_of(problem, config.block_m, config.block_n)
    launch = queries_launch(problem, grad_z, rows, schedule, config, dq, partials)
    return [*before, launch], list(partials.values())


def over_keys(
    problem: Problem, grad_z: Tensor, rows: Rows, dk: Tensor | None, dv: Tensor | None, arch: str | None = None
) -> Iterator[Launch]:
    """The launches that fill dk and dv, unless None."""
    if dk is None and dv is None:
        return
    config, apart = keys_config(problem, arch_of(problem.q, arch))
    schedule = None
    if problem.mask is not None:
        launches, schedule = rows_of_keys_launches(problem, config)
        yield from launches
    if apart and dk is not None and dv is not None:
        yield keys_launch(problem, grad_z, rows, schedule, config, dk, None)
        yield keys_launch(problem, grad_z, rows, schedule, config, None, dv)
    else:
        yield keys_launch(problem, grad_z, rows, schedule, config, dk, dv)


def _total(partial: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table ``[B|1, H, R, R]`` from partial sums ``[B, H, tiles, R, R]``."""
    total = partial.sum(2)
    return (total.sum(0, keepdim=True) if table.shape[0] == 1 else total).to(table.dtype)
