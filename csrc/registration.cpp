// The schemas of the native ops. Outputs and workspace are allocated in Python, where the op that users see is defined.
#include "ops/torch_stable.h"

STABLE_TORCH_LIBRARY(EMO_NAMESPACE, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? roles, Tensor? query_roles, Tensor? bias, "
      "Tensor? factor, Tensor? magnitude, Tensor? gain, Tensor? mask, Tensor? lengths, bool causal, float scale, "
      "int window, float softcap, int splits, Tensor(a!) z, Tensor(b!) lse, Tensor(c!)? partial_z, "
      "Tensor(d!)? partial_lse) -> ()");
  m.def(
      "gated_activation(Tensor gate, Tensor? up, Tensor? index, Tensor? scale, Tensor? shift, Tensor? replace, "
      "Tensor? mask, int act, Tensor(a!) out) -> ()");
}
