// All pybind11 code, and nothing else. Python signatures: python/dflash_cpp/_core.pyi.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <filesystem>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "core/gguf.h"
#include "core/topology.h"
#include "engine/engine.h"
#include "engine/session.h"
#include "quant/blocks.h"

#ifndef DFLASH_VERSION
#define DFLASH_VERSION "0.0.0"
#endif

namespace py = pybind11;
using namespace dflash;

namespace {

using Path = std::filesystem::path;  // names of any bytes, as os.fsdecode() writes them

// GGUF strings may hold any bytes; people should see them, not a codec error.
py::str to_str(std::string_view s) {
  PyObject* o = PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "replace");
  if (o == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(o);
}

py::object value_of(const Gguf& g, const Gguf::Value& v) {
  if (v.type == GgufType::String) {
    const std::vector<std::string_view> strings = g.strings(v);
    if (!v.is_array) return to_str(strings[0]);
    py::list out(strings.size());
    for (size_t i = 0; i < strings.size(); ++i) out[i] = to_str(strings[i]);
    return out;
  }
  const bool is_float = v.type == GgufType::F32 || v.type == GgufType::F64;
  if (!v.is_array) {
    if (v.type == GgufType::Bool) return py::bool_(g.int_at(v, 0) != 0);
    if (is_float) return py::float_(g.float_at(v, 0));
    return py::int_(g.int_at(v, 0));
  }
  if (is_float) {
    py::array_t<double> out(static_cast<py::ssize_t>(v.count));
    for (uint64_t i = 0; i < v.count; ++i) out.mutable_data()[i] = g.float_at(v, i);
    return out;
  }
  py::array_t<int64_t> out(static_cast<py::ssize_t>(v.count));
  for (uint64_t i = 0; i < v.count; ++i) out.mutable_data()[i] = g.int_at(v, i);
  return out;
}

py::array_t<float> decode_tensor(const Gguf& g, const std::string& name) {
  const Gguf::Tensor* t = g.find_tensor(name);
  if (t == nullptr) fail(g.path(), ": tensor '", name, "' is missing");
  const DTypeInfo* info = find_dtype(t->type_id);
  if (info == nullptr) fail(g.path(), ": tensor '", name, "': type id ", t->type_id, " cannot be decoded");
  std::vector<py::ssize_t> shape(t->ne.rbegin(), t->ne.rend());
  py::array_t<float> out(shape);
  const size_t row = row_bytes(info->type, t->ne[0]);
  const char* bytes = static_cast<const char*>(g.tensor_data(*t));
  for (int64_t r = 0; r < out.size() / t->ne[0]; ++r) {
    // Rows of F32/F16 may start at any byte in a damaged file: decode from an aligned copy.
    alignas(8) std::vector<char> copy(bytes + static_cast<size_t>(r) * row, bytes + static_cast<size_t>(r + 1) * row);
    decode_row(info->type, copy.data(), t->ne[0], out.mutable_data() + r * t->ne[0]);
  }
  return out;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  py::array_t<T> out(std::move(shape));
  std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
  return out;
}

// Ids out of int32 are wrong input like any other, not a conversion error.
std::vector<int32_t> to_tokens(const py::object& object) {
  const auto ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(object);
  if (!ids || ids.ndim() != 1) {
    PyErr_Clear();
    fail("tokens: a sequence of integer token ids expected, found ", std::string(py::str(py::type::of(object))));
  }
  std::vector<int32_t> out;
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    const int64_t id = ids.data()[i];
    if (id < 0 || id > 0x7fffffff) fail("tokens: ids of 0 or more expected, found ", id, " at position ", i);
    out.push_back(static_cast<int32_t>(id));
  }
  return out;
}

py::dict config_dict(const ModelConfig& c) {
  py::dict d;
  d["path"] = to_str(c.path);
  d["name"] = to_str(c.name);
  d["n_layer"] = c.n_layer;
  d["n_embd"] = c.n_embd;
  d["n_head"] = c.n_head;
  d["n_head_kv"] = c.n_head_kv;
  d["head_dim"] = c.head_dim;
  d["n_ff"] = c.n_ff;
  d["rms_eps"] = c.eps;
  d["n_rot"] = c.rope.n_rot;
  d["rope_theta"] = c.rope.theta;
  d["rope_inv_freq"] = c.rope.inv_freq;
  d["rope_scale"] = c.rope.scale;
  return d;
}

