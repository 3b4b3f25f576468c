"""Generation: the same text from a checkpoint of any layout, and from its exports; one line for bad input."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from archscale_megatron.generate import Decoder, Streamer, main
from archscale_megatron.hf.export import export
from archscale_megatron.hf.loading import load
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
    """Directories of the same two steps of training, on one process and on TP 2 x PP 2, and exports of the second."""
    root = tmp_path_factory.mktemp("checkpoints")
    data = train_data(root)
    for name, processes, layout in (("single", 1, ""), ("tp2_pp2", 4, TP2_PP2)):
        options = f"{MODEL} {TWO_STEPS} {layout}".split()
        torchrun(processes, "pretrain_archscale.py", *options, *data, "--save", str(root / name))
    for name in ("archscale", "whole"):
        export(
            root / "tp2_pp2", root / name, format="archscale", max_shard_bytes=10_000 if name == "archscale" else 10**9
        )
    return {name: str(root / name) for name in ("single", "tp2_pp2", "archscale", "whole")}


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


GREEDY = ["--temperature", "0", "--max-new-tokens", "12"]


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_every_source_says_the_same(checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    texts = {name: text_of(capsys, "--load", path, "--prompt", PROMPT, *GREEDY) for name, path in checkpoints.items()}
    one = str(Path(checkpoints["single"]) / "iter_0000002")
    texts["one checkpoint"] = text_of(capsys, "--load", one, "--prompt", PROMPT, *GREEDY)
    assert len(set(texts.values())) == 1
    assert texts["single"].startswith(PROMPT) and len(texts["single"]) > len(PROMPT) + 2


def test_greedy_is_the_argmax_of_one_forward_pass(
    checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(Path(checkpoints["tp2_pp2"]))
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    length = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            following = loaded.model(ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
        if following in loaded.end:
            break
    assert ids.shape[1] > length + 1
    text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert text_of(capsys, "--load", checkpoints["tp2_pp2"], "--prompt", PROMPT, *GREEDY) == text


def test_parameters_are_those_of_the_checkpoint(checkpoints: dict[str, str]) -> None:
    """Bit for bit, through an export in shards as well; half where it is asked for, but not what a scan needs."""
    state, sharded = (load(Path(checkpoints[name])).model.state_dict() for name in ("tp2_pp2", "archscale"))
    assert state.keys() == sharded.keys()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in state.items())
    for name in ("tp2_pp2", "archscale"):
        half = load(Path(checkpoints[name]), dtype=torch.bfloat16).model.state_dict()
        for key, tensor in half.items():
            kept = key.endswith((".A_log", ".D", ".dt_proj.bias"))
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), key
            assert torch.equal(tensor, state[key].to(tensor.dtype)), key


def test_batches_of_prompts(checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of several lengths, each continued as it is alone."""
    prompts = [PROMPT, "x", "import os\nx = 3\nimport", "x = 1"]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(prompts)))
    options = ["--load", checkpoints["archscale"], *GREEDY]
    assert text_of(capsys, *options, "--prompts", str(source), "--output", str(output), "--batch-size", "3") == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    for prompt, line in zip(prompts, lines, strict=True):
        assert line["prompt"] + line["text"] + "\n" == text_of(capsys, *options, "--prompt", prompt)
        assert line["ended"] or line["tokens"] == 12
    plain = tmp_path / "prompts.txt"
    plain.write_text("x\n\nx = 1\n")
    printed = [json.loads(line) for line in text_of(capsys, *options, "--prompts", str(plain)).splitlines()]
    assert [line["text"] for line in printed] == [lines[1]["text"], lines[3]["text"]]
    with pytest.raises(SystemExit):
        main([*options, "--prompts", str(source), "--output", str(output)])
    assert "is there already" in capsys.readouterr().err


