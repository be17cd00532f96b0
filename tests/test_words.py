"""Check the words of text for users (pages, help, messages) and of names in code; docs/glossary.md has the terms."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: pattern -> what to write instead
BANNED = {
    r"pictures?": "image, or figure for a plot",
    r"(?:U-Net|network|model|teacher|one|two|second) pass(?:es)?(?: (?:a|per) step)?": "evaluation",
    r"(?:draws?|drew|drawing|drawn) (?:an? |the )?(?:images?|prompts?|samples?)": "generate",
    r"goes on|went on|go on with": "continues, or resume with",
    r"wants?": "needs, takes, requires",
    r"mends?|mended": "fix",
    r"heed(?:s|ed)?": "apply, ignore",
    r"(?:is|are) no (?:safetensors|fine-tune|bundle|link|list|number|index|file|folder|LoRA|graph)\b": "is not a …",
    r"says so": "states it",
    r"(?:it|manifest|config|file|metadata|message|driver|runtime|compiler|tokenizer) (?:says|tells|thinks)": "states",
    r"at hand": "available",
    r"asked for": "requested",
    r"makes of (?:w|it|them)": "computes from",
    r"beyond the noise": "significant",
    r"the same thing": "the same",
    r"alike is not": "similarity is not",
    r"no eye": "not visible",
    r"so many of so many": "N of M",
}
#: phrases in which a banned word is correct
ALLOWED = (r"forward pass(?:es)?", r"backward pass", r"pass(?:es)? the", r"want(?:s|ed)? to")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "calibration" / "README.md",
    ROOT / "pnp_trt" / "assets" / "emoji" / "README.md",
]
_BANNED = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(BANNED)), re.IGNORECASE)
_ALLOWED = re.compile("|".join(ALLOWED), re.IGNORECASE)


def findings(text: str) -> list[str]:
    """Return the banned words of a text, each with its replacement."""
    text = _ALLOWED.sub(" ", " ".join(text.split()))
    return [f"'{m[0]}': write {list(BANNED.values())[int(str(m.lastgroup)[1:])]}" for m in _BANNED.finditer(text)]


def prose(markdown: str) -> str:
    """Return Markdown without its code, but with the comments in fenced blocks."""
    blocks = re.split(r"^```.*?$(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    comments = [re.findall(r"(?:^|\s)# (.*)", block) for block in blocks[1::2]]
    plain = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^:::.*$", " ", "\n".join(blocks[::2]), flags=re.MULTILINE)
    return "\n".join([plain, *(line for block in comments for line in block)])


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield messages, help and labels of a module: strings with a space, except docstrings and code in f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    commands = tree.body if path.parent.name == "cli" else []  # their docstrings are the commands' help
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and not (node in commands and isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if " " in node.value.strip():
            yield node.lineno, node.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    assert findings(prose(page.read_text(encoding="utf-8"))) == []


def test_messages_and_help_use_the_words_of_the_field() -> None:
    violations = [
        f"{path.relative_to(ROOT)}:{line}: {finding}"
        for path in sorted((ROOT / "pnp_trt").rglob("*.py"))
        for line, text in sentences(path)
        for finding in findings(text)
    ]
    assert violations == []


def remarks(source: str) -> Iterator[str]:
    """Docstrings and comments of a module, without code in backticks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield re.sub(r"`+[^`]*`+", " ", ast.get_docstring(node) or "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield re.sub(r"`+[^`]*`+", " ", token.string)


def test_docstrings_and_comments_use_the_words_of_the_field() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {finding} ({' '.join(text.split())[:80]})"
        for path in CODE
        for text in remarks(path.read_text(encoding="utf-8"))
        for finding in findings(text)
    ] == []


def test_docstrings_and_comments_are_read() -> None:
    code = '"""Two pictures."""\nx = 1  # `pictures`, and what it wants\n'
    assert [len(findings(text)) for text in remarks(code)] == [1, 1]


def test_the_report_page_uses_the_words_of_the_field() -> None:
    template = (ROOT / "pnp_trt/bench/report/report.html.j2").read_text(encoding="utf-8").partition("<body>")[2]
    plain = re.sub(r"{%.*?%}|{{ (?!figure|data_table).*?}}|<[^>]*>", " ", template, flags=re.DOTALL)
    plain = re.sub(r"{{.*?}}", lambda m: " ".join(re.findall(r'"([^"]* [^"]*)"', m[0])), plain, flags=re.DOTALL)
    assert findings(plain) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("the image needs one model evaluation", 0),
        ("Two Pictures a row", 1),
        ("the config wants it; its manifest says so", 2),
        ("one U-Net pass a step in the forward pass", 1),
    ],
)
def test_findings_of_a_text(text: str, count: int) -> None:
    assert len(findings(text)) == count


def test_code_is_not_checked_but_its_comments_are() -> None:
    assert findings(prose("see `pictures` and [a](pictures.md)\n```sh\npictures  # one image\n```\n")) == []
    assert findings(prose("```sh\nls  # the pictures\n```\n")) != []


