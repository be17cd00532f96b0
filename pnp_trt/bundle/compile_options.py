"""Options for compiling engines, as recorded in a bundle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompileOptions:
    """Options for compiling; a backend ignores those that do not apply to it.

    Attributes:
        workspace: largest GPU scratch memory in bytes that the compiler may use; None leaves it to the compiler.
        refittable: whether weights can be replaced inside the engine.
        version_compatible: whether later versions of the runtime may load the engine (``tensorrt`` only).
        hardware_compatible: whether other GPUs of the same or a later architecture may load it (``tensorrt`` only).
        check_memory: refuse to start if the host has too little memory.
    """

    workspace: int | None = None
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    check_memory: bool = True
