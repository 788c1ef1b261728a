"""MiniMax-M2 checkpoints -> llama.cpp's `minimax-m2` architecture: which tensor goes where, and the metadata."""

from __future__ import annotations

from collections import Counter

from gguf import GGMLQuantizationType as GGMLType
from gguf import LlamaFileType

from .errors import ConvertError
from .hf_config import Config
from .linear import AWQ, PLAIN, SYMMETRIC, Source, TensorTable, choose_type
from .plan import Metadata, Options, Plan, PlannedTensor
from .vocab import MAX_VOCAB, add_chat_template, add_tokenizer_file, add_vocab, load_vocab

ARCH = "minimax-m2"
MODEL_TYPE, ARCHITECTURE = "minimax_m2", "MiniMaxM2ForCausalLM"  # as config.json names it
DEFAULT_ROTARY_DIM = 64  # every MiniMax-M2 release; some requantised uploads lost the key
SIGMOID_GATING = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID

# The two namings in circulation: the release's remote code, and transformers 5 / llm-compressor.
MOE_PREFIXES = ("block_sparse_moe", "mlp")
EXPERT_NAMES = (
    {"gate": "w1", "down": "w2", "up": "w3"},
    {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"},
)

FILE_TYPES = {
    GGMLType.F32: LlamaFileType.ALL_F32,
    GGMLType.F16: LlamaFileType.MOSTLY_F16,
    GGMLType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
}


def is_target(config: Config) -> bool:
    """Whether config.json describes a MiniMax-M2 model."""
    return config.values.get("model_type") == MODEL_TYPE or ARCHITECTURE in config.names("architectures")


def plan_target(table: TensorTable, config: Config, options: Options) -> Plan:
    """Decide the metadata and every tensor of a MiniMax-M2 GGUF.

    Raises `ConvertError` for a config the architecture does not cover, for tensors that are missing or of another
    shape, and for unknown ones.
    """
    check_quantization(config)
    _check_architecture(config)
    tensors = _plan_tensors(table, config, options)
    table.check_all_used()
    check_zero_points(config, tensors)
    directory = table.checkpoint.directory
    vocab = load_vocab(directory, config.integer("vocab_size", 1, MAX_VOCAB))
    meta = Metadata()
    add_general(meta, config, directory.resolve().name, tensors)
    _add_architecture(meta, config, options)
    add_vocab(meta, vocab, config)
    add_chat_template(meta, directory)
    add_tokenizer_file(meta, vocab)
    return Plan(ARCH, meta, tensors)


def check_quantization(config: Config) -> None:
    """Check config.json's quantization_config. Raises `ConvertError` for a method or scheme that cannot be repacked.

    Group sizes and which Linears are quantised come from the tensors; several config groups may differ in those.
    """
    quant = config.section("quantization_config")
    if not quant.values:
        return
    method = quant.opt_str("quant_method")
    way_out = "Use a compressed-tensors pack-quantized or an AutoAWQ gemm checkpoint, or the bf16 original"
    if method == "awq":
        _expect(quant, "version", ("gemm", None), way_out)
        _expect(quant, "bits" if quant.has("bits") else "w_bit", (4,), way_out)
        _expect(quant, "zero_point", (True, None), way_out)
    elif method == "compressed-tensors":
        _expect(quant, "format", ("pack-quantized", None), way_out)
        _expect(quant, "quantization_status", ("compressed", "frozen", None), way_out)
        groups = quant.section("config_groups")
        for name in groups.values:
            group = groups.section(name)
            _expect(group, "format", ("pack-quantized", None), way_out)
            _expect(group, "input_activations", (None,), way_out)
            weights = group.section("weights")
            _expect(weights, "num_bits", (4,), way_out)
            _expect(weights, "type", ("int",), way_out)
            _expect(weights, "strategy", ("group", "channel"), way_out)
            _expect(weights, "dynamic", (False, None), way_out)
            # "weight"/"static" ordering only changes how scales were found; the stored order is the plain one.
            _expect(weights, "actorder", ("weight", "static", False, None), way_out)
    else:
        raise quant.error("quant_method", "'compressed-tensors' or 'awq'", way_out)


def check_zero_points(config: Config, tensors: list[PlannedTensor]) -> None:
    """Raise `ConvertError` for a packed weight without zero points where every scheme of config.json has them."""
    groups = config.section("quantization_config").section("config_groups")
    symmetric = [groups.section(name).section("weights").opt_bool("symmetric") for name in groups.values]
    if not symmetric or any(value is not False for value in symmetric):
        return
    for source in (source for tensor in tensors for source in tensor.sources):
        if source.kind == SYMMETRIC:
            raise ConvertError(
                f"{source.weight.path}: tensor '{source.name}.weight_zero_point' is missing, and the config_groups of "
                f"{config.path} say symmetric: false. Complete the download"
            )


def _expect(config: Config, key: str, allowed: tuple[object, ...], way_out: str = "") -> None:
    value = config.values.get(key)
    # 1 == True in Python: compare the types as well, so that "bits": true is no 4-bit checkpoint.
    if not any(type(value) is type(item) and value == item for item in allowed):
        names = " or ".join(repr(item) for item in allowed if item is not None) or "null"
        raise config.error(key, names, way_out)


def _check_architecture(config: Config) -> None:
    """Refuse variants of the architecture that would load and answer nonsense."""
    _expect(config, "hidden_act", ("silu", None))
    _expect(config, "scoring_func", ("sigmoid", None))
    _expect(config, "use_qk_norm", (True, None))
    _expect(config, "qk_norm_type", ("per_layer", None))
    _expect(config, "use_routing_bias", (True, None))
    _expect(config, "shared_intermediate_size", (0, None))
    _expect(config, "attention_bias", (False, None))
    _expect(config, "sliding_window", (None,))
    _expect(config, "rope_scaling", (None,))
    _expect(config.section("rope_parameters"), "rope_type", ("default", None))
    attention_types = config.opt_ints("attn_type_list")
    if attention_types is not None and set(attention_types) != {1}:
        raise config.error("attn_type_list", "full attention (1) in every layer")


def _plan_tensors(table: TensorTable, config: Config, options: Options) -> list[PlannedTensor]:
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size", 1, MAX_VOCAB)
    head_dim = config.integer("head_dim")
    q_dim = config.integer("num_attention_heads") * head_dim
    kv_dim = config.integer("num_key_value_heads") * head_dim
    n_experts = config.integer("num_local_experts")

    def norm(name: str, source: str, size: int) -> PlannedTensor:
        return PlannedTensor(name, (size,), GGMLType.F32, (table.plain(source, (size,)),))

    def matrix(name: str, prefix: str, rows: int, cols: int, wanted: GGMLType | None, what: str) -> PlannedTensor:
        source = table.linear(prefix, rows, cols)
        if source.kind != PLAIN and wanted is not None and what != "--outtype":
            raise ConvertError(
                f"{source.weight.path}: {prefix!r} is already quantised ({source.kind}) and keeps its integers; "
                f"leave {what} out"
            )
        return PlannedTensor(name, (rows, cols), choose_type(source, wanted, what), (source,))

    embedding = matrix("token_embd.weight", "model.embed_tokens", vocab, hidden, options.embedding, "--embedding")
    # llama.cpp's minimax-m2 has no tied form: a tied head becomes a copy of the embedding.
    tied = bool(config.opt_bool("tie_word_embeddings")) and "lm_head.weight" not in table
    head_source = "model.embed_tokens" if tied else "lm_head"
    tensors = [embedding]
    for i in range(config.integer("num_hidden_layers")):
        src, dst = f"model.layers.{i}", f"blk.{i}"
        attn = f"{src}.self_attn"
        moe = _moe_prefix(table, src)
        bias = f"{moe}.e_score_correction_bias"
        tensors += [
            norm(f"{dst}.attn_norm.weight", f"{src}.input_layernorm.weight", hidden),
            matrix(f"{dst}.attn_q.weight", f"{attn}.q_proj", q_dim, hidden, options.outtype, "--outtype"),
            matrix(f"{dst}.attn_k.weight", f"{attn}.k_proj", kv_dim, hidden, options.outtype, "--outtype"),
            matrix(f"{dst}.attn_v.weight", f"{attn}.v_proj", kv_dim, hidden, options.outtype, "--outtype"),
            matrix(f"{dst}.attn_output.weight", f"{attn}.o_proj", hidden, q_dim, options.outtype, "--outtype"),
            norm(f"{dst}.attn_q_norm.weight", f"{attn}.q_norm.weight", q_dim),
            norm(f"{dst}.attn_k_norm.weight", f"{attn}.k_norm.weight", kv_dim),
            norm(f"{dst}.ffn_norm.weight", f"{src}.post_attention_layernorm.weight", hidden),
            # The router decides near-ties: always f32, never quantised.
            PlannedTensor(
                f"{dst}.ffn_gate_inp.weight",
                (n_experts, hidden),
                GGMLType.F32,
                (table.plain(f"{moe}.gate.weight", (n_experts, hidden)),),
            ),
            norm(f"{dst}.exp_probs_b.bias", bias, n_experts),
            *_plan_experts(table, config, options, moe, dst),
        ]
    tensors.append(norm("output_norm.weight", "model.norm.weight", hidden))
    tensors.append(matrix("output.weight", head_source, vocab, hidden, options.head, "--head"))
    return tensors


def _moe_prefix(table: TensorTable, layer: str) -> str:
    for prefix in MOE_PREFIXES:
        if f"{layer}.{prefix}.gate.weight" in table:
            return f"{layer}.{prefix}"
    return f"{layer}.{MOE_PREFIXES[0]}"


def _plan_experts(
    table: TensorTable, config: Config, options: Options, moe: str, dst: str
) -> tuple[PlannedTensor, ...]:
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    n_experts = config.integer("num_local_experts")
    forms = ("weight_packed", "qweight", "weight")
    names = next(
        (n for n in EXPERT_NAMES if any(f"{moe}.experts.0.{n['gate']}.{form}" in table for form in forms)),
        EXPERT_NAMES[0],
    )
    planned = []
    for role, rows, cols in (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)):
        sources = tuple(table.linear(f"{moe}.experts.{e}.{names[role]}", rows, cols) for e in range(n_experts))
        name = f"{dst}.ffn_{role}_exps.weight"
        planned.append(PlannedTensor(name, (n_experts, rows, cols), _stack_type(name, sources, options), sources))
    return tuple(planned)


