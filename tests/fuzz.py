"""Damage inputs at random, and see that every run ends well or is refused with a message.

    python tests/fuzz.py --minutes 60 --seed 1

Each round takes small models, an adapter and a stack, changes some of their bytes or structure,
and runs a command in a process with limits on its time and memory. What may not happen is printed
once for each place where it happened, with the line that repeats it: a traceback, a crash, a hang,
something left behind, a message without a culprit or too long to read, an output that does not
load, or one that differs from the undamaged one although what was damaged is not in it.
"""

import argparse
import json
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from contained import ROOT, Contained, Outcome, listing
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

SECONDS, MEMORY = 15.0, 1 << 31
LONGEST, MOST_LINES = 6000, 60  # of what a run says
FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)$', re.M)
WORDS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**30, 0.5, -0.0,
    1e308, float("inf"), float("nan"), "", "x", "0", "1e400", "../x", "/etc/passwd", "\0",
    "\x1b[31m", "\ud800", "é" * 300, [], {}, [[]], {"": None}, [None], ["x"] * 7,
    {"x": {"x": {}}}, "bfloat16",
    "model.safetensors", "LlamaForCausalLM", "llama", "gpt2",
]  # fmt: skip
KEYS = """
    architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    vocab_size tie_word_embeddings torch_dtype dtype head_dim rope_scaling rope_parameters
    layer_types auto_map quantization_config num_labels text_config vision_config save_pretrained
    to_dict id2label pad_token_id attn_implementation _name_or_path transformers_version
    is_encoder_decoder tokenizer_class added_tokens_decoder use_dora alpha_pattern rank_pattern r
    lora_alpha use_rslora modules_to_save target_modules weight_map metadata __metadata__
    data_offsets shape __class__ __dict__ name_or_path
""".split()
YAML_WORDS = [
    "&a", "*a", "!!python/name:os.system", "!!binary x", "? ", "---", "...", "%YAML 9.9", "<<: *a",
    "010", "1:30", "1e-3", "0x1f", ".inf", "~", "yes", "2001-01-01", "- ", "{", "}", "[", "]", ": ",
    "'", '"', "|", ">", "#", "\t", "\ufeff", "\x00", "\x85", "start", "end", "scale", "model", "-1",
    "good", "3.5", "null", "layer_slices", "embedding_source", "lm_head_source", "\u2028",
    "!!int x",
]  # fmt: skip


@dataclass
class Round:
    """One damaged input, the command to run on it, and what was done, in words."""

    folder: Path
    script: str
    arguments: list[str]
    damage: list[str] = field(default_factory=list)
    harmless: bool = False  # whether the output must be the undamaged one, if there is one


# -------------------------------------------------------------------- damage


def damaged_bytes(content: bytes, random_: random.Random) -> tuple[bytes, str]:
    """Flip, cut, insert, repeat or zero some bytes."""
    data = bytearray(content)
    place = random_.randrange(len(data) + 1)
    size = random_.choice([1, 1, 2, 8, 100, 5000])
    match random_.randrange(6):
        case 0 if data:
            for _ in range(random_.choice([1, 1, 2, 8, 64])):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
            return bytes(data), "flipped bits"
        case 1:
            return bytes(data[:place]), f"cut at {place} of {len(data)}"
        case 2:
            return bytes(data[:place] + random_.randbytes(size) + data[place:]), f"grew at {place}"
        case 3:
            return bytes(data[:place] + data[place + size :]), f"lost {size} at {place}"
        case 4:
            data[place : place + size] = bytes(min(size, len(data) - place))
            return bytes(data), f"zeros at {place}"
        case _:
            start = random_.randrange(len(data) + 1)
            piece = data[start : start + size]
            return bytes(data[:place] + piece + data[place:]), f"repeated {size} at {place}"


