"""Command lines with ArchScale's options: what they make of Megatron's, and whole runs of Megatron's schedulers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core import num_microbatches_calculator as microbatches
from megatron.training import training

from archscale_megatron.checkpoint.resume import TRACKER
from archscale_megatron.training.arguments import apply_arguments, check_schedule, parse_command_line
from archscale_megatron.training.spellings import apply_resume

Parse = Callable[..., argparse.Namespace]
D8 = "--train-model sambay --depth 8 --seq-length 4096 --micro-batch-size 2"
# 128 tokens a sequence, 16 of them a batch, 100 batches
SMALL = "--train-model sambay --depth 8 --seq-length 128 --micro-batch-size 1 --base-hps.b0 2048 --max-tokens 204800"


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Arguments of a command line on rank 0 of `world` processes."""

    def run(line: str, world: int = 1) -> argparse.Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr("sys.argv", ["pretrain_archscale.py", *line.split()])
        args, explicit = parse_command_line()
        apply_arguments(args, explicit)
        return args

    return run


def values(args: argparse.Namespace, *names: str) -> tuple:
    return tuple(getattr(args, name) for name in names)


def test_a_run_by_the_laws(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(f"{D8} --train-name scaling_mup_tie", world=8)
    assert args.lr == pytest.approx(4e-4 * math.sqrt(2), rel=1e-12)
    assert args.hyperparameters.matrix_learning_rate == pytest.approx(8e-4 * math.sqrt(2), rel=1e-12)
    assert values(args, "global_batch_size", "train_iters", "train_samples") == (
        512,
        None,
        12670477505 // 4096 // 16 * 16,
    )
    assert args.lr_warmup_samples == 10**9 // 4096 // 16 * 16
    assert values(args, "lr_decay_samples", "lr_decay_style") == (args.train_samples, "linear")
    assert values(args, "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps") == (0, 0.1, 0.9, 0.95, 1e-8)
    assert values(args, "clip_grad", "seed") == (1.0, 3407)
    assert (args.parametrization.name, args.parametrization.width_ratio) == ("mup++", 0.5)
    assert (args.architecture.logit_multiplier, args.architecture.residual_multiplier) == (2.0, 0.25)
    assert args.untie_embeddings_and_output_weights is False
    printed = capsys.readouterr().out
    assert printed.count("learning rate  5.6569e-04, of matrices 1.1314e-03") == 1
    assert "2,097,152 tokens, 512 sequences" in printed
    assert "12,670,477,505 tokens, 6,041 steps" in printed


def test_spellings(parse: Parse) -> None:
    """ArchScale's command line of Phi-4-mini-flash, and the same in ours."""
    archscale = (
        "--train_model phi4miniflash --depth 32 --base_hps.eta0=5e-4 --base_hps.b0=8_388_608 "
        "--base_hps.warmup_tokens0=25_165_824_000 --ctx_len 8192 --max_tokens 5e12 --train_name scaling_tie "
        "--micro_bsz 1 --swa_len 512 --ar 80"
    )
    ours = (
        "--train-model phi4miniflash --depth 32 --base-hps.eta0 0.0005 --base-hps.b0 8388608 "
        "--base-hps.warmup-tokens 25165824000 --seq-length 8192 --max-tokens 5_000_000_000_000 "
        "--train-name scaling_tie --micro-batch-size 1 --local-window 512 --aspect-ratio 80"
    )
    names = ("lr", "global_batch_size", "train_samples", "lr_warmup_samples", "architecture", "parametrization")
    found = values(parse(archscale, world=64), *names)
    assert found[:4] == (5e-4, 1024, 5 * 10**12 // 8192 // 64 * 64, 25_165_824_000 // 8192)
    assert found == values(parse(ours, world=64), *names)
    parse(f"{D8} --ctx-len 4096 --lr 1e-3 --train-iters 1")  # the same twice


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--parametrization sp --base-hps.eta0 1e-3", {"lr": 1e-3}),
        ("--parametrization mup --base-hps.d0 4 --base-hps.eta0 1e-3", {"lr": 1e-3, "matrix": 5e-4}),
        ("--train-name ori_mup --base-hps.eta0 1e-3", {"lr": 1e-3, "matrix": 2e-3}),
        ("--parametrization mup++ --archscale-release 2026-03", {"lr": 6e-4, "matrix": 6e-4}),
        ("--parametrization hyperp --optimizer muonh --base-hps.t0 2048000 --base-hps.eta0 0.01",
         {"lr": 0.01 * 0.1**-0.32, "matrix": 0.01 * 0.1**-0.32, "weight_decay": 0.0, "lr_warmup_samples": 0}),
        # what the user gives enters the laws: the batch, the learning rate
        ("--parametrization mup++ --global-batch-size 64", {"lr": 8e-4 * math.sqrt(2), "train_samples": 1600}),
        ("--parametrization mup++ --total-bsz 8200", {"lr": 8e-4 * math.sqrt(2), "global_batch_size": 64}),
        ("--parametrization mup++ --lr 1e-2", {"lr": 1e-2, "matrix": 2e-2}),
        # and what has no part in them wins
        ("--base-hps.eta0 1e-3 --weight-decay 0.3 --min-lr 1e-5 --seed 7 --adam-beta2 0.99 --clip-grad 0.5",
         {"weight_decay": 0.3, "min_lr": 1e-5, "seed": 7, "adam_beta2": 0.99, "clip_grad": 0.5}),
        ("--base-hps.weight-decay 0.3 --base-hps.min-lr0 1e-5 --base-hps.beta2 0.99 --base-hps.eps 1e-10",
         {"weight_decay": 0.3, "min_lr": 1e-5, "adam_beta2": 0.99, "adam_eps": 1e-10}),
        ("--base-hps.min-lr-mult 0.1 --base-hps.w-init-scale 2 --base-hps.hd0 64", {"min_lr": 4e-5}),
        ("--train-name mup_midtrain", {"lr": 6e-4, "lr_warmup_samples": 0}),
        ("--train-name mup_v2scale", {"lr": 6e-4, "weight_decay": 4e-5 / 6e-4}),
        ("--train-name mup_v2scale --base-hps.weight-decay0 6e-5", {"weight_decay": 0.1}),
    ],
)  # fmt: skip
def test_options_of_the_laws(parse: Parse, options: str, expected: dict[str, float]) -> None:
    warmup = "" if "midtrain" in options else "--base-hps.warmup-tokens0 20480"
    args = parse(f"{SMALL} {warmup} {options}")
    args.matrix = args.hyperparameters.matrix_learning_rate
    expected = {"lr_warmup_samples": 160, "train_samples": 1600} | expected
    assert {name: getattr(args, name) for name in expected} == pytest.approx(expected, rel=1e-12)


