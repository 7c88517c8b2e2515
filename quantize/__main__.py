"""Makes `python -P -m quantize` work."""

import sys

from quantize.cli import main

sys.exit(main())
