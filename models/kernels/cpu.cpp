// What a step does on a CPU: matrix products, and what lies between them. Plain C++ behind a C interface, without
// torch's headers: it builds in seconds and fits any torch. `models/kernels/cpu.py` builds it, calls it, and holds the plain-torch twins.
//
// T is float or Bf16. Widths are multiples of 16 (head_dim and a product's outputs of 32), which the caller checks.

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr long kLanes = 16;
constexpr long kTile = 64;           // keys that are scored at once
constexpr long kQueries = 32;        // rows (token, head) of a KV head that share one reading of its keys, about
constexpr long kParallel = 1 << 14;  // elements under which waking the threads costs more than the work
constexpr long kPanel = 2;           // vectors of outputs that a product computes at once
constexpr long kRows = 12;           // times that many rows: 24 sums, the 32 registers' share

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));

struct Bf16 {
  uint16_t bits;
};

template <class To, class From>
To load_as(const From* from) {
  To value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Floats load(const float* from) { return load_as<Floats>(from); }
Floats load(const Bf16* from) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}
void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
void store(Bf16* to, Floats value) {  // to nearest, ties to even
  Words bits = reinterpret_cast<Words>(value);
  Halves halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

Floats turned(Floats value, Ints lanes) {
  constexpr Ints order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return __builtin_shuffle(value, order ^ lanes);
}
float sum(Floats value) {
  for (int lanes = kLanes / 2; lanes; lanes /= 2) value += turned(value, Ints{} + lanes);
  return value[0];
}
Floats larger(Floats a, Floats b) { return a > b ? a : b; }
float largest(Floats value) {
  for (int lanes = kLanes / 2; lanes; lanes /= 2) value = larger(value, turned(value, Ints{} + lanes));
  return value[0];
}
Floats absolute(Floats value) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) & 0x7fffffffu); }
Floats rounded(Floats value) { return (value + 12582912.f) - 12582912.f; }  // to an integer, if |value| < 2^22

// Within 2 units in the last place; a NaN stays one. Below -87 it is about 1e-38 and not 0.
Floats exponential(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x;
  x = x > 88.f ? Floats{} + 88.f : x;
  Floats n = rounded(x * 1.44269504f);
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
              1.6666665459e-1f) * r + 5.0000001201e-1f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return (p * r * r + r + 1.f) * reinterpret_cast<Floats>(power);
}

// One row as unsigned bytes around 128, scaled by its own largest value.
void quantize_row(const float* row, long width, uint8_t* out, float* scale) {
  Floats top{};
  for (long i = 0; i < width; i += kLanes) top = larger(absolute(load(row + i)), top);
  *scale = std::max(largest(top) / 127.f, 1e-12f);
  float inverse = 1.f / *scale;
  for (long i = 0; i < width; i += kLanes) {
    Ints whole = __builtin_convertvector(rounded(load(row + i) * inverse), Ints) + 128;
    Bytes bytes = __builtin_convertvector(whole, Bytes);
    std::memcpy(out + i, &bytes, sizeof bytes);
  }
}

// Where a row's results go: as they are, or quantized.
template <class T>
struct Sink {
  T* plain;
  uint8_t* bytes;
  float* scales;

  void put(long row, const float* values, long width) const {
    if (bytes) return quantize_row(values, width, bytes + row * width, scales + row);
    for (long i = 0; i < width; i += kLanes) store(plain + row * width + i, load(values + i));
  }
};

