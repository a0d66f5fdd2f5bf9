// Runs one operation of a library of kernels on another kind of processor, where there is no NumPy.
//
//     run LIBRARY FILE
//
// FILE has numbers and names a line: the operation; how many tensors; for each its type, rank and sizes; how many of
// them are outputs, the last ones; then the bytes of the inputs.  Written to the standard output: those of the outputs.
#include <dlfcn.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

typedef int (*Operation)(int, void**, int*, int64_t**, const char**, void*, void*);

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::cerr << dlerror() << "\n", 2;
  reinterpret_cast<void (*)(int64_t)>(dlsym(library, "Threads"))(2);
  std::ifstream file(arguments[2], std::ios::binary);
  std::string name;
  int count, outputs;
  file >> name >> count;
  std::vector<std::string> types(count);
  std::vector<int> ranks(count);
  std::vector<std::vector<int64_t>> shapes(count);
  std::vector<std::vector<char>> bytes(count);
  for (int i = 0; i < count; i++) {
    file >> types[i] >> ranks[i];
    shapes[i].resize(ranks[i]);
    int64_t size = types[i] == "int8" ? 1 : types[i] == "bfloat16" ? 2 : 4;
    for (int64_t& n : shapes[i]) file >> n, size *= n;
    bytes[i].resize(size);
  }
  file >> outputs;
  file.get();
  for (int i = 0; i < count - outputs; i++) file.read(bytes[i].data(), bytes[i].size());
  if (!file) return std::cerr << arguments[2] << " ends too early\n", 2;
  std::vector<void*> data;
  std::vector<int64_t*> sizes;
  std::vector<const char*> names;
  for (int i = 0; i < count; i++) {
    data.push_back(bytes[i].data());
    sizes.push_back(shapes[i].data());
    names.push_back(types[i].c_str());
  }
  const auto operation = reinterpret_cast<Operation>(dlsym(library, name.c_str()));
  if (!operation) return std::cerr << "no operation " << name << "\n", 2;
  if (const int code = operation(count, data.data(), ranks.data(), sizes.data(), names.data(), nullptr, nullptr))
    return std::cerr << name << " returned " << code << "\n", 3;
  for (int i = count - outputs; i < count; i++) std::cout.write(bytes[i].data(), bytes[i].size());
}
