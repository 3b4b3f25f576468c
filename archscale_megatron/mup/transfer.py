"""Transfer laws: from the hyperparameters of a small base model to those of a target depth, batch and token budget.

Plain arithmetic. Sources: ArchScale e77b786, `setup` of pretrain.py (release "2025-07", arXiv 2507.06607); df4e070
(release "2026-03", and HyperP, arXiv 2603.28743).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.mup.classes import ParameterClass
from archscale_megatron.mup.rules import Parametrization, Release


@dataclass(frozen=True, kw_only=True)
class BaseHyperparameters:
    """What was tuned on the base model. Defaults: e77b786, `BaseHyperparameters` of pretrain.py.

    Attributes:
        d0: depth of the base model.
        eta0: its learning rate.
        b0: its batch, in tokens.
        t0: its training tokens.
        hd0: head size at which attention logits are q.k / sqrt(head size).
        w_init0: factor of the matrices' initial values under μP.
        n0_mult: the base model's parameters / d0^3, for the token law of 2025-07.
        weight_decay0: AdamW's, which multiplies the learning rate.
        eps0, beta1_0, beta2_0: Adam's; not scaled.
        min_lr0: learning rate at the end.
        min_lr_mult: the same, as a part of the peak (2026-03). At most one of the two is not 0.
        warmup_tokens0: over which the learning rate rises; not scaled.
        muon_beta_0: Muon's momentum.
    """

    d0: int = 16
    eta0: float = 4e-4
    b0: int = 2**21
    t0: int = 10**11
    hd0: int = 128
    w_init0: float = 1.0
    n0_mult: float = 237568
    weight_decay0: float = 0.1
    eps0: float = 1e-8
    min_lr0: float = 0.0
    min_lr_mult: float = 0.0
    warmup_tokens0: int = 10**9
    beta1_0: float = 0.9
    beta2_0: float = 0.95
    muon_beta_0: float = 0.95

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, most, legal = LIMITS.get(field.name, POSITIVE)
            if not least <= value <= most:
                raise ValueError(f"{option(field.name)} {value}: must be {legal}")
        if self.min_lr0 and self.min_lr_mult:
            raise ValueError(f"{option('min_lr0')} and {option('min_lr_mult')} say the same; give one of them")

    @property
    def n0(self) -> float:
        """Parameters of the base model without embeddings (the transformer of depth d0)."""
        return self.n0_mult * self.d0**3


_TINY = math.nextafter(0, 1)
POSITIVE = (_TINY, math.inf, "more than 0")
NOT_NEGATIVE = (0.0, math.inf, "0 or more")
MOMENT = (0.0, math.nextafter(1, 0), "0 or more and less than 1")
LIMITS = {
    "weight_decay0": NOT_NEGATIVE, "min_lr0": NOT_NEGATIVE, "warmup_tokens0": NOT_NEGATIVE,
    "min_lr_mult": (0.0, 1.0, "from 0 to 1"),
    "beta1_0": MOMENT, "beta2_0": MOMENT, "muon_beta_0": MOMENT,
}  # fmt: skip
BASES: Mapping[Release, BaseHyperparameters] = MappingProxyType(
    {"2025-07": BaseHyperparameters(), "2026-03": BaseHyperparameters(d0=8, eta0=6e-4, t0=9_500_000_000)}
)
INDEPENDENT_WEIGHT_DECAY = 4e-5  # df4e070: the default that goes with the run name v2scale


def option(field: str) -> str:
    """The option of a base hyperparameter: eta0 -> --base-hps.eta0."""
    return f"--base-hps.{field.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Those of one run.

    Attributes:
        learning_rate: peak, of all parameters but matrices.
        matrix_learning_rate: peak, of matrices.
        min_learning_rate: at the end; that of matrices is in proportion.
        global_batch_tokens, train_tokens, warmup_tokens: tokens of a batch, of the run, of its warm-up.
        weight_decay: AdamW's, of parameters that have one.
        matrix_weight_decay: of matrices.
        adam_beta1, adam_beta2, adam_eps, muon_momentum: the optimizers'.
    """

    learning_rate: float
    matrix_learning_rate: float
    min_learning_rate: float
    global_batch_tokens: int
    train_tokens: int
    warmup_tokens: int
    weight_decay: float
    matrix_weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    muon_momentum: float


