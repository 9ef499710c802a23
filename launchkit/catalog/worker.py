"""A process that traces one model as often as it is asked to: ``python -m launchkit.catalog.worker``.

Standard input brings the pickled configuration and profile, then a ``TraceKey`` at a time; standard output takes for
each what ``encode`` makes of its program, or the error. Whoever starts it is ``workers``, with the same code.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from launchkit.catalog.codec import encode
from launchkit.errors import LaunchkitError


def main() -> None:
    """Answers until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's interrupt is for the process that waits for us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may come between
    from launchkit.trace import trace_model  # lazy: imports torch and transformers

    config, profile = pickle.load(sys.stdin.buffer)
    while True:
        try:
            key = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: bytes | LaunchkitError
        try:
            answer = encode(profile, {key.text: trace_model(config, key)})
        except LaunchkitError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