float* scratch(long floats) {
  thread_local std::vector<float> memory;
  if (static_cast<long>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

template <class T>
void quantize(const T* x, Sink<T> sink, long rows, long width) {
#pragma omp for
  for (long row = 0; row < rows; ++row) {
    float* values = scratch(width);
    for (long i = 0; i < width; i += kLanes) store(values + i, load(x + row * width + i));
    sink.put(row, values, width);
  }
}

template <class T>
void add_norm(T* residual, const T* added, const float* added_scales, const T* weight, float epsilon, Sink<T> sink,
              long rows, long width) {
#pragma omp for
  for (long row = 0; row < rows; ++row) {
    float* values = scratch(width);
    T* own = residual + row * width;
    float scale = added_scales ? added_scales[row] : 1.f;
    Floats squares{};
    for (long i = 0; i < width; i += kLanes) {
      if (added) store(own + i, load(own + i) + load(added + row * width + i) * scale);
      Floats x = load(own + i);
      squares += x * x;
      store(values + i, x);
    }
    float factor = 1.f / std::sqrt(sum(squares) / width + epsilon);
    for (long i = 0; i < width; i += kLanes) store(values + i, load(values + i) * factor * load(weight + i));
    sink.put(row, values, width);
  }
}

template <class T>
void silu_multiply(const T* gate_up, const float* scales, Sink<T> sink, long rows, long width) {
#pragma omp for
  for (long row = 0; row < rows; ++row) {
    float* values = scratch(width);
    const T *gates = gate_up + row * 2 * width, *ups = gates + width;
    float scale = scales ? scales[row] : 1.f;
    for (long i = 0; i < width; i += kLanes) {
      Floats gate = load(gates + i) * scale;
      store(values + i, gate / (exponential(-gate) + 1.f) * (load(ups + i) * scale));
    }
    sink.put(row, values, width);
  }
}

struct Heads {
  long query, kv, dim;
};

template <class T>
void rotate(float* x, const T* cos, const T* sin, const T* weight, float epsilon, long dim) {
  long half = dim / 2;
  if (weight) {
    Floats squares{};
    for (long i = 0; i < dim; i += kLanes) squares += load(x + i) * load(x + i);
    float factor = 1.f / std::sqrt(sum(squares) / dim + epsilon);
    for (long i = 0; i < dim; i += kLanes) store(x + i, load(x + i) * factor * load(weight + i));
  }
  for (long i = 0; i < half; i += kLanes) {
    Floats a = load(x + i), b = load(x + half + i);
    store(x + i, a * load(cos + i) - b * load(sin + i));
    store(x + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
}

// Queries are rotated where they are; keys are rotated into the pool, values copied there.
template <class T>
void rotary_write(T* qkv, const float* scales, const T* bias, const T* cos, const T* sin, const T* query_norm,
                  const T* key_norm, float epsilon, const int64_t* slots, T* keys, T* values, long tokens, Heads heads,
                  long block_tokens) {
  long dim = heads.dim, all = heads.query + 2 * heads.kv;
#pragma omp for
  for (long token = 0; token < tokens; ++token) {
    float* x = scratch(dim);
    float scale = scales ? scales[token] : 1.f;
    long block = slots[token] / block_tokens, offset = slots[token] % block_tokens;
    for (long head = 0; head < all; ++head) {
      T *own = qkv + (token * all + head) * dim, *to = own;
      long kv = head - heads.query;
      if (kv >= 0) {
        T* pool = kv < heads.kv ? keys : values;
        to = pool + ((block * heads.kv + kv % heads.kv) * block_tokens + offset) * dim;
      }
      for (long i = 0; i < dim; i += kLanes) {
        Floats part = load(own + i) * scale;
        store(x + i, bias ? part + load(bias + head * dim + i) : part);
      }
      if (kv < heads.kv) rotate(x, cos + token * dim, sin + token * dim, kv < 0 ? query_norm : key_norm, epsilon, dim);
      for (long i = 0; i < dim; i += kLanes) store(to + i, load(x + i));
    }
  }
}

// Attention works on 32-bit words: one float, or two neighbouring Bf16 that are multiplied and summed as a pair.
template <class T>
constexpr long kPerWord = sizeof(uint32_t) / sizeof(T);

template <class T>
Floats multiply_add(Floats total, Words a, Words b) {
  if constexpr (kPerWord<T> == 1) return total + reinterpret_cast<Floats>(a) * reinterpret_cast<Floats>(b);
#ifdef __AVX512BF16__
  return reinterpret_cast<Floats>(__builtin_ia32_dpbf16ps_v16sf(
      total, reinterpret_cast<__attribute__((vector_size(64))) short>(a),
      reinterpret_cast<__attribute__((vector_size(64))) short>(b)));
#else
  total += reinterpret_cast<Floats>(a << 16) * reinterpret_cast<Floats>(b << 16);
  return total + reinterpret_cast<Floats>(a & 0xffff0000u) * reinterpret_cast<Floats>(b & 0xffff0000u);
#endif
}

// Rows of unsigned bytes, weights of signed ones: four of each in a word.
struct Int8 {};

// Rows of Bf16 that were made floats, weights that were not: where the CPU multiplies only floats, half of the work of
// making them is saved by doing it once.
struct Widened {};

// What a product adds up, from a row's next words and one of its weights'.
template <class In>
struct Sum {
  using Type = Floats;
  static constexpr long kWords = 1;
  static Floats add(Floats total, const uint32_t* a, Words b) { return multiply_add<In>(total, Words{} + *a, b); }
};
template <>
struct Sum<Widened> {
  using Type = Floats;
  static constexpr long kWords = 2;
  static Floats add(Floats total, const uint32_t* a, Words b) {
    total = multiply_add<float>(total, Words{} + a[0], b << 16);
    return multiply_add<float>(total, Words{} + a[1], b & 0xffff0000u);
  }
};
template <>
struct Sum<Int8> {
  using Type = Ints;
  static constexpr long kWords = 1;
  static Ints add(Ints total, const uint32_t* words, Words b) {
    Words a = Words{} + *words;
#ifdef __AVX512VNNI__
    return __builtin_ia32_vpdpbusd_v16si(total, reinterpret_cast<Ints>(a), reinterpret_cast<Ints>(b));
#else
    for (int at = 0; at < 32; at += 8)
      total += reinterpret_cast<Ints>(a >> at & 0xffu) * (reinterpret_cast<Ints>(b << (24 - at)) >> 24);
    return total;
#endif
  }
};

// Where a product's sums go. Those of bytes are brought back to their scale; `shifts` is what the rows' zero point adds.
template <class T>
struct Output {
  T* to;
  long columns;
  const T* bias;
  const float *row_scales, *scales;
  const int32_t* shifts;

  void put(long row, long column, Floats value) const {
    store(to + row * columns + column, bias ? value + load(bias + column) : value);
  }
  void put(long row, long column, Ints total) const {
    Floats whole = __builtin_convertvector(total - load_as<Ints>(shifts + column), Floats);
    put(row, column, whole * (row_scales[row] * load(scales + column)));
  }
};

// Memory that will be read next, word by word of a panel.
struct Ahead {
  const Words* panel;
  long words;
};

template <class In, class T, int ROWS>
void product_tile(const uint32_t* x, const Words* panel, long depth, Ahead ahead, const Output<T>& out, long row,
                  long column) {
  typename Sum<In>::Type total[ROWS][kPanel] = {};
  for (long d = 0; d < depth; ++d) {
    if (d < ahead.words)
      for (long k = 0; k < kPanel; ++k) __builtin_prefetch(ahead.panel + d * kPanel + k, 0, 2);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r)
      for (long k = 0; k < kPanel; ++k)
        total[r][k] = Sum<In>::add(total[r][k], x + (r * depth + d) * Sum<In>::kWords, panel[d * kPanel + k]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (long k = 0; k < kPanel; ++k) out.put(row + r, column + k * kLanes, total[r][k]);
}

template <class In, class T, size_t... MORE>
constexpr auto product_tiles(std::index_sequence<MORE...>) {
  return std::array{&product_tile<In, T, MORE + 1>...};
}

// x (rows, depth words) times weights (panels of 32 outputs, depth, 32 words). Each thread reads its panels once, in
// order: all rows pass while one is in the second-level cache, and meanwhile the next is fetched.
template <class In, class T>
void product(const uint32_t* x, const Words* weights, long rows, long depth, const Output<T>& out) {
  static constexpr auto tiles = product_tiles<In, T>(std::make_index_sequence<kRows>());
  long panels = out.columns / (kPanel * kLanes), blocks = (rows + kRows - 1) / kRows;
  long share = blocks ? (depth + blocks - 1) / blocks : 0;
  long threads = omp_get_num_threads(), thread = omp_get_thread_num(), end = panels * (thread + 1) / threads;
  for (long p = panels * thread / threads; p < end; ++p) {
    const Words *panel = weights + p * depth * kPanel, *next = panel + depth * kPanel;
    for (long i = 0; i < blocks; ++i) {
      long row = rows * i / blocks, count = rows * (i + 1) / blocks - row;
      Ahead ahead{next + i * share * kPanel, p + 1 < end ? std::min(share, depth - i * share) : 0};
      tiles[count - 1](x + row * depth * Sum<In>::kWords, panel, depth, ahead, out, row, p * kPanel * kLanes);
    }
  }
#pragma omp barrier
}

// c (rows x 16*columns) += a (rows x depth words) * b (depth words x 16*columns)
template <class T, int ROWS, int COLUMNS>
void multiply_tile(const uint32_t* a, long a_stride, const Words* b, long b_stride, Floats* c, long c_stride,
                   long depth) {
  Floats total[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < COLUMNS; ++k) total[r][k] = c[r * c_stride + k];
  for (long d = 0; d < depth; ++d)
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < COLUMNS; ++k)
        total[r][k] = multiply_add<T>(total[r][k], Words{} + a[r * a_stride + d], b[d * b_stride + k]);
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < COLUMNS; ++k) c[r * c_stride + k] = total[r][k];
}

template <class T, int ROWS>
void multiply_rows(const uint32_t* a, long a_stride, const Words* b, Floats* c, long depth, long columns) {
  long k = 0;
  for (; k + 4 <= columns; k += 4) multiply_tile<T, ROWS, 4>(a, a_stride, b + k, columns, c + k, columns, depth);
  for (; k + 2 <= columns; k += 2) multiply_tile<T, ROWS, 2>(a, a_stride, b + k, columns, c + k, columns, depth);
}

template <class T>
void multiply(const uint32_t* a, const Words* b, Floats* c, long rows, long depth, long columns) {
  long r = 0;
  for (; r + 4 <= rows; r += 4) multiply_rows<T, 4>(a + r * depth, depth, b, c + r * columns, depth, columns);
  if (rows - r == 3) multiply_rows<T, 3>(a + r * depth, depth, b, c + r * columns, depth, columns);
  if (rows - r == 2) multiply_rows<T, 2>(a + r * depth, depth, b, c + r * columns, depth, columns);
  if (rows - r == 1) multiply_rows<T, 1>(a + r * depth, depth, b, c + r * columns, depth, columns);
}

// 16 x 16 words: out[i * out_stride] holds word i of each of 16 rows
void transpose(const uint32_t* rows, long stride, Words* out, long out_stride) {
  Words a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = load_as<Words>(rows + i * stride);
  constexpr Words low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Words high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int stage = 0; stage < 4; ++stage) {  // a perfect shuffle of all 256 words, four times
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
    }
    std::copy(b, b + 16, a);
  }
  for (int i = 0; i < 16; ++i) out[i * out_stride] = a[i];
}

template <class T>
struct Attention {
  const T* query;  // (tokens, heads, dim), the first stride apart
  long query_stride;
  T* out;  // (tokens, heads, dim)
  const T *keys, *values;
  const int32_t* tables;
  long table_stride, block_tokens, window;
  Heads heads;
  float scaling, softcap;
  const float* sinks;

  long groups() const { return heads.query / heads.kv; }
  const T* block(const T* pool, long row, long key, long kv) const {
    long number = tables[row * table_stride + key / block_tokens];
    return pool + ((number * heads.kv + kv) * block_tokens + key % block_tokens) * heads.dim;
  }
};

// Neighbouring tokens of one row: where their queries lie, where the results go, and how many keys the last one sees.
struct Span {
  long row, query, out, tokens, context;
};

// Some tokens of a span, the query heads of one KV head, and a stretch of its keys.
struct Task {
  long row, query, out, tokens, place;  // place: of the first token in its row
  long kv, from, to;
  bool sinks;  // it is the one that counts them
};

// Every `splits` tasks are parts of one, which several threads share since there are few.
struct Tasks {
  std::vector<Task> all;
  long splits, rows;  // rows: (token, head of a group), of the largest
};

Tasks tasks_of(const std::vector<Span>& spans, Heads heads, long window) {
  long groups = heads.query / heads.kv, most = std::max(1L, kQueries / groups), whole = 0, longest = 0, largest = 0;
  for (const Span& span : spans) {
    whole += heads.kv * ((span.tokens + most - 1) / most);
    longest = std::max(longest, span.context);
    largest = std::max(largest, std::min(span.tokens, most));
  }
  long threads = omp_get_max_threads();
  long splits = threads > 1 && whole ? std::max(1L, std::min(4 * threads / whole, longest / (2 * kTile))) : 1;
  Tasks tasks{{}, splits, largest * groups};
  tasks.all.reserve(whole * splits);
  for (const Span& span : spans)
    for (long kv = 0; kv < heads.kv; ++kv)
      for (long first = 0; first < span.tokens; first += most) {
        long tokens = std::min(most, span.tokens - first), place = span.context - span.tokens + first;
        long end = place + tokens;  // the last of these tokens sees this many
        long begin = window > 0 ? std::max(0L, place - window + 1) / kTile * kTile : 0;
        long share = ((end - begin + splits - 1) / splits + kTile - 1) / kTile * kTile;
        for (long split = 0; split < splits; ++split)
          tasks.all.push_back({span.row, span.query + first, span.out + first, tokens, place, kv,
                               std::min(end, begin + split * share), std::min(end, begin + (split + 1) * share),
                               split == 0});
      }
  return tasks;
}

// Rows are (token, head of the group). Unnormalized sums stay beside the largest score and the sum of weights.
template <class T>
struct Partial {
  std::vector<Floats> total;  // (rows, dim / 16)
  std::vector<float> top, weight;

  void fit(long rows, long dim) { total.resize(rows * dim / kLanes), top.resize(rows), weight.resize(rows); }
};

template <class T>
void score_row(const Attention<T>& all, Floats* scores, T* weights, long first_key, long from, long to, float& top,
               float& weight, Floats* total) {
  Floats best = Floats{} + top;
  Ints visible[kTile / kLanes];
  for (long k = 0; k < kTile / kLanes; ++k) {
    Ints at = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + static_cast<int>(first_key + k * kLanes);
    visible[k] = (at >= static_cast<int>(from)) & (at < static_cast<int>(to));
    Floats x = scores[k] * all.scaling;
    if (all.softcap > 0) x = all.softcap - 2 * all.softcap / (exponential(x * (2 / all.softcap)) + 1.f);
    scores[k] = x;
    best = visible[k] ? larger(x, best) : best;
  }
  float before = top, sums = 0;
  top = largest(best);
  Floats added{};
  for (long k = 0; k < kTile / kLanes; ++k) {
    Floats x = visible[k] ? exponential(scores[k] - top) : Floats{};
    added += x;
    store(weights + k * kLanes, x);
  }
  sums = sum(added);
  if (top != before) {
    float factor = std::exp(before - top);
    weight *= factor;
    for (long k = 0; k < all.heads.dim / kLanes; ++k) total[k] *= factor;
  }
  weight += sums;
}

template <class T>
void attend(const Attention<T>& all, const Task& task, const Task& next, Partial<T>& state) {
  long groups = all.groups(), rows = task.tokens * groups, dim = all.heads.dim, columns = dim / kLanes;
  long words = dim / kPerWord<T>;
  thread_local std::vector<uint32_t> queries;
  thread_local std::vector<Words> keys, values;
  thread_local std::vector<Floats> scores;
  thread_local std::vector<T> weights;
  queries.resize(rows * words), keys.resize(words * kTile / kLanes), values.resize(kTile / kPerWord<T> * columns);
  scores.resize(rows * kTile / kLanes), weights.resize(rows * kTile);
  for (long row = 0; row < rows; ++row) {
    const T* from = all.query + (task.query + row / groups) * all.query_stride + (task.kv * groups + row % groups) * dim;
    std::memcpy(queries.data() + row * words, from, dim * sizeof(T));
    bool sink = all.sinks && task.sinks;
    state.top[row] = sink ? all.sinks[task.kv * groups + row % groups] : -1e30f;
    state.weight[row] = sink ? 1.f : 0.f;
  }
  std::fill(state.total.begin(), state.total.begin() + rows * columns, Floats{});
  for (long tile = task.from; tile < task.to; tile += kTile) {
    for (long k = 0; k < kTile; k += kLanes) {
      long key = std::min(tile + k, (task.to - 1) / kLanes * kLanes);  // past the end: any that exists, for no weight
      // What comes next, a tile later or in the next task, is fetched meanwhile, some lines at a time.
      const Task& then = tile + kTile < task.to ? task : next;
      long later = std::min((&then == &task ? tile + kTile : next.from) + k, (then.to - 1) / kLanes * kLanes);
      auto key_ahead = reinterpret_cast<const char*>(all.block(all.keys, then.row, later, then.kv));
      auto value_ahead = reinterpret_cast<const char*>(all.block(all.values, then.row, later, then.kv));
      auto from = reinterpret_cast<const uint32_t*>(all.block(all.keys, task.row, key, task.kv));
      for (long d = 0; d < words; d += kLanes) {
        for (long i = 0; i < kLanes; ++i) __builtin_prefetch(key_ahead + (d / kLanes * kLanes + i) * 64, 0, 3);
        transpose(from + d, words, keys.data() + d * (kTile / kLanes) + k / kLanes, kTile / kLanes);
      }
      const T* value = all.block(all.values, task.row, key, task.kv);
      for (long j = 0; j < kLanes; j += kPerWord<T>)
        for (long c = 0; c < columns; ++c) {
          __builtin_prefetch(value_ahead + (j * columns + c * kPerWord<T>) * 64 / kPerWord<T>, 0, 3);
          Words& to = values[(k + j) / kPerWord<T> * columns + c];
          const T* at = value + j * dim + c * kLanes;
          to = reinterpret_cast<Words>(load(at));
          if (kPerWord<T> == 2) to = (to >> 16) | reinterpret_cast<Words>(load(at + dim));
        }
    }
    std::fill(scores.begin(), scores.end(), Floats{});
    multiply<T>(queries.data(), keys.data(), scores.data(), rows, words, kTile / kLanes);
    for (long row = 0; row < rows; ++row) {
      long own = task.place + row / groups;
      long from = all.window > 0 ? std::max(task.from, own - all.window + 1) : task.from;
      score_row(all, &scores[row * kTile / kLanes], &weights[row * kTile], tile, from, std::min(task.to, own + 1),
                state.top[row], state.weight[row], &state.total[row * columns]);
    }
    multiply<T>(reinterpret_cast<const uint32_t*>(weights.data()), values.data(), state.total.data(), rows,
                kTile / kPerWord<T>, columns);
  }
}

// Put the parts of a task's keys together, each weighed by its own largest score.
template <class T>
void finish(const Attention<T>& all, const Task& task, const Partial<T>* parts, long count) {
  long groups = all.groups(), columns = all.heads.dim / kLanes;
  for (long row = 0; row < task.tokens * groups; ++row) {
    float top = parts[0].top[row], weight = 0;
    for (long i = 1; i < count; ++i) top = std::max(top, parts[i].top[row]);
    T* to = all.out + ((task.out + row / groups) * all.heads.query + task.kv * groups + row % groups) * all.heads.dim;
    for (long i = 0; i < count; ++i) weight += parts[i].weight[row] * std::exp(parts[i].top[row] - top);
    for (long c = 0; c < columns; ++c) {
      Floats total{};
      for (long i = 0; i < count; ++i)
        total += parts[i].total[row * columns + c] * (std::exp(parts[i].top[row] - top) / weight);
      store(to + c * kLanes, total);
    }
  }
}

// What the parts of a task leave, (tasks, splits); none if each has but one.
template <class T>
std::vector<Partial<T>> partials(const Tasks& tasks, long dim) {
  std::vector<Partial<T>> parts(tasks.splits > 1 ? tasks.all.size() : 0);
  for (Partial<T>& part : parts) part.fit(tasks.rows, dim);
  return parts;
}

template <class T>
void attention(const Attention<T>& all, const Tasks& tasks, std::vector<Partial<T>>& parts) {
  long count = tasks.all.size(), splits = tasks.splits, ahead = omp_get_num_threads();
  thread_local Partial<T> own;
  own.fit(tasks.rows, all.heads.dim);
#pragma omp for schedule(dynamic)
  for (long i = 0; i < count; ++i) {
    const Task& next = tasks.all[std::min(i + ahead, count - 1)];  // ours, if all are equally fast
    attend(all, tasks.all[i], next, splits > 1 ? parts[i] : own);
    if (splits == 1) finish(all, tasks.all[i], &own, 1);
  }
  if (splits == 1) return;
#pragma omp for
  for (long i = 0; i < count; i += splits) finish(all, tasks.all[i], &parts[i], splits);
}

// One thread, or all of torch's: each runs all of `work`, whose loops and barriers share it out.
template <class Work>
void as_team(bool all, const Work& work) {
#pragma omp parallel if (all)
  work();
}

// A linear layer as `Weights` in cpu.py has it. Without scales its words are those of T, else bytes.
struct Linear {
  const void *words, *bias;
  const float* scales;
  const int32_t* shifts;
  long inputs, outputs;
};

template <class T>
void multiply(const Linear& linear, const Sink<T>& x, T* out, long rows) {
  const Words* words = static_cast<const Words*>(linear.words);
  Output<T> output{out, linear.outputs, static_cast<const T*>(linear.bias), x.scales, linear.scales, linear.shifts};
#ifdef __AVX512BF16__
  constexpr bool widen = false;
#else
  constexpr bool widen = std::is_same_v<T, Bf16>;
#endif
  if (!linear.scales && widen) {
    float* values = scratch(rows * linear.inputs);
    for (long i = 0; i < rows * linear.inputs; i += kLanes) store(values + i, load(x.plain + i));
    product<Widened>(reinterpret_cast<const uint32_t*>(values), words, rows, linear.inputs / kPerWord<T>, output);
  } else if (linear.scales)
    product<Int8>(reinterpret_cast<const uint32_t*>(x.bytes), words, rows, linear.inputs / 4, output);
  else
    product<T>(reinterpret_cast<const uint32_t*>(x.plain), words, rows, linear.inputs / kPerWord<T>, output);
}

struct Norm {
  const void* weight;
  float epsilon;
};

// One decoder block over one pool.
struct Layer {
  Norm input_norm, query_norm, key_norm, mlp_norm;
  Linear qkv, out, gate_up, down;
  void *keys, *values;
  long window;
};

struct Stack {
  const Layer* layers;
  long count;
  Norm norm;
  long hidden, intermediate;
  Heads heads;
  float scaling;
  long block_tokens;
};

// The tokens of a step: rows' tokens lie one after the other, those of row r from firsts[r] on.
struct Step {
  long tokens, rows;
  void* residual;  // (tokens, hidden): the embedded tokens
  const void *cos, *sin;
  const int64_t *slots, *firsts;
  const int32_t *tables, *contexts;
  long table_stride;
  const int64_t* wanted;  // the tokens whose results are, in order, unless all are
  long outputs;
  void* out;  // (outputs, hidden), after the last norm
};

std::vector<Span> spans_of(const Step& step) {
  std::vector<Span> spans;
  for (long row = 0; row < step.rows; ++row) {
    long first = step.firsts[row], tokens = step.firsts[row + 1] - first;
    spans.push_back({row, first, first, tokens, step.contexts[row]});
  }
  return spans;
}

// Of the wanted tokens alone: neighbours of one row stay together.
std::vector<Span> wanted_spans(const Step& step) {
  std::vector<Span> spans;
  for (long i = 0, row = 0; i < step.outputs; ++i) {
    long token = step.wanted[i];
    bool follows = i && token == step.wanted[i - 1] + 1 && token < step.firsts[row + 1];
    while (token >= step.firsts[row + 1]) ++row;
    if (follows)
      ++spans.back().tokens, ++spans.back().context;
    else
      spans.push_back({row, token, i, 1, step.contexts[row] - (step.firsts[row + 1] - 1 - token)});
  }
  return spans;
}

// What a layer leaves to the next and its own parts to each other; kept from step to step, since fresh memory is slow.
template <class T>
struct Between {
  std::vector<Floats> memory[5];

  T* at(int which, long count) { return bytes_at<T>(which, count * sizeof(T)); }
  template <class As>
  As* bytes_at(int which, long bytes) {
    memory[which].resize(std::max<size_t>(memory[which].size(), (bytes + sizeof(Floats) - 1) / sizeof(Floats)));
    return reinterpret_cast<As*>(memory[which].data());
  }
};

template <class T>
void run_stack(const Stack& stack, const Step& step) {
  const Heads& heads = stack.heads;
  long tokens = step.tokens, hidden = stack.hidden, attended_width = heads.query * heads.dim;
  long qkv_width = attended_width + 2 * heads.kv * heads.dim;
  long widest = std::max({hidden, attended_width, stack.intermediate});
  thread_local Between<T> between;
  T* plain = between.at(0, tokens * widest);
  T* wide = between.at(1, tokens * std::max(qkv_width, 2 * stack.intermediate));
  T* added = between.at(2, tokens * hidden);
  uint8_t* bytes = between.template bytes_at<uint8_t>(3, tokens * widest);
  float* scales = between.template bytes_at<float>(4, tokens * sizeof(float));
  T* residual = static_cast<T*>(step.residual);
  auto input_of = [&](const Linear& next) {
    return next.scales ? Sink<T>{nullptr, bytes, scales} : Sink<T>{plain, nullptr, nullptr};
  };
  auto norm = [&](const Norm& by, T* sums, const T* more, Sink<T> sink, long rows) {
    add_norm(sums, more, nullptr, static_cast<const T*>(by.weight), by.epsilon, sink, rows, hidden);
  };

  std::vector<Span> spans = spans_of(step);
  std::map<long, Tasks> tasks;  // by the window
  for (long i = 0; i < stack.count; ++i)
    if (!tasks.count(stack.layers[i].window))
      tasks[stack.layers[i].window] = tasks_of(spans, heads, stack.layers[i].window);
  const Layer& end = stack.layers[stack.count - 1];
  bool some = step.outputs < tokens;
  Tasks last = some ? tasks_of(wanted_spans(step), heads, end.window) : tasks.at(end.window);
  std::vector<Partial<T>> parts = partials<T>(tasks.begin()->second, heads.dim);  // whatever the window, equally many
  std::vector<Partial<T>> last_parts = partials<T>(last, heads.dim);

  as_team(tokens * hidden * qkv_width > kParallel, [&] {
    T* sums = residual;
    long rows = tokens;
    for (long i = 0; i < stack.count; ++i) {
      const Layer& layer = stack.layers[i];
      T *keys = static_cast<T*>(layer.keys), *values = static_cast<T*>(layer.values);
      bool is_last = i == stack.count - 1;
      norm(layer.input_norm, sums, i ? added : nullptr, input_of(layer.qkv), rows);
      multiply(layer.qkv, input_of(layer.qkv), wide, tokens);
      rotary_write(wide, nullptr, static_cast<const T*>(nullptr), static_cast<const T*>(step.cos),
                   static_cast<const T*>(step.sin), static_cast<const T*>(layer.query_norm.weight),
                   static_cast<const T*>(layer.key_norm.weight), layer.key_norm.epsilon, step.slots, keys, values,
                   tokens, heads, stack.block_tokens);
      if (is_last && some) {
        rows = step.outputs, sums = static_cast<T*>(step.out);
#pragma omp for
        for (long row = 0; row < rows; ++row)
          std::copy_n(residual + step.wanted[row] * hidden, hidden, sums + row * hidden);
      }
      attention<T>({wide, qkv_width, plain, keys, values, step.tables, step.table_stride, stack.block_tokens,
                    layer.window, heads, stack.scaling, 0, nullptr},
                   is_last ? last : tasks.at(layer.window), is_last ? last_parts : parts);
      if (layer.out.scales) quantize(plain, input_of(layer.out), rows, attended_width);
      multiply(layer.out, input_of(layer.out), added, rows);
      norm(layer.mlp_norm, sums, added, input_of(layer.gate_up), rows);
      multiply(layer.gate_up, input_of(layer.gate_up), wide, rows);
      silu_multiply(wide, nullptr, input_of(layer.down), rows, stack.intermediate);
      multiply(layer.down, input_of(layer.down), added, rows);
    }
    norm(stack.norm, sums, added, {static_cast<T*>(step.out), nullptr, nullptr}, rows);
  });
}

}  // namespace

