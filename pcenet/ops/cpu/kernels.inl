// The kernels, compiled once per instruction set: a unit defines VECTOR (floats in a register), TILE (pixels of a tile) and
// NAME, and includes this file. Everything has internal linkage but the table at the end.
//
// Products run in blocks of TILE rows by PANEL columns, whose sums stay in registers.

#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace pcenet {
namespace {

typedef float Vector __attribute__((vector_size(4 * VECTOR)));
typedef float Unaligned __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * VECTOR)));

constexpr int WIDTH = 2;  // vectors of a panel
constexpr int PANEL = WIDTH * VECTOR;

constexpr int REGISTER = 16;  // rows of an AMX tile register, and numbers in each
#ifdef __AMX_BF16__
constexpr bool HAS_AMX = true;
#else
constexpr bool HAS_AMX = false;
#endif

inline Vector load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
inline void store(float *p, Vector v) { *reinterpret_cast<Unaligned *>(p) = v; }
inline Vector all(float value) { return value - Vector{}; }  // a broadcast alone: what is less 0 stays as it is
// Written out: as an initialiser it becomes a `rep stos`, which takes a tenth of a tile's time.
template <int ROWS, int COLUMNS>
inline void clear(Vector (&sums)[ROWS][COLUMNS]) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) sums[r][c] = Vector{};
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A vector of the first `count` numbers, zeros behind.
#ifdef __AVX512F__
inline __mmask16 below(int count) { return __mmask16((1u << most(0, count)) - 1); }  // where count < VECTOR
inline Vector load_some(const float *p, int count) {
  return count >= VECTOR ? load(p) : Vector(_mm512_maskz_loadu_ps(below(count), p));
}
inline void store_some(float *p, Vector v, int count) {
  if (count >= VECTOR) return store(p, v);
  _mm512_mask_storeu_ps(p, below(count), __m512(v));
}
#else
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
#endif

// Lanes of two vectors, those of b counted on from those of a.
template <int... FROM, typename V>
inline V shuffle(V a, V b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, FROM...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){FROM...});
#endif
}

typedef std::make_integer_sequence<int, VECTOR> Lanes;

// Lanes whose bit STEP is 0 get sums of two lanes of a, the others of b.
template <int STEP, int... I>
inline Vector sums_by_lane(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return shuffle<(I + (I & STEP) * (VECTOR / STEP))...>(a, b) + shuffle<((I + (I & STEP) * (VECTOR / STEP)) ^ STEP)...>(a, b);
}

template <int STEP, int... I>
inline Vector add_swapped(Vector v, std::integer_sequence<int, I...>) {
  return v + shuffle<(I ^ STEP)...>(v, v);
}

inline float sum_of(Vector v) {
  if constexpr (VECTOR > 8) v = add_swapped<8>(v, Lanes());
  if constexpr (VECTOR > 4) v = add_swapped<4>(v, Lanes());
  return add_swapped<1>(add_swapped<2>(v, Lanes()), Lanes())[0];
}

// The sums of four vectors, in the first four lanes.
inline Vector sums_of(const Vector *v) {
  Vector sums = sums_by_lane<2>(sums_by_lane<1>(v[0], v[1], Lanes()), sums_by_lane<1>(v[2], v[3], Lanes()), Lanes());
  if constexpr (VECTOR > 4) sums = add_swapped<4>(sums, Lanes());
  if constexpr (VECTOR > 8) sums = add_swapped<8>(sums, Lanes());
  return sums;
}

inline void add_to(float *p, Vector v, int count) { store_some(p, load_some(p, count) + v, count); }

// What is multiplied comes in elements: a number, or a pair of bfloat16, whose products are added in float32. put() stores
// elements: the numbers of its first vector, or pairs of numbers from both.
inline void add_product(Vector &sum, Vector a, Vector b) { sum += a * b; }
inline void put(float *p, Vector v, Vector) { store(p, v); }

template <class T>
struct ElementOf {
  typedef T type;
};
template <class E>
constexpr int NUMBERS = 1;  // of an element

#ifdef __AVX512BF16__
struct BFloat16 {
  uint16_t bits;
};
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};
template <>
struct ElementOf<BFloat16> {
  typedef Pair type;
};
template <>
constexpr int NUMBERS<Pair> = 2;

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t BothHalves __attribute__((vector_size(64)));

inline Vector widened(__m256i v) { return Vector(__builtin_convertvector(Halves(v), Integers) << 16); }
inline __m256i narrowed(Vector v) { return __m256i(_mm512_cvtneps_pbh(__m512(v))); }
inline Vector load(const BFloat16 *p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline void store(BFloat16 *p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrowed(v)); }
inline Vector load_some(const BFloat16 *p, int count) {
  return count >= VECTOR ? load(p) : widened(_mm256_maskz_loadu_epi16(below(count), p));
}
inline void store_some(BFloat16 *p, Vector v, int count) {
  if (count >= VECTOR) return store(p, v);
  _mm256_mask_storeu_epi16(p, below(count), narrowed(v));
}
inline void put(BFloat16 *p, Vector v, Vector) { store(p, v); }

inline Integers load(const Pair *p) { return Integers(_mm512_loadu_si512(p)); }
inline Integers all(Pair value) { return Integers(_mm512_set1_epi32(value.bits)); }
inline void add_product(Vector &sum, Integers a, Integers b) {
  sum = Vector(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}
inline void put(Pair *p, Vector a, Vector b) {
  BothHalves both = BothHalves(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
  both = shuffle<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,  //
                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(both, both);
  _mm512_storeu_si512(p, __m512i(both));
}

constexpr bool TAKES_BFLOAT16 = true;
#else
constexpr bool TAKES_BFLOAT16 = false;
#endif

template <class T>
using Element = typename ElementOf<T>::type;
template <class E>
constexpr int UNIT = HAS_AMX && NUMBERS<E> > 1 ? REGISTER : 1;  // rows that are multiplied together, however few are needed

// Calls what(number) with a number of a map's type.
template <class What>
inline void with_type(bool bfloat16, const What &what) {
#ifdef __AVX512BF16__
  if (bfloat16) return what(BFloat16());
#endif
  what(float());
}

// The same with one of a map that belongs to it, which may be in float32 beside bfloat16.
template <class What>
inline void with_types(bool bfloat16, bool other_bfloat16, const What &what) {
  with_type(bfloat16, [&](auto number) {
    if (other_bfloat16) what(number, number);
    else what(number, float());
  });
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

inline Vector absolute(Vector x) { return x < 0.0f ? -x : x; }

// GELU and its derivative; what a caller leaves unused is not computed.
struct Gelu {
  Vector value, slope;
};

// By the normal distribution's density and the chance of less than -|x|, to 1e-7 (Abramowitz and Stegun, 7.1.26).
inline Gelu gelu_and_slope(Vector x) {
  Vector e = exp_of_minus(0.5f * x * x);
  Vector t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * absolute(x));
  Vector p = all(0.5f * 1.061405429f);
  p = p * t - 0.5f * 1.453152027f;
  p = p * t + 0.5f * 1.421413741f;
  p = p * t - 0.5f * 0.284496736f;
  p = p * t + 0.5f * 0.254829592f;
  Vector tail = p * t * e, below = x < 0.0f ? tail : 1.0f - tail;
  return {x * below, below + x * e * 0.39894228f};
}

// Not gelu_and_slope(x).slope where it is needed: within a lambda g++ 12 ends with an internal error.
inline Vector gelu(Vector x) {
  Gelu both = gelu_and_slope(x);
  return both.value;
}

inline Vector slope_of_gelu(Vector x) {
  Gelu both = gelu_and_slope(x);
  return both.slope;
}

// ---- Convolutions ---------------------------------------------------------------------------------------------------
//
// A patch is cut into tiles: squares of pixels, each with the window of cells that they read. A convolution brings the
// windows of some tiles together, point by point, multiplies each point's rows by that point's part of the kernel, and
// writes what the products add up to. A scheme says how cells become points:
//
// - Direct: a tile is a pixel, and points are the cells themselves.
// - Winograd's F(2x2, 3x3): a tile has 2x2 pixels, and the 16 points are sums of the 4x4 cells that need 4 products for
//   each pixel instead of 9 (Lavin and Gray, 2016).
//
// The gradients are the same steps turned round: what wrote pixels reads their gradients, what read cells adds to theirs.

// A linear map along one axis of a square, applied along both.
struct Axis {
  int from, to;
};

template <int N>
struct Same {
  static constexpr Axis axis = {N, N};
  static void line(const Vector *d, int step, Vector *v, int to) {
    for (int i = 0; i < N; i++) v[i * to] = d[i * step];
  }
};

struct Read {  // cells to points
  static constexpr Axis axis = {4, 4};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    v[0] = a - c, v[to] = b + c, v[2 * to] = c - b, v[3 * to] = b - e;
  }
};

struct ReadGrad {
  static constexpr Axis axis = {4, 4};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    v[0] = a, v[to] = b - c + e, v[2 * to] = b + c - a, v[3 * to] = -e;
  }
};

