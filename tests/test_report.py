"""The page: valid HTML, nothing from outside, every section, plain words."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import figure_data
import numpy as np
import pytest
from PIL import Image

from madit import evaluation
from madit.axes import QUANTILE_LEVELS
from madit.channels import ChannelSet
from madit.errors import ConfigError, StoreError
from madit.workflows import words
from madit.workflows.report import ModelResults, report, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
LINKS = ("src", "href", "srcset", "action", "data", "poster")


class Page(HTMLParser):
    """Checks that tags nest, and collects links, ids and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.links, self.ids, self.text, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in LINKS]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def results():
    conditions = {n: figure_data.picture(12, c) for n, c in {"plain": 0.3, "zeroed": 0.02, "random": 0.3}.items()}
    reader = lambda images: {"texture": (images.std((1, 2, 3)) > 0.12).astype(int)}  # noqa: E731
    metrics = evaluation.compare(conditions, conditions["plain"], reader, {"texture": np.ones(12, int)})
    curve = metrics.rename({"condition": "scale"}).assign_coords(scale=[0.0, 1.0, 2.0])
    return ModelResults(
        "shapes-detail",
        notes="Three million parameters.\n\nA note with <b>markup</b>.",
        run=figure_data.run(),
        channels=figure_data.channel_set(),
        effects=figure_data.effects(),
        images=conditions,
        captions=[f"<script>alert({i})</script>" for i in range(12)],
        metrics=metrics,
        controls=["random"],
        curves={"Power by scale": (curve, "high_band_power", "scale")},
        findings=["Zeroing removes detail & nothing else."],
        provenance={"seed": 7, "nested": {"ratio": 100.0}},
    )


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    other = ModelResults(
        "shapes", run=figure_data.run(raw=False, images=False), channels=ChannelSet(n_blocks=3, width=16)
    )
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    return write_report(out, results, other, title="A < B", summary=["Read this."], command="madit demo --out 'x'")


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_tags_nest_and_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("html") == page.tags.count("body") == page.tags.count("h1") == 1


def test_nothing_is_loaded_from_outside(path, page):
    text = path.read_text(encoding="utf-8")
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    images = [base64.b64decode(link.split(",", 1)[1]) for link in page.links if link.startswith("data:")]
    for image in images:
        if not image.startswith(b"\x89PNG"):
            # the only addresses in a drawing are names of XML namespaces; what it shows, it holds
            references = re.findall(rb'(?:href|src)="([^"]+)"', image)
            assert all(r.startswith((b"#", b"data:")) for r in references)
    pictures = [Image.open(io.BytesIO(i)) for i in images if i.startswith(b"\x89PNG")]
    assert all(min(p.size) > 100 for p in pictures)


def test_sections_come_in_order_and_figures_are_numbered_in_reading_order(page):
    assert [i for i in page.ids if not i.startswith("figure-")] == [
        "summary", "figures", "metrics", "attribution", "provenance",
    ]  # fmt: skip
    numbers = [int(i.removeprefix("figure-")) for i in page.ids if i.startswith("figure-")]
    # 4 of the first run, 3 of its pictures and curve, 3 of the second run, the forest, the attribution
    assert numbers == list(range(1, 13))


def test_text_from_outside_is_escaped(path, page):
    text = path.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "A note with <b>markup</b>." in page.words
    assert "&lt;b&gt;markup" in text
    assert "A < B" in page.words


def test_the_positive_control_is_called_so(page):
    assert "Constructed positive control." in page.words
    assert "never evidence" in page.words
    assert page.words.count("shapes-detail (constructed positive control)") == 3
    assert "shapes (constructed" not in page.words


@pytest.mark.parametrize(
    ("name", "notes", "expected"),
    [
        ("shapes-detail", "", True),
        ("mine", "This is a constructed model.", True),
        ("mine", "It serves as a positive control.", True),
        ("shapes", "Trained; nothing planted.", False),
    ],
)
def test_who_is_constructed(name, notes, expected):
    assert words.is_constructed(name, notes) is expected


