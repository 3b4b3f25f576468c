"""Parameter and FLOP counts against published numbers and against brute force."""

import pytest

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import (
    layer_flops,
    non_embedding_parameters,
    parameters,
    training_flops,
)

# Non-embedding / tied / untied, in millions, at vocabulary 32,000: computed from ArchScale e77b786, and swayoco from
# df4e070.
PUBLISHED = {
    "transformer": {
        8: (121.7, 154.4, 187.2), 12: (410.6, 459.7, 508.9), 16: (973.1, 1038.7, 1104.2),
        20: (1900.6, 1982.6, 2064.5), 24: (3284.3, 3382.6, 3480.9),
    },
    "samba": {
        8: (125.7, 156.9, 188.2), 12: (423.8, 470.6, 517.5), 16: (1003.8, 1066.3, 1128.8),
        20: (1960.0, 2038.0, 2116.1), 24: (3385.9, 3479.6, 3573.3),
    },
    "sambayoco": {
        8: (128.8, 161.1, 193.3), 12: (428.9, 477.3, 525.6), 16: (1009.7, 1074.2, 1138.7),
        20: (1964.0, 2044.7, 2125.3), 24: (3384.6, 3481.3, 3578.1),
    },
    "swayoco": {
        8: (124.1, 157.4, 190.6), 12: (417.6, 467.5, 517.4), 16: (988.4, 1054.9, 1121.5),
        20: (1928.7, 2011.9, 2095.1), 24: (3330.8, 3430.7, 3530.5),
    },
    "sambay": {
        8: (126.9, 158.6, 190.3), 12: (424.6, 472.2, 519.8), 16: (1002.3, 1065.8, 1129.3),
        20: (1952.9, 2032.3, 2111.6), 24: (3369.2, 3464.4, 3559.6),
    },
}  # fmt: skip
PUBLISHED["transformerls"] = PUBLISHED["transformer"]  # a window has no parameters
PUBLISHED["sambayw"] = PUBLISHED["sambaywr"] = PUBLISHED["sambay"]
# The ablations at depth 16: non-embedding / tied, in millions.
ABLATIONS = {
    "mambay": (994.8, 1056.2), "mambay2": (1006.6, 1068.0), "gdny": (989.5, 1050.9), "sgdny": (1018.1, 1082.6),
    "sambay2": (1005.0, 1068.5), "sambayattn": (1009.7, 1074.2), "sambayattnall": (1009.7, 1074.2),
    "sambaymlp": (985.3, 1046.8),
}  # fmt: skip
# Billions, untied, of the experts that ArchScale df4e070's README trains.
EXPERTS = {8: 0.913, 12: 2.950, 16: 6.879, 20: 13.329, 24: 22.930}
EXACT = {
    "sambay": {8: 126852000, 12: 424593360, 16: 1002330688, 20: 1952903280, 24: 3369150432},
    "transformer": {8: 121652224, 12: 410555904, 16: 973146112, 20: 1900648960, 24: 3284290560},
}


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("depth", [8, 12, 16, 20, 24])
def test_published_counts(family: str, depth: int) -> None:
    tied, untied = (build_architecture(family, depth, tied_embeddings=t) for t in (True, False))
    counts = (non_embedding_parameters(tied), parameters(tied), parameters(untied))
    assert tuple(round(c / 1e6, 1) for c in counts) == PUBLISHED[family][depth]
    assert EXACT.get(family, {}).get(depth, counts[0]) == counts[0]


@pytest.mark.parametrize("family", ABLATIONS)
def test_published_counts_of_ablations(family: str) -> None:
    arch = build_architecture(family, 16)
    assert tuple(round(c / 1e6, 1) for c in (non_embedding_parameters(arch), parameters(arch))) == ABLATIONS[family]


@pytest.mark.parametrize("depth", EXPERTS)
def test_published_counts_of_experts(depth: int) -> None:
    arch = build_architecture(
        "transformer_gqa4_h2_moe", depth, tied_embeddings=False, shared_expert=True, attention_gate=True, qk_norm=True
    )
    assert round(parameters(arch) / 1e9, 3) == EXPERTS[depth]
    assert (arch.num_experts, arch.experts_per_token) == (63, 7)


def test_phi4_mini_flash() -> None:
    arch = build_architecture("phi4miniflash", 32)
    assert (non_embedding_parameters(arch), parameters(arch)) == (3_340_399_104, 3_852_562_944)
    assert (arch.hidden_size, arch.num_attention_heads, arch.num_query_groups) == (2560, 40, 20)
    assert arch.tensor_parallel_sizes() == [1, 2, 5, 10]


@pytest.mark.parametrize(("depth", "more"), [(8, 3072), (16, 6144), (24, 9216)])
def test_differential_attention_adds_lambdas_and_norms(depth: int, more: int) -> None:
    assert parameters(build_architecture("sambayda", depth)) - parameters(build_architecture("sambay", depth)) == more


