// The fibers and the checks of cuda_runtime.h. Compiled without instrumentation.
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

// For the tests.
int launches = 0;
char error[400];

// Fibers.

enum class State { kReady, kAtBlockBarrier, kInWarp, kFinished };

struct Fiber {
  State state;
  bool started;
  const char* file;  // where it waits
  int line;
  uint32_t warp_meetings;
  jmp_buf context;
};

struct Warp {
  unsigned waiting;
  unsigned char pieces[2][kWarp][cuda_shim::kPieceBytes];  // by turns: one meeting may be read late
};

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kWarp];
Fiber* current = nullptr;  // null: the host runs
jmp_buf scheduler;
uint32_t barriers;       // that the block has passed
int64_t blocks_run = 0;  // of all launches
void (*thread_body)(void*);
void* thread_argument;
std::mt19937 random_order;

unsigned index_of(const Fiber* fiber) { return static_cast<unsigned>(fiber - fibers); }

unsigned char* stacks() {
  static void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(memory);
}

// Ends the launch; the fibers are left where they are. The first error counts.
[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int length = 0;
  if (current != nullptr) {
    length = std::snprintf(error, sizeof error, "block %u, thread %u: ", blockIdx.x, threadIdx.x);
  }
  std::vsnprintf(error + length, sizeof error - length, format, arguments);
  va_end(arguments);
  _longjmp(scheduler, 2);
}

void fiber_main() {
  thread_body(thread_argument);
  current->state = State::kFinished;
  _longjmp(scheduler, 1);
}

void start(Fiber* fiber) {
  fiber->started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks() + index_of(fiber) * kStackBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

// Runs a fiber until it waits or finishes. False: the launch has failed.
bool resume(Fiber* fiber) {
  current = fiber;
  threadIdx = dim3(index_of(fiber));
  const int result = _setjmp(scheduler);
  if (result == 0) {
    if (current->started) _longjmp(current->context, 1);
    start(current);
  }
  current = nullptr;
  return result != 2;
}

void wait(State state, const char* file, int line) {
  current->state = state;
  current->file = file;
  current->line = line;
  // setjmp, not swapcontext: that would be two system calls a switch.
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void describe(char* text, size_t size, const Fiber& fiber) {
  if (fiber.state == State::kFinished) {
    std::snprintf(text, size, "thread %u has finished", index_of(&fiber));
  } else {
    const char* what = fiber.state == State::kInWarp ? "in a warp operation" : "at a barrier";
    std::snprintf(text, size, "thread %u waits %s, line %d", index_of(&fiber), what, fiber.line);
  }
}

bool meet(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.line == b.line && a.file == b.file;
}

// The warp's last thread has come: all go on, if all came to the same place.
void release_warp(unsigned warp, unsigned threads) {
  const unsigned begin = warp * kWarp, end = std::min(begin + kWarp, threads);
  if (warps[warp].waiting < kWarp) return;
  for (unsigned t = begin; t < end; ++t) {
    if (!meet(fibers[t], fibers[begin])) return;
  }
  warps[warp].waiting = 0;
  for (unsigned t = begin; t < end; ++t) {
    fibers[t].state = State::kReady;
    ++fibers[t].warp_meetings;
  }
}

bool run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].state = State::kReady;
    fibers[t].started = false;
    fibers[t].warp_meetings = 0;
  }
  for (Warp& warp : warps) warp.waiting = 0;
  barriers = 0;
  ++blocks_run;
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_order);
    for (unsigned t : order) {
      if (fibers[t].state != State::kReady) continue;
      if (!resume(&fibers[t])) return false;
      if (fibers[t].state == State::kInWarp) release_warp(t / kWarp, threads);
    }
    const auto with_state = [&](State state) {
      return std::count_if(fibers, fibers + threads, [&](Fiber& f) { return f.state == state; });
    };
    if (with_state(State::kReady) != 0) continue;
    if (with_state(State::kFinished) == threads) return true;
    const auto all_meet = [&](Fiber& fiber) { return meet(fiber, fibers[0]); };
    const Fiber* other = std::find_if_not(fibers, fibers + threads, all_meet);
    if (other != fibers + threads || fibers[0].state != State::kAtBlockBarrier) {
      // A warp operation that all threads wait in still lacks lanes.
      if (other == fibers + threads) other = fibers;
      char one[100], two[100];
      describe(one, sizeof one, fibers[0]);
      describe(two, sizeof two, *other);
      std::snprintf(error, sizeof error, "block %u diverged: %s, %s", blockIdx.x, one, two);
      return false;
    }
    ++barriers;
    for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::kReady;
  }
}

