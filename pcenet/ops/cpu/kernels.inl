// The kernels, compiled once per instruction set: a unit defines VECTOR (floats in a register), TILE (pixels of a tile) and
// NAME, and includes this file. Everything has internal linkage but the table at the end.
//
// A convolution runs in tiles of TILE pixels by PANEL output channels, whose sums stay in registers. The pixels of a tile
// have the same taps that read something, so that nothing is multiplied by what lies beyond a patch or the map. The map
// is regular: a tap is an offset that all pixels share, and neither gathers nor windows are needed.

#include <cstring>

#include "kernels.h"

namespace pcenet {
namespace {

typedef float Vector __attribute__((vector_size(4 * VECTOR)));
typedef float Unaligned __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * VECTOR)));

constexpr int WIDTH = 2;  // vectors of a panel
constexpr int PANEL = WIDTH * VECTOR;
constexpr int CHUNK = 512;  // pixels whose tiles are listed at a time
constexpr int MOST_TAPS = 9;
constexpr int SLICE = 128;  // input channels that are packed at a time

inline Vector load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
inline void store(float *p, Vector v) { *reinterpret_cast<Unaligned *>(p) = v; }
inline Vector all(float value) { return value - Vector{}; }  // a broadcast alone: what is less 0 stays as it is
// Written out: as an initialiser it becomes a `rep stos`, which takes a tenth of a tile's time.
template <int ROWS, int COLUMNS>
inline void clear(Vector (&sums)[ROWS][COLUMNS]) {
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = Vector{};
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A vector of the first `count` numbers, zeros behind.
inline Vector load_some(const float *p, int count) {
  if (count >= VECTOR) return load(p);
  if (count <= 0) return Vector{};
  float buffer[VECTOR] = {};
  for (int i = 0; i < count; i++) buffer[i] = p[i];
  return load(buffer);
}

inline void store_some(float *p, Vector v, int count) {
  if (count >= VECTOR) return store(p, v);
  if (count <= 0) return;
  float buffer[VECTOR];
  store(buffer, v);
  for (int i = 0; i < count; i++) p[i] = buffer[i];
}

// exp(-x) for x >= 0: by 2**n times a polynomial of what is left, as in the Cephes library's expf.
inline Vector exp_of_minus(Vector x) {
  x = x > 80.0f ? all(80.0f) : x;  // what is less would become denormal, and slow
  Integers n = __builtin_convertvector(x * 1.44269504f + 0.5f, Integers);
  Vector whole = __builtin_convertvector(n, Vector);
  Vector r = whole * 0.693359375f - x;
  r = r - whole * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Integers scale = (127 - n) << 23;
  Vector power;
  std::memcpy(&power, &scale, sizeof power);
  return p * power;
}

// For the normal distribution: its density without the factor, and the chance of less than -|x|, to 1e-7 (Abramowitz and
// Stegun, 7.1.26).
struct Normal {
  Vector density, tail;
};

inline Vector absolute(Vector x) { return x < 0.0f ? -x : x; }

inline Normal normal(Vector x) {
  Vector e = exp_of_minus(0.5f * x * x);
  Vector t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * absolute(x));
  Vector p = all(0.5f * 1.061405429f);
  p = p * t - 0.5f * 1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t - 0.5f * 0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  return {e, p * t * e};
}

