"""Draw names, prompts and paths literally in matplotlib figures."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Disable matplotlib's formulas and TeX in a block, or as a decorator in a function.

    Otherwise a prompt such as ``a $5 coin and a $10 note`` would be typeset as a formula, and ``$\\frac$`` would raise
    an error.  Characters that the font lacks are drawn as boxes, without a warning.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield
