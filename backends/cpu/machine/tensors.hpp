// Array operations of programs: numpy's meaning, f32 i32 i64 bool, rank up to 4. An index out of range is an error.
#pragma once
#include "core.hpp"

namespace stemma {
namespace tensors {

struct Shape {
  int32_t rank = 0;
  int64_t size[MAX_RANK] = {};
  int64_t elements() const { int64_t n = 1; for (int i = 0; i < rank; ++i) n *= size[i]; return n; }
};
inline Shape shape_of(const Value& v) {
  Shape s;
  s.rank = v.rank;
  memcpy(s.size, v.shape, sizeof s.size);
  return s;
}
inline Value make(DType dtype, const Shape& s) {
  Value v;
  v.dtype = dtype, v.rank = s.rank;
  memcpy(v.shape, s.size, sizeof v.shape);
  v.storage = Ref<Storage>(new Storage(v.bytes()));
  return v;
}
inline Shape given_shape(const std::vector<int64_t>& sizes) {
  if (sizes.size() > MAX_RANK) fail("a tensor of %zu axes has more than %d.", sizes.size(), MAX_RANK);
  Shape s;
  for (int64_t n : sizes) {
    if (n < 0) fail("a tensor has the negative size %lld.", (long long)n);
    s.size[s.rank++] = n;
  }
  return s;
}
inline Shape broadcast(const Shape& a, const Shape& b) {
  Shape s;
  s.rank = std::max(a.rank, b.rank);
  for (int i = 0; i < s.rank; ++i) {
    const int64_t x = i < s.rank - a.rank ? 1 : a.size[i - (s.rank - a.rank)], y = i < s.rank - b.rank ? 1 : b.size[i - (s.rank - b.rank)];
    if (x != y && x != 1 && y != 1) fail("sizes %lld and %lld do not broadcast.", (long long)x, (long long)y);
    s.size[i] = x == 1 ? y : x;
  }
  return s;
}
// Steps, in elements, through `v` for each axis of a result of shape `s`: 0 along axes that are repeated.
struct Steps { int64_t by[MAX_RANK]; };
inline Steps steps_of(const Value& v, const Shape& s) {
  Steps t = {};
  int64_t step = 1;
  for (int i = v.rank - 1, j = s.rank - 1; i >= 0; --i, --j) {
    t.by[j] = v.shape[i] == 1 ? 0 : step;
    step *= v.shape[i];
  }
  return t;
}
// f(result element, offset in each input) over all elements of a shape, the last axis innermost.
template <int N, class F> inline void each(const Shape& s, const Steps (&steps)[N], F f) {
  if (!s.elements()) return;
  int64_t at[MAX_RANK] = {}, base[N] = {}, out = 0;
  const int last = s.rank - 1;
  const int64_t inner = s.rank ? s.size[last] : 1;
  for (;;) {
    int64_t o[N];
    memcpy(o, base, sizeof o);
    for (int64_t i = 0; i < inner; ++i) {
      f(out++, o);
      if (s.rank) for (int k = 0; k < N; ++k) o[k] += steps[k].by[last];
    }
    int axis = last - 1;
    for (; axis >= 0; --axis) {
      for (int k = 0; k < N; ++k) base[k] += steps[k].by[axis];
      if (++at[axis] < s.size[axis]) break;
      for (int k = 0; k < N; ++k) base[k] -= steps[k].by[axis] * s.size[axis];
      at[axis] = 0;
    }
    if (axis < 0) return;
  }
}
template <class F> inline auto by_type(DType t, F f) {
  switch (t) {
    case F32: return f((float*)nullptr);
    case I32: return f((int32_t*)nullptr);
    case I64: return f((int64_t*)nullptr);
    case BOOL: return f((uint8_t*)nullptr);
    default: fail("the program is damaged: a state where a tensor is expected");
  }
}
template <class T> using Of = std::remove_pointer_t<T>;

// ---- elementwise ----
template <class T, class R, class F> inline void binary(Call& call, DType result, F f) {
  const Value &a = call.in[0], &b = call.in[1];
  b.expect(a.dtype);
  const T *x = a.data<T>(), *y = b.data<T>();
  const Shape s = broadcast(shape_of(a), shape_of(b));
  Value v = make(result, s);
  R* z = v.data<R>();
  const int64_t n = s.elements();
  if (a.elements() == n && b.elements() == n) for (int64_t i = 0; i < n; ++i) z[i] = f(x[i], y[i]);
  else if (a.elements() == n && b.elements() == 1) for (int64_t i = 0; i < n; ++i) z[i] = f(x[i], y[0]);
  else if (b.elements() == n && a.elements() == 1) for (int64_t i = 0; i < n; ++i) z[i] = f(x[0], y[i]);
  else each<2>(s, {steps_of(a, s), steps_of(b, s)}, [&](int64_t i, const int64_t* o) { z[i] = f(x[o[0]], y[o[1]]); });
  call.out[0] = std::move(v);
}
template <class F> inline bool numbers(Call& call, F f) {  // f: same type in and out
  by_type(call.in[0].dtype, [&](auto* p) { using T = Of<decltype(p)>; binary<T, T>(call, call.in[0].dtype, [f](T a, T b) { return (T)f(a, b); }); });
  return true;
}
template <class F> inline bool compare(Call& call, F f) {
  by_type(call.in[0].dtype, [&](auto* p) { using T = Of<decltype(p)>; binary<T, uint8_t>(call, BOOL, [f](T a, T b) { return (uint8_t)f(a, b); }); });
  return true;
}
template <class F> inline bool floats2(Call& call, F f) {
  call.in[0].expect(F32);
  binary<float, float>(call, F32, f);
  return true;
}
template <class F> inline bool flags2(Call& call, F f) {
  call.in[0].expect(BOOL);
  binary<uint8_t, uint8_t>(call, BOOL, f);
  return true;
}
template <class F> inline bool unary(Call& call, F f) {  // any number type
  const Value& a = call.in[0];
  Value v = tensor_like(a.dtype, a);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>();
    T* z = v.data<T>();
    for (int64_t i = 0, n = v.elements(); i < n; ++i) z[i] = (T)f(x[i]);
  });
  call.out[0] = std::move(v);
  return true;
}
template <class F> inline bool floats1(Call& call, F f) {
  call.in[0].expect(F32);
  return unary(call, [f](auto x) { return f((float)x); });
}
template <class T> inline T floor_divide(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    const float m = fmodf(a, b);
    float q = (a - m) / b;
    if (m != 0 && (m < 0) != (b < 0)) q -= 1;
    return b == 0 ? a / b : floorf(q + 0.5f) == q ? q : floorf(q + 0.5f);
  } else {
    if (b == 0) return 0;  // as numpy
    if (b == (T)-1) return (T)(0 - (std::make_unsigned_t<T>)a);
    const T q = (T)(a / b);
    return (T)(q - (a % b != 0 && (a < 0) != (b < 0)));
  }
}
template <class T> inline T modulo(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    const float m = fmodf(a, b);
    return m != 0 && (m < 0) != (b < 0) ? m + b : m == 0 ? copysignf(0.0f, b) : m;
  } else {
    return b == 0 || b == (T)-1 ? 0 : (T)(a - floor_divide(a, b) * b);
  }
}
template <class T> inline T add(T a, T b) { if constexpr (std::is_integral_v<T>) return (T)((std::make_unsigned_t<T>)a + (std::make_unsigned_t<T>)b); else return a + b; }
template <class T> inline T sub(T a, T b) { if constexpr (std::is_integral_v<T>) return (T)((std::make_unsigned_t<T>)a - (std::make_unsigned_t<T>)b); else return a - b; }
template <class T> inline T mul(T a, T b) { if constexpr (std::is_integral_v<T>) return (T)((uint64_t)a * (uint64_t)b); else return a * b; }

