// Stands in for the toolkit's header of the same name.
#pragma once

#include "emulator.h"