inline Vector gelu(Vector x) {
  Vector tail = normal(x).tail;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// GELU and its derivative.
struct Gelu {
  Vector value, slope;
};

inline Gelu gelu_and_slope(Vector x) {
  Normal n = normal(x);
  Vector below = x < 0.0f ? n.tail : 1.0f - n.tail;
  return {x * below, below + x * n.density * 0.39894228f};
}

// Not gelu_and_slope(x).slope where it is needed: within a lambda g++ 12 ends with an internal error.
inline Vector slope_of_gelu(Vector x) {
  Gelu both = gelu_and_slope(x);
  return both.slope;
}

// ---- Convolutions ---------------------------------------------------------------------------------------------------

struct Pixel {
  int32_t index, patch, kind;  // place in the map, patch, and which taps read something
};

// The pixels of a chunk, sorted by kind.
struct Chunk {
  Pixel found[CHUNK], sorted[CHUNK];
  int start[65];
  int count;
};

// A patch's place, and how much of it lies on the map.
struct Place {
  int64_t image, top, left;
  int height, width;
};

inline Place place_of(const Grid &grid, int64_t patch) {
  int64_t in_image = patch % (int64_t(grid.rows) * grid.columns);
  Place place;
  place.image = patch / (int64_t(grid.rows) * grid.columns);
  place.top = in_image / grid.columns * grid.side;
  place.left = in_image % grid.columns * grid.side;
  place.height = least(grid.side, grid.height - place.top);
  place.width = least(grid.side, grid.width - place.left);
  return place;
}

// Which of an axis's taps read something, as bits: for the cell at `cell`, those of cell - 1, cell and cell + 1 (or of
// cell alone) that lie in [low, high).
inline int taps_of(int kernel, int64_t cell, int64_t low, int64_t high) {
  auto reads = [=](int64_t at) { return int(at >= low && at < high); };
  return kernel == 1 ? reads(cell) : reads(cell - 1) | reads(cell) << 1 | reads(cell + 1) << 2;
}

// A walk over the cells that patches write: those of the patch, or of the ring around it.
struct Walk {
  const Convolution &job;
  int64_t position, last;
  bool ring;
  int64_t line, column;
  bool started;

  // List the next cells; none where all were.
  void next(Chunk &chunk);

 private:
  bool list_line(const Place &place, int64_t patch, int64_t left, int64_t right, int64_t skip, Chunk &chunk);
};

void sort_by_kind(Chunk &chunk) {
  int counts[65] = {};
  for (int i = 0; i < chunk.count; i++) counts[chunk.found[i].kind + 1]++;
  for (int kind = 0; kind < 64; kind++) counts[kind + 1] += counts[kind];
  std::memcpy(chunk.start, counts, sizeof counts);
  for (int i = 0; i < chunk.count; i++) chunk.sorted[counts[chunk.found[i].kind]++] = chunk.found[i];
}

// The cells of a line, but for those from `column` 0 to `skip`; false where the chunk is full before its end.
bool Walk::list_line(const Place &place, int64_t patch, int64_t left, int64_t right, int64_t skip, Chunk &chunk) {
  const Grid &grid = job.grid;
  bool all_of_map = job.neighbours && job.direction == Direction::forward;
  int rows = all_of_map ? taps_of(job.kernel, place.top + line, 0, grid.height)
                        : taps_of(job.kernel, line, 0, place.height);
  int64_t low = all_of_map ? -place.left : 0, high = all_of_map ? grid.width - place.left : place.width;
  int64_t start = (place.image * grid.height + place.top + line) * grid.width + place.left;
  for (; column < right; column++) {
    if (column >= 0 && column < skip) column = skip;
    if (column >= right) break;
    if (chunk.count == CHUNK) return false;
    int columns = taps_of(job.kernel, column, low, high);
    chunk.found[chunk.count++] = {int32_t(start + column), int32_t(patch), rows << 3 | columns};
  }
  column = left;
  return true;
}

void Walk::next(Chunk &chunk) {
  const Grid &grid = job.grid;
  int64_t around = ring ? job.kernel / 2 : 0;
  bool full = false;
  chunk.count = 0;
  for (; position < last && !full; position += !full, started = full) {
    int64_t patch = job.order[position];
    Place place = place_of(grid, patch);
    int64_t top = -least(around, place.top), left = -least(around, place.left);
    int64_t bottom = least(place.height + around, grid.height - place.top);
    int64_t right = least(place.width + around, grid.width - place.left);
    if (!started) line = top, column = left;
    for (; line < bottom; line++) {
      bool beside = ring && line >= 0 && line < place.height;
      full = !list_line(place, patch, left, right, beside ? place.width : 0, chunk);
      if (full) break;
    }
  }
  sort_by_kind(chunk);
}

// Taps side by side read numbers side by side: together they are one product.
struct Run {
  int tap, count;  // in floats
  int64_t offset;  // in floats of the map that is read
};

struct Taps {
  int count;
  Run run[3];
};

Taps list_taps(const Convolution &job, int kind) {
  Taps taps;
  taps.count = 0;
  int half = job.kernel / 2, columns = kind & 7;
  if (!columns) return taps;
  int first = __builtin_ctz(columns), number = __builtin_popcount(columns);  // those between are set
  for (int row = 0; row < job.kernel; row++)
    if (kind >> 3 >> row & 1)
      taps.run[taps.count++] = {row * job.kernel + first, number * job.in_channels,
                                ((row - half) * job.grid.width + first - half) * job.in_channels};
  return taps;
}

// Whether what an output channel reads of its kernel is one stretch of memory, [tap][in].
bool reads_stretches(const Convolution &job) {
  auto stretches = [&](const Layout &layout) {
    return layout.in_stride == 1 && (job.kernel == 1 || layout.tap_stride == job.in_channels);
  };
  return stretches(job.weight) && (!job.base.data || stretches(job.base));
}

// 8 x 8 numbers transposed: from rows of a stride to rows of another.
typedef float Eight __attribute__((vector_size(32)));
typedef float UnalignedEight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t EightIntegers __attribute__((vector_size(32)));

inline void transpose_eight(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  Eight r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = *reinterpret_cast<const UnalignedEight *>(from + i * from_stride);
  for (int i = 0; i < 4; i++) {
    s[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], EightIntegers{0, 8, 1, 9, 4, 12, 5, 13});
    s[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], EightIntegers{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < 2; i++) {
    Eight *q = s + 4 * i, *t = r + 4 * i;
    t[0] = __builtin_shuffle(q[0], q[2], EightIntegers{0, 1, 8, 9, 4, 5, 12, 13});
    t[1] = __builtin_shuffle(q[0], q[2], EightIntegers{2, 3, 10, 11, 6, 7, 14, 15});
    t[2] = __builtin_shuffle(q[1], q[3], EightIntegers{0, 1, 8, 9, 4, 5, 12, 13});
    t[3] = __builtin_shuffle(q[1], q[3], EightIntegers{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; i++) {
    *reinterpret_cast<UnalignedEight *>(to + i * to_stride) =
        __builtin_shuffle(r[i], r[i + 4], EightIntegers{0, 1, 2, 3, 8, 9, 10, 11});
    *reinterpret_cast<UnalignedEight *>(to + (i + 4) * to_stride) =
        __builtin_shuffle(r[i], r[i + 4], EightIntegers{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// Numbers (o, i) at from[o * out_stride + i * in_stride] as [i][PANEL], for `count` values of o, zeros behind.
void pack_panel(const float *from, int64_t out_stride, int64_t in_stride, int count, int in_channels, float *to) {
  int done = 0;
  if (in_stride == 1 && count == PANEL) {
    done = in_channels / 8 * 8;
    for (int o = 0; o < PANEL; o += 8)
      for (int i = 0; i < done; i += 8)
        transpose_eight(from + o * out_stride + i, out_stride, to + int64_t(i) * PANEL + o, PANEL);
  } else if (out_stride == 1 && count == PANEL) {
    done = in_channels;
    for (int i = 0; i < done; i++)
      for (int v = 0; v < PANEL; v += VECTOR) store(to + int64_t(i) * PANEL + v, load(from + i * in_stride + v));
  }
  for (int i = done; i < in_channels; i++)
    for (int o = 0; o < PANEL; o++)
      to[int64_t(i) * PANEL + o] = o < count ? from[o * out_stride + i * in_stride] : 0;
}

// An expert's kernel as [panel][tap][in][PANEL], taps in the order in which they read: an input gradient's is turned
// round. Taps that lie one behind the other are packed like channels: long stretches of memory are read at a time.
void pack_kernel(const Convolution &job, int expert, int panel, int panel_end, float *packed) {
  int taps = job.kernel * job.kernel;
  bool forward = job.direction == Direction::forward, joined = forward && reads_stretches(job);
  int length = joined ? taps * job.in_channels : job.in_channels;
  float base[SLICE * PANEL];
  for (int p = panel; p < panel_end; p++)
    for (int tap = 0; tap < (joined ? 1 : taps); tap++, packed += int64_t(length) * PANEL) {
      int own = forward ? tap : taps - 1 - tap, count = least(PANEL, job.out_channels - p * PANEL);
      auto pack = [&](const Layout &layout, int64_t start, int first, int end, float *to) {
        const float *from = layout.data + start + p * PANEL * layout.out_stride + own * layout.tap_stride;
        pack_panel(from + first * layout.in_stride, layout.out_stride, layout.in_stride, count, end - first, to);
      };
      for (int i = 0; i < length; i += SLICE) {
        int end = least(length, i + SLICE);
        float *to = packed + int64_t(i) * PANEL;
        pack(job.weight, expert * job.expert_stride, i, end, to);
        if (!job.base.data) continue;
        pack(job.base, 0, i, end, base);
        for (int64_t k = 0; k < int64_t(end - i) * PANEL; k += VECTOR) store(to + k, load(to + k) + load(base + k));
      }
    }
}

// Sums of ROWS rows by a panel: sum over i of row[r][i] * packed[i].
template <int ROWS>
inline void multiply(const float *const *row, int64_t offset, const float *packed, int count, Vector (*sums)[WIDTH]) {
  const float *own[ROWS];
  for (int r = 0; r < ROWS; r++) own[r] = row[r] + offset;
  for (int i = 0; i < count; i++, packed += PANEL) {
    Vector weights[WIDTH];
    for (int v = 0; v < WIDTH; v++) weights[v] = load(packed + v * VECTOR);
    for (int r = 0; r < ROWS; r++) {
      Vector value = all(own[r][i]);
      for (int v = 0; v < WIDTH; v++) sums[r][v] += value * weights[v];
    }
  }
}

// What all tiles of a kind and panel have in common.
struct Tiles {
  const Convolution &job;
  bool adds;
  Taps taps;
  const float *packed;
  int expert, channel, count;
};

// What follows the products, for a whole tile at a time: one number's GELU is a long chain, those of many overlap.
template <int ROWS>
inline void follow(const Tiles &tiles, const Pixel *pixels, Vector (&sums)[ROWS][WIDTH]) {
  const Epilogue &after = tiles.job.epilogue;
  int64_t of_expert = int64_t(tiles.expert) * tiles.job.out_channels + tiles.channel;
  auto by_channel = [&](const float *table, const auto &apply) {
    for (int v = 0; v < WIDTH; v++) {
      Vector own = load_some(table + of_expert + v * VECTOR, tiles.count - v * VECTOR);
      for (int r = 0; r < ROWS; r++) apply(sums[r][v], own);
    }
  };
  if (after.scale) by_channel(after.scale, [](Vector &y, Vector own) { y *= own; });
  if (after.shift) by_channel(after.shift, [](Vector &y, Vector own) { y += own; });
  if (after.gelu)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH; v++) sums[r][v] = gelu(sums[r][v]);
  if (after.gate)
    for (int r = 0; r < ROWS; r++) {
      Vector own = all(after.gate[pixels[r].patch]);
      for (int v = 0; v < WIDTH; v++) sums[r][v] *= own;
    }
}

template <int ROWS, bool WHOLE>
inline void write(const Tiles &tiles, const Pixel *pixels, const Vector (&sums)[ROWS][WIDTH]) {
  const Convolution &job = tiles.job;
  for (int r = 0; r < ROWS; r++) {
    int64_t place = int64_t(pixels[r].index) * job.out_channels + tiles.channel;
    float *to = job.out + place;
    const float *added = tiles.adds ? to : job.epilogue.residual ? job.epilogue.residual + place : nullptr;
    for (int v = 0; v < WIDTH; v++) {
      int at = v * VECTOR, own = WHOLE ? VECTOR : tiles.count - at;
      Vector y = sums[r][v];
      if (added) y += load_some(added + at, own);
      store_some(to + at, y, own);
    }
  }
}

template <int ROWS>
void convolve_tile(const Tiles &tiles, const Pixel *pixels) {
  const Convolution &job = tiles.job;
  const float *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = job.in + int64_t(pixels[r].index) * job.in_channels;
  Vector sums[ROWS][WIDTH];
  clear(sums);
  for (int t = 0; t < tiles.taps.count; t++) {
    const Run &run = tiles.taps.run[t];
    multiply<ROWS>(row, run.offset, tiles.packed + int64_t(run.tap) * job.in_channels * PANEL, run.count, sums);
  }
  follow<ROWS>(tiles, pixels, sums);
  if (tiles.count == PANEL) write<ROWS, true>(tiles, pixels, sums);
  else write<ROWS, false>(tiles, pixels, sums);
}

// The tile of what is left of a kind's pixels, fewer than TILE.
template <int ROWS>
void convolve_rest(const Tiles &tiles, const Pixel *pixels, int left) {
  if constexpr (ROWS > 0) {
    if (left == ROWS) return convolve_tile<ROWS>(tiles, pixels);
    convolve_rest<ROWS - 1>(tiles, pixels, left);
  }
}

// Patches lie anywhere, so that the processor cannot foresee what is read next: while a chunk is computed the pixels of
// the next one are fetched, some with each tile.
struct Ahead {
  const Convolution &job;
  const Chunk &next;
  int64_t per_tile, line;  // cache lines
  int pixel;

  Ahead(const Convolution &job, const Chunk &next, int64_t tiles) : job(job), next(next), line(0), pixel(0) {
    per_tile = int64_t(next.count) * lines_of_pixel() / most(1, tiles) + 1;
  }
  int64_t lines_of_pixel() const { return (job.in_channels + 15) / 16; }
  void fetch() {
    int64_t of_pixel = lines_of_pixel();
    for (int64_t i = 0; i < per_tile && pixel < next.count; i++) {
      __builtin_prefetch(job.in + int64_t(next.sorted[pixel].index) * job.in_channels + line * 16);
      if (++line == of_pixel) line = 0, pixel++;
    }
  }
};

void convolve_chunk(const Convolution &job, bool adds, const Chunk &chunk, const Chunk &next, int expert, int panel,
                    int panel_end, const float *kernel) {
  int64_t size = int64_t(job.kernel) * job.kernel * job.in_channels * PANEL;
  Ahead ahead(job, next, int64_t(chunk.count / TILE) * (panel_end - panel));
  for (int kind = 0; kind < 64; kind++) {
    int start = chunk.start[kind], end = chunk.start[kind + 1];
    if (start == end) continue;
    Taps taps = list_taps(job, kind);
    for (int p = panel; p < panel_end; p++) {
      int channel = p * PANEL, count = least(PANEL, job.out_channels - channel), i = start;
      Tiles tiles = {job, adds, taps, kernel + (p - panel) * size, expert, channel, count};
      for (; i + TILE <= end; i += TILE) {
        ahead.fetch();
        convolve_tile<TILE>(tiles, chunk.sorted + i);
      }
      convolve_rest<TILE - 1>(tiles, chunk.sorted + i, end - i);
    }
  }
}

// For few pixels packing a kernel takes longer than using it: each of its numbers is read once, where it lies, for all of
// them. What a pixel reads is copied side by side, and an output is one product of two stretches.
constexpr int FEW = 48, FEW_ROWS = 3, FEW_CHANNELS = 4;

struct Few {
  int64_t length;                // of a stretch
  float *windows, *rows, *found;  // [FEW, length], [FEW_CHANNELS, length], [FEW, PANEL]
};

int64_t few_scratch(const Convolution &job) {
  return int64_t(FEW + FEW_CHANNELS) * job.kernel * job.kernel * job.in_channels + FEW * PANEL;
}

void copy_windows(const Convolution &job, const Chunk &chunk, const Few &few) {
  int half = job.kernel / 2, channels = job.in_channels;
  for (int n = 0; n < chunk.count; n++) {
    const Pixel &pixel = chunk.sorted[n];
    float *to = few.windows + n * few.length;
    for (int row = 0; row < job.kernel; row++)
      for (int column = 0; column < job.kernel; column++, to += channels) {
        int64_t read = pixel.index + (row - half) * job.grid.width + column - half;
        if (pixel.kind >> 3 >> row & pixel.kind >> column & 1)
          std::memcpy(to, job.in + read * channels, channels * sizeof(float));
        else
          std::memset(to, 0, channels * sizeof(float));
      }
  }
}

inline float sum_of(Vector v) {
  for (int step = VECTOR / 2; step; step /= 2) {
    Integers across;
    for (int i = 0; i < VECTOR; i++) across[i] = i ^ step;
    v += __builtin_shuffle(v, across);
  }
  return v[0];
}

template <int ROWS, bool WHOLE>
inline void multiply_stretch(const float *x, int64_t length, const float *const *kernel, int64_t i,
                             Vector (&sums)[FEW_CHANNELS][ROWS]) {
  auto read = [=](const float *p) { return WHOLE ? load(p + i) : load_some(p + i, length - i); };
  Vector own[ROWS];
  for (int r = 0; r < ROWS; r++) own[r] = read(x + r * length);
  for (int c = 0; c < FEW_CHANNELS; c++) {
    Vector w = read(kernel[c]);
    for (int r = 0; r < ROWS; r++) sums[c][r] += w * own[r];
  }
}

template <int ROWS>
void multiply_few(const Few &few, const float *const *kernel, int first, int channel, int channels) {
  Vector sums[FEW_CHANNELS][ROWS];
  clear(sums);
  const float *x = few.windows + first * few.length;
  int64_t i = 0;
  for (; i + VECTOR <= few.length; i += VECTOR) multiply_stretch<ROWS, true>(x, few.length, kernel, i, sums);
  if (i < few.length) multiply_stretch<ROWS, false>(x, few.length, kernel, i, sums);
  for (int c = 0; c < channels; c++)
    for (int r = 0; r < ROWS; r++) few.found[(first + r) * PANEL + channel + c] = sum_of(sums[c][r]);
}

// Where the kernels of output channels [out, out + channels) lie, with the base added if there is one; for the last few
// the last one stands in.
void find_rows(const Convolution &job, const Few &few, int expert, int out, int channels, const float **kernel) {
  for (int c = 0; c < FEW_CHANNELS; c++) {
    int64_t own = out + least(c, channels - 1);
    kernel[c] = job.weight.data + expert * job.expert_stride + own * job.weight.out_stride;
    if (!job.base.data) continue;
    const float *base = job.base.data + own * job.base.out_stride;
    float *to = few.rows + c * few.length;
    for (int64_t i = 0; i < few.length; i += VECTOR) {
      int left = few.length - i;
      store_some(to + i, load_some(kernel[c] + i, left) + load_some(base + i, left), left);
    }
    kernel[c] = to;
  }
}

void convolve_few(const Convolution &job, const Chunk &chunk, int expert, int panel, int panel_end, float *scratch) {
  Few few;
  few.length = int64_t(job.kernel) * job.kernel * job.in_channels;
  few.windows = scratch, few.rows = scratch + FEW * few.length, few.found = few.rows + FEW_CHANNELS * few.length;
  copy_windows(job, chunk, few);
  for (int p = panel; p < panel_end; p++) {
    int channel = p * PANEL, count = least(PANEL, job.out_channels - channel);
    for (int d = 0; d < count; d += FEW_CHANNELS) {
      int channels = least(FEW_CHANNELS, count - d), n = 0;
      const float *kernel[FEW_CHANNELS];
      find_rows(job, few, expert, channel + d, channels, kernel);
      for (; n + FEW_ROWS <= chunk.count; n += FEW_ROWS) multiply_few<FEW_ROWS>(few, kernel, n, d, channels);
      for (; n < chunk.count; n++) multiply_few<1>(few, kernel, n, d, channels);
    }
    Tiles tiles = {job, false, {}, nullptr, expert, channel, count};
    for (int n = 0; n < chunk.count; n++) {
      Vector sums[1][WIDTH];
      for (int v = 0; v < WIDTH; v++)
        sums[0][v] = load_some(few.found + n * PANEL + v * VECTOR, count - v * VECTOR);
      follow<1>(tiles, chunk.sorted + n, sums);
      write<1, false>(tiles, chunk.sorted + n, sums);
    }
  }
}

int panels(int channels) { return (channels + PANEL - 1) / PANEL; }

int64_t convolve_scratch(const Convolution &job) {
  int64_t packed = int64_t(panels(job.out_channels)) * job.kernel * job.kernel * job.in_channels * PANEL;
  return most(packed, few_scratch(job)) + 2 * sizeof(Chunk) / sizeof(float) + 16;
}

// Asked of all of an expert's patches, not of a task's: sums are rounded otherwise, and how patches are shared out depends
// on the threads.
bool has_few_pixels(const Convolution &job, int expert) {
  int64_t count = 0;
  for (int64_t position = job.begin[expert]; position < job.begin[expert + 1] && count <= FEW; position++) {
    Place place = place_of(job.grid, job.order[position]);
    count += place.height * place.width;
  }
  return count <= FEW;
}

void convolve(const Convolution &job, int expert, int64_t first, int64_t last, int panel, int panel_end, bool ring,
              bool packed, float *scratch) {
  Chunk *chunk = reinterpret_cast<Chunk *>(scratch), *next = chunk + 1;
  float *kernel = scratch + round_up(2 * sizeof(Chunk) / sizeof(float), 16);
  Walk walk = {job, first, last, ring, 0, 0, false};
  walk.next(*chunk);
  if (job.direction == Direction::forward && reads_stretches(job) && has_few_pixels(job, expert))
    return convolve_few(job, *chunk, expert, panel, panel_end, kernel);
  if (!packed) pack_kernel(job, expert, panel, panel_end, kernel);
  while (chunk->count) {
    walk.next(*next);
    convolve_chunk(job, ring, *chunk, *next, expert, panel, panel_end, kernel);
    Chunk *done = chunk;
    chunk = next, next = done;
  }
}

// ---- Gradient for the weights ---------------------------------------------------------------------------------------

constexpr int PAIRS = 256;  // pixels of a chunk, at most

struct Pair {
  int64_t grad, in;  // offsets in floats
};

// A chunk: the gradients of its pixels, packed, and for each tap which of them meet which pixels of the map.
struct Pairs {
  int64_t stride, room;
  float *lines, *grads;
  Pair *pairs;
  int pixels, counts[MOST_TAPS];
  bool first;  // of its expert: its sums are written, not added
};

// Rows of pixels are an odd number of cache lines, so that equal channels of several pixels do not share a place in it.
int64_t row_stride(int channels) { return ((channels + 15) / 16 | 1) * 16; }

int64_t weight_grad_scratch(const WeightGrad &job) {
  return PAIRS * (PANEL + row_stride(job.out_channels)) + MOST_TAPS * PAIRS * sizeof(Pair) / sizeof(float) + 64;
}

// Add pixel (y, x) of a patch.
void add_pixel(const WeightGrad &job, const Place &place, int64_t y, int64_t x, int out, int out_end, Pairs &chunk) {
  const Grid &grid = job.grid;
  int half = job.kernel / 2;
  int64_t pixel = (place.image * grid.height + place.top + y) * grid.width + place.left + x;
  int rows = job.neighbours ? taps_of(job.kernel, place.top + y, 0, grid.height)
                            : taps_of(job.kernel, y, 0, place.height);
  int columns = job.neighbours ? taps_of(job.kernel, place.left + x, 0, grid.width)
                               : taps_of(job.kernel, x, 0, place.width);
  int64_t own = chunk.pixels++ * chunk.stride;
  std::memcpy(chunk.grads + own, job.grad + pixel * job.out_channels + out, (out_end - out) * sizeof(float));
  for (int row = 0, tap = 0; row < job.kernel; row++)
    for (int column = 0; column < job.kernel; column++, tap++) {
      if (!(rows >> row & columns >> column & 1)) continue;
      int64_t read = pixel + (row - half) * grid.width + column - half;
      chunk.pairs[tap * chunk.room + chunk.counts[tap]++] = {own, read * job.in_channels};
    }
}

// grad_weight[r][...] of ROWS output channels by a panel of input channels, over the pairs of a tap.
template <int ROWS>
inline void multiply_pairs(const Pairs &chunk, int tap, int out, float *to, int64_t to_stride, int channels) {
  const Pair *pairs = chunk.pairs + tap * chunk.room;
  const float *grads = chunk.grads + out, *x = chunk.lines;
  Vector sums[ROWS][WIDTH];
  clear(sums);
  for (int i = 0, count = chunk.counts[tap]; i < count; i++, x += PANEL) {
    const float *g = grads + pairs[i].grad;
    Vector values[WIDTH];
    for (int v = 0; v < WIDTH; v++) values[v] = load(x + v * VECTOR);
    for (int r = 0; r < ROWS; r++) {
      Vector own = all(g[r]);
      for (int v = 0; v < WIDTH; v++) sums[r][v] += own * values[v];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < WIDTH && v * VECTOR < channels; v++) {
      float *own = to + r * to_stride + v * VECTOR;
      Vector before = chunk.first ? Vector{} : load_some(own, channels - v * VECTOR);
      store_some(own, before + sums[r][v], channels - v * VECTOR);
    }
}

template <int ROWS>
void multiply_rest(const Pairs &chunk, int tap, int out, int left, float *to, int64_t to_stride, int channels) {
  if constexpr (ROWS > 0) {
    if (left == ROWS) return multiply_pairs<ROWS>(chunk, tap, out, to, to_stride, channels);
    multiply_rest<ROWS - 1>(chunk, tap, out, left, to, to_stride, channels);
  }
}

// A panel of what a tap's pairs read, side by side: all output channels multiply it.
void pack_lines(const Pairs &chunk, int tap, const float *in, int channels) {
  const Pair *pairs = chunk.pairs + tap * chunk.room;
  for (int i = 0; i < chunk.counts[tap]; i++)
    for (int v = 0; v < PANEL; v += VECTOR)
      store(chunk.lines + int64_t(i) * PANEL + v, load_some(in + pairs[i].in + v, channels - v));
}

void multiply_chunk(const WeightGrad &job, Pairs &chunk, int outs, float *grad_weight) {
  int taps = job.kernel * job.kernel;
  int64_t stride = int64_t(taps) * job.in_channels;
  for (int tap = 0; tap < taps; tap++)
    for (int c = 0; c < job.in_channels; c += PANEL) {
      int channels = least(PANEL, job.in_channels - c), r = 0;
      float *to = grad_weight + int64_t(tap) * job.in_channels + c;
      pack_lines(chunk, tap, job.in + c, channels);
      for (; r + TILE <= outs; r += TILE) multiply_pairs<TILE>(chunk, tap, r, to + r * stride, stride, channels);
      multiply_rest<TILE - 1>(chunk, tap, r, outs - r, to + r * stride, stride, channels);
    }
  chunk.pixels = 0, chunk.first = false;
  std::memset(chunk.counts, 0, sizeof chunk.counts);
}

// Fetch what a line of a patch will need.
void fetch_line(const WeightGrad &job, const Place &place, int line, int out, int out_end) {
  if (line >= place.height) return;
  int64_t pixel = (place.image * job.grid.height + place.top + line) * job.grid.width + place.left;
  for (int x = 0; x < place.width; x++, pixel++) {
    for (int c = 0; c < job.in_channels; c += 16) __builtin_prefetch(job.in + pixel * job.in_channels + c);
    for (int c = out; c < out_end; c += 16) __builtin_prefetch(job.grad + pixel * job.out_channels + c);
  }
}

void weight_grad(const WeightGrad &job, int64_t first, int64_t last, int out, int out_end, float *grad_weight,
                 float *scratch) {
  Pairs chunk = {};
  chunk.stride = row_stride(out_end - out);
  chunk.room = PAIRS, chunk.first = true;
  chunk.lines = scratch;
  chunk.grads = chunk.lines + PAIRS * PANEL;
  chunk.pairs = reinterpret_cast<Pair *>(chunk.grads + PAIRS * chunk.stride);
  for (int64_t position = first; position < last; position++) {
    Place place = place_of(job.grid, job.order[position]);
    Place next = place_of(job.grid, job.order[least(position + 1, last - 1)]);
    for (int y = 0; y < place.height; y++) {
      fetch_line(job, next, y, out, out_end);
      for (int x = 0; x < place.width; x++) {
        add_pixel(job, place, y, x, out, out_end, chunk);
        if (chunk.pixels == PAIRS) multiply_chunk(job, chunk, out_end - out, grad_weight);
      }
    }
  }
  if (chunk.pixels) multiply_chunk(job, chunk, out_end - out, grad_weight);
}

// ---- Maps: affine, moments, and their gradients ---------------------------------------------------------------------

// Calls what(expert, patch, pixel, count): a run of pixels of one patch that lie side by side.
template <class What>
inline void for_runs(const Affine &job, int64_t line, int64_t line_end, const What &what) {
  const Grid &grid = job.grid;
  for (; line < line_end; line++) {
    int64_t image = line / grid.rows, top = line % grid.rows * grid.side;
    int64_t bottom = least(top + grid.side, grid.height);
    for (int64_t y = top; y < bottom; y++)
      for (int column = 0; column < grid.columns; column++) {
        int64_t patch = line * grid.columns + column, left = int64_t(column) * grid.side;
        int count = least(grid.side, grid.width - left);
        what(job.expert[patch], patch, (image * grid.height + y) * grid.width + left, count);
      }
  }
}

// A panel's worth of what an expert has, or a constant.
struct Own {
  const float *table;
  Vector otherwise;
  inline Vector operator()(int64_t expert, int channels, int channel) const {
    return table ? load_some(table + expert * channels + channel, channels - channel) : otherwise;
  }
};

inline float gate_of(const Affine &job, int64_t patch) { return job.epilogue.gate ? job.epilogue.gate[patch] : 1.0f; }

template <bool GELU>
void affine_lines(const Affine &job, int64_t line, int64_t line_end, float *out) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)};
  int channels = job.channels;
  const float *residual = job.epilogue.residual;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    float *to = out + pixel * channels;
    const float *from = job.x + pixel * channels, *added = residual ? residual + pixel * channels : nullptr;
    if (expert < 0) {
      if (added) std::memcpy(to, added, sizeof(float) * count * channels);
      else std::memset(to, 0, sizeof(float) * count * channels);
      return;
    }
    Vector gate = all(gate_of(job, patch));
    for (int c = 0; c < channels; c += VECTOR) {
      Vector factor = scale(expert, channels, c), term = shift(expert, channels, c);
      int own = channels - c;
      for (int64_t i = c; i < int64_t(count) * channels; i += channels) {
        Vector y = load_some(from + i, own) * factor + term;
        if (GELU) y = gelu(y);
        y *= gate;
        if (added) y += load_some(added + i, own);
        store_some(to + i, y, own);
      }
    }
  });
}

void affine(const Affine &job, int64_t line, int64_t line_end, float *out) {
  (job.epilogue.gelu ? affine_lines<true> : affine_lines<false>)(job, line, line_end, out);
}

inline void add_to(float *p, Vector v, int count) { store_some(p, load_some(p, count) + v, count); }

void moments(const Affine &job, const float *centre, int64_t line, int64_t line_end, float *sums) {
  int channels = job.channels;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t, int64_t pixel, int count) {
    if (expert < 0) return;
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector middle = load_some(centre + expert * channels + c, own), plain = {}, squares = {};
      for (int i = 0; i < count; i++) {
        Vector d = load_some(job.x + (pixel + i) * channels + c, own) - middle;
        plain += d;
        squares += d * d;
      }
      add_to(sums + 2 * expert * channels + c, plain, own);
      add_to(sums + (2 * expert + 1) * channels + c, squares, own);
    }
  });
}

