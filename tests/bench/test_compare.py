"""Comparison of two results documents: a slowed method is reported, noise is not."""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from pnp_trt.bench import results
from pnp_trt.bench.compare import changes, compare
from pnp_trt.cli.app import app
from pnp_trt.errors import InputError

from . import fake_document

SCHEMA_FILE = Path(compare.__file__).with_name("compare-schema.json")


@cache
def _text(seed: int) -> str:
    return json.dumps(fake_document.make(seed=seed))


def make(seed: int = 0) -> dict[str, Any]:
    """Return the results of a fake run; two seeds are two runs of the same code."""
    return dict(json.loads(_text(seed)))


def terminal(comparison: compare.Comparison, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(compare.render_terminal(comparison))
    return console.export_text()


def slowed(seed: int, **slow: float) -> dict[str, Any]:
    return json.loads(json.dumps(fake_document.make(seed=seed, slow=slow)))


def keys(changes: list[compare.Change]) -> set[tuple[str, str, Any]]:
    return {(one.figure, one.key.get("method", ""), one.key.get("batch")) for one in changes}


def test_noise_is_not_a_change() -> None:
    comparison = compare.compare(make(0), make(1))
    assert comparison.absolute
    assert not comparison.of("worse")
    assert not comparison.of("better")
    assert not comparison.regressed
    assert len(comparison.figures) > 100
    assert "0 worse, 0 better" in terminal(comparison)


def test_a_slowed_method_is_reported_slower() -> None:
    comparison = compare.compare(make(0), slowed(1, guided=1.12))
    worse = comparison.of("worse")
    assert keys(worse) == {("ratio_to_cfg", "guided", batch) for batch in (1, 4, 8)}
    assert all(one.new > one.old and one.evidence == "interval" for one in worse)
    assert comparison.regressed
    text = terminal(comparison)
    assert "Significantly worse" in text
    assert "emoji-tiny guided, batch 4" in " ".join(text.split())
    assert compare.compare(slowed(1, guided=1.12), make(0)).of("better")


def test_a_change_within_the_repeatability_is_noise_however_narrow_the_intervals() -> None:
    comparison = compare.compare(make(0), slowed(0, guided=1.025))
    assert not comparison.of("worse")
    assert not comparison.of("worse", weak=True)


def test_a_slower_machine_is_a_hint_and_not_a_regression() -> None:
    everything = {method: 1.3 for methods in fake_document.METHODS.values() for method, _, _ in methods}
    comparison = compare.compare(make(0), slowed(0, **everything))
    assert not comparison.regressed
    assert len(comparison.of("worse", weak=True)) == 54
    text = " ".join(terminal(comparison).split())
    assert "Absolute times hint at 54 slower" in text
    assert "All loops changed together, by 1.30 ×" in text


def test_absolute_times_need_the_same_device_and_versions() -> None:
    everything = {method: 1.3 for methods in fake_document.METHODS.values() for method, _, _ in methods}
    for change in ({"cpu": "another"}, {"packages": {"numpy": "1.0"}}, {"device": "NVIDIA L4"}):
        new = slowed(0, **everything)
        new["provenance"] |= change
        comparison = compare.compare(make(0), new)
        assert not comparison.absolute
        assert not comparison.of("worse", weak=True)
        assert "Absolute times were not compared" in terminal(comparison)
    assert "accelerator: none → NVIDIA L4" in comparison.differences


def test_worse_images_are_reported_and_better_ones_too() -> None:
    worse = json.loads(json.dumps(fake_document.make(kid_worse=0.03)))
    comparison = compare.compare(make(0), worse)
    assert {(one.figure, one.key["method"]) for one in comparison.of("worse")} >= {("kid", "guided")}
    assert {one.key["method"] for one in comparison.of("worse")} == {"guided"}
    assert {one.figure for one in compare.compare(worse, make(0)).of("better")} >= {"kid"}


def test_cost_is_compared_exactly() -> None:
    new = make(0)
    new["cost"][1]["macs"] += 1
    new["methods_cost"][0]["macs_per_image"] -= 1
    comparison = compare.compare(make(0), new)
    assert [(one.figure, one.key["network"]) for one in comparison.of("worse")] == [("macs", "guide-tiny")]
    assert [(one.figure, one.key["method"]) for one in comparison.of("better")] == [("macs_per_image", "cfg")]


def test_rows_in_only_one_document_are_listed() -> None:
    old, new = make(0), make(1)
    del new["latency"][0]
    del old["fidelity"][-1]
    comparison = compare.compare(old, new)
    assert [(one["part"], one["key"]["method"]) for one in comparison.only_old] == [("latency", "cfg")]
    assert [(one["part"], one["key"]["method"]) for one in comparison.only_new] == [("fidelity", "guided")]
    text = " ".join(terminal(comparison).split())
    assert "In the old results only" in text
    assert "emoji-teacher cfg, batch 1, 20 steps, w = 3" in text


def test_other_differences_are_listed() -> None:
    new = make(0)
    new["provenance"] |= {"commit": "f" * 40, "uncommitted_changes": True, "python": "3.14.0"}
    new["settings"]["rounds"] = 3
    comparison = compare.compare(make(0), new)
    assert any(one.endswith("→ ffffffffffff") for one in comparison.differences)
    assert "setting rounds: 12 → 3" in comparison.differences
    assert any(one.startswith("Python: ") for one in comparison.differences)
    assert any("uncommitted" in one for one in comparison.differences)


def test_different_bases_are_refused() -> None:
    new = make(0)
    new["settings"]["base"] = "emoji-3d"
    with pytest.raises(InputError, match="old results are of base 'emoji', the new ones of 'emoji-3d'"):
        compare.compare(make(0), new)
    new = make(0)
    new["cost"][0]["parameters"] = 5
    with pytest.raises(InputError, match="the teachers differ, 859,520,964 parameters"):
        compare.compare(make(0), new)


@settings(max_examples=25)  # each makes and compares four documents
@given(st.integers(0, 6), st.dictionaries(st.sampled_from(["guided", "unguided", "diffusers"]), st.floats(0.5, 2.0)))
def test_a_document_equals_itself_and_order_flips_the_verdict(seed: int, slow: dict[str, float]) -> None:
    def run(number: int, slow: dict[str, float]) -> dict[str, Any]:
        return make(0) | {"latency": fake_document.latency(np.random.default_rng(number), slow, (1,), 5)}

    doc = run(seed, slow)
    alone = compare.compare(doc, copy.deepcopy(doc))
    assert {one.verdict for one in alone.figures} == {"same"}
    assert (alone.only_old, alone.only_new, alone.absolute) == ([], [], True)
    other = run(seed + 1, {})
    there, back = compare.compare(doc, other), compare.compare(other, doc)
    flipped = {"same": "same", "better": "worse", "worse": "better"}
    assert [flipped[one.verdict] for one in there.figures] == [one.verdict for one in back.figures]


#: any JSON value, as another program may write it
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12) | st.sampled_from(["\x1b[31mred", "cfg", "interval", "2026-01-01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def spoil(data: st.DataObject, doc: dict[str, Any]) -> None:
    """Change one value anywhere in a document: replace or remove it, add one, or repeat a row."""
    at: Any = doc
    while True:
        inside = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(inside))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.integers(0, 9)):
            at = at[key]
            continue
        match data.draw(st.integers(0, 5)):
            case 0 if isinstance(at, dict):
                del at[key]
            case 1 if isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            case 2 if isinstance(at, dict):
                at[data.draw(st.text(max_size=8))] = data.draw(VALUES)
            case 3 if isinstance(at[key], int | float) and not isinstance(at[key], bool):
                at[key] = data.draw(st.sampled_from([0, -1, 1e-320, 1e308, -1e308, 10**25, at[key] * 1.1]))
            case _:
                at[key] = data.draw(VALUES)
        return


