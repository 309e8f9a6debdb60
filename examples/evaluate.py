"""Measure what the models that make_models.py makes, or merges of them, can do.

    python examples/evaluate.py examples/base examples/reverse examples/upper MERGED

prints the percentage of strings, none of them seen in training, that each model answers exactly:
over all tasks of the base, and for either skill.
"""

import argparse
import random
from pathlib import Path

import torch
from make_models import BASE_TASKS, MAX_ANSWER, SKILLS, make_prompt, random_string
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

COLUMNS = {"base tasks": BASE_TASKS, **{name: {name: task} for name, task in SKILLS.items()}}
PER_COLUMN = 300


def make_questions() -> list[tuple[str, str, str]]:
    """Return (column, prompt, answer) triples, the same at every call."""
    rng = random.Random(0)
    questions = []
    for column, tasks in COLUMNS.items():
        names = list(tasks)
        for i in range(PER_COLUMN):
            name = names[i % len(names)]
            string = random_string(rng, held_out=True)
            questions.append((column, make_prompt(name, string), tasks[name](string)))
    return questions


def answer(directory: Path, prompts: list[str]) -> list[str]:
    """Return the model's greedy continuations of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
    )
    continuations = outputs[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in continuations]


def score(directory: Path, questions: list[tuple[str, str, str]]) -> dict[str, float]:
    """Return the percentage of exact answers by column."""
    answers = answer(directory, [prompt for _, prompt, _ in questions])
    hits = dict.fromkeys(COLUMNS, 0)
    for given, (column, _, expected) in zip(answers, questions, strict=True):
        hits[column] += given == expected
    return {column: 100 * count / PER_COLUMN for column, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Test the skills of the example models.")
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="a model")
    args = parser.parse_args()
    logging.disable_progress_bar()
    questions = make_questions()
    title = "exact answers, %"
    width = max(len(title), *(len(str(directory)) for directory in args.directories))
    print(title.ljust(width), *(column.rjust(10) for column in COLUMNS))
    for directory in args.directories:
        scores = score(directory, questions)
        print(str(directory).ljust(width), *(f"{scores[c]:10.1f}" for c in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
