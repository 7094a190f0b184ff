// Choosing tokens.
#pragma once
#include "core.hpp"

namespace stemma {
inline const OperationEntry CHOOSE_OPERATIONS[] = {{nullptr, nullptr}};
}  // namespace stemma