inline bool op_where(Call& call) {
  const Value &c = call.in[0], &a = call.in[1], &b = call.in[2];
  b.expect(a.dtype);
  const uint8_t* test = c.flags();
  const Shape s = broadcast(broadcast(shape_of(c), shape_of(a)), shape_of(b));
  Value v = make(a.dtype, s);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T *x = a.data<T>(), *y = b.data<T>();
    T* z = v.data<T>();
    each<3>(s, {steps_of(c, s), steps_of(a, s), steps_of(b, s)}, [&](int64_t i, const int64_t* o) { z[i] = test[o[0]] ? x[o[1]] : y[o[2]]; });
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_cast(Call& call) {
  const std::string& name = call.text(0);
  const DType to = name == "f32" ? F32 : name == "i32" ? I32 : name == "i64" ? I64 : name == "bool" ? BOOL : STATE;
  if (to == STATE) fail("cast: programs have no %s.", name.c_str());
  const Value& a = call.in[0];
  if (to == a.dtype) {
    call.out[0] = std::move(call.in[0]);
    return true;
  }
  Value v = tensor_like(to, a);
  by_type(a.dtype, [&](auto* p) {
    const auto* x = a.data<Of<decltype(p)>>();
    by_type(to, [&](auto* q) {
      using R = Of<decltype(q)>;
      R* z = v.data<R>();
      for (int64_t i = 0, n = v.elements(); i < n; ++i) {
        if constexpr (std::is_same_v<Of<decltype(p)>, float> && !std::is_same_v<R, float>) {
          if (to == BOOL) z[i] = x[i] != 0;
          else z[i] = x[i] >= -9.2e18f && x[i] <= 9.2e18f ? (R)(int64_t)x[i] : std::numeric_limits<R>::min();
        } else {
          z[i] = to == BOOL ? (R)(x[i] != 0) : (R)x[i];
        }
      }
    });
  });
  call.out[0] = std::move(v);
  return true;
}

// ---- constants ----
inline bool op_constant(Call& call) {
  const std::string& name = call.text(1);
  const DType to = name == "f32" ? F32 : name == "i32" ? I32 : name == "i64" ? I64 : name == "bool" ? BOOL : STATE;
  if (to == STATE) fail("constant: programs have no %s.", name.c_str());
  Value v = tensor(to, {});
  if (to == F32) *v.f32() = (float)call.number(0);
  else if (to == I32) *v.i32() = (int32_t)call.integer(0);
  else if (to == I64) *v.i64() = call.integer(0);
  else *v.flags() = call.integer(0) != 0;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_size_value(Call& call) {
  const bool wide = call.text(1) == "i64";
  Value v = tensor(wide ? I64 : call.text(1) == "f32" ? F32 : I32, {});
  const int64_t n = call.size(0);
  if (wide) *v.i64() = n;
  else if (v.dtype == F32) *v.f32() = (float)n;
  else *v.i32() = (int32_t)n;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_iota(Call& call) {
  const std::string& name = call.text(1);
  Shape s;
  s.rank = 1, s.size[0] = call.size(0);
  Value v = make(name == "i64" ? I64 : name == "f32" ? F32 : I32, s);
  by_type(v.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    for (int64_t i = 0; i < s.size[0]; ++i) v.data<T>()[i] = (T)i;
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_array(Call& call) {
  const auto& items = call.attribute(0).items;
  const bool floats = call.text(1) == "f32";
  Value v = tensor(floats ? F32 : I32, {(int64_t)items.size()});
  for (size_t i = 0; i < items.size(); ++i) {
    const double number = items[i].kind == Attribute::INT ? (double)items[i].integer : items[i].number;
    if (floats) v.f32()[i] = (float)number;
    else v.i32()[i] = (int32_t)number;
  }
  call.out[0] = std::move(v);
  return true;
}

// ---- moving ----
inline bool op_reshape(Call& call) {
  const Shape s = given_shape(call.list(0));
  Value v = std::move(call.in[0]);
  v.data<char>();
  if (s.elements() != v.elements()) fail("reshape: %lld elements cannot become %lld.", (long long)v.elements(), (long long)s.elements());
  v.rank = s.rank;
  memcpy(v.shape, s.size, sizeof v.shape);
  call.out[0] = std::move(v);
  return true;
}
// The elements of `a` at the given steps from `start`, as a new tensor of shape `s`.
inline Value gather(const Value& a, const Shape& s, const Steps& steps, int64_t start = 0) {
  Value v = make(a.dtype, s);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>() + start;
    T* z = v.data<T>();
    each<1>(s, {steps}, [&](int64_t i, const int64_t* o) { z[i] = x[o[0]]; });
  });
  return v;
}
inline Steps strides(const Value& v) {
  Steps t = {};
  int64_t step = 1;
  for (int i = v.rank - 1; i >= 0; --i) t.by[i] = step, step *= v.shape[i];
  return t;
}
inline bool op_transpose(Call& call) {
  const Value& a = call.in[0];
  const std::vector<int64_t> axes = call.list(0);
  const Steps from = strides(a);
  Shape s;
  Steps steps = {};
  s.rank = a.rank;
  if ((int)axes.size() != a.rank) fail("transpose: %zu axes for a tensor of %d.", axes.size(), (int)a.rank);
  for (int i = 0; i < a.rank; ++i) {
    if (axes[(size_t)i] < 0 || axes[(size_t)i] >= a.rank) fail("transpose: there is no axis %lld.", (long long)axes[(size_t)i]);
    s.size[i] = a.shape[axes[(size_t)i]], steps.by[i] = from.by[axes[(size_t)i]];
  }
  if (s.elements() != a.elements()) fail("transpose: an axis is named twice.");
  call.out[0] = gather(a, s, steps);
  return true;
}
inline bool op_broadcast_to(Call& call) {
  const Value& a = call.in[0];
  const Shape s = given_shape(call.list(0));
  const Shape both = broadcast(shape_of(a), s);
  if (both.rank != s.rank || memcmp(both.size, s.size, sizeof s.size)) fail("broadcast_to: the sizes do not fit.");
  call.out[0] = gather(a, s, steps_of(a, s));
  return true;
}
inline int axis_of(int64_t axis, const Value& v) {
  if (axis < 0 || axis >= v.rank) fail("there is no axis %lld in a tensor of %d.", (long long)axis, (int)v.rank);
  return (int)axis;
}
inline bool op_slice(Call& call) {
  const Value& a = call.in[0];
  const int axis = axis_of(call.integer(0), a);
  const int64_t start = call.size(1), stop = call.size(2), step = call.size(3);
  if (start < 0 || stop < start || stop > a.shape[axis] || step < 1)
    fail("slice: %lld to %lld of an axis of %lld.", (long long)start, (long long)stop, (long long)a.shape[axis]);
  Shape s = shape_of(a);
  s.size[axis] = (stop - start + step - 1) / step;
  Steps steps = strides(a);
  const int64_t from = start * steps.by[axis];
  bool first = step == 1;
  for (int i = 0; i < axis; ++i) first &= a.shape[i] == 1;
  if (first) {  // contiguous: a view
    Value v = std::move(call.in[0]);
    v.data<char>();
    v.offset += from * item_bytes(v.dtype);
    v.shape[axis] = s.size[axis];
    call.out[0] = std::move(v);
    return true;
  }
  steps.by[axis] *= step;
  call.out[0] = gather(a, s, steps, from);
  return true;
}
inline bool op_concat(Call& call) {
  if (!call.count()) fail("concat: nothing to join.");
  const int axis = axis_of(call.integer(0), call.in[0]);
  Shape s = shape_of(call.in[0]);
  s.size[axis] = 0;
  for (int64_t k = 0; k < call.count(); ++k) {
    const Value& x = call.in[k];
    x.expect(call.in[0].dtype);
    bool fits = x.rank == s.rank;
    for (int i = 0; fits && i < s.rank; ++i) fits = i == axis || x.shape[i] == s.size[i];
    if (!fits) fail("concat: the inputs do not fit along axis %d.", axis);
    s.size[axis] += x.shape[axis];
  }
  Value v = make(call.in[0].dtype, s);
  int64_t outer = 1, inner = item_bytes(v.dtype), at = 0;
  for (int i = 0; i < axis; ++i) outer *= s.size[i];
  for (int i = axis + 1; i < s.rank; ++i) inner *= s.size[i];
  for (int64_t k = 0; k < call.count(); ++k) {
    const int64_t run = call.in[k].shape[axis] * inner;
    for (int64_t o = 0; o < outer; ++o) memcpy(v.data<char>() + o * s.size[axis] * inner + at, call.in[k].data<char>() + o * run, (size_t)run);
    at += run;
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_pad(Call& call) {
  const Value& a = call.in[0];
  const std::vector<int64_t> low = call.list(0), high = call.list(1);
  if ((int)low.size() != a.rank || (int)high.size() != a.rank) fail("pad: one amount per axis and side is needed.");
  Shape s;
  s.rank = a.rank;
  for (int i = 0; i < a.rank; ++i) {
    if (low[(size_t)i] < 0 || high[(size_t)i] < 0) fail("pad: an amount is negative.");
    s.size[i] = low[(size_t)i] + a.shape[i] + high[(size_t)i];
  }
  Value v = make(a.dtype, s);
  Steps out = strides(v);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    T* z = v.data<T>();
    std::fill(z, z + v.elements(), (T)call.number(2));
    for (int i = 0; i < a.rank; ++i) z += low[(size_t)i] * out.by[i];
    const T* x = a.data<T>();
    each<1>(shape_of(a), {out}, [&](int64_t i, const int64_t* o) { z[o[0]] = x[i]; });
  });
  call.out[0] = std::move(v);
  return true;
}
inline std::vector<int64_t> indices_of(const Value& v, int64_t extent, const char* what) {  // from -extent to extent - 1, as numpy
  std::vector<int64_t> found((size_t)v.elements());
  if (v.dtype != I32 && v.dtype != I64) fail("the program is damaged: indices are not integers");
  for (size_t i = 0; i < found.size(); ++i) {
    int64_t at = v.dtype == I32 ? v.i32()[i] : v.i64()[i];
    if (at < -extent || at >= extent) fail("%s: the index %lld is outside of 0 to %lld.", what, (long long)at, (long long)extent - 1);
    found[i] = at < 0 ? at + extent : at;
  }
  return found;
}
inline bool op_take(Call& call) {
  const Value& a = call.in[0];
  const int axis = axis_of(call.integer(0), a);
  const std::vector<int64_t> at = indices_of(call.in[1], a.shape[axis], "take");
  Shape s;
  for (int i = 0; i < axis; ++i) s.size[s.rank++] = a.shape[i];
  if (a.rank - 1 + call.in[1].rank > MAX_RANK) fail("take: the result has more than %d axes.", MAX_RANK);
  for (int i = 0; i < call.in[1].rank; ++i) s.size[s.rank++] = call.in[1].shape[i];
  for (int i = axis + 1; i < a.rank; ++i) s.size[s.rank++] = a.shape[i];
  int64_t outer = 1, inner = item_bytes(a.dtype);
  for (int i = 0; i < axis; ++i) outer *= a.shape[i];
  for (int i = axis + 1; i < a.rank; ++i) inner *= a.shape[i];
  if (outer == 1 && at.size() == 1) {  // one slice: a view
    Value v = std::move(call.in[0]);
    v.data<char>();
    v.offset += at[0] * inner;
    v.rank = s.rank;
    memcpy(v.shape, s.size, sizeof v.shape);
    call.out[0] = std::move(v);
    return true;
  }
  Value v = make(a.dtype, s);
  char* z = v.data<char>();
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i : at) memcpy(z, a.data<char>() + (o * a.shape[axis] + i) * inner, (size_t)inner), z += inner;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_take_along(Call& call) {
  const Value &a = call.in[0], &b = call.in[1];
  const int axis = axis_of(call.integer(0), a);
  if (a.rank != b.rank) fail("take_along: the ranks differ.");
  const std::vector<int64_t> at = indices_of(b, a.shape[axis], "take_along");
  Shape s = shape_of(a);
  s.size[axis] = b.shape[axis];
  for (int i = 0; i < a.rank; ++i)
    if (i != axis && b.shape[i] != 1 && b.shape[i] != a.shape[i]) fail("take_along: the indices do not fit axis %d.", i);
  Steps from = strides(a), index = steps_of(b, s);
  const int64_t step = from.by[axis];
  from.by[axis] = 0;
  Value v = make(a.dtype, s);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>();
    T* z = v.data<T>();
    each<2>(s, {from, index}, [&](int64_t i, const int64_t* o) { z[i] = x[o[0] + at[(size_t)o[1]] * step]; });
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_scatter(Call& call) {
  const int axis = axis_of(call.integer(0), call.in[0]);
  const std::vector<int64_t> at = indices_of(call.in[1], call.in[0].shape[axis], "scatter");
  const Value& updates = call.in[2];
  Value v = std::move(call.in[0]);
  updates.expect(v.dtype);
  bool fits = updates.rank == v.rank && call.in[1].rank == 1;
  for (int i = 0; fits && i < v.rank; ++i) fits = updates.shape[i] == (i == axis ? (int64_t)at.size() : v.shape[i]);
  if (!fits) fail("scatter: the updates do not fit.");
  own_tensor(v);
  int64_t outer = 1, inner = item_bytes(v.dtype);
  for (int i = 0; i < axis; ++i) outer *= v.shape[i];
  for (int i = axis + 1; i < v.rank; ++i) inner *= v.shape[i];
  const char* x = updates.data<char>();
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i : at) memcpy(v.data<char>() + (o * v.shape[axis] + i) * inner, x, (size_t)inner), x += inner;
  call.out[0] = std::move(v);
  return true;
}

// ---- reductions ----
template <class F> inline bool reduce(Call& call, F f, bool sum) {
  const Value& a = call.in[0];
  const std::vector<int64_t> axes = call.list(0);
  const bool keep = call.integer(1);
  bool gone[MAX_RANK] = {};
  for (int64_t axis : axes) gone[axis_of(axis, a)] = true;
  Shape s, whole = shape_of(a), reduced;
  Steps to = {};
  int64_t step = 1;
  for (int i = a.rank - 1; i >= 0; --i)
    if (!gone[i]) to.by[i] = step, step *= a.shape[i];
  for (int i = 0; i < a.rank; ++i) {
    if (!gone[i]) s.size[s.rank++] = a.shape[i];
    else if (keep) s.size[s.rank++] = 1;
    if (gone[i]) reduced.size[reduced.rank++] = a.shape[i];
  }
  if (!sum && !reduced.elements() && s.elements()) fail("the largest or smallest of no elements was asked for.");
  Value v = make(a.dtype, s);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>();
    T* z = v.data<T>();
    const int64_t n = v.elements();
    if constexpr (std::is_same_v<T, float>) {
      if (sum) {  // in double: the order of additions then hardly matters
        std::vector<double> total((size_t)n, 0.0);
        each<1>(whole, {to}, [&](int64_t i, const int64_t* o) { total[(size_t)o[0]] += (double)x[i]; });
        for (int64_t i = 0; i < n; ++i) z[i] = (float)total[(size_t)i];
        return;
      }
    }
    std::vector<uint8_t> begun((size_t)n, 0);
    if (sum) std::fill(z, z + n, (T)0), std::fill(begun.begin(), begun.end(), 1);
    each<1>(whole, {to}, [&](int64_t i, const int64_t* o) {
      z[o[0]] = begun[(size_t)o[0]] ? (T)f(z[o[0]], x[i]) : x[i];
      begun[(size_t)o[0]] = 1;
    });
  });
  call.out[0] = std::move(v);
  return true;
}
// f(elements along the axis, their step, result) for every line of the axis.
template <class F> inline void lines(const Value& a, int axis, F f) {
  int64_t outer = 1, inner = 1;
  for (int i = 0; i < axis; ++i) outer *= a.shape[i];
  for (int i = axis + 1; i < a.rank; ++i) inner *= a.shape[i];
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t i = 0; i < inner; ++i) f(o * a.shape[axis] * inner + i, inner, o * inner + i);
}
inline bool op_argmax(Call& call) {
  const Value& a = call.in[0];
  const int axis = axis_of(call.integer(0), a);
  const bool keep = call.integer(1);
  const int64_t n = a.shape[axis];
  if (!n) fail("argmax of an empty axis.");
  Shape s;
  for (int i = 0; i < a.rank; ++i)
    if (i != axis) s.size[s.rank++] = a.shape[i];
    else if (keep) s.size[s.rank++] = 1;
  Value v = make(I64, s);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>();
    lines(a, axis, [&](int64_t at, int64_t step, int64_t line) {
      int64_t best = 0;
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          if (isnan(x[at + i * step])) { best = i; break; }  // as numpy: the first NaN
        }
        if (x[at + i * step] > x[at + best * step]) best = i;
      }
      v.i64()[line] = best;
    });
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_cumsum(Call& call) {
  const Value& a = call.in[0];
  const int axis = axis_of(call.integer(0), a);
  Value v = tensor_like(a.dtype, a);
  by_type(a.dtype, [&](auto* p) {
    using T = Of<decltype(p)>;
    const T* x = a.data<T>();
    T* z = v.data<T>();
    lines(a, axis, [&](int64_t at, int64_t step, int64_t) {
      T total = 0;
      for (int64_t i = 0; i < a.shape[axis]; ++i) total = add<T>(total, x[at + i * step]), z[at + i * step] = total;
    });
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_softmax(Call& call) {
  const Value& a = call.in[0];
  const int axis = axis_of(call.integer(0), a);
  Value v = tensor_like(F32, a);
  const float* x = a.f32();
  float* z = v.f32();
  const int64_t n = a.shape[axis];
  lines(a, axis, [&](int64_t at, int64_t step, int64_t) {
    float most = -INFINITY;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, x[at + i * step]);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += (double)(z[at + i * step] = expf(x[at + i * step] - most));
    for (int64_t i = 0; i < n; ++i) z[at + i * step] = (float)(z[at + i * step] / total);
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_matmul(Call& call) {
  const Value &a = call.in[0], &b = call.in[1];
  if (a.rank < 2 || b.rank < 2 || a.shape[a.rank - 1] != b.shape[b.rank - 2]) fail("matmul: the sizes do not fit.");
  const int64_t m = a.shape[a.rank - 2], k = a.shape[a.rank - 1], n = b.shape[b.rank - 1];
  Shape outer_a = shape_of(a), outer_b = shape_of(b);
  outer_a.rank -= 2, outer_b.rank -= 2;
  Shape s = broadcast(outer_a, outer_b);
  Value x = a, y = b;  // as stacks of matrices: offsets in units of one
  x.rank -= 2, y.rank -= 2;
  const Steps steps[2] = {steps_of(x, s), steps_of(y, s)};
  Shape whole = s;
  if (s.rank + 2 > MAX_RANK) fail("matmul: more than %d axes.", MAX_RANK);
  whole.size[whole.rank++] = m, whole.size[whole.rank++] = n;
  Value v = make(F32, whole);
  const float *p = a.f32(), *q = b.f32();
  float* z = v.f32();
  each<2>(s, steps, [&](int64_t i, const int64_t* o) {
    const float *u = p + o[0] * m * k, *w = q + o[1] * k * n;
    float* r = z + i * m * n;
    std::fill(r, r + m * n, 0.0f);
    for (int64_t row = 0; row < m; ++row)
      for (int64_t d = 0; d < k; ++d)
        for (int64_t column = 0; column < n; ++column) r[row * n + column] += u[row * k + d] * w[d * n + column];
  });
  call.out[0] = std::move(v);
  return true;
}

#define NUMBERS(NAME, EXPRESSION) inline bool NAME(Call& call) { return numbers(call, [](auto a, auto b) { return EXPRESSION; }); }
#define COMPARE(NAME, EXPRESSION) inline bool NAME(Call& call) { return compare(call, [](auto a, auto b) { return EXPRESSION; }); }
#define FLAGS(NAME, EXPRESSION) inline bool NAME(Call& call) { return flags2(call, [](uint8_t a, uint8_t b) { return (uint8_t)(EXPRESSION); }); }
#define FLOATS(NAME, EXPRESSION) inline bool NAME(Call& call) { return floats1(call, [](float x) { return EXPRESSION; }); }
#define ANY(NAME, EXPRESSION) inline bool NAME(Call& call) { return unary(call, [](auto x) { return EXPRESSION; }); }
NUMBERS(op_add, add(a, b))
NUMBERS(op_sub, sub(a, b))
NUMBERS(op_mul, mul(a, b))
NUMBERS(op_floordiv, floor_divide(a, b))
NUMBERS(op_mod, modulo(a, b))
NUMBERS(op_maximum, a != a ? a : b != b ? b : a > b ? a : b)
NUMBERS(op_minimum, a != a ? a : b != b ? b : a < b ? a : b)
COMPARE(op_eq, a == b)
COMPARE(op_ne, a != b)
COMPARE(op_lt, a < b)
COMPARE(op_le, a <= b)
COMPARE(op_gt, a > b)
COMPARE(op_ge, a >= b)
FLAGS(op_logical_and, a && b)
FLAGS(op_logical_or, a || b)
inline bool op_logical_not(Call& call) { return call.in[0].expect(BOOL), unary(call, [](auto x) { return !x; }); }
inline bool op_div(Call& call) { return floats2(call, [](float a, float b) { return a / b; }); }
inline bool op_pow(Call& call) { return floats2(call, [](float a, float b) { return powf(a, b); }); }
ANY(op_neg, sub(decltype(x)(0), x) == 0 && x == 0 ? decltype(x)(-x) : decltype(x)(sub(decltype(x)(0), x)))
ANY(op_abs, x < 0 ? sub(decltype(x)(0), x) : x == 0 ? decltype(x)(0) : x)
ANY(op_sign, x > 0 ? decltype(x)(1) : x < 0 ? decltype(x)(-1) : x)
FLOATS(op_exp, expf(x))
FLOATS(op_log, logf(x))
FLOATS(op_sqrt, sqrtf(x))
FLOATS(op_rsqrt, 1.0f / sqrtf(x))
FLOATS(op_reciprocal, 1.0f / x)
FLOATS(op_sin, sinf(x))
FLOATS(op_cos, cosf(x))
FLOATS(op_tanh, tanhf(x))
FLOATS(op_erf, erff(x))
FLOATS(op_sigmoid, 1.0f / (1.0f + expf(-x)))
FLOATS(op_floor, floorf(x))
FLOATS(op_ceil, ceilf(x))
FLOATS(op_round, rintf(x))
#undef NUMBERS
#undef COMPARE
#undef FLAGS
#undef FLOATS
#undef ANY
inline bool op_reduce_sum(Call& call) { return reduce(call, [](auto a, auto b) { return add(a, b); }, true); }
inline bool op_reduce_max(Call& call) { return reduce(call, [](auto a, auto b) { return a != a ? a : b != b ? b : a > b ? a : b; }, false); }
inline bool op_reduce_min(Call& call) { return reduce(call, [](auto a, auto b) { return a != a ? a : b != b ? b : a < b ? a : b; }, false); }

}  // namespace tensors

inline const OperationEntry TENSORS_OPERATIONS[] = {
    {"constant", tensors::op_constant, 0, 1, 2},     {"array", tensors::op_array, 0, 1, 2},
    {"iota", tensors::op_iota, 0, 1, 2},             {"size_value", tensors::op_size_value, 0, 1, 2},
    {"cast", tensors::op_cast, 1, 1, 1},             {"where", tensors::op_where, 3, 1, 0},
    {"add", tensors::op_add, 2, 1, 0},               {"sub", tensors::op_sub, 2, 1, 0},
    {"mul", tensors::op_mul, 2, 1, 0},               {"div", tensors::op_div, 2, 1, 0},
    {"floordiv", tensors::op_floordiv, 2, 1, 0},     {"mod", tensors::op_mod, 2, 1, 0},
    {"pow", tensors::op_pow, 2, 1, 0},               {"maximum", tensors::op_maximum, 2, 1, 0},
    {"minimum", tensors::op_minimum, 2, 1, 0},       {"eq", tensors::op_eq, 2, 1, 0},
    {"ne", tensors::op_ne, 2, 1, 0},                 {"lt", tensors::op_lt, 2, 1, 0},
    {"le", tensors::op_le, 2, 1, 0},                 {"gt", tensors::op_gt, 2, 1, 0},
    {"ge", tensors::op_ge, 2, 1, 0},                 {"logical_and", tensors::op_logical_and, 2, 1, 0},
    {"logical_or", tensors::op_logical_or, 2, 1, 0}, {"logical_not", tensors::op_logical_not, 1, 1, 0},
    {"neg", tensors::op_neg, 1, 1, 0},               {"abs", tensors::op_abs, 1, 1, 0},
    {"sign", tensors::op_sign, 1, 1, 0},             {"exp", tensors::op_exp, 1, 1, 0},
    {"log", tensors::op_log, 1, 1, 0},               {"sqrt", tensors::op_sqrt, 1, 1, 0},
    {"rsqrt", tensors::op_rsqrt, 1, 1, 0},           {"reciprocal", tensors::op_reciprocal, 1, 1, 0},
    {"sin", tensors::op_sin, 1, 1, 0},               {"cos", tensors::op_cos, 1, 1, 0},
    {"tanh", tensors::op_tanh, 1, 1, 0},             {"erf", tensors::op_erf, 1, 1, 0},
    {"sigmoid", tensors::op_sigmoid, 1, 1, 0},       {"floor", tensors::op_floor, 1, 1, 0},
    {"ceil", tensors::op_ceil, 1, 1, 0},             {"round", tensors::op_round, 1, 1, 0},
    {"reshape", tensors::op_reshape, 1, 1, 1},       {"transpose", tensors::op_transpose, 1, 1, 1},
    {"broadcast_to", tensors::op_broadcast_to, 1, 1, 1}, {"slice", tensors::op_slice, 1, 1, 4},
    {"concat", tensors::op_concat, -1, 1, 1},        {"pad", tensors::op_pad, 1, 1, 3},
    {"take", tensors::op_take, 2, 1, 1},             {"take_along", tensors::op_take_along, 2, 1, 1},
    {"scatter", tensors::op_scatter, 3, 1, 1},       {"reduce_sum", tensors::op_reduce_sum, 1, 1, 2},
    {"reduce_max", tensors::op_reduce_max, 1, 1, 2}, {"reduce_min", tensors::op_reduce_min, 1, 1, 2},
    {"argmax", tensors::op_argmax, 1, 1, 2},         {"cumsum", tensors::op_cumsum, 1, 1, 1},
    {"softmax", tensors::op_softmax, 1, 1, 1},       {"matmul", tensors::op_matmul, 2, 1, 0},
};

}  // namespace stemma
