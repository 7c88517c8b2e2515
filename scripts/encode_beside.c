// Quantizes rows with a ggml-base and with Pestle's kernels beside it, and says where they differ. Runs on a machine, or
// in an emulator, that has no Python: scripts/prove_kernels_arm64.py builds it and talks to it.
//
//     encode_beside LIBGGML-BASE KERNELS
//
// It first writes the names of the kernels' levels, a line each, and an empty line. A request on stdin is five 64-bit
// numbers (tensor type, source type, rows, weights a row, whether importance follows), then importance as f32 and the
// rows. The answer is a line: of each level, how many weights it left to ggml and how many bytes differ.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef size_t (*Chunk)(int, const float *, void *, int64_t, int64_t, int64_t, const float *);
typedef size_t (*RowSize)(int, int64_t);
typedef void (*Widen)(const void *, float *, int64_t);
typedef int64_t (*Encode)(
    int, int, int, const void *, uint8_t *, int64_t, int64_t, int64_t, const float *, Chunk
);

enum { F32 = 0, F16 = 1 };

static void *symbol(void *library, const char *name) {
    void *found = library ? dlsym(library, name) : 0;
    if (!found) fprintf(stderr, "%s: %s\n", name, dlerror()), exit(2);
    return found;
}

static void *buffer(size_t bytes) {
    void *made = calloc(bytes + 1, 1);
    if (!made) perror("calloc"), exit(2);
    return made;
}

static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) fprintf(stderr, "a request that ends too soon\n"), exit(2);
}

int main(int count, char **arguments) {
    if (count != 3) return fprintf(stderr, "say which: encode_beside LIBGGML-BASE KERNELS\n"), 2;
    void *ggml = dlopen(arguments[1], RTLD_NOW), *kernels = dlopen(arguments[2], RTLD_NOW);
    const Chunk chunk = (Chunk)symbol(ggml, "ggml_quantize_chunk");
    const RowSize row_size = (RowSize)symbol(ggml, "ggml_row_size");
    const Widen of_half = (Widen)symbol(ggml, "ggml_fp16_to_fp32_row"), of_bf16 = (Widen)symbol(ggml, "ggml_bf16_to_fp32_row");
    const Encode encode = (Encode)symbol(kernels, "pestle_encode");
    const char *(*level_name)(int) = (const char *(*)(int))symbol(kernels, "pestle_level");
    int levels = 0;
    while (level_name(levels)) puts(level_name(levels++));
    puts("");
    fflush(stdout);
    for (int64_t request[5]; fread(request, sizeof request, 1, stdin) == 1; fflush(stdout)) {
        const int type = (int)request[0], source = (int)request[1];
        const int64_t rows = request[2], width = request[3], weights = rows * width;
        const size_t row_bytes = row_size(type, width), bytes = row_bytes * (size_t)rows;
        const size_t stored = (size_t)weights * (source == F32 ? 4 : 2);
        float *importance = request[4] ? buffer((size_t)width * 4) : 0, *wide = buffer((size_t)weights * 4);
        uint8_t *from = buffer(stored), *theirs = buffer(bytes), *ours = buffer(bytes);
        if (importance) take(importance, (size_t)width * 4);
        take(from, stored);
        if (source == F32) memcpy(wide, from, stored);
        else (source == F16 ? of_half : of_bf16)(from, wide, weights);
        chunk(type, wide, theirs, 0, rows, width, importance);
        for (int level = 0; level < levels; ++level) {
            int64_t differing = 0;
            for (size_t i = 0; i < bytes; ++i) ours[i] = (uint8_t)~theirs[i]; // a kernel that writes nothing must not pass
            const int64_t left = encode(level, type, source, from, ours, rows, width, (int64_t)row_bytes, importance, chunk);
            for (size_t i = 0; i < bytes; ++i) differing += ours[i] != theirs[i];
            printf("%lld %lld ", (long long)left, (long long)differing);
        }
        puts("");
        free(importance), free(wide), free(from), free(theirs), free(ours);
    }
    return 0;
}
