// The body of the microkernel_*.cpp files, written in GCC's vector extensions. Each of them first
// sets its target, and FUSED_SO_AVX512 or FUSED_SO_AVX2 (GCC 12 defines its own macros too late),
// and instantiates this with its own vector and tile sizes. Everything here has internal linkage,
// no standard header is included, and there are no lambdas: GCC does not give them the target of
// the file.
#pragma once

#include "common/microkernel.h"
#include "common/update_rule.h"

namespace fused_so {
namespace {

template <class T, int V>
struct Vectors {
  typedef T Type __attribute__((vector_size(V * sizeof(T))));
};
template <class T, int V>
using Vector = typename Vectors<T, V>::Type;

template <int Size>
struct Integer;
template <>
struct Integer<4> {
  using Type = int32_t;
};
template <>
struct Integer<8> {
  using Type = int64_t;
};

template <class To, class From>
To load_as(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(To));
  return to;
}

template <class T, int V>
void store(T* to, Vector<T, V> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// Loads V neighbours, converted to T.
template <class T, int V>
Vector<T, V> load(const T* from) {
  return load_as<Vector<T, V>>(from);
}

template <class T, int V>
Vector<T, V> load(const BFloat16Bits* from) {
  const auto bits = load_as<Vector<uint16_t, V>>(from);
  return (Vector<float, V>)(__builtin_convertvector(bits, Vector<uint32_t, V>) << 16);
}

template <class T, int V>
Vector<T, V> load(const HalfBits* from) {
  using Bits = Vector<uint32_t, V>;
  const Bits half = __builtin_convertvector(load_as<Vector<uint16_t, V>>(from), Bits);
  const Bits magnitude = half & 0x7fff;
  // Exponents are rebiased by 127 - 15; infinity and NaN get the float's largest exponent.
  const Bits rebias = Bits{} + (112u << 23);
  const Bits normal = (magnitude << 13) + rebias;
  const Bits special = normal + rebias;
  // 0.5 has a last place of 2^-24, that of a subnormal half: 0.5 + x holds x in its last bits.
  const Bits subnormal = (Bits)((Vector<float, V>)(magnitude | 0x3f000000u) - 0.5f);
  Bits bits = magnitude < 0x0400u ? subnormal : normal;
  bits = magnitude >= 0x7c00u ? special : bits;
  return (Vector<float, V>)(bits | ((half & 0x8000u) << 16));
}

// Stores V neighbours, rounded to the nearest, and to the even one of two.
template <int V>
void store_as(float* to, Vector<float, V> x) {
  store<float, V>(to, x);
}
template <int V>
void store_as(double* to, Vector<double, V> x) {
  store<double, V>(to, x);
}

template <int V>
void store_bits(void* to, Vector<uint32_t, V> bits) {
  const auto narrow = __builtin_convertvector(bits, Vector<uint16_t, V>);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

template <int V>
void store_as(BFloat16Bits* to, Vector<float, V> x) {
  using Bits = Vector<uint32_t, V>;
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  store_bits<V>(to, (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded);
}

template <int V>
void store_as(HalfBits* to, Vector<float, V> x) {
  using Bits = Vector<uint32_t, V>;
  const Bits magnitude = (Bits)x & 0x7fffffffu;
  // With 2^e the largest power of two in x, or a half's least, 2^-14, the last place of 2^(e + 13)
  // is 2^(e - 10), that of a half: adding the two rounds x.
  const Bits exponent = magnitude & 0x7f800000u, least = Bits{} + (113u << 23);
  const Bits anchor = (exponent > least ? exponent : least) + (13u << 23);
  const Bits sum = (Bits)((Vector<float, V>)anchor + (Vector<float, V>)magnitude);
  // x = 2^(e - 10) (sum - anchor) are the bits of a half with exponent e + 15, less its leading 1.
  Bits half = (((anchor >> 23) - 126u) << 10) + (sum - anchor);
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;  // from 65520 on
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  store_bits<V>(to, half | (((Bits)x >> 16) & 0x8000u));
}

// Copies `count` < 2 W elements, converted, in pieces of W, W/2 .. 1.
template <class T, int W, class S>
void copy_some(const S* from, int64_t count, T* to) {
  if constexpr (W > 0) {
    if (count >= W) {
      if constexpr (W == 1 && sizeof(S) != sizeof(T)) {
        const S pair[2] = {*from};
        *to = load<T, 2>(pair)[0];
      } else if constexpr (W == 1) {
        *to = *from;
      } else {
        store<T, W>(to, load<T, W>(from));
      }
      from += W, to += W, count -= W;
    }
    copy_some<T, W / 2>(from, count, to);
  }
}

// Loads `count` neighbours and zeros after them.
template <class T, int V, class S>
Vector<T, V> load_some(const S* from, int64_t count) {
  if (count >= V) return load<T, V>(from);
  alignas(V * sizeof(T)) T some[V] = {};
  copy_some<T, V / 2>(from, count, some);
  return load<T, V>(some);
}

template <class T, int MR, int NV, int V, int BWidth>
void tile(int64_t depth, const T* a, int64_t a_step, const T* b, T alpha, T beta, T* c,
          int64_t ldc) {
  Vector<T, V> sum[MR][NV] = {};
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    // The tile of C is wanted in depth * MR cycles.
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + NV * V - 1, 1);
  }
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; ++p) {
    Vector<T, V> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load<T, V>(b + j * V);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] += a[i] * row[j];
    }
    a += a_step;
    b += BWidth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* to = c + i * ldc + j * V;
      const Vector<T, V> scaled = alpha * sum[i][j];
      store<T, V>(to, beta == 0 ? scaled : beta * load<T, V>(to) + scaled);
    }
  }
}

