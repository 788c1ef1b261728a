"""Ctrl-C stops within one step and leaves everything usable. Catches long calls that hold signals back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import Ids
from dflash_cpp import Engine


def interrupt_soon() -> threading.Thread:
    thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    thread.start()
    return thread


@pytest.mark.parametrize("depth", [0, 15])
def test_while_streaming(depth: int, engine: Engine, prompts: list[Ids]) -> None:
    expected = engine.generate(prompts[0], max_tokens=100, depth=depth, ignore_eos=True).tokens
    stream = engine.stream(prompts[0], max_tokens=100, depth=depth, ignore_eos=True)
    seen: list[int] = []
    sender = None
    with pytest.raises(KeyboardInterrupt):
        for piece in stream:
            seen += piece.tokens
            if len(seen) > 8 and sender is None:
                sender = interrupt_soon()
                sender.join()
    assert seen == expected[: len(seen)]
    assert len(seen) < 100
    stream.close()
    assert engine.generate(prompts[0], max_tokens=100, depth=depth, ignore_eos=True).tokens == expected


def test_inside_a_step(engine: Engine, prompts: list[Ids]) -> None:
    expected = engine.generate(prompts[0], max_tokens=30, ignore_eos=True).tokens
    calls = 0

    def hook(tokens: object, row: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[0], max_tokens=30, logits_hook=hook, ignore_eos=True)
    assert calls == 10
    assert engine.generate(prompts[0], max_tokens=30, ignore_eos=True).tokens == expected


def test_while_the_prompt_is_read(engine: Engine, prompts: list[Ids], nano_path: Path) -> None:
    with Engine(nano_path, n_ctx=512, n_batch=16) as small:
        expected = small.generate(prompts[1], max_tokens=10).tokens
        small.reset()
        seen: list[int] = []

        def on_prefill(done: int, total: int) -> None:
            seen.append(done)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGINT)

        stream = small.stream(prompts[1], max_tokens=10, on_prefill=on_prefill)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert seen == [16, 32, 48]
        again = small.generate(prompts[1], max_tokens=10)
        assert again.tokens == expected
        assert again.stats.cached_tokens == 48, "what was read before stays"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_command_line(nano_path: Path) -> None:
    command = [sys.executable, "-m", "dflash_cpp", "generate", "--target", str(nano_path), "-p", "import "]
    command += ["--max-tokens", "100000", "--n-ctx", "100000", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_conversation_from_a_file(nano_path: Path) -> None:
    """Nobody is there to say the next line: Ctrl-C ends all of it, not one answer after the other."""
    command = [sys.executable, "-m", "dflash_cpp", "chat", "--target", str(nano_path)]
    command += ["--n-ctx", "100000", "--ignore-eos"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Write a module.\nAnother one.\n")
        process.stdin.flush()
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith(b"dflash-cpp: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("module", ["argparse", "dflash_cpp._core", "numpy", "tokenizers", "rich.progress"])
def test_while_the_program_is_imported(module: str) -> None:
    """The half second before a command runs. Numpy, for one, would make an ImportError of a KeyboardInterrupt."""
    script = f"""
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except KeyboardInterrupt:
                raise ImportError(name)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["dflash-cpp", "doctor"]
runpy.run_module("dflash_cpp", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr == b"\ndflash-cpp: interrupted\n"
