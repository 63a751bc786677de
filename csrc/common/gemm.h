// Matrix products from packed panels (Goto and van de Geijn 2008; the BLIS library): blocks of A
// and B are copied into panels in the order in which a register tile reads them, and converted,
// transposed and centered on the way, so an operand may have any strides and dtype.
//
//   gemm               C = beta C + alpha A B
//   symmetric_product  C = beta C + alpha A A^T + w s s^T, lower triangle only, or mirrored
//
// C is row-major with leading dimension ldc; beta = 0 never reads it. Both run on all of torch's
// threads or on the calling one (Threads::kOne, for use inside a parallel region). The result
// does not depend on the number of threads: output tiles are shared out, and where k is split,
// the parts depend on the shape alone and are added in order.
//
// 2 m n k operations (half for a symmetric product). Each block of depth moves C once.
// Scratch, kept by the threads: at most 4 MiB for the panels of all, 6 MiB where an entry takes 6
// bytes; 2 MiB where k is split.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/matrix.h"
#include "common/microkernel.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace fused_so {

enum class Triangle { kLower, kBoth };

// w s s^T.
template <class T>
struct RankOne {
  T weight = 0;
  const T* vector = nullptr;
};

namespace gemm_detail {

constexpr int64_t kScratchBytes = 2 << 20;
constexpr int64_t kGroupBytes = 512 << 10;  // the B panels of one task: they stay in L2
constexpr int64_t kRowsAtOnce = 8;          // the panels of A of one task
constexpr int64_t kMaxParts = 16;
constexpr int64_t kSmallProduct = 1 << 20;  // about 20 microseconds on one core

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of equal parts, a multiple of `unit`, none larger than `limit` (also a multiple).
inline int64_t even_part(int64_t total, int64_t limit, int64_t unit) {
  const int64_t count = std::max<int64_t>(1, divide_up(total, limit));
  return std::max(unit, divide_up(divide_up(total, count), unit) * unit);
}

// A panel is padded with zeros to this depth.
template <class T>
int64_t padded(const Tiles<T>& tiles, int64_t depth) {
  return divide_up(depth, tiles.depth_step) * tiles.depth_step;
}

// The entries of T that a panel of A or of B takes.
template <class T>
int64_t a_panel(const Tiles<T>& tiles, int64_t depth) {
  return tiles.a_width * padded(tiles, depth) + tiles.tail;
}
template <class T>
int64_t b_panel(const Tiles<T>& tiles, int64_t depth) {
  return tiles.b_width * padded(tiles, depth) + tiles.tail;
}

// The part of k that is packed at a time, at most `limit`.
template <class T>
int64_t depth_part(const Tiles<T>& tiles, int64_t k, int64_t limit) {
  return even_part(k, limit, std::max<int64_t>(16, tiles.depth_step));
}

template <class T>
const Microkernel<T>& microkernel() {
  if constexpr (std::is_same_v<T, double>) {
    return microkernels().f64;
  } else {
    return microkernels().f32;
  }
}

template <class S>
using Bits = std::conditional_t<std::is_same_v<S, Half>, HalfBits,
                                std::conditional_t<std::is_same_v<S, BFloat16>, BFloat16Bits, S>>;

template <class T, class S>
const Readers<T, Bits<S>>& readers() {
  return microkernel<T>().readers;
}
template <class T, class S>
const Packers<T, Bits<S>>& packers(const Tiles<T>& tiles) {
  return tiles.packers;
}

// The tiles that multiply A[m, k] and B[k, n] fastest. The bits of a product depend on the choice,
// so m, n and k may not depend on the number of threads.
template <class T>
const Tiles<T>& tiles_for(int64_t m, int64_t n, int64_t k) {
  if constexpr (std::is_same_v<T, float>) {
    const Microkernels& all = microkernels();
    if (all.f32_large != nullptr) {
      const int64_t least = all.large_from == 0 ? 1 : all.f32_large->depth_step;
      if (k >= least && m * n > all.large_from * (m + n)) return *all.f32_large;
    }
  }
  return microkernel<T>().tiles;
}

// While tiles are used on a thread.
template <class T>
class InUse {
 public:
  explicit InUse(const Tiles<T>& tiles) : end_(tiles.end) {
    if (end_ != nullptr) tiles.begin(before_);
  }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
  ~InUse() {
    if (end_ != nullptr) end_(before_);
  }

