// Stand-ins for the kernels under a decoding machine, for its tests: models whose logits are a hash of the tokens and positions that
// are found through the table and the cache, so that a wrong slot, row, position or a stale cache gives other logits.
//
// Function 0 is the step of "model", 1 that of "draft", 2 takes x f32[n, 2] and gives its sums f32[n].
// The native model is an array of Config. States: i64[2, slots, 1] (plane 1 is read) and i32[3, slots, 1] (plane 2).
#include <math.h>
#include <stdint.h>
#include <string.h>

struct Config {
    int64_t seed, vocab, width, mix, max_rows, max_sequences, max_context, max_slots, min_outputs;
    int64_t calls_left;                             // before a call fails; negative: none does
    int64_t calls, rows, outputs, most_rows, jumps;  // seen; jumps: neighbouring rows of different table rows
};

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

#pragma GCC visibility push(default)
extern "C" {
// sizes: rows, outputs, sequences, context, slots
int64_t stemma_arena_bytes(void* model, int32_t function, const int64_t* sizes) {
    if (function == 2) return sizes[0] < 1 || sizes[0] > 9 ? -1 : 0;
    const Config& c = ((Config*)model)[function];
    const int64_t low[] = {1, c.min_outputs, 1, 1, 1}, high[] = {c.max_rows, c.max_rows, c.max_sequences, c.max_context, c.max_slots};
    for (int i = 0; i < 5; i++)
        if (sizes[i] < low[i] || sizes[i] > high[i]) return -1;
    return sizes[0] * 1000;
}

int32_t stemma_call(void* model, int32_t function, const int64_t* sizes, void* const* b, void* arena) {
    if (function == 2) {
        for (int64_t i = 0; i < sizes[0]; i++) ((float*)b[1])[i] = ((float*)b[0])[2 * i] + ((float*)b[0])[2 * i + 1];
        return 0;
    }
    Config& c = ((Config*)model)[function];
    const int64_t rows = sizes[0], outputs = sizes[1], sequences = sizes[2], context = sizes[3], slots = sizes[4];
    const int32_t *tokens = (int32_t*)b[0], *positions = (int32_t*)b[1], *slot = (int32_t*)b[2], *sequence = (int32_t*)b[3],
                  *table = (int32_t*)b[4], *selected = (int32_t*)b[5];
    const float* weights = (float*)b[6];  // there when several tokens are mixed
    b += c.mix > 1;
    uint64_t* a = (uint64_t*)b[6] + slots;
    uint32_t* low = (uint32_t*)b[7] + 2 * slots;
    float* logits = (float*)b[8];
    float* hidden = c.width ? (float*)b[9] : nullptr;
    if (c.calls_left == 0) return 7;
    c.calls_left--, c.calls++, c.rows += rows, c.outputs += outputs;
    c.most_rows = rows > c.most_rows ? rows : c.most_rows;
    memset(arena, 0xFF, rows * 1000);
    for (int64_t r = 0; r < rows; r++) {
        if (slot[r] < 0 || slot[r] >= slots || sequence[r] < 0 || sequence[r] >= sequences || positions[r] < 0) return 3;
        if (positions[r] >= context || table[sequence[r] * context + positions[r]] != slot[r]) return 4;
        for (int64_t q = 0; q < r; q++)
            if (slot[q] == slot[r]) return 5;
        c.jumps += r && sequence[r] != sequence[r - 1];
        uint64_t h = mix(c.seed + positions[r]);
        for (int64_t k = 0; k < c.mix; k++) {
            const int32_t token = tokens[r * c.mix + k];
            const float weight = c.mix > 1 ? weights[r * c.mix + k] : 1.0f;
            uint32_t bits;
            memcpy(&bits, &weight, 4);
            if (token < 0 || token >= c.vocab) return 6;
            if (weight != 0) h = mix(h ^ ((uint64_t)bits << 32 | (uint32_t)token));
        }
        a[slot[r]] = h;
        low[slot[r]] = (uint32_t)h;
    }
    for (int64_t i = 0; i < outputs; i++) {
        const int64_t r = selected[i];
        uint64_t h = c.seed;
        for (int64_t j = 0; j <= positions[r]; j++) {
            const int64_t at = table[sequence[r] * context + j];
            if (at < 0 || at >= slots || low[at] != (uint32_t)a[at]) return 8;
            h = mix(h ^ a[at]);
        }
        for (int64_t v = 0; v < c.vocab; v++) logits[i * c.vocab + v] = (float)(mix(h + v) >> 40) / 1048576.0f - 8.0f;
        for (int64_t v = 0; v < c.width; v++) hidden[i * c.width + v] = (float)(mix(h + 1000000 + v) >> 40) / 1048576.0f - 8.0f;
    }
    return 0;
}

// What else the machine is linked with (weak: tests may bring the library's). Tokens are chosen greedily; nothing is opened here.
__attribute__((weak)) int32_t stemma_sample(void*, const float* logits, int64_t vocab, const void*, const int32_t*, int64_t) {
    int32_t best = 0;
    for (int32_t v = 1; v < vocab; v++) best = logits[v] > logits[best] ? v : best;
    return best;
}
__attribute__((weak)) void stemma_noise(void*, const void*, float* out, int64_t count) { memset(out, 0, count * 4); }
__attribute__((weak)) void stemma_top_k(void*, const float*, int64_t, int64_t, int64_t, float*, int32_t*) {}
// kind: 0 exponential, 1 logarithm, 2 softmax
__attribute__((weak)) void stemma_rows(void*, int32_t kind, const float* x, int64_t rows, int64_t n, float* y) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        float top = kind == 2 && n ? x[0] : 0, sum = 0;
        for (int64_t i = 0; i < n && kind == 2; i++) top = x[i] > top ? x[i] : top;
        for (int64_t i = 0; i < n; i++) sum += y[i] = kind == 1 ? logf(x[i]) : expf(x[i] - top);
        for (int64_t i = 0; i < n && kind == 2; i++) y[i] /= sum;
    }
}
__attribute__((weak)) int32_t stemma_probabilities(void*, const float* logits, int64_t vocab, const void*, const int32_t*, int64_t, float* out) {
    stemma_rows(nullptr, 2, logits, 1, vocab, out);
    return 0;
}
const char* stemma_variants(void) { return ""; }
int32_t stemma_supported(const char*) { return 0; }
void* stemma_open(const char*, const void*, int32_t, char*, int64_t) { return nullptr; }
void stemma_close(void*) {}
}