struct Write {  // points to pixels
  static constexpr Axis axis = {4, 2};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    v[0] = a + b + c, v[to] = b - c - e;
  }
};

struct WriteGrad {
  static constexpr Axis axis = {2, 4};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = d[step];
    v[0] = a, v[to] = a + b, v[2 * to] = a - b, v[3 * to] = -b;
  }
};

struct Weigh {  // taps to points
  static constexpr Axis axis = {3, 4};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = 0.5f * d[step], c = d[2 * step], mean = 0.5f * (a + c);
    v[0] = a, v[to] = mean + b, v[2 * to] = mean - b, v[3 * to] = c;
  }
};

struct WeighGrad {
  static constexpr Axis axis = {4, 3};
  static void line(const Vector *d, int step, Vector *v, int to) {
    Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], mean = 0.5f * (b + c);
    v[0] = a + mean, v[to] = 0.5f * (b - c), v[2 * to] = mean + e;
  }
};

template <class Map>
inline void along_both(const Vector *in, Vector *out) {
  constexpr int from = Map::axis.from, to = Map::axis.to;
  Vector half[from * to];
#pragma GCC unroll 4
  for (int i = 0; i < from; i++) Map::line(in + i * from, 1, half + i * to, 1);
#pragma GCC unroll 4
  for (int j = 0; j < to; j++) Map::line(half + j, to, out + j, to);
}

struct Winograd {
  static constexpr int side = 2, window = 4, points = 16, taps = 9, few = 24;
  static constexpr bool sums = false;  // whether what the points give is added up
  using Read = pcenet::Read;
  using ReadGrad = pcenet::ReadGrad;
  using Write = pcenet::Write;
  using WriteGrad = pcenet::WriteGrad;
  using Weigh = pcenet::Weigh;
  using WeighGrad = pcenet::WeighGrad;
};

template <int KERNEL>
struct Direct {
  static constexpr int side = 1, window = KERNEL, points = KERNEL * KERNEL, taps = points, few = KERNEL > 1 ? 44 : 0;
  static constexpr bool sums = true;
  using Read = Same<KERNEL>;
  using ReadGrad = Same<KERNEL>;
  using Write = Same<1>;
  using WriteGrad = Same<1>;
  using Weigh = Same<KERNEL>;
  using WeighGrad = Same<KERNEL>;
};

// Calls what(scheme) with the scheme for a convolution: patches of a pixel that see no neighbours have one tap.
template <class What>
auto with_scheme(const Grid &grid, int kernel, bool neighbours, const What &what) {
  if (kernel == 1 || (grid.side == 1 && !neighbours)) return what(Direct<1>());
  return grid.side == 1 ? what(Direct<3>()) : what(Winograd());
}

// A patch's place, and how much of it lies on the map.
struct Place {
  int64_t image, top, left;
  int height, width;
};

inline Place place_of(const Grid &grid, int patch) {
  int per_image = grid.rows * grid.columns, in_image = patch % per_image;
  Place place;
  place.image = patch / per_image;
  place.top = in_image / grid.columns * grid.side;
  place.left = in_image % grid.columns * grid.side;
  place.height = least(grid.side, grid.height - place.top);
  place.width = least(grid.side, grid.width - place.left);
  return place;
}

// Rows and columns, counted from a tile's first pixel.
struct Box {
  int top, bottom, left, right;
  bool holds(int y, int x) const { return y >= top && y < bottom && x >= left && x < right; }
};

struct Tile {
  int64_t pixel;  // its first
  int patch;
  Box reads, owns;  // the cells that it may read, and those of its pixels that lie on the map
};

// A walk over the tiles of patches.
struct Walk {
  const Grid &grid;
  const int32_t *order;
  int64_t position, last;
  bool neighbours;
  int side, y = 0, x = 0;

  int next(Tile *tiles, int most);
};

int Walk::next(Tile *tiles, int most) {
  int count = 0;
  for (; position < last; position++, y = 0) {
    Place place = place_of(grid, order[position]);
    Box all = {0, place.height, 0, place.width};
    if (neighbours)
      all = {int(-place.top), int(grid.height - place.top), int(-place.left), int(grid.width - place.left)};
    int64_t first = (place.image * grid.height + place.top) * grid.width + place.left;
    for (; y < place.height; y += side, x = 0)
      for (; x < place.width; x += side) {
        if (count == most) return count;
        tiles[count++] = {first + y * grid.width + x, order[position],
                          {all.top - y, all.bottom - y, all.left - x, all.right - x},
                          {0, place.height - y, 0, place.width - x}};
      }
  }
  return count;
}

// Where the cells of a square around or of a tile lie in a map; `nothing` for those that are not in the box.
template <int SIDE, class T>
inline void find_cells(const T *map, int channels, int64_t width, const Tile &tile, const Box &box, const T *nothing,
                       const T **cell) {
  constexpr int before = SIDE > 2 ? 1 : 0;
  for (int i = 0; i < SIDE; i++)
    for (int j = 0; j < SIDE; j++) {
      int y = i - before, x = j - before;
      cell[i * SIDE + j] = box.holds(y, x) ? map + (tile.pixel + y * width + x) * channels : nothing;
    }
}

