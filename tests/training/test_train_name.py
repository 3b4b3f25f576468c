"""The words of a run name, and the options that they are."""

import argparse

import pytest

from archscale_megatron.training.train_name import WORDS, apply_train_name, expand

ARGUMENTS = {name for options in WORDS.values() for name in options}
UNTIED = "untie_embeddings_and_output_weights"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scaling", {UNTIED: True}),
        ("scaling_tie", {UNTIED: False}),
        ("tie_scaling_rbase", {UNTIED: False, "rotary_base": 640000}),
        (
            "scaling_rbase_varlen_ls",
            {UNTIED: True, "rotary_base": 640000, "reset_at_eod": True, "label_smoothing": 0.1},
        ),
        (
            "nope_bias",
            {UNTIED: True, "position_embedding_type": "none", "add_qkv_bias": True, "attention_output_bias": True},
        ),
        (
            "scaling_ga_qknorm_sgate_shexp",
            {UNTIED: True, "attention_gate": True, "qk_layernorm": True, "sqrt_gate": True, "shared_expert": True},
        ),
    ],
)
def test_words(name: str, expected: dict[str, object]) -> None:
    assert expand(name, ARGUMENTS) == expected


@pytest.mark.parametrize("name", ["", "scaling_mup", "scaling_Tie", "scaling__tie", "tied"])
def test_unknown_words(name: str) -> None:
    with pytest.raises(ValueError, match=f"--train-name {name}: unknown word '.*; known are bias, ga, ls, .*, varlen$"):
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
    assert apply_train_name(args, agrees) == {UNTIED: True, "rotary_base": 640000, "label_smoothing": 0.1}
    assert (args.rotary_base, args.label_smoothing, getattr(args, UNTIED)) == (640000, 0.1, True)
    line = f"--train-name scaling_rbase_ls: {UNTIED} = True, rotary_base = 640000, label_smoothing = 0.1\n"
    assert capsys.readouterr().out == line
    args.rank = 1
    apply_train_name(args, {})
    args.train_name = None
    assert apply_train_name(args, {}) == {}
    assert capsys.readouterr().out == ""