template <bool GELU>
void affine_sums_lines(const Affine &job, const float *grad, const float *centre, int64_t line, int64_t line_end,
                       float *sums, float *grad_gate) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)}, middle = {centre, all(0)};
  int channels = job.channels;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    if (expert < 0) return;
    Vector gate = all(gate_of(job, patch)), for_gate = {};
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector factor = scale(expert, channels, c), term = shift(expert, channels, c), mid = middle(expert, channels, c);
      Vector plain = {}, centred = {};
      for (int i = 0; i < count; i++) {
        Vector x = load_some(job.x + (pixel + i) * channels + c, own), y = x * factor + term;
        Vector g = load_some(grad + (pixel + i) * channels + c, own);
        if (GELU) {
          Gelu act = gelu_and_slope(y);
          for_gate += g * act.value;
          g *= act.slope;
        } else {
          for_gate += g * y;
        }
        plain += g;
        centred += g * (x - mid);
      }
      add_to(sums + 2 * expert * channels + c, plain * gate, own);
      add_to(sums + (2 * expert + 1) * channels + c, centred * gate, own);
    }
    grad_gate[patch] += sum_of(for_gate);
  });
}

void affine_sums(const Affine &job, const float *grad, const float *centre, int64_t line, int64_t line_end, float *sums,
                 float *grad_gate) {
  auto run = job.epilogue.gelu ? affine_sums_lines<true> : affine_sums_lines<false>;
  run(job, grad, centre, line, line_end, sums, grad_gate);
}

