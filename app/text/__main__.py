"""Starts the text child: `python -P -m app.text FD`."""

import sys

from app.text.main import main

sys.exit(main(sys.argv))
