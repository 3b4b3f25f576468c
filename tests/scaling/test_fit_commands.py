"""`scaling fit-*`: the paper's losses, tables and TensorBoard folders that are right or wrong, and what is printed."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.counts import parameters, training_flops
from archscale_megatron.scaling.__main__ import main
from tests.command_lines import ROOT

PAPER = ROOT / "examples/paper_losses.csv"
# A, b and C as recorded, of fits that were made before this program.
FLOPS = {
    "Transformer++ SP": (239.9, 0.1153, 1.1113),
    "Transformer++ μP": (54.5, 0.0763, 0.6428),
    "Transformer++ μP++": (49.6, 0.0745, 0.6416),
    "Samba+YOCO μP++": (40.6, 0.0702, 0.6069),
    "SambaY μP++": (39.8, 0.0694, 0.5847),
}
DATA = {
    "Transformer++ SP": 1.860,
    "Transformer++ μP++ tied": 1.821,
    "Transformer++ μP++ tied batch scaling": 1.828,
    "Transformer++ μP++ tied Normal init": 1.841,
    "Transformer++ μP++ WSD": 1.855,
    "Transformer++ μP++ untied": 1.827,
    "Transformer++ μP++ LR scaling + independent WD": 1.823,
    "SambaY μP++": 1.817,
    "Samba+YOCO μP++": 1.827,
}


def fitted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:
    main([*map(str, arguments), "--json", *(() if "--draws" in arguments else ("--draws", "0"))])
    return json.loads(capsys.readouterr().out)


def table(path: Path, rows: list[dict]) -> Path:
    """A table of the kind that the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sweep(**changes: object) -> list[dict]:
    """The columns of a sweep, with losses of a law: A 49.6, b 0.0745, C 0.64."""
    return [
        {"family": "sambay", "depth": d, "train_name": "mup", "status": "done", "parameters": 1e5 * d**3,
         "tokens": 1e9, "flops": f, "loss": 49.6 * f**-0.0745 + 0.64, **changes}
        for d, f in ((8, 9e18), (12, 1e20), (16, 6e20), (20, 2e21), (24, 7e21))
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_flops_scaling_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = {series["name"]: series for series in fitted(capsys, "fit-flops", PAPER)["series"]}
    assert found.keys() == FLOPS.keys()
    for name, (a, b, c) in FLOPS.items():
        assert found[name]["C"] == pytest.approx(c, abs=1e-3)
        assert found[name]["b"] == pytest.approx(b, abs=1e-4)
        assert found[name]["A"] == pytest.approx(a, abs=0.1)
    assert found["Transformer++ SP"]["r_squared"] == pytest.approx(0.99967, abs=1e-5)


def test_data_scaling_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    result = fitted(capsys, "fit-data", PAPER)
    found = {series["name"]: series for series in result["series"]}
    assert found.keys() == DATA.keys() | {"Transformer++ μP"}
    for name, c in DATA.items():
        assert found[name]["C"] == pytest.approx(c, abs=1e-3)
    assert found["Transformer++ SP"]["b"] == pytest.approx(0.442, abs=1e-3)
    tied = found["Transformer++ μP++ tied"]
    assert tied["b"] == pytest.approx(0.3725, abs=1e-4)
    assert tied["A"] * 1e9 ** -tied["b"] == pytest.approx(1.281, abs=1e-3)  # recorded of billions of tokens
    # The run that diverged is in the table, and in no fit.
    assert len(found["Transformer++ μP"]["points"]) == 5
    assert result["left_out"] == {"of flops scaling": 25, "diverged": 1}


def test_table_of_the_paper_says_what_facts_say() -> None:
    with PAPER.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25 + 60
    transformer = [r for r in rows if r["scaling"] == "flops" and r["variant"] == "SP"]
    assert [float(f"{float(r['flops']):.3e}") for r in transformer] == [9.123e18, 1.039e20, 5.838e20, 2.227e21, 6.65e21]
    for row in rows:
        n, t = float(row["parameters"]), float(row["tokens"])
        if row["scaling"] == "data" or row["family"] == "Transformer++":
            assert float(row["flops"]) == pytest.approx(6 * n * t, rel=1e-6)
    assert [r["loss"] for r in rows if r["status"] != "done"] == ["2.0075"]


def test_chinchilla_takes_both_scalings(capsys: pytest.CaptureFixture[str]) -> None:
    result = fitted(capsys, "fit-chinchilla", PAPER)
    assert {s["name"]: len(s["points"]) for s in result["series"]} == {
        "Transformer++ SP": 11, "Transformer++ μP": 10, "Samba+YOCO μP++": 11, "SambaY μP++": 11,
    }  # fmt: skip
    assert result["without_fit"]["Transformer++ μP++"] == "5 points for 5 free parameters; needs 6 or more"
    assert all(series["r_squared"] > 0.999 for series in result["series"])


def test_printed_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, note in {"fit-flops": "", "fit-data": "", "fit-chinchilla": "E 0.0000: at its bound"}.items():
        main([command, str(PAPER), "-o", str(tmp_path / f"{command}.png"), "--draws", "20"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("L(")
        assert "Transformer++ SP" in lines[2] and "95%" in lines[1]
        assert any(line.startswith(note) for line in lines)
        assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == "1 point left out: 1 diverged"


def test_picture_has_points_fits_and_limits() -> None:
    from archscale_megatron.scaling.fit_commands import Series
    from archscale_megatron.scaling.fit_plot import draw
    from archscale_megatron.scaling.laws import FLOPS as law
    from archscale_megatron.scaling.laws import fit
    from archscale_megatron.scaling.points import Point

    points = [Point("sambay", {"flops": row["flops"]}, row["loss"]) for row in sweep()]
    x, loss = np.array([[p.values["flops"]] for p in points]), np.array([p.loss for p in points])
    (axes,) = draw(law, [Series("sambay", points, fit(law, x, loss), None)]).axes
    measured, line, limit = axes.lines
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert np.array_equal(measured.get_xydata(), np.column_stack([x, loss]))
    assert line.get_ydata() == pytest.approx(49.6 * np.asarray(line.get_xdata()) ** -0.0745 + 0.64, rel=1e-6)
    assert limit.get_ydata() == pytest.approx([0.64, 0.64], abs=1e-5) and limit.get_linestyle() == "--"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_failed_points_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    rows = sweep()
    bad = [{"status": "failed", "loss": ""}, {"status": "failed", "loss": ""}, {"loss": "nan"}, {"status": "nan"},
           {"loss": "inf"}, {"loss": ""}, {"flops": ""}]  # fmt: skip
    rows += [{**rows[0], **change} for change in bad]
    path = table(tmp_path / f"results{suffix}", rows)
    result = fitted(capsys, "fit-flops", path)
    assert result["left_out"] == {"failed": 2, "NaN": 2, "infinite": 1, "without loss": 1, "without flops": 1}
    (series,) = result["series"]
    assert series["name"] == "sambay mup" and len(series["points"]) == 5
    assert [series[name] for name in "AbC"] == pytest.approx([49.6, 0.0745, 0.64], rel=1e-4)
    main(["fit-flops", str(path), "--draws", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "7 points left out: 2 failed, 2 NaN, 1 infinite, 1 without loss, 1 without flops"
    )


def test_rows_of_a_sweep_over_learning_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "loss": row["loss"] + off, "lr": lr} for row in sweep() for lr, off in (("4e-4", 0), ("1e-3", 0.1))]
    path = table(tmp_path / "results.csv", rows)
    best, where = fitted(capsys, "fit-flops", path, "--best"), fitted(capsys, "fit-flops", path, "--where", "lr=0.0004")
    assert best["series"][0]["C"] == where["series"][0]["C"] == pytest.approx(0.64, rel=1e-4)
    assert best["left_out"] == {"not the best": 5} and where["left_out"] == {}
    by = fitted(capsys, "fit-flops", path, "--by", "family,lr")
    assert {series["name"]: round(series["C"], 3) for series in by["series"]} == {
        "sambay 4e-4": 0.64,
        "sambay 1e-3": 0.74,
    }


def test_other_columns_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"net": "a", "N": n, "D": d, "val": 900 * d**-0.4 + limit}
        for n, limit in ((1e8, 2.0), (1e9, 1.5))
        for d in (1e9, 2e9, 4e9, 8e9)
    ]
    path = table(tmp_path / "my.csv", rows)
    chosen = ("--loss-column", "val", "--tokens-column", "D", "--by", "net")
    main(["fit-data", str(path), *chosen, "--draws", "0"])  # without sizes, all is one series
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["a", "8"]
    path = table(tmp_path / "my.csv", [{"parameters": row["N"], **row} for row in rows])
    found = fitted(capsys, "fit-data", path, *chosen)
    assert {series["name"]: round(series["C"], 3) for series in found["series"]} == {
        "a 1e+08 parameters": 2.0, "a 1e+09 parameters": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, text, arguments, message",
    [
        ("a.csv", "family,flops,loss\na,1e18,low\n", "", "a.csv, line 2: loss 'low': not a number"),
        ("a.csv", "family,flops,loss\na,0,2.5\n", "", "line 2: flops 0: must be more than 0"),
        ("a.csv", "family,flops,loss\na,1e18\n", "", "line 2: not as many values as the first line has columns"),
        ("a.csv", "family,flops,loss\na,1e18,2,3\n", "", "line 2: not as many values"),
        ("a.csv", "family,flop,loss\na,1e18,2\n", "", "no column flops; there are family, flop, loss; --flops-column"),
        ("a.csv", "family,flops,loss\na,1e18,2\n", "", "a: 1 point for 3 free parameters; needs 4 or more"),
        ("a.csv", "family,flops,loss\na,1e18,nan\n", "", "no points; 1 point left out: 1 NaN"),
        ("a.csv", "", "", "no points"),
        ("a.csv", "family,flops,loss\na,1e18,2\n", "--where b=1", "--where b: no such column"),
        ("a.csv", "family,flops,loss\na,1e18,2\n", "--where b", "--where b: give COLUMN=VALUE"),
        ("a.csv", "family,flops,loss\na,1e18,2\n", "--by net", "--by net: no such column"),
        ("a.csv", "", "--draws -1", "--draws -1: must be 0 or more"),
        ("a.csv", "", "--level 100", "--level 100: must be between 0 and 100"),
        ("a.jsonl", '{"flops": 1e18, "loss": 2}\n{"flops"\n', "", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1, 2]\n", "", "line 1: not a JSON object"),
        ("a.xlsx", "", "", "give a .csv, .tsv or .jsonl file, or a TensorBoard folder"),
    ],
)  # fmt: skip
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, arguments: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert message in refused(capsys, "fit-flops", tmp_path / name, *arguments.split())