def test_parametrization_has_the_base_values(parse: Parse) -> None:
    args = parse(f"{SMALL} --parametrization mup++ --base-hps.w-init-scale 2 --base-hps.hd0 64 --base-hps.d0 4 "
                 "--base-hps.warmup-tokens0 0 --independent-weight-decay")  # fmt: skip
    run = args.parametrization
    assert (run.width_ratio, run.base_head_dim, run.init_scale, run.independent_weight_decay) == (2, 64, 2, True)
    assert args.architecture.softmax_scale == 8 / 128


MUON = ("muon_momentum", "muon_scale_mode", "muon_extra_scale_factor", "muon_split_qkv", "muon_coefficient_type")


@pytest.mark.parametrize(
    ("name", "rate", "matrices", "decay", "warmup", "muon"),
    [  # d0 is 16 in July 2025 and 8 in March 2026, at the same eta0, b0 and t0; depth 32
        ("mup_muon", 4e-4 / math.sqrt(2), 0.5, 0.1, 1e9, (0.9, "spectral", 0.4, False, "simple")),
        ("muon", 4e-4, 1, 0.1, 1e9, (0.9, "spectral", 0.4, False, "simple")),
        ("mup_muon_v2scale", 4e-4 / 2, 1, 4e-5 / 4 / 2e-4, 0, (0.9, "unit_rms_norm", 1.0, True, "quintic")),
        ("v2scale_mup_muonh_qknorm", 4e-4 / 2 * 8**-0.32, 1, 0, 0, (0.9, "unit_rms_norm", 1.0, True, "quintic")),
        ("muonh_tie", 4e-4 / 2 * 8**-0.32, 1, 0, 0, (0.9, "unit_rms_norm", 1.0, True, "quintic")),
    ],
)
def test_words_of_muon(
    parse: Parse, name: str, rate: float, matrices: float, decay: float, warmup: float, muon: tuple
) -> None:
    base = "--base-hps.eta0 4e-4 --base-hps.t0 1e10 --base-hps.muon-beta 0.9 --max-tokens 8e10"
    args = parse(f"{D8.replace('--depth 8', '--depth 32')} --train-name {name} {base}")
    assert args.optimizer == ("muonh" if "muonh" in name else "muon")
    assert args.parametrization.muon
    assert (args.lr, args.weight_decay) == (pytest.approx(rate, rel=1e-12), pytest.approx(decay, rel=1e-12))
    assert args.hyperparameters.matrix_learning_rate == pytest.approx(rate * matrices, rel=1e-12)
    assert args.hyperparameters.warmup_tokens == pytest.approx(warmup, rel=1e-4)
    assert values(args, *MUON) == muon


