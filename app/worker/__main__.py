"""`python -m app.worker FD`: one child for each loaded model; FD is its end of a socket pair."""

import sys

from app.worker.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
