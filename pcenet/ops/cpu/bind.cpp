// Runs first and on every processor: registers the operators with torch, says which instruction sets were compiled
// and which of them the processor has, and keeps the table of the one that was chosen. Compiled without vector flags.
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "table.h"

namespace pcenet {
namespace {

struct InstructionSet {
  const char* name;
  const Table* table;
  bool (*runs)();
};

// The best first. __builtin_cpu_supports asks both the processor and the system, which has to save wide registers.
const InstructionSet SETS[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#elif defined(__aarch64__)
    {"neon", &neon::table, [] { return true; }},  // part of every such processor
#endif
};

const Table* chosen = nullptr;

using torch::stable::Tensor;

// Twice x: says that all works, from the registration to torch's threads.
Tensor ping(Tensor x) {
  STD_TORCH_CHECK(chosen != nullptr, "no instruction set was chosen");
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(), "ping takes float32");
  Tensor y = torch::stable::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, x.numel(), 1024, [&](int64_t begin, int64_t end) {
    chosen->twice(in + begin, out + begin, end - begin);
  });
  return y;
}

}  // namespace
}  // namespace pcenet

extern "C" {

// The compiled instruction sets by number, the best first; null behind the last.
__attribute__((visibility("default"))) const char* pcenet_set(int number) {
  constexpr int count = sizeof(pcenet::SETS) / sizeof(pcenet::SETS[0]);
  return number >= 0 && number < count ? pcenet::SETS[number].name : nullptr;
}

__attribute__((visibility("default"))) int pcenet_runs(int number) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return pcenet::SETS[number].runs() ? 1 : 0;
}

__attribute__((visibility("default"))) void pcenet_choose(int number) { pcenet::chosen = pcenet::SETS[number].table; }
}

STABLE_TORCH_LIBRARY(pcenet, m) { m.def("ping(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pcenet, CPU, m) { m.impl("ping", TORCH_BOX(&pcenet::ping)); }
