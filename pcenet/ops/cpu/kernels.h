// What the units of this library share: plain structures and one table of functions per instruction set. Nothing here is
// inline code or a template: such code of a unit compiled for AVX-512 might be linked into one that runs without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pcenet {

// A map of pixels [batch, height, width, channels], and the patches that cover it: rows x columns of them per image.
struct Grid {
  int64_t batch, height, width;
  int side, rows, columns;
};

// What follows a convolution, in registers: residual + gate * act(scale * y + shift). A null pointer leaves its part out.
struct Epilogue {
  const float *scale, *shift;  // [E, D]
  bool gelu;
  const float *gate;      // [N]
  const void *residual;   // as the map that is written
};

enum class Direction { forward, input_grad };

// Where a kernel's number (out, in, tap) lies: data[out * out_stride + in * in_stride + tap * tap_stride].
struct Layout {
  const float *data;
  int64_t out_stride, in_stride, tap_stride;
};

// A convolution of `in`, with `in_channels`, into `out`, with `out_channels`. An expert's kernel is its own, expert_stride
// after the one before, and the base, which may be null.
struct Convolution {
  Grid grid;
  Direction direction;
  bool neighbours, bfloat16, out_bfloat16;
  int kernel, in_channels, out_channels;
  const void *in;
  Layout weight, base;
  int64_t expert_stride;
  void *out;  // of an input gradient always float32
  Epilogue epilogue;
  const int32_t *order;  // patches, sorted by expert
  const int64_t *begin;  // [E + 1], where each expert's begin
};

// Gradient for the weights of one expert: grad_weight[out][tap][in], contiguous.
struct WeightGrad {
  Grid grid;
  bool neighbours, bfloat16;
  int kernel, in_channels, out_channels;
  const void *in, *grad;
  const int32_t *order;
};

// Normalisation, activation, gate and shortcut of a map: residual + gate * act(scale[e] * x + shift[e]).
struct Affine {
  Grid grid;
  int channels;
  int64_t experts;
  bool bfloat16, other_bfloat16;  // x, and what belongs to it: what is made and added, or its gradient
  const void *x;
  const int64_t *expert;  // [N], -1 for nobody's
  Epilogue epilogue;
};

// The router's first layer: mean over a patch of gelu(weight x + rows + columns). Rows of weight are weight_stride apart.
struct Perceptron {
  Grid grid;
  int channels, hidden;
  const float *x, *weight;
  int64_t weight_stride;
  const float *rows, *columns;  // [height, hidden], [width, hidden]
};

// out[i] = bias + weight in[i], for `count` rows of `ins` numbers; bias may be null.
struct Linear {
  int64_t count;
  int ins, outs;
  const float *in, *weight;
  int64_t weight_stride;
  const float *bias;
};

// Scores [E, patches] of patches for experts; bias [E] is added to them.
struct Preferences {
  int64_t patches, experts, top_k;
  const float *scores, *bias;
};

// A thread's memory, the same as long as no more is asked for: taking it from the system anew would cost page faults in
// every call.
float *scratch(size_t floats);

struct Kernels {
  const char *name;
  bool bfloat16;  // whether they take maps of that type
  // For the patches order[first..last) of one expert the panels [panel, panel_end) of output channels: written, or for an
  // input gradient, which with neighbours reaches beyond a patch, added.
  // `packed` says that this thread's last task was of this expert and these panels.
  void (*convolve)(const Convolution &, int expert, int64_t first, int64_t last, int panel, int panel_end, bool packed);
  int (*panels)(int channels);
  // Output channels [out, out_end) of the patches order[first..last), at least one, into grad_weight [out..., taps, in].
  void (*weight_grad)(const WeightGrad &, int64_t first, int64_t last, int out, int out_end, float *grad_weight);
  // Lines of patches [line, line_end) of a map, numbered through all images.
  void (*affine)(const Affine &, int64_t line, int64_t line_end, void *out);
  // Sums of x - centre and of its square, [2, E, C], added.
  void (*moments)(const Affine &, const float *centre, int64_t line, int64_t line_end, float *sums);
  // Of g = gate * act' * grad the sums of g and of g * (x - centre), [2, E, C], added, and the gate's gradient.
  void (*affine_sums)(const Affine &, const void *grad, const float *centre, int64_t line, int64_t line_end,
                      float *sums, float *grad_gate);
  // scale * g + slope * x + offset.
  void (*affine_grad)(const Affine &, const void *grad, const float *slope, const float *offset, int64_t line,
                      int64_t line_end, void *out);
  void (*linear)(const Linear &, float *out);
  void (*perceptron)(const Perceptron &, int64_t line, int64_t line_end, float *out);
  // Adds to grad_weight [hidden, channels], grad_rows and grad_columns; grad_x may be null.
  void (*perceptron_grad)(const Perceptron &, const float *grad, int64_t line, int64_t line_end, float *grad_x,
                          float *grad_weight, float *grad_rows, float *grad_columns);
  // By how much an expert's score is above that of its best rival for one of the patch's top_k places, [E, patches], for the
  // patches [first, last): floats' bits as integers that have the same order.
  void (*leads)(const Preferences &, int64_t first, int64_t last, int32_t *out);
  // The mean of the leads of rank share - 1 and share, from 0, the largest first.
  float (*border)(const int32_t *leads, int64_t count, int64_t share);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, avx512_amx_kernels, neon_kernels;

}  // namespace pcenet
