"""The audit: every fused kernel in every configuration, compiled without a GPU, and held to what must be true of it.

``python -m emokernels.audit --arch sm_90`` walks the package `emokernels.fused`. A module there that defines
``audit_launches(arch)`` names what is compiled: an iterator of ``(name, launch)`` or ``(name, launch, expects)``, built
from tensors on the "meta" device by the very functions that launch the kernel. `expects` is a dict, see
`emokernels.audit.kernels.Expects`.

Nothing in here runs a kernel, so nothing in here says how fast one is.
"""
