"""Python loads this at the start of every process whose PYTHONPATH has this folder: the audit of ``audit.py``."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("_campaign_audit", Path(__file__).parent.parent / "audit.py")
assert _spec is not None and _spec.loader is not None
_audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_audit)
_audit.watch_if_asked()