def damaged_json(value: Any, random_: random.Random) -> tuple[Any, str]:
    """Change one place of a JSON value: another value, another key, one more or one less."""
    places = list(walk(value))
    path = random_.choice(places)
    word = random_.choice([*WORDS, random_.choice(places) and "x" * random_.choice([1, 10, 5000])])
    if not path:
        return word, f"is {word!r:.60}"
    copy = json.loads(json.dumps(value))
    parent = copy
    for step in path[:-1]:
        parent = parent[step]
    last = path[-1]
    match random_.randrange(5):
        case 0:
            del parent[last]
            return copy, f"lost {path}"
        case 1 if isinstance(parent, dict):
            key = random_.choice([*KEYS, "", "x" * 1000, "\x1b[31m"])
            parent[key] = parent.pop(last)
            return copy, f"{path} became {key!r:.40}"
        case 2 if isinstance(parent, dict):
            key = random_.choice(KEYS)
            parent[key] = word
            return copy, f"got {path[:-1]}.{key} = {word!r:.60}"
        case 3 if isinstance(parent, list):
            parent[last:last] = [word] * random_.choice([1, 3, 1000])
            return copy, f"grew at {path}: {word!r:.60}"
        case _:
            parent[last] = nudged(parent[last], word, random_)
            return copy, f"{path} = {parent[last]!r:.60}"


def nudged(old: Any, word: Any, random_: random.Random) -> Any:
    """Return a value near the old one, or any."""
    if isinstance(old, int) and not isinstance(old, bool) and random_.random() < 0.6:
        return old + random_.choice([-1, 1, -old, old, 8 * old, 10 ** random_.randrange(20)])
    if isinstance(old, str) and random_.random() < 0.3:
        return old[: len(old) // 2] + random_.choice(["", "x", ".", "/", "\n", "(", "*"])
    return word


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value))[:20] if isinstance(value, list) else items
    for key, inner in items:
        yield from walk(inner, (*path, key))


def change_json(file: Path, random_: random.Random) -> str:
    value: Any = json.loads(file.read_text())
    done = []
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        value, what = damaged_json(value, random_)
        done.append(what)
    file.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    return "; ".join(done)


