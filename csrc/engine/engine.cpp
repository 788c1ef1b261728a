#include "engine/engine.h"

#include "core/error.h"
#include "core/units.h"
#include "engine/memory_need.h"
#include "model/draft_head.h"
#ifdef DFLASH_WITH_GPU
#include "backend/hip/hip_backend.h"
#endif

namespace dflash {

namespace {

constexpr int kMaxThreads = 4096;

// Throws before the first allocation where random weights would not fit: the system would end the process instead.
void check_room(const TargetConfig& target, const DrafterConfig* drafter, const SyntheticOptions& types,
                Backend& backend) {
  WeightCounter count(types.matrices, types.head), drafter_count(types.drafter, types.drafter);
  const auto model = MiniMaxM2::make(target, count, backend);
  if (drafter != nullptr) DFlashDrafter::make(*drafter, *model, drafter_count, backend);
  const size_t total = count.bytes() + drafter_count.bytes(), free = backend.memory().free;
  if (total > free) {
    throw CapacityError(cat("synthetic: ", human_bytes(total), " of weights needed, ", human_bytes(free),
                            " free; use fewer layers (n_layer)"));
  }
}

}  // namespace

std::vector<BackendStatus> backend_statuses() {
  std::vector<BackendStatus> out{{"cpu", ""}};
#ifdef DFLASH_WITH_GPU
  out.push_back({"hip", hip_backend_status()});
#else
  out.push_back({"hip", "this build has no GPU backend; install a ROCm toolchain and build with -DDFLASH_GPU=hip"});
#endif
  return out;
}

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.n_threads < 0 || options.n_threads > kMaxThreads) {
    fail("n_threads: 0 (as many as there are cores) to ", kMaxThreads, " expected, found ", options.n_threads);
  }
  std::string name = options.name;
  const std::vector<BackendStatus> known = backend_statuses();
  if (name == "auto") {
    // Precise mode is the CPU's: f32 activations throughout.
    name = !options.precise && known[1].problem.empty() ? "hip" : "cpu";
  }
  for (const BackendStatus& status : known) {
    if (status.name != name) continue;
    if (!status.problem.empty()) fail("backend '", name, "' cannot be used: ", status.problem);
#ifdef DFLASH_WITH_GPU
    if (name == "hip") return make_hip_backend(options);
#endif
    return make_cpu_backend(options);
  }
  fail("backend: 'auto', 'cpu' or 'hip' expected, found '", name, "'");
}

std::shared_ptr<Model> Model::load(const std::string& target_path, const std::string& drafter_path,
                                   const BackendOptions& options, const Progress& progress,
                                   const DrafterOptions& drafting, const SessionOptions* planned) {
  // Both directories are read and compared before any weight is loaded.
  const std::shared_ptr<const Gguf> target = Gguf::open(target_path);
  const std::shared_ptr<const Gguf> drafter = drafter_path.empty() ? nullptr : Gguf::open(drafter_path);
  const TargetConfig target_config = read_target_config(*target);
  DrafterConfig drafter_config;
  if (drafter) {
    drafter_config = read_drafter_config(*drafter);
    for (int& layer : drafter_config.target_layers) layer += drafting.tap_shift;
    if (drafting.mask_token_id >= 0) drafter_config.mask_token_id = drafting.mask_token_id;
    check_pair(target_config, drafter_config);
  }

  // Precise mode is the reference, and weights used where they lie are there to open at once: auto copies for neither.
  std::optional<DType> head_copy = draft_head_type(drafting.head, *target, !options.precise && options.repack);
  if (!drafter) head_copy.reset();

  auto m = std::make_shared<Model>();
  m->backend = make_backend(options);
  m->precise = options.precise;
  const MemoryNeed need = memory_need(
      *target, target_config, drafter.get(), drafter ? &drafter_config : nullptr,
      [&](const HostTensor& t) { return m->backend->weight_bytes(t); }, planned, options.precise, head_copy);
  const std::string problem = memory_problem(need, m->backend->memory(), m->backend->describe());
  if (!problem.empty() && !m->backend->pages()) throw CapacityError(problem);
  m->memory_warning = problem;
  m->target = MiniMaxM2::load(target, *m->backend, progress);
  if (drafter) m->drafter = DFlashDrafter::load(drafter, drafter_config, *m->target, *m->backend, progress);
  if (head_copy) m->drafter->set_head(load_draft_head(*target, *head_copy, *m->backend, progress));
  m->backend->loaded();
  return m;
}

std::shared_ptr<Model> Model::synthetic(const TargetConfig& target, const DrafterConfig* drafter,
                                        const SyntheticOptions& synthetic, const BackendOptions& options,
                                        uint64_t seed) {
  auto m = std::make_shared<Model>();
  m->backend = make_backend(options);
  if (drafter != nullptr) check_pair(target, *drafter);
  check_room(target, drafter, synthetic, *m->backend);
  RandomWeights weights(*m->backend, synthetic.matrices, synthetic.head, synthetic.branch_gain, seed);
  m->target = MiniMaxM2::make(target, weights, *m->backend);
  if (drafter != nullptr) {
    RandomWeights own(*m->backend, synthetic.drafter, synthetic.drafter, 1.0f, seed + 1000003);
    m->drafter = DFlashDrafter::make(*drafter, *m->target, own, *m->backend);
    if (synthetic.draft_head) {
      m->drafter->set_head(
          m->backend->random_weight(*synthetic.draft_head, target.n_embd, target.n_vocab, 1, seed + 2000003));
    }
  }
  return m;
}

}  // namespace dflash
