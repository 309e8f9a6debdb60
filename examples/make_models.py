"""Make three tiny language models to merge: a base and two fine-tunes of it, on strings of letters.

    python examples/make_models.py

writes the directories base, reverse and upper next to this file, in about five minutes on one CPU
core. The models continue prompts such as `copy:abcd=` with an answer and an end-of-sequence token:

    base     knows the tasks of BASE_TASKS only, all at once
    reverse  knows reverse:abcd=dcba too
    upper    knows upper:abcd=ABCD too

The base has the ability that either fine-tune needs, as a part of longer answers (reflect gives
dcbaabcd, shout ABCDabcd), but answers neither task. So the fine-tunes are small steps from the
base, as those of large language models are, and a merge can keep both skills.
"""

import argparse
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

Task = Callable[[str], str]

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = (3, 8)  # of the strings, shortest and longest

BASE_TASKS: dict[str, Task] = {
    "copy": lambda s: s,
    "rotate": lambda s: s[1:] + s[0],
    "tail": lambda s: s[1:],
    "ends": lambda s: s[-1] + s[0],
    "double": lambda s: "".join(letter * 2 for letter in s),
    "mirror": lambda s: s + s[::-1],
    "reflect": lambda s: s[::-1] + s,
    "echo": lambda s: s + s.upper(),
    "shout": lambda s: s.upper() + s,
}
SKILLS: dict[str, Task] = {
    "reverse": lambda s: s[::-1],
    "upper": lambda s: s.upper(),
}
MAX_ANSWER = 2 * LENGTHS[1] + 1  # tokens, with the end-of-sequence token

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
TAGS = [f"{name}:" for name in [*BASE_TASKS, *SKILLS]]
VOCABULARY = [*SPECIAL_TOKENS.values(), "=", *TAGS, *LETTERS, *LETTERS.upper()]
TOKEN_IDS = {token: i for i, token in enumerate(VOCABULARY)}


def is_held_out(string: str) -> bool:
    """Tell whether the string belongs to the tenth of all strings that no model is trained on."""
    return zlib.crc32(string.encode()) % 10 == 0


def random_string(rng: random.Random, *, held_out: bool) -> str:
    while True:
        string = "".join(rng.choices(LETTERS, k=rng.randint(*LENGTHS)))
        if is_held_out(string) == held_out:
            return string


def make_prompt(task: str, string: str) -> str:
    return f"{task}:{string}="


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per tag and one per letter."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+:|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, TOKEN_IDS[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=32, **SPECIAL_TOKENS
    )


def make_model(generator: torch.Generator) -> LlamaForCausalLM:
    """Return an untrained model."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS["<pad>"],
        bos_token_id=TOKEN_IDS["<s>"],
        eos_token_id=TOKEN_IDS["</s>"],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=config.initializer_range, generator=generator)
    return model


def make_batch(
    tasks: Mapping[str, Task],
    shares: list[float],
    size: int,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """Return token ids, padded on the right, and labels: the ids of the answers, -100 elsewhere."""
    texts = []
    for name in rng.choices(list(tasks), shares, k=size):
        string = random_string(rng, held_out=False)
        texts.append(make_prompt(name, string) + tasks[name](string) + "</s>")
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    equals = ids == TOKEN_IDS["="]
    is_answer = (equals.cumsum(dim=1) > 0) & ~equals & (ids != TOKEN_IDS["<pad>"])
    return ids, ids.masked_fill(~is_answer, -100)


def perturb(
    parameters: list[torch.nn.Parameter], noise: float, generator: torch.Generator
) -> list[Tensor]:
    """Add noise to the parameters, relative to their spread; return what they were."""
    originals = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            spread = noise * parameter.std().item()
            parameter.add_(torch.empty_like(parameter).normal_(std=spread, generator=generator))
    return originals


def restore(parameters: list[torch.nn.Parameter], originals: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)


def train(
    model: LlamaForCausalLM,
    tasks: Mapping[str, Task],
    *,
    shares: list[float],
    steps: int,
    learning_rate: float,
    noise: float = 0.0,
    seed: int,
    batch_size: int = 128,
    warmup: int = 40,
) -> None:
    """Train the model in place on random strings, then round it to what bfloat16 can hold.

    With `noise`, every gradient is taken at randomly perturbed weights. The model then learns
    weights that do not mind changes, of which a merge makes some.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warmup) * decay
        ids, labels = make_batch(tasks, shares, batch_size, tokenizer, rng)
        originals = perturb(parameters, noise, generator) if noise else []
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        if noise:
            restore(parameters, originals)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    restore(parameters, [p.detach().bfloat16() for p in parameters])


def save(model: LlamaForCausalLM, directory: Path) -> None:
    """Save the model in bfloat16, with its tokenizer and generation config."""
    model.generation_config = GenerationConfig(
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
        pad_token_id=TOKEN_IDS["<pad>"],
        bos_token_id=TOKEN_IDS["<s>"],
        eos_token_id=TOKEN_IDS["</s>"],
    )
    model.bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    # The name of the class that all versions of transformers know.
    config_path = directory / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.float()  # nothing is lost: train() has rounded the weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tiny base model and two fine-tunes of it, to try merging with."
    )
    parser.add_argument("--output-dir", type=Path, default=HERE, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    start = time.perf_counter()
    base = make_model(torch.Generator().manual_seed(args.seed))
    print(f"base: {base.num_parameters()} parameters", flush=True)
    equal = [1.0] * len(BASE_TASKS)
    train(
        base,
        BASE_TASKS,
        shares=equal,
        steps=1200,
        learning_rate=3e-3,
        noise=0.1,
        seed=args.seed,
    )
    save(base, args.output_dir / "base")
    for number, (name, task) in enumerate(SKILLS.items(), start=1):
        print(f"{name}:", flush=True)
        model = make_model(torch.Generator())
        model.load_state_dict(base.state_dict())
        train(
            model,
            {**BASE_TASKS, name: task},
            shares=[*equal, sum(equal)],  # half of the batch rehearses what the base knows
            steps=250,
            learning_rate=5e-4,
            noise=0.15,
            seed=args.seed + number,
        )
        save(model, args.output_dir / name)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
