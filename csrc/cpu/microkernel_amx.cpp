// Products of float32 on the matrix unit, whose tiles multiply bfloat16 16 times as fast as vectors
// multiply float32. A float32 is the exact sum of three bfloat16, x = h + m + l with |m| <= 2^-8
// |x| and |l| <= 2^-17 |x|; of the nine products of two such sums the six largest are added up
// (Henry, Tang and Heinecke 2019). The three left out are at most 2^-24 |x| |y|, less than the
// rounding of one product and its sum. Of 32 terms the unit makes two sums, which it rounds as
// float32, before it adds them to a tile. It takes what is below 2^-126 for zero: a panel of small
// entries is scaled, but results below 1e-32 beside others of order 1 lose digits. Where an entry
// is infinite, or a product beyond float32, it may make NaN. Tiles: 4 of sums, 2 of A, 2 of B. Per
// 32 steps of depth 24 products of 16 cycles against 14 loads of at least 8: bound by arithmetic.
#include "common/microkernel.h"

#if defined(FUSED_SO_HAS_AMX)
#include <cstdint>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define FUSED_SO_AVX512
#include <immintrin.h>

#include "common/microkernel_body.h"

namespace fused_so {
namespace {

#define FUSED_SO_AMX __attribute__((target("amx-tile,amx-bf16")))

constexpr int kSide = 32;             // lanes of a panel, and the steps of depth of one chunk of it
constexpr int kPart = kSide * kSide;  // bfloat16 of a chunk's h, m or l: two tiles
constexpr int kChunk = 3 * kPart;
constexpr int kWidth = kChunk * sizeof(uint16_t) / sizeof(float) / kSide;  // floats of a slice

// Behind its slices, in a cache line of its own, a panel holds 1 over what its entries were
// multiplied by: 1, or 2^40 if all of them are below 2^-40. So products of parts that matter stay
// above 2^-126.
constexpr int kTail = 16;
constexpr float kScale = 0x1p40f;

using Floats = Vector<float, 16>;
using Bits = Vector<uint32_t, 16>;
constexpr uint32_t kUpper = 0xffff0000u, kMagnitude = 0x7fffffffu;

// The bfloat16 next to x, as a float32; of two as near the one further from zero. What would round
// to infinity is truncated.
Floats rounded(Floats x) {
  const Bits bits = (Bits)x;
  const Bits up = (bits & kMagnitude) < 0x7f7f8000u ? bits + 0x8000u : bits;
  return (Floats)(up & kUpper);
}

// A row of a tile is 16 pairs of bfloat16. Which steps of depth make a pair is free, as long as A
// and B agree: steps p and p + 16, whose pairs need no shuffling. l has 8 bits without rounding.
void store_pairs(Floats first, Floats second, uint16_t* to) {
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    const Floats a = s < 2 ? rounded(first) : first;
    const Floats b = s < 2 ? rounded(second) : second;
    const Bits pairs = ((Bits)a >> 16) | ((Bits)b & kUpper);
    __builtin_memcpy(to + s * kPart, &pairs, sizeof(pairs));
    first -= a, second -= b;
  }
}

// 32 neighbours in each of some rows, less row_factor[i] times `factor`; a null row_factor
// means ones.
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
  bool subtract;
  const float* row_factor;
  Floats factor[2];

  Rows(const S* data, int64_t stride, bool subtract = false, const float* row_factor = nullptr,
       const float* factors = nullptr)
      : data(data), stride(stride), subtract(subtract), row_factor(row_factor) {
    for (int half = 0; half < 2; ++half) {
      factor[half] = factors != nullptr ? load<float, 16>(factors + 16 * half) : Floats{} + 1.0f;
    }
  }

  Floats half_row(int64_t i, int half) const {
    Floats x = load<float, 16>(data + i * stride + 16 * half);
    if (subtract) x -= (row_factor != nullptr ? row_factor[i] : 1.0f) * factor[half];
    return x;
  }
};

// Packs one panel, and keeps the largest magnitude that it met, as bits.
struct Packer {
  float scale;
  Bits most = {};

  void store(Floats first, Floats second, uint16_t* to) {
    const Bits a = (Bits)first & kMagnitude, b = (Bits)second & kMagnitude;
    most = most > a ? most : a;
    most = most > b ? most : b;
    store_pairs(scale * first, scale * second, to);
  }

