#!/usr/bin/env python3
"""Writes a GGUF with the real layer shapes of MiniMax-M2.7 and random weights, any number of layers.

    python bench/make_slab.py slab.gguf --layers 2 --vocab 8192 --type Q4_0

For measuring only: the tokens mean nothing. About 2 GB a layer in Q4_0; loads in dflash_cpp and in llama.cpp.
"""

from __future__ import annotations

import argparse

import gguf
import numpy as np

EMBD, HEADS, KV_HEADS, HEAD_DIM, USED, FF, ROT = 3072, 48, 8, 128, 8, 1536, 64
TYPES = {"Q4_0": (18, 7.5), "Q4_1": (20, 7.5), "Q8_0": (34, 127.0)}


def random_blocks(rng: np.random.Generator, kind: str, rows: int, n_in: int, std: float) -> np.ndarray:
    """[rows, row bytes] of blocks whose values have about this standard deviation."""
    size, levels = TYPES[kind]
    blocks = rng.integers(0, 256, size=(rows, n_in // 32, size), dtype=np.uint8)
    scale = np.full((rows, n_in // 32), np.sqrt(3.0) * std / levels, dtype=np.float16)
    blocks[..., 0:2] = scale[..., None].view(np.uint8)
    if kind == "Q4_1":
        blocks[..., 2:4] = (scale * np.float16(-7.5)).astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def vocabulary(n: int) -> list[str]:
    """A token for every byte, as byte-level BPE writes it, so that any text has ids; the others are names."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    return [*alphabet, *(f"t{i}" for i in range(n - len(alphabet)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    parser.add_argument("--head", choices=TYPES, default="Q4_0")
    args = parser.parse_args()
    if args.vocab < 257 or args.experts < USED or args.layers < 1:
        parser.error(f"expected --vocab of at least 257, --experts of at least {USED}, --layers of at least 1")

    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(args.output, "minimax-m2")
    w.add_name("slab")
    w.add_block_count(args.layers)
    w.add_context_length(8192)
    w.add_embedding_length(EMBD)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(5e6)
    w.add_rope_dimension_count(ROT)
    w.add_expert_count(args.experts)
    w.add_expert_used_count(USED)
    w.add_expert_feed_forward_length(FF)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_vocab_size(args.vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("minimax-m2")
    w.add_token_list(vocabulary(args.vocab))
    w.add_token_types([1] * args.vocab)
    w.add_token_merges(["t 0"])  # llama.cpp wants one

    def matrix(name: str, n_in: int, n_out: int, experts: int = 0, kind: str = args.type, std: float = 0.0) -> None:
        blocks = random_blocks(rng, kind, n_out * max(1, experts), n_in, std or n_in**-0.5)
        shape = (experts, n_out, -1) if experts else (n_out, -1)
        w.add_tensor(name, blocks.reshape(shape), raw_dtype=gguf.GGMLQuantizationType[kind])

    def ones(name: str, n: int) -> None:
        w.add_tensor(name, np.ones(n, dtype=np.float32))

    # Loud embeddings keep the rows of a batch apart, so that they choose different experts.
    matrix("token_embd.weight", EMBD, args.vocab, kind=args.head, std=4.0)
    for i in range(args.layers):
        p = f"blk.{i}."
        ones(p + "attn_norm.weight", EMBD)
        matrix(p + "attn_q.weight", EMBD, HEADS * HEAD_DIM)
        matrix(p + "attn_k.weight", EMBD, KV_HEADS * HEAD_DIM)
        matrix(p + "attn_v.weight", EMBD, KV_HEADS * HEAD_DIM)
        matrix(p + "attn_output.weight", HEADS * HEAD_DIM, EMBD)
        ones(p + "attn_q_norm.weight", HEADS * HEAD_DIM)
        ones(p + "attn_k_norm.weight", KV_HEADS * HEAD_DIM)
        ones(p + "ffn_norm.weight", EMBD)
        router = rng.standard_normal((args.experts, EMBD), dtype=np.float32) * np.float32(EMBD**-0.5)
        w.add_tensor(p + "ffn_gate_inp.weight", router)
        w.add_tensor(p + "exp_probs_b.bias", np.zeros(args.experts, dtype=np.float32))
        matrix(p + "ffn_gate_exps.weight", EMBD, FF, args.experts)
        matrix(p + "ffn_up_exps.weight", EMBD, FF, args.experts)
        matrix(p + "ffn_down_exps.weight", FF, EMBD, args.experts)
    ones("output_norm.weight", EMBD)
    matrix("output.weight", EMBD, args.vocab, kind=args.head)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
