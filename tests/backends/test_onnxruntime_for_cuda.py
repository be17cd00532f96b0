"""The graphs for ONNX Runtime's CUDA provider: equal results on the CPU, and a CUDA kernel for every node."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from benchmarks.ort_cuda_kernels import TABLE, lacking, read
from pnp_trt import assets
from pnp_trt.backends.onnxruntime import backend as module
from pnp_trt.backends.onnxruntime.backend import OrtNetwork
from pnp_trt.backends.onnxruntime.for_cuda import for_cuda

KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
BUNDLED = sorted((Path(assets.__file__).parent / "bundles").glob("*/*.onnx"))


def group_norm(
    groups: int, channels: int, size: tuple[int, int] | None, dtype: str, epsilon: float, opset: int = 23,
    one: float = 1.0,
) -> onnx.ModelProto:  # fmt: skip
    """Return a group norm as the build lowers it: reshape, instance normalisation, reshape, scale and offset.

    Args:
        size: height and width; None leaves them open.
        one: scale of the instance normalisation.
    """
    height_width = list(size or ("height", "width"))
    weights = {
        "groups": np.array([0, groups, -1], np.int64), "one": np.full(groups, one, dtype),
        "zero": np.zeros(groups, dtype), "scale": np.linspace(-2, 2, channels, dtype=dtype).reshape(-1, 1, 1),
        "offset": np.linspace(1, -1, channels, dtype=dtype).reshape(-1, 1, 1),
    }  # fmt: skip
    nodes = [
        helper.make_node("Shape", ["x"], ["full"]),
        helper.make_node("Reshape", ["x", "groups"], ["flat"]),
        helper.make_node("InstanceNormalization", ["flat", "one", "zero"], ["normed"], "norm", epsilon=epsilon),
        helper.make_node("Reshape", ["normed", "full"], ["back"]),
        helper.make_node("Mul", ["back", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, KINDS[dtype], ["batch", channels, *height_width]) for n in "xy"]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def in_float64(x: np.ndarray, groups: int, epsilon: float) -> np.ndarray:
    """Compute the same group norm in float64 by Wu and He 2018, equations 1 to 6."""
    batch, channels = x.shape[:2]
    flat = x.astype(np.float64).reshape(batch, groups, -1)
    mean, variance = flat.mean(-1, keepdims=True), flat.var(-1, keepdims=True)
    normed = ((flat - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    column = (-1, 1, 1)
    scale, offset = (np.linspace(a, b, channels, dtype=x.dtype).reshape(column) for a, b in ((-2, 2), (1, -1)))
    return np.asarray(normed * scale.astype(np.float64) + offset.astype(np.float64))


def session(model: bytes, batch: int | None = None, folder: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def kinds(model: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4), wide=st.integers(1, 3), batch=st.integers(1, 3), height=st.integers(2, 24),
    width=st.integers(2, 24), opened=st.booleans(), dtype=st.sampled_from(sorted(KINDS)),
    mean=st.floats(-60, 60), epsilon=st.sampled_from([1e-6, 1e-5, 1e-2]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_a_rewritten_group_norm_computes_the_same(
    groups: int, wide: int, batch: int, height: int, width: int, opened: bool, dtype: str, mean: float,
    epsilon: float, seed: int,
) -> None:  # fmt: skip
    """Also in float16, where the sums of some thousand values around 60 would overflow."""
    channels = groups * wide
    plain = group_norm(groups, channels, None if opened else (height, width), dtype, epsilon).SerializeToString()
    rewritten = for_cuda(plain)
    assert rewritten.half == (dtype == "float16")
    onnx.checker.check_model(onnx.load_from_string(rewritten.data), full_check=True)
    assert "InstanceNormalization" not in kinds(rewritten.data)
    x = (np.random.default_rng(seed).standard_normal((batch, channels, height, width)) * 2 + mean).astype(dtype)
    expected = in_float64(x, groups, epsilon)
    # float32 subtracts a mean of up to 60; float16 rounds the normed value, its product and the sum
    limit = (
        2e-4 if dtype == "float32" else 4 * float(np.finfo(np.float16).eps) * max(1.0, float(np.abs(expected).max()))
    )
    for data in (plain, rewritten.data):
        (result,) = session(data, batch).run(None, {"x": x})
        assert result.dtype == x.dtype
        assert np.abs(result.astype(np.float64) - expected).max() < limit


@pytest.mark.parametrize(
    "model",
    [
        group_norm(2, 4, None, "float32", 1e-5, opset=21),  # at this opset the CUDA provider has a kernel
        group_norm(2, 4, None, "float32", 1e-5, one=2.0),
        helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])),
    ],
)
def test_other_graphs_are_unchanged(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    assert for_cuda(data).data == data


@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: b"\xff" * 20, lambda d: b"\x3d" + d])
def test_damaged_graphs_are_refused(damage: Any) -> None:
    with pytest.raises(ValueError, match="truncated|not made of protocol buffers"):
        for_cuda(damage(group_norm(2, 4, None, "float32", 1e-5).SerializeToString()))


def test_a_rewritten_graph_reads_the_bundles_weights(micro_bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as rewritten for CUDA, run on the CPU with the weights in the bundle's data file."""
    models: list[bytes] = []

    class Session(ort.InferenceSession):
        def __init__(self, model: Any, options: Any, providers: list[Any]) -> None:
            models.append(model)
            super().__init__(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    path = micro_bundles / "guided" / "unet.onnx"
    before = path.read_bytes()
    plain = OrtNetwork(path, "cpu").loaded(2)
    random = np.random.default_rng(0)
    feeds = {
        i.name: random.standard_normal([2, *(d if isinstance(d, int) else 8 for d in i.shape[1:])]).astype(
            module._dtype(i.type)
        )
        for i in plain.get_inputs()
    }
    (expected,) = plain.run(None, feeds)
    monkeypatch.setattr(module, "driver_present", lambda: True)
    monkeypatch.setattr(module, "_preload", lambda: None)
    monkeypatch.setattr(module, "_silence", lambda: None)
    monkeypatch.setattr(module, "_nodes_on_cpu", lambda session: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    (result,) = OrtNetwork(path, "cuda").loaded(2).run(None, feeds)
    assert "InstanceNormalization" in kinds(before) and "InstanceNormalization" not in kinds(models[0])
    assert np.abs(expected).max() > 0.1 and np.abs(result - expected).max() < 1e-4 * np.abs(expected).max()
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text()))