@pytest.mark.parametrize(
    ("family", "depth", "pattern"),
    [
        ("transformer", 3, "*-*-*-"),
        ("transformer_gqa4_h2_moe", 2, "*E*E"),
        ("mamba", 2, "m-m-"),
        ("mambay", 8, "m-m-m-m-m-*-U-X-"),
        ("mambay2", 8, "M-M-M-M-M-*-U-X-"),
        ("gdny", 8, "G-G-G-G-G-*-U-X-"),
        ("sgdny", 8, "G-W-G-W-G-*-U-X-"),
        ("sambay2", 8, "M-W-M-W-M-*-U-X-"),
        ("sambay_gqa4_moe", 8, "mEWEmEWEmE*EUEXE"),
        ("sambayattnall", 8, "m-W-m-W-m-*-U-U-"),
        ("phi4miniflash", 16, "m-W-m-W-m-W-m-W-m-*-U-X-U-X-U-X-"),
        ("transformerls", 8, "W-W-W-*-W-W-W-*-"),
        ("samba", 6, "m-W-m-W-m-W-"),
        ("sambay", 4, "m-W-m-*-"),
        ("sambay", 8, "m-W-m-W-m-*-U-X-"),
        ("sambay", 12, "m-W-m-W-m-W-m-*-U-X-U-X-"),
        ("sambayoco", 8, "m-W-m-W-m-*-X-X-"),
        ("swayoco", 8, "W-W-W-W-W-*-X-X-"),
    ],
)
def test_patterns(family: str, depth: int, pattern: str) -> None:
    assert build_architecture(family, depth).pattern == pattern


def test_shared_state_of_sambay() -> None:
    arch = build_architecture("sambay", 16)
    assert (arch.memory_writer, arch.kv_writer) == (2 * 8, 2 * 9)  # layers L/2 and L/2+1
    payloads = [arch.payload_after(i) for i in range(32)]
    assert payloads[15] == ()
    assert payloads[16] == payloads[17] == ("memory",)
    assert payloads[18] == payloads[27] == ("memory", "kv")
    assert payloads[28] == ("kv",)  # layer 14 is the last GMU
    assert payloads[30] == ()
    assert arch.payload_size(("memory", "kv")) == 2 * arch.hidden_size + 2 * 4 * 128


@pytest.mark.parametrize(
    ("family", "writer", "size"),
    [("sambay2", 16, 4096), ("gdny", 16, 3072), ("sambayattn", 18, 2048), ("sambaymlp", 19, 7680)],
)
def test_the_memory_has_other_writers(family: str, writer: int, size: int) -> None:
    arch = build_architecture(family, 16)
    assert (arch.memory_writer, arch.memory_size) == (writer, size)
    assert arch.payload_after(writer)[:1] == ("memory",)


@pytest.mark.parametrize(("depth", "sizes"), [(8, [1, 2]), (12, [1, 3]), (16, [1, 2, 4]), (24, [1, 2, 3, 6])])
def test_tensor_parallel_sizes(depth: int, sizes: list[int]) -> None:
    assert build_architecture("sambay", depth).tensor_parallel_sizes() == sizes


@pytest.mark.parametrize(
    ("family", "depth", "sizes"),
    [("sambayda", 16, [1, 2]), ("sambayda", 24, [1, 3]), ("gdny", 16, [1, 2]), ("mamba", 8, [1, 2, 4, 8])],
)
def test_tensor_parallel_sizes_of_pairs_and_scans(family: str, depth: int, sizes: list[int]) -> None:
    assert build_architecture(family, depth).tensor_parallel_sizes() == sizes


def test_attention_flops_count_every_visible_pair() -> None:
    arch: Architecture = build_architecture("samba", 8, local_window=5)
    length = 12
    pairs = sum(1 for i in range(length) for j in range(length) if 0 <= i - j < 5)
    projections = 2 * (arch.hidden_size * (arch.query_size + 2 * arch.kv_size) + arch.query_size * arch.hidden_size)
    assert layer_flops(arch, "W", length) == pytest.approx(projections + 4 * arch.query_size * pairs / length)


def test_training_flops_is_six_per_parameter_and_attention() -> None:
    arch = build_architecture("transformer", 16)
    matrices = parameters(arch) - arch.hidden_size * (2 * 16 + 1)  # all but the norms
    scores = 3 * 16 * 4 * arch.query_size * (4096 + 1) / 2
    assert training_flops(arch, 4096) == pytest.approx(6 * matrices + scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sambaz", 16), "unknown family; did you mean samba or .*sambay"),
        (("sambay", 10), "multiple of 4; the nearest: 8, 12"),
        (("samba", 7), "multiple of 2; the nearest: 6, 8"),
        (("transformer", 14), "14 attention heads cannot share 3 key-value heads"),
        (("sambayda", 12), "3 is odd; give an even --num-kv-heads, or one of the depths 8, 16, 24, 32"),
        (("sambayda", 20), "5 is odd; give an even --num-kv-heads, or one of the depths 8, 16, 24, 32"),
        (("phi4miniflash", 20), "25 attention heads .* divides the first, or one of the depths 16, 32"),
        (("transformer", 0), "--depth 0: must be a positive integer"),
    ],
)
def test_illegal_architectures_name_the_legal_ones(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_architecture(*arguments)
