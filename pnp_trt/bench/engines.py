"""Names of the engines that the commands build automatically."""

from __future__ import annotations

import importlib.util
import json

from ..bundle.manifest import Manifest

TEACHER, TINY = "teacher", "tiny"


def engine_names(base: str) -> tuple[str, str]:
    """The default names of a bundled base's plain and guided engines."""
    return f"{base}-{TEACHER}", f"{base}-{TINY}"


def default_build(engine: str) -> list[str] | None:
    """Arguments of ``pnp-trt build`` for an engine of a bundled base, or None for any other name.

    Recognised names are BASE-teacher, BASE-tiny, and those of stage 2 guides, such as BASE-tiny-8.
    """
    from ..assets import ROOT
    from ..bundle.store import engines_home
    from ..models.catalog import bundled_bases

    for base in bundled_bases():
        for name, guide in zip(engine_names(base), ("none", "auto"), strict=True):
            if engine == name:
                return ["--base", base, "--guide", guide, "--out", str(engines_home() / engine)]
        guide = f"emoji-{engine.removeprefix(f'{base}-')}"
        if engine.startswith(f"{base}-tiny-") and (ROOT / "guides" / guide / "config.json").is_file():
            return ["--base", base, "--guide", guide, "--out", str(engines_home() / engine)]
    return None


def counted_guide(manifest: Manifest) -> str | None:
    """Name of the bundle's guide in the cost rows: ``guide-`` and its name in ``GUIDES``.

    "" if the bundle has no guide. None if the guide is not available, its size differs from that of the counted guide,
    or nothing is counted because torch is not installed.
    """
    from ..errors import InputError
    from ..models.catalog import bundled_bases, guide_folder
    from ..models.guides import GUIDES, name_of_class

    if manifest.guide is None:
        return ""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        folder = guide_folder(manifest.guide.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = name_of_class(str(config.get("_class_name", "")), folder)
        if not (options := GUIDES[kind].size_options):
            return f"guide-{kind}"
        counted = json.loads((guide_folder(f"emoji-{kind}") / "config.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):
        return None
    same_size = all(config.get(k) == counted.get(k) for k in options)
    return f"guide-{kind}" if same_size and manifest.base.name in bundled_bases() else None
