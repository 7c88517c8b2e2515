"""`python -m app.worker FD`: one child for each loaded model; FD is its end of a socket pair."""

import signal
import sys

if __name__ == "__main__":
    # Before the imports that take long: the terminal's Ctrl-C is the parent's business from the first moment on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    from app.worker.main import main

    sys.exit(main(sys.argv))