def test_length_in_steps(parse: Parse) -> None:
    """If the user counts in steps, all is in steps."""
    line = SMALL.replace(" --max-tokens 204800", "") + " --parametrization sp --train-name wsd --train-iters 50"
    args = parse(f"{line} --base-hps.warmup-tokens0 20480")
    assert values(args, "train_iters", "train_samples", "lr_warmup_iters", "lr_warmup_samples") == (50, None, 10, 0)
    assert values(args, "lr_decay_iters", "lr_wsd_decay_iters", "lr_wsd_decay_samples") == (50, 12, None)
    assert args.hyperparameters.train_tokens == 50 * 2048
    assert values(parse(f"{SMALL} --parametrization sp --lr-warmup-iters 7"), "train_iters", "lr_warmup_iters") == (
        100,
        7,
    )
    args = parse(f"{SMALL.rsplit(' ', 2)[0]} --parametrization sp --train-samples 3200 --base-hps.warmup-tokens0 0")
    assert (args.hyperparameters.train_tokens, args.train_samples) == (3200 * 128, 3200)


def test_without_laws_megatrons_flags_stand(parse: Parse) -> None:
    args = parse(f"{D8} --lr 1e-3 --train-iters 5")
    assert values(args, "lr", "train_iters", "train_samples", "global_batch_size") == (1e-3, 5, None, None)
    assert values(args, "min_lr", "weight_decay", "adam_beta2", "seed", "lr_warmup_samples") == (
        0,
        0.01,
        0.999,
        1234,
        0,
    )
    assert (args.hyperparameters, args.parametrization.name, args.architecture.logit_multiplier) == (None, "sp", 1.0)
    args = parse(f"{D8} --lr 1e-3 --max-tokens 1e6 --total-bsz 20000", world=2)
    assert values(args, "train_samples", "global_batch_size") == (1_000_000 // 4096 // 4 * 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--base-hps.eta0 abc", "^--base-hps.eta0 abc: not a number$"),
        ("--base_hps.eta0=nan", "^--base_hps.eta0 nan: not a number$"),
        ("--base-hps.b0 2.5", "^--base-hps.b0 2.5: must be a whole number$"),
        ("--train-name scaling_tie --optimizer muonh", "the parametrization sp: muonh and hyperp belong together"),
        ("--parametrization hyperp", "--optimizer adam and the parametrization hyperp: muonh and hyperp belong"),
        ("--max-tokens 5x", "^--max-tokens 5x: not a number$"),
        ("--base-hps.eta0 0", "--base-hps.eta0 0.0: must be more than 0"),
        ("--base-hps.b0 64", "a batch of 64 tokens is less than one micro batch on every rank, 128 tokens; give a"),
        ("--base-hps.eta0 1e-3", "a warm-up of 1,000,000,000 tokens is no shorter than the run, 204,800 tokens; give"),
        ("--base-hps.eta0 1e-3 --max-tokens 2000", "a run of 2,000 tokens is less than one batch of 2,048"),
        ("--parametrization sp --train-iters 5", "give one of --train-iters and --max-tokens"),
        ("--parametrization sp --global-batch-size 4 --total-bsz 512", "--total-bsz say the same; give one of them"),
        ("--train-name scaling_tie --parametrization mup++", "--parametrization mup.. contradicts --train-name scal"),
        ("--train-name mup_midtrain --archscale-release 2025-07", "by which archscale_release is 2026-03"),
        ("--train-name mup_cosine --lr-decay-style linear", "by which lr_decay_style is cosine"),
        ("--ctx_len 64", "--ctx_len 64 and --seq-length 128 say the same; give one of them"),
        ("--rampup-batch-size 1 1 100", "--rampup-batch-size .* use --step-batch-size-schedule"),
    ],
)  # fmt: skip
def test_refused(parse: Parse, options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"{SMALL} {options}")


