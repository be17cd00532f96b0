"""List the operators with kernels in ONNX Runtime's CUDA provider, from the installed binary; no GPU is needed.

    python -m benchmarks.ort_cuda_kernels                        # writes ort_cuda_kernels.json next to this file
    python -m benchmarks.ort_cuda_kernels --graph ENGINE/unet.onnx   # nodes of a graph without a kernel in the table

Each kernel is registered by its own function, which calls SetName(NAME), SetDomain(DOMAIN) and SinceVersion(START) or
SinceVersion(START, END), consecutive slots of ONNX Runtime's interface.  NAME is located by its address.  Element types
are requested through earlier calls, one slot per type.  The slot of float is the one for which LayerNormalization's
types come out as expected; the other slots are counted from it (x86-64, gcc, ``onnxruntime-gpu`` 1.31).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import mmap
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TABLE = Path(__file__).with_suffix(".json")
#: element types in the order of the interface's slots
TYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float", "double", "bfloat16",
    "float16",
)  # fmt: skip
#: operator and types that locate the slots: every release registers kernels of version 17 for these types
KNOWN = ("LayerNormalization", {("double", "float"), ("float",), ("bfloat16", "float"), ("float", "float16")})
#: a kernel without any of these lists only the types of indices and shapes; types of its data are listed elsewhere
FLOATING = {"float", "double", "bfloat16", "float16"}
#: most bytes of a registering function before and after the use of the kernel's name
BEFORE, AFTER = 1200, 200
CALL = re.compile(rb"\xff[\x90-\x97](....)", re.S)  # call *SLOT(%register)
ADDRESS = re.compile(rb"\x48\x8d\x15(....)", re.S)  # lea ADDRESS(%rip), %rdx
START, END = re.compile(rb"\xba(....)", re.S), re.compile(rb"\xb9(....)", re.S)  # mov VERSION, %edx and %ecx
ENTRY = b"\xf3\x0f\x1e\xfa"  # endbr64
#: versions of operators are below this
LIMIT = 40


class Library:
    """Code and strings of the provider's library.

    Raises:
        SystemExit: if onnxruntime-gpu is not installed.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("onnxruntime")
        folder = Path(spec.origin).parent if spec and spec.origin else None
        path = folder / "capi" / "libonnxruntime_providers_cuda.so" if folder else None
        if path is None or not path.is_file():
            raise SystemExit("the CUDA provider's library is missing; install onnxruntime-gpu")
        sections = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (self.start, self.code), (self.texts_start, self.texts) = (
            (address, whole[offset : offset + size])
            for address, offset, size in (_section(sections, name) for name in ("text", "rodata"))
        )
        code = np.frombuffer(self.code, np.uint8)
        relative = np.zeros(len(code) - 3, np.int32)
        for shift in range(4):
            relative |= code[shift : len(code) - 3 + shift].astype(np.int32) << np.int32(8 * shift)
        target = relative + np.arange(self.start + 4, self.start + 4 + len(relative), dtype=np.int64)
        self._order = np.argsort(target, kind="stable")
        self._targets = target[self._order]

    def uses(self, name: str) -> Iterator[int]:
        """Offsets in the code of every address of a string."""
        at, pattern = -1, name.encode() + b"\0"
        while (at := self.texts.find(pattern, at + 1)) >= 0:
            low, high = (np.searchsorted(self._targets, self.texts_start + at, side) for side in ("left", "right"))
            yield from (int(n) for n in self._order[low:high])

    def text(self, code_at: int) -> str | None:
        """The string whose address is at an offset of the code, or None."""
        to = self.start + code_at + 4 + int.from_bytes(self.code[code_at : code_at + 4], "little", signed=True)
        at = to - self.texts_start
        if not 0 <= at < len(self.texts):
            return None
        return self.texts[at : self.texts.index(b"\0", at)].decode(errors="replace")

    def kernels(self, name: str) -> Iterator[tuple[str, int, int | None, list[int]]]:
        """Domain, first and last version, and the slots called before, for each registration of an operator."""
        for at in self.uses(name):
            after = self.code[at + 4 : at + 4 + AFTER]
            calls = list(CALL.finditer(after))[:3]
            if len(calls) < 3:
                continue
            named, domained, since = (int.from_bytes(c[1], "little") for c in calls)
            domain = ADDRESS.search(after, calls[0].end(), calls[1].start())
            versions = after[calls[1].end() : calls[2].start()]
            first, last = START.search(versions), END.search(versions)
            if domained != named + 8 or since not in (named + 16, named + 24) or domain is None or first is None:
                continue
            until = int.from_bytes(last[1], "little") if last and since == named + 24 else None
            start = self.code.rfind(ENTRY, at - BEFORE, at)
            slots = [int.from_bytes(c[1], "little") for c in CALL.finditer(self.code, start, at)] if start > 0 else []
            yield self.text(at + 4 + domain.start(1)) or "", int.from_bytes(first[1], "little"), until, slots


