// The middle of the Mamba mixer on a CPU: causal convolution + SiLU, and selective scan + gate, forward and backward.
// Then the rest of a block whose matrix products are bfloat16: RMSNorm, SwiGLU, patches of pictures, and the whole block
// at once where no gradient is asked for. jepa/cpu_kernel.py compiles this file, and passes CHUNK, GROUP and NORM_ROWS; the
// definitions are in jepa/mamba.py and jepa/bf16.py.
//
//   L  tokens      E  channels      N  states per channel      K  taps of the convolution      D  token width
//
// A vector holds LANES neighbouring channels, which the recurrence treats alike. One task is GROUP channels of one
// sample: tasks share nothing they write, so results do not depend on the number of threads. Stored is float or bf16: what
// activations are read and written as. Everything is computed in float32, and weights and states are float32. Rows of a
// tensor are contiguous; where they are a part of longer rows, a stride says how long those are.

#include <atomic>
#include <cstdint>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES)));
struct bf16 {
    uint16_t bits;
};
struct Cell {  // a Vec that a std::vector may hold
    Vec v;
};

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec load(const bf16* p) {
    HalfBits half;
    std::memcpy(&half, p, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vec v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
static inline void store(bf16* p, Vec v) {  // rounds to the nearest, ties to even; NaN stays NaN
    Bits bits;
    std::memcpy(&bits, &v, sizeof bits);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits kept = v == v ? rounded : Bits{} + 0x7fc0u;
    const HalfBits half = __builtin_convertvector(kept, HalfBits);
    std::memcpy(p, &half, sizeof half);
}
static inline Vec splat(float x) { return Vec{} + x; }
static inline float get(const float* p) { return *p; }
static inline float get(const bf16* p) {
    const uint32_t bits = uint32_t(p->bits) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
static inline void put(float* p, float v) { *p = v; }
static inline void put(bf16* p, float v) {
    bf16 rounded[LANES];
    store(rounded, splat(v));
    *p = rounded[0];
}
static inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// exp(x) for x <= 0: the relative error is at most 9e-8 down to -10 and 3e-7 down to -87; exactly 0 below -87.7, where
// float32 would turn subnormal; NaN stays NaN. exp(x) = 2^n exp(r), r = x - n ln 2, with a minimax polynomial in r.
static inline Vec exp_nonpositive(Vec x) {
    const float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds to an integer; 127 is the exponent's bias
    x = x < -88.03f ? splat(-88.03f) : x;
    const Vec rounded = x * 1.44269504f + shift;
    const Vec n = rounded - shift;
    const Vec r = x - n * 0.693147181f;  // float32 has ln 2 within 2e-9
    Vec p = splat(1.3814467e-3f);
    p = p * r + 8.3687808e-3f;
    p = p * r + 4.1668393e-2f;
    p = p * r + 1.6666520e-1f;
    p = p * r + 4.9999994e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Bits bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= 23;  // n + 127 becomes the exponent, and 0 for n = -127
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline Vec sigmoid(Vec x) {
    const Vec e = exp_nonpositive(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}
static inline Vec silu(Vec x) { return x * sigmoid(x); }
static inline Vec silu_slope(Vec x) {
    const Vec s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) = 2 artanh(s), s = e / (2 + e), with a polynomial
// in s^2 (error 5e-9), which keeps small step sizes as exact as large ones.
static inline Vec softplus(Vec x) {
    const Vec e = exp_nonpositive(x < 0.0f ? x : -x);
    const Vec s = e / (2.0f + e), q = s * s;
    Vec p = splat(0.14006101f);
    p = p * q + 0.14000882f;
    p = p * q + 0.20010765f;
    p = p * q + 0.33333209f;
    return (x < 0.0f ? Vec{} : x) + 2.0f * (s + s * q * p);
}

// Runs task(i) for all i below `tasks`, on PyTorch's own OpenMP threads.
// PyTorch has libgomp loaded; a second pool would compete for the cores with the first, whose idle threads spin. Any
// OpenMP that offers GCC's entry point will do, and without one everything runs on the calling thread.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);

template <class Task>
static void parallel(int64_t tasks, int64_t threads, Task task) {
    struct Queue {
        Task& task;
        int64_t tasks;
        std::atomic<int64_t> next;
    } queue{task, tasks, {0}};
    const auto work = [](void* data) {
        auto& q = *static_cast<Queue*>(data);
        for (int64_t i; (i = q.next++) < q.tasks;) q.task(i);
    };
    if (threads > 1 && tasks > 1 && GOMP_parallel)
        GOMP_parallel(work, &queue, threads < tasks ? threads : tasks, 0);
    else
        work(&queue);
}

// Runs task(sample, first channel, channel after the last) for all samples and groups.
template <class Task>
static void parallel(int64_t samples, int64_t E, int64_t threads, Task task) {
    const int64_t groups = (E + GROUP - 1) / GROUP;
    parallel(samples * groups, threads, [=](int64_t i) {
        const int64_t first = i % groups * GROUP;
        task(i / groups, first, first + GROUP < E ? first + GROUP : E);
    });
}

extern "C" int64_t lanes() { return LANES; }

// y_t = silu(bias + sum_k taps_k x_{t-K+1+k}),  x before the first token being 0.
//
// x (B, L, stride), of which the first E count; y (B, L, E); taps (K, E), bias (E).
template <class Stored>
static inline Vec convolve(const Stored* x, int64_t stride, const float* taps, const float* bias, int64_t t, int64_t K,
                           int64_t E) {
    Vec sum = load(bias);
    for (int64_t k = t < K - 1 ? K - 1 - t : 0; k < K; k++)
        sum += load(taps + k * E) * load(x + (t - K + 1 + k) * stride);
    return sum;
}

template <class Stored>
static void conv_forward(const Stored* x, int64_t stride, const float* taps, const float* bias, Stored* y, int64_t samples,
                         int64_t L, int64_t E, int64_t K, int64_t threads) {
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        for (int64_t t = 0; t < L; t++)
            for (int64_t e = first; e < last; e += LANES) {
                const Vec convolved = convolve(x + b * L * stride + e, stride, taps + e, bias + e, t, K, E);
                store(y + (b * L + t) * E + e, silu(convolved));
            }
    });
}

// dx (B, L, stride), of which the first E are written. Adds, for every sample by itself, to dtaps (B, K, E) and
// dbias (B, E).
template <class Stored>
static void conv_backward(const Stored* dy, const Stored* x, int64_t stride, const float* taps, const float* bias, Stored* dx,
                          float* dtaps, float* dbias, int64_t samples, int64_t L, int64_t E, int64_t K,
                          int64_t threads) {
    const auto add = [](float* p, Vec v) { store(p, load(p) + v); };
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        const int64_t vectors = (last - first + LANES - 1) / LANES;
        std::vector<Cell> waiting(K * vectors);  // the sums for dx of the last K tokens, which later tokens add to
        for (int64_t t = 0; t < L + K - 1; t++)
            for (int64_t e = first; e < last; e += LANES) {
                const Stored* x_b = x + b * L * stride + e;
                const auto sum_of = [&](int64_t s) -> Vec& { return waiting[(e - first) / LANES * K + s % K].v; };
                if (t < L) {
                    sum_of(t) = Vec{};
                    const Vec slope = silu_slope(convolve(x_b, stride, taps + e, bias + e, t, K, E));
                    const Vec d = load(dy + (b * L + t) * E + e) * slope;
                    add(dbias + b * E + e, d);
                    for (int64_t k = t < K - 1 ? K - 1 - t : 0; k < K; k++) {
                        const int64_t s = t - K + 1 + k;
                        add(dtaps + (b * K + k) * E + e, d * load(x_b + s * stride));
                        sum_of(s) += d * load(taps + k * E + e);
                    }
                }
                if (const int64_t s = t - K + 1; s >= 0) store(dx + (b * L + s) * stride + e, sum_of(s));
            }
    });
}

// delta = softplus(dt + bias),  h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t h_t + D u_t,
// out = y silu(gate) at the last L_out tokens.
//
// u, dt (B, L, E); bias, D (E); A (N, E), negative; B, C (B, L, N) in rows of BC_stride; out (B, L_out, E); gate the
// same in rows of gate_stride.
// starts (B, chunks, N, E) receives the state before every chunk of tokens or, with keep = 0, (B, 1, N, E) the current
// one.
template <class Stored>
static void scan_forward(const Stored* u, const Stored* dt, const float* bias, const float* A, const float* B, const float* C,
                         int64_t BC_stride, const float* D, const Stored* gate, int64_t gate_stride, Stored* out, float* starts,
                         int64_t samples, int64_t L, int64_t L_out, int64_t E, int64_t N, int64_t keep,
                         int64_t threads) {
    const int64_t chunks = (L + CHUNK - 1) / CHUNK;
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        for (int64_t k = 0; k < chunks; k++)
            for (int64_t e = first; e < last; e += LANES) {
                const int64_t t0 = k * CHUNK, T = L - t0 < CHUNK ? L - t0 : CHUNK, token = b * L + t0;
                const int64_t silent = L - L_out - t0;  // tokens of this chunk whose y is not asked for
                Vec delta[CHUNK], x[CHUNK], y[CHUNK];
                for (int64_t t = 0; t < T; t++) {
                    const Vec u_t = load(u + (token + t) * E + e);
                    delta[t] = softplus(load(dt + (token + t) * E + e) + load(bias + e));
                    x[t] = delta[t] * u_t;
                    y[t] = load(D + e) * u_t;
                }
                float* start = starts + (keep ? b * chunks + k : b) * N * E + e;
                float* end = keep ? start + N * E : start;
                for (int64_t n = 0; n < N; n++) {
                    if (k == 0) store(start + n * E, Vec{});
                    const Vec a = load(A + n * E + e);
                    Vec h = load(start + n * E);
                    for (int64_t t = 0; t < T; t++) {
                        h = exp_nonpositive(delta[t] * a) * h + x[t] * B[(token + t) * BC_stride + n];
                        y[t] += h * C[(token + t) * BC_stride + n];
                    }
                    if (k + 1 < chunks) store(end + n * E, h);
                }
                for (int64_t t = silent > 0 ? silent : 0; t < T; t++) {
                    const int64_t row = b * L_out + t - silent;
                    store(out + row * E + e, y[t] * silu(load(gate + row * gate_stride + e)));
                }
            }
    });
}

