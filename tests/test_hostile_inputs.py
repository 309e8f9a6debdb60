"""What a hostile disk, shell or model can do: a run is told the truth about, and stays bounded.

Each run is a process with limits on its time, memory and files. Whatever is wrong with an input
ends with exit status 2, one short message that names the culprit, and nothing left behind.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from contained import ROOT, Contained, Outcome, at_staging, listing
from helpers import Make, contents, loads_clean, stored
from safetensors.torch import save_file

import main

if not sys.platform.startswith("linux"):
    pytest.skip("needs fork, limits and /proc of Linux", allow_module_level=True)

NOBODY = 65534
MEMORY = 1_500_000_000  # bytes that a run of tiny models may take, libraries included
MANY = "9" * 400
# A fault changes a folder that holds the models good, other (two Llamas), gpt2, broken (a third
# Llama, to be damaged) and lora (an adapter). It may return arguments; COMMAND is the default.
Fault = Callable[[Path], list[str] | None]
COMMAND = "out --base-model good --merge broken --merge other".split()
ALONE = "out --method linear --weight 1 --merge broken".split()
ADAPTED = "out --method linear --weight 1 --merge good+lora".split()
STACK = "layer_slices: [{model: good, start: 0, end: 2}]"
EMBEDDING, LAYER = "model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


@pytest.fixture(scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contained]:
    home = tmp_path_factory.mktemp("home")
    with Contained({"HF_HOME": str(home / "hub"), "HOME": str(home)}) as processes:
        yield processes


def lay_out(folder: Path, make: Make) -> None:
    for name, source in (
        ("good", make("llama", 0)),
        ("other", make("llama", 1)),
        ("broken", make("llama", 2)),
        ("gpt2", make("gpt2", 0)),
    ):
        shutil.copytree(source, folder / name)
    (folder / "lora").mkdir()
    write_adapter(folder, factors(range(6), "q_proj"))


@pytest.fixture
def root(make: Make, tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    lay_out(folder, make)
    return folder


@pytest.fixture
def open_root(make: Make) -> Iterator[Path]:
    """Give a folder like `root` to work in for a user who is not the administrator."""
    needed = [ROOT, *ROOT.parents, *Path(sys.prefix).parents]
    if plain_user() is not None and not all(path.stat().st_mode & 0o001 for path in needed):
        pytest.skip("another user cannot read the libraries here")
    outer = Path(tempfile.mkdtemp())
    outer.chmod(0o755)
    folder = outer / "work"
    folder.mkdir()
    lay_out(folder, make)
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    yield folder
    for path in outer.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(outer)


def plain_user() -> int | None:
    return NOBODY if os.geteuid() == 0 else None


# -------------------------------------------------------------------- checks


def message(outcome: Outcome) -> str:
    """Return a refused run's message, and check that it can be read: short, and plain text."""
    assert outcome.status == 2, outcome
    assert not outcome.traceback, outcome
    assert outcome.out == ""
    _, found, text = outcome.err.rpartition("error: ")
    assert found, outcome
    assert len(outcome.err.splitlines()) <= 50, outcome
    assert len(outcome.err) <= 6000, outcome
    odd = {c for c in outcome.err if not c.isprintable() and c != "\n"}
    assert not odd, (odd, outcome)
    return text


def bounded(outcome: Outcome) -> None:
    assert not outcome.timed_out, outcome
    assert outcome.signal is None, outcome
    assert not outcome.traceback, outcome
    assert outcome.peak < MEMORY, outcome


def unchanged(root: Path, before: dict[str, tuple[int, int, int]]) -> None:
    after = listing(root)
    assert after.keys() - before.keys() == set()
    assert after == before


# -------------------------------------------------------------------- faults


def config(**changes: Any) -> Fault:
    def fault(root: Path) -> list[str]:
        file = root / "broken" / "config.json"
        text = json.dumps(json.loads(file.read_text()) | changes)
        file.write_text(text.replace('"MANY"', MANY))
        return ALONE

    return fault


def gpt2_config(**changes: Any) -> Fault:
    def fault(root: Path) -> list[str]:
        file = root / "gpt2" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return "out --method linear --weight 1 --merge gpt2".split()

    return fault


def written(name: str, content: bytes | str, *arguments: str) -> Fault:
    def fault(root: Path) -> list[str] | None:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(arguments) or None

    return fault


def sparse(name: str, *arguments: str, size: int = 20_000_000_000) -> Fault:
    """Make a file of 20 GB that takes no disk."""

    def fault(root: Path) -> list[str] | None:
        (root / name).parent.mkdir(exist_ok=True)
        with open(root / name, "wb") as file:
            file.truncate(size)
        return list(arguments) or None

    return fault


def fifo(name: str, *arguments: str) -> Fault:
    def fault(root: Path) -> list[str] | None:
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)
        return list(arguments) or None

    return fault


def link(name: str, target: str, *arguments: str) -> Fault:
    def fault(root: Path) -> list[str] | None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)
        return list(arguments) or None

    return fault


def options(text: str) -> Fault:
    return lambda root: text.split()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def fault(root: Path) -> None:
        values = stored(root / "broken")
        change(values)
        save_file(values, root / "broken" / "model.safetensors", metadata={"format": "pt"})

    return fault


def header(change: Callable[[dict[str, Any]], object]) -> Fault:
    """Change the header of the weights and leave their bytes."""

    def fault(root: Path) -> None:
        file = root / "broken" / "model.safetensors"
        content = file.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        parsed = json.loads(content[8 : 8 + size])
        change(parsed)
        encoded = json.dumps(parsed).encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])

    return fault


def factors(layers: Any, module: str, width: int = 32, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        LORA.format(layer, module, half): torch.full(shape, 0.1)
        for layer in layers
        for half, shape in (("A", (rank, width)), ("B", (width, rank)))
    }


