"""ONNX Runtime's CUDA provider on a machine without a GPU: its options, and what is reported if it does not load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from pnp_trt.backends.onnxruntime import backend as module
from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.errors import InputError

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """An ONNX graph of an instance normalisation after a reshape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["x", "shape"], ["same"]),
        helper.make_node("InstanceNormalization", ["same", "one", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2, "n"]) for n in "xy"]
    weights = [helper.make_tensor(n, TensorProto.FLOAT, [2], [v, v]) for n, v in (("one", 1.0), ("zero", 0.0))]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = tmp_path / "unet.onnx"
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Session(ort.InferenceSession):
    """A session on the CPU that claims to run on CUDA and records its arguments."""

    asked: list[Any]
    given: Any
    severities: ClassVar[list[int]] = []

    def __init__(self, model: Any, options: Any, providers: list[Any]) -> None:
        type(self).asked, type(self).given = providers, model
        super().__init__(model, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim that a driver and the CUDA provider are present."""
    monkeypatch.setattr(module, "driver_present", lambda: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(ort, "set_default_logger_severity", Session.severities.append)
    Session.severities.clear()
    for once in (module._preload, module._silence):
        once.cache_clear()


@pytest.mark.skipif(module.driver_present(), reason="a driver is here")
def test_a_provider_that_does_not_load_is_reported(graph: Path, usable: None) -> None:
    """With the real library, which creates a session on the CPU without an error."""
    with pytest.raises(
        InputError, match="'cuda' was requested, but ONNX Runtime could not load .*or use --provider cpu"
    ):
        OrtNetwork(graph, "cuda").loaded(1, None)
    assert not Session.severities  # only ONNX Runtime's log names the missing library
    network = OrtNetwork(graph, "auto")
    with pytest.warns(UserWarning, match="could not load its CUDA provider.*; unet.onnx runs on the CPU"):
        network.loaded(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert network.loaded(2).get_providers() == ["CPUExecutionProvider"]  # only the first session warns
        OrtNetwork(graph, "cpu").loaded(1)


def test_tensorfloat_is_off_and_nodes_on_the_cpu_are_counted(
    graph: Path, usable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "InferenceSession", Session)
    network = OrtNetwork(graph, "cuda")
    with pytest.warns(UserWarning, match=r"1 nodes of unet.onnx run on the CPU .*\(1 InstanceNormalization\)"):
        network.loaded(1)
    (name, options), second = Session.asked
    assert (name, second) == (CUDA, "CPUExecutionProvider")
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.loaded(2)  # only the first session warns


def halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the graph to float16."""
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model


@pytest.mark.filterwarnings("ignore:.*run on the CPU")
def test_half_precision_may_use_tensor_cores(graph: Path, usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``use_tf32=0`` excludes cuDNN's plans with tensor cores, which are nearly all of its plans for float16."""
    monkeypatch.setattr(ort, "InferenceSession", Session)
    onnx.save(halves(onnx.load(graph)), graph)
    OrtNetwork(graph, "cuda").loaded(1)
    assert Session.asked[0] == (CUDA, {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"})


@pytest.mark.filterwarnings("ignore:.*run on the CPU")
def test_the_log_is_silent_once_cuda_runs(graph: Path, usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", Session)
    network = OrtNetwork(graph, "cuda")
    assert not Session.severities
    network.loaded(1)
    network.loaded(2)
    assert Session.severities == [4]


def test_a_session_that_fell_back_to_the_cpu_uses_the_unchanged_graph(
    graph: Path, usable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fallen(Session):
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.warns(UserWarning, match="runs on the CPU"):
        OrtNetwork(graph, "auto").loaded(1)
    assert Fallen.given == str(graph)
    assert Fallen.asked == ["CPUExecutionProvider"]


def test_libraries_of_packages_are_loaded_first(graph: Path, usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Watched(Session):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            order.append("session")
            super().__init__(*arguments, **options)

    def preload() -> None:
        order.append("libraries")
        raise OSError("there are none")

    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(ort, "InferenceSession", Watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = OrtNetwork(graph, "cuda")
        network.loaded(1)
        network.loaded(2)
    assert order == ["libraries", "session", "session"]


def test_no_nodes_are_counted_if_a_release_cannot_list_them() -> None:
    assert not module._nodes_on_cpu(object())


def test_the_cpu_provider_does_not_load_cuda_libraries(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_preload", lambda: pytest.fail("it has no use for CUDA's libraries"))
    x = np.array([[[1.0, 3.0], [2.0, 2.0]]], np.float32)
    (out,) = OrtNetwork(graph, "cpu").loaded(1).run(None, {"x": x})
    assert np.allclose(out, [[[-1, 1], [0, 0]]], atol=1e-3)
