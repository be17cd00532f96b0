"""The errors that pnp_trt raises on purpose: one clear sentence each, and the exit code of the command line."""


class PnpError(Exception):
    """Something could not be done; the message says what, the value, and what to do."""

    exit_code = 1


class InputError(PnpError):
    """The caller's input was wrong: a name, a range, a file; nothing was changed."""

    exit_code = 2


class Cancelled(PnpError):
    """The caller's own callback stopped the work; no picture was made."""

    exit_code = 130
