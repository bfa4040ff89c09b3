// What the handles of the C interface stand for.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bitstrata.h"
#include "bitstrata/artifact.h"
#include "bitstrata/graph.h"
#include "bitstrata/plan.h"
#include "bitstrata/resources.h"

namespace bitstrata::capi {

// An artifact's own source, in front of which supplied files stand until they are read.
class SuppliedSource : public Source {
 public:
  explicit SuppliedSource(std::unique_ptr<Source> own) : own_(std::move(own)) {}
  Bytes read(const std::string& name, uint64_t limit) override;

  void supply(const std::string& name, Bytes bytes) { supplied_[name] = std::move(bytes); }
  void drop(const std::string& name) { supplied_.erase(name); }

 private:
  std::unique_ptr<Source> own_;
  std::map<std::string, Bytes> supplied_;
};

// An artifact with the mutex that its users take.
class SharedArtifact {
 public:
  explicit SharedArtifact(std::unique_ptr<Source> own) : SharedArtifact(new SuppliedSource(std::move(own))) {}

  // The graph, tables and names, which never change; weights and factors only within `derived`.
  const Program& program() const { return artifact_.program(); }
  const std::string& sha256() const { return artifact_.sha256(); }

  Selection select(const bs_choice& choice) const;
  // Reads what is missing, then derives.
  Plan derived(const Selection& selection);
  void supply(const bs_file& file);
  std::vector<const FileEntry*> missing(const Selection& selection) const;  // entries live as long as the artifact
  int held_bits(size_t layer) const;

  struct Held {
    uint64_t codes, factors;  // bytes
  };
  Held held() const;

 private:
  explicit SharedArtifact(SuppliedSource* source) : source_(*source), artifact_(std::unique_ptr<Source>(source)) {}
  bool is_read(const std::string& name) const;

  mutable std::mutex mutex_;
  SuppliedSource& source_;
  Artifact artifact_;
};

// What runs of one precision need; immutable.
struct Ready {
  Ready(const Plan& plan, Selection selection, const std::string& isa, std::shared_ptr<Resources> resources);

  Selection selection;
  double input_step;
  std::vector<double> input_offset;  // one a channel
  double scale;
  Graph graph;
};

// What a run needs of a caller's memory.
constexpr uint64_t kWorkAlignment = 64;
uint64_t work_bytes(const Ready& ready);

class Session {
 public:
  Session(std::shared_ptr<SharedArtifact> artifact, const bs_options& options);

  enum class Direction { any, up, down };
  void set(const bs_choice& choice, Direction direction);
  std::shared_ptr<const Ready> current() const;  // what a run that starts now runs, to its end
  void describe(bs_state* state) const;

  const SharedArtifact& artifact() const { return *artifact_; }
  bool callers_memory() const { return callers_memory_; }

  // Memory for a run's input and output in the graph's form, kept for the next run.
  using Buffer = std::vector<uint8_t>;
  Buffer take_buffer(size_t bytes);
  void give_back(Buffer buffer) noexcept;

 private:
  void change(const Selection& selection);
  std::shared_ptr<const Ready> kept(const Selection& selection);
  void check_direction(const Selection& selection, Direction direction) const;

  const std::shared_ptr<SharedArtifact> artifact_;
  const std::string isa_;
  const bool callers_memory_;
  const std::shared_ptr<Resources> resources_;
  std::mutex changing_;                            // one change at a time
  mutable std::mutex mutex_;                       // of what follows
  std::list<std::shared_ptr<const Ready>> ready_;  // precisions kept, the present one first
  std::vector<Buffer> buffers_;                    // that no run uses
};

}  // namespace bitstrata::capi

struct bs_artifact {
  std::shared_ptr<bitstrata::capi::SharedArtifact> shared;
};

struct bs_session {
  bitstrata::capi::Session session;
};
