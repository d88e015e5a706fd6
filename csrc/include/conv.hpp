// The forms of a convolution's Gram matrix, and what they share.
#pragma once

#include "conv_kernels.hpp"
#include "engine.hpp"
#include "kernels.hpp"
#include "offsets.hpp"

namespace hvpfast {

// Extra memory that a form may plan with: twice the input and no more than kWorkspaceBound, or a few MiB a thread where
// that is more.
int64_t conv_memory(const Convolution& x, int threads);

// Reads pixels of any dtype and strides as T: `count` values, `step` apart.
template <class T>
void read_values(const Convolution& x, int64_t offset, int64_t step, int64_t count, T* to);

// Offsets, in panels of channels on the tile engine. False if a reduced precision met values outside its range: out is
// untouched then.
template <class T>
bool conv_by_panels(const Engine<T>& engine, const Convolution& x, double alpha, double beta, const Out& out, int threads);

// Offsets, with one vector lane for each group (and sample): few channels a group, all groups at once.
template <class T>
void conv_by_lanes(const Convolution& x, double alpha, double beta, const GroupsOut& out, int threads);

// Kernel size 1 and at most 16 channels a group whose pixels lie side by side; whether x is such a convolution.
template <class T>
bool conv_has_pixels(const Convolution& x, int64_t lanes);
template <class T>
void conv_by_pixels(const Convolution& x, double alpha, double beta, const GroupsOut& out, int threads);

// The Gram matrix of patches that are packed as they are needed: few offsets in common, or kernel size 1. False as above.
template <class T>
bool conv_by_patches(const Engine<T>& engine, const Convolution& x, double alpha, double beta, const Out& out, int threads);

}  // namespace hvpfast
