"""Model cards: what they say, and that the Hub's library reads it back."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Make, stored
from huggingface_hub import ModelCard

import bakllama
import cards
import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(made: Path, cache: Path, repo: str, card: str = "") -> Path:
    """Put a model where the Hub's cache has it, and return its snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    shutil.copytree(made, snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    if card:
        (snapshot / "README.md").write_text(card)
    return snapshot


def metadata(output: Path) -> dict[str, object]:
    """Return the metadata of a card, read by YAML itself and by the Hub's library alike."""
    text = (output / "README.md").read_text(encoding="utf-8")
    plain = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard.load(output / "README.md").data.to_dict() == plain
    assert isinstance(plain, dict)
    return plain


def test_a_card_of_hub_models(
    make: Make, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    front = "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [chat]\n---\n# {}\n"
    cached(make("llama", 1), cache, "org/one", front.format("one"))
    cached(make("llama", 2), cache, "org/two", front.format("two"))
    arguments = [str(output), "--cache-dir", str(cache), "--method", "linear"]
    arguments += ["--merge", "org/one", "--weight", "1,0", "--merge", "org/two", "--weight", "0.5"]
    assert main.main(arguments) == 0
    assert metadata(output) == {
        "base_model": ["org/one", "org/two"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "linear"],
        "license": "apache-2.0",
        "language": ["en", "de"],
    }
    text = (output / "README.md").read_text()
    assert f"`org/one`, revision `{COMMIT}`" in text
    assert shlex.join(["python", "main.py", *arguments]) in text
    assert "arxiv.org/abs/2203.05482" in text
    assert "weight of org/one, all tensors (57): 1 0.8 0.6 0.4 0.2 0\n" in text
    assert "# one" not in text and "chat" not in text  # the donor's own card


@pytest.mark.parametrize(
    "cards_of_inputs, agreed",
    [
        (["license: mit", "license: apache-2.0"], {}),
        (["license: mit", "language: en\nlicense: mit"], {"license": "mit"}),
        (["license: mit", ""], {}),
        (["{broken", "license: mit"], {}),
        (
            ["license: other\nlicense_name: x\nlicense_link: y"] * 2,
            {"license": "other", "license_name": "x", "license_link": "y"},
        ),
        (["license: other\nlicense_name: x", "license: other\nlicense_name: z"], {}),
    ],
)
def test_only_what_all_inputs_say_is_said(
    cards_of_inputs: list[str], agreed: dict[str, str], make: Make, tmp_path: Path, output: Path
) -> None:
    arguments = [str(output), "--method", "linear", "--weight", "1"]
    for seed, front in enumerate(cards_of_inputs):
        folder = tmp_path / f"model{seed}"
        shutil.copytree(make("llama", seed), folder)
        if front:
            (folder / "README.md").write_text(f"---\n{front}\n---\n")
        arguments += ["--merge", str(folder)]
    assert main.main(arguments) == 0
    assert metadata(output) == agreed | {
        "library_name": "transformers",
        "tags": ["merge", "linear"],
    }
    assert "a local directory" in (output / "README.md").read_text()


def test_a_path_into_the_cache_is_a_hub_model(make: Make, tmp_path: Path, output: Path) -> None:
    snapshot = cached(make("llama", 1), tmp_path / "cache", "org/one-model")
    arguments = ["--base-model", str(make("llama")), "--merge", str(snapshot)]
    assert main.main([str(output), *arguments]) == 0
    assert metadata(output)["base_model"] == ["org/one-model"]


def test_a_card_of_a_stack_has_its_yaml(make: Make, tmp_path: Path, output: Path) -> None:
    stack = tmp_path / "stack.yml"
    stack.write_text(f"# mine\nlayer_slices:\n  - {{model: {make('llama')}, start: 0, end: 2}}\n")
    assert bakllama.main([str(stack), str(output)]) == 0
    text = (output / "README.md").read_text()
    assert f"```yaml\n{stack.read_text()}```" in text
    assert "layers 0 to 2, exclusive" in text
    assert metadata(output)["tags"] == ["merge", "layer-stack"]


def test_no_card_if_none_is_wanted_or_can_be_made(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--base-model", str(make("llama")), "--merge", str(make("llama", 1))]
    assert main.main([str(tmp_path / "one"), *arguments, "--no-model-card"]) == 0
    assert not (tmp_path / "one" / "README.md").exists()

    def fail(*_: object) -> str:
        raise RuntimeError("no card today")

    monkeypatch.setattr(cards, "model_card", fail)
    capsys.readouterr()
    assert main.main([str(tmp_path / "two"), *arguments]) == 0
    assert "warning: no model card could be made: no card today" in capsys.readouterr().err
    assert stored(tmp_path / "two") and not (tmp_path / "two" / "README.md").exists()


# -------------------------------------------------------------------- what is printed, and where


def test_the_output_path_alone_is_on_stdout(
    make: Make, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(output), "--base-model", str(make("llama")), "--merge", str(make("llama", 1))]
    assert main.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    for options in ([], ["--quiet", "--overwrite"], ["--verbose", "--overwrite"]):
        assert main.main([*arguments, *options]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{output}\n"
        assert ("model.norm.weight [32] bfloat16: merged, " in printed.err) == (
            "--verbose" in options
        )
        assert bool(printed.err) == ("--quiet" not in options)
    assert main.main(arguments) == 2
    assert capsys.readouterr().out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert "0.1.0 (torch 2.13.0" in capsys.readouterr().out


def test_a_model_whose_path_nobody_reads_is_a_success(make: Make, tmp_path: Path) -> None:
    command = [sys.executable, main.__file__, tmp_path / "out", "--base-model", make("llama")]
    command += ["--merge", make("llama", 1), "--quiet"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert stored(tmp_path / "out")


@pytest.mark.parametrize(
    "fronts, agreed",
    [
        (["language: [no, en]", "language: [en, no]"], {"language": ["no", "en"]}),
        (["language: en", "language: [en]"], {"language": ["en"]}),
        (["license: 5", "license: 5"], {}),
        (['license: "x\\n---\\ny"'] * 2, {}),
        (["license: {a: b}"] * 2, {}),
    ],
)
def test_odd_metadata_is_normalised_or_left_out(
    fronts: list[str], agreed: dict[str, object], tmp_path: Path
) -> None:
    for number, front in enumerate(fronts):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "README.md").write_text(f"---\n{front}\n---\n")
    assert cards._agreed([tmp_path / str(number) for number in range(len(fronts))]) == agreed


def test_names_cannot_break_a_card() -> None:
    assert cards._code("a`b\n# c") == "`` a`b # c ``"
    assert cards._fenced("```\nx", "yaml") == "````yaml\n```\nx\n````"
