"""Edits of activations that exist already, for places where no kernel of ours computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .composed.mlp import edit_columns
from .errors import message, require_tensor
from .neurons import NeuronEdits


def edit_neurons(activations: Tensor, neurons: NeuronEdits) -> Tensor:
    """Edit a few neurons of MLP activations, the input of the down projection.

    The always correct way to a neuron edit, at the price of one copy; `gated_activation` edits while it computes.

    Args:
        activations: ``[B, N, F]`` float; left alone.
        neurons: edits that fit it.

    Returns:
        ``[B, N, F]`` in the same dtype, fresh memory. Differentiable in activations and in the values of the edits.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    require_tensor("activations", activations, "Pass the input of down_proj.")
    if activations.dim() != 3:
        raise ValueError(message("activations", "shape [B, N, F]", activations, "Add batch and position dimensions."))
    neurons.check_against(activations.shape[0], activations.shape[1], activations.shape[2], activations.device)
    return run_edit_neurons(activations, neurons)


def run_edit_neurons(activations: Tensor, neurons: NeuronEdits) -> Tensor:
    """`edit_neurons` without validation, for callers that have validated once."""
    edited = activations.clone(memory_format=torch.contiguous_format)
    edit_columns(edited, neurons.index, neurons.scale, neurons.shift, neurons.replace, neurons.mask)
    return edited
