"""C++ source of the compiled scan: a string, so that saved models that bring their code bring it, too."""

SOURCE = r"""// The four-direction selective scan of a channels-last map and its gradient, for the CPU.
//
// A task is one image and one block of channels, whose states fit the registers; it walks the map in each direction, in
// tiles of a few positions: gather, step sizes, recurrence, merge. No two tasks write to the same memory. The gradient
// runs forwards keeping the states at each tile's start, then backwards through the tiles, recomputing all else.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(WITH_THREADS)
// What compilers make of an OpenMP parallel region. Called by name so that any compiler can use the runtime that is
// there, torch's: the idle threads of a second one would compete with torch's for the processor.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int TILE = 16;  // positions
constexpr double LOG2_E = 1.44269504088896340736;

template <typename T> struct Vector;
template <> struct Vector<float> {
  typedef float V __attribute__((vector_size(BYTES)));
  typedef uint32_t I __attribute__((vector_size(BYTES)));
};
template <> struct Vector<double> {
  typedef double V __attribute__((vector_size(BYTES)));
  typedef uint64_t I __attribute__((vector_size(BYTES)));
};
using VF = Vector<float>::V;
using VD = Vector<double>::V;
using IF = Vector<float>::I;

// Largest relative errors 2e-9 and 3e-8 before rounding; powers below the smallest normal number stay just above 0.
inline VF power_of_2(VF x) {
  x = x < -126.0f ? VF{} - 126.0f : x;
  x = x > 127.0f ? VF{} + 127.0f : x;
  const VF shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const VF f = x - (shifted - 12582912.0f);
  VF p = 0.000153458075f * f + 0.00133999312f;
  p = p * f + 0.00961848897f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  IF bits, whole;
  std::memcpy(&whole, &shifted, sizeof whole);
  std::memcpy(&bits, &p, sizeof bits);
  bits += whole << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

inline VF negative_exp(VF x) {  // of x <= 0
  x = x < -87.0f ? VF{} - 87.0f : x;
  const VF shifted = x * 1.44269504f + 12582912.0f;
  const VF whole = shifted - 12582912.0f;
  const VF f = (x * 1.44269504f - whole) + x * 1.92596299e-8f;
  VF p = 0.000153458075f * f + 0.00133999312f;
  p = p * f + 0.00961848897f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  IF bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}


inline VF log_of_1_plus(VF t) {  // of t in [0, 1]
  VF p = 0.00523262408f * t - 0.0295049575f;
  p = p * t + 0.0782254939f;
  p = p * t - 0.136632069f;
  p = p * t + 0.191059885f;
  p = p * t - 0.248429775f;
  p = p * t + 0.333190962f;
  p = p * t - 0.499994931f;
  p = p * t + 0.99999997f;
  return p * t;
}

inline VD power_of_2(VD x) {
  for (unsigned i = 0; i < BYTES / sizeof(double); ++i) x[i] = std::exp2(x[i]);
  return x;
}
inline VD negative_exp(VD x) {
  for (unsigned i = 0; i < BYTES / sizeof(double); ++i) x[i] = std::exp(x[i]);
  return x;
}
inline VD log_of_1_plus(VD t) {
  for (unsigned i = 0; i < BYTES / sizeof(double); ++i) t[i] = std::log1p(t[i]);
  return t;
}

template <typename T> struct Problem {
  const T *x, *low_rank, *b, *c;                 // maps [B, H, W, ...], channels contiguous
  const T *weight, *bias, *a_log, *skip;         // [K, E, R], [K, E], [K, E, N], [K, E]
  const T *grad;                                 // [B, H, W, E], backward only
  T *out;                                        // [B, H, W, E]: the result, or the gradient of x
  T *grad_maps;                                  // [blocks, B, H * W, K, R + 2 N]: of low_rank, b and c
  T *grad_parameters;                            // [B, K, R + 1 + N, E]: of weight, bias and a_log
  T *grad_skip;                                  // [B, E]
  int64_t batch, height, width, channels, directions, rank, states;
  int64_t x_strides[3], grad_strides[3];         // image, row, column
  int64_t low_rank_strides[4], b_strides[4], c_strides[4];  // and direction
};

template <typename T> inline typename Vector<T>::V splat(T value) { return typename Vector<T>::V{} + value; }

template <typename T, typename V> inline T sum_of(const V* vectors, int count) {
  V total = vectors[0];
  for (int v = 1; v < count; ++v) total += vectors[v];
  constexpr int LANES = sizeof(V) / sizeof(T);
  if constexpr (LANES > 4) {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half halves[2];
    std::memcpy(halves, &total, sizeof(V));
    halves[0] += halves[1];
    return sum_of<T, Half>(halves, 1);
  } else {
    T sum = 0;
    for (int i = 0; i < LANES; ++i) sum += total[i];
    return sum;
  }
}

// One image and `lanes` channels from `first` on; lanes beyond are zeros.
template <typename T, int NV> struct Task {
  using V = typename Vector<T>::V;
  static constexpr int LANES = BYTES / sizeof(T), WIDTH = NV * LANES;
  using Rows = V[TILE][NV];

  const Problem<T>& p;
  const int64_t image, first, lanes, length;
  std::vector<V> weight, rate_log2;  // of one direction: [R][NV], [N][NV]
  V bias[NV];

  // A tile: consecutive steps of a direction
  int64_t k = 0, count = 0, row[TILE], column[TILE];
  const T *next_x[TILE] = {}, *next_out[TILE] = {};  // of the tile after it
  const T* low_rank[TILE];
  Rows x, delta;

  Task(const Problem<T>& problem, int64_t image, int64_t first)
      : p(problem), image(image), first(first),
        lanes(problem.channels - first < WIDTH ? problem.channels - first : WIDTH),
        length(problem.height * problem.width), weight(problem.rank * NV), rate_log2(problem.states * NV) {}

  void load(V* to, const T* from) const {
    if (lanes == WIDTH) {
      std::memcpy(to, from, WIDTH * sizeof(T));
    } else {
      std::memset(to, 0, WIDTH * sizeof(T));
      std::memcpy(to, from, lanes * sizeof(T));
    }
  }
  void store(T* to, const V* from) const {
    if (lanes == WIDTH) std::memcpy(to, from, WIDTH * sizeof(T));
    else std::memcpy(to, from, lanes * sizeof(T));
  }
  void prefetch(const T* from) const {
    for (int v = 0; v < NV; ++v) __builtin_prefetch(from + v * LANES);
  }

  // The skips of all directions
  void load_skip(V* sum) const {
    std::memset(sum, 0, WIDTH * sizeof(T));
    for (int64_t direction = 0; direction < p.directions; ++direction) {
      V skip[NV];
      load(skip, p.skip + direction * p.channels + first);
      for (int v = 0; v < NV; ++v) sum[v] += skip[v];
    }
  }

  void start_direction(int64_t direction) {
    k = direction;
    T* weights = reinterpret_cast<T*>(weight.data());
    T* rates = reinterpret_cast<T*>(rate_log2.data());
    for (int64_t e = 0; e < lanes; ++e) {
      const int64_t channel = k * p.channels + first + e;
      for (int64_t r = 0; r < p.rank; ++r) weights[r * WIDTH + e] = p.weight[channel * p.rank + r];
      for (int64_t n = 0; n < p.states; ++n)
        rates[n * WIDTH + e] = -std::exp(p.a_log[channel * p.states + n]) * T(LOG2_E);
    }
    load(bias, p.bias + k * p.channels + first);
  }

  const T* at(const T* map, const int64_t* strides, int s) const {
    return map + image * strides[0] + row[s] * strides[1] + column[s] * strides[2];
  }
  const T* x_at(int s) const { return at(p.x, p.x_strides, s) + first; }
  const T* grad_at(int s) const { return at(p.grad, p.grad_strides, s) + first; }
  const T* b_at(int s) const { return at(p.b, p.b_strides, s) + k * p.b_strides[3]; }
  const T* c_at(int s) const { return at(p.c, p.c_strides, s) + k * p.c_strides[3]; }
  T* out_at(int s) const { return p.out + position(s) * p.channels + first; }
  int64_t position(int s) const { return (image * p.height + row[s]) * p.width + column[s]; }

  // Directions: by rows, by columns, and both reversed.
  void place(int64_t begin) {
    count = length - begin < TILE ? length - begin : TILE;
    const bool columns = k % 2, reversed = k >= 2;
    const int64_t inner_size = columns ? p.height : p.width;
    const int64_t start = reversed ? length - 1 - begin : begin;
    int64_t inner = start % inner_size, outer = start / inner_size;
    for (int s = 0; s < count; ++s) {
      row[s] = columns ? inner : outer;
      column[s] = columns ? outer : inner;
      if (reversed) {
        if (--inner < 0) inner = inner_size - 1, --outer;
      } else {
        if (++inner == inner_size) inner = 0, ++outer;
      }
    }
  }

  void gather(int64_t begin) {
    place(begin);
    for (int s = 0; s < count; ++s) {
      load(x[s], x_at(s));
      low_rank[s] = at(p.low_rank, p.low_rank_strides, s) + k * p.low_rank_strides[3];
    }
    for (int s = count; s < TILE; ++s) std::memset(x[s], 0, sizeof x[s]);
  }

  // Step sizes of the tile, and where asked for their derivative with respect to what goes into softplus.
  template <bool DERIVATIVE> void step_sizes(V (*slope)[NV]) {
    for (int s = 0; s < count; s += 2) {
      const T *even = low_rank[s], *odd = low_rank[s + 1 < count ? s + 1 : s];
      V raw[2][NV];
      for (int v = 0; v < NV; ++v) raw[0][v] = raw[1][v] = bias[v];
      for (int i = 0; i < 2; ++i) prefetch(next_x[s + i]);
      for (int64_t r = 0; r < p.rank; ++r) {
        const V left = splat<T>(even[r]), right = splat<T>(odd[r]);
        for (int v = 0; v < NV; ++v) {
          raw[0][v] += weight[r * NV + v] * left;
          raw[1][v] += weight[r * NV + v] * right;
        }
      }
      for (int i = 0; i < 2; ++i)
        for (int v = 0; v < NV; ++v) delta[s + i][v] = raw[i][v];
    }
    for (int s = 0; s < count; ++s)
      for (int v = 0; v < NV; ++v) {
        const V raw = delta[s][v];
        const V e = negative_exp(raw > 0 ? -raw : raw);
        delta[s][v] = (raw > 0 ? raw : V{}) + log_of_1_plus(e);
        if constexpr (DERIVATIVE) slope[s][v] = (raw > 0 ? V{} + 1 : e) / (e + 1);
      }
  }

  void forward() {
    std::vector<V> states(p.states * NV);
    V skip[NV];
    load_skip(skip);
    for (int64_t direction = 0; direction < p.directions; ++direction) {
      start_direction(direction);
      std::fill(states.begin(), states.end(), V{});
      for (int64_t begin = 0; begin < length; begin += TILE) {
        if (begin + TILE < length) {
          place(begin + TILE);
          for (int s = 0; s < count; ++s) next_x[s] = x_at(s), next_out[s] = out_at(s);
        }
        gather(begin);
        step_sizes<false>(nullptr);
        Rows y;
        for (int s = 0; s < count; ++s) {
          if (direction) load(y[s], out_at(s));
          else
            for (int v = 0; v < NV; ++v) y[s][v] = skip[v] * x[s][v];
        }
        for (int64_t n = 0; n < p.states; ++n) {
          V h[NV], rate[NV];
          for (int v = 0; v < NV; ++v) h[v] = states[n * NV + v], rate[v] = rate_log2[n * NV + v];
          for (int s = 0; s < count; ++s) {
            const V b = splat<T>(b_at(s)[n]), c = splat<T>(c_at(s)[n]);
            if (n == 0) prefetch(next_out[s]);
            for (int v = 0; v < NV; ++v) {
              h[v] = power_of_2(delta[s][v] * rate[v]) * h[v] + delta[s][v] * x[s][v] * b;
              y[s][v] += h[v] * c;
            }
          }
          for (int v = 0; v < NV; ++v) states[n * NV + v] = h[v];
        }
        for (int s = 0; s < count; ++s) store(out_at(s), y[s]);
      }
    }
  }

  void backward(int64_t block) {
    const int64_t states = p.states, rank = p.rank, tiles = (length + TILE - 1) / TILE;
    const int64_t rank_vectors = (rank + LANES - 1) / LANES, record = rank + 2 * states;
    std::vector<V> starts(tiles * states * NV), carry(states * NV), transposed(WIDTH * rank_vectors);
    std::vector<V> grad_weight(rank * NV), grad_rate(states * NV);
    V skip[NV], grad_bias[NV], grad_skip[NV] = {};
    load_skip(skip);
    Rows slope, g_out, grad_x, g_scaled, g_delta, decay;
    V h[TILE + 1][NV];
    for (int64_t direction = 0; direction < p.directions; ++direction) {
      start_direction(direction);
      std::fill(carry.begin(), carry.end(), V{});
      std::fill(grad_weight.begin(), grad_weight.end(), V{});
      std::fill(grad_rate.begin(), grad_rate.end(), V{});
      std::fill(grad_bias, grad_bias + NV, V{});
      std::fill(transposed.begin(), transposed.end(), V{});
      for (int64_t r = 0; r < rank; ++r)
        for (int e = 0; e < WIDTH; ++e)
          transposed[e * rank_vectors + r / LANES][r % LANES] = weight[r * NV + e / LANES][e % LANES];

      std::fill(starts.begin(), starts.begin() + states * NV, V{});
      for (int64_t tile = 0; tile + 1 < tiles; ++tile) {
        gather(tile * TILE);
        step_sizes<false>(nullptr);
        for (int64_t n = 0; n < states; ++n) {
          V state[NV];
          for (int v = 0; v < NV; ++v) state[v] = starts[(tile * states + n) * NV + v];
          for (int s = 0; s < count; ++s) {
            const V b = splat<T>(b_at(s)[n]);
            for (int v = 0; v < NV; ++v)
              state[v] = power_of_2(delta[s][v] * rate_log2[n * NV + v]) * state[v] + delta[s][v] * x[s][v] * b;
          }
          for (int v = 0; v < NV; ++v) starts[((tile + 1) * states + n) * NV + v] = state[v];
        }
      }

      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        gather(tile * TILE);
        step_sizes<true>(slope);
        T* maps[TILE];
        for (int s = 0; s < count; ++s) {
          load(g_out[s], grad_at(s));
          maps[s] = p.grad_maps + ((block * p.batch * length + position(s)) * p.directions + k) * record;
          for (int v = 0; v < NV; ++v) {
            g_scaled[s][v] = g_delta[s][v] = V{};
            if (direction == 0) grad_skip[v] += g_out[s][v] * x[s][v];
          }
        }
        for (int64_t n = 0; n < states; ++n) {
          V rate[NV], back[NV], grad_r[NV] = {};
          for (int v = 0; v < NV; ++v) {
            rate[v] = rate_log2[n * NV + v];
            back[v] = carry[n * NV + v];
            h[0][v] = starts[(tile * states + n) * NV + v];
          }
          for (int s = 0; s < count; ++s) {
            const V b = splat<T>(b_at(s)[n]);
            V product[NV];
            for (int v = 0; v < NV; ++v) {
              decay[s][v] = power_of_2(delta[s][v] * rate[v]);
              h[s + 1][v] = decay[s][v] * h[s][v] + delta[s][v] * x[s][v] * b;
              product[v] = g_out[s][v] * h[s + 1][v];
            }
            maps[s][rank + states + n] = sum_of<T, V>(product, NV);
          }
          for (int s = static_cast<int>(count) - 1; s >= 0; --s) {
            const V b = splat<T>(b_at(s)[n]), c = splat<T>(c_at(s)[n]);
            V product[NV];
            for (int v = 0; v < NV; ++v) {
              const V g = c * g_out[s][v] + back[v];
              back[v] = decay[s][v] * g;
              product[v] = g * delta[s][v] * x[s][v];
              g_scaled[s][v] += g * b;
              const V exponent = back[v] * h[s][v];  // gradient with respect to delta * rate
              g_delta[s][v] += exponent * rate[v];
              grad_r[v] += exponent * delta[s][v];
            }
            maps[s][rank + n] = sum_of<T, V>(product, NV);
          }
          for (int v = 0; v < NV; ++v) {
            carry[n * NV + v] = back[v];
            grad_rate[n * NV + v] += grad_r[v];
          }
        }
        V bias_sum[NV] = {};
        for (int s = 0; s < count; ++s) {
          if (direction) load(grad_x[s], out_at(s));
          for (int v = 0; v < NV; ++v) {
            const V before = direction ? grad_x[s][v] : skip[v] * g_out[s][v];
            grad_x[s][v] = before + g_scaled[s][v] * delta[s][v];
            // rate holds log2(e) times the decay rate
            g_delta[s][v] = (g_delta[s][v] * T(1 / LOG2_E) + g_scaled[s][v] * x[s][v]) * slope[s][v];
            bias_sum[v] += g_delta[s][v];
          }
          store(out_at(s), grad_x[s]);
        }
        for (int v = 0; v < NV; ++v) grad_bias[v] += bias_sum[v];
        for (int s = count; s < TILE; ++s) std::memset(g_delta[s], 0, sizeof g_delta[s]);
        for (int64_t r = 0; r < rank; ++r) {
          V sums[NV] = {};
          for (int s = 0; s < count; ++s) {
            const V value = splat<T>(low_rank[s][r]);
            for (int v = 0; v < NV; ++v) sums[v] += g_delta[s][v] * value;
          }
          for (int v = 0; v < NV; ++v) grad_weight[r * NV + v] += sums[v];
        }
        const T* flat = reinterpret_cast<const T*>(g_delta);
        for (int64_t r = 0; r < rank_vectors; ++r)
          for (int s = 0; s < count; s += 4) {  // rows beyond count are zeros
            V sums[4] = {};
            for (int e = 0; e < WIDTH; ++e)
              for (int i = 0; i < 4; ++i) sums[i] += transposed[e * rank_vectors + r] * flat[(s + i) * WIDTH + e];
            const int64_t kept = rank - r * LANES < LANES ? rank - r * LANES : LANES;
            for (int i = 0; i < 4 && s + i < count; ++i)
              std::memcpy(maps[s + i] + r * LANES, &sums[i], kept * sizeof(T));
          }
      }

      T* parameters = p.grad_parameters + (image * p.directions + k) * (rank + 1 + states) * p.channels + first;
      for (int64_t r = 0; r < rank; ++r) store(parameters + r * p.channels, &grad_weight[r * NV]);
      store(parameters + rank * p.channels, grad_bias);
      for (int64_t n = 0; n < states; ++n) {
        V grad_a_log[NV];  // the derivative of a rate by it is the rate
        for (int v = 0; v < NV; ++v) grad_a_log[v] = grad_rate[n * NV + v] * rate_log2[n * NV + v] * T(1 / LOG2_E);
        store(parameters + (rank + 1 + n) * p.channels, grad_a_log);
      }
    }
    store(p.grad_skip + image * p.channels + first, grad_skip);
  }
};

// Blocks of channels: wide ones, half as wide ones where that divides the work better, and narrow ones for the rest.
template <typename T> struct Blocks {
  static constexpr int64_t NARROW = BYTES / sizeof(T), HALF = 2 * NARROW, WIDE = 4 * NARROW;
  int64_t wide, half, narrow;
  Blocks(int64_t channels, int64_t images, int64_t threads) {
    wide = channels / WIDE;
    if (images * (wide + 1) < threads) wide = 0;
    else if (images * wide < 4 * threads && images * wide % threads) wide -= 1;
    const int64_t rest = channels - wide * WIDE;
    half = images * wide + 1 < threads ? 0 : rest / HALF;
    narrow = (rest - half * HALF + NARROW - 1) / NARROW;
  }
  int64_t count() const { return wide + half + narrow; }
};

template <typename T, int NV> void run_task(const Problem<T>& p, int64_t image, int64_t first, int64_t block) {
  Task<T, NV> task(p, image, first);
  p.grad ? task.backward(block) : task.forward();
}

template <typename T> struct Queue {
  using B = Blocks<T>;
  const Problem<T>& p;
  const B blocks;
  const int64_t tasks;
  std::atomic<int64_t> next{0};

  Queue(const Problem<T>& problem, int64_t threads)
      : p(problem), blocks(problem.channels, problem.batch, threads), tasks(problem.batch * blocks.count()) {}

  static void work(void* queue) { static_cast<Queue*>(queue)->work(); }
  void work() {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t image = task % p.batch, block = task / p.batch;  // the wide ones first
      const int64_t half = block - blocks.wide, narrow = half - blocks.half;
      if (half < 0) run_task<T, 4>(p, image, block * B::WIDE, block);
      else if (narrow < 0) run_task<T, 2>(p, image, blocks.wide * B::WIDE + half * B::HALF, block);
      else run_task<T, 1>(p, image, blocks.wide * B::WIDE + blocks.half * B::HALF + narrow * B::NARROW, block);
    }
  }
};

template <typename T> void run(const Problem<T>& p, int64_t threads) {
  Queue<T> queue(p, threads);
#if defined(WITH_THREADS)
  GOMP_parallel(Queue<T>::work, &queue, static_cast<unsigned>(std::min(threads, queue.tasks)), 0);
#else
  queue.work();
#endif
}

// tensors: as Problem lists them, null where there are none; numbers: threads, then Problem's.
template <typename T> void call(void* const* tensors, const int64_t* numbers) {
  Problem<T> p{};
  const T** in[] = {&p.x, &p.low_rank, &p.b, &p.c, &p.weight, &p.bias, &p.a_log, &p.skip, &p.grad};
  T** out[] = {&p.out, &p.grad_maps, &p.grad_parameters, &p.grad_skip};
  for (const T** pointer : in) *pointer = static_cast<const T*>(*tensors++);
  for (T** pointer : out) *pointer = static_cast<T*>(*tensors++);
  const int64_t threads = *numbers++;
  int64_t* sizes[] = {&p.batch, &p.height, &p.width, &p.channels, &p.directions, &p.rank, &p.states};
  for (int64_t* size : sizes) *size = *numbers++;
  for (int64_t& stride : p.x_strides) stride = *numbers++;
  for (int64_t& stride : p.grad_strides) stride = *numbers++;
  for (int64_t& stride : p.low_rank_strides) stride = *numbers++;
  for (int64_t& stride : p.b_strides) stride = *numbers++;
  for (int64_t& stride : p.c_strides) stride = *numbers++;
  run(p, threads);
}

}  // namespace

extern "C" {
void ssm_vlm_scan_float32(void* const* tensors, const int64_t* numbers) { call<float>(tensors, numbers); }
void ssm_vlm_scan_float64(void* const* tensors, const int64_t* numbers) { call<double>(tensors, numbers); }
int64_t ssm_vlm_scan_blocks(int64_t bytes, int64_t channels, int64_t images, int64_t threads) {
  if (bytes == 4) return Blocks<float>(channels, images, threads).count();
  return Blocks<double>(channels, images, threads).count();
}
}
"""

__all__ = ["SOURCE"]
