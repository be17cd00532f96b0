"""Errors that pnp_trt raises, each with a one-sentence message and an exit code for the command line.

::

    PnpError                    exit code 1: the work failed
    ├── InputError              exit code 2: the caller's input was wrong; nothing was changed
    │   ├── BundleNotFound      no bundle of this name
    │   ├── BundleCorrupt       a bundle that is damaged, or differs from its manifest
    │   ├── IncompatibleDevice  a bundle whose engines cannot run on this machine
    │   └── MissingDependency   a package that is not installed
    └── Cancelled               exit code 130: a callback stopped the work
"""


class PnpError(Exception):
    """The work failed; the message states what was wrong, the value, and what to do."""

    exit_code = 1


class InputError(PnpError):
    """The caller's input was wrong, such as a name, a value or a file; nothing was changed."""

    exit_code = 2


class BundleNotFound(InputError):
    """No bundle has this name or path."""


class BundleCorrupt(InputError):
    """A bundle's manifest is not valid, or a file differs from what the manifest states."""


class IncompatibleDevice(InputError):
    """A bundle's engines cannot run on this machine: another GPU, compiler version or operating system."""


class MissingDependency(InputError):
    """A package is not installed; the message includes the command that installs it."""


class Cancelled(PnpError):
    """The caller's own callback stopped the work; no image was generated."""

    exit_code = 130
