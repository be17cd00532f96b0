"""Start the audit of ``audit.py`` in every Python process whose PYTHONPATH contains this folder."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("_campaign_audit", Path(__file__).parent.parent / "audit.py")
assert _spec is not None and _spec.loader is not None
_audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_audit)
_audit.watch_if_asked()
