"""Check pretrain_archscale.py command lines as the program does, without data, GPU or process groups.

Run as a program it reads a JSON list of [argument list, world size] and writes the list of error messages (null
where the command is fine). One process for all, because importing Megatron takes seconds.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "pretrain_archscale.py"

Command = tuple[list[str], int]
"""What follows pretrain_archscale.py, and how many processes are started."""


def errors_of(commands: list[Command]) -> list[str | None]:
    """For each command the message with which it is refused, or None."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(commands),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def command_of(words: list[str]) -> Command:
    """From a whole command line, such as `torchrun --nproc-per-node 8 pretrain_archscale.py --depth 16`."""
    position = next(i for i, word in enumerate(words) if Path(word).name == PROGRAM)
    launcher = {}
    for word, following in zip(words[:position], words[1 : position + 1], strict=True):
        name, _, value = word.partition("=")
        launcher[name.replace("_", "-")] = value or following
    processes = int(launcher.get("--nproc-per-node", 1)) * int(launcher.get("--nnodes", 1))
    return words[position + 1 :], processes


def example_command(script: Path, tmp_path: Path, *options: str, **environment: str) -> Command:
    """What `script` starts: it runs with a torchrun and an srun that only write down their arguments."""
    stubs = tmp_path / "bin"
    stubs.mkdir(parents=True, exist_ok=True)
    written = tmp_path / "command.json"
    written.unlink(missing_ok=True)
    write = f"import json, sys; json.dump(sys.argv[1:], open({str(written)!r}, 'w'))"
    for name, body in {
        "torchrun": f'exec {shlex.quote(sys.executable)} -c {shlex.quote(write)} "$@"',
        "srun": 'while [ "$1" != torchrun ]; do shift; done; exec "$@"',
        "scontrol": "echo node0001; echo node0002",
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n")
        (stubs / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0001-0128]", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}
    variables = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        **(slurm if script.suffix == ".slurm" else {}),
        **environment,
    }
    result = subprocess.run(["bash", str(script), *options], env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{script}: {result.stderr}"
    return command_of(json.loads(written.read_text()))


def _error(arguments: list[str], world_size: int) -> str | None:
    from megatron.training.arguments import parse_args, validate_args

    from archscale_megatron.training import arguments as ours

    sys.argv = [PROGRAM, *arguments]
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world_size)}
    parsers = []

    def provider(parser):
        parsers.append(parser)
        return ours.add_arguments(parser)

    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        try:
            args = parse_args(provider)
            ours.apply_arguments(args, ours.explicit_options(parsers[0]))
            validate_args(args)
        except SystemExit:
            return printed.getvalue().strip().splitlines()[-1]
        except (ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    from archscale_megatron import cpu

    cpu.install()

    from archscale_megatron import megatron_patches

    megatron_patches.apply()
    found = [_error(arguments, world_size) for arguments, world_size in json.load(sys.stdin)]
    print("\n" + json.dumps(found))
