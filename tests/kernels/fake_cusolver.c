/* Five functions of cuSOLVER on the CPU, which check what they are given: cyclic Jacobi rotations on the upper triangle of
   column-major matrices. `last` tells the test what came in; `fail` makes one matrix fail, `refuse` a call. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { int64_t n, lda, batch; int jobz, uplo, type_a, type_w, type_c; void* stream; size_t device, host; } Call;
Call last;
int64_t fail = -1;
int refuse = 0, handles = 0;
static int handle_mark, params_mark;

int cusolverDnCreate(void** handle) { return *handle = &handle_mark, ++handles, 0; }
int cusolverDnCreateParams(void** params) { return *params = &params_mark, 0; }
int cusolverDnSetStream(void* handle, void* stream) { return last.stream = stream, handle == &handle_mark ? 0 : 1; }

static int record(void* handle, void* params, int jobz, int uplo, int64_t n, int ta, int64_t lda, int tw, int tc, int64_t batch) {
    void* stream = last.stream;
    last = (Call){n, lda, batch, jobz, uplo, ta, tw, tc, stream, 0, 0};
    return handle == &handle_mark && params == &params_mark && n > 0 && lda >= n && batch > 0 ? 0 : 3;
}

int cusolverDnXsyevBatched_bufferSize(void* handle, void* params, int jobz, int uplo, int64_t n, int ta, const void* a,
                                      int64_t lda, int tw, const void* w, int tc, size_t* device, size_t* host, int64_t batch) {
    *device = 8 * (size_t)(n * n) + 40, *host = 24;
    if (a == NULL || w == NULL || refuse) return 7;
    return record(handle, params, jobz, uplo, n, ta, lda, tw, tc, batch);
}

static double get(const void* p, int type, int64_t i) { return type == 1 ? ((const double*)p)[i] : ((const float*)p)[i]; }
static void put(void* p, int type, int64_t i, double x) {
    if (type == 1) ((double*)p)[i] = x; else ((float*)p)[i] = (float)x;
}

int cusolverDnXsyevBatched(void* handle, void* params, int jobz, int uplo, int64_t n, int ta, void* a, int64_t lda, int tw,
                           void* w, int tc, void* device, size_t device_bytes, void* host, size_t host_bytes, int* info,
                           int64_t batch) {
    int wrong = record(handle, params, jobz, uplo, n, ta, lda, tw, tc, batch);
    last.device = device_bytes, last.host = host_bytes;
    if (wrong) return wrong;
    if (device_bytes < 8 * (size_t)(n * n) + 40 || host_bytes < 24 || jobz != 1 || uplo != 1) return 3;
    memset(device, 0xff, device_bytes), memset(host, 0xff, host_bytes); /* all of it is there to be written */
    double* s = (double*)(((uintptr_t)device + 15) / 16 * 16); /* the symmetric matrix; the workspace has room for one */
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t base = b * lda * n;
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i <= j; ++i) s[i * n + j] = s[j * n + i] = get(a, ta, base + i + lda * j);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < n; ++i) put(a, ta, base + i + lda * j, i == j);
        for (int sweep = 0; sweep < 30; ++sweep)
            for (int64_t p = 0; p < n; ++p)
                for (int64_t q = p + 1; q < n; ++q) {
                    if (fabs(s[p * n + q]) < 1e-300) continue;
                    const double angle = 0.5 * atan2(2 * s[p * n + q], s[q * n + q] - s[p * n + p]);
                    const double c = cos(angle), t = sin(angle);
                    for (int64_t k = 0; k < n; ++k) {
                        const double x = s[k * n + p], y = s[k * n + q];
                        s[k * n + p] = c * x - t * y, s[k * n + q] = t * x + c * y;
                    }
                    for (int64_t k = 0; k < n; ++k) {
                        const double x = s[p * n + k], y = s[q * n + k];
                        s[p * n + k] = c * x - t * y, s[q * n + k] = t * x + c * y;
                    }
                    for (int64_t k = 0; k < n; ++k) {
                        const double x = get(a, ta, base + k + lda * p), y = get(a, ta, base + k + lda * q);
                        put(a, ta, base + k + lda * p, c * x - t * y), put(a, ta, base + k + lda * q, t * x + c * y);
                    }
                }
        for (int64_t i = 0; i < n; ++i) { /* ascending, by selection */
            int64_t least = i;
            for (int64_t j = i + 1; j < n; ++j) if (s[j * n + j] < s[least * n + least]) least = j;
            const double swap = s[least * n + least];
            s[least * n + least] = s[i * n + i], s[i * n + i] = swap;
            put(w, tw, b * n + i, swap);
            for (int64_t k = 0; k < n; ++k) {
                const double x = get(a, ta, base + k + lda * i);
                put(a, ta, base + k + lda * i, get(a, ta, base + k + lda * least)), put(a, ta, base + k + lda * least, x);
            }
        }
        info[b] = b == fail ? 5 : 0;
    }
    return 0;
}
