/* Runs an entry point of an artifact without Python: model.so and weights.safetensors are all it takes.
 *
 *   run_model [-e ENTRY] [-t THREADS] [-o FOLDER] LIBRARY WEIGHTS [SIZE=VALUE]... [INPUT]...
 *
 *   LIBRARY  kernels/<target>/model.so, of a target that this processor has
 *   INPUT    one file per input, in order: its elements as numpy.ndarray.tofile() writes them
 *   -o       write every output to FOLDER/<name>.bin (numpy.fromfile() reads it)
 *
 * Sizes that are not given are the smallest. Without inputs it says which sizes and inputs there are.
 * tw_entry.h lies beside every library:
 *
 *   cc -std=c11 -O2 -I model.tw/kernels/x86-64-v3 run_model.c -o run_model -ldl
 *
 * One such program runs any model. The other way is to link one model's library; LIBRARY is then not given:
 *
 *   cc -std=c11 -O2 -DLINKED_ENTRY=main -I DIR run_model.c -o run_main -L DIR -l:model.so -Wl,-rpath,DIR -lpthread -lm
 */
#define _XOPEN_SOURCE 700
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tw_entry.h"

#define ROWS_SHOWN 8

/* What the program uses of a library. */
typedef struct {
    int32_t abi;
    int64_t weights_size;
    const char *features;
    const tw_entry *entry;
    tw_pool *(*pool_create)(int threads);
    void (*pool_destroy)(tw_pool *pool);
} library;

typedef struct {
    char *data; /* read-only */
    size_t size;
} mapped;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    exit(1);
}

#ifdef LINKED_ENTRY

#define PATHS 1 /* arguments before the sizes and inputs */
#define USAGE "WEIGHTS [SIZE=VALUE]... [INPUT]..."
#define JOIN(a, b) a##b
#define ENTRY_SYMBOL(name) JOIN(tw_entry_, name)
extern const tw_entry ENTRY_SYMBOL(LINKED_ENTRY);

static library open_library(const char *path, const char *entry) {
    (void)path, (void)entry;
    const tw_entry *linked = &ENTRY_SYMBOL(LINKED_ENTRY);
    return (library){tw_abi, tw_weights_size, tw_features, linked, tw_pool_create, tw_pool_destroy};
}

#else

#define PATHS 2
#define USAGE "LIBRARY WEIGHTS [SIZE=VALUE]... [INPUT]..."

static void *symbol(void *handle, const char *path, const char *name) {
    void *found = dlsym(handle, name);
    if (!found) fail("%s: does not export %s", path, name);
    return found;
}

/* It stays open: the process ends when the program is done. */
static library open_library(const char *path, const char *entry) {
    char name[256];
    char *absolute = realpath(path, NULL); /* a name without a slash would be searched for elsewhere */
    if (!absolute) fail("%s: cannot be opened", path);
    void *handle = dlopen(absolute, RTLD_NOW | RTLD_LOCAL);
    free(absolute);
    if (!handle) fail("%s", dlerror());
    int32_t abi = *(const int32_t *)symbol(handle, path, "tw_abi");
    if (abi != TW_ABI) return (library){.abi = abi}; /* nothing else of it is known */
    snprintf(name, sizeof name, "tw_entry_%s", entry);
    return (library){
        abi,
        *(const int64_t *)symbol(handle, path, "tw_weights_size"),
        symbol(handle, path, "tw_features"),
        symbol(handle, path, name),
        (tw_pool * (*)(int)) symbol(handle, path, "tw_pool_create"),
        (void (*)(tw_pool *))symbol(handle, path, "tw_pool_destroy"),
    };
}

#endif

static mapped map_file(const char *path) {
    struct stat status;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status)) fail("%s: cannot be read", path);
    if (!S_ISREG(status.st_mode) || !status.st_size) fail("%s: is no file, or empty", path);
    mapped found = {.size = (size_t)status.st_size};
    found.data = mmap(NULL, found.size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (found.data == MAP_FAILED) fail("%s: cannot be mapped", path);
    return found;
}

/* The data section of a weight file that may be the library's.
 *
 * This compares sizes only. tw_weights_id is the SHA-256 of the file's header, which says that names, types and places
 * of the weights are the same (their values may be new): where files can be mixed up, have a hash library check it. */
