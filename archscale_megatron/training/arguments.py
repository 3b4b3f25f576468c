"""Command-line arguments: Megatron's, and one group of ours that says what the model is.

`--train-model F --depth D` sets every dimension. A Megatron flag that says otherwise is an error; a layout that
the model cannot have is one too, before any process group is made.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.options import add_overrides, overrides
from archscale_megatron.layers.backend import backend_for
from archscale_megatron.mup.rules import Parametrization
from archscale_megatron.optimizers.arguments import set_optimizer
from archscale_megatron.training import eval_tasks, spikes
from archscale_megatron.training.experts import set_experts
from archscale_megatron.training.hyperparameters import set_hyperparameters
from archscale_megatron.training.layout import check_layout, layer_pattern
from archscale_megatron.training.megatron_options import (
    FIXED,
    MEGATRON_OPTIONS,
    defaults,
    refuse_contradictions,
)
from archscale_megatron.training.spellings import (
    add_hyperparameters,
    add_underscored,
    apply_resume,
    read_spellings,
)
from archscale_megatron.training.train_name import apply_train_name

CHUNKED_ABOVE = 100_000  # entries of the vocabulary, as in ArchScale
# Options of Megatron's that reach its output layer and loss alone, which the chunked loss goes without.
PLAIN_LOSS_ONLY = ("cross_entropy_loss_fusion", "defer_embedding_wgrad_compute", "tensor_parallel_num_weight_shards")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our group. Everything else is Megatron's."""
    group = parser.add_argument_group("archscale", "the architecture, and overrides of its family's numbers")
    group.add_argument("--train-model", help=f"architecture family (required): {', '.join(FAMILIES)}")
    group.add_argument("--depth", type=int, help="layers, each a mixer and an MLP (required)")
    add_overrides(group)
    group.add_argument(
        "--cross-entropy",
        choices=("auto", "plain", "chunked"),
        default="auto",
        help=f"the loss from all logits, or from blocks of the vocabulary; auto: that above {CHUNKED_ABOVE:,} entries",
    )
    group.add_argument("--label-smoothing", type=float, default=0.0, help="in training and validation loss (0)")
    spikes.add_options(group)
    eval_tasks.add_options(group)
    group.add_argument(
        "--global-aux", action="store_true", help="balance the experts' load over all data-parallel ranks"
    )
    group.add_argument("--reset-at-eod", action="store_true", help="no layer looks beyond an end-of-document token")
    group.add_argument("--train-name", help="an ArchScale run name, such as scaling_tie_varlen: its words are options")
    group.add_argument(
        "--keep-last",
        type=int,
        metavar="N",
        help="delete all checkpoints but the last N, and each --save-retain-interval iterations one (keep all)",
    )
    add_hyperparameters(group)
    add_underscored(group)
    parser.set_defaults(parametrization=Parametrization())
    return parser


def parse_arguments() -> argparse.Namespace:
    """Parse and check `sys.argv`, and make the result Megatron's global arguments.

    Exits with code 2 and one line on standard error if something is wrong.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from archscale_megatron.checkpoint.resume import check_load, split_load
    from archscale_megatron.checkpoint.run_directory import check_run_directories, check_writable, write_architecture
    from archscale_megatron.checkpoint.safe_pickle import check_loadable
    from archscale_megatron.data.datasets import check_data

    args, explicit = parse_command_line()
    with exit_on_error("pretrain_archscale", args):
        apply_arguments(args, explicit)
        check_schedule(args)
        check_retention(args)
        check_data(args)
        apply_resume(args)
        split_load(args)
        check_run_directories(args)
        check_load(args)
        if args.save and args.rank == 0:
            check_writable(args.save)
        validate_args(args)
        set_global_variables(args)
        check_tokenizer(args)
        eval_tasks.load(args)
        if args.save and args.rank == 0:
            check_loadable(args, "these arguments")
            write_architecture(args.save, args.architecture)
    return args


def parse_command_line() -> tuple[argparse.Namespace, dict[str, str]]:
    """`sys.argv` as Megatron parses it, and what of it was given (see `explicit_options`)."""
    from megatron.training.arguments import parse_args

    parsers: list[argparse.ArgumentParser] = []

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        return add_arguments(parser)

    return parse_args(provider), explicit_options(parsers[0])


@contextlib.contextmanager
def exit_on_error(program: str, args: argparse.Namespace) -> Iterator[None]:
    """An error of the arguments ends the process with code 2, and on rank 0 with one line on standard error."""
    try:
        yield
    except (AssertionError, OSError, ValueError) as error:
        if args.rank == 0:
            # Some of Megatron's assertions have no message: then what it asserted.
            message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def explicit_options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Attribute -> option, of all options that stand on the command line."""
    given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    return {parser._option_string_actions[o].dest: o for o in given if o in parser._option_string_actions}


