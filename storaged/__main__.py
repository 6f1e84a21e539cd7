"""The command ``storaged``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from storaged.cli import commands, render
from storaged.cli.parser import build_parser
from storaged.errors import StoragedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (it failed), 130 (Ctrl-C) or 141 (no reader)."""
    as_json = False
    try:
        args = build_parser().parse_args(argv)
        as_json = getattr(args, "json", False)
        return commands.run(args)
    except StoragedError as error:
        render.failure(error, as_json=as_json)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
