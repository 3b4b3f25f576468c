"""Continue texts with a model from a training checkpoint or an exported folder.

    python -m archscale_megatron.generate --load PATH --prompt "def main("
    python -m archscale_megatron.generate --load PATH --prompts prompts.jsonl --output texts.jsonl

The checkpoint may come from any parallel layout; Megatron is not started, and no code of a folder is run. A single text
is printed as it comes; many are continued in batches, a line of JSON each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from archscale_megatron.command_line import Parser, run, start

DEFAULT_NEW_TOKENS = 128
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and what its line of JSON says besides."""

    text: str
    fields: dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code, or exits with 2 and one line on standard error for bad input."""
    parser = _parser()
    args = parser.parse_args(arguments)
    args.run = _run
    return run(parser, args)


def _parser() -> Parser:
    parser = Parser(prog="python -m archscale_megatron.generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="what training had as --save, a checkpoint, or an export",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 file with the text to continue")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help='many: a line each, plain, or JSON with "prompt" in a .jsonl file'
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="new file for the lines of --prompts (printed)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of --prompts (8)")
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="(128)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="divides the logits of tokens that were there (1)"
    )
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end behind this text; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are stored)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it was moved")
    return parser


def _run(args: argparse.Namespace) -> None:
    check(args)
    prompts = read_prompts(args)

    import torch

    from archscale_megatron.hf.export import DTYPES as TORCH
    from archscale_megatron.hf.loading import load

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(args.load, dtype=TORCH.get(args.dtype), device=device, tokenizer_model=args.tokenizer_model)
    texts = Texts(loaded, args)
    if not args.prompts and args.samples == 1:
        texts.stream(prompts[0])
        return
    with _output(args.output) as file:
        for line in texts.lines(prompts, args.batch_size):
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that is out of range, or an output that is there."""
    for name in ("batch_size", "max_new_tokens", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature}: must be 0 or more")
    if args.temperature == 0 and args.samples > 1:
        raise ValueError(f"--samples {args.samples}: at --temperature 0 all are the same; give a temperature")
    if args.top_k < 0:
        raise ValueError(f"--top-k {args.top_k}: must be 0, which is all, or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if not args.repetition_penalty > 0:
        raise ValueError(f"--repetition-penalty {args.repetition_penalty}: must be above 0")
    if args.output and not args.prompts:
        raise ValueError("--output is for --prompts; a single text is printed")
    if args.output and args.output.exists():
        raise ValueError(f"--output {args.output}: is there already; give a new file")
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such directory")


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """What is to be continued; raises ValueError if one is empty or cannot be read."""
    path = args.prompt_file or args.prompts
    try:
        text = args.prompt if path is None else path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not args.prompts:
        prompts = [Prompt(text, {})]
    elif path.suffix == ".jsonl":
        prompts = [_of_json(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line]
    else:
        prompts = [Prompt(line, {}) for line in text.splitlines() if line]
    if not prompts or not all(prompt.text for prompt in prompts):
        raise ValueError(f"{path or '--prompt'}: a prompt is empty; give at least one character")
    return prompts


def _of_json(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError(f'{where}: give an object with a text "prompt"')
    return Prompt(fields.pop("prompt"), fields)


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("x", encoding="utf-8") as file:
            yield file


class Texts:
    """Continuations by a loaded model, with the options of the command line."""

    def __init__(self, loaded: Any, args: argparse.Namespace) -> None:
        import torch
        from transformers import GenerationConfig

        torch.manual_seed(args.seed)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._end, self._samples, self._stop = set(loaded.end), args.samples, args.stop
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        # A model's own defaults for sampling do not count.
        self._config = GenerationConfig(
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0,
            **(sampling if args.temperature > 0 else {}),
            repetition_penalty=args.repetition_penalty,
            num_return_sequences=args.samples,
            eos_token_id=list(loaded.end) or None,
            pad_token_id=loaded.end[0] if loaded.end else 0,
            stop_strings=args.stop,
        )

    def stream(self, prompt: Prompt) -> None:
        """Print the prompt and its continuation, each token as it comes."""
        print(prompt.text, end="", flush=True)
        self._continue([prompt], streamer=Streamer(self._tokenizer))
        print()

    def lines(self, prompts: list[Prompt], batch_size: int) -> Iterator[dict[str, Any]]:
        """For each continuation the fields of its prompt, "prompt", "text", its number of "tokens" and whether it
        "ended" before there were as many as there may be."""
        from tqdm import tqdm

        if self._stop and not self._end:
            batch_size = 1  # a text that has stopped could not be told from the padding behind it
        with tqdm(total=len(prompts), unit="prompt", disable=None) as progress:
            for first in range(0, len(prompts), batch_size):
                batch = prompts[first : first + batch_size]
                for i, (before, ids) in enumerate(self._continue(batch)):
                    prompt = batch[i // self._samples]
                    decoder = Decoder(self._tokenizer, before)
                    text = "".join(map(decoder.step, ids))
                    ended = ids[-1] in self._end or len(ids) < self._config.max_new_tokens
                    yield prompt.fields | {"prompt": prompt.text, "text": text, "tokens": len(ids), "ended": ended}
                progress.update(len(batch))

    def _continue(self, prompts: list[Prompt], streamer: Any = None) -> list[tuple[list[int], list[int]]]:
        """The ids of each prompt and those behind it, the end's included; `samples` of them a prompt."""
        import torch

        ids = [self._tokenizer(prompt.text).input_ids for prompt in prompts]
        for prompt, one in zip(prompts, ids, strict=True):
            if not one:
                raise ValueError(f"the prompt {prompt.text!r} has no tokens; give at least one visible character")
        self._warn(max(map(len, ids)))
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(one)) + one for one in ids])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
        device = self._model.device
        with torch.inference_mode():
            whole = self._model.generate(
                padded.to(device), attention_mask=mask.to(device), generation_config=self._config,
                streamer=streamer, **({"tokenizer": self._tokenizer} if self._stop else {}),
            )  # fmt: skip
        rows = enumerate(whole[:, width:].tolist())
        return [(ids[i // self._samples], self._until_end(row)) for i, row in rows]

    def _until_end(self, ids: list[int]) -> list[int]:
        """Without the padding behind the first end."""
        ends = [i for i, one in enumerate(ids) if one in self._end]
        return ids[: ends[0] + 1] if ends else ids

    def _warn(self, longest: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit and longest + self._config.max_new_tokens > limit:
            print(
                f"generate: note: {longest} tokens and {self._config.max_new_tokens} new ones are more than the "
                f"{limit} that the model was trained on",
                file=sys.stderr,
            )


class Decoder:
    """Text of ids as they come: a space stays at its start, bytes of a character wait for the rest of it."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._waiting: list[int] = []
        self._begin(prompt)

    def step(self, token: int) -> str:
        """What the next id adds."""
        self._waiting.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as error:  # tokenizers has no class for it
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that are no UTF-8 may read otherwise with the next ones behind them; the stream ends there.
            text = self._tokenizer.decode(self._waiting, skip_special_tokens=True)
            self._begin([token])
        if text:
            self._waiting.clear()
        return text or ""

    def _begin(self, ids: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)


class Streamer:
    """Prints what `generate` of transformers hands it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder: Decoder | None = None

    def put(self, value: Any) -> None:
        """The prompt first, then a token at a time."""
        ids = value.flatten().tolist()
        if self._decoder is None:
            self._decoder = Decoder(self._tokenizer, ids)
            return
        print(*map(self._decoder.step, ids), sep="", end="", flush=True)

    def end(self) -> None:
        """Called behind the last token."""


if __name__ == "__main__":
    start(main)