template <bool GELU>
void affine_grad_lines(const Affine &job, const float *grad, const float *slope, const float *offset, int64_t line,
                       int64_t line_end, float *out) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)}, by_x = {slope, all(0)},
      alone = {offset, all(0)};
  int channels = job.channels;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    if (expert < 0) {
      std::memset(out + pixel * channels, 0, sizeof(float) * count * channels);
      return;
    }
    Vector gate = all(gate_of(job, patch));
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector factor = scale(expert, channels, c), term = shift(expert, channels, c);
      Vector of_x = by_x(expert, channels, c), rest = alone(expert, channels, c), of_g = factor * gate;
      for (int i = 0; i < count; i++) {
        int64_t at = (pixel + i) * channels + c;
        Vector x = load_some(job.x + at, own), g = load_some(grad + at, own);
        if (GELU) {
          Vector slope = slope_of_gelu(x * factor + term);
          g *= slope;
        }
        store_some(out + at, g * of_g + (x * of_x + rest), own);
      }
    }
  });
}

void affine_grad(const Affine &job, const float *grad, const float *slope, const float *offset, int64_t line,
                 int64_t line_end, float *out) {
  auto run = job.epilogue.gelu ? affine_grad_lines<true> : affine_grad_lines<false>;
  run(job, grad, slope, offset, line, line_end, out);
}