def _section(sections: str, name: str) -> tuple[int, int, int]:
    match = re.search(rf"\.{name}\s+PROGBITS\s+(\w+) (\w+) (\w+)", sections)
    if match is None:
        raise SystemExit(f"the CUDA provider's library has no section .{name}")
    address, offset, size = (int(part, 16) for part in match.groups())
    return address, offset, size


def read(names: list[str]) -> dict[str, list[list[Any]]]:
    """Kernels of ONNX's operators: ``[first version, last or None, element types or None]`` each.

    Types are those of all inputs together.  None: the kernel takes any type, or its types cannot be read here.

    Raises:
        SystemExit: if the library's interface is not the expected one.
    """
    library = Library()
    known, types = KNOWN
    slots = {tuple(sorted(set(s))) for d, first, _, s in library.kernels(known) if d == "" and first == 17}
    common = set.intersection(*(set(s) for s in slots)) if slots else set()
    for float_slot in sorted(common):
        numbers = {float_slot + 8 * (i - TYPES.index("float")): name for i, name in enumerate(TYPES)}
        if {tuple(sorted({numbers[n] for n in s if n in numbers})) for s in slots} == {tuple(sorted(t)) for t in types}:
            break
    else:
        raise SystemExit(
            "the types of LayerNormalization's kernels cannot be read: ONNX Runtime's interface has changed"
        )
    out: dict[str, list[list[Any]]] = {}
    for name in names:
        types_by_versions: dict[tuple[int, int], set[str]] = {}
        for domain, first, last, called in library.kernels(name):
            if domain == "" and 0 < first < LIMIT:
                types_by_versions.setdefault((first, last or 0), set()).update(
                    numbers[n] for n in called if n in numbers
                )
        if types_by_versions:
            out[name] = [
                [first, last or None, sorted(kinds) if kinds & FLOATING else None]
                for (first, last), kinds in sorted(types_by_versions.items())
            ]
    return out


def lacking(model: Any, table: dict[str, Any]) -> Counter[str]:
    """Count a graph's nodes without a kernel in the CUDA provider, by operator and version.

    A kernel without a last version serves only its first one (ONNX Runtime's ``kernel_registry.cc``,
    ``VerifyVersion``).  The type is that of a node's first input, if ONNX infers it.
    """
    import onnx
    from onnx import defs

    known = onnx.shape_inference.infer_shapes(model).graph
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.input, *known.output)}
    kinds |= {t.name: t.data_type for t in known.initializer}
    words = {1: "float", 9: "bool", 6: "int32", 7: "int64", 10: "float16", 11: "double", 16: "bfloat16"}
    out: Counter[str] = Counter()
    for node in model.graph.node:
        since = defs.get_schema(node.op_type, opset).since_version if node.domain in ("", "ai.onnx") else None
        kind = words.get(kinds.get(node.input[0], 0)) if node.input else None
        fits = any(
            (first == since or (since is not None and last is not None and first <= since <= last))
            and (types is None or kind is None or kind in types)
            for first, last, types in table["kernels"].get(node.op_type, [])
        )
        if since is None or not fits:
            out[f"{node.domain}.{node.op_type}".lstrip(".") + (f"-{since}" if since else "") + f" of {kind}"] += 1
    return out


def main() -> None:
    """Write the table, or check graphs against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, action="append", help="an ONNX graph of a bundle")
    arguments = parser.parse_args()
    import onnx

    if arguments.graph:
        from pnp_trt.backends.onnxruntime.for_cuda import for_cuda

        table = json.loads(TABLE.read_text())
        for path in arguments.graph:
            model = onnx.load_from_string(for_cuda(path.read_bytes()).data)
            print(f"{path}: {dict(lacking(model, table)) or 'a kernel for every node'}")
        return
    names = sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""})
    kernels = read(names)
    lines = ",\n".join(f'    "{name}": {json.dumps(versions)}' for name, versions in kernels.items())
    release = importlib.metadata.version("onnxruntime-gpu")
    head = f'  "package": "onnxruntime-gpu",\n  "release": "{release}",\n'
    TABLE.write_text(f'{{\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n')
    print(f"{len(kernels)} of {len(names)} operators have kernels of onnxruntime-gpu {release}")


if __name__ == "__main__":
    main()
