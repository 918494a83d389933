"""emokernels without any model: attention over tensors, with a boost of one route of one head.

python examples/attention_on_any_tensors.py
"""

import torch

import emokernels as emo

torch.manual_seed(0)
q, k, v = (torch.randn(1, 8, 700, 64) for _ in range(3))
roles = torch.full((1, 700), int(emo.Role.QUERY), dtype=torch.uint8)
roles[:, :30] = int(emo.Role.SYSTEM)
roles[:, 30:606] = int(emo.Role.VISUAL)
roles[:, -1] = int(emo.Role.LAST)

gain = torch.ones(1, 8, len(emo.Role), len(emo.Role))
gain[:, 3, emo.Role.QUERY, emo.Role.VISUAL] = 1.5
plain = emo.attention(q, k, v, roles=roles)
boosted = emo.attention(q, k, v, roles=roles, routes=emo.Routes(gain=gain))

changed = (boosted.z - plain.z).abs().amax(-1)[0] > 1e-6
print("heads that changed:", changed.any(-1).nonzero().flatten().tolist())
rows = changed[3].nonzero().flatten().tolist()
print("rows that changed: ", rows[0], "to", rows[-1])