// Whether the compiled products beat oneDNN's. Those of Bf16 do even where they are made of float's, unless the sums
// do not fit into registers.
#ifdef __AVX512F__
extern "C" long multiplies_floats() { return 1; }
#else
extern "C" long multiplies_floats() { return 0; }
#endif
#ifdef __AVX512VNNI__
extern "C" long multiplies_bytes() { return 1; }
#else
extern "C" long multiplies_bytes() { return 0; }
#endif

#define EXPORT(T, SUFFIX)                                                                                             \
  extern "C" void product_##SUFFIX(T* out, const T* x, const uint8_t* bytes, const float* row_scales,                 \
                                   const Linear* linear, long rows) {                                                 \
    as_team(rows * linear->inputs * linear->outputs > kParallel, [&] {                                                \
      multiply<T>(*linear, {const_cast<T*>(x), const_cast<uint8_t*>(bytes), const_cast<float*>(row_scales)}, out,     \
                  rows);                                                                                              \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void quantize_##SUFFIX(const T* x, uint8_t* bytes, float* scales, long rows, long width) {              \
    as_team(rows * width > kParallel, [&] { quantize<T>(x, {nullptr, bytes, scales}, rows, width); });                \
  }                                                                                                                   \
  extern "C" void add_norm_##SUFFIX(T* residual, const T* added, const float* added_scales, const T* weight,          \
                                    float epsilon, T* out, uint8_t* bytes, float* scales, long rows, long width) {    \
    as_team(rows * width > kParallel, [&] {                                                                           \
      add_norm<T>(residual, added, added_scales, weight, epsilon, {out, bytes, scales}, rows, width);                 \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void silu_multiply_##SUFFIX(const T* gate_up, const float* in_scales, T* out, uint8_t* bytes,            \
                                         float* scales, long rows, long width) {                                      \
    as_team(rows * width > kParallel,                                                                                 \
            [&] { silu_multiply<T>(gate_up, in_scales, {out, bytes, scales}, rows, width); });                        \
  }                                                                                                                   \
  extern "C" void rotary_write_##SUFFIX(T* qkv, const float* scales, const T* bias, const T* cos, const T* sin,       \
                                        const T* query_norm, const T* key_norm, float epsilon, const int64_t* slots,  \
                                        T* keys, T* values, long tokens, long query_heads, long kv_heads, long dim,   \
                                        long block_tokens) {                                                          \
    as_team(tokens * (query_heads + 2 * kv_heads) * dim > kParallel, [&] {                                            \
      rotary_write<T>(qkv, scales, bias, cos, sin, query_norm, key_norm, epsilon, slots, keys, values, tokens,        \
                      {query_heads, kv_heads, dim}, block_tokens);                                                    \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void attention_##SUFFIX(const T* query, long query_stride, T* out, const T* keys, const T* values,       \
                                     const int32_t* tables, const int32_t* contexts, long table_stride, long rows,    \
                                     long tokens, long block_tokens, long window, long query_heads, long kv_heads,    \
                                     long dim, float scaling, float softcap, const float* sinks) {                    \
    std::vector<Span> spans;                                                                                          \
    for (long row = 0; row < rows; ++row)                                                                             \
      spans.push_back({row, row * tokens, row * tokens, tokens, contexts[row]});                                      \
    Heads heads{query_heads, kv_heads, dim};                                                                          \
    Tasks tasks = tasks_of(spans, heads, window);                                                                     \
    std::vector<Partial<T>> parts = partials<T>(tasks, dim);                                                          \
    as_team(rows * tokens * query_heads * *std::max_element(contexts, contexts + rows) > kParallel, [&] {             \
      attention<T>({query, query_stride, out, keys, values, tables, table_stride, block_tokens, window, heads,        \
                    scaling, softcap, sinks},                                                                         \
                   tasks, parts);                                                                                     \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void run_stack_##SUFFIX(const Stack* stack, const Step* step) { run_stack<T>(*stack, *step); }

EXPORT(float, float32)
EXPORT(Bf16, bfloat16)
