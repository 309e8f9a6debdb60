"""Where reports are written, what their pages hold, and what stays if a run fails."""

import html.parser
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import Make, contents, fails, ties_command, visible

import main
from merging.runs import reporting, writing

PAGE_TAGS = {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
VOID = {"meta", "br", "use"}


class Page(html.parser.HTMLParser):
    """A page's tags, text and addresses; fails if tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        named = ("href", "src", "xlink:href", "srcset", "action")
        self.addresses += [str(value) for name, value in attrs if name in named]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._open[-1:] == ["td"]:
            self.cells.append(data)


def reported(inputs: list[str], folder: Path, *options: str, ending: str = "html") -> str:
    """Merge with a report, and return it."""
    file = folder / f"report.{ending}"
    arguments = ties_command(folder / "out" / "model", inputs, "--report", str(file), *options)
    assert main.main(arguments) == 0
    return file.read_text(encoding="utf-8")


def test_a_page_needs_nothing_else(inputs: list[str], tmp_path: Path) -> None:
    text = reported(inputs, tmp_path)
    page = Page(text)
    assert not PAGE_TAGS & {*page.tags}
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in text and "url(http" not in text
    assert page.tags.count("svg") == 6 and page.tags.count("h2") == 8
    words = " ".join(page.words)
    for word in ("attention", "experts", "model.layers.", "a and b", "density"):
        assert word in words
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "nan" not in text.lower().replace("nanometre", "")


def test_without_matplotlib_there_are_tables_and_a_line(
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = Page(reported(inputs, tmp_path))
    assert "svg" in page.tags and "details" in page.tags
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "bare.html"
    arguments = ties_command(tmp_path / "bare", inputs, "--report", str(file))
    arguments = [word for word in arguments if word not in ("--quiet", "--no-model-card")]
    capsys.readouterr()
    assert main.main(arguments) == 0
    assert "note: pictures need matplotlib: pip install matplotlib" in capsys.readouterr().err
    bare = Page(file.read_text(encoding="utf-8"))
    assert "svg" not in bare.tags and "details" not in bare.tags
    assert "pictures need matplotlib: pip install matplotlib" in bare.words
    assert bare.cells == page.cells and len(page.cells) > 300
    assert not (tmp_path / "bare" / "merge.svg").exists()
    assert "merge.svg" not in (tmp_path / "bare" / "README.md").read_text()


def test_a_card_has_a_picture_that_an_overwrite_replaces(inputs: list[str], output: Path) -> None:
    report = output.parent.parent / "report.html"
    arguments = [str(output), "--base-model", inputs[0], "--merge", inputs[1]]
    assert main.main([*arguments, "--report", str(report)]) == 0
    assert "](merge.svg)" in (output / "README.md").read_text()
    picture = (output / "merge.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "prefers-color-scheme: dark" in picture
    assert Page(picture).tags.count("svg") == 1
    assert main.main([*arguments, "--overwrite", "--no-model-card", "--report", str(report)]) == 0
    assert not (output / "merge.svg").exists() and not (output / "README.md").exists()
    assert main.main([*arguments, "--overwrite"]) == 0
    assert "merge.svg" not in (output / "README.md").read_text()


def test_a_dry_run_writes_nothing_but_the_report(
    inputs: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reports").mkdir()
    whole = json.loads(reported(inputs, tmp_path, ending="json"))
    files = [tmp_path / "reports" / name for name in ("a.html", "a.JSON")]
    options = [word for file in files for word in ("--report", str(file))]
    output = tmp_path / "none" / "model"
    capfd.readouterr()
    assert main.main(ties_command(output, inputs, "--dry-run", *options)) == 0
    assert visible(tmp_path / "reports") == ["a.JSON", "a.html"]
    assert not output.parent.exists()
    assert json.loads(files[1].read_text(encoding="utf-8")) == whole
    found = capfd.readouterr()
    assert found.out == "" and f"report: {files[0]}\n" in found.err


def test_names_cannot_break_a_page(make: Make, tmp_path: Path) -> None:
    odd = tmp_path / "<script>alert(1)</script>&$x$"
    odd.parent.mkdir(exist_ok=True)
    odd.mkdir(parents=True)
    for file in make("llama", 1).iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "report.html"
    arguments = ["--base-model", str(make("llama", 2)), "--merge", str(odd), "--report", str(file)]
    assert main.main([str(tmp_path / "out"), *arguments, "--dry-run"]) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert any("script>&$x$ changes the base" in word for word in page.words)


def test_numbers_in_a_picture_are_whole(make: Make, tmp_path: Path) -> None:
    """Of names too: it is coordinates that are rounded, and placeholders that are coloured."""
    names = ["lr-0.0001", "lr-0.0005", "colour #010203"]
    for seed, name in enumerate(names):
        shutil.copytree(make("llama", seed), tmp_path / name)
    file = tmp_path / "report.html"
    merges = [word for name in names for word in ("--merge", str(tmp_path / name))]
    options = ["--method", "linear", "--weight", "1", "--report", str(file), "--dry-run"]
    assert main.main([str(tmp_path / "out"), *merges, *options]) == 0
    pictures = re.findall("<svg.*?</svg>", file.read_text(encoding="utf-8"), re.DOTALL)
    words = [word for svg in pictures for word in re.findall(r"<text[^>]*>([^<]*)", svg)]
    assert {*names, f"{names[0]} and {names[1]}"} <= {*words}
    assert any(re.fullmatch(r"-?[01]\.\d{4}", word) for word in words)  # beside the colours
    assert re.findall(r'd="[^"]*\.\d{3}', "".join(pictures)) == []


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "name, message",
    [
        ("report.txt", "expected a name that ends in .html or .json"),
        ("none/report.html", "none is no directory"),
        ("folder.html", "no report of a merge"),
        ("other.json", "no report of a merge"),
        ("inputs/a/report.html", "lies in a model; name a file elsewhere"),
        ("out/model/report.html", "is no directory"),
        ("out/model.html", "is to be a folder of the output"),
        ("x" * 300 + ".html", "the path is too long"),
        ("x" * 245 + ".html", "the name is too long by 4 bytes"),
        ("blocked.html", ".blocked.html.partial is in the way"),
        ("a\0.html", "null byte"),
    ],
)
def test_places_where_no_report_can_be(
    name: str, message: str, inputs: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = output.parent.parent
    (folder / "folder.html").mkdir()
    (folder / "other.json").write_text("{}")
    (folder / ".blocked.html.partial").mkdir()
    if name == "out/model.html":
        name, output = "model.html", folder / "model.html" / "model"
    arguments = ties_command(output, inputs, "--report", f"{folder}/{name}", "--overwrite")
    found = fails(capsys, *arguments)
    assert "error: --report " in found and message in found
    assert not output.parent.exists()


def test_a_report_is_replaced_only_by_overwrite(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported(inputs, tmp_path)
    again = ties_command(tmp_path / "other", inputs, "--report", str(tmp_path / "report.html"))
    assert "exists; name another file, or use --overwrite" in fails(capsys, *again)
    assert main.main([*again, "--overwrite"]) == 0
    twice = [*again, "--overwrite", "--report", f"{tmp_path}/inputs/../report.html"]
    assert "given twice; name another file" in fails(capsys, *twice)


def test_a_link_at_the_hidden_name_is_not_followed(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / ".report.html.partial").symlink_to(tmp_path / "kept.txt")
    assert reported(inputs, tmp_path).startswith("<!DOCTYPE html>")
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert not (tmp_path / "report.html").is_symlink()
    assert visible(tmp_path) == ["inputs", "kept.txt", "out", "report.html"]


def test_a_failed_run_leaves_no_report(
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "some/file")

    folder = output.parent.parent
    before = visible(folder)
    arguments = ties_command(output, inputs, "--report", str(folder / "report.json"))
    with monkeypatch.context() as patch:
        patch.setattr(writing, "verify", full)
        assert "No space left" in fails(capsys, *arguments)
    assert visible(folder) == before


def test_a_report_that_loses_its_place_is_a_warning(
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is there, whole: what goes wrong after that is no error."""
    report = output.parent.parent / "report.json"
    verify = writing.verify

    def taken(*arguments: object) -> None:
        verify(*arguments)  # type: ignore[arg-type]
        report.mkdir()

    monkeypatch.setattr(writing, "verify", taken)
    arguments = ties_command(output, inputs, "--report", str(report))
    assert "--quiet" in arguments  # which silences no warning
    assert main.main(arguments) == 0
    assert "warning: no report: " in capsys.readouterr().err
    assert "config.json" in contents(output)
    os.rmdir(report)


@pytest.mark.parametrize("removable", [True, False])
def test_a_report_that_cannot_be_written_does_not_cost_the_model(
    removable: bool,
    inputs: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another report is written all the same; where there is no model, it is an error."""
    folder = output.parent.parent
    lost, kept = folder / "lost.html", folder / "kept.json"

    def content(report: object, file: Path) -> bytes:
        if file == lost:
            raise OSError(28, "No space left on device", str(file))
        return b"{}"

    unlink = Path.unlink

    def removed(path: Path, missing_ok: bool = False) -> None:
        if lost.name in path.name and not removable:
            raise OSError(28, "No space left on device", str(lost))
        unlink(path, missing_ok)

    monkeypatch.setattr(reporting, "content_of", content)
    monkeypatch.setattr(Path, "unlink", removed)
    before = visible(folder)
    arguments = ties_command(output, inputs, "--report", str(lost), "--report", str(kept))
    assert "No space left" in fails(capsys, *arguments, "--dry-run")
    assert visible(folder) == before
    assert main.main(arguments) == 0
    said = capsys.readouterr().err
    assert f"warning: no report: {lost}: No space left on device" in said
    assert "config.json" in contents(output)
    assert kept.read_bytes() == b"{}"
    assert {path.name for path in folder.iterdir()} >= {kept.name}
    assert not [path for path in folder.iterdir() if lost.name in path.name]
    kept.unlink()


def test_every_key_of_the_json_is_explained(inputs: list[str], tmp_path: Path) -> None:
    report = json.loads(reported(inputs, tmp_path, ending="json"))
    page = (Path(main.__file__).parent / "examples" / "report.md").read_text(encoding="utf-8")
    explained = {*re.findall("`([a-z_]+)`", page)}
    entries = [report["total"], report["layers"][0], report["cells"][0], report["tensors"][0]]
    assert {*report, *(key for entry in entries for key in entry)} <= explained