// ---- The router's first layer ---------------------------------------------------------------------------------------

// The weights for both directions as panels, hidden values of a chunk of pixels and their gradients.
struct Layer {
  float *forward, *backward, *grads, *patch_sums;
};

constexpr int STRETCH = 96;  // pixels whose gradients are kept for the products

int64_t perceptron_scratch(const Perceptron &job) {
  int64_t hidden = panels(job.hidden) * PANEL, channels = panels(job.channels) * PANEL;
  return hidden * job.channels + channels * job.hidden + STRETCH * row_stride(hidden) + job.grid.columns * hidden + 64;
}

Layer lay_out(const Perceptron &job, float *scratch) {
  int64_t hidden = panels(job.hidden) * PANEL, channels = panels(job.channels) * PANEL;
  Layer layer;
  layer.forward = scratch;
  layer.backward = layer.forward + hidden * job.channels;
  layer.grads = layer.backward + channels * job.hidden;
  layer.patch_sums = layer.grads + STRETCH * row_stride(hidden);
  return layer;
}

void pack_layer(const float *weight, int64_t out_stride, int64_t in_stride, int outs, int ins, float *to) {
  for (int p = 0; p < panels(outs); p++)
    pack_panel(weight + p * PANEL * out_stride, out_stride, in_stride, least(PANEL, outs - p * PANEL), ins,
               to + int64_t(p) * ins * PANEL);
}

