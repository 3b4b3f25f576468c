"""What the command line decides, and what it refuses: one line, exit code 2, before anything starts."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.training import global_vars
from megatron.training.arguments import core_transformer_config_from_args, parse_args

from archscale_megatron import cpu
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.checkpoint.run_directory import write_architecture
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.ops import weight_gradient
from archscale_megatron.training.arguments import PLAIN_LOSS_ONLY, parse_arguments
from archscale_megatron.training.megatron_options import FIXED
from tests.training.data import write_dataset

Parse = Callable[..., argparse.Namespace]
COMMON = ["--seq-length", "128", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3", "--mock-data"]
NULL = ["--tokenizer-type", "NullTokenizer"]
D16 = ["--train-model", "sambay", "--depth", "16"]
MOE = ["--train-model", "sambay_gqa4_moe", "--depth", "16"]
ROPE = ["--train-model", "samba", "--depth", "16"]
TINY = ["--train-model", "sambay", "--depth", "8", "--aspect-ratio", "8", "--head-dim", "8", "--vocab-size", "128"]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """parse_arguments() as in rank 0 of `world` processes."""

    def run(*options: str, world: int = 1, common: list[str] = COMMON) -> argparse.Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr("sys.argv", ["pretrain_archscale.py", *common, *NULL, *options])
        return parse_arguments()

    yield run
    global_vars.unset_global_variables()


def test_family_sets_every_dimension(parse: Parse) -> None:
    args = parse(*D16)
    expected = build_architecture("sambay", 16)
    assert args.architecture == expected
    assert (args.hidden_size, args.ffn_hidden_size, args.num_layers) == (1984, 7936, 32)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (16, 4, 128)
    assert (args.position_embedding_type, args.normalization, args.swiglu) == ("none", "RMSNorm", True)
    assert (args.padded_vocab_size, args.attention_dropout, args.hidden_dropout) == (32000, 0.0, 0.0)
    assert not args.add_bias_linear


@pytest.mark.parametrize(("vocabulary", "tp", "padded"), [(32000, 4, 32000), (100, 2, 128), (32000, 3, 32064)])
def test_padding_of_the_vocabulary(parse: Parse, vocabulary: int, tp: int, padded: int) -> None:
    options = ["--train-model", "sambay", "--depth", "24" if tp == 3 else "16", "--vocab-size", str(vocabulary)]
    args = parse(*options, "--tensor-model-parallel-size", str(tp), world=tp)
    assert args.padded_vocab_size == padded


OPTIONS = {
    "--attention-gate": "attention_gate", "--differential-attention": "differential_attention",
    "--attention-output-bias": "attention_output_bias", "--linear-bias": "linear_bias",
    "--qk-layernorm": "qk_norm", "--add-qkv-bias": "qkv_bias",
}  # fmt: skip


def test_widths_of_an_imported_model(parse: Parse) -> None:
    args = parse(
        "--train-model", "transformer", "--depth", "2", "--hidden-size", "48", "--ffn-hidden-size", "100",
        "--num-heads", "6", "--num-kv-heads", "2", "--head-dim", "8", "--norm-epsilon", "1e-6",
    )  # fmt: skip
    arch = args.architecture
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.norm_epsilon) == (48, 100, 1e-6)
    config = core_transformer_config_from_args(args, HybridConfig)
    assert (config.hidden_size, config.ffn_hidden_size, config.layernorm_epsilon) == (48, 100, 1e-6)


def test_options_of_the_layers(parse: Parse) -> None:
    """Ours and Megatron's: the family's unless given, and the same in Megatron's config as in the architecture."""
    for given in ([], list(OPTIONS)[:3], list(OPTIONS)):
        args = parse(*D16, *given)
        assert [name for name in OPTIONS.values() if getattr(args.architecture, name)] == [OPTIONS[o] for o in given]
        assert (args.qk_layernorm, args.add_qkv_bias) == (args.architecture.qk_norm, args.architecture.qkv_bias)
        global_vars.unset_global_variables()
    args = parse("--train-model", "phi4miniflash", "--depth", "32")
    assert (args.normalization, args.add_qkv_bias, args.qk_layernorm) == ("LayerNorm", True, False)
    global_vars.unset_global_variables()
    args = parse("--train-model", "transformer", "--depth", "16", "--attention-sink", "--normalization", "LayerNorm")
    assert args.architecture.attention_sink and args.normalization == args.architecture.normalization == "LayerNorm"


