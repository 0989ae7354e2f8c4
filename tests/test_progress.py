"""Bars on a terminal, plain lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

from dynaslim.progress import progress

SCRIPT = (
    "import time; from dynaslim.progress import progress\n"
    "with progress('stage I', 40, done=10) as bar:\n"
    "    for n in range(30):\n"
    "        time.sleep(0.02); bar.advance(note=f'{n} img/s  loss 1.00 | 1.10 1.20 | 1.30')\n"
)


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress("stage I", 40, done=10) as bar:
        for _ in range(30):
            bar.advance(note="5 img/s")
    with progress("reading", None) as bar:
        bar.advance(3)
    captured = capsys.readouterr()
    assert re.fullmatch(r"stage I: 40/40 in \d+ s  5 img/s\n", captured.err)
    assert captured.out == ""


def test_a_bar_with_the_time_left_on_a_terminal():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # on Linux the other end has been closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "40/40" in text
    assert re.search(r"\d/40 +0:00:0\d +0:00:0\d", text), "elapsed and left"
    assert "img/s  loss 1.00 | 1.10 1.20 | 1.30" in text
