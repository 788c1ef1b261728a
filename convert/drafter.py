"""DFlash drafter checkpoints -> llama.cpp's `dflash` architecture."""

from __future__ import annotations

import os
from pathlib import Path

from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFValueType, Keys

from .errors import ConvertError
from .hf_config import Config
from .linear import PLAIN, Source, TensorTable, choose_type
from .plan import Metadata, Options, Plan, PlannedTensor
from .quant_formats import is_f16_exact
from .target import add_general, add_shape, check_quantization, check_zero_points, is_target, rope_theta
from .vocab import MAX_VOCAB, Vocab, add_vocab, check_same_tokenizer, load_vocab

ARCH = "dflash"
TAP_CONVENTIONS = ("after", "input")
MAX_BLOCK = 256  # rows of a block that the engine takes

# Options of DFlash variants that change the arithmetic, with the values that leave v1 as it is.
NEUTRAL = {
    "conv_kernel_size": (None, 0),
    "conv_group_size": (None, 0),
    "selector_rank": (None, 0),
    "selector_top_k": (None, 0),
    "attention_sink_bias": (None, False),
    "input_embedding_scale": (None, 1, 1.0),
    "output_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "sample_from_anchor": (None, False),
}


def is_drafter(config: Config) -> bool:
    """Whether config.json describes a DFlash drafter."""
    return config.has("dflash_config") or "DFlashDraftModel" in config.names("architectures")


def plan_drafter(
    table: TensorTable, config: Config, options: Options, target_model: str | os.PathLike[str] | None
) -> Plan:
    """Decide the metadata and every tensor of a `dflash` GGUF.

    `target_model` is the target's checkpoint folder: only its config and tokenizer are read. Without it, the drafter's
    own folder must hold a tokenizer.json.
    Raises `ConvertError` for variants beyond DFlash v1, for wrong tensors, and for a drafter of another target.
    """
    check_quantization(config)
    extra = config.section("dflash_config")
    _check_variant(config, extra)
    hidden = config.integer("hidden_size")
    n_taps = _count_taps(table, hidden)
    target = _load_target_config(table.checkpoint.directory, target_model)
    vocab = _load_vocab(table.checkpoint.directory, config, target)
    _check_target(config, target, vocab)
    n_target = target.integer("num_hidden_layers") if target else _first_int("num_target_layers", config, extra)
    taps = _target_layers(config, extra, n_taps, n_target, options)

    tensors = _plan_tensors(table, config, options, n_taps)
    table.check_all_used()
    check_zero_points(config, tensors)
    meta = Metadata()
    add_general(meta, config, table.checkpoint.directory.resolve().name, tensors)
    add_shape(meta, ARCH, config)
    _add_rope(meta, config)
    block_size = _first_int("block_size", config, extra)
    if block_size is None or not 2 <= block_size <= MAX_BLOCK:
        raise config.error("block_size", f"an integer from 2 to {MAX_BLOCK}, here or in dflash_config")
    meta.u32(f"{ARCH}.block_size", block_size)
    meta.array(f"{ARCH}.target_layers", taps, GGUFValueType.INT32)
    _add_windows(meta, config, extra)
    # Keys of our own: they let an engine refuse a drafter of another target before reading any weight.
    meta.u32(f"{ARCH}.vocab_size", len(vocab.tokens))
    meta.u32(f"{ARCH}.target.embedding_length", hidden)
    if n_target is not None:
        meta.u32(f"{ARCH}.target.block_count", n_target)
    add_vocab(meta, vocab, target or config)
    mask = _first_int("mask_token_id", extra, config, low=0)
    if mask is None or mask >= len(vocab.tokens):
        raise extra.error("mask_token_id", f"a token id from 0 to {len(vocab.tokens) - 1} (the target's vocabulary)")
    meta.u32(Keys.Tokenizer.MASK_ID, mask)
    return Plan(ARCH, meta, tensors)


def _check_variant(config: Config, extra: Config) -> None:
    for section in (config, extra):
        for key, allowed in NEUTRAL.items():
            if section.values.get(key) not in allowed:
                raise section.error(key, "a DFlash v1 drafter without it", "Variants of DFlash are not supported yet")
    if config.values.get("hidden_act") not in (None, "silu"):
        raise config.error("hidden_act", "'silu'")


def _first_int(key: str, *sections: Config, low: int = 1) -> int | None:
    """Return `key` from the sections that have it; they must agree."""
    values = [(section, section.opt_int(key, low)) for section in sections]
    found = [(section, value) for section, value in values if value is not None]
    for section, value in found[1:]:
        if value != found[0][1]:
            raise section.error(key, f"{found[0][1]}, as {found[0][0].prefix or 'the top level'} says")
    return found[0][1] if found else None


def _count_taps(table: TensorTable, hidden: int) -> int:
    entry = table.checkpoint.tensors.get("fc.weight") or table.checkpoint.tensors.get("fc.weight_packed")
    if entry is None:
        raise ConvertError(f"{table.checkpoint.directory}: tensor 'fc.weight' is missing; not a DFlash drafter")
    width = entry.shape[-1] * (8 if entry.name.endswith("_packed") else 1) if len(entry.shape) == 2 else 0
    if width == 0 or width % hidden:
        raise ConvertError(
            f"{entry.path}: tensor {entry.name!r} {list(entry.shape)}: expected [{hidden}, taps * {hidden}] "
            "(hidden_size in config.json)"
        )
    return width // hidden