// Cells as points: of each point a row, `step` after the one before. In a row of pairs are two tiles, the second's cells
// behind the first's.
template <class Map, bool WHOLE, class T, class E>
inline void bring_channel(const T *const *cell, int c, int own, E *to, int64_t step) {
  constexpr int cells = Map::axis.from * Map::axis.from, points = Map::axis.to * Map::axis.to;
  constexpr int tiles = NUMBERS<E>;
  Vector in[cells], out[tiles][points];
#pragma GCC unroll 2
  for (int t = 0; t < tiles; t++) {
#pragma GCC unroll 16
    for (int k = 0; k < cells; k++)
      in[k] = WHOLE ? load(cell[t * cells + k] + c) : load_some(cell[t * cells + k] + c, own);
    along_both<Map>(in, out[t]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < points; k++) put(to + k * step + c, out[0][k], out[tiles - 1][k]);
}

template <class Map, class T, class E>
inline void bring(const T *const *cell, int channels, E *to, int64_t step) {
  int c = 0;
  for (; c + VECTOR <= channels; c += VECTOR) bring_channel<Map, true>(cell, c, VECTOR, to, step);
  if (c < channels) bring_channel<Map, false>(cell, c, channels - c, to, step);
}

int panels(int channels) { return (channels + PANEL - 1) / PANEL; }

// Rows of so many channels, whole panels: an odd number of cache lines, so that several do not share a place in it.
template <class E = float>
int64_t row_stride(int channels) {
  constexpr int64_t line = 64 / sizeof(E);
  return ((round_up(channels, PANEL) + line - 1) / line | 1) * line;
}

// Rows [point][tile][channel] of the tiles of a chunk, or of pairs of tiles: a multiple of UNIT, zeros following what there is.
template <class E = float>
struct Rows {
  E *data;
  int64_t stride, step;  // from row to row, from point to point
  E *at(int point, int tile) const { return data + point * step + tile * stride; }
};

constexpr int MOST_TILES = 96;

// Tiles of a chunk: so many that the points of both sides stay in the second cache, and enough for each number of the
// kernel that is read to be used often.
template <class Scheme>
int chunk_size(int ins, int outs) {
  constexpr int64_t budget = 1 << 17;
  return int(most(48, least(MOST_TILES, budget / (Scheme::points * (row_stride(ins) + row_stride(outs)))))) / TILE * TILE;
}

// What a thread has of scratch, taken piece by piece.
struct Room {
  float *free;
  int64_t taken = 0;
  template <class T = float>
  T *take(int64_t count) {
    int64_t floats = (count * sizeof(T) + 63) / 64 * 16;
    float *own = free;
    if (free) free += floats;
    taken += floats;
    return reinterpret_cast<T *>(own);
  }
};

// What take(room) lays out in a thread's memory, which is measured first.
template <class Take>
auto in_scratch(const Take &take) {
  Room room = {nullptr};
  take(room);
  room = {scratch(room.taken)};
  return take(room);
}

template <class E = float>
Rows<E> take_rows(Room &room, int points, int tiles, int channels) {
  int64_t stride = row_stride<E>(channels), step = tiles * stride + 16;
  return {room.take<E>(points * step), stride, step};
}

// Channels [first, end) of the squares of SIDE cells around the tiles, or of the tiles, by a linear map as rows.
template <class Map, int SIDE, class T, class E>
void bring_squares(const Grid &grid, const T *map, int channels, int first, int end, const Tile *tiles, int count,
                   Box Tile::*box, const T *zeros, const Rows<E> &rows) {
  constexpr int cells = SIDE * SIDE, together = NUMBERS<E>;
  for (int t = 0; t < round_up(count, UNIT<E> * together); t += together) {
    const T *cell[together * cells];
    for (int i = 0; i < together; i++)
      if (t + i < count)
        find_cells<SIDE>(map + first, channels, grid.width, tiles[t + i], tiles[t + i].*box, zeros, cell + i * cells);
      else
        for (int k = 0; k < cells; k++) cell[i * cells + k] = zeros;
    bring<Map>(cell, end - first, rows.at(0, t / together), rows.step);
  }
}

// What the tiles read.
template <class Scheme, class T, class E>
void bring_windows(const Grid &grid, const T *map, int channels, int first, int end, const Tile *tiles, int count,
                   const T *zeros, const Rows<E> &rows) {
  bring_squares<typename Scheme::Read, Scheme::window>(grid, map, channels, first, end, tiles, count, &Tile::reads, zeros,
                                                       rows);
}

// The gradients of their pixels.
template <class Scheme, class T, class E>
void bring_pixels(const Grid &grid, const T *map, int channels, int first, int end, const Tile *tiles, int count,
                  const T *zeros, const Rows<E> &rows) {
  bring_squares<typename Scheme::WriteGrad, Scheme::side>(grid, map, channels, first, end, tiles, count, &Tile::owns,
                                                          zeros, rows);
}

// 8 x 8 numbers transposed into rows of a panel, those of a base added where there is one.
typedef float Eight __attribute__((vector_size(32)));
typedef float UnalignedEight __attribute__((vector_size(32), aligned(4), may_alias));

inline Eight load_eight(const float *p) { return *reinterpret_cast<const UnalignedEight *>(p); }

inline void transpose_eight(const float *from, int64_t from_stride, const float *base, int64_t base_stride, float *to) {
  Eight r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = load_eight(from + i * from_stride);
  for (int i = 0; base && i < 8; i++) r[i] += load_eight(base + i * base_stride);
  for (int i = 0; i < 4; i++) {
    s[2 * i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    Eight *q = s + 4 * i, *t = r + 4 * i;
    t[0] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(q[0], q[2]);
    t[1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(q[0], q[2]);
    t[2] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(q[1], q[3]);
    t[3] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(q[1], q[3]);
  }
  for (int i = 0; i < 4; i++) {
    *reinterpret_cast<UnalignedEight *>(to + i * PANEL) = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(r[i], r[i + 4]);
    *reinterpret_cast<UnalignedEight *>(to + (i + 4) * PANEL) = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(r[i], r[i + 4]);
  }
}

// Numbers (o, i) of a tap, or of all where they are one stretch, the base's added if there is one, as [i][PANEL] for `count`
// values of o; the last vector that has any is filled up with zeros, and those behind it are left as they are: nobody reads
// them.
void pack_panel(const Layout &own, const Layout &base, int count, int in_channels, float *to) {
  const float *from = own.data, *added = base.data;
  int ins = 0, outs = 0, width = round_up(count, VECTOR);  // the first two: done at once
  if (own.in_stride == 1 && (!added || base.in_stride == 1)) {
    ins = in_channels / 8 * 8, outs = count / 8 * 8;
    for (int o = 0; o < outs; o += 8)
      for (int i = 0; i < ins; i += 8) {
        for (int next = 8; i % 16 == 0 && next < 16; next++)  // no processor foresees where the next rows are
          __builtin_prefetch(from + (o + next) * own.out_stride + i);
        transpose_eight(from + o * own.out_stride + i, own.out_stride, added ? added + o * base.out_stride + i : nullptr,
                        base.out_stride, to + int64_t(i) * PANEL + o);
      }
  } else if (own.out_stride == 1 && (!added || base.out_stride == 1)) {
    ins = in_channels, outs = width;
    for (int i = 0; i < ins; i++)
      for (int v = 0; v < width; v += VECTOR) {
        Vector numbers = load_some(from + i * own.in_stride + v, count - v);
        if (added) numbers += load_some(added + i * base.in_stride + v, count - v);
        store(to + int64_t(i) * PANEL + v, numbers);
      }
  }
  for (int i = 0; i < in_channels; i++)
    for (int o = i < ins ? outs : 0; o < width; o++) {
      float number = o < count ? from[o * own.out_stride + i * own.in_stride] : 0;
      if (added && o < count) number += added[o * base.out_stride + i * base.in_stride];
      to[int64_t(i) * PANEL + o] = number;
    }
}

// Rows of a packed kernel that a point has. One more than are used, lest all points begin at the same place of the cache;
// but those that are one product lie side by side.
template <class Scheme>
int64_t rows_of_point(int ins) {
  return Scheme::sums ? ins : ins + 1;
}

// Whether what an output channel reads of its kernel is one stretch of memory, [tap][in].
bool reads_stretches(const Convolution &job) {
  auto stretches = [&](const Layout &layout) { return layout.in_stride == 1 && layout.tap_stride == job.in_channels; };
  return stretches(job.weight) && (!job.base.data || stretches(job.base));
}

// An expert's kernel, the base added, as [panel][point][in][PANEL], or with pairs of `in`; `taps` is room for a panel of it as
// [tap][in][PANEL].
template <class Scheme, class T, class E = Element<T>>
void pack_kernel(const Convolution &job, int expert, int panel, int panel_end, float *taps, E *packed) {
  constexpr int together = NUMBERS<E>;
  int first_tap = Scheme::taps == 1 ? job.kernel * job.kernel / 2 : 0, ins = job.in_channels;
  int at_once = reads_stretches(job) ? Scheme::taps : 1;  // in the order of memory, which is read twice as fast
  int64_t step = rows_of_point<Scheme>(ins / together) * PANEL, size = int64_t(ins) * PANEL;
  for (int p = panel; p < panel_end; p++, packed += Scheme::points * step) {
    int count = least(PANEL, job.out_channels - p * PANEL), width = round_up(count, VECTOR);
    for (int tap = 0; tap < Scheme::taps; tap += at_once) {
      auto from = [&](Layout layout, int64_t start) {
        if (layout.data) layout.data += start + p * PANEL * layout.out_stride + (first_tap + tap) * layout.tap_stride;
        return layout;
      };
      pack_panel(from(job.weight, expert * job.expert_stride), from(job.base, 0), count, at_once * ins, taps + tap * size);
    }
    for (int i = 0; i < ins / together; i++)
      for (int v = 0; v < width; v += VECTOR) {
        Vector in[Scheme::taps], out[together][Scheme::points];
        for (int n = 0; n < together; n++) {
#pragma GCC unroll 9
          for (int tap = 0; tap < Scheme::taps; tap++) in[tap] = load(taps + tap * size + (i * together + n) * PANEL + v);
          along_both<typename Scheme::Weigh>(in, out[n]);
        }
        E *to = packed + int64_t(i) * PANEL + v;
#pragma GCC unroll 16
        for (int k = 0; k < Scheme::points; k++) put(to + k * step, out[0][k], out[together - 1][k]);
      }
  }
}

// Sums of ROWS rows by the first COLUMNS vectors of a panel: sum over i of row[r][i] * packed[i].
template <int ROWS, int COLUMNS, class E>
inline void multiply(const E *const *row, const E *packed, int count, Vector (*sums)[COLUMNS]) {
  const E *own[ROWS];
  for (int r = 0; r < ROWS; r++) own[r] = row[r];
  for (int i = 0; i < count; i++, packed += PANEL) {
    decltype(load(packed)) weights[COLUMNS];
    for (int v = 0; v < COLUMNS; v++) weights[v] = load(packed + v * VECTOR);
    for (int r = 0; r < ROWS; r++) {
      auto value = all(own[r][i]);
      for (int v = 0; v < COLUMNS; v++) add_product(sums[r][v], value, weights[v]);
    }
  }
}

// A row to be multiplied by all panels of a point, and where that goes.
template <class E>
struct Product {
  const E *row;
  float *to;
};

// ROWS of them, panel `p`, of which `own` numbers are written; added to what is there where `adds`.
template <int ROWS, int COLUMNS, class E>
void multiply_rows(const Product<E> *products, int p, const E *packed, int length, bool adds, int own) {
  const E *row[ROWS];
  for (int r = 0; r < ROWS; r++) row[r] = products[r].row;
  Vector sums[ROWS][COLUMNS];
  clear(sums);
  multiply<ROWS, COLUMNS>(row, packed, length, sums);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < COLUMNS; v++) {
      float *to = products[r].to + p * PANEL + v * VECTOR;
      if (adds) sums[r][v] += load_some(to, own - v * VECTOR);
      store_some(to, sums[r][v], own - v * VECTOR);
    }
}

// Calls what(number) with the number of rows, at most MOST, as a constant.
template <int MOST, class What>
inline void with_rows(int rows, const What &what) {
  if constexpr (MOST > 0) {
    if (rows == MOST) return what(std::integral_constant<int, MOST>());
    with_rows<MOST - 1>(rows, what);
  }
}

// Calls what(first, number) for `count` rows, TILE at a time.
template <class What>
inline void in_tiles(int count, const What &what) {
  int first = 0;
  for (; first + TILE <= count; first += TILE) what(first, std::integral_constant<int, TILE>());
  with_rows<TILE - 1>(count - first, [&](auto number) { what(first, number); });
}

// Calls what(number) with the number of vectors of a panel that are needed for `own` numbers, as a constant.
template <class What>
inline void with_columns(int own, const What &what) {
  if (own <= VECTOR) what(std::integral_constant<int, 1>());
  else what(std::integral_constant<int, WIDTH>());
}

#ifdef __AMX_BF16__
// The compiler does not know what registers are loaded from: this says that it is read.
inline void is_read(const void *memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

// A thread's AMX registers, in use as long as this lives: 0 and 1 for sums, 2 for rows of pairs, 3 and 4 for the columns
// that these are multiplied by.
struct TileRegisters {
  int depth = 0;  // pairs of a row at a time, an equal part of its length; 0: there is none, and vectors have to multiply

  TileRegisters(int length, bool pairs) {
    for (int part = REGISTER; pairs && part > 4 && !depth; part--)
      if (length % part == 0) depth = part;
    if (!depth) return;
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[REGISTER];
      uint8_t rows[REGISTER];
    } shapes = {1, 0, {}, {64, 64, uint16_t(4 * depth), 64, 64}, {REGISTER, REGISTER, REGISTER, uint8_t(depth), uint8_t(depth)}};
    is_read(&shapes);
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() {
    if (depth) _tile_release();
  }
  TileRegisters(const TileRegisters &) = delete;
};

// As multiply_rows, for `count` rows. Those that are not whole are copied into equal steps, and so are their results.
template <int COLUMNS>
void multiply_in_registers(const Product<Pair> *products, int count, int p, const Pair *packed, int length, int depth,
                           bool whole, bool adds, int own) {
  alignas(64) Pair copied[REGISTER * REGISTER] = {};
  alignas(64) float found[REGISTER * PANEL];
  whole = whole && count > 1;
  int64_t step = whole ? products[1].row - products[0].row : REGISTER, apart = whole ? products[1].to - products[0].to : PANEL;
  for (int first = 0; first < count; first += REGISTER, products += REGISTER) {
    int rows = whole ? 0 : least(REGISTER, count - first);  // to be copied
    _tile_zero(0);
    _tile_zero(1);
    for (int i = 0; i < length; i += depth) {
      const Pair *from = whole ? products[0].row + i : copied, *columns = packed + i * PANEL, *behind = columns + VECTOR;
      for (int r = 0; r < rows; r++)
        _mm512_store_si512(copied + r * REGISTER, _mm512_maskz_loadu_epi32(__mmask16((1u << depth) - 1), products[r].row + i));
      is_read(copied);
      _tile_loadd(2, from, step * sizeof(Pair));
      _tile_loadd(3, columns, PANEL * sizeof(Pair));
      _tile_dpbf16ps(0, 2, 3);
      if (COLUMNS == 1) continue;
      _tile_loadd(4, behind, PANEL * sizeof(Pair));
      _tile_dpbf16ps(1, 2, 4);
    }
    float *sums = whole ? products[0].to + p * PANEL : found, *more = sums + VECTOR;
    _tile_stored(0, sums, apart * sizeof(float));
    if (COLUMNS > 1) _tile_stored(1, more, apart * sizeof(float));
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < COLUMNS; v++) {
        float *to = products[r].to + p * PANEL + v * VECTOR;
        Vector sum = load(found + r * PANEL + v * VECTOR);
        if (adds) sum += load_some(to, own - v * VECTOR);
        store_some(to, sum, own - v * VECTOR);
      }
  }
}
#else
struct TileRegisters {
  static constexpr int depth = 0;
  TileRegisters(int, bool) {}
};
#endif

// Products by what they are multiplied with: a part of each panel, `length` rows from `start` on.
template <class E = float>
struct Points {
  static constexpr int most = 16;
  Product<E> *products;  // [point][room]
  int room, counts[most], start[most], length[most];
  int depth = 0;       // of tile registers, where they are to multiply
  bool whole = false;  // whether rows lie in equal steps, and so do results, with room for a multiple of UNIT
  void add(int point, const E *row, float *to) { products[point * room + counts[point]++] = {row, to}; }
};

// All of them, with panels of `size` elements; `width` numbers of a result are written. The last point first: for a gradient
// points are the cells around a pixel, and going backwards a cell gets its terms in the order of the pixels that they come
// from. So it does from chunk to chunk: where chunks begin changes no bit.
template <class E>
void multiply_points(const Points<E> &points, const E *packed, int64_t size, bool adds, int width) {
  for (int k = Points<E>::most - 1; k >= 0; k--)
    for (int p = 0; points.counts[k] && p < panels(width); p++)
      with_columns(width - p * PANEL, [&](auto columns) {
#ifdef __AMX_BF16__
        if constexpr (NUMBERS<E> > 1)
          if (points.depth)
            return multiply_in_registers<decltype(columns)::value>(
                points.products + k * points.room, points.counts[k], p, packed + p * size + int64_t(points.start[k]) * PANEL,
                points.length[k], points.depth, points.whole, adds, width - p * PANEL);
#endif
        in_tiles(points.counts[k], [&](int first, auto rows) {
          multiply_rows<decltype(rows)::value, decltype(columns)::value>(
              points.products + k * points.room + first, p, packed + p * size + int64_t(points.start[k]) * PANEL,
              points.length[k], adds, width - p * PANEL);
        });
      });
}

// What follows the products of a tile: residual + gate * act(scale * y + shift).
template <int PIXELS>
inline void follow(const Convolution &job, int expert, int patch, int channel, int own, Vector *y) {
  const Epilogue &after = job.epilogue;
  int64_t at = int64_t(expert) * job.out_channels + channel;
  Vector scale = after.scale ? load_some(after.scale + at, own) : all(1);
  Vector shift = after.shift ? load_some(after.shift + at, own) : Vector{};
  for (int k = 0; k < PIXELS; k++) y[k] = y[k] * scale + shift;
  if (after.gelu)
    for (int k = 0; k < PIXELS; k++) y[k] = gelu(y[k]);
  if (after.gate)
    for (int k = 0; k < PIXELS; k++) y[k] *= after.gate[patch];
}

// Products as the tiles' pixels, channels [channel, channel_end).
template <class Scheme, class T>
void write_pixels(const Convolution &job, int expert, const Tile *tiles, int count, const Rows<> &products, int channel,
                  int channel_end) {
  constexpr int points = Scheme::sums ? 1 : Scheme::points, side = Scheme::side, pixels = side * side;
  T *out = static_cast<T *>(job.out);
  const T *residual = static_cast<const T *>(job.epilogue.residual);
  for (int t = 0; t < count; t++)
    for (int c = channel; c < channel_end; c += VECTOR) {
      Vector in[points], y[pixels];
#pragma GCC unroll 16
      for (int k = 0; k < points; k++) in[k] = load(products.at(k, t) + c - channel);
      along_both<typename Scheme::Write>(in, y);
      follow<pixels>(job, expert, tiles[t].patch, c, channel_end - c, y);
      for (int k = 0; k < pixels; k++) {
        if (!tiles[t].owns.holds(k / side, k % side)) continue;
        int64_t pixel = tiles[t].pixel + k / side * job.grid.width + k % side, at = pixel * job.out_channels + c;
        if (residual) y[k] += load_some(residual + at, channel_end - c);
        store_some(out + at, y[k], channel_end - c);
      }
    }
}

// Products are added to the cells of the tiles' windows.
template <class Scheme>
void add_to_windows(const Convolution &job, const Tile *tiles, int count, const Rows<> &products, int channel,
                    int channel_end) {
  constexpr int points = Scheme::points, window = Scheme::window, before = window > 1 ? 1 : 0;
  float *out_map = static_cast<float *>(job.out);
  for (int t = 0; t < count; t++) {
    float *cell[points];
    for (int k = 0; k < points; k++) {
      int y = k / window - before, x = k % window - before;
      int64_t pixel = tiles[t].pixel + y * job.grid.width + x;
      cell[k] = tiles[t].reads.holds(y, x) ? out_map + pixel * job.out_channels : nullptr;
    }
    for (int c = channel; c < channel_end; c += VECTOR) {
      Vector in[points], out[points];
#pragma GCC unroll 16
      for (int k = 0; k < points; k++) in[k] = load(products.at(k, t) + c - channel);
      along_both<typename Scheme::ReadGrad>(in, out);
      for (int k = 0; k < points; k++)
        if (cell[k]) add_to(cell[k] + c, out[k], channel_end - c);
    }
  }
}

// A thread's memory for a convolution: what is packed comes first and stays between tasks.
template <class Scheme, class T>
struct Memory {
  typedef Element<T> E;
  E *packed;
  float *taps;
  T *zeros;
  int tiles, length;  // of a row, in elements
  Tile *tile;
  Points<E> points;
  Rows<T> rows;
  Rows<> results;

  Memory(const Convolution &job, Room &room) {
    int ins = job.in_channels, outs = job.out_channels, number = Scheme::points;
    length = ins / NUMBERS<E>;
    packed = room.take<E>(panels(outs) * number * rows_of_point<Scheme>(length) * PANEL);
    taps = room.take(int64_t(Scheme::taps) * ins * PANEL);
    zeros = room.take<T>(ins);
    tiles = Scheme::sums ? MOST_TILES : chunk_size<Scheme>(ins, outs);
    tile = room.take<Tile>(tiles);
    points.products = room.take<Product<E>>(points.most * tiles), points.room = tiles;
    int whole = round_up(tiles, UNIT<E>);
    if (!Scheme::sums) rows = take_rows<T>(room, number, whole, ins);
    results = take_rows(room, Scheme::sums ? 1 : number, whole, outs);
    points.whole = !Scheme::sums;
  }
};

// A pixel's numbers, as elements.
template <class T>
inline const Element<T> *pixel_of(const Convolution &job, int64_t pixel) {
  return reinterpret_cast<const Element<T> *>(static_cast<const T *>(job.in) + pixel * job.in_channels);
}

// A pixel's cells side by side are one row, multiplied by their taps together: which there are is a matter of the columns
// before and behind.
template <int WINDOW, class T>
void list_cells(const Convolution &job, const Tile &tile, int length, float *to, Points<Element<T>> &points) {
  constexpr int before = WINDOW / 2;
  for (int i = 0; i < WINDOW; i++) {
    if (!tile.reads.holds(i - before, 0)) continue;
    int none_before = before && !tile.reads.holds(0, -1), none_behind = before && !tile.reads.holds(0, 1);
    int kind = i * 4 + none_before * 2 + none_behind;
    points.start[kind] = (i * WINDOW + none_before) * length;
    points.length[kind] = (WINDOW - none_before - none_behind) * length;
    points.add(kind, pixel_of<T>(job, tile.pixel + (i - before) * job.grid.width + none_before - before), to);
  }
}

// What is multiplied: the rows of points; or, where these are cells, cells where they lie, and into a gradient's cells.
template <class Scheme, class T>
void list_products(const Convolution &job, int count, int channel, Memory<Scheme, T> &memory) {
  auto &points = memory.points;
  constexpr int window = Scheme::window, before = window / 3;
  bool forward = job.direction == Direction::forward;
  std::memset(points.counts, 0, sizeof points.counts);
  for (int k = 0; k < Scheme::points && !(Scheme::sums && forward); k++)
    points.start[k] = k * rows_of_point<Scheme>(memory.length), points.length[k] = memory.length;
  for (int t = 0; t < count; t++) {
    const Tile &tile = memory.tile[t];
    if (Scheme::sums && forward) {
      list_cells<window, T>(job, tile, memory.length, memory.results.at(0, t), points);
      continue;
    }
    for (int k = 0; k < Scheme::points; k++) {
      int y = k / window - before, x = k % window - before;
      if (!Scheme::sums)
        points.add(k, reinterpret_cast<const Element<T> *>(memory.rows.at(k, t)), memory.results.at(k, t));
      else if (tile.reads.holds(y, x))
        points.add(k, pixel_of<T>(job, tile.pixel),
                   static_cast<float *>(job.out) + (tile.pixel + y * job.grid.width + x) * job.out_channels + channel);
    }
  }
}

template <class Scheme, class T>
void convolve_in_tiles(const Convolution &job, int expert, int64_t first, int64_t last, int panel, int panel_end,
                       bool packed) {
  auto memory = in_scratch([&](Room &room) { return Memory<Scheme, T>(job, room); });
  const T *in = static_cast<const T *>(job.in);
  bool forward = job.direction == Direction::forward;
  int ins = job.in_channels, channel = panel * PANEL, channel_end = least(panel_end * PANEL, job.out_channels);
  int width = Scheme::sums && !forward ? channel_end - channel : round_up(channel_end - channel, VECTOR);
  std::memset(memory.zeros, 0, ins * sizeof(T));
  if (!packed) pack_kernel<Scheme, T>(job, expert, panel, panel_end, memory.taps, memory.packed);
  TileRegisters registers(memory.length, NUMBERS<Element<T>> > 1);
  memory.points.depth = registers.depth;
  Walk walk = {job.grid, job.order, first, last, job.neighbours, Scheme::side};
  while (int count = walk.next(memory.tile, memory.tiles)) {
    if (!Scheme::sums) {
      auto bring = forward ? bring_windows<Scheme, T, T> : bring_pixels<Scheme, T, T>;
      bring(job.grid, in, ins, 0, ins, memory.tile, count, memory.zeros, memory.rows);
    }
    list_products(job, count, channel, memory);
    if (Scheme::sums && forward) std::memset(memory.results.data, 0, count * memory.results.stride * sizeof(float));
    multiply_points(memory.points, memory.packed, Scheme::points * rows_of_point<Scheme>(memory.length) * PANEL,
                    Scheme::sums, width);
    if (forward)
      with_type(job.out_bfloat16, [&](auto out) {
        write_pixels<Scheme, decltype(out)>(job, expert, memory.tile, count, memory.results, channel, channel_end);
      });
    else if (!Scheme::sums) add_to_windows<Scheme>(job, memory.tile, count, memory.results, channel, channel_end);
  }
}

// For few pixels packing a 3x3 kernel takes longer than using it: each of its numbers is read once, where it lies, for all
// of them. What a pixel reads is copied side by side, and an output is one product of two stretches.
constexpr int FEW_TAPS = 9, FEW_CHANNELS = 4;
constexpr int FEW_ROWS = VECTOR == 16 ? 5 : 3;  // as many as there are registers for

// Up to how many pixels are few, as measured; half as many in bfloat16, which packed kernels multiply twice as fast.
template <class Scheme, class T>
constexpr int FEW = Scheme::few / NUMBERS<Element<T>>;
constexpr int MOST_FEW = Direct<3>::few;
static_assert(Winograd::few <= MOST_FEW && Direct<1>::few <= MOST_FEW);

struct Few {
  int64_t length;                 // of a stretch
  float *windows, *rows, *found;  // [MOST_FEW, length], [FEW_CHANNELS, length], [MOST_FEW, PANEL]
  float *zeros;  // of a pixel, in any type
  Tile *tiles;

  Few(const Convolution &job, Room &room) {
    length = int64_t(FEW_TAPS) * job.in_channels;
    windows = room.take(MOST_FEW * length), rows = room.take(FEW_CHANNELS * length), found = room.take(MOST_FEW * PANEL);
    zeros = room.take(job.in_channels), tiles = room.take<Tile>(MOST_FEW);
  }
};

template <int ROWS, bool WHOLE>
inline void multiply_stretch(const float *x, int64_t length, const float *const *kernel, int64_t i,
                             Vector (&sums)[ROWS][FEW_CHANNELS]) {
  auto read = [=](const float *p) { return WHOLE ? load(p + i) : load_some(p + i, length - i); };
  Vector own[ROWS];
  for (int r = 0; r < ROWS; r++) own[r] = read(x + r * length);
  for (int c = 0; c < FEW_CHANNELS; c++) {
    Vector w = read(kernel[c]);
    for (int r = 0; r < ROWS; r++) sums[r][c] += w * own[r];
  }
}

template <int ROWS>
void multiply_few(const Few &few, const float *const *kernel, int first, int channel, int channels) {
  Vector sums[ROWS][FEW_CHANNELS];
  clear(sums);
  const float *x = few.windows + first * few.length;
  int64_t i = 0;
  for (; i + VECTOR <= few.length; i += VECTOR) multiply_stretch<ROWS, true>(x, few.length, kernel, i, sums);
  if (i < few.length) multiply_stretch<ROWS, false>(x, few.length, kernel, i, sums);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
    store_some(few.found + (first + r) * PANEL + channel, sums_of(sums[r]), channels);
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

template <class T>
void convolve_few(const Convolution &job, int expert, int64_t first, int64_t last, int panel, int panel_end) {
  Few few = in_scratch([&](Room &room) { return Few(job, room); });
  Tile *tiles = few.tiles;
  int ins = job.in_channels;
  std::memset(few.zeros, 0, job.in_channels * sizeof(float));
  Walk walk = {job.grid, job.order, first, last, job.neighbours, 1};
  int count = walk.next(tiles, MOST_FEW);
  for (int t = 0; t < count; t++) {
    const T *cell[FEW_TAPS];
    find_cells<3>(static_cast<const T *>(job.in), ins, job.grid.width, tiles[t], tiles[t].reads,
                  reinterpret_cast<const T *>(few.zeros), cell);
    for (int k = 0; k < FEW_TAPS; k++)  // no more than it has: what follows lies right behind
      for (int c = 0; c < ins; c += VECTOR)
        store_some(few.windows + t * few.length + k * ins + c, load_some(cell[k] + c, ins - c), ins - c);
  }
  for (int p = panel; p < panel_end; p++) {
    int channel = p * PANEL, outs = least(PANEL, job.out_channels - channel);
    for (int d = 0; d < outs; d += FEW_CHANNELS) {
      int channels = least(FEW_CHANNELS, outs - d), n = 0;
      const float *kernel[FEW_CHANNELS];
      find_rows(job, few, expert, channel + d, channels, kernel);
      for (; n + FEW_ROWS <= count; n += FEW_ROWS) multiply_few<FEW_ROWS>(few, kernel, n, d, channels);
      with_rows<FEW_ROWS - 1>(count - n, [&](auto rows) { multiply_few<decltype(rows)::value>(few, kernel, n, d, channels); });
    }
    with_type(job.out_bfloat16, [&](auto out) {
      write_pixels<Direct<1>, decltype(out)>(job, expert, tiles, count, {few.found, PANEL, 0}, channel, channel + outs);
    });
  }
}

// Asked of all of an expert's patches, not of a task's: sums are rounded otherwise, and how patches are shared out depends
// on the threads.
bool has_few_pixels(const Convolution &job, int expert, int few) {
  int64_t count = 0;
  for (int64_t position = job.begin[expert]; position < job.begin[expert + 1] && count <= few; position++) {
    Place place = place_of(job.grid, job.order[position]);
    count += place.height * place.width;
  }
  return count <= few;
}

void convolve(const Convolution &job, int expert, int64_t first, int64_t last, int panel, int panel_end, bool packed) {
  bool may_be_few = job.direction == Direction::forward && reads_stretches(job);
  with_type(job.bfloat16, [&](auto number) {
    using T = decltype(number);
    with_scheme(job.grid, job.kernel, job.neighbours, [&](auto scheme) {
      using Scheme = decltype(scheme);
      if (may_be_few && has_few_pixels(job, expert, FEW<Scheme, T>))
        convolve_few<T>(job, expert, first, last, panel, panel_end);
      else convolve_in_tiles<Scheme, T>(job, expert, first, last, panel, panel_end, packed);
    });
  });
}

// ---- Gradient for the weights ---------------------------------------------------------------------------------------

// A thread's memory: rows of windows and of pixels' gradients, and sums, rows by output channel.
template <class Scheme, class T>
struct SumsMemory {
  static constexpr int together = NUMBERS<Element<T>>;
  int tiles;
  Tile *tile;
  T *zeros;
  Rows<Element<T>> windows, grads;
  Rows<> sums;

  SumsMemory(const WeightGrad &job, int outs, Room &room) {
    constexpr int unit = UNIT<Element<T>>;
    tiles = chunk_size<Scheme>(job.in_channels, outs);
    tile = room.take<Tile>(tiles);
    zeros = room.take<T>(most(job.in_channels, job.out_channels));
    int elements = round_up((tiles + together - 1) / together, unit);
    windows = take_rows<Element<T>>(room, Scheme::points, elements, job.in_channels);
    grads = take_rows<Element<T>>(room, Scheme::sums ? 1 : Scheme::points, elements, outs);
    if (Scheme::sums) grads.step = 0;
    sums = take_rows(room, Scheme::points, round_up(outs, unit), job.in_channels);
  }
};

// to[r] = sum over tiles of grads[r] * x, for ROWS output channels by a panel of input channels; added where `adds`.
template <int ROWS, int COLUMNS, class E>
inline void multiply_pairs(const E *grads, int64_t grads_stride, const E *x, int64_t x_stride, int count, bool adds,
                           float *to, int64_t stride) {
  Vector sums[ROWS][COLUMNS];
  clear(sums);
  if (adds)
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < COLUMNS; v++) sums[r][v] = load(to + r * stride + v * VECTOR);
  for (int i = 0; i < count; i++, x += x_stride, grads += grads_stride) {
    decltype(load(x)) values[COLUMNS];
    for (int v = 0; v < COLUMNS; v++) values[v] = load(x + v * VECTOR);
    for (int r = 0; r < ROWS; r++) {
      auto own = all(grads[r]);
      for (int v = 0; v < COLUMNS; v++) add_product(sums[r][v], own, values[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < COLUMNS; v++) store(to + r * stride + v * VECTOR, sums[r][v]);
}

#ifdef __AMX_BF16__
// As multiply_pairs, for `outs` output channels and all input channels; `count` is a multiple of UNIT.
void multiply_pairs_in_registers(const Pair *grads, int64_t grads_stride, const Pair *x, int64_t x_stride, int count, int outs,
                                 int ins, bool adds, float *to, int64_t stride) {
  alignas(64) float turned[(MOST_TILES / 2 + PANEL - 1) / PANEL][REGISTER * PANEL];  // gradients by channel
  for (int o = 0; o < outs; o += REGISTER, grads += REGISTER, to += REGISTER * stride) {
    for (int i = 0; i < count; i += 8)
      for (int k = 0; k < REGISTER; k += 8)
        transpose_eight(reinterpret_cast<const float *>(grads + i * grads_stride + k), grads_stride, nullptr, 0,
                        turned[i / PANEL] + k * PANEL + i % PANEL);
    is_read(turned);
    for (int c = 0; c < ins; c += PANEL) {
      float *sums = to + c, *behind = sums + VECTOR;
      _tile_zero(0);
      _tile_zero(1);
      if (adds) {
        _tile_loadd(0, sums, stride * sizeof(float));
        _tile_loadd(1, behind, stride * sizeof(float));
      }
      for (int i = 0; i < count; i += REGISTER) {
        const float *from = turned[i / PANEL] + i % PANEL;
        const Pair *columns = x + i * x_stride + c, *more = columns + VECTOR;
        _tile_loadd(2, from, PANEL * sizeof(float));
        _tile_loadd(3, columns, x_stride * sizeof(Pair));
        _tile_loadd(4, more, x_stride * sizeof(Pair));
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, sums, stride * sizeof(float));
      _tile_stored(1, behind, stride * sizeof(float));
    }
  }
}
#endif

// The sums as gradients of taps, [out][tap][in].
template <class Scheme>
void write_taps(const WeightGrad &job, int outs, const Rows<> &sums, float *grad_weight) {
  int ins = job.in_channels, taps = job.kernel * job.kernel, first_tap = Scheme::taps == 1 ? taps / 2 : 0;
  if (Scheme::taps < taps) std::memset(grad_weight, 0, sizeof(float) * outs * taps * ins);
  for (int o = 0; o < outs; o++)
    for (int c = 0; c < ins; c += VECTOR) {
      Vector in[Scheme::points], out[Scheme::taps];
#pragma GCC unroll 16
      for (int k = 0; k < Scheme::points; k++) in[k] = load(sums.at(k, o) + c);
      along_both<typename Scheme::WeighGrad>(in, out);
      for (int tap = 0; tap < Scheme::taps; tap++)
        store_some(grad_weight + (int64_t(o) * taps + first_tap + tap) * ins + c, out[tap], ins - c);
    }
}

template <class Scheme, class T>
void sum_in_tiles(const WeightGrad &job, int64_t first, int64_t last, int out, int out_end, float *grad_weight) {
  int outs = out_end - out, ins = job.in_channels;
  auto memory = in_scratch([&](Room &room) { return SumsMemory<Scheme, T>(job, outs, room); });
  TileRegisters registers(REGISTER, memory.together > 1);
  bool adds = false;
  std::memset(memory.zeros, 0, most(ins, job.out_channels) * sizeof(T));
  Walk walk = {job.grid, job.order, first, last, job.neighbours, Scheme::side};
  while (int count = walk.next(memory.tile, memory.tiles)) {
    int elements = round_up((count + memory.together - 1) / memory.together, UNIT<Element<T>>);
    bring_windows<Scheme>(job.grid, static_cast<const T *>(job.in), ins, 0, ins, memory.tile, count, memory.zeros,
                          memory.windows);
    bring_pixels<Scheme>(job.grid, static_cast<const T *>(job.grad), job.out_channels, out, out_end, memory.tile, count,
                         memory.zeros, memory.grads);
    for (int k = 0; k < Scheme::points; k++) {
#ifdef __AMX_BF16__
      if constexpr (memory.together > 1) {
        multiply_pairs_in_registers(memory.grads.at(k, 0), memory.grads.stride, memory.windows.at(k, 0),
                                    memory.windows.stride, elements, outs, ins, adds, memory.sums.at(k, 0),
                                    memory.sums.stride);
        continue;
      }
#endif
      for (int c = 0; c < ins; c += PANEL)
        with_columns(ins - c, [&](auto columns) {
          in_tiles(outs, [&](int o, auto rows) {
            multiply_pairs<decltype(rows)::value, decltype(columns)::value>(
                memory.grads.at(k, 0) + o, memory.grads.stride, memory.windows.at(k, 0) + c, memory.windows.stride,
                elements, adds, memory.sums.at(k, o) + c, memory.sums.stride);
          });
        });
    }
    adds = true;
  }
  write_taps<Scheme>(job, outs, memory.sums, grad_weight);
}

void weight_grad(const WeightGrad &job, int64_t first, int64_t last, int out, int out_end, float *grad_weight) {
  with_type(job.bfloat16, [&](auto number) {
    with_scheme(job.grid, job.kernel, job.neighbours, [&](auto scheme) {
      sum_in_tiles<decltype(scheme), decltype(number)>(job, first, last, out, out_end, grad_weight);
    });
  });
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

template <bool GELU, class T, class Out>
void affine_lines(const Affine &job, int64_t line, int64_t line_end, Out *out) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)};
  int channels = job.channels;
  const Out *residual = static_cast<const Out *>(job.epilogue.residual);
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    Out *to = out + pixel * channels;
    const T *from = static_cast<const T *>(job.x) + pixel * channels;
    const Out *added = residual ? residual + pixel * channels : nullptr;
    if (expert < 0) {
      if (added) std::memcpy(to, added, sizeof(Out) * count * channels);
      else std::memset(to, 0, sizeof(Out) * count * channels);
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

void affine(const Affine &job, int64_t line, int64_t line_end, void *out) {
  with_types(job.bfloat16, job.other_bfloat16, [&](auto number, auto other) {
    using T = decltype(number);
    using Out = decltype(other);
    auto run = job.epilogue.gelu ? affine_lines<true, T, Out> : affine_lines<false, T, Out>;
    run(job, line, line_end, static_cast<Out *>(out));
  });
}

template <class T>
void moments_of_lines(const Affine &job, const float *centre, int64_t line, int64_t line_end, float *sums) {
  int channels = job.channels;
  const T *x = static_cast<const T *>(job.x);
  for_runs(job, line, line_end, [&](int64_t expert, int64_t, int64_t pixel, int count) {
    if (expert < 0) return;
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector middle = load_some(centre + expert * channels + c, own), plain = {}, squares = {};
      for (int i = 0; i < count; i++) {
        Vector d = load_some(x + (pixel + i) * channels + c, own) - middle;
        plain += d;
        squares += d * d;
      }
      add_to(sums + expert * channels + c, plain, own);
      add_to(sums + (job.experts + expert) * channels + c, squares, own);
    }
  });
}

void moments(const Affine &job, const float *centre, int64_t line, int64_t line_end, float *sums) {
  with_type(job.bfloat16,
            [&](auto number) { moments_of_lines<decltype(number)>(job, centre, line, line_end, sums); });
}

template <bool GELU, class T, class Grad>
void affine_sums_lines(const Affine &job, const Grad *grad, const float *centre, int64_t line, int64_t line_end, float *sums,
                       float *grad_gate) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)}, middle = {centre, all(0)};
  const T *map = static_cast<const T *>(job.x);
  int channels = job.channels;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    if (expert < 0) return;
    Vector gate = all(gate_of(job, patch)), for_gate = {};
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector factor = scale(expert, channels, c), term = shift(expert, channels, c), mid = middle(expert, channels, c);
      Vector plain = {}, centred = {};
      for (int i = 0; i < count; i++) {
        Vector x = load_some(map + (pixel + i) * channels + c, own), y = x * factor + term;
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
      add_to(sums + expert * channels + c, plain * gate, own);
      add_to(sums + (job.experts + expert) * channels + c, centred * gate, own);
    }
    grad_gate[patch] += sum_of(for_gate);
  });
}

