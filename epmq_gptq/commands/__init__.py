"""The commands of ``epmq-gptq``, one module each; ``cli`` puts them together.

Only light modules are imported at their top: GPTQModel takes seconds.
"""
