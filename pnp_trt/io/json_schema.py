"""Validate a value against a JSON Schema without a library, for the subset of the language that `schema.json` uses.

Results files must be readable where only the runtime's dependencies are installed. The tests compare this validator
with jsonschema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
    "integer": (int, float),
}


def problem(value: Any, schema: Schema) -> str | None:
    """Return the first violation of `schema` in `value`, as a clause that begins with its location, or None.

    value: a value from `json.loads`.  schema: a JSON Schema with the keywords type, const, enum, required, properties,
    additionalProperties (a schema), items, minItems, maxItems, minimum, anyOf and $ref to "#/$defs/NAME".
    """
    return _problem(value, schema, schema.get("$defs", {}), "")


def _problem(value: Any, schema: Schema, defs: Schema, place: str) -> str | None:
    if "$ref" in schema:
        violation = _problem(value, defs[schema["$ref"].removeprefix("#/$defs/")], defs, place)
        if violation:
            return violation
    where = f"'{place}'" if place else "the document"
    if "const" in schema and value != schema["const"]:
        return f"{where} is {_shown(value)}, not {_shown(schema['const'])}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {_shown(value)}, not one of {', '.join(map(_shown, schema['enum']))}"
    types = schema.get("type")
    if types is not None:
        names = [types] if isinstance(types, str) else list(types)
        if not any(_is(value, name) for name in names):
            return f"{where} is {_kind(value)}, not {' or '.join(map(_article, names))}"
    if "anyOf" in schema:
        problems = [_problem(value, one, defs, place) for one in schema["anyOf"]]
        if all(problems):
            return problems[0]
    if isinstance(value, dict):
        return _in_object(value, schema, defs, place)
    if isinstance(value, list):
        return _in_array(value, schema, defs, place)
    if "minimum" in schema and _is(value, "number") and value < schema["minimum"]:
        return f"{where} is {_shown(value)}, less than {schema['minimum']}"
    return None


def _in_object(value: dict[str, Any], schema: Schema, defs: Schema, place: str) -> str | None:
    missing = [key for key in schema.get("required", ()) if key not in value]
    if missing:
        return f"{repr(place) if place else 'the document'} lacks {', '.join(map(repr, missing))}"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, item in value.items():
        rule = properties.get(key, others)
        if rule is not None and (violation := _problem(item, rule, defs, f"{place}.{key}" if place else key)):
            return violation
    return None


def _in_array(value: list[Any], schema: Schema, defs: Schema, place: str) -> str | None:
    least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
    if not least <= len(value) <= most:
        return f"'{place}' has {len(value)} items, not {least if least == most else f'{least} to {most}'}"
    if "items" in schema:
        for number, item in enumerate(value):
            if violation := _problem(item, schema["items"], defs, f"{place}[{number}]"):
                return violation
    return None


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _kind(value: Any) -> str:
    names = ("null", "boolean", "string", "object", "array", "number")
    name = next(one for one in names if _is(value, one))
    return _article(name) + (f" ({_shown(value)})" if name in ("string", "number", "boolean") else "")


def _article(name: str) -> str:
    return name if name == "null" else f"{'an' if name[0] in 'aio' else 'a'} {name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
