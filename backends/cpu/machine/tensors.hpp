// Array operations on values. Their meaning is that of ir/ops/{elementwise,shape,reduce,linear,core}.py: numpy's broadcasting,
// integers that wrap, negative indices from the end. An index out of range is an Error. f32 stays f32 but for transcendental
// functions and long sums, which pass through f64; nothing depends on the instruction set.
#pragma once
#include "machine.hpp"
#include "reals.hpp"

extern "C" void stemma_rows(void* model, int32_t kind, const float* x, int64_t rows, int64_t n, float* y);

namespace stemma {

enum RowsKind : int32_t { ROWS_EXP, ROWS_LOG, ROWS_SOFTMAX };  // of stemma_rows

inline DType dtype_of(const std::string& name) {
  if (name == "f32") return F32;
  if (name == "i32") return I32;
  if (name == "i64") return I64;
  if (name == "bool") return BOOL;
  fail("the program is damaged: '%s' is no element type of programs", name.substr(0, 32).c_str());
}
// f(T()) for the element type T of a tensor.
template <class F> void with_type(DType t, F f) {
  switch (t) {
    case F32: return f(float());
    case I32: return f(int32_t());
    case I64: return f(int64_t());
    case BOOL: return f(uint8_t());
    default: fail("the program is damaged: a state where a tensor is expected");
  }
}
template <class F> void with_number(DType t, F f) {
  if (t == BOOL) fail("the program is damaged: truth values where numbers are expected");
  with_type(t, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), uint8_t>) f(zero);
  });
}
template <class T> struct Unsigned { using type = T; };
template <> struct Unsigned<int32_t> { using type = uint32_t; };
template <> struct Unsigned<int64_t> { using type = uint64_t; };

inline Value shaped(DType dtype, int32_t rank, const int64_t* shape) {
  Value v;
  v.dtype = dtype;
  v.rank = rank;
  int64_t elements = 1;
  for (int i = 0; i < rank; ++i) {
    v.shape[i] = shape[i];
    if (shape[i] < 0 || (shape[i] && elements > ((int64_t)1 << 38) / shape[i]))
      fail("an array with a size of %lld is too large", (long long)shape[i]);
    elements *= shape[i];
  }
  v.storage = Ref<Storage>(new Storage(v.bytes()));
  return v;
}
inline Value shaped(DType dtype, const std::vector<int64_t>& shape) {
  if (shape.size() > MAX_RANK) fail("the program is damaged: a value has too many axes");
  return shaped(dtype, (int32_t)shape.size(), shape.data());
}
inline int64_t axis_attribute(Call& call, int i, int32_t rank) {
  const int64_t axis = call.size(i);
  if (axis < 0 || axis >= rank) fail("the program is damaged: an axis is wrong");
  return axis;
}
inline int64_t extent(const Value& v, int32_t from, int32_t to) {  // elements of the axes from..to-1
  int64_t n = 1;
  for (int32_t i = from; i < to; ++i) n *= v.shape[i];
  return n;
}

