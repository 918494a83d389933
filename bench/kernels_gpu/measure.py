"""One case, from inputs to its record: contenders are made ready, checked against float64, and timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import inputs, oracle
from .contenders import Contender, Unavailable, activation, attention, backward, flow, generation, lens, prefix
from .oracle import Gate, Wrong
from .ratios import percentile, ratio
from .shapes import Activation, Case, Flow, Generation, Lens
from .timing import WARMUP, Call, Timer, WallTimer

Progress = Callable[[str], None]


class Problem(NamedTuple):
    """A case with inputs: who competes, what their outputs must be, and which part of an output is looked at."""

    inputs: Any
    contenders: list[Contender]
    gates: Mapping[str, Gate]
    taken: Callable[[Any], tuple[torch.Tensor, ...]]


def contenders_of(case: Case, device: str) -> list[Contender]:
    """Who competes in a case; on a CPU the definition as well."""
    if isinstance(case, Activation):
        return activation.contenders()
    if isinstance(case, Flow):
        return flow.contenders(case.saliency)
    if isinstance(case, Lens):
        return lens.contenders()
    if isinstance(case, Generation):
        return generation.contenders()
    smoke = torch.device(device).type != "cuda"
    if case.backward:
        return backward.contenders() + (backward.references() if smoke else [])
    return (prefix.contenders() if case.prefix else attention.forward()) + (attention.references() if smoke else [])


def problem(case: Case, device: str, seed: int) -> Problem:
    """Fresh inputs of a case and all that belongs to it."""
    made: Any
    taken: Callable[[Any], tuple[torch.Tensor, ...]]
    if isinstance(case, Activation):
        made = activation.make(case, device, seed)
        gates, taken = activation.gates(made), lambda out: activation.taken(made, out)
    elif isinstance(case, Flow):
        made = flow.make(case, device, seed)
        gates, taken = flow.gates(made, case.saliency), lambda out: flow.taken(made, out)
    elif isinstance(case, Lens):
        made = lens.make(case, device, seed)
        gates, taken = lens.gates(made), lambda out: lens.taken(made, out)
    elif isinstance(case, Generation):
        made, gates, taken = generation.make(case, device, seed), {}, tuple
    elif case.backward:
        made = inputs.make(case, device, seed)
        part, gates = oracle.backward_gates(made)
        taken = lambda grads: part.of(*grads[:3])  # noqa: E731
    else:
        made = inputs.make(case, device, seed)
        at = oracle.sample(made, seed)
        gates, taken = oracle.forward_gates(made, at), lambda z: (at.of(z),)
    return Problem(made, contenders_of(case, device), gates, taken)


def measure(case: Case, device: str, timer: Timer, seed: int = 0, progress: Progress = lambda name: None) -> dict:
    """The record of a case (`record.py`)."""
    try:
        found = problem(case, device, seed)
    except torch.OutOfMemoryError:
        return _record(case, [], {}, skipped="its inputs do not fit into the memory of this device")
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for contender in found.contenders:
        progress(contender.name)
        row = {"name": contender.name, "ours": contender.ours, "variant": contender.variant, "note": contender.note}
        rows[contender.name] = row
        try:
            calls[contender.name], row["error"] = ready(contender, found)
            row["status"] = "timed"
        except Unavailable as error:
            row.update(status="skipped", reason=str(error))
        except torch.OutOfMemoryError:
            row.update(status="skipped", reason="it does not fit into the memory of this device")
            _release(device)
        except Wrong as error:
            row.update(status="wrong", reason=str(error))
        except Exception as error:  # whatever a library raises is its result here
            timer.synchronize()  # an error that broke the device ends the process; the next one goes on (run.py)
            row.update(status="failed", reason=f"{type(error).__name__}: {_first_line(error)}")
    for name in list(calls):
        # Everything that is ready now holds memory, so what ran alone may not fit any more.
        progress(name)
        try:
            with torch.no_grad():
                for _ in range(WARMUP):
                    calls[name]()
        except torch.OutOfMemoryError:
            del calls[name]
            rows[name].update(status="skipped", reason="it does not fit into the memory beside the others")
            _release(device)
    progress("timing")
    chosen = WallTimer(device, timer.seconds) if isinstance(case, Generation) else timer
    with torch.no_grad():
        times, host = chosen.rounds(calls, seed) if calls else ({}, {})
    for name, seconds in times.items():
        rows[name].update(_figures(case, seconds), host_us=host[name] * 1e6)
    result = _record(case, list(rows.values()), times)
    calls.clear()
    del found
    _release(device)
    return result


def ready(contender: Contender, found: Problem) -> tuple[Call, float | None]:
    """A contender's call and the error of its answer, which is compared with float64.

    Raises:
        Unavailable: it cannot run here. Wrong: its answer is not the float64 answer.
    """
    with torch.no_grad():
        call = contender.prepare(found.inputs)
        gate = found.gates.get(contender.variant)
        if gate is None:
            return call, None
        # The memory of a first output full of NaN is likely that of the second: an entry nobody writes is seen.
        for x in _tensors(call()):
            x.fill_(torch.nan)
        out = call()
        error = gate.check(found.taken(out), contender.ours)
        if not all(bool(torch.isfinite(x).all()) for x in _tensors(out)):
            raise Wrong("some entries are not finite")
    return call, error


def _tensors(out: Any) -> Sequence[torch.Tensor]:
    return out if isinstance(out, tuple | list) else [out]


def _figures(case: Case, seconds: list[float]) -> dict[str, Any]:
    p20, p50, p80 = (percentile(seconds, share) for share in (0.2, 0.5, 0.8))
    figures: dict[str, Any] = {"rounds": len(seconds), "p20_us": p20 * 1e6, "p50_us": p50 * 1e6, "p80_us": p80 * 1e6}
    if case.flops:
        figures["tflops"] = case.flops / p50 / 1e12
    if case.bytes:
        figures["gbps"] = case.bytes / p50 / 1e9
    return figures


def _record(case: Case, rows: list[dict], times: Mapping[str, list[float]], skipped: str = "") -> dict:
    ours = [row["name"] for row in rows if row["ours"] and row["name"] in times]
    ratios = [{"of": a, "to": b, **ratio(times[a], times[b])} for a in ours for b in times if a != b]
    record = {"name": case.name, "flops": case.flops, "bytes": case.bytes, "contenders": rows, "ratios": ratios}
    return {**record, "skipped": skipped} if skipped else record


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _release(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
