"""Flower's SuperNode, which ends when its work does.

`flower-supernode` itself lives on after an error of TLS (a proxy whose server is down is enough), with nobody
at work in it: its interface to apps runs in a thread that keeps the process.
"""

import os

from flwr.supernode.cli.flower_supernode import flower_supernode


def main() -> None:
    """Be `flower-supernode`, with its arguments; the caller starts it again."""
    try:
        flower_supernode()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