def change_header(file: Path, random_: random.Random) -> str:
    """Change the structure of a safetensors header, and leave the bytes of the tensors."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    value, what = damaged_json(json.loads(content[8 : 8 + size]), random_)
    encoded = json.dumps(value).encode()
    length = random_.choice([len(encoded)] * 8 + [len(encoded) + 1, 0, 2**63, 2**32])
    file.write_bytes(struct.pack("<Q", length) + encoded + content[8 + size :])
    return what


def change_tensors(file: Path, random_: random.Random) -> str:
    """Write whole files of other tensors: lost, renamed, reshaped, of another dtype."""
    tensors = load_file(file)
    name = random_.choice(sorted(tensors))
    tensor = tensors[name]
    match random_.randrange(7):
        case 0:
            del tensors[name]
            what = "lost"
        case 1:
            other = random_.choice([f"{name}.x", name[:-1], "", "\x1b[1m", "x" * 3000, "model"])
            tensors[other] = tensors.pop(name)
            what = f"renamed to {other!r:.30}"
        case 2:
            shape = random_.choice([(1,), (0,), (3, 5), (2, 3, 4), (), tensor.shape[::-1], (0, 7)])
            tensors[name] = torch.ones(shape)
            what = f"of shape {tuple(shape)}"
        case 3:
            dtype = random_.choice(
                [torch.float64, torch.float16, torch.int8, torch.bool, torch.int64]
                + [torch.float8_e4m3fn, torch.complex64, torch.uint16]
            )
            tensors[name] = tensor.float().to(dtype)
            what = f"to {dtype}"
        case 4:
            tensors[name] = torch.full_like(tensor, random_.choice([torch.nan, torch.inf, 3e38]))
            what = "not finite"
        case 5:
            for number in range(random_.choice([1, 50])):
                tensors[f"{random_.choice(['x', 'model.layers.99', name])}.{number}"] = (
                    tensor.clone()
                )
            what = "and more"
        case _:
            tensors[name] = torch.zeros_like(tensor)
            what = "zero"
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {what}"


def change_pickle(file: Path, random_: random.Random) -> str:
    """Change a record of a torch file, or the zip around it."""
    if random_.random() < 0.3:
        content, what = damaged_bytes(file.read_bytes(), random_)
        file.write_bytes(content)
        return what
    with zipfile.ZipFile(file) as whole:
        records = {info.filename: whole.read(info) for info in whole.infolist()}
    pickles = [n for n in records if n.endswith(".pkl")]
    name = random_.choice([*pickles, *pickles, random_.choice(sorted(records))])
    what = f"{name}: "
    kind = zipfile.ZIP_STORED
    match random_.randrange(4):
        case 0:
            del records[name]
            what += "lost"
        case 1:
            kind = zipfile.ZIP_DEFLATED
            what += "compressed"
        case _:
            records[name], how = damaged_bytes(records[name], random_)
            what += how
    with zipfile.ZipFile(file, "w") as changed:
        for each, content in records.items():
            changed.writestr(each, content, compress_type=kind)
    return what


def change_text(text: str, random_: random.Random) -> tuple[str, str]:
    """Insert, drop, swap or repeat words and lines of a text."""
    what = []
    for _ in range(random_.choice([1, 1, 2, 5])):
        words = re.split(r"(\W)", text)
        place = random_.randrange(len(words))
        match random_.randrange(4):
            case 0:
                words[place:place] = [random_.choice(YAML_WORDS)]
            case 1:
                del words[place]
            case 2:
                words[place] = random_.choice(YAML_WORDS)
            case _:
                words[place:place] = words[place : place + 5] * random_.choice([1, 3, 200])
        text = "".join(words)
        what.append(f"word {place}")
    return text, ", ".join(what)


def change_any_bytes(file: Path, random_: random.Random) -> str:
    content, what = damaged_bytes(file.read_bytes(), random_)
    if file.suffix == ".safetensors" and random_.random() < 0.7:  # where it matters
        size = struct.unpack("<Q", file.read_bytes()[:8])[0] + 8
        head, what = damaged_bytes(file.read_bytes()[:size], random_)
        content = head + file.read_bytes()[size:]
    file.write_bytes(content)
    return what


def change_kind(file: Path, random_: random.Random) -> str:
    """Put something else in a file's place."""
    file.unlink()
    match random_.randrange(6):
        case 0:
            file.mkdir()
            return "a folder"
        case 1:
            os.mkfifo(file)
            return "a FIFO"
        case 2:
            file.symlink_to(file.name)
            return "a link to itself"
        case 3:
            file.symlink_to(
                random_.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/", "nowhere"])
            )
            return f"a link to {os.readlink(file)}"
        case 4:
            with open(file, "wb") as stream:
                stream.truncate(random_.choice([1, 1 << 20, 1 << 34]))
            return "zeros"
        case _:
            return "lost"


# -------------------------------------------------------------------- rounds

STACK = """\
layer_slices:
  - {model: good, start: 0, end: 2}
  - model: broken
    start: 1
    end: 3
    scale: {o_proj: 0.5, down_proj: 1.5}
embedding_source: good
lm_head_source: broken
"""
CARD = """\
---
license: mit
language:
- en
- de
base_model: org/base
---

# A model
"""


