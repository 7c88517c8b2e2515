"""Write the generated tables into `docs/api.md`: `python scripts/write_api_docs.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.server.schema.docs import replace_tables  # noqa: E402 - found through the line above


def main() -> None:
    """Rewrite the page."""
    page = ROOT / "docs" / "api.md"
    page.write_text(replace_tables(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
