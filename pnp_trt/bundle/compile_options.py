"""How engines are compiled, as a bundle records it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; a backend ignores what it has no use for.

    Attributes:
        workspace: bytes that the compiler may plan as scratch memory on the GPU; None leaves it to the compiler.
        refittable: whether weights can be replaced inside the engine.
        version_compatible: whether later versions of the runtime may load the engine (``tensorrt`` only).
        hardware_compatible: whether other GPUs of the same or a later architecture may (``tensorrt`` only).
        check_memory: refuse to start where the host's memory will not do.
    """

    workspace: int | None = None
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    check_memory: bool = True