def _stack_type(name: str, sources: tuple[Source, ...], options: Options) -> GGMLType:
    """Return the one type a stack of experts can have without loss.

    Symmetric experts beside asymmetric ones become Q4_1, exactly (m = -8d). Quantised beside unquantised ones have no
    common type short of f32 and are refused.
    """
    types = Counter(choose_type(source, options.outtype, "--outtype") for source in sources)
    if len(types) == 1:
        return next(iter(types))
    if all(source.kind in (SYMMETRIC, AWQ) or source.zero is not None for source in sources):
        return GGMLType.Q4_1
    found = ", ".join(f"{count} {qtype.name}" for qtype, count in types.items())
    example = next(s for s in sources if choose_type(s, options.outtype, "--outtype") != types.most_common(1)[0][0])
    if all(source.kind == PLAIN for source in sources):
        way_out = "Pass --outtype to give them one type"
    else:
        way_out = "Quantise all experts of a layer or none; GGUF stores them as one stack"
    raise ConvertError(
        f"{example.weight.path}: the experts of {name} are of several types ({found}; {example.name!r} is "
        f"{example.kind}). {way_out}"
    )


def add_general(meta: Metadata, config: Config, name: str, tensors: list[PlannedTensor]) -> None:
    """Add the general.* keys: name, type, file type by share of bytes, quantisation version, sampling defaults."""
    meta.text("general.type", "model")
    meta.text("general.name", name.encode(errors="replace").decode())
    sizes: Counter[GGMLType] = Counter()
    for tensor in tensors:
        sizes[tensor.qtype] += tensor.nbytes
    meta.u32("general.file_type", int(FILE_TYPES[sizes.most_common(1)[0][0]]))
    meta.u32("general.quantization_version", 2)


