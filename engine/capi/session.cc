// Sessions: an artifact at a precision that can change while runs are under way.
#include <algorithm>

#include "bitstrata/dispatch.h"
#include "bitstrata/error.h"
#include "handles.h"
#include "status.h"

namespace bitstrata::capi {
namespace {

constexpr size_t kKept = 4;  // precisions kept ready, the present one among them; each holds its weights

std::string checked_isa(const char* isa) {
  const std::string name = isa != nullptr ? isa : "";
  try {
    select_kernels(name);
  } catch (const std::invalid_argument& error) {
    throw ApiError(BS_UNSUPPORTED, error.what());
  }
  return name;
}

bs_choice narrowest(const Program& program) {
  bs_choice choice = BS_CHOICE_INIT;
  choice.precision = program.precisions[0];
  return choice;
}

std::vector<double> one_a_channel(std::vector<double> offset, int64_t channels) {
  if (offset.size() == 1) offset.resize(static_cast<size_t>(channels), offset[0]);
  return offset;
}

bool same(const Selection& a, const Selection& b) { return a.map == b.map && a.plan == b.plan; }

}  // namespace

Ready::Ready(const Plan& plan, Selection selection, const std::string& isa, std::shared_ptr<Resources> resources)
    : selection(std::move(selection)),
      input_step(plan.input_step),
      input_offset(one_a_channel(plan.input_offset, plan.values[0].value.shape.c)),
      scale(plan.values[static_cast<size_t>(plan.output)].scale),
      graph(isa, std::move(resources)) {
  build(plan, &graph);
}

Session::Session(std::shared_ptr<SharedArtifact> artifact, const bs_options& options)
    : artifact_(std::move(artifact)),
      isa_(checked_isa(options.isa)),
      callers_memory_(options.callers_memory != 0),
      resources_(std::make_shared<Resources>(options.threads)) {
  const bs_choice choice = options.choice != nullptr
                               ? read_struct(options.choice, "options->choice", bs_choice BS_CHOICE_INIT)
                               : narrowest(artifact_->program());
  change(artifact_->select(choice));
}

void Session::set(const bs_choice& choice, Direction direction) {
  const Selection selection = artifact_->select(choice);
  const std::lock_guard<std::mutex> lock(changing_);
  check_direction(selection, direction);
  change(selection);
}

void Session::check_direction(const Selection& selection, Direction direction) const {
  if (direction == Direction::any) return;
  const std::vector<int>& now = current()->selection.map;
  bool up = false, down = false;
  for (size_t i = 0; i < now.size(); ++i) {
    up = up || selection.map[i] > now[i];
    down = down || selection.map[i] < now[i];
  }
  const bool upward = direction == Direction::up;
  if (upward ? down || !up : up || !down)
    throw ApiError(BS_UNKNOWN_PRECISION, std::string("the choice is no ") + (upward ? "upgrade" : "downgrade") +
                                             " from the present precision: it " +
                                             (up && down ? "raises some layers and lowers others"
                                              : up       ? "raises layers"
                                              : down     ? "lowers layers"
                                                         : "changes no layer") +
                                             "; use bs_session_set for any other change");
}

void Session::change(const Selection& selection) {
  std::shared_ptr<const Ready> ready = kept(selection);
  if (!ready) {
    ready = std::make_shared<Ready>(artifact_->derived(selection), selection, isa_, resources_);
    if (callers_memory_) resources_->trim(0);
  }
  std::list<std::shared_ptr<const Ready>> fresh{ready}, dropped;  // what is dropped ends without the mutex
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = ready_.begin(); it != ready_.end();) {
    const auto at = it++;
    if (*at == ready) dropped.splice(dropped.begin(), ready_, at);
  }
  ready_.splice(ready_.begin(), fresh);
  if (ready_.size() > kKept) dropped.splice(dropped.begin(), ready_, std::prev(ready_.end()));
}

std::shared_ptr<const Ready> Session::kept(const Selection& selection) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(ready_.begin(), ready_.end(), [&](const auto& r) { return same(r->selection, selection); });
  return found != ready_.end() ? *found : nullptr;
}

std::shared_ptr<const Ready> Session::current() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ready_.front();
}

Session::Buffer Session::take_buffer(size_t bytes) {
  Buffer buffer;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!buffers_.empty()) {
      buffer = std::move(buffers_.back());
      buffers_.pop_back();
    }
  }
  if (buffer.size() < bytes) buffer.resize(bytes);
  return buffer;
}

void Session::give_back(Buffer buffer) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    buffers_.push_back(std::move(buffer));
  } catch (const std::bad_alloc&) {  // then the next run makes its own
  }
}

void Session::describe(bs_state* state) const {
  const SharedArtifact::Held held = artifact_->held();
  const std::lock_guard<std::mutex> lock(mutex_);
  const Ready& ready = *ready_.front();
  state->isa = ready.graph.isa();
  state->threads = resources_->threads();
  state->scale = ready.scale;
  state->work_bytes = work_bytes(ready);
  state->work_alignment = kWorkAlignment;
  state->code_bytes = held.codes;
  state->factor_bytes = held.factors;
  for (const auto& kept : ready_) state->packed_bytes += static_cast<uint64_t>(kept->graph.constant_bytes());
  state->arena_bytes = static_cast<uint64_t>(resources_->bytes());
  for (const Buffer& buffer : buffers_) state->arena_bytes += buffer.size();
}

}  // namespace bitstrata::capi

using namespace bitstrata;
using namespace bitstrata::capi;

namespace {

bs_status set(const char* function, bs_session* session, const bs_choice* choice, Session::Direction direction) {
  return guarded(function, [&] {
    required(session, "session").session.set(read_struct(choice, "choice", bs_choice BS_CHOICE_INIT), direction);
  });
}

}  // namespace

extern "C" {

bs_status bs_session_create(bs_artifact* artifact, const bs_options* options, bs_session** session) {
  return guarded("bs_session_create", [&] {
    required(session, "session");
    const bs_options defaults = BS_OPTIONS_INIT;
    const bs_options given = options != nullptr ? read_struct(options, "options", defaults) : defaults;
    *session = new bs_session{{required(artifact, "artifact").shared, given}};
  });
}

void bs_session_free(bs_session* session) { delete session; }

bs_status bs_session_set(bs_session* session, const bs_choice* choice) {
  return set("bs_session_set", session, choice, Session::Direction::any);
}

bs_status bs_session_upgrade(bs_session* session, const bs_choice* choice) {
  return set("bs_session_upgrade", session, choice, Session::Direction::up);
}

bs_status bs_session_downgrade(bs_session* session, const bs_choice* choice) {
  return set("bs_session_downgrade", session, choice, Session::Direction::down);
}

bs_status bs_session_state(const bs_session* session, bs_state* state) {
  return guarded("bs_session_state", [&] {
    check_size(required(state, "state"), "state");
    bs_state value{};
    required(session, "session").session.describe(&value);
    write_struct(value, state);
  });
}

bs_status bs_session_map(const bs_session* session, int32_t* precisions, size_t count) {
  return guarded("bs_session_map", [&] {
    const Session& from = required(session, "session").session;
    required(precisions, "precisions");
    const std::vector<int>& table = from.artifact().program().precisions;
    const std::shared_ptr<const Ready> ready = from.current();
    if (count != ready->selection.map.size())
      invalid("count is " + std::to_string(count) + ", there are " + std::to_string(ready->selection.map.size()) +
              " layers");
    for (size_t i = 0; i < count; ++i) precisions[i] = table[static_cast<size_t>(ready->selection.map[i])];
  });
}

}  // extern "C"
