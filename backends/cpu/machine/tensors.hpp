// Array operations.
#pragma once
#include "core.hpp"

namespace stemma {
inline const OperationEntry TENSORS_OPERATIONS[] = {{nullptr, nullptr}};
}  // namespace stemma