def transfer(
    base: BaseHyperparameters,
    run: Parametrization,
    arch: Architecture,
    *,
    batch_tokens: int,
    train_tokens: int,
    learning_rate: float | None = None,
) -> Hyperparameters:
    """The hyperparameters of `arch` under `run`'s parametrisation.

        lr = eta0 sqrt(b/b0)                                  (SP, μP)
        lr = eta0 sqrt(b/b0) sqrt(d0/d)                       (μP++: arXiv 2507.06607, appendix)
        lr = eta0 sqrt(b/b0) sqrt(d0/d) (T/t0)^-0.32          (HyperP: arXiv 2603.28743; df4e070, pretrain.py:325-348)

    and, for matrices, times the parametrisation's d0/d. Weight decay and warm-up stay, but: HyperP has neither; Muon in
    2026-03 has no warm-up, and its weight decay is times d0/d (arXiv 2512.05620). Independent weight decay is over the
    learning rate, so that a step at the peak takes `weight_decay0` of each weight (arXiv 2309.14322).

    Args:
        batch_tokens, train_tokens: b and T (see `rounded_batch` and `target_tokens`).
        learning_rate: in the place of `lr` above.
    Raises:
        ValueError: the end's learning rate is higher than the peak.
    """
    eta = learning_rate
    if eta is None:
        eta = base.eta0 * math.sqrt(batch_tokens / base.b0)
        if run.scales_with_depth:
            eta *= math.sqrt(base.d0 / arch.depth)
        if run.name == "hyperp":
            eta *= (train_tokens / base.t0) ** -0.32
    minimum = base.min_lr0 or base.min_lr_mult * eta
    if minimum > eta:
        raise ValueError(f"{option('min_lr0')} {minimum:g}: is more than the peak of the learning rate, {eta:g}")

    second_order = run.muon and run.release == "2026-03"
    weight_decay = 0.0 if run.name == "hyperp" else base.weight_decay0
    if second_order:
        weight_decay *= base.d0 / arch.depth
    if run.independent_weight_decay:
        weight_decay /= eta
    return Hyperparameters(
        learning_rate=eta,
        matrix_learning_rate=eta * run.learning_rate_multiplier(ParameterClass.MATRIX),
        min_learning_rate=minimum,
        global_batch_tokens=batch_tokens,
        train_tokens=train_tokens,
        warmup_tokens=0 if run.name == "hyperp" or second_order else base.warmup_tokens0,
        weight_decay=weight_decay,
        matrix_weight_decay=weight_decay * run.weight_decay_multiplier(ParameterClass.MATRIX),
        adam_beta1=base.beta1_0,
        adam_beta2=base.beta2_0,
        adam_eps=base.eps0,
        muon_momentum=base.muon_beta_0,
    )