def make_inputs(folder: Path) -> None:
    """Make two models, one more as pickles, a tokenizer, an adapter and a stack."""
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    for seed, name in enumerate(("good", "broken", "sharded", "pickled")):
        torch.manual_seed(seed)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).to(torch.bfloat16)
        model.save_pretrained(folder / name, max_shard_size="9KB" if name == "sharded" else "5GB")
        vocabulary = {f"t{number}": number for number in range(30)}
        vocabulary[f"own{seed}"] = 30
        tokenizer = Tokenizer(models.WordLevel(vocabulary, "t0"))
        tokenizer.save(str(folder / name / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "t0",
            "added_tokens_decoder": {"1": {"content": "t1", "special": True}},
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / name / "README.md").write_text(CARD)
    torch.save(
        load_file(folder / "pickled" / "model.safetensors"),
        folder / "pickled" / "pytorch_model.bin",
    )
    (folder / "pickled" / "model.safetensors").unlink()
    key = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    factors = {
        key.format(layer, module, half): torch.full(shape, 0.1)
        for layer in range(3)
        for module in ("self_attn.q_proj", "self_attn.o_proj")
        for half, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    (folder / "lora").mkdir()
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"],
        "alpha_pattern": {"layers.0.self_attn.q_proj": 8}, "rank_pattern": {}, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "stack.yml").write_text(STACK)


def main_command(random_: random.Random, *models: str) -> list[str]:
    first, *rest = models
    merges = [word for model in rest or [first] for word in ("--merge", model)]
    method = random_.choice(["ties", "linear", "slerp"])
    if method == "linear":
        return ["out", "--method", "linear", "--base-model", first, *merges, "--weight", "0.5"]
    if method == "slerp":
        return ["out", "--method", "slerp", "--base-model", first, *merges[:2], "--weight", "0.5"]
    return ["out", "--base-model", first, *merges, "--density", "0.5"]


JSON_FILES = (
    "config.json", "config.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
Change = Callable[[Path, random.Random], str]


def damaged_round(folder: Path, random_: random.Random) -> Round:
    """Choose a target, damage it in the folder, and return the command that reads it."""
    kind = random_.choices(
        [
            "header",
            "tensors",
            "bytes",
            "json",
            "adapter",
            "pickle",
            "stack",
            "card",
            "index",
            "kind",
        ],
        [4, 3, 3, 6, 4, 4, 4, 1, 2, 1],
    )[0]
    inputs = ["good", "broken"] if random_.random() < 0.5 else ["broken", "good"]
    target = "broken"
    name = "model.safetensors"
    harmless = False
    change: Change
    match kind:
        case "header":
            change = change_header
        case "tensors":
            change = change_tensors
        case "bytes":
            name = random_.choice([name, *JSON_FILES])
            change = change_any_bytes
        case "json":
            name, change = random_.choice(JSON_FILES), change_json
        case "adapter":
            target = "lora"
            name, change = random_.choice(
                [
                    ("adapter_config.json", change_json),
                    ("adapter_config.json", change_any_bytes),
                    ("adapter_model.safetensors", change_header),
                    ("adapter_model.safetensors", change_tensors),
                    ("adapter_model.safetensors", change_any_bytes),
                ]
            )
        case "pickle":
            target, name, change = "pickled", "pytorch_model.bin", change_pickle
        case "card":
            name, change, harmless = "README.md", change_card, True
        case "index":
            target, name = "sharded", "model.safetensors.index.json"
            change = random_.choice([change_json, change_any_bytes])
        case "kind":
            target = random_.choice(["broken", "lora", "sharded", "pickled"])
            name = random_.choice(sorted(p.name for p in (folder / target).iterdir()))
            change = change_kind
        case _:
            target, name, change = ".", "stack.yml", change_stack
    if target in ("pickled", "sharded"):
        inputs = [target if model == "broken" else model for model in inputs]
    elif target == "lora":
        inputs = random_.choice([["good+lora", "good"], ["good", "good+lora"]])
    if target == ".":
        script, arguments = "bakllama", ["stack.yml", "out"]
    elif target == "broken" and random_.random() < 0.25:
        script, arguments = "bakllama", ["stack.yml", "out"]
    else:
        script, arguments = "main", main_command(random_, *inputs)
    if random_.random() < 0.1:
        arguments.append("--dry-run")
    what = change(folder / target / name, random_)
    damage = [f"{target}/{name}, {change.__name__.removeprefix('change_')}: {what}"]
    return Round(folder, script, arguments, damage, harmless)


def change_card(file: Path, random_: random.Random) -> str:
    text, what = change_text(file.read_text(), random_)
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    return what


def change_stack(file: Path, random_: random.Random) -> str:
    if random_.random() < 0.2:
        return change_any_bytes(file, random_)
    return change_card(file, random_)


# -------------------------------------------------------------------- judgement


def judge(round_: Round, outcome: Outcome, before: dict[str, Any]) -> tuple[str, str] | None:
    """Return a kind and a place of what should not have happened, None if nothing."""
    said = outcome.err.rpartition("error: ")[2]
    if outcome.timed_out:
        return "hang", round_.damage[0].partition(":")[0]
    if outcome.signal is not None:
        return "crash", f"signal {outcome.signal}, {round_.damage[0].partition(':')[0]}"
    if outcome.traceback or outcome.status not in (0, 2):
        return "traceback", place_of(outcome.err)
    after = listing(round_.folder)
    left = sorted(after.keys() - before.keys())
    if outcome.status == 2:
        if left or after != before:
            return "left behind", ", ".join(left[:3])
        if "error: " not in outcome.err and "usage: " not in outcome.err:
            return "no message", outcome.err[-80:]
        if len(said) > LONGEST or len(said.splitlines()) > MOST_LINES:
            return "long message", words(said)
        if any(not c.isprintable() and c != "\n" for c in said):
            return "message not printable", words(said)
        return None if names_culprit(said, round_) else ("no culprit", words(said))
    if "--dry-run" in round_.arguments:
        return ("left behind", ", ".join(left[:3])) if left else None
    if [name for name in left if name != "out" and not name.startswith("out/")]:
        return "left behind", ", ".join(left[:3])
    return output_fault(round_)


def names_culprit(said: str, round_: Round) -> bool:
    """Whether a message says which input it is about, or that there was too little memory."""
    names = ["broken", "lora", "sharded", "pickled", "stack.yml", "--", "memory"]
    if round_.damage[0].startswith("./stack.yml"):  # whose names may be damaged
        text = (round_.folder / "stack.yml").read_text(errors="replace")
        names += re.findall(r"[^\s,{}:]{3,}", text)
    return any(name in said for name in names)


def words(said: str) -> str:
    """Return the first plain words of a message: what is alike in messages of one kind."""
    plain = re.findall(r"(?<![\w.+/'])[A-Za-z]+(?![\w.+/'])", said.partition("- ")[2] or said)
    return " ".join(plain[:6])


def place_of(text: str) -> str:
    """Return the innermost place of the product in a traceback, and the error's kind."""
    frames = [
        m for m in FRAME.finditer(text) if str(ROOT) in m["file"] and "/tests/" not in m["file"]
    ]
    place = f"{Path(frames[-1]['file']).name}, {frames[-1]['function']}" if frames else "outside"
    last = text.strip().splitlines()[-1] if text.strip() else "silence"
    return f"{place}: {last.partition(':')[0]}"


def output_fault(round_: Round) -> tuple[str, str] | None:
    """Load an output in transformers, and look at its values."""
    output = round_.folder / "out"
    try:
        config = tf.AutoConfig.from_pretrained(output, local_files_only=True)
        cls = getattr(tf, config.architectures[0]) if config.architectures else None
        loader = cls or tf.AutoModelForCausalLM
        _, report = loader.from_pretrained(output, output_loading_info=True)
        odd = {key: sorted(map(str, found))[:3] for key, found in report.items() if found}
        if odd:
            return "output does not fit", str(sorted(odd))
    except Exception as error:
        return "output does not load", f"{type(error).__name__}: {str(error)[:60]}"
    for file in sorted(output.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    tensor = opened.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        return "output not finite", name
        except SafetensorError as error:
            return "output does not open", str(error)[:60]
    return source_fault(round_)


def source_fault(round_: Round) -> tuple[str, str] | None:
    """Compare a linear merge of one model with that model, but for what tokens decide."""
    arguments = round_.arguments
    if arguments.count("--merge") != 1 or "linear" not in arguments:
        return None
    source = arguments[arguments.index("--merge") + 1]
    if "+" in source:
        return None
    try:
        expected = read_plainly(round_.folder / source)
    except Exception as error:
        return "wrong success", f"{round_.damage[0].partition(':')[0]}, {type(error).__name__}"
    found = read_plainly(round_.folder / "out")
    for name, tensor in found.items():
        other = expected.get(name)
        by_token = "embed_tokens" in name or "lm_head" in name
        if other is not None and not by_token and not torch.equal(tensor, other.to(tensor.dtype)):
            return "wrong values", round_.damage[0].partition(":")[0]
    return None


def read_plainly(folder: Path) -> dict[str, torch.Tensor]:
    """Read a model's tensors by the libraries, without mapping."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return tensors


# -------------------------------------------------------------------- the loop


class Fuzzer:
    """Runs rounds by number: the same seed and number give the same round."""

    def __init__(self, seed: int, contained: Contained, work: Path) -> None:
        self.seed, self.contained, self.work = seed, contained, work
        self.counts: Counter[str] = Counter()
        self.findings: dict[tuple[str, str], str] = {}
        self.slowest = 0.0
        self.largest = 0
        make_inputs(work / "inputs")

    def round(self, number: int) -> tuple[Round, Outcome, tuple[str, str] | None]:
        folder = self.work / "round"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.work / "inputs", folder, symlinks=True)
        random_ = random.Random(f"{self.seed} {number}")
        round_ = damaged_round(folder, random_)
        before = listing(folder)
        outcome = self.contained.run(
            round_.script, round_.arguments, folder, seconds=SECONDS, memory=MEMORY
        )
        fault = judge(round_, outcome, before)
        if fault is None and round_.harmless and outcome.status == 0:
            fault = self._differs(round_)
        return round_, outcome, fault

    def _differs(self, round_: Round) -> tuple[str, str] | None:
        """Compare with the output of the undamaged inputs."""
        if "--dry-run" in round_.arguments:
            return None
        damaged = _values(round_.folder / "out")
        clean = self.work / "clean"
        shutil.rmtree(clean, ignore_errors=True)
        shutil.copytree(self.work / "inputs", clean)
        self.contained.run(round_.script, round_.arguments, clean)
        same = damaged == _values(clean / "out")
        return None if same else ("output differs", round_.damage[0].partition(":")[0])

    def step(self, number: int) -> None:
        """Do a round, count how it ended, and print a finding of a new kind."""
        round_, outcome, fault = self.round(number)
        self.slowest = max(self.slowest, outcome.seconds)
        self.largest = max(self.largest, outcome.peak)
        if fault is None:
            self.counts["ends well" if outcome.status == 0 else "refused"] += 1
            return
        self.counts[fault[0]] += 1
        if fault not in self.findings:
            repeat = f"python tests/fuzz.py --seed {self.seed} --only {number}"
            self.findings[fault] = repeat
            command = " ".join([round_.script, *round_.arguments])
            print(f"{fault[0]}: {fault[1]}\n  {round_.damage[0]:.200}\n  {command}\n  {repeat}")
            sys.stdout.flush()


def _values(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run the commands on inputs damaged at random.")
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="how long (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first round")
    parser.add_argument("--only", type=int, metavar="N", help="one round, its folder kept")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if anything was found."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with Contained({"HF_HOME": str(work / "home")}) as contained:
        fuzzer = Fuzzer(arguments.seed, contained, work)
        if arguments.only is not None:
            round_, outcome, fault = fuzzer.round(arguments.only)
            print(f"{round_.damage}\n{round_.script} {round_.arguments}\nin {round_.folder}")
            print(f"{outcome}\n{fault}")
            return int(fault is not None)
        end = time.monotonic() + 60 * arguments.minutes
        number = arguments.start
        while time.monotonic() < end:
            fuzzer.step(number)
            number += 1
    shutil.rmtree(work, ignore_errors=True)
    ended = ", ".join(f"{count} {kind}" for kind, count in fuzzer.counts.most_common())
    print(
        f"{number - arguments.start} rounds: {ended}; {len(fuzzer.findings)} kinds of findings; "
        f"slowest {fuzzer.slowest:.1f} s, largest {fuzzer.largest / 1e6:.0f} MB"
    )
    return int(bool(fuzzer.findings))


if __name__ == "__main__":
    sys.exit(main())