int64_t linear_scratch(const Linear &job) { return int64_t(panels(job.outs)) * PANEL * job.ins; }

template <int ROWS>
void linear_rows(const Linear &job, int64_t first, const float *packed, float *out) {
  const float *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = job.in + (first + r) * job.ins;
  for (int p = 0; p < panels(job.outs); p++) {
    Vector sums[ROWS][WIDTH];
    clear(sums);
    multiply<ROWS>(row, 0, packed + int64_t(p) * job.ins * PANEL, job.ins, sums);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH; v++) {
        int at = p * PANEL + v * VECTOR, own = job.outs - at;
        Vector y = job.bias ? sums[r][v] + load_some(job.bias + at, own) : sums[r][v];
        store_some(out + (first + r) * job.outs + at, y, own);
      }
  }
}

void linear(const Linear &job, float *out, float *scratch) {
  pack_layer(job.weight, job.weight_stride, 1, job.outs, job.ins, scratch);
  int64_t i = 0;
  for (; i + TILE <= job.count; i += TILE) linear_rows<TILE>(job, i, scratch, out);
  for (; i < job.count; i++) linear_rows<1>(job, i, scratch, out);
}

// What comes before the activation, of ROWS pixels side by side.
template <int ROWS>
inline void before_activation(const Perceptron &job, const float *packed, int64_t y, int64_t x, int64_t pixel, int p,
                              Vector (*sums)[WIDTH]) {
  const float *row[ROWS];
  for (int r = 0; r < ROWS; r++) {
    row[r] = job.x + (pixel + r) * job.channels;
    for (int v = 0; v < WIDTH; v++) {
      int at = p * PANEL + v * VECTOR, own = most(0, job.hidden - at);
      sums[r][v] = load_some(job.rows + y * job.hidden + at, own) +
                   load_some(job.columns + (x + r) * job.hidden + at, own);
    }
  }
  multiply<ROWS>(row, 0, packed + int64_t(p) * job.channels * PANEL, job.channels, sums);
}