// V vectors as rows become columns: log2 V rounds that swap the off-diagonal blocks of size s.
template <class T, int V>
void transpose(Vector<T, V> (&rows)[V]) {
  using Index = Vector<typename Integer<sizeof(T)>::Type, V>;
  Index lane = {};
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int s = 1; s < V; s *= 2) {
    const Index upper = (lane & s) != 0;
    const Index to_low = upper ? lane - s + V : lane;
    const Index to_high = upper ? lane + V : lane + s;
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) {
      if (i & s) continue;
      const Vector<T, V> low = rows[i], high = rows[i + s];
      rows[i] = __builtin_shuffle(low, high, to_low);
      rows[i + s] = __builtin_shuffle(low, high, to_high);
    }
  }
}

// Sources are read in long strides, which the hardware does not foresee: this many slices ahead.
constexpr int64_t kSlicesAhead = 12;

// Writes x - u v[p] at slice p of a panel.
template <class T, int V, int Width>
struct PanelWriter {
  Vector<T, V> u[Width / V];
  const T* v;
  bool subtract;
  T* panel;

  PanelWriter(const T* u_values, const T* v_values, int64_t lanes, T* to)
      : v(v_values), subtract(u_values != nullptr || v_values != nullptr), panel(to) {
    // Lanes beyond the last one are zero, with or without a subtrahend.
    for (int block = 0; block < Width / V; ++block) {
      u[block] = Vector<T, V>{};
      for (int i = 0; i < V && block * V + i < lanes; ++i) {
        u[block][i] = u_values != nullptr ? u_values[block * V + i] : T(1);
      }
    }
  }

  template <bool Subtract>
  void write(Vector<T, V> x, int block, int64_t p) const {
    if constexpr (Subtract) x -= u[block] * (v != nullptr ? v[p] : T(1));
    store<T, V>(panel + p * Width + block * V, x);
  }
};

