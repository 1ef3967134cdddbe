"""The engines whose rules are known here, and the releases that the rules were read from."""

from __future__ import annotations

# What is judged when nobody asks for an engine by name.
ENGINES = {
    "vLLM": "0.32.0",
    "SGLang": "0.5.23",
    "transformers": "5.19 with optimum 2.3",
    "GPTQModel": "7.6.0",
}
# Judged when asked for: its repository is archived, and no release will follow.
ARCHIVED = {"TGI": "3.3.7, archived"}
VERSIONS = {**ENGINES, **ARCHIVED}

# The file from which an engine takes bits, group size, `dynamic` and the rest.
CONFIG_FILE = {
    "vLLM": "config.json",
    "SGLang": "config.json",
    "transformers": "config.json",
    "GPTQModel": "quantize_config.json",
    "TGI": "config.json",
}
