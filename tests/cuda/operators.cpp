// One of the kernels' sources, run on numbers that are always the same; prints its results, or why a launch ended.
#include SOURCE

#include <cstdio>
#include <vector>

using namespace macaron_ops::cuda;

static std::vector<float> drawn(size_t count) {
  static uint32_t state = 1;
  std::vector<float> numbers(count);
  for (float& number : numbers) number = float((state = state * 1664525u + 1013904223u) >> 8) / float(1 << 23) - 1.f;
  return numbers;
}
static std::vector<float> results[8];
static float* result(int i, size_t count) { return (results[i] = std::vector<float>(count, NAN)).data(); }

#if defined(NORMALIZE_STEP)
static void run(int rows, int width, int at) {
  const size_t count = size_t(rows) * width;
  const auto x = drawn(count), u = drawn(count), grad = drawn(count), step = drawn(width);
  NormalizeStep a{};
  a.dtype = Dtype::float32;
  a.rows = rows;
  a.width = width;
  a.step = {0.f, step.data(), true, Direction::tangent, 1e-12f};
  a.x = x.data();
  a.u = u.data();
  a.y = result(at, count);
  normalize_step_forward(a, nullptr);
  a.grad = grad.data();
  a.grad_x = result(at + 1, count);
  a.grad_u = result(at + 2, count);
  a.blocks = normalize_step_blocks(a);
  a.partial = result(at + 3, size_t(a.blocks) * width);
  normalize_step_backward(a, nullptr);
}
static void run() {
  run(5, 1100, 0);  // a block has a row
  run(70, 12, 4);   // a block has 32 rows
}
#elif defined(NORM_ROWS)
static void run(int rows, int width, int at) {
  const auto x = drawn(rows * width), z = drawn(rows * width), grad = drawn(rows * width);
  const auto weight = drawn(width), bias = drawn(width);
  NormRows a{};
  a.dtype = Dtype::float32;
  a.rows = rows;
  a.width = width;
  a.norm = Norm::layer;
  a.eps = 1e-5f;
  a.a = a.c = 1.f;
  a.x = x.data();
  a.z = z.data();
  a.weight = weight.data();
  a.bias = bias.data();
  a.n = result(at, x.size());
  norm_rows_forward(a, nullptr);
  a.grad = grad.data();
  a.residual = z.data();
  a.grad_x = result(at + 1, x.size());
  a.blocks = norm_rows_blocks(a);
  a.partial_weight = result(at + 2, size_t(a.blocks) * width);
  a.partial_bias = result(at + 3, size_t(a.blocks) * width);
  norm_rows_backward(a, nullptr);
}
static void run() {
  run(70, 12, 0);   // a block has 32 rows
  run(5, 1100, 4);  // a block has a row
}
#elif defined(FFN_FORWARD) || defined(FFN_BACKWARD)
template <class T>
static std::vector<T> narrow(size_t count) {
  std::vector<T> numbers;
  for (float number : drawn(count)) numbers.push_back(rounded<T>(number));
  return numbers;
}
static void run() {
  const int rows = 70, width = 64, hidden = 128;
  const auto x = narrow<bf16>(rows * width), w_in = narrow<bf16>(hidden * width), w_out = narrow<bf16>(width * hidden);
  std::vector<bf16> y(x.size(), rounded<bf16>(NAN));
  FfnStep a{};
  a.dtype = Dtype::bfloat16;
  a.rows = rows;
  a.width = width;
  a.hidden = hidden;
  a.a = a.c = 1.f;
  a.x = x.data();
  a.w_in = w_in.data();
  a.w_out = w_out.data();
  a.y = y.data();
#if defined(FFN_FORWARD)
  ffn_step_forward(a, nullptr);
  for (bf16 number : y) results[0].push_back(to_float(number));
#else
  const auto grad = narrow<bf16>(x.size());
  std::vector<bf16> activated(size_t(rows) * hidden, rounded<bf16>(NAN)), grad_hidden = activated;
  a.grad = grad.data();
  a.activated = activated.data();
  a.grad_hidden = grad_hidden.data();
  a.grad_n = y.data();
  ffn_step_backward(a, nullptr);
  for (const auto* numbers : {&y, &activated, &grad_hidden})
    for (bf16 number : *numbers) results[0].push_back(to_float(number));
#endif
}
#else
static void run() {
  const int batch = 2, rows = 300, width = 3;  // four warps have the same owners, four each thread
  const size_t points = size_t(batch) * rows;
  const auto x = drawn(points * width), value = drawn(points * width);
  SphereAttendStep a{};
  a.batch = batch;
  a.rows = a.keys = rows;
  a.width = a.channels = width;
  a.step = {0.3f, nullptr, false, Direction::tangent, 1e-12f};
  a.beta = 2.f;
  a.softmax = true;
  a.x = a.query = a.key = x.data();
  a.value = value.data();
#if defined(SPHERE_FORWARD)
  a.y = result(0, points * width);
  sphere_attend_step_forward(a, nullptr);
#else
  auto u = drawn(points * width), shift = drawn(points), total = std::vector<float>(points, 700.f);
  const auto grad = drawn(points * width);
  a.u = u.data();
  a.shift = shift.data();
  a.total = total.data();
  SphereGradients b{};
  b.grad = grad.data();
  b.x = result(0, points * width);
  b.query = result(1, points * width);
  b.key = result(2, points * width);
  b.value = result(3, points * width);
  b.g = result(4, points * width);
  b.offset = result(5, points);
  b.need_pairs = true;
  b.blocks = sphere_attend_step_blocks(a);
  std::vector<float> partial(size_t(b.blocks), NAN);
  b.partial = partial.data();
  sphere_attend_step_backward(a, b, nullptr);
  results[5].insert(results[5].end(), partial.begin(), partial.end());
#endif
}
#endif

int main() {
  try {
    run();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (const auto& numbers : results)
    for (float number : numbers) std::printf("%a\n", double(number));
}
