"""The engines whose rules are known here, as ``engines.json`` declares them.

Of each: the release that its rules and lists were read from; the file from which it takes bits,
group size, ``dynamic`` and the rest; and the models that it knows by name, by ``architectures``
(vLLM, SGLang: models that generate, and CLIP) or by ``model_type`` (GPTQModel, TGI). An engine that
does not know a name may still run it in another way, so that a name which is missing is never more
than a warning. Tests compare the lists with the packages that are installed.
"""

from __future__ import annotations

import json
from pathlib import Path

_DECLARED = json.loads(Path(__file__).with_name("engines.json").read_text(encoding="utf-8"))

VERSIONS: dict[str, str] = {name: each["version"] for name, each in _DECLARED.items()}
# What is judged when nobody asks for an engine by name; no release of the others will follow.
ENGINES = {name: VERSIONS[name] for name, each in _DECLARED.items() if not each["is_archived"]}
CONFIG_FILE: dict[str, str] = {name: each["config_file"] for name, each in _DECLARED.items()}
ARCHITECTURES, MODEL_TYPES = (
    {name: frozenset(each[key]) for name, each in _DECLARED.items() if key in each}
    for key in ("architectures", "model_types")
)