// ---- elementwise ----
struct Broadcast {  // the common shape of some values, and how each is read
  int32_t rank = 0;
  int64_t shape[MAX_RANK] = {1, 1, 1, 1}, elements = 1;
  template <class... V> explicit Broadcast(const V&... values) {
    ((rank = std::max(rank, values.rank)), ...);
    (take(values), ...);
    for (int i = 0; i < rank; ++i) elements *= shape[i];
  }
  void take(const Value& v) {
    for (int i = 0; i < v.rank; ++i) {
      int64_t& size = shape[rank - v.rank + i];
      if (v.shape[i] == 1 || v.shape[i] == size) continue;
      if (size != 1) fail("shapes do not broadcast");
      size = v.shape[i];
    }
  }
  bool whole(const Value& v) const {  // it has every element of the result, in order
    for (int i = 0; i < rank; ++i)
      if (shape[i] != 1 && (i < rank - v.rank || v.shape[i - rank + v.rank] != shape[i])) return false;
    return true;
  }
  void strides(const Value& v, int64_t (&out)[MAX_RANK]) const {  // 0 along repeated axes
    int64_t stride = 1;
    for (int i = MAX_RANK - 1; i >= 0; --i) out[i] = 0;
    for (int i = v.rank - 1; i >= 0; --i) {
      out[rank - v.rank + i] = v.shape[i] == 1 ? 0 : stride;
      stride *= v.shape[i];
    }
  }
};
// out[i] = f(a[i]) in blocks that the compiler makes vectors of; out may be a.
template <class R, class A, class F> void map_row(R* out, const A* a, int64_t n, F f) {
  int64_t i = 0;
  for (R block[16]; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) block[j] = f(a[i + j]);
    memcpy(out + i, block, sizeof block);
  }
  for (; i < n; ++i) out[i] = f(a[i]);
}
template <class R, class A, class B, class F> void map_rows(R* out, const A* a, const B* b, int64_t n, F f) {
  int64_t i = 0;
  for (R block[16]; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) block[j] = f(a[i + j], b[i + j]);
    memcpy(out + i, block, sizeof block);
  }
  for (; i < n; ++i) out[i] = f(a[i], b[i]);
}
// Calls row(offset in the result, offset in a, offset in b, n) for the rows of the last axis; strides of that axis in `step`.
template <class Row> void each_row(const Broadcast& b, const int64_t (&sa)[MAX_RANK], const int64_t (&sb)[MAX_RANK], Row row) {
  const int64_t n = b.rank ? b.shape[b.rank - 1] : 1;
  int64_t at[MAX_RANK] = {};
  for (int64_t done = 0; done < b.elements; done += n) {
    int64_t pa = 0, pb = 0;
    for (int i = 0; i < b.rank - 1; ++i) pa += at[i] * sa[i], pb += at[i] * sb[i];
    row(done, pa, pb, n);
    for (int i = b.rank - 2; i >= 0 && ++at[i] == b.shape[i]; --i) at[i] = 0;
  }
}
// The first input when its memory may be written over, as nobody else sees it; else new memory.
inline Value result_in(Value& a, DType dtype, const Broadcast& b) {
  if (a.storage && a.storage->references == 1 && a.storage->owned && item_bytes(a.dtype) == item_bytes(dtype)
      && a.elements() == b.elements) {
    Value v = std::move(a);
    v.dtype = dtype;
    v.rank = b.rank;
    memcpy(v.shape, b.shape, sizeof v.shape);
    for (int i = b.rank; i < MAX_RANK; ++i) v.shape[i] = 0;
    a = v;
    return v;
  }
  return shaped(dtype, b.rank, b.shape);
}
template <class A, class R, class F> void unary(Call& call, DType dtype, F f) {
  const A* a = call.in[0].data<A>();
  const Broadcast b(call.in[0]);
  Value out = result_in(call.in[0], dtype, b);
  map_row((R*)out.data<char>(), a, b.elements, f);
  call.out[0] = std::move(out);
}
template <class A, class R, class F> void binary(Call& call, DType dtype, F f) {
  const A *x = call.in[0].data<A>(), *y = call.in[1].data<A>();
  const Broadcast b(call.in[0], call.in[1]);
  const bool whole_x = b.whole(call.in[0]), whole_y = b.whole(call.in[1]);
  const int64_t count_x = call.in[0].elements(), count_y = call.in[1].elements();
  int64_t sx[MAX_RANK], sy[MAX_RANK];
  b.strides(call.in[0], sx), b.strides(call.in[1], sy);
  Value v = whole_x ? result_in(call.in[0], dtype, b) : shaped(dtype, b.rank, b.shape);
  R* out = (R*)v.data<char>();
  if (!b.elements) {
  } else if (whole_x && whole_y) {
    map_rows(out, x, y, b.elements, f);
  } else if (whole_x && count_y == 1) {
    const A t = *y;
    map_row(out, x, b.elements, [=](A s) { return f(s, t); });
  } else if (whole_y && count_x == 1) {
    const A s = *x;
    map_row(out, y, b.elements, [=](A t) { return f(s, t); });
  } else {
    const int last = std::max(b.rank - 1, 0);
    each_row(b, sx, sy, [&](int64_t at, int64_t px, int64_t py, int64_t n) {
      if (sx[last] && sy[last]) return map_rows(out + at, x + px, y + py, n, f);
      if (sx[last]) return map_row(out + at, x + px, n, [f, t = y[py]](A s) { return f(s, t); });
      if (sy[last]) return map_row(out + at, y + py, n, [f, s = x[px]](A t) { return f(s, t); });
      std::fill(out + at, out + at + n, f(x[px], y[py]));
    });
  }
  call.out[0] = std::move(v);
}
inline void same_types(Call& call) {
  if (call.in[0].dtype != call.in[1].dtype) fail("the program is damaged: element types differ");
}
template <class F> bool arithmetic(Call& call, F f) {
  same_types(call);
  with_number(call.in[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    binary<T, T>(call, call.in[0].dtype, [f](T a, T b) { return (T)f(a, b); });
  });
  return true;
}
template <class F> bool comparison(Call& call, F f) {
  same_types(call);
  with_type(call.in[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    binary<T, uint8_t>(call, BOOL, [f](T a, T b) { return (uint8_t)f(a, b); });
  });
  return true;
}
template <class F> bool logical(Call& call, F f) {
  call.in[0].flags(), call.in[1].flags();
  binary<uint8_t, uint8_t>(call, BOOL, [f](uint8_t a, uint8_t b) { return (uint8_t)f(a, b); });
  return true;
}
template <class F> bool number(Call& call, F f) {
  const DType t = call.in[0].dtype;
  with_number(t, [&](auto zero) {
    using T = decltype(zero);
    unary<T, T>(call, t, [f](T a) { return (T)f(a); });
  });
  return true;
}
template <class F> bool real(Call& call, F f) {
  call.in[0].f32();
  unary<float, float>(call, F32, f);
  return true;
}
template <class F> bool reals(Call& call, F f) {
  call.in[0].f32(), call.in[1].f32();
  binary<float, float>(call, F32, f);
  return true;
}
inline bool rows_map(Call& call, RowsKind kind) {
  const float* x = call.in[0].f32();
  const Broadcast b(call.in[0]);
  Value v = result_in(call.in[0], F32, b);
  if (b.elements) stemma_rows(call.machine.native, kind, x, 1, b.elements, v.f32());
  call.out[0] = std::move(v);
  return true;
}