def _target_layers(config: Config, extra: Config, n_taps: int, n_target: int | None, options: Options) -> list[int]:
    """Return the tapped layers as llama.cpp numbers them: k means the residual stream entering layer k.

    z-lab's ids mean "after layer t" and become t + 1. With tap convention "input" the ids already mean the input.
    """
    if options.tap_convention not in TAP_CONVENTIONS:
        raise ConvertError(f"tap convention {options.tap_convention!r}: expected 'after' or 'input'")
    ids = extra.opt_ints("target_layer_ids")
    section, key = extra, "target_layer_ids"
    if ids is None:
        if n_target is None:
            raise extra.error(key, "a list of layer numbers", "Or pass --target-model, to derive the default ones")
        ids = default_target_layer_ids(n_target, n_taps)
        options.note(f"{config.path}: no dflash_config.target_layer_ids; using z-lab's default {ids}")
    elif len(ids) != n_taps:
        raise section.error(key, f"{n_taps} layers, as fc.weight has {n_taps} * hidden_size inputs")
    shift = 1 if options.tap_convention == "after" else 0
    layers = [i + shift for i in ids]
    top = 2**31 - 1 if n_target is None else n_target
    if not all(shift <= layer <= top for layer in layers):
        raise section.error(
            key,
            f"layers from 0 to {top - shift} (the target has {n_target} layers; tap convention "
            f"{options.tap_convention!r})",
            "The drafter is for another target",
        )
    return layers


