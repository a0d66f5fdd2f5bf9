// An operation as MindSpore calls it: what it is given, checked, and what MindSpore asks before.
#pragma once
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#include "vector.h"
#include "workspace.h"

namespace mindspore {
class AotExtra;
}
typedef std::vector<int64_t> Shape;
typedef std::vector<Shape> Shapes;
typedef std::vector<int> Types;  // MindSpore's TypeId

namespace {

constexpr int FLOAT32 = 43;        // TypeId of float32
constexpr int64_t SERIAL = 16384;  // elements below which threads cost more than they bring

enum Failure { NONE = 0, UNKNOWN_TYPE = 1, OUT_OF_RANGE = 2, OUT_OF_MEMORY = 3, WRONG_SHAPE = 4 };  // what an operation returns
constexpr int64_t MOST = int64_t(1) << 48;  // elements of one tensor: their bytes can still be counted
constexpr int64_t ANY = -1;

// What a graph gives an operation.  Graphs come from strangers: nothing is read or written before it was checked.
struct Arguments {
  int count;
  void** data;
  int* ranks;
  int64_t** shapes;
  const char** types;
  // Whether argument i is there, with this type ("" for float32 or bfloat16) and shape; ANY is any size.
  bool has(int i, const char* type, std::initializer_list<int64_t> shape) const {
    if (i >= count || !ranks || !shapes || !shapes[i] || !types || !types[i]) return false;
    if (ranks[i] != int(shape.size())) return false;
    int64_t most = MOST, axis = 0;
    bool empty = false;
    for (int64_t wanted : shape) {
      const int64_t n = shapes[i][axis++];
      if (n < 0 || n > most || (wanted != ANY && n != wanted)) return false;
      most /= std::max(n, int64_t(1));
      empty |= n == 0;
    }
    if (*type ? !is(i, type) : !is(i, "float32") && !is(i, "bfloat16")) return false;
    return empty || (data && data[i]);
  }
  template <class V>
  V* at(int i) const { return static_cast<V*>(data[i]); }
  int64_t size(int i, int axis) const { return shapes[i][axis < 0 ? ranks[i] + axis : axis]; }
  bool is(int i, const char* type) const { return strcmp(types[i], type) == 0; }
};

}  // namespace

#define OPERATION(name)                                                                                 \
  static int run##name(const Arguments& a);                                                             \
  extern "C" int name(int count, void** data, int* ranks, int64_t** shapes, const char** types, void*, void*) { \
    try {                                                                                               \
      return run##name({count, data, ranks, shapes, types});                                            \
    } catch (const std::bad_alloc&) {                                                                   \
      return OUT_OF_MEMORY;                                                                             \
    }                                                                                                   \
  }                                                                                                     \
  static int run##name(const Arguments& a)
// What MindSpore asks before it calls: shapes of the outputs, -1 while they are dynamic, and their types.
#define SHAPE(name)                                                               \
  extern "C" int name##InferType(Types, mindspore::AotExtra*) { return FLOAT32; } \
  extern "C" Shape name##InferShape(int* ranks, int64_t** shapes, mindspore::AotExtra*)
// A dimension of what a graph gives, -1 where it gives none.
static inline int64_t size_of(const int* ranks, int64_t** shapes, int i, int axis) {
  return axis < ranks[i] ? std::max(shapes[i][axis], int64_t(-1)) : -1;
}
#define SIZE(i, axis) size_of(ranks, shapes, i, axis)
#define SHAPES(name, count)                                                                       \
  extern "C" Types name##InferType(Types, mindspore::AotExtra*) { return Types(count, FLOAT32); } \
  extern "C" Shapes name##InferShape(int* ranks, int64_t** shapes, mindspore::AotExtra*)