@pytest.mark.parametrize("family", FAMILIES)
def test_config_on_a_gpu_without_transformer_engine(parse: Parse, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Megatron's config refuses fused RoPE without Transformer Engine, and is then the first to say so."""
    monkeypatch.setattr(cpu, "ACTIVE", False)
    monkeypatch.setattr(weight_gradient, "available", lambda device: True)
    args = parse("--train-model", family, "--depth", "16", "--bf16")
    assert (args.transformer_impl, args.apply_rope_fusion) == ("local", False)
    config = core_transformer_config_from_args(args, HybridConfig)
    assert config.bias_activation_fusion and config.gradient_accumulation_fusion


def test_agreeing_megatron_flags_are_accepted(parse: Parse) -> None:
    args = parse(*D16, "--hidden-size", "1984", "--num-layers", "16", "--group-query-attention", "--swiglu")
    assert args.num_layers == 32


def test_boundaries_by_hand_and_by_compute(parse: Parse) -> None:
    by_hand = "m-W-m-W-m-|*-U-X-"
    args = parse(*TINY, "--pipeline-model-parallel-size", "2", "--hybrid-layer-pattern", by_hand, world=2)
    assert args.hybrid_layer_pattern == by_hand
    global_vars.unset_global_variables()
    args = parse(*TINY, "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2", world=2)
    assert args.hybrid_layer_pattern.count("|") == 3
    assert args.virtual_pipeline_model_parallel_size == 2


def test_experts(parse: Parse) -> None:
    options = ["--shared-expert", "--sqrt-gate", "--sparsity", "4", "--expert-model-parallel-size", "31"]
    args = parse(*MOE, *options, "--global-aux", "--moe-aux-loss-coeff", "0.1", world=31)
    arch = args.architecture
    assert (arch.sparsity, arch.top_k, arch.shared_expert, arch.sqrt_gate) == (4, 8, True, True)
    assert (args.num_experts, args.moe_router_topk) == (31, 7)
    assert args.moe_ffn_hidden_size == args.moe_shared_expert_intermediate_size == 4 * 1984 // 8
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("global_aux_loss", 0.1)
    global_vars.unset_global_variables()
    args = parse(*MOE)
    assert (args.num_experts, args.moe_router_topk, args.moe_shared_expert_intermediate_size) == (64, 8, None)
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("aux_loss", 1e-3)
    assert (args.moe_router_dtype, args.moe_grouped_gemm) == ("fp32", False)
    global_vars.unset_global_variables()
    assert parse(*MOE, "--moe-router-load-balancing-type", "none").moe_aux_loss_coeff == 0
    global_vars.unset_global_variables()
    assert parse(*D16).num_experts is None


def test_every_fixed_attribute_is_one_of_megatrons(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain_archscale.py"])
    assert {*FIXED, *PLAIN_LOSS_ONLY} <= set(vars(parse_args()))


@pytest.mark.parametrize(
    ("vocabulary", "options", "chunked"),
    [
        (100_000, [], False),
        (100_001, [], True),
        (200_064, ["--cross-entropy", "plain", "--cross-entropy-loss-fusion"], False),
        (128, ["--cross-entropy", "chunked"], True),
    ],
)
def test_loss_of_a_large_vocabulary(parse: Parse, vocabulary: int, options: list[str], chunked: bool) -> None:
    """Megatron makes the config from the arguments of the same names."""
    args = parse(*TINY[:-1], str(vocabulary), *options, "--label-smoothing", "0.1")
    config = core_transformer_config_from_args(args, HybridConfig)
    assert (config.chunked_cross_entropy, config.label_smoothing) == (chunked, 0.1)


def test_train_name_is_its_options(parse: Parse, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a model without positions the word rbase may be said, as in ArchScale; the option may not."""
    options = ["--reset-at-eod", "--rotary-base", "640000"]
    expected = build_architecture("samba", 16, rotary_base=640000)
    for family, given, arch in (
        (ROPE, ["--train-name", "scaling_tie_rbase_varlen"], expected),
        (ROPE, ["--train-name", "scaling_tie_varlen", *options], expected),
        (ROPE, options, expected),
        (D16, ["--train-name", "scaling_tie_rbase_varlen"], build_architecture("sambay", 16)),
        (
            ROPE,
            ["--train-name", "scaling_tie_varlen_ga_qknorm_bias"],
            build_architecture(
                "samba", 16, attention_gate=True, qk_norm=True, qkv_bias=True, attention_output_bias=True
            ),
        ),
        (ROPE, ["--train-name", "varlen_nope"], build_architecture("samba", 16, rope=False, tied_embeddings=False)),
    ):
        args = parse(*family, *given, "--lr-warmup-iters", "0")
        assert (args.architecture, args.reset_at_eod) == (arch, True), given
        assert args.untie_embeddings_and_output_weights is not arch.tied_embeddings
        assert args.rotary_base == (arch.rotary_base or args.rotary_base)
        printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("--train-name ")]
        assert len(printed) == ("--train-name" in given)
        assert not printed or "reset_at_eod = True" in printed[0]
        global_vars.unset_global_variables()


def test_optimizers(parse: Parse) -> None:
    """ArchScale's Muon where Megatron's defaults are another, and what the user says."""
    for options, momentum, decay, layer_wise in (
        (["--optimizer", "muon", "--weight-decay", "0.1"], 0.95, 0.1, False),
        (["--optimizer", "muon", "--muon-momentum", "0.9", "--bf16", "--use-distributed-optimizer"], 0.9, 0.01, True),
        (["--optimizer", "muonh"], 0.95, 0.0, False),
    ):
        args = parse(*D16, *options)
        assert (args.muon_momentum, args.weight_decay) == (momentum, decay)
        assert (args.muon_nesterov, args.muon_tp_mode, args.muon_scale_mode) == (True, "duplicated", "unit_rms_norm")
        assert args.use_layer_wise_distributed_optimizer == layer_wise
        global_vars.unset_global_variables()


REFUSED = [
    ([], "--train-model is required"),
    (["--train-model", "sambay"], "--depth is required"),
    ([*D16[:2], "--depth", "18"], "must be a multiple of 4; the nearest: 16, 20"),
    ([*D16, "--hidden-size", "2048", "--aspect-ratio", "124"], "--hidden-size 2048 contradicts --aspect-ratio 124; le"),
    ([*D16, "--ffn-hidden-size", "-1"], "--ffn-hidden-size -1: must be a positive integer"),
    ([*D16, "--norm-epsilon", "0"], "--norm-epsilon 0.0: must be above 0 and below 1"),
    ([*D16, "--num-layers", "12"], "--num-layers 12 contradicts"),
    ([*D16, "--window-size", "1,0"], r"--window-size \(1, 0\) contradicts"),
    ([*D16, "--num-experts", "8"], "--num-experts 8 contradicts"),
    ([*D16, "--attention-sink"], "--attention-sink: a sink is for full attention; sambay has windows"),
    ([*D16[:3], "12", "--differential-attention"], "pairs .* 3 is odd; give an even .*depths 8, 16, 24, 32"),
    ([*D16, "--qk-l2-norm"], "--qk-l2-norm True contradicts"),
    ([*MOE, "--num-experts", "8"], "--num-experts 8 contradicts .* has 64; .* use --sparsity and --top-k"),
    ([*D16, "--sparsity", "4"], "--sparsity: sambay has no experts; leave it out, or use transformer_gqa4_h2_moe, "),
    ([*D16, "--global-aux"], "--global-aux: sambay has no experts"),
    ([*MOE, "--linear-bias"], "the experts of sambay_gqa4_moe have no biases"),
    ([*MOE, "--top-k", "1"], "teaches the router nothing: give --top-k 2 or more"),
    ([*MOE, "--shared-expert", "--top-k", "2"], "to 1 experts; .* give --top-k 3 or more"),
    ([*MOE, "--sparsity", "0"], "--sparsity 0: must be a positive integer"),
    ([*MOE, "--shared-expert", "--expert-model-parallel-size", "2"],
     r"routes to 63 experts \(8 x 8 less the shared one\); use 1, 3, 7, 9, 21, 63"),
    ([*MOE, "--expert-model-parallel-size", "8"], "1 processes cannot be divided .* 8 x 1 x 1; start a multiple of 8"),
    ([*MOE, "--global-batch-size", "4", "--tensor-model-parallel-size", "2"], "experts need --sequence-parallel"),
    ([*MOE, "--moe-grouped-gemm"], "--moe-grouped-gemm: needs --transformer-impl transformer_engine"),
    ([*MOE, "--global-aux", "--moe-router-load-balancing-type", "aux_loss"], "give one of them"),
    ([*MOE, "--moe-router-load-balancing-type", "sinkhorn"], "sinkhorn: changes how tokens are routed; use aux_loss, "),
    ([*MOE, "--moe-router-score-function", "sigmoid"], "--moe-router-score-function sigmoid contradicts"),
    ([*D16, "--rotary-base", "5000"], "sambay has no position embeddings"),
    ([*D16, "--position-embedding-type", "yarn"], "--position-embedding-type yarn: use rope or none"),
    ([*D16, "--context-parallel-size", "2"], "--context-parallel-size 2 contradicts"),
    ([*D16, "--head-dim", "0"], "--head-dim 0: must be a positive integer"),
    ([*D16, "--tensor-model-parallel-size", "8"], "--tensor-model-parallel-size 8: .* 4 key-value heads.* use 1, 2, 4"),
    ([*D16, "--tensor-model-parallel-size", "2"], "1 processes cannot be divided .* start a multiple of 2"),
    ([*D16, "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "20"], "1 to 32 stages"),
    ([*D16, "--num-virtual-stages-per-pipeline-rank", "2"], "needs --pipeline-model-parallel-size of 2 or more"),
    ([*D16, "--global-batch-size", "3"], "must be a multiple of micro batch x data parallel size, 1 x 2 = 2"),
    ([*TINY, "--hybrid-layer-pattern", "m-W-"], "is not sambay at depth 8, which is m-W-m-W-m-"),
    ([*TINY, "--hybrid-layer-pattern", "m-W-m-W-m-||*-U-X-"], "none of them empty"),
    ([*D16, "--reset-attention-mask"], "--reset-attention-mask True contradicts .* use --reset-at-eod"),
    ([*D16, "--dataloader-inter-document-masking"], "contradicts .* use --reset-at-eod"),
    ([*D16, "--reset-at-eod", "--allow-ambiguous-pad-tokens"], "may hide where documents end"),
    ([*D16, "--train-name", "scaling_mu"], "--train-name scaling_mu: unknown word 'mu'; known are .*mup, .*rbase"),
    ([*ROPE, "--rotary-base", "10000", "--train-name", "scaling_rbase"], "--rotary-base 10000 contradicts --train-n"),
    ([*D16, "--attention-backend", "flash"], "contradicts"),
    ([*D16, "--label-smoothing", "1"], "--label-smoothing 1.0: must be 0 or more and less than 1"),
    ([*D16, "--cross-entropy", "chunked", "--cross-entropy-loss-fusion"], "-loss-fusion .* use --cross-entropy plain"),
    ([*D16, "--vocab-size", "200064", "--tensor-parallel-num-weight-shards", "1"], "has no effect .* 200064 entries"),
    ([*D16, "--recompute-granularity", "selective", "--recompute-modules", "mlp"], "--recompute-modules mlp: .*core_a"),
    ([*D16, "--train-samples", "10"], "give one of --train-iters and --train-samples"),
    ([*D16, "--lr-warmup-iters", "1"], "--lr-warmup-iters 1: must be less than the 1 iters"),
    ([*D16, "--transformer-impl", "transformer_engine"], "transformer_engine: the package is not installed"),
    ([*D16, "--optimizer", "muon", "--fp16"], "--optimizer muon has no loss scale, .* use --bf16"),
    ([*D16, "--optimizer", "muon", "--muon-tp-mode", "blockwise"], "on --tensor.* use duplicated or distributed"),
    ([*D16, "--optimizer", "muon", "--use-distributed-optimizer"], "layer-wise optimizer, which is for --bf16; use"),
    ([*D16, "--optimizer", "muonh", "--weight-decay", "0.1"], "keeps norms: --weight-decay 0.1 must be 0"),
    ([*D16, "--optimizer", "muonh", "--muon-scale-mode", "spectral"], "--muon-scale-mode has no effect on --optim"),
    ([*D16, "--load", "nowhere"], "--load nowhere: no such directory"),
    ([*D16, "--load", "tests"], "--load tests: there is no checkpoint; give another directory"),
    ([*D16, "--keep-last", "0", "--save", "run"], "--keep-last 0: must be 1 or more"),
    ([*D16, "--keep-last", "2"], "--keep-last 2: nothing is saved; give --save"),
    ([*D16, "--save", "/dev/null/run"], "--save /dev/null/run: cannot be written .Not a directory.; give a directory"),
    ([*D16, "--ckpt-format", "torch"], "--ckpt-format torch contradicts"),
    ([*D16, "--async-strategy", "nvrx"], "--async-strategy nvrx contradicts"),
    ([*D16, "--non-persistent-save-interval", "5"], "use --keep-last and --save-retain-interval"),
    ([*D16, "--vocab-size", "64", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "gone"], "gone"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(o[-2:]) or "nothing" for o, _ in REFUSED])
def test_refused(parse: Parse, capfd: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    if "--pipeline-model-parallel-size" in options or "--global-batch-size" in options:
        world = 2
    elif options[-2:] == ["--tensor-model-parallel-size", "8"]:
        world = 8
    else:
        world = 1
    refused(lambda: parse(*options, world=world), capfd, message)


def refused(run: Callable[[], object], capfd: pytest.CaptureFixture[str], message: str) -> None:
    """`run` exits with code 2, and its last line on standard error is the message."""
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pretrain_archscale: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


NO_MOCK = [option for option in COMMON if option != "--mock-data"]


def test_data_that_is_not_there(parse: Parse, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(lambda: parse(*TINY, common=NO_MOCK), capfd, "no data: give --data-path")
    missing = tmp_path / "missing"
    refused(lambda: parse(*TINY, "--data-path", str(missing), common=NO_MOCK), capfd, "missing.bin: no such file")
    prefix = write_dataset(tmp_path / "good", documents=1)
    Path(f"{prefix}.idx").write_bytes(b"something else")
    refused(lambda: parse(*TINY, "--data-path", str(prefix), common=NO_MOCK), capfd, "not the index of an indexed")


def test_empty_dataset(parse: Parse, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "empty", documents=0)
    refused(lambda: parse(*TINY, "--data-path", str(prefix), common=NO_MOCK), capfd, "empty: the dataset is empty")


def test_documents_without_an_end(parse: Parse, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "good", documents=1)
    options = ["--data-path", str(prefix), "--reset-at-eod"]
    assert parse(*TINY, *options, common=NO_MOCK).reset_at_eod
    global_vars.unset_global_variables()
    message = "the first document of .*good ends with token 127, not with .* 255; preprocess with --append-eod"
    refused(lambda: parse(*TINY[:-1], "256", *options, common=NO_MOCK), capfd, message)


def test_tokenizer_without_an_end_of_documents(
    parse: Parse, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullTokenizer, "eod", None)
    refused(lambda: parse(*TINY, "--reset-at-eod"), capfd, "the tokenizer NullTokenizer has no end-of-document token")


def test_tokenizer_larger_than_the_model(parse: Parse, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("".join(f"{i} words of text\n" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "t"), vocab_size=90, model_type="bpe", byte_fallback=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    options = ["--vocab-size", "20", "--tokenizer-type", "SentencePieceTokenizer"]
    command = [*TINY[:-2], *options, "--tokenizer-model", str(tmp_path / "t.model")]
    refused(lambda: parse(*command), capfd, r"has \d+ tokens, the model 20: give --vocab-size \d+ or more")


def test_checkpoint_of_another_architecture(parse: Parse, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_architecture(str(tmp_path), build_architecture("samba", 8))
    before = (tmp_path / "architecture.json").read_text()
    for option in ("--load", "--save"):
        refused(
            lambda option=option: parse(*D16, option, str(tmp_path)),
            capfd,
            "another architecture: family is 'samba' there and 'sambay' here; depth is 8 there and 16 here",
        )
    assert (tmp_path / "architecture.json").read_text() == before
    assert json.loads(before)["family"] == "samba"


def test_checkpoint_from_before_an_option(parse: Parse, tmp_path: Path) -> None:
    write_architecture(str(tmp_path), build_architecture("sambay", 16))
    file = tmp_path / "architecture.json"
    fields = json.loads(file.read_text())
    del fields["attention_sink"], fields["full_window"]
    file.write_text(json.dumps(fields))
    assert parse(*D16, "--save", str(tmp_path)).architecture.depth == 16
