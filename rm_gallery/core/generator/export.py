"""`python -m rm_gallery.core.generator.export`: the command `rm-gallery export-data` under another name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rm_gallery import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rm-gallery export-data` with these arguments; returns its exit status."""
    return cli.main(["export-data", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
