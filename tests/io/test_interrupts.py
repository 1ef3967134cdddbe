"""What a signal does: to handlers, to a command, and that nobody else's handler is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from epmq_gptq.io.interrupts import handled, terminated


class Told(BaseException):
    pass


def tell(*_) -> None:
    raise Told


def test_within_it_is_called_and_afterwards_everything_is_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Told), handled(tell, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_is_left_to_another_handler():
    def other(*_) -> None:
        pass

    before = signal.signal(signal.SIGTERM, other)
    try:
        with handled(tell, signal.SIGTERM, instead_of=signal.SIG_DFL):
            assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_on_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with handled(tell, signal.SIGTERM):
            seen.append(signal.getsignal(signal.SIGTERM))

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    assert seen == [before] and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_of_a_program_around_python(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as around:
        around.setattr(signal, "getsignal", lambda number: None)
        with handled(tell, signal.SIGTERM):
            pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminated_process_leaves_with_its_code():
    with pytest.raises(SystemExit) as left:
        terminated(signal.SIGTERM, None)
    assert left.value.code == 143


# A signal while a command line is read, and while its operation runs.
_PROGRAM = """
import signal, sys
# As from a terminal, also where the tests were started in the background and SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from epmq_gptq import cli

moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
if moment == "parsed":
    cli.Group.parse_args = lambda *_: signal.raise_signal(number)
else:
    from epmq_gptq.commands import explain
    explain.sections = lambda: signal.raise_signal(number)
cli.main()
"""


@pytest.mark.parametrize("moment", ["parsed", "running"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_command_leaves_with(moment, number, code):
    command = [sys.executable, "-c", _PROGRAM, moment, str(int(number)), "explain", "EPMQ-F30"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = {130: "error: interrupted;", 143: "error: ended by SIGTERM;"}[code]
    assert (said in done.stderr) is (moment == "running")
