"""A run that survives a kill: what it has done is committed layer by layer, and it goes on there.

On top of GPTQModel's checkpoints (``CheckpointConfig``): its store, its codec, its boundaries. Ours
is which run a checkpoint is of (``identity.py``), the state of E-PMQ (``adapter.py``), when it is
committed, and the signals (``session.py``).
"""

from .session import Resumable, resumable

__all__ = ["Resumable", "resumable"]
