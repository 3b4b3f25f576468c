"""tools/preprocess_data.py: its bytes against Megatron's tokenizers and builder, its errors, what a kill leaves."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer

from archscale_megatron.data import jsonl, preprocess
from archscale_megatron.data.gigatoken_bpe import GigatokenTokenizer
from tests.data.models import LONG_DOCUMENTS, ODD_DOCUMENTS, corpus, save_tokenizer, train_bpe, train_sentencepiece
from tests.data.test_indexed import megatron_bytes

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    bpe = train_bpe(folder / "bpe")
    large = Tokenizer.from_file(f"{bpe}/tokenizer.json")
    large.add_tokens([f"<{i}>" for i in range(65_500)])
    return {
        "bpe": ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", bpe],
        "large": [
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"),
            save_tokenizer(large, folder / "large", eos_token="<|endoftext|>"),
        ],
        "sp": ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", train_sentencepiece(folder)],
        "bytes": ["--tokenizer-type", "ByteLevelTokenizer"],
    }


def write_jsonl(path, records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    suffix = path.suffix
    path.write_bytes(gzip.compress(data) if suffix == ".gz" else zstandard.compress(data) if suffix == ".zst" else data)
    return str(path)


def run(inputs, prefix, model, *options):
    return preprocess.main(["--input", *inputs, "--output-prefix", str(prefix), *model, "--workers", "2", *options])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def reference(model, texts, append_eod, prefix):
    """(bin, idx) from Megatron's own tokenizer and builder."""
    library = {"HuggingFaceTokenizer": "huggingface", "SentencePieceTokenizer": "sentencepiece"}.get(
        model[1], "byte-level"
    )
    path = {"tokenizer_path": model[3]} if len(model) > 2 else {}
    tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": library}, **path)
    documents = [list(tokenizer.tokenize(text)) for text in texts]
    documents = [ids + [tokenizer.eod] * append_eod if ids else ids for ids in documents]
    return megatron_bytes(str(prefix), documents, tokenizer.vocab_size)