py::dict target_dict(const MiniMaxM2& m) {
  const TargetConfig& c = m.config();
  py::dict d = config_dict(c);
  d["n_expert"] = c.n_expert;
  d["n_expert_used"] = c.n_expert_used;
  d["n_vocab"] = c.n_vocab;
  d["n_ctx_train"] = c.n_ctx_train;
  d["weight_bytes"] = m.weight_bytes();
  d["bytes_per_token"] = m.bytes_per_token();
  d["expert_bytes_per_token"] = m.expert_bytes_per_token();
  return d;
}

py::dict drafter_dict(const DFlashDrafter& m) {
  const DrafterConfig& c = m.config();
  py::dict d = config_dict(c);
  d["block_size"] = c.block_size;
  d["target_layers"] = c.target_layers;
  d["mask_token_id"] = c.mask_token_id;
  d["sliding_window"] = c.sliding_window;
  d["causal"] = c.causal;
  d["weight_bytes"] = m.weight_bytes();
  d["head_type"] = std::string(dtype_info(m.head().type).name);
  d["head_bytes"] = m.head().bytes();
  return d;
}

py::list tally_list(const std::vector<Tally>& tallies) {
  py::list out;
  for (const Tally& t : tallies) {
    py::dict d;
    d["calls"] = t.calls;
    d["seconds"] = t.seconds;
    out.append(d);
  }
  return out;
}

py::dict stats_dict(const Stats& s) {
  py::dict seconds;
  seconds["prefill"] = s.prefill_seconds;
  seconds["draft"] = s.draft_seconds;
  seconds["verify"] = s.verify_seconds;
  seconds["sample"] = s.sample_seconds;
  seconds["ingest"] = s.ingest_seconds;
  py::dict d;
  d["prompt_tokens"] = s.prompt_tokens;
  d["cached_tokens"] = s.cached_tokens;
  d["generated_tokens"] = s.generated_tokens;
  d["steps"] = s.steps;
  d["drafted"] = s.drafted;
  d["accepted"] = s.accepted;
  d["proposed"] = s.proposed;
  d["left_out_tokens"] = s.left_out_tokens;
  d["lookup_drafted"] = s.lookup_drafted;
  d["lookup_accepted"] = s.lookup_accepted;
  d["drafted_per_slot"] = s.drafted_per_slot;
  d["accepted_per_slot"] = s.accepted_per_slot;
  d["depth_histogram"] = s.depth_histogram;
  d["seconds"] = seconds;
  d["verify_by_width"] = tally_list(s.verify_by_width);
  d["draft_by_count"] = tally_list(s.draft_by_count);
  d["experts_by_width"] = s.experts_by_width;
  d["expert_calls_by_width"] = s.expert_calls_by_width;
  return d;
}

// ---- shapes of synthetic models, as dictionaries with the names of target_config / drafter_config

int shape_int(const py::dict& d, const char* key, int min = 1) {
  if (!d.contains(key)) fail("synthetic shape: '", key, "' is missing");
  const int value = d[key].cast<int>();
  if (value < min) fail("synthetic shape: '", key, "': ", min, " or more expected, found ", value);
  return value;
}

double shape_float(const py::dict& d, const char* key, double fallback) {
  return d.contains(key) ? d[key].cast<double>() : fallback;
}

DType dtype_named(const std::string& name) {
  std::string known;
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return info.type;
    known += std::string(known.empty() ? "" : ", ") + info.name;
  }
  fail("type: one of ", known, " expected, found '", name, "'");
}

void read_shape(const py::dict& d, ModelConfig& c) {
  c.n_layer = shape_int(d, "n_layer");
  c.n_head = shape_int(d, "n_head");
  c.n_head_kv = shape_int(d, "n_head_kv");
  c.head_dim = shape_int(d, "head_dim");
  c.n_ff = shape_int(d, "n_ff", 32);
  check_heads(c);
}

