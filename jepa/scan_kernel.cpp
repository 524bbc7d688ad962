// The middle of the Mamba mixer on a CPU: causal convolution + SiLU, and selective scan + gate, forward and backward.
// jepa/cpu_kernel.py compiles this file, and passes CHUNK and GROUP; the definitions are in jepa/mamba.py.
//
//   L  tokens      E  channels      N  states per channel      K  taps of the convolution
//
// A vector holds LANES neighbouring channels, which the recurrence treats alike. One task is GROUP channels of one
// sample: tasks share nothing they write, so results do not depend on the number of threads. All tensors are contiguous
// and float32.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
struct Cell {  // a Vec that a std::vector may hold
    Vec v;
};

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return Vec{} + x; }
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

// Runs task(sample, first channel, channel after the last) for all samples and groups, on PyTorch's own OpenMP threads.
// PyTorch has libgomp loaded; a second pool would compete for the cores with the first, whose idle threads spin. Any
// OpenMP that offers GCC's entry point will do, and without one everything runs on the calling thread.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);

template <class Task>
static void parallel(int64_t samples, int64_t E, int64_t threads, Task task) {
    const int64_t groups = (E + GROUP - 1) / GROUP;
    struct Queue {
        Task& task;
        int64_t groups, tasks, E;
        std::atomic<int64_t> next;
    } queue{task, groups, samples * groups, E, {0}};
    const auto work = [](void* data) {
        auto& q = *static_cast<Queue*>(data);
        for (int64_t i; (i = q.next++) < q.tasks;) {
            const int64_t first = i % q.groups * GROUP;
            q.task(i / q.groups, first, first + GROUP < q.E ? first + GROUP : q.E);
        }
    };
    if (threads > 1 && queue.tasks > 1 && GOMP_parallel)
        GOMP_parallel(work, &queue, threads < queue.tasks ? threads : queue.tasks, 0);
    else
        work(&queue);
}

extern "C" int64_t lanes() { return LANES; }

// y_t = silu(bias + sum_k taps_k x_{t-K+1+k}),  x before the first token being 0.   x, y (B, L, E); taps (K, E)
static inline Vec convolve(const float* x, const float* taps, const float* bias, int64_t t, int64_t K, int64_t E) {
    Vec sum = load(bias);
    for (int64_t k = t < K - 1 ? K - 1 - t : 0; k < K; k++) sum += load(taps + k * E) * load(x + (t - K + 1 + k) * E);
    return sum;
}

extern "C" void conv_forward(const float* x, const float* taps, const float* bias, float* y, int64_t samples, int64_t L,
                             int64_t E, int64_t K, int64_t threads) {
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        for (int64_t t = 0; t < L; t++)
            for (int64_t e = first; e < last; e += LANES)
                store(y + (b * L + t) * E + e, silu(convolve(x + b * L * E + e, taps + e, bias + e, t, K, E)));
    });
}

// Adds to dx (B, L, E) and, for every sample by itself, to dtaps (B, K, E) and dbias (B, E).
extern "C" void conv_backward(const float* dy, const float* x, const float* taps, const float* bias, float* dx,
                              float* dtaps, float* dbias, int64_t samples, int64_t L, int64_t E, int64_t K,
                              int64_t threads) {
    const auto add = [](float* p, Vec v) { store(p, load(p) + v); };
    parallel(samples, E, threads, [=](int64_t b, int64_t first, int64_t last) {
        for (int64_t t = 0; t < L; t++)
            for (int64_t e = first; e < last; e += LANES) {
                const float* x_b = x + b * L * E + e;
                const Vec d = load(dy + (b * L + t) * E + e) * silu_slope(convolve(x_b, taps + e, bias + e, t, K, E));
                add(dbias + b * E + e, d);
                for (int64_t k = t < K - 1 ? K - 1 - t : 0; k < K; k++) {
                    const int64_t s = t - K + 1 + k;
                    add(dtaps + (b * K + k) * E + e, d * load(x_b + s * E));
                    add(dx + (b * L + s) * E + e, d * load(taps + k * E + e));
                }
            }
    });
}

// delta = softplus(dt + bias),  h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t h_t + D u_t,
// out = y silu(gate) at the last L_out tokens.
//
// u, dt (B, L, E); bias, D (E); A (N, E), negative; B, C (B, L, N); gate, out (B, L_out, E).
// starts (B, chunks, N, E) receives the state before every chunk of tokens or, with keep = 0, (B, 1, N, E) the current
// one.
extern "C" void scan_forward(const float* u, const float* dt, const float* bias, const float* A, const float* B,
                             const float* C, const float* D, const float* gate, float* out, float* starts,
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
                        h = exp_nonpositive(delta[t] * a) * h + x[t] * B[(token + t) * N + n];
                        y[t] += h * C[(token + t) * N + n];
                    }
                    if (k + 1 < chunks) store(end + n * E, h);
                }
                for (int64_t t = silent > 0 ? silent : 0; t < T; t++) {
                    const int64_t at = (b * L_out + t - silent) * E + e;
                    store(out + at, y[t] * silu(load(gate + at)));
                }
            }
    });
}

// The gradients of all of scan_forward's inputs from dout (B, L_out, E). A chunk's states are computed again from its
// start; then the recurrence of their gradient runs from the chunk's end:  g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}.
// What samples or channels share is summed by the caller: dbias, dD (B, E), dA (B, N, E), all three 0 at first;
// dB, dC (groups, B, L, N).
extern "C" void scan_backward(const float* dout, const float* u, const float* dt, const float* bias, const float* A,
                              const float* B, const float* C, const float* D, const float* gate, const float* starts,
                              float* du, float* ddt, float* dbias, float* dA, float* dB, float* dC, float* dD,
                              float* dgate, int64_t samples, int64_t L, int64_t L_out, int64_t E, int64_t N,
                              int64_t threads) {
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
                        const int64_t at = (b * L_out + t - silent) * E + e;
                        dy[t] = load(dout + at) * silu(load(gate + at));
                    }
                }
                for (int64_t n = 0; n < N; n++) {
                    const float *B_n = B + token * N + n, *C_n = C + token * N + n;
                    Cell *dB_n = &dB_lanes[n * CHUNK], *dC_n = &dC_lanes[n * CHUNK];
                    Cell& carried_n = carried[(e - first) / LANES * N + n];
                    const Vec a = load(A + n * E + e);
                    Vec decay[CHUNK], h[CHUNK + 1];
                    h[0] = load(starts + ((b * chunks + k) * N + n) * E + e);
                    for (int64_t t = 0; t < T; t++) {
                        decay[t] = exp_nonpositive(delta[t] * a);
                        h[t + 1] = decay[t] * h[t] + x[t] * B_n[t * N];
                        y[t] += h[t + 1] * C_n[t * N];
                        dC_n[t].v += dy[t] * h[t + 1];
                    }
                    Vec g = carried_n.v, da = load(dA + (b * N + n) * E + e);
                    for (int64_t t = T - 1; t >= 0; t--) {
                        g += dy[t] * C_n[t * N];
                        dB_n[t].v += g * x[t];
                        dx[t] += g * B_n[t * N];
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
                        const int64_t out_at = (b * L_out + t - silent) * E + e;
                        store(dgate + out_at, load(dout + out_at) * y[t] * silu_slope(load(gate + out_at)));
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
