// The register-tile kernels under every matrix product, one table for each instruction set.
// This header is read by files compiled for AVX-512: declarations only, and no inline function
// that the linker could share with code that must run everywhere.
#pragma once

#include <cstdint>

// Whether the compiler knows the matrix unit.
#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11
#define FUSED_SO_HAS_AMX
#endif

namespace fused_so {

// No tile has more lanes, no panel is deeper; `factor` takes so many rows.
constexpr int64_t kMaxLanes = 32, kMaxDepth = 512, kFactorRows = 16;

// float16 and bfloat16 as their bits: torch's classes bring inline functions with them.
struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

// Packs `depth` slices of a panel, each padded with zeros to the panel's width:
//   panel[p * width + i] = source[i * lane_stride + p * depth_stride] - u[i] v[p]
// for i < lanes, or in the order that the tiles of a matrix unit want. u or v may be null, meaning
// ones; both null, nothing is subtracted.
template <class T, class S>
using PackPanel = void (*)(const S* source, int64_t lane_stride, int64_t depth_stride,
                           int64_t lanes, int64_t depth, const T* u, const T* v, T* panel);

// Adds to column sums and, unless `squares` is null, to column sums of squares, in float64.
template <class S>
using SumColumns = void (*)(const S* source, int64_t row_stride, int64_t col_stride, int64_t rows,
                            int64_t cols, double* sums, double* squares);

// to[j] = scale (source[j col_stride] - u v[j]); a null v means ones.
template <class T, class S>
using ScaleRow = void (*)(const S* source, int64_t col_stride, int64_t count, T scale, T u,
                          const T* v, T* to);

// to[j] = source[j col_stride] factor[j]; returns sum_j to[j] other[j]. A null factor means ones,
// a null other zeros.
template <class T, class S>
using MultiplyRow = T (*)(const S* source, int64_t col_stride, int64_t count, const T* factor,
                          const T* other, T* to);

template <class T>
struct UpdateRule;

// A parameter update of `count` entries; buffer may be null, meaning no momentum.
template <class T, class P, class U>
using UpdateEntries = void (*)(int64_t count, const UpdateRule<T>& rule, T scale, P* param,
                               const U* update, T* buffer);

// What reads an input of dtype S, or writes one: a param with an update of its dtype or of T.
template <class T, class S>
struct Readers {
  SumColumns<S> sum_columns;
  ScaleRow<T, S> scale_row;
  MultiplyRow<T, S> multiply_row;
  UpdateEntries<T, S, S> update;
  UpdateEntries<T, S, T> update_wide;
};

template <class T, class S>
struct Packers {
  PackPanel<T, S> pack_a;
  PackPanel<T, S> pack_b;
};

// One of them for each dtype that is accumulated in T.
template <class T, template <class, class> class For>
struct ForAll;
template <template <class, class> class For>
struct ForAll<float, For> : For<float, float>, For<float, HalfBits>, For<float, BFloat16Bits> {};
template <template <class, class> class For>
struct ForAll<double, For> : For<double, double> {};

// How products are made: what panels look like, and what multiplies them.
template <class T>
struct Tiles {
  int64_t mr, nr;            // the tile of C held in registers; nr is two vectors
  int64_t a_width, b_width;  // a packed panel's width, in T for each slice
  int64_t row_step;          // tiles have multiples of it as rows
  int64_t depth_step;        // panels are padded with zeros to a multiple of it in depth
  int64_t max_depth;         // of a panel: longer sums of one accumulator lose accuracy
  int64_t tail;              // what a panel holds beside its slices, in T
  int64_t task_bytes;        // panels that one task may keep in L2, beside those all share
  bool one_format;           // a panel of B serves as one of A in `square`
  // C[rows, cols] = beta C + alpha A B from a panel of B, and of A whose slices are a_step apart;
  // beta = 0 does not read C. multiply[v][r] is for row_step (r + 1) rows and v + 1 vectors of
  // columns.
  void (*multiply[2][7])(int64_t depth, const T* a, int64_t a_step, const T* b, T alpha, T beta,
                         T* c, int64_t ldc);
  // C[nr, nr] = beta C + A B, from a panel of A of nr lanes or, with one_format, of B.
  void (*square)(int64_t depth, const T* a, const T* b, T beta, T* c, int64_t ldc);
  // Around multiply and square, where the unit that runs them has a state; else null.
  void (*begin)(void* before);
  void (*end)(const void* before);
  ForAll<T, Packers> packers;
};

template <class T>
struct Microkernel {
  Tiles<T> tiles;
  // to[cols, rows] = from[rows, cols]^T.
  void (*transpose)(int64_t rows, int64_t cols, const T* from, int64_t from_stride, T* to,
                    int64_t to_stride);
  // sum_i x[i stride] y[i], in float64.
  double (*dot)(int64_t count, const T* x, int64_t stride, const T* y);
  // In place, kFactorRows rows with leading dimension ld: the upper triangle of A = L L^T in, L^-1
  // with zeros above it out. Returns 0, or the order of the first leading minor that is not
  // positive definite.
  int64_t (*factor)(T* a, int64_t ld);
  // to[j] = sum_i weights[i] x[i row_stride + j].
  void (*combine_rows)(int64_t rows, int64_t cols, const T* weights, const T* x, int64_t row_stride,
                       T* to);
  ForAll<T, Readers> readers;
};

struct Microkernels {
  const char* name;
  Microkernel<float> f32;
  Microkernel<double> f64;
  // Tiles of a matrix unit, or null. They are worth it where m n > large_from (m + n): they save
  // half of m n k multiplications, and add half of large_from to the packing of each of (m + n) k
  // entries.
  const Tiles<float>* f32_large;
  int64_t large_from;
};

#if defined(__x86_64__)
extern const Microkernels kAvx512Microkernels;
extern const Microkernels kAvx2Microkernels;
#endif
#if defined(FUSED_SO_HAS_AMX)
extern const Tiles<float> kAmxTiles;
#endif
extern const Microkernels kPortableMicrokernels;

// The fastest set this processor runs, or the one named by the environment variable
// FUSED_SO_CPU=amx|avx512|avx2|portable; chosen at the first call. Named, amx also makes products
// that vectors make faster.
const Microkernels& microkernels();

}  // namespace fused_so