 private:
  void (*const end_)(const void*);
  alignas(64) char before_[64];
};

template <class S>
const Bits<S>* as_bits(const S* data) {
  return reinterpret_cast<const Bits<S>*>(data);
}
template <class S>
Bits<S>* as_bits(S* data) {
  return reinterpret_cast<Bits<S>*>(data);
}

// Packs the panel of `rows` (lanes) first .. first + width of x, all its columns (depth).
template <class T, class S>
void pack(PackPanel<T, Bits<S>> pack_panel, const Matrix<S>& x, int64_t first, T* panel) {
  if (x.cols == 0) return;  // there may be no memory behind it
  pack_panel(as_bits(x.data) + first * x.row_stride, x.row_stride, x.col_stride, x.rows - first,
             x.cols, x.u == nullptr ? x.u : x.u + first, x.v, panel);
}

// Packs all lanes of x, panel after panel, each of `size` entries.
template <class T, class S>
void pack_all(PackPanel<T, Bits<S>> pack_panel, const Matrix<S>& x, int64_t lanes, int64_t size,
              T* panels) {
  for (int64_t i = 0; i < x.rows; i += lanes, panels += size) {
    pack<T, S>(pack_panel, x, i, panels);
  }
}

// A block of C, and which of its entries are wanted: C[i, j] with j <= i + diagonal, if lower.
template <class T>
struct Target {
  T* c;
  int64_t ldc;
  bool lower = false;
  int64_t diagonal = 0;