template <class T> T wrap_add(T a, T b) { return (T)((typename Unsigned<T>::type)a + (typename Unsigned<T>::type)b); }
template <class T> T wrap_sub(T a, T b) { return (T)((typename Unsigned<T>::type)a - (typename Unsigned<T>::type)b); }
template <class T> T wrap_mul(T a, T b) { return (T)((typename Unsigned<T>::type)a * (typename Unsigned<T>::type)b); }
// numpy's floor_divide and mod: division of integers by 0 gives 0.
template <class T> T floor_divide(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    if (b == 0) return a / b;
    float m = fmodf(a, b), d = (a - m) / b;
    if (m != 0 && (b < 0) != (m < 0)) d -= 1.0f;
    if (d == 0) return copysignf(0.0f, a / b);
    const float f = floorf(d);
    return d - f > 0.5f ? f + 1.0f : f;
  } else {
    if (b == 0) return 0;
    if (b == -1) return wrap_sub<T>(0, a);
    return (T)(a / b - (a % b != 0 && (a < 0) != (b < 0)));
  }
}
template <class T> T modulo(T a, T b) {
  if constexpr (std::is_same_v<T, float>) {
    const float m = fmodf(a, b);
    if (m == 0) return copysignf(0.0f, b);
    return b != 0 && (b < 0) != (m < 0) ? m + b : m;
  } else {
    if (b == 0 || b == -1) return 0;
    const T m = (T)(a % b);
    return m != 0 && (m < 0) != (b < 0) ? (T)(m + b) : m;
  }
}