// The lanes of a slice are neighbours in memory: slices are copied.
template <bool Subtract, class T, int V, int Width, class S>
void copy_slices(const S* source, int64_t depth_stride, int64_t lanes, int64_t depth,
                 const PanelWriter<T, V, Width>& writer) {
  using Index = Vector<typename Integer<sizeof(T)>::Type, V>;
  Index lane = {};
  for (int i = 0; i < V; ++i) lane[i] = i;
  // A whole slice may be read as long as it ends before the matrix does.
  const int64_t last = (depth - 1) * depth_stride + lanes - Width;
  for (int64_t p = 0; p < depth; ++p) {
    const S* from = source + p * depth_stride;
    __builtin_prefetch(from + kSlicesAhead * depth_stride);
    if (Width * sizeof(S) > 64) __builtin_prefetch(from + kSlicesAhead * depth_stride + Width / 2);
    const bool whole = lanes >= Width || (depth_stride > 0 && p * depth_stride <= last);
#pragma GCC unroll 4
    for (int block = 0; block < Width / V; ++block) {
      const int64_t present = lanes - block * V;
      Vector<T, V> x = {};
      if (whole) {
        x = load<T, V>(from + block * V);
      } else if (present > 0) {
        x = load_some<T, V>(from + block * V, present);
      }
      if (lanes < Width) {
        x = (Vector<T, V>)((Index)x & (lane < (typename Integer<sizeof(T)>::Type)present));
      }
      writer.template write<Subtract>(x, block, p);
    }
  }
}

// The entries of a lane are neighbours in memory: V x V blocks are turned over.
template <bool Subtract, class T, int V, int Width, class S>
void transpose_lanes(const S* source, int64_t lane_stride, int64_t lanes, int64_t depth,
                     const PanelWriter<T, V, Width>& writer) {
  for (int64_t p = 0; p < depth; p += V) {
    for (int block = 0; block < Width / V; ++block) {
      const S* from = source + block * V * lane_stride + p;
      const int64_t present = lanes - block * V, slices = depth - p;
      Vector<T, V> rows[V];
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) {
        if (i >= present) {
          rows[i] = Vector<T, V>{};
        } else if (slices >= V) {
          rows[i] = load<T, V>(from + i * lane_stride);
          __builtin_prefetch(from + i * lane_stride + 4 * V);
        } else {
          rows[i] = load_some<T, V>(from + i * lane_stride, slices);
        }
      }
      transpose<T, V>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) {
        if (i < slices) writer.template write<Subtract>(rows[i], block, p + i);
      }
    }
  }
}

template <bool Subtract, class T, int V, int Width, class S>
void gather_slices(const S* source, int64_t lane_stride, int64_t depth_stride, int64_t lanes,
                   int64_t depth, const PanelWriter<T, V, Width>& writer) {
  for (int64_t p = 0; p < depth; ++p) {
    for (int block = 0; block < Width / V; ++block) {
      Vector<T, V> x = {};
      for (int i = 0; i < V && block * V + i < lanes; ++i) {
        const S* from = source + (block * V + i) * lane_stride + p * depth_stride;
        x[i] = load_some<T, V>(from, 1)[0];
      }
      writer.template write<Subtract>(x, block, p);
    }
  }
}

template <bool Subtract, class T, int V, int Width, class S>
void pack_with(const S* source, int64_t lane_stride, int64_t depth_stride, int64_t lanes,
               int64_t depth, const PanelWriter<T, V, Width>& writer) {
  if (lane_stride == 1) {
    copy_slices<Subtract>(source, depth_stride, lanes, depth, writer);
  } else if (depth_stride == 1) {
    transpose_lanes<Subtract>(source, lane_stride, lanes, depth, writer);
  } else {
    gather_slices<Subtract>(source, lane_stride, depth_stride, lanes, depth, writer);
  }
}

template <class T, int V, int Width, class S>
void pack_panel(const S* source, int64_t lane_stride, int64_t depth_stride, int64_t lanes,
                int64_t depth, const T* u, const T* v, T* panel) {
  const PanelWriter<T, V, Width> writer(u, v, lanes, panel);
  if (writer.subtract) {
    pack_with<true>(source, lane_stride, depth_stride, lanes, depth, writer);
  } else {
    pack_with<false>(source, lane_stride, depth_stride, lanes, depth, writer);
  }
}

// To float64 in one instruction where there is one: GCC 12 makes __builtin_convertvector six.
template <class T, int V>
Vector<double, V> widen(Vector<T, V> x) {
#if defined(FUSED_SO_AVX512) && !defined(__clang__)
  if constexpr (sizeof(T) == sizeof(float) && V == 8) {
    constexpr int kCurrentRounding = 4;
    return __builtin_ia32_cvtps2pd512_mask(x, Vector<double, V>{}, -1, kCurrentRounding);
  }
#endif
#if defined(FUSED_SO_AVX2) && !defined(__clang__)
  if constexpr (sizeof(T) == sizeof(float) && V == 4) return __builtin_ia32_cvtps2pd256(x);
#endif
  return __builtin_convertvector(x, Vector<double, V>);
}

