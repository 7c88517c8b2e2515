"""`python -m app.cli` is `pestle`."""

import sys

from app.cli import main

sys.exit(main())