// The gradients of all of scan_forward's inputs from dout (B, L_out, E). A chunk's states are computed again from its
// start; then the recurrence of their gradient runs from the chunk's end:  g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}.
// What samples or channels share is summed by the caller: dbias, dD (B, E), dA (B, N, E), all three 0 at first;
// dB, dC (groups, B, L, N). dgate has rows of gate_stride.
template <class Stored>
static void scan_backward(const Stored* dout, const Stored* u, const Stored* dt, const float* bias, const float* A, const float* B,
                          const float* C, int64_t BC_stride, const float* D, const Stored* gate, int64_t gate_stride,
                          const float* starts, Stored* du, Stored* ddt, float* dbias, float* dA, float* dB, float* dC, float* dD,
                          Stored* dgate, int64_t samples, int64_t L, int64_t L_out, int64_t E, int64_t N, int64_t threads) {
    const int64_t chunks = (L + CHUNK - 1) / CHUNK;
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        std::vector<Cell> carried(N * GROUP / LANES);  // exp(delta_t A) g_t of the token t that follows this chunk
        std::vector<Cell> dB_lanes(N * CHUNK), dC_lanes(N * CHUNK);  // before the sum over lanes
        for (int64_t k = chunks - 1; k >= 0; k--) {
            const int64_t t0 = k * CHUNK, T = L - t0 < CHUNK ? L - t0 : CHUNK, token = b * L + t0;
            const int64_t silent = L - L_out - t0;  // tokens of this chunk whose y is not asked for
            dB_lanes.assign(N * CHUNK, Cell{});
            dC_lanes.assign(N * CHUNK, Cell{});
            for (int64_t e = first; e < last; e += LANES) {
                Vec delta[CHUNK], x[CHUNK], y[CHUNK], dy[CHUNK], dx[CHUNK], ddelta[CHUNK];
                for (int64_t t = 0; t < T; t++) {
                    const Vec u_t = load(u + (token + t) * E + e);
                    delta[t] = softplus(load(dt + (token + t) * E + e) + load(bias + e));
                    x[t] = delta[t] * u_t;
                    y[t] = load(D + e) * u_t;
                    dy[t] = dx[t] = ddelta[t] = Vec{};
                    if (t >= silent) {
                        const int64_t row = b * L_out + t - silent;
                        dy[t] = load(dout + row * E + e) * silu(load(gate + row * gate_stride + e));
                    }
                }
                for (int64_t n = 0; n < N; n++) {
                    const float *B_n = B + token * BC_stride + n, *C_n = C + token * BC_stride + n;
                    Cell *dB_n = &dB_lanes[n * CHUNK], *dC_n = &dC_lanes[n * CHUNK];
                    Cell& carried_n = carried[(e - first) / LANES * N + n];
                    const Vec a = load(A + n * E + e);
                    Vec decay[CHUNK], h[CHUNK + 1];
                    h[0] = load(starts + ((b * chunks + k) * N + n) * E + e);
                    for (int64_t t = 0; t < T; t++) {
                        decay[t] = exp_nonpositive(delta[t] * a);
                        h[t + 1] = decay[t] * h[t] + x[t] * B_n[t * BC_stride];
                        y[t] += h[t + 1] * C_n[t * BC_stride];
                        dC_n[t].v += dy[t] * h[t + 1];
                    }
                    Vec g = carried_n.v, da = load(dA + (b * N + n) * E + e);
                    for (int64_t t = T - 1; t >= 0; t--) {
                        g += dy[t] * C_n[t * BC_stride];
                        dB_n[t].v += g * x[t];
                        dx[t] += g * B_n[t * BC_stride];
                        g *= decay[t];
                        const Vec dexponent = g * h[t];  // of exp(delta_t A)
                        ddelta[t] += dexponent * a;
                        da += dexponent * delta[t];
                    }
                    carried_n.v = g;
                    store(dA + (b * N + n) * E + e, da);
                }
                Vec dbias_e = load(dbias + b * E + e), dD_e = load(dD + b * E + e);
                for (int64_t t = 0; t < T; t++) {
                    const int64_t at = (token + t) * E + e;
                    const Vec u_t = load(u + at);
                    const Vec ddt_t = (ddelta[t] + dx[t] * u_t) * sigmoid(load(dt + at) + load(bias + e));
                    store(ddt + at, ddt_t);
                    store(du + at, dx[t] * delta[t] + dy[t] * load(D + e));
                    dbias_e += ddt_t;
                    dD_e += dy[t] * u_t;
                    if (t >= silent) {
                        const int64_t row = b * L_out + t - silent;
                        const int64_t gate_at = row * gate_stride + e;
                        const Vec dout_t = load(dout + row * E + e);
                        store(dgate + gate_at, dout_t * y[t] * silu_slope(load(gate + gate_at)));
                    }
                }
                store(dbias + b * E + e, dbias_e);
                store(dD + b * E + e, dD_e);
            }
            const int64_t group_token = first / GROUP * samples * L + token;
            for (int64_t t = 0; t < T; t++)
                for (int64_t n = 0; n < N; n++) {
                    dB[(group_token + t) * N + n] = sum(dB_lanes[n * CHUNK + t].v);
                    dC[(group_token + t) * N + n] = sum(dC_lanes[n * CHUNK + t].v);
                }
        }
    });
}

