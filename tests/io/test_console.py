"""What reaches the terminal: one line per error, the right exit code, no chatter of the host."""

import io
import logging
import os
import signal
import sys
import threading
import warnings

import pytest
from rich.console import Console

from epmq_gptq.errors import (
    EPMQError,
    EPMQHostError,
    EPMQInputError,
    EPMQNumericalError,
    EPMQWarning,
    ExitCode,
)
from epmq_gptq.io.console import HostOutput, Reporter, StepProgress, TimeLeft, spoken

PARTS = dict(code="EPMQ-S01", subject="it", remedy="Do.")


def leave(error, *, verbose=False):
    reporter = Reporter(verbose=verbose)
    with pytest.raises(SystemExit) as left, reporter.exit_codes():
        reporter.host.write("INFO  fine\nWARN  the disk is slow\n")
        raise error
    return left.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EPMQInputError("`x` is\n  wrong [red].", **PARTS), 2),
        (EPMQNumericalError("`x` is\n  wrong [red].", **PARTS), 3),
        (EPMQHostError("`x` is\n  wrong [red].", **PARTS), 1),
        (EPMQError("`x` is\n  wrong [red].", **PARTS), 1),
    ],
)
def test_our_errors_are_one_line(capsys, error, code):
    assert leave(error) == code
    assert capsys.readouterr().err == "error: `x` is wrong [red]. Do. [EPMQ-S01]\n"


def test_an_error_ends_with_its_code_and_is_handed_on(capsys):
    error = EPMQInputError("`x` is wrong.", code="EPMQ-O01", subject="`x`", remedy="Drop it.")
    seen = []
    with pytest.raises(SystemExit), Reporter().exit_codes(seen.append):
        raise error
    assert capsys.readouterr().err == "error: `x` is wrong. Drop it. [EPMQ-O01]\n"
    assert seen == [error]


def test_our_warnings_are_lines_of_ours_and_said_once(capsys):
    reporter = Reporter()
    with pytest.warns(UserWarning, match="theirs"), reporter.exit_codes(), reporter.quiet_host():
        for _ in range(2):
            warnings.warn(EPMQWarning("`x` is\n odd.", code="EPMQ-F16"), stacklevel=1)
        warnings.warn("theirs", stacklevel=1)
    assert capsys.readouterr().err == "warning: `x` is odd. [EPMQ-F16]\n"


def test_an_interrupt_is_one_line(capsys):
    assert leave(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted; no checkpoint was written.\n"


def test_other_errors_are_one_line_with_a_hint_and_the_hosts_warnings(capsys):
    assert leave(ZeroDivisionError("by zero")) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ZeroDivisionError: by zero (run again with --verbose")
    assert second == "  GPTQModel: WARN  the disk is slow"


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), EPMQInputError("wrong.", **PARTS)])
def test_verbose_shows_the_traceback(capsys, error):
    leave(error, verbose=True)
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: ")


def test_memory_has_its_own_hint(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    leave(OutOfMemoryError("full"))
    assert "lower `--batch-size` or `seqlen`" in capsys.readouterr().err


def test_a_swallowed_interrupt_still_stops_the_run():
    reporter = Reporter()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left, reporter.exit_codes():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # as some imports do
        reporter.step("load", "never said")
    assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_the_host_is_quiet_and_kept(capsys):
    reporter = Reporter()
    stdout = sys.stdout
    with reporter.quiet_host():
        sys.stdout.write("INFO  banner\n")
        sys.stderr.write("bar 1%\rbar 2%\rERROR broken\n")
        thread = threading.Thread(target=sys.stdout.write, args=("WARN  from a thread\n",))
        thread.start()
        thread.join()
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "WARNING:x:y"}))
        reporter.step("load", "seen")
    assert sys.stdout is stdout
    out, err = capsys.readouterr()
    assert out == "load        seen\n"
    assert err == ""
    assert "INFO  banner" in reporter.host.tail
    assert list(reporter.host.alarms)[:2] == ["ERROR broken", "WARN  from a thread"]
    assert "WARNING:x:y" in reporter.host.alarms


def test_verbose_lets_the_host_speak(capsys):
    reporter = Reporter(verbose=True)
    with reporter.quiet_host():
        sys.stdout.write("INFO  banner\n")
    assert capsys.readouterr().out == "INFO  banner\n"


