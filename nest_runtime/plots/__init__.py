"""Pictures of what was located, trained and measured: PNG and SVG files by matplotlib (extra ``plot``).

view.py says what is drawn (one value for sites files and patches alike), sources.py reads what the user
names, scan.py runs a model on prompts where a picture needs more than the files keep. The rest draws:
neurons.py, profiles.py, results.py. The same input gives the same bytes.
"""

from nest_runtime.plots.draw import KINDS, Drawn, draw
from nest_runtime.plots.sources import Sources, read_sources
from nest_runtime.plots.view import NeuronView, SiteView

__all__ = ["KINDS", "Drawn", "NeuronView", "SiteView", "Sources", "draw", "read_sources"]
