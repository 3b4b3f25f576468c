"""What a fresh clone is installed from: the Python that is found, the pins, and the files that a build takes."""

import ast
import configparser
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.command_lines import ROOT

FINDER = ROOT / "tools/find_python.sh"
OPTIONAL = {"mamba_ssm", "causal_conv1d", "flash_attn", "transformer_engine", "transformer_engine_torch", "fla"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(text: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def runtime() -> list[Requirement]:
    return requirements(setup_cfg()["options"]["install_requires"])


def extra(name: str) -> list[Requirement]:
    return requirements(setup_cfg()["options.extras_require"][name])


def pins() -> dict[str, str]:
    found = {}
    for requirement in requirements((ROOT / "constraints.txt").read_text()):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not an exact version"
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def names(required: list[Requirement]) -> set[str]:
    return {canonicalize_name(r.name) for r in required}


def test_pins_lie_in_the_ranges() -> None:
    pinned = pins()
    for requirement in runtime() + extra("dev") + extra("eval"):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pinned[name], prereleases=True), requirement
    assert (pinned["megatron-core"], pinned["torch"], pinned["emerging-optimizers"]) == ("0.19.2", "2.13.0", "0.3.0")


def test_pins_are_what_the_tests_run_with() -> None:
    assert sys.version_info[:2] == (3, 12)
    different = {}
    for name, pinned in pins().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if installed is None or installed.partition("+")[0] != pinned:
            different[name] = (pinned, installed)
    assert not different


def test_every_dependency_is_pinned_and_nothing_else() -> None:
    """The closure of what setup.cfg asks for, over the metadata of what is installed."""
    from importlib.metadata import requires

    todo = [(r, r.extras) for r in runtime() + extra("dev") + extra("eval")]
    seen: set[tuple[str, str]] = set()
    closure = set()
    while todo:
        requirement, extras = todo.pop()
        name = canonicalize_name(requirement.name)
        closure.add(name)
        for wanted in extras or {""}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            for text in requires(name) or []:
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": wanted}):
                    todo.append((child, child.extras))
    assert closure == set(pins())


def test_import_of_torch_tells_lm_eval_alone() -> None:
    """`torch.backends` is called by every program that imports torch: it must not import anything for it."""
    declared = setup_cfg()["options.entry_points"]["torch.backends"].split("=", 1)[1].strip()
    assert declared == "archscale_lm_eval:register"
    program = (
        "import sys, archscale_lm_eval as plugin; plugin.register(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lm_eval', 'megatron', 'transformers', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_other_apex_is_never_a_dependency() -> None:
    config = setup_cfg()
    everything = runtime() + [r for name in config["options.extras_require"] for r in extra(name)]
    assert "apex" not in names(everything) | set(pins())
    assert not re.search(r"install.*\bapex\b", (ROOT / "Dockerfile").read_text())


def _imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _sources() -> list[Path]:
    return [
        ROOT / "pretrain_archscale.py",
        ROOT / "archscale_lm_eval.py",
        *ROOT.glob("archscale_megatron/**/*.py"),
        *ROOT.glob("tools/**/*.py"),
    ]


def test_imports_are_declared() -> None:
    distributions = {"megatron": "megatron-core", "fla": "flash-linear-attention", "yaml": "PyYAML"}
    declared = names(runtime() + extra("gpu") + extra("eval") + extra("vllm")) | {"triton"}  # PyTorch brings Triton
    own = {"archscale_megatron", "tools"} | {p.stem for p in ROOT.glob("tools/*.py")}
    for path in _sources():
        for module in _imports(path, top_level_only=False) - own - set(sys.stdlib_module_names):
            assert canonicalize_name(distributions.get(module, module)) in declared, f"{path}: {module}"


def test_gpu_packages_are_imported_where_they_are_used() -> None:
    for path in _sources():
        assert not _imports(path, top_level_only=True) & OPTIONAL, path


def test_docker_and_setup_ask_for_the_same_kernels() -> None:
    in_docker = {str(Requirement(r)) for r in re.findall(r'"([\w-]+~=[\d.]+)"', (ROOT / "Dockerfile").read_text())}
    compiled = {"causal-conv1d", "mamba-ssm", "flash-linear-attention"}
    assert in_docker == {str(r) for r in extra("gpu") if r.name in compiled}


def test_docker_leaves_what_is_not_source() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


# --- tools/find_python.sh -------------------------------------------------------------------------------------


def find(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the finder where only the programs of tmp_path/bin and the shell's own exist."""
    system = tmp_path / "system"
    system.mkdir()
    for name in ("dirname", "cat", "sh"):
        found = next(Path(d) / name for d in ("/bin", "/usr/bin") if (Path(d) / name).exists())
        (system / name).symlink_to(found)
    variables = {"PATH": f"{tmp_path / 'bin'}:{system}", "HOME": str(tmp_path), **environment}
    return subprocess.run(
        ["/bin/sh", str(FINDER)], env=variables, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )


def fake_python(path: Path, release: tuple[int, int]) -> Path:
    """A Python that says it is of `release` and at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    say = f"import sys; sys.version_info = {(*release, 0)}; sys.executable = {str(path)!r}; exec(sys.argv[1])"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{say}" "$2"\n')
    path.chmod(0o755)
    return path


def fake_pyenv(path: Path, prefix: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$*" = "prefix 3.12" ] && echo {prefix}\n')
    path.chmod(0o755)


@pytest.mark.parametrize("place", ["in PATH", "PYENV_ROOT", "home"])
def test_finder_asks_pyenv_first(tmp_path: Path, place: str) -> None:
    wanted = fake_python(tmp_path / "versions/3.12.1/bin/python", (3, 12))
    fake_python(tmp_path / "bin/python3.12", (3, 12))
    root = {"in PATH": tmp_path, "PYENV_ROOT": tmp_path / "elsewhere", "home": tmp_path / ".pyenv"}[place]
    fake_pyenv(root / "bin/pyenv", tmp_path / "versions/3.12.1")
    found = find(tmp_path, **({"PYENV_ROOT": str(root)} if place == "PYENV_ROOT" else {}))
    assert (found.stdout.strip(), found.returncode) == (str(wanted), 0)


def test_finder_prefers_3_12_and_passes_over_older(tmp_path: Path) -> None:
    newer = fake_python(tmp_path / "bin/python3", (3, 13))
    assert find(tmp_path).stdout.strip() == str(newer)
    exact = fake_python(tmp_path / "bin/python3.12", (3, 12))
    (tmp_path / "again").mkdir()
    found = find(tmp_path / "again", PATH=f"{tmp_path / 'bin'}:{tmp_path / 'system'}")
    assert found.stdout.strip() == str(exact)


def test_finder_takes_the_given_python_or_nothing(tmp_path: Path) -> None:
    old = fake_python(tmp_path / "old python", (3, 11))
    fake_python(tmp_path / "bin/python3.12", (3, 12))
    refused = find(tmp_path, PYTHON=str(old))
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "is not a Python >= 3.12" in refused.stderr
    new = fake_python(tmp_path / "new python", (3, 13))
    (tmp_path / "again").mkdir()
    assert find(tmp_path / "again", PYTHON=str(new)).stdout.strip() == str(new)


def test_finder_without_a_python_says_so_in_one_line(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin/python3", (3, 11))
    found = find(tmp_path)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and found.stderr.startswith("no Python >= 3.12 found")


def test_make_stops_where_the_install_fails(tmp_path: Path) -> None:
    """In a copy of what `make install` reads; make must fail, and leave nothing that looks installed."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", ".python-version"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/find_python.sh").write_bytes(FINDER.read_bytes())
    (tmp_path / "tools/find_python.sh").chmod(0o755)
    old = fake_python(tmp_path / "old", (3, 11))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    made = subprocess.run(
        ["make", "test", f"PYTHON={old}"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert made.returncode != 0
    assert "is not a Python >= 3.12" in made.stderr
    assert not (tmp_path / ".venv").exists()
