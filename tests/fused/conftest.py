"""The problems and the independent oracle of the emokernels tests serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "emokernels"))