void affine_sums(const Affine &job, const void *grad, const float *centre, int64_t line, int64_t line_end, float *sums,
                 float *grad_gate) {
  with_types(job.bfloat16, job.other_bfloat16, [&](auto number, auto other) {
    using T = decltype(number);
    using Grad = decltype(other);
    auto run = job.epilogue.gelu ? affine_sums_lines<true, T, Grad> : affine_sums_lines<false, T, Grad>;
    run(job, static_cast<const Grad *>(grad), centre, line, line_end, sums, grad_gate);
  });
}

template <bool GELU, class T, class Grad>
void affine_grad_lines(const Affine &job, const Grad *grad, const float *slope, const float *offset, int64_t line,
                       int64_t line_end, T *out) {
  Own scale = {job.epilogue.scale, all(1)}, shift = {job.epilogue.shift, all(0)}, by_x = {slope, all(0)},
      alone = {offset, all(0)};
  const T *map = static_cast<const T *>(job.x);
  int channels = job.channels;
  for_runs(job, line, line_end, [&](int64_t expert, int64_t patch, int64_t pixel, int count) {
    if (expert < 0) {
      std::memset(out + pixel * channels, 0, sizeof(T) * count * channels);
      return;
    }
    Vector gate = all(gate_of(job, patch));
    for (int c = 0; c < channels; c += VECTOR) {
      int own = channels - c;
      Vector factor = scale(expert, channels, c), term = shift(expert, channels, c);
      Vector of_x = by_x(expert, channels, c), rest = alone(expert, channels, c), of_g = factor * gate;
      for (int i = 0; i < count; i++) {
        int64_t at = (pixel + i) * channels + c;
        Vector x = load_some(map + at, own), g = load_some(grad + at, own);
        if (GELU) {
          Vector slope = slope_of_gelu(x * factor + term);
          g *= slope;
        }
        store_some(out + at, g * of_g + (x * of_x + rest), own);
      }
    }
  });
}