# ------------------------------------------------------------------------------------------------- names in code

#: banned words of names in CamelCase or snake_case; ``passes`` are those of a compiler
OLD_NAMES = {"picture", "pictures", "passes"}
#: names that state that a value was obtained, not what it is; ``held_out`` is a term of the field
OBTAINED = re.compile(r"(?:^|_)(?:found|held(?!_out)|made|told|wanted|kept)(?:_|$)")
#: the same for local names and parameters
OBTAINED_LOCALLY = re.compile(OBTAINED.pattern + r"|(?:^|_)(?:given|said)(?:_|$)")
#: file → banned words that it may contain, mostly because files outside the repository do; None: all of them
PERSISTED = {
    "pnp_trt/bench/renames.py": None,  # the table of old names
    "pnp_trt/bench/metrics/fidelity.py": {"picture"},  # tensors of the alignment head's file
    "pnp_trt/distill/guidance.py": {"pictures"},  # in the identity of cached states
    "pnp_trt/precision/int8/record.py": {"pictures"},
    "pnp_trt/bench/suites.py": {"pictures"},
    "pnp_trt/build/onnx_export.py": {"passes"},  # onnx_ir's module
    "benchmarks/emoji/judge.py": {"picture"},
    "benchmarks/emoji/real_features.py": {"pictures"},  # metadata of a shipped file
}  # fmt: skip
CODE = sorted(path for folder in ("pnp_trt", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def words_of(name: str) -> set[str]:
    """Return the lower-case words of an identifier or of a key such as ``p50_ms_per_image``."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the identifiers of a module and strings that look like one, such as JSON keys and fields of records."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield line, name
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            yield line, node.value


def public_names(body: Iterable[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Yield names that other modules use: functions and their parameters, classes and their fields, variables."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.lineno, node.name
            yield from public_names(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name.startswith("_") and node.name != "__init__":
                continue
            arguments = node.args
            yield node.lineno, node.name
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield node.lineno, one.arg
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((node.lineno, part.id) for part in ast.walk(target) if isinstance(part, ast.Name))


def test_names_in_code_use_the_words_of_the_field() -> None:
    old = []
    for path in CODE:
        where = path.relative_to(ROOT).as_posix()
        allowed = PERSISTED.get(where, set())
        if allowed is None:
            continue
        old += [
            f"{where}:{line}: {name}"
            for line, name in (*names(ast.parse(path.read_text(encoding="utf-8"))), (0, path.stem))
            if (words_of(name) & OLD_NAMES) - allowed and name != "cfg-two-passes"
        ]
    assert old == []


def test_every_exception_is_needed() -> None:
    for where, allowed in PERSISTED.items():
        used = {w for _, name in names(ast.parse((ROOT / where).read_text(encoding="utf-8"))) for w in words_of(name)}
        assert used & OLD_NAMES and (allowed is None or allowed <= used), where


def test_public_names_state_what_a_thing_is() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in CODE
        if path.is_relative_to(ROOT / "pnp_trt")
        for line, name in public_names(ast.parse(path.read_text(encoding="utf-8")).body)
        if not name.startswith("_") and OBTAINED.search(name)
    ] == []


def local_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that functions assign, and their parameters."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.lineno, node.id
                elif isinstance(node, ast.arg):
                    yield node.lineno, node.arg


def test_local_names_state_what_a_thing_is() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in CODE
        for line, name in local_names(ast.parse(path.read_text(encoding="utf-8")))
        if OBTAINED_LOCALLY.search(name)
    ] == []


def test_names_of_classes_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in CODE:
        if path.is_relative_to(ROOT / "pnp_trt"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("images = find_images(folder)", 0),
        ("class PictureGrid: pass", 1),
        ("row['macs_per_picture'] = case.passes()", 2),
        ("load(pictures=3)", 1),
        ("surpasses, depicted = 'picturesque', 1", 0),
    ],
)
def test_banned_words_in_names_are_detected(code: str, count: int) -> None:
    assert sum(bool(words_of(name) & OLD_NAMES) for _, name in names(ast.parse(code))) == count


def test_names_of_obtained_values_are_detected() -> None:
    code = "kept = 1\nclass A:\n    made: int\n    def f(self, wanted): found = 1\n    def _g(self, held): ...\n"
    code += "held_out = 2"
    bad = [name for _, name in public_names(ast.parse(code).body) if OBTAINED.search(name)]
    assert bad == ["kept", "made", "wanted"]


def test_local_names_of_obtained_values_are_detected() -> None:
    code = "held_out, row = 1, 2\ndef f(found_rows, *, rows=None):\n    told, held_out = found_rows, rows\n"
    assert {name for _, name in local_names(ast.parse(code)) if OBTAINED_LOCALLY.search(name)} == {"found_rows", "told"}
