"""Triton kernels: interventions as part of the arithmetic that is there anyway. Import triton, so import lazily."""