static const char *data_section(mapped file, const char *path, int64_t expected_size) {
    uint64_t header = 0;
    if ((int64_t)file.size != expected_size)
        fail("%s: has %zu bytes, the library's weights have %" PRId64, path, file.size, expected_size);
    for (size_t i = 0; i < 8; i++) header |= (uint64_t)(unsigned char)file.data[i] << 8 * i;
    if (header > file.size - 8 || (header + 8) % 64) fail("%s: has no header of aligned safetensors", path);
    return file.data + 8 + header;
}

static void check_processor(const char *features) {
    char flags[16384] = "", word[64], have[66];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(flags, sizeof flags, file) && strncmp(flags, "flags", 5)) {}
    if (file) fclose(file);
    flags[strcspn(flags, "\n")] = ' '; /* so that every flag has a space on both sides */
    for (int length; sscanf(features, " %63s%n", word, &length) == 1; features += length) {
        snprintf(have, sizeof have, " %s ", word);
        if (!strstr(flags, have)) fail("this processor lacks %s, which the library needs", word);
    }
}

static void *allocate(int64_t bytes) { /* 64-byte aligned, zeros */
    size_t size = bytes > 0 ? ((size_t)bytes + 63) / 64 * 64 : 64;
    void *memory = aligned_alloc(64, size);
    if (!memory) fail("no memory for %zu bytes", size);
    return memset(memory, 0, size);
}

static size_t bytes(const tw_port *port, const int64_t *dims) {
    int64_t count = port->item_bytes;
    for (int32_t i = 0; i < port->rank; i++) count *= dims[i];
    return (size_t)count;
}

static void print_port(FILE *file, const tw_port *port, const int64_t *dims) {
    fprintf(file, "%s: %s[", port->name, port->dtype);
    for (int32_t i = 0; i < port->rank; i++) fprintf(file, "%s%" PRId64, i ? ", " : "", dims[i]);
    fputs("]\n", file);
}

/* The largest element of each row of a float32 output. */
static void print_rows(const tw_port *port, const int64_t *dims, const float *values) {
    if (strcmp(port->dtype, "float32")) return;
    int64_t count = (int64_t)(bytes(port, dims) / sizeof *values), width = port->rank ? dims[port->rank - 1] : 1;
    for (int64_t row = 0; width && row < count / width && row < ROWS_SHOWN; row++) {
        const float *at = values + row * width;
        int64_t best = 0;
        for (int64_t i = 1; i < width; i++)
            if (at[i] > at[best]) best = i;
        printf("  row %" PRId64 ": largest is [%" PRId64 "] = %.9g\n", row, best, (double)at[best]);
    }
}

static void write_output(const char *folder, const tw_port *port, const void *data, size_t size) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.bin", folder, port->name);
    FILE *file = fopen(path, "wb");
    int written = file && fwrite(data, 1, size, file) == size;
    if (!file || fclose(file) || !written) fail("%s: cannot be written", path);
}

static int64_t number(const char *text, const char *argument) {
    char *end;
    int64_t value = strtoll(text, &end, 10);
    if (end == text || *end) fail("%s: expected a number", argument);
    return value;
}

/* Takes SIZE=VALUE; 0 when the argument does not begin with the name of a size. */
static int take_size(const char *argument, const tw_entry *entry, int64_t *symbols) {
    for (int32_t i = 0; i < entry->symbol_count; i++) {
        size_t length = strlen(entry->symbols[i].name);
        if (strncmp(argument, entry->symbols[i].name, length) || argument[length] != '=') continue;
        symbols[i] = number(argument + length + 1, argument);
        return 1;
    }
    return 0;
}

static void list_inputs(const tw_entry *entry, const int64_t *symbols, const int64_t *dims) {
    for (int32_t i = 0; i < entry->symbol_count; i++)
        fprintf(stderr, "%s=%" PRId64 " (%" PRId64 " to %" PRId64 ")\n", entry->symbols[i].name, symbols[i],
                entry->symbols[i].minimum, entry->symbols[i].maximum);
    for (int32_t i = 0; i < entry->input_count; dims += entry->inputs[i++].rank)
        print_port(stderr, &entry->inputs[i], dims);
}