void affine_grad(const Affine &job, const void *grad, const float *slope, const float *offset, int64_t line,
                 int64_t line_end, void *out) {
  with_types(job.bfloat16, job.other_bfloat16, [&](auto number, auto other) {
    using T = decltype(number);
    using Grad = decltype(other);
    auto run = job.epilogue.gelu ? affine_grad_lines<true, T, Grad> : affine_grad_lines<false, T, Grad>;
    run(job, static_cast<const Grad *>(grad), slope, offset, line, line_end, static_cast<T *>(out));
  });
}

// ---- The router's first layer ---------------------------------------------------------------------------------------

constexpr int STRETCH = 96;  // pixels side by side, or rows, that are computed at a time

void pack_layer(const float *weight, int64_t out_stride, int64_t in_stride, int outs, int ins, float *to) {
  for (int p = 0; p < panels(outs); p++)
    pack_panel({weight + p * PANEL * out_stride, out_stride, in_stride, 0}, {}, least(PANEL, outs - p * PANEL), ins,
               to + int64_t(p) * ins * PANEL);
}

// Rows of `ins` numbers times a packed layer, into or added to rows of `outs` numbers.
void multiply_layer(Points<> &points, const float *rows, int64_t stride, int count, const float *packed, int ins, bool adds,
                    float *to, int64_t to_stride, int outs) {
  std::memset(points.counts, 0, sizeof points.counts);
  points.start[0] = 0, points.length[0] = ins;
  for (int i = 0; i < count; i++) points.add(0, rows + i * stride, to + i * to_stride);
  multiply_points(points, packed, int64_t(ins) * PANEL, adds, outs);
}

