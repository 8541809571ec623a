"""Stand in for `python` where tests start the project's programs: ask the nursery for a fork of its
process (see nursery.py), pass signals on to it, and end as it ends. Run anything else with Python.
"""

import json
import os
import signal
import socket
import sys

PYTHON = os.environ["MPD_NURSERY_PYTHON"]
PROGRAMS = {
    "mpd_data.cli",
    "mpd_train.cli",
    "mpd_train.export_cli",
    "mpd_rounds",
    "mpd_rounds.cli",
    "mpd_rounds.study.cli",
    "mpd_rounds.report.cli",
    "torch.distributed.run",
}


def main():
    words = sys.argv[1:]
    if words[:1] == ["-u"]:  # torchrun's
        words = words[1:]
    if words[:1] != ["-m"] or words[1] not in PROGRAMS:
        os.execv(PYTHON, [PYTHON, *words])
    folder = os.getcwd()  # noqa: PTH109  # pathlib takes longer to import than all the rest
    order = {"words": words[1:], "cwd": folder, "env": dict(os.environ)}
    nursery = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nursery.connect(os.environ["MPD_NURSERY"])
    # Signals that come before the fork exists wait for it.
    passed = {signal.SIGINT, signal.SIGTERM}
    ignored = {number for number in passed if signal.getsignal(number) is signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed)
    order["ignored"] = sorted(ignored)
    # A signal to a group of ours reaches the programs that the fork starts.
    send = os.killpg if os.getpgrp() == os.getpid() else os.kill
    socket.send_fds(nursery, [json.dumps(order).encode()], [0, 1, 2])
    answer = nursery.recv(4096).split()
    if answer[0] == b"refused":
        if "MPD_NURSERY_STRICT" in os.environ:
            sys.exit(answer[1:])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
        os.execv(PYTHON, [PYTHON, *words])
    pid = int(answer[1])
    for number in passed - ignored:
        signal.signal(number, lambda received, _: send(pid, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
    ending = nursery.recv(64).split()
    code = os.waitstatus_to_exitcode(int(ending[1])) if ending else -signal.SIGKILL
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