  // A chunk of A from `count` rows, lanes, of 32 steps of depth.
  template <class S>
  void split_lanes(const Rows<S>& rows, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < kSide; ++i) {
      Floats low = {}, high = {};
      if (i < count) {
        __builtin_prefetch(rows.data + i * rows.stride + 2 * kSide);
        low = rows.half_row(i, 0), high = rows.half_row(i, 1);
      }
      store(low, high, to + i * kSide);
    }
  }

  // A chunk of B from 32 rows, steps of depth, of 32 lanes.
  template <class S>
  void split_slices(const Rows<S>& rows, uint16_t* to) {
    for (int64_t i = 0; i < 16; ++i) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __builtin_prefetch(rows.data + (i + 32) * rows.stride + 16 * half);
        __builtin_prefetch(rows.data + (i + 48) * rows.stride + 16 * half);
        store(rows.half_row(i, half), rows.half_row(i + 16, half),
              to + half * kPart / 2 + i * kSide);
      }
    }
  }

  bool tiny() const {
    uint32_t largest = 0;
    for (int i = 0; i < 16; ++i) largest = most[i] > largest ? most[i] : largest;
    return 0 < largest && largest < (127u - 40u) << 23;
  }
};

template <class S>
void pack_lanes_with(Packer& packer, const S* source, int64_t lane_stride, int64_t depth_stride,
                     int64_t lanes, int64_t depth, const float* u, const float* v, uint16_t* to) {
  const int64_t present = lanes < kSide ? lanes : kSide;
  alignas(64) float block[kSide * kSide];
  for (int64_t p = 0; p < depth; p += kSide, to += kChunk) {
    const S* from = source + p * depth_stride;
    const float* const factors = after(v, p);
    if (depth_stride == 1 && depth - p >= kSide) {
      const bool subtract = u != nullptr || v != nullptr;
      packer.split_lanes(Rows<S>(from, lane_stride, subtract, u, factors), present, to);
    } else {
      // Lanes are taken for slices, and steps of depth for lanes.
      pack_panel<float, 16, kSide>(from, depth_stride, lane_stride, depth - p, present, factors, u,
                                   block);
      packer.split_lanes(Rows<float>(block, kSide), present, to);
    }
  }
}

template <class S>
void pack_slices_with(Packer& packer, const S* source, int64_t lane_stride, int64_t depth_stride,
                      int64_t lanes, int64_t depth, const float* u, const float* v, uint16_t* to) {
  alignas(64) float block[kSide * kSide];
  for (int64_t p = 0; p < depth; p += kSide, to += kChunk) {
    const S* from = source + p * depth_stride;
    const int64_t steps = depth - p < kSide ? depth - p : kSide;
    const float* const row_factors = after(v, p);
    if (lane_stride == 1 && lanes >= kSide && steps == kSide) {
      const bool subtract = u != nullptr || v != nullptr;
      packer.split_slices(Rows<S>(from, depth_stride, subtract, row_factors, u), to);
    } else {
      pack_panel<float, 16, kSide>(from, lane_stride, depth_stride, lanes, steps, u, row_factors,
                                   block);
      for (int64_t i = steps * kSide; i < kSide * kSide; ++i) block[i] = 0;
      packer.split_slices(Rows<float>(block, kSide), to);
    }
  }
}

template <class F>
F* tail(F* panel, int64_t depth) {
  return panel + (depth + kSide - 1) / kSide * kSide * kWidth;
}

template <bool Lanes, class S>
void pack(const S* source, int64_t lane_stride, int64_t depth_stride, int64_t lanes, int64_t depth,
          const float* u, const float* v, float* panel) {
  const auto pack_with = Lanes ? &pack_lanes_with<S> : &pack_slices_with<S>;
  uint16_t* const to = (uint16_t*)panel;
  Packer packer{1};
  pack_with(packer, source, lane_stride, depth_stride, lanes, depth, u, v, to);
  if (packer.tiny()) {
    packer = {kScale};
    pack_with(packer, source, lane_stride, depth_stride, lanes, depth, u, v, to);
  }
  *tail(panel, depth) = 1 / packer.scale;
}

// Eight tiles of 16 rows x 64 bytes. A constant: to GCC 12 the instruction reads 8 bytes of it.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
const TileConfig kConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Other libraries keep tiles configured between calls: what there was is put back.
FUSED_SO_AMX void begin(void* before) {
  _tile_storeconfig(before);
  _tile_loadconfig(&kConfig);
}

