// The schemas of every moesys op. Kernels are in cpu/ and cuda/, one file per op family; shapes,
// errors and gradients are documented in moesys/ops/, whose files carry the same stems.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moesys, m) {
  // order
  m.def("tokens_per_expert(Tensor topk_ids, int num_experts) -> Tensor");
  m.def("expert_order(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)");
  // permute
  m.def("permute(Tensor x, Tensor slot_of_row, Tensor row_of_slot) -> Tensor");
  m.def("permute_backward(Tensor grad_rows, Tensor row_of_slot) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor weights, Tensor row_of_slot) -> Tensor");
  m.def(
      "unpermute_backward(Tensor grad_x, Tensor rows, Tensor weights, Tensor row_of_slot)"
      " -> (Tensor, Tensor)");
  // grouped_linear
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_linear_grad_rows(Tensor grad, Tensor weight, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_linear_grad_weight(Tensor grad, Tensor rows, Tensor tokens_per_expert) -> Tensor");
  // swiglu
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad_hidden, Tensor gate_up) -> Tensor");
}