def test_samples(checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--load", checkpoints["archscale"], "--prompt", PROMPT, "--max-new-tokens", "8"]
    first, again, other = (text_of(capsys, *options, "--seed", seed) for seed in "112")
    assert first == again != other
    lines = [json.loads(line) for line in text_of(capsys, *options, "--samples", "5").splitlines()]
    assert len(lines) == 5 and len({line["text"] for line in lines}) > 1
    greedy = text_of(capsys, *options, "--temperature", "0")
    for narrow in (["--top-k", "1"], ["--top-p", "1e-9"], ["--temperature", "1e-4"]):
        assert text_of(capsys, *options, *narrow) == greedy
    penalised = text_of(capsys, *options, "--temperature", "0", "--repetition-penalty", "1e9")
    ids = load(Path(checkpoints["archscale"])).tokenizer(penalised.removesuffix("\n")).input_ids
    assert penalised != greedy and len(set(ids)) > len(ids) // 2


def test_stop(checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--load", checkpoints["archscale"], "--prompt", PROMPT, "--max-new-tokens", "20", "--seed", "3"]
    text = text_of(capsys, *options).removeprefix(PROMPT).removesuffix("\n")
    stop = text[4:7]
    assert stop not in PROMPT + text[:6]
    stopped = text_of(capsys, *options, "--stop", stop, "--stop", "never").removeprefix(PROMPT).removesuffix("\n")
    assert text.startswith(stopped) and stop in stopped and len(stopped) < len(text)


def test_program(checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user starts it: it prints the text and nothing else, and does not start Megatron."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    options = ["--load", checkpoints["tp2_pp2"], *GREEDY]
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "archscale_megatron.generate", *options]
        + ["--prompt-file", str(prompt)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == text_of(capsys, *options, "--prompt", PROMPT)
    assert "| megatron.core" not in finished.stderr and "| transformers" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "nowhere", "--prompt", "a"], "--load nowhere: no such directory"),
        (["--load", "tests", "--prompt", "a"], "tests: holds no checkpoint"),
        (["--load", "CHECKPOINT", "--prompt", ""], "a prompt is empty"),
        (["--load", "CHECKPOINT", "--prompt-file", "nothing.txt"], "nothing.txt: cannot be read"),
        (["--load", "CHECKPOINT", "--prompts", "BAD"], 'give an object with a text "prompt"'),
        (["--load", "CHECKPOINT", "--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        (["--load", "CHECKPOINT", "--prompt", "a", "--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--load", "CHECKPOINT", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--load", "CHECKPOINT", "--prompt", "a", "--tokenizer-model", "none"], "none"),
    ],
)
def test_bad_input_is_one_line(
    checkpoints: dict[str, str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    given = {"CHECKPOINT": checkpoints["single"], "BAD": str(tmp_path / "bad.jsonl")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([given.get(argument, argument) for argument in arguments])
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert stopped.value.code == 2 and captured.out == ""
    assert line.startswith("generate: error: ") and message in line


def test_streamer_waits_for_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens that are single bytes."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: i for i, character in enumerate(sorted(alphabet))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    streamer = Streamer(type("Fast", (), {"backend_tokenizer": backend}))
    streamer.put(torch.tensor([backend.encode("x ").ids]))
    shown = []
    for one in backend.encode("a\N{EURO SIGN} b").ids:
        streamer.put(torch.tensor([one]))
        shown.append(capsys.readouterr().out)
    streamer.end()
    assert shown == ["a", "", "", "\N{EURO SIGN}", " ", "b"]


def test_bytes_that_are_no_text() -> None:
    """Of a run of bytes, one by one, those before may become unreadable by the next; what is readable is all there."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"std": 256, "\u2581ab": 257}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokenizer = type("Fast", (), {"backend_tokenizer": backend})

    def text(*ids: int) -> str:
        decoder = Decoder(tokenizer, [256])
        return "".join(map(decoder.step, ids))

    assert text(ord("p"), 0xFF, 256, 257, ord("q")).endswith("std abq")
    assert text(257, *"a\N{EURO SIGN}b".encode(), 256) == " aba\N{EURO SIGN}bstd"
    numbers = random.Random(1)
    for _ in range(200):
        assert text(*(numbers.randrange(258) for _ in range(20)), 256).endswith("std")