inline bool op_add(Call& c) { return arithmetic(c, [](auto a, auto b) { return wrap_add(a, b); }); }
inline bool op_sub(Call& c) { return arithmetic(c, [](auto a, auto b) { return wrap_sub(a, b); }); }
inline bool op_mul(Call& c) { return arithmetic(c, [](auto a, auto b) { return wrap_mul(a, b); }); }
inline bool op_div(Call& c) { return reals(c, [](float a, float b) { return a / b; }); }
inline bool op_floordiv(Call& c) { return arithmetic(c, [](auto a, auto b) { return floor_divide(a, b); }); }
inline bool op_mod(Call& c) { return arithmetic(c, [](auto a, auto b) { return modulo(a, b); }); }
inline bool op_pow(Call& c) { return reals(c, [](float a, float b) { return (float)real_pow((double)a, (double)b); }); }
inline bool op_maximum(Call& c) { return arithmetic(c, [](auto a, auto b) { return a >= b || a != a ? a : b; }); }
inline bool op_minimum(Call& c) { return arithmetic(c, [](auto a, auto b) { return a <= b || a != a ? a : b; }); }
inline bool op_eq(Call& c) { return comparison(c, [](auto a, auto b) { return a == b; }); }
inline bool op_ne(Call& c) { return comparison(c, [](auto a, auto b) { return a != b; }); }
inline bool op_lt(Call& c) { return comparison(c, [](auto a, auto b) { return a < b; }); }
inline bool op_le(Call& c) { return comparison(c, [](auto a, auto b) { return a <= b; }); }
inline bool op_gt(Call& c) { return comparison(c, [](auto a, auto b) { return a > b; }); }
inline bool op_ge(Call& c) { return comparison(c, [](auto a, auto b) { return a >= b; }); }
inline bool op_logical_and(Call& c) { return logical(c, [](auto a, auto b) { return a && b; }); }
inline bool op_logical_or(Call& c) { return logical(c, [](auto a, auto b) { return a || b; }); }
inline bool op_logical_not(Call& c) {
  c.in[0].flags();
  unary<uint8_t, uint8_t>(c, BOOL, [](uint8_t a) { return (uint8_t)!a; });
  return true;
}
inline bool op_neg(Call& c) {
  return number(c, [](auto a) {
    if constexpr (std::is_same_v<decltype(a), float>) return -a;
    else return wrap_sub<decltype(a)>(0, a);
  });
}
inline bool op_abs(Call& c) {
  return number(c, [](auto a) {
    if constexpr (std::is_same_v<decltype(a), float>) return fabsf(a);
    else return a < 0 ? wrap_sub<decltype(a)>(0, a) : a;
  });
}
inline bool op_sign(Call& c) { return number(c, [](auto a) { return a > 0 ? decltype(a)(1) : a < 0 ? decltype(a)(-1) : a; }); }
inline bool op_exp(Call& c) { return rows_map(c, ROWS_EXP); }
inline bool op_log(Call& c) { return rows_map(c, ROWS_LOG); }
inline bool op_sqrt(Call& c) { return real(c, [](float a) { return sqrtf(a); }); }
inline bool op_rsqrt(Call& c) { return real(c, [](float a) { return 1.0f / sqrtf(a); }); }
inline bool op_reciprocal(Call& c) { return real(c, [](float a) { return 1.0f / a; }); }
inline bool op_sin(Call& c) { return real(c, [](float a) { return (float)real_sin((double)a); }); }
inline bool op_cos(Call& c) { return real(c, [](float a) { return (float)real_cos((double)a); }); }
inline bool op_tanh(Call& c) { return real(c, [](float a) { return (float)real_tanh((double)a); }); }
inline bool op_erf(Call& c) { return real(c, [](float a) { return (float)real_erf((double)a); }); }
inline bool op_sigmoid(Call& c) { return real(c, [](float a) { return (float)(1.0 / (1.0 + real_exp(-(double)a))); }); }
inline bool op_floor(Call& c) { return real(c, [](float a) { return floorf(a); }); }
inline bool op_ceil(Call& c) { return real(c, [](float a) { return ceilf(a); }); }
inline bool op_round(Call& c) { return real(c, [](float a) { return rintf(a); }); }

inline bool op_where(Call& call) {
  const uint8_t* condition = call.in[0].flags();
  if (call.in[1].dtype != call.in[2].dtype) fail("the program is damaged: element types differ");
  const Broadcast b(call.in[0], call.in[1], call.in[2]);
  int64_t sc[MAX_RANK], sx[MAX_RANK], sy[MAX_RANK];
  b.strides(call.in[0], sc), b.strides(call.in[1], sx), b.strides(call.in[2], sy);
  Value v = shaped(call.in[1].dtype, b.rank, b.shape);
  with_type(v.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = call.in[1].data<T>(), *y = call.in[2].data<T>();
    T* out = v.data<T>();
    int64_t at[MAX_RANK] = {};
    const int last = std::max(b.rank - 1, 0);
    const int64_t n = b.rank ? b.shape[last] : 1, c1 = sc[last], x1 = sx[last], y1 = sy[last];
    for (int64_t done = 0; done < b.elements; done += n) {
      int64_t pc = 0, px = 0, py = 0;
      for (int i = 0; i < b.rank - 1; ++i) pc += at[i] * sc[i], px += at[i] * sx[i], py += at[i] * sy[i];
      for (int64_t j = 0; j < n; ++j) {
        const T s = x[px + j * x1], t = y[py + j * y1];
        out[done + j] = condition[pc + j * c1] ? s : t;
      }
      for (int i = b.rank - 2; i >= 0 && ++at[i] == b.shape[i]; --i) at[i] = 0;
    }
  });
  call.out[0] = std::move(v);
  return true;
}

