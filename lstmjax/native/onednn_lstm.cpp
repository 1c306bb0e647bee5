// oneDNN's LSTM primitive as three XLA custom calls: inference, training, gradient.
//
// Gates stand in the order i, f, g, o in both libraries, and "ldigo" with one layer and one
// direction is [inputs, 4, hidden], so W_x [D, 4H], W_h [H, 4H] and b [4H] are passed as they are.
// Where a primitive wants its weights in another layout they are rewritten once per call.
//
// What is kept is never destroyed, because XLA's threads may still run while the process ends.
//
// Calls may come from several threads at once. Primitives do not change when they run, so they are
// made once per shape and shared; what a run writes to is lent to one call at a time and kept for
// the next one, because fresh memory costs more than many a step.

#include <omp.h>
#include <sys/mman.h>

#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

#if DNNL_VERSION_MAJOR != 3
#error "this oneDNN is not version 3"
#elif DNNL_CPU_RUNTIME != DNNL_RUNTIME_OMP
#error "this oneDNN is not built for OpenMP"
#endif

namespace {

namespace ffi = xla::ffi;
using dnnl::memory;
using Layout = memory::desc;
using Tag = memory::format_tag;
using Type = memory::data_type;

enum Kind { kInference, kTraining, kGradient };

struct Problem {
  Kind kind;
  memory::dim steps, batch, inputs, hidden;
  bool bf16, reverse;
  int threads;