def apply_arguments(args: argparse.Namespace, explicit: dict[str, str]) -> None:
    """Set Megatron's arguments to what the architecture, the layout and the machine need.

    Args:
        args: as Megatron parsed them; changed in place, `args.architecture` is new.
        explicit: what the user gave (see `explicit_options`).
    Raises:
        ValueError: something contradicts something else.
    """
    read_spellings(args, explicit)
    _require(args, "train_model", "depth", "seq_length", "micro_batch_size")
    named = apply_train_name(args, explicit)
    explicit = {name: "--train-name" for name in named if name != "rotary_base"} | explicit
    arch = args.architecture = build_architecture(
        args.train_model,
        args.depth,
        rope=_rope(args, explicit),
        rotary_base=args.rotary_base if "rotary_base" in explicit else None,
        context_length=args.seq_length,
        vocab_size=args.vocab_size,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        **overrides(args),
        **{field: getattr(args, name) for name, field in MEGATRON_OPTIONS.items() if name in explicit},
    )
    if arch.rotary_base is not None:  # the word rbase, unlike the option, may be said of any model
        arch = args.architecture = replace(arch, rotary_base=named.get("rotary_base", arch.rotary_base))
    refuse_contradictions(args, arch, explicit)
    check_layout(args, arch)
    set_hyperparameters(args, arch, explicit)
    arch = args.architecture = args.parametrization.apply(arch)
    _choose_loss(args, arch, explicit)
    spikes.check_options(args.spike_window, args.spike_threshold)
    eval_tasks.check_options(args)
    for name, value in defaults().items():
        if name not in explicit:
            setattr(args, name, value)
    set_optimizer(args, explicit)
    backend_for(args)  # ValueError if its package is missing
    _set_dimensions(args, arch)
    set_experts(args, arch, explicit)
    args.hybrid_layer_pattern = layer_pattern(args, arch)


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raises ValueError if the tokenizer has ids that the model has no embedding for, or, with `--reset-at-eod`, if it
    marks no end of a document or the data has none of its marks."""
    from megatron.training import get_tokenizer

    from archscale_megatron.data.datasets import check_ends_of_documents

    tokenizer = get_tokenizer()
    name = args.tokenizer_model or args.tokenizer_type
    if tokenizer.vocab_size > args.architecture.vocab_size:
        raise ValueError(
            f"the tokenizer {name} has {tokenizer.vocab_size} tokens, the model "
            f"{args.architecture.vocab_size}: give --vocab-size {tokenizer.vocab_size} or more"
        )
    if not args.reset_at_eod:
        return
    if tokenizer.eod is None or tokenizer.eod < 0:
        raise ValueError(f"--reset-at-eod: the tokenizer {name} has no end-of-document token; give one that has")
    if args.allow_ambiguous_pad_tokens:  # GPTDataset then replaces the end of a document where it is also padding
        raise ValueError("--allow-ambiguous-pad-tokens may hide where documents end from --reset-at-eod; leave it out")
    check_ends_of_documents(args, tokenizer.eod)


def _rope(args: argparse.Namespace, explicit: dict[str, str]) -> bool | None:
    """What `--position-embedding-type` says, or None if it was not given."""
    if "position_embedding_type" not in explicit:
        return None
    if args.position_embedding_type not in ("rope", "none"):
        raise ValueError(f"--position-embedding-type {args.position_embedding_type}: use rope or none")
    return args.position_embedding_type == "rope"


def _choose_loss(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    if not 0 <= args.label_smoothing < 1:
        raise ValueError(f"--label-smoothing {args.label_smoothing}: must be 0 or more and less than 1")
    large = arch.vocab_size > CHUNKED_ABOVE
    args.chunked_cross_entropy = args.cross_entropy == "chunked" or (args.cross_entropy == "auto" and large)
    for name in PLAIN_LOSS_ONLY:
        if args.chunked_cross_entropy and name in explicit:
            raise ValueError(
                f"{explicit[name]} has no effect on the chunked loss, which --cross-entropy {args.cross_entropy} takes "
                f"for {arch.vocab_size} entries; leave it out, or use --cross-entropy plain"
            )


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is required")


def check_retention(args: argparse.Namespace) -> None:
    """Raises ValueError if `--keep-last` keeps nothing, or has nothing to keep."""
    if args.keep_last is not None and args.keep_last < 1:
        raise ValueError(f"--keep-last {args.keep_last}: must be 1 or more")
    if args.keep_last is not None and not args.save:
        raise ValueError(f"--keep-last {args.keep_last}: nothing is saved; give --save")


def check_schedule(args: argparse.Namespace) -> None:
    """Raises ValueError if the learning rate or the length of the run is missing, or they contradict."""
    if args.lr is None:
        raise ValueError("--lr is required, or what gives it: --train-name, --parametrization or --base-hps.*")
    if (args.train_iters is None) == (args.train_samples is None):
        raise ValueError("give one of --train-iters and --train-samples")
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}") or 0
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay is not None and warmup >= decay:
            raise ValueError(
                f"--lr-warmup-{unit} {warmup}: must be less than the {decay} {unit} over which the rate decays "
                f"(--lr-decay-{unit}, or --train-{unit})"
            )


def _set_dimensions(args: argparse.Namespace, arch: Architecture) -> None:
    for name, value in FIXED.items():
        setattr(args, name, value)
    args.fp32_residual_connection = args.bf16 or args.fp16  # without either, all is fp32
    args.num_layers = len(arch.pattern)
    args.num_attention_heads = arch.num_attention_heads
    args.num_query_groups = arch.num_query_groups
    args.kv_channels = arch.head_dim
    for name, field in MEGATRON_OPTIONS.items():
        setattr(args, name, getattr(arch, field))
    args.position_embedding_type = "none" if arch.rotary_base is None else "rope"
    args.rotary_base = arch.rotary_base or args.rotary_base
    args.vocab_size = arch.vocab_size
    multiple = math.lcm(args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    args.padded_vocab_size = math.ceil(arch.vocab_size / multiple) * multiple
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    args.softmax_scale = arch.softmax_scale
    args.perform_initialization = False  # ours does not depend on the layout (mup.initialization)
