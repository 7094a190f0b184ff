// A stand-in for compiled kernels, for the tests of the runtime: the native interface, with logits that are easy to predict.
//
// Function 0 is the step of a language model. Its two caches hold (token + 1) * (position + 1) + WEIGHT at each slot (odd positions
// are read from the second), and the logits of a row peak at (the sum of the cached numbers of positions 0..p, found through the
// table, plus 3 * p) mod vocab.
// Function 1 takes x f32[batch, width] and n i64[batch], and gives y = 2 * x f32[batch, width] and total = sum(n) i64[1].
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef ABI
#define ABI 2
#endif
#ifndef SUPPORTED
#define SUPPORTED "portable"
#endif

struct Model {
    const int32_t* weights;
    int32_t threads, profiling;
};
struct StemmaSampling {
    float temperature, top_p, min_p, repetition_penalty, presence_penalty;
    int32_t top_k;
    uint64_t seed, sequence, position;
};

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

extern "C" {
int32_t stemma_abi(void) { return ABI; }
const char* stemma_variants(void) { return "imaginary,portable"; }
int32_t stemma_supported(const char* variant) { return strcmp(variant, SUPPORTED) == 0; }

void* stemma_open(const char*, const void* weights, int32_t threads, char* error, int64_t error_bytes) {
    if (threads > 64) {
        snprintf(error, error_bytes, "%d threads are too many for a fake", threads);
        return nullptr;
    }
    return new Model{(const int32_t*)weights, threads, 0};
}
void stemma_close(void* model) { delete (Model*)model; }

int64_t stemma_arena_bytes(void*, int32_t function, const int64_t* sizes) { return function == 0 ? sizes[0] * 100000 : 0; }

// sizes: rows, outputs, sequences, context, slots. buffers: tokens positions slots sequence table selected | keys values | logits
static int32_t step(Model* model, const int64_t* sizes, void* const* buffers, void* arena) {
    const int64_t rows = sizes[0], outputs = sizes[1], sequences = sizes[2], context = sizes[3], slots = sizes[4];
    const int32_t *tokens = (const int32_t*)buffers[0], *positions = (const int32_t*)buffers[1], *slot = (const int32_t*)buffers[2],
                  *sequence = (const int32_t*)buffers[3], *table = (const int32_t*)buffers[4], *selected = (const int32_t*)buffers[5];
    float *keys = (float*)buffers[6], *values = (float*)buffers[7], *logits = (float*)buffers[8];
    if ((uintptr_t)arena % 4096) return 2;
    memset(arena, 0xFF, rows * 100000);  // scratch really is ours
    const int64_t vocab = model->weights[1];
#ifdef FAST
    for (int64_t i = 0; i < outputs; i++) logits[i * vocab + (positions[selected[i]] * 7919) % vocab] = 1.0f + positions[selected[i]];
    return 0;
#endif
    for (int64_t r = 0; r < rows; r++) {
        if (slot[r] < 0 || slot[r] >= slots || sequence[r] >= sequences || positions[r] >= context) return 3;
        const float number = (float)((tokens[r] + 1) * (positions[r] + 1) + model->weights[0]);
        keys[slot[r]] = number;                       // f32[1, slots, 1]
        values[(slots + slot[r]) * 4 + 3] = number;   // [1, slot, 3] of f32[2, slots, 4]
    }
    for (int64_t i = 0; i < outputs; i++) {
        const int64_t r = selected[i];
        int64_t sum = 3 * positions[r];
        for (int64_t j = 0; j <= positions[r]; j++) {
            const int64_t at = table[sequence[r] * context + j];
            sum += (int64_t)(j % 2 ? values[(slots + at) * 4 + 3] : keys[at]);
        }
        for (int64_t v = 0; v < vocab; v++) logits[i * vocab + v] = -0.25f * (float)((v - sum % vocab + vocab) % vocab);
    }
    return 0;
}

int32_t stemma_call(void* model, int32_t function, const int64_t* sizes, void* const* buffers, void* arena) {
    if (function == 0) return step((Model*)model, sizes, buffers, arena);
    const int64_t batch = sizes[0], width = sizes[1];
    if (batch == 13) return 7;  // an unlucky number, to see a failure
    for (int64_t i = 0; i < batch * width; i++) ((float*)buffers[2])[i] = 2 * ((const float*)buffers[0])[i];
    int64_t total = 0;
    for (int64_t i = 0; i < batch; i++) total += ((const int64_t*)buffers[1])[i];
    *(int64_t*)buffers[3] = total;
    return 0;
}

void stemma_set_weights(void* model, const void* weights) { ((Model*)model)->weights = (const int32_t*)weights; }
void stemma_set_profile(void* model, int32_t on) { ((Model*)model)->profiling = on; }
double stemma_probe(void*, int32_t, const void*, int64_t, int64_t) { return 0; }
int64_t stemma_profile(void* model, double* nanoseconds, int64_t n) {
    for (int64_t i = 0; i < n && i < 2; i++) nanoseconds[i] = 10.0 * (i + 1) * ((Model*)model)->profiling;
    return 2;
}

int32_t stemma_sample(void* model, const float* logits, int64_t vocab, const StemmaSampling* p, const int32_t* history, int64_t length) {
    if (length != (int64_t)p->position || ((Model*)model)->weights[0] < 0) return -1;
    float* scores = (float*)malloc(vocab * sizeof(float));
    memcpy(scores, logits, vocab * sizeof(float));
    if (p->repetition_penalty != 1.0f) {
        for (int64_t i = 0; i < length; i++) scores[history[i]] = logits[history[i]] - 10.0f * p->repetition_penalty;
    }
    for (int64_t v = 0; v < vocab && p->temperature > 0; v++) {
        const double u = ((mix(mix(mix(p->seed) ^ p->sequence) ^ p->position) ^ mix(v)) % 1000003 + 0.5) / 1000003;
        scores[v] = scores[v] / p->temperature - (float)log(-log(u));
    }
    int32_t best = 0;
    for (int32_t v = 1; v < vocab; v++) best = scores[v] > scores[best] ? v : best;
    free(scores);
    return best;
}

// Not what the library computes, but easy to tell apart: of top_k, the first k; noise is 1, 2, ...
void stemma_noise(void*, const StemmaSampling*, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = (float)(i + 1);
}
void stemma_top_k(void*, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices) {
    for (int64_t i = 0; i < rows * k; i++) values[i] = x[i / k * n + i % k], indices[i] = (int32_t)(i % k);
}

// kind: 0 exponential, 1 logarithm, 2 softmax
void stemma_rows(void*, int32_t kind, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        float top = kind == 2 && n ? x[0] : 0, sum = 0;
        for (int64_t i = 0; i < n && kind == 2; i++) top = x[i] > top ? x[i] : top;
        for (int64_t i = 0; i < n; i++) sum += y[i] = kind == 1 ? logf(x[i]) : expf(x[i] - top);
        for (int64_t i = 0; i < n && kind == 2; i++) y[i] /= sum;
    }
}
int32_t stemma_probabilities(void*, const float* logits, int64_t vocab, const StemmaSampling*, const int32_t*, int64_t, float* out) {
    stemma_rows(nullptr, 2, logits, 1, vocab, out);
    return 0;
}
}
