// The operators: what comes from Python is checked, patches are sorted by expert, tasks are shared out between torch's
// threads. Plain x86-64: nothing here may need an instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace pcenet {

float *scratch(size_t floats) {
  struct Free {
    void operator()(float *p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t room = 0;
  if (room < floats) {
    memory.reset();
    room = (floats + 1023) / 1024 * 1024;
    memory.reset(static_cast<float *>(std::aligned_alloc(64, room * sizeof(float))));
    if (!memory) {
      room = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

struct InstructionSet {
  const Kernels *kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process tile registers when it asks for them, and with it all threads and processes that it starts.
bool has_amx() {
  constexpr unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles) && (d & bfloat16) &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

// The best first. __builtin_cpu_supports asks both the processor and the system, which has to save wide registers.
const InstructionSet SETS[] = {
#if defined(__x86_64__)
    {&avx512_amx_kernels, has_amx},
    {&avx512_bf16_kernels, has_avx512_bf16},
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#elif defined(__aarch64__)
    {&neon_kernels, [] { return true; }},  // part of every such processor
#endif
};

const Kernels *kernels = nullptr;  // of the set that was chosen

// Blocks of lines whose sums are added in order: how many does not depend on the threads, so sums do not either.
constexpr int64_t BLOCKS = 32;

// Runs tasks 0 to count, each by whichever thread is free; make() gives a thread the function that does its tasks.
template <class Make>
void by_workers(int64_t count, const Make &make) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    auto task = make();
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
  };
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) return work();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) work();
  });
}

template <class Task>
void in_parallel(int64_t count, const Task &task) {
  by_workers(count, [&] { return [&](int64_t i) { task(i); }; });
}

// ---- What comes from Python -----------------------------------------------------------------------------------------

// A tensor's numbers.
const float *floats(const Tensor &tensor, const char *name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_cpu() && tensor.is_contiguous(), name,
                  " must be float32, contiguous and on the CPU");
  return static_cast<const float *>(tensor.const_data_ptr());
}

void check_sizes(const Tensor &tensor, const char *name, const Sizes &sizes) {
  auto found = tensor.sizes();
  std::string wanted;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), name, " must be [", wanted, "]");
}

const float *floats(const Maybe &tensor, const char *name, const Sizes &sizes) {
  if (!tensor) return nullptr;
  check_sizes(*tensor, name, sizes);
  return floats(*tensor, name);
}

bool is_bfloat16(const Tensor &map) { return map.scalar_type() == ScalarType::BFloat16; }

// A map's numbers, in float32, or in bfloat16 where kernels take that.
const void *numbers(const Tensor &map, const char *name) {
  if (!is_bfloat16(map)) return floats(map, name);
  STD_TORCH_CHECK(kernels->bfloat16 && map.is_cpu() && map.is_contiguous(), name,
                  " in bfloat16 must be contiguous, on the CPU, and for kernels that take it");
  return map.const_data_ptr();
}

// The same of a map that belongs to another: of its type, or in float32.
const void *numbers(const Maybe &map, const char *name, const Sizes &sizes, const Tensor &other) {
  if (!map) return nullptr;
  STD_TORCH_CHECK(!is_bfloat16(*map) || is_bfloat16(other), name, " is in bfloat16, and the map that it belongs to is not");
  check_sizes(*map, name, sizes);
  return numbers(*map, name);
}

float number_of(const void *map, bool bfloat16, int64_t i) {
  if (!bfloat16) return static_cast<const float *>(map)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t *>(map)[i]) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

Tensor empty(const Tensor &like, Sizes sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, sizes, type);
}
Tensor zeros(const Tensor &like, Sizes sizes) { return torch::stable::new_zeros(like, sizes, ScalarType::Float); }
float *floats_of(const Tensor &tensor) { return static_cast<float *>(tensor.mutable_data_ptr()); }

Grid grid_of(const Tensor &pixels, int64_t side) {
  STD_TORCH_CHECK(pixels.dim() == 4 && side > 0, "a map must be [B, H, W, C], and patch_size positive");
  Grid grid = {pixels.size(0), pixels.size(1), pixels.size(2), int(side), 0, 0};
  STD_TORCH_CHECK(grid.batch * grid.height * grid.width < INT32_MAX, "a map has too many pixels");
  grid.rows = int((grid.height + side - 1) / side);
  grid.columns = int((grid.width + side - 1) / side);
  return grid;
}

Sizes map_of(const Grid &grid, int64_t channels) { return {grid.batch, grid.height, grid.width, channels}; }

int64_t lines_of(const Grid &grid) { return grid.batch * grid.rows; }
int64_t patches_of(const Grid &grid) { return lines_of(grid) * grid.columns; }

