"""Initial values over real tensor-, pipeline- and data-parallel ranks: bit for bit those of one process.

As a program, this module is the worker.
"""

from __future__ import annotations

import sys

from tests.launch import torchrun

LAYOUTS = [(4, 1), (2, 2), (1, 4)]  # tensor x pipeline parallel, of 4 processes
NAMES = ("sp", "mup++")


def test_initial_values_are_the_same_at_every_layout() -> None:
    output = torchrun(4, "-m", "tests.mup.test_initial_layouts", "worker").stdout
    for name in NAMES:
        for tp, pp in LAYOUTS:
            assert f"{name} tp{tp} pp{pp}: equal" in output


def worker() -> None:
    from archscale_megatron import cpu

    cpu.install()
    from archscale_megatron import megatron_patches

    megatron_patches.apply()
    import torch
    import torch.distributed as dist
    from megatron.core import mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from archscale_megatron.archs.build import build_architecture
    from archscale_megatron.archs.splits import split_by_compute
    from archscale_megatron.model.spec import build_model
    from archscale_megatron.mup.initialization import named_global_parameters, partition, partition_of
    from archscale_megatron.mup.rules import Parametrization
    from tests.model.building import config_of
    from tests.process_groups import end_layout

    def parameters(arch, run, tp: int, pp: int):
        pattern = split_by_compute(arch, pp, 32)
        config = config_of(
            arch, layer_pattern=pattern, is_hybrid_model=True, tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp, parametrization=run, sequence_parallel=tp > 1,
        )  # fmt: skip
        model = build_model(
            config,
            padded_vocab_size=arch.vocab_size,
            max_sequence_length=32,
            seed=3407,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
        )
        return dict(named_global_parameters(model))

    dist.init_process_group("gloo")
    for name in NAMES:
        run = Parametrization(name, width_ratio=0.5)
        for family in ("sambay", "transformer_gqa4_h2_moe"):
            arch = build_architecture(
                family, 8, aspect_ratio=16, head_dim=8, num_heads=8, num_kv_heads=4, vocab_size=128, context_length=32,
                tied_embeddings=False, **({"sparsity": 2, "top_k": 2} if family.endswith("moe") else {}),
            )  # fmt: skip
            mpu.initialize_model_parallel()
            model_parallel_cuda_manual_seed(1)
            whole = parameters(arch, run, 1, 1)
            end_layout()
            for tp, pp in LAYOUTS:
                mpu.initialize_model_parallel(tp, pp)
                model_parallel_cuda_manual_seed(1)
                part = parameters(arch, run, tp, pp)
                assert pp > 1 or part.keys() == whole.keys()
                for parameter, value in part.items():
                    split = partition_of(parameter, value)
                    expected = whole[parameter]
                    if split:
                        expected = partition(expected, split.dim, split.blocks, split.size, split.rank)
                    assert torch.equal(value, expected), f"{parameter} at tp{tp} pp{pp}"
                dist.barrier()
                if dist.get_rank() == 0 and family == "sambay":
                    print(f"{name} tp{tp} pp{pp}: equal", flush=True)
                end_layout()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__" and sys.argv[1:] == ["worker"]:
    worker()
