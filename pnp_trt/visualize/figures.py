"""Figures whose labels are other people's text: names, prompts and paths are drawn as they are written."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """A block, or as a decorator a function, in which matplotlib takes ``$`` for a dollar sign and never runs TeX.

    Otherwise a prompt such as ``a $5 coin and a $10 note`` would be set as a formula, and ``$\\frac$`` would raise.
    Characters that the font lacks are drawn as boxes without a warning.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield
