"""The results document: its schema, complete writes, and checks when it is read."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt.bench import results
from pnp_trt.errors import InputError, PnpError
from pnp_trt.io.json_schema import problem

from . import fake_document


@cache
def text() -> str:
    """Return a complete document as JSON."""
    return json.dumps(fake_document.make(batches=(1,), rounds=3))


def whole() -> dict[str, Any]:
    return dict(json.loads(text()))


@cache
def schema() -> dict[str, Any]:
    return dict(json.loads(results.SCHEMA_FILE.read_text(encoding="utf-8")))


def read(tmp_path: Path, content: str) -> dict[str, Any]:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    return results.read(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in pairs for place in ((*path, key), *places(item, (*path, key)))]


def test_documents_match_their_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    for doc in (whole(), fake_document.make(quality=False), results.document("pnp-trt bench")):
        jsonschema.validate(json.loads(json.dumps(doc)), schema())
    for table, key in (("latency", "ratio_to_cfg"), ("published", "unit"), ("cold_start", "seconds")):
        broken = whole()
        del broken[table][0][key]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema())


@given(data=st.data())
def test_the_reader_agrees_with_jsonschema(data: st.DataObject) -> None:
    """Whichever value is replaced or removed, both accept the document or both refuse it."""
    jsonschema = pytest.importorskip("jsonschema")
    doc = whole()
    *parents, key = data.draw(st.sampled_from(places(doc)))
    holder: Any = doc
    for one in parents:
        holder = holder[one]
    if data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(
            st.sampled_from([None, True, -1, 0, 2.5, 3.0, "x", [], [1], [1.0, 2], {}, {"why": "x"}])
        )
    assert (problem(doc, schema()) is None) == jsonschema.Draft202012Validator(schema()).is_valid(doc)


@given(cut=st.integers(0, len(text()) - 1))
def test_a_document_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.raises(InputError, match="not complete JSON"):
        read(tmp_path_factory.getbasetemp(), text()[:cut])


def test_provenance_records_command_and_machine() -> None:
    provenance = results.document(["pnp-trt", "bench", "--engine", "a b"], accelerator="NVIDIA L4")["provenance"]
    assert provenance["command"] == "pnp-trt bench --engine 'a b'"
    assert provenance["date"].endswith("+00:00")
    assert provenance["packages"]["numpy"] == np.__version__
    assert provenance["cores"] >= 1
    assert provenance["cpu"]
    assert provenance["device"] == "NVIDIA L4"


def test_quality_counts_as_evaluated_only_if_measured() -> None:
    skipped = fake_document.make(quality=False)
    assert (skipped["task_quality_evaluated"], skipped["task_quality_reason"]) == (
        False, "--quick skips the images that KID needs",
    )  # fmt: skip
    close = [{"engine": "a", "method": "guided", "steps": 8, "guidance": 3.0, "psnr_to_cfg_db": None}]
    doc = results.document("x", fidelity=close)
    assert doc["task_quality_evaluated"] is False
    assert doc["task_quality_reason"]
    judged = [close[0] | {"kid": fake_document.estimate(0.1, 0.01, 512)}]
    doc = results.document("x", fidelity=judged)
    assert doc["task_quality_evaluated"] is True
    assert doc["task_quality_reason"] is None


def test_write_and_read_back(tmp_path: Path) -> None:
    doc = whole()
    path = results.write(doc | {"settings": {"suite": None, "quick": True, "w": np.float32(3), "at": tmp_path}},
                         tmp_path / "new" / "bench.json")  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == ["bench.json"]
    again = results.read(path)
    assert {key: again[key] for key in again if key != "settings"} == {k: doc[k] for k in doc if k != "settings"}
    assert again["settings"] == {"suite": None, "quick": True, "w": 3.0, "at": str(tmp_path)}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = results.write(whole(), tmp_path / "bench.json")
    before = path.read_bytes()
    with pytest.raises(PnpError, match="cannot be written"):
        results.write(whole() | {"settings": {"w": float("nan")}}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]


def test_an_unwritable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        results.write(whole(), tmp_path / "file" / "bench.json")


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    doc = whole()
    without_row_key = copy.deepcopy(doc)
    del without_row_key["cost"][1]["macs"]
    wrong_type = copy.deepcopy(doc)
    wrong_type["latency"][0]["p50_ms"] = "12"
    half_an_interval = copy.deepcopy(doc)
    half_an_interval["latency"][0]["ratio_to_cfg_interval"] = [0.5]
    cases = {
        "": "not complete JSON",
        "[]": "it has no 'schema'",
        "[" * 100_000: "nested too deeply",
        '{"schema": "pnp-trt/bench/3", "cost": NaN}': "holds NaN",
        json.dumps({"schema": "pnp-trt/emoji-tables/1"}): "'pnp-trt/emoji-tables/1', but this version reads",
        json.dumps(doc | {"schema": "pnp-trt/bench/1"}): "'pnp-trt/bench/1'.*make a new one: pnp-trt bench --json",
        json.dumps({key: value for key, value in doc.items() if key != "latency"}): "the document lacks 'latency'",
        json.dumps(doc | {"cost": {}}): "'cost' is an object, not an array",
        json.dumps(doc | {"task_quality_evaluated": 1}): r"'task_quality_evaluated' is a number \(1\), not a boolean",
        json.dumps(without_row_key): r"'cost\[1\]' lacks 'macs'",
        json.dumps(wrong_type): r"'latency\[0\].p50_ms' is a string \('12'\), not a number",
        json.dumps(half_an_interval): r"'latency\[0\].ratio_to_cfg_interval' has 1 items, not 2",
    }
    for content, message in cases.items():
        with pytest.raises(InputError, match=message):
            read(tmp_path, content)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-16 text"):
        results.read(tmp_path / "bad.json")
    with pytest.raises(InputError, match="does not exist"):
        results.read(tmp_path / "absent.json")


def test_images_survive_a_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    (row,) = results.encode_images([{"label": "guided", "steps": 8, "pixels": pixels}])
    assert (row["label"], row["steps"], len(row["png"])) == ("guided", 8, 2)
    ((label, decoded),) = results.decode_images({"columns": ["a", "b"], "rows": [row], "caption": ""})
    assert label == "guided"
    assert np.array_equal(decoded, pixels)
    row["png"][1] = row["png"][1][:40]
    with pytest.raises(InputError, match="images of 'guided' are damaged"):
        results.decode_images({"columns": ["a", "b"], "rows": [row], "caption": ""})


def test_wrong_images_are_refused() -> None:
    good = {"label": "cfg", "pixels": np.zeros((1, 8, 8, 3), np.uint8)}
    with pytest.raises(InputError, match="must be uint8"):
        results.encode_images([{"label": "guided", "pixels": np.zeros((1, 8, 8, 3))}])
    with pytest.raises(InputError, match="'guided' has 2 images for 1 columns"):
        results.encode_images([good, {"label": "guided", "pixels": np.zeros((2, 8, 8, 3), np.uint8)}])


#: a document of the former schema, with one row in each part whose names have changed
FORMER = {
    "schema": "pnp-trt/bench/2", "settings": {"suite": None, "quick": True, "pictures": 32,
                                              "drawn": {"pictures": 32, "real_pictures": None}},
    "task_quality_evaluated": False, "task_quality_reason": "no weights", "left_out": [], "published": [],
    "engines": [], "device": None, "cold_start": [],
    "cost": [{"network": "vae-decoder", "per": "picture", "parameters": 7, "macs": 5, "macs_without_attention": 4},
             {"network": "teacher", "per": "step", "parameters": 7, "macs": 5, "macs_without_attention": 4}],
    "methods_cost": [{"method": "cfg", "guide": None, "passes": ["teacher", "teacher"], "passes_per_picture": 16,
                      "parameters": 7, "steps": 8, "picture_includes": ["vae-decoder"], "macs_per_step": 10,
                      "macs_per_picture": 85, "macs_per_picture_without_attention": 68}],
    "latency": [{"engine": "plain", "method": "cfg", "batch": 1, "steps": 8, "guidance": 3.0, "passes": 16,
                 "p50_ms": 4.0, "ratio_to_cfg": 1.0, "p50_ms_per_step": 0.5, "p50_ms_per_picture": 6.0,
                 "pictures_per_s": 166.0, "energy_j_per_picture": None,
                 "observations_ms": {"encode": [1.0], "loop": [4.0], "decode": [1.0]}}],
    "fidelity": [{"engine": "plain", "method": "cfg", "steps": 8, "guidance": 3.0, "passes": 16, "pictures": 32,
                  "macs_per_picture": 85}],
    "pictures": {"columns": ["a cat"], "caption": "", "rows": [{"label": "teacher", "png": []}]},
}  # fmt: skip


def test_a_document_of_the_former_schema_is_read_under_the_current_names(tmp_path: Path) -> None:
    former = FORMER | {"provenance": whole()["provenance"]}
    doc = read(tmp_path, json.dumps(former))
    assert doc["schema"] == results.SCHEMA and doc["images"] == former["pictures"] and "pictures" not in doc
    assert doc["settings"]["images"] == 32 and doc["settings"]["drawn"] == {"images": 32, "real_images": None}
    assert [row["per"] for row in doc["cost"]] == ["image", "step"]
    cost, latency, fidelity = doc["methods_cost"][0], doc["latency"][0], doc["fidelity"][0]
    assert (cost["networks"], cost["evaluations"]) == (["teacher", "teacher"], 16)
    assert (cost["macs_per_image"], cost["macs_per_image_without_attention"]) == (85, 68)
    assert cost["image_includes"] == ["vae-decoder"]
    assert (latency["evaluations"], latency["p50_ms_per_image"], latency["images_per_s"]) == (16, 6.0, 166.0)
    assert latency["energy_j_per_image"] is None and latency["observations_ms"] == {
        "encode": [1.0], "loop": [4.0], "decode": [1.0],
    }  # fmt: skip
    assert (fidelity["evaluations"], fidelity["images"], fidelity["macs_per_image"]) == (16, 32, 85)
    assert not any(word in json.dumps(doc) for word in ("picture", "passes"))