FUSED_SO_AMX void end(const void* before) { _tile_loadconfig(before); }

// Tiles 0 to 3 += tiles 4 and 5 times tiles 6 and 7, of which the second ones are there if NR and
// NC are 2.
template <int NR, int NC>
FUSED_SO_AMX inline void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (NC > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (NR > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (NR > 1 && NC > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int NR>
FUSED_SO_AMX inline void load_a(const uint16_t* part) {
  _tile_loadd(4, part, 64);
  if constexpr (NR > 1) _tile_loadd(5, part + kPart / 2, 64);
}

template <int NC>
FUSED_SO_AMX inline void load_b(const uint16_t* part) {
  _tile_loadd(6, part, 64);
  if constexpr (NC > 1) _tile_loadd(7, part + kPart / 2, 64);
}

template <int NR, int NC>
FUSED_SO_AMX inline void store_sums(float* to, int64_t ld) {
  const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, to, stride);
  if constexpr (NC > 1) _tile_stored(1, to + 16, stride);
  if constexpr (NR > 1) _tile_stored(2, to + 16 * ld, stride);
  if constexpr (NR > 1 && NC > 1) _tile_stored(3, to + 16 * ld + 16, stride);
}

// C[16 NR, 16 NC] = beta C + alpha A B.
template <int NR, int NC>
FUSED_SO_AMX void multiply(int64_t depth, const float* a, int64_t, const float* b, float alpha,
                           float beta, float* c, int64_t ldc) {
  const uint16_t *x = (const uint16_t*)a, *y = (const uint16_t*)b;
  for (int i = 0; i < 16 * NR; ++i) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + 16 * NC - 1, 1);
  }
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t p = 0; p < depth; p += kSide, x += kChunk, y += kChunk) {
    // h l + h m + m m + m h + l h + h h, in an order in which the next product shares an operand.
    load_a<NR>(x);
    load_b<NC>(y + 2 * kPart);
    add_products<NR, NC>();
    load_b<NC>(y + kPart);
    add_products<NR, NC>();
    load_a<NR>(x + kPart);
    add_products<NR, NC>();
    load_b<NC>(y);
    add_products<NR, NC>();
    load_a<NR>(x + 2 * kPart);
    add_products<NR, NC>();
    load_a<NR>(x);
    add_products<NR, NC>();
  }
  const float scale = *tail(a, depth) * *tail(b, depth);
  if (scale == 1 && alpha == 1 && beta == 0) return store_sums<NR, NC>(c, ldc);
  // alpha (scale sum) or (alpha scale) sum: no product is subnormal unless the result is.
  const bool large = alpha >= 1 || alpha <= -1;
  const float first = large ? 1 : scale, second = large ? alpha * scale : alpha;
  alignas(64) float sums[kSide * kSide];
  store_sums<NR, NC>(sums, kSide);
  for (int i = 0; i < 16 * NR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 16 * NC; j += 16) {
      float* const to = c + i * ldc + j;
      const Floats scaled = second * (first * load<float, 16>(sums + i * kSide + j));
      store<float, 16>(to, beta == 0 ? scaled : beta * load<float, 16>(to) + scaled);
    }
  }
}

void square(int64_t depth, const float* a, const float* b, float beta, float* c, int64_t ldc) {
  multiply<2, 2>(depth, a, 0, b, 1, beta, c, ldc);
}

constexpr Tiles<float> make_amx_tiles() {
  Tiles<float> tiles = {};
  tiles.mr = tiles.nr = kSide;
  tiles.a_width = tiles.b_width = kWidth;
  tiles.row_step = 16, tiles.depth_step = kSide, tiles.max_depth = kMaxDepth;
  tiles.tail = kTail;
  tiles.task_bytes = 1152 << 10;
  tiles.multiply[0][0] = &multiply<1, 1>, tiles.multiply[0][1] = &multiply<2, 1>;
  tiles.multiply[1][0] = &multiply<1, 2>, tiles.multiply[1][1] = &multiply<2, 2>;
  tiles.square = &square;
  tiles.begin = &begin, tiles.end = &end;
  tiles.packers = {{&pack<true, float>, &pack<false, float>},
                   {&pack<true, HalfBits>, &pack<false, HalfBits>},
                   {&pack<true, BFloat16Bits>, &pack<false, BFloat16Bits>}};
  return tiles;
}

}  // namespace

const Tiles<float> kAmxTiles = make_amx_tiles();

}  // namespace fused_so
#endif