  Target block(int64_t row, int64_t col) const {
    return {c + row * ldc + col, ldc, lower, diagonal + row - col};
  }
  // How many entries of row i, of the `cols` there are, are wanted.
  int64_t wanted(int64_t i, int64_t cols) const {
    return lower ? std::clamp<int64_t>(i + diagonal + 1, 0, cols) : cols;
  }
};

// One tile. When the diagonal cuts it or its size is not a whole number of vectors or of row
// steps, it goes through a buffer; the panels are padded with zeros.
template <class T>
void multiply_tile(const Tiles<T>& tiles, int64_t depth, const T* a, int64_t a_step, const T* b,
                   T alpha, T beta, const Target<T>& target, int64_t rows, int64_t cols) {
  const int64_t vector = tiles.nr / 2;
  const auto multiply = tiles.multiply[cols > vector][(rows - 1) / tiles.row_step];
  if (rows % tiles.row_step == 0 && cols % vector == 0 && target.wanted(0, cols) == cols) {
    multiply(depth, a, a_step, b, alpha, beta, target.c, target.ldc);
    return;
  }
  alignas(64) T buffer[kMaxLanes * kMaxLanes];
  multiply(depth, a, a_step, b, alpha, T(0), buffer, tiles.nr);
  for (int64_t i = 0; i < rows; ++i) {
    T* c = target.c + i * target.ldc;
    const T* from = buffer + i * tiles.nr;
    const int64_t wanted = target.wanted(i, cols);
    if (beta == 0) {
      for (int64_t j = 0; j < wanted; ++j) c[j] = from[j];
    } else {
      for (int64_t j = 0; j < wanted; ++j) c[j] = beta * c[j] + from[j];
    }
  }
}

// The panels of A as the tiles read them: in a panel the next slice, and the next panel.
template <class T>
struct PanelsOfA {
  const T* data;
  int64_t step, next;
};

template <class T>
PanelsOfA<T> packed(const Tiles<T>& tiles, int64_t depth, const T* a) {
  return {a, tiles.a_width, a_panel(tiles, depth)};
}

// All of A, packed into `room`, or where it lies: if a slice's lanes are neighbours of the right
// type, and come in pairs as the tiles read them, else the last would have no partner in memory.
// For a few panels of B this is faster; measured.
template <class T, class S>
PanelsOfA<T> panels_of(const Tiles<T>& tiles, const Matrix<S>& a, int64_t cols, T* room) {
  constexpr int64_t kFewPanels = 4;
  if constexpr (std::is_same_v<S, T>) {
    const bool subtract = a.u != nullptr || a.v != nullptr, by_slices = tiles.depth_step == 1;
    if (by_slices && a.row_stride == 1 && a.rows % 2 == 0 && !subtract &&
        cols <= kFewPanels * tiles.nr) {
      return {a.data, a.col_stride, tiles.mr};
    }
  }
  pack_all<T>(packers<T, S>(tiles).pack_a, a, tiles.mr, a_panel(tiles, a.cols), room);
  return packed(tiles, a.cols, room);
}

// C[rows, cols] = beta C + alpha A B, from consecutive packed panels of B.
template <class T>
void multiply_panels(const Tiles<T>& tiles, int64_t depth, PanelsOfA<T> a, const T* b, T alpha,
                     T beta, const Target<T>& target, int64_t rows, int64_t cols) {
  const InUse<T> in_use(tiles);
  const int64_t panel_size = b_panel(tiles, depth);
  for (int64_t i = 0; i < rows; i += tiles.mr, a.data += a.next) {
    const int64_t tile_rows = std::min(tiles.mr, rows - i);
    const T* panel = b;
    for (int64_t j = 0; j < cols; j += tiles.nr, panel += panel_size) {
      const Target<T> tile = target.block(i, j);
      const int64_t tile_cols = std::min(tiles.nr, cols - j);
      if (tile.wanted(tile_rows - 1, tile_cols) == 0) break;
      multiply_tile(tiles, depth, a.data, a.step, panel, alpha, beta, tile, tile_rows, tile_cols);
    }
  }
}

struct NoFinish {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// Scratch of the calling thread; different slots may be in use at once.
enum Slot { kPanelsOfA, kPanelsOfB, kPartials };
template <class T, Slot>
T* thread_scratch(int64_t count) {
  thread_local Scratch scratch;
  return scratch.get<T>(count);
}

// The bytes of `slices` slices of a packed panel.
template <class T>
int64_t panel_bytes(int64_t width, int64_t slices) {
  return width * slices * static_cast<int64_t>(sizeof(T));
}

// `bytes`, or as many more as the panels of these tiles take more of them for an entry.
template <class T>
int64_t panel_room(const Tiles<T>& tiles, int64_t bytes) {
  return bytes * tiles.b_width / tiles.nr;
}

// How many lanes of an operand are packed at a time, in equal parts.
template <class T>
int64_t lane_step(const Tiles<T>& tiles, int64_t lanes, int64_t tile, int64_t width) {
  const int64_t panels = panel_room(tiles, kScratchBytes) / panel_bytes<T>(width, tiles.max_depth);
  return even_part(lanes, panels * tile, tile);
}

// What a product is cut into: how much of k, m and n is packed at a time, and a group of columns.
template <class T>
struct Blocking {
  const Tiles<T>& tiles;
  int64_t depth, rows, cols, group;

  Blocking(const Tiles<T>& tiles, int64_t m, int64_t n, int64_t k)
      : tiles(tiles),
        depth(depth_part(tiles, k, tiles.max_depth)),
        rows(lane_step(tiles, m, tiles.mr, tiles.a_width)),
        cols(lane_step(tiles, n, tiles.nr, tiles.b_width)),
        group(panel_room(tiles, kGroupBytes) / panel_bytes<T>(tiles.b_width, depth) * tiles.nr) {}

