"""Model cards: what they say, and that the Hub's library reads it back."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import COMMIT, Make, cached, stored
from huggingface_hub import ModelCard
from transformers import PretrainedConfig

import bakllama
import main
from merging.models.checkpoints import Checkpoint
from merging.recipes.methods import LINEAR
from merging.recipes.numbers import Schedule
from merging.recipes.recipe import Recipe, Slice, Source
from merging.runs import cards


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
    cached(make("llama", 1), cache, "org/one", card=front.format("one"))
    cached(make("llama", 2), cache, "org/two", card=front.format("two"))
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


def test_no_card_if_none_is_wanted(make: Make, tmp_path: Path) -> None:
    arguments = ["--base-model", str(make("llama")), "--merge", str(make("llama", 1))]
    assert main.main([str(tmp_path / "one"), *arguments, "--no-model-card"]) == 0
    assert stored(tmp_path / "one") and not (tmp_path / "one" / "README.md").exists()


def test_a_card_that_cannot_be_made_is_a_defect_known_before_writing(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("no card today")

    monkeypatch.setattr(cards, "model_card", fail)
    arguments = ["--base-model", str(make("llama")), "--merge", str(make("llama", 1))]
    with pytest.raises(RuntimeError, match="no card today"):
        main.main([str(output), *arguments])
    assert not output.parent.exists()


def card_of(folders: Sequence[Path], title: str = "title", **to: Any) -> str:
    """Return the card of an average of models in these folders."""
    inputs = [Checkpoint(str(folder), folder, PretrainedConfig(), {}) for folder in folders]
    once = {"weight": Schedule((1.0,))}
    sources = tuple(Source(checkpoint.name, once) for checkpoint in inputs)
    recipe = Recipe(LINEAR, (Slice(sources),), values={"normalize": True})
    return cards.model_card(title, inputs, recipe, [], to.get("made_by", {}))


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
    card = card_of([tmp_path / str(number) for number in range(len(fronts))])
    found = yaml.safe_load(card.split("---\n")[1])
    assert found == agreed | {"library_name": "transformers", "tags": ["merge", "linear"]}


def test_names_cannot_break_a_card() -> None:
    text = card_of([Path("a`b\n# c")], title="a`b\n# c", made_by={"yaml": "```\nx"})
    assert "\n# `` a`b # c ``\n" in text
    assert "\n- `` a`b # c ``, a local directory\n" in text
    assert "\n````yaml\n```\nx\n````\n" in text
