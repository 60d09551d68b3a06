/* What is between an expert's products, for one kind of processor; products.h includes it once for
 * each kind, with the names that it has defined. */

INLINE Vector NAME(chosen)(Whole mask, Vector yes, Vector no) {
    return (Vector)(((Whole)yes & mask) | ((Whole)no & ~mask));
}

/* Round to bfloat16 as to_bfloat16 does. */
INLINE void NAME(narrow)(Vector values, uint16_t *at) {
    Bits bits = (Bits)values, nearest = (bits >> 16 & 1) + bits + 0x7fff;
    Bits is_none = (Bits)(values != values);
    nearest = ((nearest >> 16) & ~is_none) | (is_none & 0x7fc0);
    for (int i = 0; i < LANES; i++) at[i] = (uint16_t)nearest[i];
}

/* e to the power of each value, to the last bit or two (Cephes' polynomial). */
INLINE Vector NAME(exponential)(Vector x) {
    const float magic = 12582912.0f; /* adding it rounds to whole numbers */
    Whole is_low = x < -87.3f, is_high = x > 88.7228f, is_none = x != x;
    Vector n = FUSED(x, SPREAD(1.44269504f), SPREAD(magic));
    Bits exponent = (Bits)n - (Bits)SPREAD(magic);
    n -= magic;
    Vector rest = FUSED(n, SPREAD(-0.693359375f), x);
    rest = FUSED(n, SPREAD(2.12194440e-4f), rest);
    Vector p = FUSED(rest, SPREAD(1.9875691500e-4f), SPREAD(1.3981999507e-3f));
    p = FUSED(p, rest, SPREAD(8.3334519073e-3f));
    p = FUSED(p, rest, SPREAD(4.1665795894e-2f));
    p = FUSED(p, rest, SPREAD(1.6666665459e-1f));
    p = FUSED(p, rest, SPREAD(5.0000001201e-1f));
    p = FUSED(p * rest, rest, rest) + 1.0f;
    p = (Vector)((Bits)p + (exponent << 23));
    p = NAME(chosen)(is_low, (Vector){}, p);
    p = NAME(chosen)(is_high, SPREAD(INFINITY), p);
    return NAME(chosen)(is_none, x, p);
}

/* The normal distribution's function times x, by erf(x) of Abramowitz and Stegun 7.1.26. */
INLINE Vector NAME(gelu)(Vector x) {
    Vector size = (Vector)((Whole)x & 0x7fffffff) * 0.707106781f;
    Vector t = 1.0f / FUSED(size, SPREAD(0.3275911f), SPREAD(1.0f));
    Vector p = FUSED(t, SPREAD(1.061405429f), SPREAD(-1.453152027f));
    p = FUSED(p, t, SPREAD(1.421413741f));
    p = FUSED(p, t, SPREAD(-0.284496736f));
    p = FUSED(p, t, SPREAD(0.254829592f));
    Vector tail = 0.5f * (p * t * NAME(exponential)(-(size * size)));
    return x * NAME(chosen)(x < 0.0f, tail, 1.0f - tail);
}

INLINE Vector NAME(gated)(Vector gate, Vector up, Activation activation) {
    if (activation == RELU) return NAME(chosen)(gate < 0.0f, (Vector){}, gate) * up;
    if (activation == GELU) return NAME(gelu)(gate) * up;
    if (activation == GELU_TANH) {
        Vector inner = gate * FUSED(gate * gate, SPREAD(0.0356774081f), SPREAD(0.797884561f));
        return gate / (1.0f + NAME(exponential)(inner * -2.0f)) * up;
    }
    if (activation == SILU) return gate / (1.0f + NAME(exponential)(-gate)) * up;
    gate = NAME(chosen)(gate > LIMIT, SPREAD(LIMIT), gate);
    up = NAME(chosen)(up > LIMIT, SPREAD(LIMIT), up);
    up = NAME(chosen)(up < -LIMIT, SPREAD(-LIMIT), up);
    return gate / (1.0f + NAME(exponential)(gate * -ALPHA)) * (up + 1.0f);
}
