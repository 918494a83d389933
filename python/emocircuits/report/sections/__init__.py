"""Parts of a localisation's report: each is a module with ``section(folder)``, which reads the files of a run folder.

Every number on the page stands in one of those files. A section whose file is not there is None.
"""

from __future__ import annotations

import dataclasses as dc


@dc.dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        title: its heading.
        html: figures and tables, without plotly.js, which is on the page once.
        text: what they show, in a sentence or two: average or single example, and of how many.
    """

    title: str
    html: str
    text: str = ""
