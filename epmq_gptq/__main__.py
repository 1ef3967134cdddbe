"""``python -m epmq_gptq``: the same as ``epmq-gptq``."""

from .cli import main

if __name__ == "__main__":
    main()
