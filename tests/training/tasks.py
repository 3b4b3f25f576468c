"""Tasks of lm-eval over local files, one of each kind of request; the one with choices also draws random numbers."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = "small_choices,small_texts,small_answers"
UTILS = """
import random

import numpy
import torch


def text(document):
    random.random(), numpy.random.rand(), torch.rand(3)
    return document["text"]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: {text}
"""
KINDS = {
    "small_choices": """
output_type: multiple_choice
doc_to_choice: [" import", " return", "x"]
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "small_texts": """
output_type: loglikelihood_rolling
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""",
    "small_answers": """
output_type: generate_until
doc_to_target: text
generation_kwargs: {max_gen_toks: 3, until: ["!"]}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(directory: Path) -> Path:
    """Returns `directory`."""
    directory.mkdir()
    texts = ["import os", "def main():\n    pass", "class A:\n    x = 1", "a = [1, 2]\n", "# words", "return x + 1"]
    lines = [json.dumps({"text": text, "answer": i % 3}) for i, text in enumerate(texts)]
    (directory / "items.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "utils.py").write_text(UTILS)
    for name, kind in KINDS.items():
        text = {"small_choices": "!function utils.text", "small_texts": '""'}.get(name, "text")
        common = TASK.format(name=name, file=directory / "items.jsonl", text=text)
        (directory / f"{name}.yaml").write_text(common + kind)
    lost = TASK.format(name="small_lost", file=directory / "lost.jsonl", text="text") + KINDS["small_texts"]
    (directory / "small_lost.yaml").write_text(lost)
    return directory
