// The rehearsal device: to PyTorch a device of its own ("npu", PrivateUse1), whose memory the host cannot touch.
//
// Memory is mapped without any permission and opened only while a copy or a kernel of the device runs, so that host
// code that reads or writes it by its address ends with a fault here, as it would fail beside a real NPU.  Operators
// run on the CPU on copies; streams and events do nothing, since everything is done when it is asked for.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <map>
#include <mutex>

namespace {

using c10::Device;
using c10::DeviceIndex;
constexpr auto NPU = c10::DeviceType::PrivateUse1;

struct Region {
  size_t size;  // bytes that were asked for
  size_t mapped;  // whole pages
  int open;  // views of the host that are alive
};

std::mutex lock;
std::map<char*, Region> regions;  // by first byte
int64_t limit = 0, in_use = 0, peak = 0;
DeviceIndex num_devices = 0;
thread_local DeviceIndex current = 0;
thread_local std::map<DeviceIndex, c10::StreamId> streams;
std::atomic<int64_t> next_stream{1};

// --- memory -------------------------------------------------------------------------------------------------------

void set_access(char* begin, const Region& region, int access) {
  TORCH_CHECK(mprotect(begin, region.mapped, access) == 0, "rehearsal device: mprotect: ", strerror(errno));
}

// The region that holds an address; regions.end() if there is none.  (A tensor that came by DLPack begins inside.)
std::map<char*, Region>::iterator region_of(const void* address) {
  auto at = static_cast<char*>(const_cast<void*>(address));
  auto after = regions.upper_bound(at);
  if (after == regions.begin()) return regions.end();
  auto found = std::prev(after);
  return at < found->first + found->second.mapped ? found : regions.end();
}

void open_region(const void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = region_of(address);
  TORCH_CHECK(found != regions.end(), "rehearsal device: ", address, " is not its memory");
  if (found->second.open++ == 0) set_access(found->first, found->second, PROT_READ | PROT_WRITE);
}

void close_region(const void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = region_of(address);
  if (found != regions.end() && --found->second.open == 0) set_access(found->first, found->second, PROT_NONE);
}

void release(void* begin) {
  if (begin == nullptr) return;
  std::lock_guard<std::mutex> guard(lock);
  auto found = regions.find(static_cast<char*>(begin));
  if (found == regions.end()) return;
  in_use -= found->second.size;
  munmap(begin, found->second.mapped);
  regions.erase(found);
}

// For kernels that follow addresses in memory, all of it is open.
int all_open = 0;

void open_all() {
  std::lock_guard<std::mutex> guard(lock);
  if (all_open++) return;
  for (auto& [begin, region] : regions)
    if (region.open++ == 0) set_access(begin, region, PROT_READ | PROT_WRITE);
}

void close_all() {
  std::lock_guard<std::mutex> guard(lock);
  if (--all_open) return;
  for (auto& [begin, region] : regions)
    if (--region.open == 0) set_access(begin, region, PROT_NONE);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* begin = nullptr;
    if (size) {
      const size_t page = sysconf(_SC_PAGESIZE), mapped = (size + page - 1) / page * page;
      std::lock_guard<std::mutex> guard(lock);
      TORCH_CHECK(in_use + static_cast<int64_t>(size) <= limit, "rehearsal device: out of memory: ", size,
                  " bytes wanted, ", limit - in_use, " of ", limit, " free");
      const int open = all_open ? 1 : 0;
      begin = mmap(nullptr, mapped, open ? PROT_READ | PROT_WRITE : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(begin != MAP_FAILED, "rehearsal device: mmap of ", size, " bytes: ", strerror(errno));
      regions[static_cast<char*>(begin)] = {size, mapped, open};
      in_use += size;
      peak = std::max(peak, in_use);
    }
    return {begin, begin, &release, Device(NPU, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    if (!size) return;
    open_region(to);
    open_region(from);
    std::memcpy(to, from, size);
    close_region(from);
    close_region(to);
  }
};
Memory memory;
REGISTER_ALLOCATOR(NPU, &memory);

// The same memory as a tensor of the host, which may touch it as long as this view (or one made from it) lives.
at::Tensor host_view(const at::Tensor& tensor) {
  if (tensor.device().type() != NPU) return tensor;
  auto options = tensor.options().device(c10::kCPU);
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  void* begin = tensor.storage().mutable_data();
  open_region(begin);
  auto keep = tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       [keep, begin](void*) { close_region(begin); }, options);
}

// --- host access is told before the process ends ---------------------------------------------------------------

struct sigaction before;

void on_fault(int number, siginfo_t* info, void*) {
  bool ours = false;
  if (lock.try_lock()) {
    ours = region_of(info->si_addr) != regions.end();
    lock.unlock();
  }
  const char message[] = "\nrehearsal device: the host touched device memory (see the Python stack)\n";
  if (ours && write(2, message, sizeof message - 1) < 0) _exit(1);
  sigaction(SIGSEGV, &before, nullptr);  // the instruction runs again, and whoever was here first is told
  if (info->si_code <= 0) raise(number);
}

// --- device, streams, events -------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(NPU, current); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < num_devices, "rehearsal device: no device ", int(device.index()), ", there are ",
                int(num_devices));
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Device indexed(Device device) const { return device.has_index() ? device : getDevice(); }
  c10::Stream getStream(Device device) const override {
    Device at = indexed(device);
    return c10::Stream(c10::Stream::UNSAFE, at, streams[at.index()]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, indexed(device), 0);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device); }
  c10::Stream getNewStream(Device device, int = 0) const override {
    return c10::Stream(c10::Stream::UNSAFE, indexed(device), next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream old = getStream(stream.device());
    streams[stream.device().index()] = stream.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }
  DeviceIndex deviceCount() const noexcept override { return num_devices; }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = &memory;  // any value but null: recorded, and done
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void resize_storage(const c10::Storage& storage, size_t size) {
  auto data = memory.allocate(size);
  memory.copy_data(data.get(), storage.data(), std::min(size, storage.nbytes()));
  storage.set_data_ptr_noswap(std::move(data));
  storage.unsafeGetStorageImpl()->set_nbytes(size);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return num_devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return num_devices; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(NPU, device)); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice(Device(NPU, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  Device getDeviceFromPtr(void*) const override { return Device(NPU, current); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    resize_storage(storage, size);
  }
};

// --- operators ---------------------------------------------------------------------------------------------------

struct OnDevice {  // makes a tensor's device the current one, and goes back
  Guard guard;
  Device old;
  explicit OnDevice(std::optional<Device> device)
      : old(guard.exchangeDevice(device && device->has_index() ? *device : guard.getDevice())) {}
  ~OnDevice() { guard.uncheckedSetDevice(old); }
};

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice here(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  OnDevice here(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           KEYS, at::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  host_view(to).copy_(host_view(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return host_view(tensor).item(); }

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto from = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           from);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (tensor.sizes() == C10_AS_INTARRAYREF_SLOW(size) && !format) return tensor;
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (format) tensor.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  const size_t bytes = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  if (bytes > tensor.storage().nbytes()) resize_storage(tensor.storage(), bytes);
  return tensor;
}

void record_stream(at::Tensor&, c10::Stream) {}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

// --- what Python asks --------------------------------------------------------------------------------------------

void start(int64_t devices, int64_t bytes) {
  static Hooks hooks;
  num_devices = static_cast<DeviceIndex>(devices);
  limit = bytes;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

// Other libraries put handlers of their own in this place when they are imported: call it after them.
void watch_faults() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
}

int64_t allocated() { return in_use; }
int64_t peak_allocated() { return peak; }
void reset_peak() { peak = in_use; }
int64_t get_device() { return current; }
void set_device(int64_t device) { Guard().setDevice(Device(NPU, static_cast<DeviceIndex>(device))); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", resize);
  m.impl("record_stream", record_stream);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY(rehearsal, m) {
  m.def("start(int devices, int bytes) -> ()", start);
  m.def("watch_faults() -> ()", watch_faults);
  m.def("open_all() -> ()", open_all);
  m.def("close_all() -> ()", close_all);
  m.def("host_view(Tensor tensor) -> Tensor");
  m.def("allocated() -> int", allocated);
  m.def("peak_allocated() -> int", peak_allocated);
  m.def("reset_peak() -> ()", reset_peak);
  m.def("get_device() -> int", get_device);
  m.def("set_device(int device) -> ()", set_device);
}
TORCH_LIBRARY_IMPL(rehearsal, PrivateUse1, m) { m.impl("host_view", host_view); }
TORCH_LIBRARY_IMPL(rehearsal, CPU, m) { m.impl("host_view", host_view); }
