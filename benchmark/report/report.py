"""Rebuild the tables, figures and code excerpts of README.md and docs/.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is one of registry.py.
Every number comes from a CSV in benchmark/results. An excerpt stands between
`<!-- code:SCRIPT.FUNCTION -->` and `<!-- /code -->` and is that function's source. Links of the
form [`function`](script.py#L1) get the function's line. Whoever edits one of these by hand loses
it here. Tables need scipy, figures matplotlib too (benchmark/requirements.txt).

    python benchmark/report/report.py             # rewrite tables and excerpts, then the figures
    python benchmark/report/report.py --tables    # without the figures
    python benchmark/report/report.py --check     # write nothing; exit 1 if something is stale
"""

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import FIGURES, RESULTS, ROOT
from benchmark.cli import Parser, run
from benchmark.files import fail, read_text, write_text
from benchmark.report.registry import registry

TABLE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code:([\w/]+)\.(\w+) -->\n).*?(<!-- /code -->)", re.DOTALL)
LINK = re.compile(r"(\[`(\w+)`\]\((?:\.\./)*([\w/]+)\.py#L)\d+\)")  # [`function`](script.py#L1)


@contextmanager
def made_from(path: Path, name: str) -> Iterator[None]:
    """A CSV that lacks columns, or holds words for numbers, is refused by its name."""
    try:
        yield
    except (LookupError, ArithmeticError, TypeError, ValueError) as error:
        fail(f"{path} cannot make {name}: {type(error).__name__}: {error}")


def definition(script: str, name: str) -> tuple[str, ast.AST]:
    """The text of a script, and where it defines a function or a class."""
    path = ROOT / f"{script}.py"
    text = read_text(path) if path.exists() else ""
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return text, node
    fail(f"there is no function {name} in {script}.py")


def rebuild(path: Path, tables: dict) -> tuple[str, list[str]]:
    """The document's text with all its blocks new, and the names of those that changed."""
    text, changed = read_text(path), []
    depth = len(path.relative_to(ROOT).parts) - 1  # 0: README.md, 1: docs/, 2: docs/campaigns/
    figures = "](" + ("docs/" if depth == 0 else "../" * (depth - 1))

    def block(match: re.Match, name: str, content: str) -> str:
        new = f"{match[1]}\n{content}\n\n{match[match.lastindex]}"
        if new != match[0]:
            changed.append(name)
        return new

    def table(match: re.Match) -> str:
        name = match[2]
        if name not in tables:
            fail(f"{path.name} asks for {name}; known: {', '.join(tables)}")
        build, csv = tables[name]
        with made_from(RESULTS / csv, name):
            content = build(RESULTS / csv)
        return block(match, name, content.replace("](docs/", figures))

    def code(match: re.Match) -> str:
        excerpt = ast.get_source_segment(*definition(match[2], match[3]))
        return block(match, f"{match[2]}.{match[3]}", f"```python\n{excerpt}\n```")

    def link(match: re.Match) -> str:
        new = f"{match[1]}{definition(match[3], match[2])[1].lineno})"
        if new != match[0]:
            changed.append(f"line of {match[3]}.{match[2]}")
        return new

    new = LINK.sub(link, CODE.sub(code, TABLE.sub(table, text)))
    for kind, pattern in ("table", TABLE), ("code", CODE):
        if text.count(f"<!-- {kind}:") != len(pattern.findall(text)):
            fail(f"{path.name}: a {kind} has no <!-- /{kind} --> of its own")
    return new, changed


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tables", action="store_true", help="leave the figures as they are")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a change")
    args = parser.parse_args()
    found, stale = registry(), False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        text, changed = rebuild(path, found.tables) if path.exists() else ("", [])
        for name in changed:
            news = "is out of date" if args.check else "rewritten"
            print(f"{path.relative_to(ROOT)}: {name} {news}")
        stale |= bool(changed)
        if changed and not args.check:
            write_text(path, text)
    if args.check:
        return int(stale)
    for figure, (draw, source) in found.figures.items():
        if not args.tables and (RESULTS / source).exists():
            with made_from(RESULTS / source, figure):
                draw(RESULTS / source, FIGURES / figure)
    return 0


if __name__ == "__main__":
    run(main)
