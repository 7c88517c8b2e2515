"""`python -m app.worker FD`: one child for each loaded model; FD is its end of a socket pair."""

import sys

from app.childhood import leave_signals_to_parent

if __name__ == "__main__":
    leave_signals_to_parent()

    from app.worker.main import main

    sys.exit(main(sys.argv))