// V entries as float64.
template <class T, int V, class S>
Vector<double, V> load_doubles(const S* from, int64_t count) {
  return widen<T, V>(load_some<T, V>(from, count));
}

// `Blocks` vectors of neighbouring columns; the last of them may be partial, with `last` columns.
template <bool Squares, int Blocks, class T, int V, class S>
void sum_blocks(const S* source, int64_t row_stride, int64_t rows, int64_t last, double* sums,
                double* squares) {
  Vector<double, V> sum[Blocks] = {}, square[Blocks] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = source + i * row_stride;
    __builtin_prefetch(from + kSlicesAhead * row_stride);
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const int64_t count = b == Blocks - 1 ? last : V;
      const Vector<double, V> x = load_doubles<T, V>(from + b * V, count);
      sum[b] += x;
      if constexpr (Squares) square[b] += x * x;
    }
  }
  for (int64_t l = 0; l < (Blocks - 1) * V + last; ++l) {
    sums[l] += sum[l / V][l % V];
    if constexpr (Squares) squares[l] += square[l / V][l % V];
  }
}

template <bool Squares, class T, int V, class S>
void sum_neighbours(const S* source, int64_t row_stride, int64_t rows, int64_t cols, double* sums,
                    double* squares) {
  constexpr int kBlocks = 4;
  for (int64_t j = 0; j < cols;) {
    double* const square = Squares ? squares + j : nullptr;
    if (cols - j >= kBlocks * V) {
      sum_blocks<Squares, kBlocks, T, V>(source + j, row_stride, rows, V, sums + j, square);
      j += kBlocks * V;
    } else {
      const int64_t last = cols - j < V ? cols - j : V;
      sum_blocks<Squares, 1, T, V>(source + j, row_stride, rows, last, sums + j, square);
      j += last;
    }
  }
}

template <bool Squares, class T, int V, class S>
void sum_any(const S* source, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols,
             double* sums, double* squares) {
  if (col_stride == 1) {
    return sum_neighbours<Squares, T, V>(source, row_stride, rows, cols, sums, squares);
  }
  for (int64_t j = 0; j < cols; ++j) {
    Vector<double, V> sum = {}, square = {};
    for (int64_t i = 0; i < rows; i += V) {
      const S* from = source + i * row_stride + j * col_stride;
      Vector<double, V> x = {};
      if (row_stride == 1) {
        x = load_doubles<T, V>(from, rows - i);
      } else {
        for (int l = 0; l < V && i + l < rows; ++l)
          x[l] = load_some<T, V>(from + l * row_stride, 1)[0];
      }
      sum += x;
      if constexpr (Squares) square += x * x;
    }
    for (int l = 0; l < V; ++l) {
      sums[j] += sum[l];
      if constexpr (Squares) squares[j] += square[l];
    }
  }
}

template <class T, int V, class S>
void sum_columns(const S* source, int64_t row_stride, int64_t col_stride, int64_t rows,
                 int64_t cols, double* sums, double* squares) {
  if (squares != nullptr) {
    sum_any<true, T, V>(source, row_stride, col_stride, rows, cols, sums, squares);
  } else {
    sum_any<false, T, V>(source, row_stride, col_stride, rows, cols, sums, squares);
  }
}

template <class T, int V, class S>
void scale_row(const S* source, int64_t col_stride, int64_t count, T scale, T u, const T* v,
               T* to) {
  int64_t j = 0;
  for (; col_stride == 1 && j + V <= count; j += V) {
    const Vector<T, V> rank_one = v != nullptr ? u * load<T, V>(v + j) : Vector<T, V>{} + u;
    store<T, V>(to + j, scale * (load<T, V>(source + j) - rank_one));
  }
  for (; j < count; ++j) {
    const T x = load_some<T, V>(source + j * col_stride, 1)[0];
    to[j] = scale * (x - (v != nullptr ? u * v[j] : u));
  }
}

