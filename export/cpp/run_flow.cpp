// A whole flow from C++: libtorch and the op library, no Python.
//
//     run_flow libscaphoid_ops.so torchscript/msfm.pt radiograph.pgm
//
// The radiograph is a binary PGM of 8 bits, already of the size that the flow takes (scaphoid-export writes it into the
// manifest as image_size): decoding and resizing belong to the caller. Prints each output's name and its values; boxes
// are x0 y0 x1 y1 in pixels of the PGM. Built with the compiler and the headers that torch itself brings:
//
//     TORCH=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
//     g++ -std=c++20 -O1 run_flow.cpp -o run_flow -I$TORCH/include -I$TORCH/include/torch/csrc/api/include
//         -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -ldl
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

// uint8 [1, 1, height, width]
at::Tensor read_pgm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, white = 0;
  file >> magic >> width >> height >> white;
  file.get();  // the one space before the pixels
  if (!file || magic != "P5" || white != 255 || width < 1 || height < 1 || width * height > 100'000'000)
    throw std::runtime_error(path + ": expected a binary PGM (P5) of 8 bits");
  at::Tensor image = at::empty({1, 1, height, width}, at::kByte);
  file.read(static_cast<char*>(image.mutable_data_ptr()), image.numel());
  if (!file) throw std::runtime_error(path + ": its pixels are cut short");
  return image;
}

int main(int count, char** arguments) try {
  if (count != 4) throw std::runtime_error("expected LIBRARY FLOW RADIOGRAPH");
  if (!dlopen(arguments[1], RTLD_NOW)) throw std::runtime_error(dlerror());  // registers the ops
  torch::jit::ExtraFilesMap names{{"outputs", ""}};
  torch::jit::Module flow = torch::jit::load(arguments[2], at::kCPU, names);

  c10::InferenceMode inference;
  const at::Tensor image = read_pgm(arguments[3]);
  const at::Tensor original_size = at::tensor({image.size(2), image.size(3)}, at::kInt).unsqueeze(0);
  const auto outputs = flow.forward({image, original_size}).toTuple();

  std::istringstream lines(names["outputs"]);
  for (const c10::IValue& output : outputs->elements()) {
    std::string name;
    lines >> name;
    const at::Tensor values = output.toTensor().flatten().contiguous();
    std::cout << name;
    for (int64_t i = 0; i < values.numel(); ++i) std::cout << ' ' << values.const_data_ptr<float>()[i];
    std::cout << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << "run_flow: " << error.what() << '\n';
  return 1;
}