// ---------------------------------------------------------------------------- a block with bfloat16 matrix products

// NORM_ROWS rows are one task of the norm; the gradients of its weight are summed apart for each.
constexpr float NORM_EPSILON = 1e-5f;

// sum = x + branch and y = sum / sqrt(mean(sum^2) + epsilon) weight, for all rows; inverse (rows) is 1 / sqrt(...).
// Without a branch (null) sum is x, and is not written.   x, sum float32, branch, y bfloat16, all (rows, D)
static void norm_forward(const float* x, const bf16* branch, const float* weight, float* sum, bf16* y, float* inverse,
                         int64_t rows, int64_t D, int64_t threads) {
    parallel((rows + NORM_ROWS - 1) / NORM_ROWS, threads, [=](int64_t i) {
        for (int64_t row = i * NORM_ROWS; row < rows && row < (i + 1) * NORM_ROWS; row++) {
            const float* read = branch ? sum + row * D : x + row * D;
            Vec squares{};
            for (int64_t d = 0; d < D; d += LANES) {
                Vec v = load(x + row * D + d);
                if (branch) store(sum + row * D + d, v += load(branch + row * D + d));
                squares += v * v;
            }
            const float scale = 1.0f / std::sqrt(::sum(squares) / D + NORM_EPSILON);
            if (inverse) inverse[row] = scale;
            for (int64_t d = 0; d < D; d += LANES)
                store(y + row * D + d, load(read + d) * scale * load(weight + d));
        }
    });
}

