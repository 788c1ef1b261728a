"""The benchmark. Catches: unpaired ratios, wrong counts, unreadable results, plots that do not draw."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import ROOT
from dflash_cpp import CapacityError, DFlashError, Engine, _core, plots
from dflash_cpp.benchmark import SHAPES, Benchmark, BenchOptions, break_even, fit_exponent, synthetic_shape, tables
from dflash_cpp.cli import main

TINY = "mini,n_layer=2,n_vocab=512,n_embd=128,drafter_n_layer=1,drafter_n_ff=128"


@pytest.fixture(scope="module")
def tiny() -> _core.Model:
    return _core.Model.synthetic(*synthetic_shape(TINY), n_threads=1)


@pytest.fixture(scope="module")
def result(tiny: _core.Model) -> dict[str, Any]:
    options = BenchOptions(
        depths=(1, 3, "auto"), contexts=(16, 40), rounds=2, max_tokens=30, simulate_accept=(0.8, 0.4)
    )
    seen: list[tuple[int, int]] = []
    found = Benchmark(tiny, options).run(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24, 24), "two contexts, three turns, four variants"
    return found


def test_every_variant_has_its_row(result: dict[str, Any]) -> None:
    assert [(r["context"], r["depth"]) for r in result["decode"]] == [
        (c, d) for c in (16, 40) for d in (0, 1, 3, "auto")
    ]
    for row in result["decode"]:
        assert row["tokens_per_s"]["low"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["high"]
        assert len(row["tokens_per_s"]["values"]) == 2, "the warm-up does not count"
        if row["depth"] == 0:
            assert row["ratio"]["values"] == pytest.approx([1.0, 1.0])
            assert row["tokens_per_step"] == 1.0
    json.dumps(result)


def test_imposed_acceptance_is_found_again(tiny: _core.Model) -> None:
    options = BenchOptions(depths=(2,), contexts=(16,), rounds=4, max_tokens=150, simulate_accept=(0.8, 0.4))
    found = Benchmark(tiny, options).run()
    assert found["acceptance_by_slot"] == pytest.approx([0.8, 0.4], abs=0.09)
    assert found["decode"][1]["tokens_per_step"] == pytest.approx(2.2, abs=0.2)


def test_imposed_acceptance_is_told_truly_to_the_policy(tiny: _core.Model) -> None:
    # Drafts that are not verified are compared with the text too; a drafter that is always wrong must stay parked.
    session = _core.Session(tiny, n_ctx=600)
    session.begin([1, 2, 3], _core.SamplingParams(), max_tokens=400, lookup=False, simulate_accept=[0.0])
    session.prefill()
    while session.step().stop is None:
        pass
    assert session.stats()["proposed"] < 60
    assert session.policy_state()["parked"]


def test_imposed_confidences_can_tell(tiny: _core.Model) -> None:
    found = {}
    for spread in (0.0, 1.0):
        session = _core.Session(tiny, n_ctx=1100)
        session.begin(
            [1, 2, 3], _core.SamplingParams(), max_tokens=1000, depth=1, simulate_accept=[0.5], simulate_spread=spread
        )
        session.prefill()
        while session.step().stop is None:
            pass
        found[spread] = session.stats()["accepted"] / session.stats()["drafted"]
    assert found == pytest.approx({0.0: 0.5, 1.0: 0.5}, abs=0.07), "the average is the imposed one either way"


def test_costs_are_relative_to_plain(result: dict[str, Any]) -> None:
    widths = {r["width"]: r for r in result["verify_cost"]}
    assert {1, 2, 4} <= widths.keys()
    assert widths[1]["relative"] == 1.0
    assert widths[1]["bytes_relative"] == pytest.approx(1.0)
    used = SHAPES["mini"][0]["n_expert_used"]
    assert widths[1]["distinct_experts"] == used
    assert used <= widths[4]["distinct_experts"] <= 4 * used
    for row in break_even(result):
        cost = widths[row["depth"] + 1]["relative"]
        draft = next(d["relative"] for d in result["draft_cost"] if d["count"] == row["depth"])
        assert row["m_accept"] == pytest.approx(cost + draft - 1.0)


def test_noise_is_no_break_even(result: dict[str, Any]) -> None:
    """A round that measured cheaper than a plain step would need fewer than no accepted drafts."""
    noisy = json.loads(json.dumps(result))
    for row in noisy["verify_cost"]:
        if row["width"] == 2:
            row["relative"] = 0.3
    for row in noisy["draft_cost"]:
        row["relative"] = 0.1 if row["count"] == 1 else 0.9
    kept = {row["depth"] for row in break_even(noisy)}
    assert 1 not in kept
    assert 3 in kept
    out = io.StringIO()
    for table in tables(noisy):
        Console(file=out, width=100).print(table)
    assert "noise: a round took no longer than a plain step" in out.getvalue()


def test_tables_fit_a_terminal(result: dict[str, Any]) -> None:
    wide = json.loads(json.dumps(result))
    for row in wide["decode"]:
        row["tokens_per_s"] |= {"median": 23456.7, "low": 12345.6, "high": 34567.8}
        row["context"] = 196608
    out = io.StringIO()
    for table in tables(wide):
        Console(file=out, width=80).print(table)
    assert "…" not in out.getvalue()


def test_the_exponent_is_fitted() -> None:
    rows = [{"width": w, "distinct_experts": 8 * w**0.7} for w in (1, 2, 4, 8)]
    assert fit_exponent(rows, 8) == pytest.approx(0.7)
    assert fit_exponent(rows[:1], 8) is None


def test_tables_render(result: dict[str, Any]) -> None:
    assert [t.title.split(":")[0] for t in tables(result) if isinstance(t.title, str)] == [
        "prefill",
        "decode",
        "cost by verify width",
        "cost of a draft",
    ]


def test_shapes() -> None:
    target, drafter = synthetic_shape("m2.7,n_layer=4,drafter_n_ff=100")
    assert target["n_layer"] == 4
    assert target["n_expert"] == 256
    assert drafter["n_ff"] == 100
    assert max(drafter["target_layers"]) <= 4
    assert synthetic_shape("n_layer=3")[0]["n_embd"] == 3072
    assert SHAPES["m2.7"][0]["n_layer"] == 62, "the table is not changed"
    for text, message in (
        ("big", "expected one of"),
        ("m2.7,foo=1", "expected keys"),
        ("m2.7,n_layer=x", "a number"),
        ("n_vocab=99999999999", "n_vocab.*16777215.*99999999999"),
        ("n_ff=0", "n_ff"),
    ):
        with pytest.raises(DFlashError, match=message):
            synthetic_shape(text)


def test_wrong_options_are_refused(tiny: _core.Model) -> None:
    with pytest.raises(DFlashError, match="depths"):
        Benchmark(tiny, BenchOptions(depths=(16,)))
    for options in ({"rounds": 0}, {"max_tokens": 1}, {"contexts": ()}, {"contexts": (0,)}, {"temperature": -1.0}):
        with pytest.raises(DFlashError, match=next(iter(options))):
            BenchOptions(**options)  # type: ignore[arg-type]


def test_shapes_that_cannot_run_are_refused_at_once() -> None:
    for part, message in (("n_head=7", "not a multiple of"), ("head_dim=48", "a multiple of 32"), ("n_rot=33", "even")):
        target, drafter = synthetic_shape(f"mini,{part}")
        with pytest.raises(DFlashError, match=message):
            _core.Model.synthetic(target, drafter, n_threads=1)
    target, drafter = synthetic_shape("mini,drafter_head_dim=48")
    with pytest.raises(DFlashError, match=r"synthetic drafter.*a multiple of 32"):
        _core.Model.synthetic(target, drafter, n_threads=1)
    target, drafter = synthetic_shape("m2.7,n_layer=62000")
    with pytest.raises(CapacityError, match=r"synthetic: \d.* TiB of weights needed.*fewer layers"):
        _core.Model.synthetic(target, drafter, n_threads=1)


def compare_module() -> Any:
    spec = importlib.util.spec_from_file_location("bench_compare", ROOT / "bench" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_two_results_are_compared(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = compare_module()
    slower = json.loads(json.dumps(result))
    for key in ("median", "low", "high"):
        slower["decode"][0]["tokens_per_s"][key] /= 100
    slower["n_threads"] += 1
    for name, value in (("a", result), ("b", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    out = capsys.readouterr().out
    assert "slower" in out
    assert "differ in n_threads" in out
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(SystemExit, match="dflash-cpp bench"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "c.json")])


def test_the_plot_is_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "speed.png"
    plots.plot_bench(result, out)
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["speed.png"]


def test_without_matplotlib_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DFlashError, match=r"pip install 'dflash-cpp\[plot\]'"):
        plots.need_matplotlib()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "--synthetic", TINY, "--threads", "1", "--contexts", "16", "--rounds", "1", "-n", "12"]
    assert main([*args, "--depths", "1,auto", "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "decode" in out
    assert "…" not in out, "a pipe has no width to cut at"
    found = json.loads((tmp_path / "r.json").read_text())
    assert np.isfinite(found["decode"][0]["tokens_per_s"]["median"])
    for flag in ("--json", "--plot"):  # before minutes of measuring
        assert main(["bench", "--target", "nothing.gguf", flag, str(tmp_path / "no" / "file")]) == 2
        message = capsys.readouterr().err
        assert f"{flag}: expected a file that can be written" in message or "matplotlib" in message
    assert main(["bench", "--synthetic", TINY, "-md", "drafter.gguf"]) == 2
    assert "--drafter: expected only with --target" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "either --target or --synthetic" in capsys.readouterr().err


def test_the_slab_loads_and_takes_text(tmp_path: Path) -> None:
    """A GGUF of M2.7's layer shape, as bench/make_slab.py writes it."""
    path = tmp_path / "slab.gguf"
    script = [sys.executable, str(ROOT / "bench" / "make_slab.py"), str(path)]
    subprocess.run([*script, "--layers", "1", "--experts", "8", "--vocab", "512"], check=True, timeout=120)
    with Engine(path, n_ctx=64) as engine:
        assert engine.tokenizer.decode(engine.tokenizer.encode("t0 naïve ☃\n")) == "t0 naïve ☃\n"
        assert len(engine.generate("def f(x):", max_tokens=3).tokens) == 3
    refused = subprocess.run([*script, "--vocab", "100"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "--vocab" in refused.stderr
