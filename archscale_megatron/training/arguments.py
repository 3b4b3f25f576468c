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
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from archscale_megatron import cpu
from archscale_megatron.archs.architecture import MOE, PIPE, Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.options import add_overrides, overrides
from archscale_megatron.archs.splits import split_by_compute
from archscale_megatron.layers.backend import backend_for
from archscale_megatron.training.experts import (
    EXPERT_RECOMPUTE_MODULES,
    FIXED_EXPERTS,
    add_expert_arguments,
    expert_dimensions,
    set_experts,
)
from archscale_megatron.training.train_name import apply_train_name

VOCABULARY_MULTIPLE = 64  # ArchScale's padding

# Megatron's attribute -> what the models here have instead of a choice. An option that says otherwise is refused: the
# ones that would be ignored as well as those that would be wrong.
FIXED: dict[str, Any] = {
    # layers
    "swiglu": True, "squared_relu": False, "quick_geglu": False, "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False, "group_query_attention": True,
    "qk_l2_norm": False, "qk_clip": False, "attention_output_gate": False,
    "multi_latent_attention": False,
    "softmax_type": "vanilla", "apply_query_key_layer_scaling": False, "window_size": None,
    "window_attn_skip_freq": None, "attention_backend": AttnBackend.auto, "mtp_num_layers": None,
    "experimental_attention_variant": None, "heterogeneous_layers_config_path": None, "spec": None,
    "hybrid_override_pattern": None, "rotary_percent": 1.0, "rotary_interleaved": False, "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None, "use_rope_scaling": False, "fp16_lm_cross_entropy": False,
    # initial values
    "use_mup": False, "init_method_std": 0.02, "init_method_xavier_uniform": False, "embedding_init_method_std": None,
    "init_model_with_meta_device": False,
    # how it runs
    "context_parallel_size": 1, "hybrid_context_parallel": False, "tp_comm_overlap": False,
    "fine_grained_activation_offloading": False, "cuda_graph_impl": "none", "delay_wgrad_compute": False,
    # data
    "reset_position_ids": False, "reset_attention_mask": False, "dataloader_inter_document_masking": False,
    "sft": False,
    **FIXED_EXPERTS,
}  # fmt: skip
RECOMPUTE_MODULES = ["core_attn"]
# What does here what an option of those does in Megatron.
INSTEAD = dict.fromkeys(
    ("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"), "--reset-at-eod"
)
CHUNKED_ABOVE = 100_000  # entries of the vocabulary, as in ArchScale
# Options of Megatron's that reach its output layer and loss alone, which the chunked loss goes without.
PLAIN_LOSS_ONLY = ("cross_entropy_loss_fusion", "defer_embedding_wgrad_compute", "tensor_parallel_num_weight_shards")
# Megatron's flags that change what a family has: attribute -> field of `Options`.
MEGATRON_OPTIONS = {"normalization": "normalization", "qk_layernorm": "qk_norm", "add_qkv_bias": "qkv_bias"}


class ArgumentError(ValueError):
    """A combination of arguments that cannot be; the message is one line for the user."""


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
    add_expert_arguments(group)
    group.add_argument("--reset-at-eod", action="store_true", help="no layer looks beyond an end-of-document token")
    group.add_argument("--train-name", help="an ArchScale run name, such as scaling_tie_varlen: its words are options")
    return parser


