"""The words of a run name, and the options that they are."""

import argparse

import pytest

from archscale_megatron.training.train_name import WORDS, apply_train_name, expand

ARGUMENTS = {name for options in WORDS.values() for name in options}
UNTIED, NAME = "untie_embeddings_and_output_weights", "parametrization_name"
SP = {UNTIED: True, NAME: "sp"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scaling", SP),
        ("scaling_tie", SP | {UNTIED: False}),
        ("tie_scaling_rbase_prolong", SP | {UNTIED: False, "rotary_base": 640000}),
        (
            "scaling_rbase_varlen_ls",
            SP | {"rotary_base": 640000, "reset_at_eod": True, "label_smoothing": 0.1},
        ),
        (
            "nope_bias",
            SP | {"position_embedding_type": "none", "add_qkv_bias": True, "attention_output_bias": True},
        ),
        (
            "scaling_ga_qknorm_sgate_shexp",
            SP | {"attention_gate": True, "qk_layernorm": True, "sqrt_gate": True, "shared_expert": True},
        ),
        ("scaling_mup_tie", {UNTIED: False, NAME: "mup++"}),
        ("scaling_ori_mup_cosine", {UNTIED: True, NAME: "mup", "lr_decay_style": "cosine"}),
        ("ori_mup", {UNTIED: True, NAME: "mup"}),
        ("mup_wsd", {UNTIED: True, NAME: "mup++", "lr_decay_style": "WSD"}),
        (
            "v2scale_mup_midtrain",
            {
                UNTIED: True,
                NAME: "mup++",
                "archscale_release": "2026-03",
                "independent_weight_decay": True,
                "count_embeddings": True,
                "base_hps_warmup_tokens0": 0,
            },
        ),
    ],
)
def test_words(name: str, expected: dict[str, object]) -> None:
    assert expand(name, ARGUMENTS) == expected


@pytest.mark.parametrize(
    "name", ["", "scaling_muP", "scaling_Tie", "scaling__tie", "tied", "ori", "mup_ori", "ori_mupp", "super_mup"]
)
def test_unknown_words(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"--train-name {name}: unknown word '.*'; known are bias, cosine, ga, ls, .*, wsd$"
    ):
        expand(name, ARGUMENTS)


def test_a_word_whose_option_is_not_there_is_unknown() -> None:
    with pytest.raises(ValueError, match="unknown word 'bias', 'ls'; known are ((?!bias)(?!ls).)*$"):
        expand("scaling_bias_ls", ARGUMENTS - {"attention_output_bias", "label_smoothing"})


def test_options_of_the_command_line_may_agree_but_not_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(
        train_name="scaling_rbase_ls", rank=0, rotary_base=10000, label_smoothing=0.1, **{UNTIED: False}
    )
    agrees = {"label_smoothing": "--label-smoothing"}
    with pytest.raises(ValueError, match="--rotary-base 10000 contradicts --train-name scaling_rbase_ls, .* is 640000"):
        apply_train_name(args, agrees | {"rotary_base": "--rotary-base"})
    assert capsys.readouterr().out == ""
    assert apply_train_name(args, agrees) == SP | {"rotary_base": 640000, "label_smoothing": 0.1}
    assert (args.rotary_base, args.label_smoothing, getattr(args, UNTIED)) == (640000, 0.1, True)
    line = f"--train-name scaling_rbase_ls: {UNTIED} = True, {NAME} = sp, rotary_base = 640000, label_smoothing = 0.1\n"
    assert capsys.readouterr().out == line
    args.rank = 1
    apply_train_name(args, {})
    args.train_name = None
    assert apply_train_name(args, {}) == {}
    assert capsys.readouterr().out == ""