def test_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, "fit-flops", tmp_path / "none.csv")
    assert "no TensorBoard events here or below" in refused(capsys, "fit-flops", tmp_path)
    assert "cannot write .doc" in refused(capsys, "fit-flops", PAPER, "--draws", "0", "-o", tmp_path / "a.doc")
    assert "there is no directory" in refused(capsys, "fit-flops", PAPER, "--draws", "0", "-o", tmp_path / "b/a.png")


def write_run(directory: Path, depth: int, losses: dict[int, float], **changes: int) -> None:
    """What Megatron's logging leaves of a run of 100 iterations of 4 sequences: iteration -> validation loss."""
    from torch.utils.tensorboard import SummaryWriter

    arguments = {"seq_length": 2048, "train_iters": 100, "tensorboard_log_interval": 1, "train_name": None, **changes}
    writer = SummaryWriter(str(directory / "tensorboard"))
    for name, value in arguments.items():
        writer.add_text(name, str(value), global_step=0)
    for iteration, loss in losses.items():
        writer.add_scalar("lm loss validation", loss, iteration)
        writer.add_scalar("lm loss validation vs samples", loss, 4 * iteration)
    writer.close()
    arch = build_architecture("sambay", depth)
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints/architecture.json").write_text(json.dumps(dataclasses.asdict(arch)))


