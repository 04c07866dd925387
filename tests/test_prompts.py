"""Prompt sets from lists and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from madit.errors import PromptError
from madit.prompts import PromptSet, load_prompts

PROMPTS = ("a red circle", "a dog, small", "ein Käfer")


def test_a_list_keeps_its_order() -> None:
    prompts = load_prompts(PROMPTS)
    assert tuple(prompts) == prompts.prompts == PROMPTS
    assert (len(prompts), prompts[1]) == (3, "a dog, small")
    assert load_prompts(prompts) is prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a red circle\n\n  a dog, small  \r\nein Käfer"),
        ("b.jsonl", '{"prompt": "a red circle", "label": 3}\n\n"a dog, small"\n{"prompt": "ein Käfer"}\n'),
        ("c.csv", 'id,prompt\n1,a red circle\n2,"a dog, small"\n3,ein Käfer\n'),
        ("d.txt", "\ufeffa red circle\na dog, small\nein Käfer\n"),
    ],
)
def test_files_of_each_kind_give_the_same_set(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    for given in (path, str(path)):
        prompts = load_prompts(given)
        assert prompts.prompts == PROMPTS
        assert prompts.name == name
        assert prompts.sha256 == PromptSet(PROMPTS).sha256


def test_the_hash_is_of_the_texts_and_their_order() -> None:
    one = PromptSet(PROMPTS).sha256
    assert one == PromptSet(PROMPTS, name="other").sha256
    assert len({one, PromptSet(PROMPTS[::-1]).sha256, PromptSet(("".join(PROMPTS),)).sha256}) == 3


def test_one_text_is_a_set_of_one() -> None:
    assert load_prompts("a red circle").prompts == ("a red circle",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "at least one prompt in a.txt"),
        ("a.txt", " \n\n", "at least one prompt"),
        ("a.jsonl", "", "at least one prompt"),
        ("a.jsonl", '"a"\n{"prompt": 3}', "line 2"),
        ("a.jsonl", "{not json}", "JSON in line 1"),
        ("a.csv", "text\na dog\n", "column `prompt`.*got text"),
        ("a.csv", "", "column `prompt`.*got none"),
        ("a.csv", "prompt\n", "at least one prompt"),
        ("a.csv", 'id,prompt\n1,""\n', "prompt 0 in a.csv.*empty"),
        ("a.md", "a dog", "prompt file .txt, .jsonl, .csv"),
    ],
)
def test_malformed_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PromptError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(PromptError, match="UTF-8"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one prompt"),
        (["a", ""], "prompt 1.*empty"),
        (["a", 3], "prompt 1.*int"),
        (3, "list of texts or a path, got int"),
        ("none.txt", "found none at none.txt"),
        ("", "empty"),
    ],
)
def test_malformed_arguments(given: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(given)  # type: ignore[arg-type]