def test_refused_for_want_of_a_law_or_of_ranks(parse: Parse) -> None:
    with pytest.raises(ValueError, match="no law for the training tokens of swayoco; .*: give --max-tokens"):
        parse("--train-model swayoco --depth 8 --seq-length 128 --micro-batch-size 1 --train-name mup")
    with pytest.raises(ValueError, match="--global-batch-size 6: must be a multiple of .* 2 x 2 = 4"):
        parse(f"{D8} --train-name mup --global-batch-size 6", world=2)
    with pytest.raises(ValueError, match="--step-batch-size-schedule 0:6,1B:8: 6 must be a multiple of .* size, 4"):
        parse(f"{D8} --train-name mup --step-batch-size-schedule 0:6,1B:8", world=2)
    with pytest.raises(ValueError, match="--count-embeddings: is of --archscale-release 2026-03"):
        parse(f"{D8} --train-name mup --count-embeddings")
    with pytest.raises(
        ValueError, match="--lr is required, or what gives it: --train-name, --parametrization or --base"
    ):
        check_schedule(parse(D8))


def lr_of_archscale(style: str, tokens: int, warmup: int, length: int, peak: float, low: float) -> float:
    """J:pretrain.py:771-798 in tokens, and an inverse square root after the warm-up."""
    if tokens < warmup:
        return peak * tokens / warmup
    if style == "inverse-square-root":
        return max(low, peak * math.sqrt(warmup / tokens))
    start = warmup
    if style == "wsd":
        start += math.floor(5 / 7 * (length - warmup) / 128) * 128
    past = max(0, tokens - start) / (length - start)
    return low + (peak - low) * (0.5 * (1 + math.cos(math.pi * past)) if style == "cosine" else 1 - past)


