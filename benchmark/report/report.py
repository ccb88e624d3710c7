"""Rebuild the tables and figures of README.md and docs/ from benchmark/results/*.csv.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is one of registry.py.
Every number comes from a CSV, so who edits a table by hand loses it here. Tables need scipy,
figures matplotlib too (benchmark/requirements.txt).

    python benchmark/report/report.py             # rewrite the tables, then the figures
    python benchmark/report/report.py --tables    # the tables only
    python benchmark/report/report.py --check     # write nothing; exit 1 if a table is out of date
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root
from benchmark import FIGURES, RESULTS, ROOT
from benchmark.report.registry import registry

TABLE = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def rebuild(path: Path, tables: dict) -> tuple[str, list[str]]:
    """The document's text with all its tables new, and the names of those that changed."""
    text, changed = path.read_text(), []

    def table(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            sys.exit(f"report.py: error: {path.name} asks for {name}; known: {', '.join(tables)}")
        build, source = tables[name]
        new = build(RESULTS / source)
        if path.parent != ROOT:  # links to figures start from the document
            new = new.replace("](docs/", "](")
        new = f"{begin}\n{new}\n\n{end}"
        if new != match[0]:
            changed.append(name)
        return new

    new = TABLE.sub(table, text)
    if text.count("<!-- table:") != len(TABLE.findall(text)):
        sys.exit(f"report.py: error: a table of {path.name} has no <!-- /table --> of its own")
    return new, changed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="leave the figures as they are")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a change")
    args = parser.parse_args()
    found, stale = registry(), False
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text, changed = rebuild(path, found.tables) if path.exists() else ("", [])
        for name in changed:
            news = "is out of date" if args.check else "rewritten"
            print(f"{path.relative_to(ROOT)}: {name} {news}")
        stale |= bool(changed)
        if changed and not args.check:
            path.write_text(text)
    if args.check:
        sys.exit(int(stale))
    for figure, (draw, source) in found.figures.items():
        if not args.tables and (RESULTS / source).exists():
            draw(RESULTS / source, FIGURES / figure)


if __name__ == "__main__":
    main()
