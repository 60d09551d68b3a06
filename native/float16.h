/* Numbers of float16, where the processor has no instructions for them. */
#pragma once
#include <stdint.h>
#include <string.h>

static inline float of_float16(uint16_t bits) {
    /* The exponent is 112 smaller there. A product corrects it, exactly and for subnormals too. */
    uint32_t wide = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &wide, 4);
    value *= 0x1p112f;
    memcpy(&wide, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) wide |= 0x7f800000;
    wide |= (uint32_t)(bits & 0x8000) << 16;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to the nearest float16, ties to even. */
static inline uint16_t to_float16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* the last bit of 0.5 and more is worth a subnormal's */
        memcpy(&value, &bits, 4);
        value += 0.5f;
        memcpy(&bits, &value, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += (bits >> 13 & 1) + 0xfff - (112u << 23);
    return (uint16_t)(sign | bits >> 13);
}