// dx = dsum + the norm's gradient, once in float32 and once, unless null, in bfloat16. dweight (tasks, D) is summed by
// the caller.
static void norm_backward(const bf16* dy, const float* x, const float* inverse, const float* weight, const float* dsum,
                          float* dx, bf16* dx_rounded, float* dweight, int64_t rows, int64_t D, int64_t threads) {
    parallel((rows + NORM_ROWS - 1) / NORM_ROWS, threads, [=](int64_t i) {
        float* dweight_i = dweight + i * D;
        for (int64_t d = 0; d < D; d += LANES) store(dweight_i + d, Vec{});
        for (int64_t row = i * NORM_ROWS; row < rows && row < (i + 1) * NORM_ROWS; row++) {
            const float scale = inverse[row];
            Vec products{};
            for (int64_t d = 0; d < D; d += LANES) {
                const Vec dy_x = load(dy + row * D + d) * load(x + row * D + d);
                products += dy_x * load(weight + d);
                store(dweight_i + d, load(dweight_i + d) + dy_x * scale);
            }
            const float along_x = ::sum(products) / D * scale * scale * scale;
            for (int64_t d = 0; d < D; d += LANES) {
                const int64_t at = row * D + d;
                const Vec of_norm = load(dy + at) * load(weight + d) * scale - load(x + at) * along_x;
                const Vec v = load(dsum + at) + of_norm;
                store(dx + at, v);
                if (dx_rounded) store(dx_rounded + at, v);
            }
        }
    });
}