const int64_t *experts_of(const Tensor &expert, const Grid &grid, int64_t num_experts) {
  STD_TORCH_CHECK(expert.scalar_type() == ScalarType::Long && expert.is_contiguous() && expert.is_cpu(),
                  "expert must be a contiguous int64 tensor on the CPU");
  STD_TORCH_CHECK(expert.numel() == patches_of(grid), "expert has ", expert.numel(), " entries for ",
                  patches_of(grid), " patches");
  auto experts = static_cast<const int64_t *>(expert.const_data_ptr());
  for (int64_t i = 0; i < expert.numel(); i++)
    STD_TORCH_CHECK(experts[i] >= -1 && experts[i] < num_experts, "expert must lie between -1 and ", num_experts - 1,
                    ", found ", experts[i]);
  return experts;
}

// Patches sorted by expert; those of expert e are order[begin[e]] to order[begin[e + 1]]. Nobody's are left out.
struct Sorted {
  std::vector<int32_t> order;
  std::vector<int64_t> begin;

  Sorted(const int64_t *expert, int64_t patches, int64_t experts) : order(patches), begin(experts + 1) {
    for (int64_t i = 0; i < patches; i++)
      if (expert[i] >= 0) begin[expert[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) begin[e + 1] += begin[e];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < patches; i++)
      if (expert[i] >= 0) order[next[expert[i]]++] = int32_t(i);
  }
  bool complete() const { return begin.back() == int64_t(order.size()); }
};

// A weight [E, D, C, K, K], float32, in any layout whose taps lie in equal steps; and what is added for every expert.
struct Weight {
  const float *data, *base = nullptr;
  int64_t base_out_stride = 0, base_in_stride = 0, base_tap_stride = 0;
  int64_t experts, out, in;
  int kernel;
  int64_t expert_stride, out_stride, in_stride, tap_stride;

  Weight(const Tensor &w, const Maybe &added) {
    STD_TORCH_CHECK(w.dim() == 5 && w.is_cpu() && w.scalar_type() == ScalarType::Float,
                    "weight must be float32 [E, D, C, K, K] on the CPU");
    kernel = int(w.size(3));
    STD_TORCH_CHECK((kernel == 1 || kernel == 3) && w.size(4) == kernel, "the kernel must be 1x1 or 3x3");
    STD_TORCH_CHECK(kernel == 1 || w.stride(3) == 3 * w.stride(4), "the taps of weight must lie in equal steps");
    data = static_cast<const float *>(w.const_data_ptr());
    experts = w.size(0), out = w.size(1), in = w.size(2);
    expert_stride = w.stride(0), out_stride = w.stride(1), in_stride = w.stride(2), tap_stride = w.stride(4);
    if (!added) return;
    const Tensor &b = *added;
    STD_TORCH_CHECK(b.dim() == 4 && b.is_cpu() && b.scalar_type() == ScalarType::Float && b.size(0) == out &&
                        b.size(1) == in && b.size(2) == kernel && b.size(3) == kernel,
                    "base must be float32 [D, C, K, K] on the CPU, as weight's kernels are");
    STD_TORCH_CHECK(kernel == 1 || b.stride(2) == 3 * b.stride(3), "the taps of base must lie in equal steps");
    base = static_cast<const float *>(b.const_data_ptr());
    base_out_stride = b.stride(0), base_in_stride = b.stride(1), base_tap_stride = b.stride(3);
  }
};

// ---- Operators ------------------------------------------------------------------------------------------------------

struct Task {
  int expert;
  int64_t first, last;
  int panel, panel_end;
};

// An expert's patches in pieces, of which all experts together have a few per thread. Where that makes fewer tasks than
// threads, for a single image, they are divided by output channels.
std::vector<Task> share_out(const Sorted &sorted, const Convolution &job) {
  constexpr int64_t least_pixels = 96;
  int64_t total = std::max<int64_t>(1, sorted.begin.back()), pixels = int64_t(job.grid.side) * job.grid.side;
  int64_t threads = torch::stable::get_num_threads();
  int panels = kernels->panels(job.out_channels);
  std::vector<Task> tasks, parts;
  for (size_t e = 0; e + 1 < sorted.begin.size(); e++) {
    int64_t first = sorted.begin[e], load = sorted.begin[e + 1] - first;
    if (!load) continue;
    int64_t most = std::clamp<int64_t>(load * pixels / least_pixels, 1, load);
    int64_t pieces = std::clamp<int64_t>((load * 4 * threads + total - 1) / total, 1, most);
    for (int64_t i = 0; i < pieces; i++)
      tasks.push_back({int(e), first + load * i / pieces, first + load * (i + 1) / pieces, 0, panels});
  }
  int64_t count = tasks.size();
  if (count == 0 || count >= threads) return tasks;
  int64_t groups = std::min<int64_t>(panels, (threads + count - 1) / count);
  for (const Task &t : tasks)
    for (int64_t g = 0; g < groups; g++)
      parts.push_back({t.expert, t.first, t.last, int(panels * g / groups), int(panels * (g + 1) / groups)});
  return parts;
}