Points<> take_points(Room &room, int most) {
  Points<> points;
  points.products = room.take<Product<float>>(most), points.room = most;
  return points;
}

void linear(const Linear &job, float *out) {
  Points<> points;
  float *packed = in_scratch([&](Room &room) {
    points = take_points(room, STRETCH);
    return room.take(int64_t(panels(job.outs)) * PANEL * job.ins);
  });
  pack_layer(job.weight, job.weight_stride, 1, job.outs, job.ins, packed);
  for (int64_t i = 0; i < job.count; i += STRETCH) {
    int count = least(STRETCH, job.count - i);
    float *to = out + i * job.outs;
    for (int k = 0; k < count; k++)
      for (int o = 0; o < job.outs; o++) to[k * job.outs + o] = job.bias ? job.bias[o] : 0;
    multiply_layer(points, job.in + i * job.ins, job.ins, count, packed, job.ins, true, to, job.outs, job.outs);
  }
}

// A thread's memory: the layer's weights for both directions; of a stretch of pixels the hidden values, before the
// activation or their gradients, and what is read; sums by patch, and of the weights' gradient [hidden][channel].
struct LayerMemory {
  Points<> points;
  float *forward, *backward, *patches, *weights;
  Rows<> hidden, inputs;

  LayerMemory(const Perceptron &job, Room &room) {
    int64_t width = row_stride(job.hidden);
    points = take_points(room, STRETCH);
    forward = room.take(width * job.channels), backward = room.take(row_stride(job.channels) * job.hidden);
    patches = room.take(job.grid.columns * width), weights = room.take(job.hidden * row_stride(job.channels));
    hidden = take_rows(room, 1, STRETCH, job.hidden), inputs = take_rows(room, 1, STRETCH, job.channels);
  }
};