@pytest.mark.parametrize(
    "name, append_eod", [("bpe", True), ("bpe", False), ("large", True), ("sp", True), ("bytes", True)]
)
def test_bytes_equal_megatron(tmp_path, models, name, append_eod, monkeypatch, capsys):
    """Two keys, three kinds of file, several batches per file, empty documents first and last."""
    monkeypatch.setattr(jsonl, "BATCH_BYTES", 100_000)
    documents = ["", *ODD_DOCUMENTS, *corpus()[-20:], *(LONG_DOCUMENTS if name != "large" else []), ""]
    records = [{"text": text, "id": i, "title": text[::-1][:100]} for i, text in enumerate(documents)]
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", records[:9])
    write_jsonl(folder / "2.jsonl.gz", records[9:20])
    write_jsonl(folder / "3.jsonl.zst", records[20:])
    inputs = [str(folder / "1.jsonl"), str(folder / "[23].*")]
    options = ["--json-keys", "text", "title", *["--append-eod"] * append_eod]
    assert run(inputs, tmp_path / "out" / "x", models[name], *options) == 0
    for key in ("text", "title"):
        expected = reference(models[name], [record[key] for record in records], append_eod, tmp_path / "theirs")
        ours = [(tmp_path / "out" / f"x_{key}_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]
        assert ours[0] == expected[0] and ours[1] == expected[1]
    assert files(tmp_path / "out") == [
        f"x_{key}_document.{kind}" for key in ("text", "title") for kind in ("bin", "idx")
    ]
    output = capsys.readouterr()
    dataset = IndexedDataset(str(tmp_path / "out" / "x_text_document"))
    assert f"{len(documents)} documents, {dataset.index.sequence_lengths.sum()} tokens" in output.out
    assert dataset.index.dtype == (np.int32 if name == "large" else np.uint16)
    backend = {"bpe": "gigatoken", "large": "gigatoken", "sp": "sentencepiece", "bytes": "bytes"}[name]
    assert f"{backend}: 100%" in output.err and "B/s" in output.err and "tokens]" in output.err


BAD = ['{"text": "cut', '{"no": "text"}', '{"text": 5}', '{"text": "\\ud800"}', "[]"]


@pytest.mark.parametrize("bad", BAD)
def test_bad_line_stops(tmp_path, models, bad, capsys):
    good = json.dumps({"text": "good"}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 3 + "\n" + bad + "\n" + good + "worse\n")
    assert run([str(tmp_path / "a.jsonl")], tmp_path / "x", models["bytes"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/a.jsonl:5: ") and "--on-bad-line skip" in error
    assert files(tmp_path) == ["a.jsonl"]


def test_bad_lines_skipped_and_counted(tmp_path, models, capsys):
    good = [json.dumps({"text": f"good {i}"}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(line for pair in zip(good, [*BAD, ""], strict=True) for line in pair))
    assert run([str(tmp_path / "a.jsonl")], tmp_path / "x", models["bytes"], "--on-bad-line", "skip") == 0
    captured = capsys.readouterr()
    assert "6 documents, 36 tokens" in captured.out
    assert f"skipped 5 bad lines, the first: {tmp_path}/a.jsonl:2: not JSON" in captured.err
    ours = tuple((tmp_path / f"x_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    assert ours == reference(models["bytes"], [f"good {i}" for i in range(6)], False, tmp_path / "theirs")


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        (["none.jsonl"], [], "none.jsonl: no such file"),
        (["none*.jsonl"], [], "none*.jsonl: no such file"),
        (["."], [], "no such file"),
        (["good.jsonl", "empty.jsonl"], ["--json-keys", "text", "blank"], "no tokens for"),
        (["empty.jsonl"], [], "has 0 documents with text and 0 bad lines"),
        (["bad.jsonl"], ["--on-bad-line", "skip"], "has 0 documents with text and 2 bad lines"),
        (["cut.jsonl.gz"], [], "cut.jsonl.gz: "),
        (["cut.jsonl.zst"], [], "cut.jsonl.zst: the zstd file is cut short"),
        (["good.jsonl"], ["--workers", "0"], "--workers 0: give 1 or more"),
        (["good.jsonl"], ["--json-keys", "text", "text"], "give each key once"),
    ],
)
def test_bad_input_is_one_line(tmp_path, models, monkeypatch, capsys, inputs, options, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("good.jsonl"), [{"text": "a", "blank": ""}])
    Path("empty.jsonl").write_text("\n \n")
    Path("bad.jsonl").write_text("bad\nbad\n")
    good = b'{"text": "a"}\n' * 1000
    Path("cut.jsonl.gz").write_bytes(gzip.compress(good)[:-10])
    Path("cut.jsonl.zst").write_bytes(zstandard.compress(good)[:-10])
    before = files(tmp_path)
    assert run(inputs, "x", models["bytes"], *options) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert files(tmp_path) == before


def test_no_end_token(tmp_path, models, capsys):
    model = save_tokenizer(Tokenizer.from_file(models["bpe"][3] + "/tokenizer.json"), tmp_path / "model")
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert run([data], tmp_path / "x", [*models["bpe"][:3], model], "--append-eod") == 1
    assert "has no end token" in capsys.readouterr().err


def test_existing_output_is_kept(tmp_path, models, capsys):
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in ("one", "second"))
    assert run([first], tmp_path / "x", models["bytes"]) == 0
    before = (tmp_path / "x_text_document.bin").read_bytes()
    assert run([second], tmp_path / "x", models["bytes"]) == 1
    assert "x_text_document.bin exists" in capsys.readouterr().err
    assert (tmp_path / "x_text_document.bin").read_bytes() == before
    assert run([second], tmp_path / "x", models["bytes"], "--overwrite") == 0
    assert len((tmp_path / "x_text_document.bin").read_bytes()) == 12


def test_mismatch_midway_starts_again_with_the_reference(tmp_path, models, monkeypatch, capsys):
    encode = GigatokenTokenizer.encode

    def wrong(self, texts):
        ids, lengths = encode(self, texts)
        return ids + any("ODD" in text for text in texts), lengths

    monkeypatch.setattr(GigatokenTokenizer, "encode", wrong)
    monkeypatch.setattr(jsonl, "BATCH_BYTES", 1000)
    texts = [f"document {i}" for i in range(500)] + [f"ODD {i}" for i in range(500)]
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert run([data], tmp_path / "x", models["bpe"]) == 0
    error = capsys.readouterr().err
    assert "gigatoken: its ids differ from those of tokenizers for the text 'ODD" in error and "starting again" in error
    ours = tuple((tmp_path / f"x_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx"))
    assert ours == reference(models["bpe"], texts, False, tmp_path / "theirs")


def test_kill_leaves_nothing_that_looks_finished(tmp_path, models):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in corpus() * 10])
    command = [sys.executable, TOOL, "--input", data, "--output-prefix", str(tmp_path / "x"), *models["sp"]]
    with subprocess.Popen([*command, "--workers", "1"], env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        partial = tmp_path / "x_text_document.bin.partial"
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert files(tmp_path) == ["a.jsonl", "x_text_document.bin.partial"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": "again"}])
    assert run([data], tmp_path / "x", models["bytes"]) == 0  # the remains are in nobody's way
    assert files(tmp_path) == ["a.jsonl", "x_text_document.bin", "x_text_document.idx"]
    assert (tmp_path / "x_text_document.bin").stat().st_size == 10


@pytest.mark.parametrize("name", ["bpe", "sp", "bytes"])
def test_no_import_of_torch_or_megatron(tmp_path, models, name):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    code = (
        "import sys; from archscale_megatron.data.preprocess import main; status = main(sys.argv[1:]);"
        "print({'torch', 'transformers', 'megatron'} & set(sys.modules)); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "--input", data, "--output-prefix", str(tmp_path / "x"), *models[name]]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