TargetConfig target_shape(const py::dict& d) {
  TargetConfig c;
  c.path = "synthetic target";
  read_shape(d, c);
  c.n_embd = shape_int(d, "n_embd", 32);
  c.n_expert = shape_int(d, "n_expert");
  c.n_expert_used = shape_int(d, "n_expert_used");
  c.n_vocab = shape_int(d, "n_vocab", 2);
  c.eps = static_cast<float>(shape_float(d, "rms_eps", 1e-6));
  c.rope = make_rope(shape_int(d, "n_rot", 2), shape_float(d, "rope_theta", 5e6));
  if (c.n_expert_used > c.n_expert || c.rope.n_rot > c.head_dim || c.rope.n_rot % 2 != 0) {
    fail("synthetic shape: n_expert_used <= n_expert and an even n_rot <= head_dim expected");
  }
  return c;
}

DrafterConfig drafter_shape(const py::dict& d, const TargetConfig& target) {
  DrafterConfig c;
  c.path = "synthetic drafter";
  read_shape(d, c);
  c.n_embd = target.n_embd;
  c.block_size = shape_int(d, "block_size", 2);
  c.mask_token_id = target.n_vocab - 1;
  c.target_layers = d["target_layers"].cast<std::vector<int>>();
  c.eps = target.eps;
  c.rope = make_rope(c.head_dim, shape_float(d, "rope_theta", 5e6));
  c.causal.assign(static_cast<size_t>(c.n_layer), false);
  c.sliding_window.assign(static_cast<size_t>(c.n_layer), 0);
  return c;
}

// A Python object that may be copied and dropped without the GIL.
std::shared_ptr<py::object> hold(const py::object& object) {
  return std::shared_ptr<py::object>(new py::object(object), [](py::object* o) {
    py::gil_scoped_acquire gil;
    delete o;
  });
}

// A Python callable as the sampler's hook: the GIL is taken for the call. It changes an array of its own, which may
// outlive the row.
std::function<void(const std::vector<int32_t>&, float*, int64_t)> wrap_hook(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  const std::shared_ptr<py::object> held = hold(callable);
  return [held](const std::vector<int32_t>& history, float* logits, int64_t n_vocab) {
    py::gil_scoped_acquire gil;
    const py::array_t<float> row(static_cast<py::ssize_t>(n_vocab), logits);  // a copy
    (*held)(to_array(history, {static_cast<py::ssize_t>(history.size())}), row);
    std::memcpy(logits, row.data(), static_cast<size_t>(n_vocab) * sizeof(float));
  };
}

Progress wrap_progress(const py::object& callable) {
  if (callable.is_none()) return nullptr;
  const std::shared_ptr<py::object> held = hold(callable);
  return [held](const std::string& stage, size_t done, size_t total) {
    py::gil_scoped_acquire gil;
    (*held)(stage, done, total);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C while loading
  };
}

// Python's view of SamplingParams: the hook stays a Python object.
struct PySampling : SamplingParams {
  py::object hook = py::none();
};