def write_adapter(root: Path, values: dict[str, torch.Tensor], **settings: Any) -> None:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    text = json.dumps(plain | settings).replace('"MANY"', MANY)
    (root / "lora" / "adapter_config.json").write_text(text)
    save_file(values, root / "lora" / "adapter_model.safetensors")


def adapter(values: dict[str, torch.Tensor] | None = None, **settings: Any) -> Fault:
    def fault(root: Path) -> list[str]:
        write_adapter(root, values or factors(range(6), "q_proj"), **settings)
        return ADAPTED

    return fault


def pickled(change: Callable[[str, bytes], tuple[bytes, int] | None]) -> Fault:
    """Store the weights as .bin, with records changed in content or compression, or dropped."""

    def fault(root: Path) -> list[str]:
        broken = root / "broken"
        torch.save(stored(broken), root / "whole.bin")
        (broken / "model.safetensors").unlink()
        with (
            zipfile.ZipFile(root / "whole.bin") as whole,
            zipfile.ZipFile(broken / "pytorch_model.bin", "w") as changed,
        ):
            for info in whole.infolist():
                record = change(info.filename, whole.read(info))
                if record is not None:
                    changed.writestr(info.filename, record[0], compress_type=record[1])
        (root / "whole.bin").unlink()
        return ALONE

    return fault


def record(ending: str, change: Callable[[bytes], bytes]) -> Fault:
    """Change the records whose names end so."""

    def changed(name: str, content: bytes) -> tuple[bytes, int]:
        return (change(content) if name.endswith(ending) else content), zipfile.ZIP_STORED

    return pickled(changed)


def values(change: Callable[[bytes], bytes]) -> Fault:
    """Change the records that hold tensors."""

    def changed(name: str, content: bytes) -> tuple[bytes, int]:
        return (change(content) if "/data/" in name else content), zipfile.ZIP_STORED

    return pickled(changed)


def in_order(*faults: Fault) -> Fault:
    def fault(root: Path) -> list[str] | None:
        found = [each(root) for each in faults]
        return found[-1]

    return fault


BRACKETS = "[" * 100_000
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a" * 16 + "\nsize 13700\n"


class Case(NamedTuple):
    """A fault, what the message must name, and whether the run may also end well without it."""

    fault: Fault
    named: tuple[str, ...]
    may_succeed: bool = False


def case(fault: Fault, *named: str, may_succeed: bool = False) -> Case:
    return Case(fault, named, may_succeed)


