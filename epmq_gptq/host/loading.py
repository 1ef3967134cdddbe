"""Loading a merged checkpoint as GPTQModel's model, on the device that was asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import EPMQError, EPMQInputError

DEVICES = ("cpu", "cuda")


def choose_device(wanted: str | None) -> str:
    """The device of a run: what is asked for, else a GPU where there is one.

    Raises:
        EPMQInputError: another kind of device, or a GPU where torch sees none.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]
    if kind not in DEVICES:
        raise _no_device(f"should be one of {', '.join(DEVICES)}, got `{wanted}`")
    if kind == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise _no_device("is `cuda`, but torch sees no GPU here", "Use `--device cpu`.")
    number = wanted.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdecimal() or int(number) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise _no_device(f"should be one of the {seen} GPUs that torch sees, got `{wanted}`")
    return wanted


def _no_device(cause: str, remedy: str = "Leave it out for a GPU where there is one.") -> EPMQError:
    return EPMQInputError(
        f"`--device` {cause}.", code="EPMQ-O01", subject="`--device`", remedy=remedy
    )


def load_merged(merged: Path, config, dtype: str | None, device: str):
    """The host's model of a merged checkpoint; its layers' weights stay on disk until their turn.

    Raises:
        EPMQInputError: the host refuses the model or an option.
    """
    # Seconds: whoever only chooses a device does without. Ours first: the door settles how many
    # workers GPTQModel may start.
    from .door import install

    install()
    from gptqmodel import GPTQModel

    if dtype is None and device == "cpu":
        # The host would take bfloat16, 15 to 75 times slower on CPUs without AVX512-BF16.
        dtype = "float32"
    options = {} if dtype in (None, "auto") else {"dtype": getattr(torch, dtype)}
    try:
        return GPTQModel.load(str(merged), config, device=device, **options)
    except EPMQInputError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        # What the host refuses here is an option, or a model that it does not know.
        raise EPMQInputError(
            f"GPTQModel cannot load `{merged.name}` with these options: {str(error).rstrip('.')}.",
            code="EPMQ-F38",
            subject=f"`{merged.name}`",
            remedy="Its documentation lists the architectures and options that it supports.",
        ) from error