def parse_arguments() -> argparse.Namespace:
    """Parse and check `sys.argv`, and make the result Megatron's global arguments.

    Exits with code 2 and one line on standard error if something is wrong.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from archscale_megatron.data.datasets import check_data
    from archscale_megatron.training.run_directory import check_run_directories, write_architecture

    args, explicit = parse_command_line()
    with exit_on_error("pretrain_archscale", args):
        apply_arguments(args, explicit)
        check_schedule(args)
        check_data(args)
        check_run_directories(args)
        validate_args(args)
        set_global_variables(args)
        check_tokenizer(args)
        if args.save and args.rank == 0:
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
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    return {a.dest: o for a in parser._actions for o in a.option_strings if o in given}


def apply_arguments(args: argparse.Namespace, explicit: dict[str, str]) -> None:
    """Set Megatron's arguments to what the architecture, the layout and the machine need.

    Args:
        args: as Megatron parsed them; changed in place, `args.architecture` is new.
        explicit: what the user gave (see `explicit_options`).
    Raises:
        ArgumentError: something contradicts something else.
    """
    _require(args, "train_model", "depth", "seq_length", "micro_batch_size")
    try:
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
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if arch.rotary_base is not None:  # the word rbase, unlike the option, may be said of any model
        arch = args.architecture = replace(arch, rotary_base=named.get("rotary_base", arch.rotary_base))
    _refuse_contradictions(args, arch, explicit)
    _check_layout(args, arch)
    _choose_loss(args, arch, explicit)
    for name, value in _defaults().items():
        if name not in explicit:
            setattr(args, name, value)
    backend_for(args)  # ValueError if its package is missing
    _set_dimensions(args, arch)
    set_experts(args, arch, explicit)
    args.hybrid_layer_pattern = _layer_pattern(args, arch)


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raises ValueError if the tokenizer has ids that the model has no embedding for, or, with `--reset-at-eod`, if it
    marks no end of a document or the data has none of its marks."""
    from megatron.training import get_tokenizer

    from archscale_megatron.data.datasets import check_ends_of_documents

    tokenizer = get_tokenizer()
    name = args.tokenizer_model or args.tokenizer_type
    if tokenizer.vocab_size > args.architecture.vocab_size:
        raise ArgumentError(
            f"the tokenizer {name} has {tokenizer.vocab_size} tokens, the model "
            f"{args.architecture.vocab_size}: give --vocab-size {tokenizer.vocab_size} or more"
        )
    if not args.reset_at_eod:
        return
    if tokenizer.eod is None or tokenizer.eod < 0:
        raise ArgumentError(f"--reset-at-eod: the tokenizer {name} has no end-of-document token; give one that has")
    if args.allow_ambiguous_pad_tokens:  # GPTDataset then replaces the end of a document where it is also padding
        raise ArgumentError(
            "--allow-ambiguous-pad-tokens may hide where documents end from --reset-at-eod; leave it out"
        )
    check_ends_of_documents(args, tokenizer.eod)


def _rope(args: argparse.Namespace, explicit: dict[str, str]) -> bool | None:
    """What `--position-embedding-type` says, or None if it was not given."""
    if "position_embedding_type" not in explicit:
        return None
    if args.position_embedding_type not in ("rope", "none"):
        raise ArgumentError(f"--position-embedding-type {args.position_embedding_type}: use rope or none")
    return args.position_embedding_type == "rope"


