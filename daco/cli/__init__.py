"""The command line `daco`: starts it, or says which extra of the package it needs."""

import sys


def main() -> int:
    """Run the command line; returns its exit code."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"error: expected the packages of the command line, got no {error.name}; "
            "run `pip install 'daco[cli]'`",
            file=sys.stderr,
        )
        return 2
    try:
        from daco.cli.app import run

        return run()
    except KeyboardInterrupt:  # while libraries are loaded; commands end by themselves
        print("\nstopped", file=sys.stderr)
        return 130