def rounded_batch(tokens: int, multiple: int, release: Release) -> int:
    """`tokens` as a multiple of a micro batch on every rank: the next below (e77b786) or the nearest (df4e070).

    Raises:
        ValueError: that is none.
    """
    rounded = (tokens if release == "2025-07" else tokens + multiple // 2) // multiple * multiple
    if not rounded:
        raise ValueError(
            f"a batch of {tokens:,} tokens is less than one micro batch on every rank, {multiple:,} tokens; "
            "give a larger --base-hps.b0 or --global-batch-size, or less ranks or a smaller micro batch"
        )
    return rounded


# Parameters without embeddings / depth^3 are a r^2 + c r, of the aspect ratio r: family -> (a, c). Heads have size 128,
# and there are depth / 4 key-value heads. e77b786, pretrain.py:191-203, where 14.5 r^2 is the transformer's at r = 128.
_SAMBAY = (14.5, 144)
PARAMETER_LAWS = {
    "transformer": (12, 320), "transformerls": (12, 320), "samba": (15, 160),
    "sambay": _SAMBAY, "sambayda": _SAMBAY, "sambay2": _SAMBAY, "phi4miniflash": _SAMBAY,
    "sambayoco": (13.5, 208), "sambayattn": (13.5, 208), "sambayattnall": (13.5, 208),
    "mambay": (16, 64), "mambay2": (16, 64), "gdny": (16, 64), "sgdny": (16, 64), "sambaymlp": (15.5, 144),
}  # fmt: skip
# df4e070, `get_parameters_count` of lit_gpt/config.py, has more families.
PARAMETER_LAWS_OF_2026 = PARAMETER_LAWS | {
    "sambayw": _SAMBAY, "sambaywr": _SAMBAY, "sambay_gqa4_moe": _SAMBAY, "swayoco": (12, 288),
}  # fmt: skip


def target_tokens(
    base: BaseHyperparameters, arch: Architecture, release: Release, count_embeddings: bool = False
) -> int:
    """T = t0 N(d)/N(d0), ArchScale's own counts of parameters; not those of `archs.counts`.

    N(d0) is n0 = n0_mult d0^3 (2025-07), or the same family's at depth d0 (2026-03).

    Args:
        count_embeddings: N counts embedding and output layer too ("v2scale" of 2026-03).
    Raises:
        ValueError: there is no law for this family, depth or heads; says to give --max-tokens.
    """
    if release == "2025-07":
        if count_embeddings:
            raise ValueError("--count-embeddings: is of --archscale-release 2026-03; give that too, or leave it out")
        return int(base.t0 * parameters(arch, release) / base.n0)
    ratio = arch.hidden_size // arch.depth
    smaller = build_architecture(
        arch.family, base.d0, aspect_ratio=ratio, vocab_size=arch.vocab_size, tied_embeddings=arch.tied_embeddings
    )
    counts = [parameters(a, release) for a in (arch, smaller)]
    if count_embeddings:
        copies = 1 if arch.tied_embeddings else 2
        counts = [n + copies * a.hidden_size * a.vocab_size for n, a in zip(counts, (arch, smaller), strict=True)]
    return int(base.t0 * counts[0] / counts[1])


def parameters(arch: Architecture, release: Release) -> float:
    """N(d) without embeddings, by the release's law; raises ValueError as `target_tokens` does."""
    ratio, depth = arch.hidden_size // arch.depth, arch.depth
    usual = build_architecture(arch.family, depth, aspect_ratio=ratio)
    heads = (arch.num_attention_heads, arch.num_query_groups, arch.head_dim)
    if heads != (usual.num_attention_heads, usual.num_query_groups, usual.head_dim):
        raise _no_law(release, f"{arch.family} with {heads[0]} heads and {heads[1]} key-value heads of {heads[2]}")
    if release == "2026-03" and arch.family.startswith("transformer"):
        return 12 * ratio**2 * depth**3 + 2 * ratio * depth**2 * (arch.query_size + arch.kv_size)
    laws = PARAMETER_LAWS if release == "2025-07" else PARAMETER_LAWS_OF_2026
    if arch.family not in laws:
        more = ["other transformers"] if release == "2026-03" else []
        raise _no_law(release, f"{arch.family}; there is one for {', '.join([*laws, *more])}")
    if depth % 4:
        raise _no_law(release, f"{arch.family} at depth {depth}, which is no multiple of 4")
    squared, linear = laws[arch.family]
    return (squared * ratio**2 + linear * ratio) * depth**3


def _no_law(release: Release, what: str) -> ValueError:
    return ValueError(f"ArchScale {release} has no law for the training tokens of {what}: give --max-tokens")
