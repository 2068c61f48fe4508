/* What kernels use of C's <math.h>, which takes as long to read as a small kernel takes to compile. */
#ifndef TW_LIBM_H
#define TW_LIBM_H

#ifndef INFINITY
#define INFINITY (__builtin_inff())
#endif
#ifndef NAN
#define NAN (__builtin_nanf(""))
#endif

#define TW_DECLARE(name) \
    float name##f(float); \
    double name(double);
TW_DECLARE(fabs) TW_DECLARE(floor) TW_DECLARE(ceil) TW_DECLARE(trunc) TW_DECLARE(rint) TW_DECLARE(sqrt)
TW_DECLARE(exp) TW_DECLARE(exp2) TW_DECLARE(expm1) TW_DECLARE(log) TW_DECLARE(log2) TW_DECLARE(log10) TW_DECLARE(log1p)
TW_DECLARE(sin) TW_DECLARE(cos) TW_DECLARE(tan) TW_DECLARE(asin) TW_DECLARE(acos) TW_DECLARE(atan)
TW_DECLARE(sinh) TW_DECLARE(cosh) TW_DECLARE(tanh) TW_DECLARE(asinh) TW_DECLARE(acosh) TW_DECLARE(atanh)
TW_DECLARE(erf) TW_DECLARE(erfc)
#undef TW_DECLARE

#define TW_DECLARE(name) \
    float name##f(float, float); \
    double name(double, double);
TW_DECLARE(atan2) TW_DECLARE(pow) TW_DECLARE(fmod)
#undef TW_DECLARE

#endif