def missing(path: Path, table: dict[str, Any]) -> dict[str, int]:
    return dict(lacking(onnx.load_from_string(for_cuda(path.read_bytes()).data), table))


@pytest.mark.parametrize("path", BUNDLED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_cuda_has_a_kernel_for_every_node_of_the_bundled_graphs(path: Path, table: dict[str, Any]) -> None:
    assert not missing(path, table)


@pytest.mark.slow
def test_cuda_has_a_kernel_for_every_node_that_a_build_writes(
    micro_bundles: Path, micro_base: Path, micro_guide: Path, tmp_path: Path, table: dict[str, Any]
) -> None:
    from pnp_trt.build.builder import build
    from pnp_trt.build.spec import BuildSpec

    build(BuildSpec(str(micro_base), str(micro_guide), precision="fp16", out=tmp_path / "half"))
    graphs = [g for folder in (micro_bundles / "plain", micro_bundles / "guided", tmp_path / "half")
              for g in sorted(folder.glob("*.onnx"))]  # fmt: skip
    assert {g.stem for g in graphs} >= {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    assert not {str(g): nodes for g in graphs if (nodes := missing(g, table))}
    assert for_cuda((tmp_path / "half" / "unet.onnx").read_bytes()).half


def test_the_check_finds_nodes_without_a_kernel(table: dict[str, Any]) -> None:
    """A real GPU reported 31 nodes of the bundled U-Net on the CPU, all of them group norms."""
    path = next(p for p in BUNDLED if p.parent.name == "emoji-tiny" and p.stem == "unet")
    assert lacking(onnx.load_from_string(path.read_bytes()), table) == {"InstanceNormalization-22 of float": 31}
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["y"]),
        helper.make_node("QuickGelu", ["y"], ["z"], domain="com.microsoft"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.INT64, [1]) for n in "xz"]
    strange = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
    )
    assert lacking(strange, table) == {"Sigmoid-13 of int64": 1, "com.microsoft.QuickGelu of int64": 1}


@pytest.mark.slow
def test_the_table_matches_the_installed_library(table: dict[str, Any]) -> None:
    spec = importlib.util.find_spec("onnxruntime")
    library = Path(str(spec.origin)).parent / "capi" / "libonnxruntime_providers_cuda.so" if spec else None
    if library is None or not library.is_file():
        pytest.skip("onnxruntime-gpu is not installed")
    if importlib.metadata.version("onnxruntime-gpu") != table["release"]:
        pytest.skip(f"the table is of release {table['release']}")
    names = ["Conv", "InstanceNormalization", "LayerNormalization", "Relu6"]
    assert read(names) == {name: table["kernels"][name] for name in names[:3]}