void run(const Convolution &job, const Sorted &sorted) {
  std::vector<Task> tasks = share_out(sorted, job);
  by_workers(tasks.size(), [&] {
    return [&, before = Task{-1, 0, 0, 0, 0}](int64_t i) mutable {
      const Task &t = tasks[i];
      bool packed = t.expert == before.expert && t.panel == before.panel && t.panel_end == before.panel_end;
      kernels->convolve(job, t.expert, t.first, t.last, t.panel, t.panel_end, packed);
      before = t;
    };
  });
}

Convolution convolution(const Tensor &in, const Grid &grid, Direction direction, bool neighbours, const Weight &w) {
  bool forward = direction == Direction::forward;
  Convolution job = {};
  job.in = numbers(in, "x"), job.bfloat16 = is_bfloat16(in);
  job.grid = grid, job.direction = direction, job.neighbours = neighbours, job.kernel = w.kernel;
  job.in_channels = int(forward ? w.in : w.out), job.out_channels = int(forward ? w.out : w.in);
  STD_TORCH_CHECK(in.size(3) == job.in_channels, "the map has ", in.size(3), " channels, weight ", job.in_channels);
  STD_TORCH_CHECK(!job.bfloat16 || job.in_channels % 2 == 0, "a map in bfloat16 must have an even number of channels");
  job.weight = {w.data, forward ? w.out_stride : w.in_stride, forward ? w.in_stride : w.out_stride, w.tap_stride};
  job.base = {w.base, forward ? w.base_out_stride : w.base_in_stride, forward ? w.base_in_stride : w.base_out_stride,
              w.base_tap_stride};
  job.expert_stride = w.expert_stride;
  return job;
}

// A convolution of `in` and what follows it. What nobody computes is the shortcut, or zeros.
Tensor convolve(const Tensor &in, const Grid &grid, const Sorted &sorted, const Weight &w, bool neighbours,
                const Epilogue &epilogue, const Maybe &residual) {
  Convolution job = convolution(in, grid, Direction::forward, neighbours, w);
  Sizes map = map_of(grid, w.out);
  Tensor out = empty(in, map, (residual ? *residual : in).scalar_type());
  job.out = out.mutable_data_ptr(), job.out_bfloat16 = is_bfloat16(out);
  job.epilogue = epilogue, job.epilogue.residual = numbers(residual, "residual", map, in);
  job.order = sorted.order.data(), job.begin = sorted.begin.data();
  size_t size = out.numel() * (job.out_bfloat16 ? 2 : 4);
  if (!sorted.complete() && residual) std::memcpy(job.out, job.epilogue.residual, size);
  else if (!sorted.complete()) std::memset(job.out, 0, size);
  run(job, sorted);
  return out;
}

Tensor patch_conv2d(const Tensor &pixels, const Tensor &weight, const Maybe &base, const Tensor &expert,
                    int64_t patch_size, bool neighbours, const Maybe &scale, const Maybe &shift, bool gelu,
                    const Maybe &gate, const Maybe &residual) {
  Weight w(weight, base);
  Grid grid = grid_of(pixels, patch_size);
  Sizes table = {w.experts, w.out};
  Epilogue epilogue = {floats(scale, "scale", table), floats(shift, "shift", table), gelu,
                       floats(gate, "gate", {patches_of(grid)}), nullptr};
  Sorted sorted(experts_of(expert, grid, w.experts), patches_of(grid), w.experts);
  return convolve(pixels, grid, sorted, w, neighbours, epilogue, residual);
}

// A batch normalisation by running statistics [weight, bias, mean, variance] as a scale and a shift.
struct Normalisation {
  std::vector<float> scale, shift;

  Normalisation(const std::vector<Tensor> &parts, double eps, int64_t experts, int64_t channels) {
    STD_TORCH_CHECK(parts.size() == 4, "a normalisation has weight, bias, mean and variance");
    Sizes table = {experts, channels};
    const float *weight = floats(parts[0], "weight", table), *bias = floats(parts[1], "bias", table),
                *mean = floats(parts[2], "mean", table), *variance = floats(parts[3], "variance", table);
    scale.resize(experts * channels), shift.resize(scale.size());
    for (size_t i = 0; i < scale.size(); i++) {
      scale[i] = weight[i] / std::sqrt(variance[i] + float(eps));
      shift[i] = bias[i] - mean[i] * scale[i];
    }
  }
};