// Calls what(y, x, pixel, count) for stretches of pixels of lines of patches, with their hidden values.
template <class What>
void for_stretches(const Perceptron &job, int64_t line, LayerMemory &memory, const What &what) {
  const Grid &grid = job.grid;
  int64_t image = line / grid.rows, top = line % grid.rows * grid.side, bottom = least(top + grid.side, grid.height);
  for (int64_t y = top; y < bottom; y++)
    for (int64_t x = 0; x < grid.width; x += STRETCH) {
      int64_t pixel = (image * grid.height + y) * grid.width + x;
      int count = least(STRETCH, grid.width - x);
      for (int i = 0; i < count; i++)
        for (int h = 0; h < job.hidden; h += VECTOR) {
          int own = job.hidden - h;
          store(memory.hidden.at(0, i) + h,
                load_some(job.rows + y * job.hidden + h, own) + load_some(job.columns + (x + i) * job.hidden + h, own));
        }
      multiply_layer(memory.points, job.x + pixel * job.channels, job.channels, count, memory.forward, job.channels, true,
                     memory.hidden.data, memory.hidden.stride, round_up(job.hidden, VECTOR));
      what(y, x, pixel, count);
    }
}

// The share of a pixel in the mean over its patch.
inline float share_of(const Grid &grid, int64_t line, int64_t column) {
  int64_t top = line % grid.rows * grid.side, left = column * grid.side;
  return 1.0f / (least(grid.side, grid.height - top) * least(grid.side, grid.width - left));
}