def _refuse_contradictions(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    family = f"--train-model {arch.family} --depth {arch.depth}"
    dimensions: dict[str, tuple[Any, str | None]] = {
        "num_layers": (arch.depth, "--depth"),
        "hidden_size": (arch.hidden_size, "--aspect-ratio"),
        "ffn_hidden_size": (arch.ffn_hidden_size, "--aspect-ratio"),
        "num_attention_heads": (arch.num_attention_heads, "--num-heads"),
        "num_query_groups": (arch.num_query_groups, "--num-kv-heads"),
        "kv_channels": (arch.head_dim, "--head-dim"),
        "norm_epsilon": (arch.norm_epsilon, None),
        **{name: (value, "--sparsity and --top-k") for name, value in expert_dimensions(arch).items()},
    }
    for name, (value, ours) in (dimensions | {k: (v, INSTEAD.get(k)) for k, v in FIXED.items()}).items():
        if name in explicit and getattr(args, name) != value:
            advice = f"leave it out, or use {ours}" if ours else "leave it out"
            raise ArgumentError(
                f"{explicit[name]} {getattr(args, name)} contradicts {family}, which has {value}; {advice}"
            )

    modules = args.recompute_modules or RECOMPUTE_MODULES
    legal = RECOMPUTE_MODULES + (EXPERT_RECOMPUTE_MODULES if MOE in arch.pattern else [])
    if args.recompute_granularity == "selective" and not set(modules) <= set(legal):
        raise ArgumentError(
            f"--recompute-modules {' '.join(modules)}: selective recompute knows "
            f"{', '.join(legal)} here; use these, or --recompute-granularity full"
        )


def _choose_loss(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    if not 0 <= args.label_smoothing < 1:
        raise ArgumentError(f"--label-smoothing {args.label_smoothing}: must be 0 or more and less than 1")
    large = arch.vocab_size > CHUNKED_ABOVE
    args.chunked_cross_entropy = args.cross_entropy == "chunked" or (args.cross_entropy == "auto" and large)
    for name in PLAIN_LOSS_ONLY:
        if args.chunked_cross_entropy and name in explicit:
            raise ArgumentError(
                f"{explicit[name]} has no effect on the chunked loss, which --cross-entropy {args.cross_entropy} takes "
                f"for {arch.vocab_size} entries; leave it out, or use --cross-entropy plain"
            )


def _check_layout(args: argparse.Namespace, arch: Architecture) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    legal = arch.tensor_parallel_sizes()
    if tp not in legal:
        whole = " and ".join(f"{n:,} {name}" for name, n in arch.split_over_ranks().items() if n % tp)
        raise ArgumentError(
            f"--tensor-model-parallel-size {tp}: {arch.family} at depth {arch.depth} has {whole} "
            f"to split; use {', '.join(map(str, legal))}"
        )
    if args.world_size % (tp * pp):
        raise ArgumentError(
            f"{args.world_size} processes cannot be divided into tensor x pipeline parallel groups of {tp} x {pp}; "
            f"start a multiple of {tp * pp}"
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise ArgumentError(
            f"--seq-length {args.seq_length} with --sequence-parallel: must be a multiple of "
            f"--tensor-model-parallel-size {tp}"
        )
    step = args.micro_batch_size * (args.world_size // (tp * pp))
    if args.global_batch_size is not None and args.global_batch_size % step:
        raise ArgumentError(
            f"--global-batch-size {args.global_batch_size}: must be a multiple of micro batch x data parallel size, "
            f"{args.micro_batch_size} x {step // args.micro_batch_size} = {step}"
        )


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise ArgumentError(f"--{name.replace('_', '-')} is required")


def check_schedule(args: argparse.Namespace) -> None:
    """Raises ArgumentError if the learning rate or the length of the run is missing, or they contradict."""
    _require(args, "lr")
    if (args.train_iters is None) == (args.train_samples is None):
        raise ArgumentError("give one of --train-iters and --train-samples")
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}") or 0
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay is not None and warmup >= decay:
            raise ArgumentError(
                f"--lr-warmup-{unit} {warmup}: must be less than the {decay} {unit} over which the rate decays "
                f"(--lr-decay-{unit}, or --train-{unit})"
            )


def _set_dimensions(args: argparse.Namespace, arch: Architecture) -> None:
    for name, value in FIXED.items():
        setattr(args, name, value)
    args.fp32_residual_connection = args.bf16 or args.fp16  # without either, all is fp32
    args.num_layers = len(arch.pattern)
    args.hidden_size = arch.hidden_size
    args.ffn_hidden_size = arch.ffn_hidden_size
    args.num_attention_heads = arch.num_attention_heads
    args.num_query_groups = arch.num_query_groups
    args.kv_channels = arch.head_dim
    args.norm_epsilon = args.layernorm_epsilon = arch.norm_epsilon
    for name, field in MEGATRON_OPTIONS.items():
        setattr(args, name, getattr(arch, field))
    args.position_embedding_type = "none" if arch.rotary_base is None else "rope"
    args.rotary_base = arch.rotary_base or args.rotary_base
    args.vocab_size = arch.vocab_size
    multiple = math.lcm(args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    args.padded_vocab_size = math.ceil(arch.vocab_size / multiple) * multiple
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    args.perform_initialization = False  # ours does not depend on the layout (mup.initialization)


def _layer_pattern(args: argparse.Namespace, arch: Architecture) -> str:
    """The pattern with its pipeline boundaries: the user's, or placed by compute."""
    pp = args.pipeline_model_parallel_size
    given = args.hybrid_layer_pattern
    virtual, args.num_virtual_stages_per_pipeline_rank = args.num_virtual_stages_per_pipeline_rank or 1, None
    if given is not None:
        if given.replace(PIPE, "") != arch.pattern:
            raise ArgumentError(
                f"--hybrid-layer-pattern {given} is not {arch.family} at depth {arch.depth}, which is {arch.pattern}; "
                "it may only add pipeline boundaries, |"
            )
        segments = given.split(PIPE)
        if "" in segments or len(segments) % pp:
            raise ArgumentError(
                f"--hybrid-layer-pattern {given}: {len(segments)} segments; it needs a multiple of "
                f"--pipeline-model-parallel-size {pp}, none of them empty"
            )
        return given
    if virtual > 1 and pp == 1:
        raise ArgumentError(
            f"--num-virtual-stages-per-pipeline-rank {virtual}: needs --pipeline-model-parallel-size of 2 or more"
        )
    try:
        return split_by_compute(arch, pp * virtual, args.seq_length)
    except ValueError as error:
        raise ArgumentError(f"--pipeline-model-parallel-size {pp}: {error}") from None


def _defaults() -> dict[str, Any]:
    """What we choose where the user did not: ArchScale has no dropout, and a machine may lack fused kernels."""
    defaults: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "dist_ckpt_optim_fully_reshardable": True,  # a checkpoint loads at any layout
        "exit_signal_handler": True,  # SIGTERM saves and exits
        "save_interval": 1000,
        "eval_interval": 1000,
        "transformer_impl": "transformer_engine" if _installed("transformer_engine") else "local",
        "gradient_accumulation_fusion": _installed("fused_weight_gradient_mlp_cuda"),
        "masked_softmax_fusion": False,  # our attention has no separate softmax
        "no_persist_layer_norm": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    if cpu.ACTIVE:
        defaults |= {
            "distributed_backend": "gloo",
            "moe_token_dispatcher_type": "allgather",  # all-to-all needs more of gloo than it has
            "transformer_impl": "local",
            "gradient_accumulation_fusion": False,
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
        }
    return defaults


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