template <int ROWS>
void add_activations(const Perceptron &job, const Layer &layer, int64_t y, int64_t x, int64_t pixel) {
  for (int p = 0; p < panels(job.hidden); p++) {
    Vector sums[ROWS][WIDTH];
    before_activation<ROWS>(job, layer.forward, y, x, pixel, p, sums);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH; v++) sums[r][v] = gelu(sums[r][v]);
    int64_t column = x / job.grid.side, left = job.grid.side - x % job.grid.side;
    for (int r = 0; r < ROWS; r++, left--) {
      if (!left) column++, left = job.grid.side;
      float *to = layer.patch_sums + column * panels(job.hidden) * PANEL + p * PANEL;
      for (int v = 0; v < WIDTH; v++) store(to + v * VECTOR, load(to + v * VECTOR) + sums[r][v]);
    }
  }
}

void perceptron(const Perceptron &job, int64_t line, int64_t line_end, float *out, float *scratch) {
  const Grid &grid = job.grid;
  Layer layer = lay_out(job, scratch);
  pack_layer(job.weight, job.weight_stride, 1, job.hidden, job.channels, layer.forward);
  int64_t padded = panels(job.hidden) * PANEL;
  for (; line < line_end; line++) {
    std::memset(layer.patch_sums, 0, sizeof(float) * grid.columns * padded);
    int64_t image = line / grid.rows, top = line % grid.rows * grid.side;
    int64_t bottom = least(top + grid.side, grid.height);
    for (int64_t y = top; y < bottom; y++) {
      int64_t first = (image * grid.height + y) * grid.width, x = 0;
      for (; x + TILE <= grid.width; x += TILE) add_activations<TILE>(job, layer, y, x, first + x);
      for (; x < grid.width; x++) add_activations<1>(job, layer, y, x, first + x);
    }
    for (int column = 0; column < grid.columns; column++) {
      int64_t width = least(grid.side, grid.width - int64_t(column) * grid.side);
      float share = 1.0f / (width * (bottom - top));
      float *to = out + (line * grid.columns + column) * job.hidden;
      for (int h = 0; h < job.hidden; h++) to[h] = layer.patch_sums[column * padded + h] * share;
    }
  }
}

