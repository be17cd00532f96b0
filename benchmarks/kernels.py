"""Compile ``kernels.cu`` to ``pnp_trt/backends/kernels.ptx`` with NVRTC, which needs no GPU.

Use NVRTC 12.0: every driver since 525 reads its PTX.

    pip download --no-deps nvidia-cuda-nvrtc-cu12==12.0.140 && unzip *.whl
    LD_LIBRARY_PATH=nvidia/cuda_nvrtc/lib python -m benchmarks.kernels nvidia/cuda_nvrtc/lib/libnvrtc.so.12
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "pnp_trt" / "backends" / "kernels.cu"
OPTIONS = (b"--gpu-architecture=compute_75", b"--fmad=false")


def to_ptx(source: bytes, library: str) -> str:
    """Compile CUDA C++ to PTX.

    Raises:
        SystemExit: with the compiler's log.
    """
    nvrtc = ctypes.CDLL(library)
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None):
        raise SystemExit("NVRTC could not create a program")
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    if failed:
        raise SystemExit(_text(nvrtc, program, "ProgramLog"))
    return _text(nvrtc, program, "PTX")


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()


def main() -> None:
    """Compile and write."""
    source = SOURCE.read_bytes()
    ptx = to_ptx(source, sys.argv[1])
    # drop the header variables that NVRTC defines, which nothing uses
    lines = [line.rstrip() for line in ptx.splitlines() if not line.startswith((".global", "//"))]
    header = f"// of kernels.cu, sha256 {hashlib.sha256(source).hexdigest()}, by benchmarks/kernels.py\n"
    SOURCE.with_suffix(".ptx").write_text(header + "\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
