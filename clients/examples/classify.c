/* Classify images with an exported model: the C API of onnxruntime, and nothing else.
 *
 *     cc -std=c11 -O2 -I/usr/include/onnxruntime classify.c -lonnxruntime -o classify
 *     ./classify model.onnx photo.ppm another.ppm
 *
 * An image is a PPM (P6, 8 bits), of any size: the model resizes it. ImageMagick makes one of a
 * JPEG: convert photo.jpg -auto-orient -depth 8 photo.ppm
 */

#include <ctype.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>

/* Of an image, in pixels; and its longer side in shorter ones: the model scales those to its own. */
enum { LONGEST = 16384, THINNEST = 100 };

static const OrtApi *ort;

static void fail(const char *file, const char *why)
{
    fprintf(stderr, "%s: %s\n", file, why);
    exit(EXIT_FAILURE);
}

static void check(OrtStatus *status, const char *file)
{
    if (status != NULL)
        fail(file, ort->GetErrorMessage(status));
}

/* Cut a JSON list of labels into its strings, in place; 0: it is none. A label has no control
 * characters, so nothing but \" and \\ is escaped. */
static size_t split(char *json, char **labels)
{
    size_t count = 0;
    for (char *from = json; (from = strchr(from, '"')) != NULL; from++) {
        char *to = labels[count++] = ++from;
        while (*from != '"') {
            if (*from == '\\')
                from++;
            if (*from == '\0')
                return 0;
            *to++ = *from++;
        }
        *to = '\0';
    }
    return count;
}

/* Return (height, width, 3) pixels, or NULL after saying why. */
static uint8_t *read_ppm(const char *path, int64_t *height, int64_t *width)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return NULL;
    }
    long wide = 0, high = 0, top = 0;
    uint8_t *pixels = NULL;
    if (fscanf(file, "P6%9ld%9ld%9ld", &wide, &high, &top) == 3 && isspace(getc(file))
        && top == 255 && 0 < wide && wide <= LONGEST && 0 < high && high <= LONGEST
        && wide <= THINNEST * high && high <= THINNEST * wide) {
        size_t size = (size_t)high * (size_t)wide * 3;
        pixels = malloc(size);
        if (pixels != NULL && fread(pixels, 1, size, file) != size) {
            free(pixels);
            pixels = NULL;
        }
    }
    if (pixels == NULL)
        fprintf(stderr, "%s: no PPM (P6, 8 bits, no comments), or cut, too large or too thin\n", path);
    fclose(file);
    *height = high;
    *width = wide;
    return pixels;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s model.onnx image.ppm...\n", argv[0]);
        return 2;
    }
    const char *model = argv[1];
    ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (ort == NULL)
        fail(argv[0], "the library is older than the header that this was compiled with");

    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "classify", &env), model);
    check(ort->CreateSessionOptions(&options), model);
    check(ort->DisableCpuMemArena(options), model); /* it keeps the most that an image ever took */
    check(ort->CreateSession(env, model, options, &session), model);

    OrtModelMetadata *metadata;
    OrtAllocator *allocator;
    char *said;
    check(ort->SessionGetModelMetadata(session, &metadata), model);
    check(ort->GetAllocatorWithDefaultOptions(&allocator), model);
    check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, "classes", &said), model);
    char **labels = said == NULL ? NULL : calloc(strlen(said) + 1, sizeof *labels);
    size_t count = labels == NULL ? 0 : split(said, labels);
    float *probabilities = calloc(count + 1, sizeof *probabilities), novelty;
    if (count == 0 || probabilities == NULL)
        fail(model, "no model of InfLoRA Server");

    /* Into these the model answers, and onnxruntime checks that it has so many answers. */
    OrtMemoryInfo *memory;
    OrtValue *outputs[2];
    check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), model);
    check(ort->CreateTensorWithDataAsOrtValue(
        memory, probabilities, count * sizeof(float), (int64_t[]){1, (int64_t)count}, 2,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &outputs[0]), model);
    check(ort->CreateTensorWithDataAsOrtValue(
        memory, &novelty, sizeof novelty, (int64_t[]){1}, 1,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &outputs[1]), model);

    int status = EXIT_SUCCESS;
    for (int i = 2; i < argc; i++) {
        OrtValue *image = NULL;
        int64_t shape[4] = {1, 0, 0, 3};
        uint8_t *pixels = read_ppm(argv[i], &shape[1], &shape[2]);
        if (pixels == NULL) {
            status = EXIT_FAILURE; /* the others are classified all the same */
            continue;
        }
        OrtStatus *wrong = ort->CreateTensorWithDataAsOrtValue(
            memory, pixels, (size_t)(shape[1] * shape[2] * 3), shape, 4,
            ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &image);
        if (wrong == NULL)
            wrong = ort->Run(session, NULL, (const char *[]){"images"}, (const OrtValue *[]){image}, 1,
                             (const char *[]){"probabilities", "novelty"}, 2, outputs);
        if (wrong == NULL) {
            size_t best = 0;
            for (size_t k = 1; k < count; k++)
                best = probabilities[k] > probabilities[best] ? k : best;
            printf("%s: %s %.1f%%%s\n", argv[i], labels[best], 100 * (double)probabilities[best],
                   novelty > 0.95F ? ", unlike anything learned" : "");
        } else { /* memory may be short for this one alone */
            fprintf(stderr, "%s: %s: %s\n", argv[i], model, ort->GetErrorMessage(wrong));
            ort->ReleaseStatus(wrong);
            status = EXIT_FAILURE;
        }
        if (image != NULL)
            ort->ReleaseValue(image);
        free(pixels);
    }
    ort->ReleaseSession(session);
    ort->ReleaseEnv(env);
    return status; /* the rest lives as long as the program */
}
