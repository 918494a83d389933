"""Contrastive pairs for tests: of the planted model, and of the embedded one."""

import numpy as np
import planted

from emocircuits.circuits.pairs import Pairs
from emocircuits.data.pairs import Record
from emocircuits.embedded import faces, language

EVENTS = ("the report is ready .", "the road is closed today .", "the bus goes only once .")


def planted_pairs(folder, each=4, emotions=planted.EMOTIONS, split="extract", first=0):
    """``each`` pairs an emotion: coloured and grey."""
    records = []
    for emotion in emotions:
        for i in range(first, first + each):
            files = []
            for side in (emotion, "neutral"):
                file = folder / f"{emotion}-{i}-{side}.png"
                planted.picture(side, i).save(file)
                files.append(file)
            records.append(Record(f"{emotion}-{i}", emotion, *files, EVENTS[i % 3], split, licence="CC0-1.0"))
    return Pairs.load(records)


def face_pairs(folder, people, emotions=faces.EMOTIONS, split="extract", seed=0):
    """Full-intensity faces and their neutral twins, with an event that suggests another emotion."""
    rng = np.random.default_rng(seed)
    records = []
    for person in people:
        neutral = folder / f"{person}.png"
        faces.face(person, "neutral", 0.0).save(neutral)
        for emotion in emotions:
            file = folder / f"{person}-{emotion}.png"
            faces.face(person, emotion, 1.0).save(file)
            suggests = str(rng.choice([e for e in faces.EMOTIONS if e != emotion]))
            clauses = language.CLAUSES[suggests]
            event = language.make_event(clauses[int(rng.integers(len(clauses)))], rng)
            records.append(Record(f"{person}-{emotion}", emotion, file, neutral, event, split, licence="CC0-1.0"))
    return Pairs.load(records)
