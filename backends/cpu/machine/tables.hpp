// Tables of drafters.
#pragma once
#include "core.hpp"

namespace stemma {
inline const OperationEntry TABLES_OPERATIONS[] = {{nullptr, nullptr}};
inline const StateEntry TABLES_STATES[] = {{nullptr, nullptr}};
}  // namespace stemma
