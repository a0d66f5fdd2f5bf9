// Attention of a step's tokens to what is cached of their sequences.
#pragma once
#include "products.h"

// Shapes as of the operation Attend: caches [slots, 1, kv_heads, dim], tables [batch, positions].
struct Cached {
  float *k, *v;
  int64_t slots, kv_heads, dim;
  const int32_t *tables, *contexts, *counts;
  int64_t batch, positions;

  // Arguments from `caches` on: both caches; from `tables` on: tables, context_lens, q_lens.
  static bool fit(const Arguments& a, int caches, int tables) {
    if (!a.has(caches, "float32", {ANY, 1, ANY, ANY}) || !a.has(tables, "int32", {ANY, ANY})) return false;
    if (!a.has(caches + 1, "float32", {a.size(caches, 0), 1, a.size(caches, 2), a.size(caches, 3)})) return false;
    for (int i : {tables + 1, tables + 2})
      if (!a.has(i, "int32", {a.size(tables, 0)})) return false;
    return a.size(caches, 2) > 0 && a.size(caches, 3) > 0;
  }
  Cached(const Arguments& a, int caches, int at) {
    k = a.at<float>(caches), v = a.at<float>(caches + 1);
    slots = a.size(caches, 0), kv_heads = a.size(caches, 2), dim = a.size(caches, 3);
    tables = a.at<int32_t>(at), contexts = a.at<int32_t>(at + 1), counts = a.at<int32_t>(at + 2);
    batch = a.size(at, 0), positions = a.size(at, 1);
  }
  // Whether lengths are those of so many tokens, and all slots that will be read are there.
  HIDDEN bool has(int64_t tokens) const;
  // Rows [tokens, kv_heads * dim] of keys and of values to their slots, which have been looked at.
  HIDDEN void write(const float* keys, const float* values, const int32_t* to, int64_t tokens) const;
};

// out [T, heads * dim] of q [T, heads, dim]: each token attends to its sequence's slots up to its own.
HIDDEN void attend(const float* q, int64_t heads, const Cached& cached, float* out);