CASES: dict[str, Case] = {
    # pickles
    "pickle without data.pkl": case(
        pickled(
            lambda name, content: None if name.endswith(".pkl") else (content, zipfile.ZIP_STORED)
        ),
        "pytorch_model.bin",
    ),
    "pickle with an empty data.pkl": case(
        record("data.pkl", lambda content: b""), "pytorch_model.bin"
    ),
    "pickle with a cut data.pkl": case(
        record("data.pkl", lambda content: content[: len(content) // 2]), "pytorch_model.bin"
    ),
    "pickle with one byte of data.pkl": case(
        record("data.pkl", lambda content: content[:1]), "pytorch_model.bin"
    ),
    "pickle with short records": case(
        values(lambda content: content[: len(content) // 2]), "pytorch_model.bin"
    ),
    "pickle with empty records": case(values(lambda content: b""), "pytorch_model.bin"),
    "pickle with compressed records": case(
        pickled(lambda name, content: (content, zipfile.ZIP_DEFLATED)), "pytorch_model.bin"
    ),
    "pickle cut short": case(
        lambda root: (
            record("data.pkl", bytes)(root)
            and (root / "broken" / "pytorch_model.bin").write_bytes(
                (root / "broken" / "pytorch_model.bin").read_bytes()[:50_000]
            )
            and ALONE
        ),
        "pytorch_model.bin",
    ),
    # configs that ask for much
    "100,000 layers": case(config(num_hidden_layers=100_000), "broken"),
    "10^9 layers": case(config(num_hidden_layers=10**9), "broken"),
    "100,000 layers of GPT-2": case(gpt2_config(n_layer=100_000), "gpt2"),
    "10^9 labels": case(config(num_labels=10**9), "broken", may_succeed=True),
    "10^9 labels of a classifier": case(
        config(num_labels=10**9, architectures=["LlamaForSequenceClassification"]), "broken"
    ),
    "10^9 positions": case(gpt2_config(n_positions=10**9), "gpt2"),
    "10^9 positions of Llama": case(
        config(max_position_embeddings=10**9), "broken", may_succeed=True
    ),
    "10^12 tokens": case(config(vocab_size=10**12), "broken"),
    "2^64 tokens": case(config(vocab_size=2**64), "broken"),
    "10^9 wide": case(config(hidden_size=10**9), "broken"),
    "10^18 wide": case(config(intermediate_size=10**18), "broken"),
    "negative width": case(config(intermediate_size=-3), "broken"),
    "10^9 heads": case(config(num_attention_heads=10**9), "broken"),
    "a width beyond float": case(config(hidden_size="MANY"), "broken"),
    "an epsilon beyond float": case(config(rms_norm_eps="MANY"), "broken"),
    "10^9 layer types": case(
        config(layer_types=["full_attention"] * 1_000_000), "broken", may_succeed=True
    ),
    **{
        f"config with {key}": case(config(**{key: "x"}), "broken", may_succeed=harmless)
        for key, harmless in (
            ("save_pretrained", False),
            ("to_dict", False),
            ("from_dict", True),
            ("get_text_config", False),
            ("to_diff_dict", False),
        )
    },
    "config with __class__": case(config(__class__="x"), "broken", may_succeed=True),
    "config with a dtype of nothing": case(config(dtype="float99"), "broken", may_succeed=True),
    "config with a null list": case(config(architectures=[None]), "broken"),
    # JSON and YAML
    "index of brackets": case(
        in_order(
            lambda root: (root / "broken" / "model.safetensors").unlink(),
            written("broken/model.safetensors.index.json", BRACKETS),
        ),
        "broken",
        "index.json",
    ),
    "config of brackets": case(written("broken/config.json", BRACKETS), "broken", "config.json"),
    "config nested deep": case(
        written("broken/config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "broken"
    ),
    "tokenizer config of brackets": case(
        written("broken/tokenizer_config.json", BRACKETS, *ALONE), "broken", may_succeed=True
    ),
    "tokenizer of brackets": case(
        written("broken/tokenizer.json", BRACKETS), "broken", "tokenizer"
    ),
    "generation config of brackets": case(
        written("broken/generation_config.json", BRACKETS, *ALONE),
        "broken",
        "generation_config.json",
    ),
    "adapter config of brackets": case(
        written("lora/adapter_config.json", BRACKETS, *ADAPTED), "lora", "adapter_config.json"
    ),
    "card of brackets": case(
        written("broken/README.md", f"---\n{BRACKETS}\n---\n", *ALONE), may_succeed=True
    ),
    "card of aliases": case(
        written(
            "broken/README.md",
            "---\na: &a [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(
                f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
                for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
            )
            + "license: mit\nlanguage: *k\n---\n",
            *ALONE,
        ),
        may_succeed=True,
    ),
    "index with a number beyond float": case(
        in_order(
            lambda root: (
                (root / "broken" / "model.safetensors").rename(root / "broken" / "a.safetensors")
                and None
            ),
            written(
                "broken/model.safetensors.index.json", f'{{"weight_map": {{"x": {MANY * 20}}}}}'
            ),
        ),
        "index.json",
    ),
    # files that are no files, or too large
    "config of 20 GB": case(sparse("broken/config.json"), "broken", "config.json"),
    "index of 20 GB": case(
        in_order(
            lambda root: (root / "broken" / "model.safetensors").unlink(),
            sparse("broken/model.safetensors.index.json"),
        ),
        "index.json",
    ),
    "sidecar of 20 GB": case(sparse("broken/notes.txt", *ALONE), "notes.txt", may_succeed=True),
    "card of 20 GB": case(sparse("broken/README.md", *ALONE), "README.md", may_succeed=True),
    "tokenizer of 20 GB": case(sparse("broken/tokenizer.json", *ALONE), "tokenizer"),
    "tokenizer config of 20 GB": case(
        sparse("broken/tokenizer_config.json", *ALONE), "tokenizer_config"
    ),
    "generation config of 20 GB": case(
        sparse("broken/generation_config.json", *ALONE), "generation_config"
    ),
    "adapter config of 20 GB": case(
        sparse("lora/adapter_config.json", *ADAPTED), "adapter_config.json"
    ),
    "sidecar a FIFO": case(fifo("broken/notes.txt", *ALONE), "notes.txt", may_succeed=True),
    "card a FIFO": case(fifo("broken/README.md", *ALONE), may_succeed=True),
    "config a FIFO": case(fifo("broken/config.json"), "config.json"),
    "weights a FIFO": case(fifo("broken/model.safetensors"), "broken"),
    "tokenizer a FIFO": case(fifo("broken/tokenizer.json", *ALONE), may_succeed=True),
    "config a device": case(link("broken/config.json", "/dev/zero"), "config.json"),
    "sidecar a device": case(
        link("broken/notes.txt", "/dev/zero", *ALONE), "notes.txt", may_succeed=True
    ),
    "weights a device": case(link("broken/model.safetensors", "/dev/zero"), "broken"),
    "config a folder": case(
        lambda root: (
            (root / "broken" / "config.json").unlink() or (root / "broken" / "config.json").mkdir()
        ),
        "config.json",
    ),
    "sidecar a link to itself": case(
        link("broken/notes.txt", "notes.txt", *ALONE), "notes.txt", may_succeed=True
    ),
    "config a link to itself": case(link("broken/config.json", "config.json"), "config.json"),
    "folder that links to itself": case(link("broken/sub", ".", *ALONE), may_succeed=True),
    "model a link to itself": case(
        link("loop", "loop", *"out --base-model good --merge ./loop".split()), "loop"
    ),
    "output a link to itself": case(
        link("loop", "loop", *"loop --base-model good --merge other".split()), "loop"
    ),
    # headers
    "a shape beyond 2^63": case(
        header(lambda parsed: parsed[LAYER].update(shape=[2**63, 2])), "model.safetensors"
    ),
    "a shape beyond 2^64": case(
        header(lambda parsed: parsed[LAYER].update(shape=[2**65])), "model.safetensors"
    ),
    "a shape whose product wraps around": case(
        header(lambda parsed: parsed[LAYER].update(shape=[2**32, 2**32])), "model.safetensors"
    ),
    "a negative shape": case(
        header(lambda parsed: parsed[LAYER].update(shape=[-48, 32])), "model.safetensors"
    ),
    "a shape of nothing": case(
        header(
            lambda parsed: parsed.update(
                {"none": {"dtype": "BF16", "shape": [0, 2**62], "data_offsets": [0, 0]}}
            )
        ),
        "broken",
        "none",
    ),
    "a shape of 100,000 dimensions": case(
        tensors(lambda tensors: tensors.update(wide=torch.ones([1] * 60))), "broken", "wide"
    ),
    # numbers of options
    "shard size beyond float": case(
        options(f"out --base-model good --merge other --max-shard-size {MANY}GB"),
        "--max-shard-size",
        may_succeed=True,
    ),
    "shard size of less than a byte": case(
        options("out --base-model good --merge other --max-shard-size 0.0000001KB"),
        "--max-shard-size",
        may_succeed=True,
    ),
    "weight below the normal": case(
        options("out --base-model good --merge other --weight 1e-320"),
        "--weight",
        may_succeed=True,
    ),
    "weight below the normal, linear": case(
        options("out --method linear --merge good --merge other --weight 1e-320"),
        "--weight",
        may_succeed=True,
    ),
    "density below the normal": case(
        options("out --base-model good --merge other --density 1e-320"), may_succeed=True
    ),
    "weight beyond float": case(
        options(f"out --method linear --merge good --weight {MANY}"), "--weight"
    ),
    "a list of 100,000 weights": case(
        options("out --method linear --merge good --weight " + ",".join(["1"] * 30_000)),
        may_succeed=True,
    ),
    "10^9 threads": case(
        options("out --base-model good --merge other --threads 1000000000"),
        "--threads",
        may_succeed=True,
    ),
    "threads beyond int": case(
        options(f"out --base-model good --merge other --threads {MANY}"), "--threads"
    ),
    # adapters
    "alpha beyond float": case(adapter(lora_alpha="MANY"), "lora_alpha"),
    "alpha pattern beyond float": case(
        adapter(alpha_pattern={"q_proj": "MANY"}), "alpha_pattern.q_proj"
    ),
    "alpha pattern that does not compile": case(
        adapter(alpha_pattern={"(q_proj": 2}), "alpha_pattern", "(q_proj"
    ),
    "alpha pattern that is too large": case(
        adapter(alpha_pattern={f"a{{{2**40}}}": 2}), "alpha_pattern"
    ),
    "alpha pattern of brackets": case(
        adapter(alpha_pattern={"(" * 5000 + "a" + ")" * 5000: 2}), "alpha_pattern"
    ),
    "alpha pattern that multiplies": case(
        adapter(alpha_pattern={"((((a{99}){99}){99}){99}){99}": 2}),
        "alpha_pattern",
        may_succeed=True,
    ),
    "alpha pattern that never ends": case(
        adapter(alpha_pattern={"(([a-z_.0-9])+)+!": 2}), "alpha_pattern", may_succeed=True
    ),
    "alpha pattern that never ends, otherwise": case(
        adapter(alpha_pattern={"(.*)*(.*)*(.*)*(.*)*!": 2}), "alpha_pattern", may_succeed=True
    ),
    "alpha pattern that never ends, by choices": case(
        adapter(alpha_pattern={"(a|b|[a-z]|.|[^x]|[a-z_])*!": 2}),
        "alpha_pattern",
        may_succeed=True,
    ),
    "rank pattern that never ends": case(
        adapter(rank_pattern={"(([a-z_.0-9])+)+!": 2}), may_succeed=True
    ),
    "adapter of another model": case(
        adapter(
            {
                LORA.format(layer, module, half): torch.ones(2, 2)
                for layer in range(14)
                for module in ("q_proj", "k_proj", "v_proj")
                for half in "AB"
            }
        ),
        "lora",
        "another model",
    ),
    "adapter of convolutions": case(
        adapter(
            {
                LORA.format(0, "conv", "A"): torch.ones(2, 4, 3, 3),
                LORA.format(0, "conv", "B"): torch.ones(4, 2, 1, 1),
            }
        ),
        "lora",
        "convolution",
    ),
    "two adapters": case(
        options("out --method linear --weight 1 --merge good+lora+lora"), "one adapter"
    ),
    # what things are called
    "Git LFS pointer": case(written("broken/model.safetensors", LFS), "model.safetensors", "LFS"),
    "Git LFS pointer to a pickle": case(
        in_order(
            lambda root: (root / "broken" / "model.safetensors").unlink(),
            written("broken/pytorch_model.bin", LFS),
        ),
        "pytorch_model.bin",
        "LFS",
    ),
    "Git LFS pointer to a tokenizer": case(
        written("broken/tokenizer.json", LFS, *ALONE), "tokenizer.json", "LFS"
    ),
    "Git LFS pointer to a licence": case(
        written("broken/LICENSE", LFS, *ALONE), "broken", "LICENSE", "LFS"
    ),
    "Git LFS pointer to a config": case(written("broken/config.json", LFS), "config.json", "LFS"),
    "Git LFS pointer to an adapter": case(
        written("lora/adapter_model.safetensors", LFS, *ADAPTED), "adapter_model", "LFS"
    ),
    "a tensor's name with an escape": case(
        tensors(lambda tensors: tensors.update({"evil\x1b[2J\x07\u202e\n": torch.ones(1)})),
        "broken",
        "evil",
    ),
    "a tensor's name of 100,000 letters": case(
        tensors(lambda tensors: tensors.update({"x" * 100_000: torch.ones(1)})), "broken", "xxx"
    ),
    "10,000 tensors too many": case(
        tensors(lambda t: t.update({f"extra.{n}": torch.ones(1) for n in range(10_000)})),
        "broken",
        "extra.0",
    ),
    "all of one shape": case(
        lambda root: save_file(
            {name: torch.ones(3, 5) for name in stored(root / "broken")},
            root / "broken" / "model.safetensors",
        ),
        "broken",
    ),
    "a model's name with an escape": case(
        lambda root: (
            "out --base-model good --merge".split()
            + [str((root / "broken").rename(root / "evil\x1b[2J\n").relative_to(root)) + "x"]
        ),
        "evil",
    ),
    "a hidden size of a list in a donor": case(config(hidden_size=[1, 2]), "broken"),
    "an activation of nothing": case(config(hidden_act="nope"), "broken"),
    "experts that cannot be": case(config(num_key_value_heads=7), "broken"),
    "a mistyped path": case(
        options("out --base-model ./good --merge ./othre"), "./othre", "./other"
    ),
    # outputs
    "parents of which one cannot be": case(
        lambda root: [f"a/b/{'x' * 300}/out", *COMMAND[1:]], "long"
    ),
    "an output that is not UTF-8": case(
        lambda root: ["out\udcff", "--base-model", "good", "--merge", "other"], "UTF-8"
    ),
    "an output of a thousand parts": case(
        lambda root: ["/".join(["d"] * 1000), "--base-model", "good", "--merge", "other"], "parts"
    ),
    "an output beyond a path's length": case(
        lambda root: ["/".join(["d" * 100] * 100), "--base-model", "good", "--merge", "other"],
        "long",
    ),
    "an output with a zero": case(
        lambda root: ["out\0x", "--base-model", "good", "--merge", "other"], "out"
    ),
    # remote code
    **{
        f"remote code that {what}": case(
            in_order(
                written("broken/modeling_own.py", code),
                config(
                    model_type="own-llama",
                    architectures=["OwnForCausalLM"],
                    auto_map={
                        "AutoConfig": "modeling_own.OwnConfig",
                        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
                    },
                ),
                lambda root: [*ALONE, "--trust-remote-code"],
            ),
            "broken",
            named,
        )
        for what, code, named in (
            ("raises", "raise RuntimeError('my own trouble')", "my own trouble"),
            ("raises nothing known", "raise type('Odd', (Exception,), {})('odd trouble')", "odd"),
            ("exits", "import sys; sys.exit(0)", "OwnConfig"),
            ("does not parse", "def (:", "modeling_own"),
            ("needs a package", "import no_such_package_at_all", "no_such_package_at_all"),
            ("needs a part of a package", "from transformers import NoSuchThing", "NoSuchThing"),
            ("lacks its class", "x = 1", "OwnConfig"),
            (
                "lacks its model",
                "from transformers import LlamaConfig\n"
                "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n",
                "OwnForCausalLM",
            ),
            (
                "raises when it is built",
                "from transformers import LlamaConfig, LlamaForCausalLM\n"
                "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
                "class OwnForCausalLM(LlamaForCausalLM):\n"
                "    config_class = OwnConfig\n"
                "    def __init__(self, config):\n        raise KeyError('trouble in a model')\n",
                "trouble in a model",
            ),
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input(name: str, root: Path, contained: Contained) -> None:
    fault, named, may_succeed = CASES[name]
    arguments = fault(root) or COMMAND
    before = listing(root)
    outcome = contained.run("main", arguments, root)
    bounded(outcome)
    if may_succeed and outcome.status == 0:
        loads_clean(root / "out")
        shutil.rmtree(root / "out")
    else:
        text = message(outcome)
        for part in named:
            assert part in text, outcome
    unchanged(root, before)


def aliases(levels: int) -> str:
    names = "abcdefghijklmnopqrstuvwxyz"[:levels]
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip(names, names[1:], strict=False)
    ]
    return "\n".join([*lines, f"layer_slices: *{names[-1]}"])


STACKS: dict[str, tuple[str | Fault, tuple[str, ...]]] = {
    "aliases that multiply": (aliases(12), ("stack.yml",)),
    "aliases that multiply in a mapping": (
        aliases(12).replace("layer_slices: ", "scale: ") + "\n" + STACK,
        ("stack.yml", "aliases"),
    ),
    "an alias to itself": ("layer_slices: &a [*a]", ("stack.yml",)),
    "a mapping of itself": ("&a {layer_slices: [*a]}", ("stack.yml",)),
    "brackets": (BRACKETS, ("stack.yml",)),
    "20 GB": (sparse("stack.yml", "stack.yml", "out"), ("stack.yml",)),
    "a FIFO": (fifo("stack.yml", "stack.yml", "out"), ("stack.yml",)),
    "a device": (link("stack.yml", "/dev/zero", "stack.yml", "out"), ("stack.yml",)),
    "a link to itself": (link("stack.yml", "stack.yml", "stack.yml", "out"), ("stack.yml",)),
    "a folder": (lambda root: (root / "stack.yml").mkdir(), ("stack.yml",)),
    "no text": (b"\xff\xfe\x00layer".decode("latin-1"), ("stack.yml",)),
    "octal": (STACK.replace("end: 2", "end: 010"), ("stack.yml", "010")),
    "octal of nought": (STACK.replace("start: 0", "start: 00"), ("stack.yml", "00")),
    "sexagesimal": (STACK.replace("end: 2", "end: 1:30"), ("stack.yml", "1:30")),
    "sexagesimal scale": (STACK.replace("2}", "2, scale: 1:30.5}"), ("stack.yml", "1:30.5")),
    "a layer beyond int": (STACK.replace("end: 2", f"end: {MANY}"), ("stack.yml",)),
    "a scale beyond float": (STACK.replace("2}", f"2, scale: {MANY}}}"), ("stack.yml",)),
    "100,000 layers": (
        lambda root: (
            config(num_hidden_layers=100_000)(root)
            and written("stack.yml", STACK.replace("good", "broken"))(root)
        ),
        ("broken",),
    ),
    "an unknown module of 100,000 letters": (
        STACK.replace("2}", f"2, scale: {{{'x' * 100_000}: 1}}}}"),
        ("stack.yml",),
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_hostile_stack(name: str, root: Path, contained: Contained) -> None:
    given, named = STACKS[name]
    if isinstance(given, str):
        (root / "stack.yml").write_text(given, encoding="latin-1")
    else:
        given(root)
    before = listing(root)
    outcome = contained.run("bakllama", ["stack.yml", "out"], root)
    bounded(outcome)
    text = message(outcome)
    for part in named:
        assert part in text, outcome
    unchanged(root, before)


@pytest.mark.parametrize(
    ("text", "factor"), [("1e-3", 1e-3), ("5e-1", 0.5), (".5", 0.5), ("2", 2.0)]
)
def test_numbers_of_yaml(text: str, factor: float, root: Path, contained: Contained) -> None:
    (root / "stack.yml").write_text(STACK.replace("2}", f"2, scale: {text}}}"))
    outcome = contained.run("bakllama", ["stack.yml", "out"], root)
    assert outcome.status == 0, outcome
    name = "model.layers.1.mlp.up_proj.weight"
    expected = (stored(root / "good")[name].double() * factor).bfloat16()
    assert torch.equal(stored(root / "out")[name], expected)


def test_the_undamaged_commands_work(root: Path, contained: Contained) -> None:
    """So that no case above fails for another reason than its fault."""
    for arguments in (COMMAND, ALONE, ADAPTED):
        outcome = contained.run("main", [*arguments, "--overwrite"], root)
        assert outcome.status == 0, outcome
        bounded(outcome)
        loads_clean(root / "out")
    record("data.pkl", bytes)(root)
    assert contained.run("main", [*COMMAND, "--overwrite"], root).status == 0
    (root / "stack.yml").write_text(STACK)
    assert contained.run("bakllama", ["stack.yml", "out", "--overwrite"], root).status == 0


# -------------------------------------------------------------------- standard error


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Run a line of bash, in which $MAIN is the command. Returns status and standard output."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "MAIN": f"{sys.executable} {ROOT / 'main.py'}", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("redirection", "out"),
    [
        ("2>/dev/full", "out\n"),
        ("--verbose 2>/dev/full", "out\n"),
        ("2>&-", "out\n"),
        ("2> >(exit)", "out\n"),
        ("2>&1 | head -9 >/dev/null; (exit ${PIPESTATUS[0]})", ""),
        ("--verbose 2>&1 | head -1 >/dev/null; (exit ${PIPESTATUS[0]})", ""),
        (">/dev/full 2>&1", ""),
    ],
    ids=["full", "full-verbose", "closed", "nobody", "head", "head-verbose", "both-full"],
)
def test_standard_error_is_only_talk(redirection: str, out: str, root: Path) -> None:
    status, printed = shell(f"$MAIN {' '.join(COMMAND)} {redirection}", root)
    assert status == 0
    assert printed == out
    loads_clean(root / "out")


@pytest.mark.parametrize(
    "redirection",
    ["2>/dev/full", "2>&-", "2>&1 | :; (exit ${PIPESTATUS[0]})"],
    ids=["full", "closed", "nobody"],
)
def test_a_refusal_that_nobody_hears(redirection: str, root: Path) -> None:
    (root / "broken" / "config.json").unlink()
    status, printed = shell(f"$MAIN {' '.join(COMMAND)} {redirection}", root)
    assert status == 2
    assert printed == ""
    assert not (root / "out").exists()


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize("megabytes", [2, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100])
def test_little_memory(megabytes: int, make: Make, root: Path, contained: Contained) -> None:
    """Whatever runs out of memory, it is said."""
    models = [str(make("llama", seed, vocab_size=1 << 18)) for seed in (0, 1)]
    before = listing(root)
    arguments = ["out", "--base-model", models[0], "--merge", models[1], "--threads", "1"]
    outcome = contained.run("main", arguments, root, memory=megabytes * 1_000_000)
    assert not outcome.traceback, outcome
    assert outcome.status in (0, 2), outcome
    if outcome.status == 2:
        assert "memory" in message(outcome), outcome
        unchanged(root, before)


@pytest.mark.parametrize("error", ["MemoryError()", "MemoryError('no room')"])
def test_a_bare_memory_error(error: str, root: Path, contained: Contained) -> None:
    before = listing(root)
    prelude = f"import os\ndef fsync(descriptor): raise {error}\nos.fsync = fsync"
    outcome = contained.run("main", COMMAND, root, prelude=prelude)
    assert "memory" in message(outcome)
    unchanged(root, before)


# -------------------------------------------------------------------- inputs that change


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("change", ["cut", "emptied", "rewritten", "replaced"])
def test_an_input_that_changes_during_the_run(
    change: str, weights: str, root: Path, contained: Contained
) -> None:
    file = root / "broken" / "model.safetensors"
    if weights == "bin":
        record("data.pkl", bytes)(root)
        file = root / "broken" / "pytorch_model.bin"
    file.with_name("twin").write_bytes(bytes(file.stat().st_size))
    action = {
        "cut": f"os.truncate({str(file)!r}, 8192)",
        "emptied": f"os.truncate({str(file)!r}, 0)",
        "rewritten": f"open({str(file)!r}, 'r+b').write(bytes({file.stat().st_size}))",
        "replaced": f"os.replace({str(file.with_name('twin'))!r}, {str(file)!r})",
    }[change]
    outcome = contained.run("main", COMMAND, root, prelude=at_staging(action))
    if change == "replaced" and outcome.status == 0:  # what was opened is still whole
        loads_clean(root / "out")
        return
    assert outcome.signal is None, outcome
    text = message(outcome)
    assert file.name in text or "broken" in text
    assert "changed" in text or "shrank" in text or "cut" in text, outcome
    assert not (root / "out").exists()
    assert not list(root.glob(".out*"))


# -------------------------------------------------------------------- what is copied


def test_links_to_the_outside_are_not_copied(root: Path, contained: Contained) -> None:
    secret = root.parent / "secret"
    secret.mkdir()
    (secret / "key").write_text("my private key")
    (root / "broken" / "LICENSE-inside").write_text("harmless")
    links = {
        "LICENSE-key": str(secret / "key"),
        "LICENSE-relative": "../../secret/key",
        "LICENSE-environ": "/proc/self/environ",
        "LICENSE-passwd": "/etc/passwd",
        "LICENSE-gone": "nowhere",
        "LICENSE-other": "../other/config.json",
        "LICENSE-inner": "LICENSE-inside",
    }
    for name, target in links.items():
        (root / "broken" / name).symlink_to(target)
    outcome = contained.run("main", ALONE, root, environment={"SECRET": "my private word"})
    assert outcome.status == 0, outcome
    written = contents(root / "out")
    assert written["LICENSE-inside"] == b"harmless"
    assert written["LICENSE-inner"] == b"harmless"
    assert not [name for name, content in written.items() if b"my private" in content]
    left_out = set(links) - {"LICENSE-inner"}
    assert not left_out & {name.partition("/")[0] for name in written}
    for name in left_out - {"LICENSE-gone"}:
        assert name in outcome.err
    assert not any(path.is_symlink() for path in (root / "out").rglob("*"))


def test_a_linked_shard_is_read(root: Path, contained: Contained) -> None:
    elsewhere = root.parent / "elsewhere.safetensors"
    (root / "broken" / "model.safetensors").rename(elsewhere)
    (root / "broken" / "model.safetensors").symlink_to(elsewhere)
    outcome = contained.run("main", ALONE, root)
    assert outcome.status == 0, outcome
    assert not (root / "out" / "model.safetensors").is_symlink()


def test_a_linked_model_is_read(root: Path, contained: Contained) -> None:
    (root / "broken" / "NOTICE").write_text("mine")
    (root / "linked").symlink_to("broken")
    outcome = contained.run("main", [*ALONE[:-1], "linked"], root)
    assert outcome.status == 0, outcome
    assert (root / "out" / "NOTICE").read_text() == "mine"


# -------------------------------------------------------------------- overwriting


@pytest.mark.parametrize(
    "extra",
    ["thesis.txt", "checkpoint-5/model.safetensors", "runs/events", ".git/HEAD", ".hidden"],
)
def test_overwriting_replaces_a_model_only(extra: str, root: Path, contained: Contained) -> None:
    assert contained.run("main", COMMAND, root).status == 0
    (root / "out" / extra).parent.mkdir(exist_ok=True)
    (root / "out" / extra).write_text("mine")
    before = contents(root)
    text = message(contained.run("main", [*COMMAND, "--overwrite"], root))
    assert extra.partition("/")[0] in text
    assert contents(root) == before


def test_overwriting_lists_what_is_more_than_a_model(root: Path, contained: Contained) -> None:
    assert contained.run("main", COMMAND, root).status == 0
    for number in range(500):
        (root / "out" / f"chapter-{number:03}.txt").write_text("mine")
    before = contents(root)
    text = message(contained.run("main", [*COMMAND, "--overwrite"], root))
    assert "chapter-000.txt" in text
    assert contents(root) == before


def test_files_that_appear_during_an_overwriting_run(root: Path, contained: Contained) -> None:
    assert contained.run("main", COMMAND, root).status == 0
    before = contents(root)
    prelude = at_staging(f"open({str(root / 'out' / 'thesis.txt')!r}, 'w').write('mine')")
    outcome = contained.run("main", [*COMMAND, "--overwrite"], root, prelude=prelude)
    assert "thesis.txt" in message(outcome)
    assert contents(root) == before | {"out/thesis.txt": b"mine"}


def test_what_models_have_is_overwritten(root: Path, contained: Contained) -> None:
    """Tokenizers, templates, cards and remote code are a model's, of any donor."""
    assert contained.run("main", COMMAND, root).status == 0
    for name in (
        *("tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "vocab.txt"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "LICENSE"),
        *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *("modeling_own.py", "configuration_own.py", "README.md", "LICENSE.txt", "NOTICE"),
        *("USE_POLICY.md", ".gitattributes", "pytorch_model.bin", "spiece.model"),
    ):
        (root / "out" / name).write_text("{}")
    outcome = contained.run("main", [*COMMAND, "--overwrite"], root)
    assert outcome.status == 0, outcome
    assert not (root / "out" / "modeling_own.py").exists()


def test_an_output_that_appears_meanwhile(root: Path, contained: Contained) -> None:
    action = (
        f"os.makedirs({str(root / 'out')!r}); open({str(root / 'out' / 'x')!r}, 'w').write('a')"
    )
    outcome = contained.run("main", COMMAND, root, prelude=at_staging(action))
    text = message(outcome)
    assert "out" in text
    assert "meanwhile" in text
    assert contents(root / "out") == {"x": b"a"}
    assert not list(root.glob(".out*"))


def test_a_stray_folder_does_not_become_the_output(root: Path, contained: Contained) -> None:
    (root / ".out.replaced").mkdir()
    (root / ".out.replaced" / "thesis.txt").write_text("mine")
    tensors(lambda values: values[LAYER].fill_(torch.nan))(root)
    assert "NaN" in message(contained.run("main", COMMAND, root))
    assert not (root / "out").exists()
    assert (root / ".out.replaced" / "thesis.txt").read_text() == "mine"


def test_an_old_model_that_cannot_be_removed(open_root: Path, contained: Contained) -> None:
    user = plain_user()
    assert contained.run("main", COMMAND, open_root, user=user).status == 0
    (open_root / "out").chmod(0o555)
    outcome = contained.run("main", [*ALONE, "--overwrite"], open_root, user=user)
    assert not outcome.traceback, outcome
    assert outcome.status in (0, 2)
    left = [path.name for path in open_root.iterdir() if path.name.startswith(".out")]
    assert all(name in outcome.err for name in left), (left, outcome)
    same = stored(open_root / "out")[LAYER].equal(stored(open_root / "broken")[LAYER])
    assert same == (outcome.status == 0)
    if outcome.status == 2:
        assert "out" in message(outcome)


def test_a_leftover_that_cannot_be_removed(open_root: Path, contained: Contained) -> None:
    left = open_root / ".out.partial" / "inner"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    if os.geteuid() == 0:
        os.chown(left.parent, NOBODY, NOBODY)
    left.chmod(0o555)
    outcome = contained.run("main", COMMAND, open_root, user=plain_user())
    assert ".out.partial" in message(outcome)
    assert not (open_root / "out").exists()


# -------------------------------------------------------------------- directories


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_parent_that_cannot_be_read(
    overwrite: bool, open_root: Path, contained: Contained
) -> None:
    """A folder of mode 0300 can be written to, but not opened to be flushed."""
    user = plain_user()
    parent = open_root / "drop"
    parent.mkdir()
    if user is not None:
        os.chown(parent, user, user)
    arguments = ["drop/out", *ALONE[1:]]
    if overwrite:
        assert contained.run("main", ["drop/out", *COMMAND[1:]], open_root, user=user).status == 0
        arguments.append("--overwrite")
    parent.chmod(0o300)
    outcome = contained.run("main", arguments, open_root, user=user)
    parent.chmod(0o755)
    assert outcome.status == 0, outcome
    assert outcome.out == "drop/out\n"
    assert stored(parent / "out")[LAYER].equal(stored(open_root / "broken")[LAYER])
    assert sorted(path.name for path in parent.iterdir()) == ["out"]


NO_FOLDER_SYNC = """
import errno, os, stat
fsync = os.fsync
def files_only(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.{code}, os.strerror(errno.{code}))
    fsync(descriptor)
os.fsync = files_only
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("code", ["EINVAL", "EACCES", "EBADF", "ENOTSUP"])
def test_folders_that_cannot_be_flushed(
    code: str, overwrite: bool, root: Path, contained: Contained
) -> None:
    arguments = list(ALONE)
    if overwrite:
        assert contained.run("main", COMMAND, root).status == 0
        arguments.append("--overwrite")
    outcome = contained.run("main", arguments, root, prelude=NO_FOLDER_SYNC.format(code=code))
    assert outcome.status == 0, outcome
    assert outcome.out == "out\n"
    assert stored(root / "out")[LAYER].equal(stored(root / "broken")[LAYER])
    assert not list(root.glob(".out*"))


def test_a_disk_that_fails_after_the_swap(root: Path, contained: Contained) -> None:
    """The status says what stands under the name; the old model is not deleted then."""
    assert contained.run("main", COMMAND, root).status == 0
    old = stored(root / "out")[LAYER]
    prelude = """
import errno, os, stat
fsync = os.fsync
def failing(descriptor):
    if os.readlink(f"/proc/self/fd/{descriptor}") == os.getcwd():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    fsync(descriptor)
os.fsync = failing
"""
    outcome = contained.run("main", [*ALONE, "--overwrite"], root, prelude=prelude)
    assert not outcome.traceback, outcome
    assert outcome.status in (0, 2)
    new = stored(root / "out")[LAYER].equal(stored(root / "broken")[LAYER])
    assert new == (outcome.status == 0), outcome
    kept = [path.parent for path in root.glob("*out*/model.safetensors")]
    kept += [path.parent for path in root.glob(".out*/model.safetensors")]
    assert any(stored(folder)[LAYER].equal(old) for folder in kept)
    assert all(folder.name in outcome.err for folder in kept)


def test_files_that_may_not_be_read(open_root: Path, contained: Contained) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        file = open_root / "broken" / name
        file.chmod(0)
        text = message(contained.run("main", ALONE, open_root, user=plain_user()))
        assert name in text
        assert "ermission denied" in text, text
        file.chmod(0o644)
    (open_root / "broken").chmod(0)
    text = message(contained.run("main", ALONE, open_root, user=plain_user()))
    assert "broken" in text
    assert "ermission denied" in text, text


@pytest.mark.parametrize("relative", [True, False])
def test_a_vanished_working_directory(relative: bool, root: Path, contained: Contained) -> None:
    work = root / "work"
    work.mkdir()
    models = [name if relative else str(root / name) for name in ("good", "other")]
    output = "out" if relative else str(root / "out")
    outcome = contained.run(
        "main",
        [output, "--base-model", models[0], "--merge", models[1]],
        work,
        prelude=f"import os; os.rmdir({str(work)!r})",
    )
    assert not outcome.traceback, outcome
    if relative:
        assert "working directory" in message(outcome)
    else:
        assert outcome.status == 0, outcome


def test_a_full_disk_names_the_file(root: Path, contained: Contained) -> None:
    before = listing(root)
    text = message(contained.run("main", COMMAND, root, file_size=50_000))
    assert "out" in text
    assert "model.safetensors" in text
    unchanged(root, before)


def test_a_home_in_an_output(root: Path, contained: Contained) -> None:
    home = root / "home"
    home.mkdir()
    outcome = contained.run("main", ["~/merged", *ALONE[1:]], root, environment={"HOME": str(home)})
    assert outcome.status == 0, outcome
    loads_clean(home / "merged")
    assert not (root / "~").exists()


# -------------------------------------------------------------------- adapters


def test_keys_with_default(root: Path, contained: Contained) -> None:
    """peft's own state dictionaries name the adapter; it is called default."""
    assert contained.run("main", ADAPTED, root).status == 0
    expected = stored(root / "out")
    values = factors(range(6), "q_proj")
    renamed = {key.replace(".weight", ".default.weight"): value for key, value in values.items()}
    write_adapter(root, renamed)
    outcome = contained.run("main", [*ADAPTED, "--overwrite"], root)
    assert outcome.status == 0, outcome
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(root / "out").items())
    assert not torch.equal(
        expected["model.layers.0.self_attn.q_proj.weight"],
        stored(root / "good")["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize(
    "pattern", ["q_proj", "layers.0.self_attn.q_proj", r".*\.0\..*q_proj", "q|v"]
)
def test_alpha_patterns_are_pefts(pattern: str, root: Path, contained: Contained) -> None:
    """What is safe to match is matched as peft does: its end, after any beginning."""
    import re

    write_adapter(root, factors(range(2), "q_proj"), alpha_pattern={pattern: 40})
    outcome = contained.run("main", ADAPTED, root)
    assert outcome.status == 0, outcome
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        alpha = 40 if re.match(rf"(.*\.)?({pattern})$", module) else 4
        base = stored(root / "good")[f"{module}.weight"]
        expected = (base.double() + alpha / 2 * 2 * float(torch.tensor(0.1)) ** 2).bfloat16()
        assert torch.equal(stored(root / "out")[f"{module}.weight"], expected)


# -------------------------------------------------------------------- time


def test_a_refusal_is_quick(root: Path) -> None:
    """In process, so that it is seen what a mistake costs once the libraries are loaded."""
    started = time.monotonic()
    arguments = [str(root / "out"), "--base-model", str(root / "good"), "--merge", "./nowhere"]
    assert main.main(arguments) == 2
    assert time.monotonic() - started < 5
