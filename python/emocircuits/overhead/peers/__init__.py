"""The ways people put an intervention into a model today, written with care: what emokernels is compared with.

Each is a function ``(model, plan, roles) -> context manager`` that changes one model until it is left. They share no
arithmetic with emokernels: `edits` reads a plan, the rest is stock transformers and torch.
"""

from emocircuits.overhead.peers.bias import dense_bias
from emocircuits.overhead.peers.flex import flex
from emocircuits.overhead.peers.hooks import hooks

__all__ = ["dense_bias", "flex", "hooks"]
