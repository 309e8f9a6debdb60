"""How the house is built: which room imports which, and that a method's row fits its function."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import main
import merge_methods
from merging.recipes.declarations import OPTIONAL, ORIGIN, Method
from merging.recipes.methods import METHODS, PASSTHROUGH

ROOT = Path(main.__file__).parent
# A room imports from those before it, and from itself.
ORDER = ["problems", "arithmetic", "recipes", "models", "plans", "runs"]
ROOMS = sorted((ROOT / "merging").rglob("*.py"))
FAMILIES = ("weighted_sums", "task_vectors", "fusions")
SCRIPTS = ("main", "bakllama", "merge_methods", *FAMILIES)
PRODUCT = [*ROOMS, *(ROOT / f"{name}.py" for name in SCRIPTS)]


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Yield what a file imports, anywhere in it: (module, name), the name empty for a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def rooms_of(file: Path) -> set[str]:
    """Return the rooms that a file imports from."""
    modules = [f"{m}.{n}" if m == "merging" else m for m, n in imported(file)]
    return {m.split(".")[1] for m in modules if m.startswith("merging.")}


def label(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_every_module_is_in_a_room() -> None:
    found = {file.relative_to(ROOT / "merging").parts[0].removesuffix(".py") for file in ROOMS}
    assert found == {"__init__", *ORDER}


@pytest.mark.parametrize("file", ROOMS, ids=label)
def test_rooms_import_from_those_before_them(file: Path) -> None:
    own = file.relative_to(ROOT / "merging").parts[0].removesuffix(".py")
    allowed = set(ORDER[: ORDER.index(own) + 1]) if own in ORDER else set()
    assert rooms_of(file) <= allowed
    scripts = {module for module, _ in imported(file)} & {"main", "bakllama"}
    assert not scripts


def test_the_methods_stand_on_the_arithmetic_alone() -> None:
    for name in ("merge_methods", *FAMILIES):
        assert rooms_of(ROOT / f"{name}.py") == {"arithmetic"}
        assert not {m for m, _ in imported(ROOT / f"{name}.py")} & {"main", "bakllama"}


def test_only_scripts_and_runs_import_the_methods() -> None:
    users = {label(f) for f in PRODUCT if any(m == "merge_methods" for m, _ in imported(f))}
    assert users
    assert all(user.startswith("merging/runs/") or "/" not in user for user in users)


@pytest.mark.parametrize("file", PRODUCT, ids=label)
def test_private_names_stay_in_their_module(file: Path) -> None:
    ours = ("merging", "merge_methods", *FAMILIES)
    names = [name for module, name in imported(file) if module.split(".")[0] in ours]
    assert not [name for name in names if name.startswith("_")]


def test_tests_import_from_helpers_and_not_from_each_other() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        modules = {module for module, _ in imported(file)}
        assert not [m for m in modules if m.startswith("test_") or m == "conftest"], file.name


# -------------------------------------------------------------------- rows of methods


@pytest.mark.parametrize("row", [*METHODS.values(), PASSTHROUGH], ids=lambda row: row.name)
def test_a_row_fits_its_function(row: Method) -> None:
    parameters = inspect.signature(getattr(merge_methods, row.name)).parameters
    expected = {"tensors", "dtype", "device", *(p.argument for p in row.parameters if p.argument)}
    expected |= {"base"} if row.base in (ORIGIN, OPTIONAL) else set()
    found_later = {"thresholds"} if row.name == "ties" else set()
    assert parameters.keys() == expected | found_later
    for name in ("dtype", "device"):
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
    for parameter in row.parameters:
        if parameter.argument and not parameter.per_model and not parameter.is_seed:
            default = parameters[parameter.argument].default  # the row's, if the function has one
            required = default is inspect.Parameter.empty
            assert (
                required if parameter.default is None else required or default == parameter.default
            )


def test_rows_are_found_by_their_names() -> None:
    assert all(row.name == name for name, row in METHODS.items())
    assert PASSTHROUGH.name not in METHODS


def test_the_readme_has_no_other_rows() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| `--method` |")[1].split("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == [*METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_has_the_row(name: str) -> None:
    row = METHODS[name]
    default = " (default)" if name == "ties" else ""
    numbers = f"{row.needs}; {row.takes}" if row.takes else row.needs
    line = f"| `{name}`{default} | {numbers} | {row.equation} | [{row.paper}]({row.link}) |"
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert line.count("|") == 5  # one more would be another column
    assert line in lines
    assert f"- **`{name}`** for {row.when}." in lines
