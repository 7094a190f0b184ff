// Constraints.
#pragma once
#include "core.hpp"

namespace stemma {
inline const OperationEntry CONSTRAINT_OPERATIONS[] = {{nullptr, nullptr}};
}  // namespace stemma
