//! Plain memory of CPU tensors, for reading and writing their numbers without copies; and tensors of a GPU brought there.

use tch::{Device, Kind, Tensor};

fn check(tensor: &Tensor) {
    assert!(
        tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "a contiguous float32 tensor on the CPU"
    );
}

/// The numbers of a contiguous float32 CPU tensor. Nobody else may use the tensor meanwhile.
#[allow(clippy::mut_from_ref)]
pub fn floats_mut(tensor: &Tensor) -> &mut [f32] {
    check(tensor);
    let count = tensor.numel();
    if count == 0 {
        return &mut [];
    }
    // SAFETY: libtorch's own memory of `count` floats, alive as long as the tensor; training has one main thread, and
    // this is only called between steps.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), count) }
}

/// The tensor itself when it is on the CPU, else a copy there; apart from any graph.
pub fn on_cpu(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(Device::Cpu).contiguous()
}

/// The tensor itself when it is on the CPU, else one of its shape there, to be filled and [`assign`]ed.
pub fn beside(tensor: &Tensor) -> Tensor {
    match tensor.device() {
        Device::Cpu => tensor.detach(),
        _ => Tensor::empty(tensor.size(), (Kind::Float, Device::Cpu)),
    }
}

/// Overwrites a tensor, wherever it is, with one of the same shape.
pub fn assign(tensor: &Tensor, from: &Tensor) {
    tch::no_grad(|| tensor.shallow_clone().copy_(from));
}

/// The same as little-endian bytes.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    let numbers = floats_mut(tensor);
    // SAFETY: floats have no padding and every byte is initialized.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The same, to be overwritten.
#[allow(clippy::mut_from_ref)]
pub fn bytes_mut(tensor: &Tensor) -> &mut [u8] {
    let numbers = floats_mut(tensor);
    // SAFETY: every bit pattern is a float.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
