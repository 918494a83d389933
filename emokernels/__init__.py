"""emokernels: attention and MLP blocks with interventions inside. Tensors in, tensors out.

>>> import torch, emokernels as emo
>>> q = k = v = torch.randn(1, 4, 8, 16)
>>> roles = torch.tensor([[1, 2, 2, 2, 2, 3, 3, 4]], dtype=torch.uint8)
>>> routes = emo.Routes.identity(heads=4, fields=("gain",))
>>> routes.gain[:, 2, emo.Role.QUERY, emo.Role.VISUAL] = 1.5    # head 2 looks harder at the image
>>> emo.attention(q, k, v, roles=roles, routes=routes).z.shape
torch.Size([1, 4, 8, 16])
"""

from ._version import __version__
from .attention import AttentionOutput, attention
from .backends import Backend, backends
from .edits import edit_neurons
from .flow import attention_flow
from .fold import fold_gain
from .heads import HeadEdits
from .lens import LensOutput, TopTokens, logit_lens
from .mlp import gated_activation
from .neurons import NeuronEdits
from .routes import Role, Routes

__all__ = [
    "AttentionOutput",
    "Backend",
    "HeadEdits",
    "LensOutput",
    "NeuronEdits",
    "Role",
    "Routes",
    "TopTokens",
    "__version__",
    "attention",
    "attention_flow",
    "backends",
    "edit_neurons",
    "fold_gain",
    "gated_activation",
    "logit_lens",
]