def test_a_caller_can_say_that_a_model_is_not_constructed(tmp_path):
    result = ModelResults("m", notes="Compared with a positive control.", constructed=False)
    assert "Constructed" not in write_report(tmp_path / "r.html", result).read_text(encoding="utf-8")


def test_findings_are_in_plain_words_with_their_intervals(page, results):
    assert "Zeroing removes detail & nothing else." in page.words
    assert "Channel 5 is massive at the output of blocks 1 to 2: 1000 times the median activation" in page.words
    assert "No channel is massive." in page.words
    assert "timestep 0.70 alone, 0.75 in total" in page.words
    assert "Constant, whatever the inputs: channel 5 at block 2." in page.words
    row = results.metrics.sel(condition="zeroed")
    distance = f"detail distance 0 → {words.number(float(row.detail_distance), 2)}"
    assert distance in page.words
    assert "random (control): no difference from plain that is both visible and certain." in page.words


def test_table_has_values_intervals_differences_and_p(page, results):
    row = results.metrics.sel(condition="zeroed")
    accuracy = row.sel(factor="texture")
    for value in (row.high_band_power, row.high_band_power_low, accuracy.accuracy, accuracy.accuracy_high):
        assert words.number(float(value)) in page.words
    assert f"Δ {words.number(float(row.high_band_power_difference), 2)}" in page.words
    assert f"p = {float(accuracy.accuracy_p):.2g}" in page.words
    assert "n = 12 is under 200" in page.words
    assert "12 pictures in each condition" in page.words
    assert "High-band power is not detail" in page.words


def test_provenance_holds_settings_model_and_versions(page):
    for text in ("madit demo --out 'x'", "nested.ratio", "criterion.coverage", figure_data.MODEL.config_hash, "numpy"):
        assert text in page.words


def test_the_page_is_the_same_for_the_same_data(results, tmp_path):
    few = ModelResults("m", channels=results.channels, effects=results.effects)
    texts = [write_report(tmp_path / f"{i}.html", few).read_text(encoding="utf-8") for i in range(2)]
    cleaned = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", t) for t in texts]
    assert cleaned[0] == cleaned[1]


def test_a_run_alone_gives_a_page_with_what_it_allows(tmp_path):
    run = figure_data.run(raw=False)
    page = Page(report(run, out=tmp_path / "r.html", notes="Seen by nobody.").read_text(encoding="utf-8"))
    assert "Channel 5 is massive at the output of blocks 1 to 2" in page.words
    assert "Seen by nobody." in page.words
    assert "Constructed positive control." in page.words  # by the name that the store holds
    assert "metrics" not in page.ids
    assert "attribution" not in page.ids
    assert len([i for i in page.ids if i.startswith("figure-")]) == 5
    assert run["/statistics/img"].quantile.values.tolist() == list(QUANTILE_LEVELS)


def test_only_a_run_is_taken(tmp_path):
    factorial = figure_data.run()
    factorial.attrs["kind"] = "factorial"
    with pytest.raises(StoreError, match="expected a run store, got a factorial store"):
        report(factorial, out=tmp_path / "r.html")
    with pytest.raises(ConfigError, match="at least one ModelResults"):
        write_report(tmp_path / "r.html")


def test_channels_asked_for_by_top_k_are_not_called_massive():
    entries = [{"block": 1, "channel": 3, "ratio": 12.0, "persistence": 0.0}]
    asked = ChannelSet(n_blocks=2, width=8, entries=entries, criterion={"ratio": 100.0, "top_k": 1})
    passed = asked.replace(criterion={"ratio": 100.0, "top_k": None})
    (line,) = words.channels_in_words(asked)
    assert "Channel 3 is the largest, not tested for being massive" in line
    assert "samples" not in line
    assert words.channels_in_words(passed)[0].startswith("Channel 3 is massive")
