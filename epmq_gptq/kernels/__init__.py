"""Bridge to the checkout's top-level ``kernels/`` folder.

Installed packages hold the kernel files right here (``setup.py`` maps them); a checkout keeps them
at the top level, and this package's path is pointed there.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if (_checkout / "gram.py").is_file():
    __path__.append(str(_checkout))
