"""How a merged model was made, read from what the merge left in its folder.

Only text files are read here; neither torch nor GPTQModel is needed.
"""

from .facts import Lineage
from .read import LINEAGE_FILES, read_lineage

__all__ = ["LINEAGE_FILES", "Lineage", "read_lineage"]