Tensor expert_block(const Tensor &pixels, const Tensor &expert, int64_t patch_size, const Tensor &weight1,
                    const Maybe &base1, const std::vector<Tensor> &norm1, double eps1, bool neighbours1,
                    const Tensor &weight2, const Maybe &base2, const std::vector<Tensor> &norm2, double eps2,
                    bool neighbours2, const Maybe &gate, const Maybe &residual) {
  Weight first(weight1, base1), second(weight2, base2);
  Grid grid = grid_of(pixels, patch_size);
  STD_TORCH_CHECK(first.experts == second.experts, "both weights must be of as many experts");
  Normalisation affine1(norm1, eps1, first.experts, first.out), affine2(norm2, eps2, second.experts, second.out);
  Sorted sorted(experts_of(expert, grid, first.experts), patches_of(grid), first.experts);
  Tensor hidden = convolve(pixels, grid, sorted, first, neighbours1,
                           {affine1.scale.data(), affine1.shift.data(), true, nullptr, nullptr}, {});
  const float *factor = floats(gate, "gate", {patches_of(grid)});
  return convolve(hidden, grid, sorted, second, neighbours2,
                  {affine2.scale.data(), affine2.shift.data(), false, factor, nullptr}, residual);
}

// With neighbours a patch's gradients reach beyond it, so that no two threads may add to the same channels of an image. A
// cell's sum is by expert and then by patch, however images and channels are shared out.
void run_back(const Convolution &job, const Sorted &sorted) {
  const Grid &grid = job.grid;
  int64_t experts = sorted.begin.size() - 1, panels = kernels->panels(job.out_channels);
  // Each thread packs the kernels that its images need. With many channels it takes all images and a share of the channels
  // instead, so that each kernel is packed once.
  int64_t threads = torch::stable::get_num_threads(), images = job.out_channels >= 128 * threads ? 1 : grid.batch;
  int64_t blocks = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, images));
  int64_t groups = std::clamp<int64_t>((threads + blocks - 1) / blocks, 1, panels);
  int64_t per_image = int64_t(grid.rows) * grid.columns;
  in_parallel(blocks * groups, [&](int64_t task) {
    int64_t block = task / groups, group = task % groups;
    int64_t image = grid.batch * block / blocks, image_end = grid.batch * (block + 1) / blocks;
    for (int64_t e = 0; e < experts; e++) {
      auto start = sorted.order.begin(), end = start + sorted.begin[e + 1];
      auto first = std::lower_bound(start + sorted.begin[e], end, int32_t(image * per_image));
      auto last = std::lower_bound(first, end, int32_t(image_end * per_image));
      if (first != last)
        kernels->convolve(job, int(e), first - start, last - start, int(panels * group / groups),
                          int(panels * (group + 1) / groups), false);
    }
  });
}

Tensor patch_conv2d_input_grad(const Tensor &grad, const Tensor &weight, const Maybe &base, const Tensor &expert,
                               int64_t patch_size, bool neighbours) {
  Weight w(weight, base);
  Grid grid = grid_of(grad, patch_size);
  Tensor out = zeros(grad, map_of(grid, w.in));
  Sorted sorted(experts_of(expert, grid, w.experts), patches_of(grid), w.experts);
  Convolution job = convolution(grad, grid, Direction::input_grad, neighbours && w.kernel > 1, w);
  job.out = floats_of(out), job.order = sorted.order.data(), job.begin = sorted.begin.data();
  run_back(job, sorted);
  return job.bfloat16 ? torch::stable::to(out, ScalarType::BFloat16) : out;
}

