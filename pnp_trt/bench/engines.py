"""Names of the engines that the commands build by themselves."""

from __future__ import annotations

import json

from ..bundle.manifest import Manifest

TEACHER, TINY = "teacher", "tiny"


def engine_names(base: str) -> tuple[str, str]:
    """The default names of a bundled base's plain and guided engines."""
    return f"{base}-{TEACHER}", f"{base}-{TINY}"


def default_build(engine: str) -> list[str] | None:
    """Arguments of ``pnp-trt build`` for an engine of a bundled base, or None if the name is none of those.

    Known are BASE-teacher, BASE-tiny, and the stage 2 guides' BASE-tiny-8 and its like.
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
    """The counted network that is a bundle's guide, ``guide-tiny`` or ``guide-full``.

    "" where the bundle has none; None where its guide is not available, or of another size than the counted one.
    """
    from ..errors import InputError
    from ..models.catalog import guide_folder

    if manifest.guide is None:
        return ""
    try:
        config = json.loads((guide_folder(manifest.guide.name) / "config.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):
        return None
    kind = str(config.get("_class_name", "")).removesuffix("Guide").lower()
    if kind == "full":
        return "guide-full"
    counted = json.loads((guide_folder("emoji-tiny") / "config.json").read_text(encoding="utf-8"))
    alike = all(config.get(k) == counted.get(k) for k in ("rank", "embed_dim"))
    return "guide-tiny" if kind == "tiny" and alike and manifest.base.name in _bundled() else None


def _bundled() -> list[str]:
    from ..models.catalog import bundled_bases

    return bundled_bases()
