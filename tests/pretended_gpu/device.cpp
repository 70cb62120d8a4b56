// Two GPUs that are none: devices "privateuseone:0" and ":1" whose memory is the host's and whose
// kernels are the CPU's. As with CUDA, a tensor of one device cannot meet one of another.
//
// Storage and views are real; every other operation goes through PyTorch's CPU fallback, which
// copies its tensors to the CPU and the results back.

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

namespace {

constexpr c10::DeviceType kPretended = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

// ------------------------------------------------------------------ devices and their memory

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kPretended; }
  c10::Device getDevice() const override { return {kPretended, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kPretended, std::exchange(current, device.index())};
  }
  c10::Stream getStream(c10::Device device) const override { return only_stream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return only_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return only_stream(stream.device());
  }

 private:
  static c10::Stream only_stream(c10::Device device) {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &c10::free_cpu, c10::Device(kPretended, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    std::memcpy(to, from, count);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kPretended, &memory);

c10::Device place(std::optional<at::Device> device) {
  return {kPretended, device.has_value() && device->has_index() ? device->index() : current};
}

// The same memory as a CPU tensor, for as long as `tensor` lives.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kPretended) return tensor;
  c10::Storage storage(
      c10::Storage::use_byte_size_t{}, tensor.storage().nbytes(),
      c10::DataPtr(tensor.storage().mutable_data(), at::kCPU), /*allocator=*/nullptr,
      /*resizable=*/false);
  auto same = at::detail::make_tensor<at::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  same.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  same._set_conj(tensor.is_conj());
  same._set_neg(tensor.is_neg());
  return same;
}

// ------------------------------------------------------------------ what a backend must bring

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(place(device));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys,
      c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  at::native::resize_(to, self.sizes(), std::nullopt);
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) { return at::_local_scalar_dense(on_host(self)); }

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(
    at::Tensor& result, at::Storage storage, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(result, storage, offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& result, at::Storage storage) {
  const int64_t size = storage.nbytes() / result.dtype().itemsize();
  return at::native::set_storage_cpu_(result, storage, 0, {size}, {});
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
    std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset.has_value()) start = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

// ------------------------------------------------------------------ all other operations

// Remembers the first device and refuses another. A number may come from the host.
class OneDevice {
 public:
  explicit OneDevice(const std::string& operation) : operation_(operation) {}

  void meet(const at::Tensor& tensor) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
    if (tensor.is_cpu() && operation_.find("index") != std::string::npos &&
        operation_ != "aten::index_select")
      return;  // index() and index_put_() take indices from the host
    if (!first.has_value()) first = tensor.device();
    TORCH_CHECK(
        tensor.device() == *first, "Expected all tensors to be on the same device, but found at ",
        "least two devices, ", *first, " and ", tensor.device(), "! (", operation_, ")");
  }

  std::optional<c10::Device> first;

 private:
  std::string operation_;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  OneDevice devices(op.schema().name());
  std::optional<c10::Device> made_on;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) devices.meet(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) devices.meet(tensor);
    if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        if (tensor.has_value()) devices.meet(*tensor);
    if (value.isDevice()) made_on = value.toDevice();
  }
  const auto target = made_on.has_value() ? made_on : devices.first;
  c10::OptionalDeviceGuard guard;
  if (target.has_value() && target->type() == kPretended) guard.reset_device(place(target));
  at::native::cpu_fallback(op, stack);
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
    bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  OneDevice devices("aten::convolution");
  const at::Tensor added = bias.value_or(at::Tensor());
  for (const at::Tensor& tensor : {input, weight, added}) devices.meet(tensor);
  return at::convolution(
             on_host(input), on_host(weight), on_host(added), C10_AS_INTARRAYREF_SLOW(stride),
             C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), transposed,
             C10_AS_INTARRAYREF_SLOW(output_padding), groups.guard_int(__FILE__, __LINE__))
      .to(input.device());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("as_strided", &as_strided);
  library.impl("unfold", &at::native::unfold);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("convolution_overrideable", &convolution);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace
