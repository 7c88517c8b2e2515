// Quantizes rows with a ggml-base and with builds of Pestle's kernels, and says where they differ. It runs where there is
// no Python, such as in an emulator; scripts/prove_kernels_arm64.py compiles it and talks to it.
//
//     encode_beside LIBGGML-BASE KERNELS...
//
// It first writes a line for each instruction set of each library: path, tab, name; then an empty line. A request on stdin is
// five 64-bit numbers (tensor type, type of the rows, rows, weights a row, whether importance follows), then importance
// in f32, then the rows. The answer is a line: for each of those, how many weights the kernel left to ggml and how
// many bytes differ.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 16

typedef size_t (*Chunk)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);
typedef size_t (*RowSize)(int, int64_t);
typedef void (*Widen)(const void *, float *, int64_t);
typedef int64_t (*Encode)(int, int, int, const void *, uint8_t *, int64_t, int64_t, int64_t, const float *, Chunk);
typedef const char *(*Name)(int);

typedef struct {
    Chunk encode;
    RowSize row_size;
    Widen from_half, from_bf16;
} Ggml;

typedef struct {
    Encode encode;
    int level;
} Kernels;

typedef struct {
    int64_t type, source, rows, width, weighted;
} Request;

enum { F32 = 0, F16 = 1 };

static void *symbol(void *library, const char *name) {
    void *found = library ? dlsym(library, name) : 0;
    if (!found) {
        fprintf(stderr, "%s: %s\n", name, dlerror());
        exit(2);
    }
    return found;
}

static void *buffer(size_t bytes) {
    void *made = calloc(bytes + 1, 1);
    if (!made) {
        perror("calloc");
        exit(2);
    }
    return made;
}

static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) {
        fprintf(stderr, "a request ended too soon\n");
        exit(2);
    }
}

static int open_kernels(char **paths, Kernels kernels[MOST]) {
    int count = 0;
    for (; *paths; ++paths) {
        void *library = dlopen(*paths, RTLD_NOW);
        const Name name = (Name)symbol(library, "pestle_level");
        for (int level = 0; name(level) && count < MOST; ++level) {
            kernels[count++] = (Kernels){(Encode)symbol(library, "pestle_encode"), level};
            printf("%s\t%s\n", *paths, name(level));
        }
    }
    puts("");
    fflush(stdout);
    return count;
}

static void answer(const Request *request, const Ggml *ggml, const Kernels *kernels, int count) {
    const int type = (int)request->type, source = (int)request->source;
    const int64_t weights = request->rows * request->width;
    const size_t row_bytes = ggml->row_size(type, request->width), bytes = row_bytes * (size_t)request->rows;
    const size_t stored = (size_t)weights * (source == F32 ? 4 : 2), columns = (size_t)request->width * sizeof(float);
    float *importance = request->weighted ? buffer(columns) : 0, *wide = buffer((size_t)weights * sizeof(float));
    uint8_t *from = buffer(stored), *theirs = buffer(bytes), *ours = buffer(bytes);
    if (importance) take(importance, columns);
    take(from, stored);
    if (source == F32) memcpy(wide, from, stored);
    else (source == F16 ? ggml->from_half : ggml->from_bf16)(from, wide, weights);
    ggml->encode(type, wide, theirs, 0, request->rows, request->width, importance);
    for (int k = 0; k < count; ++k) {
        int64_t differing = 0;
        for (size_t i = 0; i < bytes; ++i) ours[i] = (uint8_t)~theirs[i]; // a kernel that writes nothing must not pass
        const int64_t left = kernels[k].encode(kernels[k].level, type, source, from, ours, request->rows, request->width,
                                               (int64_t)row_bytes, importance, ggml->encode);
        for (size_t i = 0; i < bytes; ++i) differing += ours[i] != theirs[i];
        printf("%lld %lld ", (long long)left, (long long)differing);
    }
    puts("");
    fflush(stdout);
    free(importance), free(wide), free(from), free(theirs), free(ours);
}

int main(int count, char **arguments) {
    if (count < 3) {
        fprintf(stderr, "say which: encode_beside LIBGGML-BASE KERNELS...\n");
        return 2;
    }
    void *base = dlopen(arguments[1], RTLD_NOW);
    const Ggml ggml = {(Chunk)symbol(base, "ggml_quantize_chunk"), (RowSize)symbol(base, "ggml_row_size"),
                       (Widen)symbol(base, "ggml_fp16_to_fp32_row"), (Widen)symbol(base, "ggml_bf16_to_fp32_row")};
    Kernels kernels[MOST];
    const int levels = open_kernels(arguments + 2, kernels);
    Request request;
    while (fread(&request, sizeof request, 1, stdin) == 1) answer(&request, &ggml, kernels, levels);
    return 0;
}
