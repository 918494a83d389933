"""Finding the circuit: steering vectors, critical heads, explicit-state neurons."""

from emocircuits.circuits.explicit import ExplicitNeuron, explicit_state_neurons
from emocircuits.circuits.patch_effects import head_effects, random_like, ranked
from emocircuits.circuits.steering import SteeringVectors, steering_vectors
from emocircuits.circuits.vocabulary import vocabulary_projection

__all__ = [
    "ExplicitNeuron",
    "SteeringVectors",
    "explicit_state_neurons",
    "head_effects",
    "random_like",
    "ranked",
    "steering_vectors",
    "vocabulary_projection",
]