// `count` <= V entries of multiply_row, neighbours; adds their products with `other` to `sum`.
template <class T, int V, class S>
void multiply_some(const S* source, int64_t count, const T* factor, const T* other, T* to,
                   Vector<T, V>& sum) {
  Vector<T, V> x = load_some<T, V>(source, count);
  if (factor != nullptr) x *= load_some<T, V>(factor, count);
  if (other != nullptr) sum += x * load_some<T, V>(other, count);
  if (count == V) {
    store<T, V>(to, x);
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = x[j];
  }
}

template <class T>
const T* after(const T* x, int64_t count) {
  return x != nullptr ? x + count : x;
}

template <class T, int V, class S>
T multiply_row(const S* source, int64_t col_stride, int64_t count, const T* factor, const T* other,
               T* to) {
  constexpr int kSums = 2;  // chains of additions in flight
  Vector<T, V> sums[kSums] = {};
  int64_t j = 0;
  for (; col_stride == 1 && j + kSums * V <= count; j += kSums * V) {
#pragma GCC unroll 2
    for (int b = 0; b < kSums; ++b) {
      const int64_t k = j + b * V;
      multiply_some<T, V>(source + k, V, after(factor, k), after(other, k), to + k, sums[b]);
    }
  }
  for (; j < count; j += V) {
    const int64_t some = count - j < V ? count - j : V;
    const T *const f = after(factor, j), *const o = after(other, j);
    if (col_stride == 1) {
      multiply_some<T, V>(source + j, some, f, o, to + j, sums[0]);
      continue;
    }
    T gathered[V];
    for (int64_t l = 0; l < some; ++l) {
      gathered[l] = load_some<T, V>(source + (j + l) * col_stride, 1)[0];
    }
    multiply_some<T, V>(gathered, some, f, o, to + j, sums[0]);
  }
  const Vector<T, V> total = sums[0] + sums[1];
  T sum = 0;
  for (int l = 0; l < V; ++l) sum += total[l];
  return sum;
}

// V is the number of float64 in a vector.
template <class T, int V>
double dot(int64_t count, const T* x, int64_t stride, const T* y) {
  constexpr int kSums = 4;  // chains of additions in flight
  Vector<double, V> sums[kSums] = {};
  int64_t i = 0;
  for (; stride == 1 && i + kSums * V <= count; i += kSums * V) {
#pragma GCC unroll 4
    for (int b = 0; b < kSums; ++b) {
      sums[b] += widen<T, V>(load<T, V>(x + i + b * V)) * widen<T, V>(load<T, V>(y + i + b * V));
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(x[i * stride]) * y[i];
  const Vector<double, V> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int l = 0; l < V; ++l) sum += total[l];
  return sum;
}

// `Blocks` vectors of neighbouring columns, or one of `count` columns. Sums of 64 rows are added
// up, so that the rounding of a long sum stays small.
template <int Blocks, class T, int V>
void combine_blocks(int64_t rows, int64_t count, const T* weights, const T* x, int64_t row_stride,
                    T* to) {
  constexpr int64_t kRows = 64;
  Vector<T, V> total[Blocks] = {};
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t end = rows - first < kRows ? rows : first + kRows;
    Vector<T, V> sum[Blocks] = {};
    for (int64_t i = first; i < end; ++i) {
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        const T* from = x + i * row_stride + b * V;
        sum[b] += weights[i] * (Blocks > 1 ? load<T, V>(from) : load_some<T, V>(from, count));
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) total[b] += sum[b];
  }
  if (Blocks > 1 || count == V) {
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) store<T, V>(to + b * V, total[b]);
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = total[0][j];
  }
}

template <class T, int V>
void combine_rows(int64_t rows, int64_t cols, const T* weights, const T* x, int64_t row_stride,
                  T* to) {
  constexpr int kBlocks = 4;
  int64_t j = 0;
  for (; j + kBlocks * V <= cols; j += kBlocks * V) {
    combine_blocks<kBlocks, T, V>(rows, V, weights, x + j, row_stride, to + j);
  }
  for (; j < cols; j += V) {
    combine_blocks<1, T, V>(rows, cols - j < V ? cols - j : V, weights, x + j, row_stride, to + j);
  }
}

