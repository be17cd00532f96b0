"""Names of the engines that the commands build by themselves."""

from __future__ import annotations

TEACHER, TINY = "teacher", "tiny"


def engine_names(base: str) -> tuple[str, str]:
    """The default names of a bundled base's plain and guided engines."""
    return f"{base}-{TEACHER}", f"{base}-{TINY}"


def default_build(engine: str) -> list[str] | None:
    """Arguments of ``pnp-trt build`` for an engine of a bundled base, or None if the name is none of those.

    Known are BASE-teacher, BASE-tiny, and the stage 2 guides' BASE-tiny-8 and its like.
    """
    from ..artifacts import engines_home
    from ..assets import ROOT
    from ..models.base import bundled_bases

    for base in bundled_bases():
        for name, guide in zip(engine_names(base), ("none", "auto"), strict=True):
            if engine == name:
                return ["--base", base, "--guide", guide, "--out", str(engines_home() / engine)]
        guide = f"emoji-{engine.removeprefix(f'{base}-')}"
        if engine.startswith(f"{base}-tiny-") and (ROOT / "guides" / guide / "config.json").is_file():
            return ["--base", base, "--guide", guide, "--out", str(engines_home() / engine)]
    return None