// Gradients before the activation of ROWS pixels, into rows of layer.grads.
template <int ROWS>
void grads_before(const Perceptron &job, const Layer &layer, const float *grad, int64_t line, float share_of_line,
                  int64_t y, int64_t x, int64_t pixel, float *to, float *grad_row, float *grad_columns) {
  const Grid &grid = job.grid;
  int64_t stride = row_stride(panels(job.hidden) * PANEL);
  for (int p = 0; p < panels(job.hidden); p++) {
    Vector sums[ROWS][WIDTH];
    before_activation<ROWS>(job, layer.forward, y, x, pixel, p, sums);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH; v++) sums[r][v] = slope_of_gelu(sums[r][v]);
    int64_t column = x / grid.side, left = grid.side - x % grid.side;
    for (int r = 0; r < ROWS; r++, left--) {
      if (!left) column++, left = grid.side;
      Vector share = all(share_of_line / least(grid.side, grid.width - column * grid.side));
      const float *from = grad + (line * grid.columns + column) * job.hidden;
      for (int v = 0; v < WIDTH; v++) {
        int at = p * PANEL + v * VECTOR, own = most(0, job.hidden - at);
        Vector g = load_some(from + at, own) * sums[r][v] * share;
        store(to + r * stride + at, g);
        if (own == 0) continue;
        add_to(grad_row + at, g, own);
        add_to(grad_columns + (x + r) * job.hidden + at, g, own);
      }
    }
  }
}

template <int ROWS>
void grads_of_pixels(const Perceptron &job, const Layer &layer, const float *grads, int64_t pixel, float *grad_x) {
  int64_t stride = row_stride(panels(job.hidden) * PANEL);
  const float *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = grads + r * stride;
  for (int p = 0; p < panels(job.channels); p++) {
    Vector sums[ROWS][WIDTH];
    clear(sums);
    multiply<ROWS>(row, 0, layer.backward + int64_t(p) * job.hidden * PANEL, job.hidden, sums);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH; v++) {
        int at = p * PANEL + v * VECTOR;
        if (at < job.channels) store_some(grad_x + (pixel + r) * job.channels + at, sums[r][v], job.channels - at);
      }
  }
}

// grad_weight += grads' x, over `count` pixels side by side.
template <int ROWS>
void grads_of_weight(const Perceptron &job, const float *grads, int64_t pixel, int count, float *grad_weight) {
  int64_t stride = row_stride(panels(job.hidden) * PANEL);
  for (int c = 0; c < job.channels; c += PANEL) {
    Vector sums[ROWS][WIDTH];
    clear(sums);
    for (int i = 0; i < count; i++) {
      const float *x = job.x + (pixel + i) * job.channels + c;
      Vector values[WIDTH];
      for (int v = 0; v < WIDTH; v++)
        values[v] = load_some(x + v * VECTOR, most(0, job.channels - c - v * VECTOR));
      for (int r = 0; r < ROWS; r++) {
        Vector own = all(grads[i * stride + r]);
        for (int v = 0; v < WIDTH; v++) sums[r][v] += own * values[v];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < WIDTH && c + v * VECTOR < job.channels; v++)
        add_to(grad_weight + int64_t(r) * job.channels + c + v * VECTOR, sums[r][v], job.channels - c - v * VECTOR);
  }
}

void perceptron_grad(const Perceptron &job, const float *grad, int64_t line, int64_t line_end, float *grad_x,
                     float *grad_weight, float *grad_rows, float *grad_columns, float *scratch) {
  const Grid &grid = job.grid;
  Layer layer = lay_out(job, scratch);
  int64_t stride = row_stride(panels(job.hidden) * PANEL);
  pack_layer(job.weight, job.weight_stride, 1, job.hidden, job.channels, layer.forward);
  if (grad_x) pack_layer(job.weight, 1, job.weight_stride, job.channels, job.hidden, layer.backward);
  for (; line < line_end; line++) {
    int64_t image = line / grid.rows, top = line % grid.rows * grid.side;
    int64_t bottom = least(top + grid.side, grid.height);
    float share = 1.0f / (bottom - top);
    for (int64_t y = top; y < bottom; y++)
      for (int64_t start = 0; start < grid.width; start += STRETCH) {
        int count = least(STRETCH, grid.width - start), i = 0;
        int64_t first = (image * grid.height + y) * grid.width + start;
        float *row = grad_rows + y * job.hidden;
        for (; i + TILE <= count; i += TILE)
          grads_before<TILE>(job, layer, grad, line, share, y, start + i, first + i, layer.grads + i * stride, row,
                             grad_columns);
        for (; i < count; i++)
          grads_before<1>(job, layer, grad, line, share, y, start + i, first + i, layer.grads + i * stride, row,
                          grad_columns);
        int h = 0;
        for (; h + TILE <= job.hidden; h += TILE)
          grads_of_weight<TILE>(job, layer.grads + h, first, count, grad_weight + int64_t(h) * job.channels);
        for (; h < job.hidden; h++)
          grads_of_weight<1>(job, layer.grads + h, first, count, grad_weight + int64_t(h) * job.channels);
        if (!grad_x) continue;
        for (i = 0; i + TILE <= count; i += TILE)
          grads_of_pixels<TILE>(job, layer, layer.grads + i * stride, first + i, grad_x);
        for (; i < count; i++) grads_of_pixels<1>(job, layer, layer.grads + i * stride, first + i, grad_x);
      }
  }
}

}  // namespace

extern const Kernels TABLE;
const Kernels TABLE = {
    NAME,    convolve_scratch, convolve,    panels,         weight_grad_scratch, weight_grad,        affine,
    moments, affine_sums,      affine_grad, linear_scratch, linear,              perceptron_scratch, perceptron,
    perceptron_grad,
};

}  // namespace pcenet