def test_tensorboard_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four runs, one that was cut off and one whose loss is NaN."""
    tokens, expected = 100 * 4 * 2048, []
    for depth in (4, 8, 12, 16):
        arch = build_architecture("sambay", depth)
        flops = training_flops(arch, 2048) * tokens
        expected.append({"parameters": parameters(arch), "tokens": tokens, "flops": flops})
        loss = 3000 * flops**-0.25 + 1.2
        write_run(tmp_path / f"d{depth}", depth, {50: 9.0, 90: loss + 0.2, 100: loss - 0.2})
    write_run(tmp_path / "cut", 20, {50: 3.0})
    write_run(tmp_path / "nan", 20, {100: float("nan")})
    result = fitted(capsys, "fit-flops", tmp_path, "--last", "2")
    (series,) = result["series"]
    assert result["left_out"] == {"unfinished": 1, "NaN": 1}
    found = sorted(series["points"], key=lambda point: point["flops"])
    for point, right in zip(found, expected, strict=True):
        assert point["flops"] == pytest.approx(right["flops"]) and point["parameters"] == right["parameters"]
        assert point["loss"] == pytest.approx(3000 * right["flops"] ** -0.25 + 1.2, rel=1e-6)
    assert [series["b"], series["C"]] == pytest.approx([0.25, 1.2], rel=1e-3)
    last = fitted(capsys, "fit-flops", tmp_path)["series"][0]
    assert last["C"] == pytest.approx(1.0, rel=1e-3)


def test_tensorboard_folders_that_say_too_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, 4, {100: 3.0})
    error = refused(capsys, "fit-flops", tmp_path, "--tag", "lm loss")
    assert "no --tag 'lm loss' of Megatron's; there are 'lm loss validation'" in error
    (tmp_path / "other").mkdir()
    (tmp_path / "checkpoints/architecture.json").rename(tmp_path / "architecture")
    assert "no architecture.json here or beside it" in refused(capsys, "fit-flops", tmp_path)


def test_package_needs_no_scipy_before_a_fit() -> None:
    code = "import sys; sys.modules['scipy'] = None; from archscale_megatron.scaling.__main__ import main; "
    code += "main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "plan", "--parameters", "1e9"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
