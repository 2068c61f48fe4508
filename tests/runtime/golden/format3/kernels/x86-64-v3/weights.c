#include "tw_entry.h"

TW_API const char tw_weights_id[65] = "7ea63a2f3c5305905c57e6f748de77d53be730bf64f8b517ba05b339a8bb5455";
TW_API const int64_t tw_weights_size = 3584;
TW_API const char tw_features[] = "sse4_2 popcnt cx16 avx avx2 bmi1 bmi2 f16c fma abm movbe";
