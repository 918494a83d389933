// From a dot product to a logit (soft cap, routes, mask), and the running softmax. Logits are in units of log2.
#pragma once

#include "decode_params.cuh"

namespace emokernels {

// What a (destination role, source role) pair of one head does: s' = factor * s + magnitude * |s| + bias, p' = gain * p.
struct alignas(16) Route {
  float factor;
  float magnitude;
  float bias;  // in units of log2
  float gain;

  EMO_DEVICE float logit(float s) const { return fmaf(factor, s, fmaf(magnitude, fabsf(s), bias)); }
};

// Slots per row of a route table in shared memory: 8, so that a role byte that is out of range reads identity.
inline constexpr int kRoleSlots = 8;

// Fills table[row][source role] for the rows of a tile; all threads take part, and must be synchronised afterwards.
EMO_DEVICE void load_routes(const DecodeParams& p, const Place& at, int first_row, int rows, Route* table) {
  for (int slot = threadIdx.x; slot < rows * kRoleSlots; slot += kDecodeThreads) {
    const Row row(p, at, first_row + slot / kRoleSlots);
    const int source = slot % kRoleSlots;
    Route route{1.0f, 0.0f, 0.0f, 1.0f};
    if (p.query_roles != nullptr) {
      const int destination = p.query_roles[at.batch * p.query_roles_stride + row.query];
      if (source < kRoles && destination < kRoles) {
        const int64_t entry = (int64_t(row.head) * kRoles + destination) * kRoles + source;
        if (p.factor) route.factor = p.factor[at.batch * p.factor_stride + entry];
        if (p.magnitude) route.magnitude = p.magnitude[at.batch * p.magnitude_stride + entry];
        if (p.bias) route.bias = p.bias[at.batch * p.bias_stride + entry] * kLog2E;
        if (p.gain) route.gain = p.gain[at.batch * p.gain_stride + entry];
      }
    }
    table[slot] = route;
  }
}

// Dot products to logits: the scale of the problem, and its soft cap.
struct Scaling {
  float before;  // what a dot product is multiplied with first
  float cap;     // 0 without a soft cap

  EMO_DEVICE explicit Scaling(const DecodeParams& p) {
    cap = p.softcap * kLog2E;
    before = p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
  }
  EMO_DEVICE float logit(float dot) const {
    const float s = dot * before;
    return cap > 0.0f ? cap * tanhf(s) : s;
  }
};

// Which keys a row sees, and where its mask is.
struct Sight {
  int first;
  int end;
  const char* mask;  // of key 0

  Sight() = default;
  EMO_DEVICE Sight(const DecodeParams& p, const Place& at, const Sequence& sequence, const Row& row) {
    first = sequence.first_key(p, row.query);
    end = row.exists ? sequence.end_key(p, row.query) : 0;
    const int width = p.mask_kind == MaskKind::boolean ? 1 : p.mask_kind == MaskKind::f32 ? 4 : 2;
    mask = p.mask_kind == MaskKind::none
               ? nullptr
               : static_cast<const char*>(p.mask) + width * (at.batch * p.mask_stride[0] + row.head * p.mask_stride[1] +
                                                             row.query * p.mask_stride[2]);
  }
  EMO_DEVICE bool sees(int key) const { return key >= first && key < end; }
};

// The mask's value at a key as raw bits, so that it can be on its way while something else is computed.
EMO_DEVICE uint32_t fetch_mask(const DecodeParams& p, const char* row, int key) {
  const char* at = row + int64_t(key) * p.mask_step;
  if (p.mask_kind == MaskKind::boolean) return *reinterpret_cast<const uint8_t*>(at);
  if (p.mask_kind == MaskKind::f32) return *reinterpret_cast<const uint32_t*>(at);
  return *reinterpret_cast<const uint16_t*>(at);
}

// A logit under the mask: -inf where the mask hides, whatever the logit is.
EMO_DEVICE float masked(const DecodeParams& p, float logit, uint32_t bits) {
  float value;
  if (p.mask_kind == MaskKind::boolean) {
    return bits != 0 ? logit : -INFINITY;
  } else if (p.mask_kind == MaskKind::f32) {
    memcpy(&value, &bits, sizeof(value));
  } else {
    const uint16_t low = uint16_t(bits);
    half_t half;
    bf16_t bf16;
    memcpy(&half, &low, sizeof(low));
    memcpy(&bf16, &low, sizeof(low));
    value = p.mask_kind == MaskKind::f16 ? to_float(half) : to_float(bf16);
  }
  return value > p.mask_floor ? fmaf(value, kLog2E, logit) : -INFINITY;
}

// Largest logit and sum of weights of a row so far.
struct Softmax {
  float top = -INFINITY;
  float sum = 0.0f;

  // Takes a larger maximum in and returns what earlier weights must be multiplied with.
  EMO_DEVICE float raise(float candidate) {
    const float next = fmaxf(top, candidate);
    const float fade = next == top ? 1.0f : exp2_fast(top - next);
    top = next;
    sum *= fade;
    return fade;
  }
  // The weight of a logit; 0 for -inf, also while no key has been seen.
  EMO_DEVICE float weight(float logit) const { return exp2_fast(logit - (top == -INFINITY ? 0.0f : top)); }
};

}  // namespace emokernels
