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
  // clusters
  m.def("cross_polytope(Tensor turned) -> Tensor");
  m.def(
      "member_means(Tensor x, Tensor row_of_slot, Tensor member_slots, Tensor first_member) -> "
      "Tensor");
  m.def(
      "restore(Tensor rows, Tensor means, Tensor x, Tensor weights, Tensor slopes, Tensor "
      "row_of_slot,"
      " Tensor member_slots, Tensor first_member) -> Tensor");
  m.def(
      "restore_backward(Tensor grad, Tensor rows, Tensor means, Tensor x, Tensor weights, Tensor "
      "slopes,"
      " Tensor row_of_slot, Tensor member_slots, Tensor first_member) -> (Tensor, Tensor, Tensor)");
  // splits
  m.def(
      "split_rows(Tensor sketch, Tensor slots, Tensor ids, Tensor codes, int top_k, int "
      "num_experts,"
      " int base, int digits, float most) -> Tensor");
  // halves
  m.def(
      "halve(Tensor sketch, Tensor topk_ids, int num_experts, int most_cuts, int steps, float most)"
      " -> Tensor");
  // wire
  m.def(
      "pack(Tensor x, Tensor slot_of_row, int top_k, int format, int block, bool is_stochastic,"
      " int carried_rows, bool is_checked) -> Tensor");
  m.def("unpack(Tensor bytes, Tensor like, int d, int format, int block) -> Tensor");
  // chunks
  m.def("pack_chunks(Tensor[] chunks, Tensor like) -> Tensor");
  m.def("add_chunks(Tensor[] parts, Tensor(a!)[] totals) -> ()");
  // grouped_linear
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_linear_grad_rows(Tensor grad, Tensor weight, Tensor tokens_per_expert) -> Tensor");
  m.def("grouped_linear_grad_weight(Tensor grad, Tensor rows, Tensor tokens_per_expert) -> Tensor");
  // rms_norm
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)");
  // cross_entropy
  m.def("cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor lse) -> Tensor");
  // swiglu
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad_hidden, Tensor gate_up) -> Tensor");
}
