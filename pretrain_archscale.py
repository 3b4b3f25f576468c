"""Pretrain an ArchScale model with Megatron's own training loop.

    torchrun --nproc-per-node 8 pretrain_archscale.py --train-model sambay --depth 16 ...

Megatron's flags all work; ours are the group `archscale` of `--help`. See examples/ for whole commands.
"""

import multiprocessing
import signal

from archscale_megatron import cpu

# At the top level: Megatron's checkpoint worker imports this file again in a process of its own.
cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()


def main() -> None:
    """Arguments, then providers, then `megatron.training.pretrain`."""
    from archscale_megatron.training.arguments import parse_arguments

    args = parse_arguments()

    import torch
    import torch.distributed as dist
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from archscale_megatron.checkpoint import saving
    from archscale_megatron.data.datasets import datasets_provider
    from archscale_megatron.training.step import forward_step, model_provider

    # What is fp32 in a half-precision model, the chunked loss above all, is products of halves: TF32 holds those.
    torch.backends.cuda.matmul.allow_tf32 = args.bf16 or args.fp16
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    try:
        run(
            pretrain_cfg_container_from_args(args),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=model_provider,
            store=store,
        )
    except BaseException as error:
        # Data loader workers ignore SIGTERM, so that one sent to the whole job saves first; Python would wait for them.
        # Their end is no error now: the loader's handler would raise one, in the place of Megatron's exit code.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        if isinstance(error, SystemExit) and not error.code:  # after SIGTERM, say
            saving.exit_if_unsaved()
        raise
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early breaks the connections of the others
        dist.destroy_process_group()
    saving.exit_if_unsaved()


if __name__ == "__main__":
    main()
