// Operations that move elements, and reductions. Their meaning is that of ir/ops/{shape,reduce,linear}.py.
#pragma once
#include "tensors.hpp"

namespace stemma {

inline void copy_items(char* to, const char* from, int64_t count, int64_t item) { memcpy(to, from, (size_t)(count * item)); }

// A tensor with the given axes from elements at `from` with these strides (in elements).
inline Value gathered(const Value& x, int32_t rank, const int64_t* shape, const int64_t* strides, int64_t from = 0) {
  Value v = shaped(x.dtype, rank, shape);
  const int64_t elements = v.elements(), n = rank ? shape[rank - 1] : 1, step = rank ? strides[rank - 1] : 1;
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* source = x.data<T>() + from;
    T* out = v.data<T>();
    int64_t at[MAX_RANK] = {};
    for (int64_t done = 0; done < elements; done += n) {
      int64_t p = 0;
      for (int i = 0; i < rank - 1; ++i) p += at[i] * strides[i];
      if (step == 1) memcpy(out + done, source + p, (size_t)n * sizeof(T));
      else for (int64_t j = 0; j < n; ++j) out[done + j] = source[p + j * step];
      for (int i = rank - 2; i >= 0 && ++at[i] == shape[i]; --i) at[i] = 0;
    }
  });
  return v;
}
inline void strides_of(const Value& v, int64_t (&out)[MAX_RANK]) {
  int64_t stride = 1;
  for (int i = v.rank - 1; i >= 0; --i) out[i] = stride, stride *= v.shape[i];
}
inline Value transposed(const Value& x, const std::vector<int64_t>& axes) {
  int64_t strides[MAX_RANK] = {}, shape[MAX_RANK], moved[MAX_RANK];
  strides_of(x, strides);
  bool seen[MAX_RANK] = {};
  if ((int32_t)axes.size() != x.rank) fail("the program is damaged: axes are wrong");
  for (size_t i = 0; i < axes.size(); ++i) {
    if (axes[i] < 0 || axes[i] >= x.rank || seen[axes[i]]) fail("the program is damaged: axes are wrong");
    seen[axes[i]] = true;
    shape[i] = x.shape[axes[i]], moved[i] = strides[axes[i]];
  }
  return gathered(x, x.rank, shape, moved);
}