  T* a_panels() const {
    return thread_scratch<T, kPanelsOfA>(rows / tiles.mr * a_panel(tiles, depth));
  }
  T* b_panels(int64_t count) const {
    return thread_scratch<T, kPanelsOfB>(count / tiles.nr * b_panel(tiles, depth));
  }
};

// C = beta C + alpha A B on the calling thread: a few panels of B are packed, and used by all of
// A's while they are in L2. finish(row, col, rows, cols) is called once for each part of C, when
// it is complete.
template <class T, class SA, class SB, class Finish = NoFinish>
void multiply_alone(const Tiles<T>& tiles, T alpha, const Matrix<SA>& a, const Matrix<SB>& b,
                    T beta, const Target<T>& target, const Finish& finish = {}) {
  const Matrix<SB> bt = b.transposed();
  const int64_t m = a.rows, n = b.cols, k = a.cols;
  const Blocking<T> blocking(tiles, m, n, k);
  const int64_t group = even_part(n, blocking.group, tiles.nr);
  T* const a_panels = blocking.a_panels();
  T* const b_panels = blocking.b_panels(group);

  // k = 0 still scales C.
  for (int64_t depth = 0; depth == 0 || depth < k; depth += blocking.depth) {
    const int64_t steps = std::min(blocking.depth, k - depth);
    const T scale = depth == 0 ? beta : T(1);
    for (int64_t row = 0; row < m; row += blocking.rows) {
      const int64_t rows = std::min(blocking.rows, m - row);
      const PanelsOfA<T> panels = panels_of(tiles, a.block(row, depth, rows, steps), n, a_panels);
      for (int64_t col = 0; col < n; col += group) {
        const int64_t cols = std::min(group, n - col);
        const Target<T> block = target.block(row, col);
        if (block.wanted(rows - 1, cols) == 0) break;
        pack_all<T>(packers<T, SB>(tiles).pack_b, bt.block(col, depth, cols, steps), tiles.nr,
                    b_panel(tiles, steps), b_panels);
        multiply_panels(tiles, steps, panels, b_panels, alpha, scale, block, rows, cols);
        if (depth + steps == k) finish(row, col, rows, cols);
      }
    }
    if (k == 0) break;
  }
}

// The same on all threads, which share the panels: both operands' are packed first; then each task
// takes a few of B's, which stay in L2, and the next few of A's.
template <class T, class SA, class SB, class Finish = NoFinish>
void multiply_together(const Tiles<T>& tiles, T alpha, const Matrix<SA>& a, const Matrix<SB>& b,
                       T beta, const Target<T>& target, const Finish& finish = {}) {
  const Matrix<SB> bt = b.transposed();
  const int64_t m = a.rows, n = b.cols, k = a.cols;
  const Blocking<T> blocking(tiles, m, n, k);
  T* const a_panels = blocking.a_panels();
  T* const b_panels = blocking.b_panels(blocking.cols);

  for (int64_t col = 0; col < n; col += blocking.cols) {
    const int64_t cols = std::min(blocking.cols, n - col);
    const int64_t b_count = divide_up(cols, tiles.nr);
    const int64_t group = even_part(cols, blocking.group, tiles.nr);
    // k = 0 still scales C.
    for (int64_t depth = 0; depth == 0 || depth < k; depth += blocking.depth) {
      const int64_t steps = std::min(blocking.depth, k - depth);
      const int64_t a_size = a_panel(tiles, steps), b_size = b_panel(tiles, steps);
      const T scale = depth == 0 ? beta : T(1);
      const bool last = depth + steps == k;
      const Matrix<SB> b_block = bt.block(col, depth, cols, steps);
      int64_t b_packed = 0;
      for (int64_t row = 0; row < m; row += blocking.rows) {
        const int64_t rows = std::min(blocking.rows, m - row);
        if (target.block(row, col).wanted(rows - 1, cols) == 0) continue;
        const int64_t a_count = divide_up(rows, tiles.mr), b_missing = b_count - b_packed;
        const Matrix<SA> a_block = a.block(row, depth, rows, steps);
        for_each_task(b_missing + a_count, Threads::kAll, [&](int64_t task) {
          const int64_t i = task - b_missing;
          if (i < 0) {
            pack<T, SB>(packers<T, SB>(tiles).pack_b, b_block, task * tiles.nr,
                        b_panels + task * b_size);
          } else {
            pack<T, SA>(packers<T, SA>(tiles).pack_a, a_block, i * tiles.mr, a_panels + i * a_size);
          }
        });
        b_packed = b_count;

        const int64_t groups = divide_up(cols, group);
        const int64_t share = a_count * groups / (4 * count_workers(Threads::kAll));
        const int64_t part = std::clamp<int64_t>(share, 1, kRowsAtOnce) * tiles.mr;
        const int64_t parts = divide_up(rows, part);
        for_each_task(groups * parts, Threads::kAll, [&](int64_t task) {
          const int64_t j = task / parts * group, task_cols = std::min(group, cols - j);
          const int64_t i = task % parts * part, task_rows = std::min(part, rows - i);
          const Target<T> block = target.block(row + i, col + j);
          if (block.wanted(task_rows - 1, task_cols) == 0) return;
          multiply_panels(tiles, steps, packed(tiles, steps, a_panels + i / tiles.mr * a_size),
                          b_panels + j / tiles.nr * b_size, alpha, scale, block, task_rows,
                          task_cols);
          if (last) finish(row + i, col + j, task_rows, task_cols);
        });
      }
      if (k == 0) break;
    }
  }
}

// Where C is too small to keep the threads busy k is cut into parts, which depend on the shape
// alone: each makes a C of its own, and these are added in order.
template <class T>
struct Parts {
  const int64_t m, n, k;
  const int64_t count = choose(m, n, k), depth = divide_up(k, count);
  // Partials of 2^i entries, one after the other, would meet in one set of the L1 cache.
  const int64_t stride = divide_up(m * n, 16) * 16 + 16;

