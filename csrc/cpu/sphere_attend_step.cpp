// The normalise-attend-step of particles on the sphere: u_i = sum_j w_ij v_j, y_i = S(x_i + step v(x_i, u_i)).
//
// Reads and writes n D floats, computes O(n^2 D): the arithmetic is the limit, and no n x n matrix is stored. Threads
// divide panels of owners (sphere.h), each of which owns what it writes: results do not depend on how many there are.
// Backward forms the weights again from the scores and the statistics that forward saves of each row.
#include "sphere_backward.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <class X, class LoopsT>
static void forward_with(const SphereAttendStep<X>& a, const Host& host) {
  using WordT = typename LoopsT::WordT;
  const SphereInputs<X, LoopsT> inputs(a, host, false);
  const PanelsOf panels{ceil_div(a.rows, kPanel), a.causal};
  parallel(host, a.batch * panels.of_each, [&](int64_t begin, int64_t end) {
    const int64_t size = inputs.panel_floats();
    const Buffer<float> buffer(host, 2 * size + LoopsT::kScratch);
    const Buffer<WordT> own(host, size);
    float *u = buffer, *rows = u + size, *scratch = rows + size;
    float shift[kPanel], total[kPanel];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = panels.panel(item) * kPanel, row = panels.element(item) * a.rows + first;
      const int64_t count = smaller<int64_t>(kPanel, a.rows - first);
      const Particles<WordT> p = inputs.element(panels.element(item));
      const X* query = a.query != nullptr ? a.query + row * a.channels : a.x + row * a.width;
      owners_panel(query, count, a.channels, inputs.channels(), own);
      Owners<WordT> owners{};
      owners.begin = first;
      owners.count = count;
      owners.own = own;
      inputs.loops(p).forward(p, owners, {u, nullptr, true, false, false, shift, total, nullptr, nullptr, nullptr}, scratch);
      for (int64_t lane = 0; lane < count; lane += kLanes) {
        const Vec over = p.softmax ? load(total + lane) : broadcast(float(a.keys) * p.fraction);
        for (int64_t c = 0; c < a.width; ++c) store(u + c * kPanel + lane, load(u + c * kPanel + lane) / over);
        if (!p.softmax) store(total + lane, broadcast(float(a.keys)));
      }
      float* u_rows = a.saved_u != nullptr ? a.saved_u + row * a.width : rows;
      rows_of_panel(u, count, a.width, u_rows);
      move_rows(a.move, a.width, count, a.x + row * a.width, u_rows, a.y + row * a.width);
      if (a.saved_u != nullptr) {
        std::memcpy(a.saved_shift + row, shift, size_t(count) * sizeof(float));
        std::memcpy(a.saved_total + row, total, size_t(count) * sizeof(float));
      }
    }
  });
}

template <class X>
void sphere_attend_step_forward(const SphereAttendStep<X>& a, const Host& given) {
  with_loops(a, given, [&](auto loops, const Host& host) { forward_with<X, decltype(loops)>(a, host); });
}

template <class X>
void sphere_attend_step_backward(const SphereAttendStep<X>& a, const Host& given) {
  with_loops(a, given, [&](auto loops, const Host& host) { SphereBackward<X, decltype(loops)>(a, host).run(); });
}

template void sphere_attend_step_forward(const SphereAttendStep<float>&, const Host&);
template void sphere_attend_step_forward(const SphereAttendStep<bf16>&, const Host&);
template void sphere_attend_step_backward(const SphereAttendStep<float>&, const Host&);
template void sphere_attend_step_backward(const SphereAttendStep<bf16>&, const Host&);

}  // namespace macaron_ops::MACARON_OPS_ISA
