"""Every command and YAML file in the documentation runs, on small stand-ins for its models."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import Make, loads_clean, make_adapter

import bakllama
import main

ROOT = Path(main.__file__).parent
PAGES = ["README.md", "examples/recipes.md", "examples/merge.sh"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = re.compile(r"(?:--base-model|--merge|model:|_source:)\s+([\w.-]+/[\w.-]+)")
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yml"))


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".sh"):
        return [text]
    return [code for language, code in BLOCK.findall(text) if language in languages]


def commands() -> list[tuple[str, str]]:
    """Return the pages' commands of the two scripts, without what stands before or after them."""
    found = []
    for page in PAGES:
        for code in blocks(page, "", "sh"):
            lines = code.replace("\\\n", " ").splitlines()
            parts = [part.strip() for line in lines for part in line.split("&&")]
            found += [
                (page, part) for part in parts if part.startswith("python ") and ".py " in part
            ]
    return [(page, c) for page, c in found if c.split()[1] in ("main.py", "bakllama.py")]


def test_there_are_commands() -> None:
    assert len(commands()) >= 12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page, command", commands())
def test_commands_run(
    page: str, command: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    _, script, *arguments = shlex.split(command, comments=True)
    if not torch.cuda.is_available():
        arguments = [a for a in arguments if a != "--cuda"]
    texts = [command]
    if script == "bakllama.py":
        (stack,) = (text for text in blocks(page, "yaml") if "layer_slices:" in text)
        Path(arguments[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments[0]).write_text(stack)
        texts.append(stack)
    if "--recipe" in arguments:
        (recipe,) = (text for text in blocks(page, "yaml") if "merge_method:" in text)
        file = Path(arguments[arguments.index("--recipe") + 1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe if file.suffix == ".yml" else f"# A card\n\n```yaml\n{recipe}```\n")
        texts.append(recipe)
    depth = 32 if script == "bakllama.py" or "--recipe" in arguments else 6
    models = {m for m in MODEL.findall(" ".join(texts)) if not m.startswith("examples/")}
    for seed, model in enumerate(sorted(models)):
        Path(model).parent.mkdir(exist_ok=True)
        Path(model).symlink_to(make("llama", seed, num_hidden_layers=depth))
    for adapter in re.findall(r"\+((?:you|org)/\S+)", " ".join(texts)):
        make_adapter(make("llama", 0, num_hidden_layers=depth), tmp_path / "made" / adapter)
        Path(adapter).parent.mkdir(exist_ok=True)
        Path(adapter).symlink_to(tmp_path / "made" / adapter / "adapter")
    assert {"main.py": main.main, "bakllama.py": bakllama.main}[script](arguments) == 0
    output = arguments[1] if script == "bakllama.py" else arguments[0]
    loads_clean(Path(output))


def test_the_stack_of_the_examples_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert bakllama.main(["examples/stack.yml", str(tmp_path / "stacked")]) == 0
    assert loads_clean(tmp_path / "stacked").config.num_hidden_layers == 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_examples_run(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert main.main([str(tmp_path / "out"), "--recipe", str(recipe)]) == 0
    depth = {"up-scaling": 5, "slices-of-merges": 4}.get(recipe.stem, 3)
    assert loads_clean(tmp_path / "out").config.num_hidden_layers == depth
    comment = recipe.read_text().split("\nslices:")[0].split("\nmodels:")[0]
    assert comment.count(".") == 2 and comment.startswith("# ") and comment.endswith(".")


def test_the_readme_counts_the_recipes() -> None:
    assert len(RECIPES) == 7
    assert "Seven recipes that run" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_messages_that_the_readme_explains_exist() -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("merging/**/*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    source = re.sub(r'"\n\s*f?"', "", source)  # parts of one string
    table = (ROOT / "README.md").read_text().split("## When something is refused")[1].split("##")[0]
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        assert all(part in source for part in message.split("…")), message
