// Transcendental functions in f64 from additions, multiplications and divisions alone: the same bits on every processor, unlike the
// C library's, which chooses by instruction set. Errors are below 1e-14 (relative; of sines absolute), so that results rounded to
// f32
// are nearly always the closest.
#pragma once
#include "core.hpp"

namespace stemma {

constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;

inline double real_exp(double x) {
  if (x != x) return x;
  if (x > 709.7) return HUGE_VAL;
  if (x < -745.0) return 0;
  const double n = rint(x * 1.44269504088896338700), r = (x - n * LN2_HIGH) - n * LN2_LOW;
  double p = 1;
  for (int i = 14; i > 0; --i) p = 1 + p * r / i;
  return ldexp(p, (int)n);
}
inline double real_log(double x) {
  if (x != x || x < 0) return x != x ? x : NAN;
  if (x == 0) return -HUGE_VAL;
  if (x == HUGE_VAL) return x;
  int e;
  double m = frexp(x, &e);
  if (m < 0.70710678118654752440) m *= 2, --e;
  const double s = (m - 1) / (m + 1), z = s * s;
  double p = 0;
  for (int i = 23; i > 0; i -= 2) p = p * z + 1.0 / i;
  return 2 * s * p + e * LN2_LOW + e * LN2_HIGH;
}
inline double real_pow(double a, double b) {
  if (b == 0 || a == 1) return 1;
  if (a != a || b != b) return a + b;
  const bool whole = rint(b) == b, odd = whole && fabs(b) < 9007199254740992.0 && fmod(b, 2) != 0;
  const double size = fabs(a);
  if (a < 0 && !whole && fabs(b) != HUGE_VAL && size != HUGE_VAL) return NAN;
  double p;
  if (size == 1) p = 1;
  else if (fabs(b) == HUGE_VAL) p = (size > 1) == (b > 0) ? HUGE_VAL : 0;
  else if (size == 0 || size == HUGE_VAL) p = (size == 0) == (b > 0) ? 0 : HUGE_VAL;
  else p = real_exp(b * real_log(size));
  return odd && signbit(a) ? -p : p;
}
inline double real_tanh(double x) {
  const double a = fabs(x);
  if (a < 1e-3) return x - x * x * x / 3 + 2 * x * x * x * x * x / 15;
  if (!(a < 20)) return x != x ? x : x > 0 ? 1 : -1;
  const double e = real_exp(2 * a), t = (e - 1) / (e + 1);
  return x < 0 ? -t : t;
}
// erf: its series below 3, a continued fraction above (Abramowitz and Stegun 7.1.5, 7.1.14).
inline double real_erf(double x) {
  if (x != x) return x;
  const double z = fabs(x), root = 1.77245385090551602730;
  double y;
  if (z < 3) {
    double term = z, sum = z;
    for (int n = 1; n < 60; ++n) {
      term = term * (-z * z) / n;
      sum += term / (2 * n + 1);
    }
    y = 2 / root * sum;
  } else {
    double fraction = 0;
    for (int n = 60; n > 0; --n) fraction = (n / 2.0) / (z + fraction);
    y = z > 30 ? 1 : 1 - real_exp(-z * z) / (root * (z + fraction));
  }
  return x < 0 ? -y : y;
}
// sin(x + quarter * pi / 2). From 2^20 on the C library's, which reduces such angles exactly.
inline double real_sine(double x, int quarter) {
  if (!(fabs(x) < 1048576)) return quarter ? cos(x) : sin(x);
  const double n = rint(x * 0.63661977236758134308);
  const double r = ((x - n * 1.57079632673412561417) - n * 6.07710050630396597660e-11) - n * 2.02226624879595063154e-21;
  const int part = (int)(((int64_t)n + quarter) & 3);
  double p = 1;
  for (int i = part & 1 ? 18 : 19; i > 1; i -= 2) p = 1 - p * r * r / (i * (i - 1));
  const double y = part & 1 ? p : p * r;
  return part & 2 ? -y : y;
}
inline double real_sin(double x) { return real_sine(x, 0); }
inline double real_cos(double x) { return real_sine(x, 1); }

}  // namespace stemma
