"""The command line as people use it. Catches tracebacks, wrong exit codes, and flags that do nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import dflash_cpp
from dflash_cpp import Engine, cli, doctor
from dflash_cpp.demo import embedded_model_dir
from dflash_cpp.options import EngineOptions, GenerateOptions

COMMANDS = ["generate", "chat", "convert", "inspect", "doctor", "demo", "eval", "bench", "selftest", "capture"]


def dflash(*args: str, text: str | None = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the program and checks its exit code."""
    environment = {**os.environ, "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "dflash_cpp", *args],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of a user error."""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("dflash-cpp: ")
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_version_and_help() -> None:
    assert dflash("--version").stdout == f"dflash-cpp {dflash_cpp.__version__}\n"
    text = dflash("--help").stdout
    assert all(command in text for command in COMMANDS)
    dflash(code=2)
    dflash("fly", code=2)


def test_generate(nano_path: Path, nano_drafter_path: Path) -> None:
    common = ("generate", "--target", str(nano_path), "--max-tokens", "20")
    plain = dflash(*common, "-p", "import os\n").stdout
    with Engine(nano_path, n_ctx=512) as engine:
        assert plain == engine.generate("import os\n", max_tokens=20).text + "\n"
    drafted = dflash(
        *("generate", "-m", str(nano_path), "-md", str(nano_drafter_path), "-c", "512", "-t", "1", "-n", "20"),
        *("--depth", "4", "--no-lookup", "--stats"),
        text="import os\n",
    )
    assert drafted.stdout == plain
    assert "tokens per step" in drafted.stderr
    assert "acceptance by slot" in drafted.stderr


def test_generate_json(nano_path: Path, nano_drafter_path: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("class Größe:\n", encoding="utf-8")
    done = dflash(
        *("generate", "--target", str(nano_path), "--drafter", str(nano_drafter_path), "--prompt-file", str(prompt)),
        *("--json", "-n", "12", "--temperature", "1", "--top-k", "20", "--seed", "9", "--ignore-eos"),
        *("--precise", "--threads", "1", "--kv-type", "f32", "--cpu-isa", "plain", "--n-ctx", "128", "--no-repack"),
        *("--numa", "interleave"),
    )
    answer = json.loads(done.stdout)
    assert len(answer["tokens"]) == 12
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["seed"] == 9
    assert set(answer["stats"]) >= {
        "tokens_per_step",
        "acceptance",
        "depth_histogram",
        "decode_tokens_per_s",
        "seconds",
    }


def test_user_errors(nano_path: Path, tmp_path: Path) -> None:
    target = ("generate", "--target", str(nano_path))
    assert "nothing.gguf" in one_line(dflash("generate", "--target", "nothing.gguf", "-p", "x", code=2))
    assert "temperature" in one_line(dflash(*target, "-p", "x", "--temperature", "-1", code=2))
    assert "prompt" in one_line(dflash(*target, code=2))
    assert "n_ctx = 16" in one_line(dflash(*target, "-p", "long " * 50, "--n-ctx", "16", code=2))
    early = (*target, "-p", "long " * 50, "--n-ctx", "16", "--drafter", str(nano_path))
    assert "n_ctx = 16" in one_line(dflash(*early, code=2)), "before the weights are loaded"
    assert "n_ctx: expected" in one_line(dflash(*target, "-p", "x", "--n-ctx", "-5", code=2)), "not the prompt's fault"
    assert "n_ctx: expected" in one_line(dflash("inspect", str(nano_path), "--n-ctx", "9" * 20, code=2))
    assert "cpu_isa" in one_line(dflash(*target, "-p", "x", "--cpu-isa", "sse9", code=2))
    assert "no.txt" in one_line(dflash(*target, "--prompt-file", str(tmp_path / "no.txt"), code=2))
    assert "--depth" in dflash(*target, "-p", "x", "--depth", "some", code=2).stderr
    assert "depth" in one_line(dflash(*target, "-p", "x", "--depth", "3", code=2))
    assert "no.gguf" in one_line(dflash("inspect", str(tmp_path / "no.gguf"), code=2))
    assert "--model-dir" in one_line(dflash("demo", "--model-dir", str(tmp_path / "no"), code=2))
    assert str(tmp_path) in dflash("convert", str(tmp_path), "-o", str(tmp_path / "o.gguf"), code=2).stderr
    assert not (tmp_path / "o.gguf").exists()


def test_a_reader_that_goes_away(nano_path: Path) -> None:
    command = (
        f"{sys.executable} -m dflash_cpp generate --target {nano_path} -p 'import ' -n 800 --ignore-eos | head -c 5"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 5
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


def test_streams_as_shells_leave_them(nano_path: Path) -> None:
    """A full disk, a closed stream, and a terminal that knows no Unicode."""
    command = f"{sys.executable} -m dflash_cpp generate -m {nano_path} -n 30 --temperature 3 --seed 3 --ignore-eos"
    for redirect, code, message in (
        ("-p x > /dev/full", 1, "standard output cannot be written"),
        ("-p x >&-", 0, ""),
        ("<&-", 2, "prompt: expected text, found an empty string"),
        ("-p '# naïve ☃ '", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirect}"], capture_output=True, timeout=120, check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert message in done.stderr.decode()
        assert done.stderr.count(b"\n") == (1 if message else 0), done.stderr


def test_chat(nano_path: Path, nano_drafter_path: Path) -> None:
    lines = "Write a module.\n/stats\n/help\n\nAnd a test.\n/reset\n/stats\nHello\n/quit\nnever read\n"
    done = dflash("chat", "--target", str(nano_path), "--drafter", str(nano_drafter_path), "-n", "10", text=lines)
    assert "tokens per step" in done.stderr
    assert "started over" in done.stderr
    assert "no answer yet" in done.stderr
    assert len(done.stdout.strip()) > 10
    done = dflash(
        "chat", "--target", str(nano_path), "-n", "3", "--n-ctx", "64", text=f"{'long ' * 99}\nHello\n/stats\n"
    )
    assert "n_ctx = 64" in done.stderr, "what cannot be said is refused"
    assert "tokens per step" in done.stderr, "and the conversation goes on"
    dflash("chat", "--target", str(nano_path), "--system", "Be brief.", "-n", "3", text="Hi\n")


def test_convert(tmp_path: Path) -> None:
    models, out = embedded_model_dir(), tmp_path / "t.gguf"
    dflash("convert", str(models / "nano-m2"), "-o", str(out))
    drafter = tmp_path / "d.gguf"
    dflash(*("convert", str(models / "nano-m2-dflash"), "--target-model", str(models / "nano-m2"), "-o", str(drafter)))
    dflash("generate", "--target", str(out), "--drafter", str(drafter), "-p", "import ", "-n", "3")


def test_short_flags_are_everywhere(
    nano_path: Path, nano_drafter_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["-m", str(nano_path), "-md", str(nano_drafter_path), "-t", "1"]
    assert cli.main(["bench", *pair, "--contexts", "8", "--rounds", "1", "-n", "4", "--depths", "1"]) == 0
    assert cli.main(["selftest", *pair, "--limit", "1", "--anchors", "1", "--no-variants"]) in (0, 1)
    for command in (["bench", "--contexts", "8"], ["selftest"]):
        capsys.readouterr()
        assert cli.main([*command, *pair[:-1], "0"]) == 2
        assert "n_threads: expected" in capsys.readouterr().err


def test_options_have_one_name() -> None:
    """What Python calls an option, the command line calls it too."""
    text = dflash("generate", "--help").stdout
    names = {f.name for options in (EngineOptions, GenerateOptions) for f in dataclasses.fields(options)}
    for name in sorted(names - {"progress", "logit_bias", "logits_hook"}):  # which no shell can write
        flag = name.replace("_", "-")
        assert f"--{flag}" in text or f"--no-{flag}" in text, name


def test_the_converter_speaks_as_the_program(tmp_path: Path) -> None:
    assert "not a folder" in one_line(dflash("convert", str(tmp_path / "no"), "-o", str(tmp_path / "o.gguf"), code=2))


def test_inspect(nano_path: Path, nano_drafter_path: Path) -> None:
    target = json.loads(dflash("inspect", str(nano_path), "--json", "--n-ctx", "1000").stdout)
    assert target["architecture"] == "minimax-m2"
    assert target["role"] == "target"
    assert target["shape"]["expert_count"] == 16
    assert target["vocabulary"]["embedding rows"] == 1024
    # 6 layers, 2 heads, keys and values of 128 numbers, 2 bytes each
    assert target["memory"]["f16 cache of 1000 tokens"] == 6 * 2 * 256 * 1000 * 2
    assert "Q4_0" in target["types"]
    drafter = json.loads(dflash("inspect", str(nano_drafter_path), "--json").stdout)
    assert drafter["role"] == "drafter"
    assert drafter["taps"] == [1, 2, 3, 4, 5]
    assert drafter["mask_token_id"] == 1023
    text = dflash("inspect", str(nano_path), "--tensors").stdout
    assert "blk.0.attn_q.weight" in text
    assert "Q4_0" in text


def test_doctor() -> None:
    report = json.loads(dflash("doctor", "--json").stdout)
    assert report["backends"]["cpu"] == ""
    assert report["instruction_sets"]["plain"] == ""
    threads = report["threads"]
    assert 1 <= threads["used unless told otherwise"] <= threads["usable by this process"]
    assert "node" in report["numa"]
    assert report["devices"] or report["devices_note"]
    assert all(report["instruction_sets"][isa] == "" for isa in dflash_cpp._core.cpu_isas())
    assert "backends" in dflash("doctor").stdout


def test_demo() -> None:
    done = dflash("demo", "--max-tokens", "40", "--depth", "15")
    assert "both outputs are identical" in done.stderr
    assert "tokens per verify step" in done.stdout
    assert "speed-up" in done.stdout
    assert "0.00x" not in dflash("demo", "--max-tokens", "1").stdout, "one token has no decoding speed"


def test_tables_show_brackets_as_they_are() -> None:
    """Rich takes [hip] for markup unless told otherwise."""
    report = dataclasses.replace(doctor.examine(), devices=[], devices_note="pip install 'dflash-cpp[hip]'")
    out = io.StringIO()
    Console(file=out, width=100).print(doctor.render(report))
    assert "dflash-cpp[hip]" in out.getvalue()
