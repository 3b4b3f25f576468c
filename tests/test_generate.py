"""Generation from a checkpoint: the same tokens whatever the layout that trained it, and one line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archscale_megatron.generate import DEFAULT_NEW_TOKENS, GenerateError, generate, new_tokens, pieces, sample
from tests.data.models import train_sentencepiece
from tests.launch import ROOT, torchrun

MODEL = (
    "--train-model sambay --depth 8 --aspect-ratio 8 --head-dim 8 --num-heads 8 --num-kv-heads 4 --local-window 8 "
    "--vocab-size 2000 --differential-attention --normalization LayerNorm --position-embedding-type rope "
    "--train-name scaling_tie_qknorm_bias_rbase"
)
TWO_STEPS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --save-interval 2 --lr 1e-2 "
    "--lr-warmup-iters 1 --eval-iters 0 --eval-interval 10 --use-distributed-optimizer"
)
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
PROMPT = "import os\n"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of the same two steps of training, on one process and on TP 2 x PP 2."""
    root = tmp_path_factory.mktemp("checkpoints")
    data = train_data(root)
    for name, processes, layout in (("single", 1, ""), ("tp2_pp2", 4, TP2_PP2)):
        options = f"{MODEL} {TWO_STEPS} {layout}".split()
        torchrun(processes, "pretrain_archscale.py", *options, *data, "--save", str(root / name))
    return {name: str(root / name) for name in ("single", "tp2_pp2")}