// y = h_1 silu(h_2).   h = [h_1, h_2] (rows, 2 H), y (rows, H)
static void swiglu_forward(const bf16* h, bf16* y, int64_t rows, int64_t H, int64_t threads) {
    parallel((rows + NORM_ROWS - 1) / NORM_ROWS, threads, [=](int64_t i) {
        for (int64_t row = i * NORM_ROWS; row < rows && row < (i + 1) * NORM_ROWS; row++)
            for (int64_t c = 0; c < H; c += LANES) {
                const bf16* at = h + row * 2 * H + c;
                store(y + row * H + c, load(at) * silu(load(at + H)));
            }
    });
}

static void swiglu_backward(const bf16* dy, const bf16* h, bf16* dh, int64_t rows, int64_t H, int64_t threads) {
    parallel((rows + NORM_ROWS - 1) / NORM_ROWS, threads, [=](int64_t i) {
        for (int64_t row = i * NORM_ROWS; row < rows && row < (i + 1) * NORM_ROWS; row++)
            for (int64_t c = 0; c < H; c += LANES) {
                const int64_t at = row * 2 * H + c;
                const Vec d = load(dy + row * H + c), gate = load(h + at + H), s = sigmoid(gate);
                store(dh + at, d * gate * s);
                store(dh + at + H, d * load(h + at) * s * (1.0f + gate * (1.0f - s)));
            }
    });
}

