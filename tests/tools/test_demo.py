"""The demo's own calculations and judgements; `make demo` runs the whole."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.launch import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import demo
from loss_curve import Curve, draw, smooth

LINES = [
    "> building train, validation, and test datasets ...",
    " [2026-01-31 03:39:42.270471] iteration        1/     220 | consumed samples:           16 | elapsed time per "
    "iteration (ms): 1861.7 | learning rate: 1.500000E-04 | global batch size:    16 | lm loss: 7.600171E+00 | loss "
    "scale: 1.0 | grad norm: 1.653 | number of skipped iterations:   0 |",
    " iteration        1 | tokens per second: 2,784 | model GFLOP/s per device: 10.5",
    " validation loss at iteration 1 | lm loss value: 5.071990E+00 | lm loss PPL: 1.594913E+02 | ",
]


def curve(first: int, losses: list[float]) -> Curve:
    iterations = list(range(first, first + len(losses)))
    return Curve(iterations, [demo.BATCH * i for i in iterations], losses, {iterations[-1]: losses[-1]})


def test_curve_reads_the_log_of_megatron():
    found = Curve()
    assert [found.read(line) for line in LINES] == [False, True, False, False]
    assert (found.iterations, found.samples, found.losses, found.validation) == ([1], [16], [7.600171], {1: 5.07199})


def test_unigram_entropy_against_loops():
    tokens = np.random.default_rng(0).geometric(0.05, 5000).astype(np.uint16)
    counts = Counter(tokens.tolist())
    expected = -math.fsum(n / 5000 * math.log(n / 5000) for n in counts.values())
    assert demo.unigram_entropy(tokens) == pytest.approx(expected, rel=1e-12)
    assert demo.unigram_entropy(np.arange(8, dtype=np.uint16)) == pytest.approx(math.log(8))


def test_smooth():
    found = smooth([float(i * i) for i in range(9)], reach=2)
    assert len(found) == 9
    assert found[0] == (0 + 1 + 4) / 3
    assert found[1] == (0 + 1 + 4 + 9) / 4
    assert found[4] == (4 + 9 + 16 + 25 + 36) / 5
    assert found[8] == (36 + 49 + 64) / 3


def test_check_continues():
    before = curve(1, [7.0] * 20 + [4.2] * 10)
    text = demo.check_continues(before, curve(31, [4.1] * 20))
    assert "4.200" in text and "4.100" in text and "480 -> 496" in text
    with pytest.raises(demo.DemoError, match="the curve breaks"):
        demo.check_continues(before, curve(31, [7.0] * 20))  # a model that was not loaded
    with pytest.raises(demo.DemoError, match="began at iteration 1 "):
        demo.check_continues(before, curve(1, [4.1] * 20))
    again = curve(31, [4.1] * 20)
    again.samples = [demo.BATCH * i for i in range(1, 21)]  # the data from its beginning
    with pytest.raises(demo.DemoError, match="480 samples"):
        demo.check_continues(before, again)


def test_last_words_are_those_of_the_program():
    lines = [f"line {i}" for i in range(30)] + ["ValueError: the reason"]
    report = ["E1121 /x/torch/distributed/elastic/api.py failed (exitcode: 1)", "Traceback", "ChildFailedError"]
    assert demo.last_words([*lines, *report], 3) == ["line 28", "line 29", "ValueError: the reason"]
    assert demo.last_words(lines, 2) == ["line 29", "ValueError: the reason"]
    assert demo.last_words(["only"], 5) == ["only"]


def test_training_that_fails_shows_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(demo.DemoError, match=r"exit code 3; the end of train.log:\n(  .*\n)*  \| the reason\n"):
        demo.run_logged(command, tmp_path / "train.log", Curve(), 0, 1)
    written = (tmp_path / "train.log").read_text()
    with pytest.raises(demo.DemoError, match="did not reach iteration 2"):
        demo.run_logged([sys.executable, "-c", f"print({LINES[1]!r})"], tmp_path / "train.log", Curve(), 0, 2)
    assert "the reason" in written


def test_fresh_directory_removes_only_an_earlier_demo(tmp_path):
    output = tmp_path / "demo"
    demo.fresh_directory(output)
    (output / "old").touch()
    demo.fresh_directory(output)
    assert [path.name for path in output.iterdir()] == [demo.MARKER]
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(demo.DemoError, match="not a demo's"):
        demo.fresh_directory(other)
    assert (other / "precious").is_file()


def test_corpus_is_in_order_and_without_tests(tmp_path):
    for name in ("b.py", "a.py", "a/x.py", "test/t.py", "site-packages/p.py", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [str(path.relative_to(tmp_path)) for path in demo.source_files(tmp_path)] == ["a/x.py", "a.py", "b.py"]
    texts = demo.write_corpus(tmp_path / "corpus.jsonl")
    assert [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").open()] == texts
    assert len(texts) > 300


def test_tokenizer_gives_the_text_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sentencepiece import SentencePieceProcessor

    monkeypatch.setattr(demo, "VOCABULARY", 600)
    text = "".join(path.read_text() for path in sorted((ROOT / "tools").glob("*.py")))
    demo.train_tokenizer([text], tmp_path / "tokenizer")
    tokenizer = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.get_piece_size() == 600
    for sample in (text, "\tif x:\r\n        y = '\u20ac'\n\n\n", "  leading and trailing  "):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_draw(tmp_path):
    draw(curve(1, [7.0, 6.0, 5.0]), curve(4, [4.0, 3.0]), 5.5, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