def train_data(directory: Path) -> list[str]:
    """Megatron's arguments for a small corpus and its tokenizer."""
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", train_sentencepiece(directory)]
    lines = directory / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": f"import os\nx = {i}\n" * 20}) + "\n" for i in range(20)))
    subprocess.run(
        [sys.executable, "tools/preprocess_data.py", *tokenizer, "--append-eod"]
        + ["--input", str(lines), "--output-prefix", str(directory / "text")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    return [*tokenizer, "--data-path", str(directory / "text_text_document"), "--split", "1,0,0"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, without torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "archscale_megatron.generate", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


WORKER = """
import json, sys
import torch
from archscale_megatron.generate import generate, load, prepare
prepare()
from megatron.core import dist_checkpointing
model, tokenizer, limit = load(sys.argv[1])
stored = dist_checkpointing.load_plain_tensors(sys.argv[1] + "/iter_0000002")
equal = {name: torch.equal(stored[name], value) for name, value in model.named_parameters() if name in stored}
options = dict(vocab_size=tokenizer.vocab_size, end=None, top_p=1.0)
ids = tokenizer.tokenize(sys.argv[2])
greedy = list(generate(model, ids, limit - len(ids), temperature=0.0, seed=0, **options))
sampled = [list(generate(model, ids, 8, temperature=1.0, seed=seed, **options)) for seed in (1, 1, 2)]
with torch.no_grad():  # one forward pass over all of it
    whole = torch.tensor([ids + greedy])
    logits = model(whole, torch.arange(whole.shape[1])[None], None)[0, :, : tokenizer.vocab_size]
forward = logits.argmax(-1)[len(ids) - 1 : -1].tolist()
text = tokenizer.detokenize(ids + greedy[:5])
found = dict(ids=ids, greedy=greedy, text=text, forward=forward, sampled=sampled, limit=limit, equal=equal)
print(json.dumps(found | dict(logits=logits[-1].tolist())))
"""


@pytest.fixture(scope="module")
def generated(checkpoints: dict[str, str]) -> dict[str, dict]:
    """What `WORKER` finds with each checkpoint."""
    found = {}
    for name, directory in checkpoints.items():
        finished = subprocess.run(
            [sys.executable, "-c", WORKER, directory, PROMPT],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        found[name] = json.loads(finished.stdout.splitlines()[-1])
    return found


def test_greedy_is_the_argmax_of_one_forward_pass(generated):
    found = generated["single"]
    assert found["limit"] == 32
    assert len(found["ids"] + found["greedy"]) == 32
    assert found["greedy"] == found["forward"]


def test_parameters_are_those_of_the_checkpoint(generated):
    for found in generated.values():
        assert {"embedding.word_embeddings.weight", "decoder.final_norm.weight"} <= set(found["equal"])
        assert all(found["equal"].values())


def test_same_seed_same_sample(generated):
    first, again, other = generated["single"]["sampled"]
    assert first == again != other


def test_checkpoint_of_another_layout_generates_the_same(generated):
    single, parallel = generated["single"], generated["tp2_pp2"]
    assert parallel["greedy"] == single["greedy"]
    assert parallel["sampled"] == single["sampled"]
    torch.testing.assert_close(torch.tensor(parallel["logits"]), torch.tensor(single["logits"]), rtol=1e-5, atol=1e-5)


def test_program(checkpoints, generated, tmp_path):
    """Both ways to start it print the prompt and the greedy continuation, and nothing else."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    options = ["--load", checkpoints["tp2_pp2"], "--temperature", "0", "--max-new-tokens", "5"]
    ours = run(*options, "--prompt", PROMPT)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == generated["single"]["text"] + "\n"
    launched = torchrun(1, "-m", "archscale_megatron.generate", *options, "--prompt-file", str(prompt))
    assert ours.stdout in launched.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "nowhere", "--prompt", "a"], "--load nowhere: no such directory"),
        (["--load", "tests", "--prompt", "a"], "--load tests: holds no checkpoint"),
        (["--load", "CHECKPOINT", "--prompt", ""], "the prompt is empty"),
        (["--load", "CHECKPOINT", "--prompt-file", "nothing.txt"], "nothing.txt"),
        (["--load", "CHECKPOINT", "--prompt", "\u00e9" * 40], " tokens; the model's sequence length is 32"),
        (["--load", "CHECKPOINT", "--prompt", "0", "--max-new-tokens", "32"], "sequence length, 32, leaves"),
        (["--load", "CHECKPOINT", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (["--load", "CHECKPOINT", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0"),
    ],
)
def test_bad_input_is_one_line(checkpoints, arguments, message):
    finished = run(*[checkpoints["single"] if a == "CHECKPOINT" else a for a in arguments])
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("generate: error: ") and message in line


def test_new_tokens():
    assert new_tokens(10, 1000, None) == DEFAULT_NEW_TOKENS
    assert new_tokens(10, 30, None) == 20
    assert new_tokens(10, 30, 20) == 20
    for prompt, wanted in ((0, 1), (30, None), (10, 21)):
        with pytest.raises(GenerateError):
            new_tokens(prompt, 30, wanted)


def test_sample_frequencies():
    """Against the probabilities that the definition gives, at a temperature and a nucleus."""
    logits = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0])
    generator = torch.Generator().manual_seed(0)
    weights = (logits.double() / 0.7).exp()
    probabilities = weights / weights.sum()  # ids 1, 3, 0, 4, 2 in order: .640, .314, .037, ...
    draws = 20_000
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.97, [0, 1, 3]), (0.9, [1, 3]), (0.5, [1]), (1e-9, [1])):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        ids = [sample(logits, 0.7, top_p, generator) for _ in range(draws)]
        found = torch.bincount(torch.tensor(ids), minlength=5) / draws
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().max() < 4 * 0.5 / draws**0.5  # four standard deviations at most


def test_sample_at_low_temperature_is_greedy():
    logits = torch.tensor([1.0, 90.0, 89.0])
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, temperature, 1.0, generator) for temperature in (0.0, 1e-3, 1e-30)} == {1}


def test_generate_stops_at_the_end_and_never_draws_padding():
    """A model that counts; its largest logit is a column of padding."""

    def model(tokens: torch.Tensor, positions: torch.Tensor, mask: None) -> torch.Tensor:
        assert positions.tolist() == [list(range(tokens.shape[1]))]
        logits = torch.zeros(1, tokens.shape[1], 8)
        logits[0, -1, tokens[0, -1] + 1] = 1.0
        logits[..., 7] = 2.0
        return logits

    options = {"vocab_size": 7, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert list(generate(model, [0], 3, end=None, **options)) == [1, 2, 3]
    assert list(generate(model, [0], 5, end=4, **options)) == [1, 2, 3]


def test_pieces_wait_for_whole_characters():
    text = "a\N{EURO SIGN}b\N{EURO SIGN}".encode()
    shown = list(pieces(lambda ids: bytes(ids).decode(errors="replace"), list(b"x"), text[:-1]))
    assert shown == ["a", "\N{EURO SIGN}", "b", "\N{REPLACEMENT CHARACTER}"]