// Pictures (B, S, S, 3) of bytes, `stride` bytes from one to the next, as rows of patches in [-1, 1], (B (S / p)^2,
// p p 3): in a row of pixels the p of a patch are neighbours already.
static void patches(const uint8_t* pictures, int64_t stride, bf16* rows, int64_t samples, int64_t S, int64_t p,
                    int64_t threads) {
    const int64_t across = S / p, run = 3 * p;
    parallel(samples * across, threads, [=](int64_t i) {
        const uint8_t* top = pictures + i / across * stride + i % across * p * S * 3;
        float values[LANES] = {};
        for (int64_t y = 0; y < p; y++)
            for (int64_t x = 0; x < across; x++) {
                const uint8_t* from = top + (y * S + x * p) * 3;
                bf16* to = rows + ((i * across + x) * p + y) * run;
                for (int64_t c = 0; c < run; c += LANES) {
                    const int64_t width = run - c < LANES ? run - c : LANES;
                    for (int64_t k = 0; k < width; k++) values[k] = from[c + k];
                    bf16 rounded[LANES];
                    store(rounded, load(values) / 127.5f - 1.0f);
                    std::memcpy(to + c, rounded, width * sizeof(bf16));
                }
            }
    });
}

// Matrix products with a weight that was packed before: tiles of 16 outputs and 32 inputs, (N / 16, K / 32, 16, 16, 2),
// in which the two neighbouring inputs of a pair stand together, as the instructions want them. Missing inputs and
// outputs are 0.
constexpr int64_t TILE = 16 * 32, ROWS = 32;
static inline int64_t tiles(int64_t size, int64_t of) { return (size + of - 1) / of; }

static void pack(const bf16* weight, bf16* packed, int64_t N, int64_t K, int64_t threads) {
    parallel(tiles(N, 16), threads, [=](int64_t i) {
        bf16* packed_i = packed + i * tiles(K, 32) * TILE;
        std::memset(packed_i, 0, tiles(K, 32) * TILE * sizeof(bf16));
        for (int64_t n = 0; n < 16 && i * 16 + n < N; n++) {
            const bf16* from = weight + (i * 16 + n) * K;
            for (int64_t k = 0; k + 1 < K; k += 2)  // a row of 16 pairs holds 32 numbers
                std::memcpy(packed_i + k / 2 * 32 + n * 2, from + k, 2 * sizeof(bf16));
            if (K % 2) packed_i[K / 2 * 32 + n * 2] = from[K - 1];
        }
    });
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static bool may_use_tiles() {  // Linux gives a process the tiles' registers when it asks for them
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}
#endif

// How this machine multiplies bfloat16: 2 in tiles (AMX), 1 in vectors (AVX512-BF16), 0 not at all.
static int64_t products() {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
    if (may_use_tiles()) return 2;
#endif
#if defined(__AVX512BF16__)
    return 1;
#endif
    return 0;
}

// result (ROWS, 32) = a (ROWS, inputs) of two tiles of outputs, w_0 and w_1.
static inline void multiply_rows(const bf16* a, int64_t stride, const bf16* w_0, const bf16* w_1, int64_t input_tiles,
                                 float* result, bool in_tiles) {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
    if (in_tiles) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < input_tiles; k++) {
            _tile_loadd(4, a + k * 32, stride * 2);
            _tile_loadd(5, a + 16 * stride + k * 32, stride * 2);
            _tile_loadd(6, w_0 + k * TILE, 64);
            _tile_loadd(7, w_1 + k * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, result, 128);
        _tile_stored(1, result + 16, 128);
        _tile_stored(2, result + 16 * 32, 128);
        _tile_stored(3, result + 16 * 32 + 16, 128);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    for (int64_t m = 0; m < ROWS; m += 8) {
        __m512 sums[8][2];
        for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < 16 * input_tiles; k++) {
            const __m512bh v_0 = (__m512bh)_mm512_loadu_si512(w_0 + k * 32);
            const __m512bh v_1 = (__m512bh)_mm512_loadu_si512(w_1 + k * 32);
            for (int64_t r = 0; r < 8; r++) {
                int32_t pair;
                std::memcpy(&pair, a + (m + r) * stride + 2 * k, sizeof pair);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(pair);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], inputs, v_0);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], inputs, v_1);
            }
        }
        for (int64_t r = 0; r < 8; r++) {
            _mm512_storeu_ps(result + (m + r) * 32, sums[r][0]);
            _mm512_storeu_ps(result + (m + r) * 32 + 16, sums[r][1]);
        }
    }