// Floats to integers truncate; what does not fit gives the lowest integer.
template <class R, class A> R converted(A a) {
  if constexpr (std::is_same_v<R, uint8_t>) return a != 0;
  else if constexpr (std::is_same_v<A, float> && !std::is_same_v<R, float>) {
    const float limit = sizeof(R) == 4 ? 2147483648.0f : 9223372036854775808.0f;
    return a >= -limit && a < limit ? (R)a : std::numeric_limits<R>::min();
  } else return (R)a;
}
inline bool op_cast(Call& call) {
  const DType to = dtype_of(call.text(0));
  if (to == call.in[0].dtype) return call.out[0] = std::move(call.in[0]), true;
  with_type(call.in[0].dtype, [&](auto from) {
    with_type(to, [&](auto result) {
      using A = decltype(from);
      using R = decltype(result);
      unary<A, R>(call, to, [](A a) { return converted<R>(a); });
    });
  });
  return true;
}

// ---- leaves ----
inline void fill_value(Value& v, const Attribute& a) {
  with_type(v.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T value = a.kind == Attribute::FLOAT ? converted<T>((float)a.number) : (T)a.integer;
    std::fill(v.data<T>(), v.data<T>() + v.elements(), value);
  });
}
inline bool op_constant(Call& call) {
  call.out[0] = tensor(dtype_of(call.text(1)), {});
  fill_value(call.out[0], call.attribute(0));
  return true;
}
inline bool op_array(Call& call) {
  const std::vector<Attribute>& items = call.attribute(0).items;
  Value v = tensor(dtype_of(call.text(1)), {1}), all = tensor(v.dtype, {(int64_t)items.size()});
  for (size_t i = 0; i < items.size(); ++i) {
    fill_value(v, items[i]);
    memcpy(all.data<char>() + (int64_t)i * item_bytes(v.dtype), v.data<char>(), (size_t)item_bytes(v.dtype));
  }
  call.out[0] = std::move(all);
  return true;
}
inline bool op_size_value(Call& call) {
  Attribute a;
  a.integer = call.size(0);
  a.kind = Attribute::INT;
  call.out[0] = tensor(dtype_of(call.text(1)), {});
  fill_value(call.out[0], a);
  return true;
}
inline bool op_iota(Call& call) {
  Value v = shaped(dtype_of(call.text(1)), {call.size(0)});
  with_type(v.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < v.shape[0]; ++i) v.data<T>()[i] = converted<T>(i);
  });
  call.out[0] = std::move(v);
  return true;
}

inline const OperationEntry TENSORS_OPERATIONS[] = {
    {"add", op_add, 2, 1, 0}, {"sub", op_sub, 2, 1, 0}, {"mul", op_mul, 2, 1, 0}, {"div", op_div, 2, 1, 0},
    {"floordiv", op_floordiv, 2, 1, 0}, {"mod", op_mod, 2, 1, 0}, {"pow", op_pow, 2, 1, 0},
    {"maximum", op_maximum, 2, 1, 0}, {"minimum", op_minimum, 2, 1, 0}, {"eq", op_eq, 2, 1, 0}, {"ne", op_ne, 2, 1, 0},
    {"lt", op_lt, 2, 1, 0}, {"le", op_le, 2, 1, 0}, {"gt", op_gt, 2, 1, 0}, {"ge", op_ge, 2, 1, 0},
    {"logical_and", op_logical_and, 2, 1, 0}, {"logical_or", op_logical_or, 2, 1, 0}, {"logical_not", op_logical_not, 1, 1, 0},
    {"neg", op_neg, 1, 1, 0}, {"abs", op_abs, 1, 1, 0}, {"sign", op_sign, 1, 1, 0}, {"exp", op_exp, 1, 1, 0},
    {"log", op_log, 1, 1, 0}, {"sqrt", op_sqrt, 1, 1, 0}, {"rsqrt", op_rsqrt, 1, 1, 0}, {"reciprocal", op_reciprocal, 1, 1, 0},
    {"sin", op_sin, 1, 1, 0}, {"cos", op_cos, 1, 1, 0}, {"tanh", op_tanh, 1, 1, 0}, {"erf", op_erf, 1, 1, 0},
    {"sigmoid", op_sigmoid, 1, 1, 0}, {"floor", op_floor, 1, 1, 0}, {"ceil", op_ceil, 1, 1, 0}, {"round", op_round, 1, 1, 0},
    {"where", op_where, 3, 1, 0}, {"cast", op_cast, 1, 1, 1}, {"constant", op_constant, 0, 1, 2}, {"array", op_array, 0, 1, 2},
    {"size_value", op_size_value, 0, 1, 2}, {"iota", op_iota, 0, 1, 2},
};

}  // namespace stemma
