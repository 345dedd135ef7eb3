// run CASES RESULTS forward|reversed: every case of a file through the emulated kernels.
#include "run.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

namespace {

void read(std::FILE* file, void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, file) != bytes) std::exit(4);
}

std::vector<float> read_floats(std::FILE* file) {
  int64_t count;
  read(file, &count, sizeof count);
  std::vector<float> numbers(static_cast<size_t>(count));
  read(file, numbers.data(), numbers.size() * sizeof(float));
  return numbers;
}

}  // namespace

int main(int, char** arguments) {
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  if (in == nullptr || out == nullptr) return 4;
  emu::reversed = std::strcmp(arguments[3], "reversed") == 0;
  void (*const modes[])(Case&) = {run_scalar_float, run_tf32, run_tensor_bf16, run_tensor_half,
                                  run_scalar_bf16};
  for (int64_t mode; std::fread(&mode, sizeof mode, 1, in) == 1;) {
    Case c;
    read(in, &c.op, 8 * sizeof(int64_t));
    read(in, &c.alpha, sizeof c.alpha);
    c.delta = read_floats(in);
    c.act = read_floats(in);
    c.other = read_floats(in);
    modes[mode](c);
    const auto count = static_cast<int64_t>(c.out.size());
    std::fwrite(&count, sizeof count, 1, out);
    std::fwrite(c.out.data(), sizeof(float), c.out.size(), out);
  }
  return std::fclose(out) != 0;
}
