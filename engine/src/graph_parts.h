// Parts of a graph that its files share.
#pragma once

#include <cstdint>
#include <vector>

#include "bitstrata/graph.h"
#include "ops.h"

namespace bitstrata {

// Where a thread has what it needs to run a chunk, all in the memory that is leased for it.
struct Graph::Worker {
  uint8_t** values;
  uint8_t* locals;  // of the group that runs
  uint8_t* arena;   // values and scratch, of this thread's images or, where threads share images, of all
};

// Operations that are run one after the other on a tile of pixels while it is in the cache, then on the next tile: one
// that computes pixels in order, and those after it that compute each pixel from the same pixel of their inputs.
struct Graph::Group {
  struct Local {
    int value;
    int64_t pixel_bytes;
    int first, last;  // operation that makes it, last one that reads it
    int64_t at;       // in the thread's buffer
  };
  size_t first, end;          // operations
  int64_t pixels;             // of an image
  int64_t unit;               // pixels that the first operation computes at once; 0: it does not work in pixels
  std::vector<Local> locals;  // values that nothing outside reads: only a tile of them exists
  int64_t most;               // pixels of a tile, a multiple of the unit
  int64_t tile;               // the same, no more than there are
  bool fused;                 // the first two operations run as one
  size_t deferred;  // the operation that this group leaves to the next one, see Graph::find_deferred; end: none
  size_t taken;     // such an operation of the group before, done after this one's; end: none
  int64_t window;   // rows of sums kept for a maximum over those that the group before has deferred
  int64_t at;       // of the window, in the thread's buffer
};

}  // namespace bitstrata