// Memory.

struct Access {
  int64_t launch = 0;  // for shared memory, the number of blocks run
  unsigned block = 0, thread = 0;
  uint32_t barriers = 0, warp_meetings = 0;
};

struct Cell {
  bool written = false;
  Access write, reads[2];
};

struct Range {
  const char* name;
  uintptr_t begin, end;
  size_t bytes_each;
  cuda_shim::Use use;
  bool shared;
  std::vector<Cell> cells;
};

std::vector<Range> ranges;  // sorted when a launch begins
Range shared_memory{"shared memory", 0, 0, 4, cuda_shim::Use::kOutput, true, {}};
uintptr_t module_begin, module_end;  // this library's own constants and variables
thread_local volatile char shared_anchor;

// This thread's copy of the library's thread_local variables, which are the shared arrays.
int find_module(dl_phdr_info* info, size_t, void* found) {
  const auto address = reinterpret_cast<uintptr_t>(&ranges);
  uintptr_t begin = UINTPTR_MAX, end = 0, tls_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
    if (header.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  if (address < begin || address >= end) return 0;
  module_begin = begin;
  module_end = end;
  auto* range = static_cast<Range*>(found);
  range->begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  range->end = range->begin + tls_bytes;
  return 1;
}

void find_shared_memory() {
  shared_anchor = 1;  // makes this thread's copy
  dl_iterate_phdr(find_module, &shared_memory);
  const size_t bytes = shared_memory.end - shared_memory.begin;
  shared_memory.cells.resize(bytes / shared_memory.bytes_each + 1);
}

void poison_shared_memory() {
  // NaN in every floating dtype.
  std::memset(reinterpret_cast<void*>(shared_memory.begin), 0xff,
              shared_memory.end - shared_memory.begin);
}

Range* range_of(uintptr_t address) {
  static Range* last = nullptr;
  const auto holds = [&](const Range& r) { return address >= r.begin && address < r.end; };
  if (holds(shared_memory)) return &shared_memory;
  const bool valid = last >= ranges.data() && last < ranges.data() + ranges.size();
  if (valid && holds(*last)) return last;
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                      [](uintptr_t a, const Range& r) { return a < r.begin; });
  if (after == ranges.begin() || !holds(*std::prev(after))) return nullptr;
  return last = &*std::prev(after);
}

bool unordered(const Access& before, const Access& now) {
  if (before.launch != now.launch) return false;
  if (before.block != now.block) return true;
  if (before.thread == now.thread || before.barriers != now.barriers) return false;
  const bool same_warp = before.thread / kWarp == now.thread / kWarp;
  return !same_warp || before.warp_meetings == now.warp_meetings;
}

void check(uintptr_t address, size_t bytes, bool write) {
  if (current == nullptr) return;
  const auto stack = reinterpret_cast<uintptr_t>(stacks());
  if (address - stack < kMaxThreads * kStackBytes) return;
  Range* range = range_of(address);
  const char* verb = write ? "writes" : "reads";
  if (range == nullptr) {
    // Constants, threadIdx and the like.
    if (!write && address >= module_begin && address < module_end) return;
    fail("%s %zu bytes that belong to nothing", verb, bytes);
  }
  const size_t first = (address - range->begin) / range->bytes_each;
  if (address + bytes > range->end) fail("%s beyond %s", verb, range->name);
  if (write && range->use == cuda_shim::Use::kInput) fail("writes to the input %s", range->name);
  const Access now{range->shared ? blocks_run : launches, blockIdx.x, threadIdx.x, barriers,
                   current->warp_meetings};
  for (size_t c = first; c * range->bytes_each < address + bytes - range->begin; ++c) {
    Cell& cell = range->cells[c];
    const bool known = range->shared ? cell.write.launch == now.launch : cell.written;
    if (!write && !known && range->use == cuda_shim::Use::kOutput) {
      fail("reads entry %zu of %s, which nobody has written", c, range->name);
    }
    const Access* others[] = {&cell.write, &cell.reads[0], &cell.reads[1]};
    for (int o = 0; o < (write ? 3 : 1); ++o) {
      if (unordered(*others[o], now)) {
        fail("%s entry %zu of %s in a race with block %u, thread %u", verb, c, range->name,
             others[o]->block, others[o]->thread);
      }
    }
    if (write) {
      cell.write = now;
      cell.written = true;
    } else {
      // One that is not yet in order with this one stays, for it may race with a later write.
      cell.reads[unordered(cell.reads[0], now)] = now;
    }
  }
}

}  // namespace