// `count` <= V entries of update.
template <bool HasBuffer, class T, int V, class P, class U>
void update_some(int64_t count, const UpdateRule<T>& rule, T scale, P* param, const U* update,
                 T* buffer) {
  Vector<T, V> p = load_some<T, V>(param, count);
  const Vector<T, V> u = load_some<T, V>(update, count);
  Vector<T, V> velocity = {};
  if constexpr (HasBuffer) {
    velocity = load_some<T, V>(buffer, count);
    p = rule(p, u, scale, &velocity);
  } else {
    p = rule(p, u, scale);
  }
  if (count == V) {
    store_as<V>(param, p);
    if constexpr (HasBuffer) store<T, V>(buffer, velocity);
  } else {
    P stored[V];
    store_as<V>(stored, p);
    for (int64_t i = 0; i < count; ++i) {
      param[i] = stored[i];
      if constexpr (HasBuffer) buffer[i] = velocity[i];
    }
  }
}

// Nesterov is rule.nesterov, known at compile time: no branch is left in the loop.
template <bool HasBuffer, bool Nesterov, class T, int V, class P, class U>
void update_with(int64_t count, UpdateRule<T> rule, T scale, P* param, const U* update, T* buffer) {
  rule.nesterov = Nesterov;
  for (int64_t i = 0; i < count; i += V) {
    T* const velocity = HasBuffer ? buffer + i : buffer;
    if (i + V <= count) {
      update_some<HasBuffer, T, V>(V, rule, scale, param + i, update + i, velocity);
    } else {
      update_some<HasBuffer, T, V>(count - i, rule, scale, param + i, update + i, velocity);
    }
  }
}

template <class T, int V, class P, class U>
void update_entries(int64_t count, const UpdateRule<T>& rule, T scale, P* param, const U* update,
                    T* buffer) {
  if (buffer == nullptr) {
    update_with<false, false, T, V>(count, rule, scale, param, update, buffer);
  } else if (rule.nesterov) {
    update_with<true, true, T, V>(count, rule, scale, param, update, buffer);
  } else {
    update_with<true, false, T, V>(count, rule, scale, param, update, buffer);
  }
}

template <class T, int V, class S>
constexpr Readers<T, S> make_readers() {
  return {&sum_columns<T, V* static_cast<int>(sizeof(T)) / 8, S>, &scale_row<T, V, S>,
          &multiply_row<T, V, S>, &update_entries<T, V, S, S>, &update_entries<T, V, S, T>};
}

// Turns V x V blocks over; what is left at the edges goes entry by entry.
template <class T, int V>
void transpose_block(int64_t rows, int64_t cols, const T* from, int64_t from_stride, T* to,
                     int64_t to_stride) {
  for (int64_t i0 = 0; i0 < rows; i0 += V) {
    for (int64_t j0 = 0; j0 < cols; j0 += V) {
      if (i0 + V <= rows && j0 + V <= cols) {
        Vector<T, V> block[V];
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) block[i] = load<T, V>(from + (i0 + i) * from_stride + j0);
        transpose<T, V>(block);
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) store<T, V>(to + (j0 + j) * to_stride + i0, block[j]);
        continue;
      }
      for (int64_t i = i0; i < rows && i < i0 + V; ++i) {
        for (int64_t j = j0; j < cols && j < j0 + V; ++j) {
          to[j * to_stride + i] = from[i * from_stride + j];
        }
      }
    }
  }
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// Entries are picked by selections: a store to a single one would hold up the next load of its
// vector.
template <class T, int V>
int64_t factor(T* a, int64_t ld) {
  using Lane = typename Integer<sizeof(T)>::Type;
  using Index = Vector<Lane, V>;
  constexpr int kParts = kFactorRows / V;
  const Vector<T, V> zero = {}, one = zero + T(1);
  Index lane[kParts];
  for (int64_t j = 0; j < kFactorRows; ++j) lane[j / V][j % V] = j;
  for (int64_t k = 0; k < kFactorRows; ++k) {
    T* const row = a + k * ld;
    const T pivot = row[k];
    if (!(pivot > T(0))) return k + 1;
    const T root = square_root(pivot);
    // p = [row k so far | 1 | rest of row k] / sqrt(pivot)
    alignas(64) T p[kFactorRows];
    Vector<T, V> part[kParts];
    const Lane pick = static_cast<Lane>(k);
    for (int v = 0; v < kParts; ++v) {
      part[v] = (lane[v] == pick ? one : load<T, V>(row + v * V)) / root;
      store<T, V>(p + v * V, part[v]);
      store<T, V>(row + v * V, lane[v] <= pick ? part[v] : zero);
    }
    // row i -= p_i p, with its column k starting from zero
    for (int64_t i = k + 1; i < kFactorRows; ++i) {
      for (int v = 0; v < kParts; ++v) {
        T* const to = a + i * ld + v * V;
        const Vector<T, V> start = lane[v] == pick ? zero : load<T, V>(to);
        store<T, V>(to, start - p[i] * part[v]);
      }
    }
  }
  return 0;
}

