"""Exact activation patching of whole models, no work done twice."""