void bind_gguf(py::module_& m) {
  py::class_<Gguf::Tensor>(m, "TensorInfo")
      .def_property_readonly("name", [](const Gguf::Tensor& t) { return to_str(t.name); })
      .def_property_readonly("type",
                             [](const Gguf::Tensor& t) {
                               const DTypeInfo* info = find_dtype(t.type_id);
                               return info != nullptr ? std::string(info->name) : cat("type ", t.type_id);
                             })
      .def_property_readonly("shape", [](const Gguf::Tensor& t) { return py::tuple(py::cast(t.ne)); })
      .def_property_readonly("offset", [](const Gguf::Tensor& t) { return t.offset; })
      .def_property_readonly("nbytes", [](const Gguf::Tensor& t) { return t.bytes; });

  py::class_<Gguf, std::shared_ptr<Gguf>>(m, "Gguf")
      .def(py::init([](const Path& path) { return std::const_pointer_cast<Gguf>(Gguf::open(path.string())); }),
           py::arg("path"))
      .def_property_readonly("path", [](const Gguf& g) { return to_str(g.path()); })
      .def_property_readonly("version", &Gguf::version)
      .def_property_readonly("file_bytes", [](const Gguf& g) { return g.file().size(); })
      .def_property_readonly("keys",
                             [](const Gguf& g) {
                               py::list out;
                               for (const std::string& key : g.keys()) out.append(to_str(key));
                               return out;
                             })
      .def_property_readonly("tensors", [](const Gguf& g) { return g.tensors(); })
      .def("__contains__", [](const Gguf& g, const std::string& key) { return g.has(key); })
      .def(
          "get",
          [](const Gguf& g, const std::string& key, py::object fallback) {
            const Gguf::Value* v = g.find(key);
            return v != nullptr ? value_of(g, *v) : fallback;
          },
          py::arg("key"), py::arg("default") = py::none())
      .def("tensor", &decode_tensor, py::arg("name"));
}

void bind_model(py::module_& m) {
  py::class_<Model, std::shared_ptr<Model>>(m, "Model")
      .def(py::init([](const Path& target, const std::optional<Path>& drafter, const std::string& backend,
                       int n_threads, bool precise, const std::string& cpu_isa, bool repack, const std::string& numa,
                       const py::object& progress, int tap_shift, std::optional<int32_t> mask_token_id,
                       std::optional<int> n_ctx, const std::string& kv_type, int n_batch,
                       const std::string& draft_head) {
             BackendOptions options;
             options.name = backend;
             options.n_threads = n_threads;
             options.precise = precise;
             options.cpu_isa = cpu_isa;
             options.repack = repack;
             options.numa = numa;
             const Progress report = wrap_progress(progress);
             const DrafterOptions drafting{draft_head, tap_shift, mask_token_id.value_or(-1)};
             SessionOptions planned;
             planned.n_ctx = n_ctx.value_or(0);
             planned.kv_type = kv_type;
             planned.n_batch = n_batch;
             py::gil_scoped_release release;
             return Model::load(target.string(), drafter.value_or("").string(), options, report, drafting,
                                n_ctx ? &planned : nullptr);
           }),
           py::arg("target"), py::arg("drafter") = py::none(), py::kw_only(), py::arg("backend") = "auto",
           py::arg("n_threads") = 0, py::arg("precise") = false, py::arg("cpu_isa") = "auto", py::arg("repack") = true,
           py::arg("numa") = "auto", py::arg("progress") = py::none(), py::arg("tap_shift") = 0,
           py::arg("mask_token_id") = py::none(), py::arg("n_ctx") = py::none(), py::arg("kv_type") = "auto",
           py::arg("n_batch") = 512, py::arg("draft_head") = "target")
      .def_static(
          "synthetic",
          [](const py::dict& target, const py::object& drafter, const std::string& matrices, const std::string& head,
             const std::string& drafter_matrices, const std::optional<std::string>& draft_head, float branch_gain,
             const std::string& backend, int n_threads, const std::string& cpu_isa, uint64_t seed) {
            BackendOptions options;
            options.name = backend;
            options.n_threads = n_threads;
            options.cpu_isa = cpu_isa;
            const SyntheticOptions synthetic{dtype_named(matrices), dtype_named(head), dtype_named(drafter_matrices),
                                             draft_head ? std::optional(dtype_named(*draft_head)) : std::nullopt,
                                             branch_gain};
            const TargetConfig shape = target_shape(target);
            std::optional<DrafterConfig> drafter_config;
            if (!drafter.is_none()) drafter_config = drafter_shape(drafter.cast<py::dict>(), shape);
            py::gil_scoped_release release;
            return Model::synthetic(shape, drafter_config ? &*drafter_config : nullptr, synthetic, options, seed);
          },
          py::arg("target"), py::arg("drafter") = py::none(), py::kw_only(), py::arg("matrices") = "Q4_0",
          py::arg("head") = "Q8_0", py::arg("drafter_matrices") = "Q8_0", py::arg("draft_head") = py::none(),
          py::arg("branch_gain") = 1.0f, py::arg("backend") = "auto", py::arg("n_threads") = 0,
          py::arg("cpu_isa") = "auto", py::arg("seed") = 1)
      .def_property_readonly("target_config", [](const Model& model) { return target_dict(*model.target); })
      .def_property_readonly("drafter_config",
                             [](const Model& model) -> py::object {
                               if (!model.drafter) return py::none();
                               return drafter_dict(*model.drafter);
                             })
      .def_property_readonly("backend", [](const Model& model) { return model.backend->name(); })
      .def_property_readonly("backend_description", [](const Model& model) { return model.backend->describe(); })
      .def_property_readonly("memory_warning", [](const Model& model) { return model.memory_warning; })
      .def_property_readonly("n_threads", [](const Model& model) { return model.backend->n_threads(); });
}

