"""Registries: order, lookup, entry points, lazy built-in values."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from pnp_trt import registry
from pnp_trt.errors import InputError
from pnp_trt.registry import Registry


@pytest.fixture
def codecs() -> Registry[object]:
    return Registry("codecs", "codec", {"json": "json:dumps"})


def test_a_builtin_value_is_imported_on_first_use(codecs: Registry[object]) -> None:
    import json

    assert codecs.names() == ("json",)
    assert codecs.get("json") is json.dumps


def test_listing_names_imports_nothing() -> None:
    lazy: Registry[object] = Registry("codecs", "codec", {"x": "this_module_does_not_exist:x"})
    assert list(lazy) == ["x"] and "x" in lazy and len(lazy) == 1
    assert "this_module_does_not_exist" not in sys.modules


def test_register_by_call_and_by_decorator(codecs: Registry[object]) -> None:
    codecs.register("a", 1)

    @codecs.register("b")
    def b() -> None: ...

    assert codecs.names() == ("json", "a", "b")
    assert codecs.get("a") == 1 and codecs.get("b") is b
    codecs.unregister("a")
    assert codecs.names() == ("json", "b")


def test_an_unknown_name_lists_the_known_ones(codecs: Registry[object]) -> None:
    with pytest.raises(InputError, match="^the codec is 'xml'; known: json$"):
        codecs.get("xml")


def test_a_name_is_registered_only_once(codecs: Registry[object]) -> None:
    codecs.register("a", 1)
    codecs.register("a", 1)  # the same value again, as when a module is reloaded
    with pytest.raises(InputError, match="already registered"):
        codecs.register("a", 2)


def test_entry_points_add_values(codecs: Registry[object], monkeypatch: pytest.MonkeyPatch) -> None:
    import base64

    points = [
        EntryPoint("b64", "base64:b64encode", "pnp_trt.codecs"),
        EntryPoint("json", "base64:b64decode", "pnp_trt.codecs"),
        EntryPoint("broken", "this_module_does_not_exist:x", "pnp_trt.codecs"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    assert codecs.names() == ("json", "b64", "broken")
    assert codecs.get("b64") is base64.b64encode
    assert codecs.get("json") is not base64.b64decode
    with pytest.raises(InputError, match="'broken' is registered as this_module_does_not_exist:x"):
        codecs.get("broken")


def test_a_broken_package_is_left_out_with_a_warning(codecs: Registry[object], monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("broken", "this_module_does_not_exist:x", "pnp_trt.codecs")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="'broken' is registered as .* it is left out"):
        assert [name for name, _ in codecs.items()] == ["json"]
    import json

    assert codecs["json"] is json.dumps


def test_a_broken_builtin_value_is_an_error() -> None:
    broken: Registry[object] = Registry("codecs", "codec", {"x": "this_module_does_not_exist:x"})
    with pytest.raises(InputError, match="'x' is registered as"):
        broken.values()


def test_metrics_are_in_the_schema_of_results() -> None:
    """The schema is published, so it must describe all metrics of the package."""
    import json
    from pathlib import Path

    from pnp_trt.bench import results
    from pnp_trt.bench.metric import METRICS

    schema = json.loads(Path(results.SCHEMA_FILE).read_text(encoding="utf-8"))
    fidelity = schema["$defs"]["fidelity"]["properties"]
    builtin = [m for m in METRICS.values() if m.compute.__module__.startswith("pnp_trt.")]
    assert [m.key for m in builtin] == list(METRICS)[: len(builtin)]
    assert {m.key for m in builtin} == {
        name for name, value in fidelity.items() if {"$ref": "#/$defs/estimate"} in value.get("anyOf", [])
    }


def test_methods_are_in_the_schema_of_results() -> None:
    import json
    from pathlib import Path

    from pnp_trt.bench import results
    from pnp_trt.sampling.methods import METHODS

    text = json.loads(Path(results.SCHEMA_FILE).read_text(encoding="utf-8"))["$defs"]["method"]["description"]
    described = [word.split(" (")[0].strip() for word in text.partition(";")[0].split(",")]
    assert set(described) == set(METHODS)


def test_precisions_of_backends() -> None:
    from pnp_trt import backends

    assert {name: backends.get(name).precisions for name in ("onnxruntime", "tensorrt", "torch")} == {
        "onnxruntime": ("fp32", "fp16", "int8", "int8-weights", "fp8"),
        "tensorrt": ("fp32", "fp16", "bf16", "int8", "int8-weights", "fp8"),
        "torch": ("fp32", "fp16", "bf16"),
    }
