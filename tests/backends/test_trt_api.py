"""Names of TensorRT and cuda-python in use are those of the installed bindings; ``make trt-api`` has the releases."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks.trt_api import RELEASES, Use, accepted, documented, uses, wrong, wrong_cuda
from pnp_trt.backends.tensorrt.flavour import RTX, TENSORRT


def test_the_source_names_what_it_uses() -> None:
    tensorrt, cuda = uses()
    called = {(use.name, use.arguments) for use in tensorrt + cuda}
    # one of each kind: of the module, of a variable, of a call's result, of what a layer becomes, by a string
    assert ("BuilderFlag.TF32", -1) in called and ("Builder", 1) in called and ("nptype", 1) in called
    assert ("IExecutionContext.execute_async_v3", 1) in called and ("OnnxParserRefitter.refit_from_file", 1) in called
    assert ("EngineInspector.get_engine_information", 1) in called and ("ParserError.desc", 0) in called
    assert ("IAttention.decomposable", -1) in called and ("IRuntimeConfig.set_runtime_cache", 1) in called
    assert ("runtime.cudaMemcpyAsync", 5) in called and ("driver.cuLaunchKernel", 11) in called
    assert len({use.name for use in tensorrt}) > 90 and len({use.name for use in cuda}) > 30


def test_signatures_of_docstrings() -> None:
    doc = "f(self: trt.A, x: Dict[str, int], y: int = 3) -> None\n\nText (not -> this).\n2. f(self: trt.A) -> bool"
    assert accepted(doc) == [(1, 2), (0, 0)]
    assert accepted("Overloaded.\n1. f(*args, **kwargs) -> object") == [] and accepted("no signature") == []


def test_installed_rtx_has_them() -> None:
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    wanted, _ = uses()
    wrongs = [Use("Builder.no_such_name", -1, "here"), Use("IBuilderConfig.set_flag", 3, "here")]
    docs = {use.name: documented(trt, use.name) for use in wanted + wrongs}
    assert wrong(wanted, docs, rtx=True) == []
    said = wrong(wrongs, docs, rtx=True)
    assert said[0] == "here: Builder.no_such_name is missing" and "called with 3 arguments and takes 1" in said[1]
    checked = [u for u in wanted if u.arguments >= 0 and accepted(docs[u.name] or "")]
    assert len(checked) > 30  # numbers of arguments are compared, and not only names


def test_installed_cuda_bindings_have_them() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    from cuda.bindings import driver

    modules = {"runtime": runtime, "driver": driver}
    assert wrong_cuda(uses()[1], modules) == []
    said = wrong_cuda([Use("runtime.cudaMalloc", 2, "a"), Use("driver.cuNoSuch", 1, "b")], modules)
    assert len(said) == 2 and "is called with 2" in said[0] and "is missing" in said[1]


def test_the_oldest_release_is_that_of_the_project_file() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for flavour, name in ((TENSORRT, "tensorrt-cu13-bindings"), (RTX, "tensorrt-rtx-cu13-bindings")):
        oldest = ".".join(map(str, flavour.oldest))
        assert (
            RELEASES[name][0].startswith(f"{oldest}.")
            and f"{flavour.distributions[0]}>={oldest}," in extras[flavour.extra][0]
        )
    assert RELEASES["cuda-bindings"][0].startswith("12.9.") and "cuda-python>=12.9," in extras["rtx"][1]


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux")
def test_a_release_that_cannot_be_imported_is_told_of(tmp_path: Path) -> None:
    import zipfile

    from benchmarks.trt_api import check_wheel

    with zipfile.ZipFile(tmp_path / "tensorrt_x-1.0-py3.whl", "w") as wheel:
        wheel.writestr("tensorrt_x/tensorrt.so", b"not a library")
        wheel.writestr("tensorrt_x/__init__.py", "")
    (said,) = check_wheel(tmp_path / "tensorrt_x-1.0-py3.whl", tmp_path)
    assert said.startswith("it cannot be imported: ")