#else
    for (int64_t m = 0; m < ROWS; m++)
        for (int64_t n = 0; n < 32; n++) {
            const bf16* w = (n < 16 ? w_0 : w_1) + n % 16 * 2;
            float sum = 0;
            for (int64_t k = 0; k < 32 * input_tiles; k++)
                sum += get(a + m * stride + k) * get(w + k / 2 * 32 + k % 2);
            result[m * 32 + n] = sum;
        }
#endif
}

// out = a w^T, or out + a w^T with `add`.   a (M, K) in rows of a_stride, w packed (N, K), out (M, N) in rows of
// out_stride; sums are float32
template <class Stored>
static void multiply(const bf16* a, int64_t a_stride, const bf16* w, Stored* out, int64_t out_stride, int64_t M, int64_t N,
                     int64_t K, bool add, int64_t threads) {
    const int64_t input_tiles = tiles(K, 32), output_tiles = tiles(N, 16);
    const bool in_tiles = products() == 2;
    parallel(tiles(M, ROWS), threads, [=](int64_t i) {
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
        const TileShapes shapes;
        if (in_tiles) _tile_loadconfig(&shapes);
#endif
        const int64_t rows = M - i * ROWS < ROWS ? M - i * ROWS : ROWS;
        const bf16* a_i = a + i * ROWS * a_stride;
        int64_t stride = a_stride;
        thread_local std::vector<bf16> whole;  // rows and inputs filled up with 0 to whole tiles
        if (rows < ROWS || K % 32) {
            stride = input_tiles * 32;
            whole.assign(ROWS * stride, bf16{0});
            for (int64_t m = 0; m < rows; m++) std::memcpy(&whole[m * stride], a_i + m * a_stride, K * sizeof(bf16));
            a_i = whole.data();
        }
        alignas(64) float result[ROWS * 32] = {};
        for (int64_t n = 0; n < output_tiles; n += 2) {
            const bf16* w_0 = w + n * input_tiles * TILE;
            const bf16* w_1 = n + 1 < output_tiles ? w_0 + input_tiles * TILE : w_0;
            multiply_rows(a_i, stride, w_0, w_1, input_tiles, result, in_tiles);
            const int64_t width = N - n * 16 < 32 ? N - n * 16 : 32;
            for (int64_t m = 0; m < rows; m++) {
                Stored* to = out + (i * ROWS + m) * out_stride + n * 16;
                int64_t c = 0;
                for (; c + LANES <= width; c += LANES) {
                    const Vec v = load(result + m * 32 + c);
                    store(to + c, add ? load(to + c) + v : v);
                }
                for (; c < width; c++) put(to + c, result[m * 32 + c] + (add ? get(to + c) : 0.0f));
            }
        }
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
        if (in_tiles) _tile_release();
#endif
    });
}

