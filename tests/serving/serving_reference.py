"""Which prompts the serving tests compare, and what the reference says to them."""

from dataclasses import dataclass

NEW_TOKENS = 32
PROMPT_TOKENS = 24
CANDIDATES_PER_CORPUS = 8
# A prompt counts only where every token of the reference wins by this much (logit). Against
# float32, serving in float16 moves a log-probability by 0.01 at most on this model (bfloat16:
# 0.08), so a closer call would test rounding and not the checkpoint.
MIN_MARGIN = 0.05
MIN_PROMPTS = 6


@dataclass(frozen=True)
class Reference:
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def candidate_prompts(corpora: dict[str, list[int]]) -> list[list[int]]:
    """Evenly spaced windows of each expert's text, as token ids."""
    prompts = []
    for tokens in corpora.values():
        span = (len(tokens) - PROMPT_TOKENS) // CANDIDATES_PER_CORPUS
        starts = range(0, span * CANDIDATES_PER_CORPUS, span)
        prompts += [tokens[start : start + PROMPT_TOKENS] for start in starts]
    return prompts


def keep_clear_cut(prompts: list[list[int]], rows: list[dict]) -> Reference:
    """Drops the prompts with a close call; `rows` are those of gptqmodel_tokens.py."""
    clear = [i for i, row in enumerate(rows) if min(row["margins"]) >= MIN_MARGIN]
    if len(clear) < MIN_PROMPTS:
        raise ValueError(
            f"only {len(clear)} of {len(rows)} prompts are clear-cut (margin >= {MIN_MARGIN}), "
            f"{MIN_PROMPTS} are needed: train the model in build_checkpoint.py for longer."
        )
    return Reference(
        prompts=[prompts[i] for i in clear],
        tokens=[rows[i]["tokens"] for i in clear],
        logprobs=[rows[i]["logprobs"] for i in clear],
    )