inline bool op_reshape(Call& call) {
  Value v = std::move(call.in[0]);
  const std::vector<int64_t> shape = call.list(0);
  const int64_t elements = v.elements();
  v.data<char>();
  if (shape.size() > MAX_RANK) fail("the program is damaged: a value has too many axes");
  v.rank = (int32_t)shape.size();
  std::copy(shape.begin(), shape.end(), v.shape);
  if (std::any_of(shape.begin(), shape.end(), [](int64_t s) { return s < 0; }) || v.elements() != elements)
    fail("reshape: %lld elements do not fit the new shape", (long long)elements);
  call.out[0] = std::move(v);
  return true;
}
inline bool op_broadcast_to(Call& call) {
  const std::vector<int64_t> shape = call.list(0);
  const Value& x = call.in[0];
  if (shape.size() > MAX_RANK || (int32_t)shape.size() < x.rank) fail("the program is damaged: a shape is wrong");
  int64_t own[MAX_RANK] = {}, strides[MAX_RANK] = {};
  strides_of(x, own);
  const int32_t rank = (int32_t)shape.size(), added = rank - x.rank;
  for (int i = 0; i < x.rank; ++i) {
    if (x.shape[i] != 1 && x.shape[i] != shape[(size_t)(added + i)]) fail("broadcast_to: the shapes do not fit");
    strides[added + i] = x.shape[i] == 1 ? 0 : own[i];
  }
  call.out[0] = gathered(x, rank, shape.data(), strides);
  return true;
}
inline bool op_transpose(Call& call) {
  call.out[0] = transposed(call.in[0], call.list(0));
  return true;
}
inline bool op_slice(Call& call) {
  Value& x = call.in[0];
  const int32_t axis = (int32_t)axis_attribute(call, 0, x.rank);
  const int64_t start = call.size(1), stop = call.size(2), step = call.size(3);
  if (start < 0 || stop < start || stop > x.shape[axis] || step < 1)
    fail("slice: %lld:%lld:%lld of an axis of %lld", (long long)start, (long long)stop, (long long)step, (long long)x.shape[axis]);
  const int64_t n = (stop - start + step - 1) / step, inner = extent(x, axis + 1, x.rank);
  if (step == 1 && extent(x, 0, axis) == 1) {  // a view
    x.data<char>();
    Value v = std::move(x);
    v.shape[axis] = n;
    v.offset += start * inner * item_bytes(v.dtype);
    call.out[0] = std::move(v);
    return true;
  }
  int64_t strides[MAX_RANK], shape[MAX_RANK];
  strides_of(x, strides);
  memcpy(shape, x.shape, sizeof shape);
  const int64_t from = start * strides[axis];
  shape[axis] = n;
  strides[axis] *= step;
  call.out[0] = gathered(x, x.rank, shape, strides, n ? from : 0);
  return true;
}
inline bool op_concat(Call& call) {
  if (call.count() < 1) fail("the program is damaged: an input is missing");
  const Value& first = call.in[0];
  const int32_t axis = (int32_t)axis_attribute(call, 0, first.rank);
  int64_t shape[MAX_RANK], total = 0;
  memcpy(shape, first.shape, sizeof shape);
  for (int64_t k = 0; k < call.count(); ++k) {
    const Value& x = call.in[k];
    bool fits = x.dtype == first.dtype && x.rank == first.rank;
    for (int i = 0; fits && i < x.rank; ++i) fits = i == axis || x.shape[i] == first.shape[i];
    if (!fits) fail("concat: the shapes do not fit");
    total += x.shape[axis];
  }
  shape[axis] = total;
  Value v = shaped(first.dtype, first.rank, shape);
  const int64_t outer = extent(v, 0, axis), inner = extent(v, axis + 1, v.rank) * item_bytes(v.dtype);
  int64_t before = 0;
  for (int64_t k = 0; k < call.count(); ++k) {
    const Value& x = call.in[k];
    const int64_t part = x.shape[axis] * inner;
    for (int64_t o = 0; o < outer; ++o) copy_items(v.data<char>() + o * total * inner + before, x.data<char>() + o * part, part, 1);
    before += part;
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_pad(Call& call) {
  const Value& x = call.in[0];
  const std::vector<int64_t> low = call.list(0), high = call.list(1);
  int64_t shape[MAX_RANK] = {}, own[MAX_RANK] = {}, strides[MAX_RANK] = {}, from = 0;
  if ((int32_t)low.size() != x.rank || (int32_t)high.size() != x.rank) fail("the program is damaged: amounts to pad are missing");
  for (size_t i = 0; i < low.size(); ++i) {
    if (low[i] < 0 || high[i] < 0) fail("pad: an amount is negative");
    shape[i] = x.shape[i] + low[i] + high[i];
  }
  Value v = shaped(x.dtype, x.rank, shape);
  fill_value(v, call.attribute(2));
  strides_of(x, own), strides_of(v, strides);
  for (int i = 0; i < x.rank; ++i) from += low[(size_t)i] * strides[i];
  const int64_t n = x.rank ? x.shape[x.rank - 1] : 1, item = item_bytes(x.dtype), elements = x.elements();
  int64_t at[MAX_RANK] = {};
  for (int64_t done = 0; done < elements; done += n) {
    int64_t p = from;
    for (int i = 0; i < x.rank - 1; ++i) p += at[i] * strides[i];
    copy_items(v.data<char>() + p * item, x.data<char>() + done * item, n, item);
    for (int i = x.rank - 2; i >= 0 && ++at[i] == x.shape[i]; --i) at[i] = 0;
  }
  call.out[0] = std::move(v);
  return true;
}

// Index i of an i32 or i64 tensor, negative ones counted from the end; an Error outside of the axis.
struct Indices {
  const int32_t* narrow = nullptr;
  const int64_t* wide = nullptr;
  int64_t size;
  const char* what;
  Indices(const Value& v, int64_t axis_size, const char* operation) : size(axis_size), what(operation) {
    if (v.dtype == I32) narrow = v.i32();
    else wide = v.i64();
  }
  int64_t operator[](int64_t i) const {
    const int64_t given = narrow ? narrow[i] : wide[i], index = given < 0 ? given + size : given;
    if (index < 0 || index >= size) fail("%s: the index %lld leaves an axis of %lld", what, (long long)given, (long long)size);
    return index;
  }
};
inline bool op_take(Call& call) {
  const Value &x = call.in[0], &indices = call.in[1];
  const int32_t axis = (int32_t)axis_attribute(call, 0, x.rank);
  const Indices at(indices, x.shape[axis], "take");
  std::vector<int64_t> shape(x.shape, x.shape + axis);
  shape.insert(shape.end(), indices.shape, indices.shape + indices.rank);
  shape.insert(shape.end(), x.shape + axis + 1, x.shape + x.rank);
  Value v = shaped(x.dtype, shape);
  const int64_t n = indices.elements(), outer = extent(x, 0, axis), inner = extent(x, axis + 1, x.rank) * item_bytes(x.dtype),
      size = x.shape[axis];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t index = at[i];
    for (int64_t o = 0; o < outer; ++o)
      copy_items(v.data<char>() + (o * n + i) * inner, x.data<char>() + (o * size + index) * inner, inner, 1);
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_take_along(Call& call) {
  const Value &x = call.in[0], &indices = call.in[1];
  const int32_t axis = (int32_t)axis_attribute(call, 0, x.rank);
  if (indices.rank != x.rank) fail("the program is damaged: numbers of axes differ");
  const Indices index(indices, x.shape[axis], "take_along");
  int64_t shape[MAX_RANK], sx[MAX_RANK], si[MAX_RANK], at[MAX_RANK] = {};
  strides_of(x, sx), strides_of(indices, si);
  for (int i = 0; i < x.rank; ++i) {
    shape[i] = i == axis ? indices.shape[i] : x.shape[i];
    if (i != axis && indices.shape[i] != x.shape[i]) {
      if (indices.shape[i] != 1) fail("take_along: the indices do not fit");
      si[i] = 0;
    }
  }
  Value v = shaped(x.dtype, x.rank, shape);
  const int64_t elements = v.elements(), item = item_bytes(x.dtype);
  for (int64_t done = 0; done < elements; ++done) {
    int64_t from = 0, pi = 0;
    for (int i = 0; i < x.rank; ++i) pi += at[i] * si[i], from += i == axis ? 0 : at[i] * sx[i];
    copy_items(v.data<char>() + done * item, x.data<char>() + (from + index[pi] * sx[axis]) * item, 1, item);
    for (int i = x.rank - 1; i >= 0 && ++at[i] == shape[i]; --i) at[i] = 0;
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_scatter(Call& call) {
  const Value indices = std::move(call.in[1]), updates = std::move(call.in[2]);
  Value v = std::move(own_tensor(call.in[0]));
  const int32_t axis = (int32_t)axis_attribute(call, 0, v.rank);
  const Indices at(indices, v.shape[axis], "scatter");
  const int64_t n = indices.elements(), outer = extent(v, 0, axis), inner = extent(v, axis + 1, v.rank) * item_bytes(v.dtype),
      size = v.shape[axis];
  if (updates.dtype != v.dtype || updates.rank != v.rank || updates.elements() * item_bytes(v.dtype) != outer * n * inner)
    fail("scatter: the updates do not fit");
  const char* from = updates.data<char>();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t index = at[i];
    for (int64_t o = 0; o < outer; ++o)
      copy_items(v.data<char>() + (o * size + index) * inner, from + (o * n + i) * inner, inner, 1);
  }
  call.out[0] = std::move(v);
  return true;
}

// ---- reductions ----
// The input with the reduced axes last, as [rows, n]; the result's shape. Attributes: axes, keepdims.
inline Value reduced_last(Call& call, const std::vector<int64_t>& axes, bool keep, std::vector<int64_t>& shape, int64_t& rows,
    int64_t& n) {
  Value& x = call.in[0];
  bool reduced[MAX_RANK] = {};
  for (int64_t a : axes) {
    if (a < 0 || a >= x.rank || reduced[a]) fail("the program is damaged: an axis is wrong");
    reduced[a] = true;
  }
  std::vector<int64_t> order;
  rows = n = 1;
  for (int i = 0; i < x.rank; ++i) {
    if (!reduced[i]) order.push_back(i), rows *= x.shape[i];
    if (!reduced[i] || keep) shape.push_back(reduced[i] ? 1 : x.shape[i]);
  }
  for (int i = 0; i < x.rank; ++i)
    if (reduced[i]) order.push_back(i), n *= x.shape[i];
  if (std::is_sorted(order.begin(), order.end())) return x.data<char>(), std::move(x);
  return transposed(x, order);
}
// Sums of 1024 numbers in sixteen lanes of f32, those in f64; bits depend on n alone.
inline float sum_row(const float* x, int64_t n) {
  double total = 0;
  for (int64_t block = 0; block < n; block += 1024) {
    const int64_t end = std::min(n, block + 1024);
    float lanes[16] = {};
    int64_t i = block;
    for (; i + 16 <= end; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += x[i + j];
    for (int j = 0; j < 16; ++j) total += (double)lanes[j];
    for (; i < end; ++i) total += (double)x[i];
  }
  return (float)total;
}
template <class T> T sum_row(const T* x, int64_t n) {
  typename Unsigned<T>::type total = 0;
  for (int64_t i = 0; i < n; ++i) total = (typename Unsigned<T>::type)(total + (typename Unsigned<T>::type)x[i]);
  return std::is_same_v<T, uint8_t> ? (T)std::any_of(x, x + n, [](T v) { return v != 0; }) : (T)total;
}
template <class F> bool reduce(Call& call, F row) {
  std::vector<int64_t> shape;
  int64_t rows, n;
  const Value x = reduced_last(call, call.list(0), call.integer(1) != 0, shape, rows, n);
  Value v = shaped(x.dtype, shape);
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < rows; ++i) v.data<T>()[i] = row(x.data<T>() + i * n, n);
  });
  call.out[0] = std::move(v);
  return true;
}
// The best of a row: an earlier element wins unless `better` holds; NaN wins over all. In lanes, for long rows.
template <class T, class F> T best_of(const T* x, int64_t n, F better) {
  if (n < 1) fail("a reduction of nothing has no value");
  const auto pick = [&](T a, T b) { return better(b, a) || b != b ? b : a; };  // a, unless b is better or NaN
  int64_t i = 1;
  T found = x[0];
  if (n >= 32) {
    T lanes[16];
    memcpy(lanes, x, sizeof lanes);
    for (i = 16; i + 16 <= n; i += 16)
      for (int j = 0; j < 16; ++j)
        lanes[j] = lanes[j] != lanes[j] || !(better(x[i + j], lanes[j]) || x[i + j] != x[i + j]) ? lanes[j] : x[i + j];
    found = lanes[0];
    for (int j = 1; j < 16; ++j) found = found != found ? found : pick(found, lanes[j]);
  }
  for (; i < n; ++i) found = found != found ? found : pick(found, x[i]);
  return found;
}
inline bool op_reduce_sum(Call& c) { return reduce(c, [](const auto* x, int64_t n) { return sum_row(x, n); }); }
inline bool op_reduce_max(Call& c) {
  return reduce(c, [](const auto* x, int64_t n) { return best_of(x, n, [](auto a, auto b) { return a > b; }); });
}
inline bool op_reduce_min(Call& c) {
  return reduce(c, [](const auto* x, int64_t n) { return best_of(x, n, [](auto a, auto b) { return a < b; }); });
}
inline bool op_argmax(Call& call) {
  std::vector<int64_t> shape;
  int64_t rows, n;
  const Value x = reduced_last(call, {call.size(0)}, call.integer(1) != 0, shape, rows, n);
  Value v = shaped(I64, shape);
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x.data<T>() + r * n;
      const T most = best_of(row, n, [](T a, T b) { return a > b; });
      int64_t at = 0;
      while (!(row[at] == most || (most != most && row[at] != row[at]))) ++at;
      v.i64()[r] = at;
    }
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_cumsum(Call& call) {
  const int32_t axis = (int32_t)axis_attribute(call, 0, call.in[0].rank);
  Value v = std::move(own_tensor(call.in[0]));
  const int64_t outer = extent(v, 0, axis), inner = extent(v, axis + 1, v.rank), n = v.shape[axis];
  with_number(v.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 1; i < n; ++i) {
        T* row = v.data<T>() + (o * n + i) * inner;
        for (int64_t j = 0; j < inner; ++j) row[j] = wrap_add(row[j], row[j - inner]);
      }
  });
  call.out[0] = std::move(v);
  return true;
}
inline bool op_softmax(Call& call) {
  const int32_t axis = (int32_t)axis_attribute(call, 0, call.in[0].rank);
  call.in[0].f32();
  std::vector<int64_t> order;
  for (int i = 0; i < call.in[0].rank; ++i) order.push_back(i);
  std::swap(order[(size_t)axis], order.back());
  const bool last = axis + 1 == call.in[0].rank;
  Value x = last ? std::move(call.in[0]) : transposed(call.in[0], order);
  const int64_t n = x.shape[x.rank - 1], rows = n ? x.elements() / n : 0;
  Value v = tensor_like(F32, x);
  if (rows) stemma_rows(call.machine.native, ROWS_SOFTMAX, x.f32(), rows, n, v.f32());
  call.out[0] = last ? std::move(v) : transposed(v, order);
  return true;
}
inline bool op_matmul(Call& call) {
  const Value &a = call.in[0], &b = call.in[1];
  if (a.rank < 2 || b.rank < 2) fail("the program is damaged: a matrix has too few axes");
  const int64_t m = a.shape[a.rank - 2], k = a.shape[a.rank - 1], n = b.shape[b.rank - 1];
  if (b.shape[b.rank - 2] != k) fail("matmul: the inner sizes %lld and %lld differ", (long long)k, (long long)b.shape[b.rank - 2]);
  Value batch_a = a, batch_b = b;
  batch_a.rank -= 2, batch_b.rank -= 2;
  const Broadcast batch(batch_a, batch_b);
  int64_t sa[MAX_RANK], sb[MAX_RANK], shape[MAX_RANK];
  batch.strides(batch_a, sa), batch.strides(batch_b, sb);
  memcpy(shape, batch.shape, sizeof shape);
  shape[batch.rank] = m, shape[batch.rank + 1] = n;
  Value v = shaped(F32, batch.rank + 2, shape);
  const float *x = a.f32(), *y = b.f32();
  float* out = v.f32();
  memset(out, 0, (size_t)v.bytes());
  const int last = std::max(batch.rank - 1, 0);
  each_row(batch, sa, sb, [&](int64_t at, int64_t pa, int64_t pb, int64_t count) {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t l = 0; l < k; ++l) {
          float* row = out + ((at + c) * m + i) * n;
          const float s = x[((pa + c * sa[last]) * m + i) * k + l], *t = y + ((pb + c * sb[last]) * k + l) * n;
          for (int64_t j = 0; j < n; ++j) row[j] += s * t[j];
        }
  });
  call.out[0] = std::move(v);
  return true;
}

inline const OperationEntry SHAPES_OPERATIONS[] = {
    {"reshape", op_reshape, 1, 1, 1},       {"broadcast_to", op_broadcast_to, 1, 1, 1}, {"transpose", op_transpose, 1, 1, 1},
    {"slice", op_slice, 1, 1, 4},           {"concat", op_concat, -1, 1, 1},            {"pad", op_pad, 1, 1, 3},
    {"take", op_take, 2, 1, 1},             {"take_along", op_take_along, 2, 1, 1},     {"scatter", op_scatter, 3, 1, 1},
    {"reduce_sum", op_reduce_sum, 1, 1, 2}, {"reduce_max", op_reduce_max, 1, 1, 2},     {"reduce_min", op_reduce_min, 1, 1, 2},
    {"argmax", op_argmax, 1, 1, 2},         {"cumsum", op_cumsum, 1, 1, 1},             {"softmax", op_softmax, 1, 1, 1},
    {"matmul", op_matmul, 2, 1, 0},
};

}  // namespace stemma