// The tiles of 2, 4 .. MR rows and of 1 .. NV vectors.
template <class T, int MR, int NV, int V, int BWidth>
constexpr void fill_tiles(Tiles<T>& tiles) {
  if constexpr (MR > 0) {
    tiles.multiply[NV - 1][MR / 2 - 1] = &tile<T, MR, NV, V, BWidth>;
    fill_tiles<T, MR - 2, NV, V, BWidth>(tiles);
  }
}

// C[Width, Width] from two panels of that width, in tiles of at most MR rows.
template <class T, int MR, int V, int Width, int Row = 0>
void square(int64_t depth, const T* a, const T* b, T beta, T* c, int64_t ldc) {
  constexpr int count = (Width + MR - 1) / MR, step = (Width + count - 1) / count;
  constexpr int rows = Width - Row < step ? Width - Row : step;
  tile<T, rows, Width / V, V, Width>(depth, a, Width, b, T(1), beta, c, ldc);
  if constexpr (Row + rows < Width) {
    square<T, MR, V, Width, Row + rows>(depth, a + rows, b, beta, c + rows * ldc, ldc);
  }
}

// A tile of MR x 2 vectors of V.
template <class T, int MR, int V>
constexpr Tiles<T> make_tiles() {
  constexpr int a_width = (MR + V - 1) / V * V;
  constexpr int b_width = 2 * V;
  Tiles<T> tiles = {};
  tiles.mr = MR, tiles.nr = b_width;
  tiles.a_width = a_width, tiles.b_width = b_width;
  tiles.row_step = 2, tiles.depth_step = 1, tiles.one_format = true;
  tiles.task_bytes = 256 << 10;
  tiles.max_depth = 256;  // deeper panels would gain 1% of speed
  fill_tiles<T, MR, 1, V, b_width>(tiles);
  fill_tiles<T, MR, 2, V, b_width>(tiles);
  tiles.square = &square<T, MR, V, b_width>;
  if constexpr (sizeof(T) == sizeof(float)) {
    tiles.packers = {
        {&pack_panel<T, V, a_width, float>, &pack_panel<T, V, b_width, float>},
        {&pack_panel<T, V, a_width, HalfBits>, &pack_panel<T, V, b_width, HalfBits>},
        {&pack_panel<T, V, a_width, BFloat16Bits>, &pack_panel<T, V, b_width, BFloat16Bits>}};
  } else {
    tiles.packers = {{&pack_panel<T, V, a_width, double>, &pack_panel<T, V, b_width, double>}};
  }
  return tiles;
}

template <class T, int MR, int V>
constexpr Microkernel<T> make_microkernel() {
  Microkernel<T> kernel{
      make_tiles<T, MR, V>(), &transpose_block<T, V>, &dot<T, V* static_cast<int>(sizeof(T)) / 8>,
      &factor<T, V>,          &combine_rows<T, V>,    {}};
  if constexpr (sizeof(T) == sizeof(float)) {
    kernel.readers = {make_readers<T, V, float>(), make_readers<T, V, HalfBits>(),
                      make_readers<T, V, BFloat16Bits>()};
  } else {
    kernel.readers = {make_readers<T, V, double>()};
  }
  return kernel;
}

}  // namespace
}  // namespace fused_so
