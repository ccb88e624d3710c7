"""How benchmark/ reads what may be torn, and writes so that nobody ever sees half a file."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn


class Refused(Exception):
    """Input that cannot be used; the text is the line that says why."""


def fail(message: str) -> NoReturn:
    raise Refused(message)


# ---------------------------------------------------------------------------- writing
def temporary(path: Path) -> Path:
    """Where a process writes what will be path; cut short, as names have at most 255 bytes."""
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f"{name}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that appears under its name when all of it is on disk, or not at all."""
    path = path.resolve()  # the file that a link points to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    how = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        with unfinished.open(mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:  # Ctrl-C and a full disk leave nothing behind
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def write_csv(rows: list[dict], path: Path) -> None:
    """One CSV of all rows; a column that some rows lack stays empty there."""
    columns = list(max(rows, key=len))
    for row in rows:
        columns += [name for name in row if name not in columns]
    with whole_file(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_output(path: Path) -> None:
    """Refuse a place that no file can be written to, before hours of work for it."""
    try:
        there = exists(path)
        if path.is_dir():
            fail(f"{path} is a folder")
        if there and not path.is_file():  # /dev/null would be replaced by a file
            fail(f"{path} is no ordinary file")
        if there and not os.access(path, os.W_OK):
            fail(f"{path}: no permission to write")
    except (OSError, ValueError) as error:  # a name too long, a null byte
        fail(f"{str(path)[:200]}: {getattr(error, 'strerror', None) or error}")
    check_folder(path.parent)


def exists(path: Path) -> bool:
    """As Path.exists, which calls a name that is too long or has a null byte just missing."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_folder(path: Path) -> None:
    """Refuse a folder in which nothing can be made; one that is missing can be made itself."""
    try:
        while not exists(path):
            path = path.parent
        with tempfile.TemporaryFile(dir=path):  # permissions alone say too little
            pass
    except (OSError, ValueError) as error:
        fail(f"{str(path)[:200]}: {getattr(error, 'strerror', None) or error}")


# ---------------------------------------------------------------------------- reading
def read_text(path: Path) -> str:
    """A file's text, without the mark that some editors begin it with."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        fail(f"{path} is no text")
    except (OSError, ValueError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")


def read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that has the needed keys."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        fail(f"{path} is torn or no JSON: {error}")
    if not isinstance(content, dict):
        fail(f"{path} holds no JSON object")
    for key in needed:
        if key not in content:
            fail(f"{path} has no {key}")
    return content


def read_table(
    path: Path,
    needed: Iterable[str] = (),
    numbers: Iterable[str] = (),
    growing: bool = False,
) -> list[dict[str, str]]:
    """A CSV's rows, in which the needed columns are there and numbers are finite.

    growing: a script may be writing it, so that what follows the last newline is half a row.
    """
    text = read_text(path)
    if growing:
        text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        fail(f"{path}, line {reader.line_num}: {error}")
    if not names and not growing:
        fail(f"{path} is empty")
    if twice := {name for name in names if names.count(name) > 1}:
        fail(f"{path} has the column {min(twice)} twice")
    if lacking := [name for name in [*needed, *numbers] if names and name not in names]:
        fail(f"{path} has no column {' or '.join(dict.fromkeys(lacking))}")
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            fail(f"{path}, row {line}: not as many cells as columns")
        for name in numbers:
            if not is_number(row[name]):
                fail(f"{path}, row {line}: {name} is {row[name][:60]!r}, no finite number")
    return rows


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