/* Runs the entry point once; everything it needs is made here and freed at the end. */
static void run(const library *lib, const char *data, const int64_t *symbols, char **files, int32_t file_count,
                int threads, const char *folder) {
    const tw_entry *entry = lib->entry;
    int32_t input_count = entry->input_count, output_count = entry->output_count, state_count = entry->state_count;
    int64_t rank = 0;
    for (int32_t i = 0; i < input_count; i++) rank += entry->inputs[i].rank;
    for (int32_t i = 0; i < output_count; i++) rank += entry->outputs[i].rank;
    int64_t *shapes = allocate(rank * (int64_t)sizeof *shapes), *dims = shapes;
    entry->shapes(symbols, shapes);
    if (file_count != input_count) {
        list_inputs(entry, symbols, shapes);
        fail("expected %" PRId32 " input files, got %" PRId32, input_count, file_count);
    }

    void **inputs = allocate((input_count + output_count + state_count) * (int64_t)sizeof *inputs);
    void **outputs = inputs + input_count, **states = outputs + output_count;
    for (int32_t i = 0; i < input_count; dims += entry->inputs[i++].rank) {
        size_t expected = bytes(&entry->inputs[i], dims);
        mapped file = map_file(files[i]);
        if (file.size != expected)
            fail("%s: has %zu bytes, input %s takes %zu with these sizes", files[i], file.size, entry->inputs[i].name,
                 expected);
        inputs[i] = file.data;
    }
    int64_t *output_dims = dims;
    for (int32_t i = 0; i < output_count; dims += entry->outputs[i++].rank)
        outputs[i] = allocate((int64_t)bytes(&entry->outputs[i], dims));
    for (int32_t i = 0; i < state_count; i++) { /* a program that calls again keeps them as they are then */
        int64_t size = entry->states[i].bytes;
        if (size < 0) { /* with these sizes; every call on this state has to have the same */
            int64_t *all = allocate(state_count * (int64_t)sizeof *all);
            entry->state_bytes(symbols, all);
            size = all[i];
            free(all);
        }
        states[i] = allocate(size);
        if (entry->states[i].initial >= 0)
            memcpy(states[i], data + entry->states[i].initial, (size_t)entry->states[i].bytes);
    }

    tw_call call = {
        .weights = data, .arena = allocate(entry->arena(symbols, NULL)), .symbols = symbols,
        .inputs = inputs, .outputs = outputs, .states = states, .pool = lib->pool_create(threads),
    };
    if (!call.pool) fail("no memory for a thread pool");
    int32_t fault = entry->run(&call);
    if (fault) fail("step %" PRId32 ": an input holds an index that the model's tables do not have", fault - 1);

    dims = output_dims;
    for (int32_t i = 0; i < output_count; dims += entry->outputs[i++].rank) {
        print_port(stdout, &entry->outputs[i], dims);
        print_rows(&entry->outputs[i], dims, outputs[i]);
        if (folder) write_output(folder, &entry->outputs[i], outputs[i], bytes(&entry->outputs[i], dims));
    }

    lib->pool_destroy(call.pool);
    dims = shapes;
    for (int32_t i = 0; i < input_count; dims += entry->inputs[i++].rank)
        munmap(inputs[i], bytes(&entry->inputs[i], dims));
    for (int32_t i = 0; i < output_count + state_count; i++) free(outputs[i]);
    free(call.arena);
    free(inputs);
    free(shapes);
}

int main(int argc, char **argv) {
    const char *entry_name = "main", *folder = NULL;
    int64_t threads = sysconf(_SC_NPROCESSORS_ONLN);
    for (int option; (option = getopt(argc, argv, "e:t:o:")) != -1;) {
        if (option == '?') return 1; /* getopt has said what is wrong */
        if (option == 'e') entry_name = optarg;
        if (option == 'o') folder = optarg;
        if (option == 't') threads = number(optarg, optarg);
    }
    char **next = argv + optind, **end = argv + argc;
    if (end - next < PATHS) fail("expected " USAGE);
    library lib = open_library(PATHS == 2 ? *next++ : NULL, entry_name);
    if (lib.abi != TW_ABI) fail("the library has interface %" PRId32 ", this program knows %d", lib.abi, TW_ABI);
    check_processor(lib.features);
    mapped weights = map_file(*next);
    const char *data = data_section(weights, *next++, lib.weights_size);

    int64_t *symbols = allocate(lib.entry->symbol_count * (int64_t)sizeof *symbols);
    for (int32_t i = 0; i < lib.entry->symbol_count; i++) symbols[i] = lib.entry->symbols[i].minimum;
    char **files = next; /* the arguments that are no sizes move to the front */
    int32_t file_count = 0;
    for (; next < end; next++)
        if (!take_size(*next, lib.entry, symbols)) files[file_count++] = *next;
    const char *wrong = lib.entry->check(symbols);
    if (wrong) fail("%s", wrong);

    run(&lib, data, symbols, files, file_count, (int)threads, folder);
    free(symbols);
    munmap(weights.data, weights.size);
    return 0;
}
