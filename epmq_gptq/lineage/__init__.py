"""How a merged model was made, read from what the merge left in its folder.

Only text files are read here; neither torch nor GPTQModel is needed.
"""

from .draft import Draft, Given, draft_of_merge
from .facts import Lineage
from .read import LINEAGE_FILES, read_lineage

__all__ = ["LINEAGE_FILES", "Draft", "Given", "Lineage", "draft_of_merge", "read_lineage"]