  std::array<int64_t, 8> key() const {
    return {kind, steps, batch, inputs, hidden, bf16, reverse, threads};
  }
};

const dnnl::engine& cpu() {
  static const auto& engine = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::primitive_attr own_scratchpad() {
  // The library's own scratchpad belongs to the thread that made a primitive.
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

// What this thread's parallel regions may use, while this object lives.
class Threads {
 public:
  explicit Threads(int number) : before_(omp_get_max_threads()) { omp_set_num_threads(number); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;

 private:
  int before_;
};

// ---- layouts ------------------------------------------------------------------------------------

// The arrays as JAX holds them; `any_*` leaves the layout of the weights to the primitive.
struct Layouts {
  explicit Layouts(const Problem& p, Type type)
      : xs({p.steps, p.batch, p.inputs}, type, Tag::tnc),
        hs({p.steps, p.batch, p.hidden}, type, Tag::tnc),
        h({1, 1, p.batch, p.hidden}, type, Tag::ldnc),
        c({1, 1, p.batch, p.hidden}, Type::f32, Tag::ldnc),
        w_x({1, 1, p.inputs, 4, p.hidden}, type, Tag::ldigo),
        w_h({1, 1, p.hidden, 4, p.hidden}, type, Tag::ldigo),
        any_w_x({1, 1, p.inputs, 4, p.hidden}, type, Tag::any),
        any_w_h({1, 1, p.hidden, 4, p.hidden}, type, Tag::any),
        b({1, 1, 4, p.hidden}, Type::f32, Tag::ldgo) {}

  Layout xs, hs, h, c, w_x, w_h, any_w_x, any_w_h, b;
};

// ---- primitives, made once ----------------------------------------------------------------------

// A primitive with the size of the scratchpad it wants.
struct Runnable {
  template <class Description>
  static Runnable of(const Description& description, const dnnl::primitive& primitive) {
    return {primitive, description.scratchpad_desc()};
  }

  dnnl::primitive primitive;
  Layout scratchpad;
};

// Weights in two layouts; no primitive where they are the same.
struct Rewrite {
  Rewrite(const Layout& from, const Layout& to) : from(from), to(to) {
    if (from == to) return;
    dnnl::reorder::primitive_desc description(cpu(), from, cpu(), to, own_scratchpad());
    run = Runnable::of(description, dnnl::reorder(description));
  }

  Layout from, to;
  std::optional<Runnable> run;
};

struct Program {
  Problem problem;
  Layouts values, gradients;
  Runnable main;
  Layout workspace;
  std::vector<Rewrite> weights;           // W_x and W_h, to the primitive's layouts
  std::vector<Rewrite> weight_gradients;  // of W_x and W_h, from them
};

std::unique_ptr<Program> make(const Problem& p) {
  const Layouts v(p, p.bf16 ? Type::bf16 : Type::f32), g(p, Type::f32);
  const auto direction = p.reverse ? dnnl::rnn_direction::unidirectional_right2left
                                   : dnnl::rnn_direction::unidirectional_left2right;
  const auto kind = p.kind == kInference ? dnnl::prop_kind::forward_inference
                                         : dnnl::prop_kind::forward_training;
  const dnnl::primitive_attr attributes = own_scratchpad();
  const dnnl::lstm_forward::primitive_desc forward(cpu(), kind, direction, v.xs, v.h, v.c,
                                                   v.any_w_x, v.any_w_h, v.b, v.hs, v.h, v.c,
                                                   attributes);
  if (p.kind != kGradient) {
    return std::make_unique<Program>(
        Program{p, v, g, Runnable::of(forward, dnnl::lstm_forward(forward)),
                forward.workspace_desc(),
                {{v.w_x, forward.weights_layer_desc()}, {v.w_h, forward.weights_iter_desc()}},
                {}});
  }
  const dnnl::lstm_backward::primitive_desc backward(
      cpu(), dnnl::prop_kind::backward, direction, v.xs, v.h, v.c, v.any_w_x, v.any_w_h, v.b, v.hs,
      v.h, v.c, g.xs, g.h, g.c, g.any_w_x, g.any_w_h, g.b, g.hs, g.h, g.c, forward, attributes);
  return std::make_unique<Program>(
      Program{p, v, g, Runnable::of(backward, dnnl::lstm_backward(backward)),
              forward.workspace_desc(),
              {{v.w_x, backward.weights_layer_desc()}, {v.w_h, backward.weights_iter_desc()}},
              {{backward.diff_weights_layer_desc(), g.w_x},
               {backward.diff_weights_iter_desc(), g.w_h}}});
}

// Made with the number of threads they will run with: it decides how work is cut and buffers are
// sized. Programs are never thrown away, so the reference stays good.
const Program& program(const Problem& problem) {
  static std::mutex mutex;
  static auto& programs = *new std::map<std::array<int64_t, 8>, std::unique_ptr<Program>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& entry = programs[problem.key()];
  if (!entry) entry = make(problem);
  return *entry;
}

// ---- memory, lent -------------------------------------------------------------------------------

// Blocks of memory that only grow, by number.
class Blocks {
 public:
  void* get(size_t number, size_t bytes) {
    Block& block = blocks_.at(number);
    if (block.bytes < bytes) {
      bytes = (bytes + 63) / 64 * 64;
      block = Block{};  // the old one first, so that both never exist at once
      block.data.reset(std::aligned_alloc(64, bytes));
      if (!block.data) throw std::bad_alloc();
      block.bytes = bytes;
    }
    return block.data.get();
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };
  std::array<Block, 6> blocks_;
};

// Blocks that are this call's alone while this object lives.
class Lent {
 public:
  Lent() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (!idle().empty()) {
      blocks_ = std::move(idle().back());
      idle().pop_back();
    }
    if (!blocks_) blocks_ = std::make_unique<Blocks>();
  }
  ~Lent() {
    const std::lock_guard<std::mutex> lock(mutex());
    idle().push_back(std::move(blocks_));
  }
  Lent(const Lent&) = delete;
  Blocks* operator->() { return blocks_.get(); }

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::vector<std::unique_ptr<Blocks>>& idle() {
    static auto& idle = *new std::vector<std::unique_ptr<Blocks>>;
    return idle;
  }
  std::unique_ptr<Blocks> blocks_;
};

// XLA allocates its results anew for every call. In large ones most of the time of writing is the
// kernel's, which hands out pages one by one, unless they are large pages.
void ask_for_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  constexpr size_t kWorthIt = 4 << 20;
  if (bytes >= kWorthIt) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// ---- one call -----------------------------------------------------------------------------------

class Call {
 public:
  explicit Call(const Program& program) : program_(program), stream_(cpu()) {}

  void give(int name, const Layout& layout, void* data) {
    arguments_.insert_or_assign(name, memory(layout, cpu(), data));
  }

  void give_weights(int name, const Rewrite& rewrite, void* data) {
    if (rewrite.run) {
      void* own = blocks_->get(next_++, rewrite.to.get_size());
      apply(rewrite, data, own);
      data = own;
    }
    give(name, rewrite.to, data);
  }

  // Gradients of weights are added to what is there.
  void take_sum(int name, const Layout& layout, void* data) {
    std::memset(data, 0, layout.get_size());
    give(name, layout, data);
  }

  void take_weights(int name, const Rewrite& rewrite, void* data) {
    void* own = rewrite.run ? blocks_->get(next_++, rewrite.from.get_size()) : data;
    take_sum(name, rewrite.from, own);
    if (rewrite.run) afterwards_.push_back({&rewrite, own, data});
  }

  void run() {
    execute(program_.main, arguments_);
    for (const auto& [rewrite, from, to] : afterwards_) apply(*rewrite, from, to);
    stream_.wait();
  }

 private:
  using Arguments = std::unordered_map<int, memory>;
  struct Afterwards {
    const Rewrite* rewrite;
    void *from, *to;
  };

  void apply(const Rewrite& rewrite, void* from, void* to) {
    execute(*rewrite.run, {{DNNL_ARG_FROM, memory(rewrite.from, cpu(), from)},
                           {DNNL_ARG_TO, memory(rewrite.to, cpu(), to)}});
  }

  void execute(const Runnable& runnable, Arguments arguments) {
    if (const size_t bytes = runnable.scratchpad.get_size()) {
      arguments.insert_or_assign(DNNL_ARG_SCRATCHPAD,
                                 memory(runnable.scratchpad, cpu(), blocks_->get(0, bytes)));
    }
    runnable.primitive.execute(stream_, arguments);
  }

  const Program& program_;
  dnnl::stream stream_;
  Lent blocks_;
  size_t next_ = 1;  // block 0 is the scratchpad
  Arguments arguments_;
  std::vector<Afterwards> afterwards_;
};

// Calls of several threads each go through one thread, one after the other. OpenMP keeps a team for
// every thread that ever asked for one, XLA calls from many, and where the teams together are more
// than the cores, their threads sleep between the steps instead of spinning for a moment.
class Leader {
 public:
  Leader() { std::thread([this] { lead(); }).detach(); }

  void run(std::function<void()> work) {
    std::packaged_task<void()> task(std::move(work));
    auto done = task.get_future();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    asked_.notify_one();
    done.get();  // throws what the work has thrown
  }

 private:
  void lead() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      asked_.wait(lock, [this] { return !tasks_.empty(); });
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable asked_;
  std::deque<std::packaged_task<void()>> tasks_;
};

Leader& leader() {
  static auto& leader = *new Leader;
  return leader;
}

// in: xs, W_x, W_h, b, h, c            [T, B, D], [D, 4H], [H, 4H], [4H], [B, H], [B, H]
// out: hs, final h, final c, workspace  the last for training alone
//
// gradient, in: those of "in", those of "out", gradients of hs, final h, final c
// gradient, out: gradients of "in"
void compute(const Problem& problem, const ffi::RemainingArgs& in, const ffi::RemainingRets& out) {
  const auto data = [&](size_t i) { return in.get<ffi::AnyBuffer>(i).value().untyped_data(); };
  const auto result = [&](size_t i) {
    auto buffer = out.get<ffi::AnyBuffer>(i).value();
    ask_for_large_pages(buffer->untyped_data(), buffer->size_bytes());
    return buffer->untyped_data();
  };
  const Threads limited(problem.threads);
  const Program& p = program(problem);
  const Layouts &v = p.values, &g = p.gradients;
  const bool gradient = problem.kind == kGradient;
  const auto first = [&](size_t i) { return gradient ? data(6 + i) : result(i); };

  Call call(p);
  call.give(DNNL_ARG_SRC_LAYER, v.xs, data(0));
  call.give_weights(DNNL_ARG_WEIGHTS_LAYER, p.weights[0], data(1));
  call.give_weights(DNNL_ARG_WEIGHTS_ITER, p.weights[1], data(2));
  call.give(DNNL_ARG_BIAS, v.b, data(3));
  call.give(DNNL_ARG_SRC_ITER, v.h, data(4));
  call.give(DNNL_ARG_SRC_ITER_C, v.c, data(5));
  call.give(DNNL_ARG_DST_LAYER, v.hs, first(0));
  call.give(DNNL_ARG_DST_ITER, v.h, first(1));
  call.give(DNNL_ARG_DST_ITER_C, v.c, first(2));
  if (problem.kind != kInference) call.give(DNNL_ARG_WORKSPACE, p.workspace, first(3));
  if (gradient) {
    call.give(DNNL_ARG_DIFF_DST_LAYER, g.hs, data(10));
    call.give(DNNL_ARG_DIFF_DST_ITER, g.h, data(11));
    call.give(DNNL_ARG_DIFF_DST_ITER_C, g.c, data(12));
    call.give(DNNL_ARG_DIFF_SRC_LAYER, g.xs, result(0));
    call.take_weights(DNNL_ARG_DIFF_WEIGHTS_LAYER, p.weight_gradients[0], result(1));
    call.take_weights(DNNL_ARG_DIFF_WEIGHTS_ITER, p.weight_gradients[1], result(2));
    call.take_sum(DNNL_ARG_DIFF_BIAS, g.b, result(3));
    call.give(DNNL_ARG_DIFF_SRC_ITER, g.h, result(4));
    call.give(DNNL_ARG_DIFF_SRC_ITER_C, g.c, result(5));
  }
  call.run();
}

ffi::Error called(Kind kind, ffi::RemainingArgs in, ffi::RemainingRets out, bool reverse,
                  int64_t threads) {
  const auto argument = [&](size_t i) { return in.get<ffi::AnyBuffer>(i).value(); };
  const auto xs = argument(0).dimensions();
  const Problem problem{kind,
                        xs[0],
                        xs[1],
                        xs[2],
                        argument(2).dimensions()[0],
                        argument(0).element_type() == ffi::DataType::BF16,
                        reverse,
                        static_cast<int>(threads)};
  if (problem.threads > 1) {
    leader().run([&] { compute(problem, in, out); });
  } else {
    compute(problem, in, out);
  }
  return ffi::Error::Success();
}

template <Kind kind>
ffi::Error caught(ffi::RemainingArgs in, ffi::RemainingRets out, bool reverse, int64_t threads) {
  try {
    return called(kind, in, out, reverse, threads);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
}

auto bound() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<bool>("reverse").Attr<int64_t>(
      "threads");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lstmjax_onednn_inference, caught<kInference>, bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lstmjax_onednn_training, caught<kTraining>, bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lstmjax_onednn_gradient, caught<kGradient>, bound());

// Of the library that is loaded, which need not be the one whose headers were compiled.
extern "C" const char* lstmjax_onednn_version() {
  static const auto& version = *new std::string([] {
    const dnnl_version_t& now = *dnnl_version();
    return std::to_string(now.major) + "." + std::to_string(now.minor) + "." +
           std::to_string(now.patch);
  }());
  return version.c_str();
}

// How many threads OpenMP uses where nothing is said.
extern "C" int lstmjax_onednn_threads() { return omp_get_max_threads(); }

// Bytes of the workspace that training leaves for the gradient; -1 where this processor has no
// primitive for the type.
extern "C" int64_t lstmjax_onednn_workspace(int64_t steps, int64_t batch, int64_t inputs,
                                            int64_t hidden, bool bf16, bool reverse, int threads) {
  try {
    const Threads limited(threads);
    const Problem problem{kGradient, steps, batch, inputs, hidden, bf16, reverse, threads};
    return static_cast<int64_t>(program(problem).workspace.get_size());
  } catch (const std::exception&) {
    return -1;
  }
}
