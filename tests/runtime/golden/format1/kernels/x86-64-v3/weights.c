#include "tw_runtime.h"

TW_API const char tw_weights_id[65] = "e3a6a578b0412c2e18d8f8ef256a07f4bb5a6d1794f9b1a3bede16a2eebf947f";
TW_API const int64_t tw_weights_size = 3008;