void bind_sampling(py::module_& m) {
  py::class_<PySampling>(m, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("temperature", &PySampling::temperature)
      .def_readwrite("top_k", &PySampling::top_k)
      .def_readwrite("top_p", &PySampling::top_p)
      .def_readwrite("min_p", &PySampling::min_p)
      .def_readwrite("seed", &PySampling::seed)
      .def_readwrite("repetition_penalty", &PySampling::repetition_penalty)
      .def_readwrite("presence_penalty", &PySampling::presence_penalty)
      .def_readwrite("frequency_penalty", &PySampling::frequency_penalty)
      .def_readwrite("penalty_last_n", &PySampling::penalty_last_n)
      .def_readwrite("logit_bias", &PySampling::logit_bias)
      .def_property(
          "logits_hook", [](const PySampling& p) { return p.hook; },
          [](PySampling& p, const py::object& hook) {
            if (!hook.is_none() && !PyCallable_Check(hook.ptr())) fail("logits_hook: a callable or None expected");
            p.hook = hook;
            p.logits_hook = wrap_hook(hook);
          });
  m.def(
      "sampling_distribution",
      [](const py::array_t<float, py::array::c_style | py::array::forcecast>& logits, const py::object& history,
         const PySampling& params) {
        check_sampling(params, static_cast<int>(logits.size()));
        Sampler sampler(params);
        const std::vector<double> p = sampler.distribution(logits.data(), logits.size(), to_tokens(history));
        return to_array(p, {static_cast<py::ssize_t>(p.size())});
      },
      py::arg("logits"), py::arg("history"), py::arg("params"));
}

void bind_session(py::module_& m) {
  py::class_<StepResult>(m, "StepResult")
      .def_readonly("tokens", &StepResult::tokens)
      .def_readonly("drafted", &StepResult::drafted)
      .def_readonly("accepted", &StepResult::accepted)
      .def_property_readonly("source", [](const StepResult& r) { return r.source; })
      .def_property_readonly("stop", [](const StepResult& r) -> py::object {
        if (r.stop == nullptr) return py::none();
        return py::str(r.stop);
      });

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Session>(m, "Session")
      .def(py::init([](std::shared_ptr<Model> model, int n_ctx, const std::string& kv_type, int n_batch,
                       const std::string& draft_rows) {
             SessionOptions options;
             options.n_ctx = n_ctx;
             options.kv_type = kv_type;
             options.n_batch = n_batch;
             options.draft_rows = draft_rows;
             py::gil_scoped_release release;
             return std::make_unique<Session>(std::move(model), options);
           }),
           py::arg("model"), py::kw_only(), py::arg("n_ctx") = 8192, py::arg("kv_type") = "auto",
           py::arg("n_batch") = 512, py::arg("draft_rows") = "auto")
      .def_property_readonly("n_ctx", &Session::n_ctx)
      .def_property_readonly("kv_bytes", &Session::kv_bytes)
      .def_property_readonly("pos", &Session::pos)
      .def_property_readonly("tokens", &Session::tokens)
      .def(
          "begin",
          [](Session& s, const py::object& tokens, const PySampling& sampling, int max_tokens, int depth,
             const std::vector<int32_t>& eos_ids, bool lookup, const std::vector<double>& simulate_accept,
             double simulate_spread) {
            GenerateParams params;
            params.sampling = sampling;
            params.max_tokens = max_tokens;
            params.depth = depth;
            params.eos_ids = eos_ids;
            params.lookup = lookup;
            params.simulate_accept = simulate_accept;
            params.simulate_spread = simulate_spread;
            return s.begin(to_tokens(tokens), params);
          },
          py::arg("tokens"), py::arg("sampling"), py::kw_only(), py::arg("max_tokens"), py::arg("depth") = -1,
          py::arg("eos_ids") = py::tuple(), py::arg("lookup") = true, py::arg("simulate_accept") = py::tuple(),
          py::arg("simulate_spread") = 0.0)
      .def("prefill",
           [](Session& s) {
             int done = 0;
             {
               py::gil_scoped_release release;
               done = s.prefill();
             }
             return py::make_tuple(done, s.stats().prompt_tokens);
           })
      .def("step", &Session::step, Release())
      .def("rewind", &Session::rewind, py::arg("pos"))
      .def("stats", [](const Session& s) { return stats_dict(s.stats()); })
      .def("policy_state",
           [](const Session& s) {
             const DepthPolicy& p = s.policy();
             py::list verify, draft;
             for (int w = 1; w <= p.max_depth() + 1; ++w) verify.append(p.verify_cost(w));
             for (int n = 1; n <= p.max_depth(); ++n) draft.append(p.draft_cost(n));
             py::dict d;
             d["verify_seconds"] = verify;
             d["draft_seconds"] = draft;
             d["ingest_seconds"] = p.ingest_cost();
             d["best_rate"] = p.best_rate();
             d["parked"] = p.parked();
             d["asleep"] = p.asleep();
             return d;
           })
      .def("session_stats", [](const Session& s) { return stats_dict(s.session_stats()); })
      .def(
          "logits",
          [](Session& s, const py::object& tokens) {
            const std::vector<int32_t> ids = to_tokens(tokens);
            std::vector<float> out;
            {
              py::gil_scoped_release release;
              out = s.logits(ids);
            }
            return to_array(out, {static_cast<py::ssize_t>(ids.size()), s.model().target->config().n_vocab});
          },
          py::arg("tokens"))
      .def(
          "taps",
          [](Session& s, const py::object& tokens) {
            const std::vector<int32_t> ids = to_tokens(tokens);
            std::vector<float> out;
            {
              py::gil_scoped_release release;
              out = s.taps(ids);
            }
            const py::ssize_t n_embd = s.model().target->config().n_embd, n = static_cast<py::ssize_t>(ids.size());
            return to_array(out, {n, static_cast<py::ssize_t>(out.size()) / (n * n_embd), n_embd});
          },
          py::arg("tokens"))
      .def(
          "draft_logits",
          [](Session& s, const py::object& tokens, int32_t anchor, int n, int block_rows) {
            const std::vector<int32_t> ids = to_tokens(tokens);
            std::vector<float> out;
            {
              py::gil_scoped_release release;
              out = s.draft_logits(ids, anchor, n, block_rows);
            }
            return to_array(out, {n, s.model().target->config().n_vocab});
          },
          py::arg("tokens"), py::arg("anchor"), py::arg("n"), py::arg("block_rows") = 0);
}

const char* source_name(DraftSource source) {
  return source == DraftSource::dflash ? "dflash" : source == DraftSource::lookup ? "lookup" : "none";
}

// The policy alone, so that it can be replayed and simulated without a model.
void bind_policy(py::module_& m) {
  py::class_<DepthPolicy>(m, "DepthPolicy")
      .def(py::init([](const std::vector<double>& verify_prior, double draft_prior) {
             if (verify_prior.size() < 2) fail("verify_prior: costs of 2 or more widths expected");
             return DepthPolicy(static_cast<int>(verify_prior.size()) - 1, CostPrior{verify_prior, draft_prior});
           }),
           py::arg("verify_prior"), py::arg("draft_prior"))
      .def(
          "plan",
          [](DepthPolicy& p, int max_depth, bool has_drafter, int lookup_match, int lookup_tokens) {
            const DraftPlan plan = p.plan(max_depth, has_drafter, lookup_match, lookup_tokens);
            return py::make_tuple(source_name(plan.source), plan.n);
          },
          py::arg("max_depth"), py::arg("has_drafter") = true, py::arg("lookup_match") = 0,
          py::arg("lookup_tokens") = 0)
      .def("verify_depth", &DepthPolicy::verify_depth, py::arg("confidence"))
      .def(
          "observe",
          [](DepthPolicy& p, const std::string& source, int verified, int accepted,
             const std::vector<float>& confidence, double draft_seconds, double verify_seconds, int lookup_match,
             int ingested, double ingest_seconds) {
            if (verified < 0 || verified > p.max_depth()) fail("verified: 0 to ", p.max_depth(), " expected");
            if (accepted < 0 || accepted > verified) fail("accepted: 0 to verified expected, found ", accepted);
            RoundOutcome o;
            o.source = source == "dflash"   ? DraftSource::dflash
                       : source == "lookup" ? DraftSource::lookup
                                            : DraftSource::none;
            o.drafted = static_cast<int>(confidence.size());
            if (o.source == DraftSource::dflash && (o.drafted < verified || o.drafted > p.max_depth())) {
              fail("confidence: verified (", verified, ") to max_depth values expected, found ", o.drafted);
            }
            o.verified = verified;
            o.accepted = accepted;
            o.confidence = confidence;
            o.draft_seconds = draft_seconds;
            o.verify_seconds = verify_seconds;
            o.lookup_match = lookup_match;
            o.ingested = ingested;
            o.ingest_seconds = ingest_seconds;
            p.observe(o);
          },
          py::arg("source"), py::kw_only(), py::arg("verified"), py::arg("accepted"), py::arg("confidence"),
          py::arg("draft_seconds"), py::arg("verify_seconds"), py::arg("lookup_match") = 0, py::arg("ingested") = 0,
          py::arg("ingest_seconds") = 0.0)
      .def(
          "observe_unverified",
          [](DepthPolicy& p, int slot, float confidence, bool stood) {
            if (slot < 0 || slot >= p.max_depth()) fail("slot: 0 to ", p.max_depth() - 1, " expected, found ", slot);
            p.observe_unverified(slot, confidence, stood);
          },
          py::arg("slot"), py::arg("confidence"), py::arg("stood"))
      .def("verify_cost", &DepthPolicy::verify_cost, py::arg("width"))
      .def("draft_cost", &DepthPolicy::draft_cost, py::arg("n"))
      .def_property_readonly("parked", &DepthPolicy::parked)
      .def_property_readonly("asleep", &DepthPolicy::asleep)
      .def_property_readonly("best_rate", &DepthPolicy::best_rate);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled engine of dflash_cpp.";
  m.attr("__version__") = DFLASH_VERSION;

  // One translator for both: messages may quote any bytes of a damaged file, which pybind11's own would not decode.
  static const py::handle error = py::exception<Error>(m, "DFlashError", PyExc_ValueError).release();
  static const py::handle capacity = py::exception<CapacityError>(m, "CapacityError", error).release();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const CapacityError& e) {
      PyErr_SetObject(capacity.ptr(), to_str(e.what()).ptr());
    } catch (const Error& e) {
      PyErr_SetObject(error.ptr(), to_str(e.what()).ptr());
    }
  });

  bind_gguf(m);
  bind_model(m);
  bind_sampling(m);
  bind_session(m);
  bind_policy(m);

  m.def("cpu_isas", &cpu_isas);
  m.def("default_threads", &ThreadPool::default_threads);
  m.def("describe_numa", &describe_numa);
  m.def("backends", [] {
    py::dict out;
    for (const BackendStatus& s : backend_statuses()) out[py::str(s.name)] = s.problem;
    return out;
  });
  m.def("build_info", [] {
    py::dict out;
    out["compiler"] = __VERSION__;
#ifdef DFLASH_WITH_GPU
    out["gpu"] = DFLASH_WITH_GPU;
#else
    out["gpu"] = "off";
#endif
    return out;
  });
}
