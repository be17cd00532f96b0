"""Words of text that a user reads: pages, help, messages. docs/glossary.md has the terms; these are not among them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
#: words of the field, names and quotations in which a banned word is right
ALLOWED = (
    r"--pictures", r"per[-_]picture", r"pictures\.png", r"pictures is", r"picture_", r"forward pass(?:es)?",
    r"backward pass", r"pass(?:es)? the", r"want(?:s|ed)? to",
)  # fmt: skip
#: generated from records, or quoting data
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
    """The banned words of a text, each with its replacement."""
    text = _ALLOWED.sub(" ", " ".join(text.split()))
    return [f"'{m[0]}': write {list(BANNED.values())[int(str(m.lastgroup)[1:])]}" for m in _BANNED.finditer(text)]


def prose(markdown: str) -> str:
    """Markdown without code: fenced blocks keep their comments, which a reader reads."""
    blocks = re.split(r"^```.*?$(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    comments = [re.findall(r"(?:^|\s)# (.*)", block) for block in blocks[1::2]]
    plain = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^:::.*$", " ", "\n".join(blocks[::2]), flags=re.MULTILINE)
    return "\n".join([plain, *(line for block in comments for line in block)])


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Messages, help and labels of a module: string literals with a blank, without docstrings and code in f-strings."""
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
    found = [
        f"{path.relative_to(ROOT)}:{line}: {finding}"
        for path in sorted((ROOT / "pnp_trt").rglob("*.py"))
        for line, text in sentences(path)
        for finding in findings(text)
    ]
    assert found == []


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
        ("pictures is 3; give --pictures 4", 0),
        ("one U-Net pass a step in the forward pass", 1),
    ],
)
def test_the_check_itself(text: str, count: int) -> None:
    assert len(findings(text)) == count


def test_code_is_no_prose() -> None:
    assert findings(prose("see `pictures` and [a](pictures.md)\n```sh\npictures  # one image\n```\n")) == []
    assert findings(prose("```sh\nls  # the pictures\n```\n")) != []
