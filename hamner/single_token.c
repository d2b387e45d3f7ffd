/* One new token through a Llama on a CPU, in fp32, with weights of 32, 16 or 8 bits.

   The time of a token is that of reading the weights once. So the threads share each matrix's rows,
   every one reading long stretches of memory from front to back, and nothing else costs a pass over
   the memory or a call. decode_step.py compiles this for the machine it runs on, with WEIGHT_BITS
   defined; it takes GCC or Clang, for their vectors, and OpenMP, if there is to be more than one
   thread. PyTorch's threads are OpenMP's too: those that wait for more of its work take ours.

   H query heads share K key/value heads of D numbers; C is the hidden size, I the MLP's, V the
   vocabulary, S the positions that a cache has room for. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum {
    LANES = 8, /* numbers in a vector */
    SUMS = 4,  /* vectors added up side by side */
    PARTS = 4, /* of a matrix for each thread, so that none waits long for a slower one */
    LINE = 16, /* floats that the memory gives at once */
};

typedef float floats __attribute__((vector_size(4 * LANES)));

#if WEIGHT_BITS == 32
typedef float weight;
#elif WEIGHT_BITS == 16 && defined(__F16C__)
typedef uint16_t weight; /* the bits: older compilers don't know the type */
#elif WEIGHT_BITS == 16
typedef _Float16 weight;
#else
typedef int8_t weight;
#endif

typedef struct {
    const weight *values; /* (out, in) */
    const float *scales;  /* (out), or NULL */
} matrix;

typedef struct {
    const float *attention_norm; /* (C) */
    matrix qkv;                  /* ((H + 2K) D, C) */
    matrix o;                    /* (C, H D) */
    const float *mlp_norm;       /* (C) */
    matrix gate_up;              /* (2I, C) */
    matrix down;                 /* (C, I) */
} layer;

typedef struct {
    int hidden, inner, heads, kv_heads, head_dim, layers, vocabulary;
    float eps;
    const layer *layer; /* (layers) */
    const float *norm;  /* (C) */
    matrix lm_head;     /* (V, C) */
} model;

/* What the threads share while a token is on its way. */
typedef struct {
    const model *model;
    const float *cos, *sin; /* (D) of the token's position */
    float *const *keys;     /* (layers), each (K, S, D) */
    float *const *values;
    int length, room; /* positions before this one; S */
    int parts;        /* of each matrix */
    float *x;         /* (C), the stream */
    float *qkv;       /* (H + 2K, D) */
    float *attended;  /* (H, D) */
    float *inner;     /* (I) */
    float *scores;    /* (H, length + 1) */
    float *logits;    /* (V) */
} token;

/* ---------------------------------------------------------------------------- numbers */

static inline floats load(const float *x)
{
    floats y;
    memcpy(&y, x, sizeof y);
    return y;
}

static inline float load_weight(const weight *w)
{
#if WEIGHT_BITS == 16 && defined(__F16C__)
    return _cvtsh_ss(*w);
#else
    return (float)*w;
#endif
}

/* LANES weights as floats. GCC turns 8 and 16 bits into 32 one by one, so it is spelt out. */
static inline floats load_weights(const weight *w)
{
#if WEIGHT_BITS == 32
    return load(w);
#elif WEIGHT_BITS == 16 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
#elif WEIGHT_BITS == 8 && defined(__F16C__) && defined(__AVX2__)
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
#else
    float y[LANES];
    for (int i = 0; i < LANES; i++)
        y[i] = load_weight(w + i);
    return load(y);
#endif
}

static inline float total(floats x)
{
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            y[i] += y[i + n];
    return y[0];
}

static float dot(const float *a, const float *b, int size)
{
    floats sum = {0};
    int i = 0;
    for (; i + LANES <= size; i += LANES)
        sum += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < size; i++)
        rest += a[i] * b[i];
    return total(sum) + rest;
}

/* One row of a matrix (out, size) times x (size). */
static float row_times(matrix m, int row, const float *x, int size)
{
    const weight *w = m.values + (ptrdiff_t)row * size;
    floats sums[SUMS] = {0};
    int i = 0;
    for (; i + SUMS * LANES <= size; i += SUMS * LANES)
        for (int j = 0; j < SUMS; j++)
            sums[j] += load_weights(w + i + j * LANES) * load(x + i + j * LANES);
    float sum = 0;
    for (; i < size; i++)
        sum += load_weight(w + i) * x[i];
    for (int j = 1; j < SUMS; j++)
        sums[0] += sums[j];
    sum += total(sums[0]);
    return m.scales ? sum * m.scales[row] : sum;
}

static void rms_norm(float *out, const float *x, const float *w, const model *m)
{
    float factor = 1 / sqrtf(dot(x, x, m->hidden) / (float)m->hidden + m->eps);
    for (int i = 0; i < m->hidden; i++)
        out[i] = x[i] * factor * w[i];
}

/* Turn each pair (i, i + D/2) of x (D) by the position's angle. */
static void rotate(float *out, const float *x, const token *t)
{
    int half = t->model->head_dim / 2;
    for (int i = 0; i < half; i++) {
        out[i] = x[i] * t->cos[i] - x[i + half] * t->sin[i];
        out[i + half] = x[i + half] * t->cos[i + half] + x[i] * t->sin[i + half];
    }
}

/* ---------------------------------------------------------------------------- the layers */

/* Every thread calls these. Each does its share of an `omp for`, and waits at its end for all. */

/* out (rows) = m (rows, size) @ x (size), or added to it. */
static void multiply(token *t, matrix m, int rows, const float *x, int size, float *out, int add)
{
#pragma omp for schedule(dynamic)
    for (int part = 0; part < t->parts; part++) {
        int end = (int)((long)rows * (part + 1) / t->parts);
        for (int i = (int)((long)rows * part / t->parts); i < end; i++)
            out[i] = row_times(m, i, x, size) + (add ? out[i] : 0);
    }
}