def add_shape(meta: Metadata, arch: str, config: Config) -> None:
    """Add the keys of layers and attention, which targets and drafters share."""
    heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of {heads} query heads")
    meta.u32(f"{arch}.block_count", config.integer("num_hidden_layers"))
    meta.u32(f"{arch}.context_length", config.integer("max_position_embeddings"))
    meta.u32(f"{arch}.embedding_length", config.integer("hidden_size"))
    meta.u32(f"{arch}.feed_forward_length", config.integer("intermediate_size"))
    meta.u32(f"{arch}.attention.head_count", heads)
    meta.u32(f"{arch}.attention.head_count_kv", kv_heads)
    meta.u32(f"{arch}.attention.key_length", config.integer("head_dim"))
    meta.u32(f"{arch}.attention.value_length", config.integer("head_dim"))
    meta.f32(f"{arch}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))


def _add_architecture(meta: Metadata, config: Config, options: Options) -> None:
    generation = Config.load_optional(config.path.parent / "generation_config.json")
    if generation.values.get("top_k") not in (None, 0, -1):
        meta.i32("general.sampling.top_k", generation.integer("top_k"))
    for key, source in (("top_p", "top_p"), ("temp", "temperature")):
        if generation.values.get(source) not in (None, 0):
            meta.f32(f"general.sampling.{key}", generation.number(source))
    add_shape(meta, ARCH, config)
    meta.f32(f"{ARCH}.rope.freq_base", rope_theta(config))
    meta.u32(f"{ARCH}.rope.dimension_count", _rotary_dim(config, config.integer("head_dim"), options))
    meta.u32(f"{ARCH}.expert_count", config.integer("num_local_experts"))
    meta.u32(f"{ARCH}.expert_used_count", config.integer("num_experts_per_tok", 1, config.integer("num_local_experts")))
    meta.u32(f"{ARCH}.expert_feed_forward_length", config.integer("intermediate_size"))
    meta.u32(f"{ARCH}.expert_gating_func", SIGMOID_GATING)
    meta.u32(f"{ARCH}.vocab_size", config.integer("vocab_size", 1, MAX_VOCAB))


def rope_theta(config: Config) -> float:
    """Return the rotary base, from the top level or from rope_parameters."""
    nested = config.section("rope_parameters").opt_float("rope_theta")
    return nested if nested is not None and not config.has("rope_theta") else config.number("rope_theta")


def _rotary_dim(config: Config, head_dim: int, options: Options) -> int:
    direct = config.opt_int("rotary_dim", 2, head_dim)
    factor = config.section("rope_parameters").opt_float("partial_rotary_factor")
    if factor is None:
        factor = config.opt_float("partial_rotary_factor")
    derived = None if factor is None else round(factor * head_dim)
    if direct is None and derived is None:
        options.note(
            f"{config.path}: neither rotary_dim nor partial_rotary_factor; using {DEFAULT_ROTARY_DIM}, "
            "as in every MiniMax-M2 release"
        )
        derived = min(DEFAULT_ROTARY_DIM, head_dim)
    if direct is not None and derived is not None and direct != derived:
        raise config.error("rotary_dim", f"{derived} (partial_rotary_factor {factor} of head_dim {head_dim})")
    result = direct if direct is not None else derived
    assert result is not None
    if result % 2 or not 0 < result <= head_dim:
        raise config.error("rotary_dim", f"an even number up to head_dim {head_dim}")
    return result
