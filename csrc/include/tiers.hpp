// Which instruction sets this machine offers, and which one is in use.
#pragma once

#include <cstdint>
#include <string>

#include "common.hpp"

namespace hvpfast {

// Empty if the tier can run here, else why not.
std::string tier_missing(Tier tier);
Tier best_tier();
Tier tier_in_use();
// Forces one tier for the process (std::runtime_error naming the cause where it cannot run).
void force_tier(Tier tier);
void release_tier();  // back to HVPFAST_CPU's tier, else the best one
Tier tier_from_name(const std::string& name);
const char* tier_name(Tier tier);

int64_t l2_bytes();  // of one core

}  // namespace hvpfast