def default_target_layer_ids(n_target: int, n_taps: int) -> list[int]:
    """Return z-lab's default taps, evenly spaced over layers 1 to n_target - 3, as "after layer t" ids."""
    if n_taps == 1:
        return [n_target // 2]
    return [round(1 + i * (n_target - 4) / (n_taps - 1)) for i in range(n_taps)]


def _load_target_config(directory: Path, target_model: str | os.PathLike[str] | None) -> Config | None:
    if target_model is None:
        if not (directory / "tokenizer.json").exists():
            raise ConvertError(
                f"{directory}: a drafter has no tokenizer of its own. Pass --target-model DIR, the folder of the "
                "target's checkpoint (its config.json and tokenizer.json are enough)"
            )
        return None
    config = Config.load(Path(target_model) / "config.json")
    if is_drafter(config) or not is_target(config):
        raise ConvertError(
            f"{config.path}: expected the config of a MiniMax-M2 target, found model_type "
            f"{config.values.get('model_type')!r}, architectures {config.values.get('architectures')!r}"
        )
    return config


def _load_vocab(directory: Path, config: Config, target: Config | None) -> Vocab:
    """Load the target's vocabulary; the drafter borrows embedding and head, so its own width is not what counts."""
    if target is None:
        return load_vocab(directory, config.integer("vocab_size", 1, MAX_VOCAB))
    vocab = load_vocab(target.path.parent, target.integer("vocab_size", 1, MAX_VOCAB))
    own = directory / "tokenizer.json"
    if own.exists():
        check_same_tokenizer(own, vocab)
    return vocab


def _check_target(config: Config, target: Config | None, vocab: Vocab) -> None:
    if target is None:
        return
    if config.integer("hidden_size") != target.integer("hidden_size"):
        raise config.error(
            "hidden_size",
            f"{target.integer('hidden_size')}, as {target.path} says",
            "The drafter is for another target",
        )
    own = config.opt_int("vocab_size")
    # Some drafters count only the tokenizer's ids, without the padding rows of the target's table.
    if own is not None and not vocab.n_real <= own <= len(vocab.tokens):
        raise config.error(
            "vocab_size",
            f"{len(vocab.tokens)} (or, without padding, at least {vocab.n_real}), as {target.path} says",
            "The drafter is for another target",
        )
    for section in (config, config.section("dflash_config")):
        layers = section.opt_int("num_target_layers")
        if layers is not None and layers != target.integer("num_hidden_layers"):
            raise section.error(
                "num_target_layers",
                f"{target.integer('num_hidden_layers')}, as {target.path} says",
                "The drafter is for another target",
            )


def _plan_tensors(table: TensorTable, config: Config, options: Options, n_taps: int) -> list[PlannedTensor]:
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    head_dim = config.integer("head_dim")
    q_dim = config.integer("num_attention_heads") * head_dim
    kv_dim = config.integer("num_key_value_heads") * head_dim

    def norm(name: str, source: str, size: int) -> PlannedTensor:
        return PlannedTensor(f"{name}.weight", (size,), GGMLType.F32, (table.plain(f"{source}.weight", (size,)),))

    def matrix(name: str, prefix: str, rows: int, cols: int) -> PlannedTensor:
        source = table.linear(prefix, rows, cols)
        wanted = options.outtype or _default_type(table, source)
        qtype = choose_type(source, wanted, "--outtype")
        return PlannedTensor(f"{name}.weight", (rows, cols), qtype, (source,))

    tensors = [
        matrix("fc", "fc", hidden, n_taps * hidden),
        norm("enc.output_norm", "hidden_norm", hidden),
        norm("output_norm", "norm", hidden),
    ]
    for i in range(config.integer("num_hidden_layers")):
        src, dst = f"layers.{i}", f"blk.{i}"
        tensors += [
            norm(f"{dst}.attn_norm", f"{src}.input_layernorm", hidden),
            matrix(f"{dst}.attn_q", f"{src}.self_attn.q_proj", q_dim, hidden),
            matrix(f"{dst}.attn_k", f"{src}.self_attn.k_proj", kv_dim, hidden),
            matrix(f"{dst}.attn_v", f"{src}.self_attn.v_proj", kv_dim, hidden),
            matrix(f"{dst}.attn_output", f"{src}.self_attn.o_proj", hidden, q_dim),
            norm(f"{dst}.attn_q_norm", f"{src}.self_attn.q_norm", head_dim),
            norm(f"{dst}.attn_k_norm", f"{src}.self_attn.k_norm", head_dim),
            norm(f"{dst}.ffn_norm", f"{src}.post_attention_layernorm", hidden),
            matrix(f"{dst}.ffn_gate", f"{src}.mlp.gate_proj", inter, hidden),
            matrix(f"{dst}.ffn_up", f"{src}.mlp.up_proj", inter, hidden),
            matrix(f"{dst}.ffn_down", f"{src}.mlp.down_proj", hidden, inter),
        ]
    return tensors


def _default_type(table: TensorTable, source: Source) -> GGMLType | None:
    """Return a 2-byte type: the stored one, or for f32 weights f16 where that is exact and bf16 elsewhere."""
    if source.kind != PLAIN or source.weight.dtype != "F32":
        return None
    return GGMLType.F16 if is_f16_exact(table.checkpoint.read(source.weight), "F32") else GGMLType.BF16


def _add_rope(meta: Metadata, config: Config) -> None:
    meta.f32(f"{ARCH}.rope.freq_base", rope_theta(config))
    head_dim = config.integer("head_dim")
    for section in (config, config.section("rope_parameters")):
        factor = section.opt_float("partial_rotary_factor")
        if factor is not None and factor != 1.0:
            rotary_dim = round(factor * head_dim)
            if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
                raise section.error("partial_rotary_factor", f"an even part of head_dim {head_dim}")
            meta.u32(f"{ARCH}.rope.dimension_count", rotary_dim)
    scaling = config.section("rope_scaling")
    if not scaling.values:
        scaling = config.section("rope_parameters")
    kind = scaling.opt_str("rope_type") or scaling.opt_str("type") or "default"
    if kind == "default":
        return
    prefix = f"{ARCH}.rope.scaling"
    if kind not in ("linear", "yarn"):
        raise scaling.error("rope_type", "'default', 'linear' or 'yarn'")
    meta.text(f"{prefix}.type", kind)
    meta.f32(f"{prefix}.factor", scaling.number("factor"))
    if kind == "yarn":
        original = scaling.opt_int("original_max_position_embeddings")
        meta.u32(f"{prefix}.original_context_length", original or config.integer("max_position_embeddings"))
        for source, key in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            value = scaling.opt_float(source)
            if value is not None:
                meta.f32(f"{prefix}.{key}", value)


def _add_windows(meta: Metadata, config: Config, extra: Config) -> None:
    """Add sliding-window size and pattern (true where a layer slides), and the causal flag if one is given."""
    n_layers = config.integer("num_hidden_layers")
    window = config.opt_int("sliding_window") or extra.opt_int("swa_window_size")
    types = config.values.get("layer_types")
    if types is None:
        # Qwen3's rule for configs without layer_types.
        start = config.opt_int("max_window_layers", 0) or 0
        slides = bool(config.opt_bool("use_sliding_window")) or bool(extra.opt_bool("use_swa"))
        pattern = [slides and i >= start for i in range(n_layers)]
    else:
        known = {"full_attention": False, "sliding_attention": True}
        names = config.names("layer_types")
        if not isinstance(types, list) or len(types) != n_layers or len(names) != n_layers or set(names) - set(known):
            raise config.error("layer_types", f"{n_layers} of 'full_attention' or 'sliding_attention'")
        pattern = [known[name] for name in names]
        if extra.opt_bool("use_swa") and not any(pattern):
            raise extra.error("use_swa", "false, as layer_types has no 'sliding_attention'")
    if any(pattern):
        if window is None:
            raise config.error("sliding_window", "the window size, as some layers are 'sliding_attention'")
        meta.u32(f"{ARCH}.attention.sliding_window", window)
        meta.array(f"{ARCH}.attention.sliding_window_pattern", pattern, GGUFValueType.BOOL)
    causal = config.opt_bool("is_causal")
    if causal is None:
        causal = extra.opt_bool("causal")
    if causal is not None:
        meta.flag(f"{ARCH}.attention.causal", causal)