namespace cuda_shim {

void allow(const char* name, const void* data, size_t count, size_t bytes_each, Use use) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (count == 0) return;
  ranges.push_back(
      {name, begin, begin + count * bytes_each, bytes_each, use, false, std::vector<Cell>(count)});
}

void forget() { ranges.clear(); }

unsigned lane() { return threadIdx.x % kWarp; }

void meet_block(const char* file, int line) { wait(State::kAtBlockBarrier, file, line); }

const unsigned char* meet_warp(const char* file, int line, const void* data, size_t bytes) {
  Warp& warp = warps[threadIdx.x / kWarp];
  auto& pieces = warp.pieces[current->warp_meetings % 2];
  if (bytes != 0) std::memcpy(pieces[lane()], data, bytes);
  ++warp.waiting;
  wait(State::kInWarp, file, line);
  return pieces[0];
}

void require_full_mask(uint32_t mask) {
  if (mask != 0xffffffffu) fail("only full masks are supported, got %#x", mask);
}

// As the hardware does: exact products of what 19 bits of each operand hold, a sum of more bits
// than float has, and the rest cut off.
void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* pieces = meet_warp(__FILE__, __LINE__, mine, sizeof mine);
  const auto operand = [&](int from, int i) {
    uint32_t bits;
    std::memcpy(&bits, pieces + from * kPieceBytes + i * sizeof bits, sizeof bits);
    return static_cast<double>(__uint_as_float(bits & ~0x1fffu));
  };
  for (int e = 0; e < 4; ++e) {
    const int row = static_cast<int>(lane()) / 4 + 8 * (e / 2);
    const int column = 2 * (static_cast<int>(lane()) % 4) + e % 2;
    double sum = c[e];
    for (int k = 0; k < 8; ++k) {
      sum += operand(row % 8 * 4 + k % 4, row / 8 + 2 * (k / 4)) *
             operand(column * 4 + k % 4, 4 + k / 4);
    }
    float cut = static_cast<float>(sum);
    if (std::abs(static_cast<double>(cut)) > std::abs(sum)) cut = std::nextafter(cut, 0.0f);
    c[e] = cut;
  }
}

cudaError_t run(dim3 grid, dim3 block, void (*thread)(void*), void* argument) {
  const bool one_dimensional = grid.y * grid.z * block.y * block.z == 1;
  if (!one_dimensional || grid.x == 0 || grid.x > INT32_MAX || block.x == 0 ||
      block.x > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  ++launches;
  gridDim = grid;
  blockDim = block;
  thread_body = thread;
  thread_argument = argument;
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  find_shared_memory();
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (unsigned b : order) {
    blockIdx = dim3(b);
    poison_shared_memory();
    if (!run_block(block.x)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_shim

// For the tests: a new beginning, with another order of threads; how many launches there were
// since, and what went wrong.
extern "C" void shim_reset(unsigned seed) {
  random_order.seed(seed);
  launches = 0;
  error[0] = 0;
  for (Range& range : ranges) range.cells.assign(range.cells.size(), Cell());
}
extern "C" int shim_launches() { return launches; }
extern "C" const char* shim_error() { return error; }

// What g++ -fsanitize=thread calls before every access. Only of a kernel's are there any checks.
#define FUSED_SO_REPORT(bytes)                                                                 \
  extern "C" void __tsan_read##bytes(void* p) { check((uintptr_t)p, bytes, false); }           \
  extern "C" void __tsan_write##bytes(void* p) { check((uintptr_t)p, bytes, true); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { check((uintptr_t)p, bytes, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { check((uintptr_t)p, bytes, true); }
FUSED_SO_REPORT(1)
FUSED_SO_REPORT(2)
FUSED_SO_REPORT(4)
FUSED_SO_REPORT(8)
FUSED_SO_REPORT(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { check((uintptr_t)p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { check((uintptr_t)p, bytes, true); }

// What g++ -fsanitize=undefined calls for an index beyond an array whose size it knows.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(SourceLocation* at, size_t index) {
  if (current == nullptr) std::abort();
  fail("index %zd is out of bounds, line %u", static_cast<ssize_t>(index), at->line);
}

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