  static int64_t choose(int64_t m, int64_t n, int64_t k) {
    // Waking the threads costs more than a small product.
    if (m * n > 128 * 128 || m * n * k < kSmallProduct) return 1;
    const int64_t fit = kScratchBytes / static_cast<int64_t>(sizeof(T)) / (m * n);
    return std::max<int64_t>(1, std::min({kMaxParts, k / 256, fit}));
  }

  // The parts' C's, in scratch of the calling thread.
  T* partials() const { return thread_scratch<T, kPartials>(count * stride); }

  // multiply(p, first, depth, C_p) is called for each part of k.
  template <class Multiply>
  void multiply(Threads threads, const Multiply& multiply) const {
    T* const c = partials();
    for_each_task(count, threads, [&](int64_t p) {
      const int64_t first = std::min(k, p * depth);
      multiply(p, first, std::min(depth, k - first), c + p * stride);
    });
  }

  // C = beta C + alpha (C_1 + C_2 + ...), in this order.
  template <class Finish>
  void add(T alpha, T beta, const Target<T>& target, Threads threads, const Finish& finish) const {
    constexpr int64_t kRows = 16, kFew = 1 << 11;
    T ones[kMaxParts];
    std::fill_n(ones, kMaxParts, T(1));
    T* const sums = partials();
    for_each_task(divide_up(m, kRows), m * n > kFew ? threads : Threads::kOne, [&](int64_t task) {
      const int64_t row = task * kRows, rows = std::min(kRows, m - row);
      for (int64_t i = row; i < row + rows; ++i) {
        const int64_t wanted = target.wanted(i, n);
        T* const sum = sums + i * n;
        // In place: columns are written when all their rows are read.
        microkernel<T>().combine_rows(count, wanted, ones, sum, stride, sum);
        T* const c = target.c + i * target.ldc;
        for (int64_t j = 0; j < wanted; ++j) {
          c[j] = beta == 0 ? alpha * sum[j] : beta * c[j] + alpha * sum[j];
        }
      }
      finish(row, 0, rows, n);
    });
  }
};

// Rows and columns of C for one worker.
struct Block {
  int64_t row, rows, col, cols;
};

// C cut into rows x cols blocks at multiples of the tile. A lower triangle is cut into rows that
// hold equally many of its entries, those up to x holding x^2 / 2, each as wide as its last row.
struct Grid {
  int64_t m, n, rows, cols, mr, nr;
  bool lower;

