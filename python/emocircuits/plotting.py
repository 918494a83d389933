"""The look that all figures share."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go


def style(figure: go.Figure, height: int = 340, **layout: Any) -> go.Figure:
    """Common look: no chart junk, readable on a phone."""
    figure.update_layout(
        template="simple_white", height=height, margin=dict(l=48, r=12, t=12, b=44),
        font=dict(family="inherit", size=13),
        legend=dict(orientation="h", y=1.12, x=0), hoverlabel=dict(font_size=13), **layout,
    )  # fmt: skip
    return figure
