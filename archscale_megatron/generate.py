"""Continue a text with a model from a training checkpoint, in one process.

    python -m archscale_megatron.generate --load DIR --prompt "def main("
    torchrun --nproc-per-node 1 -m archscale_megatron.generate --load DIR --prompt-file FILE

The checkpoint may come from any parallel layout. Every token recomputes the whole sequence, without key-value or
state caches, so that what is sampled is exactly what was trained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale_megatron import single_process

DEFAULT_NEW_TOKENS = 128
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, beside the checkpoints

# What decides the model and its numbers, besides our own group of arguments. The layout and the machine's choices
# (kernels, backend) are made anew.
KEPT_FROM_TRAINING = (
    "seq_length", "max_position_embeddings", "vocab_size", "untie_embeddings_and_output_weights",
    "make_vocab_size_divisible_by", "bf16", "fp16", "tokenizer_type", "tokenizer_model",
    "parametrization",
)  # fmt: skip


class GenerateError(Exception):
    """Something that the user gave cannot be used; the message is one line."""


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit code: 2 for bad input."""
    options = parser().parse_args(argv)
    try:
        check(options)
        prompt = read_prompt(options)
        prepare()
        model, tokenizer, limit = load(options.load, options.tokenizer_model)
        ids = tokenizer.tokenize(prompt)
        count = new_tokens(len(ids), limit, options.max_new_tokens)
    except GenerateError as error:
        print(f"generate: error: {error}", file=sys.stderr)
        return 2
    continuation = generate(
        model,
        ids,
        count,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.eod,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(prompt, end="", flush=True)
    for text in pieces(tokenizer.detokenize, ids, continuation):
        print(text, end="", flush=True)
    print()
    torch.distributed.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate", description=__doc__.splitlines()[0])
    parser.add_argument("--load", required=True, metavar="DIR", help="what training was given as --save")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="text to continue")
    text.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file with the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"({DEFAULT_NEW_TOKENS}, or what the sequence length leaves)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it was moved")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises GenerateError for a number that is out of range, or a checkpoint that is not there."""
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise GenerateError(f"--max-new-tokens {options.max_new_tokens}: must be 1 or more")
    if not options.temperature >= 0:
        raise GenerateError(f"--temperature {options.temperature}: must be 0 or more")
    if not 0 < options.top_p <= 1:
        raise GenerateError(f"--top-p {options.top_p}: must be above 0 and at most 1")
    if not Path(options.load).is_dir():
        raise GenerateError(f"--load {options.load}: no such directory")
    if not (Path(options.load) / TRACKER).is_file():
        raise GenerateError(
            f"--load {options.load}: holds no checkpoint (no {TRACKER}); give what training was given as --save"
        )


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt; raises GenerateError if it is empty or cannot be read."""
    prompt = options.prompt
    if options.prompt_file is not None:
        try:
            prompt = Path(options.prompt_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GenerateError(f"--prompt-file {options.prompt_file}: {error}") from None
    if not prompt:
        raise GenerateError("the prompt is empty; give at least one character")
    return prompt


def prepare() -> None:
    """Before the first import of Megatron; raises GenerateError if torchrun started several processes."""
    try:
        single_process.prepare()
    except ValueError as error:
        raise GenerateError(str(error)) from None


def load(directory: str, tokenizer_model: str | None = None) -> tuple[torch.nn.Module, Any, int]:
    """The model of the latest checkpoint in `directory`, its Megatron tokenizer, and the longest sequence (tokens).

    Makes Megatron's global arguments and process groups, of one process.

    Raises:
        GenerateError: the tokenizer is not where it was, or the checkpoint belongs to another architecture.
    """
    from megatron.core.enums import ModelType
    from megatron.training.arguments import validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.global_vars import get_tokenizer, set_global_variables
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from archscale_megatron.training.run_directory import check_run_directories
    from archscale_megatron.training.step import model_provider

    # Megatron reports each of its thousand arguments.
    with contextlib.redirect_stdout(io.StringIO()):
        args = single_process_arguments(directory)
        args.tokenizer_model = tokenizer_model or args.tokenizer_model
        try:
            check_run_directories(args)
        except ValueError as error:
            raise GenerateError(str(error)) from None
        validate_args(args)
        try:
            set_global_variables(args)
        except Exception as error:  # each tokenizer library has its own errors
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise GenerateError(
                f"the checkpoint's {args.tokenizer_type} {args.tokenizer_model} cannot be loaded ({reason}); "
                "give its path as --tokenizer-model"
            ) from error
        # Megatron takes the group that is there, and would open a port.
        torch.distributed.init_process_group(
            args.distributed_backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        initialize_megatron()
        model = get_model(model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
        load_checkpoint(model, None, None)
    return model[0].eval(), get_tokenizer(), args.max_position_embeddings


def single_process_arguments(directory: str) -> argparse.Namespace:
    """Megatron's arguments for the model of a checkpoint directory on one process, as training would parse them."""
    from megatron.core import dist_checkpointing
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename, read_metadata

    from archscale_megatron.training.arguments import add_arguments, apply_arguments
    from archscale_megatron.training.megatron_options import MEGATRON_OPTIONS

    iteration, release = read_metadata(get_checkpoint_tracker_filename(directory))
    checkpoint = get_checkpoint_name(directory, iteration, release, return_base_dir=True)
    trained = dist_checkpointing.load_common_state_dict(checkpoint)["args"]

    command_line, sys.argv = sys.argv, sys.argv[:1]  # parse_args reads it, and only there
    try:
        args = parse_args(add_arguments)
    finally:
        sys.argv = command_line
    ours = [action.dest for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions]
    for name in (*ours, *KEPT_FROM_TRAINING):
        setattr(args, name, getattr(trained, name, getattr(args, name)))  # an older checkpoint knows fewer options
    args.train_name = None  # training has expanded it
    args.load, args.micro_batch_size, args.mock_data = directory, 1, True
    args.no_load_optim = args.no_load_rng = True
    explicit = {}
    for name in (*MEGATRON_OPTIONS, "position_embedding_type"):
        setattr(args, name, getattr(trained, name))
        explicit[name] = name
    if trained.architecture.rotary_base is not None:
        args.rotary_base, explicit["rotary_base"] = trained.rotary_base, "--rotary-base"
    apply_arguments(args, explicit)
    args.exit_signal_handler = False  # SIGTERM ends this program: there is nothing to save
    return args


def new_tokens(prompt: int, limit: int, wanted: int | None) -> int:
    """How many tokens to generate; raises GenerateError if there is no room for as many as are wanted."""
    if prompt == 0:
        raise GenerateError("the prompt has no tokens; give at least one visible character")
    room = limit - prompt
    if room < 1:
        raise GenerateError(f"the prompt has {prompt} tokens; the model's sequence length is {limit}: shorten it")
    if wanted is not None and wanted > room:
        raise GenerateError(
            f"--max-new-tokens {wanted}: after a prompt of {prompt} tokens the model's sequence length, {limit}, "
            f"leaves {room}"
        )
    return wanted or min(DEFAULT_NEW_TOKENS, room)


@torch.inference_mode()
def generate(
    model: Callable[..., Tensor],
    ids: list[int],
    count: int,
    *,
    vocab_size: int,
    end: int | None,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Sample up to `count` ids that follow `ids`; stops before the id `end`.

    Args:
        model: (tokens, position_ids, attention_mask), int64 [1, s] twice and None, -> logits [1, s, >= vocab_size];
            columns from `vocab_size` on are padding and never drawn.
        temperature, top_p: see `sample`.
        seed: of a random generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    device = torch.cuda.current_device()
    tokens = torch.tensor([ids], device=device)
    for _ in range(count):
        positions = torch.arange(tokens.shape[1], device=device)[None]
        logits = model(tokens, positions, None)[0, -1, :vocab_size]
        token = sample(logits.float().cpu(), temperature, top_p, generator)
        if token == end:
            return
        yield token
        tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw an id from `softmax(logits / temperature)`, the most likely one at temperature 0.

    With `top_p` below 1, only from the fewest likeliest ids whose probabilities sum to `top_p` or more
    (nucleus sampling, arXiv 1904.09751, section 3.1).

    Args:
        logits: fp32 [vocab] on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    # Less the largest first: divided by a tiny temperature it stays finite.
    probabilities, order = ((logits - logits.max()) / temperature).softmax(0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def pieces(detokenize: Callable[[list[int]], str], prompt: list[int], continuation: Iterable[int]) -> Iterator[str]:
    """The text of each id as it comes; bytes of a character wait for the rest of it."""
    ids, shown = list(prompt), detokenize(prompt)
    for token in continuation:
        ids.append(token)
        text = detokenize(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    if (text := detokenize(ids)) != shown:
        yield text[len(shown) :]


if __name__ == "__main__":
    sys.exit(main())