  int64_t row_edge(int64_t i) const {
    const double part = static_cast<double>(i) / rows;
    return edge((lower ? std::sqrt(part) : part) * m, m, mr);
  }
  int64_t col_edge(int64_t j) const { return edge(static_cast<double>(j) / cols * n, n, nr); }
  int64_t count() const { return rows * cols; }

  Block block(int64_t index) const {
    const int64_t row = row_edge(index / cols), row_end = row_edge(index / cols + 1);
    const int64_t col = col_edge(index % cols);
    return {row, row_end - row, col, (lower ? row_end : col_edge(index % cols + 1)) - col};
  }

  static int64_t edge(double wanted, int64_t size, int64_t tile) {
    return std::min(size, static_cast<int64_t>(std::ceil(wanted / tile)) * tile);
  }
};

// What a worker does alone for `entries` of C, in multiplications per k: packing an entry of A,
// which may have to be transposed, takes as long as 40 of them, one of B 10; measured, with
// vectors.
inline double block_cost(double entries, double rows, double cols) {
  return entries + 40 * rows + 10 * cols;
}

// The grid for `workers` that pack their own operands, or one block where sharing panels is
// cheaper. Such workers wait for nobody and fetch no panels from each other's caches, but what two
// of them read is packed twice, and all their scratch may take no more than shared panels do.
template <class T>
Grid choose_grid(const Tiles<T>& tiles, int64_t m, int64_t n, int64_t k, bool lower,
                 int64_t workers) {
  constexpr double kWorthIt = 1.25;  // sharing waits twice for each block of depth
  const Blocking<T> blocking(tiles, m, n, k);
  const double wanted = static_cast<double>(m) * n / (lower ? 2 : 1);
  double least = kWorthIt * block_cost(wanted, m, n) / workers;
  Grid best{m, n, 1, 1, tiles.mr, tiles.nr, lower};
  for (int64_t rows = lower ? workers : 1; rows <= workers; ++rows) {
    const Grid grid{m, n, rows, workers / rows, tiles.mr, tiles.nr, lower};
    // The first block has the most rows of a triangle, and the last one of it the most columns.
    const Block first = grid.block(0), last = grid.block(grid.count() - 1);
    const int64_t lanes = divide_up(first.rows, tiles.mr) * tiles.a_width +
                          std::min(last.cols + tiles.nr, blocking.group) / tiles.nr * tiles.b_width;
    const int64_t scratch = workers * panel_bytes<T>(lanes, blocking.depth);
    const auto cost = [&](const Block& b) {
      const double above = lower ? 0.5 * b.rows * b.rows : 0;
      return block_cost(1.0 * b.rows * b.cols - above, b.rows, b.cols);
    };
    const double most = std::max(cost(first), cost(last));
    if (scratch <= 2 * panel_room(tiles, kScratchBytes) && most < least) best = grid, least = most;
  }
  return best;
}

template <class T, class SA, class SB, class Finish = NoFinish>
void run(T alpha, const Matrix<SA>& a, const Matrix<SB>& b, T beta, const Target<T>& target,
         Threads threads, const Finish& finish = {}) {
  const int64_t m = a.rows, n = b.cols, k = a.cols;
  if (m == 0 || n == 0) return;
  // Waking the threads costs more than a small product.
  if (m * n * k / (target.lower ? 2 : 1) < kSmallProduct) threads = Threads::kOne;
  const int64_t workers = count_workers(threads);
  const Parts<T> parts{m, n, k};
  if (threads == Threads::kAll && parts.count > 1) {
    parts.multiply(threads, [&](int64_t, int64_t first, int64_t depth, T* partial) {
      multiply_alone(tiles_for<T>(m, n, depth), T(1), a.block(0, first, m, depth),
                     b.block(first, 0, depth, n), T(0),
                     Target<T>{partial, n, target.lower, target.diagonal});
    });
    return parts.add(alpha, beta, target, threads, finish);
  }
  const Tiles<T>& tiles = tiles_for<T>(m, n, k);
  if (workers == 1) return multiply_alone(tiles, alpha, a, b, beta, target, finish);
  const Grid grid = choose_grid(tiles, m, n, k, target.lower, workers);
  if (grid.count() == 1) return multiply_together(tiles, alpha, a, b, beta, target, finish);
  for_each_task(grid.count(), threads, [&](int64_t task) {
    const Block c = grid.block(task);
    multiply_alone(tiles, alpha, a.block(c.row, 0, c.rows, k), b.block(0, c.col, k, c.cols), beta,
                   target.block(c.row, c.col),
                   [&](int64_t row, int64_t col, int64_t rows, int64_t cols) {
                     finish(c.row + row, c.col + col, rows, cols);
                   });
  });
}

// C[i, j] += w s_i s_j for j <= i, then C[j, i] = C[i, j]; in blocks that stay in L1.
template <class T>
void finish_symmetric(T* c, int64_t ldc, RankOne<T> term, Triangle triangle, int64_t row,
                      int64_t col, int64_t rows, int64_t cols) {
  if (term.vector != nullptr) {
    const T* s = term.vector;
    for (int64_t i = row; i < row + rows; ++i) {
      const T factor = term.weight * s[i];
      const int64_t end = std::min(col + cols, i + 1);
      for (int64_t j = col; j < end; ++j) c[i * ldc + j] += factor * s[j];
    }
  }
  if (triangle == Triangle::kLower) return;
  // Blocks of 32 x 32: read and written while in the L1 cache, and off the diagonal by vectors.
  constexpr int64_t kBlock = 32;
  for (int64_t j0 = col; j0 < col + cols; j0 += kBlock) {
    const int64_t j1 = std::min(j0 + kBlock, col + cols);
    const int64_t below = std::clamp(j1, row, row + rows);
    for (int64_t j = j0; j < j1; ++j) {
      for (int64_t i = std::max(row, j + 1); i < below; ++i) c[j * ldc + i] = c[i * ldc + j];
    }
    microkernel<T>().transpose(row + rows - below, j1 - j0, c + below * ldc + j0, ldc,
                               c + j0 * ldc + below, ldc);
  }
}

}  // namespace gemm_detail

// C[m, n] = beta C + alpha A[m, k] B[k, n].
template <class T, class SA, class SB>
void gemm(T alpha, const Matrix<SA>& a, const Matrix<SB>& b, T beta, T* c, int64_t ldc,
          Threads threads) {
  gemm_detail::run<T>(alpha, a, b, beta, {c, ldc}, threads);
}

// C[m, m] = beta C + alpha A[m, k] A^T + w s s^T. Only C's lower triangle is read; the upper one
// is left alone (kLower) or becomes its mirror image, to the bit (kBoth).
template <class T, class S>
void symmetric_product(T alpha, const Matrix<S>& a, T beta, T* c, int64_t ldc, Triangle triangle,
                       Threads threads, RankOne<T> term = {}) {
  gemm_detail::run<T>(alpha, a, a.transposed(), beta, {c, ldc, /*lower=*/true}, threads,
                      [&](int64_t row, int64_t col, int64_t rows, int64_t cols) {
                        gemm_detail::finish_symmetric(c, ldc, term, triangle, row, col, rows, cols);
                      });
}

}  // namespace fused_so
