"""`PromptSet`: the prompts of a run, with a name and a hash to recognise them by."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madit.errors import PromptError

SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order, none of them empty.

    Args:
        prompts: the texts.
        name: where they come from, e.g. the file's name.

    Raises:
        PromptError: if there is no prompt, or one is not a text or is empty.

    >>> prompts = PromptSet(("a red circle", "a dog"))
    >>> len(prompts), prompts.sha256[:8]
    (2, '11ec9c89')
    """

    prompts: tuple[str, ...]
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        where = f" in {self.name}" if self.name else ""
        if not self.prompts:
            raise PromptError(f"expected at least one prompt{where}, got none")
        for i, prompt in enumerate(self.prompts):
            if not isinstance(prompt, str):
                raise PromptError(f"expected prompt {i}{where} to be a text, got {type(prompt).__name__}")
            if not prompt.strip():
                raise PromptError(f"expected prompt {i}{where} to be a text, got an empty one; remove it")

    @property
    def sha256(self) -> str:
        """Hash of the texts in order; the name does not enter."""
        return hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompts)

    def __getitem__(self, index: int | slice) -> Any:
        return self.prompts[index]

    @classmethod
    def load(cls, path: str | Path) -> PromptSet:
        """Read a file: `.txt` one prompt a line, `.jsonl` texts or objects with `prompt`, `.csv` a column `prompt`.

        Blank lines are passed over.

        Raises:
            PromptError: if the file is missing, of another kind, empty or malformed.
        """
        path = Path(path)
        readers = dict(zip(SUFFIXES, (_lines, _json_lines, _rows), strict=True))
        if path.suffix not in readers:
            raise PromptError(f"expected a prompt file {', '.join(SUFFIXES)}, got {path}")
        if not path.is_file():
            raise PromptError(f"expected a prompt file, found none at {path}")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise PromptError(f"expected UTF-8 text in {path}, got other bytes") from None
        return cls(tuple(readers[path.suffix](text, path)), name=path.name)


def load_prompts(prompts: PromptSet | str | Path | Iterable[str]) -> PromptSet:
    """A `PromptSet` from a set, a list of texts, one text, or the path of a `.txt`, `.jsonl` or `.csv` file.

    A text that ends like one of these files or names an existing file is a path.

    Raises:
        PromptError: if there is no prompt, or the file is missing or malformed.

    >>> load_prompts("a red circle").prompts
    ('a red circle',)
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, Path):
        return PromptSet.load(prompts)
    if isinstance(prompts, str):
        is_path = prompts.endswith(SUFFIXES) or (len(prompts) < 256 and "\n" not in prompts and Path(prompts).is_file())
        return PromptSet.load(prompts) if is_path else PromptSet((prompts,))
    if not isinstance(prompts, Iterable):
        raise PromptError(f"expected prompts as a list of texts or a path, got {type(prompts).__name__}")
    return PromptSet(tuple(prompts))


def _lines(text: str, path: Path) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _json_lines(text: str, path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise PromptError(f"expected JSON in line {number} of {path}, got {line[:60]!r}") from None
        item = item.get("prompt") if isinstance(item, dict) else item
        if not isinstance(item, str):
            raise PromptError(f"expected a text or an object with `prompt` in line {number} of {path}")
        prompts.append(item)
    return prompts


def _rows(text: str, path: Path) -> list[str]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if "prompt" not in (reader.fieldnames or ()):
            columns = ", ".join(reader.fieldnames or ()) or "none"
            raise PromptError(f"expected a column `prompt` in {path}, got {columns}")
        return [row["prompt"] or "" for row in reader]
    except csv.Error as error:
        raise PromptError(f"expected CSV in {path}: {error}") from None
