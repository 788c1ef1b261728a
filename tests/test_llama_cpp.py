"""llama.cpp reads our files. Catches GGUF that only we understand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import golden_of
from dflash_cpp import Engine, _core

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (pip install '.[llama-cpp]')")

NEAR_TIE = 0.25  # logits; llama.cpp rounds activations to int8, so closer rivals may change places


def test_the_target_gives_the_same_greedy_tokens(
    gguf_path: Callable[[str], Path], make_engine: Callable[..., Engine]
) -> None:
    name = "mini-m2"
    golden, engine = golden_of(name), make_engine("mini", precise=True)
    llm = llama_cpp.Llama(str(gguf_path(name)), n_ctx=512, n_threads=2, logits_all=False, verbose=False, use_mmap=True)
    compared = 0
    for case in golden.cases[:4]:
        prompt, greedy = case["prompt_ids"], case["greedy"][:48]
        logits = engine.logits(prompt + greedy)[len(prompt) - 1 :]
        llm.reset()
        llm.eval(prompt)
        for i, expected in enumerate(greedy):
            theirs = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(engine.n_vocab,))
            found = int(theirs.argmax())
            if found != expected:
                assert logits[i, expected] - logits[i, found] < NEAR_TIE, f"token {i}"
            compared += found == expected
            llm.eval([expected])  # the same text on both sides, so that one near tie does not end the comparison
    assert compared > 0.95 * 4 * 48


def test_the_drafter_is_a_file_llama_cpp_knows(gguf_path: Callable[[str], Path]) -> None:
    path = str(gguf_path("mini-m2-dflash"))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = False
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    assert model
    assert llama_cpp.llama_model_n_layer(model) == _core.Gguf(path).get("dflash.block_count")
    llama_cpp.llama_model_free(model)
