"""Find and open the models of a recipe, cheap checks first, all problems together."""

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merging.models.folders import fetch_weights, find_adapter, find_model
from merging.problems import collecting, refuse
from merging.recipes.model_names import is_local, split_adapter

if TYPE_CHECKING:  # torch and transformers take seconds to load; a mistyped path does not wait
    from merging.models.checkpoints import Checkpoint


class Found(NamedTuple):
    """The folders of a model and of its adapter, if it has one."""

    folder: Path
    adapter: Path | None


def find_models(
    names: Sequence[str], cache_dir: str | None, problems: list[str]
) -> dict[str, Found]:
    """Return the folders of models by name; add to the problems what speaks against them.

    Nothing is downloaded for options that cannot work, of which there are problems already.
    """
    usable = not problems
    found = {}
    for name in names:
        base, adapter = split_adapter(name)
        if not (usable or (is_local(base) and is_local(adapter or base))):
            continue
        folder = folder_of_adapter = None
        with collecting(problems):
            folder = find_model(base, cache_dir)
        if adapter is not None:
            with collecting(problems):
                folder_of_adapter = find_adapter(adapter, cache_dir)
        if folder is not None and (adapter is None or folder_of_adapter is not None):
            found[name] = Found(folder, folder_of_adapter)
    return found


def open_models(
    found: Mapping[str, Found],
    sizes: Sequence[str],
    arguments: argparse.Namespace,
    problems: list[str],
) -> dict[str, "Checkpoint"]:
    """Open models, the donor first.

    `sizes` are the config values in which all must agree; no weights are downloaded if they do not.
    Raises Problems, with those that there are already, if not all can be opened.
    """
    import transformers

    from merging.models.adapters import adapted
    from merging.models.checkpoints import Checkpoint, read_config, size_problems
    from merging.models.layers import depth_problems
    from merging.models.weight_files import read_folder

    if not arguments.verbose:  # their advice is about loading models to run, which nobody does here
        transformers.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    trust, donor = arguments.trust_remote_code, next(iter(found))
    configs = {}
    for name, (folder, _) in found.items():
        with collecting(problems):
            configs[name] = read_config(name, folder, trust)
    if len(configs) < len(found):
        refuse(problems)
    if different := size_problems(configs, donor, sizes):
        refuse(problems + different)
    models = {}
    for name, (folder, adapter) in found.items():
        with collecting(problems):
            fetch_weights(split_adapter(name)[0], folder, arguments.cache_dir)
            model = Checkpoint(name, folder, configs[name], read_folder(name, folder))
            refuse(depth_problems(model))
            models[name] = model if adapter is None else adapted(model, adapter, trust)
    if len(models) < len(found):
        refuse(problems)
    return models
