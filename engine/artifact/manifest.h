// The manifest: a program's graph and the list of files (spec/artifact.md, section 3).
#pragma once

#include <string>
#include <vector>

#include "bitstrata/artifact.h"
#include "field.h"
#include "layout.h"

namespace bitstrata::artifact {

inline constexpr uint64_t kMaxManifest = uint64_t{1} << 24;

struct Manifest {
  Program program;                 // checked as a whole, without weights and factors
  std::vector<StoredFile> stored;  // what each file holds
  std::vector<FileEntry> files;    // in the same order
  std::string sha256;              // of the canonical form without that field
};

// Throws ArtifactError (content or program) that names manifest.json and the field.
Manifest decode_manifest(std::string text);

// The manifest's member `program`; also checks the graph.
Program decode_program(const Field& field);

// The canonical form of the member `strata` that the files imply.
std::string strata_text(const std::vector<StoredFile>& stored);

// SHA-256 of a manifest's text without its member `sha256`.
std::string seal_of(const JsonDocument& document);

// Names of a table and their indices.
using Names = std::map<std::string, int>;

// Parts of decode_program, in manifest_tables.cc and manifest_nodes.cc.
std::vector<Layer> decode_layers(const Field& field, const std::vector<int>& precisions);
std::vector<Affine> decode_affines(const Field& field, const Names& layers);
std::vector<NamedPlan> decode_plans(const Field& field, const Program& program, const Names& affines);
std::vector<Node> decode_nodes(const Field& field, const Names& layers, const Names& affines);

// Adds a name to a table, whose next index it gets; throws if it is there already.
void add_name(const Field& field, const std::string& name, Names* names);

// The index of the name that the field holds; `expected` says what it must be the name of.
int index_of(const Field& field, const Names& names, const char* expected);

}  // namespace bitstrata::artifact
