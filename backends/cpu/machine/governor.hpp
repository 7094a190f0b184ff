// What speculation costs and gains.
#pragma once
#include "core.hpp"

namespace stemma {
inline const OperationEntry GOVERNOR_OPERATIONS[] = {{nullptr, nullptr}};
inline const StateEntry GOVERNOR_STATES[] = {{nullptr, nullptr}};
}  // namespace stemma