/* inner (I) = silu(gate @ x) * (up @ x), for each part first all of the one, then of the other. */
static void gate_and_up(token *t, matrix gate_up, const float *x)
{
    int hidden = t->model->hidden, inner = t->model->inner;
#pragma omp for schedule(dynamic)
    for (int part = 0; part < t->parts; part++) {
        int begin = (int)((long)inner * part / t->parts);
        int end = (int)((long)inner * (part + 1) / t->parts);
        for (int i = begin; i < end; i++)
            t->inner[i] = row_times(gate_up, i, x, hidden);
        for (int i = begin; i < end; i++) {
            float silu = t->inner[i] / (1 + expf(-t->inner[i]));
            t->inner[i] = silu * row_times(gate_up, i + inner, x, hidden);
        }
    }
}

/* attended = what the scores p (length + 1) add up of the values before, and of this position's. */
static void add_values(token *t, const float *p, const float *values, const float *v, float *out)
{
    int size = t->model->head_dim, i = 0;
    for (; i + SUMS * LANES <= size; i += SUMS * LANES) {
        floats sums[SUMS];
        for (int j = 0; j < SUMS; j++)
            sums[j] = p[t->length] * load(v + i + j * LANES);
        for (int s = 0; s < t->length; s++)
            for (int j = 0; j < SUMS; j++)
                sums[j] += p[s] * load(values + (ptrdiff_t)s * size + i + j * LANES);
        memcpy(out + i, sums, sizeof sums);
    }
    for (; i < size; i++) {
        out[i] = p[t->length] * v[i];
        for (int s = 0; s < t->length; s++)
            out[i] += p[s] * values[(ptrdiff_t)s * size + i];
    }
}

/* One head's attention. The first head of a group also puts its key and value into the cache, where
   the others don't look for them. */
static void attend(token *t, int number, int head)
{
    const model *m = t->model;
    int size = m->head_dim, length = t->length, each = m->heads / m->kv_heads, group = head / each;
    float *keys = t->keys[number] + (ptrdiff_t)group * t->room * size;
    float *values = t->values[number] + (ptrdiff_t)group * t->room * size;
    const float *v = t->qkv + (m->heads + m->kv_heads + group) * size;
    float q[size], k[size];
    rotate(q, t->qkv + head * size, t);
    rotate(k, t->qkv + (m->heads + group) * size, t);

    float *p = t->scores + (ptrdiff_t)head * (length + 1), scale = 1 / sqrtf((float)size);
    float most = p[length] = dot(q, k, size) * scale, sum = 0;
    for (int s = 0; s < length; s++) {
        for (int i = 0; i < size; i += LINE) /* the values come while the scores are worked out */
            __builtin_prefetch(values + (ptrdiff_t)s * size + i);
        p[s] = dot(q, keys + (ptrdiff_t)s * size, size) * scale;
        most = p[s] > most ? p[s] : most;
    }
    for (int s = 0; s <= length; s++)
        sum += p[s] = expf(p[s] - most);
    for (int s = 0; s <= length; s++)
        p[s] /= sum;
    add_values(t, p, values, v, t->attended + head * size);
    if (head % each == 0) {
        memcpy(keys + (ptrdiff_t)length * size, k, sizeof k);
        memcpy(values + (ptrdiff_t)length * size, v, sizeof k);
    }
}

static void attention(token *t, int number)
{
#pragma omp for schedule(dynamic)
    for (int head = 0; head < t->model->heads; head++)
        attend(t, number, head);
}

/* The norms are so little that each thread has its own. */
static void all_layers(token *t)
{
    const model *m = t->model;
    int width = m->heads * m->head_dim, qkv = width + 2 * m->kv_heads * m->head_dim;
    float h[m->hidden];
    for (int n = 0; n < m->layers; n++) {
        const layer *l = m->layer + n;
        rms_norm(h, t->x, l->attention_norm, m);
        multiply(t, l->qkv, qkv, h, m->hidden, t->qkv, 0);
        attention(t, n);
        multiply(t, l->o, m->hidden, t->attended, width, t->x, 1);
        rms_norm(h, t->x, l->mlp_norm, m);
        gate_and_up(t, l->gate_up, h);
        multiply(t, l->down, m->hidden, t->inner, m->inner, t->x, 1);
    }
    rms_norm(h, t->x, m->norm, m);
    multiply(t, m->lm_head, m->vocabulary, h, m->hidden, t->logits, 0);
}

/* Logits (V) after a token, given its embedding (C). Its keys and values go to the caches (layers),
   each (K, room, D), behind the `length` positions that are there. Returns 0, or 1 if there is no
   memory. */
int decode(const model *m, const float *embedding, const float *cos, const float *sin,
           float *const *keys, float *const *values, int length, int room, int threads,
           float *logits)
{
    int width = m->heads * m->head_dim, qkv = width + 2 * m->kv_heads * m->head_dim;
    size_t scores = (size_t)m->heads * (length + 1);
    float *x = malloc((m->hidden + qkv + width + m->inner + scores) * sizeof *x);
    if (!x)
        return 1;
    token t = {.model = m, .cos = cos, .sin = sin, .keys = keys, .values = values, .logits = logits,
               .length = length, .room = room, .parts = threads * PARTS, .x = x};
    t.qkv = x + m->hidden;
    t.attended = t.qkv + qkv;
    t.inner = t.attended + width;
    t.scores = t.inner + m->inner;
    memcpy(x, embedding, m->hidden * sizeof *x);
#pragma omp parallel num_threads(threads)
    all_layers(&t);
    free(x);
    return 0;
}
