"""Finding the circuit: steering vectors, critical heads, explicit-state neurons."""

from emocircuits.circuits.neurons import Neuron, explicit_state_neurons, vocabulary_projection
from emocircuits.circuits.patch_effects import head_effects, random_like, ranked
from emocircuits.circuits.steering import SteeringVectors, steering_vectors

__all__ = [
    "Neuron",
    "SteeringVectors",
    "explicit_state_neurons",
    "head_effects",
    "random_like",
    "ranked",
    "steering_vectors",
    "vocabulary_projection",
]
