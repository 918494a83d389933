"""Finding a circuit: every step of the method in order, each kept in a run folder as soon as it is done.

A step that a folder has already, found with the same settings, pairs and model, is loaded. One whose settings have
changed is found again, and so is everything that rests on it. A folder of another model or of other pairs is refused.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emocircuits.circuit import Circuit
from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.questions import Question
from emocircuits.circuits.settings import Settings
from emocircuits.circuits.steps import STEPS, Run, Step, circuit_of
from emocircuits.circuits.subject import Subject
from emocircuits.data import Manifest, build_faces, check
from emocircuits.environment import provenance
from emocircuits.files import read_json, write_json
from emocircuits.fingerprint import weights_fingerprint

FORMAT = "emocircuits.run/1"
FILE = "run.json"
CIRCUIT = "circuit.json"
FACES = "faces"


def tell(line: str) -> None:
    """Say something on standard error."""
    print(line, file=sys.stderr)


def localize(
    subject: Subject, pairs: str | Path, folder: str | Path, settings: Settings | None = None, *,
    name: str = "", questions: Sequence[Question] = (), allow_unlicensed: bool = False, fresh: bool = False,
    progress: bool = True, say: Callable[[str], None] = tell,
) -> Circuit:  # fmt: skip
    """Find the emotional circuit of a model.

    Args:
        subject: the model.
        pairs: manifest with the splits `extract` and `analyze`; it must pass :func:`emocircuits.data.check`.
        folder: where everything is kept: ``run.json``, a file or several of each step, ``circuit.json``.
        settings: numbers and readings; the defaults are those of method.md.
        name: of the model, for people.
        questions: that are not about feelings: a strength of VEENA that loses them is not chosen.
        allow_unlicensed: take pairs that name no licence.
        fresh: find everything again, whatever the folder holds.
        progress: show progress bars.
        say: gets a line for each step.

    Returns:
        The circuit, as it stands in ``circuit.json``.

    Raises:
        ValueError: unfit pairs; an emotion with too few kept pairs; answers that never name an emotion; no layer in
            which steering has an effect; a folder with results of another model or of other pairs, or with damaged
            files. What was done before stays in the folder.
    """
    settings, folder = settings or Settings(), Path(folder)
    settings.require(subject)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder for the results")
    check(pairs, lexicon=subject.lexicon.words, allow_unlicensed=allow_unlicensed).require()
    manifest = Manifest.load(pairs)
    extract, analyze = (Pairs.load(manifest.split(s), subject) for s in ("extract", "analyze"))
    missing = sorted(set(analyze.emotions) - set(extract.emotions))
    if missing:
        raise ValueError(
            f"{pairs}: {', '.join(missing)} is in analyze but not in extract, so it has no steering vector"
        )
    about = identity(subject, extract, analyze, name)
    record = _opened(folder, about, fresh)
    record |= {"settings": dc.asdict(settings), "seed": settings.seed, **provenance(), "skipped": {}}
    write_json(folder / "pairs.json", {"path": str(pairs), "average_over": None, **manifest.statistics()})
    run = Run(subject, extract, analyze, settings, folder, progress, about["fingerprint"], tuple(questions))
    for step in STEPS:
        _step(step, run, record, about, say)
        write_json(folder / FILE, record)
    circuit = circuit_of(run)
    circuit.save(folder / CIRCUIT)
    record["total_seconds"] = sum(s["seconds"] for s in record["steps"].values())
    write_json(folder / FILE, record)
    return circuit


def faces(folder: str | Path, *, identities: int, seed: int, progress: bool = False) -> Path:
    """Pairs of drawn faces in a run folder, for the embedded model; the manifest, which may be there already."""
    where = Path(folder) / f"{FACES}-{identities}-{seed}"
    manifest = where / "pairs.jsonl"
    return (
        manifest
        if manifest.is_file()
        else build_faces(where, identities=identities, seed=seed, progress=progress).pairs
    )


def identity(subject: Subject, extract: Pairs, analyze: Pairs, name: str = "") -> dict[str, Any]:
    """What a run is of: the model, how it is asked, and the pairs."""
    config: Any = subject.model.config
    asked = {
        "prompt": subject.prompt("{event}"), "answer": subject.answer, "limit": subject.limit,
        "lexicon": subject.lexicon.name, "words": {e: sorted(w) for e, w in subject.lexicon.words.items()},
    }  # fmt: skip
    return {
        "model": name or str(config.model_type), "model_type": str(config.model_type),
        "layers": subject.handle.geometry.layers, "heads": subject.handle.geometry.heads,
        "fingerprint": weights_fingerprint(subject.model), "asked": asked,
        "pairs": {"extract": len(extract), "analyze": len(analyze), "sha256": _digest((extract, analyze))},
    }  # fmt: skip


def _digest(parts: Sequence[Pairs]) -> str:
    digest = hashlib.sha256()
    for pairs in parts:
        for i, r in enumerate(pairs.records):
            digest.update(json.dumps([r.id, r.emotion, r.event, r.split]).encode())
            for side in SIDES:
                image = pairs.images(side)[i]
                digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def _opened(folder: Path, about: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """The record of a folder, or a new one."""
    path = folder / FILE
    new = {"format": FORMAT, **about, "steps": {}}
    if fresh or not path.exists():
        if not fresh and any((folder / step.file).exists() for step in STEPS):
            raise ValueError(f"{folder}: has results but no {FILE}, so nobody knows of what; name a new folder")
        _forget(folder, FILE, CIRCUIT, *(step.file for step in STEPS))
        return new
    record: Any = read_json(path, "a run")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not a run (expected format {FORMAT!r}); name a new folder")
    for key, what in (("fingerprint", "another model"), ("asked", "a model asked otherwise"), ("pairs", "other pairs")):
        if record.get(key) != about[key]:
            raise ValueError(
                f"{folder}: holds results of {what} ({record.get('model')}); name a new folder, or find everything "
                "again in this one (fresh)"
            )
    return {**new, "steps": record["steps"]}


def _step(
    step: Step, run: Run, record: dict[str, Any], about: dict[str, Any], say: Callable[[str], None]
) -> None:  # fmt: skip
    """Load a step or find it."""
    steps, own = record["steps"], {name: getattr(run.settings, name) for name in step.settings}
    why = step.needless(run)
    if why:
        record["skipped"][step.name] = why
        steps.pop(step.name, None)
        _forget(run.folder, step.file)
        say(f"{step.name}: left out, {why}")
        return
    rests = {name: steps[name]["identity"] for name in step.after if name in steps}
    key = json.dumps(
        [step.name, own, step.more(run), rests, about["fingerprint"], about["asked"], about["pairs"]], sort_keys=True
    )
    which = hashlib.sha256(key.encode()).hexdigest()
    old = steps.get(step.name)
    if old and old["identity"] == which:
        try:
            run.found[step.name] = step.kind.load(run.folder)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{run.folder / step.file}: damaged ({error!r}); find everything again (fresh)") from error
        say(f"{step.name}: {step.tell(run.found[step.name])} (was there, {old['seconds']:.1f} s)")
        return
    if old:
        say(f"{step.name}: settings have changed, or what it rests on; found again")
    # Nothing older may stand beside what is found now, also if this is interrupted.
    stale = [step.name]
    for later in STEPS:
        if set(later.after) & set(stale):
            stale.append(later.name)
    for other in STEPS:
        if other.name in stale:
            steps.pop(other.name, None)
            _forget(run.folder, other.file, CIRCUIT)
    write_json(run.folder / FILE, record)
    wall, cpu = time.perf_counter(), time.process_time()
    run.found[step.name] = found = step.find(run)
    found.save(run.folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    steps[step.name] = {
        "identity": which,
        "settings": own,
        "seconds": wall,
        "cpu_seconds": cpu,
        "says": step.tell(found),
    }
    say(f"{step.name}: {step.tell(found)} ({wall:.1f} s)")


def _forget(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
