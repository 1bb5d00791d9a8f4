/* A GPU driver that writes down what it is asked to launch, for tests on machines without a GPU. */
#include <stdio.h>
#include <string.h>

static int loaded = 0, functions = 0;
static char names[64][128];
static FILE *record(void) {
    static FILE *file = NULL;
    if (!file) file = fopen(RECORD, "w");
    return file;
}

int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4)) return 200;
    *module = (void *)(long)++loaded;
    return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    if (!strcmp(name, "missing")) return 500;
    strncpy(names[functions], name, 127);
    *function = (void *)(long)functions++;
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    fprintf(record(), "attribute %s %d %d\n", names[(long)function], attribute, value);
    fflush(record());
    return 0;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    fprintf(record(), "launch %s %u %u %u %u %u %u %u %p %d %f %p\n", names[(long)function], x, y, z, bx, by, bz, shared,
            *(void **)arguments[0], *(int *)arguments[2], *(float *)arguments[3], *(void **)arguments[4]);
    fflush(record());
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 200 ? "invalid image" : "not found";
    return 0;
}