// [E, D, K, K, C]
Tensor patch_conv2d_weight_grad(const Tensor &grad, const Tensor &pixels, const Tensor &expert, int64_t patch_size,
                                bool neighbours, int64_t num_experts, int64_t kernel) {
  Grid grid = grid_of(pixels, patch_size);
  STD_TORCH_CHECK(grad.dim() == 4 && (kernel == 1 || kernel == 3), "grad must be a map, and the kernel 1x1 or 3x3");
  STD_TORCH_CHECK(is_bfloat16(grad) == is_bfloat16(pixels), "grad and x must have one type");
  Sorted sorted(experts_of(expert, grid, num_experts), patches_of(grid), num_experts);
  int64_t outs = grad.size(3), ins = pixels.size(3), row = kernel * kernel * ins;
  Tensor out = empty(grad, {num_experts, outs, kernel, kernel, ins});
  float *to = floats_of(out);
  WeightGrad job = {grid, neighbours, is_bfloat16(pixels), int(kernel), int(ins), int(outs), numbers(pixels, "x"),
                    numbers(grad, "grad", map_of(grid, outs), pixels), sorted.order.data()};

  // Large kernels are cut by output channels, the patches of small ones into pieces whose sums are added in order.
  constexpr int64_t wanted = 16, large = 1 << 17, at_once = 96;
  struct Piece {
    int64_t expert, first, last, out, out_end, slot;
  };
  std::vector<Piece> pieces;
  int64_t total = std::max<int64_t>(1, sorted.begin.back()), slots = 0;
  for (int64_t e = 0; e < num_experts; e++) {
    int64_t first = sorted.begin[e], load = sorted.begin[e + 1] - first;
    if (!load) {
      std::fill_n(to + e * outs * row, outs * row, 0.0f);
      continue;
    }
    if (outs * row > large) {
      for (int64_t o = 0; o < outs; o += at_once)
        pieces.push_back({e, first, first + load, o, std::min(outs, o + at_once), -1});
      continue;
    }
    int64_t count = std::clamp<int64_t>((load * wanted + total / 2) / total, 1, load);
    for (int64_t i = 0; i < count; i++)
      pieces.push_back({e, first + load * i / count, first + load * (i + 1) / count, 0, outs, i ? slots++ : -1});
  }
  Tensor extra = empty(grad, {slots, outs * row});
  float *beside = floats_of(extra);
  in_parallel(pieces.size(), [&](int64_t i) {
    const Piece &p = pieces[i];
    float *own = p.slot < 0 ? to + (p.expert * outs + p.out) * row : beside + p.slot * outs * row;
    kernels->weight_grad(job, p.first, p.last, int(p.out), int(p.out_end), own);
  });
  in_parallel(outs, [&](int64_t o) {
    for (const Piece &p : pieces)
      if (p.slot >= 0)
        for (int64_t i = o * row; i < (o + 1) * row; i++) to[p.expert * outs * row + i] += beside[p.slot * outs * row + i];
  });
  return out;
}

// ---- Maps -----------------------------------------------------------------------------------------------------------

// Lines of patches in blocks: block(number, line, line_end).
template <class Block>
void in_blocks(int64_t lines, const Block &block) {
  int64_t blocks = std::min(BLOCKS, lines);
  in_parallel(blocks, [&](int64_t b) { block(b, lines * b / blocks, lines * (b + 1) / blocks); });
}

// What blocks of lines add up, [E, 2, C] or whatever has so many numbers, added in order: block(sums, line, line_end).
template <class Block>
std::vector<double> sums_of(int64_t lines, int64_t size, const Block &block) {
  int64_t blocks = std::min(BLOCKS, lines);
  std::vector<float> sums(blocks * size);
  in_blocks(lines, [&](int64_t b, int64_t line, int64_t end) { block(sums.data() + b * size, line, end); });
  std::vector<double> total(size);
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t i = 0; i < size; i++) total[i] += sums[b * size + i];
  return total;
}

// Numbers [first, ...) of a total as a tensor.
Tensor part_of(const std::vector<double> &total, int64_t first, const Tensor &like, Sizes sizes) {
  Tensor out = empty(like, sizes);
  std::copy_n(total.begin() + first, out.numel(), floats_of(out));
  return out;
}

// An affine map of x; without any table nobody says how many experts there are.
// `other` has the type of what is made of x, or of its gradient.
Affine affine_of(const Tensor &pixels, const Tensor &other, const Tensor &expert, int64_t patch_size, int64_t experts,
                 const Maybe &scale, const Maybe &shift, bool gelu, const Maybe &gate, const Maybe &residual) {
  Grid grid = grid_of(pixels, patch_size);
  int64_t channels = pixels.size(3);
  Sizes table = {experts, channels};
  return {grid, int(channels), experts, is_bfloat16(pixels), is_bfloat16(other), numbers(pixels, "x"),
          experts_of(expert, grid, experts),
          {floats(scale, "scale", table), floats(shift, "shift", table), gelu,
           floats(gate, "gate", {patches_of(grid)}),
           numbers(residual, "residual", map_of(grid, channels), pixels)}};
}

int64_t experts_in(const Maybe &scale, const Maybe &shift) {
  return scale ? scale->size(0) : shift ? shift->size(0) : INT32_MAX;
}

