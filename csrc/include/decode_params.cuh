// Arguments of the decode kernels, and which part of the problem a block works on.
#pragma once

#include "platform.cuh"

namespace emokernels {

inline constexpr int kRoles = 6;
inline constexpr int kDecodeThreads = 128;
inline constexpr int kMaxSplits = 128;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

enum class MaskKind : int { none = 0, boolean = 1, f32 = 2, f16 = 3, bf16 = 4 };

// One attention problem with few queries. Strides count elements; a stride of 0 shares a row. Absent tensors are null.
struct DecodeParams {
  const void* q;               // [B, H, N, D]
  const void* k;               // [B, Hkv, K, D]
  const void* v;               // [B, Hkv, K, D]
  const uint8_t* roles;        // [B|1, K], present when a table is
  const uint8_t* query_roles;  // [B|1, N]
  const float* bias;           // [B|1, H, 6, 6]
  const float* factor;
  const float* magnitude;
  const float* gain;
  const void* mask;            // [B|1, 1|H, N, K], true = attend, or added to the logits
  const int32_t* lengths;      // [B|1], the number of keys that exist yet; K when null
  void* z;                     // [B, H, N, D]
  float* lse;                  // [B, H, N]
  float* partial_z;            // [splits, B, H, N, D] contiguous, when splits > 1
  float* partial_lse;          // [splits, B, H, N]
  int64_t q_stride[3];         // batch, head, query; the last dimension is contiguous
  int64_t z_stride[3];
  int64_t k_stride[2];         // batch, head
  int64_t v_stride[2];
  int64_t mask_stride[3];      // batch, head, query
  int64_t roles_stride;
  int64_t query_roles_stride;
  int64_t bias_stride;  // of the tables' batch dimension
  int64_t factor_stride;
  int64_t magnitude_stride;
  int64_t gain_stride;
  int32_t k_step;  // bytes from one key to the next
  int32_t v_step;
  int32_t mask_step;
  int32_t lengths_stride;
  int32_t batch;
  int32_t heads;
  int32_t key_heads;
  int32_t n;
  int32_t keys;
  int32_t dim;
  int32_t splits;
  int32_t causal;
  int32_t window;  // 0: none
  MaskKind mask_kind;
  Dtype dtype;
  int32_t aligned;  // k and v can be read 16 bytes at a time
  float scale;
  float softcap;     // 0: none
  float mask_floor;  // additive values up to this one hide a key

  bool routed() const { return bias || factor || magnitude || gain; }
};

// What one block computes: a tile of the rows (query heads x queries) of one key head, over one split of the keys.
struct Place {
  int batch;
  int key_head;
  int tile;
  int split;

  Place() = default;
  EMO_DEVICE Place(const DecodeParams& p, int block, int rows_per_tile) {
    // Tiles of the same keys are neighbours, so that all but one find K and V in the cache.
    const int tiles = ceil_div(p.heads / p.key_heads * p.n, rows_per_tile);
    tile = block % tiles;
    block /= tiles;
    split = block % p.splits;
    block /= p.splits;
    key_head = block % p.key_heads;
    batch = block / p.key_heads;
  }
};

// Row `index` of a key head: query heads of the group one after the other, each with its N queries.
struct Row {
  bool exists;
  int head;
  int query;

  EMO_DEVICE Row(const DecodeParams& p, const Place& at, int index) {
    exists = index < p.heads / p.key_heads * p.n;
    head = exists ? at.key_head * (p.heads / p.key_heads) + index / p.n : 0;
    query = exists ? index % p.n : 0;
  }

  EMO_DEVICE int64_t output(const DecodeParams& p, const Place& at) const {
    return (int64_t(at.batch) * p.heads + head) * p.n + query;
  }
};

// The keys that exist yet for a batch row; the last query stands at the last of them.
struct Sequence {
  int keys;
  int first_position;  // of query 0

  EMO_DEVICE Sequence(const DecodeParams& p, int batch) {
    keys = p.keys;
    if (p.lengths != nullptr) {
      const int length = p.lengths[int64_t(batch) * p.lengths_stride];
      keys = length < 0 ? 0 : length < p.keys ? length : p.keys;
    }
    first_position = keys - p.n;
  }

  // Keys before this one are outside the window of the query.
  EMO_DEVICE int first_key(const DecodeParams& p, int query) const {
    return p.window > 0 ? first_position + query - p.window + 1 : 0;
  }
  // Keys from this one on are hidden from the query.
  EMO_DEVICE int end_key(const DecodeParams& p, int query) const {
    return p.causal ? first_position + query + 1 : keys;
  }
};

// The keys [begin, end) of a split. Cut on the device from the keys that any query sees, so that a long static cache
// that holds little keeps all splits busy. A split is a multiple of `granule` keys, or ends where no query sees further:
// a block that takes `granule` keys at a time never meets a key of the next split that one of its rows sees.
struct Span {
  int begin;
  int end;

  EMO_DEVICE Span(const DecodeParams& p, const Sequence& sequence, int split, int granule) {
    const int first = sequence.first_key(p, 0);
    const int low = first > 0 ? first : 0;
    const int high = sequence.end_key(p, p.n - 1);
    const int each = high > low ? ceil_div(ceil_div(high - low, p.splits), granule) * granule : 0;
    begin = low + split * each;
    end = begin + each < high ? begin + each : high;
  }

  // A key past the end as the last one of the split (or key 0): reading it again needs no predicate, and no row sees it.
  EMO_DEVICE int clamped(int key) const {
    const int last = end > 0 ? end - 1 : 0;
    return key < last ? key : last;
  }
};

}  // namespace emokernels