// One block without gradients: out = y + mlp(norm2(y)), y = x + mixer(norm(x)) at the last L_out tokens; without an MLP
// (fc1 null) out = y. Weights of matrix products are packed.
//
// x (B, L, D), out (B, L_out, D) float32; to_x, to_gate (E, D); taps (K, E); to_dt_B_C (R + 2 N, E); to_delta (E, R);
// A (N, E); to_out (D, E); fc1 (2 H, D), fc2 (D, H)
static void block_forward(const float* x, float* out, const float* norm, const bf16* to_x, const bf16* to_gate,
                          const float* taps, const float* conv_bias, const bf16* to_dt_B_C, const bf16* to_delta,
                          const float* delta_bias, const float* A, const float* skip, const bf16* to_out,
                          const float* norm2, const bf16* fc1, const bf16* fc2, int64_t samples, int64_t L,
                          int64_t L_out, int64_t D, int64_t E, int64_t N, int64_t R, int64_t K, int64_t H,
                          int64_t threads) {
    const int64_t at_once = L < 1024 ? 1024 / L : 1;  // samples whose activations stay in the cache
    const int64_t B = at_once < samples ? at_once : samples, M = B * L, projected = R + 2 * N;
    thread_local std::vector<bf16> halves;
    thread_local std::vector<float> singles;
    const int64_t wide = 2 * H > E ? 2 * H : E;
    halves.resize(M * (D + 3 * E + R) + B * L_out * (D + 2 * E + wide + H));
    singles.resize(M * projected + B * N * E);
    bf16* normed = halves.data();
    bf16 *to_conv = normed + M * D, *u = to_conv + M * E, *delta = u + M * E, *dt = delta + M * E;
    bf16 *asked = dt + M * R, *gate = asked + B * L_out * D, *y = gate + B * L_out * E, *h = y + B * L_out * E;
    bf16* hidden = h + B * L_out * wide;
    float *dt_B_C = singles.data(), *states = dt_B_C + M * projected;
    for (int64_t first = 0; first < samples; first += B) {
        const int64_t b = samples - first < B ? samples - first : B, rows = b * L, rows_out = b * L_out;
        const float* x_b = x + first * L * D;
        float* out_b = out + first * L_out * D;
        norm_forward(x_b, nullptr, norm, nullptr, normed, nullptr, rows, D, threads);
        multiply(normed, D, to_x, to_conv, E, rows, E, D, false, threads);
        conv_forward(to_conv, E, taps, conv_bias, u, b, L, E, K, threads);
        multiply(u, E, to_dt_B_C, dt_B_C, projected, rows, projected, E, false, threads);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t r = 0; r < R; r++) put(dt + row * R + r, dt_B_C[row * projected + r]);
        multiply(dt, R, to_delta, delta, E, rows, E, R, false, threads);
        for (int64_t i = 0; i < b; i++) {
            const int64_t from = (i * L + L - L_out) * D, to = i * L_out * D;
            std::memcpy(asked + to, normed + from, L_out * D * sizeof(bf16));
            std::memcpy(out_b + to, x_b + from, L_out * D * sizeof(float));
        }
        multiply(asked, D, to_gate, gate, E, rows_out, E, D, false, threads);
        scan_forward(u, delta, delta_bias, A, dt_B_C + R, dt_B_C + R + N, projected, skip, gate, E, y, states, b, L,
                     L_out, E, N, 0, threads);
        multiply(y, E, to_out, out_b, D, rows_out, D, E, true, threads);
        if (!fc1) continue;
        norm_forward(out_b, nullptr, norm2, nullptr, asked, nullptr, rows_out, D, threads);
        multiply(asked, D, fc1, h, 2 * H, rows_out, 2 * H, D, false, threads);
        swiglu_forward(h, hidden, rows_out, H, threads);
        multiply(hidden, H, fc2, out_b, D, rows_out, D, H, true, threads);
    }
}

// What jepa/cpu_kernel.py calls: variables with C names that hold the functions' addresses.
#define KERNEL(name, function) extern "C" { decltype(&function) name = function; }
KERNEL(conv_forward_float32, conv_forward<float>)
KERNEL(conv_forward_bfloat16, conv_forward<bf16>)
KERNEL(conv_backward_float32, conv_backward<float>)
KERNEL(conv_backward_bfloat16, conv_backward<bf16>)
KERNEL(scan_forward_float32, scan_forward<float>)
KERNEL(scan_forward_bfloat16, scan_forward<bf16>)
KERNEL(scan_backward_float32, scan_backward<float>)
KERNEL(scan_backward_bfloat16, scan_backward<bf16>)
KERNEL(add_norm_forward, norm_forward)
KERNEL(add_norm_backward, norm_backward)
KERNEL(gated_silu_forward, swiglu_forward)
KERNEL(gated_silu_backward, swiglu_backward)
KERNEL(picture_patches, patches)
KERNEL(pack_weight, pack)
KERNEL(packed_product_float32, multiply<float>)
KERNEL(packed_product_bfloat16, multiply<bf16>)
KERNEL(block_inference, block_forward)
extern "C" int64_t bfloat16_products() { return products(); }