Tensor patch_affine(const Tensor &pixels, const Tensor &expert, int64_t patch_size, const Maybe &scale,
                    const Maybe &shift, bool gelu, const Maybe &gate, const Maybe &residual) {
  const Tensor &like = residual ? *residual : pixels;
  Affine job = affine_of(pixels, like, expert, patch_size, experts_in(scale, shift), scale, shift, gelu, gate, residual);
  Tensor out = empty(pixels, map_of(job.grid, job.channels), like.scalar_type());
  void *to = out.mutable_data_ptr();
  in_blocks(lines_of(job.grid), [&](int64_t, int64_t line, int64_t end) { kernels->affine(job, line, end, to); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> expert_moments(const Tensor &pixels, const Tensor &expert, int64_t patch_size,
                                                  int64_t num_experts) {
  Affine job = affine_of(pixels, pixels, expert, patch_size, num_experts, {}, {}, false, {}, {});
  const Grid &grid = job.grid;
  int64_t channels = job.channels;
  // Sums are of differences from the mean of some pixels, the first of each of an expert's first patches: those of the
  // values themselves would cancel, and so would those from one pixel that lies far from all others.
  constexpr int64_t sampled = 8;
  std::vector<float> centre(num_experts * channels);
  std::vector<int64_t> count(num_experts), seen(num_experts);
  for (int64_t patch = 0; patch < patches_of(grid); patch++) {
    int64_t e = job.expert[patch], line = patch / grid.columns;
    if (e < 0) continue;
    int64_t top = line % grid.rows * grid.side, left = patch % grid.columns * grid.side;
    if (seen[e] < sampled) {
      int64_t pixel = (line / grid.rows * grid.height + top) * grid.width + left;
      float share = 1.0f / float(++seen[e]);
      for (int64_t c = 0; c < channels; c++) {
        float &mean = centre[e * channels + c];
        mean += share * (number_of(job.x, job.bfloat16, pixel * channels + c) - mean);
      }
    }
    count[e] += std::min<int64_t>(grid.side, grid.height - top) * std::min<int64_t>(grid.side, grid.width - left);
  }
  auto sums = sums_of(lines_of(grid), num_experts * 2 * channels, [&](float *own, int64_t line, int64_t end) {
    kernels->moments(job, centre.data(), line, end, own);
  });
  Tensor counts = empty(pixels, {num_experts}), mean = zeros(pixels, {num_experts, channels}),
         variance = zeros(pixels, {num_experts, channels});
  for (int64_t e = 0; e < num_experts; e++) {
    floats_of(counts)[e] = float(count[e]);
    for (int64_t i = e * channels; count[e] && i < (e + 1) * channels; i++) {
      double middle = sums[i] / count[e], square = sums[num_experts * channels + i] / count[e];
      floats_of(mean)[i] = float(centre[i] + middle);
      floats_of(variance)[i] = float(std::max(0.0, square - middle * middle));
    }
  }
  return {counts, mean, variance};
}

// Of g, the gradient before the affine map, the sums of g and of g * (x - centre) [E, C]; and the gate's gradient [N].
std::tuple<Tensor, Tensor, Tensor> patch_affine_sums(const Tensor &grad, const Tensor &pixels, const Tensor &expert,
                                                     int64_t patch_size, int64_t num_experts, const Maybe &scale,
                                                     const Maybe &shift, bool gelu, const Maybe &gate,
                                                     const Maybe &centre) {
  Affine job = affine_of(pixels, grad, expert, patch_size, num_experts, scale, shift, gelu, gate, {});
  Sizes table = {num_experts, job.channels};
  const void *g = numbers(grad, "grad", map_of(job.grid, job.channels), pixels);
  const float *middle = floats(centre, "centre", table);
  Tensor grad_gate = zeros(pixels, {patches_of(job.grid)});
  float *of_gate = floats_of(grad_gate);
  auto sums = sums_of(lines_of(job.grid), 2 * num_experts * job.channels, [&](float *own, int64_t line, int64_t end) {
    kernels->affine_sums(job, g, middle, line, end, own, of_gate);
  });
  return {part_of(sums, 0, pixels, table), part_of(sums, num_experts * job.channels, pixels, table), grad_gate};
}

Tensor patch_affine_input_grad(const Tensor &grad, const Tensor &pixels, const Tensor &expert, int64_t patch_size,
                               const Maybe &scale, const Maybe &shift, bool gelu, const Maybe &gate, const Maybe &slope,
                               const Maybe &offset) {
  int64_t experts = experts_in(scale ? scale : shift, slope ? slope : offset);
  Affine job = affine_of(pixels, grad, expert, patch_size, experts, scale, shift, gelu, gate, {});
  Sizes table = {experts, job.channels}, map = map_of(job.grid, job.channels);
  const void *g = numbers(grad, "grad", map, pixels);
  const float *of_x = floats(slope, "slope", table), *rest = floats(offset, "offset", table);
  Tensor out = empty(pixels, map, pixels.scalar_type());
  void *to = out.mutable_data_ptr();
  in_blocks(lines_of(job.grid), [&](int64_t, int64_t line, int64_t end) {
    kernels->affine_grad(job, g, of_x, rest, line, end, to);
  });
  return out;
}

// ---- The router -----------------------------------------------------------------------------------------------------

// out = bias + weight in: rows of `ins` numbers times weight [outs, weight_stride].
void linear(const float *in, int64_t count, const float *weight, int64_t weight_stride, int64_t ins, int64_t outs,
            const float *bias, float *out) {
  Linear job = {count, int(ins), int(outs), in, weight, weight_stride, bias};
  kernels->linear(job, out);
}

// The router's first layer. What rows and columns add before the activation comes from features [H, F] and [W, F] by the
// last F columns of weight [D, C + F].
struct FirstLayer {
  std::vector<float> rows, columns;
  Perceptron job;

  FirstLayer(const Tensor &pixels, const Tensor &weight, const Tensor &bias, const Tensor &of_rows,
             const Tensor &of_columns, int64_t patch_size) {
    Grid grid = grid_of(pixels, patch_size);
    int64_t channels = pixels.size(3), outs = weight.size(0), width = weight.size(1), features = width - channels;
    STD_TORCH_CHECK(features >= 0, "weight has fewer inputs than x has channels, ", channels);
    const float *w = floats(weight, "weight");
    rows.resize(grid.height * outs), columns.resize(grid.width * outs);
    linear(floats(of_rows, "rows", {grid.height, features}), grid.height, w + channels, width, features, outs,
           floats(bias, "bias", {outs}), rows.data());
    linear(floats(of_columns, "columns", {grid.width, features}), grid.width, w + channels, width, features, outs,
           nullptr, columns.data());
    job = {grid, int(channels), int(outs), floats(pixels, "x"), w, width, rows.data(), columns.data()};
  }
};

Tensor patch_perceptron(const Tensor &pixels, const Tensor &weight, const Tensor &bias, const Tensor &rows,
                        const Tensor &columns, int64_t patch_size) {
  FirstLayer layer(pixels, weight, bias, rows, columns, patch_size);
  const Perceptron &job = layer.job;
  Tensor out = empty(pixels, {patches_of(job.grid), job.hidden});
  float *to = floats_of(out);
  in_blocks(lines_of(job.grid), [&](int64_t, int64_t line, int64_t end) {
    kernels->perceptron(job, line, end, to);
  });
  return out;
}

// From an image's logits [patches, E] `centring` times their mean is taken, and an expert's bias [E] is added.
void centre(float *logits, int64_t patches, int64_t experts, const float *bias, float centring) {
  std::vector<double> level(experts);
  for (int64_t i = 0; i < patches; i++)
    for (int64_t e = 0; e < experts; e++) level[e] += logits[i * experts + e];
  std::vector<float> added(experts);
  for (int64_t e = 0; e < experts; e++) added[e] = bias[e] - centring * float(level[e] / patches);
  for (int64_t i = 0; i < patches; i++)
    for (int64_t e = 0; e < experts; e++) logits[i * experts + e] += added[e];
}

// What a router computes at evaluation: a second layer [E, D] on these means, which is centred where there is a bias.
Tensor patch_logits(const Tensor &pixels, const Tensor &weight, const Tensor &bias, const Tensor &rows,
                    const Tensor &columns, int64_t patch_size, const Tensor &weight2, const Tensor &bias2,
                    const Maybe &expert_bias, const Maybe &centring) {
  Tensor hidden = patch_perceptron(pixels, weight, bias, rows, columns, patch_size);
  int64_t patches = hidden.size(0), outs = hidden.size(1), experts = bias2.numel(), images = pixels.size(0);
  const float *shift = floats(expert_bias, "expert_bias", {experts}), *share = floats(centring, "centring", {});
  STD_TORCH_CHECK(!shift == !share, "expert_bias must have its centring");
  Tensor out = empty(pixels, {patches, experts});
  const float *from = floats_of(hidden), *w = floats(weight2, "weight2", {experts, outs}),
              *b = floats(bias2, "bias2", {experts});
  float *to = floats_of(out);
  int64_t own = images ? patches / images : 0;  // an image's patches
  in_parallel(images, [&](int64_t image) {
    float *logits = to + image * own * experts;
    linear(from + image * own * outs, own, w, outs, outs, experts, b, logits);
    if (shift) centre(logits, own, experts, shift, *share);
  });
  return out;
}

// Gradients for x, for weight's part [D, C] for the content, and for what rows [H, D] and columns [W, D] add.
std::tuple<Tensor, Tensor, Tensor, Tensor> patch_perceptron_backward(const Tensor &grad, const Tensor &pixels,
                                                                     const Tensor &weight, const Tensor &bias,
                                                                     const Tensor &rows, const Tensor &columns,
                                                                     int64_t patch_size, bool needs_x) {
  FirstLayer layer(pixels, weight, bias, rows, columns, patch_size);
  const Perceptron &job = layer.job;
  const Grid &grid = job.grid;
  const float *g = floats(grad, "grad", {patches_of(grid), job.hidden});
  int64_t hidden = job.hidden, of_rows = hidden * job.channels, of_columns = of_rows + grid.height * hidden;
  Tensor grad_x = empty(pixels, needs_x ? map_of(grid, job.channels) : Sizes{0});
  float *for_x = needs_x ? floats_of(grad_x) : nullptr;
  auto sums = sums_of(lines_of(grid), of_columns + grid.width * hidden, [&](float *own, int64_t line, int64_t end) {
    kernels->perceptron_grad(job, g, line, end, for_x, own, own + of_rows, own + of_columns);
  });
  return {grad_x, part_of(sums, 0, pixels, {hidden, job.channels}), part_of(sums, of_rows, pixels, {grid.height, hidden}),
          part_of(sums, of_columns, pixels, {grid.width, hidden})};
}

// See pcenet.nn.balancing, whose loop this is. Each expert's scores lie side by side, and so do its leads.
Tensor balancing_bias(const Tensor &logits, int64_t top_k, int64_t sweeps, double damping) {
  int64_t patches = logits.size(0), experts = logits.size(1), share = (patches * top_k + experts - 1) / experts;
  STD_TORCH_CHECK(top_k >= 1 && top_k < experts && share < patches, "too few patches or experts");
  Tensor out = zeros(logits, {experts});
  float *bias = floats_of(out);
  const float *from = floats(logits, "logits");
  std::vector<double> mean(experts);
  for (int64_t i = 0; i < patches; i++)
    for (int64_t e = 0; e < experts; e++) mean[e] += from[i * experts + e];
  for (int64_t e = 0; e < experts; e++) bias[e] = float(-mean[e] / patches);
  std::vector<float> scores(patches * experts), borders(experts);
  std::vector<int32_t> leads(patches * experts);
  in_parallel(experts, [&](int64_t e) {
    for (int64_t i = 0; i < patches; i++) scores[e * patches + i] = from[i * experts + e];
  });
  Preferences job{patches, experts, top_k, scores.data(), bias};
  for (int64_t sweep = 0; sweep < sweeps; sweep++) {
    torch::stable::parallel_for(0, patches, 1024, [&](int64_t first, int64_t end) {
      kernels->leads(job, first, end, leads.data());
    });
    in_parallel(experts, [&](int64_t e) { borders[e] = kernels->border(leads.data() + e * patches, patches, share); });
    double level = 0;
    for (int64_t e = 0; e < experts; e++) bias[e] -= float(damping) * borders[e], level += bias[e];
    for (int64_t e = 0; e < experts; e++) bias[e] -= float(level / experts);
  }
  return out;
}

}  // namespace

// Declared in schemas.py.
STABLE_TORCH_LIBRARY_IMPL(pcenet, CPU, m) {
  m.impl("patch_conv2d", TORCH_BOX(&patch_conv2d));
  m.impl("patch_conv2d_input_grad", TORCH_BOX(&patch_conv2d_input_grad));
  m.impl("patch_conv2d_weight_grad", TORCH_BOX(&patch_conv2d_weight_grad));
  m.impl("patch_affine", TORCH_BOX(&patch_affine));
  m.impl("expert_moments", TORCH_BOX(&expert_moments));
  m.impl("patch_affine_sums", TORCH_BOX(&patch_affine_sums));
  m.impl("patch_affine_input_grad", TORCH_BOX(&patch_affine_input_grad));
  m.impl("balancing_bias", TORCH_BOX(&balancing_bias));
  m.impl("expert_block", TORCH_BOX(&expert_block));
  m.impl("patch_perceptron", TORCH_BOX(&patch_perceptron));
  m.impl("patch_logits", TORCH_BOX(&patch_logits));
  m.impl("patch_perceptron_backward", TORCH_BOX(&patch_perceptron_backward));
}

}  // namespace pcenet

extern "C" {

// The compiled instruction sets by number, the best first; null behind the last.
__attribute__((visibility("default"))) const char *pcenet_set(int number) {
  constexpr int count = sizeof(pcenet::SETS) / sizeof(pcenet::SETS[0]);
  return number >= 0 && number < count ? pcenet::SETS[number].kernels->name : nullptr;
}

__attribute__((visibility("default"))) int pcenet_runs(int number) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return pcenet::SETS[number].runs() ? 1 : 0;
}

__attribute__((visibility("default"))) void pcenet_choose(int number) {
  pcenet::kernels = pcenet::SETS[number].kernels;
}
}