def test_alarms_are_kept_once_without_colours():
    output = HostOutput()
    for _ in range(2):
        output.write("\x1b[33mWARN\x1b[0m  slow\n")
    output.write("a/b.py:12: FutureWarning: gone soon\n  call()\n")
    output.write("WARN  Python GIL is enabled: ...\nnot a WARN\nERROR cut in ")
    output.write("two\n")
    assert list(output.alarms) == [
        "WARN  slow",
        "a/b.py:12: FutureWarning: gone soon",
        "ERROR cut in two",
    ]


def test_without_a_terminal_progress_is_a_few_lines(capsys, monkeypatch):
    monkeypatch.setattr("epmq_gptq.io.console._PLAIN_SECONDS", 0.0)
    with StepProgress(Reporter(), "quantize", 100, "modules") as progress:
        for index in range(100):
            progress.advance(1, f"layer {index}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("quantize    100/100 modules, 0 s, layer 99")
    assert lines[4] == "quantize    50/100 modules, 0 s, 0 s left, layer 49"


def test_a_quick_run_without_a_terminal_says_only_that_it_is_done(capsys):
    with StepProgress(Reporter(), "merge", 3, "steps") as progress:
        for index in range(3):
            progress.advance(1, f"tensor {index}")
    assert capsys.readouterr().out == "merge       3/3 steps, 0 s, tensor 2\n"


def test_on_a_terminal_progress_is_a_bar():
    reporter = Reporter()
    reporter.out = Console(file=io.StringIO(), force_terminal=True, width=100)
    with StepProgress(reporter, "quantize", 2, "modules") as progress:
        progress.advance(1, "layer 0")
        progress.advance(1, "layer [1]")
    text = reporter.out.file.getvalue()
    assert "2/2 modules" in text and "layer [1]" in text


def test_the_time_left_goes_by_the_work_that_is_done(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("epmq_gptq.io.console.time.perf_counter", lambda: clock[0])
    left = TimeLeft(50.0)
    clock[0] += 60  # checks and the first inputs: no pace to go by
    assert left.after(10.0, clock[0]) is None
    clock[0] += 5
    assert left.after(10.0, clock[0]) == pytest.approx(15.0)  # 10 in 5 s, 30 to go
    clock[0] += 10
    assert left.after(30.0, clock[0]) == 0.0


def test_a_bar_says_how_much_time_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("epmq_gptq.io.console.time.perf_counter", lambda: clock[0])
    reporter = Reporter()
    reporter.out = Console(file=io.StringIO(), force_terminal=True, width=100)
    with StepProgress(reporter, "quantize", 3, "modules", work=100.0) as progress:
        progress.advance(1, "layer 0", 10.0)
        clock[0] = 300.0
        progress.advance(1, "layer 0", 30.0)
    assert "10 min left" in reporter.out.file.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (600, "10 min")])
def test_durations_are_said_as_people_do(seconds, said):
    assert spoken(seconds) == said
    assert spoken(7200) == "2.0 h"


# ---- quiet, and stdout for a machine -------------------------------------------------------------


def test_quiet_leaves_warnings_errors_and_results(capsys):
    reporter = Reporter(quiet=True)
    reporter.step("load", "not said")
    reporter.note("not said")
    with StepProgress(reporter, "merge", 1, "steps") as progress:
        progress.advance(1, "tensor")
    reporter.result.print("the table")
    reporter.warning("odd.", "EPMQ-F16")
    reporter.error("wrong.", "EPMQ-O01")
    out, err = capsys.readouterr()
    assert out == "the table\n"
    assert err == "warning: odd. [EPMQ-F16]\nerror: wrong. [EPMQ-O01]\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_for_people_leaves_stdout_to_the_machine(capsys, quiet):
    reporter = Reporter(piped=True, quiet=quiet, verbose=True)
    reporter.step("load", "said")
    reporter.result.print("the table")
    with reporter.quiet_host():
        sys.stdout.write("INFO  banner\n")
    reporter.stdout.write("{}")
    out, err = capsys.readouterr()
    assert out == "{}"
    assert err == ("" if quiet else "load        said\n") + "INFO  banner\n"


def test_a_reader_that_goes_away_is_no_failure(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        reporter = Reporter()
        with pytest.raises(SystemExit) as left, reporter.exit_codes():
            reporter.step("load", "to nobody")
        assert left.value.code == ExitCode.BROKEN_PIPE
        pipe.write("more")  # closing it flushes this, to nobody and without a word
