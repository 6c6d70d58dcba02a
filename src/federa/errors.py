"""What goes wrong, in one line; apart from `types` so that those who need no tensors need not load them."""


class FederaError(ValueError):
    """A mistake in what was asked (recipe, data, run directory): one line that says what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def in_one_line(error: BaseException) -> str:
    """Return what somebody else's error says, on one line and not too long."""
    return " ".join(str(error).split())[:300]


class DoesNotFitError(FederaError):
    """A method that this encoder gives nothing to do; the other methods of a comparison go on."""


class RowError(FederaError):
    """A row of a table that cannot be used.

    Args:
        row: its number in the table at hand, from 0.
        what: is wrong with it.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"data: row {row}: {what}")
        self.row, self.what = row, what


class RoundFailedError(RuntimeError):
    """Too few updates of a round counted; the last good state is kept in the checkpoint."""