def short() -> dict[str, Any]:
    """Return a document with at most two rows per part, so that changes reach every part."""
    doc = make(0)
    for part, rows in doc.items():
        if isinstance(rows, list):
            doc[part] = rows[:2]
    return doc


def test_a_relative_change_beyond_the_range_of_json_is_none() -> None:
    change = changes.Change("cost", {}, "macs", 1e-320, 1e308, None, None, "worse", "exact")
    assert change.relative is None and changes.Change(**{**vars(change), "old": 2.0, "new": 3.0}).relative == 0.5


@settings(max_examples=300)
@given(st.data())
def test_any_document_is_compared_or_refused_in_a_sentence(data: st.DataObject) -> None:
    """A document that passes the schema can be compared, rendered, and written under the comparison's schema."""
    documents = [short(), short()]
    for _ in range(data.draw(st.integers(1, 4))):
        spoil(data, data.draw(st.sampled_from(documents)))
    try:
        for doc in documents:
            results.check(doc, "FILE")
        comparison = compare.compare(*documents)
    except InputError as e:
        assert len(str(e)) < 2000 and "\x1b" not in str(e)
        return
    assert "\x1b" not in terminal(comparison)
    written = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    pytest.importorskip("jsonschema").Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(written)


def test_the_command_line(tmp_path: Path) -> None:
    old = results.write(make(0), tmp_path / "old.json")
    same = results.write(make(1), tmp_path / "same.json")
    slow = results.write(slowed(1, guided=1.2), tmp_path / "slow.json")
    run = CliRunner().invoke
    done = run(app, ["compare", str(old), str(slow), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0
    assert "Significantly worse" in done.output
    document = json.loads((tmp_path / "found.json").read_text())
    assert (document["schema"], document["regressed"]) == (changes.SCHEMA, True)
    assert {one["evidence"] for one in document["figures"]} >= {"exact", "interval"}
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    validator.check_schema(validator.schema)
    validator.validate(document)
    assert not validator.is_valid({**document, "figures": [{**document["figures"][0], "verdict": "faster"}]})
    assert run(app, ["compare", str(old), str(slow), "--fail-on-regression"]).exit_code == 1
    assert run(app, ["compare", str(old), str(same), "--fail-on-regression"]).exit_code == 0
    slow.write_text(slow.read_text()[:-9])
    refused = run(app, ["compare", str(old), str(slow)])
    assert isinstance(refused.exception, InputError)
    assert "not complete JSON" in str(refused.exception)
