"""What config.json of a quantized T5 says beyond what the host writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

_IN_BLOCK = re.compile(r"(?:encoder|decoder)\.block\.\d+\.")


def describe(folder: Path, packed: Sequence[str], *, own_head: bool) -> None:
    """Complete config.json of a checkpoint that was just written.

    transformers leaves loading of GPTQ to optimum, which knows one stack of blocks and guesses its
    name from a list that has no T5. An empty name stands for the whole model; then it has to be
    told which layers are packed, or it would take `lm_head` for one. The kernel is named because
    T5 of transformers asks `wo` for its weight, which most kernels have not.

    Args:
        packed: full names of the quantized layers.
        own_head: whether the head is not the embedding. transformers 5 calls every T5 tied when it
            writes, older versions would then use the embedding, and scale what goes into it.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") == "gptq":
        # Names in a block say it all, unless `dynamic` leaves out some of the blocks' layers.
        whole = quantization.get("dynamic")
        names = packed if whole else {_IN_BLOCK.sub("", name) for name in packed}
        quantization |= {
            "block_name_to_quantize": "",
            "modules_in_block_to_quantize": [sorted(names)],
            "backend": "gptq_torch",
        }
    if own_head and config.get("scale_decoder_outputs") is False:
        config["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