@pytest.mark.parametrize("unit", ["samples", "iters"])
@pytest.mark.parametrize("style", ["linear", "cosine", "wsd", "inverse-square-root"])
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_schedules(parse: Parse, monkeypatch: pytest.MonkeyPatch, style: str, low: float, unit: str) -> None:
    """A whole run of Megatron's scheduler, of a group of vectors and one of matrices; at both ends as well."""
    words = {"cosine": "--train-name mup_cosine", "wsd": "--train-name mup_wsd"}
    words = words.get(style, f"--train-name mup --lr-decay-style {style}")
    counted = "" if unit == "samples" else "--lr-decay-iters 100"
    args = parse(f"{SMALL} {words} --base-hps.warmup-tokens0 20480 --base-hps.min-lr-mult {low} {counted}")
    peaks = (args.lr, args.hyperparameters.matrix_learning_rate)
    lows = (args.min_lr, 2 * args.min_lr)
    assert lows[0] == pytest.approx(low * peaks[0])
    groups = [{"max_lr": peak, "min_lr": least} for peak, least in zip(peaks, lows, strict=True)]
    scheduler = _scheduler(args, monkeypatch, groups)
    grain = 128 if unit == "samples" else 2048
    for step in range(101):
        for group, peak, least in zip(groups, peaks, lows, strict=True):
            expected = lr_of_archscale(style, step * 2048, 20480, 204800, peak, least)
            if style == "wsd" and unit == "iters":  # ends at whole steps
                start = 20480 + math.floor(5 / 7 * 90) * grain
                past = max(0, step * 2048 - start) / (204800 - start)
                expected = expected if step < 10 else least + (peak - least) * (1 - past)
            assert group["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-18), step
            assert group["weight_decay"] == 0.1
        scheduler.step(16)


def test_batch_size_ramp_up(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tokens; learning rate and length follow tokens too, and the peak is that of the last batch."""
    line = SMALL.replace(" --base-hps.b0 2048", " --base-hps.b0 8192")
    schedule = "--step-batch-size-schedule 0:16,20480:32,61440:64"
    args = parse(f"{line} --parametrization sp --base-hps.warmup-tokens0 20480 {schedule}")
    assert values(args, "lr", "global_batch_size", "train_samples") == (4e-4, 64, 1600)
    scheduler = _scheduler(args, monkeypatch, groups := [{}])
    monkeypatch.setattr(microbatches, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    microbatches.init_num_microbatches_calculator(
        0, None, args.global_batch_size, args.micro_batch_size, 1, False, args.step_batch_size_schedule, args.seq_length
    )
    consumed, batches = 0, []
    while consumed < args.train_samples:
        expected = lr_of_archscale("linear", consumed * 128, 20480, 204800, 4e-4, 0)
        assert groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        microbatches.update_num_microbatches(consumed)
        batch = microbatches.get_current_global_batch_size()
        assert batch == (16 if consumed * 128 < 20480 else 32 if consumed * 128 < 61440 else 64)
        consumed += batch
        batches.append(batch)
        scheduler.step(batch)
    assert [batches.count(batch) for batch in (16, 32, 64)] == [10, 10, 18]


def _scheduler(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, groups: list[dict[str, float]]):
    args.start_weight_decay = args.end_weight_decay = args.weight_decay  # as Megatron's validate_args
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(training, "update_train_iters", lambda args: None)
    return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=groups))


def test_resume(parse: Parse, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    for directory in (empty, full):
        directory.mkdir()
    (full / TRACKER).write_text("2")
    line = f"{D8} --lr 1e-3 --train-iters 1"
    for options, load in (
        (f"--resume auto --save {full}", str(full)),
        (f"--resume=auto --save {empty}", None),
        (f"--resume {full} --save {empty}", str(full)),
        (f"--resume {full} --load {full}", str(full)),
        (f"--save {full}", None),
    ):
        args = parse(f"{line} {options}")
        apply_resume(args)
        assert args.load == load, options
    for options, message in (
        ("--resume auto", "--resume auto: goes on from --save; give that"),
        (f"--resume {empty}", "empty: there is no checkpoint; give another directory, or auto"),
        (f"--resume {full} --load {empty}", "say the same; give one of them"),
    ):
        args = parse(f"{line} {options}")
        with pytest.raises(ValueError, match=message):
            apply_resume(args)
