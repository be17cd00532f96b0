"""Plans and suites: refused values, the precedence of settings, and the suites of this repository."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnp_trt.bench.plan import QUICK, Plan, check, engines_of
from pnp_trt.bench.suites import known, load, make_plan
from pnp_trt.errors import InputError


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"only": "beauty"}, "--only is 'beauty'; known: cost, latency, fidelity, serving"),
        ({"base": "random:sd15"}, "has no weights to run; add --only cost"),
        ({"steps": (8, 1001)}, "steps is 1001; it must be between 1 and 1,000"),
        ({"timed_steps": (0,)}, "timed-steps is 0; it must be between 1 and"),
        ({"guidance": (3.0, 9.5)}, "guidance is 9.5; it must be between 1 and 9"),
        ({"guidance": (float("nan"),)}, "guidance is nan"),
        ({"batches": (0,)}, "batch sizes are 0; each must be between 1 and 32"),
        ({"steps": ()}, "steps is empty"),
        ({"steps": (8, 8)}, "steps names 8 twice"),
        ({"engines": ("a", "a")}, "engines names a twice"),
        ({"rounds": 0}, "rounds is 0"),
        ({"images": 1}, "images is 1; it must be between 2 and"),
        ({"size": (64, 64)}, "if you use --size, add --only latency"),
        ({"prompts": "nowhere.txt"}, "--prompts nowhere.txt is not a file"),
        ({"clip": "nowhere"}, "--clip nowhere is not a folder"),
        ({"real": "/"}, "add --prompts FILE"),
        ({"inception": __file__}, "none are named; add --real DIR"),
        ({"real": "/", "only": "latency"}, "--real is for the fidelity part"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(changed: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        check(replace(Plan(), **changed))
    assert message.replace("1,000", "1000") in str(error.value).replace("1,000", "1000")


def test_default_and_quick_plans_are_valid() -> None:
    check(Plan())
    check(Plan(**QUICK, quick=True))
    assert Plan().loops == Plan().steps and replace(Plan(), timed_steps=(4,)).loops == (4,)
    assert engines_of(Plan()) == ("emoji-teacher", "emoji-tiny")
    assert engines_of(Plan(only="cost")) == () and Plan(only="cost").parts == ("cost",)


def test_every_suite_of_the_repository_is_a_valid_plan() -> None:
    assert {"readme-emoji", "quick", "full", "cost-sd15", "cost-sd21", "cost-sdxl"} <= set(known())
    for name in known():
        check(make_plan(name, False, {}))


def test_the_command_line_overrides_the_suite_and_the_suite_overrides_quick(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('quick = true\nrounds = 7\nguidance = 2\nsize = "64x96"\nprompts = "words.txt"\nengines = ["a"]\n')
    plan = make_plan(str(file), False, {"rounds": None, "guidance": (), "batches": (2,)})
    assert plan.quick and plan.rounds == 7 and plan.guidance == (2.0,) and plan.size == (64, 96)
    assert plan.batches == (2,) and plan.steps == QUICK["steps"] and plan.engines == ("a",)
    assert plan.prompts == str(tmp_path / "words.txt")  # relative to the suite, not to the working directory
    assert make_plan(str(file), False, {"rounds": 3}).rounds == 3
    # --steps also sets the steps of the timed loop
    assert (
        make_plan(None, True, {"steps": (5,)}).loops == (5,) and make_plan(None, True, {}).loops == QUICK["timed_steps"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1\n", "the unknown key 'colour'; known keys: engines, base, only"),
        ("steps = 'eight'\n", "'steps' is 'eight'; it must be a list of whole numbers"),
        ("steps = [8.5]\n", "must be a list of whole numbers"),
        ("steps = [true]\n", "must be a list of whole numbers"),
        ("rounds = '4'\n", "'rounds' is '4'; it must be a whole number"),
        ("quick = 1\n", "'quick' is 1; it must be true or false"),
        ("base = 3\n", "'base' is 3; it must be a string"),
        ("size = '64by64'\n", "size is '64by64'"),
        ("steps = [8\n", "is not readable as TOML"),
        ("", "sets nothing; give it a setting"),
        ("# steps = [8]\n", "sets nothing; give it a setting"),
    ],
)
def test_bad_suites_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load(str(file))
    assert message in str(error.value)


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="no suite 'fast'; known suites: .*cost-sd15, .*quick, readme-emoji"):
        load("fast")


@given(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1))
def test_only_fields_of_the_plan_are_accepted_as_keys(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    file = tmp_path_factory.mktemp("suite") / "s.toml"
    file.write_text(f"{key} = 1979-05-27\n")  # no field takes a date
    names = {f.name for f in fields(Plan)}
    with pytest.raises(InputError, match="must be" if key in names else f"unknown key '{key}'"):
        load(str(file))


def test_a_suite_may_use_the_former_name_of_images(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("pictures = 12\n")
    assert make_plan(str(tmp_path / "old.toml"), False, {}).images == 12
    (tmp_path / "both.toml").write_text("pictures = 12\nimages = 13\n")
    with pytest.raises(InputError, match="sets 'images' twice"):
        load(str(tmp_path / "both.toml"))