void perceptron(const Perceptron &job, int64_t line, int64_t line_end, float *out) {
  const Grid &grid = job.grid;
  LayerMemory memory = in_scratch([&](Room &room) { return LayerMemory(job, room); });
  int64_t width = row_stride(job.hidden);
  pack_layer(job.weight, job.weight_stride, 1, job.hidden, job.channels, memory.forward);
  for (; line < line_end; line++) {
    std::memset(memory.patches, 0, sizeof(float) * grid.columns * width);
    for_stretches(job, line, memory, [&](int64_t, int64_t x, int64_t, int count) {
      for (int i = 0; i < count; i++) {
        float *sums = memory.patches + (x + i) / grid.side * width;
        const float *own = memory.hidden.at(0, i);
        for (int h = 0; h < job.hidden; h += VECTOR) store(sums + h, load(sums + h) + gelu(load(own + h)));
      }
    });
    for (int column = 0; column < grid.columns; column++) {
      float share = share_of(grid, line, column), *to = out + (line * grid.columns + column) * job.hidden;
      for (int h = 0; h < job.hidden; h++) to[h] = memory.patches[column * width + h] * share;
    }
  }
}

// The hidden values of a stretch become gradients, which are added to those of the row and of the columns.
void grads_of_hidden(const Perceptron &job, const float *grad, int64_t line, int64_t y, int64_t x, int count,
                     const LayerMemory &memory, float *grad_rows, float *grad_columns) {
  for (int i = 0; i < count; i++) {
    int64_t column = (x + i) / job.grid.side;
    Vector share = all(share_of(job.grid, line, column));
    const float *from = grad + (line * job.grid.columns + column) * job.hidden;
    for (int h = 0; h < job.hidden; h += VECTOR) {
      int own = job.hidden - h;
      float *hidden = memory.hidden.at(0, i) + h;
      Vector g = load_some(from + h, own) * slope_of_gelu(load(hidden)) * share;
      store(hidden, g);
      add_to(grad_rows + y * job.hidden + h, g, own);
      add_to(grad_columns + (x + i) * job.hidden + h, g, own);
    }
  }
}

void perceptron_grad(const Perceptron &job, const float *grad, int64_t line, int64_t line_end, float *grad_x,
                     float *grad_weight, float *grad_rows, float *grad_columns) {
  LayerMemory memory = in_scratch([&](Room &room) { return LayerMemory(job, room); });
  int channels = job.channels;
  int64_t stride = memory.inputs.stride;
  pack_layer(job.weight, job.weight_stride, 1, job.hidden, channels, memory.forward);
  if (grad_x) pack_layer(job.weight, 1, job.weight_stride, channels, job.hidden, memory.backward);
  std::memset(memory.weights, 0, sizeof(float) * job.hidden * stride);
  for (; line < line_end; line++)
    for_stretches(job, line, memory, [&](int64_t y, int64_t x, int64_t pixel, int count) {
      grads_of_hidden(job, grad, line, y, x, count, memory, grad_rows, grad_columns);
      for (int i = 0; i < count; i++) {
        const float *cell = job.x + (pixel + i) * channels;
        bring<Same<1>>(&cell, channels, memory.inputs.at(0, i), 0);
      }
      for (int c = 0; c < channels; c += PANEL)
        with_columns(channels - c, [&](auto columns) {
          in_tiles(job.hidden, [&](int h, auto rows) {
            multiply_pairs<decltype(rows)::value, decltype(columns)::value>(
                memory.hidden.data + h, memory.hidden.stride, memory.inputs.data + c, stride, count, true,
                memory.weights + h * stride + c, stride);
          });
        });
      if (grad_x)
        multiply_layer(memory.points, memory.hidden.data, memory.hidden.stride, count, memory.backward, job.hidden, false,
                       grad_x + pixel * channels, channels, channels);
    });
  for (int h = 0; h < job.hidden; h++)
    for (int c = 0; c < channels; c += VECTOR)
      add_to(grad_weight + int64_t(h) * channels + c, load(memory.weights + h * stride + c), channels - c);
}

inline int32_t in_order(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }  // and back

// In blocks of patches, whose loops have no branch, so that the compiler does them for several patches at once.
void leads(const Preferences &job, int64_t first, int64_t last, int32_t *out) {
  constexpr int BLOCK = 64;
  float *best = scratch((job.top_k + 1) * BLOCK);  // scores of each patch, the best first
  for (; first < last; first += BLOCK) {
    int count = int(least(BLOCK, last - first));
    for (int64_t i = 0; i < (job.top_k + 1) * BLOCK; i++) best[i] = -__builtin_inff();
    for (int64_t e = 0; e < job.experts; e++) {
      const float *scores = job.scores + e * job.patches + first;
      float own[BLOCK];
      for (int i = 0; i < count; i++) own[i] = scores[i] + job.bias[e];
      for (float *place = best; place <= best + job.top_k * BLOCK; place += BLOCK)
        for (int i = 0; i < count; i++) {
          float better = place[i] < own[i] ? own[i] : place[i];
          own[i] = place[i] < own[i] ? place[i] : own[i], place[i] = better;
        }
    }
    const float *first_out = best + job.top_k * BLOCK, *last_in = first_out - BLOCK;
    for (int64_t e = 0; e < job.experts; e++) {
      const float *scores = job.scores + e * job.patches + first;
      for (int i = 0; i < count; i++) {
        float own = scores[i] + job.bias[e], lead = own - (own >= last_in[i] ? first_out[i] : last_in[i]);
        int32_t bits;
        std::memcpy(&bits, &lead, sizeof bits);
        out[e * job.patches + first + i] = in_order(bits);
      }
    }
  }
}

// The range that has rank `share` is halved until no other number is in it.
float border(const int32_t *leads, int64_t count, int64_t share) {
  int64_t low = INT32_MIN, high = int64_t(INT32_MAX) + 1, from_low = count, from_high = 0;  // how many are not below them
  while (from_low - from_high > 1 && high - low > 1) {
    int64_t middle = (low + high) >> 1;
    int32_t bound = int32_t(middle), found = 0;
    for (int64_t i = 0; i < count; i++) found += leads[i] >= bound;
    if (found > share) low = middle, from_low = found;
    else high = middle, from_high = found;
  }
  int32_t bound = int32_t(high - 1), next = INT32_MIN, last = INT32_MAX;  // next has rank `share`, last is the one above
  for (int64_t i = 0; i < count; i++) {
    int32_t below = leads[i] > bound ? INT32_MIN : leads[i], above = leads[i] > bound ? leads[i] : INT32_MAX;
    next = next < below ? below : next, last = above < last ? above : last;
  }
  int32_t bits[2] = {in_order(next), in_order(from_high == share ? last : next)};
  float both[2];
  std::memcpy(both, bits, sizeof both);
  return 0.5f * (both[0] + both[1]);
}

}  // namespace

extern const Kernels TABLE;
const Kernels TABLE = {
    NAME,   TAKES_BFLOAT16, convolve,    panels, weight_grad, affine,
    moments, affine_sums,   affine_grad, linear, perceptron,  perceptron_grad,
    leads,  border,
};

}  // namespace pcenet
