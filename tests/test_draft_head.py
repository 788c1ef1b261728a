"""The drafter's smaller copy of the target's head: the same bytes as the converter's, never a change of the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dflash_cpp.convert import convert

from conftest import Ids, checkpoint_dir
from dflash_cpp import DFlashError, Engine, cli

Make = Callable[..., Engine]


def head_of(engine: Engine) -> str:
    config = engine.model.drafter_config
    assert config is not None
    return str(config["head_type"])


@pytest.mark.parametrize("head", ["q8_0", "q4_0"])
def test_the_copy_is_what_the_gguf_package_would_write(
    head: str, make_engine: Make, nano_path: Path, nano_drafter_path: Path, prompts: list[Ids], tmp_path: Path
) -> None:
    """Against a target whose head the converter rounded (gguf.quants): the same draft logits, bit for bit."""
    rounded = tmp_path / "rounded.gguf"
    convert(checkpoint_dir("nano-m2"), rounded, head=head)
    copied = make_engine(draft_head=head)
    with Engine(rounded, nano_drafter_path, n_ctx=1024, draft_head="target") as reference:
        assert head_of(copied) == head_of(reference) == head.upper()
        for prompt in prompts[:3]:
            expected = reference.draft_logits(prompt, 7, 15)
            assert np.array_equal(copied.draft_logits(prompt, 7, 15), expected)
            assert not np.array_equal(make_engine(draft_head="target").draft_logits(prompt, 7, 15), expected)


@pytest.mark.parametrize("head", ["target", "q8_0", "q4_0", "auto"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_no_head_changes_the_answer(head: str, options: dict[str, Any], make_engine: Make, prompts: list[Ids]) -> None:
    plain = make_engine(drafter=False).generate(prompts[1], max_tokens=48, **options).tokens
    for depth in (1, 5, "auto"):
        assert make_engine(draft_head=head).generate(prompts[1], max_tokens=48, depth=depth, **options).tokens == plain


def test_auto_copies_where_it_helps(make_engine: Make, nano_drafter_path: Path, tmp_path: Path) -> None:
    assert head_of(make_engine()) == "Q4_0"
    assert head_of(make_engine(precise=True)) == head_of(make_engine(repack=False)) == "BF16"
    assert head_of(make_engine(precise=True, draft_head="q8_0")) == "Q8_0"
    small = tmp_path / "small.gguf"
    convert(checkpoint_dir("nano-m2"), small, head="q4_0")
    for choice in ("auto", "q8_0"):  # neither would be smaller than what is there
        with Engine(small, nano_drafter_path, n_ctx=64, draft_head=choice) as engine:
            assert head_of(engine) == "Q4_0"
            assert engine.model.drafter_config == {**engine.model.drafter_config, "head_bytes": 1024 * 128 // 32 * 18}


def test_wrong_choices(nano_path: Path, nano_drafter_path: Path) -> None:
    with pytest.raises(DFlashError, match=r"draft_head.*'q4_0'.*found 'q5_0'"):
        Engine(nano_path, nano_drafter_path, draft_head="q5_0")
    with Engine(nano_path, n_ctx=64, draft_head="q4_0") as engine:  # no drafter, no use
        assert engine.model.drafter_config is None


def test_eval_uses_the_targets_head_unless_told() -> None:
    parser = cli.build_parser()
    required = ["--target", "t", "--drafter", "d"]
    assert parser.parse_args(["eval", *required, "--data", "x.npy"]).draft_head == "target"
    assert parser.parse_args(["eval", *required, "--data", "x.npy", "--draft-head", "q4_0"]).draft_head == "q4_0"
    assert parser.parse_args(["generate", *required, "-p", "x"]).draft_head == "auto"
